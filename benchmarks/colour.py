"""How much faster colour densities and HSV features are than the usual recipes, and how far they
are from them.

    python benchmarks/colour.py --data_root data/flowers-102      # two minutes

Densities: gaussian_kde on the pixels of a class (matplotlib's rgb_to_hsv, weights for hue) against
histogram first, at 361 points each. Features: PIL and matplotlib's rgb_to_hsv with NumPy
histograms, against flowers.pixels.read_jpeg and flowers.colour. All on one core.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from matplotlib.colors import rgb_to_hsv
from measure import add_arguments, alternate, bandwidth, per_item, report, spread_over
from PIL import Image
from scipy.stats import gaussian_kde

from flowers import colour, command
from flowers.data import Flowers, add_data_arguments, find_class, open_flowers
from flowers.pixels import read_jpeg

POINTS = np.linspace(0, 1, 361)  # where the densities are computed
CHANNELS = {"hue": colour.HUE, "saturation": colour.SATURATION, "value": colour.VALUE}


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
        help="pixels of the class, evenly taken (default: %(default)s)",
    )
    parser.add_argument(
        "--images", type=int, default=60, help="images for the features (default: %(default)s)"
    )
    args = parser.parse_args()
    # one core for all: OpenCV and torch would take several
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    flowers = open_flowers(args.data_root, args.splits_path)

    measure_densities(class_pixels(flowers, args.name, args.pixels), args)
    measure_features(spread_over(flowers.files, args.images), args)


def read_array(file: Path) -> np.ndarray:
    """A JPEG as (H, W, 3) uint8, by our reader."""
    return read_jpeg(file).permute(1, 2, 0).numpy()


# -----------------------------------------------------------------------------
# densities


def class_pixels(flowers: Flowers, name: str, count: int) -> np.ndarray:
    """At most `count` pixels of a class, evenly taken, as an image (1, count, 3) uint8."""
    members = np.flatnonzero(flowers.labels == find_class(flowers, name))
    pixels = np.concatenate([read_array(flowers.files[i]).reshape(-1, 3) for i in members])
    index = np.linspace(0, len(pixels) - 1, min(count, len(pixels))).astype(int)
    return np.ascontiguousarray(pixels[index][None])


def measure_densities(rgb: np.ndarray, args: argparse.Namespace) -> None:
    """Measure the densities of H, S and V, and print how far ours are from the exact ones."""
    hsv = rgb_to_hsv(rgb[0] / 255)
    hue, saturation, value = hsv.T
    chroma = saturation * value  # grey pixels have a hue, but it means nothing
    # gaussian_kde knows no circle: it is cut opposite to the mean hue
    mean_hue = np.angle(chroma @ np.exp(2j * np.pi * hue)) / (2 * np.pi)
    shift = 0.5 - mean_hue
    shifted = (hue + shift) % 1

    def kernel_densities():
        return [
            gaussian_kde(shifted, weights=chroma),
            gaussian_kde(saturation),
            gaussian_kde(value),
        ]

    def plain_densities():
        # the plain recipe's own work; wrapping below is not counted
        for kde in kernel_densities():  # a kernel for each pixel
            kde(POINTS)

    def our_densities():
        row = colour.measure(rgb, "none")  # the histograms, (WIDTH,)
        return [colour.density(row, channel, POINTS) for channel in CHANNELS.values()]

    ways = {"gaussian_kde on the pixels": plain_densities, "histogram first": our_densities}
    seconds = alternate(ways, args.rounds)
    what = f"densities of H, S, V, {rgb.shape[1]:,} pixels, one core"
    report(args.rows, what, seconds, rgb.nbytes / bandwidth(), "reading the pixels")

    for name, kde, curve in zip(CHANNELS, kernel_densities(), our_densities()):
        exact = wrapped(kde, shift) if name == "hue" else reflected(kde)
        difference = 100 * abs(curve - exact).max() / exact.max()
        print(f"  {name}: greatest difference of the curves {difference:.2f}% of the peak")


def wrapped(kde: gaussian_kde, shift: float) -> np.ndarray:
    """The density on the circle, of a density on the line of values that were shifted."""
    return sum(kde(POINTS + shift + turn) for turn in (-2, -1, 0, 1))


def reflected(kde: gaussian_kde) -> np.ndarray:
    """The density on [0, 1]: what the kernels spill over the borders is reflected there."""
    return sum(kde(points) for points in (-POINTS, POINTS, 2 - POINTS))


# -----------------------------------------------------------------------------
# features


def read_hsv(file: Path) -> np.ndarray:
    """A JPEG as its three channels (3, H * W) in [0, 1], as everybody computes them."""
    with Image.open(file) as image:
        rgb = np.asarray(image.convert("RGB"))
    return rgb_to_hsv(rgb / 255).reshape(-1, 3).T


def plain_histograms(file: Path) -> tuple[np.ndarray, ...]:
    """The histograms of one image, by NumPy."""
    hue, saturation, value = read_hsv(file)
    unit = (0, 1)
    return (
        np.histogram(hue, colour.LEVELS, unit, weights=saturation * value)[0],
        np.histogram(saturation, colour.LEVELS, unit)[0],
        np.histogram(value, colour.LEVELS, unit)[0],
        np.histogramdd((hue, saturation, value), colour.JOINT, (unit,) * 3)[0],
    )


def measure_features(files: Sequence[Path], args: argparse.Namespace) -> None:
    """Measure the histograms of images, and print how far their mean colours are from the exact."""

    def plain_features():
        for file in files:
            plain_histograms(file)

    def decode():
        for file in files:
            read_jpeg(file)

    def our_features():
        return np.stack([colour.measure(read_array(file), "none") for file in files])

    ways = {
        "PIL + matplotlib's rgb_to_hsv + numpy": plain_features,
        "decoding alone": decode,
        "flowers.colour": our_features,
    }
    seconds = per_item(alternate(ways, args.rounds), len(files))
    # nobody can be faster than the decoder
    limit = statistics.median_high(seconds.pop("decoding alone"))
    what = "HSV features of an image (Isomap), one core"
    report(args.rows, what, seconds, limit, "decoding (libjpeg-turbo)")

    # the cone: hue as an angle, chroma as a radius, value as a height
    differences = []
    for file, point in zip(files, colour.cone(our_features())):
        difference = abs(exact_cone(file) - point).max()
        differences.append(difference)
    print(
        f"  mean points in the HSV cone: greatest difference {max(differences):.4f} of 1, "
        f"mean {np.mean(differences):.5f}"
    )


def exact_cone(file: Path) -> np.ndarray:
    """The mean point of an image in the HSV cone (3,), from its pixels."""
    hue, saturation, value = read_hsv(file)
    angle = 2 * np.pi * hue
    chroma = saturation * value
    return np.mean([chroma * np.cos(angle), chroma * np.sin(angle), value], axis=1)


if __name__ == "__main__":
    main()
