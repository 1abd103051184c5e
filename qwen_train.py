"""Fine-tune Qwen2-VL with LoRA to name flowers; the loss is on the answer alone.

    python qwen_train.py                                                      # Qwen2-VL-2B, on one GPU with about 8 GB
    python qwen_train.py --answer described --captions captions.jsonl.gz      # a visual description first, then the name
    python qwen_train.py --data_root sample --model tiny                      # any machine, offline, about two minutes
    python qwen_train.py --resume runs/NAME                                   # goes on after a kill

Leaves runs/NAME/adapter/, which `python qwen_eval.py --adapter runs/NAME` evaluates. The vision tower is frozen, and its features are
computed once, unless --also_train names it. tiny has random weights: LoRA on a frozen random model learns little, so its vision tower
is trained whole.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from flowers import UserError, command, devices, figures, files, reason, runs, training
from flowers.data import add_data_arguments, open_flowers
from flowers.devices import autocast
from flowers.layouts import read_captions
from flowers.qwen import answers as qwen
from flowers.qwen import models as qwen_models
from flowers.tracking import start_wandb

WARMUP = 0.05  # share of the steps
GRADIENT_NORM = 1.0


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser)
    parser.add_argument(
        "--images",
        type=int,
        default=0,
        help="train on so many, drawn with --seed (default: 0, all)",
    )
    group = parser.add_argument_group("model and answer")
    group.add_argument(
        "--model",
        default=qwen_models.DEFAULT,
        help="a name on the hub, a folder, tiny or random-2b (random weights) (default: %(default)s)",
    )
    group.add_argument(
        "--max_pixels",
        type=int,
        default=512 * 512,
        help="larger images are scaled down; 784 pixels are a token (default: %(default)s)",
    )
    group.add_argument(
        "--answer",
        choices=list(qwen_models.QUESTIONS),
        default="brief",
        help="brief: the name; described: a sentence of --captions, then the name (default: %(default)s)",
    )
    group.add_argument(
        "--captions",
        help="captions.jsonl[.gz] with sentences about the training images; one is drawn each epoch",
    )
    group = parser.add_argument_group("LoRA")
    group.add_argument("--rank", type=int, help="(default: 8; tiny: 16)")
    group.add_argument("--alpha", type=float, help="scale times rank (default: twice the rank)")
    group.add_argument(
        "--also_train",
        nargs="*",
        metavar="MODULE",
        help="modules that are trained whole and kept in the adapter, such as merger or visual (default: none; tiny: visual)",
    )
    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--epochs", type=int, help="passes over the training images (default: 3; tiny: 12)"
    )
    group.add_argument("--batch_size", type=int, help="images a step (default: 16; tiny: 32)")
    group.add_argument(
        "--chunk_size",
        type=int,
        default=0,
        help="images in memory at a time, same gradient (default: 0, the whole batch)",
    )
    group.add_argument(
        "--keep_activations",
        action="store_true",
        help="faster, but more memory (default on a GPU: blocks are computed again in the backward pass)",
    )
    group.add_argument("--lr", type=float, help="peak learning rate (default: 1e-4; tiny: 1e-3)")
    group.add_argument("--wd", type=float, default=0.0, help="weight decay (default: %(default)s)")
    group.add_argument(
        "--augment",
        choices=["none", "crop"],
        help="crop: mirror and cut at random, so that features can't be kept (default: none; crop if the vision tower is trained)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of adapter, order and augmentation (default: %(default)s)",
    )
    group = parser.add_argument_group("run")
    group.add_argument(
        "--save_every",
        type=int,
        default=100,
        help="steps from checkpoint to checkpoint (default: %(default)s)",
    )
    runs.add_run_arguments(group, resume=True)
    args = parser.parse_args()

    if args.resume:
        folder = Path(args.resume)
        stored = runs.arguments_to_resume(folder, "qwen_train")
        if stored is None:
            return
        vars(args).update({k: v for k, v in stored.items() if k in vars(args)})
    tiny = args.model == "tiny"
    for flag, usual, for_tiny in (
        ("rank", 8, 16),
        ("also_train", [], ["visual"]),
        ("epochs", 3, 12),
        ("batch_size", 16, 32),
        ("lr", 1e-4, 1e-3),
    ):
        if getattr(args, flag) is None:
            setattr(args, flag, for_tiny if tiny else usual)
    args.alpha = args.alpha if args.alpha is not None else 2.0 * args.rank
    trains_vision = bool({"visual", "merger"} & set(args.also_train))
    args.augment = args.augment or ("crop" if trains_vision else "none")
    if (
        min(args.rank, args.epochs, args.batch_size, args.save_every) < 1
        or not args.lr > 0
        or not args.wd >= 0
        or args.chunk_size < 0
        or args.images < 0
    ):
        raise UserError(
            "--rank, --epochs, --batch_size and --save_every must be at least 1, --lr above 0, --wd, --chunk_size and --images not below 0"
        )
    if (args.answer == "described") != bool(args.captions):
        raise UserError(
            "--answer described and --captions go together: descriptions are written by python qwen_eval.py --describe, or by people"
        )

    # data and model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    devices.seed_everything(args.seed)
    flowers = open_flowers(
        args.data_root, args.splits_path, args.splits, args.holdout, args.class_names
    )
    index = qwen.subset(flowers.splits["train"], args.images, args.seed)
    image_files, names = (
        [flowers.files[i] for i in index],
        [flowers.class_names[flowers.labels[i]] for i in index],
    )
    captions = read_captions(args.captions, tuple(image_files)) if args.captions else None
    batch_size = min(args.batch_size, len(index))
    chunk = min(args.chunk_size or batch_size, batch_size)
    print(
        qwen_models.memory_line(
            args.model, chunk, args.max_pixels, 100 if captions else 50, args.rank
        )
    )
    model, processor = qwen_models.load(args.model, device, max_pixels=args.max_pixels)
    question = qwen.question_of(args.answer)
    features = None
    if qwen.caches_features(model) and not trains_vision and args.augment == "none":
        features, begins, grids = qwen.image_features(
            model, processor, flowers, index, qwen_models.identity(model)
        )
    size = sum(p.numel() for p in model.parameters())
    model = qwen_models.add_adapter(
        model,
        args.rank,
        args.alpha,
        args.also_train,
        device.type == "cuda" and not args.keep_activations,
    )
    config = {
        "job": "qwen_train",
        "architecture": args.model,
        **{k: v for k, v in vars(args).items() if k not in ("name", "resume")},
        **qwen_models.versions(),
    }
    if not args.resume:
        folder = runs.new_run(args.runs, args.name, config, flowers.splits)

    # optimiser
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=args.lr, betas=(0.9, 0.98), weight_decay=args.wd
    )
    steps_per_epoch = len(index) // batch_size
    total = args.epochs * steps_per_epoch
    step, seconds = 0, 0.0
    metrics_file, checkpoint_file = folder / "metrics.jsonl", folder / "checkpoint.pt"
    if args.resume and checkpoint_file.exists():
        checkpoint = files.load_tensors(checkpoint_file)
        try:
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(checkpoint["trained"][name])
            optimizer.load_state_dict(checkpoint["optimizer"])
            step, seconds = int(checkpoint["step"]), float(checkpoint["seconds"])
        except Exception as error:  # torch raises many kinds at what it did not expect
            raise UserError(
                f"{checkpoint_file} is not of this run: {type(error).__name__} {reason(error)}"
            ) from None
        print(f"resuming {folder} after step {step} of {total}")
    rows = [
        row for row in files.read_lines(metrics_file, "step") if row["step"] <= step
    ]  # what came after the checkpoint is done again
    files.write_lines(metrics_file, rows)
    tracker = start_wandb(args.wandb, folder, config)
    for row in rows:
        tracker.log(row)  # a resumed run is a run of its own in W&B
    print(
        f"{folder}: {args.model}, {len(index):,} images, {total:,} steps of {batch_size} on {device}; trainable {sum(p.numel() for p in trained.values()):,} "
        f"beside {size:,}; vision features {'once' if features is not None else 'in each step'}"
    )

    def prepare(s: int) -> tuple[list[dict], list[list[str]]]:
        """Images and answers of step s, in chunks; drawn from seed and step alone, so that a resumed run sees the same."""
        epoch, i = divmod(s, steps_per_epoch)
        order = torch.randperm(len(index), generator=devices.generator(args.seed, epoch))[
            i * batch_size : (i + 1) * batch_size
        ].tolist()
        draw = devices.generator(args.seed, epoch, i)
        parts, answers = [], []
        for part in (order[k : k + chunk] for k in range(0, batch_size, chunk)):
            if features is None:
                parts.append(
                    qwen.patches(
                        processor,
                        qwen.open_images(
                            [image_files[j] for j in part], draw if args.augment == "crop" else None
                        ),
                    )
                )
            else:
                parts.append(
                    {
                        "features": torch.cat([features[begins[j] : begins[j + 1]] for j in part]),
                        "image_grid_thw": grids[part],
                    }
                )
            told = [
                f"{qwen.one_line(captions[j][int(torch.randint(len(captions[j]), (), generator=draw))])}\n"
                if captions
                else ""
                for j in part
            ]
            answers.append([first + names[j] for first, j in zip(told, part)])
        return parts, answers

    model.train()
    bar = tqdm(total=total, initial=step, unit="step", desc="training")
    start = time.perf_counter()
    for parts, answers in qwen.ahead(prepare, range(step, total)):
        share = training.learning_rate_factor(step, total, WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * share
        tokens = sum(qwen.answer_length(processor, a) for part in answers for a in part)
        value = 0.0
        for part, texts in zip(parts, answers):
            inputs = qwen.encode(processor, question, part["image_grid_thw"])
            with autocast(device):
                loss, _ = qwen.answer_loss(
                    model, processor, qwen.to(inputs, device), qwen.to(part, device), texts
                )
            (
                loss / tokens
            ).backward()  # the mean over all answer tokens of the batch, however it is cut into chunks
            value += loss.item() / tokens
        torch.nn.utils.clip_grad_norm_(trained.values(), GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad()
        saves = (step + 1) % args.save_every == 0 or step + 1 == total
        if (
            not math.isfinite(value)
            or saves
            and not all(p.isfinite().all() for p in trained.values())
        ):  # no such checkpoint
            bar.close()
            raise UserError(
                f"the loss is {value} at step {step}: lower --lr; the last checkpoint is {checkpoint_file}"
            )
        step += 1
        rows.append(
            {
                "epoch": (step - 1) // steps_per_epoch + 1,
                "step": step,
                "train/loss": value,
                "train/lr": args.lr * share,
            }
        )
        tracker.log(rows[-1])
        bar.set_postfix(epoch=rows[-1]["epoch"], loss=f"{value:.3f}", refresh=False)
        bar.update()
        if saves:
            seconds, start = seconds + time.perf_counter() - start, time.perf_counter()
            files.write_lines(metrics_file, rows)
            files.save_tensors(
                checkpoint_file,
                {
                    "trained": {n: p.detach() for n, p in trained.items()},
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "seconds": seconds,
                },
            )
    bar.close()

    model.save_pretrained(folder / "adapter")
    figures.training_curve(rows, folder / "curve.png", "cross-entropy of an answer token (nats)")
    last = np.mean([row["train/loss"] for row in rows[-steps_per_epoch:]])
    result = {
        "train/loss": round(float(last), 5),
        "train_seconds": round(seconds, 2),
        "train_images_per_s": round(total * batch_size / max(seconds, 1e-9), 1),
        "peak_memory_mb": devices.peak_memory_mb(),
        "trainable": sum(p.numel() for p in trained.values()),
        "parameters": size,
    }
    runs.finish(folder, {"name": folder.name, **result, **config})
    tracker.log(result)
    tracker.finish()
    print(
        f"trained {seconds:.0f} s, loss of the last epoch {last:.3f} nats a token, peak memory {result['peak_memory_mb']:,} MB; "
        f"next: python qwen_eval.py --adapter {folder} --data_root {args.data_root}"
    )


if __name__ == "__main__":
    main()
