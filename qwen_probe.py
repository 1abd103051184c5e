"""Fit a linear probe to frozen features of Qwen2-VL: what the encoder knows, whatever it says.

    python qwen_probe.py                                   # the vision tower's output, 6 GB
    python qwen_probe.py --features prompt --holdout       # where the answer begins; C from val
    python qwen_probe.py --adapter runs/NAME               # of what qwen_train.py made
    python qwen_probe.py --shots 4 --compare runs/LINEAR   # beside train.py --strategy linear
    python qwen_probe.py --data_root sample --model tiny   # any machine, offline, seconds

The head is that of train.py --strategy linear: a logistic regression on features of length 1, with
the same penalty. The same seed draws the same images, and runs/NAME/ has the same files.

vision: the mean of an image's patches as the vision tower leaves them, before they are merged.
merged: the mean of the tokens that the language model reads in their place. prompt: the language
model's last hidden state after image and question, from which it predicts the answer's first token.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from flowers import UserError, add_device_arguments, check_seed, command, files, runs
from flowers.choices import DEFAULT_C, MAX_VAL_SHOTS
from flowers.data import add_data_arguments
from flowers.qwen_settings import (
    DEFAULTS,
    QUESTIONS,
    add_model_arguments,
    check_questions,
    fill_in,
    parse_inheriting,
    read_training,
    runs_behind,
    settings_of,
)

FEATURES = ("vision", "merged", "prompt")
# The logit of a class that the head was not fitted to: its probability is 0 in fp32.
NEVER = -1e4


# -----------------------------------------------------------------------------
# settings


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # data
    add_data_arguments(parser)
    parser.add_argument(
        "--split",
        choices=["test", "val"],
        default="test",
        help="images to evaluate; val needs --holdout (default: %(default)s)",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=0,
        help="evaluate so many of them, drawn with seed 0 (default: 0, all)",
    )
    parser.add_argument(
        "--shots",
        type=int,
        help="fit to at most so many images a class, drawn by --seed (default: all)",
    )
    parser.add_argument(
        "--val_shots",
        type=int,
        help="with --holdout: at most so many val images a class, drawn by --seed "
        f"(default: as many as --shots, at most {MAX_VAL_SHOTS}; without --shots all)",
    )
    parser.add_argument(
        "--seed", type=int, help="which images --shots and --val_shots draw (default: 0)"
    )
    add_probe_arguments(parser)
    add_device_arguments(parser.add_argument_group("machine"))
    # run
    group = parser.add_argument_group("run")
    group.add_argument(
        "--batch_size", type=int, default=8, help="images at a time (default: %(default)s)"
    )
    runs.add_overlap_argument(group)
    runs.add_run_arguments(group, compare=True)
    return parser


def add_probe_arguments(parser: argparse.ArgumentParser) -> None:
    # model and probe
    group = parser.add_argument_group("model and probe")
    add_model_arguments(group, inherits=True)
    group.add_argument(
        "--features",
        choices=FEATURES,
        default="vision",
        help="what the head is fitted to (default: %(default)s)",
    )
    group.add_argument(
        "--question",
        help="prompt: what is asked (default: the adapter's first question, else the brief one)",
    )
    group.add_argument(
        "--inverse_penalty",
        type=float,
        metavar="C",
        help="the inverse of the L2 penalty (default: chosen on val with --holdout, else "
        f"{DEFAULT_C:g})",
    )


@dataclass(frozen=True)
class Config:
    """The settings of a run, as args.json has them: every flag, with its default in place."""

    # data
    data_root: str
    splits_path: str | None
    splits_base: int | None
    class_names: str
    splits: str | None
    holdout: bool
    split: str
    images: int
    shots: int | None  # None: all images
    val_shots: int | None  # None: all images
    seed: int
    # model and probe
    model: str
    adapter: str | None
    load_4bit: bool
    max_pixels: int
    features: str
    answer: str  # which question is asked where there is none of one's own
    question: list[str] | None  # None: that of the answer
    inverse_penalty: float | None  # None: chosen on val, or a default
    # machine
    device: str
    precision: str
    # run
    batch_size: int
    allow_overlap: bool
    runs: str
    wandb: str

    @property
    def asks(self) -> str | None:
        """The question, where the features are those after one."""
        if self.features != "prompt":
            return None
        return self.question[0] if self.question else QUESTIONS[self.answer]

    @property
    def chooses_penalty(self) -> bool:
        """Whether the val images decide how strong the penalty is."""
        return self.holdout and self.inverse_penalty is None


def read_settings() -> tuple[argparse.Namespace, Config]:
    """The flags of the command line, and the settings that they mean.

    Raises UserError as `resolve` does.
    """
    args = parse_inheriting(make_parser())
    return args, resolve(args)


def resolve(args: argparse.Namespace) -> Config:
    """Return the settings that the flags mean, with those of the adapter where they say nothing.

    Raises UserError if they contradict one another, or the adapter.
    """
    draws = args.shots is not None or args.val_shots is not None
    if args.seed is not None and not draws:
        raise UserError("--seed draws --shots and --val_shots, and here is neither: leave it out")
    args.seed = args.seed or 0
    check_seed(args.seed)
    if args.question is not None and args.features != "prompt":
        raise UserError("--question is asked for --features prompt alone: leave it out")
    if args.val_shots is not None and not args.holdout:
        raise UserError("--val_shots needs --holdout: without it no val is set apart")
    if args.val_shots is not None and args.inverse_penalty is not None and args.split == "test":
        raise UserError(
            "--val_shots is for val images that choose the penalty, which --inverse_penalty says: "
            "leave out one of them"
        )
    if args.val_shots is None and args.holdout and args.shots:
        args.val_shots = min(args.shots, MAX_VAL_SHOTS)
    fill_in_from_training(args)
    numbers = [args.batch_size, args.images + 1]
    numbers += [value for value in (args.shots, args.val_shots) if value is not None]
    if min(numbers) < 1:
        raise UserError(
            "--batch_size, --shots and --val_shots must be at least 1, --images not below 0"
        )
    # NaN fails the comparison, too.
    if args.inverse_penalty is not None and not 0 < args.inverse_penalty < math.inf:
        raise UserError("--inverse_penalty must be a number above 0")
    return settings_of(Config, args)


def fill_in_from_training(args: argparse.Namespace) -> None:
    """Fill in the flags that were left out, from the run that made the adapter or the model.

    Of several questions of the training the first is asked. Raises UserError as `read_training`
    and `check_questions` do.
    """
    trained = read_training(args.adapter, args.model)
    source = args.adapter or args.model
    fill_in(args, trained, {flag: DEFAULTS[flag] for flag in ("model", "load_4bit", "max_pixels")})
    args.answer = trained.get("answer", DEFAULTS["answer"])
    # The other features are those of the image alone.
    if args.features == "prompt":
        own = trained.get("question")
        args.question = [args.question] if args.question is not None else own and own[:1]
        check_questions(args.question, list_names=False, list_order="given")
        if trained.get("list_names"):
            files.note(f"{source} was trained with --list_names: they are not listed here")


if __name__ == "__main__":
    args, config = command(read_settings)()  # before torch is imported: see flowers.command

import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from flowers import devices, evaluate
from flowers.data import (
    Flowers,
    image_ids,
    open_from_flags,
    select,
    split_index,
    subset,
    val_images,
)
from flowers.devices import autocast
from flowers.qwen import memory, models
from flowers.qwen.adapters import base_model
from flowers.qwen.features import load_images
from flowers.qwen.models import hidden_states
from flowers.qwen.prompts import Tensors, encode, move
from flowers.strategies import INVERSE_REGULARISATION, fit_linear
from flowers.tracking import finish_evaluation, start_wandb

# -----------------------------------------------------------------------------
# images


@dataclass(frozen=True)
class Images:
    """Positions in flowers.files: what is fitted, what chooses the penalty, what is evaluated."""

    train: np.ndarray
    val: np.ndarray  # empty where nothing is chosen
    evaluated: np.ndarray


def choose_images(flowers: Flowers, config: Config) -> Images:
    """Draw the images that train.py draws with the same flags.

    Raises UserError if a split is empty, or where a probe has no example of what it should name.
    """
    labels, n_classes = flowers.labels, len(flowers.class_names)
    train = select(flowers.splits["train"], labels, n_classes, shots=config.shots, seed=config.seed)
    if len(np.unique(labels[train])) < 2:
        raise UserError("the training images are of one class, so there is nothing to tell apart")
    val = train[:0]
    if config.holdout:
        val = val_images(flowers, shots=config.val_shots, seed=config.seed)
        if not len(val):
            raise UserError("the splits list no image for val: --holdout has nothing to hold out")
    evaluated = val if config.split == "val" else split_index(flowers, "test")
    if not len(evaluated):
        raise UserError("the val split is empty: val needs --holdout")
    evaluated = subset(evaluated, config.images, seed=0)

    unknown = np.setdiff1d(labels[evaluated], labels[train])
    if len(unknown):
        raise UserError(
            f"{flowers.class_names[unknown[0]]} has {config.split} images and no training image, "
            f"as {len(unknown)} classes have: a probe can't name what it was not shown"
        )
    return Images(train, val if config.chooses_penalty else val[:0], evaluated)


def check_overlap(config: Config, flowers: Flowers, images: Images) -> int | str:
    """How many of the evaluated images the adapter, the model or the head were trained on.

    "unknown" if nobody can tell. Raises UserError if there are such images, unless they are
    asked for with --allow_overlap.
    """
    starts = runs_behind(config.adapter, config.model)
    # They may not have seen the images that decide, either.
    if len(images.val):
        runs.check_overlap(starts, flowers, images.val, "val", config.allow_overlap)
    return runs.check_overlap_of_training(
        starts, flowers, images.train, images.evaluated, config.split, config.allow_overlap
    )


# -----------------------------------------------------------------------------
# features


@torch.inference_mode()
def encode_images(
    model, processor, flowers: Flowers, index: np.ndarray, config: Config
) -> torch.Tensor:
    """Return --features of the images at `index`, (N, D) fp32 on the CPU, of length 1.

    As CLIP's are scaled before they are compared or fitted. With a progress bar. Raises UserError
    for a model that gives no finite numbers.
    """
    device = torch.device(config.device)
    # The patches before the merger are not among what is kept.
    digest = None if config.features == "vision" else models.vision_digest(model)
    batches = load_images(model, processor, flowers, index, config.batch_size, digest)
    features = []
    with tqdm(total=len(index), unit="img", desc=f"{config.features} features") as bar:
        for image, batch in batches:
            image = move(image, device)
            with autocast(device):
                features.append(features_of(model, processor, image, config).float().cpu())
            bar.update(len(batch))
    features = torch.cat(features)
    if not features.isfinite().all():
        raise UserError(
            f"{config.model} gives no finite features: its weights are damaged, or made for "
            "another precision"
        )
    return F.normalize(features, dim=1)


def features_of(model, processor, image: Tensors, config: Config) -> torch.Tensor:
    """Return --features of B images, (B, D), as the model makes them.

    image: image_grid_thw (B, 3), with pixel_values, or with the `features` that are kept.
    """
    grids = image["image_grid_thw"]
    if config.features == "prompt":
        inputs = move(encode(processor, config.asks, grids), grids.device)
        states, _ = hidden_states(model, inputs, image)  # (B, L, D)
        # Prompts are padded on the left: the answer begins after the last position of each.
        return states[:, -1]

    counts = grids.prod(1)  # patches of each image
    if config.features == "merged":
        counts = counts // processor.image_processor.merge_size**2
    if "features" in image:
        # What deeper layers are given may stand behind what the first one reads.
        width = base_model(model).config.get_text_config().hidden_size
        return means(image["features"][:, :width], counts)
    output = base_model(model).model.get_image_features(**image, return_dict=True)
    if config.features == "vision":
        # Qwen2.5-VL orders the patches by windows, but image by image.
        return means(output.last_hidden_state, counts)
    return means(torch.cat(list(output.pooler_output)), counts)


def means(tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return the mean (B, D) of each image's tokens; they stand one after the other, (sum, D)."""
    images = tokens.float().split(counts.tolist())
    return torch.stack([image.mean(0) for image in images])


