"""Damaged and hostile inputs, 1,000 for each reader (30 without the slow marker): a right result,
or one clear line; in bounded time and memory.
"""

import csv
import gzip
import io
import json
import pickle
import random
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

from flowers import UserError, cache, evaluate, files, pixels, runs, training, weights
from flowers.choices import context_template
from flowers.data import open_flowers
from flowers.gallery import filters, predictions, thumbnails
from flowers.layouts import read_captions
from flowers.models import VOCABULARY
from flowers.study import comparable

counts = pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.slow)])
# torch and numpy warn of what they are given
pytestmark = pytest.mark.filterwarnings("ignore")
# Bounds for one input, not speeds. Seconds are the processor's: other work does not count.
MOST_MB = 300
MOST_SECONDS = 10
LINUX = sys.platform == "linux"


def memory(key: str) -> int:
    """VmRSS, what this process holds, or VmHWM, the most it held since its peak was forgotten, in
    MB. 0 where there is no /proc.
    """
    if not LINUX:
        return 0
    match = re.search(key + r":\s*(\d+)", Path("/proc/self/status").read_text())
    return int(match[1]) >> 10 if match else 0


def forget_peak() -> None:
    """VmHWM counts from here."""
    if LINUX:
        Path("/proc/self/clear_refs").write_text("5")


def damaged_files(name, count, whole, text=False):
    """A whole file, then so many damaged ones."""
    for i in range(count + 1):
        yield damaged(name, i, whole, text=text)


def damaged_pictures(name, count, kinds):
    """A whole picture, then so many damaged ones of all kinds in turn."""
    for i in range(count + 1):
        yield damaged(name, i, kinds[i % len(kinds)])


@pytest.fixture
def survive(tally):
    """survive(name, inputs, read, right): for every input, right(read(input), input) holds, or read
    ends in a UserError of one line.

    The first input is whole, must be read, and does not count.
    """

    def attempt(read, right, data):
        """The problem with one input ('' if there is none), whether it was refused, and seconds."""
        start = time.process_time()
        seconds = None
        refused = False
        try:
            result = read(data)
            seconds = time.process_time() - start
            problem = "" if right(result, data) else f"read wrong: {str(result)[:300]}"
        except UserError as error:
            refused = True
            problem = "" if 10 < len(str(error)) < 1000 else f"unclear: {error}"
        except Exception:
            problem = traceback.format_exc(limit=-2)[:600]
        if seconds is None:
            seconds = time.process_time() - start
        return problem, refused, seconds

    def run(name, inputs, read, right, refuses=True):
        forget_peak()
        before = memory("VmRSS")
        inputs = iter(inputs)
        whole = next(inputs)
        assert right(read(whole), whole)

        tried = refused = 0
        slowest = 0.0
        failures = []
        for data in inputs:
            problem, was_refused, seconds = attempt(read, right, data)
            slowest = max(slowest, seconds)
            refused += was_refused
            if problem:
                failures.append(f"{name} {tried}: {problem}")
            tried += 1
        grown = memory("VmHWM") - before

        survived = tried - len(failures)
        note = (
            f"{refused:,} refused in a line, {survived - refused:,} read right, "
            f"slowest {slowest:.2f} s, at most +{grown} MB"
        )
        tally(name, tried, survived, note)
        assert not failures, f"{len(failures)} of {tried}:\n" + "\n".join(failures[:6])
        assert slowest < MOST_SECONDS
        assert grown < MOST_MB
        assert bool(refused) == refuses

    return run


# -----------------------------------------------------------------------------
# pictures


def picture(mode="RGB", size=(90, 70)):
    """A picture of smooth colours, the same every time."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8))
    return small.resize(size, Image.BICUBIC).convert(mode)


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


def by_us(file):
    """The picture as our reader reads it, (H, W, 3)."""
    return pixels.read_jpeg(file).permute(1, 2, 0).numpy()


@counts
def test_jpegs(survive, count, tmp_path):
    """What is read of a damaged JPEG is what another decoder reads.

    Damage that leaves the code whole can't be noticed: there is no checksum.
    """
    file = tmp_path / "image_00001.jpg"

    def read(data):
        file.write_bytes(data)
        return by_us(file)

    def right(image, data):
        return abs(image - by_pil(data)).max() <= 3

    survive("JPEG: pixels.read_jpeg", damaged_pictures("jpeg", count, JPEGS), read, right)


@counts
def test_uploads(survive, count):
    def right(image, data):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = by_pil(data)
        return (
            image.dtype == np.uint8
            and image.shape[0] * image.shape[1] <= thumbnails.MAX_UPLOAD_PIXELS
            and np.array_equal(image, expected)
        )

    inputs = damaged_pictures("upload", count, PICTURES)
    survive("uploads: thumbnails.open_picture", inputs, thumbnails.open_picture, right)


@counts
def test_thumbnails(survive, count, tmp_path):
    file = tmp_path / "image_00001.jpg"

    def read(data):
        file.write_bytes(data)
        jpeg = thumbnails.thumbnail(file)
        if not jpeg:
            raise UserError("the page shows 'damaged' in its place")
        return thumbnails.read_thumbnail(jpeg)

    def right(image, data):
        # a thumbnail has an eighth of the detail, so only the mean colours are compared
        whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        difference = abs(image.mean((0, 1)) - whole.mean((0, 1))).max()
        return image.shape == (160, 160, 3) and difference < 40

    survive("JPEG: thumbnails.thumbnail", damaged_pictures("thumbnail", count, JPEGS), read, right)


def claims(data, width, height):
    """A JPEG whose header says so many pixels."""
    position = data.index(b"\xff\xc0") + 5
    size = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return data[:position] + size + data[position + 4 :]


def many_scans(data, scans):
    """A progressive JPEG whose second scan comes again and again."""
    starts = [match.start() for match in re.finditer(rb"\xff\xda", data)]
    second = data[starts[1] : starts[2]]
    return data[: starts[2]] + second * scans + b"\xff\xd9"


# the index of a file of several pictures (Multi-Picture Object): version, number, entries
MPO = (
    b"\xff\xe2\x00\x5aMPF\0"
    + b"II*\0\x08\0\0\0"
    + b"\x03\0"
    + b"\0\xb0\x07\0\4\0\0\0"
    + b"0100"
    + b"\1\xb0\4\0\1\0\0\0\2\0\0\0"
    + (b"\2\xb0\7\0\x20\0\0\0\x32\0\0\0" + bytes(4) + bytes(32))
)
SCANS = many_scans(encoded("JPEG", size=(2000, 2000), progressive=True), 20_000)
BOMBS = {
    "65,000 x 65,000": claims(JPEGS[0], 65000, 65000),
    "10,000 x 10,000": claims(JPEGS[0], 10000, 10000),
    "20,000 scans": SCANS,
    "20,000 scans, of several pictures": SCANS[:2] + MPO + SCANS[2:],
}
# Run in a process of its own, whose peak memory is that of the reading.
READ_BOMBS = """
import resource
import sys
import time
from pathlib import Path

