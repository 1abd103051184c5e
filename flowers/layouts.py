"""Every copy of the dataset that people have, read into one form.

`read_layout` tries the functions of LAYOUTS in order. To add a layout, write a function of two
folders (the one to read, and the one that the user gave, which may be above it) that returns a
Layout, or None if the folder is laid out in another way, and add it to LAYOUTS. Everything that
comes from a file is checked here, so that a Layout can be trusted.
Splits that come from a file of their own are read in flowers.splits.
"""

import functools
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
from flowers.files import note, parse_json, read_json
from flowers.matfile import MOST_BYTES, read_mat

# CLIP's authors use another name for three classes (openai/CLIP, data/prompts.md).
OPENAI_NAMES = {
    "globe-flower": "globe flower",
    "pink-yellow dahlia": "pink and yellow dahlia",
    "ball moss": "air plant",
}

# What is read as a picture, in upper or lower case. What is in the file is seen when it is decoded.
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
# Pictures that are not read. They are left out of a class folder with a word, other files without.
OTHER_PICTURES = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".tif", ".tiff")
NUMBERED = re.compile(r"image_(\d+)\.(?:jpe?g|png|webp)", re.IGNORECASE)

# How people call the folders of a split.
SPLIT_OF_FOLDER = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
# Class names by label; a copy of Oxford's lies in this package, for datasets that have none.
NAMES_FILE = "cat_to_name.json"


@dataclass(frozen=True)
class Layout:
    """What a folder says about the dataset; image ids and labels are 1-based, as Oxford's.

    root: the folder of the data. It may lie within the folder that was given.
    files: image id -> path.
    labels: (n,) int64; the label of image id i is at i - 1. 0 where a class folder has no image i.
    class_names: the name of label i is at i - 1.
    is_numbered: whether an image's id is the number in its file name; else ids count the files.
    is_oxford: whether these numbers and labels are those of Oxford Flowers 102.
    own_splits: train, val and test -> (m,) int64 image ids, where folders say them; else None.
    """

    root: Path
    files: dict[int, Path]
    labels: np.ndarray
    class_names: list[str]
    is_numbered: bool = True
    is_oxford: bool = False
    own_splits: dict[str, np.ndarray] | None = None


# -----------------------------------------------------------------------------
# layouts


def torchvision_folder(root: Path, above: Path) -> Layout | None:
    """`jpg/`, imagelabels.mat and setid.mat: the authors' files, as torchvision unpacks them."""
    if not (root / "jpg").is_dir():
        return None
    return _oxford_folder(root, root / "jpg")


def original_folder(root: Path, above: Path) -> Layout | None:
    """`images/jpg/`, labels.npz and a split JSON: the folder of the original project."""
    if not (root / "images" / "jpg").is_dir():
        return None
    return _oxford_folder(root, root / "images" / "jpg")


def class_folders(root: Path, above: Path) -> Layout | None:
    """One folder a class, with or without `train/`, `valid/` and `test/` above them.

    above: the folder that was given, in which the names may lie.
    """
    # A folder of several datasets: ours is read.
    if (root / "flowers-102").is_dir():
        return None
    pictures = _list_class_folders(root)
    if not pictures:
        return None
    folders = {picture.folder for picture in pictures}
    if len(folders) < 2:
        raise UserError(f"{root} has pictures of one class only ({min(folders)}): give two or more")
    if _is_oxford_copy(root, pictures):
        return _oxford_class_folders(root, above, pictures)
    return _own_class_folders(root, above, pictures)


# The most specific first: jpg/ could also be taken for a class folder.
LAYOUTS: tuple[Callable[[Path, Path], Layout | None], ...] = (
    torchvision_folder,
    original_folder,
    class_folders,
)


def read_layout(root: Path) -> Layout:
    """Read a copy of the dataset by the first of LAYOUTS that knows it.

    root: its folder, the folder that holds `flowers-102/`, or one that holds nothing else.
    Raises UserError if no layout fits, or a file is missing, damaged or contradicts another one.
    """
    # Archives are often unpacked into a folder of the same name: flower_data/flower_data/train.
    candidates = [root, root / "flowers-102"]
    folders = visible_folders(root)
    if len(folders) == 1:
        candidates.append(folders[0])
    for folder in filter(Path.is_dir, candidates):
        for read in LAYOUTS:
            layout = read(folder, root)
            if layout is not None:
                return layout
    raise UserError(
        f"{root} has neither jpg/ nor images/jpg/ nor a folder of pictures for each class: "
        "is it the folder of the dataset?"
    )


