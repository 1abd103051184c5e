"""Isomap (Tenenbaum et al. 2000): classes or images laid out on a page by what they look like.

    python data_Exploration/isomap.py --labels                 # classes by their mean colours
    python data_Exploration/isomap.py --features clip --architecture runs/NAME   # by a model
    python data_Exploration/isomap.py --level image --run runs/NAME    # images, right and wrong
    python data_Exploration/isomap.py --data_root sample --labels      # any machine, offline

A class is shown by its medoid, the image with the least total distance to the others of its class.
Prints residual variance and trustworthiness; saves figures/isomap_<level>_<features>.png.
"""

import argparse
import sys
import warnings
from collections.abc import Collection
from pathlib import Path

from flowers import UserError, add_device_arguments, command, typed_flags
from flowers.choices import MASKS, add_figure_arguments
from flowers.data import add_data_arguments
from flowers.files import user_file, user_path

MARKERS = ["o", "s", "^", "D", "v", "<", ">", "P"]  # one a coloured class
UNITS = {
    "hsv": "distance in the HSV cone",
    "hsv_hist": "distance of root histograms",
    "clip": "distance of unit features",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser, splits=False)
    # features
    parser.add_argument(
        "--features",
        choices=list(UNITS),
        default="hsv",
        help="mean point in the HSV cone, joint histogram (16 x 4 x 4, square roots), or a model's "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--architecture",
        type=user_path,
        default="ViT-B/32",
        help="model for --features clip, as train.py takes it (default: %(default)s)",
    )
    parser.add_argument(
        "--mask",
        choices=MASKS,
        default="centre",
        help="pixels whose colours count (default: %(default)s)",
    )
    add_device_arguments(parser)  # of that model
    # Isomap
    parser.add_argument(
        "--level",
        choices=["class", "image"],
        default="class",
        help="what is a point (default: %(default)s)",
    )
    help_k = "of the graph (default: 5 between classes, 10 between images)"
    parser.add_argument("--n_neighbors", type=int, help=help_k)
    # drawing
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
        type=user_file,
        help="--level image: the images that this run evaluated, coloured by right and wrong",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=2000,
        help="--level image: at most so many, evenly taken; 0 for all (default: %(default)s)",
    )
    add_figure_arguments(parser)

    args = parser.parse_args()
    check_arguments(args)
    check_parts(args, typed_flags(parser))
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UserError if flags contradict each other or are out of range."""
    if args.level == "class" and (args.classes or args.run):
        raise UserError("--class and --run need --level image")
    too_few_neighbors = args.n_neighbors is not None and args.n_neighbors < 1
    if len(args.classes) > len(MARKERS) or too_few_neighbors or args.images < 0:
        raise UserError(
            f"up to {len(MARKERS)} times --class, --n_neighbors at least 1, --images at least 0"
        )


def check_parts(args: argparse.Namespace, typed: Collection[str]) -> None:
    """Raise UserError for a flag that was typed, and would change nothing."""
    of_model = ("architecture", "device", "precision")
    others = ("mask",) if args.features == "clip" else of_model
    wrong = [flag for flag in others if flag in typed]
    if wrong:
        raise UserError(f"--{wrong[0]} has no part in --features {args.features}: leave it out")
    if "images" in typed and args.level == "class":
        raise UserError("--images needs --level image: classes are the means of all their images")


if __name__ == "__main__":
    args = command(parse_arguments)()  # before matplotlib is imported: see flowers.command

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.text import Text
from PIL import Image, ImageOps

from flowers import colour, figures
from flowers.colour import load_colours
from flowers.data import Flowers, find_class, open_from_flags

plt = figures.plt
THUMBNAIL_DPI = 150

# -----------------------------------------------------------------------------
# features


def clip_features(flowers: Flowers, args: argparse.Namespace) -> np.ndarray:
    """Return a model's unit features (N, width) float32 of all images."""
    # Here, since features of colours need no torch, which takes seconds to import.
    import torch

    from flowers import devices, frozen
    from flowers.pixels import load_pixels, to_device
    from flowers.weights import load_model

    device = devices.choose_device(args.device)
    devices.set_precision(args.precision, device)
    torch.manual_seed(0)  # tiny has random weights
    model = load_model(args.architecture, device)
    pixels = to_device(load_pixels(flowers, model.visual.input_resolution), device)
    index = torch.arange(len(flowers.files))
    features = frozen.image_activations(model, flowers, pixels, index)
    return features.float().numpy()


