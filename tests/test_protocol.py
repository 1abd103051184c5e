"""What an accuracy is the accuracy of: what an evaluation inherits from a run, images that a model
was trained on, the protocol beside every number, and the commands that the scripts print."""

import hashlib
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from conftest import ROOT, call, error_line, write_dataset
from sklearn.metrics import balanced_accuracy_score

from flowers import UserError, runs, tracking
from flowers.data import open_flowers
from flowers.files import read_json, write_json
from flowers.models import tokenize
from flowers.pixels import get_batch, load_pixels
from flowers.weights import load_model

TEMPLATE = "a photo of a {}, a type of flower."
OFFICIAL = ["--splits", "official", "--class_names", "openai", "--prompt_template", TEMPLATE]
QUICK = ["--architecture", "tiny", "--epochs", 1, "--shots", 3, "--batch_size", 12]
NO_WANDB = ["--wandb", "disabled"]


@pytest.fixture(scope="module")
def official(small, tmp_path_factory):
    """A run on the official splits with CLIP's names and prompt."""
    folder = tmp_path_factory.mktemp("runs")
    place = ["--data_root", small, "--runs", folder, "--name", "official"]
    call("train.py", *place, *QUICK, *OFFICIAL, *NO_WANDB)
    return folder / "official"


@pytest.fixture(scope="module")
def adapter(small, tmp_path_factory):
    """A run of qwen_train.py on the official splits."""
    folder = tmp_path_factory.mktemp("qwen")
    place = ["--data_root", small, "--runs", folder, "--name", "adapter", *NO_WANDB]
    size = ["--model", "tiny", "--epochs", 1, "--batch_size", 12, "--images", 12]
    call("qwen_train.py", *place, *size, "--splits", "official", "--class_names", "openai")
    return folder / "adapter"


@pytest.fixture
def evaluate_run(cli, tmp_path):
    """evaluate_run(model, *options) runs baseline_eval.py; its run is tmp_path / "eval"."""

    def run(model, *options):
        place = ["--runs", tmp_path, "--name", "eval", *NO_WANDB]
        return cli("baseline_eval.py", "--architecture", model, *place, *options)

    return run


def images_of(root: Path, *splits: str) -> set[str]:
    """The ids of the images that setid.mat lists, read with nothing of ours."""
    setid = scipy.io.loadmat(root / "setid.mat")
    ids = set()
    for split in splits:
        for number in setid[split][0]:
            content = (root / "jpg" / f"image_{number:05d}.jpg").read_bytes()
            ids.add(hashlib.sha256(content).hexdigest()[:16])
    return ids


# -----------------------------------------------------------------------------
# what an evaluation inherits


@pytest.mark.parametrize("file", ["", "model.pt"])
def test_an_evaluation_takes_over_what_the_run_was_trained_with(
    official, evaluate_run, tmp_path, file
):
    code, out, err = evaluate_run(official / file)
    assert code == 0, err
    assert f"taken over from {official}: --data_root=" in out and "--splits=official" in out
    trained = read_json(official / "args.json")
    evaluated = read_json(tmp_path / "eval" / "args.json")
    for key in ("data_root", "splits", "splits_path", "class_names", "prompt_template", "holdout"):
        assert evaluated[key] == trained[key], key
    assert evaluated["split_sizes"]["test"] == 24
    predictions = (official / "predictions.csv").read_bytes()
    assert (tmp_path / "eval" / "predictions.csv").read_bytes() == predictions


def test_prompts_that_are_typed_take_the_place_of_inherited_templates(
    official, evaluate_run, tmp_path
):
    names = read_json(official / "class_names.json")["names"]
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({name: [f"petals of a {name}"] for name in names}))
    code, out, err = evaluate_run(official, "--prompts", prompts)
    assert code == 0, err
    evaluated = read_json(tmp_path / "eval" / "args.json")
    assert evaluated["prompts"] == str(prompts) and evaluated["prompt_template"] is None
    assert "prompts.json" in read_json(tmp_path / "eval" / "result.json")["prompts"]


