"""Whole fine-tuning epochs on random images: images/s, seconds, peak memory and the share of the GPU's peak, against the plain recipe on the same card.

    python benchmarks/epochs.py --architecture ViT-B/32 --peak_tflops 989               # an H100 in bf16; add --compile
    python benchmarks/epochs.py --architecture ViT-L/14@336px --batch_size 128 --peak_tflops 989
    python benchmarks/epochs.py --architecture tiny --images 128 --epochs 1             # any machine, to see that it runs

Ours: uint8 pixels on the device, augmented there; distinct prompts once a step, cut to length. Plain: float batches that come from the host, a prompt
of 77 tokens for each image. Both full fine-tuning under bf16 autocast on a GPU, random weights of the true shape. Decoding is left out of both.
"""
import argparse
import time

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from flowers import command, evaluate, models, runs
from flowers.losses import info_nce
from flowers.pixels import batch, to_device


@command
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="ViT-B/32", choices=list(models.SHAPES), help="shape, with random weights (default: %(default)s)")
    parser.add_argument("--images", type=int, default=7169, help="random images (default: %(default)s, the swapped training split)")
    parser.add_argument("--epochs", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="images a step (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile of our image tower, compiled before the clock starts")
    parser.add_argument("--peak_tflops", type=float, help="the device's dense peak at the precision used, to print the share reached")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    side = models.SHAPES[args.architecture][1]
    pixels = torch.randint(0, 256, (args.images, 3, side, side), dtype=torch.uint8)
    labels = torch.randint(0, 102, (args.images,))
    short = models.tokenize(evaluate.prompts([f"flower number {i}" for i in range(102)], [evaluate.TEMPLATE]))
    long = F.pad(short, (0, 77 - short.shape[1]))
    on_device = to_device(pixels, device)

    for name in ("plain", "ours"):
        model = models.build(args.architecture).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        encode = lambda x, model=model: models.encode_images(model, x)
        encode = torch.compile(encode) if args.compile and name == "ours" else encode

        def step(index, draw):
            if name == "ours":
                distinct, inverse = (x.to(device) for x in torch.unique(labels[index], return_inverse=True))
                text = models.encode_texts(model, short.to(device)[distinct]).index_select(0, inverse)
                image = encode(batch(on_device, index, device, "crop", draw))
            else:
                text = models.encode_texts(model, long[labels[index]].to(device))
                image = encode(batch(pixels, index, "cpu").to(device))
            info_nce(image, text, 100.0).backward()
            optimizer.step()
            optimizer.zero_grad()

        draw = runs.generator(0)
        first = torch.arange(args.batch_size) % args.images
        for _ in range(2):
            step(first, draw)
        with FlopCounterMode(display=False) as counter:
            encode_plainly, encode = encode, lambda x, model=model: models.encode_images(model, x)  # the counter sees no compiled operations
            step(first, draw)
            encode = encode_plainly
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for epoch in range(args.epochs):
            for index in torch.randperm(args.images, generator=runs.generator(1, epoch)).split(args.batch_size):
                step(index, draw)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        tflops = counter.get_total_flops() / args.batch_size * args.images * args.epochs / seconds / 1e12
        share = f" ({100 * tflops / args.peak_tflops:.0f}% of {args.peak_tflops:g})" if args.peak_tflops else ""
        rate, how = args.epochs * args.images / seconds, " compiled" if args.compile and name == "ours" else ""
        print(f"{args.architecture} {name}{how}: {args.epochs} epochs of {args.images:,} images in {seconds:.1f} s, {rate:.0f} images/s, "
              f"{tflops:.2f} TFLOP/s{share}, peak memory {runs.peak_memory_mb():,} MB, on {device}", flush=True)


if __name__ == "__main__":
    main()
