"""The linear probe on Qwen's features, against plain calls of transformers and scikit-learn."""

import json
import runpy
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, error_line, read_csv

# Qwen's libraries are an extra.
pytest.importorskip("peft")
pytest.importorskip("transformers")

from PIL import Image
from qwen_helpers import with_adapter
from qwen_scorer import library_encoding, small_family
from sklearn.linear_model import LogisticRegression

from flowers import files, runs
from flowers.data import image_ids, open_flowers, select
from flowers.qwen.adapters import base_model
from flowers.qwen.models import load_model
from flowers.qwen_settings import QUESTIONS, read_training
from flowers.study import comparable

# Matrices this small gain nothing from a second thread, and lose much on a busy machine.
pytestmark = pytest.mark.usefixtures("one_thread")

NO_WANDB = ("--wandb", "disabled")
FEATURES = ("vision", "merged", "prompt")
QUESTION = "Which flower?"


@pytest.fixture(scope="module")
def probe():
    """What qwen_probe.py defines."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "qwen_probe.py")))


@torch.no_grad()
def plain_features(model, processor, paths, question):
    """{features: (N, D)} of one image after the other, from one plain forward each."""
    network = base_model(model)
    seen = {}
    hooks = [
        network.model.visual.blocks[-1].register_forward_hook(
            lambda _, inputs, output: seen.update(vision=output)
        ),
        network.model.visual.merger.register_forward_hook(
            lambda _, inputs, output: seen.update(merged=output)
        ),
    ]
    rows = {name: [] for name in FEATURES}
    for path in paths:
        image = Image.open(path).convert("RGB")
        inputs = library_encoding(processor, [image], question=question)
        output = network(**inputs, output_hidden_states=True)
        states = {name: seen[name].mean(0) for name in ("vision", "merged")}
        states["prompt"] = output.hidden_states[-1][0, -1]
        for name, state in states.items():
            rows[name].append((state / state.norm()).float())
    for hook in hooks:
        hook.remove()
    return {name: torch.stack(states) for name, states in rows.items()}


def settings_of(features, question=QUESTION, batch_size=3):
    return SimpleNamespace(
        features=features, asks=question, batch_size=batch_size, device="cpu", model="it"
    )


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "adapter"])
def test_features_are_those_of_a_plain_forward(family, probe, small, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(small, data)
    if family == "adapter":
        _, model, processor = with_adapter("tiny", tmp_path)
    elif family == "qwen2_vl":
        model, processor = load_model("tiny", "cpu")
    else:
        model, processor = load_model(str(small_family(family, tmp_path / family)), "cpu")
    flowers = open_flowers(data)
    # A batch that is not full at the end; pictures of several sizes.
    index = np.array([0, 3, 7, 11, 20])
    expected = plain_features(model, processor, [flowers.files[i] for i in index], QUESTION)
    for name in FEATURES:
        found = probe.encode_images(model, processor, flowers, index, settings_of(name))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-5)
        # Kept features give the same.
        again = probe.encode_images(model, processor, flowers, index[::-1], settings_of(name))
        torch.testing.assert_close(again.flip(0), expected[name], rtol=0, atol=1e-5)


def read_probabilities(folder, class_names):
    """{file: (C,)} as far as predictions.csv has them, five classes an image."""
    rows = {}
    for row in read_csv(folder / "predictions.csv"):
        scores = np.full(len(class_names), np.nan)
        for k in range(1, 6):
            scores[class_names.index(row[f"top{k}"])] = float(row[f"score{k}"])
        rows[row["file"]] = scores
    return rows


def test_the_head_is_that_of_scikit_learn(small, tmp_path, cli):
    """On the images that train.py draws with the same flags; C chosen on val."""
    flags = ["--data_root", small, "--model", "tiny", "--holdout", "--shots", 3, "--seed", 1]
    flags += ["--features", "merged", "--runs", tmp_path, *NO_WANDB]
    code, out, err = cli("qwen_probe.py", *flags, "--name", "probe")
    assert code == 0, err
    folder = tmp_path / "probe"
    result = files.read_json(folder / "result.json")

    flowers = open_flowers(small, holdout=True)
    labels = flowers.labels
    train = select(flowers.splits["train"], labels, 6, shots=3, seed=1)
    val = select(flowers.splits["val"], labels, 6, shots=3, seed=1)
    test = flowers.splits["test"]
    model, processor = load_model("tiny", "cpu")

    def features_at(index):
        paths = [flowers.files[i] for i in index]
        return plain_features(model, processor, paths, QUESTION)["merged"].numpy()

    best, best_score = None, -1
    for c in (0.1, 1, 10, 100, 1000):
        regression = LogisticRegression(C=c, max_iter=1000, tol=1e-8)
        regression.fit(features_at(train), labels[train])
        score = regression.score(features_at(val), labels[val])
        if score > best_score:
            best, best_score = regression, score
    assert result["fitted_C"] == best.C and result["chosen_on"] == "val"
    expected = best.predict_proba(features_at(test))
    assert result["test/top1"] == pytest.approx(
        100 * np.mean(expected.argmax(1) == labels[test]), abs=1e-9
    )
    names = list(flowers.class_names)
    found = read_probabilities(folder, names)
    found = np.array([found[flowers.file_names[i]] for i in test])
    known = ~np.isnan(found)
    assert known.sum() == 5 * len(test)
    # scikit-learn stops L-BFGS at its own tolerance.
    np.testing.assert_allclose(found[known], expected[known], atol=2e-3)

    # What CLIP's runs leave, and no file is left out.
    left = {path.name for path in folder.iterdir()}
    assert left >= {"args.json", "trained_on.json", "predictions.csv", "report.csv"}
    assert left >= {"confusion.png", "mistakes.png", "reliability.png", "result.json"}
    assert set(files.read_json(folder / "trained_on.json")["images"]) == set(
        image_ids(flowers, train)
    )
    assert result["job"] == "qwen_probe" and result["features"] == "merged"
    assert result["prompts"] == "none (a linear head on merged features)"
    assert files.read_lines(tmp_path / "results.jsonl")[0]["name"] == "probe"
    # Names of other runs, and of no other split.
    outcome = cli("qwen_probe.py", *flags, "--name", "probe")
    assert "is a run already: choose another --name" in error_line(outcome)
    # On val, with C as given: the images that chose are those that are evaluated.
    flags += ["--split", "val", "--val_shots", 1, "--inverse_penalty", 10, "--name", "val"]
    code, out, err = cli("qwen_probe.py", *flags, "--compare", folder)
    assert "was not evaluated on the val images" in error_line((code, out, err))
    code, out, err = cli("qwen_probe.py", *flags)
    assert code == 0, err
    result = files.read_json(tmp_path / "val" / "result.json")
    assert result["val/n"] == 6 and result["fitted_C"] == 10
    assert result["chosen_on"] == "--inverse_penalty" and result["val_shots"] == 1
    one_each = select(flowers.splits["val"], labels, 6, shots=1, seed=1)
    found = read_probabilities(tmp_path / "val", names)
    assert set(found) == {flowers.file_names[i] for i in one_each}


@pytest.fixture(scope="module")
def adapter(small, tmp_path_factory):
    """A folder such as qwen_train.py leaves it: trained on Oxford's own split, val held out."""
    folder = tmp_path_factory.mktemp("probe") / "run"
    with_adapter("tiny", folder)
    flowers = open_flowers(small, splits="official", holdout=True)
    args = {"job": "qwen_train", "model": "tiny", "architecture": "tiny", "name": "run"}
    args |= {"data_root": str(small), "splits": "official", "holdout": True, "answer": "described"}
    args |= {"max_pixels": 4096, "images": 0, "seed": 0}
    files.write_json(folder / "args.json", args)
    runs.write_trained_on(folder, image_ids(flowers, flowers.splits["train"]))
    return folder


