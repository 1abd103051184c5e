"""Damaged and hostile inputs, 1,000 for each reader (30 without the slow marker): a right result, or one clear line; in bounded time and memory."""

import csv
import gzip
import io
import json
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
import zlib
from html import escape
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from clip.model import CLIP
from conftest import NAMES, ROOT, error_line, write_dataset
from damage import damaged
from PIL import Image
from test_report import write_run
from test_web import html, pictures

from flowers import UserError, cache, evaluate, files, pixels, runs, strategies, training, weights
from flowers.data import open_flowers
from flowers.gallery import filters, predictions, thumbnails
from flowers.layouts import read_captions
from flowers.study import comparable

counts = pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.slow)])
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and numpy, on what they are given
MOST_MB, MOST_SECONDS = 300, 10


def memory(key: str) -> int:
    """VmRSS, what this process holds, or VmHWM, the most it held since its peak was forgotten, in MB; 0 where there is no /proc."""
    found = (
        re.search(key + r":\s*(\d+)", Path("/proc/self/status").read_text())
        if sys.platform == "linux"
        else None
    )
    return int(found[1]) >> 10 if found else 0


@pytest.fixture
def survive(tally, request):
    """survive(name, inputs, read, right): for every input, right(read(input), input) holds, or read ends in a UserError of one line.

    The first input is whole, must be read, and does not count.
    """

    def run(name, inputs, read, right, refuses=True):
        if sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten
        before, slowest, refused, failures = memory("VmRSS"), 0.0, 0, []
        inputs = iter(inputs)
        assert right(read(first := next(inputs)), first)
        for i, data in enumerate(inputs):
            start = time.perf_counter()
            try:
                got = read(data)
                seconds = time.perf_counter() - start
                problem = "" if right(got, data) else f"read wrong: {str(got)[:300]}"
            except UserError as error:
                seconds, refused = time.perf_counter() - start, refused + 1
                problem = "" if 10 < len(str(error)) < 1000 else f"unclear: {error}"
            except Exception:
                seconds, problem = time.perf_counter() - start, traceback.format_exc(limit=-2)[:600]
            slowest = max(slowest, seconds)
            failures += [f"{name} {i}: {problem}"] if problem else []
        grown, accepted = memory("VmHWM") - before, i + 1 - refused - len(failures)
        tally(
            name,
            i + 1,
            i + 1 - len(failures),
            f"{refused:,} refused in a line, {accepted:,} read right, slowest {slowest:.2f} s, at most +{grown} MB",
        )
        assert not failures, f"{len(failures)} of {i + 1}:\n" + "\n".join(failures[:6])
        assert slowest < MOST_SECONDS and grown < MOST_MB
        assert bool(refused) == refuses

    return run


# --- pictures ---


def picture(mode="RGB", size=(90, 70)):
    rng = np.random.default_rng(0)
    return (
        Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8))
        .resize(size, Image.BICUBIC)
        .convert(mode)
    )


def encoded(kind, mode="RGB", size=(90, 70), **options):
    out = io.BytesIO()
    picture(mode, size).save(out, kind, **options)
    return out.getvalue()


JPEGS = [
    encoded("JPEG"),
    encoded("JPEG", progressive=True),
    encoded("JPEG", "L"),
    encoded("JPEG", "CMYK"),
    encoded("JPEG", subsampling=0, quality=95),
]
PICTURES = [
    *JPEGS,
    encoded("PNG"),
    encoded("PNG", "P"),
    encoded("WEBP"),
    encoded("WEBP", lossless=True),
]


def by_pil(data):
    """The picture as PIL reads it, (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@counts
def test_jpegs(survive, count, tmp_path):
    """What is read of a damaged JPEG is what another decoder reads: damage that leaves the code whole can't be noticed, there is no checksum."""
    file = tmp_path / "image_00001.jpg"

    def read(data):
        file.write_bytes(data)
        return pixels.read_jpeg(file).permute(1, 2, 0).numpy()

    survive(
        "JPEG: pixels.read",
        (damaged("jpeg", i, JPEGS[i % len(JPEGS)]) for i in range(count + 1)),
        read,
        lambda got, data: abs(got - by_pil(data)).max() <= 3,
    )


@counts
def test_uploads(survive, count):
    def right(got, data):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return (
                got.dtype == np.uint8
                and got.shape[0] * got.shape[1] <= thumbnails.MAX_UPLOAD_PIXELS
                and np.array_equal(got, by_pil(data))
            )

    survive(
        "uploads: gallery.open_picture",
        (damaged("upload", i, PICTURES[i % len(PICTURES)]) for i in range(count + 1)),
        thumbnails.open_picture,
        right,
    )


@counts
def test_thumbnails(survive, count, tmp_path):
    file = tmp_path / "image_00001.jpg"

    def read(data):
        file.write_bytes(data)
        jpeg = thumbnails.thumbnail(file)
        if not jpeg:
            raise UserError("the page shows 'damaged' in its place")
        return thumbnails.read_thumbnail(jpeg)

    def right(got, data):  # a thumbnail has an eighth of the detail
        whole = Image.open(io.BytesIO(data)).convert("RGB")
        return (
            got.shape == (160, 160, 3)
            and abs(got.mean((0, 1)) - np.asarray(whole).mean((0, 1))).max() < 40
        )

    survive(
        "JPEG: gallery.thumbnail",
        (damaged("thumbnail", i, JPEGS[i % len(JPEGS)]) for i in range(count + 1)),
        read,
        right,
    )


def claims(data, width, height):
    """A JPEG whose header says so many pixels."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[at + 4 :]


def many_scans(data, scans):
    """A progressive JPEG whose second scan comes again and again."""
    starts = [m.start() for m in re.finditer(rb"\xff\xda", data)]
    return data[: starts[2]] + data[starts[1] : starts[2]] * scans + b"\xff\xd9"


MPO = (
    b"\xff\xe2\x00\x5aMPF\0"
    + b"II*\0\x08\0\0\0"
    + b"\x03\0"
    + b"\0\xb0\x07\0\4\0\0\0"
    + b"0100"
    + b"\1\xb0\4\0\1\0\0\0\2\0\0\0"
    + (b"\2\xb0\7\0\x20\0\0\0\x32\0\0\0" + bytes(4) + bytes(32))
)
BOMBS = {
    "65,000 x 65,000": claims(JPEGS[0], 65000, 65000),
    "10,000 x 10,000": claims(JPEGS[0], 10000, 10000),
    "20,000 scans": many_scans(encoded("JPEG", size=(2000, 2000), progressive=True), 20_000),
}
BOMBS["20,000 scans, of several pictures"] = (
    BOMBS["20,000 scans"][:2] + MPO + BOMBS["20,000 scans"][2:]
)


def test_pictures_that_claim_too_much_are_refused_before_they_take_memory_or_time(tmp_path):
    """The first would take 12.7 GB, the last minutes."""
    for i, data in enumerate(BOMBS.values()):
        (tmp_path / f"image_{i:05d}.jpg").write_bytes(data)
    code = """
