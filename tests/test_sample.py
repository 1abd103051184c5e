"""The sample dataset: its layout, that it is the same each time, that colour does not solve it."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.io import loadmat
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import flowers
from flowers.sample import dataset as sample

COUNT = 24 * 40
SPLITS = {"trnid": 10, "valid": 10, "tstid": 20}  # images of each kind


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample.write_sample(tmp_path_factory.mktemp("drawn") / "sample")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kinds with four plain pictures each, for what concerns folders and not flowers."""

    def noise(kind: str, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)

    two_kinds = dict(list(sample.KINDS.items())[:2])
    monkeypatch.setattr(sample, "KINDS", two_kinds)
    monkeypatch.setattr(sample, "PER_SPLIT", {"trnid": 1, "valid": 1, "tstid": 2})
    monkeypatch.setattr(sample, "PER_KIND", 4)
    monkeypatch.setattr(sample, "draw_flower", noise)


def read(root: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images (N, 160, 160, 3) RGB, labels (N,) from 0, and which images (N,) are in trnid."""
    numbers = np.arange(1, COUNT + 1)
    images = []
    for number in numbers:
        bgr = cv2.imread(str(root / "jpg" / f"image_{number:05d}.jpg"))
        images.append(bgr[..., ::-1])
    labels = loadmat(root / "imagelabels.mat")["labels"][0].astype(int) - 1
    in_trnid = np.isin(numbers, loadmat(root / "setid.mat")["trnid"])
    return np.stack(images), labels, in_trnid


def read_jpegs(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "jpg").iterdir()}


def test_layout(root: Path) -> None:
    assert sorted(path.name for path in root.iterdir()) == [
        "cat_to_name.json",
        "imagelabels.mat",
        "jpg",
        "sample.json",
        "setid.mat",
    ]
    expected_names = [f"image_{i:05d}.jpg" for i in range(1, COUNT + 1)]
    assert sorted(path.name for path in (root / "jpg").iterdir()) == expected_names

    images, labels, _ = read(root)
    assert images.shape == (COUNT, 160, 160, 3)
    assert np.bincount(labels).tolist() == [40] * 24
    assert loadmat(root / "imagelabels.mat")["labels"].shape == (1, COUNT)

    splits = loadmat(root / "setid.mat")
    for name, count in SPLITS.items():
        assert splits[name].shape == (1, 24 * count)
        assert np.bincount(labels[splits[name][0] - 1]).tolist() == [count] * 24
    all_ids = np.hstack([splits[name][0] for name in SPLITS])
    assert sorted(all_ids) == list(range(1, COUNT + 1))

    # neighbours in number are no kin
    assert abs(np.corrcoef(labels[:-1], labels[1:])[0, 1]) < 0.1
    assert not list(root.parent.glob(".sample*"))


def test_names_are_oxford_names(root: Path) -> None:
    names = json.loads((root / "cat_to_name.json").read_text())
    oxford = json.loads((Path(flowers.__file__).parent / "cat_to_name.json").read_text())
    assert list(names) == [str(k) for k in range(1, 25)]
    assert len(set(names.values())) == 24
    assert set(names.values()) <= set(oxford.values())


def test_same_pictures_each_time(root: Path) -> None:
    jpegs = set(read_jpegs(root).values())
    assert len(jpegs) == COUNT
    for k, kind in enumerate(sample.KINDS):
        photo = sample.draw_flower(kind, np.random.default_rng((sample.SEED, k, 7)))
        assert photo.dtype == np.uint8 and photo.shape == (160, 160, 3)
        encoded = cv2.imencode(".jpg", photo[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, 92))[1]
        assert encoded.tobytes() in jpegs
    small = sample.draw_flower("rose", np.random.default_rng(0), size=64)
    assert small.shape == (64, 64, 3)


def test_a_complete_sample_is_left_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "draw_all", lambda folder: pytest.fail("drawn again"))
    assert sample.write_sample(str(root)) == root


def cut(name: str, end: int) -> Callable[[Path], None]:
    """A damage: the file keeps its bytes up to `end`."""

    def damage(root: Path) -> None:
        path = root / name
        path.write_bytes(path.read_bytes()[:end])

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def replace(name: str, text: str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_text(text)


@pytest.mark.parametrize(
    "damage",
    [
        remove("jpg/image_00003.jpg"),
        cut("jpg/image_00003.jpg", -9),
        cut("setid.mat", 0),
        cut("setid.mat", 200),
        cut("imagelabels.mat", 150),
        remove("imagelabels.mat"),
        replace("cat_to_name.json", '{"1": "sunfl'),
        replace("cat_to_name.json", "[]"),
        replace("sample.json", '{"version": 0}'),
        lambda root: shutil.rmtree(root / "jpg"),
    ],
)
def test_damage_is_repaired(quick: None, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    root = sample.write_sample(tmp_path / "sample")
    before = read_jpegs(root)
    damage(root)
    assert not sample.is_complete(root)
    sample.write_sample(root)
    assert sample.is_complete(root)
    assert before == read_jpegs(root)
    assert [path.name for path in tmp_path.iterdir()] == ["sample"]


def test_a_killed_run_leaves_nothing_at_root(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "deep" / "sample"
    draw_flower = sample.draw_flower
    root_existed = []  # at each picture

    def interrupted(kind: str, rng: np.random.Generator) -> np.ndarray:
        root_existed.append(root.exists())
        if len(root_existed) == 5:
            raise KeyboardInterrupt
        return draw_flower(kind, rng)

    monkeypatch.setattr(sample, "draw_flower", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample.write_sample(root)
    assert root_existed == [False] * 5
    assert not list(root.parent.iterdir())

    # kill -9 leaves its folder behind; the next run removes it, but not the folder of a run that
    # is still drawing
    for name, age in (("dead", 3600), ("live", 0)):
        jpg = root.parent / f".sample.drawing-{name}" / "jpg"
        jpg.mkdir(parents=True)
        modified = time.time() - age
        for folder in (jpg, jpg.parent):
            os.utime(folder, (modified, modified))
    sample.write_sample(root)
    names = sorted(path.name for path in root.parent.iterdir())
    assert names == [".sample.drawing-live", "sample"]


def test_other_peoples_data_are_not_replaced(quick: None, tmp_path: Path) -> None:
    (tmp_path / "imagelabels.mat").write_bytes(b"precious")
    with pytest.raises(flowers.UserError, match="something else"):
        sample.write_sample(tmp_path)
    assert (tmp_path / "imagelabels.mat").read_bytes() == b"precious"

    (tmp_path / "empty").mkdir()
    assert sample.is_complete(sample.write_sample(tmp_path / "empty"))


@pytest.mark.parametrize("space", ["rgb", "hsv"])
def test_colour_alone_is_not_enough(root: Path, space: str) -> None:
    """A linear classifier of 8 x 8 x 8 colour histograms, without trnid, is under 75% on trnid."""
    images, labels, test = read(root)
    ranges = [0, 256, 0, 256, 0, 256] if space == "rgb" else [0, 180, 0, 256, 0, 256]
    histograms = []
    for image in np.ascontiguousarray(images):
        if space == "hsv":
            image = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        histogram = cv2.calcHist([image], [0, 1, 2], None, [8, 8, 8], ranges)
        histograms.append(histogram.ravel())
    histograms = np.stack(histograms)

    scores = []
    for strength in (1e-2, 1e-1, 1.0):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500))
        model.fit(histograms[~test], labels[~test])
        scores.append(model.score(histograms[test], labels[test]))
    # under 25% would mean that this test reads the wrong thing
    assert 0.25 < max(scores) < 0.75, scores
