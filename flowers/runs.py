"""The run folder: what a run was asked to do, how it went and what came out, for other scripts.

runs/<name>/args.json        the command line, versions, device, split sizes
runs/<name>/metrics.jsonl    one line a step or evaluation
runs/<name>/checkpoint.pt    to resume from
runs/<name>/model.pt         a state dict that clip.load opens
runs/<name>/predictions.csv  file, label, five best names with their probabilities
runs/<name>/report.csv       precision, recall, F1 of each class
runs/<name>/result.json      all results, flat; the same line is appended to runs/results.jsonl
"""

import argparse
import importlib.metadata
import os
import platform
import subprocess
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from flowers import UserError, reason
from flowers.files import append_line, checked, read_json, read_lines, user_path, write_json


def add_run_arguments(
    parser: argparse.ArgumentParser, resume: bool = False, compare: bool = False
) -> None:
    """Add the flags of every script that leaves a run behind; --resume and --compare on request."""
    parser.add_argument(
        "--runs", type=user_path, default="runs", help="folder of the runs (default: %(default)s)"
    )
    parser.add_argument("--name", help="name of this run (default: model and time)")
    if resume:
        parser.add_argument(
            "--resume",
            type=user_path,
            metavar="RUN",
            help="go on with the run in this folder, with its own arguments",
        )
    if compare:
        parser.add_argument(
            "--compare",
            type=user_path,
            action="append",
            default=[],
            metavar="RUN",
            help="show an earlier run's results beside these; repeatable",
        )
    parser.add_argument(
        "--wandb",
        choices=["auto", "online", "offline", "disabled"],
        default="auto",
        help="auto: as WANDB_MODE says, else online if logged in, else offline "
        "(default: %(default)s)",
    )


# -----------------------------------------------------------------------------
# the start of a run


def new_run(
    runs: str | Path, name: str | None, config: dict, splits: dict[str, np.ndarray]
) -> Path:
    """Make the folder runs/<name>/ with its args.json, and return it.

    config: at least `job` and `architecture`. Without a name, the run is named after its model,
    its job and the time. An evaluation that was killed is started anew; other runs are resumed
    with --resume. Raises UserError if the name is taken.
    """
    name = name or _default_name(config)
    folder = Path(runs) / name
    if _is_taken(folder, config["job"]):
        advice = "choose another --name"
        if config["job"] != "eval":
            advice += f", or go on with --resume {folder}"
        raise UserError(f"{folder} is a run already: {advice}")

    split_sizes = {split: len(index) for split, index in splits.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "args.json",
        {
            **config,
            "name": name,
            "split_sizes": split_sizes,
            **environment(config.get("device")),
        },
    )
    return folder


def _default_name(config: dict) -> str:
    """Model, job, time and process, such as ViT-B-32-train-20250131-120000-4711."""
    model = config["architecture"]  # a path, or a name such as ViT-L/14@336px
    path = Path(model)
    if path.exists():
        # A run folder, or model.pt in one, stands for the run.
        model = path.parent.name if path.name == "model.pt" else path.name
    else:
        model = str(path).replace("/", "-")
    now = time.strftime("%Y%m%d-%H%M%S")
    # Two runs may start in the same second.
    return f"{model}-{config['job']}-{now}-{os.getpid()}"


def _is_taken(folder: Path, job: str) -> bool:
    """Whether a new run would overwrite one that is finished or can be resumed."""
    if (folder / "result.json").exists():
        # A kill may have come between the result and its line in results.jsonl.
        register(folder)
        return True
    args_file = folder / "args.json"
    if not args_file.exists():
        return False
    # An evaluation keeps nothing on the way, so one without a result may be started anew. Its
    # arguments are compared as bytes, since the file may be damaged.
    was_evaluation = b'"job": "eval"' in args_file.read_bytes()
    return not (job == "eval" and was_evaluation)


def environment(device: str | None = None) -> dict:
    """What a result may depend on besides the arguments: commit, versions and device."""
    # Here, as reading the folders of runs needs no torch.
    import torch

    from flowers import devices

    try:
        describe = ["git", "describe", "--always", "--dirty"]
        here = Path(__file__).parent
        commit = subprocess.run(describe, capture_output=True, text=True, cwd=here).stdout.strip()
    except OSError:  # git is not installed
        commit = ""
    packages = ("torchvision", "clip-anytorch", "numpy", "scikit-learn")
    versions = {package: importlib.metadata.version(package) for package in packages}
    # The version in the metadata may leave out the build (+cpu, +cu130).
    versions["torch"] = torch.__version__
    return {
        "commit": commit,
        "python": platform.python_version(),
        "versions": versions,
        "device": devices.describe(device),
    }


