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

# -----------------------------------------------------------------------------
# classification


@pytest.fixture
def scores():
    """Scores and labels of 200 images of 9 classes: one never occurs, one is never predicted."""
    rng = np.random.default_rng(0)
    classes = [0, 1, 2, 3, 4, 5, 6, 8]
    frequencies = [0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05]
    labels = rng.choice(classes, 200, p=frequencies)
    scores = rng.normal(size=(200, 9)) + 1.5 * np.eye(9)[labels]
    scores[:, 4] -= 9
    return torch.from_numpy(scores), torch.from_numpy(labels)


def test_classification_equals_scikit_learn(scores):
    scores, labels = scores
    predicted = scores.argmax(1)
    report = classification_report(labels, predicted, output_dict=True, zero_division=0)

    metrics = evaluate.classification(scores, labels)
    for k in (1, 3, 5):
        accuracy = top_k_accuracy_score(labels, scores, k=k, labels=range(9))
        assert metrics[f"top{k}"] == pytest.approx(100 * accuracy)
    for ours, theirs in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
        assert metrics[ours] == pytest.approx(100 * report["weighted avg"][theirs])
    accuracies = [(predicted[labels == c] == c).double().mean() for c in labels.unique()]
    assert metrics["mean_per_class"] == pytest.approx(100 * np.mean(accuracies))

    rows = evaluate.per_class(scores, labels, [str(i) for i in range(9)])
    assert [row["class"] for row in rows] == [str(c) for c in labels.unique().tolist()]
    for row in rows:
        theirs = report[row["class"]]
        assert row["images"] == theirs["support"]
        assert row["recall"] == pytest.approx(100 * theirs["recall"], abs=0.01)
        assert row["precision"] == pytest.approx(100 * theirs["precision"], abs=0.01)


def test_wilson_is_the_closed_form():
    z = 1.959963984540054
    for correct, n in ((0, 10), (7, 10), (682, 718), (718, 718)):
        p = correct / n
        centre = p + z * z / 2 / n
        half = z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
        low = (centre - half) / (1 + z * z / n)
        high = (centre + half) / (1 + z * z / n)
        expected = (100 * max(low, 0), 100 * min(high, 1))
        assert evaluate.wilson(correct, n) == pytest.approx(expected, abs=1e-9)


def test_two_classes_have_a_top_1():
    metrics = evaluate.classification(
        torch.tensor([[2.0, 1], [0, 1], [1, 0]]), torch.tensor([0, 1, 1])
    )
    assert metrics["top1"] == pytest.approx(200 / 3)
    assert metrics["top3"] == 100


def test_few_classes_have_no_top_5():
    scores = torch.eye(3)[[0, 1, 2, 2]]
    metrics = evaluate.classification(scores, torch.tensor([0, 1, 1, 2]))
    assert metrics["top1"] == 75
    assert metrics["top3"] == metrics["top5"] == 100


# -----------------------------------------------------------------------------
# retrieval and prompts


def brute_force_retrieval(scores, relevant):
    hits = {1: 0, 3: 0, 5: 0, 10: 0}
    precisions = []
    for row, is_relevant in zip(scores.tolist(), relevant.tolist()):
        order = sorted(range(len(row)), key=lambda item: -row[item])
        ranks = [rank for rank, item in enumerate(order, start=1) if is_relevant[item]]
        for k in hits:
            hits[k] += ranks[0] <= k
        precision_at = [i / rank for i, rank in enumerate(ranks, start=1)]
        precisions.append(sum(precision_at) / len(precision_at))
    metrics = {f"R@{k}": 100 * count / len(scores) for k, count in hits.items()}
    metrics["mAP"] = 100 * sum(precisions) / len(precisions)
    return metrics


def test_retrieval_equals_a_loop(scores):
    scores, labels = scores
    is_class = torch.nn.functional.one_hot(labels, 9).bool()
    present = labels.unique()
    cases = [
        (scores, is_class),  # the class of an image
        (scores.t()[present], is_class.t()[present]),  # the images of a class
        (torch.randn(40, 40), torch.eye(40).bool()),  # one sentence an image
    ]
    for case, relevant in cases:
        expected = brute_force_retrieval(case, relevant)
        assert evaluate.retrieval(case, relevant) == pytest.approx(expected)


