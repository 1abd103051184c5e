"""What is in the dataset: images per class and split, image sizes, imbalance, and pictures that occur twice, also across train and test.

    python data_Exploration/dataset_Description.py                          # Oxford Flowers 102
    python data_Exploration/dataset_Description.py --data_root sample       # any machine, offline

Saves figures/classes.png (images per class, sorted, stacked by split) and figures/duplicates.csv (the pairs, for a look at them).
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.fft import dctn

from flowers import command, figures, files
from flowers.data import Flowers, add_data_arguments, open_flowers
from flowers.pixels import load_pixels

plt = figures.plt
PARTS = {
    "tstid": "train",
    "valid": "val",
    "trnid": "test",
}  # Oxford's names of what a swapped holdout calls so


def perceptual_hashes(pixels: np.ndarray) -> np.ndarray:
    """64 bits an image, (N, 64) bool, of (N, 3, 32, 32) uint8: which of the lowest 8 x 8 frequencies of the grey image are above their median
    (pHash; Zauner 2010). Rescaling, recompression and small changes of brightness leave it nearly the same."""
    grey = np.einsum("nchw,c->nhw", pixels, np.float32([0.299, 0.587, 0.114]))
    low = dctn(grey, axes=(1, 2), norm="ortho")[:, :8, :8].reshape(len(grey), 64)
    return low > np.median(low[:, 1:], axis=1, keepdims=True)  # without the mean brightness


def near_pairs(hashes: np.ndarray, bits: int) -> np.ndarray:
    """Pairs (P, 2), i < j, of rows that differ in at most so many bits."""
    signs = 2 * hashes.astype(np.float32) - 1
    pairs = []
    for start in range(0, len(signs), 1024):
        apart = (hashes.shape[1] - signs[start : start + 1024] @ signs.T) / 2
        i, j = np.nonzero(apart <= bits)
        pairs.append(np.stack([i + start, j], 1)[j > i + start])
    return np.concatenate(pairs)


def duplicates(pixels: np.ndarray, bits: int, levels: float) -> np.ndarray:
    """Pairs (P, 2) of images whose hashes differ by at most `bits`, and whose 32 x 32 pixels by at most `levels` on average.

    The second condition is for plain pictures, whose few frequencies say little: brightness and contrast are taken out first.
    """
    pairs = near_pairs(perceptual_hashes(pixels), bits)
    first, second = (pixels[side].astype(np.float32) for side in pairs.T)
    mean = lambda x: x.mean((1, 2, 3), keepdims=True)
    first, second = first - mean(first), second - mean(second)
    return pairs[abs(first - second).mean((1, 2, 3)) <= levels]


def draw_classes(
    counts: dict[str, np.ndarray], names: tuple[str, ...], path: Path, pdf: bool, title: str
) -> Path:
    """Horizontal bars, a class a row, most images first, stacked by Oxford's splits; with many classes in three columns."""
    total = sum(counts.values())
    order = np.argsort(-total, kind="stable")
    columns = 3 if len(names) > 40 else 1
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        1,
        columns,
        figsize=(7.4, 0.135 * rows + 1.1 if columns > 1 else 0.19 * rows + 1.1),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, part in zip(axes[0], np.array_split(order, columns)):
        y, left = np.arange(len(part)), np.zeros(len(part))
        for (split, count), colour in zip(counts.items(), figures.PALETTE):
            axis.barh(y, count[part], left=left, height=0.75, color=colour, label=split)
            left += count[part]
        for at, n in zip(y, total[part]):
            axis.text(
                n + 0.01 * total.max(), at, str(n), va="center", fontsize=5.5 if columns > 1 else 7
            )
        axis.set_yticks(y, [names[c] for c in part], fontsize=6 if columns > 1 else 8)
        axis.set(ylim=(rows - 0.4, -0.6), xlim=(0, 1.12 * total.max()))
        axis.set_xlabel("images", fontsize=8)
        axis.tick_params(axis="x", labelsize=7)
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axis.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8,
    )
    figure.suptitle(title, fontsize=10)
    return figures.save(figure, path, pdf)


