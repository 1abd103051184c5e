"""Training on a GPU: every strategy, and the two usual loops on the same card.

    python benchmarks/gpu.py            # at most ten minutes; writes benchmarks/gpu.md
    python benchmarks/gpu.py --smoke    # tiny shapes, a minute on any machine: only that it runs

Weights, pictures and labels are random, the shapes are the true ones: 7,169 training and 1,020 test
images, 5 epochs, batch 64. `full` runs all its steps where the time allows; of the others as many
steps are timed as their part of the time allows, and the seconds are those of all steps at that
rate. Ours are the steps of train.py, from the pixel cache; computing the frozen parts once is
counted. The plain recipe is OpenAI's model with captions of 77 tokens and a DataLoader that
decodes with PIL, open_clip's is its own train_one_epoch with its own transform. All compute in the
same precision, and evaluate the test images once.
"""

import argparse
import contextlib
import gc
import itertools
import logging
import os
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import torch
from measure import machine, peak_flops, seconds
from peers import Pictures, clip_transform, open_clip_model, open_clip_transform
from step import oxford_names, plain_step
from torch.utils.data import DataLoader

from flowers import UserError, command, devices, evaluate, files, models, runs, strategies, training
from flowers.choices import LEARNING_RATES, STRATEGIES, TEMPLATE, context_template, cut_points
from flowers.data import Flowers
from flowers.pixels import get_batch, load_pixels

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
import train  # noqa: E402, the script

PLAIN = "plain recipe, PIL DataLoader"
OPEN_CLIP = "open_clip, train_one_epoch"
PEERS = (PLAIN, OPEN_CLIP)
NOT_RECORDED = "full --no_cuda_graph"
COMPILED = "full --compile"
# In the order in which they are measured: what takes long to compile comes last.
WAYS = ("full", PLAIN, OPEN_CLIP, NOT_RECORDED, *[s for s in STRATEGIES if s != "full"], COMPILED)
N_JPEGS = 64  # pictures on the disk, which the peers read in turn
WARM_UP = 3  # steps
PREFETCH = 2  # batches that each worker of a peer's DataLoader has ready: torch's own number
PART_S = 4  # seconds for a way of which not all steps are timed, its preparation included
PEER_S = 15  # those of a peer: more steps than its workers have ready
COMPILING_S = 70
ITERATIONS = 50  # of L-BFGS, for `linear`
TABLE = [
    "| shape | way | images/s | all epochs and evaluation, s | share of the peak | peak memory, MB "
    "| steps timed | waits a step |",
    "|---|---|---|---|---|---|---|---|",
]


