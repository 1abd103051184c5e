"""What starting costs: processor seconds and memory of `--help` of every script, of exploration, of
training to its first step, and of the points of a grid.

    git worktree add ../older ad57c6d
    python benchmarks/startup.py --before ../older      # a quarter of an hour

All read caches that an uncounted run has filled. The first step is that of the tiny model. Grid:
ablate.py runs --points of `linear` and of `prompt` on the tiny model, an epoch each, one at a time.
The work itself is what the same runs of train.py take in one process, but for the first of each
strategy, which loads what all need. Weights and predictions must be the same bytes. Processor
seconds are those of a process and of all that it has started, the megabytes its own peak. On Linux.

Limits: --help costs at least an empty Python process, exploration the import of matplotlib, a step
that of torch, and a point of the grid the work itself.
"""

import argparse
import ctypes
import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flowers import UserError, command

HERE = Path(__file__).resolve().parent.parent
SCRIPTS = (
    "train.py",
    "baseline_eval.py",
    "predict.py",
    "test_models.py",
    "qwen_eval.py",
    "qwen_train.py",
    "qwen_probe.py",
    "ablate.py",
    "report.py",
    "data_Exploration/dataset_Description.py",
    "data_Exploration/class_distribution.py",
    "data_Exploration/isomap.py",
)
EXPLORATION = (
    "data_Exploration/dataset_Description.py",
    "data_Exploration/class_distribution.py --all",
    "data_Exploration/isomap.py",
)
EMPTY = ("pass", "an empty Python process")
MATPLOTLIB = ("import matplotlib.pyplot", "importing matplotlib")
TORCH = ("import torch", "importing torch")
WORK_POINTS = 5  # of each strategy, of which the work itself is measured
PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
# Run in one process: arguments of train.py, a line each, from standard input.
IN_ONE_PROCESS = """
import runpy, shlex, sys
for line in sys.stdin:
    sys.argv = ["train.py", *shlex.split(line)]
    runpy.run_path("train.py", run_name="__main__")
"""
# train.py until its optimiser is to take the first step; arguments are those of train.py.
TO_THE_FIRST_STEP = """
import runpy, sys
import torch
torch.optim.AdamW.step = lambda *_, **__: sys.exit()
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_root", default="sample", help="(default: %(default)s)")
    parser.add_argument(
        "--before",
        type=Path,
        metavar="CHECKOUT",
        required=True,
        help="another checkout, which takes turns with this one",
    )
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument(
        "--points", type=int, default=15, help="of each strategy; 0: no grid (default: %(default)s)"
    )
    parser.add_argument("--rows", type=Path, metavar="FILE", help="also append the rows to it")
    args = parser.parse_args()
    if sys.platform != "linux":
        raise UserError("the processes that a process has started are followed on Linux only")
    # What a process leaves running comes to us when it ends, and is counted.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = args.before.resolve()
    # Each process runs in the folder of its checkout.
    is_path = args.data_root != "sample"
    data_root = str(Path(args.data_root).resolve()) if is_path else "sample"

    limits = {}  # seconds, by the limit
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for title, words, limit in works(data_root, folder):
            if limit not in limits:
                limits[limit] = min(cost(HERE, ["-c", limit[0]])[0] for _ in range(3))
            # An older checkout may lack a script.
            if words[0] == "-c" or (before / words[0]).exists():
                spent = alternate_trees([before, HERE], words, args.rounds)
            else:
                spent = {limit[1]: [limits[limit]] * args.rounds}
                spent |= alternate_trees([HERE], words, args.rounds)
            print(title, spent, flush=True)
            rows.append((f"CPU of {title}", spent, limits[limit], limit[1]))
    if args.points:
        rows += grid_rows(before, data_root, args.points, limits[EMPTY])

    # Late: it imports torch, and the memory of a process counts as that of those that it starts.
    from measure import report

    for what, spent, limit_s, limit_is in rows:
        report(args.rows, what, spent, limit_s, limit_is)


def works(data_root: str, folder: str) -> list[tuple[str, list[str], tuple[str, str]]]:
    """What is measured beside a grid: title, the words after `python`, and the limit."""
    found = [(f"`{script} --help`", [script, "--help"], EMPTY) for script in SCRIPTS]
    data = ["--data_root", data_root]
    for line in EXPLORATION:
        found.append((f"`{line}`", [*line.split(), *data, "--output", folder], MATPLOTLIB))
    tiny = ["--architecture", "tiny", "--wandb", "disabled", "--runs", folder]
    found.append(("`train.py` to its first step", ["-c", TO_THE_FIRST_STEP, *data, *tiny], TORCH))
    return found


def alternate_trees(trees: Sequence[Path], words: list[str], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of `python words` in each checkout, one a round, by its name and memory."""
    for tree in trees:
        cost(tree, words)  # fills the caches
    # The checkouts take turns, as the machine may be busy with other work for a while.
    costs = [[cost(tree, words) for tree in trees] for _ in range(rounds)]
    spent = {}
    for tree, of_tree in zip(trees, zip(*costs)):
        memory = max(megabytes for _, megabytes in of_tree)
        spent[f"{name_of(tree)}, {memory:,.0f} MB"] = [seconds for seconds, _ in of_tree]
    return spent


