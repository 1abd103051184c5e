"""A Qwen-VL model: loading it with its processor, LoRA adapters, and its hidden states.

The released models come through transformers' Auto classes, from the hub or a folder; `tiny` and
`random-2b` have random weights and are built in offline.py.
"""

import hashlib
import inspect
import warnings
from collections.abc import Sequence
from pathlib import Path

import peft
import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from flowers import UserError, devices, reason
from flowers.qwen.offline import SHAPES, build

DEFAULT = "Qwen/Qwen2-VL-2B-Instruct"
# The linear layers of the language model: attention and MLP of every block. None of the vision
# tower, whose features can then be computed once.
LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"

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
        processor = _from_pretrained(AutoProcessor, name)
        model = _from_pretrained(
            AutoModelForImageTextToText, name, dtype=dtype, attn_implementation="sdpa"
        )
        model = model.eval().to(device)
    processor.tokenizer.padding_side = "left"
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
    """Return the model with the adapter of a run, or of an adapter/ folder, in eval mode.

    Raises UserError if there is none, or if it was made for another model.
    """
    folder = adapter_folder(path)
    try:
        return peft.PeftModel.from_pretrained(model, folder).eval()
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{folder} does not fit {name}: {reason(error)}") from None


def adapter_folder(path: Path) -> Path:
    """The folder of the adapter in a run, or `path` itself. Raises UserError if there is none."""
    folder = path / "adapter" if (path / "adapter").is_dir() else path
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"no adapter in {path}: give a finished run of qwen_train.py")
    return folder


def load_config(name: str):
    """Return transformers' config of a model, without its weights.

    Raises UserError if there is none.
    """
    if name in SHAPES:
        model, _ = build(name, device="meta")
        return model.config
    return _from_pretrained(AutoConfig, name)


def _from_pretrained(auto_class, name: str, **options):
    try:
        return auto_class.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} can't be loaded ({reason(error)}): it needs the network once, "
            "or a folder with its files; --model tiny needs neither"
        ) from None


# -----------------------------------------------------------------------------
# adapters


def base_model(model):
    """Return the Qwen model inside peft's wrapper; the layers of its adapter stay in place."""
    if isinstance(model, peft.PeftModel):
        return model.get_base_model()
    return model


def add_adapter(
    model, rank: int, alpha: float, also_train: Sequence[str] = (), recompute: bool = False
):
    """Add LoRA (Hu et al. 2022) to the language model, and freeze everything else.

    alpha: LoRA's scale times its rank. also_train: modules that are trained whole, such as
    `merger` or `visual`. recompute: blocks are computed again in the backward pass, for less
    memory. Raises UserError if there is no module of a name.
    """
    module_names = {path.rsplit(".", 1)[-1] for path, _ in model.named_modules()}
    for name in also_train:
        if name not in module_names:
            raise UserError(f"--also_train {name}: the model has no module of that name")
    lora = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=LORA_TARGETS,
        modules_to_save=list(also_train) or None,
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