def test_zero_shot_classifier_is_the_normalised_mean():
    torch.manual_seed(0)
    model = models.build("tiny")
    names = ["rose", 'o\'hara "blue", süß']
    templates = ["an image of the {} flower", "a {} in {odd} braces, {}"]
    assert evaluate.fill_templates(["rose"], templates)[1] == "a rose in {odd} braces, rose"

    classifier = evaluate.zero_shot_classifier(model, names, templates)
    for row, name in zip(classifier, names):
        prompts = [template.replace("{}", name) for template in templates]
        mean = sum(models.text_features(model, [prompt])[0] for prompt in prompts) / 2
        assert torch.allclose(row, mean / mean.norm(), atol=1e-5)

    with pytest.raises(UserError, match="no {}"):
        evaluate.fill_templates(["rose"], ["a flower"])


# -----------------------------------------------------------------------------
# baseline_eval.py


def test_predictions_of_the_run_folder_give_its_numbers(small, tmp_path, cli):
    """The CSV files are enough to compute the result again; captions and --compare come along."""
    flowers = open_flowers(small)
    captions = tmp_path / "captions.jsonl"
    with captions.open("w") as file:
        for i, picture in enumerate(flowers.files):
            file.write(f'{{"file": "{picture.name}", "captions": ["picture {i}", "x"]}}\n')

    def evaluation(*options):
        common = ["--data_root", small, "--architecture", "tiny", "--runs", tmp_path]
        return cli("baseline_eval.py", *common, "--wandb", "disabled", *options)

    def results():
        lines = (tmp_path / "results.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    code, out, _ = evaluation("--name", "a", "--captions", captions)
    assert code == 0
    assert "caption_t2i_R@1" in out
    code, out, _ = evaluation("--name", "b", "--split", "train", "--prompt_template", "{}")
    assert code == 0
    code, out, _ = evaluation("--name", "c", "--compare", tmp_path / "a")
    assert code == 0
    top5 = next(line for line in out.splitlines() if line.startswith("top5")).split()
    assert len(top5) == 3 and top5[1] == top5[2], "the same model, beside itself"

    assert [result["name"] for result in results()] == ["a", "b", "c"]
    assert results()[1]["train/n"] == 36
    test_files = {flowers.files[i].name for i in flowers.splits["test"]}
    name_of = {
        file.name: flowers.class_names[label] for file, label in zip(flowers.files, flowers.labels)
    }
    with (tmp_path / "a" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert {row["file"] for row in rows} == test_files
    assert all(name_of[row["file"]] == row["label"] for row in rows)
    top1 = 100 * np.mean([row["label"] == row["top1"] for row in rows])
    assert top1 == pytest.approx(results()[0]["test/top1"])
    for row in rows:
        assert float(row["score1"]) >= float(row["score2"]) >= float(row["score5"]) >= 0
    for name in ("args.json", "report.csv", "confusion.png", "mistakes.png", "result.json"):
        assert (tmp_path / "a" / name).stat().st_size > 100

    assert "another --name" in error_line(evaluation("--name", "a"))
    assert "val needs --holdout" in error_line(evaluation("--split", "val"))
    assert evaluation()[0] == 0  # without a name, it gets one
    assert results()[3]["name"].startswith("tiny-eval-")
    assert "no {}" in error_line(evaluation("--name", "d", "--prompt_template", "a flower"))


def test_a_table_shows_what_any_of_its_runs_has():
    text = evaluate.format_table({"earlier": {"top1": 50.0}, "now": {"top1": 60.0, "top3": 70.0}})
    assert [line.split() for line in text.splitlines()] == [
        ["earlier", "now"],
        ["top1", "50.00", "60.00"],
        ["top3", "70.00"],
    ]


def test_a_run_on_other_images_is_not_compared(small, tmp_path, cli):
    held = tmp_path / "held"
    held.mkdir()
    (held / "result.json").write_text('{"val/top1": 50.0}')
    command = ["baseline_eval.py", "--data_root", small, "--architecture", "tiny"]
    command += ["--runs", tmp_path, "--compare", held, "--wandb", "disabled"]
    assert "not evaluated on the test images" in error_line(cli(*command))
