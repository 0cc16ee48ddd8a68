"""Codebook usage over an epoch."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric


class CodebookUsage(Metric):
    """Codebook usage and perplexity, from counts over all batches and ranks.

    `usage` is the fraction of codes that occur; `perplexity` is the exponential of the entropy of the code frequencies,
    from 1 to the codebook size. A mean of values per batch would depend on the batch size.

    Args:
        codebook_size: Number of codes.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(codebook_size, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, tokens: Int[Tensor, "*shape"]) -> None:
        """Count tokens, each in [0, codebook_size)."""
        self.counts += torch.bincount(tokens.flatten(), minlength=len(self.counts))

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Return `usage` and `perplexity`."""
        return {"usage": (self.counts > 0).float().mean(), "perplexity": _perplexity(self.counts)}

    def collapse(self) -> str:
        """Return a warning if hardly any codes are used, of those that so many tokens could use; else an empty string.

        Hardly any are fewer than 10 %, or a perplexity below 2 %, without the most frequent code, which may be that of
        a plain background; or that code alone is 99 % of the tokens.
        """
        size, tokens, used = len(self.counts), int(self.counts.sum()), int((self.counts > 0).sum())
        possible, perplexity = min(size, tokens), float(self.compute()["perplexity"])
        others = self.counts.scatter(0, self.counts.argmax(0, keepdim=True), 0)
        varied = float(_perplexity(others)) > 0.02 * possible and int(others.sum()) > 0.01 * tokens
        if possible < 2 or (used > max(1, 0.1 * possible) and varied):
            return ""
        return (
            f"The codebook has collapsed: {tokens} tokens use {used} of {size} codes (perplexity {perplexity:.3g}). "
            "Lower the learning rate, train longer before model.quantize_from_step, or give a VectorQuantizer a higher "
            "restart_below, so that it restarts unused codes."
        )


def _perplexity(counts: Int[Tensor, " k"]) -> Float[Tensor, ""]:
    """Return the exponential of the entropy of the frequencies; 1 without counts."""
    frequencies = counts.double() / counts.sum().clamp(min=1)
    return torch.exp(torch.special.entr(frequencies).sum()).float()
