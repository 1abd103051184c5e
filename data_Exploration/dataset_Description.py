"""What is in the dataset: images per class and split, image sizes, imbalance, near-duplicates.

    python data_Exploration/dataset_Description.py                          # Oxford Flowers 102
    python data_Exploration/dataset_Description.py --data_root sample       # any machine, offline
    python data_Exploration/dataset_Description.py --sheet figures/sheet.png   # look at all classes

Near-duplicates are pictures that occur twice, also across train and test. Saves
figures/classes.png (images per class, sorted, stacked by split) and figures/duplicates.csv (the
pairs, for a look at them).
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from flowers import UserError, command
from flowers.choices import add_figure_arguments
from flowers.data import add_data_arguments
from flowers.files import user_file

SIDE = 32  # pixels of the small squares that are searched for near-duplicates


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser, splits=False)
    # near-duplicates
    parser.add_argument(
        "--hash_bits",
        type=int,
        default=6,
        help="of 64 that the hashes of duplicates may differ in (default: %(default)s)",
    )
    parser.add_argument(
        "--levels",
        type=float,
        default=8.0,
        help=f"of 256 that their {SIDE} x {SIDE} pixels may differ by on average "
        "(default: %(default)s)",
    )
    # pictures
    parser.add_argument(
        "--sheet",
        type=user_file,
        metavar="FILE",
        help="also save a contact sheet, the first images of every class, as this PNG",
    )
    add_figure_arguments(parser)
    args = parser.parse_args()
    if args.sheet and (args.sheet.suffix.lower() != ".png" or args.sheet.is_dir()):
        raise UserError(f"--sheet {args.sheet}: it is a file in PNG: its name must end in .png")
    # NaN fails the comparison, too.
    if not (0 <= args.hash_bits <= 64 and 0 <= args.levels <= 256):
        raise UserError("--hash_bits must be from 0 to 64, --levels from 0 to 256")
    return args


if __name__ == "__main__":
    args = command(parse_arguments)()  # before pandas and scipy are imported: see flowers.command

import numpy as np
import pandas as pd
from PIL import Image
from scipy.fft import dctn

from flowers import cache, figures, files, images
from flowers.data import Flowers, open_flowers

plt = figures.plt

SQUARES_FORMAT = 1  # raise it when the stored squares change
GREY = np.float32([0.299, 0.587, 0.114])  # weights of red, green and blue (ITU-R BT.601)

# Oxford's names of the splits, and what they are called in a swapped split with a holdout
OXFORD_SPLITS = {"tstid": "train", "valid": "val", "trnid": "test"}
LEGEND = {
    "tstid": "tstid (train if swapped, test if official)",
    "valid": "valid (train, or val)",
    "trnid": "trnid (test if swapped, train if official)",
}

# -----------------------------------------------------------------------------
# near-duplicates


def read_square(file: Path) -> np.ndarray:
    """Return the central square of one image, (SIDE, SIDE, 3) uint8."""
    image = Image.fromarray(images.read_rgb(file))
    scale = SIDE / min(image.size)
    width, height = int(image.width * scale), int(image.height * scale)
    small = image.resize((width, height), Image.Resampling.BICUBIC)
    left = round((width - SIDE) / 2)
    top = round((height - SIDE) / 2)
    return np.asarray(small.crop((left, top, left + SIDE, top + SIDE)))


def load_squares(flowers: Flowers) -> np.ndarray:
    """Return the central squares of all images, (N, SIDE, SIDE, 3) uint8, kept beside the data.

    Raises UserError naming the file if an image can't be decoded.
    """
    # Not pixels.load_pixels, which would do: it needs torch, and exploration starts without.
    path = cache.array_path(flowers.root, f"squares-{SIDE}", flowers.files)
    key = cache.key_of(SQUARES_FORMAT, SIDE, *flowers.files)
    shape = (len(flowers.files), SIDE, SIDE, 3)

    def rows() -> Iterator[np.ndarray]:
        return images.decode_all(flowers.files, read_square)

    return cache.cached_array(path, key, shape, "|u1", rows)


def perceptual_hashes(squares: np.ndarray) -> np.ndarray:
    """Return 64 bits an image, (N, 64) bool, of squares (N, SIDE, SIDE, 3) uint8.

    A bit says whether one of the lowest 8 x 8 frequencies of the grey image is above their median
    (pHash; Zauner 2010). Rescaling, recompression and small changes of brightness leave nearly all
    bits as they are.
    """
    grey = squares @ GREY  # (N, SIDE, SIDE)
    frequencies = dctn(grey, axes=(1, 2), norm="ortho")
    lowest = frequencies[:, :8, :8].reshape(len(grey), 64)
    # the first is the mean brightness
    median = np.median(lowest[:, 1:], axis=1, keepdims=True)
    return lowest > median


def near_pairs(hashes: np.ndarray, bits: int) -> np.ndarray:
    """Return the pairs (P, 2), i < j, of rows of hashes (N, 64) that differ in at most `bits`."""
    signs = 2 * hashes.astype(np.float32) - 1
    n_bits = hashes.shape[1]
    pairs = []
    for start in range(0, len(signs), 1024):  # (1024, N) distances at a time
        block = signs[start : start + 1024]
        distances = (n_bits - block @ signs.T) / 2  # Hamming's
        i, j = np.nonzero(distances <= bits)
        i += start
        pairs.append(np.stack([i, j], 1)[i < j])
    return np.concatenate(pairs)


def find_duplicates(squares: np.ndarray, bits: int, levels: float) -> np.ndarray:
    """Return the pairs (P, 2) of images that are nearly the same.

    Their hashes differ by at most `bits`, and their pixels by at most `levels` on average. The
    second condition is for plain pictures, whose few frequencies say little.
    """
    pairs = near_pairs(perceptual_hashes(squares), bits)
    first = squares[pairs[:, 0]].astype(np.float32)
    second = squares[pairs[:, 1]].astype(np.float32)
    # compared without their brightness
    first -= first.mean((1, 2, 3), keepdims=True)
    second -= second.mean((1, 2, 3), keepdims=True)
    difference = abs(first - second).mean((1, 2, 3))
    return pairs[difference <= levels]


def print_duplicates(pairs: np.ndarray, flowers: Flowers, splits: np.ndarray) -> None:
    """Print how many pairs there are within and across the splits of both conventions.

    splits: (N,) the name of each image's split, from `split_names`.
    """
    if flowers.convention == "swapped":
        conventions = [("swapped", "trnid"), ("official", "tstid")]
    else:
        conventions = [(flowers.protocol, "test")] if flowers.convention else []
    for name, test_split in conventions:
        is_test = splits == test_split
        n_test = is_test.sum()
        in_test = is_test[pairs].sum(1)  # how many of a pair's two images
        within_train, across, within_test = np.bincount(in_test, minlength=3)
        crossing = pairs[in_test == 1]
        n_leaking = len(np.unique(crossing[is_test[crossing]]))
        print(
            f"  {name} splits: {within_train} within train, {within_test} within test, "
            f"{across} across train and test: {n_leaking} of {n_test:,} test images "
            f"({100 * n_leaking / n_test:.2f}%) have their like in train"
        )
    labels = flowers.labels[pairs]
    print(f"  {(labels[:, 0] != labels[:, 1]).sum()} pairs have two different labels")


def duplicates_table(pairs: np.ndarray, flowers: Flowers, splits: np.ndarray) -> list[dict]:
    """Return a row a pair: file, class and split of both images."""
    rows = []
    for pair in pairs:
        row = {}
        for number, image in enumerate(pair, 1):
            row[f"file_{number}"] = flowers.file_names[image]
            row[f"class_{number}"] = flowers.class_names[flowers.labels[image]]
            row[f"split_{number}"] = splits[image]
        rows.append(row)
    return rows


# -----------------------------------------------------------------------------
# counts and sizes


def split_titles(flowers: Flowers) -> dict[str, str]:
    """Return the name of each part of the split -> its key in flowers.splits.

    flowers: with a holdout. Oxford's parts have names of their own; without a split there is none.
    """
    if flowers.convention == "swapped":
        return OXFORD_SPLITS
    return {split: split for split in flowers.splits} if flowers.convention else {}


def split_names(flowers: Flowers) -> np.ndarray:
    """Return the name of each image's part of the split, (N,); 'all' where there is no split."""
    names = np.full(len(flowers.files), "all", dtype="U5")
    for title, split in split_titles(flowers).items():
        names[flowers.splits[split]] = title
    return names


