"""What train.py and qwen_train.py share of a training loop: schedule, update, log, checkpoints.

And what train.py has beside them: layer-wise rates, a pull to the start, averaged weights.
"""

import collections
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flowers import UserError, files, reason

# Common for transformers: one bad batch can't throw the weights far.
MAX_GRADIENT_NORM = 1.0


def note_cut_batch(asked: int, step_size: int, processes: int) -> None:
    """Say that --batch_size asked for more images than there are.

    asked: of each process. step_size: what a step of all processes has.
    """
    if asked * processes > step_size:
        files.note(
            f"--batch_size {asked}: there are fewer training images, so a step has {step_size}"
        )


def parameter_groups(parameters: Mapping[str, torch.Tensor], lr: float, wd: float) -> list[dict]:
    """The parameter groups of AdamW: weight decay on matrices and kernels only.

    parameters: by name. lr: the peak learning rate, kept as `peak` for set_learning_rate.
    """
    # Biases and the weights of norms are vectors.
    decayed = [p for p in parameters.values() if p.ndim >= 2]
    not_decayed = [p for p in parameters.values() if p.ndim < 2]
    return [
        {"params": decayed, "weight_decay": wd, "peak": lr},
        {"params": not_decayed, "weight_decay": 0.0, "peak": lr},
    ]


def layerwise_groups(
    parameters: Mapping[str, torch.Tensor],
    layers_above: Mapping[str, int],
    lr: float,
    wd: float,
    lr_decay: float,
) -> list[dict]:
    """The parameter groups of AdamW with slower layers further down: lr * lr_decay^(layers above).

    Of BEiT (Bao et al. 2022), for CLIP of Dong et al. 2022. With lr_decay = 1 they are those of
    `parameter_groups`.

    parameters, layers_above: by name, as models.layers_above counts them. lr: the peak learning
    rate of the top layer.
    """
    if lr_decay == 1:
        return parameter_groups(parameters, lr, wd)
    groups = []
    for above in sorted({layers_above[name] for name in parameters}):
        layer = {name: p for name, p in parameters.items() if layers_above[name] == above}
        groups += parameter_groups(layer, lr * lr_decay**above, wd)
    return groups


