"""web.py under streamlit's AppTest: every view, filter and address, and what is damaged or hostile.

The parts of it that know nothing of the page are tested without it.
"""

import base64
import csv
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from urllib.parse import parse_qsl

import clip
import numpy as np
import pandas as pd
import pyarrow.ipc
import pytest
import scipy.io
import scipy.special
import streamlit
import torch
from conftest import NAMES, ROOT, error_line, write_dataset
from PIL import Image
from statsmodels.stats import contingency_tables
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from streamlit.runtime.forward_msg_cache import populate_hash_if_needed
from streamlit.testing.v1 import AppTest
from tqdm import tqdm

from flowers import UserError, models
from flowers.data import open_flowers
from flowers.files import write_csv
from flowers.gallery import atlas, colours, filters, panels
from flowers.gallery import thumbnails as thumbnails_module
from flowers.gallery.overview import run_table
from flowers.gallery.predictions import (
    Predictions,
    class_table,
    confusion_table,
    likely_label_errors,
    names_with,
    order_of_confusions,
    read_predictions,
    run_folders,
)
from flowers.gallery.search import Searcher, nearest
from flowers.gallery.thumbnails import (
    MAX_UPLOAD_BYTES,
    SLOT,
    Thumbnails,
    open_picture,
    read_thumbnail,
    thumbnail,
)
from flowers.intervals import holm, paired_difference
from flowers.page import classes, kept
from flowers.page.image import what_is_left_out
from flowers.study.comparable import read_clusters
from flowers.study.statistics import difference_interval, mean_interval

N = 120  # images of `many`: three pages
SHOWN = 0.00501  # by which a number with two decimals may differ from what it was computed as
PATIENCE = 180  # seconds that a busy machine may take for one run of the page


# -----------------------------------------------------------------------------
# data, runs and the page


