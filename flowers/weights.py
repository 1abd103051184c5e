"""A model from any checkpoint that people have: loaded right, or refused.

OpenAI's weights by name, an archive of theirs, a state dict, or a run folder. Weights are fp32
whatever the file holds: AdamW on fp16 weights gives NaN after a step.
"""

import hashlib
import math
import os
import zipfile
from http.client import HTTPException
from pathlib import Path

import torch

from flowers import UserError, reason
from flowers.download import patience
from flowers.files import load_tensors
from flowers.models import CLIP, RANDOM, Shape, build, build_shape, clip

# Not weights, but in the state dicts of OpenAI's archives.
EXTRA_KEYS = ("input_resolution", "context_length", "vocab_size")
# All of CLIP's text towers have heads of this width.
TEXT_HEAD_WIDTH = 64
# A ResNet's image is 32 times as large, in each direction, as the map that it pools.
RESNET_STRIDE = 32


def load_model(architecture: str, device: torch.device | str = "cpu") -> CLIP:
    """A CLIP in fp32 and eval mode, so that a ResNet's BatchNorm keeps its statistics.

    architecture: `tiny` or `tiny-rn` (random weights), a name of clip.available_models()
        (downloaded, SHA-256-checked), or the path of a state dict, an archive of OpenAI's, or a run
        folder.

    Raises UserError if the name is unknown, the download fails, or the file is not a CLIP.
    """
    path = Path(architecture)
    if path.is_dir():
        path = path / "model.pt"

    # Names come first: a file that is called like a model is not asked about.
    if architecture in RANDOM:
        model = build(architecture)
    elif architecture in clip.available_models():
        model = _download(architecture)
    elif not path.exists():
        known = ", ".join([*RANDOM, *clip.available_models()])
        raise UserError(f"no model {architecture}: give a path, or one of {known}")
    elif _is_torchscript(path):
        model = _load_openai_archive(path)
    else:
        model = from_state_dict(load_tensors(path), str(path))
    return model.float().eval().to(device)


def from_state_dict(state: dict[str, torch.Tensor], origin: str = "state dict") -> CLIP:
    """Build the model that a state dict of OpenAI's CLIP describes, in fp32 and eval mode.

    clip.load does the same, but rounds the weights to fp16.

    origin: where the state dict comes from, for the message.
    Raises UserError if it is not the state dict of a CLIP.
    """
    try:
        weights = {name: tensor for name, tensor in state.items() if name not in EXTRA_KEYS}
        _refuse_other_kinds(weights)
        context = weights["positional_embedding"].shape[0]
        vocabulary = weights["token_embedding.weight"].shape[0]
        model = build_shape(read_shape(weights), context, vocabulary)
        model.load_state_dict(weights)
    except Exception as error:  # torch raises many kinds at what is no state dict of a CLIP
        hint = ""
        if "optimizer" in state:
            hint = " (it looks like a checkpoint to resume from: give model.pt)"
        raise UserError(
            f"{origin} is not the state dict of a CLIP{hint}: "
            f"{type(error).__name__} {reason(error)}"
        ) from None
    return model.eval()


def read_shape(weights: dict[str, torch.Tensor]) -> Shape:
    """The shape of the CLIP that has these weights. Raises KeyError if some are missing."""
    embedding = weights["text_projection"].shape[1]  # (text width, D)
    text_width = weights["positional_embedding"].shape[1]  # (context, text width)
    text_layers = _count(weights, "transformer.resblocks.")

    if "visual.proj" in weights:  # a ViT
        kernel = weights["visual.conv1.weight"]  # (width, 3, patch, patch)
        patch = kernel.shape[-1]
        width = kernel.shape[0]
        layers = _count(weights, "visual.transformer.resblocks.")
        # One position for the class token, and one for each patch: (1 + side * side, width).
        positions = weights["visual.positional_embedding"].shape[0]
        resolution = math.isqrt(positions - 1) * patch
    else:  # a ResNet
        patch = None
        width = weights["visual.layer1.0.conv1.weight"].shape[0]  # (width, width, 1, 1)
        layers = tuple(_count(weights, f"visual.layer{stage}.") for stage in (1, 2, 3, 4))
        # One position for the mean, and one for each cell of the last map.
        positions = weights["visual.attnpool.positional_embedding"].shape[0]
        resolution = math.isqrt(positions - 1) * RESNET_STRIDE

    return Shape(
        embedding=embedding,
        resolution=resolution,
        image_layers=layers,
        image_width=width,
        patch=patch,
        text_width=text_width,
        text_heads=text_width // TEXT_HEAD_WIDTH,
        text_layers=text_layers,
    )


def _count(weights: dict[str, torch.Tensor], prefix: str) -> int:
    """How many blocks there are under a prefix, by the number that follows it in the names."""
    numbers = {
        name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)
    }
    return len(numbers)


def _refuse_other_kinds(weights: dict[str, torch.Tensor]) -> None:
    """Raise ValueError for integers and booleans: load_state_dict would convert them silently."""
    for name, tensor in weights.items():
        is_counter = name.endswith("num_batches_tracked")  # of a BatchNorm
        if not tensor.is_floating_point() and not is_counter:
            raise ValueError(f"{name} has numbers of another kind")


def _is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, which holds code."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except Exception:  # zipfile raises many kinds at a damaged file
        return False


def _load_openai_archive(path: Path) -> CLIP:
    """A TorchScript archive of OpenAI's. Raises UserError for others: loading runs their code."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # The addresses of OpenAI's archives contain their SHA-256.
    if not any(digest in url for url in clip.clip._MODELS.values()):
        raise UserError(f"{path} is a TorchScript archive, but none of OpenAI's: give a state dict")
    model, _ = clip.load(str(path), device="cpu")
    return model


def _download(name: str) -> CLIP:
    """OpenAI's weights, from the user's cache folder or the network."""
    try:
        with patience():
            model, _ = clip.load(name, device="cpu", download_root=str(_download_folder(name)))
            return model
    # TypeError: clip's, if the server does not say how long the file is.
    except (OSError, RuntimeError, HTTPException, TypeError) as error:
        url = clip.clip._MODELS[name]
        target = _download_folder(name) / url.rsplit("/", 1)[1]
        raise UserError(
            f"{name} could not be downloaded ({error}): fetch {url} elsewhere and give its path, "
            f"--architecture /path/{target.name}, or put it at {target}; "
            "--architecture tiny needs no download"
        ) from None


def _download_folder(name: str) -> Path:
    """Where clip keeps OpenAI's weights: $XDG_CACHE_HOME/clip, else ~/.cache/clip."""
    usual = Path.home() / ".cache" / "clip"
    xdg = os.environ.get("XDG_CACHE_HOME")
    # What was downloaded before is not fetched again.
    if not xdg or (usual / clip.clip._MODELS[name].rsplit("/", 1)[1]).exists():
        return usual
    return Path(xdg) / "clip"
