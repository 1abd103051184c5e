"""Qwen-VL names flowers: the generative counterpart of CLIP. Read the modules in this order:

prompts.py    what the model is shown: questions in its chat format, images as patches
models.py     a model with its processor; from a prompt to hidden states
adapters.py   LoRA: adding it to a model, and loading it from a run or another tool
ranking.py    the exact log-likelihood of every class name, in two forward passes
answers.py    answers in the model's own words: generating, matching, the training loss
features.py   what the frozen vision tower makes of the images, computed once
offline.py    models with random weights, made without a download
memory.py     how many gigabytes to expect
"""

import logging

from flowers import stop

OLDEST_TRANSFORMERS = (5, 18)  # takes what a vision tower has made in the place of pixels

# peft imports bitsandbytes where that is installed. On some CPUs it warns that a faster kernel is
# missing, also where nothing is in 4 bits.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Here, before any module of the package: these libraries are an extra that most users lack.
try:
    import transformers

    if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST_TRANSFORMERS:
        raise ImportError(f"transformers {transformers.__version__} is too old")
    import peft  # noqa: F401
    from transformers import AutoModelForImageTextToText, DynamicCache  # noqa: F401
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX  # noqa: F401
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize  # noqa: F401
except ImportError as missing:
    stop(f"{missing}: Qwen needs pip install -r requirements-qwen.txt")