@pytest.fixture(scope="session")
def many(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("web") / "many", per_class=N // len(NAMES))


@pytest.fixture(scope="session")
def truth(many):
    """Class by image id, and the ids of each split, straight from Oxford's files."""
    labels = scipy.io.loadmat(many / "imagelabels.mat")["labels"][0]
    class_of = {i: NAMES[label - 1] for i, label in enumerate(labels, 1)}
    ids = scipy.io.loadmat(many / "setid.mat")
    trnid, valid, tstid = (ids[name][0].tolist() for name in ("trnid", "valid", "tstid"))
    # The swapped split, which is the default: trnid is the test split.
    return class_of, {"test": set(trnid), "train": {*valid, *tstid}}


def made_up_row(rng, image_id, label):
    """A row of predictions.csv: right in 60% and more, with five random probabilities."""
    order = rng.permutation(NAMES).tolist()
    if rng.random() < 0.6:
        order.remove(label)
        order.insert(0, label)
    scores = np.sort(rng.dirichlet(np.ones(5)))[::-1]
    row = {"file": f"image_{image_id:05d}.jpg", "label": label}
    for k in range(5):
        row[f"top{k + 1}"] = order[k]
    for k in range(5):
        row[f"score{k + 1}"] = round(scores[k], 6)
    return row


@pytest.fixture(scope="session")
def runs(tmp_path_factory, truth):
    """Two runs with made-up predictions of the test split; `first` has a random tiny model."""
    class_of, splits = truth
    folder = tmp_path_factory.mktemp("web") / "runs"
    arguments = {"data_root": "elsewhere", "prompt_template": ["a {}"]}
    for seed, name in enumerate(("first", "second")):
        rng = np.random.default_rng(seed)
        rows = [made_up_row(rng, i, class_of[i]) for i in sorted(splits["test"])]
        (folder / name).mkdir(parents=True)
        write_csv(folder / name / "predictions.csv", rows)
        (folder / name / "args.json").write_text(json.dumps(arguments))
    torch.manual_seed(0)
    torch.save(models.build("tiny").state_dict(), folder / "first" / "model.pt")
    return folder


@pytest.fixture
def page(monkeypatch, many, runs):
    """page(view="runs", ...): the page at that address, without any error.

    page(..., data_root=, runs=, more=, fails=True): other data, runs and flags; an error is due.
    """

    def opened(data_root=many, runs=runs, fails=False, more=(), **address):
        flags = ["--data_root", str(data_root), "--runs", str(runs), *more]
        monkeypatch.setattr(sys, "argv", ["web.py", *flags])
        at = AppTest.from_file(str(ROOT / "web.py"), default_timeout=PATIENCE)
        at.query_params.update(address)
        return whole(at.run(), fails)

    return opened


def whole(at, fails=False):
    """The page, which must not have raised; with an error box where one is due, and only there."""
    assert not at.exception, at.exception
    assert bool(at.error) == fails, [error.value for error in at.error]
    return at


# -----------------------------------------------------------------------------
# what stands on the page


def html(at, key="pictures"):
    """What panels drew under this key."""
    elements = at.get("bidi_component")
    drawn = [e.proto.bytes.decode() for e in elements if e.proto.id.endswith("-" + key)]
    return "".join(drawn)


def pictures(at, key="pictures"):
    """Id, source and lines of text of each picture of a grid, in order."""
    found = []
    link = '(?s)<a data-open="([0-9]+)"[^>]*>(.*?)</a>'
    for i, inside in re.findall(link, html(at, key)):
        lines = [unescape(line) for line in re.findall("(?s)<p>(.*?)</p>", inside)]
        sources = re.findall('<img src="([^"]+)"', inside)
        found.append({"id": int(i), "src": sources, "lines": lines})
    return found


def shown(at, key="pictures"):
    """The ids in a grid of pictures, in order."""
    return [picture["id"] for picture in pictures(at, key)]


def scores(at, key="pictures"):
    """The similarity under each picture of a grid."""
    return [float(picture["lines"][1].removeprefix("similarity ")) for picture in pictures(at, key)]


def rankings(html):
    """The tables of names with their probabilities, in percent."""
    tables = []
    for table in re.findall("<table>.*?</table>", html):
        title = re.search("<th>(.*?)</th>", table)[1]
        rows = re.findall("<td>(.*?)</td><td>(.*?)%</td>", table)
        tables.append((title, [(unescape(name), float(percent)) for name, percent in rows]))
    return tables


def as_read(message):
    """What is to be read of markdown: without the backslashes, and code within its line."""
    return re.sub(r"\s*```(?:shell)?\s*", " ", re.sub(r"\\(.)", r"\1", message.value))


def text(at):
    """All that is to be read on the page, but for its grids."""
    texts = []
    for kind in (at.markdown, at.info, at.warning, at.error, at.caption):
        texts += [as_read(message) for message in kind]
    texts.append(unescape(re.sub("<[^>]+>", "\n", html(at, "image"))))
    return "\n".join(texts)


def address_of(at):
    """The page's address as a dict; AppTest gives each value as text or as a list of one."""
    return {key: np.ravel(value)[0] for key, value in at.query_params.items()}


def accuracies(at):
    """The table of the runs that are compared, by run; numbers as they are shown, nan for none."""
    lines = re.findall("(?s)<tr>(.*?)</tr>", html(at, "accuracies"))
    heads, *rows = (re.findall("(?s)<t[hd][^>]*>(.*?)</t[hd]>", line) for line in lines)
    texts = [[unescape(cell) for cell in row] for row in rows]
    table = pd.DataFrame(texts, columns=[unescape(head) for head in heads]).set_index("run")
    for column in table.columns:
        if "interval" not in column:
            table[column] = pd.to_numeric(table[column])
    return table


def classes_of(at):
    """The table of the classes."""
    return next(d.value for d in at.dataframe if "class" in d.value)


def press(at, key):
    return whole(at.button(key=key).click().run())


def choose(at, key, value):
    """Press one of the buttons of which one is always chosen."""
    return whole(at.segmented_control(key=key).set_value(value).run())


def select(at, key, value):
    """Select from a list."""
    return whole(at.selectbox(key=key).set_value(value).run())


def write(at, key, value):
    """Write into a text field."""
    return whole(at.text_input(key=key).set_value(value).run())


def predictions_of(runs, name):
    """The rows of a run's predictions.csv by image id."""
    with (runs / name / "predictions.csv").open() as file:
        return {int(row["file"][6:11]): row for row in csv.DictReader(file)}


# -----------------------------------------------------------------------------
# browse, and one image


def test_opens_on_all_images_and_pages_through_them(page):
    at = page()
    assert shown(at) == list(range(1, 49))
    assert "1 to 48 of 120 images" in text(at)
    assert address_of(at) == {}
    assert at.button(key="previous_page").disabled

    at = press(press(at, "next_page"), "next_page")
    assert shown(at) == list(range(97, 121))
    assert address_of(at)["page"] == "3"
    assert at.button(key="next_page").disabled

    whole(at.number_input(key="page").set_value(2).run())
    assert shown(at) == list(range(49, 97))
    assert shown(press(at, "previous_page")) == list(range(1, 49))


def test_pages_turn_below_the_grid_too(page):
    at = press(press(page(), "next_page_below"), "next_page_below")
    assert shown(at) == list(range(97, 121))
    assert shown(press(at, "previous_page_below")) == list(range(49, 97))
    at = page(**{"class": "mallow"})  # a single page
    assert not [button for button in at.button if button.key == "next_page_below"]


def test_filters_are_folded_away_on_a_telephone(page, monkeypatch):
    assert not page().expander
    assert formats_of(page(view="runs"))["run"]["pinned"]
    headers = {"User-Agent": "Mozilla/5.0 (Linux; Android 15) Chrome/140 Mobile Safari/537.36"}
    monkeypatch.setattr(type(streamlit.context), "headers", headers)
    assert [box.label for box in page().expander] == ["Filters"]
    assert [box.label for box in page(view="runs", run="first").expander] == ["Filters"]
    assert not formats_of(page(view="runs"))["run"]["pinned"]


@pytest.mark.parametrize("name", ["mallow", "tree mallow"])  # one name holds the other
def test_filters_by_class(page, truth, name):
    class_of, _ = truth
    at = select(page(), "class", name)
    assert shown(at) == [i for i, label in class_of.items() if label == name]
    assert len(shown(at)) == 20
    assert pictures(at)[0]["lines"] == [f"{shown(at)[0]} {name}"]


def test_a_chosen_class_can_be_taken_back(page):
    """The browser shows a cross in a list without a default; lists of runs always have one."""
    at = select(page(), "class", "rose")
    assert not at.selectbox(key="class").proto.HasField("default")
    assert len(shown(select(at, "class", None))) > len(NAMES)
    assert address_of(at) == {}
    at = page(view="runs", run="first", guess="rose")
    lists = {box.key: box.proto.HasField("default") for box in at.selectbox}
    assert lists == {"run": True, "class": False, "guess": False}


@pytest.mark.parametrize("split", ["train", "test"])
def test_filters_by_split_and_id_together(page, truth, split):
    _, splits = truth
    at = page(page="2")
    choose(at, "split", split)
    assert shown(at) == sorted(splits[split])[:48]  # the filter goes back to the first page

    write(at, "ids", " 3, 20-40 ,119")
    assert shown(at) == sorted({3, *range(20, 41), 119} & splits[split])

    write(at, "ids", "40-20")
    assert shown(at) == sorted({*range(20, 41)} & splits[split])

    write(at, "ids", "7; rm -rf")
    assert "numbers and ranges such as" in text(at)

    write(at, "ids", "900-1000")
    assert shown(at) == []
    assert "no image" in text(at)
    assert at.download_button[0].disabled


def test_one_image(page, truth, many):
    class_of, _ = truth
    name = class_of[50]
    same_class = [i for i, label in class_of.items() if label == name]
    at = page(image="50", **{"class": name})
    with Image.open(many / "jpg" / "image_00050.jpg") as image:
        assert f"{image.width} x {image.height} pixels" in text(at)
    assert f"{same_class.index(50) + 1} of 20" in text(at)
    assert "image 50" in text(at)
    assert not shown(at)
    assert address_of(at)["image"] == "50"

    after = same_class[same_class.index(50) + 1]
    for key, image_id in (("Next_image", after), ("Previous_image", 50)):
        at = press(at, key)
        assert f"image {image_id} ·" in text(at)
    at = press(at, "random_image")
    assert int(address_of(at)["image"]) in same_class
    assert shown(press(at, "to_grid")) == same_class
    assert "image" not in at.query_params

    at = page(image=str(same_class[0]), **{"class": name})
    assert at.button(key="Previous_image").disabled


def test_neighbours_by_colour_and_by_a_run(page, many):
    at = page(image="50")
    # A thread computes the colours of all images; until then there are no neighbours.
    deadline = time.monotonic() + PATIENCE
    while not shown(at, "neighbours") and time.monotonic() < deadline:
        time.sleep(0.1)
        whole(at.run())

    jpegs = [thumbnail(file) for file in open_flowers(many).files]
    features = np.stack([colours.colour_features(read_thumbnail(jpeg)) for jpeg in jpegs])
    distances = ((features - features[49]) ** 2).sum(1)
    others = [i + 1 for i in np.argsort(distances, kind="stable") if i != 49]
    assert shown(at, "neighbours") == others[:12]

    choose(at, "near_by", "a run's features")
    assert at.selectbox(key="like").options == ["first"]  # a list: there may be 500 runs
    assert len(shown(at, "neighbours")) == 12
    assert 50 not in shown(at, "neighbours")
    assert scores(at, "neighbours") == sorted(scores(at, "neighbours"), reverse=True)
    assert at.query_params["like"] == "first"
    choose(at, "near_by", "colours")
    assert shown(at, "neighbours") == others[:12]


def test_whose_features_were_chosen_is_kept(page, runs, tmp_path):
    for name in ("older", "newer"):
        shutil.copytree(runs / "first", tmp_path / name)
        os.utime(tmp_path / name, (1e9, 1e9 + (name == "newer")))
    at = page(runs=tmp_path, image="50", like="older")
    assert at.selectbox(key="like").options == ["newer", "older"]
    at = choose(at, "near_by", "colours")
    assert address_of(choose(at, "near_by", "a run's features"))["like"] == "older"


def test_captions_of_the_image_are_shown_as_plain_text(page, many, tmp_path):
    root = shutil.copytree(many, tmp_path / "d", ignore=shutil.ignore_patterns(".cache"))
    lines = []
    for i in range(1, N + 1):
        caption = f"**flower** {i} <img src='http://a.b/c.png'>"
        lines.append(json.dumps({"file": f"image_{i:05d}.jpg", "captions": [caption]}))
    (root / "captions.jsonl").write_text("\n".join(lines))
    at = page(root, image="9")
    assert "<li>**flower** 9 &lt;img src=&#x27;http://a.b/c.png&#x27;&gt;</li>" in html(at, "image")

    (root / "captions.jsonl").write_text(lines[0])
    assert "has no caption for image_00002.jpg" in text(page(root, image="9"))


def test_a_histogram_counts_each_class(page, truth):
    class_of, splits = truth
    at = page(bars="shown", split="test", ids="4-120", **{"class": "rose"})
    bars = re.findall(
        'data-open="([0-9]+)" class="(.*?)" .*?<span>(.*?)</span>([0-9]+)</button>',
        html(at, "histogram"),
    )
    counts = Counter(class_of[i] for i in splits["test"] if i > 3)
    drawn = {name: (emphasis == "on", int(count)) for _, emphasis, name, count in bars}
    assert drawn == {name: (name == "rose", count) for name, count in counts.items()}
    heights = [int(count) for *_, count in bars]
    assert heights == sorted(heights, reverse=True)


# -----------------------------------------------------------------------------
# runs


@pytest.mark.parametrize("show", ["all", "right", "wrong", "changed", "mended", "broken"])
def test_outcomes_of_two_runs(page, runs, show):
    first, second = predictions_of(runs, "first"), predictions_of(runs, "second")
    right = {}
    wanted = []
    for i, row in first.items():
        right[i] = (row["top1"] == row["label"], second[i]["top1"] == row["label"])
        passes = {
            "all": True,
            "right": right[i][0],
            "wrong": not right[i][0],
            "changed": row["top1"] != second[i]["top1"],
            "mended": right[i] == (False, True),
            "broken": right[i] == (True, False),
        }
        if passes[show]:
            wanted.append(i)

    at = page(view="runs", run="first", other="second")
    choose(at, "show", show)
    assert shown(at) == wanted
    assert wanted
    accuracy = 100 * sum(in_first for in_first, _ in right.values()) / len(right)
    assert accuracies(at).loc["first", "top-1 (%)"] == pytest.approx(accuracy, abs=SHOWN)
    assert f"Of {len(first)} images" in text(at)

    row = first[wanted[0]]
    mark = "✓" if right[wanted[0]][0] else "✗"
    answer = f"{mark} {row['top1']} {100 * float(row['score1']):.0f}%"
    assert pictures(at)[0]["lines"][1] == answer


def test_of_two_runs_the_page_says_of_which_it_speaks(page, runs):
    first = predictions_of(runs, "first")
    at = page(view="runs", run="second", other="first", show="wrong")
    for key in ("show", "order"):
        assert "by second" in at.segmented_control(key=key).label
    assert at.selectbox(key="guess").label == "Predicted class by second"

    at = press(at, "swap")
    assert address_of(at) == {"view": "runs", "run": "first", "other": "second", "show": "wrong"}
    assert shown(at) == [i for i, row in first.items() if row["top1"] != row["label"]]
    assert at.selectbox(key="guess").label == "Predicted class by first"
    at = page(view="runs", run="second", other="first", part="confusion")
    assert "the name that second gives them" in text(at)


def test_most_and_least_confident_mistakes_come_first(page, runs):
    first = predictions_of(runs, "first")
    wrong = [i for i in first if first[i]["top1"] != first[i]["label"]]
    at = page(view="runs", run="first", show="wrong")
    choose(at, "order", "confidence")
    by_confidence = sorted(wrong, key=lambda i: -float(first[i]["score1"]))
    assert shown(at) == by_confidence
    assert by_confidence != wrong
    assert shown(choose(at, "order", "doubt")) == by_confidence[::-1]

    whole(at.slider(key="sure").set_value((40, 60)).run())
    middle = [i for i in by_confidence[::-1] if 0.4 <= float(first[i]["score1"]) <= 0.6]
    assert shown(at) == middle
    assert 0 < len(middle) < len(wrong)
    assert address_of(at)["sure"] == "40-60"


def test_how_sure_a_difference_is(page, runs):
    first, second = predictions_of(runs, "first"), predictions_of(runs, "second")
    right = [
        np.array([row["top1"] == row["label"] for row in rows.values()]) for rows in (first, second)
    ]
    at = page(view="runs", run="first", other="second")
    table = accuracies(at)
    change, low, high = difference_interval(right[1][None], right[0][None])
    assert table.loc["second", "difference from first (points)"] == pytest.approx(change, abs=SHOWN)
    assert table.loc["second", "95% interval of the difference"] == f"{low:+.1f} to {high:+.1f}"
    only_second, only_first = (right[1] & ~right[0]).sum(), (right[0] & ~right[1]).sum()
    assert table.loc["second", "right where first is wrong"] == only_second
    assert table.loc["second", "wrong where first is right"] == only_first
    exact = contingency_tables.mcnemar([[0, only_first], [only_second, 0]], exact=True).pvalue
    assert table.loc["second", "p"] == pytest.approx(exact, rel=0.005)

    at = page(view="runs", run="first", other="second", part="classes")
    classes = classes_of(at).set_index("class")
    corrected = holm(classes["p (McNemar)"])
    assert classes["p (Holm)"].to_numpy() == pytest.approx(corrected)
    assert (classes["p (Holm)"] > classes["p (McNemar)"]).any()
    for name in NAMES:
        of_class = np.array([row["label"] == name for row in first.values()])
        a, b = (int((x & ~y & of_class).sum()) for x, y in (right, right[::-1]))
        assert classes.loc[name, "only first right"] == a
        assert classes.loc[name, "only second right"] == b
        exact = contingency_tables.mcnemar([[0, a], [b, 0]], exact=True).pvalue
        assert classes.loc[name, "p (McNemar)"] == pytest.approx(exact)
        ends = paired_difference(b, a, int(of_class.sum()))
        assert classes.loc[name, ["from (points)", "to (points)"]].tolist() == pytest.approx(ends)


def test_the_change_of_a_class_counts_near_duplicates_once(many):
    """Of pairs that get the same answer, the interval is that of half as many images."""
    flowers = open_flowers(many)
    index = np.flatnonzero(flowers.labels == 0)
    probabilities = np.random.default_rng(3).dirichlet(np.ones(len(NAMES)), (2, N))
    probabilities[:, index[1::2]] = probabilities[:, index[::2]]
    runs = [
        dataclasses.replace(predictions_from(run), name=f"{k}")
        for k, run in enumerate(probabilities)
    ]
    one, other = (run.guess[index[::2]] == 0 for run in runs)
    once = (other & ~one).sum(), (one & ~other).sum(), len(index) // 2
    assert sum(once[:2]) > 0
    pairs = class_table(flowers, index, *runs, clusters=np.arange(len(index)) // 2).iloc[0]
    alone = class_table(flowers, index, *runs).iloc[0]
    ends = ["from (points)", "to (points)"]
    assert pairs[ends].tolist() == pytest.approx(paired_difference(*once))
    assert alone[ends].tolist() == pytest.approx(paired_difference(*(2 * k for k in once)))
    assert alone["change (points)"] == pairs["change (points)"]


@pytest.fixture(scope="session")
def three_runs(runs, truth, tmp_path_factory):
    """The two runs of `runs`, and `third`, which has made-up predictions of its own."""
    class_of, splits = truth
    folder = shutil.copytree(runs, tmp_path_factory.mktemp("web") / "three")
    rng = np.random.default_rng(2)
    rows = [made_up_row(rng, i, class_of[i]) for i in sorted(splits["test"])]
    (folder / "third").mkdir()
    write_csv(folder / "third" / "predictions.csv", rows)
    return folder


def test_several_runs(page, three_runs):
    names = ["first", "second", "third"]
    rows = {name: predictions_of(three_runs, name) for name in names}
    at = page(runs=three_runs, view="runs", run="first", other=["second", "third"])
    assert at.query_params["other"] == ["second", "third"]
    assert accuracies(at).index.tolist() == names
    right = {
        i: [rows[name][i]["top1"] == rows[name][i]["label"] for name in names]
        for i in rows["first"]
    }
    wanted = {
        "changed": [i for i in right if len({rows[name][i]["top1"] for name in names}) > 1],
        "all_right": [i for i in right if all(right[i])],
        "all_wrong": [i for i in right if not any(right[i])],
        "only_1": [i for i in right if right[i] == [True, False, False]],
        "only_3": [i for i in right if right[i] == [False, False, True]],
    }
    for show, ids in wanted.items():
        assert shown(choose(at, "show", show)) == ids
        assert ids
    i = wanted["only_3"][0]
    marks = [line[0] for line in pictures(at)[0]["lines"][1:]]
    assert shown(at)[0] == i
    assert marks == ["✗", "✗", "✓"]
    labels = at.segmented_control(key="show").options
    assert "only third right" in labels

    # Holm's correction of two p-values: the smaller one counts twice.
    first_right = np.array([r[0] for r in right.values()])
    p_values = []
    for k in (1, 2):
        other = np.array([r[k] for r in right.values()])
        cells = [[0, (first_right & ~other).sum()], [(other & ~first_right).sum(), 0]]
        p_values.append(contingency_tables.mcnemar(cells, exact=True).pvalue)
    smaller = min(1, 2 * min(p_values))
    assert min(accuracies(at)["p"].dropna()) == pytest.approx(smaller, rel=0.005)
    assert page(runs=three_runs, view="runs", run="first", other=["second", "thrid"]).warning


def test_all_runs_in_one_table(page, three_runs, tmp_path):
    runs = shutil.copytree(three_runs, tmp_path / "runs")
    settings = {"job": "train", "architecture": "tiny", "strategy": "lora", "epochs": 3}
    settings |= {"loss": "sigmoid", "lr": 0.01, "seed": 7}
    result = {"test/top1": 60.0, "test/top1_low": 50.5, "test/top1_high": 68.0, "test/n": 30}
    result |= {"trainable_image": 5, "trainable_text": 7, "train_seconds": 12.5}
    (runs / "first" / "args.json").write_text(json.dumps(settings))
    (runs / "first" / "result.json").write_text(json.dumps(result))
    # An evaluation of it, and a run that is not finished, and one that is damaged.
    evaluation = {"job": "eval", "architecture": str(runs / "first" / "model.pt")}
    (runs / "second" / "args.json").write_text(json.dumps(evaluation))
    (runs / "second" / "result.json").write_text(json.dumps({"val/top1": 70.0}))
    started = {"job": "train", "architecture": "open_clip:ViT-B-32/laion2b_s34b_b79k"}
    (runs / "third" / "args.json").write_text(json.dumps(started | {"strategy": "full"}))
    (runs / "cut").mkdir()
    (runs / "cut" / "args.json").write_text('{"job": "tr')
    # Runs without settings: one that left predictions alone, and one whose result repeats them.
    (runs / "alone").mkdir()
    shutil.copy(three_runs / "first" / "predictions.csv", runs / "alone")
    (runs / "result").mkdir()
    (runs / "result" / "result.json").write_text(json.dumps(settings | result))

    at = page(runs=runs, view="runs")
    table = at.dataframe[0].value.set_index("run")
    assert set(table.index) == {"first", "second", "third", "cut", "alone", "result"}
    first, second, third = (table.loc[name] for name in ("first", "second", "third"))
    assert first[["strategy", "architecture", "pretraining"]].tolist() == ["lora", "tiny", "random"]
    assert first[["loss", "learning rate", "seed"]].tolist() == ["sigmoid", 0.01, 7]
    assert first[["split", "top-1 (%)", "from", "to"]].tolist() == ["test", 60.0, 50.5, 68.0]
    assert first[["parameters trained", "seconds"]].tolist() == [12, 12.5]
    assert second[["strategy", "split", "top-1 (%)"]].tolist() == ["lora", "val", 70.0]
    assert third[["architecture", "pretraining"]].tolist() == ["ViT-B/32", "laion2b"]
    assert third["split"] == "not finished"
    assert table.loc["cut", "split"] == "damaged"
    assert table.loc["alone"].isna().all()
    kept = table.columns.drop("split")
    assert table.loc["result", kept].equals(first[kept])
    assert "There are no settings (args.json) of alone" in text(tick(at, "alone"))

    whole(at.multiselect(key="only_split").set_value(["val"]).run())
    assert at.dataframe[0].value["run"].tolist() == ["second"]
    # A run that ends while the page is open is in the table with its result.
    (runs / "third" / "result.json").write_text(json.dumps({"test/top1": 50.0}))
    at = page(runs=runs, view="runs")
    assert at.dataframe[0].value.set_index("run").loc["third", "top-1 (%)"] == 50.0
    at = press(page(runs=runs, view="runs", run="first", other="second"), "all_runs")
    assert ticked(at) == ["first", "second"]  # to add a third
    assert address_of(press(at, "untick")) == {"view": "runs"}


def write_run(folder, result=None, **settings):
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps(settings))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))


