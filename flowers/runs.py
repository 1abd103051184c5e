"""The run folder: what a run was asked to do, how it went and what came out, for other scripts.

runs/<name>/args.json        the command line, versions, device, split sizes
runs/<name>/trained_on.json  which images it was trained on, those of its start included
runs/<name>/class_names.json the names of the classes, in the order of their labels
runs/<name>/metrics.jsonl    one line a step or evaluation
runs/<name>/checkpoint.pt    to resume from
runs/<name>/model.pt         a state dict that clip.load opens
runs/<name>/classifier.pt    a learned prompt or linear head, with model.pt
runs/<name>/predictions.csv  file, label, five best names with their probabilities
runs/<name>/calibration.json the temperature of least NLL on val, with --holdout
runs/<name>/duplicates.json  groups of near-duplicates among the evaluated images
runs/<name>/report.csv       precision, recall, F1 of each class
runs/<name>/result.json      all results, flat; the same line is appended to runs/results.jsonl
runs/<name>/wandb_id.txt     the id of the run in W&B
runs/<name>/*.png            its figures

An evaluation leaves no model, unless it is that of a soup: then it has model.pt, class_names.json
and trained_on.json, too.
"""

import argparse
import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flowers import UserError, reason, typed_flags
from flowers.choices import KEEPS_WEIGHTS, RANDOM, SHAPES, split_tag
from flowers.data import OXFORD_ID, Flowers, image_ids, open_from_flags, select, subset
from flowers.files import (
    append_line,
    checked,
    note,
    read_json,
    read_lines,
    say,
    user_path,
    write_json,
)
from flowers.layouts import correct_name

if TYPE_CHECKING:
    import pandas as pd

# An evaluation takes these flags over from the run that it evaluates: with other splits it would
# test on training images, and with other names or prompts it would measure something else.
INHERITED = (
    "data_root",
    "splits_path",
    "splits_base",
    "splits",
    "holdout",
    "class_names",
    "prompt_template",
    "prompts",
)

# The job in merged/ of a run of qwen_train.py: a model that a run made, and no run to resume.
MERGED = "qwen_merged"

SOUP = " soup"  # behind the strategy of the runs of which a model is the mean


# What a command that resumes a run may say anew.
OF_THE_COMMAND = (
    "resume",
    "wandb",
    "compare",
    "device",
    "allow_overlap",
    "no_cuda_graph",
    "merge",
)


class UnknownImages(UserError):
    """It can't be known which images a run was trained on."""


def add_overlap_argument(parser: argparse.ArgumentParser) -> None:
    """Add --allow_overlap, for the scripts that evaluate."""
    parser.add_argument(
        "--allow_overlap",
        action="store_true",
        help="evaluate images that the model was trained on, too, and say so in table, result and "
        "report (default: refuse)",
    )


def add_run_arguments(
    parser: argparse.ArgumentParser, resume: bool = False, compare: bool = False
) -> None:
    """Add the flags of every script that leaves a run behind; --resume and --compare on request."""
    parser.add_argument(
        "--runs", type=user_path, default="runs", help="folder of the runs (default: %(default)s)"
    )
    parser.add_argument("--name", type=_run_name, help="name of this run (default: model and time)")
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


