"""Operations and gigabytes of Qwen2-VL at 2B and 7B, by formula: nothing is timed, and no GPU or
weights are needed.

    python benchmarks/qwen_work.py     # two tables, for docs/qwen.md

Operations are those of matrix products, 2 a multiplication with addition; those of tiny are counted
as well, to check the formula. An image has 512 x 512 pixels, 324 tokens, its question 50; names
have the tokens of the tokenizer that offline.py makes. Gigabytes are those of flowers.qwen.memory.
"""

import dataclasses
import json
import re

import torch
from PIL import Image
from tabulate import tabulate
from transformers import AutoModelForImageTextToText

from flowers import command
from flowers.models import count_flops
from flowers.qwen.adapters import LORA_TARGETS
from flowers.qwen.memory import Work, memory
from flowers.qwen.models import load_model
from flowers.qwen.offline import (
    CLASS_NAMES_FILE,
    SHAPES,
    build_config,
    build_tokenizer,
)
from flowers.qwen.prompts import encode, patches
from flowers.qwen.ranking import PackedNames, rank
from flowers.qwen_settings import QUESTIONS

# Qwen/Qwen2-VL-7B-Instruct, whose head is not its embedding
SHAPE_7B = dataclasses.replace(
    SHAPES["random-2b"], width=3584, mlp=18944, heads=28, kv_heads=4, vocabulary=152064
)
IMAGE_TOKENS = 324
QUESTION_TOKENS = 50
NAME_TOKENS = 312  # that are packed, of 102 names
TREE_TOKENS = 304  # what was read before, when names shared their beginnings
N_NAMES = 102
DESCRIPTION_TOKENS = 30
RANK_BATCH = 8
TRAIN_BATCH = 16
ANSWER_TOKENS = 4  # with the question's, as a name and its END


class Shape:
    """How many operations a part of a model takes."""

    def __init__(self, skeleton):
        self.config = skeleton.config
        self.text = skeleton.config.get_text_config()
        self.vision = skeleton.config.vision_config
        self.text_weights = self.vision_weights = 0
        for name, module in skeleton.named_modules():
            if not isinstance(module, torch.nn.Linear):
                continue
            if re.fullmatch(LORA_TARGETS, name):
                self.text_weights += module.weight.numel()
            elif name.startswith("model.visual.blocks"):
                self.vision_weights += module.weight.numel()

    def read(self, n_tokens: int, n_before: int = 0) -> float:
        """Of the language model for a sequence that follows another; attention is not halved."""
        width = self.text.hidden_size
        attention = 4 * n_tokens * (n_before + n_tokens) * width * self.text.num_hidden_layers
        return 2 * n_tokens * self.text_weights + attention

    def see(self, image_tokens: int) -> float:
        """Of the vision tower for an image, with patch embedding and merger."""
        width, merge = self.vision.embed_dim, self.vision.spatial_merge_size**2
        n_patches = image_tokens * merge
        patch_values = 3 * 2 * self.vision.patch_size**2  # two frames
        blocks = 2 * n_patches * self.vision_weights + 4 * n_patches**2 * width * self.vision.depth
        merger = (merge * width) ** 2 + merge * width * self.text.hidden_size
        return blocks + 2 * n_patches * patch_values * width + 2 * image_tokens * merger

    def predict(self, n_tokens: int) -> float:
        """Of the head."""
        return 2 * n_tokens * self.text.hidden_size * self.text.vocab_size


def ranking_rows(shape: Shape) -> dict[str, float]:
    """Operations of ranking the names for one image, by the way that it is done."""
    prompt = IMAGE_TOKENS + QUESTION_TOKENS
    see = shape.see(IMAGE_TOKENS)
    read = shape.read(prompt)

    def names(n_tokens: int, n_before: int) -> float:
        return shape.read(n_tokens, n_before) + shape.predict(1 + n_tokens)

    plain_tokens = N_NAMES * prompt + NAME_TOKENS + N_NAMES
    plain = N_NAMES * see + 2 * plain_tokens * shape.text_weights
    length = plain_tokens / N_NAMES
    plain += N_NAMES * 4 * length**2 * shape.text.hidden_size * shape.text.num_hidden_layers
    plain += shape.predict(NAME_TOKENS + N_NAMES)

    described = prompt + DESCRIPTION_TOKENS
    generate = sum(shape.read(1, prompt + i) for i in range(DESCRIPTION_TOKENS))
    generate += shape.predict(DESCRIPTION_TOKENS)
    return {
        "one forward a name": plain,
        "before: names as a tree": see + read + names(TREE_TOKENS, prompt),
        "now: names as a list": see + read + names(NAME_TOKENS, prompt),
        "now, features kept": read + names(NAME_TOKENS, prompt),
        "described, before": 2 * see
        + read
        + generate
        + shape.read(described)
        + names(TREE_TOKENS, described),
        "described, now": see
        + read
        + generate
        + shape.read(DESCRIPTION_TOKENS, prompt)
        + names(NAME_TOKENS, described),
        "described, now, features kept": read
        + generate
        + shape.read(DESCRIPTION_TOKENS, prompt)
        + names(NAME_TOKENS, described),
    }