def test_what_is_typed_comes_before_what_is_inherited(official, small, evaluate_run, tmp_path):
    moved = shutil.copytree(small, tmp_path / "moved")
    options = ["--data_root", moved, "--prompt_template", "{}", "--class_names=oxford"]
    code, out, err = evaluate_run(official, *options)
    assert code == 0, err
    evaluated = read_json(tmp_path / "eval" / "args.json")
    assert evaluated["data_root"] == str(moved)
    assert evaluated["prompt_template"] == ["{}"]  # not beside the run's own
    assert evaluated["class_names"] == "oxford"
    assert evaluated["splits"] == "official"
    line = next(line for line in out.splitlines() if line.startswith("taken over"))
    assert shlex.split(line.partition(": ")[2]) == ["--splits=official"]


def test_a_holdout_is_inherited_and_test_stays_the_split(small, cli, evaluate_run, tmp_path):
    place = ["--data_root", small, "--runs", tmp_path, "--name", "held"]
    assert cli("train.py", *place, *QUICK, "--holdout", *NO_WANDB)[0] == 0
    assert runs.read_trained_on(tmp_path / "held") <= images_of(small, "tstid")
    code, _, err = evaluate_run(tmp_path / "held")
    assert code == 0, err
    evaluated = read_json(tmp_path / "eval" / "args.json")
    assert evaluated["holdout"] and evaluated["split"] == "test"
    assert evaluated["split_sizes"] == {"train": 24, "val": 12, "test": 12}
    result = read_json(tmp_path / "eval" / "result.json")
    assert result["overlap"] == 0


def test_a_run_keeps_its_own_head(small, cli, evaluate_run, tmp_path):
    """The template of a run with a linear head is no reason to replace the head by prompts."""
    place = ["--data_root", small, "--runs", tmp_path, "--name", "linear"]
    options = ["--strategy", "linear", "--architecture", "tiny", "--prompt_template", "a {}"]
    assert cli("train.py", *place, *options, *NO_WANDB)[0] == 0
    assert evaluate_run(tmp_path / "linear")[0] == 0
    predictions = (tmp_path / "linear" / "predictions.csv").read_bytes()
    assert (tmp_path / "eval" / "predictions.csv").read_bytes() == predictions
    for name in ("linear", "eval"):
        assert read_json(tmp_path / name / "result.json")["prompts"] == "none (a linear head)"


def test_a_model_that_no_run_made_inherits_nothing(official, small, evaluate_run, tmp_path):
    # An args.json of another program, and a folder that is called like a model.
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    shutil.copy(official / "model.pt", stranger)
    write_json(stranger / "args.json", {"data_root": "elsewhere", "splits": "official"})
    code, out, err = evaluate_run(stranger / "model.pt", "--data_root", small)
    assert code == 0, err
    assert "taken over" not in out
    assert "overlap" not in read_json(tmp_path / "eval" / "result.json")  # nothing is known
    assert runs.read_trained_on("tiny") is None


def test_damaged_arguments_are_said(official, evaluate_run, tmp_path):
    run = Path(shutil.copytree(official, tmp_path / "run"))
    (run / "args.json").write_text("{")
    assert "args.json is damaged" in error_line(evaluate_run(run))
    write_json(run / "args.json", read_json(official / "args.json") | {"splits": "none of ours"})
    code, _, err = evaluate_run(run)
    assert code == 2 and "invalid choice: 'none of ours'" in err


# -----------------------------------------------------------------------------
# images that were trained on


def test_a_run_lists_its_images(official, small):
    record = read_json(official / "trained_on.json")
    assert len(record["images"]) == 18  # three of each class
    assert record["images"] == sorted(record["images"])
    assert set(record["images"]) <= images_of(small, "trnid", "valid")
    assert runs.read_trained_on(official) == set(record["images"])