def _oxford_folder(root: Path, image_folder: Path) -> Layout:
    """Oxford's numbered images. Labels may be a .mat or an .npz in both layouts."""
    labels = read_labels(root)
    class_names = read_names(root, n_classes=int(labels.max()))
    official = official_labels()
    is_oxford = np.array_equal(labels, official)
    # Some copies number the classes in the order of a text sort: then names fit no label.
    if np.array_equal(labels, text_sorted_labels()[official - 1]):
        raise UserError(
            f"the labels of {root} count the classes in the order of a text sort (1, 10, 100, 101, "
            "...), not as Oxford does: fetch the authors' imagelabels.mat"
        )
    # Images that no split lists may be there or not: people cut the dataset down to what they need.
    return Layout(root, find_images(image_folder), labels, class_names, is_oxford=is_oxford)


# -----------------------------------------------------------------------------
# class folders


@dataclass(frozen=True)
class Picture:
    """A file in a class folder: its path, the name of the folder, and its split if that is said."""

    path: Path
    folder: str
    split: str | None


def visible_folders(root: Path) -> list[Path]:
    """The folders within a folder, sorted; not the hidden ones and those that macOS adds."""
    folders = []
    for path in sorted(root.iterdir()):
        is_hidden = path.name.startswith(".") or path.name == "__MACOSX"
        if path.is_dir() and not is_hidden:
            folders.append(path)
    return folders


def _list_class_folders(root: Path) -> list[Picture]:
    """All pictures in class folders; none if the folder has no such folders."""
    split_folders = {}
    for folder in visible_folders(root):
        split = SPLIT_OF_FOLDER.get(folder.name.lower())
        if split in split_folders:
            raise UserError(f"{root} has two folders for {split}: {split_folders[split]}, {folder}")
        if split is not None:
            split_folders[split] = folder

    # A class may be called train, too: there the folder holds pictures, not folders.
    if "train" not in split_folders or not visible_folders(split_folders["train"]):
        return _list_one_folder(root, split=None)
    pictures = []
    for split, folder in split_folders.items():
        found = _list_one_folder(folder, split)
        if not found and _pictures_in(folder):
            raise UserError(
                f"the pictures of {folder} lie in no class folder, so they have no label: "
                "sort them into folders, or move them away"
            )
        pictures += found
    with_pictures = {picture.folder for picture in pictures}
    for folder in visible_folders(split_folders["train"]):
        if folder.name not in with_pictures:
            raise UserError(f"the class folder {folder} holds no picture: remove it or fill it")
    return pictures


def _list_one_folder(root: Path, split: str | None) -> list[Picture]:
    """The pictures in the class folders of one folder."""
    pictures = []
    without = []
    n_other = 0
    for folder in visible_folders(root):
        paths = _pictures_in(folder)
        # ImageFolder would take several datasets in one folder for classes.
        if paths and visible_folders(folder):
            raise UserError(f"{folder} holds pictures and folders: a class is one folder")
        if not paths:
            without.append(folder)
        pictures += [Picture(path, folder.name, split) for path in paths]
        n_other += len(_pictures_in(folder, OTHER_PICTURES))
    # In a split, a class may be missing from one part.
    if pictures and without and split is None:
        raise UserError(f"the class folder {without[0]} holds no picture: remove it or fill it")
    if n_other:
        note(f"{n_other} pictures in {root} are left out: {', '.join(PICTURES)} are read")
    return pictures


def _pictures_in(folder: Path, endings: tuple[str, ...] = PICTURES) -> list[Path]:
    """The pictures that lie in a folder, sorted; hidden files and macOS's ._* are no pictures."""
    paths = []
    for path in folder.iterdir():
        if path.suffix.lower() in endings and not path.name.startswith("."):
            paths.append(path)
    return sorted(paths)


def _is_oxford_copy(root: Path, pictures: list[Picture]) -> bool:
    """Whether class folders hold Oxford's numbered images under Oxford's numbers or names.

    Raises UserError if the images are Oxford's, and the folders are not those of their classes.
    """
    official = official_labels()
    # None stands for a file without a number, and for a folder that is no class of Oxford's.
    numbers = [_number_in(picture.path) for picture in pictures]
    folder_labels = [_oxford_label_of(picture.folder) for picture in pictures]
    if None in numbers or None in folder_labels:
        return False
    if min(numbers) < 1 or max(numbers) > len(official):
        return False
    labels = official[np.array(numbers) - 1]  # (n,) what the numbers say
    folder_labels = np.array(folder_labels)  # (n,) what the folders say
    wrong = np.flatnonzero(labels != folder_labels)
    if len(wrong) == 0:
        return True

    # Each folder has one class, and each class one folder: Oxford's images in another order.
    # Folders that were numbered by a text sort (1, 10, 100, ...) or from 0 look so.
    pairs = set(zip(folder_labels.tolist(), labels.tolist()))
    is_renumbered = len(pairs) == len(np.unique(labels)) == len(np.unique(folder_labels))
    # Another dataset, whose files are numbered too, would agree by chance only.
    is_misplaced = len(wrong) < len(pictures) / 2
    if is_renumbered or is_misplaced:
        picture = pictures[wrong[0]]
        raise UserError(
            f"{picture.path.relative_to(root)} is an image of Oxford's class {labels[wrong[0]]}, "
            f"but lies in folder {picture.folder} ({len(wrong)} of {len(pictures)} images do): "
            "folders must have Oxford's labels as numbers, not counted from 0 or in the order of "
            "a text sort (1, 10, 100, ...)"
        )
    return False


