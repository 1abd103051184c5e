"""Run a grid of train.py, one process a point. Finished points are skipped, interrupted ones are
resumed, and failed ones are recorded while the others go on.

    python ablate.py temperature               # ViT-B/32, 5 fixed and 2 learned values, 3 seeds
    python ablate.py factorial --architecture ViT-B/32 RN50 --gpus 0 1 2 3
    python ablate.py learning_rate --strategy lora --seeds 0 --epochs 3  # --epochs is train.py's
    python ablate.py pretraining --architecture ViT-B/16  # OpenAI's weights, LAION-2B's, DFN's, ...
    python ablate.py temperature --sweep       # write a W&B sweep file, for many machines
    python ablate.py study --runs runs/study   # factorial, then one factor at a time, then final
    python ablate.py forgetting --others data/birds data/cars  # what fine-tuning costs elsewhere
    python ablate.py qwen --gpus 0 1           # Qwen2-VL-2B: image size, rank, shots, protocol

All choices are made on val: the grids run with --holdout. `final` (and the end of `study`) takes
the best settings of each strategy, architecture and pretraining, trains on all training images, and
evaluates on test once; a linear probe takes the penalty that its run in `factorial` chose. The
one-factor grids of `study` use the first architecture and strategy. `shots` and `few_shot` train
for 300 steps with any number of images: their --epochs replace one that is given. `forgetting`
fine-tunes each strategy, and evaluates start, end, the weights between and the mean of the seeds on
val and on the test images of other datasets. An architecture with random weights (such as tiny) is
first trained on the base classes, as a stand-in for pretraining. `qwen` trains with qwen_train.py
and evaluates with qwen_eval.py and qwen_probe.py; flags that are not this script's go to
qwen_train.py. python report.py --runs RUNS makes the report.
"""

import argparse
import atexit
import contextlib
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from flowers import UserError, check_seed, command, files, runs, typed_flags
from flowers.choices import (
    FEW_SHOT_EPOCHS,
    KEEPS_WEIGHTS,
    LEARNING_RATES,
    PRETRAINED,
    RANDOM,
    SHAPES,
    STRATEGIES,
    TEMPLATE,
)
from flowers.data import CONVENTIONS, open_flowers
from flowers.settings import RANDOM_EPOCHS, make_parser, resolve

Process = subprocess.Popen | multiprocessing.process.BaseProcess

# -----------------------------------------------------------------------------
# the grids

# logistic regression ("linear") has no learning rate to cross
TUNED = tuple(strategy for strategy in STRATEGIES if strategy != "linear")

PROJECT = TEMPLATE
OPENAI = "a photo of a {}, a type of flower."
NAME_ALONE = "{}"
OTHER_TEMPLATE = "a photo of a {}"  # of datasets that are not flowers
ALL_TEMPLATES = [PROJECT, OPENAI, NAME_ALONE]

# What CLIP's architectures were trained on, and train.py's --architecture for those weights. All
# nine are OpenAI's; these have others, by open_clip's names.
OTHER_WEIGHTS = {
    "ViT-B/32": {
        "laion2b": "open_clip:ViT-B-32/laion2b_s34b_b79k",
        "datacomp": "open_clip:ViT-B-32/datacomp_xl_s13b_b90k",
        "metaclip": "open_clip:ViT-B-32-quickgelu/metaclip_fullcc",
    },
    "ViT-B/16": {
        "laion2b": "open_clip:ViT-B-16/laion2b_s34b_b88k",
        "datacomp": "open_clip:ViT-B-16/datacomp_xl_s13b_b90k",
        "dfn": "open_clip:ViT-B-16-quickgelu/dfn2b",
        "metaclip": "open_clip:ViT-B-16-quickgelu/metaclip_fullcc",
    },
    "ViT-L/14": {
        "laion2b": "open_clip:ViT-L-14/laion2b_s32b_b82k",
        "datacomp": "open_clip:ViT-L-14/datacomp_xl_s13b_b90k",
        "dfn": "open_clip:ViT-L-14-quickgelu/dfn2b",
        "metaclip": "open_clip:ViT-L-14-quickgelu/metaclip_fullcc",
    },
}
# The stand-ins for pretraining are trained with prompts, or with captions of the same images.
STAND_INS = ("prompts", "captions")
PRETRAININGS = ("openai", "laion2b", "datacomp", "dfn", "metaclip", *STAND_INS)
# The one pretraining of weights that are given by a path, or by another library's name.
AS_GIVEN = "as given"
# The levels where it is not varied, one for each kind of architecture, and where it is crossed with
# all else: two, as every level doubles the cost.
USUAL = ("openai", "prompts", AS_GIVEN)
TWO = ("openai", "laion2b", *STAND_INS, AS_GIVEN)

# A grid is a list of blocks, and a block is a product of axes. The value of an axis is
#   a tuple: its levels, which the flag of that name (of `seed`, --seeds) may replace;
#   a list: one level, a flag given several times;
#   anything else: one fixed level, which no flag replaces.
# Of the strategies that a block names, --strategy takes some; see axes_of.
# `times` is the learning rate as a multiple of the strategy's default, `lr` the rate itself.
# `pretraining` decides which weights --architecture names; see shared_pretrainings.
DEFAULT_AXES = {
    "seed": (0, 1, 2),
    "architecture": ("ViT-B/32",),
    "pretraining": USUAL,
    "strategy": ("full",),
    "times": (1.0,),
}
# A linear probe gives the same result with every seed, so one is enough.
MODELS = {"architecture": PRETRAINED, "pretraining": TWO}
UNTRAINED = MODELS | {"strategy": "full", "times": 1.0, "epochs": 0, "seed": 0}
LINEAR = MODELS | {"strategy": "linear", "times": 1.0, "seed": 0}
CROSSED = MODELS | {"strategy": TUNED, "times": (0.2, 1.0, 5.0)}
# Every strategy gets the same rates. Whether rates are shared or relative to a strategy's default
# can turn round which strategy is best (arXiv 2604.16410).
SHARED = MODELS | {"strategy": TUNED, "times": 1.0, "lr": (1e-5, 1e-4, 1e-3)}
# The probe that starts from the text features, and the one that also trains on them.
ZERO_SHOT = {"strategy": "linear", "times": 1.0, "start_from": "zero_shot"}
CROSS_MODAL = ZERO_SHOT | {"cross_modal": True}
# So many training images a class, in as many steps.
SHOTS = [{"shots": shots, "epochs": epochs} for shots, epochs in FEW_SHOT_EPOCHS.items()]
# And as many for validation, but at most 4, as CoOp has it.
FEW_SHOTS = [row | {"val_shots": min(row["shots"], 4)} for row in SHOTS]
# With few shots train.py draws as few images of val, others for each seed. All of them can be
# compared between levels and seeds.
ALL_IMAGES = 10_000
FEW_SHOT_STRATEGIES = [
    {"strategy": TUNED},
    {"strategy": "linear", "times": 1.0},
    ZERO_SHOT,
    CROSS_MODAL,
]
GRIDS = {
    "architecture": [{"architecture": PRETRAINED}],
    "pretraining": [{"pretraining": (*PRETRAININGS, AS_GIVEN)}],
    "strategy": [{"strategy": STRATEGIES}, ZERO_SHOT | {"seed": 0}, CROSS_MODAL | {"seed": 0}],
    "learning_rate": [{"times": (0.1, 0.3, 1.0, 3.0, 10.0)}],
    "shared_rate": [UNTRAINED, SHARED],
    "loss": [{"loss": ("info_nce", "cross_entropy", "sigmoid")}],
    "temperature": [
        {"temperature": (0.003, 0.01, 0.03, 0.1, 0.3)},
        {"temperature": (0.01, 0.07), "learn_temperature": True},
    ],
    "batch_size": [{"batch_size": (16, 64, 256, 512), "chunk_size": 64}],
    # with one prompt a class both losses are the same, so there are three
    "positives": [{"positives": ("pair", "class"), "prompt_template": ALL_TEMPLATES}],
    "prompt": [{"prompt_template": ([PROJECT], [OPENAI], [NAME_ALONE], ALL_TEMPLATES)}],
    "augment": [{"augment": ("none", "flip", "crop")}],
    "base_to_new": [{"strategy": STRATEGIES, "classes": "base"}],
    "shots": [row | {"val_shots": ALL_IMAGES} for row in SHOTS],
    "few_shot": [row | shots for row in FEW_SHOT_STRATEGIES for shots in FEW_SHOTS],
    "factorial": [UNTRAINED, LINEAR, CROSSED],
    # a linear head knows the classes that it was fitted to, and no others
    "forgetting": [{"strategy": TUNED}],
}
# What decides which parts of a model are frozen, and what they compute.
MODEL_AXES = ("architecture", "pretraining", "strategy")
# These choose their settings from the results of `factorial`.
CHOOSING = ("final", "study")
CHOSEN_AXES = ("architecture", "pretraining", "strategy", "times")  # the last one is chosen
# What a linear probe chooses on val itself, as its result.json calls it, and the flag that says it.
FITTED = {"fitted_C": "inverse_penalty", "fitted_pull": "pull"}
# What the study runs after the factorial, with everything else at the best settings.
ONE_FACTOR = (
    "temperature",
    "batch_size",
    "loss",
    "positives",
    "prompt",
    "augment",
    "shots",
    "base_to_new",
)

