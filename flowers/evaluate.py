"""Evaluation: prompts, the zero-shot classifier, metrics, tables, WiSE-FT and soups.

Metrics take tensors and return dicts, in percent. N images, C classes, D dimensions.
"""

import difflib
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from tabulate import tabulate

from flowers import UserError, calibration, devices, frozen, runs, strategies
from flowers.choices import KEEPS_WEIGHTS, context_template, templates_in_words
from flowers.data import Flowers, base_classes
from flowers.files import checked, digest_of_prompts, load_tensors, read_json, write_csv
from flowers.intervals import wilson
from flowers.layouts import correct_name, name_key
from flowers.models import CLIP, CONTEXT_LENGTH, END, encode, settings_of, text_features
from flowers.weights import load_model, origin_of

if TYPE_CHECKING:
    from flowers.figures import Mistake

# A head turns image features into logits: its weight (C, D) and bias (C,).
Head = tuple[torch.Tensor, torch.Tensor]

# The prompts of each of C classes; classes may have different numbers of them.
Prompts = list[list[str]]


# -----------------------------------------------------------------------------
# prompts


def fill_templates(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Put every class name into every template: C * len(templates) prompts, class by class.

    Raises UserError for a template without {}.
    """
    for template in templates:
        if "{}" not in template:
            raise UserError(
                f"the prompt template {template!r} has no {{}} where the class name goes"
            )
    # replace, not format: a template may hold other braces.
    return [template.replace("{}", name) for name in class_names for template in templates]


def class_prompts(
    class_names: Sequence[str],
    templates: Sequence[str] | None,
    sentences: Prompts | None = None,
    context_length: int = CONTEXT_LENGTH,
) -> Prompts:
    """The prompts of each class: its own sentences if there are any, else its filled templates.

    sentences: what `read_prompts` returns. context_length: how many
    tokens of a text the model reads.
    Raises UserError for a template without {}, for a prompt that would be cut, and for two classes
    with the same prompts: with these the model can't do what is measured.
    """
    if sentences is None:
        n = len(templates)
        filled = fill_templates(class_names, templates)
        prompts = [filled[start : start + n] for start in range(0, len(filled), n)]
        sources = list(templates) * len(class_names)
    else:
        prompts = sentences
        sources = [sentence for of_class in sentences for sentence in of_class]

    # Compared as tokens: names that differ in capitals are the same to CLIP.
    name_of = {}  # the tokens of all prompts of a class, sorted -> its name
    source = iter(sources)
    for name, of_class in zip(class_names, prompts):
        sequences = [encode(prompt) for prompt in of_class]
        for sequence in sequences:
            _check_length(sequence, next(source), name, context_length)
        # Prompts may be shared, as long as not all of them are.
        key = tuple(sorted(tuple(sequence) for sequence in sequences))
        other = name_of.setdefault(key, name)
        if other != name:
            raise UserError(
                f"the classes {other!r} and {name!r} have the same prompts for CLIP, such as "
                f"{of_class[0]!r} (it reads all in lower case): give them other names, or --prompts"
            )
    return prompts


def _check_length(sequence: list[int], source: str, name: str, context_length: int) -> None:
    """Raise UserError if the model would not read a prompt to its end.

    source: the template or the sentence that the prompt of class `name` was made from.
    """
    if len(sequence) > context_length:
        raise UserError(
            f"the prompt {source!r} of the class {name!r} has {len(sequence)} tokens with start "
            f"and end, and the model reads {context_length}: make it shorter, as it would be cut"
        )
    if END in sequence[:-1]:
        raise UserError(
            f"the prompt {source!r} of the class {name!r} holds <|endoftext|>, and the model reads "
            "nothing after it: leave it out"
        )


def read_prompts(path: str | Path, class_names: Sequence[str]) -> Prompts:
    """The sentences of each class from a JSON object of names and lists of sentences.

    Names match as layouts.name_key has it. Names of the file that match no class are ignored, with
    one warning. Raises UserError if the file is missing or damaged, or if a class has no sentence.
    """
    path = Path(path)
    try:
        contents = read_json(path)
    except FileNotFoundError:
        raise UserError(f"no prompts at {path}") from None
    except ValueError as error:
        raise UserError(
            f"{path} can't be read: {error}; it must be a JSON object of class names and lists of "
            "sentences"
        ) from None

    for name, sentences in contents.items():
        _check_sentences(path, name, sentences)
    match_of = _match_names(path, class_names, list(contents))
    # Not refused: such files often describe more classes than a part of the dataset has.
    ignored = len(contents) - len(set(match_of.values()))
    if ignored:
        print(
            f"warning: {ignored} of {len(contents)} names in {path} are no classes of this dataset "
            "and ignored",
            file=sys.stderr,
        )
    prompts = [contents[match_of[name]] for name in class_names]

    # Files of descriptors ("has five petals") look the same, but are no prompts yet.
    n_unnamed = 0
    for name, sentences in zip(class_names, prompts):
        keys = {name_key(name), name_key(match_of[name])}
        text = name_key(" ".join(sentences))
        n_unnamed += not any(key in text for key in keys)
    if n_unnamed > len(class_names) / 2:
        print(
            f"warning: no sentence names its class for {n_unnamed} of {len(class_names)} classes "
            f"of {path}: are these descriptors, and not whole prompts?",
            file=sys.stderr,
        )
    return prompts


def _check_sentences(path: Path, name: str, sentences) -> None:
    """Raise UserError unless these are the sentences of a class."""
    is_list = isinstance(sentences, list) and len(sentences) > 0
    if not is_list or not all(isinstance(text, str) and text.strip() for text in sentences):
        raise UserError(f"{path} has no list of sentences for {name!r}")
    templates = [text for text in sentences if "{}" in text]
    if templates:
        raise UserError(
            f"{path} has a {{}} in {templates[0]!r} of {name!r}: its sentences are used as they "
            "are; templates are given by --prompt_template"
        )


def _match_names(path: Path, class_names: Sequence[str], names: list[str]) -> dict[str, str]:
    """For each class the name that stands for it in a file.

    Raises UserError if there is none, or more than one.
    """
    # A list for each key, as a file may write one name in two ways.
    by_key = {}
    for name in names:
        by_key.setdefault(name_key(name), []).append(name)

    match_of = {}
    for class_name in class_names:
        candidates = by_key.get(name_key(class_name), [])
        if class_name in candidates:  # the very name comes before other ways of writing it
            match_of[class_name] = class_name
        elif len(candidates) > 1:
            raise UserError(
                f"{path} names the class {class_name!r} more than once: "
                f"{', '.join(map(repr, candidates))}"
            )
        elif candidates:
            match_of[class_name] = candidates[0]

    missing = [name for name in class_names if name not in match_of]
    if missing:
        shown = ", ".join(_with_near_matches(name, by_key) for name in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(
            f"{path} has no sentences for {len(missing)} of {len(class_names)} classes: "
            f"{shown}{more}"
        )
    return match_of


def _with_near_matches(class_name: str, by_key: dict[str, list[str]]) -> str:
    """A class that a file lacks and similar names that it has, as 'iris' (there is 'irises')."""
    similar = difflib.get_close_matches(name_key(class_name), by_key)
    if not similar:
        return repr(class_name)
    there = ", ".join(repr(by_key[key][0]) for key in similar)
    return f"{class_name!r} (there is {there})"


def describe_prompts(path: str | Path, prompts: Prompts) -> str:
    """A prompts file as tables and results name it, such as `cupl.json (3,024 sentences)`."""
    n_sentences = sum(len(sentences) for sentences in prompts)
    return f"{Path(path).name} ({n_sentences:,} sentences)"


def warn_of_changed_prompts(architecture: str, path: str | Path) -> None:
    """Print a warning if a run was made with the prompts file of this path, and it has changed."""
    source = Path(architecture)
    folder = source if source.is_dir() else source.parent
    try:
        arguments = read_json(folder / "args.json")
    except (OSError, ValueError):
        return  # it is no run, or its arguments can't be read: nothing is known
    was_used = arguments.get("prompts") == str(path)
    if was_used and arguments.get("prompts_digest") != digest_of_prompts(path):
        print(
            f"warning: {path} has changed since {folder} was made with it",
            file=sys.stderr,
        )


def warn_of_cut_captions(n_cut: int, n_captions: int, context_length: int) -> None:
    """Print a warning if captions were cut, as CLIP does it."""
    if n_cut:
        print(
            f"warning: {n_cut:,} of {n_captions:,} captions are longer than {context_length} "
            "tokens and are cut there",
            file=sys.stderr,
        )


# -----------------------------------------------------------------------------
# zero-shot classification


def zero_shot_classifier(
    model: CLIP,
    class_names: Sequence[str],
    templates: Sequence[str] | None,
    sentences: Prompts | None = None,
) -> torch.Tensor:
    """The normalised mean of the features of each class's prompts, (C, D).

    Prompt ensembling as in Radford et al. 2021, section 3.1.4. sentences: those of each class,
    instead of the templates. Raises UserError for prompts that `class_prompts` refuses.
    """
    prompts = class_prompts(class_names, templates, sentences, model.context_length)
    counts = [len(of_class) for of_class in prompts]
    features = text_features(model, [prompt for of_class in prompts for prompt in of_class])
    # The mean of features of length 1 is shorter than 1, so it is normalised again.
    means = [of_class.mean(0) for of_class in features.split(counts)]
    return F.normalize(torch.stack(means), dim=-1)


def zero_shot_head(
    model: CLIP,
    class_names: Sequence[str],
    templates: Sequence[str] | None,
    sentences: Prompts | None = None,
) -> Head:
    """The zero-shot classifier as a head, at the model's temperature."""
    scale = model.logit_scale.exp().item()  # 1 / temperature, about 100 in CLIP
    # The scale does not change which class is best, but the probabilities need it.
    weight = scale * zero_shot_classifier(model, class_names, templates, sentences)
    return weight, torch.zeros(len(weight))


def load_head(
    architecture: str,
    model: CLIP,
    class_names: Sequence[str],
    templates: Sequence[str] | None,
    default: str,
    sentences: Prompts | None = None,
) -> tuple[Head, list[str] | None]:
    """The head that belongs to a model, and the templates of its prompts.

    A run may have left a linear head or a learned prompt in classifier.pt beside its model.pt.
    Without either, and if the user gave `templates` or the `sentences` of each class, it is the
    zero-shot classifier. With sentences there are no templates: None.

    architecture: what the model was loaded from. default: the template if `templates` is None.
    Raises UserError if classifier.pt is damaged or of other classes, and for prompts that
    `class_prompts` refuses.
    """
    source = Path(architecture)
    classifier_file = (source if source.is_dir() else source.parent) / "classifier.pt"
    # The user's own prompts come before anything learned.
    if sentences is not None:
        return zero_shot_head(model, class_names, None, sentences), None
    if templates is None:
        _check_classifier_is_there(architecture)
    if templates is not None or not source.exists() or not classifier_file.exists():
        templates = templates or [default]
        return zero_shot_head(model, class_names, templates), templates

    learned = load_tensors(classifier_file)
    if _holds_context(learned, model):
        context = learned["context"]  # (context tokens, text width)
        strategies.attach_context(model, context.to(model.token_embedding.weight.device))
        templates = [context_template(len(context))]
        return zero_shot_head(model, class_names, templates), templates
    if _holds_linear_head(learned, model, class_names):
        # It needs no prompts: the default stands in the record of the run only.
        return (learned["weight"], learned["bias"]), [default]
    raise UserError(
        f"{classifier_file} is damaged, or a classifier of other classes: "
        "give --prompt_template to evaluate by prompts instead"
    )


def _check_classifier_is_there(architecture: str) -> None:
    """Raise UserError for a run that has lost what it learned: it would pass for its start."""
    try:
        folder = runs.run_folder(architecture)
    except UserError:  # damaged arguments: the scripts have refused it, and the page searches by it
        return
    if folder is None or (folder / "classifier.pt").exists():
        return
    strategy = runs.read_arguments(folder).get("strategy")
    if strategy in KEEPS_WEIGHTS:
        raise UserError(
            f"{folder} was trained with --strategy {strategy} and lacks its classifier.pt: copy "
            "the whole folder, or give --prompt_template to evaluate its start by prompts"
        )


def _holds_context(learned: dict, model: CLIP) -> bool:
    """Whether a learned prompt of this model is there; it may fill half of the context."""
    context = learned.get("context")
    if not _is_float_tensor(context) or context.ndim != 2:
        return False
    tokens, width = context.shape
    text_width = model.text_projection.shape[0]
    return width == text_width and 1 <= tokens <= model.context_length // 2


def _holds_linear_head(learned: dict, model: CLIP, class_names: Sequence[str]) -> bool:
    """Whether a linear head of this model and these classes is there."""
    weight, bias = learned.get("weight"), learned.get("bias")
    if not _is_float_tensor(weight) or not _is_float_tensor(bias):
        return False
    n_classes = len(class_names)
    embedding = model.text_projection.shape[1]
    # The names, too: a head of as many other classes would fit by its shape alone.
    fits = weight.shape == (n_classes, embedding) and bias.shape == (n_classes,)
    # Older runs wrote "lotus lotus": see correct_name.
    names = learned.get("class_names")
    return fits and _are_texts(names) and list(map(correct_name, names)) == list(class_names)


def _are_texts(value) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_float_tensor(value) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


# -----------------------------------------------------------------------------
# the temperature that a run found on its val images


def read_temperature(run: Path) -> float | None:
    """The temperature in calibration.json of a run; None if it has none.

    Raises UserError if the file is damaged.
    """
    path = run / calibration.FILE
    try:
        temperature = read_json(path).get("temperature")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} can't be read ({error}): remove it, or train the run again"
        ) from None
    is_number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not is_number or not 1 / calibration.MOST <= temperature <= calibration.MOST:
        raise UserError(
            f"{path} is damaged: its temperature is {temperature!r}, and no number that a fit "
            "gives; remove it, or train the run again"
        )
    return float(temperature)


