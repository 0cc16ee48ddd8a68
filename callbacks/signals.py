"""Stops a run when a signal asks for it."""

import os
import signal
import subprocess
import threading
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.checkpoint import save_last
from t2v.training.lightning_private import cluster_environment

STOPPED = 75
"""Exit status of a run that a signal stopped (`EX_TEMPFAIL`): the same command resumes it."""


class Stopped(SIGTERMException):
    """Ends the process after a signal.

    Rank zero exits with status 75 and the others with 0, because launchers kill all processes when one fails.

    Args:
        message: What happened, and how to resume.
        rank: Global rank of the process.
    """

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(0 if rank else STOPPED)
        self.message = message


class StopOnSignal(Callback):
    """Saves a checkpoint and stops at the end of the current step when any rank receives SIGTERM or SIGUSR1.

    Lightning alone also stops after a SIGTERM, but without saving. Under SLURM, if the plugin `SLURMEnvironment` has
    ``auto_requeue``, its ``requeue_signal`` requeues the job. Lightning would save inside the signal handler, in the
    middle of a step, and to a file that all runs of the same folder share; so the job is requeued here instead.
    """

    def __init__(self) -> None:
        self._received = 0
        self._step = -1

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers in place of Lightning's, which restores the original ones at the end."""
        if threading.current_thread() is threading.main_thread():
            requeue = _requeue_signal(trainer)
            for number in {signal.SIGTERM, signal.SIGUSR1, requeue or signal.SIGUSR1}:
                signal.signal(number, self._remember)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers in runs without a sanity check too."""
        self.on_sanity_check_start(trainer, pl_module)

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
        name = signal.Signals(received).name
        if received == _requeue_signal(trainer) and trainer.is_global_zero:
            _requeue()
        trainer.strategy.barrier("StopOnSignal")
        advice = (
            "the same command with --ckpt_path last resumes the run."
            if saved
            else "nothing was saved, because no ModelCheckpoint has save_last: true."
        )
        raise Stopped(f"Stopped by {name} at step {trainer.global_step}; {advice}", trainer.global_rank)

    def _remember(self, number: int, frame: FrameType | None) -> None:
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
