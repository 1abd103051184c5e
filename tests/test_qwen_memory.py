"""The estimate of memory against parameters and saved activations that are counted, and what is
decided by it; weights in 4 bits."""

import contextlib
import dataclasses
import json
import logging
import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft.tuners.tuners_utils import BaseTunerLayer
from qwen_scorer import FAMILIES, pictures, small_family

from flowers import UserError
from flowers.qwen import models
from flowers.qwen.adapters import add_adapter, base_model, modules_to_train
from flowers.qwen.answers import answer_loss
from flowers.qwen.memory import (
    Work,
    fits,
    largest_batch,
    memory,
    memory_line,
    must_recompute,
    tokens_of_image,
)
from flowers.qwen.models import load_model, load_skeleton
from flowers.qwen.offline import build
from flowers.qwen.prompts import encode, patches
from flowers.qwen_settings import QUESTIONS, read_training

# Matrices this small gain nothing from a second thread, and lose much on a busy machine.
pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return str(small_family(request.param, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def skeleton():
    return load_skeleton("random-2b")


def saved_bytes(model, compute):
    """What autograd keeps of a loss, but for the model's own weights; and the loss.

    A storage counts once, whoever keeps it."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = compute()
    return sum(n_bytes for n_bytes, _ in kept.values()), loss


def training_step(precision, also_train=(), recompute=False, casts=None):
    """Of tiny and four images: bytes that are kept, what Work says of them, loss and gradients."""
    model, processor = build("tiny", DTYPES[precision])
    torch.manual_seed(0)
    model = add_adapter(model, 8, 16.0, also_train, recompute).train()
    for module in model.modules():
        if casts is not None and isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = casts
    image = patches(processor, pictures(*[(64, 64)] * 4))
    inputs = encode(processor, QUESTIONS["brief"], image["image_grid_thw"])
    n_tokens = inputs["input_ids"].shape[1]
    context = contextlib.nullcontext()
    if precision == "bf16":
        context = torch.autocast("cpu", torch.bfloat16)

    def compute():
        with context:
            return answer_loss(model, processor, inputs, image, ["rose"] * 4)[0]

    n_bytes, loss = saved_bytes(model, compute)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    options = {"also_train": also_train, "recompute": recompute}
    work = Work(4, 16, n_tokens - 16 + 4, 8, precision, **options)
    return n_bytes, work, loss, gradients


# -----------------------------------------------------------------------------
# the estimate


def test_parameters_are_those_of_the_released_shape(skeleton):
    parts = memory(skeleton, Work(8, 334, 50, rank=8))
    # the count of Qwen/Qwen2-VL-2B-Instruct on the hub, in bf16
    assert parts["weights"] == pytest.approx(2 * 2_208_985_600 / 1e9, rel=1e-9)
    total = parts.pop("total")
    assert total == pytest.approx(sum(parts.values()))
    # LoRA of rank 8 on 28 blocks; weight, gradient and two moments in fp32, and its copy in bf16
    q_and_o = 2 * (1536 + 1536)
    k_and_v = 2 * (1536 + 256)
    gate_up_and_down = 3 * (1536 + 8960)
    lora = 28 * 8 * (q_and_o + k_and_v + gate_up_and_down)
    assert parts["trained"] == pytest.approx(18 * lora / 1e9)


@pytest.mark.parametrize("also_train", [[], ["merger"], ["visual", "language_model.norm"]])
def test_counted_parameters_are_those_of_the_model(folder, also_train):
    model, _ = load_model(folder, "cpu")
    n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    model = add_adapter(model, 8, 16.0, also_train)
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = sum(p.sum() for p in trained)
    loss.backward()
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    n_trained = sum(t.nbytes for t in (*trained, *(p.grad for p in trained), *states))

    work = Work(1, 16, 30, rank=8, precision="fp32", also_train=also_train)
    parts = memory(load_skeleton(folder), work)
    assert 1e9 * parts["weights"] == pytest.approx(n_bytes)
    assert 1e9 * parts["trained"] == pytest.approx(n_trained)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("also_train", [[], ["visual"]])
def test_counted_activations_are_near_the_estimate(precision, also_train):
    """tiny has two blocks of 1,500 that count in a model of 2B, and the rest of it is small."""
    skeleton = load_skeleton("tiny")
    n_bytes, work, loss, gradients = training_step(precision, also_train)
    estimate = memory(skeleton, work)["activations"]
    assert n_bytes / 1.3 < 1e9 * estimate < 1.3 * n_bytes

    # Computed again: less is kept, and the gradients are the same.
    fewer, work, same_loss, same_gradients = training_step(precision, also_train, True)
    assert fewer < 0.5 * n_bytes and fewer < 1e9 * memory(skeleton, work)["activations"]
    assert torch.equal(loss, same_loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same_gradients[name], gradient, msg=name)


def test_inputs_in_their_own_precision_save_memory_and_change_nothing():
    """Against peft's own way, which copies the inputs of LoRA in fp32."""
    copied, _, loss, gradients = training_step("bf16", casts=True)
    kept, _, same_loss, same_gradients = training_step("bf16")
    assert kept < 0.85 * copied  # measured: 2.16 of 2.63 MB
    assert torch.equal(loss, same_loss)
    assert all(torch.equal(same_gradients[name], g) for name, g in gradients.items())


# -----------------------------------------------------------------------------
# what is decided by it


def test_batches_and_recomputing_follow_the_free_memory(skeleton):
    training = Work(16, 324, 50, rank=8)
    needs = memory(skeleton, training)["total"]
    assert not must_recompute(skeleton, training, None)  # a CPU
    assert not must_recompute(skeleton, training, needs / 0.9 + 0.01)
    assert must_recompute(skeleton, training, needs / 0.9 - 0.01)
    again = dataclasses.replace(training, recompute=True)
    assert memory(skeleton, again)["total"] < 0.6 * needs

    for most, free, expected in ((16, None, 16), (12, None, 12), (12, 1000, 12), (16, 0.5, 1)):
        work = dataclasses.replace(again, batch_size=most)
        assert largest_batch(skeleton, work, free) == expected
    for batch_size in (1, 2, 4, 8):
        work = dataclasses.replace(again, batch_size=batch_size)
        free = memory(skeleton, work)["total"] / 0.9 + 0.01
        assert fits(skeleton, work, free)
        assert largest_batch(skeleton, again, free) == batch_size
    assert tokens_of_image("random-2b", skeleton, 512 * 512) == 334


def test_the_line_says_what_is_counted(skeleton):
    line = memory_line("x", skeleton, Work(8, 324, 900), free=4.0)
    assert line.startswith("x: about 6.31 GB")
    assert "8 images at a time in bf16 (weights 4.4, activations" in line
    assert line.endswith("4.0 GB are free on the GPU: too few, lower the batch or --max_pixels")
    work = Work(8, 324, 50, rank=8, load_4bit=True, also_train=["merger"], recompute=True)
    line = memory_line("x", skeleton, work, free=None)
    assert "in bf16, 4 bits a weight, blocks computed again (weights 2.5, trained" in line


# -----------------------------------------------------------------------------
# 4 bits


def test_4_bits_without_their_package_end_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install -r requirements-4bit.txt"):
        load_model("tiny", "cpu", load_4bit=True)
    monkeypatch.setattr(models, "find_spec", lambda name: "found")
    with pytest.raises(UserError, match="needs --device cuda or cpu, not mps"):
        models.check_4bit("tiny", "mps")
    # Whose 8 bits would be taken for 4.
    folder = small_family("qwen2_vl", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is quantised already, in another way"):
        models.check_4bit(str(folder), "cpu")


def test_weights_in_4_bits_take_what_is_estimated_and_train(folder):
    pytest.importorskip("bitsandbytes", reason="needs requirements-4bit.txt")
    model, processor = load_model(folder, "cpu", load_4bit=True)
    n_bytes = 0
    for name, parameter in model.named_parameters():
        n_bytes += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            assert state.quant_type == "nf4" and state.nested
            n_bytes += state.absmax.nbytes + state.state2.absmax.nbytes
        assert (state is not None) == ("layers" in name and name.endswith("proj.weight"))
    work = Work(1, 16, 30, rank=4, precision="fp32", load_4bit=True)
    estimate = 1e9 * memory(load_skeleton(folder), work)["weights"]
    assert estimate == pytest.approx(n_bytes, rel=1e-3)

    assert modules_to_train(model, ["merger"]) == ["model.visual.merger"]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model = add_adapter(model, 4, 8.0).train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n and p.dtype == torch.float32 for n, p in trained.items())
    image = patches(processor, pictures((70, 90), (64, 64)))
    inputs = encode(processor, QUESTIONS["brief"], image["image_grid_thw"])
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss, _ = answer_loss(model, processor, inputs, image, ["rose", "tree mallow"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    after = dict(base_model(model).named_parameters())
    for name, value in before.items():
        name = name if name in after else name.replace("proj.", "proj.base_layer.")
        assert torch.equal(after[name], value), name


def test_an_adapter_of_4_bits_brings_them_to_its_evaluation(small, tmp_path, cli):
    pytest.importorskip("bitsandbytes", reason="needs requirements-4bit.txt")
    common = ["--data_root", small, "--runs", tmp_path, "--wandb", "disabled"]
    arguments = ["--model", "tiny", "--load_4bit", "--also_train", "--epochs", 1]
    arguments += ["--batch_size", "auto", "--merge", "--name", "train"]
    code, out, err = cli("qwen_train.py", *common, *arguments)
    assert code == 0 and "in fp32, 4 bits a weight (weights" in out, err
    assert "free on the GPU" not in out
    assert "its adapter is merged into the weights of tiny as they are without it" in err
    stored = json.loads((tmp_path / "train" / "args.json").read_text())
    assert stored["load_4bit"] is True and stored["batch_size"] == 32
    assert read_training(None, str(tmp_path / "train" / "merged"))["load_4bit"] is False

    arguments = ["--adapter", tmp_path / "train", "--images", 3, "--batch_size", "auto"]
    code, out, err = cli("qwen_eval.py", *common, *arguments, "--name", "eval")
    assert code == 0 and "4 bits a weight" in out and "note: " not in err, err
    stored = json.loads((tmp_path / "eval" / "args.json").read_text())
    assert stored["load_4bit"] is True and stored["batch_size"] == 8

    arguments += ["--load_4bit=false", "--name", "other"]
    code, out, err = cli("qwen_eval.py", *common, *arguments)
    assert code == 0 and "4 bits a weight" not in out, err
    [note] = [line for line in err.lower().splitlines() if line.startswith("note: ")]
    assert "--load_4bit false: " in note and note.endswith("was trained with true")


def test_what_bitsandbytes_lacks_on_a_cpu_is_not_said():
    """It is where the import of it warns, on CPUs with AVX-512 in bf16."""
    ops = pytest.importorskip("bitsandbytes.backends.cpu.ops", reason="needs requirements-4bit.txt")
    assert not ops.logger.isEnabledFor(logging.WARNING)
    assert ops.logger.isEnabledFor(logging.ERROR)


def test_modules_in_4_bits_are_not_trained_whole():
    """As in a folder whose vision tower was quantised with the rest."""
    model = torch.nn.Module()
    model.merger = torch.nn.Module()
    packed = torch.zeros(2, dtype=torch.uint8)
    model.merger.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(UserError, match="is quantised: only LoRA can change it"):
        modules_to_train(model, ["merger"])