def test_a_probe_of_an_adapter_takes_over_what_its_run_says(adapter, small, tmp_path, cli):
    common = ["--adapter", adapter, "--runs", tmp_path, *NO_WANDB, "--features", "prompt"]
    code, out, err = cli("qwen_probe.py", *common, "--images", 5, "--name", "probe")
    assert code == 0, err
    result = files.read_json(tmp_path / "probe" / "result.json")
    assert result["splits"] == "official" and result["model"] == "tiny" and result["holdout"]
    assert result["max_pixels"] == 4096 and result["answer"] == "described"
    assert QUESTIONS["described"] in result["prompts"]
    assert result["test/n"] == 5 and result["overlap"] == 0 and result["chosen_on"] == "val"
    # The features are those of the model with its adapter.
    plain = ["--data_root", small, "--splits", "official", "--holdout", "--model", "tiny"]
    plain += ["--runs", tmp_path, *NO_WANDB, "--features", "prompt", "--images", 5]
    question = ["--question", QUESTIONS["described"]]
    assert cli("qwen_probe.py", *plain, *question, "--name", "base")[0] == 0
    scores = [(tmp_path / name / "predictions.csv").read_text() for name in ("probe", "base")]
    assert scores[0] != scores[1]

    # With other splits these are the images that the adapter was trained on.
    outcome = cli("qwen_probe.py", *common, "--splits", "swapped", "--name", "other")
    assert "of the 12 test images were trained on by" in error_line(outcome)
    outcome = cli("qwen_probe.py", *common, "--max_pixels", 0)
    assert "give at least 256" in error_line(outcome)


