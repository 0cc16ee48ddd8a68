"""Weights of fewer bits for generation.

- "fp8" is e4m3 (https://arxiv.org/abs/2209.05433), "int8" are whole numbers, both with a scale per output channel;
  "nf4" is four bits and a scale for 64 weights (https://arxiv.org/abs/2305.14314), by bitsandbytes.
- The linear layers of the blocks are converted. Embeddings are looked up, a row a token; norms, gates and the text's
  entrance are small; the head stays, for it is what the probabilities come from.
- With "nf4" the first block and what reads the text, a few per cent of all weights, are kept in "int8": most of what
  four bits do to the probabilities comes from there.
- On the CPU a few rows, as in decoding, are multiplied with the codes as they lie: torch.compile fuses unpacking,
  product and sum, so that a step reads a byte a weight. More rows, as in prefill, meet the weights of a layer in full,
  which are forgotten again.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor, nn

from t2v.errors import UserError
from t2v.generation.compilation import compile_error
from t2v.transformer.model import VideoTransformer

Weights = Literal["full", "fp8", "int8", "nf4"]

_FEW = 8
"""Up to so many rows, multiplying row by row on the CPU beats a product of matrices."""


def convert(model: VideoTransformer, weights: Weights) -> None:
    """Stores the weights of a model in fewer bits, in place; it is then frozen, in eval mode, and for generation alone.

    Args:
        model: the transformer, on any device, "meta" included.
        weights: "full" leaves everything as it is.

    Raises:
        UserError: if there are no such weights, the model is converted already, or bitsandbytes is missing.
    """
    if weights == "full":
        return
    if any(isinstance(module, CompactLinear) for module in model.modules()):
        raise UserError(f"The model's weights are converted already: load it again to have them in {weights}.")
    if weights not in _KINDS:
        raise UserError(f"weights={weights} is not known: choose full, {', '.join(_KINDS)}.")
    for index, block in enumerate(model.blocks):
        for parent in list(block.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    sensitive = weights == "nf4" and (index == 0 or name == "key_value")
                    linear = Int8Linear if sensitive else _KINDS[weights]
                    setattr(parent, name, linear(child.weight.detach()).eval())
    model.requires_grad_(False).eval()


def stored_bytes(model: nn.Module) -> int:
    """Memory that a model's weights take, converted or not."""
    scales = [module.linear.weight.quant_state.absmax for module in model.modules() if isinstance(module, Nf4Linear)]
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *scales))


class CompactLinear(nn.Module):
    """A linear layer without bias, from whose weights there is no way back."""

    def train(self, mode: bool = True) -> "CompactLinear":
        if mode:
            raise UserError("Weights in fp8, int8 or nf4 cannot be trained: load the model with weights=full.")
        return super().train(mode)

    def _save_to_state_dict(self, *args: Any) -> None:
        raise UserError(
            "Weights in fp8, int8 or nf4 are not saved: export the model with weights=full, and convert it when it is "
            "loaded."
        )


class ByteLinear(CompactLinear, ABC):
    """A byte a weight, and a scale per output channel."""

    LARGEST: ClassVar[float]
    """The code of the largest weight of a channel."""
    codes: Int8[Tensor, "e d"]
    scale: Float[Tensor, " e"]

    def __init__(self, weight: Float[Tensor, "e d"]):
        super().__init__()
        scale = weight.float().abs().amax(dim=1) / self.LARGEST
        scale = scale.clamp(min=torch.finfo(scale.dtype).tiny)  # of channels of zeros
        self.register_buffer("codes", self.encode(weight.float() / scale[:, None]))
        self.register_buffer("scale", scale)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... e"]:
        if x.is_cpu and x.numel() <= _FEW * x.shape[-1]:
            rows = x.reshape(-1, x.shape[-1]).float().unbind(0)
            y = torch.stack([_run(self.product, self.codes, self.scale, row) for row in rows])
            return y.to(x.dtype).view(*x.shape[:-1], -1)
        return F.linear(x, _run(self.restore, self.codes, self.scale).to(x.dtype))

    @staticmethod
    @abstractmethod
    def encode(weight: Float[Tensor, "e d"]) -> Int8[Tensor, "e d"]:
        """The codes of scaled weights."""

    @staticmethod
    @abstractmethod
    def restore(codes: Int8[Tensor, "e d"], scale: Float[Tensor, " e"]) -> Float[Tensor, "e d"]:
        """The weights in full."""

    @staticmethod
    @abstractmethod
    def product(codes: Int8[Tensor, "e d"], scale: Float[Tensor, " e"], x: Float[Tensor, " d"]) -> Float[Tensor, " e"]:
        """The weights by one row."""


