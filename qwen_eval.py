"""Qwen2-VL names flowers: the generative counterpart of baseline_eval.py.

    python qwen_eval.py                                   # Qwen2-VL-2B ranks the 102 names, 6 GB
    python qwen_eval.py --adapter runs/NAME               # what qwen_train.py made
    python qwen_eval.py --protocol generate --list_names  # its own words, matched exactly
    python qwen_eval.py --describe --split train          # sentences, for qwen_train.py --captions
    python qwen_eval.py --data_root sample --model tiny   # any machine, offline, seconds
    python qwen_eval.py --resume runs/NAME                # goes on after a kill

Takes the same images and names as baseline_eval.py, and leaves the same files in runs/NAME/.

rank: the log-likelihood of every class name as the answer. Names are compared by its sum, its mean
a token, or the sum less that without the image (pmi, pointwise mutual information). With --holdout
the val images decide which of the three is reported; without, it is the sum. All three are in
scores.npz and result.json.
"""

import argparse
import dataclasses
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from flowers import UserError, add_switch, command, devices, evaluate, figures, files, runs
from flowers.data import Flowers, add_data_arguments, open_from_flags, split_index, subset
from flowers.devices import autocast
from flowers.qwen import adapters, memory, models
from flowers.qwen.answers import first_line, generate, match, one_line
from flowers.qwen.features import digest_to_keep, load_images
from flowers.qwen.memory import Work, read_batch_size
from flowers.qwen.prompts import (
    DESCRIBE,
    QUESTIONS,
    encode,
    move,
    question_of,
)
from flowers.qwen.ranking import PackedNames, new_cache, rank, rank_after_answers, scores
from flowers.tracking import log_mistakes, start_wandb

OUTSIDE = "(outside the list)"  # the class of the answers that are no class name
SCORES = ("sum", "token", "pmi")
OLD_PMI = "calibrated"  # what the flag and older runs call pmi
# Of flags that are left out, where the adapter does not say more.
DEFAULTS = {
    "model": models.DEFAULT,
    "load_4bit": False,
    "max_pixels": 512 * 512,
    "answer": "brief",
}
BATCH_SIZE = 8


# -----------------------------------------------------------------------------
# settings