def _run_name(text: str) -> str:
    # In another folder than the others it would be missing in the report and the page.
    is_place = "/" in text or "\\" in text or text in (".", "..")
    if is_place or not text.isprintable():
        raise argparse.ArgumentTypeError(
            f"{text!r} is no name of a folder in that of --runs: it may have no slash"
        )
    return text


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
    was_there = os.path.lexists(folder)
    if was_there and not folder.is_dir():
        raise UserError(f"{folder} is no folder: choose another --name")
    _refuse_leftovers(folder)
    if _is_taken(folder, config["job"]):
        advice = "choose another --name"
        if config["job"] not in ("eval", "qwen_probe"):
            advice += f", or go on with --resume {folder}"
        raise UserError(f"{folder} is a run already: {advice}")

    # What a killed evaluation of a soup left would be taken for the model of this one.
    if (folder / "args.json").exists():
        for left in ("model.pt", "trained_on.json"):
            (folder / left).unlink(missing_ok=True)

    # The sizes tell later whether the dataset is still the same: see _train_index.
    split_sizes = {split: len(index) for split, index in splits.items()}
    try:
        # Of two processes that begin a run of one name at once, one makes it.
        folder.mkdir(parents=True, exist_ok=was_there)
    except FileExistsError:
        raise UserError(
            f"{folder} was made by another process just now: choose another --name"
        ) from None
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
        # A run folder, or a model in one, stands for the run.
        model = path.parent.name if path.name in ("model.pt", "merged") else path.name
    else:
        model = re.sub(r"[/\\:]", "-", str(path))
    now = time.strftime("%Y%m%d-%H%M%S")
    # Two runs may start in the same second.
    return f"{model}-{config['job']}-{now}-{os.getpid()}"


def _refuse_leftovers(folder: Path) -> None:
    """Raise UserError if a folder without settings holds parts of a run, or somebody's weights.

    They would be taken for those of a new run, whose training images would not be recorded.
    """
    if (folder / "args.json").exists():
        return
    for left in ("model.pt", "classifier.pt", "trained_on.json", "checkpoint.pt"):
        if (folder / left).exists():
            raise UserError(f"{folder} holds the {left} of something else: choose another --name")


def _is_taken(folder: Path, job: str) -> bool:
    """Whether a new run would overwrite one that is finished or can be resumed."""
    if (folder / "result.json").exists():
        # A kill may have come between the result and its line in results.jsonl.
        register(folder)
        return True
    args_file = folder / "args.json"
    if not args_file.exists():
        return False
    # The arguments are compared as bytes, since the file may be damaged.
    is_same_job = f'"job": "{job}"'.encode() in args_file.read_bytes()
    if job == "qwen_eval" and is_same_job:
        # It goes on from its answers; without any there is nothing to go on from.
        return any(read_lines(folder / name) for name in ("answers.jsonl", "descriptions.jsonl"))
    # These keep nothing on the way, so one without a result may be started anew.
    return not (job in ("eval", "qwen_probe") and is_same_job)


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
    # The checkpoint of another script holds other weights and other progress.
    if stored.get("job") != job:
        raise UserError(f"nothing to resume in {folder}: it is a run of another script")
    if (folder / "result.json").exists():
        # A kill may have come before its line was in results.jsonl.
        register(folder)
        print(f"{folder} is finished: nothing to do")
        return None

    # These belong to the command that resumes, not to the run.
    for flag in ("resume", "wandb", "compare", "device"):
        stored.pop(flag, None)
    # The folder may have been moved since, or renamed.
    stored.pop("name", None)
    stored["runs"] = str(folder.parent)
    return stored


def check_typed(
    parser: argparse.ArgumentParser, args: argparse.Namespace, unused: Collection[str] = ()
) -> None:
    """Raise UserError for a flag beside --resume that says something else than the run's own.

    args: of the run that is resumed. It would have no effect: the run goes on with what it began.
    unused: flags that this run has no use for, whatever they say.
    """
    folder = Path(args.resume).resolve()
    own_values = vars(args) | {"name": folder.name, "runs": str(folder.parent)}
    for key, value in typed_flags(parser).items():
        own = own_values[key]
        # What the machine decides is the run's own by now.
        if key in OF_THE_COMMAND or key in unused or value in (own, "auto"):
            continue
        # The same place may be written in several ways; of other values this is no place.
        if own is not None and Path(str(value)).resolve() == Path(str(own)).resolve():
            continue
        raise UserError(
            f"--{key}: {args.resume} goes on with what it was begun with, {own}, and not with "
            f"{value}: leave it out, or begin another run"
        )