from flowers import UserError, pixels
from flowers.gallery import thumbnails


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def open_upload(file):
    return thumbnails.open_picture(file.read_bytes())


before = peak()
start = time.process_time()
for file in sorted(Path(sys.argv[1]).glob("*.jpg")):
    for read in (pixels.read_jpeg, open_upload):
        try:
            read(file)
            sys.exit(f"{file} was read")
        except UserError as error:
            reasons = ("pixels", "scans", "DecompressionBomb")
            assert any(word in str(error) for word in reasons), error
    assert thumbnails.thumbnail(file) == b""
assert peak() - before < 50_000  # kB
assert time.process_time() - start < 8
"""


def test_pictures_that_claim_too_much_are_refused_before_they_take_memory_or_time(tmp_path):
    """The first would take 12.7 GB, the last minutes."""
    for i, data in enumerate(BOMBS.values()):
        (tmp_path / f"image_{i:05d}.jpg").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", READ_BOMBS, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr


def test_odd_but_whole_jpegs_are_read(tmp_path):
    upright = picture(size=(80, 48))
    turned = upright.getexif()
    turned[0x0112] = 6  # orientation: a quarter turn
    options = {
        "progressive": {"progressive": True},
        "grey": {},
        "CMYK": {},
        "turned": {"exif": turned},
        "restarts": {"restart_marker_rows": 1},
        "smooth": {"smooth": 50},
        "one pixel wide": {},
    }
    modes = {"grey": "L", "CMYK": "CMYK"}
    file = tmp_path / "a.jpg"
    for name, kind in options.items():
        image = upright.convert(modes.get(name, "RGB"))
        if name == "one pixel wide":
            image = image.resize((1, 40))
        image.save(file, **kind)
        assert abs(by_us(file) - by_pil(file.read_bytes())).max() <= 3, name

    data = bytearray(JPEGS[0])
    data[data.index(b"\xff\xc0") + 4] = 12  # bits a sample
    file.write_bytes(data)
    with pytest.raises(UserError, match="a.jpg can't be decoded"):
        pixels.read_jpeg(file)

    # a PNG of 16 bits under a JPEG's name is read as what it is
    Image.fromarray(np.full((30, 40), 65_535, np.uint16)).save(tmp_path / "b.png")
    (tmp_path / "b.png").rename(file)
    assert (pixels.read_jpeg(file) == 255).all()
    # a GIF is no picture of a dataset
    picture(size=(80, 48)).save(tmp_path / "b.gif")
    (tmp_path / "b.gif").rename(file)
    with pytest.raises(UserError, match="a.jpg can't be decoded"):
        pixels.read_jpeg(file)


# -----------------------------------------------------------------------------
# the index


def index_of(root, splits_path=None):
    """File names, 1-based labels, class names, and 1-based ids of each split."""
    flowers = open_flowers(root, splits_path)
    file_names = [file.name for file in flowers.files]
    labels = (flowers.labels + 1).tolist()
    splits = {name: (index + 1).tolist() for name, index in flowers.splits.items()}
    return file_names, labels, flowers.class_names, splits


def reader(root, name, splits_path=None):
    def read(data):
        (root / name).write_bytes(data)
        return index_of(root, splits_path)

    return read


@counts
@pytest.mark.parametrize("name", ["imagelabels.mat", "setid.mat"])
@pytest.mark.parametrize("kind", ["compressed", "plain"])
def test_mat(survive, small, tmp_path, name, kind, count):
    """Without compression there is no checksum: a label or id that became another valid one can't
    be noticed, and is what the file now says.
    """
    root = shutil.copytree(small, tmp_path / "d", ignore=shutil.ignore_patterns(".cache"))
    contents = scipy.io.loadmat(root / name)
    arrays = {key: value for key, value in contents.items() if not key.startswith("_")}
    scipy.io.savemat(root / name, arrays, do_compression=kind == "compressed")
    whole = (root / name).read_bytes()
    expected = index_of(root)

    def right(index, data):
        if index == expected or kind == "compressed":
            return index == expected
        if name == "imagelabels.mat":
            _, labels, *_ = index
            others_same = (index[0], *index[2:]) == (expected[0], *expected[2:])
            return bytes(labels) in data and others_same
        test_ids = np.array(sorted(index[3]["test"]), arrays["trnid"].dtype)
        return test_ids.tobytes() in data

    inputs = damaged_files(f"{name} {kind}", count, whole)
    survive(f"{name}, {kind}", inputs, reader(root, name), right)


@pytest.fixture
def original(small, tmp_path):
    """The layout of the original project: labels.npz and a split JSON."""
    root = tmp_path / "original"
    shutil.copytree(small / "jpg", root / "images" / "jpg")
    shutil.copy(small / "cat_to_name.json", root)
    np.savez_compressed(root / "labels.npz", scipy.io.loadmat(small / "imagelabels.mat")["labels"])
    setid = scipy.io.loadmat(small / "setid.mat")
    splits = {name: setid[name].ravel().tolist() for name in ("trnid", "valid", "tstid")}
    (root / "split.json").write_text(json.dumps(splits))
    return root


@counts
@pytest.mark.parametrize("name", ["labels.npz", "split.json", "cat_to_name.json"])
def test_the_original_layout(survive, original, name, count):
    whole = (original / name).read_bytes()
    expected = index_of(original, original / "split.json")

    def right(index, data):
        if index == expected or name == "labels.npz":
            return index == expected
        contents = json.loads(data)
        if name == "cat_to_name.json":
            names = tuple(contents[str(i)] for i in range(1, len(contents) + 1))
            others_same = (*index[:2], index[3]) == (*expected[:2], expected[3])
            return index[2] == names and others_same

        # the swapped split, from 0-based or 1-based ids
        ids = [np.ravel(contents[key]).astype(int).tolist() for key in ("trnid", "valid", "tstid")]
        first = min(min(part) for part in ids if part)
        if first == 0:
            ids = [[i + 1 for i in part] for part in ids]
        trnid, valid, tstid = ids
        file_names, _, _, splits = index
        # image_00001.jpg
        found = {key: [int(file_names[i - 1][6:11]) for i in part] for key, part in splits.items()}
        return found == {"train": sorted(valid + tstid), "val": [], "test": sorted(trnid)}

    inputs = damaged_files(name, count, whole, text=name.endswith("json"))
    survive(name, inputs, reader(original, name, original / "split.json"), right)


@counts
@pytest.mark.parametrize("name", ["captions.jsonl", "captions.jsonl.gz"])
def test_captions(survive, small, tmp_path, name, count):
    files = open_flowers(small).files
    expected = [[f"about {file.name}", "ünïcode\u2028"] for file in files]
    lines = []
    for file, captions in zip(files, expected):
        row = {"file": file.name, "captions": captions}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    whole = "".join(lines).encode()
    packed = name.endswith("gz")
    if packed:
        whole = gzip.compress(whole, mtime=0)

    def read(data):
        (tmp_path / name).write_bytes(data)
        return read_captions(tmp_path / name, files)

    def right(captions, data):
        if captions == expected or packed:  # gzip has a checksum
            return captions == expected
        rows = [json.loads(line) for line in data.decode().rstrip("\n").split("\n")]
        captions_of = {row["file"]: row["captions"] for row in rows}
        all_text = all(isinstance(sentence, str) for part in captions for sentence in part)
        return captions == [captions_of[file.name] for file in files] and all_text

    survive(name, damaged_files(name, count, whole, text=not packed), read, right)


# -----------------------------------------------------------------------------
# files that unpack to more than they should


def npy_claiming(shape):
    """A .npy whose header says this shape, with 100 numbers."""
    out = io.BytesIO()
    header = {"descr": "<i8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, header)
    return out.getvalue() + bytes(800)


def mat_claiming(n):
    """A compressed .mat of n ones, as labels."""
    out = io.BytesIO()
    scipy.io.savemat(out, {"labels": np.ones((1, n), np.uint8)}, do_compression=True)
    return out.getvalue()


def zipped(name, chunks):
    """A zip with one file."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open(name, "w", force_zip64=True) as file:
            for chunk in chunks:
                file.write(chunk)
    return out.getvalue()


