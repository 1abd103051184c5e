"""Where a model looks: how much each place of a picture counts for its score of a class.

A score is the dot product of the picture's features, of length 1, with a direction: the features of
a text (then it is their cosine), or the weights of a class in a linear head.
"""

# Only the view that shows the maps imports this module, as it needs torch at once.

import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from flowers import UserError, evaluate, pixels, weights
from flowers.choices import KEEPS_WEIGHTS, PRETRAINED, RANDOM, TEMPLATE
from flowers.files import load_tensors
from flowers.gallery.predictions import model_arguments
from flowers.gallery.search import own_prompts, run_head
from flowers.images import read_rgb
from flowers.models import (
    CLIP,
    encode,
    encode_images,
    image_blocks,
    is_resnet,
    settings_of,
    split_image_tower,
    text_features,
)

# -----------------------------------------------------------------------------
# maps


def relevance(
    model: CLIP, images: torch.Tensor, directions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much each place of B images counts for their scores, and the scores (B,).

    images: (B, 3, R, R) normalised; directions: (B, D), one for each image.
    The map is (B, side, side). Each of its cells is a patch of a ViT, and at least 0; or 32 x 32
    pixels of a ResNet, and below 0 where it speaks against the score. Nothing of the model is
    changed, nor are the gradients of its parameters.
    """
    if is_resnet(model):
        return pool_relevance(model, images, directions)
    return attention_relevance(model, images, directions)


@torch.enable_grad()
def attention_relevance(
    model: CLIP, images: torch.Tensor, directions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`relevance` of a ViT: attention times its gradient, through all layers (Chefer, Gur and Wolf
    2021, equations 5 and 6; here of self-attention alone).

    From the first layer on, R <- R + mean over heads of relu(A * dscore/dA) @ R. R (tokens, tokens)
    starts as the identity; its row of the class token is the map.
    """
    visual, blocks = model.visual, image_blocks(model)
    embed, _ = split_image_tower(model, len(blocks))
    # The model's parameters may be frozen: then this alone makes a graph.
    tokens = embed(images).requires_grad_()  # (B, tokens, width)
    attentions = []
    for block in blocks:
        mixed, attention = attend(block.attn, block.ln_1(tokens))
        tokens = tokens + mixed
        tokens = tokens + block.mlp(block.ln_2(tokens))
        attentions.append(attention)
    scores = score(visual.ln_post(tokens[:, 0]) @ visual.proj, directions)

    # Images do not see one another: the gradient of the sum holds that of each.
    gradients = torch.autograd.grad(scores.sum(), attentions)
    n_tokens = tokens.shape[1]
    relevances = torch.eye(n_tokens).expand(len(images), n_tokens, n_tokens)
    for attention, gradient in zip(attentions, gradients):
        positive = (attention.detach() * gradient).relu().mean(1)  # (B, tokens, tokens)
        relevances = relevances + positive @ relevances
    of_patches = relevances[:, 0, 1:]  # (B, side * side): what the class token has from each
    side = round(of_patches.shape[1] ** 0.5)
    return of_patches.unflatten(1, (side, side)), scores.detach()


def attend(
    attention: torch.nn.MultiheadAttention, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a self-attention makes of tokens (B, n, width), and its weights (B, heads, n, n).

    The module itself gives weights that its result does not depend on: they have no gradient.
    """
    qkv = F.linear(tokens, attention.in_proj_weight, attention.in_proj_bias)  # (B, n, 3 * width)
    of_heads = qkv.unflatten(-1, (3, attention.num_heads, -1))  # (B, n, 3, heads, head width)
    query, key, value = of_heads.permute(2, 0, 3, 1, 4)  # (B, heads, n, head width) each
    logits = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    weights = logits.softmax(-1)
    mixed = (weights @ value).transpose(1, 2).flatten(2)  # (B, n, width)
    return attention.out_proj(mixed), weights


@torch.enable_grad()
def pool_relevance(
    model: CLIP, images: torch.Tensor, directions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`relevance` of a ResNet: what enters its attention pool, times the gradient there.

    The sum over channels. Grad-CAM (Selvaraju et al. 2017) first averages the
    gradient over all places, as its networks pool by the mean; an attention pool does not.
    """
    trunk, _ = split_image_tower(model, 1)
    with torch.no_grad():
        cells = image_blocks(model)[-1](trunk(images))  # (B, channels, side, side)
    cells.requires_grad_()
    scores = score(model.visual.attnpool(cells), directions)
    (gradient,) = torch.autograd.grad(scores.sum(), cells)
    return (cells.detach() * gradient).sum(1), scores.detach()


def score(features: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """The dot products (B,) of features (B, D), once they have length 1, with directions (B, D)."""
    return (F.normalize(features, dim=-1) * directions).sum(-1)


# -----------------------------------------------------------------------------
# a run, and what it started from


class Target(NamedTuple):
    """What is looked for in a picture: a class, or what a sentence says.

    Attributes:
        name: of the class, or the sentence.
        direction: of its score, (D,).
        bias: added to the score by a linear head, else 0.
        unit: of the score, 'cosine' or 'logit'.
    """

    name: str
    direction: torch.Tensor
    bias: float = 0.0
    unit: str = "cosine"


class Explainer:
    """A model with its head, which says where it looks.

    Attributes:
        origin: what the weights are, in words.
        resolution: R, the side of its images.
        temperature: divides the logits of `probabilities`; None where the run has found none on
            val.
    """

    def __init__(
        self,
        model: CLIP,
        head: evaluate.Head,
        class_names: Sequence[str],
        learned: bool,
        temperature: float | None = None,
    ):
        """learned: whether the head is a linear one, and not made from texts."""
        self.model = model
        self.head = head
        self.class_names = class_names
        self.learned = learned
        self.temperature = temperature
        self.origin = model.origin
        self.resolution = model.visual.input_resolution

    def predict(self, file: Path) -> str:
        """Return the name of the best class for a picture."""
        return self.class_names[int(self._logits(file).argmax())]

    def probabilities(self, file: Path) -> np.ndarray:
        """Return the probabilities (C,) of the classes for a picture: calibrated, if the run has a
        temperature, else at the head's scale. Raises UserError for a model that diverged.
        """
        return (self._logits(file) / (self.temperature or 1.0)).softmax(0).numpy()

    def _logits(self, file: Path) -> torch.Tensor:
        """The logits (C,) of the classes for a picture."""
        with torch.inference_mode():
            features = encode_images(self.model, self._read(file))  # (1, D)
        return evaluate.class_logits(features, self.head)[0]

    def class_target(self, name: str) -> Target:
        weight, bias = self.head
        c = self.class_names.index(name)
        if self.learned:
            return Target(name, weight[c], bias[c].item(), "logit")
        # The zero-shot head is at the model's temperature: the cosine has none.
        return Target(name, F.normalize(weight[c], dim=0))

    def text_target(self, sentence: str) -> Target:
        length = self.model.context_length
        is_cut = len(encode(sentence)) > length
        name = f"{sentence} (the model reads its first {length} tokens)" if is_cut else sentence
        # Cloned, as what is made in inference mode takes part in no gradient.
        return Target(name, text_features(self.model, [sentence])[0].clone())

    def explain(self, file: Path, target: Target) -> tuple[np.ndarray, float]:
        """Return where in a picture the model finds a target, and the target's score.

        The map (side, side) is from 0 to 1, its most relevant cell; what speaks against the target
        is 0, and all of the map if no place speaks for it. Raises UserError for a model that
        diverged.
        """
        maps, scores = relevance(self.model, self._read(file), target.direction[None])
        if not scores.isfinite().all() or not maps.isfinite().all():
            raise UserError("the model's scores are not numbers: it diverged")
        maps = maps.relu()
        greatest = maps.max().clamp(min=torch.finfo(maps.dtype).tiny)
        return (maps[0] / greatest).numpy(), scores.item() + target.bias

    def _read(self, file: Path) -> torch.Tensor:
        """A picture as the model sees it, (1, 3, R, R)."""
        square = pixels.read_square(file, self.model.visual.input_resolution)
        settings = settings_of(self.model)
        first = torch.tensor([0])
        return pixels.get_batch(square[None], first, "cpu", mean=settings.mean, std=settings.std)


def load_run(folder: Path, class_names: Sequence[str]) -> Explainer:
    """Return the model of a run. Raises UserError if it, or its calibration.json, is
    damaged, or it is of other classes.
    """
    model = weights.load_model(str(folder))
    head, prompts = run_head(folder, model, class_names)
    temperature = evaluate.own_temperature(folder, class_names, *prompts)
    return Explainer(model, head, class_names, _has_linear_head(folder), temperature)


def load_start(folder: Path, class_names: Sequence[str]) -> Explainer:
    """Return the model that a run started from, with the head of the run's prompts.

    Raises UserError if it is not known, has changed since, or is no longer on this machine (nothing
    is downloaded), and if the run's arguments are damaged.
    """
    model = weights.load_model(str(folder))
    arguments = model_arguments(folder)
    strategy = arguments.get("strategy")
    if strategy not in KEEPS_WEIGHTS:
        _check_is_here(arguments.get("architecture"))
        start = _starting_weights(folder)
        evaluate.interpolate(model, start, model.state_dict(), alpha=0.0)
    if "architecture" in arguments:
        model.origin = weights.origin_of(arguments["architecture"])
    templates, prompts_file = own_prompts(folder)
    sentences = evaluate.read_prompts(prompts_file, class_names) if prompts_file else None
    if strategy == "prompt" or not (templates or sentences):
        templates = [TEMPLATE]  # the words that a learned context starts from
    head = evaluate.zero_shot_head(model, class_names, templates, sentences)
    return Explainer(model, head, class_names, learned=False)


def _has_linear_head(folder: Path) -> bool:
    path = folder / "classifier.pt"
    return path.exists() and "context" not in load_tensors(path)


def _check_is_here(architecture: str | None) -> None:
    """Raise UserError for a start that would be fetched from the network."""
    if architecture is None:
        return  # no arguments: that is refused below
    if architecture in RANDOM or Path(architecture).exists():
        return
    _, colon, path = architecture.rpartition(":")
    if colon and Path(path).exists():
        return
    if architecture not in PRETRAINED or not weights.downloaded_file(architecture).exists():
        raise UserError(f"the run started from {architecture}, which is not on this machine")


def _starting_weights(folder: Path) -> dict[str, torch.Tensor]:
    """evaluate.load_starting_weights; the seed of the run, which it sets, is its own alone."""
    state = random.getstate()
    try:
        return evaluate.load_starting_weights(str(folder))
    finally:
        random.setstate(state)  # the page draws random pictures


# -----------------------------------------------------------------------------
# pictures


OPACITY = 0.5  # of the map's colours
OUTSIDE = 0.3  # contrast of what the model does not see
MIDDLE = 128  # a grey that is as far from a light page as from a dark one
SHADES = "viridis"  # as legible to those who confuse colours, and in grey


def paint(file: Path, values: np.ndarray, resolution: int) -> bytes:
    """Return a picture in grey, with a map (side, side) in colours over it, as a JPEG.

    The colours lie where the model's crop was taken from, one square for each cell of the map. What
    is outside the model does not see: it is faint. resolution: R, the side of the model's images.
    """
    rgb = read_rgb(file)
    grey = rgb.mean(2, keepdims=True).repeat(3, 2)  # (H, W, 3): the flower's colours would mislead
    top, bottom, left, right = crop_box(*rgb.shape[:2], resolution)
    shades = 255 * matplotlib.colormaps[SHADES](values)[..., :3]  # (side, side, 3)
    rows = np.arange(bottom - top) * len(values) // (bottom - top)  # the cell of each pixel
    columns = np.arange(right - left) * len(values) // (right - left)

    painted = MIDDLE + OUTSIDE * (grey - MIDDLE)
    inside = grey[top:bottom, left:right]
    painted[top:bottom, left:right] = (1 - OPACITY) * inside + OPACITY * shades[rows][:, columns]
    jpeg = io.BytesIO()
    Image.fromarray(painted.round().astype(np.uint8)).save(jpeg, "JPEG", quality=90)
    return jpeg.getvalue()


def legend(steps: int = 9) -> list[str]:
    """Return the colours of a map from 0 to its most relevant place, as '#rrggbb'."""
    shades = matplotlib.colormaps[SHADES]
    return [matplotlib.colors.to_hex(shades(step)) for step in np.linspace(0, 1, steps)]


def crop_box(height: int, width: int, resolution: int) -> tuple[int, int, int, int]:
    """Return the top, bottom, left and right, in a picture's own pixels, of what a model sees."""
    resized_height, resized_width, top, left = pixels.geometry(height, width, resolution)
    down, across = height / resized_height, width / resized_width  # pixels of a resized one
    edges = (top * down, (top + resolution) * down, left * across, (left + resolution) * across)
    return tuple(round(edge) for edge in edges)
