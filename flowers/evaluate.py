"""What a model makes of a split: zero-shot classification, per-class report, retrieval, intervals. Tensors in, dicts out."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import (
    label_ranking_average_precision_score,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

from flowers import UserError, devices, figures, strategies
from flowers.data import Flowers, base_classes
from flowers.files import checked, load_tensors, read_json, write_csv
from flowers.models import CLIP, text_features
from flowers.weights import load_model

TEMPLATE = "an image of the {} flower"


def fill_templates(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every class name in every template, the templates of a class side by side. Raises UserError for a template without {}."""
    for template in templates:
        if "{}" not in template:
            raise UserError(
                f"the prompt template {template!r} has no {{}} where the class name goes"
            )
    return [
        template.replace("{}", name) for name in class_names for template in templates
    ]  # replace: other braces stay as they are


def zero_shot_classifier(
    model, class_names: Sequence[str], templates: Sequence[str]
) -> torch.Tensor:
    """(C, D) weights of length 1: the normalised mean of the features of a class's prompts (Radford et al. 2021, section 3.1.4)."""
    features = text_features(model, fill_templates(class_names, templates))
    return F.normalize(features.view(len(class_names), len(templates), -1).mean(1), dim=-1)


def zero_shot_head(
    model, class_names: Sequence[str], templates: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The zero-shot classifier as weight (C, D) and bias (C,) of the logits, at the model's temperature."""
    weight = model.logit_scale.exp().item() * zero_shot_classifier(model, class_names, templates)
    return weight, torch.zeros(len(weight))


def evaluate_features(
    images: torch.Tensor,
    head: tuple[torch.Tensor, torch.Tensor],
    labels: np.ndarray,
    captions: torch.Tensor | None = None,
) -> tuple[dict[str, float], torch.Tensor]:
    """All metrics of image features (N, D) under a head, weight (C, D) and bias (C,), and the class probabilities (N, C).

    captions (N, D): the feature of one sentence for each image, for the retrieval of image and sentence. Raises UserError for a model that diverged.
    """
    labels, scores = torch.from_numpy(np.array(labels)), images @ head[0].t() + head[1]
    if not scores.isfinite().all():
        raise UserError(
            "the model's scores are not numbers: it diverged; train it again with a lower --lr"
        )
    present = labels.unique()
    metrics = classification(scores, labels) | base_to_new(scores, labels)
    metrics |= {
        f"i2t_{k}": v
        for k, v in retrieval(scores, F.one_hot(labels, scores.shape[1]).bool()).items()
    }
    metrics |= {
        f"t2i_{k}": v
        for k, v in retrieval(scores.t()[present], labels[None] == present[:, None]).items()
    }
    if captions is not None:
        pairs = images @ captions.t()
        own, kin = torch.eye(len(labels), dtype=torch.bool), labels[:, None] == labels[None]
        for way, similarities in (("i2t", pairs), ("t2i", pairs.t())):
            metrics |= {
                f"caption_{way}_{k}": v
                for k, v in retrieval(similarities, own).items()
                if k != "mAP"
            }
            metrics[f"caption_{way}_mAP"] = retrieval(similarities, kin)["mAP"]
    return metrics, scores.softmax(1)


def base_to_new(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Top-1 among the base classes of their images, among the new ones of theirs, and the harmonic mean, in percent, with Wilson 95% intervals
    (CoCoOp, Zhou et al. 2022: the base classes are the first half). Empty if either half has no image."""
    n_base, metrics = base_classes(scores.shape[1]), {}
    for name, mine, columns in (
        ("base", labels < n_base, slice(0, n_base)),
        ("new", labels >= n_base, slice(n_base, None)),
    ):
        n = int(mine.sum())
        if not n:
            return {}
        correct = int(
            (
                _first_of_best(scores[mine, columns]) + (columns.start or 0) == labels[mine].numpy()
            ).sum()
        )
        metrics[f"{name}_top1"], (metrics[f"{name}_top1_low"], metrics[f"{name}_top1_high"]) = (
            100 * correct / n,
            wilson(correct, n),
        )
    base, new = metrics["base_top1"], metrics["new_top1"]
    return metrics | {"harmonic_mean": 2 * base * new / (base + new) if base + new else 0.0}


def classification(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Metrics in percent of scores (N, C) against labels (N,): top-1/3/5 with Wilson 95% intervals of top-1, the mean of the accuracies
    of the classes that occur (the dataset's official measure), and precision, recall and F1 weighted by class size."""
    n, n_classes = scores.shape
    y, s, present = labels.numpy(), scores.double().numpy(), np.unique(labels)
    correct = {
        k: top_k_accuracy_score(y, s, k=k, labels=np.arange(n_classes), normalize=False)
        if k < n_classes
        else n
        for k in (1, 3, 5)
    }
    predicted = _first_of_best(scores)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UndefinedMetricWarning
        )  # a class that is never predicted has precision 0
        _, recalls, _, _ = precision_recall_fscore_support(
            y, predicted, labels=present, zero_division=0
        )
        precision, recall, f1, _ = precision_recall_fscore_support(
            y, predicted, labels=present, average="weighted", zero_division=0
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


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95% interval, in percent, of a share of n independent trials (Wilson 1927)."""
    interval = binomtest(correct, n).proportion_ci(method="wilson")
    return 100 * interval.low, 100 * interval.high


def retrieval(
    scores: torch.Tensor, relevant: torch.Tensor, ks: Sequence[int] = (1, 3, 5, 10)
) -> dict[str, float]:
    """Scores and relevance (Q, G) of Q queries for G items, to percent: R@k, the share of queries with a relevant item among the k best,
    and mAP, the mean over queries of the mean precision at their relevant items. Every query needs a relevant item."""
    best = scores.topk(min(max(ks), scores.shape[1]), dim=1).indices
    hits = relevant.gather(1, best)
    metrics = {f"R@{k}": 100 * hits[:, :k].any(1).double().mean().item() for k in ks}
    return metrics | {
        "mAP": 100
        * float(label_ranking_average_precision_score(relevant.numpy(), scores.double().numpy()))
    }


def per_class(
    probabilities: torch.Tensor, labels: torch.Tensor, class_names: Sequence[str]
) -> list[dict]:
    """A row a class that occurs: images, precision, recall and F1 in percent, and the name it is most often mistaken for."""
    predicted, y = _first_of_best(probabilities), labels.numpy()
    columns = precision_recall_fscore_support(
        y, predicted, labels=np.arange(len(class_names)), zero_division=0
    )
    rows = []
    for c, (precision, recall, f1, n) in enumerate(zip(*columns)):
        wrong = np.bincount(predicted[(y == c) & (predicted != c)], minlength=len(class_names))
        if n:
            rows.append(
                {
                    "class": class_names[c],
                    "images": int(n),
                    "precision": round(100 * precision, 2),
                    "recall": round(100 * recall, 2),
                    "f1": round(100 * f1, 2),
                    "mistaken_for": class_names[wrong.argmax()] if wrong.any() else "",
                }
            )
    return rows


def predictions(probabilities: torch.Tensor, flowers: Flowers, index: np.ndarray) -> list[dict]:
    """A row an image: file, label (the name), and the five best names with their probabilities."""
    values, places = probabilities.topk(min(5, probabilities.shape[1]), dim=1)
    rows = []
    for i, value, place in zip(index, values.tolist(), places.tolist()):
        row = {"file": flowers.files[i].name, "label": flowers.class_names[flowers.labels[i]]}
        for k, (v, c) in enumerate(zip(value, place), 1):
            row |= {f"top{k}": flowers.class_names[c], f"score{k}": round(v, 6)}
        rows.append(row)
    return rows


def save_outputs(
    folder: Path, probabilities: torch.Tensor, flowers: Flowers, index: np.ndarray
) -> None:
    """Leave predictions.csv, report.csv, confusion.png and mistakes.png of an evaluation in the run folder."""
    labels = flowers.labels[index]
    write_csv(folder / "predictions.csv", predictions(probabilities, flowers, index))
    write_csv(
        folder / "report.csv",
        per_class(probabilities, torch.from_numpy(labels), flowers.class_names),
    )
    figures.confusion_matrix(
        probabilities.numpy(), labels, flowers.class_names, folder / "confusion.png"
    )
    figures.mistakes_sheet(
        figures.mistakes(probabilities.numpy(), flowers, index), folder / "mistakes.png"
    )


def format_table(results: dict[str, dict[str, float]]) -> str:
    """Results by name, a column each, as text; percentages with two digits, top-1 with its interval."""

    def cell(metrics: dict, key: str) -> str:
        if key not in metrics:
            return ""
        interval = (
            f" [{metrics[key + '_low']:.1f}, {metrics[key + '_high']:.1f}]"
            if key + "_low" in metrics
            else ""
        )
        return f"{metrics[key]:,}" if key == "n" else f"{metrics[key]:.2f}{interval}"

    keys = [
        k
        for k in dict.fromkeys(k for metrics in results.values() for k in metrics)
        if not k.endswith(("_low", "_high"))
    ]
    rows = [["", *results]] + [
        ["images" if k == "n" else k, *(cell(metrics, k) for metrics in results.values())]
        for k in keys
    ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:])])
        for row in rows
    )


def _first_of_best(scores: torch.Tensor) -> np.ndarray:
    return scores.topk(1, dim=1).indices[:, 0].numpy()


def load_head(
    architecture: str,
    model: CLIP,
    class_names: Sequence[str],
    templates: Sequence[str] | None,
    default: str,
):
    """The head that belongs to a model: what lies in classifier.pt beside it, else its zero-shot classifier; and the templates used.

    templates: the user's own, which come before a learned prompt; None if there are none. Raises UserError if classifier.pt is
    damaged or of other classes.
    """
    path = Path(architecture)
    path = (path if path.is_dir() else path.parent) / "classifier.pt"
    learned = (
        load_tensors(path)
        if Path(architecture).exists() and path.exists() and templates is None
        else None
    )

    def holds(key: str, *shape: int) -> bool:
        value = learned.get(key)
        return (
            isinstance(value, torch.Tensor)
            and value.dtype == torch.float32
            and value.shape == shape
        )

    if learned is not None:
        width, embedding = model.text_projection.shape
        if context := next(
            (m for m in range(1, model.context_length // 2 + 1) if holds("context", m, width)), 0
        ):
            strategies.attach_context(
                model, learned["context"].to(model.token_embedding.weight.device)
            )
            templates = [strategies.context_template(context)]
        elif (
            holds("weight", len(class_names), embedding)
            and holds("bias", len(class_names))
            and learned.get("class_names") == list(class_names)
        ):
            return (learned["weight"], learned["bias"]), [default]
        else:
            raise UserError(
                f"{path} is damaged, or a classifier of other classes: give --prompt_template to evaluate by prompts instead"
            )
    templates = templates or [default]
    return zero_shot_head(model, class_names, templates), templates


def load_starting_weights(run: str) -> dict[str, torch.Tensor]:
    """The weights that a run of train.py started from. Raises UserError if `run` is none, or left the weights as they were."""
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    try:
        args = checked(read_json(folder / "args.json"))
        origin, strategy, seed = args["architecture"], args["strategy"], args["seed"]
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"{folder} is no run of train.py: its args.json says where the weights started"
        ) from None
    if strategy in ("linear", "prompt"):
        raise UserError(
            f"{folder} was trained with --strategy {strategy}, which leaves the weights as they were: there is nothing to interpolate"
        )
    devices.seed_everything(seed)  # as train.py does before it makes random weights
    return load_model(origin).state_dict()


def interpolate(
    model: CLIP, start: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], alpha: float
) -> None:
    """Give the model the weights (1 - alpha) * start + alpha * tuned (WiSE-FT, Wortsman et al. 2022)."""
    model.load_state_dict(
        {
            n: torch.lerp(start[n].to(t), t, alpha) if t.is_floating_point() else t
            for n, t in tuned.items()
        }
    )
