"""ablate.py end to end on small data: each point once, whatever is killed; choices on val; commands
that train.py takes.
"""

import contextlib
import itertools
import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, error_line

from flowers.choices import split_architecture
from flowers.files import read_lines
from flowers.models import build

QUICK = ("--batch_size", 12, "--epochs", 1)
COMMON = ("--wandb", "disabled", "--start_epochs", 1, "--seeds", 0)
PATIENCE_S = 600  # a machine that is busy with other work needs minutes


def commands(out, script="train.py"):
    """The arguments of each call of a script that a dry run prints."""
    lines = [line for line in out.splitlines() if line.startswith(f"python {script}")]
    return [shlex.split(line)[2:] for line in lines]


def values(command, flag):
    """All values of a flag."""
    return [command[i + 1] for i, word in enumerate(command) if word == flag]


def names(out):
    return [values(command, "--name")[0] for command in commands(out)]


def wait_for(find, what):
    """What find() gives as soon as it gives something."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := find()):
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.05)
    return found


def test_points_with_the_same_frozen_parts_are_not_started_together():
    from ablate import Point, in_turn

    points = []
    for seed, strategy, times in itertools.product((0, 1), ("linear", "prompt"), (0.2, 1.0, 5.0)):
        settings = {"seed": seed, "strategy": strategy, "times": times}
        points.append(Point(f"{strategy}-{times}-{seed}", settings, ()))
    order = [tuple(point.settings.values()) for point in in_turn(points)]
    one_seed = [(s, t) for t in (0.2, 1.0, 5.0) for s in ("linear", "prompt")]
    assert order == [(seed, *rest) for seed in (0, 1) for rest in one_seed]
    evaluations = [Point(name, {}, ()) for name in "cab"]
    assert in_turn(evaluations) == evaluations


def test_the_grids_are_what_they_say(cli, tmp_path):
    def dry(*arguments):
        code, out, err = cli("ablate.py", *arguments, "--dry_run", "--runs", tmp_path)
        assert code == 0, err
        return commands(out)

    # nine architectures, three seeds
    architecture = dry("architecture")
    assert len(architecture) == 27
    assert len({values(c, "--architecture")[0] for c in architecture}) == 9

    temperature = dry("temperature", "--seeds", 5)
    settings = {(*values(c, "--temperature"), "--learn_temperature" in c) for c in temperature}
    fixed = {(t, False) for t in ("0.003", "0.01", "0.03", "0.1", "0.3")}
    learned = {("0.01", True), ("0.07", True)}
    assert settings == fixed | learned

    factorial = dry(
        *("factorial", "--architecture", "ViT-B/32", "RN50"),
        *("--strategy", "full", "lora", "--seeds", 0, 1),
    )
    assert len(factorial) == 2 + 2 * 2 * 3 * 2  # untrained, and the grid
    lora = [c for c in factorial if values(c, "--strategy") == ["lora"]]
    assert {values(c, "--lr")[0] for c in lora} == {"4e-05", "0.0002", "0.001"}
    assert all("--holdout" in c for c in [*factorial, *temperature])
    assert all(values(c, "--seed") == ["5"] for c in temperature)

    prompt = dry("prompt", "--seeds", 0)
    assert [len(values(c, "--prompt_template")) for c in prompt] == [1, 1, 1, 3]

    # other flags, other points
    three = dry("shots", "--seeds", 0, "--epochs", 3)
    four = dry("shots", "--seeds", 0, "--epochs", 4)
    assert three[0][:2] == ["--epochs", "3"]
    # as many steps for any number of images: of 102 classes, in batches of 64
    steps = []
    for command in three:
        epochs = int(values(command, "--epochs")[-1])  # the last one counts
        steps.append(epochs * (102 * int(values(command, "--shots")[0]) // 64))
    assert steps == [300] * 5
    three_names = {values(c, "--name")[0] for c in three}
    four_names = {values(c, "--name")[0] for c in four}
    assert not three_names & four_names

    assert "--times" in error_line(cli("ablate.py", "shots", "--lr", "1e-3"))
    assert "--jobs" in error_line(cli("ablate.py", "shots", "--jobs", -1))
    # Flags that a grid would pass over.
    assert "values of its own" in error_line(cli("ablate.py", "batch_size", "--chunk_size", 8))
    assert "values of its own" in error_line(cli("ablate.py", "base_to_new", "--classes", "new"))
    for flag in ("--start_epochs", "--start_captions"):
        code, _, err = cli("ablate.py", "strategy", flag, 3, "--runs", tmp_path, "--dry_run")
        assert code == 0 and f"{flag} has no effect" in err
    assert dry("strategy", "--seeds", 0, 0, 1) == dry("strategy", "--seeds", 0, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--nothing", 1), "--nothing"),
        (("--wd", -4), "--wd"),
        (("--views", 0), "--views"),
        (("--ema", 2), "--ema"),
        (("--logit_bias", -10), "--loss sigmoid"),
    ],
)
def test_flags_that_train_refuses_are_refused_before_any_point(flags, word, cli, tmp_path):
    outcome = cli("ablate.py", "factorial", "--data_root", "sample", "--runs", tmp_path, *flags)
    assert outcome[0] == 2
    assert word in outcome[2].splitlines()[-1]
    assert not list(tmp_path.iterdir()), "nothing was run"


def test_a_flag_that_one_strategy_refuses_costs_its_points_alone(cli, tmp_path):
    # --ema acts on steps, and linear has none
    arguments = ("factorial", "--runs", tmp_path, "--dry_run", "--ema", 0.9)
    arguments += ("--architecture", "ViT-B/32")  # with two pretrainings
    code, out, err = cli("ablate.py", *arguments)
    assert code == 0 and "--strategy full" in out, err
    assert "act on steps" in error_line(cli("ablate.py", *arguments, "--strategy", "linear"))
    # Nor has an untrained model. Said once, before any work, and those points are left out.
    (line,) = err.splitlines()
    assert "left out of factorial" in line and "act on steps" in line
    assert "2 of untrained" in line and "2 of linear" in line
    assert "--strategy linear" not in out and "--epochs 0" not in out
    assert len(commands(out)) == 2 * 3 * 3 * 8  # pretrainings, rates, seeds, strategies
    # A sweep has the same points.
    code, out, err = cli(
        "ablate.py", *(word for word in arguments if word != "--dry_run"), "--sweep"
    )
    assert code == 0 and "left out of factorial" in err
    names = json.loads(Path(out.strip()).read_text())["parameters"]["only"]["values"]
    assert len(names) == 2 * 3 * 3 * 8


def test_what_the_last_part_of_a_study_refuses_is_known_before_the_first(cli, tmp_path):
    """`final` has no val, for which --eval_every asks."""
    study = ("study", "--runs", tmp_path, "--dry_run")
    line = error_line(cli("ablate.py", *study, "--eval_every", 1))
    assert "final" in line and "needs --holdout" in line
    assert cli("ablate.py", "factorial", *study[1:], "--eval_every", 1)[0] == 0


def test_pretraining_decides_which_weights_are_named(cli, tmp_path):
    def dry(*arguments):
        code, out, err = cli("ablate.py", *arguments, "--dry_run", "--runs", tmp_path, "--seeds", 0)
        assert code == 0, err
        assert "--pretraining" not in out  # train.py does not know it
        return commands(out), err

    # one architecture with all weights that it has
    points, err = dry("pretraining", "--architecture", "ViT-B/16")
    weights = [values(c, "--architecture")[0] for c in points]
    assert weights[0] == "ViT-B/16"
    families = ["laion2b_", "datacomp_", "dfn2b", "metaclip_"]
    assert [tag.split("/")[1][: len(f)] for tag, f in zip(weights[1:], families)] == families
    assert not err

    # balanced: what all have; two at most in the factorial
    points, err = dry("pretraining", "--architecture", "ViT-B/32", "ViT-B/16", "tiny")
    weights = [values(c, "--architecture")[0] for c in points[1:]]
    assert len(weights) == 4 + 4 + 1
    assert err.count("left out") == 1 and "dfn" in err
    models = ("--architecture", "ViT-B/32", "ViT-B/16")
    points, _ = dry("factorial", *models, "--strategy", "text")
    weights = {values(c, "--architecture")[0] for c in points}
    assert len(weights) == 4
    assert len(points) == 4 * (1 + 3)  # untrained, and three rates
    points, _ = dry("factorial", "--architecture", "RN50", "ViT-B/16", "--strategy", "text")
    assert {values(c, "--architecture")[0] for c in points} == {"RN50", "ViT-B/16"}

    # a level for another grid; what does not exist is said
    points, err = dry("augment", *models, "--pretraining", "dfn")
    assert {values(c, "--architecture")[0] for c in points} == {
        "open_clip:ViT-B-16-quickgelu/dfn2b"
    }
    assert "no weights of ViT-B/32 from dfn" in err
    nothing = ("ablate.py", "augment", "--pretraining", "dfn")
    assert "no such weights" in error_line(cli(*nothing))


def test_stand_ins_are_trained_with_prompts_or_captions(cli, tmp_path):
    grid = ("factorial", "--architecture", "tiny", "tiny-rn", "--strategy", "text")
    flags = ("--dry_run", "--runs", tmp_path, "--seeds", 0)
    _, out, _ = cli("ablate.py", *grid, *flags)
    plain = names(out)
    _, out, _ = cli("ablate.py", *grid, *flags, "--start_captions", "captions.jsonl.gz")
    points = commands(out)
    starts = [c for c in points if values(c, "--name")[0].startswith("start-")]
    assert [values(c, "--captions") for c in starts] == [[], ["captions.jsonl.gz"]] * 2
    assert not any("--captions" in c for c in points if c not in starts)
    # the others start from one of the four, and those of before have the names of before
    assert set(plain) < set(names(out))
    assert len(points) == 2 * len(plain)
    start_names = {values(c, "--name")[0] for c in starts}
    rest = [c for c in points if c not in starts]
    assert {Path(values(c, "--architecture")[0]).name for c in rest} == start_names
    missing = ("ablate.py", *grid, "--pretraining", "captions")
    assert "--start_captions" in error_line(cli(*missing))


def test_weights_by_name_are_open_clip_s(cli):
    """Every tag is one of the package; the report finds architecture and pretraining again."""
    script = runpy.run_path(str(ROOT / "ablate.py"))
    for architecture, weights in script["OTHER_WEIGHTS"].items():
        for pretraining, name in weights.items():
            assert split_architecture(name) == (architecture, pretraining)
    pretrained = pytest.importorskip("open_clip.pretrained")
    for weights in script["OTHER_WEIGHTS"].values():
        for name in weights.values():
            model, tag = name.removeprefix("open_clip:").split("/")
            config = pretrained.get_pretrained_cfg(model, tag)
            assert config, name
            assert bool(config.get("quick_gelu")) == model.endswith("-quickgelu"), name


def test_few_shots_and_shared_rates(cli, tmp_path):
    flags = ("--dry_run", "--runs", tmp_path, "--seeds", 0, "--strategy", "full", "lora")
    with_linear = (*flags, "linear", "--splits_path", "coop.json")
    _, out, _ = cli("ablate.py", "few_shot", *with_linear)
    points = commands(out)
    pairs = {(values(c, "--shots")[0], values(c, "--val_shots")[0]) for c in points}
    assert pairs == {("1", "1"), ("2", "2"), ("4", "4"), ("8", "4"), ("16", "4")}
    assert len(points) == 5 * (2 + 3)  # the strategies, and three linear probes
    assert sum("--cross_modal" in c for c in points) == 5
    linear = [c for c in points if values(c, "--strategy") == ["linear"]]
    assert not any("--epochs" in c for c in linear)
    # Strategies that are not asked for are in no block, and those that are in one of their own.
    _, out, _ = cli("ablate.py", "few_shot", *flags)
    assert {values(c, "--strategy")[0] for c in commands(out)} == {"full", "lora"}
    _, out, _ = cli("ablate.py", "strategy", *flags)
    assert {values(c, "--strategy")[0] for c in commands(out)} == {"full", "lora"}
    _, out, _ = cli("ablate.py", "factorial", *flags, "linear", "--architecture", "RN50")
    assert len(commands(out)) == len(set(names(out))) == 1 + 1 + 2 * 3
    assert sum(values(c, "--start_from") == ["zero_shot"] for c in points) == 10
    assert all(values(c, "--splits_path") == ["coop.json"] for c in points)

    rates = ("--lr", 1e-4, 1e-2)
    _, out, _ = cli("ablate.py", "shared_rate", *flags, *rates, "--architecture", "RN50", "tiny")
    points = [c for c in commands(out) if values(c, "--name")[0].startswith("sharedrate-")]
    trained = [c for c in points if "--epochs" not in c]
    tried = {(values(c, "--strategy")[0], values(c, "--lr")[0]) for c in trained}
    assert tried == {(s, lr) for s in ("full", "lora") for lr in ("0.0001", "0.01")}
    assert len(trained) == 2 * 4
    assert "--lr" in error_line(cli("ablate.py", "shared_rate", "--times", 2))


def test_every_command_is_one_that_train_takes(cli, tmp_path):
    """train.py parses the flags of some points of each grid, and then finds no such data."""
    nowhere = tmp_path / "none"
    for grid in (
        "strategy",
        "learning_rate",
        "shared_rate",
        "temperature",
        "batch_size",
        "loss",
        "positives",
        "prompt",
        "augment",
        "base_to_new",
        "shots",
        "few_shot",
        "factorial",
    ):
        flags = ("--dry_run", "--runs", tmp_path, "--seeds", 0, "--data_root", nowhere)
        _, out, _ = cli("ablate.py", grid, *flags)
        points = commands(out)
        for arguments in points[::6] + points[-1:]:
            assert "no dataset at" in error_line(cli("train.py", *arguments)), arguments


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """Another dataset, in class folders: three kinds of noise."""
    root = tmp_path_factory.mktemp("others") / "birds"
    rng = np.random.default_rng(0)
    for part, kind in itertools.product(("train", "test"), ("crow", "robin", "wren")):
        folder = root / part / kind
        folder.mkdir(parents=True)
        for i in range(4):
            image = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / f"{i}.png"), image)
    return root


def test_forgetting_evaluates_every_model_on_flowers_and_elsewhere(small, birds, cli, tmp_path):
    flags = (
        *("forgetting", "--architecture", "tiny", "--strategy", "full", "prompt", "--seeds", 0, 1),
        *("--data_root", small, "--others", birds, "--runs", tmp_path, "--dry_run"),
        *("--epochs", 1, "--device", "cpu"),
    )
    code, out, err = cli("ablate.py", *flags)
    assert code == 0, err
    assert len(commands(out)) == 1 + 4  # the stand-in, and two strategies with two seeds
    evaluations = commands(out, "baseline_eval.py")
    at_home = [c for c in evaluations if values(c, "--split") == ["val"]]
    elsewhere = [c for c in evaluations if values(c, "--split") == ["test"]]
    # the start, four runs, and the mean of the two whose weights have moved
    assert len(at_home) == len(elsewhere) == 1 + 4 + 1
    assert len(set(names(out) + [values(c, "--name")[0] for c in evaluations])) == 5 + 12
    for command in at_home:
        assert values(command, "--data_root") == [str(small)]
        assert "--holdout" in command
    for command in elsewhere:
        assert values(command, "--data_root") == [str(birds)]
        assert values(command, "--splits") == ["folder"]
    assert all(values(c, "--device") == ["cpu"] for c in evaluations)
    assert not any("--epochs" in c for c in evaluations)

    # A learned prompt is what was trained: no template replaces it.
    for command in evaluations:
        is_prompt = "-prompt-" in values(command, "--name")[0]
        has_template = command in elsewhere and not is_prompt
        assert values(command, "--prompt_template") == ["a photo of a {}"] * has_template
        is_full = "-full-lr" in values(command, "--name")[0]
        assert len(values(command, "--wise_ft")) == (5 if is_full else 0)
    soups = [command for command in evaluations if "--soup" in command]
    for command in soups:
        members = command[command.index("--soup") + 1 :][:2]
        assert all("-full-" in Path(member).name for member in members)
    assert len(soups) == 2

    # Where a template is given the runs that learn a prompt are left out, and so is what they need.
    code, out, err = cli("ablate.py", *flags, "--prompt_template", "a {}")
    assert code == 0 and "left out of forgetting" in err and "2 of prompt" in err
    evaluations = commands(out, "baseline_eval.py")
    assert len(commands(out)) == 1 + 2 and len(evaluations) == 2 * (1 + 2 + 1)
    at_home = [c for c in evaluations if values(c, "--split") == ["val"]]
    assert all(values(c, "--prompt_template") == ["a {}"] for c in at_home)


def test_forgetting_asks_for_other_datasets_at_the_door(small, birds, cli, tmp_path):
    def error(*flags):
        flags = (*flags, "--data_root", small, "--runs", tmp_path, "--dry_run")
        return error_line(cli("ablate.py", *flags))

    assert "--others DIR" in error("forgetting")
    assert "of the grid forgetting" in error("shots", "--others", birds)
    assert "no dataset at" in error("forgetting", "--others", tmp_path / "none")
    assert "--other_splits" in error("forgetting", "--others", birds / "test")
    template = ("--other_template", "a bird")
    assert "has no {}" in error("forgetting", "--others", birds, *template)
    assert "linear" in error("forgetting", "--others", birds, "--strategy", "linear")
    assert "without --sweep" in error("forgetting", "--others", birds, "--sweep")


def test_qwen_varies_one_factor_at_a_time(cli, tmp_path):
    flags = ("qwen", "--dry_run", "--runs", tmp_path, "--seeds", 0, 1, "--data_root", "x")
    code, out, err = cli("ablate.py", *flags, "--chunk_size", 4, "--lr", 1e-4, "--device", "cpu")
    assert code == 0, err
    trained = commands(out, "qwen_train.py")
    # Three levels of each of three factors, two of which differ from the first point.
    assert len(trained) == 2 * (1 + 3 * 2)
    first = trained[0]
    assert values(first, "--model") == ["Qwen/Qwen2-VL-2B-Instruct"] and "--holdout" in first
    assert values(first, "--chunk_size") == ["4"] and values(first, "--lr") == ["0.0001"]
    for command in trained:
        axes = ("--max_pixels", "--rank", "--shots", "--seed")
        differing = [axis for axis in axes if values(command, axis) != values(first, axis)]
        assert len(set(differing) - {"--seed"}) <= 1
        # As many images of a class, however few there are.
        assert int(values(command, "--shots")[0]) * int(values(command, "--epochs")[0]) == 48

    evaluations = commands(out, "qwen_eval.py")
    probes = commands(out, "qwen_probe.py")
    for command in evaluations + probes:
        assert values(command, "--split") == ["val"] and "--holdout" in command
        assert values(command, "--data_root") == ["x"] and values(command, "--device") == ["cpu"]
        assert "--chunk_size" not in command and "--lr" not in command
    found = [values(c, "--name")[0] for c in trained + evaluations + probes]
    assert len(set(found)) == len(found) == 14 + 5 + 14 + 2 * 2 + 2 * 7 + 2
    # Untrained: each image size ranks, and the other two protocols; each seed draws its shots.
    untrained = [c for c in evaluations if "--adapter" not in c]
    assert len(untrained) == 3 + 2
    asked = {(values(c, "--protocol")[0], "--list_names" in c) for c in untrained}
    assert asked == {("rank", False), ("generate", False), ("generate", True)}
    of_untrained = [c for c in probes if "--adapter" not in c]
    assert len(of_untrained) == 2 * (1 + 3 * 2)
    assert {values(c, "--features")[0] for c in of_untrained} == {"vision", "merged", "prompt"}
    # The first point has all protocols, the others the first one, on the very run.
    folders = {str(tmp_path / values(c, "--name")[0]): c for c in trained}
    protocols = {folder: 0 for folder in folders}
    for command in evaluations + probes:
        if "--adapter" in command:
            protocols[values(command, "--adapter")[0]] += 1
    assert sorted(protocols.values()) == [1] * 12 + [4] * 2
    for command in probes:
        if "--adapter" in command:
            training = folders[values(command, "--adapter")[0]]
            for flag in ("--shots", "--seed"):
                assert values(command, flag) == values(training, flag)

    # Levels of one's own; all images of tiny have one size.
    levels = ("--architecture", "tiny", "--rank", 4, "--shots", 2, 1, "--seen", 4)
    levels += ("--protocol", "probe", "--features", "merged")
    code, out, err = cli("ablate.py", *flags, *levels)
    assert code == 0, err
    trained = commands(out, "qwen_train.py")
    assert [values(c, "--shots") + values(c, "--epochs") for c in trained] == 2 * [
        ["2", "2"],
        ["1", "4"],
    ]
    assert not commands(out, "qwen_eval.py")
    assert len(commands(out, "qwen_probe.py")) == 4 + 4


def test_an_agent_of_qwen_is_given_a_run_with_its_evaluations(cli, tmp_path):
    flags = ("qwen", "--architecture", "tiny", "--runs", tmp_path, "--seeds", 0)
    code, out, err = cli("ablate.py", *flags, "--sweep")
    assert code == 0, err
    sweep = json.loads((tmp_path / "qwen.sweep.yaml").read_text())
    points = sweep["parameters"]["only"]["values"]
    seen = []
    for name in points:
        _, out, _ = cli("ablate.py", *flags, "--dry_run", "--only", name)
        seen += [line for line in out.splitlines() if line.startswith("python ")]
    _, out, _ = cli("ablate.py", *flags, "--dry_run")
    everything = [line for line in out.splitlines() if line.startswith("python ")]
    assert sorted(seen) == sorted(everything) and len(points) < len(everything)


def test_qwen_takes_no_flags_of_clip(cli, tmp_path):
    def error(*flags):
        return error_line(cli("ablate.py", "qwen", *flags, "--runs", tmp_path, "--dry_run"))

    assert "no whole number of epochs" in error("--shots", 5)
    assert "no whole number of epochs" in error("--shots", 0)
    assert "--epochs: qwen sets" in error("--epochs", 3)
    assert "--strategy is of the grids of CLIP" in error("--strategy", "lora")
    assert "one --architecture" in error("--architecture", "tiny", "other")
    assert "one --lr" in error("--lr", 1e-3, 1e-4)
    assert "is a CLIP" in error("--architecture", "ViT-B/32")
    assert "of the grid forgetting" in error("--others", tmp_path)


def test_an_interrupted_evaluation_begins_anew(small, birds, model, cli, tmp_path):
    flags = (
        *("forgetting", "--architecture", model, "--strategy", "text", "--data_root", small),
        *("--others", birds, "--runs", tmp_path, *COMMON),
    )
    _, out, _ = cli("ablate.py", *flags, "--dry_run")
    evaluations = [values(c, "--name")[0] for c in commands(out, "baseline_eval.py")]
    (name,) = [name for name in evaluations if "-untrained-on-birds-" in name]
    (tmp_path / name).mkdir()
    (tmp_path / name / "args.json").write_text('{"job": "eval"}')
    code, out, err = cli("ablate.py", *flags, "--only", name)
    assert code == 0, err
    assert "1 points finished, 0 failed" in out
    result = json.loads((tmp_path / name / "result.json").read_text())
    assert result["dataset"] == "birds"
    assert result["test/n"] == 12


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A state dict to start from: without a stand-in for pretraining there is a run less."""
    path = tmp_path_factory.mktemp("model") / "model.pt"
    torch.save(build("tiny").state_dict(), path)
    return path


