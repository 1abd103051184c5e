"""A model from any checkpoint that people have: loaded right, or refused.

The weights of a CLIP do not determine the model: its activation, the width of its attention heads
and the normalisation of its images must be known, too. A model that is built with other settings
gives no error, only worse answers. So each source below comes with its settings, and where they
can't be known, the user is asked or told what is assumed.

Weights are fp32 whatever the file holds: AdamW on fp16 weights gives NaN after a step.
"""

import difflib
import hashlib
import json
import math
import os
import zipfile
from http.client import HTTPException
from pathlib import Path

import torch

from flowers import UserError, reason
from flowers.choices import PRETRAINED, RANDOM
from flowers.download import patience
from flowers.files import load_tensors, note, read_json
from flowers.models import (
    ACTIVATIONS,
    CLIP,
    CONTEXT_LENGTH,
    OPENAI,
    VOCABULARY,
    Settings,
    Shape,
    attach_settings,
    build,
    build_shape,
    clip,
    settings_of,
    to_device,
)

# Not weights, but in the state dicts of OpenAI's archives.
EXTRA_KEYS = ("input_resolution", "context_length", "vocab_size")
# A ResNet's image is 32 times as large, in each direction, as the map that it pools.
RESNET_STRIDE = 32
# The tensor of a run's model.pt that holds the settings, where they are not OpenAI's.
SETTINGS_KEY = "flowers_config"
# OpenAI's widest ViT. The published ones that are wider have heads of 80, 88, 104 and 112.
WIDEST_OPENAI_VIT = 1024

# How --architecture names a model of another library.
OPEN_CLIP = "open_clip:"
HUGGING_FACE = "hf:"
INSTALL = "pip install -r requirements-openclip.txt"


def load_model(
    architecture: str, device: torch.device | str = "cpu", activation: str | None = None
) -> CLIP:
    """A CLIP in fp32 and eval mode, so that a ResNet's BatchNorm keeps its statistics.

    architecture: `tiny`, `tiny-16` or `tiny-rn` (random weights), a name of
        clip.available_models() (downloaded, SHA-256-checked), `open_clip:NAME/PRETRAINED`,
        `open_clip:PATH`, `hf:NAME`, or the path of a state dict, an archive of OpenAI's, a run
        folder, or a folder of Hugging Face's or open_clip's. docs/models.md lists them all.
    activation: of a file that does not say it, one of ACTIVATIONS.

    The model carries its settings: `activation`, `head_width` (image, text), `mean` and `std` (for
    the normalisation), and `origin`, a line that says what the weights are.

    Raises UserError if the name is unknown, the download fails, the file is not a CLIP or one that
    can't be built here, or `activation` contradicts what is known of the weights.
    """
    # Names come first: a file that is called like a model is not asked about.
    if architecture in RANDOM:
        model = build(architecture, activation or OPENAI.activation)
    elif architecture in PRETRAINED:
        model = _download(architecture)
    elif architecture.startswith(OPEN_CLIP):
        model = _load_open_clip(architecture.removeprefix(OPEN_CLIP), activation)
    elif architecture.startswith(HUGGING_FACE):
        model = _load_hugging_face_name(architecture.removeprefix(HUGGING_FACE))
    else:
        model = _load_path(architecture, activation)
    # Where it is known what the weights were trained with, another --activation is a mistake.
    if activation not in (None, model.activation):
        raise UserError(
            f"{architecture} was trained with {model.activation}: leave out --activation"
        )
    return to_device(model.float().eval(), device)


def _load_path(architecture: str, activation: str | None) -> CLIP:
    """A model from a file, or from a folder of a run, of Hugging Face's or of open_clip's."""
    path = Path(architecture)
    # A run of ours is a folder too: it has a model.pt.
    if path.is_dir() and (path / "model.pt").exists():
        path = path / "model.pt"
    if (path / "config.json").exists():
        return _load_hugging_face(path, architecture)
    if (path / "open_clip_config.json").exists():
        return _load_open_clip_folder(path, None, architecture)
    if path.is_dir():
        raise UserError(
            f"{architecture} holds no model: a run of train.py has a model.pt, a folder of Hugging "
            "Face's a config.json, and one of open_clip's an open_clip_config.json"
        )
    if not path.exists():
        known = ", ".join([*RANDOM, *PRETRAINED])
        raise UserError(
            f"no model {architecture}: give a path, open_clip:NAME/PRETRAINED, hf:NAME, "
            f"or one of {known}"
        )
    # Not by the name's ending: OpenAI's archives and state dicts are both called .pt.
    if _is_torchscript(path):
        return _load_openai_archive(path)
    return _load_raw_file(path, activation)


