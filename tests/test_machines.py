"""Any machine: devices and precisions, systems without fcntl and resource, W&B's own settings, and
installations that are not what they should be.
"""

import argparse
import ast
import json
import os
import platform
import socket
import subprocess
import sys
import types
import urllib.error

import psutil  # before a test pretends to be on Windows
import pytest
import torch
from conftest import ROOT, error_line

from flowers import (
    UserError,
    add_switch,
    cache,
    devices,
    files,
    frozen,
    tracking,
    training,
    world_size,
)
from flowers import weights as weight_files
from flowers.data import open_flowers
from flowers.models import build

NO_WANDB = ("--wandb", "disabled")
TINY = ("--architecture", "tiny", "--batch_size", 12, "--epochs", 1)


@pytest.fixture(autouse=True)
def precision_of_this_test_alone(monkeypatch):
    monkeypatch.setattr(devices, "_chosen_precision", {})


def child(*words, code=None, **environment):
    """A Python process of its own: a script with its flags, or code."""
    command = [sys.executable, *(["-c", code] if code else []), *map(str, words)]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"} | environment
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables)


def ends_with_one_line(done) -> str:
    return error_line((done.returncode, done.stdout, done.stderr))


def losses(folder):
    return [row["train/loss"] for row in files.read_lines(folder / "metrics.jsonl", "train/loss")]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


# -----------------------------------------------------------------------------
# device


def pretend_gpus(monkeypatch, count, capability=(8, 0)):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def pretend_mps(monkeypatch, there):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there)


@pytest.mark.parametrize(
    "gpus, mps, chosen",
    [(2, False, "cuda"), (1, True, "cuda"), (0, True, "mps"), (0, False, "cpu")],
)
def test_auto_takes_the_best_that_is_there(monkeypatch, gpus, mps, chosen):
    pretend_gpus(monkeypatch, gpus)
    pretend_mps(monkeypatch, mps)
    assert devices.choose_device("auto") == torch.device(chosen)
    assert devices.choose_device("cpu") == torch.device("cpu"), "whatever there is"


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    current = pretend_gpus(monkeypatch, 2)
    pretend_mps(monkeypatch, False)
    assert devices.choose_device("cuda:1") == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")], "torch's own functions use it too"
    with pytest.raises(UserError, match="cuda:2.*cuda:1"):
        devices.choose_device("cuda:2")
    with pytest.raises(UserError, match="Metal"):
        devices.choose_device("mps")
    pretend_gpus(monkeypatch, 0)
    for name in ("cuda", "cuda:0"):
        with pytest.raises(UserError, match="no GPU"):
            devices.choose_device(name)


