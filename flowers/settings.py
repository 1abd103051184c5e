"""What train.py is told: its flags, and the settings of a run that they become.

Without torch: --help and a mistake in a flag are answered at once, and ablate.py checks flags for
train.py before it runs any point.
"""

import argparse
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from flowers import UserError, add_device_arguments, add_switch, check_seed, runs, world_size
from flowers.choices import (
    ADDS_WEIGHTS,
    DEFAULT_C,
    DEFAULT_PULL,
    LEARNING_RATES,
    LOSSES,
    MAX_VAL_SHOTS,
    ONE_LAYER,
    RANDOM,
    STRATEGIES,
    TEMPLATE,
    add_activation_argument,
    context_template,
    cut_points,
)
from flowers.data import add_data_arguments
from flowers.files import digest_of_prompts, note, user_path

# For the architectures that start from random weights: tiny, tiny-16 and tiny-rn.
RANDOM_LR = 5e-4
RANDOM_EPOCHS = 19
DEFAULT_EPOCHS = 5
# What is said of steps, which a logistic regression has not.
OF_STEPS = (
    "batch_size",
    "chunk_size",
    "lr",
    "tau_lr",
    "learn_temperature",
    "positives",
    "wd",
    "compile",
    "no_cuda_graph",
    "eval_every",
)
WITH_STEPS = tuple(name for name in STRATEGIES if name != "linear")
# These freeze the start of the image tower, and these some part of a tower.
FROZEN_START = tuple(name for name in STRATEGIES if cut_points(name, 1)[0] is not None)
FROZEN_PART = tuple(name for name in STRATEGIES if cut_points(name, 1) != (None, None))
# Flag -> the strategies that use it. Grids of ablate.py give one flag to all their strategies, so
# a flag that means nothing is noted and not refused.
USED_BY = {
    "blocks": ("last_blocks",),
    "rank": ("lora",),
    "context_tokens": ("prompt",),
    "epochs": WITH_STEPS,
    "views": FROZEN_START,
    "no_cache": FROZEN_PART,
}
USED_BY |= dict.fromkeys(OF_STEPS, WITH_STEPS)
# Scales and shifts of norms do not decay.
USED_BY["wd"] = tuple(name for name in WITH_STEPS if name != "norm")


# -----------------------------------------------------------------------------
# settings


@dataclass(frozen=True)
class Config:
    """All settings of a run, with nothing left open. --help says what each of them means."""

    # data
    data_root: str
    splits_path: str | None  # None: the splits in the folder
    splits_base: int | None  # None: the file says it
    class_names: str
    splits: str | None  # None until the dataset is open: what it says
    holdout: bool
    # model and text
    architecture: str
    activation: str | None  # None: what the weights say
    prompt_template: list[str] | None  # None: prompts
    prompts: str | None  # None: prompt_template
    prompts_digest: str | None  # of that file
    start: str | None  # fingerprint of the weights before training; None: not yet loaded
    captions: str | None  # None: prompts
    captions_digest: str | None  # of that file
    # what is trained
    strategy: str
    blocks: int
    rank: int
    context_tokens: int
    start_from: str  # linear: random or zero_shot
    inverse_penalty: float | None  # None: chosen on val, or a default
    cross_modal: bool
    classes: str
    shots: int | None  # None: all images
    val_shots: int | None  # None: all images
    views: int
    no_cache: bool
    # loss
    loss: str
    positives: str | None  # None: cross_entropy, which has none
    logit_bias: float | None  # None: not sigmoid, or fitted to the first batch
    temperature: float | None  # None: the model's own
    learn_temperature: bool
    tau_lr: float
    # optimisation
    epochs: int
    batch_size: int  # of each process
    chunk_size: int
    lr: float
    lr_decay: float
    wd: float
    pull: float | None  # None: not yet known; linear: chosen on val, or a default
    pull_by_default: bool | None  # whether it is what the images say; None: not projection
    ema: float
    augment: str
    seed: int
    compile: bool
    no_cuda_graph: bool
    # machine; what the flags say until `train.py` knows what there is
    device: str  # of the main process
    precision: str  # bf16, fp16 or fp32
    # run
    eval_every: int
    allow_overlap: bool
    runs: str
    name: str | None  # None: named after model and time
    resume: str | None  # None: a new run
    wandb: str
    processes: int

    @property
    def eval_split(self) -> str:
        """The split that is evaluated."""
        return "val" if self.holdout else "test"

    @property
    def trains(self) -> bool:
        """Whether anything is learned from the training images."""
        return runs.trains(self.epochs, self.strategy)

    @property
    def fits_bias(self) -> bool:
        """Whether the bias of the loss is to be fitted to the first batch."""
        return self.loss == "sigmoid" and self.logit_bias is None

    @property
    def records_steps(self) -> bool:
        """Whether the work of a step is recorded on the GPU; all steps must then have one shape."""
        is_alone = self.processes == 1 and not self.chunk_size
        return is_alone and self.device.startswith("cuda") and not self.no_cuda_graph

    def evaluates_after(self, epoch: int) -> bool:
        """Whether val is evaluated after an epoch (counted from 1)."""
        if self.eval_every == 0:
            return False
        return epoch % self.eval_every == 0 or epoch == self.epochs

    def record(self) -> dict:
        """What args.json, result.json and W&B keep: all but how this command was called."""
        settings = {"job": "train"} | asdict(self)
        # new_run adds the name; a run that is resumed is the same run.
        del settings["name"], settings["resume"]
        if self.strategy == "linear":
            settings |= dict.fromkeys(("loss", *OF_STEPS))  # None: it has no such thing
        return settings


