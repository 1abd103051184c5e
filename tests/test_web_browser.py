"""web.py from end to end in a real headless Chromium, used as a visitor uses it.

There must be no error box, no error on the browser's console, and no request to another host.
Everything that is waited for may take up to PATIENCE on a busy machine.
"""

import difflib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch
from conftest import NAMES, ROOT, read_csv, write_dataset
from PIL import Image

from flowers import models
from flowers.files import write_csv
from flowers.gallery.thumbnails import MAX_UPLOAD_BYTES

PATIENCE = 180  # seconds
POLL = 50  # milliseconds

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

RUNS = ("tiny", "other", "third", "started")  # as the table lists them

# The page when Streamlit has run its script to the end.
IDLE = "[data-testid=stApp][data-test-script-state=notRunning]"
MAIN = "[data-testid=stMain]"
PICTURE = ".pictures a"
PREDICTION = ".pictures a p:nth-of-type(2)"
TABLE = "[data-testid=stDataFrame] canvas[data-testid=data-grid-canvas]"
ROW, TICK = 35, 18  # pixels: the height of a row of a table, and where its tick is
CHART = "[data-testid=stVegaLiteChart] svg"
COMPARE = ".st-key-compare button"


# -----------------------------------------------------------------------------
# the server, the browser and a page


def write_run(run, seed, top1):
    """A run of the test images, as train.py leaves it: about two of three right, by chance."""
    rng = random.Random(seed)
    rows = []
    for i in range(120):
        if i // len(NAMES) % 4 != 0:  # trnid holds a quarter of each class
            continue
        label = NAMES[i % 6]
        best, second = rng.sample(NAMES, 2)
        if rng.random() < 0.6:
            best, second = label, best if best != label else second
        score = round(rng.uniform(0.5, 1), 3)
        rows.append(
            {
                "file": f"image_{i + 1:05d}.jpg",
                "label": label,
                "top1": best,
                "score1": score,
                "top2": second,
                "score2": round(1 - score, 3),
            }
        )
    run.mkdir(parents=True)
    write_csv(run / "predictions.csv", rows)
    settings = {"job": "train", "strategy": "full", "architecture": "tiny", "epochs": 1}
    settings |= {"loss": "info_nce", "lr": 5e-4}
    (run / "args.json").write_text(json.dumps(settings | {"seed": seed}))
    result = {"test/n": len(rows), "test/top1": top1, "train_seconds": 3.5}
    result |= {"convention": "swapped", "trainable_image": 7_590_272}
    for key in ("top1_low", "top1_high", "mean_per_class", "ece", "base_top1", "new_top1"):
        result[f"test/{key}"] = 50.0
    (run / "result.json").write_text(json.dumps(result))
    steps = [{"step": step, "train/loss": 2 / step} for step in range(1, 6)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for_server(process, address, log):
    """Until it answers; what it logged in the failure."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/_stcore/health", timeout=5)
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"streamlit does not answer: {log.read_text()}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Four runs, no two of which predict the same.

    `tiny`, the first of the table, has a model; `started`, the last, has no predictions.
    """
    runs = tmp_path_factory.mktemp("browser") / "runs"
    for seed, name in enumerate(RUNS):
        write_run(runs / name, seed, 60 + seed)
    for name in ("predictions.csv", "result.json"):
        (runs / "started" / name).unlink()
    torch.manual_seed(0)
    torch.save(models.build("tiny").state_dict(), runs / "tiny" / "model.pt")
    for age, name in enumerate(RUNS):
        os.utime(runs / name, (2e9 - age, 2e9 - age))  # the newest run is listed first
    return runs


@pytest.fixture(scope="module")
def server(runs):
    """The address of `streamlit run web.py` on 120 discs, with these runs."""
    folder = runs.parent
    data = write_dataset(folder / "data", per_class=20)
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    streamlit = [sys.executable, "-m", "streamlit", "run", str(ROOT / "web.py")]
    options = [
        "--server.headless=true",
        "--server.address=127.0.0.1",
        f"--server.port={port}",
    ]
    flags = ["--data_root", str(data), "--runs", str(runs)]
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*streamlit, *options, "--", *flags], cwd=ROOT, stdout=out, stderr=out
        )
        try:
            wait_for_server(process, address, log)
            yield address
        finally:
            process.terminate()
            process.wait()
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip(
        "playwright.sync_api",
        reason="no browser test: playwright is not installed (pip install playwright)",
    )
    if not shutil.which(CHROMIUM):
        pytest.skip(
            f"no browser test: there is no {CHROMIUM} (apt-get install chromium, or set CHROMIUM)"
        )
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=FLAGS, timeout=1000 * PATIENCE
        )
        yield browser
        browser.close()


