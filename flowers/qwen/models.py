"""A Qwen-VL model: loading it with its processor, and its hidden states.

The released models come through transformers' Auto classes, from the hub or a folder; `tiny` and
`random-2b` have random weights and are built in offline.py.
"""

import dataclasses
import hashlib
import inspect
import tempfile
from importlib.util import find_spec
from pathlib import Path

import peft
import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from flowers import UserError, devices, reason
from flowers.qwen.adapters import base_model, load_adapter, some
from flowers.qwen.offline import SHAPES, build
from flowers.qwen.prompts import END, Tensors
from flowers.qwen_settings import Settings

# Whose ranking is tested against one plain forward a name, by the model_type of their config.
FAMILIES = {
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL-MoE",
}
# What --load_4bit leaves as it is, by the beginning and by the end of module paths.
FULL_PRECISION = ("model.visual", "visual", "lm_head")


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
    load_4bit: bool = False,
):
    """Load a model in eval mode and in the precision of the device, and its processor.

    name: `tiny`, `random-2b`, a name on the hub, or a folder. adapter: a run of qwen_train.py, or
    its adapter/ folder. max_pixels: larger images are scaled down to so many pixels. load_4bit:
    the weights of the language model's blocks in 4 bits each, see `quantisation`.
    Raises UserError for what can't be loaded.
    """
    dtype = devices.DTYPES[devices.precision_of(device)]
    if name not in SHAPES:
        load_config(name)  # first: it says what is wrong with other kinds of folders
        processor = _from_pretrained(AutoProcessor, name)
        model = _load_weights(name, dtype, device, load_4bit)
    else:
        model, processor = build(name, dtype, "cpu" if load_4bit else device)
        if load_4bit:
            # Weights are quantised on their way from a file.
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                model = _load_weights(folder, dtype, device, load_4bit)
            # Not that of a folder which is gone, for adapters to name.
            model.name_or_path = model.config._name_or_path = ""
    if dtype == torch.float32:
        _compute_in_fp32(model)
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


def _load_weights(name: str, dtype: torch.dtype, device: torch.device | str, load_4bit: bool):
    """Load the model of a folder or of the hub, whole. Raises UserError if it isn't."""
    config = load_config(name)
    options = {}
    if load_4bit and not in_4bit(config):
        check_4bit(name, device)
        options["quantization_config"] = quantisation(dtype)
    if load_4bit or in_4bit(config):
        options["device_map"] = {"": device}
    model, info = _from_pretrained(
        AutoModelForImageTextToText,
        name,
        dtype=dtype,
        attn_implementation="sdpa",
        output_loading_info=True,
        **options,
    )
    # An adapter that lies beside the weights on the hub has been loaded unseen.
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"{name} holds an adapter: give it with --adapter")
    _check_weights(name, info)
    return model.eval() if "device_map" in options else model.eval().to(device)


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


def on_machine(config: Settings, device: torch.device) -> Settings:
    """The settings of a script, with the device and precision that it has here.

    config: a dataclass with `model`, `max_pixels`, `load_4bit`, `device` and `precision`. Raises
    UserError if the model can't be had, or not so.
    """
    check_max_pixels(config.model, config.max_pixels)
    if config.load_4bit:
        check_4bit(config.model, device)
    precision = devices.set_precision(config.precision, device)
    return dataclasses.replace(config, device=str(device), precision=precision)


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


# -----------------------------------------------------------------------------
# loading in 4 bits


def quantisation(dtype: torch.dtype) -> transformers.BitsAndBytesConfig:
    """Return how --load_4bit stores weights: NF4, doubly quantised (Dettmers et al. 2023).

    64 weights share a scale of 8 bits, and 256 such scales one of 32: 4.127 bits a weight. For
    a product they are restored in `dtype`. What is left as it is: the vision tower, so that its
    features are those of every run, the head, and whatever is no linear layer.
    """
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(FULL_PRECISION),
    )


