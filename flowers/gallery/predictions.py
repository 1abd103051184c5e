"""What runs predicted, from their predictions.csv, and how the predictions of two runs differ."""

import csv
import functools
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flowers import UserError
from flowers.data import Flowers
from flowers.files import checked, read_json
from flowers.intervals import holm, mcnemar_p, paired_difference
from flowers.layouts import OPENAI_NAMES, correct_name
from flowers.runs import command_line

if TYPE_CHECKING:
    import pandas as pd

ANOTHER_SPLIT = "another split"
NO_CLASS = -1  # of an image that a run did not predict
MAX_DEPTH = 4  # of folders below the folder of the runs
RUN_FILES = ("args.json", "result.json", "predictions.csv", "model.pt")  # each makes a run
# At the end of a column's name: no run takes the place of another column.
IN_PERCENT = " (%)"
P_VALUE = "p (McNemar)"
CORRECTED = "p (Holm)"
IN_POINTS = " (points)"
CHANGE = tuple(f"{name}{IN_POINTS}" for name in ("change", "from", "to"))  # with its 95% interval

# -----------------------------------------------------------------------------
# runs


@dataclass(frozen=True)
class RunFolder:
    """A folder that holds a run, or a part of one.

    Attributes:
        name: its path below the folder of the runs, with slashes.
        files: those of RUN_FILES that it holds.
    """

    name: str
    files: frozenset[str]


def run_folders(runs: Path) -> list[RunFolder]:
    """Return the folders below `runs` that hold one of RUN_FILES, newest first.

    The runs of `--runs runs/demo` are found in runs/, too. Nothing is looked for within a run, nor
    behind a link.
    """
    by_time = []
    for entry, name, files in _folders(str(runs), "", MAX_DEPTH):
        try:
            by_time.append((entry.stat().st_mtime, name, files))
        except OSError:  # a run that was removed in between
            continue
    return [RunFolder(name, files) for _, name, files in sorted(by_time, reverse=True)]


def names_with(folders: Iterable[RunFolder], *files: str) -> list[str]:
    """Return the names of those of the folders that hold one of `files`, in their order."""
    return [folder.name for folder in folders if not folder.files.isdisjoint(files)]


def _folders(
    above: str, prefix: str, depth: int
) -> Iterator[tuple[os.DirEntry, str, frozenset[str]]]:
    """Yield each folder that holds RUN_FILES below another one, down to `depth`: the folder, its
    name with the prefix before it, and the files.

    A folder is read once: a page of 500 runs does so at each click.
    """
    for folder in _entries(above):
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        name = prefix + folder.name
        files = frozenset(entry.name for entry in _entries(folder.path) if _is_run_file(entry))
        if files:
            yield folder, name, files
        elif depth > 1 and not folder.is_symlink():
            yield from _folders(folder.path, name + "/", depth - 1)


def _is_run_file(entry: os.DirEntry) -> bool:
    return entry.name in RUN_FILES and entry.is_file()


