"""report.py on synthetic run folders: what it finds, what it refuses to compare, that it repeats itself."""

import csv
import json
import math
import re
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
STRATEGIES = {"full": 0.4, "last_blocks": 0.3, "text": 0.15}  # and what each gains
RATES = {1e-4: 0.5, 1e-3: 0.8, 5e-3: 1.0}  # and the share of it


def write_run(runs, name, accuracy, split="val", n=240, names=NAMES, first=0, **settings):
    """A run folder whose answers are right with probability `accuracy`, more often for the first classes than for the last."""
    config, folder, rng = CONFIG | settings, runs / name, np.random.default_rng(list(name.encode()))
    folder.mkdir(parents=True)
    label = np.arange(n) % len(names)
    right = rng.random(n) < accuracy + 0.2 * (0.5 - label / len(names))
    given = np.where(right, label, (label + rng.integers(1, 3, n)) % len(names))
    with (folder / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label", "top1"])
        writer.writerows(
            [f"{split}_{i + first:05d}.jpg", names[t], names[g]]
            for i, (t, g) in enumerate(zip(label, given))
        )
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
        **{f"{split}/{k}": v for k, v in metrics.items()},
        "train_seconds": 100 * accuracy * bool(config["epochs"]),
        "peak_memory_mb": 500,
        "trainable_image": 1000,
        "trainable_text": 500,
        "parameters": 7_500_000 if "rn" in name else 6_900_000,
        **config,
    }
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "args.json").write_text(
        json.dumps(config | {"name": name, "commit": "x", "device": "cpu"})
    )
    steps = [
        {
            "epoch": 1,
            "step": i + 1,
            "train/loss": 3 * math.exp(-i / 20 * accuracy) + rng.random() / 9,
        }
        for i in range(20 * (config["epochs"] or 0))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))


def write_study(runs, **options):
    """Two architectures after a stand-in, three strategies, three rates, two seeds; the final table on test; temperatures; base to new."""
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
            write_run(
                runs,
                f"untrained-{architecture}-{split}",
                0.3 + bonus,
                split,
                **start | {"epochs": 0, "holdout": split == "val"},
            )
        for strategy, gain in STRATEGIES.items():
            own = start | {
                "strategy": strategy,
                "augment": "crop" if strategy == "full" else "none",
            }
            for seed in (0, 1):
                for lr, share in RATES.items():
                    write_run(
                        runs,
                        f"factorial-{architecture}-{strategy}-{lr}-{seed}",
                        0.3 + bonus + gain * share,
                        lr=lr,
                        seed=seed,
                        **own,
                    )
                write_run(
                    runs,
                    f"final-{architecture}-{strategy}-{seed}",
                    0.3 + bonus + gain,
                    "test",
                    lr=5e-3,
                    seed=seed,
                    holdout=False,
                    **own,
                )
    for tau in (0.003, 0.03, 0.3):
        for seed in (0, 1):
            write_run(
                runs,
                f"tau-{tau}-{seed}",
                0.7 - 0.1 * abs(math.log10(tau / 0.03)),
                temperature=tau,
                seed=seed,
                architecture="x/start-tiny",
                **options,
            )
    for strategy in ("full", "text"):
        write_run(
            runs,
            f"base-{strategy}",
            0.5,
            classes="base",
            architecture="x/start-tiny",
            strategy=strategy,
            **options,
        )
    return runs


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study") / "runs")


def rows_of(text: str, heading: str) -> list[dict]:
    """The first Markdown table after a heading."""
    lines = [
        line
        for line in text[text.rindex("\n", 0, text.index(heading)) + 1 :].split("\n")
        if line.startswith("|") or line.startswith("#")
    ]
    table = lines[1 : next((i for i, line in enumerate(lines) if i and line.startswith("#")), None)]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in table]
    return [dict(zip(cells[0], row)) for row in cells[2:]]


@pytest.fixture(scope="module")
def report(study):
    output = study.parent / "report"
    subprocess.run(
        [
            sys.executable,
            ROOT / "report.py",
            "--runs",
            study,
            "--output",
            output,
            "--bootstrap",
            "100",
        ],
        check=True,
    )
    return output


