"""Finished runs as the report sees them: which may be compared, which differ in their seed alone, which make a whole grid."""

import csv
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from flowers.evaluate import wilson
from flowers.files import checked, read_json
from flowers.models import SHAPES
from flowers.study import statistics

# of args.json, what may differ between runs of one configuration
NOT_SETTINGS = {
    "name",
    "seed",
    "runs",
    "wandb",
    "eval_every",
    "resume",
    "compile",
    "chunk_size",
    "no_cache",
    "data_root",
    "split_sizes",
    "commit",
    "python",
    "versions",
    "device",
    "processes",
    "job",
    "split",
}
OF_STRATEGY = {
    "lr",
    "tau_lr",
    "architecture",
    "strategy",
    "augment",
    "prompt_template",
}  # what may differ between the cells of a factorial grid


@dataclass(frozen=True)
class Run:
    """One finished run: what it was asked (settings), what it found (result), and its answer for each image, sorted by file."""

    name: str
    folder: Path
    result: dict
    settings: dict
    split: str
    labels: np.ndarray  # (N,) names
    predicted: np.ndarray  # (N,) names
    images: str  # digest of files and labels
    architecture: str = ""
    strategy: str = ""  # none: as it came
    trained_on: str = "all"  # classes

    @property
    def seed(self) -> int:
        return self.settings.get("seed") or 0

    @property
    def correct(self) -> np.ndarray:
        return self.labels == self.predicted

    @property
    def top1(self) -> float:
        return self.result[f"{self.split}/top1"]

    @property
    def protocol(self) -> tuple[str, str, str, str]:
        """Split, convention, the classes trained on, and the images with their names: only runs that share it are compared."""
        return self.split, self.settings.get("splits") or "unknown", self.trained_on, self.images


def load(folder: Path) -> tuple[list[Run], list[str]]:
    """The finished runs of a folder, by name, and a line on each that can't be read."""
    found, notes = [], []
    for path in sorted(folder.glob("*/result.json")):
        try:
            result, settings = (
                checked(read_json(path.parent / name)) for name in ("result.json", "args.json")
            )
            if settings.get("batch_size") and settings.get("processes"):
                settings["batch_size"] *= settings["processes"]  # of all together
            split = next((s for s in ("test", "val", "train") if f"{s}/top1" in result), None)
            if split is None:
                continue  # it was trained, and is evaluated by another run
            files, labels, predicted = zip(*sorted(answers(path.parent)))
            if abs(100 * np.mean(np.array(labels) == predicted) - result[f"{split}/top1"]) > 0.01:
                raise ValueError("predictions.csv and result.json disagree")
            images = hashlib.sha256(json.dumps([files, labels]).encode()).hexdigest()[:12]
            found.append(
                Run(
                    path.parent.name,
                    path.parent,
                    result,
                    settings,
                    split,
                    np.array(labels),
                    np.array(predicted),
                    images,
                )
            )
        except (OSError, ValueError) as error:
            notes.append(
                f"{path.parent.name} can't be read: {type(error).__name__} {str(error).replace(str(path.parent), '')}".rstrip()
            )
    return found, notes


def answers(folder: Path) -> list[tuple[str, str, str]]:
    """File, true name and first of the predicted names of each row of a run's predictions.csv. Raises ValueError if it is damaged."""
    try:
        with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
            rows = [
                (row["file"], row["label"], row["top1"])
                for row in csv.DictReader(file, strict=True)
            ]
    except (csv.Error, KeyError) as error:
        raise ValueError(f"predictions.csv is damaged ({type(error).__name__} {error})") from None
    if not rows or not all(map(all, rows)) or len({file for file, *_ in rows}) < len(rows):
        raise ValueError("predictions.csv lacks answers, or lists an image twice")
    return rows


