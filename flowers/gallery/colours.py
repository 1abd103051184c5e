"""The colours of one picture: features for the nearest images, a palette, and HSV curves."""

import numpy as np
from PIL import Image

from flowers import colour

HUE_BINS = 120  # 3 degrees each
LEVELS = 65  # of saturation and value, from 0 to 1
PALETTE_SIDE = 128  # pixels: a palette needs no more detail


def colour_features(rgb: np.ndarray) -> np.ndarray:
    """Return colour features (256,) float32 of a picture (H, W, 3) uint8.

    The dot product of two is the Bhattacharyya coefficient of their HSV histograms
    (Bhattacharyya 1943): 1 for the same colours, 0 for none in common.
    """
    return colour.hsv_hist(colour.measure(rgb, "none")).astype(np.float32)


def palette(rgb: np.ndarray, n_colours: int = 6) -> list[tuple[str, float]]:
    """Return the main colours of a picture (H, W, 3) uint8, the most frequent first.

    Each is a pair of '#rrggbb' and its share of the pixels, from 0 to 1.
    """
    image = Image.fromarray(rgb)
    image.thumbnail((PALETTE_SIDE, PALETTE_SIDE))
    quantized = image.quantize(n_colours, method=Image.Quantize.MAXCOVERAGE)
    n_pixels = image.width * image.height
    channels = quantized.getpalette()  # r, g, b of colour 0, then of colour 1, ...
    main_colours = []
    for count, i in sorted(quantized.getcolors(), reverse=True):
        hex_digits = bytes(channels[3 * i : 3 * i + 3]).hex()
        main_colours.append((f"#{hex_digits}", count / n_pixels))
    return main_colours


def hsv_curves(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the densities of hue (120,), saturation (65,) and value (65,) of a picture.

    rgb: its pixels, (H, W, 3) uint8. Hue is weighted by chroma and taken at the middle of 120
    equal parts of the circle; it is zero everywhere for a picture without colour. Saturation and
    value are taken from 0 to 1 inclusive.
    """
    row = colour.measure(rgb, "none")
    angles = (np.arange(HUE_BINS) + 0.5) / HUE_BINS
    levels = np.linspace(0, 1, LEVELS)
    hue = np.zeros(HUE_BINS)  # grey has no hue
    if row[colour.HUE].sum():
        hue = colour.density(row, colour.HUE, angles)
    saturation = colour.density(row, colour.SATURATION, levels)
    value = colour.density(row, colour.VALUE, levels)
    return hue, saturation, value
