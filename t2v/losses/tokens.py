"""The loss of the transformer, with the gradient computed in the memory of the logits.

Logits over thousands of codes are the largest tensor of a training step. `torch.nn.functional.cross_entropy` makes
several copies of them; here they are processed once, a few rows at a time, and overwritten by their gradient.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

_CPU_ROWS = 128
"""Rows processed at a time; their float32 copies fit in a CPU's cache."""
_GPU_ROWS = 1024
"""As many on a GPU: a kernel for 1,024 rows of 16,384 codes moves about 100 MB, which takes longer than its start."""


class TokenLoss(NamedTuple):
    """The terms of `token_loss_`; only the objective has a gradient."""

    objective: Float[Tensor, ""]
    """The value that training minimizes."""
    cross_entropy: Float[Tensor, ""]
    """In nats per token, without label smoothing."""
    z_loss: Float[Tensor, ""]
    """Mean of log² Z, where Z is the softmax denominator; without its weight."""
    accuracy: Float[Tensor, ""]
    """Fraction of tokens that are the most probable code."""


def token_loss_(
    logits: Float[Tensor, "*shape v"], tokens: Int[Tensor, "*shape"], label_smoothing: float = 0.0, z_loss: float = 0.0
) -> TokenLoss:
    """Compute the loss in float32; in place: logits that require a gradient are overwritten by it.

    The loss is the cross-entropy with label smoothing plus `z_loss` · log² Z (https://arxiv.org/abs/2204.02311).

    Args:
        logits: Predictions. If they require a gradient, give a copy if they are read afterwards.
        tokens: The targets.
        label_smoothing: Fraction of each target that is distributed evenly over all codes.
        z_loss: Weight of log² Z.
    """
    return TokenLoss(*_TokenLossFunction.apply(logits.flatten(0, -2), tokens.flatten(), label_smoothing, z_loss))


class _TokenLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Float[Tensor, "n v"], tokens: Int[Tensor, " n"], smoothing: float, z_weight: float
    ) -> tuple[Tensor, ...]:
        sums = torch.zeros(4, device=logits.device, dtype=torch.float32)
        size = _CPU_ROWS if logits.is_cpu else _GPU_ROWS
        parts = list(zip(logits.split(size), tokens[:, None].split(size), strict=True))
        if logits.is_meta:  # only memory is measured, and the parts between take no more
            parts = [*parts[:2], *parts[2:][-1:]]
        for rows, targets in parts:
            x = rows.float()
            log_p = x.log_softmax(dim=-1)
            target_log_p = log_p.gather(-1, targets)
            log_z = x.gather(-1, targets) - target_log_p
            cross_entropy, z_loss = -target_log_p.sum(), log_z.square().sum()
            smoothed = cross_entropy
            if smoothing:
                smoothed = (1 - smoothing) * cross_entropy - smoothing * log_p.mean(-1).sum()
            hits = (log_p.max(-1, keepdim=True).indices == targets).sum()  # on the CPU twice as fast as argmax
            sums += torch.stack([smoothed + z_weight * z_loss, cross_entropy, z_loss, hits.float()])
            if ctx.needs_input_grad[0]:
                gradient = log_p.exp_()
                if z_weight:
                    gradient *= 1 + 2 * z_weight * log_z
                gradient -= smoothing / logits.shape[-1]
                gradient.scatter_add_(-1, targets, torch.full_like(target_log_p, smoothing - 1))
                rows.copy_(gradient)
        ctx.save_for_backward(logits)
        objective, *others = sums / len(logits)
        ctx.mark_non_differentiable(*others)
        return objective, *others

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, ""], *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_of_sum,) = ctx.saved_tensors
        return gradient_of_sum.mul_(gradient / len(gradient_of_sum)), None, None, None
