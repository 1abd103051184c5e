"""What a visitor has chosen, kept the same on the page and in its address.

Each choice has a name and a default in DEFAULTS. Under this name it is in three places:

- in `state`, a dict that outlives the runs of web.py (Streamlit's session state),
- in the widget that shows and changes it, as the widget's key; Streamlit copies one to the other,
- in the address of the page, unless it is at its default, so that a link opens the same again.

A run of web.py begins with `read` and ends with `write`; between these the views use `state` alone.
After each run the three places agree. Before the next, one of two things has happened:

- A widget was used, or a picture clicked. Its callback, which Streamlit calls before the run, has
  called `change`. The address is then behind, and `state` counts.
- The visitor opened an address, or went back. `change` was not called, and the address is not the
  one written last. It then counts, and is taken over into `state`.

Two more entries of `state` tell these apart: "_acted", set by `change` until `read` has seen it,
and "_address", the address written last. Nothing here knows of Streamlit.
"""

import re
from collections.abc import Collection, MutableMapping
from typing import Any

State = MutableMapping[str, Any]
Address = dict[str, str | list[str]]

FILTERED = ("strategy", "architecture", "pretraining", "split")  # columns of the table of runs
FILTERS = tuple(f"only_{column}" for column in FILTERED)  # the names of these filters

DEFAULTS = {
    "view": "browse",
    "class": None,
    "split": "all",
    "ids": "",
    "bars": "hidden",
    "page": 1,
    "image": None,  # id of the image that is shown alone
    "run": None,  # of the view of runs; None: all, in a table
    "other": [],  # the runs that `run` is compared with
    "ticked": [],  # runs, in the table of all
    "named": "",  # a part of the names of the runs in that table
    **{name: [] for name in FILTERS},  # the values that a column of it may have; none: all
    "sorted": None,  # the column that it is sorted by; None: the newest run first
    "direction": "descending",
    "model": None,  # the run whose model searches
    "part": "pictures",
    "show": "all",
    "guess": None,  # predicted class
    "guesser": "first",  # who predicts it: the first run, or any of those that are compared
    "order": "id",
    "sort": "name",  # of the classes of the confusion matrix
    "cells": "counts",
    "sure": (0, 100),  # the least and the greatest confidence, in percent
    "probabilities": "predicted",  # under one image: as the runs wrote them, or calibrated
    "also": None,  # under one image: a run whose predictions stand beside those of the newest
    "like": "colours",  # what the nearest images are near by: colours, or a run's name
    "q": "",  # the sentence that is searched
    "where": "hidden",  # where a run looks, under one image
    "looker": None,  # the run that looks
    "target": None,  # the class that it looks for; None: the true and the predicted one
    "words": "",  # a sentence that it looks for, too
    "laid": "colours",  # what the map is laid out by: colours, or a run's name
    "colour": "class",  # what its dots are coloured by
    "judged": None,  # the run whose right and wrong colour the map
    "box": "",  # what is selected on the map: left, right, bottom, top
}
NUMBERS = ("page", "image")
TEXTS = ("ids", "named", "q", "words", "box")
RUNS = ("run", "model", "also", "like", "looker", "laid", "judged")
MAX_TEXT = 300  # characters
MOST_RUNS = 6  # that are compared
# Each of their values is a parameter of the address; no more are read than this.
LISTS = {"other": MOST_RUNS - 1, "ticked": 50, **dict.fromkeys(FILTERS, 50)}


def change(state: State, **choices) -> None:
    """Change what is shown. The callback of every widget and click ends here."""
    state.update(choices)
    state["_acted"] = True


def read(state: State, address: Address, allowed: dict[str, Collection]) -> None:
    """Fill `state`, from the address of the page where that is newer.

    What an address says is checked: a choice that is not among the `allowed` ones of its name, or
    not a number where one is due, becomes the default. The name of a run is kept, whether there is
    such a run or not: under an old link, another run's numbers would be taken for its own.
    """
    address = _current_names(address)
    acted = state.pop("_acted", False)
    opened = "_address" not in state
    went_back = not acted and address != state.get("_address")
    source = address if opened or went_back else state
    for key, default in DEFAULTS.items():
        # Streamlit forgets the value of a widget that is not on the page, unless it is set anew.
        state[key] = _checked(key, source.get(key, default), allowed)


def address_of(state: State, **choices) -> Address:
    """Return the address of what `state` says, but for these choices."""
    address = {}
    for key, default in DEFAULTS.items():
        value = choices.get(key, state.get(key, default))
        if value is None or value == default:
            continue
        if key in LISTS:
            address[key] = [str(one) for one in value]
        elif key == "sure":
            address[key] = "{}-{}".format(*value)
        else:
            address[key] = str(value)
    return address


def write(state: State, address: Address) -> Address | None:
    """Return the address that the page must be given; None where `address`, its own, is right.

    Each time it is set, the browser remembers a page to go back to: only when it is another one.
    """
    wanted = address_of(state)
    is_right = wanted == address == state.get("_address")
    state["_address"] = wanted
    return None if is_right else wanted


def _current_names(address: Address) -> Address:
    """Return an address with the names of today: older links call the model of a search `run`."""
    address = dict(address)
    if address.get("view") == "search" and "run" in address and "model" not in address:
        address["model"] = address.pop("run")
    return address


def _checked(key: str, value: Any, allowed: dict[str, Collection]) -> Any:
    """Return the value of a choice, or its default if the value is not possible."""
    if key in allowed:
        return value if value in allowed[key] else DEFAULTS[key]
    if key in NUMBERS and isinstance(value, str):
        return int(value) if re.fullmatch("[0-9]{1,9}", value) else DEFAULTS[key]
    if key in TEXTS and isinstance(value, str):
        return value[:MAX_TEXT]
    if key in RUNS:  # not cut, or it could be another run's name
        return str(value) if value else DEFAULTS[key]
    if key in LISTS:
        # Once each.
        return list(dict.fromkeys(map(str, value)))[: LISTS[key]]
    if key == "sure" and isinstance(value, str):
        ends = re.fullmatch("([0-9]{1,3})-([0-9]{1,3})", value)
        least, most = sorted(min(int(end), 100) for end in ends.groups()) if ends else (0, 100)
        return least, most
    return value