class Fp8Linear(ByteLinear):
    """Weights in e4m3: sign, four bits of exponent, three of mantissa."""

    LARGEST = 448.0

    @staticmethod
    def encode(weight: Float[Tensor, "e d"]) -> Int8[Tensor, "e d"]:
        return weight.to(torch.float8_e4m3fn).view(torch.int8)

    @staticmethod
    def restore(codes: Int8[Tensor, "e d"], scale: Float[Tensor, " e"]) -> Float[Tensor, "e d"]:
        return from_e4m3(codes) * scale[:, None]

    @staticmethod
    def product(codes: Int8[Tensor, "e d"], scale: Float[Tensor, " e"], x: Float[Tensor, " d"]) -> Float[Tensor, " e"]:
        return (from_e4m3(codes) * x).sum(dim=-1) * scale


class Int8Linear(ByteLinear):
    """Weights from -127 to 127."""

    LARGEST = 127.0

    @staticmethod
    def encode(weight: Float[Tensor, "e d"]) -> Int8[Tensor, "e d"]:
        return weight.round().to(torch.int8)

    @staticmethod
    def restore(codes: Int8[Tensor, "e d"], scale: Float[Tensor, " e"]) -> Float[Tensor, "e d"]:
        return codes.float() * scale[:, None]

    @staticmethod
    def product(codes: Int8[Tensor, "e d"], scale: Float[Tensor, " e"], x: Float[Tensor, " d"]) -> Float[Tensor, " e"]:
        return (codes.float() * x).sum(dim=-1) * scale


class Nf4Linear(CompactLinear):
    """Half a byte a weight, as `bitsandbytes` stores and multiplies it."""

    linear: Any

    def __init__(self, weight: Float[Tensor, "e d"]):
        super().__init__()
        try:
            from bitsandbytes.functional import quantize_4bit
            from bitsandbytes.nn import Linear4bit, Params4bit
        except ImportError as error:
            raise UserError(
                f"weights=nf4 needs bitsandbytes, which cannot be imported ({error}): install it, or choose fp8 or "
                "int8."
            ) from error
        out_dim, in_dim = weight.shape
        codes, state = quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=False)
        self.linear = Linear4bit(in_dim, out_dim, False, compress_statistics=False, quant_type="nf4", device="meta")
        self.linear.weight = Params4bit(
            codes,
            quant_state=state,
            compress_statistics=False,
            quant_type="nf4",
            bnb_quantized=True,
            module=self.linear,
        )
        if out_dim % 32 or in_dim % 64:  # which its fastest kernel for CPUs takes for granted
            self.linear.support_avx512bf16_for_cpu = False
        self._pack()

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... e"]:
        return self.linear(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Nf4Linear":
        self.linear.state_dict()  # undoes the order for CPUs
        super()._apply(fn, recurse)
        self._pack()
        return self

    def _pack(self) -> None:
        """Brings the codes into the order for CPUs, as the first call would: too late where torch.compile makes it."""
        if self.linear.weight.is_cpu:
            self.linear.eval()(torch.zeros(1, self.linear.in_features))
            self.linear.compute_type_is_set = False


_KINDS: dict[str, Callable[[Tensor], CompactLinear]] = {"fp8": Fp8Linear, "int8": Int8Linear, "nf4": Nf4Linear}


def from_e4m3(codes: Int8[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The numbers that finite e4m3 codes stand for, by shifts that torch.compile turns into vector instructions.

    Sign, exponent and mantissa go where float32 has them; it counts its exponents from 127 instead of 7.
    """
    return ((codes.to(torch.int32) << 20) & -0x78000001).view(torch.float32) * 2.0**120


def _run(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """Calls the function as machine code on the CPU, where it is not being compiled with all else."""
    if not arguments[0].is_cpu or torch.compiler.is_compiling() or not _can_compile():
        return function(*arguments)
    return _compiled(function)(*arguments)


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function as machine code, for all sizes."""
    return torch.compile(function, dynamic=True)


@cache
def _can_compile() -> bool:
    """Whether torch.compile works here; says so where it does not."""
    if (error := compile_error()) is not None:
        warnings.warn(
            f"Weights in fp8 and int8 are slow here, since torch.compile fails ({error}): install a C++ compiler.",
            stacklevel=2,
        )
    return error is None
