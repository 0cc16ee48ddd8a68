"""The adversarial term: patch discriminators of frames and of clips, trained together with the VQ-VAE.

- Hinge loss (https://arxiv.org/abs/1705.02894) on patches (https://arxiv.org/abs/1611.07004), in 2D for sharpness and
  in 3D for motion.
- Generator and discriminators share one optimizer and one backward pass: the generator loss treats the discriminators'
  weights as constants, and the discriminator loss treats the reconstruction as a constant. Every training step updates
  both, and accumulation and precision work as without the term.
- The discriminators have their own betas, and their gradients are clipped separately, so that they do not change the
  step of the generator.
- The weight is adaptive: the term's gradient at the reconstruction is in proportion to that of the other terms (VQGAN
  does this at the last layer, https://arxiv.org/abs/2012.09841, and EnCodec at the output,
  https://arxiv.org/abs/2210.13438).
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from t2v.batch import Video
from t2v.errors import UserError, check_range


class AdversarialLoss(nn.Module):
    """Discriminators of frames and of clips, with the losses of generator and discriminators.

    Args:
        weight: Norm of the term's gradient at the reconstruction, as a fraction of that of all other terms.
        start_step: First training step that uses the term; before it, the reconstruction should become recognizable.
        channels: Channels of the discriminators' first layer, at least 4 and a multiple of 4.
        layers: Number of layers that halve the size, at least 1; a patch is about 2^(layers + 3) pixels wide.
        betas: Decay rates of Adam's moments for the discriminators, in [0, 1).

    Raises:
        UserError: If an argument is out of range.
    """

    def __init__(
        self,
        weight: float = 0.1,
        start_step: int = 0,
        channels: int = 64,
        layers: int = 3,
        betas: tuple[float, float] = (0.5, 0.9),
    ) -> None:
        super().__init__()
        check_range(self, "[0, inf)", weight=weight, start_step=start_step)
        check_range(self, "[4, inf)", channels=channels)
        check_range(self, "[1, inf)", layers=layers)
        if channels % 4:
            raise UserError(f"channels={channels} must be a multiple of 4 (AdversarialLoss).")
        check_range(self, "[0, 1)", betas=betas)
        self.weight, self.start_step, self.betas, self.layers = weight, start_step, betas, layers
        self.frames = PatchDiscriminator(2, channels, layers)
        self.clips = PatchDiscriminator(3, channels, layers)

    def check_size(self, pixels: int) -> None:
        """Check that frames are large enough for the layers.

        Args:
            pixels: Height and width of a frame.

        Raises:
            UserError: If they are not.
        """
        if pixels < 3 * 2**self.layers:  # three positions are left for the last two convolutions
            raise UserError(
                f"layers={self.layers} needs frames of at least {3 * 2**self.layers} pixels, but these have {pixels}: "
                "lower layers (AdversarialLoss)."
            )

    def generator_loss(self, reconstruction: Video, others: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Compute the generator's loss, with its adaptive weight.

        Args:
            reconstruction: RGB frames in [-1, 1], part of the graph of `others`.
            others: The sum of the other terms.
        """
        constants = {name: parameter.detach() for name, parameter in self.named_parameters()}
        loss = -torch.stack([logits.mean() for logits in functional_call(self, constants, (reconstruction,))]).mean()
        (others_gradient,) = torch.autograd.grad(others, reconstruction, retain_graph=True)
        (own_gradient,) = torch.autograd.grad(loss, reconstruction, retain_graph=True)
        ratio: Tensor = others_gradient.norm() / (own_gradient.norm() + 1e-8)
        return self.weight * ratio.clamp(max=1e4) * loss

    def discriminator_loss(self, reconstruction: Video, video: Video) -> Float[Tensor, ""]:
        """Compute the hinge loss of classifying originals and reconstructions."""
        terms = []
        for real, fake in zip(self(video), self(reconstruction.detach()), strict=True):
            terms.append(F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        return 0.5 * torch.stack(terms).mean()

    def forward(
        self, video: Video
    ) -> tuple[Float[Tensor, "n 1 h_frame w_frame"], Float[Tensor, "b 1 t_clip h_clip w_clip"]]:
        """Return the logits of patches of frames and of clips; above zero means original."""
        video = video.to(next(self.parameters()).dtype)
        return self.frames(video.flatten(0, 1)), self.clips(video.transpose(1, 2))

    def zero_loss(self) -> Float[Tensor, ""]:
        """Return zero with zero gradients for all parameters, which DDP needs in the steps before `start_step`."""
        return torch.stack([parameter.sum() for parameter in self.parameters()]).sum() * 0


class PatchDiscriminator(nn.Sequential):
    """Convolutions that halve height and width, with one logit per patch.

    Args:
        dimensions: 2 for frames (n, c, height, width), 3 for clips (b, c, t, height, width).
        channels: Channels of the first layer; they double with each layer, at most to eightfold.
        layers: Number of layers that halve the size.
    """

    def __init__(self, dimensions: int, channels: int, layers: int) -> None:
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        blocks: list[nn.Module] = [_convolution(dimensions, 3, widths[0], stride=2), nn.LeakyReLU(0.2)]
        for i in range(layers):
            stride = 2 if i < layers - 1 else 1
            blocks += [
                _convolution(dimensions, widths[i], widths[i + 1], stride),
                nn.GroupNorm(math.gcd(32, widths[i + 1] // 4), widths[i + 1]),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*blocks, _convolution(dimensions, widths[-1], 1, stride=1))


def _convolution(dimensions: int, channels_in: int, channels_out: int, stride: int) -> nn.Module:
    """Return a convolution of 4×4 pixels, in 3D of 3 frames too; only height and width are strided."""
    if dimensions == 2:
        return nn.Conv2d(channels_in, channels_out, 4, stride=stride, padding=1)
    return _ClipConvolution(channels_in, channels_out, (3, 4, 4), stride=(1, stride, stride), padding=(0, 1, 1))


class _ClipConvolution(nn.Conv3d):
    """A convolution with a frame of zeros before and after the clip.

    As `padding` of Conv3d, oneDNN's gradient of the weights is wrong in bfloat16 for clips of two frames (torch 2.14).
    """

    def forward(self, x: Float[Tensor, "b c t height width"]) -> Float[Tensor, "b c_out t h_out w_out"]:
        return super().forward(F.pad(x, (0, 0, 0, 0, 1, 1)))
