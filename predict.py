"""Names for pictures of your own, by any CLIP that the other scripts take.

    python predict.py --architecture runs/NAME rose.jpg              # the classes of the run
    python predict.py --architecture runs/NAME holiday/ --csv names.csv --sheet names.png
    python predict.py --architecture ViT-B/32 --names mine.txt garden/   # names of your own

Pictures may have any format that Pillow reads; folders are searched with all folders in them.
Prints the best names of each picture with their probabilities. These are the softmax at the
model's temperature over the names that there are: they sum to 100% also where a picture shows none
of them. A run of train.py --holdout has found on its val images the temperature of least NLL: it
is used with the run's own names and prompts, and said. All others are not calibrated (of answers
with 90%, more or fewer than 90% may be right).
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flowers import UserError, add_device_arguments, add_switch, command
from flowers.choices import KEEPS_WEIGHTS, RANDOM, SHAPES, TEMPLATE, add_activation_argument
from flowers.files import user_file, user_path

MOST_ON_SHEET = 48


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "pictures",
        nargs="+",
        metavar="PICTURE_OR_FOLDER",
        help="picture files, and folders to search for pictures; hidden files are passed over",
    )
    # model
    parser.add_argument(
        "--architecture",
        type=user_path,
        default="ViT-B/32",
        help="a run folder, a name of clip.available_models(), tiny, tiny-16, tiny-rn, the path of "
        "a state dict, open_clip:NAME/PRETRAINED, or hf:NAME; docs/models.md lists all "
        "(default: %(default)s, not fine-tuned)",
    )
    add_activation_argument(parser)
    add_head_arguments(parser)
    add_device_arguments(parser)
    add_result_arguments(parser)
    args = parser.parse_args()
    if args.prompts and args.prompt_template:
        raise UserError("--prompts and --prompt_template: give one of them")
    check_outputs(args)
    return args


def add_head_arguments(parser: argparse.ArgumentParser) -> None:
    # names, prompts, and the temperature of their probabilities
    parser.add_argument(
        "--names",
        metavar="FILE",
        type=user_file,
        help='names to choose from: a text file with one a line, or JSON, ["rose", "lily"] or '
        '{"1": "rose", "2": "lily"} (default: the classes of the run; of a pretrained model the '
        "102 of Oxford Flowers)",
    )
    parser.add_argument(
        "--prompt_template",
        action="append",
        help="text with {} for the name; repeat it for an ensemble "
        f"(default: that of the run, else '{TEMPLATE}')",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        type=user_file,
        help="JSON of names, each with a list of sentences, instead of --prompt_template",
    )
    add_switch(
        parser,
        "--calibrated",
        default=None,
        help="divide the logits by the temperature that a run of train.py --holdout found on val; "
        "--calibrated=false leaves it out (default: if the run has one, and is asked for its own "
        "names by its own prompts)",
    )


def add_result_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--top", type=int, default=5, help="names for each picture (default: %(default)s)"
    )
    parser.add_argument(
        "--csv",
        metavar="FILE",
        type=user_file,
        help="write a row a picture: file, top1, score1, top2, ... (scores from 0 to 1)",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=user_file,
        help="write the same as JSON, with the settings and the files that could not be read",
    )
    parser.add_argument(
        "--sheet",
        metavar="FILE.png",
        type=user_file,
        help=f"draw the first {MOST_ON_SHEET} pictures with their names and probabilities",
    )


def check_outputs(args: argparse.Namespace) -> None:
    """Check where results go, before any work is done. Makes nothing."""
    if args.top < 1:
        raise UserError(f"--top {args.top}: it must be at least 1")
    if args.sheet and args.sheet.suffix.lower() != ".png":
        raise UserError(f"--sheet {args.sheet}: it is written as PNG, so its name must end in .png")
    refuse_overwriting(outputs(args), [args.names, args.prompts])
    for path in outputs(args):
        if path.is_dir():
            raise UserError(f"{path} is a folder: give the name of a file")
        # What is missing of its folders is made within the first one that exists.
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir():
            raise UserError(f"{path} can't be written: {folder} is no folder")
        if not os.access(folder, os.W_OK):
            raise UserError(f"{path} can't be written: {folder} is read-only")


def refuse_overwriting(written: Sequence[Path], read: Sequence[Path | None]) -> None:
    """Raise UserError for a file that would be written twice, or in place of one that is read."""
    written = [path for path in written if path.is_file() or not path.exists()]  # no device
    places = [path.resolve() for path in written]
    read_places = {path.resolve() for path in read if path is not None}
    for path, place in zip(written, places):
        if places.count(place) > 1:
            raise UserError(
                f"{path} is to be written twice: give --csv, --json and --sheet different names"
            )
        if place in read_places:
            raise UserError(f"{path} is read here, and would be written over: give another name")


def outputs(args: argparse.Namespace) -> list[Path]:
    """The files to write."""
    return [path for path in (args.csv, args.json, args.sheet) if path is not None]


if __name__ == "__main__":
    args = command(parse_arguments)()  # before torch is imported: see flowers.command

import torch
from tqdm import tqdm

from flowers import calibration, devices, evaluate, files, layouts, runs
from flowers.data import open_flowers
from flowers.download import default_root, is_complete
from flowers.images import read_picture
from flowers.models import CLIP, image_features
from flowers.pixels import resize_and_crop
from flowers.sample.kinds import KINDS
from flowers.weights import load_model

# What is taken for a picture in a folder. A file that is named on the command line may have any
# name. Pillow needs a plugin for HEIC: without it those files are named and passed over.
SUFFIXES = set(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .dib .tif .tiff .avif .heic .heif .jp2 .j2k "
    ".jpx .ppm .pgm .pbm .pnm .tga .psd .ico .qoi".split()
)
# Packed by macOS beside the files of an archive: not pictures, but with their names.
MACOS_FOLDER = "__MACOSX"

BATCH = 64  # pictures decoded and encoded at a time
NAMES_ON_SHEET = 3


@command
def main(args: argparse.Namespace):
    # Pillow warns of odd files, while a bar is running; what can't be read is named at the end.
    warnings.filterwarnings("ignore", module="PIL")
    device = devices.choose_device(args.device)
    devices.set_precision(args.precision, device)
    devices.seed_everything(0, device)  # the random weights of tiny, as baseline_eval.py has them

    # -----------------------------------------------------------------------------
    # pictures
    pictures = find_pictures(args.pictures)
    refuse_overwriting(outputs(args), pictures)

    # -----------------------------------------------------------------------------
    # names and model
    run = run_folder(args.architecture)
    names, source = choose_names(run, args.names)
    templates = choose_templates(run, args.prompt_template)
    sentences = choose_sentences(run, names, args.prompts, templates)
    if run and args.names and templates is None and sentences is None:
        check_head(run, names)
    temperature = choose_temperature(run, names, templates, args)
    note = f"; {calibration.temperature_in_words(temperature)}" if temperature else ""
    model = load_model(args.architecture, device, args.activation)
    head, templates = evaluate.load_head(
        args.architecture, model, names, templates, TEMPLATE, sentences
    )
    print(f"{args.architecture}: {len(names)} names {source}{note}")
    if args.architecture in RANDOM:
        print(f"warning: {args.architecture} is untrained: its answers are chance", file=sys.stderr)

    # -----------------------------------------------------------------------------
    # predictions
    readable, features, problems = encode_pictures(model, pictures)
    probabilities = predict(features, head, temperature or 1.0)  # (N, C)
    rankings = rank(probabilities, names, args.top)

    # -----------------------------------------------------------------------------
    # results
    print_rankings(readable, rankings)
    for path in outputs(args):
        path.parent.mkdir(parents=True, exist_ok=True)
    if args.csv:
        files.write_csv(args.csv, [csv_row(*item) for item in zip(readable, rankings)])
    if args.json:
        settings = {"architecture": args.architecture, "prompt_template": templates}
        settings["class_names"] = list(names)
        settings["calibration_temperature"] = temperature
        files.write_json(args.json, settings | json_results(readable, rankings, problems))
    if args.sheet:
        title = f"Named by {run.name if run else args.architecture}{note}"
        draw_sheet(readable, rankings, args.sheet, title)
    if problems:
        for problem in problems.values():
            print(f"warning: passed over: {problem}", file=sys.stderr)
        raise UserError(f"{len(problems)} of {len(pictures)} pictures can't be read")


# -----------------------------------------------------------------------------
# pictures


def find_pictures(paths: Sequence[str]) -> list[Path]:
    """The files, and the pictures in the folders, each once.

    Raises UserError for a path that is not there, and for a folder without pictures.
    """
    pictures = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"no picture or folder {path}")
        inside = pictures_in(path) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"{path} has no pictures in it (such as .jpg, .png, .webp)")
        pictures += inside
    return list(dict.fromkeys(pictures))


def pictures_in(folder: Path) -> list[Path]:
    """The pictures in a folder and in all folders in it, sorted, without hidden ones."""
    pictures = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        # macOS leaves a hidden `._rose.jpg`, which is no picture, beside a rose.jpg.
        is_hidden = any(part.startswith(".") or part == MACOS_FOLDER for part in parts)
        if path.suffix.lower() in SUFFIXES and path.is_file() and not is_hidden:
            pictures.append(path)
    return pictures


def read_square(file: Path, resolution: int) -> torch.Tensor | UserError:
    """One picture as (3, R, R) uint8, by the steps of the dataset's; or what is wrong with it."""
    try:
        picture = torch.from_numpy(read_picture(file))  # (H, W, 3)
    except UserError as error:
        return error  # not raised: the other pictures go on
    return resize_and_crop(picture.permute(2, 0, 1), resolution)