import resource, sys, time; from pathlib import Path; from flowers import UserError, pixels; from flowers.gallery import thumbnails
peak, start = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
before = peak()
for file in sorted(Path(sys.argv[1]).glob("*.jpg")):
    for read in (pixels.read, lambda f: thumbnails.open_picture(f.read_bytes())):
        try: read(file); sys.exit(f"{file} was read")
        except UserError as error: assert any(word in str(error) for word in ("pixels", "scans", "DecompressionBomb")), error
    assert thumbnails.thumbnail(file) == b""
assert peak() - before < 50_000 and time.perf_counter() - start < 8"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr


def test_odd_but_whole_jpegs_are_read(tmp_path):
    upright = picture(size=(80, 48))
    turned = upright.getexif()
    turned[0x0112] = 6
    options = {
        "progressive": {"progressive": True},
        "grey": {},
        "CMYK": {},
        "turned": {"exif": turned},
        "restarts": {"restart_marker_rows": 1},
        "smooth": {"smooth": 50},
        "one pixel wide": {},
    }
    for name, kind in options.items():
        image = upright.convert({"grey": "L", "CMYK": "CMYK"}.get(name, "RGB"))
        image = image.resize((1, 40)) if name == "one pixel wide" else image
        image.save(tmp_path / "a.jpg", **kind)
        assert (
            abs(
                pixels.read_jpeg(tmp_path / "a.jpg").permute(1, 2, 0).numpy()
                - by_pil((tmp_path / "a.jpg").read_bytes())
            ).max()
            <= 3
        ), name
    data = bytearray(JPEGS[0])
    data[data.index(b"\xff\xc0") + 4] = 12  # bits a sample
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(UserError, match="a.jpg can't be decoded"):
        pixels.read_jpeg(tmp_path / "a.jpg")
    Image.new("I;16", (30, 40)).save(tmp_path / "b.png")
    (tmp_path / "b.png").rename(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="a.jpg can't be decoded"):
        pixels.read_jpeg(tmp_path / "a.jpg")


# --- the index ---


def index_of(root, splits_path=None):
    flowers = open_flowers(root, splits_path)
    return (
        [f.name for f in flowers.files],
        (flowers.labels + 1).tolist(),
        flowers.class_names,
        {k: (v + 1).tolist() for k, v in flowers.splits.items()},
    )


def reader(root, name, splits_path=None):
    def read(data):
        (root / name).write_bytes(data)
        return index_of(root, splits_path)

    return read


@counts
@pytest.mark.parametrize("name", ["imagelabels.mat", "setid.mat"])
@pytest.mark.parametrize("kind", ["compressed", "plain"])
def test_mat(survive, small, tmp_path, name, kind, count):
    """Without compression there is no checksum: a label or id that became another valid one can't be noticed, and is what the file now says."""
    root = shutil.copytree(small, tmp_path / "d", ignore=shutil.ignore_patterns(".cache"))
    value = {k: v for k, v in scipy.io.loadmat(root / name).items() if not k.startswith("_")}
    scipy.io.savemat(root / name, value, do_compression=kind == "compressed")
    whole, expected = (root / name).read_bytes(), index_of(root)

    def right(got, data):
        if got == expected or kind == "compressed":
            return got == expected
        if name == "imagelabels.mat":
            return bytes(got[1]) in data and (got[0], *got[2:]) == (expected[0], *expected[2:])
        return all(
            np.array(sorted(ids), value["trnid"].dtype).tobytes() in data
            for ids in (got[3]["test"],)
        )

    survive(
        f"{name}, {kind}",
        (damaged(f"{name} {kind}", i, whole) for i in range(count + 1)),
        reader(root, name),
        right,
    )


@pytest.fixture
def original(small, tmp_path):
    """The layout of the original project: labels.npz and a split JSON."""
    root = tmp_path / "original"
    shutil.copytree(small / "jpg", root / "images" / "jpg")
    shutil.copy(small / "cat_to_name.json", root)
    np.savez_compressed(root / "labels.npz", scipy.io.loadmat(small / "imagelabels.mat")["labels"])
    raw = scipy.io.loadmat(small / "setid.mat")
    (root / "split.json").write_text(
        json.dumps({k: raw[k].ravel().tolist() for k in ("trnid", "valid", "tstid")})
    )
    return root


@counts
@pytest.mark.parametrize("name", ["labels.npz", "split.json", "cat_to_name.json"])
def test_the_original_layout(survive, original, name, count):
    whole, expected = (original / name).read_bytes(), index_of(original, original / "split.json")

    def right(got, data):
        if got == expected or name == "labels.npz":
            return got == expected
        told = json.loads(data)
        if name == "cat_to_name.json":
            return got[2] == tuple(told[str(i)] for i in range(1, len(told) + 1)) and (
                *got[:2],
                got[3],
            ) == (*expected[:2], expected[3])
        ids = [np.ravel(told[k]).astype(int).tolist() for k in ("trnid", "valid", "tstid")]
        first = min(map(min, filter(None, ids)))  # 0 or 1
        trnid, *rest = ([i + (first == 0) for i in own] for own in ids)
        return {k: [int(got[0][i - 1][6:11]) for i in v] for k, v in got[3].items()} == {
            "train": sorted(sum(rest, [])),
            "val": [],
            "test": sorted(trnid),
        }

    survive(
        name,
        (damaged(name, i, whole, text=name.endswith("json")) for i in range(count + 1)),
        reader(original, name, original / "split.json"),
        right,
    )


@counts
@pytest.mark.parametrize("name", ["captions.jsonl", "captions.jsonl.gz"])
def test_captions(survive, small, tmp_path, name, count):
    files = open_flowers(small).files
    whole = "".join(
        json.dumps(
            {"file": f.name, "captions": [f"about {f.name}", "ünïcode\u2028"]}, ensure_ascii=False
        )
        + "\n"
        for f in files
    ).encode()
    whole = gzip.compress(whole, mtime=0) if name.endswith("gz") else whole
    expected = [[f"about {f.name}", "ünïcode\u2028"] for f in files]

    def read(data):
        (tmp_path / name).write_bytes(data)
        return read_captions(tmp_path / name, files)

    def right(got, data):
        if got == expected or name.endswith("gz"):
            return got == expected
        told = {
            row["file"]: row["captions"]
            for row in map(json.loads, data.decode().rstrip("\n").split("\n"))
        }
        return got == [told[f.name] for f in files] and all(
            isinstance(s, str) for own in got for s in own
        )

    survive(
        name,
        (damaged(name, i, whole, text=name.endswith("l")) for i in range(count + 1)),
        read,
        right,
    )