@dataclass
class Size:
    """How much is trained and evaluated."""

    train: int = 7169
    test: int = 1020
    epochs: int = 5
    batch: int = 64

    @property
    def steps(self) -> int:
        return self.epochs * (self.train // self.batch)


@dataclass
class Task:
    """What is trained on.

    pixels: (train + test, 3, R, R) uint8, on the device, but for the peers, which decode files: two
        images, to count FLOPs. labels: (train + test,). jpegs: files on the disk.
    """

    architecture: str
    size: Size
    device: torch.device
    pixels: torch.Tensor
    labels: np.ndarray
    class_names: list[str]
    jpegs: list[Path]


@dataclass
class Way:
    """A way to train, ready for its first step.

    steps: does so many steps; n_steps: how many it takes. once_s: seconds for what is done once.
    flops: of a step, counted. evaluate: the test images. queued: batches that its workers have
    ready when nobody waits for them.
    """

    steps: Callable[[int], None]
    n_steps: int
    evaluate: Callable[[], None]
    flops: float
    once_s: float = 0.0
    queued: int = 0


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--architectures",
        nargs="+",
        default=["ViT-B/32", "ViT-B/16", "ViT-L/14@336px"],
        choices=list(models.SHAPES),
        help="shapes (default: %(default)s)",
    )
    parser.add_argument(
        "--ways", nargs="+", default=WAYS, choices=WAYS, metavar="WAY", help=f"{', '.join(WAYS)}"
    )
    parser.add_argument(
        "--seconds", type=float, default=540, help="time for everything (default: %(default)s)"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on any machine")
    parser.add_argument(
        "--output", type=Path, help="file of the table (default: gpu.md here; with --smoke none)"
    )
    args = parser.parse_args()
    device = devices.choose_device()
    size, output = Size(), args.output or HERE / "gpu.md"
    if args.smoke:
        args.architectures = ["tiny"]
        size, output = Size(train=48, test=12, epochs=1, batch=8), args.output
    elif device.type != "cuda":
        raise UserError("torch sees no GPU here: --smoke shows on a CPU that this runs")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)

    ways = [way for way in WAYS if way in args.ways]
    if device.type != "cuda":
        ways = [way for way in ways if way not in (NOT_RECORDED, COMPILED)]
    entries = [(name, way) for way in ways for name in args.architectures]
    end = time.perf_counter() + args.seconds
    peak = peak_flops(device)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        jpegs = write_jpegs(Path(folder))
        head = heading(size, device, peak, first_pass(jpegs, size))
        rows = measure_all(entries, size, device, jpegs, peak, end)
        for line in rows:
            print(line, flush=True)
            lines.append(line)
            text = "\n".join(["# Training on a GPU", "", *head, "", *TABLE, *lines, ""])
            if output:  # after each line: a way that fails costs none of those before it
                with files.atomic(output, "w") as out:
                    out.write(text)
    print(text)


def heading(size: Size, device: torch.device, peak: float, first_pass_s: float) -> list[str]:
    """What the numbers depend on, and what is not in them."""
    environment = runs.environment()
    steps = size.steps // size.epochs
    return [
        f"`{shlex.join(['python', *sys.argv])}`, {time.strftime('%Y-%m-%d')}, "
        f"commit {environment['commit']}, {machine()}, "
        f"torch {environment['versions']['torch']}, {devices.precision_of(device)}, "
        f"random weights. {size.train:,} training and {size.test:,} test images, {size.epochs} "
        f"epochs of {steps} steps, batch {size.batch}.",
        "",
        f"The peak is that of a matrix product here: {peak / 1e12:.3g} TFLOP/s. FLOPs are counted, "
        "those of each way its own. Where fewer steps were timed than there are, the seconds are "
        "those of all steps at the same rate. The memory of ours holds the pixels of all images, "
        "that of the other two holds none. "
        f"`linear` is one pass over them and {ITERATIONS} iterations of L-BFGS.",
        "",
        f"Not counted: the first pass over the JPEGs, which fills the pixel cache, would take "
        f"{first_pass_s:.0f} s on the {os.cpu_count()} cores (224 px, at the rate of {N_JPEGS} "
        "files). The other two decode them anew in each epoch. Of the frozen parts, computing is "
        "counted (at the rate of 256 images), not writing them to the cache, reading them there, "
        "and copying them to the device.",
    ]


# -----------------------------------------------------------------------------
# measuring