def _entries(folder: str) -> list[os.DirEntry]:
    """Return what a folder holds; nothing of one that is gone, or may not be read."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def why_apart(folder: Path, flowers: Flowers) -> str:
    """Return why the predictions of a run are not about this dataset and its test split.

    The empty string where they are, or where there are none.
    """
    path = folder / "predictions.csv"
    index_of = _index_of_names(flowers.file_names)
    class_of = _classes_by_name(flowers.class_names)
    labels = flowers.labels.tolist()
    index = []
    n_foreign = 0
    try:
        with path.open(encoding="utf-8", newline="") as file:
            # Not a DictReader, which takes twice as long: there may be hundreds of runs.
            rows = csv.reader(file)
            header = next(rows, ["file", "label"])  # an empty file has no rows either
            file_at, label_at = header.index("file"), header.index("label")
            for row in filter(None, rows):
                i = index_of.get(row[file_at])
                if i is None or class_of.get(correct_name(row[label_at])) != labels[i]:
                    n_foreign += 1
                else:
                    index.append(i)
    except FileNotFoundError:  # a run that only trained
        return ""
    except (OSError, ValueError, IndexError, csv.Error):
        return "damaged"
    if not index:
        return "another dataset" if n_foreign else "empty"
    test = flowers.splits["test"]
    # A dataset may have no split: then none is another one.
    if len(test) and not np.isin(index, test).all():
        return ANOTHER_SPLIT
    return ""


def run_arguments(folder: Path) -> dict:
    """Return the args.json of a run; an empty dict if it is missing or damaged."""
    try:
        return read_json(folder / "args.json")
    except (OSError, ValueError):  # the page only quotes from it, and can do without
        return {}


def written_temperature(folder: Path) -> float | None:
    """Return the temperature that has divided the logits behind a run's predictions.csv.

    None for a run that is not calibrated, as all are but evaluations with --calibrated. (A training
    with --holdout only finds a temperature, and writes it beside predictions without it.)
    """
    try:
        result = checked(read_json(folder / "result.json"))
    except (OSError, ValueError):  # without a word, as in `run_arguments`
        return None
    temperature = result.get("calibration_temperature")
    is_calibrated = result.get("calibrated") is True and isinstance(temperature, float)
    return temperature if is_calibrated else None


def model_arguments(folder: Path) -> dict:
    """Return run_arguments, where what they say of the model's start and prompts is texts.

    Raises UserError if it is not. A file that can't be read at all says nothing.
    """
    arguments = run_arguments(folder)
    path = folder / "args.json"
    try:
        checked(arguments)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error})") from None
    if not isinstance(arguments.get("architecture", ""), str):
        raise UserError(f"{path} is damaged (architecture is no text)")
    if not isinstance(arguments.get("prompts") or "", str):
        raise UserError(f"{path} is damaged (prompts is no text)")
    templates = arguments.get("prompt_template") or []
    if not isinstance(templates, list) or not all(isinstance(text, str) for text in templates):
        raise UserError(f"{path} is damaged (prompt_template is no list of texts)")
    return arguments


# -----------------------------------------------------------------------------
# predictions.csv


@dataclass(frozen=True)
class Predictions:
    """What a run predicted for the N images of a dataset.

    Attributes:
        name: the run's.
        top: for each image its (class, probability) pairs, best first; empty where there are none.
        guess: the best class of each image (N,) int; NO_CLASS where there is none.
        score: the probability of that class (N,) float; 0 where there is none.
        temperature: has divided the logits; None for a run that is not calibrated.
    """

    name: str
    top: tuple[tuple[tuple[int, float], ...], ...]
    guess: np.ndarray
    score: np.ndarray
    temperature: float | None = None

    @property
    def index(self) -> np.ndarray:
        """Indices of the images that the run predicted, ascending."""
        return np.flatnonzero(self.guess != NO_CLASS)


def read_predictions(folder: Path, flowers: Flowers, name: str = "") -> Predictions:
    """Read the predictions of the run in `folder` for the images of `flowers`.

    name: what the run is called; empty: as its folder.

    Raises UserError if predictions.csv is damaged, empty, or about other images.
    """
    path = folder / "predictions.csv"
    remedy = f"make it anew: {_evaluation_command(folder, flowers)}"
    try:
        top, n_foreign = _read_rows(path, flowers)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}): {remedy}") from None
    if not any(top) and n_foreign:
        data_root = str(run_arguments(folder).get("data_root", "PATH"))
        if Path(data_root).resolve() == flowers.root.resolve():
            raise UserError(
                f"The images have changed since the predictions of {folder} were made: {remedy}"
            )
        raise UserError(
            f"The predictions of {folder} are not about these images; its own are opened with: "
            f"streamlit run web.py -- --data_root {shlex.quote(data_root)}"
        )
    if not any(top):
        raise UserError(f"{path} is empty: {remedy}")

    guess = np.full(len(top), NO_CLASS)
    score = np.zeros(len(top))
    for i, answers in enumerate(top):
        if answers:
            guess[i], score[i] = answers[0]
    return Predictions(name or folder.name, tuple(top), guess, score, written_temperature(folder))


def _evaluation_command(folder: Path, flowers: Flowers) -> str:
    """The command that makes the predictions of a run anew, as a run of another name."""
    flags = {"architecture": str(folder)}  # it takes over splits, names and prompts
    stored = run_arguments(folder)
    if stored.get("job") == "eval" and not stored.get("soup"):
        # An evaluation has no model of its own, but for that of a soup: it is repeated.
        repeated = ("architecture", "splits_path", "splits", "holdout", "class_names", "split")
        flags |= {key: stored.get(key) for key in (*repeated, "prompt_template")}
    flags |= {"data_root": str(flowers.root), "runs": str(folder.parent)}
    return command_line("baseline_eval.py", flags)


def _read_rows(path: Path, flowers: Flowers) -> tuple[list[tuple], int]:
    """Return Predictions.top, and the number of rows that are about other images.

    Raises ValueError, KeyError, TypeError or csv.Error if the file is damaged.
    """
    position_of = _index_of_names(flowers.file_names)
    class_of = _classes_by_name(flowers.class_names)
    top = [()] * len(flowers.files)
    n_foreign = 0
    contradiction = False
    # Row by row with the csv module: pandas would mend some of the damage without a word.
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            answers = _answers(row)
            i = position_of.get(row["file"])
            if i is None:
                n_foreign += 1
                continue
            known_names = all(name in class_of for name, _ in answers)
            if class_of.get(correct_name(row["label"])) != flowers.labels[i] or not known_names:
                # The same file name with another label or other names is another dataset's ...
                n_foreign += 1
                contradiction = True
                continue
            if top[i] or not _is_ranking([score for _, score in answers]):
                raise ValueError("no prediction")
            top[i] = tuple((class_of[name], score) for name, score in answers)
    # ... unless other rows are about these images: then those rows are damaged.
    if contradiction and any(top):
        raise ValueError("names that are not those of these images")
    return top, n_foreign


@functools.lru_cache(2)
def _index_of_names(file_names: tuple[str, ...]) -> dict[str, int]:
    """Return the index of each file by its name."""
    return {name: i for i, name in enumerate(file_names)}


def _classes_by_name(class_names: tuple[str, ...]) -> dict[str, int]:
    """Return the number of each class by its name, and by CLIP's own name for it."""
    class_of = {name: c for c, name in enumerate(class_names)}
    # A run with --class_names openai writes these; the page may show the dataset with Oxford's.
    for oxford_name, openai_name in OPENAI_NAMES.items():
        if oxford_name in class_of:
            class_of.setdefault(openai_name, class_of[oxford_name])
    return class_of