def test_the_report_of_a_study(study, report):
    text = (report / "report.md").read_text()
    # the answer: 45 points over the untrained tiny, about 40 by training it, 5 by the other architecture
    total, low, high = map(
        float, re.search(r"Of the \+([\d.]+) \[\+([\d.]+), \+([\d.]+)\] points", text).groups()
    )
    assert low < 45 < high and abs(total - 45) < 8
    shares = {
        r["factor"]: [float(x) for x in re.findall(r"-?\d+", r["gain"])]
        for r in rows_of(text, "## Is it")[:3]
    }
    assert (
        sum(v[0] for v in shares.values()) == pytest.approx(100, abs=2)
        and shares["strategy"][0] > 70
    )
    variance = {r["factor"]: int(r["variance"].split("%")[0]) for r in rows_of(text, "## Is it")}
    assert (
        sum(variance.values()) == pytest.approx(100, abs=3)
        and variance["strategy"] > variance["architecture"]
    )
    assert "stand in for" in text and "12 epochs on the base classes" in text
    assert "3 strategies (full, last_blocks, text), 2 architectures, 3 learning rates" in text
    # the final table, computed again from the predictions
    table = rows_of(text, "### test, 240 images of 12 classes")
    assert {(r["architecture"], r["strategy"]) for r in table} == {
        (a, s) for a in ("tiny", "tiny-rn") for s in ("none", *STRATEGIES)
    }
    right = {}
    for seed in (0, 1):
        with (study / f"final-tiny-full-{seed}" / "predictions.csv").open() as file:
            right[seed] = np.array([row["label"] == row["top1"] for row in csv.DictReader(file)])
    accuracy = [100 * x.mean() for x in right.values()]
    row = next(r for r in table if (r["architecture"], r["strategy"]) == ("tiny", "full"))
    half = 12.706 * np.std(accuracy, ddof=1) / math.sqrt(2)
    assert (
        row["top-1"] == f"{np.mean(accuracy):.2f}"
        and row["seeds"] == "2"
        and row["trained"] == "1,500"
    )
    assert (
        row["seeds 95%"]
        == f"[{max(0, np.mean(accuracy) - half):.1f}, {min(100, np.mean(accuracy) + half):.1f}]"
    )
    # a table has one protocol; the stand-ins are in none
    assert (
        text[text.index("## Results") : text.index("## One factor")].count("\n### ") == 3
        and "start-tiny" not in text[: text.index("## Runs that others")]
    )
    assert [r["strategy"] for r in rows_of(text, "trained on base classes only")] == [
        "full",
        "text",
    ]
    assert [r["strategy"] for r in rows_of(text[text.index("## From base") :], "###")] == [
        "full",
        "text",
    ]
    assert [
        r["level"]
        for r in rows_of(text[text.index("## One factor") :], "### val")
        if r["factor"].startswith("temperature")
    ] == ["0.003", "0.03", "0.3"]
    with (report / "results-test-pairs.csv").open() as file:
        pairs = list(csv.DictReader(file))
    assert len(pairs) == 8 * 7 / 2 and all(float(p["p"]) <= float(p["holm"]) for p in pairs)
    pair = next(p for p in pairs if (p["a"], p["b"]) == ("tiny full", "tiny-rn full"))
    with (study / "final-tiny-rn-full-0" / "predictions.csv").open() as file:
        other = np.array([row["label"] == row["top1"] for row in csv.DictReader(file)])
    b, c = int((right[0] & ~other).sum()), int((other & ~right[0]).sum())
    assert (int(pair["only a right"]), int(pair["only b right"])) == (b, c)
    assert float(pair["p"]) == pytest.approx(
        min(1, 2 * scipy.stats.binom.cdf(min(b, c), b + c, 0.5)), rel=1e-3
    )
    # what it links to is there, and the LaTeX tables are rectangular
    assert (
        set(re.findall(r"\]\((.*\.png)\)", text))
        == {p.name for p in report.glob("*.png")}
        == {f"{p.stem}.png" for p in report.glob("*.pdf")}
    )
    for path in report.glob("*.tex"):
        lines = path.read_text().splitlines()
        columns = len(re.fullmatch(r"\\begin\{tabular\}\{@\{\}([lr]+)@\{\}\}", lines[2])[1])
        body = [line for line in lines if line.endswith(r"\\")]
        assert (
            len(body) > 1
            and all(len(re.findall(r"(?<!\\)&", line)) == columns - 1 for line in body)
            and "_" not in re.sub(r"\\_", "", "".join(body))
        )
    for section in ("batch size", "training images a class", "augmentation"):
        assert f"the effect of the {section}" in text[text.index("## What is missing") :]


