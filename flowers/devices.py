"""Where the work is done: device, precision, processes, seeds, memory."""

import contextlib
import os
import random
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from flowers import UserError

# -----------------------------------------------------------------------------
# random numbers


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch.

    On a CPU, operations whose result depends on the number of threads are refused too.
    Raises UserError for a seed that numpy does not take.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed}: it must be between 0 and {2**32 - 1}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(not torch.cuda.is_available())
    # Deterministic mode would fill new memory with NaN, although it is never read before it is
    # written: that costs a tenth of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False


def generator(*numbers: int) -> torch.Generator:
    """A generator on the CPU whose random numbers depend on `numbers` (seed, epoch, ...) alone.

    A resumed run therefore draws what an uninterrupted one draws.
    """
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    # 63 bits, because torch takes a signed number.
    return torch.Generator().manual_seed(int(seed >> 1))


# -----------------------------------------------------------------------------
# processes


@dataclass(frozen=True)
class Processes:
    """This process, and how many train together with it.

    With one process the methods have nothing to do.

    rank: the number of this process, from 0.
    world_size: how many processes there are.
    device: where this process computes.
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that evaluates, prints and writes files."""
        return self.rank == 0

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block in the main process, then in the others.

        The main process alone downloads and fills the caches; the others read them.
        """
        # Each process waits once: the others before the block, the main process after it.
        if not self.is_main:
            dist.barrier()
        yield
        if self.is_main and self.world_size > 1:
            dist.barrier()

    def part(self, batch: torch.Tensor) -> slice:
        """The rows of a batch (B, ...) that this process encodes: an equal part for each."""
        length = len(batch) // self.world_size
        return slice(self.rank * length, (self.rank + 1) * length)

    def gather(self, features: torch.Tensor) -> torch.Tensor:
        """The features (b, D) of all processes as (world_size * b, D); gradients flow back."""
        if self.world_size == 1:
            return features
        # torch's plain all_gather cuts the graph.
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(features.contiguous()))

    def average_gradients(self, parameters: Sequence[torch.Tensor]) -> None:
        """Replace every gradient by its mean over the processes, in one exchange.

        Each process has the loss of the whole batch, and `gather` sums over the processes what
        flows back to a feature. The mean is therefore the gradient of one process with the whole
        batch, also where it was collected in chunks.
        """
        if self.world_size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        means = (flat / self.world_size).split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means):
            gradient.copy_(mean.view_as(gradient))


def start_processes() -> Processes:
    """One process, unless torchrun started several: NCCL connects GPUs, gloo CPUs."""
    on_gpu = torch.cuda.is_available()
    if not dist.is_torchelastic_launched():
        return Processes(0, 1, torch.device("cuda" if on_gpu else "cpu"))
    device = torch.device("cpu")
    # One GPU for each process of this machine.
    if on_gpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    return Processes(dist.get_rank(), dist.get_world_size(), device)


# -----------------------------------------------------------------------------
# memory and precision


def peak_memory_mb() -> int:
    """The most memory in use so far, in MiB: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux KiB.
    return peak >> 20 if sys.platform == "darwin" else peak >> 10


def autocast(device: torch.device | str) -> contextlib.AbstractContextManager:
    """A context in which matrix products are bf16 on CUDA; on a CPU everything stays fp32."""
    if torch.device(device).type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()
