"""InfoNCE and its alternatives, and their gradients for batches larger than the memory.

info_nce       each image against the texts of the batch, each text against its images
cross_entropy  each image against the texts of all classes
sigmoid        each pair of an image and a text by itself
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from flowers import UserError


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


def class_cross_entropy(
    image_features: torch.Tensor,
    class_features: torch.Tensor,
    logit_scale: torch.Tensor | float,
    targets: torch.Tensor,
) -> torch.Tensor:
    """Cross-entropy of N images over the texts of C classes, a scalar.

    With s_ic the cosine of image i and the text of class c, y_i the class of image i, and
    tau = 1 / logit_scale,

        L = -1/N sum_i log exp(s_iy_i / tau) / sum_c exp(s_ic / tau)

    This is what FLYP (Goyal et al. 2023) sets against the loss of the pretraining: the sum goes
    over all classes, not over those that the batch happens to hold, and no text looks for its
    image.

    image_features: (N, D), class_features: (C, D), rows of length 1. targets: (N,) int64, y_i.
    """
    logits = logit_scale * image_features @ class_features.t()  # (N, C)
    return F.cross_entropy(logits, targets)


def sigmoid_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor | float,
    logit_bias: torch.Tensor | float,
    matches: torch.Tensor | None = None,
) -> torch.Tensor:
    """SigLIP's loss of N images and N texts (Zhai et al. 2023), a scalar.

    With s_ij the cosine of image i and text j, z_ij = 1 where they match and -1 elsewhere, tau =
    1 / logit_scale, and b the bias,

        L = -1/N sum_ij log sigmoid(z_ij (s_ij / tau + b))

    Each pair is a question by itself: is this a text of this image? Most pairs are not, and b is
    negative to say so.

    image_features, text_features: (N, D), rows of length 1.
    matches: (N, N) bool, whether image i and text j belong together; by default the diagonal.
    """
    logits = logit_scale * image_features @ text_features.t() + logit_bias  # (N, N)
    if matches is None:
        matches = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    signs = 2 * matches.float() - 1  # z
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def best_bias(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor | float,
    matches: torch.Tensor | None = None,
) -> float:
    """The bias at which sigmoid_loss is lowest; the arguments are those of sigmoid_loss.

    The loss is convex in b. Where its derivative is zero, as many matches are expected as there
    are: with P matches, sum_ij sigmoid(s_ij / tau + b) = P. SigLIP begins with a scale of 10 and a
    bias of -10. At the scale of a pretrained CLIP, 100, cosines of 0.25 make every pair a match.

    Raises UserError where all pairs match, so that the best bias is infinite.
    """
    from scipy.optimize import brentq  # here, as the other losses do without
    from scipy.special import expit, logit

    # In double precision, on the CPU: the same in all processes.
    images, texts = image_features.detach().double().cpu(), text_features.detach().double().cpu()
    logits = (float(logit_scale) * images @ texts.t()).numpy()  # (N, N)
    n_matches = len(logits) if matches is None else int(matches.sum())
    share = n_matches / logits.size
    if share == 1:
        raise UserError(
            "the first batch holds one class alone, so the bias of --loss sigmoid has no best "
            "start: give --logit_bias, or a larger --batch_size"
        )
    # Were all logits alike, the best bias would be logit(share) minus that one. So it is between
    # those of the highest and the lowest; 1 more for rounding.
    lowest = logit(share) - logits.max() - 1
    highest = logit(share) - logits.min() + 1
    return brentq(lambda bias: expit(logits + bias).sum() - n_matches, lowest, highest)


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
