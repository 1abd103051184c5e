"""What the tests of the Qwen scripts share: adapters that change something."""

import torch

from flowers.qwen.adapters import add_adapter
from flowers.qwen.models import load_model


def random_adapter(model):
    """The model with LoRA of random numbers, in eval mode."""
    model = add_adapter(model, rank=4, alpha=8.0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        # B starts at zero, which is no change at all.
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def with_adapter(name, folder):
    """A model with LoRA that does something; the same after saving and loading; its processor."""
    trained = random_adapter(load_model(name, "cpu")[0])
    trained.save_pretrained(folder / "adapter")
    loaded, processor = load_model(name, "cpu", folder)
    return trained, loaded, processor
