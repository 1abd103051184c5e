"""ablate.py end to end on small data: each point once, whatever is killed; choices on val; commands that train.py takes."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, error_line

from flowers.files import read_lines
from flowers.models import build

QUICK = ("--batch_size", 12, "--epochs", 1)
COMMON = ("--wandb", "disabled", "--start_epochs", 1, "--seeds", 0)


def commands(out):
    return [
        shlex.split(line)[2:] for line in out.splitlines() if line.startswith("python train.py")
    ]


def names(out):
    return [c[c.index("--name") + 1] for c in commands(out)]


def test_the_grids_are_what_they_say(cli, tmp_path):
    def dry(*arguments):
        code, out, err = cli("ablate.py", *arguments, "--dry_run", "--runs", tmp_path)
        assert code == 0, err
        return commands(out)

    value = lambda c, flag: [c[i + 1] for i, x in enumerate(c) if x == flag]
    assert (
        len(dry("architecture")) == 27
        and len({value(c, "--architecture")[0] for c in dry("architecture")}) == 9
    )
    temperature = dry("temperature", "--seeds", 5)
    assert {(*value(c, "--temperature"), "--learn_temperature" in c) for c in temperature} == {
        (t, False) for t in ("0.003", "0.01", "0.03", "0.1", "0.3")
    } | {("0.01", True), ("0.07", True)}
    factorial = dry(
        "factorial",
        "--architecture",
        "ViT-B/32",
        "RN50",
        "--strategy",
        "full",
        "lora",
        "--seeds",
        0,
        1,
    )
    assert len(factorial) == 2 + 2 + 2 * 2 * 3 * 2  # untrained, linear, and the grid
    assert {value(c, "--lr")[0] for c in factorial if value(c, "--strategy") == ["lora"]} == {
        "4e-05",
        "0.0002",
        "0.001",
    }
    assert all("--holdout" in c for c in [*factorial, *temperature]) and all(
        value(c, "--seed") == ["5"] for c in temperature
    )
    assert [len(value(c, "--prompt_template")) for c in dry("prompt", "--seeds", 0)] == [1, 1, 1, 3]
    a, b = dry("shots", "--seeds", 0, "--epochs", 3), dry("shots", "--seeds", 0, "--epochs", 4)
    assert a[0][:2] == ["--epochs", "3"] and not {value(c, "--name")[0] for c in a} & {
        value(c, "--name")[0] for c in b
    }, "other flags, other points"
    assert "--times" in error_line(cli("ablate.py", "shots", "--lr", "1e-3"))
    assert "--jobs" in error_line(cli("ablate.py", "shots", "--jobs", -1))
    assert not list(tmp_path.iterdir())


def test_every_command_is_one_that_train_takes(cli, tmp_path):
    """train.py parses the flags of one point of each grid; it then ends because there is no such data."""
    for grid in (
        "strategy",
        "learning_rate",
        "temperature",
        "batch_size",
        "positives",
        "prompt",
        "augment",
        "base_to_new",
        "shots",
        "factorial",
    ):
        _, out, _ = cli(
            "ablate.py",
            grid,
            "--dry_run",
            "--runs",
            tmp_path,
            "--seeds",
            0,
            "--data_root",
            tmp_path / "none",
        )
        for arguments in commands(out)[::6] + commands(out)[-1:]:
            assert "no dataset at" in error_line(cli("train.py", *arguments)), arguments


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A state dict to start from: without a stand-in for pretraining there is a run less."""
    path = tmp_path_factory.mktemp("model") / "model.pt"
    torch.save(build("tiny").state_dict(), path)
    return path


def test_finished_points_are_skipped_and_failed_ones_recorded(small, cli, tmp_path):
    arguments = (
        "positives",
        "--architecture",
        "tiny",
        "--data_root",
        small,
        "--runs",
        tmp_path,
        *COMMON,
        *QUICK,
    )
    bad = next(
        n for n in names(cli("ablate.py", *arguments, "--dry_run")[1]) if "positivespair" in n
    )
    (tmp_path / bad).mkdir()
    (tmp_path / bad / "args.json").write_text("{}")
    (tmp_path / bad / "checkpoint.pt").write_text("not one")
    assert "1 points failed" in error_line(cli("ablate.py", *arguments, "--jobs", 2))
    (failed,) = read_lines(tmp_path / "failed.jsonl")
    assert failed["name"] == bad and failed["code"] and failed["error"]
    results = {p.parent.name: p.stat().st_mtime_ns for p in tmp_path.glob("*/result.json")}
    assert len(results) == 2 and sum(n.startswith("start-") for n in results) == 1
    trained = json.loads(
        next(p for p in tmp_path.glob("positives-*/args.json") if p.parent.name != bad).read_text()
    )
    assert (
        trained["holdout"]
        and Path(trained["architecture"]).name.startswith("start-tiny")
        and trained["lr"] == pytest.approx(5e-4)
    )
    (tmp_path / bad / "args.json").unlink()
    (tmp_path / bad / "checkpoint.pt").unlink()
    (tmp_path / "results.jsonl").unlink()  # as if killed between result.json and its line
    code, out, err = cli("ablate.py", *arguments)
    assert code == 0 and "3 points finished, 0 failed" in out, err
    assert all(
        (tmp_path / n / "result.json").stat().st_mtime_ns == t for n, t in results.items()
    ), "finished points were left alone"
    assert sorted(r["name"] for r in read_lines(tmp_path / "results.jsonl")) == sorted(
        [*results, bad]
    )