def training_rows(shape: Shape) -> dict[str, float]:
    """Operations of a training step of LoRA for one image; LoRA's own are below a hundredth."""
    # Frozen weights have no gradient, so a backward pass costs as much as a forward pass.
    read = shape.read(IMAGE_TOKENS + QUESTION_TOKENS)
    predict = 2 * shape.predict(ANSWER_TOKENS)
    return {
        "training, pixels": shape.see(IMAGE_TOKENS) + 2 * read + predict,
        "training, features kept": 2 * read + predict,
        "training, features kept, blocks computed again": 3 * read + predict,
    }


def memory_rows(skeleton) -> dict[str, float]:
    """Gigabytes of ranking and training."""
    ranking = Work(RANK_BATCH, IMAGE_TOKENS, QUESTION_TOKENS + NAME_TOKENS)
    training = Work(TRAIN_BATCH, IMAGE_TOKENS, QUESTION_TOKENS, rank=8)
    rows = {}
    for load_4bit, weights in ((False, "bf16"), (True, "4 bits")):
        work = dataclasses.replace(ranking, load_4bit=load_4bit)
        rows[f"rank, {RANK_BATCH} images, {weights}"] = memory(skeleton, work)["total"]
        for batch_size in (TRAIN_BATCH, 4):
            for recompute in (False, True):
                work = dataclasses.replace(
                    training, batch_size=batch_size, load_4bit=load_4bit, recompute=recompute
                )
                how = ", blocks computed again" if recompute else ""
                rows[f"train, {batch_size} at a time, {weights}{how}"] = memory(skeleton, work)[
                    "total"
                ]
    return rows


def check_of_tiny() -> float:
    """Operations of ranking by formula, over those that are counted of tiny."""
    model, processor = load_model("tiny", "cpu")
    names = PackedNames(processor, json.loads(CLASS_NAMES_FILE.read_text("utf-8")).values())
    assert len(names.tokens) == NAME_TOKENS and len(names.lengths) == N_NAMES
    image = patches(processor, [Image.new("RGB", (64, 64))])
    inputs = encode(processor, QUESTIONS["brief"], image["image_grid_thw"])
    counted = count_flops(lambda: rank(model, names, inputs, image))
    shape = Shape(model)
    prompt = inputs["input_ids"].shape[1]
    formula = shape.see(16) + shape.read(prompt) + shape.read(NAME_TOKENS, prompt)
    return (formula + shape.predict(1 + NAME_TOKENS)) / counted


@command
def main():
    tokenizer = build_tokenizer()
    work, gigabytes = {}, {}
    for name, shape in (("2B", SHAPES["random-2b"]), ("7B", SHAPE_7B)):
        config = build_config(shape, tokenizer)
        config.tie_word_embeddings = name == "2B"
        with torch.device("meta"):
            skeleton = AutoModelForImageTextToText.from_config(config)
        n_parameters = sum(p.numel() for p in skeleton.parameters())
        print(f"{name}: {n_parameters:,} parameters")
        operations = Shape(skeleton)
        rows = ranking_rows(operations) | training_rows(operations)
        work[name] = {row: value / 1e12 for row, value in rows.items()}
        gigabytes[name] = memory_rows(skeleton)
    print(f"tiny, formula over count: {check_of_tiny():.3f}\n")
    for title, table in (("10^12 operations an image", work), ("GB", gigabytes)):
        rows = [[row, *(table[name][row] for name in table)] for row in table["2B"]]
        print(tabulate(rows, [title, *table], tablefmt="pipe", floatfmt=".3g"), end="\n\n")


if __name__ == "__main__":
    main()
