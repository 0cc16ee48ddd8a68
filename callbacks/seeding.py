"""Random numbers that do not depend on what happened before."""

import os
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class StepSeed(Callback):
    """Seeds torch before every training step, from the run's seed, the epoch, the step and whose clips it takes.

    Caption dropout, corruption and restarted codes then draw the same numbers in a resumed run as in one that was never
    stopped, and no validation, logging or generation in between changes them. A run without ``seed_everything`` is left
    alone.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the step that begins."""
        if seed := os.environ.get("PL_GLOBAL_SEED"):
            share = (trainer.distributed_sampler_kwargs or {"rank": 0})["rank"]
            place = (int(seed), trainer.current_epoch, batch_idx, share)
            torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))