# -----------------------------------------------------------------------------
# settings in a run's model.pt


def state_for_saving(model: CLIP) -> dict[str, torch.Tensor]:
    """The state dict of a model on the CPU, with its settings where clip.load would build others.

    The settings are one more tensor, SETTINGS_KEY (uint8, JSON). clip.load fails at a tensor that
    it does not know: it never builds the wrong model.
    """
    state = model.state_dict()
    # A file of GPU tensors opens on machines with a GPU alone, unless its reader says otherwise.
    for name, tensor in state.items():
        state[name] = tensor.cpu()
    settings = settings_of(model)
    # With OpenAI's settings the file stays plain, so that clip.load opens it.
    if settings != OPENAI:
        text = json.dumps(settings._asdict()).encode()
        state[SETTINGS_KEY] = torch.tensor(list(text), dtype=torch.uint8)
    return state


def _read_settings(tensor: torch.Tensor) -> Settings:
    """The settings that state_for_saving wrote. Raises ValueError if they are damaged."""
    if tensor.dtype != torch.uint8 or tensor.ndim != 1:
        raise ValueError(f"{SETTINGS_KEY} is damaged")
    # The file may come from anywhere, so every value is checked.
    values = json.loads(bytes(tensor.tolist()))
    try:
        settings = Settings(**values)
        widths = (settings.image_head_width, settings.text_head_width)
        known = settings.activation in ACTIVATIONS and all(type(w) is int and w > 0 for w in widths)
        mean, std = _three_numbers(settings.mean), _three_numbers(settings.std)
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"{SETTINGS_KEY} is damaged, or of a newer version")
    # JSON has lists where settings are compared as tuples.
    return settings._replace(mean=mean, std=std)


def _three_numbers(values) -> tuple[float, float, float]:
    """A mean or a standard deviation, of red, green and blue. Raises ValueError for others."""
    numbers = tuple(float(value) for value in values)
    if len(numbers) != 3 or not all(0 < number < 1 for number in numbers):
        raise ValueError(f"{values} is no mean or standard deviation of red, green and blue")
    return numbers


# -----------------------------------------------------------------------------
# state dicts

# Under which name, and with which prefixes, training programs keep a state dict.
WRAPPERS = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.", "model.", "clip.")

# The beginning of a weight's name, and what it tells of the file.
OTHER_MODELS = {
    "vision_model.": "it has Hugging Face's names: give its folder, with config.json",
    "text_model.": "it has Hugging Face's names: give its folder, with config.json",
    "visual.trunk.": "its image tower is one of timm's",
    "logit_bias": "it is a SigLIP",
    "text_decoder.": "it is a CoCa",
    "text.": "its text tower is not CLIP's",
    "base_model.": "it is an adapter: merge it into its model first",
}


def from_state_dict(
    state: dict[str, torch.Tensor],
    origin: str = "state dict",
    settings: Settings | None = None,
) -> CLIP:
    """Build the model that a state dict of OpenAI's CLIP describes, in fp32 and eval mode.

    clip.load does the same, but rounds the weights to fp16.

    origin: where the state dict comes from, for the message.
    settings: what the weights were trained with; by default those in the state dict, else OpenAI's.
    Raises UserError if it is not the state dict of a CLIP.
    """
    try:
        if state and "positional_embedding" not in state:
            names = ", ".join(str(name) for name in list(state)[:3])
            raise ValueError(f"it has no positional_embedding; it begins with {names}")
        weights = {name: tensor for name, tensor in state.items() if name not in EXTRA_KEYS}
        if SETTINGS_KEY in weights:
            settings = _read_settings(weights.pop(SETTINGS_KEY))
        settings = settings or OPENAI
        _refuse_other_kinds(weights)
        context_length = weights["positional_embedding"].shape[0]
        vocabulary = weights["token_embedding.weight"].shape[0]
        # More rows than CLIP's tokenizer has tokens: the texts were tokenized in another way.
        if vocabulary > VOCABULARY:
            raise ValueError(f"its tokenizer has {vocabulary:,} tokens, CLIP's {VOCABULARY:,}")
        shape = read_shape(weights, settings)
        model = build_shape(shape, context_length, vocabulary, settings)
        # Before load_state_dict, whose own message lists hundreds of names.
        _refuse_other_names(weights, model)
        # Some trainings keep the temperature as a vector of one number.
        if weights["logit_scale"].numel() == 1:
            weights["logit_scale"] = weights["logit_scale"].reshape(())
        model.load_state_dict(weights)
    except Exception as error:  # torch raises many kinds at what is no state dict of a CLIP
        problem = _other_model(state) or f"{type(error).__name__} {reason(error)}"
        raise UserError(f"{origin} is not the state dict of a CLIP: {problem}") from None
    model.origin = origin
    return model.eval()


