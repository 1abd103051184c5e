"""Fine-tune Qwen2-VL with LoRA to name flowers; the loss is on the answer alone.

    python qwen_train.py                                   # Qwen2-VL-2B, one GPU with about 8 GB
    python qwen_train.py --shots 16 --list_names           # few images, the names in the question
    python qwen_train.py --holdout --eval_every 1          # to choose settings: on val, not test
    python qwen_train.py --answer described --captions captions.jsonl.gz     # describe, then name
    torchrun --nproc_per_node=4 qwen_train.py              # four GPUs, --batch_size images each
    python qwen_train.py --data_root sample --model tiny   # any machine, offline, two minutes
    python qwen_train.py --resume runs/NAME                # goes on after a kill
    python qwen_train.py --resume runs/NAME --merge        # a finished run as a model folder

Leaves runs/NAME/adapter/, which `python qwen_eval.py --adapter runs/NAME` evaluates; with --merge
runs/NAME/merged/, too, a model by itself. The vision tower is frozen, and its features are computed
once, unless --also_train names it. tiny has random weights: LoRA on a frozen random model learns
little, so its vision tower is trained whole.
"""

import argparse
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from flowers import (
    PRECISIONS,
    UserError,
    add_device_arguments,
    add_switch,
    check_seed,
    command,
    files,
    runs,
    world_size,
)
from flowers.choices import MAX_VAL_SHOTS
from flowers.data import add_data_arguments
from flowers.qwen_settings import (
    AUTO,
    CLASSES,
    QUESTIONS,
    add_model_arguments,
    add_question_arguments,
    check_questions,
    read_batch_size,
    settings_of,
)

# Share of the steps. train.py warms up twice as long; the results of Qwen were measured with this.
WARMUP = 0.05
# Of --val_images, and the longest description that is ranked after, in tokens.
VAL_IMAGES = 200
DESCRIPTION_TOKENS = 80
# Of flags that are left out.
DEFAULTS = {"rank": 8, "also_train": [], "epochs": 3, "batch_size": 16, "lr": 1e-4}
TINY_DEFAULTS = {
    "rank": 16,
    "also_train": ["visual"],
    "epochs": 12,
    "batch_size": 32,
    "lr": 1e-3,
}
AS_FITS = -1  # the size of chunks until the free memory has decided it


# -----------------------------------------------------------------------------
# settings


def add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    # model and answer
    group = parser.add_argument_group("model and answer")
    add_model_arguments(group)
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
    add_question_arguments(group)

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


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("images")
    # Which of the training images, as in train.py: a seed draws the same ones.
    group.add_argument(
        "--classes",
        choices=CLASSES,
        default="all",
        help="train on the first half of the classes, the second, or all; only these are listed, "
        "and ranked between epochs (default: %(default)s)",
    )
    group.add_argument(
        "--shots",
        type=int,
        help="train on at most so many images a class, drawn by --seed (default: all)",
    )
    group.add_argument(
        "--images",
        type=int,
        default=0,
        help="train on so many of them, drawn by --seed (default: 0, all)",
    )
    # Val, between epochs.
    group.add_argument(
        "--eval_every",
        type=int,
        default=0,
        help="rank val images every so many epochs; needs --holdout (default: 0, never)",
    )
    group.add_argument(
        "--val_images",
        type=int,
        help=f"so many val images, drawn by --seed; 0 for all (default: {VAL_IMAGES})",
    )
    group.add_argument(
        "--val_shots",
        type=int,
        help="instead of --val_images at most so many a class, drawn by --seed (default: with "
        f"--holdout as many as --shots, at most {MAX_VAL_SHOTS})",
    )
    runs.add_overlap_argument(group)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    # optimisation
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, help="passes over the images (default: 3; tiny: 12)")
    group.add_argument(
        "--batch_size",
        type=read_batch_size,
        metavar="N|auto",
        help="images a step, of each process (default: 16; tiny: 32); auto: the default, in chunks "
        "that fit into the GPU's free memory",
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
        choices=["none", "flip", "crop"],
        help="none, mirror, or mirror and random crop, for which the vision tower runs in every "
        "step (default: none; crop if the vision tower is trained)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of adapter, order and augmentation (default: %(default)s)",
    )

    add_device_arguments(parser.add_argument_group("machine"))

    # run
    group = parser.add_argument_group("run")
    group.add_argument(
        "--save_every",
        type=int,
        default=100,
        help="steps from checkpoint to checkpoint (default: %(default)s)",
    )
    add_switch(
        group,
        "--merge",
        help="export merged/, a model folder for transformers and for --model; with --resume also "
        "of a finished run",
    )
    runs.add_run_arguments(group, resume=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser)
    add_image_arguments(parser)
    add_answer_arguments(parser)
    add_training_arguments(parser)
    return parser


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
    # images
    classes: str
    shots: int | None  # None: all images
    images: int
    eval_every: int
    val_images: int | None  # None: val_shots
    val_shots: int | None  # None: val_images
    allow_overlap: bool
    # model and answer
    model: str
    load_4bit: bool
    max_pixels: int
    answer: str
    captions: str | None
    question: list[str] | None  # None: that of the answer
    list_names: bool
    list_order: str
    name_case: str
    # LoRA
    rank: int
    alpha: float
    also_train: list[str]
    # optimisation
    epochs: int
    batch_size: int  # of each process
    chunk_size: int
    keep_activations: bool
    lr: float
    wd: float
    augment: str | None  # None: not known before the modules to train are
    seed: int
    # machine
    device: str  # of the main process; before `main` what the flag says, as precision
    precision: str
    # run
    save_every: int
    merge: bool
    runs: str
    wandb: str
    processes: int

    def evaluates_after(self, epoch: int) -> bool:
        """Whether val is ranked after an epoch (counted from 1)."""
        if self.eval_every == 0:
            return False
        return epoch % self.eval_every == 0 or epoch == self.epochs


