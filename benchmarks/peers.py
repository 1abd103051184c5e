"""The other ways to do it: the plain recipe with OpenAI's package, open_clip, and transformers, each as its own documentation has it.

Models have random weights and the shape of one of flowers.models.SHAPES with a ViT.
"""

import warnings

import torch
from PIL import Image
from torch.utils.data import Dataset

from flowers.models import CONTEXT, SHAPES, VOCABULARY

warnings.simplefilter("ignore")
from clip.clip import _transform  # noqa: E402
from clip.simple_tokenizer import SimpleTokenizer  # noqa: E402


class Pictures(Dataset):
    """Files and labels for a DataLoader, each picture opened with PIL and transformed."""

    def __init__(self, files, labels, transform):
        self.files, self.labels, self.transform = files, labels, transform

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        with Image.open(self.files[i]) as image:
            return self.transform(image), int(self.labels[i])


def clip_transform(resolution: int):
    """What clip.load returns as `preprocess`."""
    return _transform(resolution)


def open_clip_transform(resolution: int):
    import open_clip

    return open_clip.image_transform(resolution, is_train=False)


def transformers_transform(resolution: int):
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(
        size={"shortest_edge": resolution}, crop_size={"height": resolution, "width": resolution}
    )
    return lambda image: processor(image, return_tensors="pt")["pixel_values"][0]


def open_clip_model(architecture: str) -> torch.nn.Module:
    import open_clip

    embed, resolution, layers, width, patch, text_width, heads, text_layers = SHAPES[architecture]
    return open_clip.model.CLIP(
        embed,
        {"image_size": resolution, "layers": layers, "width": width, "patch_size": patch},
        {
            "context_length": CONTEXT,
            "vocab_size": VOCABULARY,
            "width": text_width,
            "heads": heads,
            "layers": text_layers,
        },
        quick_gelu=True,
    )


def transformers_model(architecture: str) -> torch.nn.Module:
    from transformers import CLIPConfig, CLIPModel

    embed, resolution, layers, width, patch, text_width, heads, text_layers = SHAPES[architecture]
    both = {"projection_dim": embed, "hidden_act": "quick_gelu"}
    text = {
        "hidden_size": text_width,
        "intermediate_size": 4 * text_width,
        "num_hidden_layers": text_layers,
        "num_attention_heads": heads,
        "eos_token_id": VOCABULARY - 1,
        "bos_token_id": VOCABULARY - 2,
        **both,
    }
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "image_size": resolution,
        "patch_size": patch,
        **both,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=embed))


def transformers_tokenizer():
    """CLIPTokenizer of transformers from the word pieces that OpenAI's package brings."""
    from transformers import CLIPTokenizer

    pieces = SimpleTokenizer()
    return CLIPTokenizer(
        vocab=dict(pieces.encoder), merges=list(pieces.bpe_ranks), model_max_length=CONTEXT
    )
