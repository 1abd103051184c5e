"""Run a grid of train.py, one process a point. Finished points are skipped, interrupted ones are
resumed, and failed ones are recorded while the others go on.

    python ablate.py temperature               # ViT-B/32, 5 fixed and 2 learned values, 3 seeds
    python ablate.py factorial --architecture ViT-B/32 RN50 --gpus 0 1 2 3
    python ablate.py learning_rate --strategy lora --seeds 0 --epochs 3  # --epochs is train.py's
    python ablate.py temperature --sweep       # write a W&B sweep file, for many machines
    python ablate.py study --runs runs/study   # factorial, then one factor at a time, then final

All choices are made on val: the grids run with --holdout. `final` (and the end of `study`) takes
the best settings of each strategy and architecture, trains on all training images, and evaluates
on test once. The one-factor grids of `study` use the first architecture and strategy. An
architecture with random weights (tiny, tiny-rn) is first trained on the base classes, as a stand-in
for pretraining. python report.py --runs RUNS makes the report.
"""

import argparse
import atexit
import contextlib
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
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from flowers import UserError, command, files, runs
from flowers.choices import LEARNING_RATES, PRETRAINED, RANDOM, SHAPES, STRATEGIES, TEMPLATE

Process = subprocess.Popen | multiprocessing.process.BaseProcess

# -----------------------------------------------------------------------------
# the grids

# logistic regression ("linear") has no learning rate to cross
TUNED = tuple(strategy for strategy in STRATEGIES if strategy != "linear")

PROJECT = TEMPLATE
OPENAI = "a photo of a {}, a type of flower."
NAME_ALONE = "{}"
ALL_TEMPLATES = [PROJECT, OPENAI, NAME_ALONE]

# A grid is a list of blocks, and a block is a product of axes. The value of an axis is
#   a tuple: its levels, which --architecture, --strategy, --times and --seeds may replace;
#   a list: one level, a flag given several times;
#   anything else: one fixed level, which no flag replaces.
# `times` is the learning rate as a multiple of the strategy's default.
DEFAULT_AXES = {
    "seed": (0, 1, 2),
    "architecture": ("ViT-B/32",),
    "strategy": ("full",),
    "times": (1.0,),
}
# A linear probe gives the same result with every seed, so one is enough.
UNTRAINED = {"architecture": PRETRAINED, "strategy": "full", "times": 1.0, "epochs": 0, "seed": 0}
LINEAR = {"architecture": PRETRAINED, "strategy": "linear", "times": 1.0, "seed": 0}
CROSSED = {"architecture": PRETRAINED, "strategy": TUNED, "times": (0.2, 1.0, 5.0)}
GRIDS = {
    "architecture": [{"architecture": PRETRAINED}],
    "strategy": [{"strategy": STRATEGIES}],
    "learning_rate": [{"times": (0.1, 0.3, 1.0, 3.0, 10.0)}],
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
    "shots": [{"shots": (1, 2, 4, 8, 16)}],
    "factorial": [UNTRAINED, LINEAR, CROSSED],
}
# These choose their settings from the results of `factorial`.
CHOOSING = ("final", "study")
# What the study runs after the factorial, with everything else at the best settings.
ONE_FACTOR = ("temperature", "batch_size", "positives", "prompt", "augment", "shots", "base_to_new")

# Random weights need larger steps than pretrained ones: 1e-5 becomes 5e-4.
RANDOM_LR_FACTOR = 50
# These would make a name too long; the digest at its end tells them apart.
NOT_IN_NAME = (*DEFAULT_AXES, "prompt_template", "chunk_size")
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
    "seaborn",
    "sklearn.linear_model",
    "torch._dynamo",
)
TRAIN = Path(__file__).resolve().parent / "train.py"

# ablate.py sets these flags of train.py itself.
RESERVED = ("--lr", "--seed", "--name", "--holdout", "--resume", "--tau_lr")


@dataclass(frozen=True)
class Point:
    """One run of train.py."""

    name: str
    settings: dict
    arguments: tuple[str, ...]  # of train.py, without --runs and --name


