"""What is trained of a CLIP, where its frozen part ends, and how the result is exported.

full         everything
image, text  one tower; the other is frozen
last_blocks  the last K blocks and the projections of both towers (a ResNet's block is a bottleneck, its projection the attention pool)
linear       a logistic regression on frozen image features
lora         low-rank updates of q, k, v, out and MLP weights in both towers (of a ResNet's image tower: its attention pool)
prompt       learned context vectors before the class name, everything else frozen
"""

import numpy as np
import torch
from clip.model import CLIP, ModifiedResNet
from torch import nn
from torch.nn.utils import parametrize

from flowers import UserError
from flowers.models import CONTEXT_MARK, PLACEHOLDER, last_blocks, tokenize, towers

STRATEGIES = ("full", "image", "text", "last_blocks", "linear", "lora", "prompt")
# Peak learning rates for pretrained models: common values of the literature, for prompt CoOp's (Zhou et al. 2022), not tuned here
LEARNING_RATES = {
    "full": 1e-5,
    "image": 1e-5,
    "text": 1e-5,
    "last_blocks": 3e-5,
    "lora": 2e-4,
    "prompt": 2e-3,
    "linear": 0.0,
}
CONTEXT_WORDS = (
    "an image of the"  # a context of four vectors starts at these words, another length at random
)
INVERSE_REGULARISATION = (
    0.1,
    1.0,
    10.0,
    100.0,
    1000.0,
)  # C of scikit-learn, tried on val with --holdout
DEFAULT_C = 100.0  # without it; the choice on val for the real images (README)


