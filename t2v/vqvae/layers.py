"""The layers of the VQ-VAE: spatial residual blocks and causal mixing over time."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels at every place alone.

    Statistics over the whole frame, as group normalisation takes them, would tell every token what the rest of the
    frame shows: the tokens of a plain background would change with the object in front of it, and stage 2 would have
    to predict that.
    """

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x.movedim(1, -1), self.normalized_shape, weight, bias, self.eps).movedim(-1, 1)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), frame by frame; a 1×1 convolution carries x to a new width."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int = 3):
        super().__init__()
        padding = kernel_size // 2
        self.norm1 = ChannelNorm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, kernel_size, padding=padding)
        self.norm2 = ChannelNorm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, kernel_size, padding=padding)
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h w"]:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class Downsample(nn.Conv2d):
    """Halves height and width by a 3×3 convolution."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2, padding=1)


class Upsample(nn.Upsample):
    """Doubles height and width by repeating pixels; the residual block that follows smooths them."""

    def __init__(self, channels: int):
        super().__init__(scale_factor=2.0, mode="nearest")


class CausalTemporalBlock(nn.Module):
    """x + conv(silu(norm(x))) over time at every place of the grid; a frame sees itself and the frames before it.

    Before the first frame stand zeros. What the next frame needs of the past is the `state` that `forward` returns, so
    a clip can be decoded in pieces of any length with the same result as whole.
    """

    def __init__(self, channels: int, kernel_size: int = 3):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv = nn.Conv1d(channels, channels, kernel_size)
        for parameter in self.conv.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self, x: Float[Tensor, "b t c h w"], state: Float[Tensor, "b k c h w"] | None = None
    ) -> tuple[Float[Tensor, "b t c h w"], Float[Tensor, "b k c h w"]]:
        b, _, c, height, width = x.shape
        past = self.conv.kernel_size[0] - 1
        if state is None:
            state = x.new_zeros(b, past, c, height, width)
        h = F.silu(self.norm(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        h = torch.cat([state.to(h.dtype), h], dim=1)
        state = h[:, h.shape[1] - past :]
        h = self.conv(rearrange(h, "b t c h w -> (b h w) c t"))
        return x + rearrange(h, "(b h w) c t -> b t c h w", b=b, h=height), state
