"""The table of `make bench`, from real measurements on small data. No test says how fast it is."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from flowers.choices import STRATEGIES

UNITS = {"s": 1, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}


def run_table(*arguments):
    """Run benchmarks/table.py, the benchmark `pixels` alone."""
    words = [sys.executable, "benchmarks/table.py", "--only", "pixels", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT)


def parse_seconds(text):
    """'1.24 ms' in seconds."""
    value, unit = text.split()
    return float(value) * UNITS[unit]


def test_the_table_has_a_row_for_every_peer(small, tmp_path):
    output = tmp_path / "results.md"
    done = run_table("--data_root", small, "--rounds", 1, "--output", output)
    assert done.returncode == 0, done.stderr[-2000:]
    text = output.read_text()
    assert text in done.stdout
    assert "1 alternating rounds" in text

    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if "**" in line]
    peers = [row[1].split()[0] for row in rows]
    assert peers == ["PIL", "open_clip's", "torchvision"] * 2
    for _, _, theirs, ours, ratio, limit in rows:
        theirs_s = parse_seconds(theirs)
        ours_s = parse_seconds(ours.rsplit(", ", 1)[1])
        printed = float(re.match(r"\*\*([\d,.]+)\*\*", ratio)[1].replace(",", ""))
        # in one round the ratio is that of the two times, which are printed in three digits
        assert printed == pytest.approx(theirs_s / ours_s, rel=0.06)
        assert "times that" in limit


def test_a_benchmark_that_fails_leaves_no_table(tmp_path):
    output = tmp_path / "results.md"
    done = run_table("--data_root", tmp_path, "--output", output)
    assert done.returncode == 2
    assert "benchmark pixels failed" in done.stderr
    assert not output.exists()


# Runs benchmarks/startup.py with one script alone, and a limit that needs no torch.
ONE_SCRIPT = """
import sys
sys.path.insert(0, "benchmarks")
import startup
startup.SCRIPTS = ("test_models.py", "predict.py")
startup.EXPLORATION = ()
works = startup.works
startup.works = lambda *arguments: works(*arguments)[:2]
startup.main()
"""


def test_starting_is_measured_beside_another_checkout(tmp_path):
    older = tmp_path / "older"
    older.mkdir()
    # A script that takes half a second of the processor to start, and lacks predict.py.
    slow = "import time\nwhile time.process_time() < 0.5: pass\n"
    (older / "test_models.py").write_text(slow)
    rows = tmp_path / "rows.jsonl"
    words = ["--before", older, "--rounds", 2, "--points", 0, "--rows", rows]
    done = subprocess.run(
        [sys.executable, "-c", ONE_SCRIPT, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = map(json.loads, rows.read_text().splitlines())
    assert first["what"] == "CPU of `test_models.py --help`"
    assert first["peer"].startswith("older, ") and first["peer"].endswith(" MB")
    assert first["theirs_s"] >= 0.5
    assert second["peer"] == "an empty Python process", "there is no older predict.py"
    for row in (first, second):
        assert row["rounds"] == 2
        assert 0 < row["limit_s"] < row["ours_s"], "an empty process starts sooner"


def run_gpu(*arguments):
    words = [sys.executable, "benchmarks/gpu.py", *map(str, arguments)]
    without_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=without_gpu)


def test_the_benchmark_for_a_gpu_runs_without_one_in_small(tmp_path):
    """All of its ways, so that only what is CUDA's own is left to be seen on a GPU."""
    output = tmp_path / "gpu.md"
    done = run_gpu("--smoke", "--output", output)
    assert done.returncode == 0, done.stderr[-2000:]
    text = output.read_text()
    assert text in done.stdout
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if "| tiny |" in line]
    ways = [row[1] for row in rows]
    assert ways[:3] == ["full", "plain recipe, PIL DataLoader", "open_clip, train_one_epoch"]
    assert set(STRATEGIES) < set(ways) and len(ways) == len(STRATEGIES) + 2
    for _, _, images_per_s, total_s, share, memory_mb, timed, waits in rows:
        n_timed, n_steps = map(int, timed.split(" of "))
        assert 1 <= n_timed <= n_steps
        # 48 images at this rate, then the evaluation.
        assert float(total_s) > 0.9 * 48 / float(images_per_s.replace(",", ""))
        assert 0 <= int(share.rstrip("%")) < 150
        assert int(memory_mb.replace(",", "")) > 100
        assert waits == "-", "CUDA counts them"


def test_the_benchmark_for_a_gpu_needs_one_for_its_table(tmp_path):
    done = run_gpu("--output", tmp_path / "gpu.md")
    assert done.returncode == 2 and "no GPU here" in done.stderr
    assert not (tmp_path / "gpu.md").exists()


def test_a_way_that_fails_costs_the_benchmark_for_a_gpu_no_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    def measure(task, name, allowed, peak):
        if name == "text":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if name == "lora":
            raise ZeroDivisionError
        return f"| {task.architecture} | {name} | 1 |"

    monkeypatch.setattr(gpu, "measure", measure)
    output = tmp_path / "gpu.md"
    words = ["gpu.py", "--smoke", "--ways", "text", "norm", "lora", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(ZeroDivisionError):
        gpu.main()
    rows = [line.split(" | ")[1:3] for line in output.read_text().splitlines() if "tiny" in line]
    assert rows == [["text", "the memory was not enough"], ["norm", "1 |"]]
