"""What each strategy trains, keeps and leaves behind.

Only what a strategy names changes, frozen parts computed once change nothing, every export is
evaluated to the same answers, and two processes train as one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import clip
import numpy as np
import pytest
import torch
from conftest import ROOT, error_line
from sklearn.linear_model import LogisticRegression

from flowers import (
    UserError,
    cache,
    devices,
    evaluate,
    files,
    frozen,
    models,
    strategies,
    training,
    weights,
)
from flowers.choices import LOSSES, STRATEGIES, TEMPLATE, context_template
from flowers.data import open_flowers, select
from flowers.losses import info_nce
from flowers.pixels import get_batch, load_pixels

NO_WANDB = ("--wandb", "disabled")
COMMON = ("--batch_size", 12, *NO_WANDB)

# The beginnings of the names of weights that may change, in tiny and in tiny-rn.
LAST_VIT_BLOCK, LAST_RESNET_BLOCK = "visual.transformer.resblocks.3.", "visual.layer4.0."
TEXT_TOWER = (
    "transformer.",
    "token_embedding.",
    "positional_embedding",
    "ln_final.",
    "text_projection",
)
LAST_BLOCKS = (
    LAST_VIT_BLOCK,
    "visual.proj",
    LAST_RESNET_BLOCK,
    "visual.attnpool.",
    "transformer.resblocks.1.",
    "text_projection",
)
BLOCK_MATRICES = (
    "attn.in_proj_weight",
    "attn.out_proj.weight",
    "mlp.c_fc.weight",
    "mlp.c_proj.weight",
)
LORA = tuple(
    f"{tower}transformer.resblocks.{i}.{matrix}"
    for tower in ("", "visual.")
    for i in range(4)
    for matrix in BLOCK_MATRICES
) + tuple(f"visual.attnpool.{letter}_proj.weight" for letter in "qkvc")
# With the ends of the names: BatchNorm's running statistics stay.
NORM = tuple(
    f"{norm}.{part}"
    for part in ("weight", "bias")
    for norm in (
        *(f"transformer.resblocks.{i}.ln_{j}" for i in range(2) for j in (1, 2)),
        *(f"visual.transformer.resblocks.{i}.ln_{j}" for i in range(4) for j in (1, 2)),
        *("ln_final", "visual.ln_pre", "visual.ln_post"),
        *(f"visual.bn{j}" for j in (1, 2, 3)),
        *(f"visual.layer{i}.0.bn{j}" for i in (1, 2, 3, 4) for j in (1, 2, 3)),
        *(f"visual.layer{i}.0.downsample.1" for i in (1, 2, 3, 4)),
    )
)
TRAINED_NAMES = {
    "full": ("",),
    "image": ("visual.",),
    "text": TEXT_TOWER,
    "last_blocks": LAST_BLOCKS,
    "projection": ("visual.proj", "visual.attnpool.c_proj.weight"),
    "norm": NORM,
    "lora": LORA,
    "linear": (),
    "prompt": (),
}


@pytest.fixture(scope="module", params=["tiny", "tiny-rn"])
def start(request, tmp_path_factory):
    """A state dict to start from."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("start") / f"{request.param}.pt"
    torch.save(models.build(request.param).state_dict(), path)
    return path


@pytest.fixture
def train(cli, small, tmp_path):
    """train(name, *options) runs train.py on the small dataset; the run is tmp_path / name."""

    def run(name, *options):
        place = ("--data_root", small, "--runs", tmp_path, "--name", name)
        return cli("train.py", *place, *COMMON, *options)

    return run


@pytest.fixture
def evaluate_run(cli, small, tmp_path):
    """evaluate_run(name, architecture, *options) runs baseline_eval.py on the small dataset."""

    def run(name, architecture, *options):
        place = ("--data_root", small, "--runs", tmp_path, "--name", name)
        return cli("baseline_eval.py", *place, "--architecture", architecture, *NO_WANDB, *options)

    return run


def options_of(strategy):
    return ("--strategy", strategy, "--blocks", 1, "--rank", 4, "--lr", 1e-2)


def result(run):
    return json.loads((run / "result.json").read_text())


def losses(run, key="train/loss"):
    rows = files.read_lines(run / "metrics.jsonl")
    return [row[key] for row in rows]


def load(path):
    return torch.load(path, weights_only=True)


