"""Files that are whole or not there: atomic writes, JSON, JSON lines, CSV, and safe tensor files.

A run may be killed at any moment, by several causes on several machines that share a disk. So a
file is written beside its place and renamed, and a file that is read may be damaged.
"""

import contextlib
import hashlib
import json
import os
import pickle
import platform
import re
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from flowers import UserError, reason

# The byte of a file that stands for all of it where bytes are locked.
FAR_BYTE = 1 << 30

# -----------------------------------------------------------------------------
# paths


def user_path(text: str) -> str:
    """A path of the command line, with ~ and $VARIABLES in it replaced. A type for argparse.

    The shell does not do it after an equals sign, and a sweep or a notebook has no shell.
    """
    # open_clip: and hf: may stand before a path.
    kind, colon, path = text.rpartition(":")
    return os.path.expandvars(kind + colon + os.path.expanduser(path))


def user_file(text: str) -> Path:
    """user_path as a Path."""
    return Path(user_path(text))


def note(message: str) -> None:
    """Print a line to stderr, once where several processes work together."""
    if _speaks():
        print(f"note: {message}", file=sys.stderr)


def say(message: str) -> None:
    """Print a line to stdout, once where several processes work together."""
    if _speaks():
        print(message)


def _speaks() -> bool:
    # As torchrun sets it.
    return os.environ.get("RANK", "0") == "0"


def digest_of_prompts(path: str | Path, what: str = "prompts") -> str:
    """The first 16 hex digits of the SHA-256 of a file of texts, to see whether it has changed.

    what: the texts, in words. Raises UserError if it is missing.
    """
    if not Path(path).is_file():
        raise UserError(f"no {what} at {path}")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


