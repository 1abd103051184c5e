"""The colours of images as histograms that treat hue as what it is, a circle.

A row of colours, (WIDTH,) float32, describes the pixels of one image; the sum of rows describes
those of many. It holds four parts, of which the first three have LEVELS bins each:

    HUE         how much there is of each hue, weighted by chroma = saturation x value,
                since a grey pixel has no hue
    SATURATION  how many pixels of each saturation
    VALUE       how many pixels of each value
    HSV_HIST    a coarse joint histogram, JOINT bins
    [-1]        the sum of squared chroma

The rest follows from these: means on the circle, points in the HSV cone, and the densities of the
pixels themselves. `load_colours` makes the rows of a dataset.
"""

import math
from collections.abc import Iterator

import numpy as np

from flowers import cache, images, opencv_import
from flowers.data import Flowers

with opencv_import():
    import cv2

FORMAT = 1  # raise it when the stored numbers change
LEVELS = 256  # of hue (1.4 degrees), saturation and value
JOINT = (16, 4, 4)  # bins of hue, saturation, value

HUE = slice(0, LEVELS)
SATURATION = slice(LEVELS, 2 * LEVELS)
VALUE = slice(2 * LEVELS, 3 * LEVELS)
HSV_HIST = slice(3 * LEVELS, 3 * LEVELS + math.prod(JOINT))
WIDTH = HSV_HIST.stop + 1

# Short side, in pixels, at which GrabCut works: flowers are large, and at 500 pixels it would take
# sixty times as long.
GRABCUT_SIDE = 64

# A direction for each level of hue, as a complex number of length 1.
DIRECTIONS = np.exp(2j * np.pi * np.arange(LEVELS) / LEVELS)

# -----------------------------------------------------------------------------
# pixels and masks


def to_hsv(rgb: np.ndarray) -> np.ndarray:
    """Convert (H, W, 3) uint8 RGB to HSV; hue has 256 levels for the whole circle."""
    return cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2HSV_FULL)


def centre_distance(height: int, width: int) -> np.ndarray:
    """Return the distance (H, W) of each pixel from the centre, in short sides."""
    y, x = np.ogrid[:height, :width]
    distance = np.hypot(y - (height - 1) / 2, x - (width - 1) / 2)
    return distance / min(height, width)


def grabcut_mask(hsv: np.ndarray) -> np.ndarray:
    """Return (H, W) bool, what GrabCut (Rother et al. 2004) takes for the flower.

    It starts from a disc of 80% of the short side. The innermost 30% are sure to be flower, and
    the outermost 5% of the picture to be background.
    """
    height, width = hsv.shape[:2]
    scale = GRABCUT_SIDE / min(height, width)
    size = (round(width * scale), round(height * scale))
    bgr = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR_FULL)
    small = cv2.resize(bgr, size, interpolation=cv2.INTER_AREA)

    distance = centre_distance(*small.shape[:2])
    guess = np.full(small.shape[:2], cv2.GC_PR_BGD, np.uint8)
    guess[distance <= 0.4] = cv2.GC_PR_FGD
    guess[distance <= 0.15] = cv2.GC_FGD
    edge = GRABCUT_SIDE // 20
    guess[:edge] = guess[-edge:] = cv2.GC_BGD
    guess[:, :edge] = guess[:, -edge:] = cv2.GC_BGD

    cv2.setRNGSeed(0)  # GrabCut clusters at random; the same mask each time
    background = np.zeros((1, 65))  # GrabCut's own working memory
    foreground = np.zeros((1, 65))
    cv2.grabCut(small, guess, None, background, foreground, 3, cv2.GC_INIT_WITH_MASK)
    is_flower = guess & 1  # GC_FGD and GC_PR_FGD are odd
    return cv2.resize(is_flower, (width, height), interpolation=cv2.INTER_NEAREST) > 0


def mask_of(hsv: np.ndarray, mask: str) -> np.ndarray:
    """Return (H, W) bool, the pixels that count under one of choices.MASKS.

    none: all; centre: a disc of 70% of the short side; grabcut: see `grabcut_mask`.
    """
    height, width = hsv.shape[:2]
    if mask == "none":
        return np.ones((height, width), bool)
    if mask == "centre":
        return centre_distance(height, width) <= 0.35
    return grabcut_mask(hsv)


# -----------------------------------------------------------------------------
# rows of colours