# -----------------------------------------------------------------------------
# what changes, and what is left behind


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_strategy(strategy, start, tmp_path, train, evaluate_run):
    """Only the named parameters change; the export is evaluated to the same predictions.

    Frozen parts computed once change no loss.
    """
    common = ("--architecture", start, "--epochs", 2, "--augment", "none", *options_of(strategy))
    code, out, err = train("run", *common)
    assert code == 0, err
    names = TRAINED_NAMES[strategy]
    before = load(start)
    after = load(tmp_path / "run" / "model.pt")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name.startswith(names) for name in changed), changed
    for prefix in names:
        if any(name.startswith(prefix) for name in before):
            assert any(name.startswith(prefix) for name in changed), prefix

    run = result(tmp_path / "run")
    if strategy not in ("lora", "linear", "prompt"):
        parameters = weights.from_state_dict(before).named_parameters()
        trained = [p for n, p in parameters if n.startswith(names) and n != "logit_scale"]
        assert run["trainable_image"] + run["trainable_text"] == sum(p.numel() for p in trained)
    assert f"image {run['trainable_image']:,} of " in out
    assert f"; {run['parameters']:,} parameters" in out
    has_classifier = (tmp_path / "run" / "classifier.pt").exists()
    assert has_classifier == (strategy in ("linear", "prompt"))

    code, _, err = evaluate_run("e", tmp_path / "run" / "model.pt")
    assert code == 0, err
    predictions = (tmp_path / "run" / "predictions.csv").read_bytes()
    assert (tmp_path / "e" / "predictions.csv").read_bytes() == predictions

    if strategy in ("image", "text", "last_blocks", "prompt"):
        expected = losses(tmp_path / "run")
        assert train("plain", *common, "--no_cache")[0] == 0
        assert losses(tmp_path / "plain") == pytest.approx(expected, abs=2e-4)
        assert expected[-1] != expected[0]
        assert train("chunks", *common, "--chunk_size", 5)[0] == 0
        assert losses(tmp_path / "chunks") == pytest.approx(expected, abs=2e-4)
    if strategy == "projection":
        assert run["pull"] == pytest.approx(1 / 6), "six training images a class"
        assert run["pull_by_default"] is True
        assert train("plain", *common, "--no_cache", "--chunk_size", 5)[0] == 0
        plain_losses, pulls = losses(tmp_path / "plain"), losses(tmp_path / "plain", "train/pull")
        assert plain_losses == pytest.approx(losses(tmp_path / "run"), abs=2e-4)
        assert pulls == pytest.approx(losses(tmp_path / "run", "train/pull"), rel=1e-3)
        assert pulls[0] == 0 < pulls[-1]


def build(name):
    """One of models.SHAPES, or `wide-heads`: heads, MLPs and GELU as in some of LAION's models."""
    if name != "wide-heads":
        return models.build(name)
    shape = models.SHAPES["tiny"]._replace(image_hidden=200, image_width=96)
    settings = models.OPENAI._replace(activation="gelu", image_head_width=48)
    return models.build_shape(shape, settings=settings)