def npy_claiming(shape):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": "<i8", "fortran_order": False, "shape": shape}
    )
    return out.getvalue() + bytes(800)


def mat_claiming(n, tail=b""):
    """A compressed .mat of n zeros, as labels."""
    scipy.io.savemat(
        out := io.BytesIO(), {"labels": np.ones((1, n), np.uint8)}, do_compression=True
    )
    return out.getvalue() + tail


def zipped(name, chunks):
    out = io.BytesIO()
    with (
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(name, "w", force_zip64=True) as file,
    ):
        for chunk in chunks:
            file.write(chunk)
    return out.getvalue()


def tensors_of_zeros():
    """300 MB of them, packed: torch never does so, but would read it."""
    archive = zipfile.ZipFile(io.BytesIO(saved({"a": torch.zeros(300 << 18)})))
    with zipfile.ZipFile(out := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    return out.getvalue()


MB = bytes(1 << 20)
LINE = b'{"file": "a", "captions": ["' + b"a" * (1 << 20) + b'"]}\n'


@pytest.mark.parametrize(
    "name, data",
    [
        ("labels.npz", lambda: zipped("arr_0.npy", [npy_claiming((10**9,)), *[MB] * 300])),
        ("labels.npz", lambda: zipped("arr_0.npy", [npy_claiming((10**13,))])),
        ("imagelabels.mat", lambda: mat_claiming(300 << 20)),
        ("captions.jsonl.gz", lambda: gzip.compress(MB * 300)),
        ("captions.jsonl.gz", lambda: gzip.compress(LINE * 300, 1)),
        ("model.pt", tensors_of_zeros),
    ],
    ids=[
        "npz",
        "npz of nothing that claims 80 TB",
        "mat",
        "gzip of zeros",
        "gzip of lines",
        "zip as tensors",
    ],
)
def test_a_file_that_unpacks_to_300_mb_is_refused_in_little_memory(original, name, data, tmp_path):
    path = (original if name != "model.pt" else tmp_path) / name
    if name == "imagelabels.mat":
        (original / "labels.npz").unlink()
    path.write_bytes(data())
    before = memory("VmRSS")
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    with pytest.raises(UserError, match=f"{name} (can't be read|is damaged)"):
        if name == "model.pt":
            weights.load_model(str(path))
        elif name.startswith("captions"):
            read_captions(path, (Path("a"),))
        else:
            index_of(original, original / "split.json")
    assert memory("VmHWM") - before < 200 and time.perf_counter() - start < 5


class Opens:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickled_objects_are_refused_and_run_nothing(original, tmp_path):
    mark = tmp_path / "was here"
    np.savez(original / "labels.npz", np.array([Opens(mark)] * 48, dtype=object))
    for path, read in (
        (original / "labels.npz", lambda: index_of(original, original / "split.json")),
        (tmp_path / "a.pt", lambda: weights.load_model(str(tmp_path / "a.pt"))),
        (tmp_path / "b.pt", lambda: files.load_tensors(tmp_path / "b.pt")),
        (tmp_path / "c.pt", lambda: files.load_tensors(tmp_path / "c.pt")),
    ):
        if path.name == "a.pt":
            torch.save({"positional_embedding": Opens(mark)}, path)
        elif path.name == "b.pt":
            path.write_bytes(pickle.dumps(Opens(mark)))
        elif path.name == "c.pt":
            torch.save({"a": Opens(mark)}, path, _use_new_zipfile_serialization=False)
        with pytest.raises(UserError, match="can't be read"):
            read()
    assert not mark.exists()


# --- tensors ---


def tiny_clip():
    """A CLIP of 600 kB."""
    torch.manual_seed(0)
    return CLIP(16, 16, 1, 64, 8, 77, 300, 64, 1, 1).eval()


def saved(state, **options):
    torch.save(state, out := io.BytesIO(), **options)
    return out.getvalue()


def strange_tensor(t, rng):
    """Something else in the place of a tensor."""
    t = (
        t
        if isinstance(t, torch.Tensor)
        and t.layout == torch.strided
        and t.ndim
        and 0 < t.numel() < 10**6
        else torch.zeros(3, 3)
    )
    bad = t.clone().float()
    bad.view(-1)[rng.integers(bad.numel())] = float(rng.choice([np.nan, np.inf, -np.inf]))
    return [
        bad,
        t.half(),
        t.double(),
        t.long(),
        t.bool(),
        t[None],
        t.flatten(),
        t[:0],
        t.new_zeros(()),
        t.new_zeros(1).expand(10**6, 10**6),
        t.new_zeros(1).expand(*[s * 1000 for s in t.shape]),
        torch.cat([t, t]),
        t.to_sparse(),
        t.to(torch.complex64),
        t.tolist(),
        None,
        "text",
        {},
        7,
    ][rng.integers(19)]


def damaged_state(name, i, state):
    """The bytes of a state dict in which something is missing, renamed or replaced; every second time its file is damaged instead."""
    rng = np.random.default_rng([i, zlib.crc32(name.encode())])
    if i % 2 or not i:
        return damaged(name, i, saved(state))
    state = dict(state)
    for _ in range(rng.choice([1, 1, 2])):
        key = list(state)[rng.integers(len(state))]
        how = rng.integers(10)
        if how == 0 and len(state) > 1:
            del state[key]
        elif how == 1:
            state[key.replace("0", "1") + "x"] = state.pop(key)
        elif how == 2:
            state = {"model": state, "optimizer": {}}
        elif how == 3:
            state |= {
                k.replace("resblocks.0", f"resblocks.{n}"): v
                for k, v in state.items()
                for n in (1, 2)
                if "resblocks.0" in k
            }
        else:
            state[key] = strange_tensor(state[key], rng)
    return saved(
        list(state.items()) if rng.random() < 0.03 else state,
        **({"_use_new_zipfile_serialization": False} if rng.random() < 0.1 else {}),
    )


@counts
def test_state_dicts(survive, count, tmp_path):
    """The model is what the file holds; a legacy file has no checksum, but its structure is checked."""
    path, state = tmp_path / "model.pt", tiny_clip().state_dict()

    def read(data):
        path.write_bytes(data)
        return weights.load_model(str(path)).state_dict()

    def right(got, data):
        told = torch.load(io.BytesIO(data), weights_only=True)
        return (
            got.keys() == told.keys()
            and all(
                torch.equal(got[k], told[k].float()) and torch.isfinite(got[k]).all() for k in got
            )
            and (not data.startswith(b"PK") or zipfile.ZipFile(io.BytesIO(data)).testzip() is None)
        )

    survive(
        "model.pt: models.load_model",
        (damaged_state("model", i, state) for i in range(count + 1)),
        read,
        right,
    )


@counts
@pytest.mark.parametrize("kind", ["prompt", "linear"])
def test_classifiers(survive, count, tmp_path, kind):
    names = ["rose", "lotus", "mallow"]
    torch.save(tiny_clip().state_dict(), tmp_path / "model.pt")
    state = (
        {"context": torch.randn(4, 64)}
        if kind == "prompt"
        else {"weight": torch.randn(3, 16), "bias": torch.randn(3), "class_names": names}
    )
    model = tiny_clip()
    model.encode_text = lambda tokens: torch.ones(
        len(tokens), 16
    )  # its vocabulary is too small for words

    def read(data):
        (tmp_path / "classifier.pt").write_bytes(data)
        model.context = None
        head, templates = evaluate.load_head(str(tmp_path), model, names, None, "a {}")
        return (head, templates, model.context)

    def right(got, data):
        told = torch.load(io.BytesIO(data), weights_only=True)
        head, templates, context = got
        if kind == "prompt":
            return torch.equal(context, told["context"]) and templates == [
                strategies.context_template(len(context))
            ]
        return (
            torch.equal(head[0], told["weight"])
            and torch.equal(head[1], told["bias"])
            and templates == ["a {}"]
        )

    survive(
        f"classifier.pt, {kind}: strategies.load_head",
        (damaged_state(kind, i, state) for i in range(count + 1)),
        read,
        right,
    )


@counts
def test_checkpoints(survive, count, tmp_path):
    restore, model = (
        runpy.run_path(str(ROOT / "train.py"), run_name="train")["restore"],
        torch.nn.Linear(4, 3),
    )
    trained = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(training.parameter_groups(trained, lr=1e-3, wd=0.01), lr=1e-3)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    state = {
        "model": {n: p.detach().clone() for n, p in model.named_parameters()},
        "start": "abc",
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "seconds": 2.5,
    }

    def inputs():
        for i in range(count + 1):
            part = i % 4 == 2
            inner = {"model": dict(state["model"])}
            if part:
                inner = torch.load(
                    io.BytesIO(damaged_state("inner", 2 * i, inner["model"])), weights_only=True
                )
            yield saved(state | {"model": inner}) if part else damaged_state("checkpoint", i, state)

    def read(data):
        (tmp_path / "checkpoint.pt").write_bytes(data)
        done = restore(tmp_path / "checkpoint.pt", "abc", trained, optimizer)
        optimizer.step()  # with what it was given
        return done, {n: p.detach().clone() for n, p in model.named_parameters()}

    def right(got, data):
        told = torch.load(io.BytesIO(data), weights_only=True)
        return (
            got[0] == (told["epoch"], told["seconds"])
            and told["start"] == "abc"
            and all(torch.isfinite(p).all() for p in got[1].values())
        )

    survive("checkpoint.pt: train.restore", inputs(), read, right)
    with pytest.raises(UserError, match="trains other parameters"):
        read(saved(state | {"model": {}}))


# --- what is kept ---


@counts
def test_the_cache(count, tmp_path, tally, capsys):
    """A damaged cache is made anew, with a warning; a whole one is read."""
    rows = np.random.default_rng(0).integers(0, 255, (5, 3, 8, 8), dtype=np.uint8)
    path, key, made, slowest = tmp_path / "pixels.npy", b"k" * 32, [], 0.0

    def read():
        made.append(0)

        def compute():
            made[-1] = 1
            yield rows

        return cache.cached_array(path, key, rows.shape, "|u1", compute)

    read()
    whole = path.read_bytes()
    header = [
        whole.replace(b"'fortran_order': False", b"'fortran_order': True "),
        whole.replace(b"(5, 3, 8, 8)", b"(8, 8, 3, 5)"),
        whole.replace(b"(5, 3, 8, 8)", b"(-5, 3, 8,8)"),
        whole.replace(b"|u1", b"|O "),
        whole.replace(b"|u1", b"|i1"),
        zipped("arr_0.npy", [whole]),
        whole.replace(b"(5, 3, 8, 8)", b"(" * 12),
        pickle.dumps(rows),
    ]
    for i in range(count):
        path.write_bytes(header[i] if i < len(header) else damaged("cache", i, whole))
        same = path.read_bytes() == whole
        capsys.readouterr()
        start = time.perf_counter()
        assert np.array_equal(read(), rows), i
        slowest = max(slowest, time.perf_counter() - start)
        assert bool(made[-1]) == ("warning: " in capsys.readouterr().err) and not (
            same and made[-1]
        ), i
    tally(
        "pixel cache: cache.cached",
        count,
        count,
        f"{sum(made) - 1:,} made anew with a warning, {count - sum(made) + 1:,} still whole, "
        f"slowest {slowest:.2f} s",
    )
    assert sum(made) > count / 2 and slowest < MOST_SECONDS


# --- runs ---


@pytest.fixture
def two_runs(tmp_path):
    folder = tmp_path / "runs"
    write_run(folder, "one", 0.5, split="test")
    write_run(folder, "two", 0.7, split="test", lr=1e-2, strategy="text")
    return folder


@counts
@pytest.mark.parametrize("name", ["result.json", "args.json", "predictions.csv"])
def test_runs_in_a_report(survive, count, two_runs, tmp_path, cli, name):
    """A run is left out with a line that says why, or what is compared are the numbers of its files; where they changed, a report is made of them."""
    path = two_runs / "one" / name
    whole, reports = path.read_bytes(), []

    def read(data):
        path.write_bytes(data)
        found, notes = comparable.load(two_runs)
        if notes:
            raise UserError(*notes)
        found, _ = comparable.resolve(found)
        comparable.best_by_strategy(found)
        comparable.factorial(found)
        return next((run for run in found if run.name == "one"), None)

    def right(run, data):
        if (
            data != whole
            and name != "predictions.csv"
            and json.loads(data) != json.loads(whole)
            and len(reports) < max(1, count // 40)
        ):
            outcome = cli(
                "report.py", "--runs", two_runs, "--output", tmp_path / "report", "--bootstrap", 10
            )
            reports.append(outcome)
            assert outcome[0] == 0 and "Traceback" not in outcome[2], outcome[2]
        if run is None:  # it has no result on any split, or is the start of the other
            return "test/top1" not in json.loads(data) or name == "args.json"
        rows = list(
            csv.DictReader(
                io.StringIO(
                    (
                        data
                        if name == "predictions.csv"
                        else (two_runs / "one" / "predictions.csv").read_bytes()
                    ).decode(),
                    "",
                )
            )
        )
        told = json.loads((two_runs / "one" / "result.json").read_text())
        accuracy = 100 * np.mean([row["label"] == row["top1"] for row in rows])
        return (
            len(run.labels) == len(rows) == len({row["file"] for row in rows})
            and abs(run.top1 - accuracy) < 0.01
            and run.top1 == told["test/top1"]
        )

    survive(
        f"{name}: comparable.load",
        (damaged(f"run {name}", i, whole, text=True) for i in range(count + 1)),
        read,
        right,
    )
    assert reports or name == "predictions.csv"


@counts
def test_metrics(survive, count, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    whole = "".join(
        json.dumps(
            {
                "epoch": 1 + i // 5,
                "step": i + 1,
                "train/loss": 3 / (i + 1),
                "train/lr": 1e-3,
                "val/top1": 4.0 * i,
            }
        )
        + "\n"
        for i in range(20)
    ).encode()

    def read(data):
        path.write_bytes(data)
        capsys.readouterr()
        rows = files.read_lines(path, "train/loss")
        if warning := capsys.readouterr().err:
            assert re.fullmatch(r"warning: \d+ damaged lines? of \S+ left out\n", warning)
            raise UserError(warning)
        return rows

    def right(rows, data):
        told = [json.loads(line) for line in data.decode().split("\n") if line]
        return rows == [row for row in told if "train/loss" in row] and all(
            np.isfinite(row["train/loss"]) for row in rows
        )

    survive(
        "metrics.jsonl: runs.read_lines",
        (damaged("metrics", i, whole, text=True) for i in range(count + 1)),
        read,
        right,
    )


@counts
def test_results(survive, count, two_runs, tmp_path, capsys):
    path, read_accuracies = (
        tmp_path / "results.jsonl",
        runpy.run_path(str(ROOT / "test_models.py"), run_name="test_models")["read_accuracies"],
    )
    whole = b"".join(
        json.dumps(json.loads((two_runs / n / "result.json").read_text())).encode() + b"\n"
        for n in ("one", "two")
    )

    def read(data):
        path.write_bytes(data)
        capsys.readouterr()
        series = read_accuracies(path, ["tiny"])
        if warning := capsys.readouterr().err:
            raise UserError(warning)
        return series

    def right(series, data):
        told = {
            row["name"]: row["test/top1"]
            for row in map(json.loads, filter(None, data.decode().split("\n")))
            if row.get("architecture") == "tiny" and {"name", "test/top1"} <= set(row)
        }
        return sorted(
            v for by in series.values() for values in by.values() for v in values
        ) == sorted(told.values())

    survive(
        "results.jsonl: test_models.read_accuracies",
        (damaged("results", i, whole, text=True) for i in range(count + 1)),
        read,
        right,
    )


@counts
def test_what_a_run_is_resumed_or_compared_by(survive, count, two_runs):
    """args.json goes through the parser of the script again; result.json holds percentages."""
    args, result = (two_runs / "one" / name for name in ("args.json", "result.json"))
    whole = {args: args.read_bytes(), result: result.read_bytes()}

    def read(item):
        path, data = item
        path.write_bytes(data)
        if path == result:
            return runs.read_metrics(two_runs / "one", "test")
        result.unlink(missing_ok=True)
        stored = runs.arguments_to_resume(two_runs / "one", "train")
        return runs.as_flags(stored)

    def right(got, item):
        path, data = item
        told = json.loads(data)
        if path == result:
            return got == {k[5:]: v for k, v in told.items() if k.startswith("test/")} and all(
                0 <= v <= 100 for k, v in got.items() if k != "n"
            )
        said = [
            f"--{k}" if v is True else f"--{k}={v}"
            for k, v in told.items()
            if v is not None and v is not False and not isinstance(v, list)
        ]
        return told["job"] == "train" and set(said) - set(got) <= {
            f"--{k}={told.get(k)}" for k in ("runs", "wandb", "resume", "compare")
        }

    survive(
        "args.json, result.json: runs.begun, results_of",
        (
            (path, damaged("resumed", i, whole[path], text=True))
            for i in range(count + 1)
            for path in [(args, result)[i % 2]]
        ),
        read,
        right,
    )


@counts
def test_predictions_on_the_page(survive, count, small, tmp_path):
    """A row that is missing can't be noticed: a run may have evaluated any images."""
    flowers, rng = open_flowers(small), np.random.default_rng(0)
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(
        ["file", "label", *(f"{what}{k}" for k in range(1, 4) for what in ("top", "score"))]
    )
    for i in flowers.splits["test"]:
        order, scores = rng.permutation(NAMES), -np.sort(-rng.dirichlet(np.ones(3)))
        writer.writerow(
            [
                flowers.files[i].name,
                NAMES[flowers.labels[i]],
                *(v for k in range(3) for v in (order[k], round(scores[k], 6))),
            ]
        )
    whole, places = out.getvalue().encode(), {f.name: i for i, f in enumerate(flowers.files)}

    def read(data):
        (tmp_path / "predictions.csv").write_bytes(data)
        return predictions.read_predictions(tmp_path, flowers)

    def right(got, data):
        rows = [
            row for row in csv.DictReader(io.StringIO(data.decode(), "")) if row["file"] in places
        ]
        for row in rows:
            pairs = [
                (NAMES.index(row[f"top{k}"]), float(row[f"score{k}"]))
                for k in range(1, 6)
                if row.get(f"top{k}")
            ]
            if (
                row["label"] != NAMES[flowers.labels[places[row["file"]]]]
                or got.top[places[row["file"]]] != tuple(pairs)
                or not 0 <= pairs[0][1] <= 1
            ):
                return False
        return len(rows) == len(got.index) == len({row["file"] for row in rows})

    survive(
        "predictions.csv: gallery.read_predictions",
        (damaged("predictions", i, whole, text=True) for i in range(count + 1)),
        read,
        right,
    )


# --- the page ---

OPENED = []  # every file that this process opens while it is a list that is looked at
sys.addaudithook(
    lambda event, arguments: OPENED.append(str(arguments[0])) if event == "open" else None
)
ADDRESS = {
    "view": ["browse", "runs", "search"],
    "class": NAMES,
    "split": ["all", "train", "test"],
    "ids": ["7, 20-30", "1-9"],
    "page": ["1", "2"],
    "bars": ["hidden", "shown"],
    "image": ["7", "48"],
    "run": ["one", "two"],
    "other": ["one", "two"],
    "part": ["pictures", "classes", "confusion"],
    "show": ["all", "right", "wrong", "changed", "mended", "broken"],
    "guess": NAMES,
    "order": ["id", "confidence"],
    "like": ["colours"],
    "q": ["a rose"],
}
HOSTILE = [
    "../secret",
    "../../secret/predictions.csv",
    "one/../../secret",
    "/etc/passwd",
    "file:///etc/passwd",
    "..%2fsecret",
    "\x00",
    "<script>alert(1)</script>",
    "-1",
    "0",
    "9" * 400,
    "٣",
    "nan",
    "None",
    "1e999",
    "",
    "a" * 10_000,
    "\u202e😀",
    "'; --",
    "{}",
    "[" * 500,
    "$x$",
    "1-999999999",
    "-",
    ",,,",
    "0x7",
]


@pytest.mark.parametrize(
    "count", [8, pytest.param(1000, marks=pytest.mark.slow)]
)  # a third of a second each
def test_addresses(survive, count, small, tmp_path, monkeypatch):
    """The page of any address has no error but one sentence, shows only images of the dataset, and opens no file beside data and runs."""
    import random

    from streamlit.testing.v1 import AppTest

    flowers, folder = open_flowers(small), tmp_path / "runs"
    for seed, name in enumerate(("one", "two")):
        rng = np.random.default_rng(seed)
        (folder / name).mkdir(parents=True)
        files.write_csv(
            folder / name / "predictions.csv",
            [
                {
                    "file": flowers.files[i].name,
                    "label": NAMES[flowers.labels[i]],
                    "top1": NAMES[rng.integers(6)],
                    "score1": 0.5,
                }
                for i in flowers.splits["test"]
            ],
        )
    shutil.copytree(folder / "one", tmp_path / "secret")
    monkeypatch.setattr(sys, "argv", ["web.py", "--data_root", str(small), "--runs", str(folder)])

    def address(i):
        rng, found = random.Random(f"address {i}"), {}
        if not i:
            return found
        for key in rng.sample(list(ADDRESS), rng.choice([1, 2, 4, len(ADDRESS)])):
            value = rng.choice(ADDRESS[key])
            how = rng.random()
            strange = damaged(f"address {key}", i, value.encode(), text=True).decode("latin-1")[
                :20_000
            ]
            found[key] = value if how < 0.4 else rng.choice(HOSTILE) if how < 0.8 else strange
        if rng.random() < 0.1:
            found[rng.choice(["run", "class", "page", "unknown", "__proto__"])] = [
                rng.choice(HOSTILE),
                "b",
            ]
        return found

    def read(address):
        at = AppTest.from_file(str(ROOT / "web.py"), default_timeout=60)
        at.query_params.update(address)
        OPENED.clear()
        at.run()
        assert not at.exception, at.exception
        if at.error:
            raise UserError(*(e.value for e in at.error))
        return at

    def right(at, address):
        shown = [
            picture["id"] for key in ("pictures", "neighbours") for picture in pictures(at, key)
        ]
        again = {k: str(np.ravel(v)[0]) for k, v in at.query_params.items()}
        outside = [
            path
            for path in OPENED
            if path.startswith("/etc/passwd")
            or "\0" not in path
            and "secret" in Path(path).resolve().parts
        ]
        return (
            all(1 <= i <= 48 for i in shown)
            and not outside
            and all(again[k] in ADDRESS[k] or k in ("ids", "q", "image", "page") for k in again)
        )

    survive("addresses: web.py", map(address, range(count + 1)), read, right, refuses=False)


# --- what was found, each with the input that showed it ---


def mat_with(at, value):
    """The bytes of a plain imagelabels.mat, one of them changed."""
    scipy.io.savemat(
        out := io.BytesIO(), {"labels": (np.arange(48) % 6 + 1).astype(np.uint8)[None]}
    )
    return out.getvalue()[:at] + bytes([value]) + out.getvalue()[at + 1 :]


def npz_of(labels):
    np.savez(out := io.BytesIO(), labels)
    return out.getvalue()


DEEP = "[" * 100_000
FOUND = {  # file: what takes its place, and a word of what is said
    "scipy's reader crashed": (
        "imagelabels.mat",
        lambda: mat_with(185, 8),
        "imagelabels.mat can't be read",
    ),
    "of a checksum that scipy does not compare": (
        "imagelabels.mat",
        lambda: mat_claiming(48)[:-1] + b"x",
        "imagelabels.mat can't be read",
    ),
    "packed and cut off": (
        "imagelabels.mat",
        lambda: (
            (whole := mat_claiming(48))[:132]
            + (len(whole) - 140).to_bytes(4, "little")
            + whole[136:-4]
        ),
        "imagelabels.mat can't be read",
    ),
    "names were sought up to a huge label": (
        "labels.npz",
        lambda: npz_of(np.full(48, 10**9)),
        "no name for class 7",
    ),
    "a NaN warned": (
        "split.json",
        lambda: b'{"trnid": [1, NaN], "valid": [2], "tstid": [3]}',
        "not whole numbers",
    ),
    "deep names": ("cat_to_name.json", lambda: f'{{"1": {DEEP}'.encode(), "nested too deeply"),
    "a name of no text": (
        "cat_to_name.json",
        lambda: json.dumps({i: None if i == 3 else str(i) for i in range(1, 7)}).encode(),
        "no name for class 3",
    ),
    "names in a list": ("cat_to_name.json", lambda: b'["rose"]', "cat_to_name.json can't be read"),
}


@pytest.mark.parametrize("fault", FOUND)
def test_damage_that_was_found_in_the_index(original, small, fault):
    name, data, said = FOUND[fault]
    if name == "imagelabels.mat":
        (original / "labels.npz").unlink()
    (original / name).write_bytes(data())
    with pytest.raises(UserError, match=said):
        index_of(original, original / "split.json")


@pytest.mark.parametrize("name", ["imagelabels.mat", "setid.mat", "cat_to_name.json"])
def test_a_folder_in_the_place_of_a_file(small, tmp_path, cli, name):
    root = shutil.copytree(small, tmp_path / "d", ignore=shutil.ignore_patterns(".cache"))
    (root / name).unlink()
    (root / name).mkdir()
    assert name in error_line(cli("flowers.data", "--data_root", root))


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"file": "a", "captions": "abc"}',
        '{"file": "a", "captions": [null]}',
        '{"file": [], "captions": ["x"]}',
        '{"file": "a", "captions": [" "]}',
        "7",
    ],
    ids=range(6),
)
def test_damage_that_was_found_in_captions(tmp_path, line):
    (tmp_path / "captions.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="damaged after"):
        read_captions(tmp_path / "captions.jsonl", (Path("a"),))
    packed = bytearray(gzip.compress(b'{"file": "a", "captions": ["x"]}\n' * 9, mtime=0))
    packed[12] ^= 0xFF  # zlib.error
    (tmp_path / "captions.jsonl.gz").write_bytes(packed)
    with pytest.raises(UserError, match="damaged after"):
        read_captions(tmp_path / "captions.jsonl.gz", (Path("a"),))


def test_damage_that_was_found_in_tensors(tmp_path):
    path, state = tmp_path / "model.pt", tiny_clip().state_dict()
    whole = saved(state)
    middle = whole.index(state["token_embedding.weight"].numpy().tobytes()[:64]) + 1000
    name = "visual.conv1.weight"
    nan = state[name].clone()
    nan[0, 0, 0, 0] = float("nan")
    cases = {
        "checksum": whole[:middle] + bytes([whole[middle] ^ 64]) + whole[middle + 1 :],
        "not finite": saved(state | {name: nan}),
        "complex": saved(state | {name: state[name] + 0j}),
        "another kind": saved(state | {name: state[name].long()}),
        "sparse": saved(state | {name: state[name].to_sparse()}),
        "larger than its numbers": saved(state | {name: torch.zeros(1).expand(10**5, 3, 8, 8)}),
        "can't be read": whole.replace(b"archive/data.pkl", b"archive/\xffata.pkl"),
        "not the state dict": saved(
            {k: v[:65] if k == "text_projection" else v for k, v in state.items()}
            | {"positional_embedding": torch.zeros(77, 130)}
        ),
    }
    for said, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(UserError, match=said):
            weights.load_model(str(path))
    path.write_bytes(whole)
    assert torch.equal(weights.load_model(str(path)).state_dict()[name], state[name])
    torch.save({}, tmp_path / "classifier.pt")  # was taken for none
    with pytest.raises(UserError, match="classifier.pt is damaged"):
        evaluate.load_head(str(tmp_path), tiny_clip(), ["rose"], None, "a {}")


def test_damage_that_was_found_in_runs(two_runs, cli, small, tmp_path):
    read_accuracies = runpy.run_path(str(ROOT / "test_models.py"), run_name="test_models")[
        "read_accuracies"
    ]
    (two_runs / "results.jsonl").write_text(
        '{"name": "a", "architecture": "tiny", "test/top1": 50.0}\n'
        '{"name": "b", "architecture": "tiny", "test/top1": 9e9}\n'
    )
    assert read_accuracies(two_runs / "results.jsonl", ["tiny"]) == {
        "full": {"tiny": [50.0]}
    }  # no `splits`, and 9,000 million percent
    for run, other in (("one", "two"), ("two", "one")):  # each started from the other, for ever
        for name in ("args.json", "result.json"):
            path = two_runs / run / name
            path.write_text(
                json.dumps(json.loads(path.read_text()) | {"architecture": f"runs/{other}"})
            )
    found, notes = comparable.load(two_runs)
    comparable.resolve(found)
    assert not notes and len(found) == 2
    lines = (two_runs / "one" / "predictions.csv").read_text().splitlines()
    (two_runs / "one" / "predictions.csv").write_text("\n".join(lines[:-1]))
    assert "disagree" in comparable.load(two_runs)[1][0]
    flowers = open_flowers(small)
    (first, label), (second, _) = (
        (flowers.files[i].name, flowers.class_names[flowers.labels[i]]) for i in (0, 1)
    )
    head, row = "file,label,top1,score1\n", f"{first},{label},{label},0.5\n"
    for rows in (
        row + row,
        row + f"{second},tulip,rose,0.5\n",
        row.replace("0.5", "1.5"),
        row.replace("0.5", "nan"),
    ):
        (two_runs / "one" / "predictions.csv").write_text(head + rows)
        with pytest.raises(UserError, match="predictions.csv is damaged"):
            predictions.read_predictions(two_runs / "one", flowers)
    for content in (
        "",
        "file,label\na,b\n",
        "file,label,top1\na,b\n",
        "file,label,top1\na,b,c\na,b,c\n",
        'file,label,top1\n"a',
    ):
        (two_runs / "one" / "predictions.csv").write_text(content)
        with pytest.raises(ValueError, match="predictions.csv (is damaged|lacks answers)"):
            runs.read_predictions(two_runs / "one")
        assert "predictions.csv" in error_line(
            cli(
                "data_Exploration/isomap.py",
                "--data_root",
                small,
                "--level",
                "image",
                "--run",
                two_runs / "one",
            )
        )


def test_arguments_as_flags():
    assert runs.as_flags(
        {"a": 0, "b": None, "c": False, "d": True, "e": ["x {}", "--y"], "f": 1e-5, "g": ""}
    ) == ["--a=0", "--d", "--e=x {}", "--e=--y", "--f=1e-05", "--g="]


@pytest.mark.parametrize(
    "key, value",
    [
        ("splits", "swappee"),
        ("blocks", "x"),
        ("epochs", 1.5),
        ("prompt_template", [["a"]]),
        ("lr", "fast"),
        ("seed", -1),
        ("strategy", None),
        ("data_root", 7),
        ("views", [1, 2]),
    ],
)
def test_a_run_with_damaged_arguments_is_not_resumed(small, tmp_path, cli, key, value):
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    arguments = {
        "job": "train",
        "data_root": str(small),
        "architecture": "tiny",
        "epochs": 0,
        "processes": 1,
        "seed": 0,
        "name": "a",
    }
    (folder / "args.json").write_text(json.dumps(arguments | {key: value}))
    code, _, err = cli("train.py", "--resume", folder, "--wandb", "disabled")
    assert "Traceback" not in err and (
        code == 2 and "error: " in err or (key, code) == ("strategy", 0)
    ), err  # None: the default


# --- names ---

ODD = [
    'rose "Peace", pink',
    "l'été; d'Or",
    "ünïcode 花 🌸 \u202e",
    "{} {0} {name} %s",
    "50% a_b & c #1 $x$ $\\frac$ ~^\\",
    "=1+1|' `x`",
    "<b>bold</b> [x](http://a.b)",
    "../up/and *away*",
    "two\nlines\ttab",
    '\u2028,",\\"',
]
TEMPLATES = ['a {photo} of "{}", 50% $5$', "one_{{}}_{} & <i>\\x|y</i> #~^\n,two"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("odd") / "data", per_class=4, names=ODD)


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


@pytest.fixture(scope="module")
def odd_runs(odd):
    """Two runs that differ in the template alone, and the evaluation of the first."""
    folder = odd.parent / "runs"
    common = [
        "--data_root",
        str(odd),
        "--runs",
        str(folder),
        "--wandb",
        "disabled",
        "--architecture",
    ]
    scripts = [
        [
            "train.py",
            *common,
            "tiny",
            "--epochs",
            "1",
            "--name",
            f"t{i}",
            "--prompt_template",
            template,
        ]
        for i, template in enumerate(TEMPLATES)
    ]
    for script in [
        *scripts,
        [
            "baseline_eval.py",
            *common,
            str(folder / "t0"),
            "--name",
            "e",
            *(x for t in TEMPLATES for x in ("--prompt_template", t)),
        ],
    ]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", script)
            runpy.run_path(str(ROOT / script[0]), run_name="__main__")
    return folder


def test_odd_names_and_templates_go_through_training_and_evaluation(odd, odd_runs):
    flowers = open_flowers(odd)
    assert flowers.class_names == tuple(ODD)
    for run in ("t0", "t1", "e"):
        rows = read_csv(odd_runs / run / "predictions.csv")
        assert {row["label"] for row in rows} == set(ODD) and all(
            row[f"top{k}"] in ODD for row in rows for k in range(1, 6)
        )
        assert {row["class"] for row in read_csv(odd_runs / run / "report.csv")} == set(ODD)
        assert (
            len(predictions.read_predictions(odd_runs / run, flowers).index)
            == len(rows)
            == len(flowers.splits["test"])
        )
    assert [
        json.loads((odd_runs / run / "args.json").read_text())["prompt_template"]
        for run in ("t0", "t1", "e")
    ] == [TEMPLATES[:1], TEMPLATES[1:], TEMPLATES]
    from flowers.evaluate import fill_templates

    assert fill_templates(["{} {0}"], TEMPLATES) == [
        'a {photo} of "{} {0}", 50% $5$',
        "one_{{} {0}}_{} {0} & <i>\\x|y</i> #~^\n,two",
    ]


def test_odd_names_and_templates_in_a_report(odd_runs, tmp_path, cli):
    code, _, err = cli("report.py", "--runs", odd_runs, "--output", tmp_path, "--bootstrap", 10)
    assert code == 0, err
    text = (tmp_path / "report.md").read_text()
    (table,) = (p for p in tmp_path.glob("factors-*.tex"))
    body = [line for line in table.read_text().splitlines() if line.endswith(r"\\")]
    back = {
        v: k
        for k, v in {
            "%": r"\%",
            "_": r"\_",
            "&": r"\&",
            "#": r"\#",
            "{": r"\{",
            "}": r"\}",
            "<": "$<$",
            ">": "$>$",
            "$": r"\$",
            "\\": r"\textbackslash{}",
            "^": r"\^{}",
            "~": r"\~{}",
        }.items()
    }
    cells = {}
    for line in body[1:]:
        row = re.split(r"(?<!\\) & ", line.removesuffix(r" \\"))
        pattern = re.compile("|".join(map(re.escape, sorted(back, key=len, reverse=True))))
        assert not re.search(r"[%_&#{}$~^\\<>]", pattern.sub("", row[3]))
        cells[pattern.sub(lambda m: back[m[0]], row[3])] = len(row)
    assert cells == {" ".join(t.split()): 7 for t in TEMPLATES}
    rows = [line for line in text.splitlines() if line.startswith("| prompt")]
    assert (
        len(rows) == 2
        and all(len(re.findall(r"(?<!\\)\|", row)) == 8 for row in rows)
        and "<i>" not in text
        and "<b>" not in text
    )
    assert "worst classes of" not in text or not re.search(
        r"(?<!\\)[*`<]", text[text.index("worst classes of") :].split("\n")[0]
    )


def test_odd_names_in_the_exploration_scripts(odd, odd_runs, tmp_path, cli):
    for script, *arguments in (
        ["dataset_Description.py"],
        ["class_distribution.py", "--all"],
        ["class_distribution.py", *(x for n in ODD[2:] for x in ("--class", n))],
        *(["class_distribution.py", "--class", name] for name in ODD[4:8:3]),
        ["isomap.py", "--labels"],
        ["isomap.py", "--level", "image", "--n_neighbors", "4", "--run", odd_runs / "t0"],
    ):
        code, out, err = cli(
            f"data_Exploration/{script}",
            "--data_root",
            odd,
            "--output",
            tmp_path / "figures",
            *arguments,
        )
        assert code == 0, err
    assert {p.parent for p in tmp_path.rglob("*.png")} == {tmp_path / "figures"} and len(
        list(tmp_path.rglob("*.png"))
    ) == 7


def test_odd_names_on_the_page(odd, odd_runs, monkeypatch):
    from streamlit.testing.v1 import AppTest

    monkeypatch.setattr(sys, "argv", ["web.py", "--data_root", str(odd), "--runs", str(odd_runs)])

    def page(**address):
        at = AppTest.from_file(str(ROOT / "web.py"), default_timeout=60)
        at.query_params.update(address)
        at.run()
        assert not at.exception and not at.error
        return at

    flowers = open_flowers(odd)
    for c, name in enumerate(ODD):
        at = page(**{"class": name, "bars": "shown"})
        assert [p["lines"] for p in pictures(at)] == [
            [f"{i + 1} {name}"] for i in np.flatnonzero(flowers.labels == c)
        ]
        if c in (4, 5, 6):
            assert f"<h3>{escape(name)}</h3>" in html(
                page(image=str(int(np.flatnonzero(flowers.labels == c)[0]) + 1)), "image"
            )
    for part in ("pictures", "classes", "confusion"):
        page(view="runs", run="t0", other="t1", part=part)
    first = predictions.read_predictions(odd_runs / "t0", flowers)
    rows = list(
        csv.DictReader(io.StringIO(filters.export(flowers, first.index, [first]), ""), strict=True)
    )
    assert [(row["class"], row["t0 prediction"]) for row in rows] == [
        (ODD[flowers.labels[i]], ODD[first.guess[i]]) for i in first.index
    ]
