"""How images become batches: ours against PIL with clip's transform, open_clip's, and torchvision's Flowers102, each in a DataLoader.

    python benchmarks/pixels.py --data_root data/flowers-102      # two minutes

First pass: JPEG files to normalised float batches of 64, on one core, in this process (ours without writing its cache). Epoch: the same from the
cache, against DataLoaders with two workers that decode again. Torchvision's layout is needed, as its own class reads it. Afterwards it counts how
far our pixels are from clip's.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from measure import add_arguments, alternate, bandwidth, report
from peers import Pictures, clip_transform, open_clip_transform
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import Flowers102

from flowers import command
from flowers.data import Flowers, add_data_arguments, open_flowers
from flowers.pixels import CLIP_STD, get_batch, load_pixels, read_jpeg, read_square


class AnyPart(Flowers102):
    """torchvision's dataset, also of a part of Oxford's images, whose setid.mat has another checksum."""

    def _check_integrity(self):
        return True


def consume(batches):
    for _ in batches:
        pass


def one_thread(work):
    """The work, on one core."""

    def run():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        work()
        torch.set_num_threads(threads)

    return run


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
    parser.add_argument("--resolution", type=int, default=224, help="pixels (default: %(default)s)")
    args = parser.parse_args()
    flowers = open_flowers(args.data_root, args.splits_path)
    folder = tempfile.TemporaryDirectory()  # with the cache; it goes at the end
    (Path(folder.name) / "flowers-102").symlink_to(flowers.root.resolve())
    theirs = AnyPart(folder.name, split="test", transform=clip_transform(args.resolution))
    chosen = range(0, len(theirs), max(1, len(theirs) // args.images))[: args.images]
    files = [theirs._image_files[i] for i in chosen]
    labels = [0] * len(files)
    plain = Pictures(files, labels, clip_transform(args.resolution))
    sets = {
        "PIL + clip's transform, DataLoader": plain,
        "open_clip's transform, DataLoader": Pictures(
            files, labels, open_clip_transform(args.resolution)
        ),
        "torchvision Flowers102, DataLoader": Subset(theirs, chosen),
    }

    index, n = torch.arange(len(files)), len(files)
    first_pass = lambda: consume(
        get_batch(
            torch.stack([read_square(files[i], args.resolution) for i in part]),
            torch.arange(len(part)),
            "cpu",
        )
        for part in index.split(64)
    )
    spent = alternate(
        {
            **{
                name: one_thread(lambda s=s: consume(DataLoader(s, batch_size=64)))
                for name, s in sets.items()
            },
            "decoding alone": one_thread(lambda: [read_jpeg(file) for file in files]),
            "flowers.pixels": one_thread(first_pass),
        },
        args.rounds,
    )
    limit = sorted(spent.pop("decoding alone"))[args.rounds // 2] / n
    report(
        args.rows,
        f"first pass over JPEGs, one core, an image to {args.resolution} px",
        {k: [t / n for t in v] for k, v in spent.items()},
        limit,
        "decoding (libjpeg-turbo)",
    )

    pixels = load_pixels(
        Flowers(Path(folder.name), tuple(files), np.zeros(n, int), flowers.class_names, {}),
        args.resolution,
    )
    loaders = {
        name: DataLoader(s, batch_size=64, num_workers=2, persistent_workers=True)
        for name, s in sets.items()
    }
    spent = alternate(
        {
            **{
                name + ", 2 workers": lambda x=loader: consume(x)
                for name, loader in loaders.items()
            },
            "from the cache": lambda: consume(
                get_batch(pixels, part, "cpu") for part in index.split(64)
            ),
        },
        args.rounds,
    )
    moved = 3 * args.resolution**2 * (1 + 4)  # bytes that can't be spared: uint8 read, fp32 written
    report(
        args.rows,
        f"feed of a later epoch, 2 cores, an image of {args.resolution} px",
        {k: [t / n for t in v] for k, v in spent.items()},
        moved / bandwidth(),
        "memory bandwidth",
    )

    std = torch.tensor(CLIP_STD).view(3, 1, 1)
    levels = torch.zeros(256, dtype=torch.long)
    for i, file in enumerate(files):
        ours = get_batch(read_square(file, args.resolution)[None], torch.tensor([0]), "cpu")[0]
        levels += (
            ((plain[i][0] - ours) * std * 255)
            .abs()
            .round()
            .long()
            .flatten()
            .bincount(minlength=256)
        )
    print(
        f"values compared with clip's {levels.sum():,}: "
        + ", ".join(f"{n:,} differ by {k}" for k, n in enumerate(levels.tolist()) if n and k)
    )


if __name__ == "__main__":
    main()