def check_same_images(
    folder: Path, splits: Mapping[str, np.ndarray], trained_on: Iterable[str] = ()
) -> None:
    """Raise UserError if a run that is resumed would go on with other images than it began with.

    splits: of the dataset as it is now, as `new_run` was given them. trained_on: the ids of the
    training images, which must be in the run's own list.
    """
    recorded = read_arguments(folder).get("split_sizes")
    sizes = recorded if isinstance(recorded, dict) else {}
    same = all(sizes.get(split, len(index)) == len(index) for split, index in splits.items())
    try:
        own = set(read_json(folder / "trained_on.json")["images"])
    except (OSError, ValueError, KeyError, TypeError):
        own = set(trained_on)  # of an older run; a damaged list is refused where it is needed
    if not (same and own.issuperset(trained_on)):
        raise UserError(
            f"the dataset has changed since {folder} was begun: its splits have other images. Go "
            "on with those that it had, or begin another run"
        )


def check_processes(folder: Path, begun_with: int | None, processes: int) -> None:
    """Raise UserError if a run is to go on with another number of processes."""
    if begun_with != processes:
        raise UserError(
            f"{folder} was begun with {begun_with} processes: go on with as many, for the same "
            "result"
        )


def parse_stored(
    parser: argparse.ArgumentParser, args: argparse.Namespace, stored: dict
) -> argparse.Namespace:
    """Parse the arguments of a run that is resumed: the file is checked as what a user types.

    args: the command that resumes; what belongs to it alone is kept. stored: of
    `arguments_to_resume`. A list for a flag of several values must be given to it by the caller.
    """
    known = {key: value for key, value in stored.items() if key in vars(args)}
    if "allow_overlap" in vars(args):
        known["allow_overlap"] = known.get("allow_overlap") or args.allow_overlap
    if getattr(args, "no_cuda_graph", False):
        known["no_cuda_graph"] = True  # it may have stopped for want of memory
    own = [f"--resume={args.resume}", f"--wandb={args.wandb}", f"--device={args.device}"]
    own += [f"--compare={run}" for run in getattr(args, "compare", ())]
    return parser.parse_args([*as_flags(known), *own])


def as_flags(stored: dict) -> list[str]:
    """The command line that gives these arguments: a stored file is checked as a user's words are.

    A list of texts becomes a repeated flag; None and False are left out.
    """
    flags = []
    for key, value in stored.items():
        # Defaults of None mean "not given", and switches are off unless they are named.
        if value is None or value is False:
            continue
        if value is True:
            flags.append(f"--{key}")
        elif is_list_of_texts(value):
            flags.extend(f"--{key}={text}" for text in value)
        else:
            flags.append(f"--{key}={value}")
    return flags


def is_list_of_texts(value) -> bool:
    return isinstance(value, list) and value != [] and all(type(item) is str for item in value)


# -----------------------------------------------------------------------------
# the end of a run


def finish(folder: Path, result: dict) -> None:
    """Write result.json, and append its line to results.jsonl beside the run folders, once.

    The last thing that a run does: a folder with result.json is a whole run.
    """
    # In this order: after a kill in between, the next call adds the line from the file.
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
    # By name, as a run may be registered again after a kill.
    registered = {row.get("name") for row in read_lines(results_file)}
    if result.get("name") not in registered:
        append_line(results_file, result)


# -----------------------------------------------------------------------------
# evaluating a run: its own data, and which images it has seen


def run_folder(model: str | Path) -> Path | None:
    """The folder of the run that a model belongs to, or None if no run made it.

    model: a run folder, a file in it or its adapter/, or a model's name.
    """
    # Names come first, as in weights.load_model: a folder may be called like a model.
    if str(model) in SHAPES:
        return None
    path = Path(model)
    if not path.exists():
        return None
    for place in (path, path.resolve()):  # a link to model.pt belongs to the run, too
        candidates = [place] if place.is_dir() else [place.parent]
        if place.name == "adapter":
            candidates.append(place.parent)
        for folder in candidates:
            if (folder / "args.json").exists():
                # The folder of an evaluation has args.json, too, but made a model of a soup only.
                stored = read_arguments(folder)
                jobs = ("train", "qwen_train", MERGED)
                made_model = stored.get("job") in jobs or stored.get("soup")
                return folder if made_model else None
    return None