def _oxford_class_folders(root: Path, above: Path, pictures: list[Picture]) -> Layout:
    """Class folders of Oxford's images. Ids are Oxford's; classes without a folder are left out."""
    official = official_labels()
    files = {}
    for picture in pictures:
        number = _number_in(picture.path)
        # In two folders of the split: the test would be on an image of the training.
        if number in files:
            raise UserError(f"image {number} is in {root} twice: {files[number]}, {picture.path}")
        files[number] = picture.path

    # Gaps in the ids stay: an id must name the same picture in every copy of the dataset.
    ids = np.array(sorted(files))
    # Labels count the classes that are there, in Oxford's order, as ImageFolder does.
    oxford_labels, labels_of_ids = np.unique(official[ids - 1], return_inverse=True)
    labels = np.zeros(len(official), dtype=np.int64)
    labels[ids - 1] = labels_of_ids + 1
    # The names file is keyed by Oxford's labels.
    names = read_names(root, len(text_sorted_labels()), above)
    class_names = [names[label - 1] for label in oxford_labels]

    id_of = {path: number for number, path in files.items()}
    own_splits = _splits_of(pictures, id_of)
    return Layout(root, files, labels, class_names, is_oxford=True, own_splits=own_splits)


def _own_class_folders(root: Path, above: Path, pictures: list[Picture]) -> Layout:
    """Class folders of any dataset. Ids count the files by class, then by path."""
    folders = sorted({picture.folder for picture in pictures})
    # Sorted as text, 10 would come before 2.
    if all(folder.isdecimal() for folder in folders):
        folders.sort(key=int)
    label_of = {folder: label for label, folder in enumerate(folders, start=1)}
    class_names = _names_of_folders(root, above, folders)

    ordered = sorted(pictures, key=lambda picture: (label_of[picture.folder], picture.path))
    files = {number: picture.path for number, picture in enumerate(ordered, start=1)}
    labels = np.array([label_of[picture.folder] for picture in ordered])
    id_of = {path: number for number, path in files.items()}
    own_splits = _splits_of(ordered, id_of)
    return Layout(root, files, labels, class_names, is_numbered=False, own_splits=own_splits)


def _splits_of(pictures: list[Picture], id_of: dict[Path, int]) -> dict[str, np.ndarray] | None:
    """The image ids of train, val and test, or None if no folder says them."""
    # Either all folders lie below train/, valid/ and test/, or none does.
    if pictures[0].split is None:
        return None
    ids = {split: [] for split in ("train", "val", "test")}
    for picture in pictures:
        ids[picture.split].append(id_of[picture.path])
    return {split: np.array(numbers, dtype=np.int64) for split, numbers in ids.items()}


def _names_of_folders(root: Path, above: Path, folders: list[str]) -> list[str]:
    """The class names of folders: of a names file (folder -> name), else those of the folders."""
    path = _find_names_file(root, above)
    if path is None:
        names = [folder.replace("_", " ").strip() for folder in folders]
        if all(folder.isdecimal() for folder in folders):
            raise UserError(
                f"the class folders of {root} are numbers: say their names in "
                f'{root / NAMES_FILE}, as in {{"1": "rose", ...}}'
            )
    else:
        # 01 and 1 are the same number.
        name_of = {_folder_key(key): name for key, name in _read_names_file(path).items()}
        names = [name_of.get(_folder_key(folder)) for folder in folders]
        for folder, name in zip(folders, names):
            if not isinstance(name, str) or not name.strip():
                raise UserError(f"{path} has no name for the class folder {folder}")
    # CLIP's tokenizer lowers all text, so such classes would have the same prompt.
    lowered = [name.lower() for name in names]
    for name in names:
        if lowered.count(name.lower()) > 1:
            raise UserError(f"{path or root} gives two classes the same name: {name}")
    return names


def _folder_key(folder: str) -> str:
    """A folder's name; a number without its leading zeros."""
    return str(int(folder)) if folder.isdecimal() else folder


