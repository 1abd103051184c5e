"""What a visitor has chosen, and what can be: flowers/gallery/address.py says how it is kept.

`state` is the one place of it: a dict that outlives the runs of web.py. Everything that a widget or
a click changes goes through `change`; web.py alone reads and writes the address.
"""

from collections.abc import Collection

import streamlit as st

from flowers.gallery import address, panels
from flowers.gallery.address import MOST_RUNS
from flowers.page.kept import Dataset

# The options of buttons, the first of each being the default.
VIEWS = ("browse", "runs", "search", "map")
PARTS = ("pictures", "classes", "confusion")  # of the view of runs
# Keys of `outcomes`.
ONLY = tuple(f"only_{number}" for number in range(1, MOST_RUNS + 1))
OF_SEVERAL = ("changed", "mended", "broken", "all_right", "all_wrong", *ONLY)
SHOWS = ("all", "right", "wrong", *OF_SEVERAL, "doubted", "alike")
ORDERS = ("id", "confidence", "doubt")
MATRIX_ORDERS = ("name", "confusions")
GUESSERS = ("first", "any")  # of the runs that are compared, which predicts the chosen class
CELLS = ("counts", "difference")  # of the confusion matrix of two runs
BARS = ("hidden", "shown")  # of the class histogram, and of where a run looks
COLOURINGS = ("class", "split", "outcome")  # of the map

# What options are called, where it is not the option itself.
NAMES_OF_SHOWS = {
    "changed": "they disagree",
    "mended": "wrong → right",
    "broken": "right → wrong",
    "all_right": "all right",
    "all_wrong": "all wrong",
    "doubted": "label in doubt",
    "alike": "near-duplicates",
}
NAMES_OF_ORDERS = {
    "confidence": "most confident",
    "doubt": "least confident",
    "confusions": "confused ones together",
}
NAMES_OF_COLOURINGS = {"outcome": "right and wrong"}

state = st.session_state


def change(**choices) -> None:
    """Change what is shown. The callback of every widget and click ends here."""
    address.change(state, **choices)


def change_filter() -> None:
    """Go back to the first page of the grid, as another list is to be shown."""
    # Neither the page nor the image need be in the list that the new filter gives.
    change(page=1, image=None, _left=None)


def page_address() -> address.Address:
    """Return the address of the page, as the browser shows it."""
    parameters = st.query_params
    lists = {key: parameters.get_all(key) for key in address.LISTS if key in parameters}
    return parameters.to_dict() | lists


def write_address() -> None:
    """Make the page's address say what `state` says."""
    new = address.write(state, page_address())
    if new is not None:
        st.query_params.from_dict(new)


def allowed_choices(data: Dataset) -> dict[str, Collection]:
    """Return what can be chosen, by the name of the choice; not of numbers, texts and runs."""
    return {
        "view": VIEWS,
        "class": data.flowers.class_names,
        "guess": data.flowers.class_names,
        "split": {"all", *data.splits.tolist()},
        "part": PARTS,
        "show": SHOWS,
        "guesser": GUESSERS,
        "bars": BARS,
        "where": BARS,
        "target": data.flowers.class_names,
        "order": ORDERS,
        "sort": MATRIX_ORDERS,
        "cells": CELLS,
        "colour": COLOURINGS,
    }


def is_missing(key: str, names: Collection[str], what: str) -> bool:
    """Return whether a run was chosen that is not among `names`, after saying so.

    what: the runs that `names` lists, in words.
    """
    chosen = state[key] if key in address.LISTS else [state[key]]
    gone = [name for name in chosen if name is not None and name not in names]
    if not gone:
        return False
    name = gone[0]
    st.warning(
        f"There is no run {panels.plain(name)} {what}: it was deleted or renamed, or is misspelt "
        "in the address. Choose another one."
    )
    return True
