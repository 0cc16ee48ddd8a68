"""Small layers of the transformer: linear, RMSNorm, SwiGLU, the previous frame as an input, text convolution and gate.

Shapes: b batch, t frames, h w grid, n positions in raster order, l text tokens, d width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from t2v.autocast import without_autocast
from t2v.torch_private import onednn_linear


class RMSNorm(nn.RMSNorm):
    """RMS normalization (https://arxiv.org/abs/1910.07467), from any dtype to the same.

    CUDA's autocast would return float32, of which the backward pass would keep a copy; the kernels compute in float32
    in any case. On the CPU, PyTorch composes it of many operators, so training has its own backward pass there.

    Args:
        dim: Width of the input.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        with without_autocast(x):
            plain = x.is_cpu and not torch.compiler.is_compiling() and not isinstance(self.weight, DTensor)
            if plain and torch.is_grad_enabled():
                y: Tensor = _RMSNormFunction.apply(x, self.weight, self.eps)
                return y
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class _RMSNormFunction(torch.autograd.Function):
    """RMS normalization in float32 with few passes over the memory: two to three times as fast as `F.rms_norm`."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "*b d"], weight: Float[Tensor, " d"], eps: float) -> Float[Tensor, "*b d"]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        y: Tensor = (x * scale).mul_(weight).to(x.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Float[Tensor, "*b d"]) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        gradient = gradient.to(scale.dtype)
        product = (gradient * x).flatten(0, -2)
        with without_autocast(x):
            projection = (product @ weight.to(product.dtype)).view_as(scale)
            of_weight = scale.flatten() @ product
        projection = projection.mul_(scale.square()).div_(-x.shape[-1])
        of_x = (gradient * weight).addcmul_(x, projection).mul_(scale)
        return of_x.to(x.dtype), of_weight.to(weight.dtype), None


class Linear(nn.Linear):
    """Linear layer without bias, computed by `linear`.

    Args:
        in_dim: Width of the input.
        out_dim: Width of the output.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim, bias=False)

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        return linear(x, self.weight)


_HAS_ONEDNN = torch.backends.mkldnn.is_available()  # where `linear` asked, each call would end a compiled graph
_SUMMED_ROWS = 8
"""Rows up to which compiled sums of products are faster than a call of a library on a CPU."""
_FEW_ROWS, _LARGE_WEIGHT = 256, 2**18
"""Rows up to which, and elements of a weight from which on, oneDNN is at least as fast as `F.linear` on a CPU."""


def linear(x: Float[Tensor, "... d_in"], weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "... d_out"]:
    """Return `F.linear(x, weight)`, with fast paths for few float32 rows on the CPU, as in decoding.

    For one row PyTorch's product uses one core, and for 2 to 8 rows of a large weight it takes about twice the time of
    oneDNN (AMD EPYC). Compiled code computes up to eight rows itself, in one pass over the weights.
    """
    float32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    fast = x.is_cpu and float32 and not torch.is_grad_enabled()
    if fast and not isinstance(weight, DTensor):
        rows = x.numel() // weight.shape[1]
        if 0 < rows <= _SUMMED_ROWS and torch.compiler.is_compiling():
            each = stored(x.reshape(rows, -1)).unbind()
            return torch.stack([(weight * row).sum(dim=-1) for row in each]).view(*x.shape[:-1], -1)
        if _HAS_ONEDNN and (rows == 1 or (rows <= _FEW_ROWS and weight.numel() >= _LARGE_WEIGHT)):
            return onednn_linear(x, weight)
    return F.linear(x, weight)


def stored(x: Tensor) -> Tensor:
    """Return a copy that compiled code stores, in place of computing its elements anew wherever they are read.

    Inductor stores what `as_strided` reads, but ignores the offset of a view (torch 2.14); a copy has none. Code that
    is not compiled has stored it already, and gets it back.
    """
    if not torch.compiler.is_compiling():
        return x
    copy = x.clone(memory_format=torch.contiguous_format)
    return copy.as_strided(copy.shape, copy.stride())


