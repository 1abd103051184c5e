"""An epoch after the first of each strategy that freezes something: ours, which keeps what the
frozen part computes, against the plain recipe with requires_grad=False.

    python benchmarks/strategies.py --data_root data/flowers-102    # 12 minutes on two cores
    python benchmarks/strategies.py --architecture ViT-L/14@336px --images 1024   # on a GPU

Random weights; without flags the shape of ViT-B/32 and 64 images. The plain recipe decodes every
image with PIL + clip's transform and sends it and a prompt of 77 tokens through both towers at
every step. The limit counts the FLOPs that are left of our steps. `linear`: there the image tower
and a step over each batch, here an iteration of L-BFGS over all features, from random and from the
text classifier.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import MATRICES, add_arguments, alternate, peak_flops, report, spread_over
from peers import Pictures, clip_transform
from sklearn.linear_model import LogisticRegression
from torch.utils.data import DataLoader

from flowers import command, evaluate, frozen, models, strategies
from flowers.choices import DEFAULT_C, TEMPLATE, context_template, cut_points
from flowers.data import Flowers, add_data_arguments, open_flowers
from flowers.losses import info_nce
from flowers.pixels import get_batch, load_pixels

MEASURED = ("last_blocks", "text", "prompt", "linear", "image", "projection", "norm", "lora")
PLAIN = "plain recipe, requires_grad=False"
SCALE = 100.0  # of the logits, as CLIP was trained


@dataclass
class Setup:
    """What both ways of one strategy share."""

    strategy: str
    blocks: int  # of last_blocks
    flowers: Flowers
    labels: torch.Tensor  # (N,)
    pixels: torch.Tensor  # (N, 3, R, R) uint8
    model: torch.nn.Module
    head: torch.nn.Linear  # of `linear`
    tokens: torch.Tensor  # (C, T) on the CPU, cut to the longest prompt
    optimizer: torch.optim.Optimizer
    device: torch.device

    def update(self, loss: torch.Tensor) -> float:
        """A real step of AdamW, at learning rate 0."""
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser)
    add_arguments(parser)
    parser.add_argument(
        "--architecture",
        default="ViT-B/32",
        choices=list(models.SHAPES),
        help="shape, with random weights (default: %(default)s)",
    )
    parser.add_argument(
        "--images", type=int, default=64, help="images of an epoch (default: %(default)s)"
    )
    parser.add_argument(
        "--batch_size", type=int, default=64, help="images a step (default: %(default)s)"
    )
    parser.add_argument(
        "--blocks", type=int, default=2, help="blocks of last_blocks (default: %(default)s)"
    )
    parser.add_argument(
        "--strategies",
        nargs="+",
        choices=MEASURED,
        default=MEASURED,
        help="strategies to measure (default: all)",
    )
    args = parser.parse_args()

    full = open_flowers(args.data_root, args.splits_path, args.splits, splits_base=args.splits_base)
    index = spread_over(full.splits["train"], args.images)
    files = tuple(full.files[i] for i in index)
    # the images in a folder of their own, whose cache goes with it
    with tempfile.TemporaryDirectory() as folder:
        flowers = Flowers(Path(folder), files, full.labels[index], full.class_names, {})
        for strategy in args.strategies:
            setup = prepare(strategy, flowers, args)
            if strategy == "linear":
                measure_linear(setup, args)
            else:
                measure_steps(setup, args)


def prepare(strategy: str, flowers: Flowers, args: argparse.Namespace) -> Setup:
    """Build the model and the optimiser of a strategy, with random weights."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = models.build(args.architecture).to(device)
    strategies.prepare(model, strategy, args.blocks)
    width = model.text_projection.shape[1]
    head = torch.nn.Linear(width, len(flowers.class_names)).to(device)
    if strategy == "linear":
        trained = list(head.parameters())
    else:
        trained = [p for p in model.parameters() if p.requires_grad]

    template = TEMPLATE
    if strategy == "prompt":
        template = context_template(4)  # four learned words
    prompts = evaluate.fill_templates(flowers.class_names, [template])
    return Setup(
        strategy=strategy,
        blocks=args.blocks,
        flowers=flowers,
        labels=torch.from_numpy(flowers.labels),
        pixels=load_pixels(flowers, model.visual.input_resolution),
        model=model,
        head=head,
        tokens=models.tokenize(prompts),
        optimizer=torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True),
        device=device,
    )


# -----------------------------------------------------------------------------
# the plain recipe


def plain_step(setup: Setup) -> Callable:
    """A step (images, labels) -> loss through both towers."""
    model, device = setup.model, setup.device
    padding = models.CONTEXT_LENGTH - setup.tokens.shape[1]
    tokens = F.pad(setup.tokens, (0, padding)).to(device)  # (C, 77)

    def step(images, labels):
        labels = labels.to(device)
        image = models.encode_images(model, images.to(device))  # (B, D)
        if setup.strategy == "linear":
            return setup.update(F.cross_entropy(setup.head(image), labels))
        text = models.encode_texts(model, tokens[labels])  # (B, D)
        return setup.update(info_nce(image, text, SCALE))

    return step


