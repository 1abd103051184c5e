"""What the flags of the scripts offer: architectures, strategies, and the prompt if none is given.

Without torch, so that --help and a mistake in a flag are answered at once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from flowers.files import user_file

# -----------------------------------------------------------------------------
# architectures


class Shape(NamedTuple):
    """What decides the architecture of a CLIP."""

    embedding: int  # D, the length of a feature
    resolution: int  # side of an image, in pixels
    image_layers: int | tuple[int, int, int, int]  # of a ResNet: bottlenecks of each stage
    image_width: int
    patch: int | None  # side of a ViT's patch, in pixels; a ResNet has none
    text_width: int
    text_heads: int
    text_layers: int
    # Width of the MLPs within the blocks, of a ViT and of the text tower. None: four times the
    # width of the tower, as in all of OpenAI's.
    image_hidden: int | None = None
    text_hidden: int | None = None


# The first nine are the shapes of OpenAI's released weights.
SHAPES = {
    "RN50": Shape(1024, 224, (3, 4, 6, 3), 64, None, 512, 8, 12),
    "RN101": Shape(512, 224, (3, 4, 23, 3), 64, None, 512, 8, 12),
    "RN50x4": Shape(640, 288, (4, 6, 10, 6), 80, None, 640, 10, 12),
    "RN50x16": Shape(768, 384, (6, 8, 18, 8), 96, None, 768, 12, 12),
    "RN50x64": Shape(1024, 448, (3, 15, 36, 10), 128, None, 1024, 16, 12),
    "ViT-B/32": Shape(512, 224, 12, 768, 32, 512, 8, 12),
    "ViT-B/16": Shape(512, 224, 12, 768, 16, 512, 8, 12),
    "ViT-L/14": Shape(768, 224, 24, 1024, 14, 768, 12, 12),
    "ViT-L/14@336px": Shape(768, 336, 24, 1024, 14, 768, 12, 12),
    "tiny": Shape(128, 64, 4, 128, 8, 128, 2, 2),
    "tiny-16": Shape(128, 64, 4, 128, 16, 128, 2, 2),
    "tiny-rn": Shape(128, 64, (1, 1, 1, 1), 16, None, 128, 2, 2),
}
RANDOM = ("tiny", "tiny-16", "tiny-rn")  # these start from random weights
PRETRAINED = tuple(name for name in SHAPES if name not in RANDOM)  # and these from OpenAI's
ACTIVATION_NAMES = ("quickgelu", "gelu")  # of the blocks


def add_activation_argument(parser: argparse.ArgumentParser) -> None:
    """Add --activation, for files of weights that do not say what they were trained with."""
    parser.add_argument(
        "--activation",
        choices=ACTIVATION_NAMES,
        help="activation of the model in a file that does not say it: quickgelu for OpenAI's, gelu "
        "for most of LAION's and DataComp's (default: what the weights say, else quickgelu with a "
        "note)",
    )


# What CLIP's weights were trained on, by the beginning of open_clip's tags.
FAMILIES = ("laion2b", "laion400m", "datacomp", "commonpool", "dfn", "metaclip")
# open_clip's names of OpenAI's shapes.
OPEN_CLIP_NAMES = {name.replace("/", "-"): name for name in SHAPES if name not in RANDOM}
OPEN_CLIP_NAMES["ViT-L-14-336"] = OPEN_CLIP_NAMES.pop("ViT-L-14@336px")


def split_architecture(name: str) -> tuple[str, str]:
    """Architecture and pretraining of a value of --architecture that is a name.

    open_clip's models have OpenAI's names where they have their shapes, so that one architecture
    has one name: open_clip:ViT-B-32/laion2b_s34b_b79k is ViT-B/32 and laion2b. Of paths the
    pretraining is not known, and is "".
    """
    architecture, tag = split_tag(name)
    return architecture, pretraining_family(tag)


def pretraining_family(tag: str) -> str:
    """The family of a tag of open_clip; other pretrainings are their own."""
    return next((family for family in FAMILIES if tag.startswith(family)), tag)


def split_tag(name: str) -> tuple[str, str]:
    """As `split_architecture`, with open_clip's tag itself."""
    if name in SHAPES and name not in RANDOM:
        return name, "openai"
    if name.startswith("hf:"):
        return name, name.removeprefix("hf:")
    model, slash, tag = name.removeprefix("open_clip:").partition("/")
    is_file = "/" in tag or Path(tag).suffix in (".pt", ".pth", ".bin", ".safetensors")
    is_name = model.startswith(("ViT-", "RN")) and slash and not is_file
    if not name.startswith("open_clip:") or not is_name:
        return name, ""
    model = model.removesuffix("-quickgelu")
    return OPEN_CLIP_NAMES.get(model, f"open_clip:{model}"), tag


