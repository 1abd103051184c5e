"""The view Runs before a run is chosen: all of them in one table, and one that is ticked."""

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from flowers.files import read_lines
from flowers.gallery import panels
from flowers.gallery.address import FILTERED, FILTERS, MAX_TEXT, MOST_RUNS
from flowers.gallery.filters import as_csv
from flowers.gallery.overview import COLUMNS, METRICS, run_table
from flowers.gallery.predictions import run_arguments
from flowers.page.choices import DIRECTIONS, change, is_missing, state
from flowers.page.kept import made_once, stamp_of, start_statistics
from flowers.page.widgets import (
    choose_from_list,
    choose_one,
    download,
    filters,
    on_telephone,
    toolbar,
)

if TYPE_CHECKING:
    import pandas as pd

# Short heads, so that the table fits into a window; the whole names are under the mouse.
HEADS = {
    "architecture": "model",
    "learning rate": "lr",
    "trained on": "classes",
    "mean per class (%)": "per class",
    "parameters trained": "trained",
    **{name: name.removesuffix(" (%)") for name in METRICS if name != "mean per class (%)"},
}

# Pixels of the column of the runs' names: at most, beside the letters, and for each of these.
WIDEST, PADDING, LETTER = 300, 24, 7

# Keys of metrics.jsonl that are drawn, and what they are called.
CURVES = {"train/loss": "training loss", "val/top1": "top-1 on val (%)"}


def show_runs(runs: Path, names: list[str], predicted: list[str]) -> None:
    """Show all runs in one table; those that are ticked are compared, or one of them described.

    names: all runs. predicted: those that have predictions.
    """
    start_statistics()  # while the visitor still reads the table
    table = sort_rows(filter_rows(all_runs_table(runs, names)))
    order = f"by {state['sorted']}" if state["sorted"] else "the newest first"
    st.caption(
        f"{len(table):,} runs in {panels.plain(str(runs))}, {order}. A click on the name of a "
        "column sorts by it, too, but is not part of the address. Accuracies and ECE are in "
        "percent, from and to the ends of the 95% interval of top-1. Tick one run to see its "
        "settings and curve, several to compare what they say about each image."
    )
    show_ticks(table)
    is_missing("ticked", names, f"in {panels.plain(str(runs))}")
    ticked = [name for name in state["ticked"] if name in names]
    hidden = [name for name in ticked if name not in set(table["run"])]
    if hidden:
        st.caption(f"Ticked, too, but not shown: {panels.plain(', '.join(hidden))}.")
    with toolbar():
        compare_button(ticked, predicted)
        if state["ticked"]:
            st.button("Untick all", on_click=change, kwargs={"ticked": []}, key="untick")
    say_what_is_left_out(ticked, predicted)
    download("The table as CSV", "runs", lambda: as_csv(table))
    if len(ticked) == 1:
        describe_run(runs / ticked[0])


def filter_rows(table: "pd.DataFrame") -> "pd.DataFrame":
    """Show the filters of the table of runs; return the rows that pass them."""
    with filters():
        st.text_input("Name contains", key="named", max_chars=MAX_TEXT, on_change=change, width=160)
        for column, key in zip(FILTERED, FILTERS):
            values = sorted(table[column].dropna().unique())
            gone = [value for value in state[key] if value not in values]  # no row has it
            st.multiselect(
                column.capitalize(),
                [*values, *gone],
                key=key,
                placeholder="all",
                on_change=change,
                width=180,
            )
            if state[key]:
                table = table[table[column].isin(state[key])]
        columns = [column for column in COLUMNS if column in table]
        choose_from_list("Sorted by", columns, "sorted", "newest first", on_change=change)
        if state["sorted"]:
            choose_one("Direction", DIRECTIONS, "direction", change)
    part = state["named"].strip().lower()
    return table[table["run"].str.lower().str.contains(part, regex=False)]


def sort_rows(table: "pd.DataFrame") -> "pd.DataFrame":
    """Return the table of runs in the chosen order; runs without a value come last."""
    column = state["sorted"]
    if column not in table:  # none, or one that is left out as no run has it
        return table

    def comparable(values: "pd.Series") -> "pd.Series":
        """A column of texts may hold anything else where a file was written by hand."""
        return values.map(str, na_action="ignore") if values.dtype == object else values

    ascending = state["direction"] == "ascending"
    return table.sort_values(column, ascending=ascending, kind="stable", key=comparable)


def show_ticks(table: "pd.DataFrame") -> None:
    """Show the table of runs; its ticks become state["ticked"], beside those that it does not show.

    The browser keeps the ticks, as numbers of rows. They are told it once, when a table is new:
    with other rows, or with ticks that do not come from it but from the address or a button.
    """
    shown = table["run"].tolist()
    if state["ticked"] != state.get("_ticked"):
        state["_tables"] = state.get("_tables", 0) + 1
    rows = hashlib.sha256("\n".join(shown).encode()).hexdigest()[:12]
    first = [shown.index(name) for name in state["ticked"] if name in shown]
    event = st.dataframe(
        table,
        hide_index=True,
        key=f"runs_table-{state['_tables']}-{rows}",
        on_select=change,
        selection_mode="multi-row",
        selection_default={"selection": {"rows": first, "columns": [], "cells": []}},
        column_config=column_formats(table.columns, shown),
        placeholder="",
    )
    now = [shown[row] for row in event.selection.rows]
    # In the order in which they were ticked: the others are compared with the first.
    kept = [name for name in state["ticked"] if name in now or name not in shown]
    state["ticked"] = state["_ticked"] = kept + [name for name in now if name not in kept]


def column_formats(columns: Sequence[str], names: Sequence[str]) -> dict:
    """Return how the columns of the table of runs are shown, for Streamlit. names: of the runs."""
    of_numbers = dict.fromkeys(METRICS, "%.2f") | {"learning rate": "%.1e", "seconds": "%.0f"}
    of_numbers |= {"parameters trained": "compact", "calibrated": "T = %.3g"}
    formats = {}
    for name in columns:
        label = {"label": HEADS.get(name, name), "help": name if name in HEADS else None}
        if name in of_numbers:
            formats[name] = st.column_config.NumberColumn(format=of_numbers[name], **label)
        else:
            formats[name] = st.column_config.Column(**label)
    # By itself it would be as wide as the first rows need, which may have none.
    formats["loss"]["width"] = 78
    longest = max(map(len, names), default=0)
    formats["run"]["width"] = min(WIDEST, PADDING + LETTER * longest)
    # In a window the name of the run stays in sight; a telephone has no room for it and numbers.
    formats["run"]["pinned"] = not on_telephone()
    return formats


def compare_button(ticked: list[str], predicted: Collection[str]) -> None:
    """Show the button that compares the ticked runs. predicted: the runs that have predictions."""
    compared = [name for name in ticked if name in predicted][:MOST_RUNS]
    label = "See predictions of the ticked run"
    if len(compared) > 1:
        label = f"Compare {len(compared)} ticked runs"
    if compared:
        choice = {"run": compared[0], "other": compared[1:], "page": 1, "ticked": []}
        st.button(label, on_click=change, kwargs=choice, key="compare")


def say_what_is_left_out(ticked: list[str], predicted: Collection[str]) -> None:
    """Name the ticked runs that are not compared. predicted: the runs that have predictions."""
    too_many = [name for name in ticked if name in predicted][MOST_RUNS:]
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
    kept = "Settings of" if settings else "There are no settings (args.json) of"
    left.caption(f"{kept} {panels.plain(folder.name)}")
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
