"""The view Map: all images, those that look alike close together."""

from pathlib import Path

import numpy as np
import streamlit as st

from flowers.gallery import atlas, panels
from flowers.page.choices import (
    COLOURINGS,
    NAMES_OF_COLOURINGS,
    change,
    change_filter,
    is_missing,
    state,
    ways_of,
)
from flowers.page.kept import (
    Dataset,
    load_predictions,
    load_searcher,
    models_apart,
    reasons_apart,
    result_of,
    searcher_of,
    start_hover_pictures,
    start_map,
)
from flowers.page.widgets import (
    ALL_CLASSES,
    Listing,
    choose_from_list,
    choose_one,
    filters,
    wait_for_colours,
)

MAP_WIDTH = 1100  # pixels, at most


def show_map(data: Dataset, runs: Path, models: list[str], predicted: list[str]) -> Listing | None:
    """Show a map of all images; return those in the box that is drawn on it, if there is one.

    models: the runs that have a model. predicted: those that have predictions.
    """
    flowers = data.flowers
    is_shown = state["image"] is None  # one image is shown without the map
    ways = ways_of(models_apart(data, runs, models))
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
        choose_from_list("Class", sorted(data.flowers.class_names), "class", ALL_CLASSES)


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

    # The chart keeps what is drawn on it, and is told of a box once, when it is new: a box that
    # comes from the address, or is removed by the button, makes a new one.
    if state["box"] != state.get("_drawn"):
        state["_charts"] = state.get("_charts", 0) + 1
    key = f"map-{state['laid']}-{state.get('_charts', 0)}"  # another map begins without a box
    if key not in state:
        state["_given"] = state["_drawn"] = state["box"]

    def box_drawn() -> None:
        selection = state.get(key, {}).get("selection", {}).get(atlas.SELECTION, {})
        box = atlas.box_text(selection)
        if box != state["box"]:
            change_filter()
            change(box=box, _drawn=box)

    arguments = (data.thumbnails, data.stamp)
    pictures = result_of(start_hover_pictures, arguments, "Making small pictures")
    names = np.array(data.flowers.class_names)[data.flowers.labels]
    box = atlas.parse_box(state["_given"])
    chart = atlas.chart(places, groups, data.ids, names, pictures, box)
    st.caption(
        "Each dot is an image, those that look alike close together (Isomap). Draw a box with the "
        "mouse to see its images below; the button below the map removes it."
    )
    with st.container(width=MAP_WIDTH):  # a window may be so wide that distances mean nothing
        st.altair_chart(chart, key=key, on_select=box_drawn)
    if state["box"]:
        nothing = {"box": "", "page": 1}
        st.button("Remove the box", on_click=change, kwargs=nothing, key="remove_box")
