"""Zero-shot evaluation from JPEG files to metrics, and names for pictures: the ways of
baseline_eval.py and predict.py against CLIP_benchmark's recipe with open_clip, and the pipeline of
transformers.

    python benchmarks/zeroshot.py --data_root data/flowers-102      # ten minutes on two cores

Shape of ViT-B/32, random weights, 128 images of the test split. CLIP_benchmark: the prompts of
one class after the other through the text tower at 77 tokens, images from a DataLoader with two
workers. The pipeline takes one image after the other and encodes all names anew with each; it gets
--pipeline_images of them. Ours is measured without a pixel cache, and with it. predict.py has none:
it reads pictures of any format, and ranks all names of each.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import clip
import torch
import torch.nn.functional as F
from measure import MATRICES, add_arguments, alternate, peak_flops, per_item, report, spread_over
from peers import (
    Pictures,
    open_clip_model,
    open_clip_transform,
    transformers_model,
    transformers_processor,
    transformers_tokenizer,
)
from torch.utils.data import DataLoader

from flowers import command, devices, evaluate, models
from flowers.choices import TEMPLATE
from flowers.data import Flowers, add_data_arguments, open_flowers
from flowers.pixels import load_pixels

sys.path.append(str(Path(__file__).resolve().parent.parent))
import predict  # noqa: E402, the script

BATCH = 64
PIPELINE = "transformers pipeline"


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
        help="a ViT's shape, with random weights (default: %(default)s)",
    )
    parser.add_argument(
        "--images", type=int, default=128, help="images of the test split (default: %(default)s)"
    )
    parser.add_argument(
        "--pipeline_images",
        type=int,
        default=2,
        help="images for the pipeline of transformers (default: %(default)s)",
    )
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory() as folder:
        # the images in a folder of their own, whose cache can be deleted
        full = open_flowers(
            args.data_root, args.splits_path, args.splits, splits_base=args.splits_base
        )
        index = spread_over(full.splits["test"], args.images)
        files = tuple(full.files[i] for i in index)
        flowers = Flowers(Path(folder), files, full.labels[index], full.class_names, {})
        n = len(files)

        model = models.build(args.architecture).to(device)

        def ours():
            pixels = load_pixels(flowers, model.visual.input_resolution)
            features = models.image_features(model, pixels, torch.arange(n))  # (N, D)
            head = evaluate.zero_shot_head(model, flowers.class_names, [TEMPLATE])
            return evaluate.evaluate_features(features, head, flowers.labels)

        def names_of_pictures():
            _, features, _ = predict.encode_pictures(model, files)  # (N, D)
            head = evaluate.zero_shot_head(model, flowers.class_names, [TEMPLATE])
            return predict.rank(predict.predict(features, head), flowers.class_names, 5)

        def ours_without_cache():
            shutil.rmtree(flowers.root / ".cache", ignore_errors=True)
            ours()

        benchmark = "CLIP_benchmark's recipe with open_clip"
        few = files[: args.pipeline_images]
        ways = {
            benchmark: clip_benchmark(args.architecture, flowers, device),
            PIPELINE: pipeline_of(args.architecture, flowers, few, device),
            "baseline_eval.py, no cache": ours_without_cache,
            "baseline_eval.py, pixels cached": ours,
            "predict.py": names_of_pictures,
        }
        seconds = alternate(ways, args.rounds)

        # Seconds an image: the pipeline gets fewer images than the others.
        pipeline = {PIPELINE: seconds.pop(PIPELINE)}
        each = per_item(seconds, n) | per_item(pipeline, args.pipeline_images)
        limit = models.count_flops(ours) / n / peak_flops(device)

    what = f"zero-shot evaluation, {args.architecture}, an image of {n}"
    titles = {
        "baseline_eval.py, no cache": what,
        "baseline_eval.py, pixels cached": what,
        "predict.py": f"names for pictures, {args.architecture}, one of {n}",
    }
    # a table of each of our ways: the peers are the same
    peers = {name: each[name] for name in (benchmark, PIPELINE)}
    for name, title in titles.items():
        report(args.rows, title, peers | {name: each[name]}, limit, MATRICES)


def clip_benchmark(architecture: str, flowers: Flowers, device: torch.device) -> Callable:
    """CLIP_benchmark's zero-shot evaluation, written from its zeroshot_classification.py."""
    model = open_clip_model(architecture).to(device).eval()
    labels = torch.from_numpy(flowers.labels)
    pictures = Pictures(flowers.files, labels, open_clip_transform(models.SHAPES[architecture][1]))
    loader = DataLoader(pictures, batch_size=BATCH, num_workers=2)

    def classifier():
        columns = []
        for name in flowers.class_names:
            tokens = clip.tokenize([TEMPLATE.replace("{}", name)]).to(device)  # (1, 77)
            with devices.autocast(device):
                features = F.normalize(model.encode_text(tokens), dim=-1).mean(0)
                columns.append(features / features.norm())
        return torch.stack(columns, 1)  # (D, C)

    @torch.no_grad()
    def work():
        weights = classifier()
        logits = []  # (B, C) each
        for images, _ in loader:
            with devices.autocast(device):
                features = F.normalize(model.encode_image(images.to(device)), dim=-1)
                logits.append((100 * features @ weights).float().cpu())
        correct = torch.cat(logits).topk(5).indices == labels[:, None]  # (N, 5)
        acc1 = correct[:, 0].float().mean().item()
        acc5 = correct.any(1).float().mean().item()
        return {"acc1": acc1, "acc5": acc5}

    return work


def pipeline_of(
    architecture: str, flowers: Flowers, files: tuple[Path, ...], device: torch.device
) -> Callable:
    """The zero-shot pipeline of transformers, over the files."""
    # importing it takes seconds
    from transformers import pipeline

    pipe = pipeline(
        "zero-shot-image-classification",
        model=transformers_model(architecture),
        tokenizer=transformers_tokenizer(),
        image_processor=transformers_processor(models.SHAPES[architecture][1]),
        device=device,
    )
    names = list(flowers.class_names)

    def work():
        for file in files:
            pipe(str(file), candidate_labels=names, hypothesis_template=TEMPLATE)

    return work


if __name__ == "__main__":
    main()
