"""What is trained of a CLIP, where its frozen part ends, and how the result is exported.

full         everything but the temperature
image, text  one tower; the other is frozen
last_blocks  the last K blocks and the projections of both towers (of a ResNet: its last
             bottlenecks and its attention pool)
lora         low-rank updates of q, k, v, out and MLP weights in both towers (of a ResNet's image
             tower: its attention pool)
prompt       learned context vectors before the class name, everything else frozen
linear       a logistic regression on frozen image features
"""

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from flowers import UserError
from flowers.choices import KEEPS_WEIGHTS as KEEPS_WEIGHTS  # it needs no torch
from flowers.choices import LEARNING_RATES as LEARNING_RATES
from flowers.choices import STRATEGIES as STRATEGIES
from flowers.models import (
    CLIP,
    CONTEXT_MARK,
    PLACEHOLDER,
    ModifiedResNet,
    last_blocks,
    tokenize,
    towers,
)
from flowers.weights import state_for_saving


def prepare(
    model: CLIP, strategy: str, blocks: int = 2, rank: int = 8, context_tokens: int = 4
) -> None:
    """Freeze all of `model` but what the strategy trains; lora and prompt add their parameters.

    The logit scale is frozen too. Raises UserError if the model has fewer blocks, is narrower than
    the rank, or has no room for the context.
    """
    model.requires_grad_(False)
    if strategy in ("full", "image"):
        model.visual.requires_grad_(True)
    if strategy in ("full", "text"):
        for parameter in towers(model)["text"]:
            parameter.requires_grad_(True)
    if strategy == "last_blocks":
        for part in last_blocks(model, blocks):
            part.requires_grad_(True)
    if strategy == "lora":
        add_lora(model, rank)
    if strategy == "prompt":
        add_context(model, context_tokens)
    # linear trains nothing of the model: fit_linear makes a head for its features.


def cut_points(strategy: str, blocks: int) -> tuple[int | None, int | None]:
    """Where the frozen part of the image and of the text tower ends.

    A number of trained blocks, as split_image_tower and split_text_tower take it: 0 where the whole
    tower is frozen, None where no part of it is.
    """
    cuts = {
        "full": (None, None),
        "image": (None, 0),
        "text": (0, None),
        "last_blocks": (blocks, blocks),
        "linear": (0, None),
        # Low-rank updates begin in the first block.
        "lora": (None, None),
        # The context enters at the first layer of the text tower.
        "prompt": (0, None),
    }
    return cuts[strategy]


def count_trainable(model: CLIP, strategy: str, n_classes: int) -> dict[str, int]:
    """Numbers of trained parameters after `prepare`: of each tower, of the scale, and of a head."""
    counts = {}
    for name, parameters in towers(model).items():
        counts[name] = sum(p.numel() for p in parameters if p.requires_grad)
    embedding = model.text_projection.shape[1]
    # A weight for each feature and a bias.
    counts["head"] = n_classes * (embedding + 1) if strategy == "linear" else 0
    return counts


def export(model: CLIP) -> tuple[dict[str, torch.Tensor], dict | None]:
    """Merge LoRA in place and take the learned context out of the model.

    Returns the state dict for model.pt, which clip.load opens if it can build this model (see
    weights.state_for_saving), and what goes into classifier.pt: the context of `prompt`, else None.
    """
    for module, name, _ in _lora_weights(model):
        if parametrize.is_parametrized(module, name):
            # The computed weight becomes the weight.
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    state = state_for_saving(model)
    if "context" not in state:
        return state, None
    return state, {"context": state.pop("context")}


# -----------------------------------------------------------------------------
# lora: W + up @ down (Hu et al. 2021), with their alpha equal to the rank


