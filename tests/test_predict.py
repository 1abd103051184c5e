"""predict.py: the names that a run gives to any picture, and what it refuses."""

import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import NAMES, ROOT, error_line
from PIL import Image

from flowers import UserError, images
from flowers.sample.kinds import KINDS

TEMPLATE = "a drawing of a {}"


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    """A run of four epochs on the small dataset, with a template of its own."""
    folder = tmp_path_factory.mktemp("runs")
    options = ["--data_root", small, "--architecture", "tiny", "--epochs", 4, "--batch_size", 12]
    options += ["--prompt_template", TEMPLATE, "--runs", folder, "--name", "run"]
    command = [sys.executable, ROOT / "train.py", *options, "--wandb", "disabled"]
    subprocess.run([str(part) for part in command], check=True)
    return folder / "run"


@pytest.fixture
def copy(run, tmp_path):
    """The run in another place, to be changed."""
    return shutil.copytree(run, tmp_path / "copy")


@pytest.fixture
def predict(cli, run, small, tmp_path):
    """predict(*options) names a picture or those that are given; returns exit code, out, err, JSON.

    The first option may be another run than `run`.
    """

    def predict_with(*pictures, architecture=run, options=()):
        pictures = pictures or (small / "jpg" / "image_00001.jpg",)
        out_file = tmp_path / "out.json"
        out_file.unlink(missing_ok=True)
        place = ("--architecture", architecture, "--json", out_file)
        outcome = cli("predict.py", *pictures, *place, *options)
        results = json.loads(out_file.read_text()) if out_file.exists() else None
        return *outcome, results

    return predict_with


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def refused(outcome):
    """The error line of what `predict` returns, where nothing was predicted."""
    assert outcome[3] is None
    return error_line(outcome[:3])


# -----------------------------------------------------------------------------
# predictions


def test_pictures_of_the_dataset_get_the_answers_of_the_run(small, run, cli, tmp_path):
    """In a folder of their own, with the dataset out of the way: a run is all that it takes."""
    expected = {row["file"]: row for row in rows_of(run / "predictions.csv")}
    (tmp_path / "pictures").mkdir()
    for name in expected:
        shutil.copy(small / "jpg" / name, tmp_path / "pictures")
    copy = shutil.copytree(run, tmp_path / "elsewhere")
    args = json.loads((copy / "args.json").read_text())
    (copy / "args.json").write_text(json.dumps(args | {"data_root": "/gone"}))

    options = ("--csv", tmp_path / "new" / "out.csv", "--sheet", tmp_path / "sheet.png")
    pictures = tmp_path / "pictures"
    code, out, err = cli("predict.py", pictures, "--architecture", copy / "model.pt", *options)
    assert code == 0, err
    rows = rows_of(tmp_path / "new" / "out.csv")
    assert len(rows) == len(expected)
    for row in rows:
        wanted = expected[row["file"].removeprefix(f"{pictures}/")]
        for place in range(1, 6):
            assert row[f"top{place}"] == wanted[f"top{place}"]
            score, wanted_score = float(row[f"score{place}"]), float(wanted[f"score{place}"])
            assert score == pytest.approx(wanted_score, abs=1e-4)
        # And the same in what is printed: a block a picture, best first.
        block = out.split(f"\n{row['file']}\n")[1].split("\n\n")[0].splitlines()
        assert [line.split("%  ")[1] for line in block] == [row[f"top{i}"] for i in range(1, 6)]
        assert float(block[0].split("%")[0]) == pytest.approx(100 * float(row["score1"]), abs=0.06)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG" and min(sheet.size) > 300


def test_the_template_is_that_of_the_run_unless_told_otherwise(predict):
    *_, results = predict()
    assert results["prompt_template"] == [TEMPLATE] and results["class_names"] == NAMES
    *_, results = predict(options=("--prompt_template", "{}", "--top", 2))
    assert results["prompt_template"] == ["{}"]
    assert len(results["pictures"][0]["predictions"]) == 2
    *_, results = predict(options=("--top", 99))
    predictions = results["pictures"][0]["predictions"]
    assert sorted(row["name"] for row in predictions) == sorted(NAMES)
    assert sum(row["probability"] for row in predictions) == pytest.approx(1, abs=1e-5)


