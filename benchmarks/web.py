"""How long a visitor of web.py waits, beside the plain way: st.image(path) of the originals, and
the folder listed in every rerun.

    python benchmarks/web.py --data_root data/flowers-102                # two minutes
    python benchmarks/web.py --data_root data/flowers-102 --images 8189  # does their number matter?

It needs playwright (pip) and Chromium (apt-get install chromium). The second command shows the
images under so many ids, again and again. The clock runs from the click or address until the
page rests and every picture is decoded, in a headless Chromium 1440 wide with an empty cache. Both
servers run on this machine and take turns; the median of the rounds is given. Search uses a `tiny`
of random weights.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.io
import torch
from measure import add_arguments, report

from flowers import UserError, command, models
from flowers.data import Flowers, add_data_arguments, open_flowers
from flowers.files import write_csv
from flowers.gallery.thumbnails import thumbnail

# -----------------------------------------------------------------------------
# what runs in Streamlit and in the browser

# The page as one would write it at first: 48 pictures, a class, a button, or one image.
PLAIN = """
import json, os, sys
import scipy.io
import streamlit as st
st.set_page_config(layout="wide")
root = sys.argv[1]
files = sorted(os.listdir(f"{root}/jpg"))
labels = scipy.io.loadmat(f"{root}/imagelabels.mat")["labels"][0]
names = json.load(open(f"{root}/cat_to_name.json"))
caption = lambda file: names[str(labels[int(file[6:11]) - 1])]
if "image" in st.query_params:
    file = f"image_{int(st.query_params['image']):05d}.jpg"
    st.image(f"{root}/jpg/{file}", caption=caption(file))
else:
    st.selectbox("Class", sorted(names.values()), index=None)
    if st.button("Next"):
        st.session_state["page"] = st.session_state.get("page", 0) + 1
    first = 48 * st.session_state.get("page", 0)
    columns = st.columns(11)
    for k, file in enumerate(files[first:first + 48]):
        columns[k % 11].image(f"{root}/jpg/{file}", caption=caption(file))
"""
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# All pictures of the page, those of web.py's own component (in a shadow root) included.
PICTURES = """
    const pictures = [...document.querySelectorAll("[data-testid=stImage] img")];
    for (const host of document.querySelectorAll("*"))
        if (host.shadowRoot) pictures.push(...host.shadowRoot.querySelectorAll("img"));
    const sources = pictures.map(p => p.src).join();
