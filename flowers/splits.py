"""Which images are for training and which for the test: files of splits, and random splits.

Three kinds of files are read. A setid.mat, and a JSON with the same keys, list image ids under
trnid, valid and tstid. CoOp's split_zhou_OxfordFlowers.json (Zhou et al. 2022) lists
[file, 0-based label, class name] under train, val and test; our own random splits are of this form.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from flowers import UserError
from flowers.cache import cache_folder
from flowers.files import note, read_json, write_json
from flowers.layouts import SPLIT_OF_FOLDER, Layout, as_integers, name_key, official_labels
from flowers.matfile import read_mat

# The authors' names of their splits, and those of everybody else.
OXFORD_IDS = ("trnid", "valid", "tstid")
PARTS = ("train", "val", "test")

# A random split is made once and kept in a file, so that all scripts test on the same images.
RANDOM_FILE = "splits.random.json"
RANDOM_SEED = 0
RANDOM_PROTOCOL = f"random 60/20/20 (seed {RANDOM_SEED})"
HELD_OUT = 0.2  # of each class for val, and as much for test


@dataclass(frozen=True)
class Split:
    """How a dataset is divided.

    kind: 'oxford', where --splits says which part is for what; 'folder', 'file' or 'random', where
        train, val and test are said; '' where there is no split and all parts are empty.
    ids: trnid, valid and tstid, or train, val and test -> (m,) int64 image ids.
    protocol: what tables call it; empty for 'oxford'.
    """

    kind: str
    ids: dict[str, np.ndarray]
    protocol: str = ""


class MissingImages(UserError):
    """A split lists images that are not there."""


NO_SPLIT = Split("", {part: np.zeros(0, dtype=np.int64) for part in PARTS}, "not split")


def choose_split(
    layout: Layout,
    splits_path: Path | None = None,
    splits: str | None = None,
    base: int | None = None,
    needs_images: bool = True,
) -> Split:
    """The split of a dataset: of a file, random, or the one that lies in the folder.

    splits_path: a file of splits, instead of the one that the dataset has.
    splits: as in flowers.data.open_flowers.
    base: whether the image ids of a JSON count from 0 or 1, where the file does not say it.
    needs_images: False leaves out the images that are not there, unless none is.

    Raises MissingImages if it lists images that are not there, and UserError if it is damaged or
    contradicts the dataset in another way.
    """
    if splits == "random" and splits_path:
        raise UserError("--splits random and --splits_path both say how to split: give one of them")
    # What the user asks for comes first, then what the dataset has.
    setid = layout.root / "setid.mat"
    if splits_path:
        split = read_split_file(splits_path, layout, base)
    elif splits == "random":
        split = random_split(layout)
    elif layout.own_splits:
        split = _folder_split(layout)
    elif layout.is_numbered:
        split = read_split_file(setid, layout, base)
    else:
        return NO_SPLIT
    if base is not None and not splits_path and split.kind != "oxford":
        note(f"--splits_base has no meaning without a --splits_path: the split is {split.protocol}")
    if not needs_images and layout.files:
        split = _present(split, layout)
    _check(split, layout)
    return split


def _present(split: Split, layout: Layout) -> Split:
    """A split without the images that are not there."""
    present = np.array(sorted(layout.files))
    ids = {part: part_ids[np.isin(part_ids, present)] for part, part_ids in split.ids.items()}
    return replace(split, ids=ids)


def _folder_split(layout: Layout) -> Split:
    """The split of the folders train/, valid/ and test/."""
    # Not val: without it there is nothing to hold out, which only --holdout needs.
    for part in ("train", "test"):
        if len(layout.own_splits[part]) == 0:
            raise UserError(
                f"{layout.root} has no {part}/ with pictures beside its other folders: "
                "give --splits random for a split of our own, or --splits_path FILE"
            )
    return Split("folder", layout.own_splits, "the folder's own")


def _check(split: Split, layout: Layout) -> None:
    """Raise UserError if a split lists an image twice, or one that is not there."""
    # An id that is listed twice is in two splits, or counted twice in one: both are wrong.
    listed = np.concatenate(list(split.ids.values()))
    unique_ids = np.unique(listed)
    if len(unique_ids) < len(listed):
        raise UserError(
            f"the splits of {layout.root} list an image more than once: "
            "training and test images must be disjoint"
        )
    missing = [image_id for image_id in unique_ids.tolist() if image_id not in layout.files]
    if missing:
        image = f"image_{missing[0]:05d}.jpg"
        # In class folders, nothing says in which it should lie.
        folders = {path.parent for path in layout.files.values()}
        if len(folders) == 1:
            image = folders.pop() / image
        raise MissingImages(
            f"missing image {image} "
            f"({len(missing)} of {len(unique_ids)} listed in the splits are not there)"
        )


# -----------------------------------------------------------------------------
# files of splits


def read_split_file(path: Path, layout: Layout, base: int | None = None) -> Split:
    """Read a setid.mat, a JSON of the same keys, or a JSON of CoOp's form.

    Raises UserError if the file is missing, damaged, or contradicts the labels of the dataset.
    """
    if not path.exists():
        raise UserError(
            f"no splits at {path}: give --splits_path a setid.mat, "
            f"or a JSON with {', '.join(OXFORD_IDS)}"
        )
    is_json = path.suffix.lower() == ".json"
    try:
        contents = read_json(path) if is_json else read_mat(path)
    except Exception as error:  # of JSON, of a MATLAB file
        raise _unreadable(path, error) from None
    if is_json and "trnid" not in contents and "train" in contents:
        return _read_named_lists(path, contents, layout, base)
    return Split("oxford", _read_ids(path, contents, layout, base))


def _read_ids(
    path: Path, contents: dict, layout: Layout, base: int | None
) -> dict[str, np.ndarray]:
    """The 1-based image ids of trnid, valid and tstid."""
    try:
        split_ids = {name: as_integers(contents[name]) for name in OXFORD_IDS}
    except Exception as error:  # numpy raises many kinds
        raise _unreadable(path, error) from None
    # valid may be empty: then --holdout has nothing to hold out, and the others need none.
    if len(split_ids["trnid"]) == 0 or len(split_ids["tstid"]) == 0:
        raise UserError(f"{path} lists no image under trnid or tstid")
    # The ids of other pictures only count the files: the numbers would be of other images.
    if not layout.is_numbered:
        raise UserError(
            f"{path} lists image numbers, and the pictures of {layout.root} are not numbered as "
            "Oxford's are (image_00001.jpg)"
        )

    # MATLAB's files count from 1. JSON files of the original project count from 0, others from 1.
    n_labels = len(layout.labels)
    all_ids = np.concatenate(list(split_ids.values()))
    if path.suffix.lower() == ".json":
        base = _base_of(path, contents, base, all_ids, n_labels)
        note(f"{path}: image ids count from {base}")
    elif base == 0:
        raise UserError(f"--splits_base 0: the image ids of {path} count from 1")
    else:
        base = 1

    # If the first and the last are in range, so are all between.
    for image_id in (all_ids.min(), all_ids.max()):
        if not base <= image_id < base + n_labels:
            raise UserError(
                f"{path} lists image id {image_id}, which has no label: "
                f"there are labels for ids {base} to {base + n_labels - 1}"
            )
    return {name: ids + 1 - base for name, ids in split_ids.items()}


def _base_of(path: Path, contents: dict, base: int | None, ids: np.ndarray, n_labels: int) -> int:
    """Whether ids count from 0 or 1: as the file or the user says, or by a first or last id."""
    said = contents.get("base")
    if said is not None and (type(said) is not int or said not in (0, 1)):
        raise UserError(f'{path} says "base": {json.dumps(said)}: image ids count from 0 or from 1')
    # Neither is believed over the other.
    if said is not None and base is not None and said != base:
        raise UserError(f'{path} says "base": {said}, and --splits_base {base}: one is wrong')
    if said is not None or base is not None:
        return base if said is None else said
    # Only an id that exists in one way of counting decides.
    if ids.min() == 0:
        return 0
    if ids.max() == n_labels:
        return 1
    # A wrong guess would test on images that were trained on.
    raise UserError(
        f'{path} may count images from 0 or from 1: say which by --splits_base, or by "base" in '
        "the file"
    )


def _read_named_lists(path: Path, contents: dict, layout: Layout, base: int | None) -> Split:
    """A JSON of CoOp's form, each row of it checked against the dataset."""
    if base is not None:
        raise UserError(f"--splits_base has no meaning for {path}: it lists files, not image ids")
    # A part of another name would be left out.
    for key in contents.keys() & SPLIT_OF_FOLDER.keys() - set(PARTS):
        raise UserError(f"{path} lists images under {key}: call it {SPLIT_OF_FOLDER[key]} there")
    # Numbered images are found by their number in any folder; others by their path.
    id_of = {} if layout.is_numbered else _ids_by_name(layout)
    # Class folders may have fewer classes than Oxford, and count those only.
    labels = official_labels() if layout.is_oxford else layout.labels
    ids = {}
    for part in PARTS:
        rows = contents.get(part, [])
        if not isinstance(rows, list):
            raise UserError(f"{path}: {part} is no list")
        ids[part] = np.zeros(len(rows), dtype=np.int64)
        for i, row in enumerate(rows):
            name, label, class_name = _parse_row(path, row)
            image_id = _id_of_file(name, id_of, layout)
            if image_id is None:
                raise UserError(f"missing image {name}, which {path} lists")
            _check_row(path, row, labels[image_id - 1], layout, image_id)
            ids[part][i] = image_id
    if len(ids["train"]) == 0 or len(ids["test"]) == 0:
        raise UserError(f"{path} lists no image under train or test")

    # Our own random splits say what they are. Others are known by their file's name.
    protocol = contents.get("protocol")
    if protocol == RANDOM_PROTOCOL:
        return Split("random", ids, protocol)
    is_coop = path.name.startswith("split_zhou")
    return Split("file", ids, "CoOp's" if is_coop else f"of {path.name}")


