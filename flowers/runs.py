"""The run folder: what a run was asked to do, how it went and what it found, in files that every other script reads.

    runs/<name>/args.json        the command line, versions, device, split sizes
    runs/<name>/metrics.jsonl    one line a step or evaluation
    runs/<name>/checkpoint.pt    to resume from
    runs/<name>/model.pt         a state dict that clip.load opens
    runs/<name>/predictions.csv  file, label, five best names with their probabilities
    runs/<name>/report.csv       precision, recall, F1 of each class
    runs/<name>/result.json      all results, flat; the same line is appended to runs/results.jsonl
"""
import contextlib
import csv
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import resource
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from flowers import UserError, parse_json, read_json, reason

# what `checked` expects: numbers, and in arguments, where None stands for a default, numbers and texts
NUMBERS = ("alpha", "epoch", "step", "parameters", "peak_memory_mb", "frozen_seconds", "train_seconds", "eval_seconds")
SETTINGS = ("lr", "tau_lr", "temperature", "seed", "epochs", "batch_size", "processes", "shots")
TEXTS = ("name", "job", "architecture", "strategy", "classes", "splits", "class_names", "data_root", "protocol", "positives", "augment", "error")


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch; on a CPU also refuse operations whose result depends on the threads. Raises UserError for an odd seed."""
    if not 0 <= seed < 2 ** 32:
        raise UserError(f"--seed {seed}: it must be between 0 and {2 ** 32 - 1}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(not torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = False  # a tenth of a step, for memory that is never read


def generator(*numbers: int) -> torch.Generator:
    """Random numbers that depend on `numbers` (seed, epoch, ...) alone, so that a resumed run draws what an uninterrupted one draws."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


def learning_rate_share(step: int, total: int, warmup: float = 0.1) -> float:
    """Of the peak learning rate, at a step of `total`: a linear rise over the first `warmup` of them, then a cosine down to 0."""
    return min((step + 1) / max(1, warmup * total), 0.5 * (1 + math.cos(math.pi * max(0.0, step - warmup * total) / max(1, total - warmup * total))))