@pytest.mark.parametrize("name", ["tiny", "tiny-rn", "wide-heads"])
@pytest.mark.parametrize("cut", [None, 0, 1, 2, models.PROJECTION])
def test_towers_in_two_parts_give_the_whole_gradient(name, cut):
    torch.manual_seed(0)
    model = build(name)
    images = torch.randn(6, 3, 64, 64)
    texts = ["rose", "a lenten rose", "globe thistle", "iris", "lotus flower", "mallow"]
    tokens = models.tokenize(texts)
    text_blocks = cut
    if cut == models.PROJECTION:
        strategies.prepare(model, "projection")
        text_blocks = 0
    elif cut:
        model.requires_grad_(False)
        for part in models.last_blocks(model, cut):
            part.requires_grad_(True)
    parameters = dict(model.named_parameters())
    del parameters["logit_scale"]
    trained = {name: p for name, p in parameters.items() if p.requires_grad}

    def gradients(image_features, text_features):
        loss = info_nce(image_features, text_features, 20.0)
        if not loss.requires_grad:
            return loss.item(), ()
        return loss.item(), torch.autograd.grad(loss, trained.values())

    image_trunk, image_rest = models.split_image_tower(model, cut)
    text_trunk, text_rest = models.split_text_tower(model, text_blocks)
    activations = image_trunk(images)
    text_features = text_rest(text_trunk(tokens), tokens.argmax(1))
    loss, grads = gradients(image_rest(activations), text_features)
    expected_loss, expected_grads = gradients(
        models.encode_images(model, images), models.encode_texts(model, tokens)
    )
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert activations.requires_grad is False
    assert bool(grads) == (cut != 0)
    if cut == models.PROJECTION:
        assert activations.shape == (6, models.image_projection(model).numel() // 128)
    for name, grad, expected in zip(trained, grads, expected_grads):
        assert (grad - expected).norm() <= 1e-4 * expected.norm() + 1e-7, name


def test_lora_merges_to_what_it_computes():
    torch.manual_seed(0)
    for name in ("tiny", "tiny-rn"):
        model = models.build(name)
        x, tokens = torch.randn(3, 3, 64, 64), models.tokenize(["rose", "iris"])
        with torch.no_grad():
            plain = model.encode_image(x)
            strategies.prepare(model, "lora", rank=3)
            assert torch.allclose(model.encode_image(x), plain, atol=1e-6), "zero at the start"
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith(".up"):
                    parameter.normal_(std=0.1)
            images, texts = model.encode_image(x), model.encode_text(tokens)
            assert not torch.allclose(images, plain, atol=1e-3)
            state, _ = strategies.export(model)
            again = weights.from_state_dict(dict(state))
            assert torch.allclose(again.encode_image(x), images, atol=1e-5)
            assert torch.allclose(again.encode_text(tokens), texts, atol=1e-5)


def test_a_learned_prompt_starts_as_the_words_and_leaves_other_texts_alone():
    torch.manual_seed(0)
    model = models.build("tiny")
    names = ["rose", "globe thistle"]
    prompts = evaluate.fill_templates(names, [TEMPLATE])
    with torch.no_grad():
        plain = models.text_features(model, prompts)
        other = models.text_features(model, ["red petals"])
        strategies.prepare(model, "prompt", context_tokens=4)
        marked = evaluate.fill_templates(names, [context_template(4)])
        assert torch.allclose(models.text_features(model, marked), plain, atol=1e-6)
        model.context.add_(torch.randn_like(model.context))
        assert not torch.allclose(models.text_features(model, marked), plain, atol=1e-2)
        assert torch.equal(models.text_features(model, ["red petals"]), other)

    # The tokens are those of the text, behind four placeholders.
    tokens = models.tokenize(marked)
    assert (tokens[:, 1:5] == models.PLACEHOLDER).all()
    unmarked = clip.tokenize([f"{name} flower" for name in names])
    assert torch.equal(tokens[:, 5:], unmarked[:, 1 : tokens.shape[1] - 4])

    # A text that is too long is cut, and still ends with the end token.
    long = models.tokenize(["[V] " * 30 + "word " * 70])
    assert long.shape == (1, 77)
    assert long[0, -1] == 49407
    assert (long == models.PLACEHOLDER).sum() == 30

    # No text of a user holds the placeholder.
    for text in ("\x00", "a\x00b", "[V] rose", "Ā"):
        assert models.PLACEHOLDER not in clip.tokenize([text])[0].tolist()


def test_linear_is_scikit_learn_s_regression(small, tmp_path, cli, train):
    """With --holdout C is the best on val; classes without training images stay zero-shot."""
    torch.save(models.build("tiny").state_dict(), tmp_path / "start.pt")
    common = ("--architecture", tmp_path / "start.pt", "--strategy", "linear")
    for name, extra in (("h", ("--holdout",)), ("base", ("--classes", "base"))):
        code, out, err = train(name, *common, *extra)
        assert code == 0, err
        assert ("chosen on val" in out) == (name == "h"), err

    flowers = open_flowers(small, holdout=True)
    model = weights.load_model(str(tmp_path / "start.pt"))
    pixels = load_pixels(flowers, 64)
    features, labels = {}, {}
    for split, index in flowers.splits.items():
        split_features = models.image_features(model, pixels, torch.from_numpy(index.copy()))
        features[split] = split_features.numpy()
        labels[split] = flowers.labels[index]
    scores = []
    for c in strategies.INVERSE_REGULARISATION:
        regression = LogisticRegression(C=c, max_iter=1000)
        regression.fit(features["train"], labels["train"])
        scores.append(regression.score(features["val"], labels["val"]))
    assert result(tmp_path / "h")["val/top1"] == pytest.approx(100 * max(scores))

    saved = load(tmp_path / "base" / "classifier.pt")
    zero_shot, _ = evaluate.zero_shot_head(model, flowers.class_names, [TEMPLATE])
    assert torch.allclose(saved["weight"][3:], zero_shot[3:], atol=1e-5)

    other = shutil.copytree(small, tmp_path / "other", ignore=shutil.ignore_patterns(".cache"))
    rename_a_class(other)
    place = ("--data_root", other, "--architecture", tmp_path / "base", "--runs", tmp_path)
    assert "other classes" in error_line(cli("baseline_eval.py", *place, *NO_WANDB))


def rename_a_class(root):
    path = root / "cat_to_name.json"
    names = json.loads(path.read_text())
    path.write_text(json.dumps(names | {"1": "another flower"}))


def test_what_has_no_meaning_ends_with_one_line(tmp_path, train):
    common = ("--architecture", "tiny", "--runs", tmp_path / "runs")

    def error(*options):
        return error_line(train("run", *common, *options))

    too_many_blocks = error("--strategy", "last_blocks", "--blocks", 9)
    assert "--blocks 9: the image tower has 4" in too_many_blocks
    assert "--rank 999" in error("--strategy", "lora", "--rank", 999)
    assert "--context_tokens 60" in error("--strategy", "prompt", "--context_tokens", 60)
    assert "learns the prompt" in error("--strategy", "prompt", "--prompt_template", "{}")
    assert "--shots" in error("--shots", 0)
    for strategy in ("lora", "prompt"):
        assert "nothing to pull back" in error("--strategy", strategy, "--pull", 0.1)
    for strategy in ("linear", "prompt", "projection"):
        assert "one layer alone" in error("--strategy", strategy, "--lr_decay", 0.9)
    for flag in ("--pull", "--ema", "--lr_decay"):
        assert "with 0 epochs" in error("--epochs", 0, flag, 0.5)
        assert "at most 1" in error(flag, "nan")
    assert "with 0 epochs" in error("--strategy", "linear", "--ema", 0.5)
    assert "below 1" in error("--ema", 1)
    assert "below 1" in error("--lr_decay", 0)
    assert "below 1" in error("--pull", -1)
    assert not (tmp_path / "runs").exists()


# -----------------------------------------------------------------------------
# pull, layer-wise learning rates, averaged weights


def test_a_run_is_this_loop(small, tmp_path, train):
    """Steps of `projection` with --pull and --ema, written once more."""
    torch.manual_seed(1)
    torch.save(models.build("tiny-16").state_dict(), tmp_path / "start.pt")
    pull, decay, lr = 0.7, 0.3, 1e-2
    options = ("--strategy", "projection", "--epochs", 2, "--pull", pull, "--ema", decay)
    code, _, err = train("run", "--architecture", tmp_path / "start.pt", *options, "--lr", lr)
    assert code == 0, err
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    assert (args["pull"], args["ema"], args["lr_decay"]) == (pull, decay, 1.0)

    flowers = open_flowers(small)
    model = weights.load_model(str(tmp_path / "start.pt"))
    index = torch.from_numpy(flowers.splits["train"].copy())
    labels = torch.tensor(flowers.labels)[index]
    prompts = evaluate.fill_templates(flowers.class_names, [TEMPLATE])
    texts = models.text_features(model, prompts)[labels]  # (n, D)
    images = get_batch(load_pixels(flowers, 64), index, "cpu")
    entering = []
    model.visual.ln_post.register_forward_hook(lambda _, __, output: entering.append(output))
    with torch.no_grad():
        model.encode_image(images)
    start = model.visual.proj.detach()
    weight = start.clone().requires_grad_()
    average = start.clone()
    optimizer = torch.optim.AdamW([weight], lr=lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    steps_per_epoch = len(index) // 12
    total_steps = 2 * steps_per_epoch
    expected, step = [], 0
    for epoch in range(2):
        order = torch.randperm(len(index), generator=devices.generator(0, epoch))
        for batch in order.split(12)[:steps_per_epoch]:
            warmup = (step + 1) / max(1, 0.1 * total_steps)
            done = max(0, step - 0.1 * total_steps) / max(1, 0.9 * total_steps)
            cosine = 0.5 * (1 + np.cos(np.pi * done))
            optimizer.param_groups[0]["lr"] = lr * min(warmup, cosine)
            features = torch.nn.functional.normalize(entering[0][batch] @ weight, dim=-1)
            same = labels[batch][:, None] == labels[batch][None, :]
            loss = info_nce(features, texts[batch], model.logit_scale.exp().detach(), same)
            penalty = pull * ((weight - start) ** 2).sum()
            expected.append((loss.item(), penalty.item()))
            optimizer.zero_grad()
            (loss + penalty).backward()
            torch.nn.utils.clip_grad_norm_([weight], 1.0)
            optimizer.step()
            keep = min(decay, (1 + step) / (10 + step))
            average = keep * average + (1 - keep) * weight.detach()
            step += 1

    run = tmp_path / "run"
    assert losses(run) == pytest.approx([loss for loss, _ in expected], abs=1e-4)
    penalties = [penalty for _, penalty in expected]
    assert losses(run, "train/pull") == pytest.approx(penalties, rel=1e-3)
    assert torch.allclose(load(run / "model.pt")["visual.proj"], average, atol=1e-5)
    assert (average - weight).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["tiny", "tiny-rn"])
@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_lower_layers_learn_slower(name, strategy):
    model = models.build(name)
    strategies.prepare(model, strategy, rank=2)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trained.pop("logit_scale", None)
    above = models.layers_above(model)
    groups = training.layerwise_groups(trained, above, 1.0, 0.1, 0.5)
    peak_of, decay_of = {}, {}
    for group in groups:
        for parameter in group["params"]:
            peak_of[parameter] = group["peak"]
            decay_of[parameter] = group["weight_decay"]
    assert len(peak_of) == len(trained) == sum(len(group["params"]) for group in groups)

    tops = ("visual.ln_post", "visual.proj", "visual.attnpool", "ln_final", "text_projection")
    for full_name, parameter in trained.items():
        block = re.search(r"resblocks\.(\d+)\.|layer(\d)\.", full_name)
        n_blocks = 4 if full_name.startswith("visual.") else 2
        if full_name.startswith(tops):
            layers = 0
        elif block:
            # Stages of a ResNet are counted from 1, and those of tiny-rn have one bottleneck.
            layers = n_blocks - int(block[1]) if block[1] else 5 - int(block[2])
        else:
            layers = n_blocks + 1
        assert peak_of[parameter] == 0.5**layers, full_name
        assert decay_of[parameter] == (0.1 if parameter.ndim >= 2 else 0.0), full_name

    # Without decay they are what they were: two groups, in the order of the parameters.
    plain = training.parameter_groups(trained, 1.0, 0.1)
    undecayed = training.layerwise_groups(trained, above, 1.0, 0.1, 1.0)
    assert len(plain) == len(undecayed) == 2
    for group, expected in zip(undecayed, plain):
        assert [id(p) for p in group["params"]] == [id(p) for p in expected["params"]]
        assert group["peak"] == expected["peak"]


def test_averaged_weights_are_there_only_within_the_block():
    parameters = {"a": torch.nn.Parameter(torch.ones(3)), "b": torch.nn.Parameter(torch.zeros(2))}
    average = {"a": torch.full((3,), 5.0)}
    with pytest.raises(KeyboardInterrupt), training.averaged(parameters, average):
        assert parameters["a"].tolist() == [5, 5, 5] and parameters["b"].tolist() == [0, 0]
        raise KeyboardInterrupt
    assert parameters["a"].tolist() == [1, 1, 1]

    path, wrong = Path("checkpoint.pt"), [{}, {"a": torch.ones(1)}, {"b": torch.ones(3)}, 5, None]
    for value in wrong:
        with pytest.raises(UserError, match="checkpoint.pt is damaged"):
            training.restore_average(path, average, {"average": value})
    assert average["a"].tolist() == [5, 5, 5]
    training.restore_average(path, {}, {})  # a checkpoint from before there were averages


# -----------------------------------------------------------------------------
# stopped and resumed


# What the averaged weights and the pull need to know after a stop.
REGULARISERS = {"norm": ("--ema", 0.9, "--pull", 0.1, "--lr_decay", 0.8)}


@pytest.mark.parametrize(
    "strategy, loss",
    [
        ("last_blocks", "sigmoid"),
        ("lora", "info_nce"),
        ("norm", "sigmoid"),
        ("prompt", "cross_entropy"),
        ("text", "info_nce"),
    ],
)
def test_a_stopped_run_resumes_to_the_same_weights(
    strategy, loss, tmp_path, cli, train, monkeypatch
):
    """Stopped after its first epoch; the views of --augment are those of the whole run too."""
    common = ("--architecture", "tiny-16", "--epochs", 2, "--augment", "crop", "--views", 2)
    common += ("--loss", loss, *REGULARISERS.get(strategy, ()))
    assert train("whole", *common, *options_of(strategy))[0] == 0
    save, stopped = files.save_tensors, []

    def stop_after_first(path, state):
        save(path, state)
        if not stopped:
            stopped.append(path)
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "save_tensors", stop_after_first)
    assert train("stopped", *common, *options_of(strategy))[0] == 130
    assert len(stopped) == 1
    assert not (tmp_path / "stopped" / "result.json").exists()
    code, out, err = cli("train.py", "--resume", tmp_path / "stopped", *NO_WANDB)
    assert code == 0 and "after epoch 1 of 2" in out, err

    names = ["model.pt", "classifier.pt"] if strategy == "prompt" else ["model.pt"]
    for name in names:
        whole, resumed = load(tmp_path / "whole" / name), load(tmp_path / "stopped" / name)
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")
    if strategy in REGULARISERS:
        pulls = losses(tmp_path / "whole", "train/pull")
        assert losses(tmp_path / "stopped", "train/pull") == pulls
    bias = "final_logit_bias"
    assert result(tmp_path / "whole").get(bias) == result(tmp_path / "stopped").get(bias)
    assert (bias in result(tmp_path / "whole")) == (loss == "sigmoid")