def test_finished_points_are_skipped_and_failed_ones_recorded(small, cli, tmp_path):
    arguments = (
        *("positives", "--architecture", "tiny", "--data_root", small, "--runs", tmp_path),
        *(*COMMON, *QUICK),
    )
    _, out, _ = cli("ablate.py", *arguments, "--dry_run")
    (bad,) = [name for name in names(out) if "positivespair" in name]

    # one point can't be resumed
    (tmp_path / bad).mkdir()
    (tmp_path / bad / "args.json").write_text("{}")
    (tmp_path / bad / "checkpoint.pt").write_text("not one")
    assert "1 points failed" in error_line(cli("ablate.py", *arguments, "--jobs", 2))
    (failed,) = read_lines(tmp_path / "failed.jsonl")
    assert failed["name"] == bad
    assert failed["code"]
    assert failed["error"]

    # the others went on: the stand-in for pretraining, and a point that starts from it
    finished = {p.parent.name: p.stat().st_mtime_ns for p in tmp_path.glob("*/result.json")}
    assert len(finished) == 2
    assert sum(name.startswith("start-") for name in finished) == 1
    (good,) = [p for p in tmp_path.glob("positives-*/args.json") if p.parent.name != bad]
    trained = json.loads(good.read_text())
    assert trained["holdout"]
    assert Path(trained["architecture"]).name.startswith("start-tiny")
    assert trained["lr"] == pytest.approx(5e-4)

    # the cause is mended
    (tmp_path / bad / "args.json").unlink()
    (tmp_path / bad / "checkpoint.pt").unlink()
    (tmp_path / "results.jsonl").unlink()  # as if killed between result.json and its line
    code, out, err = cli("ablate.py", *arguments)
    assert code == 0, err
    assert "3 points finished, 0 failed" in out, err
    for name, modified in finished.items():  # finished points were left alone
        assert (tmp_path / name / "result.json").stat().st_mtime_ns == modified
    listed = [row["name"] for row in read_lines(tmp_path / "results.jsonl")]
    assert sorted(listed) == sorted([*finished, bad])


