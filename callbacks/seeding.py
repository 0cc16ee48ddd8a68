"""Random numbers that do not depend on earlier steps."""

import os
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class StepSeed(Callback):
    """Seeds torch before every training step, from the run's seed, the epoch, the step and the data-parallel rank.

    Caption dropout, corruption and restarted codes then draw the same numbers in a resumed run as in an uninterrupted
    one, and are not changed by validation, logging or generation in between. Does nothing without
    ``seed_everything``.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the step."""
        if seed := os.environ.get("PL_GLOBAL_SEED"):
            dp_rank = (trainer.distributed_sampler_kwargs or {"rank": 0})["rank"]
            entropy = (int(seed), trainer.current_epoch, batch_idx, dp_rank)
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
