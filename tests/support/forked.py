"""Programs of this repository, run in forks of one process that has imported them, which takes seconds.

A fork does what `python PROGRAM …` does, also without the checks of shapes that pytest switches on.
"""

import atexit
import contextlib
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parents[2]
_IMPORTED = (
    "tests.support.parsed_configs",
    "t2v.generation.text_to_video",
    "data.prepare",
    "data.inspect",
    "transformers.models.bert.modeling_bert",
)


class Fork:
    """A program that runs.

    Args:
        words: The command line after `python`: a script, `-m` and a module or `-c` and code, and the arguments.
        cwd: Working directory.
        env: Variables besides those of this process.
        largest_file: Bytes of a file at which the system ends the process; 0 for any.
    """

    def __init__(self, *words: object, cwd: Path = ROOT, env: dict[str, str] | None = None, largest_file: int = 0):
        self.words = [str(word) for word in words]
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        variables = {**os.environ, **(env or {})}
        arguments = self.words, str(cwd), variables, [str(path) for path in self._outputs], largest_file
        self.process: BaseProcess = _server().Process(target=_work, args=arguments)
        self.process.start()

    def wait_until(self, reached: Callable[[], object]) -> None:
        """Wait until something is true or the program has ended, without taking the processor from it."""
        while self.process.exitcode is None and not reached():
            self.process.join(0.005)

    def wait(self, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        """Return the result when the program ends; the status of one that was killed is minus the signal."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.words, timeout)
        out, err = (path.read_text() if path.exists() else "" for path in self._outputs)
        self._folder.cleanup()
        return subprocess.CompletedProcess(self.words, self.process.exitcode, out, err)


def run(
    *words: object, cwd: Path = ROOT, env: dict[str, str] | None = None, largest_file: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; the arguments are those of `Fork`."""
    return Fork(*words, cwd=cwd, env=env, largest_file=largest_file).wait()


def run_ranks(ranks: int, *words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a program in several processes with the variables that torchrun sets; their outputs are joined."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "test"}
    common |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    variables = [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    forks = [Fork(*words, cwd=cwd, env={key: str(value) for key, value in each.items()}) for each in variables]
    done = [fork.wait() for fork in forks]
    status = next((each.returncode for each in done if each.returncode), 0)
    outputs = ("".join(getattr(each, name) for each in done) for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(done[0].args, status, *outputs)


@cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_IMPORTED])
    with contextlib.chdir(ROOT):  # from where it imports
        forkserver.ensure_running()
    return context


def _work(words: list[str], cwd: str, variables: dict[str, str], outputs: list[str], largest_file: int) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests with it ignored
    if largest_file:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    flag = words.pop(0) if words[0] in ("-m", "-c") else ""
    program, *arguments = words
    sys.argv = [flag if flag == "-c" else program, *arguments]
    try:
        if flag == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        elif flag == "-c":
            exec(program, {"__name__": "__main__"})
        else:
            runpy.run_path(program, run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        raise SystemExit(1) from None
    finally:
        atexit._run_exitfuncs()
