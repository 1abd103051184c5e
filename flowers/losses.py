"""InfoNCE, and its gradient for batches larger than the memory."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.nn.functional import all_gather


def info_nce(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor | float,
    matches: torch.Tensor | None = None,
) -> torch.Tensor:
    """Symmetric InfoNCE of N images and their N texts, a scalar.

    With s_ij the cosine of image i and text j, and tau = 1 / logit_scale, the plain form is

        L = -1/2N sum_i [ log exp(s_ii / tau) / sum_j exp(s_ij / tau)  +  log exp(s_ii / tau) / sum_j exp(s_ji / tau) ]

    so each of the N pairs is told from N^2 - N others (van den Oord et al. 2018; both directions as in CLIP, Radford et al. 2021).
    `matches` (N, N) bool says which pairs belong together when that is not just the diagonal: the log-likelihood is then averaged
    over the matches of a row, and of a column (UniCL, Yang et al. 2022; L_out of SupCon, Khosla et al. 2020). Where the texts of a class
    are all the same this equals the plain form: only with several prompts, or captions, does it make a difference.

    image_features, text_features: (N, D), of length 1.
    """
    logits = logit_scale * image_features @ text_features.t()
    if matches is None:
        target = text_target = torch.arange(len(logits), device=logits.device)
    else:
        target, text_target = (
            m / m.sum(1, keepdim=True) for m in (matches.float(), matches.t().float())
        )
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), text_target)) / 2


def same_class(labels: torch.Tensor) -> torch.Tensor:
    """Which pairs of a batch share their class: (N,) -> (N, N) bool. At batch 64 every second flower has a classmate there."""
    return labels[:, None] == labels[None, :]


def backward_in_chunks(
    encoders: Sequence[Callable], inputs: Sequence[torch.Tensor], loss_of: Callable, chunk: int
) -> torch.Tensor:
    """Backpropagate loss_of(*features) while the graph of only `chunk` inputs is held at a time; returns the loss.

    Every feature is computed once without a graph; the loss of the whole batch gives the gradient at the features; then each chunk is
    encoded again, with a graph, and takes its share of it. The gradient is that of the whole batch, as each feature depends on its own
    input alone, at the price of a second forward pass (GradCache: Gao et al. 2021, arXiv 2101.06983).

    encoders: one function (B, ...) -> (B, D) for each tensor of `inputs`; loss_of: features of each -> scalar.
    """
    chunks = [x.split(chunk) for x in inputs]
    with torch.no_grad():
        features = [
            torch.cat([encode(part) for part in parts]) for encode, parts in zip(encoders, chunks)
        ]
    features = [f.requires_grad_() for f in features]
    loss = loss_of(*features)
    loss.backward()
    for encode, parts, feature in zip(encoders, chunks, features):
        for part, grad in zip(parts, feature.grad.split(chunk)):
            encoded = encode(part)
            if not encoded.requires_grad:
                break  # a frozen encoder has nothing to learn
            encoded.backward(grad)
    return loss.detach()


def gather_features(features: torch.Tensor) -> torch.Tensor:
    """The features (B, D) of all processes as (processes * B, D), gradients included; with one process, the same features."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return features
    return torch.cat(all_gather(features.contiguous()))


def average_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over all processes, in one exchange. As each process has the loss of the whole batch, and gather
    sums what comes back to a feature, the mean is the gradient of one process with the whole batch; it works with chunks too."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        flat = torch.cat([p.grad.reshape(-1) for p in parameters])
        dist.all_reduce(flat)
        for p, mean in zip(
            parameters, (flat / dist.get_world_size()).split([p.numel() for p in parameters])
        ):
            p.grad.copy_(mean.view_as(p))