SCRIPTS = {
    "train.py": TINY,
    "baseline_eval.py": ("--architecture", "tiny"),
    "data_Exploration/isomap.py": ("--architecture", "tiny", "--features", "clip"),
    "qwen_train.py": ("--model", "tiny"),
    "qwen_eval.py": ("--model", "tiny"),
    "qwen_probe.py": ("--model", "tiny"),
    "test_models.py": ("--architecture", "tiny", "--measure"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_that_computes_takes_a_device(script, small, tmp_path, cli, monkeypatch):
    pretend_gpus(monkeypatch, 0)
    monkeypatch.chdir(tmp_path)
    data = () if script == "test_models.py" else ("--data_root", small)
    arguments = (script, *data, *SCRIPTS[script], "--device")
    assert "no GPU" in error_line(cli(*arguments, "cuda"))
    assert "no GPU" in error_line(cli(*arguments, "cuda:3"))
    code, _, err = cli(*arguments, "gpu")
    assert code == 2 and "'gpu' is none of auto, cuda, cuda:N, mps, cpu" in err
    assert not list(tmp_path.glob("runs/*"))


def test_torchrun_gives_each_process_its_gpu(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert world_size() == 2
    pretend_gpus(monkeypatch, 2)
    started = []
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda _: iter([("store", 1, 2)]))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **_: started.append(backend)
    )
    assert devices.start_processes("auto").device == torch.device("cuda:1")
    assert devices.start_processes("cpu").device == torch.device("cpu")
    assert started == ["nccl", "gloo"]
    with pytest.raises(UserError, match="under torchrun"):
        devices.start_processes("cuda:0")
    pretend_gpus(monkeypatch, 1)
    with pytest.raises(UserError, match="cuda:1.*cuda:0"):
        devices.start_processes("cuda")


TWO_PROCESSES = """
import functools, sys, time
from datetime import timedelta
import torch.distributed as dist

# What a barrier would wait for, at most.
start = dist.init_process_group
dist.init_process_group = functools.partial(start, timeout=timedelta(seconds=1))
from flowers import devices

processes = devices.start_processes("cpu")
seen = []
for turn in range(2):
    with processes.main_first():
        if processes.is_main:
            time.sleep(2.5)  # a download
        seen.append(time.time())
print(*seen)
"""


def test_others_wait_for_a_download_without_a_time_out():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    environment |= {"TORCHELASTIC_RUN_ID": "1", "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in ("0", "1"):
        process = subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES],
            env=environment | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        processes.append(process)
    outcomes = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outcomes
    main, other = ([float(second) for second in out.split()] for out, _ in outcomes)
    for first, then in zip(main, other):
        assert first <= then, "the main process comes first, in each of the two blocks"


# -----------------------------------------------------------------------------
# precision


@pytest.mark.parametrize(
    "capability, precision",
    [((9, 0), "bf16"), ((8, 6), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp32"), ((7, 0), "fp32")],
    ids=["H100", "RTX 30", "A100", "T4", "V100"],
)
def test_bf16_from_compute_capability_8(monkeypatch, capability, precision):
    pretend_gpus(monkeypatch, 1, capability)
    assert devices.precision_of("cuda") == precision
    assert devices.set_precision("auto", "cuda") == precision
    assert devices.set_precision("fp16", "cuda") == devices.precision_of("cuda:0") == "fp16"
    assert devices.set_precision("auto", "cpu") == devices.set_precision("auto", "mps") == "fp32"


def test_autocast_is_in_the_precision_that_was_set():
    a = torch.randn(4, 4)
    for name, dtype in devices.DTYPES.items():
        devices.set_precision(name, "cpu")
        with devices.autocast("cpu"):
            assert (a @ a).dtype == dtype


def test_kept_arrays_know_their_precision(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    pretend_gpus(monkeypatch, 1)
    # What was kept before there was a choice is found again.
    assert frozen._arithmetic(cpu) == "cpu"
    assert frozen._arithmetic(cuda) == "cuda"
    names = set()
    for device in (cpu, cuda):
        for precision in devices.DTYPES:
            devices.set_precision(precision, device)
            names.add(cache.key_of(frozen._arithmetic(device)))
    assert len(names) == 6


def test_training_in_bf16_is_near_that_in_fp32(small, tmp_path, cli):
    common = ("--data_root", small, *TINY, "--runs", tmp_path, *NO_WANDB, "--device", "cpu")
    for precision in ("fp32", "bf16", "fp16"):
        name = ("--precision", precision, "--name", precision)
        code, _, err = cli("train.py", *common, *name)
        assert code == 0, err
        args = read(tmp_path / precision / "args.json")
        assert args["precision"] == precision
        assert args["device"].startswith("cpu, ")
    plain = losses(tmp_path / "fp32")
    for precision in ("bf16", "fp16"):
        assert losses(tmp_path / precision) == pytest.approx(plain, rel=0.05)
        assert losses(tmp_path / precision) != plain

    # The scale of the loss is a part of what a run goes on with, and so is the precision.
    folder = tmp_path / "fp16"
    checkpoint = files.load_tensors(folder / "checkpoint.pt")
    assert checkpoint["scaler"]["scale"] == 65536
    (folder / "result.json").unlink()
    assert cli("train.py", "--resume", folder, *NO_WANDB)[0] == 0
    assert read(folder / "result.json")["precision"] == "fp16"

    (folder / "result.json").unlink()
    files.save_tensors(folder / "checkpoint.pt", checkpoint | {"scaler": {"scale": 1.0}})
    assert "is damaged" in error_line(cli("train.py", "--resume", folder, *NO_WANDB))


def test_a_step_of_fp16_without_finite_gradients_is_left_out():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    scaler = torch.amp.GradScaler("cpu")

    def step(factor):
        before = parameter.detach().clone()
        scaler.scale((factor * parameter).sum()).backward()
        training.update(optimizer, [parameter], scaler)
        return not torch.equal(before, parameter)

    scale = scaler.get_scale()
    assert step(1.0)
    assert scaler.get_scale() == scale
    assert not step(torch.tensor(1e38))  # times the scale it is infinite
    assert scaler.get_scale() == scale / 2
    assert step(1.0)


def test_gradients_of_fp16_are_clipped_as_they_are_and_not_as_they_are_scaled():
    plain, scaled = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    gradient = torch.tensor([0.3, 0.4])  # of norm 0.5, below the limit
    scaler = torch.amp.GradScaler("cpu")
    (plain * gradient).sum().backward()
    training.update(torch.optim.SGD([plain], lr=1.0), [plain])
    scaler.scale((scaled * gradient).sum()).backward()
    training.update(torch.optim.SGD([scaled], lr=1.0), [scaled], scaler)
    assert torch.allclose(plain, scaled) and torch.allclose(plain, -gradient)


# -----------------------------------------------------------------------------
# systems without fcntl and resource

# `sitecustomize` is imported before anything else, in every child process as well.
# Libraries know by other signs that this is Linux, and import them.
BLOCK_UNIX = """
import builtins

import_module = builtins.__import__


def import_ours(name, globals=None, *rest, **options):
    importer = (globals or {}).get("__file__") or ""
    is_library = "/site-packages/" in importer or "/lib/python" in importer
    if name in ("fcntl", "resource") and not is_library:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return import_module(name, globals, *rest, **options)


builtins.__import__ = import_ours
"""


@pytest.fixture
def not_unix(tmp_path):
    """PYTHONPATH of a machine that has neither fcntl nor resource."""
    folder = tmp_path / "not_unix"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCK_UNIX)
    return f"{folder}{os.pathsep}{ROOT}"


def test_training_without_fcntl_and_resource(not_unix, small, tmp_path):
    probe = child(code="import fcntl", PYTHONPATH=not_unix)
    assert "ModuleNotFoundError" in probe.stderr, "it is blocked"
    common = ("--data_root", small, "--runs", tmp_path, "--batch_size", 12, "--epochs", 1)
    # The grid chooses on val, which its start may not have been trained on.
    options = (*common, "--holdout", "--architecture", "tiny", *NO_WANDB, "--name", "t")
    done = child(ROOT / "train.py", *options, PYTHONPATH=not_unix)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "t" / "result.json")["peak_memory_mb"] > 50

    grid = ("shots", *common, "--architecture", tmp_path / "t", "--seeds", 0, *NO_WANDB)
    dry = child(ROOT / "ablate.py", *grid, "--dry_run", PYTHONPATH=not_unix)
    name = dry.stdout.split()[-1]
    done = child(ROOT / "ablate.py", *grid, "--only", name, PYTHONPATH=not_unix)
    assert done.returncode == 0, done.stderr
    assert "1 points finished" in done.stdout


@pytest.mark.parametrize(
    "script",
    [
        *("baseline_eval.py", "test_models.py", "report.py", "qwen_eval.py", "qwen_train.py"),
        *("data_Exploration/isomap.py", "data_Exploration/class_distribution.py"),
        "data_Exploration/dataset_Description.py",
    ],
)
def test_scripts_start_without_fcntl_and_resource(script, not_unix):
    done = child(ROOT / script, "--help", PYTHONPATH=not_unix)
    assert done.returncode == 0, done.stderr


def test_a_locked_file_is_not_locked_twice(tmp_path):
    with (tmp_path / "log.txt").open("ab") as first, (tmp_path / "log.txt").open("ab") as second:
        assert files.try_lock(first)
        assert not files.try_lock(second)
        first.close()
        assert files.try_lock(second)


def test_a_file_is_locked_on_windows(tmp_path, monkeypatch):
    """With its `msvcrt`, whose locks are of bytes that nobody else may then read or write."""
    locked = set()

    def locking(descriptor, mode, n):
        assert (mode, n) == (2, 1)
        assert os.lseek(descriptor, 0, os.SEEK_CUR) > 1 << 20, "a byte that nobody writes"
        inode = os.fstat(descriptor).st_ino
        if inode in locked:
            raise PermissionError
        locked.add(inode)

    msvcrt = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)
    with (tmp_path / "log.txt").open("ab") as first, (tmp_path / "log.txt").open("ab") as second:
        assert files.try_lock(first)
        assert not files.try_lock(second)
        first.write(b"a line")
    assert (tmp_path / "log.txt").read_bytes() == b"a line", "the place in the file is as it was"


def test_on_windows_no_process_is_asked_by_a_signal(tmp_path, monkeypatch):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    of_dead = f".a.json.1.{platform.node()}-{dead.pid}.tmp"
    of_living = f".a.json.1.{platform.node()}-{os.getppid()}.tmp"
    for name in (of_dead, of_living):
        (tmp_path / name).write_text("half")
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("there it ends the process"))
    # On other systems psutil asks by a signal, too.
    monkeypatch.setattr(psutil, "pid_exists", lambda pid: pid == os.getppid())
    files.write_json(tmp_path / "a.json", {})
    assert sorted(os.listdir(tmp_path)) == sorted([of_living, "a.json"])


