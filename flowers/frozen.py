"""Activations behind the frozen part of a model: computed once, and kept in `.cache/`.

Every epoch and every run reads it from there. The arrays have the type that the model gives them
(fp32 on a CPU; under autocast bf16 within the image tower, while the text tower adds to embeddings
of fp32), so training from them gives the losses and gradients of training without them.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from flowers import cache, devices, pixels
from flowers.data import Flowers
from flowers.models import (
    CLIP,
    LOSS_PARAMETERS,
    Cut,
    progress_chunks,
    settings_of,
    split_image_tower,
    split_text_tower,
)


def image_activations(
    model: CLIP,
    flowers: Flowers,
    images: torch.Tensor,
    index: torch.Tensor,
    cut: Cut = 0,
    augment: str = "none",
    seed: int = 0,
    view: int = 0,
) -> torch.Tensor:
    """What the image tower computes before a cut, for the images at `index` (n,).

    Returns the result of the trunk of split_image_tower: (n, tokens, width), of a ResNet (n,
    channels, side, side); what enters the projection, (n, width) or (n, channels); or, with a cut
    of 0, the features (n, D), of length 1.

    images: the pixels of the dataset, (N, 3, R, R) uint8.
    augment, seed, view: how the images are augmented; each view is another random augmentation.
    Raises UserError if the disk is full.
    """
    device = model.logit_scale.device
    trunk, _ = split_image_tower(model, cut)
    # The key says all that the result depends on, so other weights or images have another file.
    tower = model.visual.state_dict(keep_vars=True)
    weights = fingerprint(_frozen_weights(tower, cut))
    pixel_key = pixels.key(flowers, images.shape[-1])
    # Without augmentation, seed and view make no difference.
    random = None if augment == "none" else [seed, view]
    settings = settings_of(model)  # activation, heads, normalisation
    key = cache.key_of(
        "images",
        weights,
        settings,
        pixel_key,
        index.tolist(),
        cut,
        augment,
        random,
        _arithmetic(device),
    )
    normalisation = {"mean": settings.mean, "std": settings.std}

    def activations() -> Iterator[torch.Tensor]:
        # Of this array alone, so that it is the same whenever and for whichever run it is made.
        generator = devices.generator(seed, view)
        for part in progress_chunks(index, "encoding images"):
            batch = pixels.get_batch(images, part, device, augment, generator, **normalisation)
            yield trunk(batch)

    def first_row() -> torch.Tensor:
        return trunk(pixels.get_batch(images, index[:1], device, **normalisation))

    return _cached_rows(flowers.root, key, len(index), first_row, activations)


def text_activations(
    model: CLIP, flowers: Flowers, tokens: torch.Tensor, blocks: int = 0
) -> torch.Tensor:
    """What enters the last `blocks` blocks of the text tower, for the texts `tokens` (P, L).

    Returns (P, L, width); with blocks = 0 the features (P, D), of length 1.
    Raises UserError if the disk is full.
    """
    device = model.logit_scale.device
    trunk, _ = split_text_tower(model, blocks)
    # All parameters outside the image tower, but for those of the loss.
    tower = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not name.startswith("visual.") and name not in LOSS_PARAMETERS:
            tower[name] = tensor
    weights = fingerprint(_frozen_weights(tower, blocks))
    settings = settings_of(model)  # activation and heads
    texts = fingerprint({"tokens": tokens})
    key = cache.key_of("texts", weights, settings, texts, blocks, _arithmetic(device))

    def activations() -> Iterator[torch.Tensor]:
        for part in progress_chunks(tokens, "encoding texts"):
            yield trunk(part.to(device))

    def first_row() -> torch.Tensor:
        return trunk(tokens[:1].to(device))

    return _cached_rows(flowers.root, key, len(tokens), first_row, activations)


def fingerprint(state: dict[str, torch.Tensor]) -> bytes:
    """SHA-256 of the names, shapes, types and values of a state dict: 32 bytes."""
    digest = hashlib.sha256()
    # Sorted, because the order of a state dict depends on the order in which modules were made.
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        # As bytes, because numpy has no bf16.
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.digest()


def _arithmetic(device: torch.device) -> str:
    """Device and precision as a part of a key: both change the last digits, or more."""
    precision = devices.precision_of(device)
    # Arrays that were made before there was a choice have the device alone in their keys.
    only_choice = {"cpu": "fp32", "cuda": "bf16"}
    if precision == only_choice.get(device.type):
        return device.type
    return f"{device.type} {precision}"


def _frozen_weights(tower: dict[str, torch.Tensor], cut: Cut) -> dict[str, torch.Tensor]:
    """The weights that activations depend on: all of a frozen tower, else those not trained."""
    # The trained weights of a tower come after the cut.
    if cut == 0:
        return tower
    return {name: tensor for name, tensor in tower.items() if not tensor.requires_grad}


@torch.inference_mode()
def _cached_rows(
    root: Path,
    key: bytes,
    n: int,
    first_row: Callable[[], torch.Tensor],
    activations: Callable[[], Iterable[torch.Tensor]],
) -> torch.Tensor:
    """The n rows that activations() yields in pieces, (n, ...), memory-mapped from the cache.

    first_row: makes one row, (1, ...), which tells the shape and the precision.
    """
    # Computed also where the array is cached: it costs little, and nothing else tells its shape.
    row = first_row()
    # Stored as bytes, because numpy has no bf16.
    shape = (n, *row.shape[1:-1], row.shape[-1] * row.element_size())
    path = cache.cache_folder(root) / f"frozen-{key.hex()[:16]}.npy"

    def as_bytes() -> Iterator[np.ndarray]:
        for piece in activations():
            yield piece.cpu().contiguous().view(torch.uint8).numpy()

    data = cache.bounded_array(path, key, shape, as_bytes, advice=", or use --no_cache")
    return torch.from_numpy(data).view(row.dtype)
