"""Files that are whole or not there, and W&B that never costs a run."""

import json
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from flowers import UserError, command, devices, files, runs, tracking, training
from flowers.settings import read_settings

# -----------------------------------------------------------------------------
# files


def test_atomic_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_atomic_writes_to_a_pipe_and_leaves_it_there(tmp_path):
    """As to /dev/stdout: renaming would put a file in the place of the device."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    files.write_csv(path, [{"a": 1}])
    assert os.read(reader, 100).split() == [b"a", b"1"]
    os.close(reader)
    assert path.is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_atomic_removes_what_a_killed_process_left(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    of_dead = f".a.json.{platform.node()}-{dead.pid}.tmp"
    of_living = f".a.json.{platform.node()}-{os.getppid()}.tmp"
    of_other_host = f".a.json.other-host-{dead.pid}.tmp"
    # Also of another file, which may never be written again.
    of_other_file = of_dead.replace("a.json", "b[1].npy")
    for name in (of_dead, of_other_file, of_living, of_other_host):
        (tmp_path / name).write_text("half")

    files.write_json(tmp_path / "a.json", {})

    # What is not known to be dead stays.
    assert sorted(os.listdir(tmp_path)) == sorted([of_living, of_other_host, "a.json"])


def test_a_high_nll_is_no_damage():
    row = {"val/nll": 104.6, "val/nll_high": 120.0, "val/nll_calibrated": 101.0, "val/top1": 3.0}
    assert files.checked(row) == row
    for damaged in ({"val/nll": "x"}, {"val/top1": 104.6}):
        with pytest.raises(ValueError):
            files.checked(damaged)


def test_append_after_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": ')
    files.append_line(path, {"c": 3})
    assert files.read_lines(path) == [{"a": 1}, {"c": 3}]


# -----------------------------------------------------------------------------
# run folders


def test_a_killed_evaluation_is_begun_anew_and_nothing_else_overwritten(tmp_path):
    config = {"job": "eval", "architecture": "tiny"}
    runs.new_run(tmp_path, "killed", config, {})
    runs.new_run(tmp_path, "ended", config, {})
    # Killed after its result, before its line in results.jsonl.
    files.write_json(tmp_path / "ended" / "result.json", {"name": "ended"})
    runs.new_run(tmp_path, "training", config | {"job": "train"}, {})

    assert runs.new_run(tmp_path, "killed", config | {"seed": 1}, {}) == tmp_path / "killed"
    assert json.loads((tmp_path / "killed" / "args.json").read_text())["seed"] == 1

    taken = [("ended", "eval"), ("training", "eval"), ("training", "train"), ("killed", "train")]
    for name, job in taken:
        with pytest.raises(UserError, match="is a run already"):
            runs.new_run(tmp_path, name, config | {"job": job}, {})
    lines = files.read_lines(tmp_path / "results.jsonl")
    assert lines == [{"name": "ended"}], "its line was missing"


@pytest.mark.parametrize(
    "architecture, named",
    [
        ("ViT-B/32", "ViT-B-32"),
        ("ViT-L/14@336px", "ViT-L-14@336px"),
        ("{}/lr0.001-s0", "lr0.001-s0"),
        ("{}/lr0.001-s0/model.pt", "lr0.001-s0"),
        ("Qwen/Qwen2.5-VL-7B", "Qwen-Qwen2.5-VL-7B"),
    ],
)
def test_a_run_is_named_after_its_model(tmp_path, architecture, named):
    (tmp_path / "lr0.001-s0").mkdir()
    (tmp_path / "lr0.001-s0" / "model.pt").touch()
    config = {"architecture": architecture.format(tmp_path), "job": "train"}
    folder = runs.new_run(tmp_path, None, config, {})
    assert folder.name.startswith(f"{named}-train-2")


# -----------------------------------------------------------------------------
# schedule, errors and random numbers


def test_the_learning_rate_rises_and_falls():
    factors = [training.learning_rate_factor(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[55] == pytest.approx(0.5)
    assert factors[-1] < 1e-3
    assert factors[10:] == sorted(factors[10:], reverse=True)


@pytest.mark.parametrize("is_recorded", [False, True])
def test_a_gpu_that_is_too_small_is_one_line(is_recorded, capsys):
    def out_of_memory():
        try:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."
            )
        finally:
            if is_recorded:  # as torch.cuda.graph does when it ends
                raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.raises(SystemExit) as end:
        command(out_of_memory)()
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert err.count("\n") == 1
    assert "CUDA out of memory" in err and "lower --batch_size" in err

    def broken():
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="of ours"):
        command(broken)()


def test_generator_depends_on_all_numbers():
    seeds = set()
    for numbers in ((0, 1), (1, 0), (0, 2), (0,)):
        seed = devices.generator(*numbers).initial_seed()
        assert seed == devices.generator(*numbers).initial_seed()
        seeds.add(seed)
    assert len(seeds) == 4


# -----------------------------------------------------------------------------
# Weights & Biases

CANT_BE_IMPORTED = "raise TypeError('Descriptors cannot be created')"
CANT_START = """
Settings = dict