def own_files():
    paths = [*ROOT.glob("*.py"), *(ROOT / "data_Exploration").glob("*.py")]
    return [*paths, *(ROOT / "flowers").rglob("*.py")]


def test_text_files_are_utf_8_on_every_machine():
    """Windows' default is another encoding: every text file is opened with its own."""
    without = []
    for path in own_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            function = node.func
            name = getattr(function, "attr", getattr(function, "id", ""))
            has_encoding = any(keyword.arg == "encoding" for keyword in node.keywords)
            if name in ("read_text", "write_text") and not has_encoding:
                without.append(f"{path.name}:{node.lineno}")
    assert without == []


# -----------------------------------------------------------------------------
# paths and switches


def test_paths_of_flags_know_home_and_variables(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    assert files.user_path("~/data") == "/home/me/data"
    assert files.user_path("$SCRATCH/a/${SCRATCH}") == "/scratch/a//scratch"
    assert files.user_path("open_clip:~/a.pt") == "open_clip:/home/me/a.pt"
    for name in ("ViT-L/14@336px", "sample", "open_clip:ViT-B-32/laion2b_s34b_b79k", ""):
        assert files.user_path(name) == name


def test_a_run_is_found_by_home_and_variables(small, tmp_path, cli, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    data = ("--data_root", small, *NO_WANDB)
    assert cli("train.py", *data, *TINY, "--runs", "~/runs", "--name", "a")[0] == 0
    compare = ("--compare", "${RUNS}/a", "--runs=$RUNS", "--name", "b")
    code, _, err = cli("baseline_eval.py", *data, "--architecture", "$RUNS/a/model.pt", *compare)
    assert code == 0, err
    sentences = {name: [f"a {name}"] for name in open_flowers(small).class_names}
    files.write_json(tmp_path / "runs" / "prompts.json", sentences)
    prompts = ("--prompts=~/runs/prompts.json", "--runs=$RUNS")
    for script in ("train.py", "baseline_eval.py"):
        options = TINY if script == "train.py" else ("--architecture", "tiny")
        code, _, err = cli(script, *data, *options, *prompts, "--name", f"prompts of {script}")
        assert code == 0, err
    assert cli("train.py", "--resume", "~/runs/a")[0] == 0
    assert cli("report.py", "--runs", "~/runs", "--output", "$RUNS/report")[0] == 0
    figures = ("--output", "~/figures", "--level", "image", "--run", "$RUNS/b")
    code, _, err = cli("data_Exploration/isomap.py", "--data_root", small, *figures)
    assert code == 0, err
    assert set(os.listdir(tmp_path)) == {"runs", "figures"}, "no folder is called ~ or $RUNS"


@pytest.mark.parametrize(
    "words, value",
    [
        ([], False),
        (["--on"], True),
        (["--on=true"], True),
        (["--on=True"], True),
        (["--on=false"], False),
        (["--on=False"], False),
        (["--on=1"], True),
        (["--on=0"], False),
    ],
)
def test_switches_as_sweeps_write_them(words, value):
    parser = argparse.ArgumentParser()
    add_switch(parser, "--on", help="")
    assert parser.parse_args(words).on is value


def test_train_takes_switches_as_sweeps_write_them(small, tmp_path, cli):
    common = ("train.py", "--data_root", small, *TINY, "--runs", tmp_path, *NO_WANDB)
    switches = ("--holdout=true", "--learn_temperature=True", "--no_cache=false")
    code, _, err = cli(*common, *switches, "--compile=False", "--name", "a")
    assert code == 0, err
    args = read(tmp_path / "a" / "args.json")
    assert args["holdout"] is args["learn_temperature"] is True
    assert args["no_cache"] is args["compile"] is False
    code, _, err = cli(*common, "--holdout=maybe")
    assert code == 2 and "neither true nor false" in err


# -----------------------------------------------------------------------------
# Weights & Biases

FAKE_WANDB = """
import json
import os

Settings = dict
log_file = os.environ["FAKE_WANDB"]


def write(**row):
    with open(log_file, "a") as file:
        file.write(json.dumps(row) + "\\n")


class Run:
    def __init__(self, id, step):
        self.id = id
        self.step = step

    def log(self, row, step=None):
        write(step=step, row=row)

    def finish(self):
        pass


def init(id=None, resume=None, settings=None, config=None, dir=None, **options):
    # A server: it knows the steps of the run that is resumed.
    rows = []
    if os.path.exists(log_file):
        rows = [json.loads(line) for line in open(log_file)]
    steps = [row["step"] for row in rows if row.get("step") is not None]
    known = [row["id"] for row in rows if "id" in row]
    step = max(steps) + 1 if steps and resume == "allow" and id in known else 0
    id = id or f"new{len(known)}"
    write(id=id, resume=resume, **options)
    return Run(id, step)
"""


@pytest.fixture
def fake_wandb(tmp_path, monkeypatch):
    """A wandb that writes what it is given; returns a function that reads it."""
    folder = tmp_path / "fake"
    folder.mkdir()
    (folder / "wandb.py").write_text(FAKE_WANDB)
    log = tmp_path / "wandb.jsonl"
    for variable in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))  # without ~/.netrc
    monkeypatch.setenv("FAKE_WANDB", str(log))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield lambda: [json.loads(line) for line in log.read_text().splitlines()]
    sys.modules.pop("wandb", None)


