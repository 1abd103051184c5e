"""web.py under streamlit's AppTest: every view, filter and address, and what is damaged or hostile; and the parts of it without the page."""

import csv
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from html import unescape
from html.parser import HTMLParser

import clip
import numpy as np
import pytest
import scipy.io
import torch
from conftest import NAMES, ROOT, error_line, write_dataset
from PIL import Image
from streamlit.testing.v1 import AppTest

from flowers import UserError, models
from flowers.data import open_flowers
from flowers.files import write_csv
from flowers.gallery import data as gallery
from flowers.gallery import panels

N = 120  # images of `many`: three pages


@pytest.fixture(scope="session")
def many(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("web") / "many", per_class=N // len(NAMES))


@pytest.fixture(scope="session")
def truth(many):
    """Class by image id and the ids of each split, straight from Oxford's files; swapped: trnid is the test split."""
    ids = scipy.io.loadmat(many / "setid.mat")
    return (
        dict(
            enumerate(
                (NAMES[c - 1] for c in scipy.io.loadmat(many / "imagelabels.mat")["labels"][0]), 1
            )
        ),
        {
            "test": set(ids["trnid"][0].tolist()),
            "train": {*ids["valid"][0].tolist(), *ids["tstid"][0].tolist()},
        },
    )


@pytest.fixture(scope="session")
def runs(tmp_path_factory, truth):
    """Two runs with made-up predictions of the test split; `first` has the weights of a random tiny model."""
    classes, splits = truth
    folder = tmp_path_factory.mktemp("web") / "runs"
    for r, name in enumerate(("first", "second")):
        rng, rows = np.random.default_rng(r), []
        for i in sorted(splits["test"]):
            order = rng.permutation(NAMES).tolist()
            if rng.random() < 0.6:
                order.remove(classes[i])
                order.insert(0, classes[i])
            scores = np.sort(rng.dirichlet(np.ones(5)))[::-1]
            rows.append(
                {
                    "file": f"image_{i:05d}.jpg",
                    "label": classes[i],
                    **{f"top{k + 1}": order[k] for k in range(5)},
                    **{f"score{k + 1}": round(scores[k], 6) for k in range(5)},
                }
            )
        (folder / name).mkdir(parents=True)
        write_csv(folder / name / "predictions.csv", rows)
        (folder / name / "args.json").write_text(
            json.dumps({"data_root": "elsewhere", "prompt_template": ["a {}"]})
        )
    torch.manual_seed(0)
    torch.save(models.build("tiny").state_dict(), folder / "first" / "model.pt")
    return folder


@pytest.fixture
def page(monkeypatch, many, runs):
    """page(view="runs", ...) -> the page at that address, without any error; page(..., data_root=, runs=, fails=True) for others."""

    def opened(data_root=many, runs=runs, fails=False, more=(), **address):
        monkeypatch.setattr(
            sys, "argv", ["web.py", "--data_root", str(data_root), "--runs", str(runs), *more]
        )
        at = AppTest.from_file(str(ROOT / "web.py"), default_timeout=60)
        at.query_params.update(address)
        return whole(at.run(), fails)

    return opened


def whole(at, fails=False):
    """The page, which must not have stumbled; an error, where it is due, is one sentence."""
    assert not at.exception, at.exception
    assert bool(at.error) == fails, [e.value for e in at.error]
    return at


def html(at, key="pictures"):
    """What panels drew under this key."""
    return "".join(
        e.proto.bytes.decode() for e in at.get("bidi_component") if e.proto.id.endswith("-" + key)
    )


def pictures(at, key="pictures"):
    """Id, source and lines of text of each picture of a grid, in order."""
    return [
        {
            "id": int(i),
            "src": re.findall('<img src="([^"]+)"', rest),
            "lines": [unescape(line) for line in re.findall("(?s)<p>(.*?)</p>", rest)],
        }
        for i, rest in re.findall('(?s)<button data-open="([0-9]+)">(.*?)</button>', html(at, key))
    ]


def shown(at, key="pictures"):
    """The ids in a grid of pictures, in order."""
    return [picture["id"] for picture in pictures(at, key)]


def rankings(html):
    """The tables of names with their probabilities, in percent."""
    return [
        (
            re.search("<th>(.*?)</th>", table)[1],
            [
                (unescape(name), float(share))
                for name, share in re.findall("<td>(.*?)</td><td>(.*?)%</td>", table)
            ],
        )
        for table in re.findall("<table>.*?</table>", html)
    ]


def text(at):
    kinds = (at.markdown, at.info, at.warning, at.error, at.caption)
    return "\n".join(
        [m.value for kind in kinds for m in kind]
        + [unescape(re.sub("<[^>]+>", "\n", html(at, "image")))]
    )


def press(at, key):
    return whole(at.button(key=key).click().run())


def predictions(runs, name):
    with (runs / name / "predictions.csv").open() as file:
        return {int(row["file"][6:11]): row for row in csv.DictReader(file)}


def test_opens_on_all_images_and_pages_through_them(page):
    at = page()
    assert (
        shown(at) == list(range(1, 49))
        and "1 to 48 of 120 images" in text(at)
        and dict(at.query_params) == {}
    )
    assert at.button(key="previous_page").disabled
    at = press(press(at, "next_page"), "next_page")
    assert (
        shown(at) == list(range(97, 121))
        and at.query_params["page"] in ("3", ["3"])
        and at.button(key="next_page").disabled
    )
    whole(at.number_input(key="page").set_value(2).run())
    assert shown(at) == list(range(49, 97))
    assert shown(press(at, "previous_page")) == list(range(1, 49))


@pytest.mark.parametrize("name", ["mallow", "tree mallow"])  # one holds the other's name
def test_filters_by_class(page, truth, name):
    at = page()
    whole(at.selectbox(key="class").set_value(name).run())
    assert shown(at) == [i for i, own in truth[0].items() if own == name] and len(shown(at)) == 20
    assert pictures(at)[0]["lines"] == [f"{shown(at)[0]} {name}"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_filters_by_split_and_id_together(page, truth, split):
    at = page(page="2")
    whole(at.segmented_control(key="split").set_value(split).run())
    assert shown(at) == sorted(truth[1][split])[:48]  # and from the first page on
    whole(at.text_input(key="ids").set_value(" 3, 20-40 ,119").run())
    wanted = {3, *range(20, 41), 119} & truth[1][split]
    assert shown(at) == sorted(wanted)
    whole(at.text_input(key="ids").set_value("7; rm -rf").run())
    assert "numbers and ranges such as" in text(at)
    whole(at.text_input(key="ids").set_value("900-1000").run())
    assert shown(at) == [] and "no image" in text(at) and at.download_button[0].disabled


def test_one_image(page, truth, many):
    at = page(image="50", **{"class": truth[0][50]})
    own = [i for i, name in truth[0].items() if name == truth[0][50]]
    with Image.open(many / "jpg" / "image_00050.jpg") as image:
        assert f"{image.width} x {image.height} pixels" in text(at)
    assert f"{own.index(50) + 1} of 20" in text(at) and "image 50" in text(at) and not shown(at)
    assert at.query_params["image"] in ("50", ["50"])
    for key, beside in (("Next_image", own[own.index(50) + 1]), ("Previous_image", 50)):
        at = press(at, key)
        assert f"image {beside} ·" in text(at)
    at = press(at, "random_image")
    assert int(np.ravel(at.query_params["image"])[0]) in own
    assert shown(press(at, "to_grid")) == own and "image" not in at.query_params
    assert page(image=str(own[0]), **{"class": truth[0][50]}).button(key="Previous_image").disabled


def test_neighbours_by_colour_and_by_a_run(page, many):
    at = page(image="50")
    for _ in range(100):  # the colours of all images are computed in the background
        if shown(at, "neighbours"):
            break
        time.sleep(0.1)
        whole(at.run())
    flowers = open_flowers(many)
    rows = np.stack(
        [
            gallery.colour_features(gallery.read_thumbnail(gallery.thumbnail(f)))
            for f in flowers.files
        ]
    )
    distance = ((rows - rows[49]) ** 2).sum(1)
    assert (
        shown(at, "neighbours")
        == [i + 1 for i in np.argsort(distance, kind="stable") if i != 49][:12]
    )

    whole(at.segmented_control(key="like").set_value("first").run())
    assert len(shown(at, "neighbours")) == 12 and 50 not in shown(at, "neighbours")
    scores = [float(p["lines"][1]) for p in pictures(at, "neighbours")]
    assert scores == sorted(scores, reverse=True)


def test_captions_of_the_image_are_shown_as_plain_text(page, many, tmp_path):
    root = shutil.copytree(many, tmp_path / "d", ignore=shutil.ignore_patterns(".cache"))
    lines = [
        json.dumps(
            {
                "file": f"image_{i:05d}.jpg",
                "captions": [f"**flower** {i} <img src='http://a.b/c.png'>"],
            }
        )
        for i in range(1, N + 1)
    ]
    (root / "captions.jsonl").write_text("\n".join(lines))
    at = page(root, image="9")
    assert "<li>**flower** 9 &lt;img src=&#x27;http://a.b/c.png&#x27;&gt;</li>" in html(at, "image")
    (root / "captions.jsonl").write_text(lines[0])
    assert "has no caption for image_00002.jpg" in text(page(root, image="9"))


@pytest.mark.parametrize("show", ["all", "right", "wrong", "changed", "mended", "broken"])
def test_outcomes_of_two_runs(page, runs, show):
    first, second = predictions(runs, "first"), predictions(runs, "second")
    right = {
        i: (row["top1"] == row["label"], second[i]["top1"] == row["label"])
        for i, row in first.items()
    }
    wanted = [
        i
        for i in first
        if {
            "all": True,
            "right": right[i][0],
            "wrong": not right[i][0],
            "changed": first[i]["top1"] != second[i]["top1"],
            "mended": right[i] == (False, True),
            "broken": right[i] == (True, False),
        }[show]
    ]
    at = page(view="runs", run="first", other="second")
    whole(at.segmented_control(key="show").set_value(show).run())
    assert shown(at) == wanted and wanted
    share = 100 * sum(a for a, _ in right.values()) / len(right)
    assert f"first: **{share:.2f}%**" in text(at) and f"of {len(first)} images right" in text(at)
    mark = "✓" if right[wanted[0]][0] else "✗"
    assert (
        pictures(at)[0]["lines"][1]
        == f"{mark} {first[wanted[0]]['top1']} {100 * float(first[wanted[0]]['score1']):.0f}%"
    )


def test_most_confident_mistakes_come_first(page, runs):
    first = predictions(runs, "first")
    wrong = [i for i in first if first[i]["top1"] != first[i]["label"]]
    at = page(view="runs", run="first", show="wrong")
    whole(at.segmented_control(key="order").set_value("confidence").run())
    assert shown(at) == sorted(wrong, key=lambda i: -float(first[i]["score1"])) != wrong


def test_true_and_predicted_class_open_a_cell_of_the_confusion_matrix(page, runs):
    first = predictions(runs, "first")
    cell = next(
        (row["label"], row["top1"]) for row in first.values() if row["label"] != row["top1"]
    )
    at = page(view="runs", run="first")
    whole(at.selectbox(key="class").set_value(cell[0]).run())
    whole(at.selectbox(key="guess").set_value(cell[1]).run())
    assert shown(at) == [i for i, row in first.items() if (row["label"], row["top1"]) == cell] != []
    at = page(view="runs", run="first", part="confusion")
    drawn = re.findall(
        'data-open="([0-9]+),([0-9]+)" title="(.*?): ([0-9]+) of ([0-9]+)"', html(at, "confusion")
    )
    names = sorted(
        NAMES,
        key=lambda name: int(next(c for c, _, title, *_ in drawn if title.startswith(name + " →"))),
    )  # by number
    counts = Counter((row["label"], row["top1"]) for row in first.values())
    assert {
        (names[int(t)], names[int(g)]): int(n) for t, g, _, n, _ in drawn
    } == counts and cell in counts
    assert all(title == f"{names[int(t)]} → {names[int(g)]}" for t, g, title, *_ in drawn)
    assert {names[int(t)]: int(total) for t, _, _, _, total in drawn} == Counter(
        row["label"] for row in first.values()
    )


def test_classes_are_sorted_by_change(page, runs):
    first, second = predictions(runs, "first"), predictions(runs, "second")
    at = page(view="runs", run="first", other="second", part="classes")
    table = at.dataframe[0].value
    changes = {}
    for name in NAMES:
        own = [i for i in first if first[i]["label"] == name]
        a, b = (100 * np.mean([rows[i]["top1"] == name for i in own]) for rows in (first, second))
        row = table[table["class"] == name].iloc[0]
        assert (row["first"], row["second"], row["images"]) == (
            pytest.approx(a),
            pytest.approx(b),
            len(own),
        )
        changes[name] = b - a
    assert (
        table["change"].tolist() == pytest.approx(sorted(changes.values(), key=lambda c: -abs(c)))
        and len({*changes.values()}) > 1
    )
    assert (
        page(view="runs", run="first", part="classes")
        .dataframe[0]
        .value["first"]
        .is_monotonic_increasing
    )


def test_an_image_shows_what_both_runs_say(page, runs):
    i = next(iter(predictions(runs, "first")))
    at = page(view="runs", run="first", other="second", image=str(i))
    tables = rankings(html(at, "image"))
    assert [name for name, _ in tables] == ["first", "second"]
    for name, best in tables:
        row = predictions(runs, name)[i]
        assert [n.removeprefix("✓ ") for n, _ in best] == [row[f"top{k}"] for k in range(1, 6)]
        assert [n for n, _ in best if n.startswith("✓")] == [f"✓ {row['label']}"] * (
            row["label"] in [row[f"top{k}"] for k in range(1, 6)]
        )
        assert [share for _, share in best] == pytest.approx(
            [100 * float(row[f"score{k}"]) for k in range(1, 6)], abs=0.051
        )


def reference(runs, many, sentence):
    """Similarities by clip's own code: its tokenizer at full length, its transform."""
    model, preprocess = clip.load(str(runs / "first" / "model.pt"), device="cpu")
    with torch.no_grad():
        words = model.encode_text(clip.tokenize([sentence]))[0]
        images = model.encode_image(
            torch.stack([preprocess(Image.open(f)) for f in sorted((many / "jpg").glob("*.jpg"))])
        )
    return torch.cosine_similarity(images, words[None]).numpy()


def test_search_by_a_sentence(page, runs, many):
    at = page(view="search", run="first")
    assert not shown(at)
    whole(at.text_input(key="q").set_value("a red flower on black").run())
    scores = reference(runs, many, "a red flower on black")
    given = [float(p["lines"][1]) for p in pictures(at)]
    assert len(given) == 48 and given == sorted(given, reverse=True)
    assert given == pytest.approx(
        [scores[i - 1] for i in shown(at)], abs=3e-3
    )  # ours resizes on uint8, and with four digits
    assert min(given) >= np.sort(scores)[-48] - 3e-3
    assert at.query_params["q"] in ("a red flower on black", ["a red flower on black"])
    assert (
        "of 120"
        in text(
            page(view="search", run="first", q="a red flower on black", image=str(shown(at)[1]))
        )
        and "2 of 120"
    )


def test_search_by_a_picture_of_ones_own(page, many):
    data = (many / "jpg" / "image_00033.jpg").read_bytes()
    at = page(view="search", run="first")
    whole(at.file_uploader[0].upload("mine.jpg", data, "image/jpeg").run())
    assert shown(at)[0] == 33 and float(pictures(at)[0]["lines"][1]) > 0.999
    best = rankings(html(at, "answer"))[0][1]
    assert (
        len(best) == 5
        and {name for name, _ in best} < set(NAMES)
        and [share for _, share in best] == sorted([share for _, share in best], reverse=True)
    )


def encoded(size, kind="JPEG"):
    out = io.BytesIO()
    Image.new("RGB", size, (200, 30, 60)).save(out, kind)
    return out.getvalue()


BROKEN = {
    "text": b"hello",
    "nothing": b"",
    "half": encoded((400, 300))[:900],
    "gif": encoded((50, 50), "GIF"),
    "script": b"<svg onload=alert(1)>",
    "bomb": encoded((9000, 9000), "PNG"),
    "strip": encoded((5000, 3), "PNG"),
    "large": b"\xff\xd8" + bytes(gallery.MAX_BYTES),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_upload_is_a_sentence(name):
    with pytest.raises(UserError, match="^this (file|picture) (can't be read|has)"):
        gallery.open_picture(BROKEN[name])


def test_a_bad_upload_leaves_the_page_whole(page):
    at = page(view="search", run="first")
    at.file_uploader[0].upload("bad.jpg", BROKEN["half"], "image/jpeg").run()
    assert "can't be read as a picture" in whole(at, fails=True).error[0].value
    from starlette.formparsers import MultiPartParser

    assert (
        MultiPartParser.spool_max_size > gallery.MAX_BYTES
    )  # what is larger is refused before it could go to a temporary file


def test_good_pictures_of_all_kinds_open_upright():
    for kind, mode in (
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("JPEG", "CMYK"),
        ("JPEG", "L"),
        ("WEBP", "RGB"),
        ("PNG", "I;16"),
    ):
        out = io.BytesIO()
        Image.new(mode, (40, 30)).save(out, kind)
        assert gallery.open_picture(out.getvalue()).shape == (30, 40, 3)
    image, out = Image.new("RGB", (40, 30)), io.BytesIO()
    image.getexif()[0x0112] = 6  # turned by a quarter
    image.save(out, "JPEG", exif=image.getexif())
    assert gallery.open_picture(out.getvalue()).shape == (40, 30, 3)


@pytest.mark.parametrize(
    "address",
    [
        {"class": "mallow", "split": "train", "ids": "1-90"},
        {"page": "3"},
        {"bars": "shown", "split": "test"},
        {"image": "17"},
        {"image": "17", "like": "first", "split": "test"},
        {
            "view": "runs",
            "run": "second",
            "other": "first",
            "show": "changed",
            "order": "confidence",
        },
        {"view": "runs", "run": "first", "class": "rose", "guess": "rose"},
        {"view": "runs", "run": "first", "part": "classes"},
        {"view": "runs", "run": "first", "part": "confusion"},
        {"view": "search", "run": "first", "q": "a rose"},
    ],
    ids=str,
)
def test_every_address_opens_the_same_view_again(page, address):
    at = page(**address)
    assert {
        k: np.ravel(v)[0] for k, v in at.query_params.items()
    } == address  # nothing is lost or added
    again = page(**{k: np.ravel(v)[0] for k, v in at.query_params.items()})
    assert (shown(again), shown(again, "neighbours"), text(again)) == (
        shown(at),
        shown(at, "neighbours"),
        text(at),
    )


def test_going_back_in_the_browser_goes_back(page):
    at = page()
    at = press(at, "next_page")
    at.query_params.pop("page")
    assert shown(whole(at.run())) == list(range(1, 49))


HOSTILE = [
    "../../etc/passwd",
    "<script>alert(1)</script>",
    "\x00",
    "-1",
    "0",
    "9" * 400,
    "٣",
    "nan",
    "None",
    "first/../second",
    "..",
    "",
    ["a", "b"],
]


@pytest.mark.parametrize("value", HOSTILE, ids=lambda v: repr(v)[:24])
def test_hostile_addresses_show_what_there_is(page, value):
    keys = [
        "class",
        "split",
        "bars",
        "page",
        "image",
        "run",
        "other",
        "part",
        "show",
        "guess",
        "order",
        "like",
        "q",
        "ids",
    ]
    at = page(view=value, **dict.fromkeys(keys[:-1], value))
    assert len(shown(at)) == 48
    for view in ("runs", "search"):
        at = page(view=view, **dict.fromkeys(keys, value))
        assert "passwd" not in text(at) and set(shown(at)) <= set(range(1, N + 1))


def copy(many, tmp_path):
    return shutil.copytree(many, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))


@pytest.mark.parametrize("harm", ["setid.mat", "imagelabels.mat", "jpg", "cut", "image", "folder"])
def test_a_damaged_dataset_is_a_sentence_with_a_command(page, many, tmp_path, harm):
    root = copy(many, tmp_path)
    if harm == "jpg":
        shutil.rmtree(root / "jpg")
    elif harm == "cut":
        (root / "setid.mat").write_bytes((root / "setid.mat").read_bytes()[:150])
    elif harm == "image":
        (root / "jpg" / "image_00005.jpg").unlink()
    elif harm == "folder":
        shutil.rmtree(root)
    else:
        (root / harm).unlink()
    message = page(root, fails=True).error[0].value
    assert "python -m flowers.data" in message and str(root) in message and "\n" not in message


def test_a_dataset_that_is_mended_opens_without_a_restart(page, many, tmp_path):
    root = copy(many, tmp_path)
    kept = (root / "setid.mat").read_bytes()
    (root / "setid.mat").unlink()
    at = page(root, fails=True)
    (root / "setid.mat").write_bytes(kept)
    assert len(shown(whole(at.run()))) == 48


def test_a_damaged_image_does_not_hide_the_others(page, many, tmp_path):
    root = copy(many, tmp_path)
    (root / "jpg" / "image_00003.jpg").write_bytes(b"\xff\xd8 nothing")
    assert [p["id"] for p in pictures(page(root)) if not p["src"]] == [3]
    assert "python -m flowers.data" in page(root, image="3", fails=True).error[0].value


HEAD = b"file,label,top1,score1\n"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        HEAD + b"image_00001.jpg,rose,rose,much\n",
        b"\xff\xfe\x00binary",
        HEAD + b",,,\n",
        HEAD + b"image_00001.jpg,rose,rose,nan\n",
    ],
    ids=lambda c: repr(c)[-24:],
)
def test_damaged_predictions_are_a_sentence_with_a_command(page, runs, tmp_path, content):
    folder = shutil.copytree(runs, tmp_path / "runs")
    (folder / "second" / "predictions.csv").write_bytes(content)
    message = page(runs=folder, view="runs", run="second", fails=True).error[0].value
    assert "python baseline_eval.py" in message or "streamlit run web.py" in message
    assert shown(page(runs=folder, view="runs", run="first"))  # the other run is as it was


