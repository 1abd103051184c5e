"""Isomap (Tenenbaum et al. 2000): the classes, or the images, laid out on a page by their colours or by what a model makes of them.

    python data_Exploration/isomap.py --labels                                      # class centroids in the HSV cone
    python data_Exploration/isomap.py --features clip --architecture runs/NAME      # features of any checkpoint
    python data_Exploration/isomap.py --level image --run runs/NAME                 # a run's test images: right and wrong
    python data_Exploration/isomap.py --data_root sample --labels                   # any machine, offline

A class is shown by its medoid, the image with the least total distance to the others of its class. Prints residual variance and
trustworthiness; saves figures/isomap_<level>_<features>.png.
"""

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from PIL import Image, ImageOps
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist
from sklearn.manifold import Isomap, trustworthiness
from sklearn.neighbors import kneighbors_graph

from flowers import UserError, colour, command, figures, frozen
from flowers.colour import load_colours
from flowers.data import Flowers, add_data_arguments, find_class, open_flowers
from flowers.pixels import load_pixels, to_device
from flowers.study.comparable import answers
from flowers.weights import load_model

plt = figures.plt
MARKERS = "os^Dv<>P"
UNITS = {
    "hsv": "distance in the HSV cone",
    "hsv_hist": "distance of root histograms",
    "clip": "distance of unit features",
}


def medoids(features: np.ndarray, labels: np.ndarray) -> dict[int, int]:
    """For each class that occurs, the image (a row of features (N, D)) whose distances to the others of its class add up to the least."""
    found = {}
    for c in np.unique(labels).tolist():
        members = np.flatnonzero(labels == c)
        found[c] = int(members[cdist(features[members], features[members]).sum(1).argmin()])
    return found


def parts(points: np.ndarray, k: int) -> int:
    """The number of pieces that the graph of k nearest neighbours falls into."""
    return connected_components(kneighbors_graph(points, k), directed=False)[0]


