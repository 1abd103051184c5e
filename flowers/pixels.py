"""Images become one uint8 tensor, once; batches of it are normalised and augmented on the device.

CLIP's preprocessing is: resize the short side to R (bicubic, antialiased), crop the centre R x R, scale, normalise. All but the last
two steps are the same in every epoch and for every run, so they are done once per (images, R) and kept as (N, 3, R, R) uint8.
The pixels equal those of clip's own transform (PIL) up to rounding in the resize: the same decoder, at most one level apart but for
about one value in ten million, which is two apart (benchmarks/pixels.py counts them).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.io import ImageReadMode, decode_jpeg

from flowers import cache, images
from flowers.data import Flowers

FORMAT = 2  # raise it when the stored bytes change, so that older caches are rebuilt
CLIP_MEAN, CLIP_STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # openai/CLIP, clip/clip.py


def load_pixels(flowers: Flowers, resolution: int) -> torch.Tensor:
    """All images as (N, 3, R, R) uint8, memory-mapped from the cache, which is made first if it is missing, damaged or stale.

    The cache lies in `.cache/` beside the data, or in the user's cache folder where the data is read-only. Raises UserError naming
    the file if an image can't be decoded.
    """
    shape = (len(flowers.files), 3, resolution, resolution)
    return torch.from_numpy(
        cache.cached_array(
            cache.array_path(flowers.root, f"pixels-{resolution}", flowers.files),
            key(flowers, resolution),
            shape,
            "|u1",
            lambda: _decode_squares(flowers.files, resolution),
        )
    )


def key(flowers: Flowers, resolution: int) -> bytes:
    """What the pixels depend on."""
    return cache.key_of(FORMAT, resolution, *flowers.files)


def read_jpeg(file: Path) -> torch.Tensor:
    """One JPEG as (3, H, W) uint8. Raises UserError naming the file if it can't be decoded, or is too large.

    JPEG has no checksum: of damage within the compressed data only what breaks the code shows.
    """
    try:
        data = images.read_checked(file)
        return decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), mode=ImageReadMode.RGB)
    except Exception as error:  # a dozen kinds at damaged files
        raise images.undecodable(file, error) from None


def read_square(file: Path, resolution: int) -> torch.Tensor:
    """One JPEG as (3, R, R) uint8: short side to R, centre crop, sizes rounded as torchvision's Resize and CenterCrop do."""
    return resize_and_crop(read_jpeg(file), resolution)


def resize_and_crop(image: torch.Tensor, resolution: int) -> torch.Tensor:
    """(3, H, W) uint8 -> (3, R, R): the second half of `decode`, for a picture that is no file of the dataset."""
    height, width = image.shape[1:]
    if width <= height:
        width, height = resolution, int(resolution * height / width)
    else:
        width, height = int(resolution * width / height), resolution
    image = F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]
    top, left = round((height - resolution) / 2), round((width - resolution) / 2)
    return image[:, top : top + resolution, left : left + resolution]


def get_batch(
    pixels: torch.Tensor,
    index: torch.Tensor,
    device: torch.device | str,
    augmentation: str = "none",
    generator: torch.Generator | None = None,
    rows: slice = slice(None),
) -> torch.Tensor:
    """The images at `index` (B,) as (B, 3, R, R) float32, augmented and normalised on the device; with `rows`, only those of the batch.

    augmentation: 'none'; 'flip' mirrors half of them; 'crop' also shifts them by up to an eighth of the side, reflected at the border.
    Random numbers come from `generator` (CPU) for the whole batch, so that a seed gives the same images on every device and rank.
    """
    n, side = len(index), pixels.shape[-1]
    images = pixels.index_select(0, index[rows].to(pixels.device)).to(
        device, non_blocking=True
    )  # on a CPU ten times as fast as pixels[index]
    if augmentation == "crop":
        reach = side // 8
        offsets = torch.randint(0, 2 * reach + 1, (2, n, 1), generator=generator)[:, rows].to(
            device
        ) + torch.arange(side, device=device)
        padded = F.pad(images.float(), (reach,) * 4, mode="reflect").to(
            images.dtype
        )  # reflection is not written for uint8
        images = padded[
            torch.arange(len(images), device=device)[:, None, None],
            :,
            offsets[0][:, :, None],
            offsets[1][:, None, :],
        ].movedim(-1, 1)
    if augmentation != "none":
        mirrored = torch.randint(0, 2, (n, 1, 1, 1), generator=generator, dtype=torch.bool)[
            rows
        ].to(device)
        images = torch.where(mirrored, images.flip(-1), images)
    mean, std = (255 * torch.tensor(v, device=device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    images = images.float()
    return torch.addcmul(-mean / std, images, 1 / std, out=images)


def to_device(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The whole tensor on the GPU if it takes less than half of what is free there, else where it is."""
    fits = device.type == "cuda" and pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    return pixels.to(device) if fits else pixels


def _decode_squares(files: tuple[Path, ...], resolution: int) -> Iterator[np.ndarray]:
    """Each file as (3, R, R) uint8, one torch thread a file: that beats many threads for one file."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from images.decode_all(files, lambda file: read_square(file, resolution).numpy())
    finally:
        torch.set_num_threads(threads)
