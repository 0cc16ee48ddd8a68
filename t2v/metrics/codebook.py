"""How much of a codebook is in use, over a whole epoch."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric


class CodebookUsage(Metric):
    """Counts codes over all batches and ranks; a mean over batches would depend on the batch size.

    `compute` returns `usage`, the share of the codes seen at least once, and `perplexity`, the exponential of the
    entropy of their distribution (from 1 to the size of the codebook).
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, codebook_size: int):
        """
        Args:
            codebook_size: number of codes.
        """
        super().__init__()
        self.add_state("counts", torch.zeros(codebook_size, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, tokens: Int[Tensor, "..."]) -> None:
        """Counts tokens in [0, codebook_size)."""
        self.counts += torch.bincount(tokens.flatten(), minlength=len(self.counts))

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """The share of codes in use and the perplexity."""
        shares = self.counts / self.counts.sum().clamp(min=1)
        return {
            "usage": (self.counts > 0).float().mean(),
            "perplexity": torch.exp(torch.special.entr(shares).sum()),
        }
