"""Weights & Biases beside the run folder: a copy of what is there, which never costs the run."""

import contextlib
import netrc
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from flowers import reason

PROJECT = "flowers-102"
# Seconds. wandb's own defaults keep a run waiting for a dead server for 90 s and more.
INIT_TIMEOUT = 15
FINISH_TIMEOUT = 60  # what is not sent by then stays in the run folder, for `wandb sync`


class Tracker:
    """A W&B run, or nothing. Whatever fails in W&B is a warning, and the run goes on without it."""

    def __init__(self, run=None):
        self.run = run

    def log(self, metrics: dict | Callable[[], dict]) -> None:
        """Send metrics; given as a function, also what goes wrong in making them is a warning."""

        def send(run):
            run.log(metrics() if callable(metrics) else metrics)

        self._attempt(send)

    def summarise(self, values: dict) -> None:
        """Put values into the run's summary that are no metrics, such as what was evaluated."""
        self._attempt(lambda run: run.summary.update(values))

    def finish(self) -> None:
        """Wait, for at most FINISH_TIMEOUT, until everything is sent."""
        self._attempt(lambda run: run.finish())

    def _attempt(self, action: Callable) -> None:
        if self.run is None:
            return
        try:
            action(self.run)
        except Exception as error:  # whatever it is, the run matters more
            _warn(f"W&B failed ({reason(error)}): the run goes on without it")
            self.run = None


def start_wandb(mode: str, folder: Path, config: dict) -> Tracker:
    """Start a W&B run whose files are kept in the run folder. Never asks, never raises.

    mode: online, offline, disabled, or auto: online if a key is set, else offline. Without wandb
    the tracker does nothing; without its server the run is offline. Both are warnings.
    Its group is WANDB_RUN_GROUP, if set.
    """
    if mode == "disabled":
        return Tracker()
    try:
        import wandb  # here, as everything runs without it
    except Exception as error:  # not installed, or at odds with another package
        _warn(f"wandb can't be imported ({reason(error)}); results are in the run folder only")
        return Tracker()
    if mode == "auto":
        # Without a key and a terminal, wandb's own default raises.
        mode = "online" if _is_logged_in() else "offline"

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
                project=PROJECT,
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
            return Tracker(run)
    return Tracker()


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
