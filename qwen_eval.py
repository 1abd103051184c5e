"""Qwen2-VL names flowers: the generative counterpart of baseline_eval.py, on the same images and names, with the same result files.

    python qwen_eval.py                                              # Qwen2-VL-2B ranks the 102 names, on one GPU with about 6 GB
    python qwen_eval.py --adapter runs/NAME                          # what qwen_train.py made
    python qwen_eval.py --protocol generate --list_names             # it answers in its own words; exact match
    python qwen_eval.py --describe --split train                     # a sentence about each training image, for qwen_train.py --captions
    python qwen_eval.py --data_root sample --model tiny              # any machine, offline, seconds
    python qwen_eval.py --resume runs/NAME                           # goes on after a kill

rank: the log-likelihood of every class name as the answer. Names are compared by its sum, its mean a token, or the sum less that without the image
(calibrated). With --holdout the val images decide which of the three is reported; without, it is the sum. All three are in scores.npz and result.json.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from flowers import UserError, command, devices, evaluate, figures, files, runs
from flowers.data import Flowers, add_data_arguments, open_flowers
from flowers.devices import autocast
from flowers.files import read_json
from flowers.qwen import answers as qwen
from flowers.qwen import models as qwen_models
from flowers.tracking import log_mistakes, start_wandb

OUTSIDE = "(outside the list)"  # the name of the answers that are no class name
SCORES = ("sum", "token", "calibrated")


def answer_sheet(
    predictions: list[dict],
    answers: list[str],
    flowers: Flowers,
    index: np.ndarray,
    path: Path,
    most: int = 24,
) -> Path:
    """Images evenly from the split: the true name above, the answer below, blue if right and orange if wrong."""
    chosen = np.unique(np.linspace(0, len(index) - 1, min(most, len(index))).round().astype(int))
    cells = []
    for i in chosen:
        good = predictions[i]["top1"] == predictions[i]["label"]
        told = figures.textwrap.shorten(answers[i], 60, placeholder=" …") or "(nothing)"
        cells.append(
            (
                flowers.files[index[i]],
                predictions[i]["label"],
                f"{'✓' if good else '✗'} {told}",
                figures.PALETTE[0 if good else 1],
            )
        )
    right = sum(below.startswith("✓") for _, _, below, _ in cells)
    return figures.picture_sheet(
        cells,
        path,
        f"True name above, answer below: {right} of {len(cells)} right (blue, ✓)",
        border=7,
    )


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    group = parser.add_argument_group("model and question")
    group.add_argument(
        "--model",
        help=f"a name on the hub, a folder, tiny or random-2b (random weights) (default: the adapter's, else {qwen_models.DEFAULT})",
    )
    group.add_argument(
        "--adapter", metavar="RUN", help="a run of qwen_train.py, or the folder of an adapter"
    )
    group.add_argument(
        "--max_pixels",
        type=int,
        help="larger images are scaled down; 784 pixels are a token (default: the adapter's, else 262144)",
    )
    group.add_argument(
        "--protocol",
        choices=["rank", "generate"],
        default="rank",
        help="rank the class names by their likelihood, or answer freely and be matched exactly (default: %(default)s)",
    )
    group.add_argument(
        "--score",
        choices=["auto", *SCORES],
        default="auto",
        help="what rank reports; auto: the best on val with --holdout, else sum (default: auto)",
    )
    group.add_argument(
        "--answer",
        choices=list(qwen_models.QUESTIONS),
        help="described: a line about the flower comes before the name (default: the adapter's, else brief)",
    )
    group.add_argument("--list_names", action="store_true", help="name all classes in the question")
    group.add_argument(
        "--most_tokens",
        type=int,
        default=80,
        help="the longest answer or description, in tokens (default: %(default)s)",
    )
    group.add_argument(
        "--describe",
        action="store_true",
        help="write descriptions.jsonl, one generated sentence an image, and evaluate nothing",
    )
    group = parser.add_argument_group("run")
    group.add_argument(
        "--batch_size", type=int, default=8, help="images at a time (default: %(default)s)"
    )
    runs.add_run_arguments(group, resume=True, compare=True)
    args = parser.parse_args()

    if args.resume:
        folder = Path(args.resume)
        stored = runs.arguments_to_resume(folder, "qwen_eval")
        if stored is None:
            return
        vars(args).update({k: v for k, v in stored.items() if k in vars(args)})
    try:
        trained = files.checked(read_json(Path(args.adapter) / "args.json")) if args.adapter else {}
    except FileNotFoundError:  # the folder of an adapter alone
        trained = {}
    except ValueError as error:
        raise UserError(f"{Path(args.adapter) / 'args.json'} is damaged ({error})") from None
    for flag, usual in (
        ("model", qwen_models.DEFAULT),
        ("max_pixels", 512 * 512),
        ("answer", "brief"),
    ):
        if getattr(args, flag) is None:
            setattr(args, flag, trained.get(flag, usual))
    if args.holdout and trained and not trained.get("holdout"):
        raise UserError(
            f"{args.adapter} was trained on the val images: --holdout needs an adapter that was trained with --holdout"
        )
    if args.batch_size < 1 or args.images < 0 or args.most_tokens < 1:
        raise UserError("--batch_size and --most_tokens must be at least 1, --images not below 0")
    earlier = {Path(run).name: runs.read_metrics(run, args.split) for run in args.compare}

    # data and model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    devices.seed_everything(0)
    flowers = open_flowers(
        args.data_root, args.splits_path, args.splits, args.holdout, args.class_names
    )
    index = qwen.subset(flowers.splits[args.split], args.images, 0)
    if not len(index):
        raise UserError(f"the {args.split} split is empty: val needs --holdout")
    chooses = (
        args.protocol == "rank"
        and args.score == "auto"
        and args.split == "test"
        and len(flowers.splits["val"])
        and not args.describe
    )
    val = qwen.subset(flowers.splits["val"], args.images, 0) if chooses else index[:0]
    names_tokens = 8 * len(flowers.class_names)  # about; a name has four tokens
    text_tokens = (
        50
        + (names_tokens if args.list_names else 0)
        + (names_tokens if args.protocol == "rank" else args.most_tokens)
    )
    print(qwen_models.memory_line(args.model, args.batch_size, args.max_pixels, text_tokens))
    model, processor = qwen_models.load(args.model, device, args.adapter, args.max_pixels)
    question = (
        qwen_models.DESCRIBE
        if args.describe
        else qwen.question_of(args.answer, flowers.class_names if args.list_names else None)
    )
    config = {
        "job": "qwen_eval",
        "architecture": args.model,
        **{k: v for k, v in vars(args).items() if k not in ("name", "resume", "compare")},
        **qwen_models.versions(),
    }
    if not args.resume:
        folder = runs.new_run(args.runs, args.name, config, flowers.splits)
    tree = qwen.NameTree(processor, flowers.class_names)

    def answer(part: dict[str, torch.Tensor]) -> list[dict]:
        """What is kept of each image of a batch: sums of log-likelihoods, or its answer, or a caption."""
        grids, part = part["image_grid_thw"], qwen.to(part, device)
        asked = qwen.to(qwen.encode(processor, question, grids), device)
        if args.describe:
            return [
                {"captions": [qwen.one_line(text)]}
                for text in qwen.generate(model, processor, asked, part, args.most_tokens)
            ]
        if args.protocol == "generate":
            return [
                {"answer": text}
                for text in qwen.generate(model, processor, asked, part, args.most_tokens)
            ]
        extra = [{} for _ in grids]
        if args.answer == "described":  # the names are ranked after the model's own description
            extra = [
                {"description": qwen.first_line(text)}
                for text in qwen.generate(model, processor, asked, part, args.most_tokens)
            ]
            asked = qwen.to(
                qwen.encode(processor, question, grids, [e["description"] + "\n" for e in extra]),
                device,
            )
        sums = qwen.rank(model, tree, asked, part).cpu()
        if not sums.isfinite().all():
            raise UserError(
                f"{args.model} gives no finite log-likelihoods: its weights are damaged, or made for another precision"
            )
        return [{"sum": [round(x, 5) for x in row], **e} for row, e in zip(sums.tolist(), extra)]

    # one line an image, so that a run that was killed goes on where it was
    records = folder / ("descriptions.jsonl" if args.describe else "answers.jsonl")
    rows = files.read_lines(records, "file")
    files.write_lines(records, rows)  # without the line that a kill cut off
    done = {row["file"]: row for row in rows}
    todo = [i for i in [*index, *val] if flowers.files[i].name not in done]
    chunks = [todo[i : i + args.batch_size] for i in range(0, len(todo), args.batch_size)]
    start = time.perf_counter()
    with tqdm(
        total=len(index) + len(val),
        initial=len(done),
        unit="img",
        desc="describing" if args.describe else args.protocol,
    ) as bar:
        work = qwen.ahead(
            lambda chunk: (
                chunk,
                qwen.patches(processor, qwen.open_images([flowers.files[i] for i in chunk])),
            ),
            chunks,
        )
        for chunk, part in work:
            with autocast(device):
                answers = answer(part)
            for i, row in zip(chunk, answers):
                done[flowers.files[i].name] = {"file": flowers.files[i].name, **row}
                files.append_line(records, done[flowers.files[i].name])
            bar.update(len(chunk))
    seconds = time.perf_counter() - start
    result = {
        "eval_seconds": round(seconds, 3),
        "eval_images_per_s": round(len(todo) / seconds, 2),
        "peak_memory_mb": devices.peak_memory_mb(),
    }
    if args.describe:
        runs.finish(folder, {"name": folder.name, **result, **config})
        print(
            f"{records}: a sentence for each of {len(index):,} images; next: python qwen_train.py --answer described --captions {records}"
        )
        return

    kept = [done[flowers.files[i].name] for i in index]
    labels = torch.from_numpy(flowers.labels[index])
    if args.protocol == "generate":
        # an answer is one name or none: a class of its own for none, and no second best
        found = [qwen.match(row["answer"], flowers.class_names) for row in kept]
        flowers = dataclasses.replace(flowers, class_names=(*flowers.class_names, OUTSIDE))
        place = torch.tensor([len(flowers.class_names) - 1 if c is None else c for c in found])
        probabilities = torch.nn.functional.one_hot(place, len(flowers.class_names)).float()
        metrics = {
            k: v
            for k, v in evaluate.classification(probabilities, labels).items()
            if k not in ("top3", "top5")
        }
        metrics["outside_list"] = 100 * sum(c is None for c in found) / len(found)
        told = [row["answer"] for row in kept]
    else:
        with torch.inference_mode(), autocast(device):
            blank = qwen.to(
                qwen.encode(
                    processor, question, None, ["\n"] if args.answer == "described" else None
                ),
                device,
            )
            without_image = qwen.rank(model, tree, blank).cpu()

        def compared(places: np.ndarray) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
            """All scores of the images, and the top-1 accuracy of each."""
            sums = torch.tensor([done[flowers.files[i].name]["sum"] for i in places])
            by_score = qwen.scores(sums, tree.lengths, without_image)
            truth = torch.from_numpy(flowers.labels[places])
            return by_score, {
                k: evaluate.classification(s, truth)["top1"] for k, s in by_score.items()
            }

        by_score, top1 = compared(index)
        score = args.score if args.score != "auto" else "sum"
        if len(val):
            _, on_val = compared(val)
            score = max(on_val, key=on_val.get)
            result |= {f"val/{k}_top1": v for k, v in on_val.items()}
            print(
                "top-1 on val: "
                + ", ".join(f"{k} {v:.2f}%" for k, v in on_val.items())
                + f"; {score} is reported"
            )
        metrics = evaluate.classification(by_score[score], labels) | {
            f"{k}_top1": v for k, v in top1.items()
        }
        probabilities = by_score[score].softmax(1)
        result["reported_score"] = score
        with files.atomic(folder / "scores.npz") as file:
            np.savez_compressed(
                file,
                files=[flowers.files[i].name for i in index],
                class_names=flowers.class_names,
                **{k: s.numpy() for k, s in by_score.items()},
            )
        told = None
    evaluate.save_outputs(folder, probabilities, flowers, index)
    predictions = evaluate.predictions(probabilities, flowers, index)
    if args.protocol == "generate":
        predictions = [
            {k: "" if k[:-1] in ("top", "score") and k[-1] != "1" else v for k, v in row.items()}
            for row in predictions
        ]
        files.write_csv(folder / "predictions.csv", predictions)
    answer_sheet(
        predictions,
        told or [row["top1"] for row in predictions],
        flowers,
        index,
        folder / "answers.png",
    )
    result = {**{f"{args.split}/{k}": v for k, v in metrics.items()}, **result}
    runs.finish(folder, {"name": folder.name, **result, **config})
    tracker = start_wandb(args.wandb, folder, config)
    tracker.log(result)
    log_mistakes(tracker, figures.mistakes(probabilities.numpy(), flowers, index))
    tracker.finish()
    print(evaluate.format_table({**earlier, folder.name: metrics}))
    print(
        f"{len(index):,} images, {result['eval_images_per_s']} images/s; results and pictures in {folder}/"
    )


if __name__ == "__main__":
    main()