def test_training_images_are_refused(official, small, evaluate_run, cli, tmp_path):
    """Also through a link, in a copy of the dataset, and under other file names."""
    refused = "12 of the 12 test images were trained on"
    swapped = ["--splits", "swapped"]
    link = tmp_path / "best.pt"
    link.symlink_to(official / "model.pt")
    copy = shutil.copytree(small, tmp_path / "copy")
    place = ["--runs", tmp_path, "--name", "all", *NO_WANDB, "--data_root", small]
    size = ["--architecture", "tiny", "--epochs", 1, "--batch_size", 12]
    assert cli("train.py", *place, *size, "--splits", "official")[0] == 0
    link.unlink()
    link.symlink_to(tmp_path / "all" / "model.pt")

    for model in (tmp_path / "all", tmp_path / "all" / "model.pt", link):
        assert refused in error_line(evaluate_run(model, *swapped))
    assert refused in error_line(evaluate_run(link, *swapped, "--data_root", copy))
    options = ["--split", "val", "--holdout"]
    line = error_line(evaluate_run(link, *options))
    assert "12 of the 12 val images were trained on" in line and "--allow_overlap" in line
    assert not (tmp_path / "eval").exists()


def test_allowed_overlap_is_said_everywhere(official, evaluate_run, cli, tmp_path):
    shutil.copytree(official, tmp_path / "official")
    model = tmp_path / "official"
    expected = len(runs.read_trained_on(official) & images_of_test(official))
    assert 0 < expected < 12  # three of each class, of trnid and valid
    options = ["--splits", "swapped", "--allow_overlap"]
    code, out, err = evaluate_run(model, *options, "--compare", official, "--wise_ft", 0.5)
    assert code == 0, err
    assert f"TRAINED ON: {expected} of these images" in out
    row = next(line for line in out.splitlines() if line.startswith("trained on"))
    assert row.split() == ["trained", "on", str(expected), str(expected)]  # eval and its alpha
    assert read_json(tmp_path / "eval" / "result.json")["overlap"] == expected

    # In a table beside another run it is still said.
    place = ["--runs", tmp_path, "--name", "second", *NO_WANDB]
    compared = ["--compare", tmp_path / "eval"]
    code, out, _ = cli("baseline_eval.py", "--architecture", model, *place, *compared)
    assert code == 0 and f"TRAINED ON: {expected} of these images" in out

    # The report keeps it apart. A curve is no row of a table: evaluated without it.
    shutil.rmtree(tmp_path / "eval")
    assert evaluate_run(model, *options)[0] == 0
    code, out, err = cli("report.py", "--runs", tmp_path, "--output", tmp_path / "report")
    assert code == 0, err
    text = (tmp_path / "report" / "report.md").read_text()
    results = text.partition("## Results")[2].partition("\n## ")[0]
    headings = [line for line in results.splitlines() if line.startswith("### test")]
    assert len(headings) == 2
    assert ["TRAINED ON" in heading for heading in headings] == [False, True]
    assert f"eval {expected}" in text


def images_of_test(run: Path) -> set[str]:
    return images_of(Path(read_json(run / "args.json")["data_root"]), "trnid")


def test_the_training_split_is_evaluated_where_it_is_asked_for(official, evaluate_run, tmp_path):
    code, out, err = evaluate_run(official, "--split", "train")
    assert code == 0, err
    assert "TRAINED ON: 18 of these images" in out  # of 24: the run took three of each class
    assert read_json(tmp_path / "eval" / "result.json")["overlap"] == 18


