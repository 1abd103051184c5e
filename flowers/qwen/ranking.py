"""The exact log-likelihood of every class name as the answer, in two forward passes.

A name is a sequence of tokens that ends with END, and its log-likelihood is a sum over them:

    log p(name | prompt)  =  sum over t of  log p(name[t] | prompt, name[:t])

One forward pass a name gives it, 102 in all, each of which reads image and question again. Here the
first pass reads these alone and keeps their keys and values. The second reads all names as one
packed sequence, without their ENDs, after which nothing is predicted. With a token a word, "rose"
and "rose mallow" are

    packed       rose   rose   mallow
    position     +0     +0     +1        after the prompt
    predicts     END    mallow END       and the prompt predicts both rose

A token attends to the prompt and to what comes before it in its own name, and stands at the
position that it has there. For the model it is as if each name stood alone, so the sums are exact,
up to rounding. Names that begin alike could share their beginning, as a tree; among Oxford's that
spares 8 of 312 tokens, which is less than it takes to say.
"""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from flowers.qwen.adapters import base_model
from flowers.qwen.answers import first_line, generate
from flowers.qwen.models import cache_argument, hidden_states, prompt_positions
from flowers.qwen.prompts import END, Tensors, encode, move

MAX_LOGITS = 2**26  # at a time: those of all names at once would be gigabytes


class PackedNames:
    """The tokens of C names: M that are read, and T = C + M that are predicted.

    tokens, places  (M,)    a token that is read, and how many of its own name come before it
    sees            (M, M)  whether a token attends to another: itself, and those before it
    targets         (T,)    a token that is predicted: the first of each name, then what follows
    sources         (T,)    what predicts it: 0 the prompt, m + 1 the token m; never decreases
    names           (T,)    the name that it belongs to
    lengths         (C,)    how many tokens a name has, END included

    For "rose" and "rose mallow", as drawn above:

        tokens [rose, rose, mallow]               places [0, 0, 1]
        targets [rose, rose, END, mallow, END]    sources [0, 0, 1, 2, 3]
        names [0, 1, 0, 1, 1]                     lengths [2, 3]
    """

    def __init__(self, processor, class_names: Sequence[str]):
        names = []
        for class_name in class_names:
            encoding = processor.tokenizer(class_name + END, add_special_tokens=False)
            names.append(torch.tensor(encoding["input_ids"], dtype=torch.long))
        self.lengths = torch.tensor([len(name) for name in names])  # (C,)
        n_read = self.lengths - 1  # all tokens of a name but its END

        self.tokens = torch.cat([name[:-1] for name in names])  # (M,)
        self.places = torch.cat([torch.arange(n) for n in n_read])  # (M,)
        every_name = torch.arange(len(names))
        name_of_token = every_name.repeat_interleave(n_read)  # (M,)
        in_one_name = name_of_token[:, None] == name_of_token
        comes_before = self.places[:, None] >= self.places
        self.sees = in_one_name & comes_before  # (M, M)

        first_tokens = torch.stack([name[0] for name in names])  # (C,)
        others = [name[1:] for name in names]
        self.targets = torch.cat([first_tokens, *others])  # (T,)
        from_prompt = torch.zeros_like(first_tokens)
        from_tokens = torch.arange(len(self.tokens)) + 1
        self.sources = torch.cat([from_prompt, from_tokens])  # (T,)
        self.names = torch.cat([every_name, name_of_token])  # (T,)


@torch.inference_mode()
def rank(
    model,
    names: PackedNames,
    inputs: Tensors,
    image: Tensors | None = None,
) -> torch.Tensor:
    """Return the log-likelihoods (B, C) of all names, END included, after each prompt.

    inputs, image: as for `hidden_states`. Equal to C separate forward passes up to rounding.
    """
    kv_cache = new_cache(model)
    states, next_position = hidden_states(model, inputs, image, kv_cache)  # (B, L, D), (B,)
    # The first token of a name is predicted at the last position.
    return _rank_after(
        model, names, states[:, -1:], inputs["attention_mask"], next_position, kv_cache
    )


