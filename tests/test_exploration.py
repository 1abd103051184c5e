"""The looks at the dataset: colours against brute force and scipy, counts against setid.mat,
medoids, duplicates, Isomap."""

import colorsys
import csv
import json
import math
import re
import runpy
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import scipy.io
from conftest import ROOT, error_line
from PIL import Image
from scipy.stats import gaussian_kde, norm

from flowers import UserError, colour, files
from flowers.colour import load_colours
from flowers.data import find_class, open_flowers
from flowers.pixels import read_jpeg

DESCRIPTION = "data_Exploration/dataset_Description.py"
DISTRIBUTION = "data_Exploration/class_distribution.py"
ISOMAP = "data_Exploration/isomap.py"


@pytest.fixture(scope="module")
def description():
    return runpy.run_path(str(ROOT / DESCRIPTION))


@pytest.fixture(scope="module")
def isomap():
    return runpy.run_path(str(ROOT / ISOMAP))


@pytest.fixture
def copy(small, tmp_path):
    """A copy of the small dataset whose pictures a test may change."""
    return shutil.copytree(small, tmp_path / "copy", ignore=shutil.ignore_patterns(".cache"))


# -----------------------------------------------------------------------------
# rows of colours


def row_of(hues):
    """A row of colours with one pixel of full chroma at each hue level."""
    row = np.zeros(colour.WIDTH)
    np.add.at(row, hues, 1)
    row[-1] = len(hues)
    return row


def test_a_row_holds_what_colorsys_finds():
    rgb = np.random.default_rng(0).integers(0, 256, (14, 11, 3), dtype=np.uint8)
    rgb[0, :3] = [[0, 0, 0], [255, 255, 255], [90, 90, 90]]
    mask = np.random.default_rng(1).random((14, 11)) < 0.6
    row = colour.histograms(colour.to_hsv(rgb), mask)

    pixels = [colorsys.rgb_to_hsv(*(p / 255)) for p in rgb[mask].astype(float)]
    chroma = [s * v for _, s, v in pixels]
    for channel in (colour.SATURATION, colour.VALUE, colour.HSV_HIST):
        assert row[channel].sum() == mask.sum()
    assert row[colour.HUE].sum() == pytest.approx(sum(chroma), rel=2e-3)
    assert row[-1] == pytest.approx(sum(c * c for c in chroma), rel=4e-3)

    points = []
    for (h, _, v), c in zip(pixels, chroma):
        angle = 2 * math.pi * h
        points.append([c * math.cos(angle), c * math.sin(angle), v])
    assert np.abs(colour.cone(row) - np.mean(points, axis=0)).max() < 2e-3

    total_saturation = row[colour.SATURATION] @ np.arange(256) / 255
    assert total_saturation == pytest.approx(sum(s for _, s, _ in pixels), rel=2e-3)
    assert (colour.hsv_hist(row) ** 2).sum() == pytest.approx(1)


def test_the_mean_hue_of_reds_is_red():
    mean, length = colour.circular_mean(row_of([250, 250, 6, 6])[colour.HUE])
    assert min(mean, 1 - mean) < 1e-6
    assert length > 0.95

    hues = np.random.default_rng(0).integers(0, 256, 50)
    angles = [2 * math.pi * h / 256 for h in hues]
    x = sum(map(math.cos, angles)) / 50
    y = sum(map(math.sin, angles)) / 50
    mean, length = colour.circular_mean(row_of(hues)[colour.HUE])
    assert mean == pytest.approx(math.atan2(y, x) / (2 * math.pi) % 1)
    assert length == pytest.approx(math.hypot(x, y))