def table_of(runs):
    return run_table(runs, [folder.name for folder in runs.iterdir()]).set_index("run")


def test_the_table_says_what_was_trained_as_the_report_does(tmp_path):
    done = {"test/top1": 50.0, "convention": "swapped"}
    trained = {"job": "train", "architecture": "tiny", "epochs": 3}
    for k, strategy in enumerate(("full", "full", "lora")):
        write_run(tmp_path / f"{k}", done, **trained, strategy=strategy, seed=k, lr=0.1)
    for name, members in (("full", "01"), ("mixed", "02"), ("unknown", "03")):
        soup = [f"elsewhere/{member}" for member in members]
        write_run(tmp_path / f"{name} soup", done, job="eval", architecture="tiny", soup=soup)
    asked = {"job": "qwen_eval", "architecture": "Qwen2", "protocol": "rank"}
    write_run(tmp_path / "zero-shot (rank)", done, **asked)
    write_run(tmp_path / "lora (rank, names listed)", done, **asked, adapter="q", list_names=True)
    probe = {"job": "qwen_probe", "architecture": "Qwen2", "features": "pooled"}
    write_run(tmp_path / "linear (probe of pooled)", done | {"chosen_on": "val"}, **probe)
    # Whoever evaluates a soup, by its folder or its file, evaluates what its runs have trained.
    for path in ("full soup", "full soup/model.pt"):
        evaluation = {"job": "eval", "architecture": f"elsewhere/{path}", "seed": 5}
        write_run(tmp_path / f"of {path}".replace("/", " "), done, **evaluation)
    table = table_of(tmp_path).drop(["0", "1", "2"])
    of_soup = [table.loc[name] for name in ("full soup", "of full soup", "of full soup model.pt")]
    for row in of_soup:
        assert row[["strategy", "pretraining", "learning rate"]].tolist() == [
            "full soup",
            "random",
            0.1,
        ]
        assert np.isnan(row["seed"])  # they differ
    table = table.drop([row.name for row in of_soup[1:]])
    assert table["strategy"].tolist() == table.index.tolist()
    assert not {"trained on", "overlap"} & set(table.columns)


def test_the_table_says_what_can_t_be_compared(tmp_path):
    done = {"test/top1": 50.0, "convention": "swapped"}
    trained = {"job": "train", "architecture": "tiny", "strategy": "full", "epochs": 3}
    write_run(tmp_path / "base", done, **trained, classes="base")
    write_run(tmp_path / "all", done | {"overlap": 0}, **trained, classes="all")
    seen = done | {"overlap": 7, "convention": "official"}
    write_run(tmp_path / "eval", seen, job="eval", architecture="base/model.pt")
    table = table_of(tmp_path)
    assert table.loc[["base", "eval"], "trained on"].tolist() == ["base", "base"]
    assert table["trained on"].notna().sum() == 2
    assert table.loc["eval", ["split", "overlap"]].tolist() == ["test (official)", "7"]
    assert table.loc["all", "split"] == "test (swapped)"
    assert table["overlap"].notna().sum() == 1
    assert "calibrated" not in table
    # An ECE of calibrated probabilities is another one. A training has found, and not used it.
    write_run(tmp_path / "held", done | {"calibration_temperature": 2.0}, **trained)
    used = done | {"calibration_temperature": 1.25, "calibrated": True}
    write_run(tmp_path / "used", used, job="eval", architecture="held")
    assert table_of(tmp_path)["calibrated"].dropna().to_dict() == {"used": 1.25}


@pytest.mark.parametrize("path", ["gone", "gone/model.pt", "file.pt", "open_clip:a/file.bin"])
def test_of_a_model_that_nothing_is_known_of_the_table_says_so(tmp_path, path):
    """By its name alone it can't be told from one that was not trained."""
    done = {"test/top1": 50.0, "convention": "swapped"}
    write_run(tmp_path / "eval", done, job="eval", architecture=path, seed=0)
    row = table_of(tmp_path).loc["eval"]
    assert row["strategy"] == "unknown"
    assert row[["pretraining", "loss", "learning rate", "seed"]].isna().all()
    assert row["top-1 (%)"] == 50.0