# -----------------------------------------------------------------------------
# resuming a run


def arguments_to_resume(folder: Path, job: str) -> dict | None:
    """Read the arguments of a run to resume, or print that it is finished and return None.

    Raises UserError if there is no run in the folder, or one of another job.
    """
    try:
        stored = checked(read_json(folder / "args.json"))
    except FileNotFoundError:
        raise UserError(f"nothing to resume in {folder}: there is no args.json") from None
    except ValueError:
        raise UserError(f"nothing to resume in {folder}: its args.json is damaged") from None
    if stored.get("job") != job:
        raise UserError(f"nothing to resume in {folder}: it is a run of another script")
    if (folder / "result.json").exists():
        register(folder)
        print(f"{folder} is finished: nothing to do")
        return None

    # These belong to the command that resumes, not to the run.
    for flag in ("resume", "wandb", "compare", "device"):
        stored.pop(flag, None)
    # The folder may have been moved since.
    stored["runs"] = str(folder.parent)
    return stored


def as_flags(stored: dict) -> list[str]:
    """The command line that gives these arguments: a stored file is checked as a user's words are.

    A list of texts becomes a repeated flag; None and False are left out.
    """
    flags = []
    for key, value in stored.items():
        if value is None or value is False:
            continue
        if value is True:
            flags.append(f"--{key}")
        elif _is_list_of_texts(value):
            flags.extend(f"--{key}={text}" for text in value)
        else:
            flags.append(f"--{key}={value}")
    return flags


def _is_list_of_texts(value) -> bool:
    return isinstance(value, list) and value != [] and all(type(item) is str for item in value)


# -----------------------------------------------------------------------------
# the end of a run


def finish(folder: Path, result: dict) -> None:
    """Write result.json, and append its line to results.jsonl beside the run folders, once."""
    write_json(folder / "result.json", result)
    register(folder)


def register(folder: Path) -> None:
    """Make sure that a finished run has its line in results.jsonl.

    Raises UserError if its result.json is damaged.
    """
    results_file = folder.parent / "results.jsonl"
    try:
        result = read_json(folder / "result.json")
    except ValueError as error:
        raise UserError(
            f"{folder / 'result.json'} is damaged ({error}): "
            f"remove it, and go on with --resume {folder}"
        ) from None
    registered = {row.get("name") for row in read_lines(results_file)}
    if result.get("name") not in registered:
        append_line(results_file, result)


# -----------------------------------------------------------------------------
# reading what a run has left


def read_metrics(run: str | Path, split: str) -> dict:
    """The metrics of a finished run on a split, under their names without the split: top1, ...

    Raises UserError if the run has no result, or none on this split.
    """
    path = Path(run) / "result.json"
    try:
        result = checked(read_json(path))
    except (OSError, ValueError) as error:
        raise UserError(f"there is no whole {path} ({error})") from None
    prefix = f"{split}/"
    metrics = {
        key.removeprefix(prefix): value for key, value in result.items() if key.startswith(prefix)
    }
    if "top1" not in metrics:
        raise UserError(f"{run} was not evaluated on the {split} images")
    return metrics


def read_predictions(folder: Path) -> pd.DataFrame:
    """Read predictions.csv of a run, a row an image: file, label, top1 ... top5, score1 ... score5.

    All columns are text; a name or score that a row lacks is empty. Raises OSError if there is
    no such file, ValueError if it is damaged, lists an image twice or none at all.
    """
    try:
        with warnings.catch_warnings():
            # A row with a field too many is damage: pandas would drop the field, or shift the row.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(
                folder / "predictions.csv", dtype=str, keep_default_na=False, index_col=False
            )
    except (ValueError, pd.errors.ParserWarning) as error:  # pandas' errors are ValueErrors
        raise ValueError(f"predictions.csv is damaged ({reason(error)})") from None
    required = ["file", "label", "top1"]
    if not set(required) <= set(table.columns):
        raise ValueError("predictions.csv is damaged (it lacks columns)")
    incomplete = (table[required] == "").any(axis=None)
    if table.empty or incomplete or table["file"].duplicated().any():
        raise ValueError("predictions.csv lacks answers, or lists an image twice")
    return table
