"""Tensor parallelism of the transformer (https://arxiv.org/abs/1909.08053).

Each device computes some groups of heads of every attention and a part of the hidden width of SwiGLU. The outputs of a
layer are summed over the devices. Embeddings, norms and the head are replicated.
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from t2v.errors import UserError
from t2v.transformer.model import VideoTransformer

_HEAD_DIMENSION = 1
"""The dimension of queries and keys that counts heads or groups of heads."""


class Replicated(ParallelStyle):
    """A module whose parameters and inputs are the same on every device."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, None, self._to_distributed, self._to_local)  # type: ignore[arg-type]

    @staticmethod
    def _to_distributed(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        return tuple(DTensor.from_local(each, mesh, [Replicate()], run_check=False) for each in inputs)

    @staticmethod
    def _to_local(module: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
        return output.to_local()


def check_heads(model: VideoTransformer, tp_size: int) -> None:
    """Check that a tensor-parallel size divides the heads of a transformer.

    Raises:
        UserError: If it does not divide the number of key and value heads.
    """
    if model.attention.kv_heads % tp_size:
        raise UserError(
            f"trainer.strategy.tensor_parallel_size={tp_size} must divide the transformer's "
            f"kv_heads={model.attention.kv_heads}, since the heads are divided over the devices."
        )


def parallelize(model: VideoTransformer, mesh: DeviceMesh) -> None:
    """Divide attention and SwiGLU over the devices, in place; a divided model stays unchanged.

    Args:
        model: On the meta device or with data, not sharded.
        mesh: One-dimensional, of the tensor-parallel devices.

    Raises:
        UserError: If the tensor-parallel size does not divide the number of key and value heads.
    """
    if isinstance(model.start, DTensor):
        return
    check_heads(model, mesh.size())
    parallelize_module(model, mesh, _plan(model))
    for name, parameter in list(model.named_parameters(recurse=False)):
        model.register_parameter(name, nn.Parameter(distribute_tensor(parameter, mesh, [Replicate()])))


def _plan(model: VideoTransformer) -> dict[str, ParallelStyle]:
    """Return the style of each module that has parameters, by name."""
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        kind = name.rsplit(".", 1)[-1]
        has_parameters = next(module.parameters(recurse=False), None) is not None
        if kind in ("query_key_value", "query", "key_value", "gate_up"):
            plan[name] = ColwiseParallel()
        elif kind == "out" and name.startswith("blocks."):
            plan[name] = RowwiseParallel()
        elif kind in ("query_norm", "key_norm"):
            plan[name] = SequenceParallel(sequence_dim=_HEAD_DIMENSION, use_local_output=True)
        elif kind == "text_attention" and model.gate is not None:
            others = (None, None, None)
            plan[name] = PrepareModuleInput(
                input_layouts=(*others, Replicate()), desired_input_layouts=(*others, Shard(1)), use_local_output=True
            )
        elif has_parameters and module is not model:
            plan[name] = Replicated()
    return plan
