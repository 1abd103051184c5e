"""Images as one uint8 tensor, and batches of it that are augmented and normalised on the device.

CLIP's preprocessing is: resize the short side to R (bicubic, antialiased), crop the centre R x R,
scale, normalise. All but the last two steps are the same in every epoch and every run, so they are
done once per (images, R) and cached as (N, 3, R, R) uint8.

The pixels equal those of clip's own transform (PIL) up to rounding in the resize. The decoder is
the same; values are at most one level apart, but for about one in ten million that is two apart
(counted by benchmarks/pixels.py).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from flowers import cache, devices, images
from flowers.data import Flowers

# Raised when the stored bytes change, so that older caches are rebuilt.
FORMAT = 2

# openai/CLIP, clip/clip.py; of red, green and blue in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# -----------------------------------------------------------------------------
# from files to uint8


def load_pixels(flowers: Flowers, resolution: int) -> torch.Tensor:
    """All images of the dataset as (N, 3, R, R) uint8, memory-mapped from the cache.

    The cache is in `.cache/` beside the data, or in the user's cache folder where the data is
    read-only. It is made first if it is missing, damaged or stale. Raises UserError naming the file
    if an image can't be decoded.
    """
    array = cache.cached_array(
        cache.array_path(flowers.root, f"pixels-{resolution}", flowers.files),
        key(flowers, resolution),
        shape=(len(flowers.files), 3, resolution, resolution),
        dtype="|u1",
        rows=lambda: _decode_squares(flowers.files, resolution),
    )
    return torch.from_numpy(array)


def key(flowers: Flowers, resolution: int) -> bytes:
    """The cache key of the pixels: it changes with the files and the resolution."""
    return cache.key_of(FORMAT, resolution, *flowers.files)


def read_jpeg(file: Path) -> torch.Tensor:
    """One JPEG, PNG or WebP as (3, H, W) uint8. Raises as images.read_rgb does."""
    return torch.from_numpy(images.read_rgb(file)).movedim(-1, 0)


def read_square(file: Path, resolution: int) -> torch.Tensor:
    """One picture as (3, R, R) uint8: short side to R, centre crop. Raises as read_jpeg does."""
    return resize_and_crop(read_jpeg(file), resolution)


def resize_and_crop(image: torch.Tensor, resolution: int) -> torch.Tensor:
    """Short side to R, then the centre: (3, H, W) uint8 -> (3, R, R) uint8."""
    height, width, top, left = geometry(*image.shape[1:], resolution)
    batch = F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)
    return batch[0, :, top : top + resolution, left : left + resolution]


def geometry(height: int, width: int, resolution: int) -> tuple[int, int, int, int]:
    """The height and width to which a picture is resized, and the top and left of its R x R crop.

    Sizes are rounded as torchvision's Resize (down) and CenterCrop (half to even) do.
    """
    if width <= height:
        width, height = resolution, int(resolution * height / width)
    else:
        width, height = int(resolution * width / height), resolution
    top = round((height - resolution) / 2)
    left = round((width - resolution) / 2)
    return height, width, top, left


def _decode_squares(files: tuple[Path, ...], resolution: int) -> Iterator[np.ndarray]:
    """Each file as (3, R, R) uint8."""

    def read(file: Path) -> np.ndarray:
        return read_square(file, resolution).numpy()

    # Many files at a time with one torch thread each are faster than many threads for one file.
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from images.decode_all(files, read)
    finally:
        torch.set_num_threads(n_threads)


# -----------------------------------------------------------------------------
# from uint8 to batches


def to_device(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the GPU if it takes less than half of the free memory, else where it is."""
    if device.type != "cuda":
        return pixels
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return pixels.to(device) if pixels.nbytes < free_bytes / 2 else pixels


def get_batch(
    pixels: torch.Tensor,
    index: torch.Tensor,
    device: torch.device | str,
    augmentation: str = "none",
    generator: torch.Generator | None = None,
    rows: slice = slice(None),
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> torch.Tensor:
    """A batch of images as (B, 3, R, R) float32, augmented and normalised on the device.

    pixels: (N, 3, R, R) uint8, from load_pixels.
    index: (B,) int64, which images.
    augmentation: 'none'; 'flip' mirrors half of the images; 'crop' also shifts them by up to an
        eighth of the side, with reflection at the border.
    generator: of the random numbers, on the CPU.
    rows: return these rows of the batch only, as one of several processes does.
    mean, std: of red, green and blue in [0, 1], as the model was trained: model.mean, model.std.
    """
    batch_size = len(index)
    # index_select is ten times as fast on a CPU as pixels[index].
    index = devices.send(index[rows], pixels.device)
    batch = pixels.index_select(0, index)  # (b, 3, R, R), b of the B rows
    batch = devices.send(batch, device)

    # Random numbers are drawn on the CPU for the whole batch, and then cut down to `rows`: a seed
    # gives the same images on every device and with any number of processes.
    if augmentation == "crop":
        reach = pixels.shape[-1] // 8
        shifts = torch.randint(0, 2 * reach + 1, (2, batch_size, 1), generator=generator)
        batch = _shift(batch, devices.send(shifts[:, rows], device), reach)
    if augmentation != "none":
        mirrored = torch.randint(0, 2, (batch_size, 1, 1, 1), generator=generator, dtype=torch.bool)
        batch = torch.where(devices.send(mirrored[rows], device), batch.flip(-1), batch)
    return _normalise(batch, mean, std)


def _shift(batch: torch.Tensor, shifts: torch.Tensor, reach: int) -> torch.Tensor:
    """Pad images by `reach` on all sides and crop each R x R at its own corner.

    batch: (b, 3, R, R) uint8; shifts: (2, b, 1) int64, top and left of the crop, 0 ... 2 * reach.
    Returns (b, 3, R, R) uint8.
    """
    side = batch.shape[-1]
    # Reflection is not written for uint8.
    padded = F.pad(batch.float(), (reach,) * 4, mode="reflect").to(batch.dtype)

    steps = torch.arange(side, device=batch.device)  # (R,)
    y, x = shifts + steps  # (b, R) each: the rows and the columns of a crop
    image = torch.arange(len(batch), device=batch.device)

    # One gather instead of a loop over images. The three index tensors broadcast to (b, R, R); the
    # slice between them takes all channels, and numpy's rule puts that axis last: (b, R, R, 3).
    cropped = padded[image[:, None, None], :, y[:, :, None], x[:, None, :]]
    return cropped.movedim(-1, 1)


def _normalise(batch: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(b, 3, R, R) uint8 -> float32: mean and standard deviation become 0 and 1."""
    # (x - mean) / std as one multiply-add, in place: one pass over memory. Levels are 0 ... 255.
    centre = 255 * torch.tensor(mean)
    spread = 255 * torch.tensor(std)
    line = torch.stack([-centre / spread, 1 / spread]).view(2, 3, 1, 1)
    # A number for each of the R columns: a CPU takes several at a time from neighbours in memory.
    line = line.repeat(1, 1, 1, batch.shape[-1])  # (2, 3, 1, R), sent in one piece
    offset, slope = devices.send(line, batch.device)
    batch = batch.float()
    return torch.addcmul(offset, batch, slope, out=batch)
