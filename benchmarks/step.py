"""Full fine-tuning, a step and an epoch: ours against the plain recipe, open_clip's training step, and transformers' CLIPModel(return_loss=True).

    python benchmarks/step.py                                                                    # a step, ViT-B/32 shape, batch 64; ten minutes on two cores
    python benchmarks/step.py --architecture tiny --epoch_images 1024 --data_root data/flowers-102   # whole epochs from JPEGs: decoding, feeding, training

Peers take a caption of 77 tokens for each image (transformers: as long as the longest), ours each distinct prompt once, cut to length. In an epoch
theirs come from a DataLoader with two workers and their own transform, ours from the pixel cache. Random weights of the same shape; at the end it
prints how far our loss and gradients are from those of the plain recipe.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import clip
import torch
import torch.nn.functional as F
from measure import MATRICES, add_arguments, alternate, peak_flops, report
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

from flowers import command, devices, evaluate, models
from flowers.data import add_data_arguments, open_flowers
from flowers.losses import info_nce
from flowers.pixels import get_batch, load_pixels, to_device


def step_of(loss_of: Callable, model: torch.nn.Module, **options) -> Callable:
    """A true step of AdamW at learning rate 0, which leaves the weights alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, **options)

    def step(images, labels):
        optimizer.zero_grad()
        with devices.autocast(images.device):
            loss = loss_of(images, labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def steps(architecture: str, prompts: list[str], device: torch.device) -> dict:
    """One training step (images, labels) -> loss of each way, and our model."""
    from open_clip.loss import ClipLoss

    model = models.build(architecture).to(device)
    their_clip, their_transformer = (
        open_clip_model(architecture).to(device).train(),
        transformers_model(architecture).to(device).train(),
    )
    long, short = clip.tokenize(prompts).to(device), models.tokenize(prompts).to(device)
    ids, contrast = (
        transformers_tokenizer()(prompts, padding=True, return_tensors="pt")["input_ids"].to(
            device
        ),
        ClipLoss(),
    )

    def plain(images, labels):
        image, text = (
            F.normalize(f.float(), dim=1)
            for f in (model.encode_image(images), model.encode_text(long[labels]))
        )
        return info_nce(image, text, model.logit_scale.exp())

    def ours(images, labels):
        distinct, inverse = torch.unique(labels, return_inverse=True)
        return info_nce(
            models.encode_images(model, images),
            models.encode_texts(model, short[distinct]).index_select(0, inverse),
            model.logit_scale.exp(),
        )

    return {
        "model": model,
        "plain recipe": step_of(plain, model),
        "open_clip's step": step_of(
            lambda images, labels: contrast(*their_clip(images, long[labels])[:3]), their_clip
        ),
        "transformers, return_loss=True": step_of(
            lambda images, labels: (
                their_transformer(input_ids=ids[labels], pixel_values=images, return_loss=True).loss
            ),
            their_transformer,
        ),
        "train.py's step": step_of(ours, model, fused=True),
    }


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
    parser.add_argument(
        "--epoch_images",
        type=int,
        default=0,
        help="measure epochs of so many training images (default: 0, a step on random pixels)",
    )
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    names = list(
        json.loads(Path(models.__file__).with_name("cat_to_name.json").read_text()).values()
    )
    flowers = (
        open_flowers(args.data_root, args.splits_path, args.splits) if args.epoch_images else None
    )
    ways = steps(
        args.architecture,
        evaluate.fill_templates(flowers.class_names if flowers else names, [evaluate.TEMPLATE]),
        device,
    )
    model = ways.pop("model")
    side = model.visual.input_resolution
    images = torch.randn(args.batch_size, 3, side, side, device=device)
    labels = torch.randint(
        0, len(flowers.class_names) if flowers else len(names), (args.batch_size,), device=device
    )
    plain, ours = ways["plain recipe"], ways["train.py's step"]
    losses, gradients = [], []
    for step in (plain, ours):
        losses.append(step(images, labels))
        gradients.append([p.grad.clone() for p in model.parameters()])
    apart = max(((a - b).norm() / a.norm().clamp_min(1e-12)).item() for a, b in zip(*gradients))
    operations = models.count_flops(lambda: ours(images, labels))

    if not flowers:
        spent = alternate(
            {name: lambda step=step: step(images, labels) for name, step in ways.items()},
            args.rounds,
        )
        report(
            args.rows,
            f"full fine-tuning step, {args.architecture}, batch {args.batch_size}",
            spent,
            operations / peak_flops(device),
            MATRICES,
        )
    else:
        train = flowers.splits["train"][
            :: max(1, len(flowers.splits["train"]) // args.epoch_images)
        ][: args.epoch_images]
        files, classes = [flowers.files[i] for i in train], torch.from_numpy(flowers.labels[train])
        pixels, places = (
            to_device(load_pixels(flowers, side), device),
            torch.from_numpy(train.copy()),
        )
        loaders = {
            name: DataLoader(
                Pictures(files, classes, transform(side)),
                args.batch_size,
                shuffle=True,
                num_workers=2,
                persistent_workers=True,
            )
            for name, transform in zip(
                ways, (clip_transform, open_clip_transform, transformers_transform)
            )
        }

        def epoch(name):
            feed = loaders.get(name) or (
                (get_batch(pixels, places[part], device), classes[part])
                for part in torch.randperm(len(files)).split(args.batch_size)
            )
            for x, y in feed:
                ways[name](x.to(device), y.to(device))

        spent = alternate({name: lambda name=name: epoch(name) for name in ways}, args.rounds)
        report(
            args.rows,
            f"full fine-tuning epoch from JPEGs, {args.architecture}, {len(files):,} images, batch {args.batch_size}",
            spent,
            operations * len(files) / args.batch_size / peak_flops(device),
            MATRICES,
        )
    print(
        f"loss {losses[0]:.6f} (plain recipe) and {losses[1]:.6f} (ours); greatest relative difference of a parameter's gradient {apart:.1e}"
    )


if __name__ == "__main__":
    main()
