"""What the tests share: a small drawn dataset, the real images, and the real scripts, run here."""

import csv
import importlib
import json
import os
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.io

os.environ["WANDB_MODE"] = "disabled"
# The tests are about the numbers of a CPU. Those that run on a GPU, too, say so.
REAL_GPU = os.environ.get("FLOWERS_TEST_GPU") == "1"
if not REAL_GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("FLOWERS_TEST_DATA") or ROOT.parent / "shared" / "oxford-flowers-102")
# Parameters of each architecture, as counted in OpenAI's own models.
COUNTS = {
    "RN50": 102_007_137,
    "RN101": 119_688_033,
    "RN50x4": 178_300_601,
    "RN50x16": 290_979_217,
    "RN50x64": 623_258_305,
    "ViT-B/32": 151_277_313,
    "ViT-B/16": 149_620_737,
    "ViT-L/14": 427_616_513,
    "ViT-L/14@336px": 427_944_193,
}
NAMES = ["rose", "lotus", "ball moss", "tree mallow", "mallow", "globe-flower"]

# Rows of the table at the end of the session: see `tally`.
TALLY = []


def call(script, *arguments):
    """Run a script as the `cli` fixture does, for the fixtures that outlive a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.fixture(scope="session")
def real():
    """The folder of real images. Tests that need it are skipped, saying so, where it is missing."""
    if not (REAL / "setid.mat").exists():
        pytest.skip(f"no real images at {REAL}; set FLOWERS_TEST_DATA")
    return REAL


def write_dataset(root: Path, per_class: int = 8, names=NAMES) -> Path:
    """Write a dataset in Oxford's layout: discs in a colour for each class, on noise.

    The ids run over the classes. A quarter is trnid, a quarter valid, half tstid.
    """
    (root / "jpg").mkdir(parents=True)
    rng = np.random.default_rng(0)
    n = per_class * len(names)
    ids = np.arange(1, n + 1)
    labels = np.arange(n) % len(names) + 1
    for i, label in zip(ids, labels):
        # No two pictures of one size, as in the real dataset.
        image = rng.integers(0, 60, (70 + i % 7, 90 - i % 5, 3), dtype=np.uint8)
        bits = np.array([label & 1, label >> 1 & 1, label >> 2 & 1])
        colour = tuple(int(channel) for channel in 255 * bits)
        centre = (int(45 + i % 9 - 4), 35)
        cv2.circle(image, centre, 18, colour, -1)
        cv2.imwrite(str(root / "jpg" / f"image_{i:05d}.jpg"), image)

    quarter = (np.arange(n) // len(names)) % 4
    splits = {
        "trnid": ids[quarter == 0][None],
        "valid": ids[quarter == 1][None],
        "tstid": ids[quarter > 1][None],
    }
    scipy.io.savemat(root / "setid.mat", splits)
    scipy.io.savemat(root / "imagelabels.mat", {"labels": labels[None].astype(np.uint8)})
    cat_to_name = json.dumps(dict(enumerate(names, 1)), ensure_ascii=False)
    (root / "cat_to_name.json").write_text(cat_to_name, encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """48 images of six classes. Tests do not change it."""
    return write_dataset(tmp_path_factory.mktemp("data") / "small")


@pytest.fixture(scope="module")
def without_pictures():
    """No pictures are drawn, which takes half of the time of a small run."""
    from flowers import figures
    from flowers.study import figures as study_figures

    names = ("training_curve", "confusion_matrix", "reliability", "mistakes_sheet", "picture_sheet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_figures, "wise_ft", lambda *_, **__: None)
        for name in names:
            patch.setattr(figures, name, lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def one_thread():
    """Torch computes in one thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def settings_of_one_test(monkeypatch):
    """What scripts set for their process is as before after the test, for those that run in it."""
    import torch

    from flowers import devices

    monkeypatch.setattr(devices, "_chosen_precision", {})
    deterministic = torch.are_deterministic_algorithms_enabled()
    precision = torch.get_float32_matmul_precision()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def cli(monkeypatch, capfd):
    """Run a script of the repository as its user would, in this process.

    cli("train.py", "--epochs", 1) -> (exit code, stdout, stderr)
    """

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        capfd.readouterr()  # what was printed before
        code = 0
        try:
            if script.endswith(".py"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                importlib.import_module(script).main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capfd.readouterr()
        return code, out, err

    return run


def error_line(outcome) -> str:
    """The one line with which a script ends at a user's mistake; outcome: what `cli` returns."""
    code, _, err = outcome
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


@pytest.fixture
def tally():
    """tally(name, tried, survived, note) adds a row to the table at the end of the session.

    It counts inputs, kills and faults that were tried, and those that were survived.
    """

    def add(name, tried, survived, note=""):
        TALLY.append((name, f"{tried:,}", f"{survived:,}", note))

    return add


def pytest_terminal_summary(terminalreporter):
    if TALLY:
        terminalreporter.write_line("\n| what | tried | survived | |\n|---|---|---|---|")
    for row in TALLY:
        terminalreporter.write_line(f"| {' | '.join(row)} |")
