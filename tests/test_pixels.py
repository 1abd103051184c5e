"""The pixels equal those of clip's own preprocessing, and the cache of them is right.

It is reused, rebuilt when it must be, and never in the way of a read-only folder.
"""

import io
import os
import shutil
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error_line
from PIL import Image

from flowers import UserError, devices, images, models
from flowers.cache import cached_array
from flowers.data import open_flowers
from flowers.pixels import get_batch, load_pixels, read_square

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from clip.clip import _transform

PATIENCE_S = 600  # a machine that is busy with other work needs minutes


@pytest.fixture
def copy(small, tmp_path):
    """A copy of the small dataset, without a cache, that a test may change."""
    return shutil.copytree(small, tmp_path / "copy", ignore=shutil.ignore_patterns(".cache"))


def read_all(flowers, resolution):
    return torch.stack([read_square(file, resolution) for file in flowers.files])


# -----------------------------------------------------------------------------
# the decoder

TURNED = Image.Exif()
TURNED[0x0112] = 6  # orientation: a quarter turn
KINDS = {
    "RGB": ("RGB", {}),
    "all colours kept": ("RGB", {"subsampling": 0}),
    "progressive": ("RGB", {"progressive": True}),
    "restarts": ("RGB", {"restart_marker_rows": 1}),
    "turned": ("RGB", {"exif": TURNED}),
    "grey": ("L", {}),
    "progressive grey": ("L", {"progressive": True}),
    "CMYK": ("CMYK", {}),
}


def jpeg_of(mode, options):
    """A JPEG of smooth colours, and Pillow's pixels of it."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8))
    out = io.BytesIO()
    noise.resize((131, 97), Image.BICUBIC).convert(mode).save(out, "JPEG", **options)
    return out.getvalue(), np.array(Image.open(out).convert("RGB"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_has_pillow_s_pixels(kind, tmp_path):
    data, expected = jpeg_of(*KINDS[kind])
    file = tmp_path / "a.jpg"
    file.write_bytes(data)
    assert np.array_equal(images.read_rgb(file), expected)


@pytest.mark.parametrize("marker", [b"\xff\xc1", b"\xff\xd8"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_marker_within_the_compressed_data_is_not_read_as_grey(kind, marker, tmp_path):
    data, _ = jpeg_of(*KINDS[kind])
    middle = (data.rfind(images.SCAN_MARKER) + len(data)) // 2
    file = tmp_path / "a.jpg"
    file.write_bytes(data[:middle] + marker + data[middle + 2 :])
    with pytest.raises(UserError, match="a.jpg can't be decoded"):
        images.read_rgb(file)


# -----------------------------------------------------------------------------
# against clip's preprocessing


def agreement(files, resolution):
    """Differences from clip's transform in levels of 255, and both float batches."""
    transform = _transform(resolution)
    theirs = torch.stack([transform(Image.open(file)) for file in files])
    pixels = torch.stack([read_square(file, resolution) for file in files])
    ours = get_batch(pixels, torch.arange(len(files)), "cpu")
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)
    difference = ((ours - theirs) * std * 255).round().abs()
    return difference, ours, theirs


def test_pixels_agree_with_clip_on_odd_sizes(tmp_path):
    rng = np.random.default_rng(0)
    files = []
    for width, height in [(64, 64), (65, 90), (131, 64), (300, 201), (201, 300), (40, 33)]:
        noise = Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8))
        smooth = noise.resize((width, height), Image.BICUBIC)
        files.append(tmp_path / f"{width}x{height}.jpg")
        smooth.save(files[-1])
    grey = tmp_path / "grey.jpg"
    smooth.convert("L").save(grey)

    # torch's resize of bytes has weights of 16 bits, PIL's of 22.
    difference, _, _ = agreement([*files, grey], 64)
    assert difference.max() <= 2
    assert (difference > 1).sum() <= 2


def test_pixels_agree_with_clip_on_real_images(real):
    """One level but for rare coincidences of rounding, and the model sees no difference."""
    torch.manual_seed(0)
    files = open_flowers(real).files[::60]
    for resolution in (64, 224):
        difference, ours, theirs = agreement(files, resolution)
        assert difference.max() <= 2
        assert (difference > 1).float().mean() < 1e-6
        assert (difference > 0).float().mean() < 0.01
        if resolution != 64:  # that of `tiny`
            continue

        model = models.build("tiny")
        classes = models.text_features(model, [f"flower {i}" for i in range(102)])
        with torch.no_grad():
            our_logits = models.encode_images(model, ours) @ classes.t()
            their_logits = models.encode_images(model, theirs) @ classes.t()
        assert torch.equal(our_logits.argmax(1), their_logits.argmax(1))
        assert (our_logits - their_logits).abs().max() < 1e-2


# -----------------------------------------------------------------------------
# the cache


def test_the_cache_is_made_once_and_mapped(copy):
    flowers = open_flowers(copy)
    pixels = load_pixels(flowers, 32)
    assert pixels.shape == (48, 3, 32, 32)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, read_all(flowers, 32))

    (cache,) = (copy / ".cache").iterdir()
    written = cache.stat().st_mtime_ns
    assert torch.equal(load_pixels(flowers, 32), pixels)
    assert cache.stat().st_mtime_ns == written

    # Another resolution has a file of its own.
    load_pixels(flowers, 16)
    assert len(list((copy / ".cache").iterdir())) == 2


