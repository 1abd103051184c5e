"""Fine-tune Qwen2-VL with LoRA to name flowers; the loss is on the answer alone.

    python qwen_train.py                                   # Qwen2-VL-2B, one GPU with about 8 GB
    python qwen_train.py --answer described --captions captions.jsonl.gz     # describe, then name
    python qwen_train.py --data_root sample --model tiny   # any machine, offline, two minutes
    python qwen_train.py --resume runs/NAME                # goes on after a kill

Leaves runs/NAME/adapter/, which `python qwen_eval.py --adapter runs/NAME` evaluates. The vision
tower is frozen, and its features are computed once, unless --also_train names it. tiny has random
weights: LoRA on a frozen random model learns little, so its vision tower is trained whole.
"""

import argparse
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from flowers import UserError, add_switch, command, devices, figures, files, runs, training
from flowers.data import Flowers, add_data_arguments, image_ids, open_from_flags, subset
from flowers.devices import autocast
from flowers.layouts import read_captions
from flowers.qwen import adapters, memory, models
from flowers.qwen.answers import answer_length, answer_loss, one_line
from flowers.qwen.features import ImageFeatures, image_features
from flowers.qwen.memory import Work, read_batch_size
from flowers.qwen.prompts import (
    QUESTIONS,
    encode,
    move,
    open_images,
    patches,
    prefetch,
    question_of,
)
from flowers.tracking import start_wandb

# Share of the steps. train.py warms up twice as long; the results of Qwen were measured with this.
WARMUP = 0.05
# Of flags that are left out.
DEFAULTS = {"rank": 8, "also_train": [], "epochs": 3, "batch_size": 16, "lr": 1e-4}
TINY_DEFAULTS = {
    "rank": 16,
    "also_train": ["visual"],
    "epochs": 12,
    "batch_size": 32,
    "lr": 1e-3,
}