def read_arguments(folder: Path) -> dict:
    """Read args.json of a run. Raises UserError if it is damaged."""
    path = folder / "args.json"
    try:
        return checked(read_json(path))
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}): it can't be known how this run was trained"
        ) from None


def inherited_arguments(model: str | Path) -> dict:
    """The data, names and prompts of the run that made a model; empty if no run made it."""
    folder = run_folder(model)
    if folder is None:
        return {}
    stored = read_arguments(folder)
    arguments = {key: stored[key] for key in INHERITED if key in stored}
    has_classifier = (folder / "classifier.pt").exists()
    if has_classifier or stored.get("strategy") in KEEPS_WEIGHTS:
        # The run has a prompt or head of its own, or has lost it. Templates would replace it.
        arguments.pop("prompt_template", None)
        arguments.pop("prompts", None)
    return arguments


def parse_inheriting(
    parser: argparse.ArgumentParser, model_flag: str, soup_flag: str | None = None
) -> argparse.Namespace:
    """Parse the command line; flags that it leaves out are taken over from the evaluated run.

    model_flag: the flag that names the run. soup_flag: one that names several in its place, of
    which the first is taken. Prints what is taken over. Raises UserError if they disagree on it.
    """
    args = parser.parse_args()
    typed = typed_flags(parser)
    soup = (getattr(args, soup_flag) if soup_flag else None) or []
    model = soup[0] if soup else getattr(args, model_flag)
    inherited = inherited_arguments(model) if model else {}
    typed_keys = set(typed)
    # Templates and a file of prompts take each other's place.
    if typed.get("prompts") or typed.get("prompt_template"):
        typed_keys |= {"prompts", "prompt_template"}
    taken = {}
    for key, value in inherited.items():
        if key in vars(args) and key not in typed_keys:
            taken[key] = value
    for other in soup[1:]:
        _check_agreement(model, other, taken)
    flags = as_flags(taken)
    if not flags:
        return args
    say(f"taken over from {run_folder(model)}: {shlex.join(flags)}")
    # What the file holds is checked as what a user types. Typed flags come last, so they win.
    return parser.parse_args([*flags, *sys.argv[1:]])


def _check_agreement(first: str, other: str, taken: dict) -> None:
    """Raise UserError if a run differs from another one in what an evaluation of both inherits."""
    inherited = inherited_arguments(other)
    # Empty where it is no run, which is refused later, with the reason.
    differing = [key for key in taken if inherited and inherited.get(key) != taken[key]]
    if differing:
        raise UserError(
            f"{first} and {other} were trained with different --{differing[0]}: say with which "
            "they are to be evaluated"
        )


def command_line(script: str, settings: dict) -> str:
    """A command as it is typed, quoted for the shell; the settings become its flags."""
    words = ["python", script]
    for flag in as_flags(settings):
        name, equals, value = flag.partition("=")
        # A value that begins with a dash must stay tied to its flag.
        if equals and not value.startswith("-"):
            words += [name, value]
        else:
            words.append(flag)
    return shlex.join(words)


def flags_for_next(runs: str, wandb: str) -> dict:
    """What the next command of a user repeats of this one, where it was not the default."""
    flags = {"runs": runs, "wandb": wandb}
    defaults = {"runs": "runs", "wandb": "auto"}
    return {key: value for key, value in flags.items() if value != defaults[key]}


def trains(epochs: int | None, strategy: str | None) -> bool:
    """Whether a run of train.py looks at its training images: --epochs 0 evaluates the start."""
    return epochs != 0 or strategy == "linear"


