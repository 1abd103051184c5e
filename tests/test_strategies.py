"""Strategies: only what is named changes, frozen parts computed once change nothing, and every export is evaluated to the same answer."""

import json
import os
import shutil
import subprocess
import sys

import clip
import numpy as np
import pytest
import torch
from conftest import ROOT, error_line
from sklearn.linear_model import LogisticRegression

from flowers import devices, evaluate, files, frozen, models, runs, strategies, weights
from flowers.data import open_flowers, select
from flowers.losses import info_nce
from flowers.pixels import load_pixels

COMMON = ("--batch_size", 12, "--wandb", "disabled")
VIT_LAST, RN_LAST = "visual.transformer.resblocks.3.", "visual.layer4.0."
NAMED = {  # beginnings of the names that may change, for tiny and tiny-rn
    "full": ("",),
    "image": ("visual.",),
    "text": (
        "transformer.",
        "token_embedding.",
        "positional_embedding",
        "ln_final.",
        "text_projection",
    ),
    "last_blocks": (
        VIT_LAST,
        "visual.proj",
        RN_LAST,
        "visual.attnpool.",
        "transformer.resblocks.1.",
        "text_projection",
    ),
    "lora": tuple(
        f"{tower}transformer.resblocks.{i}.{w}"
        for tower in ("", "visual.")
        for i in range(4)
        for w in (
            "attn.in_proj_weight",
            "attn.out_proj.weight",
            "mlp.c_fc.weight",
            "mlp.c_proj.weight",
        )
    )
    + tuple(f"visual.attnpool.{n}_proj.weight" for n in "qkvc"),
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


def options(strategy):
    return ("--strategy", strategy, "--blocks", 1, "--rank", 4, "--lr", 1e-2)


def result(run):
    return json.loads((run / "result.json").read_text())


def losses(run):
    return [row["train/loss"] for row in files.read_lines(run / "metrics.jsonl")]


@pytest.mark.parametrize("strategy", strategies.STRATEGIES)
def test_each_strategy(strategy, start, small, tmp_path, cli):
    """Only the named parameters change; the export is evaluated to the same predictions; frozen parts computed once change no loss."""
    common = (
        "train.py",
        "--data_root",
        small,
        "--architecture",
        start,
        "--runs",
        tmp_path,
        "--epochs",
        2,
        "--augment",
        "none",
        *COMMON,
        *options(strategy),
    )
    code, out, err = cli(*common, "--name", "run")
    assert code == 0, err
    before, after = (
        torch.load(start, weights_only=True),
        torch.load(tmp_path / "run" / "model.pt", weights_only=True),
    )
    assert before.keys() == after.keys()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert all(n.startswith(NAMED[strategy]) for n in changed), changed
    assert all(
        any(n.startswith(prefix) for n in changed)
        for prefix in NAMED[strategy]
        if any(n.startswith(prefix) for n in before)
    )
    run = result(tmp_path / "run")
    if strategy not in ("lora", "linear", "prompt"):
        named = sum(
            p.numel()
            for n, p in weights.from_state_dict(before).named_parameters()
            if n.startswith(NAMED[strategy]) and n != "logit_scale"
        )
        assert run["trainable_image"] + run["trainable_text"] == named
    assert (
        f"image {run['trainable_image']:,} of " in out
        and f"; {run['parameters']:,} parameters" in out
    )
    assert (tmp_path / "run" / "classifier.pt").exists() == (strategy in ("linear", "prompt"))

    code, _, err = cli(
        "baseline_eval.py",
        "--data_root",
        small,
        "--architecture",
        tmp_path / "run" / "model.pt",
        "--runs",
        tmp_path,
        "--name",
        "e",
        "--wandb",
        "disabled",
    )
    assert code == 0, err
    assert (tmp_path / "e" / "predictions.csv").read_bytes() == (
        tmp_path / "run" / "predictions.csv"
    ).read_bytes()
    if strategy in ("image", "text", "last_blocks", "prompt"):
        assert cli(*common, "--name", "plain", "--no_cache")[0] == 0
        assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "run"), abs=2e-4)
        assert losses(tmp_path / "run")[-1] != losses(tmp_path / "run")[0]
        assert cli(*common, "--name", "chunks", "--chunk_size", 5)[0] == 0
        assert losses(tmp_path / "chunks") == pytest.approx(losses(tmp_path / "run"), abs=2e-4)


