"""Training in FP8: the large matrix products in 8 bits, everything else in bfloat16.

- Weights, gradients and the optimizer's state stay in float32; their names, shapes and types are those of a model
  without FP8, so that checkpoints fit both ways.
- A product's operands are scaled into the range of e4m3 (gradients, where one scale serves a whole tensor: e5m2) each
  time anew, from their largest value; there is no history to keep (https://arxiv.org/abs/2209.05433).
- Where the device has no FP8, operands are rounded just so and multiplied in float32: slower, with the same numerics.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Literal

import torch
from jaxtyping import Float
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.float8_linear import Float8Linear

from t2v.errors import UserError

LAYERS = (
    "blocks.*.attention.query_key_value",
    "blocks.*.attention.out",
    "blocks.*.text_attention.query",
    "blocks.*.text_attention.out",
    "blocks.*.mlp.gate_up",
    "blocks.*.mlp.out",
)
"""The transformer's products but for the head and what reads the text, whose rows are few."""


class Float8Precision(MixedPrecision):
    """Precision plugin: linear layers compute in FP8, the rest in bfloat16, weights stay in float32.

    It takes the place of `trainer.precision`, which must not be given beside it.
    """

    def __init__(
        self,
        recipe: Literal["tensorwise", "rowwise"] = "tensorwise",
        layers: tuple[str, ...] = LAYERS,
    ):
        """
        Args:
            recipe: one scale for a tensor, which is fastest, or one for each of its rows, which is more exact.
            layers: names of the linear layers to convert, as patterns (`*` is any text); they begin below the model.

        Raises:
            UserError: where there is no such recipe.
        """
        super().__init__("bf16-mixed", "cuda" if torch.cuda.is_available() else "cpu")
        if recipe not in ("tensorwise", "rowwise"):
            raise UserError(f"recipe={recipe} of Float8Precision must be tensorwise or rowwise.")
        self.recipe, self.layers = recipe, tuple(layers)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Converts the layers in place; a module that is converted already stays as it is.

        Lightning calls it when a run begins; `configure_model` does so itself before it shards the weights.

        Raises:
            UserError: where a pattern names no linear layer, no layer can be converted, or the weights are sharded.
        """
        network, device = _network(module), _device(module)
        self.device = device.type
        if any(isinstance(part, Float8Linear) for part in network.modules()):
            return module
        if any(isinstance(part, FSDPModule) for part in network.modules()):
            raise UserError(
                f"{type(module).__name__} is sharded, and Float8Precision comes too late to convert its layers: call "
                "self.trainer.precision_plugin.convert_module(self) in configure_model before fully_shard."
            )
        chosen, left = self._choose(network)
        if not chosen:
            raise UserError(
                f"Float8Precision can convert no layer of {type(network).__name__}"
                + (f" (left out: {'; '.join(_grouped(left))})" if left else "")
                + ", so FP8 would change nothing: take `trainer.precision: bf16-mixed` instead."
            )
        emulated = not has_float8(device)
        # The rows of a batch need not be a multiple of 16; the kernels want that of the gradients' product.
        config = replace(Float8LinearConfig.from_recipe_name(self.recipe), emulate=emulated, pad_inner_dim=True)
        convert_to_float8_training(network, module_filter_fn=lambda _, name: name in chosen, config=config)
        for name in chosen:
            network.set_submodule(name, AutocastFloat8Linear.from_float(network.get_submodule(name), config))
        how = f"emulated in float32, as {device.type} has no FP8" if emulated else f"on {device.type}"
        _tell(f"{self.recipe}, {how}", [*_grouped(chosen), *(f"left in bfloat16: {line}" for line in _grouped(left))])
        return module

    def _choose(self, network: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
        """Names of the layers to convert, with their sizes; and of those that cannot be, with the reason."""
        linear = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
        chosen, left = {}, {}
        for pattern in self.layers:
            if not any(fnmatchcase(name, pattern) for name in linear):
                there = ", ".join(sorted({_pattern(name) for name in linear})) or "none"
                raise UserError(
                    f"Float8Precision shall convert the layers '{pattern}', but {type(network).__name__} has no such "
                    f"linear layer: its own are {there}; change `layers`, or take `trainer.precision: bf16-mixed`."
                )
        for name, layer in linear.items():
            if not any(fnmatchcase(name, pattern) for pattern in self.layers):
                continue
            rows, columns = layer.weight.shape
            if name == "head":
                left[name] = "its weight is read elsewhere than in the layer"
            elif rows % 16 or columns % 16:
                left[name] = f"{rows}×{columns} are not both multiples of 16"
            else:
                chosen[name] = f"{rows}×{columns}"
        return chosen, left


class AutocastFloat8Linear(Float8Linear):
    """torchao's layer, which alone asks for CUDA's autocast only and fails in it where inference mode is on."""

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... e"]:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return super().forward(x)


def has_float8(device: torch.device) -> bool:
    """Whether a device multiplies FP8: NVIDIA's from Ada and Hopper on (compute capability 8.9)."""
    return (
        device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 9)
    )


def _network(module: nn.Module) -> nn.Module:
    """The part that is trained: beside it, a LightningModule may hold text encoders and the like."""
    network = getattr(module, "model", None) if isinstance(module, LightningModule) else None
    return network if isinstance(network, nn.Module) else module


def _device(module: nn.Module) -> torch.device:
    """Where the module will be; in a run, Lightning moves it there after the conversion."""
    if isinstance(module, LightningModule) and module._trainer is not None:
        return module.trainer.strategy.root_device
    return next(module.parameters()).device


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _grouped(layers: dict[str, str]) -> Iterator[str]:
    """Layers that differ in a number only, in a line."""
    groups: dict[tuple[str, str], int] = defaultdict(int)
    for name, what in layers.items():
        groups[_pattern(name), what] += 1
    for (name, what), count in groups.items():
        yield f"{name}: {count} layer{'s' * (count > 1)}, {what}"


@rank_zero_only
def _tell(how: str, lines: list[str]) -> None:
    """In the columns of the run's summary."""
    print("\n".join([f"{'FP8':<12} {how}", *(f"{'':<12} {line}" for line in lines)]), flush=True)