# -----------------------------------------------------------------------------
# settings


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    # model and answer
    group = parser.add_argument_group("model and answer")
    group.add_argument(
        "--model",
        type=files.user_path,
        default=models.DEFAULT,
        help="a name on the hub, a folder, tiny or random-2b (random weights) "
        "(default: %(default)s)",
    )
    add_switch(
        group,
        "--load_4bit",
        help="the frozen blocks of the language model in 4 bits a weight (QLoRA), a quarter of the "
        "memory; needs requirements-4bit.txt",
    )
    group.add_argument(
        "--max_pixels",
        type=int,
        default=512 * 512,
        help="scale larger images down to so many pixels; a token stands for 28 x 28 of them in "
        "Qwen2-VL and Qwen2.5-VL, 32 x 32 in Qwen3-VL (default: %(default)s)",
    )
    group.add_argument(
        "--answer",
        choices=list(QUESTIONS),
        default="brief",
        help="brief: the name; described: a sentence of --captions, then the name "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--captions",
        type=files.user_path,
        help="captions.jsonl[.gz] with sentences about the training images; each epoch takes one "
        "of an image's, at random",
    )

    # LoRA
    group = parser.add_argument_group("LoRA")
    group.add_argument("--rank", type=int, help="rank of the matrices (default: 8; tiny: 16)")
    group.add_argument("--alpha", type=float, help="scale times rank (default: twice the rank)")
    group.add_argument(
        "--also_train",
        nargs="*",
        metavar="MODULE",
        help="modules that are trained whole and saved with the adapter, by the end of their path: "
        "merger, visual, visual.blocks.31, qkv (default: none; tiny: visual)",
    )


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    # optimisation
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, help="passes over the images (default: 3; tiny: 12)")
    group.add_argument(
        "--batch_size",
        type=read_batch_size,
        metavar="N|auto",
        help="images a step (default: 16; tiny: 32); auto: the default, in chunks that fit into "
        "the GPU's free memory",
    )
    group.add_argument(
        "--chunk_size",
        type=int,
        default=0,
        help="images in memory at a time, same gradient (default: 0, the whole batch)",
    )
    add_switch(
        group,
        "--keep_activations",
        help="faster, but more memory (default: where it does not fit into the GPU's free memory, "
        "blocks are computed again in the backward pass)",
    )
    group.add_argument("--lr", type=float, help="peak learning rate (default: 1e-4; tiny: 1e-3)")
    group.add_argument("--wd", type=float, default=0.0, help="weight decay (default: %(default)s)")
    group.add_argument(
        "--augment",
        choices=["none", "crop"],
        help="crop: crop and mirror at random, so that the vision tower runs in every step "
        "(default: none; crop if the vision tower is trained)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of adapter, order and augmentation (default: %(default)s)",
    )

    devices.add_device_arguments(parser.add_argument_group("machine"))

    # run
    group = parser.add_argument_group("run")
    group.add_argument(
        "--save_every",
        type=int,
        default=100,
        help="steps from checkpoint to checkpoint (default: %(default)s)",
    )
    runs.add_run_arguments(group, resume=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # data
    add_data_arguments(parser)
    parser.add_argument(
        "--images",
        type=int,
        default=0,
        help="train on so many, drawn with --seed (default: 0, all)",
    )
    add_model_arguments(parser)
    add_training_arguments(parser)
    return parser


def parse_arguments() -> argparse.Namespace:
    """The flags of the command line, or with --resume those that the run was started with.

    Ends the program if that run is finished. Raises UserError if there is no run to resume.
    """
    parser = make_parser()
    args = parser.parse_args()
    if not args.resume:
        return args
    folder = Path(args.resume)
    stored = runs.arguments_to_resume(folder, "qwen_train")
    if stored is None:
        raise SystemExit  # it is finished, which was printed
    # One flag with several values, or none.
    also_train = stored.pop("also_train", None)
    args = runs.parse_stored(parser, args, stored)
    is_list = isinstance(also_train, list) and all(isinstance(name, str) for name in also_train)
    if not (also_train is None or is_list):
        raise UserError(f"nothing to resume in {folder}: its args.json is damaged (also_train)")
    args.also_train = also_train
    return args


@dataclass(frozen=True)
class Config:
    """The settings of a run, as args.json has them: every flag, with its default in place."""

    # data
    data_root: str
    splits_path: str | None
    splits_base: int | None
    class_names: str
    splits: str | None
    holdout: bool
    images: int
    # model and answer
    model: str
    load_4bit: bool
    max_pixels: int
    answer: str
    captions: str | None
    # LoRA
    rank: int
    alpha: float
    also_train: list[str]
    # optimisation
    epochs: int
    batch_size: int
    chunk_size: int
    keep_activations: bool
    lr: float
    wd: float
    augment: str
    seed: int
    # machine
    device: str
    precision: str
    # run
    save_every: int
    runs: str
    wandb: str


def resolve(args: argparse.Namespace) -> Config:
    """Return the settings that the flags mean. Raises UserError if they contradict one another."""
    defaults = TINY_DEFAULTS if args.model == "tiny" else DEFAULTS
    for flag, value in defaults.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if args.alpha is None:
        args.alpha = 2.0 * args.rank

    # nan fails every comparison, so these say what must hold.
    fits_chunk = args.batch_size == 0  # auto
    if fits_chunk:
        args.batch_size = defaults["batch_size"]
    at_least_one = min(args.rank, args.epochs, args.batch_size, args.save_every) >= 1
    not_negative = min(args.chunk_size, args.images) >= 0
    if not (at_least_one and not_negative and args.lr > 0 and args.wd >= 0):
        raise UserError(
            "--rank, --epochs, --batch_size and --save_every must be at least 1, --lr above 0, "
            "--wd, --chunk_size and --images not below 0"
        )
    if (args.answer == "described") != bool(args.captions):
        raise UserError(
            "--answer described and --captions go together: descriptions are written by "
            "python qwen_eval.py --describe, or by people"
        )
    models.check_max_pixels(args.model, args.max_pixels)
    skeleton = models.load_skeleton(args.model) if args.also_train else None
    if args.augment is None:
        crops = skeleton is not None and adapters.trains_vision(skeleton, args.also_train)
        args.augment = "crop" if crops else "none"
    # After all checks: the device becomes torch's own.
    device = devices.choose_device(args.device)
    if args.load_4bit:
        models.check_4bit(args.model, device)
    args.device = str(device)
    args.precision = devices.set_precision(args.precision, device)
    config = Config(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Config)})
    if fits_chunk and not config.chunk_size:
        config = dataclasses.replace(config, chunk_size=chunk_that_fits(config, device))
    return config


