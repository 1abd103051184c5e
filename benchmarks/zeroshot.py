"""Zero-shot evaluation, images/s from JPEG files to metrics: baseline_eval.py's way against CLIP_benchmark's recipe with open_clip, and transformers' pipeline.

    python benchmarks/zeroshot.py --data_root data/flowers-102      # ViT-B/32 shape, random weights, 128 images of the test split; ten minutes on two cores

CLIP_benchmark: the prompts of one class after the other through the text tower at 77 tokens, images from a DataLoader with two workers. The pipeline
takes one image after the other and all names anew with each; it gets --pipeline_images of them. Ours once without a pixel cache, once with it.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import clip
import torch
import torch.nn.functional as F
from measure import MATRICES, add_arguments, alternate, peak_flops, report
from peers import (
    Pictures,
    open_clip_model,
    open_clip_transform,
    transformers_model,
    transformers_tokenizer,
)
from torch.utils.data import DataLoader

from flowers import command, devices, evaluate, models
from flowers.data import Flowers, add_data_arguments, open_flowers
from flowers.pixels import load_pixels


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
        "--images", type=int, default=128, help="of the test split (default: %(default)s)"
    )
    parser.add_argument(
        "--pipeline_images",
        type=int,
        default=2,
        help="for transformers' pipeline (default: %(default)s)",
    )
    args = parser.parse_args()
    from transformers import CLIPImageProcessor, pipeline

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flowers = open_flowers(args.data_root, args.splits_path, args.splits)
    folder = Path(
        tempfile.mkdtemp()
    )  # the images in a folder of their own, whose cache can be deleted
    index = flowers.splits["test"][:: max(1, len(flowers.splits["test"]) // args.images)][
        : args.images
    ]
    flowers = Flowers(
        folder,
        tuple(flowers.files[i] for i in index),
        flowers.labels[index],
        flowers.class_names,
        {},
    )
    torch.manual_seed(0)
    model, theirs = (
        models.build(args.architecture).to(device),
        open_clip_model(args.architecture).to(device).eval(),
    )
    side, everything, labels = (
        model.visual.input_resolution,
        torch.arange(len(flowers.files)),
        torch.from_numpy(flowers.labels),
    )

    @torch.no_grad()
    def clip_benchmark():
        columns = []
        for name in flowers.class_names:
            with devices.autocast(device):
                features = F.normalize(
                    theirs.encode_text(
                        clip.tokenize([evaluate.TEMPLATE.replace("{}", name)]).to(device)
                    ),
                    dim=-1,
                ).mean(0)
                columns.append(features / features.norm())
        classifier = torch.stack(columns, 1)
        scores = []
        for images, _ in DataLoader(
            Pictures(flowers.files, labels, open_clip_transform(side)), batch_size=64, num_workers=2
        ):
            with devices.autocast(device):
                scores.append(
                    (100 * F.normalize(theirs.encode_image(images.to(device)), dim=-1) @ classifier)
                    .float()
                    .cpu()
                )
        best = torch.cat(scores).topk(5).indices == labels[:, None]
        return {"acc1": best[:, 0].float().mean().item(), "acc5": best.any(1).float().mean().item()}

    pipe = pipeline(
        "zero-shot-image-classification",
        model=transformers_model(args.architecture),
        tokenizer=transformers_tokenizer(),
        device=device,
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
    )

    def transformers_pipeline():
        for file in flowers.files[: args.pipeline_images]:
            pipe(
                str(file),
                candidate_labels=list(flowers.class_names),
                hypothesis_template=evaluate.TEMPLATE,
            )

    def ours():
        features = models.image_features(model, load_pixels(flowers, side), everything)
        return evaluate.evaluate_features(
            features,
            evaluate.zero_shot_head(model, flowers.class_names, [evaluate.TEMPLATE]),
            flowers.labels,
        )

    def ours_anew():
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        ours()

    spent = alternate(
        {
            "CLIP_benchmark's recipe with open_clip": clip_benchmark,
            "transformers pipeline": transformers_pipeline,
            "baseline_eval.py, no cache": ours_anew,
            "baseline_eval.py": ours,
        },
        args.rounds,
    )
    n = {name: args.pipeline_images if "pipeline" in name else len(flowers.files) for name in spent}
    limit = models.count_flops(ours) / len(flowers.files) / peak_flops(device)
    spent = {name: [t / n[name] for t in times] for name, times in spent.items()}
    again = spent.pop("baseline_eval.py")
    what = f"zero-shot evaluation, {args.architecture}, an image of {len(flowers.files)}"
    report(args.rows, what, spent, limit, MATRICES)
    spent.pop("baseline_eval.py, no cache")
    report(args.rows, what, {**spent, "baseline_eval.py, pixels cached": again}, limit, MATRICES)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
