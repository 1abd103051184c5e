"""Run a grid of train.py, a process for each point: finished points are skipped, killed ones resumed, failed ones recorded while the rest go on.

    python ablate.py temperature                                             # ViT-B/32, six temperatures and a learned one, seeds 0 1 2
    python ablate.py factorial --architecture ViT-B/32 RN50 --gpus 0 1 2 3   # strategy x architecture x learning rate
    python ablate.py learning_rate --strategy lora --seeds 0 --epochs 3      # flags it does not know go to train.py
    python ablate.py temperature --sweep                                     # a W&B sweep file instead, for agents on several machines
    python ablate.py study --runs runs/study                                 # factorial; one-factor grids (first architecture and strategy); final table

All choices are made on val: grids run with --holdout. `final` (and the end of `study`) takes the best settings of each strategy and architecture
there, trains on all training images, and touches test once. An architecture of random weights (tiny, tiny-rn) is first trained on the base classes,
as a stand-in for pretraining. python report.py --runs RUNS makes the report.
"""

import argparse
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowers import UserError, command, evaluate, files, runs
from flowers.models import RANDOM, SHAPES
from flowers.strategies import LEARNING_RATES, STRATEGIES

NINE = tuple(name for name in SHAPES if name not in RANDOM)
TUNED = tuple(
    s for s in STRATEGIES if s != "linear"
)  # logistic regression has no learning rate to cross
STAND_IN = 50  # learning rates of tiny and tiny-rn, in those of the pretrained models: 5e-4 to 1e-5
OPENAI, PLAIN = "a photo of a {}, a type of flower.", "{}"
# A grid is a list of blocks, a block a product of axes. A tuple holds the levels of an axis, which --architecture, --strategy, --times and --seeds
# may replace; anything else is fixed. A list is a flag given several times. `times`: the learning rate, in the strategy's default.
DEFAULTS = {
    "seed": (0, 1, 2),
    "architecture": ("ViT-B/32",),
    "strategy": ("full",),
    "times": (1.0,),
}
GRIDS = {
    "architecture": [{"architecture": NINE}],
    "strategy": [{"strategy": STRATEGIES}],
    "learning_rate": [{"times": (0.1, 0.3, 1.0, 3.0, 10.0)}],
    "temperature": [
        {"temperature": (0.003, 0.01, 0.03, 0.1, 0.3)},
        {"temperature": (0.01, 0.07), "learn_temperature": True},
    ],
    "batch_size": [{"batch_size": (16, 64, 256, 512), "chunk_size": 64}],
    "positives": [
        {"positives": ("pair", "class"), "prompt_template": [evaluate.TEMPLATE, OPENAI, PLAIN]}
    ],
    "prompt": [
        {
            "prompt_template": (
                [evaluate.TEMPLATE],
                [OPENAI],
                [PLAIN],
                [evaluate.TEMPLATE, OPENAI, PLAIN],
            )
        }
    ],
    "augment": [{"augment": ("none", "flip", "crop")}],
    "base_to_new": [{"strategy": STRATEGIES, "classes": "base"}],
    "shots": [{"shots": (1, 2, 4, 8, 16)}],
    "factorial": [
        {
            "architecture": NINE,
            "strategy": "full",
            "times": 1.0,
            "epochs": 0,
            "seed": 0,
        },  # the model as it came
        {
            "architecture": NINE,
            "strategy": "linear",
            "times": 1.0,
            "seed": 0,
        },  # the same with every seed
        {"architecture": NINE, "strategy": TUNED, "times": (0.2, 1.0, 5.0)},
    ],
}
ONE_FACTOR = (
    "temperature",
    "batch_size",
    "positives",
    "prompt",
    "augment",
    "shots",
    "base_to_new",
)  # of the study, after the factorial


@dataclass(frozen=True)
class Point:
    name: str
    settings: dict
    arguments: tuple[str, ...]  # of train.py, without --runs and --name