def encode_pictures(
    model: CLIP, pictures: Sequence[Path]
) -> tuple[list[Path], torch.Tensor, dict[Path, UserError]]:
    """The pictures that can be read, their features (N, D), and what is wrong with the others.

    Raises UserError if none can be read.
    """
    readable, features, problems = [], [], {}
    resolution = model.visual.input_resolution
    bar = tqdm(total=len(pictures), desc="pictures", unit="img", leave=False)
    with bar, ThreadPoolExecutor() as pool:
        # In batches, so that a folder of any size fits into memory.
        for start in range(0, len(pictures), BATCH):
            batch = pictures[start : start + BATCH]
            squares = []
            for file, square in zip(batch, pool.map(lambda f: read_square(f, resolution), batch)):
                if isinstance(square, UserError):
                    problems[file] = square
                else:
                    readable.append(file)
                    squares.append(square)
            if squares:
                pixels = torch.stack(squares)  # (B, 3, R, R)
                features.append(image_features(model, pixels, torch.arange(len(pixels))))
            bar.update(len(batch))
    if not readable:
        first = next(iter(problems.values()))
        several = f"none of {len(problems)} pictures can be read; the first: "
        raise UserError((several if len(problems) > 1 else "") + str(first))
    return readable, torch.cat(features), problems


