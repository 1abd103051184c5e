"""The architectures: the nine of CLIP and two small ones; their tokens, features, and where their towers can be cut."""

import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from flowers import UserError
from flowers.devices import autocast
from flowers.pixels import get_batch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # clip imports pkg_resources, which says that it is old
    import clip
    from clip.model import CLIP, ModifiedResNet

# embedding, resolution, image layers, image width, patch, text width, text heads, text layers (the released weights' shapes)
SHAPES = {
    "RN50": (1024, 224, (3, 4, 6, 3), 64, None, 512, 8, 12),
    "RN101": (512, 224, (3, 4, 23, 3), 64, None, 512, 8, 12),
    "RN50x4": (640, 288, (4, 6, 10, 6), 80, None, 640, 10, 12),
    "RN50x16": (768, 384, (6, 8, 18, 8), 96, None, 768, 12, 12),
    "RN50x64": (1024, 448, (3, 15, 36, 10), 128, None, 1024, 16, 12),
    "ViT-B/32": (512, 224, 12, 768, 32, 512, 8, 12),
    "ViT-B/16": (512, 224, 12, 768, 16, 512, 8, 12),
    "ViT-L/14": (768, 224, 24, 1024, 14, 768, 12, 12),
    "ViT-L/14@336px": (768, 336, 24, 1024, 14, 768, 12, 12),
    "tiny": (128, 64, 4, 128, 8, 128, 2, 2),
    "tiny-rn": (128, 64, (1, 1, 1, 1), 16, None, 128, 2, 2),
}
RANDOM = ("tiny", "tiny-rn")  # these start from random weights; all others from OpenAI's
CONTEXT, VOCABULARY = 77, 49408
CONTEXT_MARK, PLACEHOLDER = (
    "[V] ",
    188,
)  # a learned context vector in a prompt, and its token: byte 0, which cleaned text never has


def build(name: str) -> CLIP:
    """A CLIP of one of SHAPES with random weights, in eval mode."""
    embed, resolution, layers, width, patch, text_width, heads, text_layers = SHAPES[name]
    return CLIP(
        embed, resolution, layers, width, patch, CONTEXT, VOCABULARY, text_width, heads, text_layers
    ).eval()


def towers(model: CLIP) -> dict[str, list[torch.nn.Parameter]]:
    """The parameters by tower; the logit scale belongs to neither."""
    named = dict(model.named_parameters())
    scale = named.pop("logit_scale")
    return {
        "image": [p for n, p in named.items() if n.startswith("visual.")],
        "text": [p for n, p in named.items() if not n.startswith("visual.")],
        "scale": [scale],
    }


def tokenize(texts: Sequence[str]) -> torch.Tensor:
    """Token ids (P, L), L that of the longest text: CLIP's causal text tower gives the same features without the padding up to 77.

    Each CONTEXT_MARK at the beginning of a text becomes a PLACEHOLDER.
    """
    marks = [
        (len(text) - len(text.replace(CONTEXT_MARK, ""))) // len(CONTEXT_MARK)
        if text.startswith(CONTEXT_MARK)
        else 0
        for text in texts
    ]
    tokens = clip.tokenize(
        [text.replace(CONTEXT_MARK, "") if m else text for text, m in zip(texts, marks)],
        truncate=True,
    )
    for row, m in zip(tokens, marks):
        if m:
            row[1 + m :] = row[1 : CONTEXT - m].clone()
            row[1 : 1 + m] = PLACEHOLDER
            if row[-1]:
                row[-1] = VOCABULARY - 1  # the end token, where the text was too long
    return tokens[:, : int(tokens.argmax(1).max()) + 1]


def encode_images(model: CLIP, images: torch.Tensor) -> torch.Tensor:
    """(B, 3, R, R) -> (B, D) fp32 features of length 1."""
    with autocast(images.device):
        features = model.encode_image(images)
    return F.normalize(features.float(), dim=-1)


def encode_texts(model: CLIP, tokens: torch.Tensor) -> torch.Tensor:
    """(P, L) -> (P, D) fp32 features of length 1."""
    with autocast(tokens.device):
        features = model.encode_text(tokens)
    return F.normalize(features.float(), dim=-1)


def last_blocks(model: CLIP, blocks: int) -> list[torch.nn.Module | torch.nn.Parameter]:
    """The last blocks of both towers and their projections. Raises UserError if a tower has fewer."""
    for name, found in (("image", image_blocks(model)), ("text", model.transformer.resblocks)):
        if not 1 <= blocks <= len(found):
            raise UserError(f"--blocks {blocks}: the {name} tower has {len(found)}")
    projection = (
        model.visual.attnpool if isinstance(model.visual, ModifiedResNet) else model.visual.proj
    )
    return [
        image_blocks(model)[-blocks:],
        projection,
        model.transformer.resblocks[-blocks:],
        model.text_projection,
    ]