def init(**_):
    raise TimeoutError()
"""
CANT_MAKE_PICTURES = """
class Run:
    def log(self, *_):
        pass

    finish = log

def init(**_):
    return Run()

def Image(_):
    raise OSError('no space')

Settings, Table = dict, list
"""


@pytest.mark.parametrize(
    "stub, warning",
    [
        (CANT_BE_IMPORTED, "can't be imported (Descriptors"),
        (CANT_START, "W&B offline failed (TimeoutError)"),
        (CANT_MAKE_PICTURES, "W&B failed (no space)"),
    ],
    ids=["import", "start", "pictures"],
)
def test_whatever_wandb_does_the_run_goes_on(tmp_path, monkeypatch, capsys, stub, warning):
    (tmp_path / "wandb.py").write_text(stub)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    tracker = tracking.start_wandb("offline", tmp_path, {"job": "train"})
    tracker.log({"a": 1})
    tracking.log_mistakes(tracker, [(tmp_path / "a.jpg", "rose", "iris", 0.5)])
    tracker.finish()
    assert warning in capsys.readouterr().err
    sys.modules.pop("wandb", None)


def train(small, tmp_path, *options, **environment):
    """Run train.py in a process of its own, without a W&B key.

    It waits up to minutes on a busy machine; a run that waits for a server without end fails.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    env["HOME"] = str(tmp_path)  # and so without ~/.netrc
    env.update(environment)
    command = [sys.executable, ROOT / "train.py", "--data_root", small, "--architecture", "tiny"]
    command += ["--epochs", "1", "--batch_size", "12", "--runs", tmp_path, "--name", "w"]
    return subprocess.run(
        [*command, *options],
        env=env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=280,
    )


def test_wandb_without_a_key_is_offline_and_asks_nothing(small, tmp_path):
    done = train(small, tmp_path)
    assert done.returncode == 0, done.stderr
    offline = list((tmp_path / "w" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(offline) == 1
    assert offline[0].stat().st_size > 1000
    assert (tmp_path / "w" / "result.json").exists()


def test_wandb_with_a_dead_server_does_not_cost_the_run(small, tmp_path):
    dead_server = "http://127.0.0.1:9"
    done = train(small, tmp_path, WANDB_API_KEY="0" * 40, WANDB_BASE_URL=dead_server)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "w" / "result.json").exists()
    assert "warning: W&B" in done.stderr and "Traceback" not in done.stderr
    assert list((tmp_path / "w" / "wandb").glob("offline-run-*")), "kept offline"


def test_without_wandb_installed(small, tmp_path):
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "wandb.py").write_text("raise ImportError('hidden')")
    done = train(small, tmp_path, PYTHONPATH=str(tmp_path / "hide"))
    assert done.returncode == 0
    assert "wandb can't be imported" in done.stderr
    assert (tmp_path / "w" / "result.json").exists()


