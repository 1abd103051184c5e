"""Finished runs as the report sees them: which may be compared, which differ in their seed alone,
and which form a complete factorial grid."""

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from flowers.choices import SHAPES
from flowers.files import checked, read_json
from flowers.intervals import wilson
from flowers.runs import read_predictions
from flowers.study import statistics

# Keys of args.json that may differ between runs of one configuration: where and how a run was
# made, but not what was trained and evaluated.
NOT_SETTINGS = {
    "name",
    "seed",
    "runs",
    "wandb",
    "eval_every",
    "resume",
    "prompts",  # where the file was; prompts_digest says what was in it
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
    "allow_overlap",
    "start",  # random weights differ with the seed
}

# Settings that may differ between the cells of a factorial grid. The last two have a default that
# depends on the strategy; within a strategy they must be the same.
GRID_SETTINGS = {"lr", "tau_lr", "architecture", "strategy", "augment", "prompt_template"}
STRATEGY_DEFAULTS = ("augment", "prompt_template")

# Settings of an evaluation that replace those of the run that it evaluates.
EVALUATION_SETTINGS = (
    "job",
    "splits",
    "holdout",
    "class_names",
    "prompt_template",
    "prompts",
    "prompts_digest",
    "wise_ft",
)


# -----------------------------------------------------------------------------
# one run


@dataclass(frozen=True)
class Run:
    """One finished run and its prediction for each of N evaluated images, sorted by file name."""

    name: str
    folder: Path
    result: dict  # result.json
    settings: dict  # args.json; batch_size is that of all processes together
    split: str  # test, val or train: the split that it was evaluated on
    labels: np.ndarray  # (N,) true class names
    predicted: np.ndarray  # (N,) predicted class names
    images: str  # digest of the file names and labels
    # The rest is filled in by `resolve`.
    architecture: str = ""  # that of the first run in the chain of starts
    strategy: str = ""  # "none" if the model was not trained
    trained_on: str = "all"  # the classes that were trained on: all, base or new

    @property
    def seed(self) -> int:
        return self.settings.get("seed") or 0

    @property
    def correct(self) -> np.ndarray:
        """(N,) bool."""
        return self.labels == self.predicted

    @property
    def top1(self) -> float:
        """Accuracy in percent."""
        return self.result[f"{self.split}/top1"]

    @property
    def overlap(self) -> int | str:
        """How many of the images the model was trained on; "unknown" if that can't be known."""
        return self.result.get("overlap") or 0

    @property
    def protocol(self) -> tuple[str, str, str, str, bool]:
        """Split, split convention, classes trained on, images with their names, and whether some
        of the images were trained on.

        Only runs with the same protocol are compared.
        """
        # Older runs have not recorded the convention in words.
        convention = self.result.get("convention") or self.settings.get("splits") or "unknown"
        return self.split, convention, self.trained_on, self.images, bool(self.overlap)


def load(folder: Path) -> tuple[list[Run], list[str]]:
    """Return the finished runs in a folder, by name, and a note on each that can't be read.

    Runs without an evaluation are left out: another run evaluates them.
    """
    runs = []
    notes = []
    for path in sorted(folder.glob("*/result.json")):
        run_folder = path.parent
        try:
            run = _load_run(run_folder)
        except (OSError, ValueError) as error:
            # The folder is named already, and its path would differ between machines.
            reason = str(error).replace(str(run_folder), "")
            note = f"{run_folder.name} can't be read: {type(error).__name__} {reason}"
            notes.append(note.rstrip())
            continue
        if run is not None:
            runs.append(run)
    return runs, notes


