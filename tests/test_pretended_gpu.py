"""Every script on a pretended GPU (tests/pretended_gpu.py): no tensor stays behind on the CPU.

And the proof that such a mistake would be seen: what CUDA refuses is refused, and made on purpose
in the loss, in the evaluation or in a buffer it ends the run.

On a machine with a GPU the same runs are made on it, and the rest is skipped, by

    FLOWERS_TEST_GPU=1 python -m pytest tests/test_pretended_gpu.py
"""

import contextlib
import json
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NAMES, REAL_GPU, call
from pretended_gpu import ANSWERS, Graph, pretended_gpu

from flowers import devices, evaluate, files, losses, models
from flowers.data import open_flowers
from flowers.gallery.search import Searcher

os.environ["HF_HUB_OFFLINE"] = "1"
pytestmark = pytest.mark.usefixtures("without_pictures", "settings_of_one_test")
COMMON = ("--batch_size", 12, "--wandb", "disabled")
on_gpu = contextlib.nullcontext if REAL_GPU else pretended_gpu
pretended_only = pytest.mark.skipif(REAL_GPU, reason="about the pretended GPU")


def run(script, *arguments):
    """Run a script on the GPU; its errors are those of the test."""
    with on_gpu():
        call(script, *arguments)


def name_of_gpu():
    return torch.cuda.get_device_name() if REAL_GPU else "a pretended GPU"


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
    # other precisions than this GPU's own bf16
    "--precision fp32",
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
    assert read(folder / "args.json")["device"] == name_of_gpu()
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
    # Fused attention of the CPU and the plain one of the pretended GPU differ in the last digits. A
    # real one multiplies in TF32, which has three.
    assert losses_of(gpu) == pytest.approx(losses_of(cpu), rel=1e-2 if REAL_GPU else 1e-5)


@pytest.mark.parametrize(
    "flags", ["--strategy image --ema 0.9 --pull 0.1 --precision fp16", "--strategy lora"]
)
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


RECORDED = [
    ("--strategy full", 1),
    ("--loss cross_entropy --strategy text", 1),
    ("--strategy full --no_cuda_graph", 0),
    ("--strategy full --chunk_size 5", 0),
    ("--strategy linear", 0),
]


@pretended_only
@pytest.mark.parametrize(("flags", "n_graphs"), RECORDED)
def test_steps_are_recorded(flags, n_graphs, small, tmp_path, monkeypatch):
    graphs = []

    class Counted(Graph):
        def __init__(self):
            super().__init__()
            graphs.append(self)

    monkeypatch.setitem(ANSWERS, "CUDAGraph", Counted)
    folder = train(small, tmp_path, "a", *flags.split())
    assert len(graphs) == n_graphs
    if "--no_cuda_graph" not in flags and n_graphs:
        # Whoever goes on may say that it is to be recorded no more.
        (folder / "result.json").unlink()
        (folder / "checkpoint.pt").unlink()
        run("train.py", "--resume", folder, "--no_cuda_graph", "--wandb", "disabled")
        assert len(graphs) == n_graphs


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
    "--architecture {runs}/full --prompt_template a-NAME --prompt_template NAME",
    "--architecture {runs}/linear",
    "--architecture {runs}/prompt",
    "--architecture tiny-rn --precision fp16",
]


@pytest.mark.parametrize("flags", EVALUATIONS)
def test_evaluation(flags, small, trained, tmp_path):
    options = flags.format(runs=trained).replace("NAME", "{}").split()
    place = ("--data_root", small, "--runs", tmp_path, "--name", "a", "--wandb", "disabled")
    run("baseline_eval.py", *place, *options)
    assert read(tmp_path / "a" / "args.json")["device"] == name_of_gpu()
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
    with on_gpu():
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
    "--images 3 --adapter {adapter}",
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


# -----------------------------------------------------------------------------
# three mistakes, made on purpose, that must end a run