def cut(cache, flowers):
    cache.write_bytes(cache.read_bytes()[:-1000])


def flip(cache, flowers):
    data = bytearray(cache.read_bytes())
    data[5000] ^= 1
    cache.write_bytes(data)


def empty(cache, flowers):
    cache.write_bytes(b"")


def new_image(cache, flowers):
    Image.new("RGB", (70, 70), "red").save(flowers.files[3])


@pytest.mark.parametrize("harm", [cut, flip, empty, new_image])
def test_a_damaged_or_stale_cache_is_made_anew_with_a_warning(copy, harm, capsys):
    flowers = open_flowers(copy)
    load_pixels(flowers, 32)
    (cache,) = (copy / ".cache").iterdir()
    harm(cache, flowers)
    pixels = load_pixels(flowers, 32)
    assert "warning" in capsys.readouterr().err
    assert torch.equal(pixels, read_all(flowers, 32))


def test_a_read_only_dataset_is_left_alone(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    os.chmod(copy, 0o555)
    load_pixels(open_flowers(copy), 16)
    os.chmod(copy, 0o755)
    assert not (copy / ".cache").exists()
    assert list((tmp_path / "home").rglob("pixels-16-*.npy"))


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_an_image_that_cannot_be_decoded_is_named(copy, cli, content, tmp_path):
    """content: the bytes of the image; None cuts off the image that is there."""
    file = copy / "jpg" / "image_00011.jpg"
    if content is None:
        content = file.read_bytes()[:700]
    file.write_bytes(content)

    arguments = ["--data_root", copy, "--architecture", "tiny"]
    arguments += ["--runs", tmp_path / "runs", "--wandb", "disabled"]
    outcome = cli("baseline_eval.py", *arguments)
    assert "image_00011.jpg" in error_line(outcome)
    assert list((copy / ".cache").iterdir()) == []


# -----------------------------------------------------------------------------
# batches


def test_augmentation(small):
    pixels = load_pixels(open_flowers(small), 32)
    index = torch.arange(40)
    plain = get_batch(pixels, index, "cpu")

    # About half of the images are mirrored, the others are as they were.
    flipped = get_batch(pixels, index, "cpu", "flip", devices.generator(0))
    n_mirrored = 0
    for after, before in zip(flipped, plain):
        same = torch.equal(after, before)
        mirrored = not same and torch.equal(after, before.flip(-1))
        assert same or mirrored
        n_mirrored += mirrored
    assert 8 < n_mirrored < 32

    # Reflection at the border makes no value that was not in the image.
    cropped = get_batch(pixels, index, "cpu", "crop", devices.generator(0))
    assert cropped.shape == plain.shape
    assert not torch.equal(cropped, plain)
    assert cropped.min() >= plain.min() - 1e-4

    # The images depend on the seed alone.
    again = get_batch(pixels, index, "cpu", "crop", devices.generator(0))
    other = get_batch(pixels, index, "cpu", "crop", devices.generator(1))
    assert torch.equal(cropped, again)
    assert not torch.equal(cropped, other)


def test_of_two_that_need_an_array_one_makes_it(tmp_path, monkeypatch):
    """The second asks while the first is at work, waits, and finds what the first has made."""
    path, array = tmp_path / "frozen-0.npy", np.arange(12, dtype=np.uint8).reshape(4, 3)
    at_work, is_waited_for = threading.Event(), threading.Event()
    made = []
    # What a waiting process says is the sign for the first one to go on.
    monkeypatch.setattr("flowers.cache.note", lambda message: is_waited_for.set())

    def rows():
        made.append(1)
        at_work.set()
        assert is_waited_for.wait(PATIENCE_S)
        yield array

    def ask():
        return cached_array(path, b"k" * 32, array.shape, "|u1", rows)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask)
        assert at_work.wait(PATIENCE_S)
        second = pool.submit(ask)
        for result in (first.result(PATIENCE_S), second.result(PATIENCE_S)):
            assert np.array_equal(result, array)
    assert made == [1]
    assert [file.name for file in tmp_path.iterdir()] == ["frozen-0.npy"]  # and no lock


def test_an_array_that_could_not_be_made_is_made_by_the_next(tmp_path):
    path, array = tmp_path / "frozen-0.npy", np.zeros((4, 3), np.uint8)

    def no_rows():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_array(path, b"k" * 32, array.shape, "|u1", no_rows)
    assert list(tmp_path.iterdir()) == []
    result = cached_array(path, b"k" * 32, array.shape, "|u1", lambda: [array])
    assert np.array_equal(result, array)


# -----------------------------------------------------------------------------
# memory

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


@pytest.mark.skipif(not LARGE_PAGES.exists(), reason="Linux with large pages only")
def test_a_large_tensor_asks_for_large_pages():
    """A matter of speed alone, so nothing else would tell if torch was not told in time."""
    large = torch.zeros(16 << 20, dtype=torch.uint8)
    is_its = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        # "7f0c4a000000-7f0c4b000000 rw-p ..." begins a mapping, "VmFlags: rd wr ..." ends it.
        first_word = line.split()[0]
        if not first_word.endswith(":"):
            start, end = (int(address, 16) for address in first_word.split("-"))
            is_its = start <= large.data_ptr() < end
        elif is_its and first_word == "VmFlags:":
            assert "hg" in line.split(), "madvise(MADV_HUGEPAGE)"
            return
    raise AssertionError("no mapping has the tensor")
