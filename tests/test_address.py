"""What a visitor has chosen, in the page's address and back: without the page, then on it."""

import json
import re
import sys
from html import unescape
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NAMES, ROOT
from streamlit.testing.v1 import AppTest

from flowers import models
from flowers.files import write_csv
from flowers.gallery import address
from flowers.page.choices import allowed_choices

PATIENCE = 180  # seconds that a busy machine may take for one run of the page
DATASET = SimpleNamespace(
    flowers=SimpleNamespace(class_names=("rose", "tulip")), splits=np.array(["train", "test"])
)
ALLOWED = allowed_choices(DATASET)


class Browser:
    """A page whose address a visitor sees, opens and leaves with the arrow back."""

    def __init__(self, opened):
        self.state = {}
        self.addresses = [opened]
        self.run()

    def run(self):
        """One run of web.py."""
        address.read(self.state, self.addresses[-1], ALLOWED)
        new = address.write(self.state, self.addresses[-1])
        if new is not None and new != self.addresses[-1]:
            self.addresses.append(new)

    def click(self, **choices):
        address.change(self.state, **choices)
        self.run()

    def back(self):
        self.addresses.pop()
        self.run()


CHOSEN = {
    "view": "runs",
    "class": "rose",
    "split": "test",
    "ids": "7, 20-30",
    "page": 3,
    "image": 17,
    "run": "one/of/these",
    "other": ["another", "a third"],
    "sure": (5, 60),
    "q": "a rose, and no tulip",
}


def test_the_address_opens_the_same_again():
    browser = Browser({})
    browser.click(**CHOSEN)
    again = Browser(browser.addresses[-1])
    assert again.state == browser.state
    assert {key: again.state[key] for key in CHOSEN} == CHOSEN
    assert again.addresses == browser.addresses[-1:]  # it was right, and is not set once more


def test_what_is_at_its_default_is_not_in_the_address():
    browser = Browser({})
    browser.click(page=2, split="all")
    assert browser.addresses[-1] == {"page": "2"}
    browser.click(page=1)
    assert browser.addresses[-1] == {}


def test_a_click_counts_and_so_does_going_back():
    browser = Browser({})
    browser.click(page=2)
    browser.click(image=5)
    assert browser.addresses == [{}, {"page": "2"}, {"page": "2", "image": "5"}]
    browser.back()
    assert (browser.state["page"], browser.state["image"]) == (2, None)
    browser.back()
    assert browser.state["page"] == 1
    browser.run()  # nothing has happened: all stays
    assert browser.addresses == [{}]


def test_a_widget_that_is_not_on_the_page_is_not_forgotten():
    browser = Browser({})
    browser.click(q="rose")
    before = dict(browser.state)
    browser.run()
    assert browser.state == before


@pytest.mark.parametrize(
    "key, value, read",
    [
        ("view", "nowhere", "browse"),
        ("class", "oak", None),
        ("page", "-1", 1),
        ("image", "1e9", None),
        ("image", "0007", 7),
        ("q", "x" * 1000, "x" * address.MAX_TEXT),
        ("run", "was deleted", "was deleted"),  # the page says that there is no such run
        ("other", ["a", "a", *"bcdefgh"], list("abcde")),
        ("sure", "80-20", (20, 80)),
        ("sure", "500-1", (1, 100)),
        ("sure", "all", (0, 100)),
    ],
)
def test_what_an_address_says_is_checked(key, value, read):
    assert Browser({key: value}).state[key] == read


def test_an_older_link_names_the_model_of_a_search_a_run():
    state = Browser({"view": "search", "run": "mine"}).state
    assert (state["model"], state["run"]) == ("mine", None)


# -----------------------------------------------------------------------------
# hostile addresses: every key of DEFAULTS, and so each that is added to it

HOSTILE = [
    "",
    " ",
    "-1",
    "0",
    "1.5",
    "1e9",
    "nan",
    "inf",
    "None",
    "9" * 400,
    "٣",  # a digit, but no number of ours
    "x" * 100_000,
    "../../etc/passwd",
    "..",
    "<b>rose</b>",
    "<script>alert(1)</script>",
    "%3Cb%3E",
    "%00",
    "\x00",
    "\ud800",
    "🌸",
    "rose\n",
    "0-0-0",
    "90-10\n",
    "nan,nan,nan,nan",
    "1,2,3",
    "first",
]


@pytest.mark.parametrize("key", address.DEFAULTS)
def test_a_hostile_value_becomes_a_possible_one_and_changes_no_other(key):
    default = address.DEFAULTS[key]
    for value in HOSTILE:
        browser = Browser({key: [value, value] if key in address.LISTS else value})
        read = browser.state[key]
        others = {other: browser.state[other] for other in address.DEFAULTS if other != key}
        assert others == {other: address.DEFAULTS[other] for other in others}

        if key in ALLOWED:
            assert read == default or read in ALLOWED[key]
        elif key in address.NUMBERS:
            assert read == default or 0 <= read < 10**9
        elif key in address.RUNS:
            assert read == (value or default)  # as it stands: the page says that there is none
        elif key in address.LISTS:
            assert read == [value]
        elif key in address.TEXTS:
            assert read == value[: address.MAX_TEXT]
        else:
            assert key == "sure"
            least, most = read
            assert 0 <= least <= most <= 100

        again = Browser(browser.addresses[-1])  # what is written is read as it was
        assert again.state == browser.state
        assert len(again.addresses) == 1


