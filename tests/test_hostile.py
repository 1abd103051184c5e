"""A computer that does not help: full disks, forbidden folders, closed pipes, rare locales, servers
that lie, others who do the same at once."""

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

from flowers import UserError, download, models, weights
from flowers.files import load_tensors, read_lines, write_json

NOBODY = 65534  # the user of that name
TINY = ("--architecture", "tiny", "--batch_size", 12, "--wandb", "disabled")
SCRIPTS = ("train", "linear", "evaluation", "description", "colours", "isomap", "report")
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    served = Forks(tmp_path_factory.mktemp("forks"))
    yield served
    served.close()


@pytest.fixture
def copy(small, tmp_path):
    """A dataset of the test's own, without a cache."""
    return shutil.copytree(small, tmp_path / "copy", ignore=shutil.ignore_patterns(".cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory, small, forks):
    """A finished run of two epochs, for what starts from one."""
    runs = tmp_path_factory.mktemp("model")
    command = ["train.py", "--data_root", small, *TINY]
    command += ["--epochs", 2, "--runs", runs, "--name", "m"]
    assert forks.run(*command)[0] == 0
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
    """A folder in which another user may do everything; pytest's own are closed to others."""
    is_root = os.getuid() == 0
    if not is_root or not all(p.stat().st_mode & stat.S_IXOTH for p in (ROOT, *ROOT.parents)):
        pytest.skip(
            "only root can become another user, "
            "and the repository must be where that one can read it"
        )
    folder = Path(tempfile.mkdtemp(prefix="open-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def commands(data, model, place: Path, name: str = "it") -> dict[str, list]:
    """What each of SCRIPTS writes to `place`, as a command; runs have the name `name`."""
    runs = ["--runs", place / "runs", "--name", name]
    figures = ["--output", place / "figures"]
    train = ["train.py", "--data_root", data, *TINY]
    evaluation = ["baseline_eval.py", "--data_root", data, "--architecture", model]
    description = ["data_Exploration/dataset_Description.py", "--data_root", data]
    colours = ["data_Exploration/class_distribution.py", "--data_root", data]
    isomap = ["data_Exploration/isomap.py", "--data_root", data]
    report = ["report.py", "--runs", Path(model).parent]
    return {
        "train": [*train, "--epochs", 2, *runs, "--holdout", "--eval_every", 1],
        "linear": [*train, "--strategy", "linear", *runs],
        "evaluation": [*evaluation, "--wise_ft", 0.5, *runs, "--wandb", "disabled"],
        "description": [*description, "--hash_bits", 20, "--levels", 100, "--pdf", *figures],
        "colours": [*colours, "--all", "--pdf", *figures],
        "isomap": [*isomap, "--labels", "--pdf", *figures],
        "report": [*report, *figures, "--bootstrap", 10],
    }


def whole(folder: Path) -> dict:
    """The files below, each read and whole (test_kills.read); nothing half-written is left."""
    assert not list(folder.rglob(".*.tmp"))
    if not folder.is_dir():
        return {}
    folders = [path for path in folder.rglob("*") if path.is_dir()]
    return files(*(path for path in folders if path.name not in ("jpg", "data")))


# -----------------------------------------------------------------------------
# room


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_full_disk(forks, small, model, tmp_path, script, tally):
    """Data with its cache, runs and figures on a disk that has more and more to spare.

    Until it is enough, there is one line that names the file, and what was there before is as it
    was; then the same command, or --resume, comes to its end.
    """
    failed = 0
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=200m", "none") as disk:
        shutil.copytree(small, disk / "data", ignore=shutil.ignore_patterns(".cache"))
        command = commands(disk / "data", model, disk)[script]
        if script == "report":  # an earlier report is there
            assert forks.run(*command)[0] == 0
        free_kb = (0, 8, 40, 100, 200, 500, 1000, 4000, 27000, 30000, 60000, 100000, 150000)
        for free in free_kb:
            room = os.statvfs(disk)
            filler = max(4096, room.f_bavail * room.f_frsize - 1024 * free)
            with (disk / "full").open("wb") as full:
                os.posix_fallocate(full.fileno(), 0, filler)
            before = whole(disk)
            outcome = forks.run(*command)
            (disk / "full").unlink()
            after = whole(disk)
            if outcome[0] == 0:
                break

            failed += 1
            line = error_line(outcome)
            assert "No space left" in line or "no room" in line, line
            assert str(disk) in line, f"which file? {line}"
            for name, content in before.items():
                if Path(name).name not in GROWING:
                    assert after[name] == content, name
            if script in ("train", "linear") and (disk / "runs/it/args.json").exists():
                command = ["train.py", "--resume", disk / "runs" / "it", "--wandb", "disabled"]
    assert outcome[0] == 0 and failed > 1, (failed, outcome)
    tally(
        f"full disk: {script}",
        failed,
        failed,
        "one line that names the file, nothing half-written; then finished where there was room",
    )


@pytest.mark.parametrize("most", [slow(300), 5000, slow(1_000_000)])
def test_files_that_may_not_grow(forks, small, model, tmp_path, most):
    """The same by a limit of the process, for which one need not be root.

    It meets the cache, args.json, model.pt and a figure.
    """
    train = commands(small, model, tmp_path)["train"]
    colours = commands(small, model, tmp_path)["colours"]
    line = error_line(forks.run(*train, file_size=most))
    assert "File too large" in line and "'/" in line
    outcome = forks.run(*colours, file_size=most)
    if most == 1_000_000:
        assert outcome[0] == 0
    else:
        line = error_line(outcome)
        assert "File too large" in line and "'/" in line

    left = {Path(name).name for name in whole(tmp_path / "runs")}
    assert left <= {"args.json", "metrics.jsonl"}
    run = tmp_path / "runs" / "it"
    again = ["train.py", "--resume", run] if (run / "args.json").exists() else train
    code, _, err = forks.run(*again)
    assert code == 0, err


def test_a_line_of_results_that_was_cut_off_is_written_again(forks, small, model, tmp_path):
    results = tmp_path / "results.jsonl"
    line = (model.parent / "results.jsonl").read_bytes()
    other = json.dumps({"name": "x" * 1000}).encode() + b"\n"
    shutil.copytree(model, tmp_path / "m")
    results.write_bytes(other)
    resume = ["train.py", "--resume", tmp_path / "m"]

    outcome = forks.run(*resume, file_size=len(other) + 100)
    assert "results.jsonl" in error_line(outcome)
    assert results.read_bytes() == other + line[:100]
    for _ in range(2):
        assert forks.run(*resume)[0] == 0
        assert read_lines(results) == [json.loads(other), json.loads(line)]


# -----------------------------------------------------------------------------
# permission


def test_read_only_data(forks, copy, model, tmp_path):
    """On a read-only mount the caches go to the user's folder, and nothing else changes."""
    env = {"XDG_CACHE_HOME": str(tmp_path / "home")}
    before = sorted(path.relative_to(copy) for path in copy.rglob("*"))
    with mounted(tmp_path / "mount", "--bind", copy) as data:
        subprocess.run(["mount", "-o", "remount,ro,bind", data], check=True)
        with pytest.raises(OSError):
            (data / "x").write_text("x")
        for script in ("linear", "colours"):
            code, _, err = forks.run(*commands(data, model, tmp_path)[script], env=env)
            assert code == 0, err
    assert sorted(path.relative_to(copy) for path in copy.rglob("*")) == before
    caches = {path.name.split("-")[0] for path in (tmp_path / "home").rglob("*.npy")}
    assert caches == {"pixels", "frozen", "hsv"}


@pytest.mark.slow
def test_another_user_s_data_runs_and_cache(forks, model, open_folder, copy):
    """What root has made and others may only read: data, its cache, a run."""
    data = Path(shutil.copytree(copy, open_folder / "data"))
    run = Path(shutil.copytree(model, open_folder / "m"))
    mine = open_folder / "mine"
    mine.mkdir()
    mine.chmod(0o777)
    other_user = {"uid": NOBODY, "cwd": str(open_folder)}
    env = {"HOME": str(mine), "XDG_CACHE_HOME": ""}

    # A cache of one's own.
    for script in ("linear", "evaluation", "isomap"):
        command = commands(data, run, mine / script)[script]
        code, _, err = forks.run(*command, env=env, **other_user)
        assert code == 0, err
    assert not (data / ".cache").exists()
    homeless = {"HOME": "/nowhere", "XDG_CACHE_HOME": ""}
    outcome = forks.run(*commands(data, run, mine)["train"], env=homeless, **other_user)
    assert "Permission denied: '/nowhere" in error_line(outcome)

    # A shared folder, whose cache root makes: others use it, and make what is missing of their own.
    data.chmod(0o777)
    assert forks.run(*commands(data, run, open_folder / "root")["linear"])[0] == 0
    made = {path: path.stat().st_mtime_ns for path in (data / ".cache").iterdir()}
    for i, mode in enumerate((0o755, 0o777)):
        (data / ".cache").chmod(mode)
        for script in ("linear", "colours"):
            command = commands(data, run, mine / str(i))[script]
            code, _, err = forks.run(*command, env=env, **other_user)
            assert code == 0, err
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in made.items())

    # Runs and figures that may not be written.
    data.chmod(0o755)
    for script in SCRIPTS[:-1]:
        command = commands(data, run, open_folder / "root")[script]
        line = error_line(forks.run(*command, env=env, **other_user))
        assert "Permission denied" in line or "is a run already" in line, script
    (run / "result.json").unlink()
    outcome = forks.run("train.py", "--resume", run, env=env, **other_user)
    assert "Permission denied" in error_line(outcome)


def test_files_that_may_not_be_read(forks, model, open_folder, copy):
    data = Path(shutil.copytree(copy, open_folder / "data"))
    run = Path(shutil.copytree(model, open_folder / "m"))
    captions = open_folder / "captions.jsonl"
    captions.write_text("{}")
    mine = open_folder / "mine"
    mine.mkdir()
    mine.chmod(0o777)
    command = ["baseline_eval.py", "--data_root", data, "--architecture", run, "--compare", run]
    command += ["--wise_ft", 0.5, "--runs", mine, "--wandb", "disabled"]
    env = {"HOME": str(mine), "XDG_CACHE_HOME": ""}
    other_user = {"uid": NOBODY, "cwd": str(open_folder), "env": env}
    tried = (
        data / "jpg" / "image_00009.jpg",
        data / "jpg",
        data / "imagelabels.mat",
        data / "setid.mat",
        data / "cat_to_name.json",
        run / "model.pt",
        run / "result.json",
        run / "args.json",
        captions,
        run,
        data,
    )
    for path in tried:
        mode = path.stat().st_mode
        path.chmod(0)
        options = ["--captions", captions] if path == captions else []
        outcome = forks.run(*command, *options, **other_user)
        assert outcome[0], (path, outcome)
        named = "args.json" if path == run / "args.json" else str(path)
        assert named in error_line(outcome), (path, outcome)
        path.chmod(mode)
    assert forks.run(*command, **other_user)[0] == 0
    (run / "args.json").chmod(0)
    outcome = forks.run("train.py", "--resume", run, **other_user)
    assert "Permission denied" in error_line(outcome)


def test_folders_that_are_files(forks, small, model, tmp_path):
    place = tmp_path / "file"
    place.write_text("keep me")
    for script in SCRIPTS:
        # The folder around the output is a file, and then the output folder itself.
        below = commands(small, model, place)[script]
        itself = [place if x in (place / "runs", place / "figures") else x for x in below]
        for command in (below, itself):
            assert str(place) in error_line(forks.run(*command)), script

    report = ["report.py", "--runs", place, "--output", tmp_path / "report"]
    assert "no finished run" in error_line(forks.run(*report))
    ablate = ["ablate.py", "positives", "--architecture", model / "model.pt"]
    outcome = forks.run(*ablate, "--data_root", small, "--runs", place)
    assert str(place) in error_line(outcome)
    assert place.read_text() == "keep me"


# -----------------------------------------------------------------------------
# network

SILENCE = 100  # seconds, of a server that says nothing more; a client should not wait so long


class Liar(http.server.SimpleHTTPRequestHandler):
    """Serves a folder truly, or does to one kind of file what `mood` says."""

    mood = "honest"
    ending = ".tgz"

    def log_message(self, *_):
        pass

    def do_GET(self):
        mood = self.mood if self.path.endswith(self.ending) else "honest"
        if mood == "honest":
            super().do_GET()
        elif mood == "error page":
            self.redirect("/page.html")
        elif mood == "loop":
            self.redirect(self.path)
        elif mood in ("404", "503"):
            self.send_error(int(mood))
        elif mood == "not http":
            self.wfile.write(b"220 ftp ready\r\n\r\n")
        elif mood == "hangs up":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif mood == "silent":
            time.sleep(SILENCE)
        else:
            self.send_damaged(mood)

    do_HEAD = do_GET

    def redirect(self, path):
        self.send_response(302)
        self.send_header("Location", path)
        self.end_headers()

    def send_damaged(self, mood):
        content = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        if mood != "no length":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if mood == "other bytes":
            content = content[:-1] + bytes([content[-1] ^ 1])
        else:  # cut, stalls, no length
            content = content[: len(content) // 2]
        self.wfile.write(content)
        if mood == "stalls":
            self.wfile.flush()
            time.sleep(SILENCE)


MOODS = (
    "cut",
    "stalls",
    "no length",
    "other bytes",
    "error page",
    "loop",
    "404",
    "503",
    "not http",
    "hangs up",
    "silent",
)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that is served, and its address; a silent server is waited for 0.4 s."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "page.html").write_text("<html>Service unavailable</html>")
    handler = functools.partial(Liar, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # of those who hang up
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(download, "PATIENCE", 0.4)
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def offer(small, site, monkeypatch):
    """The small dataset as Oxford's three files, with their checksums."""
    folder, address = site
    with tarfile.open(folder / "102flowers.tgz", "w:gz") as archive:
        archive.add(small / "jpg", "jpg")
    for name in ("imagelabels.mat", "setid.mat"):
        shutil.copy(small / name, folder / name)
    names = {"image": "102flowers.tgz", "label": "imagelabels.mat", "setid": "setid.mat"}
    checksums = {}
    for key, name in names.items():
        checksums[key] = (name, hashlib.md5((folder / name).read_bytes()).hexdigest())
    monkeypatch.setattr(Flowers102, "_file_dict", checksums)
    monkeypatch.setattr(Flowers102, "_download_url_prefix", address)


def test_servers_that_lie_about_the_dataset(small, site, tmp_path, monkeypatch, cli, tally):
    """The archive, and the last small file: one line in bounded time, then the next start goes on
    to the end."""
    offer(small, site, monkeypatch)
    monkeypatch.chdir(tmp_path)
    tried = 0
    for ending in (".tgz", "setid.mat"):
        monkeypatch.setattr(Liar, "ending", ending)
        for mood in MOODS:
            shutil.rmtree(tmp_path / "data", ignore_errors=True)
            monkeypatch.setattr(Liar, "mood", mood)
            start = time.time()
            assert "run again" in error_line(cli("flowers.data")), mood
            assert time.time() - start < SILENCE, f"{mood}: the server gave up first"
            monkeypatch.setattr(Liar, "mood", "honest")
            code, out, err = cli("flowers.data")
            assert code == 0 and "48 images of 102 classes" in out, (mood, err)
            tried += 1
    tally(
        "servers that lie about the dataset",
        tried,
        tried,
        "one line while they are silent, then the next start goes on",
    )


def test_servers_that_lie_about_openai_s_weights(site, tmp_path, monkeypatch, cli, tally):
    folder, address = site
    torch.manual_seed(0)
    buffer = io.BytesIO()
    torch.save(models.build("tiny").state_dict(), buffer)
    archive = buffer.getvalue()
    digest = hashlib.sha256(archive).hexdigest()
    (folder / digest).mkdir()
    (folder / digest / "ViT-B-32.pt").write_bytes(archive)
    monkeypatch.setitem(clip.clip._MODELS, "ViT-B/32", f"{address}{digest}/ViT-B-32.pt")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(Liar, "ending", ".pt")
    for mood in MOODS:
        monkeypatch.setattr(Liar, "mood", mood)
        start = time.time()
        with pytest.raises(UserError, match="could not be downloaded"):
            weights.load_model("ViT-B/32")
        assert time.time() - start < SILENCE, f"{mood}: the server gave up first"

    monkeypatch.setattr(Liar, "mood", "honest")
    loaded = weights.load_model("ViT-B/32").visual.proj
    saved = torch.load(io.BytesIO(archive))["visual.proj"]
    assert torch.allclose(loaded, saved, atol=1e-3)  # clip.load halves its precision
    tally(
        "servers that lie about OpenAI's weights",
        len(MOODS),
        len(MOODS),
        "one line while they are silent, then the next start fetches them",
    )


CLIMBERS = ("../climbed.txt", "jpg/../../../climbed.txt", "/absolute.txt", "link")


def climbing(small, path: Path, outside: Path, members=CLIMBERS) -> None:
    """An archive with images, and members that would be written outside of its folder."""

    def add_file(name):
        info = tarfile.TarInfo(name)
        info.size = 5
        archive.addfile(info, io.BytesIO(b"gotya"))

    with tarfile.open(path, "w:gz") as archive:
        archive.add(small / "jpg", "jpg")
        for name in members:
            if name == "link":
                link = tarfile.TarInfo("jpg/link")
                link.type = tarfile.SYMTYPE
                link.linkname = str(outside)
                archive.addfile(link)
                add_file("jpg/link/through.txt")
            elif name == "/absolute.txt":
                add_file(f"{outside}/absolute.txt")
            else:
                add_file(name)


@pytest.mark.parametrize("members", [CLIMBERS, *((name,) for name in CLIMBERS)], ids=str)
def test_an_archive_that_climbs_out_of_its_folder(small, site, tmp_path, monkeypatch, cli, members):
    """It is refused by its MD5, and by the filter of the unpacking.

    For the filter, MD5 is deceived, for one kind of member at a time.
    """
    offer(small, site, monkeypatch)
    (tmp_path / "outside").mkdir()
    archive = site[0] / "102flowers.tgz"
    climbing(small, archive, tmp_path / "outside", members)
    if members != CLIMBERS:
        digest = hashlib.md5(archive.read_bytes()).hexdigest()
        monkeypatch.setitem(Flowers102._file_dict, "image", (archive.name, digest))
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")

    outcome = cli("flowers.data")

    if members == CLIMBERS:
        assert "corrupted" in error_line(outcome)
    elif members == ("link",):
        assert "absolute path" in error_line(outcome)
    elif members != ("/absolute.txt",):  # that is unpacked as if it were not absolute
        assert "outside" in error_line(outcome)
    paths = [path for path in tmp_path.rglob("*") if path.is_file() and "site" not in path.parts]
    written = [path.relative_to(tmp_path) for path in paths]
    assert all(path.is_relative_to("place/data/flowers-102") for path in written), written


# -----------------------------------------------------------------------------
# Weights & Biases


def with_wandb(small, tmp_path, *options, **environment) -> tuple[list, dict]:
    """A command of train.py that uses W&B without a key of this machine, and its environment."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    env |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, ROOT / "train.py", "--data_root", small, "--architecture", "tiny"]
    command += ["--batch_size", "12", "--runs", tmp_path, "--name", "w", *options]
    return command, env


SILENCE_OF_WANDB = 300  # seconds


class WandbServer(http.server.BaseHTTPRequestHandler):
    """silent: takes the connection and says nothing; 404: says that there is nothing; dies: takes
    the run and then says nothing more."""

    mood = "silent"
    dead = True

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.mood == "404":
            return self.send_error(404)
        if WandbServer.dead:
            time.sleep(SILENCE_OF_WANDB)
        WandbServer.dead = b"mutation UpsertBucket" in body
        project = {"id": "p", "name": "flowers-102", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "b", "name": "w", "displayName": "w", "config": "{}", "project": project}
        viewer = {"id": "u", "entity": "me", "username": "me", "flags": "{}"}
        viewer["teams"] = {"edges": []}
        data = {
            "viewer": viewer,
            "serverInfo": {"features": []},
            "upsertBucket": {"bucket": bucket, "inserted": True},
        }
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_HEAD = do_POST


@pytest.mark.slow
@pytest.mark.parametrize("mood", ["silent", "404", "dies"])
def test_wandb_that_never_answers(small, tmp_path, monkeypatch, mood):
    monkeypatch.setattr(WandbServer, "mood", mood)
    monkeypatch.setattr(WandbServer, "dead", mood != "dies")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), WandbServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    command, env = with_wandb(
        small, tmp_path, "--epochs", "1", WANDB_API_KEY="0" * 40, WANDB_BASE_URL=url
    )
    # The run ends before the server ends its silence.
    patience = SILENCE_OF_WANDB - 20
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=patience
    )
    assert done.returncode == 0 and (tmp_path / "w" / "result.json").exists(), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    wandb = tmp_path / "w" / "wandb"
    if mood == "dies":
        # What was not sent is there, for `wandb sync`.
        assert list(wandb.glob("run-*/run-*.wandb"))
    else:
        assert "warning: W&B" in done.stderr
        assert list(wandb.glob("offline-run-*")), "kept offline"
    server.shutdown()
    server.server_close()


def children_of(pid: int, name: str) -> list[int]:
    """The process ids of the children of a process that run a program of this name (Linux)."""
    children = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may just have ended
            is_child = f"PPid:\t{pid}\n" in (process / "status").read_text()
            if is_child and (process / "comm").read_text().strip() == name:
                children.append(int(process.name))
    return children


@pytest.mark.slow
def test_wandb_s_own_process_is_killed(small, tmp_path):
    """As when memory runs out: training goes on without it."""
    command, env = with_wandb(small, tmp_path, "--epochs", "8", "--wandb", "offline")
    process = subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    checkpoint = tmp_path / "w" / "checkpoint.pt"
    deadline = time.time() + 180
    while time.time() < deadline and not checkpoint.exists():
        time.sleep(0.02)
    (wandb_core,) = children_of(process.pid, "wandb-core")
    os.kill(wandb_core, 9)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0 and (tmp_path / "w" / "result.json").exists(), err
    assert err.count("warning: W&B failed") == 1


# -----------------------------------------------------------------------------
# others at the same time


@pytest.mark.slow
def test_two_at_once(forks, copy, model, tmp_path, tally):
    """Two processes that make the same caches, and two runs that end at once, ten times.

    The files are whole, the pixels equal, and each run has its line.
    """
    (tmp_path / "second").mkdir()
    second = Forks(tmp_path / "second")

    def linear(name, place):
        return commands(copy, model, place, name)["linear"]

    alone = tmp_path / "alone"
    assert forks.run(*linear("a", alone))[0] == 0
    expected = (alone / "runs" / "a" / "predictions.csv").read_bytes()
    expected_cache = files(copy / ".cache")
    for i in range(10):
        place = tmp_path / str(i)
        runs = place / "runs"
        shutil.rmtree(copy / ".cache")
        forks.start(*linear("a", place))
        second.start(*linear("b", place))
        for process, name in ((forks, "a"), (second, "b")):
            code, _, err = process.wait()
            assert code == 0 and "Traceback" not in err and "warning" not in err, err
            assert (runs / name / "predictions.csv").read_bytes() == expected
        cache = files(copy / ".cache")
        assert cache == expected_cache
        assert len(cache) == 2  # pixels and features
        assert not list(copy.rglob(".*.tmp"))
        lines = read_lines(runs / "results.jsonl")
        assert sorted(line["name"] for line in lines) == ["a", "b"]

        # Without anything to make they end closer together.
        forks.start(*linear("c", place))
        second.start(*linear("d", place))
        assert [forks.wait()[0], second.wait()[0]] == [0, 0]
        lines = read_lines(runs / "results.jsonl")
        assert sorted(line["name"] for line in lines) == ["a", "b", "c", "d"]
    second.close()
    tally(
        "two processes with the same caches and results.jsonl",
        20,
        20,
        "whole files, the same results, one line a run",
    )


def test_threads_that_write_the_same_file(tmp_path):
    """As two visitors of the page: each writes a file of its own, and the last one stays."""
    path = tmp_path / "a.json"
    problems = []

    def write(i):
        try:
            for _ in range(50):
                write_json(path, {"value": [i] * 3000})
                values = json.loads(path.read_text())["value"]
                assert len(set(values)) == 1
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert os.listdir(tmp_path) == ["a.json"]


# -----------------------------------------------------------------------------
# numbers that are none


@pytest.mark.parametrize("lr", [1e30, 1e38])
def test_a_model_that_has_become_nan(small, tmp_path, cli, lr):
    """The only step, whose loss is still a number, leaves weights that are huge, or none.

    No checkpoint is made of these, and no result of either.
    """
    command = ["train.py", "--data_root", small, *TINY, "--batch_size", 36, "--epochs", 1]
    command += ["--lr", lr, "--wd", 1, "--runs", tmp_path, "--name", "n"]
    assert "--lr" in error_line(cli(*command))
    assert not list(tmp_path.rglob("result*"))
    assert not list(tmp_path.rglob("model.pt"))
    checkpoint = tmp_path / "n" / "checkpoint.pt"
    if checkpoint.exists():
        load_tensors(checkpoint)  # refuses what is not finite


# -----------------------------------------------------------------------------
# terminals


def shell(line: str, **environment) -> subprocess.CompletedProcess:
    """Run a line in bash, in the repository, without the language settings of this terminal."""
    language = ("LANG", "LC_ALL", "PYTHONUTF8", "PYTHONUNBUFFERED")
    env = {name: value for name, value in os.environ.items() if name not in language}
    env |= {"PYTHONPATH": str(ROOT)} | environment
    bash = ["bash", "-c", f"set -o pipefail; {line}"]
    return subprocess.run(bash, capture_output=True, env=env, cwd=ROOT, timeout=300)


@pytest.mark.parametrize(
    "redirection, code",
    [
        ("| true", 1),
        slow("2>&1 | true", 1),
        slow(">&-", 0),
        slow("2>&-", 0),
        slow("<&-", 0),
        slow("<&- >&- 2>&-", 0),
        slow("> /dev/full", 2),
    ],
)
def test_pipes_that_are_closed(small, tmp_path, redirection, code):
    """`| head -1` and the like: no traceback; where nothing is lost, the work is done."""
    script = "data_Exploration/dataset_Description.py"
    done = shell(f"{sys.executable} {script} --data_root {small} --output {tmp_path} {redirection}")
    err = done.stderr.decode()
    assert "Traceback" not in err and "Exception ignored" not in err, err
    assert done.returncode == code, done
    if code == 0:
        assert (tmp_path / "classes.png").exists()
    if "full" in redirection:
        assert "error: [Errno 28]" in err


@pytest.mark.parametrize(
    "locale",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        slow({"LC_ALL": "C"}),
        slow({"LC_ALL": "POSIX"}),
        slow({"PYTHONIOENCODING": "ascii"}),
    ],
    ids=str,
)
def test_locales_and_names(tmp_path, locale):
    """Folders and classes in letters that the terminal does not have, with quotes and brackets."""
    place = tmp_path / "Blüten, 'ein' [x] {} \u2603"
    place.mkdir()
    names = ["rose", "Gänseblümchen", "\u6a31", "lotus", "mallow", "tree mallow"]
    write_dataset(place / "data", names=names)
    quoted = str(place).replace("'", "'\\''")
    script = "data_Exploration/class_distribution.py"
    done = shell(
        f"{sys.executable} {script} --data_root '{quoted}/data' --all --output '{quoted}/out'",
        **locale,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert (place / "out" / "colours_all.png").exists()
