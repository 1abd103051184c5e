"""Qwen2-VL models with random weights, and their processor, made without any download.

`tiny` makes every script run on any machine; `random-2b` has the shape of the released 2B model, to
measure speed and memory with.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

import flowers
from flowers.qwen.prompts import END, IMAGE
from flowers.qwen_settings import DESCRIBE, QUESTIONS

CLASS_NAMES_FILE = Path(flowers.__file__).with_name("cat_to_name.json")


@dataclass(frozen=True)
class Shape:
    """The sizes of a model. vocabulary: in tokens; 0 for that of the tokenizer made here."""

    # language model
    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    # vision tower
    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_mlp_ratio: int
    patch: int
    # images are scaled to between so many pixels, in all
    min_pixels: int
    max_pixels: int


SHAPES = {
    # its vision tower has the size of CLIP's `tiny`
    "tiny": Shape(
        width=128,
        mlp=256,
        layers=2,
        heads=4,
        kv_heads=2,
        vocabulary=0,
        vision_width=128,
        vision_layers=4,
        vision_heads=4,
        vision_mlp_ratio=4,
        patch=8,
        min_pixels=64 * 64,
        max_pixels=64 * 64,
    ),
    # Qwen/Qwen2-VL-2B-Instruct
    "random-2b": Shape(
        width=1536,
        mlp=8960,
        layers=28,
        heads=12,
        kv_heads=2,
        vocabulary=151936,
        vision_width=1280,
        vision_layers=32,
        vision_heads=16,
        vision_mlp_ratio=4,
        patch=14,
        min_pixels=56 * 56,
        max_pixels=512 * 512,
    ),
}

# the special tokens of the released models
TEXT_END = "<|endoftext|>"
TURN_START = "<|im_start|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
VIDEO = "<|video_pad|>"
SPECIAL_TOKENS = [
    TEXT_END,
    TURN_START,
    END,
    VISION_START,
    VISION_END,
    "<|vision_pad|>",
    IMAGE,
    VIDEO,
]

# The chat format of the released models: a system turn first, images as one token between marks.
SYSTEM = "You are a helpful assistant."
TEMPLATE = (
    "{% if messages[0].role != 'system' %}"
    "<|im_start|>system\n" + SYSTEM + "<|im_end|>\n"
    "{% endif %}"
    "{% for turn in messages %}"
    "<|im_start|>{{ turn.role }}\n"
    "{% if turn.content is string %}{{ turn.content }}"
    "{% else %}"
    "{% for part in turn.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_bpe(texts: Sequence[str], vocabulary: int) -> tuple[dict[str, int], list]:
    """Train a byte-level BPE that splits words as Qwen's does.

    Returns the ids of its tokens, and the pairs of tokens that it merges, in order.
    """
    bpe = Tokenizer(models.BPE())
    # Merges stay within a word, and every text can be written in bytes.
    split_words = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split_words, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)

    learned = json.loads(bpe.to_str())["model"]
    merges = []
    for merge in learned["merges"]:
        # Earlier versions of tokenizers write "a b" for ["a", "b"].
        pair = merge.split(" ") if isinstance(merge, str) else merge
        merges.append(tuple(pair))
    return learned["vocab"], merges


def build_tokenizer() -> transformers.Qwen2Tokenizer:
    """Make a tokenizer for the flower names and questions, with the released special tokens."""
    class_names = json.loads(CLASS_NAMES_FILE.read_text(encoding="utf-8")).values()
    chat = [SYSTEM, "system\n", "user\n", "assistant\n"]
    # What tiny reads and writes most, so that its sequences are short.
    texts = [*class_names, *QUESTIONS.values(), DESCRIBE, *chat]
    # 256 bytes, and 444 merges of them
    vocabulary, merges = train_bpe(texts, vocabulary=700)
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, eos_token=END, pad_token=TEXT_END
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    return tokenizer


def build_processor(shape: Shape) -> transformers.Qwen2VLProcessor:
    """Make a Qwen2-VL processor: tokenizer, chat format, and how images are scaled and cut."""
    # transformers wants a video processor, even where no video is shown.
    return transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(
            patch_size=shape.patch, min_pixels=shape.min_pixels, max_pixels=shape.max_pixels
        ),
        tokenizer=build_tokenizer(),
        video_processor=transformers.Qwen2VLVideoProcessor(patch_size=shape.patch),
        chat_template=TEMPLATE,
    )


def build_config(shape: Shape, tokenizer: transformers.Qwen2Tokenizer):
    """Make the config of a Qwen2-VL model of a shape."""
    token_id = tokenizer.convert_tokens_to_ids
    # A head has width / 2 rotary frequencies. Time, height and width get 1 : 1.5 : 1.5 of them, as
    # in the released models.
    frequencies = shape.width // shape.heads // 2
    per_side = frequencies * 3 // 8
    text = {
        "vocab_size": shape.vocabulary or len(tokenizer),
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "bos_token_id": token_id(TEXT_END),
        "eos_token_id": token_id(END),
        "pad_token_id": token_id(TEXT_END),
        # The embeddings are also the head: 0.02 would leave the logits of a narrow model flat.
        "initializer_range": 0.02 if shape.vocabulary else 0.1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [frequencies - 2 * per_side, per_side, per_side],
        },
    }
    vision = {
        "depth": shape.vision_layers,
        "embed_dim": shape.vision_width,
        "num_heads": shape.vision_heads,
        "hidden_size": shape.width,
        "mlp_ratio": shape.vision_mlp_ratio,
        "patch_size": shape.patch,
    }
    # The model looks for these tokens in its input, to put image features in their place.
    return AutoConfig.for_model(
        "qwen2_vl",
        text_config=text,
        vision_config=vision,
        image_token_id=token_id(IMAGE),
        video_token_id=token_id(VIDEO),
        vision_start_token_id=token_id(VISION_START),
        vision_end_token_id=token_id(VISION_END),
        tie_word_embeddings=True,
    )


def build(name: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
    """Make a model of SHAPES in eval mode, and its processor.

    The weights are random, but the same each time.
    """
    shape = SHAPES[name]
    processor = build_processor(shape)
    config = build_config(shape, processor.tokenizer)
    # The caller's random numbers stay as they are.
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    # What ends an answer, and what fills shorter ones up.
    model.generation_config.eos_token_id = processor.tokenizer.convert_tokens_to_ids(END)
    model.generation_config.pad_token_id = processor.tokenizer.convert_tokens_to_ids(TEXT_END)
    return model.eval(), processor