def measure_all(
    entries: list[tuple[str, str]],
    size: Size,
    device: torch.device,
    jpegs: list[Path],
    peak: float,
    end: float,
) -> Iterator[str]:
    """A line of the table for each (architecture, way); `full` runs all its steps if it can.

    peak: FLOPs a second. end: when all must be done, as perf_counter counts.
    """
    n_whole = sum(name == "full" for _, name in entries)
    for architecture, name in entries:
        left = end - time.perf_counter()
        needed = COMPILING_S if name == COMPILED else 0  # a compiler can't be interrupted
        if left < needed:
            yield f"| {architecture} | {name} | no time was left | | | | | |"
            continue
        allowed = min(PEER_S if name in PEERS else PART_S, left)
        if name == "full":  # a quarter of the time is for these, if they need it
            allowed = left / 4 / n_whole
            n_whole -= 1
        try:
            n_pixels = 2 if name in PEERS else size.train + size.test
            task = make_task(architecture, size, device, jpegs, n_pixels)
            line = measure(task, name, needed + allowed, peak)
        except torch.OutOfMemoryError:
            line = f"| {architecture} | {name} | the memory was not enough | | | | | |"
        task = None  # frees its pixels
        yield line
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure(task: Task, name: str, allowed: float, peak: float) -> str:
    """Train one way for at most about `allowed` seconds; a line of the table."""
    end = time.perf_counter() + allowed
    if task.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with contextlib.ExitStack() as stack:
        if name == PLAIN:
            way = plain(task, stack)
        elif name == OPEN_CLIP:
            way = open_clip(task, stack)
        elif name == "linear":
            way = linear(task)
        else:
            strategy = name.split()[0]
            way = ours(task, strategy, compiled=name == COMPILED, recorded=name != NOT_RECORDED)
        if name == "linear":
            end += way.once_s  # its fit, which has taken that of the time for steps
        way.steps(WARM_UP)
        waits = waits_of(way.steps, task.device)
        way.steps(way.queued)  # which were decoded while the model was made
        evaluation_s = seconds(way.evaluate)
        step_s, n_timed = time_steps(way.steps, way.n_steps, end)
    total = way.once_s + way.n_steps * step_s + evaluation_s
    cells = [
        task.architecture,
        name,
        f"{task.size.batch / step_s:,.0f}",
        f"{total:.3g}",
        f"{way.flops / step_s / peak:.0%}",
        f"{devices.peak_memory_mb(task.device):,}",
        f"{n_timed:,} of {way.n_steps:,}",
        waits,
    ]
    return "| " + " | ".join(cells) + " |"


def time_steps(steps: Callable, total: int, end: float) -> tuple[float, int]:
    """Seconds a step, and of how many: all `total`, or those until `end`."""
    spent, done = 0.0, 0
    while done < total and (done == 0 or time.perf_counter() < end):
        # The GPU is waited for only after a number of steps, as in an epoch.
        n = min(total - done, max(WARM_UP, done))
        if done and time.perf_counter() + n * spent / done > end:
            n = max(1, int((end - time.perf_counter()) * done / spent))
        spent += seconds(lambda: steps(n))
        done += n
    return spent / done, done


def waits_of(steps: Callable, device: torch.device) -> str:
    """How often Python waits for the GPU in a step, as torch counts it."""
    if device.type != "cuda":
        return "-"
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps(WARM_UP)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
    return f"{len(waits) / WARM_UP:.1f}"


def count_step(
    encode: Callable, images: torch.Tensor, texts: torch.Tensor, n_images: float, n_texts: float
) -> float:
    """FLOPs of a step, forward and backward, with so many images and texts.

    encode: (images, texts) -> features of both. images, texts: two rows of each. The FLOPs are
    linear in both numbers, so three small counts tell those of any batch. Those of the loss and of
    AdamW, less than a hundredth, are left out.
    """

    def count(image_rows: int, text_rows: int) -> float:
        def work():
            features = encode(images[:image_rows], texts[:text_rows])
            sums = [feature.float().sum() for feature in features if feature.requires_grad]
            torch.stack(sums).sum().backward()

        return models.count_flops(work)

    both = count(1, 1)
    image, text = count(2, 1) - both, count(1, 2) - both
    return both + (n_images - 1) * image + (n_texts - 1) * text


# -----------------------------------------------------------------------------
# random data


