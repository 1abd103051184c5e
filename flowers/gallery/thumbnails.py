"""Thumbnails and colour features of the whole dataset; and pictures that visitors bring."""

import io
import os
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from flowers import UserError, cache, colour, opencv_import, reason
from flowers.data import Flowers
from flowers.gallery.colours import colour_features
from flowers.images import MAX_PIXELS, MAX_SCANS, SCAN_MARKER, as_rgb

with opencv_import():
    import cv2

SIDE = 160  # pixels of a thumbnail
SLOT = 10_240  # bytes of a thumbnail in the cache file, filled up with zeros
QUALITIES = (78, 60, 40, 10)  # of the JPEG, until it fits into its slot
FORMAT = 2  # raise it when the stored bytes change
COLOURS = 256  # colour features of an image
RECENT = 1024  # thumbnails in memory while the cache file is being made
CHUNK = 64  # files handed to the threads at a time

# A visitor's picture is read into the server's memory and decoded at full size, perhaps one for
# each of many visitors: its limits are lower than those of the dataset's own files in images.py.
MAX_UPLOAD_BYTES = 10 << 20
MAX_UPLOAD_PIXELS = 40_000_000
# A strip would grow to thousands of columns when its short side is resized to the model's.
MAX_ASPECT = 20
JPEG_START = b"\xff\xd8"

# One lock for each cache file, so that two sessions do not make it twice.
_locks = defaultdict(threading.Lock)

# -----------------------------------------------------------------------------
# one picture


def thumbnail(file: Path) -> bytes:
    """Return the centre of an image as a JPEG of SIDE x SIDE pixels and at most SLOT bytes.

    Returns no bytes if the file can't be decoded.
    """
    try:
        data = file.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            n_pixels = image.width * image.height
            scans = data.count(SCAN_MARKER) if data.startswith(JPEG_START) else 1
            if n_pixels > MAX_PIXELS or scans > MAX_SCANS:
                return b""
            # The decoder itself goes to 1/2, 1/4 or 1/8 of the size: three times as fast.
            image.draft("RGB", (SIDE, SIDE))
            square = ImageOps.fit(as_rgb(image), (SIDE, SIDE))
    except Exception:  # Pillow raises a dozen kinds at damaged files; all mean: no picture
        return b""
    for quality in QUALITIES:
        out = io.BytesIO()
        square.save(out, "JPEG", quality=quality)
        if out.tell() <= SLOT:
            return out.getvalue()
    return b""


def read_thumbnail(jpeg: bytes) -> np.ndarray:
    """Decode a thumbnail to (H, W, 3) uint8 RGB. No bytes give one black pixel."""
    if not jpeg:
        return np.zeros((1, 1, 3), np.uint8)
    bgr = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    return bgr[..., ::-1]