def test_the_same_runs_give_the_same_bytes(study, report, tmp_path, cli):
    """Elsewhere, in another process, in a folder that holds an older report and somebody's own files, which stay."""
    shutil.copytree(study, tmp_path / "copy")
    (tmp_path / "again").mkdir()
    for name in ("results-old.png", "main.tex"):
        (tmp_path / "again" / name).write_text("")
    assert (
        cli(
            "report.py",
            "--runs",
            tmp_path / "copy",
            "--output",
            tmp_path / "again",
            "--bootstrap",
            100,
        )[0]
        == 0
    )
    a, b = (
        {p.name: p.read_bytes() for p in folder.iterdir()}
        for folder in (report, tmp_path / "again")
    )
    assert b.pop("main.tex") == b"" and a == b and len(a) > 15


def test_any_subset_works_and_what_is_missing_is_said(study, tmp_path, cli):
    runs = tmp_path / "runs"
    runs.mkdir()
    assert "no finished run" in error_line(
        cli("report.py", "--runs", runs, "--output", tmp_path / "report")
    )
    shutil.copytree(study / "final-tiny-full-0", runs / "one")
    (runs / "failed.jsonl").write_text(
        '{"name": "two", "error": "error: no memory"}\n{"name": "one", "error": "later mended"}\n'
    )
    (runs / "three").mkdir()
    (runs / "three" / "result.json").write_text("{")
    assert cli("report.py", "--runs", runs, "--output", tmp_path / "report")[0] == 0
    text = (tmp_path / "report" / "report.md").read_text()
    missing = text[text.index("## What is missing") :]
    assert (
        "Not answered" in text
        and "two failed: error: no memory" in missing
        and "three can't be read" in missing
        and "later mended" not in missing
    )
    assert (
        "the change of each class" in missing
        and "no untrained model" in missing
        and rows_of(text, "### test")[0]["strategy"] == "full"
    )
    shutil.copytree(study / "untrained-tiny-test", runs / "four")
    shutil.copytree(study / "start-tiny", runs / "start-tiny")
    assert cli("report.py", "--runs", runs, "--output", tmp_path / "report")[0] == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "the change of each class" not in text and (tmp_path / "report" / "classes.png").exists()


def test_only_the_same_images_and_training_classes_are_compared(tmp_path):
    write_run(tmp_path, "a", 0.5)
    write_run(tmp_path, "b", 0.6, first=7)
    write_run(tmp_path, "c", 0.6, names=[n.upper() for n in NAMES])
    write_run(tmp_path, "d", 0.6, split="test")
    write_run(tmp_path, "e", 0.6, classes="base")
    write_run(tmp_path, "f", 0.6, lr=5.0)
    write_run(tmp_path, "g", 0.6, splits="official")
    found, starts = comparable.resolve(comparable.load(tmp_path)[0])
    same = {r.name for r in found if r.protocol == next(x for x in found if x.name == "a").protocol}
    assert same == {"a", "f"} and len({r.protocol for r in found}) == 6 and not starts


def test_a_seed_counts_once_and_an_evaluation_bears_its_run_s_name(tmp_path):
    write_run(tmp_path, "a", 0.5)
    write_run(tmp_path, "again", 0.5, eval_every=1)
    write_run(tmp_path, "b", 0.5, seed=1)
    write_run(tmp_path, "zero", 0.1, epochs=0)
    write_run(
        tmp_path,
        "eval",
        0.5,
        "test",
        job="eval",
        architecture=str(tmp_path / "b" / "model.pt"),
        strategy=None,
        epochs=None,
    )
    write_run(
        tmp_path,
        "pretrained",
        0.5,
        "test",
        job="eval",
        architecture="ViT-B/32",
        strategy=None,
        epochs=None,
    )
    found, _ = comparable.resolve(comparable.load(tmp_path)[0])
    assert [
        [r.name for r in g] for g in comparable.grouped([r for r in found if r.split == "val"])
    ] == [["a", "b"], ["zero"]]
    assert {(r.name, r.architecture, r.strategy) for r in found if r.split == "test"} == {
        ("eval", "tiny", "full"),
        ("pretrained", "ViT-B/32", "none"),
    }
    assert next(r for r in found if r.name == "zero").strategy == "none"