def read_settings() -> tuple[argparse.Namespace, Config | None]:
    """The flags of the command line, and the settings that they mean.

    With --resume, the settings that the run was started with; None where it is finished, and is to
    be merged. Ends the program where nothing is left to do. Raises UserError if there is no run to
    resume, if it was started with another number of processes, or as `resolve` does.
    """
    parser = make_parser()
    args = parser.parse_args()
    if args.resume:
        folder = Path(args.resume)
        stored = runs.arguments_to_resume(folder, "qwen_train")
        if stored is None and not (args.merge or lacks_merged(folder)):
            raise SystemExit  # it is finished, which was printed
        if stored is None:
            check_merging(folder)
            return args, None
        args = parse_stored(parser, args, stored)
        runs.check_typed(parser, args)
    return args, resolve(args, world_size())


def lacks_merged(folder: Path) -> bool:
    """Whether a finished run was to be merged, and was killed before it was."""
    return bool(runs.read_arguments(folder).get("merge")) and not (folder / "merged").exists()


def check_merging(folder: Path) -> None:
    """Raise UserError if args.json of a finished run does not say what its adapter belongs to."""
    settings = runs.read_arguments(folder)
    is_sound = {
        "model": isinstance(settings.get("model"), str),
        "max_pixels": type(settings.get("max_pixels")) is int,
        "precision": settings.get("precision", "auto") in ("auto", *PRECISIONS),
    }
    for flag, sound in is_sound.items():
        if not sound:
            raise UserError(f"nothing to merge in {folder}: its args.json is damaged ({flag})")


def parse_stored(
    parser: argparse.ArgumentParser, args: argparse.Namespace, stored: dict
) -> argparse.Namespace:
    """The arguments of a run that is resumed, as `runs.parse_stored` checks them."""
    # Older runs had one process.
    runs.check_processes(Path(args.resume), stored.get("processes", 1), world_size())
    stored["merge"] = stored.get("merge") or args.merge
    # One flag with several values, or none.
    also_train = stored.pop("also_train", None)
    args = runs.parse_stored(parser, args, stored)
    is_list = isinstance(also_train, list) and all(isinstance(name, str) for name in also_train)
    if not (also_train is None or is_list):
        raise UserError(
            f"nothing to resume in {args.resume}: its args.json is damaged (also_train)"
        )
    args.also_train = also_train
    return args


