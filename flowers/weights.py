"""Any checkpoint that people have, as a model: OpenAI's by name, an archive of theirs, a state dict, a run folder.

Weights are kept in fp32 whatever the file holds: AdamW on fp16 weights gives NaN after a step.
"""

import hashlib
import math
import zipfile
from http.client import HTTPException
from pathlib import Path

import torch

from flowers import UserError, reason
from flowers.download import patience
from flowers.files import load_tensors
from flowers.models import CLIP, RANDOM, build, clip


def load_model(architecture: str, device: torch.device | str = "cpu") -> CLIP:
    """`tiny` or `tiny-rn` (random weights), a name of clip.available_models() (downloaded, SHA-256-checked), or the path of a state dict or run folder.

    Returns the model in fp32 and eval mode, so that the BatchNorm of the ResNets keeps its pretrained statistics. Raises UserError if
    the name is unknown, the download fails, or the file is not a CLIP.
    """
    path = Path(architecture)
    path = path / "model.pt" if path.is_dir() else path
    if architecture in RANDOM:
        model = build(architecture)
    elif architecture in clip.available_models():
        model = _download(architecture)
    elif not path.exists():
        raise UserError(
            f"no model {architecture}: give a path, or one of {', '.join([*RANDOM, *clip.available_models()])}"
        )
    elif _is_torchscript(path):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not any(digest in url for url in clip.clip._MODELS.values()):
            raise UserError(
                f"{path} is a TorchScript archive, but none of OpenAI's: give a state dict"
            )
        model = clip.load(str(path), device="cpu")[0]
    else:
        model = from_state_dict(load_tensors(path), str(path))
    return model.float().eval().to(device)


def from_state_dict(state: dict[str, torch.Tensor], origin: str = "state dict") -> CLIP:
    """Read the shape off a state dict and build the model around it, without rounding to fp16 as clip.load does."""
    state = {
        k: v
        for k, v in state.items()
        if k not in ("input_resolution", "context_length", "vocab_size")
    }
    try:
        if odd := [
            n
            for n, t in state.items()
            if not t.is_floating_point() and not n.endswith("num_batches_tracked")
        ]:
            raise ValueError(
                f"{odd[0]} has numbers of another kind"
            )  # torch would convert them without a word
        side = math.isqrt(
            state[
                "visual.positional_embedding"
                if "visual.proj" in state
                else "visual.attnpool.positional_embedding"
            ].shape[0]
            - 1
        )
        if "visual.proj" in state:
            patch = state["visual.conv1.weight"].shape[-1]
            resolution, layers, width = (
                side * patch,
                _count(state, "visual.transformer.resblocks."),
                state["visual.conv1.weight"].shape[0],
            )
        else:
            patch, resolution, width = (
                None,
                side * 32,
                state["visual.layer1.0.conv1.weight"].shape[0],
            )
            layers = tuple(_count(state, f"visual.layer{i}.") for i in (1, 2, 3, 4))
        context, text_width = state["positional_embedding"].shape
        model = CLIP(
            state["text_projection"].shape[1],
            resolution,
            layers,
            width,
            patch,
            context,
            state["token_embedding.weight"].shape[0],
            text_width,
            text_width // 64,
            _count(state, "transformer.resblocks."),
        )
        model.load_state_dict(state)
    except Exception as error:  # torch raises many kinds at what is no state dict of a CLIP
        hint = (
            " (it looks like a checkpoint to resume from: give model.pt)"
            if "optimizer" in state
            else ""
        )
        raise UserError(
            f"{origin} is not the state dict of a CLIP{hint}: {type(error).__name__} {reason(error)}"
        ) from None
    return model.eval()


def _is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, which holds code."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except Exception:  # zipfile raises many kinds at a damaged file
        return False


def _download(name: str) -> CLIP:
    url, folder = clip.clip._MODELS[name], Path.home() / ".cache" / "clip"
    try:
        with patience():
            return clip.load(name, device="cpu")[0]
    except (
        OSError,
        RuntimeError,
        HTTPException,
        TypeError,
    ) as error:  # TypeError: of a server that does not say how long the file is
        raise UserError(
            f"{name} could not be downloaded ({error}): fetch {url} and put it at {folder / url.rsplit('/', 1)[1]}, "
            "or use --architecture tiny, which needs no download"
        ) from None


def _count(state: dict, prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})