def strategy_of(trained: Mapping, members: Sequence[Mapping | None] = ()) -> str:
    """The strategy by which a model was trained: "none" if it was not, "unknown" if nothing says.

    trained: the args.json of the run that trained it, or of an evaluation of a run that is not
    here. members: of a soup, those of its runs, None for one that is not here. A soup has their
    strategy with SOUP behind it, "mixed" where they differ.
    """
    if members:
        if None in members:
            return "unknown" + SOUP
        strategies = {member.get("strategy") or "full" for member in members}
        return (strategies.pop() if len(strategies) == 1 else "mixed") + SOUP
    if trained.get("soup"):
        return "unknown" + SOUP
    path = Path(str(trained.get("architecture")))
    if trained.get("job") == "eval" and path.name == "model.pt":
        return "unknown"
    strategy = trained.get("strategy") or "full"  # of older runs
    return strategy if trained.get("epochs") or strategy == "linear" else "none"


def pretraining_of(first: Mapping, is_start: bool) -> str:
    """What the weights were trained on with which a chain of runs begins, with open_clip's own tag.

    first: the args.json of that run. is_start: whether another run starts from it: it then stands
    in for pretraining. Of a file of weights nothing is known: "".
    """
    architecture = str(first.get("architecture"))
    if architecture not in RANDOM:
        return split_tag(architecture)[1]
    if not is_start:
        return "random"
    return "captions" if first.get("captions") else "prompts"


def write_trained_on(folder: Path, ids: Iterable[str], *starts: str | Path) -> None:
    """Write trained_on.json, unless it is there: a resumed run keeps its own.

    ids: of the images, as `data.image_ids` gives them.
    starts: what the model was before, or what it is made of. The images of runs are added.
    """
    path = folder / "trained_on.json"
    if path.exists():
        return
    images = set(ids)
    record = {}
    # A start whose images can't be known is recorded as such: without it the list would look whole.
    try:
        images |= read_trained_on(*starts) or set()
    except UnknownImages as error:
        record["unknown"] = str(error)
    # Sorted, so that the digest is that of the set. JSON has no checksum of its own.
    images = sorted(images)
    write_json(path, {"digest": _digest(images), "images": images, **record})


def read_trained_on(*models: str | Path) -> set[str] | None:
    """The ids of all images that a model, or any of several, was trained on here.

    None if no run made any of them. Runs made before there was a trained_on.json have it derived
    from their arguments. Raises UnknownImages where that is not possible, or the file is damaged.
    """
    of_each = [_read_trained_on(model, visited=()) for model in models]
    known = [images for images in of_each if images is not None]
    return set().union(*known) if known else None


def _read_trained_on(model: str | Path, visited: tuple[Path, ...]) -> set[str] | None:
    folder = run_folder(model) or _folder_of_list(model)
    if folder is None:
        return None
    path = folder / "trained_on.json"
    if not path.exists():
        return _derive_trained_on(folder, visited)
    try:
        record = read_json(path)
        images = record["images"]
        if record["digest"] != _digest(images):
            raise ValueError("its digest is that of other images")
    except (ValueError, KeyError, TypeError) as error:
        raise UnknownImages(
            f"{path} is damaged ({reason(error)}): "
            f"it can't be known which images {folder} was trained on"
        ) from None
    if "unknown" in record:
        raise UnknownImages(str(record["unknown"]))
    return set(images)


def _folder_of_list(model: str | Path) -> Path | None:
    """The folder of a model with its trained_on.json, which has lost its args.json; or None."""
    if str(model) in SHAPES:
        return None
    path = Path(model)
    folder = path if path.is_dir() else path.parent
    has_lost = not (folder / "args.json").exists() and (folder / "trained_on.json").exists()
    return folder if path.exists() and has_lost else None


def _digest(images: list[str]) -> str:
    return hashlib.sha256("\n".join(images).encode()).hexdigest()