def read_shape(weights: dict[str, torch.Tensor], settings: Settings = OPENAI) -> Shape:
    """The shape of the CLIP that has these weights. Raises KeyError if some are missing."""
    embedding = weights["text_projection"].shape[1]  # (text width, D)
    text_width = weights["positional_embedding"].shape[1]  # (context length, text width)
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
        text_heads=text_width // settings.text_head_width,
        text_layers=text_layers,
        image_hidden=_hidden_width(weights, "visual.transformer.resblocks."),
        text_hidden=_hidden_width(weights, "transformer.resblocks."),
    )


def _count(weights: dict[str, torch.Tensor], prefix: str) -> int:
    """How many blocks there are under a prefix, by the number that follows it in the names."""
    numbers = {
        name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)
    }
    # Distinct numbers, as a block has many weights.
    return len(numbers)


def _hidden_width(weights: dict[str, torch.Tensor], prefix: str) -> int | None:
    """The width of the MLPs under a prefix; None if there are none."""
    weight = weights.get(f"{prefix}0.mlp.c_fc.weight")  # (hidden, width)
    return None if weight is None else weight.shape[0]


def _refuse_other_kinds(weights: dict[str, torch.Tensor]) -> None:
    """Raise ValueError for integers and booleans: load_state_dict would convert them silently."""
    for name, tensor in weights.items():
        is_counter = name.endswith("num_batches_tracked")  # of a BatchNorm
        if not tensor.is_floating_point() and not is_counter:
            raise ValueError(f"{name} has numbers of another kind")


def _refuse_other_names(weights: dict[str, torch.Tensor], model: CLIP) -> None:
    """Raise ValueError if weights are missing, or others are there."""
    missing = sorted(model.state_dict().keys() - weights.keys())
    unexpected = sorted(weights.keys() - model.state_dict().keys())
    if missing:
        raise ValueError(f"it has no {', '.join(missing[:3])}")
    if unexpected:
        raise ValueError(f"it also has {', '.join(unexpected[:3])}, which no CLIP has")


def _other_model(state: dict) -> str | None:
    """What a state dict is, if it is known and no CLIP of OpenAI's form."""
    for prefix, description in OTHER_MODELS.items():
        if any(str(name).startswith(prefix) for name in state):
            return description
    return None


def unwrap(state: dict) -> dict:
    """The state dict within the checkpoint of a training, without the prefixes of its wrappers."""
    # Wrappers may lie within one another, as those of a compiled and distributed model do.
    for key in WRAPPERS:
        if isinstance(state.get(key), dict):
            return unwrap(state[key])
    # A prefix of some names only belongs to the model itself.
    for prefix in PREFIXES:
        if state and all(str(name).startswith(prefix) for name in state):
            return unwrap({name.removeprefix(prefix): value for name, value in state.items()})
    return state


# -----------------------------------------------------------------------------
# files that may not say what they are


