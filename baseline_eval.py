"""Zero-shot evaluation of any CLIP: a pretrained one, a fine-tuned one, or `tiny` with random weights.

    python baseline_eval.py                                          # ViT-B/32 on Oxford Flowers 102, swapped splits
    python baseline_eval.py --architecture runs/NAME/model.pt        # what train.py made
    python baseline_eval.py --architecture runs/NAME --wise_ft 0 --wise_ft 0.5 --wise_ft 1     # between its start and what it became
    python baseline_eval.py --data_root sample --architecture tiny   # any machine, offline, seconds

Prints a table, and leaves runs/NAME/ with predictions.csv, report.csv, result.json, a confusion matrix and the mistakes.
"""

import argparse
import time
from pathlib import Path

import torch

from flowers import UserError, command, devices, evaluate, figures, files, runs
from flowers.data import add_data_arguments, open_flowers
from flowers.layouts import read_captions
from flowers.models import image_features, text_features
from flowers.pixels import load_pixels, to_device
from flowers.study import figures as plots
from flowers.tracking import log_mistakes, start_wandb
from flowers.weights import load_model


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser)
    parser.add_argument(
        "--split",
        choices=["test", "val", "train"],
        default="test",
        help="images to evaluate; val needs --holdout (default: %(default)s)",
    )
    parser.add_argument(
        "--captions", help="captions.jsonl[.gz]: also retrieval with one sentence an image"
    )
    parser.add_argument(
        "--architecture",
        default="ViT-B/32",
        help="a name of clip.available_models(), tiny, tiny-rn, or the path of a state dict or run (default: %(default)s)",
    )
    parser.add_argument(
        "--prompt_template",
        action="append",
        help=f"text with {{}} for the class name; repeat it for an ensemble (default: '{evaluate.TEMPLATE}')",
    )
    parser.add_argument(
        "--wise_ft",
        type=float,
        action="append",
        default=[],
        metavar="ALPHA",
        help="also evaluate (1 - ALPHA) * the weights a run started from + ALPHA * its own (WiSE-FT); repeat it for a curve",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random weights of tiny (default: %(default)s)"
    )
    runs.add_run_arguments(parser, compare=True)
    args = parser.parse_args()
    earlier = {Path(run).name: runs.read_metrics(run, args.split) for run in args.compare}

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    devices.seed_everything(args.seed)
    flowers = open_flowers(
        args.data_root, args.splits_path, args.splits, args.holdout, args.class_names
    )
    index = flowers.splits[args.split]
    if not len(index):
        raise UserError(f"the {args.split} split is empty: val needs --holdout")
    captions = read_captions(args.captions, flowers.files) if args.captions else None
    model = load_model(args.architecture, device)
    head, args.prompt_template = evaluate.load_head(
        args.architecture, model, flowers.class_names, args.prompt_template, evaluate.TEMPLATE
    )
    if args.wise_ft:
        start_state, tuned_state = (
            evaluate.load_starting_weights(args.architecture),
            {n: t.clone() for n, t in model.state_dict().items()},
        )
    pixels = to_device(load_pixels(flowers, model.visual.input_resolution), device)
    config = {
        "job": "eval",
        **{k: v for k, v in vars(args).items() if k not in ("name", "compare")},
    }
    folder = runs.new_run(args.runs, args.name, config, flowers.splits)
    tracker = start_wandb(args.wandb, folder, config)
    start = time.perf_counter()
    places = torch.from_numpy(index.copy())
    images = image_features(model, pixels, places)
    sentences = text_features(model, [captions[i][0] for i in index]) if captions else None
    metrics, probabilities = evaluate.evaluate_features(
        images, head, flowers.labels[index], sentences
    )
    seconds = time.perf_counter() - start

    evaluate.save_outputs(folder, probabilities, flowers, index)
    result = {
        **{f"{args.split}/{k}": v for k, v in metrics.items()},
        "eval_seconds": round(seconds, 3),
        "eval_images_per_s": round(len(index) / seconds, 1),
    }
    rows = []
    for alpha in args.wise_ft:
        evaluate.interpolate(model, start_state, tuned_state, alpha)
        along, _ = evaluate.evaluate_features(
            image_features(model, pixels, places),
            evaluate.zero_shot_head(model, flowers.class_names, args.prompt_template),
            flowers.labels[index],
        )
        rows.append({"alpha": alpha, **{f"{args.split}/{k}": v for k, v in along.items()}})
        tracker.log(rows[-1])
        earlier[f"alpha {alpha:g}"] = along
    if rows:
        files.write_lines(folder / "metrics.jsonl", rows)
        curve = [
            {k.removeprefix(f"{args.split}/"): v for k, v in row.items()}
            for row in sorted(rows, key=lambda row: row["alpha"])
        ]
        plots.wise_ft({f"{folder.name} ({args.split})": curve}, folder / "wise_ft.png")
    runs.finish(
        folder, {"name": folder.name, **result, **config}
    )  # at the end: a run with a result is whole
    tracker.log(result)
    log_mistakes(tracker, figures.mistakes(probabilities.numpy(), flowers, index))
    tracker.finish()
    print(evaluate.format_table({**earlier, folder.name: metrics}))
    print(f"{len(index):,} images in {seconds:.1f} s; results and pictures in {folder}/")


if __name__ == "__main__":
    main()