def work_of(config: Config, skeleton, chunk_size: int, free: float | None) -> Work:
    """Return what the model does at a time; free: GB on the GPU, None on a CPU.

    Blocks are computed again where their results don't fit, unless they are to be kept.
    """
    work = Work(
        chunk_size,
        memory.tokens_of_image(config.model, skeleton, config.max_pixels),
        100 if config.captions else 50,  # about, of question and answer
        config.rank,
        config.precision,
        config.load_4bit,
        config.also_train,
    )
    recompute = not config.keep_activations and memory.must_recompute(skeleton, work, free)
    return dataclasses.replace(work, recompute=recompute)


def chunk_that_fits(config: Config, device: torch.device) -> int:
    """Return how many images fit into the free memory at a time, at most the batch."""
    skeleton = models.load_skeleton(config.model)
    free = memory.free_gigabytes(device)
    work = work_of(config, skeleton, config.batch_size, free)
    return memory.largest_batch(skeleton, work, free)


# -----------------------------------------------------------------------------
# batches


@dataclass(frozen=True)
class TrainingSet:
    """The N training images, and the batches that are made of them.

    index: (N,) positions in flowers.files. captions: N lists of sentences, or None.
    """

    config: Config
    flowers: Flowers
    index: np.ndarray
    captions: list[list[str]] | None

    @property
    def batch_size(self) -> int:
        return min(self.config.batch_size, len(self.index))

    @property
    def chunk_size(self) -> int:
        return min(self.config.chunk_size or self.batch_size, self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        # Images that fill no batch are left out; which ones they are changes with the epoch.
        return len(self.index) // self.batch_size

    def batch(self, step: int, processor, features: ImageFeatures | None) -> list[tuple]:
        """Return the chunks of a step's batch: images, as `hidden_states` takes them, and answers.

        They depend on seed and step alone, so that a resumed run sees what an unbroken one sees.
        features: of all N images; None if the vision tower runs in each step.
        """
        epoch, i = divmod(step, self.steps_per_epoch)
        seed = self.config.seed
        order = torch.randperm(len(self.index), generator=devices.generator(seed, epoch))
        positions = order[i * self.batch_size : (i + 1) * self.batch_size].tolist()
        generator = devices.generator(seed, epoch, i)
        chunks = []
        for start in range(0, self.batch_size, self.chunk_size):
            chunk = positions[start : start + self.chunk_size]  # the last may be shorter
            if features is None:
                image = self._patches(chunk, processor, generator)
            else:
                image = features.batch(chunk)
            answers = [self._answer(j, generator) for j in chunk]
            chunks.append((image, answers))
        return chunks

    def _patches(self, chunk: list[int], processor, generator) -> dict[str, torch.Tensor]:
        image_files = [self.flowers.files[self.index[j]] for j in chunk]
        # Without a generator, images stay as they are.
        crops = generator if self.config.augment == "crop" else None
        return patches(processor, open_images(image_files, crops))

    def _answer(self, j: int, generator: torch.Generator) -> str:
        """Return the class name of image j, under `described` after one of its captions."""
        name = self.flowers.class_names[self.flowers.labels[self.index[j]]]
        if self.captions is None:
            return name
        choice = int(torch.randint(len(self.captions[j]), (), generator=generator))
        return f"{one_line(self.captions[j][choice])}\n{name}"


def open_training_set(config: Config) -> TrainingSet:
    """Open the dataset and the captions. Raises UserError for what is missing or damaged."""
    flowers = open_from_flags(dataclasses.asdict(config))
    config = dataclasses.replace(config, splits=flowers.convention)
    index = subset(flowers.splits["train"], config.images, config.seed)
    captions = None
    if config.captions:
        captions = read_captions(config.captions, tuple(flowers.files[i] for i in index))
    return TrainingSet(config, flowers, index, captions)


# -----------------------------------------------------------------------------
# model and step


def prepare_model(config: Config, training_set: TrainingSet, device: torch.device):
    """Return the model with a new adapter, its processor, and the features that are kept, or None.

    Says before how much memory it takes.

    Raises UserError for a model that can't be loaded, or modules that it does not have.
    """
    skeleton = models.load_skeleton(config.model)
    free = memory.free_gigabytes(device)
    work = work_of(config, skeleton, training_set.chunk_size, free)
    print(memory.memory_line(config.model, skeleton, work, free))
    model, processor = models.load_model(
        config.model, device, max_pixels=config.max_pixels, load_4bit=config.load_4bit
    )
    features = None
    # Whether the vision tower makes the same of an image in every step.
    keeps = config.augment == "none" and not adapters.trains_vision(model, config.also_train)
    # Before the adapter, which leaves the vision tower as it is.
    if keeps:
        digest = models.vision_digest(model)
        features = image_features(
            model, processor, training_set.flowers, training_set.index, digest
        )
    model = adapters.add_adapter(
        model, config.rank, config.alpha, config.also_train, work.recompute
    )
    return model, processor, features


def train_step(
    model, processor, question: str, batch: list, optimizer, scaler, parameters: list, device
) -> float:
    """Update the adapter once. Returns the loss: the mean over all answer tokens, in nats."""
    # Counted before the first chunk, so that the gradient is the same however the batch is cut.
    n_tokens = 0
    for _, answers in batch:
        n_tokens += sum(answer_length(processor, answer) for answer in answers)

    batch_loss = 0.0
    for image, answers in batch:
        inputs = move(encode(processor, question, image["image_grid_thw"]), device)
        image = move(image, device)
        with autocast(device):
            loss_sum, _ = answer_loss(model, processor, inputs, image, answers)
        scaler.scale(loss_sum / n_tokens).backward()
        batch_loss += loss_sum.item() / n_tokens
    training.update(optimizer, parameters, scaler)
    return batch_loss


# -----------------------------------------------------------------------------
# results


def count_parameters(model) -> tuple[int, int]:
    """Return how many parameters are trained, and how many the model has without its adapter."""
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Modules that are trained whole are copies; the model's own stay beside them, frozen.
    n_frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return n_trained, n_frozen


def save_results(
    folder: Path,
    model,
    rows: list[dict],
    training_set: TrainingSet,
    seconds: float,
    settings: dict,
    tracker,
) -> None:
    """Leave adapter/, curve.png and result.json in the run folder, and print the main figures.

    rows: those of metrics.jsonl, one a step. seconds: of the training loop.
    """
    model.save_pretrained(folder / "adapter")
    figures.training_curve(rows, folder / "curve.png", "cross-entropy of an answer token (nats)")
    last_epoch = rows[-training_set.steps_per_epoch :]
    last_loss = float(np.mean([row["train/loss"] for row in last_epoch]))
    images_per_s = len(rows) * training_set.batch_size / max(seconds, 1e-9)
    n_trained, n_frozen = count_parameters(model)
    result = {
        "train/loss": round(last_loss, 5),
        "train_seconds": round(seconds, 2),
        "train_images_per_s": round(images_per_s, 1),
        "peak_memory_mb": devices.peak_memory_mb(settings["device"]),
        "trainable": n_trained,
        "parameters": n_frozen,
    }
    runs.finish(folder, {"name": folder.name} | result | settings)
    tracker.log(result)
    tracker.finish()
    print(
        f"trained {seconds:.0f} s, loss of the last epoch {last_loss:.3f} nats a token, "
        f"peak memory {result['peak_memory_mb']:,} MB"
    )
    # Dataset, splits and names are taken over from the run.
    flags = {"adapter": str(folder)}
    flags |= runs.flags_for_next(settings["runs"], settings["wandb"])
    print(f"next: {runs.command_line('qwen_eval.py', flags)}")


# -----------------------------------------------------------------------------
# the run


@command
def main():
    args = parse_arguments()
    config = resolve(args)
    device = torch.device(config.device)
    devices.seed_everything(config.seed, device)

    # -----------------------------------------------------------------------------
    # data and model
    training_set = open_training_set(config)
    config = training_set.config
    index = training_set.index
    batch_size = training_set.batch_size
    model, processor, features = prepare_model(config, training_set, device)
    question = question_of(config.answer)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = list(trained.values())
    n_trained, n_frozen = count_parameters(model)

    # -----------------------------------------------------------------------------
    # run folder and optimiser
    settings = {"job": "qwen_train", "architecture": config.model}
    settings |= dataclasses.asdict(config) | models.versions()
    if args.resume:
        folder = Path(args.resume)
    else:
        folder = runs.new_run(config.runs, args.name, settings, training_set.flowers.splits)
    # Before the first step; a resumed run has it already.
    runs.write_trained_on(folder, image_ids(training_set.flowers, index))
    metrics_file = folder / "metrics.jsonl"
    checkpoint_file = folder / "checkpoint.pt"

    # One group, unlike train.py: weight decay is for all parameters, and earlier checkpoints have
    # this layout.
    group = {"params": parameters, "weight_decay": config.wd, "peak": config.lr}
    optimizer = torch.optim.AdamW([group], lr=config.lr, betas=(0.9, 0.98))
    scaler = devices.gradient_scaler(device)
    total_steps = config.epochs * training_set.steps_per_epoch

    # -----------------------------------------------------------------------------
    # resume
    first_step, seconds = 0, 0.0
    if args.resume and checkpoint_file.exists():
        progress = training.load_checkpoint(checkpoint_file, trained, optimizer)
        training.restore_scaler(checkpoint_file, scaler, progress)
        first_step, seconds = int(progress["step"]), float(progress["seconds"])
        print(f"resuming {folder} after step {first_step} of {total_steps}")
    # Steps after the checkpoint are done again.
    rows = [row for row in files.read_lines(metrics_file, "step") if row["step"] <= first_step]
    files.write_lines(metrics_file, rows)
    tracker = start_wandb(config.wandb, folder, settings, resume=bool(args.resume))
    for row in rows:
        tracker.log_row(row)  # unless W&B has it
    print(
        f"{folder}: {config.model}, {len(index):,} images, {total_steps:,} steps of {batch_size} "
        f"on {device}; trainable {n_trained:,} beside {n_frozen:,}; "
        f"vision features {'once' if features is not None else 'in each step'}"
    )

    # -----------------------------------------------------------------------------
    # training loop
    model.train()
    bar = tqdm(total=total_steps, initial=first_step, unit="step", desc="training")
    start = time.perf_counter()
    # The next batches are made in threads while the model is at work.
    steps = range(first_step, total_steps)
    batches = prefetch(lambda step: training_set.batch(step, processor, features), steps)
    for batch, step in zip(batches, steps):
        factor = training.learning_rate_factor(step, total_steps, WARMUP)
        training.set_learning_rate(optimizer, factor)
        loss = train_step(model, processor, question, batch, optimizer, scaler, parameters, device)

        # No checkpoint may hold weights that are not finite. Looking at all of them takes time, so
        # it is done only where one is saved.
        last_step = step + 1 == total_steps
        saves = last_step or (step + 1) % config.save_every == 0
        if training.diverged(loss, parameters if saves else ()):
            bar.close()
            raise UserError(
                f"the loss is {loss} at step {step}: lower --lr; "
                f"the last checkpoint is {checkpoint_file}"
            )
        epoch = step // training_set.steps_per_epoch + 1
        learning_rate = config.lr * factor
        row = {"epoch": epoch, "step": step + 1, "train/loss": loss, "train/lr": learning_rate}
        rows.append(row)
        tracker.log_row(row)
        bar.set_postfix(epoch=epoch, loss=f"{loss:.3f}", refresh=False)
        bar.update()

        # Metrics first: rows without a checkpoint are dropped on a resume, but none may be missing.
        if saves:
            now = time.perf_counter()
            seconds += now - start
            start = now
            files.write_lines(metrics_file, rows)
            progress = {"step": step + 1, "seconds": seconds, "scaler": scaler.state_dict()}
            training.save_checkpoint(checkpoint_file, trained, optimizer, **progress)
    bar.close()

    save_results(folder, model, rows, training_set, seconds, settings, tracker)


if __name__ == "__main__":
    main()
