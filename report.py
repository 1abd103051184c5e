"""Turn run folders into report/: report.md, tables for LaTeX (booktabs) and figures (PNG and PDF), and the answer to the question of the study.

    python report.py                                            # runs/ to report/
    python report.py --runs runs/study runs/qwen --output report/example

Works with any subset of runs and says what is missing. The same runs give the same bytes. Runs are compared only if they were evaluated on the
same images and names, in the same split and after training on the same classes; everything else is set apart under its own heading.
"""

import argparse
import functools
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from flowers import UserError, command
from flowers.evaluate import wilson
from flowers.files import atomic, read_lines, write_csv
from flowers.models import SHAPES, build, count_flops
from flowers.study import figures as plots
from flowers.study import statistics
from flowers.study.comparable import (
    Run,
    best_by_strategy,
    factorial,
    grouped,
    interval,
    load,
    mean,
    resolve,
)

FACTORS = {
    "lr": "learning rate",
    "temperature": "temperature at the start",
    "batch_size": "batch size (images)",
    "shots": "training images a class",
    "positives": "positives",
    "prompt_template": "prompt",
    "augment": "augmentation",
}
NUMERIC = ("lr", "temperature", "batch_size", "shots")
GRID_OF = {
    "lr": "learning_rate",
    "prompt_template": "prompt",
}  # of ablate.py, where it bears another name
MADE = (
    "answer",
    "results",
    "factors",
    "base-to-new",
    "cost",
    "learning",
    "classes",
    "worst",
    "confusions",
    "wise-ft",
)  # files of a report begin so
TEX = {
    "%": r"\%",
    "_": r"\_",
    "&": r"\&",
    "#": r"\#",
    "{": r"\{",
    "}": r"\}",
    "<": "$<$",
    ">": "$>$",
    "$": r"\$",
    "\\": r"\textbackslash{}",
    "^": r"\^{}",
    "~": r"\~{}",
}


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs", nargs="+", default=["runs"], help="folders of run folders (default: runs)"
    )
    parser.add_argument(
        "--output",
        default="report",
        help="folder of the report; an earlier one's figures and tables are removed (default: %(default)s)",
    )
    parser.add_argument(
        "--bootstrap", type=int, default=1000, help="rounds of the bootstrap (default: %(default)s)"
    )
    args = parser.parse_args()
    output, found, notes = Path(args.output), [], []
    for folder in map(Path, args.runs):
        loaded, damaged = load(folder)
        done = {run.name for run in loaded}
        failures = {
            row["name"]: row
            for row in read_lines(folder / "failed.jsonl", "name", "error")
            if row["name"] not in done
        }
        found, notes = (
            found + loaded,
            notes
            + damaged
            + [f"{name} failed: {row['error']}" for name, row in sorted(failures.items())],
        )
    found, starts = resolve(found)
    along = [run for run in found if run.settings.get("wise_ft")]
    found = [run for run in found if not run.settings.get("wise_ft")]
    if not found:
        raise UserError(
            f"no finished run in {', '.join(args.runs)}: run train.py, baseline_eval.py or ablate.py first"
        )
    output.mkdir(parents=True, exist_ok=True)
    earlier = {
        p: p.stat().st_ino
        for p in output.iterdir()
        if re.fullmatch(rf"({'|'.join(MADE)})(-.*)?\.(png|pdf|tex|csv)", p.name)
    }

    protocols: dict[tuple, list[Run]] = {}
    for run in found:
        protocols.setdefault(run.protocol, []).append(run)
    ordered = [
        protocols[p]
        for p in sorted(
            protocols, key=lambda p: (p[0] != "test", p[2] != "all", -len(protocols[p]), p)
        )
    ]
    missing: list[str] = []
    parts = [
        "# Report",
        answer(found, starts, output, args.bootstrap, missing),
        "## Results",
        "A table never mixes protocols: each heading is one set of images, names and training classes.",
    ]
    parts += [
        results(runs, output, f"results-{runs[0].split}" + (f"-{i}" if i else ""))
        for i, runs in enumerate(ordered)
    ]
    parts += [
        factors(ordered, output, missing),
        base_to_new(ordered, output, missing),
        wise_ft(along, output, missing),
        closer_look(ordered[0], output, missing),
        stand_ins(starts),
    ]
    parts += [
        "## What is missing",
        "\n".join(f"- {line}" for line in [*missing, *notes]) or "Nothing.",
    ]
    with atomic(output / "report.md", "w") as file:
        file.write("\n\n".join(part for part in parts if part) + "\n")
    for path, inode in earlier.items():
        if path.stat().st_ino == inode:  # it was not made anew
            path.unlink()
    print(
        f"{len(found)} runs, {len(ordered)} protocols, {len(missing) + len(notes)} things missing: {output / 'report.md'}"
    )


