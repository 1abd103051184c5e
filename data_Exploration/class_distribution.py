"""The colours of a class: kernel densities of hue, saturation and value, drawn over the colours that they stand for.

    python data_Exploration/class_distribution.py --class rose --class "tiger lily"     # by name or number (1 to 102)
    python data_Exploration/class_distribution.py --all --mask grabcut                  # a page of all classes, ordered by hue
    python data_Exploration/class_distribution.py --data_root sample --class sunflower  # any machine, offline

Hue is an angle, so its density wraps around; pixels weigh by chroma, since grey has no hue. The colours of all images are measured once
(5,868 images: half a minute on two cores, with grabcut two) and kept beside the data. Saves figures/colours_<classes>.png or figures/colours_all.png.
"""

import argparse
import re
from pathlib import Path

import numpy as np
from matplotlib.colors import hsv_to_rgb

from flowers import UserError, colour, command, figures
from flowers.colour import load_colours
from flowers.data import add_data_arguments, find_class, open_flowers

plt = figures.plt
GRID = np.linspace(0, 1, 361)
CHANNELS = {
    "hue (degrees)": (colour.HUE, 360),
    "saturation (%)": (colour.SATURATION, 100),
    "value (%)": (colour.VALUE, 100),
}
STYLES = ["-", "--", "-.", ":"]
MOST = 8  # classes in one comparison: as many as the palette has colours


def band(channel: slice, hue: float) -> np.ndarray:
    """The colours along a channel's axis (1, G, 3): all hues; or those of one hue from grey to full, from black to full."""
    hsv = np.stack([np.full_like(GRID, hue), np.ones_like(GRID), np.ones_like(GRID)], -1)
    hsv[:, (colour.HUE, colour.SATURATION, colour.VALUE).index(channel)] = GRID
    return hsv_to_rgb(hsv)[None]


def draw_classes(rows: dict[str, np.ndarray], path: Path, pdf: bool, title: str) -> Path:
    """Three panels with a curve a class (name: row of colours); one class alone is filled with the colours themselves."""
    figure, axes = plt.subplots(1, 3, figsize=(7.4, 2.9), layout="constrained")
    hue = float(colour.circular_mean(sum(rows.values())[colour.HUE])[0])
    for axis, (label, (channel, unit)) in zip(axes, CHANNELS.items()):
        x, top = unit * GRID, 0.0
        for i, (name, row) in enumerate(rows.items()):
            y = colour.density(row, channel, GRID) / unit
            top = max(top, y.max())
            axis.plot(
                x,
                y,
                STYLES[i % 4],
                color=figures.PALETTE[i] if len(rows) > 1 else "black",
                linewidth=1.4,
                label=name,
            )
            if len(rows) == 1:
                picture = axis.imshow(
                    band(channel, hue), extent=(0, unit, 0, 1.08 * y.max()), aspect="auto", zorder=0
                )
                picture.set_clip_path(
                    axis.fill_between(x, y, color="none").get_paths()[0], axis.transData
                )
        axis.imshow(
            band(channel, hue), extent=(0, unit, -0.09 * top, -0.02 * top), aspect="auto", zorder=0
        )
        axis.set(
            xlim=(0, unit),
            ylim=(-0.09 * top, 1.08 * top),
            xlabel=label,
            ylabel=f"density (1/{'degree' if unit == 360 else '%'})",
        )
        axis.set_xticks(np.linspace(0, unit, 5))
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    if len(rows) > 1:
        figure.legend(
            *axis.get_legend_handles_labels(),
            loc="outside lower center",
            ncols=4,
            frameon=False,
            fontsize=8,
        )
    return figures.save(figure, path, pdf)


