"""A map of all images, on which images that look alike lie close together."""

import base64
import hashlib
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from flowers import UserError, cache, opencv_import
from flowers.data import Flowers
from flowers.gallery.predictions import NO_CLASS, Predictions
from flowers.gallery.thumbnails import Thumbnails, in_threads, read_thumbnail

with opencv_import():
    import cv2

if TYPE_CHECKING:
    import altair

FORMAT = 1  # raise it when the map of the same features changes
NEIGHBOURS = 10  # of the graph, as data_Exploration/isomap.py has them between images
FEWEST = 3  # images of a map
# The pictures that are shown under the mouse, 0.4 kB each: all are sent with each map.
HOVER_SIDE = 48  # pixels
HOVER_QUALITY = 10  # of WebP

SELECTION = "box"  # the name of what a visitor selects
# Colour-blind safe (Okabe and Ito 2008), and seen on light and dark.
COLOURS = ("#0072b2", "#d55e00", "#009e73")
GREY = "#9994"
REST = ("other", "no split", "not predicted")  # drawn in grey, below the others
RIGHT, WRONG = "right", "wrong"

# -----------------------------------------------------------------------------
# where the images lie


def image_map(flowers: Flowers, features: np.ndarray) -> np.ndarray:
    """Return the place of each image on the map (N, 2) float32; nan where features are nan.

    features: of the N images, (N, D). Isomap (Tenenbaum et al. 2000): distances on the map are as
    near as they can be to the lengths of the shortest paths from image to near image. It is
    computed once and kept in the dataset's cache folder. Raises UserError for too few images.
    """
    readable = ~np.isnan(features).any(1)
    if readable.sum() < FEWEST:
        raise UserError(f"a map needs {FEWEST} images at least; {readable.sum()} can be read")
    content = hashlib.sha256(np.ascontiguousarray(features)).digest()
    key = cache.key_of(FORMAT, NEIGHBOURS, content)
    path = cache.array_path(flowers.root, f"map-{key.hex()[:8]}", flowers.files)

    def rows() -> Iterator[np.ndarray]:
        places = np.full((len(features), 2), np.nan, np.float32)
        places[readable] = isomap(features[readable])
        yield places

    return np.array(cache.cached_array(path, key, (len(features), 2), "<f4", rows))


def isomap(features: np.ndarray) -> np.ndarray:
    """Return Isomap's map (N, 2) of features (N, D)."""
    from sklearn.manifold import Isomap  # takes a second, and most visitors open no map

    n = len(features)
    # Exact; for more images scikit-learn chooses ARPACK, which takes less time and memory.
    solver = "dense" if n < 300 else "auto"
    model = Isomap(n_neighbors=min(NEIGHBOURS, n - 1), n_components=2, eigen_solver=solver)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a graph in pieces, which is joined where they are near
        return model.fit_transform(features)


def parse_box(text: str) -> tuple[float, float, float, float] | None:
    """Return left, right, bottom and top of a box that an address names; None if it names none."""
    number = r"(-?[0-9]{1,6}(?:\.[0-9]{1,6})?)"
    match = re.fullmatch(",".join([number] * 4), text)
    return tuple(float(end) for end in match.groups()) if match else None


def box_text(selection: dict) -> str:
    """Return the box that a visitor has drawn as parse_box reads it; empty for none.

    selection: the ends of the box on each axis, {"x": [left, right], "y": [bottom, top]}.
    """
    ends = [end for axis in ("x", "y") for end in sorted(selection.get(axis, ()))]
    return ",".join(f"{end:.3f}" for end in ends) if len(ends) == 4 else ""


def in_box(places: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """Return which places (N, 2) lie in a box, (N,) bool."""
    left, right, bottom, top = box
    x, y = places.T
    return (x >= left) & (x <= right) & (y >= bottom) & (y <= top)


# -----------------------------------------------------------------------------
# what their colours mean: the name of a group for each image, (N,) str


def classes_of(flowers: Flowers, name: str | None) -> np.ndarray:
    """Return the class of each image; if one is chosen by `name`, that one and REST."""
    names = np.array(flowers.class_names)[flowers.labels]
    return names if name is None else np.where(names == name, name, REST[0])


def splits_of(splits: np.ndarray) -> np.ndarray:
    """Return the split of each image, from names that are empty for an image of no split."""
    return np.where(splits == "", REST[1], splits)


def outcomes_of(flowers: Flowers, run: Predictions) -> np.ndarray:
    """Return whether a run is right about each image."""
    outcomes = np.where(run.guess == flowers.labels, RIGHT, WRONG)
    return np.where(run.guess == NO_CLASS, REST[2], outcomes)


# -----------------------------------------------------------------------------
# the chart


def hover_pictures(thumbnails: Thumbnails) -> list[str]:
    """Return a small picture of each image, as a WebP in base64."""

    def small(i: int) -> str:
        rgb = read_thumbnail(thumbnails[i])
        square = cv2.resize(rgb, (HOVER_SIDE, HOVER_SIDE), interpolation=cv2.INTER_AREA)
        quality = [cv2.IMWRITE_WEBP_QUALITY, HOVER_QUALITY]
        _, webp = cv2.imencode(".webp", square[..., ::-1], quality)
        return base64.b64encode(webp).decode()

    return list(in_threads(small, range(len(thumbnails.files))))


def chart(
    places: np.ndarray,
    groups: np.ndarray,
    ids: np.ndarray,
    names: np.ndarray,
    pictures: list[str],
    box: tuple[float, float, float, float] | None,
) -> "altair.Chart":
    """Return a chart with a dot for each image that has a place.

    places: (N, 2). groups: what each dot is coloured by, (N,) str. ids, names, pictures: what is
    shown under the mouse, (N,) each; see hover_pictures. box: what is selected when the chart is
    opened.
    """
    import altair
    import pandas as pd

    shown = sorted(set(groups.tolist()) - set(REST))
    rest = [name for name in REST if name in groups]
    table = pd.DataFrame({"x": places[:, 0], "y": places[:, 1]})
    # As numbers, each name once: all of this is sent to the browser at each click.
    table["group"] = pd.Categorical(groups)
    table["name"] = pd.Categorical(names)
    table["id"] = ids.astype(np.int32)
    table["webp"] = pictures
    table = table[~np.isnan(places[:, 0])]
    # The grey dots first, below the others.
    table = table.sort_values("group", key=lambda group: ~group.isin(REST), kind="stable")

    few = len(shown) <= len(COLOURS)
    colours = {"range": [*COLOURS[: len(shown)], *[GREY] * len(rest)]}
    colours = {"domain": [*shown, *rest], **colours} if few else {"scheme": "sinebow"}
    legend = altair.Legend(title=None, orient="top", symbolOpacity=1) if few else None
    value = {"x": box[:2], "y": box[2:]} if box else altair.Undefined
    selection = altair.selection_interval(name=SELECTION, encodings=["x", "y"], value=value)
    axes = {"axis": None, "scale": altair.Scale(zero=False)}
    dots = altair.Chart(table, height=640).mark_circle(size=26, opacity=0.8)
    # Named as the browser's tooltip wants them: a heading, and a picture.
    dots = dots.transform_calculate(
        title="datum.id + ' ' + datum.name", image="'data:image/webp;base64,' + datum.webp"
    )
    return dots.encode(
        x=altair.X("x:Q", **axes),
        y=altair.Y("y:Q", **axes),
        color=altair.Color("group:N", scale=altair.Scale(**colours), legend=legend),
        tooltip=["title:N", "image:N"],
    ).add_params(selection)