def _load_raw_file(path: Path, activation: str | None) -> CLIP:
    """A model from a file of tensors.

    A run's model.pt says what it was built with, by itself or by the args.json beside it. Any other
    file is built as OpenAI's, but for `activation`; without that a line says what is assumed.
    """
    weights = _read_weights(path)
    start = _start_of_run(path)
    # A model.pt without the settings, in a run of ours, has OpenAI's: see state_for_saving.
    if SETTINGS_KEY in weights or start:
        model = from_state_dict(weights, str(path))
        model.origin = f"{path.parent} (from {start})" if start else str(path)
        return model

    settings = OPENAI._replace(activation=activation or OPENAI.activation)
    model = from_state_dict(weights, str(path), settings)
    _refuse_unknown_heads(model, path)
    if activation:
        model.origin = f"{path} ({activation})"
    else:
        model.origin = f"{path} (taken as {settings.activation})"
        note(
            f"{path} does not say what it was trained with: QuickGELU and OpenAI's normalisation "
            "are assumed; give --activation gelu for most of LAION's and DataComp's models, or "
            "--activation quickgelu to leave out this line"
        )
    return model


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file. Raises UserError if it is a checkpoint to resume a run from."""
    state = load_tensors(path)
    weights = unwrap(state)
    # Ours hold a digest of the start, and of the weights only those that are trained.
    is_whole = "logit_scale" in weights and "text_projection" in weights
    if "optimizer" in state and ("start" in state or not is_whole):
        problem = (
            _other_model(weights) or "it looks like a checkpoint to resume from: give model.pt"
        )
        raise UserError(f"{path} is not the state dict of a CLIP: {problem}")
    return weights


def _start_of_run(path: Path) -> str | None:
    """What a run of train.py started from, or the runs of a soup, if `path` is its model.pt."""
    if path.name != "model.pt":
        return None
    try:
        arguments = read_json(path.parent / "args.json")
    except (OSError, ValueError):
        return None
    architecture = arguments.get("architecture")
    soup = arguments.get("soup")
    if not isinstance(architecture, str) or not (arguments.get("job") == "train" or soup):
        return None
    start = origin_of(architecture)
    return f"a soup of {len(soup)} runs from {start}" if soup else start


def origin_of(architecture: str) -> str:
    """What the weights of an architecture are, in words for tables."""
    if architecture in RANDOM:
        return f"random ({architecture})"
    if architecture in PRETRAINED:
        return f"OpenAI {architecture}"
    if architecture.startswith(OPEN_CLIP):
        return f"open_clip {architecture.removeprefix(OPEN_CLIP)}"
    if architecture.startswith(HUGGING_FACE):
        return f"Hugging Face {architecture.removeprefix(HUGGING_FACE)}"
    return architecture


def _refuse_unknown_heads(model: CLIP, path: Path) -> None:
    """Raise UserError if a model of this shape is not OpenAI's: its heads may have any width."""
    transformers = [model.transformer]
    if hasattr(model.visual, "transformer"):
        transformers.append(model.visual.transformer)
    # By width and MLPs, as the weights have the same shapes whatever the number of heads.
    width = transformers[-1].width
    hidden_is_openais = all(
        block.mlp.c_fc.out_features == 4 * transformer.width
        for transformer in transformers
        for block in transformer.resblocks
    )
    if width > WIDEST_OPENAI_VIT or not hidden_is_openais:
        raise UserError(
            f"{path} does not say how wide its attention's heads are, and OpenAI has no model of "
            f"its shape (width {width}): give open_clip:NAME/{path} with open_clip's name of the "
            "model, or a folder with its open_clip_config.json or config.json"
        )


# -----------------------------------------------------------------------------
# OpenAI


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
    names = [name for name, url in clip.clip._MODELS.items() if digest in url]
    if not names:
        raise UserError(f"{path} is a TorchScript archive, but none of OpenAI's: give a state dict")
    model, _ = clip.load(str(path), device="cpu")
    attach_settings(model, OPENAI, f"OpenAI {names[0]}")
    return model


def _download(name: str) -> CLIP:
    """OpenAI's weights, from the user's cache folder or the network."""
    try:
        with patience():
            model, _ = clip.load(name, device="cpu", download_root=str(_download_folder(name)))
    # TypeError: clip's, if the server does not say how long the file is.
    except (OSError, RuntimeError, HTTPException, TypeError) as error:
        url = clip.clip._MODELS[name]
        target = downloaded_file(name)
        raise UserError(
            f"{name} could not be downloaded ({error}): fetch {url} elsewhere and give its path, "
            f"--architecture /path/{target.name}, or put it at {target}; "
            "--architecture tiny needs no download"
        ) from None
    attach_settings(model, OPENAI, f"OpenAI {name}")
    return model


def downloaded_file(name: str) -> Path:
    """Where OpenAI's weights of this name are, once they were downloaded."""
    return _download_folder(name) / clip.clip._MODELS[name].rsplit("/", 1)[1]


def _download_folder(name: str) -> Path:
    """Where clip keeps OpenAI's weights: $XDG_CACHE_HOME/clip, else ~/.cache/clip."""
    usual = Path.home() / ".cache" / "clip"
    xdg = os.environ.get("XDG_CACHE_HOME")
    # clip itself knows ~/.cache only: what it downloaded there before is not fetched again.
    if not xdg or (usual / clip.clip._MODELS[name].rsplit("/", 1)[1]).exists():
        return usual
    return Path(xdg) / "clip"


# -----------------------------------------------------------------------------
# open_clip

# The files of weights in a folder of open_clip's, the best first.
OPEN_CLIP_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pt",
)