def own_temperature(
    run: Path | None,
    class_names: Sequence[str],
    templates: Sequence[str] | None,
    prompts_file: str | Path | None,
) -> float | None:
    """The temperature of a run, if it was found for the head that is used; else None.

    The other arguments say which head that is; templates and prompts_file are both None for what
    the run has learned. Raises UserError if calibration.json is damaged.
    """
    if run is None or not _is_own_head(run, class_names, templates, prompts_file):
        return None
    return read_temperature(run)


def require_temperature(
    run: Path | None,
    class_names: Sequence[str],
    templates: Sequence[str] | None,
    prompts_file: str | Path | None,
) -> float:
    """As `own_temperature`, for --calibrated: raises UserError, too, where there is none."""
    if run is None:
        raise UserError("--calibrated needs a run of train.py --holdout: give it as --architecture")
    temperature = read_temperature(run)
    if temperature is None:
        raise UserError(
            f"--calibrated: {run} has no {calibration.FILE}, which train.py --holdout leaves: "
            "leave out --calibrated, or train the run again with --holdout"
        )
    if not _is_own_head(run, class_names, templates, prompts_file):
        raise UserError(
            f"--calibrated: the temperature of {run} was found for the names and prompts that it "
            "was trained with, and these are others: leave out --calibrated, or the other names "
            "and prompts"
        )
    return temperature


