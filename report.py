"""Turn run folders into a report, and answer the question of the study.

    python report.py                                            # runs/ to report/
    python report.py --runs runs/study runs/qwen --output report/example

The report is report.md, with its tables also for LaTeX (booktabs) and its figures as PNG and PDF.
It works with any subset of runs and says what is missing. The same runs give the same bytes.
Runs are compared only if they were evaluated on the same images and names, in the same split and
after training on the same classes; each such protocol has a heading of its own.
"""

import argparse
import functools
import itertools
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from flowers import UserError, command
from flowers.choices import KEEPS_WEIGHTS, SHAPES, templates_in_words
from flowers.files import atomic, read_lines, user_path, write_csv
from flowers.intervals import wilson
from flowers.study import figures, statistics
from flowers.study.comparable import (
    Grid,
    Group,
    Run,
    best_by_strategy,
    factorial,
    grouped,
    interval,
    load,
    mean,
    resolve,
)

# Settings whose effect is shown one at a time, with their names in the report.
FACTORS = {
    "lr": "learning rate",
    "temperature": "temperature at the start",
    "batch_size": "batch size (images)",
    "shots": "training images a class",
    "positives": "positives",
    "prompt_template": "prompt",
    "augment": "augmentation",
}
# Those that can be drawn as a curve; the others have a table only.
NUMERIC_FACTORS = ("lr", "temperature", "batch_size", "shots")
# The grid of ablate.py that varies a factor, where it has another name.
GRID_OF_FACTOR = {"lr": "learning_rate", "prompt_template": "prompt"}

RESULT_COLUMNS = (
    "architecture",
    "strategy",
    "lr",
    "seeds",
    "top-1",
    "seeds 95%",
    "images 95%",
    "top-5",
    "per class",
    "trained",
    "s",
    "MB",
    "p",
)
# The figures and tables of a report have names that begin so.
FILE_STEMS = (
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
)
RUNS_FOLDER = '"$RUNS"'  # stands for it in commands, as a shell takes it
MOST_MODELS = 14  # of the overlap of worst classes: more do not fit on a page


class Missing(NamedTuple):
    """What a section could not show, and the command that makes the runs for it, if there is one.

    The command has RUNS_FOLDER for the folder of the runs: a report is the same wherever they lie.
    """

    what: str
    command: str = ""


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs",
        type=user_path,
        nargs="+",
        default=["runs"],
        help="folders that hold run folders (default: runs)",
    )
    parser.add_argument(
        "--output",
        type=user_path,
        default="report",
        help="folder of the report; figures and tables of an earlier report there are removed "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=1000,
        help="rounds of the bootstrap for the intervals of the answer (default: %(default)s)",
    )
    args = parser.parse_args()
    output = Path(args.output)

    # -----------------------------------------------------------------------------
    # runs

    loaded, notes = load_all([Path(folder) for folder in args.runs])
    resolved, starts = resolve(loaded)
    # An evaluation between two sets of weights is a curve, not a model of its own.
    curves = [run for run in resolved if run.settings.get("wise_ft")]
    runs = [run for run in resolved if not run.settings.get("wise_ft")]
    if not runs:
        raise UserError(
            f"no finished run in {', '.join(args.runs)}: "
            "run train.py, baseline_eval.py or ablate.py first"
        )
    protocols = by_protocol(runs)  # the first one is the main one

    # -----------------------------------------------------------------------------
    # sections

    output.mkdir(parents=True, exist_ok=True)
    # Removed at the end, if they are not written again: links to them stay valid until then.
    earlier_files = report_files(output)
    missing: list[Missing] = []  # what the sections could not show, and how to get it
    sections = [
        "# Report",
        answer(runs, starts, output, args.bootstrap, missing),
        "## Results",
        "A table never mixes protocols: "
        "each heading is one set of images, names and training classes.",
    ]
    for i, members in enumerate(protocols):
        sections.append(results(members, output, numbered(f"results-{members[0].split}", i)))
    sections += [
        factors(protocols, output, missing),
        base_to_new(protocols, output, missing),
        wise_ft(curves, runs, output, missing),
        closer_look(protocols[0], output, missing),
        stand_ins(starts),
    ]
    # Last, as the sections add to it.
    gaps = [*map(missing_line, missing), *notes]
    sections.append("## What is missing")
    sections.append("\n".join(f"- {gap}" for gap in gaps) or "Nothing.")

    # -----------------------------------------------------------------------------
    # files

    with atomic(output / "report.md", "w") as file:
        file.write(paragraphs(sections) + "\n")
    remove_unchanged(earlier_files)
    counts = f"{len(runs)} runs, {len(protocols)} protocols, {len(gaps)} things missing"
    print(f"{counts}: {output / 'report.md'}")
    commands = [item.command for item in missing if item.command]
    if commands:
        print(f"next: {commands[0].replace(RUNS_FOLDER, shlex.quote(args.runs[0]))}")


