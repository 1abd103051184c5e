"""ablate.py end to end on small data: each point once, whatever is killed; choices on val; commands
that train.py takes.
"""

import contextlib
import json
import os
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
PATIENCE_S = 600  # a machine that is busy with other work needs minutes


def commands(out):
    """The arguments of each train.py that a dry run prints."""
    lines = [line for line in out.splitlines() if line.startswith("python train.py")]
    return [shlex.split(line)[2:] for line in lines]


def values(command, flag):
    """All values of a flag."""
    return [command[i + 1] for i, word in enumerate(command) if word == flag]


def names(out):
    return [values(command, "--name")[0] for command in commands(out)]


def wait_for(find, what):
    """What find() gives as soon as it gives something."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := find()):
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.05)
    return found


def test_the_grids_are_what_they_say(cli, tmp_path):
    def dry(*arguments):
        code, out, err = cli("ablate.py", *arguments, "--dry_run", "--runs", tmp_path)
        assert code == 0, err
        return commands(out)

    # nine architectures, three seeds
    architecture = dry("architecture")
    assert len(architecture) == 27
    assert len({values(c, "--architecture")[0] for c in architecture}) == 9

    temperature = dry("temperature", "--seeds", 5)
    settings = {(*values(c, "--temperature"), "--learn_temperature" in c) for c in temperature}
    fixed = {(t, False) for t in ("0.003", "0.01", "0.03", "0.1", "0.3")}
    learned = {("0.01", True), ("0.07", True)}
    assert settings == fixed | learned

    factorial = dry(
        *("factorial", "--architecture", "ViT-B/32", "RN50"),
        *("--strategy", "full", "lora", "--seeds", 0, 1),
    )
    assert len(factorial) == 2 + 2 + 2 * 2 * 3 * 2  # untrained, linear, and the grid
    lora = [c for c in factorial if values(c, "--strategy") == ["lora"]]
    assert {values(c, "--lr")[0] for c in lora} == {"4e-05", "0.0002", "0.001"}
    assert all("--holdout" in c for c in [*factorial, *temperature])
    assert all(values(c, "--seed") == ["5"] for c in temperature)

    prompt = dry("prompt", "--seeds", 0)
    assert [len(values(c, "--prompt_template")) for c in prompt] == [1, 1, 1, 3]

    # other flags, other points
    three = dry("shots", "--seeds", 0, "--epochs", 3)
    four = dry("shots", "--seeds", 0, "--epochs", 4)
    assert three[0][:2] == ["--epochs", "3"]
    three_names = {values(c, "--name")[0] for c in three}
    four_names = {values(c, "--name")[0] for c in four}
    assert not three_names & four_names

    assert "--times" in error_line(cli("ablate.py", "shots", "--lr", "1e-3"))
    assert "--jobs" in error_line(cli("ablate.py", "shots", "--jobs", -1))
    assert not list(tmp_path.iterdir())


def test_every_command_is_one_that_train_takes(cli, tmp_path):
    """train.py parses the flags of some points of each grid, and then finds no such data."""
    nowhere = tmp_path / "none"
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
        flags = ("--dry_run", "--runs", tmp_path, "--seeds", 0, "--data_root", nowhere)
        _, out, _ = cli("ablate.py", grid, *flags)
        points = commands(out)
        for arguments in points[::6] + points[-1:]:
            assert "no dataset at" in error_line(cli("train.py", *arguments)), arguments


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A state dict to start from: without a stand-in for pretraining there is a run less."""
    path = tmp_path_factory.mktemp("model") / "model.pt"
    torch.save(build("tiny").state_dict(), path)
    return path


