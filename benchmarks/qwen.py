"""How much faster all class names are ranked than with one forward a name, and how far the scores are from it.

    python benchmarks/qwen.py                            # tiny, 102 names, the usual question and one of about 240 tokens; a minute
    python benchmarks/qwen.py --model random-2b          # the shape of Qwen2-VL-2B with random weights; needs a GPU

Plain: image, question and name through the model, once a name; pixels and prompt tokens are ready, logits only where they count. In batches: the same
in rows of --names names, padded. Ours: flowers/qwen/ranking.py. Ratios are medians of alternating rounds in one run. On a GPU it goes on to images/s of both
protocols, seconds a training step, and peak memory.
"""

import argparse
import json
import statistics

import numpy as np
import torch
from measure import MATRICES, add_arguments, alternate, peak_flops, report, seconds
from PIL import Image

from flowers import command
from flowers.devices import autocast
from flowers.models import count_flops
from flowers.qwen import models as qwen_models
from flowers.qwen.answers import answer_loss, generate
from flowers.qwen.memory import memory_line
from flowers.qwen.offline import CLASS_NAMES_FILE
from flowers.qwen.prompts import END, encode, move, patches, question_of
from flowers.qwen.ranking import NameTree, rank

FILLER = " Look closely at the petals, the centre, the leaves and the stem before you answer."


@torch.inference_mode()
def plain(model, image, inputs, suffixes, rows, pad):
    """(C,) log-likelihoods from whole forwards of `rows` names at a time."""
    found = []
    for part in (suffixes[i : i + rows] for i in range(0, len(suffixes), rows)):
        n, length = len(part), max(map(len, part))
        ids = torch.tensor([s + [pad] * (length - len(s)) for s in part], device=model.device)
        real = torch.tensor(
            [[1] * len(s) + [0] * (length - len(s)) for s in part], device=model.device
        )
        whole = {
            k: torch.cat([inputs[k].expand(n, -1), new], 1)
            for k, new in (
                ("input_ids", ids),
                ("attention_mask", real),
                ("mm_token_type_ids", torch.zeros_like(ids)),
            )
        }
        copies = {k: v.repeat(n, 1) for k, v in image.items()}
        logits = (
            model(**whole, **copies, use_cache=False, logits_to_keep=length + 1)
            .logits[:, :-1]
            .float()
        )
        found.append((logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0] * real).sum(1))
    return torch.cat(found)


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
    print(memory_line(args.model, args.batch_size, 512 * 512, 460, 8))
    model, processor = qwen_models.load_model(args.model, device, max_pixels=512 * 512)
    names = list(json.loads(CLASS_NAMES_FILE.read_text()).values())
    tree, suffixes = (
        NameTree(processor, names),
        [processor.tokenizer(name + END)["input_ids"] for name in names],
    )
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 255, (500, 500 + 20 * i, 3), dtype=np.uint8))
        for i in range(args.batch_size)
    ]
    one, many = (move(patches(processor, part), device) for part in (images[:1], images))

    question = question_of("brief")
    longer = question
    while encode(processor, longer, one["image_grid_thw"].cpu())["input_ids"].shape[1] < 240:
        longer += FILLER
    for text in dict.fromkeys((question, longer)):
        inputs, batch = (
            move(encode(processor, text, part["image_grid_thw"].cpu()), device)
            for part in (one, many)
        )
        found, what = (
            {},
            f"ranking {len(names)} names, Qwen2-VL shape {args.model}, prompt of {inputs['input_ids'].shape[1]} tokens, an image",
        )

        def keep(name, work):
            def run():
                found[name] = work()

            return run

        ways = {
            "one forward a name": lambda: plain(model, one, inputs, suffixes, 1, 0),
            f"forwards of {args.names} names": lambda: plain(
                model, one, inputs, suffixes, args.names, 0
            ),
            f"ours, {args.batch_size} images at a time": lambda: rank(model, tree, batch, many)[0],
            "flowers.qwen.rank": lambda: rank(model, tree, inputs, one)[0],
        }
        spent = alternate({name: keep(name, work) for name, work in ways.items()}, args.rounds)
        many_s = (
            sorted(spent.pop(f"ours, {args.batch_size} images at a time"))[args.rounds // 2]
            / args.batch_size
        )
        report(
            args.rows,
            what,
            spent,
            count_flops(ways["flowers.qwen.rank"]) / peak_flops(device),
            MATRICES,
        )
        reference = found["one forward a name"]
        apart = ", ".join(
            f"{name} {(scores - reference).abs().max():.1e}" for name, scores in found.items()
        )
        print(
            f"greatest difference of a score: {apart}; {args.batch_size} images at a time {1000 * many_s:.1f} ms an image; "
            f"{len(tree.tokens)} packed tokens for {tree.lengths.sum()}"
        )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        inputs = move(encode(processor, question, many["image_grid_thw"].cpu()), device)
        for name, work in (
            ("rank", lambda: rank(model, tree, inputs, many)),
            ("generate", lambda: generate(model, processor, inputs, many, 16)),
        ):
            spent = statistics.median(seconds(work) for _ in range(args.rounds))
            print(
                f"{name}: {args.batch_size / spent:.1f} images/s, peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
            )
        model = qwen_models.add_adapter(model, 8, 16.0).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def step():
            with autocast(device):
                loss, count = answer_loss(model, processor, inputs, many, names[: args.batch_size])
            (loss / count).backward()
            optimizer.step()
            optimizer.zero_grad()

        spent = statistics.median(seconds(step) for _ in range(args.rounds + 1))
        print(
            f"training: {spent:.3f} s a step of {args.batch_size}, peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
        )


if __name__ == "__main__":
    main()
