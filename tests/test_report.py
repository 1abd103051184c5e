"""report.py on made-up run folders: what it finds, what it refuses to compare, and that the same
runs give the same bytes."""

import csv
import itertools
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import ROOT, error_line

from flowers.files import read_json
from flowers.runs import strategy_of
from flowers.study import comparable, figures, statistics

NAMES = [f"kind {c:02d}" for c in range(12)]
BIRDS = [f"bird {c:02d}" for c in range(6)]  # of another dataset
CONFIG = {
    "job": "train",
    "data_root": "x",
    "splits": "swapped",
    "splits_path": None,
    "class_names": "oxford",
    "architecture": "tiny",
    "strategy": "full",
    "classes": "all",
    "shots": None,
    "prompt_template": ["a {}"],
    "positives": "class",
    "temperature": None,
    "learn_temperature": False,
    "tau_lr": 1e-3,
    "epochs": 2,
    "batch_size": 64,
    "lr": 1e-3,
    "augment": "crop",
    "seed": 0,
    "runs": "runs",
    "wandb": "disabled",
    "holdout": True,
}
# What each strategy gains at its best learning rate, and the fraction of it at each rate.
STRATEGIES = {"full": 0.4, "last_blocks": 0.3, "text": 0.15}
RATES = {1e-4: 0.5, 1e-3: 0.8, 5e-3: 1.0}
SEEDS = (0, 1)


# -----------------------------------------------------------------------------
# made-up runs


def write_run(runs, name, accuracy, split="val", n=240, names=NAMES, first=0, **settings):
    """Write a run folder whose predictions are right with probability `accuracy`.

    More often for the first classes than for the last. The images are numbered from `first`.
    """
    config = CONFIG | settings
    rng = np.random.default_rng(list(name.encode()))
    folder = runs / name
    folder.mkdir(parents=True)
    label = np.arange(n) % len(names)
    right = rng.random(n) < accuracy + 0.2 * (0.5 - label / len(names))
    wrong_label = (label + rng.integers(1, 3, n)) % len(names)
    predicted = np.where(right, label, wrong_label)
    with (folder / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label", "top1", "score1"])
        for i in range(n):
            score = 0.2 + 0.8 * rng.random() * accuracy
            row = [f"{split}_{i + first:05d}.jpg", names[label[i]], names[predicted[i]]]
            writer.writerow([*row, f"{score:.6f}"])

    top1 = 100 * right.mean()
    metrics = {
        "n": n,
        "top1": top1,
        "top5": min(100, top1 + 10),
        "mean_per_class": top1,
        "base_top1": top1,
        "new_top1": top1 / 2,
        "harmonic_mean": top1 / 1.5,
        "nll": 3 - top1 / 40,
        "nll_low": 2.8 - top1 / 40,
        "nll_high": 3.2 - top1 / 40,
        "brier": 1 - top1 / 110,
        "ece": 20 - top1 / 6,
    }
    result = {
        "name": name,
        **{f"{split}/{metric}": value for metric, value in metrics.items()},
        "train_seconds": 100 * accuracy * bool(config["epochs"]),
        "peak_memory_mb": 500,
        "trainable_image": 1000,
        "trainable_text": 500,
        "parameters": 7_500_000 if "rn" in name else 6_900_000,
        **config,
    }
    arguments = config | {"name": name, "commit": "x", "device": "cpu"}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "args.json").write_text(json.dumps(arguments))

    with (folder / "metrics.jsonl").open("w") as file:
        for i in range(20 * (config["epochs"] or 0)):
            loss = 3 * math.exp(-i / 20 * accuracy) + rng.random() / 9
            file.write(json.dumps({"epoch": 1, "step": i + 1, "train/loss": loss}) + "\n")


def write_study(runs, **options):
    """Write the runs of a study.

    Two architectures after a stand-in for pretraining, three strategies, three learning rates,
    two seeds; the final table on test; temperatures; base to new classes.
    """
    for architecture, bonus in (("tiny", 0.0), ("tiny-rn", 0.05)):
        write_run(
            runs,
            f"start-{architecture}",
            0.3 + bonus,
            architecture=architecture,
            classes="base",
            epochs=12,
            **options,
        )
        start = options | {"architecture": f"somewhere/start-{architecture}"}
        for split in ("val", "test"):
            untrained = start | {"epochs": 0, "holdout": split == "val"}
            name = f"untrained-{architecture}-{split}"
            write_run(runs, name, 0.3 + bonus, split, **untrained)
        for strategy, gain in STRATEGIES.items():
            augment = "crop" if strategy == "full" else "none"
            settings = start | {"strategy": strategy, "augment": augment}
            for seed in SEEDS:
                for lr, fraction in RATES.items():
                    name = f"factorial-{architecture}-{strategy}-{lr}-{seed}"
                    accuracy = 0.3 + bonus + gain * fraction
                    write_run(runs, name, accuracy, lr=lr, seed=seed, **settings)
                name = f"final-{architecture}-{strategy}-{seed}"
                accuracy = 0.3 + bonus + gain
                final = settings | {"lr": 5e-3, "seed": seed, "holdout": False}
                write_run(runs, name, accuracy, "test", **final)

    from_start = options | {"architecture": "x/start-tiny"}
    for tau in (0.003, 0.03, 0.3):
        accuracy = 0.7 - 0.1 * abs(math.log10(tau / 0.03))
        for seed in SEEDS:
            write_run(runs, f"tau-{tau}-{seed}", accuracy, temperature=tau, seed=seed, **from_start)
    for strategy in ("full", "text"):
        write_run(runs, f"base-{strategy}", 0.5, classes="base", strategy=strategy, **from_start)
    write_forgetting(runs, **options)
    return runs


def write_forgetting(runs, **options):
    """Write evaluations of two strategies on another dataset, before and after, and between."""
    evaluation = options | {"job": "eval", "strategy": None, "epochs": None}
    birds = {"n": 90, "names": BIRDS, "data_root": "birds", "dataset": "birds"}
    start = {"architecture": "x/start-tiny"}
    write_run(runs, "birds-untrained", 0.8, "test", **evaluation | start | birds)
    alphas = [1, 0.5, 0]  # in any order
    for strategy, lost in {"full": 0.4, "text": 0.1}.items():
        names = [f"factorial-tiny-{strategy}-0.005-{seed}" for seed in SEEDS]
        for name in names:
            model = {"architecture": f"x/{name}", "wise_ft": alphas}
            write_run(runs, f"birds-{name}", 0.8 - lost, "test", **evaluation | model | birds)
            write_curve(runs / f"birds-{name}", "test", [80 - 100 * lost * a for a in alphas])
            # The same predictions as those of the run itself.
            write_run(runs, f"val-{name}", 0.3, "val", **evaluation | model)
            write_curve(runs / f"val-{name}", "val", [30 + 40 * a for a in alphas])
        soup = {"architecture": "ViT-B/32", "soup": [f"x/{name}" for name in names]}
        write_run(runs, f"birds-soup-{strategy}", 0.75, "test", **evaluation | soup | birds)
        write_run(runs, f"val-soup-{strategy}", 0.75, "val", **evaluation | soup)


def write_curve(folder, split, top1):
    """Write the curve of an evaluation whose alphas are 1, 0.5 and 0."""
    rows = []
    for alpha, value in zip((1, 0.5, 0), top1):
        metrics = {"top1": value, "top1_low": value - 5, "top1_high": value + 5}
        rows.append({"alpha": alpha} | {f"{split}/{key}": v for key, v in metrics.items()})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study") / "runs")


@pytest.fixture(scope="module")
def report(study):
    """The folder of the report on the study."""
    output = study.parent / "report"
    flags = ["--runs", study, "--output", output, "--bootstrap", "100"]
    subprocess.run([sys.executable, ROOT / "report.py", *flags], check=True)
    return output


@pytest.fixture(scope="module")
def text(report):
    return (report / "report.md").read_text()


# -----------------------------------------------------------------------------
# reading reports and runs


def rows_of(text: str, heading: str) -> list[dict]:
    """The first Markdown table after a heading."""
    start = text.rindex("\n", 0, text.index(heading)) + 1
    table = []
    for line in text[start:].split("\n")[1:]:
        if line.startswith("#"):
            break
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip("|").split("|")])
    keys, _, *rows = table
    return [dict(zip(keys, row)) for row in rows]


def correct_of(folder):
    """Whether each image of a run was named rightly, (N,) bool, from its predictions."""
    with (folder / "predictions.csv").open() as file:
        return np.array([row["label"] == row["top1"] for row in csv.DictReader(file)])


def compared_runs(runs):
    loaded, _ = comparable.load(runs)
    compared, _ = comparable.resolve(loaded)
    return compared