def test_a_run_of_a_prompts_file_names_by_its_sentences(copy, predict, tmp_path):
    prompts = tmp_path / "prompts.json"
    sentences = {name: [f"a {name} in the sun", f"the petals of a {name}"] for name in NAMES}
    prompts.write_text(json.dumps(sentences))
    *_, by_template = predict()
    *_, by_flag = predict(options=("--prompts", prompts))
    assert by_flag["prompt_template"] is None
    assert by_flag["pictures"] != by_template["pictures"]

    args = json.loads((copy / "args.json").read_text())
    args |= {"prompts": str(prompts), "prompt_template": None}
    (copy / "args.json").write_text(json.dumps(args))
    code, _, err, by_run = predict(architecture=copy)
    assert code == 0, err
    assert by_run["pictures"] == by_flag["pictures"]
    *_, typed = predict(architecture=copy, options=("--prompt_template", TEMPLATE))
    assert typed["pictures"] == by_template["pictures"]

    prompts.unlink()
    assert str(prompts) in refused(predict(architecture=copy))
    both = ("--prompts", prompts, "--prompt_template", TEMPLATE)
    assert "give one of them" in refused(predict(options=both))


def test_a_model_without_a_run_chooses_among_oxford_s_names_and_says_so(predict):
    code, out, err, results = predict(architecture="tiny")
    assert code == 0 and "102 names of Oxford Flowers" in out and "untrained" in err
    assert len(results["class_names"]) == 102 and "snapdragon" in results["class_names"]
    assert results["prompt_template"] == ["an image of the {} flower"]


# -----------------------------------------------------------------------------
# names


@pytest.mark.parametrize(
    "file, content",
    [
        ("a.txt", "\ufefftulip\r\n\r\nfield poppy \r\nrose\r\n"),
        ("a.json", '["tulip", "field poppy", "rose"]'),
        ("a.txt", '["tulip", "field poppy", "rose"]'),
        ("a.json", '\ufeff{"10": "rose", "2": "field poppy", "1": "tulip"}'),
    ],
)
def test_names_of_one_s_own(predict, tmp_path, file, content):
    (tmp_path / file).write_text(content, encoding="utf-8", newline="")
    code, out, err, results = predict(options=("--names", tmp_path / file))
    assert code == 0, err
    assert results["class_names"] == ["tulip", "field poppy", "rose"]
    assert results["prompt_template"] == [TEMPLATE]
    assert f"3 names of {tmp_path / file}" in out


@pytest.mark.parametrize(
    "content, problem",
    [
        ("rose\n", "at least two"),
        ("rose\nlily\nrose\n", "twice"),
        ('{"rose": ["petals"], "lily": ["leaves"]}', "can't be read as names"),
        ('{"1": 5, "2": 6}', "no text"),
        ('["rose", "lily"', "can't be read as names"),
        (b"ros\xe9\nlily\n", "can't be read as names"),
    ],
)
def test_names_that_are_refused(predict, tmp_path, content, problem):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "names.txt").write_bytes(data)
    assert problem in refused(predict(options=("--names", tmp_path / "names.txt")))


def train(cli, small, tmp_path, strategy):
    options = ("--strategy", strategy, "--architecture", "tiny", "--epochs", 1, "--batch_size", 12)
    place = ("--data_root", small, "--runs", tmp_path, "--name", strategy, "--wandb", "disabled")
    code, _, err = cli("train.py", *place, *options)
    assert code == 0, err
    (tmp_path / "names.txt").write_text("tulip\nfield poppy\n")
    return tmp_path / strategy


def test_a_linear_head_knows_its_own_classes_only(cli, predict, small, tmp_path):
    linear = train(cli, small, tmp_path, "linear")
    names = ("--names", tmp_path / "names.txt")
    answers = {row["file"]: row["top1"] for row in rows_of(linear / "predictions.csv")}
    *_, results = predict(*[small / "jpg" / name for name in answers], architecture=linear)
    assert [p["predictions"][0]["name"] for p in results["pictures"]] == list(answers.values())

    assert "linear head" in refused(predict(architecture=linear, options=names))
    # Prompts that the user gives come before the head.
    by_prompts = (*names, "--prompt_template", "{}")
    assert predict(architecture=linear, options=by_prompts)[0] == 0

    # Its names are in classifier.pt too, as older runs have them; without, it is no whole run.
    (linear / "class_names.json").unlink()
    (linear / "predictions.csv").unlink()
    assert predict(architecture=linear)[3]["class_names"] == NAMES
    (linear / "classifier.pt").unlink()
    (linear / "class_names.json").write_text(json.dumps({"names": NAMES}))
    assert "classifier.pt" in refused(predict(architecture=linear))


def test_a_learned_prompt_takes_new_names(cli, predict, small, tmp_path):
    learned = train(cli, small, tmp_path, "prompt")
    *_, results = predict(architecture=learned, options=("--names", tmp_path / "names.txt"))
    assert results["class_names"] == ["tulip", "field poppy"]
    assert results["prompt_template"][0].startswith("[V] [V]")
    before = results["pictures"][0]["predictions"][0]["probability"]

    # The vectors matter: it is not the template with placeholders alone.
    classifier = torch.load(learned / "classifier.pt", weights_only=True)
    classifier["context"] = classifier["context"].roll(1, dims=1)
    torch.save(classifier, learned / "classifier.pt")
    *_, results = predict(architecture=learned, options=("--names", tmp_path / "names.txt"))
    assert results["pictures"][0]["predictions"][0]["probability"] != pytest.approx(before)
    (learned / "classifier.pt").unlink()
    assert "classifier.pt" in refused(predict(architecture=learned))


