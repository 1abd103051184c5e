"""qwen_train.py: several processes, few images, own questions, val between epochs, merging."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import types
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, call, error_line

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("peft")
pytest.importorskip("transformers")


import transformers
from safetensors.torch import load_file

from flowers import UserError, devices, files, runs, training
from flowers.data import image_ids, open_flowers, select
from flowers.qwen.adapters import add_adapter
from flowers.qwen.answers import answer_length, answer_loss
from flowers.qwen.models import load_model
from flowers.qwen.prompts import (
    draw_views,
    encode,
    generator_of_file,
    open_images,
    patches,
    shuffle,
)
from flowers.qwen_settings import QUESTIONS, read_training

# Matrices this small gain nothing from a second thread, and lose much on a busy machine.
pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = devices.Processes(0, 1, torch.device("cpu"))
ADAPTER = "adapter/adapter_model.safetensors"
NO_WANDB = ("--wandb", "disabled")


@pytest.fixture(scope="module")
def script():
    """The functions of qwen_train.py, by name."""
    return runpy.run_path(str(ROOT / "qwen_train.py"))


def configure(script, *words):
    """What qwen_train.py makes of a command line, up to its Config."""
    args = script["make_parser"]().parse_args(["--model", "tiny", *map(str, words)])
    return script["complete"](script["resolve"](args, 1), ALONE.device)


def open_data(script, data_root, *words, processes=ALONE):
    return script["open_data"](configure(script, "--data_root", data_root, *words), processes)


def read_rows(run, key):
    """The rows of metrics.jsonl that have this key."""
    return [row for row in files.read_lines(run / "metrics.jsonl") if key in row]


def values_of(run, key):
    return [row[key] for row in read_rows(run, key)]


def read_arguments(run):
    return json.loads((run / "args.json").read_text())


# -----------------------------------------------------------------------------
# two processes


def torchrun(script, *arguments):
    """Two gloo processes of one thread each, on any free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    command += [str(part) for part in (script, *arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


# LoRA alone, on features that are kept; names in an order of their own for each image.
TWO = ("--model", "tiny", "--also_train", "--holdout", "--classes", "base", "--shots", 3)
TWO += ("--list_names", "--list_order", "drawn", "--eval_every", 1, "--epochs", 3, "--lr", 3e-3)


@pytest.fixture(scope="module")
def of_two(small, tmp_path_factory):
    """The runs `two`, of two processes, and `one`, of one with the batch of both."""
    folder = tmp_path_factory.mktemp("two")
    # A copy, whose cache is empty.
    data = shutil.copytree(small, folder / "data", ignore=shutil.ignore_patterns(".cache"))
    common = ("--data_root", data, *TWO, "--runs", folder / "runs", *NO_WANDB)
    done = torchrun(ROOT / "qwen_train.py", *common, "--batch_size", 2, "--name", "two")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Failed to load CPU" not in done.stderr  # of bitsandbytes, which is not used
    # Each process computed the features of its own part of the images, once.
    packs = [json.loads(path.read_text())["images"] for path in data.glob(".cache/qwen-*.json")]
    assert sorted(map(len, packs)) == [7, 8]  # 9 training and 6 val images
    call("qwen_train.py", *common, "--batch_size", 4, "--name", "one")
    assert len(list(data.glob(".cache/qwen-*.json"))) == 2
    return folder / "runs", done


def test_two_processes_equal_one_with_the_batch_of_both(of_two):
    folder, done = of_two
    one, two = folder / "one", folder / "two"
    losses = values_of(two, "train/loss")
    assert len(losses) == 6  # of 9 images in batches of 4
    assert losses == pytest.approx(values_of(one, "train/loss"), abs=1e-4)
    for key in ("val/top1", "val/loss"):
        assert len(values_of(two, key)) == 3
        assert values_of(two, key) == pytest.approx(values_of(one, key), abs=1e-3)

    expected, found = load_file(one / ADAPTER), load_file(two / ADAPTER)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert found[key].allclose(value, atol=1e-3), key
        assert "lora_B" not in key or value.abs().max() > 1e-3

    # One process writes and prints.
    assert len(files.read_lines(folder / "results.jsonl")) == 2
    assert read_arguments(two)["processes"] == 2
    assert (two / "trained_on.json").read_bytes() == (one / "trained_on.json").read_bytes()
    assert done.stdout.count("next: ") == done.stdout.count("GB for ") == 1


def test_a_run_goes_on_with_as_many_processes(of_two, tmp_path, cli):
    run = shutil.copytree(of_two[0] / "two", tmp_path / "two")
    (run / "result.json").unlink()
    outcome = cli("qwen_train.py", "--resume", run)
    assert "begun with 2 processes: go on with as many" in error_line(outcome)


@pytest.fixture(scope="module")
def evaluation_of_two(of_two):
    """What two processes printed that made the evaluation eval-two, its flags, and its folder."""
    folder, _ = of_two
    arguments = ["--adapter", folder / "two", "--runs", folder, "--batch_size", 3, *NO_WANDB]
    done = torchrun(ROOT / "qwen_eval.py", *arguments, "--name", "eval-two")
    assert done.returncode == 0, done.stderr[-2000:]
    return done, arguments, folder / "eval-two"


def test_two_processes_evaluate_as_one(evaluation_of_two, cli):
    """A base-trained model: each image is asked twice, with all names and those of its half."""
    done, arguments, two = evaluation_of_two
    for line in ("taken over from", "GB for ", "is reported", "images/s; results"):
        assert done.stdout.count(line) == 1, line
    code, _, err = cli("qwen_eval.py", *arguments, "--name", "eval-one")
    assert code == 0, err
    one = two.parent / "eval-one"
    expected, found = np.load(one / "scores.npz"), np.load(two / "scores.npz")
    assert expected["files"].tolist() == found["files"].tolist()
    for key in ("sum", "own_sum", "pmi"):
        np.testing.assert_allclose(found[key], expected[key], atol=1e-3)
    results = [json.loads((run / "result.json").read_text()) for run in (one, two)]
    for key in ("test/top1", "test/base_top1", "test/new_top1", "val/sum_top1", "overlap"):
        assert results[0][key] == results[1][key], key
    assert len(files.read_lines(two / "answers.jsonl")) == 12 + 6  # and val
    assert sorted(path.name for path in one.iterdir()) == sorted(
        path.name for path in two.iterdir()
    )


def test_what_each_of_two_killed_processes_wrote_is_kept(evaluation_of_two, tmp_path, cli):
    """Whatever number of processes goes on: here it is one."""
    run = shutil.copytree(evaluation_of_two[2], tmp_path / "eval")
    (run / "result.json").unlink()
    lines = (run / "answers.jsonl").read_text().splitlines(keepends=True)
    marked = json.loads(lines[4])
    marked["sum"][0] += 1000
    (run / "answers.jsonl").write_text("".join(lines[:4]))
    (run / "answers.1.jsonl").write_text(json.dumps(marked) + "\n" + lines[5] + lines[6][:20])
    code, _, err = cli("qwen_eval.py", "--resume", run, *NO_WANDB)
    assert code == 0 and "6/18" in err, err
    rows = files.read_lines(run / "answers.jsonl")
    assert len(rows) == 18 and rows[4] == marked
    assert not (run / "answers.1.jsonl").exists()


@pytest.mark.parametrize("options", [(), ("--augment", "crop"), ("--augment", "flip")])
def test_a_batch_is_the_same_however_it_is_cut_up(script, small, tmp_path, options):
    """Over processes and chunks: the same images, questions, answers and views."""
    flowers = open_flowers(small)
    captions = tmp_path / "captions.jsonl"
    rows = [
        {"file": file.name, "captions": [f"{file} {i}" for i in range(9)]} for file in flowers.files
    ]
    files.write_lines(captions, rows)
    _, processor = load_model("tiny", "cpu")
    common = ("--list_names", "--list_order", "drawn", "--also_train", *options)
    common += ("--answer", "described", "--captions", captions)

    def batch(rank, n_processes, batch_size, chunk_size):
        processes = devices.Processes(rank, n_processes, torch.device("cpu"))
        sizes = ("--batch_size", batch_size, "--chunk_size", chunk_size)
        data = open_data(script, small, *common, *sizes, processes=processes)
        assert data.batch_size == 12 and data.steps_per_epoch == 3
        batch = data.batch(4, processor, None)
        pixels = torch.cat([image["pixel_values"] for image, _, _ in batch.chunks])
        texts = [sum((chunk[i] for chunk in batch.chunks), []) for i in (1, 2)]
        assert [len(chunk[2]) for chunk in batch.chunks][0] == (chunk_size or batch_size)
        return pixels, *texts, batch.answers

    pixels, questions, answers, all_answers = batch(0, 1, 12, 0)
    assert len(set(questions)) > 1 and answers == all_answers
    for sizes in ((1, 12, 5), (2, 6, 4)):
        parts = [batch(rank, *sizes) for rank in range(sizes[0])]
        assert torch.equal(torch.cat([part[0] for part in parts]), pixels)
        assert sum((part[1] for part in parts), []) == questions
        assert sum((part[2] for part in parts), []) == answers
        assert all(part[3] == all_answers for part in parts)


class Separate(devices.Processes):
    """One of two processes that does not wait for the other."""

    def average_gradients(self, parameters):
        pass

    def sum(self, values):
        return values


def test_the_mean_of_the_processes_gradients_is_that_of_the_whole_batch(script, small, monkeypatch):
    """Of answers of different length, before Adam, which does not see a factor."""
    model, processor = load_model("tiny", "cpu")
    model = add_adapter(model, 4, 8.0, ["visual"]).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    gradients = []

    def keep(optimizer, parameters, scaler):
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        gradients.append(flat)
        model.zero_grad()

    monkeypatch.setattr(training, "update", keep)
    losses = []
    for processes, batch_size in (
        (ALONE, 6),
        (Separate(0, 2, ALONE.device), 3),
        (Separate(1, 2, ALONE.device), 3),
    ):
        data = open_data(script, small, "--batch_size", batch_size, processes=processes)
        batch = data.batch(1, processor, None)
        losses.append(
            script["train_step"](model, processor, batch, None, scaler, parameters, processes)
        )
    assert losses[0] == pytest.approx(losses[1] + losses[2], rel=1e-5)
    whole, first, second = gradients
    assert (whole - (first + second) / 2).norm() < 1e-4 * whole.norm()


# -----------------------------------------------------------------------------
# which images, which questions


def test_the_same_images_as_train_py(script, of_two, small, tmp_path, cli):
    train = runpy.run_path(str(ROOT / "train.py"))
    flowers = open_flowers(small, holdout=True)
    for classes, shots, val_shots, seed in (
        ("all", None, None, 0),
        ("base", 2, None, 1),
        ("new", 3, 1, 2),
        ("all", 1, 2, 3),
    ):
        words = ["--holdout", "--classes", classes, "--seed", seed, "--eval_every", 1]
        words += ["--shots", shots] if shots else []
        words += ["--val_shots", val_shots] if val_shots else []
        data = open_data(script, small, *words)
        config = data.config
        settings = Namespace(classes=classes, shots=shots, seed=seed, processes=1, trains=True)
        settings.val_shots, settings.eval_split, settings.captions = config.val_shots, "val", None
        index, val = train["choose_images"](flowers, settings)
        assert data.index.tolist() == index.tolist()
        # Only classes that are trained on are ranked, among themselves.
        own = select(val, flowers.labels, 6, classes)
        assert data.val.tolist() == own.tolist()
        assert config.val_shots == (val_shots or (min(shots, 4) if shots else None))

    words = ["--holdout", "--classes", "base", "--shots", 3, "--epochs", 1, "--batch_size", 9]
    place = ["--data_root", small, "--runs", tmp_path, "--name", "clip", *NO_WANDB]
    assert cli("train.py", "--architecture", "tiny", *words, *place)[0] == 0
    trained_on = of_two[0] / "one" / "trained_on.json"
    assert trained_on.read_bytes() == (tmp_path / "clip" / "trained_on.json").read_bytes()
    # Also where they are derived from the arguments.
    copy = shutil.copytree(of_two[0] / "one", tmp_path / "copy")
    (copy / "trained_on.json").unlink()
    assert runs.read_trained_on(copy) == set(json.loads(trained_on.read_text())["images"])


def test_few_val_images_are_drawn(script, small):
    whole = open_data(script, small, "--holdout", "--eval_every", 1)
    assert whole.config.val_images == 200 and len(whole.val) == 12
    few = open_data(script, small, "--holdout", "--eval_every", 1, "--val_images", 5)
    assert len(few.val) == 5 and set(few.val) < set(whole.val)
    other = open_data(script, small, "--holdout", "--eval_every", 1, "--val_images", 5, "--seed", 1)
    assert other.val.tolist() != few.val.tolist()
    assert len(open_data(script, small, "--holdout").val) == 0


def test_the_question_of_a_step(script, small):
    """Two questions, names spelled in capitals, those of the trained half listed in any order."""
    own = ["Which flower?", "What is it?"]
    words = ["--classes", "new", "--list_names", "--list_order", "drawn", "--name_case", "title"]
    data = open_data(script, small, *words, "--batch_size", 9, "--question", *own)
    _, processor = load_model("tiny", "cpu")
    names = {"Tree Mallow", "Mallow", "Globe-Flower"}
    seen = set()
    for step in range(8):
        [(_, questions, answers)] = data.batch(step, processor, None).chunks
        again = data.batch(step, processor, None).chunks[0]
        assert (questions, answers) == again[1:]
        assert set(answers) <= names
        for question in questions:
            text, listed = question.removesuffix(".").split(" Choose from: ")
            assert text in own and set(listed.split(", ")) == names
            seen.add((text, listed))
    assert len(seen) == 2 * 6

    args = data.config
    assert (args.question, args.list_names, args.name_case) == (own, True, "title")
    # The default asks as it always has, and draws nothing.
    [(_, questions, answers)] = open_data(script, small).batch(0, processor, None).chunks
    assert set(questions) == {QUESTIONS["brief"]}


def test_views_are_drawn_as_they_are_called():
    def drawn(augmentation):
        return draw_views(augmentation, 400, devices.generator(0, 1))

    assert drawn("none") is None
    crops, flips = np.array(drawn("crop")), np.array(drawn("flip"))
    assert (crops[:, 0] == flips[:, 0]).all() and not flips[:, 1:].any()
    assert 150 < (flips[:, 0] < 0.5).sum() < 250
    generator = devices.generator(0, 1)
    assert crops[:2].tolist() == [torch.rand(4, generator=generator).tolist() for _ in range(2)]


def test_a_flipped_image_is_whole(small):
    file = open_flowers(small).files[0]
    [image] = open_images([file])
    [mirrored], [kept] = (open_images([file], [[draw, 0.0, 0.0, 0.0]]) for draw in (0.4, 0.6))
    assert np.array_equal(mirrored, np.array(image)[:, ::-1])
    assert np.array_equal(kept, image)


def test_flags_that_mean_nothing_are_refused(script, small):
    for words, message in (
        (["--eval_every", 1], "--eval_every needs --holdout"),
        (["--val_shots", 1], "--val_shots needs --holdout"),
        (["--holdout", "--val_images", 9], "--val_images is for --eval_every"),
        (["--holdout", "--eval_every", 1, "--val_images", 9, "--val_shots", 1], "give one of them"),
        (["--holdout", "--eval_every", -1], "must not be below 0"),
        (["--shots", 0], "at least 1"),
        (["--list_order", "drawn"], "--list_names"),
        (["--answer", "described", "--captions", "x", "--question", "a", "b"], "one question"),
        *((["--alpha", value], "--lr and --alpha above 0") for value in ("0", "-1", "nan", "inf")),
        *((["--lr", value], "--lr and --alpha above 0") for value in ("0", "nan", "inf")),
        *(
            ([f"--wd={value}"], "not below 0, none of them infinite")
            for value in (-1, "nan", "inf")
        ),
    ):
        with pytest.raises(UserError, match=message):
            configure(script, *words)
    assert configure(script, "--architecture", "tiny").model == "tiny"


# -----------------------------------------------------------------------------
# features of the frozen vision tower


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", "cpu")


@pytest.mark.parametrize("name", ["visual", "merger", "visual.blocks.0", "qkv"])
def test_features_of_a_tower_that_is_trained_are_not_kept(script, tiny, small, name):
    data = open_data(script, small, "--also_train", name, "--augment", "none")
    assert data.config.augment == "none"
    assert script["keep_features"](*tiny, data) is None


def test_features_of_a_frozen_tower_are_kept_unless_images_change(script, tiny, small, tmp_path):
    ignored = shutil.ignore_patterns(".cache")
    own = shutil.copytree(small, tmp_path / "data", ignore=ignored)
    data = open_data(script, own, "--also_train", "lm_head", "--shots", 1)
    assert len(script["keep_features"](*tiny, data).batch([5])["image_grid_thw"]) == 1
    data = open_data(script, small, "--also_train", "--augment", "flip")
    assert script["keep_features"](*tiny, data) is None


# -----------------------------------------------------------------------------
# val between epochs


@pytest.fixture(scope="module")
def watched(small, tmp_path_factory):
    """A run with everything that is drawn, val ranked after each epoch; its flags."""
    folder = tmp_path_factory.mktemp("watched")
    flags = ["--data_root", small, "--model", "tiny", "--holdout", "--epochs", 2]
    flags += ["--batch_size", 12, "--save_every", 2, "--runs", folder, *NO_WANDB]
    flags += ["--question", "Which flower?", "What is it?", "--list_names", "--list_order", "drawn"]
    call("qwen_train.py", *flags, "--eval_every", 1, "--name", "watched")
    return folder / "watched", flags


def test_val_is_ranked_by_the_likelihood_of_the_names(watched, small):
    """Against the loss of each name as the answer, which test_qwen.py has by hand."""
    run, _ = watched
    *_, last = read_rows(run, "val/top1")
    assert last["epoch"] == 2 and last["step"] == 4
    flowers = open_flowers(small, holdout=True)
    model, processor = load_model("tiny", "cpu", run)
    n_right, loss, n_tokens = 0, 0.0, 0
    for i in flowers.splits["val"]:
        image = patches(processor, open_images([flowers.files[i]]))
        order = shuffle(flowers.class_names, generator_of_file(0, flowers.file_names[i]))
        names = flowers.class_names
        likelihoods = np.zeros(len(names))
        for text in ("Which flower?", "What is it?"):
            question = f"{text} Choose from: {', '.join(order)}."
            inputs = encode(processor, question, image["image_grid_thw"])
            with torch.no_grad():
                losses = [answer_loss(model, processor, inputs, image, [name])[0] for name in names]
            likelihoods -= np.array(losses) / 2
        label = flowers.labels[i]
        n_right += int(np.argmax(likelihoods) == label)
        loss -= likelihoods[label]
        n_tokens += answer_length(processor, names[label])
    assert last["val/top1"] == pytest.approx(100 * n_right / 12)
    assert last["val/loss"] == pytest.approx(loss / n_tokens, rel=1e-4)


def test_watching_val_leaves_the_training_as_it_is(watched, tmp_path, cli):
    run, flags = watched
    assert cli("qwen_train.py", *flags, "--runs", tmp_path, "--name", "blind")[0] == 0
    assert (tmp_path / "blind" / ADAPTER).read_bytes() == (run / ADAPTER).read_bytes()
    assert not read_rows(tmp_path / "blind", "val/top1")


def test_a_resumed_run_sees_the_same_val(watched, tmp_path, cli, monkeypatch):
    """Killed after the checkpoint of step 2, and after the val of step 2: it is done again."""
    run, flags = watched
    save_tensors = files.save_tensors

    def save_and_die(path, state):
        save_tensors(path, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(files, "save_tensors", save_and_die)
        flags = [*flags, "--eval_every", 1, "--runs", tmp_path, "--name", "killed"]
        assert cli("qwen_train.py", *flags)[0] == 130
    killed = tmp_path / "killed"
    assert read_rows(killed, "val/top1") == read_rows(run, "val/top1")[:1]
    code, out, err = cli("qwen_train.py", "--resume", killed, *NO_WANDB)
    assert code == 0 and "after step 2 of 4" in out and "epoch 2: val top-1" in out, err
    assert files.read_lines(killed / "metrics.jsonl") == files.read_lines(run / "metrics.jsonl")
    assert (killed / ADAPTER).read_bytes() == (run / ADAPTER).read_bytes()


def test_rows_are_sent_to_wandb_while_the_run_is_at_work(watched, tmp_path, cli, monkeypatch):
    """Before a step, those of all steps before it; val rows too."""
    _, flags = watched
    logged, before_step = [], []

    def log(row, step=None):
        logged.append(row)

    fake = types.ModuleType("wandb")
    fake.Settings = dict
    fake.init = lambda **_: Namespace(log=log, id="x", step=0, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    update = training.update

    def counting_update(*arguments):
        before_step.append(len(logged))
        update(*arguments)

    monkeypatch.setattr(training, "update", counting_update)
    flags = [*flags, "--runs", tmp_path, "--name", "live", "--eval_every", 1]
    assert cli("qwen_train.py", *flags, "--wandb", "offline")[0] == 0
    # 2 steps an epoch, then val.
    assert before_step == [0, 1, 3, 4]
    *rows, result = logged
    assert rows == files.read_lines(tmp_path / "live" / "metrics.jsonl")
    assert "train_seconds" in result


# -----------------------------------------------------------------------------
# the model as one folder


@pytest.mark.parametrize("stored", [{}, {"merge": False}, {"merge": True}])
@pytest.mark.parametrize("typed", [[], ["--merge"]])
def test_a_resumed_run_is_merged_if_it_or_the_command_says_so(script, stored, typed):
    parser = script["make_parser"]()
    args = parser.parse_args(["--resume", "run", *typed])
    resumed = script["parse_stored"](parser, args, {"model": "tiny", **stored})
    assert resumed.merge is bool(stored.get("merge") or typed)
    assert script["resolve"](resumed, 1).merge is resumed.merge


@pytest.fixture(scope="module")
def merged(small, tmp_path_factory):
    """A run whose vision tower and head are trained whole, merged at its end."""
    folder = tmp_path_factory.mktemp("merged")
    flags = ["--data_root", small, "--model", "tiny", "--epochs", 1, "--batch_size", 12]
    flags += ["--runs", folder, "--also_train", "visual", "lm_head", "--lr", 1e-2, *NO_WANDB]
    call("qwen_train.py", *flags, "--name", "run", "--merge")
    return folder / "run" / "merged"


def log_likelihood(model, inputs, image, processor, name):
    with torch.no_grad():
        return -answer_loss(model, processor, inputs, image, [name])[0].item()


def test_a_merged_model_gives_the_scores_of_its_adapter(merged, small):
    flowers = open_flowers(small)
    pictures = open_images([flowers.files[i] for i in (0, 7)])
    trained, processor = load_model("tiny", "cpu", merged.parent)
    ours, our_processor = load_model(str(merged), "cpu", max_pixels=64 * 64)
    # As anybody would load it.
    plain = transformers.AutoModelForImageTextToText.from_pretrained(merged).eval()
    plain_processor = transformers.AutoProcessor.from_pretrained(merged)
    start, _ = load_model("tiny", "cpu")
    for picture in pictures:
        scores = []
        for model, reader in (
            (trained, processor),
            (ours, our_processor),
            (plain, plain_processor),
            (start, processor),
        ):
            image = patches(reader, [picture])
            inputs = encode(reader, QUESTIONS["brief"], image["image_grid_thw"])
            scores.append(
                [log_likelihood(model, inputs, image, reader, name) for name in ("rose", "mallow")]
            )
        expected, *others, untrained = scores
        for other in others:
            assert other == pytest.approx(expected, abs=1e-3)
        assert untrained != pytest.approx(expected, abs=1e-1)


def test_a_finished_run_is_merged_on_request(merged, tmp_path, cli):
    run = shutil.copytree(merged.parent, tmp_path / "run")
    shutil.rmtree(run / "merged")
    code, out, err = cli("qwen_train.py", "--resume", run, "--merge", *NO_WANDB)
    assert code == 0 and f"merged model: {run / 'merged'}" in out, err
    flags = f"--model {run / 'merged'} --runs {tmp_path} --wandb disabled"
    assert f"next: python qwen_eval.py {flags}" in out
    expected = load_file(merged / "model.safetensors")
    found = load_file(run / "merged" / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert not (run / "merged.partial").exists()
    # It is a model, and no run to go on with.
    outcome = cli("qwen_train.py", "--resume", run / "merged")
    assert "nothing to resume" in error_line(outcome)


def test_a_run_of_4_bits_is_merged_to_a_model_in_full_precision(script, merged, tmp_path, capfd):
    run = shutil.copytree(merged.parent, tmp_path / "run")
    files.write_json(run / "args.json", read_arguments(run) | {"load_4bit": True})
    script["export_merged"](run, "auto")
    assert f"another model than that of {run}" in capfd.readouterr().err
    # Its evaluation does not quantise the sum.
    assert read_training(None, str(run / "merged"))["load_4bit"] is False
    assert read_training(str(run), None)["load_4bit"] is True


@pytest.mark.parametrize(
    ("flag", "value"), [("model", None), ("max_pixels", None), ("precision", "fp8")]
)
def test_a_damaged_run_is_not_merged(tmp_path, cli, flag, value):
    settings = {"job": "qwen_train", "model": "tiny", "max_pixels": 4096, flag: value}
    (tmp_path / "run").mkdir()
    files.write_json(tmp_path / "run" / "args.json", settings)
    files.write_json(tmp_path / "run" / "result.json", {"name": "run"})
    outcome = cli("qwen_train.py", "--resume", tmp_path / "run", "--merge")
    assert f"its args.json is damaged ({flag})" in error_line(outcome)


def test_a_run_that_was_killed_while_it_was_merged_is_merged(script, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    files.write_json(run / "result.json", {"name": "run"})
    settings = {"job": "qwen_train", "model": "tiny", "max_pixels": 4096}
    monkeypatch.setattr(sys, "argv", ["qwen_train.py", "--resume", str(run)])

    files.write_json(run / "args.json", settings | {"merge": False})
    with pytest.raises(SystemExit):
        script["read_settings"]()
    files.write_json(run / "args.json", settings | {"merge": True})
    (run / "merged.partial").mkdir()
    args, config = script["read_settings"]()
    assert args.resume == str(run) and config is None  # what `main` merges
    (run / "merged").mkdir()
    with pytest.raises(SystemExit):
        script["read_settings"]()


def test_a_merged_folder_stays_until_the_next_is_whole(script, merged, tmp_path, monkeypatch):
    run = shutil.copytree(merged.parent, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (run / "merged").iterdir()}
    (run / "merged" / "mark").touch()

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(runs, "write_trained_on", die)
        script["export_merged"](run, "auto")
    assert (run / "merged" / "mark").exists()
    script["export_merged"](run, "auto")
    assert {path.name: path.read_bytes() for path in (run / "merged").iterdir()} == before
    assert [path.name for path in run.glob("merged*")] == ["merged"]


def test_one_of_several_processes_merges(script, tmp_path, monkeypatch):
    merging = []
    main = script["main"].__wrapped__
    monkeypatch.setitem(main.__globals__, "export_merged", lambda *_: merging.append(rank))
    for rank in (0, 1):
        processes = devices.Processes(rank, 2, ALONE.device)
        monkeypatch.setattr(devices, "start_processes", lambda _, processes=processes: processes)
        main(Namespace(resume=tmp_path, wandb="auto"), None)
    assert merging == [0]


def test_a_merged_model_knows_what_it_was_trained_on(merged, small, tmp_path):
    """Also where it is a copy, and where another run starts from it."""
    flowers = open_flowers(small)
    expected = set(image_ids(flowers, flowers.splits["train"]))
    copied = shutil.copytree(merged, tmp_path / "copied")
    # As on a machine without the dataset, from which it could be told anew.
    files.write_json(copied / "args.json", read_arguments(copied) | {"data_root": "elsewhere"})
    for model in (merged, copied):
        assert runs.read_trained_on(model) == expected
    runs.write_trained_on(tmp_path, ["another"], copied)
    images = json.loads((tmp_path / "trained_on.json").read_text())["images"]
    assert set(images) == expected | {"another"}


def test_a_merged_model_is_evaluated_as_its_adapter_is(merged, tmp_path, cli):
    copied = shutil.copytree(merged, tmp_path / "copied")
    place = ["--runs", tmp_path, *NO_WANDB]
    outcome = cli("qwen_eval.py", "--model", copied, "--splits", "official", *place)
    assert "were trained on by" in error_line(outcome)
    outcome = cli("qwen_eval.py", "--model", copied, "--holdout", *place)
    assert f"{copied} was trained on the val images" in error_line(outcome)

    for name, flags in (("merged", ["--model", copied]), ("lora", ["--adapter", merged.parent])):
        code, out, err = cli("qwen_eval.py", *flags, *place, "--name", name)
        assert code == 0 and "taken over from" in out and "note: " not in err, err
    scores, expected = (np.load(tmp_path / name / "scores.npz") for name in ("merged", "lora"))
    np.testing.assert_allclose(scores["sum"], expected["sum"], atol=1e-3)
    settings = read_arguments(tmp_path / "merged")
    assert settings["model"] == str(copied) and settings["max_pixels"] == 64 * 64
    assert json.loads((tmp_path / "merged" / "result.json").read_text())["overlap"] == 0
