"""The pictures of a run, drawn into its folder: training curve, confusion matrix, mistakes.

The same numbers give the same bytes: nothing here is random, and no file holds a date.
"""

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from PIL import Image, ImageOps, ImageShow

from flowers.data import Flowers
from flowers.files import atomic
from flowers.images import read_picture

if TYPE_CHECKING:
    import pandas as pd

# No window, also where there is no screen: this comes before pyplot is imported.
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

# A name may hold dollar signs.
matplotlib.rcParams["text.parse_math"] = False

# Okabe and Ito's colours, in the order in which to use them: colour-blind readers tell them apart,
# and so does a printer without colour.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000"]
DARK_BLUE, LIGHT_BLUE, RED, LIGHT_RED = "#08519c", "#9ecae1", "#b2182b", "#f4a582"

# A wrong prediction: file, true name, predicted name and its probability.
Mistake = tuple[Path, str, str, float]


# -----------------------------------------------------------------------------
# saving and showing


def save(figure: Figure, path: Path, pdf: bool = False) -> Path:
    """Write a PNG at 150 dpi, and a PDF beside it on request, close the figure, and return `path`.

    Files are whole or not there, and have the same bytes each time.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # None leaves out what depends on the day and the version.
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    if pdf:
        undated = {"CreationDate": None, "Producer": None}
        with atomic(path.with_suffix(".pdf")) as file:
            figure.savefig(file, format="pdf", metadata=undated)
    plt.close(figure)
    return path


def show(paths: list[Path]) -> None:
    """Open saved pictures in the system's viewer; where there is none, print a warning."""
    for path in paths:
        with Image.open(path) as image:
            shown = ImageShow.show(image, title=path.name)
        if not shown:
            print(f"warning: no picture viewer here; see {path}", file=sys.stderr)


# -----------------------------------------------------------------------------
# placing thumbnails and labels


def spread(
    centres: np.ndarray,
    sizes: np.ndarray,
    bounds: tuple[float, float, float, float],
    steps: int = 2000,
) -> np.ndarray:
    """Push boxes apart until none overlaps another, each as little as it must: centres (n, 2).

    centres, sizes: (n, 2), width and height. bounds: left, bottom, right, top that the boxes stay
    within. If there is no room for all, some still overlap.
    """
    centres, sizes = np.array(centres, float), np.array(sizes, float)
    lowest = np.array(bounds[:2]) + sizes / 2
    highest = np.array(bounds[2:]) - sizes / 2
    # Boxes on the very same spot have no direction to part in: a fixed one for each pair.
    nudges = np.random.default_rng(0).normal(size=(len(centres), 2))
    nudges = nudges[:, None] - nudges[None]
    touching = (sizes[:, None] + sizes[None]) / 2  # (n, n, 2), the distance at which two touch
    for _ in range(steps):
        distance = centres[:, None] - centres[None]  # (n, n, 2), with its sign
        overlap = touching - abs(distance)
        np.einsum("iik->ik", overlap)[:] = 0  # a box does not overlap itself
        overlaps = (overlap > 1e-6).all(-1)  # (n, n)
        if not overlaps.any():
            break
        # The shorter way out is along the axis with less overlap.
        axis = overlap.argmin(-1)[..., None] == np.arange(2)
        direction = np.sign(np.where(distance == 0, nudges, distance))
        # Each of the two goes half of the way, and a thousandth more, so that they end apart.
        push = direction * (overlap + 1e-3) * axis * overlaps[..., None] / 2
        centres = np.clip(centres + push.sum(1), lowest, highest)
    return centres


