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

SIDE = 32  # of the thumbnails that are compared
WINDOW = 9  # of the mean that is taken off: what remains is outlines, not colours
BLOCK = 512  # images at a time: bounds the memory

# Chosen by looking at the pairs of 5,868 images of Oxford Flowers at 64 px. Of the 23 pairs above
# it, 21 show one photograph or one flower; of the next ten, three do. Mirrored pictures are not
# compared: those that are most alike were all of different flowers.
THRESHOLD = 0.63


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

    Two images belong together if their thumbnails correlate above THRESHOLD, and so do all that
    are joined by such pairs.

    pixels: (all images, 3, R, R) uint8; index: (N,), which of them.
    """
    descriptors = _descriptors(pixels, torch.from_numpy(np.array(index)))  # (N, SIDE * SIDE)
    n = len(descriptors)
    rows, columns = [], []
    for start in range(0, n, BLOCK):
        # Each pair once: a block against itself and what follows it.
        correlation = descriptors[start : start + BLOCK] @ descriptors[start:].t()
        row, column = (correlation > THRESHOLD).nonzero().cpu().numpy().T + start
        rows.append(row)
        columns.append(column)
    rows, columns = np.concatenate(rows), np.concatenate(columns)
    graph = coo_matrix((np.ones(len(rows), bool), (rows, columns)), shape=(n, n))
    return connected_components(graph, directed=False)[1]


def _descriptors(pixels: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Grey thumbnails without their local mean, of mean 0 and length 1: (N, SIDE * SIDE).

    The product of two of them is their correlation; an image of one colour has length 0.
    """
    # Every third pixel of 224 will do, and few images at a time stay in the processor's cache.
    step = max(1, pixels.shape[-1] // (2 * SIDE))
    descriptors = []
    for chunk in index.split(BLOCK // 16):
        images = pixels.index_select(0, chunk.to(pixels.device))  # (b, 3, R, R)
        images = images[..., ::step, ::step].float()
        grey = F.interpolate(images, (SIDE, SIDE), mode="area").mean(1, keepdim=True)
        border = (WINDOW // 2,) * 4
        outlines = grey - F.avg_pool2d(F.pad(grey, border, mode="replicate"), WINDOW, stride=1)
        flat = outlines.flatten(1)
        descriptors.append(F.normalize(flat - flat.mean(1, keepdim=True), dim=1))
    return torch.cat(descriptors)
