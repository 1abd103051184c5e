"""The view Runs of one run or several: their accuracies, and the pictures by what they say."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import streamlit as st

from flowers import UserError
from flowers.data import Flowers
from flowers.gallery import panels
from flowers.gallery.address import MOST_RUNS
from flowers.gallery.predictions import (
    Predictions,
    RunFolder,
    likely_label_errors,
    names_with,
    outcomes,
)
from flowers.intervals import holm
from flowers.page.choices import (
    GUESSERS,
    NAMES_OF_ORDERS,
    NAMES_OF_SHOWS,
    ONLY,
    ORDERS,
    PARTS,
    change,
    change_filter,
    is_missing,
    state,
)
from flowers.page.classes import MCNEMAR_OF_TWO, show_classes, show_confusion
from flowers.page.kept import Dataset, load_predictions, reasons_apart
from flowers.page.runs import show_runs
from flowers.page.widgets import (
    ALL_CLASSES,
    Listing,
    choose_from_list,
    choose_one,
    draw,
    filters,
    training_command,
    with_reason,
)

EXPLAINED = {
    "doubted": "Another class is likelier than is usual for images of that class, by the mean of "
    "these runs (confident learning, Northcutt et al. 2021). The likeliest errors come first; most "
    "are mistakes of the runs, and some are of the label.",
    "alike": "One photograph twice, or photographs that hardly differ, group by group: intervals "
    "count a group as one image.",
}
MCNEMAR = f"{MCNEMAR_OF_TWO} Of several runs, corrected for their number (Holm)."


def compare_runs(
    data: Dataset, runs: Path, folders: list[RunFolder], names: list[str]
) -> Listing | None:
    """Show all runs, or what some predicted; return the images of the chosen outcome, if any.

    folders: of all runs. names: those that have predictions.
    """
    flowers = data.flowers
    # Without any settings, a table would say nothing.
    if state["run"] is None and names_with(folders, "args.json", "result.json"):
        if state["image"] is None:  # one image is shown without the table
            show_runs(runs, [folder.name for folder in folders], names)
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
    if state["image"] is None:  # one image is shown without them
        show_accuracies(flowers, predictions, images_of["all"], clusters)
    if state["part"] == "classes":
        return show_classes(flowers, predictions, images_of["all"], clusters)
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


def choose_runs(names: list[str], reasons: dict[str, str]) -> None:
    """Show the lists that a run and those that it is compared with are chosen from, and the part.

    names: the runs that have predictions. reasons: why some of them are listed apart.
    """
    state["other"] = [name for name in state["other"] if name != state["run"]]
    others = [name for name in names if name != state["run"]]
    gone = [name for name in state["other"] if name not in others]  # `is_missing` says so
    with st.container(horizontal=True, vertical_alignment="bottom"):
        # There those are ticked that have been compared.
        ticked = [state["run"], *state["other"]]
        all_runs = {"run": None, "other": [], "image": None, "page": 1, "ticked": ticked}
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
    won, lost = f"right where {first} is wrong", f"wrong where {first} is right"  # images
    rows = []
    for k, (run, right) in enumerate(zip(predictions, correct)):
        mean, low, high = mean_interval(right[None], clusters)
        interval = f"{low:.1f} to {high:.1f}"
        row = {"run": run.name, "top-1 (%)": f"{mean:.2f}", "95% interval": interval}
        if k > 0:
            change, low, high = difference_interval(right[None], correct[0][None], clusters)
            only_this, only_first, _ = tests[k - 1]
            row |= {
                difference: f"{change:+.2f}",
                "95% interval of the difference": f"{low:+.1f} to {high:+.1f}",
                won: str(only_this),
                lost: str(only_first),
                "p": f"{p_values[k - 1]:.3g}",
            }
        rows.append(row)
    st.caption(compared_images(predictions, index))
    # Of six rows at most: no table of Streamlit's, whose code the browser would have to load.
    draw(panels.table(rows, {"p": MCNEMAR}), "accuracies")


def compared_images(predictions: list[Predictions], index: np.ndarray) -> str:
    """Return of how many images the page speaks, those at `index`, and how many each run predicted
    where that is not the same.
    """
    counts = {panels.plain(run.name): len(run.index) for run in predictions}
    if set(counts.values()) == {len(index)}:
        return f"Of {len(index):,} images"
    of_each = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return f"Of {len(index):,} images that all predicted ({of_each})"


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
    only = {key: f"only {panels.plain(run.name)} right" for key, run in zip(ONLY, predictions)}
    with filters():
        choose_one(f"Right and wrong{by}", shows, "show", names=NAMES_OF_SHOWS | only)
        choose_from_list("True class", names, "class", ALL_CLASSES)
        by_any = " by any of these" if len(predictions) > 1 and state["guesser"] == "any" else by
        choose_from_list(f"Predicted class{by_any}", names, "guess", ALL_CLASSES)
        if len(predictions) > 1:
            called = {"first": panels.plain(predictions[0].name), "any": "any of these"}
            choose_one("It is predicted by", GUESSERS, "guesser", names=called)
        choose_one(f"Order (confidence{by})", ORDERS, "order", names=NAMES_OF_ORDERS)
        st.slider(f"Confidence{by} (%)", 0, 100, key="sure", on_change=change_filter, width=260)
    if len(predictions) > 1:
        said = ", then ".join(panels.plain(run.name) for run in predictions)
        caption = f"Under each picture: what {said} says."
        if len(predictions) == 2:
            one, two = (panels.plain(run.name) for run in predictions)
            caption += f" Wrong → right: {one} is wrong, {two} is right."
        st.caption(caption)
    kinds = kinds_of_probabilities(predictions)
    if kinds:
        st.caption(kinds)
    if state["show"] in EXPLAINED:
        st.caption(EXPLAINED[state["show"]])


def kinds_of_probabilities(predictions: Sequence[Predictions]) -> str:
    """Return which runs' probabilities are calibrated, in words; empty if none are."""
    calibrated = [run for run in predictions if run.temperature is not None]
    if not calibrated:
        return ""
    from flowers.calibration import temperature_in_words  # here, as it loads scipy

    in_words = [f"{run.name} is {temperature_in_words(run.temperature)}" for run in calibrated]
    said = ", ".join(map(panels.plain, in_words))
    others = [panels.plain(run.name) for run in predictions if run.temperature is None]
    if not others:
        return f"Probabilities: {said}."
    mixed = (
        "The percentages of these runs are not of one kind, and can't be compared: "
        f"{said}; not calibrated: {', '.join(others)}."
    )
    if state["show"] == "doubted":
        mixed += (
            " Labels in doubt are found by the mean of these percentages, though they are of two "
            "kinds."
        )
    return mixed
