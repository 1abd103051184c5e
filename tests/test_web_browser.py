"""web.py from end to end in a real headless Chromium: what a visitor does, with no error box, no console error and no request to elsewhere."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from conftest import NAMES, ROOT, write_dataset
from PIL import Image

from flowers import models
from flowers.files import write_csv

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
IDLE = "[data-testid=stApp][data-test-script-state=notRunning]"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of `streamlit run web.py` on 120 discs, with a run that is right on two test images of three."""
    folder = tmp_path_factory.mktemp("browser")
    data = write_dataset(folder / "data", per_class=20)
    (folder / "runs" / "tiny").mkdir(parents=True)
    rows = []
    for i in [i for i in range(120) if i // len(NAMES) % 4 == 0]:
        name, other = NAMES[i % 6], NAMES[(i + 1) % 6]
        best = (name, other) if i % 3 else (other, name)
        rows.append(
            {
                "file": f"image_{i + 1:05d}.jpg",
                "label": name,
                "top1": best[0],
                "score1": 0.7,
                "top2": best[1],
                "score2": 0.2,
            }
        )
    write_csv(folder / "runs" / "tiny" / "predictions.csv", rows)
    torch.manual_seed(0)
    torch.save(models.build("tiny").state_dict(), folder / "runs" / "tiny" / "model.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "streamlit",
        "run",
        str(ROOT / "web.py"),
        "--server.headless=true",
        "--server.address=127.0.0.1",
        f"--server.port={port}",
        "--",
        "--data_root",
        str(data),
        "--runs",
        str(folder / "runs"),
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            for _ in range(300):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5)
                    break
                except OSError:
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()
    assert "Traceback" not in (folder / "log").read_text()


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
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, server):
    """A page 1440 wide that fails the test for a console error, or a request to another host."""
    page = chromium.new_page(viewport={"width": 1440, "height": 900})
    page.set_default_timeout(20_000)
    trouble = []
    page.on(
        "console", lambda message: trouble.append(message.text) if message.type == "error" else None
    )
    page.on(
        "response",
        lambda response: (
            trouble.append(f"{response.status} {response.url}") if response.status >= 400 else None
        ),
    )
    page.on("pageerror", lambda error: trouble.append(str(error)))
    own = (server, server.replace("http", "ws"), "data:", "blob:")
    page.on(
        "request",
        lambda request: None if request.url.startswith(own) else trouble.append(request.url),
    )
    yield page
    assert not page.locator("[data-testid=stException]").count()
    page.close()
    assert not trouble


def captions(page):
    return page.locator(".pictures button p:first-of-type").all_inner_texts()


def wait(page, condition):
    """Until condition() holds; its last value in the failure."""
    for _ in range(200):
        if condition():
            return page.wait_for_selector(IDLE)
        page.wait_for_timeout(50)
    raise AssertionError(f"{page.url}: {page.locator('body').inner_text()[:1500]}")


def test_a_visit(page, server, tmp_path):
    page.goto(server)
    wait(page, lambda: len(captions(page)) == 48)
    page.get_by_role("button", name="Next").click()
    wait(page, lambda: captions(page)[0].startswith("49 ") and "page=2" in page.url)
    page.go_back()
    wait(page, lambda: captions(page)[0].startswith("1 "))

    # filter: type to search, then a bar of the histogram
    box = page.get_by_role("combobox", name="Class")
    box.fill("tree")
    box.press("Enter")
    wait(
        page,
        lambda: (
            len(captions(page)) == 20 and all(c.endswith("tree mallow") for c in captions(page))
        ),
    )
    assert "class=tree+mallow" in page.url
    page.get_by_text("shown", exact=True).click()
    page.locator(".bars button", has_text="rose").click()
    wait(
        page,
        lambda: (
            "class=rose" in page.url
            and len(captions(page)) == 20
            and all(c.endswith("rose") for c in captions(page))
        ),
    )
    page.locator(".bars button.on").click()  # once more: all
    wait(page, lambda: "class=" not in page.url and len(captions(page)) == 48)

    # one image: by a click, on by the keyboard, back by Escape
    page.goto(f"{server}/?class=rose")
    wait(page, lambda: len(captions(page)) == 20)
    page.locator(".pictures button").nth(2).click()
    wait(page, lambda: "image=13" in page.url and page.get_by_text("3 of 20").count() == 1)
    wait(
        page,
        lambda: (
            page.locator(".image img").evaluate("i => [i.naturalWidth, i.naturalHeight]")
            == [87, 76]
        ),
    )  # its full size
    page.locator("[data-testid=stMain]").press("ArrowRight")
    wait(page, lambda: "image=19" in page.url and page.get_by_text("4 of 20").count() == 1)
    page.locator("[data-testid=stMain]").press("Escape")
    wait(page, lambda: "image=" not in page.url and len(captions(page)) == 20)

    # runs
    page.get_by_text("Runs", exact=True).click()
    wait(page, lambda: "view=runs" in page.url and page.get_by_text("images right").count() == 1)
    page.goto(f"{server}/?view=runs&show=wrong")
    wait(
        page,
        lambda: (
            captions(page)
            and all(
                "✗" in t
                for t in page.locator(".pictures button p:nth-of-type(2)").all_inner_texts()
            )
        ),
    )

    # search: a sentence, a good file, a broken one
    page.get_by_text("Search", exact=True).click()
    page.get_by_label("Sentence").fill("a red flower")
    page.get_by_label("Sentence").press("Enter")
    wait(page, lambda: len(captions(page)) == 48 and "q=a+red+flower" in page.url)
    good, bad = tmp_path / "good.png", tmp_path / "bad.jpg"
    Image.new("RGB", (300, 200), (200, 30, 60)).save(good)
    bad.write_bytes(b"\xff\xd8 no picture")
    page.locator("input[type=file]").set_input_files(good)
    wait(
        page,
        lambda: (
            page.get_by_role("img", name="your picture").count() == 1 and len(captions(page)) == 48
        ),
    )
    assert not page.locator("[data-testid=stAlert]").count()
    page.locator("input[type=file]").set_input_files(bad)
    wait(page, lambda: page.get_by_text("can't be read as a picture").count() == 1)