@pytest.mark.parametrize("options", [options_of("text"), ("--pull", 0.1)], ids=["text", "pull"])
def test_resume_refuses_other_starting_weights(options, tmp_path, cli, train):
    """Also where all weights are trained, if they are pulled to their start."""
    path = tmp_path / "start.pt"
    torch.manual_seed(1)
    torch.save(models.build("tiny").state_dict(), path)
    assert train("run", "--architecture", path, "--epochs", 1, *options)[0] == 0
    (tmp_path / "run" / "result.json").unlink()
    torch.manual_seed(2)
    torch.save(models.build("tiny").state_dict(), path)
    outcome = cli("train.py", "--resume", tmp_path / "run", *NO_WANDB)
    assert "other weights" in error_line(outcome)


# -----------------------------------------------------------------------------
# two processes


def torchrun(script, *arguments):
    """Two gloo processes of one thread each, on any free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    command += [str(part) for part in (script, *arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_two_processes_equal_one_with_twice_the_batch(small, tmp_path, cli):
    common = ("--data_root", small, "--architecture", "tiny", "--runs", tmp_path, *NO_WANDB)
    common += ("--epochs", 2, "--lr", 1e-3, "--learn_temperature", "--pull", 0.3, "--ema", 0.5)
    done = torchrun(ROOT / "train.py", *common, "--batch_size", 6, "--name", "two")
    assert done.returncode == 0, done.stderr[-2000:]
    assert cli("train.py", *common, "--batch_size", 12, "--name", "one")[0] == 0

    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(two) == 6
    assert two == pytest.approx(one, abs=1e-3)
    assert two[0] == pytest.approx(one[0], abs=1e-5)
    pulls = losses(tmp_path / "one", "train/pull")
    assert losses(tmp_path / "two", "train/pull") == pytest.approx(pulls, rel=1e-3)
    assert len(files.read_lines(tmp_path / "results.jsonl")) == 2
    assert result(tmp_path / "two")["processes"] == 2
    checkpoint_one, checkpoint_two = (load(tmp_path / n / "checkpoint.pt") for n in ("one", "two"))
    for name in ("logit_scale", "visual.proj", "text_projection"):
        expected = checkpoint_one["model"][name]
        assert expected.allclose(checkpoint_two["model"][name], atol=2e-3), name
        average = load(tmp_path / "two" / "model.pt")[name]
        assert torch.equal(average, checkpoint_two["average"][name])
        assert not torch.equal(average, checkpoint_two["model"][name])


GRADIENTS_OF_TWO_PROCESSES = """
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist

import train
from flowers import devices, models
from flowers.choices import LOSSES
from flowers.losses import same_class

processes = devices.start_processes()
torch.manual_seed(0)
model = models.build("tiny")
images = torch.randn(8, 3, 64, 64)
labels = torch.tensor([0, 1, 2, 0, 3, 1, 4, 5])
names = ["rose", "iris", "lotus", "mallow", "globe thistle", "primula"]
tokens = models.tokenize(names)
model.logit_bias = torch.nn.Parameter(torch.tensor(-12.0))


def make_batch(name, processes):
    own = processes.part(images)
    if name == "cross_entropy":
        rows, text_of_image = torch.arange(6), labels
    else:
        rows, text_of_image = torch.unique(labels[own], return_inverse=True)
    return train.Batch(images[own], rows, text_of_image, same_class(labels))


def encode_texts(rows):
    return models.encode_texts(model, tokens[rows])


def backward(name, processes):
    batch = make_batch(name, processes)
    image_features = models.encode_images(model, batch.images)
    text_features = encode_texts(batch.text_rows)
    model.zero_grad()
    loss = train.choose_loss(name, model, processes)(image_features, text_features, batch)
    loss.backward()
    processes.average_gradients([p for p in model.parameters() if p.grad is not None])
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def fitted_bias(processes):
    batch = make_batch("sigmoid", processes)
    config = SimpleNamespace(chunk_size=3)
    data = SimpleNamespace(config=config, batches=lambda *_: iter([batch]))
    encoders = (lambda x: models.encode_images(model, x), encode_texts)
    train.fit_bias(model, encoders, data, 8, processes)
    return model.logit_bias.item()