# -----------------------------------------------------------------------------
# the report of a study


def test_the_answer(text):
    """45 points over the untrained tiny: about 40 by training it, 5 by the other architecture."""
    pattern = r"Of the \+([\d.]+) \[\+([\d.]+), \+([\d.]+)\] points"
    total, low, high = map(float, re.search(pattern, text).groups())
    assert low < 45 < high
    assert abs(total - 45) < 8

    rows = rows_of(text, "## Is it")
    share = {row["factor"]: int(re.match(r"-?\d+", row["gain"])[0]) for row in rows[:3]}
    assert sum(share.values()) == pytest.approx(100, abs=2)
    assert share["strategy"] > 70
    variance = {row["factor"]: int(row["variance"].split("%")[0]) for row in rows}
    assert sum(variance.values()) == pytest.approx(100, abs=3)
    assert variance["strategy"] > variance["architecture"]

    assert "stand in for" in text
    assert "12 epochs on the base classes" in text
    grid = "3 strategies (full, last_blocks, text), 2 architectures, 3 learning rates"
    assert grid in text


def test_the_final_table(study, text):
    """Computed again from the predictions."""
    table = rows_of(text, "### test, 240 images of 12 classes")
    models = {(row["architecture"], row["strategy"]): row for row in table}
    strategies = ("none", *STRATEGIES)
    assert set(models) == {(a, s) for a in ("tiny", "tiny-rn") for s in strategies}

    correct = np.array([correct_of(study / f"final-tiny-full-{seed}") for seed in SEEDS])
    mean, low, high = statistics.mean_interval(correct)
    row = models["tiny", "full"]
    assert row["top-1"] == f"{mean:.2f}" == f"{100 * correct.mean():.2f}"
    assert row["seeds"] == "2"
    assert row["trained"] == "1,500"
    assert row["95%"] == f"[{low:.1f}, {high:.1f}]"


def test_a_table_has_one_protocol(text):
    results = text[text.index("## Results") : text.index("## What fine-tuning")]
    assert results.count("\n### ") == 3
    # The stand-ins are in no table.
    assert "start-tiny" not in text[: text.index("## Runs that others")]
    base_rows = rows_of(text, "trained on base classes only")
    assert [row["strategy"] for row in base_rows] == ["full", "text"]


def test_factors_and_new_classes(text):
    base_to_new = rows_of(text[text.index("## From base") :], "###")
    assert [row["strategy"] for row in base_to_new] == ["full", "text"]
    factors = rows_of(text[text.index("## One factor") :], "### val")
    levels = [row["level"] for row in factors if row["factor"].startswith("temperature")]
    assert levels == ["0.003", "0.03", "0.3"]
    missing = text[text.index("## What is missing") :]
    for section in ("batch size", "training images a class", "augmentation"):
        assert f"the effect of the {section}" in missing


def test_gains_are_over_the_untrained_model_of_the_same_start(study, text):
    table = rows_of(text[text.index("## What fine-tuning gains") :], "### test")
    rows = {(row["architecture"], row["strategy"]): row for row in table}
    assert set(rows) == {(a, s) for a in ("tiny", "tiny-rn") for s in STRATEGIES}
    row = rows["tiny-rn", "text"]
    before = 100 * correct_of(study / "untrained-tiny-rn-test").mean()
    after = [100 * correct_of(study / f"final-tiny-rn-text-{seed}").mean() for seed in SEEDS]
    assert row["untrained"] == f"{before:.2f}"
    assert row["fine-tuned"] == f"{np.mean(after):.2f}"
    assert row["gain"].startswith(f"{np.mean(after) - before:+.1f} [")
    assert row["loss"] == "info_nce"  # older runs knew no other


def test_losses_are_compared_and_one_seed_has_an_interval_over_images(tmp_path, cli):
    runs = tmp_path / "runs"
    write_run(runs, "before", 0.3, epochs=0)
    for loss in ("info_nce", "sigmoid"):
        write_run(runs, loss, 0.6, loss=loss)
    code, _, err = cli("report.py", "--runs", runs, "--output", tmp_path / "report")
    assert code == 0, err
    text = (tmp_path / "report" / "report.md").read_text()
    rows = {row["loss"]: row for row in rows_of(text[text.index("## What fine-") :], "### val")}
    assert set(rows) == {"info_nce", "sigmoid"}
    change = correct_of(runs / "sigmoid").astype(float) - correct_of(runs / "before")
    result = scipy.stats.ttest_1samp(100 * change, 0).confidence_interval()
    gain, low, high = map(float, re.findall(r"[-+][\d.]+", rows["sigmoid"]["gain"]))
    assert gain == pytest.approx(100 * change.mean(), abs=0.06)
    # The images are paired. An interval that is not would be wider by more than a point.
    assert (low, high) == pytest.approx((result.low, result.high), abs=0.5)


def test_a_gain_is_over_the_same_prompt(tmp_path, cli):
    """A learned prompt and a linear head have none of their own: theirs is the usual one."""
    runs = tmp_path / "runs"
    other = {"prompt_template": ["b {}"]}
    write_run(runs, "a-other", 0.5, epochs=0, **other)  # the first by name
    write_run(runs, "b-usual", 0.3, epochs=0)
    write_run(runs, "full", 0.7)
    write_run(runs, "full-other", 0.9, strategy="text", **other)
    write_run(runs, "learned", 0.6, strategy="prompt", prompt_template=["[V] {} flower"])
    write_run(runs, "probe", 0.6, strategy="linear", epochs=0, prompt_template=["a photo {}"])
    # No untrained model has seen these sentences.
    sentences = {"prompts_digest": "abc", "prompt_template": None}
    write_run(runs, "sentences", 0.6, strategy="image", **sentences)
    # Nor were these trained from those weights.
    write_run(runs, "start", 0.6)
    write_run(runs, "later", 0.6, strategy="lora", architecture="x/start")

    code, _, err = cli("report.py", "--runs", runs, "--output", tmp_path / "report")
    assert code == 0, err
    text = (tmp_path / "report" / "report.md").read_text()
    rows = rows_of(text[text.index("## What fine-tuning gains") :], "### val")
    found = {row["strategy"]: row["untrained"] for row in rows}
    usual = f"{100 * correct_of(runs / 'b-usual').mean():.2f}"
    expected = dict.fromkeys(("full", "prompt", "linear"), usual)
    expected["text"] = f"{100 * correct_of(runs / 'a-other').mean():.2f}"
    assert found == expected


def test_what_was_forgotten(study, text):
    """Accuracy on flowers and elsewhere, computed again from the predictions."""
    rows = {
        (row["strategy"], row["weights"]): row for row in rows_of(text, "## What was forgotten")
    }
    assert set(rows) == {("none", "untrained")} | {
        (strategy, weights)
        for strategy in ("full", "text")
        for weights in ("fine-tuned", "alpha 0.5", "soup")
    }

    def accuracy(*names):
        return np.mean([100 * correct_of(study / name).mean() for name in names])

    trained = [f"factorial-tiny-full-0.005-{seed}" for seed in SEEDS]
    row = rows["full", "fine-tuned"]
    elsewhere = accuracy(*[f"birds-{name}" for name in trained])
    assert row["flowers"] == f"{accuracy(*trained):.2f}"
    assert row["elsewhere"] == f"{elsewhere:.2f}"
    lost = accuracy("birds-untrained") - elsewhere
    assert row["lost"].startswith(f"{lost:+.1f} [")
    assert lost > 20
    # metrics.jsonl: 30 + 40 / 2 on flowers, 80 - 100 * 0.4 / 2 elsewhere
    between = rows["full", "alpha 0.5"]
    assert (between["flowers"], between["elsewhere"]) == ("50.00", "60.00")
    assert rows["text", "soup"]["elsewhere"] == f"{accuracy('birds-soup-text'):.2f}"
    assert rows["text", "soup"]["flowers"] == f"{accuracy('val-soup-text'):.2f}"

    # No other section compares birds with flowers.
    assert "birds" not in text[: text.index("## What was forgotten")]
    assert "birds" not in text[text.index("## Are the probabilities") :]


def test_probabilities(study, text):
    section = text[text.index("## Are the probabilities") :]
    rows = {(row["architecture"], row["strategy"]): row for row in rows_of(section, "### test")}
    result = json.loads((study / "final-tiny-full-0" / "result.json").read_text())
    nll = result["test/nll"]
    expected = f"{nll:.3f} [{nll - 0.2:.3f}, {nll + 0.2:.3f}]"
    assert rows["tiny", "full"]["NLL"] == expected
    assert rows["tiny", "full"]["ECE"] == f"{result['test/ece']:.1f}"
    assert "T" not in rows["tiny", "full"]  # no run was calibrated
    levels = rows_of(section, "### The temperature of the loss")
    assert [row["temperature"] for row in levels] == ["0.003", "0.03", "0.3"]


