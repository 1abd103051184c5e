"""How time grows with the number of images, classes, batch size and tokens: four panels of one figure, ours beside the plain recipe.

    python benchmarks/scaling.py --data_root data/flowers-102 --output docs      # five minutes on two cores; saves docs/scaling.png

Random weights; images through the decoder and the cache at 224 px, classes and tokens in the shape of ViT-B/32's text tower, batches as full fine-tuning
steps of `tiny`. Printed: seconds, and the exponent of growth over the last doubling (1: proportional, 0: free).
"""

import argparse
import math
import statistics
import tempfile
from pathlib import Path

import clip
import torch
import torch.nn.functional as F
from matplotlib.ticker import LogLocator
from measure import alternate, duration, machine
from peers import Pictures, clip_transform
from torch.utils.data import DataLoader

from flowers import command, evaluate, figures, models
from flowers.data import Flowers, add_data_arguments, open_flowers
from flowers.losses import info_nce
from flowers.pixels import get_batch, load_pixels, read_square

plt = figures.plt


def images_panel(flowers: Flowers, largest: int) -> dict:
    """Seconds to turn so many JPEGs into batches of 64."""
    files = [flowers.files[i % len(flowers.files)] for i in range(largest)]
    with tempfile.TemporaryDirectory() as folder:
        pixels = load_pixels(
            Flowers(Path(folder), flowers.files, flowers.labels, flowers.class_names, {}), 224
        ).clone()

    def works(n):
        index = torch.arange(n) % len(pixels)
        feed = lambda batches: [len(x) for x in batches]
        return {
            "plain: PIL + clip's transform": lambda: feed(
                x for x, _ in DataLoader(Pictures(files[:n], [0] * n, clip_transform(224)), 64)
            ),
            "first pass": lambda: feed(
                get_batch(
                    torch.stack([read_square(files[i], 224) for i in part]),
                    torch.arange(len(part)),
                    "cpu",
                )
                for part in torch.arange(n).split(64)
            ),
            "from the cache": lambda: feed(
                get_batch(pixels, part, "cpu") for part in index.split(64)
            ),
        }

    return works


def classes_panel(model) -> dict:
    """Seconds to make a zero-shot classifier of so many classes."""

    @torch.no_grad()
    def one_by_one(names):
        return torch.cat(
            [
                models.encode_texts(model, clip.tokenize([evaluate.TEMPLATE.replace("{}", name)]))
                for name in names
            ]
        )

    def works(n):
        names = [f"number {i}" for i in range(n)]
        return {
            "plain: one class at a time, 77 tokens": lambda: one_by_one(names),
            "zero_shot_head": lambda: evaluate.zero_shot_head(model, names, [evaluate.TEMPLATE]),
        }

    return works


def tokens_panel(model) -> dict:
    """Seconds for the text tower with 32 captions of so many tokens."""

    def works(n):
        short = torch.randint(1, 40000, (32, n))
        short[:, -1] = models.VOCABULARY - 1
        long = F.pad(short, (0, models.CONTEXT - n))
        encode = torch.no_grad()(lambda tokens: models.encode_texts(model, tokens))
        return {"plain: padded to 77": lambda: encode(long), "cut to length": lambda: encode(short)}

    return works


def batch_panel(model, n_classes: int) -> dict:
    """Seconds for a full fine-tuning step with so many images."""
    prompts = evaluate.fill_templates(
        [f"number {i}" for i in range(n_classes)], [evaluate.TEMPLATE]
    )
    short, long, side = (
        models.tokenize(prompts),
        clip.tokenize(prompts),
        model.visual.input_resolution,
    )

    def step(images, text):
        info_nce(models.encode_images(model, images), text, 100.0).backward()
        model.zero_grad()

    def works(n):
        images, labels = torch.randn(n, 3, side, side), torch.randint(0, n_classes, (n,))
        distinct, inverse = torch.unique(labels, return_inverse=True)
        return {
            "plain: 77 tokens an image": lambda: step(
                images, models.encode_texts(model, long[labels])
            ),
            "distinct prompts, cut": lambda: step(
                images, models.encode_texts(model, short[distinct]).index_select(0, inverse)
            ),
        }

    return works


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser, splits=False)
    figures.add_figure_arguments(parser)
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
    flowers = open_flowers(args.data_root, args.splits_path)
    flowers = Flowers(
        flowers.root, flowers.files[:256], flowers.labels[:256], flowers.class_names, {}
    )
    torch.manual_seed(0)
    large, small = models.build("ViT-B/32"), models.build("tiny")
    up_to = lambda most: [2**k for k in range(int(math.log2(most)) - 4, int(math.log2(most)) + 1)]
    panels = {
        "Images": (images_panel(flowers, args.most), up_to(args.most)),
        "Classes": (classes_panel(large), [8, 16, 32, 64, 128]),
        "Images a step": (batch_panel(small, 102), up_to(args.most // 2)),
        "Tokens of a caption": (tokens_panel(large), [5, 10, 20, 40, 77]),
    }
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.6), layout="constrained")
    for axis, (title, (works, sizes)) in zip(axes.flat, panels.items()):
        curves: dict[str, list[float]] = {}
        for n in sizes:
            for name, spent in alternate(works(n), args.rounds).items():
                curves.setdefault(name, []).append(statistics.median(spent))
        for (name, values), colour, style in zip(
            curves.items(), figures.PALETTE[1::-1] + figures.PALETTE[2:], ("o--", "s-", "^-")
        ):
            axis.plot(sizes, values, style, color=colour, label=name)
            growth = math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])
            print(
                f"{title}: {name:40s}"
                + "  ".join(f"{n}: {duration(v)}" for n, v in zip(sizes, values))
                + f"  growth {growth:.2f}",
                flush=True,
            )
        axis.set(
            xscale="log",
            yscale="log",
            xlabel=title,
            ylabel="Seconds",
            xticks=sizes,
            xticklabels=sizes,
        )
        axis.minorticks_off()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.legend(
            frameon=False,
            fontsize=7.5,
            loc="lower right" if title.startswith("Tokens") else "upper left",
        )
        axis.margins(y=0.12)
    figure.suptitle(machine(), fontsize=9)
    path = figures.save(figure, args.output / "scaling.png", args.pdf)
    print(path)
    if args.show:
        figures.show([path])


if __name__ == "__main__":
    main()