def draw_all(rows: dict[str, np.ndarray], path: Path, pdf: bool, title: str) -> Path:
    """A page with a strip for each class: its densities as ridges filled with the colours, ordered by mean hue."""
    hues = {name: float(colour.circular_mean(row[colour.HUE])[0]) for name, row in rows.items()}
    names = sorted(
        rows, key=lambda name: (hues[name] + 0.1) % 1
    )  # from the reds on, whose cluster lies across 0
    figure, axes = plt.subplots(
        1, 3, figsize=(7.4, max(3, 0.105 * len(names) + 1.1)), sharey=True, layout="constrained"
    )
    for axis, (label, (channel, unit)) in zip(axes, CHANNELS.items()):
        for i, name in enumerate(names):
            y = colour.density(rows[name], channel, GRID)
            ridge = -i + 1.6 * y / y.max()
            picture = axis.imshow(
                band(channel, hues[name]), extent=(0, unit, -i, -i + 1.6), aspect="auto", zorder=i
            )
            picture.set_clip_path(
                axis.fill_between(unit * GRID, -i, ridge, color="none").get_paths()[0],
                axis.transData,
            )
            axis.plot(unit * GRID, ridge, color="black", linewidth=0.35, zorder=i)
        axis.set(xlim=(0, unit), ylim=(-len(names) + 0.6, 2), xlabel=label)
        axis.set_yticks(
            -np.arange(len(names)), names, fontsize=5.5 if len(names) > 40 else 8, va="bottom"
        )
        axis.set_xticks(np.linspace(0, unit, 5))
        axis.tick_params(axis="x", labelsize=8)
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    return figures.save(figure, path, pdf)


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser, splits=False)
    parser.add_argument(
        "--class",
        dest="classes",
        action="append",
        default=[],
        metavar="NAME|ID",
        help=f"name or 1-based number of a class; up to {MOST}, repeated, are drawn over each other",
    )
    parser.add_argument("--all", action="store_true", help="all classes on a page, ordered by hue")
    parser.add_argument(
        "--mask",
        choices=colour.MASKS,
        default="centre",
        help="pixels that count: all, a disc in the centre, or what GrabCut takes for the flower (default: %(default)s)",
    )
    figures.add_figure_arguments(parser)
    args = parser.parse_args()
    if args.all == bool(args.classes) or len(args.classes) > MOST:
        raise UserError(f"name 1 to {MOST} classes with --class, or give --all")
    flowers = open_flowers(args.data_root, args.splits_path, class_names=args.class_names)
    chosen = dict.fromkeys(find_class(flowers, given) for given in args.classes)
    colours = load_colours(flowers, args.mask)
    rows = {
        flowers.class_names[c]: colours[flowers.labels == c].sum(0, dtype=float)
        for c in (chosen or np.unique(flowers.labels))
    }
    under = {"none": "all pixels", "centre": "the central disc", "grabcut": "GrabCut's foreground"}[
        args.mask
    ]

    print(f"{'class':28s} images  mean hue  hue spread  saturation  value   (of {under})")
    for name, row in rows.items():
        hue, length = colour.circular_mean(row[colour.HUE])
        spread = np.degrees(
            np.sqrt(-2 * np.log(max(length, 1e-12)))
        )  # the circular standard deviation (Mardia 1972)
        saturation, value = (
            100 * np.average(np.arange(colour.LEVELS) / 255, weights=row[channel])
            for channel in (colour.SATURATION, colour.VALUE)
        )
        count = (flowers.labels == flowers.class_names.index(name)).sum()
        print(
            f"{name:28s} {count:6d}  {360 * hue:6.0f}°  {spread:8.0f}°  {saturation:9.0f}%  {value:4.0f}%"
        )
    if args.all:
        path = draw_all(
            rows,
            args.output / "colours_all.png",
            args.pdf,
            f"Colours of the {len(rows)} classes, in {under}, ordered by mean hue",
        )
    else:
        images = sum((flowers.labels == c).sum() for c in chosen)
        title = f"Colours of {'the ' + next(iter(rows)) if len(rows) == 1 else f'{len(rows)} classes'}, in {under} of {images} images"
        names = (
            "_".join(re.sub(r"[^\w.]+", "-", name) for name in rows)
            .encode()[:200]
            .decode(errors="ignore")
        )  # a file's name has 255 bytes
        path = draw_classes(rows, args.output / f"colours_{names}.png", args.pdf, title)
    print(f"saved {path}")
    if args.show:
        figures.show([path])


if __name__ == "__main__":
    main()
