"""Engines that run jobs: processes on this machine, or a Ray cluster.

The result of a job is in files, so an engine only calls a function for each job and reports which jobs failed because
their process died. A dead process costs its own job alone.
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
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from t2v.errors import UserError

Job = TypeVar("Job")


@runtime_checkable
class Engine(Protocol):
    """Runs jobs in several processes."""

    def __call__(self, function: Callable[[Job], None], jobs: deque[Job]) -> Iterator[tuple[Job, bool]]:
        """Call a function for each job.

        Args:
            function: A function of a module. Its exceptions are raised here.
            jobs: The jobs, taken from the left; the caller may append more while the engine runs.

        Yields:
            Each job when it ends, and whether it succeeded; False means that its process died.
        """
        ...


class _Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection
    """Sends jobs; receives None or an exception for each."""


@contextmanager
def processes(num_workers: int) -> Iterator[Engine]:
    """Start an engine of processes on this machine; they are killed when the context ends.

    Not pebble (5.2): there, a worker that is killed while idle breaks the whole pool, and workers outlive a killed
    command until their tasks end.

    Args:
        num_workers: Number of processes.
    """
    idle: list[_Worker] = []
    busy: dict[Connection, tuple[_Worker, Any]] = {}

    def run(function: Callable[[Job], None], jobs: deque[Job]) -> Iterator[tuple[Job, bool]]:
        while jobs or busy:
            while jobs and len(busy) < num_workers:
                worker = idle.pop() if idle else _start_worker()
                job = jobs.popleft()
                busy[worker.pipe] = worker, job
                with suppress(ConnectionError):  # if the worker died while idle, `recv` raises
                    worker.pipe.send((function, job))
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                worker, job = busy.pop(pipe)
                try:
                    error = pipe.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    yield job, False
                    continue
                idle.append(worker)
                if error is not None:
                    raise error
                yield job, True

    try:
        yield run
    finally:
        for worker in [*idle, *(worker for worker, _ in busy.values())]:
            worker.process.kill()
            worker.process.join()


@contextmanager
def ray_cluster(num_workers: int) -> Iterator[Engine]:
    """Start an engine on the Ray cluster at `RAY_ADDRESS`, or on a local Ray if that variable is not set.

    Args:
        num_workers: CPUs of a local Ray; on a cluster, all CPUs are used.

    Raises:
        UserError: If Ray is missing, or the cluster does not answer.
    """
    try:
        import ray
        from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError
    except ImportError as error:
        raise UserError('--engine ray needs Ray: run pip install -e ".[ray]".') from error

    def run(function: Callable[[Job], None], jobs: deque[Job]) -> Iterator[tuple[Job, bool]]:
        remote = ray.remote(num_cpus=1, max_retries=0)(function)
        max_busy = 2 * int(ray.cluster_resources().get("CPU", 1))  # the next job waits for each CPU
        busy: dict[Any, Job] = {}
        while jobs or busy:
            while jobs and len(busy) < max_busy:
                job = jobs.popleft()
                busy[remote.remote(job)] = job
            done, _ = ray.wait(list(busy))
            for task in done:
                job = busy.pop(task)
                try:
                    ray.get(task)
                except (NodeDiedError, OutOfMemoryError, WorkerCrashedError):
                    yield job, False
                except RayTaskError as error:
                    raise error.cause from error
                else:
                    yield job, True

    _connect_to_ray(num_workers)
    try:
        yield run
    finally:
        ray.shutdown()


def _connect_to_ray(num_workers: int) -> None:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        ray.init(address="local", num_cpus=num_workers, include_dashboard=False, **quiet)
        return
    root = Path(__file__).parents[2]
    try:
        ray.init(runtime_env={"py_modules": [str(root / "data"), str(root / "t2v")]}, **quiet)
    except ConnectionError as error:
        raise UserError(f"No Ray cluster answers at RAY_ADDRESS={address} ({error}): correct the address.") from error


def _start_worker() -> _Worker:
    pipe, worker_pipe = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_work, args=(worker_pipe,))
    process.start()
    worker_pipe.close()  # so that `recv` raises when the worker dies
    return _Worker(process, pipe)


def _work(pipe: Connection) -> None:
    """Run the jobs that arrive through a pipe, and answer each with None or an exception."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    while True:
        function, job = pipe.recv()
        try:
            function(job)
        except (UserError, OSError) as error:
            pipe.send(error)
        except Exception:
            pipe.send(RuntimeError(traceback.format_exc()))
        else:
            pipe.send(None)


def _exit_with_parent() -> None:
    """End this process when its parent ends, so that no worker outlives a command that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
