"""The figures of the report, at the widths at which a two-column paper prints them; PNG and PDF. Numbers in, pictures out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from flowers.figures import PALETTE, plt, save

COLUMN, PAGE = 3.3, 7.0  # inches
COLOURS = dict(
    zip(
        ("full", "last_blocks", "text", "lora", "prompt", "image", "linear"),
        PALETTE[:6] + PALETTE[7:],
    )
) | {"none": "#888888"}
MARKERS = "os^Dv<>Ph*X"
STYLE = {
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7,
    "legend.fontsize": 6.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "text.parse_math": False,
    "lines.linewidth": 1,
    "lines.markersize": 3.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "pdf.fonttype": 42,
}


def colour(strategy: str) -> str:
    return COLOURS.get(strategy, "#8c510a")


def _figure(width: float, height: float, *shape: int, **options):
    plt.rcParams.update(plt.rcParamsDefault | STYLE)
    return plt.subplots(
        *(shape or (1, 1)), figsize=(width, height), layout="constrained", squeeze=False, **options
    )


def _panels(n: int, margin: float, **options):
    """A figure of n panels of equal size, three in a row, with so many inches beside them; its axes are the first n."""
    columns = min(3, n)
    rows = -(-n // columns)
    figure, axes = _figure(
        PAGE if columns > 1 else COLUMN, margin + 1.8 * rows, rows, columns, **options
    )
    for axis in axes.flat[n:]:
        axis.set_axis_off()
    return figure, axes.flat[:n]


def _legend(figure, strategies: Sequence[str], architectures: Sequence[str], lines: bool) -> None:
    """One legend for all panels: colours are strategies, markers (and line styles) architectures."""
    handles = [
        Line2D(
            [],
            [],
            color=colour(s),
            marker="" if lines else "o",
            linestyle="-" if lines else "",
            label=s,
        )
        for s in strategies
    ]
    handles += [
        Line2D(
            [],
            [],
            color="black",
            marker=MARKERS[i % 11],
            linestyle=_dash(i) if lines else "",
            label=a,
        )
        for i, a in enumerate(architectures)
    ]
    rows = -(-len(handles) // 8)
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=-(-len(handles) // rows),
        columnspacing=1.2,
        handletextpad=0.5,
    )


def _dash(i: int):
    return ("-", "--", ":", "-.")[i % 4]


def _log(axis, values: Sequence[float]) -> None:
    """A log axis with plain numbers at 1, 2, 5, 10, ...; a linear one where the values are within a factor of 5."""
    if values and max(values) > 5 * min(values):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if max(values) < 40 * min(values) else (1,))
        )
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.margins(x=0.1)


def answer(variance: dict, share: dict, path: Path) -> Path:
    """Per factor, its share of the gain over the untrained reference and of the variance between trained models, in percent, with 95% intervals."""
    names = [*share, "interaction", "seeds"]
    figure, axes = _figure(COLUMN, 1.9)
    axis, y = axes[0, 0], np.arange(len(names))
    for values, shift, name, fill in (
        (share, -0.19, "of the gain over the untrained model (Shapley)", PALETTE[0]),
        (variance, 0.19, "of the variance between trained models", PALETTE[4]),
    ):
        there = [i for i, n in enumerate(names) if n in values and not np.isnan(values[n][0])]
        mean, low, high = 100 * np.array([values[names[i]] for i in there]).reshape(-1, 3).T
        axis.barh(y[there] + shift, mean, 0.36, color=fill, label=name)
        axis.errorbar(
            mean,
            y[there] + shift,
            xerr=np.maximum([mean - low, high - mean], 0),
            fmt="none",
            ecolor="black",
            elinewidth=0.7,
            capsize=1.5,
        )
    axis.axvline(0, color="black", linewidth=0.6)
    axis.set(yticks=y, yticklabels=names, xlabel="share (%)")
    axis.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=1)
    return save(figure, path, pdf=True)


def accuracies(
    rows: Sequence[tuple[str, str, float, float, float]], path: Path, title: str
) -> Path:
    """Top-1 with its interval for each row: label, strategy (its colour), mean, low, high."""
    figure, axes = _figure(COLUMN, 0.6 + 0.15 * len(rows))
    axis = axes[0, 0]
    for y, (_, strategy, mean, low, high) in enumerate(rows):
        axis.errorbar(
            mean,
            y,
            xerr=[[mean - low], [high - mean]],
            fmt="o",
            color=colour(strategy),
            elinewidth=0.8,
            capsize=1.5,
        )
    axis.set(yticks=range(len(rows)), yticklabels=[r[0] for r in rows])
    axis.set_xlabel("top-1 (%), 95% interval", loc="right")
    axis.set_title(title, loc="right")
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="x", linewidth=0.3)
    return save(figure, path, pdf=True)


def cost(rows: Sequence[dict], path: Path) -> Path:
    """Top-1 against parameters, GFLOPs an image and training time; rows: architecture, strategy, top1, parameters, gflops, seconds (None: unknown)."""
    panels = {
        "parameters": "parameters (millions)",
        "gflops": "image tower (GFLOPs an image)",
        "seconds": "training time (s)",
    }
    architectures, strategies = (
        list(dict.fromkeys(r[k] for r in rows)) for k in ("architecture", "strategy")
    )
    figure, axes = _figure(PAGE, 2.3, 1, 3, sharey=True)
    for axis, (key, label) in zip(axes[0], panels.items()):
        for r in (r for r in rows if r[key]):
            axis.plot(
                r[key],
                r["top1"],
                MARKERS[architectures.index(r["architecture"]) % 11],
                color=colour(r["strategy"]),
                markersize=5,
                markeredgecolor="white",
                markeredgewidth=0.3,
            )
        axis.set(xlabel=label)
        _log(axis, [r[key] for r in rows if r[key]])
        axis.grid(linewidth=0.3)
    axes[0, 0].set_ylabel("top-1 accuracy (%)")
    _legend(figure, strategies, architectures, lines=False)
    return save(figure, path, pdf=True)


def curves(panels: dict[str, list[dict]], path: Path) -> Path:
    """A panel for each quantity on a log axis; a line: architecture, strategy, note, x (K,), y, low, high (K,), the band."""
    lines = [line for panel in panels.values() for line in panel]
    architectures, strategies = (
        list(dict.fromkeys(line[k] for line in lines)) for k in ("architecture", "strategy")
    )
    figure, axes = _panels(len(panels), 0.5)
    for axis, (label, panel) in zip(axes, panels.items()):
        for line in panel:
            i = architectures.index(line["architecture"])
            axis.plot(
                line["x"],
                line["y"],
                marker=MARKERS[i % 11],
                linestyle=_dash(i),
                color=colour(line["strategy"]),
                markerfacecolor="white" if line["note"] else None,
            )
            axis.fill_between(
                line["x"],
                line["low"],
                line["high"],
                color=colour(line["strategy"]),
                alpha=0.15,
                linewidth=0,
            )
            if line["note"]:
                axis.annotate(
                    line["note"],
                    (line["x"][-1], line["y"][-1]),
                    xytext=(3, 3),
                    textcoords="offset points",
                    fontsize=6,
                )
        axis.set(xlabel=label, ylabel="top-1 accuracy (%)")
        _log(axis, [x for line in panel for x in line["x"]])
        axis.grid(linewidth=0.3)
    _legend(figure, strategies, architectures, lines=True)
    return save(figure, path, pdf=True)


def learning(lines: Sequence[dict], path: Path) -> Path:
    """Training loss by epoch, a panel for each architecture; a line: architecture, strategy, x (K,), y (K, seeds)."""
    architectures, strategies = (
        list(dict.fromkeys(line[k] for line in lines)) for k in ("architecture", "strategy")
    )
    figure, axes = _panels(len(architectures), 0.5, sharey=True)
    for axis, architecture in zip(axes, architectures):
        for line in (line for line in lines if line["architecture"] == architecture):
            axis.plot(line["x"], line["y"].mean(1), color=colour(line["strategy"]))
            axis.fill_between(
                line["x"],
                line["y"].min(1),
                line["y"].max(1),
                color=colour(line["strategy"]),
                alpha=0.2,
                linewidth=0,
            )
        axis.set(xlabel="epoch", ylabel="InfoNCE loss (nats)", title=architecture)
    _legend(figure, strategies, [], lines=True)
    return save(figure, path, pdf=True)


def classes(
    before: np.ndarray,
    after: np.ndarray,
    names: Sequence[str],
    labels: tuple[str, str],
    path: Path,
    extremes: int = 5,
) -> Path:
    """Change of each class's accuracy (C,), sorted, and the distribution of the accuracies before and after, all in percent."""
    figure, axes = _figure(PAGE, 2.4, 1, 2, width_ratios=[2, 1])
    change, (left, right) = after - before, axes[0]
    order = np.argsort(change, kind="stable")
    left.bar(
        range(len(order)),
        change[order],
        0.8,
        color=np.where(change[order] < 0, PALETTE[1], PALETTE[0]),
    )
    left.axhline(0, color="black", linewidth=0.6)
    lists = {"most gained": order[::-1][:extremes], "least gained": order[:extremes]}
    for (heading, places), x in zip(
        lists.items(), (0.02, 0.36)
    ):  # above the bars, which are lowest on the left
        left.text(
            x,
            0.98,
            "\n".join([heading, *(f"{change[i]:+.0f} {names[i]}" for i in places)]),
            va="top",
            fontsize=6,
            transform=left.transAxes,
        )
    low, high = min(0, change.min()), max(0, change.max())
    left.set(
        xlabel=f"{len(names)} classes, sorted",
        ylabel="change (points)",
        title="Accuracy of each class, after less before",
        xticks=[],
        ylim=(low - 0.05 * (high - low), high + 0.5 * (high - low)),
        yticks=[y for y in range(-100, 101, 20) if low - 20 < y < high + 20],
    )
    for values, label, fill in zip((before, after), labels, ("#888888", PALETTE[0])):
        right.step(
            np.sort(values),
            100 * np.arange(1, len(values) + 1) / len(values),
            where="post",
            color=fill,
            label=label,
        )
    right.set(
        xlabel="accuracy of the class (%)",
        ylabel="classes at or below (%)",
        title="Distribution over classes",
        xlim=(-2, 102),
        ylim=(0, 128),
        yticks=range(0, 101, 20),
    )
    right.legend(loc="upper left")
    return save(figure, path, pdf=True)