# -----------------------------------------------------------------------------
# names and prompts


def run_folder(architecture: str) -> Path | None:
    """The folder of the run that a model comes from; None for a pretrained one."""
    source = Path(architecture)
    # Names come first, as in load_model.
    if architecture in SHAPES or not source.exists():
        return None
    folder = source if source.is_dir() else source.parent
    return folder if (folder / "args.json").exists() else None


def choose_names(run: Path | None, names_file: Path | None) -> tuple[list[str], str]:
    """The names to choose from, and where they come from, in words."""
    if names_file:
        return read_names(names_file), f"of {names_file}"
    if run:
        return runs.read_class_names(run) or names_of_older_run(run), "of the run"
    return oxford_names(), "of Oxford Flowers 102 (others by --names FILE)"


def read_names(path: Path) -> list[str]:
    """Names from a text file, one a line, or from a JSON list or object of numbers and names.

    Raises UserError if there are fewer than two, a name is empty or no text, or there twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte-order mark
        # By its content: brackets would be taken for parts of names.
        if path.suffix.lower() == ".json" or text.lstrip().startswith(("[", "{")):
            names = json.loads(text, object_pairs_hook=files.as_object)
        else:
            names = [line for line in text.splitlines() if line.strip()]
        if isinstance(names, dict):
            names = [names[number] for number in sorted(names, key=int)]
    except OSError as error:
        raise UserError(f"no names at {path} ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} can't be read as names ({error}): give a text file with one a line, a JSON "
            "list, or a JSON object of numbers and names"
        ) from None
    is_list = isinstance(names, list)
    if not is_list or not all(isinstance(name, str) and name.strip() for name in names):
        raise UserError(f"{path} has a name that is empty or no text")
    names = [name.strip() for name in names]
    if len(names) < 2:
        raise UserError(f"{path} has {len(names)} names: to choose takes at least two")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{path} has the name {twice[0]!r} twice")
    return names


def oxford_names() -> list[str]:
    """The 102 names that come with the package."""
    return layouts.read_names(Path(layouts.__file__).parent, n_classes=102)


def names_of_older_run(run: Path) -> list[str]:
    """The class names of a run that has no class_names.json, where they are beyond doubt.

    Raises UserError, asking for --names, where they are not.
    """
    classifier = run / "classifier.pt"
    if classifier.exists():
        names = files.load_tensors(classifier).get("class_names")
        if names:  # of a linear head
            return names
    # The names that the run has predicted or seen must be among those of its dataset, which may
    # have moved; and where it is gone, they must be all names of a dataset that we know.
    seen = names_in_predictions(run)
    names = names_of_dataset(run)
    if seen and seen <= set(names):
        return names
    openai_names = [layouts.OPENAI_NAMES.get(name, name) for name in oxford_names()]
    for known in (oxford_names(), openai_names, list(KINDS)):
        if seen == set(known):
            return known
    raise UserError(f"{run} does not say the names of its classes: give --names FILE")


def names_in_predictions(run: Path) -> set[str]:
    """All names in a run's predictions.csv; none if there is no such file."""
    try:
        table = runs.read_predictions(run)
    except (OSError, ValueError):
        return set()
    columns = [name for name in table.columns if name == "label" or name.startswith("top")]
    return set(table[columns].to_numpy().ravel()) - {""}


