"""The looks at the dataset: colours against brute force and scipy, counts against setid.mat, medoids, duplicates, Isomap."""

import colorsys
import csv
import json
import math
import re
import runpy
import shutil

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


@pytest.fixture(scope="module")
def description():
    return runpy.run_path(str(ROOT / "data_Exploration" / "dataset_Description.py"))


@pytest.fixture(scope="module")
def isomap():
    return runpy.run_path(str(ROOT / "data_Exploration" / "isomap.py"))


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
    pixels = [colorsys.rgb_to_hsv(*(p / 255)) for p in rgb[mask].astype(float)]
    row = colour.histograms(colour.to_hsv(rgb), mask)
    chroma = [s * v for _, s, v in pixels]
    assert (
        row[colour.SATURATION].sum()
        == row[colour.VALUE].sum()
        == row[colour.HSV_HIST].sum()
        == mask.sum()
    )
    assert row[colour.HUE].sum() == pytest.approx(sum(chroma), rel=2e-3)
    assert row[-1] == pytest.approx(sum(c * c for c in chroma), rel=4e-3)
    exact = np.mean(
        [
            [c * math.cos(2 * math.pi * h), c * math.sin(2 * math.pi * h), v]
            for (h, _, v), c in zip(pixels, chroma)
        ],
        axis=0,
    )
    assert np.abs(colour.cone(row) - exact).max() < 2e-3
    assert row[colour.SATURATION] @ np.arange(256) / 255 == pytest.approx(
        sum(s for _, s, _ in pixels), rel=2e-3
    )
    assert (colour.hsv_hist(row) ** 2).sum() == pytest.approx(1)


def test_the_mean_hue_of_reds_is_red():
    mean, length = colour.circular_mean(row_of([250, 250, 6, 6])[colour.HUE])
    assert min(mean, 1 - mean) < 1e-6 and length > 0.95
    hues = np.random.default_rng(0).integers(0, 256, 50)
    angles = [2 * math.pi * h / 256 for h in hues]
    x, y = sum(map(math.cos, angles)) / 50, sum(map(math.sin, angles)) / 50
    mean, length = colour.circular_mean(row_of(hues)[colour.HUE])
    assert (mean, length) == (
        pytest.approx(math.atan2(y, x) / (2 * math.pi) % 1),
        pytest.approx(math.hypot(x, y)),
    )


def test_hue_density_against_brute_force_around_zero():
    """One cluster across 0 has one peak, at 0, and the same curve as anywhere else on the circle."""
    hues = np.round(20 * norm.ppf((np.arange(3000) + 0.5) / 3000)).astype(int) % 256
    grid = np.arange(256) / 256
    density = colour.density(row_of(hues), colour.HUE, grid)
    away = (hues / 256 + 0.5) % 1 - 0.5
    mean = np.angle(np.exp(2j * np.pi * hues / 256).mean()) / (2 * np.pi)
    width = ((away - mean) ** 2).mean() ** 0.5 * 3000**-0.2
    assert width > 2 / 256
    brute = np.zeros(256)
    for turn in (-2, -1, 0, 1, 2):
        brute += np.exp(-0.5 * ((grid[:, None] - away[None] - turn) / width) ** 2).sum(1) / (
            3000 * width * math.sqrt(2 * math.pi)
        )
    assert np.abs(density - brute).max() < 1e-6 * brute.max()
    assert (
        density.mean() == pytest.approx(1, abs=1e-6)
        and min(density.argmax(), 256 - density.argmax()) <= 2
    )
    assert (np.diff(np.sign(np.diff(np.roll(density, 128)))) < 0).sum() == 1  # one peak
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
    row = colour.measure(np.full((20, 20, 3), 128, np.uint8), "none")
    assert row[colour.HUE].sum() == 0
    assert np.allclose(
        colour.density(row.astype(float), colour.HUE, np.linspace(0, 1, 50)), 1, atol=1e-3
    )
    pure = colour.measure(np.full((20, 20, 3), [255, 0, 0], np.uint8), "none").astype(float)
    for channel in (colour.HUE, colour.SATURATION, colour.VALUE):
        assert np.isfinite(colour.density(pure, channel, np.linspace(0, 1, 50))).all()