def test_the_table_looks_for_the_run_that_was_meant(tmp_path, monkeypatch):
    """Not one that is called like a model, nor another of the same name elsewhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    done = {"test/top1": 50.0}
    for folder in ("RN50", "start", "runs/RN50", "runs/start"):
        strategy = "lora" if folder.startswith("runs") else "full"
        trained = {"job": "train", "architecture": "tiny", "strategy": strategy, "epochs": 3}
        write_run(tmp_path / folder, done, **trained)
    write_run(tmp_path / "runs/zero", done, job="eval", architecture="RN50")
    write_run(tmp_path / "runs/eval", done, job="eval", architecture="start")
    (tmp_path / "runs/cut").mkdir()
    (tmp_path / "runs/cut/args.json").write_text('{"job": "tr')
    write_run(tmp_path / "runs/of_cut", done, job="eval", architecture="runs/cut/model.pt")
    table = table_of(tmp_path / "runs")
    zero = table.loc["zero", ["strategy", "architecture", "pretraining"]]
    assert zero.tolist() == ["none", "RN50", "openai"]
    assert table.loc["eval", "strategy"] == "lora"
    assert table.loc["of_cut", ["strategy", "split", "top-1 (%)"]].tolist() == [
        "unknown",
        "test",
        50.0,
    ]


def tick(at, *names):
    """Tick runs in the table of all runs."""
    key = re.search("runs_table.*", at.dataframe[0].proto.id)[0]
    shown = at.dataframe[0].value["run"].tolist()
    rows = [shown.index(name) for name in names]
    at.session_state[key] = {"selection": {"rows": rows, "columns": [], "cells": []}}
    return whole(at.run())


def ticked(at):
    """The runs that are ticked, by the rows that the browser is told."""
    shown = at.dataframe[0].value["run"].tolist()
    rows = json.loads(at.dataframe[0].proto.selection_default)["selection"]["rows"]
    assert address_lists(at).get("ticked", []) == [shown[row] for row in rows]
    return [shown[row] for row in rows]


def formats_of(at):
    """How the columns of the table of all runs are shown."""
    return json.loads(at.dataframe[0].proto.columns)


def address_lists(at):
    return {key: list(np.atleast_1d(value)) for key, value in at.query_params.items()}


def test_ticks_are_of_runs_and_not_of_rows(page, three_runs, tmp_path):
    runs = shutil.copytree(three_runs, tmp_path / "runs")
    (runs / "bare").mkdir()
    strategies = {"first": "full", "second": "linear", "third": "linear", "bare": "full"}
    for name, strategy in strategies.items():
        settings = {"job": "train", "architecture": "tiny", "strategy": strategy}
        (runs / name / "args.json").write_text(json.dumps(settings))
    at = tick(page(runs=runs, view="runs"), "first", "second", "bare")
    assert "Left out, as they have no predictions: bare." in text(at)
    assert "compare" in [button.key for button in at.button]
    # Other rows stand where the ticked ones stood, which stay ticked, shown or not.
    whole(at.multiselect(key="only_strategy").set_value(["linear"]).run())
    assert set(at.dataframe[0].value["run"]) == {"second", "third"}
    assert "Ticked, too, but not shown: first, bare." in text(at)
    assert address_lists(at)["ticked"] == ["first", "second", "bare"]
    assert at.button(key="compare").label == "Compare 2 ticked runs"
    at = tick(press(at, "untick"), "third")
    at = press(tick(at, "second", "third"), "compare")  # in the order in which they were ticked
    assert address_of(at) == {
        "view": "runs",
        "run": "third",
        "other": "second",
        "only_strategy": "linear",
    }


def test_the_table_of_runs_is_in_the_address(page, three_runs, tmp_path):
    runs = shutil.copytree(three_runs, tmp_path / "runs")
    for name, top1 in (("first", 50.0), ("second", 70.0), ("third", None)):
        settings = {"job": "train", "architecture": "tiny", "strategy": "full", "epochs": 3}
        (runs / name / "args.json").write_text(json.dumps(settings))
        if top1:
            (runs / name / "result.json").write_text(json.dumps({"test/top1": top1}))
    at = page(runs=runs, view="runs")
    select(at, "sorted", "top-1 (%)")
    assert at.dataframe[0].value["run"].tolist() == ["second", "first", "third"]
    choose(at, "direction", "ascending")
    assert at.dataframe[0].value["run"].tolist() == ["first", "second", "third"]
    write(at, "named", "IR")
    whole(at.multiselect(key="only_strategy").set_value(["full"]).run())
    at = tick(at, "third", "first")
    address = address_lists(at)
    assert address == {
        "view": ["runs"],
        "named": ["IR"],
        "only_strategy": ["full"],
        "sorted": ["top-1 (%)"],
        "direction": ["ascending"],
        "ticked": ["third", "first"],
    }

    again = page(runs=runs, **address)
    assert address_lists(again) == address
    assert again.dataframe[0].value["run"].tolist() == ["first", "third"]
    default = json.loads(again.dataframe[0].proto.selection_default)
    assert sorted(default["selection"]["rows"]) == [0, 1]
    # Back to where less was ticked: the table is told so.
    again.query_params["ticked"] = ["third"]
    assert ticked(whole(again.run())) == ["third"]
    # What there is not is said, and is not in the way.
    odd = page(runs=runs, view="runs", ticked=["thrid", "first"], sorted="shots", only_split="none")
    assert "There is no run thrid" in text(odd)
    assert odd.dataframe[0].value.empty
    assert odd.button(key="compare").label == "See predictions of the ticked run"


def test_true_and_predicted_class_open_a_cell_of_the_confusion_matrix(page, runs):
    first = predictions_of(runs, "first")
    pairs = [(row["label"], row["top1"]) for row in first.values()]
    cell = next((label, guess) for label, guess in pairs if label != guess)
    at = page(view="runs", run="first")
    select(at, "class", cell[0])
    select(at, "guess", cell[1])
    in_cell = [i for i, pair in zip(first, pairs) if pair == cell]
    assert shown(at) == in_cell
    assert in_cell

    at = page(view="runs", run="first", part="confusion")
    drawn = re.findall(
        'data-open="([0-9]+),([0-9]+)" title="(.*?): ([0-9]+) of ([0-9]+)"', html(at, "confusion")
    )
    # The names by number, as the cells say both.
    name_of = {int(true): title.split(" → ")[0] for true, _, title, *_ in drawn}
    assert set(name_of.values()) == set(NAMES)
    counts = {}
    totals = {}
    for true, guess, title, count, total in drawn:
        true, guess = name_of[int(true)], name_of[int(guess)]
        assert title == f"{true} → {guess}"
        counts[true, guess] = int(count)
        totals[true] = int(total)
    assert counts == Counter(pairs)
    assert cell in counts
    assert totals == Counter(row["label"] for row in first.values())


def test_classes_are_sorted_by_change(page, runs):
    first, second = predictions_of(runs, "first"), predictions_of(runs, "second")
    at = page(view="runs", run="first", other="second", part="classes")
    table = classes_of(at)
    changes = []
    for name in NAMES:
        images = [i for i in first if first[i]["label"] == name]
        accuracy, accuracy_of_second = (
            100 * np.mean([rows[i]["top1"] == name for i in images]) for rows in (first, second)
        )
        row = table[table["class"] == name].iloc[0]
        assert row["accuracy of first (%)"] == pytest.approx(accuracy)
        assert row["accuracy of second (%)"] == pytest.approx(accuracy_of_second)
        assert row["images"] == len(images)
        changes.append(accuracy_of_second - accuracy)
    by_size = sorted(changes, key=lambda change: -abs(change))
    assert table["change (points)"].tolist() == pytest.approx(by_size)
    assert len(set(changes)) > 1

    at = page(view="runs", run="first", part="classes")
    assert classes_of(at)["accuracy of first (%)"].is_monotonic_increasing


def test_an_image_shows_what_both_runs_say(page, runs):
    i = next(iter(predictions_of(runs, "first")))
    at = page(view="runs", run="first", other="second", image=str(i))
    tables = rankings(html(at, "image"))
    assert [run for run, _ in tables] == ["first", "second"]
    for run, best in tables:
        row = predictions_of(runs, run)[i]
        names = [row[f"top{k}"] for k in range(1, 6)]
        percent = [100 * float(row[f"score{k}"]) for k in range(1, 6)]
        marked = [name for name, _ in best if name.startswith("✓")]
        assert [name.removeprefix("✓ ") for name, _ in best] == names
        assert marked == ([f"✓ {row['label']}"] if row["label"] in names else [])
        # The page shows one decimal.
        assert [shown for _, shown in best] == pytest.approx(percent, abs=0.051)


# -----------------------------------------------------------------------------
# search


def reference(runs, many, sentence):
    """Similarities of all images by clip's own code, with its tokenizer and transform."""
    model, preprocess = clip.load(str(runs / "first" / "model.pt"), device="cpu")
    files = sorted((many / "jpg").glob("*.jpg"))
    with torch.no_grad():
        words = model.encode_text(clip.tokenize([sentence]))[0]
        images = model.encode_image(torch.stack([preprocess(Image.open(file)) for file in files]))
    return torch.cosine_similarity(images, words[None]).numpy()


def test_an_image_has_calibrated_probabilities_where_a_run_has_a_temperature(
    page, three_runs, many, tmp_path
):
    folder = shutil.copytree(three_runs, tmp_path / "runs")
    first, second = folder / "first", folder / "second"
    (first / "calibration.json").write_text(json.dumps({"temperature": 2.5}))
    (first / "class_names.json").write_text(json.dumps({"names": NAMES}))
    # An evaluation with --calibrated, whose predictions are calibrated already.
    result = {"calibration_temperature": 1.25, "calibrated": True}
    (second / "result.json").write_text(json.dumps(result))
    # A training with --holdout has found one, and written its predictions without.
    (first / "result.json").write_text(json.dumps({"calibration_temperature": 2.5}))
    i = next(iter(predictions_of(folder, "first")))
    at = page(runs=folder, view="runs", run="first", other=["second", "third"], image=str(i))
    before = dict(rankings(html(at, "image")))
    of_second = "second: calibrated (T = 1.25), found on val"
    assert list(before) == ["first: not calibrated", of_second, "third: not calibrated"]
    calibrated = choose(at, "probabilities", "calibrated")
    assert address_of(calibrated)["probabilities"] == "calibrated"
    (title, best), *others = rankings(html(calibrated, "image"))
    assert title == "first: calibrated (T = 2.5), found on val"
    assert [name for name, _ in others] == [of_second, "third: not calibrated"]
    assert [answers for _, answers in others] == [*before.values()][1:]

    model, _ = clip.load(str(first / "model.pt"), device="cpu")
    cosines = [reference(folder, many, f"a {name}")[i - 1] for name in NAMES]
    wanted = scipy.special.softmax(np.array(cosines) * model.logit_scale.exp().item() / 2.5)
    for name, percent in best:
        c = NAMES.index(name.removeprefix("✓ "))
        assert percent == pytest.approx(100 * wanted[c], abs=0.1)
    assert [percent for _, percent in best] == sorted([p for _, p in best], reverse=True)

    # Found for other names: it is not this head's.
    (first / "class_names.json").write_text(json.dumps({"names": NAMES[::-1]}))
    (title, _), *_ = rankings(
        html(
            page(runs=folder, view="runs", run="first", image=str(i), probabilities="calibrated"),
            "image",
        )
    )
    assert title == "first: not calibrated"


def test_search_by_a_sentence(page, runs, many):
    sentence = "a red flower on black"
    at = page(view="search", model="first")
    assert not shown(at)
    write(at, "q", sentence)
    expected = reference(runs, many, sentence)
    assert len(scores(at)) == 48
    assert scores(at) == sorted(scores(at), reverse=True)
    # The page resizes on uint8, and shows three decimals.
    assert scores(at) == pytest.approx([expected[i - 1] for i in shown(at)], abs=3e-3)
    assert min(scores(at)) >= np.sort(expected)[-48] - 3e-3
    assert address_of(at)["q"] == sentence

    at = page(view="search", model="first", q=sentence, image=str(shown(at)[1]))
    assert "2 of 120" in text(at)


def test_search_by_a_picture_of_ones_own(page, many):
    data = (many / "jpg" / "image_00033.jpg").read_bytes()
    at = page(view="search", model="first")
    whole(at.file_uploader[0].upload("mine.jpg", data, "image/jpeg").run())
    assert shown(at)[0] == 33
    assert scores(at)[0] > 0.999
    _, best = rankings(html(at, "answer"))[0]
    percent = [shown for _, shown in best]
    assert len(best) == 5
    assert {name for name, _ in best} < set(NAMES)
    assert percent == sorted(percent, reverse=True)


def test_of_a_sentence_and_a_picture_the_latter_is_searched(page, many):
    data = (many / "jpg" / "image_00033.jpg").read_bytes()
    sentence = "a red flower on black"
    at = page(view="search", model="first", q=sentence)
    by_sentence = shown(at)
    whole(at.file_uploader[0].upload("mine.jpg", data, "image/jpeg").run())
    by_picture = shown(at)
    assert by_picture[0] == 33
    assert by_picture != by_sentence
    assert "Your picture mine.jpg" in text(at)

    choose(at, "by", "sentence")
    assert shown(at) == by_sentence
    assert not html(at, "answer")
    choose(at, "by", "picture")
    assert shown(at) == by_picture
    write(at, "q", "a rose")
    assert html(at, "answer") == ""


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
    "large": b"\xff\xd8" + bytes(MAX_UPLOAD_BYTES),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_upload_is_a_sentence(name):
    with pytest.raises(UserError, match="^this (file|picture) (can't be read|has)"):
        open_picture(BROKEN[name])


