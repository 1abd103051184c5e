"""How long a visitor of web.py waits, beside the plain way: st.image(path) of the originals, and the folder listed in every rerun.

    python benchmarks/web.py --data_root data/flowers-102                   # two minutes; needs playwright (pip) and Chromium (apt-get install chromium)
    python benchmarks/web.py --data_root data/flowers-102 --images 8189     # its images under so many ids: what does the number of images cost?

Clock: from the click or address to the moment when the page rests and every picture is decoded, in a headless Chromium 1440 wide with an
empty cache; both servers run on this machine and take turns, and the median of the rounds is given. Search uses a `tiny` of random weights.
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
from pathlib import Path

import numpy as np
import scipy.io
import torch
from measure import add_arguments, report

from flowers import UserError, command, models
from flowers.data import Flowers, add_data_arguments, open_flowers
from flowers.gallery.thumbnails import thumbnail

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
RESTS = """n => {
    const pictures = [...document.querySelectorAll("[data-testid=stImage] img")];
    for (const host of document.querySelectorAll("*")) if (host.shadowRoot) pictures.push(...host.shadowRoot.querySelectorAll("img"));
    return document.querySelector("[data-testid=stApp]")?.dataset.testScriptState == "notRunning" && pictures.length >= n
        && pictures.every(p => p.complete && p.naturalWidth) && pictures.map(p => p.src).join() != window.before;
}"""
REMEMBER = (
    "() => { const s = []; for (const h of document.querySelectorAll('*')) { if (h.matches('[data-testid=stImage] img')) s.push(h.src);"
    " if (h.shadowRoot) s.push(...[...h.shadowRoot.querySelectorAll('img')].map(i => i.src)) } window.before = s.join() }"
)


def repeated(flowers: Flowers, n: int, root: Path) -> Path:
    """A dataset of n images in torchvision's layout: links to those of `flowers`, again and again; every eighth is trnid, every next valid."""
    (root / "jpg").mkdir(parents=True)
    ids = np.arange(1, n + 1)
    for i in ids:
        (root / "jpg" / f"image_{i:05d}.jpg").symlink_to(
            flowers.files[i % len(flowers.files)].resolve()
        )
    scipy.io.savemat(
        root / "imagelabels.mat", {"labels": flowers.labels[ids % len(flowers.files)][None] + 1}
    )
    scipy.io.savemat(
        root / "setid.mat",
        {"trnid": ids[ids % 8 == 0], "valid": ids[ids % 8 == 1], "tstid": ids[ids % 8 > 1]},
    )
    (root / "cat_to_name.json").write_text(
        json.dumps({str(c): name for c, name in enumerate(flowers.class_names, 1)})
    )
    return root