# The keys of open_clip's configs that change nothing here: they are seen in the weights' shapes,
# used below, matter in training only, or belong to a part that is refused.
OPEN_CLIP_KEYS = {
    "model": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale"},
    "vision": {
        "layers",
        "width",
        "head_width",
        "mlp_ratio",
        "patch_size",
        "image_size",
        "patch_dropout",
        "output_tokens",
        "attn_pooler_queries",
        "attn_pooler_heads",
    },
    "text": {
        "context_length",
        "vocab_size",
        "width",
        "heads",
        "layers",
        "mlp_ratio",
        "output_tokens",
        "pad_id",
        "eos_id",
    },
}
# Other keys must have these values, or be 0, false or null.
OPEN_CLIP_VALUES = {
    "pos_embed_type": ["learnable"],
    "pool_type": ["tok", "argmax"],
    "proj_type": ["linear"],
    "block_type": ["default"],
}
# What some of them mean, for the message.
OPEN_CLIP_FORMS = {
    "init_logit_bias": "it is a SigLIP",
    "multimodal_cfg": "it is a CoCa",
    "timm_model_name": "its image tower is one of timm's",
    "hf_model_name": "its text tower is one of Hugging Face's",
    "hf_tokenizer_name": "its tokenizer is not CLIP's",
    "custom_text": "its text tower is not CLIP's",
}


def _load_open_clip(name: str, activation: str | None) -> CLIP:
    """A model by open_clip's NAME/PRETRAINED, NAME/FILE, or by the path of a file or folder."""
    # What is on the disk comes before open_clip's names, which are asked for in its package.
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_open_clip_folder(path, None, name)
    if not path.exists():
        return _load_open_clip_name(name, activation)
    if (path.parent / "open_clip_config.json").exists():
        return _load_open_clip_folder(path.parent, path, name)
    if activation is None:
        raise UserError(
            f"{name} does not say what it was trained with: give --activation quickgelu or gelu, "
            f"or open_clip:NAME/{name} with open_clip's name of the model"
        )
    model = _load_raw_file(path, activation)
    model.origin = f"open_clip {name} ({activation})"
    return model


def _load_open_clip_folder(folder: Path, file: Path | None, name: str) -> CLIP:
    """A model from a folder with open_clip_config.json, from `file` or the one file of weights."""
    config_file = folder / "open_clip_config.json"
    try:
        config = read_json(config_file)
        model_config, preprocessing = config["model_cfg"], config.get("preprocess_cfg", {})
    except FileNotFoundError:
        raise UserError(f"{folder} has no open_clip_config.json: give a file of weights") from None
    except (ValueError, KeyError) as error:
        raise UserError(f"{config_file} is damaged: {reason(error)}") from None
    # A file that was named is taken, though the folder may hold others.
    if file is None:
        file = _first_file(folder, OPEN_CLIP_FILES)
    settings = _open_clip_settings(model_config, preprocessing, name)
    return _build_open_clip(file, model_config, settings, name)


def _load_open_clip_name(name: str, activation: str | None) -> CLIP:
    """A model by open_clip's NAME/PRETRAINED (downloaded, or from its cache) or NAME/FILE."""
    open_clip = _import_open_clip()
    model_name, _, tag = name.partition("/")
    model_config = open_clip.get_model_config(model_name)
    if model_config is None:
        similar = difflib.get_close_matches(model_name, open_clip.list_models(), n=5, cutoff=0.3)
        raise UserError(f"open_clip has no model {model_name}; it has {', '.join(similar)}")

    file = Path(tag).expanduser()
    tag_config = open_clip.get_pretrained_cfg(model_name, tag)
    if not tag_config and not file.is_file():
        tags = open_clip.list_pretrained_tags_by_model(model_name)
        raise UserError(
            f"open_clip has no weights {tag or '(none given)'} of {model_name}, and there is no "
            f"such file; it has {', '.join(tags) or 'none'}"
        )

    settings = _open_clip_settings(model_config, tag_config, name)
    if tag_config:
        # Many weights belong to QuickGELU though their name does not say it: the tag does.
        if tag_config.get("quick_gelu"):
            settings = settings._replace(activation="quickgelu")
        file = _download_open_clip(open_clip, tag_config, name)
    elif activation:
        # A file has no tag: the user may know of what the name does not say.
        settings = settings._replace(activation=activation)
    return _build_open_clip(file, model_config, settings, name)