def test_a_run_of_another_dataset_says_which(page, runs, tmp_path, many):
    folder = shutil.copytree(runs, tmp_path / "runs")
    write_csv(
        folder / "second" / "predictions.csv",
        [{"file": "image_00001.jpg", "label": "tulip", "top1": "tulip", "score1": 1}],
    )
    assert (
        "--data_root elsewhere"
        in page(runs=folder, view="runs", run="second", fails=True).error[0].value
    )


def test_damaged_models_and_arguments(page, runs, tmp_path):
    folder = shutil.copytree(runs, tmp_path / "runs")
    (folder / "first" / "args.json").write_text('{"prompt_template": 7')
    assert shown(page(runs=folder, view="search", q="a rose"))
    (folder / "first" / "model.pt").write_bytes(b"no model")
    assert (
        "can't be read" in page(runs=folder, view="search", q="a rose", fails=True).error[0].value
    )


def test_without_runs_the_page_says_how_to_make_one(page, tmp_path):
    for view in ("runs", "search"):
        at = page(runs=tmp_path / "none", view=view)
        assert "python train.py" in text(at) and "--runs" in text(at)


def test_mistaken_flags_are_a_sentence(page, cli):
    assert "unrecognized arguments" in page(more=["--colour", "red"], fails=True).error[0].value
    assert "streamlit run web.py" in error_line(cli("web.py"))
    assert "--runs" in cli("web.py", "--help")[1]


