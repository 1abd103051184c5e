"""What qwen_eval.py asks and how it counts the answers: questions, listed names, spelling, halves.

Scores are compared with whole forwards of the library's own chat template, one a name; averages,
halves and choices with a few lines of numpy.
"""

import dataclasses
import json
import os
import runpy
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NAMES, ROOT, error_line, read_csv

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("peft")
pytest.importorskip("transformers")

from qwen_helpers import with_adapter

from flowers import UserError, devices, evaluate, files, runs, tracking
from flowers.data import image_ids, open_flowers, select
from flowers.qwen import answers
from flowers.qwen.adapters import base_model
from flowers.qwen.answers import contained
from flowers.qwen.models import load_model
from flowers.qwen.prompts import (
    END,
    draw_question,
    encode,
    generator_of_file,
    open_images,
    patches,
    shuffle,
    spell_names,
    with_names,
)

# Matrices this small gain nothing from a second thread, and lose much on a busy machine.
pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = devices.Processes(0, 1, torch.device("cpu"))
OWN_WORDS = ["Which flower is it?", "Name the flower in this picture."]


@pytest.fixture(scope="module")
def script():
    """The functions of qwen_eval.py."""
    return runpy.run_path(str(ROOT / "qwen_eval.py"))


@pytest.fixture(scope="module")
def base_run(small, tmp_path_factory):
    """What a training on the base classes leaves, with a random adapter: all flags differ from
    their defaults."""
    folder = tmp_path_factory.mktemp("protocols") / "runs" / "base"
    folder.mkdir(parents=True)
    with_adapter("tiny", folder)
    flowers = open_flowers(small, holdout=True)
    trained_on = select(flowers.splits["train"], flowers.labels, len(NAMES), "base")
    runs.write_trained_on(folder, image_ids(flowers, trained_on))
    asked = {
        "question": OWN_WORDS,
        "list_names": True,
        "list_order": "drawn",
        "name_case": "title",
        "classes": "base",
        "val_shots": 1,
        "seed": 3,
    }
    settings = {"job": "qwen_train", "model": "tiny", "max_pixels": 512, "answer": "brief"}
    settings |= {"data_root": str(small), "holdout": True, "class_names": "oxford"} | asked
    files.write_json(folder / "args.json", settings)
    return folder


@pytest.fixture
def rows_of_wandb(monkeypatch):
    """The rows that are sent to W&B while a script is at work."""
    rows = []

    class Run:
        step = 0
        summary = {}

        def log(self, row, step=None):
            if step is not None:
                rows.append(row)

        def finish(self):
            pass

    monkeypatch.setattr(tracking, "start_wandb", lambda *_, **__: tracking.Tracker(Run()))
    return rows


def read_result(folder):
    return json.loads((folder / "result.json").read_text())


@torch.no_grad()
def plain_scores(model, processor, question, image, names):
    """(C,) log-likelihoods of each name and its end: a forward of the library's encoding each."""
    content = [{"type": "text", "text": question}]
    if image is not None:
        content.insert(0, {"type": "image", "image": image})
    user = {"role": "user", "content": content}
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    prompt = processor.apply_chat_template([user], add_generation_prompt=True, **options)
    start = prompt["input_ids"].shape[1]
    end_id = processor.tokenizer.convert_tokens_to_ids(END)
    scores = []
    for name in names:
        turn = {"role": "assistant", "content": [{"type": "text", "text": name}]}
        inputs = processor.apply_chat_template([user, turn], **options)
        ids = inputs["input_ids"][0].tolist()
        stop = ids.index(end_id, start)
        log_p = base_model(model)(**inputs).logits[0].log_softmax(-1)
        scores.append(sum(float(log_p[t - 1, ids[t]]) for t in range(start, stop + 1)))
    return np.array(scores)


# -----------------------------------------------------------------------------
# questions and names


def test_each_image_has_a_question_of_its_own(small):
    """As the library's own template writes each of them, with and without an image."""
    _, processor = load_model("tiny", "cpu")
    images = open_images(open_flowers(small).files[:2])
    patched = patches(processor, images)
    for shown in (images, [None, None]):
        grids = patched["image_grid_thw"] if shown[0] is not None else None
        together = encode(processor, OWN_WORDS, grids)
        assert (together["attention_mask"] == 0).any()  # they differ in length
        for i, (text, image) in enumerate(zip(OWN_WORDS, shown)):
            content = [{"type": "text", "text": text}]
            if image is not None:
                content.insert(0, {"type": "image", "image": image})
            expected = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                tokenize=True,
                return_dict=True,
                add_generation_prompt=True,
            )
            mask = together["attention_mask"][i].bool()
            assert together["input_ids"][i][mask].tolist() == expected["input_ids"][0]


def test_names_are_spelled_and_listed():
    names = ["colt's foot", "globe-flower", "bird of paradise", "Ruby cattleya"]
    title = ("Colt's Foot", "Globe-Flower", "Bird Of Paradise", "Ruby Cattleya")
    assert spell_names(names, "title") == title
    assert spell_names(names, "lower")[3] == "ruby cattleya"
    assert spell_names(names, "given") == tuple(names)
    # Names that were the same before are no mistake of the spelling.
    assert spell_names(["rose", "rose"], "title") == ("Rose", "Rose")
    with pytest.raises(UserError, match="--name_case lower: two classes"):
        spell_names(["rose", "Rose"], "lower")
    listed = with_names("What is it?", ["rose", "lotus"])
    assert listed == "What is it? Choose from: rose, lotus."