def new_page(context):
    """A page of a browser, or of a context, that waits long enough."""
    page = context.new_page()
    page.set_default_timeout(1000 * PATIENCE)
    page.set_default_navigation_timeout(1000 * PATIENCE)
    return page


@pytest.fixture
def page(chromium, server):
    """A page 1440 wide that fails the test for a console error, or a request to another host."""
    context = chromium.new_context(viewport={"width": 1440, "height": 900})
    page = new_page(context)
    allowed = (server, server.replace("http", "ws"), "data:", "blob:")
    trouble = []

    def on_console(message):
        if message.type == "error":
            trouble.append(message.text)

    def on_response(response):
        if response.status >= 400:
            trouble.append(f"{response.status} {response.url}")

    def on_request(request):
        if not request.url.startswith(allowed):
            trouble.append(request.url)

    page.on("console", on_console)
    page.on("response", on_response)
    page.on("request", on_request)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    yield page
    assert not page.locator("[data-testid=stException]").count()
    context.close()
    assert not trouble


# -----------------------------------------------------------------------------
# what stands on a page


def captions(page):
    """Id and class under each picture of the grid."""
    return page.locator(".pictures a p:first-of-type").all_inner_texts()


def predictions(page):
    """What the run says under each picture of the grid."""
    return page.locator(PREDICTION).all_inner_texts()


def shows_class(page, name):
    """Whether all 20 images of one class are shown, and no others."""
    lines = captions(page)
    return len(lines) == 20 and all(line.endswith(name) for line in lines)


