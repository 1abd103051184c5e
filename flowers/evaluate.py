"""What a model makes of a split: zero-shot classification, retrieval, a report by class.

Metrics take tensors and return dicts, in percent. N images, C classes, D dimensions.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from sklearn.metrics import (
    label_ranking_average_precision_score,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)
from tabulate import tabulate

from flowers import UserError, devices, figures, strategies
from flowers.data import Flowers, base_classes
from flowers.files import checked, load_tensors, read_json, write_csv
from flowers.models import CLIP, text_features
from flowers.weights import load_model

TEMPLATE = "an image of the {} flower"

# A head turns image features into logits: its weight (C, D) and bias (C,).
Head = tuple[torch.Tensor, torch.Tensor]


# -----------------------------------------------------------------------------
# zero-shot classification


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


def zero_shot_classifier(
    model: CLIP, class_names: Sequence[str], templates: Sequence[str]
) -> torch.Tensor:
    """The normalised mean of the features of each class's prompts, (C, D).

    Prompt ensembling as in Radford et al. 2021, section 3.1.4.
    """
    features = text_features(model, fill_templates(class_names, templates))
    features = features.view(len(class_names), len(templates), -1)  # (C, templates, D)
    return F.normalize(features.mean(1), dim=-1)


def zero_shot_head(model: CLIP, class_names: Sequence[str], templates: Sequence[str]) -> Head:
    """The zero-shot classifier as a head, at the model's temperature."""
    scale = model.logit_scale.exp().item()  # 1 / temperature, about 100 in CLIP
    weight = scale * zero_shot_classifier(model, class_names, templates)
    return weight, torch.zeros(len(weight))


