"""The CLIP architectures side by side: parameters, FLOPs and shapes of all nine without a download, speed and accuracy where asked.

    python test_models.py                                        # seconds: built on torch's meta device, no weights anywhere
    python test_models.py --architecture all --architecture runs/NAME --csv figures/models.csv
    python test_models.py --measure                              # also images/s and peak memory here, with random weights
    python test_models.py --results runs/results.jsonl           # also accuracy against parameters and against GFLOPs

Prints three tables, sorted by --sort, and saves figures/models.png (and figures/accuracy.png). A tool, not a test: the tests are in tests/.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullLocator
from tqdm import tqdm

from flowers import UserError, command, devices, figures, files
from flowers.models import CONTEXT, SHAPES, build, count_flops, encode_images, towers
from flowers.strategies import STRATEGIES, count_trainable, prepare
from flowers.weights import load_model

plt = figures.plt
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
CLASSES = 102  # rows of the head that `linear` trains


def describe(architecture: str, strategies: list[str], **options: int) -> dict:
    """What the shape alone decides, counted on the meta device: a row of COST, SHAPE and trainable_<strategy>.

    gflops_*: 10^9 operations for one image, one text of 77 tokens; a multiply-add is two. file_mb: of the fp32 model.pt that train.py
    writes (OpenAI's own files are fp16, half of it). resolution and patch in pixels; image_layers of a ResNet: bottlenecks by stage.
    """
    if architecture in SHAPES:
        with torch.device("meta"):
            model = build(architecture)
    else:
        model = load_model(architecture).to("meta")
    side, counts = (
        model.visual.input_resolution,
        {k: sum(p.numel() for p in v) for k, v in towers(model).items()},
    )
    vit = hasattr(model.visual, "transformer")
    stages = [] if vit else [len(getattr(model.visual, f"layer{i}")) for i in (1, 2, 3, 4)]
    row = {
        "architecture": architecture,
        "family": "ViT" if vit else "ResNet",
        "parameters": sum(counts.values()),
        "image_parameters": counts["image"],
        "text_parameters": counts["text"],
        "gflops_image": count_flops(
            lambda: model.encode_image(torch.empty(1, 3, side, side, device="meta"))
        )
        / 1e9,
        "gflops_text": count_flops(
            lambda: model.encode_text(torch.zeros(1, CONTEXT, dtype=torch.long, device="meta"))
        )
        / 1e9,
        "image_layers": str(len(model.visual.transformer.resblocks))
        if vit
        else "+".join(map(str, stages)),
        "image_width": model.visual.conv1.out_channels
        if vit
        else model.visual.layer1[0].conv1.out_channels,
        "patch": model.visual.conv1.kernel_size[0] if vit else "",
        "resolution": side,
        "embedding": model.text_projection.shape[1],
        "text_layers": len(model.transformer.resblocks),
        "text_width": model.text_projection.shape[0],
        "file_mb": sum(t.nbytes for t in model.state_dict().values()) / 1e6,
    }
    for strategy in sorted(
        strategies, key=lambda s: s in ("lora", "prompt")
    ):  # last those that add parameters, which the others would train too
        prepare(model, strategy, **options)
        row[f"trainable_{strategy}"] = sum(count_trainable(model, strategy, CLASSES).values())
    return row


def measure(architecture: str, batch_size: int) -> dict:
    """Images a second through the image tower and the most memory held (MB), with random weights, in this process and on this device.

    On a CPU, memory is limited to what is free now: a model that does not fit raises an error instead of ending other programs.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and sys.platform == "linux":
        free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (free, free))
    with device:
        model = (
            build(architecture) if architecture in SHAPES else load_model(architecture, device)
        ).requires_grad_(False)
    side, seconds = model.visual.input_resolution, []
    images = torch.randn(batch_size, 3, side, side, device=device)
    encode_images(model, images)
    while sum(seconds) < 2 or len(seconds) < 3:
        start = time.perf_counter()
        encode_images(model, images).sum().item()  # reading a number waits for the device
        seconds.append(time.perf_counter() - start)
    return {
        "images_per_s": batch_size / statistics.median(seconds),
        "memory_mb": devices.peak_memory_mb(),
    }