@pytest.mark.parametrize("name", ["tiny", "tiny-rn"])
@pytest.mark.parametrize("blocks", [None, 0, 1, 2])
def test_towers_in_two_parts_give_the_whole_gradient(name, blocks):
    torch.manual_seed(0)
    model = models.build(name)
    images, tokens = (
        torch.randn(6, 3, 64, 64),
        models.tokenize(
            ["rose", "a lenten rose", "globe thistle", "iris", "lotus flower", "mallow"]
        ),
    )
    if blocks:
        model.requires_grad_(False)
        for part in models.last_blocks(model, blocks):
            part.requires_grad_(True)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and n != "logit_scale"}

    def gradients(image_features, text_features):
        loss = info_nce(image_features, text_features, 20.0)
        return loss.item(), torch.autograd.grad(
            loss, trained.values()
        ) if loss.requires_grad else ()

    (image_trunk, image_rest), (text_trunk, text_rest) = (
        models.split_image_tower(model, blocks),
        models.split_text_tower(model, blocks),
    )
    middle = image_trunk(images)
    loss, grads = gradients(image_rest(middle), text_rest(text_trunk(tokens), tokens.argmax(1)))
    expected, expected_grads = gradients(
        models.encode_images(model, images), models.encode_texts(model, tokens)
    )
    assert loss == pytest.approx(expected, abs=1e-5) and middle.requires_grad is False
    assert bool(grads) == (blocks != 0)
    for name, a, b in zip(trained, grads, expected_grads):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-7, name


@pytest.mark.parametrize("strategy", ["last_blocks", "lora", "prompt", "text"])
def test_a_stopped_run_resumes_to_the_same_weights(strategy, small, tmp_path, cli, monkeypatch):
    """Stopped after its first epoch; the views of --augment are those of the uninterrupted run too."""
    common = (
        "train.py",
        "--data_root",
        small,
        "--architecture",
        "tiny",
        "--runs",
        tmp_path,
        "--epochs",
        2,
        "--augment",
        "crop",
        "--views",
        2,
        *COMMON,
        *options(strategy),
    )
    assert cli(*common, "--name", "whole")[0] == 0
    write, stopped = files.save_tensors, []

    def stop_after_first(path, state):
        write(path, state)
        if not stopped:
            stopped.append(path)
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "save_tensors", stop_after_first)
    assert (
        cli(*common, "--name", "stopped")[0] == 130
        and len(stopped) == 1
        and not (tmp_path / "stopped" / "result.json").exists()
    )
    code, out, err = cli("train.py", "--resume", tmp_path / "stopped", "--wandb", "disabled")
    assert code == 0 and "after epoch 1 of 2" in out, err
    for name in ("model.pt", "classifier.pt") if strategy == "prompt" else ("model.pt",):
        a, b = (
            torch.load(tmp_path / run / name, weights_only=True) for run in ("whole", "stopped")
        )
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")


def test_resume_refuses_other_starting_weights(small, tmp_path, cli):
    torch.manual_seed(1)
    torch.save(models.build("tiny").state_dict(), tmp_path / "start.pt")
    assert (
        cli(
            "train.py",
            "--data_root",
            small,
            "--architecture",
            tmp_path / "start.pt",
            "--runs",
            tmp_path,
            "--name",
            "run",
            "--epochs",
            1,
            *COMMON,
            *options("text"),
        )[0]
        == 0
    )
    (tmp_path / "run" / "result.json").unlink()
    torch.manual_seed(2)
    torch.save(models.build("tiny").state_dict(), tmp_path / "start.pt")
    assert "other weights" in error_line(
        cli("train.py", "--resume", tmp_path / "run", "--wandb", "disabled")
    )


def torchrun(script, *arguments):
    """Two gloo processes of one thread each, on any free port."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--rdzv_backend=c10d",
            "--rdzv_endpoint=localhost:0",
            *map(str, (script, *arguments)),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_equal_one_with_twice_the_batch(small, tmp_path, cli):
    common = (
        "--data_root",
        small,
        "--architecture",
        "tiny",
        "--runs",
        tmp_path,
        "--epochs",
        2,
        "--lr",
        1e-3,
        "--learn_temperature",
        "--wandb",
        "disabled",
    )
    done = torchrun(ROOT / "train.py", *common, "--batch_size", 6, "--name", "two")
    assert done.returncode == 0, done.stderr[-2000:]
    assert cli("train.py", *common, "--batch_size", 12, "--name", "one")[0] == 0
    assert (
        losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-3)
        and len(losses(tmp_path / "two")) == 6
    )
    assert losses(tmp_path / "two")[0] == pytest.approx(losses(tmp_path / "one")[0], abs=1e-5)
    assert [
        len(files.read_lines(tmp_path / "results.jsonl")),
        result(tmp_path / "two")["processes"],
    ] == [2, 2]
    a, b = (
        torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("one", "two")
    )
    for name in ("logit_scale", "visual.proj", "text_projection"):
        assert a["model"][name].allclose(b["model"][name], atol=2e-3), name


def test_gathered_gradients_are_those_of_the_whole_batch(tmp_path):
    """Exact gradients of two gloo processes, each with half of the batch, before any optimiser."""
    script = tmp_path / "gradients.py"
    script.write_text("""
