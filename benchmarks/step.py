"""Full fine-tuning, a step and an epoch: ours against the plain recipe, open_clip's training step,
and the CLIPModel(return_loss=True) of transformers.

    python benchmarks/step.py       # a step, ViT-B/32 shape, batch 64; ten minutes on two cores
    python benchmarks/step.py --loss sigmoid --batch_size 16
    python benchmarks/step.py --architecture tiny --epoch_images 1024 --data_root data/flowers-102

With another loss than InfoNCE there are fewer peers: open_clip has SigLIP's own sigmoid, and the
cross-entropy over the texts of all classes is the plain recipe's alone. The last command measures
epochs from JPEGs: decoding, feeding, training. The peers take a caption of 77 tokens for each image
(transformers: as long as the longest), ours takes each distinct prompt once, cut to length. In an
epoch theirs come from a DataLoader with two workers and their own transform, ours from the pixel
cache. All have random weights of the same shape. At the end it prints how far our loss and
gradients are from those of the plain recipe.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import clip
import torch
import torch.nn.functional as F
from measure import MATRICES, add_arguments, alternate, peak_flops, report, spread_over
from peers import (
    Pictures,
    clip_transform,
    open_clip_model,
    open_clip_transform,
    transformers_model,
    transformers_tokenizer,
    transformers_transform,
)
from torch.utils.data import DataLoader

import flowers
from flowers import command, devices, evaluate, models
from flowers.choices import LOSSES, TEMPLATE
from flowers.data import Flowers, add_data_arguments, open_flowers
from flowers.losses import class_cross_entropy, info_nce, sigmoid_loss
from flowers.pixels import get_batch, load_pixels, to_device

PLAIN = "plain recipe"
OPEN_CLIP = "open_clip's step"
TRANSFORMERS = "transformers, return_loss=True"
OURS = "train.py's step"
BIAS = -10.0  # of the sigmoid loss, where SigLIP begins


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser)
    add_arguments(parser)
    vits = [name for name, shape in models.SHAPES.items() if isinstance(shape[2], int)]
    parser.add_argument(
        "--architecture",
        default="ViT-B/32",
        choices=vits,
        help="shape, with random weights (default: %(default)s)",
    )
    parser.add_argument(
        "--batch_size", type=int, default=64, help="images and captions (default: %(default)s)"
    )
    parser.add_argument("--loss", choices=LOSSES, default="info_nce", help="(default: %(default)s)")
    parser.add_argument(
        "--epoch_images",
        type=int,
        default=0,
        help="measure epochs of so many training images (default: 0, a step on random pixels)",
    )
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)

    # -----------------------------------------------------------------------------
    # models and a batch
    if args.epoch_images:
        dataset = open_flowers(
            args.data_root, args.splits_path, args.splits, splits_base=args.splits_base
        )
        class_names = dataset.class_names
    else:
        class_names = oxford_names()
    prompts = evaluate.fill_templates(class_names, [TEMPLATE])
    model = models.build(args.architecture).to(device)
    steps = {PLAIN: plain_step(model, prompts, args.loss)}
    if args.loss != "cross_entropy":
        steps[OPEN_CLIP] = open_clip_step(args.architecture, prompts, device, args.loss)
    if args.loss == "info_nce":
        steps[TRANSFORMERS] = transformers_step(args.architecture, prompts, device)
    steps[OURS] = our_step(model, prompts, args.loss)
    side = model.visual.input_resolution
    images = torch.randn(args.batch_size, 3, side, side, device=device)
    labels = torch.randint(0, len(class_names), (args.batch_size,), device=device)

    # -----------------------------------------------------------------------------
    # the same loss and gradients?
    plain_loss, plain_gradients = loss_and_gradients(model, steps[PLAIN], images, labels)
    our_loss, our_gradients = loss_and_gradients(model, steps[OURS], images, labels)
    difference = max(map(relative_difference, plain_gradients, our_gradients))

    # -----------------------------------------------------------------------------
    # time
    flops = models.count_flops(lambda: steps[OURS](images, labels))
    if args.epoch_images:
        works, n = epochs(steps, dataset, side, args, device)
        flops *= n / args.batch_size
        what = f"full fine-tuning epoch from JPEGs, {args.architecture}, {n:,} images"
    else:
        works = {name: lambda step=step: step(images, labels) for name, step in steps.items()}
        what = f"full fine-tuning step, {args.architecture}"
    what += f", batch {args.batch_size}"
    if args.loss != "info_nce":
        what += f", {args.loss}"
    seconds = alternate(works, args.rounds)
    report(args.rows, what, seconds, flops / peak_flops(device), MATRICES)
    print(
        f"loss {plain_loss:.6f} (plain recipe) and {our_loss:.6f} (ours); "
        f"greatest relative difference of a parameter's gradient {difference:.1e}"
    )


def oxford_names() -> list[str]:
    """The 102 names of the dataset, without the dataset."""
    path = Path(flowers.__file__).with_name("cat_to_name.json")
    return list(json.loads(path.read_text(encoding="utf-8")).values())


# -----------------------------------------------------------------------------
# one training step (images, labels) -> loss of each way


def optimizer_step(loss_of: Callable, model: torch.nn.Module, **options) -> Callable:
    """A real step of AdamW at learning rate 0, which leaves the weights as they are."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, **options)

    def step(images, labels):
        optimizer.zero_grad()
        with devices.autocast(images.device):
            loss = loss_of(images, labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def plain_step(model: torch.nn.Module, prompts: list[str], loss: str = "info_nce") -> Callable:
    """Each image with its own caption, through OpenAI's own forward pass."""
    tokens = clip.tokenize(prompts).to(model.logit_scale.device)  # (C, 77)

    def loss_of(images, labels):
        image = F.normalize(model.encode_image(images).float(), dim=1)  # (B, D)
        read = tokens if loss == "cross_entropy" else tokens[labels]
        text = F.normalize(model.encode_text(read).float(), dim=1)  # (B, D) or (C, D)
        return loss_of_features(loss, image, text, model.logit_scale.exp(), labels)

    return optimizer_step(loss_of, model)


def loss_of_features(
    name: str, image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """The loss of images (B, D) and of their texts (B, D), or those of all classes (C, D)."""
    if name == "cross_entropy":
        return class_cross_entropy(image, text, scale, labels)
    if name == "sigmoid":
        return sigmoid_loss(image, text, scale, BIAS)
    return info_nce(image, text, scale)


def open_clip_step(
    architecture: str, prompts: list[str], device: torch.device, loss: str = "info_nce"
) -> Callable:
    """The same with the model and the loss of open_clip."""
    from open_clip.loss import ClipLoss, SigLipLoss

    model = open_clip_model(architecture).to(device).train()
    tokens = clip.tokenize(prompts).to(device)  # (C, 77)
    contrastive_loss = ClipLoss()
    each_pair_s_loss = SigLipLoss()

    def loss_of(images, labels):
        image, text, scale = model(images, tokens[labels])[:3]
        if loss == "sigmoid":
            return each_pair_s_loss(image, text, scale, BIAS)
        return contrastive_loss(image, text, scale)

    return optimizer_step(loss_of, model)


def transformers_step(architecture: str, prompts: list[str], device: torch.device) -> Callable:
    """The same with the model of transformers, which computes its own loss."""
    model = transformers_model(architecture).to(device).train()
    tokenizer = transformers_tokenizer()
    # (C, T), padded to the longest prompt
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")["input_ids"].to(device)

    def loss_of(images, labels):
        return model(input_ids=tokens[labels], pixel_values=images, return_loss=True).loss

    return optimizer_step(loss_of, model)


def our_step(model: torch.nn.Module, prompts: list[str], loss: str = "info_nce") -> Callable:
    """Each distinct prompt of the batch once, cut to the longest one."""
    tokens = models.tokenize(prompts).to(model.logit_scale.device)  # (C, T)

    def loss_of(images, labels):
        image = models.encode_images(model, images)  # (B, D)
        if loss == "cross_entropy":
            text = models.encode_texts(model, tokens)  # (C, D)
        else:
            distinct, inverse = torch.unique(labels, return_inverse=True)
            text = models.encode_texts(model, tokens[distinct]).index_select(0, inverse)  # (B, D)
        return loss_of_features(loss, image, text, model.logit_scale.exp(), labels)

    return optimizer_step(loss_of, model, fused=True)


def loss_and_gradients(
    model: torch.nn.Module, step: Callable, images: torch.Tensor, labels: torch.Tensor
) -> tuple[float, list[torch.Tensor]]:
    """The loss of a step, and the gradient that it leaves at each parameter."""
    loss = step(images, labels)
    return loss, [p.grad.clone() for p in model.parameters()]


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |a|."""
    return ((a - b).norm() / a.norm().clamp_min(1e-12)).item()


# -----------------------------------------------------------------------------
# epochs


def epochs(
    steps: dict[str, Callable],
    dataset: Flowers,
    side: int,
    args: argparse.Namespace,
    device: torch.device,
) -> tuple[dict[str, Callable], int]:
    """An epoch of each way, from JPEGs or from our cache, and the number of its images."""
    index = spread_over(dataset.splits["train"], args.epoch_images)
    files = [dataset.files[i] for i in index]
    labels = torch.from_numpy(dataset.labels[index])
    pixels = to_device(load_pixels(dataset, side), device)
    index = torch.from_numpy(index.copy())  # a writable array, as torch wants it

    def our_batches():
        for part in torch.randperm(len(files)).split(args.batch_size):
            yield get_batch(pixels, index[part], device), labels[part]

    def loader(transform):
        pictures = Pictures(files, labels, transform(side))
        return DataLoader(
            pictures, args.batch_size, shuffle=True, num_workers=2, persistent_workers=True
        )

    def epoch(step, batches):
        for images, targets in batches:
            step(images.to(device), targets.to(device))

    transforms = {
        PLAIN: clip_transform,
        OPEN_CLIP: open_clip_transform,
        TRANSFORMERS: transformers_transform,
    }
    peers = {name: loader(transforms[name]) for name in steps if name != OURS}
    works = {}
    for name, batches in peers.items():
        works[name] = lambda name=name, batches=batches: epoch(steps[name], batches)
    works[OURS] = lambda: epoch(steps[OURS], our_batches())
    return works, len(files)


if __name__ == "__main__":
    main()
