"""The tool test_models.py: counts on the meta device against real models, formulas and the published numbers; its tables and figures."""

import csv
import json
import runpy

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ROOT, error_line
from PIL import Image

from flowers import UserError, figures, models, strategies

COUNTS = {
    "RN50": 102_007_137,
    "RN101": 119_688_033,
    "RN50x4": 178_300_601,
    "RN50x16": 290_979_217,
    "RN50x64": 623_258_305,
    "ViT-B/32": 151_277_313,
    "ViT-B/16": 149_620_737,
    "ViT-L/14": 427_616_513,
    "ViT-L/14@336px": 427_944_193,
}


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(ROOT / "test_models.py"))


def test_the_table_has_the_published_counts_and_touches_no_weights(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("flowers.weights.load_model", lambda *_: pytest.fail("a model was loaded"))
    code, out, _ = cli(
        "test_models.py", "--output", tmp_path, "--csv", tmp_path / "new" / "models.csv", "--pdf"
    )
    assert code == 0
    with (tmp_path / "new" / "models.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {
        row["architecture"]: int(row["parameters"]) for row in rows if row["architecture"] in COUNTS
    } == COUNTS
    assert {row["architecture"] for row in rows} == set(models.SHAPES)
    sizes = [int(row["parameters"]) for row in rows]
    assert sizes == sorted(sizes)
    assert all(f"{n:,}" in out for n in COUNTS.values()) and all(
        f"trainable_{s}" in rows[0] for s in strategies.STRATEGIES
    )
    with Image.open(tmp_path / "models.png") as picture:
        assert min(picture.size) > 400
    assert (tmp_path / "models.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("name", ["tiny", "RN50"])
def test_meta_counts_equal_those_of_a_real_model(tool, name, tmp_path):
    checked = (
        strategies.STRATEGIES if name == "tiny" else ("last_blocks", "lora")
    )  # a real RN50 takes its time
    row, model = tool["describe"](name, list(checked)), models.build(name)
    assert row["parameters"] == sum(p.numel() for p in model.parameters())
    assert row["image_parameters"] == sum(p.numel() for p in model.visual.parameters())
    assert (
        row["image_parameters"] + row["text_parameters"] + 1 == row["parameters"]
    )  # and the temperature
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert row["file_mb"] == pytest.approx((tmp_path / "model.pt").stat().st_size / 1e6, rel=0.01)
    for strategy in checked:
        model = models.build(name) if strategy == "prompt" else model  # lora added its own
        strategies.prepare(model, strategy)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert row[f"trainable_{strategy}"] == (
            102 * (row["embedding"] + 1) if strategy == "linear" else trained
        ), strategy


def test_flops_of_a_vit_by_formula(tool):
    def transformer(tokens, width, layers):
        return layers * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)

    row = tool["describe"]("ViT-B/32", [])
    assert row["gflops_image"] * 1e9 == pytest.approx(
        2 * 49 * 3 * 32**2 * 768 + transformer(50, 768, 12) + 2 * 768 * 512, rel=1e-6
    )
    assert row["gflops_text"] * 1e9 == pytest.approx(
        transformer(77, 512, 12) + 2 * 512 * 512, rel=1e-6
    )


def test_flops_of_a_resnet_by_its_convolutions(tool):
    model, counted = models.build("tiny-rn"), []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda m, _, out: counted.append(
                    2 * m.weight.numel() * out.shape[-1] * out.shape[-2]
                )
            )
    with torch.no_grad():
        model.encode_image(torch.zeros(1, 3, 64, 64))
    tokens, width, embedding = 2 * 2 + 1, 16 * 32, 128  # attention pooling: one query
    pool = 2 * width**2 * (1 + 2 * tokens) + 4 * tokens * width + 2 * width * embedding
    assert tool["describe"]("tiny-rn", [])["gflops_image"] * 1e9 == pytest.approx(
        sum(counted) + pool, rel=1e-6
    )


def test_a_checkpoint_is_a_row_like_any_other(tool, tmp_path):
    torch.save(models.build("tiny-rn").state_dict(), tmp_path / "model.pt")
    ours, theirs = (
        tool["describe"](name, ["lora", "prompt", "last_blocks"], blocks=1)
        for name in (str(tmp_path), "tiny-rn")
    )
    assert {**ours, "architecture": ""} == {**theirs, "architecture": ""}


