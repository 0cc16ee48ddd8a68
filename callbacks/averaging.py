"""A moving average of the weights, which validation, prediction and exports use."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging


class EMA(EMAWeightAveraging):
    """Lightning's `EMAWeightAveraging` for runs that go on.

    - Checkpoints hold the average as their weights, and what training continues with beside it. Lightning puts the
      average into the model when training ends, and a checkpoint written then would have lost the other.
    - Buffers are taken over as they are: a codebook is an average already, and half-way between the old and the new
      place of a restarted code there is nothing.

    Args:
        decay: Of the average, in (0, 1); it looks back about 1 / (1 − decay) steps.
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__(decay=decay, use_buffers=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the model as it is trained."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Continue the average in `fit`; elsewhere the checkpoint's weights are the average."""
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
