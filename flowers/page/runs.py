"""The view Runs before a run is chosen: all of them in one table, and one that is ticked."""

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from flowers.files import read_lines
from flowers.gallery import panels
from flowers.gallery.address import MOST_RUNS
from flowers.gallery.filters import as_csv
from flowers.gallery.overview import METRICS, run_table
from flowers.gallery.predictions import run_arguments
from flowers.page.choices import change
from flowers.page.kept import made_once, stamp_of, start_statistics
from flowers.page.widgets import download, filters

if TYPE_CHECKING:
    import pandas as pd

# Columns of the table of runs that are filtered by.
FILTERED = ("strategy", "architecture", "pretraining", "split")
# Keys of metrics.jsonl that are drawn, and what they are called.
CURVES = {"train/loss": "training loss", "val/top1": "top-1 on val (%)"}


def show_runs(runs: Path, names: list[str], predicted: list[str]) -> None:
    """Show all runs in one table; those that are ticked are compared, or one of them described.

    names: all runs. predicted: those that have predictions.
    """
    start_statistics()  # while the visitor still reads the table
    table = all_runs_table(runs, names)
    with filters():
        for column in FILTERED:
            values = sorted(table[column].dropna().unique())
            chosen = st.multiselect(
                column.capitalize(), values, key=f"only_{column}", placeholder="all", width=220
            )
            if chosen:
                table = table[table[column].isin(chosen)]
    formats = {name: st.column_config.NumberColumn(format="%.2f") for name in METRICS}
    formats["learning rate"] = st.column_config.NumberColumn(format="%.1e")
    formats["parameters trained"] = st.column_config.NumberColumn(format="localized")
    formats["seconds"] = st.column_config.NumberColumn(format="%.0f")
    st.caption(
        f"{len(table):,} runs in {panels.plain(str(runs))}, the newest first. A click on the name "
        "of a column sorts by it. From and to are the ends of the 95% interval of top-1. Tick one "
        "run to see its settings and curve, several to compare what they say about each image."
    )
    # The ticks are numbers of rows, and must not outlive the rows: another key begins without any.
    shown = hashlib.sha256("\n".join(table["run"]).encode()).hexdigest()[:12]
    event = st.dataframe(
        table,
        hide_index=True,
        key=f"runs_table-{shown}",
        on_select="rerun",
        selection_mode="multi-row",
        column_config=formats,
        placeholder="",
    )
    ticked = table["run"].iloc[event.selection.rows].tolist()
    compare_button(ticked, predicted)
    download("The table as CSV", "runs", lambda: as_csv(table))
    if len(ticked) == 1:
        describe_run(runs / ticked[0])


def compare_button(ticked: list[str], predicted: Collection[str]) -> None:
    """Show the button that compares the ticked runs, and name those that it leaves out.

    predicted: the runs that have predictions.
    """
    with_predictions = [name for name in ticked if name in predicted]
    compared, too_many = with_predictions[:MOST_RUNS], with_predictions[MOST_RUNS:]
    label = "See predictions of the ticked run"
    if len(compared) > 1:
        label = f"Compare {len(compared)} ticked runs"
    if compared:
        choice = {"run": compared[0], "other": compared[1:], "page": 1}
        st.button(label, on_click=change, kwargs=choice, key="compare")
    left_out = {
        "have no predictions": [name for name in ticked if name not in predicted],
        f"are more than the {MOST_RUNS} that can be compared": too_many,
    }
    for why, names in left_out.items():
        if names and len(ticked) > 1:
            st.caption(f"Left out, as they {why}: {panels.plain(', '.join(names))}.")


def all_runs_table(runs: Path, names: list[str]) -> "pd.DataFrame":
    """Return run_table of these runs; made anew when one of their files changes."""
    paths = [runs / name / file for name in names for file in ("args.json", "result.json")]

    def read(path: Path) -> "pd.DataFrame":
        return run_table(path, names)

    # Short, as Streamlit takes long to compare a thousand times.
    stamp = hashlib.sha256(repr(stamp_of(*paths)).encode()).hexdigest()
    return made_once(read, runs, (stamp,))


def describe_run(folder: Path) -> None:
    """Show the settings and the training curves of a run."""
    left, right = st.columns([1, 2])
    settings = {key: as_text(value) for key, value in run_arguments(folder).items()}
    left.caption(f"Settings of {panels.plain(folder.name)}")
    left.dataframe({"setting": list(settings), "value": list(settings.values())}, hide_index=True)
    rows = read_lines(folder / "metrics.jsonl", "step")
    with right:
        for key, title in CURVES.items():
            points = [{"step": row["step"], title: row[key]} for row in rows if key in row]
            if points:
                st.caption(title)
                st.line_chart(points, x="step", y=title, height=220)


def as_text(value: Any) -> str:
    """Return a setting as it is shown; a column of a table holds values of one kind."""
    return "" if value is None else str(value)
