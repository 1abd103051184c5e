"""What is trained of a CLIP, where its frozen part ends, and how the result is exported.

full         everything but the temperature
image, text  one tower; the other is frozen
last_blocks  the last K blocks and the projections of both towers (of a ResNet: its last
             bottlenecks and its attention pool)
projection   the image projection (ProLIP, Fahes et al. 2024), of a ResNet the weight of the output
             projection of its attention pool
norm         the LayerNorms of both towers (of a ResNet: its BatchNorms too, but for their running
             statistics)
lora         low-rank updates of q, k, v, out and MLP weights in both towers (of a ResNet's image
             tower: its attention pool)
prompt       learned context vectors before the class name, everything else frozen
linear       a linear classifier on frozen image features: a logistic regression, or the text
             classifier and what the images pull it to
"""

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from flowers import UserError
from flowers.choices import DEFAULT_C, DEFAULT_PULL
from flowers.files import note
from flowers.models import (
    CLIP,
    PLACEHOLDER,
    ModifiedResNet,
    image_projection,
    last_blocks,
    norms,
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
    if strategy == "projection":
        # Without the bias that a ResNet has beside it, as in ProLIP.
        image_projection(model).requires_grad_(True)
    if strategy == "norm":
        # The model stays in eval mode, so BatchNorm's running statistics do not move.
        for norm in norms(model):
            norm.requires_grad_(True)
    if strategy == "lora":
        add_lora(model, rank)
    if strategy == "prompt":
        add_context(model, context_tokens)
    # linear trains nothing of the model: fit_linear makes a head for its features.


def count_trainable(
    model: CLIP, strategy: str, n_classes: int, start_from: str = "random"
) -> dict[str, int]:
    """Numbers of trained parameters after `prepare`: of each tower, of the scale, and of a head.

    n_classes: those that are trained on. start_from: where the head of `linear` starts.
    """
    counts = {}
    for name, parameters in towers(model).items():
        counts[name] = sum(p.numel() for p in parameters if p.requires_grad)
    embedding = model.text_projection.shape[1]
    counts["head"] = 0
    if strategy == "linear":
        # A weight for each feature, and a bias, which the pulled classifier has not.
        biases = 0 if start_from == "zero_shot" else 1
        counts["head"] = n_classes * (embedding + biases)
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
    # The bias of the sigmoid loss moves no image nearer to another name; clip.load knows none.
    state.pop("logit_bias", None)
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
# linear: a classifier on frozen features

# Of L-BFGS, each of them a pass over all features.
MAX_ITERATIONS = 1000

# Values of C in scikit-learn's LogisticRegression (the inverse of the L2 penalty), tried on val.
INVERSE_REGULARISATION = (0.1, 1.0, 10.0, 100.0, 1000.0)

# Strengths of the pull towards the text classifier, tried on val, the strongest first.
PULLS = (10.0, 1.0, 0.1, 0.01, 0.001)


def fit_linear(
    features: torch.Tensor,
    labels: torch.Tensor,
    zero_shot: tuple[torch.Tensor, torch.Tensor],
    inverse_penalty: float | None = None,
    val: tuple[torch.Tensor, torch.Tensor] | None = None,
    sample_weight: np.ndarray | None = None,
) -> tuple[tuple[torch.Tensor, torch.Tensor], float, int]:
    """Fit a logistic regression (L-BFGS, L2) to features (N, D) and labels (N,).

    zero_shot: weight (C, D) and bias (C,) of the frozen model's head, which stay for classes that
    `labels` lacks.
    inverse_penalty: C. Without one it is chosen on val (features and labels); without val it is
    DEFAULT_C.
    sample_weight: (N,), 1 for each by default.
    Returns the head (weight and bias), the C used, and the iterations of L-BFGS.
    """
    # It takes two seconds to import, which test_models.py does without.
    from sklearn.linear_model import LogisticRegression

    candidates = (DEFAULT_C,) if val is None else INVERSE_REGULARISATION
    if inverse_penalty is not None:
        candidates = (inverse_penalty,)
    best, best_score = None, -1.0
    for c in candidates:
        regression = LogisticRegression(C=c, max_iter=MAX_ITERATIONS)
        regression.fit(features.numpy(), labels.numpy(), sample_weight)
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


def fit_pulled(
    features: torch.Tensor,
    labels: torch.Tensor,
    zero_shot: tuple[torch.Tensor, torch.Tensor],
    scale: float,
    pull: float | None = None,
    val: tuple[torch.Tensor, torch.Tensor] | None = None,
    sample_weight: np.ndarray | None = None,
) -> tuple[tuple[torch.Tensor, torch.Tensor], float, int]:
    """Fit a softmax classifier that starts at the text classifier and is pulled towards it.

    It minimises `pulled_loss`: the pull of CLAP (Silva-Rodriguez et al. 2024), with one strength
    for all classes. features: (N, D) of length 1; labels: (N,).

    zero_shot: weight (C, D), `scale` times the text classifier, and bias (C,), which is zero. The
    softmax is over the classes of `labels`, as in `fit_linear`; the others stay as they are.
    pull: its strength. Without one it is chosen on val (features and labels), by the accuracy among
    the classes of `labels`; without val it is DEFAULT_PULL.
    sample_weight: (N,), the same for each by default.
    Returns the head (weight and bias), the pull used, and the iterations of L-BFGS.
    """
    weight, bias = (tensor.clone() for tensor in zero_shot)
    trained_classes, rows = labels.unique(return_inverse=True)  # sorted; (N,) positions in them
    start = weight[trained_classes].double() / scale  # (trained classes, D)
    importance = torch.ones(len(labels), dtype=torch.float64)
    if sample_weight is not None:
        importance = torch.from_numpy(sample_weight)
    samples = features.double(), rows, importance / importance.sum()

    candidates = PULLS if val else (DEFAULT_PULL,)
    if pull is not None:
        candidates = (pull,)
    best, best_score = None, -1.0
    for strength in candidates:
        classifier, iterations = minimise_pulled(*samples, start, scale, strength)
        score = 0.0
        if val:
            val_features, val_labels = val
            predicted = (val_features.double() @ classifier.t()).argmax(1)
            score = (trained_classes[predicted] == val_labels).double().mean().item()
        if score > best_score:  # of equal scores the strongest pull wins
            best, best_score = (classifier, strength, iterations), score

    classifier, strength, iterations = best
    weight[trained_classes] = (scale * classifier).float()
    return (weight, bias), strength, iterations


def pulled_loss(
    classifier: torch.Tensor,
    features: torch.Tensor,
    rows: torch.Tensor,
    sample_weight: torch.Tensor,
    start: torch.Tensor,
    scale: float,
    pull: float,
) -> tuple[float, torch.Tensor]:
    """The weighted mean of the cross-entropy plus pull * |classifier - start|^2, and its gradient.

    classifier, start, and the gradient: (C, D). features: (N, D); their logits are
    scale * features @ classifier^T. rows: (N,) the class of each. sample_weight: (N,), of sum 1.
    """
    logits = scale * features @ classifier.t()  # (N, C)
    log_probabilities = logits.log_softmax(1)
    samples = torch.arange(len(rows))
    cross_entropy = -log_probabilities[samples, rows] @ sample_weight
    distance = classifier - start
    loss = cross_entropy + pull * distance.square().sum()

    # Of the cross-entropy with respect to the logits: probabilities minus one-hot labels.
    residuals = log_probabilities.exp()
    residuals[samples, rows] -= 1
    residuals *= sample_weight[:, None]
    gradient = scale * residuals.t() @ features + 2 * pull * distance
    return loss.item(), gradient


def minimise_pulled(
    features: torch.Tensor,
    rows: torch.Tensor,
    sample_weight: torch.Tensor,
    start: torch.Tensor,
    scale: float,
    pull: float,
) -> tuple[torch.Tensor, int]:
    """The classifier (C, D) of least `pulled_loss`, sought from `start` on, and the iterations."""
    import scipy.optimize  # here, for the reason that scikit-learn is imported late

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        classifier = torch.from_numpy(flat).reshape(start.shape)
        loss, gradient = pulled_loss(classifier, features, rows, sample_weight, start, scale, pull)
        return loss, gradient.numpy().ravel()

    # The loss is strictly convex: the optimum does not depend on where the search begins.
    result = scipy.optimize.minimize(
        loss_and_gradient,
        start.numpy().ravel(),
        method="L-BFGS-B",
        jac=True,
        options={
            "maxiter": MAX_ITERATIONS,
            "maxfun": 2 * MAX_ITERATIONS,
            "ftol": 1e-12,
            "gtol": 1e-7,
        },
    )
    if not result.success:
        note(f"the linear head with a pull of {pull:g} has not converged: {result.message}")
    return torch.from_numpy(result.x).reshape(start.shape), result.nit


def modality_weights(n_images: int, n_texts: int) -> np.ndarray:
    """The weight of each image, then of each text, in a head that is fitted to both (N,).

    All images weigh as much as all texts, as in the batches of Lin et al. (2023), half of which are
    texts: else a few prompts would be lost among many images. The sum is that of images alone, so
    C and the pull mean the same with texts and without.
    """
    images = np.full(n_images, 0.5)
    texts = np.full(n_texts, 0.5 * n_images / n_texts)
    return np.concatenate([images, texts])