def names_of_dataset(run: Path) -> list[str]:
    """The class names of the dataset that a run was trained on; none if it is not here."""
    arguments = read_arguments(run)
    root = Path(arguments.get("data_root") or default_root())
    # Neither drawn nor downloaded for the sake of its names.
    if not root.is_dir() or (root == Path(default_root()) and not is_complete(root)):
        return []
    class_names = arguments.get("class_names", "oxford")
    try:
        flowers = open_flowers(
            root,
            arguments.get("splits_path"),
            class_names=class_names,
            splits_base=arguments.get("splits_base"),
            needs_split=False,
        )
    except UserError:
        return []
    return list(flowers.class_names)


def choose_templates(run: Path | None, templates: list[str] | None) -> list[str] | None:
    """The user's templates, else those of the run; None where the run has something learned.

    Also None for a model without a run. Raises UserError if the run lacks what it has learned.
    """
    if templates or run is None:
        return templates
    if (run / "classifier.pt").exists():
        return None
    arguments = read_arguments(run)
    strategy = arguments.get("strategy")
    if strategy in KEEPS_WEIGHTS:
        raise UserError(
            f"{run} was trained with --strategy {strategy} and lacks its classifier.pt: copy the "
            "whole folder, or give --prompt_template to name by prompts"
        )
    return arguments.get("prompt_template")


def choose_sentences(
    run: Path | None, names: Sequence[str], prompts: Path | None, templates: list[str] | None
) -> evaluate.Prompts | None:
    """The sentences of each class: of --prompts, else of the file that the run was trained with.

    None for a model of templates, or with something learned. Raises UserError if the file is
    missing, or has no sentence for one of the names.
    """
    if prompts is None and templates is None and run and not (run / "classifier.pt").exists():
        prompts = read_arguments(run).get("prompts")
        if prompts:
            evaluate.warn_of_changed_prompts(str(run), prompts)
    if prompts is None:
        return None
    return evaluate.read_prompts(prompts, names)


def check_head(run: Path, names: Sequence[str]) -> None:
    """Raise UserError if the run has a linear head, which knows no other names than its own."""
    classifier = run / "classifier.pt"
    own_names = files.load_tensors(classifier).get("class_names") if classifier.exists() else None
    if own_names and own_names != list(names):
        raise UserError(
            f"{run} has a linear head, which knows only its own {len(own_names)} classes: leave "
            "out --names, or give --prompt_template to name by prompts"
        )