def plain_epoch(setup: Setup, batch_size: int) -> Callable:
    """An epoch of such steps from the files, decoded anew."""
    step = plain_step(setup)
    transform = clip_transform(setup.model.visual.input_resolution)
    pictures = Pictures(setup.flowers.files, setup.flowers.labels, transform)
    loader = DataLoader(pictures, batch_size)

    def epoch():
        for images, labels in loader:
            step(images, labels)

    return epoch


# -----------------------------------------------------------------------------
# ours


def our_step(setup: Setup) -> Callable:
    """A step (index) -> loss, from what the frozen part has made of images and texts, kept."""
    model, device = setup.model, setup.device
    image_cut, text_blocks = cut_points(setup.strategy, setup.blocks)
    _, image_rest = models.split_image_tower(model, image_cut)
    text_trunk, text_rest = models.split_text_tower(model, text_blocks)
    tokens = setup.tokens.to(device)
    ends = tokens.argmax(1)  # the end token has the highest number

    # None: nothing of that tower is frozen
    images = texts = None
    if image_cut is not None:
        images = image_activations(setup, image_cut)
    if text_blocks is not None:
        texts = frozen.text_activations(model, setup.flowers, setup.tokens, text_blocks).to(device)

    def step(index):
        if images is None:
            image = image_rest(get_batch(setup.pixels, index, device))  # (B, D)
        else:
            image = image_rest(images[index.to(device)])
        # each distinct prompt of the batch once
        distinct, inverse = torch.unique(setup.labels[index], return_inverse=True)
        distinct = distinct.to(device)
        inverse = inverse.to(device)
        trunk = text_trunk(tokens[distinct]) if texts is None else texts[distinct]
        text = text_rest(trunk, ends[distinct])  # (distinct, D)
        return setup.update(info_nce(image, text.index_select(0, inverse), SCALE))

    return step


def image_activations(setup: Setup, cut: models.Cut) -> torch.Tensor:
    """What the image tower computes before a cut, for all images."""
    everything = torch.arange(len(setup.labels))
    kept = frozen.image_activations(setup.model, setup.flowers, setup.pixels, everything, cut)
    return kept.to(setup.device)


# -----------------------------------------------------------------------------
# measuring


def measure_steps(setup: Setup, args: argparse.Namespace) -> None:
    """Measure a strategy that is trained by gradient steps."""
    start = time.perf_counter()
    step = our_step(setup)
    frozen_s = time.perf_counter() - start

    n = len(setup.labels)
    batches = torch.arange(n).split(args.batch_size)

    def our_epoch():
        for index in batches:
            step(index)

    # both ways must have the same loss; the weights do not change
    first = batches[0]
    images = get_batch(setup.pixels, first, "cpu")
    plain_loss = plain_step(setup)(images, setup.labels[first])
    our_loss = step(first)
    flops = models.count_flops(lambda: step(first)) * n / len(first)

    ways = {
        PLAIN: plain_epoch(setup, args.batch_size),
        f"train.py --strategy {setup.strategy}": our_epoch,
    }
    seconds = alternate(ways, args.rounds)
    print(
        f"{setup.strategy}: loss {plain_loss:.4f} (plain recipe) and {our_loss:.4f} (ours), "
        f"frozen part once {frozen_s:.1f} s"
    )
    what = f"epoch of {setup.strategy}, {args.architecture}, {n} images"
    report(args.rows, what, seconds, flops / peak_flops(setup.device), MATRICES)


def measure_linear(setup: Setup, args: argparse.Namespace) -> None:
    """Measure `linear`, whose epoch is an iteration of L-BFGS over the features of all images."""
    model = setup.model
    features = image_activations(setup, cut=0).float().cpu()  # (N, D), of length 1
    zero_shot = evaluate.zero_shot_head(model, setup.flowers.class_names, [TEMPLATE])
    from_random, from_texts = "train.py --strategy linear", "train.py --start_from zero_shot"
    iterations = {from_random: [], from_texts: []}

    def regression():
        regression = LogisticRegression(C=DEFAULT_C, max_iter=50)
        regression.fit(features.numpy(), setup.labels.numpy())
        iterations[from_random].append(int(regression.n_iter_[0]))

    def pulled():
        scale = model.logit_scale.exp().item()
        _, _, n = strategies.fit_pulled(features, setup.labels, zero_shot, scale)
        iterations[from_texts].append(n)

    plain = plain_epoch(setup, args.batch_size)
    seconds = alternate({PLAIN: plain, from_random: regression, from_texts: pulled}, args.rounds)

    # logits and their gradient: two products of N x D x C, two operations each
    flops = 4 * len(features) * setup.head.weight.numel()
    what = f"epoch of linear, {args.architecture}, {len(features)} images"
    for ours, counts in iterations.items():
        # the round that warms up is not among the seconds
        each = [fit / n for fit, n in zip(seconds[ours], counts[1:])]
        spent = {PLAIN: seconds[PLAIN], ours: each}
        report(args.rows, what, spent, flops / peak_flops(setup.device), MATRICES)


if __name__ == "__main__":
    main()
