"""Gradients accumulated over fewer batches than usual."""

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from t2v.errors import check_range


class AccumulationScale(Callback):
    """Makes the gradient of every step the mean over its batches, if ``accumulate_grad_batches`` is above 1.

    The last step of an epoch has fewer batches if their number is no multiple, and Lightning divides by the full number
    all the same.
    """

    def __init__(self) -> None:
        self._batches = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the range.

        Raises:
            UserError: If ``accumulate_grad_batches`` is below 1.
        """
        check_range("trainer", "[1, inf)", accumulate_grad_batches=trainer.accumulate_grad_batches)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the first batch."""
        self._batches = 0

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Count the batch."""
        self._batches += 1

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Scale the gradients, before they are clipped."""
        batches, self._batches = self._batches, 0
        if not pl_module.automatic_optimization or not 0 < batches < trainer.accumulate_grad_batches:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(trainer.accumulate_grad_batches / batches)
