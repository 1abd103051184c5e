"""One image with all that is known of it, instead of the grid of a view."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import streamlit as st

from flowers import UserError
from flowers.gallery import panels
from flowers.gallery.address import MAX_TEXT
from flowers.gallery.predictions import Predictions
from flowers.gallery.search import nearest
from flowers.images import read_rgb
from flowers.page.choices import (
    BARS,
    NAMES_OF_PROBABILITIES,
    PROBABILITIES,
    change,
    is_missing,
    state,
    ways_of,
)
from flowers.page.kept import (
    Dataset,
    load_captions,
    load_explainer,
    load_predictions,
    load_searcher,
    models_apart,
    reasons_apart,
    stamp_of,
    stamp_of_run,
    stamp_of_start,
)
from flowers.page.widgets import (
    PER_PAGE,
    SIMILARITY,
    Listing,
    choose_from_list,
    choose_one,
    draw,
    picture_grid,
    score_lines,
    step_button,
    toolbar,
    wait_for_colours,
)

NEIGHBOURS = 12  # nearest images, under one image
FEATURES = "a run's features"
NEWEST = 3  # runs whose predictions are shown under an image, and how many are looked at for them
NEWEST_LOOKED_AT = 8


def show_image(
    data: Dataset, i: int, listing: Listing, runs: Path, models: list[str], predicted: list[str]
) -> None:
    """Show image i with all that is known of it, and the nearest images.

    listing: the list that it was opened from. models: the runs that have a model. predicted: those
    that have predictions.
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
    predictions, note, may_be_more = listing.predictions, "", False
    if not predictions:
        newest = newest_predictions(data, runs, predicted, i)
        note = what_is_left_out(len(newest), len(predicted))
        may_be_more = has_more(len(newest), len(predicted)) or state["also"] is not None
        predictions = [run for run in newest if run.name != state["also"]]
        predictions += predictions_of_another(data, runs, predicted, i)
    rankings = rankings_of(data, i, predictions, runs)
    draw(panels.image(jpeg, rgb, name, facts, captions, rankings, note), "image")
    with st.container(horizontal=True):
        if rankings:
            names = NAMES_OF_PROBABILITIES
            choose_one("Probabilities", PROBABILITIES, "probabilities", change, names)
        if may_be_more:
            choose_another(data, runs, predicted, [run.name for run in predictions])
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


Answers = Sequence[tuple[int, float]]  # classes with their probabilities, the best first


def rankings_of(
    data: Dataset, i: int, predictions: Sequence[Predictions], runs: Path
) -> list[tuple[str, list[tuple[str, float]]]]:
    """Return what each run says of image i: its name, and class names with probabilities."""
    flowers = data.flowers
    predictions = [run for run in predictions if run.top[i]]
    any_calibrated = any(run.temperature is not None for run in predictions)
    rankings = []
    for run in predictions:
        title, answers = answers_of(data, i, run, runs / run.name, any_calibrated)
        best = []
        for c, probability in answers:
            mark = "✓ " if c == flowers.labels[i] else ""
            best.append((mark + flowers.class_names[c], probability))
        rankings.append((title, best))
    return rankings


def answers_of(
    data: Dataset, i: int, run: Predictions, folder: Path, any_calibrated: bool
) -> tuple[str, Answers]:
    """Return a run's name, with how its probabilities were calibrated, and its answers to image i.

    They are as it predicted them, or calibrated, where this is chosen and the run can be.
    any_calibrated: whether one of the runs that are shown predicted calibrated ones.
    """
    temperature, answers = run.temperature, run.top[i]
    is_chosen = state["probabilities"] == "calibrated"
    if is_chosen and temperature is None:
        try:
            temperature, answers = calibrated_answers(data, i, run, folder)
        except UserError as error:
            st.warning(panels.message(str(error)))
    if temperature is None:
        is_said = is_chosen or any_calibrated
        return f"{run.name}: not calibrated" if is_said else run.name, answers
    from flowers.calibration import temperature_in_words  # here, as it loads scipy

    return f"{run.name}: {temperature_in_words(temperature)}, found on val", answers


def calibrated_answers(
    data: Dataset, i: int, run: Predictions, folder: Path
) -> tuple[float | None, Answers]:
    """Return the temperature of a run's model, and its answers to image i with that.

    None, and the answers as predicted, where the run has no model or no temperature of its own.
    """
    if not all((folder / name).is_file() for name in ("model.pt", "calibration.json")):
        return None, run.top[i]
    stamps = data.stamp + stamp_of_run(folder), stamp_of(data.flowers.files[i])
    temperature, probabilities = model_probabilities(data, i, folder, *stamps)
    if temperature is None:
        return None, run.top[i]
    best = np.argsort(-probabilities, kind="stable")[: len(run.top[i])]
    return temperature, [(int(c), float(probabilities[c])) for c in best]


@st.cache_data(show_spinner="Calibrating", max_entries=1000)
def model_probabilities(
    _data: Dataset, i: int, folder: Path, stamp: tuple, picture: tuple
) -> tuple[float | None, np.ndarray]:
    """Return the temperature of a run's model, and the probabilities (C,) of the classes of image
    i, divided by it; once, until one of the stamps of the run and of the picture changes.
    """
    explainer = load_explainer(_data, folder, "after")
    return explainer.temperature, explainer.probabilities(_data.flowers.files[i])