def resolve(args: argparse.Namespace, processes: int) -> Config:
    """Return the settings that the flags mean. Raises UserError if they contradict one another."""
    check_seed(args.seed)
    defaults = TINY_DEFAULTS if args.model == "tiny" else DEFAULTS
    for flag, value in defaults.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if args.alpha is None:
        args.alpha = 2.0 * args.rank

    # nan fails every comparison, so these say what must hold.
    fits_chunk = args.batch_size == AUTO
    if fits_chunk:
        args.batch_size = defaults["batch_size"]
    at_least_one = min(args.rank, args.epochs, args.batch_size, args.save_every) >= 1
    not_negative = min(args.chunk_size, args.images) >= 0
    in_range = 0 < args.lr < math.inf and 0 < args.alpha < math.inf and 0 <= args.wd < math.inf
    if not (at_least_one and not_negative and in_range):
        raise UserError(
            "--rank, --epochs, --batch_size and --save_every must be at least 1, --lr and --alpha "
            "above 0, --wd, --chunk_size and --images not below 0, none of them infinite"
        )
    if (args.answer == "described") != bool(args.captions):
        raise UserError(
            "--answer described and --captions go together: descriptions are written by "
            "python qwen_eval.py --describe, or by people"
        )
    if args.answer == "described" and len(args.question or ()) > 1:
        raise UserError(
            "--answer described takes one question: qwen_eval.py ranks after one answer"
        )
    if fits_chunk and not args.chunk_size:
        args.chunk_size = AS_FITS
    check_images(args)
    check_questions(args.question, args.list_names, args.list_order)
    args.processes = processes
    return settings_of(Config, args)


def check_images(args: argparse.Namespace) -> None:
    """Fill in which val images are ranked; raise UserError for flags that can't be meant."""
    if args.eval_every and not args.holdout:
        raise UserError("--eval_every needs --holdout: test images are evaluated once, at the end")
    if args.val_shots is not None and not args.holdout:
        raise UserError("--val_shots needs --holdout: without it no val is set apart")
    if args.val_shots is not None and args.val_images is not None:
        raise UserError("--val_shots and --val_images both say which val images: give one of them")
    if args.val_images is not None and not args.eval_every:
        raise UserError("--val_images is for --eval_every: give both")
    # A resumed run has its own.
    if args.val_images is None and args.val_shots is None and not args.resume:
        if args.holdout and args.shots:
            args.val_shots = min(args.shots, MAX_VAL_SHOTS)
        elif args.eval_every:
            args.val_images = VAL_IMAGES
    shots = [value for value in (args.shots, args.val_shots) if value is not None]
    if min([args.eval_every, args.val_images or 0]) < 0 or min(shots, default=1) < 1:
        raise UserError(
            "--eval_every and --val_images must not be below 0, --shots and --val_shots at least 1"
        )


if __name__ == "__main__":
    args, config = command(read_settings)()  # before torch is imported: see flowers.command

import shutil
import time
from collections.abc import Iterator

import numpy as np
import torch
from tqdm import tqdm

from flowers import devices, figures, training
from flowers.data import Flowers, image_ids, open_from_flags, select, subset, val_images
from flowers.devices import Processes, autocast
from flowers.layouts import read_captions
from flowers.qwen import adapters, memory, models
from flowers.qwen.answers import answer_length, answer_loss, one_line
from flowers.qwen.features import ImageFeatures, image_features
from flowers.qwen.memory import Work
from flowers.qwen.prompts import (
    Tensors,
    draw_question,
    draw_views,
    encode,
    move,
    open_images,
    patches,
    prefetch,
    questions_about,
    questions_of,
    spell_names,
)
from flowers.qwen.ranking import PackedNames, describe_and_rank, rank_questions
from flowers.tracking import Tracker, start_wandb

# -----------------------------------------------------------------------------
# images, questions and answers


@dataclass(frozen=True)
class Batch:
    """A step's images of this process, in chunks, and the answers of all processes.

    chunks: of b images each: the images, as `hidden_states` takes them, b questions, b answers.
    """

    chunks: list[tuple[Tensors, list[str], list[str]]]
    answers: list[str]


