"""How images become batches: ours against PIL with clip's transform, open_clip's transform, and
torchvision's Flowers102, each in a DataLoader.

    python benchmarks/pixels.py --data_root data/flowers-102      # two minutes

First pass: JPEG files to normalised float batches of 64, on one core, in this process (ours without
writing its cache). Epoch: the same from the cache, against DataLoaders with two workers that decode
again. The dataset must be in torchvision's layout, as its own class reads it. Afterwards it counts
how far our pixels are from clip's.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from measure import add_arguments, alternate, bandwidth, per_item, report, spread_over
from peers import Pictures, clip_transform, open_clip_transform
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import Flowers102

from flowers import command
from flowers.data import Flowers, add_data_arguments, open_flowers
from flowers.pixels import CLIP_STD, get_batch, load_pixels, read_jpeg, read_square

BATCH = 64  # images


class AnyPart(Flowers102):
    """torchvision's dataset, also of a part of Oxford's images: its setid.mat has another MD5."""

    def _check_integrity(self):
        return True


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser, splits=False)
    add_arguments(parser)
    parser.add_argument(
        "--images", type=int, default=256, help="images a round (default: %(default)s)"
    )
    parser.add_argument(
        "--resolution", type=int, default=224, help="side in pixels (default: %(default)s)"
    )
    args = parser.parse_args()
    flowers = open_flowers(args.data_root, args.splits_path)
    side = args.resolution

    # a folder of its own, so that our cache is new, and goes at the end
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "flowers-102").symlink_to(flowers.root.resolve())
        torchvisions = AnyPart(folder, split="test", transform=clip_transform(side))
        chosen = spread_over(range(len(torchvisions)), args.images)
        files = [torchvisions._image_files[i] for i in chosen]
        labels = [0] * len(files)
        plain = Pictures(files, labels, clip_transform(side))
        peers = {
            "PIL + clip's transform, DataLoader": plain,
            "open_clip's transform, DataLoader": Pictures(files, labels, open_clip_transform(side)),
            "torchvision Flowers102, DataLoader": Subset(torchvisions, chosen),
        }
        first_pass(peers, files, side, args)

        # the labels play no part: any will do
        labels = np.zeros(len(files), int)
        part = Flowers(Path(folder), tuple(files), labels, flowers.class_names, {})
        later_epoch(peers, load_pixels(part, side), args)
        compare_pixels(plain, files, side)


def consume(batches: Iterable) -> None:
    """Take all batches, and do nothing with them."""
    for _ in batches:
        pass


def one_thread(work: Callable) -> Callable:
    """The same work, on one core."""

    def run():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        work()
        torch.set_num_threads(threads)

    return run


def first_pass(
    peers: dict[str, Dataset], files: Sequence[Path], side: int, args: argparse.Namespace
) -> None:
    """Measure JPEG files to normalised batches, on one core."""

    def decode():
        for file in files:
            read_jpeg(file)

    def ours():
        for start in range(0, len(files), BATCH):
            part = files[start : start + BATCH]
            squares = torch.stack([read_square(file, side) for file in part])  # (B, 3, R, R) uint8
            get_batch(squares, torch.arange(len(part)), "cpu")  # (B, 3, R, R) float32

    ways = {}
    for name, dataset in peers.items():
        loader = DataLoader(dataset, batch_size=BATCH)
        ways[name] = one_thread(lambda loader=loader: consume(loader))
    # ours is the last, as `report` expects
    ways["decoding alone"] = one_thread(decode)
    ways["flowers.pixels"] = one_thread(ours)
    seconds = per_item(alternate(ways, args.rounds), len(files))

    # nobody can be faster than the decoder
    limit = statistics.median_high(seconds.pop("decoding alone"))
    what = f"first pass over JPEGs, one core, an image to {side} px"
    report(args.rows, what, seconds, limit, "decoding (libjpeg-turbo)")


def later_epoch(peers: dict[str, Dataset], pixels: torch.Tensor, args: argparse.Namespace) -> None:
    """Measure an epoch from the cache, pixels (N, 3, R, R), against loaders that decode again."""
    n, _, side, _ = pixels.shape

    def ours():
        for index in torch.arange(n).split(BATCH):
            get_batch(pixels, index, "cpu")

    ways = {}
    for name, dataset in peers.items():
        loader = DataLoader(dataset, batch_size=BATCH, num_workers=2, persistent_workers=True)
        ways[name + ", 2 workers"] = lambda loader=loader: consume(loader)
    ways["from the cache"] = ours
    seconds = per_item(alternate(ways, args.rounds), n)

    # bytes that can't be spared: a uint8 is read and an fp32 written
    moved = 3 * side**2 * (1 + 4)
    what = f"feed of a later epoch, 2 cores, an image of {side} px"
    report(args.rows, what, seconds, moved / bandwidth(), "memory bandwidth")


def compare_pixels(plain: Pictures, files: Sequence[Path], side: int) -> None:
    """Print how many values of our images differ from clip's, and by how many of the 256 levels."""
    std = torch.tensor(CLIP_STD).view(3, 1, 1)
    counts = torch.zeros(256, dtype=torch.long)
    for i, file in enumerate(files):
        # (3, R, R) each
        square = read_square(file, side)
        ours = get_batch(square[None], torch.tensor([0]), "cpu")[0]
        theirs, _ = plain[i]
        # both are normalised: times the standard deviation they are levels again
        levels = ((theirs - ours) * std * 255).abs().round().long()
        counts += levels.flatten().bincount(minlength=256)
    differing = [f"{n:,} differ by {k}" for k, n in enumerate(counts.tolist()) if n > 0 and k > 0]
    print(f"values compared with clip's {counts.sum():,}: " + ", ".join(differing))


if __name__ == "__main__":
    main()
