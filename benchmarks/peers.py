"""The peers: the plain recipe with OpenAI's package, open_clip, and transformers, each used as its
own documentation shows.

Models have random weights, and the shape of a ViT of flowers.models.SHAPES.
"""

import warnings

import torch
from PIL import Image
from torch.utils.data import Dataset

from flowers.models import CONTEXT_LENGTH, SHAPES, VOCABULARY

# clip imports pkg_resources, which warns that it is old
warnings.simplefilter("ignore")
from clip.clip import _transform  # noqa: E402
from clip.simple_tokenizer import SimpleTokenizer  # noqa: E402

# -----------------------------------------------------------------------------
# images


class Pictures(Dataset):
    """Files and labels for a DataLoader; each picture is opened with PIL and transformed."""

    def __init__(self, files, labels, transform):
        self.files = files
        self.labels = labels
        self.transform = transform

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        with Image.open(self.files[i]) as image:
            return self.transform(image), int(self.labels[i])


def clip_transform(resolution: int):
    """What clip.load returns as `preprocess`."""
    return _transform(resolution)


def open_clip_transform(resolution: int):
    """open_clip's transform for evaluation."""
    import open_clip

    return open_clip.image_transform(resolution, is_train=False)


def transformers_processor(resolution: int):
    """CLIPImageProcessor of transformers at another resolution than 224."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(
        size={"shortest_edge": resolution}, crop_size={"height": resolution, "width": resolution}
    )


def transformers_transform(resolution: int):
    """The same for one image, as a transform of a Dataset."""
    processor = transformers_processor(resolution)

    def transform(image):
        return processor(image, return_tensors="pt")["pixel_values"][0]  # (3, R, R)

    return transform


# -----------------------------------------------------------------------------
# models


def open_clip_model(architecture: str) -> torch.nn.Module:
    """open_clip's CLIP in the shape of the architecture."""
    import open_clip

    embed, resolution, layers, width, patch, text_width, heads, text_layers = SHAPES[architecture][
        :8
    ]
    vision = {"image_size": resolution, "layers": layers, "width": width, "patch_size": patch}
    text = {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": VOCABULARY,
        "width": text_width,
        "heads": heads,
        "layers": text_layers,
    }
    # OpenAI's models use QuickGELU
    return open_clip.model.CLIP(embed, vision, text, quick_gelu=True)


def transformers_model(architecture: str) -> torch.nn.Module:
    """The CLIPModel of transformers in the shape of the architecture."""
    from transformers import CLIPConfig, CLIPModel

    embed, resolution, layers, width, patch, text_width, heads, text_layers = SHAPES[architecture][
        :8
    ]
    text = {
        "hidden_size": text_width,
        "intermediate_size": 4 * text_width,
        "num_hidden_layers": text_layers,
        "num_attention_heads": heads,
        "projection_dim": embed,
        "hidden_act": "quick_gelu",
        # the last two pieces of CLIP's vocabulary
        "bos_token_id": VOCABULARY - 2,
        "eos_token_id": VOCABULARY - 1,
    }
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,  # all of CLIP's ViTs have heads 64 wide
        "projection_dim": embed,
        "hidden_act": "quick_gelu",
        "image_size": resolution,
        "patch_size": patch,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=embed))


def transformers_tokenizer():
    """The CLIPTokenizer of transformers, made of the word pieces that OpenAI's package brings."""
    from transformers import CLIPTokenizer

    # its own files would have to be downloaded
    pieces = SimpleTokenizer()
    vocabulary = dict(pieces.encoder)
    merges = list(pieces.bpe_ranks)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT_LENGTH)
