"""Parameter groups and the learning-rate schedule that both stages share, and Muon beside AdamW."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
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

    A head tied to an embedding is the embedding. The first group holds the hidden layers' matrices: weights of `Linear`
    in a `ModuleList`.
    """
    embeddings = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    stacks = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    linear = {id(m.weight) for stack in stacks for m in stack.modules() if isinstance(m, nn.Linear)}
    hidden: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in network.parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and id(parameter) not in embeddings
            (hidden if id(parameter) in linear else decayed if decays else kept).append(parameter)
    return [{"params": hidden, "hidden": True}, {"params": decayed}, {"params": kept, "weight_decay": 0.0}]


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the hidden layers' matrices, AdamW for everything else.

    Both are torch's own. Muon makes the update of a matrix nearly orthogonal; it is scaled to the size of AdamW's
    (https://arxiv.org/abs/2502.16982), so that one learning rate and one weight decay serve both. Muon is
    https://kellerjordan.github.io/posts/muon.

    Args:
        params: groups as `parameter_groups` makes them.
        lr: learning rate.
        betas: of AdamW.
        momentum: of Muon, in [0, 1).
        weight_decay: of the groups that decay.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        hidden, others = ([group for group in params if group.get("hidden", False) == which] for which in (True, False))
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(hidden, lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr, betas=betas, weight_decay=weight_decay),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of both."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Let both work on the groups and the state that schedules and checkpoints see."""
        for part, which in zip(self.parts, (True, False), strict=True):
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if group.get("hidden", False) == which]


def configure_optimization(
    module: LightningModule, network: nn.Module, optimizer: OptimizerCallable, warmup_steps: int
) -> OptimizerLRScheduler:
    """What `configure_optimizers` returns: `parameter_groups`, and `warmup_cosine` over the whole run."""
    built = optimizer(parameter_groups(network))
    if type(built).__module__.startswith("bitsandbytes"):
        # It does so itself in its first step; then a resumed run, whose weights are channels-last again, would differ.
        network.to(memory_format=torch.contiguous_format)
    total_steps = int(module.trainer.estimated_stepping_batches)
    schedule = LambdaLR(built, partial(warmup_cosine, warmup_steps=warmup_steps, total_steps=total_steps))
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