def learning_rate_factor(step: int, total_steps: int, warmup: float = 0.1) -> float:
    """What the peak learning rate is multiplied by at a step (0-based).

    A linear rise over the first `warmup` (a fraction of the steps), then a cosine down to 0.
    """
    warmup_steps = warmup * total_steps
    # From a step above 0, or the first update would be lost.
    rise = (step + 1) / max(1, warmup_steps)
    # Half a turn of the cosine over the steps after the warm-up.
    angle = math.pi * max(0.0, step - warmup_steps) / max(1, total_steps - warmup_steps)
    fall = 0.5 * (1 + math.cos(angle))
    return min(rise, fall)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every parameter group `factor` times its peak learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def update(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.Tensor],
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Clip the gradients of `parameters` to MAX_GRADIENT_NORM, make a step, clear them.

    scaler: what the loss was multiplied by before the backward pass, for fp16. A step whose
        gradients are not finite is left out, and the next loss is multiplied by half as much.
    """
    if scaler is None:
        scaler = torch.amp.GradScaler("cpu", enabled=False)  # does nothing but the step
    scaler.unscale_(optimizer)
    # The norm of all gradients together, as one vector.
    torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


class RecordedGradients:
    """The work of a step up to its gradients, recorded on a GPU once and then repeated.

    Python gives a GPU the thousands of small kernels of a step one after the other, which takes
    longer than a small model's kernels themselves. A CUDA graph gives it all of them at once.

    A recording repeats the same kernels on the same memory: the inputs of all steps have one shape,
    and the gradients of a step are written over those of the step before.

    parameters: those that are trained.
    """

    WARM_UP = 3  # steps that are not recorded: kernels are chosen, compiled and loaded in them

    def __init__(self, parameters: Sequence[torch.nn.Parameter]):
        self.parameters = parameters
        self.graph = None
        self.inputs, self.outputs, self.gradients = [], {}, []

    def __call__(self, work: Callable[..., dict], inputs: Sequence[torch.Tensor | None]) -> dict:
        """What work(*inputs) returns, with the gradients that it gives to the parameters.

        work: takes tensors (or None), returns a dict of tensors. The first work is recorded.
        Raises ValueError if an input has another shape than the first had.
        """
        if self.graph is None:
            self._record(work, inputs)
        for own, new in zip(self.inputs, inputs, strict=True):
            if own is None:
                continue
            if own.shape != new.shape:  # which copy_ would repeat
                raise ValueError(
                    f"{tuple(new.shape)} is not the {tuple(own.shape)} of the recording"
                )
            own.copy_(new)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients):
            parameter.grad = gradient
        return {name: value.clone() for name, value in self.outputs.items()}

    def _record(self, work: Callable[..., dict], inputs: Sequence[torch.Tensor | None]) -> None:
        self.inputs = [None if tensor is None else tensor.clone() for tensor in inputs]
        stream = torch.cuda.Stream()  # a recording needs one of its own, and so does its warm-up
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UP):
                work(*self.inputs)
                for parameter in self.parameters:
                    parameter.grad = None
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # which first gives back the memory of the warm-up
            self.outputs = work(*self.inputs)
        self.gradients = [parameter.grad for parameter in self.parameters]
        self.graph = graph


# -----------------------------------------------------------------------------
# numbers of a step, for the log

# How many steps later they are read, by the type of the device; elsewhere at once.
LATE_STEPS = {"cuda": 2}


class LateNumbers:
    """Numbers that a device computes, read when it has long gone on to other steps.

    Reading a number (`.item()`) from a GPU waits until it has done all that it was given, and then
    it has nothing to do until Python has given it more. Here a number is copied behind the step it
    belongs to, and read while the GPU is at work on a later one.

    device: where they are computed.
    """

    def __init__(self, device: torch.device | str):
        self.delay = LATE_STEPS.get(torch.device(device).type, 0)
        self.waiting = collections.deque()

    def put(self, label: Any, numbers: Mapping[str, torch.Tensor]) -> None:
        """Take the values that the numbers (scalars on the device) have now, under a label."""
        values = torch.stack([number.detach() for number in numbers.values()])
        arrived = None
        if values.is_cuda:
            values = values.to("cpu", non_blocking=True)  # into pinned memory
            arrived = torch.cuda.Event()
            arrived.record()
        self.waiting.append((label, list(numbers), values, arrived))

    def take(self, everything: bool = False) -> Iterator[tuple[Any, dict[str, float]]]:
        """The labels and numbers that are late enough, in order; or all that are left."""
        delay = 0 if everything else self.delay
        while len(self.waiting) > delay:
            label, names, values, arrived = self.waiting.popleft()
            if arrived:
                arrived.synchronize()  # with the copy, not with what was queued after it
            yield label, dict(zip(names, values.tolist()))


# -----------------------------------------------------------------------------
# weights that are held near their start, and averaged weights


def copies(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The values that parameters have now, by name."""
    return {name: p.detach().clone() for name, p in parameters.items()}