def load_head(
    architecture: str,
    model: CLIP,
    class_names: Sequence[str],
    templates: Sequence[str] | None,
    default: str,
) -> tuple[Head, list[str]]:
    """The head that belongs to a model, and the templates of its prompts.

    A run may have left a linear head or a learned prompt in classifier.pt beside its model.pt.
    Without either, and if the user gave `templates`, it is the zero-shot classifier.

    architecture: what the model was loaded from. default: the template if `templates` is None.
    Raises UserError if classifier.pt is damaged or of other classes.
    """
    source = Path(architecture)
    classifier_file = (source if source.is_dir() else source.parent) / "classifier.pt"
    # The user's own prompts come before anything learned.
    if templates is not None or not source.exists() or not classifier_file.exists():
        templates = templates or [default]
        return zero_shot_head(model, class_names, templates), templates

    learned = load_tensors(classifier_file)
    if _holds_context(learned, model):
        context = learned["context"]  # (context tokens, text width)
        strategies.attach_context(model, context.to(model.token_embedding.weight.device))
        templates = [strategies.context_template(len(context))]
        return zero_shot_head(model, class_names, templates), templates
    if _holds_linear_head(learned, model, class_names):
        # It needs no prompts: the default stands in the record of the run only.
        return (learned["weight"], learned["bias"]), [default]
    raise UserError(
        f"{classifier_file} is damaged, or a classifier of other classes: "
        "give --prompt_template to evaluate by prompts instead"
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
    fits = weight.shape == (n_classes, embedding) and bias.shape == (n_classes,)
    return fits and learned.get("class_names") == list(class_names)


def _is_float_tensor(value) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


# -----------------------------------------------------------------------------
# metrics


def evaluate_features(
    images: torch.Tensor,
    head: Head,
    labels: np.ndarray,
    captions: torch.Tensor | None = None,
) -> tuple[dict[str, float], torch.Tensor]:
    """All metrics of image features (N, D) under a head, and the class probabilities (N, C).

    labels: (N,). captions: (N, D), the feature of one sentence for each image, for retrieval
    between images and sentences. Raises UserError for a model that diverged.
    """
    weight, bias = head
    labels = torch.from_numpy(np.array(labels))  # a copy, as torch has no read-only tensors
    logits = images @ weight.t() + bias  # (N, C)
    if not logits.isfinite().all():
        raise UserError(
            "the model's scores are not numbers: it diverged; train it again with a lower --lr"
        )
    # The keys are those of result.json, in its order.
    metrics = classification(logits, labels)
    metrics |= base_to_new(logits, labels)
    metrics |= _class_retrieval(logits, labels)
    if captions is not None:
        metrics |= _caption_retrieval(images @ captions.t(), labels)
    return metrics, logits.softmax(1)


def classification(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Metrics of scores (N, C) against labels (N,), in percent.

    top-1, top-3 and top-5; the Wilson 95% interval of top-1; the mean of the accuracies of the
    classes that occur (the dataset's official measure); precision, recall and F1 weighted by
    class size.
    """
    n, n_classes = scores.shape
    y = labels.numpy()
    predicted = _top1(scores)
    correct = {1: n, 3: n, 5: n}  # of few classes, each is among the best
    for k in correct:
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
    halves = {
        "base": (scores[is_base, :n_base], labels[is_base]),
        "new": (scores[~is_base, n_base:], labels[~is_base] - n_base),
    }
    metrics = {}
    for name, (half_scores, half_labels) in halves.items():
        n = len(half_labels)
        correct = int((_top1(half_scores) == half_labels.numpy()).sum())
        metrics[f"{name}_top1"] = 100 * correct / n
        metrics[f"{name}_top1_low"], metrics[f"{name}_top1_high"] = wilson(correct, n)

    base, new = metrics["base_top1"], metrics["new_top1"]
    metrics["harmonic_mean"] = 2 * base * new / (base + new) if base + new else 0.0
    return metrics


def wilson(correct: int, n: int) -> tuple[float, float]:
    """The 95% interval, in percent, of a proportion of n independent trials (Wilson 1927)."""
    # scipy's, not statsmodels' proportion_confint: the ends of 0 and n correct are exactly 0 and
    # 100, where statsmodels gives 99.99999999999999 for 1020 of 1020, less than the accuracy.
    interval = binomtest(correct, n).proportion_ci(method="wilson")
    return 100 * interval.low, 100 * interval.high


def recall_at(
    scores: torch.Tensor, relevant: torch.Tensor, ks: Sequence[int] = (1, 3, 5, 10)
) -> dict[str, float]:
    """R@k: the percentage of Q queries that have a relevant one of G items among their k best.

    scores, relevant (bool): (Q, G).
    """
    n_best = min(max(ks), scores.shape[1])
    best = scores.topk(n_best, dim=1).indices  # (Q, n_best)
    hits = relevant.gather(1, best)
    return {f"R@{k}": 100 * hits[:, :k].any(1).double().mean().item() for k in ks}


def mean_average_precision(scores: torch.Tensor, relevant: torch.Tensor) -> float:
    """The mean over Q queries of the mean precision at their relevant items, in percent.

    scores, relevant (bool): (Q, G); every query has a relevant item.
    """
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
    present = labels.unique()  # (classes that occur,)
    i2t = retrieval(logits, relevant)
    t2i = retrieval(logits.t()[present], relevant.t()[present])
    return _prefixed("i2t_", i2t) | _prefixed("t2i_", t2i)


def _caption_retrieval(similarities: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Retrieval between images (rows) and sentences (columns), (N, N), in both directions.

    R@k asks for the sentence of the very image; mAP for all sentences of its class.
    """
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


# -----------------------------------------------------------------------------
# tables


def per_class(
    probabilities: torch.Tensor, labels: torch.Tensor, class_names: Sequence[str]
) -> list[dict]:
    """A row for each class that occurs: how many images, how well, and its most frequent confusion.

    probabilities: (N, C); labels: (N,). Precision, recall and F1 are in percent; `mistaken_for`
    is the name that most of its mistakes have, empty if it has none.
    """
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
            "images": images,
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
    folder: Path, probabilities: torch.Tensor, flowers: Flowers, index: np.ndarray
) -> None:
    """Leave predictions.csv, report.csv, confusion.png and mistakes.png in the run folder."""
    labels = flowers.labels[index]
    names = flowers.class_names
    report = per_class(probabilities, torch.from_numpy(labels), names)
    write_csv(folder / "predictions.csv", predictions(probabilities, flowers, index))
    write_csv(folder / "report.csv", report)
    figures.confusion_matrix(probabilities.numpy(), labels, names, folder / "confusion.png")
    mistakes = figures.mistakes(probabilities.numpy(), flowers, index)
    figures.mistakes_sheet(mistakes, folder / "mistakes.png")


def prompts_in_words(templates: Sequence[str], head: Head, prompts_file: str | None = None) -> str:
    """What class names are turned into, for tables: a template or several, a file, or nothing."""
    _, bias = head
    if bias.any():
        return "none (a linear head)"  # a zero-shot head has no bias
    if prompts_file:
        return f"of {prompts_file}"
    return templates_in_words(templates)


def templates_in_words(templates: Sequence[str]) -> str:
    """Templates in quotes; of more than two, the first, and how many more there are."""
    if len(templates) > 2:
        return f"'{templates[0]}' and {len(templates) - 1} more"
    return " and ".join(f"'{template}'" for template in templates)


def protocol(
    flowers: Flowers, split: str, n: int, class_names: str, prompts: str, weights: str
) -> dict:
    """What an accuracy is the accuracy of, as result.json and W&B keep it.

    split: train, val or test; n: its number of images that are evaluated. class_names: as the flag
    says. prompts: as `prompts_in_words` gives them. weights: where the model comes from.
    """
    return {
        "dataset": flowers.name,
        "split": split,
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
    }
    return protocol_line(recorded, result.get("overlap"))


def format_table(
    results: dict[str, dict[str, float]], protocols: dict[str, str] | None = None
) -> str:
    """Results as text, a column for each name and a row for each metric that any of them has.

    Percentages have two digits, and their interval behind them where there is one. Above stands
    what the columns of each name are measured on: `protocols`, a line for each.
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
        column[key] = f"{value:.2f}"
        if key + "_low" in metrics:
            low, high = metrics[key + "_low"], metrics[key + "_high"]
            column[key] += f" [{low:.1f}, {high:.1f}]"
    return column


# -----------------------------------------------------------------------------
# WiSE-FT


def load_starting_weights(run: str) -> dict[str, torch.Tensor]:
    """Load the weights that a run of train.py started from.

    run: its folder, or a file in it. Raises UserError if it is no run of train.py, or one that
    left the weights as they were.
    """
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    try:
        args = checked(read_json(folder / "args.json"))
        architecture, strategy, seed = args["architecture"], args["strategy"], args["seed"]
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"{folder} is no run of train.py: its args.json says where the weights started"
        ) from None
    if strategy in ("linear", "prompt"):
        raise UserError(
            f"{folder} was trained with --strategy {strategy}, which leaves the weights as they "
            "were: there is nothing to interpolate"
        )
    # As train.py does before it makes the random weights of `tiny`.
    devices.seed_everything(seed)
    # Runs of older versions have no `activation`.
    return load_model(architecture, activation=args.get("activation")).state_dict()


def interpolate(
    model: CLIP, start: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], alpha: float
) -> None:
    """Give the model the weights (1 - alpha) * start + alpha * tuned (Wortsman et al. 2022).

    start, tuned: state dicts of the same model.
    """
    state = {}
    for name, weight in tuned.items():
        if weight.is_floating_point():
            state[name] = torch.lerp(start[name].to(weight), weight, alpha)
        else:
            state[name] = weight  # BatchNorm's count of batches
    model.load_state_dict(state)