@dataclass(frozen=True)
class Data:
    """The N training images and the M val images, and the batches that are made of them.

    index: (N,), val: (M,) positions in flowers.files. captions: N lists of sentences, or None.
    names: of all classes, as they are spelled. classes: (K,) those that are trained on.
    """

    config: Config
    processes: Processes
    flowers: Flowers
    index: np.ndarray
    val: np.ndarray
    captions: list[list[str]] | None
    names: tuple[str, ...]
    classes: np.ndarray

    @property
    def batch_size(self) -> int:
        """Images a step, of all processes together: as many in each."""
        n_processes = self.processes.world_size
        return n_processes * min(self.config.batch_size, len(self.index) // n_processes)

    @property
    def chunk_size(self) -> int:
        """Images in memory at a time, in each process."""
        in_each = self.batch_size // self.processes.world_size
        return min(self.config.chunk_size or in_each, in_each)

    @property
    def steps_per_epoch(self) -> int:
        # Images that fill no batch are left out; which ones they are changes with the epoch.
        return len(self.index) // self.batch_size

    @property
    def trained_names(self) -> list[str]:
        return [self.names[c] for c in self.classes]

    @property
    def listed_names(self) -> list[str] | None:
        """The names that stand in the question, if any."""
        return self.trained_names if self.config.list_names else None

    def batch(self, step: int, processor, features: ImageFeatures | None) -> Batch:
        """Return this process's part of a step's batch.

        Called in threads, where the tokenizer, which remembers how it pads, must not be used.
        It depends on seed and step alone, so that a resumed run sees what an unbroken one sees.
        features: of the N images, and others behind them; None if the vision tower runs in each
        step.
        """
        config = self.config
        epoch, i = divmod(step, self.steps_per_epoch)
        order = torch.randperm(len(self.index), generator=devices.generator(config.seed, epoch))
        positions = order[i * self.batch_size : (i + 1) * self.batch_size].tolist()

        # Drawn for the whole batch, so that each image has the same however the batch is cut up.
        generator = devices.generator(config.seed, epoch, i)
        views = draw_views(config.augment, len(positions), generator)
        answers = [self._answer(j, generator) for j in positions]
        asked = questions_of(config.answer, config.question)
        questions = []
        for _ in positions:
            listed = self.listed_names
            questions.append(draw_question(asked, listed, config.list_order, generator))

        chunks = []
        part = self.processes.part(positions)  # a slice
        for start in range(part.start, part.stop, self.chunk_size):
            # The last chunk may be shorter.
            rows = slice(start, min(start + self.chunk_size, part.stop))
            if features is None:
                image_files = [self.flowers.files[self.index[j]] for j in positions[rows]]
                image = patches(processor, open_images(image_files, views and views[rows]))
            else:
                image = features.batch(positions[rows])
            chunks.append((image, questions[rows], answers[rows]))
        return Batch(chunks, answers)

    def _answer(self, j: int, generator: torch.Generator) -> str:
        """Return the class name of image j, under `described` after one of its captions."""
        name = self.names[self.flowers.labels[self.index[j]]]
        if self.captions is None:
            return name
        choice = int(torch.randint(len(self.captions[j]), (), generator=generator))
        return f"{one_line(self.captions[j][choice])}\n{name}"

    def val_batches(self, processor, features: ImageFeatures | None) -> Iterator[tuple]:
        """Yield this process's val images in batches of b: the images, the questions, the labels.

        questions: for each text that is asked, b of them. labels: (b,) int64, positions in
        `classes`.
        """
        asked = questions_of(self.config.answer, self.config.question)
        own = np.arange(len(self.val))[self.processes.rank :: self.processes.world_size]
        for start in range(0, len(own), self.chunk_size):
            batch = own[start : start + self.chunk_size]
            index = self.val[batch]
            if features is None:
                image = patches(processor, open_images([self.flowers.files[i] for i in index]))
            else:
                image = features.batch((len(self.index) + batch).tolist())
            # From b images with Q questions each to Q questions about b images.
            questions = list(zip(*(self._val_questions(asked, i) for i in index)))
            labels = np.searchsorted(self.classes, self.flowers.labels[index])
            yield image, questions, torch.from_numpy(labels)

    def _val_questions(self, texts: tuple[str, ...], i: int) -> tuple[str, ...]:
        """Return what is asked about image i of the dataset: the same after every epoch."""
        order, seed = self.config.list_order, self.config.seed
        file_name = self.flowers.file_names[i]
        return questions_about(texts, self.listed_names, order, seed, file_name)


def open_data(config: Config, processes: Processes) -> Data:
    """Open the dataset and the captions. Raises UserError for what is missing or damaged."""
    flowers = open_from_flags(asdict(config))
    config = replace(config, splits=flowers.convention)
    names = spell_names(flowers.class_names, config.name_case)
    # The halves are those of the class numbers, whatever images there are.
    labels = np.arange(len(names))
    classes = select(labels, labels, len(names), config.classes)

    choice = (flowers.labels, len(names), config.classes, config.shots, config.seed)
    index = select(flowers.splits["train"], *choice)
    index = subset(index, config.images, config.seed)
    if len(index) < processes.world_size:
        raise UserError(
            f"{len(index)} training images are left by --classes {config.classes}: training needs "
            "one for each process"
        )
    captions = None
    if config.captions:
        captions = read_captions(config.captions, tuple(flowers.files[i] for i in index))
    val = choose_val(flowers, config)
    return Data(config, processes, flowers, index, val, captions, names, classes)


def choose_val(flowers: Flowers, config: Config) -> np.ndarray:
    """The val images that are ranked between epochs, those of the trained classes; none without.

    With --val_shots they are drawn as train.py draws them. Raises UserError if val has none.
    """
    if not config.eval_every:
        return flowers.splits["val"][:0]
    val = val_images(flowers, config.classes, config.val_shots, config.seed)
    val = subset(val, config.val_images or 0, config.seed)
    if len(val) == 0:
        raise UserError("the splits list no image for val: --holdout has nothing to hold out")
    return val


def check_overlap(data: Data) -> None:
    """Raise UserError if val holds images that are trained on, or that the start was trained on.

    Unless --allow_overlap is given.
    """
    config = data.config
    if len(data.val):
        runs.check_overlap_of_training(
            [config.model], data.flowers, data.index, data.val, "val", config.allow_overlap
        )


# -----------------------------------------------------------------------------
# memory


def plan_memory(data: Data) -> tuple[Data, Work]:
    """Return the data, with a size of its chunks, and the work on a chunk; print what that takes.

    AS_FITS becomes as many images as fit into the free memory of the GPU.
    """
    config = data.config
    skeleton = models.load_skeleton(config.model)
    free = memory.free_gigabytes(data.processes.device)
    if config.chunk_size == AS_FITS:
        work = work_of(data, skeleton, config.batch_size, free)
        chunk_size = memory.largest_batch(skeleton, work, free)
        data = replace(data, config=replace(config, chunk_size=chunk_size))
    work = work_of(data, skeleton, data.chunk_size, free)
    files.say(memory.memory_line(config.model, skeleton, work, free))
    return data, work


def work_of(data: Data, skeleton, n_images: int, free: float | None) -> Work:
    """Return what the model does with so many images at a time. free: GB, None on a CPU.

    Blocks are computed again where their results don't fit into the free memory of the GPU, unless
    they are to be kept.
    """
    config = data.config
    # Of question and answer, about; a name has about eight tokens with its separator.
    text_tokens = 100 if config.captions else 50
    text_tokens += 8 * len(data.listed_names or ())
    work = Work(
        n_images,
        memory.tokens_of_image(config.model, skeleton, config.max_pixels),
        text_tokens,
        config.rank,
        config.precision,
        config.load_4bit,
        config.also_train,
    )
    recompute = not config.keep_activations and memory.must_recompute(skeleton, work, free)
    return replace(work, recompute=recompute)


# -----------------------------------------------------------------------------
# model and step


def keep_features(model, processor, data: Data) -> ImageFeatures | None:
    """What the vision tower makes of the N training and M val images; None if that changes.

    Before the adapter, which leaves the vision tower as it is.
    """
    config = data.config
    # Whether the vision tower makes the same of an image in every step.
    if config.augment != "none" or adapters.trains_vision(model, config.also_train):
        return None
    digest = models.vision_digest(model)
    index = np.concatenate([data.index, data.val])
    processes = data.processes
    if processes.world_size > 1:
        # Each computes its part, and finds the others' in the cache.
        part = index[processes.rank :: processes.world_size]
        image_features(model, processor, data.flowers, part, digest)
        processes.wait()
    return image_features(model, processor, data.flowers, index, digest)


def train_step(
    model, processor, batch: Batch, optimizer, scaler, parameters: list, processes: Processes
) -> float:
    """Update the adapter once. Returns the loss: the mean over all answer tokens, in nats."""
    device = processes.device
    # Of the whole batch, so that the gradient is the same however the batch is cut up.
    n_tokens = sum(answer_length(processor, answer) for answer in batch.answers)
    loss_sums = []
    for image, questions, answers in batch.chunks:
        inputs = move(encode(processor, questions, image["image_grid_thw"]), device)
        image = move(image, device)
        with autocast(device):
            loss_sum, _ = answer_loss(model, processor, inputs, image, answers)
        # The mean of the processes' gradients is then that of one process with all images.
        loss = loss_sum * processes.world_size / n_tokens
        scaler.scale(loss).backward()
        loss_sums.append(loss_sum.detach())
    processes.average_gradients(parameters)
    training.update(optimizer, parameters, scaler)
    # Read when the GPU has been given the whole step.
    own_loss = 0.0
    for loss_sum in torch.stack(loss_sums).tolist():
        own_loss += loss_sum / n_tokens
    [batch_loss] = processes.sum([own_loss])
    return batch_loss


# -----------------------------------------------------------------------------
# val between epochs


@torch.inference_mode()
def evaluate_val(model, processor, data: Data, features: ImageFeatures | None) -> dict[str, float]:
    """Rank the names of the trained classes for each val image, and go back to training.

    Returns val/top1 in percent, by the summed log-likelihood, and val/loss: the mean of an answer
    token of the right names, in nats.
    """
    model.eval()
    names = PackedNames(processor, data.trained_names)
    n_right, loss_sum, n_tokens = 0, 0.0, 0
    for image, questions, labels in data.val_batches(processor, features):
        image = move(image, data.processes.device)
        with autocast(data.processes.device):
            if data.config.answer == "described":
                _, sums = describe_and_rank(
                    model, processor, names, questions[0], image, DESCRIPTION_TOKENS
                )
            else:
                sums = rank_questions(model, processor, names, questions, image)
        sums = sums.cpu()  # (b, K)
        n_right += int((sums.argmax(1) == labels).sum())
        loss_sum -= float(sums.gather(1, labels[:, None]).sum())
        n_tokens += int(names.lengths[labels].sum())
    model.train()
    n_right, loss_sum, n_tokens = data.processes.sum([n_right, loss_sum, n_tokens])
    return {"val/top1": 100 * n_right / len(data.val), "val/loss": loss_sum / n_tokens}


# -----------------------------------------------------------------------------
# results


def count_parameters(model) -> tuple[int, int]:
    """Return how many parameters are trained, and how many the model has without its adapter."""
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Modules that are trained whole are copies; the model's own stay beside them, frozen.
    n_frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return n_trained, n_frozen


def print_start(
    folder: Path, first_step: int, total_steps: int, data: Data, model, keeps_features: bool
) -> None:
    """Print what is about to be trained."""
    if first_step > 0:
        print(f"resuming {folder} after step {first_step} of {total_steps}")
    training.note_cut_batch(data.config.batch_size, data.batch_size, data.processes.world_size)
    n_trained, n_frozen = count_parameters(model)
    print(
        f"{folder}: {data.config.model}, {len(data.index):,} images, {total_steps:,} steps of "
        f"{data.batch_size} on {data.processes.device}; trainable {n_trained:,} beside "
        f"{n_frozen:,}; vision features {'once' if keeps_features else 'in each step'}"
    )


def save_results(
    folder: Path,
    model,
    rows: list[dict],
    data: Data,
    seconds: float,
    settings: dict,
    tracker: Tracker,
) -> None:
    """Leave adapter/, curve.png and result.json in the run folder, and print the main figures.

    rows: those of metrics.jsonl, of steps and evaluations. seconds: of the steps.
    """
    model.save_pretrained(folder / "adapter")
    figures.training_curve(rows, folder / "curve.png", "cross-entropy of an answer token (nats)")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    last_loss = float(np.mean(losses[-data.steps_per_epoch :]))
    images_per_s = len(losses) * data.batch_size / max(seconds, 1e-9)
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
# the model as one folder


def export_merged(folder: Path, wandb: str) -> None:
    """Leave merged/ in a finished run: the trained model by itself, with its processor.

    LoRA is added to the weights, modules of --also_train are in their places. What the run was
    trained on goes along, as it would be lost with a copy of the folder. wandb: for the next
    command, which is printed.
    """
    settings = runs.read_arguments(folder)
    name = settings["model"]
    if settings.get("load_4bit"):
        files.note(
            f"{folder} was trained with --load_4bit: its adapter is merged into the weights of "
            f"{name} as they are without it: another model than that of {folder}, with other scores"
        )
    # In the precision of the training, as the model is evaluated in.
    dtype = devices.DTYPES[devices.set_precision(settings.get("precision", "auto"), "cpu")]
    model, processor = models.load_model(name, "cpu", folder, settings["max_pixels"])
    model = model.merge_and_unload().to(dtype)
    # A head or an embedding that was trained by itself is no longer the other's. The latest peft
    # knows that, the oldest that works does not.
    if model.lm_head.weight is not model.get_input_embeddings().weight:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False

    target, partial = folder / "merged", folder / "merged.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    # All images of tiny have one size, which its processor knows and --max_pixels does not.
    max_pixels = processor.image_processor.size["longest_edge"]
    # Its evaluation would quantise what is whole now.
    own = {"job": runs.MERGED, "max_pixels": max_pixels, "load_4bit": False}
    files.write_json(partial / "args.json", settings | own)
    runs.write_trained_on(partial, [], folder)
    # An earlier one stays until this is whole.
    earlier = folder / "merged.earlier"
    if target.exists():
        shutil.rmtree(earlier, ignore_errors=True)
        target.rename(earlier)
    partial.rename(target)
    shutil.rmtree(earlier, ignore_errors=True)
    print(f"merged model: {target}")
    flags = {"model": str(target)} | runs.flags_for_next(str(folder.parent), wandb)
    print(f"next: {runs.command_line('qwen_eval.py', flags)}")


# -----------------------------------------------------------------------------
# the run


def open_run_folder(data: Data, settings: dict, name: str | None, resume: str | None) -> Path:
    """The folder of the run, made by the main process unless the run is resumed."""
    config = data.config
    if not data.processes.is_main:
        return Path(resume or config.runs)  # the others write nothing
    trained_on = image_ids(data.flowers, data.index)
    if resume:
        folder = Path(resume)
        runs.check_same_images(folder, data.flowers.splits, trained_on)
    else:
        folder = runs.new_run(config.runs, name, settings, data.flowers.splits)
    # Before the first step; a resumed run has it already. A merged run as the start has its own.
    runs.write_trained_on(folder, trained_on, config.model)
    return folder


def restore(
    path: Path, trained: dict, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> tuple[int, float]:
    """Give all of them what a checkpoint holds; returns its step and seconds.

    Raises UserError if it is damaged, or of another run.
    """
    progress = training.load_checkpoint(path, trained, optimizer)
    training.restore_scaler(path, scaler, progress)
    try:
        return int(progress["step"]), float(progress["seconds"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(f"{path} is damaged: it does not say how far the run came") from None


def complete(config: Config, device: torch.device) -> Config:
    """The settings with what only the machine and the model say: device, precision, --augment.

    Raises UserError for modules of --also_train that the model lacks, or as `on_machine` does.
    """
    config = models.on_machine(config, device)
    crops = False
    if config.also_train:
        crops = adapters.trains_vision(models.load_skeleton(config.model), config.also_train)
    return replace(config, augment=config.augment or ("crop" if crops else "none"))


@command
def main(args: argparse.Namespace, config: Config | None):
    if config is None:
        # On the CPU, whatever the machine has.
        if devices.start_processes("cpu").is_main:
            export_merged(Path(args.resume), args.wandb)
        return
    processes = devices.start_processes(config.device)  # one, unless torchrun started more
    device = processes.device
    config = complete(config, device)
    devices.seed_everything(config.seed, device)

    # -----------------------------------------------------------------------------
    # data and model
    with processes.main_first():
        data = open_data(config, processes)
        if processes.is_main:
            check_overlap(data)
        data, work = plan_memory(data)
        config = data.config
        model, processor = models.load_model(
            config.model, device, max_pixels=config.max_pixels, load_4bit=config.load_4bit
        )
    features = keep_features(model, processor, data)
    model = adapters.add_adapter(
        model, config.rank, config.alpha, config.also_train, work.recompute
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = list(trained.values())

    # -----------------------------------------------------------------------------
    # run folder and optimiser
    settings = {"job": "qwen_train", "architecture": config.model}
    settings |= asdict(config) | models.versions()
    folder = open_run_folder(data, settings, args.name, args.resume)
    metrics_file, checkpoint_file = folder / "metrics.jsonl", folder / "checkpoint.pt"
    # One group, unlike train.py: weight decay is for all parameters, and earlier checkpoints have
    # this layout.
    group = {"params": parameters, "weight_decay": config.wd, "peak": config.lr}
    fused = device.type == "cuda" or None  # one kernel for all parameters, where that gains
    optimizer = torch.optim.AdamW([group], lr=config.lr, betas=(0.9, 0.98), fused=fused)
    scaler = devices.gradient_scaler(device)
    total_steps = config.epochs * data.steps_per_epoch

    # -----------------------------------------------------------------------------
    # resume
    first_step, seconds = 0, 0.0
    if args.resume and checkpoint_file.exists():
        first_step, seconds = restore(checkpoint_file, trained, optimizer, scaler)
    # Steps after the checkpoint are done again.
    rows = [row for row in files.read_lines(metrics_file, "step") if row["step"] <= first_step]
    mode = config.wandb if processes.is_main else "disabled"
    tracker = start_wandb(mode, folder, settings, resume=bool(args.resume))
    for row in rows:
        tracker.log_row(row)  # unless W&B has it
    if processes.is_main:
        files.write_lines(metrics_file, rows)
        print_start(folder, first_step, total_steps, data, model, features is not None)

    # -----------------------------------------------------------------------------
    # training loop
    model.train()
    bar = tqdm(
        total=total_steps,
        initial=first_step,
        unit="step",
        desc="training",
        disable=not processes.is_main,
    )
    # The next batches are made in threads while the model is at work.
    steps = range(first_step, total_steps)
    batches = prefetch(lambda step: data.batch(step, processor, features), steps)
    start = time.perf_counter()
    for batch, step in zip(batches, steps):
        factor = training.learning_rate_factor(step, total_steps, WARMUP)
        training.set_learning_rate(optimizer, factor)
        loss = train_step(model, processor, batch, optimizer, scaler, parameters, processes)

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
        epoch = step // data.steps_per_epoch + 1
        learning_rate = config.lr * factor
        row = {"epoch": epoch, "step": step + 1, "train/loss": loss, "train/lr": learning_rate}
        rows.append(row)
        tracker.log_row(row)
        bar.set_postfix(epoch=epoch, loss=f"{loss:.3f}", refresh=False)
        bar.update()
        seconds += time.perf_counter() - start

        ends_epoch = (step + 1) % data.steps_per_epoch == 0
        if ends_epoch and config.evaluates_after(epoch):
            row = {"epoch": epoch, "step": step + 1}
            row |= evaluate_val(model, processor, data, features)
            rows.append(row)
            tracker.log_row(row)
            top1, val_loss = row["val/top1"], row["val/loss"]
            if processes.is_main:
                bar.write(f"epoch {epoch}: val top-1 {top1:.2f}%, {val_loss:.3f} nats a token")

        # Metrics first: rows without a checkpoint are dropped on a resume, but none may be missing.
        if saves and processes.is_main:
            files.write_lines(metrics_file, rows)
            progress = {"step": step + 1, "seconds": seconds, "scaler": scaler.state_dict()}
            training.save_checkpoint(checkpoint_file, trained, optimizer, **progress)
        start = time.perf_counter()
    bar.close()
    if not processes.is_main:
        return

    save_results(folder, model, rows, data, seconds, settings, tracker)
    if config.merge:
        export_merged(folder, config.wandb)


if __name__ == "__main__":
    main(args, config)
