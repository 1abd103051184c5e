"""The built-in sample data set: its layout, that it is the same each time, and that colour alone does not solve it."""

import json
import os
import shutil
import time
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


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample.write_sample(tmp_path_factory.mktemp("drawn") / "sample")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of two kinds with four plain pictures each, for what concerns folders and not flowers."""
    monkeypatch.setattr(sample, "KINDS", dict(list(sample.KINDS.items())[:2]))
    monkeypatch.setattr(sample, "PER_SPLIT", {"trnid": 1, "valid": 1, "tstid": 2})
    monkeypatch.setattr(sample, "PER_KIND", 4)
    monkeypatch.setattr(
        sample, "draw_flower", lambda kind, rng: rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
    )


def read(root: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images (N, 160, 160, 3) RGB, labels (N,) from 0, and which ids (N,) are in trnid."""
    images = np.stack(
        [
            cv2.imread(str(root / "jpg" / f"image_{i:05d}.jpg"))[..., ::-1]
            for i in range(1, COUNT + 1)
        ]
    )
    labels = loadmat(root / "imagelabels.mat")["labels"][0].astype(int) - 1
    return images, labels, np.isin(np.arange(1, COUNT + 1), loadmat(root / "setid.mat")["trnid"])


def test_layout(root: Path) -> None:
    assert sorted(p.name for p in root.iterdir()) == [
        "cat_to_name.json",
        "imagelabels.mat",
        "jpg",
        "sample.json",
        "setid.mat",
    ]
    assert sorted(p.name for p in (root / "jpg").iterdir()) == [
        f"image_{i:05d}.jpg" for i in range(1, COUNT + 1)
    ]
    images, labels, _ = read(root)
    assert images.shape == (COUNT, 160, 160, 3)
    assert np.bincount(labels).tolist() == [40] * 24
    assert loadmat(root / "imagelabels.mat")["labels"].shape == (1, COUNT)
    splits = loadmat(root / "setid.mat")
    for name, count in (("trnid", 10), ("valid", 10), ("tstid", 20)):
        assert splits[name].shape == (1, 24 * count)
        assert np.bincount(labels[splits[name][0] - 1]).tolist() == [count] * 24
    assert sorted(np.hstack([splits[name][0] for name in ("trnid", "valid", "tstid")])) == list(
        range(1, COUNT + 1)
    )
    assert abs(np.corrcoef(labels[:-1], labels[1:])[0, 1]) < 0.1  # neighbours in number are no kin
    assert not list(root.parent.glob(".sample*"))


def test_names_are_oxford_names(root: Path) -> None:
    names = json.loads((root / "cat_to_name.json").read_text())
    oxford = json.loads((Path(flowers.__file__).parent / "cat_to_name.json").read_text())
    assert list(names) == [str(k) for k in range(1, 25)]
    assert len(set(names.values())) == 24 and set(names.values()) <= set(oxford.values())


def test_same_pictures_each_time(root: Path) -> None:
    jpegs = {p.read_bytes() for p in (root / "jpg").iterdir()}
    assert len(jpegs) == COUNT
    for k, kind in enumerate(sample.KINDS):
        photo = sample.draw_flower(kind, np.random.default_rng((sample.SEED, k, 7)))
        assert photo.dtype == np.uint8 and photo.shape == (160, 160, 3)
        assert (
            cv2.imencode(".jpg", photo[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, 92))[1].tobytes()
            in jpegs
        )
    assert sample.draw_flower("rose", np.random.default_rng(0), size=64).shape == (64, 64, 3)


def test_a_complete_sample_is_left_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "draw_all", lambda folder: pytest.fail("drawn again"))
    assert sample.write_sample(str(root)) == root


@pytest.mark.parametrize(
    "damage",
    [
        lambda root: (root / "jpg" / "image_00003.jpg").unlink(),
        lambda root: (root / "jpg" / "image_00003.jpg").write_bytes(
            (root / "jpg" / "image_00003.jpg").read_bytes()[:-9]
        ),
        lambda root: (root / "setid.mat").write_bytes(b""),
        lambda root: (root / "setid.mat").write_bytes((root / "setid.mat").read_bytes()[:200]),
        lambda root: (root / "imagelabels.mat").write_bytes(
            (root / "imagelabels.mat").read_bytes()[:150]
        ),
        lambda root: (root / "imagelabels.mat").unlink(),
        lambda root: (root / "cat_to_name.json").write_text('{"1": "sunfl'),
        lambda root: (root / "cat_to_name.json").write_text("[]"),
        lambda root: (root / "sample.json").write_text('{"version": 0}'),
        lambda root: shutil.rmtree(root / "jpg"),
    ],
)
def test_damage_is_repaired(quick: None, tmp_path: Path, damage: callable) -> None:
    root = sample.write_sample(tmp_path / "sample")
    before = {p.name: p.read_bytes() for p in (root / "jpg").iterdir()}
    damage(root)
    assert not sample.is_complete(root)
    sample.write_sample(root)
    assert sample.is_complete(root)
    assert before == {p.name: p.read_bytes() for p in (root / "jpg").iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["sample"]


def test_a_killed_run_leaves_nothing_at_root(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "deep" / "sample"
    draw = sample.draw_flower
    seen = []

    def interrupted(kind: str, rng: np.random.Generator) -> np.ndarray:
        seen.append(root.exists())
        if len(seen) == 5:
            raise KeyboardInterrupt
        return draw(kind, rng)

    monkeypatch.setattr(sample, "draw_flower", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample.write_sample(root)
    assert seen == [False] * 5 and not list(root.parent.iterdir())
    # kill -9 leaves its folder behind; the next run removes it, but not the folder of a run that is still drawing
    for name, age in (("dead", 3600), ("live", 0)):
        jpg = root.parent / f".sample.drawing-{name}" / "jpg"
        jpg.mkdir(parents=True)
        for folder in (jpg, jpg.parent):
            os.utime(folder, (time.time() - age,) * 2)
    sample.write_sample(root)
    assert sorted(p.name for p in root.parent.iterdir()) == [".sample.drawing-live", "sample"]


def test_other_peoples_data_are_not_replaced(quick: None, tmp_path: Path) -> None:
    (tmp_path / "imagelabels.mat").write_bytes(b"precious")
    with pytest.raises(flowers.UserError, match="something else"):
        sample.write_sample(tmp_path)
    assert (tmp_path / "imagelabels.mat").read_bytes() == b"precious"
    (tmp_path / "empty").mkdir()
    assert sample.is_complete(sample.write_sample(tmp_path / "empty"))


@pytest.mark.parametrize("space", ["rgb", "hsv"])
def test_colour_alone_is_not_enough(root: Path, space: str) -> None:
    """A linear classifier on 8 x 8 x 8 colour histograms, trained on valid + tstid, stays under 75% on trnid."""
    images, labels, test = read(root)
    ranges = [0, 256, 0, 256, 0, 256] if space == "rgb" else [0, 180, 0, 256, 0, 256]
    pixels = [
        image if space == "rgb" else cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        for image in np.ascontiguousarray(images)
    ]
    histograms = np.stack(
        [cv2.calcHist([image], [0, 1, 2], None, [8, 8, 8], ranges).ravel() for image in pixels]
    )
    scores = []
    for strength in (1e-2, 1e-1, 1.0):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500))
        scores.append(
            model.fit(histograms[~test], labels[~test]).score(histograms[test], labels[test])
        )
    assert 0.25 < max(scores) < 0.75, (
        scores
    )  # under 25% would mean that this test reads the wrong thing