# -----------------------------------------------------------------------------
# head


def fit_probe(
    features_at: Callable, flowers: Flowers, images: Images, config: Config
) -> tuple[evaluate.Head, dict]:
    """Fit the logistic regression of train.py --strategy linear, and say how it was fitted.

    features_at: index -> features (n, D). Returns weight (C, D) and bias (C,), and what
    result.json keeps. Prints the penalty.
    """
    train = features_at(images.train)
    n_classes = len(flowers.class_names)
    # Of classes without a training image nothing is known: they are never answered.
    nothing = torch.zeros(n_classes, train.shape[1]), torch.full((n_classes,), NEVER)
    val = None
    if len(images.val):
        val = features_at(images.val), torch.from_numpy(flowers.labels[images.val])
    labels = torch.from_numpy(flowers.labels[images.train])
    head, strength, iterations = fit_linear(train, labels, nothing, config.inverse_penalty, val)
    chosen_on = "val" if val else "default"
    if config.inverse_penalty is not None:
        chosen_on = "--inverse_penalty"
    choice = " (chosen on val)" if val else ""
    print(
        f"logistic regression on {config.features} features ({train.shape[1]}) of "
        f"{len(train):,} images with C = {strength:g}{choice}, {iterations} iterations"
    )
    if val and strength == max(INVERSE_REGULARISATION):
        files.note(f"C = {strength:g} is the largest that was tried on val: see --inverse_penalty")
    return head, {"fitted_C": strength, "chosen_on": chosen_on}