def label(run: Run) -> str:
    return f"{run.architecture} {run.strategy if run.strategy != 'none' else 'untrained'}"


def title(run: Run) -> str:
    split, convention, trained_on, _ = run.protocol
    only = f", trained on {trained_on} classes only" if trained_on != "all" else ""
    return f"{split}, {len(run.labels):,} images of {len(set(run.labels))} classes, {convention} splits{only}"


def table(output: Path, name: str, rows: list[dict], caption: str) -> str:
    """A table as Markdown, and as NAME.tex for \\input, with booktabs."""
    keys = list(rows[0])
    numeric = {k: all(str(r[k])[:1] in "0123456789-+<[" for r in rows) for k in keys}  # or empty
    lines = [
        keys,
        ["---:" if numeric[k] else "---" for k in keys],
        *([r[k] for k in keys] for r in rows),
    ]
    lines = [[" ".join(str(cell).split()) for cell in line] for line in lines]
    markdown = "\n".join(
        "| "
        + " | ".join(re.sub(r"<(?=[a-zA-Z/!])", "&lt;", cell).replace("|", "\\|") for cell in line)
        + " |"
        for line in lines
    )
    lines = [
        " & ".join("".join(TEX.get(c, c) for c in cell) for cell in line) + r" \\"
        for line in [keys, *lines[2:]]
    ]
    tex = [
        f"% {caption}; needs \\usepackage{{booktabs}}",
        r"\begingroup\footnotesize\setlength{\tabcolsep}{3pt}",
        r"\begin{tabular}{@{}" + "".join("r" if numeric[k] else "l" for k in keys) + "@{}}",
        r"\toprule",
        lines[0],
        r"\midrule",
        *lines[1:],
        r"\bottomrule",
        r"\end{tabular}",
        r"\endgroup",
    ]
    with atomic(output / f"{name}.tex", "w") as file:
        file.write("\n".join(tex) + "\n")
    return f"{caption} (`{name}.tex`):\n\n{markdown}"


def picture(path: Path, caption: str) -> str:
    return f"![{caption}]({path.name})\n\n*{caption}.*"


