"""bf16 and fp16 on the CPU, under autocast, against fp32: losses, types, and what is kept.

How near: features are made in half precision, and compared in fp32. A number of bf16 has 8 bits and
is off by at most u = 2^-8 of itself, one of fp16 has 11 bits: u = 2^-11. A feature is a vector of
128 such numbers after some 26 roundings, six in each of four blocks, whose errors have either sign:
a cosine of two of them is off by about u * sqrt(2 * 26 / 128), so by less than u. A logit is the
cosine times the scale 1/tau, and a loss moves by no more than its logits: by scale * u. Without a
step that is left out the same holds after a few updates, which are small.
"""

import json
import os

import numpy as np
import pytest
import torch
from conftest import call

from flowers import devices, files, frozen, models
from flowers.data import open_flowers
from flowers.weights import load_model

os.environ["HF_HUB_OFFLINE"] = "1"
pytestmark = pytest.mark.usefixtures("without_pictures", "settings_of_one_test")
ROUNDING = {"bf16": 2**-8, "fp16": 2**-11}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCALE = 1 / 0.07  # of a model with random weights


def train(small, runs, precision, *options):
    """A run of two steps, unless the options say otherwise."""
    sizes = ("--architecture", "tiny", "--epochs", 1, "--shots", 4, "--batch_size", 12)
    place = ("--data_root", small, "--runs", runs, "--name", precision, "--wandb", "disabled")
    call("train.py", *place, *sizes, "--device", "cpu", "--precision", precision, *options)
    return runs / precision