class LowRank(nn.Module):
    """weight + up @ down for a weight of `parts` matrices stacked by rows (q, k, v); zero at the start (LoRA, Hu et al. 2021, alpha = rank)."""

    def __init__(self, weight: torch.Tensor, rank: int, parts: int = 1):
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(
            torch.randn(parts, rank, columns, device=weight.device) / columns**0.5
        )
        self.up = nn.Parameter(torch.zeros(parts, rows // parts, rank, device=weight.device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.up @ self.down).reshape(weight.shape)


def prepare(
    model: CLIP, strategy: str, blocks: int = 2, rank: int = 8, context_tokens: int = 4
) -> None:
    """Freeze `model` but for what the strategy trains, and add the parameters of lora and prompt. The logit scale is frozen too.

    Raises UserError if the model has fewer blocks, or the text tower no room for the context.
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
        for module, name, parts in _lora_weights(model):
            weight = getattr(module, name)
            if not 1 <= rank <= min(weight.shape[0] // parts, weight.shape[1]):
                raise UserError(
                    f"--rank {rank}: it must be between 1 and the width of the layers, {min(weight.shape[0] // parts, weight.shape[1])}"
                )
            parametrize.register_parametrization(module, name, LowRank(weight, rank, parts))
    if strategy == "prompt":
        if not 1 <= context_tokens <= model.context_length // 2:
            raise UserError(
                f"--context_tokens {context_tokens}: it must be between 1 and {model.context_length // 2}"
            )
        words = model.token_embedding(
            tokenize([CONTEXT_WORDS])[0, 1:-1].to(model.token_embedding.weight.device)
        ).detach()
        attach_context(
            model,
            words.clone()
            if len(words) == context_tokens
            else 0.02 * torch.randn(context_tokens, words.shape[1], device=words.device),
        )


def cut_points(strategy: str, blocks: int) -> tuple[int | None, int | None]:
    """Where the frozen part of the image and of the text tower ends, as split_image_tower and split_text_tower take it."""
    return {
        "full": (None, None),
        "image": (None, 0),
        "text": (0, None),
        "last_blocks": (blocks, blocks),
        "linear": (0, None),
        "lora": (None, None),
        "prompt": (0, None),
    }[strategy]


def context_template(context_tokens: int) -> str:
    """The prompt of `prompt`, in CoOp's notation; tokenize gives each mark a place that the learned vectors take."""
    return CONTEXT_MARK * context_tokens + "{} flower"


def attach_context(model: CLIP, context: torch.Tensor) -> None:
    """Give the model a parameter `context` (M, width) that is written over the placeholders of a text, which follow its start token."""
    model.context = nn.Parameter(context)

    def write(module, inputs, output):
        (tokens,) = inputs  # (P, L) -> output (P, L, width)
        after = max(0, tokens.shape[1] - 1 - len(model.context))
        learned = nn.functional.pad(model.context.to(output.dtype), (0, 0, 1, after))[
            : tokens.shape[1]
        ]
        return torch.where((tokens == PLACEHOLDER)[..., None], learned, output)

    model.token_embedding.register_forward_hook(write)


def count_trainable(model: CLIP, strategy: str, n_classes: int) -> dict[str, int]:
    """Number of trained parameters by tower, after prepare; `linear` has a head of its own."""
    counts = {
        name: sum(p.numel() for p in parameters if p.requires_grad)
        for name, parameters in towers(model).items()
    }
    return counts | {
        "head": n_classes * (model.text_projection.shape[1] + 1) if strategy == "linear" else 0
    }


def fit_linear(
    features: torch.Tensor,
    labels: torch.Tensor,
    zero_shot: tuple[torch.Tensor, torch.Tensor],
    val: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[tuple[torch.Tensor, torch.Tensor], float, int]:
    """A logistic regression (L-BFGS, L2) on features (N, D): the head, its C, and L-BFGS iterations, each of them a pass over all features.

    zero_shot: the head of the frozen model; it stays for classes that `labels` lacks. val: features and labels on which C is chosen
    from INVERSE_REGULARISATION; without, it is DEFAULT_C.
    """
    from sklearn.linear_model import (
        LogisticRegression,  # two seconds, which test_models.py does without
    )

    fits = [
        LogisticRegression(C=c, max_iter=1000).fit(features.numpy(), labels.numpy())
        for c in (INVERSE_REGULARISATION if val else (DEFAULT_C,))
    ]
    best = max(fits, key=lambda fit: fit.score(val[0].numpy(), val[1].numpy())) if val else fits[0]
    weight, bias = (x.clone() for x in zero_shot)
    seen = torch.from_numpy(best.classes_)
    rows, offsets = best.coef_, best.intercept_
    if len(seen) == 2:  # scikit-learn keeps one row for two classes: the log-odds of the second
        rows, offsets = np.concatenate([-rows, rows]) / 2, np.concatenate([-offsets, offsets]) / 2
    weight[seen], bias[seen] = torch.from_numpy(rows).float(), torch.from_numpy(offsets).float()
    return (weight, bias), best.C, int(best.n_iter_[0])


def export(model: CLIP) -> tuple[dict[str, torch.Tensor], dict | None]:
    """Merge LoRA in place; returns the plain state dict that clip.load opens, and what goes into classifier.pt for a learned prompt."""
    for module, name, _ in _lora_weights(model):
        if parametrize.is_parametrized(module, name):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    state = model.state_dict()
    context = state.pop("context", None)
    return state, None if context is None else {"context": context}


def _lora_weights(model: CLIP) -> list[tuple[nn.Module, str, int]]:
    """Module, name and number of stacked matrices of every weight that lora updates."""
    pool = model.visual.attnpool if isinstance(model.visual, ModifiedResNet) else None
    found = (
        [(getattr(pool, name), "weight", 1) for name in ("q_proj", "k_proj", "v_proj", "c_proj")]
        if pool
        else []
    )
    for transformer in ([] if pool else [model.visual.transformer]) + [model.transformer]:
        for block in transformer.resblocks:
            found += [
                (block.attn, "in_proj_weight", 3),
                (block.attn.out_proj, "weight", 1),
                (block.mlp.c_fc, "weight", 1),
                (block.mlp.c_proj, "weight", 1),
            ]
    return found
