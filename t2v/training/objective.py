"""The training objective of stage 2: regularization of its inputs, and the options of its loss."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from t2v.errors import check_range
from t2v.losses.tokens import TokenLoss, token_loss_


@dataclass(frozen=True)
class TokenObjective:
    """The options of the cross-entropy that the transformer is trained with.

    Args:
        caption_dropout: Fraction of training clips that are trained without their caption, in [0, 1]. Classifier-free
            guidance needs it above 0.
        corruption: Fraction of input tokens that are replaced by uniformly random codes, in [0, 1); the targets stay
            unchanged. Makes long videos drift less.
        label_smoothing: Fraction of each target that is distributed evenly over all codes, in [0, 1).
        z_loss: Weight of log² Z, where Z is the softmax denominator; keeps the logits small
            (https://arxiv.org/abs/2204.02311).

    Raises:
        UserError: If a value is out of its range.
    """

    caption_dropout: float = 0.1
    corruption: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        check_range("objective", "[0, 1]", caption_dropout=self.caption_dropout)
        check_range("objective", "[0, 1)", corruption=self.corruption, label_smoothing=self.label_smoothing)
        check_range("objective", "[0, inf)", z_loss=self.z_loss)

    def dropped_captions(self, clips: int, device: torch.device) -> Bool[Tensor, " b"]:
        """Draw the clips that are trained without their caption.

        Args:
            clips: Batch size.
            device: Device of the result.
        """
        return torch.rand(clips, device=device) < self.caption_dropout

    def corrupt(self, tokens: Int[Tensor, "b t h w"], vocab_size: int) -> Int[Tensor, "b t h w"]:
        """Replace the fraction `corruption` of the tokens by uniformly random ones.

        Args:
            tokens: Not modified.
            vocab_size: Number of codes.
        """
        if not self.corruption:
            return tokens
        replaced = torch.rand(tokens.shape, device=tokens.device) < self.corruption
        return torch.where(replaced, torch.randint_like(tokens, vocab_size), tokens)

    def loss(self, logits: Float[Tensor, "b t h w v"], tokens: Int[Tensor, "b t h w"]) -> TokenLoss:
        """Compute the loss; in place: logits that require a gradient are overwritten by it.

        Args:
            logits: Predictions of the transformer.
            tokens: The uncorrupted targets.
        """
        return token_loss_(logits, tokens, self.label_smoothing, self.z_loss)