def test_the_question_of_training_is_asked(adapter, probe, tmp_path, capfd):
    folder = tmp_path / "run"
    shutil.copytree(adapter, folder)
    own = {"question": ["Own words?", "Others?"], "list_names": True}
    stored = files.read_json(folder / "args.json")
    for damage in (
        {"question": "no list"},
        {"question": [3]},
        {"question": []},
        {"answer": "long"},
    ):
        files.write_json(folder / "args.json", stored | own | damage)
        with pytest.raises(probe.UserError, match="is damaged"):
            read_training(str(folder), None)
    files.write_json(folder / "args.json", stored | own)
    flags = ["--adapter", str(folder), "--features", "prompt"]
    config = probe.resolve(probe.make_parser().parse_args(flags))
    assert config.asks == "Own words?" and config.question == ["Own words?"]
    assert "was trained with --list_names" in capfd.readouterr().err
    config = probe.resolve(probe.make_parser().parse_args([*flags, "--question", "Mine?"]))
    assert config.asks == "Mine?"


def test_a_merged_model_is_probed_as_its_adapter_is(adapter, probe, small, tmp_path, cli):
    """It brings what its run says, and the images that it was trained on are refused."""
    merged = tmp_path / "run" / "merged"
    model, processor = load_model("tiny", "cpu")
    model.save_pretrained(merged)
    processor.save_pretrained(merged)
    stored = files.read_json(adapter / "args.json") | {"load_4bit": True, "question": ["Own?"]}
    files.write_json(merged / "args.json", stored | {"job": runs.MERGED})
    runs.write_trained_on(merged, [], adapter)

    flags = ["--model", str(merged), "--features", "prompt"]
    config = probe.resolve(probe.make_parser().parse_args(flags))
    assert config.model == str(merged) and config.max_pixels == 4096 and config.load_4bit
    assert config.asks == "Own?"
    words = [*flags, "--load_4bit=false", "--splits", "swapped", "--runs", tmp_path, *NO_WANDB]
    assert "of the 12 test images were trained on by" in error_line(cli("qwen_probe.py", *words))


def test_flags_that_mean_nothing_are_refused(small, tmp_path, cli):
    common = ["--data_root", small, "--model", "tiny", "--runs", tmp_path, *NO_WANDB]
    for flags, words in (
        (["--question", "Which?"], "--question is asked for --features prompt alone"),
        (["--val_shots", 2], "--val_shots needs --holdout"),
        (["--shots", 0], "must be at least 1"),
        (["--features", "prompt", "--question", " "], "no words"),
        (["--features", "prompt", "--question", "a<|im_end|>"], "special token"),
        (["--inverse_penalty", "nan"], "must be a number above 0"),
        (["--split", "val"], "the val split is empty"),
    ):
        assert words in error_line(cli("qwen_probe.py", *common, *flags))
    assert not list(tmp_path.iterdir())


def test_a_class_that_was_not_shown_is_not_evaluated(probe, small):
    """Refused where its images are evaluated, and never answered where they are not."""
    flowers = open_flowers(small)
    train = flowers.splits["train"]
    splits = flowers.splits | {"train": train[flowers.labels[train] != 2]}
    fewer = SimpleNamespace(**vars(flowers) | {"splits": splits})
    config = SimpleNamespace(
        shots=None, val_shots=None, holdout=False, split="test", images=0, seed=0
    )
    config.chooses_penalty = False
    with pytest.raises(probe.UserError, match="ball moss has test images and no training image"):
        probe.choose_images(fewer, config)
    test = flowers.splits["test"]
    fewer.splits["test"] = test[flowers.labels[test] != 2]
    images = probe.choose_images(fewer, config)

    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(size=(len(flowers.labels), 4))).float()
    fitted = SimpleNamespace(features="vision", inverse_penalty=None)
    (weight, bias), _ = probe.fit_probe(lambda index: features[index], fewer, images, fitted)
    probabilities = (features @ weight.t() + bias).softmax(1)
    assert (probabilities[:, 2] == 0).all() and probabilities.isfinite().all()


def test_val_images_that_an_adapter_was_trained_on_choose_nothing(probe, small, tmp_path):
    flowers = open_flowers(small, holdout=True)
    val = flowers.splits["val"]
    files.write_json(tmp_path / "args.json", {"job": "qwen_train"})
    runs.write_trained_on(tmp_path, image_ids(flowers, val))
    config = SimpleNamespace(adapter=str(tmp_path), model="tiny", allow_overlap=False, split="test")
    images = probe.Images(flowers.splits["train"], val, flowers.splits["test"])
    with pytest.raises(probe.UserError, match=f"{len(val)} of the {len(val)} val images"):
        probe.check_overlap(config, flowers, images)
    nothing_chosen = probe.Images(images.train, val[:0], images.evaluated)
    assert probe.check_overlap(config, flowers, nothing_chosen) == 0
    config.allow_overlap = True
    assert probe.check_overlap(config, flowers, images) == 0


def test_a_killed_probe_is_begun_anew(tmp_path):
    config = {"job": "qwen_probe", "architecture": "tiny"}
    folder = runs.new_run(tmp_path, "killed", config, {})
    (folder / "trained_on.json").write_text("{}")
    assert runs.new_run(tmp_path, "killed", config, {}) == folder
    assert not (folder / "trained_on.json").exists()
    assert json.loads((folder / "args.json").read_text())["job"] == "qwen_probe"


@pytest.mark.usefixtures("without_pictures")
def test_the_grid_evaluates_what_was_trained(small, tmp_path, cli):
    """The commands of ablate.py, run here, where a new process would import all again."""
    flags = ["qwen", "--architecture", "tiny", "--data_root", small, "--runs", tmp_path]
    flags += ["--seeds", 1, "--rank", 4, "--shots", 2, "--protocol", "probe"]
    flags += ["--features", "vision", "--wandb", "disabled"]
    _, out, _ = cli("ablate.py", *flags, "--dry_run")
    lines = [shlex.split(line) for line in out.splitlines() if line.startswith("python ")]
    (training,) = [words for words in lines if words[1] == "qwen_train.py"]
    name = training[training.index("--name") + 1]

    with_adapter("tiny", tmp_path / name)
    args = {"job": "qwen_train", "model": "tiny", "architecture": "tiny", "name": name}
    args |= {"data_root": str(small), "splits": "swapped", "holdout": True, "answer": "brief"}
    args |= {"max_pixels": 262144, "images": 0, "seed": 1, "rank": 4, "alpha": 8.0, "shots": 2}
    files.write_json(tmp_path / name / "args.json", args | {"epochs": 24, "lr": 1e-3})
    files.write_json(tmp_path / name / "result.json", {"name": name, "train/loss": 1.0})
    flowers = open_flowers(small, holdout=True)
    train = select(flowers.splits["train"], flowers.labels, 6, shots=2, seed=1)
    runs.write_trained_on(tmp_path / name, image_ids(flowers, train))

    probes = [words[1:] for words in lines if words[1] == "qwen_probe.py"]
    assert len(probes) == 2
    for words in probes:
        code, _, err = cli(*words)
        assert code == 0, err
    compared, _ = comparable.resolve(comparable.load(tmp_path)[0])
    found = {run.method: run for run in compared}
    assert set(found) == {"linear (probe of vision)", "lora + linear (probe of prompt)"}
    assert len({run.protocol for run in compared}) == 1
    for method, run in found.items():
        assert run.settings.get("rank") == (4 if method.startswith("lora") else None)
        assert run.settings["shots"] == 2 and run.seed == 1
    # The probe of the tuned model is fitted to the very images of its training.
    probe_run = found["lora + linear (probe of prompt)"].folder
    assert files.read_json(probe_run / "trained_on.json")["images"] == sorted(
        image_ids(flowers, train)
    )
