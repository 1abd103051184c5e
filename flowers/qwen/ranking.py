"""The exact log-likelihood of every class name as the answer, in two forward passes.

A name is a sequence of tokens that ends with END, and its log-likelihood is a sum over them:

    log p(name | prompt)  =  sum over t of  log p(name[t] | prompt, name[:t])

One forward pass a name gives it, 102 in all, which read the image, the question and every shared
beginning again and again. But names are a tree. With a token a word, "rose" and "rose mallow" are

    prompt -- rose -- END
                 `--- mallow -- END

Each token that something follows is a node: the model reads it once. Node 0 is the prompt,
node 1 "rose", node 2 "mallow". Each line is an edge: the model predicts it once, from the node
where it starts. A name is the path from the prompt to its END, so

    log p(rose)         =  edge(prompt, rose) + edge(rose, END)
    log p(rose mallow)  =  edge(prompt, rose) + edge(rose, mallow) + edge(mallow, END)

The first pass reads image and question. The second reads all nodes as one packed sequence, in which
a node attends to the prompt and to its own ancestors, and stands at the position that it has in
its name. For the model it is as if each name stood alone, so the sums are exact, up to rounding.
"""

from collections.abc import Sequence

import torch
from transformers import DynamicCache

from flowers.qwen.adapters import base_model
from flowers.qwen.models import cache_argument, hidden_states
from flowers.qwen.prompts import END

MAX_LOGITS = 2**26  # at a time: those of all nodes at once would be gigabytes


class NameTree:
    """The tree of the names' tokens: C names, M nodes beside the prompt, E edges, T tokens in all.

    tokens, depths  (M,)    the token of node m + 1, and how many tokens of its name precede it
    ancestors       (M, M)  whether a node's path, itself included, leads through another
    parents         (E,)    the node where an edge starts; edges are sorted by it
    children        (E,)    the token that it leads to
    edges           (T,)    the edges of all paths, name after name
    names           (T,)    the name that each of them belongs to
    lengths         (C,)    how many tokens a name has

    For "rose" and "rose mallow", as drawn above:

        tokens [rose, mallow]   depths [0, 1]   ancestors [[1, 0], [1, 1]]
        parents [0, 1, 1, 2]    children [rose, END, mallow, END]
        edges [0, 1, 0, 2, 3]   names [0, 0, 1, 1, 1]   lengths [2, 3]
    """

    def __init__(self, processor, class_names: Sequence[str]):
        names = []
        for class_name in class_names:
            encoding = processor.tokenizer(class_name + END, add_special_tokens=False)
            names.append(tuple(encoding["input_ids"]))

        # A node or an edge is known by the tokens that lead there from the prompt: a prefix of a
        # name. Nothing follows a whole name, so it is the end of an edge, but no node.
        node_prefixes = set()
        edge_prefixes = set()
        for name in names:
            prefixes = _prefixes(name)
            node_prefixes.update(prefixes[:-1])
            edge_prefixes.update(prefixes)
        # Parents come before their children.
        nodes = sorted(node_prefixes, key=lambda prefix: (len(prefix), prefix))
        node_of = {(): 0}
        for prefix in nodes:
            node_of[prefix] = len(node_of)
        edges = sorted(edge_prefixes, key=lambda prefix: (node_of[prefix[:-1]], prefix))
        edge_of = {prefix: e for e, prefix in enumerate(edges)}

        # nodes
        self.tokens = torch.tensor([prefix[-1] for prefix in nodes], dtype=torch.long)
        self.depths = torch.tensor([len(prefix) - 1 for prefix in nodes], dtype=torch.long)
        self.ancestors = torch.eye(len(nodes), dtype=torch.bool)
        for m, prefix in enumerate(nodes):
            parent = node_of[prefix[:-1]]
            if parent > 0:
                self.ancestors[m] |= self.ancestors[parent - 1]

        # edges
        self.parents = torch.tensor([node_of[prefix[:-1]] for prefix in edges])
        self.children = torch.tensor([prefix[-1] for prefix in edges])

        # paths
        path_edges = []
        for name in names:
            path_edges += [edge_of[prefix] for prefix in _prefixes(name)]
        self.edges = torch.tensor(path_edges)
        self.lengths = torch.tensor([len(name) for name in names])
        self.names = torch.arange(len(names)).repeat_interleave(self.lengths)


