"""How much faster all class names are ranked than with one forward pass a name, and how far the
scores are from it.

    python benchmarks/qwen.py                     # tiny, 102 names, a short and a long question
    python benchmarks/qwen.py --model random-2b # shape of Qwen2-VL-2B, random weights; needs a GPU

Plain: image, question and name through the model, once a name; pixels and prompt tokens are ready,
logits only where they count. In batches: the same in rows of --names names, padded. Ours:
flowers.qwen. The questions have the usual length, and about 240 tokens. Ratios are medians of
alternating rounds in one run. On a GPU it goes on to images/s of both protocols, seconds a training
step, and peak memory.
"""

import argparse
import json
import statistics
from functools import partial

import numpy as np
import torch
from measure import MATRICES, add_arguments, alternate, peak_flops, report, seconds
from PIL import Image

from flowers import command
from flowers.devices import autocast
from flowers.models import count_flops
from flowers.qwen import adapters, answers, memory, models, prompts, ranking
from flowers.qwen.offline import CLASS_NAMES_FILE
from flowers.qwen_settings import QUESTIONS

MAX_PIXELS = 512 * 512  # of an image
LONG = 240  # tokens of the long question
FILLER = " Look closely at the petals, the centre, the leaves and the stem before you answer."
LORA_RANK = 8
LORA_ALPHA = 16.0


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument(
        "--model",
        default="tiny",
        help="tiny, random-2b, a name on the hub, or a folder (default: %(default)s)",
    )
    parser.add_argument(
        "--names",
        type=int,
        default=34,
        help="names at a time, for the plain way in batches (default: %(default)s)",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=8,
        help="images at a time, for ours in batches and on a GPU (default: %(default)s)",
    )
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    skeleton = models.load_skeleton(args.model)
    image_tokens = memory.tokens_of_image(args.model, skeleton, MAX_PIXELS)
    work = memory.Work(args.batch_size, image_tokens, 460, LORA_RANK)
    print(memory.memory_line(args.model, skeleton, work, memory.free_gigabytes(device)))

    # -----------------------------------------------------------------------------
    # model, names and images
    model, processor = models.load_model(args.model, device, max_pixels=MAX_PIXELS)
    names = list(json.loads(CLASS_NAMES_FILE.read_text(encoding="utf-8")).values())
    images = random_images(args.batch_size)

    # -----------------------------------------------------------------------------
    # ranking
    short = QUESTIONS["brief"]
    patches = prompts.patches(processor, images[:1])
    longer = short
    while prompt_length(processor, longer, patches) < LONG:
        longer += FILLER
    # with a model that needs many tokens an image, both may be the same
    for question in dict.fromkeys((short, longer)):
        measure_ranking(model, processor, names, question, images, args)

    # -----------------------------------------------------------------------------
    # on a GPU
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        measure_protocols(model, processor, names, short, images, args.rounds)
        measure_training(model, processor, names, short, images, args.rounds)


def random_images(count: int) -> list[Image.Image]:
    """Images of noise, each a little wider than the one before."""
    rng = np.random.default_rng(0)
    images = []
    for i in range(count):
        pixels = rng.integers(0, 255, (500, 500 + 20 * i, 3), dtype=np.uint8)
        images.append(Image.fromarray(pixels))
    return images


def prompt_length(processor, question: str, patches: dict[str, torch.Tensor]) -> int:
    """Tokens of a question with its image."""
    return prompts.encode(processor, question, patches["image_grid_thw"])["input_ids"].shape[1]


def prepare(processor, question: str, images: list[Image.Image], device: torch.device):
    """The tokens of the question and the patches of its images, on the device."""
    patches = prompts.patches(processor, images)
    inputs = prompts.encode(processor, question, patches["image_grid_thw"])
    return prompts.move(inputs, device), prompts.move(patches, device)