def test_masks_keep_the_flower():
    rgb = np.random.default_rng(0).integers(0, 40, (150, 200, 3)) + np.array([20, 90, 20])
    flower = np.zeros((150, 200), np.uint8)
    cv2.ellipse(flower, (105, 72), (42, 30), 20, 0, 360, 1, -1)
    rgb[flower > 0] += np.array([180, -70, 10])
    hsv = colour.to_hsv(rgb.astype(np.uint8))
    centre, found = colour.mask_of(hsv, "centre"), colour.mask_of(hsv, "grabcut")
    assert colour.mask_of(hsv, "none").all()
    assert (
        centre.sum() == pytest.approx(math.pi * (0.35 * 150) ** 2, rel=0.02)
        and centre[75, 100]
        and not centre[0].any()
    )
    assert (
        (found & (flower > 0)).sum() / (found | (flower > 0)).sum()
        > 0.9
        > (centre & (flower > 0)).sum() / (centre | (flower > 0)).sum()
    )


def test_colours_are_kept(small):
    flowers = open_flowers(small)
    rows = load_colours(flowers, "centre")
    assert np.array_equal(
        rows[7], colour.measure(read_jpeg(flowers.files[7]).permute(1, 2, 0).numpy(), "centre")
    )
    (path,) = (small / ".cache").glob("hsv-centre-*")
    before = path.stat().st_mtime_ns
    assert (
        np.array_equal(load_colours(flowers, "centre"), rows) and path.stat().st_mtime_ns == before
    )
    assert not np.array_equal(load_colours(flowers, "none"), rows)


def numbers(out, word):
    return {
        name: int(n.replace(",", ""))
        for name, n in re.findall(
            r"(trnid|valid|tstid) ([\d,]+)", next(line for line in out.splitlines() if word in line)
        )
    }


def test_counts_are_those_of_setid(small, cli, tmp_path):
    split = {
        k: v.size for k, v in scipy.io.loadmat(small / "setid.mat").items() if not k.startswith("_")
    }
    code, out, err = cli(
        "data_Exploration/dataset_Description.py",
        "--data_root",
        small,
        "--output",
        tmp_path / "figures",
        "--pdf",
    )
    assert code == 0, err
    assert numbers(out, "images of") == split
    assert f"train {split['valid'] + split['tstid']} (valid + tstid), test {split['trnid']}" in out
    assert f"train {split['valid'] + split['trnid']} (valid + trnid), test {split['tstid']}" in out
    assert "8 (rose) to 8 (rose), ratio 1.0" in out
    assert (tmp_path / "figures" / "classes.pdf").exists() and Image.open(
        tmp_path / "figures" / "classes.png"
    ).size[0] > 1000


def test_counts_of_the_real_images(real, cli, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "flowers.pixels.load_pixels",
        lambda flowers, side: pytest.importorskip("torch").from_numpy(
            np.random.default_rng(0).integers(
                0, 256, (len(flowers.files), 3, side, side), dtype=np.uint8
            )
        ),
    )  # duplicates are not the question here
    code, out, err = cli(
        "data_Exploration/dataset_Description.py", "--data_root", real, "--output", tmp_path
    )
    assert code == 0, err
    ids = {
        k: v.ravel()
        for k, v in scipy.io.loadmat(real / "setid.mat").items()
        if not k.startswith("_")
    }
    assert numbers(out, "images of") == {k: len(v) for k, v in ids.items()}
    labels = scipy.io.loadmat(real / "imagelabels.mat")["labels"][0]
    each = np.bincount(labels[np.concatenate(list(ids.values())) - 1], minlength=103)[1:]
    names = json.loads((real / "cat_to_name.json").read_text())
    assert (
        f"{each.min()} ({names[str(each.argmin() + 1)]}) to {each.max()} ({names[str(each.argmax() + 1)]}), ratio {each.max() / each.min():.1f}"
        in out
    )
    assert "0 pairs" in out