def change_predictions(run, names):
    """Rewrite predictions.csv so that it names all of `names`."""
    rows = [f"image_{i:05d}.jpg,{name},{name},0.9\n" for i, name in enumerate(names, 1)]
    (run / "predictions.csv").write_text("file,label,top1,score1\n" + "".join(rows))


def test_the_names_of_a_run_without_class_names_json(predict, copy, small, tmp_path):
    """Runs of before: from the dataset, or from a list that predictions.csv has whole."""
    (copy / "class_names.json").unlink()
    assert predict(architecture=copy)[3]["class_names"] == NAMES

    # Another dataset lies there now.
    change_predictions(copy, ["rose", "gone"])
    assert "--names" in refused(predict(architecture=copy))
    # The sample, and what is no whole list of it.
    change_predictions(copy, KINDS)
    assert predict(architecture=copy)[3]["class_names"] == list(KINDS)
    change_predictions(copy, list(KINDS)[1:])
    assert "--names" in refused(predict(architecture=copy))
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    assert predict(architecture=copy, options=("--names", tmp_path / "names.txt"))[0] == 0

    (copy / "class_names.json").write_text('{"names": 3}')
    assert "damaged" in refused(predict(architecture=copy))


# -----------------------------------------------------------------------------
# files


def test_folders_are_searched_and_broken_files_named(predict, small, tmp_path):
    source = small / "jpg" / "image_00001.jpg"
    folder = tmp_path / "holiday"
    for name in ("b.JPG", "deep/deeper/a.jpeg", ".hidden.jpg", "._b.JPG", ".cache/c.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / name)
    (folder / "__MACOSX").mkdir()
    shutil.copy(source, folder / "__MACOSX" / "b.jpg")
    (folder / "notes.txt").write_text("no picture")
    code, _, _, results = predict(folder, folder / "b.JPG")
    found = [picture["file"] for picture in results["pictures"]]
    assert code == 0 and found == [str(folder / "b.JPG"), str(folder / "deep/deeper/a.jpeg")]

    # A cut and an empty file, and a page that a server sent instead of a picture.
    (folder / "cut.jpg").write_bytes(source.read_bytes()[:900])
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.webp").write_text("<html>404</html>")
    code, out, err, results = predict(folder)
    assert error_line((code, out, err)) == "error: 3 of 5 pictures can't be read"
    assert [picture["file"] for picture in results["pictures"]] == found
    assert len(results["passed_over"]) == 3
    for name in ("cut.jpg", "empty.png", "page.webp"):
        assert err.count(f"{folder / name} can't be decoded") == 1

    broken = folder / "empty.png", folder / "page.webp"
    assert "none of 2" in refused(predict(*broken))
    outcome = predict(broken[0])
    assert "can't be decoded" in refused(outcome) and "passed over" not in outcome[2]


def test_a_name_that_is_no_utf_8(cli, run, small, tmp_path):
    picture = os.fsencode(tmp_path) + b"/ros\xe9.jpg"  # Latin-1, as on an old disk
    try:
        shutil.copy(os.fsencode(small / "jpg" / "image_00001.jpg"), picture)
    except OSError:
        pytest.skip("this disk takes UTF-8 only")
    options = ("--csv", tmp_path / "out.csv", "--sheet", tmp_path / "sheet.png")
    code, out, err = cli("predict.py", os.fsdecode(picture), "--architecture", run, *options)
    assert code == 0, err
    assert rows_of(tmp_path / "out.csv")[0]["file"].endswith(r"ros\udce9.jpg")
    assert r"ros\udce9.jpg" in out


def test_mistakes_end_with_one_line(predict, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no pictures in it" in refused(predict(tmp_path / "empty"))
    assert "no picture or folder" in refused(predict(tmp_path / "none.jpg"))
    assert ".png" in refused(predict(options=("--sheet", tmp_path / "a.jpg")))
    assert "--top" in refused(predict(options=("--top", 0)))
    assert "is a folder" in refused(predict(options=("--csv", tmp_path)))
    (tmp_path / "file").touch()
    assert "is no folder" in refused(predict(options=("--csv", tmp_path / "file" / "a.csv")))
    new = ("--csv", tmp_path / "new" / "a.csv", "--sheet", tmp_path / "new" / "b" / "a.png")
    assert "no picture or folder" in refused(predict(tmp_path / "none.jpg", options=new))
    assert not (tmp_path / "new").exists(), "a mistake leaves nothing"
    assert "no names at" in refused(predict(options=("--names", tmp_path / "none.txt")))


# -----------------------------------------------------------------------------
# formats


@pytest.fixture(scope="module")
def picture():
    """(40, 60, 3) uint8: three grey levels and a colour, in blocks, so that coding keeps them."""
    array = np.zeros((40, 60, 3), np.uint8)
    array[:20, :30] = (200, 40, 80)
    array[20:, :30] = 120
    array[20:, 30:] = 255
    return array


def test_formats_without_loss(picture, tmp_path):
    image = Image.fromarray(picture)
    for suffix in (".png", ".bmp", ".tif", ".ppm", ".tga", ".qoi"):
        image.save(tmp_path / f"a{suffix}")
    image.save(tmp_path / "a.webp", lossless=True)
    image.quantize(8).save(tmp_path / "palette.png")
    # Only the first picture of one that moves.
    image.quantize(8).save(tmp_path / "a.gif", save_all=True, append_images=[image.rotate(180)])
    for file in sorted(tmp_path.iterdir()):
        assert np.array_equal(images.read_picture(file), picture), file.name


def test_jpegs(picture, tmp_path):
    image = Image.fromarray(picture)
    image.save(tmp_path / "a.jpg", quality=95, subsampling=0)
    assert np.array_equal(
        images.read_picture(tmp_path / "a.jpg"), images.read_rgb(tmp_path / "a.jpg")
    )
    # A telephone held upright writes the rows of its sensor and how to turn them: 6, to the right.
    exif = Image.Exif()
    exif[0x0112] = 6
    sensor = np.rot90(picture)  # to the left
    Image.fromarray(sensor).save(tmp_path / "turned.jpg", quality=95, subsampling=0, exif=exif)
    turned = images.read_picture(tmp_path / "turned.jpg")
    assert turned.shape == picture.shape
    assert abs(turned.astype(int) - picture)[4:16, 4:26].max() < 6
    # For print.
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    cmyk = images.read_picture(tmp_path / "cmyk.jpg")
    assert abs(cmyk.astype(int) - picture)[4:16, 4:26].max() < 6


def test_transparency_lies_on_white(picture, tmp_path):
    alpha = np.full(picture.shape[:2], 255, np.uint8)
    alpha[:, 30:] = 0  # black and white under it
    alpha[20:, :30] = 51  # a fifth of grey 120
    expected = picture.copy()
    expected[:, 30:] = 255
    expected[20:, :30] = round(0.2 * 120 + 0.8 * 255)
    rgba = Image.fromarray(np.dstack([picture, alpha]))
    rgba.save(tmp_path / "a.png")
    rgba.save(tmp_path / "a.webp", lossless=True, exact=True)
    for name in ("a.png", "a.webp"):
        assert np.array_equal(images.read_picture(tmp_path / name), expected), name

    rgba.convert("LA").save(tmp_path / "grey.png")
    grey = images.read_picture(tmp_path / "grey.png")
    assert (grey[:, 30:] == 255).all() and (grey[20:, :30] == 228).all()
    # One colour of a palette, and one of all colours, that stand for nothing.
    palette = Image.fromarray(picture).quantize(8)
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((40, 10)))
    Image.fromarray(picture).save(tmp_path / "key.png", transparency=(0, 0, 0))
    for name in ("palette.png", "key.png"):
        read = images.read_picture(tmp_path / name)
        assert (read[:20, 30:] == 255).all(), name
        assert np.array_equal(read[:, :30], picture[:, :30]), name


def test_levels_of_16_bits_are_scaled(picture, tmp_path):
    """Pillow's own conversion would make all of these white."""
    grey = picture[..., 1]
    levels = grey.astype(np.uint16) * 257
    for name in ("a.png", "a.tif", "a.pgm"):
        Image.fromarray(levels).save(tmp_path / name)
        read = images.read_picture(tmp_path / name)
        assert np.array_equal(read, np.dstack([grey] * 3)), name


def test_pictures_that_are_refused(tmp_path):
    def problem(name):
        with pytest.raises(UserError, match=name) as caught:
            images.read_picture(tmp_path / name)
        return str(caught.value)

    # Nobody knows which level of these is white.
    Image.fromarray(np.ones((30, 30), np.float32)).save(tmp_path / "float.tif")
    assert "32 bits" in problem("float.tif")
    Image.new("RGB", (10_100, 100)).save(tmp_path / "strip.png")
    assert "times the other" in problem("strip.png")
    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")
    assert "80 million" in problem("large.png")
    # A program, not a picture.
    Image.new("RGB", (30, 30)).save(tmp_path / "program.eps")
    (tmp_path / "program.eps").rename(tmp_path / "program.jpg")
    assert "identify" in problem("program.jpg")
