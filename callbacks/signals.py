"""Stops a run when a signal asks for it."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.checkpoint import save_last
from t2v.training.lightning_private import cluster_environment

STOPPED = 75
"""Exit status of a training run that a signal stopped (`EX_TEMPFAIL`): the same command resumes it."""
INTERRUPTED = 128 + signal.SIGINT
"""Exit status of a command that Ctrl-C stopped."""


class Stopped(SIGTERMException):
    """Ends the process after a signal.

    Of a training run, rank zero exits with status 75, or 130 after Ctrl-C, and the others with 0, because launchers
    kill all processes when one fails. Other commands exit with 128 and the number of the signal.

    Args:
        message: What happened, and how to resume.
        code: Exit status.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(code)
        self.message = message


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Raise `Stopped` when SIGTERM or Ctrl-C arrives, so that files are closed and there is no traceback."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(f"Stopped by {_name(number)}.", 128 + number)


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class StopOnSignal(Callback):
    """Stops training at the end of the current step when any rank receives SIGTERM, SIGUSR1 or Ctrl-C, and saves it.

    - A second Ctrl-C, or one before the first step, stops at once.
    - `validate`, `test` and `predict` stop at once. Lightning would ignore the signal.
    - Under SLURM, if the plugin `SLURMEnvironment` has ``auto_requeue``, its ``requeue_signal`` requeues the job.
      Lightning would save inside the signal handler, in the middle of a step, and to a file that all runs of the same
      folder share; so the job is requeued here instead.
    """

    def __init__(self) -> None:
        self._received = 0
        self._step = -1
        self._process = os.getpid()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers in place of Lightning's, which restores the original ones at the end."""
        if threading.current_thread() is threading.main_thread():
            requeue = _requeue_signal(trainer)
            for number in {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, requeue or signal.SIGUSR1}:
                signal.signal(number, self._remember)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers in runs without a sanity check too."""
        self._step, self._process = -1, os.getpid()
        self.on_sanity_check_start(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop `validate` at once."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.on_predict_start(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop `test` at once."""
        self.on_predict_start(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop `predict` at once."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, _stop)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the step; with gradient accumulation it has several batches."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop after a complete step if any rank received a signal.

        Raises:
            Stopped: If any rank received a signal.
        """
        if trainer.global_step == self._step:
            return
        received = self._received
        if trainer.world_size > 1:
            on_device = torch.tensor(received, device=trainer.strategy.root_device)
            received = int(trainer.strategy.reduce(on_device, reduce_op="max"))
        if not received:
            return
        saved = save_last(trainer)
        if received == _requeue_signal(trainer) and trainer.is_global_zero:
            _requeue()
        trainer.strategy.barrier("StopOnSignal")
        advice = (
            "the same command with --ckpt_path last resumes the run."
            if saved
            else "nothing was saved, because no ModelCheckpoint has save_last: true."
        )
        code = INTERRUPTED if received == signal.SIGINT else STOPPED
        message = f"Stopped by {_name(received)} at step {trainer.global_step}; {advice}"
        raise Stopped(message, 0 if trainer.global_rank else code)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker of a DataLoader, which the main process ends
            return
        if number == signal.SIGINT and (self._step < 0 or self._received == number):
            _stop(number, frame)
        if number == signal.SIGINT:
            os.write(2, b"\nStopping after this step; Ctrl-C again stops at once, without saving it.\n")
        self._received = number


def _requeue_signal(trainer: Trainer) -> int | None:
    """Return the signal after which the job is requeued, or None."""
    environment = cluster_environment(trainer)
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    return environment.requeue_signal


def _requeue() -> None:
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        rank_zero_warn(f"`scontrol requeue {job}` failed, so the job is not requeued: {done.stderr.strip()}")
