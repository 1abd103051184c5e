"""Qwen2-VL and its kin on flowers: prompts, the exact ranking of class names, answers, the loss.

A prompt is encoded from the grid of image patches alone (`encode`), so that precomputed image features and pixels go the same way:
`hidden_states` gives the language model's output for either. Sequences are padded on the left: the last place is the one that answers.
"""

import inspect
import itertools
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from flowers import UserError, cache
from flowers.data import Flowers
from flowers.qwen.models import END, IMAGE, QUESTIONS, DynamicCache, base, smart_resize


def caches_features(model) -> bool:
    """Whether an image enters the language model by its features alone (Qwen3-VL also feeds its layers from inside the vision tower)."""
    return base(model).config.model_type in ("qwen2_vl", "qwen2_5_vl")


# images and prompts


def ahead(work: Callable, items: Iterable, depth: int = 2) -> Iterator:
    """work(item) of every item in order, computed in threads while the caller is busy with earlier ones."""
    with ThreadPoolExecutor(depth) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def subset(index: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` of the places, drawn with the seed and in their order; all of them for 0."""
    return (
        index
        if not count or count >= len(index)
        else np.sort(np.random.default_rng(seed).permutation(index)[:count])
    )


def to(tensors: dict[str, torch.Tensor], device: torch.device | str) -> dict[str, torch.Tensor]:
    return {k: v.to(device, non_blocking=True) for k, v in tensors.items()}


def one_line(text: str) -> str:
    return " ".join(text.split())


def first_line(text: str) -> str:
    """The first line that is not blank: a described answer without the name."""
    return next((one_line(line) for line in text.splitlines() if line.strip()), "")


def open_images(files: Sequence[Path], draw: torch.Generator | None = None) -> list[Image.Image]:
    """The files as RGB images; with `draw`, mirrored at random and cut to between 7/8 and the whole of each side."""
    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                images.append(image.convert("RGB"))
        except Exception as error:  # PIL raises a dozen kinds at damaged files
            raise UserError(
                f"{file} can't be decoded ({error}): replace it by a fresh copy"
            ) from None
        if draw is not None:
            mirror, cut, x, y = torch.rand(4, generator=draw).tolist()
            width, height = (round(side * (1 - cut / 8)) for side in images[-1].size)
            left, top = (
                round(x * (images[-1].width - width)),
                round(y * (images[-1].height - height)),
            )
            images[-1] = images[-1].crop((left, top, left + width, top + height))
            images[-1] = ImageOps.mirror(images[-1]) if mirror < 0.5 else images[-1]
    return images


def patches(processor, images: list[Image.Image]) -> dict[str, torch.Tensor]:
    """pixel_values (patches of all images, values of a patch) and image_grid_thw (B, 3), patches by time, height and width."""
    return dict(processor.image_processor(images=images, return_tensors="pt"))


def question_of(answer: str, class_names: Sequence[str] | None = None) -> str:
    """The question for an answer that is 'brief' or 'described', with the names to choose from if they are given."""
    return QUESTIONS[answer] + (f" Choose from: {', '.join(class_names)}." if class_names else "")


def encode(
    processor, question: str, grids: torch.Tensor | None, begun: Sequence[str] | None = None
) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, mm_token_type_ids (B, L): the conversation up to the answer, padded on the left; `begun` are first parts of answers.

    grids: (B, 3) of `patches`, or None for one question without an image.
    """
    parts = [{"type": "image"}] if grids is not None else []
    turn = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
    chat = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    merged = processor.image_processor.merge_size**2
    sizes = (grids.prod(1) // merged).tolist() if grids is not None else [0]
    texts = [
        chat.replace(IMAGE, IMAGE * n) + first
        for n, first in zip(sizes, begun or itertools.repeat(""))
    ]
    inputs = dict(
        processor.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    )
    inputs["mm_token_type_ids"] = (
        inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids(IMAGE)
    ).long()
    return inputs


def hidden_states(
    model,
    inputs: dict[str, torch.Tensor],
    image: dict[str, torch.Tensor] | None = None,
    kv_cache=None,
):
    """The language model's last hidden states (B, L, D), and each row's next position (B,).

    image: image_grid_thw with pixel_values, or with `features` (tokens of all images, D). kv_cache: a DynamicCache to fill. Positions are
    computed here: the model's own memory of them (`rope_deltas`) is that of whatever it saw last.
    """
    core, image = base(model).model, image or {}
    where, _ = core.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=image.get("image_grid_thw"),
        attention_mask=inputs["attention_mask"],
    )
    arguments = {
        "attention_mask": inputs["attention_mask"],
        "position_ids": where,
        "use_cache": kv_cache is not None,
        **_cache(core, kv_cache),
    }
    if "features" in image:
        embeddings = core.get_input_embeddings()(inputs["input_ids"])
        mask = inputs["mm_token_type_ids"].bool()[..., None]
        output = core(
            inputs_embeds=embeddings.masked_scatter(mask, image["features"].to(embeddings.dtype)),
            **arguments,
        )
    else:
        output = core(
            input_ids=inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            **image,
            **arguments,
        )
    return output.last_hidden_state, where.amax(dim=(0, 2)) + 1


def _cache(core, kv_cache) -> dict:
    """The cache under the name that this version of transformers gives it."""
    return {
        "cache"
        if "cache" in inspect.signature(core.forward).parameters
        else "past_key_values": kv_cache
    }


# ranking


class NameTree:
    """The names' tokens with the end token, as the tree of their prefixes. Nodes that have children make one packed sequence (M,): `tokens`,
    `depths`, and `sees` (M, M), which of them lie on a node's path. An edge leads from `parents` (0 is the prompt, m + 1 node m) to `children` tokens;
    the edges of name `names[k]` are `edges[k]`."""

    def __init__(self, processor, class_names: Sequence[str]):
        names = [
            tuple(processor.tokenizer(name + END, add_special_tokens=False)["input_ids"])
            for name in class_names
        ]
        prefixes = sorted(
            {name[:n] for name in names for n in range(1, len(name))}, key=lambda p: (len(p), p)
        )
        place = {(): 0} | {prefix: m + 1 for m, prefix in enumerate(prefixes)}
        steps = sorted(
            {name[:n] for name in names for n in range(1, len(name) + 1)},
            key=lambda p: (place[p[:-1]], p),
        )
        edge = {step: e for e, step in enumerate(steps)}
        self.tokens = torch.tensor([p[-1] for p in prefixes], dtype=torch.long)
        self.depths = torch.tensor([len(p) - 1 for p in prefixes], dtype=torch.long)
        self.sees = torch.eye(len(prefixes), dtype=torch.bool)
        for m, prefix in enumerate(prefixes):
            if len(prefix) > 1:
                self.sees[m] |= self.sees[place[prefix[:-1]] - 1]
        self.parents, self.children = (
            torch.tensor([place[s[:-1]] for s in steps]),
            torch.tensor([s[-1] for s in steps]),
        )
        self.names = torch.tensor([c for c, name in enumerate(names) for _ in name])
        self.edges = torch.tensor(
            [edge[name[:n]] for name in names for n in range(1, len(name) + 1)]
        )
        self.lengths = torch.tensor([len(name) for name in names])


@torch.inference_mode()
def rank(
    model,
    tree: NameTree,
    inputs: dict[str, torch.Tensor],
    image: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """(B, C) log-likelihood of every name and the end token after the prompts: image and question once, then all names in one packed forward
    in which a node sees the prompt and its own prefix. Equal to C separate forwards up to rounding."""
    core, device = base(model), inputs["input_ids"].device
    kv_cache = DynamicCache(config=core.config.get_text_config())
    prompt, position = hidden_states(model, inputs, image, kv_cache)
    states = prompt[:, -1:]
    n, nodes = len(position), len(tree.tokens)
    if nodes:
        mask = torch.cat(
            [
                inputs["attention_mask"].bool()[:, None].expand(-1, nodes, -1),
                tree.sees.to(device).expand(n, -1, -1),
            ],
            2,
        )[:, None]
        language_model = core.model.language_model
        packed = language_model(
            input_ids=tree.tokens.to(device).expand(n, -1),
            attention_mask=mask,
            use_cache=True,
            position_ids=(position[:, None] + tree.depths.to(device)).expand(3, -1, -1),
            **_cache(language_model, kv_cache),
        )
        states = torch.cat([states, packed.last_hidden_state], 1)
    parts = []
    chunk = max(
        1, 2**26 // (n * core.config.get_text_config().vocab_size)
    )  # logits of all nodes at once would be gigabytes
    for start in range(0, nodes + 1, chunk):
        logits = core.lm_head(states[:, start : start + chunk]).float()
        mine = (tree.parents >= start) & (
            tree.parents < start + chunk
        )  # edges are in the order of their parents
        parent, child = (tree.parents[mine] - start).to(device), tree.children[mine].to(device)
        parts.append(logits[:, parent, child] - logits.logsumexp(-1)[:, parent])
    steps = torch.cat(parts, 1)
    return torch.zeros(n, len(tree.lengths), device=device).index_add_(
        1, tree.names.to(device), steps[:, tree.edges.to(device)]
    )


def scores(
    sums: torch.Tensor, lengths: torch.Tensor, without_image: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Three ways to compare names of different length and frequency, (N, C) each: the sum of log-likelihoods, the mean of a token,
    and the sum less that of the name without the image (pointwise mutual information; Holtzman et al. 2021)."""
    return {"sum": sums, "token": sums / lengths, "calibrated": sums - without_image}


# answers


@torch.inference_mode()
def generate(
    model, processor, inputs: dict[str, torch.Tensor], image: dict[str, torch.Tensor], most: int
) -> list[str]:
    """Greedy answers of up to `most` tokens."""
    ids = model.generate(
        **inputs,
        **image,
        max_new_tokens=most,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
    )
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def normalise(text: str) -> str:
    """A name as it is compared: lower case, hyphens as spaces, no punctuation but apostrophes, no article in front."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    words = "".join(
        c if c.isalnum() or c == "'" else " " if c.isspace() or c in "-\u2013_/" else ""
        for c in text
    ).split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)


def match(answer: str, class_names: Sequence[str]) -> int | None:
    """The class whose name the answer is, word for word after normalisation; the last line counts. Never a part: rose is no lenten rose."""
    lines = [line for line in answer.splitlines() if line.strip()] or [""]
    return {normalise(name): c for c, name in enumerate(class_names)}.get(normalise(lines[-1]))


# training


def answer_length(processor, answer: str) -> int:
    return len(processor.tokenizer(answer + END, add_special_tokens=False)["input_ids"])


def answer_loss(
    model,
    processor,
    inputs: dict[str, torch.Tensor],
    image: dict[str, torch.Tensor],
    answers: Sequence[str],
) -> tuple[torch.Tensor, int]:
    """The summed cross-entropy (nats) of the answers' tokens, end token included, after the prompts, and their number; logits are made for
    these places only."""
    texts = [answer + END for answer in answers]
    tokens = processor.tokenizer(
        texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
    )
    ids, real = (tokens[k].to(inputs["input_ids"].device) for k in ("input_ids", "attention_mask"))
    whole = {
        "input_ids": torch.cat([inputs["input_ids"], ids], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], real], 1),
        "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(ids)], 1),
    }
    states, _ = hidden_states(model, whole, image)
    logits = base(model).lm_head(states[:, -ids.shape[1] - 1 : -1])
    labels = ids.masked_fill(real == 0, -100)
    return F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    ), int(real.sum())


@torch.inference_mode()
def image_features(
    model, processor, flowers: Flowers, index: np.ndarray, identity: str, batch_size: int = 8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of the images at `index` through the vision tower, once, kept beside the data: (T, D) of all images in a row, where each
    image's begin (N + 1,), and the grids (N, 3). identity: what the weights are."""
    core, images = base(model), processor.image_processor
    factor, size = images.patch_size * images.merge_size, images.size
    files, grids = [flowers.files[i] for i in index], []
    for file in files:
        with Image.open(file) as image:
            height, width = smart_resize(
                image.height, image.width, factor, size["shortest_edge"], size["longest_edge"]
            )
        grids.append([1, height // images.patch_size, width // images.patch_size])
    grids = torch.tensor(grids)
    begins = torch.cat(
        [torch.zeros(1, dtype=torch.long), (grids.prod(1) // images.merge_size**2).cumsum(0)]
    )
    width = core.config.get_text_config().hidden_size

    def rows():
        parts = [files[i : i + batch_size] for i in range(0, len(files), batch_size)]
        work = ahead(lambda part: patches(processor, open_images(part)), parts)
        for part in tqdm(
            work,
            total=len(parts),
            desc="image features",
            unit_scale=batch_size,
            unit="img",
            leave=False,
        ):
            output = core.model.get_image_features(**to(part, core.device), return_dict=True)
            yield (
                torch.cat(list(output.pooler_output)).to(core.dtype).cpu().view(torch.uint8).numpy()
            )  # as bytes: numpy has no bf16

    key = cache.key_of(
        "qwen features",
        identity,
        size["shortest_edge"],
        size["longest_edge"],
        str(core.dtype),
        *files,
    )
    path = cache.cache_folder(flowers.root) / f"qwen-{key.hex()[:12]}.npy"
    data = cache.cached_array(
        path, key, (int(begins[-1]), width * core.dtype.itemsize), "|u1", rows
    )
    return torch.from_numpy(data).view(core.dtype), begins, grids
