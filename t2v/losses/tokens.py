"""The loss of predicted tokens, with its gradient in the memory of the logits.

Logits over thousands of codes are the largest tensor of a training step. Going over them a few rows at a time, once,
and leaving the gradient where they were saves the copies that cross-entropy makes of all of them.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

_ROWS = 128
"""Rows at a time; their copies in float32 stay in the cache."""


class TokenLoss(NamedTuple):
    """What `token_loss` returns; only the objective has a gradient."""

    objective: Float[Tensor, ""]
    """What training minimises."""
    cross_entropy: Float[Tensor, ""]
    """In nats a token, without smoothing."""
    z_loss: Float[Tensor, ""]
    """Mean square of log Z, where Z is the sum that softmax divides by; without its weight."""
    accuracy: Float[Tensor, ""]
    """Share of tokens that the most probable code hits."""


def token_loss(
    logits: Float[Tensor, "... v"], tokens: Int[Tensor, "..."], label_smoothing: float = 0.0, z_loss: float = 0.0
) -> TokenLoss:
    """Cross-entropy with label smoothing plus `z_loss` · log² Z (https://arxiv.org/abs/2204.02311), in float32.

    Args:
        logits: used up where a gradient is asked for: their memory then holds it.
        tokens: the codes to predict.
        label_smoothing: share of a target that is spread over all codes evenly.
        z_loss: weight of the square of log Z.
    """
    return TokenLoss(*_Loss.apply(logits.flatten(0, -2), tokens.flatten(), label_smoothing, z_loss))


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, tokens: Tensor, smoothing: float, z_weight: float) -> tuple[Tensor, ...]:
        sums = torch.zeros(4, device=logits.device)
        for rows, codes in zip(logits.split(_ROWS), tokens[:, None].split(_ROWS), strict=True):
            x = rows.float()
            log_p = x.log_softmax(dim=-1)
            found = log_p.gather(-1, codes)
            log_z = x.gather(-1, codes) - found
            entropy, z_loss = -found.sum(), log_z.square().sum()
            smoothed = (1 - smoothing) * entropy - smoothing * log_p.mean(-1).sum() if smoothing else entropy
            hits = (log_p.argmax(-1, keepdim=True) == codes).sum()
            sums += torch.stack([smoothed + z_weight * z_loss, entropy, z_loss, hits.float()])
            if ctx.needs_input_grad[0]:
                gradient = log_p.exp_()
                if z_weight:
                    gradient *= 1 + 2 * z_weight * log_z
                gradient -= smoothing / logits.shape[-1]
                gradient.scatter_add_(-1, codes, torch.full_like(found, smoothing - 1))
                rows.copy_(gradient)
        ctx.save_for_backward(logits)
        objective, *others = sums / len(logits)
        ctx.mark_non_differentiable(*others)
        return objective, *others

    @staticmethod
    def backward(ctx, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (of_sum,) = ctx.saved_tensors
        return of_sum.mul_(gradient / len(of_sum)), None, None, None