def tensors_of_zeros():
    """300 MB of them, packed: torch never does so, but would read it."""
    archive = zipfile.ZipFile(io.BytesIO(saved({"a": torch.zeros(300 << 18)})))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
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
    path = (tmp_path if name == "model.pt" else original) / name
    if name == "imagelabels.mat":
        (original / "labels.npz").unlink()
    path.write_bytes(data())

    before = memory("VmRSS")
    forget_peak()
    start = time.process_time()
    with pytest.raises(UserError, match=f"{name} (can't be read|is damaged)"):
        if name == "model.pt":
            weights.load_model(str(path))
        elif name.startswith("captions"):
            read_captions(path, (Path("a"),))
        else:
            index_of(original, original / "split.json")
    assert memory("VmHWM") - before < 200
    assert time.process_time() - start < 5


class Opens:
    """Pickled, it makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickled_objects_are_refused_and_run_nothing(original, tmp_path):
    mark = tmp_path / "was here"
    objects = np.array([Opens(mark)] * 48, dtype=object)
    np.savez(original / "labels.npz", objects)
    with pytest.raises(UserError, match="can't be read"):
        index_of(original, original / "split.json")

    path = tmp_path / "a.pt"
    torch.save({"positional_embedding": Opens(mark)}, path)
    with pytest.raises(UserError, match="can't be read"):
        weights.load_model(str(path))

    path = tmp_path / "b.pt"
    path.write_bytes(pickle.dumps(Opens(mark)))
    with pytest.raises(UserError, match="can't be read"):
        files.load_tensors(path)

    path = tmp_path / "c.pt"
    torch.save({"a": Opens(mark)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="can't be read"):
        files.load_tensors(path)
    assert not mark.exists()


# -----------------------------------------------------------------------------
# tensors


def tiny_clip():
    """A CLIP of 600 kB."""
    torch.manual_seed(0)
    return CLIP(16, 16, 1, 64, 8, 77, 300, 64, 1, 1).eval()


def saved(state, **options):
    """The bytes that torch.save writes."""
    out = io.BytesIO()
    torch.save(state, out, **options)
    return out.getvalue()


def strange_tensor(value, rng):
    """Something else in the place of a tensor."""
    dense = isinstance(value, torch.Tensor) and value.layout == torch.strided
    if dense and value.ndim and 0 < value.numel() < 10**6:
        tensor = value
    else:
        tensor = torch.zeros(3, 3)
    not_finite = tensor.clone().float()
    position = rng.integers(not_finite.numel())
    not_finite.view(-1)[position] = float(rng.choice([np.nan, np.inf, -np.inf]))
    one = tensor.new_zeros(1)
    others = [
        not_finite,
        tensor.half(),
        tensor.double(),
        tensor.long(),
        tensor.bool(),
        tensor[None],
        tensor.flatten(),
        tensor[:0],
        tensor.new_zeros(()),
        one.expand(10**6, 10**6),
        one.expand(*[size * 1000 for size in tensor.shape]),
        torch.cat([tensor, tensor]),
        tensor.to_sparse(),
        tensor.to(torch.complex64),
        tensor.tolist(),
        None,
        "text",
        {},
        7,
    ]
    return others[rng.integers(len(others))]


def damaged_state(name, i, state):
    """The bytes of a state dict in which something is missing, renamed or replaced.

    Every second time its file is damaged instead. Number 0 is whole.
    """
    rng = np.random.default_rng([i, zlib.crc32(name.encode())])
    if i % 2 or i == 0:
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
            # two more blocks
            more = {}
            for name_of, value in state.items():
                if "resblocks.0" in name_of:
                    for n in (1, 2):
                        more[name_of.replace("resblocks.0", f"resblocks.{n}")] = value
            state |= more
        else:
            state[key] = strange_tensor(state[key], rng)
    content = list(state.items()) if rng.random() < 0.03 else state
    legacy = rng.random() < 0.1
    return saved(content, _use_new_zipfile_serialization=not legacy)


def damaged_states(name, count, state):
    """A whole state dict, then so many damaged ones."""
    for i in range(count + 1):
        yield damaged_state(name, i, state)


def loaded(data):
    """What the bytes of a .pt file hold."""
    return torch.load(io.BytesIO(data), weights_only=True)


@counts
def test_state_dicts(survive, count, tmp_path):
    """The model is what the file holds. A legacy file has no checksum, but its structure is
    checked.
    """
    path = tmp_path / "model.pt"

    def read(data):
        path.write_bytes(data)
        return weights.load_model(str(path)).state_dict()

    def right(state, data):
        expected = loaded(data)
        if state.keys() != expected.keys():
            return False
        for key, value in state.items():
            if not torch.equal(value, expected[key].float()) or not value.isfinite().all():
                return False
        is_zip = data.startswith(b"PK")
        return not is_zip or zipfile.ZipFile(io.BytesIO(data)).testzip() is None

    inputs = damaged_states("model", count, tiny_clip().state_dict())
    survive("model.pt: weights.load_model", inputs, read, right)


@counts
@pytest.mark.parametrize("kind", ["prompt", "linear"])
def test_classifiers(survive, count, tmp_path, kind):
    names = ["rose", "lotus", "mallow"]
    torch.save(tiny_clip().state_dict(), tmp_path / "model.pt")
    if kind == "prompt":
        state = {"context": torch.randn(4, 64)}
    else:
        state = {"weight": torch.randn(3, 16), "bias": torch.randn(3), "class_names": names}
    model = tiny_clip()
    # Its vocabulary is too small for words.
    model.token_embedding = torch.nn.Embedding(VOCABULARY, 64)

    def read(data):
        (tmp_path / "classifier.pt").write_bytes(data)
        model.context = None
        head, templates = evaluate.load_head(str(tmp_path), model, names, None, "a {}")
        return head, templates, model.context

    def right(result, data):
        expected = loaded(data)
        (weight, bias), templates, context = result
        if kind == "prompt":
            template = context_template(len(context))
            return torch.equal(context, expected["context"]) and templates == [template]
        return (
            torch.equal(weight, expected["weight"])
            and torch.equal(bias, expected["bias"])
            and templates == ["a {}"]
        )

    inputs = damaged_states(kind, count, state)
    survive(f"classifier.pt, {kind}: evaluate.load_head", inputs, read, right)


@counts
def test_checkpoints(survive, count, tmp_path):
    restore = runpy.run_path(str(ROOT / "train.py"), run_name="train")["restore"]
    path = tmp_path / "checkpoint.pt"
    model = torch.nn.Linear(4, 3)
    trained = dict(model.named_parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = torch.optim.AdamW(training.parameter_groups(trained, lr=1e-3, wd=0.01), lr=1e-3)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()

    def parameters():
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    state = {
        "model": parameters(),
        "start": "abc",
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "seconds": 2.5,
    }

    def inputs():
        for i in range(count + 1):
            if i % 4 == 2:
                # a whole checkpoint of damaged parameters
                inner = loaded(damaged_state("inner", 2 * i, dict(state["model"])))
                yield saved(state | {"model": inner})
            else:
                yield damaged_state("checkpoint", i, state)

    def read(data):
        path.write_bytes(data)
        progress = restore(path, "abc", trained, {}, optimizer, scaler)
        optimizer.step()  # with what it was given
        return progress, parameters()

    def right(result, data):
        expected = loaded(data)
        progress, values = result
        return (
            progress == (expected["epoch"], expected["seconds"])
            and expected["start"] == "abc"
            and all(torch.isfinite(p).all() for p in values.values())
        )

    survive("checkpoint.pt: train.restore", inputs(), read, right)
    with pytest.raises(UserError, match="trains other parameters"):
        read(saved(state | {"model": {}}))


# -----------------------------------------------------------------------------
# the cache


@counts
def test_the_cache(count, tmp_path, tally, capsys):
    """A damaged cache is made anew, with a warning; a whole one is read."""
    rows = np.random.default_rng(0).integers(0, 255, (5, 3, 8, 8), dtype=np.uint8)
    path = tmp_path / "pixels.npy"
    computed = []  # for each reading, whether the rows were computed

    def read():
        computed.append(False)

        def compute():
            computed[-1] = True
            yield rows

        return cache.cached_array(path, b"k" * 32, rows.shape, "|u1", compute)

    read()
    whole = path.read_bytes()
    headers = [
        whole.replace(b"'fortran_order': False", b"'fortran_order': True "),
        whole.replace(b"(5, 3, 8, 8)", b"(8, 8, 3, 5)"),
        whole.replace(b"(5, 3, 8, 8)", b"(-5, 3, 8,8)"),
        whole.replace(b"|u1", b"|O "),
        whole.replace(b"|u1", b"|i1"),
        zipped("arr_0.npy", [whole]),
        whole.replace(b"(5, 3, 8, 8)", b"(" * 12),
        pickle.dumps(rows),
    ]
    slowest = 0.0
    for i in range(count):
        data = headers[i] if i < len(headers) else damaged("cache", i, whole)
        path.write_bytes(data)
        capsys.readouterr()
        start = time.process_time()
        assert np.array_equal(read(), rows), i
        slowest = max(slowest, time.process_time() - start)
        warned = "warning: " in capsys.readouterr().err
        assert computed[-1] == warned, i
        if data == whole:
            assert not computed[-1], i

    made_anew = sum(computed) - 1  # the first time it was not there
    note = (
        f"{made_anew:,} made anew with a warning, {count - made_anew:,} still whole, "
        f"slowest {slowest:.2f} s"
    )
    tally("pixel cache: cache.cached_array", count, count, note)
    assert sum(computed) > count / 2
    assert slowest < MOST_SECONDS


# -----------------------------------------------------------------------------
# runs


@pytest.fixture
def two_runs(tmp_path):
    folder = tmp_path / "runs"
    write_run(folder, "one", 0.5, split="test")
    write_run(folder, "two", 0.7, split="test", lr=1e-2, strategy="text")
    return folder


def csv_rows(data):
    return list(csv.DictReader(io.StringIO(data.decode(), "")))


def json_lines(data):
    """The rows of a JSON lines file; blank lines are none."""
    return [json.loads(line) for line in data.decode().split("\n") if line]


@counts
@pytest.mark.parametrize("name", ["result.json", "args.json", "predictions.csv"])
def test_runs_in_a_report(survive, count, two_runs, tmp_path, cli, name):
    """A run is left out with a line that says why, or what is compared are the numbers of its
    files; where they changed, a report is made of them.
    """
    path = two_runs / "one" / name
    whole = path.read_bytes()
    reports = []

    def read(data):
        path.write_bytes(data)
        loaded_runs, notes = comparable.load(two_runs)
        if notes:
            raise UserError(*notes)
        loaded_runs, _ = comparable.resolve(loaded_runs)
        comparable.best_by_strategy(loaded_runs)
        comparable.factorial(loaded_runs)
        return next((run for run in loaded_runs if run.name == "one"), None)

    def make_report():
        output = ("--output", tmp_path / "report", "--bootstrap", 10)
        outcome = cli("report.py", "--runs", two_runs, *output)
        reports.append(outcome)
        code, _, err = outcome
        assert code == 0, err
        assert "Traceback" not in err, err

    def right(run, data):
        # a report takes seconds: only a few of the changed ones get one
        if len(reports) < max(1, count // 40) and name != "predictions.csv":
            if json.loads(data) != json.loads(whole):
                make_report()
        if run is None:  # it has no result on any split, or is the start of the other
            return "test/top1" not in json.loads(data) or name == "args.json"
        rows = csv_rows((two_runs / "one" / "predictions.csv").read_bytes())
        result = json.loads((two_runs / "one" / "result.json").read_text())
        accuracy = 100 * np.mean([row["label"] == row["top1"] for row in rows])
        return (
            len(run.labels) == len(rows) == len({row["file"] for row in rows})
            and abs(run.top1 - accuracy) < 0.01
            and run.top1 == result["test/top1"]
        )

    inputs = damaged_files(f"run {name}", count, whole, text=True)
    survive(f"{name}: comparable.load", inputs, read, right)
    assert reports or name == "predictions.csv"


@counts
def test_metrics(survive, count, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = []
    for i in range(20):
        row = {
            "epoch": 1 + i // 5,
            "step": i + 1,
            "train/loss": 3 / (i + 1),
            "train/lr": 1e-3,
            "val/top1": 4.0 * i,
        }
        lines.append(json.dumps(row) + "\n")
    whole = "".join(lines).encode()

    def read(data):
        path.write_bytes(data)
        capsys.readouterr()
        rows = files.read_lines(path, "train/loss")
        warning = capsys.readouterr().err
        if warning:
            assert re.fullmatch(r"warning: \d+ damaged lines? of \S+ left out\n", warning)
            raise UserError(warning)
        return rows

    def right(rows, data):
        expected = [row for row in json_lines(data) if "train/loss" in row]
        return rows == expected and all(np.isfinite(row["train/loss"]) for row in rows)

    inputs = damaged_files("metrics", count, whole, text=True)
    survive("metrics.jsonl: files.read_lines", inputs, read, right)


def read_accuracies():
    """The function of test_models.py that reads results.jsonl."""
    return runpy.run_path(str(ROOT / "test_models.py"), run_name="test_models")["read_accuracies"]


@counts
def test_results(survive, count, two_runs, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    read_series = read_accuracies()
    lines = []
    for name in ("one", "two"):
        result = json.loads((two_runs / name / "result.json").read_text())
        lines.append(json.dumps(result).encode() + b"\n")
    whole = b"".join(lines)

    def read(data):
        path.write_bytes(data)
        capsys.readouterr()
        series = read_series(path, ["tiny"])
        warning = capsys.readouterr().err
        if warning:
            raise UserError(warning)
        return series

    def right(series, data):
        expected = {}
        for row in json_lines(data):
            if row.get("architecture") == "tiny" and {"name", "test/top1"} <= set(row):
                expected[row["name"]] = row["test/top1"]
        values = []
        for of_architecture in series.values():
            for accuracies in of_architecture.values():
                values += accuracies
        return sorted(values) == sorted(expected.values())

    inputs = damaged_files("results", count, whole, text=True)
    survive("results.jsonl: test_models.read_accuracies", inputs, read, right)


@counts
def test_what_a_run_is_resumed_or_compared_by(survive, count, two_runs):
    """args.json goes through the parser of the script again; result.json holds percentages."""
    args = two_runs / "one" / "args.json"
    result = two_runs / "one" / "result.json"
    whole = {args: args.read_bytes(), result: result.read_bytes()}
    # these may differ in the run that goes on
    own = ("runs", "name", "wandb", "resume", "compare", "device")

    def inputs():
        for i in range(count + 1):
            path = (args, result)[i % 2]
            yield path, damaged("resumed", i, whole[path], text=True)

    def read(item):
        path, data = item
        path.write_bytes(data)
        if path == result:
            return runs.read_metrics(two_runs / "one", "test")
        result.unlink(missing_ok=True)
        stored = runs.arguments_to_resume(two_runs / "one", "train")
        return runs.as_flags(stored)

    def right_metrics(metrics, contents):
        expected = {key[5:]: v for key, v in contents.items() if key.startswith("test/")}
        percentages = [value for key, value in metrics.items() if key != "n"]
        return metrics == expected and all(0 <= value <= 100 for value in percentages)

    def right_flags(flags, contents):
        expected = set()
        for key, value in contents.items():
            if key in own:
                continue
            if value is True:
                expected.add(f"--{key}")
            elif value is not None and value is not False and not isinstance(value, list):
                expected.add(f"--{key}={value}")
        return contents["job"] == "train" and expected <= set(flags)

    def right(got, item):
        path, data = item
        contents = json.loads(data)
        if path == result:
            return right_metrics(got, contents)
        return right_flags(got, contents)

    name = "args.json, result.json: runs.arguments_to_resume, read_metrics"
    survive(name, inputs(), read, right)


@counts
def test_predictions_on_the_page(survive, count, small, tmp_path):
    """A row that is missing can't be noticed: a run may have evaluated any images."""
    flowers = open_flowers(small)
    rng = np.random.default_rng(0)
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    header = ["file", "label"]
    for k in range(1, 4):
        header += [f"top{k}", f"score{k}"]
    writer.writerow(header)
    for i in flowers.splits["test"]:
        order = rng.permutation(NAMES)
        scores = -np.sort(-rng.dirichlet(np.ones(3)))
        row = [flowers.files[i].name, NAMES[flowers.labels[i]]]
        for k in range(3):
            row += [order[k], round(scores[k], 6)]
        writer.writerow(row)
    whole = out.getvalue().encode()
    index_of_file = {file.name: i for i, file in enumerate(flowers.files)}

    def read(data):
        (tmp_path / "predictions.csv").write_bytes(data)
        return predictions.read_predictions(tmp_path, flowers)

    def right_row(predictions, row):
        i = index_of_file[row["file"]]
        pairs = []
        for k in range(1, 6):
            if row.get(f"top{k}"):
                pairs.append((NAMES.index(row[f"top{k}"]), float(row[f"score{k}"])))
        return (
            row["label"] == NAMES[flowers.labels[i]]
            and predictions.top[i] == tuple(pairs)
            and 0 <= pairs[0][1] <= 1
        )

    def right(predictions, data):
        rows = [row for row in csv_rows(data) if row["file"] in index_of_file]
        if not all(right_row(predictions, row) for row in rows):
            return False
        return len(rows) == len(predictions.index) == len({row["file"] for row in rows})

    inputs = damaged_files("predictions", count, whole, text=True)
    survive("predictions.csv: predictions.read_predictions", inputs, read, right)


