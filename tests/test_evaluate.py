"""Every metric against an independent computation."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from conftest import error_line
from sklearn.metrics import classification_report, top_k_accuracy_score

from flowers import UserError, evaluate, models
from flowers.data import open_flowers


@pytest.fixture
def scores():
    """200 images of 9 classes, of which one never occurs and one is never predicted first."""
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 3, 4, 5, 6, 8], 200, p=[0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05])
    scores = rng.normal(size=(200, 9)) + 1.5 * np.eye(9)[labels]
    scores[:, 4] -= 9
    return torch.from_numpy(scores), torch.from_numpy(labels)


def test_classification_equals_scikit_learn(scores):
    s, y = scores
    got = evaluate.classification(s, y)
    for k in (1, 3, 5):
        assert got[f"top{k}"] == pytest.approx(
            100 * top_k_accuracy_score(y, s, k=k, labels=range(9))
        )
    report = classification_report(y, s.argmax(1), output_dict=True, zero_division=0)
    for ours, theirs in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
        assert got[ours] == pytest.approx(100 * report["weighted avg"][theirs])
    assert got["mean_per_class"] == pytest.approx(
        100 * np.mean([(s.argmax(1)[y == c] == c).double().mean() for c in y.unique()])
    )
    rows = evaluate.per_class(s, y, [str(i) for i in range(9)])
    assert [r["class"] for r in rows] == [str(c) for c in y.unique().tolist()]
    for row in rows:
        assert (
            row["recall"] == pytest.approx(100 * report[row["class"]]["recall"], abs=0.01)
            and row["images"] == report[row["class"]]["support"]
        )
        assert row["precision"] == pytest.approx(100 * report[row["class"]]["precision"], abs=0.01)


def test_wilson_is_the_closed_form():
    for k, n in ((0, 10), (7, 10), (682, 718), (718, 718)):
        z, p = 1.959963984540054, k / n
        centre, half = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
        low, high = ((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n))
        assert evaluate.wilson(k, n) == pytest.approx(
            (100 * max(low, 0), 100 * min(high, 1)), abs=1e-9
        )


def test_few_classes_have_no_top_5():
    got = evaluate.classification(torch.eye(3)[[0, 1, 2, 2]], torch.tensor([0, 1, 1, 2]))
    assert got["top1"] == 75 and got["top3"] == got["top5"] == 100


def brute_force_retrieval(scores, relevant):
    hits, precisions = {k: 0 for k in (1, 3, 5, 10)}, []
    for row, wanted in zip(scores.tolist(), relevant.tolist()):
        order = sorted(range(len(row)), key=lambda j: -row[j])
        found = [rank for rank, j in enumerate(order, 1) if wanted[j]]
        for k in hits:
            hits[k] += found[0] <= k
        precisions.append(sum(i / rank for i, rank in enumerate(found, 1)) / len(found))
    return {
        **{f"R@{k}": 100 * v / len(scores) for k, v in hits.items()},
        "mAP": 100 * sum(precisions) / len(precisions),
    }


def test_retrieval_equals_a_loop(scores):
    s, y = scores
    images_to_classes = torch.nn.functional.one_hot(y, 9).bool()
    present = y.unique()
    for a, relevant in (
        (s, images_to_classes),
        (s.t()[present], images_to_classes.t()[present]),
        (torch.randn(40, 40), torch.eye(40).bool()),
    ):
        assert evaluate.retrieval(a, relevant) == pytest.approx(brute_force_retrieval(a, relevant))


def test_zero_shot_classifier_is_the_normalised_mean():
    torch.manual_seed(0)
    model = models.build("tiny")
    templates = ["an image of the {} flower", "a {} in {odd} braces, {}"]
    assert evaluate.fill_templates(["rose"], templates)[1] == "a rose in {odd} braces, rose"
    got = evaluate.zero_shot_classifier(model, ["rose", 'o\'hara "blue", süß'], templates)
    for row, name in zip(got, ["rose", 'o\'hara "blue", süß']):
        each = [models.text_features(model, [t.replace("{}", name)])[0] for t in templates]
        mean = sum(each) / 2
        assert torch.allclose(row, mean / mean.norm(), atol=1e-5)
    with pytest.raises(UserError, match="no {}"):
        evaluate.fill_templates(["rose"], ["a flower"])


def test_predictions_of_the_run_folder_give_its_numbers(small, tmp_path, cli):
    """The CSV files alone are enough to compute the result again; captions and --compare come along."""
    flowers = open_flowers(small)
    captions = tmp_path / "captions.jsonl"
    captions.write_text(
        "".join(
            f'{{"file": "{f.name}", "captions": ["picture {i}", "x"]}}\n'
            for i, f in enumerate(flowers.files)
        )
    )
    common = (
        "--data_root",
        small,
        "--architecture",
        "tiny",
        "--runs",
        tmp_path,
        "--wandb",
        "disabled",
    )
    code, out, _ = cli("baseline_eval.py", *common, "--name", "a", "--captions", captions)
    assert code == 0 and "caption_t2i_R@1" in out
    code, out, _ = cli(
        "baseline_eval.py", *common, "--name", "b", "--split", "train", "--prompt_template", "{}"
    )
    assert code == 0
    code, out, _ = cli("baseline_eval.py", *common, "--name", "c", "--compare", tmp_path / "a")
    shown = next(line for line in out.splitlines() if line.startswith("top5")).split()
    assert code == 0 and len(shown) == 3 and shown[1] == shown[2], "the same model, beside itself"
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [r["name"] for r in lines] == ["a", "b", "c"] and lines[1]["train/n"] == 36
    rows = list(csv.DictReader((tmp_path / "a" / "predictions.csv").open()))
    assert len(rows) == 12 and {r["file"] for r in rows} == {
        flowers.files[i].name for i in flowers.splits["test"]
    }
    truth = {f.name: flowers.class_names[label] for f, label in zip(flowers.files, flowers.labels)}
    assert all(truth[r["file"]] == r["label"] for r in rows)
    assert 100 * np.mean([r["label"] == r["top1"] for r in rows]) == pytest.approx(
        lines[0]["test/top1"]
    )
    assert all(float(r["score1"]) >= float(r["score2"]) >= float(r["score5"]) >= 0 for r in rows)
    for name in ("args.json", "report.csv", "confusion.png", "mistakes.png", "result.json"):
        assert (tmp_path / "a" / name).stat().st_size > 100
    assert "another --name" in error_line(cli("baseline_eval.py", *common, "--name", "a"))
    assert "val needs --holdout" in error_line(cli("baseline_eval.py", *common, "--split", "val"))
    assert cli("baseline_eval.py", *common)[0] == 0  # without a name, it gets one
    assert json.loads((tmp_path / "results.jsonl").read_text().splitlines()[3])["name"].startswith(
        "tiny-eval-"
    )
    assert "no {}" in error_line(
        cli("baseline_eval.py", *common, "--name", "d", "--prompt_template", "a flower")
    )


def test_a_table_shows_what_any_of_its_runs_has():
    text = evaluate.format_table({"earlier": {"top1": 50.0}, "now": {"top1": 60.0, "top3": 70.0}})
    assert [line.split() for line in text.splitlines()] == [
        ["earlier", "now"],
        ["top1", "50.00", "60.00"],
        ["top3", "70.00"],
    ]


def test_a_run_on_other_images_is_not_compared(small, tmp_path, cli):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "result.json").write_text('{"val/top1": 50.0}')
    assert "not evaluated on the test images" in error_line(
        cli(
            "baseline_eval.py",
            "--data_root",
            small,
            "--architecture",
            "tiny",
            "--runs",
            tmp_path,
            "--compare",
            tmp_path / "held",
            "--wandb",
            "disabled",
        )
    )
