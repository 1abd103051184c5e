"""What the benchmarks share: timing in alternating rounds, the rows of the table that
benchmarks/table.py prints, and what this machine can do at most.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from flowers import UserError, files

TABLE = [
    "| | against | theirs | ours | times as fast [least, most] | physical limit |",
    "|---|---|---|---|---|---|",
]
# one of the physical limits, in the words of the table
MATRICES = "counted FLOPs at the rate of a matrix product"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --rounds and --rows."""
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="alternating rounds after one that is not counted (default: %(default)s)",
    )
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="also append the rows to this file of JSON lines"
    )


# -----------------------------------------------------------------------------
# timing


def synchronize() -> None:
    """Wait for the GPU, which works while Python goes on."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable) -> float:
    """Seconds that work() takes."""
    synchronize()  # what was started before does not count
    start = time.perf_counter()
    work()
    synchronize()  # what it started does
    return time.perf_counter() - start


def alternate(works: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each work in each round. A first round warms up and is not counted.

    In a round all works take their turn, every second time in the opposite order, so that a machine
    that gets slower or faster meanwhile favours none of them.
    """
    if rounds < 1:
        raise UserError("--rounds must be at least 1")
    spent = {name: [] for name in works}  # seconds, one value a round
    for i in range(rounds + 1):
        order = list(works) if i % 2 == 0 else list(reversed(works))
        for name in order:
            spent[name].append(seconds(works[name]))
    return {name: times[1:] for name, times in spent.items()}


def per_item(spent: dict[str, list[float]], n: int) -> dict[str, list[float]]:
    """Seconds of each work for one of its n items."""
    return {name: [t / n for t in times] for name, times in spent.items()}


# -----------------------------------------------------------------------------
# the table


def report(
    path: Path | None,
    what: str,
    spent: dict[str, list[float]],
    limit: float | None = None,
    limit_is: str = "",
) -> None:
    """Print a line of the table for every peer, and append its row to the file `path`.

    spent: seconds for the same piece of work, by name, one a round; the last name is ours, all
    others are peers. limit: seconds that the physical limit alone would take; limit_is: its name.
    """
    *peers, ours = spent
    ours_s = statistics.median(spent[ours])
    if limit:
        limit_text = f"{limit_is}: {duration(limit)}, we take {ours_s / limit:.1f} times that"
    else:
        limit_text = limit_is or "-"
    for peer in peers:
        # the ratio of each round: both sides of it were measured one after the other
        ratios = [theirs / own for theirs, own in zip(spent[peer], spent[ours])]
        row = {
            "what": what,
            "peer": peer,
            "theirs_s": statistics.median(spent[peer]),
            "ours": ours,
            "ours_s": ours_s,
            "ratio": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "rounds": len(ratios),
            "limit_s": limit,
            "limit": limit_text,
        }
        print(line(row), flush=True)
        if path:
            files.append_line(path, row)


def line(row: dict) -> str:
    """A row as a line of the Markdown table."""
    ours = f"{row['ours']}, {duration(row['ours_s'])}"
    spread = f"[{ratio(row['least'])}, {ratio(row['most'])}]"
    cells = [
        row["what"],
        row["peer"],
        duration(row["theirs_s"]),
        ours,
        f"**{ratio(row['ratio'])}** {spread}",
        row["limit"],
    ]
    return "| " + " | ".join(cells) + " |"


def ratio(value: float) -> str:
    """A ratio with the digits that the spread of the rounds leaves it."""
    if value >= 20:
        return f"{value:,.0f}"
    if value >= 1.95:
        return f"{value:.1f}"
    return f"{value:.2f}"


def duration(spent: float) -> str:
    """Seconds in three digits and a unit that suits them."""
    for unit, scale in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if spent * scale >= 1:
            return f"{spent * scale:.3g} {unit}"
    return f"{spent * 1e9:.3g} ns"


# -----------------------------------------------------------------------------
# physical limits


def peak_flops(device: torch.device | str = "cpu") -> float:
    """Operations a second of a large matrix product, at the precision that the models compute in.

    No model can exceed it.
    """
    on_gpu = torch.device(device).type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    n = 8192 if on_gpu else 2048
    matrix = torch.randn(n, n, device=device, dtype=dtype)
    operations = 2 * n**3  # a multiplication and an addition each
    return max(operations / seconds(lambda: matrix @ matrix) for _ in range(6))


def bandwidth() -> float:
    """Bytes a second of a large copy, those read and those written both counted."""
    source = torch.zeros(1 << 28, dtype=torch.uint8)  # 256 MB, more than any cache
    target = torch.empty_like(source)
    return max(2 * len(source) / seconds(lambda: target.copy_(source)) for _ in range(5))


def machine() -> str:
    """The GPU in words, or the number and kind of the cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} cores, {processor()}, no GPU"


def processor() -> str:
    """The name of the processor, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    for text in cpuinfo.read_text().splitlines():
        if text.startswith("model name"):
            return text.split(":")[1].strip()
    return "unknown processor"


# -----------------------------------------------------------------------------
# images


def spread_over(items: Sequence, n: int) -> Sequence:
    """At most n items, evenly spread over all of them."""
    step = max(1, len(items) // n)
    return items[::step][:n]