def add_question_arguments(parser: argparse.ArgumentParser) -> None:
    # model and question
    group = parser.add_argument_group("model and question")
    group.add_argument(
        "--model",
        type=files.user_path,
        help="a name on the hub, a folder, tiny or random-2b (random weights) "
        f"(default: the adapter's, else {models.DEFAULT})",
    )
    add_switch(
        group,
        "--load_4bit",
        help="the language model's blocks in 4 bits a weight, a quarter of the memory; needs "
        "requirements-4bit.txt (default: as the adapter was trained)",
        default=None,
    )
    group.add_argument(
        "--adapter",
        type=files.user_path,
        metavar="RUN",
        help="a run of qwen_train.py, or the folder of an adapter",
    )
    group.add_argument(
        "--max_pixels",
        type=int,
        help="scale larger images down to so many pixels; a token stands for 28 x 28 of them in "
        "Qwen2-VL and Qwen2.5-VL, 32 x 32 in Qwen3-VL (default: the adapter's, else 262144)",
    )
    group.add_argument(
        "--protocol",
        choices=["rank", "generate"],
        default="rank",
        help="rank the class names by their likelihood, or answer freely and be matched exactly "
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
    add_switch(group, "--list_names", help="name all classes in the question")
    group.add_argument(
        "--most_tokens",
        type=int,
        default=80,
        help="the longest answer or description, in tokens (default: %(default)s)",
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
        "--images", type=int, default=0, help="so many of them, drawn with seed 0 (default: 0, all)"
    )
    add_question_arguments(parser)
    devices.add_device_arguments(parser.add_argument_group("machine"))
    # run
    group = parser.add_argument_group("run")
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


def parse_arguments() -> argparse.Namespace:
    """The flags; data, splits and names are those of the adapter where they are left out.

    With --resume, those that the run was started with. Ends the program if that run is finished.
    Raises UserError if there is no run to resume.
    """
    parser = make_parser()
    args = parser.parse_args()
    if not args.resume:
        return runs.parse_inheriting(parser, "adapter")
    stored = runs.arguments_to_resume(Path(args.resume), "qwen_eval")
    if stored is None:
        raise SystemExit  # it is finished, which was printed
    return runs.parse_stored(parser, args, stored)


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
    list_names: bool
    most_tokens: int
    describe: bool
    # machine
    device: str
    precision: str
    # run
    batch_size: int
    allow_overlap: bool
    runs: str
    wandb: str

    @property
    def chooses_score(self) -> bool:
        """Whether the val images, if there are any, decide which score is reported."""
        ranks = self.protocol == "rank" and not self.describe
        return ranks and self.score == "auto" and self.split == "test"


def fill_in_from_adapter(args: argparse.Namespace) -> None:
    """Give flags that were left out the value that the adapter was trained with, or the default.

    Says which model that is, and where flags that were typed ask for something else.
    Raises UserError if there is no adapter, if it names no model, or has seen the val images.
    """
    trained = {}
    if args.adapter:
        recorded = adapters.model_of_adapter(Path(args.adapter))
        # None where adapter/ was copied out of its run.
        folder = runs.run_folder(args.adapter)
        trained = runs.read_arguments(folder) if folder else {}
        if recorded:
            trained.setdefault("model", recorded)
        if args.model is None and "model" not in trained:
            raise UserError(
                f"{args.adapter} does not say which model it was made for: give --model"
            )
        if args.model is None:
            print(f"--model {trained['model']}, which {args.adapter} was made for")
        if args.holdout and folder and not trained.get("holdout"):
            raise UserError(
                f"{args.adapter} was trained on the val images: "
                "--holdout needs an adapter that was trained with --holdout"
            )
    for flag, default in DEFAULTS.items():
        value = getattr(args, flag)
        found = trained.get(flag, default)
        is_sound = type(found) is type(default) and (flag != "answer" or found in QUESTIONS)
        if not is_sound:
            raise UserError(f"args.json of {args.adapter} is damaged ({flag} is {found!r})")
        if value is None:
            setattr(args, flag, found)
        elif flag in trained and found != value:
            files.note(f"--{flag} {value}: {args.adapter} was trained with {found}")
    # Training always asks the question alone.
    if trained.get("answer") and args.list_names and not args.describe:
        files.note(f"--list_names: {args.adapter} was trained on the question without the names")


def resolve(args: argparse.Namespace) -> Config:
    """Return the settings that the flags mean, with those of the adapter where they say nothing.

    Raises UserError if they contradict one another, or the adapter.
    """
    if args.score == OLD_PMI:
        files.note(f"--score {OLD_PMI} is now called pmi")
        args.score = "pmi"
    fill_in_from_adapter(args)
    # 0 for auto, which is known when the names are
    if min(args.batch_size + 1, args.most_tokens) < 1 or args.images < 0:
        raise UserError("--batch_size and --most_tokens must be at least 1, --images not below 0")
    models.check_max_pixels(args.model, args.max_pixels)
    # After all checks: the device becomes torch's own.
    device = devices.choose_device(args.device)
    if args.load_4bit:
        models.check_4bit(args.model, device)
    args.device = str(device)
    args.precision = devices.set_precision(args.precision, device)
    return Config(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Config)})


# -----------------------------------------------------------------------------
# protocols: from a batch of images to what is recorded of each