def test_hue_density_against_brute_force_around_zero():
    """One cluster across 0 has one peak, at 0, and the same curve as anywhere else."""
    quantiles = norm.ppf((np.arange(3000) + 0.5) / 3000)
    hues = np.round(20 * quantiles).astype(int) % 256
    grid = np.arange(256) / 256
    density = colour.density(row_of(hues), colour.HUE, grid)

    away = (hues / 256 + 0.5) % 1 - 0.5
    mean = np.angle(np.exp(2j * np.pi * hues / 256).mean()) / (2 * np.pi)
    width = ((away - mean) ** 2).mean() ** 0.5 * 3000**-0.2  # Scott's
    assert width > 2 / 256
    brute = np.zeros(256)
    for turn in (-2, -1, 0, 1, 2):
        z = (grid[:, None] - away[None] - turn) / width
        brute += np.exp(-0.5 * z**2).sum(1) / (3000 * width * math.sqrt(2 * math.pi))
    assert np.abs(density - brute).max() < 1e-6 * brute.max()

    assert density.mean() == pytest.approx(1, abs=1e-6)
    peak = density.argmax()
    assert min(peak, 256 - peak) <= 2
    slopes = np.sign(np.diff(np.roll(density, 128)))
    assert (np.diff(slopes) < 0).sum() == 1  # one peak

    turned = colour.density(row_of((hues + 100) % 256), colour.HUE, grid)
    assert np.abs(np.roll(density, 100) - turned).max() < 1e-6 * density.max()


def test_saturation_density_equals_gaussian_kde_on_the_values():
    values = np.random.default_rng(0).beta(4, 3, 20_000)
    row = np.zeros(colour.WIDTH)
    np.add.at(row[colour.SATURATION], np.round(values * 255).astype(int), 1)
    grid = np.linspace(0, 1, 200)
    kde = gaussian_kde(values)
    exact = kde(grid) + kde(-grid) + kde(2 - grid)
    density = colour.density(row, colour.SATURATION, grid)
    assert np.abs(density - exact).max() < 0.02 * exact.max()
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-3)


def test_a_grey_picture_has_no_hue_and_finite_curves():
    grid = np.linspace(0, 1, 50)
    grey = np.full((20, 20, 3), 128, np.uint8)
    row = colour.measure(grey, "none")
    assert row[colour.HUE].sum() == 0
    assert np.allclose(colour.density(row.astype(float), colour.HUE, grid), 1, atol=1e-3)

    red = np.full((20, 20, 3), [255, 0, 0], np.uint8)
    row = colour.measure(red, "none").astype(float)
    for channel in (colour.HUE, colour.SATURATION, colour.VALUE):
        assert np.isfinite(colour.density(row, channel, grid)).all()


def overlap(a, b):
    """Intersection over union of two masks."""
    return (a & b).sum() / (a | b).sum()


def test_masks_keep_the_flower():
    rgb = np.random.default_rng(0).integers(0, 40, (150, 200, 3)) + np.array([20, 90, 20])
    ellipse = np.zeros((150, 200), np.uint8)
    cv2.ellipse(ellipse, (105, 72), (42, 30), 20, 0, 360, 1, -1)
    flower = ellipse > 0
    rgb[flower] += np.array([180, -70, 10])
    hsv = colour.to_hsv(rgb.astype(np.uint8))

    assert colour.mask_of(hsv, "none").all()
    centre = colour.mask_of(hsv, "centre")
    assert centre.sum() == pytest.approx(math.pi * (0.35 * 150) ** 2, rel=0.02)
    assert centre[75, 100] and not centre[0].any()
    grabcut = colour.mask_of(hsv, "grabcut")
    assert overlap(grabcut, flower) > 0.9 > overlap(centre, flower)


def test_colours_are_kept(small):
    flowers = open_flowers(small)
    rows = load_colours(flowers, "centre")
    # training sees the same pixels as exploration
    rgb = read_jpeg(flowers.files[7]).permute(1, 2, 0).numpy()
    assert np.array_equal(rows[7], colour.measure(rgb, "centre"))

    (path,) = (small / ".cache").glob("hsv-centre-*")
    before = path.stat().st_mtime_ns
    assert np.array_equal(load_colours(flowers, "centre"), rows)
    assert path.stat().st_mtime_ns == before
    assert not np.array_equal(load_colours(flowers, "none"), rows)