# -----------------------------------------------------------------------------
# the page

OPENED = []  # every file that this process has opened since it was cleared


def note_opened(event, arguments):
    if event == "open":
        OPENED.append(str(arguments[0]))


sys.addaudithook(note_opened)
# The parameters of an address, and values that they may have.
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
# These keep what is written there, as far as it makes sense.
# The name of a run that is not there stays as well: a warning says so where it is used.
FREE = ("ids", "q", "image", "page", "run", "other", "model", "like")
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


def strange_address(i):
    """The parameters of address number i. Number 0 has none."""
    rng = random.Random(f"address {i}")
    parameters = {}
    if i == 0:
        return parameters
    keys = rng.sample(list(ADDRESS), rng.choice([1, 2, 4, len(ADDRESS)]))
    for key in keys:
        value = rng.choice(ADDRESS[key])
        how = rng.random()
        if how < 0.4:
            parameters[key] = value
        elif how < 0.8:
            parameters[key] = rng.choice(HOSTILE)
        else:
            data = damaged(f"address {key}", i, value.encode(), text=True)
            parameters[key] = data.decode("latin-1")[:20_000]
    if rng.random() < 0.1:
        # a parameter twice
        pair = [rng.choice(HOSTILE), "b"]
        parameters[rng.choice(["run", "class", "page", "unknown", "__proto__"])] = pair
    return parameters