def test_temperature_after_training(tmp_path, cli):
    """What a run has found on val stands beside its own numbers."""
    runs = tmp_path / "runs"
    write_run(runs, "trained", 0.6)
    path = runs / "trained" / "result.json"
    result = json.loads(path.read_text())
    calibration = {"calibration_temperature": 1.372, "val/nll_calibrated": 0.9876}
    path.write_text(json.dumps(result | calibration))
    code, _, err = cli("report.py", "--runs", runs, "--output", tmp_path / "report")
    assert code == 0, err
    text = (tmp_path / "report" / "report.md").read_text()
    (row,) = rows_of(text[text.index("## Are the prob") :], "### val")
    assert (row["T"], row["NLL calibrated"]) == ("1.37", "0.988")
    # On val the temperature has seen the images.
    assert "T was fitted to these very images" in text


def test_reliability_bins_hold_equal_numbers_of_images(study):
    """Against pandas' quantile bins, for the images of one run."""
    reliability_bins = runpy.run_path(str(ROOT / "report.py"))["reliability_bins"]
    (run,) = [run for run in compared_runs(study) if run.name == "final-tiny-full-0"]
    bins = reliability_bins(run)
    frame = pd.read_csv(run.folder / "predictions.csv")
    frame["right"] = 100.0 * (frame["label"] == frame["top1"])
    expected = frame.groupby(pd.qcut(frame["score1"], 15), observed=True)
    assert (expected.size() == 16).all()
    np.testing.assert_allclose(bins["accuracy"], expected["right"].mean())
    np.testing.assert_allclose(bins["probability"], 100 * expected["score1"].mean())


def test_the_tests_of_pairs(study, report):
    with (report / "results-test-pairs.csv").open() as file:
        pairs = {(row["a"], row["b"]): row for row in csv.DictReader(file)}
    assert len(pairs) == 8 * 7 / 2
    assert all(float(pair["p"]) <= float(pair["holm"]) for pair in pairs.values())

    pair = pairs["tiny full", "tiny-rn full"]
    a = correct_of(study / "final-tiny-full-0")
    b = correct_of(study / "final-tiny-rn-full-0")
    only_a = int((a & ~b).sum())
    only_b = int((b & ~a).sum())
    assert (int(pair["only a right"]), int(pair["only b right"])) == (only_a, only_b)
    tail = scipy.stats.binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)
    assert float(pair["p"]) == pytest.approx(min(1, 2 * tail), rel=1e-3)

    # Over both seeds, beside the test of one.
    ends = [
        np.array([correct_of(study / f"final-{name}-full-{seed}") for seed in SEEDS])
        for name in ("tiny", "tiny-rn")
    ]
    expected = statistics.difference_interval(*ends)
    found = [float(pair[key]) for key in ("a - b", "95% low", "95% high")]
    assert found == pytest.approx(expected, abs=0.006)


def test_what_a_report_links_to_is_there(report, text):
    linked = set(re.findall(r"\]\((.*\.png)\)", text))
    assert linked == {path.name for path in report.glob("*.png")}
    assert linked == {f"{path.stem}.png" for path in report.glob("*.pdf")}


def test_latex_tables_are_rectangular(report):
    for path in report.glob("*.tex"):
        lines = path.read_text().splitlines()
        columns = re.fullmatch(r"\\begin\{tabular\}\{@\{\}([lr]+)@\{\}\}", lines[2])[1]
        body = [line for line in lines if line.endswith(r"\\")]
        assert len(body) > 1
        for line in body:
            separators = re.findall(r"(?<!\\)&", line)
            assert len(separators) == len(columns) - 1
            assert "_" not in line.replace(r"\_", "")


def test_the_same_runs_give_the_same_bytes(study, report, tmp_path, cli):
    """Elsewhere, in another process, in a folder with an older report and the user's files."""
    runs = shutil.copytree(study, tmp_path / "copy")
    again = tmp_path / "again"
    again.mkdir()
    (again / "results-old.png").write_text("")  # of an older report: goes
    (again / "main.tex").write_text("")  # the user's own: stays
    code, _, _ = cli("report.py", "--runs", runs, "--output", again, "--bootstrap", 100)
    assert code == 0
    first = {path.name: path.read_bytes() for path in report.iterdir()}
    second = {path.name: path.read_bytes() for path in again.iterdir()}
    assert second.pop("main.tex") == b""
    assert first == second
    assert len(first) > 15


def test_any_subset_works_and_what_is_missing_is_said(study, tmp_path, cli):
    runs = tmp_path / "runs"
    output = tmp_path / "report"
    runs.mkdir()
    assert "no finished run" in error_line(cli("report.py", "--runs", runs, "--output", output))

    # One finished run, one that failed, one that failed first, and a damaged one.
    shutil.copytree(study / "final-tiny-full-0", runs / "one")
    (runs / "failed.jsonl").write_text(
        '{"name": "two", "error": "error: no memory"}\n{"name": "one", "error": "later mended"}\n'
    )
    # It is an old one, that has not recorded how good its probabilities are.
    result = json.loads((runs / "one" / "result.json").read_text())
    old = {k: v for k, v in result.items() if not re.search("/(nll|brier|ece)", k)}
    (runs / "one" / "result.json").write_text(json.dumps(old))
    (runs / "three").mkdir()
    (runs / "three" / "result.json").write_text("{")
    assert cli("report.py", "--runs", runs, "--output", output)[0] == 0
    text = (output / "report.md").read_text()
    missing = text[text.index("## What is missing") :]
    assert "Not answered" in text
    assert "two failed: error: no memory" in missing
    assert "three can't be read" in missing
    assert "later mended" not in missing
    assert "the change of each class" in missing
    assert "no untrained model" in missing
    assert "whether the probabilities are right" in missing
    assert re.search(
        r"what was forgotten: .* \(`python ablate.py forgetting .*--others DIR`\)", missing
    )
    assert rows_of(text, "### test")[0]["strategy"] == "full"

    # With an untrained model and its start, the classes can be compared.
    shutil.copytree(study / "untrained-tiny-test", runs / "four")
    shutil.copytree(study / "start-tiny", runs / "start-tiny")
    assert cli("report.py", "--runs", runs, "--output", output)[0] == 0
    text = (output / "report.md").read_text()
    assert "the change of each class" not in text
    assert (output / "classes.png").exists()


def test_many_models_that_tie_at_the_top(tmp_path, cli):
    runs = tmp_path / "runs"
    for architecture in ("tiny", "tiny-rn"):
        for i in range(8):
            name = f"{architecture}-{i}"
            strategy = f"strategy{i}"
            write_run(runs, name, 0.5, architecture=architecture, strategy=strategy)
            # All have the predictions and the accuracy of the first.
            predictions = (runs / "tiny-0" / "predictions.csv").read_text()
            top1 = json.loads((runs / "tiny-0" / "result.json").read_text())["val/top1"]
            (runs / name / "predictions.csv").write_text(predictions)
            result = json.loads((runs / name / "result.json").read_text())
            (runs / name / "result.json").write_text(json.dumps(result | {"val/top1": top1}))
    output = tmp_path / "report"
    code, _, err = cli("report.py", "--runs", runs, "--output", output, "--bootstrap", 20)
    assert code == 0, err
    assert (output / "worst.png").exists(), err


# -----------------------------------------------------------------------------
# which runs are compared


def test_a_dataset_that_was_not_trained_on_is_elsewhere(tmp_path):
    evaluation = {"job": "eval", "split": "test"}
    write_run(tmp_path, "trained", 0.5, dataset="flowers")
    # The same images in another place, others under the same name, and another dataset.
    write_run(tmp_path, "moved", 0.5, data_root="y", dataset="flowers", **evaluation)
    half = {"names": NAMES[:6], "data_root": "z"}
    write_run(tmp_path, "half", 0.5, dataset="flowers", **half, **evaluation)
    birds = {"names": BIRDS, "data_root": "birds"}
    write_run(tmp_path, "birds", 0.5, dataset="birds", **birds, **evaluation)
    loaded, _ = comparable.load(tmp_path)
    assert comparable.elsewhere(loaded) == {"half", "birds"}
    # Without training, nothing says which dataset is the main one.
    assert comparable.elsewhere([run for run in loaded if run.name != "trained"]) == set()