def worst_overlap(
    counts: np.ndarray, p: np.ndarray, labels: Sequence[str], k: int, path: Path
) -> Path:
    """How many of the k worst classes two models share (M, M), with a star where that is more than chance after Holm's correction."""
    side = min(PAGE, 0.2 + 0.055 * max(map(len, labels)) + 0.24 * len(labels))
    figure, axes = _figure(side, side)
    axis = axes[0, 0]
    axis.imshow(counts, cmap="Blues", vmin=0, vmax=k)
    for i, j in np.ndindex(counts.shape):
        star = "*" if i != j and p[i, j] < 0.05 else ""
        axis.text(
            j,
            i,
            f"{counts[i, j]}{star}",
            ha="center",
            va="center",
            fontsize=6,
            color="white" if counts[i, j] > 0.6 * k else "black",
        )
    axis.set_xticks(range(len(labels)), labels, rotation=90)
    axis.set_yticks(range(len(labels)), labels)
    axis.spines[:].set_visible(False)
    return save(figure, path, pdf=True)


def wise_ft(panels: dict[str, list[dict]], path: Path) -> Path:
    """Top-1 over the share alpha of the fine-tuned weights, a panel for each model.

    Its rows, by alpha: alpha, top1, top1_low, top1_high and, if known, base_top1, new_top1.
    """
    figure, axes = _panels(len(panels), 0.4, sharey=True)
    for axis, (name, points) in zip(axes, panels.items()):
        at = lambda key: [p[key] for p in points]
        axis.fill_between(
            at("alpha"), at("top1_low"), at("top1_high"), color=PALETTE[0], alpha=0.2, linewidth=0
        )
        for key, line, marker, fill in (
            ("top1", "all classes", "o", PALETTE[0]),
            ("base_top1", "base among base", "s", PALETTE[1]),
            ("new_top1", "new among new", "^", PALETTE[2]),
        ):
            if all(key in point for point in points):
                axis.plot(at("alpha"), at(key), marker=marker, color=fill, label=line)
        axis.set(
            xlabel="share of the fine-tuned weights (alpha)",
            ylabel="top-1 accuracy (%)",
            title=name,
        )
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return save(figure, path, pdf=True)


def confusions(pairs: Sequence[tuple[str, str, float]], path: Path, title: str) -> Path:
    """The most frequent mistakes: true name, given name, share of the true class's images in percent."""
    figure, axes = _figure(COLUMN, 0.6 + 0.15 * len(pairs))
    axis = axes[0, 0]
    axis.barh(range(len(pairs)), [share for *_, share in pairs], color=PALETTE[0])
    axis.set_yticks(
        range(len(pairs)), [f"{true} \N{RIGHTWARDS ARROW} {given}" for true, given, _ in pairs]
    )
    axis.set_xlabel("share of the true class (%)", loc="right")
    axis.set_title(title, loc="right")
    axis.invert_yaxis()
    return save(figure, path, pdf=True)
