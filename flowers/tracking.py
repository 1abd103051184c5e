"""Weights & Biases beside the run folder: a copy of what is there, which never costs the run."""

import contextlib
import functools
import netrc
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from flowers import reason


class Tracker:
    """A W&B run, or nothing. When W&B fails, whatever it is, that is said once, and the run goes on without."""

    def __init__(self, run=None):
        self.run = run

    def _call(self, name: str, *arguments) -> None:
        try:
            if self.run:
                getattr(self.run, name)(*(a() if callable(a) else a for a in arguments))
        except Exception as error:
            print(
                f"warning: W&B failed ({reason(error)}): the run goes on without it",
                file=sys.stderr,
            )
            self.run = None

    log = functools.partialmethod(_call, "log")
    finish = functools.partialmethod(_call, "finish")


def start_wandb(mode: str, folder: Path, config: dict) -> Tracker:
    """A W&B run, or one that does nothing: 'auto' is online if a key is set, else offline. Never asks, never costs the run.

    Its files are kept in the run folder; its group is WANDB_RUN_GROUP, if set. A failure to reach the server becomes an offline run with a warning.
    """
    if mode == "disabled":
        return Tracker()
    try:
        import wandb
    except Exception as error:  # not installed, or at odds with another package
        print(
            f"warning: wandb can't be imported ({reason(error)}); results are in the run folder only",
            file=sys.stderr,
        )
        return Tracker()
    if mode == "auto":
        mode = "online" if _logged_in() else "offline"
    os.environ.setdefault(
        "WANDB_FINISH_TIMEOUT", "60"
    )  # seconds; what is not sent by then stays in the run folder, for `wandb sync`
    settings = wandb.Settings(init_timeout=15, silent=True, console="off", x_disable_stats=True)
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            return Tracker(
                wandb.init(
                    project="flowers-102",
                    dir=folder,
                    name=folder.name,
                    config=config,
                    job_type=config["job"],
                    mode=attempt,
                    settings=settings,
                )
            )
        except Exception as error:  # network, key, permission: whatever it is, the run matters more
            print(f"warning: W&B {attempt} failed ({reason(error)})", file=sys.stderr)
    return Tracker()


def log_mistakes(
    tracker: Tracker, rows: Sequence[tuple[Path, str, str, float]], most: int = 64
) -> None:
    """A W&B table of the most confident mistakes, with pictures; rows: file, true name, given name, probability."""

    def table():
        import wandb

        return {
            "mistakes": wandb.Table(
                ["picture", "file", "label", "prediction", "probability"],
                [[wandb.Image(str(file)), file.name, *rest] for file, *rest in rows[:most]],
            )
        }

    tracker.log(table)


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        host = (
            os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
        )
        return netrc.netrc().authenticators(host) is not None
    return False
