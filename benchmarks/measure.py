"""What the benchmarks share: works that take turns, the rows of the table that benchmarks/table.py prints, and what this machine can do at most."""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from flowers import UserError, files

TABLE = [
    "| | against | theirs | ours | times as fast [least, most] | physical limit |",
    "|---|---|---|---|---|---|",
]

MATRICES = "counted FLOPs at the rate of a matrix product"  # a limit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="alternating rounds after one that is not counted (default: %(default)s)",
    )
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="also append the rows to this file of JSON lines"
    )


def seconds(work: Callable) -> float:
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(works: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each work in each round; in a round all take their turn, every second time in the other order. A first round warms up."""
    if rounds < 1:
        raise UserError("--rounds must be at least 1")
    spent = {name: [] for name in works}
    for i in range(rounds + 1):
        for name in list(works)[:: -1 if i % 2 else 1]:
            spent[name].append(seconds(works[name]))
    return {name: times[1:] for name, times in spent.items()}


def report(
    path: Path | None,
    what: str,
    spent: dict[str, list[float]],
    limit: float | None = None,
    limit_is: str = "",
) -> None:
    """Print a line of the table for every peer against the last of `spent`, which is ours, and append them to `path`.

    spent: seconds for the same piece of work, by name, one a round. limit: seconds that the physical limit alone would take.
    """
    *peers, ours = spent
    mine = statistics.median(spent[ours])
    for peer in peers:
        ratios = [a / b for a, b in zip(spent[peer], spent[ours])]
        near = (
            f"{limit_is}: {duration(limit)}, we take {mine / limit:.1f} times that"
            if limit
            else limit_is or "-"
        )
        row = {
            "what": what,
            "peer": peer,
            "theirs_s": statistics.median(spent[peer]),
            "ours": ours,
            "ours_s": mine,
            "ratio": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "rounds": len(ratios),
            "limit_s": limit,
            "limit": near,
        }
        print(line(row), flush=True)
        if path:
            files.append_line(path, row)


def line(row: dict) -> str:
    digits = lambda x: f"{x:,.0f}" if x >= 20 else f"{x:.1f}" if x >= 1.95 else f"{x:.2f}"
    return (
        f"| {row['what']} | {row['peer']} | {duration(row['theirs_s'])} | {row['ours']}, {duration(row['ours_s'])} | **{digits(row['ratio'])}** "
        f"[{digits(row['least'])}, {digits(row['most'])}] | {row['limit']} |"
    )


def duration(spent: float) -> str:
    unit, scale = next(
        ((u, s) for u, s in (("s", 1), ("ms", 1e3), ("µs", 1e6)) if spent * s >= 1), ("ns", 1e9)
    )
    return f"{spent * scale:.3g} {unit}"


def peak_flops(device: torch.device | str = "cpu") -> float:
    """Operations a second of a large matrix product here, at the precision that the models compute in: what no model can exceed."""
    kind = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    n = 8192 if torch.device(device).type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=kind)
    return max(2 * n**3 / seconds(lambda: a @ a) for _ in range(6))


def bandwidth() -> float:
    """Bytes a second of a large copy, read and written counted."""
    a = torch.zeros(1 << 28, dtype=torch.uint8)
    b = torch.empty_like(a)
    return max(2 * len(a) / seconds(lambda: b.copy_(a)) for _ in range(5))


def machine() -> str:
    """The processor, or the GPU, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo")
    model = (
        [
            x.split(":")[1].strip()
            for x in cpu.read_text().splitlines()
            if x.startswith("model name")
        ]
        if cpu.exists()
        else [platform.processor()]
    )
    return f"{os.cpu_count()} cores, {model[0] if model else 'unknown processor'}, no GPU"
