"""train.py end to end: what it leaves behind, that it repeats itself, and that nothing is lost when it is killed."""

import json
import os
import shutil
import subprocess
import sys
import warnings

import clip
import numpy as np
import pytest
import scipy.io
import torch
from conftest import ROOT, error_line, write_dataset

from flowers import models
from flowers.files import read_lines
from flowers.weights import load_model

TINY = ("--architecture", "tiny", "--batch_size", 12, "--wandb", "disabled")


def weights(run):
    return torch.load(run / "model.pt", weights_only=True)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "small", per_class=12)


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """A run of twelve epochs, left alone, by the command line."""
    runs = tmp_path_factory.mktemp("runs")
    subprocess.run(
        [
            sys.executable,
            ROOT / "train.py",
            "--data_root",
            small,
            *map(str, TINY),
            "--epochs",
            "12",
            "--runs",
            runs,
            "--name",
            "alone",
        ],
        check=True,
    )
    return runs / "alone"


def test_the_run_folder(trained, small, cli, tmp_path):
    result = json.loads((trained / "result.json").read_text())
    assert result["test/top1"] > 60, "six coloured discs"
    assert result["test/top1_low"] < result["test/top1"] <= result["test/top1_high"] <= 100
    assert read_lines(trained.parent / "results.jsonl") == [result] and result["name"] == "alone"
    args = json.loads((trained / "args.json").read_text())
    assert (
        args["split_sizes"] == {"train": 54, "val": 0, "test": 18}
        and args["versions"]["torch"] == torch.__version__
    )
    steps = read_lines(trained / "metrics.jsonl")
    assert [r["step"] for r in steps] == list(range(1, 49)) and steps[-1]["train/loss"] < steps[0][
        "train/loss"
    ]
    assert {p.name for p in trained.iterdir()} == {
        "args.json",
        "metrics.jsonl",
        "checkpoint.pt",
        "model.pt",
        "predictions.csv",
        "report.csv",
        "result.json",
        "curve.png",
        "confusion.png",
        "mistakes.png",
    }
    code, _, _ = cli(
        "baseline_eval.py",
        "--data_root",
        small,
        "--architecture",
        trained / "model.pt",
        "--runs",
        tmp_path,
        "--name",
        "again",
        "--wandb",
        "disabled",
    )
    again = json.loads((tmp_path / "again" / "result.json").read_text())
    assert code == 0 and all(again[k] == v for k, v in result.items() if k.startswith("test/"))
    assert (tmp_path / "again" / "predictions.csv").read_bytes() == (
        trained / "predictions.csv"
    ).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (
            sum(
                p.numel()
                for p in clip.load(str(trained / "model.pt"), device="cpu")[0].parameters()
            )
            == result["parameters"]
        )


