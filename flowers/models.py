"""CLIP's architectures: the nine released ones and three small ones.

Building them, tokens, features, and the two towers cut in two where training starts.
"""

import contextlib
import functools
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from flowers import UserError, reason, stop
from flowers.choices import ACTIVATION_NAMES, CONTEXT_MARK, PROJECTION, SHAPES, Cut, Shape
from flowers.devices import autocast
from flowers.pixels import CLIP_MEAN, CLIP_STD, get_batch


def _how_to_mend_clip(error: Exception) -> str:
    """What to do about an `import clip` that failed."""
    if "pkg_resources" in str(error):
        return "pip install 'setuptools>=77.0.3,<81', as later ones have no pkg_resources"
    spec = importlib.util.find_spec("clip")
    folders = (spec.submodule_search_locations or []) if spec else []
    is_openai = any((Path(folder) / "simple_tokenizer.py").exists() for folder in folders)
    if spec and not is_openai:
        return (
            f"{spec.origin or folders[0]} is another package of that name: pip uninstall -y clip, "
            "then pip install --force-reinstall --no-deps clip-anytorch"
        )
    return "pip install -r requirements.txt"


def _clip_run_late() -> ModuleType:
    """The package `clip`, whose own code runs when something of it is first asked for.

    That imports torchvision for transforms, which takes as long as torch; the modules `model` and
    `simple_tokenizer` do not. They are those of any other `import clip` in the same process.
    """
    spec = importlib.util.find_spec("clip")
    if spec is None or "clip" in sys.modules:
        return importlib.import_module("clip")
    package = importlib.util.module_from_spec(spec)

    def run(name: str):
        # Python and other libraries ask any module for these.
        if name.startswith("__"):
            raise AttributeError(name)
        del package.__getattr__
        with _clip_import():
            spec.loader.exec_module(package)
        return getattr(package, name)

    package.__getattr__ = run
    sys.modules["clip"] = package
    return package


@contextlib.contextmanager
def _clip_import() -> Iterator[None]:
    """Around an import of `clip`: one that fails ends with a line that mends it."""
    try:
        with warnings.catch_warnings():
            # clip imports pkg_resources, which warns of its age.
            warnings.simplefilter("ignore")
            yield
    # Another package may be written for another Python.
    except (ImportError, SyntaxError, AttributeError) as error:
        stop(f"OpenAI's CLIP can't be imported ({reason(error)}): {_how_to_mend_clip(error)}")


with _clip_import():
    clip = _clip_run_late()
    from clip.model import (
        CLIP,
        ModifiedResNet,
        QuickGELU,
        ResidualAttentionBlock,
        VisionTransformer,
    )
    from clip.simple_tokenizer import SimpleTokenizer

# -----------------------------------------------------------------------------
# architectures


class Settings(NamedTuple):
    """What a CLIP computes with, and what neither its weights nor their shapes say."""

    activation: str  # of the blocks, one of ACTIVATIONS; a ResNet's image tower has none
    image_head_width: int  # of a ViT's attention, or of a ResNet's attention pool
    text_head_width: int
    mean: tuple[float, float, float]  # of red, green and blue in [0, 1], for the normalisation
    std: tuple[float, float, float]


ACTIVATIONS = dict(zip(ACTIVATION_NAMES, (QuickGELU, torch.nn.GELU)))
OPENAI = Settings("quickgelu", 64, 64, CLIP_MEAN, CLIP_STD)  # of all of OpenAI's weights


# Of the loss, and of neither tower; a bias only train.py --loss sigmoid has.
LOSS_PARAMETERS = ("logit_scale", "logit_bias")

CONTEXT_LENGTH = 77  # tokens of a text, with its start and end
VOCABULARY = 49408

START = 49406  # the token before a text
END = 49407  # the one after it, where CLIP reads the feature of the text

# The token that stands for CONTEXT_MARK: byte 0, which the tokenizer's cleaned text never has.
PLACEHOLDER = 188


def build(name: str, activation: str = OPENAI.activation) -> CLIP:
    """A CLIP of one of SHAPES with random weights, in eval mode."""
    model = build_shape(SHAPES[name], settings=OPENAI._replace(activation=activation))
    model.origin = f"random ({name})"
    return model


