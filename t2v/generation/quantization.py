"""Quantized weights of the transformer, for generation only.

- "fp8" is e4m3 (https://arxiv.org/abs/2209.05433) and "int8" integers, both with a scale per output channel; "nf4" is
  4 bits with a scale per 64 weights (https://arxiv.org/abs/2305.14314), by bitsandbytes.
- The linear layers of the blocks are quantized. Embeddings (read a row per token), norms, gates and the input
  projections of the text are not: they are small. Neither is the output projection, which the probabilities come from.
- With "nf4" the first block and the key and value projections of the text, a few per cent of the weights, are in
  "int8": most of the effect of 4 bits on the probabilities comes from them.
- Few rows (decoding) are multiplied with the stored values: `torch.compile` fuses conversion, product and sum, so that
  a step reads one byte per weight. For more rows (prefill) the weight of a layer is converted temporarily; on GPUs to
  the type of the rows, with the scale applied to the product: with bfloat16, five bytes read and written per weight.
- The tests read the kernel that `torch.compile` generates for a GPU, and count the bytes of a step. On an H100 fp8
  weights halve the memory of 8 B parameters, but their conversion takes longer than reading (docs/benchmarks/gpu.md).
- torchao's layers are not used. On GPUs its int8 and fp8 layers with 16-bit inputs have no kernel of their own: they
  convert the weight before each product. On the CPU, with one float32 row and a weight of 9216×4096 (one core, AVX2,
  medians), its int8 takes 2.6 times as long as ours uncompiled and 3.6 times compiled, its fp8 8.7 and 4.8 times. With
  a bfloat16 row its compiled int8 is faster (55 against 309 ms), the rest slower. Ours are faster than full weights
  only with AVX-512.
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
from t2v.compilation import compile_error
from t2v.errors import UserError
from t2v.torch_private import configure_compiler
from t2v.transformer.model import VideoTransformer

Weights = Literal["full", "fp8", "int8", "nf4"]

_FEW_ROWS = 8
"""Up to this many rows are multiplied with the stored values; for more, a matrix product is faster on the CPU."""


def convert(model: VideoTransformer, weights: str, device: torch.device | None = None) -> None:
    """Quantize the weights of a model in place; it is then frozen, in eval mode, and can only generate.

    Args:
        model: The transformer, on any device, "meta" included.
        weights: Storage of the weights, one of `Weights`; "full" changes nothing.
        device: Where the quantized weights are put, one layer at a time; by default they stay where they are.

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
                    setattr(parent, name, layer(child.weight.detach().to(device)).eval())
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
    """Linear layer with one byte per weight and a scale per output channel, which stays in float32.

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
        few = x.numel() <= _FEW_ROWS * x.shape[-1]
        if x.is_cpu and few:
            rows = x.reshape(-1, x.shape[-1]).float().unbind(0)
            y = torch.stack([_run(self.multiply_row, self.stored, self.scale, row) for row in rows])
        elif x.is_cpu:
            y = F.linear(x, self.weight().to(x.dtype))
        elif few and can_fuse(x.device):
            y = _run(self.multiply_rows, self.stored, self.scale, x.reshape(-1, x.shape[-1]))
        else:
            y = self.multiply_converted(x)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def multiply_converted(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return the product in float32, with a temporary copy of the weight in the type of `x`."""
        product = F.linear(x / 128, self.to_type(self.stored, x.dtype))  # divided, so that float16 does not overflow
        return product * (128 * self.scale)

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

    @staticmethod
    @abstractmethod
    def to_type(stored: Int8[Tensor, "d_out d_in"], dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
        """Return the values of bytes in a type of 16 bits or more, by one operation of PyTorch."""

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

    @classmethod
    def multiply_rows(
        cls, stored: Int8[Tensor, "d_out d_in"], scale: Float[Tensor, " d_out"], x: Float[Tensor, "n d_in"]
    ) -> Float[Tensor, "n d_out"]:
        """Return the products of the weight and each row; compiled, all are sums of one kernel over the weight."""
        return torch.stack([cls.multiply_row(stored, scale, row.float()) for row in x.unbind(0)])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ByteLinear":
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scale = scale.to(self.scale.device)
        return self


class Fp8Linear(ByteLinear):
    """Linear layer with weights in e4m3: a sign, 4 bits of exponent, 3 of mantissa."""

    LARGEST = 448.0

    @staticmethod
    def quantize(weight: Float[Tensor, "d_out d_in"]) -> Int8[Tensor, "d_out d_in"]:
        return weight.to(torch.float8_e4m3fn).view(torch.int8)

    @staticmethod
    def to_float(stored: Int8[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        return e4m3_to_float(stored)

    @staticmethod
    def to_type(stored: Int8[Tensor, "d_out d_in"], dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
        return stored.view(torch.float8_e4m3fn).to(dtype)


class Int8Linear(ByteLinear):
    """Linear layer with integer weights from -127 to 127."""

    LARGEST = 127.0

    @staticmethod
    def quantize(weight: Float[Tensor, "d_out d_in"]) -> Int8[Tensor, "d_out d_in"]:
        return weight.round().to(torch.int8)

    @staticmethod
    def to_float(stored: Int8[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        return stored.float()

    @staticmethod
    def to_type(stored: Int8[Tensor, "d_out d_in"], dtype: torch.dtype) -> Float[Tensor, "d_out d_in"]:
        return stored.to(dtype)


class Nf4Linear(QuantizedLinear):
    """Linear layer with half a byte per weight, stored and multiplied by `bitsandbytes`.

    Args:
        weight: The weight to quantize.

    Attributes:
        ends_graph: `torch.compile` cannot compile the layer as a part of its model, but in parts of its own.
    """

    ends_graph = True
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

    Sign, exponent and mantissa are moved to where float32 has them, whose exponent has a bias of 127 instead of 7.
    """
    return ((stored.to(torch.int32) << 20) & -0x78000001).view(torch.float32) * 2.0**120


def can_fuse(device: torch.device) -> bool:
    """Return whether products with few rows run as one compiled kernel on a device."""
    return torch.compiler.is_compiling() or (device.type != "meta" and _can_compile(device.type))


def _run(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """Call a function compiled, if it works on the device and if it is not being compiled as part of another."""
    device = arguments[0].device.type
    if device == "meta" or torch.compiler.is_compiling() or not _can_compile(device):
        return function(*arguments)
    return _compiled(function)(*arguments)


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the function compiled for all sizes, and for each number of rows and type."""
    configure_compiler(64)
    return torch.compile(function, dynamic=True)


@cache
def _can_compile(device: str) -> bool:
    """Return whether `torch.compile` works on a type of device, and warn if it does not."""
    error = compile_error(device)
    if error is not None:
        warnings.warn(
            f"Weights in fp8 and int8 are slow here, since torch.compile fails ({error}): install a C++ compiler"
            f"{'' if device == 'cpu' else ' and Triton'}.",
            stacklevel=2,
        )
    return error is None
