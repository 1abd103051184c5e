"""What the frozen vision tower makes of the images, computed once and kept beside the data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from flowers import cache
from flowers.data import Flowers
from flowers.qwen.models import base_model
from flowers.qwen.prompts import move, open_images, patches, prefetch


@dataclass(frozen=True)
class ImageFeatures:
    """The image tokens of N images.

    tokens: (T, D), those of all images one after the other. offsets: (N + 1,), where each image's
    tokens begin, and T. grids: (N, 3), the `image_grid_thw` of each.
    """

    tokens: torch.Tensor
    offsets: torch.Tensor
    grids: torch.Tensor

    def batch(self, positions: list[int]) -> dict[str, torch.Tensor]:
        """Return what `hidden_states` takes of the images at some positions (0 to N - 1)."""
        tokens = [self.tokens[self.offsets[i] : self.offsets[i + 1]] for i in positions]
        return {"features": torch.cat(tokens), "image_grid_thw": self.grids[positions]}


@torch.inference_mode()
def image_features(
    model, processor, flowers: Flowers, index: np.ndarray, vision_digest: str, batch_size: int = 8
) -> ImageFeatures:
    """Return the features of the images at `index`: from the cache if they are there.

    vision_digest: of the vision tower's weights; other weights have other features.
    """
    network = base_model(model)
    files = [flowers.files[i] for i in index]
    # How many tokens an image has is known from its size, before it is decoded.
    grids = torch.tensor(_grids_of_files(processor.image_processor, files))  # (N, 3)
    # The vision tower merges merge_size x merge_size patches into one token.
    tokens_per_image = grids.prod(1) // processor.image_processor.merge_size**2  # (N,)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), tokens_per_image.cumsum(0)])

    # Everything that the features depend on: another digest, size or file makes them anew.
    size = processor.image_processor.size
    key = cache.key_of(
        "qwen features",
        vision_digest,
        size["shortest_edge"],
        size["longest_edge"],
        str(network.dtype),
        *files,
    )
    path = cache.cache_folder(flowers.root) / f"qwen-{key.hex()[:12]}.npy"
    # Kept as bytes: numpy has no bf16, and fp16 would overflow.
    width = network.config.get_text_config().hidden_size
    shape = (int(offsets[-1]), width * network.dtype.itemsize)
    data = cache.cached_array(
        path, key, shape, "|u1", lambda: _compute_features(network, processor, files, batch_size)
    )
    return ImageFeatures(torch.from_numpy(data).view(network.dtype), offsets, grids)


def _grids_of_files(image_processor, files: Sequence[Path]) -> list[list[int]]:
    """Return [1, height, width] in patches for each file."""
    factor = image_processor.patch_size * image_processor.merge_size
    min_pixels = image_processor.size["shortest_edge"]
    max_pixels = image_processor.size["longest_edge"]
    grids = []
    for file in files:
        # PIL reads the header now, and the pixels only when they are needed.
        with Image.open(file) as image:
            height, width = smart_resize(image.height, image.width, factor, min_pixels, max_pixels)
        grids.append([1, height // image_processor.patch_size, width // image_processor.patch_size])
    return grids


def _compute_features(
    network, processor, files: Sequence[Path], batch_size: int
) -> Iterator[np.ndarray]:
    """Yield the features of a batch of files after the other, (tokens, bytes of a token)."""
    batches = [files[i : i + batch_size] for i in range(0, len(files), batch_size)]
    images = prefetch(lambda batch: patches(processor, open_images(batch)), batches)
    bar = tqdm(
        images,
        total=len(batches),
        desc="image features",
        unit="img",
        unit_scale=batch_size,
        leave=False,
    )
    for image in bar:
        # The processor's two tensors: patches of all images, and their grids.
        inputs = move(image, network.device)
        output = network.model.get_image_features(**inputs, return_dict=True)
        features = torch.cat(list(output.pooler_output)).to(network.dtype).cpu()  # (tokens, D)
        yield features.view(torch.uint8).numpy()