def _import_open_clip():
    try:
        import open_clip  # optional, and it takes seconds
    except ImportError:
        raise UserError(f"open_clip:NAME needs the package open_clip: {INSTALL}") from None
    return open_clip


def _download_open_clip(open_clip, tag_config: dict, name: str) -> Path:
    """The file of open_clip's weights, from its cache or the network."""
    try:
        with patience():
            return Path(open_clip.download_pretrained(tag_config))
    except Exception as error:  # of the hub, of the network, or of the disk
        source = tag_config.get("hf_hub") or tag_config.get("url")
        raise UserError(
            f"open_clip:{name} could not be downloaded ({reason(error)}): fetch {source} elsewhere "
            f"and give open_clip:{name.partition('/')[0]}/FILE"
        ) from None


def _open_clip_settings(config: dict, preprocessing: dict, name: str) -> Settings:
    """The settings in open_clip's configs of a model and of its images.

    Raises UserError, saying why, for what OpenAI's CLIP can't be made to compute.
    """
    try:
        vision, text = config["vision_cfg"], config["text_cfg"]
        _refuse_other_forms({"model": config, "vision": vision, "text": text}, name)
        if text.get("vocab_size", VOCABULARY) != VOCABULARY:
            raise _no_such_form(name, "its tokenizer is not CLIP's")
        if text.get("context_length", CONTEXT_LENGTH) < CONTEXT_LENGTH:
            raise _no_such_form(name, f"its texts have fewer than {CONTEXT_LENGTH} tokens")
        # pixels.py prepares images in one way only: short side to R by bicubic, then the centre.
        size = preprocessing.get("size", vision["image_size"])
        if size not in (vision["image_size"], [vision["image_size"]] * 2):
            raise _no_such_form(name, f"its images are {size} pixels large, and then cut")
        for key, value in (("resize_mode", "shortest"), ("interpolation", "bicubic")):
            if preprocessing.get(key, value) != value:
                raise _no_such_form(
                    name, f"its images are resized with {key} {preprocessing[key]}, not {value}"
                )
        # open_clip's own defaults: GELU, heads of 64, OpenAI's mean and std.
        return Settings(
            activation="quickgelu" if config.get("quick_gelu") else "gelu",
            image_head_width=vision.get("head_width", OPENAI.image_head_width),
            text_head_width=text["width"] // text["heads"],
            mean=_three_numbers(preprocessing.get("mean", OPENAI.mean)),
            std=_three_numbers(preprocessing.get("std", OPENAI.std)),
        )
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"the config of open_clip:{name} is damaged: {error!r}") from None


def _refuse_other_forms(parts: dict[str, dict], name: str) -> None:
    """Raise UserError if a config has a key that OpenAI's CLIP knows nothing of.

    parts: the values of the `model`, and of its `vision` and `text` tower.
    """
    problems = {}
    for part, values in parts.items():
        for key, value in values.items():
            harmless = key in OPEN_CLIP_KEYS[part] or value in OPEN_CLIP_VALUES.get(key, [])
            # Keys that are unknown here are refused, too: a newer open_clip may compute with them.
            if value and not harmless:
                problems[key] = f"its {part} has {key} = {value}"
    # The kinds of model that have a name say more than their other keys.
    for key, kind in OPEN_CLIP_FORMS.items():
        if key in problems:
            raise _no_such_form(name, kind)
    for problem in problems.values():
        raise _no_such_form(name, problem)


def _no_such_form(name: str, why: str) -> UserError:
    return UserError(f"open_clip:{name} can't be made a CLIP of OpenAI's form: {why}")


def _build_open_clip(file: Path, config: dict, settings: Settings, name: str) -> CLIP:
    """A model from a file of open_clip's. Raises UserError if it is of another shape."""
    # What open_clip has under the tag openai may be one of OpenAI's own archives.
    if _is_torchscript(file):
        model = _load_openai_archive(file)
    else:
        model = from_state_dict(_read_weights(file), str(file), settings)
    _refuse_another_shape(model, config, name)
    model.origin = f"open_clip {name}"
    return model


