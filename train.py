"""Fine-tune CLIP on Oxford Flowers 102 with InfoNCE and AdamW, and evaluate it once at the end.

    python train.py                                                    # ViT-B/32, 5 epochs, on one GPU
    python train.py --holdout --eval_every 1 --lr 3e-6                 # to choose settings: val is left out of training, test is not touched
    python train.py --data_root sample --architecture tiny             # any machine, offline, from random weights
    python train.py --resume runs/NAME                                 # goes on after a kill, to the same result

Everything is left in runs/NAME/ (flowers/runs.py lists the files); `python baseline_eval.py --architecture runs/NAME` repeats the number.
"""
import argparse
import json
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

from flowers import UserError, command, evaluate, figures, runs
from flowers.data import add_data_arguments, open_flowers, read_captions
from flowers.losses import backward_in_chunks, info_nce, same_class
from flowers.models import RANDOM, encode_images, encode_texts, load_model, tokenize, towers
from flowers.pixels import batch, load_pixels, to_device

WARMUP = 0.1  # share of the steps
GRADIENT_NORM = 1.0
MAX_SCALE = 100.0  # CLIP was trained with the logit scale clamped here (Radford et al. 2021, section 2.5)


@command
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    group = parser.add_argument_group("model and text")
    group.add_argument("--architecture", default="ViT-B/32",
                       help="where to start: a name of clip.available_models(), tiny, tiny-rn (a small ResNet), or the path of a state dict or run "
                            "(default: %(default)s)")
    group.add_argument("--prompt_template", action="append",
                       help=f"text with {{}} for the class name; with several, training draws one for each image (default: "
                            f"'{evaluate.TEMPLATE}')")
    group.add_argument("--captions",
                       help="captions.jsonl[.gz]: train on a sentence of the image, drawn anew each epoch, instead of the prompt")
    group = parser.add_argument_group("loss")
    group.add_argument("--positives", choices=["pair", "class"],
                       help="what matches in a batch: each image its own text, or every text of its class (default: class; with "
                            "--captions pair)")
    group.add_argument("--temperature", type=float, help="tau at the start (default: the model's own, 0.01 for the pretrained ones)")
    group.add_argument("--learn_temperature", action="store_true", help="train tau too (default: fixed)")
    group.add_argument("--tau_lr", type=float, help="learning rate of log(1/tau) (default: --lr)")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, help="passes over the training images (default: 5; tiny from random weights: 19)")
    group.add_argument("--batch_size", type=int, default=64, help="images a step, all negatives of one another (default: %(default)s)")
    group.add_argument("--chunk_size", type=int, default=0,
                       help="images in memory at a time, for a batch larger than the memory: same gradient, a third slower "
                            "(default: 0, the whole batch)")
    group.add_argument("--lr", type=float, help="peak learning rate (default: 1e-5; tiny from random weights: 5e-4)")
    group.add_argument("--wd", type=float, default=0.1,
                       help="weight decay, not on biases, norms and the temperature (default: %(default)s)")
    group.add_argument("--augment", choices=["none", "flip", "crop"], default="crop",
                       help="none, mirror, or mirror and random crop (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="of weights, order, augmentation (default: %(default)s)")
    group.add_argument("--compile", action="store_true", help="torch.compile of the image tower (CUDA)")
    group = parser.add_argument_group("run")
    group.add_argument("--eval_every", type=int, default=0, help="evaluate val every so many epochs; needs --holdout (default: 0, never)")
    group.add_argument("--runs", default="runs", help="folder of the runs (default: %(default)s)")
    group.add_argument("--name", help="name of this run (default: architecture and time)")
    group.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, with its own arguments")
    group.add_argument("--wandb", choices=["auto", "online", "offline", "disabled"], default="auto",
                       help="auto: online if logged in, else offline (default: %(default)s)")
    args = parser.parse_args()

    if args.resume:
        folder = Path(args.resume)
        if not (folder / "args.json").is_file():
            raise UserError(f"nothing to resume in {folder}: there is no args.json")
        stored = json.loads((folder / "args.json").read_text())
        vars(args).update({k: v for k, v in stored.items() if k in vars(args) and k not in ("resume", "wandb", "runs")})
        if (folder / "result.json").exists():
            runs.register(folder)
            print(f"{folder} is finished: nothing to do")
            return
    from_random = args.architecture in RANDOM
    args.prompt_template = args.prompt_template or [evaluate.TEMPLATE]
    args.positives = args.positives or ("pair" if args.captions else "class")
    args.lr = args.lr if args.lr is not None else (5e-4 if from_random else 1e-5)
    args.tau_lr = args.tau_lr if args.tau_lr is not None else args.lr
    args.epochs = args.epochs if args.epochs is not None else (19 if from_random else 5)
    if args.eval_every and not args.holdout:
        raise UserError("--eval_every needs --holdout: test images are evaluated once, at the end")
    if args.epochs < 0 or args.batch_size < 2 or args.lr <= 0 or (args.temperature is not None and args.temperature <= 0):
        raise UserError("--epochs must be at least 0, --batch_size at least 2, --lr and --temperature above 0")

    # data and model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    runs.seed_everything(args.seed)
    flowers = open_flowers(args.data_root, args.splits_path, args.splits, args.holdout, args.class_names)
    captions = read_captions(args.captions, flowers.files) if args.captions else None
    model = load_model(args.architecture, device)
    if args.temperature is not None:
        torch.nn.init.constant_(model.logit_scale, -math.log(args.temperature))
    model.logit_scale.requires_grad_(args.learn_temperature)
    pixels = to_device(load_pixels(flowers, model.visual.input_resolution), device)
    config = {"job": "train", **{k: v for k, v in vars(args).items() if k not in ("name", "resume")}}
    if not args.resume:
        folder = runs.new_run(args.runs, args.name, config, flowers.splits)
    train = torch.from_numpy(flowers.splits["train"].copy())
    labels = torch.from_numpy(flowers.labels.copy())
    held = "val" if args.holdout else "test"

    # the texts of image i are rows first[i] ... first[i] + count[i] - 1 of `texts`: prompts of its class, or its own captions
    if captions:
        texts = tokenize([sentence for own in captions for sentence in own])
        count = torch.tensor([len(own) for own in captions])
        first = count.cumsum(0) - count
    else:
        texts = tokenize(evaluate.prompts(flowers.class_names, args.prompt_template))
        count = torch.full_like(labels, len(args.prompt_template))
        first = labels * count

    # optimiser
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and n != "logit_scale"]
    decayed = [p for n, p in named if p.ndim >= 2]
    others = [p for n, p in named if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": args.wd, "peak": args.lr}, {"params": others, "weight_decay": 0.0, "peak": args.lr},
              {"params": [model.logit_scale], "weight_decay": 0.0, "peak": args.tau_lr}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    batch_size = min(args.batch_size, len(train))
    steps_per_epoch = len(train) // batch_size
    total = args.epochs * steps_per_epoch

    epoch, seconds = 0, 0.0
    metrics_file, checkpoint_file = folder / "metrics.jsonl", folder / "checkpoint.pt"
    if args.resume and checkpoint_file.exists():
        checkpoint = runs.load_file(checkpoint_file)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        epoch, seconds = checkpoint["epoch"], checkpoint["seconds"]
        print(f"resuming {folder} after epoch {epoch} of {args.epochs}")
    rows = [row for row in runs.read_lines(metrics_file) if row["epoch"] <= epoch]  # what came after the checkpoint is done again
    runs.write_lines(metrics_file, rows)
    if args.compile:
        model.visual.compile()

    tracker = runs.start_wandb(args.wandb, folder, config)
    counts = {name: sum(p.numel() for p in parameters if p.requires_grad) for name, parameters in towers(model).items()}
    print(f"{folder}: {args.architecture}, {len(train):,} images, {total:,} steps of {batch_size} on {device}; trainable "
          + ", ".join(f"{name} {n:,}" for name, n in counts.items() if n))

    bar = tqdm(total=total, initial=epoch * steps_per_epoch, unit="step", desc="training")
    while epoch < args.epochs:
        draw = runs.generator(args.seed, epoch)
        order = train[torch.randperm(len(train), generator=draw)]
        chosen = first + (torch.rand(len(first), generator=draw) * count).long()
        epoch_start = time.perf_counter()
        for i in range(steps_per_epoch):
            step_start = time.perf_counter()
            step = epoch * steps_per_epoch + i
            share = min((step + 1) / max(1, WARMUP * total), 0.5 * (1 + math.cos(math.pi * max(0.0, step - WARMUP * total) / max(1, total - WARMUP * total))))
            for g in optimizer.param_groups:
                g["lr"] = g["peak"] * share

            index = order[i * batch_size:(i + 1) * batch_size]
            images = batch(pixels, index, device, args.augment, draw)
            tokens, inverse = torch.unique(texts[chosen[index]], dim=0, return_inverse=True)  # a text that occurs twice is encoded once
            tokens, inverse = tokens.to(device), inverse.to(device)
            matches = same_class(labels[index].to(device)) if args.positives == "class" else None

            def loss_of(image_features, text_features):
                return info_nce(image_features, text_features.index_select(0, inverse), model.logit_scale.exp(), matches)

            encoders = [lambda x: encode_images(model, x), lambda t: encode_texts(model, t)]
            if args.chunk_size:
                loss = backward_in_chunks(encoders, [images, tokens], loss_of, args.chunk_size)
            else:
                loss = loss_of(encoders[0](images), encoders[1](tokens))
                loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], GRADIENT_NORM)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(MAX_SCALE))

            value = loss.item()
            if not math.isfinite(value):
                bar.close()
                raise UserError(f"the loss is {value} at step {step}: lower --lr; the last whole epoch is in {checkpoint_file}")
            rows.append({"epoch": epoch + 1, "step": step + 1, "train/loss": value, "train/lr": args.lr * share,
                         "train/tau": math.exp(-model.logit_scale.item()), "train/images_per_s": batch_size / (time.perf_counter() - step_start)})
            tracker.log(rows[-1])
            bar.set_postfix(epoch=epoch + 1, loss=f"{value:.3f}", refresh=False)
            bar.update()
        epoch += 1
        seconds += time.perf_counter() - epoch_start
        if args.eval_every and (epoch % args.eval_every == 0 or epoch == args.epochs):
            metrics, _ = evaluate.evaluate(model, flowers, pixels, flowers.splits["val"], args.prompt_template, captions)
            rows.append({"epoch": epoch, "step": epoch * steps_per_epoch, **{f"val/{k}": v for k, v in metrics.items()}})
            tracker.log(rows[-1])
            bar.write(f"epoch {epoch}: val top-1 {metrics['top1']:.2f}%")
        runs.write_lines(metrics_file, rows)
        runs.save_tensors(checkpoint_file, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "seconds": seconds})
    bar.close()

    # the last epoch is the result: val if it was held out, else test, once
    runs.save_tensors(folder / "model.pt", model.state_dict())
    start = time.perf_counter()
    index = flowers.splits[held]
    metrics, probabilities = evaluate.evaluate(model, flowers, pixels, index, args.prompt_template, captions)
    evaluate.save(folder, probabilities, flowers, index)
    if rows:
        figures.training_curve(rows, folder / "curve.png")
    result = {**{f"{held}/{k}": v for k, v in metrics.items()}, "train_seconds": round(seconds, 2),
              "train_images_per_s": round(args.epochs * steps_per_epoch * batch_size / max(seconds, 1e-9), 1),
              "eval_seconds": round(time.perf_counter() - start, 2), "peak_memory_mb": runs.peak_memory_mb(),
              **{f"trainable_{name}": n for name, n in counts.items()}, "parameters": sum(p.numel() for p in model.parameters())}
    runs.finish(folder, {"name": folder.name, **result, **config})
    tracker.log(result)
    runs.log_mistakes(tracker, figures.mistakes(probabilities, flowers, index))
    tracker.finish()
    print(evaluate.table({f"{folder.name} ({held})": metrics}))
    print(f"trained {seconds:.0f} s, peak memory {result['peak_memory_mb']:,} MB; results and pictures in {folder}/")


if __name__ == "__main__":
    main()
