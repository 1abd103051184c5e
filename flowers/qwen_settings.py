"""What the three Qwen scripts are told alike: model, question, and what the run of an adapter says.

Beside flowers/qwen/, which imports transformers, and without torch: --help and a mistake in a flag
are answered at once.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from flowers import UserError, add_switch, files, reason, runs
from flowers.choices import MAX_VAL_SHOTS, templates_in_words

DEFAULT_MODEL = "Qwen/Qwen2-VL-2B-Instruct"
MAX_PIXELS = 512 * 512  # of an image
CLASSES = ("all", "base", "new")

# The questions, by the kind of answer that they ask for.
QUESTIONS = {
    "brief": "What kind of flower is this? Answer with its name only.",
    "described": "Describe this flower in one line, then give its name alone on a second line.",
}
DESCRIBE = "Describe the flower's colours, petals and centre in one sentence, without naming it."
AUTO = "auto"  # --batch_size: as many images as fit
LIST_ORDERS = ("given", "drawn")
NAME_CASES = ("given", "lower", "title")

# Of flags that an evaluation leaves out, where the run of its adapter does not say more.
DEFAULTS = {
    "model": DEFAULT_MODEL,
    "load_4bit": False,
    "max_pixels": MAX_PIXELS,
    "answer": "brief",
}
# The same, of flags that older runs of qwen_train.py did not have: these are what they did.
NEW_DEFAULTS = {
    "question": None,
    "list_names": False,
    "list_order": "given",
    "name_case": "given",
    "classes": "all",
    "val_shots": None,
    "seed": 0,
}
# What the args.json of a run may say of a flag.
CHOICES = {
    "answer": tuple(QUESTIONS),
    "list_order": LIST_ORDERS,
    "name_case": NAME_CASES,
    "classes": CLASSES,
}

Settings = TypeVar("Settings")


def settings_of(kind: type[Settings], args: argparse.Namespace) -> Settings:
    """The settings of a script, whose dataclass is `kind`: the flags of the same names."""
    names = [field.name for field in dataclasses.fields(kind)]
    return kind(**{name: getattr(args, name) for name in names})


# -----------------------------------------------------------------------------
# flags
# inherits: a flag that is left out is None, for the value that the adapter was trained with


def _default(value: str, inherits: bool) -> str:
    return f"the adapter's, else {value}" if inherits else value


def add_model_arguments(group, inherits: bool = False) -> None:
    """Add --model, --load_4bit and --max_pixels to a parser, or a group of it.

    inherits: --adapter, too, whose values are the defaults.
    """
    group.add_argument(
        "--model",
        "--architecture",
        type=files.user_path,
        default=None if inherits else DEFAULT_MODEL,
        help="a name on the hub, a folder, tiny or random-2b (random weights) "
        f"(default: {_default(DEFAULT_MODEL, inherits)})",
    )
    if inherits:
        group.add_argument(
            "--adapter",
            type=files.user_path,
            metavar="RUN",
            help="a run of qwen_train.py, or the folder of an adapter",
        )
    add_switch(
        group,
        "--load_4bit",
        help="the blocks of the language model, which training leaves as they are (QLoRA), in 4 "
        "bits a weight: a quarter of the memory; needs requirements-4bit.txt "
        f"(default: {_default('false', inherits)})",
        default=None if inherits else False,
    )
    group.add_argument(
        "--max_pixels",
        type=int,
        default=None if inherits else MAX_PIXELS,
        help="scale larger images down to so many pixels; a token stands for 28 x 28 of them in "
        "Qwen2-VL and Qwen2.5-VL, 32 x 32 in Qwen3-VL "
        f"(default: {_default(str(MAX_PIXELS), inherits)})",
    )


def add_question_arguments(group, inherits: bool = False) -> None:
    """Add --question, --list_names, --list_order and --name_case to a parser, or a group of it."""
    group.add_argument(
        "--question",
        nargs="+",
        # Repeated flags add up, so that runs.as_flags can write the list back.
        action="extend",
        metavar="TEXT",
        help="what is asked, in your own words. Of several texts, training draws one for each "
        "image, and evaluation takes the mean log-likelihood "
        f"(default: {_default('the question of --answer', inherits)})",
    )
    add_switch(
        group,
        "--list_names",
        help=f"name all classes in the question (default: {_default('false', inherits)})",
        default=None if inherits else False,
    )
    group.add_argument(
        "--list_order",
        choices=LIST_ORDERS,
        default=None if inherits else "given",
        help="order of the listed names: that of the classes, or drawn anew for each image "
        f"(default: {_default('given', inherits)})",
    )
    # The best of the spellings is chosen on val, by the evaluation.
    cases = (*NAME_CASES, "best") if inherits else NAME_CASES
    choice = "; best: what is best on val, with --holdout" if inherits else ""
    group.add_argument(
        "--name_case",
        choices=cases,
        default=None if inherits else "given",
        help="spelling of the names, in the list and as answers: as the dataset has them, in lower "
        f"case, or Each Word With A Capital{choice} (default: {_default('given', inherits)})",
    )


def read_batch_size(text: str) -> int | str:
    """Return what --batch_size says: AUTO, or a number above 0. A type for argparse."""
    if text == AUTO:
        return AUTO
    # As many digits as no number of images has would be an error of its own to int().
    number = int(text) if text.isdecimal() and len(text) < 10 else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a whole number above 0")
    return number


def check_questions(question: Sequence[str] | None, list_names: bool, list_order: str) -> None:
    """Raise UserError for flags of `add_question_arguments` that mean nothing, or too much."""
    for text in question or ():
        if not text.strip():
            raise UserError("--question: there are no words in it")
        # The tokenizer would take it for an end of the turn, or for one more image.
        if "<|" in text:
            raise UserError(f"--question {text!r}: <| begins a special token: leave it out")
        if question.count(text) > 1:
            raise UserError(f"--question {text!r}: it is given twice")
    if list_order == "drawn" and not list_names:
        raise UserError("--list_order drawn: it is for the names of --list_names: give both")


# -----------------------------------------------------------------------------
# adapters


def adapter_folder(path: Path) -> Path:
    """The folder of the adapter in a run, or `path` itself. Raises UserError if there is none."""
    folder = path / "adapter" if (path / "adapter").is_dir() else path
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"no adapter in {path}: give a finished run of qwen_train.py")
    return folder


def model_of_adapter(path: Path) -> str | None:
    """Return the model that an adapter was made for, by its adapter_config.json; None if unsaid.

    Raises UserError if there is no adapter, or the file is damaged.
    """
    file = adapter_folder(path) / "adapter_config.json"
    try:
        return files.read_json(file).get("base_model_name_or_path") or None
    except ValueError as error:
        raise UserError(f"{file} is damaged ({reason(error)})") from None


def runs_behind(adapter: str | None, model: str) -> list[str]:
    """Those of adapter and model that a run made here, so that it is known what they have seen."""
    return [source for source in (adapter, model) if source and runs.run_folder(source)]


# -----------------------------------------------------------------------------
# what an adapter was trained with


def parse_inheriting(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; data, splits and names that it leaves out are those of the training.

    That of the adapter, or of the merged model. Says where flags that were typed name others.
    Raises UserError if args.json of the run is damaged.
    """
    args = parser.parse_args()
    model_flag = "adapter" if args.adapter else "model"
    source = getattr(args, model_flag)
    args = runs.parse_inheriting(parser, model_flag)
    trained = runs.inherited_arguments(source) if source else {}
    for flag, found in trained.items():
        # CLIP's templates are no flags of Qwen.
        value = getattr(args, flag, found)
        if value != found and value is not None:
            _note_difference(flag, value, source, found)
    return args


