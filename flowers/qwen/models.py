"""A Qwen-VL model: loading it with its processor, LoRA adapters, and its hidden states.

The released models come through transformers' Auto classes, from the hub or a folder; `tiny` and
`random-2b` have random weights and are built in offline.py.
"""

import hashlib
import inspect
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import peft
import torch
import transformers
from peft.utils import load_peft_weights
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from flowers import UserError, devices, files, reason
from flowers.qwen.offline import SHAPES, build
from flowers.qwen.prompts import END

DEFAULT = "Qwen/Qwen2-VL-2B-Instruct"
# Whose ranking is tested against one plain forward a name, by the model_type of their config.
FAMILIES = {
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL-MoE",
}
# The linear layers of the language model: attention and MLP of every block. None of the vision
# tower, whose features can then be computed once.
LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"

# Of the one adapter that a model has here; peft puts it into the names of its parameters.
ADAPTER = "default"
# transformers has renamed the parts of a model more than once, and the keys of an adapter are the
# names of its time. What comes before these parts has changed; they and what follows have not.
WRAPPERS = ("base_model", "model", "language_model")
PARENTS = {
    "layers": "model.language_model.",
    "embed_tokens": "model.language_model.",
    "norm": "model.language_model.",
    "visual": "model.",
    "lm_head": "",
}

# peft still calls transformers' former names.
warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)


def versions() -> dict[str, str]:
    """Return the versions of the libraries that a result depends on."""
    return {"transformers": transformers.__version__, "peft": peft.__version__}


# -----------------------------------------------------------------------------
# loading


def load_model(
    name: str,
    device: torch.device | str,
    adapter: str | Path | None = None,
    max_pixels: int | None = None,
):
    """Load a model in eval mode and in the precision of the device, and its processor.

    name: `tiny`, `random-2b`, a name on the hub, or a folder. adapter: a run of qwen_train.py, or
    its adapter/ folder. max_pixels: larger images are scaled down to so many pixels.
    Raises UserError for what can't be loaded.
    """
    dtype = devices.DTYPES[devices.precision_of(device)]
    if name in SHAPES:
        model, processor = build(name, dtype, device)
    else:
        load_config(name)
        processor = _from_pretrained(AutoProcessor, name)
        model, info = _from_pretrained(
            AutoModelForImageTextToText,
            name,
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
        _check_weights(name, info)
        model = model.eval().to(device)
    processor.tokenizer.padding_side = "left"
    model.generation_config = _greedy(model.generation_config, processor.tokenizer)
    # All images of tiny have one size.
    if max_pixels and name != "tiny":
        min_pixels = processor.image_processor.size["shortest_edge"]
        # transformers calls these edges, but they are numbers of pixels.
        processor.image_processor.size = {
            "shortest_edge": min(min_pixels, max_pixels),
            "longest_edge": max_pixels,
        }
    if adapter:
        model = load_adapter(model, name, Path(adapter))
    return model, processor


def load_adapter(model, name: str, path: Path):
    """Return the model with the LoRA of a run, or of an adapter/ folder, in eval mode.

    Raises UserError if there is none, or if it is not wholly one for this model: peft itself only
    warns of parts that find no place, and the results would be those of the model without them.
    """
    folder = adapter_folder(path)
    try:
        config = peft.PeftConfig.from_pretrained(folder)
        _check_kind(config)
        config.inference_mode = True
        config.alpha_pattern = {_present_name(key): a for key, a in config.alpha_pattern.items()}
        config.rank_pattern = {_present_name(key): r for key, r in config.rank_pattern.items()}
        _check_patterns(model, config)
        tensors = _present_keys(load_peft_weights(folder, device="cpu"))
        model = peft.PeftModel(model, config, ADAPTER)
        result = peft.set_peft_model_state_dict(model, tensors, ADAPTER)
        if result.unexpected_keys:
            raise ValueError(_some("the model has no", result.unexpected_keys))
        # The model's own parameters are none of the adapter's, and always missing.
        missing = [key for key in result.missing_keys if ADAPTER in key.split(".")]
        if missing:
            raise ValueError(_some("the adapter lacks", missing))
    except Exception as error:  # peft, torch and safetensors raise many kinds at damaged files
        # The first line of torch's message does not say which shapes differ.
        line = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError):
            line = f"it lacks {line}"
        raise UserError(f"{folder} does not fit {name}: {line[:200]}") from None
    return model.eval()


def _check_kind(config) -> None:
    """Raise ValueError for an adapter that is more than a change of layers.

    The layers of the model are called without peft's wrapper, where prompts would be added.
    """
    if config.peft_type != peft.PeftType.LORA or getattr(config, "alora_invocation_tokens", None):
        raise ValueError(f"it is no plain LoRA, but {config.peft_type.value}")


def _check_patterns(model, config) -> None:
    """Raise ValueError if a rank or alpha of its own is for layers that the model lacks."""
    names = [name for name, _ in model.named_modules()]
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        # as peft matches them
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            raise ValueError(f"the model has no {pattern}, for which it has another rank or alpha")