def label_points(
    axis: Axes, points: Sequence[tuple[float, float, str]], fontsize: float = 6.5
) -> None:
    """Write a name beside each point (x, y, name), off all points and other names.

    A thin line joins a name to its point where it had to move away. A point without a name ("") is
    an obstacle only. Call it when the figure is otherwise finished: it measures in pixels.

    Each name takes the cheapest of 40 places around its point, from left to right. adjustText
    moves names by forces instead, and was visibly worse here: it left names over their own
    markers, on either side of them at random, and far away where a line of points is crowded.
    """
    figure = axis.figure
    # The layout decides where the axes are: draw once, and then keep it.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    axis.autoscale(False)
    to_pixels = axis.transData
    positions = to_pixels.transform([(x, y) for x, y, _ in points])  # (n, 2)
    radius = 4 * figure.dpi / 72  # of a marker, 4 points

    # Boxes that a name must not cover: centre x, centre y, half width, half height.
    taken = [(x, y, radius, radius) for x, y in positions]
    for i in np.lexsort(positions.T[::-1]):  # by x, then by y
        x, y, name = points[i]
        if not name:
            continue
        text = axis.text(x, y, name, fontsize=fontsize, ha="center", va="center")
        half = text.get_window_extent().size / 2 + 1  # a pixel of margin
        candidates = _places_around(positions[i], half, radius)
        costs = _costs(candidates, half, np.array(taken), axis.bbox.extents)
        place = candidates[costs.argmin()]
        text.set_position(to_pixels.inverted().transform(place))
        taken.append((*place, *half))

        # From the point to the edge of its name, where that is nearest.
        edge = np.clip(positions[i], place - half, place + half)
        if (abs(edge - positions[i]) > 1.5 * radius).any():
            line = to_pixels.inverted().transform([positions[i], edge])
            axis.plot(*line.T, color="grey", linewidth=0.5, zorder=0)
            taken += [(*pixel, 1, 1) for pixel in np.linspace(positions[i], edge, 10)]


