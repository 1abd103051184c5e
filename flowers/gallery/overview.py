"""All runs in one table: what each is and how good it is, from its args.json and result.json."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowers.choices import RANDOM, split_architecture
from flowers.files import checked, read_json

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
TRAINED = ("trainable_image", "trainable_text", "trainable_scale", "trainable_head", "trainable")
OPTIONAL = ("shots", "ECE (%)", "base (%)", "new (%)")
SPLITS = ("test", "val", "train")
EVALUATIONS = ("eval", "qwen_eval")  # jobs that evaluate what another run has trained
INNER = ("model.pt", "adapter")  # parts of a run that its path may end with
UNFINISHED = "not finished"
DAMAGED = "damaged"


def run_table(runs: Path, names: Sequence[str]) -> "pd.DataFrame":
    """Return a table of the runs with these names, a row a run, in their order.

    Columns: run, strategy, architecture, pretraining, those of SETTINGS, split, images, those of
    METRICS (`from` and `to` are the ends of the 95% interval of top-1), parameters that were
    trained, seconds of training. What a run does not have is empty; a column of OPTIONAL that no
    run has is left out. The split of a run without a result is UNFINISHED, or DAMAGED.
    """
    import pandas as pd  # not needed by the first view

    rows = [_row(runs, name) for name in names]
    columns = ["run", "strategy", "architecture", "pretraining", *SETTINGS, "split", "images"]
    columns += [*METRICS, "parameters trained", "seconds"]
    table = pd.DataFrame(rows, columns=columns)
    return table.drop(columns=[name for name in OPTIONAL if table[name].isna().all()])


def _row(runs: Path, name: str) -> dict:
    """Return what the table says of one run."""
    folder = runs / name
    row = {"run": name}
    try:
        settings = checked(read_json(folder / "args.json"))
        row |= _description(folder, settings)
        if not (folder / "result.json").exists():
            return row | {"split": UNFINISHED}
        return row | _results(checked(read_json(folder / "result.json")))
    except (OSError, ValueError, TypeError, KeyError):
        return row | {"split": DAMAGED}


def _description(folder: Path, settings: dict) -> dict:
    """Return what was trained and how; of an evaluation, the run that it evaluates."""
    chain = chain_of(folder, settings)
    evaluates = settings.get("job") in EVALUATIONS and len(chain) > 1
    trained = chain[1] if evaluates else chain[0]
    first = chain[-1]
    architecture, pretraining = split_architecture(first.get("architecture") or "")
    if architecture in RANDOM:
        pretraining = "random"
        if first is not trained:  # a run of one's own stands in for it
            pretraining = "captions" if first.get("captions") else "prompts"
    row = {
        "strategy": _strategy(settings, trained),
        "architecture": architecture,
        "pretraining": pretraining,
    }
    for column, key in SETTINGS.items():
        row[column] = trained.get(key)
    return row


def _strategy(settings: dict, trained: dict) -> str:
    """Return the strategy of training, or what else was done."""
    if settings.get("soup"):
        return "soup"
    if str(settings.get("job")).startswith("qwen"):
        how = "lora" if trained.get("job") == "qwen_train" else "none"
        return f"{how} ({settings['protocol']})" if settings.get("protocol") else how
    is_trained = trained.get("epochs") or trained.get("strategy") == "linear"
    return str(trained.get("strategy")) if is_trained else "none"


def chain_of(folder: Path, settings: dict) -> list[dict]:
    """Return the settings of a run, of the run that it starts from or evaluates, and so on.

    settings: those of the run in `folder`. The chain ends where a run starts from no other, or from
    one that is no longer there.
    """
    chain = [settings]
    visited = {folder.resolve()}
    while True:
        start = _start(folder, chain[-1])
        # Damaged runs may name each other in a circle.
        if start is None or start.resolve() in visited:
            return chain
        visited.add(start.resolve())
        folder = start
        chain.append(checked(read_json(folder / "args.json")))


def _start(folder: Path, settings: dict) -> Path | None:
    """Return the folder of the run that a run starts from; None if it starts from no run."""
    path = Path(str(settings.get("adapter") or settings.get("architecture")))
    if path.name in INNER:
        path = path.parent
    # As it was typed, or beside the run: the runs may have been moved together.
    places = (path, folder.parent / path.name)
    return next((place for place in places if (place / "args.json").is_file()), None)


def _results(result: dict) -> dict:
    """Return split, metrics, parameters trained and seconds of a run's result.json."""
    split = next((split for split in SPLITS if f"{split}/top1" in result), "")
    row = {
        "split": split,
        "images": result.get(f"{split}/n"),
        "seconds": result.get("train_seconds"),
    }
    for column, key in METRICS.items():
        row[column] = result.get(f"{split}/{key}")
    counts = [result[key] for key in TRAINED if key in result]
    row["parameters trained"] = sum(counts) if counts else None
    return row