def load_features(flowers: Flowers, args: argparse.Namespace) -> np.ndarray:
    """Return the features (N, D) that --features names."""
    if args.features == "clip":
        return clip_features(flowers, args)
    colours = load_colours(flowers, args.mask)
    return colour.cone(colours) if args.features == "hsv" else colour.hsv_hist(colours)


def medoids(features: np.ndarray, labels: np.ndarray) -> dict[int, int]:
    """Return the medoid of each class that occurs: label to row of features (N, D).

    The distances of the medoid to the other images of its class add up to the least.
    """
    # Here and below, as they take a second, and a mistake in a flag is answered without.
    from scipy.spatial.distance import cdist

    medoid_of = {}
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        distances = cdist(features[members], features[members])
        nearest = distances.sum(1).argmin()
        medoid_of[label] = int(members[nearest])
    return medoid_of


# -----------------------------------------------------------------------------
# Isomap


def count_pieces(points: np.ndarray, k: int) -> int:
    """Return how many pieces the graph of k nearest neighbours of points (N, D) falls into."""
    from scipy.sparse.csgraph import connected_components
    from sklearn.neighbors import kneighbors_graph

    count, _ = connected_components(kneighbors_graph(points, k), directed=False)
    return count


def embed(points: np.ndarray, k: int) -> tuple[np.ndarray, list[float], float]:
    """Return Isomap's map of points (N, D) and how good it is.

    The map (N, 2); residual variance in 1, 2 and 3 dimensions, which is 1 - r^2 of geodesic
    distances and distances on the map; trustworthiness in 2 (Venna and Kaski 2001). A graph in
    pieces is joined where they are nearest.
    """
    from scipy.spatial.distance import cdist
    from sklearn.manifold import Isomap, trustworthiness

    n = len(points)
    # Exact; for more points scikit-learn chooses ARPACK, which takes less time and memory.
    solver = "dense" if n < 300 else "auto"
    model = Isomap(n_neighbors=k, n_components=min(3, n - 1), eigen_solver=solver)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pieces: warn_about_pieces has said it in words
        embedded = model.fit_transform(points)

    pairs = np.triu_indices(n, 1)  # each pair of points once
    geodesic = model.dist_matrix_[pairs]
    residual_variances = []
    for dimensions in range(1, embedded.shape[1] + 1):
        low = embedded[:, :dimensions]
        correlation = np.corrcoef(geodesic, cdist(low, low)[pairs])[0, 1]
        residual_variances.append(1 - correlation**2)

    flat = embedded[:, :2]
    trust = trustworthiness(points, flat, n_neighbors=min(k, (n - 1) // 2))
    return flat, residual_variances, trust


def warn_about_pieces(points: np.ndarray, k: int) -> None:
    """Warn if the graph of k nearest neighbours is not connected, and say which k would do."""
    pieces = count_pieces(points, k)
    if pieces == 1:
        return
    larger = range(k + 1, len(points))
    enough = next((n for n in larger if count_pieces(points, n) == 1), None)
    print(
        f"warning: with {k} neighbours the graph falls into {pieces} pieces, which are joined "
        "where they are nearest: distances between them are rough. "
        f"--n_neighbors {enough} connects it",
        file=sys.stderr,
    )


# -----------------------------------------------------------------------------
# drawing


def new_map(
    size: tuple[float, float], xy: np.ndarray, title: str, unit: str
) -> tuple[Figure, Axes]:
    """Return a figure of `size` inches whose axes have room for the points xy (N, 2)."""
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    low, high = xy.min(0), xy.max(0)
    margin = 0.08 * (high - low) + 1e-9  # more than nothing, if all points are one
    (left, bottom), (right, top) = low - margin, high + margin
    axis.set(xlim=(left, right), ylim=(bottom, top))
    axis.set(xlabel=f"Isomap dimension 1 ({unit})", ylabel=f"Isomap dimension 2 ({unit})")
    axis.set_title(title, fontsize=10)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def write_names(axis: Axes, names: list[str], fontsize: float) -> list[Text]:
    """Write the names of the classes; where they belong is decided once their sizes are known."""
    style = {"ha": "center", "va": "top", "linespacing": 0.9, "zorder": 3}
    box = {"color": "white", "pad": 0.5, "alpha": 0.8}
    return [axis.text(0, 0, name, fontsize=fontsize, bbox=box, **style) for name in names]


def add_thumbnail(axis: Axes, file: Path, xy: np.ndarray, side: float) -> None:
    """Draw the centre of a picture at xy (data coordinates), `side` inches wide."""
    pixels = round(side * THUMBNAIL_DPI)
    with Image.open(file) as picture:
        thumbnail = ImageOps.fit(picture.convert("RGB"), (pixels, pixels))
    image = OffsetImage(np.asarray(thumbnail), zoom=72 / THUMBNAIL_DPI)
    frame = {"linewidth": 0.4, "edgecolor": "#888888"}
    axis.add_artist(AnnotationBbox(image, xy, pad=0.06, zorder=2, bboxprops=frame))


def spread_pictures(
    axis: Axes, xy: np.ndarray, name_sizes: np.ndarray, side: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Push pictures apart that would hide each other, each with its name below it.

    xy: where the pictures belong, data coordinates (n, 2); name_sizes: (n, 2) and side: in pixels
    of the figure. Returns the centres of the pictures, the tops of the names (data coordinates,
    (n, 2) each), and which pictures no longer lie on their points (n,).
    """
    inch = axis.figure.dpi
    widths = np.maximum(side, name_sizes[:, 0])
    heights = side + name_sizes[:, 1]
    boxes = np.stack([widths, heights], 1) + 0.08 * inch

    # Ours, and not adjustText's: that moves texts away from points, and here whole pictures with
    # their names must not cover one another.
    points = axis.transData.transform(xy)
    centres = figures.spread(points, boxes, axis.bbox.padded(-4).extents)
    moved = abs(centres - points).max(1) > side / 2

    # a box has the picture at its top and the name at its bottom
    pictures = centres + name_sizes * (0, 0.5)
    names = pictures - (0, side / 2 + 0.03 * inch)
    to_data = axis.transData.inverted()
    return to_data.transform(pictures), to_data.transform(names), moved


def draw_classes(
    flowers: Flowers,
    xy: np.ndarray,
    medoid_of: dict[int, int],
    with_names: bool,
    path: Path,
    pdf: bool,
    title: str,
    unit: str,
) -> Path:
    """Draw every class as a thumbnail of its medoid.

    xy: (classes, 2). Thumbnails are pushed aside where they would hide each other; then a dot
    and a line show the true position.
    """
    many = len(medoid_of) > 40
    side, fontsize = (0.36, 5) if many else (0.6, 7)  # inches, points
    figure, axis = new_map((10, 8) if many else (7.4, 6.4), xy, title, unit)
    # From here on positions are counted in the figure's pixels: its layout must stay.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")

    name_sizes = np.zeros((len(medoid_of), 2))
    if with_names:
        names = [flowers.class_names[label] for label in medoid_of]
        if many:  # two lines are narrower
            names = [name.replace(" ", "\n", 1) for name in names]
        texts = write_names(axis, names, fontsize)
        name_sizes = np.array([text.get_window_extent().size for text in texts])

    centres, name_tops, moved = spread_pictures(axis, xy, name_sizes, side * figure.dpi)
    for i, image in enumerate(medoid_of.values()):
        if moved[i]:
            line = np.stack([xy[i], centres[i]], 1)
            axis.plot(*line, color="grey", linewidth=0.6, zorder=1)
            axis.plot(*xy[i], ".", color="black", markersize=4, zorder=1)
        add_thumbnail(axis, flowers.files[image], centres[i], side)
        if with_names:
            texts[i].set_position(name_tops[i])
    return figures.save(figure, path, pdf)


def draw_images(
    xy: np.ndarray, groups: dict[str, np.ndarray], path: Path, pdf: bool, title: str, unit: str
) -> Path:
    """Draw a dot an image at xy (N, 2).

    groups: name to (N,) bool. Each has its own colour and marker; the rest is light grey.
    """
    figure, axis = new_map((7.4, 6.2), xy, title, unit)
    # matplotlib and not seaborn: groups are masks, and the rest lies below them in one grey
    rest = ~np.any(list(groups.values()), axis=0)
    if rest.any():
        name = "other" if groups else "all"
        label = f"{name} ({rest.sum()})"
        axis.scatter(*xy[rest].T, s=6, color="#cccccc", linewidths=0, label=label)

    for (name, members), shade, marker in zip(groups.items(), figures.PALETTE, MARKERS):
        label = f"{name} ({members.sum()})"
        style = {"s": 14, "linewidths": 0.3, "edgecolors": "white", "label": label}
        axis.scatter(*xy[members].T, color=shade, marker=marker, **style)
    figure.legend(
        *axis.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=8,
    )
    return figures.save(figure, path, pdf)


# -----------------------------------------------------------------------------
# a run


def read_run(run: Path, flowers: Flowers) -> tuple[np.ndarray, np.ndarray]:
    """Return the images of a run's predictions.csv, and which of them it names rightly.

    Images are indices into `flowers.files`. Raises UserError if there are no predictions, or if
    they are of other data.
    """
    # Here, as only this needs it: the module may import torch.
    from flowers.runs import read_predictions

    path = run / "predictions.csv"
    if not path.is_file():
        raise UserError(f"there is no {path}: give the folder of a finished run")
    try:
        predictions = read_predictions(run)
    except ValueError as error:
        raise UserError(f"{run}: {error}") from None

    # predictions.csv names files, not indices
    index_of = {name: i for i, name in enumerate(flowers.file_names)}
    index = predictions["file"].map(index_of)
    is_same_data = index.notna().all()
    if is_same_data:
        index = index.to_numpy(int)
        names = np.array(flowers.class_names, dtype=object)[flowers.labels[index]]
        is_same_data = (predictions["label"] == names).all()
    if not is_same_data:
        raise UserError(
            f"{path} is of another dataset than {flowers.root}, or of other class names"
        )
    is_right = predictions["label"] == predictions["top1"]
    return index, is_right.to_numpy(bool)


# -----------------------------------------------------------------------------


def evenly(array: np.ndarray, n: int) -> np.ndarray:
    """Return at most n rows of an array, evenly taken; all if n is 0."""
    if n == 0 or len(array) <= n:
        return array
    return array[np.linspace(0, len(array) - 1, n).astype(int)]


@command
def main(args: argparse.Namespace):
    # -------------------------------------------------------------------------
    # images

    flowers = open_from_flags(vars(args), needs_split=False)
    coloured_classes = [find_class(flowers, text) for text in args.classes]
    if args.run:
        index, is_right = read_run(args.run, flowers)
        is_right = evenly(is_right, args.images)
    else:
        index = np.arange(len(flowers.files))
    index = evenly(index, args.images)

    # -------------------------------------------------------------------------
    # points and their map

    features = load_features(flowers, args)
    # a point is the mean of a class's images, or an image
    if args.level == "class":
        medoid_of = medoids(features, flowers.labels)
        centroids = [features[flowers.labels == label].mean(0) for label in medoid_of]
        points = np.stack(centroids)
        what, default_k = "classes", 5
    else:
        points = features[index]
        what, default_k = "images", 10
    k = args.n_neighbors or default_k
    if k >= len(points):
        raise UserError(f"--n_neighbors {k}: there are only {len(points)} {what}")
    warn_about_pieces(points, k)
    xy, residual, trust = embed(points, k)

    print(f"{len(points):,} {what}, {points.shape[1]} features ({args.features}), {k} neighbours")
    # such as "0.099 in 1, 0.025 in 2, 0.017 in 3"
    residuals = ", ".join(f"{value:.3f} in {d}" for d, value in enumerate(residual, 1))
    print(f"residual variance: {residuals} dimensions; trustworthiness in 2: {trust:.3f}")

    # -------------------------------------------------------------------------
    # picture

    feature_names = {
        "hsv": "mean HSV colours",
        "hsv_hist": "HSV histograms",
        "clip": f"image features of {args.architecture}",
    }
    in_2d = residual[min(1, len(residual) - 1)]  # of two points there is one dimension only
    title = (
        f"{len(points):,} {what} by {feature_names[args.features]}\n"
        f"(residual variance {in_2d:.2f}, trustworthiness {trust:.2f})"
    )
    unit = UNITS[args.features]
    path = args.output / f"isomap_{args.level}_{args.features}.png"
    if args.level == "class":
        draw_classes(flowers, xy, medoid_of, args.labels, path, args.pdf, title, unit)
    else:
        labels = flowers.labels[index]
        if args.run:
            groups = {"wrong": ~is_right, "right": is_right}
        else:
            # the classes with the most images, unless some are named
            largest = np.argsort(-np.bincount(labels), kind="stable")[: len(MARKERS)]
            classes = coloured_classes or largest
            groups = {flowers.class_names[label]: labels == label for label in classes}
        draw_images(xy, groups, path, args.pdf, title, unit)
    print(f"saved {path}")
    if args.show:
        figures.show([path])


if __name__ == "__main__":
    main(args)
