"""Images from disk as arrays, without torch: what exploration and the page need."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from flowers import UserError, opencv_import, reason

with opencv_import():
    import cv2

# A few bytes of header may claim 4,000 million pixels, and each scan of a JPEG decodes them anew.
MAX_PIXELS = 80_000_000
MAX_SCANS = 100
JPEG_START = b"\xff\xd8\xff"
SCAN_MARKER = b"\xff\xda"
END_MARKER = b"\xff\xd9"
# Anything but a byte 255 of compressed data (followed by 0) and the restarts within them.
MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
# As the file has it: what EXIF says of turning is left to who shows the picture.
AS_STORED = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
FORMATS = ("JPEG", "PNG", "WEBP")
# A strip would grow to thousands of columns when its short side is resized to the model's.
MAX_ASPECT = 100
CHUNK = 64  # files handed to the threads at a time


class UndecodableImage(UserError):
    """An image file that can't be decoded."""


def read_rgb(file: Path) -> np.ndarray:
    """A JPEG, PNG or WebP as (H, W, 3) uint8; transparent parts are white.

    What a file is, its content says and not its name. Raises UserError naming the file if it is
    something else, too large, a strip, or can't be decoded. JPEG has no checksum: damage within the
    compressed data shows only where it breaks the code.
    """
    try:
        # Opening reads the header only.
        with _open(file) as image:
            data = file.read_bytes()
            markers = _markers(data)
            _check_size(image, markers)
            if _is_for_opencv(image, markers):
                return _decode_jpeg(data)
            return np.array(as_rgb(image))
    except Exception as error:  # Pillow raises a dozen kinds at damaged files
        raise undecodable(file, error) from None


def _markers(data: bytes) -> list[bytes]:
    """The markers of a JPEG from its first scan on; none of another file, whose bytes are data."""
    if not data.startswith(JPEG_START):
        return []
    return MARKER.findall(data, data.find(SCAN_MARKER))


def _check_size(image: Image.Image, markers: Sequence[bytes]) -> None:
    """Raise ValueError if the size that a header claims is not one to decode.

    markers: those of the file.
    """
    short, long = sorted(image.size)
    n_scans = markers.count(SCAN_MARKER)
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


def _is_for_opencv(image: Image.Image, markers: Sequence[bytes]) -> bool:
    """Whether OpenCV decodes a file to Pillow's pixels, and refuses it if Pillow does.

    markers: those of the file.
    It takes less than half of the time. But it rounds CMYK in another way, and fills up with grey
    what a stray marker cuts off.
    """
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return False
    # Of several scans all are read before the first row is decoded. In a file of one scan there
    # is no marker between its start and the end.
    if image.info.get("progressive"):
        return True
    return markers == [SCAN_MARKER, END_MARKER]


def _decode_jpeg(data: bytes) -> np.ndarray:
    """The content of a JPEG as (H, W, 3) uint8. Raises ValueError if it can't be decoded."""
    rgb = cv2.imdecode(np.frombuffer(data, np.uint8), AS_STORED)
    if rgb is None:
        raise ValueError("the JPEG is cut off or damaged")
    return rgb


def undecodable(file: Path, error: Exception) -> UndecodableImage:
    """The error about an image that can't be decoded, to be raised."""
    return UndecodableImage(
        f"{file} can't be decoded ({reason(error)}): replace it by a fresh copy"
    )


def read_picture(file: Path) -> np.ndarray:
    """A picture in any format that Pillow reads, as (H, W, 3) uint8, upright as its EXIF data says.

    Of a moving picture the first frame; transparent parts are white; levels of 16 bits are scaled
    to 8. The pixels of a JPEG are those of read_rgb. Raises UserError naming the file if it can't
    be decoded, is too large or a strip.
    """
    try:
        with Image.open(file, formats=_formats()) as image:
            _check_size(image, _markers(file.read_bytes()))
            # In place, as a copy would not know its format.
            ImageOps.exif_transpose(image, in_place=True)
            return np.array(as_rgb(image))
    except Exception as error:  # Pillow raises a dozen kinds at damaged files
        raise undecodable(file, error) from None


def _formats() -> list[str]:
    """The formats that Pillow opens, but EPS: that is a program, which Ghostscript would run."""
    Image.init()
    return [name for name in Image.OPEN if name != "EPS"]


def as_rgb(image: Image.Image) -> Image.Image:
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