def measure_apart(architecture: str, batch_size: int) -> dict:
    """`measure` in a process of its own, whose peak is that of this model alone; nothing where the model does not fit."""
    outcome = subprocess.run(
        [sys.executable, __file__, "--measure_one", architecture, "--batch_size", str(batch_size)],
        capture_output=True,
        text=True,
    )
    if outcome.returncode:
        said = outcome.stderr.strip().splitlines() or [f"ended with {outcome.returncode}"]
        print(f"{architecture} could not be measured: {said[-1]}", file=sys.stderr)
        return {}
    return json.loads(outcome.stdout)


def table(rows: list[dict], keys: list[str]) -> str:
    """The columns `keys` as text, names to the left, numbers to the right; a column that no row has is left out."""

    def cell(value) -> str:
        return (
            value
            if isinstance(value, str)
            else f"{value:,.{1 if value >= 10 else 3}f}"
            if isinstance(value, float)
            else f"{value:,}"
        )

    keys = ["architecture", *(key for key in keys if any(key in row for row in rows))]
    columns = [
        [key.removeprefix("trainable_"), *(cell(row.get(key, "")) for row in rows)] for key in keys
    ]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(line[1:], widths[1:])])
        for line in zip(*columns)
    )


def draw_models(rows: list[dict], path: Path, pdf: bool) -> Path:
    """Bars: parameters by tower, GFLOPs an image, and images/s where measured; numbers at their ends, since they span two orders of magnitude."""
    panels = ["parameters", "gflops_image"] + ["images_per_s"] * any(
        "images_per_s" in row for row in rows
    )
    titles = {
        "parameters": "Parameters (millions)",
        "gflops_image": "GFLOPs per image",
        "images_per_s": "Images per second",
    }
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(2.6 * len(panels) + 1.3, 0.27 * len(rows) + 1),
        sharey=True,
        layout="constrained",
    )
    y = np.arange(len(rows))[::-1]
    for axis, key in zip(axes, panels):
        values = np.array([row.get(key, np.nan) for row in rows]) / (
            1e6 if key == "parameters" else 1
        )
        if key == "parameters":
            image = np.array([row["image_parameters"] for row in rows]) / 1e6
            axis.barh(y, image, color=figures.PALETTE[0], label="image tower")
            axis.barh(y, values - image, left=image, color=figures.PALETTE[4], label="text tower")
        else:
            axis.barh(y, values, color=figures.PALETTE[0])
        for at, value in zip(y, values):
            axis.annotate(
                "not measured"
                if np.isnan(value)
                else f"{value:,.0f}"
                if value >= 10
                else f"{value:.2g}",
                (np.nan_to_num(value), at),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axis.set(xlim=(0, 1.22 * np.nanmax(values)))
        axis.set_title(titles[key], fontsize=10)
        axis.set_yticks(y, [row["architecture"] for row in rows])
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figures.save(figure, path, pdf)


def read_accuracies(path: Path, architectures: list[str]) -> dict[str, dict[str, list[float]]]:
    """Test top-1 (%) of the finished runs in results.jsonl: series -> architecture -> one value a run.

    A series is zero-shot or a strategy, and what else sets a run apart: split, classes, shots, dataset. Raises UserError if there is none.
    """
    rows = {
        row["name"]: row
        for row in files.read_lines(path, "name", "test/top1")
        if row.get("architecture") in architectures
    }.values()
    series: dict[str, dict] = {}
    roots = {row.get("data_root") for row in rows}
    for row in rows:
        untrained = row.get("job") == "eval" or (
            row.get("epochs") == 0 and row.get("strategy") != "linear"
        )
        parts = ["zero-shot" if untrained else row.get("strategy", "full")]
        parts += [f"{row.get('splits')} split"] * (row.get("splits", "swapped") != "swapped") + [
            f"{row.get('shots')} shots"
        ] * bool(row.get("shots"))
        parts += [f"{row.get('classes')} classes"] * (
            row.get("classes") not in (None, "all") and not untrained
        )
        parts += [Path(str(row.get("data_root"))).name] * (len(roots) > 1)
        series.setdefault(", ".join(parts), {}).setdefault(row["architecture"], []).append(
            row["test/top1"]
        )
    if not series:
        raise UserError(
            f"{path} has no test result of {', '.join(architectures)}: evaluate some with baseline_eval.py or train.py"
        )
    return dict(sorted(series.items()))


def draw_accuracies(
    rows: list[dict], series: dict[str, dict[str, list[float]]], path: Path, pdf: bool
) -> Path:
    """Mean top-1 of an architecture's runs against parameters and against GFLOPs; a dot for each run where there are several."""
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 4), sharey=True, layout="constrained")
    labelled = {}
    for axis, key, label in zip(
        axes, ("parameters", "gflops_image"), ("parameters (millions)", "GFLOPs per image")
    ):
        points = labelled.setdefault(axis, [])
        for row in rows:
            x, marker = (
                row[key] / (1e6 if key == "parameters" else 1),
                "s" if row["family"] == "ViT" else "o",
            )
            found = [
                (colour, values[row["architecture"]])
                for colour, values in zip(figures.PALETTE * len(series), series.values())
                if row["architecture"] in values
            ]
            for colour, values in found:
                axis.plot(x, np.mean(values), marker, color=colour, markersize=6)
                axis.plot([x] * len(values), values, ".", color=colour, markersize=3, alpha=0.6)
            means = sorted(np.mean(values) for _, values in found)
            axis.plot([x] * len(means), means, color="#cccccc", linewidth=0.8, zorder=0)
            name = (
                row["architecture"]
                if row["architecture"] in SHAPES
                else Path(row["architecture"]).name
            )
            points += [(x, mean, name if mean == means[-1] else "") for mean in means]
        axis.set(xscale="log", xlabel=label)
        axis.margins(0.12, 0.17)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.spines[["top", "right"]].set_visible(False)
    for name, colour in zip(series, figures.PALETTE * len(series)):
        axis.plot([], [], color=colour, linewidth=4, label=name)
    for family, marker in (("ResNet", "o"), ("ViT", "s")):
        axis.plot([], [], marker, color="grey", label=family)
    axes[0].set_ylabel("test top-1 (%)")
    figure.legend(
        *axis.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize=8,
    )
    figure.suptitle("Accuracy of the architectures against their size and cost", fontsize=11)
    for axis, points in labelled.items():
        figures.label_points(axis, points)
    return figures.save(figure, path, pdf)


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--architecture",
        action="append",
        help=f"one of {', '.join(SHAPES)}, 'all' of them, or the path of a state dict or run; repeatable (default: all)",
    )
    parser.add_argument(
        "--sort",
        choices=["parameters", "gflops_image", "images_per_s", "architecture"],
        default="parameters",
        help="order of the rows (default: %(default)s)",
    )
    parser.add_argument(
        "--csv", type=Path, help="also write every column to this file, one row an architecture"
    )
    figures.add_figure_arguments(parser)
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
        type=Path,
        help="results.jsonl of finished runs: draw their test accuracy against size and cost",
    )
    parser.add_argument("--measure_one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.batch_size = args.batch_size or (64 if torch.cuda.is_available() else 4)
    if args.batch_size < 1:
        raise UserError("--batch_size must be at least 1")
    if args.measure_one:
        print(json.dumps(measure(args.measure_one, args.batch_size)))
        return
    if args.results and not args.results.is_file():
        raise UserError(
            f"no results at {args.results}: train.py and baseline_eval.py write runs/results.jsonl"
        )
    if args.sort == "images_per_s" and not args.measure:
        raise UserError("--sort images_per_s needs --measure")

    names = list(
        dict.fromkeys(
            n for a in args.architecture or ["all"] for n in (SHAPES if a == "all" else [a])
        )
    )
    strategies = args.strategy or list(STRATEGIES)
    rows = [
        describe(
            name, strategies, blocks=args.blocks, rank=args.rank, context_tokens=args.context_tokens
        )
        for name in names
    ]
    if args.measure:
        rows = [
            row | measure_apart(row["architecture"], args.batch_size)
            for row in tqdm(rows, desc="measuring", leave=False)
        ]
    rows.sort(key=lambda row: row.get(args.sort, 0))
    trained = [f"trainable_{strategy}" for strategy in strategies]
    for title, keys in (
        ("Size and cost", COST),
        ("Shape", SHAPE),
        ("Parameters that each --strategy trains", trained),
    ):
        print(f"\n{title}\n{table(rows, keys)}")
    saved = [draw_models(rows, args.output / "models.png", args.pdf)]
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        files.write_csv(
            args.csv,
            [
                {key: row.get(key, "") for key in ["architecture", *COST, *SHAPE, *trained]}
                for row in rows
            ],
        )
    if args.results:
        series = read_accuracies(args.results, names)
        saved.append(draw_accuracies(rows, series, args.output / "accuracy.png", args.pdf))
    print("\nsaved " + ", ".join(map(str, saved + [args.csv] * bool(args.csv))))
    if args.show:
        figures.show(saved)


if __name__ == "__main__":
    main()