def test_how_a_model_was_trained_and_what_it_began_with():
    """What report and page both say; their own tests go through files."""
    lora, older = {"strategy": "lora", "epochs": 3}, {"epochs": 3}
    trained = [
        (lora, (), "lora"),
        (older, (), "full"),
        ({"strategy": "lora", "epochs": 0}, (), "none"),
        ({"strategy": "linear", "epochs": 0}, (), "linear"),
        ({"job": "eval", "architecture": "ViT-B/32"}, (), "none"),
        ({"job": "eval", "architecture": "gone/model.pt"}, (), "unknown"),
        (lora, (lora, lora), "lora soup"),
        (older, (older, {"strategy": "full"}), "full soup"),
        (lora, (lora, older), "mixed soup"),
        (lora, (lora, None), "unknown soup"),
    ]
    for settings, members, strategy in trained:
        assert runs.strategy_of(settings, members) == strategy
    begun = [
        ("tiny", False, "random"),
        ("tiny", True, "prompts"),
        ("ViT-B/32", True, "openai"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", False, "laion2b_s34b_b79k"),
        ("weights.pt", False, ""),
    ]
    for architecture, is_start, pretraining in begun:
        assert runs.pretraining_of({"architecture": architecture}, is_start) == pretraining
    assert runs.pretraining_of({"architecture": "tiny", "captions": "c"}, True) == "captions"


# -----------------------------------------------------------------------------
# resuming with other images or flags


def test_of_two_runs_of_one_name_that_begin_at_once_one_goes_on(tmp_path, monkeypatch):
    config = {"job": "train", "architecture": "tiny"}
    is_taken = runs._is_taken

    def other_comes_first(folder, job):
        taken = is_taken(folder, job)
        folder.mkdir()  # between the look and the making
        return taken

    monkeypatch.setattr(runs, "_is_taken", other_comes_first)
    with pytest.raises(UserError, match="by another process"):
        runs.new_run(tmp_path, "it", config, {})
    assert not list((tmp_path / "it").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is no folder"):
        runs.new_run(tmp_path, "file", config, {})


def test_a_run_is_not_resumed_with_other_images(tmp_path):
    splits = {"train": np.arange(3), "val": np.arange(0), "test": np.arange(2)}
    config = {"job": "train", "architecture": "tiny"}
    folder = runs.new_run(tmp_path, "it", config, splits)
    runs.check_same_images(folder, splits, ["a", "b", "c"])  # no list yet
    runs.write_trained_on(folder, ["a", "b", "c", "of its start"])
    runs.check_same_images(folder, splits, ["a", "b", "c"])
    for other in (splits | {"train": np.arange(4)}, splits | {"test": np.arange(1)}):
        with pytest.raises(UserError, match="the dataset has changed"):
            runs.check_same_images(folder, other, ["a", "b", "c"])
    with pytest.raises(UserError, match="the dataset has changed"):
        runs.check_same_images(folder, splits, ["a", "b", "another"])  # as many


def test_flags_typed_beside_resume_must_be_those_of_the_run(tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "it"
    folder.mkdir(parents=True)

    def settings_of(*words):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
        return read_settings("")

    begun = settings_of("--architecture", "tiny", "--lr", 1e-3, "--holdout", "--runs", tmp_path)
    files.write_json(folder / "args.json", {**begun.record(), "name": "it"})
    # The same command once more, what belongs to the command, and what the machine decides.
    same = ("--architecture", "tiny", "--lr", 0.001, "--epochs", 19, "--runs", tmp_path / "runs")
    for words in ((), same, ("--device", "cpu", "--no_cuda_graph"), ("--precision", "auto")):
        assert settings_of("--resume", folder, *words).lr == 1e-3
    for words in (("--lr", 0.01), ("--holdout=false",), ("--seed", 1), ("--name", "other")):
        with pytest.raises(UserError, match=f"{words[0].partition('=')[0]}: .*leave it out"):
            settings_of("--resume", folder, *words)


def test_a_folder_with_weights_of_something_else_begins_no_run(tmp_path):
    """Its list of training images, or its model, would be taken for the new run's."""
    config = {"job": "train", "architecture": "tiny"}
    for left in ("trained_on.json", "model.pt"):
        folder = tmp_path / left.split(".")[0]
        folder.mkdir()
        (folder / left).write_text("{}")
        with pytest.raises(UserError, match="of something else"):
            runs.new_run(tmp_path, folder.name, config, {})
        assert [path.name for path in folder.iterdir()] == [left]
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="is no folder"):
        runs.new_run(tmp_path, "link", config, {})
