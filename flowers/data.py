"""Where the images are, their labels, names and splits.

    python -m flowers.data                      # downloads Oxford Flowers 102 to data/flowers-102 (345 MB, MD5-checked)
    python -m flowers.data --data_root sample   # says what is there: counts per split, number of classes

Source of the data: M.-E. Nilsback, A. Zisserman, Automated flower classification over a large number of classes, ICVGIP 2008,
https://www.robots.ox.ac.uk/~vgg/data/flowers/102/. It calls its splits trnid (1,020 images), valid (1,020) and tstid (6,149).
"""

import argparse
import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowers import UserError, command
from flowers.download import DEFAULT_ROOT, download, is_complete
from flowers.layouts import OPENAI_NAMES, read_labels, read_names, read_split_ids


@dataclass(frozen=True)
class Flowers:
    """An index of the dataset; every array is read-only.

    root: the folder; files: N paths, sorted by image id; labels: (N,) int64, 0-based; class_names: one a class;
    splits: `train`, `val`, `test`, each an int64 array of places in `files` (`val` is empty without a holdout).
    """

    root: Path
    files: tuple[Path, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    splits: dict[str, np.ndarray]


def add_data_arguments(parser: argparse.ArgumentParser, splits: bool = True) -> None:
    """The flags that say which images; without `splits`, those of scripts that look at all of them."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_root",
        default=DEFAULT_ROOT,
        help="folder of the dataset, or 'sample' for the drawn one that needs no download (default: %(default)s)",
    )
    group.add_argument(
        "--splits_path",
        help="file that lists trnid, valid, tstid: a JSON or a setid.mat (default: setid.mat in the folder)",
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
        help="swapped: train on valid + tstid (7,169), test on trnid (1,020); official: train on trnid + valid, test on tstid "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--holdout",
        action="store_true",
        help="keep the official valid images out of training, as the val split that choices are made on",
    )


def open_flowers(
    data_root: str | Path = DEFAULT_ROOT,
    splits_path: str | Path | None = None,
    splits: str = "swapped",
    holdout: bool = False,
    class_names: str = "oxford",
) -> Flowers:
    """Open the dataset in either layout: `jpg/` + imagelabels.mat + setid.mat, or `images/jpg/` + labels.npz + a split JSON.

    'sample' is drawn, and the default folder downloaded, when missing. An image's label is that of the number in its file name.
    A split file may list fewer images than there are. Raises UserError for anything missing, damaged or contradictory.
    """
    if str(data_root) == "sample":
        from flowers.sample import write_sample

        data_root = write_sample()
    elif Path(data_root) == Path(DEFAULT_ROOT) and not is_complete(Path(data_root)):
        print(f"{data_root} is missing or incomplete: downloading Oxford Flowers 102 (345 MB)")
        download(data_root)
    root = Path(data_root)
    if not root.is_dir():
        raise UserError(
            f"no dataset at {root}: give --data_root a folder, or 'sample', or run python -m flowers.data to download"
        )
    folder = next((f for f in (root / "jpg", root / "images" / "jpg") if f.is_dir()), None)
    if folder is None:
        raise UserError(
            f"{root} has neither jpg/ nor images/jpg/: is it the folder of Oxford Flowers 102?"
        )

    labels = read_labels(root)
    ids = read_split_ids(Path(splits_path) if splits_path else root / "setid.mat", len(labels))
    names = read_names(root, int(labels.max()))
    if class_names == "openai":
        names = [OPENAI_NAMES.get(name, name) for name in names]

    every = np.unique(np.concatenate(list(ids.values())))
    if len(every) < sum(map(len, ids.values())):
        raise UserError(
            f"the splits of {root} list an image more than once: training and test images must be disjoint"
        )
    there = {
        int(m[1]): entry.name
        for entry in os.scandir(folder)
        if (m := re.fullmatch(r"image_(\d+)\.jpe?g", entry.name))
    }
    missing = [i for i in every.tolist() if i not in there]
    if missing:
        raise UserError(
            f"missing image {folder / f'image_{missing[0]:05d}.jpg'} ({len(missing)} of {len(every)} listed in the splits are not there)"
        )

    place = {name: np.searchsorted(every, np.sort(i)) for name, i in ids.items()}
    test, rest = ("trnid", "tstid") if splits == "swapped" else ("tstid", "trnid")
    train = place[rest] if holdout else np.sort(np.concatenate([place[rest], place["valid"]]))
    split_arrays = {
        "train": train,
        "val": place["valid"] if holdout else place["valid"][:0],
        "test": place[test],
    }
    image_labels = labels[every - 1] - 1
    for array in (image_labels, *split_arrays.values()):
        array.setflags(write=False)
    return Flowers(
        root,
        tuple(folder / there[i] for i in every.tolist()),
        image_labels,
        tuple(names),
        split_arrays,
    )


def find_class(flowers: Flowers, given: str) -> int:
    """The 0-based class of a name (upper or lower case) or of a 1-based number. Raises UserError if there is none, with similar names."""
    names = [name.lower() for name in flowers.class_names]
    if given.lower() in names:
        return names.index(given.lower())
    if given.isdecimal() and 1 <= int(given) <= len(names):
        return int(given) - 1
    similar = difflib.get_close_matches(given.lower(), names) + [
        name for name in names if given.lower() in name
    ]
    raise UserError(
        f"no class {given!r}: give a number from 1 to {len(names)} or a name"
        + (
            f"; did you mean {', '.join(dict.fromkeys(similar))}?"
            if similar
            else f", such as {names[0]}"
        )
    )


def base_classes(n_classes: int) -> int:
    """How many of the classes are base classes: the first half (CoOp's base-to-new protocol); the others are new."""
    return -(-n_classes // 2)


def select(
    index: np.ndarray,
    labels: np.ndarray,
    n_classes: int,
    classes: str = "all",
    shots: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """The images at `index` that are of the base, the new or all classes; with `shots`, so many of each class at most, drawn by `seed`."""
    n_base = base_classes(n_classes)
    index = index[
        {"all": labels[index] >= 0, "base": labels[index] < n_base, "new": labels[index] >= n_base}[
            classes
        ]
    ]
    if shots is None:
        return index
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(index[labels[index] == c])[:shots] for c in range(n_classes)]
    return np.sort(np.concatenate(drawn))


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser)
    args = parser.parse_args()
    flowers = open_flowers(**vars(args))
    counts = ", ".join(f"{name} {len(index):,}" for name, index in flowers.splits.items())
    print(
        f"{flowers.root}: {len(flowers.files):,} images of {len(flowers.class_names)} classes; {args.splits} splits: {counts}"
    )


if __name__ == "__main__":
    main()