def test_of_a_key_that_stands_twice_one_counts():
    opened = {"other": ["b", "a", "b", "c"], "run": "a"}
    assert Browser(opened).state["other"] == ["b", "a", "c"]


# -----------------------------------------------------------------------------
# the page at hostile addresses, and with runs of hostile names

RUNS = (
    "colours",
    "class",
    "two  words",
    'it\'s "quoted"',
    "<b>bold",
    "🌸",
    "*a* $x$ [b](c) :red[d]",
    "a&b=c#d%41+",
    "None",
    "x" * 200,
    "/".join("abcd"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of the 12 test images; the n-th is right about n of them. `colours` has a model."""
    folder = tmp_path_factory.mktemp("address") / "runs"
    for n, name in enumerate(RUNS, 1):
        rows = []
        for i in range(1, 13):
            label, other = NAMES[(i - 1) % 6], NAMES[i % 6]
            best = label if i <= n else other
            row = {"file": f"image_{i:05d}.jpg", "label": label, "top1": best, "score1": 0.5}
            rows.append(row)
        (folder / name).mkdir(parents=True)
        write_csv(folder / name / "predictions.csv", rows)
        (folder / name / "args.json").write_text(json.dumps({"architecture": "tiny"}))
    torch.manual_seed(0)
    torch.save(models.build("tiny").state_dict(), folder / "colours" / "model.pt")
    return folder


@pytest.fixture
def page(monkeypatch, small, runs):
    """page(key=value, ...): the page at that address, without any error; opened in one tab."""
    monkeypatch.setattr(sys, "argv", ["web.py", "--data_root", str(small), "--runs", str(runs)])
    at = AppTest.from_file(str(ROOT / "web.py"), default_timeout=PATIENCE)

    def opened(**choices):
        at.query_params.clear()
        at.query_params.update(choices)
        at.run()
        assert not at.exception and not at.error, choices
        return at

    return opened


def accuracies(at):
    """Top-1 by run, of the table above the pictures; empty where there is none."""
    drawn = [e.proto for e in at.get("bidi_component") if e.proto.id.endswith("-accuracies")]
    html = "".join(proto.bytes.decode() for proto in drawn)
    rows = re.findall("(?s)<tr><td>(.*?)</td><td>(.*?)</td>", html)
    return {unescape(name): float(number) for name, number in rows}


def text(at):
    return "\n".join(e.value for kind in ("markdown", "caption", "warning") for e in at.get(kind))


def right(name):
    """Top-1 of a run in percent."""
    return pytest.approx(100 * (RUNS.index(name) + 1) / 12, abs=0.00501)


@pytest.mark.parametrize("name", RUNS, ids=lambda name: name[:24])
def test_a_run_of_any_name_is_the_one_that_is_shown(page, name):
    at = page(view="runs", run=name, other="class")
    wanted = {name: right(name), "class": right("class")}
    assert accuracies(at) == wanted
    at = page(view="runs", run="class", other=name, part="classes")
    assert accuracies(at) == wanted


def test_the_buttons_say_the_names_of_runs_as_they_are(page):
    name = "*a* $x$ [b](c) :red[d]"
    at = page(view="runs", run=name, other=["class", "<b>bold"])
    said = [label for control in at.get("button_group") for label in control.options]
    escaped = r"\*a\* \$x\$ \[b\]\(c\) \:red\[d\]"  # or it would be read as markdown
    assert {f"only {escaped} right", escaped} <= set(said)


def test_the_colours_of_the_images_are_no_run(page):
    at = page(view="map")
    assert at.selectbox(key="laid").options == ["colours"]
    assert not at.warning


# Pages with numbers of runs, and the keys of the runs that they are of.
VIEWS_OF_RUNS = (
    ({"view": "runs", "run": "class", "other": "colours"}, ("run", "other")),
    ({"view": "runs", "run": "class", "other": "colours", "part": "classes"}, ("run", "other")),
    (
        {"view": "runs", "run": "class", "other": "🌸", "part": "confusion", "cells": "difference"},
        ("run", "other"),
    ),
    ({"view": "map", "colour": "outcome", "judged": "class"}, ("laid", "judged")),
    ({"image": "7"}, ("like",)),
    ({"view": "search"}, ("model",)),
)
SOME = ("../x", "9" * 400, "<b>rose</b>")


@pytest.mark.parametrize("view, keys", VIEWS_OF_RUNS, ids=lambda value: str(value)[:60])
def test_a_hostile_run_is_none_and_other_hostile_values_leave_the_numbers(page, view, keys):
    at = page(**view)
    numbers = accuracies(at)
    assert bool(numbers) == (view.get("view") == "runs")
    others = set(address.DEFAULTS) - set(view) - set(keys) - set(address.RUNS) - {"image", "other"}
    for value in SOME:
        at = page(**view, **dict.fromkeys(others, value))
        assert accuracies(at) == numbers
        assert "There is no run" not in text(at)
        for key in keys:
            at = page(**(view | {key: value}))
            assert "There is no run" in text(at)
            assert not accuracies(at) and "%" not in text(at)
            assert not at.get("vega_lite_chart")
            assert "<b>rose" not in text(at)  # it is escaped
            assert at.query_params[key] in (value, [value])
