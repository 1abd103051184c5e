"""An epoch after the first, each strategy that freezes something: ours, which keeps the frozen part, against the plain recipe with requires_grad=False.

    python benchmarks/strategies.py --data_root data/flowers-102               # ViT-B/32 shape, random weights, 64 images; 12 minutes on two cores
    python benchmarks/strategies.py --architecture ViT-L/14@336px --images 1024   # on a GPU

The plain recipe decodes every image with PIL + clip's transform and sends it and a prompt of 77 tokens through both towers at every step. The limit
counts the FLOPs that are left of our steps. `linear`: the image tower and a step over each batch there, an iteration of L-BFGS over all features here.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import MATRICES, add_arguments, alternate, peak_flops, report
from peers import Pictures, clip_transform
from sklearn.linear_model import LogisticRegression
from torch.utils.data import DataLoader

from flowers import command, evaluate, frozen, models, strategies
from flowers.data import Flowers, add_data_arguments, open_flowers
from flowers.losses import info_nce
from flowers.pixels import get_batch, load_pixels

MEASURED = ("last_blocks", "text", "prompt", "linear", "image", "lora")


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
        "--blocks", type=int, default=2, help="of last_blocks (default: %(default)s)"
    )
    parser.add_argument(
        "--strategies", nargs="+", choices=MEASURED, default=MEASURED, help="(default: all)"
    )
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flowers = open_flowers(args.data_root, args.splits_path, args.splits)
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # the dataset's images in a folder of its own, whose cache goes with it
        index = flowers.splits["train"][:: max(1, len(flowers.splits["train"]) // args.images)][
            : args.images
        ]
        flowers = Flowers(
            Path(folder),
            tuple(flowers.files[i] for i in index),
            flowers.labels[index],
            flowers.class_names,
            {},
        )
        labels, everything = torch.from_numpy(flowers.labels), torch.arange(len(index))
        for strategy in args.strategies:
            torch.manual_seed(0)
            model = models.build(args.architecture).to(device)
            strategies.prepare(model, strategy, args.blocks)
            side = model.visual.input_resolution
            template = strategies.context_template(4) if strategy == "prompt" else evaluate.TEMPLATE
            short = models.tokenize(evaluate.fill_templates(flowers.class_names, [template]))
            long, ends = (
                F.pad(short, (0, 77 - short.shape[1])).to(device),
                short.argmax(1).to(device),
            )
            head = torch.nn.Linear(model.text_projection.shape[1], len(flowers.class_names)).to(
                device
            )
            trained = (
                list(head.parameters())
                if strategy == "linear"
                else [p for p in model.parameters() if p.requires_grad]
            )
            optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)

            image_blocks, text_blocks = strategies.cut_points(strategy, args.blocks)
            (_, image_rest), (text_trunk, text_rest) = (
                models.split_image_tower(model, image_blocks),
                models.split_text_tower(model, text_blocks),
            )
            pixels = load_pixels(flowers, side)
            start = time.perf_counter()
            kept = (
                None
                if image_blocks is None
                else frozen.image_activations(model, flowers, pixels, everything, image_blocks).to(
                    device
                )
            )
            texts = (
                None
                if text_blocks is None
                else frozen.text_activations(model, flowers, short, text_blocks).to(device)
            )
            first = time.perf_counter() - start

            def step(loss):
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                return loss.item()

            def plain(images, y):
                image = models.encode_images(model, images.to(device))
                if strategy == "linear":
                    return step(F.cross_entropy(head(image), y.to(device)))
                return step(info_nce(image, models.encode_texts(model, long[y.to(device)]), 100.0))

            def ours(part):
                image = image_rest(
                    get_batch(pixels, part, device) if kept is None else kept[part.to(device)]
                )
                rows, inverse = (
                    x.to(device) for x in torch.unique(labels[part], return_inverse=True)
                )
                text = text_rest(
                    text_trunk(short.to(device)[rows]) if texts is None else texts[rows], ends[rows]
                )
                return step(info_nce(image, text.index_select(0, inverse), 100.0))

            def regression():
                fit = LogisticRegression(C=strategies.DEFAULT_C, max_iter=50).fit(
                    kept.float().cpu().numpy(), labels.numpy()
                )
                iterations.append(int(fit.n_iter_[0]))

            iterations, loader = (
                [],
                DataLoader(
                    Pictures(flowers.files, flowers.labels, clip_transform(side)), args.batch_size
                ),
            )
            name = f"train.py --strategy {strategy}"
            works = {
                "plain recipe, requires_grad=False": lambda: [plain(*pair) for pair in loader],
                name: regression
                if strategy == "linear"
                else lambda: [ours(part) for part in everything.split(args.batch_size)],
            }
            what = f"epoch of {strategy}, {args.architecture}, {len(index)} images"
            if strategy == "linear":
                spent = alternate(works, args.rounds)
                spent[name] = [t / i for t, i in zip(spent[name], iterations[1:])]
                limit = 4 * len(index) * head.weight.numel() / peak_flops(device)
            else:
                part = everything[: args.batch_size]
                losses = plain(get_batch(pixels, part, "cpu"), labels[part]), ours(part)
                limit = (
                    models.count_flops(lambda: ours(part))
                    * len(index)
                    / len(part)
                    / peak_flops(device)
                )
                spent = alternate(works, args.rounds)
                print(
                    f"{strategy}: loss {losses[0]:.4f} (plain recipe) and {losses[1]:.4f} (ours), frozen part once {first:.1f} s"
                )
            report(args.rows, what, spent, limit, MATRICES)


if __name__ == "__main__":
    main()