def choose_temperature(
    run: Path | None,
    names: Sequence[str],
    templates: list[str] | None,
    args: argparse.Namespace,
) -> float | None:
    """What divides the logits: the temperature that the run found on val; None without one.

    Raises UserError if --calibrated asks for one that is not there, or was found for other names
    or prompts.
    """
    if args.calibrated is False:
        return None
    prompts = args.prompts
    if run and prompts is None and templates is None and not (run / "classifier.pt").exists():
        prompts = read_arguments(run).get("prompts")
    if args.calibrated:
        return evaluate.require_temperature(run, names, templates, prompts)
    return evaluate.own_temperature(run, names, templates, prompts)


def read_arguments(run: Path) -> dict:
    """The args.json of a run. Raises UserError if it is damaged."""
    try:
        return files.checked(files.read_json(run / "args.json"))
    except ValueError as error:
        raise UserError(f"{run / 'args.json'} is damaged ({error})") from None


# -----------------------------------------------------------------------------
# predictions


def predict(features: torch.Tensor, head: evaluate.Head, temperature: float = 1.0) -> torch.Tensor:
    """The probabilities (N, C) of the classes for features (N, D).

    temperature: divides the logits. Raises UserError for a model that diverged.
    """
    weight, bias = head
    logits = features @ weight.t() + bias
    if not logits.isfinite().all():
        raise UserError("the model's scores are not numbers: it diverged; use another checkpoint")
    return (logits / temperature).softmax(1)


def rank(
    probabilities: torch.Tensor, names: Sequence[str], top: int
) -> list[list[tuple[str, float]]]:
    """For each picture its `top` best names with their probabilities, best first."""
    scores, classes = probabilities.topk(min(top, len(names)), dim=1)  # (N, top)
    rankings = []
    for row_scores, row_classes in zip(scores.tolist(), classes.tolist()):
        best_names = [names[c] for c in row_classes]
        rankings.append(list(zip(best_names, row_scores)))
    return rankings


# -----------------------------------------------------------------------------
# results


def path_text(file: Path) -> str:
    """A path as text that can be written as UTF-8; names on old disks may have other bytes."""
    return str(file).encode("utf-8", "backslashreplace").decode()


def print_rankings(pictures: Sequence[Path], rankings: list[list[tuple[str, float]]]) -> None:
    """A block for each picture: its file, then a line a name."""
    for file, ranking in zip(pictures, rankings):
        print(f"\n{path_text(file)}")
        for name, score in ranking:
            print(f"  {100 * score:5.1f}%  {name}")


def csv_row(file: Path, ranking: list[tuple[str, float]]) -> dict:
    """A row in the columns of a run's predictions.csv, without a label."""
    row = {"file": path_text(file)}
    for place, (name, score) in enumerate(ranking, start=1):
        row[f"top{place}"] = name
        row[f"score{place}"] = round(score, 6)  # the digits that fp32 has
    return row


def json_results(
    pictures: Sequence[Path],
    rankings: list[list[tuple[str, float]]],
    problems: dict[Path, UserError],
) -> dict:
    """The predictions of each picture, and what was passed over, for --json."""
    predictions = []
    for file, ranking in zip(pictures, rankings):
        best = [{"name": name, "probability": round(score, 6)} for name, score in ranking]
        predictions.append({"file": path_text(file), "predictions": best})
    passed_over = []
    for file, problem in problems.items():
        passed_over.append({"file": path_text(file), "problem": str(problem)})
    return {"pictures": predictions, "passed_over": passed_over}


def draw_sheet(
    pictures: Sequence[Path],
    rankings: list[list[tuple[str, float]]],
    path: Path,
    title: str,
) -> None:
    """Draw the first pictures with their file names above and their best names below."""
    from flowers import figures  # here, as it loads matplotlib, and only --sheet needs it

    cells = []
    for file, ranking in zip(pictures[:MOST_ON_SHEET], rankings):
        lines = [f"{name} ({100 * score:.0f}%)" for name, score in ranking[:NAMES_ON_SHEET]]
        cells.append((file, path_text(Path(file.name)), "\n".join(lines), "black"))
    if len(cells) < len(pictures):
        title += f": the first {len(cells)} of {len(pictures):,} pictures"
    figures.picture_sheet(cells, path, title, columns=min(6, max(3, len(cells))))


if __name__ == "__main__":
    main(args)
