"""The figures of the report, at the widths at which a two-column paper prints them; PNG and PDF.

Numbers in, pictures out. seaborn draws what it can compute from the runs: curves with their bands,
distributions, heat maps. Its bar and point plots estimate their own intervals, so matplotlib draws
the values whose interval is given (over images and seeds, bootstrap).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from flowers.figures import PALETTE, plt, save
from flowers.runs import SOUP

COLUMN, PAGE = 3.3, 7.0  # widths in inches

# A strategy has the same colour in all figures. Yellow (PALETTE[6]) is too light for lines.
STRATEGY_COLOURS = {
    "none": "#888888",
    "full": PALETTE[0],
    "last_blocks": PALETTE[1],
    "text": PALETTE[2],
    "lora": PALETTE[3],
    "prompt": PALETTE[4],
    "image": PALETTE[5],
    "linear": PALETTE[7],
    # Two of Tol's muted colours, as the palette has no more.
    "norm": "#882255",
    "projection": "#999933",
}
OTHER_COLOUR = "#8c510a"  # brown: zero-shot answers of Qwen-VL, or strategies from elsewhere
# Of the architectures, by their order in a figure. All markers are filled: seaborn mixes no kinds.
MARKERS = "os^Dv<>Ph*X"
DASHES = ("-", "--", ":", "-.")
# Of the methods of one strategy, which share its colour: markers are filled in part.
FILLS = ("full", "left", "bottom", "right", "top")
STYLE = {
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7,
    "legend.fontsize": 6.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "text.parse_math": False,  # a class name may hold dollar signs
    "lines.linewidth": 1,
    "lines.markersize": 3.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # letters as TrueType: journals refuse Type 3
}
# seaborn's percentile interval of 100% is the band from the lowest to the highest seed.
ALL_SEEDS = ("pi", 100)


# -----------------------------------------------------------------------------
# the answer and the results


def answer(variance: dict, share: dict, path: Path) -> Path:
    """Draw each factor's share of the gain and of the variance, in percent, with 95% intervals.

    Args:
        variance, share: factor -> (estimate, low, high) as fractions, see `statistics.decompose`.
            Those that are nan are left out.
    """
    names = [*share, "interaction", "seeds"]
    figure, axes = _figure(COLUMN, 1.9)
    axis = axes[0, 0]
    # Two thin bars for each factor, above and below its tick.
    bars = [
        (share, -0.19, "of the gain over the untrained model (Shapley)", PALETTE[0]),
        (variance, 0.19, "of the variance between trained models", PALETTE[4]),
    ]
    for intervals, offset, label, fill in bars:
        # A factor without a share, as seeds have none of the gain, is a row of nan: no bar.
        unknown = (np.nan, np.nan, np.nan)
        percent = 100 * np.array([intervals.get(name, unknown) for name in names])
        mean, low, high = percent.T  # (factors,) each
        y = np.arange(len(names)) + offset
        axis.barh(y, mean, 0.36, color=fill, label=label)
        # An estimate may lie outside its bootstrap interval: no bar has a negative length.
        lengths = np.maximum([mean - low, high - mean], 0)
        line = {"fmt": "none", "ecolor": "black", "elinewidth": 0.7}
        axis.errorbar(mean, y, xerr=lengths, capsize=1.5, **line)
    axis.axvline(0, color="black", linewidth=0.6)
    axis.set(yticks=range(len(names)), yticklabels=names, xlabel="share (%)")
    axis.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=1)
    return save(figure, path, pdf=True)


def accuracies(table: pd.DataFrame, path: Path, title: str) -> Path:
    """Draw top-1 with its interval; columns: label, strategy, mean, low, high."""
    figure, axes = _figure(COLUMN, 0.6 + 0.15 * len(table))
    axis = axes[0, 0]
    # A row at a time, as errorbar takes one colour for all of its points.
    for y, row in enumerate(table.itertuples()):
        lengths = [[row.mean - row.low], [row.high - row.mean]]
        fill = _colour(row.strategy)
        axis.errorbar(row.mean, y, xerr=lengths, fmt="o", color=fill, elinewidth=0.8, capsize=1.5)
    axis.set(yticks=range(len(table)), yticklabels=table["label"])
    axis.set_xlabel("top-1 (%), 95% interval", loc="right")
    axis.set_title(title, loc="right")
    axis.set_ylim(len(table) - 0.5, -0.5)  # the first row on top
    axis.grid(axis="x", linewidth=0.3)
    return save(figure, path, pdf=True)


def cost(table: pd.DataFrame, path: Path) -> Path:
    """Draw top-1 against three kinds of cost, a point for each row.

    Columns: architecture, strategy, top1, and parameters (millions), gflops, seconds, each 0 where
    it is unknown. The names stand in a legend: at this size labels would cover the points.
    """
    panels = {
        "parameters": "parameters (millions)",
        "gflops": "image tower (GFLOPs an image)",
        "seconds": "training time (s)",
    }
    architectures = list(table["architecture"].unique())
    strategies = table["strategy"].unique()
    variants = _variants(strategies)
    figure, axes = _figure(PAGE, 2.3, columns=3, sharey=True)
    for axis, (column, label) in zip(axes[0], panels.items()):
        measured = table[table[column] > 0]  # a log axis has no 0
        # A row at a time, as a point has a colour, a marker and a filling of its own.
        for row in measured.itertuples():
            variant = variants[row.strategy]
            fill = _colour(row.strategy)
            axis.plot(
                getattr(row, column),
                row.top1,
                marker=_marker(architectures.index(row.architecture)),
                markersize=5,
                color=fill,
                fillstyle=_fill(variant),
                # A white edge tells points apart that overlap; half a marker needs its outline.
                markeredgecolor=fill if variant else "white",
                markeredgewidth=0.5 if variant else 0.3,
            )
        axis.set(xlabel=label, ylabel="top-1 accuracy (%)")
        _log_where_wide(axis, measured[column])
        axis.grid(linewidth=0.3)
    _legend(figure, strategies, architectures, lines=False)
    return save(figure, path, pdf=True)


def gains(table: pd.DataFrame, path: Path) -> Path:
    """Draw the gain over the untrained model with its interval, a panel for each model.

    Columns: model (title of the panel), label (of the line), strategy, loss, gain, low, high, in
    points; a row for each trained model. A loss is a marker; those of one line stand below each
    other.
    """
    losses = list(table["loss"].unique())
    labels = list(table["label"].unique())
    models = table["model"].nunique()
    columns = min(3, models)
    rows = -(-models // columns)  # rounded up
    height = 0.6 + rows * (0.45 + 0.17 * len(labels))
    figure, axes = _figure(
        PAGE if columns > 1 else COLUMN, height, rows, columns, sharex=True, sharey=True
    )
    for axis in axes.flat[models:]:
        axis.set_axis_off()
    for axis, (model, panel) in zip(axes.flat, table.groupby("model", sort=False)):
        # A row at a time, as errorbar takes one colour for all of its points.
        for row in panel.itertuples():
            index = losses.index(row.loss)
            # The losses share the height of a line.
            shift = 0.6 * ((index + 0.5) / len(losses) - 0.5)
            y = labels.index(row.label) + shift
            _gain_point(axis, row, row.gain, y, index, along="x")
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set(title=model, xlabel="gain (points), 95% interval")
        axis.set(yticks=range(len(labels)), yticklabels=labels)
        axis.set_ylim(len(labels) - 0.5, -0.5)  # the first row on top
        axis.grid(axis="x", linewidth=0.3)
    if len(losses) > 1:
        handles = []
        for index, loss in enumerate(losses):
            marker = {"marker": _marker(index), "linestyle": ""}
            handles.append(Line2D([], [], color="black", label=loss, **marker))
        figure.legend(handles=handles, loc="outside lower center", ncols=len(losses))
    return save(figure, path, pdf=True)


def trained_parameters(table: pd.DataFrame, path: Path) -> Path:
    """Draw the gain over the untrained model against the number of trained parameters.

    Columns: architecture, strategy, parameters (more than 0), gain, low, high (points); a row for
    each model.
    """
    architectures = list(table["architecture"].unique())
    variants = _variants(table["strategy"])
    figure, axes = _figure(COLUMN, 2.9)
    axis = axes[0, 0]
    for row in table.itertuples():
        index = architectures.index(row.architecture)
        point = _gain_point(axis, row, row.parameters, row.gain, index, along="y")
        point.set_fillstyle(_fill(variants[row.strategy]))
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set(xlabel="trained parameters", ylabel="gain (points), 95% interval")
    _log_where_wide(axis, table["parameters"])
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 10k, 1M
    axis.grid(linewidth=0.3)
    strategies = table["strategy"].unique()
    _legend(figure, strategies, architectures, lines=False)
    return save(figure, path, pdf=True)


# -----------------------------------------------------------------------------
# what was forgotten


def forgetting(table: pd.DataFrame, path: Path) -> Path:
    """Draw accuracy on flowers against accuracy lost elsewhere, a panel for each model.

    The best place is the upper left: more is known of flowers, and nothing was lost.

    Columns: panel (its title), strategy, weights (untrained, fine-tuned, soup or between), alpha
    (the share of the fine-tuned weights; nan for a soup), top1 on flowers and lost elsewhere
    (points), each also with _low and _high, nan where not known.
    """
    strategies = [name for name in table["strategy"].unique() if name != "none"]
    keys = [Line2D([], [], color=_colour(name), label=name) for name in strategies]
    black = {"color": "black", "linestyle": ""}
    keys += [
        Line2D([], [], marker="D", label="untrained", linestyle="", color=_colour("none")),
        Line2D([], [], marker="o", label="fine-tuned", **black),
        Line2D([], [], marker=".", label="WiSE-FT", color="black"),
        Line2D([], [], marker="*", markersize=7, label="soup of the seeds", **black),
    ]
    panels = table["panel"].nunique()
    in_a_row = 3 if panels == 1 else 7
    legend_height = 0.15 * -(-len(keys) // in_a_row)
    figure, axes = _panels(panels, 0.3 + legend_height)
    for axis, (name, panel) in zip(axes, table.groupby("panel", sort=False)):
        for strategy, rows in panel.groupby("strategy", sort=False):
            _draw_forgetting(axis, rows, _colour(strategy))
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set(title=name, xlabel="lost elsewhere (points)", ylabel="top-1 on flowers (%)")
        axis.grid(linewidth=0.3)
    figure.legend(handles=keys, loc="outside lower center", ncols=in_a_row)
    return save(figure, path, pdf=True)


def _draw_forgetting(axis, rows: pd.DataFrame, fill: str) -> None:
    """The points of one strategy: the line between start and end, and what stands on it."""
    line = rows[rows["weights"] == "between"].sort_values("alpha")
    axis.plot(line["lost"], line["top1"], marker=".", color=fill, alpha=0.8, zorder=1)
    marks = {"untrained": ("D", 4), "fine-tuned": ("o", 4), "soup": ("*", 8)}
    for row in rows.itertuples():
        if row.weights == "between":
            continue
        marker, size = marks[row.weights]
        axis.errorbar(
            row.lost,
            row.top1,
            xerr=_lengths(row.lost, row.lost_low, row.lost_high),
            yerr=_lengths(row.top1, row.top1_low, row.top1_high),
            marker=marker,
            markersize=size,
            color=fill,
            elinewidth=0.5,
            markeredgecolor="white",  # tells points apart that overlap
            markeredgewidth=0.4,
        )


# -----------------------------------------------------------------------------
# probabilities


def reliability(panels: dict[str, dict[str, pd.DataFrame]], path: Path) -> Path:
    """Draw accuracy against the probability of the best class, a panel for each model.

    Args:
        panels: model -> method -> bins by rising probability; columns: probability and
            accuracy, the means of a bin in percent.
    """
    # "none", the untrained model, is a line of all panels, and the first key.
    names = {name for lines in panels.values() for name in lines}
    strategies = sorted(names, key=lambda name: (name != "none", name))
    variants = _variants(strategies)
    # A panel is a square.
    width = COLUMN if len(panels) == 1 else 2.3 * len(panels)
    options = {"columns": len(panels), "sharex": True, "sharey": True}
    figure, axes = _figure(width, 0.6 + (2.6 if len(panels) == 1 else 2.2), **options)
    for axis, (model, lines) in zip(axes[0], panels.items()):
        axis.plot([0, 100], [0, 100], color="black", linewidth=0.6, linestyle=":")
        for strategy, bins in lines.items():
            style = {"color": _colour(strategy), "linestyle": _dash(variants[strategy])}
            axis.plot("probability", "accuracy", data=bins, marker=".", **style)
        axis.set(title=model, xlabel="probability (%)", ylabel="accuracy (%)")
        axis.set(xlim=(0, 100), ylim=(0, 100), aspect="equal")
    _legend(figure, strategies, [], lines=True)
    return save(figure, path, pdf=True)


def temperatures(table: pd.DataFrame, path: Path) -> Path:
    """Draw top-1, NLL and ECE over the temperature of the loss; band: all seeds.

    Columns: group (runs of one line), architecture, strategy, learned (bool), temperature, top1,
    nll, ece; a row for each run.
    """
    panels = {"nll": "NLL (nats)", "ece": "ECE (%)", "top1": "top-1 accuracy (%)"}
    architectures = list(table["architecture"].unique())
    strategies = table["strategy"].unique()
    variants = _variants(strategies)
    figure, axes = _figure(PAGE, 2.3, columns=3)
    for axis, (column, label) in zip(axes[0], panels.items()):
        # Drawn one by one: two lines may have the same architecture and strategy.
        for _, line in table.groupby("group", sort=False):
            first = line.iloc[0]
            index = architectures.index(first["architecture"])
            variant = variants[first["strategy"]]
            _draw_curve(axis, line, "temperature", column, index, variant, first["learned"])
        axis.set(xlabel="temperature of the loss", ylabel=label)
        _log_where_wide(axis, table["temperature"])
        axis.grid(linewidth=0.3)
    _legend(figure, strategies, architectures, lines=True)
    return save(figure, path, pdf=True)


# -----------------------------------------------------------------------------
# curves


def factor_curves(table: pd.DataFrame, path: Path) -> Path:
    """Draw top-1 over the level of each numeric factor, a panel for each; band: all seeds.

    Columns: factor (title of the panel), group (runs of one line), architecture, strategy, note,
    level, top1; a row for each run.
    """
    architectures = list(table["architecture"].unique())
    strategies = table["strategy"].unique()
    variants = _variants(strategies)
    figure, axes = _panels(table["factor"].nunique(), 0.5)
    for axis, (factor, panel) in zip(axes, table.groupby("factor", sort=False)):
        # Two lines may have the same architecture and strategy, as other settings differ: hue and
        # style would draw them as one, so each group is drawn by itself.
        for _, line in panel.groupby("group", sort=False):
            first = line.iloc[0]
            index = architectures.index(first["architecture"])
            variant = variants[first["strategy"]]
            _draw_curve(axis, line, "level", "top1", index, variant, bool(first["note"]))
            if first["note"]:
                mean = line.groupby("level")["top1"].mean()
                end = (mean.index[-1], mean.iloc[-1])
                offset = {"xytext": (3, 3), "textcoords": "offset points"}
                axis.annotate(first["note"], end, fontsize=6, **offset)
        axis.set(xlabel=factor, ylabel="top-1 accuracy (%)")
        _log_where_wide(axis, panel["level"])
        axis.grid(linewidth=0.3)
    _legend(figure, strategies, architectures, lines=True)
    return save(figure, path, pdf=True)


def learning_curves(table: pd.DataFrame, path: Path) -> Path:
    """Draw training loss by epoch, a panel for each model and kind of loss; band: all seeds.

    Columns: architecture, kind (of loss), strategy, seed, epoch, loss (nats); a row for each seed
    and step.
    """
    strategies = table["strategy"].unique()
    variants = _variants(strategies)
    panels = table.groupby(["architecture", "kind"], sort=False)
    # Losses of two kinds have no common scale.
    figure, axes = _panels(panels.ngroups, 0.5, sharey=table["kind"].nunique() == 1)
    for axis, ((architecture, kind), curves) in zip(axes, panels):
        for strategy, curve in curves.groupby("strategy", sort=False):
            sns.lineplot(
                data=curve,
                x="epoch",
                y="loss",
                errorbar=ALL_SEEDS,
                err_kws={"linewidth": 0},
                color=_colour(strategy),
                linestyle=_dash(variants[strategy]),
                ax=axis,
            )
        # All three are negative log-likelihoods.
        axis.set(xlabel="epoch", ylabel="training loss (nats)", title=f"{architecture}, {kind}")
    _legend(figure, strategies, [], lines=True)
    return save(figure, path, pdf=True)


def wise_ft(panels: Sequence[tuple[str, list[list[dict]]]], path: Path) -> Path:
    """Draw top-1 between the weights at the start and the fine-tuned ones, means over seeds.

    The band is from the lowest to the highest seed, or the 95% interval over images of one seed.

    Args:
        panels: of each the title and the curve of each seed: rows by rising alpha, the share of the
            fine-tuned weights. Each row has alpha, top1, top1_low, top1_high and, if known,
            base_top1 and new_top1.
    """
    lines = [
        ("top1", "all classes", "o", PALETTE[0]),
        ("base_top1", "base among base", "s", PALETTE[1]),
        ("new_top1", "new among new", "^", PALETTE[2]),
    ]
    figure, axes = _panels(len(panels), 0.4, sharey=True)
    for axis, (title, seeds) in zip(axes, panels):
        by_alpha = pd.concat([pd.DataFrame(rows) for rows in seeds]).groupby("alpha")
        # A seed that lacks an alpha would bend the line.
        complete = by_alpha.size() == len(seeds)
        means = by_alpha.mean()[complete]
        if len(seeds) > 1:
            low, high = by_alpha["top1"].min()[complete], by_alpha["top1"].max()[complete]
        else:
            low, high = means["top1_low"], means["top1_high"]
        axis.fill_between(means.index, low, high, color=PALETTE[0], alpha=0.2, linewidth=0)
        # Accuracies among base and new classes are known after training on base classes only.
        for column, label, marker, fill in lines:
            if column in means and means[column].notna().all():
                axis.plot(means.index, means[column], marker=marker, color=fill, label=label)
        axis.set(xlabel="share of the fine-tuned weights (alpha)", ylabel="top-1 accuracy (%)")
        axis.set_title(title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return save(figure, path, pdf=True)


# -----------------------------------------------------------------------------
# classes


def classes(table: pd.DataFrame, labels: tuple[str, str], path: Path, extremes: int = 5) -> Path:
    """Draw the change of each class's accuracy, and the distribution before and after.

    Args:
        table: a row for each class; columns: name, before, after, in percent.
        labels: the models before and after.
        extremes: how many classes to name at each end.
    """
    figure, axes = _figure(PAGE, 2.4, columns=2, width_ratios=[2, 1])
    change_axis, distribution_axis = axes[0]
    change = table["after"] - table["before"]
    # Stable: classes that change by as much stay in the order of their names.
    ordered = table.assign(change=change).sort_values("change", kind="stable", ignore_index=True)
    _draw_changes(change_axis, ordered, extremes)

    for column, label, fill in zip(("before", "after"), labels, ("#888888", PALETTE[0])):
        sns.ecdfplot(table[column], stat="percent", color=fill, label=label, ax=distribution_axis)
    distribution_axis.set(
        xlabel="accuracy of the class (%)",
        ylabel="classes at or below (%)",
        title="Distribution over classes",
        xlim=(-2, 102),
        ylim=(0, 128),  # room for the legend
        yticks=range(0, 101, 20),
    )
    distribution_axis.legend(loc="upper left")
    return save(figure, path, pdf=True)


def _draw_changes(axis, ordered: pd.DataFrame, extremes: int) -> None:
    """A bar for each class, by rising change, and the names of those at both ends."""
    change = ordered["change"]
    fill = np.where(change < 0, PALETTE[1], PALETTE[0])
    axis.bar(range(len(change)), change, 0.8, color=fill)
    axis.axhline(0, color="black", linewidth=0.6)
    # The lists stand above the bars, which are lowest on the left.
    lists = [
        (0.02, "most gained", ordered[::-1][:extremes]),
        (0.36, "least gained", ordered[:extremes]),
    ]
    for x, heading, rows in lists:
        lines = [f"{row.change:+.0f} {row.name}" for row in rows.itertuples()]
        text = "\n".join([heading, *lines])
        axis.text(x, 0.98, text, va="top", fontsize=6, transform=axis.transAxes)
    axis.set_title("Accuracy of each class, after less before")
    axis.set(xlabel=f"{len(change)} classes, sorted", xticks=[])
    low = min(0, change.min())
    high = max(0, change.max())
    height = high - low
    axis.set_ylim(low - 0.05 * height, high + 0.5 * height)
    # The room for the lists has no ticks: no change is that large.
    axis.set_yticks([y for y in range(-100, 101, 20) if low - 20 < y < high + 20])
    axis.set_ylabel("change (points)")


def worst_overlap(
    counts: np.ndarray, p_values: np.ndarray, labels: Sequence[str], k: int, path: Path
) -> Path:
    """Draw how many of their k worst classes two models share, with a star where p < 0.05.

    Args:
        counts: (M, M) int.
        p_values: (M, M), corrected for their number; 1 on the diagonal.
    """
    # As wide as the longest label and the cells need: 0.055 inches a letter, 0.24 a cell.
    longest = max(len(label) for label in labels)
    side = min(PAGE, 0.2 + 0.055 * longest + 0.24 * len(labels))
    figure, axes = _figure(side, side)
    axis = axes[0, 0]
    stars = np.where(p_values < 0.05, "*", "")
    sns.heatmap(
        counts,
        annot=np.char.add(counts.astype(str), stars),
        fmt="",
        annot_kws={"fontsize": 6},
        cmap="Blues",
        vmin=0,
        vmax=k,
        square=True,
        cbar=False,
        xticklabels=labels,
        yticklabels=labels,
        ax=axis,
    )
    # seaborn writes in white from a middle blue on, which is hard to read at this size.
    for text, count in zip(axis.texts, counts.flat):
        text.set_color("white" if count > 0.6 * k else "black")
    # Set here, as seaborn turns the labels only where they overlap.
    axis.tick_params(axis="x", rotation=90)
    axis.tick_params(axis="y", rotation=0)
    return save(figure, path, pdf=True)


def confusions(table: pd.DataFrame, path: Path, title: str) -> Path:
    """Draw the most frequent mistakes; columns: true, predicted, percent (of the true class)."""
    figure, axes = _figure(COLUMN, 0.6 + 0.15 * len(table))
    axis = axes[0, 0]
    rows = range(len(table))
    axis.barh(rows, table["percent"], color=PALETTE[0])
    axis.set_yticks(rows, table["true"] + " \N{RIGHTWARDS ARROW} " + table["predicted"])
    axis.set_xlabel("share of the true class (%)", loc="right")
    axis.set_title(title, loc="right")
    axis.invert_yaxis()  # the most frequent on top
    return save(figure, path, pdf=True)


# -----------------------------------------------------------------------------
# what the figures have in common


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A figure in the style of the report (sizes in inches), and its axes (rows, columns)."""
    # From the defaults on, so that a figure does not depend on what was drawn before it.
    plt.rcParams.update(plt.rcParamsDefault | STYLE)
    return plt.subplots(
        rows,
        columns,
        figsize=(width, height),
        layout="constrained",
        squeeze=False,
        **options,
    )