def _parse_row(path: Path, row) -> tuple[str, int, str]:
    """File, 0-based label and class name. Raises UserError for anything else."""
    # By type, as True is an int to Python.
    is_triple = isinstance(row, list) and [type(value) for value in row] == [str, int, str]
    if not is_triple:
        raise UserError(
            f"{path} holds {json.dumps(row)[:60]}: its rows are [file, 0-based label, class name]"
        )
    return tuple(row)


def _check_row(path: Path, row: list, label: int, layout: Layout, image_id: int) -> None:
    """Raise UserError if a row contradicts the dataset. label: 1-based, of the dataset."""
    name, row_label, class_name = row
    # An image that is not there has no name; that it is missing is said later.
    own_name = (
        layout.class_names[layout.labels[image_id - 1] - 1] if image_id in layout.files else ""
    )
    if row_label != label - 1:
        raise UserError(
            f"{path} gives {name} the label {row_label}, and the dataset {label - 1} (from 0)"
        )
    if own_name and name_key(class_name) != name_key(own_name):
        raise UserError(f"{path} calls {name} a {class_name}, and the dataset a {own_name}")


def _ids_by_name(layout: Layout) -> dict[str, int]:
    """Image ids by path within the folder."""
    by_path = {}
    for image_id, path in layout.files.items():
        by_path[path.relative_to(layout.root).as_posix()] = image_id
    return by_path


