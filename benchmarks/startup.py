"""What starting costs: processor seconds and memory of `--help` of every script, of exploration, of
training to its first step, and of the points of a grid.

    python benchmarks/startup.py --data_root sample                        # a quarter of an hour
    python benchmarks/startup.py --data_root sample --against ../older     # beside another checkout

All read caches that an uncounted run has filled. The first step is that of the tiny model. Grid:
ablate.py runs --points of `linear` and of `prompt` on the tiny model, an epoch each, one at a time.
The work itself is the same runs of train.py in one process, its imports taken off; their weights
and predictions must be the same bytes. Processor seconds are those of a process and of all that it
has started. Linux only.
"""

import argparse
import ctypes
import os
import resource
import shlex
import statistics
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
    parser.add_argument("--against", type=Path, help="another checkout, measured in turn")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument(
        "--points", type=int, default=15, help="of each strategy; 0: no grid (default: %(default)s)"
    )
    args = parser.parse_args()
    if sys.platform != "linux":
        raise UserError("the processes that a process has started are followed on Linux only")
    # What a process leaves running comes to us when it ends, and is counted.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    trees = [HERE] if args.against is None else [args.against.resolve(), HERE]

    print("| what | " + " | ".join(f"{tree.name}: CPU s, MB" for tree in trees) + " |")
    print("|---|" + "---|" * len(trees))
    with tempfile.TemporaryDirectory() as folder:
        for title, words in works(args.data_root, folder).items():
            # An older checkout may lack a script.
            having = [tree for tree in trees if words[0] == "-c" or (tree / words[0]).exists()]
            for tree in having:
                cost(tree, words)  # fills the caches
            # The checkouts take turns, as the machine may be busy with other work for a while.
            rounds = [[cost(tree, words) for tree in having] for _ in range(args.rounds)]
            costs_of = dict(zip(having, zip(*rounds)))
            cells = [median_cost(costs_of[tree]) if tree in having else "-" for tree in trees]
            print(f"| {title} | " + " | ".join(cells) + " |", flush=True)
    if args.points:
        for tree in trees:
            grid(tree, args.data_root, args.points)


def works(data_root: str, folder: str) -> dict[str, list[str]]:
    """What is measured beside a grid: the words after `python`, by title."""
    found = {f"`{script} --help`": [script, "--help"] for script in SCRIPTS}
    data = ["--data_root", data_root]
    for line in EXPLORATION:
        found[f"`{line}`"] = [*line.split(), *data, "--output", folder]
    tiny = ["--architecture", "tiny", "--wandb", "disabled", "--runs", folder]
    found["`train.py` to its first step"] = ["-c", TO_THE_FIRST_STEP, *data, *tiny]
    return found


def median_cost(costs: Sequence[tuple[float, float]]) -> str:
    """The median of CPU seconds, and the greatest memory (MB)."""
    seconds = statistics.median(seconds for seconds, _ in costs)
    return f"{seconds:.2f}, {max(memory for _, memory in costs):.0f}"


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


def grid(tree: Path, data_root: str, points: int) -> None:
    """Print the CPU seconds of a point of the grid, and those of the same work in one process."""
    with tempfile.TemporaryDirectory() as folder:
        # A grid of one point makes the stand-in for pretraining, and fills the caches.
        arguments = grid_arguments(data_root, folder)
        cost(tree, ["ablate.py", *arguments, "--seeds", "0"])
        seeds = [str(seed) for seed in range(1, points + 1)]
        by_ablate, _ = cost(tree, ["ablate.py", *arguments, "--seeds", *seeds])

        dry = ["ablate.py", *arguments, "--dry_run", "--seeds", *seeds]
        done = subprocess.run(
            [sys.executable, *dry],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        lines = [text for text in done.stdout.splitlines() if text.startswith("python train.py")]
        lines = [text for text in lines if "--name strategy" in text]
        again = "".join(
            text.removeprefix("python train.py").replace("--name strategy", "--name again")
            + " --wandb disabled\n"
            for text in lines
        )
        work, _ = cost(tree, ["-c", IN_ONE_PROCESS], again)
        check_same(Path(folder))
        imports, _ = cost(tree, ["-c", "import train"])
    work -= imports
    n = len(lines)
    print(
        f"{tree.name}: {n} points, CPU s a point: {by_ablate / n:.2f} by ablate.py, {work / n:.2f} "
        f"the work itself, {(by_ablate - work) / n:.2f} over it"
    )


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
    data = data_root if data_root == "sample" else str(Path(data_root).resolve())
    return [
        *("strategy", "--strategy", "linear", "prompt", "--architecture", "tiny"),
        *("--start_epochs", "1", "--epochs", "1", "--batch_size", "64"),
        *("--jobs", "1", "--gpus", "0", "--data_root", data),
        *("--runs", folder, "--wandb", "disabled"),
    ]


if __name__ == "__main__":
    main()