# -----------------------------------------------------------------------------
# atomic writes


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add the path to an OSError that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic(path: str | Path, mode: str = "wb") -> Iterator:
    """Open a temporary file beside `path` and rename it to `path` when the block ends well.

    A reader sees the file as it was before or as it is after, never half of it. Raises OSError,
    naming `path`, if it can't be written; then the file is as it was before. A device or a pipe is
    written to as it is: a rename would put a file in its place.
    """
    path = Path(path)
    # Text is UTF-8 and its line ends are written as they are, whatever the locale.
    text_options = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    if path.exists() and not path.is_file() and not path.is_dir():
        with naming(path), open(path, mode, **text_options) as file:
            yield file
        return
    _remove_abandoned(path.parent)
    # The thread, the machine and the process: nobody else writes to a file of this name.
    writer = f"{threading.get_ident()}.{platform.node()}-{os.getpid()}"
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    try:
        with naming(path), open(temporary, mode, **text_options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of processes of this machine that are dead."""
    pattern = re.compile(rf".*\.{re.escape(platform.node())}-(\d+)\.tmp")
    for temporary in folder.glob(".*.tmp"):
        writer = pattern.fullmatch(temporary.name)
        if writer and not _is_alive(int(writer[1])):
            temporary.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    # There os.kill ends the process, whatever the signal.
    if sys.platform == "win32":
        import psutil

        return psutil.pid_exists(pid)
    try:
        os.kill(pid, 0)  # signal 0 only asks whether there is such a process
    except OSError as error:
        # Permission is denied where it is there and belongs to another user.
        return isinstance(error, PermissionError)
    return True


# -----------------------------------------------------------------------------
# locks


def try_lock(file: IO) -> bool:
    """Lock an open file until it is closed; False if another process has locked it.

    A process that inherits the open file holds the lock, too, but on Windows.
    """
    try:
        import fcntl  # here, as Windows has none
    except ImportError:
        return _try_lock_on_windows(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _try_lock_on_windows(file: IO) -> bool:
    try:
        import msvcrt
    except ImportError:
        return True  # neither: nothing else can be asked
    # Nobody else may read or write a byte that is locked, so it is one that is never reached.
    position = os.lseek(file.fileno(), 0, os.SEEK_CUR)
    os.lseek(file.fileno(), FAR_BYTE, os.SEEK_SET)
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    finally:
        os.lseek(file.fileno(), position, os.SEEK_SET)
    return True


# -----------------------------------------------------------------------------
# JSON and JSON lines


def as_object(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object of these keys and values, for json.loads. Raises ValueError for a key twice.

    json.loads itself takes the last of them, without a word.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return value


def parse_json(text: str) -> dict:
    """Parse a JSON object. Raises ValueError for anything else, however deeply it is nested."""
    try:
        # Windows' editors begin a file in UTF-8 with a byte-order mark.
        value = json.loads(text.removeprefix("\ufeff"), object_pairs_hook=as_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}, not an object")
    return value


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises ValueError if the file holds none, OSError if it is missing."""
    # Windows' editors write a byte-order mark, and its shell UTF-16.
    data = path.read_bytes()
    return parse_json(data.decode(json.detect_encoding(data)))


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic(path, "w") as file:
        json.dump(value, file, indent=1)


def append_line(path: Path, row: dict) -> None:
    """Append one JSON line. Raises OSError, naming the file, on a full disk.

    It is written at once, so that the lines of two processes never mix.
    """
    with naming(path), path.open("a+b") as file:
        # A kill may have cut off the last line: close it first, so that this one can be read.
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")


def read_lines(path: Path, *keys: str) -> list[dict]:
    """Read the rows of a .jsonl file that have all of `keys`; a missing file has no rows.

    Lines that were cut off or damaged are left out, with a warning.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows = []
    damaged = 0
    for line in filter(None, lines):
        try:
            rows.append(checked(parse_json(line.decode())))
        except ValueError:
            damaged += 1
    if damaged:
        plural = "s" if damaged > 1 else ""
        print(f"warning: {damaged} damaged line{plural} of {path} left out", file=sys.stderr)
    return [row for row in rows if all(key in row for key in keys)]


def write_lines(path: Path, rows: list[dict]) -> None:
    """Write a .jsonl file, one row a line, whole or not at all."""
    with atomic(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


# -----------------------------------------------------------------------------
# what the values of a row must be


def is_number(value) -> bool:
    """Whether a value of a file is a finite number that a run can have written."""
    # By type, as True is an int to Python. A comparison with nan is false.
    return type(value) in (int, float) and abs(value) < 1e15


def _is_percentage(value) -> bool:
    return type(value) in (int, float) and 0 <= value <= 100.001


def _is_setting(value) -> bool:
    """A number on the command line, or None where its default is left to the script."""
    is_nan = value != value
    return value is None or isinstance(value, (int, float)) and not is_nan


def _is_text(value) -> bool:
    return value is None or isinstance(value, str)


NUMBERS = "alpha epoch step parameters peak_memory_mb frozen_seconds train_seconds eval_seconds"
SETTINGS = "lr tau_lr temperature seed epochs batch_size processes shots"
TEXTS = (
    "name job architecture strategy classes splits class_names data_root protocol positives "
    "augment error activation"
)
CHECK_OF_KEY = {
    **dict.fromkeys(NUMBERS.split(), is_number),
    **dict.fromkeys(SETTINGS.split(), _is_setting),
    **dict.fromkeys(TEXTS.split(), _is_text),
}


def _is_plausible(key: str, value) -> bool:
    """Whether a value is of the kind that its key stands for. Unknown keys hold anything."""
    if "/" in key:  # a metric of a split, such as test/top1
        # The NLL is in nats and has no upper end.
        is_nll = key.partition("/")[2].startswith("nll")
        is_percentage = not (key.startswith("train/") or key.endswith("/n") or is_nll)
        return _is_percentage(value) if is_percentage else is_number(value)
    if key.startswith("trainable_"):
        return is_number(value)
    if key in CHECK_OF_KEY:
        return CHECK_OF_KEY[key](value)
    return True


def checked(row: dict) -> dict:
    """Return a row of arguments, metrics or results if its values are plausible.

    Raises ValueError naming a key whose value is of another kind: then the file was damaged.
    """
    for key, value in row.items():
        if not _is_plausible(key, value):
            raise ValueError(f"{key} is {str(value)[:40]!r}")
    return row


# -----------------------------------------------------------------------------
# tables and tensors


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write a CSV file with a header, whole or not at all. Lines end as RFC 4180 has it (CR LF)."""
    import pandas as pd  # here, as exploration reads and writes other files without it

    # As objects, every value is written as Python prints it: 1 does not become 1.0 beside a gap.
    table = pd.DataFrame(rows, dtype=object)
    with atomic(path, "w") as file:
        table.to_csv(file, index=False, lineterminator="\r\n")


def save_tensors(path: Path, state: dict) -> None:
    """torch.save, whole or not at all. Raises OSError on a full disk."""
    import torch  # here, as most who read and write files need none

    with atomic(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # torch's writer hides the OSError that it met.
            raise error.__context__ or error from None


def load_tensors(path: Path) -> dict:
    """Read a checkpoint or a state dict: plain tensors on the CPU, in nested dicts and lists.

    Raises UserError if the file is missing, damaged, or holds no dict. A file may come from
    anywhere, so nothing in it is run, and nothing in it can fill the memory.
    """
    import torch

    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        if Path(path).suffix == ".safetensors":
            state = _load_safetensors(path)
        else:
            # weights_only: any other pickle may run code. No mmap: the file may change in use.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
        if not _is_sound(state):
            raise ValueError("a tensor is sparse, complex, not finite, or larger than its numbers")
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except UserError:
        raise
    except pickle.UnpicklingError:  # torch's own message says how to run what is in the file
        raise UserError(
            f"{path} can't be read as tensors: it is damaged, no file of torch's, or holds other "
            "Python objects besides; give a state dict"
        ) from None
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"{path} can't be read as tensors: {reason(error)}") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a dict of tensors")
    return state


def _load_safetensors(path: Path) -> dict:
    """Read a .safetensors file, which holds nothing but tensors."""
    try:
        from safetensors.torch import load_file  # optional
    except ImportError:
        raise UserError(
            f"{path} needs the package safetensors: pip install -r requirements-openclip.txt"
        ) from None
    return load_file(path)


def _check_archive(path: Path) -> None:
    """Raise ValueError if a file of torch's zip format is damaged or compressed."""
    with zipfile.ZipFile(path) as archive:
        # torch never compresses, but would unpack: a small file could become more than memory.
        unpacked_bytes = sum(member.file_size for member in archive.infolist())
        compressed = unpacked_bytes > path.stat().st_size
        # torch does not compare the checksums: a flipped bit would be another weight.
        if compressed or archive.testzip():
            raise ValueError("its checksum or size is wrong")


def _is_sound(value) -> bool:
    """Whether all tensors in nested dicts and lists are dense, real, finite and of full size."""
    import torch

    if isinstance(value, dict):
        return all(_is_sound(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_sound(item) for item in value)
    if not isinstance(value, torch.Tensor):
        return True
    # The models are dense and real: anything else is no checkpoint of ours.
    if value.layout != torch.strided or value.is_complex():
        return False
    # With strides of 0 a few numbers claim to be many, and a copy of them would fill the memory.
    if value.nbytes > value.untyped_storage().nbytes():
        return False
    # A model that diverged: everything made from it would be nan.
    return bool(value.isfinite().all())