def processes() -> tuple[int, int, torch.device]:
    """Rank, number of processes and device: one process, unless torchrun started more (NCCL between GPUs, gloo between CPUs)."""
    cuda = torch.cuda.is_available()
    if not dist.is_torchelastic_launched():
        return 0, 1, torch.device("cuda" if cuda else "cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


@contextlib.contextmanager
def rank_zero_first(rank: int, world: int):
    """Let process 0 do the block before the others, so that it alone downloads and fills the caches."""
    if world > 1 and rank > 0:
        dist.barrier()
    yield
    if world > 1 and rank == 0:
        dist.barrier()


@contextlib.contextmanager
def naming(path: str | Path):
    """Add the file to an OSError that does not name it, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic(path: str | Path, mode: str = "wb"):
    """Open a temporary file beside `path`, and rename it to `path` when the block ends well: readers see the old file or the new one."""
    path = Path(path)
    for left in path.parent.glob(".*.tmp"):  # of a process that was killed
        of = re.fullmatch(rf".*\.{re.escape(platform.node())}-(\d+)\.tmp", left.name)
        if of and not _alive(int(of[1])):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{threading.get_ident()}.{platform.node()}-{os.getpid()}.tmp")
    try:
        with naming(path), open(temporary, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": ""})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: dict) -> None:
    with atomic(path, "w") as file:
        json.dump(value, file, indent=1)


def append_line(path: Path, row: dict) -> None:
    """Append one JSON line in one write, so that two processes never mix theirs; a line cut off by a kill is closed first."""
    with naming(path), path.open("a+b") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")


def read_lines(path: Path, *keys: str) -> list[dict]:
    """The rows of a .jsonl file that have all of `keys`; lines that were cut off or damaged are left out, with a warning."""
    rows, damaged = [], 0
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            rows += [checked(parse_json(line.decode()))] if line else []
        except ValueError:
            damaged += 1
    if damaged:
        print(f"warning: {damaged} damaged line{'s' * (damaged > 1)} of {path} left out", file=sys.stderr)
    return [row for row in rows if all(key in row for key in keys)]


def checked(row: dict) -> dict:
    """A row of arguments, metrics or results, as it is. Raises ValueError naming a key whose value is of another kind: the file was damaged."""
    for key, value in row.items():
        percent = "/" in key and not key.startswith("train/") and not key.endswith("/n")
        if percent or "/" in key or key in NUMBERS or key.startswith("trainable_"):
            fits = type(value) in (int, float) and (0 <= value <= 100.001 if percent else abs(value) < 1e15)
        else:
            fits = value is None or key not in (*TEXTS, *SETTINGS) or isinstance(value, str if key in TEXTS else (int, float)) and value == value
        if not fits:
            raise ValueError(f"{key} is {str(value)[:40]!r}")
    return row


def write_lines(path: Path, rows: list[dict]) -> None:
    with atomic(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_csv(path: Path, rows: list[dict]) -> None:
    with atomic(path, "w") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def peak_memory_mb() -> int:
    """The most that was held so far: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def add_run_arguments(parser, resume: bool = False, compare: bool = False) -> None:
    """The flags of every script that leaves a run behind; with `resume` and `compare`, those of scripts that can do these."""
    parser.add_argument("--runs", default="runs", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--name", help="name of this run (default: model and time)")
    if resume:
        parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, with its own arguments")
    if compare:
        parser.add_argument("--compare", action="append", default=[], metavar="RUN", help="show an earlier run's results beside these; repeatable")
    parser.add_argument("--wandb", choices=["auto", "online", "offline", "disabled"], default="auto",
                        help="auto: online if logged in, else offline (default: %(default)s)")


def new_run(runs: str | Path, name: str | None, config: dict, splits: dict[str, np.ndarray]) -> Path:
    """Make runs/<name>/ with args.json; without a name, one from the architecture and the time. Raises UserError if it is taken.

    An evaluation that was killed is begun anew; other runs are gone on with by --resume.
    """
    path = Path(config["architecture"])  # a path, or a name such as ViT-L/14@336px
    model = (path.parent if path.name == "model.pt" else path).name if path.exists() else str(path).replace("/", "-")
    name = name or f"{model}-{config['job']}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder = Path(runs) / name
    if (folder / "result.json").exists():
        register(folder)  # a kill may have come before
    elif not (folder / "args.json").exists() or config["job"] == "eval" and b'"job": "eval"' in (folder / "args.json").read_bytes():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "args.json", {**config, "name": name, "split_sizes": {k: len(v) for k, v in splits.items()}, **environment()})
        return folder
    again = "" if config["job"] == "eval" else f", or go on with --resume {folder}"
    raise UserError(f"{folder} is a run already: choose another --name{again}")


def begun(folder: Path, job: str) -> dict | None:
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
        return {k: v for k, v in stored.items() if k not in ("resume", "wandb", "compare")} | {"runs": str(folder.parent)}
    register(folder)
    print(f"{folder} is finished: nothing to do")
    return None


def as_flags(stored: dict) -> list[str]:
    """The command line that says the same, so that what a file holds is checked as what a user types. A list of texts is a flag given so often."""
    return [flag for key, value in stored.items() if value is not None and value is not False
            for flag in ([f"--{key}"] if value is True else [f"--{key}={v}" for v in value] if isinstance(value, list) and {*map(type, value)} == {str}
                         else [f"--{key}={value}"])]


def results_of(run: str | Path, split: str) -> dict:
    """The metrics of a finished run on a split, without its name before each. Raises UserError if there are none."""
    try:
        found = {k.split("/", 1)[1]: v for k, v in checked(read_json(Path(run) / "result.json")).items() if k.startswith(split + "/")}
    except (OSError, ValueError) as error:
        raise UserError(f"there is no whole {Path(run) / 'result.json'} ({error})") from None
    if "top1" not in found:
        raise UserError(f"{run} was not evaluated on the {split} images")
    return found


def environment() -> dict:
    """What a result may depend on besides the arguments: commit, versions, device."""
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:
        commit = ""
    versions = {p: importlib.metadata.version(p) for p in ("torchvision", "clip-anytorch", "numpy", "scikit-learn")}
    versions["torch"] = torch.__version__  # its build too (+cpu, +cu130), which the package's own version may leave out
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return {"commit": commit, "python": platform.python_version(), "versions": versions, "device": device}


def save_tensors(path: Path, state: dict) -> None:
    """torch.save, whole or not at all. Raises OSError on a full disk."""
    with atomic(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's writer hides what the file system said
            raise error.__context__ or error from None


def load_file(path: Path) -> dict:
    """Read a checkpoint or state dict, plain tensors only. Raises UserError if it is missing, damaged (checksums are
    compared, numbers finite), or not a dict."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch compares no checksums, and unpacks what is compressed, which it never writes itself
                if sum(info.file_size for info in archive.infolist()) > path.stat().st_size or archive.testzip():
                    raise ValueError("its checksum or size is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
        if not _plain(state):
            raise ValueError("a tensor is sparse, complex, not finite, or larger than its numbers")
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"{path} can't be read as tensors: {reason(error)}") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a dict of tensors")
    return state


def _plain(value) -> bool:
    """Whether all tensors in nested dicts and lists are dense, real and finite, and none is a few numbers that claim to be many."""
    if isinstance(value, torch.Tensor):
        dense = value.layout == torch.strided and not value.is_complex() and value.nbytes <= value.untyped_storage().nbytes()
        return dense and bool(value.isfinite().all())
    return all(map(_plain, value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()))


def finish(folder: Path, result: dict) -> None:
    """Write result.json and append its line to results.jsonl beside the run folders, once."""
    write_json(folder / "result.json", result)
    register(folder)


def register(folder: Path) -> None:
    """Make sure that a finished run has its line in results.jsonl."""
    try:
        result, table = read_json(folder / "result.json"), folder.parent / "results.jsonl"
    except ValueError as error:
        raise UserError(f"{folder / 'result.json'} is damaged ({error}): remove it, and go on with --resume {folder}") from None
    if not any(row.get("name") == result.get("name") for row in read_lines(table)):
        append_line(table, result)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True
