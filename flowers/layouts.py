"""Every copy of the dataset that people have, read into one form.

`read_layout` tries the functions of LAYOUTS in order. To add a layout, write a function that takes
the folder and --splits_path and returns a Layout, or None if the folder is laid out in another way,
and add it to LAYOUTS. Everything that comes from a file is checked here, so that a Layout can be
trusted.
"""

import gzip
import io
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowers import UserError
from flowers.files import parse_json, read_json
from flowers.matfile import MOST_BYTES, read_mat

OXFORD_IDS = ("trnid", "valid", "tstid")

# CLIP's authors use another name for three classes (openai/CLIP, data/prompts.md).
OPENAI_NAMES = {
    "globe-flower": "globe flower",
    "pink-yellow dahlia": "pink and yellow dahlia",
    "ball moss": "air plant",
}


@dataclass(frozen=True)
class Layout:
    """What a folder says about the dataset; image ids and labels are 1-based, as Oxford's.

    files: image id -> path, at least for each image that a split lists.
    labels: (n,) int64; the label of image id i is at i - 1.
    class_names: the name of label i is at i - 1.
    split_ids: trnid, valid and tstid -> (m,) int64 image ids; no image is listed twice.
    """

    files: dict[int, Path]
    labels: np.ndarray
    class_names: list[str]
    split_ids: dict[str, np.ndarray]


# -----------------------------------------------------------------------------
# layouts


def torchvision_folder(root: Path, splits_path: Path | None) -> Layout | None:
    """`jpg/`, imagelabels.mat and setid.mat: the authors' files, as torchvision unpacks them."""
    if not (root / "jpg").is_dir():
        return None
    return _oxford_folder(root, root / "jpg", splits_path)


def original_folder(root: Path, splits_path: Path | None) -> Layout | None:
    """`images/jpg/`, labels.npz and a split JSON: the folder of the original project."""
    if not (root / "images" / "jpg").is_dir():
        return None
    return _oxford_folder(root, root / "images" / "jpg", splits_path)


LAYOUTS: tuple[Callable[[Path, Path | None], Layout | None], ...] = (
    torchvision_folder,
    original_folder,
)


def read_layout(root: Path, splits_path: str | Path | None = None) -> Layout:
    """Read a copy of the dataset by the first of LAYOUTS that knows it.

    splits_path: file of the splits, instead of the one that the layout has.
    Raises UserError if no layout fits, or a file is missing, damaged or contradicts another one.
    """
    splits_path = Path(splits_path) if splits_path else None  # an empty flag counts as none
    for read in LAYOUTS:
        layout = read(root, splits_path)
        if layout is not None:
            return layout
    raise UserError(
        f"{root} has neither jpg/ nor images/jpg/: is it the folder of Oxford Flowers 102?"
    )


def _oxford_folder(root: Path, image_folder: Path, splits_path: Path | None) -> Layout:
    """Oxford's numbered images. Labels may be a .mat or an .npz in both layouts."""
    # Ids and labels are tied by their number, so the labels say which ids there can be.
    labels = read_labels(root)
    split_ids = read_split_ids(splits_path or root / "setid.mat", n_labels=len(labels))
    class_names = read_names(root, n_classes=int(labels.max()))

    # An id that is listed twice is in two splits, or counted twice in one: both are wrong.
    listed = np.concatenate(list(split_ids.values()))
    unique_ids = np.unique(listed)
    if len(unique_ids) < len(listed):
        raise UserError(
            f"the splits of {root} list an image more than once: "
            "training and test images must be disjoint"
        )

    # Images that no split lists may be there or not: people cut the dataset down to what they need.
    files = find_images(image_folder)
    missing = [image_id for image_id in unique_ids.tolist() if image_id not in files]
    if missing:
        raise UserError(
            f"missing image {image_folder / f'image_{missing[0]:05d}.jpg'} "
            f"({len(missing)} of {len(unique_ids)} listed in the splits are not there)"
        )
    return Layout(files, labels, class_names, split_ids)


# -----------------------------------------------------------------------------
# the files of a layout


def find_images(folder: Path) -> dict[int, Path]:
    """Image id -> path. The id is the number in the file name, never the rank in the listing."""
    files = {}
    for path in folder.iterdir():
        match = re.fullmatch(r"image_(\d+)\.jpe?g", path.name)
        if match:
            files[int(match[1])] = path
    return files


def read_labels(root: Path) -> np.ndarray:
    """The 1-based labels of imagelabels.mat or labels.npz, (n,) int64; image id i is at i - 1.

    Raises UserError if there is no such file or it holds anything but labels.
    """
    # Either file may stand in either layout: people convert one into the other.
    path = root / "imagelabels.mat"
    if not path.exists():
        path = root / "labels.npz"
    if not path.exists():
        raise UserError(f"{root} has neither imagelabels.mat nor labels.npz")

    try:
        values = read_mat(path)["labels"] if path.suffix == ".mat" else _read_npz(path)
        labels = _as_integers(values)
        if len(labels) == 0:
            raise ValueError("no labels")
    except Exception as error:  # zipfile and numpy raise many kinds for a damaged file
        raise UserError(f"{path} can't be read: {type(error).__name__}: {error}") from None
    if labels.min() < 1:
        raise UserError(f"{path} holds a label below 1: labels are 1-based")
    return labels


