"""How many gigabytes a run needs on a GPU: an estimate, before any weights are loaded.

It decides, too: whether blocks are computed again in the backward pass, and how many images are
looked at together under --batch_size auto.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flowers import files
from flowers.qwen.adapters import LORA_TARGETS, modules_to_train
from flowers.qwen.models import FULL_PRECISION, in_4bit, load_skeleton
from flowers.qwen.offline import SHAPES
from flowers.qwen.ranking import MAX_LOGITS
from flowers.qwen_settings import AUTO

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}  # of a number
FP32 = 4
# Of a weight in NF4: 4 bits, 8 for the scale of 64 weights, and 32 for that of 256 scales.
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
ANSWER_TOKENS = 32  # at most so many positions of an image have logits in training
ROOM = 0.9  # of what is free: the context of CUDA and fragmentation take the rest


@dataclass(frozen=True)
class Work:
    """What a model is to do at a time.

    batch_size: images. image_tokens, text_tokens: of one image, and of question and answer. rank:
    of LoRA, for training; 0 for ranking. precision: bf16, fp16 or fp32, of weights and activations.
    also_train: as the flag. recompute: blocks are computed again in the backward pass.
    """

    batch_size: int
    image_tokens: int
    text_tokens: int
    rank: int = 0
    precision: str = "bf16"
    load_4bit: bool = False
    also_train: Sequence[str] = ()
    recompute: bool = False


def memory(skeleton, work: Work) -> dict[str, float]:
    """Estimate the gigabytes (1e9 bytes) on a GPU, by part and in total.

    skeleton: from `load_skeleton`.

    weights      all parameters
    trained      weight, gradient and two moments of Adam in fp32, and the weight in the precision
                 of the model, of each parameter of LoRA and of --also_train, whose own stay beside
                 these copies
    activations  ranking: keys and values of all blocks, and one block's intermediate results;
                 training: what the backward pass needs of every block, or with `recompute` the
                 input of each, and one block with its gradients; of the vision tower if it is
                 trained
    logits       of the answer's tokens in fp32, and what their softmax takes
    """
    if work.rank:
        activations = _training_activations(skeleton, work)
    else:
        activations = _ranking_activations(skeleton, work)
    cast = 0 if work.precision == "fp32" else BYTES[work.precision]
    n_bytes = {
        "weights": _weight_bytes(skeleton, work),
        "trained": (4 * FP32 + cast) * _count_trained(skeleton, work),
        "activations": activations,
        "logits": _logit_bytes(skeleton, work),
    }
    gigabytes = {part: n / 1e9 for part, n in n_bytes.items()}
    gigabytes["total"] = sum(n_bytes.values()) / 1e9
    return gigabytes


# -----------------------------------------------------------------------------
# weights


def _weight_bytes(skeleton, work: Work) -> float:
    parameters = skeleton.parameters()
    n_bytes = BYTES[work.precision] * sum(parameter.numel() for parameter in parameters)
    if work.load_4bit or in_4bit(skeleton.config):
        for name, module in skeleton.named_modules():
            # Layers whose weights are quantised; their biases are not.
            if isinstance(module, torch.nn.Linear) and not name.startswith(FULL_PRECISION):
                n_bytes -= module.weight.numel() * (BYTES[work.precision] - NF4_BYTES)
    return n_bytes


def _count_trained(skeleton, work: Work) -> int:
    """How many parameters are trained: LoRA's, and those of modules that are trained whole."""
    if not work.rank:
        return 0
    n_trained = 0
    for name, module in skeleton.named_modules():
        # A layer of in x out gets two matrices, in x rank and rank x out.
        if re.fullmatch(LORA_TARGETS, name):
            n_trained += work.rank * (module.in_features + module.out_features)
    for path in modules_to_train(skeleton, work.also_train):
        module = skeleton.get_submodule(path)
        n_trained += sum(parameter.numel() for parameter in module.parameters())
    return n_trained


# -----------------------------------------------------------------------------
# activations


def _ranking_activations(skeleton, work: Work) -> float:
    text = skeleton.config.get_text_config()
    number = BYTES[work.precision]
    positions = work.batch_size * (work.image_tokens + work.text_tokens)
    keys_and_values = text.num_hidden_layers * positions * 2 * _kv_width(text) * number
    # One block: about eight vectors of the model's width, and four of the MLP's, a position.
    block = positions * (8 * text.hidden_size + 4 * _mlp_width(text)) * number
    return keys_and_values + block


def _training_activations(skeleton, work: Work) -> float:
    text = skeleton.config.get_text_config()
    positions = work.batch_size * (work.image_tokens + work.text_tokens)
    n_bytes = _activations_of_blocks(
        positions, text.num_hidden_layers, text.hidden_size, _mlp_width(text), work
    )
    if _trains_vision_blocks(skeleton, work):
        vision = skeleton.config.vision_config
        patches = work.batch_size * work.image_tokens * vision.spatial_merge_size**2
        # Qwen2-VL alone calls its width another name, and the MLP's a ratio.
        width = getattr(vision, "embed_dim", None) or vision.hidden_size
        ratio = getattr(vision, "mlp_ratio", None)
        mlp_width = int(width * ratio) if ratio else vision.intermediate_size
        n_bytes += _activations_of_blocks(patches, vision.depth, width, mlp_width, work)
    return n_bytes