def test_a_seed_gives_the_same_weights_twice(trained, small, cli, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        assert (
            cli(
                "train.py",
                "--data_root",
                small,
                *TINY,
                "--epochs",
                12,
                "--runs",
                tmp_path,
                "--name",
                name,
                "--seed",
                seed,
            )[0]
            == 0
        )
    assert equal(weights(tmp_path / "same"), weights(trained)) and not equal(
        weights(tmp_path / "other"), weights(trained)
    )


def test_resume_with_another_seed_on_the_command_line_keeps_the_run_s_own(trained, tmp_path, cli):
    copy = shutil.copytree(trained, tmp_path / "runs" / "copy")
    (copy / "result.json").unlink()
    (copy / "model.pt").unlink()
    code, out, _ = cli("train.py", "--resume", copy, "--seed", 9, "--wandb", "disabled")
    assert code == 0 and "after epoch 12 of 12" in out and equal(weights(copy), weights(trained))
    result = json.loads((copy / "result.json").read_text())
    assert result["seed"] == 0 and result["runs"] == str(copy.parent), "where it lies now"


def test_holdout_evaluates_val_and_leaves_test_alone(small, tmp_path, cli):
    code, out, _ = cli(
        "train.py",
        "--data_root",
        small,
        *TINY,
        "--epochs",
        2,
        "--runs",
        tmp_path,
        "--name",
        "h",
        "--holdout",
        "--eval_every",
        1,
    )
    result = json.loads((tmp_path / "h" / "result.json").read_text())
    assert code == 0 and "val/top1" in result and not any(k.startswith("test/") for k in result)
    evaluations = [r for r in read_lines(tmp_path / "h" / "metrics.jsonl") if "val/top1" in r]
    assert [r["epoch"] for r in evaluations] == [1, 2] and evaluations[-1]["val/top1"] == result[
        "val/top1"
    ]


def test_options_of_the_loss(small, tmp_path, cli):
    captions = tmp_path / "captions.jsonl"
    captions.write_text(
        "".join(
            json.dumps({"file": f.name, "captions": ["a red one", f"picture {f.stem}"]}) + "\n"
            for f in (small / "jpg").iterdir()
        )
    )
    common = ("--data_root", small, *TINY, "--epochs", 1, "--runs", tmp_path)

    def losses(name, *options):
        code, _, err = cli("train.py", *common, "--name", name, *options)
        assert code == 0, err
        return [r["train/loss"] for r in read_lines(tmp_path / name / "metrics.jsonl")], read_lines(
            tmp_path / name / "metrics.jsonl"
        )[-1]["train/tau"]

    plain, tau = losses("plain")
    assert tau == pytest.approx(0.07, abs=1e-6)
    assert losses("chunks", "--chunk_size", 5)[0] == pytest.approx(plain, abs=2e-4)
    two = ("--prompt_template", "{}", "--prompt_template", "a {} flower")
    assert (
        losses("pair", *two, "--positives", "pair")[0]
        != losses("class", *two, "--positives", "class")[0]
    )
    warm, tau = losses("warm", "--temperature", 0.2, "--learn_temperature", "--tau_lr", 0.05)
    assert warm[0] != plain[0] and tau != pytest.approx(0.2, abs=1e-4)
    _, tau = losses("cold", "--temperature", 0.002)
    assert tau == pytest.approx(0.002, rel=1e-4)  # fixed
    _, tau = losses("clamped", "--temperature", 0.002, "--learn_temperature")
    assert 0.01 * (1 - 1e-6) < tau < 0.0102  # clamped as CLIP's was, and learned from there
    assert losses("captions", "--captions", captions)[0] != plain
    assert "caption_t2i_R@1" in str(
        json.loads((tmp_path / "captions" / "result.json").read_text()).keys()
    )
    assert losses("flip", "--augment", "flip")[0] != plain


def test_mistakes_end_with_one_line(small, tmp_path, cli):
    common = ("--data_root", small, *TINY, "--runs", tmp_path / "runs")
    assert "--holdout" in error_line(cli("train.py", *common, "--eval_every", 1))
    assert "args.json" in error_line(cli("train.py", "--resume", tmp_path))
    assert "--batch_size" in error_line(cli("train.py", *common, "--batch_size", 1))
    assert "--seed -1" in error_line(cli("train.py", *common, "--seed", -1))
    assert "--chunk_size" in error_line(cli("train.py", *common, "--chunk_size", -5))
    for flag, value in (("--lr", "nan"), ("--wd", -5), ("--tau_lr", -1), ("--temperature", "nan")):
        assert "at least 0" in error_line(cli("train.py", *common, flag, value))
    captions = tmp_path / "captions.jsonl"
    captions.write_text(
        "".join(
            json.dumps({"file": f.name, "captions": ["red"]}) + "\n"
            for f in (small / "jpg").iterdir()
        )
    )
    assert "no {}" in error_line(
        cli("train.py", *common, "--captions", captions, "--prompt_template", "a flower")
    )
    raw = {
        k: v.ravel().tolist()
        for k, v in scipy.io.loadmat(small / "setid.mat").items()
        if not k.startswith("_")
    }
    (tmp_path / "no_val.json").write_text(
        json.dumps(raw | {"tstid": raw["tstid"] + raw["valid"], "valid": []})
    )
    assert "no image for val" in error_line(
        cli("train.py", *common, "--splits_path", tmp_path / "no_val.json", "--holdout")
    )
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "args.json").write_text('{"job": "eval"}')
    assert "another script" in error_line(cli("train.py", "--resume", tmp_path / "eval"))
    assert "no captions" in error_line(
        cli("train.py", *common, "--captions", tmp_path / "none.jsonl")
    )
    assert "--lr" in error_line(
        cli("train.py", *common, "--lr", 1e30, "--name", "diverged", "--epochs", 3)
    )
    assert not any((tmp_path / "runs").glob("tiny*"))


def test_vit_b_32_of_random_weights(small, tmp_path, cli):
    """The true shape, from a state dict: a few steps, then the stock package opens the result."""
    torch.manual_seed(0)
    torch.save(models.build("ViT-B/32").state_dict(), tmp_path / "random.pt")
    code, _, err = cli(
        "train.py",
        "--data_root",
        small,
        "--architecture",
        tmp_path / "random.pt",
        "--batch_size",
        18,
        "--epochs",
        1,
        "--runs",
        tmp_path,
        "--name",
        "vit",
        "--wandb",
        "disabled",
    )
    assert code == 0, err
    assert (
        cli(
            "baseline_eval.py",
            "--data_root",
            small,
            "--architecture",
            tmp_path / "vit",
            "--runs",
            tmp_path,
            "--name",
            "e",
            "--wandb",
            "disabled",
        )[0]
        == 0
    )
    a, b = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("vit", "e"))
    assert a["test/top1"] == b["test/top1"] and a["parameters"] == 151_277_313
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock, _ = clip.load(str(tmp_path / "vit" / "model.pt"), device="cpu")
    ours = load_model(str(tmp_path / "vit"))
    with torch.no_grad():
        x = torch.randn(2, 3, 224, 224)
        assert torch.allclose(stock.encode_image(x), ours.encode_image(x), atol=0.02)


def test_real_images_learn(real, tmp_path, cli, monkeypatch):
    """One epoch on real images is far above chance (1%), on the images that a split file lists."""
    splits = tmp_path / "few.json"
    labels, raw = (
        scipy.io.loadmat(real / "imagelabels.mat")["labels"].ravel(),
        scipy.io.loadmat(real / "setid.mat"),
    )
    few = {
        k: [int(i) for i in raw[k].ravel() if labels[i - 1] in (51, 77, 46, 73, 89, 74)]
        for k in ("trnid", "valid", "tstid")
    }
    splits.write_text(json.dumps(few))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = set(os.listdir(real))
    code, out, err = cli(
        "train.py",
        "--data_root",
        real,
        "--splits_path",
        splits,
        "--architecture",
        "tiny",
        "--epochs",
        4,
        "--batch_size",
        32,
        "--runs",
        tmp_path,
        "--name",
        "real",
        "--wandb",
        "disabled",
    )
    assert code == 0, err
    result = json.loads((tmp_path / "real" / "result.json").read_text())
    chance = 100 * max(np.bincount([labels[i - 1] for i in few["trnid"]])) / len(few["trnid"])
    assert result["test/top1_low"] > chance and set(os.listdir(real)) == before, (
        "and the folder of real images is left as it was"
    )