# Where `forgetting` evaluates between the start (0) and the fine-tuned weights (1).
ALPHAS = (0, 0.25, 0.5, 0.75, 1)
# Flags for train.py that an evaluation takes over, where it has them too.
PROMPT_FLAGS = ("prompt_template", "prompts")
MACHINE_FLAGS = ("device", "precision")
MODEL_FLAGS = ("activation", *MACHINE_FLAGS)

# One factor of Qwen is varied at a time, and the others have their first level. 262144 pixels are
# 512 x 512, the others 224 x 224 and 336 x 336.
QWEN = "qwen"
QWEN_MODEL = "Qwen/Qwen2-VL-2B-Instruct"
QWEN_LEVELS = {
    "max_pixels": (262144, 50176, 112896),
    "rank": (8, 2, 32),
    "shots": (16, 1, 4),
    "protocol": ("rank", "generate", "generate_listed", "probe"),
    "features": ("vision", "merged", "prompt"),
}
# How many images of a class a run sees, over all its epochs: 300 steps of 16 for 102 classes.
QWEN_SEEN = 48
# Protocol -> script, and its flags. Of a trained model the prompt's last state is probed: what the
# frozen vision tower makes before it is that of the untrained model.
QWEN_PROTOCOLS = {
    "rank": ("qwen_eval.py", ("--protocol", "rank")),
    "generate": ("qwen_eval.py", ("--protocol", "generate")),
    "generate_listed": ("qwen_eval.py", ("--protocol", "generate", "--list_names")),
    "probe": ("qwen_probe.py", ("--features", "prompt")),
}
# The flags of these point to settings of the grid.
QWEN_RESERVED = (
    "--seed",
    "--name",
    "--holdout",
    "--resume",
    "--model",
    "--images",
    "--epochs",
    "--val_shots",
)

# Random weights need larger steps than pretrained ones: 1e-5 becomes 5e-4.
RANDOM_LR_FACTOR = 50
# These would make a name too long; the digest at its end tells them apart.
NOT_IN_NAME = (
    *DEFAULT_AXES,
    *FITTED.values(),
    "lr",
    "val_shots",
    "prompt_template",
    "chunk_size",
    "captions",
)
# Linux forks the processes of the points from one that has imported what train.py does. Other
# systems' libraries do not stand that, so they start a Python for each point.
FORKS = sys.platform == "linux"
IMPORTED = (
    "__main__",
    "flowers.evaluate",
    "flowers.frozen",
    "flowers.losses",
    "flowers.tracking",
    "flowers.training",
    # what those import when they need it
    "flowers.figures",
    "pandas",
    "scipy.optimize",
    "scipy.stats",
    "seaborn",
    "sklearn.linear_model",
    "sklearn.metrics",
    "torch._dynamo",
)
# Not peft: it imports bitsandbytes where that is installed, which asks for the GPU.
QWEN_IMPORTED = ("transformers.models.qwen2_vl.modeling_qwen2_vl",)
HERE = Path(__file__).resolve().parent
# These go on where they were killed; other scripts keep nothing on the way, and begin anew.
RESUMED = ("train.py", "qwen_train.py", "qwen_eval.py")

# ablate.py sets these flags of train.py itself.
RESERVED = ("--seed", "--name", "--holdout", "--resume", "--tau_lr")


@dataclass(frozen=True)
class Point:
    """One run of train.py or qwen_train.py, or one evaluation."""

    name: str
    settings: dict  # of training; empty for an evaluation
    arguments: tuple[str, ...]  # of the script, without --runs and --name
    script: str = "train.py"  # or that of an evaluation


@dataclass(frozen=True)
class Other:
    """Another dataset, on which models are evaluated that were fine-tuned on flowers."""

    name: str  # of its folder
    flags: tuple[str, ...]  # of baseline_eval.py: which images
    template: str  # of its prompts


