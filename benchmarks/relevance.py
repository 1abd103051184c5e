"""Whether the page's relevance maps are right: the deletion test, on real images.

    python benchmarks/relevance.py --architecture runs/NAME --data_root PATH

Patches of test images are covered with the image's mean colour, a few at a time, until all are: the
most relevant ones first, the least relevant ones first, or in random orders. The lower the mean of
the score on the way, the sooner what it rests on was covered. The score is that of the true class.
Beside the maps of the page: the gradient times the pixels, and the patches nearest to the centre.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from flowers import command, files
from flowers.data import add_data_arguments, open_from_flags
from flowers.gallery.relevance import Explainer, load_run, relevance, score
from flowers.intervals import wilson
from flowers.models import CLIP, settings_of
from flowers.pixels import get_batch, load_pixels

STEPS = 16  # at most, from the whole image to none of it


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser)
    parser.add_argument("--architecture", type=files.user_path, required=True, help="a run folder")
    parser.add_argument("--images", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument(
        "--orders", type=int, default=5, help="random orders an image (default: %(default)s)"
    )
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)

    flowers = open_from_flags(vars(args))
    run = load_run(Path(args.architecture), flowers.class_names)
    index = torch.from_numpy(flowers.splits["test"])
    index = index[torch.randperm(len(index), generator=generator)[: args.images]]
    settings = settings_of(run.model)
    pixels = load_pixels(flowers, run.resolution)
    images = get_batch(pixels, index, "cpu", mean=settings.mean, std=settings.std)
    directions = directions_of(run, flowers.labels[index.numpy()])
    maps, _ = relevance(run.model, images, directions)

    side = maps.shape[-1]

    def areas(order: torch.Tensor) -> np.ndarray:
        curves = deletion_curves(run.model, images, directions, order)  # (N, steps + 1)
        return ((curves[:, 1:] + curves[:, :-1]) / 2).mean(1).numpy()

    shape = (len(images), side**2)
    random = [areas(torch.rand(shape, generator=generator).argsort(1)) for _ in range(args.orders)]
    expected = np.mean(random, axis=0)  # (N,)
    print(f"{len(images)} test images, maps of {side} x {side} cells")
    print("| order | mean score | lower than random for |\n|---|---|---|")
    print(f"| random | {expected.mean():.3f} | |")
    rankings = {
        "most relevant first": maps,
        "least relevant first": -maps,
        "gradient times pixels": gradient_times_pixels(run.model, images, directions, side),
        "centre first": -distance_to_centre(side).expand_as(maps),
    }
    for name, values in rankings.items():
        found = areas(values.flatten(1).argsort(1, descending=True))
        lower = int((found < expected).sum())
        low, high = wilson(lower, len(found))
        percent = f"{100 * lower / len(found):.1f}% [{low:.1f}, {high:.1f}]"
        print(f"| {name} | {found.mean():.3f} | {percent} |", flush=True)


def directions_of(run: Explainer, labels: np.ndarray) -> torch.Tensor:
    """The direction (N, D) of the score of each image's true class."""
    targets = [run.class_target(name) for name in run.class_names]
    return torch.stack([targets[c].direction for c in labels])


@torch.inference_mode()
def deletion_curves(
    model: CLIP, images: torch.Tensor, directions: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """The scores (N, steps + 1) of images (N, 3, R, R) while their patches are covered.

    order: the patches (N, side * side), row by row, in the order in which they are covered with the
    mean colour of the image; from none of them to all.
    """
    n, n_patches = order.shape
    side = round(n_patches**0.5)
    mean_colour = images.mean((2, 3), keepdim=True)
    rank = order.argsort(1).view(n, 1, side, side)  # when each patch is covered
    curves = []
    for fraction in torch.linspace(0, 1, min(n_patches, STEPS) + 1):
        covered = (rank < round(fraction.item() * n_patches)).float()
        covered = F.interpolate(covered, images.shape[-2:])  # nearest: whole patches
        features = model.encode_image(torch.lerp(images, mean_colour, covered))
        curves.append(score(features, directions))
    return torch.stack(curves, 1)


def gradient_times_pixels(
    model: CLIP, images: torch.Tensor, directions: torch.Tensor, side: int
) -> torch.Tensor:
    """The gradient of the score times the normalised pixels, mean of each patch (N, side, side)."""
    images = images.clone().requires_grad_()
    scores = score(model.encode_image(images), directions)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    products = (images.detach() * gradient).sum(1)  # (N, R, R)
    return F.adaptive_avg_pool2d(products, side)


def distance_to_centre(side: int) -> torch.Tensor:
    """(side, side), in patches."""
    steps = torch.arange(side) - (side - 1) / 2
    return torch.hypot(steps[:, None], steps)


if __name__ == "__main__":
    main()
