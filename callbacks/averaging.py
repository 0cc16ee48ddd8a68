"""A moving average (EMA) of the weights, used by validation, prediction and exports."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from t2v.errors import check_range
from t2v.torch_private import is_persistent
from t2v.training.lightning_private import average_of, start_average


class EMA(EMAWeightAveraging):
    """Lightning's `EMAWeightAveraging`, for runs that are resumed and for sharded models.

    - Checkpoints contain the average as their weights, and the trained weights in addition. Lightning replaces the
      trained weights by the average when training ends; a checkpoint saved after that would lack them.
    - Buffers are copied, not averaged: a codebook is a moving average already, and the mean of a code before and after
      a restart is not a useful code.
    - The average is in float32 even if the weights are in bfloat16, in which steps of 1 − decay would round to zero.
    - In a sharded model, every rank averages its own part.

    Args:
        decay: Decay of the average, in (0, 1); it averages over about 1 / (1 − decay) steps.

    Raises:
        UserError: If the decay is out of range.
    """

    def __init__(self, decay: float = 0.999) -> None:
        check_range(self, "(0, 1)", decay=decay)
        super().__init__(decay=decay, use_buffers=False)
        self._exact: list[tuple[Tensor, Tensor]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the average; that of a sharded model has copies of its parts only, where Lightning copies it all."""
        if stage == "fit" and pl_module.device_mesh is not None:
            pl_module.configure_model()
            start_average(self, _copy_weights(pl_module))
        else:
            super().setup(trainer, pl_module, stage)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exchange the trained weights for the average."""
        _reshard(pl_module)
        if (average := average_of(self)) is not None:
            pairs = zip(average.module.parameters(), pl_module.parameters(), strict=True)
            self._exact = [(mean, mean.detach().clone()) for mean, weight in pairs if mean.dtype != weight.dtype]
        super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exchange the average for the trained weights."""
        _reshard(pl_module)
        super().on_validation_epoch_end(trainer, pl_module)
        for mean, exact in self._exact:  # the model rounded it to the dtype of its weights
            mean.data.copy_(exact)
        self._exact = []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """No-op; Lightning would replace the trained weights by the average."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Resume the average in `fit`; otherwise the weights of the checkpoint are the average."""
        if average_of(self) is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


def _copy_weights(module: nn.Module) -> nn.Module:
    """Return a tree of modules with float32 copies of all parameters, under the same names, and copies of buffers.

    Sharded modules cannot be copied themselves.
    """
    copy = nn.Module()
    for name, parameter in module.named_parameters(recurse=False):
        mean = parameter.detach().to(torch.float32, copy=True)
        copy.register_parameter(name, nn.Parameter(mean, parameter.requires_grad))
    for name, buffer in module.named_buffers(recurse=False):
        copy.register_buffer(name, buffer.clone(), persistent=is_persistent(module, name))
    for name, child in module.named_children():
        copy.add_module(name, _copy_weights(child))
    return copy


def _reshard(module: nn.Module) -> None:
    """Free gathered weights, which would otherwise be used in place of the exchanged ones."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
