"""Soups: the mean of the weights of runs from one start, kept as a model with a known past."""

import json
import shutil

import clip
import pytest
import torch
from conftest import call, error_line

from flowers import UserError, evaluate, models, runs
from flowers.choices import KEEPS_WEIGHTS
from flowers.data import image_ids, open_flowers
from flowers.files import load_tensors, read_json, write_json

NO_WANDB = ["--wandb", "disabled"]


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    """Two runs `a` and `b` of one step from one file of weights, and their soup."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(1)
    torch.save(models.build("tiny").state_dict(), folder / "start.pt")
    place = ["--data_root", small, "--runs", folder, *NO_WANDB]
    common = ["--architecture", folder / "start.pt", "--epochs", 1, "--shots", 2]
    common += ["--batch_size", 12, "--lr", 1e-3]
    call("train.py", *place, *common, "--name", "a")
    call("train.py", *place, *common, "--name", "b", "--strategy", "lora", "--seed", 1)
    soup = ["--soup", folder / "a", folder / "b" / "model.pt"]
    call("baseline_eval.py", *soup, "--runs", folder, "--name", "soup", *NO_WANDB)
    return folder


@pytest.fixture
def evaluation(cli, tmp_path):
    """evaluation(*options) runs baseline_eval.py; its run is tmp_path / "eval"."""

    def run(*options):
        place = ["--runs", tmp_path, "--name", "eval", *NO_WANDB]
        return cli("baseline_eval.py", *place, *options)

    return run


@pytest.fixture
def changed(folder, tmp_path):
    """changed(**settings) is a copy of run b with other arguments; None removes one."""

    def copy(**settings):
        run = tmp_path / f"changed{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folder / "b", run)
        arguments = read_json(run / "args.json") | settings
        kept = {key: value for key, value in arguments.items() if value is not None}
        write_json(run / "args.json", kept)
        return str(run)

    return copy


# -----------------------------------------------------------------------------
# the mean


def test_the_mean_of_weights():
    start = models.build("tiny-rn").state_dict()
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        noise = {name: weight + torch.randn_like(weight.float()) for name, weight in start.items()}
        states.append(noise)
    counts = [name for name in start if name.endswith("num_batches_tracked")]
    assert counts and any(name.endswith("running_var") for name in start)
    for i, state in enumerate(states):
        state |= {name: torch.tensor(i + 5) for name in counts}
    before = {name: weight.clone() for name, weight in states[0].items()}
    mean = evaluate.mean_weights(iter(states))
    assert mean.keys() == start.keys()
    for name, weight in mean.items():
        assert torch.equal(states[0][name], before[name]), "what is averaged stays as it was"
        if name in counts:
            assert weight == 5
            continue
        expected = sum(state[name] for state in states) / 3
        assert weight.dtype == torch.float32
        assert torch.allclose(weight, expected, atol=1e-6), name

    other = models.build("tiny").state_dict()
    with pytest.raises(UserError, match="different shapes"):
        evaluate.mean_weights([start, other])


def test_a_soup_is_the_mean_and_a_model_of_its_own(folder, small, evaluation, tmp_path):
    soup = folder / "soup"
    a, b, mean = (load_tensors(folder / name / "model.pt") for name in ("a", "b", "soup"))
    assert mean.keys() == a.keys() == b.keys()
    assert not torch.equal(a["visual.conv1.weight"], b["visual.conv1.weight"])
    for name in mean:
        assert torch.allclose(mean[name], (a[name] + b[name]) / 2, atol=1e-7), name
    stock, _ = clip.load(str(soup / "model.pt"), device="cpu")
    # It computes in half precision.
    assert torch.allclose(stock.visual.conv1.weight, mean["visual.conv1.weight"], atol=1e-4)

    settings = read_json(soup / "args.json")
    assert settings["job"] == "eval"
    assert settings["soup"] == [str(folder / "a"), str(folder / "b" / "model.pt")]
    assert settings["architecture"] == str(folder / "start.pt")
    assert settings["start"] == read_json(folder / "a" / "args.json")["start"]
    weights = read_json(soup / "result.json")["weights"]
    assert weights.startswith("a soup of ") and all(path in weights for path in settings["soup"])
    assert runs.read_class_names(soup) == runs.read_class_names(folder / "a")

    # It is evaluated like any run, and lies between start and end of a line of its own.
    options = ["--wise_ft", 0, "--wise_ft", 1]
    code, out, err = evaluation("--architecture", soup, *options)
    assert code == 0 and f"taken over from {soup}: --data_root={small}" in out, err
    assert "model.pt does not say" not in err
    predictions = (soup / "predictions.csv").read_bytes()
    assert (tmp_path / "eval" / "predictions.csv").read_bytes() == predictions
    start = load_tensors(folder / "start.pt")
    of_soup = evaluate.load_starting_weights(str(soup))
    assert all(torch.equal(weight, start[name]) for name, weight in of_soup.items())
    assert "a soup of 2 runs from" in read_json(tmp_path / "eval" / "result.json")["weights"]


def test_a_soup_names_pictures(folder, small, cli, tmp_path):
    picture = small / "jpg" / "image_00001.jpg"
    options = ["--architecture", folder / "soup", "--json", tmp_path / "names.json"]
    code, out, err = cli("predict.py", picture, *options)
    assert code == 0 and "names of the run" in out, err
    names = read_json(tmp_path / "names.json")["class_names"]
    assert names == runs.read_class_names(folder / "a")


# -----------------------------------------------------------------------------
# images that were trained on


def test_the_images_of_all_runs_are_known(folder, small, evaluation):
    a, b, both = (runs.read_trained_on(folder / name) for name in ("a", "b", "soup"))
    assert both == a | b and len(both) > max(len(a), len(b))
    assert runs.run_folder(folder / "soup" / "model.pt") == folder / "soup"

    flowers = open_flowers(small, splits="official")
    seen = len(both & set(image_ids(flowers, flowers.splits["test"])))
    assert seen > max(
        len(part & set(image_ids(flowers, flowers.splits["test"]))) for part in (a, b)
    )
    for model in (["--soup", folder / "a", folder / "b"], ["--architecture", folder / "soup"]):
        line = error_line(evaluation(*model, "--splits", "official"))
        assert f"{seen} of the 24 test images were trained on" in line


def test_a_run_whose_images_are_unknown_makes_those_of_the_soup_unknown(folder, tmp_path):
    damaged = shutil.copytree(folder / "b", tmp_path / "damaged")
    (damaged / "trained_on.json").write_text("{")
    (tmp_path / "soup").mkdir()
    runs.write_trained_on(tmp_path / "soup", [], folder / "a", damaged)
    write_json(tmp_path / "soup" / "args.json", {"job": "eval", "soup": ["a", "damaged"]})
    with pytest.raises(runs.UnknownImages):
        runs.read_trained_on(tmp_path / "soup")


def test_the_images_of_a_soup_are_known_wherever_it_lies(folder, tmp_path):
    """Its own list, or those of its runs; where neither is left, it is unknown and not none."""
    both = runs.read_trained_on(folder / "soup")
    moved = shutil.copytree(folder / "soup", tmp_path / "moved")
    (tmp_path / "link.pt").symlink_to(moved / "model.pt")
    for model in (moved, moved / "model.pt", tmp_path / "link.pt"):
        assert runs.read_trained_on(model) == both
    (moved / "trained_on.json").unlink()
    assert runs.read_trained_on(moved) == both  # of its runs
    settings = read_json(moved / "args.json")
    settings["soup"][1] = str(tmp_path / "gone")
    write_json(moved / "args.json", settings)
    with pytest.raises(runs.UnknownImages, match="gone, which it was made from, is gone"):
        runs.read_trained_on(moved)
    # One that has lost its arguments.
    lost = shutil.copytree(folder / "soup", tmp_path / "lost")
    (lost / "args.json").unlink()
    assert runs.read_trained_on(lost / "model.pt") == both


def test_a_run_whose_start_is_gone_has_seen_unknown_images(folder, tmp_path):
    older = shutil.copytree(folder / "a", tmp_path / "older")
    (older / "trained_on.json").unlink()
    assert runs.read_trained_on(older) == runs.read_trained_on(folder / "a")
    settings = read_json(older / "args.json") | {"architecture": str(tmp_path / "runs" / "start")}
    write_json(older / "args.json", settings)
    with pytest.raises(runs.UnknownImages, match="is gone"):
        runs.read_trained_on(older)


def test_weights_outside_of_a_run_are_said_to_be_unknown(folder, small, tmp_path, capsys):
    shutil.copy(folder / "soup" / "model.pt", tmp_path / "copied.pt")
    flowers = open_flowers(small, splits="official")
    index = flowers.splits["test"]
    assert runs.check_overlap([tmp_path / "copied.pt"], flowers, index, "test", False) is None
    assert f"no run here made {tmp_path / 'copied.pt'}" in capsys.readouterr().err
    assert runs.check_overlap(["tiny"], flowers, index, "test", False) is None
    assert capsys.readouterr().err == ""


def test_what_a_killed_soup_left_is_no_model_of_the_next_evaluation(tmp_path):
    config = {"job": "eval", "architecture": "tiny"}
    folder = runs.new_run(tmp_path, "killed", config | {"soup": ["a", "b"]}, {})
    for name in ("model.pt", "trained_on.json"):
        (folder / name).write_text("")
    runs.new_run(tmp_path, "killed", config, {})
    assert [path.name for path in folder.iterdir()] == ["args.json"]
    # A user's own file is in no run: it stays, and no run is begun beside it.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.pt").write_text("")
    with pytest.raises(UserError, match="of something else"):
        runs.new_run(tmp_path, "mine", config, {})
    assert (tmp_path / "mine" / "model.pt").exists()


# -----------------------------------------------------------------------------
# what is no soup


def test_runs_that_have_no_mean_are_refused(folder, changed, tmp_path):
    a, b = str(folder / "a"), str(folder / "b")

    def refused(*soup):
        with pytest.raises(UserError) as error:
            evaluate.check_soup(soup)
        return str(error.value)

    assert "at least two" in refused(a)
    assert "is there twice" in refused(a, b, str(folder / "a" / "model.pt"))
    assert "no run of train.py" in refused(a, str(tmp_path / "missing"))
    assert "no run of train.py" in refused("tiny", "tiny-rn")
    assert "started from other weights" in refused(a, changed(start="0" * 64))
    for strategy in KEEPS_WEIGHTS:
        assert "leaves the weights as they were" in refused(a, changed(strategy=strategy))
    assert "is a soup already" in refused(a, str(folder / "soup"))
    unfinished = changed()
    (tmp_path / unfinished / "result.json").unlink()
    assert "is not finished" in refused(a, unfinished)


def test_an_older_run_has_its_start_derived(folder, changed, tmp_path):
    a = str(folder / "a")
    assert evaluate.check_soup([a, changed(start=None)])["start"]
    other = tmp_path / "other.pt"
    torch.save(models.build("tiny").state_dict(), other)
    for start, reason in ((other, "started from other weights"), ("gone.pt", "no model gone.pt")):
        with pytest.raises(UserError, match=reason):
            evaluate.check_soup([a, changed(start=None, architecture=str(start))])


def test_a_soup_on_the_command_line(folder, changed, evaluation, tmp_path):
    a, b = folder / "a", folder / "b"
    code, _, err = evaluation("--soup", a, b, "--architecture", tmp_path / "model.pt")
    assert code == 2 and "not allowed with argument" in err
    assert "at least two" in error_line(evaluation("--soup", a))
    disagreeing = changed(class_names="openai")
    line = error_line(evaluation("--soup", a, disagreeing))
    assert "were trained with different --class_names" in line
    # Where it is said, they need not agree.
    code, _, err = evaluation("--soup", a, disagreeing, "--class_names", "oxford")
    assert code == 0, err
    assert json.loads((tmp_path / "eval" / "args.json").read_text())["class_names"] == "oxford"