def _answers(row: dict[str, str]) -> list[tuple[str, float]]:
    """Return the names that a row of predictions.csv gives with their probabilities."""
    answers = []
    for k in range(1, 6):
        # A run on fewer than five classes has fewer columns, or empty ones.
        if row.get(f"top{k}"):
            answers.append((correct_name(row[f"top{k}"]), float(row[f"score{k}"])))
    return answers


def _is_ranking(scores: list[float]) -> bool:
    """Return whether there are scores, all are probabilities, and the largest come first."""
    probabilities = all(0 <= score <= 1 for score in scores)  # nan is none
    return bool(scores) and probabilities and scores == sorted(scores, reverse=True)


# -----------------------------------------------------------------------------
# one run, or several


def outcomes(labels: np.ndarray, *runs: Predictions) -> dict[str, np.ndarray]:
    """Return the indices of the images that each filter shows.

    The filters are 'all', 'right' and 'wrong', by the first of the runs. With two also 'changed'
    (another name), 'mended' (wrong to right) and 'broken' (right to wrong). With more 'changed'
    (not all give the same name), 'all_right', 'all_wrong', and 'only_1' and so on: only the run of
    that number is right. Only images that all these runs predicted count.
    """
    index = seen_by_all(runs)
    guesses = np.stack([run.guess[index] for run in runs])  # (runs, len(index))
    is_right = guesses == labels[index]
    first = is_right[0]
    shown = {"all": index, "right": index[first], "wrong": index[~first]}
    if len(runs) > 1:
        shown["changed"] = index[(guesses != guesses[0]).any(axis=0)]
    if len(runs) == 2:
        shown["mended"] = index[~first & is_right[1]]
        shown["broken"] = index[first & ~is_right[1]]
    if len(runs) > 2:
        n_right = is_right.sum(axis=0)
        shown["all_right"] = index[n_right == len(runs)]
        shown["all_wrong"] = index[n_right == 0]
        for number, right in enumerate(is_right, 1):
            shown[f"only_{number}"] = index[right & (n_right == 1)]
    return shown