def wait(page, condition):
    """Until condition() holds and the page is idle; what the page says in the failure."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if condition():
            page.wait_for_selector(IDLE)
            return
        page.wait_for_timeout(POLL)
    raise AssertionError(f"{page.url}: {page.locator('body').inner_text()[:1500]}")


def starts_with(page, *image_ids):
    """Whether the first picture of the grid is one of these images."""
    lines = captions(page)
    return bool(lines) and int(lines[0].split()[0]) in image_ids


# -----------------------------------------------------------------------------
# a visit


def turn_pages_and_go_back(page):
    page.get_by_role("button", name="Next").first.click()
    wait(page, lambda: starts_with(page, 49) and "page=2" in page.url)
    page.go_back()
    wait(page, lambda: starts_with(page, 1))


def filter_by_name_and_by_histogram(page):
    box = page.get_by_role("combobox", name="Class")
    box.fill("tree")  # type to search
    box.press("Enter")
    wait(page, lambda: shows_class(page, "tree mallow"))
    assert "class=tree+mallow" in page.url

    page.get_by_text("shown", exact=True).click()
    page.locator(".bars button", has_text="rose").click()
    wait(page, lambda: "class=rose" in page.url and shows_class(page, "rose"))
    page.locator(".bars button.on").click()  # once more: all classes again
    wait(page, lambda: "class=" not in page.url and len(captions(page)) == 48)


def open_an_image_and_use_the_keyboard(page):
    page.locator(PICTURE).nth(2).click()
    wait(page, lambda: "image=13" in page.url and page.get_by_text("3 of 20").count() == 1)
    picture = page.locator(".image img")
    full_size = [87, 76]
    wait(
        page,
        lambda: picture.evaluate("i => [i.naturalWidth, i.naturalHeight]") == full_size,
    )
    page.locator(MAIN).press("ArrowRight")
    wait(page, lambda: "image=19" in page.url and page.get_by_text("4 of 20").count() == 1)
    page.locator(MAIN).press("Escape")
    wait(page, lambda: "image=" not in page.url and len(captions(page)) == 20)


def search_by_a_sentence_and_by_files(page, good, bad, large):
    page.get_by_text("Search", exact=True).click()
    page.get_by_label("Sentence").fill("a red flower")
    page.get_by_label("Sentence").press("Enter")
    wait(page, lambda: len(captions(page)) == 48 and "q=a+red+flower" in page.url)

    page.locator("input[type=file]").set_input_files(good)
    answer = page.get_by_role("img", name="your picture")
    wait(page, lambda: answer.count() == 1 and len(captions(page)) == 48)
    assert not page.locator("[data-testid=stAlert]").count()

    # Streamlit itself refuses it: the answer about the file before must not stay.
    page.locator("input[type=file]").set_input_files(large)
    wait(page, lambda: answer.count() == 0 and page.get_by_text("must be 10").count() == 1)
    page.locator("input[type=file]").set_input_files(good)
    wait(page, lambda: answer.count() == 1)

    page.locator("input[type=file]").set_input_files(bad)
    wait(page, lambda: page.get_by_text("can't be read as a picture").count() == 1)


def test_a_visit(page, server, tmp_path):
    good, bad, large = tmp_path / "good.png", tmp_path / "bad.jpg", tmp_path / "large.png"
    Image.new("RGB", (300, 200), (200, 30, 60)).save(good)
    bad.write_bytes(b"\xff\xd8 no picture")
    large.write_bytes(bytes(MAX_UPLOAD_BYTES + 1))

    page.goto(server)
    wait(page, lambda: len(captions(page)) == 48)
    turn_pages_and_go_back(page)
    filter_by_name_and_by_histogram(page)

    page.goto(f"{server}/?class=rose")
    wait(page, lambda: len(captions(page)) == 20)
    open_an_image_and_use_the_keyboard(page)

    page.get_by_text("Runs", exact=True).click()
    wait(page, lambda: "view=runs" in page.url and page.get_by_text("4 runs in").count() == 1)
    page.goto(f"{server}/?view=runs&run=tiny&show=wrong")
    wait(page, lambda: captions(page) and all("✗" in line for line in predictions(page)))
    search_by_a_sentence_and_by_files(page, good, bad, large)


def test_an_address_that_was_typed_by_hand(page, server):
    page.goto(f"{server}/?page=%zz&class=%ff%00&sure=%F0%9F%8C%B8&sort=%3Cb%3E&x={'9' * 5000}")
    wait(page, lambda: len(captions(page)) == 48 and not urlsplit(page.url).query)
    page.goto(f"{server}/?view=runs&run=other&run=tiny&other=..%2F%3Cb%3Ex")
    wait(page, lambda: page.get_by_text("There is no run ../<b>x with").count() == 1)
    assert not page.locator(ACCURACIES).count() and not captions(page)
    page.goto(f"{server}/?view=map&box=NaN,1,2,3&laid=%2e%2e%2ftiny")
    wait(page, lambda: page.get_by_text("There is no run ../tiny with").count() == 1)
    assert not page.locator(CHART).count()


# -----------------------------------------------------------------------------
# impatient visitors


def click_twice(page, target, pause):
    """Click twice on one spot; the second click comes while the first is being answered."""
    box = target.bounding_box()
    x, y = box["x"] + 5, box["y"] + 5
    page.mouse.click(x, y)
    page.wait_for_timeout(pause)
    page.mouse.click(x, y)


@pytest.mark.parametrize("pause", [0, 20, 50])
def test_a_cell_of_the_confusion_matrix_opens_its_pictures(page, server, pause):
    # Other filters do not stay: the list has as many pictures as the cell says.
    page.goto(f"{server}/?view=runs&run=tiny&part=confusion&sure=60-70&show=wrong&class=lotus")
    cell = page.locator(".matrix button").nth(1)
    title = re.fullmatch("(.*) → (.*): ([0-9]+) of [0-9]+", cell.get_attribute("title"))
    true, guess, count = title.groups()
    click_twice(page, cell, pause)
    page.wait_for_timeout(500)  # both clicks have been answered if the page is idle after it
    wait(
        page,
        lambda: (
            "guess=" in page.url and "part=" not in page.url and len(captions(page)) == int(count)
        ),
    )
    assert all(line.endswith(true) for line in captions(page))
    assert all(guess in line for line in predictions(page))


def click_row(page, row, x):
    """Click on a row of the first table of Streamlit's, from 0, at x."""
    box = page.locator(TABLE).first.bounding_box()
    page.mouse.click(box["x"] + x, box["y"] + ROW * (row + 1.5))


def test_a_row_of_the_table_of_classes_opens_its_pictures(page, server):
    page.goto(f"{server}/?view=runs&run=tiny&part=classes&sure=60-70&show=wrong&guess=rose")
    page.locator(TABLE).wait_for()
    page.wait_for_selector(IDLE)
    click_row(page, 0, 100)
    wait(page, lambda: "class=" in page.url and len(captions(page)) == 5)  # of 30 of six classes
    name = parse_qs(urlsplit(page.url).query)["class"][0]
    assert all(line.endswith(name) for line in captions(page))
    assert not any(key in page.url for key in ("sure", "show", "guess", "part"))