def _number_in(path: Path) -> int | None:
    """The number in a file name such as image_00001.jpg, else None."""
    match = NUMBERED.fullmatch(path.name)
    return int(match[1]) if match else None


# -----------------------------------------------------------------------------
# Oxford's labels and names


@functools.cache
def official_labels() -> np.ndarray:
    """Oxford's own labels, (8189,) int64 and 1-based; that of image id i is at i - 1."""
    # Images of a class are mostly numbered in a row: pairs of label and count make a short file.
    runs = read_json(Path(__file__).with_name("oxford_labels.json"))["runs"]
    values, counts = zip(*runs)
    labels = np.repeat(np.array(values, dtype=np.int64), counts)
    labels.setflags(write=False)
    return labels


def text_sorted_labels() -> np.ndarray:
    """The place of each of Oxford's 102 labels, (102,) 1-based, when they are sorted as text."""
    n_classes = int(official_labels().max())
    in_text_order = np.array(sorted(range(1, n_classes + 1), key=str))
    return np.argsort(in_text_order) + 1


@functools.cache
def _labels_by_name() -> dict[str, int]:
    name_of = read_json(Path(__file__).with_name(NAMES_FILE))
    return {name_key(name): int(number) for number, name in name_of.items()}


def _oxford_label_of(folder: str) -> int | None:
    """The label that the name of a class folder says: a number up to 102 or one of the names."""
    if not folder.isdecimal():
        return _labels_by_name().get(name_key(folder))
    number = int(folder)
    return number if number <= official_labels().max() else None


# -----------------------------------------------------------------------------
# the files of a layout


def find_images(folder: Path) -> dict[int, Path]:
    """Image id -> path. The id is the number in the file name, never the rank in the listing.

    Raises UserError if two files have the same number.
    """
    files = {}
    for path in sorted(folder.iterdir()):
        number = _number_in(path)
        if number in files:
            raise UserError(f"{files[number]} and {path.name} have the same number: remove one")
        if number is not None:
            files[number] = path
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
        labels = as_integers(values)
        if len(labels) == 0:
            raise ValueError("no labels")
    except Exception as error:  # zipfile and numpy raise many kinds for a damaged file
        raise UserError(f"{path} can't be read: {type(error).__name__}: {error}") from None
    if labels.min() < 1:
        raise UserError(f"{path} holds a label below 1: labels are 1-based")
    return labels


def read_names(root: Path, n_classes: int, above: Path | None = None) -> list[str]:
    """The class names of cat_to_name.json, in the folder or else in this package.

    above: another folder in which the file may lie.

    The file may name more than `n_classes` classes, and all of its names are returned. Raises
    UserError if it is damaged, a class has no name, or two have the same.
    """
    path = _find_names_file(root, above or root) or Path(__file__).with_name(NAMES_FILE)
    try:
        name_of = {int(number): name for number, name in _read_names_file(path).items()}
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


def _find_names_file(root: Path, above: Path) -> Path | None:
    """Where the names are: in the folder of the data or in the one that was given."""
    for folder in (root, above):
        if (folder / NAMES_FILE).exists():
            return folder / NAMES_FILE
    return None


def _read_names_file(path: Path) -> dict:
    try:
        return read_json(path)
    except ValueError as error:
        raise UserError(f"{path} can't be read: {error}") from None


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
    Raises UserError if a line is damaged, an image has no sentence or is there twice with different
    ones, or two images have one name.
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
            if captions_of.setdefault(row["file"], sentences) != sentences:
                raise ValueError(f"{row['file']} is there twice, with other sentences")
    except (ValueError, KeyError, TypeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path} is damaged after {len(captions_of)} lines ({type(error).__name__}: {error})"
        ) from None

    # The file may describe more images than the dataset has; those are ignored.
    without = [file.name for file in files if not captions_of.get(file.name)]
    if without:
        raise UserError(f"{path} has no caption for {without[0]} (and {len(without) - 1} more)")
    # In class folders a name may occur twice, and a caption would be of another picture.
    path_of = {}
    for file in files:
        if file.name in path_of:
            raise UserError(
                f"captions belong to file names, and {path_of[file.name]} and {file} have the same"
            )
        path_of[file.name] = file
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


def as_integers(values) -> np.ndarray:
    """Integers in any shape and numeric type as (n,) int64. Raises ValueError for anything else."""
    values = np.asarray(values).ravel()
    is_number = values.dtype.kind in "iuf"  # signed, unsigned, floating point
    # NaN fails the first comparison, infinity too. MATLAB stores integers as doubles by default.
    if not is_number or not (abs(values) < 2**31).all() or (values != np.floor(values)).any():
        raise ValueError("these are not whole numbers")
    return values.astype(np.int64)