@dataclass(frozen=True)
class Task:
    """The model and what it is asked."""

    model: torch.nn.Module
    processor: object
    question: str
    tree: PackedNames
    config: Config
    device: torch.device

    def prompts(self, image: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tokens of the question about each image, on the device."""
        return move(encode(self.processor, self.question, image["image_grid_thw"]), self.device)

    def generate(self, image: dict[str, torch.Tensor], kv_cache=None) -> list[str]:
        """Return the model's answer to the question about each image. kv_cache: is filled."""
        image = move(image, self.device)
        most_tokens = self.config.most_tokens
        return generate(
            self.model, self.processor, self.prompts(image), image, most_tokens, kv_cache
        )


def describe_images(task: Task, image: dict[str, torch.Tensor]) -> list[dict]:
    """A generated sentence for each image, as `read_captions` reads it."""
    return [{"captions": [one_line(text)]} for text in task.generate(image)]


def answer_freely(task: Task, image: dict[str, torch.Tensor]) -> list[dict]:
    """The model's own words for each image."""
    return [{"answer": text} for text in task.generate(image)]


def rank_names(task: Task, image: dict[str, torch.Tensor]) -> list[dict]:
    """The log-likelihood of every class name for each image.

    Under --answer described the names are ranked after the model's own description. Raises
    UserError for a model that gives no finite numbers.
    """
    records = [{} for _ in image["image_grid_thw"]]
    prompts = task.prompts(image)
    image = move(image, task.device)
    if task.config.answer == "described":
        # Image and question are read once, for the description and the names.
        kv_cache = new_cache(task.model)
        descriptions = [first_line(text) for text in task.generate(image, kv_cache)]
        records = [{"description": description} for description in descriptions]
        texts = [description + "\n" for description in descriptions]
        sums = rank_after_answers(
            task.model, task.processor, task.tree, prompts, image, kv_cache, texts
        ).cpu()
    else:
        sums = rank(task.model, task.tree, prompts, image).cpu()  # (B, C)
    if not sums.isfinite().all():
        raise UserError(
            f"{task.config.model} gives no finite log-likelihoods: "
            "its weights are damaged, or made for another precision"
        )
    # One line of JSON an image: 102 numbers of five decimals are a kilobyte.
    sums_of_image = [[round(value, 5) for value in row] for row in sums.tolist()]
    return [{"sum": row} | record for row, record in zip(sums_of_image, records)]


@torch.inference_mode()
def rank_without_image(task: Task) -> torch.Tensor:
    """Return the log-likelihoods (1, C) of the names after the question alone."""
    # A description that says nothing comes before the name.
    prefixes = ["\n"] if task.config.answer == "described" else None
    prompt = encode(task.processor, task.question, None, prefixes)
    with autocast(task.device):
        return rank(task.model, task.tree, move(prompt, task.device)).cpu()


def record_images(
    task: Task, protocol: Callable, flowers: Flowers, index: list[int], path: Path
) -> tuple[dict[str, dict], dict[str, float]]:
    """Apply a protocol to the images at `index`, and append a line to `path` for each.

    Lines that are there already stay, so that a run that was killed goes on where it was.
    Returns the records by file name, and the time that the new ones took.
    """
    rows = files.read_lines(path, "file")
    files.write_lines(path, rows)  # without the line that a kill cut off
    record_of = {row["file"]: row for row in rows}
    remaining = [i for i in index if flowers.file_names[i] not in record_of]
    digest = digest_to_keep(task.model, task.processor, flowers, remaining)
    batches = load_images(
        task.model, task.processor, flowers, remaining, task.config.batch_size, digest
    )

    title = "describing" if task.config.describe else task.config.protocol
    start = time.perf_counter()
    with tqdm(total=len(index), initial=len(record_of), unit="img", desc=title) as bar:
        for image, batch in batches:
            # Written batch by batch, so that a kill costs no more than one.
            with autocast(task.device):
                records = protocol(task, image)
            for i, record in zip(batch, records):
                row = {"file": flowers.file_names[i]} | record
                record_of[row["file"]] = row
                files.append_line(path, row)
            bar.update(len(batch))
    seconds = time.perf_counter() - start
    timing = {
        "eval_seconds": round(seconds, 3),
        "eval_images_per_s": round(len(remaining) / seconds, 2),
    }
    return record_of, timing


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


def evaluate_answers(record_of: dict[str, dict], flowers: Flowers, index: np.ndarray) -> Evaluation:
    """Match free answers with the class names: each is one of them or none, with no second best."""
    answers = [record_of[flowers.file_names[i]]["answer"] for i in index]
    matches = [match(answer, flowers.class_names) for answer in answers]
    # The answers that are no name are a class of their own, the last.
    outside = len(flowers.class_names)
    flowers = replace(flowers, class_names=(*flowers.class_names, OUTSIDE))
    predicted = torch.tensor([outside if c is None else c for c in matches])
    probabilities = F.one_hot(predicted, outside + 1).float()  # (N, C + 1)

    metrics = evaluate.classification(probabilities, torch.from_numpy(flowers.labels[index]))
    del metrics["top3"], metrics["top5"]
    metrics["outside_list"] = 100 * matches.count(None) / len(matches)
    predictions = evaluate.predictions(probabilities, flowers, index)
    for row in predictions:
        for column in row:
            if column.startswith(("top", "score")) and not column.endswith("1"):
                row[column] = ""
    return Evaluation(metrics, probabilities, flowers.class_names, predictions, answers, {})


def evaluate_ranking(
    task: Task,
    record_of: dict[str, dict],
    flowers: Flowers,
    index: np.ndarray,
    val: np.ndarray,
    folder: Path,
) -> Evaluation:
    """Compare the class names by the score that is best on `val`; by the sum if `val` is empty.

    Leaves all scores in scores.npz.
    """
    lengths = task.tree.lengths
    without_image = rank_without_image(task)  # (1, C): what the names alone are worth
    by_score = scores(sums_of(record_of, flowers, index), lengths, without_image)
    save_scores(folder / "scores.npz", by_score, flowers, index)

    # Test labels never choose: it is the val images that say which score is reported.
    extra = {}
    score = "sum" if task.config.score == "auto" else task.config.score
    if len(val):
        on_val = scores(sums_of(record_of, flowers, val), lengths, without_image)
        val_top1 = top1_of(on_val, flowers.labels[val])
        score = max(val_top1, key=val_top1.get)
        extra |= {f"val/{name}_top1": top1 for name, top1 in val_top1.items()}
        table = ", ".join(f"{name} {top1:.2f}%" for name, top1 in val_top1.items())
        print(f"top-1 on val: {table}; {score} is reported")
    extra["reported_score"] = score

    labels = flowers.labels[index]
    metrics = evaluate.classification(by_score[score], torch.from_numpy(labels))
    metrics |= evaluate.probability_scores(by_score[score], torch.from_numpy(labels))
    metrics |= {f"{name}_top1": top1 for name, top1 in top1_of(by_score, labels).items()}
    probabilities = by_score[score].softmax(1)
    predictions = evaluate.predictions(probabilities, flowers, index)
    answers = [row["top1"] for row in predictions]
    return Evaluation(metrics, probabilities, flowers.class_names, predictions, answers, extra)


def sums_of(record_of: dict[str, dict], flowers: Flowers, index: np.ndarray) -> torch.Tensor:
    """Return the recorded log-likelihoods (N, C) of the images at `index`."""
    return torch.tensor([record_of[flowers.file_names[i]]["sum"] for i in index])


def top1_of(by_score: dict[str, torch.Tensor], labels: np.ndarray) -> dict[str, float]:
    """Return the top-1 accuracy, in percent, by each score (N, C) against the labels (N,)."""
    top1 = {}
    for name, values in by_score.items():
        top1[name] = evaluate.classification(values, torch.from_numpy(labels))["top1"]
    return top1


def save_scores(
    path: Path, by_score: dict[str, torch.Tensor], flowers: Flowers, index: np.ndarray
) -> None:
    """Write an .npz with an array (N, C) for each score, the N files and the C class names."""
    arrays = {"files": [flowers.file_names[i] for i in index], "class_names": flowers.class_names}
    arrays |= {name: values.numpy() for name, values in by_score.items()}
    with files.atomic(path) as file:
        np.savez_compressed(file, **arrays)


def answer_sheet(
    evaluation: Evaluation, flowers: Flowers, index: np.ndarray, path: Path, max_images: int = 24
) -> None:
    """Draw images, spread evenly over `index`: the true name above, the answer below.

    Answers are blue where they are right, and orange where they are wrong.
    """
    n_images = min(max_images, len(index))
    positions = np.linspace(0, len(index) - 1, n_images).round().astype(int)
    cells = []
    n_right = 0
    for j in np.unique(positions):
        row = evaluation.predictions[j]
        answer = textwrap.shorten(evaluation.answers[j], 60, placeholder=" …") or "(nothing)"
        if row["top1"] == row["label"]:
            n_right += 1
            below, colour = f"✓ {answer}", figures.PALETTE[0]
        else:
            below, colour = f"✗ {answer}", figures.PALETTE[1]
        cells.append((flowers.files[index[j]], row["label"], below, colour))
    title = f"True name above, answer below: {n_right} of {len(cells)} right (blue, ✓)"
    figures.picture_sheet(cells, path, title, border=7)


# -----------------------------------------------------------------------------
# the run


def check_overlap(
    config: Config, flowers: Flowers, index: np.ndarray, val: np.ndarray
) -> int | str | None:
    """How many images at `index` the adapter was trained on; None without one.

    val: images that decide what is reported: the adapter must not have been trained on them
    either. Raises UserError if there are such images, unless they are asked for.
    """
    # A description is no evaluation, and it is training images that are described.
    if config.describe or not config.adapter:
        return None
    allowed = config.allow_overlap or config.split == "train"
    if len(val):
        runs.check_overlap([config.adapter], flowers, val, "val", config.allow_overlap)
    return runs.check_overlap([config.adapter], flowers, index, config.split, allowed)


def describe_protocol(config: Config, flowers: Flowers, n: int) -> dict:
    """What the accuracy is the accuracy of: dataset, split, names, question and weights."""
    names = ", the names listed" if config.list_names else ""
    question = f"{config.protocol} after the {config.answer} question{names}"
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


def prepare_task(config: Config, flowers: Flowers, device: torch.device) -> Task:
    """Load the model, saying before how much memory it takes, and put the question together."""
    class_names = flowers.class_names
    name_tokens = 8 * len(class_names)  # about; a name has four tokens
    text_tokens = 50 + (name_tokens if config.protocol == "rank" else config.most_tokens)
    if config.list_names:
        text_tokens += name_tokens
    skeleton = models.load_skeleton(config.model)
    image_tokens = memory.tokens_of_image(config.model, skeleton, config.max_pixels)
    work = Work(
        config.batch_size or BATCH_SIZE,
        image_tokens,
        text_tokens,
        precision=config.precision,
        load_4bit=config.load_4bit,
    )
    free = memory.free_gigabytes(device)
    if config.batch_size == 0:
        work = replace(work, batch_size=memory.largest_batch(skeleton, work, free))
        config = replace(config, batch_size=work.batch_size)
    print(memory.memory_line(config.model, skeleton, work, free))
    model, processor = models.load_model(
        config.model, device, config.adapter, config.max_pixels, config.load_4bit
    )

    question = question_of(config.answer, class_names if config.list_names else None)
    if config.describe:
        question = DESCRIBE
    # The same for all images, so it is made once.
    tree = PackedNames(processor, class_names)
    return Task(model, processor, question, tree, config, device)


@command
def main():
    args = parse_arguments()
    config = resolve(args)
    metrics_of_run = {Path(run).name: runs.read_metrics(run, config.split) for run in args.compare}
    device = torch.device(config.device)
    devices.seed_everything(0, device)
    protocols = {
        Path(run).name: evaluate.recorded_protocol(run, config.split) for run in args.compare
    }

    # -----------------------------------------------------------------------------
    # data and model
    flowers = open_from_flags(dataclasses.asdict(config))
    config = replace(config, splits=flowers.convention)
    index = subset(split_index(flowers, config.split), config.images, seed=0)
    # The val images are asked about as well, but only where they decide something.
    val = index[:0]
    if config.chooses_score:
        val = subset(flowers.splits["val"], config.images, seed=0)
    overlap = check_overlap(config, flowers, index, val)
    task = prepare_task(config, flowers, device)
    config = task.config  # with its number of images at a time

    # -----------------------------------------------------------------------------
    # run folder
    # `architecture` is what other scripts call the model.
    settings = {"job": "qwen_eval", "architecture": config.model}
    settings |= dataclasses.asdict(config) | models.versions()
    if args.resume:
        folder = Path(args.resume)
    else:
        folder = runs.new_run(config.runs, args.name, settings, flowers.splits)

    # -----------------------------------------------------------------------------
    # records
    if config.describe:
        protocol, records_file = describe_images, folder / "descriptions.jsonl"
    elif config.protocol == "generate":
        protocol, records_file = answer_freely, folder / "answers.jsonl"
    else:
        protocol, records_file = rank_names, folder / "answers.jsonl"
    record_of, result = record_images(task, protocol, flowers, [*index, *val], records_file)
    result["peak_memory_mb"] = devices.peak_memory_mb(device)
    if config.describe:
        runs.finish(folder, {"name": folder.name} | result | settings)
        print(f"{records_file}: a sentence for each of {len(index):,} {config.split} images")
        if config.split == "train":
            print(f"next: {command_after_descriptions(config, records_file)}")
        return

    # -----------------------------------------------------------------------------
    # metrics
    if config.protocol == "generate":
        evaluation = evaluate_answers(record_of, flowers, index)
    else:
        evaluation = evaluate_ranking(task, record_of, flowers, index, val, folder)
    metrics = {f"{config.split}/{key}": value for key, value in evaluation.metrics.items()}
    result = metrics | result | evaluation.extra

    # -----------------------------------------------------------------------------
    # results
    # Free answers have one more class: outside the list.
    flowers = replace(flowers, class_names=evaluation.class_names)
    evaluate.save_outputs(folder, evaluation.probabilities, flowers, index, evaluation.metrics)
    # Again: free answers have no second best.
    files.write_csv(folder / "predictions.csv", evaluation.predictions)
    answer_sheet(evaluation, flowers, index, folder / "answers.png")
    protocol = describe_protocol(config, flowers, len(index))
    if overlap is not None:
        protocol["overlap"] = overlap
    runs.finish(folder, {"name": folder.name} | result | settings | protocol)
    tracker = start_wandb(config.wandb, folder, settings)
    tracker.log(result)
    tracker.summarise(protocol)
    log_mistakes(tracker, figures.mistakes(evaluation.probabilities.numpy(), flowers, index))
    tracker.finish()
    seen = {"overlap": overlap} if overlap else {}
    protocols[folder.name] = evaluate.protocol_line(protocol, overlap)
    shown = metrics_of_run | {folder.name: evaluation.metrics | seen}
    print(evaluate.format_table(shown, protocols))
    print(
        f"{len(index):,} images, {result['eval_images_per_s']} images/s; "
        f"results and pictures in {folder}/"
    )


if __name__ == "__main__":
    main()
