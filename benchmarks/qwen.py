"""How much faster all class names are ranked than with one forward a name, and how far the scores are from it.

    python benchmarks/qwen.py                            # tiny, 102 names, the usual question and one of about 240 tokens; a minute
    python benchmarks/qwen.py --model random-2b          # the shape of Qwen2-VL-2B with random weights; needs a GPU

Plain: image, question and name through the model, once a name; pixels and prompt tokens are ready, logits only where they count. In batches: the same
in rows of --rows names, padded. Ours: flowers/qwen.py. Ratios are medians of alternating rounds in one run. On a GPU it goes on to images/s of both
protocols, seconds a training step, and peak memory.
"""
import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flowers import command, qwen, qwen_models
from flowers.models import autocast

FILLER = " Look closely at the petals, the centre, the leaves and the stem before you answer."


def clock(work):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


@torch.inference_mode()
def plain(model, image, inputs, suffixes, rows, pad):
    """(C,) log-likelihoods from whole forwards of `rows` names at a time."""
    found = []
    for part in (suffixes[i:i + rows] for i in range(0, len(suffixes), rows)):
        n, length = len(part), max(map(len, part))
        ids = torch.tensor([s + [pad] * (length - len(s)) for s in part], device=model.device)
        real = torch.tensor([[1] * len(s) + [0] * (length - len(s)) for s in part], device=model.device)
        whole = {k: torch.cat([inputs[k].expand(n, -1), new], 1) for k, new in
                 (("input_ids", ids), ("attention_mask", real), ("mm_token_type_ids", torch.zeros_like(ids)))}
        copies = {k: v.repeat(n, 1) for k, v in image.items()}
        logits = model(**whole, **copies, use_cache=False, logits_to_keep=length + 1).logits[:, :-1].float()
        found.append((logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0] * real).sum(1))
    return torch.cat(found)


@command
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, random-2b, a name on the hub, or a folder (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=34, help="names at a time, for the plain way in batches (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds after one that is not counted (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="images at a time, for ours in batches and on a GPU (default: %(default)s)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(qwen_models.memory_line(args.model, args.batch_size, 512 * 512, 460, 8))
    model, processor = qwen_models.load(args.model, device, max_pixels=512 * 512)
    names = list(json.loads(Path(qwen.__file__).with_name("cat_to_name.json").read_text()).values())
    tree, suffixes = qwen.NameTree(processor, names), [processor.tokenizer(name + qwen.END)["input_ids"] for name in names]
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (500, 500 + 20 * i, 3), dtype=np.uint8)) for i in range(args.batch_size)]
    one, many = (qwen.to(qwen.patches(processor, part), device) for part in (images[:1], images))

    question = qwen.question_of("brief")
    length = qwen.encode(processor, question, one["image_grid_thw"].cpu())["input_ids"].shape[1]
    longer = question
    while qwen.encode(processor, longer, one["image_grid_thw"].cpu())["input_ids"].shape[1] < 240:
        longer += FILLER
    for text in dict.fromkeys((question, longer)):
        inputs, batch = (qwen.to(qwen.encode(processor, text, part["image_grid_thw"].cpu()), device) for part in (one, many))
        ways = {"plain, one name at a time": lambda: plain(model, one, inputs, suffixes, 1, 0),
                f"plain, {args.rows} names at a time": lambda: plain(model, one, inputs, suffixes, args.rows, 0),
                "ours": lambda: qwen.rank(model, tree, inputs, one)[0],
                f"ours, {args.batch_size} images at a time": lambda: qwen.rank(model, tree, batch, many)[0]}
        seconds, found = {way: [] for way in ways}, {}
        for _ in range(args.rounds + 1):
            for way, work in ways.items():
                spent, found[way] = clock(work)
                seconds[way].append(spent / (args.batch_size if way.endswith("images at a time") else 1))
        length = inputs["input_ids"].shape[1]
        first = next(iter(ways))
        print(f"\n{args.model} on {device}, {torch.get_num_threads()} threads: {len(names)} names, prompt of {length} tokens; {len(tree.tokens)} packed tokens "
              f"for {tree.lengths.sum()}")
        for way in ways:
            ratios = [a / b for a, b in zip(seconds[first][1:], seconds[way][1:])]
            print(f"{way:28s} {1000 * statistics.median(seconds[way][1:]):9.1f} ms an image, {statistics.median(ratios):6.1f} times as fast "
                  f"({min(ratios):.1f} to {max(ratios):.1f}); greatest difference {(found[way] - found[first]).abs().max():.1e}")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        inputs = qwen.to(qwen.encode(processor, question, many["image_grid_thw"].cpu()), device)
        for name, work in (("rank", lambda: qwen.rank(model, tree, inputs, many)), ("generate", lambda: qwen.generate(model, processor, inputs, many, 16))):
            spent = statistics.median(clock(work)[0] for _ in range(args.rounds))
            print(f"{name}: {args.batch_size / spent:.1f} images/s, peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
        model = qwen_models.add_adapter(model, 8, 16.0).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def step():
            with autocast(device):
                loss, count = qwen.answer_loss(model, processor, inputs, many, names[:args.batch_size])
            (loss / count).backward()
            optimizer.step()
            optimizer.zero_grad()
        spent = statistics.median(clock(step)[0] for _ in range(args.rounds + 1))
        print(f"training: {spent:.3f} s a step of {args.batch_size}, peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
