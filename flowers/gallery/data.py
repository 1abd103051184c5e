"""What web.py shows, without the page: thumbnails, colours, filters, what runs predicted, and search.

torch is imported only where it is used: the first page must not wait for it.
"""

import csv
import hashlib
import io
import os
import re
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps

from flowers import UserError, cache, colour
from flowers.data import Flowers
from flowers.files import read_json
from flowers.layouts import OPENAI_NAMES

SIDE, SLOT = 160, 10_240  # pixels of a thumbnail, and the bytes that are kept for each
FORMAT = 1  # raise it when the stored bytes change
MAX_BYTES, MAX_PIXELS, MAX_ASPECT, MAX_SCANS = (
    10 << 20,
    40_000_000,
    20,
    100,
)  # of a picture that a visitor brings
LOCKS = defaultdict(threading.Lock)  # one for each cache file: two sessions do not make it twice


# --- pictures ---


def thumbnail(file: Path) -> bytes:
    """The centre of an image as a JPEG of at most SLOT bytes, SIDE x SIDE; no bytes if the file can't be decoded."""
    try:
        data = file.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > 2 * MAX_PIXELS or data.count(b"\xff\xda") > MAX_SCANS:
                return b""
            image.draft(
                "RGB", (SIDE, SIDE)
            )  # the decoder itself goes to 1/2, 1/4 or 1/8: three times as fast
            square = ImageOps.fit(image.convert("RGB"), (SIDE, SIDE))
    except (
        Exception
    ):  # PIL raises a dozen kinds at damaged files; whatever it is, there is no picture
        return b""
    for quality in (78, 60, 40, 10):
        out = io.BytesIO()
        square.save(out, "JPEG", quality=quality)
        if out.tell() <= SLOT:
            return out.getvalue()
    return b""


class Thumbnails:
    """Thumbnails and colour features of the whole dataset, made once by a thread in the background and kept in the cache folder.

    Until they are ready a thumbnail is made when it is asked for. `features`: (N, 256) of length 1, or None as yet;
    `problem`: why they could not be kept.
    """

    def __init__(self, flowers: Flowers):
        self.files, self.root, self.kept, self.features, self.problem = (
            flowers.files,
            flowers.root,
            None,
            None,
            "",
        )
        self.made = lru_cache(1024)(thumbnail)
        threading.Thread(target=self._work, daemon=True).start()

    def __getitem__(self, i: int) -> bytes:
        return (
            self.made(self.files[i]) if self.kept is None else self.kept[i].tobytes().rstrip(b"\0")
        )  # a JPEG ends with 0xD9

    def _work(self) -> None:
        try:
            names = hashlib.sha256("".join(f.name for f in self.files).encode()).hexdigest()[:8]
            key, folder, n = (
                cache.key_of(FORMAT, colour.FORMAT, SIDE, *self.files),
                cache.cache_folder(self.root),
                len(self.files),
            )
            path = folder / f"thumbnails-{names}.npy"
            if not path.exists():
                time.sleep(1)  # the first page first
            with LOCKS[folder / names]:
                self.kept = cache.cached_array(
                    path, key, (n, SLOT), "|u1", lambda: self._all(thumbnail, self.files)
                )
                self.features = np.array(
                    cache.cached_array(
                        folder / f"thumbnail-hsv-{names}.npy",
                        key,
                        (n, 256),
                        "<f4",
                        lambda: self._all(
                            lambda i: colour_features(read_thumbnail(self[i])), range(n)
                        ),
                    )
                )
        except OSError as error:  # a full disk, a vanished file: the pages go on without
            self.problem = f"Thumbnails could not be kept ({error}): pages are slower."

    @staticmethod
    def _all(function, items: Sequence) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for i in range(0, len(items), 64):
                for row in pool.map(function, items[i : i + 64]):
                    yield (
                        np.frombuffer(row.ljust(SLOT, b"\0"), np.uint8)
                        if isinstance(row, bytes)
                        else row
                    )


def read_thumbnail(jpeg: bytes) -> np.ndarray:
    """(H, W, 3) uint8 RGB; one black pixel for no picture."""
    return (
        cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        if jpeg
        else np.zeros((1, 1, 3), np.uint8)
    )


