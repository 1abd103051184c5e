"""Run the benchmarks one after the other and print one table of ratios.

The table is also written to benchmarks/results.md, with date, commit and machine.

    git worktree add ../older ad57c6d      # for what starting cost before
    make bench DATA_ROOT=data/flowers-102 BEFORE=../older      # 35 minutes on two idle cores
    python benchmarks/table.py --data_root sample --only pixels colour

Each row is measured in one run, the ways taking turns. The ratio is the median of the rounds, with
the least and the greatest. Starting is in processor seconds of whole processes.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import TABLE, line, machine

from flowers import UserError, command, files, runs

HERE = Path(__file__).resolve().parent
# script and settings of each benchmark; --rounds here where a round is long
BENCHMARKS = {
    "pixels": ["pixels.py"],
    "zeroshot": ["zeroshot.py", "--images", "64"],
    "step": ["step.py", "--batch_size", "32"],
    "sigmoid": ["step.py", "--batch_size", "16", "--loss", "sigmoid", "--rounds", "3"],
    "cross_entropy": ["step.py", "--batch_size", "16", "--loss", "cross_entropy", "--rounds", "3"],
    "epoch": ["step.py", "--architecture", "tiny", "--epoch_images", "512"],
    "strategies": ["strategies.py", "--images", "16", "--batch_size", "16"],
    "architectures": ["architectures.py"],
    "colour": ["colour.py"],
    "qwen": ["qwen.py"],
    "web": ["web.py"],
    "startup": ["startup.py", "--rounds", "1"],
}
# these compute on random numbers or on the drawn sample, and need no --data_root
WITHOUT_DATA = ("step", "sigmoid", "cross_entropy", "architectures", "qwen", "startup")


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data_root",
        default="sample",
        help="folder of the dataset, in torchvision's layout (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="alternating rounds of each (default: %(default)s)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(BENCHMARKS),
        help="benchmarks to run (default: all; startup with --before only)",
    )
    parser.add_argument(
        "--before",
        type=Path,
        metavar="CHECKOUT",
        help="another checkout of this repository, for startup",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=HERE / "results.md",
        help="file of the table (default: %(default)s)",
    )
    args = parser.parse_args()
    names = args.only or [name for name in BENCHMARKS if name != "startup" or args.before]
    if "startup" in names and args.before is None:
        raise UserError("startup compares two checkouts: give the other one with --before")

    with tempfile.TemporaryDirectory() as folder:
        # every benchmark runs in a process of its own and appends its rows here
        rows_file = Path(folder) / "rows.jsonl"
        for name in names:
            run_benchmark(name, args, rows_file)
        rows = files.read_lines(rows_file)

    # a row of JSON becomes a line of Markdown
    head = heading(args.rounds)
    text = "\n".join(["# Ratios", "", head, "", *TABLE, *map(line, rows), ""])
    # replaced as a whole: an interruption leaves the former table
    with files.atomic(args.output, "w") as out:
        out.write(text)
    print(text)


def run_benchmark(name: str, args: argparse.Namespace, rows_file: Path) -> None:
    """Run one benchmark, which appends its rows to the file. Raises UserError if it fails."""
    script, *arguments = BENCHMARKS[name]
    if name not in WITHOUT_DATA:
        arguments += ["--data_root", args.data_root]
    if name == "startup":
        arguments += ["--before", str(args.before)]
    if "--rounds" not in arguments:
        arguments += ["--rounds", str(args.rounds)]

    # standard output is for the table alone
    print("$ " + " ".join(["python", str(HERE / script), *arguments]), file=sys.stderr, flush=True)
    words = [sys.executable, str(HERE / script), *arguments, "--rows", str(rows_file)]
    ended = subprocess.run(words, stdout=sys.stderr)
    # a table that lacks rows is not written
    if ended.returncode != 0:
        raise UserError(f"the benchmark {name} failed; the table would be without it")


def heading(rounds: int) -> str:
    """What the ratios depend on, in a sentence."""
    environment = runs.environment()
    parts = [
        "`make bench DATA_ROOT=PATH`",
        time.strftime("%Y-%m-%d"),
        f"commit {environment['commit']}",
        machine(),
        f"{torch.get_num_threads()} threads",
        f"torch {environment['versions']['torch']}",
        "random weights",
        f"medians of {rounds} alternating rounds (losses: 3, CPU: 1).",
    ]
    return ", ".join(parts)


if __name__ == "__main__":
    main()