def test_finished_points_are_skipped_and_failed_ones_recorded(small, cli, tmp_path):
    arguments = (
        *("positives", "--architecture", "tiny", "--data_root", small, "--runs", tmp_path),
        *(*COMMON, *QUICK),
    )
    _, out, _ = cli("ablate.py", *arguments, "--dry_run")
    (bad,) = [name for name in names(out) if "positivespair" in name]

    # one point can't be resumed
    (tmp_path / bad).mkdir()
    (tmp_path / bad / "args.json").write_text("{}")
    (tmp_path / bad / "checkpoint.pt").write_text("not one")
    assert "1 points failed" in error_line(cli("ablate.py", *arguments, "--jobs", 2))
    (failed,) = read_lines(tmp_path / "failed.jsonl")
    assert failed["name"] == bad
    assert failed["code"]
    assert failed["error"]

    # the others went on: the stand-in for pretraining, and a point that starts from it
    finished = {p.parent.name: p.stat().st_mtime_ns for p in tmp_path.glob("*/result.json")}
    assert len(finished) == 2
    assert sum(name.startswith("start-") for name in finished) == 1
    (good,) = [p for p in tmp_path.glob("positives-*/args.json") if p.parent.name != bad]
    trained = json.loads(good.read_text())
    assert trained["holdout"]
    assert Path(trained["architecture"]).name.startswith("start-tiny")
    assert trained["lr"] == pytest.approx(5e-4)

    # the cause is mended
    (tmp_path / bad / "args.json").unlink()
    (tmp_path / bad / "checkpoint.pt").unlink()
    (tmp_path / "results.jsonl").unlink()  # as if killed between result.json and its line
    code, out, err = cli("ablate.py", *arguments)
    assert code == 0, err
    assert "3 points finished, 0 failed" in out, err
    for name, modified in finished.items():  # finished points were left alone
        assert (tmp_path / name / "result.json").stat().st_mtime_ns == modified
    listed = [row["name"] for row in read_lines(tmp_path / "results.jsonl")]
    assert sorted(listed) == sorted([*finished, bad])