# -----------------------------------------------------------------------------
# dataset_Description.py


def read_setid(root):
    """The ids of each of Oxford's splits."""
    contents = scipy.io.loadmat(root / "setid.mat")
    return {name: ids.ravel() for name, ids in contents.items() if not name.startswith("_")}


def printed_counts(out, word):
    """The sizes of Oxford's splits in the first line that holds a word."""
    line = next(line for line in out.splitlines() if word in line)
    counts = re.findall(r"(trnid|valid|tstid) ([\d,]+)", line)
    return {name: int(n.replace(",", "")) for name, n in counts}


def test_counts_are_those_of_setid(small, cli, tmp_path):
    output = tmp_path / "figures"
    code, out, err = cli(DESCRIPTION, "--data_root", small, "--output", output, "--pdf")
    assert code == 0, err
    n = {name: ids.size for name, ids in read_setid(small).items()}
    assert printed_counts(out, "images of") == n
    assert f"train {n['valid'] + n['tstid']} (valid + tstid), test {n['trnid']}" in out
    assert f"train {n['valid'] + n['trnid']} (valid + trnid), test {n['tstid']}" in out
    assert "8 (rose) to 8 (rose), ratio 1.0" in out
    assert (output / "classes.pdf").exists()
    assert Image.open(output / "classes.png").size[0] > 1000


def test_a_contact_sheet_when_asked(small, cli, tmp_path):
    output, sheet = tmp_path / "figures", tmp_path / "sheets" / "sheet.png"
    options = (DESCRIPTION, "--data_root", small, "--output", output)
    code, out, err = cli(*options)
    assert code == 0 and not sheet.exists(), err
    code, out, err = cli(*options, "--sheet", sheet)
    assert code == 0 and str(sheet) in out, err
    assert Image.open(sheet).size[0] > 1000


def test_counts_of_the_real_images(real, cli, tmp_path, monkeypatch):
    # duplicates are not the question here
    def noise(path, key, shape, dtype, rows):
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    monkeypatch.setattr("flowers.cache.cached_array", noise)
    code, out, err = cli(DESCRIPTION, "--data_root", real, "--output", tmp_path)
    assert code == 0, err

    ids = read_setid(real)
    assert printed_counts(out, "images of") == {name: len(i) for name, i in ids.items()}
    labels = scipy.io.loadmat(real / "imagelabels.mat")["labels"][0]
    listed = np.concatenate(list(ids.values()))
    each = np.bincount(labels[listed - 1], minlength=103)[1:]
    names = json.loads((real / "cat_to_name.json").read_text())
    fewest, most = names[str(each.argmin() + 1)], names[str(each.argmax() + 1)]
    ratio = f"{each.max() / each.min():.1f}"
    assert f"{each.min()} ({fewest}) to {each.max()} ({most}), ratio {ratio}" in out
    assert "0 pairs" in out


