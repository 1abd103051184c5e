"""The copies of the dataset that people have: their labels, names, splits and captions."""

import gzip
import io
import zipfile
import zlib
from pathlib import Path

import numpy as np

from flowers import UserError
from flowers.files import parse_json, read_json
from flowers.matfile import MOST_BYTES, read_mat

OXFORD_IDS = ("trnid", "valid", "tstid")
# CLIP's authors use another name for four classes (openai/CLIP, data/prompts.md); some copies of cat_to_name.json say "lotus lotus".
OPENAI_NAMES = {
    "globe-flower": "globe flower",
    "pink-yellow dahlia": "pink and yellow dahlia",
    "lotus lotus": "lotus",
    "ball moss": "air plant",
}


def read_captions(path: str | Path, files: tuple[Path, ...]) -> list[list[str]]:
    """The sentences of each image: one JSON object a line with `file` and `captions`, gzipped or not.

    Raises UserError if a line is damaged or an image has no sentence.
    """
    path, by_name = Path(path), {}
    if not path.is_file():
        raise UserError(f"no captions at {path}")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES >> 20} MB")
        for row in map(parse_json, text.decode("utf-8").removesuffix("\n").split("\n")):
            by_name[row["file"]] = row["captions"]
            if not isinstance(row["captions"], list) or not all(
                isinstance(c, str) and c.strip() for c in row["captions"]
            ):
                raise ValueError("captions are a list of sentences")
    except (ValueError, KeyError, TypeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path} is damaged after {len(by_name)} lines ({type(error).__name__}: {error})"
        ) from None
    silent = [file.name for file in files if not by_name.get(file.name)]
    if silent:
        raise UserError(f"{path} has no caption for {silent[0]} (and {len(silent) - 1} more)")
    return [by_name[file.name] for file in files]


def _read_npz(path: Path) -> np.ndarray:
    """`arr_0` of an .npz, whose checksum zipfile compares."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        return np.lib.format.read_array(io.BytesIO(file.read(MOST_BYTES)), allow_pickle=False)


def _whole(values) -> np.ndarray:
    """(n,) int64 of whole numbers in any shape. Raises ValueError for anything else."""
    values = np.asarray(values).ravel()
    if (
        values.dtype.kind not in "iuf"
        or not (abs(values) < 2**31).all()
        or (values != np.floor(values)).any()
    ):
        raise ValueError("these are not whole numbers")
    return values.astype(np.int64)


def read_labels(root: Path) -> np.ndarray:
    """1-based labels; that of image id i stands at i - 1."""
    path = next((p for p in (root / "imagelabels.mat", root / "labels.npz") if p.exists()), None)
    if path is None:
        raise UserError(f"{root} has neither imagelabels.mat nor labels.npz")
    try:
        labels = _whole(read_mat(path)["labels"] if path.suffix == ".mat" else _read_npz(path))
        if not len(labels):
            raise ValueError("no labels")
    except Exception as error:  # zipfile and numpy raise many kinds for a damaged file
        raise UserError(f"{path} can't be read: {type(error).__name__}: {error}") from None
    if labels.min() < 1:
        raise UserError(f"{path} holds a label below 1: labels are 1-based")
    return labels


def read_split_ids(path: Path, count: int) -> dict[str, np.ndarray]:
    """1-based image ids by Oxford's split name; a JSON that holds a 0 is taken as 0-based."""
    if not path.exists():
        raise UserError(
            f"no splits at {path}: give --splits_path a setid.mat, or a JSON with {', '.join(OXFORD_IDS)}"
        )
    try:
        raw = read_json(path) if path.suffix == ".json" else read_mat(path)
        whole = {name: _whole(raw[name]) for name in OXFORD_IDS}
    except Exception as error:
        raise UserError(f"{path} can't be read: {type(error).__name__}: {error}") from None
    every = np.concatenate(list(whole.values()))
    if not len(whole["trnid"]) or not len(whole["tstid"]):
        raise UserError(f"{path} lists no image under trnid or tstid")
    if path.suffix == ".json" and every.min() == 0:
        whole, every = {name: i + 1 for name, i in whole.items()}, every + 1
    if every.min() < 1 or every.max() > count:
        wrong = every.min() if every.min() < 1 else every.max()
        raise UserError(
            f"{path} lists image id {wrong}, which has no label: there are labels for ids 1 to {count}"
        )
    return whole


def read_names(root: Path, n_classes: int) -> list[str]:
    path = root / "cat_to_name.json"
    if not path.exists():
        path = Path(__file__).with_name("cat_to_name.json")
    try:
        names = {int(key): name for key, name in read_json(path).items()}
    except ValueError as error:
        raise UserError(f"{path} can't be read: {error}") from None
    unnamed = next(
        (
            i
            for i in range(1, max(n_classes, len(names)) + 1)
            if not isinstance(names.get(i), str) or not names[i].strip()
        ),
        None,
    )
    if unnamed:
        raise UserError(f"{path} has no name for class {unnamed}")
    if len(set(names.values())) < len(names):
        raise UserError(f"{path} gives two classes the same name")
    return [names[i] for i in range(1, len(names) + 1)]
