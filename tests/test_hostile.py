"""A place that does not help: full disks, forbidden folders, closed pipes, odd locales, servers that lie, others who do the same at once."""
import contextlib
import functools
import hashlib
import http.server
import io
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import clip
import pytest
import torch
from conftest import ROOT, error_line, write_dataset
from forks import Forks
from test_kills import GROWING, files
from torchvision.datasets import Flowers102

from flowers import data, models
from flowers.runs import read_lines

NOBODY = 65534
FEW = ("--batch_size", 12, "--wandb", "disabled")
TINY = ("--architecture", "tiny", *FEW)


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    served = Forks(tmp_path_factory.mktemp("forks"))
    yield served
    served.close()


@pytest.fixture
def copy(small, tmp_path):
    return shutil.copytree(small, tmp_path / "copy", ignore=shutil.ignore_patterns(".cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory, small, forks):
    """A finished run of two epochs, for what starts from one."""
    runs = tmp_path_factory.mktemp("model")
    assert forks.run("train.py", "--data_root", small, *TINY, "--epochs", 2, "--runs", runs, "--name", "m")[0] == 0
    return runs / "m"


@contextlib.contextmanager
def mounted(where: Path, *options: str):
    where.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *options, where], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount is not permitted here: {done.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=True)


@pytest.fixture
def open_folder():
    """A folder in which another user may do everything; pytest's own are for the one who runs the tests alone."""
    if os.getuid() or not all(p.stat().st_mode & stat.S_IXOTH for p in (ROOT, *ROOT.parents)):
        pytest.skip("only root can become another user, and the repository must be where that one can read it")
    folder = Path(tempfile.mkdtemp(prefix="open-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def commands(small, model, place):
    """What each script writes to `place`, as a command."""
    explore = lambda script, *options: (f"data_Exploration/{script}", "--data_root", small, *options, "--output", place / "figures")
    return {
        "train": ("train.py", "--data_root", small, *TINY, "--epochs", 2, "--runs", place / "runs", "--name", "it", "--holdout", "--eval_every", 1),
        "linear": ("train.py", "--data_root", small, *TINY, "--strategy", "linear", "--runs", place / "runs", "--name", "it"),
        "evaluation": ("baseline_eval.py", "--data_root", small, "--architecture", model, "--wise_ft", 0.5, "--runs", place / "runs", "--name", "it",
                       "--wandb", "disabled"),
        "description": explore("dataset_Description.py", "--hash_bits", 20, "--levels", 100, "--pdf"),
        "colours": explore("class_distribution.py", "--all", "--pdf"),
        "isomap": explore("isomap.py", "--labels", "--pdf"),
        "report": ("report.py", "--runs", model.parent, "--output", place / "figures", "--bootstrap", 10)}


SCRIPTS = ("train", "linear", "evaluation", "description", "colours", "isomap", "report")


def whole(folder: Path) -> dict:
    """The files below, each whole (test_kills.read); nothing half-written is left."""
    assert not list(folder.rglob(".*.tmp"))
    kept = files(*(p for p in folder.rglob("*") if p.is_dir() and p.name not in ("jpg", "data"))) if folder.is_dir() else {}
    return kept


# ---------------------------------------------------------------- room

@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_full_disk(forks, small, model, tmp_path, script, tally):
    """Data with its cache, runs and figures on a disk that has more and more to spare: until it is enough, one line that names the file, and what
    was there before is as it was; then the same command, or --resume, comes to its end."""
    failed = 0
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=200m", "none") as disk:
        shutil.copytree(small, disk / "data", ignore=shutil.ignore_patterns(".cache"))
        command = [disk / "data" if x == small else x for x in commands(small, model, disk)[script]]
        if script == "report":  # an earlier report is there
            assert forks.run(*command)[0] == 0
        for free in (0, 8, 40, 100, 200, 500, 1000, 4000, 27000, 30000, 60000, 100000, 150000):  # kB
            room = os.statvfs(disk)
            with (disk / "full").open("wb") as full:
                os.posix_fallocate(full.fileno(), 0, max(4096, room.f_bavail * room.f_frsize - 1024 * free))
            before, outcome = whole(disk), forks.run(*command)
            (disk / "full").unlink()
            after = whole(disk)
            if outcome[0] == 0:
                break
            failed += 1
            line = error_line(outcome)
            assert ("No space left" in line or "no room" in line) and str(disk) in line, f"what, and which file? {line}"
            assert all(after[name] == content for name, content in before.items() if Path(name).name not in GROWING)
            if script in ("train", "linear") and (disk / "runs/it/args.json").exists():
                command = ["train.py", "--resume", disk / "runs" / "it", "--wandb", "disabled"]
    assert outcome[0] == 0 and failed > 1, (failed, outcome)
    tally(f"full disk: {script}", failed, failed, "one line that names the file, nothing half-written; then finished where there was room")
