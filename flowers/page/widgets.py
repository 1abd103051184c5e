"""Pieces that the views of the page share: buttons, lists, grids of pictures, downloads."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import streamlit as st

from flowers.data import Flowers
from flowers.gallery import address, panels
from flowers.gallery.filters import export
from flowers.gallery.predictions import Predictions
from flowers.gallery.thumbnails import Thumbnails
from flowers.page.choices import change, change_filter, state
from flowers.page.kept import Dataset
from flowers.runs import command_line

PER_PAGE = 48  # pictures of a grid
ALL_CLASSES = "all classes"  # where no class is chosen
SIMILARITY = "Similarity: 1 is the same. By colours, 0 is none in common; by a model, unrelated."


@st.cache_resource(show_spinner=False)
def element():
    """Return the component that shows HTML of panels.py."""
    return st.components.v2.component("flowers", **panels.ELEMENT)


def draw(html: str, key: str, on_open: Callable[[str], None] | None = None) -> None:
    """Show HTML of panels.py. on_open: called with the data-open of what is clicked."""

    def clicked():
        change()
        # The value is missing when a second click hit what is no longer shown.
        value = state.get(key, {}).get("open")
        if value:
            on_open(value)

    element()(key=key, data=html.encode(), on_open_change=clicked)


def no_lines(i: int) -> list[str]:
    return []


@dataclass(frozen=True)
class Listing:
    """The images that a view lists.

    Attributes:
        index: their indices, in the order in which they are shown.
        lines: what stands under each, from its index.
        predictions: of the runs that the view is about.
        scores: how similar each is to what is searched, in the order of `index`.
    """

    index: np.ndarray
    lines: Callable[[int], list[str]] = no_lines
    predictions: Sequence[Predictions] = ()
    scores: np.ndarray | None = None


def picture_grid(
    data: Dataset, index: np.ndarray, key: str, lines: Callable[[int], list[str]] = no_lines
) -> None:
    """Show the thumbnails of the images at `index`; a click opens the image.

    lines: what stands under the id and class of an image, from its index.
    """
    flowers = data.flowers
    jpegs = data.thumbnails.jpegs(index)
    left = state.get("_left")  # the image that was shown alone before
    # Once for all pictures: Streamlit takes long to look into its state.
    chosen = {key: state[key] for key in address.DEFAULTS}
    items = []
    for i, jpeg in zip(index, jpegs):
        title = f"{data.ids[i]} {flowers.class_names[flowers.labels[i]]}"
        link = "?" + urlencode(address.address_of(chosen, image=data.ids[i]), doseq=True)
        items.append((data.ids[i], link, jpeg, [title, *lines(i)]))
    draw(panels.pictures(items, left), key, lambda image_id: change(image=int(image_id)))


def choose_one(
    label: str,
    options: Sequence[str],
    key: str,
    on_change: Callable[[], None] = change_filter,
    names: dict[str, str] | None = None,
) -> None:
    """Show buttons for a few options, one of which is always chosen; names: what they are called,
    where that is not the option itself.
    """
    if state[key] not in options:
        options = [state[key], *options]  # a run that is gone: `is_missing` says so
    names = names or {}
    st.segmented_control(
        label,
        options,
        key=key,
        format_func=lambda option: names.get(option, option),
        on_change=on_change,
        required=True,
        wrap=True,
    )


def choose_from_list(
    label: str,
    options: Sequence[str],
    key: str,
    placeholder: str = "",
    reasons: dict[str, str] | None = None,
    on_change: Callable[[], None] = change_filter,
) -> None:
    """Show a list of many options, searched by typing, of which one is chosen.

    placeholder: what stands there where none is chosen; without it, none can't be. reasons: why an
    option stands apart from the others, shown behind it.
    """
    if state[key] is not None and state[key] not in options:
        options = [state[key], *options]  # a run that is gone: `is_missing` says so
    st.selectbox(
        label,
        options,
        index=None if placeholder else 0,  # None: what is chosen can be taken back
        key=key,
        format_func=partial(with_reason, reasons=reasons or {}),
        placeholder=placeholder,
        on_change=on_change,
        width=220,
    )


def with_reason(option: str, reasons: dict[str, str]) -> str:
    """Return an option of a list, with the reason why it stands apart, if there is one."""
    return f"{option} ({reasons[option]})" if reasons.get(option) else option


def step_button(label: str, key: str, shortcut: str | None, enabled: bool, **choices) -> None:
    """Show a button, also pressed by a key of the keyboard, that makes these choices."""
    st.button(
        label, on_click=change, kwargs=choices, disabled=not enabled, shortcut=shortcut, key=key
    )


def filters():
    """Return a container for the filters of a view; on a telephone they are folded away."""
    return st.expander("Filters") if on_telephone() else st.container(horizontal=True)


def on_telephone() -> bool:
    return "Mobile" in (st.context.headers.get("User-Agent") or "")


def toolbar():
    """Return a container whose widgets stand side by side on one line."""
    return st.container(horizontal=True, vertical_alignment="center")


def pager(index: np.ndarray) -> np.ndarray:
    """Show the buttons that turn pages; return the part of `index` that is on this page."""
    n_pages = max(1, -(-len(index) // PER_PAGE))  # rounded up
    # The address may name any page, and a filter may have left fewer than before.
    page = min(max(state["page"], 1), n_pages)
    state["page"] = page
    first = (page - 1) * PER_PAGE
    on_page = index[first : first + PER_PAGE]
    summary = "no image"
    if len(index):
        summary = f"{first + 1:,} to {first + len(on_page):,} of {len(index):,} images"
    with toolbar():
        turn_buttons(page, n_pages, "", ("Left", "Right"))
        st.number_input(
            "Page",
            1,
            n_pages,
            key="page",
            on_change=change,
            label_visibility="collapsed",
            width=130,
        )
        st.markdown(summary, width="content")
    return on_page


def turn_buttons(
    page: int, n_pages: int, where: str, shortcuts: Sequence[str | None] = (None, None)
) -> None:
    """Show the two buttons that turn pages. where: tells their keys from those of another pair."""
    back, on = shortcuts
    step_button("Previous", f"previous_page{where}", back, page > 1, page=page - 1, _left=None)
    step_button("Next", f"next_page{where}", on, page < n_pages, page=page + 1, _left=None)


@st.fragment(run_every=1)
def wait_for_colours(thumbnails: Thumbnails) -> None:
    """Say that the colours are being computed, and run the page again when they are ready."""
    if thumbnails.features is not None:
        st.rerun()  # of the whole page; this function alone runs once a second
    st.info(
        panels.message(thumbnails.problem)
        or "The colours of all images are being computed; this takes a few seconds, once."
    )


def score_lines(index: np.ndarray, scores: np.ndarray) -> Callable[[int], list[str]]:
    """Return a function that gives the similarity of an image, at most 1, from its index."""
    score_of = dict(zip(index.tolist(), scores.tolist()))
    return lambda i: [f"similarity {score_of[int(i)]:.3f}"]


def show_listing(data: Dataset, listing: Listing) -> None:
    """Show one page of a list as a grid, and a button to download all of it."""
    on_page = pager(listing.index)
    picture_grid(data, on_page, "pictures", listing.lines)
    if len(on_page) < len(listing.index):
        with toolbar():
            turn_buttons(state["page"], -(-len(listing.index) // PER_PAGE), "_below")
    download(
        "This list as CSV",
        state["show"] if state["view"] == "runs" else "",
        lambda: export(data.flowers, listing.index, listing.predictions, listing.scores),
        empty=not len(listing.index),
    )


def download(label: str, what: str, make: Callable[[], str], empty: bool = False) -> None:
    """Show a button to download a CSV file, named after the view, its runs and `what` it holds."""
    names = {
        "runs": [state["run"], *state["other"]],
        "search": [state["model"]],
        "map": [state["laid"]],
    }
    parts = ["flowers", state["view"], *names.get(state["view"], []), what]
    name = re.sub(r"[^\w.-]+", "-", "-".join(filter(None, parts)))
    st.download_button(
        label, make, f"{name}.csv", "text/csv", on_click="ignore", disabled=empty, key="download"
    )


def training_command(flowers: Flowers, runs: Path) -> str:
    flags = {"data_root": str(flowers.root), "architecture": "tiny", "runs": str(runs)}
    return command_line("train.py", flags)