def test_only_the_same_images_and_training_classes_are_compared(tmp_path):
    write_run(tmp_path, "a", 0.5)
    write_run(tmp_path, "b", 0.6, first=7)
    write_run(tmp_path, "c", 0.6, names=[name.upper() for name in NAMES])
    write_run(tmp_path, "d", 0.6, split="test")
    write_run(tmp_path, "e", 0.6, classes="base")
    write_run(tmp_path, "f", 0.6, lr=5.0)
    write_run(tmp_path, "g", 0.6, splits="official")
    runs, starts = comparable.resolve(comparable.load(tmp_path)[0])
    protocol_of = {run.name: run.protocol for run in runs}
    same = {name for name, protocol in protocol_of.items() if protocol == protocol_of["a"]}
    assert same == {"a", "f"}
    assert len(set(protocol_of.values())) == 6
    assert not starts


def test_near_duplicates_are_one_draw(tmp_path):
    """Every image twice, with the same answers: the interval of the images once."""
    write_run(tmp_path, "a", 0.6, n=120)
    table = (tmp_path / "a" / "predictions.csv").read_text()
    head, *rows = table.splitlines()
    once = comparable.interval(compared_runs(tmp_path))
    copies = [row.replace("val_", "copy_") for row in rows]
    (tmp_path / "a" / "predictions.csv").write_text("\n".join([head, *rows, *copies]) + "\n")
    twice = comparable.interval(compared_runs(tmp_path))
    assert twice[2] - twice[1] < 0.8 * (once[2] - once[1])

    names = [row.split(",")[0] for row in rows]
    groups = [[name, name.replace("val_", "copy_")] for name in names]
    duplicates = tmp_path / "a" / "duplicates.json"
    duplicates.write_text(json.dumps({"groups": groups}))
    assert comparable.interval(compared_runs(tmp_path)) == pytest.approx(once)

    duplicates.write_text(json.dumps({"groups": [5]}))
    assert comparable.load(tmp_path) == (
        [],
        ["a can't be read: ValueError duplicates.json is damaged"],
    )


def test_few_shots_are_compared_at_the_same_number_of_steps(tmp_path):
    for shots, epochs in ((1, 300), (4, 50), (16, 12), (2, 12)):
        write_run(tmp_path, f"{shots}", 0.5, shots=shots, epochs=epochs)
    groups = comparable.grouped(comparable.load(tmp_path)[0], without="shots")
    compared = [sorted(run.settings["shots"] for run in group) for group in groups]
    assert sorted(compared) == [[1, 4, 16], [2]]


def test_near_duplicates_of_one_run_are_those_of_all(tmp_path):
    """The first has looked for none, and the others have found different ones."""
    for name in ("a", "b", "c"):
        write_run(tmp_path, name, 0.6, n=6, lr=len(name))
    files = [f"val_{i:05d}.jpg" for i in range(6)]
    for name, groups in (("b", [[1, 2], [3, 4]]), ("c", [[4, 5], [2, 1]])):
        contents = {"groups": [[files[i] for i in group] for group in groups]}
        (tmp_path / name / "duplicates.json").write_text(json.dumps(contents))
    for run in compared_runs(tmp_path):
        assert run.clusters.tolist() == [0, 1, 1, 2, 2, 2]


def test_a_seed_counts_once_and_an_evaluation_bears_its_run_s_name(tmp_path):
    evaluation = {"job": "eval", "strategy": None, "epochs": None}
    write_run(tmp_path, "a", 0.5)
    write_run(tmp_path, "again", 0.5, eval_every=1)
    write_run(tmp_path, "b", 0.5, seed=1)
    write_run(tmp_path, "zero", 0.1, epochs=0)
    model = str(tmp_path / "b" / "model.pt")
    write_run(tmp_path, "eval", 0.5, "test", architecture=model, **evaluation)
    write_run(tmp_path, "pretrained", 0.5, "test", architecture="ViT-B/32", **evaluation)

    runs = compared_runs(tmp_path)
    groups = comparable.grouped([run for run in runs if run.split == "val"])
    assert [[run.name for run in group] for group in groups] == [["a", "b"], ["zero"]]
    of_test = {(run.name, run.architecture, run.strategy) for run in runs if run.split == "test"}
    assert of_test == {("eval", "tiny", "full"), ("pretrained", "ViT-B/32", "none")}
    assert next(run for run in runs if run.name == "zero").strategy == "none"


def test_evaluations_of_runs_are_those_runs(tmp_path):
    """Three seeds evaluated on test are one configuration with three seeds."""
    for seed in (0, 1, 2):
        write_run(tmp_path, f"trained-{seed}", 0.5, seed=seed)
        model = f"runs/trained-{seed}/model.pt"
        name = f"evaluated-{seed}"
        write_run(tmp_path, name, 0.5, "test", job="eval", seed=0, architecture=model)
    stranger = {"job": "eval", "architecture": "elsewhere/other/model.pt"}
    write_run(tmp_path, "stranger", 0.5, "test", epochs=None, strategy=None, **stranger)

    runs, starts = comparable.resolve(comparable.load(tmp_path)[0])
    assert not starts
    assert sorted(len(group) for group in comparable.grouped(runs)) == [1, 3, 3]
    by_name = {run.name: run for run in runs}
    assert [by_name[f"evaluated-{seed}"].seed for seed in (0, 1, 2)] == [0, 1, 2]
    assert by_name["stranger"].architecture == "other"
    assert by_name["stranger"].strategy == "unknown"


def runs_of(grid):
    """The names of the runs of a grid."""
    cells = itertools.chain(*grid.runs.values())
    return sorted(run.name for by_seed in cells for run in by_seed.values())


def write_qwen(runs, name, accuracy, job="qwen_eval", adapter=None, **settings):
    """Write an evaluation of a Qwen, on val."""
    own = {"job": job, "architecture": "tiny", "model": "tiny", "adapter": adapter}
    own |= {"max_pixels": 262144, "answer": "brief", "batch_size": 8, "images": 0, "split": "val"}
    own |= {"question": None}
    if job == "qwen_eval":
        own |= {"protocol": "rank", "score": "auto", "list_names": False, "most_tokens": 80}
        own |= {"describe": False}
    nothing = dict.fromkeys(set(CONFIG) - set(own) - {"runs", "data_root", "splits", "class_names"})
    write_run(runs, name, accuracy, **(nothing | {"holdout": True} | own | settings))


def write_qwen_grid(runs, seeds=(0, 1)):
    """Write what ablate.py qwen leaves: training runs, which have no accuracy, and evaluations."""
    write_qwen(runs, "untrained", 0.2)
    write_qwen(runs, "untrained-small", 0.15, max_pixels=50176)
    probe = {"job": "qwen_probe", "features": "vision", "val_shots": 10000, "inverse_penalty": None}
    for seed in seeds:
        for rank, shots in ((8, 16), (2, 16), (8, 4)):
            training = {"job": "qwen_train", "model": "tiny", "max_pixels": 262144, "rank": rank}
            training |= {"alpha": 2.0 * rank, "shots": shots, "epochs": 48 // shots, "lr": 1e-4}
            training |= {"batch_size": 16, "answer": "brief", "seed": seed, "images": 0}
            training |= {"also_train": [], "augment": "none", "list_names": False}
            name = f"train-{rank}-{shots}-{seed}"
            (runs / name).mkdir()
            (runs / name / "args.json").write_text(json.dumps(training))
            (runs / name / "result.json").write_text(json.dumps({"train/loss": 1.0}))
            tuned = {"adapter": f"elsewhere/runs/{name}"}
            write_qwen(runs, f"{name}-rank", 0.4 + 0.01 * shots, **tuned)
            if (rank, shots) == (8, 16):
                write_qwen(runs, f"{name}-generate", 0.3, protocol="generate", **tuned)
                listed = {"protocol": "generate", "list_names": True}
                write_qwen(runs, f"{name}-listed", 0.35, **listed, **tuned)
                own = probe | {"features": "prompt", "shots": shots, "seed": seed}
                write_qwen(runs, f"{name}-probe", 0.6, **own, **tuned)
        for shots in (16, 4):
            write_qwen(runs, f"probe-{shots}-{seed}", 0.5, **probe, shots=shots, seed=seed)
    for path in runs.glob("*probe*/result.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chosen_on": "val"}))