def test_ticked_runs_are_described_and_compared(page, server, runs):
    page.goto(f"{server}/?view=runs")
    page.locator(TABLE).wait_for()
    page.wait_for_selector(IDLE)
    scroller = page.locator("[data-testid=stDataFrame] .dvn-scroller")
    assert scroller.evaluate("e => e.scrollWidth - e.clientWidth") <= 0  # all columns are in sight
    # There is no list to turn the pages of, and no image: the keys of these do nothing here.
    for key in ("ArrowRight", "ArrowLeft", "Escape", "s"):
        page.locator(MAIN).press(key)
    click_row(page, 0, TICK)
    wait(page, lambda: page.get_by_text("Settings of tiny").count() == 1)
    wait(page, lambda: page.get_by_text("training loss").count() >= 1)
    click_row(page, 2, TICK)
    wait(page, lambda: page.locator(COMPARE).inner_text() == "Compare 2 ticked runs")
    assert not page.get_by_text("Settings of").count()
    page.locator(COMPARE).click()
    wait(page, lambda: "run=tiny&other=third" in page.url and len(captions(page)) == 30)
    assert_equals_a_fresh_page(page, runs)
    page.go_back()
    wait(page, lambda: "run=" not in page.url and page.get_by_text("4 runs in").count() == 1)


# page.js holds a second click back for 0.7 s: this clock makes that time pass between two clicks,
# as if the answer to the first took longer.
FAST_CLOCK = "Date.now = (now => () => now += 1000)(Date.now())"


def test_a_hurried_visitor_finds_no_error(page, server):
    for pause in (0, 20, 30, 40):
        page.goto(server)
        wait(page, lambda: len(captions(page)) == 48)
        page.evaluate(FAST_CLOCK)
        click_twice(page, page.locator(PICTURE).nth(3), pause)
        wait(page, lambda: "image=4" in page.url and page.locator(".image img").count() == 1)

    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "Escape"):
        page.wait_for_timeout(60)  # on before the picture has come
        page.locator(MAIN).press(key)
    wait(page, lambda: "image=" not in page.url and len(captions(page)) == 48)
    page.get_by_role("button", name="Next").first.dblclick()
    wait(page, lambda: starts_with(page, 49, 97))


def test_a_key_pressed_again_and_again_leaves_the_page_whole(page, server):
    page.goto(f"{server}/?image=30")
    wait(page, lambda: page.locator(".image img").count() == 1)
    for key, times, pause in (
        ("ArrowRight", 10, 100),
        ("ArrowLeft", 5, 100),
        ("ArrowRight", 300, 5),
    ):
        for _ in range(times):
            page.locator(MAIN).press(key)
            page.wait_for_timeout(pause)
    page.wait_for_timeout(1000)  # PAUSE of page.js is over
    page.locator(MAIN).press("Escape")
    # The grid is at the page of the last image.
    wait(page, lambda: "image=" not in page.url and len(captions(page)) in (24, 48))
    assert not page.get_by_text("Connection error").count()


@pytest.mark.parametrize(
    "target",
    ["[data-testid=stButton] button:has-text('Next')", PICTURE, ".matrix button", "[role=radio]"],
)
def test_three_hundred_clicks_leave_the_page_whole(page, server, runs, target):
    address = "?view=runs&run=tiny&part=confusion" if "matrix" in target else "?view=browse"
    page.goto(f"{server}/{address}")
    page.locator(target).nth(1 if target == PICTURE else 0).wait_for()
    page.wait_for_selector(IDLE)
    box = page.locator(target).nth(1 if target == PICTURE else 0).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for _ in range(300):
        page.mouse.click(x, y)
        page.wait_for_timeout(5)
    comes_to_rest(page)
    assert_equals_a_fresh_page(page, runs)