def _prefixes(name: tuple[int, ...]) -> list[tuple[int, ...]]:
    """(a, b, c) -> [(a,), (a, b), (a, b, c)]"""
    return [name[:n] for n in range(1, len(name) + 1)]


@torch.inference_mode()
def rank(
    model,
    tree: NameTree,
    inputs: dict[str, torch.Tensor],
    image: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the log-likelihoods (B, C) of all names, END included, after each prompt.

    inputs, image: as for `hidden_states`. Equal to C separate forward passes up to rounding.
    """
    network = base_model(model)
    device = inputs["input_ids"].device

    # First pass: image and question. The answer's first token is predicted at the last position.
    kv_cache = DynamicCache(config=network.config.get_text_config())
    prompt_states, next_position = hidden_states(model, inputs, image, kv_cache)  # (B, L, D), (B,)
    states = prompt_states[:, -1:]  # (B, 1, D)

    # Second pass: all nodes, with the keys and values of the prompt in the cache.
    if len(tree.tokens):
        node_states = _read_nodes(network, tree, inputs["attention_mask"], next_position, kv_cache)
        states = torch.cat([states, node_states], 1)  # (B, 1 + M, D)

    edges = _edge_log_probabilities(network, tree, states)  # (B, E)
    path_edges = edges[:, tree.edges.to(device)]  # (B, T)
    sums = torch.zeros(len(states), len(tree.lengths), device=device)  # (B, C)
    return sums.index_add_(1, tree.names.to(device), path_edges)


def _read_nodes(
    network, tree: NameTree, prompt_mask: torch.Tensor, next_position: torch.Tensor, kv_cache
) -> torch.Tensor:
    """Return the hidden states (B, M, D) of all nodes, read as one sequence after the prompt."""
    device = prompt_mask.device
    batch_size = len(prompt_mask)
    n_nodes = len(tree.tokens)
    # A node attends to the prompt's tokens, not to its padding, and to its own ancestors.
    sees_prompt = prompt_mask.bool()[:, None].expand(-1, n_nodes, -1)  # (B, M, L)
    sees_nodes = tree.ancestors.to(device).expand(batch_size, -1, -1)  # (B, M, M)
    mask = torch.cat([sees_prompt, sees_nodes], 2)[:, None]  # (B, 1, M, L + M)
    positions = next_position[:, None] + tree.depths.to(device)  # (B, M)

    language_model = network.model.language_model
    output = language_model(
        input_ids=tree.tokens.to(device).expand(batch_size, -1),
        attention_mask=mask,
        position_ids=positions.expand(3, -1, -1),  # text: time, height and width are the same
        use_cache=True,
        **cache_argument(language_model, kv_cache),
    )
    return output.last_hidden_state


def _edge_log_probabilities(network, tree: NameTree, states: torch.Tensor) -> torch.Tensor:
    """Return log p(child | path to the parent) of every edge (B, E), from the nodes' states."""
    batch_size, n_nodes, _ = states.shape
    vocabulary = network.config.get_text_config().vocab_size
    chunk_size = max(1, MAX_LOGITS // (batch_size * vocabulary))
    chunks = []
    for start in range(0, n_nodes, chunk_size):
        end = start + chunk_size
        logits = network.lm_head(states[:, start:end]).float()  # (B, chunk, vocabulary)
        # Edges are sorted by parent, so the chunks of edges can be joined as they come.
        in_chunk = (tree.parents >= start) & (tree.parents < end)
        parents = (tree.parents[in_chunk] - start).to(states.device)
        children = tree.children[in_chunk].to(states.device)
        # log softmax, where it is needed only
        chunks.append(logits[:, parents, children] - logits.logsumexp(-1)[:, parents])
    return torch.cat(chunks, 1)


def scores(
    sums: torch.Tensor, lengths: torch.Tensor, without_image: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return three ways to compare names of different length and frequency, each (N, C).

    sums: (N, C) log-likelihoods. lengths: (C,) in tokens. without_image: (1, C), the
    log-likelihoods after the question alone.
    `sum`: as they are. `token`: the mean of a token. `pmi`: less those without the image, the
    pointwise mutual information of name and image (Holtzman et al. 2021).
    """
    return {"sum": sums, "token": sums / lengths, "pmi": sums - without_image}
