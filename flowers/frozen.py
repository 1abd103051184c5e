"""What the frozen part of a model makes of images and texts: computed once, kept in `.cache/`, used by every epoch and every run.

A kept array has the precision that the model computes in (fp32 on a CPU, bf16 under autocast), so that training from it gives the
losses and gradients of training without it.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from clip.model import CLIP

from flowers import UserError, cache, devices, pixels
from flowers.data import Flowers
from flowers.models import progress_chunks, split_image_tower, split_text_tower

MOST_BYTES = 50 << 30  # kept in one cache folder; beyond it what was used least recently goes


def image_activations(
    model: CLIP,
    flowers: Flowers,
    images: torch.Tensor,
    index: torch.Tensor,
    blocks: int = 0,
    augment: str = "none",
    seed: int = 0,
    view: int = 0,
) -> torch.Tensor:
    """What enters the last `blocks` blocks of the image tower, (n, tokens, width) or (n, channels, side, side), for the images at index (n,).

    blocks = 0: the features (n, D), of length 1. images: the dataset's pixels, (N, 3, R, R); augment, seed and view say which augmented view.
    Raises UserError if the disk is full.
    """
    device = model.logit_scale.device
    trunk, _ = split_image_tower(model, blocks)
    frozen = {
        n: t
        for n, t in model.visual.state_dict(keep_vars=True).items()
        if blocks == 0 or not t.requires_grad
    }
    key = cache.key_of(
        "images",
        fingerprint(frozen),
        pixels.key(flowers, images.shape[-1]),
        index.tolist(),
        blocks,
        augment,
        [seed, view] if augment != "none" else None,
        device.type,
    )

    def compute():
        draw = devices.generator(seed, view)
        for part in progress_chunks(index, "encoding images"):
            yield trunk(pixels.get_batch(images, part, device, augment, draw))

    return _kept(
        flowers.root,
        key,
        len(index),
        lambda: trunk(pixels.get_batch(images, index[:1], device)),
        compute,
    )


def text_activations(
    model: CLIP, flowers: Flowers, tokens: torch.Tensor, blocks: int = 0
) -> torch.Tensor:
    """The same for texts (P, L): what enters the last `blocks` blocks of the text tower, (P, L, width), or with 0 the features (P, D)."""
    device = model.logit_scale.device
    trunk, _ = split_text_tower(model, blocks)
    frozen = {
        n: t
        for n, t in model.state_dict(keep_vars=True).items()
        if not n.startswith("visual.")
        and n != "logit_scale"
        and (blocks == 0 or not t.requires_grad)
    }
    key = cache.key_of(
        "texts", fingerprint(frozen), fingerprint({"tokens": tokens}), blocks, device.type
    )
    return _kept(
        flowers.root,
        key,
        len(tokens),
        lambda: trunk(tokens[:1].to(device)),
        lambda: (trunk(part.to(device)) for part in progress_chunks(tokens, "encoding texts")),
    )


def fingerprint(state: dict[str, torch.Tensor]) -> bytes:
    """SHA-256 of names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.digest()


@torch.inference_mode()
def _kept(
    root: Path, key: bytes, n: int, one: Callable[[], torch.Tensor], compute: Callable
) -> torch.Tensor:
    """The rows that compute() yields in pieces, (n, ...), memory-mapped from the cache; `one` makes a first row, to know shape and precision."""
    row = one()
    shape = (n, *row.shape[1:-1], row.shape[-1] * row.element_size())  # as bytes: numpy has no bf16
    path = cache.cache_folder(root) / f"frozen-{key.hex()[:16]}.npy"
    _make_room(path, int(np.prod(shape)))
    try:
        data = cache.cached_array(
            path,
            key,
            shape,
            "|u1",
            lambda: (piece.cpu().contiguous().view(torch.uint8).numpy() for piece in compute()),
        )
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(
            f"{path.parent} has no room for {np.prod(shape) / 2**30:.1f} GiB: free some, or use --no_cache"
        ) from None
    with contextlib.suppress(PermissionError):  # of another user's file
        os.utime(path)
    return torch.from_numpy(data).view(row.dtype)


def _make_room(path: Path, size: int) -> None:
    """Remove what was used least recently, if the kept arrays and a new one of `size` bytes exceed MOST_BYTES or the disk."""
    if path.exists():
        return
    kept = sorted(path.parent.glob("frozen-*.npy"), key=lambda p: p.stat().st_mtime)
    total = size + sum(p.stat().st_size for p in kept)
    while kept and (total > MOST_BYTES or shutil.disk_usage(path.parent).free < size):
        total -= kept[0].stat().st_size
        kept.pop(0).unlink(missing_ok=True)