def _load_run(folder: Path) -> Run | None:
    """Read one run, or return None if it has no accuracy on any split.

    Raises OSError if a file is missing, ValueError if one is damaged or two contradict each other.
    """
    result = checked(read_json(folder / "result.json"))
    settings = checked(read_json(folder / "args.json"))
    # Before there was --precision, it was the device's.
    on_cpu = str(settings.get("device")).startswith("cpu")
    settings.setdefault("precision", "fp32" if on_cpu else "bf16")
    if settings.get("batch_size") and settings.get("processes"):
        # Four processes with 16 images each train as one with 64.
        settings["batch_size"] *= settings["processes"]
    evaluated = [split for split in ("test", "val", "train") if f"{split}/top1" in result]
    if not evaluated:
        return None
    split = evaluated[0]

    # Sorted, so that position i is the same image in all runs of a protocol.
    predictions = read_predictions(folder).sort_values("file")
    files = predictions["file"].tolist()
    labels = predictions["label"].tolist()
    predicted = np.array(predictions["top1"].tolist())
    accuracy = 100 * np.mean(np.array(labels) == predicted)
    if abs(accuracy - result[f"{split}/top1"]) > 0.01:
        raise ValueError("predictions.csv and result.json disagree")
    digest = hashlib.sha256(json.dumps([files, labels]).encode()).hexdigest()
    return Run(
        name=folder.name,
        folder=folder,
        result=result,
        settings=settings,
        split=split,
        labels=np.array(labels),
        predicted=predicted,
        images=digest[:12],
    )


# -----------------------------------------------------------------------------
# runs that start from other runs, or evaluate them