def test_a_bad_upload_leaves_the_page_whole(page):
    at = page(view="search", model="first")
    at.file_uploader[0].upload("bad.jpg", BROKEN["half"], "image/jpeg").run()
    assert "can't be read as a picture" in as_read(whole(at, fails=True).error[0])

    # What is larger is refused before it could go to a temporary file.
    from starlette.formparsers import MultiPartParser

    assert MultiPartParser.spool_max_size > MAX_UPLOAD_BYTES


def test_good_pictures_of_all_kinds_open_upright():
    kinds = (
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("JPEG", "CMYK"),
        ("JPEG", "L"),
        ("WEBP", "RGB"),
        ("PNG", "I;16"),
    )
    for kind, mode in kinds:
        out = io.BytesIO()
        Image.new(mode, (40, 30)).save(out, kind)
        assert open_picture(out.getvalue()).shape == (30, 40, 3)

    out = io.BytesIO()
    image = Image.new("RGB", (40, 30))
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: turned by a quarter
    image.save(out, "JPEG", exif=exif)
    assert open_picture(out.getvalue()).shape == (40, 30, 3)


def test_transparent_parts_are_white_and_16_bits_are_scaled(tmp_path):
    hidden = Image.new("RGBA", (40, 40), (200, 0, 0, 0))  # red that nobody sees
    hidden.paste((0, 0, 255, 255), (0, 0, 40, 20))
    grey = Image.fromarray(np.full((40, 40), 0x8080, np.uint16))
    for image, rows in ((hidden, [(0, 0, 255), (255, 255, 255)]), (grey, [(128,) * 3] * 2)):
        file = tmp_path / "picture.png"
        image.save(file)
        picture = open_picture(file.read_bytes())
        assert [tuple(picture[10, 20]), tuple(picture[30, 20])] == rows
        small = read_thumbnail(thumbnail(file)).astype(int)
        seen = [small[30, 80], small[130, 80]]
        assert np.abs(np.array(seen) - rows).max() < 8  # a JPEG


# -----------------------------------------------------------------------------
# the map


def on_a_circle(n):
    """Points on three quarters of a circle in 5 dimensions, and their angles."""
    angles = np.random.default_rng(0).permutation(np.linspace(0, 1.5 * np.pi, n))
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    turned = circle @ np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0][:2]
    return turned.astype(np.float32), angles


def test_the_map_unrolls_what_is_curved_and_is_kept(many, tmp_path, monkeypatch):
    shutil.copytree(many, tmp_path / "data", symlinks=True, ignore=lambda *_: {".cache"})
    flowers = open_flowers(tmp_path / "data")
    features, angles = on_a_circle(N)
    features[7] = np.nan  # an image that can't be read
    places = atlas.image_map(flowers, features)
    assert np.isnan(places[7]).all()
    readable = np.arange(N) != 7
    assert np.isfinite(places[readable]).all()
    # Along the first axis the images lie as along the arc, which straight distances would not give.
    assert abs(np.corrcoef(places[readable, 0], angles[readable])[0, 1]) > 0.999

    monkeypatch.setattr(atlas, "isomap", None)  # called once more, it would fail
    assert np.array_equal(atlas.image_map(flowers, features), places, equal_nan=True)
    with pytest.raises(TypeError):
        atlas.image_map(flowers, features + 1)  # other features have a map of their own
    with pytest.raises(UserError, match="3 images"):
        atlas.image_map(flowers, np.full((N, 5), np.nan, np.float32))


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,nan", "1,2,3,4,5", "a,b,c,d", "1e9,1,1,1"])
def test_a_box_that_is_none(text):
    assert atlas.parse_box(text) is None


def test_a_box_is_written_as_it_is_read():
    text = atlas.box_text({"x": [1.25, -3], "y": [0.5, 0.0001]})
    assert atlas.parse_box(text) == (-3, 1.25, 0, 0.5)
    assert atlas.box_text({}) == ""
    places = np.array([[0, 0.1], [2, 0.1], [0, -1], [np.nan, np.nan]])
    assert atlas.in_box(places, atlas.parse_box(text)).tolist() == [True, False, False, False]


def chart_of(at):
    """The map's table, and its specification; the table has the title that is shown."""
    (chart,) = at.get("vega_lite_chart")
    sent = chart.proto.datasets[0].data.data
    table = pyarrow.ipc.open_stream(sent).read_pandas()
    # But for the pictures a dot takes few bytes: each name is sent once.
    assert len(sent) < table["webp"].str.len().sum() + 30 * len(table) + 4000
    spec = json.loads(chart.proto.spec)
    shown = {each["as"]: each["calculate"] for each in spec["transform"]}
    assert shown["title"] == "datum.id + ' ' + datum.name"
    table["title"] = table["id"].astype(str) + " " + table["name"].astype(str)
    return table, spec


def test_the_map_shows_each_image_and_lists_those_in_a_box(page, truth, runs):
    class_of, splits = truth
    at = page(view="map", laid="first")
    table, spec = chart_of(at)
    assert not shown(at) and not at.button  # nothing is listed without a box
    titles = {f"{i} {name}" for i, name in class_of.items()}
    assert set(table["title"]) == titles
    for webp in table["webp"]:
        with Image.open(io.BytesIO(base64.b64decode(webp))) as picture:
            assert picture.format == "WEBP"
    groups = dict(zip(table["title"], table["group"]))
    assert groups == {title: title.split(" ", 1)[1] for title in titles}

    choose(at, "colour", "split")
    table, _ = chart_of(at)
    assert Counter(table["group"]) == {name: len(ids) for name, ids in splits.items()}

    choose(at, "colour", "outcome")
    select(at, "judged", "second")
    rows = predictions_of(runs, "second")
    right = sum(row["top1"] == row["label"] for row in rows.values())
    wrong = len(rows) - right
    table, _ = chart_of(at)
    expected = {"right": right, "wrong": wrong, "not predicted": N - right - wrong}
    assert Counter(table["group"]) == expected
    assert (table["group"][: expected["not predicted"]] == "not predicted").all()  # below the rest

    # A box around the images on the left of the median, by the address.
    left, right = table["x"].min(), table["x"].median()
    box = f"{left - 1:.3f},{right:.3f},{table['y'].min() - 1:.3f},{table['y'].max() + 1:.3f}"
    in_it = table["title"][table["x"] <= float(f"{right:.3f}")]
    inside = {int(title.split()[0]) for title in in_it}
    again = page(view="map", laid="first", box=box)
    _, spec = chart_of(again)
    value = next(p["value"] for p in spec["params"] if p["name"] == "box")
    assert [*value["x"], *value["y"]] == [float(end) for end in box.split(",")]
    n_listed = f"1 to 48 of {len(inside)} images"
    assert n_listed in text(again)
    assert shown(again) == sorted(inside)[:48]
    assert address_of(press(again, "remove_box")) == {"view": "map", "laid": "first"}
    _, spec = chart_of(again)
    assert not shown(again) and not again.button
    assert "value" not in next(p for p in spec["params"] if p["name"] == "box")


def test_another_layout_begins_without_a_box(page):
    at = page(view="map", laid="first", box="-9,9,-9,9")
    assert shown(at)
    select(at, "laid", "colours")
    assert address_of(at) == {"view": "map"}
    assert not shown(at)


def test_a_map_by_a_run_that_is_gone_is_none(page):
    at = page(view="map", laid="deleted")
    assert "There is no run deleted" in text(at)
    assert not at.get("vega_lite_chart")


# -----------------------------------------------------------------------------
# addresses


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
        {"view": "runs", "run": "first", "sure": "20-70", "order": "doubt"},
        {"view": "search", "model": "first", "q": "a rose"},
    ],
    ids=str,
)
def test_every_address_opens_the_same_view_again(page, address):
    at = page(**address)
    assert address_of(at) == address  # nothing is lost or added
    again = page(**address_of(at))
    assert shown(again) == shown(at)
    assert shown(again, "neighbours") == shown(at, "neighbours")
    assert text(again) == text(at)


def test_a_view_keeps_its_run_when_another_view_changes_its_own(page, runs, tmp_path):
    folder = shutil.copytree(runs, tmp_path / "runs")
    shutil.copy(folder / "first" / "model.pt", folder / "second")
    at = page(runs=folder, view="runs", run="first")
    select(choose(at, "view", "search"), "model", "second")
    assert accuracies(choose(at, "view", "runs")).index.tolist() == ["first"]
    assert at.selectbox(key="run").value == "first"

    # Older links call it `run`.
    at = page(runs=folder, view="search", run="second", q="a rose")
    assert address_of(at) == {"view": "search", "model": "second", "q": "a rose"}


def test_the_grid_follows_who_goes_on_from_image_to_image(page):
    at = press(page(image="48"), "Next_image")
    at = press(at, "to_grid")
    assert shown(at) == list(range(49, 97))
    assert address_of(at) == {"page": "2"}
    assert re.findall('data-open="([0-9]+)" href="[^"]*" class="on"', html(at)) == ["49"]


def test_going_back_in_the_browser_goes_back(page):
    at = press(page(), "next_page")
    at.query_params.pop("page")
    assert shown(whole(at.run())) == list(range(1, 49))


MISSING = [
    {"view": "runs", "run": "thrid"},
    {"view": "runs", "run": "first", "other": "thrid"},
    {"view": "runs", "run": "first", "other": "thrid", "part": "classes"},
    {"view": "search", "model": "thrid", "q": "a rose"},
    {"image": "17", "like": "thrid"},
]


@pytest.mark.parametrize("address", MISSING, ids=str)
def test_a_run_that_is_gone_is_never_replaced_by_another(page, address):
    at = page(**address)
    assert "There is no run thrid with" in text(at)
    assert "%" not in text(at)
    assert not shown(at)
    assert not shown(at, "neighbours")
    assert not at.dataframe
    assert address_of(at) == address  # to be sent on, or to be opened when the run is back


def test_a_run_that_is_deleted_while_the_page_is_open(page, runs, tmp_path):
    folder = shutil.copytree(runs, tmp_path / "runs")
    at = page(runs=folder, view="runs", run="second")
    shutil.rmtree(folder / "second")
    assert "There is no run second" in text(whole(at.run()))
    assert accuracies(select(at, "run", "first")).index.tolist() == ["first"]


HOSTILE = [
    "../../etc/passwd",
    "<script>alert(1)</script>",
    "\x00",
    "-1",
    "0",
    "9" * 400,
    "٣",  # a digit, but no number of ours
    "nan",
    "None",
    "first/../second",
    "..",
    "",
    ["a", "b"],
]
CHOICES = [
    "class",
    "split",
    "bars",
    "page",
    "image",
    "run",
    "other",
    "model",
    "part",
    "show",
    "guess",
    "order",
    "also",
    "like",
    "q",
    "where",
    "looker",
    "target",
    "words",
]


@pytest.mark.parametrize("value", HOSTILE, ids=lambda v: repr(v)[:24])
def test_hostile_addresses_show_what_there_is(page, value):
    # All but the file ids, which may be of no image.
    at = page(view=value, **dict.fromkeys(CHOICES, value))
    assert len(shown(at)) == 48
    for view in ("runs", "search"):
        at = page(view=view, **dict.fromkeys([*CHOICES, "ids"], value))
        assert "root:" not in text(at)  # of /etc/passwd
        assert set(shown(at)) <= set(range(1, N + 1))


