"""How many gigabytes a run needs on a GPU: an estimate, before any weights are loaded."""

import torch
from transformers import AutoModelForImageTextToText

from flowers.qwen.models import load_config
from flowers.qwen.offline import SHAPES

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}  # of a number
FP32 = 4
ANSWER_TOKENS = 32  # at most so many positions have logits at a time


def memory(
    config,
    batch_size: int,
    image_tokens: int,
    text_tokens: int,
    rank: int = 0,
    precision: str = "bf16",
) -> dict[str, float]:
    """Estimate the gigabytes (1e9 bytes) on a GPU, by part and in total.

    rank: that of LoRA, for training with blocks computed again in the backward pass; 0 for ranking.
    precision: bf16, fp16 or fp32, of the weights and activations.

    weights      all parameters
    adapter      weight, gradient and two moments of Adam in fp32, of each LoRA parameter
    activations  ranking: keys and values of all blocks, and one block's intermediate results;
                 training: the input of each block, and one block computed again, with gradients
    logits       of the answer's tokens in fp32; in training their gradient, too
    """
    number = BYTES[precision]
    text = config.get_text_config()
    width = text.hidden_size
    positions = batch_size * (image_tokens + text_tokens)
    # On the meta device a model has shapes, but no numbers.
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())

    # A layer of in x out gets two matrices, in x rank and rank x out.
    lora_parameters = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "language_model.layers" in name:
            lora_parameters += rank * (module.in_features + module.out_features)

    # One block: about eight vectors of the model's width, and four of the MLP's, a position.
    block = positions * (8 * width + 4 * text.intermediate_size) * number
    # The vocabulary is large: 151,936 tokens, or 0.6 MB a position.
    logits = batch_size * ANSWER_TOKENS * text.vocab_size * FP32
    if rank:
        # A block that is computed again holds its results and gradients: about three times `block`.
        block_inputs = text.num_hidden_layers * positions * width * number
        activations = block_inputs + 3 * block
        logits *= 2
    else:
        kv_width = text.num_key_value_heads * (width // text.num_attention_heads)
        keys_and_values = text.num_hidden_layers * positions * 2 * kv_width * number
        activations = keys_and_values + block

    n_bytes = {
        "weights": n_parameters * number,
        "adapter": 4 * lora_parameters * FP32,
        "activations": activations,
        "logits": logits,
    }
    gigabytes = {part: n / 1e9 for part, n in n_bytes.items()}
    gigabytes["total"] = sum(n_bytes.values()) / 1e9
    return gigabytes


def memory_line(
    name: str,
    batch_size: int,
    max_pixels: int,
    text_tokens: int,
    rank: int = 0,
    precision: str = "bf16",
) -> str:
    """Return one line about the memory that a model needs, and what is free on the GPU.

    batch_size: images at a time. text_tokens: of question and answer. rank and precision are those
    of `memory`.
    Raises UserError if the model's config can't be loaded.
    """
    config = load_config(name)
    # All images of tiny have one size.
    pixels = SHAPES["tiny"].max_pixels if name == "tiny" else max_pixels
    token_side = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    gigabytes = memory(config, batch_size, pixels // token_side**2, text_tokens, rank, precision)
    total = gigabytes.pop("total")
    parts = ", ".join(f"{part} {value:.2g}" for part, value in gigabytes.items() if value)
    line = (
        f"{name}: about {total:.3g} GB for {batch_size} images at a time in {precision} ({parts})"
    )
    if torch.cuda.is_available():
        free_bytes, _ = torch.cuda.mem_get_info()
        free = free_bytes / 1e9
        line += f"; {free:.1f} GB are free on the GPU"
        if free < total:
            line += ": too few, lower the batch or --max_pixels"
    return line
