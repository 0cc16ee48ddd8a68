"""Parameter groups and the learning-rate schedule that both stages share."""

import math
from functools import partial
from typing import Any

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


def parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Every trained parameter once: matrices and kernels decay; embeddings, norms, biases and other vectors do not.

    A head tied to an embedding is the embedding.
    """
    embeddings = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in network.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 and id(parameter) not in embeddings else kept).append(parameter)
    return [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]


def configure_optimization(
    module: LightningModule, network: nn.Module, optimizer: OptimizerCallable, warmup_steps: int
) -> OptimizerLRScheduler:
    """What `configure_optimizers` returns: `parameter_groups`, and `warmup_cosine` over the whole run."""
    built = optimizer(parameter_groups(network))
    total_steps = int(module.trainer.estimated_stepping_batches)
    schedule = LambdaLR(built, partial(warmup_cosine, warmup_steps=warmup_steps, total_steps=total_steps))
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
