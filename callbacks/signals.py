"""Signals that ask a run to stop."""

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
"""Exit status of a run that a signal stopped (`EX_TEMPFAIL`): the same command goes on."""


class Stopped(SIGTERMException):
    """Ends the process after a signal.

    The first rank exits with status 75, the others with 0: those who start processes kill the rest when one fails.
    """

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(0 if rank else STOPPED)
        self.message = message


class StopOnSignal(Callback):
    """Saves and stops at the end of the running step when a SIGTERM or SIGUSR1 comes, on whichever rank.

    Lightning too stops at the next batch after a SIGTERM, but saves nothing. Under SLURM, where its plugin
    `SLURMEnvironment` says so (``auto_requeue``), the plugin's ``requeue_signal`` has the job start again. Lightning
    would save within the signal's handler, in the middle of a step, and to a file that every run of the same folder
    takes for its own; so the job is handed back here.
    """

    def __init__(self) -> None:
        self._received = 0
        self._step = -1

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals from Lightning, which restores them in the end."""
        if threading.current_thread() is threading.main_thread():
            again = _requeue_signal(trainer)
            for number in {signal.SIGTERM, signal.SIGUSR1, again or signal.SIGUSR1}:
                signal.signal(number, self._note)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, in runs that validate nothing before."""
        self.on_sanity_check_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note where the step begins: it may take several batches."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after a step if any rank has been told to."""
        if trainer.global_step == self._step:
            return
        received = self._received
        if trainer.world_size > 1:
            mine = torch.tensor(received, device=trainer.strategy.root_device)
            received = int(trainer.strategy.reduce(mine, reduce_op="max"))
        if not received:
            return
        saved = save_last(trainer)
        name = signal.Signals(received).name
        if received == _requeue_signal(trainer) and trainer.is_global_zero:
            _requeue()
        trainer.strategy.barrier("StopOnSignal")
        then = (
            "the same command with --ckpt_path last goes on."
            if saved
            else "nothing is saved, since no ModelCheckpoint has save_last: true."
        )
        raise Stopped(f"Stopped by {name} at step {trainer.global_step}; {then}", trainer.global_rank)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number


def _requeue_signal(trainer: Trainer) -> int | None:
    """The signal after which the job shall start again, if there is one."""
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
        rank_zero_warn(f"`scontrol requeue {job}` failed, so the job does not start again: {done.stderr.strip()}")
