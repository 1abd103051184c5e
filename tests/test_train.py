"""train.py end to end: what it leaves behind, that it repeats itself, and what it refuses."""

import csv
import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import clip
import numpy as np
import pytest
import scipy.io
import torch
from conftest import ROOT, error_line, write_dataset

import train as train_script
from flowers import models, settings
from flowers.data import open_flowers
from flowers.files import read_lines
from flowers.weights import load_model

NO_WANDB = ("--wandb", "disabled")
TINY = ("--architecture", "tiny", "--batch_size", 12, *NO_WANDB)
RUN_FILES = {
    "args.json",
    "trained_on.json",
    "class_names.json",
    "metrics.jsonl",
    "checkpoint.pt",
    "model.pt",
    "predictions.csv",
    "report.csv",
    "result.json",
    "curve.png",
    "confusion.png",
    "mistakes.png",
    "reliability.png",
    "duplicates.json",
}


def read(path):
    return json.loads(path.read_text())


def weights(run):
    return torch.load(run / "model.pt", weights_only=True)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def open_with_the_stock_package(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _ = clip.load(str(path), device="cpu")
    return model


def write_captions(path, images, sentences_of):
    """A captions file for the images of a folder."""
    lines = []
    for file in images.iterdir():
        lines.append(json.dumps({"file": file.name, "captions": sentences_of(file)}) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "small", per_class=12)


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """A run of twelve epochs, left alone, by the command line."""
    folder = tmp_path_factory.mktemp("runs")
    options = ("--data_root", small, *TINY, "--epochs", 12, "--runs", folder, "--name", "alone")
    command = [sys.executable, ROOT / "train.py", *map(str, options)]
    subprocess.run(command, check=True)
    return folder / "alone"


@pytest.fixture
def train(cli, small, tmp_path):
    """train(name, *options) trains tiny on the small dataset; the run is tmp_path / name."""

    def run(name, *options):
        place = ("--data_root", small, "--runs", tmp_path, "--name", name)
        return cli("train.py", *place, *TINY, *options)

    return run


def test_the_run_folder(trained, small, cli, tmp_path):
    result = read(trained / "result.json")
    assert result["test/top1"] > 60, "six coloured discs"
    assert result["test/top1_low"] < result["test/top1"] <= result["test/top1_high"] <= 100
    assert read_lines(trained.parent / "results.jsonl") == [result]
    assert result["name"] == "alone"
    args = read(trained / "args.json")
    assert args["split_sizes"] == {"train": 54, "val": 0, "test": 18}
    assert args["versions"]["torch"] == torch.__version__
    steps = read_lines(trained / "metrics.jsonl")
    assert [row["step"] for row in steps] == list(range(1, 49))
    assert steps[-1]["train/loss"] < steps[0]["train/loss"]
    assert {path.name for path in trained.iterdir()} == RUN_FILES

    # An evaluation of the weights repeats the result.
    place = ("--data_root", small, "--runs", tmp_path, "--name", "again")
    options = ("--architecture", trained / "model.pt", *NO_WANDB)
    assert cli("baseline_eval.py", *place, *options)[0] == 0
    again = read(tmp_path / "again" / "result.json")
    for key, value in result.items():
        assert not key.startswith("test/") or again[key] == value, key
    predictions = (trained / "predictions.csv").read_bytes()
    assert (tmp_path / "again" / "predictions.csv").read_bytes() == predictions

    stock = open_with_the_stock_package(trained / "model.pt")
    assert sum(p.numel() for p in stock.parameters()) == result["parameters"]


def test_a_seed_gives_the_same_weights_twice(trained, tmp_path, train):
    for name, seed in (("same", 0), ("other", 1)):
        assert train(name, "--epochs", 12, "--seed", seed)[0] == 0
    assert equal(weights(tmp_path / "same"), weights(trained))
    assert not equal(weights(tmp_path / "other"), weights(trained))


def test_resume_keeps_the_run_s_own_flags_and_refuses_others(trained, tmp_path, cli):
    copy = shutil.copytree(trained, tmp_path / "runs" / "copy")
    (copy / "result.json").unlink()
    (copy / "model.pt").unlink()
    line = error_line(cli("train.py", "--resume", copy, "--seed", 9, *NO_WANDB))
    assert "--seed" in line and "was begun with, 0" in line
    code, out, _ = cli("train.py", "--resume", copy, "--seed", 0, *NO_WANDB)
    assert code == 0 and "after epoch 12 of 12" in out
    assert equal(weights(copy), weights(trained))
    result = read(copy / "result.json")
    assert result["seed"] == 0
    assert result["runs"] == str(copy.parent), "where it lies now"


def test_holdout_evaluates_val_and_leaves_test_alone(tmp_path, train):
    code, _, err = train("h", "--epochs", 2, "--holdout", "--eval_every", 1)
    assert code == 0, err
    result = read(tmp_path / "h" / "result.json")
    assert "val/top1" in result
    assert not any(key.startswith("test/") for key in result)
    rows = read_lines(tmp_path / "h" / "metrics.jsonl")
    evaluations = [row for row in rows if "val/top1" in row]
    assert [row["epoch"] for row in evaluations] == [1, 2]
    assert evaluations[-1]["val/top1"] == result["val/top1"]


def test_options_of_the_loss(small, tmp_path, train, cli):
    def losses_and_tau(name, *options):
        code, _, err = train(name, "--epochs", 1, *options)
        assert code == 0, err
        rows = read_lines(tmp_path / name / "metrics.jsonl")
        return [row["train/loss"] for row in rows], rows[-1]["train/tau"]

    plain, tau = losses_and_tau("plain")
    assert tau == pytest.approx(0.07, abs=1e-6)
    chunks, _ = losses_and_tau("chunks", "--chunk_size", 5)
    assert chunks == pytest.approx(plain, abs=2e-4)

    two_templates = ("--prompt_template", "{}", "--prompt_template", "a {} flower")
    by_pair, _ = losses_and_tau("pair", *two_templates, "--positives", "pair")
    by_class, _ = losses_and_tau("class", *two_templates, "--positives", "class")
    assert by_pair[0] != by_class[0]

    # The temperature is learned, fixed, and clamped as CLIP's was, and learned from there.
    learned = ("--temperature", 0.2, "--learn_temperature", "--tau_lr", 0.05)
    warm, tau = losses_and_tau("warm", *learned)
    assert warm[0] != plain[0]
    assert tau != pytest.approx(0.2, abs=1e-4)
    _, tau = losses_and_tau("cold", "--temperature", 0.002)
    assert tau == pytest.approx(0.002, rel=1e-4)
    _, tau = losses_and_tau("clamped", "--temperature", 0.002, "--learn_temperature")
    assert 0.01 * (1 - 1e-6) < tau < 0.0102

    captions = write_captions(
        tmp_path / "captions.jsonl",
        small / "jpg",
        lambda file: ["a red one", f"picture {file.stem}"],
    )
    with_captions, _ = losses_and_tau("captions", "--captions", captions)
    assert with_captions != plain
    assert any("caption_t2i_R@1" in key for key in read(tmp_path / "captions" / "result.json"))
    # It can be resumed with the same captions only; a run of before has no digest of them.
    (tmp_path / "captions" / "result.json").unlink()
    captions.write_text(captions.read_text().replace("red", "blue"))
    resume = ("train.py", "--resume", tmp_path / "captions", *NO_WANDB)
    assert "has changed" in error_line(cli(*resume))
    args = read(tmp_path / "captions" / "args.json")
    del args["captions_digest"]
    (tmp_path / "captions" / "args.json").write_text(json.dumps(args))
    assert cli(*resume)[0] == 0
    flipped, _ = losses_and_tau("flip", "--augment", "flip")
    assert flipped != plain


@pytest.mark.parametrize("loss", ["cross_entropy", "sigmoid"])
def test_a_loss_with_kept_parts_is_that_without_them(loss, tmp_path, train):
    """In chunks and computed anew at each step; what is left behind opens as any other run."""
    common = ("--loss", loss, "--epochs", 1, "--strategy", "last_blocks", "--blocks", 1)
    assert train("kept", *common)[0] == 0
    code, _, err = train("anew", *common, "--no_cache", "--chunk_size", 5)
    assert code == 0, err
    kept, anew = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("kept", "anew"))
    for a, b in zip(kept, anew, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], abs=2e-4)
    open_with_the_stock_package(tmp_path / "kept" / "model.pt")
    result = read(tmp_path / "kept" / "result.json")
    if loss == "cross_entropy":
        assert result["positives"] is None
        return
    # The bias is learned, from where it suits the first batch.
    assert result["final_logit_bias"] == kept[-1]["train/logit_bias"]
    assert kept[0]["train/logit_bias"] != kept[-1]["train/logit_bias"]
    assert "logit_bias" in torch.load(tmp_path / "kept" / "checkpoint.pt")["model"]