def test_both_layouts_give_the_same(small, cli, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(small / "jpg", other / "images" / "jpg")
    shutil.copy(small / "cat_to_name.json", other)
    np.savez(other / "labels.npz", scipy.io.loadmat(small / "imagelabels.mat")["labels"])
    ids = {name: ids.tolist() for name, ids in read_setid(small).items()}
    (other / "split.json").write_text(json.dumps(ids))

    roots = (
        ("--data_root", small),
        ("--data_root", other, "--splits_path", other / "split.json"),
    )
    for script, options in (
        (DESCRIPTION, ()),
        (DISTRIBUTION, ("--class", "LOTUS", "--class", "1")),
        (ISOMAP, ("--n_neighbors", 3)),
    ):
        outs = []
        for root in roots:
            code, out, err = cli(script, *root, *options, "--output", tmp_path / "figures")
            assert code == 0, err
            outs.append(out.replace(str(root[1]), "ROOT"))
        assert outs[0] == outs[1] and "saved" in outs[0]


def test_copies_are_found_within_and_across_splits(copy, cli, tmp_path):
    rng = np.random.default_rng(0)
    flowers = open_flowers(copy, holdout=True)
    for file in flowers.files:  # discs on noise are too alike
        noise = rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((90, 70), Image.BICUBIC).save(file, quality=95)
    test, train, val = (flowers.splits[split] for split in ("test", "train", "val"))
    for source, target in ((train[0], test[0]), (train[1], train[2]), (val[1], test[1])):
        with Image.open(flowers.files[source]) as image:
            image.resize((120, 93)).save(flowers.files[target], quality=70)

    code, out, err = cli(DESCRIPTION, "--data_root", copy, "--output", tmp_path)
    assert code == 0 and "3 pairs" in out, out + err
    assert "swapped splits: 1 within train, 0 within test, 2 across train and test: 2 of 12" in out
    assert "official splits: 1 within train, 1 within test, 1 across train and test: 1 of 24" in out
    with (tmp_path / "duplicates.csv").open(newline="") as file:
        pairs = {frozenset((row["file_1"], row["file_2"])) for row in csv.DictReader(file)}
    assert len(pairs) == 3
    assert frozenset((flowers.files[train[0]].name, flowers.files[test[0]].name)) in pairs


def test_near_pairs_by_brute_force(description):
    rng = np.random.default_rng(0)
    hashes = rng.random((60, 64)) < 0.5
    hashes[50:] = hashes[:10] ^ (rng.random((10, 64)) < 0.05)
    brute = set()
    for i in range(60):
        for j in range(i + 1, 60):
            distance = sum(a != b for a, b in zip(hashes[i], hashes[j]))
            if distance <= 6:
                brute.add((i, j))
    assert brute
    assert set(map(tuple, description["near_pairs"](hashes, 6).tolist())) == brute


# -----------------------------------------------------------------------------
# class_distribution.py


def test_colours_of_a_class(small, cli, tmp_path):
    options = (DISTRIBUTION, "--data_root", small, "--output", tmp_path)
    code, out, err = cli(*options, "--class", "rose", "--mask", "grabcut")
    assert code == 0 and "rose" in out and (tmp_path / "colours_rose.png").exists(), err

    flowers = open_flowers(small)
    code, out, _ = cli(*options, "--all", "--pdf")
    assert code == 0 and (tmp_path / "colours_all.pdf").exists()
    assert all(name in out for name in flowers.class_names)

    for wrong, word in (("mallo", "tree mallow"), ("0", "1 to 6"), ("7", "1 to 6")):
        assert word in error_line(cli(DISTRIBUTION, "--data_root", small, "--class", wrong))
    assert "--all" in error_line(cli(DISTRIBUTION, "--data_root", small))

    assert find_class(flowers, "Tree Mallow") == find_class(flowers, "4") == 3
    with pytest.raises(UserError):
        find_class(flowers, "²")


def test_a_window_only_when_asked(small, cli, tmp_path, monkeypatch):
    shown = []

    def viewer(image, **_):
        """There is none the first time, and one the second."""
        shown.append(image.size)
        return len(shown) > 1

    monkeypatch.setattr("PIL.ImageShow.show", viewer)
    options = (DISTRIBUTION, "--data_root", small, "--class", "rose", "--output", tmp_path)
    cli(*options)
    assert not shown
    assert "no picture viewer" in cli(*options, "--show")[2] and len(shown) == 1
    assert "no picture viewer" not in cli(*options, "--show")[2] and len(shown) == 2


# -----------------------------------------------------------------------------
# isomap.py


def test_medoids_by_brute_force(isomap):
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 5)), rng.integers(0, 4, 60)
    for label, medoid in isomap["medoids"](features, labels).items():
        members = [i for i in range(60) if labels[i] == label]
        totals = [sum(math.dist(features[i], features[j]) for j in members) for i in members]
        assert medoid == members[int(np.argmin(totals))]