def read_settings(description: str) -> Config:
    """The settings of the command line, or with --resume those that the run was started with.

    description: of the script, for --help. Ends the program where --help is given, or the run to
    resume is finished. Raises UserError as parse_arguments and resolve do.
    """
    processes = world_size()
    args = parse_arguments(make_parser(description), processes)
    return resolve(args, processes)


def parse_arguments(parser: argparse.ArgumentParser, processes: int) -> argparse.Namespace:
    """The flags of the command line, or with --resume those that the run was started with.

    Ends the program if that run is finished. Raises UserError if there is no run to resume, or if
    it was started with another number of processes.
    """
    args = parser.parse_args()
    if not args.resume:
        note_unused(args, parser)
        return args
    folder = Path(args.resume)
    stored = runs.arguments_to_resume(folder, "train")
    if stored is None:
        raise SystemExit  # it is finished, which was printed
    runs.check_processes(folder, stored.get("processes"), processes)
    for what in ("prompts", "captions"):
        path, digest = stored.get(what), stored.get(f"{what}_digest")
        # Older runs have no digest of their captions.
        is_known = digest is not None or what == "prompts"
        if path and is_known and digest != digest_of_prompts(str(path), what):
            raise UserError(
                f"{path} has changed since {folder} was begun: go on with the same "
                "sentences, for the same result"
            )
    args = runs.parse_stored(parser, args, stored)
    unused = {key for key, strategies in USED_BY.items() if args.strategy not in strategies}
    runs.check_typed(parser, args, unused)
    return args


