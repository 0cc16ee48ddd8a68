"""A callback that sends its own process a signal, for tests of stopping and resuming."""

import os
import signal
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Killer(Callback):
    """Sends a signal in the middle of a training step, after the gradients are computed and before they are applied.

    Outside of training it is sent before the first batch.

    Args:
        step: Number of the step, from 0.
        name: Name of the signal.
        rank: Global rank of the process that receives it.
        times: How often it is sent.
    """

    def __init__(self, step: int = 0, name: str = "SIGKILL", rank: int = 0, times: int = 1) -> None:
        self.step, self.name, self.rank, self.times = step, name, rank, times

    def on_before_optimizer_step(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            self._send()

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.state.fn == "validate":
            self._send()

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._send()

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._send()

    def _send(self) -> None:
        for _ in range(self.times):
            os.kill(os.getpid(), signal.Signals[self.name])
