"""The built-in sample dataset: 24 kinds of flower, 40 drawn pictures each.

    python -m flowers.sample --root data/sample

960 JPEGs of 160 x 160 pixels in torchvision's layout of Oxford Flowers 102, in about 20 seconds,
without a download, and the same bytes each time on one machine.
"""

import json
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
from scipy.io import savemat
from tqdm import tqdm

from flowers import UserError
from flowers.matfile import read_mat
from flowers.sample.kinds import KINDS
from flowers.sample.scene import draw_flower

# The content of sample.json. Raise the version when the pictures change.
MARKER = {"drawn_by": "flowers/sample.py", "version": 1}
PER_SPLIT = {"trnid": 10, "valid": 10, "tstid": 20}  # images of each kind
PER_KIND = sum(PER_SPLIT.values())
SEED = 102
JPEG_QUALITY = 92
JPEG_END = b"\xff\xd9"  # the last bytes of a whole JPEG
ABANDONED_AFTER = 60  # seconds without a new file: the process was killed

# -----------------------------------------------------------------------------
# check


def jpegs_are_whole(root: Path, count: int) -> bool:
    """Return whether the images 1 to `count` are there and end as a JPEG does."""
    for number in range(1, count + 1):
        jpeg = (root / "jpg" / f"image_{number:05d}.jpg").read_bytes()
        if not jpeg.endswith(JPEG_END):
            return False
    return True


def tables_are_right(root: Path, count: int) -> bool:
    """Return whether marker, names, labels and splits are those of this version."""
    marker = json.loads((root / "sample.json").read_text(encoding="utf-8"))
    names = json.loads((root / "cat_to_name.json").read_text(encoding="utf-8"))
    labels = read_mat(root / "imagelabels.mat")["labels"]
    splits = read_mat(root / "setid.mat")
    ids = np.hstack([splits[split][0] for split in PER_SPLIT])
    right_ids = sorted(ids) == list(range(1, count + 1))
    right_names = list(names.values()) == list(KINDS)
    return marker == MARKER and right_names and labels.shape == (1, count) and right_ids


def is_complete(root: Path) -> bool:
    """Return whether root holds a sample of this version with all its files whole."""
    count = len(KINDS) * PER_KIND
    try:
        return jpegs_are_whole(root, count) and tables_are_right(root, count)
    except Exception:  # numpy and json raise a dozen kinds of error at damaged files
        return False


# -----------------------------------------------------------------------------
# draw


def draw_all(folder: Path) -> None:
    """Write the whole dataset into an empty folder."""
    count = len(KINDS) * PER_KIND
    # Shuffled, so that an image's number says nothing about its kind.
    numbers = np.random.default_rng(SEED).permutation(count) + 1
    numbers = numbers.reshape(len(KINDS), PER_KIND)
    labels = np.zeros((1, count), np.uint8)  # 1-based, as Oxford's

    (folder / "sample.json").write_text(json.dumps(MARKER), encoding="utf-8")
    (folder / "jpg").mkdir()
    with tqdm(total=count, desc="drawing the sample", unit="img") as bar:
        for k, kind in enumerate(KINDS):
            for i in range(PER_KIND):
                photo = draw_flower(kind, np.random.default_rng((SEED, k, i)))
                bgr = photo[..., ::-1]
                jpeg = cv2.imencode(".jpg", bgr, (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY))[1]
                number = numbers[k, i]
                (folder / "jpg" / f"image_{number:05d}.jpg").write_bytes(jpeg.tobytes())
                labels[0, number - 1] = k + 1
                bar.update()

    savemat(folder / "imagelabels.mat", {"labels": labels})
    savemat(folder / "setid.mat", split_ids(numbers))
    names = {str(label): kind for label, kind in enumerate(KINDS, 1)}
    (folder / "cat_to_name.json").write_text(json.dumps(names, indent=1), encoding="utf-8")


def split_ids(numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Divide the image numbers (kinds, PER_KIND) into splits, each (1, n) uint16."""
    boundaries = np.cumsum(list(PER_SPLIT.values()))[:-1]
    splits = {}
    for name, ids in zip(PER_SPLIT, np.split(numbers, boundaries, axis=1)):
        splits[name] = np.sort(ids.astype(np.uint16), axis=None)[None]
    return splits


# -----------------------------------------------------------------------------
# write


def remove_abandoned(root: Path) -> None:
    """Remove the folders beside root that killed processes have left behind."""
    for folder in root.parent.glob(f".{root.name}.drawing-*"):
        with suppress(FileNotFoundError):  # another process may tidy up too
            written = [folder.stat().st_mtime]
            written += [jpg.stat().st_mtime for jpg in folder.glob("jpg")]
            if time.time() - max(written) > ABANDONED_AFTER:
                shutil.rmtree(folder)


def holds_other_data(root: Path) -> bool:
    """Return whether root is something that is neither a sample nor an empty folder."""
    if not root.exists() or (root / "sample.json").exists():
        return False
    return not root.is_dir() or any(root.iterdir())


def write_sample(root: str | Path = "data/sample") -> Path:
    """Draw the sample dataset at `root` unless it is there, and return its path.

    Everything is drawn into a folder beside root that is renamed at the end: root is never
    half-written, and two processes may do this at once. An incomplete or older sample is
    replaced. Raises UserError if root holds anything else.
    """
    root = Path(root)
    remove_abandoned(root)
    if is_complete(root):
        return root
    if holds_other_data(root):
        raise UserError(
            f"{root} holds something else than this program's sample: "
            "name another folder, or move it away"
        )
    root.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{root.name}.drawing-", dir=root.parent))
    try:
        draw_all(work)
        work.chmod(0o755)  # mkdtemp's folders are for their owner alone
        if not is_complete(root):  # else another process was faster
            if root.exists():
                shutil.rmtree(root)
            work.rename(root)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return root
