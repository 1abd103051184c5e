"""Probabilities: their scores against scikit-learn and plain loops, and a run's temperature."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import NAMES, error_line
from scipy.special import softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from flowers import UserError, calibration, evaluate, runs
from flowers.choices import TEMPLATE
from flowers.data import open_flowers
from flowers.gallery.relevance import load_run
from flowers.gallery.search import Searcher

# -----------------------------------------------------------------------------
# scores of probabilities


def draw(n=300, n_classes=7, temperature=1.0):
    """Logits whose labels are drawn from their own softmax, divided by a temperature after it."""
    rng = np.random.default_rng(3)
    logits = 2 * rng.normal(size=(n, n_classes))
    chances = softmax(logits, axis=1)
    labels = np.array([rng.choice(n_classes, p=row) for row in chances])
    return (logits / temperature).astype(np.float32), labels


def scores_of(logits, labels):
    return calibration.scores(logits, labels, logits.argmax(1))


def test_scores_equal_scikit_learn():
    logits, labels = draw()
    chances = softmax(logits.astype(float), axis=1)
    scores = scores_of(logits, labels)
    assert scores["nll"] == pytest.approx(log_loss(labels, chances, labels=range(7)))
    brier = brier_score_loss(labels, chances, labels=range(7), scale_by_half=False)
    assert scores["brier"] == pytest.approx(brier)
    # Its quantiles are bins of equal mass where 15 divides the number of images.
    correct = chances.argmax(1) == labels
    curve = calibration_curve(correct, chances.max(1), n_bins=15, strategy="quantile")
    assert scores["ece"] == pytest.approx(100 * abs(curve[0] - curve[1]).mean())

    rows = evaluate.reliability(chances.max(1), correct)
    assert [row["images"] for row in rows] == [20] * 15
    np.testing.assert_allclose([row["accuracy"] for row in rows], 100 * curve[0])
    np.testing.assert_allclose([row["confidence"] for row in rows], 100 * curve[1])
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in rows)
    for name in ("nll", "brier", "ece"):
        assert scores[f"{name}_low"] < scores[name] < scores[f"{name}_high"]
    assert scores == scores_of(logits, labels), "the same numbers each time"


def test_a_certain_mistake_costs_what_its_logits_say():
    logits = np.array([[1000, 0, 0], [0, 0, 800]], np.float32)
    scores = scores_of(logits, np.array([1, 2]))
    assert scores["nll"] == 500  # from probabilities it would be infinite, or where they are cut
    assert scores["brier"] == 1
    assert scores["ece"] == 50


def test_images_of_one_confidence_share_a_bin_whatever_their_order():
    confidence = np.repeat([0.2, 0.5, 1.0], [10, 30, 60])
    assert calibration.assign_bins(confidence).tolist() == [0] * 10 + [3] * 30 + [10] * 60
    order = np.random.default_rng(0).permutation(100)
    bins = calibration.assign_bins(confidence)[order]
    assert calibration.assign_bins(confidence[order]).tolist() == bins.tolist()
    assert set(calibration.assign_bins(np.ones(5))) == {7}
    # These are equal in predictions.csv.
    assert len(set(calibration.assign_bins(np.array([0.9, 0.9 + 1e-9, 0.1])))) == 2


@pytest.mark.parametrize("n", [1, 2, 14, 15, 16, 31])
def test_bins_have_equal_numbers_of_images_and_few_images_one_each(n):
    confidence = np.random.default_rng(n).permutation(np.linspace(0.1, 0.9, n))
    sizes = np.bincount(calibration.assign_bins(confidence))
    sizes = sizes[sizes > 0]
    assert len(sizes) == min(n, 15) and sizes.max() - sizes.min() <= 1
    # In the order of confidence.
    assert (np.diff(calibration.assign_bins(np.sort(confidence))) >= 0).all()
    logits, labels = draw(n)
    assert all(map(math.isfinite, scores_of(logits, labels).values()))


def test_intervals_are_those_of_a_plain_bootstrap():
    logits, labels = draw(200)
    scores = scores_of(logits, labels)
    chances = softmax(logits.astype(float), axis=1)
    losses = -np.log(chances[np.arange(200), labels])
    rng = np.random.default_rng(99)
    means = [losses[rng.integers(200, size=200)].mean() for _ in range(2000)]
    low, high = np.percentile(means, [2.5, 97.5])
    width = high - low
    assert scores["nll_low"] == pytest.approx(low, abs=0.1 * width)
    assert scores["nll_high"] == pytest.approx(high, abs=0.1 * width)


def test_the_interval_of_the_ece_is_not_the_biased_bootstrap():
    """Of calibrated answers all resamples lie above the sample; the interval is around it."""
    logits, labels = draw(300)
    scores = scores_of(logits, labels)
    middle = (scores["ece_low"] + scores["ece_high"]) / 2
    assert middle == pytest.approx(scores["ece"], rel=0.15)


# -----------------------------------------------------------------------------
# the temperature


@pytest.mark.parametrize("temperature", [0.2, 1.0, 4.0])
def test_the_temperature_undoes_a_temperature(temperature):
    logits, labels = draw(4000, temperature=temperature)
    found = calibration.fit_temperature(logits, labels)
    assert found == pytest.approx(1 / temperature, rel=0.05)
    # No other is better: a grid, by scikit-learn.
    best = calibration.nll(logits, labels, found)
    for other in found * np.geomspace(0.5, 2, 21):
        chances = softmax(logits / other, axis=1)
        assert log_loss(labels, chances, labels=range(7)) >= best - 1e-6


def test_no_temperature_where_the_images_say_nothing():
    logits, _ = draw(50)
    assert calibration.fit_temperature(logits, logits.argmax(1)) is None  # all right
    assert calibration.fit_temperature(logits, logits.argmin(1)) is None  # worse than chance


def test_a_temperature_divides_the_logits_and_leaves_the_ranks():
    torch.manual_seed(0)
    features, labels = torch.randn(60, 8), np.arange(60) % 5
    head = 9 * torch.randn(5, 8), torch.randn(5)
    plain, _ = evaluate.evaluate_features(features, head, labels)
    soft, probabilities = evaluate.evaluate_features(features, head, labels, temperature=3.0)
    logits = evaluate.class_logits(features, head)
    assert torch.equal(probabilities, (logits / 3).softmax(1))
    assert soft["nll"] == pytest.approx(calibration.nll(logits.numpy(), labels, 3.0))
    changed = {key for key in plain if plain[key] != soft[key]}
    assert {key.split("_")[0] for key in changed} == {"nll", "brier", "ece"}


# -----------------------------------------------------------------------------
# the scripts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def held(folder, small, cli):
    """A run with --holdout; made once."""
    if not (folder / "held").exists():
        options = ["--data_root", small, "--architecture", "tiny", "--epochs", 2, "--holdout"]
        options += ["--batch_size", 12, "--runs", folder, "--name", "held", "--wandb", "disabled"]
        code, out, err = cli("train.py", *options)
        assert code == 0 and "temperature of least NLL on val" in out, err
    return folder / "held"


def read(path):
    return json.loads(path.read_text())


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_holdout_leaves_its_temperature_and_an_evaluation_uses_it(held, folder, small, cli):
    result, stored = read(held / "result.json"), read(held / "calibration.json")
    temperature = stored["temperature"]
    assert stored == {"temperature": temperature, "split": "val", "images": 12}
    assert result["calibration_temperature"] == temperature
    assert result["val/nll_calibrated"] <= result["val/nll"]
    assert result["tau"] == pytest.approx(0.07, abs=0.01)
    assert (held / "reliability.png").stat().st_size > 1000
    # The scores of predictions.csv give the ECE of the result.
    rows = rows_of(held / "predictions.csv")
    confidence = np.array([float(row["score1"]) for row in rows])
    correct = np.array([row["label"] == row["top1"] for row in rows])
    bins = evaluate.reliability(confidence, correct)
    ece = sum(row["images"] * abs(row["accuracy"] - row["confidence"]) for row in bins) / 12
    assert result["val/ece"] == pytest.approx(ece, abs=1e-3)

    place = ["--runs", folder, "--wandb", "disabled", "--architecture", held]
    # The run's own template may be typed: it is the same head.
    own = ("--prompt_template", TEMPLATE, "--split", "val", "--name", "soft")
    code, out, err = cli("baseline_eval.py", *place, "--calibrated", *own)
    assert code == 0, err
    assert (
        f"probabilities: calibrated (T = {temperature:.3g}), found on images of this split" in out
    )
    soft = read(folder / "soft" / "result.json")
    assert soft["calibrated"] is True and soft["calibration_temperature"] == temperature
    assert soft["val/nll"] == pytest.approx(result["val/nll_calibrated"])
    assert soft["val/top5"] == result["val/top5"] and soft["val/ece"] != result["val/ece"]
    assert "calibrated (T" in evaluate.recorded_protocol(folder / "soft", "val")
    assert "calibrated" not in evaluate.recorded_protocol(held, "val")

    # What the temperature was not found for is refused.
    for other in (("--prompt_template", "a {}"), ("--class_names", "openai")):
        line = error_line(cli("baseline_eval.py", *place, "--calibrated", *other))
        assert "names and prompts" in line
    line = error_line(cli("baseline_eval.py", *place, "--calibrated", "--wise_ft", 0.5))
    assert "--wise_ft" in line
    line = error_line(
        cli("baseline_eval.py", "--data_root", small, "--architecture", "tiny", "--calibrated")
    )
    assert "--holdout" in line


def test_pictures_are_named_by_calibrated_probabilities(held, small, tmp_path, cli):
    picture = small / "jpg" / "image_00003.jpg"
    temperature = read(held / "calibration.json")["temperature"]

    def predict(*options, run=held):
        outcome = cli(
            "predict.py", picture, "--architecture", run, "--json", tmp_path / "o", *options
        )
        return outcome, read(tmp_path / "o") if outcome[0] == 0 else None

    def probabilities(results):
        best = results["pictures"][0]["predictions"]
        return np.array([row["probability"] for row in sorted(best, key=lambda row: row["name"])])

    (_, out, _), soft = predict("--top", 6)
    assert f"calibrated (T = {temperature:.3g})" in out
    assert soft["calibration_temperature"] == temperature
    (_, out, _), plain = predict("--top", 6, "--calibrated=false")
    assert "calibrated" not in out and plain["calibration_temperature"] is None
    expected = softmax(np.log(probabilities(plain)) / temperature)
    np.testing.assert_allclose(probabilities(soft), expected, atol=1e-4)
    # Other prompts or names make another head.
    for other in (("--prompt_template", "a {}"), ("--names", tmp_path / "names.txt")):
        (tmp_path / "names.txt").write_text("tulip\nrose\n")
        (_, out, _), results = predict(*other)
        assert results["calibration_temperature"] is None
        assert "names and prompts" in error_line(predict("--calibrated", *other)[0])

    # The page says the same.
    searcher = Searcher(open_flowers(small, holdout=True), held)
    assert searcher.temperature == temperature
    by_page = searcher.ranking(searcher.features[2])
    order = np.argsort(NAMES)
    np.testing.assert_allclose(by_page[order], probabilities(soft), atol=2e-3)
    explainer = load_run(held, NAMES)
    by_image = explainer.probabilities(picture)
    np.testing.assert_allclose(by_image[order], probabilities(soft), atol=2e-3)
    other = open_flowers(small, holdout=True, class_names="openai")
    assert Searcher(other, held).temperature is None

    copy = shutil.copytree(held, tmp_path / "copy")
    (copy / "calibration.json").unlink()
    assert predict(run=copy)[1]["calibration_temperature"] is None
    assert "has no calibration.json" in error_line(predict("--calibrated", run=copy)[0])
    (copy / "calibration.json").write_text('{"temperature": 0}')
    assert "no number that a fit gives" in error_line(predict(run=copy)[0])


@pytest.mark.parametrize(
    "text",
    ['{"temperature": 1', "{}", "[1]", '{"temperature": "1.5"}', '{"temperature": true}']
    + [f'{{"temperature": {value}}}' for value in ("NaN", "Infinity", "-2", "0", "null")],
)
def test_a_damaged_calibration_is_refused(tmp_path, text):
    assert evaluate.read_temperature(tmp_path) is None
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(UserError, match="calibration.json"):
        evaluate.read_temperature(tmp_path)


def test_the_head_of_a_prompts_file_is_known_by_its_sentences(tmp_path):
    """Not by the name of the file: the sentences are what the temperature was found for."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text('{"rose": ["a"], "lily": ["b"]}')
    run, names = tmp_path, ["rose", "lily"]
    digest = evaluate.digest_of_prompts(prompts)
    (run / "args.json").write_text(json.dumps({"prompts_digest": digest, "prompt_template": None}))
    (run / "class_names.json").write_text(json.dumps({"names": names}))
    (run / "calibration.json").write_text('{"temperature": 1.5}')
    assert evaluate.require_temperature(run, names, None, prompts) == 1.5
    assert evaluate.own_temperature(run, names[::-1], None, prompts) is None
    assert evaluate.own_temperature(run, names, None, None) is None
    prompts.write_text('{"rose": ["a"], "lily": ["c"]}')
    assert evaluate.own_temperature(run, names, None, prompts) is None
    # What is learned needs no prompts, and typed ones replace it.
    (run / "classifier.pt").write_bytes(b"")
    assert evaluate.own_temperature(run, names, None, None) == 1.5
    assert evaluate.own_temperature(run, names, ["a {}"], None) is None


# -----------------------------------------------------------------------------
# tables, and older runs


def test_tables_show_three_digits_of_what_is_no_percentage():
    metrics = {"nll": 0.12345, "nll_low": 0.1, "nll_high": 0.2, "brier": 0.5, "ece": 3.456}
    lines = evaluate.format_table({"run": metrics, "older": {"top1": 50.0}}).splitlines()
    assert lines[1].split() == ["nll", "0.123", "[0.100,", "0.200]"]
    assert [line.split() for line in lines[2:]] == [
        ["brier", "0.500"],
        ["ece", "3.46"],
        ["top1", "50.00"],
    ]


def test_an_older_run_of_qwen_is_read_by_the_name_that_the_score_has_now(tmp_path):
    stored = {"test/top1": 50.0, "test/calibrated_top1": 40.0, "reported_score": "calibrated"}
    (tmp_path / "result.json").write_text(json.dumps(stored))
    assert runs.read_metrics(tmp_path, "test") == {"top1": 50.0, "pmi_top1": 40.0}