def test_kills_lose_no_finished_point_and_double_none(small, model, tmp_path):
    """SIGKILL of ablate.py alone: its train.py goes on, and the next ablate.py waits for that point
    instead of running it twice.
    """
    runs = tmp_path / "runs"
    arguments = (
        *("positives", "--architecture", model, "--data_root", small, "--runs", runs),
        *(*COMMON, *QUICK),
    )
    command = [sys.executable, ROOT / "ablate.py", *map(str, arguments)]

    # Killed when the first point has begun, and when it has ended and the second begins.
    for sign in ("args.json", "result.json"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_for(lambda sign=sign: list(runs.glob(f"*/{sign}")), sign)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = {p.parent.name: p.stat().st_mtime_ns for p in runs.glob("*/result.json")}

    # Two at once take the points of the grid in turn.
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outs = [process.communicate(timeout=PATIENCE_S)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all("2 points finished, 0 failed" in out for out in outs), outs

    lines = read_lines(runs / "results.jsonl")
    assert len(lines) == len({row["name"] for row in lines}) == 2
    assert not (runs / "failed.jsonl").exists()
    assert finished
    for name, modified in finished.items():
        assert (runs / name / "result.json").stat().st_mtime_ns == modified
    for log in runs.glob("*/log.txt"):  # each point came to its end once
        assert log.read_text(errors="replace").count("results and pictures in") == 1


def test_the_study_chooses_on_val_and_touches_test_at_the_end(small, cli, tmp_path):
    flags = (
        *("--architecture", "tiny", "--strategy", "text", "--data_root", small),
        *("--runs", tmp_path, "--times", 0.5, 2, *COMMON, *QUICK),
    )
    code, out, _ = cli("ablate.py", "final", *flags, "--dry_run")
    assert code == 0
    assert "chosen on the results of factorial" in out
    assert "final-" not in out

    # Results as train.py would leave them: the best on val is the worst on test.
    code, out, _ = cli("ablate.py", "factorial", *flags, "--dry_run")
    for name, point in zip(names(out), commands(out)):
        good = point.count("--epochs") == 1 and values(point, "--lr") == ["0.001"]
        result = {
            "name": name,
            "val/top1": 90.0 if good else 50.0,
            "test/top1": 0.0 if good else 99.0,
        }
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(result))

    code, out, _ = cli("ablate.py", "final", *flags, "--dry_run")
    final = [c for name, c in zip(names(out), commands(out)) if name.startswith("final-")]
    chosen = [(values(c, "--strategy")[0], values(c, "--lr")[0]) for c in final]
    assert chosen == [("full", "0.0005"), ("linear", "0"), ("text", "0.001")]
    assert all("--holdout" not in c for c in final)

    code, out, _ = cli("ablate.py", "study", *flags, "--dry_run")
    parts = [line for line in out.splitlines() if line.startswith("#")]
    assert parts[1:] == [
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
        *("shots", "--architecture", model, "--strategy", "text", "--data_root", small),
        *("--runs", tmp_path, *COMMON, *QUICK),
    )
    code, out, _ = cli("ablate.py", *arguments, "--sweep")
    assert code == 0
    sweep = json.loads(Path(out.split()[-1]).read_text())
    assert sweep["method"] == "grid"
    points = sweep["parameters"]["only"]["values"]
    assert len(points) == 5

    # An agent of W&B puts its own words in the place of these.
    name = points[2]
    words = {"${env}": ["env"], "${program}": [sweep["program"]], "${args}": [f"--only={name}"]}
    agent = []
    for part in sweep["command"]:
        agent += words.get(part, [part])
    assert agent[:3] == ["env", "python", "ablate.py"]
    assert agent[-1] == f"--only={name}"

    code, out, err = cli(*agent[2:], "--dry_run")
    (point,) = commands(out)
    assert values(point, "--shots") == ["4"], err
    assert names(out) == [name], err
    assert "sweep factorial" in error_line(cli("ablate.py", "study", "--sweep"))


def processes_writing(log, but):
    """The pids of the processes that have a file open, `but` one."""
    pids = set()
    for link in Path("/proc").glob("[0-9]*/fd/1"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if link.readlink() == log:
                pids.add(int(link.parts[2]))
    return pids - {but}


@pytest.mark.skipif(sys.platform != "linux", reason="points are forked on Linux only")
def test_a_killed_point_is_recorded_and_the_next_goes_on(small, model, tmp_path):
    arguments = (
        *("positives", "--architecture", model, "--data_root", small, "--runs", tmp_path),
        *(*COMMON, *QUICK),
    )
    command = [sys.executable, ROOT / "ablate.py", *map(str, arguments)]
    ablate = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    (first,) = wait_for(lambda: list(tmp_path.glob("*/args.json")), "point")
    log = (first.parent / "log.txt").resolve()
    (pid,) = wait_for(lambda: processes_writing(log, but=ablate.pid), "process")
    assert Path(f"/proc/{pid}/fd/0").readlink() == Path(os.devnull)
    os.kill(pid, signal.SIGKILL)

    out, _ = ablate.communicate(timeout=PATIENCE_S)
    assert ablate.returncode == 2
    assert "1 points finished, 1 failed" in out
    (failed,) = read_lines(tmp_path / "failed.jsonl")
    assert failed["name"] == first.parent.name
    assert failed["code"] == -signal.SIGKILL


def test_a_forked_point_is_as_good_as_a_process_of_its_own(small, model, cli, tmp_path):
    """The same files, weights and losses, bit for bit."""
    arguments = (
        *("learning_rate", "--architecture", model, "--strategy", "prompt", "--times", 1),
        *("--data_root", small, *COMMON, *QUICK, "--jobs", 2),
    )
    code, _, err = cli("ablate.py", *arguments, "--runs", tmp_path / "forked")
    assert code == 0, err
    _, out, _ = cli("ablate.py", *arguments, "--runs", tmp_path / "plain", "--dry_run")
    (words,) = commands(out)
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // 2))}
    subprocess.run(
        [sys.executable, ROOT / "train.py", *words, "--wandb", "disabled"],
        env=os.environ | threads,
        check=True,
    )

    (forked,) = (tmp_path / "forked").glob("*/")
    plain = tmp_path / "plain" / forked.name
    assert {p.name for p in forked.iterdir()} == {p.name for p in plain.iterdir()} | {"log.txt"}
    for name in ("model.pt", "classifier.pt"):
        ours = torch.load(forked / name)
        theirs = torch.load(plain / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    losses = [read_lines(run / "metrics.jsonl", "train/loss") for run in (forked, plain)]
    assert [r["train/loss"] for r in losses[0]] == [r["train/loss"] for r in losses[1]]


COUNT_GPUS_ASKED_FOR = """
import importlib, torch
from ablate import IMPORTED

def asked(*_):
    raise SystemExit("a GPU was asked for, and can't be used after a fork")

for name in ("is_available", "device_count", "_lazy_init", "init"):
    setattr(torch.cuda, name, asked)
torch._C._cuda_getDeviceCount = asked
for name in IMPORTED:
    importlib.import_module(name)
assert not torch.cuda.is_initialized()
"""


def test_what_is_imported_before_the_fork_leaves_the_gpu_alone():
    words = [sys.executable, "-W", "ignore", "-c", COUNT_GPUS_ASKED_FOR]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