def print_counts(flowers: Flowers, counts: pd.DataFrame) -> None:
    """Print the sizes of the splits and the imbalance; counts: images a class and split."""
    n = counts.sum()
    titles = ("trnid", "valid", "tstid") if flowers.convention == "swapped" else counts.columns
    sizes = ", ".join(f"{title} {n[title]:,}" for title in titles)
    print(f"{flowers.root}: {len(flowers.files):,} images of {len(counts)} classes; {sizes}")
    conventions = [("swapped", "trnid", "tstid"), ("official", "tstid", "trnid")]
    if flowers.convention != "swapped":
        print(f"  {flowers.protocol}")
        conventions = []
    for name, test, train in conventions:
        title = f"{name} splits:"
        print(
            f"  {title:16} train {n[train] + n['valid']:,} (valid + {train}), "
            f"test {n[test]:,} ({test}); "
            f"with --holdout train {n[train]:,}, val {n['valid']:,}"
        )
    per_class = counts.sum(axis=1)
    fewest, most = per_class.min(), per_class.max()
    print(
        f"images per class: {fewest} ({per_class.idxmin()}) to {most} ({per_class.idxmax()}), "
        f"ratio {most / max(fewest, 1):.1f}; "
        f"mean {per_class.mean():.1f}, median {per_class.median():.0f}"
    )