class LowRank(nn.Module):
    """A parametrization that adds up @ down to a weight; up is zero at the start.

    weight: (rows, columns), `parts` matrices stacked by rows: nn.MultiheadAttention keeps q, k
    and v in one weight, and each gets an update of its own.
    """

    def __init__(self, weight: torch.Tensor, rank: int, parts: int = 1):
        super().__init__()
        rows, columns = weight.shape
        device = weight.device
        down = torch.randn(parts, rank, columns, device=device) / columns**0.5
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(parts, rows // parts, rank, device=device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        update = self.up @ self.down  # (parts, rows / parts, columns)
        return weight + update.reshape(weight.shape)


def add_lora(model: CLIP, rank: int) -> None:
    """Give every weight of _lora_weights a trained update.

    Raises UserError for an impossible rank.
    """
    for module, name, parts in _lora_weights(model):
        weight = getattr(module, name)
        highest_rank = min(weight.shape[0] // parts, weight.shape[1])
        if not 1 <= rank <= highest_rank:
            raise UserError(
                f"--rank {rank}: it must be between 1 and the width of the layers, {highest_rank}"
            )
        parametrize.register_parametrization(module, name, LowRank(weight, rank, parts))


def _lora_weights(model: CLIP) -> list[tuple[nn.Module, str, int]]:
    """Every weight that lora updates: its module, its name, and the number of stacked matrices."""
    weights = []
    transformers = [model.transformer]
    if isinstance(model.visual, ModifiedResNet):
        # A ResNet has no linear layers but those of its attention pool.
        pool = model.visual.attnpool
        for projection in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
            weights.append((projection, "weight", 1))
    else:
        transformers = [model.visual.transformer, model.transformer]
    for transformer in transformers:
        for block in transformer.resblocks:
            weights.append((block.attn, "in_proj_weight", 3))  # q, k, v
            weights.append((block.attn.out_proj, "weight", 1))
            weights.append((block.mlp.c_fc, "weight", 1))
            weights.append((block.mlp.c_proj, "weight", 1))
    return weights


# -----------------------------------------------------------------------------
# prompt: learned vectors in place of the first words (CoOp, Zhou et al. 2022)

# A context of four vectors starts as the embedding of these words, one of another length at random.
CONTEXT_WORDS = "an image of the"


def context_template(context_tokens: int) -> str:
    """The template of `prompt`, in CoOp's notation: `[V] [V] ... {} flower`.

    tokenize turns each mark into a placeholder, over which the learned vector is written.
    """
    return CONTEXT_MARK * context_tokens + "{} flower"


def add_context(model: CLIP, context_tokens: int) -> None:
    """Give the model a context to learn. Raises UserError for an impossible number of vectors."""
    longest = model.context_length // 2  # the other half is for the class name
    if not 1 <= context_tokens <= longest:
        raise UserError(f"--context_tokens {context_tokens}: it must be between 1 and {longest}")
    device = model.token_embedding.weight.device
    words = tokenize([CONTEXT_WORDS])[0, 1:-1]  # without start and end token
    context = model.token_embedding(words.to(device)).detach().clone()  # (4, width)
    if len(context) != context_tokens:
        context = 0.02 * torch.randn(context_tokens, context.shape[1], device=device)
    attach_context(model, context)


def attach_context(model: CLIP, context: torch.Tensor) -> None:
    """Give the model a parameter `context` (M, width), written over the placeholders of a text.

    The placeholders are the M tokens after the start token. Texts without them stay as they are.
    """
    model.context = nn.Parameter(context)

    def write_context(module, inputs, embedded):
        (tokens,) = inputs  # (P, L); embedded is (P, L, width)
        length = tokens.shape[1]
        # One row of padding for the start token, and as many as it takes at the end: (L, width).
        after = max(0, length - 1 - len(model.context))
        learned = nn.functional.pad(model.context.to(embedded.dtype), (0, 0, 1, after))
        is_placeholder = (tokens == PLACEHOLDER)[..., None]
        return torch.where(is_placeholder, learned[:length], embedded)

    model.token_embedding.register_forward_hook(write_context)


# -----------------------------------------------------------------------------
# linear: a logistic regression on frozen features

# Values of C in scikit-learn's LogisticRegression (the inverse of the L2 penalty), tried on val.
INVERSE_REGULARISATION = (0.1, 1.0, 10.0, 100.0, 1000.0)
# Used without val: the choice on val for the real images (docs/study.md).
DEFAULT_C = 100.0


def fit_linear(
    features: torch.Tensor,
    labels: torch.Tensor,
    zero_shot: tuple[torch.Tensor, torch.Tensor],
    val: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[tuple[torch.Tensor, torch.Tensor], float, int]:
    """Fit a logistic regression (L-BFGS, L2) to features (N, D) and labels (N,).

    zero_shot: weight (C, D) and bias (C,) of the frozen model's head, which stay for classes that
    `labels` lacks.
    val: features and labels on which C is chosen; without them it is DEFAULT_C.
    Returns the head (weight and bias), the C used, and the iterations of L-BFGS, each of them a
    pass over all features.
    """
    # It takes two seconds to import, which test_models.py does without.
    from sklearn.linear_model import LogisticRegression

    candidates = (DEFAULT_C,) if val is None else INVERSE_REGULARISATION
    best, best_score = None, -1.0
    for c in candidates:
        regression = LogisticRegression(C=c, max_iter=1000)
        regression.fit(features.numpy(), labels.numpy())
        score = 0.0 if val is None else regression.score(val[0].numpy(), val[1].numpy())
        if score > best_score:  # of equal scores the smallest C wins
            best, best_score = regression, score

    rows, offsets = best.coef_, best.intercept_
    if len(best.classes_) == 2:
        # For two classes scikit-learn keeps one row, the log-odds of the second.
        rows = np.concatenate([-rows, rows]) / 2
        offsets = np.concatenate([-offsets, offsets]) / 2
    weight, bias = (tensor.clone() for tensor in zero_shot)
    trained_classes = torch.from_numpy(best.classes_)
    weight[trained_classes] = torch.from_numpy(rows).float()
    bias[trained_classes] = torch.from_numpy(offsets).float()
    return (weight, bias), best.C, int(best.n_iter_[0])
