"""The colours of a class: kernel densities of hue, saturation and value.

    python data_Exploration/class_distribution.py --class rose --class 7     # by name or number
    python data_Exploration/class_distribution.py --all --mask grabcut       # a page of all classes
    python data_Exploration/class_distribution.py --data_root sample --class sunflower   # offline

Hue is an angle, so its density wraps around; pixels weigh by chroma, since grey has no hue. The
colours of all images are measured once (5,868 images: half a minute on two cores, with grabcut two)
and kept beside the data. Saves figures/colours_<classes>.png or figures/colours_all.png.
"""

import argparse
import re
from pathlib import Path
from typing import NamedTuple

from flowers import UserError, command
from flowers.choices import MASKS, add_figure_arguments
from flowers.data import add_data_arguments

MAX_CLASSES = 8  # in one comparison: as many as the palette has colours


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser, splits=False)
    # what is drawn
    parser.add_argument(
        "--class",
        dest="classes",
        action="append",
        default=[],
        metavar="NAME|ID",
        help="name or 1-based number of a class; repeated, "
        f"up to {MAX_CLASSES} are drawn over each other",
    )
    parser.add_argument("--all", action="store_true", help="all classes on a page, ordered by hue")
    parser.add_argument(
        "--mask",
        choices=MASKS,
        default="centre",
        help="pixels that count: all, a disc in the centre, or what GrabCut takes for the flower "
        "(default: %(default)s)",
    )
    add_figure_arguments(parser)

    args = parser.parse_args()
    if args.all == bool(args.classes) or len(args.classes) > MAX_CLASSES:
        raise UserError(f"name 1 to {MAX_CLASSES} classes with --class, or give --all")
    return args


if __name__ == "__main__":
    args = command(parse_arguments)()  # before matplotlib is imported: see flowers.command

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb

from flowers import colour, figures
from flowers.colour import load_colours
from flowers.data import find_class, open_from_flags

plt = figures.plt


class Channel(NamedTuple):
    """One of the three axes of HSV, as it is drawn."""

    bins: slice  # where its histogram is in a row of colours
    label: str
    unit: str
    top: int  # the greatest value in that unit


CHANNELS = (
    Channel(colour.HUE, "hue (degrees)", "degree", 360),
    Channel(colour.SATURATION, "saturation (%)", "%", 100),
    Channel(colour.VALUE, "value (%)", "%", 100),
)
GRID = np.linspace(0, 1, 361)  # where densities are computed, in parts of a channel's range
# matplotlib's -, --, -. and : as seaborn takes them: lengths of dashes and gaps, in line widths
DASHES = ["", (3.7, 1.6), (6.4, 1.6, 1, 1.6), (1, 1.65)]
MASK_NAMES = {
    "none": "all pixels",
    "centre": "the central disc",
    "grabcut": "GrabCut's foreground",
}

# -----------------------------------------------------------------------------
# drawing


def mean_hue(row: np.ndarray) -> float:
    """Return the mean hue of a row of colours, in [0, 1)."""
    direction, _ = colour.circular_mean(row[colour.HUE])
    return float(direction)


def channel_colours(channel: Channel, hue: float) -> np.ndarray:
    """Return the colours along a channel's axis, RGB (1, G, 3) in [0, 1].

    Along hue all hues; along saturation one hue from grey to full, along value from black to full.
    """
    hsv = np.ones((len(GRID), 3))
    hsv[:, 0] = hue
    hsv[:, CHANNELS.index(channel)] = GRID
    return hsv_to_rgb(hsv)[None]


def fill_with_colours(
    axis: Axes,
    channel: Channel,
    hue: float,
    bottom: float,
    curve: np.ndarray,
    height: float,
    zorder: int = 0,
) -> None:
    """Fill the area between `bottom` and a curve (G,) with the colours of a channel.

    The colours change along x and reach up to `bottom` + `height`, which the curve stays below.
    """
    extent = (0, channel.top, bottom, bottom + height)
    colours = channel_colours(channel, hue)
    picture = axis.imshow(colours, extent=extent, aspect="auto", zorder=zorder)
    # matplotlib can't fill with a gradient: the picture is cut out by the area's outline
    area = axis.fill_between(channel.top * GRID, bottom, curve, color="none")
    picture.set_clip_path(area.get_paths()[0], axis.transData)


