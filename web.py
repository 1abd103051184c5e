"""Browse the dataset and what a model makes of it.

    streamlit run web.py                                                # data/flowers-102 if it is there, else the sample
    streamlit run web.py -- --data_root PATH --runs runs                # another dataset; runs of train.py and baseline_eval.py

Three views: Browse (filters, grid, one image), Runs (predictions of one or two runs) and Search (a sentence, or a picture of your own).
The address of the page always opens the same view again. Nothing is written but thumbnails and features, to the dataset's `.cache/`.
"""

import argparse
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import streamlit as st
from starlette.formparsers import MultiPartParser

from flowers import UserError, command
from flowers.data import add_data_arguments, open_flowers
from flowers.download import DEFAULT_ROOT, is_complete
from flowers.gallery import data as gallery
from flowers.gallery import panels
from flowers.layouts import read_captions

PER_PAGE, NEIGHBOURS = 48, 12
VIEWS, PARTS, ORDERS = (
    ("browse", "runs", "search"),
    ("pictures", "classes", "confusion"),
    ("id", "confidence"),
)
SHOWS, BARS = ("all", "right", "wrong", "changed", "mended", "broken"), ("hidden", "shown")
# what a view is made of, and its value where the address says nothing; each is the key of a widget, too
DEFAULTS = {
    "view": "browse",
    "class": None,
    "split": "all",
    "ids": "",
    "bars": "hidden",
    "page": 1,
    "image": None,
    "run": None,
    "other": None,
    "part": "pictures",
    "show": "all",
    "guess": None,
    "order": "id",
    "like": "colours",
    "q": "",
}
MultiPartParser.spool_max_size = (
    gallery.MAX_BYTES + 1
)  # a visitor's picture stays in memory: it would go to a temporary file from 1 MB on
S = st.session_state


@st.cache_resource(show_spinner=False)
def element():
    return st.components.v2.component("flowers", **panels.ELEMENT)


@st.cache_resource(
    show_spinner="opening the dataset; the sample is drawn the first time, which takes 20 s",
    max_entries=2,
)
def dataset(arguments: tuple, stamp: tuple):
    """The index, its ids, splits and thumbnails; opened again when `stamp`, the times of its files, changes."""
    flowers = open_flowers(**dict(arguments))
    return gallery.Data(
        flowers,
        gallery.image_ids(flowers),
        gallery.split_of(flowers),
        gallery.Thumbnails(flowers),
        (arguments, stamp),
    )


@st.cache_resource(
    show_spinner="computing; a run's features of all images take a while, once", max_entries=8
)
def kept(_make, path: Path, stamp: tuple):
    """What `_make` makes of a file, until it or the dataset changes: read_... of captions or predictions, the Searcher of a model."""
    return _make(path)


def stamp(*paths: Path) -> tuple:
    """Changes when one of the files does."""
    return tuple((str(p), p.stat().st_mtime_ns if p.exists() else 0) for p in paths)


def searcher(data: gallery.Data, run: Path) -> gallery.Searcher:
    return kept(
        lambda path: gallery.Searcher(data.flowers, path.parent),
        run / "model.pt",
        data.stamp + stamp(run / "model.pt"),
    )


# --- state: the address of the page, and the widgets ---


def go(**changes) -> None:
    """Change what is shown. Every widget's callback comes here: the browser's address may lag behind, and is then no wish to go back."""
    S.update(changes)
    S["_acted"] = True


def refilter() -> None:
    go(page=1, image=None)


def read_address(choices: dict) -> None:
    """Take over the page's address when it is new: opened, or gone back to. What it says is checked against what there is."""
    address, acted = st.query_params.to_dict(), S.pop("_acted", False)
    new = "_address" not in S or not acted and address != S["_address"]
    for key, default in DEFAULTS.items():
        value = (
            address.get(key, default) if new else S.get(key, default)
        )  # streamlit forgets a widget that is not on the page: set, it stays
        if key in choices:
            value = value if value in choices[key] else default
        elif isinstance(value, str) and key in ("page", "image"):
            value = int(value) if re.fullmatch("[0-9]{1,9}", value) else default
        S[key] = value[:300] if isinstance(value, str) and key in ("q", "ids") else value