@torch.inference_mode()
def rank_after_answers(
    model,
    processor,
    names: PackedNames,
    inputs: Tensors,
    image: Tensors,
    kv_cache: DynamicCache,
    answers: Sequence[str],
) -> torch.Tensor:
    """Return the log-likelihoods (B, C) of all names after the prompts and B texts (P tokens).

    inputs, image: as for `hidden_states`. kv_cache: what `generate` filled after the same prompts,
    so that these are not read again. Equal to `rank` with the texts as `prefixes` of `encode`.
    """
    network = base_model(model)
    prompt_mask = inputs["attention_mask"]
    device = prompt_mask.device
    # What was generated is not the texts themselves, nor are its tokens.
    n_generated = kv_cache.get_seq_length() - prompt_mask.shape[1]
    if n_generated:
        kv_cache.crop(-n_generated)

    encoding = processor.tokenizer(list(answers), add_special_tokens=False)
    rows = [torch.tensor(ids, dtype=torch.long) for ids in encoding["input_ids"]]
    left = {"batch_first": True, "padding_side": "left"}
    padding = processor.tokenizer.pad_token_id
    tokens = pad_sequence(rows, padding_value=padding, **left).to(device)  # (B, P)
    is_token = [torch.ones_like(ids) for ids in rows]
    text_mask = pad_sequence(is_token, **left).to(device)  # (B, P)

    # The text goes on from the last position of the prompt.
    positions = prompt_positions(model, inputs, image)  # (3, B, L)
    next_position = positions.amax(dim=(0, 2)) + 1  # (B,)
    places = (text_mask.cumsum(1) - 1).clamp(min=0)  # (B, P)
    text_positions = next_position[:, None] + places
    mask = torch.cat([prompt_mask, text_mask], 1)  # (B, L + P)
    states = _read_on(network, tokens, mask, text_positions, kv_cache)
    next_position = next_position + text_mask.sum(1)
    return _rank_after(model, names, states[:, -1:], mask, next_position, kv_cache)


@torch.inference_mode()
def rank_questions(
    model,
    processor,
    names: PackedNames,
    questions: Sequence[Sequence[str]],
    image: Tensors | None,
    prefixes: Sequence[str] | None = None,
) -> torch.Tensor:
    """Return the log-likelihoods (B, C) of all names, their mean over Q questions.

    questions: Q sequences of B texts, one about each image. image: as for `hidden_states`, on the
    model's device; None for the questions alone. prefixes: B texts between question and name.
    """
    # Prompts are put together on the CPU.
    grids = None if image is None else image["image_grid_thw"].cpu()
    sums = []
    for texts in questions:
        prompts = move(encode(processor, texts, grids, prefixes), model.device)
        sums.append(rank(model, names, prompts, image))
    return torch.stack(sums).mean(0)


@torch.inference_mode()
def describe_and_rank(
    model,
    processor,
    names: PackedNames,
    texts: Sequence[str],
    image: Tensors,
    most_tokens: int,
) -> tuple[list[str], torch.Tensor]:
    """Return B descriptions, and the log-likelihoods (B, C) of all names after them.

    texts: B questions, one about each image. image: as for `hidden_states`, on the model's device.
    Image and question are read once, for the description and the names.
    """
    grids = image["image_grid_thw"].cpu()
    prompts = move(encode(processor, texts, grids), model.device)
    kv_cache = new_cache(model)
    answers = generate(model, processor, prompts, image, most_tokens, kv_cache)
    descriptions = [first_line(answer) for answer in answers]
    lines = [description + "\n" for description in descriptions]
    sums = rank_after_answers(model, processor, names, prompts, image, kv_cache, lines)
    return descriptions, sums


