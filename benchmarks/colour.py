"""How much faster colour densities and HSV features are than the usual recipes, and how far they are from them.

    python benchmarks/colour.py --data_root data/flowers-102      # two minutes

Densities: gaussian_kde on the pixels of a class (matplotlib's rgb_to_hsv, weights for hue) against histogram first, 361 places each.
Features: PIL and matplotlib's rgb_to_hsv with numpy histograms, against flowers.pixels.read and flowers.colour, one core.
"""

import argparse

import cv2
import numpy as np
import torch
from matplotlib.colors import rgb_to_hsv
from measure import add_arguments, alternate, bandwidth, report
from PIL import Image
from scipy.stats import gaussian_kde

from flowers import colour, command
from flowers.data import add_data_arguments, find_class, open_flowers
from flowers.pixels import read_jpeg

GRID = np.linspace(0, 1, 361)


def raw_hsv(file):
    """(H, W, 3) in [0, 1] as everybody computes it."""
    with Image.open(file) as image:
        return rgb_to_hsv(np.asarray(image.convert("RGB")) / 255)


def wrapped(kde, circular, shift):
    """The curve on the circle, or reflected at 0 and 1, of a plain density of values that were shifted."""
    images = [GRID + shift + k for k in (-2, -1, 0, 1)] if circular else [-GRID, GRID, 2 - GRID]
    return sum(kde(x) for x in images)


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser, splits=False)
    add_arguments(parser)
    parser.add_argument(
        "--class", dest="name", default="rose", help="whose pixels (default: %(default)s)"
    )
    parser.add_argument(
        "--pixels",
        type=int,
        default=330_000,
        help="of the class, evenly taken (default: %(default)s)",
    )
    parser.add_argument(
        "--images", type=int, default=60, help="for the features (default: %(default)s)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    flowers = open_flowers(args.data_root, args.splits_path)

    members = np.flatnonzero(flowers.labels == find_class(flowers, args.name))
    rgb = np.concatenate(
        [read_jpeg(flowers.files[i]).permute(1, 2, 0).reshape(-1, 3).numpy() for i in members]
    )
    rgb = np.ascontiguousarray(
        rgb[np.linspace(0, len(rgb) - 1, min(args.pixels, len(rgb))).astype(int)][None]
    )
    hsv = rgb_to_hsv(rgb[0] / 255)
    chroma = hsv[:, 1] * hsv[:, 2]
    direction = np.angle(chroma @ np.exp(2j * np.pi * hsv[:, 0])) / (2 * np.pi)
    shifts = [0.5 - direction, 0.0, 0.0]  # the cut of the circle goes opposite to the mean hue
    values = [(hsv[:, 0] + shifts[0]) % 1, hsv[:, 1], hsv[:, 2]]
    found = {}

    def plain_densities():
        found["kdes"] = [
            gaussian_kde(v, weights=chroma if i == 0 else None) for i, v in enumerate(values)
        ]
        for kde in found["kdes"]:
            kde(GRID)  # the plain recipe's own work; wrapping below is not counted

    def our_densities():
        row = colour.measure(rgb, "none")
        found["ours"] = [
            colour.density(row, channel, GRID)
            for channel in (colour.HUE, colour.SATURATION, colour.VALUE)
        ]

    spent = alternate(
        {"gaussian_kde on the pixels": plain_densities, "histogram first": our_densities},
        args.rounds,
    )
    report(
        args.rows,
        f"densities of H, S, V, {rgb.shape[1]:,} pixels, one core",
        spent,
        rgb.nbytes / bandwidth(),
        "reading the pixels",
    )
    for i, (name, kde, curve) in enumerate(
        zip(("hue", "saturation", "value"), found["kdes"], found["ours"])
    ):
        exact = wrapped(kde, i == 0, shifts[i])
        print(
            f"  {name}: greatest difference of the curves {100 * abs(curve - exact).max() / exact.max():.2f}% of the peak"
        )

    files = flowers.files[:: max(1, len(flowers.files) // args.images)][: args.images]

    def plain_features():
        for file in files:
            h, s, v = raw_hsv(file).reshape(-1, 3).T
            found["plain"] = [
                np.histogram(h, colour.LEVELS, (0, 1), weights=s * v)[0],
                np.histogram(s, colour.LEVELS, (0, 1))[0],
                np.histogram(v, colour.LEVELS, (0, 1))[0],
                np.histogramdd((h, s, v), colour.JOINT, ((0, 1),) * 3)[0],
            ]

    def our_features():
        found["rows"] = np.stack(
            [colour.measure(read_jpeg(file).permute(1, 2, 0).numpy(), "none") for file in files]
        )

    spent = alternate(
        {
            "PIL + matplotlib's rgb_to_hsv + numpy": plain_features,
            "decoding alone": lambda: [read_jpeg(file) for file in files],
            "flowers.colour": our_features,
        },
        args.rounds,
    )
    limit = sorted(spent.pop("decoding alone"))[args.rounds // 2]
    report(
        args.rows,
        "HSV features of an image (Isomap), one core",
        {k: [t / len(files) for t in v] for k, v in spent.items()},
        limit / len(files),
        "decoding (libjpeg-turbo)",
    )
    apart = []
    for file, point in zip(files, colour.cone(found["rows"])):
        h, s, v = raw_hsv(file).reshape(-1, 3).T
        exact = np.mean([s * v * np.cos(2 * np.pi * h), s * v * np.sin(2 * np.pi * h), v], axis=1)
        apart.append(abs(exact - point).max())
    print(
        f"  mean points in the HSV cone: greatest difference {max(apart):.4f} of 1, mean {np.mean(apart):.5f}"
    )


if __name__ == "__main__":
    main()
