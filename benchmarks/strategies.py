"""An epoch after the first, each strategy with a frozen part: the plain recipe (requires_grad=False) against ours, which keeps the frozen part.

    python benchmarks/strategies.py --data_root data/flowers-102            # ViT-B/32 shape, random weights, 256 images; 20 minutes on two cores
    python benchmarks/strategies.py --architecture ViT-L/14@336px --rounds 5   # on a GPU

The plain recipe decodes every image with PIL + clip's transform and sends it and a prompt of 77 tokens through both towers at every step. Printed
beside the measured ratio: the ratio of the counted FLOPs of a step, forward and backward, without decoding. `linear`: an epoch is a step
over each batch there, an iteration of L-BFGS over all features here.
"""
import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch.utils.flop_counter import FlopCounterMode

from flowers import command, evaluate, frozen, models, strategies
from flowers.data import add_data_arguments, open_flowers
from flowers.losses import info_nce
from flowers.pixels import batch, load_pixels

warnings.simplefilter("ignore")
from clip.clip import _transform  # noqa: E402

MEASURED = {"last_blocks": 3.5, "text": 8, "prompt": 3, "linear": 100, "image": 1.2}  # and the ratio to reach


def flops(work) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@command
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--architecture", default="ViT-B/32", choices=list(models.SHAPES), help="shape, with random weights (default: %(default)s)")
    parser.add_argument("--images", type=int, default=256, help="images of an epoch (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="images a step (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=2, help="of last_blocks (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="alternating epochs of each (default: %(default)s)")
    parser.add_argument("--strategies", nargs="+", choices=list(MEASURED), default=list(MEASURED), help="(default: all)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flowers = open_flowers(args.data_root, args.splits_path, args.splits)
    with tempfile.TemporaryDirectory() as folder:  # the dataset's images in a folder of its own, whose cache goes with it
        index = torch.from_numpy(flowers.splits["train"][:: len(flowers.splits["train"]) // args.images][:args.images].copy())
        files = tuple(flowers.files[i] for i in index)
        flowers = type(flowers)(Path(folder), files, flowers.labels[index], flowers.class_names, {})
        labels = torch.from_numpy(flowers.labels)
        everything = torch.arange(len(files))
        for strategy in args.strategies:
            torch.manual_seed(0)
            model = models.build(args.architecture).to(device)
            strategies.prepare(model, strategy, args.blocks)
            model.logit_scale.requires_grad_(False)
            side = model.visual.input_resolution
            transform = _transform(side)
            template = strategies.template(4) if strategy == "prompt" else evaluate.TEMPLATE
            short = models.tokenize(evaluate.prompts(flowers.class_names, [template]))
            long = F.pad(short, (0, 77 - short.shape[1])).to(device)
            head = torch.nn.Linear(model.text_projection.shape[1], len(flowers.class_names)).to(device)
            trained = list(head.parameters()) if strategy == "linear" else [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)

            image_blocks, text_blocks = strategies.cuts(strategy, args.blocks)
            (_, image_rest), (text_trunk, text_rest) = models.split_image_tower(model, image_blocks), models.split_text_tower(model, text_blocks)
            pixels = load_pixels(flowers, side)
            first = seconds(lambda: [] if image_blocks is None else frozen.image_activations(model, flowers, pixels, everything, image_blocks))
            kept = None if image_blocks is None else frozen.image_activations(model, flowers, pixels, everything, image_blocks).to(device)
            texts = None if text_blocks is None else frozen.text_activations(model, flowers, short, text_blocks).to(device)
            ends = short.argmax(1).to(device)

            def plain(part, decoded=None):
                images = decoded if decoded is not None else torch.stack([transform(Image.open(files[i])) for i in part]).to(device)
                image = models.encode_images(model, images)
                if strategy == "linear":
                    loss = F.cross_entropy(head(image), labels[part].to(device))
                else:
                    loss = info_nce(image, models.encode_texts(model, long[labels[part].to(device)]), 100.0)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                return loss.item()

            def ours(part):
                image = image_rest(batch(pixels, part, device) if kept is None else kept[part.to(device)])
                rows, inverse = (x.to(device) for x in torch.unique(labels[part], return_inverse=True))
                text = text_rest(text_trunk(short.to(device)[rows]) if texts is None else texts[rows], ends[rows])
                loss = info_nce(image, text.index_select(0, inverse), 100.0)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                return loss.item()

            def epoch(step):
                for part in everything.split(args.batch_size):
                    step(part)

            def regression():
                fit = LogisticRegression(C=strategies.DEFAULT_C, max_iter=50).fit(kept.float().cpu().numpy(), labels.numpy())
                iterations.append(int(fit.n_iter_[0]))
            part, iterations = everything[:args.batch_size], []
            counted = ""
            if strategy != "linear":
                losses = plain(part), ours(part)  # these warm up too
                decoded = batch(pixels, part, device)
                counted = f", counted FLOPs {flops(lambda: plain(part, decoded)) / flops(lambda: ours(part)):5.1f}, loss {losses[0]:.4f} and {losses[1]:.4f}"
            rounds = []
            for _ in range(args.rounds):
                slow, fast = seconds(lambda: epoch(plain)), seconds(regression if strategy == "linear" else lambda: epoch(ours))
                rounds.append((slow, fast / iterations[-1] if strategy == "linear" else fast))
            ratios = [a / b for a, b in rounds]
            print(f"{strategy:12s} plain {statistics.median(a for a, _ in rounds):7.2f} s, ours {statistics.median(b for _, b in rounds):8.4f} s an epoch: "
                  f"{statistics.median(ratios):6.1f} times as fast ({min(ratios):.1f} to {max(ratios):.1f}; aim {MEASURED[strategy]}){counted}; "
                  f"frozen part once {first:.1f} s", flush=True)
    print(f"{args.architecture}, random weights, {len(files)} images, batch {args.batch_size}, on {device}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
