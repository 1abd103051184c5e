"""The pictures of a run, drawn into its folder: training curve, confusion matrix, contact sheet of mistakes."""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageOps, ImageShow

from flowers.data import Flowers
from flowers.files import atomic

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first: no window, also where there is no screen)

matplotlib.rcParams["text.parse_math"] = False  # a name may hold dollar signs

# Okabe and Ito's palette: told apart by colour-blind readers and in print; in the order in which to use it
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000"]


def save(figure, path: Path, pdf: bool = False) -> Path:
    """Write a PNG at 150 dpi (and a PDF beside it), whole or not at all and the same bytes each time, and close the figure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    if pdf:
        with atomic(path.with_suffix(".pdf")) as file:
            figure.savefig(file, format="pdf", metadata={"CreationDate": None, "Producer": None})
    plt.close(figure)
    return path


def add_figure_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("figures")
    group.add_argument(
        "--output",
        type=Path,
        default=Path("figures"),
        help="folder of the figures (default: %(default)s)",
    )
    group.add_argument("--pdf", action="store_true", help="save each also as PDF")
    group.add_argument(
        "--show",
        action="store_true",
        help="open them in the system's picture viewer (default: no window)",
    )


def show(paths: list[Path]) -> None:
    """Open saved pictures in the system's viewer; where there is none, say so."""
    for path in paths:
        with Image.open(path) as image:
            if not ImageShow.show(image, title=path.name):
                print(f"warning: no picture viewer here; see {path}", file=sys.stderr)


def spread(
    centres: np.ndarray,
    sizes: np.ndarray,
    bounds: tuple[float, float, float, float],
    steps: int = 2000,
) -> np.ndarray:
    """Push boxes apart until none overlaps another, each as little as it must: new centres (n, 2).

    centres, sizes: (n, 2), width and height; bounds: left, bottom, right, top that the boxes stay within.
    If there is no room for all, some still overlap.
    """
    centres, sizes = np.array(centres, float), np.array(sizes, float)
    low, high = np.array(bounds[:2]) + sizes / 2, np.array(bounds[2:]) - sizes / 2
    nudge = np.random.default_rng(0).normal(size=(len(centres), 2))
    for _ in range(steps):
        apart = centres[:, None] - centres[None]
        overlap = (sizes[:, None] + sizes[None]) / 2 - abs(apart)
        np.einsum("iik->ik", overlap)[:] = 0
        hit = (overlap > 1e-6).all(-1)
        if not hit.any():
            break
        axis = overlap.argmin(-1)[..., None] == np.arange(2)  # the shorter way out
        way = np.where(apart == 0, nudge[:, None] - nudge[None], apart)
        push = (np.sign(way) * (overlap + 1e-3) * axis * hit[..., None] / 2).sum(
            1
        )  # both make half of the way
        centres = np.clip(centres + push, low, high)
    return centres