@pretended_only
def test_a_cpu_index_in_the_loss_is_seen(small, tmp_path, monkeypatch):
    def with_cpu_targets(images, texts, scale, matches=None):
        logits = scale * images @ texts.t()
        return F.cross_entropy(logits, torch.arange(len(logits)))  # no device

    monkeypatch.setattr(losses, "info_nce", with_cpu_targets)
    with pytest.raises(RuntimeError, match="same device.*nll_loss"):
        train(small, tmp_path, "a")
    train(small, tmp_path, "on the CPU", "--device", "cpu")


@pretended_only
def test_numpy_on_the_device_is_seen(small, tmp_path, monkeypatch):
    class_logits = evaluate.class_logits

    def without_cpu(images, head):
        return torch.from_numpy(class_logits(images, head).to(devices.choose_device()).numpy())

    monkeypatch.setattr(evaluate, "class_logits", without_cpu)
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        train(small, tmp_path, "a")
    call("baseline_eval.py", "--data_root", small, "--architecture", "tiny", "--runs", tmp_path)


@pretended_only
def test_a_float32_buffer_beside_bf16_is_seen(small, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "split_image_tower", with_buffer(models.split_image_tower))
    options = ("--strategy", "projection", "--no_cache")
    with pytest.raises(RuntimeError, match="dtype.*BFloat16"):
        train(small, tmp_path, "a", *options)
    train(small, tmp_path, "in fp32", *options, "--precision", "fp32")


def with_buffer(split_image_tower):
    """The image tower with a float32 buffer in a product outside of autocast."""

    def split(model, cut):
        trunk, rest = split_image_tower(model, cut)

        def trunk_and_buffer(images):
            x = trunk(images)  # (B, width), bf16
            return x @ torch.eye(x.shape[1], device=x.device)

        return trunk_and_buffer, rest

    return split


# -----------------------------------------------------------------------------
# what CUDA refuses and what it allows


def refused(words):
    return pytest.raises(RuntimeError, match=words)


@pytest.fixture
def gpu():
    with pretended_gpu():
        yield torch.device("cuda")


@pretended_only
def test_a_tensor_says_where_it_is(gpu):
    a = torch.ones(3, device=gpu)
    assert a.device == torch.device("cuda:0") and a.is_cuda and a.get_device() == 0
    assert a.to(gpu) is a and a.to(torch.zeros(2, device=gpu)) is a, "nothing to do"
    assert a.to(torch.float64).dtype == torch.float64 and a.to(gpu, copy=True) is not a
    assert a.cpu().device.type == "cpu" and torch.ones(3).cuda().is_cuda
    assert a.add_(1) is a and a.tolist() == [2, 2, 2] and float(a.sum()) == 6
    assert torch.tensor([1.0, a[0]], device=gpu).is_cuda and torch.ones_like(a).is_cuda
    assert torch.zeros(3, device="meta").is_meta, "the true meta device stays"
    model = torch.nn.Linear(3, 3).to(gpu)
    assert all(p.is_cuda and isinstance(p, torch.nn.Parameter) for p in model.parameters())
    model(a).sum().backward()
    assert model.weight.grad.is_cuda


@pretended_only
def test_devices_are_not_mixed(gpu):
    a, b = torch.ones(3, 3, device=gpu), torch.ones(3, 3)
    for mixed in (
        lambda: a + b,
        lambda: a @ b,
        lambda: torch.cat([a, b]),
        lambda: torch.where(b > 0, a, a),
        lambda: a.masked_fill(b > 0, 0.0),
        lambda: F.linear(a, b),
        lambda: torch.nn.Linear(3, 3)(a),
        lambda: b.add_(a),
        lambda: torch.equal(a, b),
        lambda: torch.add(a, a, out=b),
    ):
        with refused("same device"):
            mixed()


@pretended_only
def test_a_number_may_be_on_the_cpu(gpu):
    a, number, on_gpu = torch.ones(3, device=gpu), torch.tensor(2.0), torch.tensor(2.0, device=gpu)
    assert (a * number).tolist() == [2, 2, 2] and a.lerp(on_gpu, 0.5).is_cuda
    assert torch.where(a > 0, a, number).is_cuda
    for mixed in (
        lambda: torch.stack([on_gpu, number]),
        lambda: number.add_(on_gpu),
        lambda: torch.ones(3) * on_gpu,
    ):
        with refused("same device"):
            mixed()


