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
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from flowers import UserError, command
from flowers.files import user_path


def parse_arguments() -> argparse.Namespace:
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
    if args.bootstrap < 1:
        raise UserError("--bootstrap must be at least 1")
    return args


if __name__ == "__main__":
    args = command(parse_arguments)()  # before pandas and scipy are imported: see flowers.command

import numpy as np
import pandas as pd

from flowers import calibration
from flowers.choices import KEEPS_WEIGHTS, SHAPES, templates_in_words
from flowers.files import atomic, read_lines, write_csv
from flowers.intervals import holm
from flowers.runs import SOUP, read_predictions
from flowers.study import figures, statistics
from flowers.study.comparable import (
    Grid,
    Group,
    Run,
    answers,
    best_by_strategy,
    elsewhere,
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
    "loss": "loss",
}
# Of Qwen's runs alone; where there are none, nothing is missing.
QWEN_FACTORS = {
    "max_pixels": "image size (pixels at most)",
    "rank": "rank of LoRA",
    "protocol": "protocol",
}
# Those that can be drawn as a curve; the others have a table only.
NUMERIC_FACTORS = ("lr", "temperature", "batch_size", "shots", "max_pixels", "rank")
# The grid of ablate.py that varies a factor, where it has another name.
GRID_OF_FACTOR = {"lr": "learning_rate", "prompt_template": "prompt"}

RESULT_COLUMNS = (
    "architecture",
    "strategy",
    "lr",
    "seeds",
    "top-1",
    "95%",
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
    "gains",
    "factors",
    "base-to-new",
    "cost",
    "trained",
    "learning",
    "classes",
    "worst",
    "confusions",
    "wise-ft",
    "forgetting",
    "probabilities",
    "reliability",
    "temperatures",
)
# Those of --pretraining of ablate.py that need no file; a stand-in is trained with prompts anyway.
PRETRAININGS = ("openai", "laion2b", "datacomp", "dfn", "metaclip")
RUNS_FOLDER = '"$RUNS"'  # stands for it in commands, as a shell takes it
MOST_MODELS = 14  # of the overlap of worst classes: more do not fit on a page


class Missing(NamedTuple):
    """What a section could not show, and the command that makes the runs for it, if there is one.

    The command has RUNS_FOLDER for the folder of the runs: a report is the same wherever they lie.
    """

    what: str
    command: str = ""


@command
def main(args: argparse.Namespace):
    output = Path(args.output)

    # -----------------------------------------------------------------------------
    # runs

    loaded, notes = load_all([Path(folder) for folder in args.runs])
    resolved, starts = resolve(loaded)
    # What a model knows of other datasets is a question of its own.
    names_elsewhere = elsewhere(loaded)
    others = [run for run in resolved if run.name in names_elsewhere]
    at_home = [run for run in resolved if run.name not in names_elsewhere]
    # An evaluation between two sets of weights is a curve, not a model of its own.
    curves = [run for run in at_home if run.settings.get("wise_ft")]
    runs = [run for run in at_home if not run.settings.get("wise_ft")]
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
        gains(protocols, output, missing),
        factors(protocols, output, missing),
        base_to_new(protocols, output, missing),
        wise_ft(curves, runs, output, missing),
        forgotten(others, curves, runs, output, missing),
        probabilities(protocols, output, missing),
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
    strategy = "untrained" if run.strategy == "none" else run.method
    return f"{run.model} {strategy}"


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
    weights = dict.fromkeys(run.model for run in runs)
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
    architectures = sorted({run.architecture for run in runs if run.architecture in SHAPES})
    # The factorial needs two architectures; the other grids are of one.
    if grid != "factorial":
        architectures = architectures[:1]
    elif len(architectures) < 2:
        architectures = []
    if architectures:
        words += ["--architecture", *architectures]
    # ablate.py begins with OpenAI's weights, or with a stand-in that is trained with prompts.
    available = {run.pretraining for run in runs if run.architecture in architectures}
    pretrainings = [name for name in PRETRAININGS if name in available]
    if pretrainings not in ([], ["openai"]):
        words += ["--pretraining", *pretrainings]
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


def without_empty(rows: list[dict]) -> list[dict]:
    """Leave out the columns that are empty in all rows."""
    filled = [key for key in rows[0] if any(row[key] != "" for row in rows)]
    return [{key: row[key] for key in filled} for row in rows]


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
    """Answer the question of the study from a complete grid of all of its factors."""
    # Only a complete grid divides without a model of what the missing cells would have been.
    grid = factorial(runs)
    division = divide(runs, grid, rounds) if grid else None
    if division is None:
        needs = (
            "the answer to the question: it needs at least two strategies, two architectures and "
            "two learning rates, with their numbers of parameters, and the untrained models on the "
            "same images with the same prompts"
        )
        missing.append(Missing(needs, ablate_command("factorial", by_protocol(runs)[0])))
        return f"{question()}\n\nNot answered: see what is missing."

    shares = division.shares
    figure = figures.answer(shares["variance"], shares["share"], output / "answer.png")
    return paragraphs(
        [
            question(division),
            answer_sentence(division),
            answer_caveat(starts, division.grid),
            picture(figure, "What the differences are owed to"),
            answer_table(division, output),
            answer_method(division, rounds),
            shared_rate(runs, division, output, rounds),
        ]
    )


def question(division: "Division | None" = None) -> str:
    """The heading of the answer: what it was divided among, or would have been."""
    pretraining = "the pretraining, " if division and "pretraining" in division.factors else ""
    return f"## Is it the fine-tuning, the architecture, {pretraining}or the hyperparameters?"


