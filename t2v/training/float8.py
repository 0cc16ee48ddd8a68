"""Training in FP8: the large matrix products in 8 bits, everything else in bfloat16.

- Weights, gradients and optimizer state stay in float32. Their names, shapes and types are those of a model without
  FP8, so that checkpoints are interchangeable.
- Operands are scaled into the range of e4m3 (gradients of the tensorwise recipe: e5m2) by their current largest value,
  without a history (https://arxiv.org/abs/2209.05433).
- On devices without FP8, operands are rounded in the same way and multiplied in float32: slower, with the same
  numerics.
"""

import re
from collections import Counter
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
from t2v.training.lightning_private import trainer_of

LAYERS = (
    "blocks.*.attention.query_key_value",
    "blocks.*.attention.out",
    "blocks.*.text_attention.query",
    "blocks.*.text_attention.out",
    "blocks.*.mlp.gate_up",
    "blocks.*.mlp.out",
)
"""The large matrix products of the transformer: all but the head and the projections of the text."""


class Float8Precision(MixedPrecision):
    """Precision plugin: linear layers compute in FP8, the rest in bfloat16, weights stay in float32.

    It replaces `trainer.precision`; the two cannot be combined.

    Args:
        recipe: "tensorwise" scales each tensor by one factor, which is fastest; "rowwise" each of its rows, which is
            more accurate.
        layers: Names of the linear layers to convert, as patterns (`*` is any text), relative to the model.

    Raises:
        UserError: If there is no such recipe.
    """

    def __init__(
        self,
        recipe: Literal["tensorwise", "rowwise"] = "tensorwise",
        layers: tuple[str, ...] = LAYERS,
    ) -> None:
        super().__init__("bf16-mixed", "cuda" if torch.cuda.is_available() else "cpu")
        if recipe not in ("tensorwise", "rowwise"):
            raise UserError(f"recipe={recipe} of Float8Precision must be tensorwise or rowwise.")
        self.recipe, self.layers = recipe, tuple(layers)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert the layers in place; a converted module stays unchanged.

        Lightning calls it at the start of a run; a `configure_model` that shards the weights must call it before.

        Raises:
            UserError: If a pattern matches no linear layer, no layer can be converted, or the weights are sharded.
        """
        network, device = _network(module), _device(module)
        self.device = device.type
        if any(isinstance(part, Float8Linear) for part in network.modules()):
            return module
        if any(isinstance(part, FSDPModule) for part in network.modules()):
            raise UserError(
                f"{type(module).__name__} is sharded already, so Float8Precision cannot convert its layers: call "
                "self.trainer.precision_plugin.convert_module(self) in configure_model before fully_shard."
            )
        chosen, skipped = self._choose(network)
        if not chosen:
            reasons = f" (left out: {'; '.join(_grouped(skipped))})" if skipped else ""
            raise UserError(
                f"Float8Precision can convert no layer of {type(network).__name__}{reasons}: use `trainer.precision: "
                "bf16-mixed` instead."
            )
        emulated = not has_float8(device)
        # Padding, since the kernels need a multiple of 16 rows in the product of the gradients.
        config = replace(Float8LinearConfig.from_recipe_name(self.recipe), emulate=emulated, pad_inner_dim=True)
        convert_to_float8_training(network, module_filter_fn=lambda _, name: name in chosen, config=config)
        for name in chosen:
            network.set_submodule(name, AutocastFloat8Linear.from_float(network.get_submodule(name), config))
        how = f"emulated in float32, since {device.type} has no FP8" if emulated else f"on {device.type}"
        bfloat16 = [f"bfloat16: {line}" for line in _grouped(skipped)]
        _print_summary(f"{self.recipe}, {how}", [*_grouped(chosen), *bfloat16])
        return module

    def _choose(self, network: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
        """Return the layers to convert, with their sizes, and the layers that cannot be converted, with the reason."""
        linear = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
        chosen: dict[str, str] = {}
        skipped: dict[str, str] = {}
        for pattern in self.layers:
            if not any(fnmatchcase(name, pattern) for name in linear):
                existing = ", ".join(sorted({_pattern(name) for name in linear})) or "none"
                raise UserError(
                    f"Float8Precision cannot convert '{pattern}', since {type(network).__name__} has no such "
                    f"linear layer: it has {existing}; change `layers`, or use `trainer.precision: bf16-mixed`."
                )
        for name, layer in linear.items():
            if not any(fnmatchcase(name, pattern) for pattern in self.layers):
                continue
            rows, columns = layer.weight.shape
            if name == "head":
                skipped[name] = "its weight is used outside of the layer too"
            elif rows % 16 or columns % 16:
                skipped[name] = f"{rows}×{columns} are not both multiples of 16"
            else:
                chosen[name] = f"{rows}×{columns}"
        return chosen, skipped


class AutocastFloat8Linear(Float8Linear):  # type: ignore[misc]
    """torchao's layer, with autocast on every device, and usable in inference mode."""

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Compute the product in FP8."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            output: Tensor = super().forward(x)
        return output


def has_float8(device: torch.device) -> bool:
    """Return whether a device multiplies in FP8: NVIDIA's GPUs from Ada and Hopper on (compute capability 8.9)."""
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 9)


def _network(module: nn.Module) -> nn.Module:
    """Return the trained part of a LightningModule, which may also hold a text encoder."""
    network = getattr(module, "model", None) if isinstance(module, LightningModule) else None
    return network if isinstance(network, nn.Module) else module


def _device(module: nn.Module) -> torch.device:
    """Return the device of the run, to which Lightning moves the module after the conversion."""
    trainer = trainer_of(module) if isinstance(module, LightningModule) else None
    return next(module.parameters()).device if trainer is None else trainer.strategy.root_device


def _pattern(name: str) -> str:
    """Return a name with `*` in place of numbers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _grouped(layers: dict[str, str]) -> list[str]:
    """Return one line for all layers whose names differ only in numbers and whose descriptions are equal."""
    groups = Counter((_pattern(name), description) for name, description in layers.items())
    return [
        f"{name}: {count} layer{'' if count == 1 else 's'}, {description}"
        for (name, description), count in groups.items()
    ]


@rank_zero_only
def _print_summary(how: str, lines: list[str]) -> None:
    """Print in the columns of `callbacks.RunSummary`."""
    print("\n".join([f"{'FP8':<12} {how}", *(f"{'':<12} {line}" for line in lines)]), flush=True)