def note_unused(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Print a note of each flag that the strategy has no use for."""
    for key, users in USED_BY.items():
        # 0 is the truth where nothing is trained by steps, and ablate.py gives it as --lr.
        is_given = getattr(args, key) not in (parser.get_default(key), 0)
        if is_given and args.strategy not in users:
            note(f"--{key} has no meaning for --strategy {args.strategy}")
    if args.strategy == "linear" and args.start_from == "random":
        note_unused_by_random_probe(args)
    if args.strategy in FROZEN_START and args.views != parser.get_default("views"):
        if args.augment in (None, "none"):
            note("--views has no meaning without --augment flip or crop: all views are the same")
    learns = args.learn_temperature or args.loss == "sigmoid"
    if args.strategy in USED_BY["tau_lr"] and args.tau_lr is not None and not learns:
        note("--tau_lr has no meaning without --learn_temperature or --loss sigmoid")


def note_unused_by_random_probe(args: argparse.Namespace) -> None:
    """Print a note of each flag that a logistic regression from random has no use for."""
    unused = ["temperature"]
    # Classes that are not trained on keep the text classifier.
    if args.classes == "all" and not args.cross_modal:
        unused += ["prompt_template", "prompts"]
    for key in unused:
        if getattr(args, key) is not None:
            note(f"--{key} has no meaning for --strategy linear from random")


def resolve(args: argparse.Namespace, processes: int) -> Config:
    """Fill in the defaults that depend on other flags, and check all values.

    Raises UserError for flags that contradict each other, and for values out of range.
    """
    check_seed(args.seed)
    image_cut, _ = cut_points(args.strategy, args.blocks)
    settle_texts(args)
    if args.augment is None:
        args.augment = "crop" if image_cut is None else "none"
    check_loss(args)
    if args.positives is None and args.loss != "cross_entropy":
        args.positives = "pair" if args.captions else "class"
    settle_steps(args)
    if args.eval_every and not args.holdout:
        raise UserError("--eval_every needs --holdout: test images are evaluated once, at the end")
    check_probe(args)
    check_regularisers(args)
    settle_val_shots(args)
    check_ranges(args)
    return Config(
        **vars(args),
        processes=processes,
        prompts_digest=digest_of_prompts(args.prompts, "prompts") if args.prompts else None,
        captions_digest=digest_of_prompts(args.captions, "captions") if args.captions else None,
        pull_by_default=None,
        start=None,
    )


def settle_texts(args: argparse.Namespace) -> None:
    """Fill in --prompt_template; raise UserError for texts of which one would be in vain."""
    is_learned = args.strategy == "prompt"
    # The arguments of a resumed run hold the learned prompt's own template.
    if is_learned and not args.resume and (args.captions or args.prompt_template):
        raise UserError(
            "--strategy prompt learns the prompt: leave out --captions and --prompt_template"
        )
    if args.prompts and (args.prompt_template or args.captions or is_learned):
        raise UserError(
            "--prompts are the texts of the classes: leave out --prompt_template, --captions and "
            "--strategy prompt"
        )
    if is_learned:
        args.prompt_template = [context_template(args.context_tokens)]
    elif not args.prompt_template and not args.prompts:
        args.prompt_template = [TEMPLATE]


def settle_steps(args: argparse.Namespace) -> None:
    """Fill in --epochs and the learning rates."""
    from_random = args.architecture in RANDOM
    if args.lr is None:
        args.lr = RANDOM_LR if from_random else LEARNING_RATES[args.strategy]
    # Where neither temperature nor bias is learned it has no effect, but it is recorded.
    if args.tau_lr is None:
        args.tau_lr = args.lr
    if args.strategy == "linear":
        args.epochs = 0  # logistic regression has no steps
    elif args.epochs is None:
        args.epochs = RANDOM_EPOCHS if from_random else DEFAULT_EPOCHS


def settle_val_shots(args: argparse.Namespace) -> None:
    """Fill in --val_shots. Raises UserError if there is no val."""
    if args.val_shots is not None and not args.holdout:
        raise UserError(
            "--val_shots needs --holdout: without it no val is set apart, and test is whole"
        )
    # A resumed run has its own: those of before --val_shots evaluated all images of val.
    if args.val_shots is None and args.holdout and args.shots and not args.resume:
        args.val_shots = min(args.shots, MAX_VAL_SHOTS)


def check_ranges(args: argparse.Namespace) -> None:
    """Raise UserError for a number out of its range."""
    at_least_zero = [args.epochs, args.lr, args.tau_lr, args.wd, args.chunk_size, args.eval_every]
    above_zero = [args.views, args.batch_size - 1]
    optional = (args.temperature, args.shots, args.val_shots)
    above_zero += [value for value in optional if value is not None]
    # Comparisons with NaN are false, so it does not pass either.
    is_valid = all(0 <= v < math.inf for v in at_least_zero)
    if not (is_valid and all(0 < v < math.inf for v in above_zero)):
        raise UserError(
            "--epochs, --lr, --tau_lr, --wd, --chunk_size and --eval_every must be at least 0, "
            "--batch_size at least 2, --views at least 1, --shots, --val_shots and --temperature "
            "above 0, none of them infinite"
        )


def check_loss(args: argparse.Namespace) -> None:
    """Raises UserError for flags that mean nothing with the loss."""
    if args.strategy == "linear" and args.loss != "info_nce":
        raise UserError(
            f"--strategy linear is a logistic regression, with a loss of its own: leave out "
            f"--loss {args.loss}"
        )
    if args.loss == "cross_entropy" and args.captions:
        raise UserError(
            "--loss cross_entropy needs a text of every class, and captions are of single images: "
            "leave out --captions, or take another --loss"
        )
    if args.loss == "cross_entropy" and args.positives:
        raise UserError(
            "--positives says which texts of a batch match, and --loss cross_entropy compares "
            "with the texts of all classes: leave out --positives"
        )
    if args.logit_bias is None:
        return
    if args.loss != "sigmoid":
        raise UserError("--logit_bias is a part of --loss sigmoid: leave it out, or take that loss")
    if not math.isfinite(args.logit_bias):
        raise UserError(f"--logit_bias {args.logit_bias}: it must be a finite number")


def check_regularisers(args: argparse.Namespace) -> None:
    """Fill in --pull where it is off; raise UserError for --pull, --lr_decay or --ema in vain."""
    strategy = args.strategy
    has_steps = args.epochs != 0
    # `complete` sets that of projection, which depends on the images; linear has its own use of it.
    is_left_open = strategy == "linear" or strategy == "projection" and has_steps
    if args.pull is None and not is_left_open:
        args.pull = 0.0
    if args.pull and strategy in ADDS_WEIGHTS:
        raise UserError(
            f"--pull: --strategy {strategy} leaves the weights as they were and trains others "
            "beside them, so there is nothing to pull back: leave it out"
        )
    if args.lr_decay != 1 and strategy in ONE_LAYER:
        raise UserError(
            f"--lr_decay: --strategy {strategy} trains one layer alone: set --lr instead"
        )
    if not has_steps and (args.ema or args.lr_decay != 1 or args.pull and strategy != "linear"):
        raise UserError("--pull, --lr_decay and --ema act on steps: with 0 epochs leave them out")
    # Comparisons with NaN are false, so it does not pass either.
    pull_is_valid = args.pull is None or 0 <= args.pull < math.inf
    if not (pull_is_valid and 0 < args.lr_decay <= 1 and 0 <= args.ema < 1):
        raise UserError(
            "--pull must be at least 0, --lr_decay above 0 and at most 1, --ema at least 0 and "
            "below 1"
        )


def check_probe(args: argparse.Namespace) -> None:
    """Raise UserError for flags of the linear probe that mean nothing together."""
    is_linear = args.strategy == "linear"
    is_pulled = args.start_from == "zero_shot"
    if is_linear and args.no_cache:
        raise UserError("--no_cache has nothing to show with --strategy linear, which has no steps")
    if (is_pulled or args.cross_modal) and not is_linear:
        raise UserError("--start_from zero_shot and --cross_modal need --strategy linear")
    if is_linear and not is_pulled and args.pull is not None:
        raise UserError(
            "--pull has nothing to pull to: with --strategy linear it needs --start_from zero_shot"
        )
    penalty = args.inverse_penalty
    if penalty is not None and (is_pulled or not is_linear):
        raise UserError(
            "--inverse_penalty is of the logistic regression: it needs --strategy linear, and "
            "--start_from random"
        )
    if penalty is not None and not 0 < penalty < math.inf:
        raise UserError("--inverse_penalty must be a number above 0")
    # Without a pull there is no optimum where the training images can be told apart.
    if is_linear and args.pull is not None and not 0 < args.pull < math.inf:
        raise UserError("--pull must be a number above 0 with --strategy linear")


# -----------------------------------------------------------------------------
# command line


def make_parser(description: str | None = None) -> argparse.ArgumentParser:
    """The flags of train.py. A default of None is filled in by `resolve`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_arguments(parser)
    add_model_arguments(parser.add_argument_group("model and text"))
    add_strategy_arguments(parser.add_argument_group("what is trained"))
    add_loss_arguments(parser.add_argument_group("loss"))
    add_optimisation_arguments(parser.add_argument_group("optimisation"))
    add_device_arguments(parser.add_argument_group("machine"))
    add_run_arguments(parser.add_argument_group("run"))
    return parser


def add_model_arguments(group) -> None:
    # What the training starts from.
    group.add_argument(
        "--architecture",
        type=user_path,
        default="ViT-B/32",
        help="where to start: a name of clip.available_models(), tiny, tiny-16, tiny-rn (a small "
        "ResNet), the path of a state dict or run, open_clip:NAME/PRETRAINED, or hf:NAME; "
        "docs/models.md lists all (default: %(default)s)",
    )
    add_activation_argument(group)
    # What an image is matched with.
    group.add_argument(
        "--prompt_template",
        action="append",
        help="text with {} for the class name; repeatable: training draws one of them for each "
        f"image (default: '{TEMPLATE}')",
    )
    group.add_argument(
        "--prompts",
        type=user_path,
        metavar="FILE",
        help="JSON of class names, each with a list of sentences, instead of --prompt_template: "
        "training draws one of them for each image",
    )
    group.add_argument(
        "--captions",
        type=user_path,
        help="captions.jsonl[.gz]: train on a sentence of the image, drawn anew each epoch, "
        "instead of the prompt",
    )


def add_strategy_arguments(group) -> None:
    group.add_argument(
        "--strategy",
        choices=STRATEGIES,
        default="full",
        help="see flowers/strategies.py (default: %(default)s)",
    )
    # Each of these belongs to one strategy.
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
        "--start_from",
        choices=["random", "zero_shot"],
        default="random",
        help="linear: a logistic regression, or a classifier that starts at the text classifier "
        "and is pulled towards it (default: %(default)s)",
    )
    group.add_argument(
        "--inverse_penalty",
        type=float,
        metavar="C",
        help="linear from random: the inverse of the L2 penalty (default: chosen on val with "
        f"--holdout, else {DEFAULT_C:g})",
    )
    add_switch(
        group,
        "--cross_modal",
        help="linear: the prompts of the trained classes are training samples, too",
    )
    # Which of the training images.
    group.add_argument(
        "--classes",
        choices=["base", "new", "all"],
        default="all",
        help="train on the first half of the classes, the second, or all; evaluation tells them "
        "apart (default: %(default)s)",
    )
    group.add_argument(
        "--shots",
        type=int,
        help="train on at most so many images a class, drawn by --seed (default: all)",
    )
    group.add_argument(
        "--val_shots",
        type=int,
        help="with --holdout: evaluate at most so many val images a class, drawn by --seed "
        f"(default: as many as --shots, at most {MAX_VAL_SHOTS}; without --shots all)",
    )
    # Frozen parts, which are computed once.
    group.add_argument(
        "--views",
        type=int,
        default=4,
        help="augmented views of each image that a frozen part of the image tower is computed "
        "for, if --augment is not none (default: %(default)s)",
    )
    add_switch(
        group,
        "--no_cache",
        help="compute frozen parts again at every step, to see what keeping them gains",
    )