def in_4bit(config) -> bool:
    """Whether a model's files hold weights in the 4 bits of bitsandbytes, by its config."""
    stored = getattr(config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    return bool(stored.get("load_in_4bit"))


def check_4bit(name: str, device: torch.device | str) -> None:
    """Raise UserError if a model can't be loaded in 4 bits on a device."""
    if find_spec("bitsandbytes") is None:
        raise UserError("--load_4bit needs pip install -r requirements-4bit.txt")
    if torch.device(device).type not in ("cuda", "cpu"):
        raise UserError(f"--load_4bit needs --device cuda or cpu, not {device}")
    config = load_config(name)
    if getattr(config, "quantization_config", None) and not in_4bit(config):
        raise UserError(f"--load_4bit: {name} is quantised already, in another way")


def _compute_in_fp32(model) -> None:
    """Keep bitsandbytes from computing in bf16 on CPUs that can, which fp32 was not asked for."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


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
            f"{some(f'the files of {name} lack', missing)}: it would have random weights there"
        )
    adapters = [key for key in info["unexpected_keys"] if "lora_" in key]
    if adapters:
        raise UserError(
            f"{some(f'the files of {name} hold', adapters)}: merge the adapter, or save it alone "
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
# forward


def hidden_states(
    model,
    inputs: Tensors,
    image: Tensors | None = None,
    kv_cache: transformers.DynamicCache | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the language model's last hidden states (B, L, D), and each row's next position (B,).

    inputs: what `prompts.encode` returns. image: image_grid_thw with pixel_values, or with the
    `features` that `vision_features` makes of them. kv_cache: is filled.
    """
    network = base_model(model).model
    positions = prompt_positions(model, inputs, image)
    output = network(
        **inputs,
        **image_arguments(model, image),
        position_ids=positions,
        use_cache=kv_cache is not None,
        **cache_argument(network, kv_cache),
    )
    next_position = positions.amax(dim=(0, 2)) + 1
    return output.last_hidden_state, next_position


def prompt_positions(model, inputs: Tensors, image: Tensors | None) -> torch.Tensor:
    """Return the positions (3, B, L) of prompts: in time, height and width.

    The model itself remembers positions (`rope_deltas`) from whatever it saw last.
    """
    positions, _ = base_model(model).model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=(image or {}).get("image_grid_thw"),
        attention_mask=inputs["attention_mask"],
    )
    return positions


def cache_argument(module, kv_cache: transformers.DynamicCache | None) -> dict:
    """Return the cache as a keyword argument, under the name that this transformers gives it."""
    parameters = inspect.signature(module.forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"
    return {name: kv_cache}


# -----------------------------------------------------------------------------
# vision tower


def feature_width(model) -> int:
    """How many numbers `vision_features` has for a token of an image.

    Qwen3-VL also feeds layers of the language model from inside its vision tower (deepstack).
    """
    config = base_model(model).config
    levels = getattr(config.vision_config, "deepstack_visual_indexes", [])
    return config.get_text_config().hidden_size * (1 + len(levels))


def vision_features(model, image: Tensors) -> torch.Tensor:
    """Return what the language model is given of images: (tokens of all images, feature_width).

    image: pixel_values and image_grid_thw.
    """
    output = base_model(model).model.get_image_features(**image, return_dict=True)
    # Each level has a tensor (T, D) for every image.
    levels = [output.pooler_output, *(output.get("deepstack_features") or [])]
    return torch.cat([torch.cat(list(level)) for level in levels], 1)


def image_arguments(model, image: Tensors | None) -> dict:
    """Return images, as pixels or features, as the model's keyword arguments."""
    if not image or "features" not in image:
        return image or {}
    width = base_model(model).config.get_text_config().hidden_size
    first, *deeper = image["features"].split(width, 1)
    # Of all images as of one: the model joins them.
    output = BaseModelOutputWithDeepstackFeatures(
        pooler_output=(first,), deepstack_features=[(level,) for level in deeper]
    )
    return {"mm_encoder_outputs": {"image": output}, "image_grid_thw": image["image_grid_thw"]}


def vision_digest(model) -> str:
    """Return a digest of the vision tower's weights, to tell apart the features that they make."""
    digest = hashlib.sha256()
    for parameter in base_model(model).model.visual.parameters():
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
