"""SIGKILL at random moments of everything that writes: what is there is whole, the next start finishes, and the end is that of an undisturbed run."""

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

TIMES = (
    "seconds",
    "images_per_s",
    "peak_memory_mb",
)  # what two runs may differ in: keys that end so
GROWING = (
    "metrics.jsonl",
    "checkpoint.pt",
    "results.jsonl",
)  # files that a later start goes on with; the others are there in their last form, or not at all


def plain(value):
    """A value to compare: without times, tensors as lists of their bytes."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if not str(k).endswith(TIMES)}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return (
        (
            str(value.dtype),
            tuple(value.shape),
            value.contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
        )
        if isinstance(value, torch.Tensor)
        else value
    )


def read(path: Path):
    """What a file holds, to compare. Fails if it is not whole."""
    data = path.read_bytes()
    if path.suffix == ".json":
        return plain(json.loads(data))
    if path.suffix == ".jsonl":
        assert data.endswith(b"\n") or not data, f"{path} ends within a line"
        return [plain(json.loads(line)) for line in data.splitlines()]
    if path.suffix == ".csv":
        rows = list(csv.reader(io.StringIO(data.decode(), newline="")))
        assert data.endswith(b"\r\n") and len(rows) > 1 and len({len(row) for row in rows}) == 1, (
            f"{path} has a row cut off"
        )
    elif path.suffix == ".pt":
        return plain(torch.load(path, weights_only=True))
    elif path.suffix == ".npy":
        array = np.load(path, mmap_mode="r")
        assert not cache._problem(path, data[-36:-4], array.shape, array.dtype), (
            f"{path} is not whole"
        )
    elif path.suffix == ".png":
        Image.open(path).load()
    elif path.suffix == ".pdf":
        assert data.startswith(b"%PDF") and data.rstrip().endswith(b"%%EOF"), f"{path} is not whole"
    else:
        assert path.suffix in (".tex", ".md") and data.endswith(b"\n"), f"what is {path}?"
    return data


def files(*folders: Path) -> dict[str, object]:
    """Every file by its path, read; temporary files and the logs of ablate.py apart."""
    return {
        str(p): read(p)
        for folder in folders
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.suffix not in (".tmp", ".txt")
    }


def temporary(folders) -> set[Path]:
    """The files that are being written, and those that a kill has left half-written."""
    return {p for folder in folders for p in folder.rglob(".*.tmp")}


class Story:
    """One command that is killed again and again until it has been killed so often, on a dataset and in a folder of its own."""

    def __init__(self, forks: Forks, folder: Path, command, again=None, alone: bool = False):
        """again: the command's own words for going on with what is there, or None; alone: ablate.py is killed without its children, too."""
        self.forks, self.command, self.again, self.alone, self.folder = (
            forks,
            command,
            again,
            alone,
            folder,
        )
        self.folders = [folder / "runs", folder / "figures", folder / "data" / ".cache"]
        self.kills = self.half_written = self.finished = 0

    def next_start(self):
        begun = self.again and (self.folder / "runs" / "it" / "args.json").exists()
        return self.forks.start(*(self.again if begun else self.command))

    def clear(self):
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)

    def undisturbed(self) -> float:
        """Run it once, keep what it left as the truth, and return the seconds that it took."""
        self.clear()
        start = time.time()
        self.next_start()
        code, self.out, err = self.forks.wait()
        assert code == 0, err
        self.truth, seconds = files(*self.folders), time.time() - start
        self.clear()
        return seconds

    def check(self):
        """Nothing but whole files: such as are rewritten hold a beginning of the truth, all others the truth itself."""
        for name, content in files(*self.folders).items():
            if Path(name).name not in GROWING:
                assert content == self.truth[name], f"{name} is neither old nor new"
            elif (
                name.endswith(".jsonl") and not self.alone
            ):  # points of a grid may end in another order
                assert content == self.truth[name][: len(content)], (
                    f"{name} is not a beginning of what it becomes"
                )

    def kill_often(self, times: int, rng: random.Random):
        """Kill at moments drawn over the whole duration, and every second time as soon as a drawn number of files was being written."""
        seconds = self.undisturbed()
        while self.kills < times:
            left, start = temporary(self.folders), time.time()
            self.next_start()
            until, writes = (
                start + rng.uniform(0, seconds),
                rng.randint(1, 12) if self.kills % 2 else 1000,
            )
            seen, now = set(), left
            while (
                time.time() < until + (5 if writes < 1000 else 0)
                and len(seen) < writes
                and not self.forks.ended(0.001)
            ):
                before, now = now, temporary(self.folders)
                seen |= {(p, time.time()) for p in now - before}
            if not self.forks.ended():
                self.forks.kill(group=not self.alone or self.kills % 3 > 0)
            if (
                self.forks.code != -9
            ):  # it was faster: the truth is reached, and the story begins anew
                self.finish()
                continue
            self.kills += 1
            self.half_written += bool(temporary(self.folders) - left)
            self.check()
        self.next_start()
        self.finish()
        return self

    def finish(self):
        code, out, err = self.forks.wait()
        assert code == 0 and "Traceback" not in err, err
        now = files(*self.folders)
        for name, content in self.truth.items():
            if self.alone and Path(name).name == "results.jsonl":
                assert sorted(map(json.dumps, now.pop(name))) == sorted(map(json.dumps, content)), (
                    "one line a run"
                )
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
    served = Forks(tmp_path_factory.mktemp("forks"))
    yield served
    served.close()