def test_few_shots_choose_on_few_images(tmp_path, small, train, cli):
    """As many val images as --shots, at most four; baseline_eval.py takes all of the split."""
    code, _, err = train("two", "--epochs", 0, "--holdout", "--shots", 2)
    assert code == 0, err
    args, result = (read(tmp_path / "two" / f"{name}.json") for name in ("args", "result"))
    assert args["val_shots"] == 2
    assert result["images"] == 12
    with (tmp_path / "two" / "predictions.csv").open() as file:
        numbers = [int(row["file"][6:11]) for row in csv.DictReader(file)]
    labels = open_flowers(small).labels
    assert np.bincount([labels[number - 1] for number in numbers]).tolist() == [2] * 6

    common = ("--data_root", small, "--runs", tmp_path, *NO_WANDB)
    evaluation = ("--architecture", tmp_path / "two", "--split", "val", "--name", "e")
    code, _, err = cli("baseline_eval.py", *common, *evaluation)
    assert code == 0, err
    assert read(tmp_path / "e" / "result.json")["images"] == 18

    # A run of before --val_shots goes on as it was begun.
    for key in ("val_shots", "loss", "logit_bias"):
        del args[key]
    (tmp_path / "two" / "args.json").write_text(json.dumps(args))
    (tmp_path / "two" / "result.json").unlink()
    assert cli("train.py", "--resume", tmp_path / "two", *NO_WANDB)[0] == 0
    assert read(tmp_path / "two" / "result.json")["images"] == 18


