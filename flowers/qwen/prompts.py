"""What the model is shown: a question in its chat format, and images cut into patches.

A prompt depends on an image's number of patches alone, not on its pixels, so that kept features
of the vision tower (features.py) can take their place. Prompts are padded on the left: the answer
follows the last position of each.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch.nn.utils.rnn import pad_sequence

from flowers import UserError

END = "<|im_end|>"  # ends every turn, and so every answer
IMAGE = "<|image_pad|>"  # stands where one token of an image goes

# The questions, by the kind of answer that they ask for.
QUESTIONS = {
    "brief": "What kind of flower is this? Answer with its name only.",
    "described": "Describe this flower in one line, then give its name alone on a second line.",
}
DESCRIBE = "Describe the flower's colours, petals and centre in one sentence, without naming it."


# -----------------------------------------------------------------------------
# questions


def question_of(answer: str, class_names: Sequence[str] | None = None) -> str:
    """Return the question for a `brief` or `described` answer.

    class_names: are listed in the question, to choose from.
    """
    question = QUESTIONS[answer]
    if class_names:
        question += f" Choose from: {', '.join(class_names)}."
    return question


def encode(
    processor, question: str, grids: torch.Tensor | None, prefixes: Sequence[str] | None = None
) -> dict[str, torch.Tensor]:
    """Tokenise the conversation up to the answer, once for each image.

    grids: (B, 3), the `image_grid_thw` of `patches`; None for the question without an image, B = 1.
    prefixes: B texts that the answers begin with (default: none).
    Returns input_ids, attention_mask and mm_token_type_ids (1 at image tokens), each (B, L).
    """
    content = [{"type": "text", "text": question}]
    image_tokens = [0]
    if grids is not None:
        content.insert(0, {"type": "image"})
        # The vision tower merges merge_size x merge_size patches into one token.
        patches_per_token = processor.image_processor.merge_size**2
        image_tokens = (grids.prod(1) // patches_per_token).tolist()
    prefixes = prefixes or [""] * len(image_tokens)

    turn = {"role": "user", "content": content}
    chat = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    tokenizer = processor.tokenizer
    prompts = []
    for count, prefix in zip(image_tokens, prefixes):
        ids = tokenizer(chat.replace(IMAGE, IMAGE * count))["input_ids"]
        # By itself, as answers are in training. In one text, the line end before an empty line
        # would become one token with it, which no model has seen there.
        ids = ids + tokenizer(prefix, add_special_tokens=False)["input_ids"]
        prompts.append(torch.tensor(ids, dtype=torch.long))

    left = {"batch_first": True, "padding_side": "left"}
    input_ids = pad_sequence(prompts, padding_value=tokenizer.pad_token_id, **left)  # (B, L)
    is_image = input_ids == tokenizer.convert_tokens_to_ids(IMAGE)
    return {
        "input_ids": input_ids,
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in prompts], **left),
        "mm_token_type_ids": is_image.long(),
    }


# -----------------------------------------------------------------------------
# images


def open_images(
    files: Sequence[Path], generator: torch.Generator | None = None
) -> list[Image.Image]:
    """Open the files as RGB images; with a generator, crop and mirror them at random.

    Raises UserError naming a file that can't be decoded.
    """
    images = []
    for file in files:
        try:
            with Image.open(file) as encoded:
                image = encoded.convert("RGB")
        except Exception as error:  # PIL raises a dozen kinds at damaged files
            raise UserError(
                f"{file} can't be decoded ({error}): replace it by a fresh copy"
            ) from None
        if generator is not None:
            image = crop_and_mirror(image, generator)
        images.append(image)
    return images


def crop_and_mirror(image: Image.Image, generator: torch.Generator) -> Image.Image:
    """Crop to between 7/8 and all of each side, at a random place, and mirror every other image."""
    mirror, crop, x, y = torch.rand(4, generator=generator).tolist()
    width = round(image.width * (1 - crop / 8))
    height = round(image.height * (1 - crop / 8))
    left = round(x * (image.width - width))
    top = round(y * (image.height - height))
    image = image.crop((left, top, left + width, top + height))
    if mirror < 0.5:
        image = ImageOps.mirror(image)
    return image


def patches(processor, images: list[Image.Image]) -> dict[str, torch.Tensor]:
    """Resize and normalise images, and cut them into patches.

    Returns pixel_values (patches of all images, values of a patch), and image_grid_thw (B, 3):
    how many patches an image has in time (1), height and width.
    """
    return dict(processor.image_processor(images=images, return_tensors="pt"))


# -----------------------------------------------------------------------------
# batches


def move(tensors: dict[str, torch.Tensor], device: torch.device | str) -> dict[str, torch.Tensor]:
    """Return the tensors of a batch on the device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def prefetch(work: Callable, items: Iterable, depth: int = 2) -> Iterator:
    """Yield work(item) for every item in order, computed in `depth` threads ahead of the caller."""
    # At most depth + 1 results wait at a time, so that memory stays bounded.
    with ThreadPoolExecutor(depth) as pool:
        pending = deque()
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