def image_blocks(model: CLIP) -> torch.nn.Sequential:
    """The residual blocks of the image tower in order; of a ResNet, its bottlenecks."""
    v = model.visual
    return (
        torch.nn.Sequential(*v.layer1, *v.layer2, *v.layer3, *v.layer4)
        if isinstance(v, ModifiedResNet)
        else v.transformer.resblocks
    )


def split_image_tower(model: CLIP, blocks: int | None) -> tuple[Callable, Callable]:
    """The image tower as two functions, trunk and rest: rest(trunk(images (B, 3, R, R))) are the features (B, D) of length 1.

    `rest` is the last `blocks` blocks and the projection; with 0 the trunk does everything, with None the rest does. The trunk is frozen:
    it has no graph. What is between them is (B, tokens, width), or (B, channels, side, side) in a ResNet.
    """
    if blocks is None:
        return lambda x: x, lambda images: encode_images(model, images)
    if blocks == 0:
        return torch.no_grad()(lambda images: encode_images(model, images)), lambda x: x
    v, layers = model.visual, image_blocks(model)

    @torch.no_grad()
    def trunk(x):
        with autocast(x.device):
            if isinstance(v, ModifiedResNet):
                for i in (1, 2, 3):
                    x = getattr(v, f"relu{i}")(getattr(v, f"bn{i}")(getattr(v, f"conv{i}")(x)))
                return layers[:-blocks](v.avgpool(x))
            x = v.conv1(x).flatten(2).transpose(1, 2)  # (B, patches, width)
            x = torch.cat(
                [v.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1
            ) + v.positional_embedding.to(x.dtype)
            return layers[:-blocks](v.ln_pre(x).transpose(0, 1)).transpose(
                0, 1
            )  # CLIP's blocks take (tokens, B, width)

    def rest(x):
        with autocast(x.device):
            x = (
                v.attnpool(layers[-blocks:](x))
                if isinstance(v, ModifiedResNet)
                else v.ln_post(layers[-blocks:](x.transpose(0, 1))[0]) @ v.proj
            )
        return F.normalize(x.float(), dim=-1)

    return trunk, rest


def split_text_tower(model: CLIP, blocks: int | None) -> tuple[Callable, Callable]:
    """The text tower as two functions: rest(trunk(tokens (P, L)), ends (P,)) are the features (P, D); ends are the end tokens' places."""
    if blocks is None:
        return lambda x: x, lambda tokens, ends: encode_texts(model, tokens)
    if blocks == 0:
        return torch.no_grad()(lambda tokens: encode_texts(model, tokens)), lambda x, ends: x
    layers = model.transformer.resblocks

    @torch.no_grad()
    def trunk(tokens):
        with autocast(tokens.device):
            x = model.token_embedding(tokens) + model.positional_embedding[: tokens.shape[1]]
            return layers[:-blocks](x.transpose(0, 1)).transpose(0, 1)

    def rest(x, ends):
        with autocast(x.device):
            x = (
                model.ln_final(layers[-blocks:](x.transpose(0, 1)))[
                    ends, torch.arange(len(ends), device=x.device)
                ]
                @ model.text_projection
            )
        return F.normalize(x.float(), dim=-1)

    return trunk, rest


def count_flops(work: Callable) -> int:
    """Floating-point operations of work(), a multiply-add as two; on the meta device nothing is computed to count them."""
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):  # it does not know a CPU's own attention
        work()
    return counter.get_total_flops()


def progress_chunks(items: torch.Tensor, title: str, size: int = 256) -> Iterator[torch.Tensor]:
    """The rows of a tensor, `size` at a time, with a progress bar."""
    with tqdm(total=len(items), desc=title, leave=False) as bar:
        for part in items.split(size):
            yield part
            bar.update(len(part))


@torch.inference_mode()
def image_features(model: CLIP, pixels: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Features (N, D) on the CPU of the images at `index` (N,), with a progress bar."""
    device = model.logit_scale.device
    return torch.cat(
        [
            encode_images(model, get_batch(pixels, part, device)).cpu()
            for part in progress_chunks(index, "encoding images")
        ]
    )


@torch.inference_mode()
def text_features(model: CLIP, texts: Sequence[str]) -> torch.Tensor:
    """Features (P, D) on the CPU of the sentences."""
    device = model.logit_scale.device
    return torch.cat(
        [
            encode_texts(model, part.to(device)).cpu()
            for part in progress_chunks(tokenize(texts), "encoding texts", 512)
        ]
    )