@torch.inference_mode()
def plain_scores(model, patches, inputs, suffixes: list[list[int]], rows: int) -> torch.Tensor:
    """Log-likelihoods (C,) of the names from complete forward passes, `rows` names at a time.

    suffixes: the tokens of each name, with the token that ends the answer.
    """
    scores = []
    for start in range(0, len(suffixes), rows):
        part = suffixes[start : start + rows]
        n = len(part)
        length = max(len(suffix) for suffix in part)
        ids = torch.zeros(n, length, dtype=torch.long, device=model.device)  # (n, T)
        real = torch.zeros_like(ids)  # 1 where a token is no padding
        for row, suffix in enumerate(part):
            ids[row, : len(suffix)] = torch.tensor(suffix)
            real[row, : len(suffix)] = 1

        # the same prompt and image in each row, then a name
        suffix_inputs = {
            "input_ids": ids,
            "attention_mask": real,
            "mm_token_type_ids": torch.zeros_like(ids),
        }
        batch = {}
        for key, suffix in suffix_inputs.items():
            batch[key] = torch.cat([inputs[key].expand(n, -1), suffix], 1)
        for key, value in patches.items():
            batch[key] = value.repeat(n, 1)

        # the last prompt token predicts the first of the name
        logits = model(**batch, use_cache=False, logits_to_keep=length + 1).logits
        log_probabilities = logits[:, :-1].float().log_softmax(-1)  # (n, T, vocabulary)
        of_tokens = log_probabilities.gather(-1, ids[..., None])[..., 0]  # (n, T)
        scores.append((of_tokens * real).sum(1))
    return torch.cat(scores)


def measure_ranking(
    model, processor, names: list[str], question: str, images: list, args: argparse.Namespace
) -> None:
    """Measure the ranking of all names, and print how far the scores are from the plain way's."""
    device = model.device
    packed = ranking.PackedNames(processor, names)
    suffixes = [processor.tokenizer(name + prompts.END)["input_ids"] for name in names]
    inputs, patches = prepare(processor, question, images[:1], device)
    batch_inputs, batch_patches = prepare(processor, question, images, device)

    plain = "one forward a name"
    batched = f"ours, {args.batch_size} images at a time"
    ours = "flowers.qwen.rank"
    ways = {
        plain: lambda: plain_scores(model, patches, inputs, suffixes, 1),
        f"forwards of {args.names} names": lambda: plain_scores(
            model, patches, inputs, suffixes, args.names
        ),
        batched: lambda: ranking.rank(model, packed, batch_inputs, batch_patches)[0],
        ours: lambda: ranking.rank(model, packed, inputs, patches)[0],
    }
    # what each way computes in its last round
    scores = {}

    def keep(name):
        scores[name] = ways[name]()

    spent = alternate({name: partial(keep, name) for name in ways}, args.rounds)
    batched_s = statistics.median_high(spent.pop(batched)) / args.batch_size
    length = inputs["input_ids"].shape[1]
    what = (
        f"ranking {len(names)} names, Qwen2-VL shape {args.model}, "
        f"prompt of {length} tokens, an image"
    )
    limit = count_flops(ways[ours]) / peak_flops(device)
    report(args.rows, what, spent, limit, MATRICES)

    differences = []
    for name, values in scores.items():
        difference = (values - scores[plain]).abs().max()
        differences.append(f"{name} {difference:.1e}")
    print(
        f"greatest difference of a score: {', '.join(differences)}; "
        f"{args.batch_size} images at a time {1000 * batched_s:.1f} ms an image; "
        f"{len(packed.tokens)} packed tokens"
    )


def measure_protocols(
    model, processor, names: list[str], question: str, images: list, rounds: int
) -> None:
    """Print images/s of ranking and of generating, and the peak memory, on a GPU."""
    packed = ranking.PackedNames(processor, names)
    inputs, patches = prepare(processor, question, images, model.device)
    works = {
        "rank": lambda: ranking.rank(model, packed, inputs, patches),
        "generate": lambda: answers.generate(model, processor, inputs, patches, 16),
    }
    for name, work in works.items():
        spent = statistics.median(seconds(work) for _ in range(rounds))
        print(f"{name}: {len(images) / spent:.1f} images/s, peak {peak_gb():.1f} GB")


def measure_training(
    model, processor, names: list[str], question: str, images: list, rounds: int
) -> None:
    """Print seconds of a step of LoRA, and the peak memory, on a GPU."""
    inputs, patches = prepare(processor, question, images, model.device)
    model = adapters.add_adapter(model, LORA_RANK, LORA_ALPHA).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    texts = names[: len(images)]

    def step():
        with autocast(model.device):
            loss, count = answers.answer_loss(model, processor, inputs, patches, texts)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()

    spent = statistics.median(seconds(step) for _ in range(rounds + 1))
    print(f"training: {spent:.3f} s a step of {len(images)}, peak {peak_gb():.1f} GB")


def peak_gb() -> float:
    """The most memory that tensors have taken on the GPU, in GB."""
    return torch.cuda.max_memory_allocated() / 1e9


if __name__ == "__main__":
    main()