def _places_around(point: np.ndarray, half: np.ndarray, radius: float) -> np.ndarray:
    """Centres (40, 2) for a name of half size `half` around a point, best first."""
    # Above, right, left, below, then the corners; and again a little further away.
    directions = [(0, 1), (1, 0), (-1, 0), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
    gaps = np.arange(5) * half[1]
    return np.array(
        [point + np.array(way) * (half + radius + gap) for gap in gaps for way in directions]
    )


def _costs(
    centres: np.ndarray, half: np.ndarray, taken: np.ndarray, extents: Sequence[float]
) -> np.ndarray:
    """What each centre (m, 2) of a name costs, (m,).

    3 for each square pixel that it covers of the boxes `taken` (n, 4), 1000 for each pixel that it
    reaches out of the axes, and 1 for each place that would come before it.
    """
    left, bottom, right, top = extents
    distance = abs(centres[:, None] - taken[None, :, :2])  # (m, n, 2)
    overlap = np.clip(half + taken[None, :, 2:] - distance, 0, None)
    covered = overlap.prod(2).sum(1)
    beyond_low = np.array([left, bottom]) - (centres - half)
    beyond_high = (centres + half) - np.array([right, top])
    outside = np.concatenate([beyond_low, beyond_high], axis=1).max(1).clip(min=0)
    return 3 * covered + 1000 * outside + np.arange(len(centres))


# -----------------------------------------------------------------------------
# the pictures of a run


def training_curve(rows: list[dict], path: Path, loss_name: str = "InfoNCE loss (nats)") -> Path:
    """Draw the loss of each step with its running mean, and the evaluations, if any, beside it.

    rows: those of metrics.jsonl. Returns `path`.
    """
    import pandas as pd  # here, as exploration draws without them
    import seaborn as sns

    steps = pd.DataFrame([row for row in rows if "train/loss" in row])
    evaluations = pd.DataFrame([row for row in rows if "val/top1" in row])
    if evaluations.empty:
        figure, loss_axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    else:
        figure, (loss_axis, val_axis) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")

    window = max(1, len(steps) // 50)
    # Every point is one row: there is nothing to average (estimator=None).
    options = {"x": "step", "estimator": None, "ax": loss_axis}
    sns.lineplot(
        steps, y="train/loss", color=LIGHT_BLUE, linewidth=0.8, label="each step", **options
    )
    if window > 1:
        smooth = steps.assign(mean=steps["train/loss"].rolling(window).mean())
        sns.lineplot(smooth, y="mean", color=DARK_BLUE, label=f"mean of {window} steps", **options)
        loss_axis.legend(frameon=False)
    else:
        loss_axis.get_legend().remove()
    loss_axis.set(xlabel="step", ylabel=loss_name, title="Training loss")

    if not evaluations.empty:
        sns.lineplot(
            evaluations,
            x="epoch",
            y="val/top1",
            estimator=None,
            color=DARK_BLUE,
            marker="o",
            markersize=4,
            markeredgewidth=0,
            ax=val_axis,
        )
        val_axis.set(ylabel="top-1 accuracy (%)", title="Held-out validation images")
    sns.despine(figure)
    return save(figure, path)


def count_confusions(labels: np.ndarray, predicted: np.ndarray, n_classes: int) -> np.ndarray:
    """How many images of each class (row) were given each name (column): (C, C) counts.

    labels, predicted: (N,) int.
    """
    # As scikit-learn's confusion_matrix, which exploration would have to wait for.
    cells = labels * n_classes + predicted
    return np.bincount(cells, minlength=n_classes**2).reshape(n_classes, n_classes)


def confusion_matrix(
    probabilities: np.ndarray, labels: np.ndarray, class_names: Sequence[str], path: Path
) -> Path:
    """Draw the percentage of each class's images (row) that are given each name (column).

    probabilities: (N, C); labels: (N,). Returns `path`.
    """
    import seaborn as sns  # here, as exploration draws without it

    predicted = probabilities.argmax(1)
    n_classes = len(class_names)
    counts = count_confusions(labels, predicted, n_classes)
    images = counts.sum(1, keepdims=True)
    percentages = 100 * counts / np.maximum(images, 1)  # a class without images has an empty row

    # Inches: enough for each name to stand beside its row, at most 102 of them on a page.
    side, fontsize = (0.16 * n_classes, 6) if n_classes > 40 else (0.26 * n_classes, 8)
    side = max(5, side)
    figure, axis = plt.subplots(figsize=(side + 1, side), layout="constrained")
    sns.heatmap(
        percentages,
        vmin=0,
        vmax=100,
        cmap="Blues",
        square=True,
        xticklabels=class_names,
        yticklabels=class_names,
        cbar_kws={"label": "share of the true class (%)", "fraction": 0.04},
        ax=axis,
    )
    axis.tick_params(axis="x", rotation=90, labelsize=fontsize)
    axis.tick_params(axis="y", rotation=0, labelsize=fontsize)
    axis.spines[:].set_visible(True)
    top1 = 100 * (predicted == labels).mean()
    axis.set(
        xlabel="predicted",
        ylabel="true",
        title=f"Confusion matrix, top-1 {top1:.1f}% of {len(labels):,} images",
    )
    return save(figure, path)


def reliability(table: "pd.DataFrame", confidence: np.ndarray, path: Path, title: str) -> Path:
    """Draw accuracy against confidence, a point for each bin, above a histogram of confidences.

    table: a row for each bin, with confidence and accuracy in percent, and the interval of the
    accuracy from low to high. confidence: of each image, (N,), from 0 to 1. Returns `path`.
    """
    figure, (axis, below) = plt.subplots(
        2,
        1,
        figsize=(4.2, 4.8),
        sharex=True,
        height_ratios=[3, 1],
        layout="constrained",
    )
    axis.plot([0, 100], [0, 100], color="grey", linewidth=0.8, linestyle="--", label="calibrated")
    # The ECE is the mean of these lengths over images.
    axis.vlines(
        table["confidence"],
        table["accuracy"],
        table["confidence"],
        color=LIGHT_RED,
        linewidth=4,
        label="gap",
    )
    distances = [table["accuracy"] - table["low"], table["high"] - table["accuracy"]]
    axis.errorbar(
        table["confidence"],
        table["accuracy"],
        yerr=np.maximum(distances, 0),
        fmt="o",
        markersize=4,
        color=DARK_BLUE,
        elinewidth=1,
        label="a bin, with 95% interval",
    )
    axis.set(ylim=(-2, 102), ylabel="accuracy (%)")
    axis.set_title(title, fontsize=10)
    below.hist(100 * confidence, bins=np.arange(0, 101, 5), color=LIGHT_BLUE, edgecolor="white")
    below.set(xlim=(-2, 102), xlabel="confidence: probability of the best class (%)")
    below.set_ylabel("images")
    # Outside, as the points may be anywhere.
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    for each in (axis, below):
        each.spines[["top", "right"]].set_visible(False)
    return save(figure, path)


def contact_sheet(flowers: Flowers, path: Path, per_class: int = 3, columns: int = 4) -> Path:
    """Draw the first images of every class side by side, under its name. Returns `path`."""
    n_rows = -(-len(flowers.class_names) // columns)
    figsize = (2.4 * columns, 1.05 * n_rows)
    figure, axes = plt.subplots(
        n_rows, columns, figsize=figsize, squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for c, (axis, name) in enumerate(zip(axes.flat, flowers.class_names)):
        first = np.flatnonzero(flowers.labels == c)[:per_class]
        thumbnails = [_thumbnail(flowers.files[i], side=160) for i in first]
        axis.imshow(np.concatenate(thumbnails, axis=1))
        axis.set_title(name, fontsize=8, pad=2)
    return save(figure, path)


def mistakes(probabilities: np.ndarray, flowers: Flowers, index: np.ndarray) -> list[Mistake]:
    """The wrong predictions, most confident first.

    probabilities: (N, C); index: (N,), the images' positions in `flowers`.
    """
    labels = flowers.labels[index]
    predicted = probabilities.argmax(1)
    confidence = probabilities.max(1)
    wrong = np.flatnonzero(predicted != labels)
    # Stable: images of equal confidence stay in the order of their files.
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")]
    names = flowers.class_names
    return [
        (flowers.files[index[i]], names[labels[i]], names[predicted[i]], float(confidence[i]))
        for i in wrong
    ]


def mistakes_sheet(rows: Sequence[Mistake], path: Path, most: int = 24) -> Path:
    """Draw the first of `mistakes`: the true name above, the predicted one below each picture."""
    cells = []
    for file, label, prediction, probability in rows[:most]:
        cells.append((file, label, f"{prediction} ({100 * probability:.0f}%)", RED))
    title = "No mistakes"
    if rows:
        title = (
            f"The {len(cells)} most confident of {len(rows):,} mistakes: "
            "true name above, prediction below"
        )
    return picture_sheet(cells, path, title)


def answers_sheet(
    rows: Sequence[dict], answers: Sequence[str], image_files: Sequence[Path], path: Path
) -> Path:
    """Draw up to 24 images, spread evenly: the true name above, the answer in words below.

    rows: N of predictions.csv. Answers are blue where they are right, and orange where they are
    wrong.
    """
    positions = np.linspace(0, len(rows) - 1, min(24, len(rows))).round().astype(int)
    cells = []
    n_right = 0
    for j in np.unique(positions):
        label = rows[j]["label"]
        answer = textwrap.shorten(answers[j], 60, placeholder=" …") or "(nothing)"
        if rows[j]["top1"] == label:
            n_right += 1
            below, colour = f"✓ {answer}", PALETTE[0]
        else:
            below, colour = f"✗ {answer}", PALETTE[1]
        cells.append((image_files[j], label, below, colour))
    title = f"True name above, answer below: {n_right} of {len(cells)} right (blue, ✓)"
    return picture_sheet(cells, path, title, border=7)


def picture_sheet(
    cells: Sequence[tuple[Path, str, str, str]],
    path: Path,
    title: str,
    border: int = 0,
    columns: int = 6,
) -> Path:
    """Draw pictures with a text above and one below each. Returns `path`.

    cells: file, text above, text below (lines), and the colour of the text below and the border.
    border: its width in pixels, of 200 that a picture has.
    """
    n_rows = max(1, -(-len(cells) // columns))
    figsize = (1.8 * columns, 2.3 * n_rows + 0.5)
    figure, axes = plt.subplots(
        n_rows, columns, figsize=figsize, squeeze=False, layout="constrained"
    )
    figure.suptitle(title)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (file, above, below, colour) in zip(axes.flat, cells):
        lines = [textwrap.fill(line, 24) for line in below.splitlines()]
        axis.imshow(_thumbnail(file, side=200, border=border, colour=colour))
        axis.set_title(textwrap.fill(above, 22), fontsize=8, pad=3)
        axis.text(
            0.5,
            -0.03,
            "\n".join(lines),
            fontsize=8,
            color=colour,
            ha="center",
            va="top",
            transform=axis.transAxes,
        )
    return save(figure, path)


def _thumbnail(file: Path, side: int, border: int = 0, colour: str = "white") -> np.ndarray:
    """The middle of a picture as a square of `side` pixels, with a border around it."""
    square = ImageOps.fit(Image.fromarray(read_picture(file)), (side, side))
    return np.asarray(ImageOps.expand(square, border, colour))
