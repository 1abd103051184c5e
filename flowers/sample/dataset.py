"""The built-in sample dataset: 24 kinds of flower, 40 drawn pictures each, in torchvision's layout of Oxford Flowers 102.

    python -m flowers.sample --root data/sample

960 JPEGs of 160 x 160 pixels in about 20 seconds, no download, the same bytes each time on one machine. Colours and backgrounds are
shared between the kinds on purpose: a model has to look at structure, a colour histogram is not enough.
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
from flowers.sample.draw import KINDS, draw_flower

MARKER = {
    "drawn_by": "flowers/sample.py",
    "version": 1,
}  # in sample.json; raise the version when the pictures change
PER_SPLIT = {"trnid": 10, "valid": 10, "tstid": 20}  # images of each kind
PER_KIND = sum(PER_SPLIT.values())
SEED = 102


def is_complete(root: Path) -> bool:
    """Whether root holds a sample of this version with all its files whole."""
    count = len(KINDS) * PER_KIND
    try:
        names = json.loads((root / "cat_to_name.json").read_text())
        splits = read_mat(root / "setid.mat")
        jpegs = [(root / "jpg" / f"image_{i:05d}.jpg").read_bytes() for i in range(1, count + 1)]
        return (
            all(jpeg.endswith(b"\xff\xd9") for jpeg in jpegs)  # the last bytes of a whole JPEG
            and json.loads((root / "sample.json").read_text()) == MARKER
            and list(names.values()) == list(KINDS)
            and read_mat(root / "imagelabels.mat")["labels"].shape == (1, count)
            and sorted(np.hstack([splits[name][0] for name in PER_SPLIT]))
            == list(range(1, count + 1))
        )
    except Exception:  # numpy and json raise a dozen kinds of error at damaged files; whatever it is, the sample is not whole
        return False


def draw_all(folder: Path) -> None:
    """Write the whole dataset into an empty folder; an image's number says nothing about its kind."""
    numbers = (
        np.random.default_rng(SEED).permutation(len(KINDS) * PER_KIND).reshape(len(KINDS), PER_KIND)
        + 1
    )
    labels = np.zeros((1, numbers.size), np.uint8)
    (folder / "sample.json").write_text(json.dumps(MARKER))
    (folder / "jpg").mkdir()
    for index in tqdm(range(numbers.size), desc="drawing the sample", unit="img"):
        k, i = divmod(index, PER_KIND)
        photo = draw_flower(list(KINDS)[k], np.random.default_rng((SEED, k, i)))
        jpeg = cv2.imencode(".jpg", photo[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, 92))[1]
        (folder / "jpg" / f"image_{numbers[k, i]:05d}.jpg").write_bytes(jpeg.tobytes())
        labels[0, numbers[k, i] - 1] = k + 1
    savemat(folder / "imagelabels.mat", {"labels": labels})
    parts = np.split(numbers, np.cumsum(list(PER_SPLIT.values()))[:-1], axis=1)
    savemat(
        folder / "setid.mat",
        {
            name: np.sort(ids.astype(np.uint16), axis=None)[None]
            for name, ids in zip(PER_SPLIT, parts)
        },
    )
    (folder / "cat_to_name.json").write_text(
        json.dumps({str(k): name for k, name in enumerate(KINDS, 1)}, indent=1)
    )


def write_sample(root: str | Path = "data/sample") -> Path:
    """Draw the sample dataset at `root` unless it is there, and return its path.

    Everything is drawn into a folder beside root that is renamed at the end: root is never half-written, and two processes may do
    this at once. An incomplete or older sample is replaced; raises UserError if root holds anything else.
    """
    root = Path(root)
    for old in root.parent.glob(f".{root.name}.drawing-*"):
        with suppress(FileNotFoundError):  # another process may tidy up too
            if (
                time.time() - max(path.stat().st_mtime for path in (old, *old.glob("jpg"))) > 60
            ):  # no file for a minute: its run was killed
                shutil.rmtree(old)
    if is_complete(root):
        return root
    if (
        root.exists()
        and not (root / "sample.json").exists()
        and (not root.is_dir() or any(root.iterdir()))
    ):
        raise UserError(
            f"{root} holds something else than this program's sample: name another folder, or move it away"
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