def write_address() -> None:
    address = {
        key: str(S[key])
        for key, default in DEFAULTS.items()
        if S.get(key, default) not in (default, None)
    }
    if address != st.query_params.to_dict() or address != S.get("_address"):
        st.query_params.from_dict(address)
    S["_address"] = address


# --- pieces of the page ---


def draw(html: str, key: str, opened=None) -> None:
    """HTML of panels; opened: what is done with the value of what is clicked."""

    def clicked():
        go()
        if value := S.get(key, {}).get("open"):  # a second click may be on what is no longer shown
            opened(value)

    element()(key=key, data=html.encode(), on_open_change=clicked)


def picture_grid(data: gallery.Data, index: np.ndarray, key: str, lines=lambda i: []) -> None:
    """Thumbnails that open their image; lines: what stands under the image's id and class."""
    flowers, ids, _, thumbnails, _ = data
    with ThreadPoolExecutor() as pool:  # where they are not yet kept
        jpegs = pool.map(thumbnails.__getitem__, index)
    draw(
        panels.pictures(
            (ids[i], jpeg, [f"{ids[i]} {flowers.class_names[flowers.labels[i]]}", *lines(i)])
            for i, jpeg in zip(index, jpegs)
        ),
        key,
        lambda value: go(image=int(value)),
    )


def buttons(label: str, options, key: str, change=refilter) -> None:
    """One of a few."""
    st.segmented_control(label, options, key=key, on_change=change, required=True, wrap=True)


def pick(label: str, options, key: str, placeholder: str = "all classes") -> None:
    """One of many, or none: type to search."""
    st.selectbox(label, options, key=key, placeholder=placeholder, on_change=refilter, width=220)


