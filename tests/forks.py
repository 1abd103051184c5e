"""Scripts of the repository in forked children of a process that has imported what they import: a
start takes 0.1 s instead of 5.

`python tests/forks.py` is that process. It reads a JSON request a line, answers with the child's
pid and, when the child has ended, with its exit code. It has one thread and has computed nothing
when it forks, so a child is as good as a process of its own. `Forks` speaks to it.
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
PATIENCE_S = 600  # a machine that is busy with other work needs minutes


class Forks:
    """One child at a time, in a process group of its own."""

    def __init__(self, folder: Path):
        self.log = folder / "forks.err"  # of standard error; standard output is beside it
        environment = {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            # pandas imports Arrow, whose allocator would start a thread
            "JE_ARROW_MALLOC_CONF": "background_thread:false",
        }
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # `select` must see every line
            cwd=folder,
            env=os.environ | environment,
        )
        self.pid = None
        self.code = None

    def start(self, script: str, *arguments, **how) -> int:
        """Start `python script arguments`, and return its pid.

        how: uid, file_size (the most bytes of a file), cwd, env.
        """
        request = {
            "script": script,
            "arguments": [str(argument) for argument in arguments],
            "log": str(self.log),
            **how,
        }
        self.server.stdin.write(json.dumps(request).encode() + b"\n")
        self.pid = int(self.server.stdout.readline())
        self.code = None
        return self.pid

    def ended(self, patience: float = 0) -> bool:
        """Whether the child has ended, after waiting for at most so many seconds."""
        if self.code is None:
            readable, _, _ = select.select([self.server.stdout], [], [], patience)
            if readable:
                self.code = int(self.server.stdout.readline())
        return self.code is not None

    def wait(self, patience: float = PATIENCE_S) -> tuple[int, str, str]:
        """Exit code (-9 after SIGKILL), stdout and stderr.

        A child that takes longer than so many seconds is killed, and fails the test.
        """
        if not self.ended(patience):
            self.kill()
            log = self.log.read_text(errors="replace")
            raise AssertionError(f"no end after {patience} s: {log}")
        out = self.log.with_suffix(".out").read_text(errors="replace")
        err = self.log.read_text(errors="replace")
        return self.code, out, err

    def run(
        self, script: str, *arguments, patience: float = PATIENCE_S, **how
    ) -> tuple[int, str, str]:
        """Start a script and wait for its end."""
        self.start(script, *arguments, **how)
        return self.wait(patience)

    def kill(self, group: bool = True) -> None:
        """SIGKILL, to the child and its own children or to it alone. It may just have ended."""
        with contextlib.suppress(ProcessLookupError):
            if group:
                os.killpg(self.pid, signal.SIGKILL)
            else:
                os.kill(self.pid, signal.SIGKILL)
        self.ended(PATIENCE_S)

    def close(self) -> None:
        """End the server."""
        self.server.stdin.close()
        self.server.wait(PATIENCE_S)


def child(request: dict) -> None:
    """Run the script of a request. Never returns."""
    code = 1
    try:
        os.setsid()  # a process group of its own, which can be killed as one
        redirect(Path(request["log"]))
        os.environ.update(request.get("env", {}))
        os.chdir(request.get("cwd", "."))
        if "file_size" in request:
            limit = request["file_size"]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
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
        os._exit(code)  # without the server's own clean-up


def redirect(log: Path) -> None:
    """Standard input from nowhere; standard output and standard error to files, written anew."""
    writing = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(log.with_suffix(".out"), writing), 1)
    os.dup2(os.open(log, writing), 2)


def serve() -> None:
    """Import what the scripts import, then fork a child for each request."""
    sys.path.insert(0, str(ROOT))
    import torch

    import flowers.frozen
    import flowers.strategies
    import flowers.study.comparable
    import flowers.study.figures
    import flowers.tracking  # noqa: F401  (what the scripts import)

    # the encodings are those of PDF: another user may not be able to read Python's own files
    for package in (
        "scipy.optimize",
        "scipy.stats",
        "seaborn",
        "sklearn.linear_model",
        "sklearn.manifold",
        "sklearn.metrics",
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
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