@dataclass(frozen=True)
class Common:
    """What all points of one command have in common."""

    runs: Path
    data_flags: tuple[str, ...]  # which images
    train_flags: tuple[str, ...]  # for train.py, but not for the stand-in for pretraining
    start_epochs: int  # of the stand-in for pretraining
    start_captions: str | None  # of its images; None: it is trained with prompts only
    others: tuple[Other, ...] = ()  # of `forgetting`
    seen: int = QWEN_SEEN  # of `qwen`: images of a class that a run sees


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a flag that is not ours goes to train.py as it is
    )
    # Axes
    parser.add_argument("grid", choices=[*GRIDS, *CHOOSING, QWEN])
    add_axis_arguments(parser)
    # Data
    group = parser.add_argument_group("data")
    group.add_argument("--data_root", type=files.user_path, help="as in train.py")
    group.add_argument("--splits_path", type=files.user_path, help="as in train.py")
    group.add_argument("--splits_base", help="as in train.py")
    group.add_argument("--splits", help="as in train.py")
    group.add_argument("--class_names", help="as in train.py")
    add_forgetting_arguments(parser)
    parser.add_argument_group(QWEN, QWEN_HELP)  # parse_qwen_levels reads them
    # Running
    group = parser.add_argument_group("running")
    group.add_argument(
        "--runs",
        type=files.user_path,
        default="runs",
        help="folder of the runs (default: %(default)s)",
    )
    group.add_argument("--jobs", type=int, help="points to run at a time (default: one a GPU)")
    group.add_argument(
        "--gpus", nargs="+", help="numbers of the GPUs to use (default: those that train.py sees)"
    )
    group.add_argument(
        "--wandb",
        default="auto",
        help="as in train.py; the group is the grid's name (default: %(default)s)",
    )
    group.add_argument("--only", help="run only the point of this name")
    group.add_argument("--dry_run", action="store_true", help="print the commands, run nothing")
    group.add_argument(
        "--sweep",
        action="store_true",
        help="write RUNS/GRID.sweep.yaml for `wandb sweep`; each agent runs points of the grid",
    )
    args, train_flags = parser.parse_known_args()

    # -----------------------------------------------------------------------------
    # settings
    qwen_levels, seen = {}, QWEN_SEEN
    if args.grid == QWEN:
        qwen_levels, seen, train_flags = parse_qwen_levels(train_flags)
        check_qwen(train_flags, args)
        train_flags += to_flags("lr", args.lr or [])
    else:
        check_train_flags(train_flags)
    check_forgetting(args.grid, args.others, args.other_splits, args.other_template, args.strategy)
    data = {
        "data_root": args.data_root,
        "splits_path": args.splits_path,
        "splits_base": args.splits_base,
        "splits": args.splits,
        "class_names": args.class_names,
    }
    others = [open_other(path, args.other_splits, args.other_template) for path in args.others]
    common = Common(
        Path(args.runs),
        data_flags(data),
        tuple(train_flags),
        RANDOM_EPOCHS if args.start_epochs is None else args.start_epochs,
        args.start_captions,
        tuple(others),
        seen,
    )
    levels = levels_of(args) | qwen_levels
    check_numbers(levels)
    if args.grid != QWEN:
        note_starts(args.start_epochs, args.start_captions, levels)
        check_levels(args.grid, levels, common)
    slots = make_slots(args.jobs, args.gpus)
    if args.sweep:
        print(write_sweep(args.grid, common, levels, sys.argv[1:]))
        return

    if args.only is not None:
        check_only(args.only, args.grid, common, levels)

    # -----------------------------------------------------------------------------
    # run
    # tqdm reads it when it is imported, and a point is forked from a process that has done so.
    os.environ["TQDM_MININTERVAL"] = "10"
    outcomes = []
    for grid, points in phases(args.grid, common, levels):
        if args.only is not None:
            points = [point for point in points if belongs_to(args.only, point, args.grid)]
        if args.dry_run:
            print(f"# {grid}: {len(points)} points")
            for point in points:
                print(shlex.join(["python", point.script, *all_arguments(point, common.runs)]))
        else:
            environment = {"WANDB_RUN_GROUP": grid}
            outcomes += run(points, common.runs, slots, environment, args.wandb)
    if args.dry_run:
        return

    # -----------------------------------------------------------------------------
    # result
    finished = outcomes.count(True)
    failed = outcomes.count(False)
    report = runs.command_line("report.py", {"runs": args.runs})
    print(f"{finished} points finished, {failed} failed; next: {report}")
    if failed:
        raise UserError(
            f"{failed} points failed: see {common.runs / 'failed.jsonl'}, mend the cause, "
            "and run the same command again"
        )


# -----------------------------------------------------------------------------
# from flags to settings


def add_axis_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the levels of the axes, and what the stand-in for pretraining is trained with."""
    parser.add_argument(
        "--architecture",
        type=files.user_path,
        nargs="+",
        help="levels of this axis (default: the grid's own, else ViT-B/32)",
    )
    parser.add_argument(
        "--pretraining",
        nargs="+",
        choices=PRETRAININGS,
        help="levels of this axis: what the weights were trained on; prompts and captions for "
        "random ones (default: openai or prompts; in factorial and shared_rate two, in pretraining "
        "all, as far as all architectures have them)",
    )
    parser.add_argument(
        "--strategy",
        nargs="+",
        choices=STRATEGIES,
        help="levels of this axis (default: the grid's own, else full)",
    )
    parser.add_argument(
        "--times",
        nargs="+",
        type=float,
        help="learning rates, in multiples of the strategy's own (default: the grid's, else 1)",
    )
    parser.add_argument(
        "--lr",
        nargs="+",
        type=float,
        help="learning rates of shared_rate, the same for all strategies and architectures",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument(
        "--start_epochs",
        type=int,
        help=f"epochs of the stand-in for pretraining of random weights (default: {RANDOM_EPOCHS})",
    )
    parser.add_argument(
        "--start_captions",
        type=files.user_path,
        metavar="FILE",
        help="human captions for a second stand-in, --captions of train.py (default: none)",
    )


def levels_of(args: argparse.Namespace) -> dict[str, tuple]:
    """The levels that flags give to axes; once each, as a level that is given twice is one."""
    axes = {
        "architecture": args.architecture,
        "pretraining": args.pretraining,
        "strategy": args.strategy,
        "times": args.times,
        "lr": args.lr,
        "seed": args.seeds,
    }
    return {axis: tuple(dict.fromkeys(values)) for axis, values in axes.items() if values}


def check_train_flags(train_flags: Sequence[str]) -> None:
    """Raise UserError for a flag that ablate.py sets itself, or a word that is no flag.

    Ends the program, as train.py would, for a flag or a value that train.py does not know.
    """
    own = "ablate.py sets the learning rate (--times), seeds (--seeds), names and --holdout itself"
    refuse_reserved(train_flags, RESERVED, own)
    parser = make_parser()
    parser.prog = "train.py"
    parser.parse_args(train_flags)  # here, and not in each point


def refuse_reserved(train_flags: Sequence[str], reserved: Sequence[str], own: str) -> None:
    """Raise UserError for a flag that a grid sets itself, or a word that is no flag. own: why."""
    wrong = [flag for flag in train_flags if flag.split("=")[0] in reserved]
    if train_flags and not train_flags[0].startswith("--"):
        wrong.append(train_flags[0])
    if wrong:
        raise UserError(f"{wrong[0]}: {own}")


def add_forgetting_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which other datasets `forgetting` evaluates on, and how."""
    group = parser.add_argument_group("forgetting")
    group.add_argument(
        "--others",
        type=files.user_path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="other datasets, in any layout of --data_root, such as class folders",
    )
    group.add_argument(
        "--other_template",
        default=OTHER_TEMPLATE,
        help="prompt of their classes (default: '%(default)s')",
    )
    group.add_argument(
        "--other_splits",
        choices=CONVENTIONS,
        help="how they are split, as --splits in train.py (default: as their folders say)",
    )


def check_forgetting(
    grid: str,
    others: Sequence[str],
    other_splits: str | None,
    other_template: str,
    strategies: Sequence[str] | None,
) -> None:
    """Raise UserError for flags that `forgetting` lacks, or that have no meaning without it."""
    if grid != "forgetting":
        if others or other_splits or other_template != OTHER_TEMPLATE:
            raise UserError("--others and its template and splits are of the grid forgetting")
        return
    if not others:
        raise UserError("forgetting: give --others DIR, a dataset that is not trained on")
    if "{}" not in other_template:
        raise UserError(
            f"--other_template {other_template!r} has no {{}} where the class name goes"
        )
    if "linear" in (strategies or ()):
        raise UserError(
            "forgetting --strategy linear: its head has no classes but the flowers', and its "
            "weights are those of the start; leave it out"
        )


def open_other(path: str, splits: str | None, template: str) -> Other:
    """Open another dataset, so that a mistake is found before hours of training.

    Raises UserError if it can't be opened, or has no test images.
    """
    try:
        dataset = open_flowers(path, splits=splits)
    except UserError as error:
        raise UserError(f"--others {path}: {error} (--splits is --other_splits here)") from None
    # A run hands its own splits and names down to its evaluations: each is said, so none is.
    flags = ["--data_root", path, "--splits_path", "", "--splits", dataset.convention]
    flags += ["--class_names", "oxford", "--split", "test"]
    return Other(Path(path).resolve().name, tuple(flags), template)