def seen_by_all(runs: Sequence[Predictions]) -> np.ndarray:
    """Return the indices of the images that all runs predicted, ascending.

    Runs may have evaluated different splits: only what all saw can be compared.
    """
    return functools.reduce(np.intersect1d, [run.index for run in runs])


def likely_label_errors(labels: np.ndarray, n_classes: int, *runs: Predictions) -> np.ndarray:
    """Return the indices of the images whose label may be wrong, the likeliest first.

    Confident learning (Northcutt, Jiang and Chuang 2021): a class is likely for an image if its
    probability reaches the mean that it has among the images of that label. Where the likeliest of
    those classes is not the label, the label is doubted. In order of the probability of the label
    less the greatest of another class. The probabilities are the mean over the runs; those that a
    run has not written, as they are not among its best five, count as 0.

    n_classes: of all names; the last ones may have no image.
    """
    index = seen_by_all(runs)
    probabilities = np.zeros((len(index), n_classes))
    for run in runs:
        for row, i in zip(probabilities, index):
            for c, probability in run.top[i]:
                row[c] += probability / len(runs)
    given = labels[index]
    rows = np.arange(len(index))
    of_label = probabilities[rows, given]  # (n,)
    thresholds = np.full(n_classes, np.inf)  # a class without images has no mean
    for c in np.unique(given):
        thresholds[c] = of_label[given == c].mean()

    likely = np.where(probabilities >= thresholds, probabilities, 0.0)
    doubted = (likely.max(axis=1) > 0) & (likely.argmax(axis=1) != given)
    others = probabilities.copy()
    others[rows, given] = 0.0
    margin = of_label - others.max(axis=1)
    order = np.argsort(margin, kind="stable")
    return index[order[doubted[order]]]


