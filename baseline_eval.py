"""Zero-shot evaluation of any CLIP: a pretrained one, a fine-tuned one, or `tiny`.

    python baseline_eval.py                                    # ViT-B/32, swapped splits
    python baseline_eval.py --architecture runs/NAME/model.pt  # what train.py made
    python baseline_eval.py --data_root sample --architecture tiny  # any machine, offline, seconds

After train.py --holdout, with the temperature that its val images gave (never those of test):

    python baseline_eval.py --architecture runs/NAME --split test --calibrated

Between the weights that a run started from and what it became (WiSE-FT):

    python baseline_eval.py --architecture runs/NAME --wise_ft 0 --wise_ft 0.5 --wise_ft 1

The mean of the weights of several runs from one start (a soup):

    python baseline_eval.py --soup runs/SEED0 runs/SEED1 runs/SEED2

A run is evaluated with the dataset, splits, class names and prompts that it was trained with,
unless flags say otherwise. Images that it was trained on are refused.

Prints a table, and leaves runs/NAME/ with predictions.csv, report.csv, result.json, a confusion
matrix and the mistakes; of a soup also its model.pt.
"""

import argparse
import math
import time
from pathlib import Path

from flowers import UserError, add_device_arguments, add_switch, check_seed, command, runs
from flowers.choices import RANDOM, TEMPLATE, add_activation_argument
from flowers.data import add_data_arguments
from flowers.files import user_path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # images
    add_data_arguments(parser)
    parser.add_argument(
        "--split",
        choices=["test", "val", "train"],
        default="test",
        help="images to evaluate; val needs --holdout (default: %(default)s)",
    )
    parser.add_argument(
        "--captions",
        type=user_path,
        help="captions.jsonl[.gz]: also retrieval with one sentence an image",
    )
    # model
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--architecture",
        type=user_path,
        default="ViT-B/32",
        help="a name of clip.available_models(), tiny, tiny-16, tiny-rn, the path of a state "
        "dict or run, open_clip:NAME/PRETRAINED, or hf:NAME; docs/models.md lists all "
        "(default: %(default)s)",
    )
    which.add_argument(
        "--soup",
        type=user_path,
        nargs="+",
        metavar="RUN",
        help="evaluate the mean of the weights of two or more runs of train.py from one start, and "
        "keep it in the run folder, which is a model like that of any run",
    )
    add_activation_argument(parser)
    parser.add_argument(
        "--prompt_template",
        action="append",
        help="text with {} for the class name; repeat it for an ensemble "
        f"(default: '{TEMPLATE}')",
    )
    parser.add_argument(
        "--prompts",
        type=user_path,
        metavar="FILE",
        help="JSON of class names, each with a list of sentences: an ensemble for each class, "
        "instead of --prompt_template",
    )
    parser.add_argument(
        "--wise_ft",
        type=float,
        action="append",
        default=[],
        metavar="ALPHA",
        help="also evaluate (1 - ALPHA) * the weights a run started from + ALPHA * its own "
        "(WiSE-FT); repeat it for a curve",
    )
    add_switch(
        parser,
        "--calibrated",
        help="divide the logits by the temperature that a run of train.py --holdout found on val; "
        "probabilities, NLL, Brier score and ECE change, ranks do not",
    )
    parser.add_argument(
        "--seed", type=int, help="random weights of tiny, tiny-16 and tiny-rn (default: 0)"
    )
    runs.add_overlap_argument(parser)
    add_device_arguments(parser)
    # run folder
    runs.add_run_arguments(parser, compare=True)
    args = runs.parse_inheriting(parser, "architecture", "soup")
    check_arguments(args)
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Fill in --seed; raise UserError for flags that mean nothing, and values out of range."""
    is_random = args.architecture in RANDOM and not args.soup
    if args.seed and not is_random:
        raise UserError(
            f"--seed draws the weights of {', '.join(RANDOM)}, and here nothing is drawn: leave it "
            "out"
        )
    args.seed = args.seed or 0
    check_seed(args.seed)
    if args.prompts and args.prompt_template:
        raise UserError("--prompts and --prompt_template: give one of them")
    if args.calibrated and (args.wise_ft or args.soup):
        raise UserError(
            "--calibrated: the temperature of a run was found for its own weights, and not for "
            "those of --wise_ft or --soup: leave out one of them"
        )
    if not all(map(math.isfinite, args.wise_ft)):
        raise UserError("--wise_ft: ALPHA must be a number, such as 0.5")


if __name__ == "__main__":
    args = command(parse_arguments)()  # before torch is imported: see flowers.command

import numpy as np
import torch

from flowers import calibration, devices, evaluate, files
from flowers.data import Flowers, open_from_flags, split_index
from flowers.duplicates import write_duplicates
from flowers.layouts import read_captions
from flowers.models import CLIP, encode, image_features, text_features
from flowers.pixels import load_pixels, to_device
from flowers.tracking import Tracker, finish_evaluation, start_wandb
from flowers.weights import load_model, state_for_saving


def evaluate_along(
    model: CLIP,
    ends: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]],
    alphas: list[float],
    pixels: torch.Tensor,
    flowers: Flowers,
    index: np.ndarray,
    templates: list[str] | None,
    sentences: evaluate.Prompts | None,
) -> list[tuple[float, dict[str, float]]]:
    """The metrics at each alpha on the line between two state dicts (WiSE-FT), start and tuned.

    Changes the weights of `model`. Both towers move, so each alpha has a classifier of its own.
    """
    curve = []
    for alpha in alphas:
        evaluate.interpolate(model, *ends, alpha)
        images = image_features(model, pixels, torch.from_numpy(index.copy()))
        head = evaluate.zero_shot_head(model, flowers.class_names, templates, sentences)
        metrics, _ = evaluate.evaluate_features(images, head, flowers.labels[index])
        curve.append((alpha, metrics))
    return curve


def write_curve(
    curve: list[tuple[float, dict[str, float]]], split: str, folder: Path, tracker: Tracker
) -> None:
    """Leave the WiSE-FT curve in the run folder, as metrics.jsonl and wise_ft.png, and in W&B."""
    from flowers.study import figures  # here, as it loads seaborn, and few evaluations need it

    rows = [{"alpha": alpha, **evaluate.with_split(split, metrics)} for alpha, metrics in curve]
    for row in rows:
        tracker.log(row)
    files.write_lines(folder / "metrics.jsonl", rows)
    # --wise_ft may be given in any order; the figure joins the points from left to right.
    points = [{"alpha": alpha, **metrics} for alpha, metrics in curve]
    points.sort(key=lambda point: point["alpha"])
    panel = f"{folder.name} ({split})", [points]  # the curve of one seed
    figures.wise_ft([panel], folder / "wise_ft.png")


def open_model(
    models: list[str], start_of_soup: dict, device: torch.device, activation: str | None
) -> CLIP:
    """The model of a name or path, or the mean of several runs that have a common start."""
    if start_of_soup:
        return evaluate.load_soup(models, start_of_soup["architecture"], device, activation)
    [architecture] = models
    return load_model(architecture, device, activation)


def first_caption_features(
    model: CLIP, captions: list[list[str]], index: np.ndarray
) -> torch.Tensor:
    """The features (N, D) of the first caption of each image at `index` (N,)."""
    first_captions = [captions[i][0] for i in index]
    n_cut = sum(len(encode(caption)) > model.context_length for caption in first_captions)
    evaluate.warn_of_cut_captions(n_cut, len(first_captions), model.context_length)
    return text_features(model, first_captions)


def keep_soup(folder: Path, model: CLIP, flowers: Flowers, soup: list[str]) -> None:
    """Leave what makes the run folder of a soup a model: images, class names, and weights."""
    # The weights come last: nobody loads them without knowing what they were trained on.
    runs.write_trained_on(folder, [], *soup)
    runs.write_class_names(folder, flowers.class_names)
    files.save_tensors(folder / "model.pt", state_for_saving(model))


@command
def main(args: argparse.Namespace):
    device = devices.choose_device(args.device)
    devices.seed_everything(args.seed, device)
    precision = devices.set_precision(args.precision, device)
    # Read first: a mistake in --compare should not be found after the work is done.
    # For the table at the end: its columns, and what each of them was measured on.
    shown, protocols = evaluate.recorded(args.compare, args.split)

    # The runs of a soup have the start, the data and the prompts of the first.
    models = args.soup or [args.architecture]
    start_of_soup = evaluate.check_soup(args.soup) if args.soup else {}

    # -----------------------------------------------------------------------------
    # data
    flowers = open_from_flags(vars(args))
    args.splits = flowers.convention  # what the dataset says, for the record
    index = split_index(flowers, args.split)  # (N,) the images to evaluate
    # Training images are evaluated only where they are asked for by name.
    allowed = args.allow_overlap or args.split == "train"
    overlap = runs.check_overlap(models, flowers, index, args.split, allowed)
    seen = {"overlap": overlap} if overlap else {}  # for the table
    captions = read_captions(args.captions, flowers.files) if args.captions else None
    temperature = 1.0  # divides the logits
    if args.calibrated:
        run = runs.run_folder(args.architecture)
        temperature = evaluate.require_temperature(
            run, flowers.class_names, args.prompt_template, args.prompts
        )

    # -----------------------------------------------------------------------------
    # model
    model = open_model(models, start_of_soup, device, args.activation)
    sentences, prompts_digest = None, None
    if args.prompts:
        sentences = evaluate.read_prompts(args.prompts, flowers.class_names)
        prompts_digest = evaluate.digest_of_prompts(args.prompts)
        evaluate.warn_of_changed_prompts(models[0], args.prompts)
    # A run may have left a head or a learned prompt of its own; the templates tell which.
    head, args.prompt_template = evaluate.load_head(
        models[0],
        model,
        flowers.class_names,
        args.prompt_template,
        TEMPLATE,
        sentences,
    )
    # Both ends of the WiSE-FT line. Copied, as interpolate writes over the model's own weights.
    if args.wise_ft:
        start_state = evaluate.load_starting_weights(models[0])
        tuned_state = {name: weight.clone() for name, weight in model.state_dict().items()}
        ends = start_state, tuned_state
    pixels = to_device(load_pixels(flowers, model.visual.input_resolution), device)

    # -----------------------------------------------------------------------------
    # run folder
    prompts = evaluate.prompts_in_words(args.prompt_template, head, args.prompts, sentences)
    protocol = evaluate.protocol(
        flowers, args.split, len(index), args.class_names, prompts, model.origin
    )
    if args.calibrated:
        protocol["probabilities"] = calibration.temperature_in_words(temperature)
        if args.split == "val":
            protocol["probabilities"] += ", found on images of this split"
    # args.json keeps what decides the result, as resolved here, and not how the command was called.
    config = {"job": "eval", **vars(args), "prompts_digest": prompts_digest}
    # None if it is off, as in the runs from before there was this flag.
    config |= {"device": str(device), "precision": precision, "calibrated": args.calibrated or None}
    config |= start_of_soup
    del config["name"], config["compare"]
    folder = runs.new_run(args.runs, args.name, config, flowers.splits)
    if args.soup:
        keep_soup(folder, model, flowers, args.soup)
    tracker = start_wandb(args.wandb, folder, config)

    # -----------------------------------------------------------------------------
    # features and metrics
    start = time.perf_counter()
    images = image_features(model, pixels, torch.from_numpy(index.copy()))  # (N, D)
    caption_features = first_caption_features(model, captions, index) if captions else None
    metrics, probabilities = evaluate.evaluate_features(
        images, head, flowers.labels[index], caption_features, temperature
    )
    seconds = time.perf_counter() - start
    mistakes = evaluate.save_outputs(folder, probabilities, flowers, index, metrics)
    write_duplicates(folder, pixels, index, flowers.file_names)

    # -----------------------------------------------------------------------------
    # WiSE-FT
    if args.wise_ft:
        prompts = args.prompt_template, sentences
        curve = evaluate_along(model, ends, args.wise_ft, pixels, flowers, index, *prompts)
        write_curve(curve, args.split, folder, tracker)
        for alpha, metrics_at_alpha in curve:
            shown[f"alpha {alpha:g}"] = metrics_at_alpha | seen

    # -----------------------------------------------------------------------------
    # results
    result = evaluate.with_split(args.split, metrics)
    if args.calibrated:
        result["calibration_temperature"] = temperature
    result["eval_seconds"] = round(seconds, 3)
    result["eval_images_per_s"] = round(len(index) / seconds, 1)
    # After all other files: a run that has a result is whole.
    if overlap is not None:
        protocol["overlap"] = overlap
    runs.finish(folder, {"name": folder.name, **result, **config, **protocol})
    finish_evaluation(tracker, result, protocol, mistakes)
    print(evaluate.results_table(folder.name, metrics, protocol, (shown, protocols)))
    print(f"{len(index):,} images in {seconds:.1f} s; results and pictures in {folder}/")


if __name__ == "__main__":
    main(args)
