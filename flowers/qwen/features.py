"""What the frozen vision tower makes of the images, computed once and kept beside the data.

A run keeps the features of its images in a pack: the array qwen-*.npy, and beside it a .json that
says which images are in it. Later runs take from all packs what they need, and add one with the
images that are in none: other splits, subsets and seeds share the rest.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from flowers import cache, files
from flowers.data import Flowers
from flowers.qwen.adapters import base_model
from flowers.qwen.models import feature_width, vision_digest, vision_features
from flowers.qwen.prompts import Tensors, move, open_images, patches, prefetch

PORTION = 512  # images whose features are computed before any of them is used, in evaluation


@dataclass(frozen=True)
class ImageFeatures:
    """The image tokens of N images.

    tokens: N tensors (T, feature_width), one an image. grids: (N, 3), the `image_grid_thw` of each.
    """

    tokens: list[torch.Tensor]
    grids: torch.Tensor

    def batch(self, positions: list[int]) -> Tensors:
        """Return what `hidden_states` takes of the images at some positions (0 to N - 1)."""
        features = torch.cat([self.tokens[i] for i in positions])
        return {"features": features, "image_grid_thw": self.grids[positions]}


@torch.inference_mode()
def image_features(
    model, processor, flowers: Flowers, index: np.ndarray, digest: str, batch_size: int = 8
) -> ImageFeatures:
    """Return the features of the images at `index`: from the cache where they are there.

    digest: of the vision tower's weights (`vision_digest`); other weights have other features.
    Raises UserError if the disk is full.
    """
    network = base_model(model)
    image_files = [flowers.files[i] for i in index]
    # How many tokens an image has is known from its size, before it is decoded.
    grids = torch.tensor(_grids_of_files(processor.image_processor, image_files))  # (N, 3)
    # The vision tower merges merge_size x merge_size patches into one token.
    n_tokens = (grids.prod(1) // processor.image_processor.merge_size**2).tolist()

    settings = _settings_key(network, processor, digest)
    keys = []
    for file in image_files:
        # By its place, too: files of one name lie in several folders.
        place = os.path.relpath(file, flowers.root)
        keys.append(cache.key_of(settings, place, file).hex())

    # Kept as bytes: numpy has no bf16, and fp16 would overflow.
    width = feature_width(model) * network.dtype.itemsize
    folder = cache.cache_folder(flowers.root)
    title = f"qwen-{settings.hex()[:12]}"
    kept = _read_packs(folder, title, width, set(keys))
    missing = {}
    for key, file, count in zip(keys, image_files, n_tokens):
        if key not in kept:
            missing[key] = (file, count)
    if missing:
        counts = {key: count for key, (_, count) in missing.items()}
        batches = _batches([file for file, _ in missing.values()], batch_size)
        name = f"{title}-{cache.key_of(*missing).hex()[:12]}"
        path = folder / f"{name}.npy"
        kept |= _make_pack(path, counts, width, lambda: _compute(network, processor, batches))
    tokens = [torch.from_numpy(kept[key]).view(network.dtype) for key in keys]
    return ImageFeatures(tokens, grids)


def load_images(
    model,
    processor,
    flowers: Flowers,
    index: Sequence[int],
    batch_size: int,
    digest: str | None,
) -> Iterator[tuple[Tensors, Sequence[int]]]:
    """Yield images, as `hidden_states` takes them, with their part of `index`, batch by batch.

    digest: as for `image_features`, which keeps them in portions, so that a kill costs no
    more than one; None for pixels. Raises UserError for a damaged image or a full disk.
    """
    if digest is None:
        batches = _batches(index, batch_size)
        load = lambda batch: patches(processor, open_images([flowers.files[i] for i in batch]))
        yield from zip(prefetch(load, batches), batches)
        return
    for portion in _batches(index, PORTION):
        features = image_features(
            model, processor, flowers, np.asarray(portion), digest, batch_size
        )
        for positions in _batches(range(len(portion)), batch_size):
            yield features.batch(positions), [portion[j] for j in positions]


def digest_to_keep(model, processor, flowers: Flowers, index: Sequence[int]) -> str | None:
    """Return the digest of the vision tower if the features of these images are worth keeping.

    None for a tower that an adapter has trained, which no other run has, and where they would fill
    more than half of what the cache may hold.
    """
    network = base_model(model)
    if any("modules_to_save" in name for name, _ in network.model.visual.named_parameters()):
        return None
    image_processor = processor.image_processor
    grids = _grids_of_files(image_processor, [flowers.files[i] for i in index])
    n_tokens = sum(t * h * w for t, h, w in grids) // image_processor.merge_size**2
    n_bytes = n_tokens * feature_width(model) * network.dtype.itemsize
    return vision_digest(model) if n_bytes <= cache.MAX_BYTES / 2 else None


def _settings_key(network, processor, digest: str) -> bytes:
    """A key of everything that features depend on, but for the image."""
    size = processor.image_processor.size
    return cache.key_of(
        "qwen features",
        digest,
        size["shortest_edge"],
        size["longest_edge"],
        processor.image_processor.to_json_string(),  # how pixels are scaled and normalised
        str(network.dtype),
        network.device.type,
    )


# -----------------------------------------------------------------------------
# packs


def _read_packs(folder: Path, title: str, width: int, wanted: set[str]) -> dict[str, np.ndarray]:
    """Return the bytes (T, width) of images by their keys, from all whole packs with wanted ones.

    What is damaged is left out, to be made anew.
    """
    kept = {}
    for index_file in sorted(folder.glob(f"{title}-*.json")):
        try:
            counts = files.read_json(index_file)["images"]
            shape = (sum(counts.values()), width)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if wanted.isdisjoint(counts):
            continue
        path = index_file.with_suffix(".npy")
        data = cache.open_array(path, cache.key_of(counts), shape, "|u1")
        if data is not None:
            cache.touch(path)
            kept |= _split(data, counts)
    return kept


def _make_pack(path: Path, counts: dict[str, int], width: int, rows) -> dict[str, np.ndarray]:
    """Compute the features of images, keep them in a pack, and return them by the images' keys.

    counts: how many tokens the image of a key has, in the order of `rows`.
    """
    shape = (sum(counts.values()), width)
    data = cache.bounded_array(path, cache.key_of(counts), shape, rows)
    # After the array: a pack that is said to be there is whole.
    files.write_json(path.with_suffix(".json"), {"images": counts})
    return _split(data, counts)


def _split(data: np.ndarray, counts: dict[str, int]) -> dict[str, np.ndarray]:
    """Return the rows of each image, by its key; they stay memory-mapped."""
    ends = np.cumsum(list(counts.values()))
    return dict(zip(counts, np.split(data, ends[:-1])))


# -----------------------------------------------------------------------------
# computing


def _batches(items: Sequence, batch_size: int) -> list[Sequence]:
    return [items[i : i + batch_size] for i in range(0, len(items), batch_size)]


def _grids_of_files(image_processor, image_files: Sequence[Path]) -> list[list[int]]:
    """Return [1, height, width] in patches for each file."""
    factor = image_processor.patch_size * image_processor.merge_size
    min_pixels = image_processor.size["shortest_edge"]
    max_pixels = image_processor.size["longest_edge"]
    grids = []
    for file in image_files:
        # PIL reads the header now, and the pixels only when they are needed.
        with Image.open(file) as image:
            height, width = smart_resize(image.height, image.width, factor, min_pixels, max_pixels)
        grids.append([1, height // image_processor.patch_size, width // image_processor.patch_size])
    return grids


def _compute(network, processor, batches: list[Sequence[Path]]) -> Iterator[np.ndarray]:
    """Yield the features of a batch of files after the other, (tokens, bytes of a token)."""
    images = prefetch(lambda batch: patches(processor, open_images(batch)), batches)
    bar = tqdm(
        images,
        total=len(batches),
        desc="image features",
        unit="img",
        unit_scale=len(batches[0]),
        leave=False,
    )
    for image in bar:
        # The processor's two tensors: patches of all images, and their grids.
        inputs = move(image, network.device)
        features = vision_features(network, inputs).to(network.dtype).cpu()
        yield features.view(torch.uint8).numpy()