# Where the elements that match a selector are in the window: x, y, width, height. Not those that
# open a window of the browser, or lay something over the whole page.
BOXES = """selector => {
    const found = [];
    function look(root) {
        for (const element of root.querySelectorAll(selector)) {
            const box = element.getBoundingClientRect();
            const x = box.x + box.width / 2, y = box.y + box.height / 2;
            const inside = x > 0 && y > 0 && x < innerWidth && y < innerHeight;
            const left_out = "[data-testid=stFileUploader], [data-testid=stElementToolbar]";
            if (box.width && inside && !element.closest(left_out))
                found.push([box.x, box.y, box.width, box.height]);
        }
        for (const element of root.querySelectorAll("*"))
            if (element.shadowRoot) look(element.shadowRoot);
    }
    look(document.querySelector("[data-testid=stMain]") || document);
    return found;
}"""
# A click on a download does nothing: Streamlit can't finish one, and logs an error, when the list
# that it is of has just been left.
WITHOUT_DOWNLOADS = """() => addEventListener("click", event => {
    if (event.target.closest("[data-testid=stDownloadButton]")) event.stopImmediatePropagation();
}, true)"""
BUTTONS = "button, label, .pictures a, [role=radio]"
LIST = "input[role=combobox]"
SLIDER = "[data-testid=stSlider] [role=group]"

# Where a hurried visitor begins: each part of the page is hit from one of these.
BEGINNINGS = (
    "?image=30",
    "?view=runs",
    "?view=runs&run=tiny&other=other&show=changed",
    "?view=runs&run=tiny&other=third&part=classes",
    "?view=runs&run=third&other=tiny&part=confusion&cells=difference",
    "?view=map&colour=outcome",
    "?view=search&q=rose",
)
HURRY = int(os.environ.get("HURRY", 9))  # things that are done in each of these visits


def any_box(page, rng, selector):
    """The place of one of the elements that match, or None."""
    boxes = page.evaluate(BOXES, selector)
    return rng.choice(boxes) if boxes else None


def press_keys(page, rng, times, pause):
    for _ in range(times):
        page.keyboard.press(rng.choice(["ArrowLeft", "ArrowRight", "ArrowRight", "s", "Escape"]))
        page.wait_for_timeout(pause)
    return True


def hold_a_key(page, rng, times, pause):
    key = rng.choice(["ArrowLeft", "ArrowRight"])
    for _ in range(2 * times):
        page.keyboard.down(key)  # again without `up`: as the keyboard repeats it
        page.wait_for_timeout(30)
    page.keyboard.up(key)
    return True


def click_buttons(page, rng, times, pause):
    boxes = page.evaluate(BOXES, BUTTONS)
    for x, y, width, height in rng.choices(boxes, k=min(times, 4)) if boxes else ():
        page.mouse.click(x + width / 2, y + height / 2)
        page.wait_for_timeout(pause)
    return boxes


def click_in_a_table(page, rng, times, pause):
    """Ticks and cells: not the names of the columns, which sort the table in the browser alone."""
    box = any_box(page, rng, TABLE)
    for _ in range(min(times, 3) if box else 0):
        x = rng.choice([TICK, rng.uniform(0, box[2])])
        y = rng.uniform(ROW, box[3])
        page.mouse.click(box[0] + x, box[1] + y)
        page.wait_for_timeout(pause)
    return box


def click_a_slider(page, rng, times, pause):
    box = any_box(page, rng, SLIDER)
    for _ in range(min(times, 3) if box else 0):
        page.mouse.click(box[0] + rng.uniform(0, box[2]), box[1] + box[3] / 2)
        page.wait_for_timeout(pause)
    return box


def choose_from_a_list(page, rng, times, pause):
    box = any_box(page, rng, LIST)
    if box:
        page.mouse.click(box[0] + 5, box[1] + box[3] / 2)
        page.wait_for_timeout(pause)
        for key in [*["ArrowDown"] * rng.randint(1, 4), "Enter"]:
            page.keyboard.press(key)
    return box


def draw_on_the_map(page, rng, times, pause):
    """A box, or a click that removes it."""
    box = any_box(page, rng, CHART)
    if box:
        page.mouse.move(box[0] + rng.uniform(0, box[2] / 2), box[1] + rng.uniform(0, 200))
        page.mouse.down()
        if times > 2:
            page.mouse.move(box[0] + rng.uniform(box[2] / 2, box[2]), box[1] + 400, steps=3)
        page.mouse.up()
        page.wait_for_timeout(pause)
    return box


def scroll(page, rng, times, pause):
    page.mouse.wheel(0, rng.choice([-1000, 400, 1000]))
    return True


