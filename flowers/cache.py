"""Arrays that are computed once and kept beside the data: pixels, features, thumbnails.

A cache file is complete or does not exist, and is memory-mapped when it is read. It is a .npy file
with a trailer of 36 bytes: the key of 32 bytes, and the CRC-32 of the array in 4, little-endian.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from flowers import UserError
from flowers.files import atomic, note, try_lock

KEY_SIZE = 32
CRC_SIZE = 4
# What models compute of images and texts is large. In one cache folder, 50 GiB of it; beyond that
# the least recently used arrays are removed.
BOUNDED = ("frozen-*.npy", "qwen-*.npy")
MAX_BYTES = 50 << 30
WAIT_SECONDS = 0.2  # between two looks at whether another process has made an array


def cache_folder(root: Path) -> Path:
    """The folder for the cached arrays of a dataset; it is made if it is missing.

    It is `.cache/` in the data folder, or a folder in ~/.cache where that one is read-only.
    """
    folder = root / ".cache"
    target = folder if folder.exists() else root  # what would be written to
    # The superuser may write anywhere, so the mode counts too: read-only data is left alone.
    has_write_mode = target.stat().st_mode & 0o222
    if not has_write_mode or not os.access(target, os.W_OK):
        user_caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        # One folder for each dataset, by its path.
        digest = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]
        folder = user_caches / "flowers-102" / digest
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def array_path(root: Path, title: str, files: Sequence[Path]) -> Path:
    """Where an array about `files` is cached. Other files of the same dataset have another path."""
    # The names only: an image that changes makes this file stale, it does not leave it behind.
    names = "".join(file.name for file in files)
    digest = hashlib.sha256(names.encode()).hexdigest()[:8]
    return cache_folder(root) / f"{title}-{digest}.npy"


def key_of(*parts) -> bytes:
    """A key of 32 bytes that changes when any of `parts` does.

    parts: what JSON can hold, bytes, and paths. A path stands for the name, size and modification
        time of its file.
    """
    return hashlib.sha256(json.dumps(parts, default=_as_json).encode()).digest()


def _as_json(part: Path | bytes) -> list | str:
    """What stands for a part of a key that JSON can't hold."""
    if isinstance(part, Path):
        stat = part.stat()
        return [part.name, stat.st_size, stat.st_mtime_ns]
    return part.hex()


def cached_array(
    path: Path,
    key: bytes,
    shape: tuple[int, ...],
    dtype: str,
    rows: Callable[[], Iterable[np.ndarray]],
) -> np.ndarray:
    """The array cached at `path`, memory-mapped, and computed first if it is missing.

    Of several processes that need it one computes it, and the others wait.

    key: what the array depends on, from `key_of`. A file of another key or a damaged one is
        replaced, with a warning.
    shape, dtype: those of the array, as numpy writes them: "|u1", "<f4".
    rows: called to compute the array; yields its rows in order, in pieces of any length.

    Raises OSError on a full disk, and leaves nothing half-written.
    """
    if _find_problem(path, key, shape, dtype):
        with _alone_with(path):
            # Who had to wait for another process finds what that one has made.
            problem = _find_problem(path, key, shape, dtype)
            if problem and path.exists():
                print(f"warning: {path} {problem}; making it anew", file=sys.stderr)
            # Others may map the same file: it is replaced by renaming, never written over.
            if problem:
                _write(path, key, shape, dtype, rows())
    # Copy on write ("c"), since torch has no read-only tensors. The file itself never changes.
    return np.load(path, mmap_mode="c")


def open_array(path: Path, key: bytes, shape: tuple[int, ...], dtype: str) -> np.ndarray | None:
    """The array cached at `path`, memory-mapped; None if it is missing, damaged or another one."""
    if _find_problem(path, key, shape, dtype):
        return None
    return np.load(path, mmap_mode="c")


