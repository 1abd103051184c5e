"""Files that are whole or not there: atomic writes, JSON and its lines, CSV, tensors that are read without trust."""

import contextlib
import csv
import json
import os
import platform
import re
import sys
import threading
import zipfile
from pathlib import Path

from flowers import UserError, reason

# what `checked` expects: numbers, and in arguments, where None stands for a default, numbers and texts
NUMBERS = (
    "alpha",
    "epoch",
    "step",
    "parameters",
    "peak_memory_mb",
    "frozen_seconds",
    "train_seconds",
    "eval_seconds",
)
SETTINGS = ("lr", "tau_lr", "temperature", "seed", "epochs", "batch_size", "processes", "shots")
TEXTS = (
    "name",
    "job",
    "architecture",
    "strategy",
    "classes",
    "splits",
    "class_names",
    "data_root",
    "protocol",
    "positives",
    "augment",
    "error",
)


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
    temporary = path.with_name(
        f".{path.name}.{threading.get_ident()}.{platform.node()}-{os.getpid()}.tmp"
    )
    try:
        with (
            naming(path),
            open(
                temporary, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": ""})
            ) as file,
        ):
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def parse_json(text: str) -> dict:
    """A JSON object. Raises ValueError for anything else, however deeply it is nested."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}, not an object")
    return value


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError if it holds anything else, OSError if there is no such file."""
    return parse_json(path.read_text(encoding="utf-8"))


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
        print(
            f"warning: {damaged} damaged line{'s' * (damaged > 1)} of {path} left out",
            file=sys.stderr,
        )
    return [row for row in rows if all(key in row for key in keys)]


def checked(row: dict) -> dict:
    """A row of arguments, metrics or results, as it is. Raises ValueError naming a key whose value is of another kind: the file was damaged."""
    for key, value in row.items():
        percent = "/" in key and not key.startswith("train/") and not key.endswith("/n")
        if percent or "/" in key or key in NUMBERS or key.startswith("trainable_"):
            fits = type(value) in (int, float) and (
                0 <= value <= 100.001 if percent else abs(value) < 1e15
            )
        else:
            fits = (
                value is None
                or key not in (*TEXTS, *SETTINGS)
                or isinstance(value, str if key in TEXTS else (int, float))
                and value == value
            )
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


def save_tensors(path: Path, state: dict) -> None:
    """torch.save, whole or not at all. Raises OSError on a full disk."""
    import torch  # most who read and write files need none

    with atomic(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's writer hides what the file system said
            raise error.__context__ or error from None


def load_tensors(path: Path) -> dict:
    """Read a checkpoint or state dict, plain tensors only. Raises UserError if it is missing, damaged (checksums are
    compared, numbers finite), or not a dict."""
    import torch

    try:
        if zipfile.is_zipfile(path):
            with (
                zipfile.ZipFile(path) as archive
            ):  # torch compares no checksums, and unpacks what is compressed, which it never writes itself
                if (
                    sum(info.file_size for info in archive.infolist()) > path.stat().st_size
                    or archive.testzip()
                ):
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
    import torch

    if isinstance(value, torch.Tensor):
        dense = (
            value.layout == torch.strided
            and not value.is_complex()
            and value.nbytes <= value.untyped_storage().nbytes()
        )
        return dense and bool(value.isfinite().all())
    return all(
        map(
            _plain,
            value.values()
            if isinstance(value, dict)
            else value
            if isinstance(value, (list, tuple))
            else (),
        )
    )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True