@dataclass(frozen=True)
class Common:
    """What all points of one command have in common."""

    runs: Path
    data_flags: tuple[str, ...]  # which images
    train_flags: tuple[str, ...]  # for train.py, but not for the stand-in for pretraining
    start_epochs: int  # of the stand-in for pretraining


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a flag that is not ours goes to train.py as it is
    )
    # Axes
    parser.add_argument("grid", choices=[*GRIDS, *CHOOSING])
    parser.add_argument(
        "--architecture",
        type=files.user_path,
        nargs="+",
        help="levels of this axis (default: the grid's own, else ViT-B/32)",
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
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument(
        "--start_epochs",
        type=int,
        default=19,
        help="epochs of the stand-in for pretraining of tiny and tiny-rn (default: %(default)s)",
    )
    # Data
    group = parser.add_argument_group("data")
    group.add_argument("--data_root", type=files.user_path, help="as in train.py")
    group.add_argument("--splits_path", type=files.user_path, help="as in train.py")
    group.add_argument("--splits_base", help="as in train.py")
    group.add_argument("--splits", help="as in train.py")
    group.add_argument("--class_names", help="as in train.py")
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
    check_train_flags(train_flags)
    common = Common(Path(args.runs), data_flags(args), tuple(train_flags), args.start_epochs)
    levels = chosen_levels(args)
    slots = make_slots(args.jobs, args.gpus)
    if args.sweep:
        print(write_sweep(args.grid, common, levels, sys.argv[1:]))
        return

    # -----------------------------------------------------------------------------
    # run
    outcomes = []
    for grid, points in phases(args.grid, common, levels):
        if args.only is not None:
            # the stand-in for pretraining is what the others start from
            points = [p for p in points if p.name == args.only or p.name.startswith("start-")]
        if args.dry_run:
            print(f"# {grid}: {len(points)} points")
            for point in points:
                print(shlex.join(["python", "train.py", *train_arguments(point, common.runs)]))
        else:
            environment = {"WANDB_RUN_GROUP": grid, "TQDM_MININTERVAL": "10"}
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


def check_train_flags(train_flags: Sequence[str]) -> None:
    """Raise UserError for a flag that ablate.py sets itself, or a word that is no flag."""
    wrong = [flag for flag in train_flags if flag.split("=")[0] in RESERVED]
    if train_flags and not train_flags[0].startswith("--"):
        wrong.append(train_flags[0])
    if wrong:
        raise UserError(
            f"{wrong[0]}: ablate.py sets the learning rate (--times), seeds (--seeds), "
            "names and --holdout itself"
        )


def data_flags(args: argparse.Namespace) -> tuple[str, ...]:
    """The flags of train.py that say which images to use; those not given are left out."""
    flags = []
    for key in ("data_root", "splits_path", "splits_base", "splits", "class_names"):
        value = getattr(args, key)
        if value:
            flags += [f"--{key}", value]
    return tuple(flags)


def chosen_levels(args: argparse.Namespace) -> dict[str, tuple]:
    """The levels that the command line gives for some axes, in place of the grid's own."""
    axes = {
        "architecture": args.architecture,
        "strategy": args.strategy,
        "times": args.times,
        "seed": args.seeds,
    }
    return {axis: tuple(levels) for axis, levels in axes.items() if levels}


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
    rows = settings_of(grid, levels)
    yield "start", stand_ins(rows, common)
    yield grid, [make_point(grid, row, common) for row in rows]


def study_phases(grid: str, common: Common, levels: dict) -> Iterator[tuple[str, list[Point]]]:
    """Yield the parts of `study`, or of `final`, which needs a factorial that has been run."""
    rows = settings_of("factorial", levels)
    factorial = [make_point("factorial", row, common) for row in rows]
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
    best: dict[tuple[str, str], dict], common: Common, levels: dict
) -> Iterator[tuple[str, list[Point]]]:
    """Yield the one-factor grids, run at the best settings of the first architecture.

    base_to_new compares all strategies that learn by gradient, the other grids use the first.
    """
    first = next(iter(best))[0]
    trained = [s for architecture, s in best if architecture == first and s != "linear"]
    for grid in ONE_FACTOR:
        strategies = trained if grid == "base_to_new" else trained[:1]
        points = []
        for strategy in strategies:
            setting = best[first, strategy]
            fixed = {axis: (value,) for axis, value in setting.items()}
            rows = settings_of(grid, levels | fixed)
            points += [make_point(grid, row, common) for row in rows]
        yield grid, points


def final_points(
    rows: list[dict], best: dict[tuple[str, str], dict], common: Common, seeds: Sequence[int]
) -> list[Point]:
    """The untrained models, and the best settings with every seed, on all training images."""
    final = [row for row in rows if row.get("epochs") == 0]
    for seed in seeds:
        for setting in best.values():
            # a linear probe gives the same result with every seed
            if setting["strategy"] != "linear" or seed == seeds[0]:
                final.append(setting | {"seed": seed})
    return [make_point("final", row, common, holdout=False) for row in final]


def settings_of(grid: str, levels: dict[str, tuple]) -> list[dict]:
    """The settings of each point of a grid, `levels` in place of the grid's own.

    The seed varies slowest, so that the table of the first seed is complete first.
    """
    rows = []
    for block in GRIDS[grid]:
        axes = {}
        for axis, value in (DEFAULT_AXES | block).items():
            if not isinstance(value, tuple):
                axes[axis] = (value,)
            else:
                axes[axis] = levels.get(axis, value)
        for values in itertools.product(*axes.values()):
            rows.append(dict(zip(axes, values)))
    return rows


def stand_ins(rows: list[dict], common: Common) -> list[Point]:
    """The stand-ins for pretraining that the rows start from, one a random architecture."""
    architectures = dict.fromkeys(row["architecture"] for row in rows)
    return [stand_in(name, common) for name in architectures if name in RANDOM]