def test_which_val_images_are_drawn(small):
    flowers = open_flowers(small, holdout=True)
    common = {"classes": "all", "processes": 1, "eval_split": "val"}

    def choose(shots, val_shots, seed=0):
        config = SimpleNamespace(shots=shots, val_shots=val_shots, seed=seed, **common)
        config.trains, config.captions = True, None
        train_index, val_index = train_script.choose_images(flowers, config)
        return train_index.tolist(), set(val_index.tolist())

    every, three, one, other_seed = (
        choose(2, None),
        choose(2, 3),
        choose(2, 1),
        choose(2, 1, seed=1),
    )
    assert [len(val) for _, val in (every, three, one, other_seed)] == [18, 18, 6, 6]
    assert one[1] < every[1] == set(flowers.splits["val"])
    assert one[1] != other_seed[1]
    assert one[0] == every[0] != other_seed[0], "the training images are drawn as before"

    # By default as many as --shots, at most four.
    for flags, expected in (((), None), (("--shots", 3), 3), (("--shots", 16), 4)):
        arguments = ["--holdout", *map(str, flags)]
        args = settings.make_parser().parse_args(arguments)
        assert settings.resolve(args, processes=1).val_shots == expected

    # A class without val images is left out.
    some = flowers.splits["val"][flowers.labels[flowers.splits["val"]] != 2]
    flowers = replace(flowers, splits=flowers.splits | {"val": some})
    assert sorted(flowers.labels[[*choose(2, 1)[1]]]) == [0, 1, 3, 4, 5]