def test_no_message_is_sent_as_a_hash(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # without the repository's .streamlit/config.toml
    page()
    message = ForwardMsg()
    message.delta.new_element.markdown.body = "a" * 10_000_000
    populate_hash_if_needed(message)
    assert not message.metadata.cacheable


# -----------------------------------------------------------------------------
# what is damaged or missing


def copy(many, tmp_path):
    return shutil.copytree(many, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))


@pytest.mark.parametrize("harm", ["setid.mat", "imagelabels.mat", "jpg", "cut", "folder"])
def test_a_damaged_dataset_is_a_sentence_with_a_command(page, many, tmp_path, harm):
    root = copy(many, tmp_path)
    if harm == "jpg":
        shutil.rmtree(root / "jpg")
    elif harm == "cut":
        (root / "setid.mat").write_bytes((root / "setid.mat").read_bytes()[:150])
    elif harm == "folder":
        shutil.rmtree(root)
    else:
        (root / harm).unlink()
    message = as_read(page(root, fails=True).error[0])
    assert "python -m flowers.data" in message
    assert str(root) in message
    assert "\n" not in message


def test_a_dataset_that_is_mended_opens_without_a_restart(page, many, tmp_path):
    root = copy(many, tmp_path)
    data = (root / "setid.mat").read_bytes()
    (root / "setid.mat").unlink()
    at = page(root, fails=True)
    (root / "setid.mat").write_bytes(data)
    assert len(shown(whole(at.run()))) == 48


def test_a_damaged_image_does_not_hide_the_others(page, many, tmp_path):
    root = copy(many, tmp_path)
    (root / "jpg" / "image_00003.jpg").write_bytes(b"\xff\xd8 nothing")
    assert [picture["id"] for picture in pictures(page(root)) if not picture["src"]] == [3]
    message = as_read(page(root, image="3", fails=True).error[0])
    assert "python -m flowers.data" in message


def test_an_image_of_the_dataset_may_be_larger_than_an_upload(page, many, tmp_path):
    root = copy(many, tmp_path)
    Image.new("RGB", (2100, 100), "red").save(root / "jpg" / "image_00003.jpg")
    assert "2100 x 100 pixels" in text(page(root, image="3"))


def test_the_stamp_of_a_run_changes_with_each_of_its_files(tmp_path):
    prompts = tmp_path / "prompts.json"
    (tmp_path / "args.json").write_text(json.dumps({"prompts": str(prompts)}))
    stamps = {kept.stamp_of_run(tmp_path)}
    names = ("model.pt", "classifier.pt", "calibration.json", "class_names.json", "prompts.json")
    for name in names:
        (tmp_path / name).touch()
        stamps.add(kept.stamp_of_run(tmp_path))
    assert len(stamps) == 6


def test_a_missing_image_costs_that_image_alone(page, many, tmp_path):
    root = copy(many, tmp_path)
    lost = root / "jpg" / "image_00003.jpg"
    lost.unlink()
    at = page(root)
    assert shown(at) == [1, 2, *range(4, 50)]
    assert "1 to 48 of 119 images" in text(at)
    assert f"missing image {lost} (1 of 120 listed" in text(at)
    assert "python -m flowers.data" in text(at)
    none = page(root, image="3")
    assert "There is no image 3 " in text(none)
    assert none.selectbox(key="class") and shown(none) == shown(at)  # the view itself instead


def test_a_damaged_image_is_not_searched_and_the_others_are(page, many, tmp_path):
    root = copy(many, tmp_path)
    search = {"view": "search", "model": "first", "q": "a rose"}
    whole_order = []
    for number in "123":
        whole_order += shown(page(many, page=number, **search))
    assert sorted(whole_order) == list(range(1, N + 1))

    (root / "jpg" / "image_00003.jpg").write_bytes(b"\xff\xd8 nothing")
    rest = []
    for number in "123":
        rest += shown(page(root, page=number, **search))
    assert rest == [i for i in whole_order if i != 3]


def test_what_is_computed_in_the_background_has_a_bar():
    with tqdm(total=200, desc="encoding images", file=io.StringIO()) as bar:
        bar.update(50)
        assert kept.progress("Loading the model") == ("Encoding images: 50 of 200", 0.25)
    assert kept.progress("Loading the model") == ("Loading the model", 0.0)


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
    message = as_read(page(runs=folder, view="runs", run="second", fails=True).error[0])
    assert "python baseline_eval.py" in message or "streamlit run web.py" in message
    assert shown(page(runs=folder, view="runs", run="first"))  # the other run is as it was


def test_a_run_of_another_dataset_says_which(page, runs, tmp_path):
    folder = shutil.copytree(runs, tmp_path / "runs")
    row = {"file": "image_00001.jpg", "label": "tulip", "top1": "tulip", "score1": 1}
    write_csv(folder / "second" / "predictions.csv", [row])
    message = as_read(page(runs=folder, view="runs", run="second", fails=True).error[0])
    assert "--data_root elsewhere" in message


def test_the_newest_run_of_this_dataset_and_split_comes_first(page, runs, truth, tmp_path):
    class_of, splits = truth
    folder = tmp_path / "runs"
    row = {"file": "image_00001.jpg", "label": "tulip", "top1": "tulip", "score1": 1}
    i = min(splits["train"])
    trained = {**row, "file": f"image_{i:05d}.jpg", "label": class_of[i], "top1": class_of[i]}
    shutil.copytree(runs / "first", folder / "demo" / "before")
    shutil.copytree(runs / "second", folder / "demo" / "after")
    for name, rows in (("tulips", [row]), ("official", [trained])):
        (folder / name).mkdir()
        write_csv(folder / name / "predictions.csv", rows)
    # Without settings there is no table of all runs, and a run is chosen.
    for path in folder.glob("*/*/args.json"):
        path.unlink()
    names = ("demo/before", "demo/after", "tulips", "official")
    for age, name in enumerate(names):
        os.utime(folder / name, (10**9 + age, 10**9 + age))

    at = page(runs=folder, view="runs")
    assert accuracies(at).index.tolist() == ["demo/after"]
    assert address_of(at)["run"] == "demo/after"
    assert at.selectbox(key="run").options == [
        "demo/after",
        "demo/before",
        "official (another split)",
        "tulips (another dataset)",
    ]
    assert page(runs=folder, view="search").selectbox(key="model").options == ["demo/before"]


def test_damaged_models_and_arguments(page, runs, tmp_path):
    folder = shutil.copytree(runs, tmp_path / "runs")
    (folder / "first" / "args.json").write_text('{"prompt_template": 7')
    assert shown(page(runs=folder, view="search", q="a rose"))

    (folder / "first" / "model.pt").write_bytes(b"no model")
    message = as_read(page(runs=folder, view="search", q="a rose", fails=True).error[0])
    assert "can't be read" in message


def test_without_runs_the_page_says_how_to_make_one(page, tmp_path):
    for view in ("runs", "search"):
        at = page(runs=tmp_path / "none", view=view)
        assert "python train.py" in text(at)
        assert "--runs" in text(at)


def test_mistaken_flags_are_a_sentence(page, cli):
    at = page(more=["--colour", "red"], fails=True)
    assert "unrecognized arguments" in as_read(at.error[0])
    assert "streamlit run web.py" in error_line(cli("web.py"))
    assert "--runs" in cli("web.py", "--help")[1]


# -----------------------------------------------------------------------------
# the parts, without the page


def predictions_from(probabilities):
    """Predictions whose five best classes are those of probabilities (N, C)."""
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :5]
    top = tuple(
        tuple((int(c), float(row[c])) for c in best) for row, best in zip(probabilities, order)
    )
    return Predictions("made", top, order[:, 0], np.take_along_axis(probabilities, order, 1)[:, 0])


def test_planted_label_errors_come_first():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 300)
    runs = []
    for _ in range(2):
        logits = rng.normal(size=(300, 6)) + 4 * np.eye(6)[labels]
        runs.append(predictions_from(scipy.special.softmax(logits, axis=1)))
    planted = rng.choice(300, 12, replace=False)
    given = labels.copy()
    given[planted] = (labels[planted] + 1 + rng.integers(0, 5, 12)) % 6
    found = likely_label_errors(given, 6, *runs)
    assert len(set(found[:12]) & set(planted)) >= 10
    assert len(found) < 40

    # The rule once more, image by image: the mean of the runs, and each class's own threshold.
    mean = np.zeros((300, 6))
    for run in runs:
        for i, best in enumerate(run.top):
            for c, probability in best:
                mean[i, c] += probability / 2
    least = [mean[given == c, c].mean() for c in range(6)]
    doubted = {}
    for i in range(300):
        likely = [c for c in range(6) if mean[i, c] >= least[c]]
        if likely and max(likely, key=lambda c: mean[i, c]) != given[i]:
            others = [mean[i, c] for c in range(6) if c != given[i]]
            doubted[i] = mean[i, given[i]] - max(others)
    assert found.tolist() == sorted(doubted, key=doubted.get)


def test_a_class_without_images_casts_no_doubt():
    probabilities = np.array([[0.2, 0.1, 0.7], [0.1, 0.8, 0.1]])
    found = likely_label_errors(np.array([0, 1]), 3, predictions_from(probabilities))
    assert not len(found)


def test_confused_classes_stand_together():
    true = np.repeat(np.arange(6), 20)
    guess = true.copy()
    for one, two in ((0, 3), (1, 4), (2, 5)):
        guess[true == one] = np.where(np.arange(20) < 8, two, one)
    order = order_of_confusions(true, guess, np.arange(6)).tolist()
    assert sorted(order) == list(range(6))
    for one, two in ((0, 3), (1, 4), (2, 5)):
        assert abs(order.index(one) - order.index(two)) == 1


def test_the_difference_of_two_matrices(page, runs):
    first, second = predictions_of(runs, "first"), predictions_of(runs, "second")
    address = {"view": "runs", "run": "first", "other": "second", "part": "confusion"}
    at = page(**address, cells="difference", sort="confusions")
    wanted = Counter((second[i]["label"], second[i]["top1"]) for i in second)
    wanted.subtract((first[i]["label"], first[i]["top1"]) for i in first)
    drawn = re.findall(r'title="([^"]*) → ([^"]*): ([+-]\d+) of \d+"', html(at, "confusion"))
    assert {(true, guess): int(n) for true, guess, n in drawn} == {
        k: n for k, n in wanted.items() if n
    }
    assert any(int(n) < 0 for *_, n in drawn)


@pytest.mark.parametrize("guesser", ["first", "any"])
def test_a_predicted_class_is_of_the_first_run_or_of_any(page, runs, guesser):
    first, second = predictions_of(runs, "first"), predictions_of(runs, "second")
    # An image that the second run alone gives this name.
    i = next(i for i in first if first[i]["top1"] != second[i]["top1"])
    true, guess = first[i]["label"], second[i]["top1"]
    address = {"view": "runs", "run": "first", "other": "second", "class": true, "guess": guess}
    ids = shown(page(**address, guesser=guesser))
    guessing = [first] if guesser == "first" else [first, second]
    of_class = [k for k in first if first[k]["label"] == true]
    assert ids == [k for k in of_class if any(rows[k]["top1"] == guess for rows in guessing)]
    assert (i in ids) == (guesser == "any")


