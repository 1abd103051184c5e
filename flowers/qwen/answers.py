"""Answers in the model's own words: generating, matching with class names, the training loss."""

import unicodedata
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from flowers.qwen.adapters import base_model
from flowers.qwen.models import cache_argument, hidden_states, image_arguments
from flowers.qwen.prompts import END, Tensors

IGNORE = -100  # the label that cross_entropy leaves out
APOSTROPHES = "'\u2018\u2019"  # straight, and the two curly ones
# Marks on a letter, and what is not seen, such as a soft hyphen: they part no word.
WITHIN_WORDS = ("Mn", "Mc", "Cf")


# -----------------------------------------------------------------------------
# generation


@torch.inference_mode()
def generate(
    model,
    processor,
    inputs: Tensors,
    image: Tensors,
    max_tokens: int,
    kv_cache: DynamicCache | None = None,
) -> list[str]:
    """Return the greedy answer, of up to `max_tokens` tokens, to each of B prompts.

    inputs, image: as for `hidden_states`. kv_cache: is filled with the prompts and their answers.
    """
    # load_model has left nothing in the model's own settings that would change an answer.
    network = base_model(model)
    options = {"max_new_tokens": max_tokens, "do_sample": False}
    if kv_cache is not None:
        options |= cache_argument(network, kv_cache)
    ids = network.generate(**inputs, **image_arguments(model, image), **options)
    answers = ids[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(answers, skip_special_tokens=True)


def one_line(text: str) -> str:
    """Return the text with every run of white space as one space."""
    return " ".join(text.split())


def first_line(text: str) -> str:
    """Return the first line that is not blank: a described answer without the name."""
    for line in text.splitlines():
        if line.strip():
            return one_line(line)
    return ""


# -----------------------------------------------------------------------------
# matching


def normalise(text: str) -> str:
    """Return a name as it is compared: its words in lower case, with one space between them.

    An apostrophe within a word is a part of it. All other punctuation parts words, and an article
    in front is left out.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    characters = []
    for character in text:
        if character in APOSTROPHES:
            characters.append("'")
        elif character.isalnum():
            characters.append(character)
        elif unicodedata.category(character) not in WITHIN_WORDS:
            characters.append(" ")
    # At the ends of a word apostrophes are quotation marks.
    words = [word.strip("'") for word in "".join(characters).split()]
    words = [word for word in words if word]
    if len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    return " ".join(words)


def match(answer: str, class_names: Sequence[str]) -> int | None:
    """Return the class whose name the last line of an answer is, or None.

    Names are compared whole, after `normalise`: one may be a part of another, as rose is of
    lenten rose.
    """
    lines = [line for line in answer.splitlines() if line.strip()]
    last_line = lines[-1] if lines else ""
    class_of = {normalise(name): c for c, name in enumerate(class_names)}
    return class_of.get(normalise(last_line))


def contained(answer: str, class_names: Sequence[str]) -> int | None:
    """Return the class whose name an answer contains, if it is the only one; else None.

    Words are compared whole, after `normalise`: roses is no rose. Of names within one another the
    longest counts: lenten rose is no rose, either.
    """
    words = normalise(answer).split()
    class_of = {tuple(normalise(name).split()): c for c, name in enumerate(class_names)}
    class_of.pop((), None)  # of a name without letters
    spans = []
    # Longest first, so that what lies within a longer one is seen.
    for name in sorted(class_of, key=len, reverse=True):
        for start in range(len(words) - len(name) + 1):
            end = start + len(name)
            is_within = any(first <= start and end <= last for first, last, _ in spans)
            if tuple(words[start:end]) == name and not is_within:
                spans.append((start, end, class_of[name]))
    classes = {c for _, _, c in spans}
    return classes.pop() if len(classes) == 1 else None


# -----------------------------------------------------------------------------
# training


def answer_length(processor, answer: str) -> int:
    """Return how many tokens an answer has, END included."""
    return len(processor.tokenizer(answer + END, add_special_tokens=False)["input_ids"])


def answer_loss(
    model,
    processor,
    inputs: Tensors,
    image: Tensors,
    answers: Sequence[str],
) -> tuple[torch.Tensor, int]:
    """Return the summed cross-entropy (nats) of the answers' tokens, and the number of these.

    inputs, image: as for `hidden_states`, B prompts. answers: B texts; END is added, and counts.
    """
    encoding = processor.tokenizer(
        [answer + END for answer in answers],
        add_special_tokens=False,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    # Prompts are padded on the left and answers on the right, so every answer of A tokens at most
    # begins at the same position L.
    device = inputs["input_ids"].device
    answer_ids = encoding["input_ids"].to(device)  # (B, A)
    answer_mask = encoding["attention_mask"].to(device)
    no_image = torch.zeros_like(answer_ids)
    conversation = {
        "input_ids": torch.cat([inputs["input_ids"], answer_ids], 1),  # (B, L + A)
        "attention_mask": torch.cat([inputs["attention_mask"], answer_mask], 1),
        "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], no_image], 1),
    }
    states, _ = hidden_states(model, conversation, image)  # (B, L + A, D)
    # A token is predicted at the position before it. Logits are made for these A positions only.
    predicting = states[:, -answer_ids.shape[1] - 1 : -1]
    logits = base_model(model).lm_head(predicting).float()  # (B, A, vocabulary)
    labels = answer_ids.masked_fill(answer_mask == 0, IGNORE)
    loss = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return loss, int(encoding["attention_mask"].sum())