def go_back_or_forward(page, rng, times, pause):
    # Not to the empty page that was there before the first address.
    action = rng.choice(["Back", "Forward"])
    can = f"navigation.canGo{action}"
    page.evaluate(f"() => {{ if ({can}) history.{action.lower()}() }}")
    page.wait_for_timeout(pause)
    return True


ACTIONS = (
    press_keys,
    hold_a_key,
    *[click_buttons] * 4,
    *[click_in_a_table] * 2,
    *[click_a_slider] * 3,
    *[choose_from_a_list] * 2,
    *[draw_on_the_map] * 3,
    scroll,
    go_back_or_forward,
)


def act_at_random(page, rng):
    """One thing that a hurried visitor does where the page has a place for it, at random speed."""
    done = False
    while not done:
        times = rng.randint(1, 12)
        pause = rng.choice([0, 5, 20, 60, 150])  # milliseconds
        done = rng.choice(ACTIONS)(page, rng, times, pause)


def comes_to_rest(page):
    """Until the page is idle, and still is a while later."""
    for _ in range(2):
        page.wait_for_timeout(800)  # PAUSE of page.js is over
        page.wait_for_selector(IDLE)


def leave_what_no_address_keeps(page):
    """Leave a field that is written in, and a tick, which are in no address.

    A field shows how many letters it may still take, as long as the cursor is in it. Ticked runs
    are compared; where there are too few, the table is left and opened anew.
    """
    page.evaluate("document.activeElement.blur()")
    comes_to_rest(page)
    if "view=runs" not in page.url or "run=" in page.url:
        return
    if page.locator(COMPARE).count():
        page.locator(COMPARE).click()
    else:
        page.get_by_text("Browse", exact=True).click()
        comes_to_rest(page)
        page.get_by_text("Runs", exact=True).click()
    comes_to_rest(page)


# Rows of a table, sorted: a click on the name of a column sorts them in the browser alone.
ROWS = """all => all.map(table => [...table.querySelectorAll("tbody tr")]
    .map(row => [...row.cells].map(cell => cell.textContent)).sort())"""
ACCURACIES = ".table tr:has(td)"
ACCURACY_OF = "all => all.map(row => [row.cells[0].textContent, row.cells[1].textContent])"
VALUES = "all => all.map(input => [input.getAttribute('aria-label'), input.value])"


def what_is_shown(page):
    """All that a visitor reads, and what is chosen: a dict, so that a failure names the part."""
    page.wait_for_selector(IDLE)
    main = page.locator(MAIN)
    chosen = main.locator("[aria-checked=true], [aria-pressed=true], .bars button.on")
    return {
        "title": page.title(),
        "text": main.inner_text(),
        "inputs": main.locator("input:not([type=file])").evaluate_all(VALUES),
        "chosen": chosen.all_inner_texts(),
        "pictures": page.locator(f"{PICTURE} img, .image img").evaluate_all(
            "all => all.map(picture => picture.src)"
        ),
        "captions": page.locator(f"{PICTURE} p").all_inner_texts(),
        "links": page.locator(PICTURE).evaluate_all("all => all.map(link => link.href)"),
        "cells": page.locator(".matrix button").all_inner_texts(),
        "tables": page.locator(TABLE).evaluate_all(ROWS),
        "accuracies": page.locator(".table").all_inner_texts(),
        "dots": page.locator(f"{CHART} .mark-symbol path").evaluate_all(
            "all => all.map(dot => [dot.getAttribute('transform'), dot.getAttribute('fill')])"
        ),
    }


def apart(one, other):
    """The lines, or items, that differ between two texts or lists: few enough for a failure."""
    lines = [
        each.splitlines() if isinstance(each, str) else [str(item) for item in each]
        for each in (one, other)
    ]
    return list(difflib.unified_diff(*lines, n=0, lineterm=""))[2:]  # without names of files


def differences(page, fresh):
    """What only one of two pages shows, by the parts of what_is_shown."""
    one, other = what_is_shown(page), what_is_shown(fresh)
    found = {part: apart(one[part], other[part]) for part in one if one[part] != other[part]}
    # A table is drawn first, and can be read a moment later.
    unread = [each.locator(f"{TABLE}:not(:has(tbody tr))").count() for each in (page, fresh)]
    return found | ({"unread tables": unread} if any(unread) else {})


