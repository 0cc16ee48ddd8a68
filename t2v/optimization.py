"""Parameter groups and the learning-rate schedule that both stages share."""

import math
from functools import partial

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(step: int, warmup_steps: int, total_steps: int, floor: float = 0.02) -> float:
    """Share of the full learning rate at `step`: linear warm-up, then half a cosine down to `floor`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def configure_optimization(
    module: LightningModule, network: nn.Module, optimizer: OptimizerCallable, warmup_steps: int
) -> OptimizerLRScheduler:
    """What `configure_optimizers` returns: no weight decay on vectors, and `warmup_cosine` over the whole run."""
    trained = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    built = optimizer(groups)
    total_steps = int(module.trainer.estimated_stepping_batches)
    schedule = LambdaLR(built, partial(warmup_cosine, warmup_steps=warmup_steps, total_steps=total_steps))
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
