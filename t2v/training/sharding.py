"""Training with weights, gradients and optimizer state sharded over all devices (FSDP2), and sharded checkpoints."""

import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from t2v.checkpoints.lookup import is_local
from t2v.checkpoints.storage import (
    MARKER,
    is_complete,
    partial_path,
    read_checkpoint,
    read_marker,
    remove_checkpoint,
    replace_checkpoint,
    write_checkpoint,
)
from t2v.errors import UserError
from t2v.training.lightning_private import clear_device_mesh, set_data_parallel_size

WEIGHT_KEYS = ("state_dict", "current_model_state", "averaging_state")
"""Keys of a checkpoint that hold tensors of the model: its weights, or their moving average and the trained weights."""


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` over all devices, with sharded checkpoints that are written atomically.

    - The LightningModule's `configure_model` shards the model. In `predict` every device has the unsharded model.
    - A checkpoint is a folder. A run can resume from one with any number of devices, and from a single file too.

    Args:
        tensor_parallel_size: Tensor-parallel size; must divide the world size.
        process_group_backend: Backend of torch.distributed; by default NCCL for GPUs and gloo for the CPU.
        timeout: How long a device waits for the others.
    """

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        super().__init__(1, tensor_parallel_size, True, process_group_backend, timeout)
        self.tensor_parallel_size = tensor_parallel_size

    def setup_environment(self) -> None:
        """Set the data-parallel size from the world size.

        Raises:
            UserError: If the tensor-parallel size does not divide the world size.
        """
        world_size, tp_size = self.num_nodes * self.num_processes, self.tensor_parallel_size
        check_tensor_parallel_size(tp_size, world_size)
        set_data_parallel_size(self, world_size // tp_size)
        super().setup_environment()
        module = self.lightning_module
        assert module is not None
        if module.trainer.state.fn == TrainerFn.PREDICTING:
            clear_device_mesh(module)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint folder, each rank its own shards; the folder appears when it is complete."""
        path = Path(self.broadcast(filepath))
        partial = partial_path(path)
        if self.is_global_zero:
            remove_checkpoint(partial)  # from a run that was killed
        self.barrier()
        tensors = {name: checkpoint.pop(name) for name in WEIGHT_KEYS if name in checkpoint}
        for index, state in enumerate(checkpoint.pop("optimizer_states", [])):
            tensors[f"optimizer_{index}"] = state
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(partial, single_file_per_rank=True))  # type: ignore[attr-defined]
        if self.is_global_zero:
            with (partial / MARKER).open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            replace_checkpoint(partial, path)
        self.barrier()

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove a checkpoint, a folder or a file."""
        if self.is_global_zero:
            remove_checkpoint(Path(filepath))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint, a folder or a file, into the model and the optimizers.

        Raises:
            UserError: If a folder is incomplete or does not fit the model.
        """
        path = Path(self.broadcast(checkpoint_path))
        assert self.model is not None
        if not any(isinstance(parameter, DTensor) for parameter in self.model.parameters()):
            checkpoint = read_checkpoint(path)
            self.model.load_state_dict(checkpoint["state_dict"])
            return checkpoint
        return self._load_folder(path) if path.is_dir() else self._load_file(path)

    def _load_folder(self, path: Path) -> dict[str, Any]:
        checkpoint, model = read_marker(path), self.model
        assert model is not None
        reader = dcp.FileSystemReader(path)  # type: ignore[attr-defined]
        keys: dict[str, tuple[Any, ...]] = reader.read_metadata().planner_data
        averaged = any(key[0] == "current_model_state" for key in keys.values())
        if averaged:
            checkpoint["current_model_state"] = {}
        weights: dict[str, Any] = {"state_dict": get_model_state_dict(model)}  # the model's tensors, which are loaded
        if self.optimizers and averaged:
            weights["current_model_state"] = {name: value.clone() for name, value in weights["state_dict"].items()}
            weights["averaging_state"] = {"n_averaged": torch.tensor(0)}
        try:
            dcp.load(weights, storage_reader=reader)  # type: ignore[attr-defined]
            for index, optimizer in enumerate(self.optimizers):
                state = {f"optimizer_{index}": get_optimizer_state_dict(model, optimizer)}
                dcp.load(state, storage_reader=reader)  # type: ignore[attr-defined]
                set_optimizer_state_dict(model, optimizer, optim_state_dict=state[f"optimizer_{index}"])
        except CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            raise UserError(
                f"The sharded checkpoint {path} does not fit the model of the config, or some of its files are missing "
                f"({type(reason).__name__}: {reason}): use the config that it was trained with."
            ) from error
        return checkpoint | weights

    def _load_file(self, path: Path) -> dict[str, Any]:
        checkpoint, model = read_checkpoint(path), self.model
        assert model is not None
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(model, checkpoint["state_dict"], options=options)
        if self.optimizers:
            like = get_model_state_dict(model)
            for key in ("state_dict", "current_model_state"):
                if key in checkpoint:
                    checkpoint[key] = _distribute(checkpoint[key], like)
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
                state = _with_parameter_names(state, model, optimizer)
                set_optimizer_state_dict(model, optimizer, optim_state_dict=state, options=options)
        return checkpoint


def check_tensor_parallel_size(tp_size: int, world_size: int) -> None:
    """Check that the devices can be divided into tensor-parallel groups.

    Raises:
        UserError: If they cannot.
    """
    if tp_size < 1 or world_size % tp_size:
        raise UserError(
            f"trainer.strategy.tensor_parallel_size={tp_size} must divide the number of devices, {world_size}."
        )


class FolderCheckpointIO(TorchCheckpointIO):
    """Reading and writing of checkpoints for unsharded models: reads sharded ones too, and writes atomically.

    Args:
        optimizers: Whether to read the optimizer state of sharded checkpoints.
    """

    def __init__(self, optimizers: bool = True) -> None:
        super().__init__()
        self.optimizers = optimizers

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint, a folder or a file."""
        if Path(path).is_dir():
            return read_checkpoint(path, self.optimizers)
        return super().load_checkpoint(path, *args, **kwargs)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a file, which appears when it is complete; Lightning would write it to TMPDIR and then copy it."""
        if is_local(path):
            write_checkpoint(checkpoint, Path(path))
        else:
            super().save_checkpoint(checkpoint, path, storage_options)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, a folder or a file."""
        if is_complete(path):
            remove_checkpoint(Path(path))
        else:
            super().remove_checkpoint(path)


def shard(layers: list[nn.Module], model: nn.Module, mesh: DeviceMesh, precision: str | None) -> None:
    """Shard parameters in place by FSDP2, which gathers them one layer at a time; a sharded model stays unchanged.

    - Under bf16-mixed the layers are gathered in bfloat16, half the bytes; the parameters outside of layers in float32,
      so that the sum of the layers' outputs stays in float32. Autocast alone decides the types of activations.
    - Gradients are always summed over the ranks in float32, and the sharded parameters keep their type.

    Args:
        layers: The largest parts of the model.
        model: The model itself.
        mesh: The mesh of Lightning's strategy, with a dimension "data_parallel".
        precision: Name of the run's Lightning precision.
    """
    if isinstance(model, FSDPModule):
        return
    outside = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    inside = replace(outside, param_dtype=torch.bfloat16) if precision == "bf16-mixed" else outside
    for layer in layers:
        fully_shard(layer, mesh=mesh["data_parallel"], mp_policy=inside)
    fully_shard(model, mesh=mesh["data_parallel"], mp_policy=outside)


def _distribute(state: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict whose tensors are sharded as those of `like`."""
    distributed = dict(state)
    for name, tensor in like.items():
        if isinstance(tensor, DTensor) and name in state:
            distributed[name] = distribute_tensor(state[name], tensor.device_mesh, tensor.placements)
    return distributed


def _with_parameter_names(state: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state dict with the names of the parameters in place of their numbers."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    names = [name_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    numbers = chain.from_iterable(group["params"] for group in state["param_groups"])
    renamed = dict(zip(numbers, names, strict=True))
    return {
        "state": {renamed[number]: value for number, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [renamed[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }
