"""Qwen2-VL names flowers: the generative counterpart of baseline_eval.py.

    python qwen_eval.py                                   # Qwen2-VL-2B ranks the 102 names, 6 GB
    python qwen_eval.py --adapter runs/NAME               # what qwen_train.py made
    python qwen_eval.py --model runs/NAME/merged          # the same as one model, by its --merge
    torchrun --nproc_per_node=4 qwen_eval.py              # four GPUs, the images shared out
    python qwen_eval.py --protocol generate --list_names  # its own words, matched exactly
    python qwen_eval.py --question "Which flower is it?" "What is this?" --list_names
    python qwen_eval.py --describe --split train          # sentences, for qwen_train.py --captions
    python qwen_eval.py --data_root sample --model tiny   # any machine, offline, seconds
    python qwen_eval.py --resume runs/NAME                # goes on after a kill

Takes the same images and names as baseline_eval.py, and leaves the same files in runs/NAME/.

rank: the log-likelihood of every class name as the answer. Names are compared by its sum, its mean
a token, or the sum less that without the image (pmi, pointwise mutual information). With --holdout
the val images decide which of the three is reported; without, it is the sum. All three are in
scores.npz and result.json. Of several questions, the mean log-likelihood counts.

Base and new classes are told apart as in CLIP's evaluation, each among its own half. Where names
are listed in the question, --classes base asks once more, with the names of the image's half.
"""

import argparse
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from flowers import UserError, add_device_arguments, add_switch, check_seed, command, files, runs
from flowers.choices import templates_in_words
from flowers.data import add_data_arguments
from flowers.qwen_settings import (
    CLASSES,
    DEFAULTS,
    DESCRIBE,
    NAME_CASES,
    NEW_DEFAULTS,
    QUESTIONS,
    add_model_arguments,
    add_question_arguments,
    check_questions,
    fill_in,
    parse_inheriting,
    read_batch_size,
    read_training,
    runs_behind,
    settings_of,
)

SCORES = ("sum", "token", "pmi")
OLD_PMI = "calibrated"  # what the flag and older runs call pmi
# The names that a question lists, where it lists any: those of all classes, or of the image's own
# half. These begin the keys of a record.
ALL, OWN = "", "own_"
OUTSIDE = "(outside the list)"  # the class of the answers that are no class name
BATCH_SIZE = 8
MOST_TOKENS = 80
# Flags that change nothing of some of what can be asked for; see flags_without_part.
MAY_LACK_A_PART = (*NEW_DEFAULTS, "answer", "protocol", "most_tokens", "compare")


# -----------------------------------------------------------------------------
# settings