def answer(
    found: Sequence[Run], starts: Sequence[Run], output: Path, rounds: int, missing: list[str]
) -> str:
    """The answer to the question of the study, from a complete strategy x architecture x learning rate grid."""
    heading, names = (
        "## Is it the fine-tuning, the architecture, or the hyperparameters?",
        ["strategy", "architecture", "learning rate"],
    )
    grid = factorial(found)
    some = next(iter(grid.runs.values()))[0][grid.seeds[0]] if grid else None
    untrained = {
        r.architecture: r
        for r in found
        if grid and r.strategy == "none" and r.protocol == some.protocol
    }
    if not grid or not set(grid.architectures) <= set(untrained):
        missing.append(
            "the answer to the question: it needs at least two strategies, two architectures and two learning rates, and the untrained models "
            "on the same images (`python ablate.py factorial`)"
        )
        return heading + "\n\nNot answered: see what is missing."
    architectures = sorted(
        grid.architectures, key=lambda a: (untrained[a].result.get("parameters", 0), a)
    )
    correct = [[[[untrained[a].correct] * len(grid.seeds)] * grid.rates for a in architectures]]
    correct += [
        [
            [[by_seed[s].correct for s in grid.seeds] for by_seed in grid.runs[strategy, a]]
            for a in architectures
        ]
        for strategy in grid.strategies
    ]
    got = statistics.decompose(np.array(correct), names, [0, 0, grid.rates // 2], rounds)
    gain, share, variance = got["gain"], got["share"], got["variance"]

    percent = lambda v: (
        "undefined"
        if math.isnan(v[0])
        else f"{100 * v[0]:.0f}% [{100 * v[1]:.0f}, {100 * v[2]:.0f}]"
    )
    points = lambda v: f"{v[0]:+.1f} [{v[1]:+.1f}, {v[2]:+.1f}]"
    sentence = (
        f"**Of the {points(gain['total'])} points that the best of the grid gains over the untrained {architectures[0]}, "
        f"{percent(share['strategy'])} are owed to fine-tuning and its strategy, {percent(share['architecture'])} to the architecture and "
        f"{percent(share['learning rate'])} to the hyperparameters (here the learning rate); {gain['interaction'][0]:+.1f} points come only when two "
        "or more are changed together.**"
    )
    pretraining = "; ".join(
        f"{r.architecture}: {r.settings.get('epochs')} epochs on the {r.settings.get('classes') or 'all'} classes"
        for r in starts
        if r.architecture in architectures
    )
    caveat = (
        (
            f"{' and '.join(architectures)} stand in for CLIP's nine architectures, and training from random weights ({pretraining}) for CLIP's "
            "pretraining: the sentence is about these small models on these images, and says nothing about CLIP."
        )
        if pretraining
        else ""
    )
    how = (
        f"Measured on {title(some)}: {len(grid.strategies)} strategies ({', '.join(grid.strategies)}), {len(architectures)} architectures, "
        f"{grid.rates} learning rates for each, seeds {', '.join(map(str, grid.seeds))}. Gain: what is free is chosen on one half of the images and "
        f"measured on the other, both ways; what is not free stays untrained, {architectures[0]} (fewest parameters), and at the middle learning "
        "rate; Shapley's division averages over the orders in which the three are freed. Alone: freed while the others stay; its interaction row is what "
        "the total has beyond their sum. Variance: sums of squares of the balanced design over the trained models, a learning rate's level being its "
        f"rank within its strategy. Brackets: 95% bootstrap intervals over images and seeds ({rounds} rounds)."
        + (f" Left out, for want of cells: {', '.join(grid.dropped)}." if grid.dropped else "")
    )
    columns = ("factor", "variance", "gain", "alone (points)")
    cells = [
        (n, percent(variance[n]), percent(share[n]), points(gain[f"alone {n}"])) for n in names
    ]
    cells += [
        ("interaction", percent(variance["interaction"]), "", points(gain["interaction"])),
        ("seeds", percent(variance["seeds"]), "", ""),
    ]
    rows = [dict(zip(columns, row)) for row in cells]
    figure = plots.answer(variance, share, output / "answer.png")
    shown = [
        picture(figure, "What the differences are owed to"),
        table(output, "answer", rows, "Shares of the variance and of the gain"),
    ]
    return "\n\n".join(filter(None, [heading, sentence, caveat, *shown, how]))


def results(found: Sequence[Run], output: Path, name: str) -> str:
    """The table of a protocol, its figure, and exact McNemar tests of all pairs."""
    groups, split, n = best_by_strategy(found), found[0].split, len(found[0].labels)
    top = max(groups, key=mean)
    pairs = [(a, b) for i, a in enumerate(groups) for b in groups[i + 1 :]]
    tests = [statistics.mcnemar(a[0].correct, b[0].correct) for a, b in pairs]
    adjusted = statistics.holm([p for *_, p in tests])
    against = {
        id(x): p for (a, b), p in zip(pairs, adjusted) for x, y in ((a, b), (b, a)) if y is top
    }
    rows = []
    for g in groups:
        r, trained, (_, low, high) = g[0].result, g[0].strategy != "none", interval(g)
        seconds = [run.result["train_seconds"] for run in g if "train_seconds" in run.result]
        p, counts = against.get(id(g)), [v for k, v in r.items() if k.startswith("trainable_")]
        rows.append(
            {
                "architecture": g[0].architecture,
                "strategy": g[0].strategy,
                "lr": f"{r['lr']:g}" if trained and r.get("lr") else "",
                "seeds": len(g),
                "top-1": f"{mean(g):.2f}",
                "seeds 95%": f"[{low:.1f}, {high:.1f}]" if len(g) > 1 else "",
                "images 95%": "[{:.1f}, {:.1f}]".format(*wilson(round(mean(g) * n / 100), n)),
                **{
                    column: f"{mean(g, key):.2f}".replace("nan", "")
                    for column, key in (("top-5", "top5"), ("per class", "mean_per_class"))
                },
                "trained": f"{sum(counts) if trained else 0:,}" if counts else "",
                "s": f"{np.mean(seconds):.0f}" if trained and seconds else "",
                "MB": f"{r['peak_memory_mb']:,}" if "peak_memory_mb" in r else "",
                "p": "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}",
            }
        )
    caption = (
        "Top-1, top-5 and mean of the classes in percent; 95% intervals over seeds (Student) and over images (Wilson); parameters trained, seconds of "
        f"training, peak memory; p: exact McNemar against {label(top[0])}, lowest seed, Holm's correction (pairs: {len(pairs)})"
    )
    text = [f"### {title(found[0])}", table(output, name, rows, caption)]
    if (every := len(grouped(found))) > len(groups):
        text.append(
            f"The best of {every} configurations by architecture and strategy, chosen on these very images: flattering."
        )
    if pairs:
        write_csv(
            output / f"{name}-pairs.csv",
            [
                {
                    "a": label(a[0]),
                    "b": label(b[0]),
                    "seed": a[0].seed,
                    "only a right": only_a,
                    "only b right": only_b,
                    "p": f"{p:.4g}",
                    "holm": f"{h:.4g}",
                }
                for (a, b), (only_a, only_b, p), h in zip(pairs, tests, adjusted)
            ],
        )
        figure = plots.accuracies(
            [(label(g[0]), g[0].strategy, *interval(g)) for g in groups],
            output / f"{name}.png",
            f"{split}, {n:,} images",
        )
        text.append(
            picture(
                figure,
                "Top-1 with 95% intervals, over seeds where there are several, else over images",
            )
        )
    return "\n\n".join(text)


def factors(protocols: Sequence[Sequence[Run]], output: Path, missing: list[str]) -> str:
    """One factor at a time, everything else the same: a table and a figure for each protocol."""
    parts, seen = [], set()
    for i, found in enumerate(protocols):
        rows, panels = [], {}
        for factor, name in FACTORS.items():
            for group in grouped(
                [r for r in found if r.strategy != "none" and r.settings.get(factor) is not None],
                without=factor,
            ):
                levels: dict[str, list[Run]] = {}
                for run in group:
                    levels.setdefault(json.dumps(run.settings[factor]), []).append(run)
                if len(levels) < 2:
                    continue
                seen.add(factor)
                first, note = (
                    group[0],
                    "learned" if group[0].settings.get("learn_temperature") else "",
                )
                if factor in NUMERIC:
                    levels = dict(sorted(levels.items(), key=lambda item: float(item[0])))
                    x, y = list(map(float, levels)), [[r.top1 for r in g] for g in levels.values()]
                    panels.setdefault(name, []).append(
                        {
                            "architecture": first.architecture,
                            "strategy": first.strategy,
                            "note": note,
                            "x": x,
                            "y": list(map(np.mean, y)),
                            "low": list(map(min, y)),
                            "high": list(map(max, y)),
                        }
                    )
                for level, g in levels.items():
                    value, (_, low, high) = json.loads(level), interval(g)
                    if isinstance(value, list):
                        value = value[0] if len(value) == 1 else f"{len(value)} templates"
                    value = f"{value:g}" if factor in NUMERIC else value
                    rows.append(
                        {
                            "factor": f"{name} ({note})" if note else name,
                            "architecture": first.architecture,
                            "strategy": first.strategy,
                            "level": value,
                            "seeds": len(g),
                            "top-1": f"{mean(g):.2f}",
                            "95%": f"[{low:.1f}, {high:.1f}]",
                        }
                    )
        name = f"factors-{found[0].split}" + (f"-{i}" if i else "")
        if rows:
            parts.append(f"### {title(found[0])}")
        if panels:
            parts.append(
                picture(
                    plots.curves(panels, output / f"{name}.png"),
                    "Top-1 by setting, all else equal; bands: all seeds",
                )
            )
        if rows:
            parts.append(
                table(
                    output,
                    name,
                    rows,
                    "Top-1 in percent with 95% intervals, over seeds or, with one seed, over images",
                )
            )
    missing += [
        f"the effect of the {name}: no two runs that differ in it alone (`python ablate.py {GRID_OF.get(factor, factor)}`)"
        for factor, name in FACTORS.items()
        if factor not in seen
    ]
    return (
        "\n\n".join(
            ["## One factor at a time", "All else is the same within a group of rows.", *parts]
        )
        if parts
        else ""
    )


def base_to_new(protocols: Sequence[Sequence[Run]], output: Path, missing: list[str]) -> str:
    """Accuracy on the classes that were trained on, and on the others: a table for each protocol."""
    parts, columns = [], {"base": "base_top1", "new": "new_top1", "harmonic mean": "harmonic_mean"}
    for i, found in enumerate(protocols):
        rows = [
            {
                "architecture": g[0].architecture,
                "strategy": g[0].strategy,
                "seeds": len(g),
                **{k: f"{mean(g, key):.2f}" for k, key in columns.items()},
            }
            for g in best_by_strategy(found)
            if g[0].trained_on == "base" and not math.isnan(mean(g, "new_top1"))
        ]
        if rows:
            name = f"base-to-new-{found[0].split}-{i}"
            parts += [
                f"### {title(found[0])}",
                table(
                    output, name, rows, "Top-1 in percent among the base and among the new classes"
                ),
            ]
    if not parts:
        missing.append(
            "base to new classes: no run trained on base classes alone (`python ablate.py base_to_new`)"
        )
    return "\n\n".join(["## From base to new classes", *parts]) if parts else ""


def wise_ft(found: Sequence[Run], output: Path, missing: list[str]) -> str:
    """Accuracy between the weights at the start and the fine-tuned ones; a panel for each evaluation."""
    panels = {}
    for run in found:
        needed = ("alpha", *(f"{run.split}/top1{part}" for part in ("", "_low", "_high")))
        rows = [
            {k.removeprefix(f"{run.split}/"): v for k, v in row.items()}
            for row in read_lines(run.folder / "metrics.jsonl", *needed)
        ]
        if rows:
            panels[f"{label(run)} ({run.split})"] = sorted(rows, key=lambda row: row["alpha"])
    if not panels:
        missing.append(
            "WiSE-FT: no evaluation between start and fine-tuned weights (`python baseline_eval.py --architecture runs/NAME --wise_ft 0.5`)"
        )
        return ""
    return "## Between the start and the fine-tuned weights\n\n" + picture(
        plots.wise_ft(panels, output / "wise-ft.png"), "WiSE-FT; band: 95% over images"
    )


def closer_look(found: Sequence[Run], output: Path, missing: list[str]) -> str:
    """Cost, learning curves, classes and confusions of the main protocol."""
    groups, text = best_by_strategy(found), [f"## A closer look: {title(found[0])}"]
    best = max(groups, key=mean)
    untrained = next(
        (
            g
            for g in groups
            if g[0].strategy == "none" and g[0].architecture == best[0].architecture
        ),
        best,
    )
    if len(groups) > 1:
        rows = [
            {
                "architecture": g[0].architecture,
                "strategy": g[0].strategy,
                "top1": mean(g),
                "parameters": g[0].result.get("parameters", 0) / 1e6,
                "gflops": gflops(g[0].architecture) if g[0].architecture in SHAPES else 0,
                "seconds": np.mean([r.result.get("train_seconds", 0) for r in g]),
            }
            for g in groups
        ]
        text.append(
            picture(
                plots.cost(rows, output / "cost.png"),
                "Accuracy against parameters, operations of the image tower, and training time",
            )
        )

    curves = []
    for g in groups:
        losses = [
            [row["train/loss"] for row in read_lines(r.folder / "metrics.jsonl", "train/loss")]
            for r in g
        ]
        steps = min(map(len, losses))
        if steps > 1 and steps == max(map(len, losses)):
            width = max(1, steps // 20)
            y = np.array([np.convolve(loss, np.ones(width) / width, "valid") for loss in losses]).T
            curves.append(
                {
                    "architecture": g[0].architecture,
                    "strategy": g[0].strategy,
                    "y": y,
                    "x": np.arange(width, steps + 1) * (g[0].settings.get("epochs") or 1) / steps,
                }
            )
    if curves:
        text.append(
            picture(
                plots.learning(curves, output / "learning.png"),
                "Training loss, running mean over a twentieth of the steps; bands: all seeds",
            )
        )
    else:
        missing.append("learning curves: no metrics.jsonl beside the runs of the main protocol")

    names = sorted(set(found[0].labels.tolist()))
    accuracy = {
        id(g): 100 * np.array([np.mean([r.correct[r.labels == c] for r in g]) for c in names])
        for g in groups
    }
    if untrained is best:
        missing.append(
            "the change of each class: no untrained model beside the best trained one on the same images"
        )
    else:
        labels = label(untrained[0]), label(best[0])
        figure = plots.classes(
            accuracy[id(untrained)], accuracy[id(best)], names, labels, output / "classes.png"
        )
        text.append(picture(figure, f"From {labels[0]} to {labels[1]}, means over seeds"))
    if len(groups) > 1:
        if (
            len(groups) > 14
        ):  # more would not fit on a page: the untrained and the best of each architecture
            trained = {
                g[0].architecture: g
                for g in sorted(groups, key=lambda g: (g is best, mean(g)))
                if g[0].strategy != "none"
            }
            groups = sorted(
                (g for g in groups if g[0].strategy == "none" or g is trained[g[0].architecture]),
                key=lambda g: g is not best,
            )[:30]
            accuracy = {id(g): accuracy[id(g)] for g in groups}
        k = min(20, max(1, len(names) // 3))
        worst = {
            i: [names[c] for c in np.argsort(values, kind="stable")[:k]]
            for i, values in accuracy.items()
        }
        shared = np.array(
            [[statistics.overlap(a, b, len(names)) for b in worst.values()] for a in worst.values()]
        )  # (M, M, 3)
        p, upper = np.ones(shared.shape[:2]), np.triu_indices(len(groups), 1)
        p[upper] = statistics.holm(shared[..., 2][upper])
        figure = plots.worst_overlap(
            shared[..., 0].astype(int),
            np.minimum(p, p.T),
            [label(g[0]) for g in groups],
            k,
            output / "worst.png",
        )
        text += [
            picture(
                figure,
                f"How many of their {k} worst classes two models share; chance gives {shared[0, 0, 1]:.1f}; * more than that, "
                f"hypergeometric test, p < 0.05 after Holm's correction (pairs: {len(upper[0])})",
            ),
            f"The {k} worst classes of {label(best[0])}: "
            + ", ".join(
                re.sub(r"([\\`*_{}\[\]<>#|$~])", r"\\\1", " ".join(name.split()))
                for name in worst[id(best)]
            )
            + ".",
        ]
    wrong = Counter(
        pair
        for r in best
        for pair in zip(r.labels[~r.correct].tolist(), r.predicted[~r.correct].tolist())
    )
    size = Counter(label_ for r in best for label_ in r.labels.tolist())
    pairs = [
        (true, given, 100 * n / size[true])
        for (true, given), n in sorted(wrong.items(), key=lambda item: (-item[1], item[0]))[:12]
    ]
    if pairs:
        figure = plots.confusions(pairs, output / "confusions.png", label(best[0]))
        text.append(
            picture(
                figure,
                f"The most frequent mistakes of {label(best[0])}, over its {len(best)} seeds",
            )
        )
    return "\n\n".join(text)


@functools.cache
def gflops(architecture: str) -> float:
    """Operations of the image tower for one image, in 10^9, counted on shapes alone."""
    with torch.device("meta"):
        model = build(architecture)
        images = torch.empty(1, 3, *[model.visual.input_resolution] * 2)
    return count_flops(lambda: model.encode_image(images)) / 1e9


def stand_ins(starts: Sequence[Run]) -> str:
    lines = [
        f"- {r.name}: {r.architecture}, {r.settings.get('epochs')} epochs on {r.settings.get('classes') or 'all'} classes; {r.split} top-1 {r.top1:.2f}%"
        for r in starts
    ]
    return "\n".join(["## Runs that others started from\n", *lines]) if lines else ""


if __name__ == "__main__":
    main()