def draw_channel(axis: Axes, channel: Channel, rows: dict[str, np.ndarray], hue: float) -> None:
    """Draw the densities of one channel, a curve a class, above a band of the colours."""
    import seaborn  # here, as it takes a second, and a mistake in a flag is answered without

    # a density is per unit of the axis: per degree, per percent
    x = channel.top * GRID
    densities = {}
    for name, row in rows.items():
        densities[name] = colour.density(row, channel.bins, GRID) / channel.top
    table = pd.DataFrame(densities, index=x)
    peak = table.to_numpy().max()

    # one class alone needs no colour to tell it from others
    single = len(rows) == 1
    palette = ["black"] if single else figures.PALETTE[: len(rows)]
    dashes = [DASHES[i % len(DASHES)] for i in range(len(rows))]
    seaborn.lineplot(table, ax=axis, palette=palette, dashes=dashes, linewidth=1.4, legend=False)
    if single:
        (curve,) = densities.values()
        fill_with_colours(axis, channel, hue, 0, curve, 1.08 * peak)
    # the band lies below zero, where no density is
    band = (0, channel.top, -0.09 * peak, -0.02 * peak)
    axis.imshow(channel_colours(channel, hue), extent=band, aspect="auto", zorder=0)

    axis.set(xlim=(0, channel.top), ylim=(-0.09 * peak, 1.08 * peak))
    axis.set(xlabel=channel.label, ylabel=f"density (1/{channel.unit})")
    axis.set_xticks(np.linspace(0, channel.top, 5))
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def draw_classes(rows: dict[str, np.ndarray], path: Path, pdf: bool, title: str) -> Path:
    """Draw three panels with a curve a class; one class alone is filled with its colours.

    rows: class name to row of colours.
    """
    figure, axes = plt.subplots(1, 3, figsize=(7.4, 2.9), layout="constrained")
    hue = mean_hue(sum(rows.values()))
    for axis, channel in zip(axes, CHANNELS):
        draw_channel(axis, channel, rows, hue)
    figure.suptitle(title, fontsize=10)
    if len(rows) > 1:
        lines = axes[0].get_lines()
        figure.legend(lines, rows, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figures.save(figure, path, pdf)


def draw_all(rows: dict[str, np.ndarray], path: Path, pdf: bool, title: str) -> Path:
    """Draw a page with a strip for each class, ordered by mean hue.

    A strip has the class's densities as ridges, filled with the colours.
    """
    # Ours, and not seaborn's ridges: those are facets, here 306 of them, of one colour each.
    hues = {name: mean_hue(row) for name, row in rows.items()}
    # from the reds on, whose cluster lies across 0
    names = sorted(rows, key=lambda name: (hues[name] + 0.1) % 1)
    height = max(3, 0.105 * len(names) + 1.1)  # inches
    figure, axes = plt.subplots(1, 3, figsize=(7.4, height), sharey=True, layout="constrained")
    baselines = -np.arange(len(names))
    for axis, channel in zip(axes, CHANNELS):
        x = channel.top * GRID
        for i, name in enumerate(names):
            density = colour.density(rows[name], channel.bins, GRID)
            ridge = -i + 1.6 * density / density.max()  # reaches into the strip above
            fill_with_colours(axis, channel, hues[name], -i, ridge, 1.6, zorder=i)
            axis.plot(x, ridge, color="black", linewidth=0.35, zorder=i)
        axis.set(xlim=(0, channel.top), ylim=(-len(names) + 0.6, 2), xlabel=channel.label)
        axis.set_yticks(baselines, names, fontsize=5.5 if len(names) > 40 else 8, va="bottom")
        axis.set_xticks(np.linspace(0, channel.top, 5))
        axis.tick_params(axis="x", labelsize=8)
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    return figures.save(figure, path, pdf)


# -----------------------------------------------------------------------------
# numbers and names


def mean_percent(row: np.ndarray, bins: slice) -> float:
    """Return the mean saturation or value of a row of colours, in percent."""
    levels = np.arange(colour.LEVELS) / 255
    return 100 * np.average(levels, weights=row[bins])


def print_table(rows: dict[str, np.ndarray], counts: dict[str, int], mask_name: str) -> None:
    """Print mean hue, its spread, mean saturation and mean value of each class.

    counts: class name to its number of images.
    """
    print(f"{'class':28s} images  mean hue  hue spread  saturation  value   (of {mask_name})")
    for name, row in rows.items():
        hue, length = colour.circular_mean(row[colour.HUE])
        # the circular standard deviation (Mardia 1972)
        spread = np.degrees(np.sqrt(-2 * np.log(max(length, 1e-12))))
        saturation = mean_percent(row, colour.SATURATION)
        value = mean_percent(row, colour.VALUE)
        print(
            f"{name:28s} {counts[name]:6d}  {360 * hue:6.0f}°  {spread:8.0f}°  "
            f"{saturation:9.0f}%  {value:4.0f}%"
        )


def file_name(names: list[str]) -> str:
    """Return the figure's file name for these classes, of at most 255 bytes."""
    # spaces and slashes have no place in a file's name; 255 bytes are the most that it may have
    joined = "_".join(re.sub(r"[^\w.]+", "-", name) for name in names)
    shortened = joined.encode()[:200].decode(errors="ignore")
    return f"colours_{shortened}.png"


@command
def main(args: argparse.Namespace):
    flowers = open_from_flags(vars(args), needs_split=False)
    classes = [find_class(flowers, text) for text in args.classes]
    if args.all:
        classes = np.unique(flowers.labels)

    # one row of colours and one number of images a class; a class named twice is one class
    colours = load_colours(flowers, args.mask)
    rows, counts = {}, {}
    for label in classes:
        members = flowers.labels == label
        name = flowers.class_names[label]
        rows[name] = colours[members].sum(0, dtype=float)
        counts[name] = members.sum()

    mask_name = MASK_NAMES[args.mask]
    print_table(rows, counts, mask_name)

    if args.all:
        path = args.output / "colours_all.png"
        title = f"Colours of the {len(rows)} classes, in {mask_name}, ordered by mean hue"
        draw_all(rows, path, args.pdf, title)
    else:
        names = list(rows)
        path = args.output / file_name(names)
        subject = f"the {names[0]}" if len(names) == 1 else f"{len(names)} classes"
        n_images = sum(counts.values())
        title = f"Colours of {subject}, in {mask_name} of {n_images} images"
        draw_classes(rows, path, args.pdf, title)
    print(f"saved {path}")
    if args.show:
        figures.show([path])


if __name__ == "__main__":
    main(args)
