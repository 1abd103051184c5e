"""Every script on a pretended GPU (tests/pretended_gpu.py): no tensor stays behind on the CPU.

And the proof that such a mistake would be seen: what CUDA refuses is refused, and made on purpose
in the loss or in the evaluation it ends the run.
"""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import NAMES, call
from pretended_gpu import pretended_gpu

from flowers import devices, evaluate, figures, files, losses
from flowers.data import open_flowers
from flowers.gallery.search import Searcher
from flowers.study import figures as study_figures

os.environ["HF_HUB_OFFLINE"] = "1"
COMMON = ("--batch_size", 12, "--wandb", "disabled")
DRAWINGS = ("training_curve", "confusion_matrix", "reliability", "mistakes_sheet", "picture_sheet")


@pytest.fixture(autouse=True, scope="module")
def quick():
    """No pictures are drawn, which takes half of the time and nothing of the device."""
    with pytest.MonkeyPatch.context() as patch:
        for name in DRAWINGS:
            patch.setattr(figures, name, lambda *_, **__: None)
        patch.setattr(study_figures, "wise_ft", lambda *_, **__: None)
        yield


@pytest.fixture(autouse=True)
def settings_of_this_test_alone(monkeypatch):
    monkeypatch.setattr(devices, "_chosen_precision", {})
    deterministic = torch.are_deterministic_algorithms_enabled()
    precision = torch.get_float32_matmul_precision()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)


def run(script, *arguments):
    """Run a script on the pretended GPU; its errors are those of the test."""
    with pretended_gpu():
        call(script, *arguments)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def losses_of(folder):
    return [row["train/loss"] for row in files.read_lines(folder / "metrics.jsonl", "train/loss")]


# -----------------------------------------------------------------------------
# train.py

TRAININGS = [
    # every strategy, with what decides where its tensors are
    "--strategy full",
    "--strategy full --chunk_size 5 --learn_temperature",
    "--strategy image",
    "--strategy image --no_cache --chunk_size 5",
    "--strategy text",
    "--strategy last_blocks --blocks 1",
    "--strategy last_blocks --blocks 1 --no_cache --augment crop",
    "--strategy last_blocks --blocks 1 --augment crop --views 2 --chunk_size 5 --epochs 2",
    "--strategy projection",
    "--strategy projection --augment flip --views 2 --epochs 2",
    "--strategy norm",
    "--strategy lora --rank 2",
    "--strategy lora --rank 2 --chunk_size 5",
    "--strategy prompt",
    "--strategy prompt --context_tokens 2 --no_cache",
    "--strategy linear --augment crop --views 2",
    "--strategy linear --holdout",
    "--strategy linear --start_from zero_shot --cross_modal --holdout",
    # every loss
    "--loss cross_entropy",
    "--loss cross_entropy --strategy image --chunk_size 5",
    "--loss sigmoid",
    "--loss sigmoid --strategy last_blocks --chunk_size 5 --learn_temperature",
    "--loss sigmoid --strategy text --logit_bias -5",
    "--positives pair",
    # what is kept beside the weights
    "--ema 0.9 --lr_decay 0.8 --pull 0.1 --holdout --eval_every 1",
    "--ema 0.9 --strategy last_blocks --pull 0.1 --temperature 0.05",
    # precisions: autocast does nothing on the pretended GPU, but the scaler of fp16 works
    "--precision fp16",
    "--precision fp16 --chunk_size 5 --pull 0.1",
    # a ResNet
    "--architecture tiny-rn --strategy full",
    "--architecture tiny-rn --strategy last_blocks --blocks 1",
    "--architecture tiny-rn --strategy projection",
    "--architecture tiny-rn --strategy lora --rank 2",
]


def train(small, runs, name, *options):
    """A run of one epoch, unless the options say otherwise."""
    options = ("--architecture", "tiny", "--epochs", 1, "--shots", 2, *options)
    run("train.py", "--data_root", small, *COMMON, "--runs", runs, "--name", name, *options)
    return runs / name


@pytest.mark.parametrize("flags", TRAININGS)
def test_training(flags, small, tmp_path):
    folder = train(small, tmp_path, "a", *flags.split())
    assert read(folder / "args.json")["device"] == "a pretended GPU"
    assert np.isfinite(losses_of(folder)).all()
    assert read(folder / "result.json")
    # Whoever has no GPU reads what was trained on one.
    for name in ("model.pt", "classifier.pt"):
        if (folder / name).exists():
            tensors = [t for t in torch.load(folder / name).values() if isinstance(t, torch.Tensor)]
            assert {t.device.type for t in tensors} == {"cpu"}