"""
# Remember which pictures are shown before the click.
REMEMBER = f"() => {{ {PICTURES} window.before = sources; }}"
# The page rests, shows at least n pictures, all decoded, and other ones than before.
RESTS = f"""n => {{
    {PICTURES}
    const app = document.querySelector("[data-testid=stApp]");
    return app?.dataset.testScriptState == "notRunning"
        && pictures.length >= n
        && pictures.every(p => p.complete && p.naturalWidth)
        && sources != window.before;
}}"""
# The table of runs is drawn, or the confusion matrix; either after a click that led there.
IDLE = 'document.querySelector("[data-testid=stApp]")?.dataset.testScriptState == "notRunning"'
TABLE = f"""n => {IDLE} && document.querySelector("[data-testid=stDataFrame] canvas")"""
MATRIX = f"""n => {IDLE} && [...document.querySelectorAll("*")]
    .some(element => element.shadowRoot?.querySelector(".matrix button"))"""
DECODED = "() => [...document.images].every(p => p.complete && p.naturalWidth)"

VIEWPORT = {"width": 1440, "height": 900}
PER_PAGE = 48  # pictures of a page of the grid
SENTENCE = "?view=search&q=a+red+flower"  # the address of a search
SINGLE = 13  # web.py shows an image with 12 neighbours
RUNS = 500  # in the table of runs
PREDICTED = RUNS // 10  # of these, runs with predictions
RESTARTS = 3  # of the server, for each of the first visits that are measured
PATIENCE_S = 300  # for a server that starts
REST_MS = 120_000  # for a page


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser, splits=False)
    add_arguments(parser)
    parser.add_argument(
        "--images",
        type=int,
        default=0,
        help="images to show, the dataset's own again and again (default: 0, each once)",
    )
    parser.add_argument(
        "--chromium", default="/usr/bin/chromium", help="the browser (default: %(default)s)"
    )
    args = parser.parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise UserError("playwright is missing: pip install playwright") from None
    if not shutil.which(args.chromium):
        raise UserError(
            f"there is no {args.chromium}: apt-get install chromium, or give --chromium"
        )

    # -----------------------------------------------------------------------------
    # the dataset, a model to search with, two servers, a browser
    flowers = open_flowers(args.data_root, args.splits_path, splits_base=args.splits_base)
    folder = Path(tempfile.mkdtemp())
    servers = []
    try:
        if args.images:
            flowers = open_flowers(repeated(flowers, args.images, folder / "data"))
        write_files(flowers, folder)
        environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
        root = str(flowers.root)
        web = str(Path(__file__).resolve().parent.parent / "web.py")
        addresses = {
            "plain": start(servers, str(folder / "plain.py"), [root], environment),
            "web.py": start(
                servers, web, ["--data_root", root, "--runs", str(folder / "runs")], environment
            ),
        }
        many = start(
            servers, web, ["--data_root", root, "--runs", str(folder / "many")], environment
        )
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=args.chromium, args=FLAGS)
            visitor = Visitor(browser)
            first_visit(visitor, addresses, flowers, folder)
            static = visit(visitor, addresses, flowers, folder, args.rounds)
            visit_runs(visitor, many, args.rounds)
            visit_restarted(visitor, servers, web, ["--data_root", root], folder, environment)
            browser.close()
    finally:
        for process in servers:
            process.terminate()
            process.wait()
        shutil.rmtree(folder)

    # -----------------------------------------------------------------------------
    # results
    report_rows(args.rows, visitor.seconds, static)
    print_table(visitor.seconds, len(flowers.files))


# -----------------------------------------------------------------------------
# dataset and servers


def repeated(flowers: Flowers, n: int, root: Path) -> Path:
    """A dataset of n images in torchvision's layout: links to those of `flowers`, again and again.

    Every eighth is in trnid, the one after it in valid, all others in tstid.
    """
    (root / "jpg").mkdir(parents=True)
    ids = np.arange(1, n + 1)
    index = ids % len(flowers.files)
    for i in ids:
        link = root / "jpg" / f"image_{i:05d}.jpg"
        link.symlink_to(flowers.files[i % len(flowers.files)].resolve())
    labels = flowers.labels[index][None] + 1  # (1, n), 1-based as Oxford's
    splits = {"trnid": ids[ids % 8 == 0], "valid": ids[ids % 8 == 1], "tstid": ids[ids % 8 > 1]}
    names = {str(c): name for c, name in enumerate(flowers.class_names, 1)}
    scipy.io.savemat(root / "imagelabels.mat", {"labels": labels})
    scipy.io.savemat(root / "setid.mat", splits)
    (root / "cat_to_name.json").write_text(json.dumps(names))
    return root


def write_files(flowers: Flowers, folder: Path) -> None:
    """Write the plain script, a model for the search, and a static page of thumbnails."""
    (folder / "plain.py").write_text(PLAIN)
    (folder / "runs" / "tiny").mkdir(parents=True)
    torch.save(models.build("tiny").state_dict(), folder / "runs" / "tiny" / "model.pt")
    write_runs(flowers, folder / "many")
    for i, file in enumerate(flowers.files[:PER_PAGE]):
        (folder / f"{i}.jpg").write_bytes(thumbnail(file))
    pictures = [f"<img src={i}.jpg width=160>" for i in range(PER_PAGE)]
    (folder / "static.html").write_text("".join(pictures))


def write_runs(flowers: Flowers, runs: Path) -> None:
    """Write RUNS made-up runs; PREDICTED of them have predictions, three of four right."""
    rng = np.random.default_rng(0)
    strategies = ("full", "lora", "linear")
    for k in range(RUNS):
        run = runs / f"run-{k}"
        run.mkdir(parents=True)
        settings = {"architecture": "tiny", "strategy": strategies[k % 3], "epochs": 1, "seed": k}
        (run / "args.json").write_text(json.dumps(settings))
        top1 = rng.uniform(20, 90)
        result = {"test/top1": top1, "test/top1_low": top1 - 3, "test/top1_high": top1 + 3}
        (run / "result.json").write_text(json.dumps(result))
    for k in range(PREDICTED):
        rows = []
        for i in flowers.splits["test"]:
            label = flowers.labels[i]
            is_right = rng.random() < 0.75
            guess = label if is_right else rng.integers(len(flowers.class_names))
            row = {"file": flowers.file_names[i], "label": flowers.class_names[label]}
            rows.append(row | {"top1": flowers.class_names[guess], "score1": rng.random()})
        write_csv(runs / f"run-{k}" / "predictions.csv", rows)


def start(servers: list, script: str, arguments: list[str], environment: dict) -> str:
    """Start a Streamlit server, add its process to `servers`, and return its address.

    Raises UserError if it does not answer.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    streamlit = [sys.executable, "-m", "streamlit", "run", script]
    options = [
        "--server.headless=true",
        "--server.address=127.0.0.1",
        f"--server.port={port}",
        "--browser.gatherUsageStats=false",
    ]
    process = subprocess.Popen(
        [*streamlit, *options, "--", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    servers.append(process)
    address = f"http://127.0.0.1:{port}/"
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(address + "_stcore/health", timeout=5)
            return address
        except OSError:
            time.sleep(0.1)
    raise UserError(f"streamlit did not start within {PATIENCE_S} s")


# -----------------------------------------------------------------------------
# a visitor with a clock


class Visitor:
    """Opens pages and notes the seconds: seconds[what]["plain" or "web.py"], one value a visit."""

    def __init__(self, browser):
        self.browser = browser
        self.seconds: dict[str, dict[str, list[float]]] = {}

    def measure(
        self,
        what: str,
        way: str,
        address: str,
        pictures: int,
        act: Callable | None = None,
        rests: str = RESTS,
    ) -> None:
        """Note the seconds until the page at the address rests with at least so many pictures.

        act(page): measure this action instead, on the grid that the address shows. rests: a
        condition in place of the pictures.
        """
        # a context of its own has an empty cache
        page = self.browser.new_context(viewport=VIEWPORT).new_page()
        if act is None:
            seconds = wait_for(page, lambda: page.goto(address), pictures)
        else:
            wait_for(page, lambda: page.goto(address), PER_PAGE)
            page.wait_for_timeout(300)  # what the page still does in the background
            seconds = wait_for(page, lambda: act(page), pictures, rests)
        self.seconds.setdefault(what, {}).setdefault(way, []).append(seconds)
        page.context.close()

    def static_page(self, address: str) -> float:
        """Seconds that the browser alone takes for a page of pictures."""
        page = self.browser.new_page(viewport=VIEWPORT)
        begin = time.perf_counter()
        page.goto(address)
        page.wait_for_function(DECODED, polling=10)
        seconds = time.perf_counter() - begin
        page.close()
        return seconds


def wait_for(page, act: Callable, pictures: int, rests: str = RESTS) -> float:
    """Seconds from act() until the page rests with at least so many pictures, all of them new."""
    page.evaluate(REMEMBER)
    begin = time.perf_counter()
    act()
    page.wait_for_function(rests, arg=pictures, polling=10, timeout=REST_MS)
    return time.perf_counter() - begin


def next_page(page) -> None:
    page.get_by_role("button", name="Next").first.click()


def choose_train(page) -> None:
    page.get_by_role("radio", name="train").click()


def open_runs(page) -> None:
    page.get_by_role("radio", name="Runs").click()


def choose_changed(page) -> None:
    page.get_by_role("radio", name="they disagree").click()


def open_matrix(page) -> None:
    page.get_by_role("radio", name="confusion").click()


def open_image(page) -> None:
    page.locator(".pictures a").nth(20).click()


def search_sentence(page) -> None:
    sentence = page.get_by_label("Sentence")
    sentence.fill("a yellow flower with a dark centre, please")
    sentence.press("Enter")


def first_visit(visitor: Visitor, addresses: dict, flowers: Flowers, folder: Path) -> None:
    """The first page and the first search after the start, which fill the caches."""
    for way, address in addresses.items():
        visitor.measure("first page after the server's start", way, address, PER_PAGE)

    # thumbnails and colours are made in the background
    begin = time.perf_counter()
    caches = (folder / "cache" / "flowers-102", flowers.root / ".cache")
    while not any(list(cache.rglob("thumbnail-hsv*.npy")) for cache in caches):
        time.sleep(0.2)
    seconds = time.perf_counter() - begin
    print(
        f"thumbnails and colours of {len(flowers.files):,} images: "
        f"{seconds:.1f} s more in the background, once"
    )
    search = search_address(addresses)
    visitor.measure("first search: features of all images", "web.py", search, PER_PAGE)


def visit(
    visitor: Visitor, addresses: dict, flowers: Flowers, folder: Path, rounds: int
) -> list[float]:
    """Measure what visitors do, both ways in turn; return the seconds of the static page."""
    static = []
    step = max(1, len(flowers.files) // rounds)
    for i in range(rounds):
        # another image in each round: image_00001.jpg has the id 1
        image_id = int(flowers.files[i * step % len(flowers.files)].stem[6:])
        for way, address in addresses.items():
            single = f"{address}?image={image_id}"
            pictures = SINGLE if way == "web.py" else 1
            visitor.measure("first page", way, address, PER_PAGE)
            visitor.measure("page flip", way, address, PER_PAGE, next_page)
            visitor.measure("single image by its address", way, single, pictures)
        static.append(visitor.static_page((folder / "static.html").as_uri()))
        ours = addresses["web.py"]
        visitor.measure("single image from the grid", "web.py", ours, SINGLE, open_image)
        visitor.measure("filter by split", "web.py", ours, PER_PAGE, choose_train)
        search = search_address(addresses)
        visitor.measure("search", "web.py", search, PER_PAGE, search_sentence)
    return static


def visit_runs(visitor: Visitor, many: str, rounds: int) -> None:
    """Measure the views of runs, of RUNS runs, PREDICTED of which have predictions."""
    compared = f"{many}?view=runs&run=run-0&other=run-1"
    for _ in range(rounds):
        visitor.measure(f"table of {RUNS} runs", "web.py", many, 0, open_runs, TABLE)
        visitor.measure("two runs: page flip", "web.py", compared, PER_PAGE, next_page)
        visitor.measure("two runs: they disagree", "web.py", compared, 1, choose_changed)
        visitor.measure("two runs: confusion matrix", "web.py", compared, 0, open_matrix, MATRIX)


def visit_restarted(
    visitor: Visitor, servers: list, web: str, data: list, folder: Path, environment: dict
) -> None:
    """Measure the first visit of a server that finds thumbnails and features in the cache folder.

    data: the flags of the dataset.
    """
    firsts = {
        "first page after a restart": "",
        "single image after a restart": "?image=1",
        "first sentence after a restart": SENTENCE,
    }
    for what, query in firsts.items():
        for _ in range(RESTARTS):
            flags = [*data, "--runs", str(folder / "runs")]
            address = start(servers, web, flags, environment)
            pictures = SINGLE if "image" in query else PER_PAGE
            visitor.measure(what, "web.py", address + query, pictures)
            server = servers.pop()
            server.terminate()
            server.wait()


def search_address(addresses: dict) -> str:
    """web.py's search, with a sentence."""
    return addresses["web.py"] + SENTENCE


# -----------------------------------------------------------------------------
# results


def report_rows(path: Path | None, seconds: dict, static: list[float]) -> None:
    """Print the rows of the table of all benchmarks, and append them to the file `path`."""

    def ways(what):
        return {
            "st.image(path) of the originals": seconds[what]["plain"],
            "web.py": seconds[what]["web.py"],
        }

    limit = statistics.median(static)
    for what in ("first page", "page flip"):
        title = f"web page of 48 in a browser, {what}"
        report(path, title, ways(what), limit, "the thumbnails as a static page")
    what = "single image by its address"
    report(path, f"web page, {what} (web.py: and 12 neighbours)", ways(what))


def print_table(seconds: dict, n_images: int) -> None:
    """Print the seconds of everything that was measured."""
    load = os.getloadavg()[0]
    print(f"\n{n_images:,} images, {os.cpu_count()} cores; load {load:.1f} at the end")
    title = "seconds, median [least, most]"
    print(f"{title:38s}{'plain':>20s}{'web.py':>20s}{'plain / web.py':>16s}")
    for what, ways in seconds.items():
        plain = summary(ways["plain"]) if "plain" in ways else "-"
        ours = summary(ways["web.py"])
        ratio = "-"
        if "plain" in ways:
            ratios = [a / b for a, b in zip(ways["plain"], ways["web.py"])]
            ratio = f"{statistics.median(ratios):.2f}"
        print(f"{what:38s}{plain:>20s}{ours:>20s}{ratio:>16s}")


def summary(values: list[float]) -> str:
    """The median, and the least and the greatest."""
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


if __name__ == "__main__":
    main()
