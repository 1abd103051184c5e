"""Parameters of the nine architectures: counted on torch's meta device, as test_models.py does, against constructing each model with random weights.

python benchmarks/architectures.py      # three minutes and 3 GB of memory
"""

import argparse
import contextlib

import clip
import torch
from measure import add_arguments, alternate, report

from flowers import command, models


def count(device: str) -> list[int]:
    with torch.device(device) if device == "meta" else contextlib.nullcontext():
        return [
            sum(p.numel() for p in models.build(name).parameters())
            for name in clip.available_models()
        ]


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    args = parser.parse_args()
    spent = alternate(
        {
            "constructing the models": lambda: count("cpu"),
            "on the meta device": lambda: count("meta"),
        },
        args.rounds,
    )
    report(
        args.rows,
        "parameters of nine architectures",
        spent,
        limit_is="no arithmetic is left, only Python that makes modules",
    )


if __name__ == "__main__":
    main()
