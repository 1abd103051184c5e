"""The CLIP architectures side by side: parameters, FLOPs, shapes; on request, speed and accuracy.

    python test_models.py                              # seconds: no weights, no download
    python test_models.py --architecture all --architecture runs/NAME --csv figures/models.csv
    python test_models.py --measure                    # also images/s and peak memory here
    python test_models.py --results runs/results.jsonl # also accuracy against size and cost

Models are built on torch's meta device, which knows shapes and holds no numbers. Prints three
tables, sorted by --sort, and saves figures/models.png (and figures/accuracy.png). This is a tool,
not a test: the tests are in tests/.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from flowers import UserError, add_device_arguments, command, typed_flags
from flowers.choices import SHAPES, STRATEGIES, add_figure_arguments
from flowers.files import user_file, user_path
from flowers.settings import USED_BY


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--architecture",
        type=user_path,
        action="append",
        help=f"one of {', '.join(SHAPES)}, 'all' of them, or the path of a state dict or run; "
        "repeatable (default: all)",
    )
    parser.add_argument(
        "--sort",
        choices=["parameters", "gflops_image", "images_per_s", "architecture"],
        default="parameters",
        help="order of the rows (default: %(default)s)",
    )
    parser.add_argument(
        "--csv",
        type=user_file,
        help="also write every column to this file, one row an architecture",
    )
    # --output, --pdf, --show
    add_figure_arguments(parser)
    add_strategy_arguments(parser)
    # speed and accuracy
    group = parser.add_argument_group("speed and accuracy")
    group.add_argument(
        "--measure",
        action="store_true",
        help="encode random images with random weights here: images/s, peak memory",
    )
    group.add_argument(
        "--batch_size",
        type=int,
        help="images at a time for --measure (default: 64 on a GPU, 4 on a CPU)",
    )
    group.add_argument(
        "--results",
        type=user_file,
        help="results.jsonl of finished runs: draw their test accuracy against size and cost",
    )
    add_device_arguments(group)
    # what `measure_apart` starts
    group.add_argument("--measure_one", help=argparse.SUPPRESS)
    return parser


def add_strategy_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --strategy, and the options of strategies that decide how much is trained."""
    group = parser.add_argument_group("trainable parameters")
    group.add_argument(
        "--strategy",
        action="append",
        choices=STRATEGIES,
        help="count what these train; repeatable (default: all)",
    )
    group.add_argument(
        "--blocks", type=int, default=2, help="blocks of last_blocks (default: %(default)s)"
    )
    group.add_argument("--rank", type=int, default=8, help="of lora (default: %(default)s)")
    group.add_argument(
        "--context_tokens", type=int, default=4, help="of prompt (default: %(default)s)"
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line. Raises UserError for flags that do not go together."""
    parser = build_parser()
    args = parser.parse_args()
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError("--batch_size must be at least 1")
    check_parts(typed_flags(parser))
    if args.csv and args.csv.is_dir():
        raise UserError(f"--csv {args.csv}: it is a folder: give the name of a file")
    if args.results and not args.results.is_file():
        raise UserError(
            f"no results at {args.results}: train.py and baseline_eval.py write runs/results.jsonl"
        )
    if args.sort == "images_per_s" and not args.measure:
        raise UserError("--sort images_per_s needs --measure")
    args.strategy = args.strategy or list(STRATEGIES)
    args.architecture = resolve_architectures(args.architecture)
    return args


def check_parts(typed: Mapping[str, object]) -> None:
    """Raise UserError for a flag that was typed, and would change nothing."""
    if "measure" not in typed and "measure_one" not in typed:
        for flag in ("batch_size", "device", "precision"):
            if flag in typed:
                raise UserError(f"--{flag} is of --measure: give both, or leave it out")
    for flag in ("blocks", "rank", "context_tokens"):
        (strategy,) = USED_BY[flag]
        if flag in typed and strategy not in typed.get("strategy", STRATEGIES):
            raise UserError(f"--{flag} is of --strategy {strategy}, which is not asked for")


def resolve_architectures(names: list[str] | None) -> list[str]:
    """The architectures to describe, each once: 'all', the default, stands for all of them."""
    resolved = []
    for name in names or ["all"]:
        resolved += SHAPES if name == "all" else [name]
    return list(dict.fromkeys(resolved))


if __name__ == "__main__":
    args = command(parse_arguments)()  # before torch is imported: see flowers.command

import numpy as np
import pandas as pd
import torch
from matplotlib.ticker import LogLocator, NullLocator
from tabulate import tabulate
from tqdm import tqdm

from flowers import devices, figures, files
from flowers.figures import PALETTE, plt
from flowers.models import CLIP, CONTEXT_LENGTH, build, count_flops, encode_images, towers
from flowers.strategies import count_trainable, prepare
from flowers.weights import load_model

# The columns of the first two tables and of --csv.
COST = [
    "parameters",
    "image_parameters",
    "text_parameters",
    "gflops_image",
    "gflops_text",
    "file_mb",
    "images_per_s",
    "memory_mb",
]
SHAPE = [
    "family",
    "resolution",
    "patch",
    "image_layers",
    "image_width",
    "text_layers",
    "text_width",
    "embedding",
]
N_CLASSES = 102  # rows of the head that `linear` trains
SECONDS = 2  # how long --measure encodes, and at least three batches

# A series of accuracies: architecture -> test top-1 (%) of each of its runs.
Series = dict[str, list[float]]


# -----------------------------------------------------------------------------
# what the shape alone decides


def describe(architecture: str, strategies: list[str], **options: int) -> dict:
    """Count a model on the meta device: a row of COST, SHAPE and trainable_<strategy>.

    gflops_*: 10^9 operations for one image, or one text of 77 tokens; a multiply-add is two.
    file_mb: 10^6 bytes of the fp32 model.pt of train.py; OpenAI's own files are fp16, half of it.
    resolution, patch: pixels. image_layers: blocks of a ViT, bottlenecks by stage of a ResNet.
    options: those of `strategies.prepare` (blocks, rank, context_tokens).
    """
    if architecture in SHAPES:
        with torch.device("meta"):
            model = build(architecture)
    else:
        # Its shape is known once it is read.
        model = load_model(architecture).to("meta")

    parameters = {
        tower: sum(weight.numel() for weight in weights) for tower, weights in towers(model).items()
    }
    side = model.visual.input_resolution
    image = torch.empty(1, 3, side, side, device="meta")
    tokens = torch.zeros(1, CONTEXT_LENGTH, dtype=torch.long, device="meta")
    # Buffers are part of the file, though not of the parameters.
    file_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    text_width, embedding = model.text_projection.shape
    row = {
        "architecture": architecture,
        "parameters": sum(parameters.values()),
        "image_parameters": parameters["image"],
        "text_parameters": parameters["text"],
        "gflops_image": count_flops(lambda: model.encode_image(image)) / 1e9,
        "gflops_text": count_flops(lambda: model.encode_text(tokens)) / 1e9,
        "file_mb": file_bytes / 1e6,
        "resolution": side,
        **_image_tower_shape(model),
        "text_layers": len(model.transformer.resblocks),
        "text_width": text_width,
        "embedding": embedding,
    }
    # lora and prompt come last: they add parameters, which the others would train too.
    for strategy in sorted(strategies, key=lambda name: name in ("lora", "prompt")):
        prepare(model, strategy, **options)
        trained = count_trainable(model, strategy, N_CLASSES)
        row[f"trainable_{strategy}"] = sum(trained.values())
    return row


def _image_tower_shape(model: CLIP) -> dict:
    visual = model.visual
    if hasattr(visual, "transformer"):
        return {
            "family": "ViT",
            "patch": visual.conv1.kernel_size[0],
            "image_layers": str(len(visual.transformer.resblocks)),
            "image_width": visual.conv1.out_channels,
        }
    stages = [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
    return {
        "family": "ResNet",
        "patch": "",
        "image_layers": "+".join(str(len(stage)) for stage in stages),
        "image_width": visual.layer1[0].conv1.out_channels,
    }


# -----------------------------------------------------------------------------
# speed


def measure(architecture: str, batch_size: int, device: torch.device) -> dict:
    """Images a second through the image tower, and the most memory held (MB), in this process.

    On a CPU, memory is limited to what is free now: a model that does not fit raises an error
    instead of ending other programs.
    """
    if device.type == "cpu" and sys.platform == "linux":
        limit_memory()
    # Random weights are as fast as trained ones, and need no download.
    with device:
        model = build(architecture) if architecture in SHAPES else load_model(architecture, device)
    model.requires_grad_(False)

    side = model.visual.input_resolution
    images = torch.randn(batch_size, 3, side, side, device=device)
    encode_images(model, images)  # the first batch also sets things up
    seconds = []
    while sum(seconds) < SECONDS or len(seconds) < 3:
        start = time.perf_counter()
        encode_images(model, images).sum().item()  # reading a number waits for the device
        seconds.append(time.perf_counter() - start)
    return {
        "images_per_s": batch_size / statistics.median(seconds),
        "memory_mb": devices.peak_memory_mb(device),
    }


def limit_memory() -> None:
    """Have Linux refuse this process more memory than is free now."""
    with contextlib.suppress(ImportError):
        import resource  # here, as Windows has none

        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
        free_kib = int(meminfo.split("MemAvailable:")[1].split()[0])
        resource.setrlimit(resource.RLIMIT_DATA, (free_kib * 1024, free_kib * 1024))


def measure_apart(architecture: str, args: argparse.Namespace) -> dict:
    """`measure` in a process of its own, whose peak memory is that of this model alone.

    Empty, with a line on stderr, where the model does not fit.
    """
    flags = ["--measure_one", architecture, "--batch_size", str(args.batch_size)]
    flags += ["--device", args.device, "--precision", args.precision]
    outcome = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True)
    if outcome.returncode:
        lines = outcome.stderr.strip().splitlines() or [f"ended with {outcome.returncode}"]
        print(f"{architecture} could not be measured: {lines[-1]}", file=sys.stderr)
        return {}
    return json.loads(outcome.stdout)


# -----------------------------------------------------------------------------
# tables and figures


def format_table(rows: list[dict], columns: list[str]) -> str:
    """The columns as text, names to the left, numbers to the right. Empty columns are left out."""
    columns = [column for column in columns if any(column in row for row in rows)]
    titles = [column.removeprefix("trainable_") for column in columns]
    lines = [["architecture", *titles]]
    for row in rows:
        cells = [_format_value(row.get(column, "")) for column in columns]
        lines.append([row["architecture"], *cells])
    # The titles are a line like the others: as headers, tabulate would give them wider columns.
    alignment = ["left"] + ["right"] * len(columns)
    return tabulate(lines, tablefmt="plain", disable_numparse=True, colalign=alignment)


def _format_value(value: str | int | float) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.1f}" if value >= 10 else f"{value:,.3f}"


def draw_models(rows: list[dict], path: Path, pdf: bool) -> Path:
    """Bars: parameters by tower, GFLOPs an image, and images/s where measured.

    Their numbers stand at their ends, as they span two orders of magnitude.
    """
    table = pd.DataFrame(rows).set_index("architecture")
    # In millions. The temperature, a single parameter, is counted to the text tower.
    image_tower = table["image_parameters"] / 1e6
    all_parameters = table["parameters"] / 1e6
    parameters = pd.DataFrame(
        {"image tower": image_tower, "text tower": all_parameters - image_tower}
    )
    panels = {"Parameters (millions)": parameters, "GFLOPs per image": table[["gflops_image"]]}
    if "images_per_s" in table:
        panels["Images per second"] = table[["images_per_s"]]

    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(2.6 * len(panels) + 1.3, 0.27 * len(rows) + 1),
        sharey=True,
        layout="constrained",
    )
    for axis, (title, bars) in zip(axes, panels.items()):
        colours = [PALETTE[0], PALETTE[4]][: bars.shape[1]]
        # A model that did not fit has no bar, and says so in its label.
        bars.fillna(0).plot.barh(stacked=True, width=0.8, color=colours, legend=False, ax=axis)
        totals = bars.sum(axis=1, skipna=False)
        labels = [_format_bar(total) for total in totals]
        axis.bar_label(axis.containers[-1], labels, padding=3, fontsize=8)
        axis.set(xlim=(0, 1.22 * totals.max()), ylabel="")
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()  # the first row of the table on top; the other panels share it
    legend = axes[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figures.save(figure, path, pdf)


def _format_bar(value: float) -> str:
    if np.isnan(value):
        return "not measured"
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


# -----------------------------------------------------------------------------
# accuracy


def read_accuracies(path: Path, architectures: list[str]) -> dict[str, Series]:
    """Test top-1 (%) of the finished runs in results.jsonl, by series and architecture.

    A series is zero-shot or a strategy, and what else sets a run apart: split, classes, shots,
    dataset. Raises UserError if there is none.
    """
    # A run that is there twice counts once, as it was last.
    runs = {}
    for row in files.read_lines(path, "name", "test/top1"):
        if row.get("architecture") in architectures:
            runs[row["name"]] = row
    datasets = {row.get("data_root") for row in runs.values()}

    series: dict[str, Series] = {}
    for row in runs.values():
        name = _series_of(row, several_datasets=len(datasets) > 1)
        accuracies = series.setdefault(name, {}).setdefault(row["architecture"], [])
        accuracies.append(row["test/top1"])
    if not series:
        raise UserError(
            f"{path} has no test result of {', '.join(architectures)}: "
            "evaluate some with baseline_eval.py or train.py"
        )
    return dict(sorted(series.items()))


def _series_of(row: dict, several_datasets: bool) -> str:
    """What a run is compared as, such as `lora, official split, 16 shots`."""
    # Without epochs nothing is trained, except the head of `linear`, which has none.
    never_trained = row.get("epochs") == 0 and row.get("strategy") != "linear"
    is_zero_shot = row.get("job") == "eval" or never_trained
    parts = ["zero-shot" if is_zero_shot else row.get("strategy", "full")]
    if row.get("soup"):
        parts = ["soup"]
    if row.get("splits", "swapped") != "swapped":
        parts.append(f"{row.get('splits')} split")
    if row.get("shots"):
        parts.append(f"{row.get('shots')} shots")
    # `classes` are those of the training.
    if row.get("classes") not in (None, "all") and not is_zero_shot:
        parts.append(f"{row.get('classes')} classes")
    if several_datasets:
        parts.append(Path(str(row.get("data_root"))).name)
    return ", ".join(parts)


def draw_accuracies(rows: list[dict], series: dict[str, Series], path: Path, pdf: bool) -> Path:
    """Mean top-1 of each architecture's runs against parameters and against GFLOPs.

    A small dot is one run, a line joins the series of an architecture.
    """
    colours = dict(zip(series, PALETTE * len(series)))
    sizes = {
        "parameters (millions)": [row["parameters"] / 1e6 for row in rows],
        "GFLOPs per image": [row["gflops_image"] for row in rows],
    }
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 4), sharey=True, layout="constrained")
    points_of = {}
    for axis, (label, xs) in zip(axes, sizes.items()):
        points_of[axis] = []
        for row, x in zip(rows, xs):
            points_of[axis] += _draw_architecture(axis, row, x, series, colours)
        axis.set(xscale="log", xlabel=label)
        axis.margins(0.12, 0.17)  # room for the names
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test top-1 (%)")

    # Lines without points, for the legend.
    for name, colour in colours.items():
        axes[1].plot([], [], color=colour, linewidth=4, label=name)
    for family, marker in (("ResNet", "o"), ("ViT", "s")):
        axes[1].plot([], [], marker, color="grey", label=family)
    legend = axes[1].get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.suptitle("Accuracy of the architectures against their size and cost", fontsize=11)
    # Last: the names find their places in the finished figure.
    for axis, points in points_of.items():
        figures.label_points(axis, points)
    return figures.save(figure, path, pdf)


def _draw_architecture(
    axis: plt.Axes, row: dict, x: float, series: dict[str, Series], colours: dict[str, str]
) -> list[tuple[float, float, str]]:
    """Draw the accuracies of one architecture at x; return its points with their labels."""
    architecture = row["architecture"]
    marker = "s" if row["family"] == "ViT" else "o"
    means = []
    for name, accuracies_of in series.items():
        if architecture in accuracies_of:
            accuracies = accuracies_of[architecture]
            mean = np.mean(accuracies)
            axis.plot(x, mean, marker, color=colours[name], markersize=6)
            dots = {"color": colours[name], "markersize": 3, "alpha": 0.6}
            axis.plot([x] * len(accuracies), accuracies, ".", **dots)
            means.append(mean)
    means.sort()
    axis.plot([x] * len(means), means, color="#cccccc", linewidth=0.8, zorder=0)

    # The name stands at the best series; the other points are obstacles.
    label = architecture if architecture in SHAPES else Path(architecture).name
    return [(x, mean, label if mean == means[-1] else "") for mean in means]


@command
def main(args: argparse.Namespace):
    if args.measure_one:
        device = devices.choose_device(args.device)
        devices.set_precision(args.precision, device)
        print(json.dumps(measure(args.measure_one, args.batch_size, device)))
        return

    # -----------------------------------------------------------------------------
    # count, and measure

    architectures = args.architecture
    options = {"blocks": args.blocks, "rank": args.rank, "context_tokens": args.context_tokens}
    rows = [describe(architecture, args.strategy, **options) for architecture in architectures]
    if args.measure:
        # 0 stands for the default, as no flag does.
        on_cpu = devices.choose_device(args.device).type == "cpu"
        args.batch_size = args.batch_size or (4 if on_cpu else 64)
        for row in tqdm(rows, desc="measuring", leave=False):
            row |= measure_apart(row["architecture"], args)
    rows.sort(key=lambda row: row.get(args.sort, 0))

    # -----------------------------------------------------------------------------
    # tables

    trainable = [f"trainable_{strategy}" for strategy in args.strategy]
    print("\nSize and cost")
    print(format_table(rows, COST))
    print("\nShape")
    print(format_table(rows, SHAPE))
    print("\nParameters that each --strategy trains")
    print(format_table(rows, trainable))

    # -----------------------------------------------------------------------------
    # files

    pictures = [draw_models(rows, args.output / "models.png", args.pdf)]
    if args.results:
        series = read_accuracies(args.results, architectures)
        pictures.append(draw_accuracies(rows, series, args.output / "accuracy.png", args.pdf))
    saved = list(pictures)
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        columns = ["architecture", *COST, *SHAPE, *trainable]
        table = [{column: row.get(column, "") for column in columns} for row in rows]
        files.write_csv(args.csv, table)
        saved.append(args.csv)
    print("\nsaved " + ", ".join(map(str, saved)))
    if args.show:
        figures.show(pictures)


if __name__ == "__main__":
    main(args)