def _present_name(name: str) -> str:
    """Return the name that a part of the model has now; as it is if it is none that is known.

    model.layers.0.mlp.up_proj -> model.language_model.layers.0.mlp.up_proj
    """
    parts = name.split(".")
    while parts[0] in WRAPPERS and len(parts) > 1:
        parts = parts[1:]
    parent = PARENTS.get(parts[0])
    return name if parent is None else parent + ".".join(parts)


def _present_keys(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors under the keys that peft gives them in this transformers.

    Raises ValueError if two of them are for the same place.
    """
    prefix = "base_model.model."
    renamed = {}
    for key, tensor in tensors.items():
        new_key = prefix + _present_name(key.removeprefix(prefix))
        if new_key in renamed:
            raise ValueError(f"it has {new_key} twice")
        renamed[new_key] = tensor
    return renamed


def _some(what: str, keys: Sequence[str]) -> str:
    """The first of some keys and how many more there are, for a line of error."""
    others = f" and {len(keys) - 1:,} more" if len(keys) > 1 else ""
    return f"{what} {sorted(keys)[0]}{others}"


def adapter_folder(path: Path) -> Path:
    """The folder of the adapter in a run, or `path` itself. Raises UserError if there is none."""
    folder = path / "adapter" if (path / "adapter").is_dir() else path
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"no adapter in {path}: give a finished run of qwen_train.py")
    return folder


def model_of_adapter(path: Path) -> str | None:
    """Return the model that an adapter was made for, by its adapter_config.json; None if unsaid.

    Raises UserError if there is no adapter, or the file is damaged.
    """
    file = adapter_folder(path) / "adapter_config.json"
    try:
        return files.read_json(file).get("base_model_name_or_path") or None
    except ValueError as error:
        raise UserError(f"{file} is damaged ({reason(error)})") from None


def load_config(name: str):
    """Return transformers' config of a model, without its weights.

    Raises UserError if there is none, or if the model is of another family than FAMILIES.
    """
    if name in SHAPES:
        return load_skeleton(name).config
    # transformers would load the adapter with its model, and check neither.
    if (Path(name) / "adapter_config.json").is_file():
        raise UserError(f"{name} holds an adapter: give it with --adapter, its model with --model")
    config = _from_pretrained(AutoConfig, name)
    if config.model_type not in FAMILIES:
        raise UserError(
            f"{name} is a model of type {config.model_type}: names are ranked rightly by "
            f"{', '.join(FAMILIES.values())} only"
        )
    # The packed names need a mask of their own, which no other kind of attention follows.
    layer_types = set(getattr(config.get_text_config(), "layer_types", None) or ())
    others = sorted(layer_types - {"full_attention"})
    if others:
        raise UserError(f"{name} has layers of {others[0]}, where names can't be ranked together")
    return config


def check_max_pixels(name: str, max_pixels: int) -> None:
    """Raise UserError if no token of an image fits into so many pixels, or there is no model."""
    vision = load_config(name).vision_config
    side = vision.patch_size * vision.spatial_merge_size
    if max_pixels < side**2:
        raise UserError(
            f"--max_pixels {max_pixels}: a token of {name} stands for {side} x {side} pixels, "
            f"so give at least {side**2}"
        )


def load_skeleton(name: str):
    """Return a model with its shapes, but without numbers. Raises UserError if there is none."""
    if name in SHAPES:
        return build(name, device="meta")[0]
    config = load_config(name)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def _greedy(released, tokenizer) -> transformers.GenerationConfig:
    """Return what greedy answers need of a generation config: what ends them and fills them up.

    The released configs also hold penalties and limits, which would change the likeliest token.
    Arguments of `generate` don't undo them: None stands for the model's own.
    """
    ends = released.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    ends = {tokenizer.convert_tokens_to_ids(END), *ends} - {None}
    padding = released.pad_token_id
    return transformers.GenerationConfig(
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id if padding is None else padding,
    )


def _check_weights(name: str, info: dict) -> None:
    """Raise UserError if a model has parameters that its files don't hold, or the reverse.

    info: transformers' report. Parameters that are missing have been initialised at random.
    """
    missing = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    if missing:
        raise UserError(
            f"{_some(f'the files of {name} lack', missing)}: it would have random weights there"
        )
    adapters = [key for key in info["unexpected_keys"] if "lora_" in key]
    if adapters:
        raise UserError(
            f"{_some(f'the files of {name} hold', adapters)}: merge the adapter, or save it alone "
            "and give it with --adapter"
        )


def _from_pretrained(auto_class, name: str, **options):
    try:
        return auto_class.from_pretrained(name, **options)
    except ImportError as error:
        raise UserError(
            f"{name} needs a package that is not installed, as quantised weights do: "
            f"{reason(error)}"
        ) from None
    except Exception as error:  # transformers and safetensors raise many kinds at damaged files
        raise UserError(
            f"{name} can't be loaded ({reason(error)}): it needs the network once, "
            "or a folder with its files, whole; --model tiny needs neither"
        ) from None


# -----------------------------------------------------------------------------
# adapters


def base_model(model):
    """Return the Qwen model inside peft's wrapper; the layers of its adapter stay in place."""
    if isinstance(model, peft.PeftModel):
        return model.get_base_model()
    return model


def modules_to_train(model, names: Sequence[str]) -> list[str]:
    """Return the paths of the modules that --also_train names, to be trained whole.

    A name is the end of a path: `qkv` stands for model.visual.blocks.0.attn.qkv and its like in
    every block. Raises UserError for a name of no module, and for modules that can't be trained so.
    """
    modules = dict(model.named_modules())
    paths = []
    for name in dict.fromkeys(names):
        found = [path for path in modules if f".{path}".endswith(f".{name}")]
        if not found:
            raise UserError(f"--also_train {name}: the model has no module of that name")
        for path in found:
            problem = _problem_of_training(modules, path)
            if problem:
                raise UserError(f"--also_train {name}: {path or 'the model'} {problem}")
        paths += found
    for path in paths:
        outer = [other for other in paths if path.startswith(f"{other}.")]
        if outer:
            raise UserError(f"--also_train: {path} is a part of {outer[0]}: leave one of them out")
    return list(dict.fromkeys(paths))


def _problem_of_training(modules: dict[str, torch.nn.Module], path: str) -> str:
    """What keeps the module at a path from being trained whole; "" if nothing does."""
    parts = [name for name in modules if f"{name}.".startswith(f"{path}." if path else "")]
    if any(re.fullmatch(LORA_TARGETS, name) for name in parts):
        return "holds layers that LoRA changes: name other modules, such as visual"
    if isinstance(modules[path], (torch.nn.ModuleList, torch.nn.ModuleDict)):
        return "is a list of modules: name them, such as its 0"
    if not any(True for _ in modules[path].parameters()):
        return "has no weights"
    return ""


def trains_vision(model, also_train: Sequence[str]) -> bool:
    """Whether --also_train names the vision tower or a part of it, so that its features change."""
    return any("visual" in path.split(".") for path in modules_to_train(model, also_train))


def add_adapter(
    model, rank: int, alpha: float, also_train: Sequence[str] = (), recompute: bool = False
):
    """Add LoRA (Hu et al. 2022) to the language model, and freeze everything else.

    alpha: LoRA's scale times its rank. also_train: names for `modules_to_train`. recompute: blocks
    are computed again in the backward pass, for less memory. Raises UserError for those names.
    """
    lora = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=LORA_TARGETS,
        # Whole paths: of a name, peft would take every module whose path ends with its letters.
        modules_to_save=modules_to_train(model, also_train) or None,
    )
    model = peft.get_peft_model(model, lora)
    # AdamW's updates are lost in bf16: what is trained is kept in fp32.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if recompute:
        network = base_model(model)
        # The second is the name up to transformers 5.22.
        enable = getattr(network, "activation_checkpointing_enable", None)
        enable = enable or network.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


