"""Files that are whole or not there, and W&B that never costs a run."""

import json
import os
import platform
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from flowers import UserError, command, devices, files, runs, tracking, training


def test_atomic_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1} and os.listdir(tmp_path) == ["a.json"]


def test_atomic_removes_what_a_killed_process_left(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here, alive, elsewhere = (
        f".a.json.{tag}.tmp"
        for tag in (
            f"{platform.node()}-{dead.pid}",
            f"{platform.node()}-{os.getppid()}",
            f"other-host-{dead.pid}",
        )
    )
    for name in (
        here,
        here.replace("a.json", "b[1].npy"),
        alive,
        elsewhere,
    ):  # also of another file, which may never be written again
        (tmp_path / name).write_text("half")
    files.write_json(tmp_path / "a.json", {})
    assert sorted(os.listdir(tmp_path)) == sorted([alive, elsewhere, "a.json"]), (
        "what is not known to be dead stays"
    )


def test_append_after_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": ')
    files.append_line(path, {"c": 3})
    assert files.read_lines(path) == [{"a": 1}, {"c": 3}]


def test_a_killed_evaluation_is_begun_anew_and_nothing_else_overwritten(tmp_path):
    config = {"job": "eval", "architecture": "tiny"}
    for name in ("killed", "ended"):
        runs.new_run(tmp_path, name, config, {})
    files.write_json(tmp_path / "ended" / "result.json", {"name": "ended"})  # and then killed
    runs.new_run(tmp_path, "training", config | {"job": "train"}, {})
    assert runs.new_run(tmp_path, "killed", config | {"seed": 1}, {}) == tmp_path / "killed"
    assert json.loads((tmp_path / "killed" / "args.json").read_text())["seed"] == 1
    for name, job in (
        ("ended", "eval"),
        ("training", "eval"),
        ("training", "train"),
        ("killed", "train"),
    ):
        with pytest.raises(UserError, match="is a run already"):
            runs.new_run(tmp_path, name, config | {"job": job}, {})
    assert files.read_lines(tmp_path / "results.jsonl") == [{"name": "ended"}], (
        "its line was missing"
    )


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
    folder = runs.new_run(
        tmp_path, None, {"architecture": architecture.format(tmp_path), "job": "train"}, {}
    )
    assert folder.name.startswith(f"{named}-train-2")


def test_the_learning_rate_rises_and_falls():
    shares = [training.learning_rate_factor(step, 100) for step in range(100)]
    assert (
        shares[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
        and shares[55] == pytest.approx(0.5)
        and shares[-1] < 1e-3
    )
    assert shares == shares[:10] + sorted(shares[10:], reverse=True)


def test_a_gpu_that_is_too_small_is_one_line(capsys):
    def main():
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."
        )

    with pytest.raises(SystemExit) as end:
        command(main)()
    said = capsys.readouterr().err
    assert (
        end.value.code == 2
        and said.count("\n") == 1
        and "CUDA out of memory" in said
        and "lower --batch_size" in said
    )

    def broken():
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="of ours"):
        command(broken)()


@pytest.mark.parametrize(
    "stub, said",
    [
        ("raise TypeError('Descriptors cannot be created')", "can't be imported (Descriptors"),
        (
            "Settings = dict\ndef init(**_): raise TimeoutError()",
            "W&B offline failed (TimeoutError)",
        ),
        (
            "class Run:\n    log = finish = lambda *_: None\nSettings, init = dict, lambda **_: Run()\n"
            "def Image(_): raise OSError('no space')\nTable = list",
            "W&B failed (no space)",
        ),
    ],
)
def test_whatever_wandb_does_the_run_goes_on(tmp_path, monkeypatch, capsys, stub, said):
    (tmp_path / "wandb.py").write_text(stub)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    tracker = tracking.start_wandb("offline", tmp_path, {"job": "train"})
    tracker.log({"a": 1})
    tracking.log_mistakes(tracker, [(tmp_path / "a.jpg", "rose", "iris", 0.5)])
    tracker.finish()
    assert said in capsys.readouterr().err
    sys.modules.pop("wandb", None)


def test_generator_depends_on_all_numbers():
    draws = {
        tuple(devices.generator(*n).initial_seed() for _ in range(2))
        for n in ((0, 1), (1, 0), (0, 2), (0,))
    }
    assert len(draws) == 4 and all(a == b for a, b in draws)


def train(small, tmp_path, *options, **environment):
    env = (
        {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
        | {"HOME": str(tmp_path)}
        | environment
    )
    start = time.time()
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "train.py",
            "--data_root",
            small,
            "--architecture",
            "tiny",
            "--epochs",
            "1",
            "--batch_size",
            "12",
            "--runs",
            tmp_path,
            "--name",
            "w",
            *options,
        ],
        env=env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=200,
    )
    return done, time.time() - start


def test_wandb_without_a_key_is_offline_and_asks_nothing(small, tmp_path):
    done, _ = train(small, tmp_path)
    assert done.returncode == 0, done.stderr
    kept = list((tmp_path / "w" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(kept) == 1 and kept[0].stat().st_size > 1000
    assert (tmp_path / "w" / "result.json").exists()


def test_wandb_with_a_dead_server_does_not_cost_the_run(small, tmp_path):
    done, seconds = train(
        small, tmp_path, WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9"
    )
    assert done.returncode == 0 and (tmp_path / "w" / "result.json").exists(), done.stderr
    assert "warning: W&B" in done.stderr and "Traceback" not in done.stderr
    assert list((tmp_path / "w" / "wandb").glob("offline-run-*")), "kept offline"
    assert seconds < 120


def test_without_wandb_installed(small, tmp_path):
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "wandb.py").write_text("raise ImportError('hidden')")
    done, _ = train(small, tmp_path, PYTHONPATH=str(tmp_path / "hide"))
    assert (
        done.returncode == 0
        and "wandb can't be imported" in done.stderr
        and (tmp_path / "w" / "result.json").exists()
    )
