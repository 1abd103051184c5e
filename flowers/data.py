"""Where the images are, their labels, names and splits.

    python -m flowers.data                      # downloads Oxford Flowers 102 to data/flowers-102 (345 MB, MD5-checked)
    python -m flowers.data --data_root sample   # says what is there: counts per split, number of classes

Source of the data: M.-E. Nilsback, A. Zisserman, Automated flower classification over a large number of classes, ICVGIP 2008,
https://www.robots.ox.ac.uk/~vgg/data/flowers/102/. It calls its splits trnid (1,020 images), valid (1,020) and tstid (6,149).
"""
import argparse
import contextlib
import difflib
import gzip
import io
import os
import re
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np

from flowers import UserError, command, parse_json, read_json

DEFAULT_ROOT = "data/flowers-102"
UNFINISHED = ".downloading"  # beside the files while they are fetched: a part of one may look like a whole one
PATIENCE = 60  # seconds, with a server that says nothing
OXFORD_IDS = ("trnid", "valid", "tstid")
MOST_BYTES = 1 << 26  # of labels, splits or captions once unpacked, more than a dataset of flowers has: what claims more is a bomb, or damaged
MAT_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
# CLIP's authors use another name for four classes (openai/CLIP, data/prompts.md); some copies of cat_to_name.json say "lotus lotus".
OPENAI_NAMES = {"globe-flower": "globe flower", "pink-yellow dahlia": "pink and yellow dahlia", "lotus lotus": "lotus", "ball moss": "air plant"}


