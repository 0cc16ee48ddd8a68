"""Where the work is done: in processes of this machine, or on a Ray cluster.

A job leaves its result in files, so that both need no more than this: call a function for every job, and say which jobs
ended because their process died. Nothing else is lost with it.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol, TypeVar

from t2v.errors import UserError

Job = TypeVar("Job")


class Run(Protocol):
    """What an engine gives."""

    def __call__(self, function: Callable[[Job], None], jobs: deque[Job]) -> Iterator[tuple[Job, bool]]:
        """Call a function for every job, several at a time.

        Args:
            function: a function of a module; what it raises is raised here.
            jobs: the jobs, taken from the left; those that the caller appends meanwhile are done too.

        Yields:
            Each job as it ends, and whether its process lived on.
        """
        ...


@contextmanager
def processes(num_workers: int) -> Iterator[Run]:
    """An engine of processes on this machine.

    Args:
        num_workers: how many.
    """
    idle: list[tuple[Any, Connection]] = []
    busy: dict[Connection, tuple[Any, Any]] = {}

    def run(function: Callable[[Job], None], jobs: deque[Job]) -> Iterator[tuple[Job, bool]]:
        while jobs or busy:
            while jobs and len(busy) < num_workers:
                process, pipe = idle.pop() if idle else _start_process()
                busy[pipe] = process, jobs.popleft()
                with suppress(ConnectionError):  # a process that died while it was idle: reading from it will tell
                    pipe.send((function, busy[pipe][1]))
            ready = wait(list(busy))
            for pipe in [pipe for pipe in busy if pipe in ready]:
                process, job = busy.pop(pipe)
                try:
                    error = pipe.recv()
                except (EOFError, ConnectionResetError):
                    process.join()
                    yield job, False
                    continue
                idle.append((process, pipe))
                if error:
                    raise error
                yield job, True

    try:
        yield run
    finally:
        for process in [process for process, _ in (*idle, *busy.values())]:
            process.kill()
            process.join()


@contextmanager
def ray_cluster(num_workers: int) -> Iterator[Run]:
    """An engine on the Ray cluster of `RAY_ADDRESS`, or on a Ray of this machine where that is not set.

    Args:
        num_workers: CPUs of a Ray of this machine; a cluster gives all that it has.
    """
    try:
        import ray
        from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError
    except ImportError as error:
        raise UserError("--engine ray needs Ray: run pip install 't2v[ray]'.") from error

    def run(function: Callable[[Job], None], jobs: deque[Job]) -> Iterator[tuple[Job, bool]]:
        remote = ray.remote(num_cpus=1, max_retries=0)(function)
        at_once = 2 * int(ray.cluster_resources().get("CPU", 1))  # no CPU waits for its next job
        busy: dict[Any, Job] = {}
        while jobs or busy:
            while jobs and len(busy) < at_once:
                job = jobs.popleft()
                busy[remote.remote(job)] = job
            (done, *_), _ = ray.wait(list(busy))
            job = busy.pop(done)
            try:
                ray.get(done)
            except (NodeDiedError, OutOfMemoryError, WorkerCrashedError):
                yield job, False
            except RayTaskError as error:
                raise error.cause from error
            else:
                yield job, True

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address := os.environ.get("RAY_ADDRESS"):
        root = Path(__file__).parents[2]
        try:
            ray.init(runtime_env={"py_modules": [str(root / "data"), str(root / "t2v")]}, **quiet)
        except ConnectionError as error:
            raise UserError(f"No Ray cluster lets us in at RAY_ADDRESS={address} ({error}): correct it.") from error
    else:
        ray.init(address="local", num_cpus=num_workers, include_dashboard=False, **quiet)
    try:
        yield run
    finally:
        ray.shutdown()


def _start_process() -> tuple[Any, Connection]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_work, args=(theirs,))
    process.start()
    theirs.close()  # else the end of the process would not be the end of the pipe
    return process, ours


def _work(pipe: Connection) -> None:
    """Do the jobs that come through a pipe, and answer each with None or an error."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:  # else a worker outlives a command that is killed
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    while True:
        function, job = pipe.recv()
        try:
            function(job)
        except UserError as error:
            pipe.send(error)
        except Exception:
            pipe.send(RuntimeError(traceback.format_exc()))
        else:
            pipe.send(None)
