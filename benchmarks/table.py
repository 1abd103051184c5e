"""Run the benchmarks one after the other and print one table of ratios; it is also written to benchmarks/results.md, with date, commit and machine.

    make bench DATA_ROOT=data/flowers-102      # half an hour on two cores that do nothing else
    python benchmarks/table.py --data_root sample --only pixels colour

Each row is measured in one run, the ways taking turns; the ratio is the median of the rounds, with the least and the greatest.
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
DATA = "--data_root"
BENCHMARKS = {
    "pixels": ["pixels.py", DATA],
    "zeroshot": ["zeroshot.py", "--images", "64", DATA],
    "step": ["step.py", "--batch_size", "32"],
    "epoch": ["step.py", "--architecture", "tiny", "--epoch_images", "1024", DATA],
    "strategies": ["strategies.py", "--images", "32", "--batch_size", "32", DATA],
    "architectures": ["architectures.py"],
    "colour": ["colour.py", DATA],
    "qwen": ["qwen.py"],
    "web": ["web.py", DATA],
}


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        DATA,
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
        default=list(BENCHMARKS),
        help="(default: all)",
    )
    parser.add_argument(
        "--output", type=Path, default=HERE / "results.md", help="(default: %(default)s)"
    )
    args = parser.parse_args()
    here = machine()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        for name in args.only:
            words = BENCHMARKS[name]
            command = [
                sys.executable,
                str(HERE / words[0]),
                *words[1:],
                *([args.data_root] if words[-1] == DATA else []),
                "--rounds",
                str(args.rounds),
                "--rows",
                str(file),
            ]
            print("$ " + " ".join(["python", *command[1:-2]]), file=sys.stderr, flush=True)
            if subprocess.run(command, stdout=sys.stderr).returncode:
                raise UserError(f"the benchmark {name} failed; the table would be without it")
        rows = files.read_lines(file)
    environment = runs.environment()
    head = (
        f"`make bench DATA_ROOT=PATH`, {time.strftime('%Y-%m-%d')}, commit {environment['commit']}, {here}, {torch.get_num_threads()} threads, "
        f"torch {environment['versions']['torch']}, random weights, medians of {args.rounds} alternating rounds."
    )
    text = "\n".join(["# Ratios", "", head, "", *TABLE, *map(line, rows), ""])
    with files.atomic(args.output, "w") as out:
        out.write(text)
    print(text)


if __name__ == "__main__":
    main()