@dataclass(frozen=True)
class Common:
    """What all points of one command share."""

    runs: Path
    data: tuple[str, ...]  # flags that say which images
    rest: tuple[str, ...]  # flags for train.py, of the points only
    start_epochs: int


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("grid", choices=[*GRIDS, "final", "study"])
    parser.add_argument(
        "--architecture",
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
        help="learning rates, in the strategy's default (default: the grid's own, else 1)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument(
        "--start_epochs",
        type=int,
        default=19,
        help="of the stand-in for pretraining of tiny and tiny-rn (default: %(default)s)",
    )
    group = parser.add_argument_group("data")
    for flag in ("--data_root", "--splits_path", "--splits", "--class_names"):
        group.add_argument(flag, help="as in train.py")
    group = parser.add_argument_group("running")
    group.add_argument("--runs", default="runs", help="folder of the runs (default: %(default)s)")
    group.add_argument("--jobs", type=int, help="points at a time (default: one a GPU)")
    group.add_argument(
        "--gpus",
        nargs="+",
        help="numbers of the GPUs to share out (default: whatever train.py sees)",
    )
    group.add_argument(
        "--wandb",
        default="auto",
        help="as in train.py; the group is the grid's name (default: %(default)s)",
    )
    group.add_argument("--only", help="run the point of this name alone")
    group.add_argument("--dry_run", action="store_true", help="print the commands")
    group.add_argument(
        "--sweep",
        action="store_true",
        help="write RUNS/GRID.sweep.yaml for `wandb sweep`; each agent runs points of the grid",
    )
    args, rest = parser.parse_known_args()

    data = tuple(
        x
        for key in ("data_root", "splits_path", "splits", "class_names")
        if getattr(args, key)
        for x in (f"--{key}", getattr(args, key))
    )
    fixed = [
        x
        for x in rest
        if x.split("=")[0] in ("--lr", "--seed", "--name", "--holdout", "--resume", "--tau_lr")
    ]
    if fixed or (rest and not rest[0].startswith("--")):
        raise UserError(
            f"{(fixed or rest)[0]}: ablate.py sets the learning rate (--times), seeds (--seeds), names and --holdout itself"
        )
    common = Common(Path(args.runs), data, tuple(rest), args.start_epochs)
    given = {
        "architecture": args.architecture,
        "strategy": args.strategy,
        "times": args.times,
        "seed": args.seeds,
    }
    given = {key: tuple(levels) for key, levels in given.items() if levels}
    jobs = args.jobs if args.jobs is not None else len(args.gpus or [0])
    if jobs < 1:
        raise UserError("--jobs must be at least 1")
    slots = [
        {"CUDA_VISIBLE_DEVICES": args.gpus[i % len(args.gpus)]}
        if args.gpus
        else {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))}
        for i in range(jobs)
    ]
    if args.sweep:
        print(write_sweep(args.grid, common, given, sys.argv[1:]))
        return

    finished = failed = 0
    for grid, points in phases(args.grid, common, given):
        points = [p for p in points if args.only in (None, p.name) or p.name.startswith("start-")]
        if args.dry_run:
            print(
                "\n".join(
                    [f"# {grid}: {len(points)} points"]
                    + [
                        shlex.join(["python", "train.py", *train_arguments(p, common.runs)])
                        for p in points
                    ]
                )
            )
            continue
        ended = run(
            points,
            common.runs,
            slots,
            {"WANDB_RUN_GROUP": grid, "TQDM_MININTERVAL": "10"},
            args.wandb,
        )
        finished, failed = finished + ended.count(True), failed + ended.count(False)
    if not args.dry_run:
        print(f"{finished} points finished, {failed} failed; python report.py --runs {args.runs}")
        if failed:
            raise UserError(
                f"{failed} points failed: see {common.runs / 'failed.jsonl'}, mend the cause, and run the same command again"
            )