def open_picture(data: bytes) -> np.ndarray:
    """Decode a picture from anywhere to (H, W, 3) uint8 RGB, upright as its EXIF data says.

    Transparent parts are white, and levels of 16 bits are scaled to 8, as images.read_rgb does.
    Raises UserError if it is too large, damaged, or not a JPEG, PNG or WebP.
    """
    if len(data) > MAX_UPLOAD_BYTES:
        megabytes = len(data) / 1e6
        raise UserError(
            f"this file has {megabytes:.0f} MB: at most {MAX_UPLOAD_BYTES >> 20} MB are taken"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own of large pictures; ours follows
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
                _check_upload(image, data)  # by the header, before anything is decoded
                # In place, as a copy would not know its format.
                ImageOps.exif_transpose(image, in_place=True)
                return np.array(as_rgb(image))
    except UserError:
        raise
    except Exception as error:  # Pillow raises a dozen kinds at damaged files
        raise UserError(
            f"this file can't be read as a picture ({reason(error)}): "
            "give a whole JPEG, PNG or WebP"
        ) from None


def _check_upload(image: Image.Image, data: bytes) -> None:
    """Raise UserError if a visitor's picture is not one to decode; data: the file."""
    short, long = sorted(image.size)
    if short * long > MAX_UPLOAD_PIXELS:
        raise UserError(
            f"this picture has {image.width} x {image.height} pixels: at most "
            f"{MAX_UPLOAD_PIXELS // 1_000_000} million are taken. Make it smaller"
        )
    if long > MAX_ASPECT * short:
        raise UserError(
            f"this picture has {image.width} x {image.height} pixels: a side may be at most "
            f"{MAX_ASPECT} times as long as the other. Cut it"
        )
    # The marker of a scan has a meaning in JPEGs only; elsewhere the two bytes are data.
    scans = data.count(SCAN_MARKER) if data.startswith(JPEG_START) else 1
    if scans > MAX_SCANS:
        raise UserError(
            f"this picture has {scans} scans (a progressive JPEG is stored in several, from coarse "
            f"to fine): at most {MAX_SCANS} are taken. Save it anew"
        )


# -----------------------------------------------------------------------------
# all pictures


class Thumbnails:
    """Thumbnails and colour features of a dataset, made once and stored in its cache folder.

    A thread makes them in the background. Until it is done, `thumbnails[i]` makes the JPEG of
    image i when it is asked for.

    Attributes:
        features: colour features (N, 256) float32, nan of damaged files; None until they are ready.
        problem: why they could not be stored; empty if nothing went wrong.
    """

    def __init__(self, flowers: Flowers):
        self.files = flowers.files
        self.root = flowers.root
        self.features = None
        self.problem = ""
        self._jpegs = None  # (N, SLOT) uint8, once the cache file is there
        # By the time of the file, too: one that was damaged may have been replaced.
        self._make_one = lru_cache(RECENT)(lambda file, modified: thumbnail(file))
        threading.Thread(target=self._make_all, daemon=True).start()

    def __getitem__(self, i: int) -> bytes:
        """Return the JPEG of image i; no bytes if its file is damaged."""
        if self._jpegs is not None:
            # A JPEG ends with 0xd9, so the zeros at the end are what filled its slot.
            jpeg = self._jpegs[i].tobytes().rstrip(b"\0")
            if jpeg:
                return jpeg
        file = self.files[i]
        try:
            return self._make_one(file, file.stat().st_mtime_ns)
        except OSError:  # gone
            return b""

    def jpegs(self, index: Sequence[int]) -> list[bytes]:
        """Return the JPEGs of the images at `index`, as `self[i]` does."""
        if self._jpegs is not None:
            return [self[i] for i in index]
        # As long as none are stored, they are made here.
        with ThreadPoolExecutor() as pool:
            return list(pool.map(self.__getitem__, index))

    def _make_all(self) -> None:
        """Load thumbnails and features from the cache folder, where they are made if missing."""
        n = len(self.files)
        try:
            key = cache.key_of(FORMAT, colour.FORMAT, SIDE, *self.files)
            jpegs_path = cache.array_path(self.root, "thumbnails", self.files)
            colours_path = cache.array_path(self.root, "thumbnail-hsv", self.files)
            if not jpegs_path.exists():
                time.sleep(1)  # the visitor's first page comes first
            with _locks[jpegs_path]:
                self._jpegs = cache.cached_array(jpegs_path, key, (n, SLOT), "|u1", self._jpeg_rows)
                features = cache.cached_array(
                    colours_path, key, (n, COLOURS), "<f4", self._colour_rows
                )
                features = np.array(features)  # in memory rather than mapped
                # A damaged file is like no picture, rather than like a black one.
                features[self._jpegs[:, 0] == 0] = np.nan
                self.features = features
        except OSError as error:  # a full disk, a vanished file: the pages go on without
            self.problem = f"Thumbnails could not be kept ({error}): pages are slower."
        except RuntimeError as error:
            if "shutdown" not in str(error):  # else the server stops, and no thread takes new work
                raise

    def _jpeg_rows(self) -> Iterator[np.ndarray]:
        """Yield each thumbnail's bytes, filled up with zeros, (SLOT,) uint8."""
        for jpeg in in_threads(thumbnail, self.files):
            yield np.frombuffer(jpeg.ljust(SLOT, b"\0"), np.uint8)

    def _colour_rows(self) -> Iterator[np.ndarray]:
        """Yield the colour features of each thumbnail, (COLOURS,) float32."""

        def features_of(i: int) -> np.ndarray:
            return colour_features(read_thumbnail(self[i]))

        yield from in_threads(features_of, range(len(self.files)))


def in_threads(function: Callable, items: Sequence) -> Iterable:
    """Yield function(item) of every item in order, at most CHUNK ahead of the reader."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(items), CHUNK):
            yield from pool.map(function, items[start : start + CHUNK])