def load_all(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Return the finished runs of all folders, and a note on each that is damaged or failed."""
    runs = []
    notes = []
    for folder in folders:
        finished, damaged = load(folder)
        runs += finished
        notes += damaged
        # A run that failed and was then repeated is no failure; the last error counts.
        finished_names = {run.name for run in finished}
        errors = {}
        for row in read_lines(folder / "failed.jsonl", "name", "error"):
            if row["name"] not in finished_names:
                errors[row["name"]] = row["error"]
        notes += [f"{name} failed: {errors[name]}" for name in sorted(errors)]
    return runs, notes


def by_protocol(runs: Sequence[Run]) -> list[list[Run]]:
    """Return the runs of each protocol, the main one first.

    Before others come images that were not trained on, the test split, training on all classes, and
    many runs.
    """
    protocols: dict[tuple, list[Run]] = {}
    for run in runs:
        protocols.setdefault(run.protocol, []).append(run)

    def order(protocol: tuple[str, str, str, str, bool]) -> tuple:
        split, _, trained_on, _, overlaps = protocol
        size = len(protocols[protocol])
        return overlaps, split != "test", trained_on != "all", -size, protocol

    return [protocols[protocol] for protocol in sorted(protocols, key=order)]


def report_files(output: Path) -> dict[Path, int]:
    """Return the figures and tables of an earlier report with their inodes.

    Other files in the folder are the user's own.
    """
    # By their names, which are the report's own.
    stems = "|".join(FILE_STEMS)
    pattern = re.compile(rf"({stems})(-.*)?\.(png|pdf|tex|csv)")
    return {path: path.stat().st_ino for path in output.iterdir() if pattern.fullmatch(path.name)}


def remove_unchanged(files: dict[Path, int]) -> None:
    """Remove the files that this report did not write anew: a new file has another inode."""
    for path, inode in files.items():
        if path.stat().st_ino == inode:
            path.unlink()


# -----------------------------------------------------------------------------
# text, tables and figures in Markdown


def paragraphs(parts: Sequence[str]) -> str:
    """Join parts by empty lines, without those that are empty."""
    return "\n\n".join(part for part in parts if part)


def numbered(stem: str, index: int) -> str:
    """The name of a file of the protocol at `index`; that of the main one has no number."""
    return f"{stem}-{index}" if index else stem


def label(run: Run) -> str:
    strategy = "untrained" if run.strategy == "none" else run.strategy
    return f"{run.architecture} {strategy}"


def title(run: Run) -> str:
    """The protocol of a run in words."""
    split, convention, trained_on, _, overlaps = run.protocol
    dataset = f" of {run.result['dataset']}" if run.result.get("dataset") else ""
    classes = len(set(run.labels))
    names = run.settings.get("class_names") or "unknown"
    only = f", trained on {trained_on} classes only" if trained_on != "all" else ""
    seen = ", IMAGES AMONG THEM THAT WERE TRAINED ON" if overlaps else ""
    return (
        f"{split}, {len(run.labels):,} images of {classes} classes{dataset}, "
        f"{convention} splits, {names} names{only}{seen}"
    )


def protocol_note(runs: Sequence[Run]) -> str:
    """The prompts and weights behind a table, and which images were trained on."""
    prompts = {}
    for run in runs:
        templates = run.settings.get("prompt_template") or []
        words = run.result.get("prompts") or templates_in_words(templates) or "not recorded"
        prompts[words] = True
    weights = dict.fromkeys(run.architecture for run in runs)
    note = f"Prompts: {escape_markdown('; '.join(sorted(prompts)))}. "
    note += f"Weights at the start: {escape_markdown(', '.join(sorted(weights)))}."
    overlaps = [f"{run.name} {run.overlap}" for run in runs if run.overlap]
    if overlaps:
        note += (
            f" **Of the {len(runs[0].labels):,} images these runs were trained on so many: "
            f"{escape_markdown(', '.join(overlaps))}. Their numbers say nothing about new images.**"
        )
    return note


def ablate_command(grid: str, runs: Sequence[Run]) -> str:
    """The command that runs a grid on the data and architectures of these runs."""
    first = runs[0]
    words = ["python", "ablate.py", grid]
    known = dict.fromkeys(run.architecture for run in runs if run.architecture in SHAPES)
    architectures = sorted(known)
    # The factorial needs two architectures; the other grids are of one.
    if grid != "factorial":
        architectures = architectures[:1]
    elif len(architectures) < 2:
        architectures = []
    if architectures:
        words += ["--architecture", *architectures]
    # The new runs must have the protocol of these, or they could not be compared.
    for key in ("data_root", "splits_path", "splits", "class_names"):
        if first.settings.get(key):
            words += [f"--{key}", str(first.settings[key])]
    return f"{shlex.join(words)} --runs {RUNS_FOLDER}"


def missing_line(missing: Missing) -> str:
    if not missing.command:
        return missing.what
    return f"{missing.what} (`{missing.command}`)"


def table(output: Path, name: str, rows: list[dict], caption: str) -> str:
    """Return a table as Markdown, and write it as NAME.tex for \\input, with booktabs."""
    frame = pd.DataFrame(rows).astype(str)
    frame = frame.map(lambda cell: " ".join(cell.split()))  # a name may hold line breaks
    # Columns of numbers, intervals and percentages are aligned to the right.
    numeric = [column.str.match(r"$|[-+<\[0-9]").all() for _, column in frame.items()]

    # LaTeX
    columns = "".join("r" if right else "l" for right in numeric)
    styler = frame.style.hide(axis="index").format(escape="latex")
    styler = styler.format_index(escape="latex", axis="columns")
    tabular = styler.to_latex(hrules=True, column_format=f"@{{}}{columns}@{{}}")
    # pandas leaves < and >, which the fonts of plain LaTeX print as Spanish marks.
    tabular = tabular.replace("<", "$<$").replace(">", "$>$")
    with atomic(output / f"{name}.tex", "w") as file:
        file.write(f"% {caption}; needs \\usepackage{{booktabs}}\n")
        file.write("\\begingroup\\footnotesize\\setlength{\\tabcolsep}{3pt}\n")
        file.write(tabular)
        file.write("\\endgroup\n")

    # Markdown
    markdown = frame.map(escape_cell).to_markdown(
        index=False,
        disable_numparse=True,  # 0.10 stays 0.10
        colalign=["right" if right else "left" for right in numeric],
    )
    return f"{caption} (`{name}.tex`):\n\n{markdown}"


def escape_cell(cell: str) -> str:
    """Escape what would start an HTML tag or a new cell of a Markdown table."""
    cell = re.sub(r"<(?=[a-zA-Z/!])", "&lt;", cell)
    return cell.replace("|", "\\|")


def escape_markdown(text: str) -> str:
    text = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>#|$~])", r"\\\1", text)


def picture(path: Path, caption: str) -> str:
    return f"![{caption}]({path.name})\n\n*{caption}.*"


# -----------------------------------------------------------------------------
# the answer


def answer(
    runs: Sequence[Run], starts: Sequence[Run], output: Path, rounds: int, missing: list[Missing]
) -> str:
    """Answer the question of the study from a strategy x architecture x learning rate grid."""
    heading = "## Is it the fine-tuning, the architecture, or the hyperparameters?"
    # Only a complete grid divides without a model of what the missing cells would have been.
    grid = factorial(runs)
    untrained = untrained_models(runs, grid) if grid else {}
    if grid is None or not set(grid.architectures) <= set(untrained):
        needs = (
            "the answer to the question: it needs at least two strategies, two architectures and "
            "two learning rates, and the untrained models on the same images"
        )
        missing.append(Missing(needs, ablate_command("factorial", by_protocol(runs)[0])))
        return heading + "\n\nNot answered: see what is missing."

    # The reference is the smallest model, untrained, at the middle learning rate.
    def size(architecture: str) -> tuple:
        return untrained[architecture].result.get("parameters", 0), architecture

    architectures = sorted(grid.architectures, key=size)
    correct = correct_answers(grid, untrained, architectures)
    # Level 0 of strategy and architecture; the learning rates are sorted.
    names = ["strategy", "architecture", "learning rate"]
    reference = [0, 0, grid.rates // 2]
    shares = statistics.decompose(correct, names, reference, rounds)

    figure = figures.answer(shares["variance"], shares["share"], output / "answer.png")
    return paragraphs(
        [
            heading,
            answer_sentence(shares, architectures[0]),
            answer_caveat(starts, architectures),
            picture(figure, "What the differences are owed to"),
            answer_table(shares, names, output),
            answer_method(grid, architectures, rounds),
        ]
    )


def untrained_models(runs: Sequence[Run], grid: Grid) -> dict[str, Run]:
    """Return the untrained model of each architecture that has the protocol of the grid."""
    # On other images or names it would be no baseline for the grid.
    protocol = any_run(grid).protocol
    untrained = {}
    for run in runs:
        if run.strategy == "none" and run.protocol == protocol:
            untrained[run.architecture] = run
    return untrained


def any_run(grid: Grid) -> Run:
    # All runs of a grid share their protocol, so any one speaks for it.
    first_cell = next(iter(grid.runs.values()))
    return first_cell[0][grid.seeds[0]]


def correct_answers(
    grid: Grid, untrained: dict[str, Run], architectures: Sequence[str]
) -> np.ndarray:
    """Return (1 + strategies, architectures, learning rates, seeds, images) bool.

    Level 0 of the strategies is the untrained model, which has no rates and no seeds: it is
    repeated over both.
    """
    # (1, architectures, rates, seeds, images)
    levels = [[[[untrained[a].correct] * len(grid.seeds)] * grid.rates for a in architectures]]
    for strategy in grid.strategies:
        level = []  # (architectures, rates, seeds, images)
        for architecture in architectures:
            cell = grid.runs[strategy, architecture]
            level.append([[by_seed[s].correct for s in grid.seeds] for by_seed in cell])
        levels.append(level)
    return np.array(levels)


def percent(interval: statistics.Interval) -> str:
    # A share of no gain at all.
    if math.isnan(interval[0]):
        return "undefined"
    estimate, low, high = (100 * value for value in interval)
    return f"{estimate:.0f}% [{low:.0f}, {high:.0f}]"


def points(interval: statistics.Interval) -> str:
    estimate, low, high = interval
    return f"{estimate:+.1f} [{low:+.1f}, {high:+.1f}]"


def answer_sentence(shares: dict, smallest: str) -> str:
    gain = shares["gain"]
    share = {factor: percent(value) for factor, value in shares["share"].items()}
    return (
        f"**Of the {points(gain['total'])} points that the best of the grid gains over the "
        f"untrained {smallest}, {share['strategy']} are owed to fine-tuning and its strategy, "
        f"{share['architecture']} to the architecture and {share['learning rate']} to the "
        f"hyperparameters (here the learning rate); {gain['interaction'][0]:+.1f} points come only "
        "when two or more are changed together.**"
    )


def answer_caveat(starts: Sequence[Run], architectures: Sequence[str]) -> str:
    """Return what stands in for pretrained models, or "" if nothing does."""
    # The reader must not take small models trained here for the published ones.
    pretraining = []
    for run in starts:
        if run.architecture in architectures:
            epochs = run.settings.get("epochs")
            classes = run.settings.get("classes") or "all"
            pretraining.append(f"{run.architecture}: {epochs} epochs on the {classes} classes")
    if not pretraining:
        return ""
    return (
        f"{' and '.join(architectures)} stand in for CLIP's nine architectures, and training from "
        f"random weights ({'; '.join(pretraining)}) for CLIP's pretraining: the sentence is about "
        "these small models on these images, and says nothing about CLIP."
    )


def answer_table(shares: dict, names: Sequence[str], output: Path) -> str:
    variance = shares["variance"]
    gain = shares["gain"]
    rows = []
    for name in names:
        rows.append(
            {
                "factor": name,
                "variance": percent(variance[name]),
                "gain": percent(shares["share"][name]),
                "alone (points)": points(gain[f"alone {name}"]),
            }
        )
    # Neither belongs to one factor, so neither has a share of the gain.
    together = {"factor": "interaction", "variance": percent(variance["interaction"]), "gain": ""}
    together["alone (points)"] = points(gain["interaction"])
    seeds = {"factor": "seeds", "variance": percent(variance["seeds"]), "gain": ""}
    seeds["alone (points)"] = ""
    caption = "Shares of the variance and of the gain"
    return table(output, "answer", [*rows, together, seeds], caption)


def answer_method(grid: Grid, architectures: Sequence[str], rounds: int) -> str:
    dropped = ""
    if grid.dropped:
        dropped = f" Left out, for want of cells: {', '.join(grid.dropped)}."
    return (
        f"Measured on {title(any_run(grid))}: {len(grid.strategies)} strategies "
        f"({', '.join(grid.strategies)}), {len(architectures)} architectures, {grid.rates} "
        f"learning rates for each, seeds {', '.join(map(str, grid.seeds))}. Gain: what is free is "
        "chosen on one half of the images and measured on the other, both ways; what is not free "
        f"stays untrained, {architectures[0]} (fewest parameters), and at the middle learning "
        "rate; Shapley's division averages over the orders in which the three are freed. Alone: "
        "freed while the others stay; its interaction row is what the total has beyond their sum. "
        "Variance: sums of squares of the balanced design over the trained models, a learning "
        "rate's level being its rank within its strategy. Brackets: 95% bootstrap intervals over "
        f"images and seeds ({rounds} rounds).{dropped}"
    )


# -----------------------------------------------------------------------------
# results


def results(runs: Sequence[Run], output: Path, name: str) -> str:
    """Return the results of a protocol: a table, a figure, and tests of all pairs of models."""
    groups = best_by_strategy(runs)
    # Of models that tie, the first one is the best, here and in the closer look.
    top = int(np.argmax([mean(group) for group in groups]))
    pairs = compare_pairs(groups)
    # The p-value of each model against the best one.
    p_values = {}
    for pair in pairs.itertuples():
        if pair.a == top:
            p_values[pair.b] = pair.holm
        elif pair.b == top:
            p_values[pair.a] = pair.holm
    rows = [result_row(group, p_values.get(i)) for i, group in enumerate(groups)]
    caption = (
        "Top-1, top-5 and mean of the classes in percent; 95% intervals over seeds (Student) and "
        "over images (Wilson); parameters trained, seconds of training, peak memory; p: exact "
        f"McNemar against {label(groups[top][0])}, lowest seed, Holm's correction "
        f"(pairs: {len(pairs)})"
    )
    heading = f"### {title(runs[0])}"
    parts = [heading, protocol_note(runs), table(output, name, rows, caption)]
    # With several learning rates or prompts, the table itself is a choice.
    configurations = len(grouped(runs))
    if configurations > len(groups):
        parts.append(
            f"The best of {configurations} configurations by architecture and strategy, chosen on "
            "these very images: flattering."
        )
    if len(groups) > 1:
        labels = [label(group[0]) for group in groups]
        write_pairs(output / f"{name}-pairs.csv", pairs, labels)
        parts.append(accuracies_figure(groups, output / f"{name}.png"))
    return paragraphs(parts)


def compare_pairs(groups: list[Group]) -> pd.DataFrame:
    """Test each model against each other on the same images, by the run of its lowest seed.

    Columns: a, b (positions in groups), seed (of a), only_a and only_b (images that one model
    alone has right), p (McNemar's exact test), holm (corrected for the number of pairs).
    """
    rows = []
    for a, b in itertools.combinations(range(len(groups)), 2):
        # One run each: McNemar's test takes pairs of answers to the same image.
        first, second = groups[a][0], groups[b][0]
        test = statistics.mcnemar(first.correct, second.correct)
        rows.append((a, b, first.seed, *test))
    pairs = pd.DataFrame(rows, columns=["a", "b", "seed", "only_a", "only_b", "p"])
    return pairs.assign(holm=statistics.holm(pairs["p"]))


def write_pairs(path: Path, pairs: pd.DataFrame, labels: Sequence[str]) -> None:
    rows = []
    for pair in pairs.itertuples():
        row = {"a": labels[pair.a], "b": labels[pair.b], "seed": pair.seed}
        row["only a right"] = pair.only_a
        row["only b right"] = pair.only_b
        row["p"] = f"{pair.p:.4g}"
        row["holm"] = f"{pair.holm:.4g}"
        rows.append(row)
    write_csv(path, rows)


def result_row(group: Group, p_value: float | None) -> dict[str, str]:
    """Return the cells of one model; what is not known of it stays empty."""
    first = group[0]
    result = first.result
    trained = first.strategy != "none"
    row = dict.fromkeys(RESULT_COLUMNS, "")

    # what was trained
    row["architecture"] = first.architecture
    row["strategy"] = first.strategy
    if trained and result.get("lr"):
        row["lr"] = f"{result['lr']:g}"
    row["seeds"] = str(len(group))

    # accuracy
    row["top-1"] = f"{mean(group):.2f}"
    if len(group) > 1:
        _, low, high = interval(group)
        row["seeds 95%"] = f"[{low:.1f}, {high:.1f}]"
    images = len(first.labels)
    # With several seeds, the interval around their mean number of right images. Not of all their
    # images together: the seeds see the same ones, so they are not independent trials.
    low, high = wilson(round(mean(group) * images / 100), images)
    row["images 95%"] = f"[{low:.1f}, {high:.1f}]"
    for column, metric in (("top-5", "top5"), ("per class", "mean_per_class")):
        if not math.isnan(mean(group, metric)):
            row[column] = f"{mean(group, metric):.2f}"

    # cost
    # trainable_image, trainable_text, ...: the parts of the model are counted apart.
    counts = [count for key, count in result.items() if key.startswith("trainable_")]
    if counts:
        row["trained"] = f"{sum(counts) if trained else 0:,}"
    seconds = [run.result["train_seconds"] for run in group if "train_seconds" in run.result]
    if trained and seconds:
        row["s"] = f"{np.mean(seconds):.0f}"
    if "peak_memory_mb" in result:
        row["MB"] = f"{result['peak_memory_mb']:,}"
    # The best model has no test against itself.
    if p_value is not None:
        row["p"] = "<0.001" if p_value < 0.001 else f"{p_value:.3f}"
    return row


def accuracies_figure(groups: list[Group], path: Path) -> str:
    first = groups[0][0]  # the protocol is that of all
    rows = []
    for group in groups:
        middle, low, high = interval(group)
        row = {"label": label(group[0]), "strategy": group[0].strategy}
        rows.append(row | {"mean": middle, "low": low, "high": high})
    heading = f"{first.split}, {len(first.labels):,} images"
    figure = figures.accuracies(pd.DataFrame(rows), path, heading)
    return picture(
        figure, "Top-1 with 95% intervals, over seeds where there are several, else over images"
    )


# -----------------------------------------------------------------------------
# one factor at a time


def factors(protocols: list[list[Run]], output: Path, missing: list[Missing]) -> str:
    """Return the effect of one factor, all else equal: a table and a figure for each protocol."""
    parts = []
    varied = set()
    for i, runs in enumerate(protocols):
        rows = []  # of the table
        curves = []  # of the figure: numeric factors alone
        for factor in FACTORS:
            for sweep in sweeps(runs, factor):
                varied.add(factor)
                rows += sweep_rows(sweep, factor)
                if factor in NUMERIC_FACTORS:
                    curves.append(sweep_curve(sweep, factor, group=len(curves)))
        if not rows:
            continue
        name = numbered(f"factors-{runs[0].split}", i)
        parts.append(f"### {title(runs[0])}")
        if curves:
            figure = figures.factor_curves(pd.concat(curves), output / f"{name}.png")
            parts.append(picture(figure, "Top-1 by setting, all else equal; bands: all seeds"))
        caption = "Top-1 in percent with 95% intervals, over seeds or, with one seed, over images"
        parts.append(table(output, name, rows, caption))

    # Missing only if no protocol varies it.
    for factor, factor_name in FACTORS.items():
        if factor not in varied:
            grid = GRID_OF_FACTOR.get(factor, factor)
            effect = f"the effect of the {factor_name}: no two runs that differ in it alone"
            missing.append(Missing(effect, ablate_command(grid, protocols[0])))
    if not parts:
        return ""
    heading = "## One factor at a time"
    return paragraphs([heading, "All else is the same within a group of rows.", *parts])


def sweeps(runs: Sequence[Run], factor: str) -> list[list[Group]]:
    """Return the groups of runs that differ in a factor (and their seed) alone.

    Each is a list over two or more levels of the factor, of the runs with that level.
    """
    # An untrained model has none of these settings, and an older run may lack one.
    candidates = []
    for run in runs:
        if run.strategy != "none" and run.settings.get(factor) is not None:
            candidates.append(run)
    result = []
    for group in grouped(candidates, without=factor):
        levels: dict[str, list[Run]] = {}
        for run in group:
            level = json.dumps(run.settings[factor])  # a list of prompts can't be a key
            levels.setdefault(level, []).append(run)
        sweep = list(levels.values())
        if factor in NUMERIC_FACTORS:
            sweep.sort(key=lambda members: members[0].settings[factor])
        if len(sweep) > 1:
            result.append(sweep)
    return result


def sweep_note(run: Run) -> str:
    return "learned" if run.settings.get("learn_temperature") else ""


def sweep_rows(sweep: list[Group], factor: str) -> list[dict]:
    """Return a row of the table for each level."""
    rows = []
    for members in sweep:
        first = members[0]
        note = sweep_note(first)
        level = first.settings[factor]
        if isinstance(level, list):  # of prompt templates
            level = level[0] if len(level) == 1 else f"{len(level)} templates"
        _, low, high = interval(members)
        rows.append(
            {
                "factor": f"{FACTORS[factor]} ({note})" if note else FACTORS[factor],
                "architecture": first.architecture,
                "strategy": first.strategy,
                "level": f"{level:g}" if factor in NUMERIC_FACTORS else level,
                "seeds": len(members),
                "top-1": f"{mean(members):.2f}",
                "95%": f"[{low:.1f}, {high:.1f}]",
            }
        )
    return rows


def sweep_curve(sweep: list[Group], factor: str, group: int) -> pd.DataFrame:
    """Return a row for each run, as `figures.factor_curves` needs them."""
    rows = []
    for run in itertools.chain(*sweep):
        row = {"factor": FACTORS[factor], "group": group, "note": sweep_note(run)}
        row["architecture"] = run.architecture
        row["strategy"] = run.strategy
        row["level"] = float(run.settings[factor])
        row["top1"] = run.top1
        rows.append(row)
    return pd.DataFrame(rows)


# -----------------------------------------------------------------------------
# base to new classes, WiSE-FT


def base_to_new(protocols: list[list[Run]], output: Path, missing: list[Missing]) -> str:
    """Return the accuracy on the classes that were trained on, and on the others."""
    parts = []
    for i, runs in enumerate(protocols):
        rows = []
        for group in best_by_strategy(runs):
            first = group[0]
            # Trained on all classes, none of them is new.
            if first.trained_on != "base" or math.isnan(mean(group, "new_top1")):
                continue
            row = {"architecture": first.architecture, "strategy": first.strategy}
            row["seeds"] = len(group)
            row["base"] = f"{mean(group, 'base_top1'):.2f}"
            row["new"] = f"{mean(group, 'new_top1'):.2f}"
            row["harmonic mean"] = f"{mean(group, 'harmonic_mean'):.2f}"
            rows.append(row)
        if rows:
            name = f"base-to-new-{runs[0].split}-{i}"
            caption = "Top-1 in percent among the base and among the new classes"
            parts.append(f"### {title(runs[0])}")
            parts.append(table(output, name, rows, caption))
    if not parts:
        what = "base to new classes: no run trained on base classes alone"
        missing.append(Missing(what, ablate_command("base_to_new", protocols[0])))
        return ""
    return paragraphs(["## From base to new classes", *parts])


def wise_ft_command(runs: Sequence[Run]) -> str:
    """The command that evaluates between start and end of the first of the runs that has both.

    Empty if none has.
    """
    for run in runs:
        moves = run.strategy not in ("none", *KEEPS_WEIGHTS)
        if moves and (run.folder / "model.pt").exists():
            name = shlex.quote(run.folder.name)
            return (
                f"python baseline_eval.py --architecture {RUNS_FOLDER}/{name} --wise_ft 0.5 "
                f"--runs {RUNS_FOLDER}"
            )
    return ""


def wise_ft(
    curves: Sequence[Run], runs: Sequence[Run], output: Path, missing: list[Missing]
) -> str:
    """Return the accuracy between the start and the fine-tuned weights, a panel for each run."""
    panels = {}
    for run in curves:
        prefix = f"{run.split}/"
        # metrics.jsonl has other rows, too: those of the curve have all of these keys.
        needed = ("alpha", f"{prefix}top1", f"{prefix}top1_low", f"{prefix}top1_high")
        rows = []
        for row in read_lines(run.folder / "metrics.jsonl", *needed):
            rows.append({key.removeprefix(prefix): value for key, value in row.items()})
        if rows:
            panels[f"{label(run)} ({run.split})"] = sorted(rows, key=lambda row: row["alpha"])
    if not panels:
        what = "WiSE-FT: no evaluation between start and fine-tuned weights"
        missing.append(Missing(what, wise_ft_command(runs)))
        return ""
    figure = figures.wise_ft(panels, output / "wise-ft.png")
    heading = "## Between the start and the fine-tuned weights"
    return paragraphs([heading, picture(figure, "WiSE-FT; band: 95% over images")])


# -----------------------------------------------------------------------------
# a closer look at the main protocol


def closer_look(runs: Sequence[Run], output: Path, missing: list[Missing]) -> str:
    """Return cost, learning curves, classes and confusions of the main protocol."""
    groups = best_by_strategy(runs)
    best = int(np.argmax([mean(group) for group in groups]))
    # Classes without images in this split have no accuracy.
    names = sorted(set(runs[0].labels.tolist()))
    accuracy = np.array([class_accuracy(group, names) for group in groups])  # (models, classes)
    parts = [f"## A closer look: {title(runs[0])}"]
    if len(groups) > 1:
        parts.append(cost_figure(groups, output / "cost.png"))
    parts.append(learning_figure(groups, output / "learning.png", missing))
    parts.append(classes_figure(groups, best, accuracy, names, output / "classes.png", missing))
    if len(groups) > 1:
        parts.append(worst_classes(groups, best, accuracy, names, output / "worst.png"))
    parts.append(confusions_figure(groups[best], output / "confusions.png"))
    return paragraphs(parts)


def class_accuracy(group: Group, names: Sequence[str]) -> list[float]:
    """Return the accuracy of each class in percent, over all seeds."""
    # In the order of `names`, as all models are compared class by class.
    accuracy = []
    for name in names:
        # All runs of a group have the same images, so this is (seeds, images of the class).
        of_class = [run.correct[run.labels == name] for run in group]
        accuracy.append(100 * np.mean(of_class))
    return accuracy


def cost_figure(groups: list[Group], path: Path) -> str:
    rows = []
    for group in groups:
        first = group[0]
        # 0 is unknown: figures.cost leaves such a point out of the panel.
        seconds = [run.result.get("train_seconds", 0) for run in group]
        rows.append(
            {
                "architecture": first.architecture,
                "strategy": first.strategy,
                "top1": mean(group),
                "parameters": first.result.get("parameters", 0) / 1e6,
                "gflops": gflops(first.architecture) if first.architecture in SHAPES else 0,
                "seconds": np.mean(seconds),
            }
        )
    figure = figures.cost(pd.DataFrame(rows), path)
    return picture(
        figure, "Accuracy against parameters, operations of the image tower, and training time"
    )


@functools.cache
def gflops(architecture: str) -> float:
    """Return the operations of the image tower for one image, in 10^9."""
    import torch  # here, as nothing else of a report needs it

    from flowers.models import build, count_flops

    # On the meta device a tensor has a shape and no numbers: nothing is computed.
    with torch.device("meta"):
        model = build(architecture)
        resolution = model.visual.input_resolution
        images = torch.empty(1, 3, resolution, resolution)
    return count_flops(lambda: model.encode_image(images)) / 1e9


def learning_figure(groups: list[Group], path: Path, missing: list[Missing]) -> str:
    curves = []
    for group in groups:
        losses = []  # one list of steps for each seed
        for run in group:
            rows = read_lines(run.folder / "metrics.jsonl", "train/loss")
            losses.append([row["train/loss"] for row in rows])
        lengths = {len(loss) for loss in losses}
        # Seeds of different lengths were killed and repeated, and have no common curve.
        if len(lengths) == 1 and max(lengths) > 1:
            curves.append(learning_curve(group[0], np.array(losses)))
    if not curves:
        what = "learning curves: no metrics.jsonl beside the runs of the main protocol"
        missing.append(Missing(what))
        return ""
    figure = figures.learning_curves(pd.concat(curves), path)
    return picture(
        figure, "Training loss, running mean over a twentieth of the steps; bands: all seeds"
    )


def learning_curve(run: Run, losses: np.ndarray) -> pd.DataFrame:
    """Return the running mean of losses (seeds, steps), as `figures.learning_curves` needs it."""
    steps = losses.shape[1]
    width = max(1, steps // 20)
    smooth = [np.convolve(loss, np.ones(width) / width, "valid") for loss in losses]
    # A mean stands at the last of its steps.
    epochs = np.arange(width, steps + 1) * (run.settings.get("epochs") or 1) / steps
    # A panel is too small to show more than 200 points.
    shown = np.linspace(0, len(epochs) - 1, min(len(epochs), 200)).round().astype(int)
    curve = pd.DataFrame(np.transpose(smooth)[shown], index=pd.Index(epochs[shown], name="epoch"))
    curve = curve.melt(var_name="seed", value_name="loss", ignore_index=False).reset_index()
    return curve.assign(architecture=run.architecture, strategy=run.strategy)


def classes_figure(
    groups: list[Group],
    best: int,
    accuracy: np.ndarray,
    names: Sequence[str],
    path: Path,
    missing: list[Missing],
) -> str:
    """Return the change of each class from the untrained model to the best trained one."""
    best_run = groups[best][0]
    # The untrained model of the same architecture, so that training is all that differs.
    for i, group in enumerate(groups):
        first = group[0]
        if first.strategy == "none" and first.architecture == best_run.architecture and i != best:
            before, after = label(first), label(best_run)
            change = pd.DataFrame({"name": names, "before": accuracy[i], "after": accuracy[best]})
            figure = figures.classes(change, (before, after), path)
            return picture(figure, f"From {before} to {after}, means over seeds")
    what = (
        "the change of each class: "
        "no untrained model beside the best trained one on the same images"
    )
    missing.append(Missing(what))
    return ""


def worst_classes(
    groups: list[Group],
    best: int,
    accuracy: np.ndarray,
    names: Sequence[str],
    path: Path,
) -> str:
    """Return the worst classes of the best model, and how many of them models share."""
    models = list(range(len(groups)))
    if len(groups) > MOST_MODELS:
        models = models_to_compare(groups, best)
    # Twenty of 102 classes, at most a third of fewer.
    k = min(20, max(1, len(names) // 3))
    worst = {}  # model -> its k worst classes, the worst first
    for i in models:
        # Stable: classes of equal accuracy are taken in the order of their names.
        order = np.argsort(accuracy[i], kind="stable")
        worst[i] = [names[c] for c in order[:k]]
    counts, p_values = shared_worst(list(worst.values()), len(names))
    labels = [label(groups[i][0]) for i in models]
    figure = figures.worst_overlap(counts, p_values, labels, k, path)
    tests = math.comb(len(models), 2)
    # The mean of the hypergeometric distribution: k draws, k of the classes marked.
    expected = k * k / len(names)
    caption = (
        f"How many of their {k} worst classes two models share; chance gives {expected:.1f}; "
        "* more than that, hypergeometric test, p < 0.05 after Holm's correction "
        f"(pairs: {tests})"
    )
    worst_names = ", ".join(escape_markdown(name) for name in worst[best])
    sentence = f"The {k} worst classes of {label(groups[best][0])}: {worst_names}."
    return paragraphs([picture(figure, caption), sentence])


def shared_worst(worst: list[list[str]], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Compare the worst classes of M models, of so many classes in all.

    Returns:
        (M, M) int, how many two models share, and (M, M), the p-value of at least as many by
        chance, corrected for the number of pairs; 1 on the diagonal.
    """
    size = len(worst)
    counts = np.empty((size, size), int)
    p_values = np.ones((size, size))
    for a, b in np.ndindex(size, size):
        counts[a, b], _, p_values[a, b] = statistics.overlap(worst[a], worst[b], classes)
    # Each pair is tested once: the correction counts the upper triangle alone.
    upper = np.triu_indices(size, k=1)
    corrected = np.ones((size, size))
    corrected[upper] = statistics.holm(p_values[upper])
    return counts, np.minimum(corrected, corrected.T)


def models_to_compare(groups: list[Group], best: int) -> list[int]:
    """Return the untrained and the best trained model of each architecture, the best first."""
    chosen: dict[str, int] = {}
    # The best of all comes last, so that it is chosen where others are as good.
    for i in sorted(range(len(groups)), key=lambda i: (i == best, mean(groups[i]))):
        if groups[i][0].strategy != "none":
            chosen[groups[i][0].architecture] = i
    models = []
    for i, group in enumerate(groups):
        if group[0].strategy == "none" or chosen[group[0].architecture] == i:
            models.append(i)
    models.sort(key=lambda i: i != best)  # stable: the others keep their order
    return models[:30]


def confusions_figure(group: Group, path: Path) -> str:
    """Return the most frequent mistakes of a model, over its seeds."""
    mistakes: Counter = Counter()
    images: Counter = Counter()
    for run in group:
        wrong = ~run.correct
        mistakes.update(zip(run.labels[wrong].tolist(), run.predicted[wrong].tolist()))
        images.update(run.labels.tolist())
    # By number, and among equals by name, so that the same runs give the same report.
    frequent = sorted(mistakes, key=lambda pair: (-mistakes[pair], pair))[:12]
    rows = []
    for true, predicted in frequent:
        share = 100 * mistakes[true, predicted] / images[true]
        rows.append({"true": true, "predicted": predicted, "percent": share})
    if not rows:
        return ""
    name = label(group[0])
    figure = figures.confusions(pd.DataFrame(rows), path, name)
    return picture(figure, f"The most frequent mistakes of {name}, over its {len(group)} seeds")


# -----------------------------------------------------------------------------
# starts


def stand_ins(starts: Sequence[Run]) -> str:
    """Return the runs that others started from, a line for each."""
    lines = []
    for run in starts:
        epochs = run.settings.get("epochs")
        classes = run.settings.get("classes") or "all"
        training = f"{epochs} epochs on {classes} classes"
        lines.append(
            f"- {run.name}: {run.architecture}, {training}; {run.split} top-1 {run.top1:.2f}%"
        )
    if not lines:
        return ""
    return "\n".join(["## Runs that others started from\n", *lines])


if __name__ == "__main__":
    main()
