"""The index of the dataset: image files, labels, class names and splits.

    python -m flowers.data                      # download Oxford Flowers 102 to data/flowers-102
    python -m flowers.data --data_root sample   # count the images, classes and splits of a folder

The download has 345 MB and is checked by MD5. Source of the data: M.-E. Nilsback, A. Zisserman,
Automated flower classification over a large number of classes, ICVGIP 2008,
https://www.robots.ox.ac.uk/~vgg/data/flowers/102/. The authors call their splits trnid
(1,020 images), valid (1,020) and tstid (6,149).
"""

import argparse
import difflib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowers import UserError, add_switch, command
from flowers.download import DEFAULT_ROOT, download, is_complete
from flowers.layouts import OPENAI_NAMES, read_layout

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
    """

    root: Path
    files: tuple[Path, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    splits: dict[str, np.ndarray]


def open_flowers(
    data_root: str | Path = DEFAULT_ROOT,
    splits_path: str | Path | None = None,
    splits: str = "swapped",
    holdout: bool = False,
    class_names: str = "oxford",
) -> Flowers:
    """Open a copy of the dataset in any layout that flowers.layouts reads.

    data_root: the folder. 'sample' is drawn if it is missing, and the default folder is downloaded.
    splits_path: a setid.mat or a JSON file; it may list fewer images than the folder holds.
    splits: 'swapped' trains on valid + tstid and tests on trnid; 'official' trains on
        trnid + valid and tests on tstid.
    holdout: keep the valid images out of training, as the `val` split.
    class_names: 'oxford' or 'openai'.

    Raises UserError if a file is missing, damaged or contradicts another one.
    """
    root = _prepare_root(data_root)
    layout = read_layout(root, splits_path)

    # Names are looked up one by one: they are the same in all but four classes.
    names = layout.class_names
    if class_names == "openai":
        names = [OPENAI_NAMES.get(name, name) for name in names]

    # Images that no split lists are left out. Ids are 1-based, labels become 0-based.
    ids = np.unique(np.concatenate(list(layout.split_ids.values())))  # (N,), sorted
    files = tuple(layout.files[image_id] for image_id in ids.tolist())
    labels = layout.labels[ids - 1] - 1  # (N,)

    # From ids to indices into `files`, for each official split.
    index_of = {
        name: np.searchsorted(ids, np.sort(split_ids))
        for name, split_ids in layout.split_ids.items()
    }
    split_index = _assign_splits(index_of, splits, holdout)

    # Read-only, so that no caller changes the index under another one.
    for array in (labels, *split_index.values()):
        array.setflags(write=False)
    return Flowers(root, files, labels, tuple(names), split_index)


def _prepare_root(data_root: str | Path) -> Path:
    """The folder of the dataset, drawn or downloaded first where that is possible."""
    if str(data_root) == "sample":
        # Imported late: drawing needs OpenCV, and other datasets do not.
        from flowers.sample import write_sample

        return write_sample()
    root = Path(data_root)
    if root == Path(DEFAULT_ROOT) and not is_complete(root):
        print(f"{data_root} is missing or incomplete: downloading Oxford Flowers 102 (345 MB)")
        download(root)
    if not root.is_dir():
        raise UserError(
            f"no dataset at {root}: give --data_root a folder, or 'sample', "
            "or run python -m flowers.data to download"
        )
    return root


def _assign_splits(
    index_of: dict[str, np.ndarray], splits: str, holdout: bool
) -> dict[str, np.ndarray]:
    """Train, val and test from the index arrays of trnid, valid and tstid."""
    # Swapped: the 1,020 training images of the authors become the test set.
    if splits == "swapped":
        test, train = index_of["trnid"], index_of["tstid"]
    else:
        test, train = index_of["tstid"], index_of["trnid"]

    # Without a holdout nothing is chosen on `valid`, so its images are trained on.
    val = index_of["valid"]
    if not holdout:
        train = np.sort(np.concatenate([train, val]))
        val = val[:0]
    return {"train": train, "val": val, "test": test}


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


# -----------------------------------------------------------------------------
# command line


def add_data_arguments(parser: argparse.ArgumentParser, splits: bool = True) -> None:
    """Add the flags that say which images a script uses.

    splits: also add --splits and --holdout. Scripts that look at all images have no use for them.
    """
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_root",
        default=DEFAULT_ROOT,
        help="folder of the dataset, or 'sample' for the drawn one that needs no download "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--splits_path",
        help="file that lists trnid, valid, tstid: a JSON or a setid.mat "
        "(default: setid.mat in the folder)",
    )
    group.add_argument(
        "--class_names",
        choices=["oxford", "openai"],
        default="oxford",
        help="the dataset's names, or CLIP's (four differ) (default: %(default)s)",
    )
    if not splits:
        return
    group.add_argument(
        "--splits",
        choices=["swapped", "official"],
        default="swapped",
        help="swapped: train on valid + tstid (7,169), test on trnid (1,020); "
        "official: train on trnid + valid, test on tstid (default: %(default)s)",
    )
    add_switch(
        group,
        "--holdout",
        help="keep the official valid images out of training, "
        "as the val split that choices are made on",
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
    print(f"{flowers.root}: {n_images}; {args.splits} splits: {counts}")


if __name__ == "__main__":
    main()