def test_mistakes_end_with_one_line(small, tmp_path, cli):
    common = ("--data_root", small, *TINY, "--runs", tmp_path / "runs")

    def error(*options):
        return error_line(cli("train.py", *common, *options))

    assert "--holdout" in error("--eval_every", 1)
    assert "--batch_size" in error("--batch_size", 1)
    assert "--seed -1" in error("--seed", -1)
    assert "--val_shots needs --holdout" in error("--val_shots", 2)
    assert "--val_shots" in error("--holdout", "--val_shots", 0)
    assert "leave out --positives" in error("--loss", "cross_entropy", "--positives", "pair")
    captions = ("--captions", tmp_path / "any.jsonl")
    assert "leave out --captions" in error("--loss", "cross_entropy", *captions)
    assert "--loss sigmoid" in error("--logit_bias", -10)
    assert "finite" in error("--loss", "sigmoid", "--logit_bias", "nan")
    assert "leave out --loss" in error("--strategy", "linear", "--loss", "sigmoid")
    assert "--chunk_size" in error("--chunk_size", -5)
    assert "--eval_every" in error("--holdout", "--eval_every", -3)
    numbers = (("--lr", "nan"), ("--lr", "inf"), ("--wd", -5), ("--wd", "1e400"))
    for flag, value in (*numbers, ("--temperature", "nan"), ("--temperature", "inf")):
        assert "at least 0" in error(flag, value)
    assert "at least 0" in error("--learn_temperature", "--tau_lr", -1)

    captions = write_captions(tmp_path / "captions.jsonl", small / "jpg", lambda file: ["red"])
    assert "no {}" in error("--captions", captions, "--prompt_template", "a flower")
    assert "no captions" in error("--captions", tmp_path / "none.jsonl")

    raw = scipy.io.loadmat(small / "setid.mat")
    ids = {name: raw[name].ravel().tolist() for name in ("trnid", "valid", "tstid")}
    no_val = {"trnid": ids["trnid"], "valid": [], "tstid": ids["tstid"] + ids["valid"]}
    (tmp_path / "no_val.json").write_text(json.dumps(no_val))
    assert "no image for val" in error("--splits_path", tmp_path / "no_val.json", "--holdout")

    labels = scipy.io.loadmat(small / "imagelabels.mat")["labels"].ravel()
    of_one = [i for i in ids["tstid"] if labels[i - 1] == labels[ids["tstid"][0] - 1]]
    (tmp_path / "one.json").write_text(json.dumps(no_val | {"tstid": of_one}))
    one_class = ("--splits_path", tmp_path / "one.json", "--splits_base", 1, "--strategy", "linear")
    assert "of one class" in error(*one_class)

    assert "args.json" in error_line(cli("train.py", "--resume", tmp_path))
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "args.json").write_text('{"job": "eval"}')
    assert "another script" in error_line(cli("train.py", "--resume", tmp_path / "eval"))

    assert "--lr" in error("--lr", 1e30, "--name", "diverged", "--epochs", 3)
    assert not any((tmp_path / "runs").glob("tiny*"))


@pytest.mark.parametrize(
    ("flags", "noted"),
    [
        ("--strategy full --views 8", "--views"),
        ("--strategy lora --no_cache", "--no_cache"),
        ("--strategy norm --wd 0.5", "--wd"),
        ("--strategy text --views 8", "--views"),
        ("--strategy text --views 8 --augment flip --no_cache --wd 0.5", None),
        ("--strategy linear --captions any", None),  # it is evaluated with them
        ("--tau_lr 0.1", "--tau_lr"),
        ("--tau_lr 0.1 --loss sigmoid", None),
        ("--strategy linear --temperature 0.1", "--temperature"),
        ("--strategy linear --prompt_template a{}", "--prompt_template"),
        ("--strategy linear --prompt_template a{} --classes base", None),
        ("--strategy linear --prompt_template a{} --start_from zero_shot", None),
    ],
)
def test_a_flag_that_changes_nothing_is_noted(flags, noted, capsys):
    parser = settings.make_parser()
    settings.note_unused(parser.parse_args(flags.split()), parser)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ([noted] if noted else [])