def test_export_lists_what_is_shown(many, runs, truth):
    flowers = open_flowers(many)
    first = gallery.read_predictions(runs / "first", flowers)
    rows = list(csv.DictReader(io.StringIO(gallery.export(flowers, [4, 0, 77], [first]))))
    assert [(int(r["id"]), r["file"], r["class"]) for r in rows] == [
        (i, f"image_{i:05d}.jpg", truth[0][i]) for i in (5, 1, 78)
    ]
    made = predictions(runs, "first")
    for row in rows:
        i = int(row["id"])
        assert i in truth[1][row["split"]]
        assert row["first prediction"] == (made[i]["top1"] if i in made else "")
        assert float(row["first probability"] or 0) == float(made[i]["score1"] if i in made else 0)


def test_thumbnails_are_kept_small_and_follow_their_files(many, tmp_path):
    root = copy(many, tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(
        root / "jpg" / "image_00002.jpg", quality=95
    )  # nothing is harder to compress
    flowers = open_flowers(root)

    def ready():
        thumbnails = gallery.Thumbnails(flowers)
        while thumbnails.features is None and not thumbnails.problem:
            time.sleep(0.02)
        assert not thumbnails.problem
        return thumbnails

    thumbnails = ready()
    for i in (0, 1):
        assert (
            thumbnails[i] == gallery.thumbnail(flowers.files[i])
            and len(thumbnails[i]) <= gallery.SLOT
        )
        assert gallery.read_thumbnail(thumbnails[i]).shape == (160, 160, 3)
    before = {p.name: p.stat().st_mtime_ns for p in (root / ".cache").iterdir()}
    ready()
    assert {p.name: p.stat().st_mtime_ns for p in (root / ".cache").iterdir()} == before and len(
        before
    ) == 2
    shutil.copy(flowers.files[5], flowers.files[0])
    assert ready()[0] == gallery.thumbnail(flowers.files[5])


def test_the_first_page_does_not_wait_for_what_it_does_not_need(many):
    code = f"""import sys
from streamlit.testing.v1 import AppTest
sys.argv = ["web.py", "--data_root", {str(many)!r}]
at = AppTest.from_file({str(ROOT / "web.py")!r}, default_timeout=60).run()
sys.exit(" ".join(sys.modules.keys() & {{"torch", "pandas", "altair", "matplotlib"}}) or not at.get("bidi_component"))"""
    gallery.Thumbnails(open_flowers(many))._work()  # kept from here on
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names_are_text_whatever_they_hold(many):
    flowers = dataclasses.replace(
        open_flowers(many),
        class_names=(vile := ["<b>{0}", "\"' onclick='x", "a&b", "</p>", "{{}}", "`$`"]),
    )
    black = np.zeros((9, 9, 3), np.uint8)
    drawn = [
        panels.pictures([(1, b"x", vile)]),
        panels.class_histogram(flowers, np.arange(N), vile[0]),
        panels.image(b"x", black, vile[1], vile, vile, [(vile[0], [(name, 0.5) for name in vile])]),
        panels.confusion(vile, np.arange(6), np.arange(6)[::-1]),
    ]

    class Seen(HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append(tag)
            assert {name for name, _ in attributes} <= {
                "class",
                "style",
                "title",
                "alt",
                "src",
                "data-open",
                "viewbox",
                "preserveaspectratio",
                "points",
                "x",
                "y",
                "width",
                "height",
                "fill",
                "stroke",
            }

        def handle_data(self, data):
            said.append(data)

    for piece in drawn:
        tags, said = [], []
        Seen().feed(piece)
        assert {*vile} <= {*said} and tags.count("b") == piece.count(
            "<b style="
        )  # the keys of charts


def test_a_histogram_counts_each_class(page, truth):
    left = [i for i in truth[1]["test"] if i > 3]
    drawn = re.findall(
        'data-open="([0-9]+)" class="(.*?)" .*?<span>(.*?)</span>([0-9]+)</button>',
        html(page(bars="shown", split="test", ids="4-120", **{"class": "rose"}), "histogram"),
    )
    assert {name: (on == "on", int(n)) for _, on, name, n in drawn} == {
        name: (name == "rose", n) for name, n in Counter(truth[0][i] for i in left).items()
    }
    assert [int(n) for *_, n in drawn] == sorted((int(n) for *_, n in drawn), reverse=True)


def test_palette_finds_the_colours_of_a_flag():
    flag = np.repeat(
        np.array([[200, 20, 30], [250, 250, 250], [20, 40, 160]], np.uint8), 40, axis=0
    )[None].repeat(90, axis=0)
    found = gallery.palette(flag)[:3]
    assert sorted(colour for colour, _ in found) == ["#1428a0", "#c8141e", "#fafafa"] and sum(
        s for _, s in found
    ) == pytest.approx(1, abs=0.03)


def test_grey_and_single_colours_have_curves():
    for level in (0, 128, 255):
        hue, saturation, value = panels.hsv_curves(np.full((20, 30, 3), level, np.uint8))
        assert not hue.any() and np.isfinite([*saturation, *value]).all()
        assert saturation.argmax() == 0 and value.argmax() / 64 == pytest.approx(
            level / 255, abs=0.02
        )
    hue, _, _ = panels.hsv_curves(
        np.full((20, 30, 3), [200, 10, 14], np.uint8)
    )  # a hue of 359: the density goes on at 0
    assert min(hue[0], hue[-1]) > 0.5 * hue.max() and hue[60] == pytest.approx(0, abs=1e-6)