def embed(points: np.ndarray, k: int) -> tuple[np.ndarray, list[float], float]:
    """Isomap of points (N, D): places (N, 2), residual variance in 1, 2 and 3 dimensions, trustworthiness in 2 (Venna and Kaski 2001).

    Residual variance is 1 - r^2 of geodesic distances and distances on the page. A graph in pieces is joined where they are nearest.
    """
    model = Isomap(
        n_neighbors=k,
        n_components=min(3, len(points) - 1),
        eigen_solver="dense" if len(points) < 300 else "auto",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pieces that it joins: said by the caller, in words
        places = model.fit_transform(points)
    above = np.triu_indices(len(points), 1)
    geodesic = model.dist_matrix_[above]
    residual = [
        1 - np.corrcoef(geodesic, cdist(places[:, :d], places[:, :d])[above])[0, 1] ** 2
        for d in range(1, places.shape[1] + 1)
    ]
    trust = trustworthiness(points, places[:, :2], n_neighbors=min(k, (len(points) - 1) // 2))
    return places[:, :2], residual, trust


def draw_classes(
    flowers: Flowers,
    places: np.ndarray,
    shown: dict[int, int],
    labels: bool,
    path: Path,
    pdf: bool,
    title: str,
    unit: str,
) -> Path:
    """Every class as a thumbnail of its medoid, pushed aside where they would hide each other; a dot and a line show the true place."""
    many = len(shown) > 40
    side, size = (0.36, 5) if many else (0.6, 7)  # inches, points
    figure, axis = plt.subplots(figsize=(10, 8) if many else (7.4, 6.4), layout="constrained")
    finish_axes(axis, places, title, unit)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    inch = figure.dpi
    at = axis.transData.transform(places)
    texts = (
        [
            axis.text(
                0,
                0,
                flowers.class_names[c].replace(" ", "\n", 1) if many else flowers.class_names[c],
                fontsize=size,
                ha="center",
                va="top",
                zorder=3,
                linespacing=0.9,
                bbox={"color": "white", "pad": 0.5, "alpha": 0.8},
            )
            for c in shown
        ]
        if labels
        else []
    )
    text_sizes = (
        np.array([text.get_window_extent().size for text in texts])
        if labels
        else np.zeros((len(shown), 2))
    )
    boxes = (
        np.stack([np.maximum(side * inch, text_sizes[:, 0]), side * inch + text_sizes[:, 1]], 1)
        + 0.08 * inch
    )
    where = figures.spread(at, boxes, axis.bbox.padded(-4).extents)
    for k, image in enumerate(shown.values()):
        with Image.open(flowers.files[image]) as picture:
            thumbnail = ImageOps.fit(picture.convert("RGB"), (round(side * 150),) * 2)
        centre = axis.transData.inverted().transform(where[k] + [0, text_sizes[k, 1] / 2])
        if abs(where[k] - at[k]).max() > side * inch / 2:  # else the picture lies on its place
            axis.plot(*np.stack([places[k], centre], 1), color="grey", linewidth=0.6, zorder=1)
            axis.plot(*places[k], ".", color="black", markersize=4, zorder=1)
        axis.add_artist(
            AnnotationBbox(
                OffsetImage(np.asarray(thumbnail), zoom=72 / 150),
                centre,
                pad=0.06,
                zorder=2,
                bboxprops={"linewidth": 0.4, "edgecolor": "#888888"},
            )
        )
        if labels:
            texts[k].set_position(
                axis.transData.inverted().transform(
                    where[k] + [0, (text_sizes[k, 1] - side * inch) / 2 - 0.03 * inch]
                )
            )
    return figures.save(figure, path, pdf)


def draw_images(
    places: np.ndarray, groups: dict[str, np.ndarray], path: Path, pdf: bool, title: str, unit: str
) -> Path:
    """A dot an image; the groups (name: (N,) bool) in colours and shapes of their own, the rest light grey below them."""
    figure, axis = plt.subplots(figsize=(7.4, 6.2), layout="constrained")
    finish_axes(axis, places, title, unit)
    rest = ~np.any(list(groups.values()), axis=0)
    axis.scatter(
        *places[rest].T,
        s=6,
        color="#cccccc",
        linewidths=0,
        label=f"{'other' if groups else 'all'} ({rest.sum()})" if rest.any() else None,
    )
    for (name, chosen), shade, marker in zip(groups.items(), figures.PALETTE, MARKERS):
        axis.scatter(
            *places[chosen].T,
            s=14,
            color=shade,
            marker=marker,
            linewidths=0.3,
            edgecolors="white",
            label=f"{name} ({chosen.sum()})",
        )
    figure.legend(
        *axis.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=8,
    )
    return figures.save(figure, path, pdf)


def finish_axes(axis, places: np.ndarray, title: str, unit: str) -> None:
    low, high = places.min(0), places.max(0)
    (x0, y0), (x1, y1) = low - 0.08 * (high - low) - 1e-9, high + 0.08 * (high - low) + 1e-9
    axis.set(
        xlim=(x0, x1),
        ylim=(y0, y1),
        xlabel=f"Isomap dimension 1 ({unit})",
        ylabel=f"Isomap dimension 2 ({unit})",
    )
    axis.set_title(title, fontsize=10)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def read_run(run: Path, flowers: Flowers) -> tuple[np.ndarray, np.ndarray]:
    """The images of a run's predictions.csv, as places in `files`, and which were named rightly. Raises UserError if they are of other data."""
    if not (run / "predictions.csv").is_file():
        raise UserError(f"there is no {run / 'predictions.csv'}: give the folder of a finished run")
    try:
        rows = answers(run)
    except ValueError as error:
        raise UserError(f"{run}: {error}") from None
    place = {file.name: i for i, file in enumerate(flowers.files)}
    if any(
        file not in place or label != flowers.class_names[flowers.labels[place[file]]]
        for file, label, _ in rows
    ):
        raise UserError(
            f"{run / 'predictions.csv'} is of another dataset than {flowers.root}, or of other class names"
        )
    return np.array([place[file] for file, *_ in rows]), np.array(
        [label == given for _, label, given in rows]
    )


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser, splits=False)
    parser.add_argument(
        "--features",
        choices=list(UNITS),
        default="hsv",
        help="mean point in the HSV cone, joint histogram (16 x 4 x 4, square roots), or a model's (default: %(default)s)",
    )
    parser.add_argument(
        "--architecture",
        default="ViT-B/32",
        help="model for --features clip, as train.py takes it (default: %(default)s)",
    )
    parser.add_argument(
        "--mask",
        choices=colour.MASKS,
        default="centre",
        help="pixels whose colours count (default: %(default)s)",
    )
    parser.add_argument(
        "--n_neighbors",
        type=int,
        help="of the graph (default: 5 between classes, 10 between images)",
    )
    parser.add_argument(
        "--level",
        choices=["class", "image"],
        default="class",
        help="what is a point (default: %(default)s)",
    )
    parser.add_argument("--labels", action="store_true", help="write the names under the pictures")
    parser.add_argument(
        "--class",
        dest="classes",
        action="append",
        default=[],
        metavar="NAME|ID",
        help="--level image: classes to colour, up to 8 (default: the eight with the most images)",
    )
    parser.add_argument(
        "--run",
        type=Path,
        help="--level image: the images that this run evaluated, coloured by right and wrong",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=2000,
        help="--level image: at most so many, evenly taken; 0 for all (default: %(default)s)",
    )
    figures.add_figure_arguments(parser)
    args = parser.parse_args()
    if args.level == "class" and (args.classes or args.run):
        raise UserError("--class and --run need --level image")
    if (
        len(args.classes) > len(MARKERS)
        or (args.n_neighbors is not None and args.n_neighbors < 1)
        or args.images < 0
    ):
        raise UserError(
            f"up to {len(MARKERS)} times --class, --n_neighbors at least 1, --images at least 0"
        )
    flowers = open_flowers(args.data_root, args.splits_path, class_names=args.class_names)
    chosen = [find_class(flowers, given) for given in args.classes]
    index, right = (
        read_run(args.run, flowers) if args.run else (np.arange(len(flowers.files)), None)
    )
    if args.level == "image" and args.images and len(index) > args.images:
        keep = np.linspace(0, len(index) - 1, args.images).astype(int)
        index, right = index[keep], right[keep] if args.run else None

    if args.features == "clip":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)  # of tiny's random weights
        model = load_model(args.architecture, device)
        pixels = to_device(load_pixels(flowers, model.visual.input_resolution), device)
        features = (
            frozen.image_activations(model, flowers, pixels, torch.arange(len(flowers.files)))
            .float()
            .numpy()
        )
    else:
        features = {"hsv": colour.cone, "hsv_hist": colour.hsv_hist}[args.features](
            load_colours(flowers, args.mask)
        )
    if args.level == "class":
        shown = medoids(features, flowers.labels)
        points = np.stack([features[flowers.labels == c].mean(0) for c in shown])
    else:
        points = features[index]
    k = args.n_neighbors or (5 if args.level == "class" else 10)
    if k >= len(points):
        raise UserError(
            f"--n_neighbors {k}: there are only {len(points)} {'classes' if args.level == 'class' else 'images'}"
        )
    pieces = parts(points, k)
    if pieces > 1:
        enough = next((n for n in range(k + 1, len(points)) if parts(points, n) == 1), None)
        print(
            f"warning: with {k} neighbours the graph falls into {pieces} pieces, which are joined where they are nearest: distances between them "
            f"are rough. --n_neighbors {enough} connects it",
            file=sys.stderr,
        )
    places, residual, trust = embed(points, k)
    print(
        f"{len(points):,} {'classes' if args.level == 'class' else 'images'}, {points.shape[1]} features ({args.features}), {k} neighbours"
    )
    print(
        "residual variance: "
        + ", ".join(f"{v:.3f} in {d}" for d, v in enumerate(residual, 1))
        + f" dimensions; trustworthiness in 2: {trust:.3f}"
    )

    of = {
        "hsv": "mean HSV colours",
        "hsv_hist": "HSV histograms",
        "clip": f"image features of {args.architecture}",
    }[args.features]
    path = args.output / f"isomap_{args.level}_{args.features}.png"
    quality = (
        f"residual variance {residual[min(1, len(residual) - 1)]:.2f}, trustworthiness {trust:.2f}"
    )
    if args.level == "class":
        draw_classes(
            flowers,
            places,
            shown,
            args.labels,
            path,
            args.pdf,
            f"{len(points)} classes by {of}\n({quality})",
            UNITS[args.features],
        )
    else:
        labels = flowers.labels[index]
        chosen = chosen or np.argsort(-np.bincount(labels), kind="stable")[: len(MARKERS)]
        groups = (
            {"wrong": ~right, "right": right}
            if args.run
            else {flowers.class_names[c]: labels == c for c in chosen}
        )
        draw_images(
            places,
            groups,
            path,
            args.pdf,
            f"{len(points):,} images by {of}\n({quality})",
            UNITS[args.features],
        )
    print(f"saved {path}")
    if args.show:
        figures.show([path])


if __name__ == "__main__":
    main()