def test_chains_add_up(official, small, cli, evaluate_run, tmp_path):
    """Also by way of a run between them, and for the weights between start and end."""
    place = ["--data_root", small, "--runs", tmp_path, *NO_WANDB]
    onwards = ["--epochs", 1, "--shots", 4, "--batch_size", 12]
    seen = len(runs.read_trained_on(official) & images_of(small, "trnid"))
    line = error_line(cli("train.py", *place, *onwards, "--architecture", official, "--name", "b"))
    assert f"{seen} of the 12 test images were trained on by {official}" in line
    assert not (tmp_path / "b").exists()

    allowed = ["--architecture", official, "--name", "b", "--allow_overlap"]
    code, out, err = cli("train.py", *place, *onwards, *allowed)
    assert code == 0 and f"TRAINED ON: {seen} of these images" in out, err
    assert read_json(tmp_path / "b" / "result.json")["overlap"] == seen
    chain = runs.read_trained_on(tmp_path / "b")
    assert chain > runs.read_trained_on(official)
    assert chain & images_of(small, "tstid")

    # The second run's own images are not in its test split, but the first run's are.
    n = len(chain & images_of(small, "trnid"))
    for options in ([], ["--wise_ft", 0]):
        line = error_line(evaluate_run(tmp_path / "b", *options))
        assert f"{n} of the 12 test images" in line
    n = len(chain & images_of(small, "tstid"))
    line = error_line(evaluate_run(tmp_path / "b", "--splits", "official"))
    assert f"{n} of the 24 test images" in line


def test_a_run_of_no_epochs_has_trained_on_nothing(small, cli, evaluate_run, tmp_path):
    place = ["--data_root", small, "--runs", tmp_path, "--name", "zero", *NO_WANDB]
    assert cli("train.py", *place, "--architecture", "tiny", "--epochs", 0)[0] == 0
    assert runs.read_trained_on(tmp_path / "zero") == set()
    assert evaluate_run(tmp_path / "zero", "--splits", "official")[0] == 0


def test_older_runs_are_judged_by_their_arguments(official, small, evaluate_run, tmp_path):
    data = shutil.copytree(small, tmp_path / "data")
    run = Path(shutil.copytree(official, tmp_path / "run"))
    expected = runs.read_trained_on(official)
    (run / "trained_on.json").unlink()
    stored = read_json(run / "args.json") | {"data_root": str(data)}
    del stored["allow_overlap"]
    write_json(run / "args.json", stored)
    assert runs.read_trained_on(run) == expected
    swapped = ["--splits", "swapped", "--data_root", small]
    assert "were trained on" in error_line(evaluate_run(run, *swapped))
    assert evaluate_run(run)[0] == 0

    # Another dataset at its place, or none.
    write_dataset(tmp_path / "other", per_class=4)
    for folder in (tmp_path / "other", tmp_path / "gone"):
        write_json(run / "args.json", stored | {"data_root": str(folder), "shots": 2})
        line = error_line(evaluate_run(run, *swapped))
        assert "can't be known which images" in line and "--allow_overlap" in line
        with pytest.raises(runs.UnknownImages):
            runs.read_trained_on(run)
    shutil.rmtree(tmp_path / "eval")
    code, out, err = evaluate_run(run, *swapped, "--allow_overlap")
    assert code == 0 and "TRAINED ON: unknown" in out, err
    assert read_json(tmp_path / "eval" / "result.json")["overlap"] == "unknown"

    # A run that starts from it does not know either, and keeps that in mind.
    child = tmp_path / "child"
    child.mkdir()
    runs.write_trained_on(child, ["a"], str(run))
    write_json(child / "args.json", {"job": "train"})
    with pytest.raises(runs.UnknownImages, match="can't be known"):
        runs.read_trained_on(child)


def test_a_damaged_list_is_not_believed(official, evaluate_run, tmp_path):
    run = Path(shutil.copytree(official, tmp_path / "run"))
    record = read_json(run / "trained_on.json")
    shorter = record | {"images": record["images"][1:]}
    for content in ("{", "{}", json.dumps(shorter), json.dumps(record | {"images": 5})):
        (run / "trained_on.json").write_text(content)
        line = error_line(evaluate_run(run))
        assert "trained_on.json is damaged" in line


def test_a_resumed_run_keeps_its_list(tmp_path):
    runs.write_trained_on(tmp_path, ["b", "a"])
    first = (tmp_path / "trained_on.json").read_bytes()
    runs.write_trained_on(tmp_path, ["c"])
    assert (tmp_path / "trained_on.json").read_bytes() == first