def build_shape(
    shape: Shape,
    context_length: int = CONTEXT_LENGTH,
    vocabulary: int = VOCABULARY,
    settings: Settings = OPENAI,
) -> CLIP:
    """A CLIP of any shape with random weights, in eval mode.

    Raises ValueError if a tower is no multiple of its head width.
    """
    image_layers = shape.image_layers
    has_other_heads = settings.image_head_width != OPENAI.image_head_width
    if shape.patch and has_other_heads:
        image_layers = 0  # the tower is exchanged below: heads of 64 may not fit its width
    model = CLIP(
        embed_dim=shape.embedding,
        image_resolution=shape.resolution,
        vision_layers=image_layers,
        vision_width=shape.image_width,
        vision_patch_size=shape.patch,
        context_length=context_length,
        vocab_size=vocabulary,
        transformer_width=shape.text_width,
        transformer_heads=shape.text_heads,
        transformer_layers=shape.text_layers,
    )
    # OpenAI's class always builds OpenAI's settings: the rest is changed afterwards.
    if has_other_heads:
        _set_image_heads(model, shape, settings.image_head_width)
    _set_hidden_width(model.transformer, shape.text_hidden)
    if shape.patch:
        _set_hidden_width(model.visual.transformer, shape.image_hidden)
    _set_activation(model, settings.activation)
    attach_settings(model, settings, "random weights")
    return model.eval()


def attach_settings(model: CLIP, settings: Settings, origin: str) -> None:
    """Write on the model what it was built with, and where its weights come from (one line)."""
    model.activation = settings.activation
    model.head_width = (settings.image_head_width, settings.text_head_width)
    model.mean = settings.mean
    model.std = settings.std
    model.origin = origin


def settings_of(model: CLIP) -> Settings:
    """What the model was built with. A model of the stock package has OpenAI's settings."""
    if not hasattr(model, "activation"):
        return OPENAI
    return Settings(model.activation, *model.head_width, model.mean, model.std)


def _set_image_heads(model: CLIP, shape: Shape, head_width: int) -> None:
    """Give the image tower heads of this width. OpenAI's class gives it heads of 64."""
    # A ResNet is pooled by attention over channels that are 32 times its width.
    width = shape.image_width if shape.patch else 32 * shape.image_width
    if width % head_width:
        raise ValueError(f"an image tower of width {width} has no heads of {head_width}")
    n_heads = width // head_width
    if shape.patch:
        model.visual = VisionTransformer(
            input_resolution=shape.resolution,
            patch_size=shape.patch,
            width=shape.image_width,
            layers=shape.image_layers,
            heads=n_heads,
            output_dim=shape.embedding,
        )
    else:
        model.visual.attnpool.num_heads = n_heads


def _set_hidden_width(transformer: torch.nn.Module, hidden: int | None) -> None:
    """Give the MLPs of a tower this width, where it is not four times that of the tower."""
    width = transformer.width
    if hidden in (None, 4 * width):
        return
    for block in transformer.resblocks:
        block.mlp.c_fc = torch.nn.Linear(width, hidden)
        block.mlp.c_proj = torch.nn.Linear(hidden, width)


def _set_activation(model: CLIP, activation: str) -> None:
    """Exchange the activation of all blocks. OpenAI's class has QuickGELU."""
    for module in model.modules():
        if isinstance(module, ResidualAttentionBlock):
            module.mlp.gelu = ACTIVATIONS[activation]()


def to_device(model: CLIP, device: torch.device | str) -> CLIP:
    """The model on a device, laid out as that device computes fastest."""
    model = model.to(device)
    # They are no buffers of clip's class, and a GPU would wait for a copy at each use of a block.
    for block in model.transformer.resblocks:
        block.attn_mask = block.attn_mask.to(device)
    # Tensor cores multiply the channels of a pixel, so these lie next to each other.
    if is_resnet(model) and torch.device(device).type == "cuda":
        model.visual.to(memory_format=torch.channels_last)
    return model


# -----------------------------------------------------------------------------
# parts of a model


def is_resnet(model: CLIP) -> bool:
    """Whether the image tower is a ResNet; otherwise it is a ViT."""
    return isinstance(model.visual, ModifiedResNet)


def towers(model: CLIP) -> dict[str, list[torch.nn.Parameter]]:
    """The parameters of the `image` tower, the `text` tower, and the logit `scale` of neither.

    With the scale goes the bias of train.py's sigmoid loss, where the model has one.
    """
    parameters = {"image": [], "text": [], "scale": []}
    for name, parameter in model.named_parameters():
        if name in LOSS_PARAMETERS:
            parameters["scale"].append(parameter)
        elif name.startswith("visual."):
            parameters["image"].append(parameter)
        else:
            parameters["text"].append(parameter)
    return parameters


def image_blocks(model: CLIP) -> torch.nn.Sequential:
    """The residual blocks of the image tower in order; those of a ResNet are its bottlenecks."""
    visual = model.visual
    if not is_resnet(model):
        return visual.transformer.resblocks
    return torch.nn.Sequential(*visual.layer1, *visual.layer2, *visual.layer3, *visual.layer4)