def test_wandb_s_own_variables_are_obeyed(fake_wandb, tmp_path, monkeypatch):
    config = {"job": "train"}
    tracking.start_wandb("auto", tmp_path, config)
    (row,) = fake_wandb()
    assert (row["mode"], row["project"], row["entity"]) == ("offline", "flowers-102", None)

    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_ENTITY", "lab")
    monkeypatch.setenv("WANDB_MODE", "online")
    tracking.start_wandb("auto", tmp_path, config)
    row = fake_wandb()[-1]
    assert (row["mode"], row["project"], row["entity"]) == ("online", "mine", "lab")

    # A flag is stronger than a variable.
    tracking.start_wandb("offline", tmp_path, config)
    assert fake_wandb()[-1]["mode"] == "offline"
    n_runs = len(fake_wandb())
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracking.start_wandb("auto", tmp_path, config).run is None
    assert len(fake_wandb()) == n_runs


def test_a_resumed_run_goes_on_with_its_wandb_run_and_shows_each_row_once(
    fake_wandb, small, tmp_path, cli
):
    """Killed in its second epoch, after W&B had rows that the checkpoint had not."""
    common = ("--data_root", small, "--architecture", "tiny", "--batch_size", 12, "--epochs", 2)
    options = (*common, "--runs", tmp_path, "--name", "a", "--wandb", "online")
    assert cli("train.py", *options)[0] == 0
    folder = tmp_path / "a"
    sent = fake_wandb()
    first = sent[0]
    assert (folder / "wandb_id.txt").read_text().strip() == first["id"]
    rows = files.read_lines(folder / "metrics.jsonl")
    assert len(rows) == 6
    assert [row["row"] for row in sent[1:7]] == rows
    # As the kill left it: four of six rows at the server, a checkpoint after the third.
    log = tmp_path / "wandb.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in sent[:5]))
    (folder / "result.json").unlink()
    (folder / "model.pt").unlink()
    rewind(folder, rows[:3])

    assert cli("train.py", "--resume", folder, "--wandb", "online")[0] == 0
    sent = fake_wandb()
    starts = [row for row in sent if "id" in row]
    assert [start["id"] for start in starts] == [first["id"]] * 2
    assert starts[1]["resume"] == "allow"
    steps = [row["step"] for row in sent if row.get("step") is not None]
    assert steps == list(range(6)), "each once"


