"""How time grows with the number of images, classes, batch size and tokens: four panels of one
figure, ours beside the plain recipe.

    python benchmarks/scaling.py --data_root data/flowers-102 --output docs   # five minutes

Saves docs/scaling.png. Random weights; images through the decoder and the cache at 224 px, classes
and tokens in the shape of ViT-B/32's text tower, batches as full fine-tuning steps of `tiny`. It
prints seconds, and the exponent of growth over the last doubling (1: proportional, 0: free).
"""

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import clip
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator
from measure import alternate, duration, machine
from peers import Pictures, clip_transform
from torch.utils.data import DataLoader

from flowers import command, evaluate, figures, models
from flowers.choices import TEMPLATE, add_figure_arguments
from flowers.data import Flowers, add_data_arguments, open_flowers
from flowers.losses import info_nce
from flowers.pixels import get_batch, load_pixels, read_square

BATCH = 64  # images
SIDE = 224  # pixels
N_CLASSES = 102
CAPTIONS = 32
SCALE = 100.0  # of the logits, as CLIP was trained
# the plain recipe is vermilion and the first of ours blue
COLOURS = [figures.PALETTE[1], figures.PALETTE[0], figures.PALETTE[2]]
STYLES = ["o--", "s-", "^-"]


class Panel(NamedTuple):
    """What one panel shows: at each size, the ways to do the same work, by name."""

    works: Callable[[int], dict[str, Callable]]
    sizes: Sequence[int]


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser, splits=False)
    add_figure_arguments(parser)
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="alternating rounds after one that is not counted (default: %(default)s)",
    )
    parser.add_argument(
        "--most",
        type=int,
        default=1024,
        help="most images; batches go up to half of it (default: %(default)s)",
    )
    args = parser.parse_args()
    torch.manual_seed(0)

    files = open_flowers(args.data_root, args.splits_path, splits_base=args.splits_base).files[:256]
    vit = models.build("ViT-B/32")
    tiny = models.build("tiny")
    panels = {
        "Images": Panel(image_works(files, args.most), doublings(args.most)),
        "Classes": Panel(class_works(vit), [8, 16, 32, 64, 128]),
        "Images a step": Panel(batch_works(tiny), doublings(args.most // 2)),
        "Tokens of a caption": Panel(token_works(vit), [5, 10, 20, 40, 77]),
    }

    figure, axes = figures.plt.subplots(2, 2, figsize=(9, 6.6), layout="constrained")
    for axis, (title, panel) in zip(axes.flat, panels.items()):
        curves = measure(panel, args.rounds)
        for name, seconds in curves.items():
            print_curve(title, name, panel.sizes, seconds)
        draw(axis, title, panel.sizes, curves)
    figure.suptitle(machine(), fontsize=9)
    path = figures.save(figure, args.output / "scaling.png", args.pdf)
    print(path)
    if args.show:
        figures.show([path])


def doublings(most: int) -> list[int]:
    """Five powers of two, up to `most`."""
    largest = int(math.log2(most))
    return [2**k for k in range(largest - 4, largest + 1)]


# -----------------------------------------------------------------------------
# the works of each panel, by their size


def image_works(files: Sequence[Path], most: int) -> Callable[[int], dict[str, Callable]]:
    """So many JPEGs into batches of 64. `files` come again and again, up to `most`."""
    with tempfile.TemporaryDirectory() as folder:
        # a folder of its own, so that the dataset's cache stays as it is
        labels = torch.zeros(len(files), dtype=torch.long).numpy()
        flowers = Flowers(Path(folder), tuple(files), labels, (), {})
        pixels = load_pixels(flowers, SIDE).clone()  # (N, 3, R, R) uint8
    repeated = [files[i % len(files)] for i in range(most)]

    def works(n):
        def plain():
            pictures = Pictures(repeated[:n], [0] * n, clip_transform(SIDE))
            for images, _ in DataLoader(pictures, BATCH):
                len(images)

        def first_pass():
            for index in torch.arange(n).split(BATCH):
                squares = torch.stack([read_square(repeated[i], SIDE) for i in index])
                get_batch(squares, torch.arange(len(index)), "cpu")

        def from_cache():
            for index in torch.arange(n).split(BATCH):
                get_batch(pixels, index % len(pixels), "cpu")

        return {
            "plain: PIL + clip's transform": plain,
            "first pass": first_pass,
            "from the cache": from_cache,
        }

    return works


def class_works(model: torch.nn.Module) -> Callable[[int], dict[str, Callable]]:
    """A zero-shot classifier of so many classes."""

    def works(n):
        names = [f"number {i}" for i in range(n)]

        @torch.no_grad()
        def plain():
            columns = []
            for name in names:
                tokens = clip.tokenize([TEMPLATE.replace("{}", name)])  # (1, 77)
                columns.append(models.encode_texts(model, tokens))
            return torch.cat(columns)

        def ours():
            return evaluate.zero_shot_head(model, names, [TEMPLATE])

        return {"plain: one class at a time, 77 tokens": plain, "zero_shot_head": ours}

    return works


def token_works(model: torch.nn.Module) -> Callable[[int], dict[str, Callable]]:
    """The text tower with 32 captions of so many tokens."""

    @torch.no_grad()
    def encode(tokens):
        return models.encode_texts(model, tokens)

    def works(n):
        short = torch.randint(1, 40000, (CAPTIONS, n))
        short[:, -1] = models.VOCABULARY - 1  # the end token, at which the feature is taken
        padded = F.pad(short, (0, models.CONTEXT_LENGTH - n))  # (32, 77)
        return {
            "plain: padded to 77": lambda: encode(padded),
            "cut to length": lambda: encode(short),
        }

    return works


def batch_works(model: torch.nn.Module) -> Callable[[int], dict[str, Callable]]:
    """A full fine-tuning step with so many images."""
    names = [f"number {i}" for i in range(N_CLASSES)]
    prompts = evaluate.fill_templates(names, [TEMPLATE])
    short = models.tokenize(prompts)  # (C, T)
    long = clip.tokenize(prompts)  # (C, 77)
    side = model.visual.input_resolution

    def step(images, text):
        loss = info_nce(models.encode_images(model, images), text, SCALE)
        loss.backward()
        model.zero_grad()

    def works(n):
        images = torch.randn(n, 3, side, side)
        labels = torch.randint(0, N_CLASSES, (n,))
        # text[distinct][inverse] is text[labels]
        distinct, inverse = torch.unique(labels, return_inverse=True)

        def plain():
            step(images, models.encode_texts(model, long[labels]))

        def ours():
            text = models.encode_texts(model, short[distinct])  # (distinct, D)
            step(images, text.index_select(0, inverse))

        return {"plain: 77 tokens an image": plain, "distinct prompts, cut": ours}

    return works


# -----------------------------------------------------------------------------
# measuring and drawing


def measure(panel: Panel, rounds: int) -> dict[str, list[float]]:
    """The median seconds of each way, one value a size."""
    curves = {}  # name: a value at each size
    for size in panel.sizes:
        for name, seconds in alternate(panel.works(size), rounds).items():
            curves.setdefault(name, []).append(statistics.median(seconds))
    return curves


def print_curve(title: str, name: str, sizes: Sequence[int], seconds: list[float]) -> None:
    """Print the seconds at each size, and the exponent of growth over the last doubling."""
    growth = math.log(seconds[-1] / seconds[-2]) / math.log(sizes[-1] / sizes[-2])
    points = "  ".join(f"{size}: {duration(spent)}" for size, spent in zip(sizes, seconds))
    print(f"{title}: {name:40s}{points}  growth {growth:.2f}", flush=True)


def draw(axis: Axes, title: str, sizes: Sequence[int], curves: dict[str, list[float]]) -> None:
    """Draw one panel, both axes logarithmic."""
    for (name, seconds), colour, style in zip(curves.items(), COLOURS, STYLES):
        axis.plot(sizes, seconds, style, color=colour, label=name)
    axis.set(xscale="log", yscale="log", xlabel=title, ylabel="Seconds")
    axis.set(xticks=sizes, xticklabels=sizes)
    axis.minorticks_off()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    # the corner without a curve
    corner = "lower right" if title.startswith("Tokens") else "upper left"
    axis.legend(frameon=False, fontsize=7.5, loc=corner)
    axis.margins(y=0.12)


if __name__ == "__main__":
    main()
