"""The index of the dataset: image files, labels, class names and splits.

    python -m flowers.data                      # download Oxford Flowers 102 if it is missing
    python -m flowers.data --data_root sample   # count the images, classes and splits of a folder

The download has 345 MB and is checked by MD5. Source of the data: M.-E. Nilsback, A. Zisserman,
Automated flower classification over a large number of classes, ICVGIP 2008,
https://www.robots.ox.ac.uk/~vgg/data/flowers/102/. The authors call their splits trnid
(1,020 images), valid (1,020) and tstid (6,149).
"""

import argparse
import difflib
import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowers import UserError, add_switch, command
from flowers.download import UNFINISHED, data_folder, default_root, download, is_complete
from flowers.files import note, user_path
from flowers.layouts import OPENAI_NAMES, Layout, read_layout
from flowers.splits import NO_SPLIT, Split, choose_split

OXFORD = "Oxford Flowers 102"
OXFORD_ID = "oxford-flowers-102:"  # before the number of an image of Oxford's, in image_ids
# What open_flowers takes from the command line.
DATA_FLAGS = ("data_root", "splits_path", "splits_base", "splits", "holdout", "class_names")
# The values of --splits: two ways to use Oxford's three parts, and three other sources of a split.
CONVENTIONS = ("swapped", "official", "folder", "random", "file")

# -----------------------------------------------------------------------------
# the index


