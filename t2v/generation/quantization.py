"""Quantized weights of the transformer, for generation only.

- "fp8" is e4m3 (https://arxiv.org/abs/2209.05433) and "int8" integers, both with a scale per output channel; "nf4" is
  4 bits with a scale per 64 weights (https://arxiv.org/abs/2305.14314), by bitsandbytes.
- The linear layers of the blocks are quantized. Embeddings (read a row per token), norms, gates and the input
  projections of the text are not: they are small. Neither is the output projection, which the probabilities come from.
- With "nf4" the first block and the key and value projections of the text, a few per cent of the weights, are in
  "int8": most of the effect of 4 bits on the probabilities comes from them.
- On the CPU, few rows (decoding) are multiplied with the stored values: `torch.compile` fuses conversion, product and
  sum, so that a step reads one byte per weight. For more rows (prefill) the weight of a layer is converted temporarily.
- torchao's layers are not used. With one float32 row and a weight of 9216×4096 (one core, AVX2, medians), its int8
  takes 2.6 times as long as ours uncompiled and 3.6 times compiled, its fp8 8.7 and 4.8 times. With a bfloat16 row its
  compiled int8 is faster (55 against 309 ms), the rest slower. Ours are faster than full weights only with AVX-512.
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

from t2v.autocast import to_autocast_type, without_autocast
from t2v.errors import UserError
from t2v.generation.compilation import compile_error
from t2v.transformer.model import VideoTransformer

Weights = Literal["full", "fp8", "int8", "nf4"]

_FEW_ROWS = 8
"""Up to this many rows, multiplying row by row is faster on the CPU than a matrix product."""


def convert(model: VideoTransformer, weights: str) -> None:
    """Quantize the weights of a model in place; it is then frozen, in eval mode, and can only generate.

    Args:
        model: The transformer, on any device, "meta" included.
        weights: Storage of the weights, one of `Weights`; "full" changes nothing.

    Raises:
        UserError: If `weights` is not known, the model is quantized already, or bitsandbytes is missing.
    """
    if weights == "full":
        return
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise UserError(f"The model's weights are quantized already: load it again to have them in {weights}.")
    if weights not in _LAYERS:
        raise UserError(f"weights={weights} is not known: choose full, {', '.join(_LAYERS)}.")
    for index, block in enumerate(model.blocks):
        for parent in list(block.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    sensitive = weights == "nf4" and (index == 0 or name == "key_value")
                    layer = Int8Linear if sensitive else _LAYERS[weights]
                    setattr(parent, name, layer(child.weight.detach()).eval())
    model.requires_grad_(False).eval()


def stored_bytes(model: nn.Module) -> int:
    """Return the memory of a model's weights, quantized or not, in bytes."""
    scales = [module.linear.weight.quant_state.absmax for module in model.modules() if isinstance(module, Nf4Linear)]
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *scales))


class QuantizedLinear(nn.Module, ABC):
    """Inference-only quantized linear layer without bias."""

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return the product, in the type of autocast where it is enabled, as for other linear layers."""
        x = to_autocast_type(x)
        with without_autocast(x):
            return self.multiply(x)

    @abstractmethod
    def multiply(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return the product in the type of `x`."""

    def train(self, mode: bool = True) -> "QuantizedLinear":
        """Set eval mode; refuse training mode."""
        if mode:
            raise UserError("Weights in fp8, int8 or nf4 cannot be trained: load the model with weights=full.")
        return super().train(mode)

    def _save_to_state_dict(self, *args: Any) -> None:
        raise UserError(
            "Weights in fp8, int8 or nf4 are not saved: export the model with weights=full, and quantize it when it "
            "is loaded."
        )