def resolve(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Fill in architecture, strategy and trained_on, through the run that each starts from.

    An evaluation takes the settings of the run that it evaluates. If it repeats that run's own
    evaluation, on the same images with the same prompt, it is dropped, unless it holds a curve of
    WiSE-FT.

    Returns:
        The runs to compare, and apart from them the runs that others started from.
    """
    by_name = {run.name: run for run in runs}
    start_names = set()
    for run in runs:
        parent = _parent(run, by_name)
        if run.settings.get("job") == "train" and parent is not None:
            start_names.add(parent.name)

    compared = []
    starts = []
    for run in runs:
        origin = _origin(run, by_name)
        trained = run
        parent = _parent(run, by_name)
        evaluates = run.settings.get("job") == "eval" and parent is not None
        # A start stands in for pretraining: its evaluation is one of an untrained model.
        if evaluates and parent.name not in start_names:
            trained = parent
            if _repeats(run, trained):
                continue
            settings = dict(trained.settings)  # the seed among them
            for key in EVALUATION_SETTINGS:
                settings[key] = run.settings.get(key)
            run = replace(run, settings=settings)
        architecture, strategy = _describe(run, trained, origin)
        trained_on = trained.settings.get("classes") or "all"
        run = replace(
            run,
            architecture=architecture,
            strategy=strategy,
            trained_on="all" if strategy == "none" else trained_on,
        )
        if run.name in start_names:
            starts.append(run)
        else:
            compared.append(run)
    return compared, starts


def _parent(run: Run, by_name: dict[str, Run]) -> Run | None:
    """The run whose model this one started from or evaluates, if it is among those loaded."""
    path = Path(str(run.settings.get("architecture")))  # runs/NAME or runs/NAME/model.pt
    name = path.parent.name if path.name == "model.pt" else path.name
    if name in SHAPES or name == run.name:
        return None
    return by_name.get(name)


def _origin(run: Run, by_name: dict[str, Run]) -> Run:
    """The first run in the chain of parents."""
    visited = {run.name}
    parent = _parent(run, by_name)
    # Damaged runs may name each other in a circle.
    while parent is not None and parent.name not in visited:
        visited.add(parent.name)
        run = parent
        parent = _parent(run, by_name)
    return run


def _repeats(evaluation: Run, trained: Run) -> bool:
    """Whether an evaluation does again what the run it evaluates did at its end."""
    if evaluation.settings.get("wise_ft"):
        return False
    for key in ("prompt_template", "prompts_digest"):
        if evaluation.settings.get(key) != trained.settings.get(key):
            return False
    return evaluation.images == trained.images


def _describe(run: Run, trained: Run, origin: Run) -> tuple[str, str]:
    """Architecture and strategy under which a run appears in the report.

    Args:
        run: the run itself.
        trained: the run that it evaluates, or the run itself.
        origin: the first run in the chain of starts, which names the architecture.
    """
    architecture = str(origin.settings.get("architecture"))
    path = Path(architecture)
    if run.settings.get("job") == "qwen_eval":
        method = "lora" if run.settings.get("adapter") else "zero-shot"
        name = f"Qwen {architecture}" if architecture in SHAPES else path.name
        return name, f"{method} ({run.settings.get('protocol')})"

    strategy = trained.settings.get("strategy") or "full"
    if trained.settings.get("job") == "eval" and path.name == "model.pt":
        strategy = "unknown"  # it evaluates a run that is not here
    elif not trained.settings.get("epochs") and strategy != "linear":
        strategy = "none"
    is_name = architecture in SHAPES or architecture.startswith(("open_clip:", "hf:"))
    if not is_name:
        architecture = Path(architecture.removesuffix("/model.pt").removesuffix(".pt")).name
    return architecture, strategy


# -----------------------------------------------------------------------------
# runs that differ in their seed alone

Group = list[Run]


def grouped(runs: Sequence[Run], without: str = "") -> list[Group]:
    """Group runs that differ only in their seed and in the setting `without`.

    Each group is sorted by seed. Of two runs with the same settings and seed, the first by name
    counts.
    """
    groups: dict[str, dict[str, Run]] = {}
    ordered = sorted(runs, key=lambda run: (run.architecture, run.strategy, run.seed, run.name))
    for run in ordered:
        ignored = NOT_SETTINGS | {without}
        # The learning rate of the temperature has no effect where the temperature is fixed.
        # Where only lr differs, tau_lr follows it.
        if not run.settings.get("learn_temperature") or without == "lr":
            ignored.add("tau_lr")
        group = groups.setdefault(_configuration(run, ignored), {})
        member = json.dumps([run.settings.get(without), run.seed])
        group.setdefault(member, run)
    return [list(group.values()) for group in groups.values()]


def _configuration(run: Run, ignored: set[str]) -> str:
    """A run's protocol and settings as a key, without those to ignore."""
    # Settings that older runs do not have are None in newer ones, where they are not used.
    settings = {}
    for key, value in run.settings.items():
        if key not in ignored and value is not None:
            settings[key] = value
    return json.dumps([run.protocol, settings], sort_keys=True)


def mean(group: Group, key: str = "top1") -> float:
    """Return the mean of a metric over the seeds of a group; nan where a run lacks it."""
    values = [run.result.get(f"{run.split}/{key}", math.nan) for run in group]
    return float(np.mean(values))


def interval(group: Group) -> statistics.Interval:
    """Return the mean top-1 of a group in percent with its 95% interval, within 0 and 100.

    Student's t over seeds; with one seed, Wilson's interval over images.
    """
    first = group[0]
    if len(group) == 1:
        low, high = wilson(int(first.correct.sum()), len(first.correct))
        return first.top1, low, high
    middle, low, high = statistics.t_interval([run.top1 for run in group])
    return middle, max(low, 0.0), min(high, 100.0)


def best_by_strategy(runs: Sequence[Run]) -> list[Group]:
    """Return the group of highest mean top-1 for each architecture and strategy.

    Sorted by both, the untrained model of each architecture first.
    """
    best: dict[tuple[str, str], Group] = {}
    for group in grouped(runs):
        key = group[0].architecture, group[0].strategy
        if key not in best or mean(group) > mean(best[key]):
            best[key] = group

    def order(group: Group) -> tuple:
        first = group[0]
        return first.architecture, first.strategy != "none", first.strategy

    return sorted(best.values(), key=order)


# -----------------------------------------------------------------------------
# the factorial grid

# (strategy, architecture) -> learning rate -> seed -> run
Cells = dict[tuple[str, str], dict[float, dict[int, Run]]]


@dataclass(frozen=True)
class Grid:
    """A complete grid of strategies, architectures, learning rates and seeds.

    Strategies have learning rates of their own, so a rate's level is its rank within the cell.
    """

    strategies: list[str]
    architectures: list[str]
    seeds: list[int]
    runs: dict[tuple[str, str], list[dict[int, Run]]]  # by rising learning rate, then by seed
    dropped: list[str]  # strategies and architectures left out, as they lack runs

    @property
    def rates(self) -> int:
        """The number of learning rates in each cell."""
        return len(next(iter(self.runs.values())))


def factorial(runs: Sequence[Run]) -> Grid | None:
    """Return the largest complete strategy x architecture x learning rate grid, or None.

    Its runs share all other settings. Augmentation and prompt may differ between strategies, as
    their defaults do, but not within one: there the most frequent ones count.
    """
    candidates: dict[str, list[Run]] = {}
    for run in runs:
        # A linear head has no learning rate: it is fitted by another optimiser.
        if run.strategy in ("none", "linear") or not run.settings.get("lr"):
            continue
        key = _configuration(run, NOT_SETTINGS | GRID_SETTINGS)
        candidates.setdefault(key, []).append(run)

    largest = None
    largest_size = 0
    for members in candidates.values():
        grid = _complete(_cells(members))
        size = len(grid.runs) * grid.rates * len(grid.seeds) if grid else 0
        if size > largest_size:
            largest = grid
            largest_size = size
    return largest


def _strategy_defaults(run: Run) -> str:
    return json.dumps([run.settings.get(key) for key in STRATEGY_DEFAULTS])


def _cells(runs: Sequence[Run]) -> Cells:
    """Sort runs into cells, leaving out those with unusual settings for their strategy."""
    counts: dict[str, Counter] = {}
    for run in runs:
        counts.setdefault(run.strategy, Counter())[_strategy_defaults(run)] += 1
    usual = {strategy: counter.most_common(1)[0][0] for strategy, counter in counts.items()}

    cells: Cells = {}
    for run in runs:
        if _strategy_defaults(run) != usual[run.strategy]:
            continue
        cell = cells.setdefault((run.strategy, run.architecture), {})
        by_seed = cell.setdefault(run.settings["lr"], {})
        by_seed.setdefault(run.seed, run)
    return cells


def _complete(cells: Cells) -> Grid | None:
    """Drop what is incomplete until every cell has the same number of learning rates and seeds.

    Returns None if fewer than two strategies, architectures or learning rates remain.
    """
    # A learning rate counts if it was run with all seeds of the fullest one.
    seeds: set[int] = set()
    for by_rate in cells.values():
        for by_seed in by_rate.values():
            seeds = max(seeds, set(by_seed), key=len)
    full_cells: Cells = {}
    for key, by_rate in cells.items():
        full_rates = {lr: by_seed for lr, by_seed in by_rate.items() if seeds <= set(by_seed)}
        full_cells[key] = full_rates

    rates = max((len(by_rate) for by_rate in full_cells.values()), default=0)
    strategies = sorted({strategy for strategy, _ in full_cells})
    architectures = sorted({architecture for _, architecture in full_cells})
    dropped = _drop_incomplete(full_cells, rates, (strategies, architectures))
    if min(len(strategies), len(architectures), rates) < 2:
        return None
    complete = {}
    for strategy in strategies:
        for architecture in architectures:
            by_rate = full_cells[strategy, architecture]
            complete[strategy, architecture] = [by_rate[lr] for lr in sorted(by_rate)]
    return Grid(strategies, architectures, sorted(seeds), complete, dropped)


def _drop_incomplete(cells: Cells, rates: int, levels: tuple[list[str], list[str]]) -> list[str]:
    """Remove strategies or architectures until every cell has `rates` learning rates.

    The one with the largest share of incomplete cells goes first; of equals, an architecture, and
    of those the last by name. Removes them from `levels`, (strategies, architectures), and returns
    what was removed.
    """
    dropped = []
    while True:
        incomplete = []
        for key in itertools.product(*levels):
            if len(cells.get(key, {})) < rates:
                incomplete.append(key)
        if not incomplete:
            return dropped
        shares = []
        for axis in (0, 1):
            for level in levels[axis]:
                lacking = sum(key[axis] == level for key in incomplete)
                shares.append((lacking / len(levels[1 - axis]), axis, level))
        _, axis, level = max(shares)
        levels[axis].remove(level)
        dropped.append(level)