def _derive_trained_on(folder: Path, visited: tuple[Path, ...]) -> set[str]:
    """What a run without trained_on.json was trained on, by opening its dataset once more."""
    stored = read_arguments(folder)
    unknown = f"it can't be known which images {folder} was trained on: "
    # A damaged args.json may lead in a circle.
    if folder in visited:
        raise UnknownImages(f"{unknown}it started from itself")
    visited = (*visited, folder)
    if stored.get("soup"):
        return set().union(*(_part_trained_on(run, folder, visited) for run in stored["soup"]))
    root = stored.get("data_root")
    # Not opened if it is missing: that would start a download.
    if root is None or root != "sample" and not Path(root).is_dir():
        raise UnknownImages(f"{unknown}there is no dataset at {root}")
    try:
        flowers = open_from_flags(stored)
        index = _train_index(stored, flowers)
    except (UserError, KeyError, TypeError, ValueError) as error:
        raise UnknownImages(f"{unknown}{reason(error)}") from None
    if index is None:
        raise UnknownImages(f"{unknown}the dataset at {root} has changed since")

    images = set(image_ids(flowers, index))
    if stored["job"] == "train" and not trains(stored.get("epochs"), stored.get("strategy")):
        images = set()
    start = stored["architecture"]
    if stored["job"] != "train":  # of a Qwen, whose names on the hub look like paths
        return images | (_read_trained_on(start, visited) or set())
    return images | _part_trained_on(start, folder, visited)


def _part_trained_on(part: str, folder: Path, visited: tuple[Path, ...]) -> set[str]:
    """The images of what a run in `folder` started from, or of a run that it is the mean of.

    Raises UnknownImages where that was a file or a run, and is gone.
    """
    is_name = part in SHAPES or part.startswith(("open_clip:", "hf:"))
    if not is_name and not Path(part).exists():
        raise UnknownImages(
            f"it can't be known which images {folder} was trained on: {part}, which it was made "
            "from, is gone"
        )
    return _read_trained_on(part, visited) or set()


def _train_index(stored: dict, flowers: Flowers) -> np.ndarray | None:
    """The images that a run was trained on, by its arguments; None if their number is another."""
    index = flowers.splits["train"]
    n_recorded = stored["split_sizes"]["train"]
    n_classes = len(flowers.class_names)
    if stored["job"] == "qwen_train":
        # The sizes of its splits are those before any choice. Older runs had --images alone.
        if len(index) != n_recorded:
            return None
        choice = stored.get("classes", "all"), stored.get("shots"), stored["seed"]
        index = select(index, flowers.labels, n_classes, *choice)
        return subset(index, stored["images"], stored["seed"])
    choice = stored["classes"], stored["shots"], stored["seed"]
    index = select(index, flowers.labels, n_classes, *choice)
    return index if len(index) == n_recorded else None


def check_overlap(
    models: Sequence[str | Path], flowers: Flowers, index: np.ndarray, split: str, allow: bool
) -> int | str | None:
    """How many of the images at `index` a model was trained on, for the result and the table.

    models: the one that is evaluated, or all that it is the mean of.
    None if no run made the model: nothing is known about its training. "unknown" if a run made it
    whose images can't be known. split: what the images are called. allow: evaluate them anyhow.
    Raises UserError if there are such images, unless they are allowed.
    """
    # When in doubt refuse: an accuracy on training images looks like any other.
    try:
        trained_on = read_trained_on(*models)
    except UnknownImages as error:
        if allow:
            return "unknown"
        raise UserError(f"{error}; --allow_overlap evaluates the images all the same") from None
    if trained_on is None:
        _note_unknown_weights(models)
        return None
    overlap = count_overlap(trained_on, image_ids(flowers, index))
    names = " and ".join(map(str, models))
    # Numbers and contents can't be compared.
    by_number = [image.startswith(OXFORD_ID) for image in trained_on]
    if any(has_number != flowers.is_oxford for has_number in by_number):
        note(
            f"Oxford's images are known by number, others by content: if some of {flowers.root} "
            f"are copies of what {names} was trained on, this is not noticed"
        )
    if overlap and not allow:
        raise UserError(
            f"{overlap:,} of the {len(index):,} {split} images were trained on by {names}: choose "
            "the splits that it was trained with, or --allow_overlap evaluates them all the same"
        )
    return overlap


