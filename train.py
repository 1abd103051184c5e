"""Fine-tune CLIP on Oxford Flowers 102 with InfoNCE and AdamW, and evaluate it once at the end.

    python train.py                                                    # ViT-B/32, 5 epochs, on one GPU
    python train.py --holdout --eval_every 1 --lr 3e-6                 # to choose settings: val is left out of training, test is not touched
    python train.py --strategy last_blocks --blocks 2                  # flowers/strategies.py says what each strategy trains
    torchrun --nproc_per_node=4 train.py                               # four GPUs: each batch is four times --batch_size
    python train.py --data_root sample --architecture tiny             # any machine, offline, from random weights
    python train.py --resume runs/NAME                                 # goes on after a kill, to the same result

Everything is left in runs/NAME/ (flowers/runs.py lists the files); `python baseline_eval.py --architecture runs/NAME` repeats the number.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

from flowers import (
    UserError,
    command,
    devices,
    evaluate,
    figures,
    files,
    frozen,
    reason,
    runs,
    strategies,
    training,
)
from flowers.data import add_data_arguments, open_flowers, select
from flowers.layouts import read_captions
from flowers.losses import (
    average_gradients,
    backward_in_chunks,
    gather_features,
    info_nce,
    same_class,
)
from flowers.models import (
    RANDOM,
    image_features,
    split_image_tower,
    split_text_tower,
    text_features,
    tokenize,
    towers,
)
from flowers.pixels import get_batch, load_pixels, to_device
from flowers.tracking import log_mistakes, start_wandb
from flowers.weights import load_model

GRADIENT_NORM = 1.0
MAX_SCALE = (
    100.0  # CLIP was trained with the logit scale clamped here (Radford et al. 2021, section 2.5)
)


@command
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser)
    group = parser.add_argument_group("model and text")
    group.add_argument(
        "--architecture",
        default="ViT-B/32",
        help="where to start: a name of clip.available_models(), tiny, tiny-rn (a small ResNet), or the path of a state dict or run "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--prompt_template",
        action="append",
        help=f"text with {{}} for the class name; with several, training draws one for each image (default: "
        f"'{evaluate.TEMPLATE}')",
    )
    group.add_argument(
        "--captions",
        help="captions.jsonl[.gz]: train on a sentence of the image, drawn anew each epoch, instead of the prompt",
    )
    group = parser.add_argument_group("what is trained")
    group.add_argument(
        "--strategy",
        choices=strategies.STRATEGIES,
        default="full",
        help="see flowers/strategies.py (default: %(default)s)",
    )
    group.add_argument(
        "--blocks",
        type=int,
        default=2,
        help="last_blocks: trained blocks of each tower (default: %(default)s)",
    )
    group.add_argument(
        "--rank", type=int, default=8, help="lora: rank of the updates (default: %(default)s)"
    )
    group.add_argument(
        "--context_tokens",
        type=int,
        default=4,
        help="prompt: learned vectors before the class name (default: %(default)s)",
    )
    group.add_argument(
        "--classes",
        choices=["base", "new", "all"],
        default="all",
        help="train on the first half of the classes, the second, or all; evaluation tells them apart (default: %(default)s)",
    )
    group.add_argument(
        "--shots", type=int, help="train on so many images a class, drawn by --seed (default: all)"
    )
    group.add_argument(
        "--views",
        type=int,
        default=4,
        help="augmented views kept of each image, where a frozen part of the image tower is "
        "computed once and --augment is not none (default: %(default)s)",
    )
    group.add_argument(
        "--no_cache",
        action="store_true",
        help="compute frozen parts again at every step, to see what keeping them gains",
    )
    group = parser.add_argument_group("loss")
    group.add_argument(
        "--positives",
        choices=["pair", "class"],
        help="what matches in a batch: each image its own text, or every text of its class (default: class; with "
        "--captions pair)",
    )
    group.add_argument(
        "--temperature",
        type=float,
        help="tau at the start (default: the model's own, 0.01 for the pretrained ones)",
    )
    group.add_argument(
        "--learn_temperature", action="store_true", help="train tau too (default: fixed)"
    )
    group.add_argument("--tau_lr", type=float, help="learning rate of log(1/tau) (default: --lr)")
    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--epochs",
        type=int,
        help="passes over the training images (default: 5; tiny from random weights: 19)",
    )
    group.add_argument(
        "--batch_size",
        type=int,
        default=64,
        help="images a step, all negatives of one another (default: %(default)s)",
    )
    group.add_argument(
        "--chunk_size",
        type=int,
        default=0,
        help="images in memory at a time, for a batch larger than the memory: same gradient, a third slower "
        "(default: 0, the whole batch)",
    )
    group.add_argument(
        "--lr",
        type=float,
        help="peak learning rate (default: by strategy, 1e-5 for full; tiny from random weights: 5e-4)",
    )
    group.add_argument(
        "--wd",
        type=float,
        default=0.1,
        help="weight decay, not on biases, norms and the temperature (default: %(default)s)",
    )
    group.add_argument(
        "--augment",
        choices=["none", "flip", "crop"],
        help="none, mirror, or mirror and random crop (default: crop; none where the image tower's start is frozen)",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="of weights, order, augmentation (default: %(default)s)"
    )
    group.add_argument(
        "--compile", action="store_true", help="torch.compile of the image tower (CUDA)"
    )
    group = parser.add_argument_group("run")
    group.add_argument(
        "--eval_every",
        type=int,
        default=0,
        help="evaluate val every so many epochs; needs --holdout (default: 0, never)",
    )
    runs.add_run_arguments(group, resume=True)
    args = parser.parse_args()

    if args.resume:
        folder = Path(args.resume)
        stored = runs.arguments_to_resume(folder, "train")
        if stored is None:
            return
        flags = runs.as_flags({k: v for k, v in stored.items() if k in vars(args)})
        args = parser.parse_args([*flags, f"--resume={folder}", f"--wandb={args.wandb}"])
    from_random = args.architecture in RANDOM
    image_blocks, text_blocks = strategies.cut_points(
        args.strategy, args.blocks
    )  # where the frozen part of each tower ends
    if args.strategy == "prompt" and not args.resume and (args.captions or args.prompt_template):
        raise UserError(
            "--strategy prompt learns the prompt: leave out --captions and --prompt_template"
        )
    args.prompt_template = (
        [strategies.context_template(args.context_tokens)]
        if args.strategy == "prompt"
        else args.prompt_template or [evaluate.TEMPLATE]
    )
    args.augment = args.augment or ("crop" if image_blocks is None else "none")
    args.positives = args.positives or ("pair" if args.captions else "class")
    args.lr = (
        args.lr
        if args.lr is not None
        else (5e-4 if from_random else strategies.LEARNING_RATES[args.strategy])
    )
    args.tau_lr = args.tau_lr if args.tau_lr is not None else args.lr
    args.epochs = (
        0
        if args.strategy == "linear"
        else args.epochs
        if args.epochs is not None
        else (19 if from_random else 5)
    )
    if args.eval_every and not args.holdout:
        raise UserError("--eval_every needs --holdout: test images are evaluated once, at the end")
    given = [v for v in (args.temperature, args.shots) if v is not None]
    if not (
        min(args.epochs, args.chunk_size) >= 0
        and args.batch_size > 1
        and args.views > 0
        and all(v >= 0 for v in (args.lr, args.tau_lr, args.wd))
        and all(v > 0 for v in given)
    ):  # in this form no NaN passes
        raise UserError(
            "--epochs, --lr, --tau_lr, --wd and --chunk_size must be at least 0, --batch_size at least 2, --views at least 1, --shots and "
            "--temperature above 0"
        )
    if args.strategy == "linear" and args.no_cache:
        raise UserError("--no_cache has nothing to show with --strategy linear, which has no steps")

    # data and model
    rank, world, device = (
        devices.processes()
    )  # one, unless torchrun started more; only rank 0 writes
    if args.resume and stored.get("processes") != world:
        raise UserError(
            f"{folder} was begun with {stored.get('processes')} processes: go on with as many, for the same result"
        )
    torch.set_float32_matmul_precision("high")
    devices.seed_everything(args.seed)
    with devices.rank_zero_first(rank, world):
        flowers = open_flowers(
            args.data_root, args.splits_path, args.splits, args.holdout, args.class_names
        )
        captions = read_captions(args.captions, flowers.files) if args.captions else None
        model = load_model(args.architecture, device)
        pixels = to_device(load_pixels(flowers, model.visual.input_resolution), device)
    strategies.prepare(model, args.strategy, args.blocks, args.rank, args.context_tokens)
    if args.temperature is not None:
        torch.nn.init.constant_(model.logit_scale, -math.log(args.temperature))
    model.logit_scale.requires_grad_(args.learn_temperature)
    labels = torch.from_numpy(flowers.labels.copy())
    n_classes = len(flowers.class_names)
    train = torch.from_numpy(
        select(
            flowers.splits["train"], flowers.labels, n_classes, args.classes, args.shots, args.seed
        )
    )
    if len(train) < 2 * world:
        raise UserError(
            f"{len(train)} training images are left by --classes {args.classes}: training needs two for each process"
        )
    held = "val" if args.holdout else "test"
    held_index = flowers.splits[held]
    held_places = torch.from_numpy(held_index.copy())
    if not len(held_index):
        raise UserError("the splits list no image for val: --holdout has nothing to hold out")
    prompts = evaluate.fill_templates(flowers.class_names, args.prompt_template)
    config = {
        "job": "train",
        **{k: v for k, v in vars(args).items() if k not in ("name", "resume")},
        "processes": world,
    }
    if not args.resume:
        folder = (
            Path(args.runs)
            if rank
            else runs.new_run(args.runs, args.name, config, {**flowers.splits, "train": train})
        )

    # the texts of image i are rows first[i] ... first[i] + count[i] - 1 of `texts`: prompts of its class, or its own captions
    if captions:
        texts = tokenize([sentence for own in captions for sentence in own])
        count = torch.tensor([len(own) for own in captions])
        first = count.cumsum(0) - count
    else:
        texts = tokenize(prompts)
        count = torch.full_like(labels, len(args.prompt_template))
        first = labels * count

    # what the frozen part of each tower makes of them does not change: it is computed once, or with --no_cache at every step
    image_trunk, image_rest = split_image_tower(model, image_blocks)
    text_trunk, text_rest = split_text_tower(model, text_blocks)
    image_rest = torch.compile(image_rest) if args.compile else image_rest
    start = time.perf_counter()
    ends, views, kept_texts = texts.argmax(1).to(device), None, None
    with devices.rank_zero_first(rank, world):
        if image_blocks is not None and not args.no_cache:
            views = [
                to_device(
                    frozen.image_activations(
                        model, flowers, pixels, train, image_blocks, args.augment, args.seed, view
                    ),
                    device,
                )
                for view in range(1 if args.augment == "none" else args.views)
            ]
        if (
            text_blocks == 0 or text_blocks and not captions
        ) and not args.no_cache:  # activations of every caption would not fit
            kept_texts = frozen.text_activations(model, flowers, texts, text_blocks).to(device)
    frozen_seconds = time.perf_counter() - start

    def encode_images(x):
        return image_rest(image_trunk(x) if views is None else x)

    def encode_texts(rows):
        return text_rest(
            text_trunk(texts[rows.cpu()].to(device)) if kept_texts is None else kept_texts[rows],
            ends[rows],
        )

    def evaluation(head):
        sentences = text_features(model, [captions[i][0] for i in held_index]) if captions else None
        return evaluate.evaluate_features(
            image_features(model, pixels, held_places), head, flowers.labels[held_index], sentences
        )

    # optimiser
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and n != "logit_scale"]
    decayed = [p for n, p in named if p.ndim >= 2]
    others = [p for n, p in named if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": args.wd, "peak": args.lr},
        {"params": others, "weight_decay": 0.0, "peak": args.lr},
        {"params": [model.logit_scale], "weight_decay": 0.0, "peak": args.tau_lr},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    per_process = min(args.batch_size, len(train) // world)
    batch_size, own = per_process * world, slice(rank * per_process, (rank + 1) * per_process)
    steps_per_epoch = len(train) // batch_size
    total = args.epochs * steps_per_epoch

    epoch, seconds = 0, 0.0
    start_key = frozen.fingerprint(
        {n: t for n, t in model.state_dict(keep_vars=True).items() if not t.requires_grad}
    ).hex()
    metrics_file, checkpoint_file = folder / "metrics.jsonl", folder / "checkpoint.pt"
    if args.resume and checkpoint_file.exists():
        epoch, seconds = restore(checkpoint_file, start_key, model, optimizer)
        if rank == 0:
            print(f"resuming {folder} after epoch {epoch} of {args.epochs}")
    rows = [
        row for row in files.read_lines(metrics_file, "epoch") if row["epoch"] <= epoch
    ]  # what came after the checkpoint is done again

    tracker = start_wandb(args.wandb if rank == 0 else "disabled", folder, config)
    for row in rows:
        tracker.log(row)  # a resumed run is a run of its own in W&B
    counts, parameters = (
        strategies.count_trainable(model, args.strategy, n_classes),
        sum(p.numel() for p in model.parameters()),
    )
    if rank == 0:
        files.write_lines(metrics_file, rows)
        size = {name: sum(p.numel() for p in own) for name, own in towers(model).items()}
        print(
            f"{folder}: {args.architecture}, {args.strategy}, {len(train):,} images, {total:,} steps of {batch_size} on {device}; trainable "
            + ", ".join(
                f"{name} {n:,}" + (f" of {size[name]:,}" if name in size else "")
                for name, n in counts.items()
                if n or name in ("image", "text")
            )
            + f"; {parameters:,} parameters"
        )

    bar = tqdm(
        total=total,
        initial=epoch * steps_per_epoch,
        unit="step",
        desc="training",
        disable=rank > 0 or not total,
    )
    while epoch < args.epochs:
        draw = devices.generator(args.seed, epoch)
        order = torch.randperm(len(train), generator=draw)
        chosen = first + (torch.rand(len(first), generator=draw) * count).long()
        epoch_start = time.perf_counter()
        for i in range(steps_per_epoch):
            step_start = time.perf_counter()
            step = epoch * steps_per_epoch + i
            share = training.learning_rate_factor(step, total)
            for g in optimizer.param_groups:
                g["lr"] = g["peak"] * share

            places = order[i * batch_size : (i + 1) * batch_size]
            index = train[places]
            if views is None:
                images = get_batch(pixels, index, device, args.augment, draw, own)
            else:
                view = views[epoch % len(views)]
                images = view[places[own].to(view.device)].to(device)
            distinct, inverse = (
                x.to(device) for x in torch.unique(chosen[index[own]], return_inverse=True)
            )  # a text that occurs twice is encoded once
            matches = same_class(labels[index].to(device)) if args.positives == "class" else None

            def loss_of(image_features, text_features):
                return info_nce(
                    gather_features(image_features),
                    gather_features(text_features.index_select(0, inverse)),
                    model.logit_scale.exp(),
                    matches,
                )

            if args.chunk_size:
                loss = backward_in_chunks(
                    [encode_images, encode_texts], [images, distinct], loss_of, args.chunk_size
                )
            else:
                loss = loss_of(encode_images(images), encode_texts(distinct))
                loss.backward()
            trained = [p for p in model.parameters() if p.grad is not None]
            average_gradients(trained)
            torch.nn.utils.clip_grad_norm_(trained, GRADIENT_NORM)
            optimizer.step()
            optimizer.zero_grad()
            if args.learn_temperature:
                with torch.no_grad():
                    model.logit_scale.clamp_(max=math.log(MAX_SCALE))

            value = loss.item()
            if (
                not math.isfinite(value)
                or i == steps_per_epoch - 1
                and not all(p.isfinite().all() for p in trained)
            ):  # no such checkpoint
                bar.close()
                raise UserError(
                    f"the loss is {value} at step {step}, or a weight no number after it: lower --lr; the last whole epoch is in {checkpoint_file}"
                )
            rows.append(
                {
                    "epoch": epoch + 1,
                    "step": step + 1,
                    "train/loss": value,
                    "train/lr": args.lr * share,
                    "train/tau": math.exp(-model.logit_scale.item()),
                    "train/images_per_s": batch_size / (time.perf_counter() - step_start),
                }
            )
            tracker.log(rows[-1])
            bar.set_postfix(epoch=epoch + 1, loss=f"{value:.3f}", refresh=False)
            bar.update()
        epoch += 1
        seconds += time.perf_counter() - epoch_start
        if rank > 0:
            continue
        if args.eval_every and (epoch % args.eval_every == 0 or epoch == args.epochs):
            metrics, _ = evaluation(
                evaluate.zero_shot_head(model, flowers.class_names, args.prompt_template)
            )
            rows.append(
                {
                    "epoch": epoch,
                    "step": epoch * steps_per_epoch,
                    **{f"val/{k}": v for k, v in metrics.items()},
                }
            )
            tracker.log(rows[-1])
            bar.write(f"epoch {epoch}: val top-1 {metrics['top1']:.2f}%")
        files.write_lines(metrics_file, rows)
        files.save_tensors(
            checkpoint_file,
            {
                "model": {n: p for n, p in model.named_parameters() if p.requires_grad},
                "start": start_key,
                "optimizer": optimizer.state_dict(),
                "epoch": epoch,
                "seconds": seconds,
            },
        )
    bar.close()
    if rank > 0:
        return

    # the last epoch is the result: val if it was held out, else test, once
    state, classifier = strategies.export(model)
    head = evaluate.zero_shot_head(model, flowers.class_names, args.prompt_template)
    if args.strategy == "linear":
        start = time.perf_counter()
        features = torch.cat(views).cpu()
        val = (
            (image_features(model, pixels, held_places), labels[held_places])
            if args.holdout
            else None
        )
        head, c, iterations = strategies.fit_linear(
            features, labels[train].repeat(len(features) // len(train)), head, val
        )
        classifier = {"weight": head[0], "bias": head[1], "class_names": list(flowers.class_names)}
        seconds = time.perf_counter() - start
        print(
            f"logistic regression with C = {c:g}{' (chosen on val)' if val else ''}, {iterations} iterations"
        )
    start = time.perf_counter()
    metrics, probabilities = evaluation(head)
    if classifier:
        files.save_tensors(
            folder / "classifier.pt", classifier
        )  # first: a model.pt without it would be evaluated by its prompts
    files.save_tensors(folder / "model.pt", state)
    evaluate.save_outputs(folder, probabilities, flowers, held_index)
    if rows:
        figures.training_curve(rows, folder / "curve.png")
    result = {
        **{f"{held}/{k}": v for k, v in metrics.items()},
        "frozen_seconds": round(frozen_seconds, 2),
        "train_seconds": round(seconds, 2),
        **(
            {
                "train_images_per_s": round(
                    max(args.epochs * steps_per_epoch * batch_size, len(train)) / seconds, 1
                )
            }
            if seconds
            else {}
        ),
        "eval_seconds": round(time.perf_counter() - start, 2),
        "peak_memory_mb": devices.peak_memory_mb(),
        **{f"trainable_{name}": n for name, n in counts.items()},
        "parameters": parameters,
    }
    runs.finish(folder, {"name": folder.name, **result, **config})
    tracker.log(result)
    log_mistakes(tracker, figures.mistakes(probabilities.numpy(), flowers, held_index))
    tracker.finish()
    print(evaluate.format_table({f"{folder.name} ({held})": metrics}))
    print(
        f"frozen parts {frozen_seconds:.0f} s, training {seconds:.0f} s, peak memory {result['peak_memory_mb']:,} MB; results and pictures in {folder}/"
    )


def restore(
    path: Path, start_key: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Give model and optimizer what a checkpoint holds; returns its epochs and seconds. Raises UserError if it is damaged, or of another run."""
    checkpoint = files.load_tensors(path)
    try:
        if set(checkpoint["model"]) != {n for n, p in model.named_parameters() if p.requires_grad}:
            raise ValueError("it trains other parameters")
        if checkpoint["start"] != start_key:
            raise ValueError("it started from other weights")
        model.load_state_dict(checkpoint["model"], strict=False)
        optimizer.load_state_dict(checkpoint["optimizer"])
        return int(checkpoint["epoch"]), float(checkpoint["seconds"])
    except Exception as error:  # torch raises many kinds at what it did not expect
        raise UserError(
            f"{path} is not of this run: {type(error).__name__} {reason(error)}"
        ) from None


if __name__ == "__main__":
    main()