def histograms(hsv: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the row of colours of the pixels (H, W, 3) under a mask (H, W)."""
    hue, saturation, value = cv2.split(hsv)
    chroma = cv2.multiply(saturation, value, scale=1 / 255)
    under = mask.astype(np.uint8)
    limits = [0, LEVELS]

    # calcHist has no weights: count (hue, chroma) pairs, then weigh the counts
    counts = cv2.calcHist([hue, chroma], [0, 1], under, [LEVELS, LEVELS], limits * 2)
    weights = np.arange(LEVELS, dtype=np.float32) / 255
    by_hue = counts @ weights
    squared_chroma = counts.sum(0) @ weights**2

    by_saturation = cv2.calcHist([saturation], [0], under, [LEVELS], limits).ravel()
    by_value = cv2.calcHist([value], [0], under, [LEVELS], limits).ravel()
    joint = cv2.calcHist([hsv], [0, 1, 2], under, JOINT, limits * 3).ravel()
    return np.concatenate([by_hue, by_saturation, by_value, joint, [squared_chroma]])


def measure(rgb: np.ndarray, mask: str) -> np.ndarray:
    """Return the row of colours of a picture (H, W, 3) uint8 under one of choices.MASKS."""
    hsv = to_hsv(rgb)
    return histograms(hsv, mask_of(hsv, mask))


def load_colours(flowers: Flowers, mask: str) -> np.ndarray:
    """Return the rows of colours (N, WIDTH) float32 of all images under one of choices.MASKS.

    They are measured once and kept beside the data. Raises UserError naming the file if an image
    can't be decoded.
    """
    path = cache.array_path(flowers.root, f"hsv-{mask}", flowers.files)
    key = cache.key_of(FORMAT, mask, *flowers.files)
    shape = (len(flowers.files), WIDTH)

    def measure_file(file) -> np.ndarray:
        return measure(images.read_rgb(file), mask)

    def rows() -> Iterator[np.ndarray]:
        return images.decode_all(flowers.files, measure_file)

    return cache.cached_array(path, key, shape, "<f4", rows)


# -----------------------------------------------------------------------------
# what follows from them


def circular_mean(hue: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean direction and mean resultant length of hue histograms (..., LEVELS).

    The direction is in [0, 1); the length is 0 if hues lie all around the circle, 1 if there is
    only one (Mardia 1972).
    """
    resultant = hue @ DIRECTIONS
    direction = np.angle(resultant) / (2 * np.pi) % 1
    length = abs(resultant) / np.maximum(hue.sum(-1), 1e-12)
    return direction, length


def cone(rows: np.ndarray) -> np.ndarray:
    """Return the mean point in the HSV cone (..., 3) of rows (..., WIDTH).

    The axes are chroma cos(hue), chroma sin(hue) and value, each at most 1 in size.
    """
    resultant = rows[..., HUE] @ DIRECTIONS
    total_value = rows[..., VALUE] @ np.arange(LEVELS) / 255
    n_pixels = np.maximum(rows[..., VALUE].sum(-1), 1)
    point = [resultant.real / n_pixels, resultant.imag / n_pixels, total_value / n_pixels]
    return np.stack(point, -1)


def hsv_hist(rows: np.ndarray) -> np.ndarray:
    """Return square roots of the joint histogram's shares (..., 256).

    Their Euclidean distance is Hellinger's, times the square root of 2.
    """
    joint = rows[..., HSV_HIST]
    n_pixels = joint.sum(-1, keepdims=True)
    return np.sqrt(joint / np.maximum(n_pixels, 1))


def density(row: np.ndarray, channel: slice, grid: np.ndarray) -> np.ndarray:
    """Return the kernel density (G,) of HUE, SATURATION or VALUE at `grid` (G,) in [0, 1].

    A Gaussian is laid over each level of the histogram. The bandwidth is Scott's for the pixels
    themselves (Scott 1992; their effective number where they are weighted), so the curve is that of
    scipy's gaussian_kde on raw pixels, but never below two levels. Hue wraps around; saturation
    and value are reflected at 0 and 1.
    """
    # Ours, and not seaborn's or scipy's: hue is an angle, which neither knows, and a histogram
    # first is 400 times faster than gaussian_kde on pixels.
    weights = row[channel] + 1e-9  # a grey class has no hue: an even curve
    total = weights.sum()
    if channel == HUE:
        n_effective = total**2 / max(row[-1], 1e-12)
        values = np.arange(LEVELS) / LEVELS
        mean, _ = circular_mean(weights)
        deviations = (values - mean + 0.5) % 1 - 0.5  # a cluster across 0 is one cluster
        copies = [values - 1, values, values + 1]
    else:
        n_effective = total
        values = np.arange(LEVELS) / 255
        deviations = values - np.average(values, weights=weights)
        copies = [-values, values, 2 - values]

    spread = np.sqrt(np.average(deviations**2, weights=weights))
    bandwidth = max(spread * max(n_effective, 1) ** -0.2, 2 / LEVELS)
    kernels = np.zeros((len(grid), LEVELS))
    for centres in copies:
        z = (grid[:, None] - centres) / bandwidth
        kernels += np.exp(-0.5 * z**2)
    return kernels @ weights / (total * bandwidth * np.sqrt(2 * np.pi))