def _panels(count: int, margin: float, **options):
    """A figure with panels of equal size, three in a row, and its first `count` axes.

    margin: height in inches of what stands below the panels.
    """
    columns = min(3, count)
    rows = -(-count // columns)  # rounded up
    width = PAGE if columns > 1 else COLUMN
    figure, axes = _figure(width, margin + 1.8 * rows, rows, columns, **options)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, axes.flat[:count]


def _draw_curve(
    axis, line: pd.DataFrame, x: str, y: str, architecture: int, variant: int, is_start: bool
) -> None:
    """Draw the mean of the runs of one line, with a band of all seeds.

    architecture, variant: their places in the legend. is_start: x is only where training starts,
    so the markers are hollow.
    """
    colour = _colour(line["strategy"].iloc[0])
    sns.lineplot(
        data=line,
        x=x,
        y=y,
        errorbar=ALL_SEEDS,
        err_kws={"alpha": 0.15, "linewidth": 0},
        color=colour,
        linestyle=_dash(architecture),
        marker=_marker(architecture),
        fillstyle=_fill(variant),
        markerfacecolor="white" if is_start else colour,
        markeredgecolor=colour,
        markeredgewidth=1,
        ax=axis,
    )


def _colour(method: str) -> str:
    """The colour of a method's strategy: that of linear for "linear (zero_shot)"."""
    strategy, _, _ = method.partition(" (")
    # The mean of several runs has the colour of their strategy.
    return STRATEGY_COLOURS.get(strategy.removesuffix(SOUP), OTHER_COLOUR)


def _variants(methods: Iterable[str]) -> dict[str, int]:
    """The position of each method among those of its colour, which it is told apart by."""
    counts: Counter = Counter()
    positions = {}
    for method in dict.fromkeys(methods):
        fill = _colour(method)
        positions[method] = counts[fill]
        counts[fill] += 1
    return positions


def _marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def _fill(variant: int) -> str:
    return FILLS[variant % len(FILLS)]


def _lengths(middle: float, low: float, high: float) -> list[list[float]]:
    """The lengths of an error bar: none where an end is not known, and none below 0."""
    return [[np.nan_to_num(max(middle - low, 0))], [np.nan_to_num(max(high - middle, 0))]]


def _gain_point(axis, row, x: float, y: float, index: int, along: str) -> Line2D:
    """The gain of a model as a point, with its interval along x or y; index: of its marker.

    row: strategy, gain, low and high.
    """
    lengths = {f"{along}err": _lengths(row.gain, row.low, row.high)}
    style = {"marker": _marker(index), "color": _colour(row.strategy)}
    point, *_ = axis.errorbar(x, y, **lengths, **style, elinewidth=0.8, capsize=1.5, alpha=0.9)
    return point


def _dash(index: int) -> str:
    return DASHES[index % len(DASHES)]


def _legend(
    figure,
    strategies: Sequence[str],
    architectures: Sequence[str],
    lines: bool,
) -> None:
    """One legend below all panels: a strategy is a colour, an architecture a marker.

    With `lines` a strategy's key is a line and an architecture has a line style, too. Methods of
    one strategy differ in the filling of the marker, or in the dash where no architecture has it.
    """
    handles = []
    for strategy, variant in _variants(strategies).items():
        handle = Line2D([], [], color=_colour(strategy), label=strategy)
        if lines and not len(architectures):
            handle.set_linestyle(_dash(variant))
        elif variant or not lines:
            handle.set(marker="o", fillstyle=_fill(variant))
            handle.set_linestyle("-" if lines else "")
        handles.append(handle)
    for index, architecture in enumerate(architectures):
        handle = Line2D([], [], color="black", label=architecture, marker=_marker(index))
        handle.set_linestyle(_dash(index) if lines else "")
        handles.append(handle)
    # As many in a row as the longest takes: 0.05 inches a letter, 0.35 for what stands before it.
    longest = max(len(handle.get_label()) for handle in handles)
    in_a_row = max(2, int(figure.get_figwidth() / (0.35 + 0.05 * longest)))
    # Rows of equal length.
    rows = -(-len(handles) // in_a_row)
    # The figures have room for two; more of them must not press the panels flat.
    figure.set_figheight(figure.get_figheight() + 0.15 * max(0, rows - 2))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=-(-len(handles) // rows),
        columnspacing=1.2,
        handletextpad=0.5,
    )


def _log_where_wide(axis, values: pd.Series) -> None:
    """Make x a log axis with plain numbers, unless all values are within a factor of 5."""
    if len(values) and values.max() > 5 * values.min():
        axis.set_xscale("log")
        # Within about a decade and a half, 1, 2 and 5 of each decade; beyond it, 1 alone.
        few_decades = values.max() < 40 * values.min()
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.margins(x=0.1)
