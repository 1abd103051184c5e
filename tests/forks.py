"""Scripts of the repository in forked children of a process that has imported what they import: a start takes 0.1 s instead of 5.

`python tests/forks.py` is that process: it reads a JSON request a line, answers with the child's pid, and, when it has ended, with its exit code.
It has one thread and has computed nothing when it forks, so a child is as good as a process of its own. `Forks` speaks to it.
"""

import contextlib
import json
import os
import resource
import runpy
import select
import signal
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Forks:
    """One child at a time, in a process group of its own."""

    def __init__(self, folder: Path):
        self.log = folder / "forks.err"  # of standard error; standard output beside it
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=folder,
            env=os.environ
            | {
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                "JE_ARROW_MALLOC_CONF": "background_thread:false",
            },
        )  # arrow, which pandas imports
        self.pid = self.code = None

    def start(self, script: str, *arguments, **how) -> int:
        """The pid of `python script arguments`. how: uid, file_size (the most bytes of a file), cwd, env."""
        request = {
            "script": script,
            "arguments": list(map(str, arguments)),
            "log": str(self.log),
            **how,
        }
        self.server.stdin.write(json.dumps(request).encode() + b"\n")
        self.pid, self.code = int(self.server.stdout.readline()), None
        return self.pid

    def ended(self, patience: float = 0) -> bool:
        """Whether the child has ended, after waiting for at most so many seconds."""
        if self.code is None and select.select([self.server.stdout], [], [], patience)[0]:
            self.code = int(self.server.stdout.readline())
        return self.code is not None

    def wait(self, patience: float = 120) -> tuple[int, str, str]:
        """Exit code (-9 after SIGKILL), stdout and stderr. A child that takes longer than so many seconds is killed, and fails the test."""
        if not self.ended(patience):
            self.kill()
            raise AssertionError(
                f"no end after {patience} s: {self.log.read_text(errors='replace')}"
            )
        return (
            self.code,
            self.log.with_suffix(".out").read_text(errors="replace"),
            self.log.read_text(errors="replace"),
        )

    def run(self, script: str, *arguments, patience: float = 120, **how) -> tuple[int, str, str]:
        self.start(script, *arguments, **how)
        return self.wait(patience)

    def kill(self, group: bool = True) -> None:
        """SIGKILL, to the child and its own children or to it alone; it may just have ended."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, signal.SIGKILL)
        self.ended(30)

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(30)


def child(request: dict) -> None:
    """Never returns."""
    code = 1
    try:
        os.setsid()
        log = Path(request["log"])
        for number, path, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, log.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            (2, log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ):
            os.dup2(os.open(path, flags), number)
        os.environ.update(request.get("env", {}))
        os.chdir(request.get("cwd", "."))
        if "file_size" in request:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
        if "uid" in request:
            os.setgroups([])
            os.setgid(request["uid"])
            os.setuid(request["uid"])
        sys.argv = [request["script"], *request["arguments"]]
        runpy.run_path(str(ROOT / request["script"]), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    sys.path.insert(0, str(ROOT))
    import torch

    import flowers.frozen
    import flowers.strategies
    import flowers.study.comparable
    import flowers.study.figures
    import flowers.tracking  # noqa: F401  (what the scripts import)

    # the encodings are those of PDF: another user may not be able to read Python's own files
    for package in (
        "seaborn",
        "sklearn.linear_model",
        "sklearn.manifold",
        "sklearn.neighbors",
        "scipy.fft",
        "torchvision.io",
        "encodings.utf_16_be",
        "encodings.utf_32_be",
    ):
        __import__(package)
    torch.set_num_threads(1)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork copies one thread only"
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