# -----------------------------------------------------------------------------
# forward


def hidden_states(
    model,
    inputs: dict[str, torch.Tensor],
    image: dict[str, torch.Tensor] | None = None,
    kv_cache: transformers.DynamicCache | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the language model's last hidden states (B, L, D), and each row's next position (B,).

    inputs: what `prompts.encode` returns. image: image_grid_thw with pixel_values, or with
    `features` (tokens of all images, D) of the vision tower. kv_cache: is filled.
    """
    network = base_model(model).model
    image = image or {}
    # The model remembers its positions (`rope_deltas`) from whatever it saw last, so they are
    # computed here. (3, B, L): time, height and width.
    positions, _ = network.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=image.get("image_grid_thw"),
        attention_mask=inputs["attention_mask"],
    )
    options = {"attention_mask": inputs["attention_mask"], "position_ids": positions}
    options["use_cache"] = kv_cache is not None
    options |= cache_argument(network, kv_cache)

    if "features" in image:
        embeddings = network.get_input_embeddings()(inputs["input_ids"])  # (B, L, D)
        is_image = inputs["mm_token_type_ids"].bool()[..., None]  # (B, L, 1)
        features = image["features"].to(embeddings.dtype)
        output = network(inputs_embeds=embeddings.masked_scatter(is_image, features), **options)
    else:
        output = network(
            input_ids=inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            **image,
            **options,
        )
    next_position = positions.amax(dim=(0, 2)) + 1
    return output.last_hidden_state, next_position


def cache_argument(module, kv_cache: transformers.DynamicCache | None) -> dict:
    """Return the cache as a keyword argument, under the name that this transformers gives it."""
    parameters = inspect.signature(module.forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"
    return {name: kv_cache}


# -----------------------------------------------------------------------------
# vision tower


def has_separate_features(model) -> bool:
    """Whether an image enters the language model as input tokens only, so that they can be kept.

    Qwen3-VL also feeds layers of the language model from inside its vision tower.
    """
    return base_model(model).config.model_type in ("qwen2_vl", "qwen2_5_vl")


def vision_digest(model) -> str:
    """Return a digest of the vision tower's weights, to tell apart the features that they make."""
    digest = hashlib.sha256()
    for parameter in base_model(model).model.visual.parameters():
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