# -----------------------------------------------------------------------------
# the run


def describe_protocol(config: Config, flowers: Flowers, n: int) -> dict:
    """What the accuracy is the accuracy of: dataset, split, names, features and weights."""
    prompts = f"none (a linear head on {config.features} features)"
    if config.asks:
        prompts += f" after '{config.asks}'"
    adapter = f" with {config.adapter}" if config.adapter else ""
    return evaluate.protocol(
        flowers, config.split, n, config.class_names, prompts, config.model + adapter
    )


@command
def main(args: argparse.Namespace, config: Config):
    device = devices.choose_device(config.device)
    config = models.on_machine(config, device)
    devices.seed_everything(config.seed, device)
    # Read first: a mistake in --compare should not be found after the work is done.
    compared = evaluate.recorded(args.compare, config.split)

    # -----------------------------------------------------------------------------
    # data and model
    flowers = open_from_flags(asdict(config))
    config = replace(config, splits=flowers.convention)
    images = choose_images(flowers, config)
    overlap = check_overlap(config, flowers, images)
    text_tokens = 50 if config.asks else 0  # about
    memory.evaluation_batch(config, text_tokens, device)
    model, processor = models.load_model(
        config.model, device, config.adapter, config.max_pixels, config.load_4bit
    )

    # -----------------------------------------------------------------------------
    # run folder
    # `architecture` is what other scripts call the model.
    settings = {"job": "qwen_probe", "architecture": config.model}
    settings |= asdict(config) | models.versions()
    folder = runs.new_run(config.runs, args.name, settings, flowers.splits)
    starts = runs_behind(config.adapter, config.model)
    runs.write_trained_on(folder, image_ids(flowers, images.train), *starts)

    # -----------------------------------------------------------------------------
    # features and head
    start = time.perf_counter()
    # Each image once, though it may be evaluated as well as choose.
    index = np.unique(np.concatenate([images.train, images.val, images.evaluated]))
    features = encode_images(model, processor, flowers, index, config)
    result = {"feature_seconds": round(time.perf_counter() - start, 2)}

    def features_at(wanted: np.ndarray) -> torch.Tensor:
        # `index` is sorted and holds all of them.
        return features[np.searchsorted(index, wanted)]

    start = time.perf_counter()
    head, fitted = fit_probe(features_at, flowers, images, config)
    result["train_seconds"] = round(time.perf_counter() - start, 2)
    result |= {"trainable": sum(part.numel() for part in head), "train/n": len(images.train)}
    result["peak_memory_mb"] = devices.peak_memory_mb(device)

    # -----------------------------------------------------------------------------
    # results
    metrics, probabilities = evaluate.evaluate_features(
        features_at(images.evaluated), head, flowers.labels[images.evaluated]
    )
    mistakes = evaluate.save_outputs(folder, probabilities, flowers, images.evaluated, metrics)
    result = evaluate.with_split(config.split, metrics) | fitted | result
    protocol = describe_protocol(config, flowers, len(images.evaluated)) | {"overlap": overlap}
    runs.finish(folder, {"name": folder.name} | result | settings | protocol)
    tracker = start_wandb(config.wandb, folder, settings)
    finish_evaluation(tracker, result, protocol, mistakes)
    print(evaluate.results_table(folder.name, metrics, protocol, compared))
    print(
        f"features {result['feature_seconds']:.0f} s, head {result['train_seconds']:.0f} s; "
        f"results and pictures in {folder}/"
    )


if __name__ == "__main__":
    main(args, config)