def phases(grid: str, common: Common, given: dict) -> Iterator[tuple[str, list[Point]]]:
    """The parts of a grid in order. A part that is chosen from the results of an earlier one is made when it is asked for."""
    several = grid in ("final", "study")
    rows = settings_of("factorial" if several else grid, given)
    yield (
        "start",
        [start(a, common) for a in dict.fromkeys(r["architecture"] for r in rows) if a in RANDOM],
    )
    if not several:
        yield grid, [point(grid, r, common) for r in rows]
        return
    factorial = [point("factorial", r, common) for r in rows]
    if grid == "study":
        yield "factorial", factorial
    chosen = choose(factorial, common.runs)
    if not chosen:
        print("# what follows is chosen on the results of factorial, and there are none yet")
        return
    if grid == "study":
        first = next(iter(chosen))[0]
        trained = [s for a, s in chosen if a == first and s != "linear"]
        for name in ONE_FACTOR:
            strategies = trained if name == "base_to_new" else trained[:1]
            yield (
                name,
                [
                    point(name, r, common)
                    for s in strategies
                    for r in settings_of(
                        name,
                        given
                        | {
                            "architecture": (first,),
                            "strategy": (s,),
                            "times": (chosen[first, s]["times"],),
                        },
                    )
                ],
            )
    last = [r for r in rows if r.get("epochs") == 0]
    last += [
        r | {"seed": seed}
        for seed in given["seed"]
        for r in chosen.values()
        if r["strategy"] != "linear" or seed == given["seed"][0]
    ]
    yield "final", [point("final", r, common, holdout=False) for r in last]


