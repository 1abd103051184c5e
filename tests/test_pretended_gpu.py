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


def test_the_numbers_are_those_of_the_cpu(small, tmp_path):
    options = ("--augment", "crop", "--ema", 0.9, "--epochs", 2, "--precision", "fp32")
    gpu = train(small, tmp_path, "gpu", *options)
    cpu = train(small, tmp_path, "cpu", *options, "--device", "cpu")
    assert read(cpu / "args.json")["device"].startswith("cpu, ")
    # Fused attention of the CPU and the plain one that the GPU takes differ in the last digits.
    assert losses_of(gpu) == pytest.approx(losses_of(cpu), rel=1e-5)


@pytest.mark.parametrize("flags", ["--ema 0.9 --pull 0.1 --precision fp16", "--strategy lora"])
def test_training_goes_on(flags, small, tmp_path):
    """Begun on a GPU and gone on there, or on a CPU: checkpoints are bound to no device."""
    folder = train(small, tmp_path, "a", "--epochs", 2, *flags.split())
    rows = files.read_lines(folder / "metrics.jsonl")
    half_done = files.load_tensors(folder / "checkpoint.pt") | {"epoch": 1}
    for device in ("cuda", "cpu"):
        copy = shutil.copytree(folder, tmp_path / device)
        (copy / "result.json").unlink()
        files.write_lines(copy / "metrics.jsonl", rows[:1])
        files.save_tensors(copy / "checkpoint.pt", half_done)
        run("train.py", "--resume", copy, "--device", device, "--wandb", "disabled")
        assert np.isfinite(losses_of(copy)).all() and len(losses_of(copy)) == 2
        assert (copy / "result.json").exists()


def test_captions_and_prompts(small, tmp_path):
    flowers = open_flowers(small)
    rows = [{"file": f.name, "captions": [f"a disc {f.name}", "a disc"]} for f in flowers.files]
    files.write_lines(tmp_path / "captions.jsonl", rows)
    sentences = {name: [f"a {name}", f"the {name} in the sun"] for name in NAMES}
    files.write_json(tmp_path / "prompts.json", sentences)

    captions = ("--captions", tmp_path / "captions.jsonl")
    train(small, tmp_path, "a", *captions, "--strategy", "last_blocks", "--blocks", 1)
    folder = train(small, tmp_path, "b", *captions, "--strategy", "image")
    train(small, tmp_path, "c", "--prompts", tmp_path / "prompts.json", "--loss", "cross_entropy")
    evaluated = ("--data_root", small, "--architecture", folder, "--runs", tmp_path)
    run("baseline_eval.py", *evaluated, *captions, "--wandb", "disabled", "--name", "d")
    assert "test/caption_i2t_R@1" in read(tmp_path / "d" / "result.json")


# -----------------------------------------------------------------------------
# the other scripts


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """Runs that were trained on the pretended GPU."""
    runs = tmp_path_factory.mktemp("runs")
    train(small, runs, "full", "--holdout")
    train(small, runs, "other", "--holdout", "--lr", 1e-3)
    train(small, runs, "linear", "--holdout", "--strategy", "linear")
    train(small, runs, "prompt", "--holdout", "--strategy", "prompt")
    return runs


EVALUATIONS = [
    "--architecture {runs}/full --wise_ft 0 --wise_ft 0.5",
    "--soup {runs}/full {runs}/other --wise_ft 0.5",
    "--architecture {runs}/full --calibrated",
    "--architecture {runs}/full --prompt_template a-{{}} --prompt_template {{}}",
    "--architecture {runs}/linear",
    "--architecture {runs}/prompt",
    "--architecture tiny-rn --precision fp16",
]


@pytest.mark.parametrize("flags", EVALUATIONS)
def test_evaluation(flags, small, trained, tmp_path):
    options = flags.format(runs=trained).split()
    place = ("--data_root", small, "--runs", tmp_path, "--name", "a", "--wandb", "disabled")
    run("baseline_eval.py", *place, *options)
    assert read(tmp_path / "a" / "args.json")["device"] == "a pretended GPU"
    if "--soup" in options:
        assert torch.load(tmp_path / "a" / "model.pt")["logit_scale"].device.type == "cpu"


@pytest.mark.parametrize("name", ["full", "linear", "prompt"])
def test_pictures_are_named(name, small, trained, tmp_path):
    pictures = sorted((small / "jpg").iterdir())[:3]
    outputs = ("--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv")
    run("predict.py", *pictures, "--architecture", trained / name, *outputs)
    assert len(read(tmp_path / "a.json")["pictures"]) == 3


@pytest.mark.parametrize("name", ["full", "linear", "prompt"])
def test_search(name, small, trained):
    with pretended_gpu():
        searcher = Searcher(open_flowers(small, holdout=True), trained / name)
        text = searcher.of_text("a rose")
        picture = searcher.of_picture(np.zeros((70, 90, 3), np.uint8))
        ranking = searcher.ranking(picture)
    assert text.shape == picture.shape == searcher.features[0].shape
    assert ranking.sum() == pytest.approx(1)


def test_features_for_isomap(small, trained, tmp_path):
    features = ("--features", "clip", "--architecture", trained / "full")
    run("data_Exploration/isomap.py", "--data_root", small, *features, "--output", tmp_path)
    assert list(tmp_path.glob("*.png"))


def test_speed_is_measured(capsys):
    run("test_models.py", "--measure_one", "tiny", "--batch_size", 2)  # what --measure starts
    assert json.loads(capsys.readouterr().out)["images_per_s"] > 0


def test_models_are_counted_on_the_meta_device(capsys):
    """As without a GPU: nothing is computed to count it."""
    run("test_models.py", "--architecture", "tiny")
    on_gpu = capsys.readouterr().out
    call("test_models.py", "--architecture", "tiny")
    assert on_gpu == capsys.readouterr().out


# -----------------------------------------------------------------------------
# Qwen

QWEN = ("--model", "tiny", "--wandb", "disabled")
QWEN_TRAININGS = [
    "--images 6",
    "--images 6 --chunk_size 2 --keep_activations",
    "--images 6 --also_train visual --precision fp16",
]
QWEN_EVALUATIONS = [
    "--images 3",
    "--images 3 --adapter {adapter} --holdout",
    "--images 3 --protocol generate --most_tokens 3 --list_names",
    "--images 3 --describe --split train --most_tokens 3",
    "--images 3 --answer described --most_tokens 3",
]


@pytest.fixture(scope="module")
def adapter(small, tmp_path_factory):
    return train_qwen(small, tmp_path_factory.mktemp("qwen"), "--images", 6)


def train_qwen(small, runs, *options):
    pytest.importorskip("peft")
    place = ("--data_root", small, "--runs", runs, "--name", "a", "--epochs", 1, "--batch_size", 6)
    run("qwen_train.py", *place, *QWEN, *options)
    return runs / "a"


@pytest.mark.parametrize("flags", QWEN_TRAININGS)
def test_qwen_training(flags, small, tmp_path):
    folder = train_qwen(small, tmp_path, *flags.split())
    assert np.isfinite(losses_of(folder)).all()
    assert (folder / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("flags", QWEN_EVALUATIONS)
def test_qwen_evaluation(flags, small, adapter, tmp_path):
    place = ("--data_root", small, "--runs", tmp_path, "--name", "a")
    run("qwen_eval.py", *place, *QWEN, *flags.format(adapter=adapter).split())
    assert read(tmp_path / "a" / "result.json")
