"""Images from disk as arrays, without torch: what exploration and the page need."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from flowers import UserError, reason

# A few bytes of header may claim 4,000 million pixels, and each scan of a JPEG decodes them anew.
MAX_PIXELS = 80_000_000
MAX_SCANS = 100
SCAN_MARKER = b"\xff\xda"
JPEG_START = b"\xff\xd8\xff"
FORMATS = ("JPEG", "PNG", "WEBP")
CHUNK = 64  # files handed to the threads at a time


def read_checked(file: Path) -> bytearray:
    """The bytes of a JPEG, PNG or WebP whose header claims a size that can be decoded.

    What a file is, its content says and not its name. Raises ValueError if it is something else or
    too large, and whatever Pillow raises for a damaged header.
    """
    # Opening reads the header only. The bytes are read by Python, since torchvision's reader takes
    # no path outside of UTF-8; a bytearray, since torch.frombuffer warns of memory it can't write.
    with _open(file) as image:
        data = bytearray(file.read_bytes())
        n_pixels = image.width * image.height
        mode = image.mode
    # The marker of a scan has a meaning in JPEGs only; elsewhere the two bytes are data.
    n_scans = data.count(SCAN_MARKER) if is_jpeg(data) else 1
    if n_pixels > MAX_PIXELS or n_scans > MAX_SCANS:
        raise ValueError(
            f"{image.width} x {image.height} pixels: at most {MAX_PIXELS // 1_000_000} million "
            f"are taken, in {MAX_SCANS} scans"
        )
    # Pillow would cut off all levels above 255.
    if mode.startswith(("I", "F")):
        raise ValueError("its grey levels have more than 8 bits")
    return data


def _open(file: Path) -> Image.Image:
    """Open a picture of a format that is read. Raises ValueError that says what another one is."""
    try:
        return Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError:
        with Image.open(file) as image:
            raise ValueError(f"it is a {image.format}, not a JPEG, PNG or WebP") from None


def is_jpeg(data: bytes | bytearray) -> bool:
    """Whether the content of a file begins as a JPEG does."""
    return data.startswith(JPEG_START)


def decode_rgb(data: bytes | bytearray) -> np.ndarray:
    """The content of a picture as (H, W, 3) uint8; of a transparent one the colours alone."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return np.array(image.convert("RGB"))


def undecodable(file: Path, error: Exception) -> UserError:
    """The error about an image that can't be decoded, to be raised."""
    return UserError(f"{file} can't be decoded ({reason(error)}): replace it by a fresh copy")


def read_rgb(file: Path) -> np.ndarray:
    """One picture as (H, W, 3) uint8. Raises UserError naming the file if it can't be decoded."""
    try:
        return decode_rgb(read_checked(file))
    except Exception as error:  # Pillow raises a dozen kinds at damaged files
        raise undecodable(file, error) from None


def decode_all(files: Sequence[Path], read: Callable[[Path], np.ndarray]) -> Iterator[np.ndarray]:
    """read(file) for each file in order, in threads, with a progress bar."""
    bar = tqdm(total=len(files), desc="decoding", unit="img", leave=False)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        # In chunks, so that decoding is never far ahead of what is written: the rest of a dataset
        # would wait in memory.
        for start in range(0, len(files), CHUNK):
            for array in pool.map(read, files[start : start + CHUNK]):
                yield array
                bar.update()