def test_kills_lose_no_finished_point_and_double_none(small, model, tmp_path):
    """SIGKILL of ablate.py alone: its train.py goes on, and the next ablate.py waits for that point
    instead of running it twice.
    """
    runs = tmp_path / "runs"
    arguments = (
        *("positives", "--architecture", model, "--data_root", small, "--runs", runs),
        *(*COMMON, *QUICK),
    )
    command = [sys.executable, ROOT / "ablate.py", *map(str, arguments)]

    # Killed when the first point has begun, and when it has ended and the second begins.
    for sign in ("args.json", "result.json"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_for(lambda sign=sign: list(runs.glob(f"*/{sign}")), sign)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = {p.parent.name: p.stat().st_mtime_ns for p in runs.glob("*/result.json")}

    # Two at once take the points of the grid in turn.
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outs = [process.communicate(timeout=PATIENCE_S)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all("2 points finished, 0 failed" in out for out in outs), outs

    lines = read_lines(runs / "results.jsonl")
    assert len(lines) == len({row["name"] for row in lines}) == 2
    assert not (runs / "failed.jsonl").exists()
    assert finished
    for name, modified in finished.items():
        assert (runs / name / "result.json").stat().st_mtime_ns == modified
    for log in runs.glob("*/log.txt"):  # each point came to its end once
        assert log.read_text(errors="replace").count("results and pictures in") == 1


def test_the_study_chooses_on_val_and_touches_test_at_the_end(small, cli, tmp_path):
    flags = (
        *("--architecture", "tiny", "--strategy", "text", "linear", "--data_root", small),
        *("--runs", tmp_path, "--times", 0.5, 2, *COMMON, *QUICK),
    )
    code, out, _ = cli("ablate.py", "final", *flags, "--dry_run")
    assert code == 0
    assert "chosen on the results of factorial" in out
    assert "final-" not in out

    # Results as train.py would leave them: the best on val is the worst on test.
    code, out, _ = cli("ablate.py", "factorial", *flags, "--dry_run")
    for name, point in zip(names(out), commands(out)):
        good = point.count("--epochs") == 1 and values(point, "--lr") == ["0.001"]
        result = {
            "name": name,
            "val/top1": 90.0 if good else 50.0,
            "test/top1": 0.0 if good else 99.0,
        }
        if values(point, "--strategy") == ["linear"]:
            result["fitted_C"] = 10.0
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(result))

    code, out, _ = cli("ablate.py", "final", *flags, "--dry_run")
    final = [c for name, c in zip(names(out), commands(out)) if name.startswith("final-")]
    chosen = [(values(c, "--strategy")[0], values(c, "--lr")[0]) for c in final]
    assert chosen == [("full", "0.0005"), ("linear", "0"), ("text", "0.001")]
    assert all("--holdout" not in c for c in final)
    # the linear probe is fitted with the C that val chose
    assert [values(c, "--inverse_penalty") for c in final] == [[], ["10.0"], []]

    code, out, _ = cli("ablate.py", "study", *flags, "--dry_run")
    parts = [line for line in out.splitlines() if line.startswith("#")]
    assert parts[1:] == [
        "# factorial: 4 points",
        "# temperature: 7 points",
        "# batch_size: 4 points",
        "# loss: 3 points",
        "# positives: 2 points",
        "# prompt: 4 points",
        "# augment: 3 points",
        "# shots: 5 points",
        "# base_to_new: 1 points",
        "# final: 3 points",
    ]


def test_an_agent_of_a_sweep_is_given_points_of_the_grid(small, model, cli, tmp_path):
    arguments = (
        *("shots", "--architecture", model, "--strategy", "text", "--data_root", small),
        *("--runs", tmp_path, *COMMON, *QUICK),
    )
    code, out, _ = cli("ablate.py", *arguments, "--sweep")
    assert code == 0
    sweep = json.loads(Path(out.split()[-1]).read_text())
    assert sweep["method"] == "grid"
    points = sweep["parameters"]["only"]["values"]
    assert len(points) == 5

    # An agent of W&B puts its own words in the place of these.
    name = points[2]
    words = {"${env}": ["env"], "${program}": [sweep["program"]], "${args}": [f"--only={name}"]}
    agent = []
    for part in sweep["command"]:
        agent += words.get(part, [part])
    assert agent[:3] == ["env", "python", "ablate.py"]
    assert agent[-1] == f"--only={name}"

    code, out, err = cli(*agent[2:], "--dry_run")
    (point,) = commands(out)
    assert values(point, "--shots") == ["4"], err
    assert names(out) == [name], err
    assert "sweep factorial" in error_line(cli("ablate.py", "study", "--sweep"))
    assert "no point of this name" in error_line(cli("ablate.py", *arguments, "--only", "any"))


def processes_writing(log, but):
    """The pids of the processes that have a file open, `but` one."""
    pids = set()
    for link in Path("/proc").glob("[0-9]*/fd/1"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if link.readlink() == log:
                pids.add(int(link.parts[2]))
    return pids - {but}


@pytest.mark.skipif(sys.platform != "linux", reason="points are forked on Linux only")
def test_a_killed_point_is_recorded_and_the_next_goes_on(small, model, tmp_path):
    arguments = (
        *("positives", "--architecture", model, "--data_root", small, "--runs", tmp_path),
        *(*COMMON, *QUICK),
    )
    command = [sys.executable, ROOT / "ablate.py", *map(str, arguments)]
    ablate = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "TQDM_MININTERVAL"},
    )
    (first,) = wait_for(lambda: list(tmp_path.glob("*/args.json")), "point")
    log = (first.parent / "log.txt").resolve()
    (pid,) = wait_for(lambda: processes_writing(log, but=ablate.pid), "process")
    assert Path(f"/proc/{pid}/fd/0").readlink() == Path(os.devnull)
    # What the process that it was forked from began with, before it imported tqdm.
    assert b"TQDM_MININTERVAL=10" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    os.kill(pid, signal.SIGKILL)

    out, _ = ablate.communicate(timeout=PATIENCE_S)
    assert ablate.returncode == 2
    assert "1 points finished, 1 failed" in out
    (failed,) = read_lines(tmp_path / "failed.jsonl")
    assert failed["name"] == first.parent.name
    assert failed["code"] == -signal.SIGKILL


