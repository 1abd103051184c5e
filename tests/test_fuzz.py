"""Damaged and hostile inputs, 1,000 for each reader (30 without the slow marker): a right result, or one clear line; in bounded time and memory."""
import contextlib
import gzip
import io
import json
import random
import shutil
import time
import traceback
import warnings
import zipfile
from pathlib import Path

import damage
import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from flowers import UserError, cache, comparable, gallery, models, pixels, runs, strategies
from flowers.data import open_flowers, read_captions

counts = pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.slow)])
MOST_MB, MOST_SECONDS = 600, 10


@pytest.fixture
def survive(tally, count, tmp_path):
    """survive(name, inputs, read, right): read(data) of every input must be right(result, data), or end in a UserError of one line."""
    def memory(key):
        return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) >> 10

    def run(name, inputs, read, right, note="", least=0):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, slowest, refused, failures = memory("VmRSS"), 0.0, 0, []
        for i, data in enumerate(inputs):
            start = time.perf_counter()
            try:
                got = read(data)
                wrong = right(got, data)
            except UserError as error:
                refused += 1
                wrong = "" if str(error).strip() and len(str(error)) < 1000 else f"unclear: {error}"
            except Exception:
                wrong = traceback.format_exc(limit=-3)
            if wrong:
                failures.append(f"{name} {i}: {wrong}")
                if isinstance(data, bytes):
                    Path(f"/tmp/fz/{name.replace(' ', '_').replace('/', '_')}").mkdir(parents=True, exist_ok=True)
                    Path(f"/tmp/fz/{name.replace(' ', '_').replace('/', '_')}/{i}").write_bytes(data)
            slowest = max(slowest, time.perf_counter() - start)
        grown = memory("VmHWM") - before
        tally(name, i + 1, i + 1 - len(failures), f"{refused:,} refused in a line, {i + 1 - refused - len(failures):,} read right{note}; slowest {slowest:.2f} s, +{grown} MB")
        assert not failures, f"{len(failures)} of {i + 1}:\n" + "\n".join(failures[:8])
        assert slowest < MOST_SECONDS and grown < MOST_MB
        assert refused and refused <= i
    return run


def picture(mode="RGB", size=(90, 70)):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize(size, Image.BICUBIC).convert(mode)


def encoded(kind, mode="RGB", **options):
    out = io.BytesIO()
    picture(mode).save(out, kind, **options)
    return out.getvalue()


JPEGS = [encoded("JPEG"), encoded("JPEG", progressive=True), encoded("JPEG", "L"), encoded("JPEG", "CMYK"), encoded("JPEG", subsampling=0, quality=95)]


@counts
def test_jpeg(survive, count, tmp_path):
    file = tmp_path / "image_00001.jpg"

    def read(data):
        file.write_bytes(data)
        return pixels.read(file)

    def right(got, data):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            except Exception as error:
                return f"PIL refuses it: {error}, shape {got.shape}"
        difference = abs(got.permute(1, 2, 0).numpy().astype(int) - reference).max()
        return "" if difference <= 3 else f"{difference} levels from PIL"
    survive("JPEG", (damage.damaged("JPEG", i, JPEGS[i % len(JPEGS)]) for i in range(count)), read, right)


@counts
def test_uploads(survive, count):
    kinds = [*JPEGS, encoded("PNG"), encoded("PNG", "P"), encoded("WEBP"), encoded("WEBP", lossless=True)]

    def right(got, data):
        return "" if got.dtype == np.uint8 and got.ndim == 3 and got.shape[2] == 3 and got.shape[0] * got.shape[1] <= gallery.MAX_PIXELS else str(got.shape)
    survive("uploads", (damage.damaged("upload", i, kinds[i % len(kinds)]) for i in range(count)), gallery.open_picture, right)


