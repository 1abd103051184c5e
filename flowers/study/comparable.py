"""Finished runs as the report sees them: which may be compared, which differ in their seed alone,
and which form a complete factorial grid."""

import hashlib
import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from flowers.choices import (
    FEW_SHOT_EPOCHS,
    KEEPS_WEIGHTS,
    MAX_VAL_SHOTS,
    SHAPES,
    pretraining_family,
    split_architecture,
)
from flowers.files import checked, read_json
from flowers.qwen_settings import protocol_in_words, strategy_in_words
from flowers.runs import (
    SOUP,
    pretraining_of,
    read_duplicate_groups,
    read_predictions,
    strategy_of,
)
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
    "no_cuda_graph",
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
    "pull_by_default",  # says of pull what it is
}

# Settings that older runs lack, and what they did instead. Where a setting is not used its value is
# None, which stands for the same.
OLDER_DEFAULTS = {
    "loss": "info_nce",
    "positives": "class",  # cross_entropy has none: the texts are those of all classes
    "lr_decay": 1.0,
    "ema": 0.0,
    "pull": 0.0,
    "start_from": "random",
    "cross_modal": False,
    "calibrated": False,
}

# Settings that may differ between the cells of a factorial grid. The last three have a default that
# depends on the strategy; within a strategy they must be the same.
GRID_SETTINGS = {"lr", "tau_lr", "architecture", "strategy", "augment", "prompt_template", "pull"}
STRATEGY_DEFAULTS = ("augment", "prompt_template", "pull")

# What is said of steps.
OF_STEPS = ("batch_size", "lr", "tau_lr", "learn_temperature", "positives", "wd")

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
    "soup",
    "calibrated",
)

QWEN_JOBS = ("qwen_eval", "qwen_probe")
# What an evaluation of Qwen takes from the run that trained its adapter.
QWEN_TRAINING = (
    "rank",
    "alpha",
    "also_train",
    "captions",
    "classes",
    "shots",
    "epochs",
    "batch_size",
    "processes",
    "lr",
    "wd",
    "augment",
    "seed",
)
# What both say, so that a difference is one of the setting.
QWEN_SHARED = ("images", "max_pixels", "answer", "question", "list_order", "name_case")
# Settings that older evaluations lack, or that do nothing under another protocol.
QWEN_DEFAULTS = {
    "score": "auto",
    "most_tokens": 80,
    "describe": False,
    "list_order": "given",
    "name_case": "given",
    "classes": "all",
}

# The pretrainings that a name needs no word for: OpenAI's, a stand-in's, and none at all.
PLAIN = ("", "openai", "prompts", "random")


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
    clusters: np.ndarray  # (N,) int from 0: near-duplicates share one; `resolve` joins all runs'
    # The rest is filled in by `resolve`.
    architecture: str = ""  # that of the first run in the chain of starts
    pretraining: str = ""  # what that one's weights were trained on; "" if it is not known
    model: str = ""  # the architecture, with the pretraining where it needs a word
    strategy: str = ""  # "none" if the model was not trained
    trained_on: str = "all"  # the classes that were trained on: all, base or new
    evaluated: str = ""  # of an evaluation: the name of the trained run
    prompts: str = ""  # what tells the texts of the model at the start from others

    @property
    def seed(self) -> int:
        return self.settings.get("seed") or 0

    @property
    def is_qwen(self) -> bool:
        """Whether the model is a Qwen-VL, which no factor of CLIP's is asked of."""
        return self.settings.get("job") in QWEN_JOBS

    @property
    def method(self) -> str:
        """The strategy, and of a linear probe what it starts from and is trained on."""
        variant = []
        if self.settings.get("start_from") not in (None, OLDER_DEFAULTS["start_from"]):
            variant.append(str(self.settings["start_from"]))
        if self.settings.get("cross_modal"):
            variant.append("cross_modal")
        return f"{self.strategy} ({', '.join(variant)})" if variant else self.strategy

    @property
    def start(self) -> tuple[str, str, str, str]:
        """The model before training, with its prompts, and the images that it was evaluated on.

        What training has changed is known only beside an untrained run with the same start.
        """
        weights = _run_name(self.settings.get("architecture"))
        return self.model, weights, self.prompts, self.images

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
    for key, default in OLDER_DEFAULTS.items():
        if settings.get(key) is None:
            settings[key] = default
    # Evaluations of the run take its settings, so that this is among them.
    settings["chosen_on"] = result.get("chosen_on")
    if settings.get("job") in QWEN_JOBS:
        settings = _qwen_settings(settings, result, folder)
    if settings.get("batch_size") and settings.get("processes"):
        # Four processes with 16 images each train as one with 64.
        settings["batch_size"] *= settings["processes"]
    if settings.get("pull_by_default"):
        settings["pull"] = "by images a class"  # one setting, whatever number it came to
    soup = settings.get("soup")
    if soup and not (isinstance(soup, list) and all(isinstance(path, str) for path in soup)):
        raise ValueError("the soup in args.json is not a list of runs")
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
    clusters = read_clusters(folder, files)
    return Run(
        name=folder.name,
        folder=folder,
        result=result,
        settings=settings,
        split=split,
        labels=np.array(labels),
        predicted=predicted,
        images=digest[:12],
        clusters=clusters,
    )


