"""The adversarial term: patch discriminators of frames and of clips, trained beside the VQ-VAE.

- Hinge loss (https://arxiv.org/abs/1705.02894) on patches (https://arxiv.org/abs/1611.07004), in 2D for
  sharpness and in 3D for motion.
- Both sides share one optimizer and one backward pass: the generator's term sees the discriminators' weights as
  constants, the discriminators' term sees the reconstruction as one. So a step of training is a step of both, and
  gradient clipping, accumulation and precision work as without the term.
- The term's weight adapts, so that its gradient at the reconstruction is in proportion to that of the other terms
  (as VQGAN does at the last layer, https://arxiv.org/abs/2012.09841, and EnCodec at the output,
  https://arxiv.org/abs/2210.13438).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from t2v.losses.term import Video


class AdversarialLoss(nn.Module):
    """Discriminators of frames and of clips, and both sides' terms.

    Attributes:
        start_step: the first training step it counts in.
    """

    def __init__(self, weight: float = 0.1, start_step: int = 0, channels: int = 64, layers: int = 3):
        """
        Args:
            weight: gradient of the term at the reconstruction, as a share of all other terms' gradient.
            start_step: first training step it counts in; before it the reconstruction is not worth judging.
            channels: width of the discriminators' first layer.
            layers: layers that each halve the size; a patch is about 2^(layers + 3) pixels wide.
        """
        super().__init__()
        self.weight, self.start_step = weight, start_step
        self.frames = PatchDiscriminator(2, channels, layers)
        self.clips = PatchDiscriminator(3, channels, layers)

    def generator_loss(self, reconstruction: Video, others: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """How much the discriminators doubt the reconstruction, weighted.

        Args:
            reconstruction: in [-1, 1], part of the graph of `others`.
            others: the sum of the other terms, which the weight goes by.
        """
        constants = {name: parameter.detach() for name, parameter in self.named_parameters()}
        loss = -torch.stack([logits.mean() for logits in functional_call(self, constants, (reconstruction,))]).mean()
        wanted, own = (
            torch.autograd.grad(term, reconstruction, retain_graph=True)[0].norm() for term in (others, loss)
        )
        return self.weight * (wanted / (own + 1e-8)).clamp(max=1e4) * loss

    def discriminator_loss(self, reconstruction: Video, video: Video) -> Float[Tensor, ""]:
        """Hinge loss of telling footage from its reconstruction."""
        pairs = zip(self(video), self(reconstruction.detach()), strict=True)
        return 0.5 * torch.stack([F.relu(1 - real).mean() + F.relu(1 + fake).mean() for real, fake in pairs]).mean()

    def forward(self, video: Video) -> tuple[Tensor, Tensor]:
        """Logits of patches of frames and of clips: above zero for footage."""
        return self.frames(video.flatten(0, 1)), self.clips(video.transpose(1, 2))

    def idle(self) -> Float[Tensor, ""]:
        """Zero, with zero gradients for all parameters, which distributed training expects before the first step."""
        return torch.stack([parameter.sum() for parameter in self.parameters()]).sum() * 0


class PatchDiscriminator(nn.Sequential):
    """Convolutions that halve height and width, and one logit a patch."""

    def __init__(self, dimensions: int, channels: int, layers: int):
        """
        Args:
            dimensions: 2 for frames (n, c, h, w), 3 for clips (b, c, t, h, w).
            channels: width of the first layer; it doubles up to eightfold.
            layers: number of halvings.
        """
        conv: Any = nn.Conv2d if dimensions == 2 else nn.Conv3d

        def convolution(before: int, after: int, stride: int) -> nn.Module:
            kernel, strides = (3, 4, 4)[-dimensions:], (1, stride, stride)[-dimensions:]
            return conv(before, after, kernel, stride=strides, padding=1)

        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        blocks: list[nn.Module] = [convolution(3, widths[0], 2), nn.LeakyReLU(0.2)]
        for i in range(layers):
            stride = 2 if i < layers - 1 else 1
            blocks += [
                convolution(widths[i], widths[i + 1], stride),
                nn.GroupNorm(min(32, widths[i + 1] // 4), widths[i + 1]),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*blocks, convolution(widths[-1], 1, 1))