def class_table(
    flowers: Flowers,
    index: np.ndarray,
    *runs: Predictions,
    clusters: np.ndarray | None = None,
) -> "pd.DataFrame":
    """Return a table of the classes that occur among the images at `index`, a row a class.

    Columns: class, images, and the accuracy of each run under its name. With two runs also, behind
    the class, the change (second minus first) with the ends of its 95% interval by the score method
    of Tango (1998); and at the end how many images only one of them has right, and the p-value of
    the exact test of McNemar (1947) that this is chance, without and with Holm's correction for the
    number of classes: of few images, a large change may mean nothing. All percentages end in
    IN_PERCENT. The largest change comes first; without two runs, the lowest accuracy of the first.

    clusters: of the images at `index`, (n,) int from 0; near-duplicates share one, and count as one
    image in the intervals. None: there are none.
    """
    import pandas as pd  # not needed by the first view

    labels = flowers.labels[index]
    classes, row_of, counts = np.unique(labels, return_inverse=True, return_counts=True)
    right = [run.guess[index] == labels for run in runs]
    table = pd.DataFrame({"class": [flowers.class_names[c] for c in classes], "images": counts})
    accuracies = [f"accuracy of {run.name}{IN_PERCENT}" for run in runs]
    for column, is_right in zip(accuracies, right):
        table[column] = 100 * np.bincount(row_of, is_right) / counts
    if len(runs) != 2:
        return table.sort_values(accuracies[0], kind="stable", ignore_index=True)

    only_first = np.bincount(row_of[right[0] & ~right[1]], minlength=len(classes))  # (C,)
    only_second = np.bincount(row_of[right[1] & ~right[0]], minlength=len(classes))
    sizes = _effective_sizes(row_of, np.arange(len(index)) if clusters is None else clusters)
    ends = _change_intervals(only_first, only_second, counts, sizes)
    change = table[accuracies[1]] - table[accuracies[0]]
    for place, (column, values) in enumerate(zip(CHANGE, (change, *ends)), 1):
        table.insert(place, column, values)
    for run, only in zip(runs, (only_first, only_second)):
        table[f"only {run.name} right"] = only
    table[P_VALUE] = [mcnemar_p(a, b) for a, b in zip(only_first.tolist(), only_second.tolist())]
    table[CORRECTED] = holm(table[P_VALUE])
    by_size = change.abs().sort_values(ascending=False, kind="stable")
    return table.loc[by_size.index].reset_index(drop=True)


def _change_intervals(
    only_first: np.ndarray, only_second: np.ndarray, counts: np.ndarray, sizes: np.ndarray
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the lower and the upper ends of the 95% interval of each class's change, in points.

    only_first, only_second: how many of the `counts` images of a class only one run has right, (C,)
    each. sizes: of how many images these count, see `_effective_sizes`.
    """
    weights = sizes / counts
    rows = np.stack([weights * only_second, weights * only_first, sizes], axis=1).tolist()
    low, high = zip(*(paired_difference(*row) for row in rows))
    return low, high


def _effective_sizes(row_of: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Return of how many images that are unlike one another each class (C,) counts.

    Kish's effective size (1965) where images of one cluster agree always: of a class in clusters of
    m_1, m_2, ... images it is (sum of m)^2 / sum of m^2. row_of: class of each image from 0, (n,).
    """
    pairs = np.stack([row_of, clusters])
    (rows, _), sizes = np.unique(pairs, axis=1, return_counts=True)  # of each cluster in a class
    return np.bincount(rows, sizes) ** 2 / np.bincount(rows, sizes**2)


def confusion_table(flowers: Flowers, run: Predictions, index: np.ndarray) -> "pd.DataFrame":
    """Return how many of the images at `index` have each pair of names, a row a pair that occurs.

    Columns: class, prediction, images. Sorted by the names.
    """
    import pandas as pd

    names = np.array(flowers.class_names)
    pairs = pd.DataFrame(
        {"class": names[flowers.labels[index]], "prediction": names[run.guess[index]]}
    )
    return pairs.value_counts(sort=False).rename("images").reset_index()


def order_of_confusions(true: np.ndarray, predicted: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return `classes` in an order in which those that are taken for one another stand together.

    The leaves of a hierarchical clustering by average linkage: the more of the images of two
    classes are given the other's name, the nearer the two are. true, predicted: class numbers of
    each image, (n,) int, all of them in `classes`.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(classes) < 3:
        return classes
    counts = np.zeros((len(classes), len(classes)))
    np.add.at(counts, (np.searchsorted(classes, true), np.searchsorted(classes, predicted)), 1)
    rates = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # a row may have no image
    distances = 1 - (rates + rates.T) / 2
    np.fill_diagonal(distances, 0)
    tree = linkage(squareform(distances, checks=False), "average", optimal_ordering=True)
    return classes[leaves_list(tree)]
