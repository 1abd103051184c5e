"""The tool test_models.py: its counts against real models, formulas and the published numbers."""

import csv
import json
import runpy

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import COUNTS, ROOT, error_line
from PIL import Image

from flowers import UserError, figures, models, strategies
from flowers.choices import STRATEGIES


@pytest.fixture(scope="module")
def tool():
    """The functions of test_models.py, by name."""
    return runpy.run_path(str(ROOT / "test_models.py"))


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# -----------------------------------------------------------------------------
# parameters


def test_the_table_has_the_published_counts_and_touches_no_weights(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("flowers.weights.load_model", lambda *_: pytest.fail("a model was loaded"))
    table = tmp_path / "new" / "models.csv"
    code, out, _ = cli("test_models.py", "--output", tmp_path, "--csv", table, "--pdf")
    assert code == 0

    rows = read_csv(table)
    parameters = {row["architecture"]: int(row["parameters"]) for row in rows}
    assert parameters.keys() == set(models.SHAPES)
    assert {name: parameters[name] for name in COUNTS} == COUNTS
    assert list(parameters.values()) == sorted(parameters.values())
    assert all(f"{count:,}" in out for count in COUNTS.values())
    assert all(f"trainable_{strategy}" in rows[0] for strategy in STRATEGIES)

    with Image.open(tmp_path / "models.png") as picture:
        assert min(picture.size) > 400
    assert (tmp_path / "models.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("name", ["tiny", "RN50"])
def test_meta_counts_equal_those_of_a_real_model(tool, name, tmp_path):
    # A real RN50 takes its time.
    checked = STRATEGIES if name == "tiny" else ("last_blocks", "lora")
    row = tool["describe"](name, list(checked))
    model = models.build(name)
    assert row["parameters"] == sum(p.numel() for p in model.parameters())
    assert row["image_parameters"] == sum(p.numel() for p in model.visual.parameters())
    temperature = 1
    towers = row["image_parameters"] + row["text_parameters"]
    assert towers + temperature == row["parameters"]

    torch.save(model.state_dict(), tmp_path / "model.pt")
    saved_mb = (tmp_path / "model.pt").stat().st_size / 1e6
    assert row["file_mb"] == pytest.approx(saved_mb, rel=0.01)

    for strategy in checked:
        if strategy == "prompt":
            model = models.build(name)  # lora has added parameters of its own
        strategies.prepare(model, strategy)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if strategy == "linear":  # its head is not part of the model
            trained = 102 * (row["embedding"] + 1)
        assert row[f"trainable_{strategy}"] == trained, strategy


def test_a_checkpoint_is_a_row_like_any_other(tool, tmp_path):
    torch.save(models.build("tiny-rn").state_dict(), tmp_path / "model.pt")
    trained = ["lora", "prompt", "last_blocks"]
    ours = tool["describe"](str(tmp_path), trained, blocks=1)
    theirs = tool["describe"]("tiny-rn", trained, blocks=1)
    assert ours | {"architecture": ""} == theirs | {"architecture": ""}


# -----------------------------------------------------------------------------
# FLOPs


def test_flops_of_a_vit_by_formula(tool):
    def transformer(tokens, width, layers):
        projections = 2 * tokens * 12 * width**2
        attention = 4 * tokens**2 * width
        return layers * (projections + attention)

    row = tool["describe"]("ViT-B/32", [])
    patches = 2 * 49 * 3 * 32**2 * 768
    image = patches + transformer(50, 768, 12) + 2 * 768 * 512
    text = transformer(77, 512, 12) + 2 * 512 * 512
    assert row["gflops_image"] * 1e9 == pytest.approx(image, rel=1e-6)
    assert row["gflops_text"] * 1e9 == pytest.approx(text, rel=1e-6)


def test_flops_of_a_resnet_by_its_convolutions(tool):
    model = models.build("tiny-rn")
    counted = []

    def count(module, _, output):
        pixels = output.shape[-1] * output.shape[-2]
        counted.append(2 * module.weight.numel() * pixels)

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        model.encode_image(torch.zeros(1, 3, 64, 64))

    # Attention pooling has one query.
    tokens, width, embedding = 2 * 2 + 1, 16 * 32, 128
    pool = 2 * width**2 * (1 + 2 * tokens) + 4 * tokens * width + 2 * width * embedding
    flops = tool["describe"]("tiny-rn", [])["gflops_image"] * 1e9
    assert flops == pytest.approx(sum(counted) + pool, rel=1e-6)


# -----------------------------------------------------------------------------
# speed and accuracy


def test_measuring_here(cli, tmp_path):
    path = tmp_path / "m.csv"
    code, _, err = cli(
        *("test_models.py", "--architecture", "tiny-rn", "--measure", "--batch_size", 2),
        *("--strategy", "full", "--output", tmp_path, "--csv", path),
    )
    assert code == 0, err
    (row,) = read_csv(path)
    # How fast it is depends on what else the machine does: that it was measured is all.
    assert 0 < float(row["images_per_s"]) < float("inf")
    assert 50 < int(row["memory_mb"]) < 8000
    # all but the temperature
    assert int(row["trainable_full"]) == int(row["parameters"]) - 1


def result(name, architecture="RN50", **others):
    return {
        "name": name,
        "job": "train",
        "architecture": architecture,
        "splits": "swapped",
    } | others


def test_accuracies_are_joined_by_what_was_run(tool, cli, tmp_path):
    rows = [
        result("a", job="eval") | {"test/top1": 60.0},
        result("b", strategy="lora", seed=0) | {"test/top1": 90.0},
        result("c", strategy="lora", seed=1) | {"test/top1": 92.0},
        result("d", strategy="lora", splits="official") | {"test/top1": 80.0},
        result("e", "ViT-B/32", strategy="lora", classes="base") | {"test/top1": 95.0},
        # Neither the validation images nor another model count.
        result("f", strategy="full") | {"val/top1": 99.0},
        result("g", "runs/x", job="eval") | {"test/top1": 1.0},
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tool["read_accuracies"](path, list(models.SHAPES)) == {
        "zero-shot": {"RN50": [60.0]},
        "lora": {"RN50": [90.0, 92.0]},
        "lora, official split": {"RN50": [80.0]},
        "lora, base classes": {"ViT-B/32": [95.0]},
    }
    with pytest.raises(UserError, match="no test result"):
        tool["read_accuracies"](path, ["tiny"])

    command = ["test_models.py", "--architecture", "RN50", "--architecture", "ViT-B/32"]
    command += ["--strategy", "full", "--output", tmp_path, "--results", path]
    code, out, _ = cli(*command)
    assert code == 0
    assert "accuracy.png" in out
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000


def test_mistakes_end_with_one_line(cli, tmp_path):
    def mistake(*options):
        return error_line(cli("test_models.py", *options))

    output = ("--output", tmp_path)
    assert "RN50x4" in mistake("--architecture", "resnet50", *output)
    assert "results.jsonl" in mistake("--results", tmp_path / "none.jsonl")
    assert "--measure" in mistake("--sort", "images_per_s")
    assert "--blocks" in mistake("--architecture", "tiny", "--blocks", 3, *output)


# -----------------------------------------------------------------------------
# placing labels and thumbnails


def overlaps(boxes):
    """Pairs of (left, bottom, right, top) that share some area."""
    pairs = []
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            width = min(a[2], b[2]) - max(a[0], b[0])
            height = min(a[3], b[3]) - max(a[1], b[1])
            if width > 0 and height > 0:
                pairs.append((a, b))
    return pairs


def test_labels_hide_neither_points_nor_each_other():
    rng = np.random.default_rng(0)
    figure, axis = plt.subplots(figsize=(5, 4))
    points = [(x, y, f"model {i}") for i, (x, y) in enumerate(rng.normal(size=(14, 2)))]
    points.append((0.0, 0.0, ""))  # without a name: an obstacle only
    positions = [point[:2] for point in points]
    axis.plot(*np.transpose(positions), "o", markersize=6)
    axis.margins(0.15)

    figures.label_points(axis, points)

    labels = [text.get_window_extent().extents for text in axis.texts]
    dots = [(*(pixel - 3), *(pixel + 3)) for pixel in axis.transData.transform(positions)]
    plt.close(figure)
    assert len(labels) == 14
    assert all(text.get_text() for text in axis.texts)
    assert not overlaps(labels)
    for label in labels:
        assert not [dot for dot in dots if overlaps([label, dot])]


def test_spread_moves_boxes_apart_and_no_further():
    rng = np.random.default_rng(0)
    bounds = (0, 0, 800, 600)
    centres, sizes = rng.uniform(300, 500, (40, 2)), rng.uniform(20, 60, (40, 2))
    centres[1] = centres[0]  # one on top of the other

    moved = figures.spread(centres, sizes, bounds)

    boxes = np.concatenate([moved - sizes / 2, moved + sizes / 2], axis=1)
    assert not overlaps([box + [1e-3, 1e-3, -1e-3, -1e-3] for box in boxes])
    assert boxes[:, :2].min() >= 0
    assert (boxes[:, 2:] <= [800, 600]).all()
    assert np.array_equal(figures.spread(moved, sizes, bounds), moved), "they were apart already"