def write_jpegs(folder: Path) -> list[Path]:
    """Random pictures of Oxford's size, smooth as photographs are, so that JPEG takes as long."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(N_JPEGS):
        coarse = rng.integers(0, 256, (63, 78, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (625, 500), interpolation=cv2.INTER_CUBIC)
        paths.append(folder / f"image_{i + 1:05d}.jpg")
        cv2.imwrite(str(paths[-1]), image)
    return paths


def make_task(
    architecture: str, size: Size, device: torch.device, jpegs: list[Path], n_pixels: int
) -> Task:
    side = models.SHAPES[architecture].resolution
    names = oxford_names()
    return Task(
        architecture=architecture,
        size=size,
        device=device,
        pixels=torch.randint(0, 256, (n_pixels, 3, side, side), dtype=torch.uint8, device=device),
        labels=np.arange(size.train + size.test) % len(names),
        class_names=names,
        jpegs=jpegs,
    )


def first_pass(jpegs: list[Path], size: Size) -> float:
    """Seconds for the pixel cache of all images in 224 px, at the rate of the files here."""
    with tempfile.TemporaryDirectory() as folder:
        flowers = Flowers(Path(folder), tuple(jpegs), np.zeros(len(jpegs), np.int64), ["any"], {})
        spent = seconds(lambda: load_pixels(flowers, 224))
    return spent * (size.train + size.test) / len(jpegs)


def random_model(task: Task) -> models.CLIP:
    with task.device:  # the weights are drawn there
        model = models.build(task.architecture)
    return models.to_device(model, task.device)


# -----------------------------------------------------------------------------
# ours


def settings(strategy: str, compiled: bool, recorded: bool, size: Size) -> SimpleNamespace:
    """What train.py takes from the flags, with the defaults of the strategy."""
    image_cut, _ = cut_points(strategy, 2)
    return SimpleNamespace(
        strategy=strategy,
        blocks=2,
        rank=8,
        context_tokens=4,
        augment="crop" if image_cut is None else "none",
        loss="info_nce",
        positives="class",
        logit_bias=None,
        temperature=None,
        learn_temperature=False,
        chunk_size=0,
        pull=1 / 70 if strategy == "projection" else 0.0,
        captions=None,
        no_cache=False,
        compile=compiled,
        records_steps=recorded,
        lr=LEARNING_RATES[strategy],
        tau_lr=LEARNING_RATES[strategy],
        lr_decay=1.0,
        wd=0.1,
        epochs=size.epochs,
        seed=0,
    )


def ours(task: Task, strategy: str, compiled: bool, recorded: bool) -> Way:
    """The loop of train.py."""
    device, size = task.device, task.size
    config = settings(strategy, compiled, recorded and device.type == "cuda", size)
    model = random_model(task)
    train.prepare_model(model, config)
    template = TEMPLATE
    if strategy == "prompt":
        template = context_template(config.context_tokens)
    flowers = SimpleNamespace(labels=task.labels, class_names=task.class_names)
    texts = train.make_texts(flowers, None, [template], None, model.context_length)

    views, text_activations, frozen_s = frozen_parts(task, model, texts, config)
    processes = devices.Processes(0, 1, device)
    data = train.TrainingData(
        flowers, torch.arange(size.train), texts, task.pixels, views, model, config
    )
    encoders = train.make_encoders(model, views, texts, text_activations, config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    objective = train.make_objective(model, encoders, trained, processes, config)
    optimizer = train.make_optimizer(model, trained, config)
    scaler = devices.gradient_scaler(device)
    of_loss = train.loss_parameters(model)

    def batches() -> Iterator[train.Batch]:
        for epoch in itertools.count():
            yield from data.batches(epoch, size.batch, processes)

    stream = batches()

    def steps(n: int) -> None:
        late = training.LateNumbers(device)
        for step, batch in zip(range(n), stream):
            training.set_learning_rate(optimizer, training.learning_rate_factor(step, size.steps))
            losses = train.training_step(objective, batch, optimizer, scaler, processes)
            late.put(step, losses | of_loss)
            for _ in late.take(everything=step == n - 1):
                pass

    def evaluate_test() -> None:
        head = evaluate.zero_shot_head(model, task.class_names, [template], None)
        index = np.arange(size.train, size.train + size.test)
        train.evaluate_images(model, head, flowers, task.pixels, index, None)

    # A batch has so many distinct texts on average, without those that fill a recorded step.
    n_texts = np.mean(
        [len(b.text_of_image.unique()) for b in data.batches(0, size.batch, processes)]
    )
    batch = next(stream)
    encode = lambda images, rows: (encoders[0](images), encoders[1](rows))  # not compiled
    flops = count_step(encode, batch.images[:2], batch.text_rows[:2], size.batch, n_texts)
    optimizer.zero_grad()
    return Way(steps, size.steps, evaluate_test, flops, frozen_s)


def frozen_parts(
    task: Task, model: models.CLIP, texts: train.Texts, config: SimpleNamespace
) -> tuple[list[torch.Tensor] | None, torch.Tensor | None, float]:
    """The kept activations of images and texts, and the seconds to compute them once.

    One chunk of images is encoded, and stands for all others in time and in memory.
    """
    image_cut, text_blocks = cut_points(config.strategy, config.blocks)
    views = text_activations = None
    frozen_s = 0.0
    if image_cut is not None:
        chunk, chunk_s = encode_chunk(task, model, image_cut)
        frozen_s += chunk_s * task.size.train / len(chunk)
        rows = torch.arange(task.size.train, device=task.device) % len(chunk)
        views = [chunk[rows]]
    if text_blocks is not None:
        trunk, _ = models.split_text_tower(model, text_blocks)
        tokens = texts.tokens.to(task.device)
        trunk(tokens)
        frozen_s += seconds(lambda: trunk(tokens))
        text_activations = trunk(tokens)
    return views, text_activations, frozen_s


def encode_chunk(task: Task, model: models.CLIP, cut: models.Cut) -> tuple[torch.Tensor, float]:
    """The activations of a chunk of training images before a cut, and its seconds."""
    trunk, _ = models.split_image_tower(model, cut)
    index = torch.arange(min(256, task.size.train))
    encode = lambda: trunk(get_batch(task.pixels, index, task.device))
    activations = encode()
    return activations, seconds(encode)


def linear(task: Task) -> Way:
    """One pass that encodes the images, a batch a step; once the iterations of L-BFGS."""
    from sklearn.linear_model import LogisticRegression

    device, size = task.device, task.size
    model = random_model(task)
    model.requires_grad_(False)
    features = torch.randn(size.train, model.text_projection.shape[1])
    features = torch.nn.functional.normalize(features, dim=1).numpy()
    regression = LogisticRegression(C=strategies.DEFAULT_C, max_iter=ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged
        fit_s = seconds(lambda: regression.fit(features, task.labels[: size.train]))

    def steps(n: int) -> None:
        for step in range(n):
            index = torch.arange(step * size.batch, (step + 1) * size.batch) % size.train
            encode(get_batch(task.pixels, index, device))

    @torch.inference_mode()
    def encode(images: torch.Tensor) -> None:
        models.encode_images(model, images)

    def evaluate_test() -> None:
        index = torch.arange(size.train, len(task.pixels))
        models.image_features(model, task.pixels, index)

    image = get_batch(task.pixels, torch.arange(1), device)
    flops = size.batch * models.count_flops(lambda: encode(image))
    return Way(steps, size.train // size.batch, evaluate_test, flops, fit_s)


# -----------------------------------------------------------------------------
# the peers


def n_workers(device: torch.device) -> int:
    """Processes that decode for a peer."""
    return min(16, os.cpu_count()) if device.type == "cuda" else 0


def endless(task: Task, transform: Callable, stack: contextlib.ExitStack) -> Iterator:
    """Batches of pictures, decoded with PIL by worker processes, (B, 3, R, R) and labels (B,)."""
    files_of_all = list(itertools.islice(itertools.cycle(task.jpegs), len(task.labels)))
    workers = n_workers(task.device)
    loader = DataLoader(
        Pictures(files_of_all, task.labels, transform),
        task.size.batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=task.device.type == "cuda",
    )

    def batches() -> Iterator:
        while True:
            yield from loader

    stream = batches()
    stack.callback(stream.close)  # ends its workers
    return stream


def evaluation(task: Task, encode_image: Callable, stream: Iterator) -> Callable:
    """The test images from their files, a batch at a time."""

    @torch.inference_mode()
    def evaluate_test() -> None:
        for _ in range(max(1, task.size.test // task.size.batch)):
            images, _ = next(stream)
            with devices.autocast(task.device):
                encode_image(images.to(task.device, non_blocking=True)).float().cpu()

    return evaluate_test


def plain(task: Task, stack: contextlib.ExitStack) -> Way:
    """OpenAI's own forward pass, a caption of 77 tokens for each image, and `loss.item()`."""
    device, size = task.device, task.size
    model = random_model(task)
    prompts = evaluate.fill_templates(task.class_names, [TEMPLATE])
    step = plain_step(model, prompts)
    stream = endless(task, clip_transform(task.pixels.shape[-1]), stack)

    def steps(n: int) -> None:
        for images, labels in itertools.islice(stream, n):
            step(images.to(device, non_blocking=True), labels.to(device, non_blocking=True))

    def encode(images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with devices.autocast(device):
            return model.encode_image(images), model.encode_text(tokens)

    images = get_batch(task.pixels, torch.arange(2), device)
    flops = count_step(encode, images, full_tokens(prompts[:2], device), size.batch, size.batch)
    queued = PREFETCH * n_workers(device)
    evaluate_test = evaluation(task, model.encode_image, stream)
    return Way(steps, size.steps, evaluate_test, flops, queued=queued)


def open_clip(task: Task, stack: contextlib.ExitStack) -> Way:
    """open_clip's model, loss and loop, which are given the same captions."""
    from open_clip.loss import ClipLoss
    from open_clip_train.train import train_one_epoch

    device, size = task.device, task.size
    logging.disable()  # of each step
    stack.callback(logging.disable, logging.NOTSET)
    with device:
        model = open_clip_model(task.architecture)
    model = model.to(device)
    model.output_dict = True
    prompts = evaluate.fill_templates(task.class_names, [TEMPLATE])
    tokens = full_tokens(prompts, torch.device("cpu"))  # (C, 77)
    stream = endless(task, open_clip_transform(task.pixels.shape[-1]), stack)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    settings = open_clip_settings(task)
    scaler = devices.gradient_scaler(device) if settings.precision == "amp" else None

    class Batches:
        """The next n batches of an epoch, in the way of open_clip's loaders."""

        num_batches = size.train // size.batch  # it logs at the last of them
        num_samples = num_batches * size.batch

        def __init__(self, n: int):
            self.n = n

        def __iter__(self):
            for images, labels in itertools.islice(stream, self.n):
                yield images, tokens[labels]

    def steps(n: int) -> None:
        data = SimpleNamespace(dataloader=Batches(n), set_epoch=lambda epoch: None)
        train_one_epoch(
            model, {"train": data}, ClipLoss(), 0, optimizer, scaler, None, None, settings
        )

    def encode(images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with devices.autocast(device):
            return model.encode_image(images), model.encode_text(texts)

    images = get_batch(task.pixels, torch.arange(2), device)
    flops = count_step(encode, images, tokens[:2].to(device), size.batch, size.batch)
    queued = PREFETCH * n_workers(device)
    evaluate_test = evaluation(task, model.encode_image, stream)
    return Way(steps, size.steps, evaluate_test, flops, queued=queued)


def open_clip_settings(task: Task) -> SimpleNamespace:
    """What train_one_epoch takes from open_clip's own flags."""
    names = {"bf16": "amp_bf16", "fp16": "amp", "fp32": "fp32"}
    return SimpleNamespace(
        device=str(task.device),
        precision=names[devices.precision_of(task.device)],
        accum_freq=1,
        distill=False,
        skip_scheduler=True,
        horovod=False,
        grad_clip_norm=None,
        rank=0,
        world_size=1,
        batch_size=task.size.batch,
        log_every_n_steps=100,
        wandb=False,
    )


def full_tokens(prompts: list[str], device: torch.device) -> torch.Tensor:
    """Token ids of each prompt, padded to the 77 of CLIP: (P, 77)."""
    tokens = models.tokenize(prompts)
    padding = models.CONTEXT_LENGTH - tokens.shape[1]
    return torch.nn.functional.pad(tokens, (0, padding)).to(device)


if __name__ == "__main__":
    main()