def bounded_array(
    path: Path,
    key: bytes,
    shape: tuple[int, ...],
    rows: Callable[[], Iterable[np.ndarray]],
    advice: str = "",
) -> np.ndarray:
    """cached_array of bytes, for which the least recently used arrays of BOUNDED make room.

    advice: what else helps where the disk is full. Raises UserError there.
    """
    size = int(np.prod(shape))
    _make_room(path, size)
    try:
        data = cached_array(path, key, shape, "|u1", rows)
    except OSError as error:
        # Any other error says by itself what is wrong with the file.
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(
            f"{path.parent} has no room for {size / 2**30:.1f} GiB: free some{advice}"
        ) from None
    touch(path)
    return data


def touch(path: Path) -> None:
    """Note that an array has been used, for the choice of those that make room."""
    # A file of another user keeps its own time.
    with contextlib.suppress(PermissionError):
        os.utime(path)


def _make_room(path: Path, size: int) -> None:
    """Remove the least recently used arrays until a new one of `size` bytes fits.

    Together they may not exceed MAX_BYTES, nor the new one what is free on the disk.
    """
    # It will be used again: nothing is written.
    if path.exists():
        return
    arrays = [file for pattern in BOUNDED for file in path.parent.glob(pattern)]
    arrays.sort(key=lambda file: file.stat().st_mtime)
    total = size + sum(file.stat().st_size for file in arrays)
    # The oldest first. Who has mapped it keeps it.
    while arrays and (total > MAX_BYTES or shutil.disk_usage(path.parent).free < size):
        oldest = arrays.pop(0)
        total -= oldest.stat().st_size
        oldest.unlink(missing_ok=True)
        oldest.with_suffix(".json").unlink(missing_ok=True)  # what is in it, of a pack


@contextlib.contextmanager
def _alone_with(path: Path) -> Iterator[None]:
    """A context that one process at a time is in. Who is killed in it leaves it."""
    lock_path = path.with_suffix(".lock")
    try:
        with lock_path.open("ab") as lock:
            if not try_lock(lock):
                note(f"another process is making {path}, which is waited for")
                while not try_lock(lock):
                    time.sleep(WAIT_SECONDS)
            yield
    finally:
        # Another process may hold it by now: it has looked, or will, at what has been made.
        with contextlib.suppress(OSError):
            lock_path.unlink()


def _write(
    path: Path, key: bytes, shape: tuple[int, ...], dtype: str, rows: Iterable[np.ndarray]
) -> None:
    """Write a cache file piece by piece: the array need not fit into memory."""
    # np.save would need the whole array. Its header alone, then the bytes, make the same file.
    crc = 0  # of the array alone, without the header
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    with atomic(path) as out:
        np.lib.format.write_array_header_1_0(out, header)
        for piece in rows:
            data = np.ascontiguousarray(piece, dtype).tobytes()
            crc = zlib.crc32(data, crc)
            out.write(data)
        out.write(key + crc.to_bytes(CRC_SIZE, "little"))


def _find_problem(path: Path, key: bytes, shape: tuple[int, ...], dtype: str) -> str:
    """What is wrong with a cache file, as the end of a sentence, or the empty string."""
    if not path.exists():
        return "is missing"
    try:
        data = np.load(path, mmap_mode="r")
        # numpy ignores what stands behind the array.
        with path.open("rb") as file:
            file.seek(-(KEY_SIZE + CRC_SIZE), os.SEEK_END)
            trailer = file.read()
    except Exception:  # numpy raises many kinds at a damaged header
        return "is damaged"
    if trailer[:KEY_SIZE] != key:
        return "is of something else or damaged"

    # The header has no checksum: a damaged one may claim another type, shape or order of axes.
    if data.shape != shape or data.dtype != np.dtype(dtype) or not data.flags.c_contiguous:
        return "is damaged"
    if zlib.crc32(data).to_bytes(CRC_SIZE, "little") != trailer[KEY_SIZE:]:
        return "is damaged"
    return ""
