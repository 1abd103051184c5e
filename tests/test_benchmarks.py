"""The table of `make bench`, from real measurements on small data. No test says how fast it is."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

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
