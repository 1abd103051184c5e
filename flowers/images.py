"""Images from disk as arrays, without torch: what exploration and the page need."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from flowers import UserError, reason

# A few bytes of header may claim 4,000 million pixels, and each scan of a JPEG decodes them anew.
MAX_PIXELS = 80_000_000
MAX_SCANS = 100
SCAN_MARKER = b"\xff\xda"
JPEG_START = b"\xff\xd8\xff"
FORMATS = ("JPEG", "PNG", "WEBP")
# A strip would grow to thousands of columns when its short side is resized to the model's.
MAX_ASPECT = 100
CHUNK = 64  # files handed to the threads at a time


def read_checked(file: Path) -> bytearray:
    """The bytes of a JPEG, PNG or WebP whose header claims a size that can be decoded.

    What a file is, its content says and not its name. Raises ValueError if it is something else,
    too large or a strip, and whatever Pillow raises for a damaged header.
    """
    # Opening reads the header only. The bytes are read by Python, since torchvision's reader takes
    # no path outside of UTF-8; a bytearray, since torch.frombuffer warns of memory it can't write.
    with _open(file) as image:
        data = bytearray(file.read_bytes())
        _check_size(image, data)
    return data


def _check_size(image: Image.Image, data: bytes) -> None:
    """Raise ValueError if the size that a header claims is not one to decode; data: the file."""
    short, long = sorted(image.size)
    # The marker of a scan has a meaning in JPEGs only; elsewhere the two bytes are data.
    n_scans = data.count(SCAN_MARKER) if is_jpeg(data) else 1
    if short * long > MAX_PIXELS or n_scans > MAX_SCANS or long > MAX_ASPECT * short:
        raise ValueError(
            f"{image.width} x {image.height} pixels: at most {MAX_PIXELS // 1_000_000} million "
            f"are taken, in {MAX_SCANS} scans, and a side at most {MAX_ASPECT} times the other"
        )


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
    """The content of a picture as (H, W, 3) uint8; transparent parts are white."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return np.array(_as_rgb(image))


def undecodable(file: Path, error: Exception) -> UserError:
    """The error about an image that can't be decoded, to be raised."""
    return UserError(f"{file} can't be decoded ({reason(error)}): replace it by a fresh copy")


def read_rgb(file: Path) -> np.ndarray:
    """One picture as (H, W, 3) uint8. Raises UserError naming the file if it can't be decoded."""
    try:
        return decode_rgb(read_checked(file))
    except Exception as error:  # Pillow raises a dozen kinds at damaged files
        raise undecodable(file, error) from None


def read_picture(file: Path) -> np.ndarray:
    """A picture in any format that Pillow reads, as (H, W, 3) uint8, upright as its EXIF data says.

    Of a moving picture the first frame; transparent parts are white; levels of 16 bits are scaled
    to 8. The pixels of a JPEG are those of read_rgb. Raises UserError naming the file if it can't
    be decoded, is too large or a strip.
    """
    try:
        with Image.open(file, formats=_formats()) as image:
            _check_size(image, file.read_bytes())
            # In place, as a copy would not know its format.
            ImageOps.exif_transpose(image, in_place=True)
            return np.array(_as_rgb(image))
    except Exception as error:  # Pillow raises a dozen kinds at damaged files
        raise undecodable(file, error) from None


def _formats() -> list[str]:
    """The formats that Pillow opens, but EPS: that is a program, which Ghostscript would run."""
    Image.init()
    return [name for name in Image.OPEN if name != "EPS"]


def _as_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode in RGB. Raises ValueError where its levels have no known range."""
    # Pillow cuts 16 bits off at 255 when it converts them, so they are scaled here. Older versions
    # read them as integers of 32 bits, of which PNG and PPM have none.
    is_16_bit = image.mode.startswith("I;16")
    is_16_bit |= image.mode == "I" and image.format in ("PNG", "PPM")
    if is_16_bit:
        levels = np.asarray(image) / 257  # 65,535 becomes 255
        return Image.fromarray(levels.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its levels have 32 bits, and no file says which of them is white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


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