def test_doubted_labels_and_near_duplicates_are_lists(page, runs, many, tmp_path):
    folder = shutil.copytree(runs, tmp_path / "runs")
    files = [row["file"] for row in predictions_of(runs, "first").values()]
    groups = [[files[5], files[9]], [files[0], files[2]]]
    (folder / "first" / "duplicates.json").write_text(json.dumps({"groups": groups}))
    at = page(runs=folder, view="runs", run="first")
    alike = [int(name[6:11]) for group in groups[::-1] for name in group]  # by their first image
    assert shown(choose(at, "show", "alike")) == alike
    flowers = open_flowers(many)
    n_classes = len(flowers.class_names)
    first = read_predictions(folder / "first", flowers)
    doubted = likely_label_errors(flowers.labels, n_classes, first)
    assert shown(choose(at, "show", "doubted"))[:5] == [i + 1 for i in doubted[:5]]
    assert (
        "alike"
        not in page(runs=runs, view="runs", run="first").segmented_control(key="show").options
    )

    # Images of another dataset are none of these.
    groups.append(["none.jpg", files[3]])
    (folder / "first" / "duplicates.json").write_text(json.dumps({"groups": groups}))
    sizes = np.bincount(read_clusters(folder / "first", files))
    assert sizes[sizes > 1].tolist() == [2, 2]
    at = page(runs=folder, view="runs", run="first")
    assert shown(choose(at, "show", "alike")) == alike
    for groups in ([[], files[:2]], [[None, files[0]]], [files[:1]], files[0], None):
        (folder / "first" / "duplicates.json").write_text(json.dumps({"groups": groups}))
        at = page(runs=folder, view="runs", run="first")
        assert "duplicates.json is damaged" in text(at)
        with pytest.raises(ValueError, match=r"duplicates.json is damaged"):
            read_clusters(folder / "first", files)

    at = page(runs=folder, view="runs", run="first")
    assert "duplicates.json is damaged" in text(at)
    assert shown(at)


def test_intervals_are_the_same_whichever_run_is_first(page, runs, tmp_path):
    folder = shutil.copytree(runs, tmp_path / "runs")
    rows = list(predictions_of(runs, "first").values())
    files = [row["file"] for row in rows]
    (folder / "first" / "duplicates.json").write_text(json.dumps({"groups": [files[:9]]}))
    (folder / "second" / "duplicates.json").write_text(json.dumps({"groups": [files[8:15]]}))
    right = np.array([[row["top1"] == row["label"] for row in rows]])
    clusters = np.maximum(np.arange(len(files)) - 14, 0)  # the 15 are one, by both lists together
    _, low, high = mean_interval(right, clusters)
    for names in (("first", "second"), ("second", "first")):
        at = page(runs=folder, view="runs", run=names[0], other=names[1])
        assert accuracies(at).loc["first", "95% interval"] == f"{low:.1f} to {high:.1f}"
        assert f"Of {len(files)} images" in text(at)
        ids = [int(file[6:11]) for file in files[:15]]
        assert shown(choose(at, "show", "alike")) == ids


def test_runs_of_other_images_say_how_many_are_compared(page, three_runs, tmp_path):
    runs = shutil.copytree(three_runs, tmp_path / "runs")
    rows = list(predictions_of(runs, "third").values())
    write_csv(runs / "third" / "predictions.csv", rows[:10])
    at = page(runs=runs, view="runs", run="first", other="third")
    assert f"Of 10 images that all predicted (first {len(rows)}, third 10)" in text(at)


def test_the_newest_runs_speak_of_any_image(page, runs):
    i = next(iter(predictions_of(runs, "first")))
    tables = rankings(html(page(image=str(i)), "image"))
    assert {run for run, _ in tables} == {"first", "second"}


def test_what_is_said_of_runs_without_a_prediction_of_an_image(page, truth):
    i = min(truth[1]["train"])  # the runs predicted the test split
    at = page(image=str(i))
    assert "None of the 2 runs with predictions has this image." in text(at)
    assert "also" not in [box.key for box in at.selectbox]  # both were looked at
    for n, who in enumerate(("None", "1")):
        words = f"{who} of the 8 newest of 11 runs with predictions has this image; older ones were"
        assert what_is_left_out(n, 11).startswith(words)


def test_any_run_can_speak_of_an_image_beside_the_newest(page, runs, tmp_path):
    folder = tmp_path / "runs"
    every = list(predictions_of(runs, "first").values())
    i = int(every[0]["file"][6:11])

    def write(k, rows):
        (folder / f"run{k}").mkdir(parents=True, exist_ok=True)
        write_csv(folder / f"run{k}" / "predictions.csv", rows)
        os.utime(folder / f"run{k}", (1e9 + k, 1e9 + k))  # run12 is the newest

    def opened(**address):
        at = page(runs=folder, image=str(i), **address)
        return at, html(at, "image"), [run for run, _ in rankings(html(at, "image"))]

    for k in range(1, 4):
        write(k, every)
    at, shown, names = opened()
    assert names == ["run3", "run2", "run1"]
    assert "newest" not in shown and "also" not in [
        box.key for box in at.selectbox
    ]  # these are all
    for k in range(4, 13):
        write(k, every[:1] if k in (6, 9, 10, 11) else every[1:])
    at, shown, names = opened()
    assert names == ["run11", "run10", "run9"]
    assert "The newest 3 that predicted this image, of 12 runs with predictions." in shown
    write(9, every[1:])
    write(10, every[1:])
    at, shown, names = opened()
    assert names == ["run11", "run6"]
    assert "2 of the 8 newest of 12 runs with predictions have this image; older ones" in shown

    options = at.selectbox(key="also").options
    assert not [option for option in options if "run11" in option]  # it speaks already
    select(at, "also", "run2")
    assert address_of(at) == {"image": str(i), "also": "run2"}
    again, shown, names = opened(also="run2")
    assert names == ["run11", "run6", "run2"]
    assert html(at, "image") == shown
    assert opened(also="run6")[2] == ["run11", "run6"]
    at, _, names = opened(also="run12")
    assert names == ["run11", "run6"] and "run12 has no prediction of this image" in text(at)
    at, _, names = opened(also="run13")
    assert names == ["run11", "run6"] and "There is no run run13" in text(at)
    (folder / "run1" / "predictions.csv").write_text("damaged")
    at, _, names = opened(also="run1")
    assert names == ["run11", "run6"] and "predictions.csv is empty" in text(at)
    options = at.selectbox(key="also").options
    assert options == [*options[:-1], "run1 (damaged)"]  # as in other lists


def test_runs_whose_probabilities_are_not_of_one_kind_say_so(page, three_runs, many, tmp_path):
    folder = shutil.copytree(three_runs, tmp_path / "runs")
    both = {"runs": folder, "view": "runs", "run": "first", "other": "second"}
    assert "calibrated" not in text(page(**both))
    result = {"calibration_temperature": 1.25, "calibrated": True}
    (folder / "second" / "result.json").write_text(json.dumps(result))
    mixed = "can't be compared: second is calibrated (T = 1.25); not calibrated: first."
    for show in ("all", "doubted"):
        words = text(page(**both, show=show))
        assert mixed in words
        assert ("by the mean of these percentages" in words) == (show == "doubted")
    alone = text(page(runs=folder, view="runs", run="second"))
    assert "Probabilities: second is calibrated (T = 1.25)." in alone
    # Found on val, and not used.
    (folder / "first" / "result.json").write_text(json.dumps({"calibration_temperature": 2.5}))
    assert mixed in text(page(**both))
    (folder / "first" / "result.json").write_text(json.dumps(result))
    assert "can't be compared" not in text(page(**both))

    flowers = open_flowers(many)
    compared = [read_predictions(folder / name, flowers) for name in ("second", "third")]
    head = filters.export(flowers, [0], compared).splitlines()[0].split(",")
    assert head[5::2] == ["second calibrated probability", "third probability"]


def test_export_lists_what_is_shown(many, runs, truth):
    class_of, splits = truth
    flowers = open_flowers(many)
    first = read_predictions(runs / "first", flowers)
    table = filters.export(flowers, [4, 0, 77], [first])
    rows = list(csv.DictReader(io.StringIO(table)))
    listed = [(int(row["id"]), row["file"], row["class"]) for row in rows]
    assert listed == [(i, f"image_{i:05d}.jpg", class_of[i]) for i in (5, 1, 78)]

    predictions = predictions_of(runs, "first")
    for row in rows:
        i = int(row["id"])
        assert i in splits[row["split"]]
        if i in predictions:
            assert row["first prediction"] == predictions[i]["top1"]
            assert float(row["first probability"]) == float(predictions[i]["score1"])
        else:
            assert row["first prediction"] == ""
            assert row["first probability"] == ""


def test_tables_as_csv(many, runs, tmp_path):
    flowers = open_flowers(many)
    table = filters.export(flowers, [4, 0], scores=np.array([0.75, -0.5]))
    rows = list(csv.DictReader(io.StringIO(table)))
    assert [float(row["similarity"]) for row in rows] == [0.75, -0.5]

    # A run may be called as a column is.
    for name in ("class", "images", "change"):
        shutil.copytree(runs / "first", tmp_path / name)
        run = read_predictions(tmp_path / name, flowers)
        second = read_predictions(runs / "second", flowers)
        changes = class_table(flowers, run.index, run, second)
        assert set(changes["class"]) == set(NAMES)
        assert changes["images"].sum() == len(run.index)
        assert changes.shape == (len(NAMES), 11)

    rows = predictions_of(runs, "second").values()
    counts = Counter((row["label"], row["top1"]) for row in rows)
    matrix = list(confusion_table(flowers, second, second.index).itertuples(index=False))
    assert {(true, guess): n for true, guess, n in matrix} == counts

    # Of two runs: both counts, also of a pair that only one of them has, and the difference.
    first = read_predictions(runs / "first", flowers)
    table = classes.matrix_table(flowers, [first, second], second.index)
    names = ["class", "prediction", "images by first", "images by second", "difference"]
    assert table.columns.tolist() == names
    of_first = Counter(
        (row["label"], row["top1"]) for row in predictions_of(runs, "first").values()
    )
    wanted = {(*k, of_first[k], counts[k], counts[k] - of_first[k]) for k in of_first | counts}
    assert set(table.itertuples(index=False, name=None)) == wanted


def test_each_list_has_a_file_of_its_own(page, monkeypatch):
    files = {}

    def keep(label, make, name, *_, **options):
        files[name] = make().splitlines()[0]

    monkeypatch.setattr(streamlit, "download_button", keep)
    runs = {"view": "runs", "run": "first"}
    for address in (
        {},
        {**runs, "show": "wrong"},
        {**runs, "other": "second", "part": "classes"},
        {**runs, "part": "confusion"},
    ):
        page(**address)
    of_first, of_second = "accuracy of first (%)", "accuracy of second (%)"
    assert files == {
        "flowers-browse.csv": "id,file,class,split",
        "flowers-runs-first-wrong.csv": "id,file,class,split,first prediction,first probability",
        "flowers-runs-first-second-classes.csv": "class,change (points),from (points),to (points),"
        "images,"
        f"{of_first},{of_second},only first right,only second right,p (McNemar),p (Holm)",
        "flowers-runs-first-confusion.csv": "class,prediction,images",
    }