def name_of(tree: Path) -> str:
    """`now`, or the commit of another checkout."""
    if tree == HERE:
        return "now"
    words = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(words, capture_output=True, text=True)
    return f"commit {done.stdout.strip()}" if done.returncode == 0 else tree.name


def cost(tree: Path, words: list[str], text: str = "") -> tuple[float, float]:
    """CPU seconds of `python words` with all that it starts, and its own peak memory in MB."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        [sys.executable, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
        text=True,
    )
    process.stdin.write(text)
    process.stdin.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise UserError(f"python {shlex.join(words)} failed in {tree}")
    wait_for_the_rest()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, usage.ru_maxrss / 1000


def wait_for_the_rest() -> None:
    """Wait for what a process has left to us."""
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def grid_rows(before: Path, data_root: str, points: int, empty_s: float) -> list[tuple]:
    """The rows of a point of the grid: all of it, and what comes over the work itself."""
    name = name_of(before)
    theirs, their_work = grid(before, data_root, points)
    ours, our_work = grid(HERE, data_root, points)
    what = f"CPU of a point of ablate.py, {2 * points} points of linear and prompt, tiny"
    over = {name: [theirs - their_work], "now": [ours - our_work]}
    return [
        (what, {name: [theirs], "now": [ours]}, our_work, "the work itself, in one process"),
        (f"{what}, over the work itself", over, empty_s, EMPTY[1]),
    ]


def grid(tree: Path, data_root: str, points: int) -> tuple[float, float]:
    """CPU seconds of a point of the grid, and of the work itself."""
    with tempfile.TemporaryDirectory() as folder:
        # A grid of one point makes the stand-in for pretraining, and fills the caches.
        arguments = grid_arguments(data_root, folder)
        cost(tree, ["ablate.py", *arguments, "--seeds", "0"])
        seeds = [str(seed) for seed in range(1, points + 1)]
        by_ablate, _ = cost(tree, ["ablate.py", *arguments, "--seeds", *seeds])

        # The first points again in one process, and a few more in another: both import, and do what
        # is done once, such as loading the optimiser.
        few = commands_of(tree, [*arguments, "--seeds", *seeds[:1]])
        more = commands_of(tree, [*arguments, "--seeds", *seeds[1:WORK_POINTS]])
        few_s, _ = cost(tree, ["-c", IN_ONE_PROCESS], "".join(few))
        more_s, _ = cost(tree, ["-c", IN_ONE_PROCESS], "".join(more))
        check_same(Path(folder))
    return by_ablate / (2 * points), (more_s - few_s) / (len(more) - len(few))


def commands_of(tree: Path, arguments: Sequence[str]) -> list[str]:
    """The arguments of train.py for each point of the grid, a line each, under another name."""
    done = subprocess.run(
        [sys.executable, "ablate.py", *arguments, "--dry_run"],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    lines = [text for text in done.stdout.splitlines() if text.startswith("python train.py")]
    return [
        text.removeprefix("python train.py").replace("--name strategy", "--name again")
        + " --wandb disabled\n"
        for text in lines
        # Those of seed 0 have run, and some points have no other seed.
        if "--name strategy" in text and not re.search(r"--name \S+-s0-", text)
    ]


def check_same(folder: Path) -> None:
    """Raise UserError if a point of ablate.py has other results than the same run of train.py."""
    for run in folder.glob("again-*"):
        point = folder / run.name.replace("again", "strategy", 1)
        for name in ("model.pt", "predictions.csv"):
            if (run / name).read_bytes() != (point / name).read_bytes():
                raise UserError(f"{point / name} differs from that of the same run of train.py")


def grid_arguments(data_root: str, folder: str) -> list[str]:
    """The arguments of ablate.py but its seeds."""
    # One process at a time with one thread, as the environment says: --jobs alone would share out
    # all cores, and two at a time slow each other down.
    return [
        *("strategy", "--strategy", "linear", "prompt", "--architecture", "tiny"),
        *("--start_epochs", "1", "--epochs", "1", "--batch_size", "64"),
        *("--jobs", "1", "--gpus", "0", "--data_root", data_root),
        *("--runs", folder, "--wandb", "disabled"),
    ]


if __name__ == "__main__":
    main()