def _qwen_settings(settings: dict, result: dict, folder: Path) -> dict:
    """The settings of an evaluation of Qwen, with those of the training of its adapter.

    One evaluates what the other trained, and they make one row: `protocol` says how it was asked.
    Where they disagree on what was shown or asked, the training's is `trained_...`.
    """
    trained = _training_of_adapter(settings, folder)
    merged = dict(settings)
    # Which images, their digest says; in batches of another size they are the same.
    merged |= dict.fromkeys(("images", "batch_size"))
    # How they were asked, the protocol says.
    merged["protocol"] = protocol_in_words(settings, result)
    said = ("list_names", "features", "chosen_on", "val_shots", "inverse_penalty")
    merged |= dict.fromkeys(said)
    for key, default in QWEN_DEFAULTS.items():
        if merged.get(key) == default:
            merged[key] = None
    if not trained:
        return merged

    merged["adapter"] = None  # its settings stand for it
    for key in QWEN_TRAINING:
        # A probe has images of its own to be fitted to.
        if key == "shots" and settings["job"] == "qwen_probe":
            continue
        merged[key] = trained.get(key)
    if merged["alpha"] == 2 * (merged["rank"] or 0):
        merged["alpha"] = None  # it follows the rank by default
    seen = trained.get("shots") and trained["shots"] * trained.get("epochs", 0)
    merged["seen"] = seen or None  # images of a class, over all epochs
    for key in QWEN_SHARED:
        if trained.get(key) != settings.get(key):
            merged[f"trained_{key}"] = trained.get(key) or None
    for key in ("list_names", "shots"):
        if key not in merged or trained.get(key) != merged[key]:
            merged[f"trained_{key}"] = trained.get(key) or None
    return merged


def _training_of_adapter(settings: dict, folder: Path) -> dict:
    """The args.json of the run that trained an adapter; {} if there is none, or it is elsewhere."""
    adapter = settings.get("adapter")
    if not adapter:
        return {}
    path = Path(adapter)
    name = path.parent.name if path.name == "adapter" else path.name
    # Beside it first: the folder of all runs may have been moved.
    for run_folder in (folder.parent / name, path.parent / name):
        if (run_folder / "args.json").exists():
            trained = checked(read_json(run_folder / "args.json"))
            if trained.get("job") == "qwen_train":
                return trained
    return {}


def read_clusters(folder: Path, files: Sequence[str]) -> np.ndarray:
    """The cluster of each of a run's files, (N,) int from 0: near-duplicates share one.

    Older runs have not looked for near-duplicates: each image is a cluster of its own. Raises
    ValueError if duplicates.json is damaged.
    """
    first_of = {}  # file -> the first file of its group
    for group in read_duplicate_groups(folder):
        first_of.update(dict.fromkeys(group, group[0]))
    return np.unique([first_of.get(file, file) for file in files], return_inverse=True)[1]


# -----------------------------------------------------------------------------
# runs that start from other runs, or evaluate them


