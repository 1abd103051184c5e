"""The run folder: what a run was asked to do, how it went and what it found, in files that every other script reads.

runs/<name>/args.json        the command line, versions, device, split sizes
runs/<name>/metrics.jsonl    one line a step or evaluation
runs/<name>/checkpoint.pt    to resume from
runs/<name>/model.pt         a state dict that clip.load opens
runs/<name>/predictions.csv  file, label, five best names with their probabilities
runs/<name>/report.csv       precision, recall, F1 of each class
runs/<name>/result.json      all results, flat; the same line is appended to runs/results.jsonl
"""

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from flowers import UserError, reason
from flowers.files import append_line, checked, read_json, read_lines, write_json


def add_run_arguments(parser, resume: bool = False, compare: bool = False) -> None:
    """The flags of every script that leaves a run behind; with `resume` and `compare`, those of scripts that can do these."""
    parser.add_argument("--runs", default="runs", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--name", help="name of this run (default: model and time)")
    if resume:
        parser.add_argument(
            "--resume",
            metavar="RUN",
            help="go on with the run in this folder, with its own arguments",
        )
    if compare:
        parser.add_argument(
            "--compare",
            action="append",
            default=[],
            metavar="RUN",
            help="show an earlier run's results beside these; repeatable",
        )
    parser.add_argument(
        "--wandb",
        choices=["auto", "online", "offline", "disabled"],
        default="auto",
        help="auto: online if logged in, else offline (default: %(default)s)",
    )


def new_run(
    runs: str | Path, name: str | None, config: dict, splits: dict[str, np.ndarray]
) -> Path:
    """Make runs/<name>/ with args.json; without a name, one from the architecture and the time. Raises UserError if it is taken.

    An evaluation that was killed is begun anew; other runs are gone on with by --resume.
    """
    path = Path(config["architecture"])  # a path, or a name such as ViT-L/14@336px
    model = (
        (path.parent if path.name == "model.pt" else path).name
        if path.exists()
        else str(path).replace("/", "-")
    )
    name = name or f"{model}-{config['job']}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder = Path(runs) / name
    if (folder / "result.json").exists():
        register(folder)  # a kill may have come before
    elif (
        not (folder / "args.json").exists()
        or config["job"] == "eval"
        and b'"job": "eval"' in (folder / "args.json").read_bytes()
    ):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(
            folder / "args.json",
            {
                **config,
                "name": name,
                "split_sizes": {k: len(v) for k, v in splits.items()},
                **environment(),
            },
        )
        return folder
    again = "" if config["job"] == "eval" else f", or go on with --resume {folder}"
    raise UserError(f"{folder} is a run already: choose another --name{again}")


def arguments_to_resume(folder: Path, job: str) -> dict | None:
    """The arguments of a run to go on with, or None, saying so, if it is finished. Raises UserError if there is no run, or one of another job."""
    try:
        stored = checked(read_json(folder / "args.json"))
    except FileNotFoundError:
        raise UserError(f"nothing to resume in {folder}: there is no args.json") from None
    except ValueError:
        raise UserError(f"nothing to resume in {folder}: its args.json is damaged") from None
    if stored.get("job") != job:
        raise UserError(f"nothing to resume in {folder}: it is a run of another script")
    if not (folder / "result.json").exists():
        return {k: v for k, v in stored.items() if k not in ("resume", "wandb", "compare")} | {
            "runs": str(folder.parent)
        }
    register(folder)
    print(f"{folder} is finished: nothing to do")
    return None


def as_flags(stored: dict) -> list[str]:
    """The command line that says the same, so that what a file holds is checked as what a user types. A list of texts is a flag given so often."""
    return [
        flag
        for key, value in stored.items()
        if value is not None and value is not False
        for flag in (
            [f"--{key}"]
            if value is True
            else [f"--{key}={v}" for v in value]
            if isinstance(value, list) and {*map(type, value)} == {str}
            else [f"--{key}={value}"]
        )
    ]


def read_metrics(run: str | Path, split: str) -> dict:
    """The metrics of a finished run on a split, without its name before each. Raises UserError if there are none."""
    try:
        found = {
            k.split("/", 1)[1]: v
            for k, v in checked(read_json(Path(run) / "result.json")).items()
            if k.startswith(split + "/")
        }
    except (OSError, ValueError) as error:
        raise UserError(f"there is no whole {Path(run) / 'result.json'} ({error})") from None
    if "top1" not in found:
        raise UserError(f"{run} was not evaluated on the {split} images")
    return found


def environment() -> dict:
    """What a result may depend on besides the arguments: commit, versions, device."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    except OSError:
        commit = ""
    versions = {
        p: importlib.metadata.version(p)
        for p in ("torchvision", "clip-anytorch", "numpy", "scikit-learn")
    }
    versions["torch"] = (
        torch.__version__
    )  # its build too (+cpu, +cu130), which the package's own version may leave out
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"cpu, {torch.get_num_threads()} threads"
    )
    return {
        "commit": commit,
        "python": platform.python_version(),
        "versions": versions,
        "device": device,
    }


def finish(folder: Path, result: dict) -> None:
    """Write result.json and append its line to results.jsonl beside the run folders, once."""
    write_json(folder / "result.json", result)
    register(folder)


def register(folder: Path) -> None:
    """Make sure that a finished run has its line in results.jsonl."""
    try:
        result, table = read_json(folder / "result.json"), folder.parent / "results.jsonl"
    except ValueError as error:
        raise UserError(
            f"{folder / 'result.json'} is damaged ({error}): remove it, and go on with --resume {folder}"
        ) from None
    if not any(row.get("name") == result.get("name") for row in read_lines(table)):
        append_line(table, result)


def read_predictions(folder: Path) -> pd.DataFrame:
    """predictions.csv of a run, a row an image: file, label, top1 ... top5, score1 ... score5.

    All columns are text; a name or score that a row lacks is empty. Raises OSError if there is
    no such file, ValueError if it is damaged, lists an image twice or none at all.
    """
    try:
        table = pd.read_csv(folder / "predictions.csv", dtype=str, keep_default_na=False)
    except ValueError as error:  # pandas' own errors are ValueErrors
        raise ValueError(f"predictions.csv is damaged ({reason(error)})") from None
    needed = ["file", "label", "top1"]
    if not set(needed) <= set(table.columns):
        raise ValueError("predictions.csv is damaged (it lacks columns)")
    if table.empty or (table[needed] == "").any(axis=None) or table["file"].duplicated().any():
        raise ValueError("predictions.csv lacks answers, or lists an image twice")
    return table