@counts
def test_thumbnails(survive, count, tmp_path):
    file = tmp_path / "image_00001.jpg"

    def read(data):
        file.write_bytes(data)
        made = gallery.thumbnail(file)
        if not made:
            raise UserError("none")
        return gallery.read_thumbnail(made)
    survive("thumbnails", (damage.damaged("thumbnail", i, JPEGS[i % len(JPEGS)]) for i in range(count)), read,
            lambda got, data: "" if got.shape == (160, 160, 3) else str(got.shape))


def index_of(flowers):
    return ([f.name for f in flowers.files], flowers.labels.tolist(), flowers.class_names, {k: v.tolist() for k, v in flowers.splits.items()})


def reader_of(root, name, splits_path=None):
    def read(data):
        (root / name).write_bytes(data)
        return index_of(open_flowers(root, splits_path))
    return read


@counts
@pytest.mark.parametrize("name", ["imagelabels.mat", "setid.mat"])
@pytest.mark.parametrize("compressed", [False, True])
def test_mat(survive, small, tmp_path, name, compressed, count):
    root = shutil.copytree(small, tmp_path / "d", ignore=shutil.ignore_patterns(".cache"))
    value = {k: v for k, v in scipy.io.loadmat(root / name).items() if not k.startswith("_")}
    scipy.io.savemat(root / name, value, do_compression=compressed)
    whole, expected = (root / name).read_bytes(), index_of(open_flowers(root))

    def right(got, data):
        return "" if got == expected else "different: " + " ".join(n for n, a, b in zip(("files", "labels", "names", "splits"), got, expected) if a != b)
    title = f"{name} ({'compressed' if compressed else 'plain'})"
    survive(title, (damage.damaged(title, i, whole) for i in range(count)), reader_of(root, name), right)


@pytest.fixture
def original(small, tmp_path):
    """The layout of the original project: labels.npz and a split JSON."""
    root = tmp_path / "original"
    shutil.copytree(small / "jpg", root / "images" / "jpg")
    shutil.copy(small / "cat_to_name.json", root)
    np.savez(root / "labels.npz", scipy.io.loadmat(small / "imagelabels.mat")["labels"])
    raw = scipy.io.loadmat(small / "setid.mat")
    (root / "split.json").write_text(json.dumps({k: raw[k].ravel().tolist() for k in ("trnid", "valid", "tstid")}))
    return root


@counts
@pytest.mark.parametrize("name", ["labels.npz", "split.json", "cat_to_name.json"])
def test_original_layout(survive, original, name, count):
    whole, expected = (original / name).read_bytes(), index_of(open_flowers(original, original / "split.json"))

    def right(got, data):
        if got == expected:
            return ""
        if name == "split.json":
            told = json.loads(data)
            return "" if all(sorted(i + 1 for i in got[3][s]) for s in ("train",)) and {k: told[k] for k in told} else "?"
        return "different " + str([a for a, b in zip(got, expected) if a != b])
    survive(name, (damage.damaged(name, i, whole, text=name.endswith("json")) for i in range(count)), reader_of(original, name, original / "split.json"), right)


@counts
@pytest.mark.parametrize("name", ["captions.jsonl", "captions.jsonl.gz"])
def test_captions(survive, small, tmp_path, name, count):
    files = open_flowers(small).files
    rows = [{"file": f.name, "captions": [f"about {f.name}", "ünïcode"]} for f in files]
    whole = "".join(json.dumps(row) + "\n" for row in rows).encode()
    whole = gzip.compress(whole, mtime=0) if name.endswith("gz") else whole
    expected = read_captions_of(tmp_path / name, files)(whole)

    def right(got, data):
        if got == expected:
            return ""
        if all(isinstance(s, str) for own in got for s in own) and not name.endswith("gz"):
            return ""
        return "different"
    survive(name, (damage.damaged(name, i, whole, text=name.endswith("l")) for i in range(count)), read_captions_of(tmp_path / name, files), right)


def read_captions_of(path, files):
    def read(data):
        path.write_bytes(data)
        return read_captions(path, files)
    return read
