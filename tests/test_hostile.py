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


@pytest.mark.parametrize("most", [300, 5000, 1_000_000])
def test_files_that_may_not_grow(forks, small, model, tmp_path, most):
    """The same by a limit of the process, for which one need not be root: the cache, args.json, model.pt, a figure."""
    for script in ("train", "colours"):
        command = commands(small, model, tmp_path)[script]
        outcome = forks.run(*command, file_size=most)
        if script == "colours" and most == 1_000_000:
            assert outcome[0] == 0
        else:
            assert "File too large" in error_line(outcome) and "'/" in error_line(outcome)
    assert all(Path(name).name in ("args.json", "metrics.jsonl") for name in whole(tmp_path / "runs"))
    code, out, err = forks.run("train.py", "--resume", tmp_path / "runs" / "it") if (tmp_path / "runs/it/args.json").exists() else forks.run(*commands(
        small, model, tmp_path)["train"])
    assert code == 0, err


def test_a_line_of_results_that_was_cut_off_is_written_again(forks, small, model, tmp_path):
    line = (model.parent / "results.jsonl").read_bytes()
    shutil.copytree(model, tmp_path / "m")
    other = json.dumps({"name": "x" * 1000}).encode() + b"\n"
    (tmp_path / "results.jsonl").write_bytes(other)
    assert "results.jsonl" in error_line(forks.run("train.py", "--resume", tmp_path / "m", file_size=len(other) + 100))
    assert (tmp_path / "results.jsonl").read_bytes() == other + line[:100]
    for _ in range(2):
        assert forks.run("train.py", "--resume", tmp_path / "m")[0] == 0
        assert read_lines(tmp_path / "results.jsonl") == [json.loads(other), json.loads(line)]


# ---------------------------------------------------------------- permission

def test_read_only_data(forks, small, copy, model, tmp_path):
    """On a read-only mount the caches go to the user's folder, and nothing else changes."""
    env = {"XDG_CACHE_HOME": str(tmp_path / "home")}
    before = sorted(p.relative_to(copy) for p in copy.rglob("*"))
    with mounted(tmp_path / "mount", "--bind", copy) as place:
        subprocess.run(["mount", "-o", "remount,ro,bind", place], check=True)
        with pytest.raises(OSError):
            (place / "x").write_text("x")
        for script in ("linear", "colours"):
            code, _, err = forks.run(*[place if x == small else x for x in commands(small, model, tmp_path)[script]], env=env)
            assert code == 0, err
    assert sorted(p.relative_to(copy) for p in copy.rglob("*")) == before
    assert {p.name.split("-")[0] for p in (tmp_path / "home").rglob("*.npy")} == {"pixels", "frozen", "hsv"}


def test_another_user_s_data_runs_and_cache(forks, small, model, open_folder, copy):
    """What root has made and others may only read: data, its cache, a run."""
    shutil.copytree(copy, open_folder / "data")
    shutil.copytree(model, open_folder / "m")
    (open_folder / "mine").mkdir()
    (open_folder / "mine").chmod(0o777)
    mine, theirs = {"HOME": str(open_folder / "mine"), "XDG_CACHE_HOME": ""}, {"uid": NOBODY, "cwd": str(open_folder)}
    command = lambda script, place: [open_folder / ("data" if x == small else "m") if x in (small, model) else x for x in commands(small, model, place)[script]]
    for script in ("linear", "evaluation", "isomap"):  # a cache of one's own
        code, _, err = forks.run(*command(script, open_folder / "mine" / script), env=mine, **theirs)
        assert code == 0, err
    assert not (open_folder / "data" / ".cache").exists()
    forbidden = {"HOME": "/nowhere", "XDG_CACHE_HOME": ""}
    assert "Permission denied: '/nowhere" in error_line(forks.run(*command("train", open_folder / "mine"), env=forbidden, **theirs))

    (open_folder / "data").chmod(0o777)  # a shared folder, whose cache root makes: others use it, and make what is missing of their own
    assert forks.run(*command("linear", open_folder / "root"))[0] == 0
    made = {p: p.stat().st_mtime_ns for p in (open_folder / "data" / ".cache").iterdir()}
    for i, mode in enumerate((0o755, 0o777)):
        (open_folder / "data" / ".cache").chmod(mode)
        for script in ("linear", "colours"):
            code, _, err = forks.run(*command(script, open_folder / "mine" / str(i)), env=mine, **theirs)
            assert code == 0, err
    assert all(p.stat().st_mtime_ns == t for p, t in made.items())

    (open_folder / "data").chmod(0o755)
    for script in SCRIPTS[:-1]:  # runs and figures that may not be written
        outcome = forks.run(*command(script, open_folder / "root"), env=mine, **theirs)
        assert "Permission denied" in error_line(outcome) or "is a run already" in error_line(outcome), script
    (open_folder / "m" / "result.json").unlink()
    outcome = forks.run("train.py", "--resume", open_folder / "m", env=mine, **theirs)
    assert "Permission denied" in error_line(outcome)


def test_files_that_may_not_be_read(forks, small, model, open_folder, copy):
    data, run = shutil.copytree(copy, open_folder / "data"), shutil.copytree(model, open_folder / "m")
    (open_folder / "captions.jsonl").write_text("{}")
    (open_folder / "mine").mkdir()
    (open_folder / "mine").chmod(0o777)
    command = ("baseline_eval.py", "--data_root", data, "--architecture", run, "--compare", run, "--wise_ft", 0.5, "--captions", open_folder / "captions.jsonl",
               "--runs", open_folder / "mine", "--wandb", "disabled")
    theirs = {"uid": NOBODY, "cwd": str(open_folder), "env": {"HOME": str(open_folder / "mine"), "XDG_CACHE_HOME": ""}}
    tried = (data / "jpg" / "image_00009.jpg", data / "jpg", data / "imagelabels.mat", data / "setid.mat", data / "cat_to_name.json", run / "model.pt",
             run / "result.json", run / "args.json", open_folder / "captions.jsonl", run, data)
    for path in tried:
        mode = path.stat().st_mode
        path.chmod(0)
        options = command if "captions" in path.name else [x for x in command if x not in ("--captions", open_folder / "captions.jsonl")]
        outcome = forks.run(*options, **theirs)
        assert outcome[0] and (str(path) if path != run / "args.json" else "args.json") in error_line(outcome), (path, outcome)
        path.chmod(mode)
    assert forks.run(*options, **theirs)[0] == 0
    (run / "args.json").chmod(0)
    assert "Permission denied" in error_line(forks.run("train.py", "--resume", run, **theirs))


def test_folders_that_are_files(forks, small, model, tmp_path):
    place = tmp_path / "file"
    place.write_text("keep me")
    for script in SCRIPTS:
        assert str(place) in error_line(forks.run(*commands(small, model, place)[script])), script
        into = [place if x in (place / "runs", place / "figures") else x for x in commands(small, model, place)[script]]
        assert str(place) in error_line(forks.run(*into)), script
    assert "no finished run" in error_line(forks.run("report.py", "--runs", place, "--output", tmp_path / "report"))
    assert str(place) in error_line(forks.run("ablate.py", "positives", "--architecture", model / "model.pt", "--data_root", small, "--runs", place))
    assert place.read_text() == "keep me"
