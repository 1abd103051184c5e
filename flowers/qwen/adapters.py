"""LoRA adapters of a Qwen-VL model: adding one, and loading one, which must fit as a whole."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights

from flowers import UserError
from flowers.qwen_settings import adapter_folder

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


def base_model(model):
    """Return the Qwen model inside peft's wrapper; the layers of its adapter stay in place."""
    if isinstance(model, peft.PeftModel):
        return model.get_base_model()
    return model


# -----------------------------------------------------------------------------
# loading


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
            raise ValueError(some("the model has no", result.unexpected_keys))
        # The model's own parameters are none of the adapter's, and always missing.
        missing = [key for key in result.missing_keys if ADAPTER in key.split(".")]
        if missing:
            raise ValueError(some("the adapter lacks", missing))
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


def some(what: str, keys: Sequence[str]) -> str:
    """The first of some keys and how many more there are, for a line of error."""
    others = f" and {len(keys) - 1:,} more" if len(keys) > 1 else ""
    return f"{what} {sorted(keys)[0]}{others}"


# -----------------------------------------------------------------------------
# adding


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
    parameters = list(modules[path].parameters())
    if not parameters:
        return "has no weights"
    if not all(parameter.is_floating_point() for parameter in parameters):
        return "is quantised: only LoRA can change it"
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
    # What is frozen stays in its own precision, the norms too, which QLoRA's usual preparation
    # (peft.prepare_model_for_kbit_training) would copy in fp32 with the embeddings.
    model = peft.get_peft_model(model, lora)
    # AdamW's updates are lost in bf16: what is trained is kept in fp32.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    _keep_inputs_as_they_are(model)
    if recompute:
        network = base_model(model)
        # The second is the name up to transformers 5.22.
        enable = getattr(network, "activation_checkpointing_enable", None)
        enable = enable or network.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def _keep_inputs_as_they_are(model) -> None:
    """Let LoRA take inputs of the model's precision, for steps under autocast.

    peft copies them in fp32, the precision of LoRA's weights; autocast makes them bf16 again, and
    both would be kept for the backward pass. The values are the same.
    """
    if base_model(model).dtype != torch.float32:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                # as peft.helpers.disable_input_dtype_casting, but for good
                module.cast_input_dtype_enabled = False
