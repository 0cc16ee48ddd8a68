"""Tensor parallelism: several devices share the work on one clip (https://arxiv.org/abs/1909.08053).

Each takes some groups of heads of every attention, and the same share of the hidden width of SwiGLU; what a layer adds
to the residual stream is summed over the devices. Embeddings, norms and the head all of them have, and compute alike.
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

_HEADS = 1
"""The dimension of queries and keys that counts heads or groups of them."""


class Replicated(ParallelStyle):
    """A module with weights of its own that every device has whole, and whose inputs are the same on all."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, None, self._take, self._give)  # type: ignore[arg-type]

    @staticmethod
    def _take(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        return tuple(DTensor.from_local(each, mesh, [Replicate()], run_check=False) for each in inputs)

    @staticmethod
    def _give(module: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
        return output.to_local()


def parallelize(model: VideoTransformer, mesh: DeviceMesh) -> None:
    """Shares out attention and SwiGLU; once is enough.

    Args:
        model: whole, with weights or without.
        mesh: of one dimension; the devices that share.

    Raises:
        UserError: where the groups of heads cannot be dealt out evenly.
    """
    if isinstance(model.start, DTensor):
        return
    devices, groups = mesh.size(), model.attention.kv_heads
    if groups % devices:
        raise UserError(
            f"trainer.strategy.tensor_parallel_size={devices} must divide the transformer's kv_heads={groups}: each "
            "device takes some of the heads."
        )
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        kind = name.rsplit(".", 1)[-1]
        if kind in ("query_key_value", "query", "key_value", "gate_up"):
            plan[name] = ColwiseParallel()
        elif kind == "out" and name.startswith("blocks."):
            plan[name] = RowwiseParallel()
        elif kind in ("query_norm", "key_norm"):
            plan[name] = SequenceParallel(sequence_dim=_HEADS, use_local_output=True)
        elif kind == "text_attention" and model.gate is not None:
            others = (None, None, None)
            plan[name] = PrepareModuleInput(
                input_layouts=(*others, Replicate()), desired_input_layouts=(*others, Shard(1)), use_local_output=True
            )
        elif next(module.parameters(recurse=False), None) is not None and module is not model:
            plan[name] = Replicated()
    parallelize_module(model, mesh, plan)
    for name, parameter in list(model.named_parameters(recurse=False)):
        model.register_parameter(name, nn.Parameter(distribute_tensor(parameter, mesh, [Replicate()])))