def assert_says_what_the_runs_say(page, runs):
    """Top-1 and the lines under the pictures are those of the runs in the address."""
    query = parse_qs(urlsplit(page.url).query)
    names = [*query.get("run", []), *query.get("other", [])]
    if query.get("view") != ["runs"] or not names or "image" in query:
        return
    said, top1 = {}, {}
    for name in names:
        rows = read_csv(runs / name / "predictions.csv")
        top1[name] = 100 * np.mean([row["top1"] == row["label"] for row in rows])
        for row in rows:
            mark = "✓" if row["top1"] == row["label"] else "✗"
            line = f"{mark} {row['top1']} {100 * float(row['score1']):.0f}%"
            said.setdefault(int(row["file"][6:11]), []).append(line)

    shown = page.locator(ACCURACIES).evaluate_all(ACCURACY_OF)
    assert {name: float(number) for name, number in shown} == pytest.approx(top1, abs=0.00501)
    for picture in page.locator(PICTURE).all():
        title, *lines = picture.locator("p").all_inner_texts()
        assert lines == said[int(title.split()[0])], (page.url, title)


def assert_equals_a_fresh_page(page, runs):
    address = page.url
    fresh = new_page(page.context)
    fresh.goto(address)
    deadline = time.monotonic() + PATIENCE
    while (found := differences(page, fresh)) and time.monotonic() < deadline:
        page.wait_for_timeout(POLL)
    assert not found, f"{address}: {json.dumps(found)}"
    assert fresh.url == page.url == address
    fresh.close()
    assert_says_what_the_runs_say(page, runs)
    assert not page.get_by_text("Connection error").count()
    assert not page.locator("[data-testid=stException], [data-testid=stAlertContentError]").count()


@pytest.mark.parametrize(
    "seed, times",
    [(0, HURRY), *(pytest.param(seed, 60, marks=pytest.mark.slow) for seed in (1, 2))],
)
@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_a_hurried_visitor_finds_the_page_right_at_the_end(
    page, server, runs, beginning, seed, times
):
    rng = random.Random(seed)
    page.goto(f"{server}/{beginning}")
    page.evaluate(WITHOUT_DOWNLOADS)
    page.wait_for_selector(f"{PICTURE}, {TABLE}, {CHART}, .image, .matrix")
    page.wait_for_selector(IDLE)
    for _ in range(times):
        act_at_random(page, rng)
    leave_what_no_address_keeps(page)
    assert_equals_a_fresh_page(page, runs)


# -----------------------------------------------------------------------------
# a telephone

COUNT_CUT_OFF = """all => all
    .map(element => element.getBoundingClientRect())
    .filter(box => box.width && (box.right > 400 || box.left < 0))
    .length"""
COLOURS = "e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).color]"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_is_cut_off_on_a_telephone(chromium, server, theme):
    context = chromium.new_context(viewport={"width": 400, "height": 800}, color_scheme=theme)
    page = new_page(context)
    for address in (
        "?bars=shown",
        "?image=5",
        "?view=runs",
        "?view=runs&run=tiny&part=classes",
        "?view=runs&run=tiny&part=confusion",
        "?view=map&laid=tiny",
        "?view=search&q=rose",
        "?view=runs&run=tiny&other=other",
    ):
        page.goto(f"{server}/{address}")
        page.wait_for_selector(".pictures a, [data-testid=stDataFrame], .matrix, .vega-embed")
        page.wait_for_selector(IDLE)
        assert page.locator(MAIN).evaluate("e => e.scrollWidth") <= 400
        block = page.locator("[data-testid=stMainBlockContainer]")
        assert block.locator("button, input").evaluate_all(COUNT_CUT_OFF) == 0, address

    # The numbers of a run are moved under its name, which stays.
    accuracies = page.locator(".table").first
    name = accuracies.locator("td").first
    before = name.bounding_box()["x"]
    accuracies.evaluate("e => e.scrollBy(150, 0)")
    assert accuracies.evaluate("e => e.scrollLeft") == 150
    assert name.bounding_box()["x"] == before

    # Legible in both themes: the brightnesses (sums of red, green, blue) are far apart.
    style = page.locator("[data-testid=stApp]").evaluate(COLOURS)
    background, ink = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in style)
    assert (background < ink) == (theme == "dark")
    assert abs(background - ink) > 400
    # So is the name of a chosen run, on the ground of the page.
    ground, name = page.locator("[data-tag]").first.evaluate(COLOURS)
    assert ground == "rgba(0, 0, 0, 0)"
    assert abs(background - sum(map(int, re.findall(r"\d+", name)[:3]))) > 400
    context.close()