# -----------------------------------------------------------------------------
# strategies

STRATEGIES = (
    "full",
    "image",
    "text",
    "last_blocks",
    "projection",
    "norm",
    "linear",
    "lora",
    "prompt",
)

# These learn something beside the model, and leave its weights as they were.
KEEPS_WEIGHTS = ("linear", "prompt")
# These add what they train to weights that stay: there is no start to which --pull could pull.
ADDS_WEIGHTS = ("lora", "prompt")
# These train one layer alone, which has none above it to be slower than.
ONE_LAYER = ("projection", "linear", "prompt")
# With --shots, as in CoOp and CLIP-LoRA: who has few images to train on has few to choose on.
MAX_VAL_SHOTS = 4

# Peak learning rates for pretrained models: common values of the literature, for prompt that of
# CoOp (Zhou et al. 2022), for projection that of ProLIP (Fahes et al. 2024), for norm that of Tent
# (Wang et al. 2021), which trains the scales and shifts of norms too. They were not tuned here.
LEARNING_RATES = {
    "full": 1e-5,
    "image": 1e-5,
    "text": 1e-5,
    "last_blocks": 3e-5,
    "projection": 1e-5,
    "norm": 1e-3,
    "lora": 2e-4,
    "prompt": 2e-3,
    "linear": 0.0,
}

# linear without val. C is the inverse of the L2 penalty in scikit-learn's LogisticRegression. The
# study chose 1000 on val for its small models, the highest that is tried (docs/study.md).
DEFAULT_C = 100.0
# The pull towards the text classifier: the middle of those tried on val, not tuned.
DEFAULT_PULL = 0.1

# A place where the image tower can be cut, beside a number of blocks: just before the projection.
PROJECTION = "projection"
Cut = int | Literal["projection"] | None


def cut_points(strategy: str, blocks: int) -> tuple[Cut, int | None]:
    """Where the frozen part of the image and of the text tower ends.

    A number of trained blocks, as split_image_tower and split_text_tower take it: 0 where the whole
    tower is frozen, None where no part of it is. PROJECTION where the image projection alone is
    trained.
    """
    cuts = {
        "full": (None, None),
        "image": (None, 0),
        "text": (0, None),
        "last_blocks": (blocks, blocks),
        "projection": (PROJECTION, 0),
        # The first norms stand before the first blocks.
        "norm": (None, None),
        "linear": (0, None),
        # Low-rank updates begin in the first block.
        "lora": (None, None),
        # The context enters at the first layer of the text tower.
        "prompt": (0, None),
    }
    return cuts[strategy]


# -----------------------------------------------------------------------------
# losses

LOSSES = ("info_nce", "cross_entropy", "sigmoid")

# -----------------------------------------------------------------------------
# few shots

# Training images a class -> epochs. At one number of epochs 16 images would have 25 times the steps
# of one. These are 300 steps each, as ProLIP takes (Fahes et al. 2024), for 102 classes in batches
# of 64, whose last one is left out: 1, 3, 6, 12 and 25 steps an epoch.
FEW_SHOT_EPOCHS = {1: 300, 2: 100, 4: 50, 8: 25, 16: 12}

# -----------------------------------------------------------------------------
# prompts

# The default, of this project; CLIP's own is "a photo of a {}, a type of flower."
TEMPLATE = "an image of the {} flower"
# A learned context vector as it is written at the beginning of a prompt.
CONTEXT_MARK = "[V] "


def context_template(context_tokens: int) -> str:
    """The template of `prompt`, in CoOp's notation: `[V] [V] ... {} flower`.

    tokenize turns each mark into a placeholder, over which the learned vector is written.
    """
    return CONTEXT_MARK * context_tokens + "{} flower"


def templates_in_words(templates: Sequence[str]) -> str:
    """Templates in quotes; of more than two, the first, and how many more there are."""
    if len(templates) > 2:
        return f"'{templates[0]}' and {len(templates) - 1} more"
    return " and ".join(f"'{template}'" for template in templates)


# -----------------------------------------------------------------------------
# figures

MASKS = ("none", "centre", "grabcut")  # which pixels' colours count: flowers/colour.py


def add_figure_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --output, --pdf and --show."""
    group = parser.add_argument_group("figures")
    group.add_argument(
        "--output",
        type=user_file,
        default=Path("figures"),
        help="folder of the figures (default: %(default)s)",
    )
    group.add_argument("--pdf", action="store_true", help="save each also as PDF")
    group.add_argument(
        "--show",
        action="store_true",
        help="open them in the system's picture viewer (default: no window)",
    )