@dataclass(frozen=True)
class Flowers:
    """The dataset as one immutable object; all arrays are read-only.

    root: the folder of the dataset.
    files: paths of the N images, sorted by image id.
    labels: (N,) int64, the 0-based class of each image.
    class_names: the name of each class.
    splits: `train`, `val` and `test`, each an int64 array of indices into `files`. `val` is empty
        without a holdout.
    name: the dataset's name for tables.
    protocol: how it is split, in words for tables.
    convention: how it is split, as a value of --splits; empty if it is not split.
    is_numbered: whether the files are called image_00001.jpg, and each number occurs once.
    is_oxford: whether these numbers and the labels are those of Oxford Flowers 102.
    """

    root: Path
    files: tuple[Path, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    splits: dict[str, np.ndarray]
    name: str = ""
    protocol: str = ""
    convention: str = ""
    is_numbered: bool = True
    is_oxford: bool = False

    @functools.cached_property
    def file_names(self) -> tuple[str, ...]:
        """What identifies each file in tables: its name, or its path within the dataset.

        In class folders, names such as 1.jpg may occur in each.
        """
        if self.is_numbered:
            return tuple(file.name for file in self.files)
        return tuple(file.relative_to(self.root).as_posix() for file in self.files)


def open_flowers(
    data_root: str | Path | None = None,
    splits_path: str | Path | None = None,
    splits: str | None = None,
    holdout: bool = False,
    class_names: str = "oxford",
    splits_base: int | None = None,
    needs_split: bool = True,
    needs_images: bool = True,
) -> Flowers:
    """Open a copy of the dataset in any layout that flowers.layouts reads.

    data_root: the folder; None is `default_root()`. 'sample' is drawn if it is missing, and the
        default folder is downloaded.
    splits_path: a setid.mat or a JSON file; it may list fewer images than the folder holds.
    splits: 'swapped' trains on valid + tstid and tests on trnid; 'official' trains on
        trnid + valid and tests on tstid; 'folder' takes train/, valid/ and test/ of class folders,
        'file' the train, val and test of `splits_path`; 'random' makes a split of its own. None is
        what the dataset or the file says, and swapped for Oxford's.
    holdout: keep the valid images out of training, as the `val` split.
    class_names: 'oxford' or 'openai'.
    splits_base: whether the image ids of a JSON count from 0 or 1. None: the file says it.
    needs_split: False leaves the splits empty where the dataset has none, instead of an error.
    needs_images: False leaves out the images that a split lists and that are missing, instead of
        an error: for who looks at the images and measures nothing.

    Raises UserError if a file is missing, damaged or contradicts another one.
    """
    # First what is in the folder, then how it is split, then the index over what the split lists.
    root = _prepare_root(default_root() if data_root is None else data_root)
    layout = read_layout(root)
    splits_path = Path(splits_path) if splits_path else None  # an empty flag counts as none
    split = choose_split(layout, splits_path, splits, splits_base, needs_images)
    # Not split at random unasked: nobody should report a test on a split that they do not know of.
    if split is NO_SPLIT and needs_split:
        raise UserError(
            f"{layout.root} says nowhere which images are for the test: give --splits random for a "
            "split of our own (60/20/20), or sort the class folders into train/, val/ and test/"
        )
    return _build_index(layout, split, splits, holdout, class_names)


def open_from_flags(flags: Mapping, needs_split: bool = True) -> Flowers:
    """Open the dataset that the flags of `add_data_arguments` describe.

    flags: by name, as the command line or the args.json of a run has them; others are passed over,
        and those that are missing have open_flowers's defaults.
    Raises UserError as open_flowers does.
    """
    described = {name: flags[name] for name in DATA_FLAGS if name in flags}
    return open_flowers(**described, needs_split=needs_split)


def split_index(flowers: Flowers, split: str) -> np.ndarray:
    """The images of a split that is to be evaluated. Raises UserError if it has none."""
    index = flowers.splits[split]
    if not len(index):
        raise UserError(
            f"the {split} split is empty: val needs --holdout, and images of its own in the splits"
        )
    return index


def _build_index(
    layout: Layout, split: Split, splits: str | None, holdout: bool, class_names: str
) -> Flowers:
    """The index of a dataset that was read and split; the arguments are those of open_flowers."""
    # Names are looked up one by one: they are the same in all but three classes.
    names = layout.class_names
    if class_names == "openai":
        names = [OPENAI_NAMES.get(name, name) for name in names]
        if names == list(layout.class_names):
            note("--class_names openai: CLIP's list has no other name for a class of this dataset")

    # Images that no split lists are left out. Ids are 1-based, labels become 0-based.
    ids = np.unique(np.concatenate(list(split.ids.values())))  # (N,), sorted
    # Exploration looks at all images, split or not.
    if split is NO_SPLIT:
        ids = np.array(sorted(layout.files))
    files = tuple(layout.files[image_id] for image_id in ids.tolist())
    labels = layout.labels[ids - 1] - 1  # (N,)

    # From ids to indices into `files`, for each part of the split. `ids` is sorted and holds all of
    # these, so searchsorted finds their very places.
    index_of = {
        part: np.searchsorted(ids, np.sort(part_ids)) for part, part_ids in split.ids.items()
    }
    convention = _choose_convention(split, splits)
    split_index = _assign_splits(index_of, convention, holdout)

    # Read-only, so that no caller changes the index under another one.
    for array in (labels, *split_index.values()):
        array.setflags(write=False)
    return Flowers(
        layout.root,
        files,
        labels,
        tuple(names),
        split_index,
        name=_name_of(layout),
        is_oxford=layout.is_oxford,
        protocol=split.protocol or convention,
        convention=convention,
        is_numbered=layout.is_numbered,
    )


def _prepare_root(data_root: str | Path) -> Path:
    """The folder of the dataset, drawn or downloaded first where that is possible."""
    if str(data_root) == "sample":
        # Imported late: drawing needs OpenCV, and other datasets do not.
        from flowers.sample import write_sample

        return write_sample(data_folder("sample"))
    root = Path(data_root)
    for folder in (root, root / "flowers-102"):
        # A part of an archive may look like a complete folder.
        if (folder / UNFINISHED).exists() and root != Path(default_root()):
            raise UserError(
                f"the download to {folder} broke off: "
                f"go on with python -m flowers.download --data_root {folder}"
            )
    # Only to the default place: a wrong --data_root should end with an error, not with a download.
    if root == Path(default_root()) and not is_complete(root):
        print(f"{data_root} is missing or incomplete: downloading Oxford Flowers 102 (345 MB)")
        download(root)
    if not root.is_dir():
        raise UserError(
            f"no dataset at {root}: give --data_root a folder, or 'sample', "
            "or run python -m flowers.data to download"
        )
    return root


def _name_of(layout: Layout) -> str:
    """The dataset's name for tables."""
    if layout.is_oxford:
        return OXFORD
    if (layout.root / "sample.json").exists():
        return "sample"
    return layout.root.resolve().name


def _choose_convention(split: Split, splits: str | None) -> str:
    """How the parts of a split are used, as a value of --splits.

    splits: what the user gave. Where it does not apply, that is said or refused.
    """
    if split.kind == "oxford":
        if splits in ("folder", "file"):
            raise UserError(
                f"--splits {splits}: this dataset is split into trnid, valid and tstid, "
                "which are used as swapped or official"
            )
        return splits or "swapped"
    # A note and no error, so that one command line serves datasets of every kind.
    if splits in ("swapped", "official"):
        note(f"--splits {splits} is for trnid, valid and tstid: the split is {split.protocol}")
    elif splits not in (None, split.kind):
        raise UserError(f"--splits {splits}: the split of this dataset is {split.protocol}")
    return split.kind


def _assign_splits(
    index_of: dict[str, np.ndarray], convention: str, holdout: bool
) -> dict[str, np.ndarray]:
    """Train, val and test from the index arrays of the parts of a split."""
    # Swapped: the 1,020 training images of the authors become the test set.
    if convention == "swapped":
        test, train, val = index_of["trnid"], index_of["tstid"], index_of["valid"]
    elif convention == "official":
        test, train, val = index_of["tstid"], index_of["trnid"], index_of["valid"]
    else:
        test, train, val = index_of["test"], index_of["train"], index_of["val"]

    if not holdout:
        # Without a holdout nothing is chosen on `valid`, so its images are trained on. The parts of
        # a published split are used as they are: its training images are what papers train on.
        if convention != "file":
            train = np.sort(np.concatenate([train, val]))
        val = val[:0]
    return {"train": train, "val": val, "test": test}


def image_ids(flowers: Flowers, index: Iterable[int]) -> tuple[str, ...]:
    """What says which pictures these are, wherever a copy of them lies.

    index: of images of the dataset.
    Returns `oxford-flowers-102:00001` where numbers and labels are Oxford's, else the first 16
    hexadecimal digits of the SHA-256 of each file.
    """
    ids = []
    for i in index:
        file = flowers.files[i]
        # Copies of Oxford's images may differ in their bytes (resized), not in their numbers.
        if flowers.is_oxford:
            number = int(file.stem.rpartition("_")[2])
            ids.append(f"{OXFORD_ID}{number:05d}")
        else:
            ids.append(hashlib.sha256(file.read_bytes()).hexdigest()[:16])
    return tuple(ids)


# -----------------------------------------------------------------------------
# classes and subsets


def find_class(flowers: Flowers, query: str) -> int:
    """The 0-based class of a name, in upper or lower case, or of a 1-based number.

    Raises UserError if there is no such class; the message lists similar names.
    """
    # Names first: a class may be called like a number.
    names = [name.lower() for name in flowers.class_names]
    query_name = query.lower()
    if query_name in names:
        return names.index(query_name)
    # Not isdigit: int() refuses a superscript.
    if query.isdecimal() and 1 <= int(query) <= len(names):
        return int(query) - 1

    # Close spellings first, then names that contain the query, as "lenten rose" does "rose".
    similar = difflib.get_close_matches(query_name, names)
    similar += [name for name in names if query_name in name and name not in similar]
    if similar:
        hint = f"; did you mean {', '.join(similar)}?"
    else:
        hint = f", such as {names[0]}"
    raise UserError(f"no class {query!r}: give a number from 1 to {len(names)} or a name{hint}")


def base_classes(n_classes: int) -> int:
    """The number of base classes in CoOp's base-to-new protocol: the first half, rounded up.

    The other classes are the new ones.
    """
    return (n_classes + 1) // 2


def select(
    index: np.ndarray,
    labels: np.ndarray,
    n_classes: int,
    classes: str = "all",
    shots: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """The part of `index` that belongs to some classes, or a few images of each class.

    index: (n,) int64, indices of images.
    labels: (N,) int64, 0-based, of all images of the dataset.
    classes: 'all', 'base' or 'new'.
    shots: at most this many images of each class, drawn at random with `seed`; None takes all.

    Returns a new array. It is sorted if `shots` is set, else in the order of `index`.
    """
    # By label, not by what is in `index`: the halves are the same for every split.
    is_base = labels[index] < base_classes(n_classes)  # (n,) bool
    mask_of = {"all": np.ones_like(is_base), "base": is_base, "new": ~is_base}
    index = index[mask_of[classes]]
    if shots is None:
        return index

    # One generator for all classes, in their order: a seed always gives the same images.
    rng = np.random.default_rng(seed)
    selected = []
    for label in range(n_classes):
        members = index[labels[index] == label]
        selected.append(rng.permutation(members)[:shots])
    return np.sort(np.concatenate(selected))


def val_images(
    flowers: Flowers, classes: str = "all", shots: int | None = None, seed: int = 0
) -> np.ndarray:
    """The images of val that decide something, (n,): as `select` says, but drawn in one way.

    The shots are drawn among all classes, so that an image is drawn whichever `classes` count.
    """
    labels, n_classes = flowers.labels, len(flowers.class_names)
    drawn = select(flowers.splits["val"], labels, n_classes, shots=shots, seed=seed)
    return select(drawn, labels, n_classes, classes)


def subset(index: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return `count` random entries of `index`, in their order; all of them for a count of 0."""
    if count == 0 or count >= len(index):
        return index
    # The first of one permutation, so that a larger subset contains a smaller one of the same seed.
    shuffled = np.random.default_rng(seed).permutation(index)
    return np.sort(shuffled[:count])


# -----------------------------------------------------------------------------
# command line


def add_data_arguments(parser: argparse.ArgumentParser, splits: bool = True) -> None:
    """Add the flags that say which images a script uses.

    splits: also add --splits and --holdout. Scripts that look at all images have no use for them.
    """
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_root",
        type=user_path,
        default=default_root(),
        help="folder of the dataset: Oxford's, or one folder a class; or 'sample' for the drawn "
        "one that needs no download (default: %(default)s; $FLOWERS_DATA sets another)",
    )
    group.add_argument(
        "--splits_path",
        type=user_path,
        help="file of the splits: a setid.mat or a JSON with trnid, valid, tstid, or CoOp's "
        "split_zhou_OxfordFlowers.json (default: the split that the folder has)",
    )
    group.add_argument(
        "--splits_base",
        type=int,
        choices=[0, 1],
        help="whether the image ids of a JSON of --splits_path count from 0 or from 1 "
        '(default: "base" in the file)',
    )
    group.add_argument(
        "--class_names",
        choices=["oxford", "openai"],
        default="oxford",
        help="the dataset's names, or CLIP's (three differ) (default: %(default)s)",
    )
    if not splits:
        return
    group.add_argument(
        "--splits",
        choices=CONVENTIONS,
        help="swapped: train on valid + tstid (7,169), test on trnid (1,020); official: train on "
        "trnid + valid, test on tstid; folder: train/, valid/, test/ of class folders; file: "
        "train, val, test of --splits_path, as they are; random: 60/20/20 of each class, made once "
        "and kept beside the data (default: what folder or file have, swapped for Oxford's)",
    )
    add_switch(
        group,
        "--holdout",
        help="keep the valid images out of training, as the val split that choices are made on",
    )


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser)
    args = parser.parse_args()

    # The flags are called like the arguments of open_flowers.
    flowers = open_flowers(**vars(args))
    n_images = f"{len(flowers.files):,} images of {len(flowers.class_names)} classes"
    counts = ", ".join(f"{name} {len(index):,}" for name, index in flowers.splits.items())
    print(f"{flowers.root}: {n_images}; {flowers.protocol} splits: {counts}")


if __name__ == "__main__":
    main()