def start(script: str, arguments: list[str], environment: dict) -> tuple[subprocess.Popen, str]:
    """A streamlit server of its own, and its address, when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "streamlit",
            "run",
            script,
            "--server.headless=true",
            "--server.address=127.0.0.1",
            f"--server.port={port}",
            "--browser.gatherUsageStats=false",
            "--",
            *arguments,
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(300):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5)
            return process, f"http://127.0.0.1:{port}/"
        except OSError:
            time.sleep(0.1)
    process.terminate()
    raise UserError("streamlit did not start within 30 s")


def waited(page, act, pictures: int) -> float:
    """Seconds from the action until the page rests with at least so many pictures, other ones than before."""
    page.evaluate(REMEMBER)
    begin = time.perf_counter()
    act()
    page.wait_for_function(RESTS, arg=pictures, polling=10, timeout=120_000)
    return time.perf_counter() - begin


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
        help="measure on so many, the dataset's own again and again (default: 0, the dataset as it is)",
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
    flowers = open_flowers(args.data_root, args.splits_path)
    work = Path(tempfile.mkdtemp())
    if args.images:
        flowers = open_flowers(repeated(flowers, args.images, work / "data"))
    (work / "plain.py").write_text(PLAIN)
    (work / "runs" / "tiny").mkdir(parents=True)
    torch.save(models.build("tiny").state_dict(), work / "runs" / "tiny" / "model.pt")
    environment = {**os.environ, "XDG_CACHE_HOME": str(work / "cache")}
    identity = [
        int(flowers.files[i].stem[6:])
        for i in range(0, len(flowers.files), max(1, len(flowers.files) // args.rounds))
    ]
    rows: dict[str, dict[str, list[float]]] = {}
    for i, file in enumerate(flowers.files[:48]):
        (work / f"{i}.jpg").write_bytes(thumbnail(file))
    (work / "static.html").write_text("".join(f"<img src={i}.jpg width=160>" for i in range(48)))
    static: list[float] = []  # what the browser alone takes for 48 pictures
    servers = []
    try:
        plain = start(str(work / "plain.py"), [str(flowers.root)], environment)
        servers.append(plain[0])
        ours = start(
            str(Path(__file__).resolve().parent.parent / "web.py"),
            ["--data_root", str(flowers.root), "--runs", str(work / "runs")],
            environment,
        )
        servers.append(ours[0])
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=args.chromium, args=FLAGS)

            def measure(name, way, address, pictures, act=None):
                page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
                seconds = waited(page, lambda: page.goto(address), pictures if act is None else 48)
                if act is not None:
                    page.wait_for_timeout(300)
                    seconds = waited(page, lambda: act(page), pictures)
                rows.setdefault(name, {}).setdefault(way, []).append(seconds)
                page.context.close()

            def sentence(page):
                page.get_by_label("Sentence").fill("a yellow flower with a dark centre, please")
                page.get_by_label("Sentence").press("Enter")

            flip = lambda page: page.get_by_role("button", name="Next").click()
            choose = lambda page: page.get_by_role("radio", name="train").click()
            look = lambda page: page.locator(".pictures button").nth(20).click()
            search = ours[1] + "?view=search&q=a+red+flower"
            measure("first page after the server's start", "plain", plain[1], 48)
            measure("first page after the server's start", "web.py", ours[1], 48)
            begin = time.perf_counter()
            while not list(work.glob("cache/flowers-102/*/thumbnail-hsv*.npy")) and not list(
                flowers.root.glob(".cache/thumbnail-hsv*.npy")
            ):
                time.sleep(0.2)
            print(
                f"thumbnails and colours of {len(flowers.files):,} images: {time.perf_counter() - begin:.1f} s more in the background, once"
            )
            measure("first search: features of all images", "web.py", search, 48)
            for i in range(args.rounds):
                for way, address in (("plain", plain[1]), ("web.py", ours[1])):
                    measure("first page", way, address, 48)
                    measure("page flip", way, address, 48, flip)
                    measure(
                        "single image by its address",
                        way,
                        f"{address}?image={identity[i]}",
                        13 if way == "web.py" else 1,
                    )
                page = browser.new_page(viewport={"width": 1440, "height": 900})
                begin = time.perf_counter()
                page.goto((work / "static.html").as_uri())
                page.wait_for_function(
                    "() => [...document.images].every(p => p.complete && p.naturalWidth)",
                    polling=10,
                )
                static.append(time.perf_counter() - begin)
                page.close()
                measure("single image from the grid", "web.py", ours[1], 13, look)
                measure("filter by split", "web.py", ours[1], 48, choose)
                measure("search", "web.py", search, 48, sentence)
            browser.close()
    finally:
        for process in servers:
            process.terminate()
            process.wait()
        shutil.rmtree(work)
    for name in ("first page", "page flip", "single image by its address"):
        spent = {
            "st.image(path) of the originals": rows[name]["plain"],
            "web.py": rows[name]["web.py"],
        }
        limit = (
            (statistics.median(static), "the thumbnails as a static page")
            if "single" not in name
            else ()
        )
        report(
            args.rows,
            f"web page of 48 in a browser, {name}"
            if limit
            else f"web page, {name} (web.py: and 12 neighbours)",
            spent,
            *limit,
        )
    print(
        f"\n{len(flowers.files):,} images, {os.cpu_count()} cores; load {os.getloadavg()[0]:.1f} at the end"
    )
    print(
        f"{'seconds, median [least, most]':38s}{'plain':>20s}{'web.py':>20s}{'plain / web.py':>16s}"
    )
    for name, ways in rows.items():
        cells = [
            f"{statistics.median(ways[w]):.2f} [{min(ways[w]):.2f}, {max(ways[w]):.2f}]"
            if w in ways
            else "-"
            for w in ("plain", "web.py")
        ]
        ratio = (
            f"{statistics.median(a / b for a, b in zip(ways['plain'], ways['web.py'])):.2f}"
            if "plain" in ways
            else "-"
        )
        print(f"{name:38s}{cells[0]:>20s}{cells[1]:>20s}{ratio:>16s}")


if __name__ == "__main__":
    main()