def stand_in(architecture: str, common: Common) -> Point:
    """A stand-in for pretraining: full training of random weights on the base classes.

    The images of val and test are left out.
    """
    settings = {
        "architecture": architecture,
        "strategy": "full",
        "times": 1.0,
        "classes": "base",
        "epochs": common.start_epochs,
        "seed": 0,
    }
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
            flags += to_flags(key, starting_weights(grid, value, common))
        elif key != "times":
            flags += to_flags(key, value)
    flags += to_flags("lr", lr)

    # Runs that were moved to another folder keep their names.
    text = json.dumps(flags).replace(str(common.runs), "")
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]

    architecture = settings["architecture"]
    if architecture not in SHAPES:
        architecture = Path(architecture).name  # a checkpoint: the last part of its path
    words = [grid, architecture, settings["strategy"], f"lr{lr}"]
    for key, value in settings.items():
        if key not in NOT_IN_NAME:
            words.append(key if value is True else f"{key}{value}")
    words += [f"s{settings['seed']}", digest]
    name = "-".join(words).replace("/", "-").replace("_", "")
    return Point(name, settings, tuple(flags))


def learning_rate(settings: dict) -> str:
    """The learning rate of a point, as train.py's --lr."""
    lr = LEARNING_RATES[settings["strategy"]] * settings["times"]
    if settings["architecture"] in RANDOM:
        lr *= RANDOM_LR_FACTOR
    return f"{lr:.3g}"


def starting_weights(grid: str, architecture: str, common: Common) -> str:
    """What --architecture of train.py becomes: a random one is replaced by its stand-in's run."""
    if grid == "start" or architecture not in RANDOM:
        return architecture
    return str(common.runs / stand_in(architecture, common).name)


def to_flags(key: str, value) -> list[str]:
    """A setting as words of a command line. A list is a flag given several times."""
    if value is True:
        return [f"--{key}"]
    flags = []
    for item in value if isinstance(value, list) else [value]:
        flags += [f"--{key}", str(item)]
    return flags


def train_arguments(point: Point, folder: Path) -> list[str]:
    """All arguments of train.py for a point."""
    return [*point.arguments, "--runs", str(folder), "--name", point.name]


def choose(points: Sequence[Point], folder: Path) -> dict[tuple[str, str], dict]:
    """The best settings of each (architecture, strategy): the highest mean val/top1 over seeds.

    A setting that lacks a seed is not chosen. Test results are never looked at.
    """
    val_top1_of = defaultdict(list)
    for point in points:
        # The untrained model is there to compare with: there is nothing to choose.
        if point.settings.get("epochs") == 0:
            continue
        setting = tuple(point.settings[axis] for axis in ("architecture", "strategy", "times"))
        run_folder = folder / point.name
        # A seed that has not finished counts as nan, so its setting is never chosen.
        finished = (run_folder / "result.json").exists()
        val_top1 = runs.read_metrics(run_folder, "val")["top1"] if finished else math.nan
        val_top1_of[setting].append(val_top1)

    best = {}
    best_mean = {}
    for (architecture, strategy, times), values in val_top1_of.items():
        pair = architecture, strategy
        mean = sum(values) / len(values)
        if mean > best_mean.get(pair, -1):  # false for nan
            best_mean[pair] = mean
            best[pair] = {"architecture": architecture, "strategy": strategy, "times": times}
    return best


# -----------------------------------------------------------------------------
# running


def run(
    points: Sequence[Point], folder: Path, slots: Sequence[dict], environment: dict, wandb: str
) -> list[bool]:
    """Run the points, one in each slot at a time, and say of each that ended whether it finished.

    slots: the environment variables of each slot. environment: those of all processes.
    A point that another process is working on is waited for.
    """
    queue = deque(points)
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
        if (run_folder / "args.json").exists():
            arguments = ["--resume", str(run_folder)]
        else:
            arguments = train_arguments(point, folder)
        process = start_process([*arguments, "--wandb", wandb], log, environment)
        stack.pop_all()  # the log stays open
        return process, log


def start_process(arguments: Sequence[str], log: IO, environment: dict[str, str]) -> Process:
    """Start train.py, with its output in the log and nothing to read."""
    if not FORKS:
        return subprocess.Popen(
            [sys.executable, str(TRAIN), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        # The process is given this very file, so that it holds the lock as well.
        socket.send_fds(ours, [b"log"], [log.fileno()])
        words = (str(TRAIN), *arguments)
        process = context.Process(target=train, args=(words, theirs, environment, os.getcwd()))
        process.start()
    return process


def train(
    words: Sequence[str], sender: socket.socket, environment: dict[str, str], folder: str
) -> None:
    """Run train.py in this process, which was forked, as if it had been started: words are argv.

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
    names = [make_point(grid, row, common).name for row in settings_of(grid, levels)]
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
