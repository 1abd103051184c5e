"""The colours of images as histograms that treat hue as what it is, a circle.

A row of colours, (WIDTH,) float32, describes the pixels of one image, or the sum of rows those of many: how much there is of each hue
(weighted by chroma = saturation x value, as a grey pixel has no hue), how many pixels of each saturation and value, and a coarse joint
histogram. The rest follows from these: means on the circle, points in the HSV cone, and the densities of the pixels themselves.
`load_colours` makes the rows of a dataset.
"""

import cv2
import numpy as np

from flowers import cache, images
from flowers.data import Flowers

FORMAT = 1  # raise it when the stored numbers change
LEVELS = 256  # of hue (1.4 degrees), saturation and value
JOINT = (16, 4, 4)  # bins of hue, saturation, value
HUE, SATURATION, VALUE = (slice(i * LEVELS, (i + 1) * LEVELS) for i in range(3))
HSV_HIST = slice(3 * LEVELS, 3 * LEVELS + 16 * 4 * 4)
WIDTH = HSV_HIST.stop + 1  # the last is the sum of squared chroma
MASKS = ("none", "centre", "grabcut")
GRABCUT_SIDE = 64  # short side, pixels, at which GrabCut works: flowers are large, and at 500 there are sixty times the pixels


def to_hsv(rgb: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB to hue (256 levels for the whole circle), saturation and value."""
    return cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2HSV_FULL)


def mask_of(hsv: np.ndarray, mask: str) -> np.ndarray:
    """(H, W) bool, the pixels that count. 'none': all; 'centre': a disc of 70% of the short side; 'grabcut': what GrabCut (Rother et al. 2004)
    takes for the flower, starting from a disc of 80%, with the innermost 30% as sure and the outermost 5% of the picture as background."""
    height, width = hsv.shape[:2]
    if mask == "none":
        return np.ones((height, width), bool)
    if mask == "centre":
        return _radius(height, width) <= 0.35
    scale = GRABCUT_SIDE / min(height, width)
    small = cv2.resize(
        cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR_FULL),
        (round(width * scale), round(height * scale)),
        interpolation=cv2.INTER_AREA,
    )
    radius, edge = _radius(*small.shape[:2]), GRABCUT_SIDE // 20
    guess = np.where(
        radius <= 0.15, cv2.GC_FGD, np.where(radius <= 0.4, cv2.GC_PR_FGD, cv2.GC_PR_BGD)
    ).astype(np.uint8)
    guess[:edge] = guess[-edge:] = guess[:, :edge] = guess[:, -edge:] = cv2.GC_BGD
    cv2.setRNGSeed(0)
    cv2.grabCut(small, guess, None, np.zeros((1, 65)), np.zeros((1, 65)), 3, cv2.GC_INIT_WITH_MASK)
    return (
        cv2.resize(guess & 1, (width, height), interpolation=cv2.INTER_NEAREST) > 0
    )  # odd: foreground, sure or probable


def _radius(height: int, width: int) -> np.ndarray:
    """Distance of each pixel from the centre, in short sides."""
    y, x = np.ogrid[:height, :width]
    return np.hypot(y - (height - 1) / 2, x - (width - 1) / 2) / min(height, width)


def histograms(hsv: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The row of colours of the pixels (H, W, 3) under a mask (H, W)."""
    h, s, v = cv2.split(hsv)
    chroma, under = cv2.multiply(s, v, scale=1 / 255), mask.astype(np.uint8)
    by_chroma = cv2.calcHist(
        [h, chroma], [0, 1], under, [LEVELS, LEVELS], [0, LEVELS] * 2
    )  # calcHist has no weights
    weights = np.arange(LEVELS, dtype=np.float32) / 255
    marginals = [
        cv2.calcHist([channel], [0], under, [LEVELS], [0, LEVELS]).ravel() for channel in (s, v)
    ]
    joint = cv2.calcHist([hsv], [0, 1, 2], under, JOINT, [0, LEVELS] * 3)
    return np.concatenate(
        [by_chroma @ weights, *marginals, joint.ravel(), [by_chroma.sum(0) @ weights**2]]
    )


def measure(rgb: np.ndarray, mask: str) -> np.ndarray:
    """The row of colours of a picture (H, W, 3) under one of MASKS."""
    hsv = to_hsv(rgb)
    return histograms(hsv, mask_of(hsv, mask))


def load_colours(flowers: Flowers, mask: str) -> np.ndarray:
    """The rows of colours (N, WIDTH) float32 of all images under one of MASKS, kept beside the data.

    Raises UserError naming the file if an image can't be decoded.
    """
    path = cache.array_path(flowers.root, f"hsv-{mask}", flowers.files)
    key = cache.key_of(FORMAT, mask, *flowers.files)
    shape = (len(flowers.files), WIDTH)

    def rows():
        yield from images.decode_all(
            flowers.files, lambda file: measure(images.read_rgb(file), mask)
        )

    return cache.cached_array(path, key, shape, "<f4", rows)


def circular_mean(hue: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean direction in [0, 1) and mean resultant length (0: all around the circle, 1: one hue) of hue histograms (..., LEVELS)."""
    resultant = hue @ np.exp(2j * np.pi * np.arange(LEVELS) / LEVELS)
    return np.angle(resultant) / (2 * np.pi) % 1, abs(resultant) / np.maximum(hue.sum(-1), 1e-12)


def cone(rows: np.ndarray) -> np.ndarray:
    """Mean point in the HSV cone (..., 3): chroma cos(hue), chroma sin(hue), value; all of length at most 1."""
    around = rows[..., HUE] @ np.exp(2j * np.pi * np.arange(LEVELS) / LEVELS)
    pixels = np.maximum(rows[..., VALUE].sum(-1), 1)
    return np.stack(
        [
            around.real / pixels,
            around.imag / pixels,
            rows[..., VALUE] @ np.arange(LEVELS) / 255 / pixels,
        ],
        -1,
    )


def hsv_hist(rows: np.ndarray) -> np.ndarray:
    """Square roots of the joint histogram's shares (..., 256): their Euclidean distance is Hellinger's, times the square root of 2."""
    joint = rows[..., HSV_HIST]
    return np.sqrt(joint / np.maximum(joint.sum(-1, keepdims=True), 1))


def density(row: np.ndarray, channel: slice, grid: np.ndarray) -> np.ndarray:
    """Kernel density of HUE, SATURATION or VALUE at `grid` (G,) in [0, 1], a Gaussian for each level of the histogram.

    The bandwidth is Scott's for the pixels themselves (Scott 1992; effective number where they are weighted), so the curve is that of
    scipy's gaussian_kde on raw pixels; but never below two levels. Hue wraps around; saturation and value are reflected at 0 and 1.
    """
    weights = row[channel] + 1e-9  # a grey class has no hue: an even curve
    n = weights.sum() ** 2 / max(row[-1], 1e-12) if channel == HUE else weights.sum()
    if channel == HUE:
        values = np.arange(LEVELS) / LEVELS
        around = (
            values - circular_mean(weights)[0] + 0.5
        ) % 1 - 0.5  # a cluster across 0 is one cluster
        images = [values - 1, values, values + 1]
    else:
        values = np.arange(LEVELS) / 255
        around = values - np.average(values, weights=weights)
        images = [-values, values, 2 - values]
    deviation = np.sqrt(np.average(around**2, weights=weights))
    bandwidth = max(deviation * max(n, 1) ** -0.2, 2 / LEVELS)
    kernels = sum(np.exp(-0.5 * ((grid[:, None] - image) / bandwidth) ** 2) for image in images)
    return kernels @ weights / (weights.sum() * bandwidth * np.sqrt(2 * np.pi))