def last_blocks(model: CLIP, blocks: int) -> list[torch.nn.Module | torch.nn.Parameter]:
    """The last blocks of both towers and their projections.

    Raises UserError if a tower has fewer than `blocks`.
    """
    image_layers = image_blocks(model)
    text_layers = model.transformer.resblocks
    for name, layers in (("image", image_layers), ("text", text_layers)):
        if not 1 <= blocks <= len(layers):
            raise UserError(f"--blocks {blocks}: the {name} tower has {len(layers)}")

    # A ResNet projects within its attention pooling.
    image_top = model.visual.attnpool if is_resnet(model) else model.visual.proj
    return [
        image_layers[-blocks:],
        image_top,
        text_layers[-blocks:],
        model.text_projection,
    ]


def image_projection(model: CLIP) -> torch.nn.Parameter:
    """The matrix that makes features of length D: of a ViT (width, D), of a ResNet (D, channels).

    That of a ResNet ends its attention pool, and has a bias beside it.
    """
    visual = model.visual
    return visual.attnpool.c_proj.weight if is_resnet(model) else visual.proj


def norms(model: CLIP) -> list[torch.nn.Module]:
    """All LayerNorms of both towers, and the BatchNorms of a ResNet."""
    kinds = (torch.nn.LayerNorm, torch.nn.BatchNorm2d)
    return [module for module in model.modules() if isinstance(module, kinds)]


def layers_above(model: CLIP) -> dict[str, int]:
    """How many layers of its tower lie above each parameter, by the parameter's name.

    A tower of L blocks has L + 2 layers: the stem or the embeddings (L + 1 above), the blocks (L to
    1), and the top (0): the last norm and the projection, of a ResNet the attention pool. The norm
    before a ViT's blocks belongs to its stem. Parameters of neither tower have none above them.
    """
    if is_resnet(model):
        image_top = list(model.visual.attnpool.parameters())
    else:
        image_top = [*model.visual.ln_post.parameters(), model.visual.proj]
    text_top = [*model.ln_final.parameters(), model.text_projection]
    above = dict.fromkeys(model.parameters(), 0)
    parts = [
        ("image", image_blocks(model), image_top),
        ("text", model.transformer.resblocks, text_top),
    ]
    for tower, blocks, top in parts:
        n = len(blocks)
        # What is neither in a block nor in the top is the stem.
        above |= dict.fromkeys(towers(model)[tower], n + 1)
        for i, block in enumerate(blocks):
            above |= dict.fromkeys(block.parameters(), n - i)
        above |= dict.fromkeys(top, 0)
    return {name: above[parameter] for name, parameter in model.named_parameters()}


# -----------------------------------------------------------------------------
# tokens and features


def encode(text: str) -> list[int]:
    """All token ids of a text, with START and END, however many they are.

    If the text begins with CONTEXT_MARK, each mark in it becomes a PLACEHOLDER after START.
    """
    n_marks = 0
    if text.startswith(CONTEXT_MARK):
        # The marks are taken out before the text is tokenized: they are no words.
        n_marks = text.count(CONTEXT_MARK)
        text = text.replace(CONTEXT_MARK, "")
    words = _tokenizer().encode(text)
    return [START, *[PLACEHOLDER] * n_marks, *words, END]


@functools.cache
def _tokenizer() -> SimpleTokenizer:
    """The one tokenizer, which is read from its file when it is first needed."""
    return SimpleTokenizer()


def stack(sequences: Sequence[list[int]], context_length: int = CONTEXT_LENGTH) -> torch.Tensor:
    """P sequences of token ids as one tensor (P, L), L the length of the longest, zeros at the end.

    CLIP's text tower is causal, so it gives the same features without padding up to
    `context_length`. A sequence that is longer is cut off there and ends with END, as clip.tokenize
    does it.
    """
    longest = min(context_length, max(len(sequence) for sequence in sequences))
    tokens = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, sequence in zip(tokens, sequences):
        row[: len(sequence)] = torch.tensor(sequence[:longest])
        if len(sequence) > context_length:
            row[-1] = END
    return tokens


def tokenize(texts: Sequence[str], context_length: int = CONTEXT_LENGTH) -> torch.Tensor:
    """Token ids of P texts, (P, L); see `encode` and `stack`. Texts that are too long are cut."""
    return stack([encode(text) for text in texts], context_length)


