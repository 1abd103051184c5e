"""Fine-tune CLIP on Oxford Flowers 102 with InfoNCE and AdamW, and evaluate it once at the end.

    python train.py                                         # ViT-B/32, 5 epochs, on one GPU
    python train.py --holdout --eval_every 1 --lr 3e-6      # to choose settings: on val, not test
    python train.py --strategy last_blocks --blocks 2       # see flowers/strategies.py
    torchrun --nproc_per_node=4 train.py                    # four GPUs, --batch_size images each
    python train.py --data_root sample --architecture tiny  # any machine, offline, random weights
    python train.py --resume runs/NAME                      # goes on after a kill, same result

Everything is left in runs/NAME/ (flowers/runs.py lists the files). To repeat the evaluation:
python baseline_eval.py --architecture runs/NAME. A run that starts from another run is not
evaluated on images that the other was trained on, unless --allow_overlap says so.
"""

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from flowers import UserError, command
from flowers.choices import cut_points
from flowers.settings import Config, read_settings

if __name__ == "__main__":
    config = command(read_settings)(__doc__)  # before torch is imported: see flowers.command

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from flowers import calibration, devices, evaluate, files, frozen, runs, strategies
from flowers.data import Flowers, image_ids, open_from_flags, select, val_images
from flowers.duplicates import write_duplicates
from flowers.layouts import read_captions
from flowers.losses import (
    backward_in_chunks,
    best_bias,
    class_cross_entropy,
    info_nce,
    same_class,
    sigmoid_loss,
)
from flowers.models import (
    CLIP,
    LOSS_PARAMETERS,
    encode,
    image_features,
    layers_above,
    split_image_tower,
    split_text_tower,
    stack,
    text_features,
    towers,
)
from flowers.pixels import get_batch, load_pixels, to_device
from flowers.tracking import Tracker, finish_evaluation, start_wandb
from flowers.training import (
    LateNumbers,
    RecordedGradients,
    assign,
    averaged,
    copies,
    diverged,
    layerwise_groups,
    learning_rate_factor,
    load_checkpoint,
    note_cut_batch,
    restore_average,
    restore_scaler,
    save_checkpoint,
    set_learning_rate,
    squared_distance,
    update,
    update_average,
)
from flowers.weights import load_model

# CLIP was trained with the logit scale clamped here (Radford et al. 2021, section 2.5).
MAX_LOGIT_SCALE = 100.0


