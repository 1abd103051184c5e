"""Fine-tuning vision-language models on Oxford Flowers 102: what two scripts must agree on."""

import functools
import os
import sys
from collections.abc import Callable

from tqdm import tqdm


class UserError(Exception):
    """An error that the user can mend. Its message is one line: what is wrong and what to do."""


def reason(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters; its type if it has none."""
    message = str(error) or type(error).__name__
    return message.splitlines()[0][:200]


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate the `main` of a script, so that errors a user can mend end with one line on stderr.

    Exit codes: 2 for a UserError, an OSError (a full disk, a missing permission) and a GPU that is
    too small; 1 when the reader of a pipe has gone; 130 for Ctrl-C. Any other error is a bug of
    ours and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped():
        # A name or a degree sign that the terminal can't show is no reason to fail. The standard
        # output of a notebook can't be reconfigured.
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            main()
            # Flushed here, so that a full disk is reported like every other error.
            _flush_stdout()
            return
        except BrokenPipeError:
            # As in `train.py | head`: the reader has seen enough.
            code = 1
        except KeyboardInterrupt:
            code = 130
        except (UserError, OSError) as error:
            _print_error(_one_line(error))
            code = 2
        except RuntimeError as error:
            # torch.OutOfMemoryError, by its name: exploration does not load torch.
            if type(error).__name__ != "OutOfMemoryError":
                raise
            advice = "lower --batch_size, or in training --chunk_size"
            _print_error(f"{_one_line(error)[:120]} ...: {advice}")
            code = 2
        try:
            _flush_stdout()
        except OSError:
            # What is left can't be written. Python would try again when it ends, and complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(code)

    return wrapped


def _flush_stdout() -> None:
    if sys.stdout is not None:  # it is None where standard output is closed
        sys.stdout.flush()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _print_error(message: str) -> None:
    # A progress bar that is still open would share its line with the error.
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    print(f"error: {message}", file=sys.stderr)
