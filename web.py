"""Browse the dataset and what a model makes of it.

    streamlit run web.py                                           # data/flowers-102, or the sample
    streamlit run web.py -- --data_root PATH --runs runs           # another dataset, other runs

Four views: Browse (filters, a grid, one image), Runs (a table of all runs, and the predictions of
one or several), Search (by a sentence, or by a picture of your own) and Map (all images, those that
look alike close together). The address of the page always opens the same view again. Nothing is
written but thumbnails, features and maps, to the dataset's `.cache/`.
"""

# Streamlit runs this file from top to bottom for every visitor, after each of their clicks. It is a
# table of contents: each view is a module of flowers/page/, whose __init__.py says in which
# order to read them. The HTML comes from flowers/gallery/panels.py.

import argparse
from pathlib import Path

import numpy as np
import streamlit as st
import streamlit.config
from starlette.formparsers import MultiPartParser

from flowers import UserError, command
from flowers.data import Flowers, add_data_arguments
from flowers.download import data_folder, default_root, is_complete
from flowers.files import user_path
from flowers.gallery import address, panels
from flowers.gallery.predictions import names_with, run_folders
from flowers.gallery.thumbnails import MAX_UPLOAD_BYTES
from flowers.page.browse import browse
from flowers.page.choices import (
    VIEWS,
    allowed_choices,
    change_filter,
    page_address,
    state,
    write_address,
)
from flowers.page.comparison import compare_runs
from flowers.page.image import show_image
from flowers.page.kept import Dataset, open_dataset, stamp_of
from flowers.page.map import show_map
from flowers.page.search import search
from flowers.page.widgets import Listing, show_listing, toolbar

START = "streamlit run web.py -- [--data_root PATH] [--runs PATH]"

# A visitor's picture stays in memory: from 1 MB on it would go to a temporary file.
MultiPartParser.spool_max_size = MAX_UPLOAD_BYTES + 1

# Streamlit sends a large message once, and then only its hash: also where the message was dropped
# because a click interrupted it, and the browser then stops with "Cached ForwardMsg MISS". Here and
# not in .streamlit/config.toml alone: the page may be started with settings of another place.
NEVER_CACHED = 1 << 40  # bytes, above any message
streamlit.config.set_option("global.minCachedMessageSize", NEVER_CACHED)


def show_page(parser: argparse.ArgumentParser) -> None:
    """Show the whole page. Raises UserError or OSError for what the user can mend."""
    args = parse_arguments(parser)
    runs = Path(args.runs)
    data = open_data(args)
    flowers = data.flowers
    # Asked anew each time: a run may end while the page is open.
    folders = run_folders(runs)
    predicted = names_with(folders, "predictions.csv")
    models = names_with(folders, "model.pt")
    address.read(state, page_address(), allowed_choices(data))

    with toolbar():
        st.segmented_control(
            "View",
            VIEWS,
            key="view",
            format_func=str.title,
            on_change=change_filter,
            required=True,
            label_visibility="collapsed",
        )
        summary = f"{len(data.ids):,} images of {len(flowers.class_names)} classes"
        # Not as code: the browser would fetch a font for it, before the first picture.
        st.markdown(f"{summary} in {panels.plain(str(flowers.root))}", width="content")
    if data.problem:
        st.warning(
            panels.message(f"{data.problem}. Fetch the dataset anew: python -m flowers.data")
        )

    found = np.flatnonzero(data.ids == (state["image"] or -1))
    if state["image"] is not None and not len(found):
        st.info(f"There is no image {state['image']} in this dataset.")
        state["image"] = None  # before the view, which shows no filters above an image

    if state["view"] == "browse":
        listing = browse(data)
    elif state["view"] == "runs":
        listing = compare_runs(data, runs, folders, predicted)
    elif state["view"] == "map":
        listing = show_map(data, runs, models, predicted)
    else:
        listing = search(data, runs, models)

    # After the view, whose list the image is in, and instead of that list's grid.
    if state["image"] is not None:
        everything = Listing(np.arange(len(data.ids)))
        show_image(data, int(found[0]), listing or everything, runs, models, predicted)
    elif listing is not None:
        show_listing(data, listing)
    st.set_page_config(title_of_page(flowers, found))
    write_address()


def title_of_page(flowers: Flowers, found: np.ndarray) -> str:
    """Return what is shown, for the title of the browser's window. found: the image shown alone."""
    what = [state["view"].title()]
    if state["image"] is not None:
        name = flowers.class_names[flowers.labels[found[0]]]
        what = [f"{state['image']} {name}"]
    elif state["view"] == "runs":
        what += filter(None, (state["run"], *state["other"]))
    elif state["view"] == "search":
        what.append(state["q"])
    elif state["view"] == "map":
        what.append(f"by {state['laid']}")
    elif state["class"]:
        what.append(state["class"])
    return " · ".join([*filter(None, what), "Flowers"])


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line. Raises UserError for a mistake, as the page can show no usage."""

    def refuse(message: str) -> None:
        raise UserError(f"{message}: {START}")

    parser.error = refuse
    return parser.parse_args()


def open_data(args: argparse.Namespace) -> Dataset:
    """Open the dataset of the command line. Raises UserError that says how to fetch it."""
    # A page must not download 345 MB, as open_flowers would.
    default = default_root()
    if Path(args.data_root) == Path(default) and not is_complete(Path(default)):
        raise UserError(f"{default} is missing or incomplete. Fetch it: python -m flowers.data")
    root = Path(data_folder("sample") if args.data_root == "sample" else args.data_root)
    names = ("jpg", "images/jpg", "imagelabels.mat", "labels.npz", "cat_to_name.json", "train")
    # The dataset is opened again when one of these changes, so that a copy that was mended opens
    # without a restart. Only one of the layouts has each.
    files = [root / name for name in names]
    files.append(Path(args.splits_path or root / "setid.mat"))
    arguments = tuple((key, value) for key, value in vars(args).items() if key != "runs")
    try:
        return open_dataset(arguments, stamp_of(*files))
    except UserError as error:
        raise UserError(
            f"{error}. Fetch the dataset: python -m flowers.data; "
            "or see the sample: streamlit run web.py -- --data_root sample"
        ) from None


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser)
    if not is_complete(Path(default_root())):
        parser.set_defaults(data_root="sample")
    parser.add_argument(
        "--runs", type=user_path, default="runs", help="folder of the runs (default: %(default)s)"
    )
    if not st.runtime.exists():
        parser.parse_args()  # answers --help, and names a mistake
        raise UserError(f"this is a page: start it with {START}")

    st.set_page_config("Flowers", page_icon="🌸", layout="wide")
    st.html(f"<style>{panels.PAGE_STYLE}</style>")
    try:
        show_page(parser)
    except (UserError, OSError) as error:
        st.error(panels.message(str(error)))
        write_address()  # of what was chosen, which the page could not show


if __name__ == "__main__":
    main()