def resolve(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Fill in what a run's model is and how it was trained, through the run that it starts from.

    An evaluation takes the settings of the run that it evaluates. If it repeats that run's own
    evaluation, on the same images with the same prompt, it is dropped, unless it holds a curve of
    WiSE-FT, is calibrated, or is of a soup. A soup, the mean of the weights of several runs, has
    their architecture and classes, and their strategy with `SOUP` behind it; settings that they do
    not share are "mixed". An evaluation of a soup's folder is one of the soup.

    Returns:
        The runs to compare, and apart from them the runs that others started from.
    """
    by_name = {run.name: run for run in runs}
    start_names = set()
    for run in runs:
        parent = _parent(run, by_name)
        if run.settings.get("job") == "train" and parent is not None:
            start_names.add(parent.name)

    resolved = []
    for run in runs:
        soup = _soup_evaluated(run, by_name)
        if soup is not None and soup.name not in start_names:
            if _repeats(run, soup):
                continue
            run = replace(run, settings=run.settings | {"soup": soup.settings["soup"]})
        trained = run
        parent = _parent(run, by_name)
        evaluates = run.settings.get("job") == "eval" and parent is not None
        # A start stands in for pretraining: its evaluation is one of an untrained model.
        if evaluates and parent.name not in start_names:
            trained = _as_one(run, parent, by_name)
            if _repeats(run, trained):
                continue
            settings = dict(trained.settings)  # the seed among them
            for key in EVALUATION_SETTINGS:
                settings[key] = run.settings.get(key)
            run = replace(run, settings=settings, evaluated=parent.name)
        origin = _origin(run, by_name)
        strategy = _strategy(run, trained, by_name)
        trained_on = _trained_on(run, trained, by_name)
        run = replace(
            run,
            architecture=_architecture(origin, run.is_qwen),
            pretraining=_pretraining(origin, origin.name in start_names),
            strategy=strategy,
            trained_on="all" if strategy == "none" else trained_on,
        )
        resolved.append(run)
    resolved = _with_prompts(_with_model_names(_with_families(resolved)))
    resolved = _with_joined_clusters(resolved)
    compared = [run for run in resolved if run.name not in start_names]
    starts = [run for run in resolved if run.name in start_names]
    return compared, starts


def _with_families(runs: Sequence[Run]) -> list[Run]:
    """Name open_clip's weights by their family, unless an architecture has two tags of it.

    Architectures have tags of their own, so that only families can be crossed with them. But
    datacomp_m and datacomp_xl are two pretrainings of one architecture.
    """
    tags = defaultdict(set)
    for run in runs:
        tags[pretraining_family(run.pretraining), run.architecture].add(run.pretraining)
    ambiguous = {family for (family, _), found in tags.items() if len(found) > 1}
    named = []
    for run in runs:
        family = pretraining_family(run.pretraining)
        pretraining = run.pretraining if family in ambiguous else family
        named.append(replace(run, pretraining=pretraining))
    return named


def _with_model_names(runs: Sequence[Run]) -> list[Run]:
    """Name the model of each run: its architecture, and the pretraining where that is not plain.

    Where an architecture comes with several pretrainings, all of them are named.
    """
    pretrainings = defaultdict(set)
    for run in runs:
        pretrainings[run.architecture].add(run.pretraining)
    named = []
    for run in runs:
        plain = run.pretraining in PLAIN and len(pretrainings[run.architecture]) == 1
        if plain or not run.pretraining:
            named.append(replace(run, model=run.architecture))
        else:
            named.append(replace(run, model=f"{run.architecture} ({run.pretraining})"))
    return named


def _with_prompts(runs: Sequence[Run]) -> list[Run]:
    """Say of each run which texts its model had at the start.

    An untrained model can't be asked by a linear head or a learned prompt: theirs are the texts of
    most of the runs on the same images.
    """
    counts = defaultdict(Counter)
    for run in runs:
        if not _learns_texts(run):
            counts[run.images][_texts(run)] += 1
    named = []
    for run in runs:
        prompts = _texts(run)
        others = counts[run.images]
        if _learns_texts(run) and others:
            # Of equals the first in the alphabet, in whatever order the runs come.
            prompts = min(others, key=lambda texts: (-others[texts], texts))
        named.append(replace(run, prompts=prompts))
    return named


def _with_joined_clusters(runs: Sequence[Run]) -> list[Run]:
    """Give all runs on the same images the same clusters: near-duplicates in any are in all."""
    clusterings = defaultdict(dict)  # images -> bytes -> clusters, as most runs have the same
    for run in runs:
        clusterings[run.images][run.clusters.tobytes()] = run.clusters
    joined = {
        images: joined_clusters(list(found.values())) for images, found in clusterings.items()
    }
    return [replace(run, clusters=joined[run.images]) for run in runs]


def joined_clusters(clusterings: list[np.ndarray]) -> np.ndarray:
    """The finest clusters (N,) in which all are together that are so in one of `clusterings`."""
    n = len(clusterings[0])
    # Each image has an edge to the first one of its cluster.
    firsts = [np.unique(clusters, return_index=True)[1][clusters] for clusters in clusterings]
    edges = np.tile(np.arange(n), len(clusterings)), np.concatenate(firsts)
    graph = coo_array((np.ones(len(edges[0])), edges), shape=(n, n))
    return connected_components(graph, directed=False)[1]


def _learns_texts(run: Run) -> bool:
    return run.strategy.removesuffix(SOUP) in KEEPS_WEIGHTS


def _texts(run: Run) -> str:
    """The templates of a run, or the digest of its file of sentences."""
    return json.dumps([run.settings.get(key) for key in ("prompt_template", "prompts_digest")])


def _parent(run: Run, by_name: dict[str, Run]) -> Run | None:
    """The run whose model this one started from or evaluates, if it is among those loaded.

    A soup is the mean of several runs: the first stands for all.
    """
    soup = run.settings.get("soup")
    name = _run_name(soup[0] if soup else run.settings.get("architecture"))
    if name in SHAPES or name == run.name:
        return None
    return by_name.get(name)


def _soup_evaluated(run: Run, by_name: dict[str, Run]) -> Run | None:
    """The soup whose folder an evaluation names as its model; None of other runs."""
    parent = _parent(run, by_name)
    is_evaluation = run.settings.get("job") == "eval" and not run.settings.get("soup")
    return parent if is_evaluation and parent and parent.settings.get("soup") else None


def _run_name(path: str | None) -> str:
    """The name of the run at runs/NAME or runs/NAME/model.pt."""
    path = Path(str(path))
    return path.parent.name if path.name == "model.pt" else path.name


def elsewhere(runs: Sequence[Run]) -> set[str]:
    """Return the names of the evaluations on a dataset that no run was trained on.

    runs: as `load` returns them. A dataset is told by its folder, or by its name and classes where
    the folder has another place. Without a trained run, no dataset is another one.
    """
    trained = [run for run in runs if run.settings.get("job") == "train"]
    roots = {run.settings.get("data_root") for run in trained}
    datasets = {_dataset(run) for run in trained}
    names = set()
    for run in runs:
        is_known = run.settings.get("data_root") in roots or _dataset(run) in datasets
        if trained and run.settings.get("job") == "eval" and not is_known:
            names.add(run.name)
    return names


def _dataset(run: Run) -> tuple:
    # The classes, too: copies of some of Oxford's folders bear its name.
    return run.result.get("dataset"), frozenset(run.labels.tolist())


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
    # A calibrated evaluation has the same accuracy, but other probabilities.
    if any(evaluation.settings.get(key) for key in ("wise_ft", "soup", "calibrated")):
        return False
    for key in ("prompt_template", "prompts_digest"):
        if evaluation.settings.get(key) != trained.settings.get(key):
            return False
    return evaluation.images == trained.images


def _architecture(origin: Run, is_qwen: bool) -> str:
    """Architecture under which a run appears in the report.

    origin: the first run in the chain of starts, which names the architecture.
    """
    architecture = str(origin.settings.get("architecture"))
    if is_qwen:
        return f"Qwen {architecture}" if architecture in SHAPES else Path(architecture).name
    architecture, _ = split_architecture(architecture)
    is_name = architecture in SHAPES or architecture.startswith(("open_clip:", "hf:"))
    if not is_name:
        architecture = Path(architecture.removesuffix("/model.pt").removesuffix(".pt")).name
    return architecture


def _strategy(run: Run, trained: Run, by_name: dict[str, Run]) -> str:
    """Strategy under which a run appears in the report. trained: the run that it evaluates, or it
    itself.
    """
    if run.is_qwen:
        return _qwen_strategy(run)
    # It is recorded of models that a run made: where that run is not here, nothing says how.
    is_of_a_run = run.settings.get("job") == "eval" and "overlap" in run.result
    if is_of_a_run and not run.settings.get("soup") and _parent(run, by_name) is None:
        return "unknown"
    members = []
    if run.settings.get("soup"):
        # Without the runs that it is the mean of, nothing says how they were trained.
        members = [None] if trained is run else _members(run, by_name)
    return strategy_of(trained.settings, [member and member.settings for member in members])


def _qwen_strategy(run: Run) -> str:
    """Training and protocol of a Qwen run: zero-shot (rank), lora (rank), linear (probe of ...)."""
    # An adapter whose run is not here has no known rank.
    is_tuned = bool(run.settings.get("adapter") or run.settings.get("rank"))
    return strategy_in_words(run.settings["job"], is_tuned, run.settings["protocol"])


def _members(run: Run, by_name: dict[str, Run]) -> list[Run | None]:
    """The runs that a soup is the mean of, None where one is not among those loaded."""
    return [by_name.get(_run_name(path)) for path in run.settings.get("soup") or []]


def _as_one(run: Run, trained: Run, by_name: dict[str, Run]) -> Run:
    """The run that an evaluation is of; of a soup the first, with "mixed" where others differ."""
    members = _members(run, by_name)
    if None in members:
        return replace(trained, settings=trained.settings | {"strategy": "unknown"})
    mixed = {}
    for member in members:
        for key in trained.settings.keys() | member.settings.keys():
            differs = trained.settings.get(key) != member.settings.get(key)
            if differs and key not in NOT_SETTINGS:
                mixed[key] = "mixed"
    return replace(trained, settings=trained.settings | mixed)


def _trained_on(run: Run, trained: Run, by_name: dict[str, Run]) -> str:
    """The classes that a model was trained on: all, base or new; of a soup those of its runs."""
    members = [member for member in _members(run, by_name) if member is not None] or [trained]
    classes = {member.settings.get("classes") or "all" for member in members}
    return " and ".join(sorted(classes))


def _pretraining(origin: Run, is_start: bool) -> str:
    """What the weights were trained on with which a chain of runs begins."""
    return "" if origin.is_qwen else pretraining_of(origin.settings, is_start)


# -----------------------------------------------------------------------------
# runs that differ in their seed alone

Group = list[Run]


def grouped(runs: Sequence[Run], without: str = "") -> list[Group]:
    """Group runs that differ only in their seed and in the setting `without`.

    Each group is sorted by seed. Of two runs with the same settings and seed, the first by name
    counts.
    """
    groups: dict[str, dict[str, Run]] = {}
    for run in sorted(runs, key=lambda run: (run.model, run.method, run.seed, run.name)):
        ignored = NOT_SETTINGS | {without}
        # Where only lr differs, tau_lr follows it.
        if without == "lr":
            ignored.add("tau_lr")
        # Fewer images take more epochs for as many steps, where ablate.py says how many.
        if without == "shots" and (_takes_few_shot_epochs(run) or run.is_qwen):
            ignored.add("epochs")
        # Of Qwen, how often a class was seen is what stays.
        if without != "shots":
            ignored.add("seen")
        group = groups.setdefault(_configuration(run, ignored), {})
        member = json.dumps([run.settings.get(without), run.seed])
        group.setdefault(member, run)
    return [list(group.values()) for group in groups.values()]


def _takes_few_shot_epochs(run: Run) -> bool:
    epochs = run.settings.get("epochs")
    return epochs is not None and epochs == FEW_SHOT_EPOCHS.get(run.settings.get("shots"))


def _configuration(run: Run, ignored: set[str]) -> str:
    """A run's protocol and settings as a key, without those to ignore."""
    # Settings that older runs do not have are None in newer ones, where they are not used.
    settings = {}
    for key, value in _effective_settings(run).items():
        if key not in ignored and value is not None:
            settings[key] = value
    return json.dumps([run.protocol, settings], sort_keys=True)


def _effective_settings(run: Run) -> dict:
    """A run's settings, None where one does nothing, and in words where one follows another."""
    settings = dict(run.settings)
    # A logistic regression has no steps. Older runs have recorded the flags all the same.
    if run.settings.get("strategy") == "linear":
        settings |= dict.fromkeys(OF_STEPS)
    # The rate at which the temperature is learned, and the bias of the sigmoid loss. By default it
    # is lr, and so it is no difference between a loss that has a bias and one that has none.
    learns_scale = settings.get("learn_temperature") or settings["loss"] == "sigmoid"
    if not learns_scale or settings.get("tau_lr") == settings.get("lr"):
        settings["tau_lr"] = None

    # The protocol says which images are evaluated. But a probe chooses its penalty on images of
    # val, and calibration its temperature; by default there are as many as to train on.
    chooses = settings["chosen_on"] == "val" or settings.get("calibrated")
    val_shots, shots = settings.get("val_shots"), settings.get("shots")
    if not chooses:
        settings["val_shots"] = None
    elif val_shots and shots and val_shots == min(shots, MAX_VAL_SHOTS):
        settings["val_shots"] = "by shots"
    return settings


def mean(group: Group, key: str = "top1") -> float:
    """Return the mean of a metric over the seeds of a group; nan where a run lacks it."""
    values = [run.result.get(f"{run.split}/{key}", math.nan) for run in group]
    return float(np.mean(values))


def answers(group: Group) -> np.ndarray:
    """Whether each run of a group is right about each image, (seeds, images) bool."""
    return np.array([run.correct for run in group])


def interval(group: Group) -> statistics.Interval:
    """Return the mean top-1 of a group in percent with its 95% interval, within 0 and 100.

    Over images, near-duplicates counted as one, and over seeds where there are several.
    """
    return statistics.mean_interval(answers(group), group[0].clusters)


def best_by_strategy(runs: Sequence[Run]) -> list[Group]:
    """Return the group of highest mean top-1 for each model and method.

    Sorted by both, the untrained model of each architecture first. A calibrated evaluation counts
    only where there is no other: it has the same top-1.
    """
    best: dict[tuple[str, str], Group] = {}
    best_rank: dict[tuple[str, str], tuple[bool, float]] = {}
    for group in grouped(runs):
        first = group[0]
        key = first.model, first.method
        rank = not first.settings.get("calibrated"), mean(group)
        if key not in best or rank > best_rank[key]:
            best[key] = group
            best_rank[key] = rank

    def order(group: Group) -> tuple:
        first = group[0]
        return first.model, first.strategy != "none", first.method

    return sorted(best.values(), key=order)


# -----------------------------------------------------------------------------
# the factorial grid

# (strategy, architecture, pretraining) -> learning rate -> seed -> run
Cells = dict[tuple[str, str, str], dict[float, dict[int, Run]]]
PRETRAINING = 2  # its place in the key of a cell

# The grids of ablate.py that are divided, as the names of their points begin. The rates of the
# first are multiples of each strategy's default, those of the second are the same for all.
FACTORIAL = "factorial"
SHARED_RATE = "sharedrate"


@dataclass(frozen=True)
class Grid:
    """A complete grid of strategies, architectures, pretrainings, learning rates and seeds.

    A rate's level is its rank within the cell, as strategies may have rates of their own. Where no
    two architectures share a pretraining, each with its own, that is one level, "".
    """

    strategies: list[str]
    architectures: list[str]
    pretrainings: list[str]
    seeds: list[int]
    # of each cell: by rising learning rate, then by seed
    runs: dict[tuple[str, str, str], list[dict[int, Run]]]
    dropped: list[str]  # levels left out, as they lack runs

    @property
    def rates(self) -> int:
        """The number of learning rates in each cell."""
        return len(next(iter(self.runs.values())))

    def cell(self, strategy: str, architecture: str, pretraining: str) -> list[list[Run]]:
        """The runs of a cell: (learning rates, seeds)."""
        by_rate = self.runs[strategy, architecture, pretraining]
        return [[by_seed[seed] for seed in self.seeds] for by_seed in by_rate]

    def any_run(self, architecture: str = "", pretraining: str = "") -> Run:
        """A run of the grid, of this architecture and pretraining if they are given."""
        architecture = architecture or self.architectures[0]
        pretraining = pretraining or self.pretrainings[0]
        return self.cell(self.strategies[0], architecture, pretraining)[0][0]


def factorial(runs: Sequence[Run], shared_rate: bool = False) -> Grid | None:
    """Return the largest complete grid of strategies x architectures x pretrainings x rates.

    Its runs share all other settings. Augmentation and prompt may differ between strategies, as
    their defaults do, but not within one: there the most frequent ones count.

    shared_rate: the grid in which all strategies have the same learning rates. It and the other one
        never share a run.

    Returns None if there is none.
    """
    candidates: dict[str, list[Run]] = {}
    for run in runs:
        # A linear head has no learning rate: it is fitted by another optimiser.
        if run.strategy in ("none", "linear") or not run.settings.get("lr"):
            continue
        if run.name.startswith(f"{SHARED_RATE}-") != shared_rate:
            continue
        key = _configuration(run, NOT_SETTINGS | GRID_SETTINGS)
        candidates.setdefault(key, []).append(run)

    largest = None
    largest_size = 0
    for members in candidates.values():
        # Rates of other grids would make the rest incomplete, so its own points are tried alone.
        own = [run for run in members if run.name.startswith(f"{FACTORIAL}-")]
        for part in (members, own):
            grid = _complete(_cells(part))
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
    pretrainings = defaultdict(set)
    for run in runs:
        counts.setdefault(run.strategy, Counter())[_strategy_defaults(run)] += 1
        pretrainings[run.architecture].add(run.pretraining)
    usual = {strategy: counter.most_common(1)[0][0] for strategy, counter in counts.items()}
    # Each architecture with one pretraining of its own: nothing can be said of the two apart.
    single = all(len(levels) == 1 for levels in pretrainings.values())
    one_level = single and len(set().union(*pretrainings.values())) > 1

    cells: Cells = {}
    for run in runs:
        if _strategy_defaults(run) != usual[run.strategy]:
            continue
        pretraining = "" if one_level else run.pretraining
        cell = cells.setdefault((run.strategy, run.architecture, pretraining), {})
        by_seed = cell.setdefault(run.settings["lr"], {})
        by_seed.setdefault(run.seed, run)
    return cells


def _complete(cells: Cells) -> Grid | None:
    """Drop what is incomplete until every cell has the same number of learning rates and seeds.

    Returns None if fewer than two strategies, architectures or learning rates remain. One
    pretraining is enough.
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
    strategies = sorted({strategy for strategy, _, _ in full_cells})
    architectures = sorted({architecture for _, architecture, _ in full_cells})
    pretrainings = sorted({pretraining for _, _, pretraining in full_cells}, key=_plain_first)
    levels = strategies, architectures, pretrainings
    dropped = _drop_incomplete(full_cells, rates, levels)
    if min(len(strategies), len(architectures), rates) < 2 or not pretrainings:
        return None
    complete = {}
    for key in itertools.product(*levels):
        by_rate = full_cells[key]
        complete[key] = [by_rate[lr] for lr in sorted(by_rate)]
    return Grid(strategies, architectures, pretrainings, sorted(seeds), complete, dropped)


def _plain_first(pretraining: str) -> tuple[bool, str]:
    """Order of pretrainings: the one that others are compared with is the plain one."""
    return pretraining not in PLAIN, pretraining


def _drop_incomplete(cells: Cells, rates: int, levels: tuple[list[str], ...]) -> list[str]:
    """Remove levels until every cell has `rates` learning rates.

    The one with the largest share of incomplete cells goes first; of equals, a pretraining, then an
    architecture, and of those the last by name. Removes them from `levels`, (strategies,
    architectures, pretrainings), and returns what was removed.
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
        for axis, axis_levels in enumerate(levels):
            if axis == PRETRAINING and len(axis_levels) == 1:
                continue  # without it nothing would be left
            for level in axis_levels:
                lacking = sum(key[axis] == level for key in incomplete)
                # in units of one over the number of all cells
                shares.append((lacking * len(axis_levels), axis, level))
        _, axis, level = max(shares)
        levels[axis].remove(level)
        dropped.append(level)