def _is_own_head(
    run: Path,
    class_names: Sequence[str],
    templates: Sequence[str] | None,
    prompts_file: str | Path | None,
) -> bool:
    """Whether class names and prompts make the head that the run was evaluated with."""
    try:
        arguments = read_json(run / "args.json")
        names = read_json(run / "class_names.json").get("names")
    except (OSError, ValueError):
        return False  # it can't be known
    if names != list(class_names):
        return False
    if (run / "classifier.pt").exists():
        return templates is None and prompts_file is None
    if prompts_file is not None:
        return arguments.get("prompts_digest") == digest_of_prompts(prompts_file)
    return templates is not None and arguments.get("prompt_template") == list(templates)


# -----------------------------------------------------------------------------
# metrics


def evaluate_features(
    images: torch.Tensor,
    head: Head,
    labels: np.ndarray,
    captions: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[dict[str, float], torch.Tensor]:
    """All metrics of image features (N, D) under a head, and the class probabilities (N, C).

    labels: (N,). captions: (N, D), the feature of one sentence for each image, for retrieval
    between images and sentences. temperature: divides the logits before they become
    probabilities; their ranks are the same. Raises UserError for a model that diverged.
    """
    labels = torch.from_numpy(np.array(labels))  # a copy, as torch has no read-only tensors
    logits = class_logits(images, head)  # (N, C)
    # The keys are those of result.json, in its order. Ranks are the same for logits and
    # probabilities, but the logits do not saturate.
    metrics = classification(logits, labels)
    metrics |= probability_scores(logits / temperature, labels)
    metrics |= base_to_new(logits, labels)
    metrics |= _class_retrieval(logits, labels)
    if captions is not None:
        metrics |= _caption_retrieval(images @ captions.t(), labels)
    return metrics, (logits / temperature).softmax(1)


def class_logits(images: torch.Tensor, head: Head) -> torch.Tensor:
    """The logits (N, C) of image features (N, D). Raises UserError for a model that diverged."""
    weight, bias = head
    logits = images @ weight.t() + bias
    if not logits.isfinite().all():
        raise UserError(
            "the model's scores are not numbers: it diverged; train it again with a lower --lr"
        )
    return logits


def classification(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Metrics of scores (N, C) against labels (N,), in percent.

    top-1, top-3 and top-5; the Wilson 95% interval of top-1; the mean of the accuracies of the
    classes that occur (the dataset's official measure); precision, recall and F1 weighted by
    class size.
    """
    # Here, as training starts without it: it takes more than a second, as does pandas below.
    from sklearn.metrics import precision_recall_fscore_support, top_k_accuracy_score

    n, n_classes = scores.shape
    y = labels.numpy()
    predicted = _top1(scores)
    # Of few classes, each is among the best.
    correct = {1: int((predicted == y).sum()), 3: n, 5: n}
    for k in (3, 5):
        if k < n_classes:
            correct[k] = top_k_accuracy_score(
                y, scores.double().numpy(), k=k, labels=np.arange(n_classes), normalize=False
            )
    # A class that is never predicted has precision 0.
    options = {"labels": np.unique(y), "zero_division": 0}
    _, recalls, _, _ = precision_recall_fscore_support(y, predicted, **options)
    precision, recall, f1, _ = precision_recall_fscore_support(
        y, predicted, average="weighted", **options
    )
    # Over images alone: it says nothing about other seeds.
    low, high = wilson(int(correct[1]), n)
    return {
        "n": n,
        "top1": 100 * correct[1] / n,
        "top1_low": low,
        "top1_high": high,
        "top3": 100 * correct[3] / n,
        "top5": 100 * correct[5] / n,
        "mean_per_class": 100 * recalls.mean(),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "f1": 100 * f1,
    }


def probability_scores(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """NLL, Brier score and ECE of logits (N, C) against labels (N,): see `calibration.scores`."""
    return calibration.scores(logits.numpy(), labels.numpy(), _top1(logits))


def base_to_new(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Top-1 of the base and of the new classes, each among its own kind, and the harmonic mean.

    In percent, with Wilson 95% intervals. Base classes are the first half (CoCoOp, Zhou et al.
    2022). Empty if either half has no image.
    """
    n_base = base_classes(scores.shape[1])
    is_base = labels < n_base  # (N,)
    if is_base.all() or not is_base.any():
        return {}

    # Each image competes among the classes of its own half only.
    base_top1 = _top1(scores[is_base, :n_base])
    new_top1 = n_base + _top1(scores[~is_base, n_base:])
    predicted = np.empty(len(labels), dtype=np.int64)
    predicted[is_base] = base_top1
    predicted[~is_base] = new_top1
    correct = predicted == labels.numpy()
    return accuracy_of_halves(correct, is_base.numpy())


def accuracy_of_halves(correct: np.ndarray, is_base: np.ndarray) -> dict[str, float]:
    """Accuracy of the base and of the new classes, and the harmonic mean, in percent.

    correct, is_base: (N,) bool, where each image was compared with its own half. With Wilson 95%
    intervals. Empty if either half has no image.
    """
    if is_base.all() or not is_base.any():
        return {}
    metrics = {}
    for name, half in (("base", is_base), ("new", ~is_base)):
        n_correct, n = int(correct[half].sum()), int(half.sum())
        metrics[f"{name}_top1"] = 100 * n_correct / n
        metrics[f"{name}_top1_low"], metrics[f"{name}_top1_high"] = wilson(n_correct, n)

    # Harmonic, as in CoCoOp: a model that gains on base classes and forgets new ones scores low.
    base, new = metrics["base_top1"], metrics["new_top1"]
    metrics["harmonic_mean"] = 2 * base * new / (base + new) if base + new else 0.0
    return metrics


def recall_at(
    scores: torch.Tensor, relevant: torch.Tensor, ks: Sequence[int] = (1, 3, 5, 10)
) -> dict[str, float]:
    """R@k: the percentage of Q queries that have a relevant one of G items among their k best.

    scores, relevant (bool): (Q, G).
    """
    # With fewer items than k, all of them are among the k best.
    n_best = min(max(ks), scores.shape[1])
    best = scores.topk(n_best, dim=1).indices  # (Q, n_best)
    hits = relevant.gather(1, best)
    return {f"R@{k}": 100 * hits[:, :k].any(1).double().mean().item() for k in ks}


def mean_average_precision(scores: torch.Tensor, relevant: torch.Tensor) -> float:
    """The mean over Q queries of the mean precision at their relevant items, in percent.

    scores, relevant (bool): (Q, G); every query has a relevant item.
    """
    from sklearn.metrics import label_ranking_average_precision_score

    precision = label_ranking_average_precision_score(relevant.numpy(), scores.double().numpy())
    return 100 * float(precision)


def retrieval(
    scores: torch.Tensor, relevant: torch.Tensor, ks: Sequence[int] = (1, 3, 5, 10)
) -> dict[str, float]:
    """R@k and mAP, in percent, of Q queries for G items; scores and relevant (bool) are (Q, G)."""
    metrics = recall_at(scores, relevant, ks)
    metrics["mAP"] = mean_average_precision(scores, relevant)
    return metrics


def _class_retrieval(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Retrieval of the class for an image (i2t), and of the images of a class (t2i).

    Classes without images have nothing to be found: they are no queries.
    """
    relevant = F.one_hot(labels, logits.shape[1]).bool()  # (N, C)
    # i2t: an image asks for its one class. t2i: a class asks for all of its images.
    present = labels.unique()  # (classes that occur,)
    i2t = retrieval(logits, relevant)
    t2i = retrieval(logits.t()[present], relevant.t()[present])
    return _prefixed("i2t_", i2t) | _prefixed("t2i_", t2i)


def _caption_retrieval(similarities: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Retrieval between images (rows) and sentences (columns), (N, N), in both directions.

    R@k asks for the sentence of the very image; mAP for all sentences of its class.
    """
    # The i-th sentence is of the i-th image.
    same_image = torch.eye(len(labels), dtype=torch.bool)  # (N, N)
    same_class = labels[:, None] == labels[None]  # (N, N)
    metrics = {}
    for direction, scores in (("i2t", similarities), ("t2i", similarities.t())):
        metrics |= _prefixed(f"caption_{direction}_", recall_at(scores, same_image))
        metrics[f"caption_{direction}_mAP"] = mean_average_precision(scores, same_class)
    return metrics


def _prefixed(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in metrics.items()}


def _top1(scores: torch.Tensor) -> np.ndarray:
    """The best column of each row, (N,)."""
    # topk, not argmax: predictions.csv is made by topk, and a tie must fall to the same class.
    return scores.topk(1, dim=1).indices[:, 0].numpy()


def with_split(split: str, metrics: dict[str, float]) -> dict[str, float]:
    """Metrics under the names that results have: test/top1, ..."""
    return {f"{split}/{name}": value for name, value in metrics.items()}


# -----------------------------------------------------------------------------
# tables


def per_class(
    probabilities: torch.Tensor, labels: torch.Tensor, class_names: Sequence[str]
) -> list[dict]:
    """A row for each class that occurs: how many images, how well, and its most frequent confusion.

    probabilities: (N, C); labels: (N,). Precision, recall and F1 are in percent; `mistaken_for`
    is the name that most of its mistakes have, empty if it has none.
    """
    import pandas as pd
    from sklearn.metrics import precision_recall_fscore_support

    from flowers import figures

    y = labels.numpy()
    predicted = _top1(probabilities)
    classes = np.arange(len(class_names))
    precision, recall, f1, images = precision_recall_fscore_support(
        y, predicted, labels=classes, zero_division=0
    )
    mistakes = figures.count_confusions(y, predicted, len(classes))  # (C true, C predicted)
    np.fill_diagonal(mistakes, 0)  # these were right
    most_frequent = np.array(class_names, dtype=object)[mistakes.argmax(1)]
    table = pd.DataFrame(
        {
            "class": class_names,
            "images": images.astype(int),
            "precision": (100 * precision).round(2),
            "recall": (100 * recall).round(2),
            "f1": (100 * f1).round(2),
            "mistaken_for": np.where(mistakes.any(1), most_frequent, ""),
        }
    )
    return table[table["images"] > 0].to_dict("records")


def predictions(probabilities: torch.Tensor, flowers: Flowers, index: np.ndarray) -> list[dict]:
    """A row for each image: file, label (the name), and the five best names with probabilities.

    probabilities: (N, C); index: (N,), the images' positions in `flowers`.
    """
    n_best = min(5, probabilities.shape[1])
    best, classes = probabilities.topk(n_best, dim=1)  # (N, n_best)
    rows = []
    for i, scores, ranking in zip(index, best.tolist(), classes.tolist()):
        row = {"file": flowers.file_names[i], "label": flowers.class_names[flowers.labels[i]]}
        for rank, (score, c) in enumerate(zip(scores, ranking), start=1):
            row[f"top{rank}"] = flowers.class_names[c]
            row[f"score{rank}"] = round(score, 6)  # the digits that fp32 has
        rows.append(row)
    return rows


def save_outputs(
    folder: Path,
    probabilities: torch.Tensor,
    flowers: Flowers,
    index: np.ndarray,
    metrics: dict[str, float],
) -> "list[Mistake]":
    """Leave predictions.csv, report.csv, confusion.png and mistakes.png in the run folder.

    And reliability.png, if the metrics have an ECE. Returns the mistakes, most confident first.
    """
    # Here, as it loads matplotlib: neither the first step of training nor the page waits for that.
    from flowers import figures

    labels = flowers.labels[index]
    names = flowers.class_names
    report = per_class(probabilities, torch.from_numpy(labels), names)
    write_csv(folder / "predictions.csv", predictions(probabilities, flowers, index))
    write_csv(folder / "report.csv", report)
    figures.confusion_matrix(probabilities.numpy(), labels, names, folder / "confusion.png")
    mistakes = figures.mistakes(probabilities.numpy(), flowers, index)
    figures.mistakes_sheet(mistakes, folder / "mistakes.png")
    if "ece" in metrics:
        _draw_reliability(probabilities, labels, metrics, folder / "reliability.png")
    return mistakes


def _draw_reliability(
    probabilities: torch.Tensor, labels: np.ndarray, metrics: dict[str, float], path: Path
) -> None:
    import pandas as pd

    from flowers import figures

    confidence = probabilities.max(1).values.numpy()  # (N,)
    correct = _top1(probabilities) == labels
    rows = reliability(confidence, correct)
    title = (
        f"{len(labels):,} images: ECE {_with_interval('ece', metrics)}%\n"
        f"NLL {_with_interval('nll', metrics)} nats"
    )
    figures.reliability(pd.DataFrame(rows), confidence, path, title)


def reliability(confidence: np.ndarray, correct: np.ndarray) -> list[dict]:
    """A row for each bin of the ECE: images, mean confidence and accuracy, in percent.

    confidence: (N,), of the best class. correct: (N,) bool. The accuracy has its Wilson 95%
    interval, `low` and `high`.
    """
    rows = []
    bins = calibration.assign_bins(confidence)
    for b in np.unique(bins):
        in_bin = bins == b
        n_images, n_correct = int(in_bin.sum()), int(correct[in_bin].sum())
        low, high = wilson(n_correct, n_images)
        rows.append(
            {
                "images": n_images,
                "confidence": 100 * float(confidence[in_bin].mean()),
                "accuracy": 100 * n_correct / n_images,
                "low": low,
                "high": high,
            }
        )
    return rows


def prompts_in_words(
    templates: Sequence[str] | None,
    head: Head,
    prompts_file: str | None = None,
    sentences: Prompts | None = None,
) -> str:
    """What class names are turned into, for tables: a template or several, a file, or nothing."""
    if _is_learned(head):
        return "none (a linear head)"
    if sentences is not None:
        return describe_prompts(prompts_file, sentences)
    return templates_in_words(templates)


def _is_learned(head: Head) -> bool:
    """Whether a head is other than a zero-shot one, whose rows have one length, and no bias."""
    weight, bias = head
    lengths = weight.double().norm(dim=1)  # (C,), all of them the model's scale
    return bool(bias.any()) or not torch.allclose(lengths, lengths.mean(), rtol=1e-6, atol=0)


def protocol(
    flowers: Flowers, split: str, n: int, class_names: str, prompts: str, weights: str
) -> dict:
    """What an accuracy was measured with, as result.json and W&B keep it.

    split: train, val or test; n: its number of images that are evaluated. class_names: as the flag
    says. prompts: as `prompts_in_words` gives them. weights: where the model comes from.
    """
    return {
        "dataset": flowers.name,
        "split": split,
        # In words, such as "CoOp's"; the value of --splits is the key `splits` of result.json.
        "convention": flowers.protocol,
        "images": n,
        "class_names": class_names,
        "prompts": prompts,
        "weights": weights,
    }


def protocol_line(protocol: dict, overlap: int | str | None = None) -> str:
    """A protocol in one line, for above a table and the heading of a report.

    overlap: how many of its images the model was trained on, "unknown", or None.
    """
    line = (
        f"{protocol['dataset']}, {protocol['split']} ({protocol['convention']} splits), "
        f"{protocol['images']:,} images; {protocol['class_names']} names; "
        f"prompts: {protocol['prompts']}; weights: {protocol['weights']}"
    )
    if protocol.get("probabilities"):
        line += f"; probabilities: {protocol['probabilities']}"
    if overlap:
        line += f"; TRAINED ON: {overlap} of these images"
    return line


def recorded_protocol(run: str | Path, split: str) -> str:
    """The protocol line of an earlier run. Older runs have not recorded all of it."""
    result = checked(read_json(Path(run) / "result.json"))
    unknown = "not recorded"
    templates = result.get("prompt_template") or []
    recorded = {
        "dataset": result.get("dataset", result.get("data_root", unknown)),
        "split": split,
        "convention": result.get("convention", result.get("splits", unknown)),
        "images": result.get(f"{split}/n", 0),
        "class_names": result.get("class_names", unknown),
        "prompts": result.get("prompts") or templates_in_words(templates) or unknown,
        "weights": result.get("weights", result.get("architecture", unknown)),
        "probabilities": result.get("probabilities"),
    }
    return protocol_line(recorded, result.get("overlap"))


def recorded(compare: Sequence[str], split: str) -> tuple[dict[str, dict], dict[str, str]]:
    """The metrics and the protocol lines of earlier runs on a split, by their names.

    Raises UserError for a run without a result on this split.
    """
    metrics = {Path(run).name: runs.read_metrics(run, split) for run in compare}
    protocols = {Path(run).name: recorded_protocol(run, split) for run in compare}
    return metrics, protocols


def results_table(
    name: str,
    metrics: dict[str, float],
    protocol: dict,
    compared: tuple[dict[str, dict], dict[str, str]] = ({}, {}),
) -> str:
    """`format_table` of a run with its protocol, behind those that it is compared with.

    compared: of `recorded`.
    """
    overlap = protocol.get("overlap")
    seen = {"overlap": overlap} if overlap else {}
    columns, lines = compared
    columns = columns | {name: metrics | seen}
    return format_table(columns, lines | {name: protocol_line(protocol, overlap)})


def format_table(
    results: dict[str, dict[str, float]], protocols: dict[str, str] | None = None
) -> str:
    """Results as text, a column for each name and a row for each metric that any of them has.

    Percentages have two digits, NLL and Brier score three, and their interval behind them where
    there is one. Above stands what the columns of each name are measured on: `protocols`, a line
    for each.
    """
    columns = [_table_column(metrics) for metrics in results.values()]
    keys = dict.fromkeys(key for column in columns for key in column)
    lines = [["", *results]]
    for key in keys:
        lines.append([key, *(column.get(key, "") for column in columns)])
    # The names are a line like the others: as headers, tabulate would give them wider columns.
    alignment = ["left"] + ["right"] * len(columns)
    table = tabulate(lines, tablefmt="plain", disable_numparse=True, colalign=alignment)
    above = [f"{name}: {line}" for name, line in (protocols or {}).items()]
    return "\n".join([*above, table])


def _table_column(metrics: dict[str, float]) -> dict[str, str]:
    column = {}
    for key, value in metrics.items():
        if key.endswith(("_low", "_high")):
            continue  # they stand behind the metric that they belong to
        if key == "n":
            column["images"] = f"{value:,}"
            if metrics.get("overlap"):
                column["trained on"] = str(metrics["overlap"])
            continue
        if key == "overlap":
            continue  # it stands below the number of images
        column[key] = _with_interval(key, metrics)
    return column


def _with_interval(key: str, metrics: dict[str, float]) -> str:
    """A metric as text, and its interval behind it if it has one, as 95.20 [93.7, 96.3]."""
    # Percentages have fewer digits than what is about 1.
    digits, digits_of_ends = (3, 3) if key in ("nll", "brier", "nll_calibrated") else (2, 1)
    text = f"{metrics[key]:.{digits}f}"
    if f"{key}_low" in metrics:
        low, high = metrics[f"{key}_low"], metrics[f"{key}_high"]
        text += f" [{low:.{digits_of_ends}f}, {high:.{digits_of_ends}f}]"
    return text


# -----------------------------------------------------------------------------
# WiSE-FT


def load_starting_weights(run: str) -> dict[str, torch.Tensor]:
    """Load the weights that a run of train.py started from, or the runs of a soup.

    run: its folder, or a file in it. Raises UserError if it is no run of train.py, one that left
    the weights as they were, or if its start has changed since.
    """
    folder, args = _arguments_of_training(run)
    # As train.py does before it makes the random weights of `tiny`.
    devices.seed_everything(args["seed"])
    # Runs of older versions have no `activation`, and no `start`.
    start = load_model(args["architecture"], activation=args.get("activation")).state_dict()
    if args.get("start") not in (None, frozen.fingerprint(start).hex()):
        raise UserError(
            f"{args['architecture']} has changed since {folder} started from it: its weights are "
            "others"
        )
    return start


def _arguments_of_training(run: str) -> tuple[Path, dict]:
    """The folder and args.json of a run of train.py, or of a soup, that changed the weights.

    Raises UserError if it is none.
    """
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    try:
        args = checked(read_json(folder / "args.json"))
        # An evaluation has no strategy; that of a soup says where its runs started.
        needed = {"architecture", "seed", "start" if args.get("soup") else "strategy"}
        if not needed <= args.keys():
            raise ValueError
    except (OSError, ValueError):
        raise UserError(
            f"{run} is no run of train.py, whose args.json says where the weights started"
        ) from None
    strategy = args.get("strategy")
    if strategy in KEEPS_WEIGHTS:
        raise UserError(
            f"{folder} was trained with --strategy {strategy}, which leaves the weights as they "
            "were: there is nothing to interpolate"
        )
    return folder, args


def interpolate(
    model: CLIP, start: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], alpha: float
) -> None:
    """Give the model the weights (1 - alpha) * start + alpha * tuned (Wortsman et al. 2022).

    start, tuned: state dicts of the same model. Raises UserError if they are not.
    """
    if _shapes(start) != _shapes(tuned):
        raise UserError(
            "the file of weights that the run started from now holds another model: "
            "--wise_ft needs the one that it was trained from"
        )
    state = {}
    for name, weight in tuned.items():
        # BatchNorm's running statistics are interpolated, too: they are in the state dict.
        if weight.is_floating_point():
            state[name] = torch.lerp(start[name].to(weight), weight, alpha)
        else:
            state[name] = weight  # BatchNorm's count of batches
    model.load_state_dict(state)


# -----------------------------------------------------------------------------
# soups


def check_soup(soup: Sequence[str]) -> dict:
    """What the runs of a soup started from: architecture, activation, seed and start of args.json.

    Raises UserError unless they are two or more finished runs of train.py that changed the weights,
    all from the same start: elsewhere the mean of weights is no model.
    """
    if len(soup) < 2:
        raise UserError("--soup is a mean of runs: it needs at least two")
    first_folder, first, first_start = _run_of_soup(soup[0])
    folders = [first_folder]
    for run in soup[1:]:
        folder, _, start = _run_of_soup(run)
        if folder.resolve() in [other.resolve() for other in folders]:
            raise UserError(f"--soup: {folder} is there twice")
        if start != first_start:
            raise UserError(
                f"--soup: {folder} started from other weights than {first_folder}, and a mean of "
                "such runs is no model"
            )
        folders.append(folder)
    keys = ("architecture", "activation", "seed")
    return {key: first.get(key) for key in keys} | {"start": first_start}


def _run_of_soup(run: str) -> tuple[Path, dict, str]:
    """The folder, the arguments, and the fingerprint of the start of a run.

    Raises UserError if it can't be a part of a soup.
    """
    folder, args = _arguments_of_training(run)
    # A folder that is called like a model would be loaded as that.
    if runs.run_folder(run) is None:
        raise UserError(f"--soup: {run} is the name of a model: give the path of a run's model.pt")
    if args.get("soup"):
        raise UserError(f"--soup: {folder} is a soup already: give the runs that it is made of")
    if not (folder / "result.json").exists():
        raise UserError(f"--soup: {folder} is not finished: go on with --resume {folder}")
    # An older run did not record it.
    start = args.get("start") or frozen.fingerprint(load_starting_weights(run)).hex()
    return folder, args, start


def load_soup(
    paths: Sequence[str],
    architecture: str,
    device: torch.device | str,
    activation: str | None = None,
) -> CLIP:
    """The model whose weights are the mean of those of the runs (Wortsman et al. 2022, uniform).

    paths: runs that `check_soup` has passed. architecture: what they started from, for the record.
    Raises UserError if they are not of one kind, or contradict `activation`.
    """
    # On the CPU, as not every device has float64.
    soup = load_model(paths[0], activation=activation)

    def states() -> Iterator[dict[str, torch.Tensor]]:
        # One at a time, as all together may not fit into the memory.
        for path in paths:
            model = load_model(path, activation=activation)
            if settings_of(model) != settings_of(soup):
                raise UserError(f"--soup: {path} has other settings than {paths[0]}")
            yield model.state_dict()

    soup.load_state_dict(mean_weights(states()))
    soup.origin = f"a soup of {', '.join(paths)} (from {origin_of(architecture)})"
    return soup.to(device)


def mean_weights(states: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean of state dicts of the same model, computed in float64.

    The statistics of BatchNorm are averaged, too; whole numbers (its count of batches) are those of
    the first. Raises UserError if the shapes differ.
    """
    states = iter(states)
    first = next(states)
    # clone, as double() returns float64 as it is.
    total = {name: weight.double().clone() for name, weight in first.items()}
    n = 1
    for state in states:
        if _shapes(state) != _shapes(first):
            raise UserError("--soup: the runs hold weights of different shapes")
        for name, weight in state.items():
            total[name] += weight
        n += 1
    mean = {}
    for name, weight in first.items():
        mean[name] = (total[name] / n).to(weight) if weight.is_floating_point() else weight
    return mean


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in state.items()}