def _note_unknown_weights(models: Sequence[str | Path]) -> None:
    """Say of weights in a file, which no run here made, that they may have seen the images."""
    for model in models:
        if str(model) not in SHAPES and Path(model).exists():
            note(f"no run here made {model}: whether it was trained on these images isn't known")


def check_overlap_of_training(
    starts: Sequence[str | Path],
    flowers: Flowers,
    train_index: np.ndarray,
    index: np.ndarray,
    split: str,
    allow: bool,
) -> int | str:
    """How many of the images at `index` a model will have seen that is trained on `train_index`.

    As `check_overlap`, and before the training: its `starts` may have used them, and so may the
    training itself, where a dataset has a picture twice under two names. "unknown" if nobody can
    tell. Raises UserError if there are such images, unless they are allowed.
    """
    if check_overlap(starts, flowers, index, split, allow) == "unknown":
        return "unknown"
    trained_on = set(image_ids(flowers, train_index))
    evaluated = image_ids(flowers, index)
    doubles = count_overlap(trained_on, evaluated)
    if doubles and not allow:
        raise UserError(
            f"{doubles:,} of the {len(index):,} {split} images are training images, too: the same "
            "pictures under two names; remove them from the splits, or --allow_overlap evaluates "
            "them all the same"
        )
    trained_on |= read_trained_on(*starts) or set()
    return count_overlap(trained_on, evaluated)


def count_overlap(trained_on: set[str], ids: Iterable[str]) -> int:
    return sum(image_id in trained_on for image_id in ids)


# -----------------------------------------------------------------------------
# reading what a run has left


def read_metrics(run: str | Path, split: str) -> dict:
    """The metrics of a finished run on a split, under their names without the split: top1, ...

    And its `overlap`, where some of the images had been trained on.
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
    # Runs of qwen_eval.py from before the score was called pmi.
    if "calibrated_top1" in metrics:
        metrics["pmi_top1"] = metrics.pop("calibrated_top1")
    if "top1" not in metrics:
        raise UserError(f"{run} was not evaluated on the {split} images")
    if result.get("overlap"):
        metrics["overlap"] = result["overlap"]
    return metrics


def read_predictions(folder: Path) -> "pd.DataFrame":
    """Read predictions.csv of a run, a row an image: file, label, top1 ... top5, score1 ... score5.

    All columns are text; a name or score that a row lacks is empty. Names are those of
    layouts.correct_name, so that runs made before and after a correction can be compared. Raises
    OSError if there is no such file, ValueError if it is damaged, lists an image twice or none.
    """
    import pandas as pd  # half a second, which the page's first view does without

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
    for column in table.columns:
        if column == "label" or column.startswith("top"):
            table[column] = table[column].map(correct_name)
    return table


def read_duplicate_groups(folder: Path) -> list[list[str]]:
    """Read the groups of near-duplicates that a run found, each two or more names of files.

    None for a run that has not looked for them. Raises ValueError if duplicates.json is damaged,
    OSError if it can't be read.
    """
    path = folder / "duplicates.json"
    if not path.exists():
        return []
    try:
        groups = read_json(path).get("groups")
    except ValueError:
        raise ValueError("duplicates.json is damaged") from None
    if not isinstance(groups, list) or not all(_is_group(group) for group in groups):
        raise ValueError("duplicates.json is damaged")
    return groups


def _is_group(value) -> bool:
    is_list = isinstance(value, list) and len(value) > 1
    return is_list and all(isinstance(name, str) for name in value)


# -----------------------------------------------------------------------------
# class names


def write_class_names(folder: Path, class_names: Sequence[str]) -> None:
    """Leave class_names.json in a run folder: a run may be used where its dataset is not."""
    write_json(folder / "class_names.json", {"names": list(class_names)})


def read_class_names(folder: Path) -> list[str] | None:
    """The class names of a run, or None if it is older than class_names.json.

    Raises UserError if the file is damaged.
    """
    path = folder / "class_names.json"
    try:
        names = read_json(path).get("names")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("names is no list of texts")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): give --names") from None
    return names