def pager(index: np.ndarray) -> np.ndarray:
    """Buttons for the pages, and the part of `index` that is on this one."""
    pages = max(1, -(-len(index) // PER_PAGE))
    S["page"] = min(max(S["page"], 1), pages)
    first = (S["page"] - 1) * PER_PAGE
    part = index[first : first + PER_PAGE]
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button(
            "Previous",
            on_click=go,
            kwargs={"page": S["page"] - 1},
            disabled=S["page"] == 1,
            shortcut="Left",
            key="previous_page",
        )
        st.button(
            "Next",
            on_click=go,
            kwargs={"page": S["page"] + 1},
            disabled=S["page"] == pages,
            shortcut="Right",
            key="next_page",
        )
        st.number_input(
            "Page", 1, pages, key="page", on_change=go, label_visibility="collapsed", width=130
        )
        st.markdown(
            f"{first + 1:,} to {first + len(part):,} of {len(index):,} images"
            if len(index)
            else "no image",
            width="content",
        )
    return part


@st.fragment(run_every=1)
def wait_for_colours(thumbnails: gallery.Thumbnails) -> None:
    if thumbnails.features is not None:
        st.rerun()
    st.info(
        thumbnails.problem
        or "The colours of all images are being computed; this takes a few seconds, once."
    )


def one_image(
    data: gallery.Data, i: int, order: np.ndarray, given: list, models: list[str], runs: Path
) -> None:
    """The image at place i with all that is known of it; order: the list that it is in, to go on from it."""
    flowers, ids, splits, thumbnails, _ = data
    place = np.flatnonzero(order == i)
    at = int(place[0]) if len(place) else -1
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button("Grid", on_click=go, kwargs={"image": None}, shortcut="Escape", key="to_grid")
        for label, step, shortcut in (("Previous", at - 1, "Left"), ("Next", at + 1, "Right")):
            beside = int(ids[order[step]]) if 0 <= step < len(order) else None
            st.button(
                label,
                on_click=go,
                kwargs={"image": beside},
                disabled=beside is None,
                shortcut=shortcut,
                key=f"{label}_image",
            )
        st.button(
            "Random",
            on_click=lambda: go(image=int(ids[random.choice(order)])),
            disabled=not len(order),
            shortcut="S",
            key="random_image",
        )
        st.markdown(
            f"{at + 1:,} of {len(order):,}" if at >= 0 else f"not among these {len(order):,}",
            width="content",
        )
    file, name, told = flowers.files[i], flowers.class_names[flowers.labels[i]], []
    try:
        jpeg = file.read_bytes()
        pixels = gallery.open_picture(jpeg)
    except (OSError, UserError) as error:
        st.error(
            f"{file} is damaged ({error}). Replace it by a fresh copy, or fetch the dataset anew: python -m flowers.data"
        )
        return
    for path in (flowers.root / "captions.jsonl.gz", flowers.root / "captions.jsonl"):
        if path.is_file() and not told:
            try:
                told = kept(
                    lambda path: read_captions(path, flowers.files), path, data.stamp + stamp(path)
                )[i]
            except UserError as error:
                st.warning(str(error))
    facts = [
        f"class {flowers.labels[i] + 1} · image {ids[i]} · {splits[i]}",
        f"{file.name} · {pixels.shape[1]} x {pixels.shape[0]} pixels · {len(jpeg) / 1000:.0f} kB",
    ]
    rankings = [
        (
            p.name,
            [
                ("✓ " * bool(c == flowers.labels[i]) + flowers.class_names[c], score)
                for c, score in p.top[i]
            ],
        )
        for p in given
        if p.top[i]
    ]
    draw(panels.image(jpeg, pixels, name, facts, told, rankings), "image")
    buttons("Nearest images by", ["colours", *models], "like", go)
    if S["like"] != "colours":
        features = searcher(data, runs / S["like"]).features
    elif (features := thumbnails.features) is None:
        wait_for_colours(thumbnails)
        return
    near, scores = gallery.nearest(features, features[i], leave_out=i)
    picture_grid(
        data,
        near[:NEIGHBOURS],
        "neighbours",
        lambda j: [f"{scores[np.flatnonzero(near == j)[0]]:.3f}"],
    )


# --- the three views; each returns the images that it lists, what stands under each, and the runs whose predictions belong to it ---


def browse(data: gallery.Data):
    flowers, ids, splits, _, _ = data
    if S["image"] is None:
        with st.container(horizontal=True):
            pick("Class", sorted(flowers.class_names), "class")
            buttons(
                "Split", ["all", *(n for n, index in flowers.splits.items() if len(index))], "split"
            )
            st.text_input(
                "File ids", key="ids", placeholder="7, 20-30", on_change=refilter, width=160
            )
            buttons("Class histogram", BARS, "bars")
    chosen = np.ones(len(ids), bool) if S["split"] == "all" else splits == S["split"]
    if S["ids"].strip():
        try:
            chosen &= np.any(
                [(ids >= low) & (ids <= high) for low, high in gallery.parse_ids(S["ids"])]
                or [ids < 0],
                axis=0,
            )
        except UserError as error:
            st.warning(str(error).capitalize() + ".")
    if S["image"] is None and S["bars"] == "shown":

        def clicked(value):
            name = flowers.class_names[int(value)]
            go(page=1, **{"class": None if name == S["class"] else name})

        draw(
            panels.class_histogram(flowers, np.flatnonzero(chosen), S["class"]),
            "histogram",
            clicked,
        )
    if S["class"]:
        chosen &= flowers.labels == flowers.class_names.index(S["class"])
    return np.flatnonzero(chosen), lambda i: [], []


def compare(data: gallery.Data, runs: Path, names: list[str]):
    flowers = data.flowers
    if not names:
        st.info(
            f"No run in {runs} has predictions yet. Make one: python train.py --data_root {flowers.root} --architecture tiny --runs {runs}"
        )
        return None
    S["run"] = S["run"] if S["run"] in names else names[0]
    S["other"] = S["other"] if S["other"] != S["run"] else None
    with st.container(horizontal=True):
        pick("Run", names, "run")
        pick("Compare with", [n for n in names if n != S["run"]], "other", "no other run")
        buttons("Part", PARTS, "part")
    files = [runs / name / "predictions.csv" for name in (S["run"], S["other"]) if name]
    given = [
        kept(
            lambda path: gallery.read_predictions(path.parent, flowers),
            path,
            data.stamp + stamp(path),
        )
        for path in files
    ]
    every = (shown := gallery.outcomes(flowers.labels, *given))["all"]
    if not len(every):
        raise UserError(
            f"{S['run']} and {S['other']} predicted different images: choose two runs of one split"
        )
    shares = [
        f"{panels.plain(p.name)}: **{100 * (p.guess[every] == flowers.labels[every]).mean():.2f}%**"
        for p in given
    ]
    change = (
        f" · {len(shown['mended'])} mended, {len(shown['broken'])} broken by {panels.plain(S['other'])}"
        if S["other"]
        else ""
    )
    st.markdown(" · ".join(shares) + f" of {len(every):,} images right" + change)
    if S["part"] == "classes":

        def clicked():
            go()
            if rows := S.get("table", {}).get("selection", {}).get("rows"):
                go(
                    part="pictures",
                    show="all",
                    page=1,
                    guess=None,
                    **{"class": table[rows[0]]["class"]},
                )

        table = gallery.class_changes(flowers, every, *given)
        st.caption("Accuracy of each class in percent; choose a row to see its pictures.")
        st.dataframe(
            table,
            hide_index=True,
            key="table",
            on_select=clicked,
            selection_mode="single-row",
            height=560,
            column_config={
                k: st.column_config.NumberColumn(format="%.1f")
                for k in (*(p.name for p in given), "change")
            },
        )
        return None
    if S["part"] == "confusion":

        def opened(value):
            true, guess = (flowers.class_names[int(c)] for c in value.split(","))
            go(part="pictures", show="all", page=1, guess=guess, **{"class": true})

        st.caption(
            "Images of each class (row) by the name that they are given (column). Click on a cell to see its pictures."
        )
        draw(
            panels.confusion(flowers.class_names, flowers.labels[every], given[0].guess[every]),
            "confusion",
            opened,
        )
        return None
    if S["show"] not in shown:
        S["show"] = "all"
    if S["image"] is None:
        with st.container(horizontal=True):
            buttons("Show", list(shown), "show")
            pick("True class", sorted(flowers.class_names), "class")
            pick("Predicted class", sorted(flowers.class_names), "guess")
            buttons("Order", ORDERS, "order")
    index = shown[S["show"]]
    for key, value in (("class", flowers.labels), ("guess", given[0].guess)):
        if S[key]:
            index = index[value[index] == flowers.class_names.index(S[key])]
    if S["order"] == "confidence":
        index = index[np.argsort(-given[0].score[index], kind="stable")]

    def answers(i):
        return [
            f"{'✓' if p.guess[i] == flowers.labels[i] else '✗'} {flowers.class_names[p.guess[i]]} {100 * p.score[i]:.0f}%"
            for p in given
        ]

    return index, answers, given


def search(data: gallery.Data, runs: Path, models: list[str]):
    flowers = data.flowers
    if not models:
        st.info(
            f"Searching needs a run with a model in {runs}. Make one: python train.py --data_root {flowers.root} --architecture tiny --runs {runs}"
        )
        return None
    S["run"] = S["run"] if S["run"] in models else models[0]
    with st.container(horizontal=True):
        st.text_input(
            "Sentence",
            key="q",
            placeholder="a yellow flower with a dark centre",
            max_chars=300,
            on_change=refilter,
            width=420,
        )
        pick("Run", models, "run")
    upload = st.file_uploader(
        "or a picture of your own (JPEG, PNG or WebP; it is kept in memory only)",
        key="upload",
        on_change=refilter,
    )
    if not upload and not S["q"].strip():
        return None
    model = searcher(data, runs / S["run"])
    if upload:
        feature = model.of_picture(picture := gallery.open_picture(upload.getvalue()))
        shares = model.ranking(feature)
        left, right = st.columns([1, 3])
        left.image(picture, alt="your picture")
        with right:
            draw(
                panels.ranking(
                    "class", [(flowers.class_names[c], shares[c]) for c in np.argsort(-shares)[:5]]
                ),
                "answer",
            )
    else:
        feature = model.of_text(S["q"])
    order, scores = gallery.nearest(model.features, feature)
    score = dict(zip(order.tolist(), scores.tolist()))
    return order, lambda i: [f"{score[int(i)]:.3f}"], []


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser)
    parser.set_defaults(data_root=DEFAULT_ROOT if is_complete(Path(DEFAULT_ROOT)) else "sample")
    parser.add_argument("--runs", default="runs", help="folder of the runs (default: %(default)s)")
    if not st.runtime.exists():
        parser.parse_args()
        raise UserError(
            "this is a page: start it with streamlit run web.py -- [--data_root PATH] [--runs PATH]"
        )
    st.set_page_config("Flowers", page_icon="🌸", layout="wide")
    try:
        page(parser)
    except (UserError, OSError) as error:
        st.error(str(error))
        write_address()


def page(parser: argparse.ArgumentParser) -> None:
    def refuse(message):
        raise UserError(f"{message}: streamlit run web.py -- [--data_root PATH] [--runs PATH]")

    parser.error = refuse
    args = parser.parse_args()
    runs = Path(args.runs)
    if Path(args.data_root) == Path(DEFAULT_ROOT) and not is_complete(Path(DEFAULT_ROOT)):
        raise UserError(
            f"{DEFAULT_ROOT} is missing or incomplete. Fetch it: python -m flowers.data"
        )
    root = Path("data/sample" if args.data_root == "sample" else args.data_root)
    files = [
        *(
            root / n
            for n in ("jpg", "images/jpg", "imagelabels.mat", "labels.npz", "cat_to_name.json")
        ),
        Path(args.splits_path or root / "setid.mat"),
    ]
    arguments = tuple((key, value) for key, value in vars(args).items() if key != "runs")
    try:
        data = dataset(arguments, stamp(*files))
    except UserError as error:
        raise UserError(
            f"{error}. Fetch the dataset: python -m flowers.data; or see the sample: streamlit run web.py -- --data_root sample"
        ) from None
    flowers, ids = data.flowers, data.ids
    predicted, models = (
        gallery.run_names(runs, "predictions.csv"),
        gallery.run_names(runs, "model.pt"),
    )
    read_address(
        {
            "view": VIEWS,
            "class": flowers.class_names,
            "guess": flowers.class_names,
            "split": {"all", *data.splits.tolist()},
            "part": PARTS,
            "show": SHOWS,
            "bars": BARS,
            "order": ORDERS,
            "run": {*predicted, *models},
            "other": predicted,
            "like": ["colours", *models],
        }
    )
    with st.container(horizontal=True, vertical_alignment="center"):
        st.segmented_control(
            "View",
            VIEWS,
            key="view",
            format_func=str.title,
            on_change=refilter,
            required=True,
            label_visibility="collapsed",
        )
        st.markdown(
            f"{len(ids):,} images of {len(flowers.class_names)} classes in `{flowers.root}`",
            width="content",
        )
    views = {
        "browse": lambda: browse(data),
        "runs": lambda: compare(data, runs, predicted),
        "search": lambda: search(data, runs, models),
    }
    listed = views[S["view"]]()
    places = np.flatnonzero(ids == (S["image"] or -1))
    if S["image"] is not None and not len(places):
        st.info(f"There is no image {S['image']} in this dataset.")
        S["image"] = None
    if S["image"] is not None:
        index, _, given = listed or (np.arange(len(ids)), None, [])
        one_image(data, int(places[0]), index, given, models, runs)
    elif listed is not None:
        index, lines, given = listed
        picture_grid(data, pager(index), "pictures", lines)
        st.download_button(
            "This list as CSV",
            lambda: gallery.export(flowers, index, given),
            "flowers.csv",
            "text/csv",
            on_click="ignore",
            disabled=not len(index),
        )
    write_address()


if __name__ == "__main__":
    main()