def add_protocol_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and question")
    add_model_arguments(group, inherits=True)
    group.add_argument(
        "--protocol",
        choices=["rank", "generate"],
        default="rank",
        help="rank the class names by their likelihood, or answer freely and be matched exactly; "
        "answers that contain just one name are counted apart "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--score",
        choices=["auto", *SCORES, OLD_PMI],
        metavar="|".join(["auto", *SCORES]),
        default="auto",
        help="what rank reports; auto: the best on val with --holdout, else sum (default: auto)",
    )
    group.add_argument(
        "--answer",
        choices=list(QUESTIONS),
        help="described: a line about the flower comes before the name "
        "(default: the adapter's, else brief)",
    )
    add_question_arguments(group, inherits=True)
    group.add_argument(
        "--classes",
        choices=CLASSES,
        help="what the adapter was trained on; base or new: val images of these alone decide, and "
        "with --list_names the question is asked once more, with the names of the image's own "
        "half, for base_top1, new_top1 and harmonic_mean (default: the adapter's, else all)",
    )
    group.add_argument(
        "--most_tokens",
        type=int,
        help="the longest answer or description, in tokens; a name that is ranked is read whole "
        f"(default: {MOST_TOKENS})",
    )
    add_switch(
        group,
        "--describe",
        help="write descriptions.jsonl, one generated sentence an image, and evaluate nothing",
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # data
    add_data_arguments(parser)
    parser.add_argument(
        "--split",
        choices=["test", "val", "train"],
        default="test",
        help="images to evaluate; val needs --holdout (default: %(default)s)",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=0,
        help="so many of them, drawn with seed 0; of the val images that choose score and "
        "spelling, too (default: 0, all)",
    )
    parser.add_argument(
        "--val_shots",
        type=int,
        help="with --holdout: at most so many val images a class decide, drawn by --seed "
        "(default: the adapter's, else all)",
    )
    add_protocol_arguments(parser)
    add_device_arguments(parser.add_argument_group("machine"))
    # run
    group = parser.add_argument_group("run")
    group.add_argument(
        "--seed",
        type=int,
        help="of --list_order drawn and --val_shots (default: the adapter's, else 0)",
    )
    group.add_argument(
        "--batch_size",
        type=read_batch_size,
        metavar="N|auto",
        default=BATCH_SIZE,
        help="images at a time; auto: as many as fit into the GPU's free memory, at most "
        "%(default)s (default: %(default)s)",
    )
    runs.add_overlap_argument(group)
    runs.add_run_arguments(group, resume=True, compare=True)
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
    split: str
    images: int
    # model and question
    model: str
    load_4bit: bool
    adapter: str | None
    max_pixels: int
    protocol: str
    score: str
    answer: str
    question: list[str] | None  # None: that of `answer`
    list_names: bool
    list_order: str
    name_case: str
    classes: str
    val_shots: int | None  # None: all images
    most_tokens: int
    describe: bool
    # machine
    device: str
    precision: str
    # run
    seed: int
    batch_size: int | str  # AUTO until the names are known
    allow_overlap: bool
    runs: str
    wandb: str

    @property
    def candidates(self) -> tuple[str, ...]:
        """The scores that may be reported."""
        return SCORES if self.score == "auto" else (self.score,)

    @property
    def asks_val(self) -> bool:
        """Whether the val images, if there are any, decide which score or spelling is reported."""
        return val_decides(self)

    @property
    def lists(self) -> tuple[str, ...]:
        """What names the question lists: ALL, and where base and new are told apart, OWN."""
        return (ALL, OWN) if self.list_names and self.classes != "all" else (ALL,)


def val_decides(settings: argparse.Namespace | Config) -> bool:
    """Whether val images, if there are any, decide which score or spelling is reported."""
    ranks = settings.protocol == "rank" and not settings.describe
    has_choice = settings.score == "auto" or settings.name_case == "best"
    return ranks and has_choice and settings.split == "test"


def read_settings() -> tuple[argparse.Namespace, Config]:
    """The flags of the command line, and the settings that they mean.

    With --resume, those that the run was started with. Ends the program where that run is finished.
    Raises UserError as `parse_arguments` and `resolve` do.
    """
    args = parse_arguments()
    return args, resolve(args)


def parse_arguments() -> argparse.Namespace:
    """The flags; data, splits and names are those of the adapter where they are left out.

    Raises UserError if there is no run to resume.
    """
    parser = make_parser()
    args = parser.parse_args()
    if not args.resume:
        return parse_inheriting(parser)
    stored = runs.arguments_to_resume(Path(args.resume), "qwen_eval")
    if stored is None:
        raise SystemExit  # it is finished, which was printed
    args = runs.parse_stored(parser, args, stored)
    # As a flag, false is left out, which must not stand for the adapter's.
    args.list_names = bool(args.list_names)
    args.load_4bit = bool(args.load_4bit)
    runs.check_typed(parser, args)
    return args


def resolve(args: argparse.Namespace) -> Config:
    """Return the settings that the flags mean, with those of the adapter where they say nothing.

    Raises UserError if they contradict one another, or the adapter.
    """
    if args.score == OLD_PMI:
        files.note(f"--score {OLD_PMI} is now called pmi")
        args.score = "pmi"
    # A default that is typed misleads nobody.
    defaults = DEFAULTS | NEW_DEFAULTS
    typed = {flag for flag in MAY_LACK_A_PART if is_typed(getattr(args, flag))}
    typed = {flag for flag in typed if getattr(args, flag) != defaults.get(flag)}
    without_part = fill_in_from_training(args)
    if args.most_tokens is None:
        args.most_tokens = MOST_TOKENS
    check_protocol(args)
    # One that is resumed has passed, or is older than this.
    if not args.resume:
        check_parts(args, typed, without_part)
    check_seed(args.seed)
    if args.most_tokens < 1 or args.images < 0:
        raise UserError("--most_tokens must be at least 1, --images not below 0")
    return settings_of(Config, args)


def is_typed(value) -> bool:
    """Whether a flag without a default of its own was typed; a switch, whether it is on."""
    return value is not None and value is not False and value != []


def fill_in_from_training(args: argparse.Namespace) -> dict[str, str]:
    """Fill in the flags that were left out, from the run that made the adapter or the model.

    Returns those that change nothing, as `flags_without_part` does.
    Raises UserError if it has seen the val images that are to decide, or as `read_training` does.
    """
    trained = read_training(args.adapter, args.model)
    source = args.adapter or args.model
    is_of_a_run = "job" in trained
    if args.holdout and is_of_a_run and not trained.get("holdout"):
        raise UserError(
            f"{source} was trained on the val images: "
            "--holdout needs an adapter that was trained with --holdout"
        )
    # What has no part here is neither taken over nor compared.
    without_part = flags_without_part(args, trained)
    trained = {flag: value for flag, value in trained.items() if flag not in without_part}
    fill_in(args, trained, DEFAULTS | NEW_DEFAULTS)
    return without_part


def flags_without_part(args: argparse.Namespace, trained: Mapping) -> dict[str, str]:
    """The flags whose value changes nothing of what is asked for, and why.

    args: as typed. trained: of `read_training`, for those that were left out.
    """
    if args.describe:
        own = dict.fromkeys((*NEW_DEFAULTS, "answer"), "--describe has a question of its own")
        return own | dict.fromkeys(("protocol", "compare"), "--describe evaluates nothing")

    def value_of(flag: str):
        typed = getattr(args, flag)
        return trained.get(flag) if typed is None else typed

    why = {}
    lists_names = value_of("list_names")
    val_chooses = args.holdout and val_decides(args)
    if not lists_names:
        why["list_order"] = "it is for the names of --list_names"
        if args.protocol == "generate":
            why["name_case"] = "--protocol generate matches answers in any spelling"
    if not val_chooses:
        why["val_shots"] = "it is for val images that choose a score or a spelling, and here they "
        why["val_shots"] += "choose nothing"
        if not lists_names:
            why["classes"] = "it is for val images that choose a score or a spelling, or for the "
            why["classes"] += "names of --list_names, and here is neither"
    if args.protocol == "rank" and value_of("answer") != "described":
        why["most_tokens"] = "no answer is written by --protocol rank after a brief question"
    draws_order = "list_order" not in why and value_of("list_order") == "drawn"
    draws_val = "val_shots" not in why and value_of("val_shots") is not None
    # Those that were left out are the training's all the same: tables tell runs apart by them.
    if args.seed is not None and not (draws_order or draws_val):
        why["seed"] = "it draws --list_order drawn and --val_shots, and here nothing is drawn"
    if args.classes is None:
        why.pop("classes", None)
    return why


def check_protocol(args: argparse.Namespace) -> None:
    """Raise UserError for flags that mean nothing together; all have their values."""
    check_questions(args.question, args.list_names, args.list_order)
    has_one_answer = args.protocol == "generate" or args.answer == "described"
    if len(args.question or ()) > 1 and has_one_answer:
        raise UserError(
            "--protocol generate and --answer described take one question, as there is one answer: "
            "give --question one text"
        )
    ranks_test = args.protocol == "rank" and args.split == "test"
    if args.name_case == "best" and not (ranks_test and args.holdout):
        raise UserError(
            "--name_case best is chosen on val, for --protocol rank of the test images: "
            "give --holdout, or another --name_case"
        )
    if args.val_shots is not None and not (args.val_shots >= 1 and args.holdout):
        raise UserError("--val_shots must be at least 1, and needs --holdout")


def check_parts(
    args: argparse.Namespace, typed: Collection[str], without_part: Mapping[str, str]
) -> None:
    """Raise UserError for flags that were typed, and have no part in what is asked for.

    without_part: of `flags_without_part`.
    """
    if args.score != "auto" and (args.describe or args.protocol == "generate"):
        raise UserError("--score is what --protocol rank reports: leave it out")
    if args.protocol == "rank":
        typed = set(typed) - {"protocol"}  # the default
    for flag, why in without_part.items():
        if flag in typed:
            raise UserError(f"--{flag}: {why}; leave it out")


if __name__ == "__main__":
    args, config = command(read_settings)()  # before torch is imported: see flowers.command

import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from flowers import devices, evaluate, figures
from flowers.data import Flowers, base_classes, open_from_flags, split_index, subset, val_images
from flowers.devices import Processes, autocast
from flowers.intervals import wilson
from flowers.qwen import memory, models
from flowers.qwen.answers import contained, generate, match, one_line
from flowers.qwen.features import digest_to_keep, load_images
from flowers.qwen.prompts import Tensors, encode, move, questions_about, questions_of, spell_names
from flowers.qwen.ranking import PackedNames, describe_and_rank, rank_questions, scores
from flowers.tracking import Tracker, finish_evaluation, start_wandb

# -----------------------------------------------------------------------------
# protocols: from a batch of images to what is recorded of each


@dataclass(frozen=True)
class Task:
    """The model and what it is asked about the images of a dataset.

    texts: the questions. class_names: C, in their spelling; `packed` holds their tokens.
    """

    model: torch.nn.Module
    processor: object
    texts: tuple[str, ...]
    class_names: tuple[str, ...]
    packed: PackedNames
    flowers: Flowers
    config: Config
    processes: Processes

    @property
    def device(self) -> torch.device:
        return self.processes.device

    def questions(self, i: int, listed: str = ALL) -> tuple[str, ...]:
        """Return the Q questions about image i of the dataset, the names in them where listed."""
        names = self.class_names if self.config.list_names else None
        if names and listed == OWN:
            n_base = base_classes(len(names))
            is_base = self.flowers.labels[i] < n_base
            names = names[:n_base] if is_base else names[n_base:]
        file_name = self.flowers.file_names[i]
        order, seed = self.config.list_order, self.config.seed
        return questions_about(self.texts, names, order, seed, file_name)

    def generate(self, texts: Sequence[str], image: Tensors) -> list[str]:
        """Return the model's answers to B questions, one about each image."""
        prompts = move(encode(self.processor, texts, image["image_grid_thw"]), self.device)
        image = move(image, self.device)
        return generate(self.model, self.processor, prompts, image, self.config.most_tokens)

    def answers(self, batch: Sequence[int], image: dict, listed: str = ALL) -> list[str]:
        """Return the model's answer about each image of a batch, which is asked one question."""
        questions = [self.questions(i, listed)[0] for i in batch]
        return self.generate(questions, image)


def respell(task: Task, case: str) -> Task:
    """Return the task with another spelling of the names."""
    class_names = spell_names(task.flowers.class_names, case)
    packed = PackedNames(task.processor, class_names)
    return replace(task, class_names=class_names, packed=packed)


def describe_images(task: Task, image: Tensors, batch: Sequence[int]) -> list[dict]:
    """A generated sentence for each image, as `read_captions` reads it."""
    return [{"captions": [one_line(text)]} for text in task.answers(batch, image)]


def answer_freely(task: Task, image: Tensors, batch: Sequence[int]) -> list[dict]:
    """The model's own words for each image: `answer`, and `own_answer` where half is listed."""
    records = [{} for _ in batch]
    for listed in task.config.lists:
        for record, text in zip(records, task.answers(batch, image, listed)):
            record[f"{listed}answer"] = text
    return records


def rank_names(task: Task, image: Tensors, batch: Sequence[int]) -> list[dict]:
    """The log-likelihood of every class name for each image: `sum`, and `own_sum`.

    Their mean over the questions. `prior` is that without the image, where each image is asked with
    an order of names of its own. Under --answer described the names are ranked after the model's
    own description.
    """
    records = [{} for _ in batch]
    asked = (task.model, task.processor, task.packed)
    image = move(image, task.device)
    for listed in task.config.lists:
        # From B lists of Q questions to Q lists of B.
        questions = list(zip(*(task.questions(i, listed) for i in batch)))
        if task.config.answer == "described":
            most_tokens = task.config.most_tokens
            descriptions, sums = describe_and_rank(*asked, questions[0], image, most_tokens)
            for record, description in zip(records, descriptions):
                record[f"{listed}description"] = description
        else:
            sums = rank_questions(*asked, questions, image)
        values = {"sum": checked_sums(task, sums)}
        if task.config.list_order == "drawn":
            values["prior"] = rank_without_image(task, questions)
        for key, rows in values.items():
            # One line of JSON an image: 102 numbers of five decimals are a kilobyte.
            for record, row in zip(records, rows.tolist()):
                record[listed + key] = [round(value, 5) for value in row]
    return records


def rank_without_image(task: Task, questions: Sequence[Sequence[str]]) -> torch.Tensor:
    """Return the mean log-likelihoods (B, C) of the names over Q questions without an image.

    questions: Q sequences of B texts. Under --answer described, a description that says nothing
    comes before the name.
    """
    prefixes = None
    if task.config.answer == "described":
        prefixes = ["\n"] * len(questions[0])
    with autocast(task.device):
        sums = rank_questions(task.model, task.processor, task.packed, questions, None, prefixes)
    return checked_sums(task, sums)


def checked_sums(task: Task, sums: torch.Tensor) -> torch.Tensor:
    """Return log-likelihoods (B, C) on the CPU. Raises UserError if they are not finite."""
    if not sums.isfinite().all():
        raise UserError(
            f"{task.config.model} gives no finite log-likelihoods: "
            "its weights are damaged, or made for another precision"
        )
    return sums.cpu()


def is_right(task: Task, i: int, record: dict) -> bool | None:
    """Whether the record of image i names its class, by the sum or exactly; None of a sentence."""
    if "sum" in record:
        predicted = int(np.argmax(record["sum"]))
    elif "answer" in record:
        predicted = match(record["answer"], task.class_names)
    else:
        return None
    return predicted == task.flowers.labels[i]


class Progress:
    """How many images are done, and their top-1 accuracy so far, for W&B while a run is at work.

    A row every `interval` images. It depends on the records before it alone, so that a resumed run
    gives the same rows. evaluated: the images that count; those of val are asked as well.
    """

    def __init__(self, tracker: Tracker, interval: int, evaluated: np.ndarray):
        self.tracker = tracker
        self.interval = interval
        self.evaluated = set(evaluated.tolist())
        self.n_images = 0
        self.right = []
        self.row = {}

    def add(self, task: Task, i: int, record: dict) -> None:
        """Count image i of the dataset."""
        self.n_images += 1
        right = is_right(task, i, record)
        if i in self.evaluated and right is not None:
            self.right.append(right)
        self.row = {"progress/images": self.n_images}
        if self.right:
            self.row["progress/top1"] = 100 * float(np.mean(self.right))
        if self.n_images % self.interval == 0:
            self.tracker.log_row(self.row)


def record_images(
    task: Task, protocol: Callable, index: Sequence[int], path: Path, progress: Progress
) -> tuple[dict[str, dict], dict[str, float]]:
    """Apply a protocol to the images at `index`, and write a line into `path` for each.

    Lines that are there already stay, so that a run that was killed goes on where it was. Several
    processes share out the rest. Returns the records by file name, and the time that the new ones
    took.
    """
    flowers, processes = task.flowers, task.processes
    record_of = collect(path, task)
    index_of = {flowers.file_names[i]: i for i in index}
    for name, record in record_of.items():
        if name in index_of:
            progress.add(task, index_of[name], record)
    remaining = [i for i in index if flowers.file_names[i] not in record_of]
    # By the place among all images: other processes may be at work already, and have written some.
    shared_out = set(list(index)[processes.rank :: processes.world_size])
    own = [i for i in remaining if i in shared_out]
    own_path = path_of_process(path, processes)
    digest = digest_to_keep(task.model, task.processor, flowers, own)
    batch_size = task.config.batch_size
    batches = load_images(task.model, task.processor, flowers, own, batch_size, digest)

    title = "describing" if task.config.describe else task.config.protocol
    start = time.perf_counter()
    done = len(record_of)
    options = {"unit": "img", "desc": title, "disable": not processes.is_main}
    with tqdm(total=done + len(own), initial=done, **options) as bar:
        for image, batch in batches:
            # Written batch by batch, so that a kill costs no more than one.
            with autocast(task.device):
                records = protocol(task, image, batch)
            for i, record in zip(batch, records):
                row = {"file": flowers.file_names[i]} | record
                files.append_line(own_path, row)
                progress.add(task, i, row)
            if progress.right:
                bar.set_postfix(top1=f"{progress.row['progress/top1']:.1f}%", refresh=False)
            bar.update(len(batch))
    processes.wait()
    seconds = time.perf_counter() - start
    timing = {
        "eval_seconds": round(seconds, 3),
        "eval_images_per_s": round(len(remaining) / seconds, 2),
    }
    return collect(path, task), timing


def path_of_process(path: Path, processes: Processes) -> Path:
    """The file that a process appends its records to: answers.jsonl, answers.1.jsonl, ..."""
    return path if processes.is_main else path.with_suffix(f".{processes.rank}{path.suffix}")


def collect(path: Path, task: Task) -> dict[str, dict]:
    """Return all records so far by file name; those of several processes are joined in `path`.

    Also those that a killed run of another number of processes has left. Records that can't be
    read or evaluated are left out, with a warning, so that their images are asked about again.
    """
    processes = task.processes
    with processes.main_first():
        if processes.is_main:
            parts = sorted(path.parent.glob(f"{path.stem}.[0-9]*{path.suffix}"))
            rows = [row for file in (path, *parts) for row in sound_records(file, task)]
            files.write_lines(path, rows)  # without the lines that a kill cut off
            for part in parts:
                part.unlink()
        return {row["file"]: row for row in files.read_lines(path)}


def sound_records(path: Path, task: Task) -> list[dict]:
    """Return the records of a file that can be evaluated, with a warning if others are left out."""
    rows = files.read_lines(path)
    sound = [row for row in rows if is_sound(row, task)]
    if len(sound) < len(rows):
        n_left_out = len(rows) - len(sound)
        print(
            f"warning: {n_left_out} of the {len(rows)} records of {path} left out, which lack what "
            "is evaluated: their images are asked about again",
            file=sys.stderr,
        )
    return sound


def is_sound(row: dict, task: Task) -> bool:
    """Whether a record has a file name, and all that the protocol of the task writes."""
    config, n_classes = task.config, len(task.class_names)
    if not isinstance(row.get("file"), str):
        return False
    if config.describe:
        return runs.is_list_of_texts(row.get("captions"))
    if config.protocol == "generate":
        return all(isinstance(row.get(f"{listed}answer"), str) for listed in config.lists)
    keys = ("sum", "prior") if config.list_order == "drawn" else ("sum",)
    for value in (row.get(listed + key) for listed in config.lists for key in keys):
        # The log-likelihoods of the C names.
        if not (isinstance(value, list) and len(value) == n_classes):
            return False
        if not all(map(files.is_number, value)):
            return False
    return True


# -----------------------------------------------------------------------------
# evaluation: from records to metrics


@dataclass(frozen=True)
class Evaluation:
    """The outcome for N images, the same for both protocols."""

    metrics: dict[str, float]
    probabilities: torch.Tensor  # (N, C)
    class_names: tuple[str, ...]  # C
    predictions: list[dict]  # the N rows of predictions.csv
    answers: list[str]  # N texts for the answer sheet
    extra: dict  # enters the result as it is


def evaluate_answers(task: Task, record_of: dict[str, dict], index: np.ndarray) -> Evaluation:
    """Match free answers with the class names: each is one of them or none, with no second best."""
    flowers = task.flowers
    labels = flowers.labels[index]
    records = [record_of[flowers.file_names[i]] for i in index]
    answers = [record["answer"] for record in records]
    matches = [match(answer, task.class_names) for answer in answers]
    # The answers that are no name are a class of their own, the last.
    outside = len(flowers.class_names)
    flowers = replace(flowers, class_names=(*flowers.class_names, OUTSIDE))
    predicted = torch.tensor([outside if c is None else c for c in matches])
    probabilities = F.one_hot(predicted, outside + 1).float()  # (N, C + 1)

    metrics = evaluate.classification(probabilities, torch.from_numpy(labels))
    del metrics["top3"], metrics["top5"]
    metrics["outside_list"] = 100 * matches.count(None) / len(matches)
    metrics |= contained_metrics(answers, task.class_names, labels)
    if tells_halves_apart(task.config):
        listed = task.config.lists[-1]
        own = [match(record[f"{listed}answer"], task.class_names) for record in records]
        # A name of the other half is as wrong as any: it takes no right answer's place.
        correct = np.array([c == label for c, label in zip(own, labels)])
        metrics |= evaluate.accuracy_of_halves(correct, labels < base_classes(outside))
    predictions = evaluate.predictions(probabilities, flowers, index)
    for row in predictions:
        for column in row:
            if column.startswith(("top", "score")) and not column.endswith("1"):
                row[column] = ""
    return Evaluation(metrics, probabilities, flowers.class_names, predictions, answers, {})


def contained_metrics(
    answers: Sequence[str], class_names: Sequence[str], labels: np.ndarray
) -> dict[str, float]:
    """Top-1 of the answers (N,) that contain just one class name, with its Wilson 95% interval.

    And the share of those that contain none or several, which count as wrong; all in percent.
    """
    names = [contained(answer, class_names) for answer in answers]
    n_right = sum(c == label for c, label in zip(names, labels))
    low, high = wilson(n_right, len(names))
    return {
        "contains_top1": 100 * n_right / len(names),
        "contains_top1_low": low,
        "contains_top1_high": high,
        "contains_not_one": 100 * names.count(None) / len(names),
    }


def tells_halves_apart(config: Config) -> bool:
    """Whether base and new images compete among their own half only.

    A list of all names in the question would offer the other half, too.
    """
    return not config.list_names or OWN in config.lists


def evaluate_ranking(
    task: Task,
    record_of: dict[str, dict],
    index: np.ndarray,
    val: np.ndarray,
    folder: Path,
) -> Evaluation:
    """Compare the class names by the score that is best on `val`; by the sum if `val` is empty.

    Leaves all scores in scores.npz.
    """
    flowers = task.flowers
    all_scores = {listed: scores_of(task, record_of, index, listed) for listed in task.config.lists}
    by_score = all_scores[ALL]
    save_scores(folder / "scores.npz", all_scores, flowers, index)

    # Test labels never choose: it is the val images that say which score is reported.
    extra = {}
    score = task.config.candidates[0]
    if len(val):
        val_top1 = top1_on_val(task, record_of, val)
        score = max(val_top1, key=val_top1.get)
        extra |= {f"val/{name}_top1": top1 for name, top1 in val_top1.items()}
        table = ", ".join(f"{name} {top1:.2f}%" for name, top1 in val_top1.items())
        print(f"top-1 on {len(val):,} val images: {table}; {score} is reported")
    extra["reported_score"] = score

    labels = torch.from_numpy(flowers.labels[index])
    metrics = evaluate.classification(by_score[score], labels)
    metrics |= evaluate.probability_scores(by_score[score], labels)
    if tells_halves_apart(task.config):
        metrics |= evaluate.base_to_new(all_scores[task.config.lists[-1]][score], labels)
    metrics |= {f"{name}_top1": top1 for name, top1 in top1_of(by_score, labels.numpy()).items()}
    probabilities = by_score[score].softmax(1)
    predictions = evaluate.predictions(probabilities, flowers, index)
    answers = [row["top1"] for row in predictions]
    return Evaluation(metrics, probabilities, flowers.class_names, predictions, answers, extra)


def scores_of(
    task: Task, record_of: dict[str, dict], index: np.ndarray, listed: str = ALL
) -> dict[str, torch.Tensor]:
    """Return each of SCORES (N, C) of the images at `index`, from their records."""
    records = [record_of[task.flowers.file_names[i]] for i in index]
    sums = torch.tensor([record[f"{listed}sum"] for record in records])  # (N, C)
    if task.config.list_order == "drawn":
        without_image = torch.tensor([record[f"{listed}prior"] for record in records])  # (N, C)
    else:
        # Images differ in their half at most, so few questions are asked.
        questions = [task.questions(i, listed) for i in index]
        prior_of = {texts: rank_alone(task, texts) for texts in dict.fromkeys(questions)}
        without_image = torch.cat([prior_of[texts] for texts in questions])  # (N, C)
    return scores(sums, task.packed.lengths, without_image)


def rank_alone(task: Task, questions: Sequence[str]) -> torch.Tensor:
    """Return the mean log-likelihoods (1, C) of the names after Q questions without an image."""
    return rank_without_image(task, [[text] for text in questions])


def top1_on_val(task: Task, record_of: dict[str, dict], val: np.ndarray) -> dict[str, float]:
    """Return the top-1 accuracy on the val images, in percent, by each score that is allowed."""
    by_score = scores_of(task, record_of, val)
    top1 = top1_of(by_score, task.flowers.labels[val])
    return {score: top1[score] for score in task.config.candidates}


def choose_spelling(
    task: Task, val: np.ndarray, folder: Path, progress: Progress
) -> tuple[Task, dict[str, dict], dict[str, object]]:
    """Ask about the val images with each spelling of the names, and keep the best one.

    Of each spelling the best score counts. Returns the task with that spelling, its records of the
    val images, and what enters the result.
    """
    tasks = {case: respell(task, case) for case in NAME_CASES}
    records = {}
    top1 = {}
    for case, spelled in tasks.items():
        path = folder / f"val-{case}.jsonl"
        records[case], _ = record_images(spelled, rank_names, val, path, progress)
        top1[case] = max(top1_on_val(spelled, records[case], val).values())
    best = max(top1, key=top1.get)  # the first of equals
    table = ", ".join(f"{case} {value:.2f}%" for case, value in top1.items())
    files.say(f"top-1 on {len(val):,} val images: {table}; names are spelled as in {best}")
    extra = {"reported_name_case": best}
    extra |= {f"val/name_case_{case}_top1": value for case, value in top1.items()}
    return tasks[best], records[best], extra


def top1_of(by_score: dict[str, torch.Tensor], labels: np.ndarray) -> dict[str, float]:
    """Return the top-1 accuracy, in percent, by each score (N, C) against the labels (N,)."""
    top1 = {}
    for name, values in by_score.items():
        top1[name] = evaluate.classification(values, torch.from_numpy(labels))["top1"]
    return top1


def save_scores(
    path: Path, all_scores: dict[str, dict[str, torch.Tensor]], flowers: Flowers, index: np.ndarray
) -> None:
    """Write an .npz with an array (N, C) for each score, the N files and the C class names.

    all_scores: by the names that the question listed, ALL and OWN, which begin an array's name.
    """
    arrays = {"files": [flowers.file_names[i] for i in index], "class_names": flowers.class_names}
    for listed, by_score in all_scores.items():
        arrays |= {listed + name: values.numpy() for name, values in by_score.items()}
    with files.atomic(path) as file:
        np.savez_compressed(file, **arrays)


# -----------------------------------------------------------------------------
# the run


def check_overlap(
    config: Config, flowers: Flowers, index: np.ndarray, val: np.ndarray
) -> int | str | None:
    """How many images at `index` the model was trained on here; None if no run made it.

    val: images that decide what is reported: the model must not have been trained on them
    either. Raises UserError if there are such images, unless they are asked for.
    """
    trained = runs_behind(config.adapter, config.model)
    # A description is no evaluation, and it is training images that are described.
    if config.describe or not trained:
        return None
    allowed = config.allow_overlap or config.split == "train"
    if len(val):
        runs.check_overlap(trained, flowers, val, "val", config.allow_overlap)
    return runs.check_overlap(trained, flowers, index, config.split, allowed)


def images_of_val(config: Config, flowers: Flowers) -> np.ndarray:
    """The val images that are asked about as well: none where they decide nothing.

    Those that train.py evaluates with the same --val_shots and --seed. Where an adapter was trained
    on half of the classes, the labels of the other half choose nothing. Raises UserError if
    --name_case best has no images to be chosen on.
    """
    if not config.asks_val:
        return flowers.splits["val"][:0]
    val = val_images(flowers, config.classes, config.val_shots, config.seed)
    if config.name_case == "best" and not len(val):
        raise UserError("--name_case best: there are no val images to choose it on")
    return subset(val, config.images, seed=0)


def describe_protocol(config: Config, flowers: Flowers, n: int) -> dict:
    """What the accuracy is the accuracy of: dataset, split, names, question and weights."""
    asked = f"the {config.answer} question"
    if config.question:
        asked = templates_in_words(config.question)
    question = f"{config.protocol} after {asked}"
    if config.list_names:
        question += ", the names listed"
    if config.list_order == "drawn":
        question += " in an order drawn for each image"
    if config.name_case != "given":
        question += f", {config.name_case} case"
    adapter = f" with {config.adapter}" if config.adapter else ""
    weights = config.model + adapter
    return evaluate.protocol(flowers, config.split, n, config.class_names, question, weights)


def command_after_descriptions(config: Config, records_file: Path) -> str:
    """The command that trains on the descriptions of the same images."""
    flags = {"answer": "described", "captions": str(records_file)}
    data = ("data_root", "splits_path", "splits_base", "splits", "holdout", "class_names")
    flags |= {name: getattr(config, name) for name in ("model", "max_pixels", "images", *data)}
    flags |= runs.flags_for_next(config.runs, config.wandb)
    return runs.command_line("qwen_train.py", flags)


def prepare_task(config: Config, flowers: Flowers, processes: Processes) -> Task:
    """Load the model, saying before how much memory it takes, and put the question together."""
    class_names = flowers.class_names
    name_tokens = 8 * len(class_names)  # about; a name has four tokens
    text_tokens = 50 + (name_tokens if config.protocol == "rank" else config.most_tokens)
    if config.list_names:
        text_tokens += name_tokens
    batch_size = memory.evaluation_batch(config, text_tokens, processes.device, BATCH_SIZE)
    config = replace(config, batch_size=batch_size)
    model, processor = models.load_model(
        config.model, processes.device, config.adapter, config.max_pixels, config.load_4bit
    )

    texts = (DESCRIBE,) if config.describe else questions_of(config.answer, config.question)
    # `best` is chosen later.
    case = "given" if config.name_case == "best" else config.name_case
    spelled = spell_names(class_names, case)
    # The same for all images, so it is made once.
    packed = PackedNames(processor, spelled)
    return Task(model, processor, texts, spelled, packed, flowers, config, processes)


def open_run_folder(
    args: argparse.Namespace, settings: dict, flowers: Flowers, processes: Processes
) -> Path:
    """The folder of the run, which the main process makes unless the run is resumed."""
    folder = args.resume
    if folder and processes.is_main:
        runs.check_same_images(Path(folder), flowers.splits)
    if not folder and processes.is_main:
        folder = runs.new_run(args.runs, args.name, settings, flowers.splits)
    return Path(processes.from_main(str(folder)))


@command
def main(args: argparse.Namespace, config: Config):
    processes = devices.start_processes(config.device)  # one, unless torchrun started more
    config = models.on_machine(config, processes.device)
    devices.seed_everything(config.seed, processes.device)
    # Read first: a mistake in --compare should not be found after the work is done.
    compared = evaluate.recorded(args.compare, config.split)

    # -----------------------------------------------------------------------------
    # data and model
    with processes.main_first():
        flowers = open_from_flags(asdict(config))
        config = replace(config, splits=flowers.convention)
        index = subset(split_index(flowers, config.split), config.images, seed=0)
        val = images_of_val(config, flowers)
        overlap = check_overlap(config, flowers, index, val) if processes.is_main else None
        task = prepare_task(config, flowers, processes)
        config = task.config  # with its number of images at a time

    # -----------------------------------------------------------------------------
    # run folder
    # `architecture` is what other scripts call the model.
    settings = {"job": "qwen_eval", "architecture": config.model}
    settings |= asdict(config) | models.versions()
    folder = open_run_folder(args, settings, flowers, processes)
    mode = config.wandb if processes.is_main else "disabled"
    tracker = start_wandb(mode, folder, settings, resume=bool(args.resume))
    progress = Progress(tracker, config.batch_size, index)

    # -----------------------------------------------------------------------------
    # records
    val_records, extra = {}, {}
    if config.name_case == "best":
        task, val_records, extra = choose_spelling(task, val, folder, progress)
    if config.describe:
        protocol, records_file = describe_images, folder / "descriptions.jsonl"
    elif config.protocol == "generate":
        protocol, records_file = answer_freely, folder / "answers.jsonl"
    else:
        protocol, records_file = rank_names, folder / "answers.jsonl"
    asked = index if val_records else np.concatenate([index, val])
    record_of, result = record_images(task, protocol, asked.tolist(), records_file, progress)
    if not processes.is_main:
        return  # the main process evaluates
    record_of |= val_records
    result["peak_memory_mb"] = devices.peak_memory_mb(processes.device)
    if config.describe:
        runs.finish(folder, {"name": folder.name} | result | settings)
        tracker.finish()
        print(f"{records_file}: a sentence for each of {len(index):,} {config.split} images")
        if config.split == "train":
            print(f"next: {command_after_descriptions(config, records_file)}")
        return

    # -----------------------------------------------------------------------------
    # metrics
    if config.protocol == "generate":
        evaluation = evaluate_answers(task, record_of, index)
    else:
        evaluation = evaluate_ranking(task, record_of, index, val, folder)
    metrics = {f"{config.split}/{key}": value for key, value in evaluation.metrics.items()}
    result = metrics | result | evaluation.extra | extra

    # -----------------------------------------------------------------------------
    # results
    # Free answers have one more class: outside the list.
    flowers = replace(flowers, class_names=evaluation.class_names)
    mistakes = evaluate.save_outputs(
        folder, evaluation.probabilities, flowers, index, evaluation.metrics
    )
    # Again: free answers have no second best.
    files.write_csv(folder / "predictions.csv", evaluation.predictions)
    image_files = [flowers.files[i] for i in index]
    figures.answers_sheet(
        evaluation.predictions, evaluation.answers, image_files, folder / "answers.png"
    )
    protocol = describe_protocol(config, flowers, len(index))
    if overlap is not None:
        protocol["overlap"] = overlap
    runs.finish(folder, {"name": folder.name} | result | settings | protocol)
    finish_evaluation(tracker, result, protocol, mistakes)
    print(evaluate.results_table(folder.name, evaluation.metrics, protocol, compared))
    print(
        f"{len(index):,} images, {result['eval_images_per_s']} images/s; "
        f"results and pictures in {folder}/"
    )


if __name__ == "__main__":
    main(args, config)