def new_cache(model) -> DynamicCache:
    """Return an empty cache of keys and values for a model."""
    return DynamicCache(config=base_model(model).config.get_text_config())


def _rank_after(
    model,
    names: PackedNames,
    last_state: torch.Tensor,
    prompt_mask: torch.Tensor,
    next_position: torch.Tensor,
    kv_cache: DynamicCache,
) -> torch.Tensor:
    """Return the log-likelihoods (B, C) of all names after prompts that the cache holds.

    last_state: (B, 1, D), where the first tokens are predicted. prompt_mask: (B, L), 0 at padding.
    next_position: (B,).
    """
    network = base_model(model)
    device = last_state.device
    states = last_state
    if len(names.tokens):
        batch_size = len(prompt_mask)
        n_tokens = len(names.tokens)
        # The prompt's padding is seen by none.
        is_prompt = prompt_mask.bool()[:, None]  # (B, 1, L)
        sees_prompt = is_prompt.expand(-1, n_tokens, -1)  # (B, M, L)
        sees_names = names.sees.to(device).expand(batch_size, -1, -1)  # (B, M, M)
        mask = torch.cat([sees_prompt, sees_names], 2)  # (B, M, L + M)
        mask = mask[:, None]  # the same for all heads
        places = names.places.to(device)
        positions = next_position[:, None] + places  # (B, M)
        tokens = names.tokens.to(device).expand(batch_size, -1)
        name_states = _read_on(network, tokens, mask, positions, kv_cache)  # (B, M, D)
        states = torch.cat([states, name_states], 1)  # (B, 1 + M, D)

    log_probabilities = _log_probabilities(network, names, states)  # (B, T)
    sums = torch.zeros(len(states), len(names.lengths), device=device)  # (B, C)
    return sums.index_add_(1, names.names.to(device), log_probabilities)


def _read_on(
    network,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    kv_cache: DynamicCache,
) -> torch.Tensor:
    """Return the hidden states (B, N, D) of more text tokens (B, N), which the cache takes in.

    mask: (B, L + N) for a text, or (B, 1, N, L + N), which says what each token attends to.
    """
    language_model = network.model.language_model
    output = language_model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions.expand(3, -1, -1),  # text: time, height and width are the same
        use_cache=True,
        **cache_argument(language_model, kv_cache),
    )
    return output.last_hidden_state


def _log_probabilities(network, names: PackedNames, states: torch.Tensor) -> torch.Tensor:
    """Return the log-probability (B, T) of every token that is predicted, from 1 + M states."""
    batch_size, n_states, _ = states.shape
    vocabulary = network.config.get_text_config().vocab_size
    chunk_size = max(1, MAX_LOGITS // (batch_size * vocabulary))
    chunks = []
    for start in range(0, n_states, chunk_size):
        end = start + chunk_size
        logits = network.lm_head(states[:, start:end]).float()  # (B, chunk, vocabulary)
        # Sources never decrease, so the chunks can be joined as they come.
        in_chunk = (names.sources >= start) & (names.sources < end)
        sources = (names.sources[in_chunk] - start).to(states.device)
        targets = names.targets[in_chunk].to(states.device)
        # log softmax, where it is needed only
        normaliser = logits.logsumexp(-1)  # (B, chunk)
        log_probabilities = logits[:, sources, targets] - normaliser[:, sources]
        chunks.append(log_probabilities)
    return torch.cat(chunks, 1)


def scores(sums: torch.Tensor, lengths: torch.Tensor, without_image: torch.Tensor) -> Tensors:
    """Return three ways to compare names of different length and frequency, each (N, C).

    sums: (N, C) log-likelihoods. lengths: (C,) in tokens. without_image: (1, C), the
    log-likelihoods after the question alone.
    `sum`: as they are. `token`: the mean of a token. `pmi`: less those without the image, the
    pointwise mutual information of name and image (Holtzman et al. 2021).
    """
    return {"sum": sums, "token": sums / lengths, "pmi": sums - without_image}