class Division(NamedTuple):
    """A grid, and what its differences are owed to."""

    grid: Grid  # its architectures in the order of their size
    factors: list[str]  # those with more than one level
    shares: dict[str, dict[str, statistics.Interval]]  # see statistics.decompose


def divide(runs: Sequence[Run], grid: Grid, rounds: int) -> Division | None:
    """Divide variance and gain among the factors of a grid.

    The reference is the smallest model, untrained, of the first pretraining, at the middle rate.
    Returns None if the untrained model of an architecture and pretraining is not among the runs, or
    if the size of an architecture is not known.
    """
    untrained = untrained_models(runs, grid)
    if len(untrained) < len(grid.architectures) * len(grid.pretrainings):
        return None
    # Evaluations have not recorded it. These are of one strategy, which may add parameters.
    sizes = {name: grid.any_run(name).result.get("parameters") for name in grid.architectures}
    if None in sizes.values():
        return None

    architectures = sorted(grid.architectures, key=lambda name: (sizes[name], name))
    grid = replace(grid, architectures=architectures)
    correct = correct_answers(grid, untrained)
    factors = ["strategy", "architecture", "pretraining", "learning rate"]
    reference = [0, 0, 0, grid.rates // 2]
    if len(grid.pretrainings) == 1:
        # A factor of one level has no share of anything.
        correct = correct.squeeze(axis=2)
        del factors[2], reference[2]
    clusters = grid.any_run().clusters
    shares = statistics.decompose(correct, factors, reference, rounds, clusters=clusters)
    return Division(grid, factors, shares)


def untrained_models(runs: Sequence[Run], grid: Grid) -> dict[tuple[str, str], Run]:
    """Return the untrained model of each architecture and pretraining of a grid.

    One is left out where the runs of the grid did not all start from it, with its prompts.
    """
    # On other images or names it would be no baseline for the grid.
    protocol = grid.any_run().protocol
    models = untrained_by_start([run for run in runs if run.protocol == protocol])
    untrained = {}
    for architecture, pretraining in itertools.product(grid.architectures, grid.pretrainings):
        # A learned prompt says nothing about the prompts of the grid.
        strategies = [name for name in grid.strategies if name not in KEEPS_WEIGHTS]
        cells = [grid.cell(strategy, architecture, pretraining) for strategy in strategies]
        starts = {run.start for cell in cells for seeds in cell for run in seeds}
        start = starts.pop()
        if not starts and start in models:
            untrained[architecture, pretraining] = models[start]
    return untrained


def correct_answers(grid: Grid, untrained: dict[tuple[str, str], Run]) -> np.ndarray:
    """Return (1 + strategies, architectures, pretrainings, learning rates, seeds, images) bool.

    Level 0 of the strategies is the untrained model, which has no rates and no seeds: it is
    repeated over both.
    """
    images = len(grid.any_run().labels)
    shape = len(grid.architectures), len(grid.pretrainings), grid.rates, len(grid.seeds), images
    correct = np.empty((1 + len(grid.strategies), *shape), bool)
    for a, architecture in enumerate(grid.architectures):
        for p, pretraining in enumerate(grid.pretrainings):
            correct[0, a, p] = untrained[architecture, pretraining].correct  # (images,)
            for s, strategy in enumerate(grid.strategies, 1):
                cell = grid.cell(strategy, architecture, pretraining)
                correct[s, a, p] = [[run.correct for run in seeds] for seeds in cell]
    return correct


def percent(interval: statistics.Interval) -> str:
    # A share of no gain at all.
    if math.isnan(interval[0]):
        return "undefined"
    estimate, low, high = (100 * value for value in interval)
    return f"{estimate:.0f}% [{low:.0f}, {high:.0f}]"


def points(interval: statistics.Interval) -> str:
    estimate, low, high = interval
    return f"{estimate:+.1f} [{low:+.1f}, {high:+.1f}]"


def answer_sentence(division: Division) -> str:
    gain = division.shares["gain"]
    share = {factor: percent(value) for factor, value in division.shares["share"].items()}
    pretraining = ""
    if "pretraining" in division.factors:
        pretraining = f", {share['pretraining']} to the pretraining"
    smallest = smallest_model(division.grid)
    return (
        f"**Of the {points(gain['total'])} points that the best of the grid gains over the "
        f"untrained {smallest}, {share['strategy']} are owed to fine-tuning and its strategy, "
        f"{share['architecture']} to the architecture{pretraining} and {share['learning rate']} to "
        f"the hyperparameters (here the learning rate); {gain['interaction'][0]:+.1f} points come "
        "only when two or more are changed together.**"
    )


def smallest_model(grid: Grid) -> str:
    """The model that the gain is counted from, in words."""
    return grid.any_run(grid.architectures[0], grid.pretrainings[0]).model


def answer_caveat(starts: Sequence[Run], grid: Grid) -> str:
    """Return what stands in for pretrained models, or "" if nothing does."""
    # The reader must not take small models trained here for the published ones.
    models_of = {}  # a training -> the models that it made; a start may be in several folders
    for run in starts:
        if run.architecture in grid.architectures:
            epochs = run.settings.get("epochs")
            classes = run.settings.get("classes") or "all"
            training = f"{epochs} epochs on the {classes} classes"
            models_of.setdefault(training, {})[run.model] = True
    if not models_of:
        return ""
    pretraining = [f"{training}: {', '.join(models)}" for training, models in models_of.items()]
    return (
        f"{', '.join(grid.architectures)} stand in for CLIP's nine architectures, and training "
        f"from random weights ({'; '.join(pretraining)}) for CLIP's pretraining: the sentence is "
        "about these small models on these images, and says nothing about CLIP."
    )


def answer_table(division: Division, output: Path) -> str:
    variance = division.shares["variance"]
    gain = division.shares["gain"]
    rows = []
    for name in division.factors:
        rows.append(
            {
                "factor": name,
                "variance": percent(variance[name]),
                "gain": percent(division.shares["share"][name]),
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


def answer_method(division: Division, rounds: int) -> str:
    grid = division.grid
    varied = f"{len(grid.architectures)} architectures"
    not_varied = f" The pretraining was not varied: {grid.pretrainings[0]}."
    if len(grid.pretrainings) > 1:
        varied += f", {len(grid.pretrainings)} pretrainings ({', '.join(grid.pretrainings)})"
        not_varied = ""
    elif not grid.pretrainings[0]:
        not_varied = " Each architecture has weights of its own: its share is that of both."
    dropped = ""
    if grid.dropped:
        dropped = f" Left out, for want of cells: {', '.join(grid.dropped)}."
    number = {3: "three", 4: "four"}[len(division.factors)]
    return (
        f"Measured on {title(grid.any_run())}: {len(grid.strategies)} strategies "
        f"({', '.join(grid.strategies)}), {varied}, {grid.rates} learning rates for each, seeds "
        f"{', '.join(map(str, grid.seeds))}.{not_varied} Gain: what is free is chosen on one half "
        "of the images and measured on the other, both ways; what is not free stays untrained, "
        f"{smallest_model(grid)} (fewest parameters), and at the middle learning rate; Shapley's "
        f"division averages over the orders in which the {number} are freed. Alone: freed while "
        "the others stay; its interaction row is what the total has beyond their sum. Variance: "
        "sums of squares of the balanced design over the trained models, a learning rate's level "
        "being its rank within its strategy. Brackets: 95% bootstrap intervals over images and "
        f"seeds ({rounds} rounds).{dropped}"
    )


def shared_rate(runs: Sequence[Run], relative: Division, output: Path, rounds: int) -> str:
    """Compare the answer with that of the grid of shared learning rates; "" if there is none."""
    grid = factorial(runs, shared_rate=True)
    shared = divide(runs, grid, rounds) if grid else None
    if shared is None:
        return ""
    rows = []
    for factor in dict.fromkeys([*relative.factors, *shared.factors, "interaction", "seeds"]):
        row = {"factor": factor}
        for kind in ("variance", "share"):
            for rates, division in (("multiples", relative), ("shared", shared)):
                known = division.shares[kind].get(factor)
                column = f"{'gain' if kind == 'share' else kind}, {rates}"
                row[column] = percent(known) if known else ""
        rows.append(row)
    text = (
        "Every strategy may get the same learning rates, or multiples of its own, and the choice "
        "can turn a comparison of strategies round (arXiv 2604.16410). Both were run. "
        f"Multiples: {in_one_line(relative)}. Shared rates: {in_one_line(shared)}."
    )
    caption = "Shares of the variance and of the gain by how the learning rates were chosen"
    return paragraphs([text, table(output, "answer-rates", rows, caption)])


def in_one_line(division: Division) -> str:
    """The gain of a grid, the strategy of its best cell, and what the grid is of."""
    grid = division.grid
    best_strategy, best = "", -1.0
    for key, by_rate in grid.runs.items():
        for by_seed in by_rate:
            top1 = mean([by_seed[seed] for seed in grid.seeds])
            if top1 > best:
                best_strategy, best = key[0], top1
    models = len(grid.architectures) * len(grid.pretrainings)
    return (
        f"{points(division.shares['gain']['total'])} points gained, the best strategy is "
        f"{best_strategy} ({best:.1f}%), of {', '.join(grid.strategies)} on {models} models"
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
        "Top-1, top-5 and mean of the classes in percent; 95% over images and seeds, of one seed "
        "over images alone; parameters trained, seconds of training, peak memory; p: exact "
        f"McNemar against {label(groups[top][0])}, lowest seed, Holm's correction "
        f"(pairs: {len(pairs)})"
    )
    heading = f"### {title(runs[0])}"
    parts = [heading, protocol_note(runs), table(output, name, rows, caption)]
    # With several learning rates or prompts, the table itself is a choice.
    parts.append(choice_note(runs, len(groups)))
    if len(groups) > 1:
        labels = [label(group[0]) for group in groups]
        write_pairs(output / f"{name}-pairs.csv", pairs, labels)
        parts.append(accuracies_figure(groups, output / f"{name}.png"))
    return paragraphs(parts)


def choice_note(runs: Sequence[Run], rows: int) -> str:
    """The sentence that says how many configurations so many rows are the best of; "" if all."""
    configurations = len(grouped(runs))
    if configurations <= rows:
        return ""
    return (
        f"The best {rows} of {configurations} configurations, one for each row, chosen on these "
        "very images: flattering."
    )


def compare_pairs(groups: list[Group]) -> pd.DataFrame:
    """Compare each model with each other on the same images.

    Columns: a, b (positions in groups); difference, low, high (a less b in points, over all seeds
    and images, with its 95% interval). Of the runs of the lowest seeds: seed (of a), only_a and
    only_b (images that one alone has right), p (McNemar's exact test), holm (corrected for the
    number of pairs).
    """
    correct = [answers(group) for group in groups]
    rows = []
    for a, b in itertools.combinations(range(len(groups)), 2):
        # One run each: McNemar's test takes pairs of answers to the same image.
        first, second = groups[a][0], groups[b][0]
        test = statistics.mcnemar(first.correct, second.correct)
        difference = statistics.difference_interval(correct[a], correct[b], first.clusters)
        rows.append((a, b, *difference, first.seed, *test))
    columns = ["a", "b", "difference", "low", "high", "seed", "only_a", "only_b", "p"]
    pairs = pd.DataFrame(rows, columns=columns)
    return pairs.assign(holm=holm(pairs["p"]))


def write_pairs(path: Path, pairs: pd.DataFrame, labels: Sequence[str]) -> None:
    rows = []
    for pair in pairs.itertuples():
        row = {"a": labels[pair.a], "b": labels[pair.b]}
        row["a - b"] = f"{pair.difference:.2f}"
        row["95% low"] = f"{pair.low:.2f}"
        row["95% high"] = f"{pair.high:.2f}"
        row["seed"] = pair.seed
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
    row["architecture"] = first.model
    row["strategy"] = first.method
    if trained and result.get("lr"):
        row["lr"] = f"{result['lr']:g}"
    row["seeds"] = str(len(group))

    # accuracy
    row["top-1"] = f"{mean(group):.2f}"
    _, low, high = interval(group)
    row["95%"] = f"[{low:.1f}, {high:.1f}]"
    for column, metric in (("top-5", "top5"), ("per class", "mean_per_class")):
        if not math.isnan(mean(group, metric)):
            row[column] = f"{mean(group, metric):.2f}"

    # cost
    parameters = trained_parameters(first)
    if parameters is not None:
        row["trained"] = f"{parameters if trained else 0:,}"
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
        figure, "Top-1 with 95% intervals over images and, where there are several, seeds"
    )


# -----------------------------------------------------------------------------
# the gain over the untrained model

Start = tuple[str, str, str, str]  # see comparable.Run.start


def untrained_by_start(runs: Sequence[Run]) -> dict[Start, Run]:
    """Return the untrained models; the first by name where there are several."""
    untrained: dict[Start, Run] = {}
    for run in sorted(runs, key=lambda run: run.name):
        if run.strategy == "none":
            untrained.setdefault(run.start, run)
    return untrained


def gain_of(before: Run, group: Group) -> statistics.Interval:
    """Return what a group gained over an untrained model, in points, with its 95% interval."""
    return statistics.difference_interval(answers(group), answers([before]), before.clusters)


def loss_of(run: Run) -> str:
    """The loss that a run was trained with."""
    # A linear head is fitted to features by a loss of its own.
    if run.strategy.removesuffix(SOUP) == "linear":
        return "logistic regression"
    if run.strategy.removesuffix(SOUP) == "unknown":
        return "unknown"
    # Older runs knew only one.
    return run.settings.get("loss") or "info_nce"


def gains(protocols: list[list[Run]], output: Path, missing: list[Missing]) -> str:
    """Return the gain by architecture, pretraining, strategy and loss, for each protocol."""
    parts = []
    for i, runs in enumerate(protocols):
        frame = gain_table(runs)
        if frame.empty:
            continue
        name = numbered(f"gains-{runs[0].split}", i)
        rows = without_empty([gain_row(row) for row in frame.itertuples()])
        caption = (
            "Top-1 in percent without and with fine-tuning, and the gain in points with its 95% "
            "interval; the best settings of each row"
        )
        parts.append(f"### {title(runs[0])}")
        if len(frame) > 1:
            figure = figures.gains(frame, output / f"{name}.png")
            parts.append(picture(figure, "Gain over the untrained model, by strategy and loss"))
        parts.append(table(output, name, rows, caption))
        starts = untrained_by_start(runs)
        trained = [run for run in runs if run.strategy != "none" and run.start in starts]
        parts.append(choice_note(trained, len(rows)))
    if not parts:
        what = "the gain of fine-tuning: no untrained model beside a trained one on the same images"
        missing.append(Missing(what, ablate_command("factorial", protocols[0])))
        return ""
    return paragraphs(["## What fine-tuning gains", *parts])


def gain_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return a row for each start, strategy, number of shots and loss, for `figures.gains`."""
    untrained = untrained_by_start(runs)
    best: dict[tuple, Group] = {}
    for group in grouped(runs):
        first = group[0]
        if first.strategy == "none" or first.start not in untrained:
            continue
        # All images come first: 0 stands for them.
        shots = first.settings.get("shots") or 0
        key = *first.start, first.method, shots, loss_of(first)
        if key not in best or mean(group) > mean(best[key]):
            best[key] = group
    rows = []
    for key in sorted(best):
        group = best[key]
        first = group[0]
        before = untrained[first.start]
        middle, low, high = gain_of(before, group)
        row = {"architecture": first.architecture, "pretraining": first.pretraining}
        row["model"] = first.model
        shots = first.settings.get("shots") or ""
        row |= {"strategy": first.method, "shots": shots, "loss": loss_of(first)}
        row["label"] = f"{first.method}, shots: {shots}" if shots else first.method
        row["seeds"] = len(group)
        row |= {"before": before.top1, "after": mean(group)}
        rows.append(row | {"gain": middle, "low": low, "high": high})
    return pd.DataFrame(rows)


def gain_row(row) -> dict:
    """Return the cells of a row of `gain_table`."""
    return {
        "architecture": row.architecture,
        "pretraining": row.pretraining,
        "strategy": row.strategy,
        "shots": row.shots,
        "loss": row.loss,
        "seeds": row.seeds,
        "untrained": f"{row.before:.2f}",
        "fine-tuned": f"{row.after:.2f}",
        "gain": points((row.gain, row.low, row.high)),
    }


# -----------------------------------------------------------------------------
# one factor at a time


def factors(protocols: list[list[Run]], output: Path, missing: list[Missing]) -> str:
    """Return the effect of one factor, all else equal: a table and a figure for each protocol."""
    parts = []
    varied = set()
    for i, runs in enumerate(protocols):
        rows = []  # of the table
        curves = []  # of the figure: numeric factors alone
        for factor in FACTORS | QWEN_FACTORS:
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
        caption = "Top-1 in percent; 95% over images and seeds, with one seed over images alone"
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
        is_asked = run.is_qwen or factor not in QWEN_FACTORS
        if is_asked and run.strategy != "none" and run.settings.get(factor) is not None:
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
    name = (FACTORS | QWEN_FACTORS)[factor]
    for members in sweep:
        first = members[0]
        note = sweep_note(first)
        level = first.settings[factor]
        if isinstance(level, list):  # of prompt templates
            level = level[0] if len(level) == 1 else f"{len(level)} templates"
        _, low, high = interval(members)
        rows.append(
            {
                "factor": f"{name} ({note})" if note else name,
                "architecture": first.model,
                "strategy": first.method,
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
        row = {"factor": (FACTORS | QWEN_FACTORS)[factor], "group": group, "note": sweep_note(run)}
        row["architecture"] = run.model
        row["strategy"] = run.method
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
            row = {"architecture": first.model, "strategy": first.method}
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
            parts.append(choice_note(runs, len(rows)))
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
    """Return the accuracy between start and fine-tuned weights, a panel for each configuration."""
    panels: list[tuple[str, list[list[dict]]]] = []  # of each its title, and the curve of each seed
    for group in grouped(curves):
        seeds = [rows for rows in map(curve_rows, group) if rows]
        if seeds:
            first = group[0]
            rate = f", lr {first.settings['lr']:g}" if first.settings.get("lr") else ""
            panels.append((f"{label(first)}{rate} ({first.split})", seeds))
    if not panels:
        what = "WiSE-FT: no evaluation between start and fine-tuned weights"
        missing.append(Missing(what, wise_ft_command(runs)))
        return ""
    figure = figures.wise_ft(panels, output / "wise-ft.png")
    caption = "WiSE-FT, means over seeds; band: all seeds, of one seed 95% over images"
    heading = "## Between the start and the fine-tuned weights"
    return paragraphs([heading, picture(figure, caption)])


def curve_rows(run: Run) -> list[dict]:
    """Return the metrics of a curve of WiSE-FT at each alpha, by rising alpha."""
    prefix = f"{run.split}/"
    # metrics.jsonl has other rows, too: those of the curve have all of these keys.
    needed = ("alpha", f"{prefix}top1", f"{prefix}top1_low", f"{prefix}top1_high")
    rows = []
    for row in read_lines(run.folder / "metrics.jsonl", *needed):
        rows.append({key.removeprefix(prefix): value for key, value in row.items()})
    return sorted(rows, key=lambda row: row["alpha"])


# -----------------------------------------------------------------------------
# what was forgotten


def forgotten(
    others: Sequence[Run],
    curves: Sequence[Run],
    runs: Sequence[Run],
    output: Path,
    missing: list[Missing],
) -> str:
    """Return accuracy on flowers against accuracy lost on other datasets.

    Args:
        others: evaluations on other datasets.
        curves, runs: those on flowers, of WiSE-FT and of models.
    """
    datasets: dict[tuple, list[Run]] = {}
    for run in others:
        datasets.setdefault((str(run.result.get("dataset")), run.split, run.images), []).append(run)
    tables = []
    for key in sorted(datasets):
        members = datasets[key]
        tables += forgetting_tables(key[0], members, curves, runs, missing)
    if not tables:
        what = "what was forgotten: no model evaluated on another dataset before and after"
        command = ablate_command("forgetting", by_protocol(runs)[0])
        missing.append(Missing(what, f"{command} --others DIR"))
        return ""
    frame = pd.concat(tables, ignore_index=True)
    figure = figures.forgetting(frame, output / "forgetting.png")
    # The ends of the line are models of their own, with rows of their own.
    is_end = (frame["weights"] == "between") & frame["alpha"].isin([0, 1])
    rows = [forgetting_row(row) for row in frame[~is_end].itertuples()]
    caption = (
        "Top-1 in percent on flowers and elsewhere, and what was lost elsewhere in points, before "
        "less after, with its 95% interval; means over seeds; "
        "the learning rate of each strategy that is best on flowers"
    )
    return paragraphs(
        [
            "## What was forgotten",
            "The models were fine-tuned on flowers alone. Elsewhere they are asked by prompts, as "
            "before.",
            picture(figure, "Accuracy on flowers against accuracy lost elsewhere"),
            table(output, "forgetting", rows, caption),
        ]
    )


def forgetting_tables(
    dataset: str,
    others: Sequence[Run],
    curves: Sequence[Run],
    runs: Sequence[Run],
    missing: list[Missing],
) -> list[pd.DataFrame]:
    """Return a table of one other dataset for each start, as `figures.forgetting` needs it."""
    untrained = untrained_by_start(others)
    tuned = best_elsewhere([run for run in others if not is_untrained(run)], runs, missing)
    # The prompts are named only where a model was asked by several.
    models = Counter((before.architecture, before.pretraining) for before in untrained.values())
    tables = []
    for start, before in sorted(untrained.items()):
        rows = []
        for strategy in sorted(tuned.get(start, {})):
            group, at_home = tuned[start][strategy]
            rows.append(model_point(before, group, at_home))
            rows += points_between(before, group, at_home, curves)
        if not rows:
            continue
        home = untrained_by_start(runs).get(at_home[0].start)
        if home is not None:
            rows.insert(0, model_point(before, [before], [home]))
        model = before.architecture, before.pretraining
        panel = " ".join(model).strip() + f", {dataset}"
        if models[model] > 1:
            panel += f", {templates_in_words(before.settings.get('prompt_template') or [])}"
        frame = pd.DataFrame(rows)
        tables.append(frame.assign(panel=panel, architecture=before.architecture, dataset=dataset))
    return tables


def is_untrained(run: Run) -> bool:
    return run.strategy == "none"


def best_elsewhere(
    others: Sequence[Run], runs: Sequence[Run], missing: list[Missing]
) -> dict[Start, dict[str, tuple[Group, Group]]]:
    """Return start -> strategy -> the runs of the best setting elsewhere, and on flowers.

    The best is the one of highest mean top-1 on flowers: other datasets choose nothing.
    """
    best: dict[Start, dict[str, tuple[Group, Group]]] = {}
    by_name = {run.name: run for run in runs}
    # A soup may be evaluated on several splits: the one of the runs that it is the mean of counts.
    soups = {}
    for run in runs:
        if run.settings.get("soup") and run.evaluated in by_name:
            if run.images == by_name[run.evaluated].images:
                soups[json.dumps(run.settings["soup"])] = run
    for group in grouped(others):
        first = group[0]
        if first.settings.get("soup"):
            at_home = [soups.get(json.dumps(run.settings["soup"])) for run in group]
        else:
            at_home = [by_name.get(run.evaluated) for run in group]
        # Without its accuracy on flowers, nothing is known to weigh the loss against.
        if None in at_home or len({run.images for run in at_home}) > 1:
            what = f"what {label(first)} forgot: its accuracy on flowers is not known on the same "
            missing.append(Missing(f"{what}images for each seed"))
            continue
        of_start = best.setdefault(first.start, {})
        if first.strategy in of_start and mean(at_home) <= mean(of_start[first.strategy][1]):
            continue
        of_start[first.strategy] = group, at_home
    return best


def model_point(before: Run, group: Group, at_home: Group) -> dict:
    """Return the row of a model: its accuracy on flowers, elsewhere, and what it lost there."""
    first = group[0]
    top1, top1_low, top1_high = interval(at_home)
    if first is before:
        loss = (0.0, math.nan, math.nan)
    else:
        # A loss is a gain with the other sign, so its ends change places.
        middle, low, high = gain_of(before, group)
        loss = (0 - middle, 0 - high, 0 - low)  # 0 - 0 is 0, and not -0
    strategy = first.strategy.removesuffix(SOUP)
    weights = "soup" if first.settings.get("soup") else "fine-tuned"
    return {
        "strategy": strategy,
        "weights": "untrained" if first is before else weights,
        "alpha": math.nan,
        "seeds": len(first.settings.get("soup") or group),
        **{"top1": top1, "top1_low": top1_low, "top1_high": top1_high},
        "elsewhere": mean(group),
        **dict(zip(("lost", "lost_low", "lost_high"), loss)),
    }


def points_between(before: Run, group: Group, at_home: Group, curves: Sequence[Run]) -> list[dict]:
    """Return the rows between the start and the fine-tuned weights, means over seeds.

    group, at_home: the same models elsewhere and on flowers.
    """
    # A curve of another split or prompt would not end at the point of its model.
    asked = {(run.name, *question_of(run)) for run in at_home}
    curve_of = {run.evaluated: run for run in curves if (run.evaluated, *question_of(run)) in asked}
    rows = []
    for run in group:
        if not run.settings.get("wise_ft") or run.evaluated not in curve_of:
            continue
        on_flowers = {row["alpha"]: row["top1"] for row in curve_rows(curve_of[run.evaluated])}
        for row in curve_rows(run):
            if row["alpha"] in on_flowers:
                top1 = on_flowers[row["alpha"]]
                rows.append({"alpha": row["alpha"], "top1": top1, "elsewhere": row["top1"]})
    if not rows:
        return []
    # A seed that lacks an alpha would bend the line.
    by_alpha = pd.DataFrame(rows).groupby("alpha")
    means = by_alpha.mean()[by_alpha.size() == len(group)].reset_index()
    means = means.assign(lost=before.top1 - means["elsewhere"], seeds=len(group))
    return means.assign(strategy=group[0].strategy, weights="between").to_dict("records")


def question_of(run: Run) -> tuple[str, str]:
    """What a run was asked: digest of its images, and its prompts."""
    prompts = [run.settings.get(key) for key in ("prompt_template", "prompts_digest")]
    return run.images, json.dumps(prompts)


def forgetting_row(row) -> dict:
    """Return the cells of a row of `forgetting_tables`."""
    weights = f"alpha {row.alpha:g}" if row.weights == "between" else row.weights
    lost = f"{row.lost:+.1f}"
    if not math.isnan(row.lost_low):
        lost = points((row.lost, row.lost_low, row.lost_high))
    return {
        "dataset": row.dataset,
        "architecture": row.architecture,
        "strategy": row.strategy,
        "weights": weights,
        "seeds": row.seeds,
        "flowers": f"{row.top1:.2f}",
        "elsewhere": f"{row.elsewhere:.2f}",
        "lost": lost,
    }


# -----------------------------------------------------------------------------
# probabilities


def probabilities(protocols: list[list[Run]], output: Path, missing: list[Missing]) -> str:
    """Return how far the probabilities can be believed, and what the temperature does to them."""
    parts = []
    # Older runs have not recorded it.
    measured = []
    for runs in protocols:
        measured.append([run for run in runs if f"{run.split}/nll" in run.result])
    # The main protocol, if it has been measured there.
    shown = next((runs for runs in measured if runs), [])
    if shown:
        groups = best_by_strategy([run for run in shown if not is_calibrated(run)])
        parts.append(f"### {title(shown[0])}")
        parts.append(reliability_figure(groups, output / "reliability.png"))
        caption = (
            "Negative log-likelihood in nats, Brier score (0 to 2) and expected calibration error "
            f"in percent ({calibration.BINS} bins of as many images), each with its 95% bootstrap "
            "interval over images; the lowest seed of the best settings; calibrated: after "
            "division of the logits by the temperature T, which is best on val"
        )
        # An evaluation with --calibrated is a row of its own below that of its model.
        calibrated = best_by_strategy([run for run in shown if is_calibrated(run)])
        rows = without_empty([probability_row(group) for group in [*groups, *calibrated]])
        if shown[0].split == "val" and "T" in rows[0]:
            caption += "; here T was fitted to these very images: calibrated is flattering"
        parts.append(table(output, "probabilities", rows, caption))
    else:
        what = "whether the probabilities are right: no run has recorded its NLL and ECE"
        missing.append(Missing(what, ablate_command("strategy", protocols[0])))
    parts.append(temperature_section(measured, protocols, output, missing))
    if not any(parts):
        return ""
    return paragraphs(["## Are the probabilities right?", *parts])


def probability_row(group: Group) -> dict:
    """Return the cells of the lowest seed of a group; what it has not recorded stays empty."""
    run = group[0]
    calibrated = " calibrated" if is_calibrated(run) else ""
    row = {"architecture": run.model, "strategy": run.method + calibrated}
    row["top-1"] = f"{run.top1:.2f}"
    for column, key, digits in (("NLL", "nll", 3), ("Brier", "brier", 3), ("ECE", "ece", 1)):
        row[column] = with_interval(run, key, digits)
    temperature = run.result.get("calibration_temperature")
    row["T"] = "" if temperature is None else f"{temperature:.2f}"
    # Of a run itself, whose other numbers are those before calibration.
    row["NLL calibrated"] = with_interval(run, "nll_calibrated", 3)
    return row


def is_calibrated(run: Run) -> bool:
    """Whether the probabilities of an evaluation are those after calibration."""
    return bool(run.result.get("calibrated"))


def with_interval(run: Run, key: str, digits: int) -> str:
    """A metric of a run with its interval, as far as result.json has them."""
    values = [run.result.get(f"{run.split}/{key}{end}") for end in ("", "_low", "_high")]
    if values[0] is None:
        return ""
    middle, *ends = (None if value is None else f"{value:.{digits}f}" for value in values)
    return middle if None in ends else f"{middle} [{', '.join(ends)}]"


def reliability_figure(groups: list[Group], path: Path) -> str:
    """Return the untrained model and the three best methods of up to three models."""
    panels: dict[str, dict[str, pd.DataFrame]] = {}
    for group in sorted(groups, key=mean, reverse=True):
        first = group[0]
        bins = reliability_bins(first)
        if bins is None:
            continue
        lines = panels.setdefault(first.model, {})
        # The best come first; the untrained model is always one of them.
        if first.strategy == "none" or len(lines.keys() - {"none"}) < 3:
            lines[first.method] = bins
    if not panels:
        return ""
    best = dict(list(panels.items())[:3])
    figure = figures.reliability(best, path)
    caption = (
        f"Accuracy by probability of the best class, {calibration.BINS} bins of as many images; "
        "on the dotted line a probability is what it says, below it the model is too sure"
    )
    return picture(figure, caption)


def reliability_bins(run: Run) -> pd.DataFrame | None:
    """Return the bins of a run, as `figures.reliability` needs them; None without scores."""
    predictions = read_predictions(run.folder)
    if "score1" not in predictions:
        return None
    scores = pd.to_numeric(predictions["score1"], errors="coerce").to_numpy()  # (N,)
    if np.isnan(scores).any():
        return None
    right = predictions["label"] == predictions["top1"]
    percent_of = pd.DataFrame({"probability": 100 * scores, "accuracy": 100.0 * right})
    # The bins of the ECE, in which images of equal probability are together.
    return percent_of.groupby(calibration.assign_bins(scores)).mean()


def temperature_section(
    measured: list[list[Run]],
    protocols: list[list[Run]],
    output: Path,
    missing: list[Missing],
) -> str:
    """Return NLL, ECE and top-1 by the temperature of the loss, all else equal.

    Of the first protocol that varies it. measured: the runs of each protocol with NLL and ECE.
    """
    for runs in measured:
        by_temperature = sweeps(runs, "temperature")
        if not by_temperature:
            continue
        table_rows = []
        curve_rows = []
        for i, sweep in enumerate(by_temperature):
            for members in sweep:
                table_rows.append(temperature_row(members))
                curve_rows += [temperature_point(run, i) for run in members]
        figure = figures.temperatures(pd.DataFrame(curve_rows), output / "temperatures.png")
        caption = "What the temperature of the loss does to the probabilities; means over seeds"
        return paragraphs(
            [
                f"### The temperature of the loss: {title(runs[0])}",
                picture(figure, "NLL, ECE and top-1 by temperature; bands: all seeds"),
                table(output, "temperatures", table_rows, caption),
            ]
        )
    what = "what the temperature of the loss does to the probabilities: no runs that differ in it"
    missing.append(Missing(what, ablate_command("temperature", protocols[0])))
    return ""


def temperature_row(members: Group) -> dict:
    """Return the cells of one temperature."""
    first = members[0]
    note = sweep_note(first)
    temperature = f"{first.settings['temperature']:g}"
    return {
        "architecture": first.model,
        "strategy": first.method,
        "temperature": f"{temperature} ({note})" if note else temperature,
        "seeds": len(members),
        "NLL": f"{mean(members, 'nll'):.3f}",
        "ECE": f"{mean(members, 'ece'):.1f}",
        "top-1": f"{mean(members):.2f}",
    }


def temperature_point(run: Run, group: int) -> dict:
    """Return the row of a run, as `figures.temperatures` needs it."""
    return {
        "group": group,
        "architecture": run.model,
        "strategy": run.method,
        "learned": bool(sweep_note(run)),
        "temperature": float(run.settings["temperature"]),
        "top1": run.top1,
        "nll": run.result[f"{run.split}/nll"],
        "ece": run.result.get(f"{run.split}/ece", math.nan),
    }


# -----------------------------------------------------------------------------
# a closer look at the main protocol


def closer_look(runs: Sequence[Run], output: Path, missing: list[Missing]) -> str:
    """Return cost, learning curves, classes and confusions of the main protocol."""
    groups = best_by_strategy(runs)
    best = int(np.argmax([mean(group) for group in groups]))
    # Classes without images in this split have no accuracy.
    names = sorted(set(runs[0].labels.tolist()))
    accuracy = np.array([class_accuracy(group, names) for group in groups])  # (models, classes)
    parts = [f"## A closer look: {title(runs[0])}", choice_note(runs, len(groups))]
    if len(groups) > 1:
        parts.append(cost_figure(groups, output / "cost.png"))
        parts.append(trained_figure(groups, runs, output / "trained.png"))
    parts.append(learning_figure(groups, output / "learning.png", missing))
    before = untrained_by_start(runs).get(groups[best][0].start)
    parts.append(classes_figure(before, groups[best], names, output / "classes.png", missing))
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
                "architecture": first.model,
                "strategy": first.method,
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


def trained_figure(groups: list[Group], runs: Sequence[Run], path: Path) -> str:
    """Return the gain over the untrained model by the number of trained parameters.

    runs: all of the protocol, as the groups have each untrained model with its best prompt alone.
    """
    untrained = untrained_by_start(runs)
    rows = []
    for group in groups:
        first = group[0]
        before = untrained.get(first.start)
        parameters = trained_parameters(first)
        # An untrained model has none, and a log axis has no 0.
        if before is None or first.strategy == "none" or not parameters:
            continue
        middle, low, high = gain_of(before, group)
        row = {"architecture": first.model, "strategy": first.method}
        rows.append(row | {"parameters": parameters, "gain": middle, "low": low, "high": high})
    if not rows:
        return ""
    figure = figures.trained_parameters(pd.DataFrame(rows), path)
    return picture(figure, "Gain over the untrained model against the parameters that were trained")


def trained_parameters(run: Run) -> int | None:
    """The number of parameters that a run trained; None if it has not recorded it."""
    # trainable_image, trainable_text, ...: the parts of the model are counted apart.
    counts = [count for key, count in run.result.items() if key.startswith("trainable_")]
    return sum(counts) if counts else None


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
    return curve.assign(architecture=run.model, strategy=run.method, kind=loss_of(run))


def classes_figure(
    before: Run | None,
    best: Group,
    names: Sequence[str],
    path: Path,
    missing: list[Missing],
) -> str:
    """Return the change of each class from the untrained model to the best trained one.

    before: the same model untrained, with the same prompts, so that training is all that differs.
    """
    if before is None or best[0].strategy == "none":
        what = (
            "the change of each class: "
            "no untrained model beside the best trained one on the same images"
        )
        missing.append(Missing(what))
        return ""
    accuracy = {"before": class_accuracy([before], names), "after": class_accuracy(best, names)}
    labels = label(before), label(best[0])
    figure = figures.classes(pd.DataFrame({"name": names} | accuracy), labels, path)
    return picture(figure, f"From {labels[0]} to {labels[1]}, means over seeds")


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
    corrected[upper] = holm(p_values[upper])
    return counts, np.minimum(corrected, corrected.T)


def models_to_compare(groups: list[Group], best: int) -> list[int]:
    """Return each model untrained and at its best strategy, the best of all first."""
    chosen: dict[str, int] = {}
    # The best of all comes last, so that it is chosen where others are as good.
    for i in sorted(range(len(groups)), key=lambda i: (i == best, mean(groups[i]))):
        if groups[i][0].strategy != "none":
            chosen[groups[i][0].model] = i
    models = []
    for i, group in enumerate(groups):
        if group[0].strategy == "none" or chosen[group[0].model] == i:
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
        of_class = 100 * mistakes[true, predicted] / images[true]
        rows.append({"true": true, "predicted": predicted, "percent": of_class})
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
        lines.append(f"- {run.name}: {run.model}, {training}; {run.split} top-1 {run.top1:.2f}%")
    if not lines:
        return ""
    return "\n".join(["## Runs that others started from\n", *lines])


if __name__ == "__main__":
    main(args)
