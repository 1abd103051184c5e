"""One full fine-tuning step on a CPU or GPU: every caption at 77 tokens (the plain recipe) against distinct prompts, cut to length.

    python benchmarks/step.py                  # ViT-B/32 shape, random weights, batch 64; a few minutes on two cores

Prints seconds a step, the ratio, and how far the losses and the gradients are apart.
"""
import argparse
import json
import statistics
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

from flowers import command, evaluate, models
from flowers.losses import info_nce

warnings.simplefilter("ignore")
import clip  # noqa: E402


@command
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="ViT-B/32", choices=list(models.SHAPES), help="shape, with random weights (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="images and captions (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds after one that is not counted (default: %(default)s)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = models.build(args.architecture).to(device)
    side = model.visual.input_resolution
    images = torch.randn(args.batch_size, 3, side, side, device=device)
    names = json.loads(Path(models.__file__).with_name("cat_to_name.json").read_text()).values()
    prompts = evaluate.prompts(list(names), [evaluate.TEMPLATE])
    captions = [prompts[i] for i in torch.randint(0, len(prompts), (args.batch_size,)).tolist()]
    long, short = clip.tokenize(captions).to(device), models.tokenize(captions)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)  # a true step that leaves the weights alone

    def plain():
        image, text = (F.normalize(f.float(), dim=1) for f in (model.encode_image(images), model.encode_text(long)))
        return info_nce(image, text, model.logit_scale.exp())

    def ours():
        distinct, inverse = torch.unique(short, dim=0, return_inverse=True)
        text = models.encode_texts(model, distinct.to(device)).index_select(0, inverse.to(device))
        return info_nce(models.encode_images(model, images), text, model.logit_scale.exp())

    seconds, losses, gradients = {plain: [], ours: []}, {}, {}
    for _ in range(args.rounds + 1):
        for step, times in seconds.items():
            start = time.perf_counter()
            loss = step()
            loss.backward()
            optimizer.step()
            losses[step] = loss.item()
            times.append(time.perf_counter() - start)
            gradients[step] = [p.grad.clone() for p in model.parameters()]
            optimizer.zero_grad()
    ratios = [a / b for a, b in zip(seconds[plain][1:], seconds[ours][1:])]
    apart = max(((a - b).norm() / a.norm().clamp_min(1e-12)).item() for a, b in zip(gradients[plain], gradients[ours]))
    print(f"{args.architecture}, batch {args.batch_size}, {len(set(captions))} distinct prompts of {short.shape[1]} tokens, "
          f"on {device}, {torch.get_num_threads()} threads")
    print(f"plain {statistics.median(seconds[plain][1:]):.2f} s, ours {statistics.median(seconds[ours][1:]):.2f} s a step: "
          f"{statistics.median(ratios):.2f} times as fast (rounds: {min(ratios):.2f} to {max(ratios):.2f})")
    print(f"loss {losses[plain]:.6f} and {losses[ours]:.6f}; greatest relative difference of a parameter's gradient {apart:.1e}")


if __name__ == "__main__":
    main()