def local_tensor(weight: Tensor) -> Tensor:
    """Return the local tensor of a replicated DTensor; return other tensors unchanged."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


class SwiGLU(nn.Module):
    """Gated feed-forward layer (https://arxiv.org/abs/2002.05202).

    The rows of gate and up projection are interleaved by group, so that tensor parallelism can split the matrix along
    groups.

    Args:
        dim: Width of input and output.
        hidden_dim: Hidden width.
        groups: Number of groups; must divide `hidden_dim`.
    """

    def __init__(self, dim: int, hidden_dim: int, groups: int) -> None:
        super().__init__()
        self.group_dim = hidden_dim // groups
        self.gate_up = Linear(dim, 2 * hidden_dim)
        self.out = Linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        gate_up = self.gate_up(x).unflatten(-1, (-1, 2, self.group_dim))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not isinstance(gate_up, DTensor):
            h = _SwiGLUFunction.apply(gate_up)
        else:  # compiled code is fused
            gate, up = gate_up.unbind(dim=-2)
            h = F.silu(gate) * up
        y: Tensor = self.out(h.flatten(-2))
        return y


class _SwiGLUFunction(torch.autograd.Function):
    """silu(gate) · up, whose backward pass writes both gradients where the projection reads them.

    PyTorch would keep silu(gate) for the backward pass and copy the gradients twice to put them side by side.
    """

    @staticmethod
    def forward(ctx: Any, gate_up: Float[Tensor, "*b groups 2 g"]) -> Float[Tensor, "*b groups g"]:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.unbind(dim=-2)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Float[Tensor, "*b groups g"]) -> Float[Tensor, "*b groups 2 g"]:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.unbind(dim=-2)
        of_gate_up = torch.empty_like(gate_up)
        of_gate, of_up = of_gate_up.unbind(dim=-2)
        torch.mul(gradient, F.silu(gate), out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return of_gate_up


class PreviousFrame(nn.Module):
    """Features of the previous frame around each position, an input of the first layer.

    A separate embedding of its tokens, then a depthwise 3×3 convolution. Most of a video changes little from frame to
    frame; learning that by attention alone takes the first hundreds of steps.

    Args:
        vocab_size: Size of the codebook.
        dim: Width of the model.
    """

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.mix = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)

    def forward(self, tokens: Int[Tensor, "b t h w"]) -> Float[Tensor, "b t n d"]:
        x = rearrange(self.embedding(tokens), "b t h w d -> (b t) d h w")
        y: Tensor = rearrange(self.mix(x), "(b t) d h w -> b t (h w) d", b=len(tokens))
        return y

    def at(self, tokens: Int[Tensor, "b n 9"], inside: Bool[Tensor, "b n 9"]) -> Float[Tensor, "b n d"]:
        """Return the features of single positions.

        Args:
            tokens: The 3×3 tokens of the previous frame around each position, row by row.
            inside: False beyond the edge of the frame.
        """
        weight = stored(local_tensor(self.mix.weight).flatten(1).t())
        x = self.embedding(stored(tokens))
        exact = torch.promote_types(x.dtype, torch.float32)
        y: Tensor = (x.to(exact) * weight.to(exact) * stored(inside)[..., None]).sum(dim=2)
        return y.to(x.dtype)


class TextConvolution(nn.Conv1d):
    """Depthwise convolution over the text tokens, which adds the words around a word to it.

    In "digit 3 is moving up and down and digit 7 is moving left and right", a position that attends to one digit then
    reads the motion of this digit there. Text encoders have the words around a word in directions of little variance,
    from which it is learned many times as slowly.

    Args:
        dim: Width of the text embeddings.
        kernel_size: Text tokens that are added up; odd.
    """

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False)

    def forward(self, text: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return super().forward(text.mT).mT


class TextGate(nn.Module):
    """Scale of text attention for each layer and head, as a function of the number of earlier frames in the window.

    A small network reads sines and cosines of that number (one to eight half periods over the window), which is
    constant from frame `window` - 1 on: the gates of a video do not depend on its length, and training clips of
    `window` frames show all of them. The scale is between 0 and 2 and is 1 at initialization.

    Args:
        layers: Number of layers.
        heads: Number of heads of a layer.
        window: Frames that a temporal layer attends to.
    """

    _FREQUENCIES = 4
    _HIDDEN_DIM = 64

    def __init__(self, layers: int, heads: int, window: int) -> None:
        super().__init__()
        self.layers, self.window = layers, window
        self.hidden = nn.Linear(2 * self._FREQUENCIES, self._HIDDEN_DIM)
        self.out = nn.Linear(self._HIDDEN_DIM, layers * heads)

    def forward(self, frame: Int[Tensor, " t"]) -> Float[Tensor, "layers t heads"]:
        """Return the scales at frames, which are counted from the first of the clip or video, 0."""
        context = frame.clamp(max=self.window - 1).float() / max(self.window - 1, 1)
        angle = torch.pi * context[:, None] * 2 ** torch.arange(self._FREQUENCIES, device=frame.device)
        features = torch.cat([angle.sin(), angle.cos()], dim=-1)
        with without_autocast(features):  # in bfloat16, frames of a long video would share a scale
            hidden = F.silu(_float32_linear(self.hidden, features))
            scale = 2 * _float32_linear(self.out, hidden).sigmoid()
        return rearrange(scale, "t (layers heads) -> layers t heads", layers=self.layers)


def _float32_linear(layer: nn.Linear, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
    return F.linear(x, local_tensor(layer.weight).float(), local_tensor(layer.bias).float())