def _refuse_another_shape(model: CLIP, config: dict, name: str) -> None:
    """Raise UserError if a model is not of the shape that its config says."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    visual = model.visual
    text_width, embedding = model.text_projection.shape
    found = {
        "embed_dim": embedding,
        "image_size": visual.input_resolution,
        "text width": text_width,
        "text layers": len(model.transformer.resblocks),
    }
    expected = {
        "embed_dim": config["embed_dim"],
        "image_size": vision["image_size"],
        "text width": text["width"],
        "text layers": text["layers"],
    }
    if hasattr(visual, "transformer"):
        found |= {"width": visual.conv1.out_channels, "layers": len(visual.transformer.resblocks)}
        found["patch_size"] = visual.conv1.kernel_size[0]
    else:
        stages = [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
        found |= {"width": visual.conv3.out_channels, "layers": [len(stage) for stage in stages]}
    # These keys are called the same in the config.
    for key in found.keys() - expected.keys():
        expected[key] = vision.get(key)
    for key, value in found.items():
        if value != expected[key]:
            raise UserError(
                f"the weights of open_clip:{name} are of another model than its config: {key} is "
                f"{value}, not {expected[key]}"
            )


def _first_file(folder: Path, names: tuple[str, ...]) -> Path:
    """The first of these files that is there. Raises UserError if none is."""
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise UserError(f"{folder} has no weights: none of {', '.join(names)}")


# -----------------------------------------------------------------------------
# Hugging Face

HUGGING_FACE_FILES = ("model.safetensors", "pytorch_model.bin")
# Lists in which file each weight is, where a large model is kept in several.
HUGGING_FACE_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

# transformers' defaults, which its configs may leave out.
HUGGING_FACE_TEXT = {
    "hidden_act": "quick_gelu",
    "num_attention_heads": 8,
    "hidden_size": 512,
    "eos_token_id": 49407,
    "layer_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
}
HUGGING_FACE_VISION = {
    "hidden_act": "quick_gelu",
    "num_attention_heads": 12,
    "hidden_size": 768,
    "image_size": 224,
    "layer_norm_eps": 1e-5,
}
# Its names of the activations.
HUGGING_FACE_ACTIVATIONS = {"quick_gelu": "quickgelu", "gelu": "gelu"}
# The end token has the largest id of all: CLIP's own rule, which old configs mark by a 2.
HUGGING_FACE_ENDS = (2, VOCABULARY - 1)
BICUBIC = 3  # Pillow's number

# transformers' names of weights, and CLIP's. Of the projections the transpose is kept.
HUGGING_FACE_NAMES = {
    "logit_scale": "logit_scale",
    "text_projection.weight": "text_projection",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
}
TRANSPOSED = ("text_projection", "visual.proj")
HUGGING_FACE_BLOCKS = {
    "text_model.encoder.layers.": "transformer.resblocks.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
}
# Within a block. Those of q, k and v become one.
HUGGING_FACE_PARTS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def _load_hugging_face_name(name: str) -> CLIP:
    """A model from the hub (downloaded, or from its cache), or from a folder after all."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _load_hugging_face(folder, name)
    try:
        from huggingface_hub import snapshot_download  # optional
    except ImportError:
        raise UserError(f"hf:NAME needs the package huggingface_hub: {INSTALL}") from None
    try:
        # Weights are looked for as safetensors first: most repositories hold them twice.
        configs = ["config.json", "preprocessor_config.json", "processor_config.json"]
        folder = Path(snapshot_download(name, allow_patterns=[*configs, "model*.safetensors*"]))
        if not list(folder.glob("model*.safetensors")):
            snapshot_download(name, allow_patterns=["pytorch_model*"])
    except Exception as error:  # of the hub, of the network, or of the disk
        raise UserError(
            f"hf:{name} could not be downloaded ({reason(error)}): fetch the repository elsewhere, "
            "and give its folder"
        ) from None
    return _load_hugging_face(folder, name)


def _load_hugging_face(folder: Path, name: str) -> CLIP:
    """A CLIPModel of transformers from its folder."""
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no config.json that can be read ({error})") from None
    if config.get("model_type") != "clip":
        raise UserError(
            f"{name} is a {config.get('model_type')} model of Hugging Face's: only CLIPModel "
            "(model_type clip) has OpenAI's form"
        )
    try:
        settings, resolution = _hugging_face_settings(config, name)
        mean, std = _hugging_face_normalisation(folder, resolution, name)
        weights = from_hugging_face(_read_hugging_face_weights(folder))
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"a config in {folder} is damaged: {error!r}") from None
    settings = settings._replace(mean=mean, std=std)
    model = from_state_dict(weights, name, settings)
    if model.visual.input_resolution != resolution:
        raise UserError(f"the weights of {name} are for other images than its config.json says")
    model.origin = f"Hugging Face {name}"
    return model


