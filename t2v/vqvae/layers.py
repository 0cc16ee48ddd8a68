"""Layers of the VQ-VAE: spatial residual blocks, resizing, and causal blocks over time."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from t2v.autocast import without_autocast


class ChannelNorm(nn.LayerNorm):
    """Layer normalization over the channels, separately at every position.

    Group normalization would compute its statistics over the whole frame, so every token would depend on the entire
    frame: the tokens of a plain background would change with the object in front of it, which makes them harder for
    stage 2 to predict.

    Args:
        channels: Number of channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with without_autocast(x):  # it would return float32
            return F.layer_norm(x.movedim(1, -1), self.normalized_shape, weight, bias, self.eps).movedim(-1, 1)


class ResBlock(nn.Module):
    """Residual block on single frames: x + conv(silu(norm(conv(silu(norm(x)))))).

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output; a 1×1 convolution on the skip connection changes the number if needed.
        kernel_size: Height and width of the convolutions, odd.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int = 3) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.norm1 = ChannelNorm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, kernel_size, padding=padding)
        self.norm2 = ChannelNorm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, kernel_size, padding=padding)
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Float[Tensor, "n c_in h w"]) -> Float[Tensor, "n c_out h w"]:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        output: Tensor = hidden + self.skip(x)
        return output


class Downsample(nn.Conv2d):
    """Convolution of 3×3 with stride 2, which halves height and width.

    Args:
        channels: Number of channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=1)


class Upsample(nn.Upsample):
    """Nearest-neighbour upsampling, which doubles height and width; a residual block should follow it.

    Args:
        channels: Not used; `Downsample` takes the same argument.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(scale_factor=2.0, mode="nearest")

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h_out w_out"]:
        with without_autocast(x):  # it would return float32
            output: Tensor = super().forward(x)
        return output


class CausalTemporalBlock(nn.Module):
    """Residual block over time at every grid position: x + conv(silu(norm(x))).

    A frame depends on itself and on earlier frames; zeros are padded before the first frame. `forward` returns a
    `state` with the frames that the next call needs, so a clip can be processed in pieces of any length with the same
    result as at once. The block starts as the identity, because the weights of its convolution start at zero.

    Args:
        channels: Number of channels.
        kernel_size: Frames that the convolution covers.
    """

    def __init__(self, channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv = nn.Conv1d(channels, channels, kernel_size)
        for parameter in self.conv.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self, x: Float[Tensor, "b t c h w"], state: Float[Tensor, "b past c h w"] | None = None
    ) -> tuple[Float[Tensor, "b t c h w"], Float[Tensor, "b past c h w"]]:
        """Process the next frames.

        Args:
            x: The frames.
            state: The state returned for the frames before these; None at the start of a clip.

        Returns:
            The output, and the state for the frames that follow; it covers `kernel_size` - 1 frames.
        """
        b, t, c, h, w = x.shape
        past = self.conv.kernel_size[0] - 1
        if state is None:
            state = x.new_zeros(b, past, c, h, w)
        hidden = rearrange(F.silu(self.norm(x.flatten(0, 1))), "(b t) c h w -> b t c h w", b=b)
        hidden = torch.cat([state.to(hidden.dtype), hidden], dim=1)
        new_state = hidden[:, t:]
        residual = self.conv(rearrange(hidden, "b t c h w -> (b h w) c t"))
        return x + rearrange(residual, "(b h w) c t -> b t c h w", b=b, h=h), new_state