def test_incomplete_grids_lose_the_level_that_lacks_cells(study, tmp_path):
    runs = shutil.copytree(study, tmp_path / "runs")
    grid = comparable.factorial(comparable.resolve(comparable.load(runs)[0])[0])
    assert (grid.strategies, grid.architectures, grid.rates, grid.seeds, grid.dropped) == (
        list(STRATEGIES),
        ["tiny", "tiny-rn"],
        3,
        [0, 1],
        [],
    )
    assert [cell[1].name for cell in grid.runs["text", "tiny-rn"]] == [
        f"factorial-tiny-rn-text-{lr}-1" for lr in RATES
    ]
    shutil.rmtree(runs / "factorial-tiny-text-0.001-0")
    grid = comparable.factorial(comparable.resolve(comparable.load(runs)[0])[0])
    assert (grid.strategies, grid.dropped, grid.seeds) == (
        ["full", "last_blocks"],
        ["text"],
        [0, 1],
    )
    for path in runs.glob("factorial-tiny-rn-*"):
        shutil.rmtree(path)
    assert comparable.factorial(comparable.resolve(comparable.load(runs)[0])[0]) is None


def test_evaluations_of_runs_are_those_runs_and_processes_are_part_of_a_batch(tmp_path):
    """Three seeds evaluated on test are one configuration with three seeds; four processes of 16 images are a batch of 64."""
    from flowers.study.comparable import grouped, load, resolve

    options = {"architecture": "tiny", "holdout": True}
    for seed in (0, 1, 2):
        write_run(tmp_path, f"trained-{seed}", 0.5, seed=seed, **options)
        write_run(
            tmp_path,
            f"evaluated-{seed}",
            0.5,
            "test",
            job="eval",
            seed=0,
            **options | {"architecture": f"runs/trained-{seed}/model.pt"},
        )
    write_run(
        tmp_path,
        "stranger",
        0.5,
        "test",
        job="eval",
        **options | {"architecture": "elsewhere/other/model.pt", "epochs": None, "strategy": None},
    )
    found, starts = resolve(load(tmp_path)[0])
    assert not starts and sorted(len(g) for g in grouped(found)) == [1, 3, 3]
    by_name = {r.name: r for r in found}
    assert [by_name[f"evaluated-{s}"].seed for s in (0, 1, 2)] == [0, 1, 2]
    assert (by_name["stranger"].architecture, by_name["stranger"].strategy) == ("other", "unknown")
    for name, processes, batch_size in (("one", 1, 64), ("four", 4, 16), ("large", 4, 64)):
        write_run(
            tmp_path,
            name,
            0.5,
            processes=processes,
            batch_size=batch_size,
            seed=5 + processes,
            **options,
        )
    groups = [{r.name for r in g} for g in grouped(resolve(load(tmp_path)[0])[0])]
    assert {"one", "four"} <= next(g for g in groups if "one" in g) and not any(
        {"one", "large"} <= g for g in groups
    )


def test_many_models_that_tie_at_the_top(tmp_path, cli):
    for architecture in ("tiny", "tiny-rn"):
        for i in range(8):
            folder = tmp_path / "runs" / f"{architecture}-{i}"
            write_run(
                tmp_path / "runs",
                folder.name,
                0.5,
                architecture=architecture,
                strategy=f"strategy{i}",
            )
            rows = (tmp_path / "runs" / "tiny-0" / "predictions.csv").read_text()
            (folder / "predictions.csv").write_text(rows)
            top1 = json.loads((tmp_path / "runs" / "tiny-0" / "result.json").read_text())[
                "val/top1"
            ]
            (folder / "result.json").write_text(
                json.dumps(json.loads((folder / "result.json").read_text()) | {"val/top1": top1})
            )
    code, _, err = cli(
        "report.py", "--runs", tmp_path / "runs", "--output", tmp_path / "report", "--bootstrap", 20
    )
    assert code == 0 and (tmp_path / "report" / "worst.png").exists(), err
