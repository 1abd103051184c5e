"""Where the work is done: device, precision, processes, seeds, memory."""

import contextlib
import os
import random
import resource
import sys

import numpy as np
import torch
import torch.distributed as dist

from flowers import UserError


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch; on a CPU also refuse operations whose result depends on the threads. Raises UserError for an odd seed."""
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed}: it must be between 0 and {2**32 - 1}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(not torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # a tenth of a step, for memory that is never read
    )


def generator(*numbers: int) -> torch.Generator:
    """Random numbers that depend on `numbers` (seed, epoch, ...) alone, so that a resumed run draws what an uninterrupted one draws."""
    return torch.Generator().manual_seed(
        int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
    )


def processes() -> tuple[int, int, torch.device]:
    """Rank, number of processes and device: one process, unless torchrun started more (NCCL between GPUs, gloo between CPUs)."""
    cuda = torch.cuda.is_available()
    if not dist.is_torchelastic_launched():
        return 0, 1, torch.device("cuda" if cuda else "cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


@contextlib.contextmanager
def rank_zero_first(rank: int, world: int):
    """Let process 0 do the block before the others, so that it alone downloads and fills the caches."""
    if world > 1 and rank > 0:
        dist.barrier()
    yield
    if world > 1 and rank == 0:
        dist.barrier()


def peak_memory_mb() -> int:
    """The most that was held so far: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (
        20 if sys.platform == "darwin" else 10
    )


def autocast(device: torch.device | str):
    """bf16 on CUDA, nothing on a CPU."""
    return (
        torch.autocast("cuda", torch.bfloat16)
        if torch.device(device).type == "cuda"
        else contextlib.nullcontext()
    )