def newest_predictions(data: Dataset, runs: Path, names: list[str], i: int) -> list[Predictions]:
    """Return the predictions of the newest runs that have one of image i.

    names: the runs that have predictions, the newest first.
    """
    found = []
    for name in names[:NEWEST_LOOKED_AT]:
        try:
            run = load_predictions(data, runs, name)
        except UserError:  # about other images, or damaged: said where that run is chosen
            continue
        if run.top[i]:
            found.append(run)
        if len(found) == NEWEST:
            break
    return found


def has_more(n_found: int, n_runs: int) -> bool:
    """Return whether some runs were not looked at once the `n_found` newest were found."""
    return n_runs > (NEWEST if n_found == NEWEST else NEWEST_LOOKED_AT)


def what_is_left_out(n_found: int, n_runs: int) -> str:
    """Return of how many runs with predictions the `n_found` newest are shown, in words."""
    if not has_more(n_found, n_runs):
        if n_found or not n_runs:
            return ""
        if n_runs == 1:
            return "The only run with predictions has none of this image."
        return f"None of the {n_runs} runs with predictions has this image."
    if n_found == NEWEST:
        found = f"The newest {NEWEST} that predicted this image, of {n_runs} runs with predictions."
    else:
        have = "have" if n_found > 1 else "has"
        found = (
            f"{n_found or 'None'} of the {NEWEST_LOOKED_AT} newest of {n_runs} runs with "
            f"predictions {have} this image; older ones were not looked at."
        )
    return f"{found} Another one can be chosen below."


def choose_another(data: Dataset, runs: Path, names: list[str], shown: list[str]) -> None:
    """Show the list of the runs with predictions that are not `shown`; one of them can be.

    names: the runs that have predictions.
    """
    others = [name for name in names if name not in shown or name == state["also"]]
    reasons = reasons_apart(data, runs, others)
    label = "Predictions of one more run"
    choose_from_list(label, list(reasons), "also", "none", reasons, on_change=change)


def predictions_of_another(
    data: Dataset, runs: Path, names: list[str], i: int
) -> list[Predictions]:
    """Return the predictions of the run that was chosen beside the newest, if they have image i.

    names: the runs that have predictions.
    """
    name = state["also"]
    if name is None or is_missing("also", names, f"with predictions in {panels.plain(str(runs))}"):
        return []
    try:
        run = load_predictions(data, runs, name)
    except UserError as error:
        st.warning(panels.message(str(error)))
        return []
    if not run.top[i]:
        st.info(f"{panels.plain(name)} has no prediction of this image.")
        return []
    return [run]


def show_where(data: Dataset, i: int, models: list[str], runs: Path) -> None:
    """Show, once it is asked for, where a run looks in image i, and where it looked at its start.

    models: the runs that have a model.
    """
    if not models:
        return
    choose_one("Where a run looks", BARS, "where", change)
    if state["where"] == "hidden":
        return
    reasons = models_apart(data, runs, models)
    models = list(reasons)
    if state["looker"] is None:
        used = [name for name in (state["run"], state["model"]) if name in models]
        state["looker"] = (used or models)[0]
    with st.container(horizontal=True):
        choose_from_list("Looking run", models, "looker", reasons=reasons, on_change=change)
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
    stamp = data.stamp + stamp_of_run(run) + stamp_of_start(run)
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
    stamps of the run (with its start) and of the picture changes.

    when: 'after' the run, or 'before', at its start. target: a class; None: the true one, and the
    one that the run predicts. sentence: looked for, too, unless it is empty.
    """
    from flowers.gallery.relevance import paint  # here, as it loads torch

    class_names, file = _data.flowers.class_names, _data.flowers.files[i]
    explainer = load_explainer(_data, run, when)
    if target:
        names = {target: "chosen class"}
    else:
        names = {class_names[_data.flowers.labels[i]]: "true class"}
        predicted = load_explainer(_data, run, "after").predict(file)
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


def choose_way(ways: Sequence[str], reasons: dict[str, str]) -> None:
    """Show buttons for colours or features, and a list of the runs that have features.

    ways: colours, and the runs. reasons: why a run stands apart from the others.
    """
    colours, *models = ways
    # The list only once it is needed: it takes the browser longer to load than the pictures do.
    state["near_by"] = colours if state["like"] == colours else FEATURES
    if state["like"] in models:
        state["_like"] = state["like"]  # for who comes back from the colours

    def choose() -> None:
        run = state["_like"] if state.get("_like") in models else models[0]
        change(like=colours if state["near_by"] == colours else run)

    choose_one("Nearest images by", (colours, FEATURES), "near_by", choose)
    if state["like"] != colours:
        choose_from_list("Run", models, "like", reasons=reasons, on_change=change)


def show_neighbours(data: Dataset, i: int, models: list[str], runs: Path) -> None:
    """Show the images nearest to image i, by colours or by the features of a run's model."""
    reasons = models_apart(data, runs, models)
    ways = ways_of(reasons)
    # An address may name a run that is not here: then there is something to go back to.
    if models or state["like"] != "colours":
        choose_way(ways, reasons)
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