def test_a_picture_is_a_link_to_its_address(page):
    at = page(view="runs", run="first", show="wrong")
    i = shown(at)[1]
    links = re.findall('href="([^"]*)"', html(at))
    address = dict(parse_qsl(unescape(links[1]).removeprefix("?")))
    assert address == {"view": "runs", "run": "first", "show": "wrong", "image": str(i)}
    assert address_of(page(**address)) == address


def ready_thumbnails(flowers):
    """Thumbnails, when their thread has made them all."""
    thumbnails = Thumbnails(flowers)
    while thumbnails.features is None and not thumbnails.problem:
        time.sleep(0.02)
    assert not thumbnails.problem
    return thumbnails


def test_thumbnails_are_kept_small_and_follow_their_files(many, tmp_path):
    root = copy(many, tmp_path)
    # Nothing is harder to compress than noise.
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "jpg" / "image_00002.jpg", quality=95)
    flowers = open_flowers(root)

    def cache_files():
        return {path.name: path.stat().st_mtime_ns for path in (root / ".cache").iterdir()}

    thumbnails = ready_thumbnails(flowers)
    for i in (0, 1):
        assert thumbnails[i] == thumbnail(flowers.files[i])
        assert len(thumbnails[i]) <= SLOT
        assert read_thumbnail(thumbnails[i]).shape == (160, 160, 3)

    before = cache_files()
    assert len(before) == 2
    ready_thumbnails(flowers)
    assert cache_files() == before  # read, not made again

    shutil.copy(flowers.files[5], flowers.files[0])
    assert ready_thumbnails(flowers)[0] == thumbnail(flowers.files[5])


def test_a_damaged_image_is_like_no_other_and_may_be_replaced(many, tmp_path):
    root = copy(many, tmp_path)
    file = root / "jpg" / "image_00003.jpg"
    content = file.read_bytes()
    file.write_bytes(b"\xff\xd8 nothing")
    thumbnails = ready_thumbnails(open_flowers(root))
    assert thumbnails[2] == b""
    assert np.isnan(thumbnails.features).all(axis=1).tolist() == [i == 2 for i in range(N)]
    order, _ = nearest(thumbnails.features, np.zeros(thumbnails.features.shape[1]))
    assert len(order) == N - 1 and 2 not in order

    file.write_bytes(content)
    assert thumbnails[2] == thumbnail(file)  # while the page is open
    file.unlink()
    assert thumbnails[2] == b""


def test_a_server_that_stops_while_thumbnails_are_made_says_nothing(many, tmp_path, monkeypatch):
    made = ready_thumbnails(open_flowers(copy(many, tmp_path)))
    shutil.rmtree(tmp_path / "data" / ".cache")

    def stopped(*_):
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(thumbnails_module, "in_threads", stopped)
    made._make_all()
    assert not made.problem

    def broken(*_):
        raise RuntimeError("another one")

    monkeypatch.setattr(thumbnails_module, "in_threads", broken)
    with pytest.raises(RuntimeError, match="another"):
        made._make_all()


FIRST_PAGE = """
import sys
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from streamlit.runtime.forward_msg_cache import populate_hash_if_needed
from streamlit.testing.v1 import AppTest
from tqdm import tqdm

sys.argv = ["web.py", "--data_root", {data_root!r}]
at = AppTest.from_file({script!r}, default_timeout={patience}).run()
slow = sys.modules.keys() & {{"torch", "pandas", "altair", "matplotlib"}}
sys.exit(" ".join(slow) or not at.get("bidi_component"))
"""


def test_the_first_page_does_not_wait_for_what_it_does_not_need(many):
    ready_thumbnails(open_flowers(many))  # the second time they are read from the cache folder
    code = FIRST_PAGE.format(data_root=str(many), script=str(ROOT / "web.py"), patience=PATIENCE)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


ATTRIBUTES = {
    "class",
    "style",
    "title",
    "alt",
    "href",
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


class Reader(HTMLParser):
    """Collects the tags and texts of HTML, whose attributes must be ours."""

    def __init__(self):
        super().__init__()
        self.tags = []
        self.texts = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert {name for name, _ in attributes} <= ATTRIBUTES

    def handle_data(self, data):
        self.texts.append(data)


def test_commands_in_a_message_are_code():
    commands = [
        "python -m flowers.data",
        "streamlit run web.py -- --data_root 'a b/c;d' --runs runs/x",
        "python train.py --data_root /tmp/a_b.c --prompt_template 'a {}.' --holdout",
    ]
    message = panels.message(
        f"no *dataset* (x--y): run {commands[0]} to download it. "
        f"See {commands[1]}; or {commands[2]}"
    )
    assert re.findall("```shell\n(.*)\n```", message) == commands
    rest = re.sub("```shell\n.*\n```", "", message).split("\n\n")
    assert rest[0] == r"no \*dataset\* \(x\-\-y\)\: run"
    assert rest[1].strip() == r"to download it\. See"
    assert panels.message("a sentence.") == r"a sentence\."


def luminance(colour):
    """Relative luminance of red, green and blue from 0 to 255, by WCAG 2.2."""
    levels = np.array(colour) / 255
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def contrast(a, b):
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


GROUNDS = {"light": (255, 255, 255), "dark": (23, 22, 20)}  # Streamlit's own


@pytest.mark.parametrize("theme", GROUNDS)
def test_what_is_chosen_or_clicked_is_seen_in_both_themes(theme):
    ground = np.array(GROUNDS[theme])
    # One image of a thousand is as well seen as all of them.
    cells = panels.confusion(["a", "b"], [0, 1], np.zeros(1000, int), np.arange(1000) // 999)
    outlines = re.findall(r"border-color:rgb\((\d+) (\d+) (\d+)\)", cells)
    assert len(outlines) == 2
    assert all(contrast([int(c) for c in outline], ground) >= 3 for outline in outlines)

    # The name of a chosen button, on a ground of up to a quarter of its own colour.
    config = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text())
    chosen = np.array(list(bytes.fromhex(config["theme"][theme]["primaryColor"][1:])))
    assert contrast(chosen, 0.75 * ground + 0.25 * chosen) >= 4.5


def test_names_are_text_whatever_they_hold(many):
    vile = ["<b>{0}", "\"' onclick='x", "a&b", "</p>", "{{}}", "`$`"]
    flowers = dataclasses.replace(open_flowers(many), class_names=vile)
    black = np.zeros((9, 9, 3), np.uint8)
    ranking = (vile[0], [(name, 0.5) for name in vile])
    drawn = [
        panels.pictures([(1, "?a=b&c=d", b"x", vile)]),
        panels.class_histogram(flowers, np.arange(N), vile[0]),
        panels.image(b"x", black, vile[1], vile, vile, [ranking]),
        panels.confusion(vile, range(6), np.arange(6), np.arange(6)[::-1]),
    ]
    for piece in drawn:
        reader = Reader()
        reader.feed(piece)
        assert set(vile) <= set(reader.texts)
        # The <b> of the charts' keys has a style; there is no other.
        assert reader.tags.count("b") == piece.count("<b style=")


def test_palette_finds_the_colours_of_a_flag():
    red, white, blue = [200, 20, 30], [250, 250, 250], [20, 40, 160]
    column = np.repeat(np.array([red, white, blue], np.uint8), 40, axis=0)  # (120, 3)
    flag = column[None].repeat(90, axis=0)  # (90, 120, 3): three vertical stripes
    palette = colours.palette(flag)[:3]
    assert sorted(colour for colour, _ in palette) == ["#1428a0", "#c8141e", "#fafafa"]
    assert sum(fraction for _, fraction in palette) == pytest.approx(1, abs=0.03)


def test_grey_and_single_colours_have_curves():
    for level in (0, 128, 255):
        grey = np.full((20, 30, 3), level, np.uint8)
        hue, saturation, value = colours.hsv_curves(grey)
        assert not hue.any()
        assert np.isfinite(saturation).all()
        assert np.isfinite(value).all()
        assert saturation.argmax() == 0
        assert value.argmax() / 64 == pytest.approx(level / 255, abs=0.02)

    # A hue of 359 degrees: the density goes on at 0.
    hue, _, _ = colours.hsv_curves(np.full((20, 30, 3), [200, 10, 14], np.uint8))
    assert min(hue[0], hue[-1]) > 0.5 * hue.max()
    assert hue[60] == pytest.approx(0, abs=1e-6)


# -----------------------------------------------------------------------------
# what is done once, and not at each click


def test_run_folders_are_those_of_runs_newest_first(tmp_path):
    files = [
        "old/model.pt",
        "old/inner/model.pt",  # within a run
        "grid/a/args.json",
        "grid/a/predictions.csv",
        "grid/b/model.pt",
        "1/2/3/4/args.json",
        "1/2/3/4/5/args.json",  # within a run, and too deep
        "1/2/3/no/run/args.json",  # too deep
        ".hidden/args.json",
        "notes/readme.txt",
    ]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "link").symlink_to(tmp_path / "grid")  # nothing is looked for behind it
    (tmp_path / "other").symlink_to(tmp_path / "old")  # but it may be a run itself
    for age, name in enumerate(["1/2/3/4", "grid/b", "old", "grid/a"]):
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    folders = run_folders(tmp_path)
    names = ["1/2/3/4", "grid/b", "other", "old", "grid/a"]
    assert [folder.name for folder in folders] == names
    assert folders[-1].files == {"args.json", "predictions.csv"}
    assert names_with(folders, "args.json") == ["1/2/3/4", "grid/a"]
    assert names_with(folders, "args.json", "model.pt") == names
    assert run_folders(tmp_path / "nothing") == []


def test_predictions_that_cannot_be_used_are_read_once_until_they_change(
    page, runs, tmp_path, monkeypatch
):
    folder = shutil.copytree(runs, tmp_path / "runs")
    whole_file = (folder / "first" / "predictions.csv").read_bytes()
    (folder / "first" / "predictions.csv").write_text("file,label\n")
    reads = []

    def counted(run, *arguments):
        reads.append(run.name)
        return read_predictions(run, *arguments)

    monkeypatch.setattr(kept, "read_predictions", counted)
    image = next(iter(predictions_of(runs, "first")))
    at = page(runs=folder, image=str(image))
    assert "first" not in html(at, "image") and "second" in html(at, "image")
    whole(at.run())
    assert sorted(reads) == ["first", "second"]
    (folder / "first" / "predictions.csv").write_bytes(whole_file)
    whole(at.run())
    assert "first" in html(at, "image")
    assert sorted(reads) == ["first", "first", "second"]


def test_a_sentence_is_encoded_once(page, monkeypatch):
    sentences = []
    of_text = Searcher.of_text

    def counted(searcher, sentence):
        sentences.append(sentence)
        return of_text(searcher, sentence)

    monkeypatch.setattr(Searcher, "of_text", counted)
    at = page(view="search", model="first", q="a flower that no other test asks for")
    first = shown(at)
    assert shown(press(at, "next_page")) != first
    assert shown(press(at, "previous_page")) == first
    assert sentences == ["a flower that no other test asks for"]


def test_one_image_of_compared_runs_is_shown_without_their_accuracies(page, runs):
    image = next(iter(predictions_of(runs, "first")))
    at = page(view="runs", run="first", other="second", image=str(image))
    assert html(at, "image") and not html(at, "accuracies")
    assert accuracies(press(at, "to_grid")).index.tolist() == ["first", "second"]
    at = page(view="runs", image=str(image))
    assert html(at, "image") and not at.dataframe
    assert press(at, "to_grid").dataframe