def open_picture(data: bytes) -> np.ndarray:
    """A picture from anywhere as (H, W, 3) uint8 RGB, upright. Raises UserError for what is too large, damaged, or no picture."""
    if len(data) > MAX_BYTES:
        raise UserError(
            f"this file has {len(data) / 1e6:.0f} MB: at most {MAX_BYTES >> 20} MB are taken"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's own word on large pictures; ours follows
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
                width, height = image.size  # known from the header, before anything is decoded
                scans = (
                    data.count(b"\xff\xda") if data.startswith(b"\xff\xd8") else 1
                )  # each decodes all pixels anew
                if (
                    width * height <= MAX_PIXELS
                    and max(width, height) <= MAX_ASPECT * min(width, height)
                    and scans <= MAX_SCANS
                ):
                    return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # PIL raises a dozen kinds at damaged files
        raise UserError(
            f"this file can't be read as a picture ({type(error).__name__}): give a whole JPEG, PNG or WebP"
        ) from None
    raise UserError(
        f"this picture has {width} x {height} pixels: at most {MAX_PIXELS // 1_000_000} million are taken, in {MAX_SCANS} scans, and no strips"
    )


class Data(NamedTuple):
    """A dataset that is open: its index, the number in each file's name, the name of each image's split, thumbnails;
    stamp tells it from another, and from itself after a change."""

    flowers: Flowers
    ids: np.ndarray
    splits: np.ndarray
    thumbnails: Thumbnails
    stamp: tuple


# --- colours ---


def colour_features(rgb: np.ndarray) -> np.ndarray:
    """(256,) float32 of a picture (H, W, 3): the product of two is the Bhattacharyya coefficient of their HSV histograms, 1 for the same colours."""
    return colour.hsv_hist(colour.measure(rgb, "none")).astype(np.float32)


def palette(pixels: np.ndarray, colours: int = 6) -> list[tuple[str, float]]:
    """The colours that stand for the picture, as #rrggbb and their shares of the pixels, largest first."""
    image = Image.fromarray(pixels)
    image.thumbnail((128, 128))
    cut = image.quantize(colours, method=Image.Quantize.MAXCOVERAGE)
    rgb, counts = cut.getpalette(), sorted(cut.getcolors(), reverse=True)
    return [
        ("#" + bytes(rgb[3 * i : 3 * i + 3]).hex(), n / (image.width * image.height))
        for n, i in counts
    ]


def nearest(
    features: np.ndarray, query: np.ndarray, leave_out: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Places and products of the rows of features (N, D) with query (D,), largest first."""
    scores = features @ query
    order = np.argsort(-scores, kind="stable")
    order = order[order != leave_out]
    return order, scores[order]


# --- filters ---


def image_ids(flowers: Flowers) -> np.ndarray:
    """The number in each file's name."""
    return np.array([int(re.search(r"\d+", f.name)[0]) for f in flowers.files])


def split_of(flowers: Flowers) -> np.ndarray:
    """The name of each image's split."""
    names = np.full(len(flowers.files), "", dtype="<U5")
    for name, index in flowers.splits.items():
        names[index] = name
    return names


def parse_ids(text: str) -> list[tuple[int, int]]:
    """'7, 20-30' -> [(7, 7), (20, 30)]. Raises UserError for anything else."""
    ranges = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        if not (match := re.fullmatch(r"(\d{1,9})(?:\s*-\s*(\d{1,9}))?", part)):
            raise UserError(f"file ids are numbers and ranges such as 7, 20-30, not '{part[:40]}'")
        ranges.append((int(match[1]), int(match[2] or match[1])))
    return ranges


def export(
    flowers: Flowers, index: Iterable[int], predictions: Sequence["Predictions"] = ()
) -> str:
    """CSV of the images at `index`: id, file, class, split, and what each run gave: name, its probability."""
    out, ids, splits = io.StringIO(), image_ids(flowers), split_of(flowers)
    writer = csv.writer(out)
    writer.writerow(
        [
            "id",
            "file",
            "class",
            "split",
            *(f"{p.name} {what}" for p in predictions for what in ("prediction", "probability")),
        ]
    )
    for i in index:
        row = [ids[i], flowers.files[i].name, flowers.class_names[flowers.labels[i]], splits[i]]
        for p in predictions:
            row += (
                [flowers.class_names[p.guess[i]], f"{p.score[i]:.6f}"]
                if p.guess[i] >= 0
                else ["", ""]
            )
        writer.writerow(row)
    return out.getvalue()


# --- runs ---


@dataclass(frozen=True)
class Predictions:
    """What a run gave: top: for each of N images its (class, probability) pairs, best first, empty where it predicted nothing;
    guess, score: (N,) the first of these, -1 and 0 where there is none."""

    name: str
    top: tuple[tuple[tuple[int, float], ...], ...]
    guess: np.ndarray
    score: np.ndarray

    @property
    def index(self) -> np.ndarray:
        return np.flatnonzero(self.guess >= 0)


def run_names(runs: Path, file: str) -> list[str]:
    """The folders in `runs` that hold `file`, newest first."""
    try:
        found = [
            (entry.stat().st_mtime, entry.name)
            for entry in os.scandir(runs)
            if entry.is_dir() and (Path(entry) / file).is_file()
        ]
    except OSError:
        return []
    return [name for _, name in sorted(found, reverse=True)]


def read_predictions(folder: Path, flowers: Flowers) -> Predictions:
    """predictions.csv of a run. Raises UserError if it is damaged, or about other images."""
    places = {file.name: i for i, file in enumerate(flowers.files)}
    classes = {name: c for c, name in enumerate(flowers.class_names)}
    classes |= {b: classes[a] for a, b in OPENAI_NAMES.items() if a in classes and b not in classes}
    mend = (
        f"make it anew: python baseline_eval.py --architecture {folder} --data_root {flowers.root}"
    )
    top, foreign, odd = [()] * len(places), 0, 0
    try:
        with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                pairs = [
                    (row[f"top{k}"], float(row[f"score{k}"]))
                    for k in range(1, 6)
                    if row.get(f"top{k}")
                ]
                i = places.get(row["file"])
                if (
                    i is None
                    or classes.get(row["label"]) != flowers.labels[i]
                    or not all(name in classes for name, _ in pairs)
                ):
                    foreign, odd = foreign + 1, odd + (i is not None)
                elif (
                    pairs
                    and not top[i]
                    and all(
                        1 >= a >= b >= 0 for (_, a), (_, b) in zip(pairs, pairs[1:] + pairs[-1:])
                    )
                ):
                    top[i] = tuple((classes[name], score) for name, score in pairs)
                else:
                    raise ValueError("no prediction")
        if odd and any(top):
            raise ValueError("names that are not those of these images")
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(
            f"{folder / 'predictions.csv'} is damaged ({type(error).__name__}): {mend}"
        ) from None
    if not any(top):
        raise UserError(
            f"The predictions of {folder} are not about these images; its own are opened with: streamlit run web.py -- "
            f"--data_root {run_arguments(folder).get('data_root', 'PATH')}"
            if foreign
            else f"{folder / 'predictions.csv'} is empty: {mend}"
        )
    return Predictions(
        folder.name,
        tuple(top),
        np.array([t[0][0] if t else -1 for t in top]),
        np.array([t[0][1] if t else 0.0 for t in top]),
    )


def run_arguments(folder: Path) -> dict:
    """args.json of a run; empty where it is missing or damaged."""
    try:
        return read_json(folder / "args.json")
    except (OSError, ValueError):
        return {}


def outcomes(
    labels: np.ndarray, first: Predictions, second: Predictions | None = None
) -> dict[str, np.ndarray]:
    """Places of the images that each filter shows, over the images that both runs predicted."""
    index = first.index if second is None else np.intersect1d(first.index, second.index)
    right = first.guess[index] == labels[index]
    shown = {"all": index, "right": index[right], "wrong": index[~right]}
    if second is not None:
        too = second.guess[index] == labels[index]
        shown |= {
            "changed": index[first.guess[index] != second.guess[index]],
            "mended": index[~right & too],
            "broken": index[right & ~too],
        }
    return shown


def class_changes(
    flowers: Flowers, index: np.ndarray, first: Predictions, second: Predictions | None = None
) -> list[dict]:
    """A row a class that occurs at `index`: images, accuracy in percent of each run and the change, largest change (or lowest accuracy) first."""
    rows = []
    for c in np.unique(flowers.labels[index]):
        own = index[flowers.labels[index] == c]
        accuracy = {
            p.name: 100 * float((p.guess[own] == c).mean())
            for p in (first, second)
            if p is not None
        }
        change = (
            {"change": accuracy[second.name] - accuracy[first.name]} if second is not None else {}
        )
        rows.append({"class": flowers.class_names[c], **change, "images": len(own), **accuracy})
    return sorted(
        rows, key=lambda row: -abs(row["change"]) if second is not None else row[first.name]
    )


# --- search ---


class Searcher:
    """A run's model, and its features of every image (N, D), computed once and kept in the cache folder. Raises UserError for a damaged model."""

    def __init__(self, flowers: Flowers, folder: Path):
        import torch

        from flowers import evaluate, frozen, pixels, weights

        self.model = weights.load_model(str(folder))
        with LOCKS[flowers.root]:
            images = pixels.load_pixels(flowers, self.model.visual.input_resolution)
            self.features = (
                frozen.image_activations(
                    self.model, flowers, images, torch.arange(len(flowers.files))
                )
                .float()
                .numpy()
            )
        templates = run_arguments(folder).get("prompt_template")
        own = (
            (folder / "classifier.pt").exists()
            or not isinstance(templates, list)
            or not all("{}" in str(t) for t in templates)
        )
        self.head, _ = evaluate.load_head(
            str(folder),
            self.model,
            flowers.class_names,
            None if own else templates,
            evaluate.TEMPLATE,
        )

    def of_text(self, sentence: str) -> np.ndarray:
        """(D,) of length 1."""
        from flowers.models import text_features

        return text_features(self.model, [sentence])[0].numpy()

    def of_picture(self, picture: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (D,) of length 1, by the same steps as the dataset's images."""
        import torch

        from flowers.models import image_features
        from flowers.pixels import resize_and_crop

        pixels = resize_and_crop(
            torch.from_numpy(picture).permute(2, 0, 1), self.model.visual.input_resolution
        )
        return image_features(self.model, pixels[None], torch.tensor([0]))[0].numpy()

    def ranking(self, feature: np.ndarray) -> np.ndarray:
        """(C,) probabilities of the classes at the model's temperature."""
        logits = self.head[0].numpy() @ feature + self.head[1].numpy()
        shares = np.exp(logits - logits.max())
        return shares / shares.sum()