def _hugging_face_settings(config: dict, name: str) -> tuple[Settings, int]:
    """The settings in config.json but for the normalisation, and the side of an image in pixels.

    Raises UserError for what OpenAI's CLIP can't be made to compute.
    """
    # Configs of old versions repeat a part under another name, which wins.
    text = HUGGING_FACE_TEXT | (config.get("text_config") or {})
    text |= config.get("text_config_dict") or {}
    vision = HUGGING_FACE_VISION | (config.get("vision_config") or {})
    vision |= config.get("vision_config_dict") or {}

    # None of these shows in the shapes of the weights: each would give a model that computes wrong.
    problem = None
    if text["hidden_act"] != vision["hidden_act"]:
        problem = "its towers have different activations"
    elif text["hidden_act"] not in HUGGING_FACE_ACTIVATIONS:
        problem = f"hidden_act is {text['hidden_act']}"
    elif text["eos_token_id"] not in HUGGING_FACE_ENDS or text["vocab_size"] != VOCABULARY:
        problem = "its tokenizer is not CLIP's"
    elif not text["layer_norm_eps"] == vision["layer_norm_eps"] == 1e-5:
        problem = "layer_norm_eps is not 1e-5"
    if problem:
        raise UserError(f"{name} can't be made a CLIP of OpenAI's form: {problem}")
    settings = OPENAI._replace(
        activation=HUGGING_FACE_ACTIVATIONS[text["hidden_act"]],
        image_head_width=vision["hidden_size"] // vision["num_attention_heads"],
        text_head_width=text["hidden_size"] // text["num_attention_heads"],
    )
    return settings, vision["image_size"]


def _hugging_face_normalisation(
    folder: Path, resolution: int, name: str
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of the images, from the folder's config of its image processor.

    Raises UserError if the images are prepared in another way than CLIP's.
    """
    config = {}
    for file in ("preprocessor_config.json", "processor_config.json"):
        if (folder / file).exists():
            config = read_json(folder / file)
            # Newer versions keep it within the config of the whole processor.
            config = config.get("image_processor", config)
            break
    if "image_mean" not in config:
        note(f"{name} has no preprocessor_config.json: OpenAI's normalisation is assumed")
    side = config.get("size", resolution)
    if isinstance(side, dict):
        side = side.get("shortest_edge")
    problems = []
    if side != resolution:
        problems.append(f"size is {config['size']} for {resolution} pixels")
    if config.get("resample", BICUBIC) != BICUBIC:
        problems.append(f"resample is {config['resample']}, not {BICUBIC}")
    for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        if config.get(step) is False:
            problems.append(f"{step} is false")
    if problems:
        raise UserError(f"{name} prepares images in another way than CLIP: {', '.join(problems)}")
    mean = _three_numbers(config.get("image_mean", OPENAI.mean))
    std = _three_numbers(config.get("image_std", OPENAI.std))
    return mean, std


def _read_hugging_face_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights in a folder of Hugging Face's, from one file or several."""
    for name in HUGGING_FACE_INDEXES:
        if (folder / name).exists():
            files = set(read_json(folder / name)["weight_map"].values())
            weights = {}
            for file in sorted(files):
                # The name alone, so that an index can't lead out of the folder.
                weights |= load_tensors(folder / Path(file).name)
            return weights
    return load_tensors(_first_file(folder, HUGGING_FACE_FILES))


def from_hugging_face(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of transformers' CLIPModel under the names of OpenAI's CLIP.

    Names that are in no CLIPModel stay as they are.
    """
    state = {}
    for name, tensor in weights.items():
        if name.endswith("position_ids"):
            continue  # 0, 1, 2, ... in files of old versions
        name = _clip_name(name)
        state[name] = tensor.t() if name in TRANSPOSED else tensor
    # nn.MultiheadAttention keeps q, k and v in one weight, (3 * width, width), in this order.
    for name in [name for name in state if ".self_attn.q_proj." in name]:
        parts = [state.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        name = name.replace("self_attn.q_proj.", "attn.in_proj_")
        state[name] = torch.cat(parts)
    return state


def _clip_name(name: str) -> str:
    """CLIP's name of a weight of Hugging Face's; names of q, k and v keep their ends."""
    if name in HUGGING_FACE_NAMES:
        return HUGGING_FACE_NAMES[name]
    for theirs, ours in HUGGING_FACE_BLOCKS.items():
        name = name.replace(theirs, ours)
    for theirs, ours in HUGGING_FACE_PARTS.items():
        name = name.replace(f".{theirs}.", f".{ours}.")
    return name
