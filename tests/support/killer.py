"""A callback that sends its own process a signal, for tests of stopping and resuming."""

import os
import signal

from lightning.pytorch import Callback, Trainer


class Killer(Callback):
    """Signals the process in the middle of a step, after its gradients are computed and before they are applied.

    Args:
        step: number of the step, from 0.
        name: the signal.
        rank: of the process, where there are several.
    """

    def __init__(self, step: int, name: str = "SIGKILL", rank: int = 0) -> None:
        self.step, self.name, self.rank = step, name, rank

    def on_before_optimizer_step(self, trainer: Trainer, *_) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.Signals[self.name])