def test_an_order_is_drawn_for_each_file_whatever_else_is_asked():
    def order(seed, file_name):
        return shuffle(NAMES, generator_of_file(seed, file_name))

    orders = {name: order(0, name) for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg")}
    assert all(sorted(names) == sorted(NAMES) for names in orders.values())
    assert len(set(map(tuple, orders.values()))) > 1
    assert all(order(0, name) == names for name, names in reversed(orders.items()))
    assert any(order(1, name) != names for name, names in orders.items())


def test_training_draws_questions_and_orders_only_where_there_is_a_choice():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert draw_question(["What?"], None, "given", generator) == "What?"
    listed = draw_question(["What?"], NAMES, "given", generator)
    assert listed == with_names("What?", NAMES)
    assert torch.equal(generator.get_state(), before)

    drawn = [draw_question(OWN_WORDS, NAMES, "drawn", generator) for _ in range(20)]
    assert {text.split(" Choose from: ")[0] for text in drawn} == set(OWN_WORDS)
    lists = [text.split(" Choose from: ")[1].rstrip(".").split(", ") for text in drawn]
    assert all(sorted(names) == sorted(NAMES) for names in lists)
    assert len(set(map(tuple, lists))) > 10


def test_an_answer_that_contains_just_one_name():
    names = ["rose", "lenten rose", "globe-flower", "colt's foot", "rose mallow", "mallow tree"]
    for answer, expected in (
        ("It is a rose.", 0),
        ("A ROSE, clearly a rose!", 0),
        ("this 'rose' is pink", 0),
        ("the Lenten\nRose", 1),
        ("a lenten-rose in bloom", 1),
        ("I see a globe flower.", 2),
        ("I see a globe-flower.", 2),
        ("Colt\u2019s foot, a yellow flower", 3),
        ("a rose mallow of some kind", 4),
        # punctuation without a space
        ("This is a rose\u2014a garden flower.", 0),
        ("rose(Rosa)", 0),
        ("rose:red", 0),
        ("Answer:rose", 0),
        ("\u2018rose\u2019", 0),
        # two names
        ("rose or lenten rose", None),
        ("rose/globe-flower", None),
        ("a rose mallow tree", None),
        # none: plurals and longer words are other words
        ("roses", None),
        ("a primrose", None),
        ("the globe is a flower", None),
        ("colts foot", None),
        ("", None),
        ("...", None),
    ):
        assert contained(answer, names) == expected, answer
    assert contained("", ["?", "rose"]) is None


# -----------------------------------------------------------------------------
# flags


def config_of(script, *words):
    """What qwen_eval.py makes of a command line, up to its Config."""
    return script["resolve"](script["make_parser"]().parse_args([str(word) for word in words]))


def test_an_adapter_brings_what_it_was_asked_in_training(script, base_run, capfd):
    same = config_of(script, "--adapter", base_run, "--holdout")
    assert same.question == OWN_WORDS and same.list_names and same.list_order == "drawn"
    assert (same.name_case, same.classes, same.val_shots, same.seed) == ("title", "base", 1, 3)
    assert "note: " not in capfd.readouterr().err

    other = ["--question", "What?", "--list_names=false", "--name_case", "lower", "--classes=all"]
    config = config_of(script, "--adapter", base_run, "--holdout", *other)
    assert config.question == ["What?"] and config.name_case == "lower" and config.classes == "all"
    # Without a list there is no order, and without a holdout no val.
    assert config.list_order == "given" and config.val_shots == 1
    assert config_of(script, "--adapter", base_run).val_shots is None
    notes = [line for line in capfd.readouterr().err.splitlines() if line.startswith("note: ")]
    said = [line.split()[1:3] for line in notes]
    assert [flag for flag, _ in said] == [
        "--question",
        "--list_names",
        "--name_case",
        "--classes",
    ]
    assert f"'{OWN_WORDS[0]}' and '{OWN_WORDS[1]}'" in notes[0] and "with true" in notes[1]

    # What has no part is neither noted nor taken over.
    flags = ["--list_names=false", "--protocol", "generate", "--holdout"]
    flags += ["--question", *OWN_WORDS[:1]]
    config = config_of(script, "--adapter", base_run, *flags)
    assert (config.seed, config.val_shots, config.name_case) == (3, None, "given")
    assert config.classes == "base"  # of the training, as its seed
    err = capfd.readouterr().err
    assert "--list_names" in err and "--question" in err and err.count("note: ") == 2
    flags = ["--holdout", "--list_names=false", "--seed", 5]
    assert config_of(script, "--adapter", base_run, *flags).val_shots == 1
    assert "--seed 5" in capfd.readouterr().err

    described = config_of(script, "--adapter", base_run, "--describe")
    assert not described.list_names and described.question is None and described.classes == "all"


@pytest.mark.parametrize("name", ["qwen_eval.py", "qwen_probe.py"])
def test_other_data_than_that_of_the_training_is_noted(
    name, base_run, tmp_path, monkeypatch, capfd
):
    run = shutil.copytree(base_run, tmp_path / "run")
    trained = files.read_json(run / "args.json")
    trained |= {"splits": "swapped", "splits_path": None, "load_4bit": False}
    files.write_json(run / "args.json", trained)
    read_settings = runpy.run_path(str(ROOT / name))["read_settings"]
    same = ["--splits", "swapped", "--class_names=oxford"]
    other = ["--splits", "official", "--class_names", "openai", "--data_root", "sample"]
    for flags, noted in (
        ([], []),
        (same, []),
        (other, ["--data_root", "--splits", "--class_names"]),
    ):
        monkeypatch.setattr(sys, "argv", [name, "--adapter", str(run), *flags])
        read_settings()
        lines = capfd.readouterr().err.splitlines()
        notes = [line for line in lines if line.startswith("note: ")]
        assert [line.split()[1] for line in notes] == noted
    assert f"--splits official: {run} was trained with swapped" in notes[1]


def test_what_was_switched_off_stays_off_in_a_resumed_run(script, base_run, tmp_path, monkeypatch):
    """A switch that is off is no flag, and must not become the adapter's once more."""
    run = shutil.copytree(base_run, tmp_path / "run")
    trained = json.loads((run / "args.json").read_text())
    files.write_json(run / "args.json", trained | {"load_4bit": True})
    off = ["--list_names=false", "--load_4bit=false"]
    config = config_of(script, "--adapter", run, *off, "--question=-a", "--question", "b")
    assert not config.load_4bit
    folder = tmp_path / "eval"
    folder.mkdir()
    stored = {"job": "qwen_eval"} | dataclasses.asdict(config)
    files.write_json(folder / "args.json", stored)
    monkeypatch.setattr(sys, "argv", ["qwen_eval.py", "--resume", str(folder)])
    _, resumed = script["read_settings"]()
    assert dataclasses.replace(resumed, runs=config.runs) == config


def test_flags_that_mean_nothing_together_are_refused(script, base_run, tmp_path):
    tiny = ["--model", "tiny"]
    assert config_of(script, "--architecture", "tiny").model == "tiny"
    for flags, message in (
        (["--question", " "], "no words"),
        (["--question", "a<|image_pad|>"], "special token"),
        (["--question", "a", "--question", "a"], "given twice"),
        (["--list_order", "drawn"], "give both"),
        (["--question", "a", "b", "--protocol", "generate"], "one question"),
        (["--question", "a", "b", "--answer", "described"], "one question"),
        (["--name_case", "best"], "give --holdout"),
        (["--name_case", "best", "--holdout", "--protocol", "generate"], "give --holdout"),
        (["--name_case", "best", "--holdout", "--split", "val"], "give --holdout"),
        (["--val_shots", "1"], "needs --holdout"),
        (["--val_shots", "0", "--holdout"], "at least 1"),
        (["--val_shots", "1", "--holdout", "--protocol", "generate"], "choose nothing"),
        (["--val_shots", "1", "--holdout", "--split", "val"], "choose nothing"),
        (["--val_shots", "1", "--holdout", "--score", "sum"], "choose nothing"),
        (["--score", "sum", "--protocol", "generate"], "leave it out"),
        (["--score", "pmi", "--describe"], "leave it out"),
        (["--describe", "--question", "a"], "--question: --describe has a question"),
        (["--describe", "--list_names"], "--list_names: --describe has a question"),
        (["--describe", "--answer", "described"], "--answer: --describe has a question"),
        (["--describe", "--seed", "1"], "--seed: --describe has a question"),
        (["--describe", "--protocol", "generate"], "--protocol: --describe evaluates nothing"),
        (["--describe", "--compare", "a"], "--compare: --describe evaluates nothing"),
        # Flags that would change nothing.
        (["--name_case", "lower", "--protocol", "generate"], "--name_case: .* in any spelling"),
        (["--classes", "base"], "--classes: .* here is neither"),
        (["--classes", "base", "--protocol", "generate"], "--classes: .* here is neither"),
        (["--classes", "new", "--holdout", "--split", "val"], "--classes: .* here is neither"),
        (["--most_tokens", "9"], "--most_tokens: no answer is written"),
        (["--seed", "1"], "--seed: .* nothing is drawn"),
        (["--seed", "1", "--holdout", "--list_names"], "--seed: .* nothing is drawn"),
    ):
        with pytest.raises(UserError, match=message):
            config_of(script, *tiny, *flags)

    # A default that is typed misleads nobody.
    for flags in (["--seed", "0"], ["--classes", "all"], ["--list_order", "given"]):
        config_of(script, *tiny, *flags)

    # The same flags where they have a part.
    for flags in (
        ["--list_order", "given", "--list_names"],
        ["--name_case", "lower"],
        ["--name_case", "lower", "--protocol", "generate", "--list_names"],
        ["--classes", "base", "--list_names", "--protocol", "generate"],
        ["--classes", "base", "--holdout"],
        ["--most_tokens", "9", "--answer", "described"],
        ["--most_tokens", "9", "--describe"],
        ["--seed", "0", "--list_names", "--list_order", "drawn"],
        ["--seed", "0", "--holdout", "--val_shots", "1"],
    ):
        config_of(script, *tiny, *flags)
    assert config_of(script, *tiny).most_tokens == 80

    damaged = shutil.copytree(base_run, tmp_path / "damaged")
    arguments = json.loads((base_run / "args.json").read_text())
    for damage in (
        {"question": "a"},
        {"question": [3]},
        {"list_names": "yes"},
        {"list_order": "up"},
        {"name_case": "best"},
        {"classes": None},
        {"val_shots": 0},
        {"seed": 1.5},
    ):
        files.write_json(damaged / "args.json", arguments | damage)
        with pytest.raises(UserError, match="is damaged"):
            config_of(script, "--adapter", damaged, "--holdout")


@pytest.mark.parametrize("name", ["qwen_eval.py", "qwen_train.py"])
def test_only_the_word_auto_leaves_the_batch_size_open(name, capsys):
    parser = runpy.run_path(str(ROOT / name))["make_parser"]()
    assert parser.parse_args(["--batch_size", "auto"]).batch_size == "auto"
    assert parser.parse_args(["--batch_size", "3"]).batch_size == 3
    for text in ("0", "-1", "1.5", "", "Auto", "9" * 5000):
        with pytest.raises(SystemExit):
            parser.parse_args([f"--batch_size={text}"])
        assert "neither auto nor a whole number above 0" in capsys.readouterr().err


def test_val_images_that_choose_are_those_of_train_py_and_of_the_trained_half(script, small):
    flowers = open_flowers(small, holdout=True)
    images_of_val = script["images_of_val"]
    val = flowers.splits["val"]
    for classes, shots, seed in (("all", None, 0), ("all", 1, 5), ("base", 1, 5), ("new", 1, 5)):
        config = SimpleNamespace(
            asks_val=True, classes=classes, val_shots=shots, seed=seed, name_case="best", images=0
        )
        # As train.py draws them, of all classes.
        drawn = select(val, flowers.labels, 6, shots=shots, seed=seed)
        half = {"all": range(6), "base": range(3), "new": range(3, 6)}[classes]
        expected = [i for i in drawn if flowers.labels[i] in half]
        assert images_of_val(config, flowers).tolist() == expected
        assert len(expected) == len(half) * (shots or 2)
    # --images counts for them, too.
    config.images = 2
    few = images_of_val(config, flowers).tolist()
    assert len(few) == 2 and set(few) < set(expected)
    with pytest.raises(UserError, match="no val images"):
        images_of_val(config, open_flowers(small))


def test_val_images_that_an_adapter_was_trained_on_choose_nothing(script, small, tmp_path):
    flowers = open_flowers(small, holdout=True)
    val, test = flowers.splits["val"], flowers.splits["test"]
    files.write_json(tmp_path / "args.json", {"job": "qwen_train"})
    runs.write_trained_on(tmp_path, image_ids(flowers, val))
    config = SimpleNamespace(
        adapter=str(tmp_path), model="tiny", describe=False, allow_overlap=False, split="test"
    )
    check = script["check_overlap"]
    with pytest.raises(UserError, match=f"{len(val)} of the {len(val)} val images"):
        check(config, flowers, test, val)
    assert check(config, flowers, test, val[:0]) == 0
    config.allow_overlap = True
    assert check(config, flowers, test, val) == 0


# -----------------------------------------------------------------------------
# ranking


def halves_by_hand(scores, labels):
    """Base and new top-1, each among its own three classes, and their harmonic mean."""
    base = np.mean([scores[n, :3].argmax() == c for n, c in enumerate(labels) if c < 3])
    new = np.mean([scores[n, 3:].argmax() + 3 == c for n, c in enumerate(labels) if c >= 3])
    mean = 2 * base * new / (base + new) if base + new else 0.0
    return 100 * base, 100 * new, 100 * mean


def test_questions_lists_and_halves_are_scored_as_by_hand(base_run, small, cli, rows_of_wandb):
    """Two questions, names in title case and a drawn order; own halves beside; and after a kill."""
    arguments = ["--adapter", base_run, "--runs", base_run.parent, "--batch_size", 5]
    code, out, err = cli("qwen_eval.py", *arguments, "--name", "listed")
    assert code == 0, err
    folder = base_run.parent / "listed"
    rows = {row["file"]: row for row in files.read_lines(folder / "answers.jsonl")}
    flowers = open_flowers(small, holdout=True)
    test = flowers.splits["test"]
    # Of val one image of each base class was asked about.
    assert len(rows) == len(test) + 3 and "top-1 on 3 val images: " in out

    model, processor = load_model("tiny", "cpu", base_run, 512)
    title = [name.title() for name in NAMES]
    for i in (test[1], test[4]):
        [image] = open_images([flowers.files[i]])
        generator_names = {
            "sum": title,
            "own_sum": title[:3] if flowers.labels[i] < 3 else title[3:],
        }
        for key, names in generator_names.items():
            names = shuffle(names, generator_of_file(3, flowers.file_names[i]))
            questions = [f"{text} Choose from: {', '.join(names)}." for text in OWN_WORDS]
            for image_or_none, column in ((image, key), (None, key.replace("sum", "prior"))):
                each = [
                    plain_scores(model, processor, question, image_or_none, title)
                    for question in questions
                ]
                np.testing.assert_allclose(
                    rows[flowers.file_names[i]][column], np.mean(each, 0), atol=1e-3
                )
                assert np.abs(each[0] - each[1]).max() > 1e-2

    # pmi is less the prior of the same order, and halves are compared after their own lists.
    saved = np.load(folder / "scores.npz")
    prior = np.array([rows[flowers.file_names[i]]["prior"] for i in test])
    np.testing.assert_allclose(saved["pmi"], saved["sum"] - prior, atol=1e-4)
    result = read_result(folder)
    labels = flowers.labels[test]
    score = result["reported_score"]
    halves = halves_by_hand(saved[f"own_{score}"], labels)
    reported = [result[f"test/{key}"] for key in ("base_top1", "new_top1", "harmonic_mean")]
    assert reported == pytest.approx(halves)
    assert result["test/top1"] == pytest.approx(100 * np.mean(saved[score].argmax(1) == labels))
    assert "harmonic_mean" in out
    assert result["classes"] == "base" and result["question"] == OWN_WORDS
    assert "the names listed in an order drawn for each image, title case" in result["prompts"]

    # While it ran: every five images, the top-1 by the sum so far; val images count no more.
    sums = np.array([rows[flowers.file_names[i]]["sum"] for i in test])
    right = (sums.argmax(1) == labels).tolist()
    assert [row["progress/images"] for row in rows_of_wandb] == [5, 10, 15]
    for row in rows_of_wandb:
        so_far = right[: row["progress/images"]]
        assert row["progress/top1"] == pytest.approx(100 * np.mean(so_far))

    # Killed after seven images: the same scores, and the same rows again.
    killed = base_run.parent / "killed"
    shutil.copytree(folder, killed)
    lines = (folder / "answers.jsonl").read_text().splitlines(keepends=True)
    (killed / "answers.jsonl").write_text("".join(lines[:7]) + lines[7][:30])
    (killed / "result.json").unlink()
    before = list(rows_of_wandb)
    rows_of_wandb.clear()
    code, _, err = cli("qwen_eval.py", "--resume", killed)
    assert code == 0, err
    assert rows_of_wandb == before
    again = {row["file"]: row for row in files.read_lines(killed / "answers.jsonl")}
    assert again.keys() == rows.keys()
    for file_name, row in rows.items():
        for key in ("sum", "own_sum", "prior", "own_prior"):
            np.testing.assert_allclose(again[file_name][key], row[key], atol=2e-4)
    ours = read_result(killed)
    assert {key: ours[key] for key in result if key.startswith("test/") and "top1" in key} == {
        key: result[key] for key in result if key.startswith("test/") and "top1" in key
    }


def test_the_images_and_halves_are_those_of_clip(small, tmp_path, cli):
    common = ["--data_root", small, "--splits", "official", "--holdout", "--split", "val"]
    common += ["--architecture", "tiny", "--runs", tmp_path, "--wandb", "disabled"]
    for job, name in (("qwen_eval.py", "qwen"), ("baseline_eval.py", "clip")):
        code, _, err = cli(job, *common, "--name", name)
        assert code == 0, err
    columns = {}
    for name in ("qwen", "clip"):
        rows = read_csv(tmp_path / name / "predictions.csv")
        columns[name] = [(row["file"], row["label"]) for row in rows]
    assert columns["qwen"] == columns["clip"] and len(columns["qwen"]) == 12
    result, clip_result = read_result(tmp_path / "qwen"), read_result(tmp_path / "clip")
    for key in ("dataset", "split", "convention", "images", "class_names"):
        assert result[key] == clip_result[key], key
    halves = {key for key in clip_result if "base_top1" in key or "new_top1" in key}
    assert len(halves) == 6 and halves | {"val/harmonic_mean"} <= result.keys()
    saved = np.load(tmp_path / "qwen" / "scores.npz")
    labels = [NAMES.index(label) for _, label in columns["qwen"]]
    reported = [result[f"val/{key}"] for key in ("base_top1", "new_top1", "harmonic_mean")]
    assert reported == pytest.approx(halves_by_hand(saved["sum"], labels))
    # What is drawn by --images is a part of them.
    flowers = open_flowers(small, splits="official", holdout=True)
    assert [name for name, _ in columns["qwen"]] == [
        flowers.file_names[i] for i in flowers.splits["val"]
    ]


def test_the_spelling_is_chosen_on_val(base_run, small, cli):
    arguments = ["--adapter", base_run, "--runs", base_run.parent, "--name", "best"]
    arguments += ["--list_names=false", "--question", "What?", "--score", "sum"]
    arguments += ["--classes", "all", "--val_shots", 2, "--name_case", "best"]
    code, out, err = cli("qwen_eval.py", *arguments, "--wandb", "disabled")
    assert code == 0, err
    folder = base_run.parent / "best"
    flowers = open_flowers(small, holdout=True)
    label_of = dict(zip(flowers.file_names, flowers.labels.tolist()))
    result = read_result(folder)
    top1 = {}
    for case in ("given", "lower", "title"):
        rows = files.read_lines(folder / f"val-{case}.jsonl")
        assert len(rows) == 12
        top1[case] = 100 * np.mean([np.argmax(r["sum"]) == label_of[r["file"]] for r in rows])
        assert result[f"val/name_case_{case}_top1"] == pytest.approx(top1[case])
    best = result["reported_name_case"]
    assert top1[best] == max(top1.values()) and f"names are spelled as in {best}" in out
    assert result["name_case"] == "best"

    # The test images were asked about with that spelling alone.
    rows = files.read_lines(folder / "answers.jsonl")
    assert [row["file"] for row in rows] == [flowers.file_names[i] for i in flowers.splits["test"]]
    model, processor = load_model("tiny", "cpu", base_run, 512)
    [image] = open_images([flowers.files[flowers.splits["test"][0]]])
    spelled = [name.title() for name in NAMES] if best == "title" else NAMES
    expected = plain_scores(model, processor, "What?", image, spelled)
    np.testing.assert_allclose(rows[0]["sum"], expected, atol=1e-3)
    # Tables keep the names of the dataset.
    assert {row["top1"] for row in read_csv(folder / "predictions.csv")} <= set(NAMES)


# -----------------------------------------------------------------------------
# free answers


def test_free_answers_are_counted_whole_by_what_they_contain_and_in_halves(
    base_run, small, cli, monkeypatch
):
    """Whole, as the only name that is contained, and in halves after the own half's list."""
    prompts = []

    def scripted(model, processor, inputs, image, max_tokens):
        texts = processor.batch_decode(inputs["input_ids"], skip_special_tokens=True)
        prompts.extend(texts)
        # The first name of the list.
        first = [text.split("Choose from: ")[1].split(",")[0] for text in texts]
        return [f"surely a {name}" if len(prompts) > 12 else name for name in first]

    monkeypatch.setattr(answers, "generate", scripted)
    arguments = ["--adapter", base_run, "--runs", base_run.parent, "--protocol", "generate"]
    arguments += ["--question", "What is it?", "--batch_size", 6, "--wandb", "disabled"]
    code, out, err = cli("qwen_eval.py", *arguments, "--name", "free")
    assert code == 0, err
    flowers = open_flowers(small, holdout=True)
    test = flowers.splits["test"]
    labels = flowers.labels[test]
    rows = {row["file"]: row for row in files.read_lines(base_run.parent / "free/answers.jsonl")}
    assert list(rows) == [flowers.file_names[i] for i in test]

    # Six images a batch: asked with all names, then with those of their half.
    for n, text in enumerate(prompts):
        place = n % 6 + 6 * (n // 12)
        names = text.split("Choose from: ")[1].split(".")[0].split(", ")
        own = n // 6 % 2 == 1
        half = range(3) if labels[place] < 3 else range(3, 6)
        expected = [NAMES[c].title() for c in (half if own else range(6))]
        assert sorted(names) == sorted(expected)

    result = read_result(base_run.parent / "free")
    given = [rows[flowers.file_names[i]] for i in test]
    named = [name.title() for name in (NAMES[c] for c in labels)]
    right = [row["answer"] == name for row, name in zip(given, named)]
    assert result["test/top1"] == pytest.approx(100 * np.mean(right))
    # Under title case these are the only words with a capital.
    capitals = [[w for w in row["answer"].split() if w[0].isupper()] for row in given]
    within = [words == name.split() for words, name in zip(capitals, named)]
    assert result["test/contains_top1"] == pytest.approx(100 * np.mean(within))
    assert sum(within) >= sum(right)
    low, high = result["test/contains_top1_low"], result["test/contains_top1_high"]
    assert low <= result["test/contains_top1"] <= high
    assert result["test/contains_not_one"] == 0
    assert "contains_top1" in out and "harmonic_mean" in out
    own_right = np.array([row["own_answer"] == name for row, name in zip(given, named)])
    assert result["test/base_top1"] == pytest.approx(100 * own_right[labels < 3].mean())
    assert result["test/new_top1"] == pytest.approx(100 * own_right[labels >= 3].mean())


def test_records_that_can_not_be_evaluated_are_asked_again(script, tmp_path, capfd):
    """A file that was damaged, or edited: what is left of it can be evaluated."""
    sound = {
        "rank": {"sum": [-1, -2.5], "prior": [-1, -1], "own_sum": [-1, 0], "own_prior": [0, 0]},
        "generate": {"answer": "rose", "own_answer": ""},
        "describe": {"captions": ["Red."]},
    }
    damages = {
        "rank": ([-1], [-1, "2"], [-1, True], [-1, None], [-1, float("nan")], [-1, 10**400], -1),
        "generate": (None, 3, ["rose"]),
        "describe": ("Red.", [], [3]),
    }
    for protocol, record in sound.items():
        config = SimpleNamespace(
            describe=protocol == "describe",
            protocol=protocol,
            list_order="drawn",
            lists=("", "own_"),
        )
        task = SimpleNamespace(config=config, class_names=("rose", "iris"), processes=ALONE)
        lines = [{"file": "a.jpg"} | record]
        for key in record:
            lines.append({"file": "b.jpg"} | {k: v for k, v in record.items() if k != key})
            lines += [{"file": "b.jpg"} | record | {key: value} for value in damages[protocol]]
        lines += [record, {"file": ["a.jpg"]} | record]
        path = tmp_path / f"{protocol}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "[]\n")
        assert script["collect"](path, task) == {"a.jpg": lines[0]}
        err = capfd.readouterr().err
        assert f"{len(lines) - 1} of the {len(lines)} records" in err and "1 damaged line" in err
        # They are not in the file any more.
        assert script["collect"](path, task) == {"a.jpg": lines[0]}
        assert capfd.readouterr().err == ""


def test_accuracy_of_halves():
    correct = np.array([True, False, True, True])
    is_base = np.array([True, True, False, False])
    metrics = evaluate.accuracy_of_halves(correct, is_base)
    assert (metrics["base_top1"], metrics["new_top1"]) == (50, 100)
    assert metrics["harmonic_mean"] == pytest.approx(200 / 3)
    assert evaluate.accuracy_of_halves(correct, np.ones(4, dtype=bool)) == {}


def test_a_list_of_all_names_tells_no_halves_apart(script):
    tells = script["tells_halves_apart"]
    all_names = config_of(script, "--model", "tiny", "--list_names")
    assert not tells(all_names)
    assert tells(config_of(script, "--model", "tiny", "--list_names", "--classes", "new"))
    assert tells(config_of(script, "--model", "tiny"))


def test_a_mistake_in_a_question_is_one_line(small, tmp_path, cli):
    arguments = ["--data_root", small, "--model", "tiny", "--runs", tmp_path]
    outcome = cli("qwen_eval.py", *arguments, "--list_order", "drawn")
    assert "give both" in error_line(outcome)
    assert not list(tmp_path.iterdir())
