"""A scorer of class names that shares no code with flowers.qwen, and small models to try it on.

The plain way: the library's own processor, chat template and model, one whole forward a name,
without a cache, a mask or positions of ours. What flowers.qwen.ranking computes is compared with
it.
"""

from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from flowers.qwen.offline import SYSTEM, TEMPLATE, build

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
END = "<|im_end|>"
QUESTION = "What kind of flower is this? Answer with its name only."
# What the later families ask without: their chat begins with the user.
SYSTEM_TURN = "<|im_start|>system\n" + SYSTEM + "<|im_end|>\n"


# -----------------------------------------------------------------------------
# scoring


def load(folder, dtype=torch.float32, adapter=None, **options):
    """Return model and processor of a folder, by the library alone. options: of from_pretrained."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, **options)
    for module in model.modules():
        # bitsandbytes would compute in bf16 on a CPU that can.
        module.support_avx512bf16_for_cpu = False
    if adapter:
        model = peft.PeftModel.from_pretrained(model, adapter)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def library_encoding(processor, images, answer=None, question=QUESTION):
    """The library's own encoding of conversations; with an answer, up to its end token."""
    conversations = []
    for image in images:
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}]
        if answer is not None:
            content = [{"type": "text", "text": answer}]
            turns.append({"role": "assistant", "content": content})
        conversations.append(turns)
    return processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=answer is None,
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


@torch.no_grad()
def forward_a_name(model, processor, image, names, question=QUESTION):
    """(C,) log-likelihoods of each name and END: a whole forward of the library's encoding each."""
    prompt = library_encoding(processor, [image], question=question)["input_ids"][0]
    end_id = processor.tokenizer.convert_tokens_to_ids(END)
    sums = []
    for name in names:
        inputs = library_encoding(processor, [image], name, question)
        ids = inputs["input_ids"][0]
        start = len(prompt)
        assert torch.equal(ids[:start], prompt)
        first_end = (ids[start:] == end_id).nonzero()[0, 0]
        end = start + first_end + 1
        logits = model(**inputs, use_cache=False).logits[0]
        log_probabilities = logits.float().log_softmax(-1)
        sums.append(sum(log_probabilities[t - 1, ids[t]] for t in range(start, end)))
    return torch.stack(sums)


# -----------------------------------------------------------------------------
# models and images


def pictures(*sizes):
    """Images of noise of sizes (height, width)."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 255, (height, width, 3), dtype=np.uint8) for height, width in sizes]
    return [Image.fromarray(image) for image in noise]


def small_family(family, folder) -> Path:
    """Write a random model of two layers to a folder, as a download would be, and return it."""
    _, processor = build("tiny")
    token_id = processor.tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(processor.tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]},
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "out_hidden_size": 64,
        "intermediate_size": 64,
        "patch_size": 8,
    }
    template = TEMPLATE
    if family.startswith("qwen3_vl"):
        text["head_dim"] = 16
        text["rope_parameters"]["mrope_interleaved"] = True
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        processor_class = transformers.Qwen3VLProcessor
        video_class = transformers.Qwen3VLVideoProcessor
        template = TEMPLATE.replace(SYSTEM_TURN, "")
        if family == "qwen3_vl_moe":
            text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    elif family == "qwen2_5_vl":
        vision |= {"window_size": 32, "fullatt_block_indexes": [1]}
        processor_class = transformers.Qwen2_5_VLProcessor
        video_class = transformers.Qwen2VLVideoProcessor
    else:
        vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
        processor_class = transformers.Qwen2VLProcessor
        video_class = transformers.Qwen2VLVideoProcessor
    processor_class(
        image_processor=transformers.Qwen2VLImageProcessor(
            patch_size=8, min_pixels=32 * 32, max_pixels=64 * 64
        ),
        tokenizer=processor.tokenizer,
        video_processor=video_class(patch_size=8),
        chat_template=template,
    ).save_pretrained(folder)
    config = transformers.AutoConfig.for_model(
        family,
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return folder
