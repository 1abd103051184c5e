"""Browse the dataset and what a model makes of it.

    streamlit run web.py                                           # data/flowers-102, or the sample
    streamlit run web.py -- --data_root PATH --runs runs           # another dataset, other runs

Four views: Browse (filters, a grid, one image), Runs (a table of all runs, and the predictions of
one or several), Search (by a sentence, or by a picture of your own) and Map (all images, those that
look alike close together). The address of the
page always opens the same view again. Nothing is written but thumbnails, features and
maps, to the dataset's `.cache/`.
"""

# Streamlit runs this file from top to bottom for every visitor, after each of their clicks. To read
# it, start at the end with `show_page`. The HTML comes from flowers/gallery/panels.py.

import argparse
import hashlib
import importlib
import random
import re
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import numpy as np
import streamlit as st
import streamlit.config
from starlette.formparsers import MultiPartParser

from flowers import UserError, command
from flowers.data import Flowers, add_data_arguments, open_flowers
from flowers.download import data_folder, default_root, is_complete
from flowers.files import read_lines, user_path
from flowers.gallery import address, atlas, panels
from flowers.gallery.address import MAX_TEXT, MOST_RUNS
from flowers.gallery.filters import as_csv, export, image_ids, in_ranges, parse_ids, split_names
from flowers.gallery.overview import METRICS, run_table
from flowers.gallery.predictions import (
    IN_PERCENT,
    P_VALUE,
    Predictions,
    class_table,
    confusion_table,
    likely_label_errors,
    order_of_confusions,
    outcomes,
    read_predictions,
    run_arguments,
    run_names,
    why_apart,
)
from flowers.gallery.search import Searcher, nearest, own_prompts
from flowers.gallery.thumbnails import MAX_UPLOAD_BYTES, Thumbnails, open_picture
from flowers.images import read_rgb
from flowers.intervals import holm
from flowers.layouts import read_captions
from flowers.runs import command_line
from flowers.splits import MissingImages

if TYPE_CHECKING:
    import pandas as pd

PER_PAGE = 48  # pictures of a grid
NEIGHBOURS = 12  # nearest images, under one image
SIMILARITY = "Similarity: 1 is the same. By colours, 0 is none in common; by a model, unrelated."
POLL = 0.2  # seconds between two looks at what is computed in the background
NEWEST = 3  # runs whose predictions are shown under an image, and how many are looked at for them
NEWEST_LOOKED_AT = 8
MAP_WIDTH = 1100  # pixels, at most
BEST = 5  # names in the ranking of a visitor's picture
START = "streamlit run web.py -- [--data_root PATH] [--runs PATH]"

# The options of buttons, the first of each being the default.
VIEWS = ("browse", "runs", "search", "map")
PARTS = ("pictures", "classes", "confusion")  # of the view of runs
# Keys of `outcomes`, and what they are called where it is not the key.
ONLY = tuple(f"only_{number}" for number in range(1, MOST_RUNS + 1))
OF_SEVERAL = ("changed", "mended", "broken", "all_right", "all_wrong", *ONLY)
SHOWS = ("all", "right", "wrong", *OF_SEVERAL, "doubted", "alike")
NAMES_OF_SHOWS = {
    "changed": "they disagree",
    "mended": "wrong → right",
    "broken": "right → wrong",
    "all_right": "all right",
    "all_wrong": "all wrong",
    "doubted": "label in doubt",
    "alike": "near-duplicates",
}
ORDERS = ("id", "confidence", "doubt")
EXPLAINED = {
    "doubted": "Another class is likelier than is usual for images of that class, by the mean of "
    "these runs (confident learning, Northcutt et al. 2021). The likeliest errors come first; most "
    "are mistakes of the runs, and some are of the label.",
    "alike": "One photograph twice, or photographs that hardly differ, group by group: intervals "
    "count a group as one image.",
}
MATRIX_ORDERS = ("name", "confusions")
NAMES_OF_ORDERS = {
    "confidence": "most confident",
    "doubt": "least confident",
    "confusions": "confused ones together",
}
GUESSERS = ("first", "any")  # of the runs that are compared, which predicts the chosen class
CELLS = ("counts", "difference")  # of the confusion matrix of two runs
BARS = ("hidden", "shown")  # of the class histogram, and of where a run looks
COLOURINGS = ("class", "split", "outcome")  # of the map
NAMES_OF_COLOURINGS = {"outcome": "right and wrong"}

# Columns of the table of runs that are filtered by.
FILTERED = ("strategy", "architecture", "pretraining", "split")
# Keys of metrics.jsonl that are drawn, and what they are called.
CURVES = {"train/loss": "training loss", "val/top1": "top-1 on val (%)"}
MCNEMAR_OF_TWO = (
    "The exact test of McNemar: how likely so uneven a count of images that only one of the two "
    "has right is, if neither is better."
)
MCNEMAR = f"{MCNEMAR_OF_TWO} Of several runs, corrected for their number (Holm)."
MCNEMAR_OF_CLASS = (
    f"{MCNEMAR_OF_TWO} Of each class alone, not corrected for their number: of a hundred classes, "
    "up to five are expected below 0.05 by chance."
)

# A visitor's picture stays in memory: from 1 MB on it would go to a temporary file.
MultiPartParser.spool_max_size = MAX_UPLOAD_BYTES + 1

# Streamlit sends a large message once, and then only its hash: also where the message was dropped
# because a click interrupted it, and the browser then stops with "Cached ForwardMsg MISS". Here and
# not in .streamlit/config.toml alone: the page may be started with settings of another place.
NEVER_CACHED = 1 << 40  # bytes, above any message
streamlit.config.set_option("global.minCachedMessageSize", NEVER_CACHED)

# -----------------------------------------------------------------------------
# what a visitor has chosen: flowers/gallery/address.py says how it is kept

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


# -----------------------------------------------------------------------------
# what stays in memory from one run of this file to the next, for all visitors


@dataclass(frozen=True)
class Dataset:
    """A dataset that is open.

    Attributes:
        flowers: its index.
        ids: the number in each file's name, (N,) int.
        splits: the name of each image's split, (N,) str.
        thumbnails: a JPEG of each image, and colour features.
        problem: what is missing of it, empty for nothing.
        stamp: tells it from another dataset, and from itself after a change of its files.
    """

    flowers: Flowers
    ids: np.ndarray
    splits: np.ndarray
    thumbnails: Thumbnails
    problem: str
    stamp: tuple