def add_loss_arguments(group) -> None:
    group.add_argument(
        "--loss",
        choices=LOSSES,
        default="info_nce",
        help="info_nce among the batch, cross_entropy over the texts of all classes that are "
        "trained on, or SigLIP's sigmoid of each pair (default: %(default)s)",
    )
    group.add_argument(
        "--positives",
        choices=["pair", "class"],
        help="what matches in a batch: each image its own text, or every text of its class "
        "(default: class; with --captions pair; cross_entropy has none)",
    )
    group.add_argument(
        "--logit_bias",
        type=float,
        help="sigmoid: the learned bias at the start (default: the best for the first batch)",
    )
    # The temperature tau is 1 / exp(logit_scale).
    group.add_argument(
        "--temperature",
        type=float,
        help="tau at the start (default: the model's own, 0.01 for the pretrained ones)",
    )
    add_switch(group, "--learn_temperature", help="train tau too (default: fixed)")
    group.add_argument(
        "--tau_lr",
        type=float,
        help="learning rate of log(1/tau), and of sigmoid's bias (default: --lr)",
    )


def add_optimisation_arguments(group) -> None:
    # Length, and size of a step.
    group.add_argument(
        "--epochs",
        type=int,
        help=f"passes over the training images (default: {DEFAULT_EPOCHS}; tiny from random "
        f"weights: {RANDOM_EPOCHS})",
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
        help="images in memory at a time, for a batch larger than the memory: same gradient, a "
        "third slower (default: 0, the whole batch)",
    )
    # AdamW.
    group.add_argument(
        "--lr",
        type=float,
        help="peak learning rate (default: by strategy, 1e-5 for full; tiny from random weights: "
        f"{RANDOM_LR:g})",
    )
    group.add_argument(
        "--wd",
        type=float,
        default=0.1,
        help="weight decay, not on biases, norms and the temperature (default: %(default)s)",
    )
    group.add_argument(
        "--lr_decay",
        type=float,
        default=1.0,
        metavar="D",
        help="a layer's peak learning rate is --lr times D for each layer above it in its tower "
        "(default: 1, all the same)",
    )
    # What holds the weights back.
    group.add_argument(
        "--pull",
        type=float,
        metavar="LAMBDA",
        help="add LAMBDA times the squared distance of the trained weights from their start to "
        "the loss (default: 0; for projection 1 / mean number of training images of a class; for "
        "linear from zero_shot chosen on val with --holdout, else "
        f"{DEFAULT_PULL:g})",
    )
    group.add_argument(
        "--ema",
        type=float,
        default=0.0,
        metavar="D",
        help="evaluate and save an exponential moving average of the trained weights, which keeps "
        "D of itself at each step, such as 0.99 (default: 0, the weights themselves)",
    )
    # Randomness.
    group.add_argument(
        "--augment",
        choices=["none", "flip", "crop"],
        help="none, mirror, or mirror and random crop (default: crop; none where the image "
        "tower's start is frozen)",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="of weights, order, augmentation (default: %(default)s)"
    )
    # Speed.
    add_switch(group, "--compile", help="torch.compile of both towers, for long trainings on a GPU")
    add_switch(
        group,
        "--no_cuda_graph",
        help="give a GPU every operation of a step anew, in place of a recorded step: slower, and "
        "evaluation finds more memory",
    )


def add_run_arguments(group) -> None:
    group.add_argument(
        "--eval_every",
        type=int,
        default=0,
        help="evaluate val every so many epochs; needs --holdout (default: 0, never)",
    )
    runs.add_overlap_argument(group)
    runs.add_run_arguments(group, resume=True)