def encode_images(model: CLIP, images: torch.Tensor) -> torch.Tensor:
    """(B, 3, R, R) normalised images -> (B, D) fp32 features of length 1."""
    with autocast(images.device):
        features = model.encode_image(images)
    return F.normalize(features.float(), dim=-1)


def encode_texts(model: CLIP, tokens: torch.Tensor) -> torch.Tensor:
    """(P, L) token ids -> (P, D) fp32 features of length 1."""
    # model.encode_text, but for its index of the texts, which is on the CPU: a GPU waits for it.
    texts = torch.arange(len(tokens), device=tokens.device)
    ends = tokens.argmax(dim=1)  # the end token has the highest id
    with autocast(tokens.device):
        x = model.transformer(_embed(model, tokens))  # (L, P, width)
        x = model.ln_final(x.transpose(0, 1))
        features = x[texts, ends] @ model.text_projection
    return F.normalize(features.float(), dim=-1)


@torch.inference_mode()
def image_features(model: CLIP, pixels: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Features of the images at `index`, (n, D) fp32 on the CPU, with a progress bar.

    pixels: (N, 3, R, R) uint8; index: (n,) int64.
    """
    device = model.logit_scale.device
    settings = settings_of(model)
    features = []
    for part in progress_chunks(index, "encoding images"):
        # (256, 3, R, R), normalised as the model was trained.
        images = get_batch(pixels, part, device, mean=settings.mean, std=settings.std)
        features.append(encode_images(model, images).cpu())
    return torch.cat(features)


@torch.inference_mode()
def text_features(model: CLIP, texts: Sequence[str]) -> torch.Tensor:
    """Features of P texts, (P, D) fp32 on the CPU, with a progress bar.

    Texts that are longer than the model's context are cut.
    """
    device = model.logit_scale.device
    tokens_of_all = tokenize(texts, model.context_length)  # (P, L)
    features = []
    for tokens in progress_chunks(tokens_of_all, "encoding texts", size=512):
        features.append(encode_texts(model, tokens.to(device)).cpu())
    return torch.cat(features)


def progress_chunks(items: torch.Tensor, title: str, size: int = 256) -> Iterator[torch.Tensor]:
    """The rows of a tensor, `size` at a time, with a progress bar."""
    with tqdm(total=len(items), desc=title, leave=False) as bar:
        for part in items.split(size):
            yield part
            bar.update(len(part))


# -----------------------------------------------------------------------------
# towers cut in two: a frozen trunk, which can be computed once, and the rest, which is trained


def split_image_tower(model: CLIP, cut: Cut) -> tuple[Callable, Callable]:
    """The image tower as two functions, trunk and rest.

    rest(trunk(images)) are the features (B, D) fp32 of length 1 of images (B, 3, R, R).

    cut: how many of the last blocks are the rest, with the projection; PROJECTION if it is the
        projection alone. With 0 the trunk does everything and the rest nothing, with None the
        other way round.

    The trunk has no graph. Its result is (B, tokens, width), or (B, channels, side, side) of a
    ResNet; what enters the projection, (B, width) or (B, channels), if the cut is there; the
    features if it is 0.
    """
    if cut is None:
        return _identity, lambda images: encode_images(model, images)
    if cut == 0:
        return torch.no_grad()(lambda images: encode_images(model, images)), _identity

    if cut == PROJECTION:
        split = _split_resnet_at_projection if is_resnet(model) else _split_vit_at_projection
        frozen_half, trained_half = split(model.visual, image_blocks(model))
    else:
        layers = image_blocks(model)
        split = _split_resnet if is_resnet(model) else _split_vit
        frozen_half, trained_half = split(model.visual, layers[:-cut], layers[-cut:])

    @torch.no_grad()
    def trunk(images):
        with autocast(images.device):
            return frozen_half(images)

    def rest(x):
        with autocast(x.device):
            features = trained_half(x)
        return F.normalize(features.float(), dim=-1)

    return trunk, rest


def _split_resnet(
    visual: ModifiedResNet, frozen: torch.nn.Sequential, trained: torch.nn.Sequential
) -> tuple[Callable, Callable]:
    """ModifiedResNet.forward in two halves, cut between the bottlenecks `frozen` and `trained`."""

    def frozen_half(images):
        x = visual.relu1(visual.bn1(visual.conv1(images)))  # (B, width / 2, R / 2, R / 2)
        x = visual.relu2(visual.bn2(visual.conv2(x)))
        x = visual.relu3(visual.bn3(visual.conv3(x)))  # (B, width, R / 2, R / 2)
        return frozen(visual.avgpool(x))  # (B, channels, side, side)

    def trained_half(x):
        return visual.attnpool(trained(x))  # (B, D)

    return frozen_half, trained_half


def _split_resnet_at_projection(
    visual: ModifiedResNet, bottlenecks: torch.nn.Sequential
) -> tuple[Callable, Callable]:
    """ModifiedResNet.forward in two halves, cut within the attention pool before its c_proj."""
    pool = visual.attnpool
    bottlenecks_of, _ = _split_resnet(visual, bottlenecks, torch.nn.Sequential())

    def heads(x):
        parts = x.unflatten(-1, (pool.num_heads, -1))  # (B, tokens, heads, C / heads)
        return parts.transpose(1, 2)  # (B, heads, tokens, C / heads)

    def frozen_half(images):
        cells = bottlenecks_of(images).flatten(2).transpose(1, 2)  # (B, side * side, C)
        # Their mean is the query; keys and values are the mean and the cells.
        tokens = torch.cat([cells.mean(dim=1, keepdim=True), cells], 1)
        tokens = tokens + pool.positional_embedding.to(tokens.dtype)
        query, key, value = pool.q_proj(tokens[:, :1]), pool.k_proj(tokens), pool.v_proj(tokens)
        pooled = F.scaled_dot_product_attention(heads(query), heads(key), heads(value))
        return pooled.flatten(1)  # (B, C)

    return frozen_half, pool.c_proj


def _split_vit(
    visual: VisionTransformer, frozen: torch.nn.Sequential, trained: torch.nn.Sequential
) -> tuple[Callable, Callable]:
    """VisionTransformer.forward in two halves, cut between the blocks `frozen` and `trained`."""

    def frozen_half(images):
        patches = visual.conv1(images).flatten(2).transpose(1, 2)  # (B, patches, width)
        class_token = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        tokens = torch.cat([class_token, patches], 1)  # (B, tokens, width)
        tokens = tokens + visual.positional_embedding.to(tokens.dtype)
        tokens = visual.ln_pre(tokens).transpose(0, 1)  # CLIP's blocks take (tokens, B, width)
        return frozen(tokens).transpose(0, 1)

    def trained_half(tokens):
        tokens = trained(tokens.transpose(0, 1))  # (tokens, B, width)
        return visual.ln_post(tokens[0]) @ visual.proj  # (B, D), of the class token

    return frozen_half, trained_half


def _split_vit_at_projection(
    visual: VisionTransformer, blocks: torch.nn.Sequential
) -> tuple[Callable, Callable]:
    """VisionTransformer.forward in two halves, cut before the projection."""
    tokens_of, _ = _split_vit(visual, blocks, torch.nn.Sequential())

    def frozen_half(images):
        return visual.ln_post(tokens_of(images)[:, 0])  # (B, width), of the class token

    return frozen_half, lambda x: x @ visual.proj


def split_text_tower(model: CLIP, blocks: int | None) -> tuple[Callable, Callable]:
    """The text tower as two functions, trunk and rest.

    rest(trunk(tokens), ends) are the features (P, D) fp32 of length 1 of token ids (P, L).
    ends: (P,) int64, the position of the end token in each row. `blocks` is as in
    split_image_tower; the result of the trunk is (P, L, width).
    """
    if blocks is None:
        return _identity, lambda tokens, ends: encode_texts(model, tokens)
    if blocks == 0:
        return torch.no_grad()(lambda tokens: encode_texts(model, tokens)), lambda x, ends: x

    layers = model.transformer.resblocks
    frozen_layers, trained_layers = layers[:-blocks], layers[-blocks:]

    @torch.no_grad()
    def trunk(tokens):
        with autocast(tokens.device):
            return frozen_layers(_embed(model, tokens)).transpose(0, 1)

    def rest(x, ends):
        with autocast(x.device):
            x = model.ln_final(trained_layers(x.transpose(0, 1)))  # (L, P, width)
            texts = torch.arange(len(ends), device=x.device)
            features = x[ends, texts] @ model.text_projection  # (P, D), of the end tokens
        return F.normalize(features.float(), dim=-1)

    return trunk, rest


def _embed(model: CLIP, tokens: torch.Tensor) -> torch.Tensor:
    """Token ids (P, L) -> what enters the first block of the text tower, (L, P, width)."""
    positions = model.positional_embedding[: tokens.shape[1]]  # (L, width)
    return (model.token_embedding(tokens) + positions).transpose(0, 1)


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


# -----------------------------------------------------------------------------
# cost


def count_flops(work: Callable) -> int:
    """Floating-point operations of work(), a multiply-add counted as two.

    On the meta device nothing is computed to count them.
    """
    # The counter does not know the fused attention of a CPU: the plain one is used instead.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()
