"""Count the parameters of the nine architectures: on torch's meta device, as test_models.py does,
against constructing each model with random weights.

    python benchmarks/architectures.py      # three minutes and 3 GB of memory
"""

import argparse

import clip
import torch
from measure import add_arguments, alternate, report

from flowers import command, models


def count_parameters(device: str) -> list[int]:
    """The number of parameters of each architecture, built on the device."""
    counts = []
    # On the meta device a tensor has a shape and no memory.
    with torch.device(device):
        for name in clip.available_models():
            model = models.build(name)
            counts.append(sum(p.numel() for p in model.parameters()))
    return counts


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    args = parser.parse_args()

    # ours is the last, as `report` expects
    ways = {
        "constructing the models": lambda: count_parameters("cpu"),
        "on the meta device": lambda: count_parameters("meta"),
    }
    seconds = alternate(ways, args.rounds)
    # there is no number for this limit
    limit = "no arithmetic is left, only Python that makes modules"
    report(args.rows, "parameters of nine architectures", seconds, limit_is=limit)


if __name__ == "__main__":
    main()
