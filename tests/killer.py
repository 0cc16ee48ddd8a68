"""A callback that kills its own process, for tests of resuming."""

import os
import signal

from lightning.pytorch import Callback, Trainer


class Killer(Callback):
    """Kills the process in the middle of a step, after its gradients are computed and before they are applied.

    Args:
        step: number of the step, from 0.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: Trainer, *_) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
