"""A callback that sends its own process a signal, for tests of stopping and resuming."""

import os
import signal

from lightning.pytorch import Callback, Trainer


class Killer(Callback):
    """Sends a signal in the middle of a step, after the gradients are computed and before they are applied.

    Args:
        step: Number of the step, from 0.
        name: Name of the signal.
        rank: Global rank of the process that receives it.
    """

    def __init__(self, step: int, name: str = "SIGKILL", rank: int = 0) -> None:
        self.step, self.name, self.rank = step, name, rank

    def on_before_optimizer_step(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.Signals[self.name])