def test_a_picture_in_training_and_test_is_noticed(cli, tmp_path):
    """Under two names: a dataset that someone put together may hold it twice."""
    data = write_dataset(tmp_path / "data", per_class=4)
    setid = scipy.io.loadmat(data / "setid.mat")
    files = {split: f"image_{setid[split][0][0]:05d}.jpg" for split in ("trnid", "tstid")}
    shutil.copy(data / "jpg" / files["trnid"], data / "jpg" / files["tstid"])
    place = ["--data_root", data, "--runs", tmp_path, "--name", "twice", *NO_WANDB]
    size = ["--architecture", "tiny", "--epochs", 1, "--batch_size", 6]
    line = error_line(cli("train.py", *place, *size))
    assert "1 of the 6 test images are training images, too" in line
    code, out, err = cli("train.py", *place, *size, "--allow_overlap")
    assert code == 0 and "TRAINED ON: 1 of these images" in out, err


def test_images_that_are_known_in_another_way_are_not_compared_in_silence(
    official, small, evaluate_run, tmp_path
):
    run = Path(shutil.copytree(official, tmp_path / "run"))
    (run / "trained_on.json").unlink()
    runs.write_trained_on(run, ["oxford-flowers-102:00001"])
    code, _, err = evaluate_run(run, "--data_root", small)
    assert code == 0 and err.count("note: Oxford's images are known by number") == 1, err
    shutil.rmtree(tmp_path / "eval")
    code, _, err = evaluate_run(official, "--data_root", small)
    assert code == 0 and "known by number" not in err


def test_an_adapter_is_asked_too(adapter, small, cli, tmp_path):
    seen = len(runs.read_trained_on(adapter) & images_of(small, "trnid"))
    assert seen > 0
    place = ["--runs", tmp_path, "--name", "eval", *NO_WANDB]
    # adapter/ is what people upload and copy, and stands for its run where it lies in one
    for path in (adapter, adapter / "adapter"):
        options = ["--adapter", path, "--model", "tiny", "--splits", "swapped"]
        line = error_line(cli("qwen_eval.py", *options, *place))
        assert f"{seen} of the 12 test images were trained on" in line
    code, out, err = cli("qwen_eval.py", *options, *place, "--allow_overlap")
    assert code == 0 and f"TRAINED ON: {seen} of these images" in out, err
    result = read_json(tmp_path / "eval" / "result.json")
    assert result["overlap"] == seen and result["convention"] == "swapped"
    assert result["protocol"] == "rank"

    # An older adapter, without a list.
    older = Path(shutil.copytree(adapter, tmp_path / "older"))
    (older / "trained_on.json").unlink()
    assert runs.read_trained_on(older) == runs.read_trained_on(adapter)


# -----------------------------------------------------------------------------
# a number says what it is


def test_tables_and_results_say_their_protocol(official, evaluate_run, tmp_path):
    code, out, _ = evaluate_run(official, "--compare", official)
    assert code == 0
    for name in ("official", "eval"):
        line = next(line for line in out.splitlines() if line.startswith(f"{name}: "))
        for word in (
            "small, test (official splits), 24 images",
            "openai names",
            TEMPLATE,
            "official",
        ):
            assert word in line, word
    for folder in (official, tmp_path / "eval"):
        result = read_json(folder / "result.json")
        assert result["dataset"] == "small"
        assert result["split"] == "test" and result["convention"] == "official"
        assert result["images"] == 24 and result["class_names"] == "openai"
        assert result["prompts"] == f"'{TEMPLATE}'"
        assert str(official) in result["weights"]


def test_results_of_older_runs_stay_readable(official, evaluate_run, cli, tmp_path):
    older = Path(shutil.copytree(official, tmp_path / "older"))
    result = read_json(older / "result.json")
    for key in ("dataset", "split", "convention", "images", "prompts", "weights", "overlap"):
        del result[key]
    write_json(older / "result.json", result)
    code, out, err = evaluate_run(older, "--compare", older)
    assert code == 0, err
    line = next(line for line in out.splitlines() if line.startswith("older: "))
    assert "official splits" in line and TEMPLATE in line and "24 images" in line
    output = ["--output", tmp_path / "report", "--bootstrap", 10]
    code, _, err = cli("report.py", "--runs", tmp_path, *output)
    assert code == 0, err
    # And are compared with new ones of the same protocol.
    text = (tmp_path / "report" / "report.md").read_text()
    results = text.partition("## Results")[2].partition("\n## ")[0]
    assert results.count("### test") == 1