def check_numbers(levels: dict[str, tuple]) -> None:
    """Raise UserError for a level of any grid that is out of its range."""
    for seed in levels["seed"]:
        check_seed(seed)
    for axis in ("times", "lr"):
        if not all(0 <= value < math.inf for value in levels.get(axis, ())):
            raise UserError(f"--{axis} must be numbers that are at least 0")
    for axis in ("max_pixels", "rank", "shots"):
        if min(levels.get(axis, (1,))) < 1:
            raise UserError(f"--{axis} must be at least 1")


def note_starts(
    start_epochs: int | None, start_captions: str | None, levels: dict[str, tuple]
) -> None:
    """Note flags of the stand-ins for pretraining where there are none.

    They are not refused: one command line then serves several architectures.
    """
    given = {"start_epochs": start_epochs, "start_captions": start_captions}
    has_random = set(RANDOM) & set(levels.get("architecture", ()))
    for flag, value in given.items():
        if value is not None and not has_random:
            files.note(
                f"--{flag} has no effect: it is of the stand-in for pretraining of random weights"
            )


def check_own(grid: str, rows: Sequence[dict], train_flags: Sequence[str]) -> None:
    """Raise UserError for a flag for train.py that all points of a grid set themselves.

    --epochs of a grid of few shots is only noted: one command line then serves several grids.
    """
    own = set.intersection(*(set(row) for row in rows))
    for flag in typed_flags(make_parser(), train_flags):
        if flag in own and flag == "epochs":
            files.note(f"--epochs has no effect on {grid}: its points have as many steps each")
        elif flag in own:
            raise UserError(f"--{flag}: {grid} has values of its own for it: leave it out")


def check_levels(grid: str, levels: dict[str, tuple], common: Common) -> None:
    """Raise UserError for levels that the grid does not have; note which weights there are not."""
    if "lr" in levels and grid != "shared_rate":
        raise UserError(
            f"--lr has the rates of shared_rate: {grid} takes multiples of each strategy's own "
            "rate, --times"
        )
    if "times" in levels and grid == "shared_rate":
        raise UserError("shared_rate takes the rates themselves: give --lr instead of --times")
    if "captions" in levels.get("pretraining", ()) and not common.start_captions:
        raise UserError("--pretraining captions needs --start_captions FILE")
    first_grid = "factorial" if grid in CHOOSING else grid
    for line in left_out(first_grid, levels, common):
        files.note(line)
    rows = settings_of(first_grid, levels, common)
    if not rows:
        raise UserError("--pretraining: there are no such weights of any --architecture")
    check_own(first_grid, rows, common.train_flags)
    check_values(first_grid, [make_point(first_grid, settings, common) for settings in rows])
    if grid in CHOOSING:
        # The last part, which has no val: a mistake should not be found after all the others.
        check_values("final", [make_point("final", row, common, holdout=False) for row in rows])


def check_values(grid: str, points: Sequence[Point]) -> None:
    """Raise UserError if train.py would refuse each of these points, for the same reason as it.

    A flag that means nothing for one strategy costs the points of that one, which is said, and not
    the grid.
    """
    if all(refusal(point.arguments) for point in points):
        raise UserError(f"{grid}: {refusal(points[0].arguments)}")
    accepted(grid, points)  # which says what is left out


def accepted(grid: str, points: Sequence[Point]) -> list[Point]:
    """The points that train.py takes; which others are left out, and why, is said once."""
    refused = defaultdict(Counter)  # reason -> strategy -> number of points
    for point in points:
        reason = refusal(point.arguments)
        if reason:
            is_untrained = point.settings.get("epochs") == 0
            refused[reason]["untrained" if is_untrained else point.settings["strategy"]] += 1
    for reason, counts in refused.items():
        which = ", ".join(f"{count} of {strategy}" for strategy, count in counts.items())
        note_once(f"left out of {grid}, as train.py refuses them: {which} ({reason})")
    return [point for point in points if not refusal(point.arguments)]


@functools.cache
def refusal(arguments: tuple[str, ...]) -> str:
    """Why train.py would refuse these arguments; empty if it would not."""
    try:
        resolve(make_parser().parse_args(arguments), processes=1)
    except UserError as error:
        return str(error)
    return ""


note_once = functools.cache(files.note)


def check_only(name: str, grid: str, common: Common, levels: dict[str, tuple]) -> None:
    """Raise UserError if no point of the grid has this name, as far as they are known."""
    for _, points in phases(grid, common, levels):
        if any(point.name == name for point in points):
            return
    raise UserError(
        f"--only {name}: {grid} has no point of this name with these flags; --dry_run lists them"
    )


def belongs_to(only: str, point: Point, grid: str) -> bool:
    """Whether --only runs a point: the one of that name, and what it starts from."""
    if grid == QWEN:
        # A trained model and its evaluations belong together: an agent runs them on one machine.
        return point.name == only or point.name.startswith(f"{only}-")
    # the stand-in for pretraining is what the others start from
    return point.name == only or point.name.startswith("start-")


def data_flags(data: dict[str, str | None]) -> tuple[str, ...]:
    """The flags of train.py that say which images to use; those not given are left out."""
    flags = []
    for key, value in data.items():
        if value:
            flags += [f"--{key}", value]
    return tuple(flags)