def losses_of(folder):
    rows = files.read_lines(folder / "metrics.jsonl", "train/loss")
    return np.array([row["train/loss"] for row in rows])


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def dtypes_in(value) -> set:
    """The types of all tensors of numbers with a point, in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return {value.dtype} if value.is_floating_point() else set()
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return set().union(*map(dtypes_in, parts))


# -----------------------------------------------------------------------------
# train.py

TRAININGS = [
    "--strategy full",
    "--strategy image --chunk_size 5",
    "--strategy text",
    "--strategy last_blocks --blocks 1 --augment crop --views 2",
    "--strategy last_blocks --blocks 1 --no_cache --learn_temperature",
    "--strategy projection",
    "--strategy norm --ema 0.9 --lr_decay 0.8",
    "--strategy lora --rank 2",
    "--strategy prompt",
    "--loss cross_entropy --pull 0.1",
    "--loss sigmoid --chunk_size 5 --learn_temperature",
    "--loss sigmoid --strategy text",
    "--temperature 0.01 --holdout --eval_every 1",
    "--architecture tiny-rn --strategy last_blocks --blocks 1",
]


@pytest.mark.parametrize("flags", TRAININGS)
def test_losses_are_within_rounding(flags, small, tmp_path):
    options = flags.split()
    scale = 1 / float(options[1]) if "--temperature" in options else SCALE
    plain = losses_of(train(small, tmp_path, "fp32", *options))
    for precision, u in ROUNDING.items():
        folder = train(small, tmp_path, precision, *options)
        assert read(folder / "args.json")["precision"] == precision
        losses = losses_of(folder)
        if left_out_a_step(folder):
            losses = losses[:1]  # the weights of the next one are others
        difference = np.abs(losses - plain[: len(losses)])
        assert (difference <= scale * u).all() and difference.any(), (precision, difference)
        # What is trained, and all that a file keeps, is fp32.
        for name in ("model.pt", "checkpoint.pt"):
            assert dtypes_in(files.load_tensors(folder / name)) == {torch.float32}, name
        split = "val" if "--holdout" in options else "test"
        assert np.isfinite(read(folder / "result.json")[f"{split}/nll"])


def left_out_a_step(folder) -> bool:
    """Whether the scaler of fp16 met gradients that were too large, and halved its scale."""
    scaler = files.load_tensors(folder / "checkpoint.pt")["scaler"]
    return bool(scaler) and scaler["scale"] < 2**16


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_linear_heads(precision, small, tmp_path):
    for name, options in {"a": (), "b": ("--start_from", "zero_shot", "--cross_modal")}.items():
        folder = train(small, tmp_path / name, precision, "--strategy", "linear", *options)
        assert dtypes_in(files.load_tensors(folder / "classifier.pt")) == {torch.float32}


# -----------------------------------------------------------------------------
# frozen parts that are kept


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("architecture", ["tiny", "tiny-rn"])
def test_frozen_parts_are_kept_in_the_type_they_have(architecture, precision, small):
    """That of autocast after a product; fp32 where a tower adds to the embeddings of its tokens."""
    devices.set_precision(precision, "cpu")
    flowers = open_flowers(small)
    model = load_model(architecture)
    pixels = torch.zeros(len(flowers.files), 3, 64, 64, dtype=torch.uint8) + 7
    index = torch.arange(4)
    tokens = models.tokenize(["a rose", "a lotus in the sun"])
    kept = {
        "image block": frozen.image_activations(model, flowers, pixels, index, 1),
        "projection": frozen.image_activations(model, flowers, pixels, index, models.PROJECTION),
        "image feature": frozen.image_activations(model, flowers, pixels, index, 0),
        "text block": frozen.text_activations(model, flowers, tokens, 1),
        "text feature": frozen.text_activations(model, flowers, tokens, 0),
    }
    inside = DTYPES[precision]
    assert {name: tensor.dtype for name, tensor in kept.items()} == {
        "image block": inside,
        "projection": inside,
        "image feature": torch.float32,
        "text block": torch.float32,
        "text feature": torch.float32,
    }
    # Read again, they are what the trunk gives.
    trunk, _ = models.split_image_tower(model, 1)
    again = frozen.image_activations(model, flowers, pixels, index, 1)
    images = models.get_batch(pixels, index, "cpu")
    torch.testing.assert_close(again, trunk(images))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_keeping_changes_no_loss(precision, small, tmp_path):
    options = ("--strategy", "last_blocks", "--blocks", 1)
    kept = losses_of(train(small, tmp_path / "kept", precision, *options))
    computed = losses_of(train(small, tmp_path / "computed", precision, *options, "--no_cache"))
    assert kept == pytest.approx(computed, abs=SCALE * ROUNDING[precision] / 4)


# -----------------------------------------------------------------------------
# evaluation and Qwen


def test_probabilities_are_within_rounding(small, tmp_path):
    probabilities = {}
    for precision in DTYPES:
        place = ("--data_root", small, "--runs", tmp_path, "--name", precision)
        words = ("--architecture", "tiny", "--device", "cpu", "--precision", precision)
        call("baseline_eval.py", *place, *words, "--wandb", "disabled")
        result = read(tmp_path / precision / "result.json")
        assert result["precision"] == precision
        probabilities[precision] = result["test/nll"]
    for precision, u in ROUNDING.items():
        difference = abs(probabilities[precision] - probabilities["fp32"])
        assert 0 < difference <= SCALE * u


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_qwen(precision, small, tmp_path):
    """Its weights are in half precision, too, the adapter's in fp32."""
    pytest.importorskip("peft")
    from safetensors.torch import load_file

    losses = {}
    for name in ("fp32", precision):
        place = ("--data_root", small, "--runs", tmp_path, "--name", name, "--wandb", "disabled")
        sizes = ("--model", "tiny", "--images", 6, "--batch_size", 3, "--epochs", 1)
        call("qwen_train.py", *place, *sizes, "--device", "cpu", "--precision", name)
        losses[name] = losses_of(tmp_path / name)
        adapter = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        assert dtypes_in(adapter) == {torch.float32}
    # The weights are rounded as well, and logits have no scale: a few roundings of the loss itself.
    n_steps = 1 if left_out_a_step(tmp_path / precision) else 2
    difference = np.abs(losses[precision] - losses["fp32"])[:n_steps]
    assert (difference <= 4 * ROUNDING[precision] * losses["fp32"][:n_steps]).all()
    assert difference.any()
    words = ("--adapter", tmp_path / precision, "--images", 2, "--precision", precision)
    place = ("--data_root", small, "--runs", tmp_path, "--name", "eval", "--wandb", "disabled")
    call("qwen_eval.py", *place, *words, "--device", "cpu")
    assert np.isfinite(read(tmp_path / "eval" / "result.json")["test/nll"])


# -----------------------------------------------------------------------------
# a mistake, made on purpose, that must end a run


def test_a_float32_buffer_beside_bf16_is_seen(small, tmp_path, monkeypatch):
    """In a product outside of autocast, as where a trained part is written by hand."""
    split_image_tower = models.split_image_tower

    def split(model, cut):
        trunk, rest = split_image_tower(model, cut)
        return trunk, lambda x: rest(x @ torch.eye(x.shape[-1]))

    monkeypatch.setattr(models, "split_image_tower", split)
    options = ("--strategy", "projection")
    train(small, tmp_path, "fp32", *options)
    with pytest.raises(RuntimeError, match="dtype"):
        train(small, tmp_path, "bf16", *options)
