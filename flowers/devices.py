"""Where the work is done: device, precision, processes, seeds, memory."""

import contextlib
import itertools
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from flowers import PRECISIONS, UserError, check_seed

# -----------------------------------------------------------------------------
# device


def choose_device(name: str = "auto") -> torch.device:
    """The device that --device names; a GPU becomes torch's current one.

    Raises UserError if the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu"
    device = torch.device(name)
    if device.type == "mps" and not _has_mps():
        raise UserError("--device mps: this machine, or its torch, has no Metal: use --device cpu")
    if device.type == "cuda":
        n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if n_gpus == 0:
            raise UserError(f"--device {name}: torch sees no GPU here: use --device cpu")
        if device.index is not None:
            if device.index >= n_gpus:
                last = f"cuda:{n_gpus - 1}"
                raise UserError(f"--device {name}: the last GPU that torch sees is {last}")
            torch.cuda.set_device(device)
    return device


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def describe(device: torch.device | str | None = None) -> str:
    """The name of a device for args.json, such as `NVIDIA A100` or `cpu, 8 threads`.

    device: by default what `auto` chooses.
    """
    device = choose_device() if device is None else torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "mps"
    # Sums depend on the number of threads in their last digits.
    return f"cpu, {torch.get_num_threads()} threads"


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor on a device. A GPU gets it in its turn, and Python goes on meanwhile.

    A plain `.to("cuda")` waits until the GPU has done all that it was given before. From pinned
    memory, which the system does not move, the GPU copies by itself.
    """
    device = torch.device(device)
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


# -----------------------------------------------------------------------------
# precision

DTYPES = dict(zip(PRECISIONS, (torch.bfloat16, torch.float16, torch.float32)))
# GPUs before this compute capability (T4, V100) have no bf16 units, and would emulate it slowly.
BF16_CAPABILITY = (8, 0)
# What set_precision chose, by type of device. A setting of the process and not an argument, since
# `autocast` is called at the bottom of both towers, and a process computes in one precision.
_chosen_precision: dict[str, str] = {}


def set_precision(name: str, device: torch.device | str) -> str:
    """Choose the precision of everything that this process computes on a type of device.

    name: as --precision has it. Returns bf16, fp16 or fp32.
    """
    device = torch.device(device)
    precision = _auto_precision(device) if name == "auto" else name
    _chosen_precision[device.type] = precision
    return precision


def precision_of(device: torch.device | str) -> str:
    """The precision that this process computes in on a device: bf16, fp16 or fp32."""
    device = torch.device(device)
    return _chosen_precision.get(device.type) or _auto_precision(device)


def _auto_precision(device: torch.device) -> str:
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= BF16_CAPABILITY else "fp32"


def autocast(device: torch.device | str) -> contextlib.AbstractContextManager:
    """A context in which matrix products are made in the precision of the device."""
    precision = precision_of(device)
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, DTYPES[precision])


def gradient_scaler(device: torch.device | str) -> torch.amp.GradScaler:
    """The scaler of the loss for fp16, whose small gradients would become 0; else one that does
    nothing.
    """
    is_fp16 = precision_of(device) == "fp16"
    return torch.amp.GradScaler(torch.device(device).type, enabled=is_fp16)


# -----------------------------------------------------------------------------
# random numbers


def seed_everything(seed: int, device: torch.device | None = None) -> None:
    """Seed Python, numpy and torch.

    On a CPU, operations whose result depends on the number of threads are refused too.
    device: where the computation is; by default what `auto` chooses.
    Raises UserError for a seed that numpy does not take.
    """
    if device is None:
        device = choose_device()
    check_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    # Not use_deterministic_algorithms, which imports torch.compile: a fifth of what training takes
    # to its first step. It would also set Inductor's deterministic mode, for --compile alone.
    torch.set_deterministic_debug_mode("error" if device.type == "cpu" else "default")
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

WAIT_SECONDS = 0.2  # between two looks at whether the main process is done


@dataclass(frozen=True)
class Processes:
    """This process, and how many train together with it.

    With one process the methods have nothing to do.

    rank: the number of this process, from 0.
    world_size: how many processes there are.
    device: where this process computes.
    store: what the processes tell each other; None with one process.
    """

    rank: int
    world_size: int
    device: torch.device
    store: dist.Store | None = None
    turns: Iterator[int] = field(default_factory=itertools.count)  # at the store

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that evaluates, prints and writes files."""
        return self.rank == 0

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block in the main process, then in the others.

        The main process alone downloads and fills the caches; the others read them. They wait for
        as long as it takes: a barrier would give up after ten minutes (NCCL) or thirty (gloo).
        """
        if self.store is None:
            yield
            return
        done = f"main_first/{next(self.turns)}"
        while not self.is_main and not self.store.check([done]):
            time.sleep(WAIT_SECONDS)
        yield
        if self.is_main:
            self.store.set(done, "")

    def wait(self) -> None:
        """Return when all processes have come here, however long the slowest takes."""
        if self.store is None:
            return
        turn = f"wait/{next(self.turns)}"
        self.store.add(turn, 1)
        while self.store.add(turn, 0) < self.world_size:  # adding 0 reads the number
            time.sleep(WAIT_SECONDS)

    def from_main(self, text: str) -> str:
        """The text that the main process gives; the others may give any."""
        if self.store is None:
            return text
        key = f"from_main/{next(self.turns)}"
        if self.is_main:
            self.store.set(key, text)
        while not self.store.check([key]):
            time.sleep(WAIT_SECONDS)
        return self.store.get(key).decode()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each of the values summed over the processes, in one exchange."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

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


def start_processes(device_name: str = "auto") -> Processes:
    """One process, unless torchrun started several: NCCL connects GPUs, gloo CPUs.

    device_name: as --device has it. Under torchrun the local rank says which GPU is used.
    Raises UserError if the device is not there.
    """
    if not dist.is_torchelastic_launched():
        return Processes(0, 1, choose_device(device_name))
    if device_name == "auto":
        device_name = "cuda" if torch.cuda.is_available() else "cpu"
    if device_name not in ("cuda", "cpu"):
        raise UserError(f"--device {device_name}: under torchrun give cuda (one each) or cpu")
    # One GPU for each process of this machine.
    if device_name == "cuda":
        device_name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = choose_device(device_name)
    store, rank, n_processes = next(dist.rendezvous("env://"))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=n_processes)
    return Processes(rank, n_processes, device, store)


# -----------------------------------------------------------------------------
# memory


def peak_memory_mb(device: torch.device | str | None = None) -> int:
    """The most memory in use so far, in MiB: of a GPU (CUDA), else of the process.

    device: where the computation is; by default what `auto` chooses.
    """
    device = choose_device() if device is None else torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    try:
        import resource  # here, as Windows has none
    except ImportError:
        import psutil

        memory = psutil.Process().memory_info()
        # peak_wset is Windows' own.
        return getattr(memory, "peak_wset", memory.rss) >> 20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux KiB.
    return peak >> 20 if sys.platform == "darwin" else peak >> 10
