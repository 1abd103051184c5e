"""What the model is shown: a question in its chat format, and images cut into patches.

A prompt depends on an image's number of patches alone, not on its pixels, so that kept features
of the vision tower (features.py) can take their place. Prompts are padded on the left: the answer
follows the last position of each.
"""

import hashlib
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch.nn.utils.rnn import pad_sequence

from flowers import UserError, devices
from flowers.qwen_settings import QUESTIONS

Tensors = dict[str, torch.Tensor]  # the tensors of a batch, by name

END = "<|im_end|>"  # ends every turn, and so every answer
IMAGE = "<|image_pad|>"  # stands where one token of an image goes


# -----------------------------------------------------------------------------
# questions


def questions_of(answer: str, own: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the texts that are asked for a `brief` or `described` answer: the user's own, if any.

    own: the value of --question.
    """
    return tuple(own) if own else (QUESTIONS[answer],)


def with_names(question: str, class_names: Sequence[str]) -> str:
    """Return a question with the names that are to be chosen from, in their order."""
    return f"{question} Choose from: {', '.join(class_names)}."


def shuffle(class_names: Sequence[str], generator: torch.Generator) -> list[str]:
    """Return the names in an order that is drawn: --list_order drawn."""
    order = torch.randperm(len(class_names), generator=generator).tolist()
    return [class_names[c] for c in order]


def generator_of_file(seed: int, file_name: str) -> torch.Generator:
    """Return a generator for one image, whatever else is evaluated, and in which batches."""
    digest = hashlib.sha256(file_name.encode()).digest()
    return devices.generator(seed, int.from_bytes(digest[:8], "big"))


def questions_about(
    texts: Sequence[str],
    class_names: Sequence[str] | None,
    list_order: str,
    seed: int,
    file_name: str,
) -> tuple[str, ...]:
    """Return what is asked about an image in evaluation: each of the texts, and the names.

    class_names: to list; None for none. An order that is drawn is the image's own, and the same in
    all texts.
    """
    if class_names is None:
        return tuple(texts)
    if list_order == "drawn":
        class_names = shuffle(class_names, generator_of_file(seed, file_name))
    return tuple(with_names(text, class_names) for text in texts)


def draw_question(
    questions: Sequence[str],
    class_names: Sequence[str] | None,
    list_order: str,
    generator: torch.Generator,
) -> str:
    """Return what is asked about one image in training: one of the questions, and the names.

    class_names: to list; None for none. Where nothing is to be drawn, the generator stays as it is.
    """
    question = questions[0]
    if len(questions) > 1:
        question = questions[int(torch.randint(len(questions), (), generator=generator))]
    if class_names is None:
        return question
    if list_order == "drawn":
        class_names = shuffle(class_names, generator)
    return with_names(question, class_names)


def spell_names(class_names: Sequence[str], case: str) -> tuple[str, ...]:
    """Return the names as --name_case spells them: one of NAME_CASES.

    Raises UserError if two names that differ would become the same.
    """
    spelled = tuple(_spell(name, case) for name in class_names)
    if len(set(spelled)) < len(set(class_names)):
        raise UserError(f"--name_case {case}: two classes would have the same name")
    return spelled


def _spell(name: str, case: str) -> str:
    if case == "lower":
        return name.lower()
    if case == "title":
        # Not str.title, which makes "Colt'S Foot" of colt's foot.
        return re.sub(r"(^|[\s/-])(\w)", lambda found: found[1] + found[2].upper(), name)
    return name


def encode(
    processor,
    question: str | Sequence[str],
    grids: torch.Tensor | None,
    prefixes: Sequence[str] | None = None,
) -> Tensors:
    """Tokenise the conversation up to the answer, once for each image.

    question: one for all images, or B of them.
    grids: (B, 3), the `image_grid_thw` of `patches`; None for B questions without an image.
    prefixes: B texts that the answers begin with (default: none).
    Returns input_ids, attention_mask and mm_token_type_ids (1 at image tokens), each (B, L).
    """
    is_one = isinstance(question, str)
    questions = [question] if is_one else list(question)
    image_tokens = [0] * len(questions)
    if grids is not None:
        # The vision tower merges merge_size x merge_size patches into one token.
        patches_per_token = processor.image_processor.merge_size**2
        image_tokens = (grids.prod(1) // patches_per_token).tolist()
        questions = questions * len(grids) if is_one else questions
    prefixes = prefixes or [""] * len(questions)

    chat_of = {text: _chat(processor, text, grids is not None) for text in set(questions)}
    tokenizer = processor.tokenizer
    prompts = []
    for text, count, prefix in zip(questions, image_tokens, prefixes):
        ids = tokenizer(chat_of[text].replace(IMAGE, IMAGE * count))["input_ids"]
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


def _chat(processor, question: str, has_image: bool) -> str:
    """Return the conversation as text, with one IMAGE for the image."""
    content = [{"type": "text", "text": question}]
    if has_image:
        content.insert(0, {"type": "image"})
    turn = {"role": "user", "content": content}
    return processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)


# -----------------------------------------------------------------------------
# images


def open_images(
    files: Sequence[Path], draws: Sequence[Sequence[float]] | None = None
) -> list[Image.Image]:
    """Open the files as RGB images; with draws, crop and mirror each by its own.

    draws: the numbers of `draw_views`, four for each file.
    Raises UserError naming a file that can't be decoded.
    """
    images = []
    for i, file in enumerate(files):
        try:
            with Image.open(file) as encoded:
                image = encoded.convert("RGB")
        except Exception as error:  # PIL raises a dozen kinds at damaged files
            raise UserError(
                f"{file} can't be decoded ({error}): replace it by a fresh copy"
            ) from None
        if draws is not None:
            image = crop_and_mirror(image, draws[i])
        images.append(image)
    return images


def draw_views(
    augmentation: str, count: int, generator: torch.Generator
) -> list[list[float]] | None:
    """Draw how `crop_and_mirror` changes so many images: four numbers in [0, 1) for each.

    augmentation: `none`, for which nothing is drawn; `flip`, which mirrors half of the images;
    `crop`, which also crops them.
    """
    if augmentation == "none":
        return None
    draws = [torch.rand(4, generator=generator).tolist() for _ in range(count)]
    if augmentation == "flip":
        draws = [[mirror, 0.0, 0.0, 0.0] for mirror, *_ in draws]
    return draws


def crop_and_mirror(image: Image.Image, draw: Sequence[float]) -> Image.Image:
    """Cut up to 1/8 of each side off, and mirror the image for a first number below 1/2.

    draw: whether it is mirrored, how much is cut off, and where the rest lies: x and y.
    """
    mirror, crop, x, y = draw
    width = round(image.width * (1 - crop / 8))
    height = round(image.height * (1 - crop / 8))
    left = round(x * (image.width - width))
    top = round(y * (image.height - height))
    image = image.crop((left, top, left + width, top + height))
    if mirror < 0.5:
        image = ImageOps.mirror(image)
    return image


def patches(processor, images: list[Image.Image]) -> Tensors:
    """Resize and normalise images, and cut them into patches.

    Returns pixel_values (patches of all images, values of a patch), and image_grid_thw (B, 3):
    how many patches an image has in time (1), height and width.
    """
    return dict(processor.image_processor(images=images, return_tensors="pt"))


# -----------------------------------------------------------------------------
# batches


def move(tensors: Tensors, device: torch.device | str) -> Tensors:
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