@pretended_only
def test_indices(gpu):
    """A GPU tensor takes indices of the CPU where torch moves them itself, and nowhere else."""
    a, b = torch.ones(4, 3, device=gpu), torch.ones(4, 3)
    index, on_gpu = torch.tensor([0, 2]), torch.tensor([0, 2], device=gpu)
    mask = torch.tensor([True, False, True, False])
    assert a[index].is_cuda and a[on_gpu].is_cuda and a[mask].shape == (2, 3)
    a[index] = 5.0
    a[mask] = torch.zeros(2, 3, device=gpu)
    a[:2] = b[:2]  # a copy
    with refused("indices should be either on cpu"):
        b[on_gpu]
    with refused("same device"):
        a[index] = b[:2]
    columns = torch.zeros(4, 1, dtype=torch.long)
    for mixed in (
        lambda: a.index_select(0, index),
        lambda: a.gather(1, columns),
        lambda: a.scatter(1, columns, 1.0),
        lambda: a.scatter_add_(1, columns, a),
        lambda: a.index_add_(0, index, a[:2]),
        lambda: a.index_copy_(0, index, a[:2]),
        lambda: F.embedding(index, a),
        lambda: F.cross_entropy(a, torch.zeros(4, dtype=torch.long)),
        lambda: b.index_select(0, on_gpu),
    ):
        with refused("same device"):
            mixed()


@pretended_only
def test_other_things_that_only_the_cpu_has(gpu):
    a = torch.ones(3, 3, device=gpu)
    for take in (a.numpy, lambda: np.asarray(a), lambda: np.mean([a]), a.detach().numpy):
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            take()
    generator = torch.Generator().manual_seed(0)
    for draw in (
        lambda: torch.randn(3, device=gpu, generator=generator),
        lambda: torch.randperm(3, device=gpu, generator=generator),
        lambda: a.normal_(generator=generator),
    ):
        with refused("Expected a 'cuda' device type for generator"):
            draw()
    with refused("not implemented"):
        a.long() @ a.long()
    with refused("only dense CPU tensors can be pinned"):
        a.pin_memory()
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8, device=gpu)
    with refused("not implemented"):
        F.interpolate(images, (4, 4), mode="bicubic", antialias=True)


@pretended_only
def test_files_are_bound_to_the_device(tmp_path):
    with pretended_gpu():
        state = {"a": torch.ones(3, device="cuda"), "b": torch.ones(3)}
        torch.save(state, tmp_path / "a.pt")
    with refused("deserialize object on a CUDA device"):
        torch.load(tmp_path / "a.pt")
    assert files.load_tensors(tmp_path / "a.pt")["a"].tolist() == [1, 1, 1]


@pretended_only
def test_autocast_has_cuda_s_types(gpu):
    a = torch.ones(3, 3, device=gpu)
    attention = torch.nn.MultiheadAttention(4, 2).to(gpu)
    x = torch.ones(2, 1, 4, device=gpu)
    with torch.autocast("cuda", torch.bfloat16):
        assert (a @ a).dtype == F.linear(a, a).dtype == torch.bfloat16
        assert attention(x, x, x, need_weights=False)[0].dtype == torch.bfloat16
        low = a @ a
        assert low.softmax(0).dtype == F.layer_norm(low, (3,)).dtype == torch.float32
        assert F.cross_entropy(low, torch.zeros(3, dtype=torch.long, device=gpu)).dtype == a.dtype
        assert (low + low).dtype == F.gelu(low).dtype == torch.bfloat16
    with refused("dtype"):
        low @ a


@pretended_only
def test_afterwards_there_is_no_gpu():
    with pretended_gpu():
        assert torch.cuda.is_available()
    assert not torch.ones(2).is_cuda and torch.inference_mode.__enter__.__qualname__.startswith(
        "inf"
    )
