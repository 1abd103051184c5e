"""The view Browse: filters, and a histogram of the classes."""

import numpy as np
import streamlit as st

from flowers import UserError
from flowers.data import Flowers
from flowers.gallery import panels
from flowers.gallery.filters import in_ranges, parse_ids
from flowers.page.choices import BARS, change, change_filter, state
from flowers.page.kept import Dataset
from flowers.page.widgets import Listing, choose_from_list, choose_one, draw, filters


def browse(data: Dataset) -> Listing:
    """Show the filters and the class histogram; return the images that pass the filters."""
    flowers = data.flowers
    show_filters = state["image"] is None  # one image is shown without them
    if show_filters:
        splits = [name for name, index in flowers.splits.items() if len(index)]
        with filters():
            choose_from_list("Class", sorted(flowers.class_names), "class")
            choose_one("Split", ["all", *splits], "split")
            st.text_input(
                "File ids", key="ids", placeholder="7, 20-30", on_change=change_filter, width=160
            )
            choose_one("Class histogram", BARS, "bars")

    passes = np.ones(len(data.ids), bool)
    if state["split"] != "all":
        passes &= data.splits == state["split"]
    if state["ids"].strip():
        try:
            passes &= in_ranges(data.ids, parse_ids(state["ids"]))
        except UserError as error:
            st.warning(panels.message(str(error).capitalize() + "."))

    # The histogram comes before the filter by class, since it is one way to choose the class.
    if show_filters and state["bars"] == "shown":
        show_histogram(flowers, np.flatnonzero(passes))
    if state["class"]:
        passes &= flowers.labels == flowers.class_names.index(state["class"])
    return Listing(np.flatnonzero(passes))


def show_histogram(flowers: Flowers, index: np.ndarray) -> None:
    """Show the classes of the images at `index`; a click on one chooses it, or all again."""

    def choose_class(number: str) -> None:
        name = flowers.class_names[int(number)]
        already_chosen = name == state["class"]
        change(page=1, **{"class": None if already_chosen else name})

    draw(panels.class_histogram(flowers, index, state["class"]), "histogram", choose_class)
