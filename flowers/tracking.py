"""Weights & Biases beside the run folder: a copy of what is there, which never costs the run."""

import contextlib
import netrc
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from flowers import files, reason

PROJECT = "flowers-102"
ID_FILE = "wandb_id.txt"  # in the run folder: the W&B run that a resumed run goes on with
MODES = ("online", "offline", "disabled")
# Seconds. wandb's own defaults keep a run waiting for a dead server for 90 s and more.
INIT_TIMEOUT = 15
FINISH_TIMEOUT = 60  # what is not sent by then stays in the run folder, for `wandb sync`


class Tracker:
    """A W&B run, or nothing. Whatever fails in W&B is a warning, and the run goes on without it."""

    def __init__(self, run=None):
        self.run = run
        self.rows = 0  # of log_row so far
        # A run that was resumed online has this many rows on the server, the others none.
        self.rows_there = getattr(run, "step", 0)

    def log(self, metrics: dict | Callable[[], dict]) -> None:
        """Send metrics; given as a function, also what goes wrong in making them is a warning."""

        def send(run):
            run.log(metrics() if callable(metrics) else metrics)

        self._attempt(send)

    def summarise(self, values: dict) -> None:
        """Put values into the run's summary that are no metrics, such as what was evaluated."""
        self._attempt(lambda run: run.summary.update(values))

    def log_row(self, row: dict) -> None:
        """Send the next row of metrics.jsonl, unless W&B has it from before an interruption.

        A resumed run gives all its rows again, from the first: also those that a kill kept from
        being sent. The steps after a checkpoint are done twice, and shown once.
        """
        step = self.rows
        self.rows += 1
        if step >= self.rows_there:
            self._attempt(lambda run: run.log(row, step=step))

    def finish(self) -> None:
        """Wait, for at most FINISH_TIMEOUT, until everything is sent."""
        self._attempt(lambda run: run.finish())

    def _attempt(self, action: Callable) -> None:
        # None from the start where W&B is disabled, and after its first failure: each further try
        # might wait for a dead server again.
        if self.run is None:
            return
        try:
            action(self.run)
        except Exception as error:  # whatever it is, the run matters more
            _warn(f"W&B failed ({reason(error)}): the run goes on without it")
            self.run = None


def start_wandb(mode: str, folder: Path, config: dict, resume: bool = False) -> Tracker:
    """Start a W&B run whose files are kept in the run folder. Never asks, never raises.

    mode: online, offline, disabled, or auto: what WANDB_MODE says, else online if a key is set,
    else offline. Without wandb the tracker does nothing; without its server the run is offline.
    Both are warnings. Project, entity and group are WANDB_PROJECT (else flowers-102),
    WANDB_ENTITY and WANDB_RUN_GROUP.
    resume: go on with the W&B run that the folder had before, if it had one.
    """
    mode = _choose_mode(mode)
    if mode == "disabled":
        return Tracker()
    try:
        import wandb  # here, as everything runs without it
    except Exception as error:  # not installed, or at odds with another package
        _warn(f"wandb can't be imported ({reason(error)}); results are in the run folder only")
        return Tracker()
    # An agent of a sweep says which run it wants the results in.
    run_id = os.environ.get("WANDB_RUN_ID") or None
    if run_id is None and resume:
        run_id = _read_id(folder)
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(FINISH_TIMEOUT))
    # The terminal belongs to the script, and its output is not captured.
    settings = wandb.Settings(
        init_timeout=INIT_TIMEOUT,
        silent=True,
        console="off",
        x_disable_stats=True,
    )
    # Whatever is wrong with the server, an offline run can be sent later.
    modes = [mode] if mode == "offline" else [mode, "offline"]
    for attempt in modes:
        try:
            run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or PROJECT,
                entity=os.environ.get("WANDB_ENTITY") or None,
                id=run_id,
                resume="allow" if resume else None,
                dir=folder,
                name=folder.name,
                config=config,
                job_type=config["job"],
                mode=attempt,
                settings=settings,
            )
        except Exception as error:  # network, key, permission: whatever it is
            _warn(f"W&B {attempt} failed ({reason(error)})")
        else:
            _keep_id(folder, run)
            return Tracker(run)
    return Tracker()


def _choose_mode(mode: str) -> str:
    """What `auto` stands for here: WANDB_MODE, else whether there is a key."""
    if mode != "auto":
        return mode
    variable = os.environ.get("WANDB_MODE")
    if variable in MODES:
        return variable
    # Without a key and a terminal, wandb's own default raises.
    return "online" if _is_logged_in() else "offline"


def _read_id(folder: Path) -> str | None:
    """The id of the W&B run that the folder had before; None if it had none."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = (folder / ID_FILE).read_text(encoding="utf-8").strip()
        if re.fullmatch(r"[\w-]+", text):
            return text
    return None


def _keep_id(folder: Path, run) -> None:
    """Write the id of a W&B run into the folder, for a run that is resumed."""
    try:
        with files.atomic(folder / ID_FILE, "w") as file:
            file.write(f"{run.id}\n")
    except Exception as error:  # a full disk, or a wandb that gives no id
        _warn(f"W&B's id can't be kept ({reason(error)}): a resumed run would be a new one there")


def log_mistakes(
    tracker: Tracker, mistakes: Sequence[tuple[Path, str, str, float]], limit: int = 64
) -> None:
    """Log a W&B table of the most confident mistakes with their pictures.

    mistakes: file, true name, predicted name and its probability, most confident first, as
    `figures.mistakes` returns them.
    """

    def table() -> dict:
        import wandb

        columns = ["picture", "file", "label", "prediction", "probability"]
        rows = []
        for file, label, prediction, probability in mistakes[:limit]:
            picture = wandb.Image(str(file))
            rows.append([picture, file.name, label, prediction, probability])
        return {"mistakes": wandb.Table(columns, rows)}

    tracker.log(table)


def finish_evaluation(
    tracker: Tracker,
    result: dict,
    protocol: dict,
    mistakes: Sequence[tuple[Path, str, str, float]],
) -> None:
    """Log what an evaluation came to, how it was measured and its mistakes, and end the W&B run."""
    tracker.log(result)
    tracker.summarise(protocol)
    log_mistakes(tracker, mistakes)
    tracker.finish()


def _is_logged_in() -> bool:
    """Whether there is a key for W&B's server, in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = url.split("//")[-1].split("/")[0]
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc().authenticators(host) is not None
    return False


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