def test_qwen_is_a_row_for_each_way_of_asking(study, tmp_path):
    """Its seeds are one group, its factors stand beside CLIP's, and it is no part of the answer."""
    write_qwen_grid(tmp_path)
    loaded, notes = comparable.load(tmp_path)
    assert not notes
    clip, _ = comparable.load(study)
    alone = comparable.factorial(comparable.resolve(clip)[0])
    both = comparable.factorial(comparable.resolve(clip + loaded)[0])
    assert runs_of(alone) == runs_of(both)

    resolved, _ = comparable.resolve(loaded)
    assert comparable.factorial(resolved) is None
    groups = {}
    for group in comparable.grouped(resolved):
        first = group[0].settings
        key = group[0].method, first["max_pixels"], first.get("rank"), first.get("shots")
        groups[key] = [run.seed for run in group]
    assert groups == {
        ("zero-shot (rank)", 262144, None, None): [0],
        ("zero-shot (rank)", 50176, None, None): [0],
        ("lora (rank)", 262144, 8, 16): [0, 1],
        ("lora (rank)", 262144, 2, 16): [0, 1],
        ("lora (rank)", 262144, 8, 4): [0, 1],
        ("lora (generate)", 262144, 8, 16): [0, 1],
        ("lora (generate, names listed)", 262144, 8, 16): [0, 1],
        ("lora + linear (probe of prompt)", 262144, 8, 16): [0, 1],
        ("linear (probe of vision)", 262144, None, 16): [0, 1],
        ("linear (probe of vision)", 262144, None, 4): [0, 1],
    }

    report = runpy.run_path(str(ROOT / "report.py"))
    levels = {}
    for factor in report["FACTORS"] | report["QWEN_FACTORS"]:
        for sweep in report["sweeps"](resolved, factor):
            rows = report["sweep_rows"](sweep, factor)
            levels.setdefault(factor, []).append([(row["level"], row["seeds"]) for row in rows])
    assert levels["rank"] == [[("2", 2), ("8", 2)]]
    assert levels["max_pixels"] == [[("50176", 1), ("262144", 1)]]
    # Of the tuned model, at as many images seen though the epochs differ, and of the probe.
    assert levels["shots"] == 2 * [[("4", 2), ("16", 2)]]
    (asked,) = levels["protocol"]
    assert sorted(asked) == [
        ("generate", 2),
        ("generate, names listed", 2),
        ("probe of prompt", 2),
        ("rank", 2),
    ]
    assert set(levels) == {"rank", "max_pixels", "shots", "protocol"}
    # What is asked of Qwen is not asked of CLIP, whose runs have a rank, too.
    assert not report["sweeps"](comparable.resolve(clip)[0], "rank")


def test_a_qwen_whose_training_is_not_here_is_one_of_its_own(tmp_path):
    write_qwen_grid(tmp_path, seeds=(0,))
    shutil.rmtree(tmp_path / "train-8-16-0")
    resolved, _ = comparable.resolve(comparable.load(tmp_path)[0])
    (run,) = [run for run in resolved if run.name == "train-8-16-0-rank"]
    assert run.method == "lora (rank)" and run.settings["adapter"] and not run.settings.get("rank")
    assert [run] in comparable.grouped(resolved)


def test_processes_are_part_of_a_batch(tmp_path):
    """Four processes of 16 images are a batch of 64."""
    for name, processes, batch_size in (("one", 1, 64), ("four", 4, 16), ("large", 4, 64)):
        batch = {"processes": processes, "batch_size": batch_size}
        write_run(tmp_path, name, 0.5, seed=5 + processes, **batch)
    groups = [{run.name for run in group} for group in comparable.grouped(compared_runs(tmp_path))]
    assert {"one", "four"} <= next(group for group in groups if "one" in group)
    assert not any({"one", "large"} <= group for group in groups)


def test_incomplete_grids_lose_the_level_that_lacks_cells(study, tmp_path):
    runs = shutil.copytree(study, tmp_path / "runs")
    grid = comparable.factorial(compared_runs(runs))
    assert grid.strategies == list(STRATEGIES)
    assert grid.architectures == ["tiny", "tiny-rn"]
    assert grid.rates == 3
    assert grid.seeds == [0, 1]
    assert grid.dropped == []
    names = [by_seed[1].name for by_seed in grid.runs["text", "tiny-rn", "prompts"]]
    assert names == [f"factorial-tiny-rn-text-{lr}-1" for lr in RATES]

    shutil.rmtree(runs / "factorial-tiny-text-0.001-0")
    grid = comparable.factorial(compared_runs(runs))
    assert grid.strategies == ["full", "last_blocks"]
    assert grid.dropped == ["text"]
    assert grid.seeds == [0, 1]

    for path in runs.glob("factorial-tiny-rn-*"):
        shutil.rmtree(path)
    assert comparable.factorial(compared_runs(runs)) is None


# -----------------------------------------------------------------------------
# pretraining