def test_both_layouts_give_the_same(small, cli, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(small / "jpg", other / "images" / "jpg")
    shutil.copy(small / "cat_to_name.json", other)
    np.savez(other / "labels.npz", scipy.io.loadmat(small / "imagelabels.mat")["labels"])
    ids = {
        k: v.ravel().tolist()
        for k, v in scipy.io.loadmat(small / "setid.mat").items()
        if not k.startswith("_")
    }
    (other / "split.json").write_text(json.dumps(ids))
    for script, options in (
        ("dataset_Description", ()),
        ("class_distribution", ("--class", "LOTUS", "--class", "1")),
        ("isomap", ("--n_neighbors", 3)),
    ):
        outs = []
        for root in (
            ("--data_root", small),
            ("--data_root", other, "--splits_path", other / "split.json"),
        ):
            code, out, err = cli(
                f"data_Exploration/{script}.py", *root, *options, "--output", tmp_path / "figures"
            )
            assert code == 0, err
            outs.append(out.replace(str(root[1]), "ROOT"))
        assert outs[0] == outs[1] and "saved" in outs[0]


def test_copies_are_found_within_and_across_splits(small, cli, tmp_path, description):
    root = shutil.copytree(small, tmp_path / "copy", ignore=shutil.ignore_patterns(".cache"))
    rng = np.random.default_rng(0)
    flowers = open_flowers(root, holdout=True)
    for file in flowers.files:  # discs on noise are too alike
        picture = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)).resize(
            (90, 70), Image.BICUBIC
        )
        picture.save(file, quality=95)
    test, train, val = (flowers.splits[k] for k in ("test", "train", "val"))
    for source, target in ((train[0], test[0]), (train[1], train[2]), (val[1], test[1])):
        with Image.open(flowers.files[source]) as image:
            image.resize((120, 93)).save(flowers.files[target], quality=70)
    code, out, err = cli(
        "data_Exploration/dataset_Description.py", "--data_root", root, "--output", tmp_path
    )
    assert code == 0 and "3 pairs" in out, out + err
    assert "swapped splits: 1 within train, 0 within test, 2 across train and test: 2 of 12" in out
    assert "official splits: 1 within train, 1 within test, 1 across train and test: 1 of 24" in out
    with (tmp_path / "duplicates.csv").open(newline="") as file:
        found = {frozenset((row["file_1"], row["file_2"])) for row in csv.DictReader(file)}
    assert (
        frozenset((flowers.files[train[0]].name, flowers.files[test[0]].name)) in found
        and len(found) == 3
    )
    hashes = rng.random((60, 64)) < 0.5
    hashes[50:] = hashes[:10] ^ (rng.random((10, 64)) < 0.05)
    brute = {
        (i, j)
        for i in range(60)
        for j in range(i + 1, 60)
        if sum(a != b for a, b in zip(hashes[i], hashes[j])) <= 6
    }
    assert brute and set(map(tuple, description["near_pairs"](hashes, 6).tolist())) == brute


def test_colours_of_a_class(small, cli, tmp_path):
    code, out, err = cli(
        "data_Exploration/class_distribution.py",
        "--data_root",
        small,
        "--class",
        "rose",
        "--mask",
        "grabcut",
        "--output",
        tmp_path,
    )
    assert code == 0 and "rose" in out and (tmp_path / "colours_rose.png").exists(), err
    code, out, _ = cli(
        "data_Exploration/class_distribution.py",
        "--data_root",
        small,
        "--all",
        "--output",
        tmp_path,
        "--pdf",
    )
    assert (
        code == 0
        and (tmp_path / "colours_all.pdf").exists()
        and all(name in out for name in open_flowers(small).class_names)
    )
    for wrong, word in (("mallo", "tree mallow"), ("0", "1 to 6"), ("7", "1 to 6")):
        assert word in error_line(
            cli("data_Exploration/class_distribution.py", "--data_root", small, "--class", wrong)
        )
    assert "--all" in error_line(
        cli("data_Exploration/class_distribution.py", "--data_root", small)
    )
    flowers = open_flowers(small)
    assert find_class(flowers, "Tree Mallow") == find_class(flowers, "4") == 3
    with pytest.raises(UserError):
        find_class(flowers, "²")


def test_medoids_by_brute_force(isomap):
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 5)), rng.integers(0, 4, 60)
    for c, found in isomap["medoids"](features, labels).items():
        members = [i for i in range(60) if labels[i] == c]
        totals = [sum(math.dist(features[i], features[j]) for j in members) for i in members]
        assert found == members[int(np.argmin(totals))]