def rewind(folder, rows):
    """Make a run of two epochs one that has finished its first."""
    files.write_lines(folder / "metrics.jsonl", rows)
    checkpoint = files.load_tensors(folder / "checkpoint.pt")
    files.save_tensors(folder / "checkpoint.pt", checkpoint | {"epoch": 1})


def test_a_resumed_run_keeps_its_id_in_the_true_wandb(small, tmp_path):
    """Offline: the names of wandb's folders end in the id of the run."""
    environment = {"WANDB_MODE": "offline", "HOME": str(tmp_path)}
    common = ("--data_root", small, *TINY, "--runs", tmp_path, "--name", "a")
    assert child(ROOT / "train.py", *common, **environment).returncode == 0
    folder = tmp_path / "a"
    run_id = (folder / "wandb_id.txt").read_text().strip()
    (folder / "result.json").unlink()
    done = child(ROOT / "train.py", "--resume", folder, **environment)
    assert done.returncode == 0, done.stderr
    names = [path.name for path in (folder / "wandb").glob("offline-run-*")]
    assert names and all(name.endswith(f"-{run_id}") for name in names), names
    assert (folder / "wandb_id.txt").read_text().strip() == run_id


def test_an_evaluation_that_is_begun_anew_is_a_new_wandb_run(fake_wandb, tmp_path):
    for _ in range(2):
        tracking.start_wandb("offline", tmp_path, {"job": "eval"})
    ids = [row["id"] for row in fake_wandb()]
    assert len(set(ids)) == 2