def print_sizes(flowers: Flowers) -> None:
    """Print the range of image sizes and the most frequent one."""
    sizes = []
    for file in flowers.files:
        with Image.open(file) as image:  # reads the header only
            sizes.append(image.size)
    width, height = np.array(sizes).T
    (common_width, common_height), times = Counter(sizes).most_common(1)[0]
    print(
        f"sizes: width {width.min()} to {width.max()}, height {height.min()} to {height.max()} "
        f"pixels; {len(set(sizes))} different, most often {common_width} x {common_height} "
        f"({100 * times / len(sizes):.0f}%)"
    )


def draw_classes(counts: pd.DataFrame, path: Path, pdf: bool, title: str) -> Path:
    """Draw bars, a class a row, most images first, stacked by the parts of the split.

    counts: images a class (row) and part (column).
    """
    total = counts.sum(axis=1)
    counts = counts.iloc[np.argsort(-total, kind="stable")]
    many = len(counts) > 40
    n_columns = 3 if many else 1
    n_rows = -(-len(counts) // n_columns)
    height = (0.135 if many else 0.19) * n_rows + 1.1  # inches
    figure, axes = plt.subplots(
        1, n_columns, figsize=(7.4, height), sharex=True, squeeze=False, layout="constrained"
    )
    for axis, rows in zip(axes[0], np.array_split(np.arange(len(counts)), n_columns)):
        # pandas and not seaborn, whose stacked histogram wants a row an image: these are counts
        part = counts.iloc[rows]
        part.plot.barh(ax=axis, stacked=True, width=0.75, color=figures.PALETTE, legend=False)
        totals = part.sum(axis=1)
        axis.bar_label(axis.containers[-1], totals, padding=2, fontsize=5.5 if many else 7)
        axis.set(ylim=(n_rows - 0.4, -0.6), xlim=(0, 1.12 * total.max()), ylabel="")
        axis.set_xlabel("images", fontsize=8)
        axis.tick_params(axis="x", labelsize=7)
        axis.tick_params(axis="y", length=0, labelsize=6 if many else 8)
        axis.spines[["top", "right"]].set_visible(False)
    handles, splits = axes[0, 0].get_legend_handles_labels()
    labels = [LEGEND.get(split, split) for split in splits]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figures.save(figure, path, pdf)


# -----------------------------------------------------------------------------


@command
def main(args: argparse.Namespace):
    # With a holdout, the three parts of a split are kept apart. Oxford's are swapped by default.
    flowers = open_flowers(
        args.data_root,
        args.splits_path,
        holdout=True,
        class_names=args.class_names,
        splits_base=args.splits_base,
        needs_split=False,
    )
    if args.sheet and args.sheet.resolve() in {file.resolve() for file in flowers.files}:
        raise UserError(f"--sheet {args.sheet} is an image of the dataset: give another name")
    splits = split_names(flowers)

    # -------------------------------------------------------------------------
    # numbers

    counts = pd.DataFrame(index=list(flowers.class_names))
    for split in split_titles(flowers) or ["all"]:
        labels = flowers.labels[splits == split]
        counts[split] = np.bincount(labels, minlength=len(flowers.class_names))
    print_counts(flowers, counts)
    squares = load_squares(flowers)  # here, as it ends with an error if a file can't be decoded
    print_sizes(flowers)
    pairs = find_duplicates(squares, args.hash_bits, args.levels)
    print(
        f"{len(pairs)} pairs of near-duplicates (64-bit perceptual hash within {args.hash_bits} "
        f"bits, pixels within {args.levels:g} levels)"
    )
    print_duplicates(pairs, flowers, splits)

    # -------------------------------------------------------------------------
    # pictures and table

    per_class = counts.sum(axis=1)
    title = (
        f"{len(flowers.files):,} images of {len(counts)} classes "
        f"({per_class.min()} to {per_class.max()} a class)"
    )
    pictures = [draw_classes(counts, args.output / "classes.png", args.pdf, title)]
    if args.sheet:
        pictures.append(figures.contact_sheet(flowers, args.sheet))
    saved = list(pictures)
    if len(pairs):
        table = args.output / "duplicates.csv"
        files.write_csv(table, duplicates_table(pairs, flowers, splits))
        saved.append(table)
    print("saved " + ", ".join(map(str, saved)))
    if args.show:
        figures.show(pictures)


if __name__ == "__main__":
    main(args)