class Summary:
    """What tracking.py uses of a W&B run."""

    def __init__(self):
        self.summary = {}

    def log(self, metrics):
        pass

    def finish(self):
        pass


def test_the_summary_in_wandb_says_the_protocol(official, evaluate_run, monkeypatch):
    run = Summary()
    monkeypatch.setattr(tracking, "start_wandb", lambda *_: tracking.Tracker(run))
    assert evaluate_run(official)[0] == 0
    assert run.summary["convention"] == "official" and run.summary["images"] == 24
    assert run.summary["dataset"] == "small" and run.summary["overlap"] == 0


def test_the_protocol_of_clip_benchmark(small, cli, tmp_path):
    """The command of the docs gives what CLIP_benchmark's recipe gives, written out here."""
    command = next(
        line.strip()
        for line in (ROOT / "docs" / "training.md").read_text().splitlines()
        if "--class_names openai" in line
    )
    words = shlex.split(command)[1:]
    words[words.index("ViT-B/32")] = "tiny"
    place = ["--data_root", small, "--runs", tmp_path, "--name", "clip", *NO_WANDB]
    assert cli(*words, *place)[0] == 0
    result = read_json(tmp_path / "clip" / "result.json")

    torch.manual_seed(0)
    model = load_model("tiny")
    flowers = open_flowers(small, splits="official", class_names="openai")
    test = scipy.io.loadmat(small / "setid.mat")["tstid"][0]
    index = torch.tensor([int(number) - 1 for number in test])
    pixels = load_pixels(flowers, model.visual.input_resolution)
    names = ["rose", "lotus", "air plant", "tree mallow", "mallow", "globe flower"]
    prompts = [f"a photo of a {name}, a type of flower." for name in names]
    with torch.no_grad():
        images = model.encode_image(get_batch(pixels, index, torch.device("cpu")))
        texts = model.encode_text(tokenize(prompts))
    images = images / images.norm(dim=-1, keepdim=True)
    texts = texts / texts.norm(dim=-1, keepdim=True)
    predicted = (images @ texts.T).argmax(1).numpy()
    labels = scipy.io.loadmat(small / "imagelabels.mat")["labels"][0][test - 1].astype(int) - 1
    assert result["test/top1"] == pytest.approx(100 * np.mean(predicted == labels))
    per_class = balanced_accuracy_score(labels, predicted)
    assert result["test/mean_per_class"] == pytest.approx(100 * per_class)


# -----------------------------------------------------------------------------
# printed commands, run as they are printed


def next_command(out: str) -> list[str]:
    """The words of the last printed command, as a shell takes them, without `python`."""
    line = [line for line in out.splitlines() if "next: " in line][-1]
    python, *words = shlex.split(line.partition("next: ")[2])
    assert python == "python"
    return words