def read_training(adapter: str | None, model: str | None) -> dict:
    """The args.json of the run that made an adapter, or merged a model; empty if no run did.

    Its `model` is what the adapter belongs to, which is said where --model is left out. Raises
    UserError if there is no adapter, if it names no model, or if args.json is damaged.
    """
    source = adapter or model
    # None where adapter/ was copied out of its run, and for a model that no run made.
    folder = runs.run_folder(source) if source else None
    trained = NEW_DEFAULTS | runs.read_arguments(folder) if folder else {}
    if adapter:
        recorded = model_of_adapter(Path(adapter))
        if recorded:
            trained.setdefault("model", recorded)
        if model is None and "model" not in trained:
            raise UserError(f"{adapter} does not say which model it was made for: give --model")
        if model is None:
            files.say(f"--model {trained['model']}, which {adapter} was made for")
    elif folder:
        trained["model"] = model  # merged: not the one that it started from
    for flag, default in (DEFAULTS | NEW_DEFAULTS).items():
        value = trained.get(flag, default)
        if not _is_sound(flag, value, default):
            raise UserError(f"args.json of {source} is damaged ({flag} is {value!r})")
    return trained


def _is_sound(flag: str, value, default) -> bool:
    """Whether a value of args.json is one that the flag can have."""
    if flag == "question" and value is not None:
        return runs.is_list_of_texts(value)
    if flag == "val_shots" and value is not None:
        return type(value) is int and value >= 1
    has_type = type(value) is type(default)
    return has_type and value in CHOICES.get(flag, (value,))


def fill_in(args: argparse.Namespace, trained: Mapping, defaults: Mapping) -> None:
    """Give the flags of `defaults` that were left out the value of the training, or the default.

    trained: of `read_training`. Says where flags that were typed ask for something else.
    """
    source = args.adapter or args.model
    for flag, default in defaults.items():
        value, found = getattr(args, flag), trained.get(flag, default)
        if value is None:
            setattr(args, flag, found)
        elif flag in trained and found != value:
            _note_difference(flag, value, source, found)


def _note_difference(flag: str, value, source: str, found) -> None:
    files.note(f"--{flag} {_in_words(value)}: {source} was trained with {_in_words(found)}")


def _in_words(value) -> str:
    """The value of a flag, as it is said to the user."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return templates_in_words(value) if isinstance(value, list) else str(value)


# -----------------------------------------------------------------------------
# a run in the words of the report and the page


def protocol_in_words(settings: Mapping, result: Mapping) -> str:
    """How Qwen was asked, in words; of a probe its features, and a penalty that was not tuned."""
    if settings["job"] == "qwen_eval":
        listed = ", names listed" if settings.get("list_names") else ""
        return f"{settings.get('protocol')}{listed}"
    words = f"probe of {settings.get('features')}"
    shots, val_shots = settings.get("shots"), settings.get("val_shots")
    if result.get("chosen_on") != "val":
        return f"{words}, C = {result.get('fitted_C')}"
    by_shots = shots and val_shots == min(shots, MAX_VAL_SHOTS)
    # On val itself, the images say it.
    if val_shots and not by_shots and "val/top1" not in result:
        words += f", C on {val_shots} images a class"
    return words


def strategy_in_words(job: str, is_tuned: bool, protocol: str) -> str:
    """Training and protocol of a run: zero-shot (rank), lora (rank), linear (probe of ...).

    is_tuned: whether the model has an adapter. protocol: as `protocol_in_words` says it.
    """
    method = "lora" if is_tuned else "zero-shot"
    if job == "qwen_probe":
        method = "lora + linear" if is_tuned else "linear"
    return f"{method} ({protocol})"
