"""A moving average of the weights, which validation, prediction and exports use."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from t2v.torch_private import is_persistent
from t2v.training.lightning_private import average_of, start_average


class EMA(EMAWeightAveraging):
    """Lightning's `EMAWeightAveraging` for runs that go on.

    - Checkpoints hold the average as their weights, and what training continues with beside it. Lightning puts the
      average into the model when training ends, and a checkpoint written then would have lost the other.
    - Buffers are taken over as they are: a codebook is an average already, and half-way between the old and the new
      place of a restarted code there is nothing.
    - The average is in float32 even if the weights are in bfloat16, in which steps of 1 − decay would round to nothing.
    - Of a sharded model every rank averages its share.

    Args:
        decay: Of the average, in (0, 1); it looks back about 1 / (1 − decay) steps.
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__(decay=decay, use_buffers=False)
        self._exact: list[tuple[Tensor, Tensor]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin the average; Lightning's own way copies the model whole."""
        if stage == "fit" and pl_module.device_mesh is not None:
            pl_module.configure_model()
            start_average(self, _weights(pl_module))
        else:
            super().setup(trainer, pl_module, stage)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average into the model."""
        _reshard(pl_module)
        if (average := average_of(self)) is not None:
            pairs = zip(average.module.parameters(), pl_module.parameters(), strict=True)
            self._exact = [(mean, mean.detach().clone()) for mean, weight in pairs if mean.dtype != weight.dtype]
        super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put back what is trained."""
        _reshard(pl_module)
        super().on_validation_epoch_end(trainer, pl_module)
        for mean, exact in self._exact:  # which the model could hold in its own type only
            mean.data.copy_(exact)
        self._exact = []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the model as it is trained."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Continue the average in `fit`; elsewhere the checkpoint's weights are the average."""
        if average_of(self) is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


def _weights(module: nn.Module) -> nn.Module:
    """Modules with copies of a module's weights under the same names, and nothing else: sharded ones have no copies."""
    copy = nn.Module()
    for name, parameter in module.named_parameters(recurse=False):
        mean = parameter.detach().to(torch.float32, copy=True)
        copy.register_parameter(name, nn.Parameter(mean, parameter.requires_grad))
    for name, buffer in module.named_buffers(recurse=False):
        copy.register_buffer(name, buffer.clone(), persistent=is_persistent(module, name))
    for name, child in module.named_children():
        copy.add_module(name, _weights(child))
    return copy


def _reshard(module: nn.Module) -> None:
    """Let go of gathered weights, which would hide that others take their place."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
