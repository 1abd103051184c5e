"""What train.py and qwen_train.py share of a training loop: schedule, update, checkpoints."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from flowers import UserError, files, reason

# Common for transformers: one bad batch can't throw the weights far.
MAX_GRADIENT_NORM = 1.0


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


def diverged(loss: float, parameters: Sequence[torch.Tensor] = ()) -> bool:
    """Whether the loss, or one of the weights, is not a finite number."""
    # Both, as the last update of an epoch may break the weights after its loss was computed.
    if not math.isfinite(loss):
        return True
    return not all(bool(p.isfinite().all()) for p in parameters)


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
        if set(weights) != set(parameters):
            raise ValueError("it trains other parameters")
        with torch.no_grad():
            for name, parameter in parameters.items():
                # copy_ alone would broadcast a smaller tensor.
                if weights[name].shape != parameter.shape:
                    raise ValueError(f"{name} has another shape")
                parameter.copy_(weights[name])
        optimizer.load_state_dict(checkpoint.pop("optimizer"))
    except Exception as error:  # torch raises many kinds at what it did not expect
        raise UserError(
            f"{path} is not of this run: {type(error).__name__} {reason(error)}"
        ) from None
    for group, peak in zip(optimizer.param_groups, peaks):
        group["peak"] = peak
    return checkpoint