def stories(forks, tmp_path):
    """Name: (kills, story)."""

    def folder(name):
        write_dataset(tmp_path / name / "data", per_class=12)
        return tmp_path / name

    common = ("--architecture", "tiny", "--batch_size", 12, "--wandb", "disabled")

    def train(name, *options):
        own = folder(name)
        return Story(
            forks,
            own,
            (
                "train.py",
                "--data_root",
                own / "data",
                *common,
                *options,
                "--runs",
                own / "runs",
                "--name",
                "it",
            ),
            again=("train.py", "--resume", own / "runs" / "it", "--wandb", "disabled"),
        )

    def explore(name, script, *options):
        own = folder(name)
        return Story(
            forks,
            own,
            (
                f"data_Exploration/{script}",
                "--data_root",
                own / "data",
                *options,
                "--output",
                own / "figures",
                "--pdf",
            ),
        )

    return {
        "training, full, val each epoch": (
            20,
            train("full", "--epochs", 5, "--holdout", "--eval_every", 1),
        ),
        "training, last_blocks": (12, train("blocks", "--epochs", 4, "--strategy", "last_blocks")),
        "training, lora": (8, train("lora", "--epochs", 2, "--strategy", "lora")),
        "keeping features of four views, linear": (
            15,
            train("linear", "--strategy", "linear", "--augment", "crop"),
        ),
        "colours of all classes": (
            10,
            explore("colours", "class_distribution.py", "--all", "--mask", "grabcut"),
        ),
        "description": (
            8,
            explore("describe", "dataset_Description.py", "--hash_bits", 20, "--levels", 100),
        ),
        "Isomap of features": (
            7,
            explore(
                "isomap", "isomap.py", "--features", "clip", "--architecture", "tiny", "--labels"
            ),
        ),
    }


def test_a_few_kills(forks, tmp_path):
    kills, story = stories(forks, tmp_path)["training, full, val each epoch"]
    story.kill_often(4, random.Random(1))
    assert story.finished and story.kills == 4 and story.half_written


@pytest.mark.slow
def test_kills(forks, tmp_path, tally):
    """Decoding, keeping, training, describing."""
    rng, hit = random.Random(8), 0
    for name, (kills, story) in stories(forks, tmp_path).items():
        story.kill_often(kills, rng)
        hit += story.half_written
        tally(
            f"SIGKILL: {name}",
            kills,
            story.kills,
            f"{story.half_written} while a file was half-written; {story.finished} ends equal to the undisturbed one",
        )
    assert hit > 20, "the moments must be such that matter"


@pytest.mark.slow
def test_kills_of_an_evaluation(forks, tmp_path, tally):
    """Of a run, with a curve of WiSE-FT: the same command again goes on."""
    write_dataset(tmp_path / "data", per_class=12)
    common = ("--data_root", tmp_path / "data", "--wandb", "disabled")
    assert (
        forks.run(
            "train.py",
            *common,
            "--architecture",
            "tiny",
            "--epochs",
            2,
            "--runs",
            tmp_path / "models",
            "--name",
            "m",
        )[0]
        == 0
    )
    story = Story(
        forks,
        tmp_path,
        (
            "baseline_eval.py",
            *common,
            "--architecture",
            tmp_path / "models" / "m",
            "--wise_ft",
            0,
            "--wise_ft",
            0.5,
            "--runs",
            tmp_path / "runs",
            "--name",
            "it",
        ),
    )
    story.kill_often(12, random.Random(9))
    tally(
        "SIGKILL: evaluation",
        12,
        story.kills,
        f"{story.half_written} while a file was half-written; {story.finished} ends equal to the undisturbed one",
    )


@pytest.mark.slow
def test_kills_of_an_ablation(forks, tmp_path, tally):
    """Of ablate.py and its children, and of ablate.py alone, whose children go on: each point ends once."""
    write_dataset(tmp_path / "data", per_class=8)
    forks.run(
        "train.py",
        "--data_root",
        tmp_path / "data",
        "--wandb",
        "disabled",
        "--architecture",
        "tiny",
        "--epochs",
        0,
        "--runs",
        tmp_path / "models",
        "--name",
        "m",
    )
    story = Story(
        forks,
        tmp_path,
        (
            "ablate.py",
            "positives",
            "--architecture",
            tmp_path / "models" / "m" / "model.pt",
            "--data_root",
            tmp_path / "data",
            "--runs",
            tmp_path / "runs",
            "--wandb",
            "disabled",
            "--seeds",
            0,
            "--batch_size",
            12,
            "--epochs",
            2,
        ),
        alone=True,
    )
    story.kill_often(8, random.Random(10))
    tally(
        "SIGKILL: ablation",
        8,
        story.kills,
        f"{story.half_written} while a file was half-written; {story.finished} ends equal to the undisturbed one",
    )