@command
def main(config: Config):
    # -----------------------------------------------------------------------------
    # machine
    processes = devices.start_processes(config.device)  # one, unless torchrun started more
    precision = devices.set_precision(config.precision, processes.device)
    config = replace(config, device=str(processes.device), precision=precision)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
    devices.seed_everything(config.seed, processes.device)

    # -----------------------------------------------------------------------------
    # data and model
    with processes.main_first():
        flowers, captions, sentences = open_data(config)
        model = load_model(config.architecture, processes.device, config.activation)
        pixels = to_device(load_pixels(flowers, model.visual.input_resolution), processes.device)
    train_index, eval_index = choose_images(flowers, config)
    config = complete(config, flowers, train_index, model)
    prepare_model(model, config)
    texts = make_texts(flowers, captions, config.prompt_template, sentences, model.context_length)
    overlap = check_overlap(flowers, train_index, eval_index, config, processes)
    folder = open_run_folder(flowers, train_index, config, processes)

    # -----------------------------------------------------------------------------
    # frozen parts: their activations of images and texts never change, so they are computed once
    start = time.perf_counter()
    with processes.main_first():
        views = compute_views(model, flowers, pixels, train_index, config)
        text_activations = compute_text_activations(model, flowers, texts, config)
    frozen_seconds = time.perf_counter() - start
    encoders = make_encoders(model, views, texts, text_activations, config)
    data = TrainingData(flowers, train_index, texts, pixels, views, model, config)
    batch_size = config.processes * min(config.batch_size, len(train_index) // config.processes)
    if config.fits_bias:
        fit_bias(model, encoders, data, batch_size, processes)

    # -----------------------------------------------------------------------------
    # optimiser, and what an interrupted run left
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    objective = make_objective(model, encoders, trained, processes, config)
    average = copies(trained) if config.ema else {}
    sizes = count_parameters(model, data)
    optimizer = make_optimizer(model, trained, config)
    scaler = devices.gradient_scaler(processes.device)
    steps_per_epoch = len(train_index) // batch_size
    total_steps = config.epochs * steps_per_epoch
    start_digest = digest_of_start(model, config)
    checkpoint_file, metrics_file = folder / "checkpoint.pt", folder / "metrics.jsonl"
    first_epoch, seconds = 0, 0.0
    if config.resume and checkpoint_file.exists():
        state = trained, average, optimizer, scaler
        first_epoch, seconds = restore(checkpoint_file, start_digest, *state)
    rows = rows_until(first_epoch, metrics_file)
    tracker = start_tracker(folder, rows, config, processes)
    if processes.is_main:
        files.write_lines(metrics_file, rows)
        work = f"{len(train_index):,} images, {total_steps:,} steps of {batch_size}"
        print_start(folder, first_epoch, work, batch_size, texts, model, sizes, config)

    # -----------------------------------------------------------------------------
    # training loop
    bar = progress_bar(first_epoch * steps_per_epoch, total_steps, processes)
    late, of_loss = LateNumbers(processes.device), loss_parameters(model)
    for epoch in range(first_epoch, config.epochs):
        epoch_start = time.perf_counter()
        for i, batch in enumerate(data.batches(epoch, batch_size, processes)):
            step = epoch * steps_per_epoch + i
            factor = learning_rate_factor(step, total_steps)
            set_learning_rate(optimizer, factor)
            losses = training_step(objective, batch, optimizer, scaler, processes)
            update_average(average, trained, config.ema, step)

            images_per_s = (i + 1) * batch_size / (time.perf_counter() - epoch_start)
            late.put((epoch, step, config.lr * factor, images_per_s), losses | of_loss)
            done = late.take(everything=i == steps_per_epoch - 1)  # a GPU is two steps behind
            log_steps(done, rows, tracker, bar, checkpoint_file)
        # The weights once an epoch, before they are saved.
        check_finite(rows[-1]["train/loss"], trained.values(), step, checkpoint_file)
        seconds += time.perf_counter() - epoch_start

        if not processes.is_main:
            continue  # the main process evaluates and saves
        if config.evaluates_after(epoch + 1):
            with averaged(trained, average):
                row = evaluate_val(model, flowers, pixels, eval_index, captions, sentences, config)
            row = {"epoch": epoch + 1, "step": step + 1} | row
            rows.append(row)
            tracker.log_row(row)
            bar.write(f"epoch {epoch + 1}: val top-1 {row['val/top1']:.2f}%")
        files.write_lines(metrics_file, rows)
        progress = {"start": start_digest, "epoch": epoch + 1, "seconds": seconds}
        progress |= {"average": average, "scaler": scaler.state_dict()}
        save_checkpoint(checkpoint_file, trained, optimizer, **progress)
    bar.close()
    del objective  # and with it the memory of a recorded step
    if not processes.is_main:
        return

    # -----------------------------------------------------------------------------
    # results: of the last epoch, on val if it was held out, else on test, once
    assign(trained, average)
    state, classifier = strategies.export(model)
    head = evaluate.zero_shot_head(model, flowers.class_names, config.prompt_template, sentences)
    fit = {}  # how the head of `linear` was fitted
    if config.strategy == "linear":
        head, classifier, fit, seconds = fit_head(model, head, flowers, sentences, data, eval_index)
    start = time.perf_counter()
    metrics, logits = evaluate_images(model, head, flowers, pixels, eval_index, captions)
    probabilities = logits.softmax(1)  # (m, C), at the model's own temperature
    calibrated = fit_temperature(folder, logits, flowers.labels[eval_index], config)
    save_model(folder, state, classifier, flowers)
    mistakes = evaluate.save_outputs(folder, probabilities, flowers, eval_index, metrics)
    draw_curve(rows, folder)
    eval_seconds = time.perf_counter() - start
    n_images = max(total_steps * batch_size, len(train_index))  # linear has no steps
    result = evaluate.with_split(config.eval_split, metrics)
    result |= fit | calibrated | final_loss_parameters(model, config) | sizes
    result |= costs(frozen_seconds, seconds, eval_seconds, n_images, processes.device)
    protocol = describe(folder, flowers, eval_index, overlap, head, sentences, model, config)
    write_duplicates(folder, pixels, eval_index, flowers.file_names)
    runs.finish(folder, {"name": folder.name} | result | config.record() | protocol)
    finish_evaluation(tracker, result, protocol, mistakes)
    print_results(folder, metrics, result, protocol, config)


def training_step(
    objective: "Objective",
    batch: "Batch",
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    processes: devices.Processes,
) -> dict[str, torch.Tensor]:
    """Update the model with one batch; returns its `loss` before the update, with --pull `pull`.

    They are scalars on the device. Nothing here waits for a GPU: Python is ahead of it, so that it
    always knows what to do next.

    scaler: multiplies the loss before the backward pass, with --precision fp16.
    """
    losses = objective.backward(batch, scaler)
    trained = list(objective.trained.values())
    processes.average_gradients(trained)
    update(optimizer, trained, scaler)  # with clipped gradients
    logit_scale = objective.trained.get("logit_scale")
    if logit_scale is not None:
        with torch.no_grad():
            logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
    return losses


# -----------------------------------------------------------------------------
# what is minimised


@dataclass(frozen=True)
class Objective:
    """What training makes smaller: the loss of a batch, and with --pull the distance to the start.

    trained: the parameters that are trained, by name.
    encoders: batch.images -> features (b, D), and batch.text_rows -> features (p, D).
    loss_of: takes both features and the batch, and returns the loss of all processes' images.
    chunk_size: images whose graph is in memory at a time; 0 for all of the batch.
    pull: how strongly the trained weights are pulled to `pulled_to`, by name; empty without --pull.
    recorded: repeats on a GPU what `compute_gradients` did in the first step; None elsewhere.
    """

    trained: dict[str, torch.nn.Parameter]
    encoders: Sequence[Callable]
    loss_of: Callable
    chunk_size: int = 0
    pull: float = 0.0
    pulled_to: dict[str, torch.Tensor] = field(default_factory=dict)
    recorded: RecordedGradients | None = None

    def backward(self, batch: "Batch", scaler: torch.amp.GradScaler) -> dict[str, torch.Tensor]:
        """Give the trained parameters their gradients; returns `loss`, and with --pull `pull`."""
        if self.recorded is None:
            return self.compute_gradients(batch, scaler)
        inputs = [getattr(batch, part.name) for part in fields(Batch)]
        return self.recorded(lambda *parts: self.compute_gradients(Batch(*parts), scaler), inputs)

    def compute_gradients(
        self, batch: "Batch", scaler: torch.amp.GradScaler
    ) -> dict[str, torch.Tensor]:
        """As `backward`, one operation after the other."""

        def batch_loss(local_images: torch.Tensor, local_texts: torch.Tensor) -> torch.Tensor:
            return scaler.scale(self.loss_of(local_images, local_texts, batch))

        inputs = [batch.images, batch.text_rows]
        if self.chunk_size:
            loss = backward_in_chunks(self.encoders, inputs, batch_loss, self.chunk_size)
        else:
            loss = batch_loss(*[encode(part) for encode, part in zip(self.encoders, inputs)])
            loss.backward()
        loss = loss.detach()
        scale = scaler.scale(torch.ones_like(loss))  # not get_scale, for which a GPU would wait
        losses = {"loss": loss / scale}
        if self.pulled_to:
            # Once for the whole batch: each process adds the same, and so does their mean.
            pull = self.pull * squared_distance(self.trained, self.pulled_to)
            scaler.scale(pull).backward()
            losses["pull"] = pull.detach()
        return losses


def make_objective(
    model: CLIP,
    encoders: Sequence[Callable],
    trained: dict[str, torch.nn.Parameter],
    processes: devices.Processes,
    config: Config,
) -> Objective:
    """The loss and the pull of the settings; the trained weights are still those of the start."""
    loss_of = choose_loss(config.loss, model, processes)
    pulled_to = copies(weights_of_towers(trained)) if config.pull else {}
    if config.compile:
        # Where steps are not recorded, the number of distinct texts differs from one to the next:
        # torch makes it a variable at the second.
        encoders = [torch.compile(encoder) for encoder in encoders]
    recorded = RecordedGradients(list(trained.values())) if config.records_steps else None
    return Objective(
        trained, encoders, loss_of, config.chunk_size, config.pull, pulled_to, recorded
    )


def choose_loss(name: str, model: CLIP, processes: devices.Processes) -> Callable:
    """The loss of that name, as a function of this process's features and its Batch.

    Features are (b, D) of images and (p, D) of texts. The loss is that of the whole batch in each
    process, as Processes.average_gradients needs it.
    """

    def info_nce_of(images: torch.Tensor, texts: torch.Tensor, batch: Batch) -> torch.Tensor:
        images, texts = gather_pairs(images, texts, batch, processes)
        return info_nce(images, texts, model.logit_scale.exp(), batch.matches)

    def sigmoid_of(images: torch.Tensor, texts: torch.Tensor, batch: Batch) -> torch.Tensor:
        images, texts = gather_pairs(images, texts, batch, processes)
        scale, bias = model.logit_scale.exp(), model.logit_bias
        return sigmoid_loss(images, texts, scale, bias, batch.matches)

    def cross_entropy_of(images: torch.Tensor, texts: torch.Tensor, batch: Batch) -> torch.Tensor:
        # The texts are those of all classes already, in each process.
        images = processes.gather(images)
        return class_cross_entropy(images, texts, model.logit_scale.exp(), batch.text_of_image)

    functions = {
        "info_nce": info_nce_of,
        "cross_entropy": cross_entropy_of,
        "sigmoid": sigmoid_of,
    }
    return functions[name]


def gather_pairs(
    images: torch.Tensor, texts: torch.Tensor, batch: "Batch", processes: devices.Processes
) -> tuple[torch.Tensor, torch.Tensor]:
    """(b, D) and (p, D) of this process become (B, D) of all, each image beside its text."""
    images = processes.gather(images)
    texts = processes.gather(texts.index_select(0, batch.text_of_image))
    return images, texts


def loss_parameters(model: CLIP) -> dict[str, torch.Tensor]:
    """The scalars of the loss by name: the scale of the logits, and sigmoid's bias."""
    return {name: p for name, p in model.named_parameters() if name in LOSS_PARAMETERS}


def log_steps(
    done: Iterable[tuple[tuple[int, int, float, float], dict[str, float]]],
    rows: list[dict],
    tracker: Tracker,
    bar: tqdm,
    checkpoint_file: Path,
) -> None:
    """Add the steps that are done to the rows of metrics.jsonl, to W&B, and to the bar.

    done: (epoch, step, learning rate, images per second) of each, epoch and step from 0, with its
        losses and `loss_parameters`. The rate is of the epoch so far, as Python gave the step to
        the device: when its numbers come back says nothing about one step.
    Raises UserError if a loss is no finite number.
    """
    for (epoch, step, lr, images_per_s), numbers in done:
        check_finite(numbers["loss"], [], step, checkpoint_file)
        row = step_row(epoch, step, lr, numbers) | {"train/images_per_s": images_per_s}
        rows.append(row)
        tracker.log_row(row)
        bar.set_postfix(epoch=epoch + 1, loss=numbers["loss"], refresh=False)
        bar.update()


def step_row(epoch: int, step: int, lr: float, numbers: dict[str, float]) -> dict[str, float]:
    """A step (from 0) as a row of metrics.jsonl. numbers: its losses, and `loss_parameters`."""
    row = {"epoch": epoch + 1, "step": step + 1, "train/loss": numbers["loss"]}
    if "pull" in numbers:
        row["train/pull"] = numbers["pull"]
    row["train/lr"] = lr
    row["train/tau"] = math.exp(-numbers["logit_scale"])  # which the probabilities have
    if "logit_bias" in numbers:
        row["train/logit_bias"] = numbers["logit_bias"]
    return row


# -----------------------------------------------------------------------------
# data and model


def open_data(
    config: Config,
) -> tuple[Flowers, list[list[str]] | None, evaluate.Prompts | None]:
    """The dataset, and with --captions sentences of each image, with --prompts of each class."""
    flowers = open_from_flags(asdict(config))
    captions = read_captions(config.captions, flowers.files) if config.captions else None
    sentences = None
    if config.prompts:
        sentences = evaluate.read_prompts(config.prompts, flowers.class_names)
    return flowers, captions, sentences


def prepare_model(model: CLIP, config: Config) -> None:
    """Freeze what the strategy does not train, set the temperature, and add the loss's bias."""
    strategies.prepare(model, config.strategy, config.blocks, config.rank, config.context_tokens)
    if config.temperature is not None:
        log_scale = -math.log(config.temperature)  # the model keeps log(1 / tau)
        torch.nn.init.constant_(model.logit_scale, log_scale)
    model.logit_scale.requires_grad_(config.learn_temperature)
    if config.loss == "sigmoid":
        # 0 until `fit_bias`, where no start is given.
        bias = torch.tensor(config.logit_bias or 0.0, device=model.logit_scale.device)
        model.logit_bias = torch.nn.Parameter(bias)


def choose_images(flowers: Flowers, config: Config) -> tuple[torch.Tensor, np.ndarray]:
    """The images to train on (n,) and those to evaluate (m,), as indices of the dataset's files.

    Raises UserError if there are too few.
    """
    n_classes = len(flowers.class_names)
    train_index = select(
        flowers.splits["train"],
        flowers.labels,
        n_classes,
        config.classes,
        config.shots,
        config.seed,
    )
    # A contrastive loss needs a negative.
    if len(train_index) < 2 * config.processes:
        raise UserError(
            f"{len(train_index)} training images are left by --classes {config.classes}: training "
            "needs two for each process"
        )
    # Captions tell images of one class apart; prompts do not.
    learns_classes = config.trains and not config.captions
    if learns_classes and len(np.unique(flowers.labels[train_index])) < 2:
        raise UserError(
            "the training images are of one class, so there is nothing to tell apart: give another "
            "--classes, or more images"
        )
    # Not by --classes: what was learned of one half is measured on both.
    eval_index = flowers.splits[config.eval_split]
    if config.val_shots:
        eval_index = val_images(flowers, shots=config.val_shots, seed=config.seed)
    if len(eval_index) == 0:
        raise UserError("the splits list no image for val: --holdout has nothing to hold out")
    return torch.from_numpy(train_index), eval_index


def complete(config: Config, flowers: Flowers, train_index: torch.Tensor, model: CLIP) -> Config:
    """The settings with what only the dataset and the weights at the start say."""
    config = replace(config, splits=flowers.convention, start=digest_of_weights(model))
    if config.strategy != "projection":
        return config
    # 1 / (mean number of training images of a class): ProLIP's 1 / shots (Fahes et al. 2024), where
    # every class has as many.
    n_classes = len(np.unique(flowers.labels[train_index.numpy()]))
    default = n_classes / len(train_index)
    pull = default if config.pull is None else config.pull
    # By the number, as a resumed run no longer knows that no flag was given.
    return replace(config, pull=pull, pull_by_default=pull == default)


def check_overlap(
    flowers: Flowers,
    train_index: torch.Tensor,
    eval_index: np.ndarray,
    config: Config,
    processes: devices.Processes,
) -> int | str:
    """How many of the evaluated images will have been trained on; "unknown" if nobody can tell.

    Raises UserError if there are such images, unless --allow_overlap is given.
    """
    if not processes.is_main:
        return 0  # the main process evaluates
    # Here, so that it is found before the training and not after it.
    learned = train_index.numpy() if config.trains else np.array([], dtype=np.int64)
    return runs.check_overlap_of_training(
        [config.architecture],
        flowers,
        learned,
        eval_index,
        config.eval_split,
        config.allow_overlap,
    )


@dataclass(frozen=True)
class Texts:
    """The texts to train on: those of image i are the rows first[i] ... first[i] + count[i] - 1.

    tokens: (P, L) of all P texts. first, count: (N,) for the N images of the dataset. n_cut: of how
    many texts the end is cut off.
    """

    tokens: torch.Tensor
    first: torch.Tensor
    count: torch.Tensor
    n_cut: int = 0

    def draw(
        self, generator: torch.Generator, images: torch.Tensor | slice = slice(None)
    ) -> torch.Tensor:
        """A random row for each image, (N,), or for those at `images`, (m,)."""
        first, count = self.first[images], self.count[images]
        fraction = torch.rand(len(first), generator=generator)
        return first + (fraction * count).long()


def make_texts(
    flowers: Flowers,
    captions: list[list[str]] | None,
    templates: Sequence[str] | None,
    sentences: evaluate.Prompts | None,
    context_length: int,
) -> Texts:
    """The captions of the images, or the prompts of their classes.

    sentences: those of each class, instead of the templates. context_length: how many
    tokens of a text the model reads.
    Raises UserError for prompts that `evaluate.class_prompts` refuses; captions are cut.
    """
    # The prompts are used in evaluation even where captions are learned from.
    prompts = evaluate.class_prompts(flowers.class_names, templates, sentences, context_length)
    texts_of = captions or prompts  # of each image, or of each class
    sequences = [encode(text) for texts in texts_of for text in texts]
    n_cut = sum(len(sequence) > context_length for sequence in sequences)
    # The texts of an image or class are next to each other.
    count = torch.tensor([len(texts) for texts in texts_of])
    first = count.cumsum(0) - count
    if not captions:
        # From classes to images: (C,) becomes (N,).
        labels = torch.tensor(flowers.labels)
        first, count = first[labels], count[labels]
    return Texts(stack(sequences, context_length), first, count, n_cut)


@dataclass(frozen=True)
class Batch:
    """The inputs of a training step: B images of all processes together, b of them in this one.

    images: (b, 3, R, R), or their activations behind the frozen part of the image tower.
    text_rows: (p,) rows of Texts, each once, however many images share the text; with --loss
    cross_entropy one of each class that is trained on. Where steps are recorded, rows that are of
    no image follow, up to the p of all steps.
    text_of_image: (b,) which of text_rows belongs to each image; with cross_entropy to each of all
    B images.
    matches: (B, B) bool, which images and texts belong together; None if only the pairs do.
    """

    images: torch.Tensor
    text_rows: torch.Tensor
    text_of_image: torch.Tensor
    matches: torch.Tensor | None


@dataclass(frozen=True)
class TrainingData:
    """What batches are made of.

    index: (n,) the training images among the N of the dataset.
    texts: of the N images. pixels: (N, 3, R, R) uint8.
    views: for each augmented view, the activations of the n training images behind the frozen part
    of the image tower, (n, ...); None if they are computed at every step, or no part is frozen.
    model: the images are normalised with its mean and std.
    """

    flowers: Flowers
    index: torch.Tensor
    texts: Texts
    pixels: torch.Tensor
    views: list[torch.Tensor] | None
    model: CLIP
    config: Config

    @functools.cached_property
    def labels(self) -> torch.Tensor:
        """The class of each image of the dataset, (N,) int64."""
        return torch.tensor(self.flowers.labels)

    @functools.cached_property
    def classes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The classes that are trained on, in order, and a training image of each: (C,), (C,)."""
        classes, positions = np.unique(self.labels[self.index].numpy(), return_index=True)
        return torch.from_numpy(classes), self.index[torch.from_numpy(positions)]

    @functools.cached_property
    def n_texts(self) -> int:
        """How many texts the training images have together; those of a class share theirs."""
        ranges = torch.stack([self.texts.first[self.index], self.texts.count[self.index]], 1)
        return int(ranges.unique(dim=0)[:, 1].sum())

    def batches(self, epoch: int, batch_size: int, processes: devices.Processes) -> Iterator[Batch]:
        """The batches of an epoch, whose order and texts depend on the seed and the epoch alone.

        batch_size: images of all processes together. What is left over at the end is left out.
        """
        generator = devices.generator(self.config.seed, epoch)
        order = torch.randperm(len(self.index), generator=generator)
        text_rows = self.texts.draw(generator)  # (N,) one text for each image, anew in each epoch
        for positions in order.split(batch_size):
            if len(positions) == batch_size:
                yield self.batch(positions, epoch, text_rows, generator, processes)

    def batch(
        self,
        positions: torch.Tensor,
        epoch: int,
        text_rows: torch.Tensor,
        generator: torch.Generator,
        processes: devices.Processes,
    ) -> Batch:
        """The batch of the training images at `positions` (B,) of `index`.

        text_rows: (N,) the text of each image in this epoch. generator: for the augmentation, and
        for the texts of the classes.
        """
        device = processes.device
        index = self.index[positions]  # (B,)
        local = processes.part(index)  # the rows of the batch that this process encodes
        if self.views is None:
            # Random numbers are drawn for the whole batch, so that all processes stay in step.
            augment = self.config.augment
            mean, std = self.model.mean, self.model.std
            images = get_batch(self.pixels, index, device, augment, generator, local, mean, std)
        else:
            # The views take turns, one each epoch.
            view = self.views[epoch % len(self.views)]
            images = devices.send(view[devices.send(positions[local], view.device)], device)
        if self.config.loss == "cross_entropy":
            # One text of each class, anew in each step, and where that of each image is.
            classes, image_of_class = self.classes
            rows = self.texts.draw(generator, image_of_class)
            text_of_image = torch.searchsorted(classes, self.labels[index])
        else:
            # Images of one class share their prompt, which is encoded once.
            rows, text_of_image = torch.unique(text_rows[index[local]], return_inverse=True)
            if self.config.records_steps:
                # Steps of one shape: as many rows as a batch can have. Nobody looks at the last.
                rows = F.pad(rows, (0, min(len(text_of_image), self.n_texts) - len(rows)))
        matches = None
        if self.config.positives == "class":
            matches = same_class(devices.send(self.labels[index], device))
        rows, text_of_image = (devices.send(numbers, device) for numbers in (rows, text_of_image))
        return Batch(images, rows, text_of_image, matches)


# -----------------------------------------------------------------------------
# frozen parts


def compute_views(
    model: CLIP,
    flowers: Flowers,
    pixels: torch.Tensor,
    train_index: torch.Tensor,
    config: Config,
) -> list[torch.Tensor] | None:
    """The activations of the training images behind the image tower's frozen part, for each view.

    A list of tensors (n, ...), shaped as split_image_tower says; None if no part of the tower is
    frozen, or with --no_cache.
    """
    cut, _ = cut_points(config.strategy, config.blocks)
    if cut is None or config.no_cache:
        return None
    # Without augmentation all views are the same.
    n_views = 1 if config.augment == "none" else config.views
    views = []
    for view in range(n_views):
        activations = frozen.image_activations(
            model, flowers, pixels, train_index, cut, config.augment, config.seed, view
        )
        views.append(to_device(activations, model.logit_scale.device))
    return views


def compute_text_activations(
    model: CLIP, flowers: Flowers, texts: Texts, config: Config
) -> torch.Tensor | None:
    """The activations of all texts behind the text tower's frozen part, (P, ...).

    None if no part of it is frozen, or with --no_cache.
    """
    _, blocks = cut_points(config.strategy, config.blocks)
    if blocks is None or config.no_cache:
        return None
    if blocks > 0 and config.captions:
        return None  # (P, L, width) of every caption would not fit into the memory
    activations = frozen.text_activations(model, flowers, texts.tokens, blocks)
    return activations.to(model.logit_scale.device)


def make_encoders(
    model: CLIP,
    views: list[torch.Tensor] | None,
    texts: Texts,
    text_activations: torch.Tensor | None,
    config: Config,
) -> tuple[Callable, Callable]:
    """Two functions of a Batch's parts: images -> features (b, D), text_rows (p,) -> (p, D)."""
    device = model.logit_scale.device
    image_cut, text_blocks = cut_points(config.strategy, config.blocks)
    image_trunk, image_rest = split_image_tower(model, image_cut)
    text_trunk, text_rest = split_text_tower(model, text_blocks)
    tokens = texts.tokens.to(device)  # (P, L)
    # A text's feature is read at its end token, which has the highest id.
    ends = tokens.argmax(dim=1)  # (P,)

    def encode_images(images: torch.Tensor) -> torch.Tensor:
        activations = image_trunk(images) if views is None else images
        return image_rest(activations)

    def encode_texts(rows: torch.Tensor) -> torch.Tensor:
        if text_activations is None:
            activations = text_trunk(tokens[rows])
        else:
            activations = text_activations[rows]
        return text_rest(activations, ends[rows])

    return encode_images, encode_texts


# -----------------------------------------------------------------------------
# optimiser, and what an interrupted run left


@torch.no_grad()
def fit_bias(
    model: CLIP,
    encoders: Sequence[Callable],
    data: TrainingData,
    batch_size: int,
    processes: devices.Processes,
) -> None:
    """Give the sigmoid loss the bias that suits the first batch best, the same in all processes.

    Raises UserError if the batch has none.
    """
    batch = next(data.batches(0, batch_size, processes))
    features = []
    for encoder, inputs in zip(encoders, (batch.images, batch.text_rows)):
        chunks = inputs.split(data.config.chunk_size or len(inputs))
        features.append(torch.cat([encoder(chunk) for chunk in chunks]))
    images, texts = gather_pairs(*features, batch, processes)  # (B, D) and (B, D)
    model.logit_bias.fill_(best_bias(images, texts, model.logit_scale.exp(), batch.matches))


def make_optimizer(
    model: CLIP, trained: dict[str, torch.nn.Parameter], config: Config
) -> torch.optim.AdamW:
    """AdamW with the betas and epsilon of CLIP's vision transformers (Radford et al. 2021)."""
    of_loss = [p for name, p in model.named_parameters() if name in LOSS_PARAMETERS]
    weights = weights_of_towers(trained)
    groups = layerwise_groups(weights, layers_above(model), config.lr, config.wd, config.lr_decay)
    # The temperature has a learning rate of its own, which is the bias's, too.
    groups.append({"params": of_loss, "weight_decay": 0.0, "peak": config.tau_lr})
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


def weights_of_towers(trained: dict[str, torch.nn.Parameter]) -> dict[str, torch.nn.Parameter]:
    """The trained parameters without those of the loss."""
    return {name: p for name, p in trained.items() if name not in LOSS_PARAMETERS}


def digest_of_weights(model: CLIP) -> str:
    """A fingerprint of all weights, by which WiSE-FT knows the start of the run again."""
    return frozen.fingerprint(model.state_dict()).hex()


def digest_of_start(model: CLIP, config: Config) -> str:
    """A fingerprint by which a resumed run knows what it started from.

    Of the weights that are not trained; with --pull of all, as those that are trained are pulled
    back to their start.
    """
    if config.pull:
        return config.start
    state = model.state_dict(keep_vars=True)  # keeps requires_grad; BatchNorm statistics have none
    fixed = {name: tensor for name, tensor in state.items() if not tensor.requires_grad}
    return frozen.fingerprint(fixed).hex()


def restore(
    path: Path,
    start_digest: str,
    trained: dict[str, torch.nn.Parameter],
    average: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> tuple[int, float]:
    """Give all of them what a checkpoint holds; returns its epochs and seconds.

    Raises UserError if it is damaged, or of another run; the program must not go on with the model.
    """
    progress = load_checkpoint(path, trained, optimizer)
    if progress.get("start") != start_digest:
        raise UserError(f"{path} is not of this run: it started from other weights")
    restore_average(path, average, progress)
    restore_scaler(path, scaler, progress)
    try:
        return int(progress["epoch"]), float(progress["seconds"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"{path} is damaged: it does not say how far the run came") from None


def rows_until(epoch: int, metrics_file: Path) -> list[dict]:
    """The rows of metrics.jsonl up to a checkpoint's epoch; none in a new run.

    Steps after the checkpoint were lost and are done again, so their rows are dropped.
    """
    return [row for row in files.read_lines(metrics_file, "epoch") if row["epoch"] <= epoch]


def start_tracker(
    folder: Path, rows: list[dict], config: Config, processes: devices.Processes
) -> Tracker:
    """The run in W&B, of the main process only."""
    mode = config.wandb if processes.is_main else "disabled"
    tracker = start_wandb(mode, folder, config.record(), resume=bool(config.resume))
    for row in rows:
        tracker.log_row(row)  # unless W&B has it
    return tracker


def open_run_folder(
    flowers: Flowers, train_index: torch.Tensor, config: Config, processes: devices.Processes
) -> Path:
    """The folder of the run, made by the main process unless the run is resumed."""
    if not processes.is_main:
        return Path(config.resume or config.runs)  # the others write nothing
    splits = flowers.splits | {"train": train_index}
    trained_on = image_ids(flowers, train_index.numpy()) if config.trains else []
    if config.resume:
        folder = Path(config.resume)
        runs.check_same_images(folder, splits, trained_on)
    else:
        folder = runs.new_run(config.runs, config.name, config.record(), splits)
    # Before the first step; a resumed run has it already.
    runs.write_trained_on(folder, trained_on, config.architecture)
    return folder


def count_parameters(model: CLIP, data: TrainingData) -> dict[str, int]:
    """Numbers of parameters, as result.json keeps them: trained ones of each part, and of all."""
    classes, _ = data.classes
    config = data.config
    counts = strategies.count_trainable(model, config.strategy, len(classes), config.start_from)
    sizes = {f"trainable_{part}": count for part, count in counts.items()}
    sizes["parameters"] = sum(p.numel() for p in model.parameters())
    return sizes


def print_start(
    folder: Path,
    first_epoch: int,
    work: str,
    batch_size: int,
    texts: Texts,
    model: CLIP,
    sizes: dict[str, int],
    config: Config,
) -> None:
    """Print what is about to be trained, and warnings if captions or the batch are cut.

    work: the numbers of images and steps, in words. batch_size: of all processes together.
    """
    if first_epoch > 0:
        print(f"resuming {folder} after epoch {first_epoch} of {config.epochs}")
    # The scale and the head are named only if they are trained.
    parts = []
    for part, parameters in towers(model).items():
        count = sizes[f"trainable_{part}"]
        if count > 0 or part != "scale":
            total = sum(p.numel() for p in parameters)
            parts.append(f"{part} {count:,} of {total:,}")
    if sizes["trainable_head"]:
        parts.append(f"head {sizes['trainable_head']:,}")
    print(
        f"{folder}: {config.architecture}, {config.strategy}, {work} on "
        f"{model.logit_scale.device}; trainable {', '.join(parts)}; "
        f"{sizes['parameters']:,} parameters"
    )
    evaluate.warn_of_cut_captions(texts.n_cut, len(texts.tokens), model.context_length)
    if config.epochs:
        note_cut_batch(config.batch_size, batch_size, config.processes)


def progress_bar(done: int, total: int, processes: devices.Processes) -> tqdm:
    """A bar of steps, hidden if there are none, and in all processes but the main one."""
    hidden = total == 0 or not processes.is_main
    return tqdm(total=total, initial=done, unit="step", desc="training", disable=hidden)


def check_finite(
    loss: float, weights: Iterable[torch.Tensor], step: int, checkpoint_file: Path
) -> None:
    """Raise UserError if the loss or a weight is no finite number."""
    if diverged(loss, list(weights)):
        raise UserError(
            f"the loss is {loss} at step {step}, or a weight no number after it: lower --lr; "
            f"the last whole epoch is in {checkpoint_file}"
        )


# -----------------------------------------------------------------------------
# results


def evaluate_images(
    model: CLIP,
    head: evaluate.Head,
    flowers: Flowers,
    pixels: torch.Tensor,
    index: np.ndarray,
    captions: list[list[str]] | None,
) -> tuple[dict[str, float], torch.Tensor]:
    """All metrics of the images at `index` (m,) under a head, and their logits (m, C).

    head: weight (C, D) and bias (C,). captions: of each image; the first one is for the retrieval
    of image and sentence.
    """
    sentence_features = None
    if captions:
        sentence_features = text_features(model, [captions[i][0] for i in index])
    features = image_features(model, pixels, torch.tensor(index))  # (m, D)
    labels = flowers.labels[index]
    metrics, _ = evaluate.evaluate_features(features, head, labels, sentence_features)
    return metrics, evaluate.class_logits(features, head)


def evaluate_val(
    model: CLIP,
    flowers: Flowers,
    pixels: torch.Tensor,
    val_index: np.ndarray,
    captions: list[list[str]] | None,
    sentences: evaluate.Prompts | None,
    config: Config,
) -> dict[str, float]:
    """The metrics of the val images between epochs, under their names in metrics.jsonl."""
    head = evaluate.zero_shot_head(model, flowers.class_names, config.prompt_template, sentences)
    metrics, _ = evaluate_images(model, head, flowers, pixels, val_index, captions)
    return evaluate.with_split("val", metrics)


def fit_head(
    model: CLIP,
    zero_shot: evaluate.Head,
    flowers: Flowers,
    sentences: evaluate.Prompts | None,
    data: TrainingData,
    eval_index: np.ndarray,
) -> tuple[evaluate.Head, dict, dict, float]:
    """The head of `linear`, the content of classifier.pt, how it was fitted, and the seconds.

    With --holdout the penalty (C, or the pull) is chosen on val, unless a flag says it. Prints it.
    """
    config = data.config
    start = time.perf_counter()
    features = torch.cat(data.views).cpu()  # (views * n, D)
    labels = data.labels[data.index].repeat(len(data.views))
    sample_weight = None
    if config.cross_modal:
        texts, text_labels = prompt_features(model, flowers, sentences, labels, config)
        sample_weight = strategies.modality_weights(len(features), len(texts))
        features, labels = torch.cat([features, texts]), torch.cat([labels, text_labels])
    val = None
    if config.holdout:
        val_index = torch.tensor(eval_index)
        val = image_features(model, data.pixels, val_index), data.labels[val_index]

    chosen_on = "val" if val else "default"
    if config.start_from == "zero_shot":
        if config.pull is not None:
            chosen_on = "--pull"
        scale = model.logit_scale.exp().item()
        head, strength, iterations = strategies.fit_pulled(
            features, labels, zero_shot, scale, config.pull, val, sample_weight
        )
        what, penalty = "classifier pulled to zero-shot with LAMBDA", "fitted_pull"
    else:
        if config.inverse_penalty is not None:
            chosen_on = "--inverse_penalty"
        head, strength, iterations = strategies.fit_linear(
            features, labels, zero_shot, config.inverse_penalty, val, sample_weight
        )
        what, penalty = "logistic regression with C", "fitted_C"
    choice = " (chosen on val)" if chosen_on == "val" else ""
    print(f"{what} = {strength:g}{choice}, {iterations} iterations")
    weight, bias = head
    classifier = {"weight": weight, "bias": bias, "class_names": list(flowers.class_names)}
    fitted = {penalty: strength, "chosen_on": chosen_on}  # for result.json
    return head, classifier, fitted, time.perf_counter() - start


def prompt_features(
    model: CLIP,
    flowers: Flowers,
    sentences: evaluate.Prompts | None,
    labels: torch.Tensor,
    config: Config,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The features (P, D) of all prompts of the classes in `labels`, and their classes (P,)."""
    prompts = evaluate.class_prompts(
        flowers.class_names, config.prompt_template, sentences, model.context_length
    )
    trained_classes = labels.unique()
    texts = [text for c in trained_classes for text in prompts[c]]
    counts = torch.tensor([len(prompts[c]) for c in trained_classes])
    return text_features(model, texts), trained_classes.repeat_interleave(counts)


def fit_temperature(
    folder: Path, logits: torch.Tensor, labels: np.ndarray, config: Config
) -> dict[str, float]:
    """With --holdout leave calibration.json: the temperature for which the NLL on val is least.

    logits: (m, C); labels: (m,). Returns what result.json keeps of it, and prints it. Nothing here
    is divided by it: --calibrated of baseline_eval.py does that, on other images.
    """
    if not config.holdout:
        return {}
    temperature = calibration.fit_temperature(logits.numpy(), labels)
    if temperature is None:
        print(
            f"no temperature is best on these {len(labels):,} val images: all are right, or the "
            "answers are no better than chance"
        )
        return {}
    contents = {"temperature": temperature, "split": "val", "images": len(labels)}
    files.write_json(folder / calibration.FILE, contents)
    # Too low for other images, as the temperature was chosen on these.
    nll = calibration.nll(logits.numpy(), labels, temperature)
    print(
        f"temperature of least NLL on val: T = {temperature:.3f}, which gives {nll:.3f} nats on "
        "these same images"
    )
    return {"calibration_temperature": temperature, "val/nll_calibrated": nll}


def final_loss_parameters(model: CLIP, config: Config) -> dict[str, float]:
    """Those at the end, under their names in result.json."""
    if config.strategy == "linear" and config.start_from == "random":
        return {}  # its head has no temperature
    values = {name: p.item() for name, p in loss_parameters(model).items()}
    final = {"tau": math.exp(-values["logit_scale"])}
    if "logit_bias" in values:
        final["final_logit_bias"] = values["logit_bias"]
    return final


def save_model(
    folder: Path, state: dict[str, torch.Tensor], classifier: dict | None, flowers: Flowers
) -> None:
    """Write model.pt, the names of its classes, and classifier.pt if the strategy has one."""
    # First the classifier: a model.pt without it would be evaluated by its prompts.
    if classifier:
        files.save_tensors(folder / "classifier.pt", classifier)
    runs.write_class_names(folder, flowers.class_names)
    files.save_tensors(folder / "model.pt", state)


def draw_curve(rows: list[dict], folder: Path) -> None:
    """Draw curve.png from the rows of metrics.jsonl, if there are any: `linear` has no steps."""
    from flowers import figures  # here, as it loads matplotlib: training does not wait for that

    if rows:
        figures.training_curve(rows, folder / "curve.png")


def costs(
    frozen_seconds: float,
    train_seconds: float,
    eval_seconds: float,
    n_images: int,
    device: torch.device,
) -> dict[str, float]:
    """Time and memory of the run, as result.json keeps them.

    n_images: trained on, over all epochs.
    """
    row = {"frozen_seconds": round(frozen_seconds, 2), "train_seconds": round(train_seconds, 2)}
    # --epochs 0 takes no time.
    if train_seconds:
        row["train_images_per_s"] = round(n_images / train_seconds, 1)
    row["eval_seconds"] = round(eval_seconds, 2)
    row["peak_memory_mb"] = devices.peak_memory_mb(device)
    return row


def describe(
    folder: Path,
    flowers: Flowers,
    eval_index: np.ndarray,
    overlap: int | str,
    head: evaluate.Head,
    sentences: evaluate.Prompts | None,
    model: CLIP,
    config: Config,
) -> dict:
    """What the accuracy was measured with: dataset, split, names, prompts, weights, overlap."""
    prompts = evaluate.prompts_in_words(config.prompt_template, head, config.prompts, sentences)
    protocol = evaluate.protocol(
        flowers,
        config.eval_split,
        len(eval_index),
        config.class_names,
        prompts,
        weights=f"{folder} (from {model.origin})",
    )
    return protocol | {"overlap": overlap}


def print_results(
    folder: Path, metrics: dict[str, float], result: dict, protocol: dict, config: Config
) -> None:
    """A table of the metrics, a line of the costs, and the command that evaluates again."""
    column = f"{folder.name} ({config.eval_split})"
    print(evaluate.results_table(column, metrics, protocol))
    print(
        f"frozen parts {result['frozen_seconds']:.0f} s, training {result['train_seconds']:.0f} s, "
        f"peak memory {result['peak_memory_mb']:,} MB; results and pictures in {folder}/"
    )
    # Dataset, splits, names and prompts are taken over from the run.
    flags = {"architecture": str(folder), "captions": config.captions}
    if config.holdout:
        flags["split"] = config.eval_split
    flags["allow_overlap"] = bool(protocol["overlap"])
    flags |= runs.flags_for_next(config.runs, config.wandb)
    print(f"next: {runs.command_line('baseline_eval.py', flags)}")


if __name__ == "__main__":
    main(config)