def read_split_ids(path: Path, n_labels: int) -> dict[str, np.ndarray]:
    """The 1-based image ids of trnid, valid and tstid, from a setid.mat or a JSON object.

    A JSON file that holds a 0 is taken as 0-based. Raises UserError if the file is missing or
    damaged, if trnid or tstid is empty, or if an id is not among 1 ... n_labels.
    """
    if not path.exists():
        raise UserError(
            f"no splits at {path}: give --splits_path a setid.mat, "
            f"or a JSON with {', '.join(OXFORD_IDS)}"
        )
    is_json = path.suffix == ".json"
    try:
        contents = read_json(path) if is_json else read_mat(path)
        split_ids = {name: _as_integers(contents[name]) for name in OXFORD_IDS}
    except Exception as error:  # of JSON, of a MATLAB file, of numpy
        raise UserError(f"{path} can't be read: {type(error).__name__}: {error}") from None
    if len(split_ids["trnid"]) == 0 or len(split_ids["tstid"]) == 0:
        raise UserError(f"{path} lists no image under trnid or tstid")

    # JSON files of the original project count from 0, others from 1. Only a 0 tells which.
    all_ids = np.concatenate(list(split_ids.values()))
    if is_json and all_ids.min() == 0:
        split_ids = {name: ids + 1 for name, ids in split_ids.items()}
        all_ids = all_ids + 1

    for image_id in (all_ids.min(), all_ids.max()):
        if not 1 <= image_id <= n_labels:
            raise UserError(
                f"{path} lists image id {image_id}, which has no label: "
                f"there are labels for ids 1 to {n_labels}"
            )
    return split_ids


def read_names(root: Path, n_classes: int) -> list[str]:
    """The class names of cat_to_name.json, in the folder or else in this package.

    The file may name more than `n_classes` classes, and all of its names are returned. Raises
    UserError if it is damaged, a class has no name, or two have the same.
    """
    path = root / "cat_to_name.json"
    if not path.exists():
        path = Path(__file__).with_name("cat_to_name.json")
    try:
        name_of = {int(number): name for number, name in read_json(path).items()}
    except ValueError as error:
        raise UserError(f"{path} can't be read: {error}") from None

    names = []
    for number in range(1, max(n_classes, len(name_of)) + 1):
        # The first gap ends the search: a damaged label may claim a thousand million classes.
        name = name_of.get(number)
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{path} has no name for class {number}")
        names.append(correct_name(name))
    if len(set(names)) < len(names):
        raise UserError(f"{path} gives two classes the same name")
    return names


def correct_name(name: str) -> str:
    """The name of a class without the mistake that some copies of cat_to_name.json make.

    They say "lotus lotus" for class 78, and so do the runs that were made with them.
    """
    return "lotus" if name == "lotus lotus" else name


def name_key(name: str) -> str:
    """What all ways of writing the name of a class have in common, to match names of two files.

    Upper and lower case, `_`, `-` and spaces make no difference, nor do Oxford's and CLIP's names.
    """
    key = " ".join(re.split(r"[\s_-]+", name.casefold())).strip()
    for oxford_name, openai_name in OPENAI_NAMES.items():
        # "globe-flower" is "globe flower" here.
        if key == oxford_name.replace("-", " "):
            return openai_name
    return correct_name(key)


def read_captions(path: str | Path, files: tuple[Path, ...]) -> list[list[str]]:
    """The sentences of each image of `files`, in their order.

    path: one JSON object a line with `file` (a name) and `captions` (a list), gzipped or not.
    Raises UserError if a line is damaged or an image has no sentence.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no captions at {path}")

    captions_of = {}  # file name -> sentences
    try:
        # Not splitlines: it would also split at Unicode's line separators, within a caption.
        for line in _read_text(path).removesuffix("\n").split("\n"):
            row = parse_json(line)
            sentences = row["captions"]
            if not _are_sentences(sentences):
                raise ValueError("captions are a list of sentences")
            captions_of[row["file"]] = sentences
    except (ValueError, KeyError, TypeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path} is damaged after {len(captions_of)} lines ({type(error).__name__}: {error})"
        ) from None

    # The file may describe more images than the dataset has; those are ignored.
    without = [file.name for file in files if not captions_of.get(file.name)]
    if without:
        raise UserError(f"{path} has no caption for {without[0]} (and {len(without) - 1} more)")
    return [captions_of[file.name] for file in files]


# -----------------------------------------------------------------------------
# contents of files


def _read_npz(path: Path) -> np.ndarray:
    """`arr_0` of an .npz. zipfile compares its checksum; pickled objects are refused."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        data = file.read(MOST_BYTES)
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def _read_text(path: Path) -> str:
    """A text file in UTF-8, gzipped if its name ends in .gz. Raises ValueError if too large."""
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)  # one more than allowed, to see whether it is too large
    if len(data) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES >> 20} MB")
    return data.decode("utf-8")


def _are_sentences(value) -> bool:
    """Whether a value is a list of texts, none of them blank."""
    if not isinstance(value, list):
        return False
    return all(isinstance(sentence, str) and sentence.strip() for sentence in value)


def _as_integers(values) -> np.ndarray:
    """Integers in any shape and numeric type as (n,) int64. Raises ValueError for anything else."""
    values = np.asarray(values).ravel()
    is_number = values.dtype.kind in "iuf"  # signed, unsigned, floating point
    # NaN fails the first comparison, infinity too. MATLAB stores integers as doubles by default.
    if not is_number or not (abs(values) < 2**31).all() or (values != np.floor(values)).any():
        raise ValueError("these are not whole numbers")
    return values.astype(np.int64)
