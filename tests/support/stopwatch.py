"""A callback that measures the time of training steps on a GPU."""

import time

import torch
from lightning.pytorch import Callback


class Stopwatch(Callback):
    """Measures the steps after the first `SKIPPED`, in which layers are compiled."""

    SKIPPED = 4

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step in (self.SKIPPED, trainer.max_steps):
            torch.cuda.synchronize()
            if trainer.global_step == self.SKIPPED:
                self.start = time.perf_counter()
            else:
                self.seconds = (time.perf_counter() - self.start) / (trainer.max_steps - self.SKIPPED)