def test_a_forked_point_is_as_good_as_a_process_of_its_own(small, model, cli, tmp_path):
    """The same files, weights and losses, bit for bit."""
    arguments = (
        *("learning_rate", "--architecture", model, "--strategy", "prompt", "--times", 1),
        *("--data_root", small, *COMMON, *QUICK, "--jobs", 2),
    )
    code, _, err = cli("ablate.py", *arguments, "--runs", tmp_path / "forked")
    assert code == 0, err
    _, out, _ = cli("ablate.py", *arguments, "--runs", tmp_path / "plain", "--dry_run")
    (words,) = commands(out)
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // 2))}
    subprocess.run(
        [sys.executable, ROOT / "train.py", *words, "--wandb", "disabled"],
        env=os.environ | threads,
        check=True,
    )

    (forked,) = (tmp_path / "forked").glob("*/")
    plain = tmp_path / "plain" / forked.name
    assert {p.name for p in forked.iterdir()} == {p.name for p in plain.iterdir()} | {"log.txt"}
    for name in ("model.pt", "classifier.pt"):
        ours = torch.load(forked / name)
        theirs = torch.load(plain / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    losses = [read_lines(run / "metrics.jsonl", "train/loss") for run in (forked, plain)]
    assert [r["train/loss"] for r in losses[0]] == [r["train/loss"] for r in losses[1]]


COUNT_GPUS_ASKED_FOR = """
import importlib, torch
from ablate import IMPORTED, QWEN_IMPORTED

def asked(*_):
    raise SystemExit("a GPU was asked for, and can't be used after a fork")

for name in ("is_available", "device_count", "_lazy_init", "init"):
    setattr(torch.cuda, name, asked)
torch._C._cuda_getDeviceCount = asked
for name in IMPORTED:
    importlib.import_module(name)
for name in QWEN_IMPORTED:
    try:
        importlib.import_module(name)
    except ImportError:
        pass  # an extra
assert not torch.cuda.is_initialized()
"""


def test_what_is_imported_before_the_fork_leaves_the_gpu_alone():
    words = [sys.executable, "-W", "ignore", "-c", COUNT_GPUS_ASKED_FOR]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