def test_measuring_here(cli, tmp_path):
    path = tmp_path / "m.csv"
    code, _, err = cli(
        *("test_models.py", "--architecture", "tiny-rn", "--measure", "--batch_size", 2),
        *("--strategy", "full", "--output", tmp_path, "--csv", path),
    )
    assert code == 0, err
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    # How fast it is depends on what else the machine does: that it was measured is all.
    assert 0 < float(row["images_per_s"]) < float("inf")
    assert 50 < int(row["memory_mb"]) < 8000
    # all but the temperature
    assert int(row["trainable_full"]) == int(row["parameters"]) - 1


def test_accuracies_are_joined_by_what_was_run(tool, cli, tmp_path):
    rows = [
        {
            "name": "a",
            "job": "eval",
            "architecture": "RN50",
            "splits": "swapped",
            "test/top1": 60.0,
        },
        {
            "name": "b",
            "job": "train",
            "strategy": "lora",
            "architecture": "RN50",
            "splits": "swapped",
            "seed": 0,
            "test/top1": 90.0,
        },
        {
            "name": "c",
            "job": "train",
            "strategy": "lora",
            "architecture": "RN50",
            "splits": "swapped",
            "seed": 1,
            "test/top1": 92.0,
        },
        {
            "name": "d",
            "job": "train",
            "strategy": "lora",
            "architecture": "RN50",
            "splits": "official",
            "test/top1": 80.0,
        },
        {
            "name": "e",
            "job": "train",
            "strategy": "lora",
            "architecture": "ViT-B/32",
            "splits": "swapped",
            "classes": "base",
            "test/top1": 95.0,
        },
        {
            "name": "f",
            "job": "train",
            "strategy": "full",
            "architecture": "RN50",
            "splits": "swapped",
            "val/top1": 99.0,
        },
        {
            "name": "g",
            "job": "eval",
            "architecture": "runs/x",
            "splits": "swapped",
            "test/top1": 1.0,
        },
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
    code, out, _ = cli(
        "test_models.py",
        "--architecture",
        "RN50",
        "--architecture",
        "ViT-B/32",
        "--strategy",
        "full",
        "--output",
        tmp_path,
        "--results",
        path,
    )
    assert (
        code == 0 and "accuracy.png" in out and (tmp_path / "accuracy.png").stat().st_size > 10_000
    )


def test_mistakes_end_with_one_line(cli, tmp_path):
    assert "RN50x4" in error_line(
        cli("test_models.py", "--architecture", "resnet50", "--output", tmp_path)
    )
    assert "results.jsonl" in error_line(
        cli("test_models.py", "--results", tmp_path / "none.jsonl")
    )
    assert "--measure" in error_line(cli("test_models.py", "--sort", "images_per_s"))
    assert "--blocks" in error_line(
        cli("test_models.py", "--architecture", "tiny", "--blocks", 3, "--output", tmp_path)
    )


def overlaps(boxes):
    """Pairs of (left, bottom, right, top) that share some area."""
    return [
        (a, b)
        for i, a in enumerate(boxes)
        for b in boxes[:i]
        if min(a[2], b[2]) - max(a[0], b[0]) > 0 and min(a[3], b[3]) - max(a[1], b[1]) > 0
    ]


def test_labels_hide_neither_points_nor_each_other():
    rng = np.random.default_rng(0)
    figure, axis = plt.subplots(figsize=(5, 4))
    points = [(x, y, f"model {i}") for i, (x, y) in enumerate(rng.normal(size=(14, 2)))] + [
        (0.0, 0.0, "")
    ]
    axis.plot(*np.transpose([p[:2] for p in points]), "o", markersize=6)
    axis.margins(0.15)
    figures.label_points(axis, points)
    texts = [text.get_window_extent().extents for text in axis.texts]
    dots = [(*(p - 3), *(p + 3)) for p in axis.transData.transform([p[:2] for p in points])]
    plt.close(figure)
    assert [t.get_text() for t in axis.texts] and len(texts) == 14
    assert not overlaps(texts)
    assert not [(t, d) for t in texts for d in dots if overlaps([t, d])]


def test_spread_moves_boxes_apart_and_no_further():
    rng = np.random.default_rng(0)
    centres, sizes = rng.uniform(300, 500, (40, 2)), rng.uniform(20, 60, (40, 2))
    centres[1] = centres[0]  # one on top of the other
    moved = figures.spread(centres, sizes, (0, 0, 800, 600))
    boxes = np.concatenate([moved - sizes / 2, moved + sizes / 2], 1)
    assert not overlaps([box + [1e-3, 1e-3, -1e-3, -1e-3] for box in boxes])
    assert boxes[:, :2].min() >= 0 and (boxes[:, 2:] <= [800, 600]).all()
    assert np.array_equal(figures.spread(moved, sizes, (0, 0, 800, 600)), moved)