def test_what_a_strategy_does_not_use_is_said_and_not_recorded(tmp_path, train, cli):
    in_vain = ("--epochs", 50, "--batch_size", 16, "--wd", 0.5, "--learn_temperature", "--rank", 4)
    code, _, err = train("probe", "--strategy", "linear", *in_vain)
    assert code == 0, err
    notes = [line.split()[1] for line in err.splitlines() if "has no meaning for" in line]
    assert sorted(notes) == [
        "--batch_size",
        "--epochs",
        "--learn_temperature",
        "--rank",
        "--wd",
    ]
    args = read(tmp_path / "probe" / "args.json")
    for key in ("loss", "positives", "learn_temperature", "tau_lr", "lr", "batch_size", "wd"):
        assert args[key] is None, key
    assert args["epochs"] == 0

    # A probe of before recorded what it did not use, and goes on all the same, as does a new one.
    before = {"loss": "info_nce", "positives": "class", "batch_size": 64, "lr": 5e-4, "wd": 0.1}
    for stored in (args, args | before):
        (tmp_path / "probe" / "args.json").write_text(json.dumps(stored))
        result = read(tmp_path / "probe" / "result.json")
        (tmp_path / "probe" / "result.json").unlink()
        # Nor is it asked whether the same flags, which had no effect, are typed again.
        resume = ("--resume", f"{tmp_path / 'probe'}/", "--epochs", 50, "--lr", 1e-3)
        code, _, err = cli("train.py", *resume, *NO_WANDB)
        assert code == 0 and "no meaning" not in err, err
        again = read(tmp_path / "probe" / "result.json")
        assert again["test/top1"] == result["test/top1"]
        assert again["batch_size"] is None


def test_vit_b_32_of_random_weights(small, tmp_path, cli):
    """The true shape, from a state dict: a few steps, then the stock package opens the result."""
    torch.manual_seed(0)
    torch.save(models.build("ViT-B/32").state_dict(), tmp_path / "random.pt")
    common = ("--data_root", small, "--runs", tmp_path, *NO_WANDB)
    start = ("--architecture", tmp_path / "random.pt", "--batch_size", 18, "--epochs", 1)
    code, _, err = cli("train.py", *common, *start, "--name", "vit")
    assert code == 0, err
    result = read(tmp_path / "vit" / "result.json")
    assert result["parameters"] == 151_277_313

    code, _, err = cli(
        "baseline_eval.py", *common, "--architecture", tmp_path / "vit", "--name", "e"
    )
    assert code == 0, err
    assert read(tmp_path / "e" / "result.json")["test/top1"] == result["test/top1"]

    stock = open_with_the_stock_package(tmp_path / "vit" / "model.pt")
    ours = load_model(str(tmp_path / "vit"))
    with torch.no_grad():
        x = torch.randn(2, 3, 224, 224)
        assert torch.allclose(stock.encode_image(x), ours.encode_image(x), atol=0.02)


def test_real_images_learn(real, tmp_path, cli, monkeypatch):
    """A few epochs on real images are far above chance, on the images that a split file lists."""
    labels = scipy.io.loadmat(real / "imagelabels.mat")["labels"].ravel()
    raw = scipy.io.loadmat(real / "setid.mat")
    six_classes = (51, 77, 46, 73, 89, 74)
    few = {}
    for name in ("trnid", "valid", "tstid"):
        few[name] = [int(i) for i in raw[name].ravel() if labels[i - 1] in six_classes]
    (tmp_path / "few.json").write_text(json.dumps(few | {"base": 1}))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = set(os.listdir(real))

    data = ("--data_root", real, "--splits_path", tmp_path / "few.json")
    options = ("--architecture", "tiny", "--epochs", 4, "--batch_size", 32, *NO_WANDB)
    code, _, err = cli("train.py", *data, *options, "--runs", tmp_path, "--name", "real")
    assert code == 0, err
    result = read(tmp_path / "real" / "result.json")
    test_labels = [labels[i - 1] for i in few["trnid"]]
    chance = 100 * max(np.bincount(test_labels)) / len(test_labels)
    assert result["test/top1_low"] > chance
    assert set(os.listdir(real)) == before, "the folder of real images is left as it was"
