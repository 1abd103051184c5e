"""SIGKILL at random moments of everything that writes: what is there is whole, the next start
finishes, and the end is that of an undisturbed run.
"""

import csv
import io
import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_dataset
from forks import Forks
from PIL import Image

from flowers import cache

# Two runs may differ in these: keys that end so.
TIMES = ("seconds", "images_per_s", "peak_memory_mb")
# Files that a later start goes on with. The others are there in their last form, or not at all.
GROWING = ("metrics.jsonl", "checkpoint.pt", "results.jsonl")
# How often it was killed during a write, for the table at the end of the session.
NOTE = "{} while a file was half-written; {} ends equal to the undisturbed one"


# -----------------------------------------------------------------------------
# reading what a run has left


def plain(value):
    """A value to compare: without times, tensors as their dtype, shape and bytes."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if not str(k).endswith(TIMES)}
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, torch.Tensor):
        data = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), data
    return value


def read(path: Path):
    """What a file holds, to compare. Fails if it is not whole."""
    data = path.read_bytes()
    if path.suffix == ".json":
        return plain(json.loads(data))
    if path.suffix == ".jsonl":
        assert data.endswith(b"\n") or not data, f"{path} ends within a line"
        return [plain(json.loads(line)) for line in data.splitlines()]
    if path.suffix == ".pt":
        return plain(torch.load(path, weights_only=True))

    if path.suffix == ".csv":
        rows = list(csv.reader(io.StringIO(data.decode(), newline="")))
        widths = {len(row) for row in rows}
        complete = data.endswith(b"\r\n") and len(rows) > 1 and len(widths) == 1
        assert complete, f"{path} has a row cut off"
    elif path.suffix == ".npy":
        array = np.load(path, mmap_mode="r")
        key = data[-36:-4]  # 32 bytes, before the checksum of 4
        problem = cache._find_problem(path, key, array.shape, array.dtype)
        assert not problem, f"{path} is not whole"
    elif path.suffix == ".png":
        Image.open(path).load()
    elif path.suffix == ".pdf":
        assert data.startswith(b"%PDF"), f"{path} is not whole"
        assert data.rstrip().endswith(b"%%EOF"), f"{path} is not whole"
    else:
        assert path.suffix in (".tex", ".md"), f"what is {path}?"
        assert data.endswith(b"\n"), f"what is {path}?"
    return data


def files(*folders: Path) -> dict[str, object]:
    """Every file by its path, read; temporary files and the logs of ablate.py apart."""
    contents = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix not in (".tmp", ".txt"):
                contents[str(path)] = read(path)
    return contents


def temporary(folders) -> set[Path]:
    """The files that are being written, and those that a kill has left half-written."""
    return {path for folder in folders for path in folder.rglob(".*.tmp")}


# -----------------------------------------------------------------------------
# a command that is killed again and again


class Story:
    """One command that is killed so often, on a dataset and in a folder of its own."""

    def __init__(self, forks: Forks, folder: Path, command, resume=None, alone: bool = False):
        """resume: the command that goes on with what is there, if it is another one.

        alone: ablate.py is also killed without its children.
        """
        self.forks = forks
        self.command = command
        self.resume = resume
        self.alone = alone
        self.folder = folder
        self.folders = [folder / "runs", folder / "figures", folder / "data" / ".cache"]
        self.kills = 0
        self.half_written = 0
        self.finished = 0

    def start(self):
        started_before = (self.folder / "runs" / "it" / "args.json").exists()
        if self.resume and started_before:
            self.forks.start(*self.resume)
        else:
            self.forks.start(*self.command)

    def clear(self):
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)

    def undisturbed(self) -> float:
        """Run it once, keep what it left as the truth, and return the seconds that it took."""
        self.clear()
        start = time.time()
        self.start()
        code, self.out, err = self.forks.wait()
        assert code == 0, err
        self.truth = files(*self.folders)
        seconds = time.time() - start
        self.clear()
        return seconds

    def kill_often(self, times: int, rng: random.Random):
        """Kill so many times, at random moments over the whole duration.

        Every second time it is killed as soon as a random number of files was being written.
        """
        seconds = self.undisturbed()
        while self.kills < times:
            left_over = temporary(self.folders)
            start = time.time()
            self.start()
            until = start + rng.uniform(0, seconds)
            if self.kills % 2:
                # writing is what is waited for, so it gets five seconds more
                self.watch(left_over, until + 5, rng.randint(1, 12))
            else:
                self.watch(left_over, until, 1000)
            if not self.forks.ended():
                self.forks.kill(group=not self.alone or self.kills % 3 > 0)
            if self.forks.code != -9:
                # it was faster: the truth is reached, and the story begins anew
                self.finish()
                continue
            self.kills += 1
            self.half_written += bool(temporary(self.folders) - left_over)
            self.check()
        self.start()
        self.finish()
        return self

    def watch(self, left_over: set[Path], until: float, writes: int) -> None:
        """Wait until a moment, so many writes, or the end of the child, whatever is first."""
        seen = 0
        now = left_over
        while time.time() < until and seen < writes and not self.forks.ended(0.001):
            before, now = now, temporary(self.folders)
            seen += len(now - before)

    def check(self):
        """Nothing but whole files: the growing ones hold a beginning of the truth, all others the
        truth itself.
        """
        for name, content in files(*self.folders).items():
            if Path(name).name not in GROWING:
                assert content == self.truth[name], f"{name} is neither old nor new"
            # points of a grid may end in another order
            elif name.endswith(".jsonl") and not self.alone:
                beginning = self.truth[name][: len(content)]
                assert content == beginning, f"{name} is not a beginning of what it becomes"

    def finish(self):
        """Wait for the end, and compare all that is there with the truth."""
        code, out, err = self.forks.wait()
        assert code == 0, err
        assert "Traceback" not in err, err
        now = files(*self.folders)
        for name, content in self.truth.items():
            if self.alone and Path(name).name == "results.jsonl":
                # one line a run, in any order
                lines = sorted(json.dumps(row) for row in now.pop(name))
                assert lines == sorted(json.dumps(row) for row in content), "one line a run"
            else:
                assert now.pop(name) == content, f"{name} differs from that of the undisturbed run"
        assert not now, f"{list(now)} are left over"
        assert not temporary(self.folders), "half-written files of killed processes stay for ever"
        if self.command[0].startswith("data_Exploration"):  # the others print times
            assert out == self.out
        self.finished += 1
        self.clear()


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    server = Forks(tmp_path_factory.mktemp("forks"))
    yield server
    server.close()


def stories(forks, tmp_path):
    """Name: (kills, story)."""
    quiet = ("--wandb", "disabled")

    def new_folder(name):
        write_dataset(tmp_path / name / "data", per_class=12)
        return tmp_path / name

    def train(name, *options):
        folder = new_folder(name)
        data = ("--data_root", folder / "data", "--architecture", "tiny", "--batch_size", 12)
        run = ("--runs", folder / "runs", "--name", "it")
        command = ("train.py", *data, *quiet, *options, *run)
        resume = ("train.py", "--resume", folder / "runs" / "it", *quiet)
        return Story(forks, folder, command, resume=resume)

    def explore(name, script, *options):
        folder = new_folder(name)
        data = ("--data_root", folder / "data")
        output = ("--output", folder / "figures", "--pdf")
        command = (f"data_Exploration/{script}", *data, *options, *output)
        return Story(forks, folder, command)

    full = train("full", "--epochs", 5, "--holdout", "--eval_every", 1)
    blocks = train("blocks", "--epochs", 4, "--strategy", "last_blocks")
    lora = train("lora", "--epochs", 2, "--strategy", "lora")
    linear = train("linear", "--strategy", "linear", "--augment", "crop")
    colours = explore("colours", "class_distribution.py", "--all", "--mask", "grabcut")
    describe = explore("describe", "dataset_Description.py", "--hash_bits", 20, "--levels", 100)
    clip_features = ("--features", "clip", "--architecture", "tiny", "--labels")
    isomap = explore("isomap", "isomap.py", *clip_features)
    return {
        "training, full, val each epoch": (20, full),
        "training, last_blocks": (12, blocks),
        "training, lora": (8, lora),
        "keeping features of four views, linear": (15, linear),
        "colours of all classes": (10, colours),
        "description": (8, describe),
        "Isomap of features": (7, isomap),
    }


# -----------------------------------------------------------------------------
# tests


def test_a_few_kills(forks, tmp_path):
    _, story = stories(forks, tmp_path)["training, full, val each epoch"]
    story.kill_often(4, random.Random(1))
    assert story.finished
    assert story.kills == 4
    assert story.half_written


@pytest.mark.slow
def test_kills(forks, tmp_path, tally):
    """Decoding, keeping, training, describing."""
    rng = random.Random(8)
    half_written = 0
    for name, (kills, story) in stories(forks, tmp_path).items():
        story.kill_often(kills, rng)
        half_written += story.half_written
        note = NOTE.format(story.half_written, story.finished)
        tally(f"SIGKILL: {name}", kills, story.kills, note)
    assert half_written > 20, "the moments must be such that matter"


@pytest.mark.slow
def test_kills_of_an_evaluation(forks, tmp_path, tally):
    """Of a run, with a curve of WiSE-FT: the same command again goes on."""
    write_dataset(tmp_path / "data", per_class=12)
    common = ("--data_root", tmp_path / "data", "--wandb", "disabled")
    model = ("--runs", tmp_path / "models", "--name", "m")
    trained = forks.run("train.py", *common, "--architecture", "tiny", "--epochs", 2, *model)
    assert trained[0] == 0

    start = ("--architecture", tmp_path / "models" / "m", "--wise_ft", 0, "--wise_ft", 0.5)
    run = ("--runs", tmp_path / "runs", "--name", "it")
    story = Story(forks, tmp_path, ("baseline_eval.py", *common, *start, *run))
    story.kill_often(12, random.Random(9))
    note = NOTE.format(story.half_written, story.finished)
    tally("SIGKILL: evaluation", 12, story.kills, note)


@pytest.mark.slow
def test_kills_of_an_ablation(forks, tmp_path, tally):
    """Of ablate.py and its children, and of ablate.py alone, whose children go on: each point ends
    once.
    """
    write_dataset(tmp_path / "data", per_class=8)
    common = ("--data_root", tmp_path / "data", "--wandb", "disabled")
    model = ("--runs", tmp_path / "models", "--name", "m")
    forks.run("train.py", *common, "--architecture", "tiny", "--epochs", 0, *model)

    start = ("--architecture", tmp_path / "models" / "m" / "model.pt")
    options = ("--runs", tmp_path / "runs", "--seeds", 0, "--batch_size", 12, "--epochs", 2)
    command = ("ablate.py", "positives", *start, *common, *options)
    story = Story(forks, tmp_path, command, alone=True)
    story.kill_often(8, random.Random(10))
    note = NOTE.format(story.half_written, story.finished)
    tally("SIGKILL: ablation", 8, story.kills, note)