@dataclass(frozen=True)
class Flowers:
    """An index of the dataset; every array is read-only.

    root: the folder; files: N paths, sorted by image id; labels: (N,) int64, 0-based; class_names: one a class;
    splits: `train`, `val`, `test`, each an int64 array of places in `files` (`val` is empty without a holdout).
    """
    root: Path
    files: tuple[Path, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    splits: dict[str, np.ndarray]


def add_data_arguments(parser: argparse.ArgumentParser, splits: bool = True) -> None:
    """The flags that say which images; without `splits`, those of scripts that look at all of them."""
    group = parser.add_argument_group("data")
    group.add_argument("--data_root", default=DEFAULT_ROOT,
                       help="folder of the dataset, or 'sample' for the drawn one that needs no download (default: %(default)s)")
    group.add_argument("--splits_path",
                       help="file that lists trnid, valid, tstid: a JSON or a setid.mat (default: setid.mat in the folder)")
    group.add_argument("--class_names", choices=["oxford", "openai"], default="oxford",
                       help="the dataset's names, or CLIP's (four differ) (default: %(default)s)")
    if not splits:
        return
    group.add_argument("--splits", choices=["swapped", "official"], default="swapped",
                       help="swapped: train on valid + tstid (7,169), test on trnid (1,020); official: train on trnid + valid, test on tstid "
                            "(default: %(default)s)")
    group.add_argument("--holdout", action="store_true",
                       help="keep the official valid images out of training, as the val split that choices are made on")


def open_flowers(data_root: str | Path = DEFAULT_ROOT, splits_path: str | Path | None = None, splits: str = "swapped",
                 holdout: bool = False, class_names: str = "oxford") -> Flowers:
    """Open the dataset in either layout: `jpg/` + imagelabels.mat + setid.mat, or `images/jpg/` + labels.npz + a split JSON.

    'sample' is drawn, and the default folder downloaded, when missing. An image's label is that of the number in its file name.
    A split file may list fewer images than there are. Raises UserError for anything missing, damaged or contradictory.
    """
    if str(data_root) == "sample":
        from flowers.sample import write_sample  # OpenCV is needed only to draw
        data_root = write_sample()
    elif Path(data_root) == Path(DEFAULT_ROOT) and not is_complete(Path(data_root)):
        print(f"{data_root} is missing or incomplete: downloading Oxford Flowers 102 (345 MB)")
        download(data_root)
    root = Path(data_root)
    if not root.is_dir():
        raise UserError(f"no dataset at {root}: give --data_root a folder, or 'sample', or run python -m flowers.data to download")
    folder = next((f for f in (root / "jpg", root / "images" / "jpg") if f.is_dir()), None)
    if folder is None:
        raise UserError(f"{root} has neither jpg/ nor images/jpg/: is it the folder of Oxford Flowers 102?")

    labels = _read_labels(root)
    ids = _read_ids(Path(splits_path) if splits_path else root / "setid.mat", len(labels))
    names = _read_names(root, int(labels.max()))
    if class_names == "openai":
        names = [OPENAI_NAMES.get(name, name) for name in names]

    every = np.unique(np.concatenate(list(ids.values())))
    if len(every) < sum(map(len, ids.values())):
        raise UserError(f"the splits of {root} list an image more than once: training and test images must be disjoint")
    there = {int(m[1]): entry.name for entry in os.scandir(folder) if (m := re.fullmatch(r"image_(\d+)\.jpe?g", entry.name))}
    missing = [i for i in every.tolist() if i not in there]
    if missing:
        raise UserError(f"missing image {folder / f'image_{missing[0]:05d}.jpg'} ({len(missing)} of {len(every)} listed in the splits are not there)")

    place = {name: np.searchsorted(every, np.sort(i)) for name, i in ids.items()}
    test, rest = ("trnid", "tstid") if splits == "swapped" else ("tstid", "trnid")
    train = place[rest] if holdout else np.sort(np.concatenate([place[rest], place["valid"]]))
    split_arrays = {"train": train, "val": place["valid"] if holdout else place["valid"][:0], "test": place[test]}
    image_labels = labels[every - 1] - 1
    for array in (image_labels, *split_arrays.values()):
        array.setflags(write=False)
    return Flowers(root, tuple(folder / there[i] for i in every.tolist()), image_labels, tuple(names), split_arrays)


def find_class(flowers: Flowers, given: str) -> int:
    """The 0-based class of a name (upper or lower case) or of a 1-based number. Raises UserError if there is none, with similar names."""
    names = [name.lower() for name in flowers.class_names]
    if given.lower() in names:
        return names.index(given.lower())
    if given.isdecimal() and 1 <= int(given) <= len(names):
        return int(given) - 1
    similar = difflib.get_close_matches(given.lower(), names) + [name for name in names if given.lower() in name]
    raise UserError(f"no class {given!r}: give a number from 1 to {len(names)} or a name"
                    + (f"; did you mean {', '.join(dict.fromkeys(similar))}?" if similar else f", such as {names[0]}"))


def base_classes(n_classes: int) -> int:
    """How many of the classes are base classes: the first half (CoOp's base-to-new protocol); the others are new."""
    return -(-n_classes // 2)


def select(index: np.ndarray, labels: np.ndarray, n_classes: int, classes: str = "all", shots: int | None = None, seed: int = 0) -> np.ndarray:
    """The images at `index` that are of the base, the new or all classes; with `shots`, so many of each class at most, drawn by `seed`."""
    n_base = base_classes(n_classes)
    index = index[{"all": labels[index] >= 0, "base": labels[index] < n_base, "new": labels[index] >= n_base}[classes]]
    if shots is None:
        return index
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(index[labels[index] == c])[:shots] for c in range(n_classes)]
    return np.sort(np.concatenate(drawn))


def is_complete(root: Path) -> bool:
    """Whether a download has finished."""
    whole = all((root / name).exists() for name in ("jpg", "imagelabels.mat", "setid.mat")) and not (root / UNFINISHED).exists()
    return whole or (root / "images" / "jpg").is_dir()


@contextlib.contextmanager
def patience():
    """Wait for a silent server for PATIENCE seconds; torchvision and clip would for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def download(data_root: str | Path = DEFAULT_ROOT) -> Path:
    """Fetch the dataset through torchvision, with progress and MD5 checks; run again, it goes on at the first file that is not whole.

    Raises UserError when the site can't be reached or a checksum is wrong.
    """
    from torchvision.datasets import Flowers102
    root = Path(data_root)
    if root.name != "flowers-102":
        raise UserError(f"the download goes to a folder named flowers-102, not {root}: give --data_root PARENT/flowers-102")
    # nothing is unpacked outside of the folder, were MD5 ever deceived; Python does so by itself from 3.14 on, and can since 3.11.4
    tarfile.TarFile.extraction_filter = staticmethod(getattr(tarfile, "data_filter", lambda member, path: member))
    root.mkdir(parents=True, exist_ok=True)
    (root / UNFINISHED).touch()
    try:
        with patience():
            Flowers102(str(root.parent), download=True)
    except (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError) as error:
        raise UserError(f"the download of Oxford Flowers 102 failed ({error}): run again to go on, or fetch 102flowers.tgz, imagelabels.mat and "
                        f"setid.mat from {Flowers102._download_url_prefix} into {root}, or use --data_root sample") from None
    (root / UNFINISHED).unlink()
    return root


def read_captions(path: str | Path, files: tuple[Path, ...]) -> list[list[str]]:
    """The sentences of each image: one JSON object a line with `file` and `captions`, gzipped or not.

    Raises UserError if a line is damaged or an image has no sentence.
    """
    path, by_name = Path(path), {}
    if not path.is_file():
        raise UserError(f"no captions at {path}")
    try:
        with (gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES >> 20} MB")
        for row in map(parse_json, text.decode("utf-8").removesuffix("\n").split("\n")):
            by_name[row["file"]] = row["captions"]
            if not isinstance(row["captions"], list) or not all(isinstance(c, str) and c.strip() for c in row["captions"]):
                raise ValueError("captions are a list of sentences")
    except (ValueError, KeyError, TypeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged after {len(by_name)} lines ({type(error).__name__}: {error})") from None
    silent = [file.name for file in files if not by_name.get(file.name)]
    if silent:
        raise UserError(f"{path} has no caption for {silent[0]} (and {len(silent) - 1} more)")
    return [by_name[file.name] for file in files]


def read_mat(path: Path) -> dict[str, np.ndarray]:
    """The real numeric matrices of a MATLAB file by name. Raises ValueError, struct.error or zlib.error if it is damaged, as far as that shows: what is
    compressed has a checksum. scipy's reader takes the process down with it at about one damaged file in a hundred.

    Source: MathWorks, MAT-File Format (Level 5), R2024b.
    """
    if path.stat().st_size > MOST_BYTES or (data := path.read_bytes())[126:128] not in (b"IM", b"MI"):
        raise ValueError("no MATLAB 5 file")
    order, found = "<" if data[126:128] == b"IM" else ">", {}

    def elements(data: bytes) -> Iterator[tuple[int, bytes]]:
        at = 0
        while at < len(data):
            kind, size = struct.unpack_from(order + "II", data, at)
            short, at = kind >> 16, at + (4 if kind >> 16 else 8)  # up to four bytes stand within the tag itself
            kind, size = (kind & 0xFFFF, short) if short else (kind, size)
            if size > (4 if short else len(data) - at):
                raise ValueError("cut off")
            yield kind, data[at:at + size]
            at += 4 if short else size + (-size % 8 if kind != 15 else 0)

    left = MOST_BYTES
    for kind, content in elements(data[128:]):
        if kind == 15:
            unpack = zlib.decompressobj()
            content = unpack.decompress(content, left)
            left -= len(content)
            if not unpack.eof or left <= 0:
                raise ValueError("cut off, or too large")
            kind, content = next(elements(content), (0, b""))
        if kind != 14:
            continue
        (_, flags), (_, shape), (_, name), (kind, values), *_ = [*elements(content), *[(0, b"")] * 4]
        if len(flags) == 8 and 6 <= struct.unpack(order + "II", flags)[0] & 0xFF <= 15:  # double to uint64; no cells, structures, text
            shape = np.frombuffer(shape, order + "i4").tolist()
            values = np.frombuffer(values, order + MAT_TYPES.get(kind, "no number"))
            found[name.decode("ascii")] = values.reshape(shape, order="F")
    return found


def _read_npz(path: Path) -> np.ndarray:
    """`arr_0` of an .npz, whose checksum zipfile compares."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        return np.lib.format.read_array(io.BytesIO(file.read(MOST_BYTES)), allow_pickle=False)


def _whole(values) -> np.ndarray:
    """(n,) int64 of whole numbers in any shape. Raises ValueError for anything else."""
    values = np.asarray(values).ravel()
    if values.dtype.kind not in "iuf" or not (abs(values) < 2 ** 31).all() or (values != np.floor(values)).any():
        raise ValueError("these are not whole numbers")
    return values.astype(np.int64)


def _read_labels(root: Path) -> np.ndarray:
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


def _read_ids(path: Path, count: int) -> dict[str, np.ndarray]:
    """1-based image ids by Oxford's split name; a JSON that holds a 0 is taken as 0-based."""
    if not path.exists():
        raise UserError(f"no splits at {path}: give --splits_path a setid.mat, or a JSON with {', '.join(OXFORD_IDS)}")
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
        raise UserError(f"{path} lists image id {wrong}, which has no label: there are labels for ids 1 to {count}")
    return whole


def _read_names(root: Path, n_classes: int) -> list[str]:
    path = root / "cat_to_name.json"
    if not path.exists():
        path = Path(__file__).with_name("cat_to_name.json")
    try:
        names = {int(key): name for key, name in read_json(path).items()}
    except ValueError as error:
        raise UserError(f"{path} can't be read: {error}") from None
    unnamed = next((i for i in range(1, max(n_classes, len(names)) + 1) if not isinstance(names.get(i), str) or not names[i].strip()), None)
    if unnamed:
        raise UserError(f"{path} has no name for class {unnamed}")
    if len(set(names.values())) < len(names):
        raise UserError(f"{path} gives two classes the same name")
    return [names[i] for i in range(1, len(names) + 1)]


@command
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    args = parser.parse_args()
    flowers = open_flowers(**vars(args))
    counts = ", ".join(f"{name} {len(index):,}" for name, index in flowers.splits.items())
    print(f"{flowers.root}: {len(flowers.files):,} images of {len(flowers.class_names)} classes; {args.splits} splits: {counts}")


if __name__ == "__main__":
    main()
