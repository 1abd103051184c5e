"""What stays in memory from one run of web.py to the next, for all visitors.

Streamlit keeps it under the arguments that have no underscore, among them a stamp: the times of the
files that it is made from.
"""

import importlib
import os
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from flowers import UserError
from flowers.data import Flowers, open_flowers
from flowers.gallery import atlas
from flowers.gallery.filters import image_ids, split_names
from flowers.gallery.predictions import (
    ANOTHER_SPLIT,
    Predictions,
    model_arguments,
    read_predictions,
    why_apart,
)
from flowers.gallery.search import Searcher, own_prompts
from flowers.gallery.thumbnails import Thumbnails
from flowers.layouts import read_captions
from flowers.splits import MissingImages

SEARCHERS = 3  # models in memory, with their features of all images
POLL = 0.2  # seconds between two looks at what is computed in the background


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
    return tuple((str(path), modified(path)) for path in paths)


def modified(path: Path) -> int:
    """Return when a file was changed, in nanoseconds; of one that is missing, as it may come, 0."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def stamp_of_run(run: Path) -> tuple:
    """Return something that changes when one of the files does that a run's model is made from."""
    names = ("model.pt", "classifier.pt", "args.json", "calibration.json", "class_names.json")
    files = [run / name for name in names]
    _, prompts_file = own_prompts(run)
    if prompts_file:
        files.append(Path(prompts_file))
    return stamp_of(*files)


def stamp_of_start(run: Path) -> tuple:
    """Return something that changes when a file or folder does whose weights a run started from."""
    architecture = model_arguments(run).get("architecture")
    if not architecture:
        return ()
    # A name of a model is no file, and stays as it is. Or behind `open_clip:`.
    start = Path(architecture)
    if not start.exists():
        start = Path(architecture.rpartition(":")[2])
    files = sorted(start.iterdir()) if start.is_dir() else [start]
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
def known_reasons() -> dict[Path, tuple[tuple, str]]:
    """Return the reasons that are known; a look-up in Streamlit's own cache takes 1 ms a run."""
    return {}


def reasons_apart(
    data: Dataset, runs: Path, names: Sequence[str], no_reason: Collection[str] = ()
) -> dict[str, str]:
    """Return each run with the reason why it is listed apart, empty for none.

    Those without a reason come first; for the rest the order is kept. no_reason: what is none here.
    """
    known = known_reasons()
    reasons = {}
    for name in names:
        path = runs / name / "predictions.csv"
        stamp = (data.stamp, stamp_of(path))
        if path not in known or known[path][0] != stamp:
            known[path] = (stamp, why_apart(path.parent, data.flowers))
        reason = known[path][1]
        reasons[name] = "" if reason in no_reason else reason
    return dict(sorted(reasons.items(), key=lambda item: bool(item[1])))


def models_apart(data: Dataset, runs: Path, models: Sequence[str]) -> dict[str, str]:
    """Return reasons_apart of runs whose model is used: it may have been evaluated on any split."""
    return reasons_apart(data, runs, models, no_reason=[ANOTHER_SPLIT])


def load_captions(data: Dataset, path: Path) -> list[list[str]]:
    def read(path: Path) -> list[list[str]]:
        return read_captions(path, data.flowers.files)

    return made_once(read, path, data.stamp + stamp_of(path))


def load_predictions(data: Dataset, runs: Path, name: str) -> Predictions:
    """Return the predictions of a run; read once, until they change. Raises UserError if they can't
    be used, which is found out once, too.
    """

    def read(path: Path) -> Predictions | UserError:
        try:
            return read_predictions(path.parent, data.flowers, name)
        except UserError as error:
            return error

    path = runs / name / "predictions.csv"
    # The result says whether they are calibrated.
    stamp = data.stamp + stamp_of(path, path.with_name("result.json"))
    predictions = made_once(read, path, stamp)
    if isinstance(predictions, UserError):
        raise UserError(*predictions.args)
    return predictions


@st.cache_resource(show_spinner=False, max_entries=SEARCHERS)
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


@st.cache_data(show_spinner=False, max_entries=100)
def sentence_features(_searcher: Searcher, sentence: str, stamp: tuple) -> np.ndarray:
    """Return the features (D,) of a sentence; once, until the stamp of the run changes."""
    return _searcher.of_text(sentence)


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

    with tqdm.get_lock():  # other threads begin and end bars
        bars = list(getattr(tqdm, "_instances", ()))  # that the package writes to the terminal
    for bar in bars:
        # One that is only being made has no numbers yet.
        if getattr(bar, "total", None) and hasattr(bar, "n"):
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


@st.cache_resource(show_spinner=False)
def start_statistics() -> Future:
    """Start to load what a comparison of runs needs, which takes a second; once."""
    return in_background(lambda: importlib.import_module("flowers.study.statistics"))


def load_explainer(data: Dataset, run: Path, when: str):
    """Return the model of a run, 'after' it or 'before'; loaded once, until its files change."""
    stamp = data.stamp + stamp_of_run(run)
    if when == "before":
        stamp += stamp_of_start(run)
    return made_explainer(run, when, data.flowers.class_names, stamp)


# The models of a few runs that are shown together, and a start.
@st.cache_resource(show_spinner=False, max_entries=4)
def made_explainer(run: Path, when: str, class_names: tuple[str, ...], stamp: tuple):
    """Return load_explainer's model; once, until `stamp` changes."""
    from flowers.gallery import relevance  # here, as it loads torch

    load = relevance.load_run if when == "after" else relevance.load_start
    return load(run, class_names)