def report_duplicates(pairs: np.ndarray, flowers: Flowers, part: np.ndarray) -> list[dict]:
    """Print how many pairs there are within and across the splits of both conventions; returns a row a pair."""
    across = {
        "swapped": part == "trnid",
        "official": part == "tstid",
    }  # which images are test images
    for name, test in across.items():
        inside = test[pairs].sum(1)
        leaking = len(np.unique(pairs[inside == 1][test[pairs[inside == 1]]]))
        print(
            f"  {name} splits: {(inside == 0).sum()} within train, {(inside == 2).sum()} within test, {(inside == 1).sum()} across train and test: "
            f"{leaking} of {test.sum():,} test images ({100 * leaking / test.sum():.2f}%) have their like in train"
        )
    differ = flowers.labels[pairs[:, 0]] != flowers.labels[pairs[:, 1]]
    print(f"  {differ.sum()} pairs have two different labels")
    return [
        {
            f"{column}_{k}": value
            for k, i in enumerate(pair, 1)
            for column, value in (
                ("file", flowers.files[i].name),
                ("class", flowers.class_names[flowers.labels[i]]),
                ("split", part[i]),
            )
        }
        for pair in pairs
    ]


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser, splits=False)
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
        help="of 256 that their 32 x 32 pixels may differ by on average (default: %(default)s)",
    )
    figures.add_figure_arguments(parser)
    args = parser.parse_args()
    flowers = open_flowers(
        args.data_root, args.splits_path, "swapped", True, args.class_names
    )  # the swapped holdout keeps Oxford's three apart
    part = np.empty(len(flowers.files), dtype="U5")
    for oxford, split in PARTS.items():
        part[flowers.splits[split]] = oxford
    n_classes = len(flowers.class_names)
    counts = {
        oxford: np.bincount(flowers.labels[part == oxford], minlength=n_classes) for oxford in PARTS
    }
    n = {oxford: int(count.sum()) for oxford, count in counts.items()}

    print(
        f"{flowers.root}: {len(flowers.files):,} images of {n_classes} classes; trnid {n['trnid']:,}, valid {n['valid']:,}, tstid {n['tstid']:,}"
    )
    for name, (test, train), note in (
        ("swapped", ("trnid", "tstid"), " "),
        ("official", ("tstid", "trnid"), ""),
    ):
        print(
            f"  {name} splits:{note} train {n[train] + n['valid']:,} (valid + {train}), test {n[test]:,} ({test}); "
            f"with --holdout train {n[train]:,}, val {n['valid']:,}"
        )
    total = sum(counts.values())
    fewest, most = total.argmin(), total.argmax()
    print(
        f"images per class: {total[fewest]} ({flowers.class_names[fewest]}) to {total[most]} ({flowers.class_names[most]}), ratio "
        f"{total[most] / max(total[fewest], 1):.1f}; mean {total.mean():.1f}, median {np.median(total):.0f}"
    )
    pixels, sizes = load_pixels(flowers, 32).numpy(), []  # every file can be decoded, then
    for file in flowers.files:
        with Image.open(file) as image:  # reads the header only
            sizes.append(image.size)
    width, height = np.array(sizes).T
    common, times = Counter(sizes).most_common(1)[0]
    print(
        f"sizes: width {width.min()} to {width.max()}, height {height.min()} to {height.max()} pixels; {len(set(sizes))} different, most often "
        f"{common[0]} x {common[1]} ({100 * times / len(sizes):.0f}%)"
    )
    pairs = duplicates(pixels, args.hash_bits, args.levels)
    print(
        f"{len(pairs)} pairs of near-duplicates (64-bit perceptual hash within {args.hash_bits} bits, pixels within {args.levels:g} levels)"
    )
    rows = report_duplicates(pairs, flowers, part)

    title = f"{len(flowers.files):,} images of {n_classes} classes ({total.min()} to {total.max()} a class)"
    roles = {
        "tstid": "tstid (train if swapped, test if official)",
        "valid": "valid (train, or val)",
        "trnid": "trnid (test if swapped, train if official)",
    }
    saved = [
        draw_classes(
            {roles[k]: v for k, v in counts.items()},
            flowers.class_names,
            args.output / "classes.png",
            args.pdf,
            title,
        )
    ]
    if rows:
        files.write_csv(args.output / "duplicates.csv", rows)
        saved.append(args.output / "duplicates.csv")
    print("saved " + ", ".join(map(str, saved)))
    if args.show:
        figures.show(saved[:1])


if __name__ == "__main__":
    main()