class ByteLinear(QuantizedLinear):
    """Linear layer with one byte per weight and a scale per output channel.

    Args:
        weight: The weight to quantize.
    """

    LARGEST: ClassVar[float]
    """Stored value of the largest weight of a channel."""
    stored: Int8[Tensor, "d_out d_in"]
    scale: Float[Tensor, " d_out"]

    def __init__(self, weight: Float[Tensor, "d_out d_in"]) -> None:
        super().__init__()
        scale = weight.float().abs().amax(dim=1) / self.LARGEST
        scale = scale.clamp(min=torch.finfo(scale.dtype).tiny)  # for channels of zeros
        self.register_buffer("stored", self.quantize(weight.float() / scale[:, None]))
        self.register_buffer("scale", scale)

    def multiply(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        if x.is_cpu and x.numel() <= _FEW_ROWS * x.shape[-1]:
            rows = x.reshape(-1, x.shape[-1]).float().unbind(0)
            y = torch.stack([_run(self.multiply_row, self.stored, self.scale, row) for row in rows])
            return y.to(x.dtype).view(*x.shape[:-1], -1)
        return F.linear(x, self.weight().to(x.dtype))

    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """Return the weight in float32."""
        return _run(self.dequantize, self.stored, self.scale)

    @staticmethod
    @abstractmethod
    def quantize(weight: Float[Tensor, "d_out d_in"]) -> Int8[Tensor, "d_out d_in"]:
        """Return the bytes of a weight in [-LARGEST, LARGEST]."""

    @staticmethod
    @abstractmethod
    def to_float(stored: Int8[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        """Return the values of bytes."""

    @classmethod
    def dequantize(
        cls, stored: Int8[Tensor, "d_out d_in"], scale: Float[Tensor, " d_out"]
    ) -> Float[Tensor, "d_out d_in"]:
        """Return the weight in float32."""
        return cls.to_float(stored) * scale[:, None]

    @classmethod
    def multiply_row(
        cls, stored: Int8[Tensor, "d_out d_in"], scale: Float[Tensor, " d_out"], x: Float[Tensor, " d_in"]
    ) -> Float[Tensor, " d_out"]:
        """Return the product of the weight and one row."""
        return (cls.to_float(stored) * x).sum(dim=-1) * scale


class Fp8Linear(ByteLinear):
    """Linear layer with weights in e4m3: a sign, 4 bits of exponent, 3 of mantissa."""

    LARGEST = 448.0

    @staticmethod
    def quantize(weight: Float[Tensor, "d_out d_in"]) -> Int8[Tensor, "d_out d_in"]:
        return weight.to(torch.float8_e4m3fn).view(torch.int8)

    @staticmethod
    def to_float(stored: Int8[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        return e4m3_to_float(stored)


class Int8Linear(ByteLinear):
    """Linear layer with integer weights from -127 to 127."""

    LARGEST = 127.0

    @staticmethod
    def quantize(weight: Float[Tensor, "d_out d_in"]) -> Int8[Tensor, "d_out d_in"]:
        return weight.round().to(torch.int8)

    @staticmethod
    def to_float(stored: Int8[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        return stored.float()


class Nf4Linear(QuantizedLinear):
    """Linear layer with half a byte per weight, stored and multiplied by `bitsandbytes`.

    Args:
        weight: The weight to quantize.
    """

    linear: Any

    def __init__(self, weight: Float[Tensor, "d_out d_in"]) -> None:
        super().__init__()
        try:
            from bitsandbytes.functional import quantize_4bit
            from bitsandbytes.nn.modules import Linear4bit, Params4bit
        except ImportError as error:
            raise UserError(
                f"weights=nf4 needs bitsandbytes, which cannot be imported ({error}): run pip install -e "
                '".[quantized]", or choose fp8 or int8.'
            ) from error
        d_out, d_in = weight.shape
        stored, state = quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=False)
        linear: Any = Linear4bit  # untyped
        self.linear = linear(d_in, d_out, False, compress_statistics=False, quant_type="nf4", device="meta")
        self.linear.weight = Params4bit(
            stored,
            quant_state=state,
            compress_statistics=False,
            quant_type="nf4",
            bnb_quantized=True,
            module=self.linear,
        )
        if d_out % 32 or d_in % 64:  # sizes that its fastest CPU kernel requires without checking
            self.linear.support_avx512bf16_for_cpu = False
        self._pack()

    def multiply(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        y: Tensor = self.linear(x)
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Nf4Linear":
        self.linear.state_dict()  # restores the order of weights that other devices use
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._pack()
        return self

    def _pack(self) -> None:
        """Bring the weights into the order for CPUs. The first call would do it too, but not under `torch.compile`."""
        if self.linear.weight.is_cpu:
            self.linear.eval()(torch.zeros(1, self.linear.in_features))
            self.linear.compute_type_is_set = False


_LAYERS: dict[str, Callable[[Tensor], QuantizedLinear]] = {"fp8": Fp8Linear, "int8": Int8Linear, "nf4": Nf4Linear}


def e4m3_to_float(stored: Int8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the values of finite e4m3 numbers, by shifts that `torch.compile` vectorizes.

    Sign, exponent and mantissa are moved to their places in float32, whose exponent has a bias of 127 instead of 7.
    """
    return ((stored.to(torch.int32) << 20) & -0x78000001).view(torch.float32) * 2.0**120


def _run(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """Call a function compiled, on the CPU and if it is not being compiled as part of another."""
    if not arguments[0].is_cpu or torch.compiler.is_compiling() or not _can_compile():
        return function(*arguments)
    return _compiled(function)(*arguments)


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the function compiled for all sizes."""
    return torch.compile(function, dynamic=True)


@cache
def _can_compile() -> bool:
    """Return whether `torch.compile` works, and warn if it does not."""
    error = compile_error()
    if error is not None:
        warnings.warn(
            f"Weights in fp8 and int8 are slow here, since torch.compile fails ({error}): install a C++ compiler.",
            stacklevel=2,
        )
    return error is None
