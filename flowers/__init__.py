"""Fine-tuning vision-language models on Oxford Flowers 102: what two scripts must agree on."""

import argparse
import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from tqdm import tqdm

PRECISIONS = ("bf16", "fp16", "fp32")

# Linux then gives torch large tensors in pages of 2 MiB: a batch of pixels is written in half of
# the time. Read by torch at its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


class UserError(Exception):
    """An error that the user can mend. Its message is one line: what is wrong and what to do."""


def reason(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters; its type if it has none."""
    message = str(error) or type(error).__name__
    return message.splitlines()[0][:200]


def stop(message: str) -> NoReturn:
    """End the program with one line on stderr and exit code 2, at an import, before any `main`."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def opencv_import() -> Iterator[None]:
    """Around `import cv2`: an installation that lacks libGL ends with a line that mends it."""
    try:
        yield
    except ImportError as error:
        if error.name not in (None, "cv2"):
            raise  # of another package
        stop(
            f"OpenCV can't be imported ({reason(error)}): "
            "pip uninstall -y opencv-python opencv-python-headless, "
            "then pip install opencv-python-headless, which needs no libGL"
        )


def add_switch(
    parser: argparse.ArgumentParser, flag: str, help: str, default: bool | None = False
) -> None:
    """Add a flag that is on or off: --holdout, or as W&B's sweeps write it, --holdout=true."""
    parser.add_argument(
        flag, nargs="?", const=True, default=default, type=_truth, metavar="true|false", help=help
    )


def _truth(text: str) -> bool:
    # argparse's own bool("false") is True.
    value_of = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in value_of:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return value_of[text.lower()]


def typed_flags(
    parser: argparse.ArgumentParser, words: Sequence[str] | None = None
) -> dict[str, object]:
    """The values of the flags that the command line holds, without those that were left out.

    words: those of another command line.
    argparse can't say which flags were typed. So it parses once more, into a namespace that holds
    None for each: where there is a value it puts no default, and None is left.
    """
    untyped = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args(words))))
    values = vars(parser.parse_args(words, namespace=untyped))
    return {key: value for key, value in values.items() if value is not None}


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --device and --precision, for devices.choose_device and set_precision."""
    parser.add_argument(
        "--device",
        type=_device_name,
        default="auto",
        metavar="auto|cuda|cuda:N|mps|cpu",
        help="where to compute; auto: an NVIDIA or AMD GPU if there is one, else Apple's, else "
        "the CPU (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=["auto", *PRECISIONS],
        default="auto",
        help="of matrix products; weights stay fp32. auto: bf16 on GPUs of compute capability 8.0 "
        "or higher (A100, RTX 30 and later), else fp32 (default: %(default)s)",
    )


def _device_name(text: str) -> str:
    # Checked without torch, so that --help and a wrong name take no seconds.
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cuda, cuda:N, mps, cpu")
    return text


def check_seed(seed: int) -> None:
    """Raise UserError for a seed that numpy does not take."""
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed}: it must be between 0 and {2**32 - 1}")


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def command(main: Callable) -> Callable:
    """Decorate the `main` of a script, so that errors a user can mend end with one line on stderr.

    A script reads its flags before it imports what takes seconds, such as torch, so that --help and
    a mistake are answered at once: in `if __name__ == "__main__":` above those imports it calls
    `command(parse_arguments)()`, and at its end `main` with the result.

    Exit codes: 2 for a UserError, an OSError (a full disk, a missing permission) and a GPU that is
    too small; 1 when the reader of a pipe has gone; 130 for Ctrl-C. Any other error is a bug of
    ours and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped(*arguments):
        # A name or a degree sign that the terminal can't show is no reason to fail. The standard
        # output of a notebook can't be reconfigured.
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            result = main(*arguments)
            # Flushed here, so that a full disk is reported like every other error.
            _flush_stdout()
            return result
        except BrokenPipeError:
            # As in `train.py | head`: the reader has seen enough.
            code = 1
        except KeyboardInterrupt:
            code = 130
        except (UserError, OSError) as error:
            _print_error(_one_line(error))
            code = 2
        except RuntimeError as error:
            # A CUDA graph that was being recorded adds an error of its own.
            while error and not _is_out_of_memory(error):
                error = error.__context__
            if not error:
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


def _is_out_of_memory(error: BaseException) -> bool:
    # By its name: exploration does not load torch.
    return type(error).__name__ == "OutOfMemoryError"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _print_error(message: str) -> None:
    # A progress bar that is still open would share its line with the error.
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    print(f"error: {message}", file=sys.stderr)