def click_twice(page, target, pause):
    """The second click comes while the first is being answered."""
    box = target.bounding_box()
    page.mouse.click(box["x"] + 5, box["y"] + 5)
    page.wait_for_timeout(pause)
    page.mouse.click(box["x"] + 5, box["y"] + 5)


@pytest.mark.parametrize("pause", [0, 20, 50])
def test_a_cell_of_the_confusion_matrix_opens_its_pictures(page, server, pause):
    page.goto(f"{server}/?view=runs&part=confusion")
    cell = page.locator(".matrix button").nth(1)
    true, guess, count = re.fullmatch(
        "(.*) → (.*): ([0-9]+) of [0-9]+", cell.get_attribute("title")
    ).groups()
    click_twice(page, cell, pause)
    page.wait_for_timeout(500)
    wait(
        page,
        lambda: (
            "guess=" in page.url and "part=" not in page.url and len(captions(page)) == int(count)
        ),
    )
    assert all(c.endswith(true) for c in captions(page))
    assert all(
        guess in t for t in page.locator(".pictures button p:nth-of-type(2)").all_inner_texts()
    )


def test_a_hurried_visitor_finds_no_error(page, server):
    for pause in (0, 20, 30, 40):
        page.goto(server)
        wait(page, lambda: len(captions(page)) == 48)
        page.evaluate(
            "Date.now = (now => () => now += 1000)(Date.now())"
        )  # as if the answer took longer than a second click is held back
        click_twice(page, page.locator(".pictures button").nth(3), pause)
        wait(page, lambda: "image=4" in page.url and page.locator(".image img").count() == 1)
    for key in (
        "ArrowRight",
        "ArrowRight",
        "ArrowLeft",
        "Escape",
    ):  # on before the picture has come
        page.wait_for_timeout(60)
        page.locator("[data-testid=stMain]").press(key)
    wait(page, lambda: "image=" not in page.url and len(captions(page)) == 48)
    page.get_by_role("button", name="Next").dblclick()
    wait(page, lambda: captions(page)[0].startswith(("49 ", "97 ")))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_is_cut_off_on_a_telephone(chromium, server, theme):
    context = chromium.new_context(viewport={"width": 400, "height": 800}, color_scheme=theme)
    page = context.new_page()
    for address in (
        "?bars=shown",
        "?image=5",
        "?view=runs",
        "?view=runs&part=classes",
        "?view=runs&part=confusion",
        "?view=search&q=rose",
    ):
        page.goto(f"{server}/{address}")
        page.wait_for_selector(".pictures button, [data-testid=stDataFrame], .matrix")
        page.wait_for_selector(IDLE)
        assert page.locator("[data-testid=stMain]").evaluate("e => e.scrollWidth") <= 400
        cut = (
            page.locator("[data-testid=stMainBlockContainer]")
            .locator("button, input")
            .evaluate_all(
                "all => all.map(e => e.getBoundingClientRect()).filter(r => r.width && (r.right > 400 || r.left < 0)).length"
            )
        )
        assert cut == 0, address
    style = page.locator("[data-testid=stApp]").evaluate(
        "e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).color]"
    )
    ground, ink = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in style)
    assert (ground < ink) == (theme == "dark") and abs(ground - ink) > 400
    context.close()