# Into files, because what two processes print may share a line.
with open(f"{sys.argv[1]}/{processes.rank}", "w") as file:
    for name in LOSSES:
        # The whole batch in one process, and half of it in each.
        alone = devices.Processes(0, 1, processes.device)
        expected_loss, expected = backward(name, alone)
        loss, gradients = backward(name, processes)
        apart = 0.0
        for key, gradient in gradients.items():
            distance = (gradient - expected[key]).norm() / expected[key].norm().clamp_min(1e-9)
            apart = max(apart, distance.item())
        start = processes.part(images).start
        print(name, len(gradients), start, abs(loss - expected_loss), apart, file=file)
    print(fitted_bias(alone), fitted_bias(processes), file=file)
dist.destroy_process_group()
"""


def test_gathered_gradients_are_those_of_the_whole_batch(tmp_path):
    """Exact gradients of two gloo processes, each with half of the batch, before any optimiser.

    Of every loss; with cross_entropy each process has the texts of all classes. The fitted bias of
    sigmoid is the same in both.
    """
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS_OF_TWO_PROCESSES)
    done = torchrun(script, tmp_path)
    assert done.returncode == 0, done.stderr[-1500:]
    biases = []
    for rank in (0, 1):
        *lines, last = (tmp_path / str(rank)).read_text().splitlines()
        assert [line.split()[0] for line in lines] == list(LOSSES)
        n_parameters = len(list(models.build("tiny").parameters()))
        for line in lines:
            name, trained, *numbers = line.split()
            assert int(trained) == n_parameters + (name == "sigmoid")
            start, loss, apart = map(float, numbers)
            assert start == 4 * rank, "each its own half"
            assert loss < 1e-5 and apart < 1e-4, line
        bias_of_one, bias_of_two = map(float, last.split())
        assert bias_of_two == pytest.approx(bias_of_one, abs=1e-5)
        biases.append(bias_of_two)
    assert biases[0] == biases[1] != -12


# -----------------------------------------------------------------------------
# base and new classes, WiSE-FT


def test_base_and_new_classes(small, tmp_path, train):
    flowers = open_flowers(small)
    index, labels = flowers.splits["train"], flowers.labels
    base, new = (select(index, labels, 6, part) for part in ("base", "new"))
    assert set(labels[base]) == {0, 1, 2}
    assert sorted([*base, *new]) == sorted(index)

    few = select(index, labels, 6, "all", 3, seed=1)
    assert np.bincount(labels[few]).tolist() == [3] * 6
    assert set(few) <= set(index)
    assert np.array_equal(few, select(index, labels, 6, "all", 3, seed=1))
    assert not np.array_equal(few, select(index, labels, 6, "all", 3, seed=2))

    few_base = ("--classes", "base", "--shots", 3, "--epochs", 1, "--batch_size", 4)
    code, _, err = train("b", "--architecture", "tiny", *few_base)
    assert code == 0, err
    args = json.loads((tmp_path / "b" / "args.json").read_text())
    assert args["split_sizes"]["train"] == 9
    assert len(losses(tmp_path / "b")) == 2
    expected_keys = {"test/base_top1", "test/new_top1", "test/harmonic_mean"}
    assert expected_keys <= result(tmp_path / "b").keys()


def test_base_to_new_is_counted_among_their_own_classes():
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 7, 300))
    scores = torch.from_numpy(rng.normal(size=(300, 7)))
    scores[torch.arange(300), labels] += 1
    metrics = evaluate.base_to_new(scores, labels)
    hits = {"base": [], "new": []}
    for row, label in zip(scores.tolist(), labels.tolist()):
        half, classes = ("base", range(0, 4)) if label < 4 else ("new", range(4, 7))
        best = max(classes, key=lambda c, row=row: row[c])
        hits[half].append(best == label)
    base, new = (100 * sum(half) / len(half) for half in hits.values())
    assert (metrics["base_top1"], metrics["new_top1"]) == pytest.approx((base, new))
    assert metrics["harmonic_mean"] == pytest.approx(2 * base * new / (base + new))
    assert evaluate.base_to_new(scores[labels < 4], labels[labels < 4]) == {}


def test_wise_ft_runs_from_start_to_fine_tuned(tmp_path, train, evaluate_run):
    assert train("run", "--architecture", "tiny", "--seed", 3, "--epochs", 2)[0] == 0
    alphas = (0, 0.5, 1)
    flags = [part for alpha in alphas for part in ("--wise_ft", alpha)]
    code, out, err = evaluate_run("curve", tmp_path / "run", *flags)
    assert code == 0 and "alpha 0.5" in out, err
    assert (tmp_path / "curve" / "wise_ft.png").exists()
    rows = files.read_lines(tmp_path / "curve" / "metrics.jsonl")

    devices.seed_everything(3)
    start = weights.load_model("tiny").state_dict()
    tuned = load(tmp_path / "run" / "model.pt")
    assert evaluate.load_starting_weights(str(tmp_path / "run")).keys() == start.keys()
    for alpha, row in zip(alphas, rows):
        between = {name: (1 - alpha) * start[name] + alpha * tuned[name] for name in tuned}
        torch.save(between, tmp_path / f"{alpha}.pt")
        assert evaluate_run(f"e{alpha}", tmp_path / f"{alpha}.pt")[0] == 0
        assert row["alpha"] == alpha
        assert row["test/top1"] == pytest.approx(result(tmp_path / f"e{alpha}")["test/top1"])
    assert row["test/top1"] == result(tmp_path / "run")["test/top1"]
    assert row["test/top1"] == result(tmp_path / "curve")["test/top1"]
    outcome = evaluate_run("r", tmp_path / "0.5.pt", "--wise_ft", 0.5)
    assert "no run of train.py" in error_line(outcome)
    outcome = evaluate_run("r", "tiny", "--wise_ft", 0.5)
    assert "tiny is no run of train.py" in error_line(outcome)
    outcome = evaluate_run("r", tmp_path / "run", "--wise_ft", "nan")
    assert "ALPHA must be a number" in error_line(outcome)


def test_wise_ft_needs_the_model_that_the_run_started_from():
    start, tuned = (models.build(name).state_dict() for name in ("tiny-rn", "tiny"))
    with pytest.raises(UserError, match="now holds another model"):
        evaluate.interpolate(models.build("tiny"), start, tuned, 0.5)


def test_wise_ft_notices_a_start_that_was_overwritten(start, tmp_path, train, evaluate_run):
    """By weights of the same shape, which nothing else tells from those of the start."""
    path = shutil.copy(start, tmp_path / "start.pt")
    assert train("run", "--architecture", path, "--epochs", 1)[0] == 0
    assert evaluate_run("whole", tmp_path / "run", "--wise_ft", 0.5)[0] == 0
    other = {name: torch.zeros_like(tensor) for name, tensor in load(path).items()}
    torch.save(other, path)
    line = error_line(evaluate_run("other", tmp_path / "run", "--wise_ft", 0.5))
    assert "start.pt has changed since" in line


# -----------------------------------------------------------------------------
# frozen parts that are kept


def test_kept_activations_follow_weights_and_cut(small, tmp_path, monkeypatch):
    root = shutil.copytree(small, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    flowers, model = open_flowers(root), models.build("tiny")
    pixels, index = load_pixels(flowers, 64), torch.arange(20)

    def kept_files():
        return set((root / ".cache").glob("frozen-*"))

    features = frozen.image_activations(model, flowers, pixels, index)
    assert torch.equal(features, models.image_features(model, pixels, index))
    kept = kept_files()
    inodes = {path.stat().st_ino for path in kept}
    assert len(inodes) == 1
    frozen.image_activations(model, flowers, pixels, index)
    assert {path.stat().st_ino for path in kept_files()} == inodes, "used again"

    # Another cut, and other weights, have files of their own.
    one_block = frozen.image_activations(model, flowers, pixels, index, cut=1)
    assert one_block.shape == (20, 65, 128)
    model.visual.proj.data.mul_(-1)
    negated = frozen.image_activations(model, flowers, pixels, index)
    assert torch.allclose(negated, -features, atol=1e-6)
    assert len(kept_files()) == 3

    # The bias of the sigmoid loss changes no text.
    tokens = models.tokenize(["rose", "iris"])
    frozen.text_activations(model, flowers, tokens)
    model.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    frozen.text_activations(model, flowers, tokens)
    assert len(kept_files()) == 4

    # Where the room is used up, the oldest go.
    monkeypatch.setattr(cache, "MAX_BYTES", 30_000)
    frozen.image_activations(model, flowers, pixels, index[:5])
    assert sum(path.stat().st_size for path in kept_files()) <= 30_000
    assert not kept & kept_files()
