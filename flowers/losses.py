"""InfoNCE, and its gradient for batches larger than the memory."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F


def info_nce(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor | float,
    matches: torch.Tensor | None = None,
) -> torch.Tensor:
    """Symmetric InfoNCE of N images and their N texts, a scalar.

    With s_ij the cosine of image i and text j, and tau = 1 / logit_scale, the plain form is

        L = -1/2N sum_i [ log exp(s_ii / tau) / sum_j exp(s_ij / tau)
                        + log exp(s_ii / tau) / sum_j exp(s_ji / tau) ]

    (van den Oord et al. 2018; both directions as in CLIP, Radford et al. 2021). Each pair is
    contrasted with all others of the batch.

    With `matches` the log-likelihood is averaged over all matches of a row, and of a column (UniCL,
    Yang et al. 2022; L_out of SupCon, Khosla et al. 2020). Where all texts of a class are the same
    this equals the plain form. With several prompts or captions for a class it does not.

    image_features, text_features: (N, D), rows of length 1.
    matches: (N, N) bool, whether image i and text j belong together; by default the diagonal.
    """
    logits = logit_scale * image_features @ text_features.t()  # (N, N), a row for each image
    if matches is None:
        # cross_entropy takes the index of the one right column.
        image_targets = torch.arange(len(logits), device=logits.device)
        text_targets = image_targets
    else:
        # Each row of the targets is a distribution: equal probabilities for all matches.
        image_positives = matches.float()
        text_positives = matches.t().float()
        image_targets = image_positives / image_positives.sum(dim=1, keepdim=True)
        text_targets = text_positives / text_positives.sum(dim=1, keepdim=True)
    image_loss = F.cross_entropy(logits, image_targets)  # which text for this image?
    text_loss = F.cross_entropy(logits.t(), text_targets)  # which image for this text?
    return (image_loss + text_loss) / 2


def same_class(labels: torch.Tensor) -> torch.Tensor:
    """Which pairs of a batch share their class: labels (N,) -> (N, N) bool."""
    return labels[:, None] == labels[None, :]


def backward_in_chunks(
    encoders: Sequence[Callable],
    inputs: Sequence[torch.Tensor],
    loss_of: Callable,
    chunk_size: int,
) -> torch.Tensor:
    """Backpropagate loss_of(*features), the graph of one chunk at a time; returns the loss.

    GradCache (Gao et al. 2021, arXiv 2101.06983). The gradient is that of the whole batch, because
    a feature depends on its own input alone. The price is a second forward pass.

    encoders: for each tensor of `inputs` a function (B, ...) -> (B, D).
    loss_of: takes the features of each, (B, D), and returns a scalar.
    chunk_size: inputs whose graph is in memory at a time.
    """
    chunked_inputs = [tensor.split(chunk_size) for tensor in inputs]

    # 1. All features, without a graph.
    features = []
    with torch.no_grad():
        for encode, chunks in zip(encoders, chunked_inputs):
            features.append(torch.cat([encode(chunk) for chunk in chunks]))

    # 2. The loss of the whole batch gives the gradient at the features.
    features = [feature.requires_grad_() for feature in features]
    loss = loss_of(*features)
    loss.backward()

    # 3. Each chunk is encoded again, with a graph, and takes its part of that gradient.
    for encode, chunks, feature in zip(encoders, chunked_inputs, features):
        for chunk, gradient in zip(chunks, feature.grad.split(chunk_size)):
            chunk_features = encode(chunk)
            if not chunk_features.requires_grad:
                break  # a frozen encoder has nothing to learn
            chunk_features.backward(gradient)
    return loss.detach()
