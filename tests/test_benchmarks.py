"""The table of `make bench`, from real measurements on small data; how fast anything is, no test says."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

UNITS = {"s": 1, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}


def test_the_table_has_a_row_for_every_peer(small, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "benchmarks/table.py",
            "--data_root",
            str(small),
            "--only",
            "pixels",
            "--rounds",
            "1",
            "--output",
            str(tmp_path / "results.md"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "results.md").read_text()
    assert text in done.stdout and "1 alternating rounds" in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if "**" in line]
    assert [row[1].split()[0] for row in rows] == ["PIL", "open_clip's", "torchvision"] * 2
    for _, _, theirs, ours, ratio, limit in rows:
        value, unit = theirs.split()
        mine, my_unit = ours.rsplit(", ", 1)[1].split()
        expected = float(value) * UNITS[unit] / (float(mine) * UNITS[my_unit])
        assert float(re.match(r"\*\*([\d,.]+)\*\*", ratio)[1].replace(",", "")) == pytest.approx(
            expected, rel=0.06
        ), "one round: the ratio of the two times"
        assert "times that" in limit


def test_a_benchmark_that_fails_leaves_no_table(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "benchmarks/table.py",
            "--data_root",
            str(tmp_path),
            "--only",
            "pixels",
            "--output",
            str(tmp_path / "results.md"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (
        done.returncode == 2
        and "benchmark pixels failed" in done.stderr
        and not (tmp_path / "results.md").exists()
    )
