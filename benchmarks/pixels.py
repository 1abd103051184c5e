"""How much faster images become batches than with PIL + clip's transform in a DataLoader, and how far the pixels are from it.

    python benchmarks/pixels.py --data_root data/flowers-102      # a minute; ratios are medians of alternating rounds in one run

First pass: JPEG files to batches of 64, on one core, against a DataLoader in the same process. Epoch: ready float batches of 64 from the
cache, against a two-worker DataLoader.
"""
import argparse
import os
import statistics
import tempfile
import time
import warnings

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from flowers import command
from flowers.data import add_data_arguments, open_flowers
from flowers.pixels import CLIP_STD, batch, decode, load_pixels

warnings.simplefilter("ignore")
from clip.clip import _transform  # noqa: E402


class Plain(Dataset):
    """The usual recipe: open, convert, clip's preprocess."""
    def __init__(self, files, resolution):
        self.files, self.transform = files, _transform(resolution)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        with Image.open(self.files[i]) as image:
            return self.transform(image)


def rate(n, work):
    start = time.perf_counter()
    work()
    return n / (time.perf_counter() - start)


def consume(batches):
    for _ in batches:
        pass


@command
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--images", type=int, default=300, help="images a round (default: %(default)s)")
    parser.add_argument("--resolution", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds (default: %(default)s)")
    args = parser.parse_args()
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
    flowers = open_flowers(args.data_root, args.splits_path, args.splits)
    files = flowers.files[::max(1, len(flowers.files) // args.images)][:args.images]
    plain, index = Plain(files, args.resolution), torch.arange(len(files))
    pixels = load_pixels(flowers, args.resolution)
    loader = DataLoader(plain, batch_size=64, num_workers=2, persistent_workers=True)
    alone = DataLoader(plain, batch_size=64)
    list(loader)  # workers start before the clock does
    measured = {"first pass, one core: PIL + clip transform, DataLoader": [], "first pass, one core: ours": [],
                "epoch: PIL + clip transform, DataLoader, 2 workers": [], "epoch: ours, from the cache": []}
    for _ in range(args.rounds):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        works = [lambda: consume(alone), lambda: consume(torch.stack([decode(files[i], args.resolution) for i in part]) for part in index.split(64)),
                 lambda: consume(loader), lambda: consume(batch(pixels, part, "cpu") for part in index.split(64))]
        for i, (rates, work) in enumerate(zip(measured.values(), works)):
            torch.set_num_threads(1 if i < 2 else threads)
            rates.append(rate(len(files), work))
        torch.set_num_threads(threads)
    for name, rates in measured.items():
        print(f"{name:52s} {statistics.median(rates):8.0f} images/s")
    rates = list(measured.values())
    for name, a, b in (("first pass", 0, 1), ("epoch", 2, 3)):
        ratios = [y / x for x, y in zip(rates[a], rates[b])]
        print(f"{name}: {statistics.median(ratios):.1f} times as fast (rounds: {min(ratios):.1f} to {max(ratios):.1f})")

    std = torch.tensor(CLIP_STD).view(3, 1, 1)
    levels = torch.zeros(256, dtype=torch.long)
    for i, file in enumerate(files):
        ours = batch(decode(file, args.resolution)[None], torch.tensor([0]), "cpu")[0]
        levels += ((plain[i] - ours) * std * 255).abs().round().long().flatten().bincount(minlength=256)
    print(f"values compared {levels.sum():,}: " + ", ".join(f"{n:,} differ by {k}" for k, n in enumerate(levels.tolist()) if n and k))


if __name__ == "__main__":
    main()
