"""Near-duplicates among the evaluated images: one photograph twice, or shots seconds apart.

A model that is right about one of them is nearly always right about the other, so they are not
independent trials. Intervals count a group of them as one draw (flowers/study/statistics.py).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from flowers.files import write_json

EXAMINED = 64  # px: all images are reduced to it first, as `pixels` reads them at that resolution
SIDE = 32  # of the thumbnails whose outlines are compared
WINDOW = 9  # of the mean that is taken off: what remains is outlines, not colours
COLOUR_SIDE = 8  # of the thumbnails whose colours are compared
BLOCK = 512  # images at a time: bounds the memory

# Least correlations, of outlines, of colours and of hues (see `_descriptors`), chosen by looking at
# the pairs of 5,868 images of Oxford Flowers at 64 px. Of the 23 pairs with such outlines, 21 show
# one photograph or one flower. Their colours correlate by 0.93 or more and their hues by 0.89,
# while the hues of the two others, which are of different flowers, do by 0.69 at most. Mirrored
# pictures are not compared: those that are most alike were all of different flowers.
OUTLINES = 0.63
COLOURS = 0.93
HUES = 0.85


def write_duplicates(
    folder: Path, pixels: torch.Tensor, index: np.ndarray, file_names: Sequence[str]
) -> None:
    """Leave the groups of near-duplicates among the evaluated images in duplicates.json.

    pixels: (all images, 3, R, R) uint8; index: (N,), those that were evaluated; file_names: of all.
    """
    clusters = near_duplicates(pixels, index)
    groups: dict[int, list[str]] = {}
    for i, cluster in zip(index, clusters.tolist()):
        groups.setdefault(cluster, []).append(file_names[i])
    several = sorted(sorted(names) for names in groups.values() if len(names) > 1)
    write_json(folder / "duplicates.json", {"groups": several})


def near_duplicates(pixels: torch.Tensor, index: np.ndarray) -> np.ndarray:
    """The group of each image (N,) int; images without a near-duplicate have one of their own.

    Two images belong together if their outlines, colours and hues correlate above OUTLINES, COLOURS
    and HUES, and so do all that are joined by such pairs.

    pixels: (all images, 3, R, R) uint8; index: (N,), which of them.
    """
    described = _descriptors(pixels, torch.from_numpy(np.array(index)))
    n = len(index)
    rows, columns = [], []
    for start in range(0, n, BLOCK):
        # Each pair once: a block against itself and what follows it.
        alike = torch.ones((), dtype=torch.bool, device=pixels.device)
        for vectors, least in zip(described, (OUTLINES, COLOURS, HUES)):
            alike = alike & (vectors[start : start + BLOCK] @ vectors[start:].t() > least)
        row, column = alike.nonzero().cpu().numpy().T + start
        rows.append(row)
        columns.append(column)
    rows, columns = np.concatenate(rows), np.concatenate(columns)
    graph = coo_matrix((np.ones(len(rows), bool), (rows, columns)), shape=(n, n))
    return connected_components(graph, directed=False)[1]


def _descriptors(pixels: torch.Tensor, index: torch.Tensor) -> list[torch.Tensor]:
    """Outlines, colours and hues of each image, as vectors of length 1: 3 x (N, D).

    The product of two vectors is their correlation; that of outlines of an image of one colour is 0
    with all others. All start from EXAMINED pixels, so the model's resolution hardly matters.

    outlines: grey thumbnails without their local mean, D = SIDE * SIDE.
    colours: small thumbnails, each channel without its mean: blind to brightness and contrast.
    hues: small thumbnails without their grey, and one number more of one grey level a pixel: by
        that alone pictures without any colour have the same hue.
    """
    outlines, colours, hues = [], [], []
    for chunk in index.split(BLOCK // 16):  # few at a time stay in the processor's cache
        images = pixels.index_select(0, chunk.to(pixels.device)).float()  # (b, 3, R, R)
        images = F.interpolate(images, (EXAMINED, EXAMINED), mode="bicubic", antialias=True)
        grey = F.interpolate(images, (SIDE, SIDE), mode="area").mean(1, keepdim=True)
        border = (WINDOW // 2,) * 4
        local = F.avg_pool2d(F.pad(grey, border, mode="replicate"), WINDOW, stride=1)
        outline = (grey - local).flatten(1)
        outlines.append(outline - outline.mean(1, keepdim=True))

        small = F.interpolate(images, (COLOUR_SIDE, COLOUR_SIDE), mode="area")  # (b, 3, 8, 8)
        colours.append((small - small.mean((2, 3), keepdim=True)).flatten(1))
        hue = (small - small.mean(1, keepdim=True)).flatten(1)
        hues.append(F.pad(hue, (0, 1), value=hue.shape[1] ** 0.5))
    return [F.normalize(torch.cat(vectors), dim=1) for vectors in (outlines, colours, hues)]