# -----------------------------------------------------------------------------
# the download of weights


def test_weights_are_downloaded_to_the_user_s_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(UserError) as raised:
        weight_files.load_model("ViT-B/32")
    assert "--architecture /path/ViT-B-32.pt" in str(raised.value)
    assert str(tmp_path / "cache" / "clip" / "ViT-B-32.pt") in str(raised.value)
    assert (tmp_path / "cache" / "clip").is_dir(), "clip was told"
    assert not (tmp_path / "home").exists()

    # What was fetched before the variable was set is used.
    usual = tmp_path / "home" / ".cache" / "clip"
    usual.mkdir(parents=True)
    (usual / "ViT-B-32.pt").touch()
    with pytest.raises(UserError, match=str(usual)):
        weight_files.load_model("ViT-B/32")


def test_openai_s_file_may_lie_anywhere(tmp_path):
    """What the message promises, with a state dict in the place of the archive."""
    torch.save(build("tiny").state_dict(), tmp_path / "ViT-B-32.pt")
    assert weight_files.load_model(str(tmp_path / "ViT-B-32.pt")).text_projection.shape[1] == 128


# -----------------------------------------------------------------------------
# wrong installations


def installation(tmp_path, **modules):
    """PYTHONPATH with these modules before all others; a name with __ is one in a package."""
    folder = tmp_path / "site"
    for name, text in modules.items():
        path = folder.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if "__" in name:
            (path.parent / "__init__.py").touch()
    return f"{folder}{os.pathsep}{ROOT}"


ANOTHER_CLIP = "def clip(text):\n    return text\n"
OLD_CLIP = "print 'of Python 2'\n"
NO_LIBGL = "raise ImportError('libGL.so.1: cannot open shared object file: No such file')"
OLD_TRANSFORMERS = "__version__ = '4.57.1'\n"
NO_PKG_RESOURCES = "raise ModuleNotFoundError(\"No module named 'pkg_resources'\")"
TRAIN = ("train.py", "--data_root", "sample", "--architecture", "tiny")


@pytest.mark.parametrize(
    "modules, command, words",
    [
        ({"clip": ANOTHER_CLIP}, TRAIN, ("pip uninstall -y clip", "clip-anytorch", "site/clip.py")),
        ({"clip": OLD_CLIP}, TRAIN, ("pip uninstall -y clip",)),
        ({"clip__tool": ANOTHER_CLIP}, TRAIN, ("pip uninstall -y clip",)),
        ({"cv2": NO_LIBGL}, TRAIN, ("libGL", "pip install opencv-python-headless")),
        (
            {"cv2": NO_LIBGL},
            ("data_Exploration/class_distribution.py", "--data_root", "sample", "--all"),
            ("libGL", "pip install opencv-python-headless"),
        ),
        (
            {"transformers": OLD_TRANSFORMERS},
            ("qwen_eval.py", "--data_root", "sample", "--model", "tiny"),
            ("transformers 4.57.1", "pip install -r requirements-qwen.txt"),
        ),
    ],
    ids=[
        *("another clip", "clip of Python 2", "a folder clip", "no libGL", "no libGL to explore"),
        "transformers 4",
    ],
)
def test_a_wrong_installation_ends_with_the_command_that_mends_it(
    tmp_path, modules, command, words
):
    path = installation(tmp_path, **modules)
    done = child(ROOT / command[0], *command[1:], PYTHONPATH=path)
    line = ends_with_one_line(done)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("content", [NO_PKG_RESOURCES, ""], ids=["none", "an emptied one"])
def test_what_needs_openai_s_weights_needs_pkg_resources(small, tmp_path, content):
    """The package clip imports it when it loads one of its own models, and not before."""
    path = installation(tmp_path, pkg_resources=content)
    arguments = ("--data_root", small, "--architecture", "ViT-B/32", "--runs", tmp_path)
    done = child(ROOT / "baseline_eval.py", *arguments, "--wandb", "disabled", PYTHONPATH=path)
    assert "pip install 'setuptools>=77.0.3,<81'" in ends_with_one_line(done)