def stamp_of(*paths: Path) -> tuple:
    """Return something that changes when one of the files does."""
    times = []
    for path in paths:
        # A missing file has a time, too, as it may come.
        times.append((str(path), path.stat().st_mtime_ns if path.exists() else 0))
    return tuple(times)


def stamp_of_run(run: Path) -> tuple:
    """Return something that changes when one of the files does that a run's model is made from."""
    names = ("model.pt", "classifier.pt", "args.json", "calibration.json")
    files = [run / name for name in names]
    _, prompts_file = own_prompts(run)
    if prompts_file:
        files.append(Path(prompts_file))
    return stamp_of(*files)


@st.cache_resource(
    show_spinner="opening the dataset; the sample is drawn the first time, which takes 20 s",
    max_entries=2,
)
def open_dataset(arguments: tuple, stamp: tuple) -> Dataset:
    """Open the dataset; once, until `stamp` changes. arguments: pairs, of open_flowers."""
    problem = ""
    try:
        flowers = open_flowers(**dict(arguments), needs_split=False)
    except MissingImages as error:
        # A result must not be about fewer images than it says. To look at the others is no harm.
        problem = str(error)
        flowers = open_flowers(**dict(arguments), needs_split=False, needs_images=False)
    return Dataset(
        flowers,
        image_ids(flowers),
        split_names(flowers),
        Thumbnails(flowers),
        problem,
        (arguments, stamp),
    )


@st.cache_resource(show_spinner=False, max_entries=32)
def made_once(_make: Callable[[Path], Any], path: Path, stamp: tuple) -> Any:
    """Return _make(path); once, until `stamp` changes.

    Streamlit does not compare arguments with an underscore: one path must have one `_make`.
    """
    return _make(path)


@st.cache_resource(show_spinner=False)
def known_reasons() -> dict[tuple, str]:
    """Return the reasons that are known; a look-up in Streamlit's own cache takes 1 ms a run."""
    return {}


def reasons_apart(data: Dataset, runs: Path, names: Sequence[str]) -> dict[str, str]:
    """Return each run with the reason why it is listed apart, empty for none.

    Those without a reason come first; for the rest the order is kept.
    """
    known = known_reasons()
    reasons = {}
    for name in names:
        path = runs / name / "predictions.csv"
        key = (data.stamp, stamp_of(path))
        if key not in known:
            known[key] = why_apart(path.parent, data.flowers)
        reasons[name] = known[key]
    return dict(sorted(reasons.items(), key=lambda item: bool(item[1])))


def load_captions(data: Dataset, path: Path) -> list[list[str]]:
    def read(path: Path) -> list[list[str]]:
        return read_captions(path, data.flowers.files)

    return made_once(read, path, data.stamp + stamp_of(path))


def load_predictions(data: Dataset, runs: Path, name: str) -> Predictions:
    def read(path: Path) -> Predictions:
        return read_predictions(path.parent, data.flowers, name)

    path = runs / name / "predictions.csv"
    return made_once(read, path, data.stamp + stamp_of(path))


@st.cache_resource(show_spinner=False, max_entries=8)
def start_searcher(_flowers: Flowers, path: Path, stamp: tuple) -> Future:
    """Start to make the Searcher of the run whose model.pt is at `path`; once, until it changes.

    In the background: to load torch takes seconds, and the features of all images perhaps minutes.
    """
    return in_background(lambda: Searcher(_flowers, path.parent))


def in_background(make: Callable[[], Any]) -> Future:
    """Start make() in a thread that ends with the server; return its result, which comes later."""
    future = Future()

    def run() -> None:
        try:
            future.set_result(make())
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def searcher_of(data: Dataset, run: Path) -> tuple[Flowers, Path, tuple]:
    """Return the arguments of start_searcher for a run."""
    return data.flowers, run / "model.pt", data.stamp + stamp_of_run(run)


def load_searcher(data: Dataset, run: Path) -> Searcher:
    """Return the Searcher of a run; until it is made, a bar shows how far that is."""
    arguments = searcher_of(data, run)
    return result_of(start_searcher, arguments, "Loading the model")


def result_of(start: Callable[..., Future], arguments: tuple, what: str) -> Any:
    """Return the result of what `start` has started; until it is there, a bar shows how far it is.

    what: what is being done, in words.
    """
    future = start(*arguments)
    place = st.empty()
    # A click ends this loop, as it calls Streamlit; the work goes on.
    while not future.done():
        title, fraction = progress(what)
        place.progress(fraction, f"{title}; this is done once.")
        wait([future], timeout=POLL)
    place.empty()
    if future.exception():
        start.clear(*arguments)  # tried again the next time: a disk may have room then
    return future.result()


def progress(what: str) -> tuple[str, float]:
    """Return what is being computed, and the part of it that is done, 0 to 1."""
    from tqdm import tqdm

    # The bars that the package writes to the terminal; a set that other threads change.
    for bar in list(getattr(tqdm, "_instances", ())):
        if bar.total:
            counts = f"{bar.n:,} of {bar.total:,}"
            return f"{bar.desc.strip(': ').capitalize()}: {counts}", min(bar.n / bar.total, 1.0)
    return what, 0.0


@st.cache_resource(show_spinner=False, max_entries=8)
def start_map(_flowers: Flowers, _features: np.ndarray, name: str, stamp: tuple) -> Future:
    """Start to lay out all images by their features; once for each name, until it changes."""
    return in_background(lambda: atlas.image_map(_flowers, _features))


@st.cache_resource(show_spinner=False, max_entries=2)
def start_hover_pictures(_thumbnails: Thumbnails, stamp: tuple) -> Future:
    """Start to make the pictures that the map shows under the mouse; once, until they change."""
    return in_background(lambda: atlas.hover_pictures(_thumbnails))


# -----------------------------------------------------------------------------
# pieces of the page


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