def squared_distance(
    parameters: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The sum of (w - w0)^2 over all numbers of the parameters in `start`, a scalar.

    The penalty of L2-SP (Li et al. 2018), there with a factor of 1/2.
    """
    distances = [(parameters[name] - w0).square().sum() for name, w0 in start.items()]
    return torch.stack(distances).sum()


@torch.no_grad()
def update_average(
    average: Mapping[str, torch.Tensor],
    parameters: Mapping[str, torch.Tensor],
    decay: float,
    step: int,
) -> None:
    """Move the averaged weights a to the weights w after a step (0-based): a <- d a + (1 - d) w.

    d is min(decay, (1 + step) / (10 + step)): a high decay would hold on to the start for longer
    than a short training lasts. An empty average stays empty.
    """
    decay = min(decay, (1 + step) / (10 + step))
    for name, averaged_weight in average.items():
        averaged_weight.lerp_(parameters[name], 1 - decay)


@torch.no_grad()
def assign(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """Give the parameters the values of their names; those that have none stay."""
    for name, value in values.items():
        parameters[name].copy_(value)


@contextlib.contextmanager
def averaged(
    parameters: Mapping[str, torch.Tensor], average: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Within the block the parameters have the averaged values, after it their own again."""
    own = copies({name: parameters[name] for name in average})
    assign(parameters, average)
    try:
        yield
    finally:
        assign(parameters, own)


# -----------------------------------------------------------------------------
# the end of an epoch: is the run sound, and what is kept of it


def diverged(loss: float, parameters: Sequence[torch.Tensor] = ()) -> bool:
    """Whether the loss, or one of the weights, is not a finite number."""
    # Both, as the last update of an epoch may break the weights after its loss was computed.
    if not math.isfinite(loss):
        return True
    finite = [p.isfinite().all() for p in parameters]
    # One answer for all: a GPU is waited for once.
    return bool(finite) and not bool(torch.stack(finite).all())


def save_checkpoint(
    path: Path,
    parameters: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    **progress,
) -> None:
    """Write what is needed to go on: trained parameters, optimiser, and `progress`.

    progress: numbers and texts, such as the epoch, the seconds, or the digest of the start.
    Raises OSError on a full disk, and leaves nothing half-written.
    """
    weights = {name: p.detach() for name, p in parameters.items()}
    state = {"model": weights, "optimizer": optimizer.state_dict(), **progress}
    files.save_tensors(path, state)


def restore_scaler(path: Path, scaler: torch.amp.GradScaler, progress: Mapping) -> None:
    """Give the scaler of fp16 what a checkpoint's progress holds of it.

    Raises UserError if that is damaged, or missing.
    """
    if not scaler.is_enabled():
        return
    state = progress.get("scaler")
    expected = scaler.state_dict()
    is_whole = isinstance(state, dict) and state.keys() == expected.keys()
    if not is_whole or not all(type(value) in (int, float) for value in state.values()):
        raise UserError(f"{path} is damaged: it lacks the scale of an fp16 run's loss")
    scaler.load_state_dict(state)


def restore_average(path: Path, average: Mapping[str, torch.Tensor], progress: Mapping) -> None:
    """Give the averaged weights what a checkpoint's progress holds of them.

    Raises UserError if that is damaged, missing, or of other weights.
    """
    try:
        _copy_all(progress.get("average", {}), average)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged: its averaged weights are not of this run ({reason(error)})"
        ) from None


def _copy_all(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors by name. Raises ValueError if names or shapes differ."""
    if set(source) != set(target):
        raise ValueError("it trains other parameters")
    for name, tensor in target.items():
        # copy_ alone would broadcast a smaller tensor.
        if source[name].shape != tensor.shape:
            raise ValueError(f"{name} has another shape")
    assign(target, source)


def _lay_out_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give the moments of each parameter its strides; their values stay.

    They come as the device that wrote them lays out a kernel, which may be another order than
    here (models.to_device). A fused AdamW walks through the memory of both side by side.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            # The number of steps has no dimension.
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def load_checkpoint(
    path: Path, parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> dict:
    """Give parameters and optimiser what a checkpoint holds; returns its progress.

    Raises UserError if it is damaged, or of a run that trains other parameters.
    """
    checkpoint = files.load_tensors(path)
    # Optimiser state brings its own parameter groups. Before the schedule was shared, those of
    # qwen_train.py had no `peak`, so this run's own is kept.
    peaks = [group["peak"] for group in optimizer.param_groups]
    try:
        # Checkpoints of qwen_train.py once called the weights `trained`.
        weights = checkpoint.pop("model" if "model" in checkpoint else "trained")
        _copy_all(weights, parameters)
        optimizer.load_state_dict(checkpoint.pop("optimizer"))
        _lay_out_moments(optimizer)
    except Exception as error:  # torch raises many kinds at what it did not expect
        raise UserError(
            f"{path} is not of this run: {type(error).__name__} {reason(error)}"
        ) from None
    for group, peak in zip(optimizer.param_groups, peaks):
        group["peak"] = peak
    return checkpoint
