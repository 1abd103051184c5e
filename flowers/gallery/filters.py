"""Which images are listed: by the number in a file's name and by split; and lists as CSV."""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from flowers import UserError
from flowers.data import Flowers
from flowers.gallery.predictions import NO_CLASS, Predictions

if TYPE_CHECKING:
    import pandas as pd


def image_ids(flowers: Flowers) -> np.ndarray:
    """Return the number in each file's name, (N,) int: 1 for image_00001.jpg.

    Files that have no such numbers are counted from 1.
    """
    if not flowers.is_numbered:
        return np.arange(1, len(flowers.files) + 1)
    return np.array([int(re.search(r"\d+", file.name)[0]) for file in flowers.files])


def split_names(flowers: Flowers) -> np.ndarray:
    """Return the name of each image's split, (N,) str; empty for an image of no split."""
    names = np.full(len(flowers.files), "", dtype="<U5")  # room for "train"
    for name, index in flowers.splits.items():
        names[index] = name
    return names


def parse_ids(text: str) -> list[tuple[int, int]]:
    """Return the ranges that a visitor wrote: '7, 30-20' is [(7, 7), (20, 30)].

    Raises UserError if the text is anything else.
    """
    ranges = []
    for part in text.split(","):
        part = part.strip()
        if not part:  # nothing between two commas
            continue
        # Nine digits are more than any id has, and can be compared with an array of int64.
        match = re.fullmatch(r"(\d{1,9})(?:\s*-\s*(\d{1,9}))?", part)
        if not match:
            raise UserError(f"file ids are numbers and ranges such as 7, 20-30, not '{part[:40]}'")
        first = int(match[1])
        last = int(match[2] or first)  # a single id is a range of one
        ranges.append((min(first, last), max(first, last)))
    return ranges


def in_ranges(ids: np.ndarray, ranges: list[tuple[int, int]]) -> np.ndarray:
    """Return which ids (N,) lie in one of the ranges, ends included, (N,) bool."""
    inside = np.zeros(len(ids), bool)
    for first, last in ranges:
        inside |= (ids >= first) & (ids <= last)
    return inside


def export(
    flowers: Flowers,
    index: Iterable[int],
    predictions: Sequence[Predictions] = (),
    scores: np.ndarray | None = None,
) -> str:
    """Return the images at `index` as CSV, in that order.

    Columns: id, file, class, split; similarity, if there are `scores` of these images; and for each
    run its prediction and the probability of it, both empty for an image that the run did not
    predict. The name of a probability says whether it is calibrated.
    """
    import pandas as pd  # not needed by the first view

    index = np.array(index, dtype=int)  # also where it is empty, which would be of floats
    table = pd.DataFrame({"id": image_ids(flowers)[index]})
    table["file"] = [flowers.file_names[i] for i in index]
    table["class"] = [flowers.class_names[label] for label in flowers.labels[index]]
    table["split"] = split_names(flowers)[index]
    if scores is not None:
        table["similarity"] = [f"{score:.6f}" for score in scores]
    for run in predictions:
        names = []
        probabilities = []
        for i in index:
            predicted = run.guess[i] != NO_CLASS
            names.append(flowers.class_names[run.guess[i]] if predicted else "")
            # As text, since a column of numbers would have no empty cells and other decimals.
            probabilities.append(f"{run.score[i]:.6f}" if predicted else "")
        table[f"{run.name} prediction"] = names
        kind = "probability" if run.temperature is None else "calibrated probability"
        table[f"{run.name} {kind}"] = probabilities
    return as_csv(table)


def as_csv(table: "pd.DataFrame") -> str:
    """Return a table as CSV, with lines that end in CR LF, as RFC 4180 asks."""
    return table.to_csv(index=False, lineterminator="\r\n")