def label_points(axis, points: list[tuple[float, float, str]], fontsize: float = 6.5) -> None:
    """Write a name beside each point (x, y, name), off all points and other names, with a thin line where it had to move away.

    A point without a name ("") is an obstacle only. Call it when the figure is otherwise finished: places are counted in its pixels.
    """
    figure = axis.figure
    figure.draw_without_rendering()  # the layout decides where the axes are
    figure.set_layout_engine("none")
    axis.autoscale(False)
    at, dot = axis.transData.transform([p[:2] for p in points]), 4 * figure.dpi / 72
    left, bottom, right, top = axis.bbox.extents
    taken = [(*p, dot, dot) for p in at]  # centre, half width, half height
    directions = [(0, 1), (1, 0), (-1, 0), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
    for point, (x, y, name) in sorted(zip(at, points), key=lambda pair: pair[0].tolist()):
        if not name:
            continue
        text = axis.text(x, y, name, fontsize=fontsize, ha="center", va="center")
        half = text.get_window_extent().size / 2 + 1
        places = [
            point + np.array(d) * (half + dot + far)
            for far in np.arange(5) * half[1]
            for d in directions
        ]

        def cost(i):
            (x, y), boxes = places[i], np.array(taken)
            over = (
                np.clip(half + boxes[:, 2:] - abs(places[i] - boxes[:, :2]), 0, None).prod(1).sum()
            )
            outside = max(
                0, left + half[0] - x, x + half[0] - right, bottom + half[1] - y, y + half[1] - top
            )
            return 3 * over + 1000 * outside + i

        place = places[min(range(len(places)), key=cost)]
        text.set_position(axis.transData.inverted().transform(place))
        taken.append((*place, *half))
        edge = np.clip(
            point, place - half, place + half
        )  # of the text, where it is nearest to its point
        if (abs(edge - point) > 1.5 * dot).any():
            axis.plot(
                *axis.transData.inverted().transform([point, edge]).T,
                color="grey",
                linewidth=0.5,
                zorder=0,
            )
            taken += [(*p, 1, 1) for p in np.linspace(point, edge, 10)]


def training_curve(rows: list[dict], path: Path, loss_name: str = "InfoNCE loss (nats)") -> Path:
    """Loss a step with its running mean, and the evaluations, if any, on a second panel; rows are those of metrics.jsonl."""
    steps = [r for r in rows if "train/loss" in r]
    evaluations = [r for r in rows if "val/top1" in r]
    figure, axes = plt.subplots(
        1,
        2 if evaluations else 1,
        figsize=(9 if evaluations else 5, 3.2),
        squeeze=False,
        layout="constrained",
    )
    x, loss = np.array([r["step"] for r in steps]), np.array([r["train/loss"] for r in steps])
    width = max(1, len(x) // 50)
    axes[0, 0].plot(x, loss, color="#9ecae1", linewidth=0.8, label="each step")
    if width > 1:
        mean = np.convolve(loss, np.ones(width) / width, "valid")
        axes[0, 0].plot(x[width - 1 :], mean, color="#08519c", label=f"mean of {width} steps")
        axes[0, 0].legend(frameon=False)
    axes[0, 0].set(xlabel="step", ylabel=loss_name, title="Training loss")
    if evaluations:
        axes[0, 1].plot(
            [r["epoch"] for r in evaluations],
            [r["val/top1"] for r in evaluations],
            marker="o",
            markersize=3,
            color="#08519c",
        )
        axes[0, 1].set(
            xlabel="epoch", ylabel="top-1 accuracy (%)", title="Held-out validation images"
        )
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return save(figure, path)


def confusion_matrix(
    probabilities: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...], path: Path
) -> Path:
    """Share of each class's images (row) that are given each name (column)."""
    predicted, n = probabilities.argmax(1), len(class_names)
    counts = np.bincount(labels * n + predicted, minlength=n * n).reshape(n, n)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = max(5, 0.16 * n if n > 40 else 0.26 * n)
    figure, axis = plt.subplots(figsize=(side + 1, side), layout="constrained")
    picture = axis.imshow(100 * share, cmap="Blues", vmin=0, vmax=100)
    axis.set_xticks(range(n), class_names, rotation=90, fontsize=6 if n > 40 else 8)
    axis.set_yticks(range(n), class_names, fontsize=6 if n > 40 else 8)
    axis.set(
        xlabel="predicted",
        ylabel="true",
        title=f"Confusion matrix, top-1 {100 * (predicted == labels).mean():.1f}% of {len(labels):,} images",
    )
    figure.colorbar(picture, ax=axis, label="share of the true class (%)", fraction=0.04)
    return save(figure, path)


def contact_sheet(flowers: Flowers, path: Path, per_class: int = 3, columns: int = 4) -> Path:
    """The first images of every class side by side, under its name."""
    lines = -(-len(flowers.class_names) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(2.4 * columns, 1.05 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for c, (axis, name) in enumerate(zip(axes.flat, flowers.class_names)):
        row = []
        for i in np.flatnonzero(flowers.labels == c)[:per_class]:
            with Image.open(flowers.files[i]) as image:
                row.append(np.asarray(ImageOps.fit(image.convert("RGB"), (160, 160))))
        axis.imshow(np.concatenate(row, axis=1))
        axis.set_title(name, fontsize=8, pad=2)
    return save(figure, path)


def mistakes(
    probabilities: np.ndarray, flowers: Flowers, index: np.ndarray
) -> list[tuple[Path, str, str, float]]:
    """The wrong predictions, most confident first: file, true name, given name, its probability."""
    best, predicted = probabilities.max(1), probabilities.argmax(1)
    wrong = np.flatnonzero(predicted != flowers.labels[index])
    names = flowers.class_names
    return [
        (
            flowers.files[index[i]],
            names[flowers.labels[index[i]]],
            names[predicted[i]],
            float(best[i]),
        )
        for i in wrong[np.argsort(-best[wrong], kind="stable")]
    ]


def mistakes_sheet(rows: list[tuple[Path, str, str, float]], path: Path, most: int = 24) -> Path:
    """The first rows of `mistakes`: picture, true name above, given name and its probability below."""
    shown = [
        (file, label, f"{given} ({100 * probability:.0f}%)", "#b2182b")
        for file, label, given, probability in rows[:most]
    ]
    title = (
        f"The {len(shown)} most confident of {len(rows):,} mistakes: true name above, prediction below"
        if rows
        else "No mistakes"
    )
    return picture_sheet(shown, path, title)


def picture_sheet(
    cells: Sequence[tuple[Path, str, str, str]],
    path: Path,
    title: str,
    border: int = 0,
    columns: int = 6,
) -> Path:
    """Pictures with a text above and one below; cells: file, both texts, and the colour of the lower one and of the border."""
    lines = max(1, -(-len(cells) // columns))
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(1.8 * columns, 2.3 * lines + 0.5),
        squeeze=False,
        layout="constrained",
    )
    figure.suptitle(title)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (file, above, below, colour) in zip(axes.flat, cells):
        with Image.open(file) as image:
            axis.imshow(
                np.asarray(
                    ImageOps.expand(ImageOps.fit(image.convert("RGB"), (200, 200)), border, colour)
                )
            )
        axis.set_title(textwrap.fill(above, 22), fontsize=8, pad=3)
        axis.text(
            0.5,
            -0.03,
            textwrap.fill(below, 24),
            fontsize=8,
            color=colour,
            ha="center",
            va="top",
            transform=axis.transAxes,
        )
    return save(figure, path)