def test_the_next_commands_of_training_and_grids(small, cli, tmp_path):
    """In folders whose names a shell would split."""
    data = shutil.copytree(small, tmp_path / "my data")
    folder = tmp_path / "my runs"
    captions = tmp_path / "my captions.jsonl"
    with captions.open("w") as file:
        for picture in open_flowers(data).files:
            file.write(f'{{"file": "{picture.name}", "captions": ["{picture.stem}"]}}\n')
    place = ["--data_root", data, "--runs", folder, *NO_WANDB]

    options = ["--splits", "official", "--captions", captions, "--holdout", "--name", "a b"]
    code, out, err = cli("train.py", *place, *QUICK, *options)
    assert code == 0, err
    words = next_command(out)
    assert words[0] == "baseline_eval.py"
    code, _, err = cli(*words)
    assert code == 0, err
    [again] = folder.glob("a b-eval-*")
    first = read_json(folder / "a b" / "result.json")
    second = read_json(again / "result.json")
    # The temperature is fitted by the training alone.
    fitted = "val/nll_calibrated"
    metrics = [key for key in first if key.startswith("val/") and key != fitted]
    assert "val/caption_i2t_R@1" in metrics
    assert {key: second[key] for key in metrics} == {key: first[key] for key in metrics}

    # ablate.py, then report.py, then what is missing in the report
    model = ["--architecture", folder / "a b", "--epochs", 1, "--shots", 2, "--seeds", 0]
    grid = ["ablate.py", "augment", *place, *model, "--splits", "official"]
    code, out, err = cli(*grid)
    assert code == 0, err
    words = next_command(out)
    assert words == ["report.py", "--runs", str(folder)]
    code, out, err = cli(*words, "--output", tmp_path / "report", "--bootstrap", 10)
    assert code == 0, err
    words = next_command(out)
    assert words[:2] == ["ablate.py", "factorial"] and str(data) in words
    assert words[-2:] == ["--runs", str(folder)]
    code, _, err = cli(*words, "--dry_run")  # nine architectures of OpenAI's
    assert code == 0, err


def test_the_next_commands_of_qwen(small, cli, tmp_path):
    data = shutil.copytree(small, tmp_path / "my data")
    place = ["--data_root", data, "--runs", tmp_path / "my runs", *NO_WANDB]
    tiny = ["--model", "tiny", "--splits", "official", "--class_names", "openai", "--images", 12]
    describe = ["--describe", "--split", "train", "--most_tokens", 4, "--holdout"]
    code, out, err = cli("qwen_eval.py", *place, *tiny, *describe, "--name", "words")
    assert code == 0, err

    # Random weights may write nothing: as captions, sentences take the place of what they wrote.
    captions = tmp_path / "my runs" / "words" / "descriptions.jsonl"
    rows = [json.loads(line) for line in captions.read_text().splitlines()]
    captions.write_text("".join(json.dumps(row | {"captions": ["a disc"]}) + "\n" for row in rows))
    words = next_command(out)
    assert words[0] == "qwen_train.py"
    code, out, err = cli(*words, "--epochs", 1, "--batch_size", 12, "--name", "my adapter")
    assert code == 0, err
    stored = read_json(tmp_path / "my runs" / "my adapter" / "args.json")
    assert stored["splits"] == "official" and stored["class_names"] == "openai"
    assert stored["holdout"] and stored["images"] == 12 and stored["model"] == "tiny"

    words = next_command(out)
    assert words[0] == "qwen_eval.py"
    code, out, err = cli(*words, "--images", 4, "--most_tokens", 4, "--name", "eval")
    assert code == 0, err
    stored = read_json(tmp_path / "my runs" / "eval" / "args.json")
    assert stored["splits"] == "official" and stored["class_names"] == "openai"
    assert stored["data_root"] == str(data) and stored["holdout"]


def test_a_command_is_quoted_for_the_shell():
    flags = {"a": "x y", "b": None, "c": True, "d": False, "e": ["1", "-2"], "f": 0.5}
    line = runs.command_line("train.py", flags)
    assert line == "python train.py --a 'x y' --c --e 1 --e=-2 --f 0.5"


def test_a_user_s_run_folder_is_no_other_run_s(tmp_path):
    """A folder without args.json beside a run is not that run."""
    write_json(tmp_path / "args.json", {"job": "train"})
    (tmp_path / "folder").mkdir()
    assert runs.run_folder(tmp_path / "folder") is None
    assert runs.run_folder(tmp_path / "missing.pt") is None
    (tmp_path / "adapter").mkdir()
    assert runs.run_folder(tmp_path / "adapter") == tmp_path
    (tmp_path / "args.json").write_text("[]")
    with pytest.raises(UserError, match="damaged"):
        runs.run_folder(tmp_path)