def _id_of_file(name: str, id_of: dict[str, int], layout: Layout) -> int | None:
    if not layout.is_numbered:
        return id_of.get(name)
    # Any ending, as copies of the dataset are converted: image_00001.jpg may be a .png here.
    match = re.search(r"image_(\d+)\.\w+$", name)
    if not match or not 1 <= int(match[1]) <= len(layout.labels):
        return None
    return int(match[1])


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} can't be read: {type(error).__name__}: {error}")


# -----------------------------------------------------------------------------
# random splits


def random_split(layout: Layout) -> Split:
    """The random split of a dataset, made at the first call and then read from its file.

    The file lies in the dataset's folder, or in the user's cache folder where that is read-only.
    Raises UserError if the dataset has other pictures than when the split was made.
    """
    path = layout.root / RANDOM_FILE
    # Beside the data where that can be written, as caches are.
    if not path.exists():
        cache = cache_folder(layout.root)
        is_writable = cache.parent == layout.root
        if not is_writable:
            path = cache / RANDOM_FILE
    if not path.exists():
        write_json(path, _draw(layout))
        note(f"a split of {RANDOM_PROTOCOL} is written to {path}: all scripts read it from there")
    split = read_split_file(path, layout)
    _check(split, layout)
    # Pictures may have come or gone since. An old split would leave the new ones out.
    n_listed = sum(len(ids) for ids in split.ids.values())
    n_labelled = len(_labelled_ids(layout))
    if split.kind != "random" or n_listed != n_labelled:
        raise UserError(
            f"{path} is not a random split of all {n_labelled} pictures of {layout.root}: "
            "delete it to make a new one"
        )
    return split


def _draw(layout: Layout) -> dict:
    """A random split, stratified by class, in CoOp's form. Raises UserError at a small class."""
    ids = _labelled_ids(layout)
    labels = layout.labels[ids - 1]
    # One generator for all classes, in their order.
    rng = np.random.default_rng(RANDOM_SEED)
    contents = {"protocol": RANDOM_PROTOCOL, "train": [], "val": [], "test": []}
    for label, class_name in enumerate(layout.class_names, start=1):
        members = rng.permutation(ids[labels == label])
        n_held_out = max(1, round(HELD_OUT * len(members)))
        # Empty is no error: the names may be those of more classes than the folder has.
        if 0 < len(members) < 3:
            raise UserError(
                f"class {class_name} has {len(members)} pictures: a split needs 3 of each class"
            )
        ends = (n_held_out, 2 * n_held_out)
        for part, part_ids in zip(("test", "val", "train"), np.split(members, ends)):
            for image_id in np.sort(part_ids).tolist():
                path = layout.files[image_id].relative_to(layout.root).as_posix()
                contents[part].append([path, int(_label_in_file(layout, image_id)), class_name])
    return contents


def _labelled_ids(layout: Layout) -> np.ndarray:
    """The ids of all images that have a label, sorted."""
    ids = np.array(sorted(layout.files))
    return ids[(ids >= 1) & (ids <= len(layout.labels))]


def _label_in_file(layout: Layout, image_id: int) -> int:
    """The 0-based label as CoOp's form has it: Oxford's, also where classes are left out."""
    labels = official_labels() if layout.is_oxford else layout.labels
    return labels[image_id - 1] - 1
