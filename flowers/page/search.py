"""The view Search: the images that are most like a sentence, or a picture of the visitor's own."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from flowers.gallery import panels
from flowers.gallery.address import MAX_TEXT
from flowers.gallery.search import Searcher, nearest
from flowers.gallery.thumbnails import open_picture
from flowers.page.choices import change_filter, is_missing, state
from flowers.page.kept import (
    Dataset,
    load_searcher,
    models_apart,
    searcher_of,
    sentence_features,
    start_searcher,
)
from flowers.page.widgets import (
    SIMILARITY,
    Listing,
    choose_from_list,
    choose_one,
    draw,
    score_lines,
    training_command,
)

if TYPE_CHECKING:
    from streamlit.runtime.uploaded_file_manager import UploadedFile

BEST = 5  # names in the ranking of a visitor's picture


def search(data: Dataset, runs: Path, models: list[str]) -> Listing | None:
    """Show the search fields; return all images, the most similar first, if something is searched.

    models: the runs that have a model.
    """
    if not models:
        remedy = training_command(data.flowers, runs)
        st.info(panels.message(f"Searching needs a run with a model in {runs}. Make one: {remedy}"))
        return None
    reasons = models_apart(data, runs, models)
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
        features = answer_picture(data, searcher, upload)
    else:
        if searcher.is_cut(state["q"]):
            st.warning(f"The model reads {searcher.model.context_length} tokens: the rest is cut.")
        stamp = searcher_of(data, runs / state["model"])[-1]
        features = sentence_features(searcher, state["q"], (state["model"], *stamp))
    order, scores = nearest(searcher.features, features)  # of all N images
    st.caption(SIMILARITY)
    return Listing(order, score_lines(order, scores), scores=scores)


def answer_picture(data: Dataset, searcher: Searcher, upload: "UploadedFile") -> np.ndarray:
    """Show what class a visitor's picture is of; return its features (D,)."""
    picture = open_picture(upload.getvalue())
    features = searcher.of_picture(picture)
    title = "class"
    if searcher.temperature:
        from flowers.calibration import temperature_in_words  # it loads scipy, as the model did

        title = f"class, {temperature_in_words(searcher.temperature)}"
    # Named, since Streamlit itself refuses what is too large, and the picture before it stays.
    st.caption(f"Your picture {panels.plain(upload.name)}: its class, and the images like it.")
    show_answer(picture, data.flowers.class_names, searcher.ranking(features), title)
    return features


def search_by(what: str) -> None:
    """Search by the sentence or by the picture: by that which was changed last."""
    change_filter()
    state["by"] = what


def show_answer(
    picture: np.ndarray, class_names: Sequence[str], probabilities: np.ndarray, title: str
) -> None:
    """Show a visitor's picture (H, W, 3) beside the best classes for it. probabilities: (C,)."""
    best = [(class_names[c], probabilities[c]) for c in np.argsort(-probabilities)[:BEST]]
    left, right = st.columns([1, 3])
    left.image(picture, alt="your picture")
    with right:
        draw(panels.ranking(title, best), "answer")