def resolve(found: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Give each run its architecture and strategy, through the run it started from or evaluates; runs that others started from are returned apart.

    The evaluation of a run that is there, on the same images, is that run again: only its curve of WiSE-FT, if it has one, is new.
    """
    by_name = {run.name: run for run in found}

    def parent(run: Run) -> Run | None:
        path = Path(str(run.settings.get("architecture")))
        name = path.parent.name if path.name == "model.pt" else path.name
        return by_name.get(name) if name not in (*SHAPES, run.name) else None

    origins = {p.name for run in found if run.settings.get("job") == "train" and (p := parent(run))}
    named = []
    for run in found:
        origin, trained, seen = run, run, {run.name}
        while (
            up := parent(origin)
        ) and up.name not in seen:  # two damaged runs may each name the other
            origin = up
            seen.add(up.name)
        if run.settings.get("job") == "eval" and (of := parent(run)) and of.name not in origins:
            trained = of
            if (
                of.images == run.images
                and run.settings.get("prompt_template") == of.settings.get("prompt_template")
                and not run.settings.get("wise_ft")
            ):
                continue
            own = {
                k: run.settings.get(k)
                for k in ("job", "splits", "holdout", "class_names", "prompt_template", "wise_ft")
            }
            run = replace(
                run, settings=of.settings | own
            )  # its seed, and what else it was trained with
        strategy, name = (
            trained.settings.get("strategy") or "full",
            str(origin.settings.get("architecture")),
        )
        if run.settings.get("job") == "qwen_eval":
            strategy = f"{'lora' if run.settings.get('adapter') else 'zero-shot'} ({run.settings.get('protocol')})"
        elif trained.settings.get("job") == "eval" and Path(name).name == "model.pt":
            strategy = "unknown"  # a run that is not here
        elif not trained.settings.get("epochs") and strategy != "linear":
            strategy = "none"
        if run.settings.get("job") == "qwen_eval":
            name = f"Qwen {name}" if name in SHAPES else Path(name).name
        elif name not in SHAPES:
            name = Path(name.removesuffix("/model.pt").removesuffix(".pt")).name
        trained_on = trained.settings.get("classes") or "all"
        named.append(
            replace(
                run,
                architecture=name,
                strategy=strategy,
                trained_on="all" if strategy == "none" else trained_on,
            )
        )
    return [r for r in named if r.name not in origins], [r for r in named if r.name in origins]


def grouped(found: Sequence[Run], without: str = "") -> list[list[Run]]:
    """Runs that differ in their seed, and in the setting `without`, alone, sorted by seed; of two with the same settings and seed, the first by name."""
    groups: dict[str, dict[str, Run]] = {}
    for run in sorted(found, key=lambda r: (r.architecture, r.strategy, r.seed, r.name)):
        left_out = (
            NOT_SETTINGS
            | {without}
            | (set() if run.settings.get("learn_temperature") and without != "lr" else {"tau_lr"})
        )
        settings = {k: v for k, v in run.settings.items() if k not in left_out}
        groups.setdefault(json.dumps([run.protocol, settings], sort_keys=True), {}).setdefault(
            json.dumps([run.settings.get(without), run.seed]), run
        )
    return [list(group.values()) for group in groups.values()]


def mean(group: Sequence[Run], key: str = "top1") -> float:
    """Over seeds; nan where a run lacks the metric."""
    return float(np.mean([r.result.get(f"{r.split}/{key}", math.nan) for r in group]))


def interval(group: Sequence[Run]) -> statistics.Interval:
    """Of top-1: Student's t over seeds, cut at 0 and 100%; with one seed, Wilson's over images."""
    if len(group) > 1:
        middle, low, high = statistics.t_interval([r.top1 for r in group])
        return middle, max(low, 0.0), min(high, 100.0)
    return (group[0].top1, *wilson(int(group[0].correct.sum()), len(group[0].correct)))


def best_by_strategy(found: Sequence[Run]) -> list[list[Run]]:
    """The group of the highest mean for each architecture and strategy; the untrained model first."""
    best: dict[tuple, list[Run]] = {}
    for group in grouped(found):
        key = group[0].architecture, group[0].strategy
        if key not in best or mean(group) > mean(best[key]):
            best[key] = group
    return sorted(
        best.values(), key=lambda g: (g[0].architecture, g[0].strategy != "none", g[0].strategy)
    )


@dataclass(frozen=True)
class Grid:
    """A complete grid: runs[strategy, architecture] has a list, by rising learning rate, of {seed: run}."""

    strategies: list[str]
    architectures: list[str]
    seeds: list[int]
    runs: dict[tuple[str, str], list[dict[int, Run]]]
    dropped: list[str]  # levels left out, as they lack cells

    @property
    def rates(self) -> int:
        return len(next(iter(self.runs.values())))


def factorial(found: Sequence[Run]) -> Grid | None:
    """The largest complete strategy x architecture x learning rate grid of runs that share everything else, or None.

    Augmentation and prompt may differ between strategies, as their defaults do, but not within one: the most frequent counts.
    """
    shared: dict[str, list[Run]] = {}
    for run in (r for r in found if r.strategy not in ("none", "linear") and r.settings.get("lr")):
        settings = {k: v for k, v in run.settings.items() if k not in NOT_SETTINGS | OF_STRATEGY}
        shared.setdefault(json.dumps([run.protocol, settings], sort_keys=True), []).append(run)
    grids = []
    for members in shared.values():
        defaults = Counter(
            (r.strategy, json.dumps([r.settings.get(k) for k in ("augment", "prompt_template")]))
            for r in members
        )
        usual = {strategy: value for (strategy, value), _ in reversed(defaults.most_common())}
        cells: dict[tuple, dict] = {}
        for r in members:
            if (
                json.dumps([r.settings.get(k) for k in ("augment", "prompt_template")])
                == usual[r.strategy]
            ):
                cells.setdefault((r.strategy, r.architecture), {}).setdefault(
                    r.settings["lr"], {}
                ).setdefault(r.seed, r)
        grids.append(_complete(cells))
    return max(
        (g for g in grids if g), key=lambda g: len(g.runs) * g.rates * len(g.seeds), default=None
    )


def _complete(cells: dict) -> Grid | None:
    """As long as a cell is missing or has fewer learning rates than the fullest, the level with the largest share of such cells goes."""
    seeds = max(
        (set(by_seed) for by_lr in cells.values() for by_seed in by_lr.values()),
        key=len,
        default=set(),
    )
    cells = {
        k: {lr: by_seed for lr, by_seed in by_lr.items() if seeds <= set(by_seed)}
        for k, by_lr in cells.items()
    }
    rates, dropped = max(map(len, cells.values()), default=0), []
    levels = [sorted({k[i] for k in cells}) for i in (0, 1)]
    while bad := [
        (s, a) for s in levels[0] for a in levels[1] if len(cells.get((s, a), {})) < rates
    ]:
        _, i, level = max(
            (sum(k[i] == level for k in bad) / len(levels[1 - i]), i, level)
            for i in (0, 1)
            for level in levels[i]
        )
        levels[i].remove(level)
        dropped.append(level)
    if min(*map(len, levels), rates) < 2:
        return None
    whole = {
        (s, a): [by_seed for _, by_seed in sorted(cells[s, a].items())]
        for s in levels[0]
        for a in levels[1]
    }
    return Grid(*levels, sorted(seeds), whole, dropped)