def test_isomap_unrolls_a_spiral(isomap):
    angle = np.linspace(2, 11, 200)
    points = np.stack([angle * np.cos(angle), angle * np.sin(angle), np.zeros(200)], 1)
    places, residual, trust = isomap["embed"](points, 4)
    length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    assert (
        abs(np.corrcoef(places[:, 0], length)[0, 1]) > 0.999 and residual[0] < 1e-3 and trust > 0.9
    )
    assert (
        isomap["parts"](points, 4) == 1
        and isomap["parts"](np.concatenate([points, points + 100]), 4) == 2
    )


def test_isomap_of_classes_in_two_pieces(small, cli, tmp_path, isomap):
    root = shutil.copytree(small, tmp_path / "copy", ignore=shutil.ignore_patterns(".cache"))
    flowers = open_flowers(root)
    for file, label in zip(flowers.files, flowers.labels):  # three classes of reds, three of blues
        Image.new(
            "RGB", (70, 70), (250 - 20 * label, 10, 10) if label < 3 else (10, 10, 130 + 20 * label)
        ).save(file)
    code, out, err = cli(
        "data_Exploration/isomap.py",
        "--data_root",
        root,
        "--labels",
        "--n_neighbors",
        2,
        "--output",
        tmp_path,
    )
    assert (
        code == 0 and (tmp_path / "isomap_class_hsv.png").exists() and "trustworthiness" in out
    ), err
    rows = colour.cone(load_colours(flowers, "centre"))
    centroids = np.stack([rows[flowers.labels == c].mean(0) for c in range(6)])
    pieces = [isomap["parts"](centroids, k) for k in range(1, 6)]
    assert (
        pieces[1] == 2
        and pieces[2] == 1
        and "falls into 2 pieces" in err
        and "--n_neighbors 3 connects" in err
    )
    assert "only 6 classes" in error_line(
        cli("data_Exploration/isomap.py", "--data_root", small, "--n_neighbors", 6)
    )
    assert "--level image" in error_line(
        cli("data_Exploration/isomap.py", "--data_root", small, "--run", tmp_path)
    )


def test_isomap_of_images_and_of_a_run(small, cli, tmp_path):
    code, out, err = cli(
        "data_Exploration/isomap.py",
        "--data_root",
        small,
        "--level",
        "image",
        "--features",
        "clip",
        "--architecture",
        "tiny",
        "--images",
        30,
        "--class",
        "rose",
        "--output",
        tmp_path,
    )
    assert (
        code == 0
        and "30 images, 128 features" in out
        and (tmp_path / "isomap_image_clip.png").exists()
    ), err
    flowers = open_flowers(small)
    rows = [
        {
            "file": flowers.files[i].name,
            "label": flowers.class_names[flowers.labels[i]],
            "top1": "rose",
        }
        for i in flowers.splits["test"]
    ]
    (tmp_path / "run").mkdir()
    files.write_csv(tmp_path / "run" / "predictions.csv", rows)
    options = (
        "data_Exploration/isomap.py",
        "--data_root",
        small,
        "--level",
        "image",
        "--features",
        "hsv_hist",
        "--run",
        tmp_path / "run",
        "--output",
        tmp_path,
    )
    code, out, err = cli(*options)
    assert code == 0 and f"{len(rows)} images, 256 features" in out, err
    rows[0]["label"] = "lily"
    files.write_csv(tmp_path / "run" / "predictions.csv", rows)
    assert "another dataset" in error_line(cli(*options))
    assert "predictions.csv" in error_line(cli(*options[:7], "--run", tmp_path))


def test_a_window_only_when_asked(small, cli, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(
        "PIL.ImageShow.show", lambda image, **_: shown.append(image.size) or len(shown) > 1
    )
    options = (
        "data_Exploration/class_distribution.py",
        "--data_root",
        small,
        "--class",
        "rose",
        "--output",
        tmp_path,
    )
    cli(*options)
    assert not shown
    assert "no picture viewer" in cli(*options, "--show")[2] and len(shown) == 1
    assert "no picture viewer" not in cli(*options, "--show")[2] and len(shown) == 2
