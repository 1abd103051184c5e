"""All runs in one table: what each is and how good it is, from its args.json and result.json.

A run may lack either, or both: then the table says less of it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowers.choices import RANDOM, SHAPES, pretraining_family, split_architecture
from flowers.files import checked, read_json
from flowers.qwen_settings import protocol_in_words, strategy_in_words
from flowers.runs import pretraining_of, strategy_of

if TYPE_CHECKING:
    import pandas as pd

# The columns of the table, and the keys of args.json, or of result.json without the split, that
# they come from.
SETTINGS = {"loss": "loss", "learning rate": "lr", "seed": "seed", "shots": "shots"}
METRICS = {
    "top-1 (%)": "top1",
    "from": "top1_low",
    "to": "top1_high",
    "mean per class (%)": "mean_per_class",
    "ECE (%)": "ece",
    "base (%)": "base_top1",
    "new (%)": "new_top1",
}
COLUMNS = (
    ("run", "strategy", "architecture", "pretraining", *SETTINGS, "trained on")
    + ("dataset", "split", "images", "overlap", "calibrated", *METRICS)
    + ("parameters trained", "seconds")
)
TRAINED = ("trainable_image", "trainable_text", "trainable_scale", "trainable_head", "trainable")
OPTIONAL = ("shots", "trained on", "dataset", "overlap", "calibrated")
OPTIONAL += ("ECE (%)", "base (%)", "new (%)")
SPLITS = ("test", "val", "train")
EVALUATIONS = ("eval", "qwen_eval", "qwen_probe")  # jobs that evaluate what another run has trained
INNER = ("model.pt", "adapter")  # parts of a run that its path may end with
UNKNOWN = "unknown"
UNFINISHED = "not finished"
DAMAGED = "damaged"


def run_table(runs: Path, names: Sequence[str]) -> "pd.DataFrame":
    """Return a table of the runs with these names, a row a run, in their order.

    COLUMNS: run, strategy, architecture, pretraining, those of SETTINGS, the classes trained on
    where not all, the dataset's folder where the runs have several, split with its convention,
    images, overlap (how many of them the model was trained on), the temperature of calibrated
    probabilities, those of METRICS (`from` and `to` are the ends of the 95% interval of top-1),
    parameters that were trained, seconds of training. What a run does not have, or nothing says, is
    empty, or UNKNOWN; a column of OPTIONAL that no run has is left out. The split of a run without
    a result is UNFINISHED, or DAMAGED; it is empty, as all else, of a run that has no settings
    either.
    """
    import pandas as pd  # not needed by the first view

    rows = [_row(runs, name) for name in names]
    table = pd.DataFrame(rows, columns=COLUMNS)
    if table["dataset"].nunique() == 1:  # the page says which
        table["dataset"] = None
    return table.drop(columns=[name for name in OPTIONAL if table[name].isna().all()])


def _row(runs: Path, name: str) -> dict:
    """Return what the table says of one run."""
    folder = runs / name
    row = {"run": name}
    try:
        settings = _read_if_there(folder / "args.json")
        result = _read_if_there(folder / "result.json")
        if settings is None and result is None:
            return row
        # A result repeats the settings.
        row |= _description(folder, result if settings is None else settings, result or {})
        return row | ({"split": UNFINISHED} if result is None else _results(result))
    except (OSError, ValueError, TypeError, KeyError):
        return row | {"split": DAMAGED}


def _read_if_there(path: Path) -> dict | None:
    """Return what a JSON file holds; None if there is none. Raises ValueError if it is damaged."""
    return checked(read_json(path)) if path.exists() else None


def _description(folder: Path, settings: dict, result: dict) -> dict:
    """Return what was trained and how; of an evaluation, the run that it evaluates."""
    chain = chain_of(folder, settings)
    if settings.get("job") == "eval" and len(chain) > 1 and chain[1].get("soup"):
        # As of the soup itself, which is an evaluation of its runs.
        of_soup = _description(_start(folder, settings), chain[1], result)
        return of_soup | {"dataset": settings.get("data_root")}
    evaluates = settings.get("job") in EVALUATIONS and len(chain) > 1
    trained = chain[1] if evaluates else chain[0]
    first = chain[-1]
    architecture, _ = split_architecture(first.get("architecture") or "")
    pretraining = pretraining_family(pretraining_of(first, first is not trained))
    # Of a soup, all of its runs were trained.
    members = _members(folder, settings) or [trained]
    is_unknown = settings.get("job") == "eval" and not evaluates and _is_path(first)
    strategy = UNKNOWN if is_unknown else _strategy(settings, result, trained, members)
    row = {"strategy": strategy, "architecture": architecture, "pretraining": pretraining or None}
    row["dataset"] = settings.get("data_root")
    for column, key in SETTINGS.items():
        values = [member.get(key) for member in members]
        row[column] = values[0] if values == values[:1] * len(values) else None
    if is_unknown or (strategy == "none" and first.get("architecture") not in RANDOM):
        row["seed"] = None  # that of the evaluation, which drew nothing
    if settings.get("job") == "qwen_probe":  # it has images of its own to be fitted to
        row["shots"] = settings.get("shots")
    classes = {member.get("classes") or "all" for member in members}
    if classes != {"all"} and strategy != "none":
        row["trained on"] = " and ".join(sorted(classes))
    return row


def _is_path(settings: dict) -> bool:
    """Return whether the model of a run is a file or folder, of which nothing else is known."""
    architecture = str(settings.get("architecture"))
    is_named = architecture in RANDOM or bool(split_architecture(architecture)[1])
    return not (is_named or settings.get("soup"))


def _members(folder: Path, settings: dict) -> list[dict]:
    """Return the settings of the runs that a soup is the mean of; {} for one that is not here."""
    starts = [_start(folder, {"architecture": path}) for path in settings.get("soup") or []]
    return [_settings_of(start) or {} for start in starts]


def _strategy(settings: dict, result: dict, trained: dict, members: list[dict]) -> str:
    """Return the strategy of training in the words of the report, or what else was done.

    members: the runs of a soup.
    """
    job = settings.get("job")
    if job == "qwen_train":
        return "lora"
    if job in EVALUATIONS and job != "eval":
        is_tuned = bool(settings.get("adapter") or trained.get("job") == "qwen_train")
        return strategy_in_words(job, is_tuned, protocol_in_words(settings, result))
    of_soup = members if settings.get("soup") else []
    return strategy_of(trained, [member or None for member in of_soup])


def chain_of(folder: Path, settings: dict) -> list[dict]:
    """Return the settings of a run, of the run that it starts from or evaluates, and so on.

    settings: those of the run in `folder`. The chain ends where a run starts from no other, or from
    one that is no longer there or damaged.
    """
    chain = [settings]
    visited = {folder.resolve()}
    while True:
        start = _start(folder, chain[-1])
        # Damaged runs may name each other in a circle.
        if start is None or start.resolve() in visited:
            return chain
        settings = _settings_of(start)
        if settings is None:
            return chain
        visited.add(start.resolve())
        folder = start
        chain.append(settings)


def _settings_of(folder: Path | None) -> dict | None:
    """Return the args.json of a run; None if there is no whole one."""
    try:
        return checked(read_json(folder / "args.json")) if folder else None
    except (OSError, ValueError):
        return None


def _start(folder: Path, settings: dict) -> Path | None:
    """Return the folder of the run that a run starts from; None if it starts from no run."""
    soup = settings.get("soup")
    name = str(settings.get("adapter") or (soup[0] if soup else settings.get("architecture")))
    # Names come first: a folder may be called like a model.
    if name in SHAPES or name.startswith(("open_clip:", "hf:")):
        return None
    path = Path(name)
    if path.name in INNER:
        path = path.parent
    # Beside the run first: the runs may have been moved together. Or as it was typed.
    for place in (folder.parent / path.name, path):
        if (place / "args.json").is_file() and place.resolve() != folder.resolve():
            return place
    return None


def _results(result: dict) -> dict:
    """Return split, metrics, parameters trained and seconds of a run's result.json."""
    split = next((split for split in SPLITS if f"{split}/top1" in result), "")
    convention = result.get("convention")
    overlap = result.get("overlap")  # a number, or "unknown"
    temperature = result.get("calibration_temperature") if result.get("calibrated") else None
    row = {
        "split": f"{split} ({convention})" if split and convention else split or None,
        "images": result.get(f"{split}/n"),
        "overlap": str(overlap) if overlap else None,
        "calibrated": temperature,
        "seconds": result.get("train_seconds"),
    }
    for column, key in METRICS.items():
        row[column] = result.get(f"{split}/{key}")
    counts = [result[key] for key in TRAINED if key in result]
    row["parameters trained"] = sum(counts) if counts else None
    return row
