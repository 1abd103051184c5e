"""What one or two runs make of each class: the table of classes, and the confusion matrix."""

from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from flowers.data import Flowers
from flowers.gallery import panels
from flowers.gallery.filters import as_csv
from flowers.gallery.predictions import (
    CHANGE,
    CORRECTED,
    IN_PERCENT,
    P_VALUE,
    Predictions,
    class_table,
    confusion_table,
    order_of_confusions,
)
from flowers.page.choices import CELLS, MATRIX_ORDERS, NAMES_OF_ORDERS, change, state
from flowers.page.widgets import choose_one, download, draw, toolbar

if TYPE_CHECKING:
    import pandas as pd

MCNEMAR_OF_TWO = (
    "The exact test of McNemar: how likely so uneven a count of images that only one of the two "
    "has right is, if neither is better. Near-duplicates count one by one."
)
HELP = {
    P_VALUE: f"{MCNEMAR_OF_TWO} Of each class alone, not corrected for their number: of a hundred "
    "classes, up to five are expected below 0.05 by chance.",
    CORRECTED: "The same, corrected for the number of classes (Holm): the chance that one class or "
    "more is below 0.05 is at most 5%, if no class differs.",
    CHANGE[0]: "The accuracy of the second run minus that of the first, in points.",
    **dict.fromkeys(
        CHANGE[1:],
        "An end of the 95% interval of the change, in points (Tango's score interval for pairs, of "
        "each class alone). Near-duplicates count as one image. Of few images it is wide.",
    ),
}


def list_all(true: str, guess: str | None = None, guesser: str = "first") -> None:
    """List all pictures of a class, or those that are given the name `guess`, by `guesser`."""
    choices = {"class": true, "guess": guess, "guesser": guesser}
    # No other filter stays: the list has as many pictures as the cell that was clicked says.
    change(part="pictures", show="all", sure=(0, 100), page=1, **choices)


def show_classes(
    flowers: Flowers, predictions: list[Predictions], index: np.ndarray, clusters: np.ndarray
) -> None:
    """Show the accuracy of each class; a click on a cell or row lists the pictures of its class.

    index: the images that all of them predicted. clusters: of these, (n,) int.
    """
    table = class_table(flowers, index, *predictions, clusters=clusters)

    def class_chosen():
        change()
        # Called, too, when nothing is chosen any longer.
        selection = state.get("table", {}).get("selection", {})
        rows = [*selection.get("rows", []), *(row for row, _ in selection.get("cells", []))]
        if rows:
            name = table["class"][rows[0]]
            list_all(true=name)

    digits = {column: "%.1f" for column in table.columns if column.endswith(IN_PERCENT)}
    digits |= dict.fromkeys(CHANGE, "%+.1f") | dict.fromkeys((P_VALUE, CORRECTED), "%.3f")
    formats = {
        column: st.column_config.NumberColumn(format=digits[column], help=HELP.get(column))
        for column in table.columns
        if column in digits
    }
    st.caption("Accuracy of each class; click on a cell to see the pictures of its class.")
    st.dataframe(
        table,
        hide_index=True,
        key="table",
        on_select=class_chosen,
        selection_mode=["single-row", "single-cell"],
        height=560,
        column_config=formats,
    )
    download("The table as CSV", "classes", lambda: as_csv(table))


def show_confusion(flowers: Flowers, predictions: list[Predictions], index: np.ndarray) -> None:
    """Show a confusion matrix, or the difference of two; a click on a cell lists its pictures."""
    run = predictions[0]

    def open_cell(cell: str) -> None:
        true, guess = (flowers.class_names[int(number)] for number in cell.split(","))
        list_all(true, guess, "any" if is_difference else "first")

    with toolbar():
        choose_one("Order of the classes", MATRIX_ORDERS, "sort", names=NAMES_OF_ORDERS)
        if len(predictions) == 2:
            choose_one("Cells", CELLS, "cells")
    true, guess, other = flowers.labels[index], run.guess[index], None
    first = panels.plain(run.name)
    caption = (
        f"Images of each class (row) by the name that {first} gives them (column). The stronger a "
        "cell is shaded, the larger its part of the row. Click on a cell to see its pictures."
    )
    meanings = ("right", "wrong")
    is_difference = len(predictions) == 2 and state["cells"] == "difference"
    if is_difference:
        other = predictions[1].guess[index]
        second = panels.plain(predictions[1].name)
        caption = (
            f"How many images of each class (row) {second} gives a name (column) more often than "
            f"{first} does. Click on a cell to see those that either gives it."
        )
        meanings = (f"more by {predictions[1].name}", f"fewer by {predictions[1].name}")
    st.caption(caption)
    st.html(panels.legend(*meanings))
    classes = shown_classes(flowers, true, guess, other)
    draw(panels.confusion(flowers.class_names, classes, true, guess, other), "confusion", open_cell)
    download(
        "The matrix as CSV",
        "confusion-difference" if is_difference else "confusion",
        lambda: as_csv(matrix_table(flowers, predictions[: 1 + is_difference], index)),
    )


def matrix_table(
    flowers: Flowers, predictions: list[Predictions], index: np.ndarray
) -> "pd.DataFrame":
    """Return the confusion_table of a run; of two, with the counts of both and the difference."""
    first, *others = (confusion_table(flowers, run, index) for run in predictions)
    if not others:
        return first
    pair = ["class", "prediction"]
    names = [f"images by {run.name}" for run in predictions]
    table = first.merge(others[0], "outer", pair, suffixes=(" 1", " 2")).set_axis(
        pair + names, axis=1
    )
    table[names] = table[names].fillna(0).astype(int)  # a pair that only one run has
    table["difference"] = table[names[1]] - table[names[0]]
    return table


def shown_classes(
    flowers: Flowers, true: np.ndarray, guess: np.ndarray, other: np.ndarray | None
) -> list[int]:
    """Return the classes of a confusion matrix, in the chosen order."""
    named = [true, guess] if other is None else [true, guess, other]
    classes = np.unique(np.concatenate(named))
    if state["sort"] == "confusions":
        return order_of_confusions(true, guess, classes).tolist()
    return sorted(classes.tolist(), key=lambda c: flowers.class_names[c])