def picture_grid(
    data: Dataset, index: np.ndarray, key: str, lines: Callable[[int], list[str]] = no_lines
) -> None:
    """Show the thumbnails of the images at `index`; a click opens the image.

    lines: what stands under the id and class of an image, from its index.
    """
    flowers = data.flowers
    jpegs = data.thumbnails.jpegs(index)
    left = state.get("_left")  # the image that was shown alone before
    items = []
    for i, jpeg in zip(index, jpegs):
        title = f"{data.ids[i]} {flowers.class_names[flowers.labels[i]]}"
        link = "?" + urlencode(address.address_of(state, image=data.ids[i]), doseq=True)
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
    placeholder: str = "all classes",
    reasons: dict[str, str] | None = None,
    on_change: Callable[[], None] = change_filter,
) -> None:
    """Show a list of many options, searched by typing, of which one or none is chosen.

    reasons: why an option stands apart from the others, shown behind it.
    """
    if state[key] is not None and state[key] not in options:
        options = [state[key], *options]  # a run that is gone: `is_missing` says so
    st.selectbox(
        label,
        options,
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
    if "Mobile" in (st.context.headers.get("User-Agent") or ""):
        return st.expander("Filters")
    return st.container(horizontal=True)


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


# -----------------------------------------------------------------------------
# the views: browse, runs, search


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


def training_command(flowers: Flowers, runs: Path) -> str:
    flags = {"data_root": str(flowers.root), "architecture": "tiny", "runs": str(runs)}
    return command_line("train.py", flags)


def compare_runs(data: Dataset, runs: Path, names: list[str]) -> Listing | None:
    """Show all runs, or what some predicted; return the images of the chosen outcome, if any.

    names: the runs that have predictions.
    """
    flowers = data.flowers
    everything = run_names(runs, "args.json") if state["run"] is None else []
    if everything:
        show_runs(runs, everything, names)
        return None
    if not names:
        remedy = training_command(flowers, runs)
        st.info(panels.message(f"No run in {runs} has predictions yet. Make one: {remedy}"))
        return None
    reasons = reasons_apart(data, runs, names)
    names = list(reasons)
    if state["run"] is None:
        state["run"] = names[0]  # the newest of this dataset and split, if there is one
    choose_runs(names, reasons)

    predicted = f"with predictions in {panels.plain(str(runs))}"
    missing = [key for key in ("run", "other") if is_missing(key, names, predicted)]
    if missing:
        return None
    chosen = [state["run"], *state["other"]]
    predictions = [load_predictions(data, runs, name) for name in chosen]
    images_of = outcomes(flowers.labels, *predictions)  # indices by outcome
    if not len(images_of["all"]):
        raise UserError(
            f"{' and '.join(chosen)} predicted different images: choose runs of one split"
        )
    clusters = clusters_of(runs, chosen, flowers, images_of["all"])
    show_accuracies(flowers, predictions, images_of["all"], clusters)
    if state["part"] == "classes":
        return show_classes(flowers, predictions, images_of["all"])
    if state["part"] == "confusion":
        return show_confusion(flowers, predictions, images_of["all"])
    images_of["doubted"] = images_of["all"][:0]
    if state["show"] == "doubted":  # else it is not looked at
        n_classes = len(flowers.class_names)
        images_of["doubted"] = likely_label_errors(flowers.labels, n_classes, *predictions)
    alike = near_duplicates(images_of["all"], clusters)
    if len(alike):
        images_of["alike"] = alike
    return list_outcomes(flowers, predictions, images_of)


def clusters_of(
    runs: Path, names: Sequence[str], flowers: Flowers, index: np.ndarray
) -> np.ndarray:
    """Return the cluster of each image at `index`, (n,) int from 0: near-duplicates share one.

    Near-duplicates by the list of any of these runs: whichever is first, the same.
    """
    from flowers.study.comparable import joined_clusters, read_clusters

    files = [flowers.file_names[i] for i in index]
    clusterings = []
    for name in names:
        try:
            clusterings.append(read_clusters(runs / name, files))
        except (OSError, ValueError) as error:
            problem = f"The intervals take no account of the list of {name}: {error}."
            st.warning(panels.message(problem))
    return joined_clusters(clusterings) if clusterings else np.arange(len(index))


def near_duplicates(index: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Return the images at `index` that share their cluster with another, cluster by cluster."""
    of_several = np.bincount(clusters)[clusters] > 1
    order = np.argsort(clusters[of_several], kind="stable")
    return index[of_several][order]


def choose_runs(names: list[str], reasons: dict[str, str]) -> None:
    """Show the lists that a run and those that it is compared with are chosen from, and the part.

    names: the runs that have predictions. reasons: why some of them are listed apart.
    """
    state["other"] = [name for name in state["other"] if name != state["run"]]
    others = [name for name in names if name != state["run"]]
    gone = [name for name in state["other"] if name not in others]  # `is_missing` says so
    with st.container(horizontal=True, vertical_alignment="bottom"):
        all_runs = {"run": None, "other": [], "image": None, "page": 1}
        st.button("All runs", on_click=change, kwargs=all_runs, key="all_runs")
        choose_from_list("Run", names, "run", reasons=reasons)
        st.multiselect(
            "Compare with",
            [*others, *gone],
            key="other",
            format_func=partial(with_reason, reasons=reasons),
            placeholder="no other run",
            max_selections=MOST_RUNS - 1,
            on_change=change_filter,
            width=360,
        )
        if len(state["other"]) == 1:
            swapped = {"run": state["other"][0], "other": [state["run"]], "page": 1}
            st.button("Swap the two runs", on_click=change, kwargs=swapped, key="swap")
        choose_one("Part", PARTS, "part")


@st.cache_resource(show_spinner=False)
def start_statistics() -> Future:
    """Start to load what a comparison of runs needs, which takes a second; once."""
    return in_background(lambda: importlib.import_module("flowers.study.statistics"))


def show_runs(runs: Path, names: list[str], predicted: list[str]) -> None:
    """Show all runs in one table; those that are ticked are compared, or one of them described.

    names: all runs. predicted: those that have predictions.
    """
    start_statistics()  # while the visitor still reads the table
    table = all_runs_table(runs, names)
    with filters():
        for column in FILTERED:
            values = sorted(table[column].dropna().unique())
            chosen = st.multiselect(
                column.capitalize(), values, key=f"only_{column}", placeholder="all", width=220
            )
            if chosen:
                table = table[table[column].isin(chosen)]
    formats = {name: st.column_config.NumberColumn(format="%.2f") for name in METRICS}
    formats["learning rate"] = st.column_config.NumberColumn(format="%.1e")
    formats["parameters trained"] = st.column_config.NumberColumn(format="localized")
    formats["seconds"] = st.column_config.NumberColumn(format="%.0f")
    st.caption(
        f"{len(table):,} runs in {panels.plain(str(runs))}, the newest first. A click on the name "
        "of a column sorts by it. From and to are the ends of the 95% interval of top-1. Tick one "
        "run to see its settings and curve, several to compare what they say about each image."
    )
    # The ticks are numbers of rows, and must not outlive the rows: another key begins without any.
    shown = hashlib.sha256("\n".join(table["run"]).encode()).hexdigest()[:12]
    event = st.dataframe(
        table,
        hide_index=True,
        key=f"runs_table-{shown}",
        on_select="rerun",
        selection_mode="multi-row",
        column_config=formats,
        placeholder="",
    )
    ticked = table["run"].iloc[event.selection.rows].tolist()
    compare_button(ticked, predicted)
    download("The table as CSV", "runs", lambda: as_csv(table))
    if len(ticked) == 1:
        describe_run(runs / ticked[0])


def compare_button(ticked: list[str], predicted: Collection[str]) -> None:
    """Show the button that compares the ticked runs, and name those that it leaves out.

    predicted: the runs that have predictions.
    """
    with_predictions = [name for name in ticked if name in predicted]
    compared, too_many = with_predictions[:MOST_RUNS], with_predictions[MOST_RUNS:]
    label = "See predictions of the ticked run"
    if len(compared) > 1:
        label = f"Compare {len(compared)} ticked runs"
    if compared:
        choice = {"run": compared[0], "other": compared[1:], "page": 1}
        st.button(label, on_click=change, kwargs=choice, key="compare")
    left_out = {
        "have no predictions": [name for name in ticked if name not in predicted],
        f"are more than the {MOST_RUNS} that can be compared": too_many,
    }
    for why, names in left_out.items():
        if names and len(ticked) > 1:
            st.caption(f"Left out, as they {why}: {panels.plain(', '.join(names))}.")


def all_runs_table(runs: Path, names: list[str]) -> "pd.DataFrame":
    """Return run_table of these runs; made anew when one of their files changes."""
    paths = [runs / name / file for name in names for file in ("args.json", "result.json")]

    def read(path: Path) -> "pd.DataFrame":
        return run_table(path, names)

    return made_once(read, runs, stamp_of(*paths))


def describe_run(folder: Path) -> None:
    """Show the settings and the training curves of a run."""
    left, right = st.columns([1, 2])
    settings = {key: as_text(value) for key, value in run_arguments(folder).items()}
    left.caption(f"Settings of {panels.plain(folder.name)}")
    left.dataframe({"setting": list(settings), "value": list(settings.values())}, hide_index=True)
    rows = read_lines(folder / "metrics.jsonl", "step")
    with right:
        for key, title in CURVES.items():
            points = [{"step": row["step"], title: row[key]} for row in rows if key in row]
            if points:
                st.caption(title)
                st.line_chart(points, x="step", y=title, height=220)


def as_text(value: Any) -> str:
    """Return a setting as it is shown; a column of a table holds values of one kind."""
    return "" if value is None else str(value)


def show_accuracies(
    flowers: Flowers, predictions: list[Predictions], index: np.ndarray, clusters: np.ndarray
) -> None:
    """Show the accuracy of each run with its interval, and what tells it from the first run.

    index: the images that all of them predicted. clusters: of these, (n,) int.
    """
    from flowers.study.statistics import difference_interval, mcnemar, mean_interval

    labels = flowers.labels[index]
    correct = [run.guess[index] == labels for run in predictions]
    tests = [mcnemar(right, correct[0]) for right in correct[1:]]
    p_values = holm([p for _, _, p in tests])
    first = predictions[0].name
    difference = f"difference from {first} (points)"
    rows = []
    for k, (run, right) in enumerate(zip(predictions, correct)):
        mean, low, high = mean_interval(right[None], clusters)
        row = {"run": run.name, "top-1 (%)": mean, "95% interval": f"{low:.1f} to {high:.1f}"}
        if k > 0:
            change, low, high = difference_interval(right[None], correct[0][None], clusters)
            only_this, only_first, _ = tests[k - 1]
            row |= {
                difference: change,
                "95% interval of that": f"{low:+.1f} to {high:+.1f}",
                "right alone": only_this,
                f"{first} right alone": only_first,
                "p": p_values[k - 1],
            }
        rows.append(row)
    number = st.column_config.NumberColumn(format="%.2f")
    formats = {"top-1 (%)": number, difference: number}
    formats["p"] = st.column_config.NumberColumn(format="%.3g", help=MCNEMAR)
    st.caption(compared_images(predictions, index))
    st.dataframe(rows, hide_index=True, column_config=formats, key="accuracies", placeholder="")


def compared_images(predictions: list[Predictions], index: np.ndarray) -> str:
    """Return of how many images the page speaks, those at `index`, and how many each run predicted
    where that is not the same.
    """
    counts = {panels.plain(run.name): len(run.index) for run in predictions}
    if set(counts.values()) == {len(index)}:
        return f"Of {len(index):,} images"
    of_each = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return f"Of {len(index):,} images that all predicted ({of_each})"


def list_all(true: str, guess: str | None = None, guesser: str = "first") -> None:
    """List all pictures of a class, or those that are given the name `guess`, by `guesser`."""
    choices = {"class": true, "guess": guess, "guesser": guesser}
    # No other filter stays: the list has as many pictures as the cell that was clicked says.
    change(part="pictures", show="all", sure=(0, 100), page=1, **choices)


def show_classes(flowers: Flowers, predictions: list[Predictions], index: np.ndarray) -> None:
    """Show the accuracy of each class; a click on a cell or row lists the pictures of its class."""
    table = class_table(flowers, index, *predictions)

    def class_chosen():
        change()
        # Called, too, when nothing is chosen any longer.
        selection = state.get("table", {}).get("selection", {})
        rows = [*selection.get("rows", []), *(row for row, _ in selection.get("cells", []))]
        if rows:
            name = table["class"][rows[0]]
            list_all(true=name)

    one_decimal = st.column_config.NumberColumn(format="%.1f")
    percentages = [column for column in table.columns if column.endswith(IN_PERCENT)]
    formats = dict.fromkeys(percentages, one_decimal)
    formats[P_VALUE] = st.column_config.NumberColumn(format="%.3f", help=MCNEMAR_OF_CLASS)
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


def list_outcomes(
    flowers: Flowers, predictions: list[Predictions], images_of: dict[str, np.ndarray]
) -> Listing:
    """Show the filters of the runs' predictions; return the images that pass them."""
    # An address or a change of runs may ask for what these runs do not have.
    if state["show"] not in images_of:
        state["show"] = "all"  # there is no 'mended' without a second run
    if state["image"] is None:
        outcome_filters(flowers, predictions, list(images_of))

    first = predictions[0]
    index = images_of[state["show"]]
    if state["class"]:
        true = flowers.class_names.index(state["class"])
        index = index[flowers.labels[index] == true]
    if state["guess"]:
        guess = flowers.class_names.index(state["guess"])
        guessing = predictions if state["guesser"] == "any" else [first]
        index = index[np.any([run.guess[index] == guess for run in guessing], axis=0)]
    least, most = state["sure"]
    percent = 100 * first.score[index]
    index = index[(percent >= least) & (percent <= most)]
    if state["order"] != "id":
        sign = -1 if state["order"] == "confidence" else 1
        index = index[np.argsort(sign * first.score[index], kind="stable")]

    def answers(i: int) -> list[str]:
        lines = []
        for run in predictions:
            mark = "✓" if run.guess[i] == flowers.labels[i] else "✗"
            name = flowers.class_names[run.guess[i]]
            lines.append(f"{mark} {name} {100 * run.score[i]:.0f}%")
        return lines

    return Listing(index, answers, predictions)


def outcome_filters(flowers: Flowers, predictions: list[Predictions], shows: list[str]) -> None:
    """Show what the list of images can be narrowed by. shows: the outcomes of these runs."""
    names = sorted(flowers.class_names)
    # Of several runs, these speak of the first.
    by = f" by {panels.plain(predictions[0].name)}" if len(predictions) > 1 else ""
    only = {key: f"only {run.name} right" for key, run in zip(ONLY, predictions)}
    with filters():
        choose_one(f"Right and wrong{by}", shows, "show", names=NAMES_OF_SHOWS | only)
        choose_from_list("True class", names, "class")
        by_any = " by any of these" if len(predictions) > 1 and state["guesser"] == "any" else by
        choose_from_list(f"Predicted class{by_any}", names, "guess")
        if len(predictions) > 1:
            called = {"first": predictions[0].name, "any": "any of these"}
            choose_one("It is predicted by", GUESSERS, "guesser", names=called)
        choose_one(f"Order (confidence{by})", ORDERS, "order", names=NAMES_OF_ORDERS)
        st.slider(f"Confidence{by} (%)", 0, 100, key="sure", on_change=change_filter, width=200)
    if len(predictions) > 1:
        said = ", then ".join(panels.plain(run.name) for run in predictions)
        caption = f"Under each picture: what {said} says."
        if len(predictions) == 2:
            one, two = (panels.plain(run.name) for run in predictions)
            caption += f" Wrong → right: {one} is wrong, {two} is right."
        st.caption(caption)
    if state["show"] in EXPLAINED:
        st.caption(EXPLAINED[state["show"]])


def search(data: Dataset, runs: Path, models: list[str]) -> Listing | None:
    """Show the search fields; return all images, the most similar first, if something is searched.

    models: the runs that have a model.
    """
    if not models:
        remedy = training_command(data.flowers, runs)
        st.info(panels.message(f"Searching needs a run with a model in {runs}. Make one: {remedy}"))
        return None
    reasons = reasons_apart(data, runs, models)
    models = list(reasons)
    if state["model"] is None:
        state["model"] = models[0]
    with st.container(horizontal=True):
        st.text_input(
            "Sentence",
            key="q",
            placeholder="a yellow flower with a dark centre",
            max_chars=MAX_TEXT,
            on_change=lambda: search_by("sentence"),
            width=420,
        )
        choose_from_list("Run", models, "model", reasons=reasons)
    if is_missing("model", models, f"with a model in {panels.plain(str(runs))}"):
        return None
    # While the visitor still writes a sentence.
    start_searcher(*searcher_of(data, runs / state["model"]))
    upload = st.file_uploader(
        "or a picture of your own (JPEG, PNG or WebP; it is kept in memory only)",
        key="upload",
        on_change=lambda: search_by("picture"),
    )
    if not upload and not state["q"].strip():
        return None
    if upload and state["q"].strip():
        state["by"] = state.get("by", "picture")  # the latter of the two, until one is chosen
        choose_one("Search by", ("sentence", "picture"), "by")
    else:
        state["by"] = "picture" if upload else "sentence"

    searcher = load_searcher(data, runs / state["model"])
    if state["by"] == "picture":
        picture = open_picture(upload.getvalue())
        features = searcher.of_picture(picture)  # (D,)
        title = "class"
        if searcher.temperature:
            title = f"class, calibrated (T = {searcher.temperature:.3g})"
        # Named, since Streamlit itself refuses what is too large, and the picture before it stays.
        st.caption(f"Your picture {panels.plain(upload.name)}: its class, and the images like it.")
        show_answer(picture, data.flowers.class_names, searcher.ranking(features), title)
    else:
        if searcher.is_cut(state["q"]):
            st.warning(f"The model reads {searcher.model.context_length} tokens: the rest is cut.")
        features = searcher.of_text(state["q"])
    order, scores = nearest(searcher.features, features)  # of all N images
    st.caption(SIMILARITY)
    return Listing(order, score_lines(order, scores), scores=scores)


def search_by(what: str) -> None:
    """Search by the sentence or by the picture: by that which was changed last."""
    change_filter()
    state["by"] = what


def score_lines(index: np.ndarray, scores: np.ndarray) -> Callable[[int], list[str]]:
    """Return a function that gives the similarity of an image, at most 1, from its index."""
    score_of = dict(zip(index.tolist(), scores.tolist()))
    return lambda i: [f"similarity {score_of[int(i)]:.3f}"]


def show_answer(
    picture: np.ndarray, class_names: Sequence[str], probabilities: np.ndarray, title: str
) -> None:
    """Show a visitor's picture (H, W, 3) beside the best classes for it. probabilities: (C,)."""
    best = [(class_names[c], probabilities[c]) for c in np.argsort(-probabilities)[:BEST]]
    left, right = st.columns([1, 3])
    left.image(picture, alt="your picture")
    with right:
        draw(panels.ranking(title, best), "answer")


def show_map(data: Dataset, runs: Path, models: list[str], predicted: list[str]) -> Listing | None:
    """Show a map of all images; return those in the box that is drawn on it, if there is one.

    models: the runs that have a model. predicted: those that have predictions.
    """
    flowers = data.flowers
    is_shown = state["image"] is None  # one image is shown without the map
    ways = ["colours", *models]
    if is_shown:
        map_choices(data, runs, ways, predicted)
    if is_missing("laid", ways, f"with a model in {panels.plain(str(runs))}"):
        return None
    places = places_on_map(data, runs)
    if places is None:
        return None
    if is_shown:
        groups = groups_on_map(data, runs, predicted)
        if groups is None:
            return None
        draw_map(data, places, groups)
    box = atlas.parse_box(state["box"])
    if box is None:
        return None
    chosen = atlas.in_box(places, box)
    if state["class"]:
        chosen &= flowers.labels == flowers.class_names.index(state["class"])
    return Listing(np.flatnonzero(chosen))


def map_choices(data: Dataset, runs: Path, ways: list[str], predicted: list[str]) -> None:
    """Show what the map is laid out by, and what its dots are coloured by."""

    def lay_out_anew() -> None:
        change_filter()
        change(box="", _drawn="")  # elsewhere on another map are other images

    with filters():
        choose_from_list("Laid out by", ways, "laid", on_change=lay_out_anew)
        choose_one("Coloured by", COLOURINGS, "colour", names=NAMES_OF_COLOURINGS)
        if state["colour"] == "outcome" and predicted:
            reasons = reasons_apart(data, runs, predicted)
            if state["judged"] is None:
                state["judged"] = next(iter(reasons))
            choose_from_list("Right and wrong by", list(reasons), "judged", reasons=reasons)
        choose_from_list("Class", sorted(data.flowers.class_names), "class")


def places_on_map(data: Dataset, runs: Path) -> np.ndarray | None:
    """Return the place of each image (N, 2) by the chosen features; None until there are some."""
    if state["laid"] == "colours":
        features, stamp = data.thumbnails.features, data.stamp
    else:
        features = load_searcher(data, runs / state["laid"]).features
        stamp = searcher_of(data, runs / state["laid"])
    if features is None:  # the thread of the thumbnails is not done
        wait_for_colours(data.thumbnails)
        return None
    arguments = (data.flowers, features, state["laid"], stamp[-1])
    return result_of(start_map, arguments, f"Laying out {len(features):,} images")


def groups_on_map(data: Dataset, runs: Path, predicted: list[str]) -> np.ndarray | None:
    """Return what each image is coloured by (N,) str; None where that is not known."""
    if state["colour"] == "split":
        return atlas.splits_of(data.splits)
    if state["colour"] == "class":
        return atlas.classes_of(data.flowers, state["class"])
    where = f"with predictions in {panels.plain(str(runs))}"
    if not predicted:
        st.info(f"There is no run {where} yet: nothing is right or wrong.")
        return None
    if is_missing("judged", predicted, where):
        return None
    return atlas.outcomes_of(data.flowers, load_predictions(data, runs, state["judged"]))


def draw_map(data: Dataset, places: np.ndarray, groups: np.ndarray) -> None:
    """Show the map; what is selected on it becomes state["box"]. places: (N, 2), groups: (N,)."""

    key = f"map-{state['laid']}"  # another map begins without a selection

    def box_drawn() -> None:
        selection = state.get(key, {}).get("selection", {}).get(atlas.SELECTION, {})
        box = atlas.box_text(selection)
        if box != state["box"]:
            change_filter()
            change(box=box, _drawn=box)

    # The chart keeps what is drawn on it. It is told of a box when it is new on the page, and of
    # one that comes from the address.
    if key not in state or state["box"] != state.get("_drawn"):
        state["_given"] = state["_drawn"] = state["box"]
    names = data.flowers.class_names
    titles = [f"{i} {names[label]}" for i, label in zip(data.ids, data.flowers.labels)]
    arguments = (data.thumbnails, data.stamp)
    pictures = result_of(start_hover_pictures, arguments, "Making small pictures")
    chart = atlas.chart(places, groups, titles, pictures, atlas.parse_box(state["_given"]))
    st.caption(
        "Each dot is an image, those that look alike close together (Isomap). Draw a box with the "
        "mouse to see its images below; a click beside it removes it."
    )
    with st.container(width=MAP_WIDTH):  # a window may be so wide that distances mean nothing
        st.altair_chart(chart, key=key, on_select=box_drawn)


# -----------------------------------------------------------------------------
# one image


def show_image(data: Dataset, i: int, listing: Listing, models: list[str], runs: Path) -> None:
    """Show image i with all that is known of it, and the nearest images.

    listing: the list that it was opened from. models: the runs that have a model.
    """
    flowers = data.flowers
    image_toolbar(data.ids, i, listing.index)
    file = flowers.files[i]
    try:
        jpeg = file.read_bytes()
        rgb = read_rgb(file)  # (H, W, 3)
    except (OSError, UserError) as error:
        problem = (
            f"{file} is damaged ({error}). Replace it by a fresh copy, or fetch the dataset anew: "
            "python -m flowers.data"
        )
        st.error(panels.message(problem))
        return
    name = flowers.class_names[flowers.labels[i]]
    height, width = rgb.shape[:2]
    facts = [
        f"class {flowers.labels[i] + 1} · image {data.ids[i]} · {data.splits[i]}",
        f"{flowers.file_names[i]} · {width} x {height} pixels · {len(jpeg) / 1000:.0f} kB",
    ]
    captions = captions_of(data, i)
    predictions = listing.predictions or newest_predictions(data, runs, i)
    rankings = rankings_of(flowers, i, predictions)
    draw(panels.image(jpeg, rgb, name, facts, captions, rankings), "image")
    show_where(data, i, models, runs)
    show_neighbours(data, i, models, runs)


def image_toolbar(ids: np.ndarray, i: int, index: np.ndarray) -> None:
    """Show the buttons that lead from image i to the grid and to other images of its list."""
    found = np.flatnonzero(index == i)
    position = int(found[0]) if len(found) else -1  # the address may name an image of no list
    where = f"not among these {len(index):,}"
    if len(found):
        where = f"{position + 1:,} of {len(index):,}"

    def id_at(position: int) -> int | None:
        return int(ids[index[position]]) if 0 <= position < len(index) else None

    def open_random() -> None:
        change(image=int(ids[random.choice(index)]))

    before, after = id_at(position - 1), id_at(position + 1)
    # Who has gone on from image to image comes back to the part of the grid that they are at.
    page = position // PER_PAGE + 1 if len(found) else state["page"]
    with toolbar():
        step_button("Grid", "to_grid", "Escape", True, image=None, page=page, _left=int(ids[i]))
        step_button("Previous", "Previous_image", "Left", before is not None, image=before)
        step_button("Next", "Next_image", "Right", after is not None, image=after)
        st.button(
            "Random",
            on_click=open_random,
            disabled=not len(index),
            shortcut="S",
            key="random_image",
        )
        st.markdown(where, width="content")


def captions_of(data: Dataset, i: int) -> list[str]:
    """Return the sentences about image i, from the first captions file that can be read."""
    for name in ("captions.jsonl.gz", "captions.jsonl"):
        path = data.flowers.root / name
        if not path.is_file():
            continue
        try:
            return load_captions(data, path)[i]
        except UserError as error:
            st.warning(panels.message(str(error)))
    return []


def rankings_of(
    flowers: Flowers, i: int, predictions: Sequence[Predictions]
) -> list[tuple[str, list[tuple[str, float]]]]:
    """Return what each run says of image i: its name, and class names with probabilities."""
    rankings = []
    for run in predictions:
        best = []
        for c, probability in run.top[i]:
            mark = "✓ " if c == flowers.labels[i] else ""
            best.append((mark + flowers.class_names[c], probability))
        if best:
            rankings.append((run.name, best))
    return rankings


def newest_predictions(data: Dataset, runs: Path, i: int) -> list[Predictions]:
    """Return the predictions of the newest runs that have one of image i."""
    found = []
    for name in run_names(runs, "predictions.csv")[:NEWEST_LOOKED_AT]:
        try:
            run = load_predictions(data, runs, name)
        except UserError:  # about other images, or damaged: said where that run is chosen
            continue
        if run.top[i]:
            found.append(run)
        if len(found) == NEWEST:
            break
    return found


def show_where(data: Dataset, i: int, models: list[str], runs: Path) -> None:
    """Show, once it is asked for, where a run looks in image i, and where it looked at its start.

    models: the runs that have a model.
    """
    if not models:
        return
    choose_one("Where a run looks", BARS, "where", change)
    if state["where"] == "hidden":
        return
    if state["looker"] is None:
        used = [name for name in (state["run"], state["model"]) if name in models]
        state["looker"] = (used or models)[0]
    with st.container(horizontal=True):
        choose_from_list("Looking run", models, "looker", on_change=change)
        names = sorted(data.flowers.class_names)
        choose_from_list("For", names, "target", "true and predicted class", on_change=change)
        st.text_input(
            "and for a sentence", key="words", max_chars=MAX_TEXT, on_change=change, width=420
        )
    if is_missing("looker", models, f"with a model in {panels.plain(str(runs))}"):
        return
    st.caption(
        "How much each place of the picture speaks for the class or sentence, estimated by "
        "gradients; each map has its own scale. It says where a score comes from, not why, and "
        "nothing of whether it is right. Parts without colour the model does not see."
    )
    try:
        columns = [painted_maps(*looks(data, i, runs, "after"))]
    except UserError as error:
        st.warning(panels.message(str(error)))
        return
    try:
        columns.insert(0, painted_maps(*looks(data, i, runs, "before")))
    except UserError as error:
        st.info(panels.message(f"There is no map from before the fine-tuning: {error}"))
    from flowers.gallery.relevance import legend  # loaded by now

    draw(panels.maps(zip(*columns), legend()), "maps")


def looks(data: Dataset, i: int, runs: Path, when: str) -> tuple:
    """Return the arguments of painted_maps for image i and what is chosen."""
    run = runs / state["looker"]
    stamp = data.stamp + stamp_of_run(run)
    picture = stamp_of(data.flowers.files[i])
    return data, i, run, when, state["target"], state["words"].strip(), stamp, picture


@st.cache_data(show_spinner="Finding where the run looks", max_entries=200)
def painted_maps(
    _data: Dataset,
    i: int,
    run: Path,
    when: str,
    target: str | None,
    sentence: str,
    stamp: tuple,
    picture: tuple,
) -> list[tuple[bytes, list[str]]]:
    """Return where a run looks in image i, as JPEGs with lines of text; once, until one of the
    stamps of the run and of the picture changes.

    when: 'after' the run, or 'before', at its start. target: a class; None: the true one, and the
    one that the run predicts. sentence: looked for, too, unless it is empty.
    """
    from flowers.gallery.relevance import paint  # here, as it loads torch

    class_names, file = _data.flowers.class_names, _data.flowers.files[i]
    explainer = load_explainer(run, when, class_names, stamp)
    if target:
        names = {target: "chosen class"}
    else:
        names = {class_names[_data.flowers.labels[i]]: "true class"}
        predicted = load_explainer(run, "after", class_names, stamp).predict(file)
        names[predicted] = "true and predicted class" if predicted in names else "predicted class"
    targets = [(explainer.class_target(name), what) for name, what in names.items()]
    if sentence:
        targets.append((explainer.text_target(sentence), "sentence"))

    title = run.name if when == "after" else explainer.origin
    cells = []
    for wanted, what in targets:
        values, score = explainer.explain(file, wanted)
        jpeg = paint(file, values, explainer.resolution)
        lines = [f"{when.title()}: {title}", f"{what}: {wanted.name}"]
        doubt = "" if values.any() else ", and no place speaks for it"
        cells.append((jpeg, [*lines, f"{wanted.unit} {score:.3f}{doubt}"]))
    return cells


@st.cache_resource(show_spinner=False, max_entries=2)
def load_explainer(run: Path, when: str, class_names: tuple[str, ...], stamp: tuple):
    """Return the model of a run, 'after' it or 'before'; once, until `stamp` changes."""
    from flowers.gallery import relevance  # here, as it loads torch

    load = relevance.load_run if when == "after" else relevance.load_start
    return load(run, class_names)


def show_neighbours(data: Dataset, i: int, models: list[str], runs: Path) -> None:
    """Show the images nearest to image i, by colours or by the features of a run's model."""
    ways = ["colours", *models]
    choose_one("Nearest images by", ways, "like", change)
    if is_missing("like", ways, f"with a model in {panels.plain(str(runs))}"):
        return
    if state["like"] == "colours":
        features = data.thumbnails.features
    else:
        features = load_searcher(data, runs / state["like"]).features
    if features is None:  # the thread of the thumbnails is not done
        wait_for_colours(data.thumbnails)
        return
    order, scores = nearest(features, features[i], leave_out=i)  # it is its own nearest
    index, scores = order[:NEIGHBOURS], scores[:NEIGHBOURS]
    st.caption(SIMILARITY)
    picture_grid(data, index, "neighbours", score_lines(index, scores))


# -----------------------------------------------------------------------------
# the page


def show_page(parser: argparse.ArgumentParser) -> None:
    """Show the whole page. Raises UserError or OSError for what the user can mend."""
    args = parse_arguments(parser)
    runs = Path(args.runs)
    data = open_data(args)
    flowers = data.flowers
    # Asked anew each time: a run may end while the page is open.
    predicted = run_names(runs, "predictions.csv")
    models = run_names(runs, "model.pt")
    address.read(state, page_address(), allowed_choices(data))

    with toolbar():
        st.segmented_control(
            "View",
            VIEWS,
            key="view",
            format_func=str.title,
            on_change=change_filter,
            required=True,
            label_visibility="collapsed",
        )
        summary = f"{len(data.ids):,} images of {len(flowers.class_names)} classes"
        st.markdown(f"{summary} in `{flowers.root}`", width="content")
    if data.problem:
        st.warning(
            panels.message(f"{data.problem}. Fetch the dataset anew: python -m flowers.data")
        )

    if state["view"] == "browse":
        listing = browse(data)
    elif state["view"] == "runs":
        listing = compare_runs(data, runs, predicted)
    elif state["view"] == "map":
        listing = show_map(data, runs, models, predicted)
    else:
        listing = search(data, runs, models)

    # After the view, whose list the image is in, and instead of that list's grid.
    found = np.flatnonzero(data.ids == (state["image"] or -1))
    if state["image"] is not None and not len(found):
        st.info(f"There is no image {state['image']} in this dataset.")
        state["image"] = None
    if state["image"] is not None:
        everything = Listing(np.arange(len(data.ids)))
        show_image(data, int(found[0]), listing or everything, models, runs)
    elif listing is not None:
        show_listing(data, listing)
    st.set_page_config(title_of_page(flowers, found))
    write_address()


def title_of_page(flowers: Flowers, found: np.ndarray) -> str:
    """Return what is shown, for the title of the browser's window. found: the image shown alone."""
    what = [state["view"].title()]
    if state["image"] is not None:
        name = flowers.class_names[flowers.labels[found[0]]]
        what = [f"{state['image']} {name}"]
    elif state["view"] == "runs":
        what += filter(None, (state["run"], *state["other"]))
    elif state["view"] == "search":
        what.append(state["q"])
    elif state["view"] == "map":
        what.append(f"by {state['laid']}")
    elif state["class"]:
        what.append(state["class"])
    return " · ".join([*filter(None, what), "Flowers"])


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line. Raises UserError for a mistake, as the page can show no usage."""

    def refuse(message: str) -> None:
        raise UserError(f"{message}: {START}")

    parser.error = refuse
    return parser.parse_args()


def open_data(args: argparse.Namespace) -> Dataset:
    """Open the dataset of the command line. Raises UserError that says how to fetch it."""
    # A page must not download 345 MB, as open_flowers would.
    default = default_root()
    if Path(args.data_root) == Path(default) and not is_complete(Path(default)):
        raise UserError(f"{default} is missing or incomplete. Fetch it: python -m flowers.data")
    root = Path(data_folder("sample") if args.data_root == "sample" else args.data_root)
    names = ("jpg", "images/jpg", "imagelabels.mat", "labels.npz", "cat_to_name.json", "train")
    # The dataset is opened again when one of these changes, so that a copy that was mended opens
    # without a restart. Only one of the layouts has each.
    files = [root / name for name in names]
    files.append(Path(args.splits_path or root / "setid.mat"))
    arguments = tuple((key, value) for key, value in vars(args).items() if key != "runs")
    try:
        return open_dataset(arguments, stamp_of(*files))
    except UserError as error:
        raise UserError(
            f"{error}. Fetch the dataset: python -m flowers.data; "
            "or see the sample: streamlit run web.py -- --data_root sample"
        ) from None


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


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser)
    if not is_complete(Path(default_root())):
        parser.set_defaults(data_root="sample")
    parser.add_argument(
        "--runs", type=user_path, default="runs", help="folder of the runs (default: %(default)s)"
    )
    if not st.runtime.exists():
        parser.parse_args()  # answers --help, and names a mistake
        raise UserError(f"this is a page: start it with {START}")

    st.set_page_config("Flowers", page_icon="🌸", layout="wide")
    st.html(f"<style>{panels.PAGE_STYLE}</style>")
    try:
        show_page(parser)
    except (UserError, OSError) as error:
        st.error(panels.message(str(error)))
        write_address()  # of what was chosen, which the page could not show


if __name__ == "__main__":
    main()