def make_slots(jobs: int | None, gpus: Sequence[str] | None) -> list[dict[str, str]]:
    """The environment of each process that may run at a time: its GPU, or its part of the cores."""
    if jobs is None:
        jobs = len(gpus) if gpus else 1
    if jobs < 1:
        raise UserError("--jobs must be at least 1")
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(jobs)]
    threads = max(1, os.cpu_count() // jobs)
    return [{"OMP_NUM_THREADS": str(threads)} for _ in range(jobs)]


# -----------------------------------------------------------------------------
# from a grid to points


def phases(grid: str, common: Common, levels: dict) -> Iterator[tuple[str, list[Point]]]:
    """Yield the parts of a grid in order, as (name, points).

    A part that is chosen from the results of an earlier one is made only when it is asked for.
    """
    if grid in CHOOSING:
        yield from study_phases(grid, common, levels)
        return
    if grid == QWEN:
        yield from qwen_phases(common, levels)
        return
    rows = settings_of(grid, levels, common)
    points = accepted(grid, [make_point(grid, row, common) for row in rows])
    yield "start", stand_ins(rows, common)
    yield grid, points
    if grid == "forgetting":
        yield "evaluation", forgetting_evaluations(points, common)


def study_phases(grid: str, common: Common, levels: dict) -> Iterator[tuple[str, list[Point]]]:
    """Yield the parts of `study`, or of `final`, which needs a factorial that has been run."""
    rows = settings_of("factorial", levels, common)
    factorial = accepted("factorial", [make_point("factorial", row, common) for row in rows])
    yield "start", stand_ins(rows, common)
    if grid == "study":
        yield "factorial", factorial
    # From here on the factorial has been run: its results choose what follows.
    best = choose(factorial, common.runs)
    if not best:
        print("# what follows is chosen on the results of factorial, and there are none yet")
        return
    if grid == "study":
        yield from one_factor_phases(best, common, levels)
    yield "final", final_points(rows, best, common, levels["seed"])


def one_factor_phases(
    best: dict[tuple[str, str, str], dict], common: Common, levels: dict
) -> Iterator[tuple[str, list[Point]]]:
    """Yield the one-factor grids, run at the best settings of the first architecture.

    base_to_new compares all strategies that learn by gradient, the other grids use the first.
    """
    first = next(iter(best))[:2]  # architecture and pretraining
    trained = []
    for key, setting in best.items():
        if key[:2] == first and setting["strategy"] != "linear":
            trained.append(setting)
    for grid in ONE_FACTOR:
        points = []
        for setting in trained if grid == "base_to_new" else trained[:1]:
            fixed = {axis: (value,) for axis, value in setting.items()}
            rows = settings_of(grid, levels | fixed, common)
            points += [make_point(grid, row, common) for row in rows]
        yield grid, accepted(grid, points)


def final_points(
    rows: list[dict], best: dict[tuple[str, str, str], dict], common: Common, seeds: Sequence[int]
) -> list[Point]:
    """The untrained models, and the best settings with every seed, on all training images."""
    final = [row for row in rows if row.get("epochs") == 0]
    for seed in seeds:
        for setting in best.values():
            # a linear probe gives the same result with every seed
            if setting["strategy"] != "linear" or seed == seeds[0]:
                final.append(setting | {"seed": seed})
    return accepted("final", [make_point("final", row, common, holdout=False) for row in final])


def forgetting_evaluations(points: Sequence[Point], common: Common) -> list[Point]:
    """The evaluations of `forgetting`, on val and on each other dataset.

    Of each start, of each fine-tuned run with the weights between, and of the mean of the weights
    of all seeds of a setting.
    """
    evaluations = []
    starts = {}  # (architecture, pretraining) -> the settings of a point that starts there
    for point in points:
        start = point.settings["architecture"], point.settings["pretraining"]
        starts.setdefault(start, point.settings)
    for settings in starts.values():
        model = ["--architecture", starting_weights("forgetting", settings, common)]
        name = "-".join(["forgetting", *model_words(settings), "untrained"])
        evaluations += evaluate_everywhere(name, model, common)
    seeds_of = defaultdict(list)  # setting -> the run folders of its seeds
    for point in points:
        run_folder = str(common.runs / point.name)
        model = ["--architecture", run_folder]
        # There is no way from the start to where weights have not moved.
        if point.settings["strategy"] in KEEPS_WEIGHTS:
            evaluations += evaluate_everywhere(point.name, model, common, keeps_prompt=True)
            continue
        between = [word for alpha in ALPHAS for word in ("--wise_ft", str(alpha))]
        evaluations += evaluate_everywhere(point.name, [*model, *between], common)
        setting = {key: value for key, value in point.settings.items() if key != "seed"}
        seeds_of[tuple(setting.items())].append(run_folder)
    for setting, run_folders in seeds_of.items():
        if len(run_folders) > 1:
            words = [*model_words(dict(setting)), dict(setting)["strategy"]]
            name = "-".join(["forgetting", *words, "soup"])
            evaluations += evaluate_everywhere(name, ["--soup", *run_folders], common)
    return evaluations


def evaluate_everywhere(
    name: str, model: list[str], common: Common, keeps_prompt: bool = False
) -> list[Point]:
    """The evaluations of a model on val of the flowers and on the test images of the others.

    model: the flags that say which. keeps_prompt: it learned a prompt, which no template replaces.
    """
    given = evaluation_flags(common.train_flags)
    options = [word for key in MODEL_FLAGS for word in given[key]]
    prompts = [word for key in PROMPT_FLAGS for word in given[key]]
    home = [*common.data_flags, "--split", "val", "--holdout"]
    if not keeps_prompt:
        home += prompts
    points = [make_evaluation(f"{name}-on-val", [*model, *home, *options], common)]
    for other in common.others:
        flags = [*model, *other.flags, *options]
        if not keeps_prompt:
            flags += ["--prompt_template", other.template]
        points.append(make_evaluation(f"{name}-on-{other.name}", flags, common))
    return points


def evaluation_flags(train_flags: Sequence[str]) -> dict[str, list[str]]:
    """The words of those flags for train.py that baseline_eval.py has, too, by flag."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for key in (*PROMPT_FLAGS, *MODEL_FLAGS):
        parser.add_argument(f"--{key}", action="append", default=[])
    given, _ = parser.parse_known_args(train_flags)
    return {key: to_flags(key, values) for key, values in vars(given).items()}


def make_evaluation(name: str, flags: list[str], common: Common) -> Point:
    """The point of an evaluation; its name ends in a digest of its flags."""
    name = f"{name}-{flags_digest(flags, common)}".replace("/", "-").replace("_", "")
    return Point(name, {}, tuple(flags), "baseline_eval.py")


# -----------------------------------------------------------------------------
# Qwen

QWEN_HELP = """levels of the grid qwen: --max_pixels, --rank, --shots, --protocol (rank, generate,
generate_listed, probe), and --features of the untrained model's probe (vision, merged, prompt).
While one is varied the others have their first level. --seen: how many images of a class a run sees
over all epochs (48). --architecture: one model (Qwen/Qwen2-VL-2B-Instruct). --lr: one rate."""


def parse_qwen_levels(words: Sequence[str]) -> tuple[dict[str, tuple], int, list[str]]:
    """The levels that replace the grid's own, the images of a class to see, and the other flags.

    A parser of its own: for other grids these are flags of train.py.
    """
    parser = argparse.ArgumentParser("ablate.py qwen", allow_abbrev=False, add_help=False)
    for axis in ("max_pixels", "rank", "shots"):
        parser.add_argument(f"--{axis}", nargs="+", type=int)
    parser.add_argument("--protocol", nargs="+", choices=QWEN_LEVELS["protocol"])
    parser.add_argument("--features", nargs="+", choices=QWEN_LEVELS["features"])
    parser.add_argument("--seen", type=int, default=QWEN_SEEN)
    args, others = parser.parse_known_args(words)
    levels = {}
    for axis in QWEN_LEVELS:
        # Once each: a level that is given twice is one.
        given = tuple(dict.fromkeys(getattr(args, axis) or ()))
        if given:
            levels[axis] = given
    for shots in levels.get("shots", QWEN_LEVELS["shots"]):
        if shots < 1 or args.seen < 1 or args.seen % shots:
            raise UserError(
                f"--shots {shots}: {args.seen} images of a class are no whole number of epochs; "
                "give --seen a multiple of all --shots"
            )
    return levels, args.seen, others


def check_qwen(train_flags: Sequence[str], args: argparse.Namespace) -> None:
    """Raise UserError for flags of other grids, and for those that this one sets itself."""
    own = f"{QWEN} sets seeds (--seeds), epochs (--seen), names, images and --holdout itself"
    refuse_reserved(train_flags, QWEN_RESERVED, own)
    foreign = ("pretraining", "strategy", "times", "start_captions", "start_epochs")
    foreign = [key for key in foreign if getattr(args, key) is not None]
    if foreign:
        raise UserError(f"--{foreign[0]} is of the grids of CLIP")
    if max(len(args.architecture or ()), len(args.lr or ())) > 1:
        raise UserError(f"{QWEN} is a grid of one model at one rate: one --architecture, one --lr")
    architecture = (args.architecture or [QWEN_MODEL])[0]
    if architecture in SHAPES and architecture != "tiny":
        raise UserError(f"--architecture {architecture} is a CLIP: {QWEN} takes a Qwen-VL, or tiny")


def qwen_phases(common: Common, levels: dict) -> Iterator[tuple[str, list[Point]]]:
    """Yield the training runs, then the evaluations of the untrained model and of each run, on val.

    Other image sizes, ranks and shots are evaluated by the first protocol alone.
    """
    rows = qwen_rows(levels, ("max_pixels", "rank", "shots"))
    protocols = levels.get("protocol", QWEN_LEVELS["protocol"])
    trained = [make_qwen_training(row, common) for row in rows]
    yield QWEN, trained
    evaluations = qwen_untrained(common, levels)
    first = {axis: row_levels[0] for axis, row_levels in (QWEN_LEVELS | levels).items()}
    for row, point in zip(rows, trained):
        is_first = all(row[axis] == first[axis] for axis in ("max_pixels", "rank", "shots"))
        for protocol in protocols if is_first else protocols[:1]:
            script, flags = QWEN_PROTOCOLS[protocol]
            flags = ["--adapter", str(common.runs / point.name), *flags]
            if script == "qwen_probe.py":
                flags += probe_flags(row)
            evaluations.append(make_qwen_evaluation(point.name, protocol, script, flags, common))
    yield "evaluation", evaluations


def qwen_rows(levels: dict[str, tuple], axes: Sequence[str]) -> list[dict]:
    """One row for each seed and level of the axes, one of which differs from its first level."""
    all_levels = QWEN_LEVELS | levels
    architecture = levels.get("architecture", (QWEN_MODEL,))[0]
    if architecture == "tiny":
        all_levels["max_pixels"] = all_levels["max_pixels"][:1]  # all its images have one size
    first = {"architecture": architecture} | {axis: all_levels[axis][0] for axis in axes}
    rows = []
    for seed in levels["seed"]:
        rows.append(first | {"seed": seed})
        for axis in axes:
            rows += [first | {axis: level, "seed": seed} for level in all_levels[axis][1:]]
    return rows


def qwen_untrained(common: Common, levels: dict) -> list[Point]:
    """The evaluations of the untrained model: what it says, and probes of what it knows."""
    seeds = levels["seed"]
    protocols = levels.get("protocol", QWEN_LEVELS["protocol"])
    points = []
    # Nothing is drawn, so one seed is enough.
    for row in qwen_rows(levels | {"seed": seeds[:1]}, ("max_pixels", "protocol")):
        if row["protocol"] != "probe":
            script, flags = QWEN_PROTOCOLS[row["protocol"]]
            flags = [*untrained_flags(row), *flags]
            name = qwen_name(row, ("max_pixels",))
            points.append(make_qwen_evaluation(name, row["protocol"], script, flags, common))
    if "probe" in protocols:
        for row in qwen_rows(levels, ("max_pixels", "shots", "features")):
            flags = [*untrained_flags(row), "--features", row["features"], *probe_flags(row)]
            name = f"{qwen_name(row, ('max_pixels', 'shots'))}-s{row['seed']}"
            what = f"probe-{row['features']}"
            points.append(make_qwen_evaluation(name, what, "qwen_probe.py", flags, common))
    return points


def untrained_flags(row: dict) -> list[str]:
    return ["--model", row["architecture"], "--max_pixels", str(row["max_pixels"])]


def probe_flags(row: dict) -> list[str]:
    """Which images a probe is fitted to, and that its penalty is chosen on all of val."""
    shots, seed = str(row["shots"]), str(row["seed"])
    return ["--shots", shots, "--val_shots", str(ALL_IMAGES), "--seed", seed]


def make_qwen_training(row: dict, common: Common) -> Point:
    """The point of a training run: all see a class as often, so that only the images differ."""
    flags = [*common.data_flags, *common.train_flags, "--holdout"]
    for key, value in row.items():
        flags += to_flags("model" if key == "architecture" else key, value)
    # Its evaluations take over val_shots: all images of val, whatever the seed and the shots.
    flags += ["--epochs", str(common.seen // row["shots"]), "--val_shots", str(ALL_IMAGES)]
    words = [qwen_name(row, ("max_pixels", "rank", "shots")), f"s{row['seed']}"]
    words.append(flags_digest(flags, common))
    return Point("-".join(words), row, tuple(flags), "qwen_train.py")


def make_qwen_evaluation(
    name: str, protocol: str, script: str, flags: list[str], common: Common
) -> Point:
    """The point of an evaluation on val."""
    machine = [word for key in MACHINE_FLAGS for word in evaluation_flags(common.train_flags)[key]]
    flags = [*flags, *common.data_flags, "--holdout", "--split", "val", *machine]
    words = f"{name}-{protocol}-{flags_digest(flags, common)}"
    return Point(words.replace("/", "-").replace("_", ""), {}, tuple(flags), script)


def qwen_name(row: dict, axes: Sequence[str]) -> str:
    """The beginning of the name of a point: grid, model and the levels of some axes."""
    model = Path(row["architecture"]).name  # of the hub or a folder: the last part
    words = [QWEN, model, *(f"{axis}{row[axis]}" for axis in axes)]
    return "-".join(words).replace("_", "")


def qwen_names(common: Common, levels: dict) -> list[str]:
    """The names that a sweep goes through: a training run stands for its evaluations, too."""
    phase_points = [points for _, points in qwen_phases(common, levels)]
    trained = [point.name for point in phase_points[0]]
    others = [point.name for point in phase_points[1]]
    return trained + [name for name in others if not name.startswith(tuple(trained))]


def settings_of(grid: str, levels: dict[str, tuple], common: Common) -> list[dict]:
    """The settings of each point of a grid, `levels` in place of the grid's own.

    The seed varies slowest, so that the table of the first seed is complete first. A point whose
    architecture has no weights of its pretraining is left out.
    """
    rows = []
    for block in GRIDS[grid]:
        axes = axes_of(block, levels)
        if "pretraining" not in levels:
            wanted, architectures = axes["pretraining"], axes["architecture"]
            axes["pretraining"] = shared_pretrainings(wanted, architectures, common)
        for values in itertools.product(*axes.values()):
            row = dict(zip(axes, values))
            if row["strategy"] == "linear":
                row.pop("epochs", None)  # a logistic regression has none
            if row["pretraining"] in weights_of(row["architecture"], common):
                rows.append(row)
    return rows


def axes_of(block: dict, levels: dict[str, tuple]) -> dict[str, tuple]:
    """The levels of each axis of a block, `levels` in place of its own where they are a tuple.

    Where the block names its strategies those that `levels` lacks are left out, perhaps all.
    """
    axes = {}
    for axis, value in (DEFAULT_AXES | block).items():
        if not isinstance(value, tuple):
            axes[axis] = (value,)
        else:
            axes[axis] = levels.get(axis, value)
    # An untrained model is there to compare with, whatever the strategies.
    if "strategy" in block and block.get("epochs") != 0:
        own = block["strategy"] if isinstance(block["strategy"], tuple) else (block["strategy"],)
        asked = levels.get("strategy", own)
        axes["strategy"] = tuple(strategy for strategy in asked if strategy in own)
    return axes


# -----------------------------------------------------------------------------
# pretraining


def weights_of(architecture: str, common: Common) -> dict[str, str]:
    """The weights that there are of an architecture: pretraining -> --architecture of train.py."""
    if architecture in RANDOM:
        names = STAND_INS if common.start_captions else STAND_INS[:1]
        return dict.fromkeys(names, architecture)
    if architecture not in SHAPES:
        return {AS_GIVEN: architecture}
    return {"openai": architecture} | OTHER_WEIGHTS.get(architecture, {})


def shared_pretrainings(
    wanted: Sequence[str], architectures: Sequence[str], common: Common
) -> tuple[str, ...]:
    """Those of the pretrainings that all architectures of a kind have, so that they can be crossed.

    The kinds are OpenAI's architectures, stand-ins, and weights as given: none has a level of
    another one.
    """
    kinds = defaultdict(list)
    for architecture in architectures:
        available = weights_of(architecture, common)
        kinds[next(iter(available))].append(available)
    shared = []
    for pretraining in wanted:
        if any(all(pretraining in peer for peer in peers) for peers in kinds.values()):
            shared.append(pretraining)
    return tuple(shared)


def left_out(grid: str, levels: dict[str, tuple], common: Common) -> Iterator[str]:
    """Say which weights were asked for and do not exist, or exist but not of all architectures."""
    axes = [axes_of(block, levels) for block in GRIDS[grid]]
    architectures = dict.fromkeys(itertools.chain(*(block["architecture"] for block in axes)))
    weights = {name: weights_of(name, common) for name in architectures}
    if "pretraining" in levels:
        for name, available in weights.items():
            lacking = [level for level in levels["pretraining"] if level not in available]
            if lacking:
                only = f"it has {', '.join(available)}"
                yield f"there are no weights of {name} from {', '.join(lacking)}: {only}"
        return
    wanted = dict.fromkeys(itertools.chain(*(block["pretraining"] for block in axes)))
    shared = shared_pretrainings(wanted, weights, common)
    for pretraining in wanted:
        exists = any(pretraining in available for available in weights.values())
        if exists and pretraining not in shared:
            yield f"not all architectures have weights from {pretraining}, so it is left out"


def stand_ins(rows: list[dict], common: Common) -> list[Point]:
    """The stand-ins for pretraining that the rows start from: of each random architecture."""
    starts = dict.fromkeys((row["architecture"], row["pretraining"]) for row in rows)
    return [stand_in(*start, common) for start in starts if start[0] in RANDOM]


def stand_in(architecture: str, pretraining: str, common: Common) -> Point:
    """A stand-in for pretraining: full training of random weights on the base classes.

    The images of val and test are left out.
    """
    settings = {
        "architecture": architecture,
        "pretraining": pretraining,
        "strategy": "full",
        "times": 1.0,
        "classes": "base",
        "epochs": common.start_epochs,
        "seed": 0,
    }
    if pretraining == "captions":
        settings["captions"] = common.start_captions
    return make_point("start", settings, common)


def make_point(grid: str, settings: dict, common: Common, holdout: bool = True) -> Point:
    """The point of these settings: its name, and its flags of train.py.

    The name says grid and settings, and ends in a digest of all flags: with other flags it is
    another point.
    """
    lr = learning_rate(settings)
    flags = [*common.data_flags]
    if grid != "start":
        flags += common.train_flags
    if holdout:
        flags.append("--holdout")
    for key, value in settings.items():
        if key == "architecture":
            flags += to_flags(key, starting_weights(grid, settings, common))
        elif key not in ("pretraining", "times", "lr"):
            flags += to_flags(key, value)
    flags += to_flags("lr", lr)

    words = [grid, *model_words(settings), settings["strategy"], f"lr{lr}"]
    for key, value in settings.items():
        if key not in NOT_IN_NAME:
            words.append(key if value is True else f"{key}{value}")
    words += [f"s{settings['seed']}", flags_digest(flags, common)]
    name = "-".join(words).replace("/", "-").replace("_", "")
    return Point(name, settings, tuple(flags))


def flags_digest(flags: Sequence[str], common: Common) -> str:
    # Runs that were moved to another folder keep their names.
    text = json.dumps(flags).replace(str(common.runs), "")
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def model_words(settings: dict) -> list[str]:
    """Architecture and pretraining in the name of a point."""
    architecture = settings["architecture"]
    if architecture not in SHAPES:
        architecture = Path(architecture).name  # a checkpoint: the last part of its path
    if settings["pretraining"] in USUAL:
        return [architecture]
    return [architecture, settings["pretraining"]]


def learning_rate(settings: dict) -> str:
    """The learning rate of a point, as train.py's --lr."""
    if "lr" in settings:  # the same for all strategies and architectures
        return f"{settings['lr']:.3g}"
    lr = LEARNING_RATES[settings["strategy"]] * settings["times"]
    if settings["architecture"] in RANDOM:
        lr *= RANDOM_LR_FACTOR
    return f"{lr:.3g}"


def starting_weights(grid: str, settings: dict, common: Common) -> str:
    """What --architecture of train.py becomes.

    Of a random one it is the run of its stand-in, of others the weights of their pretraining.
    """
    architecture, pretraining = settings["architecture"], settings["pretraining"]
    if grid == "start":
        return architecture
    if architecture in RANDOM:
        return str(common.runs / stand_in(architecture, pretraining, common).name)
    return weights_of(architecture, common)[pretraining]


def to_flags(key: str, value) -> list[str]:
    """A setting as words of a command line. A list is a flag given several times."""
    if value is True:
        return [f"--{key}"]
    flags = []
    for item in value if isinstance(value, list) else [value]:
        flags += [f"--{key}", str(item)]
    return flags


def all_arguments(point: Point, folder: Path) -> list[str]:
    """All arguments of a point's script."""
    return [*point.arguments, "--runs", str(folder), "--name", point.name]


def choose(points: Sequence[Point], folder: Path) -> dict[tuple[str, str, str], dict]:
    """The best settings of each (architecture, pretraining, strategy).

    The best have the highest mean val/top1 over seeds. A setting that lacks a seed is not chosen.
    The penalty of a linear probe is the one that it chose itself. Test results are never looked at.
    """
    val_top1_of = defaultdict(list)
    fitted_of = {}
    for point in points:
        # The untrained model is there to compare with: there is nothing to choose.
        if point.settings.get("epochs") == 0:
            continue
        setting = tuple(point.settings[axis] for axis in CHOSEN_AXES)
        run_folder = folder / point.name
        # A seed that has not finished counts as nan, so its setting is never chosen.
        finished = (run_folder / "result.json").exists()
        val_top1 = runs.read_metrics(run_folder, "val")["top1"] if finished else math.nan
        val_top1_of[setting].append(val_top1)
        fitted_of[setting] = fitted_penalty(run_folder) if finished else {}

    best = {}
    best_mean = {}
    for setting, values in val_top1_of.items():
        *model, _ = setting  # all but the multiple of the learning rate
        key = tuple(model)
        mean = sum(values) / len(values)
        if mean > best_mean.get(key, -1):  # false for nan
            best_mean[key] = mean
            best[key] = dict(zip(CHOSEN_AXES, setting)) | fitted_of[setting]
    return best


def fitted_penalty(run_folder: Path) -> dict[str, float]:
    """The penalty that a finished linear probe chose on val, by the flag that says it.

    Empty for other strategies, and for probes that do not say what they chose.
    """
    result = files.read_json(run_folder / "result.json")
    return {flag: result[key] for key, flag in FITTED.items() if key in result}


# -----------------------------------------------------------------------------
# running


def run(
    points: Sequence[Point], folder: Path, slots: Sequence[dict], environment: dict, wandb: str
) -> list[bool]:
    """Run the points, one in each slot at a time, and say of each that ended whether it finished.

    slots: the environment variables of each slot. environment: those of all processes.
    A point that another process is working on is waited for.
    """
    queue = deque(in_turn(points))
    running = {}  # slot: (point, process, log)
    outcomes = []
    with contextlib.suppress(ValueError):  # in a thread, such as a notebook's
        signal.signal(signal.SIGTERM, interrupt)
    try:
        while queue or running:
            # Fill the free slots.
            free = [slot for slot in range(len(slots)) if slot not in running]
            for slot in free:
                variables = os.environ | environment | slots[slot]
                started = start_next(queue, outcomes, folder, variables, wandb)
                if started:
                    running[slot] = started
            time.sleep(0.1)

            # A process that has ended frees its slot.
            codes = {slot: exit_code(process) for slot, (_, process, _) in running.items()}
            for slot in [slot for slot, code in codes.items() if code is not None]:
                point, _, log = running.pop(slot)
                log.close()  # and with it the lock
                # None if the point finished
                error = failure(folder / point.name, codes[slot])
                outcomes.append(error is None)
                progress = f"{point.name} ({len(outcomes)} of {len(points)})"
                if error is None:
                    print(f"finished {progress}", flush=True)
                    continue
                row = {
                    "name": point.name,
                    "code": codes[slot],
                    "error": error,
                    "arguments": point.arguments,
                }
                files.append_line(folder / "failed.jsonl", row)
                print(f"FAILED {progress}: {error}", flush=True)
    finally:
        # Ctrl-C and SIGTERM come here too: unless ablate.py is killed, its processes end with it.
        for _, process, _ in running.values():
            process.terminate()
    return outcomes


def in_turn(points: Sequence[Point]) -> list[Point]:
    """The points in the order in which they are run: one of each model and strategy in turn.

    Points of one model and strategy need the same frozen parts, which the first of them computes:
    those that are started together would wait for it. The seed still varies slowest, so that the
    table of the first seed is complete first.
    """
    seeds = list(dict.fromkeys(point.settings.get("seed") for point in points))
    turns = Counter()  # (seed, model, strategy) -> how many points of it have had their place
    places = []
    for point in points:
        key = tuple(point.settings.get(axis) for axis in ("seed", *MODEL_AXES))
        places.append((seeds.index(key[0]), turns[key]))
        turns[key] += 1
    # Sorting keeps the order of those that have the same place.
    return [points[i] for i in sorted(range(len(points)), key=places.__getitem__)]


def interrupt(*_) -> None:
    """On SIGTERM: end as on Ctrl-C, so that the processes are ended too."""
    raise KeyboardInterrupt


def start_next(
    queue: deque, outcomes: list[bool], folder: Path, environment: dict, wandb: str
) -> tuple[Point, Process, IO] | None:
    """Start the first point of the queue that needs a process; None if none does.

    Returns the point, its process, and its log, whose lock ends when it is closed. Finished points
    leave the queue for `outcomes`; those held by another process go to its end.
    """
    for _ in range(len(queue)):
        point = queue.popleft()
        started = launch(point, folder, environment, wandb)
        if started == "finished":
            outcomes.append(True)
        elif started == "held":
            queue.append(point)
        else:
            return point, *started
    return None


def launch(point: Point, folder: Path, environment: dict, wandb: str) -> tuple[Process, IO] | str:
    """Start or resume a point and return its process and log, 'finished', or 'held'.

    A point is held while a process of this or of another ablate.py works on it. The lock is on the
    log: train.py is given the open file, and with it the lock, and so holds it until its own end,
    even if the ablate.py that started it is killed. (On Windows the lock is ablate.py's alone.)
    """
    run_folder = folder / point.name
    run_folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((run_folder / "log.txt").open("ab"))
        if not files.try_lock(log):
            return "held"
        if (run_folder / "result.json").exists():
            # it may have been killed between result.json and its line in results.jsonl
            runs.register(run_folder)
            return "finished"
        if point.script in RESUMED and (run_folder / "args.json").exists():
            arguments = ["--resume", str(run_folder)]
        else:
            arguments = all_arguments(point, folder)
        words = [str(HERE / point.script), *arguments, "--wandb", wandb]
        process = start_process(words, log, environment)
        stack.pop_all()  # the log stays open
        return process, log


def start_process(words: Sequence[str], log: IO, environment: dict[str, str]) -> Process:
    """Start a script, with its output in the log and nothing to read; words are its argv."""
    if not FORKS:
        return subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    context = multiprocessing.get_context("forkserver")
    is_qwen = Path(words[0]).name.startswith(QWEN)
    context.set_forkserver_preload([*IMPORTED, *(QWEN_IMPORTED if is_qwen else ())])
    ours, theirs = socket.socketpair()
    with ours, theirs:
        # The process is given this very file, so that it holds the lock as well.
        socket.send_fds(ours, [b"log"], [log.fileno()])
        arguments = (tuple(words), theirs, environment, os.getcwd())
        process = context.Process(target=run_script, args=arguments)
        process.start()
    return process


def run_script(
    words: Sequence[str], sender: socket.socket, environment: dict[str, str], folder: str
) -> None:
    """Run a script in this process, which was forked, as if it had been started: words are argv.

    sender: sends the log, an open file. folder: the working directory.
    """
    with sender:
        _, (log,), _, _ = socket.recv_fds(sender, len(b"log"), 1)
    for stream in (1, 2):
        os.dup2(log, stream)
    # As a new Python opens them: those of this process may be closed.
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    limit_threads(environment.get("OMP_NUM_THREADS", ""))
    sys.argv = list(words)
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a forked process would end without them, and W&B counts on them


def limit_threads(threads: str) -> None:
    """What OMP_NUM_THREADS says, for libraries that have been imported before it was set."""
    import torch  # here, as this process alone computes
    from threadpoolctl import threadpool_limits

    if threads.isdecimal():
        torch.set_num_threads(int(threads))
        threadpool_limits(int(threads))


def exit_code(process: Process) -> int | None:
    """The exit code of a process, negative after a signal; None while it runs."""
    if isinstance(process, subprocess.Popen):
        return process.poll()
    return process.exitcode


def failure(run_folder: Path, code: int) -> str | None:
    """What went wrong in a run whose process has ended: a line of its log. None if it finished."""
    if code == 0 and (run_folder / "result.json").exists():
        return None
    # the last line that names an error; a killed process has none, so the last line of all
    lines = (run_folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        if re.match(r"error: |\w+(Error|Exception)\b", line):
            return line
    return lines[-1] if lines else ""


# -----------------------------------------------------------------------------
# Weights & Biases


def write_sweep(grid: str, common: Common, levels: dict, arguments: list[str]) -> Path:
    """Write a sweep over the names of the grid's points, and return its path.

    Each agent calls this script with --only for the next name. The file is JSON, which is YAML too.
    arguments: those of this command, which the agents repeat.
    """
    if grid in CHOOSING:
        raise UserError(
            f"{grid} chooses its settings from results: sweep factorial, "
            f"then run ablate.py {grid} where the runs are"
        )
    if grid == "forgetting":
        raise UserError(
            "forgetting evaluates runs of other points, which may be on another machine: run "
            "ablate.py forgetting without --sweep"
        )
    if grid == QWEN:
        names = qwen_names(common, levels)
    else:
        points = [make_point(grid, row, common) for row in settings_of(grid, levels, common)]
        names = [point.name for point in accepted(grid, points)]
    repeated = [argument for argument in arguments if argument != "--sweep"]
    sweep = {
        "name": grid,
        "method": "grid",
        "metric": {"name": "val/top1", "goal": "maximize"},
        "program": "ablate.py",
        "parameters": {"only": {"values": names}},
        "command": ["${env}", "python", "${program}", *repeated, "${args}"],
    }
    path = common.runs / f"{grid}.sweep.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, sweep)
    return path


if __name__ == "__main__":
    main()
