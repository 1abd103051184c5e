"""report.py on made-up run folders: what it finds, what it refuses to compare, and that the same
runs give the same bytes."""

import csv
import json
import math
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
from conftest import ROOT, error_line

from flowers.study import comparable

NAMES = [f"kind {c:02d}" for c in range(12)]
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
        writer.writerow(["file", "label", "top1"])
        for i in range(n):
            writer.writerow([f"{split}_{i + first:05d}.jpg", names[label[i]], names[predicted[i]]])

    top1 = 100 * right.mean()
    metrics = {
        "n": n,
        "top1": top1,
        "top5": min(100, top1 + 10),
        "mean_per_class": top1,
        "base_top1": top1,
        "new_top1": top1 / 2,
        "harmonic_mean": top1 / 1.5,
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
    return runs


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

    accuracy = [100 * correct_of(study / f"final-tiny-full-{seed}").mean() for seed in SEEDS]
    mean = np.mean(accuracy)
    half_width = 12.706 * np.std(accuracy, ddof=1) / math.sqrt(2)  # t(0.975, 1 degree of freedom)
    low = max(0, mean - half_width)
    high = min(100, mean + half_width)
    row = models["tiny", "full"]
    assert row["top-1"] == f"{mean:.2f}"
    assert row["seeds"] == "2"
    assert row["trained"] == "1,500"
    assert row["seeds 95%"] == f"[{low:.1f}, {high:.1f}]"


def test_a_table_has_one_protocol(text):
    results = text[text.index("## Results") : text.index("## One factor")]
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


def test_probes_are_told_apart(tmp_path):
    probe = {"strategy": "linear", "epochs": 0}
    write_run(tmp_path, "plain", 0.5, **probe)
    write_run(tmp_path, "pulled", 0.6, start_from="zero_shot", **probe)
    write_run(tmp_path, "both", 0.7, start_from="zero_shot", cross_modal=True, **probe)
    groups = comparable.best_by_strategy(compared_runs(tmp_path))
    methods = [group[0].method for group in groups]
    assert methods == ["linear", "linear (zero_shot)", "linear (zero_shot, cross_modal)"]
    assert {group[0].strategy for group in groups} == {"linear"}


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