def is_outside(path):
    """Whether a file that was opened is one that no address may reach."""
    if path.startswith("/etc/passwd"):
        return True
    return "\0" not in path and "secret" in Path(path).resolve().parts


# a third of a second each
@pytest.mark.parametrize("count", [8, pytest.param(1000, marks=pytest.mark.slow)])
def test_addresses(survive, count, small, tmp_path, monkeypatch):
    """The page of any address has no error but one sentence, shows only images of the dataset, and
    opens no file beside data and runs.
    """
    from streamlit.testing.v1 import AppTest

    flowers = open_flowers(small)
    folder = tmp_path / "runs"
    for seed, name in enumerate(("one", "two")):
        rng = np.random.default_rng(seed)
        rows = []
        for i in flowers.splits["test"]:
            row = {
                "file": flowers.files[i].name,
                "label": NAMES[flowers.labels[i]],
                "top1": NAMES[rng.integers(6)],
                "score1": 0.5,
            }
            rows.append(row)
        (folder / name).mkdir(parents=True)
        files.write_csv(folder / name / "predictions.csv", rows)
    shutil.copytree(folder / "one", tmp_path / "secret")
    monkeypatch.setattr(sys, "argv", ["web.py", "--data_root", str(small), "--runs", str(folder)])

    def read(address):
        page = AppTest.from_file(str(ROOT / "web.py"), default_timeout=600)
        page.query_params.update(address)
        OPENED.clear()
        page.run()
        assert not page.exception, page.exception
        if page.error:
            raise UserError(*(error.value for error in page.error))
        return page

    def right(page, address):
        ids = []
        for key in ("pictures", "neighbours"):
            ids += [picture["id"] for picture in pictures(page, key)]
        # the address that the page writes itself
        parameters = {key: str(np.ravel(v)[0]) for key, v in page.query_params.items()}
        known = all(key in FREE or value in ADDRESS[key] for key, value in parameters.items())
        reached = [path for path in OPENED if is_outside(path)]
        return all(1 <= i <= 48 for i in ids) and not reached and known

    inputs = map(strange_address, range(count + 1))
    survive("addresses: web.py", inputs, read, right, refuses=False)