def test_kills_lose_no_finished_point_and_double_none(small, model, tmp_path):
    """SIGKILL of ablate.py alone: its train.py goes on, and the next ablate.py waits for that point instead of running it twice."""
    runs = tmp_path / "runs"
    command = [
        sys.executable,
        ROOT / "ablate.py",
        "positives",
        "--architecture",
        model,
        "--data_root",
        small,
        "--runs",
        runs,
        *map(str, COMMON),
        *map(str, QUICK),
    ]
    for sign in (
        "args.json",
        "result.json",
    ):  # of the first point: it has begun; it has ended, and the second begins
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not list(runs.glob(f"*/{sign}")):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    seen = {p.parent.name: p.stat().st_mtime_ns for p in runs.glob("*/result.json")}
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]  # and two at once share the grid
    outs = [p.communicate(timeout=120)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0] and all(
        "2 points finished, 0 failed" in out for out in outs
    ), outs
    lines = read_lines(runs / "results.jsonl")
    assert (
        len(lines) == len({r["name"] for r in lines}) == 2 and not (runs / "failed.jsonl").exists()
    )
    assert seen and all((runs / n / "result.json").stat().st_mtime_ns == t for n, t in seen.items())
    for log in runs.glob("*/log.txt"):
        assert log.read_text(errors="replace").count("results and pictures in") == 1, (
            "each point came to its end once"
        )


def test_the_study_chooses_on_val_and_touches_test_at_the_end(small, cli, tmp_path):
    arguments = (
        "final",
        "--architecture",
        "tiny",
        "--strategy",
        "text",
        "--data_root",
        small,
        "--runs",
        tmp_path,
        "--times",
        0.5,
        2,
        *COMMON,
        *QUICK,
    )
    code, out, _ = cli("ablate.py", *arguments, "--dry_run")
    assert code == 0 and "chosen on the results of factorial" in out and "final-" not in out
    code, out, _ = cli("ablate.py", "factorial", *arguments[1:], "--dry_run")
    for name, c in zip(names(out), commands(out)):  # results as train.py would leave them
        (tmp_path / name).mkdir()
        good = c.count("--epochs") == 1 and c[c.index("--lr") + 1] == "0.001"
        (tmp_path / name / "result.json").write_text(
            json.dumps(
                {
                    "name": name,
                    "val/top1": 90.0 if good else 50.0,
                    "test/top1": 0.0 if good else 99.0,
                }
            )
        )
    code, out, _ = cli("ablate.py", *arguments, "--dry_run")
    last = [c for n, c in zip(names(out), commands(out)) if n.startswith("final-")]
    assert [(c[c.index("--strategy") + 1], c[c.index("--lr") + 1]) for c in last] == [
        ("full", "0.0005"),
        ("linear", "0"),
        ("text", "0.001"),
    ]
    assert all("--holdout" not in c for c in last)
    code, out, _ = cli("ablate.py", "study", *arguments[1:], "--dry_run")
    assert [line for line in out.splitlines() if line.startswith("#")][1:] == [
        "# factorial: 4 points",
        "# temperature: 7 points",
        "# batch_size: 4 points",
        "# positives: 2 points",
        "# prompt: 4 points",
        "# augment: 3 points",
        "# shots: 5 points",
        "# base_to_new: 1 points",
        "# final: 3 points",
    ]


def test_an_agent_of_a_sweep_is_given_points_of_the_grid(small, model, cli, tmp_path):
    arguments = (
        "shots",
        "--architecture",
        model,
        "--strategy",
        "text",
        "--data_root",
        small,
        "--runs",
        tmp_path,
        *COMMON,
        *QUICK,
    )
    code, out, _ = cli("ablate.py", *arguments, "--sweep")
    sweep = json.loads(Path(out.split()[-1]).read_text())
    assert (
        code == 0 and sweep["method"] == "grid" and len(sweep["parameters"]["only"]["values"]) == 5
    )
    name = sweep["parameters"]["only"]["values"][2]
    expand = {
        "${env}": ["env"],
        "${program}": [sweep["program"]],
        "${args}": [f"--only={name}"],
    }  # as an agent of W&B does
    agent = [word for part in sweep["command"] for word in expand.get(part, [part])]
    assert agent[:3] == ["env", "python", "ablate.py"] and agent[-1] == f"--only={name}"
    code, out, err = cli(*agent[2:], "--dry_run")
    (point,) = commands(out)
    assert point[point.index("--shots") + 1] == "4" and names(out) == [name], err
    assert "sweep factorial" in error_line(cli("ablate.py", "study", "--sweep"))
