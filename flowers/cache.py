"""Arrays that are computed once and kept beside the data: pixels, features, thumbnails. Whole or not at all, memory-mapped when read."""

import hashlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from flowers.files import atomic


def cache_folder(root: Path) -> Path:
    """`.cache/` in the data folder; where either is read-only (by its mode, so for the superuser too), a folder of its own in ~/.cache."""
    path = root / ".cache"
    place = path if path.exists() else root
    if not (place.stat().st_mode & 0o222 and os.access(place, os.W_OK)):
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        path = home / "flowers-102" / hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]
    path.mkdir(parents=True, exist_ok=True)
    return path


def array_path(root: Path, title: str, files: Sequence[Path]) -> Path:
    """Where an array about `files` is kept; other files of the same dataset have another path."""
    names = hashlib.sha256("".join(file.name for file in files).encode()).hexdigest()[:8]
    return cache_folder(root) / f"{title}-{names}.npy"


def key_of(*parts) -> bytes:
    """32 bytes that change when any of `parts` does; a Path stands for its file's name, size and time."""

    def plain(part):
        if isinstance(part, Path):
            stat = part.stat()
            return [part.name, stat.st_size, stat.st_mtime_ns]
        return part.hex()

    return hashlib.sha256(json.dumps(parts, default=plain).encode()).digest()


def cached_array(
    path: Path,
    key: bytes,
    shape: tuple[int, ...],
    dtype: str,
    rows: Callable[[], Iterable[np.ndarray]],
) -> np.ndarray:
    """The array (shape, dtype) kept at `path`, memory-mapped; if it is missing, damaged or not of `key`, `rows()` makes it anew.

    rows: yields the array's rows in order, in pieces of any length. A damaged or stale file is told of with a warning. Raises OSError
    on a full disk, and leaves nothing half-written.
    """
    problem = _problem(path, key, shape, dtype) if path.exists() else "is missing"
    if problem not in ("", "is missing"):
        print(f"warning: {path} {problem}; making it anew", file=sys.stderr)
    if problem:
        crc = 0
        with atomic(path) as out:
            np.lib.format.write_array_header_1_0(
                out, {"descr": dtype, "fortran_order": False, "shape": shape}
            )
            for row in rows():
                data = np.ascontiguousarray(row, dtype).tobytes()
                crc = zlib.crc32(data, crc)
                out.write(data)
            out.write(key + crc.to_bytes(4, "little"))
    return np.load(path, mmap_mode="c")  # copy on write: torch has no read-only tensors


def _problem(path: Path, key: bytes, shape: tuple[int, ...], dtype: str) -> str:
    """What is wrong with a cache file, or the empty string. Behind the array stand the key and a checksum."""
    try:
        data = np.load(path, mmap_mode="r")
        with path.open("rb") as file:
            file.seek(-36, os.SEEK_END)
            trailer = file.read()
    except Exception:  # numpy raises many kinds at a damaged header
        return "is damaged"
    if trailer[:32] != key:
        return "is of something else or damaged"
    intact = (
        data.shape == shape
        and data.dtype == np.dtype(dtype)
        and data.flags.c_contiguous
        and zlib.crc32(data).to_bytes(4, "little") == trailer[32:]
    )
    return "" if intact else "is damaged"