def test_isomap_unrolls_a_spiral(isomap):
    angle = np.linspace(2, 11, 200)
    points = np.stack([angle * np.cos(angle), angle * np.sin(angle), np.zeros(200)], 1)
    xy, residual, trust = isomap["embed"](points, 4)
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    length = np.concatenate([[0], np.cumsum(steps)])
    assert abs(np.corrcoef(xy[:, 0], length)[0, 1]) > 0.999
    assert residual[0] < 1e-3 and trust > 0.9

    assert isomap["count_pieces"](points, 4) == 1
    assert isomap["count_pieces"](np.concatenate([points, points + 100]), 4) == 2


def test_isomap_of_classes_in_two_pieces(small, copy, cli, tmp_path, isomap):
    flowers = open_flowers(copy)
    for file, label in zip(flowers.files, flowers.labels):  # three classes of reds, three of blues
        shade = (250 - 20 * label, 10, 10) if label < 3 else (10, 10, 130 + 20 * label)
        Image.new("RGB", (70, 70), shade).save(file)
    options = ("--labels", "--n_neighbors", 2, "--output", tmp_path)
    code, out, err = cli(ISOMAP, "--data_root", copy, *options)
    assert code == 0, err
    assert (tmp_path / "isomap_class_hsv.png").exists() and "trustworthiness" in out

    rows = colour.cone(load_colours(flowers, "centre"))
    centroids = np.stack([rows[flowers.labels == label].mean(0) for label in range(6)])
    assert isomap["count_pieces"](centroids, 2) == 2
    assert isomap["count_pieces"](centroids, 3) == 1
    assert "falls into 2 pieces" in err and "--n_neighbors 3 connects" in err

    too_many = cli(ISOMAP, "--data_root", small, "--n_neighbors", 6)
    assert "only 6 classes" in error_line(too_many)
    without_level = cli(ISOMAP, "--data_root", small, "--run", tmp_path)
    assert "--level image" in error_line(without_level)


def test_isomap_of_images_by_a_model(small, cli, tmp_path):
    code, out, err = cli(
        *(ISOMAP, "--data_root", small, "--output", tmp_path),
        *("--level", "image", "--images", 30, "--class", "rose"),
        *("--features", "clip", "--architecture", "tiny"),
    )
    assert code == 0 and "30 images, 128 features" in out, err
    assert (tmp_path / "isomap_image_clip.png").exists()


def test_isomap_of_a_run(small, cli, tmp_path):
    flowers = open_flowers(small)
    rows = []
    for i in flowers.splits["test"]:
        label = flowers.class_names[flowers.labels[i]]
        rows.append({"file": flowers.files[i].name, "label": label, "top1": "rose"})
    run = tmp_path / "run"
    run.mkdir()
    files.write_csv(run / "predictions.csv", rows)

    data = (ISOMAP, "--data_root", small, "--output", tmp_path)
    level = ("--level", "image", "--features", "hsv_hist")
    code, out, err = cli(*data, *level, "--run", run)
    assert code == 0 and f"{len(rows)} images, 256 features" in out, err

    rows[0]["label"] = "lily"
    files.write_csv(run / "predictions.csv", rows)
    assert "another dataset" in error_line(cli(*data, *level, "--run", run))
    assert "predictions.csv" in error_line(cli(*data, "--level", "image", "--run", tmp_path))


# -----------------------------------------------------------------------------
# all three


@pytest.mark.parametrize(
    "command", [(DESCRIPTION,), (DISTRIBUTION, "--all"), (ISOMAP, "--n_neighbors", "3")]
)
def test_exploration_imports_no_torch(small, tmp_path, command):
    script, *options = command
    arguments = [script, "--data_root", str(small), "--output", str(tmp_path), *options]
    code = (
        "import runpy, sys\n"
        f"sys.argv = {arguments!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