import sys, torch, torch.distributed as dist
from flowers import models
from flowers.losses import average_gradients, gather, info_nce, same_class
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = models.build("tiny")
images, labels = torch.randn(8, 3, 64, 64), torch.tensor([0, 1, 2, 0, 3, 1, 4, 5])
tokens = models.tokenize(["rose", "iris", "lotus", "mallow", "globe thistle", "primula"])[labels]
own = slice(4 * rank, 4 * rank + 4)
def grads(image, text):
    model.zero_grad()
    loss = info_nce(image, text, model.logit_scale.exp(), same_class(labels))
    loss.backward()
    return loss.item()
whole = grads(models.encode_images(model, images), models.encode_texts(model, tokens))
expected = {n: p.grad.clone() for n, p in model.named_parameters()}
loss = grads(gather(models.encode_images(model, images[own])), gather(models.encode_texts(model, tokens[own])))
average_gradients(list(model.parameters()))
apart = max(((p.grad - expected[n]).norm() / expected[n].norm().clamp_min(1e-9)).item() for n, p in model.named_parameters())
open(f"{sys.argv[1]}/{rank}", "w").write(f"{abs(loss - whole)} {apart}")  # two processes' prints may share a line
dist.destroy_process_group()
""")
    done = torchrun(script, tmp_path)
    assert done.returncode == 0, done.stderr[-1500:]
    for rank in "01":
        loss, apart = map(float, (tmp_path / rank).read_text().split())
        assert loss < 1e-5 and apart < 1e-4, (loss, apart)


def test_lora_merges_to_what_it_computes():
    torch.manual_seed(0)
    for name in ("tiny", "tiny-rn"):
        model = models.build(name)
        x, tokens = torch.randn(3, 3, 64, 64), models.tokenize(["rose", "iris"])
        with torch.no_grad():
            plain = model.encode_image(x)
            strategies.prepare(model, "lora", rank=3)
            assert torch.allclose(model.encode_image(x), plain, atol=1e-6), "zero at the start"
            for n, p in model.named_parameters():
                if n.endswith(".up"):
                    p.normal_(std=0.1)
            images, texts = model.encode_image(x), model.encode_text(tokens)
            assert not torch.allclose(images, plain, atol=1e-3)
            state, _ = strategies.export(model)
            again = weights.from_state_dict(dict(state))
            assert torch.allclose(again.encode_image(x), images, atol=1e-5) and torch.allclose(
                again.encode_text(tokens), texts, atol=1e-5
            )


def test_a_learned_prompt_starts_as_the_words_and_leaves_other_texts_alone():
    torch.manual_seed(0)
    model = models.build("tiny")
    names = ["rose", "globe thistle"]
    with torch.no_grad():
        plain, other = (
            models.text_features(model, evaluate.fill_templates(names, [evaluate.TEMPLATE])),
            models.text_features(model, ["red petals"]),
        )
        strategies.prepare(model, "prompt", context_tokens=4)
        marked = evaluate.fill_templates(names, [strategies.context_template(4)])
        assert torch.allclose(models.text_features(model, marked), plain, atol=1e-6)
        model.context.add_(torch.randn_like(model.context))
        assert not torch.allclose(models.text_features(model, marked), plain, atol=1e-2)
        assert torch.equal(models.text_features(model, ["red petals"]), other)
    tokens = models.tokenize(marked)
    assert (tokens[:, 1:5] == models.PLACEHOLDER).all() and torch.equal(
        tokens[:, 5:], clip.tokenize([f"{n} flower" for n in names])[:, 1 : tokens.shape[1] - 4]
    )
    long = models.tokenize(["[V] " * 30 + "word " * 70])
    assert (
        long.shape == (1, 77) and long[0, -1] == 49407 and (long == models.PLACEHOLDER).sum() == 30
    )
    assert all(
        models.PLACEHOLDER not in clip.tokenize([text])[0].tolist()
        for text in ("\x00", "a\x00b", "[V] rose", "Ā")
    )


def test_linear_is_scikit_learn_s_regression(small, tmp_path, cli):
    """With --holdout C is the best on val; classes without training images keep the zero-shot classifier."""
    torch.save(models.build("tiny").state_dict(), tmp_path / "start.pt")
    for name, extra in (("h", ("--holdout",)), ("base", ("--classes", "base"))):
        code, out, err = cli(
            "train.py",
            "--data_root",
            small,
            "--architecture",
            tmp_path / "start.pt",
            "--runs",
            tmp_path,
            "--name",
            name,
            *COMMON,
            "--strategy",
            "linear",
            *extra,
        )
        assert code == 0 and ("chosen on val" in out) == (name == "h"), err
    flowers, model = (
        open_flowers(small, holdout=True),
        weights.load_model(str(tmp_path / "start.pt")),
    )
    features = {
        s: models.image_features(
            model, load_pixels(flowers, 64), torch.from_numpy(i.copy())
        ).numpy()
        for s, i in flowers.splits.items()
    }
    y = {s: flowers.labels[i] for s, i in flowers.splits.items()}
    best = max(
        (
            LogisticRegression(C=c, max_iter=1000).fit(features["train"], y["train"])
            for c in strategies.INVERSE_REGULARISATION
        ),
        key=lambda fit: fit.score(features["val"], y["val"]),
    )
    assert result(tmp_path / "h")["val/top1"] == pytest.approx(
        100 * best.score(features["val"], y["val"])
    )
    saved = torch.load(tmp_path / "base" / "classifier.pt", weights_only=True)
    assert torch.allclose(
        saved["weight"][3:],
        evaluate.zero_shot_head(model, flowers.class_names, [evaluate.TEMPLATE])[0][3:],
        atol=1e-5,
    )
    other = write_names(
        shutil.copytree(small, tmp_path / "other", ignore=shutil.ignore_patterns(".cache"))
    )
    assert "other classes" in error_line(
        cli(
            "baseline_eval.py",
            "--data_root",
            other,
            "--architecture",
            tmp_path / "base",
            "--runs",
            tmp_path,
            *COMMON[2:],
        )
    )


def write_names(root):
    names = json.loads((root / "cat_to_name.json").read_text())
    (root / "cat_to_name.json").write_text(json.dumps(names | {"1": "another flower"}))
    return root


def test_base_and_new_classes(small, tmp_path, cli):
    flowers = open_flowers(small)
    train = flowers.splits["train"]
    base, new = (select(train, flowers.labels, 6, part) for part in ("base", "new"))
    assert set(flowers.labels[base]) == {0, 1, 2} and sorted([*base, *new]) == sorted(train)
    few = select(train, flowers.labels, 6, "all", 3, seed=1)
    assert np.bincount(flowers.labels[few]).tolist() == [3] * 6 and np.array_equal(
        few, select(train, flowers.labels, 6, "all", 3, seed=1)
    )
    assert not np.array_equal(few, select(train, flowers.labels, 6, "all", 3, seed=2)) and set(
        few
    ) <= set(train)
    code, _, err = cli(
        "train.py",
        "--data_root",
        small,
        "--architecture",
        "tiny",
        "--classes",
        "base",
        "--shots",
        3,
        "--epochs",
        1,
        "--runs",
        tmp_path,
        "--name",
        "b",
        "--wandb",
        "disabled",
        "--batch_size",
        4,
    )
    assert code == 0, err
    assert (
        json.loads((tmp_path / "b" / "args.json").read_text())["split_sizes"]["train"] == 9
        and len(losses(tmp_path / "b")) == 2
    )
    assert {"test/base_top1", "test/new_top1", "test/harmonic_mean"} <= result(
        tmp_path / "b"
    ).keys()


def test_base_to_new_is_counted_among_their_own_classes():
    rng = np.random.default_rng(0)
    labels, scores = (
        torch.from_numpy(rng.integers(0, 7, 300)),
        torch.from_numpy(rng.normal(size=(300, 7))),
    )
    scores[torch.arange(300), labels] += 1
    got = evaluate.base_to_new(scores, labels)
    hits = {"base": [], "new": []}
    for row, y in zip(scores.tolist(), labels.tolist()):
        part = range(0, 4) if y < 4 else range(4, 7)
        hits["base" if y < 4 else "new"].append(max(part, key=lambda c: row[c]) == y)
    base, new = (100 * sum(h) / len(h) for h in hits.values())
    assert (got["base_top1"], got["new_top1"]) == pytest.approx((base, new)) and got[
        "harmonic_mean"
    ] == pytest.approx(2 * base * new / (base + new))
    assert evaluate.base_to_new(scores[labels < 4], labels[labels < 4]) == {}


def test_wise_ft_runs_from_start_to_fine_tuned(small, tmp_path, cli):
    assert (
        cli(
            "train.py",
            "--data_root",
            small,
            "--architecture",
            "tiny",
            "--seed",
            3,
            "--epochs",
            2,
            "--runs",
            tmp_path,
            "--name",
            "run",
            *COMMON,
        )[0]
        == 0
    )
    code, out, err = cli(
        "baseline_eval.py",
        "--data_root",
        small,
        "--architecture",
        tmp_path / "run",
        "--wise_ft",
        0,
        "--wise_ft",
        0.5,
        "--wise_ft",
        1,
        "--runs",
        tmp_path,
        "--name",
        "curve",
        "--wandb",
        "disabled",
    )
    assert code == 0 and "alpha 0.5" in out and (tmp_path / "curve" / "wise_ft.png").exists(), err
    rows = files.read_lines(tmp_path / "curve" / "metrics.jsonl")
    devices.seed_everything(3)
    start = weights.load_model("tiny").state_dict()
    tuned = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert evaluate.load_starting_weights(str(tmp_path / "run")).keys() == start.keys()
    for alpha, row in zip((0, 0.5, 1), rows):
        torch.save(
            {n: (1 - alpha) * start[n] + alpha * tuned[n] for n in tuned}, tmp_path / f"{alpha}.pt"
        )
        assert (
            cli(
                "baseline_eval.py",
                "--data_root",
                small,
                "--architecture",
                tmp_path / f"{alpha}.pt",
                "--runs",
                tmp_path,
                "--name",
                f"e{alpha}",
                "--wandb",
                "disabled",
            )[0]
            == 0
        )
        assert row["alpha"] == alpha and row["test/top1"] == pytest.approx(
            result(tmp_path / f"e{alpha}")["test/top1"]
        )
    assert (
        row["test/top1"]
        == result(tmp_path / "run")["test/top1"]
        == result(tmp_path / "curve")["test/top1"]
    )
    assert "no run of train.py" in error_line(
        cli(
            "baseline_eval.py",
            "--data_root",
            small,
            "--architecture",
            tmp_path / "0.5.pt",
            "--wise_ft",
            0.5,
            "--runs",
            tmp_path / "r",
            "--wandb",
            "disabled",
        )
    )


def test_kept_activations_follow_weights_and_cut(small, tmp_path, monkeypatch):
    root = shutil.copytree(small, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    flowers, model = open_flowers(root), models.build("tiny")
    pixels, index = load_pixels(flowers, 64), torch.arange(20)
    features = frozen.image_activations(model, flowers, pixels, index)
    assert torch.equal(features, models.image_features(model, pixels, index))
    kept = set((root / ".cache").glob("frozen-*"))
    stamp = next(iter(kept)).stat().st_ino
    frozen.image_activations(model, flowers, pixels, index)
    assert {p.stat().st_ino for p in (root / ".cache").glob("frozen-*")} == {stamp}, "used again"
    assert frozen.image_activations(model, flowers, pixels, index, blocks=1).shape == (20, 65, 128)
    model.visual.proj.data.mul_(-1)
    assert torch.allclose(
        frozen.image_activations(model, flowers, pixels, index), -features, atol=1e-6
    )
    assert len(list((root / ".cache").glob("frozen-*"))) == 3
    monkeypatch.setattr(frozen, "MOST_BYTES", 30_000)
    frozen.image_activations(model, flowers, pixels, index[:5])
    assert sum(
        p.stat().st_size for p in (root / ".cache").glob("frozen-*")
    ) <= 30_000 and not kept & set((root / ".cache").glob("frozen-*"))


def test_what_has_no_meaning_ends_with_one_line(small, tmp_path, cli):
    common = (
        "train.py",
        "--data_root",
        small,
        "--architecture",
        "tiny",
        "--runs",
        tmp_path / "runs",
        *COMMON,
    )
    assert "--blocks 9: the image tower has 4" in error_line(
        cli(*common, "--strategy", "last_blocks", "--blocks", 9)
    )
    assert "--rank 999" in error_line(cli(*common, "--strategy", "lora", "--rank", 999))
    assert "--context_tokens 60" in error_line(
        cli(*common, "--strategy", "prompt", "--context_tokens", 60)
    )
    assert "learns the prompt" in error_line(
        cli(*common, "--strategy", "prompt", "--prompt_template", "{}")
    )
    assert "--shots" in error_line(cli(*common, "--shots", 0))
    assert not (tmp_path / "runs").exists()