def write_exact_run(runs, name, percent, **settings):
    """Write a run that names so many percent of 200 images rightly: always the first ones."""
    n = 200
    write_run(runs, name, 0.5, n=n, **settings)
    label = np.arange(n) % len(NAMES)
    right = np.arange(n) < n * percent / 100
    predicted = np.where(right, label, (label + 1) % len(NAMES))
    with (runs / name / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label", "top1"])
        for i in range(n):
            writer.writerow([f"{i:03d}.jpg", NAMES[label[i]], NAMES[predicted[i]]])
    result = json.loads((runs / name / "result.json").read_text())
    (runs / name / "result.json").write_text(json.dumps(result | {"val/top1": percent}))


def write_four_factors(runs, grid, gain_of):
    """Write a factorial of two levels each, whose effects add up.

    From 20%: 10 points by tiny-rn, 20 by captions, `gain_of` each strategy, and for those that are
    trained 4 by the lower learning rate.
    """
    for architecture, by_architecture in (("tiny", 0), ("tiny-rn", 10)):
        for pretraining, by_pretraining in (("prompts", 0), ("captions", 20)):
            start = f"start-{architecture}-{pretraining}"
            captions = "c.jsonl" if pretraining == "captions" else None
            model = {"architecture": architecture, "captions": captions, "classes": "base"}
            if not (runs / start).exists():
                write_run(runs, start, 0.3, **model)
            percent = 20 + by_architecture + by_pretraining
            common = {"architecture": f"runs/{start}"}
            name = f"{grid}-{architecture}-{pretraining}"
            write_exact_run(runs, f"{name}-untrained", percent, epochs=0, **common)
            for strategy, by_strategy in gain_of.items():
                for lr, by_rate in ((1e-4, 4), (1e-3, 0)):
                    trained = common | {"strategy": strategy, "lr": lr}
                    total = percent + by_strategy + by_rate
                    write_exact_run(runs, f"{name}-{strategy}-{lr}", total, **trained)


def test_four_factors_whose_shares_are_known(tmp_path):
    """Of 64 points 10 are the architecture's and 20 the pretraining's. Training gives 30; the 4 of
    the learning rate need both it and training, so each has half of them.
    """
    runs = tmp_path / "runs"
    write_four_factors(runs, "factorial", {"full": 30, "text": 10})
    write_four_factors(runs, "sharedrate", {"full": 10, "text": 16})
    compared, starts = comparable.resolve(comparable.load(runs)[0])
    grid = comparable.factorial(compared)
    assert grid.pretrainings == ["prompts", "captions"]
    assert len(grid.runs) == 8
    names = {run.name for key in grid.runs for seeds in grid.cell(*key) for run in seeds}
    assert len(names) == 16 and all(name.startswith("factorial-") for name in names)

    report = runpy.run_path(str(ROOT / "report.py"))
    division = report["divide"](compared, grid, 0)
    share = {name: value for name, (value, _, _) in division.shares["share"].items()}
    points = {"strategy": 32, "architecture": 10, "pretraining": 20, "learning rate": 2}
    assert share == pytest.approx({name: value / 64 for name, value in points.items()})
    # half the difference of two levels, squared
    squares = {"strategy": 10, "architecture": 5, "pretraining": 10, "learning rate": 2}
    squares = {name: value**2 for name, value in squares.items()} | {"interaction": 0, "seeds": 0}
    variance = {name: value for name, (value, _, _) in division.shares["variance"].items()}
    expected = {name: value / 229 for name, value in squares.items()}
    assert variance == pytest.approx(expected, abs=1e-9)

    text = report["answer"](compared, starts, tmp_path, 20, [])
    assert text.startswith("## Is it the fine-tuning, the architecture, the pretraining, or")
    sentence = re.search(r"Of the \+64.0 .* untrained tiny \(prompts\), (.*)", text)[1]
    assert re.findall(r"(\d+)% ", sentence) == ["50", "16", "31", "3"]
    assert "2 pretrainings (prompts, captions)" in text
    assert [row["factor"] for row in rows_of("\n" + text, "## Is it")][:4] == list(points)
    # The grid of shared rates: of 50 points 18 by training.
    assert "Multiples: +64.0" in text and "Shared rates: +50.0" in text
    assert "the best strategy is text (70.0%)" in text
    rates = rows_of(text[text.index("Multiples:") :].replace("Multiples", "\nM", 1), "M")
    assert rates[0]["gain, shared"].startswith("36%")


def test_the_reference_of_the_answer_does_not_depend_on_names(tmp_path):
    """The grid's own prompts and sizes count: evaluations with others come after them by name."""
    write_four_factors(tmp_path, "factorial", {"full": 30, "text": 10})
    divide = runpy.run_path(str(ROOT / "report.py"))["divide"]

    def division():
        compared = compared_runs(tmp_path)
        divided = divide(compared, comparable.factorial(compared), 0)
        return divided and (divided.grid.architectures, divided.shares)

    expected = division()
    assert expected[0] == ["tiny", "tiny-rn"]
    for pretraining in ("prompts", "captions"):
        model = {"architecture": f"x/start-tiny-rn-{pretraining}", "job": "eval", "epochs": None}
        name = f"z-{pretraining}"
        write_exact_run(tmp_path, name, 0, prompt_template=["z {}"], strategy=None, **model)
        # As baseline_eval.py, which records no size; and the first by name.
        evaluated = tmp_path / f"factorial-tiny-rn-{pretraining}-untrained" / "result.json"
        result = json.loads(evaluated.read_text())
        del result["parameters"]
        evaluated.write_text(json.dumps(result))
    assert division() == expected

    # Without the grid's own prompt there is no reference, and without sizes no smallest model.
    shutil.rmtree(tmp_path / "factorial-tiny-rn-captions-untrained")
    assert division() is None
    write_exact_run(tmp_path, "again", 50, architecture="x/start-tiny-rn-captions", epochs=0)
    assert division() == expected
    for path in tmp_path.glob("factorial-tiny-rn-prompts-full-*/result.json"):
        result = json.loads(path.read_text())
        del result["parameters"]
        path.write_text(json.dumps(result))
    assert division() is None


def test_one_pretraining_is_no_factor(study, tmp_path):
    compared = compared_runs(study)
    grid = comparable.factorial(compared)
    assert grid.pretrainings == ["prompts"]
    division = runpy.run_path(str(ROOT / "report.py"))["divide"](compared, grid, 0)
    assert division.factors == ["strategy", "architecture", "learning rate"]

    # Each architecture with a pretraining of its own is one level, too.
    for strategy in ("full", "text"):
        for lr in (1e-5, 1e-4):
            for name in ("ViT-B/32", "open_clip:ViT-B-16/laion2b_s34b_b88k"):
                run = f"{name.replace('/', '-')}-{strategy}-{lr}"
                write_run(tmp_path, run, 0.5, architecture=name, strategy=strategy, lr=lr)
    grid = comparable.factorial(compared_runs(tmp_path))
    assert grid.architectures == ["ViT-B/16", "ViT-B/32"]
    assert grid.pretrainings == [""]
    assert grid.any_run("ViT-B/16").pretraining == "laion2b"


def test_pretraining_is_read_from_the_first_run_of_a_chain(tmp_path):
    write_run(tmp_path, "a", 0.5, architecture="open_clip:ViT-B-32-quickgelu/metaclip_fullcc")
    write_run(tmp_path, "b", 0.5, architecture="runs/a", lr=1e-4)
    write_run(tmp_path, "c", 0.5, architecture="ViT-B/32")
    write_run(tmp_path, "d", 0.5, architecture="hf:openai/clip-vit-base-patch32")
    write_run(tmp_path, "e", 0.5, architecture="open_clip:RN50/weights.pt")
    write_run(tmp_path, "f", 0.5, architecture="open_clip:ViT-H-14/laion2b_s32b_b79k")
    write_run(tmp_path, "g", 0.5)
    runs, starts = comparable.resolve(comparable.load(tmp_path)[0])
    found = {run.name: (run.architecture, run.pretraining) for run in [*runs, *starts]}
    assert found == {
        "a": ("ViT-B/32", "metaclip"),
        "b": ("ViT-B/32", "metaclip"),
        "c": ("ViT-B/32", "openai"),
        "d": ("hf:openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
        "e": ("open_clip:RN50/weights.pt", ""),
        "f": ("open_clip:ViT-H-14", "laion2b"),
        "g": ("tiny", "random"),
    }
    groups = comparable.best_by_strategy(runs)
    models = [group[0].model for group in groups]
    assert "ViT-B/32 (openai)" in models and "ViT-B/32 (metaclip)" in models
    assert "tiny" in models


def test_two_tags_of_a_family_are_two_pretrainings(tmp_path):
    tags = {
        "ViT-B-32": ("datacomp_m_s128m_b4k", "datacomp_xl_s13b_b90k", "laion2b_s34b_b79k"),
        "ViT-B-16": ("datacomp_xl_s13b_b90k", "laion2b_s34b_b88k"),
    }
    for model, of_model in tags.items():
        for tag in of_model:
            write_run(tmp_path, f"{model}-{tag}", 0.5, architecture=f"open_clip:{model}/{tag}")
    found = {run.name: run.pretraining for run in compared_runs(tmp_path)}
    assert found == {
        "ViT-B-32-datacomp_m_s128m_b4k": "datacomp_m_s128m_b4k",
        "ViT-B-32-datacomp_xl_s13b_b90k": "datacomp_xl_s13b_b90k",
        "ViT-B-16-datacomp_xl_s13b_b90k": "datacomp_xl_s13b_b90k",
        "ViT-B-32-laion2b_s34b_b79k": "laion2b",
        "ViT-B-16-laion2b_s34b_b88k": "laion2b",
    }


# -----------------------------------------------------------------------------
# settings that older runs lack, calibration, soups


def test_older_runs_have_today_s_defaults(tmp_path):
    today = {"loss": "info_nce", "lr_decay": 1.0, "ema": 0.0, "pull": None, "logit_bias": None}
    today |= {"start_from": "random", "cross_modal": False, "val_shots": None}
    write_run(tmp_path, "old", 0.5)
    write_run(tmp_path, "new", 0.5, seed=1, **today)
    write_run(tmp_path, "few", 0.5, seed=2, **today | {"val_shots": 4})
    # not the same
    other = {
        "lr_decay": 0.7,
        "ema": 0.99,
        "pull": 0.1,
        "loss": "sigmoid",
        "start_from": "zero_shot",
    }
    for key, value in other.items():
        write_run(tmp_path, key, 0.5, seed=3, **today | {key: value})
    runs = compared_runs(tmp_path)
    groups = [{run.name for run in group} for group in comparable.grouped(runs)]
    assert {"old", "new", "few"} in groups
    assert sorted(map(len, groups)) == [1, 1, 1, 1, 1, 3]

    # The loss can be compared: cross_entropy has no positives.
    write_run(tmp_path, "ce", 0.5, seed=4, **today | {"loss": "cross_entropy", "positives": None})
    groups = comparable.grouped(compared_runs(tmp_path), without="loss")
    names = [{run.name for run in group} for group in groups]
    assert {"old", "new", "few", "loss", "ce"} in names


def test_an_older_linear_probe_is_one_of_today_s(tmp_path):
    """It has no steps, and older runs have recorded what was said of them."""
    steps = {"lr": 0.0, "tau_lr": 0.0, "batch_size": 64, "wd": 0.1, "learn_temperature": False}
    linear = {"strategy": "linear", "epochs": 0, "augment": "none"}
    write_run(tmp_path, "old", 0.5, **linear, **steps, positives="class", loss="info_nce")
    none = dict.fromkeys((*steps, "positives", "loss"))
    write_run(tmp_path, "new", 0.5, seed=1, **linear, **none)
    (group,) = comparable.grouped(compared_runs(tmp_path))
    assert [run.name for run in group] == ["old", "new"]


def test_a_sweep_over_the_loss_differs_in_nothing_else(tmp_path):
    """By default the sigmoid's bias is learned at lr, and the others have nothing to learn so."""
    write_run(tmp_path, "ce", 0.5, loss="cross_entropy", positives=None)
    write_run(tmp_path, "nce", 0.5, loss="info_nce", tau_lr=0.3)
    write_run(tmp_path, "sigmoid", 0.5, loss="sigmoid")
    write_run(tmp_path, "sigmoid-fast", 0.5, loss="sigmoid", tau_lr=0.3)
    write_run(tmp_path, "sigmoid-low", 0.5, loss="sigmoid", logit_bias=-10.0)
    for name, tau_lr in (("learned", 1e-3), ("learned-fast", 0.3)):
        write_run(tmp_path, name, 0.5, learn_temperature=True, tau_lr=tau_lr)
    groups = comparable.grouped(compared_runs(tmp_path), without="loss")
    names = sorted(sorted(run.name for run in group) for group in groups)
    alone = ["learned", "learned-fast", "sigmoid-fast", "sigmoid-low"]
    assert names == [["ce", "nce", "sigmoid"], *([name] for name in alone)]


def test_probes_are_told_apart(tmp_path):
    probe = {"strategy": "linear", "epochs": 0}
    write_run(tmp_path, "plain", 0.5, **probe)
    write_run(tmp_path, "pulled", 0.6, start_from="zero_shot", **probe)
    write_run(tmp_path, "both", 0.7, start_from="zero_shot", cross_modal=True, **probe)
    groups = comparable.best_by_strategy(compared_runs(tmp_path))
    methods = [group[0].method for group in groups]
    assert methods == ["linear", "linear (zero_shot)", "linear (zero_shot, cross_modal)"]
    assert {group[0].strategy for group in groups} == {"linear"}


def test_a_default_pull_is_one_setting(tmp_path):
    """projection is pulled by 1 / images a class: numbers of shots differ in nothing else."""
    common = {"strategy": "projection", "val_shots": None}
    for shots in (1, 4):
        default = {"pull": 1 / shots, "pull_by_default": True}
        write_run(tmp_path, f"default-{shots}", 0.5, shots=shots, **default, **common)
        given = {"pull": 1 / shots, "pull_by_default": False}
        write_run(tmp_path, f"given-{shots}", 0.5, shots=shots, **given, **common)
    groups = comparable.grouped(compared_runs(tmp_path), without="shots")
    names = sorted(sorted(run.name for run in group) for group in groups)
    assert names == [["default-1", "default-4"], ["given-1"], ["given-4"]]


def test_probes_that_chose_on_other_images_are_no_seeds_of_each_other(tmp_path):
    """Evaluated on test, where nothing else tells that they saw other images of val."""
    # C chosen on val, or the default one
    for name, chosen_on in (("probe", "val"), ("default", "default"), ("full", None)):
        strategy = "full" if name == "full" else "linear"
        for val_shots in (4, 2, None):
            run = f"{name}-{val_shots}"
            setting = {"strategy": strategy, "val_shots": val_shots, "shots": 8}
            write_run(tmp_path, run, 0.5, seed=val_shots or 0, **setting)
            path = tmp_path / run / "result.json"
            result = json.loads(path.read_text())
            path.write_text(json.dumps(result | {"chosen_on": chosen_on}))
            evaluation = {"job": "eval", "strategy": None, "architecture": f"x/{run}"}
            write_run(tmp_path, f"test-{run}", 0.5, "test", **evaluation)
    of_test = [run for run in compared_runs(tmp_path) if run.split == "test"]
    groups = comparable.grouped(of_test)
    names = {run.name for group in groups if len(group) == 1 for run in group}
    assert names == {"test-probe-None", "test-probe-2", "test-probe-4"}
    assert sorted(map(len, groups)) == [1, 1, 1, 3, 3]


def test_a_calibrated_evaluation_is_not_averaged_with_the_plain_one(tmp_path):
    evaluation = {"job": "eval", "strategy": None, "epochs": None}
    for seed, accuracy in ((0, 0.3), (1, 0.6)):
        write_run(tmp_path, f"trained-{seed}", 0.5, seed=seed)
        model = {"architecture": f"runs/trained-{seed}"} | evaluation
        write_run(tmp_path, f"plain-{seed}", accuracy, "test", **model)
        if seed == 1:
            write_run(tmp_path, "calibrated", accuracy, "test", calibrated=True, **model)
            write_run(tmp_path, "on-val", 0.5, calibrated=True, **model)
    runs = compared_runs(tmp_path)
    assert "on-val" in {run.name for run in runs}  # other probabilities than the run's own
    of_test = [run for run in runs if run.split == "test"]
    groups = [[run.name for run in group] for group in comparable.grouped(of_test)]
    assert sorted(groups) == [["calibrated"], ["plain-0", "plain-1"]]
    (best,) = comparable.best_by_strategy(of_test)
    assert [run.name for run in best] == ["plain-0", "plain-1"]


def test_a_soup_is_no_seed_of_its_runs(tmp_path):
    start = {"architecture": "ViT-B/32"}
    for seed in SEEDS:
        write_run(tmp_path, f"base-{seed}", 0.5, seed=seed, classes="base", **start)
    soup = {"job": "eval", "strategy": None, "epochs": None, "classes": None} | start
    write_run(tmp_path, "soup", 0.6, soup=["runs/base-0", "runs/base-1/model.pt"], **soup)
    write_run(tmp_path, "other", 0.6, soup=["runs/gone-0", "runs/gone-1"], **soup)
    runs = {run.name: run for run in compared_runs(tmp_path)}
    found = {name: (run.model, run.strategy, run.trained_on) for name, run in runs.items()}
    assert found["soup"] == ("ViT-B/32", "full soup", "base")
    assert found["other"][:2] == ("ViT-B/32", "unknown soup")
    assert found["base-0"] == ("ViT-B/32", "full", "base")
    assert [len(group) for group in comparable.grouped(list(runs.values()))].count(2) == 1


def test_an_evaluation_of_a_soup_s_folder_is_one_of_the_soup(tmp_path):
    """It has no strategy of its own, and would pass for an untrained model."""
    for seed in SEEDS:
        write_run(tmp_path, f"base-{seed}", 0.5, seed=seed, classes="base")
    evaluation = {"job": "eval", "strategy": None, "epochs": None, "classes": None, "lr": None}
    soup = ["runs/base-0", "runs/base-1"]
    write_run(tmp_path, "soup", 0.6, soup=soup, **evaluation)
    for model in ("runs/soup", "runs/soup/model.pt"):
        name = f"of-{Path(model).name}"
        write_run(tmp_path, name, 0.6, "test", architecture=model, **evaluation)
    write_run(tmp_path, "again", 0.6, architecture="runs/soup", **evaluation)
    runs = {run.name: run for run in compared_runs(tmp_path)}
    assert "again" not in runs  # the soup's own evaluation once more
    for name in ("of-soup", "of-model.pt"):
        run = runs[name]
        found = run.architecture, run.strategy, run.trained_on, run.settings["lr"]
        assert found == ("tiny", "full soup", "base", 1e-3)
    # Its runs, or the folder itself, are no longer here.
    shutil.rmtree(tmp_path / "base-1")
    assert {run.strategy for run in compared_runs(tmp_path) if run.split == "test"} == {
        "unknown soup"
    }
    assert strategy_of(read_json(tmp_path / "soup" / "args.json")) == "unknown soup"


def test_an_evaluation_of_a_run_that_is_not_here_is_of_no_known_strategy(tmp_path):
    evaluation = {"job": "eval", "strategy": None, "epochs": None}
    write_run(tmp_path, "old", 0.5, "test", architecture="elsewhere/old", overlap=0, **evaluation)
    write_run(tmp_path, "file", 0.5, "test", architecture="weights/vit.pt", **evaluation)
    strategies = {run.name: run.strategy for run in compared_runs(tmp_path)}
    assert strategies == {"old": "unknown", "file": "none"}


def test_a_soup_of_different_runs_is_mixed(tmp_path):
    loss_of = runpy.run_path(str(ROOT / "report.py"))["loss_of"]
    write_run(tmp_path, "a", 0.5)
    write_run(tmp_path, "a2", 0.5, seed=1)
    write_run(tmp_path, "b", 0.5, strategy="text", lr=0.1)
    write_run(tmp_path, "c", 0.5, loss="sigmoid")
    soup = {"job": "eval", "strategy": None, "epochs": None, "lr": None}
    for name in ("a a2", "a b", "a c", "a gone", "gone a"):
        write_run(tmp_path, name, 0.6, soup=[f"x/{run}" for run in name.split()], **soup)
    runs = [run for run in compared_runs(tmp_path) if run.settings.get("soup")]
    found = {run.name: (run.strategy, loss_of(run), run.settings["lr"]) for run in runs}
    assert found.pop("a a2") == ("full soup", "info_nce", 1e-3)
    assert found.pop("a b") == ("mixed soup", "info_nce", "mixed")
    assert found.pop("a c") == ("full soup", "mixed", 1e-3)
    assert {key: value[:2] for key, value in found.items()} == {
        "a gone": ("unknown soup", "unknown"),
        "gone a": ("unknown soup", "unknown"),
    }


# -----------------------------------------------------------------------------
# figures, looked at through matplotlib


def drawn(monkeypatch, draw, *args):
    """The figure that a function of `figures` would have saved."""
    kept = []
    monkeypatch.setattr(figures, "save", lambda figure, path, pdf: kept.append(figure))
    draw(*args, None)
    (figure,) = kept
    return figure


def test_methods_of_one_strategy_have_its_colour_and_a_look_of_their_own(monkeypatch):
    methods = ["full", "full soup", "linear", "linear (zero_shot)", "linear (cross_modal)"]
    row = {"architecture": "tiny", "parameters": 10, "gain": 5, "low": 4, "high": 6}
    table = pd.DataFrame([row | {"strategy": method} for method in methods])
    figure = drawn(monkeypatch, figures.trained_parameters, table)
    points = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    colours = [line.get_color() for line in points]
    assert colours == 2 * [figures.STRATEGY_COLOURS["full"]] + 3 * [
        figures.STRATEGY_COLOURS["linear"]
    ]
    looks = {(line.get_color(), line.get_fillstyle()) for line in points}
    assert len(looks) == len(methods)
    keys = figure.legends[0].legend_handles
    assert {(key.get_color(), key.get_fillstyle()) for key in keys[:5]} == looks

    bins = pd.DataFrame({"probability": [10, 90], "accuracy": [10, 90]})
    lines = {"tiny": dict.fromkeys(methods, bins)}
    figure = drawn(monkeypatch, figures.reliability, lines)
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines[1:]}
    assert len(looks) == len(methods)


def test_pretrainings_and_methods_have_lines_and_rows_of_their_own(tmp_path, monkeypatch):
    """Of two pretrainings the worse one does not stand in the place of the better one."""
    names = {"ViT-B/32": 0.6, "open_clip:ViT-B-32-quickgelu/metaclip_fullcc": 0.4}
    for i, (architecture, accuracy) in enumerate(names.items()):
        model = {"architecture": architecture, "trainable_image": 10}
        write_run(tmp_path, f"none-{i}", accuracy / 2, epochs=0, **model)
        for start_from in ("random", "zero_shot"):
            probe = model | {"strategy": "linear", "start_from": start_from}
            write_run(tmp_path, f"{start_from}-{i}", accuracy, **probe)
    groups = comparable.best_by_strategy(compared_runs(tmp_path))
    report = runpy.run_path(str(ROOT / "report.py"))
    models = {"ViT-B/32 (openai)", "ViT-B/32 (metaclip)"}
    methods = {"none", "linear", "linear (zero_shot)"}

    shown = {}
    monkeypatch.setattr(figures, "reliability", lambda panels, path: shown.update(panels) or path)
    report["reliability_figure"](groups, tmp_path / "x.png")
    assert shown.keys() == models
    assert all(lines.keys() == methods for lines in shown.values())

    rows = [report["probability_row"](group) for group in groups]
    assert {(row["architecture"], row["strategy"]) for row in rows} == {
        (model, method) for model in models for method in methods
    }
    tables = []
    monkeypatch.setattr(
        figures, "trained_parameters", lambda table, path: tables.append(table) or path
    )
    report["trained_figure"](groups, compared_runs(tmp_path), tmp_path / "x.png")
    assert set(tables[0]["architecture"]) == models
    assert set(tables[0]["strategy"]) == methods - {"none"}


def test_reliability_bins_are_those_of_the_ece(tmp_path):
    """Two probabilities alone are two bins, whatever the order of the files."""
    write_run(tmp_path, "a", 0.5, n=200)
    path = tmp_path / "a" / "predictions.csv"
    frame = pd.read_csv(path)
    frame["score1"] = np.where(np.arange(200) % 3 == 0, 0.25, 0.75)
    frame.to_csv(path, index=False)
    (run,) = compared_runs(tmp_path)
    bins = runpy.run_path(str(ROOT / "report.py"))["reliability_bins"](run)
    assert bins["probability"].tolist() == [25, 75]
    right = frame["label"] == frame["top1"]
    accuracy = 100 * right.groupby(frame["score1"]).mean()
    np.testing.assert_allclose(bins["accuracy"], accuracy)


def test_learning_curves_of_two_losses_have_two_panels(tmp_path, monkeypatch):
    write_run(tmp_path, "full", 0.5)
    write_run(tmp_path, "text", 0.5, strategy="text", loss="sigmoid")
    groups = comparable.best_by_strategy(compared_runs(tmp_path))
    report = runpy.run_path(str(ROOT / "report.py"))
    curves = [report["learning_curve"](run, np.ones((1, 40))) for (run,) in groups]
    figure = drawn(monkeypatch, figures.learning_curves, pd.concat(curves))
    titles = [axis.get_title() for axis in figure.axes if axis.lines]
    assert titles == ["tiny, info_nce", "tiny, sigmoid"]
    assert all("InfoNCE" not in axis.get_ylabel() for axis in figure.axes)
    assert not figure.axes[0].get_shared_y_axes().joined(*figure.axes[:2])


def test_a_curve_on_flowers_is_of_the_images_and_prompts_of_its_model(tmp_path):
    """Curves on test and with another prompt, last by name, stand beside a point on val."""
    report = runpy.run_path(str(ROOT / "report.py"))
    write_run(tmp_path, "before", 0.3, epochs=0)
    write_run(tmp_path, "trained", 0.6)
    model = {"job": "eval", "architecture": "x/trained", "wise_ft": [1, 0.5, 0]}
    other_prompt = model | {"prompt_template": ["{}"]}
    birds = model | {"n": 90, "names": BIRDS, "data_root": "birds"}
    evaluations = [("a", "val", model, 70), ("b", "test", model, 10), ("c", "val", other_prompt, 5)]
    evaluations.append(("birds", "test", birds, 40))
    for name, split, settings, top1 in evaluations:
        write_run(tmp_path, name, 0.5, split, **settings)
        write_curve(tmp_path / name, split, [top1 + 2, top1, top1 - 2])
    runs = {run.name: run for run in compared_runs(tmp_path)}
    curves = [runs["a"], runs["b"], runs["c"]]
    ends = [runs["before"], [runs["birds"]], [runs["trained"]]]
    rows = report["points_between"](*ends, curves)
    assert [row["top1"] for row in rows] == [68, 70, 72]
    assert not report["points_between"](*ends, curves[1:])


def test_shots_have_rows_of_their_own_and_a_choice_is_said(tmp_path):
    report = runpy.run_path(str(ROOT / "report.py"))
    write_run(tmp_path, "before", 0.3, epochs=0)
    for shots in (1, 16):
        write_run(tmp_path, f"shots-{shots}", 0.3 + shots / 50, shots=shots)
    text = report["gains"]([compared_runs(tmp_path)], tmp_path, [])
    assert [row["shots"] for row in rows_of("\n" + text, "### val")] == ["1", "16"]
    assert "flattering" not in text

    for lr in (1e-4, 1e-2):
        write_run(tmp_path, f"lr-{lr}", 0.5, lr=lr)
    runs = compared_runs(tmp_path)
    text = report["gains"]([runs], tmp_path, [])
    assert [row["shots"] for row in rows_of("\n" + text, "### val")] == ["", "1", "16"]
    assert "The best 3 of 4 configurations" in text
    assert "flattering" in report["closer_look"](runs, tmp_path, [])

    for lr in (1e-4, 1e-2):
        write_run(tmp_path, f"base-{lr}", 0.5, lr=lr, classes="base")
    of_base = [run for run in compared_runs(tmp_path) if run.trained_on == "base"]
    assert "The best 1 of 2 configurations" in report["base_to_new"]([of_base], tmp_path, [])


def test_between_two_weights_seeds_are_one_panel_and_rates_several(tmp_path, monkeypatch):
    report = runpy.run_path(str(ROOT / "report.py"))
    model = {"job": "eval", "wise_ft": [1, 0.5, 0]}
    for lr, seed, top1 in ((1e-3, 0, 50), (1e-3, 1, 60), (1e-2, 0, 20)):
        name = f"{lr}-{seed}"
        write_run(tmp_path, name, 0.5, lr=lr, seed=seed)
        write_run(tmp_path, f"curve-{name}", 0.5, architecture=f"x/{name}", **model)
        write_curve(tmp_path / f"curve-{name}", "val", [top1 + 2, top1, top1 - 2])
    curves = [run for run in compared_runs(tmp_path) if run.settings.get("wise_ft")]
    draw = figures.wise_ft
    shown = []
    monkeypatch.setattr(figures, "wise_ft", lambda panels, path: shown.append(panels) or path)
    report["wise_ft"](curves, [], tmp_path, [])
    figure = drawn(monkeypatch, draw, *shown)
    lines = {axis.get_title(): list(axis.lines[0].get_ydata()) for axis in figure.axes[:2]}
    one, two = "tiny full, lr 0.001 (val)", "tiny full, lr 0.01 (val)"
    assert lines == {one: [53, 55, 57], two: [18, 20, 22]}
    bands = [axis.collections[0].get_datalim(axis.transData).intervaly for axis in figure.axes]
    assert [tuple(band) for band in bands] == [(48, 62), (13, 27)]