def _activations_of_blocks(
    positions: int, n_blocks: int, width: int, mlp_width: int, work: Work
) -> float:
    """Bytes that the backward pass needs of a tower's blocks."""
    number = BYTES[work.precision]
    # Inputs of the layers that are trained, keys, queries and values with heads repeated, and the
    # result of attention: about eight vectors a position. The MLP's: gate, its activation, up and
    # their product. Norms keep their input in fp32, twice.
    block = positions * ((8 * width + 4 * mlp_width) * number + 2 * width * FP32)
    if not work.recompute:
        return n_blocks * block
    # A block that is computed again holds its results and their gradients.
    return n_blocks * positions * width * number + 2 * block


def _trains_vision_blocks(skeleton, work: Work) -> bool:
    """Whether the backward pass goes through blocks of the vision tower."""
    paths = modules_to_train(skeleton, work.also_train)
    outside = ("model.visual.merger", "model.visual.deepstack_merger_list")
    return any(p.startswith("model.visual") and not p.startswith(outside) for p in paths)


def _kv_width(text) -> int:
    # Only some families say how wide a head is.
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return text.num_key_value_heads * head


def _mlp_width(text) -> int:
    """Of the MLP, or of all experts together that a token goes through."""
    experts = getattr(text, "num_experts_per_tok", None)
    return experts * text.moe_intermediate_size if experts else text.intermediate_size


def _logit_bytes(skeleton, work: Work) -> float:
    # The vocabulary is large: 151,936 tokens, or 0.6 MB a position.
    vocabulary = skeleton.config.get_text_config().vocab_size
    if work.rank:
        # in the precision of the model, in fp32, and both their gradients
        return 2 * work.batch_size * ANSWER_TOKENS * vocabulary * (BYTES[work.precision] + FP32)
    n_logits = min(work.batch_size * work.text_tokens * vocabulary, MAX_LOGITS)
    # in the precision of the model, in fp32, and their exponentials
    return n_logits * (BYTES[work.precision] + 2 * FP32)


# -----------------------------------------------------------------------------
# decisions


def free_gigabytes(device: torch.device | str) -> float | None:
    """How many gigabytes (1e9 bytes) are free on a GPU; None on any other device."""
    if torch.device(device).type != "cuda":
        return None
    free_bytes, _ = torch.cuda.mem_get_info()
    return free_bytes / 1e9


def fits(skeleton, work: Work, free: float | None) -> bool:
    """Whether an estimate leaves room in what is free (GB); None fits everything."""
    return free is None or memory(skeleton, work)["total"] <= ROOM * free


def must_recompute(skeleton, work: Work, free: float | None) -> bool:
    """Whether the backward pass has no room for the results of every block."""
    return not fits(skeleton, dataclasses.replace(work, recompute=False), free)


def largest_batch(skeleton, work: Work, free: float | None) -> int:
    """Return the largest power of two of images, up to work.batch_size, that fits; at least 1.

    Where everything fits, as on a CPU, it is work.batch_size itself.
    """
    if fits(skeleton, work, free):
        return work.batch_size
    batch_size = 1
    while 2 * batch_size < work.batch_size and fits(
        skeleton, dataclasses.replace(work, batch_size=2 * batch_size), free
    ):
        batch_size *= 2
    return batch_size


def evaluation_batch(config, text_tokens: int, device: torch.device, most: int = 1) -> int:
    """Return how many images an evaluation looks at together, and print what that takes.

    config: the settings of the script; its batch_size is AUTO for as many as fit, up to `most`.
    text_tokens: of question and answer, about.
    """
    skeleton = load_skeleton(config.model)
    is_auto = config.batch_size == AUTO
    work = Work(
        most if is_auto else config.batch_size,
        tokens_of_image(config.model, skeleton, config.max_pixels),
        text_tokens,
        precision=config.precision,
        load_4bit=config.load_4bit,
    )
    free = free_gigabytes(device)
    if is_auto:
        work = dataclasses.replace(work, batch_size=largest_batch(skeleton, work, free))
    files.say(memory_line(config.model, skeleton, work, free))
    return work.batch_size


# -----------------------------------------------------------------------------
# words


def tokens_of_image(name: str, skeleton, max_pixels: int) -> int:
    """How many tokens an image has in a model, at most."""
    # All images of tiny have one size.
    pixels = SHAPES["tiny"].max_pixels if name == "tiny" else max_pixels
    vision = skeleton.config.vision_config
    return pixels // (vision.patch_size * vision.spatial_merge_size) ** 2


def memory_line(name: str, skeleton, work: Work, free: float | None) -> str:
    """Return one line about the memory that a model needs, and what is free on the GPU (GB)."""
    gigabytes = memory(skeleton, work)
    total = gigabytes.pop("total")
    parts = ", ".join(f"{part} {value:.2g}" for part, value in gigabytes.items() if value)
    how = f"{work.precision}, 4 bits a weight" if work.load_4bit else work.precision
    if work.recompute:
        how += ", blocks computed again"
    line = f"{name}: about {total:.3g} GB for {work.batch_size} images at a time in {how} ({parts})"
    if free is not None:
        line += f"; {free:.1f} GB are free on the GPU"
        if free < total:
            line += ": too few, lower the batch or --max_pixels"
    return line