def settings_of(grid: str, given: dict) -> list[dict]:
    """The points of a grid as settings; the seed varies slowest, so that the table of the first seed is whole first."""
    rows = []
    for block in GRIDS[grid]:
        axes = {**DEFAULTS, **block}
        axes |= {key: levels for key, levels in given.items() if isinstance(axes[key], tuple)}
        axes = {
            key: levels if isinstance(levels, tuple) else (levels,) for key, levels in axes.items()
        }
        rows += [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    return rows


def point(grid: str, settings: dict, common: Common, holdout: bool = True) -> Point:
    """A point's name says its grid and settings, and ends in a digest of all its flags: with other flags it is another point."""
    of_start = grid == "start"
    model = settings["architecture"]
    if model in RANDOM and not of_start:
        model = str(common.runs / start(model, common).name)
    lr = (
        LEARNING_RATES[settings["strategy"]]
        * settings["times"]
        * (STAND_IN if settings["architecture"] in RANDOM else 1)
    )
    flags = [*common.data, *(() if of_start else common.rest), *(["--holdout"] if holdout else [])]
    for key, value in {**settings, "architecture": model, "lr": f"{lr:.3g}"}.items():
        for v in value if isinstance(value, list) else [value]:
            flags += [] if key == "times" else [f"--{key}"] if v is True else [f"--{key}", str(v)]
    digest = hashlib.sha256(json.dumps(flags).replace(str(common.runs), "").encode()).hexdigest()[
        :6
    ]
    short = (
        settings["architecture"]
        if settings["architecture"] in SHAPES
        else Path(settings["architecture"]).name
    )
    words = [
        short,
        settings["strategy"],
        f"lr{lr:.3g}",
        *(
            f"{k}{'' if v is True else v}"
            for k, v in settings.items()
            if k not in (*DEFAULTS, "prompt_template", "chunk_size")
        ),
        f"s{settings['seed']}",
        digest,
    ]
    return Point(
        "-".join([grid, *words]).replace("/", "-").replace("_", ""), settings, tuple(flags)
    )


def start(architecture: str, common: Common) -> Point:
    """The stand-in for pretraining: a random model trained whole on the base classes, the images of val and test left out."""
    return point(
        "start",
        {
            "architecture": architecture,
            "strategy": "full",
            "times": 1.0,
            "classes": "base",
            "epochs": common.start_epochs,
            "seed": 0,
        },
        common,
    )


def choose(points: Sequence[Point], folder: Path) -> dict[tuple[str, str], dict]:
    """The settings of the best mean val/top1 over seeds, for each (architecture, strategy); a setting of which a seed is missing is not chosen."""
    scores: dict[tuple, list[float]] = {}
    for p in (p for p in points if p.settings.get("epochs") != 0):
        path = folder / p.name / "result.json"
        score = runs.read_metrics(path.parent, "val")["top1"] if path.exists() else math.nan
        scores.setdefault(
            (p.settings["architecture"], p.settings["strategy"], p.settings["times"]), []
        ).append(score)
    best: dict[tuple[str, str], tuple] = {}
    for key, values in scores.items():
        mean = sum(values) / len(values)
        if not math.isnan(mean) and mean > best.get(key[:2], (-1,))[0]:
            best[key[:2]] = mean, key
    return {
        pair: dict(zip(("architecture", "strategy", "times"), key))
        for pair, (_, key) in best.items()
    }


def train_arguments(p: Point, folder: Path) -> list[str]:
    return [*p.arguments, "--runs", str(folder), "--name", p.name]


def run(
    points: Sequence[Point], folder: Path, slots: Sequence[dict], environment: dict, wandb: str
) -> list[bool]:
    """Run the points, one in each slot at a time; whether each is finished. A point that another process holds is waited for."""
    queue, busy, ended = deque(points), {}, []

    def stop(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        while queue or busy:
            for slot in [i for i in range(len(slots)) if i not in busy]:
                held = 0
                while queue and slot not in busy and held <= len(queue):
                    p = queue.popleft()
                    state = launch(p, folder, os.environ | environment | slots[slot], wandb)
                    if state == "finished":
                        ended.append(True)
                    elif state == "held":
                        queue.append(p)
                        held += 1
                    else:
                        busy[slot] = p, state
            time.sleep(0.1)
            for slot, (p, process) in list(busy.items()):
                if process.poll() is not None:
                    del busy[slot]
                    ended.append(
                        process.returncode == 0 and (folder / p.name / "result.json").exists()
                    )
                    if not ended[-1]:
                        log = (folder / p.name / "log.txt").read_text(
                            errors="replace"
                        ).splitlines() or [""]
                        error = next(
                            (
                                line
                                for line in reversed(log)
                                if re.match(r"error: |\w+(Error|Exception)\b", line)
                            ),
                            log[-1],
                        )
                        files.append_line(
                            folder / "failed.jsonl",
                            {
                                "name": p.name,
                                "code": process.returncode,
                                "error": error,
                                "arguments": p.arguments,
                            },
                        )
                    print(
                        f"{'finished' if ended[-1] else 'FAILED'} {p.name} ({len(ended)} of {len(points)})"
                        + ("" if ended[-1] else f": {error}"),
                        flush=True,
                    )
    finally:
        for _, process in busy.values():
            process.terminate()
    return ended


def launch(p: Point, folder: Path, environment: dict, wandb: str) -> subprocess.Popen | str:
    """Start, or resume, a point: its process, or 'finished', or 'held' while a process of this or a killed ablate.py works on it.

    The lock is on the log that the process writes to: it inherits it, and holds it until its end, whatever becomes of its parent.
    """
    run_folder = folder / p.name
    run_folder.mkdir(parents=True, exist_ok=True)
    with (run_folder / "log.txt").open("ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "held"
        if (run_folder / "result.json").exists():
            runs.register(run_folder)
            return "finished"
        resume = (run_folder / "args.json").exists()
        script = [sys.executable, str(Path(__file__).resolve().parent / "train.py")]
        return subprocess.Popen(
            [
                *script,
                *(["--resume", str(run_folder)] if resume else train_arguments(p, folder)),
                "--wandb",
                wandb,
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )


def write_sweep(grid: str, common: Common, given: dict, arguments: list[str]) -> Path:
    """A sweep over the names of the grid's points: each agent calls this script for the next one. JSON, which is YAML too."""
    if grid in ("final", "study"):
        raise UserError(
            f"{grid} chooses its settings from results: sweep factorial, then run ablate.py {grid} where the runs are"
        )
    path = common.runs / f"{grid}.sweep.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(
        path,
        {
            "name": grid,
            "method": "grid",
            "metric": {"name": "val/top1", "goal": "maximize"},
            "program": "ablate.py",
            "parameters": {
                "only": {"values": [point(grid, r, common).name for r in settings_of(grid, given)]}
            },
            "command": [
                "${env}",
                "python",
                "${program}",
                *(a for a in arguments if a != "--sweep"),
                "${args}",
            ],
        },
    )
    return path


if __name__ == "__main__":
    main()
