"""What the scripts must agree on: where the images are, how they become pixels, models, losses and results."""

import functools
import os
import sys

from tqdm import tqdm


class UserError(Exception):
    """Something that the user can mend; its message is one line that says what is wrong and what to do."""


def reason(error: Exception) -> str:
    """The first line of what an error says, or its kind if it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def command(main):
    """Wrap a script's `main`: a user's mistake, a file system that refuses, or a GPU that is too small ends with one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped():
        if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
            sys.stdout.reconfigure(
                errors="backslashreplace"
            )  # a name or degree sign that the terminal can't show is no reason to fail
        code = 0
        try:
            main()
            if sys.stdout:
                sys.stdout.flush()
        except BrokenPipeError:  # the reader of a pipe has seen enough
            code = 1
        except (UserError, OSError, RuntimeError) as error:
            if (
                isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError"
            ):  # torch's own; not imported here
                raise
            for bar in list(getattr(tqdm, "_instances", ())):
                bar.close()  # the error has a line of its own
            said = " ".join(str(error).split())
            print(
                "error: "
                + (
                    said
                    if not isinstance(error, RuntimeError)
                    else f"{said[:120]} ...: lower --batch_size, or in training --chunk_size"
                ),
                file=sys.stderr,
            )
            code = 2
        except KeyboardInterrupt:
            code = 130
        if code:
            try:
                if sys.stdout:
                    sys.stdout.flush()
            except OSError:
                os.dup2(
                    os.open(os.devnull, os.O_WRONLY), 1
                )  # else Python tries again at its end, and complains
            sys.exit(code)

    return wrapped