# -----------------------------------------------------------------------------
# faults that were found, each with the input that showed it


def small_mat():
    """The bytes of a plain imagelabels.mat."""
    out = io.BytesIO()
    scipy.io.savemat(out, {"labels": (np.arange(48) % 6 + 1).astype(np.uint8)[None]})
    return out.getvalue()


def mat_with_another_byte():
    data = bytearray(small_mat())
    data[185] = 8
    return bytes(data)


def mat_with_another_checksum():
    return mat_claiming(48)[:-1] + b"x"


def mat_cut_off():
    """A packed one that ends early, and says so."""
    whole = mat_claiming(48)
    length = (len(whole) - 140).to_bytes(4, "little")
    return whole[:132] + length + whole[136:-4]


def npz_of(labels):
    out = io.BytesIO()
    np.savez(out, labels)
    return out.getvalue()


def names_without_text():
    return json.dumps({i: None if i == 3 else str(i) for i in range(1, 7)}).encode()


DEEP = "[" * 100_000
# file, what takes its place, and a part of the message
FOUND = {
    "scipy's reader crashed": (
        "imagelabels.mat",
        mat_with_another_byte,
        "imagelabels.mat can't be read",
    ),
    "of a checksum that scipy does not compare": (
        "imagelabels.mat",
        mat_with_another_checksum,
        "imagelabels.mat can't be read",
    ),
    "packed and cut off": (
        "imagelabels.mat",
        mat_cut_off,
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
    "deep names": (
        "cat_to_name.json",
        lambda: f'{{"1": {DEEP}'.encode(),
        "nested too deeply",
    ),
    "a name of no text": (
        "cat_to_name.json",
        names_without_text,
        "no name for class 3",
    ),
    "names in a list": (
        "cat_to_name.json",
        lambda: b'["rose"]',
        "cat_to_name.json can't be read",
    ),
}


@pytest.mark.parametrize("fault", FOUND)
def test_damage_that_was_found_in_the_index(original, small, fault):
    name, make, message = FOUND[fault]
    if name == "imagelabels.mat":
        (original / "labels.npz").unlink()
    (original / name).write_bytes(make())
    with pytest.raises(UserError, match=message):
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
    path = tmp_path / "captions.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match="damaged after"):
        read_captions(path, (Path("a"),))

    packed = bytearray(gzip.compress(b'{"file": "a", "captions": ["x"]}\n' * 9, mtime=0))
    packed[12] ^= 0xFF  # zlib.error
    path = tmp_path / "captions.jsonl.gz"
    path.write_bytes(packed)
    with pytest.raises(UserError, match="damaged after"):
        read_captions(path, (Path("a"),))


def test_damage_that_was_found_in_tensors(tmp_path):
    path = tmp_path / "model.pt"
    state = tiny_clip().state_dict()
    whole = saved(state)
    name = "visual.conv1.weight"
    weight = state[name]

    # a bit in the middle of a tensor
    flipped = bytearray(whole)
    middle = whole.index(state["token_embedding.weight"].numpy().tobytes()[:64]) + 1000
    flipped[middle] ^= 64
    not_finite = weight.clone()
    not_finite[0, 0, 0, 0] = float("nan")
    # shapes of a model that its other tensors contradict
    contradicting = dict(state)
    contradicting["text_projection"] = state["text_projection"][:65]
    contradicting["positional_embedding"] = torch.zeros(77, 130)
    cases = {
        "checksum": bytes(flipped),
        "not finite": saved(state | {name: not_finite}),
        "complex": saved(state | {name: weight + 0j}),
        "another kind": saved(state | {name: weight.long()}),
        "sparse": saved(state | {name: weight.to_sparse()}),
        "larger than its numbers": saved(state | {name: torch.zeros(1).expand(10**5, 3, 8, 8)}),
        "can't be read": whole.replace(b"archive/data.pkl", b"archive/\xffata.pkl"),
        "not the state dict": saved(contradicting),
    }
    for message, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            weights.load_model(str(path))

    path.write_bytes(whole)
    assert torch.equal(weights.load_model(str(path)).state_dict()[name], weight)

    torch.save({}, tmp_path / "classifier.pt")  # was taken for none
    with pytest.raises(UserError, match="classifier.pt is damaged"):
        evaluate.load_head(str(tmp_path), tiny_clip(), ["rose"], None, "a {}")


def test_damage_that_was_found_in_results(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(
        '{"name": "a", "architecture": "tiny", "test/top1": 50.0}\n'
        '{"name": "b", "architecture": "tiny", "test/top1": 9e9}\n'
    )
    # no `splits`, and 9,000 million percent
    assert read_accuracies()(path, ["tiny"]) == {"full": {"tiny": [50.0]}}


def test_damage_that_was_found_in_runs(two_runs, cli, small):
    # each started from the other, for ever
    for run, other in (("one", "two"), ("two", "one")):
        for name in ("args.json", "result.json"):
            path = two_runs / run / name
            contents = json.loads(path.read_text())
            contents["architecture"] = f"runs/{other}"
            path.write_text(json.dumps(contents))
    loaded_runs, notes = comparable.load(two_runs)
    comparable.resolve(loaded_runs)
    assert not notes
    assert len(loaded_runs) == 2

    # a line is missing: the accuracy is another one than result.json says
    run = two_runs / "one"
    path = run / "predictions.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]))
    _, notes = comparable.load(two_runs)
    assert "disagree" in notes[0]

    # an image twice, a class that is none, scores that are none
    flowers = open_flowers(small)
    first = flowers.files[0].name
    second = flowers.files[1].name
    label = flowers.class_names[flowers.labels[0]]
    row = f"{first},{label},{label},0.5\n"
    for rows in (
        row + row,
        row + f"{second},tulip,rose,0.5\n",
        row.replace("0.5", "1.5"),
        row.replace("0.5", "nan"),
    ):
        path.write_text("file,label,top1,score1\n" + rows)
        with pytest.raises(UserError, match="predictions.csv is damaged"):
            predictions.read_predictions(run, flowers)

    # no table, or one that lacks a column, has an image twice, or ends within a name
    for content in (
        "",
        "file,label\na,b\n",
        "file,label,top1\na,b\n",
        "file,label,top1\na,b,c\na,b,c\n",
        'file,label,top1\n"a',
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match="predictions.csv (is damaged|lacks answers)"):
            runs.read_predictions(run)
        isomap = ("data_Exploration/isomap.py", "--data_root", small, "--level", "image")
        assert "predictions.csv" in error_line(cli(*isomap, "--run", run))


def test_arguments_as_flags():
    stored = {"a": 0, "b": None, "c": False, "d": True, "e": ["x {}", "--y"], "f": 1e-5, "g": ""}
    expected = ["--a=0", "--d", "--e=x {}", "--e=--y", "--f=1e-05", "--g="]
    assert runs.as_flags(stored) == expected


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
    assert "Traceback" not in err
    refused = code == 2 and "error: " in err
    # None is the default of --strategy
    assert refused or (key, code) == ("strategy", 0), err


# -----------------------------------------------------------------------------
# odd names and templates

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
    common = ["--data_root", str(odd), "--runs", str(folder), "--wandb", "disabled"]
    scripts = []
    both_templates = []
    for i, template in enumerate(TEMPLATES):
        model = ["--architecture", "tiny", "--epochs", "1"]
        prompt = ["--prompt_template", template]
        scripts.append(["train.py", *common, *model, "--name", f"t{i}", *prompt])
        both_templates += prompt
    start = ["--architecture", str(folder / "t0")]
    scripts.append(["baseline_eval.py", *common, *start, "--name", "e", *both_templates])
    for script in scripts:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", script)
            runpy.run_path(str(ROOT / script[0]), run_name="__main__")
    return folder


def test_odd_names_and_templates_go_through_training_and_evaluation(odd, odd_runs):
    flowers = open_flowers(odd)
    assert flowers.class_names == tuple(ODD)
    templates = {"t0": TEMPLATES[:1], "t1": TEMPLATES[1:], "e": TEMPLATES}
    for name, expected in templates.items():
        run = odd_runs / name
        rows = read_csv(run / "predictions.csv")
        assert {row["label"] for row in rows} == set(ODD)
        assert all(row[f"top{k}"] in ODD for row in rows for k in range(1, 6))
        assert {row["class"] for row in read_csv(run / "report.csv")} == set(ODD)
        answers = predictions.read_predictions(run, flowers)
        assert len(answers.index) == len(rows) == len(flowers.splits["test"])
        arguments = json.loads((run / "args.json").read_text())
        assert arguments["prompt_template"] == expected

    assert evaluate.fill_templates(["{} {0}"], TEMPLATES) == [
        'a {photo} of "{} {0}", 50% $5$',
        "one_{{} {0}}_{} {0} & <i>\\x|y</i> #~^\n,two",
    ]


# LaTeX's escapes: what they stand for
ESCAPES = {
    r"\%": "%",
    r"\_": "_",
    r"\&": "&",
    r"\#": "#",
    r"\{": "{",
    r"\}": "}",
    "$<$": "<",
    "$>$": ">",
    r"\$": "$",
    # As pandas writes them: \space stands for a space that LaTeX would swallow after a command.
    r"\textbackslash \space ": "\\ ",
    r"\textbackslash ": "\\",
    r"\textasciicircum \space ": "^ ",
    r"\textasciicircum ": "^",
    r"\textasciitilde \space ": "~ ",
    r"\textasciitilde ": "~",
}


def test_odd_names_and_templates_in_a_report(odd_runs, tmp_path, cli):
    code, _, err = cli("report.py", "--runs", odd_runs, "--output", tmp_path, "--bootstrap", 10)
    assert code == 0, err

    # the LaTeX table: no special character is left, and each template can be read from it
    (table,) = tmp_path.glob("factors-*.tex")
    body = [line for line in table.read_text().splitlines() if line.endswith(r"\\")]
    longest_first = sorted(ESCAPES, key=len, reverse=True)
    pattern = re.compile("|".join(re.escape(escape_of) for escape_of in longest_first))
    columns_of = {}
    for line in body[1:]:
        row = re.split(r"(?<!\\) & ", line.removesuffix(r" \\"))
        template = row[3]
        assert not re.search(r"[%_&#{}$~^\\<>]", pattern.sub("", template))
        unescaped = pattern.sub(lambda match: ESCAPES[match[0]], template)
        columns_of[unescaped] = len(row)
    assert columns_of == {" ".join(template.split()): 7 for template in TEMPLATES}

    # the Markdown report
    text = (tmp_path / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| prompt")]
    assert len(rows) == 2
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 8 for row in rows)
    assert "<i>" not in text
    assert "<b>" not in text
    heading = "worst classes of"
    if heading in text:
        line = text[text.index(heading) :].split("\n")[0]
        assert not re.search(r"(?<!\\)[*`<]", line)


def test_odd_names_in_the_exploration_scripts(odd, odd_runs, tmp_path, cli):
    several = []
    for name in ODD[2:]:
        several += ["--class", name]
    for script, *arguments in (
        ["dataset_Description.py"],
        ["class_distribution.py", "--all"],
        ["class_distribution.py", *several],
        ["class_distribution.py", "--class", ODD[4]],
        ["class_distribution.py", "--class", ODD[7]],
        ["isomap.py", "--labels"],
        ["isomap.py", "--level", "image", "--n_neighbors", "4", "--run", odd_runs / "t0"],
    ):
        common = ("--data_root", odd, "--output", tmp_path / "figures")
        code, out, err = cli(f"data_Exploration/{script}", *common, *arguments)
        assert code == 0, err
    # no name has led out of the folder
    figures = list(tmp_path.rglob("*.png"))
    assert {path.parent for path in figures} == {tmp_path / "figures"}
    assert len(figures) == 7


def test_odd_names_on_the_page(odd, odd_runs, monkeypatch):
    from streamlit.testing.v1 import AppTest

    monkeypatch.setattr(sys, "argv", ["web.py", "--data_root", str(odd), "--runs", str(odd_runs)])

    def page(**address):
        at = AppTest.from_file(str(ROOT / "web.py"), default_timeout=600)
        at.query_params.update(address)
        at.run()
        assert not at.exception
        assert not at.error
        return at

    flowers = open_flowers(odd)
    for c, name in enumerate(ODD):
        members = np.flatnonzero(flowers.labels == c)
        browse = page(**{"class": name, "bars": "shown"})
        captions = [picture["lines"] for picture in pictures(browse)]
        assert captions == [[f"{i + 1} {name}"] for i in members]
        if c in (4, 5, 6):
            single = page(image=str(members[0] + 1))
            assert f"<h3>{escape(name)}</h3>" in html(single, "image")
    for part in ("pictures", "classes", "confusion"):
        page(view="runs", run="t0", other="t1", part=part)

    answers = predictions.read_predictions(odd_runs / "t0", flowers)
    table = filters.export(flowers, answers.index, [answers])
    rows = list(csv.DictReader(io.StringIO(table, ""), strict=True))
    exported = [(row["class"], row["t0 prediction"]) for row in rows]
    expected = [(ODD[flowers.labels[i]], ODD[answers.guess[i]]) for i in answers.index]
    assert exported == expected
