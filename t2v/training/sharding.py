"""Training with the model, its gradients and the optimizer's state shared among all devices (FSDP2)."""

import os
from collections.abc import Mapping
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
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from t2v.checkpoints.storage import MARKER, PARTIAL, is_complete, put, read_checkpoint, read_marker, remove
from t2v.errors import UserError
from t2v.training.lightning_private import clear_device_mesh

WEIGHTS = ("state_dict", "current_model_state", "averaging_state")
"""What a checkpoint holds of the model: its weights, or their moving average and the weights beside it."""


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` over all devices, with sharded checkpoints that are complete or not there.

    - The LightningModule's `configure_model` shards the model; in `predict` every device has it whole.
    - A checkpoint is a folder. A run goes on from one with any number of devices, and from a file as well.
    """

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ):
        """
        Args:
            tensor_parallel_size: so many devices share the work on the same clips; it divides their number.
            process_group_backend: how devices talk; by default NCCL for GPUs and gloo for the CPU.
            timeout: how long a device waits for the others.
        """
        super().__init__(1, tensor_parallel_size, True, process_group_backend, timeout)
        self.tensor_parallel_size = tensor_parallel_size

    def setup_environment(self) -> None:
        devices, together = self.num_nodes * self.num_processes, self.tensor_parallel_size
        if together < 1 or devices % together:
            raise UserError(
                f"trainer.strategy.tensor_parallel_size={together} must divide the number of devices, {devices}: so "
                "many of them share the work on the same clips."
            )
        self._data_parallel_size = devices // together
        super().setup_environment()
        module = self.lightning_module
        assert module is not None
        if module.trainer.state.fn == TrainerFn.PREDICTING:
            clear_device_mesh(module)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        path = Path(self.broadcast(filepath))
        partial = path.with_name(path.name + PARTIAL)
        if self.is_global_zero:
            remove(partial)  # of a run that was killed
        self.barrier()
        tensors = {name: checkpoint.pop(name) for name in WEIGHTS if name in checkpoint}
        for number, state in enumerate(checkpoint.pop("optimizer_states", [])):
            tensors[f"optimizer_{number}"] = state
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(partial, single_file_per_rank=True))
        if self.is_global_zero:
            with (partial / MARKER).open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            put(partial, path)
        self.barrier()

    def remove_checkpoint(self, filepath: str | Path) -> None:
        if self.is_global_zero:
            remove(Path(filepath))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
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
        reader = dcp.FileSystemReader(path)
        stored = reader.read_metadata()
        averaged = any(place[0] == "current_model_state" for place in stored.planner_data.values())
        weights: dict[str, Any] = {"state_dict": get_model_state_dict(model)}  # these are the model's own
        if self.optimizers and averaged:
            copies = {name: value.clone() for name, value in weights["state_dict"].items()}
            weights |= {"current_model_state": copies, "averaging_state": {"n_averaged": torch.tensor(0)}}
        try:
            dcp.load(weights, storage_reader=reader)
            for number, optimizer in enumerate(self.optimizers):
                state = {f"optimizer_{number}": get_optimizer_state_dict(model, optimizer)}
                dcp.load(state, storage_reader=reader)
                set_optimizer_state_dict(model, optimizer, optim_state_dict=state[f"optimizer_{number}"])
        except CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            raise UserError(
                f"The sharded checkpoint {path} does not fit the model that the config describes, or files of it are "
                f"missing ({type(reason).__name__}: {reason}): give the config it was trained with."
            ) from error
        return checkpoint | ({"current_model_state": {}} if averaged else {}) | weights

    def _load_file(self, path: Path) -> dict[str, Any]:
        checkpoint, model = read_checkpoint(path), self.model
        assert model is not None
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(model, checkpoint["state_dict"], options=options)
        if self.optimizers:
            ours = get_model_state_dict(model)
            for name in WEIGHTS[:2]:
                checkpoint |= {name: _shared(checkpoint[name], ours)} if name in checkpoint else {}
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
                named = _by_name(state, model, optimizer)
                set_optimizer_state_dict(model, optimizer, optim_state_dict=named, options=options)
        return checkpoint


class FolderCheckpointIO(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoints, for models that are whole: it reads sharded ones too."""

    def __init__(self, optimizers: bool = True):
        """
        Args:
            optimizers: whether the optimizers' state of a sharded checkpoint is wanted.
        """
        super().__init__()
        self.optimizers = optimizers

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if Path(path).is_dir():
            return read_checkpoint(path, self.optimizers)
        return super().load_checkpoint(path, *args, **kwargs)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if not Path(path).is_dir():
            return super().save_checkpoint(checkpoint, path, storage_options)
        partial = Path(path).with_name(Path(path).name + PARTIAL)
        remove(partial)
        super().save_checkpoint(checkpoint, partial, storage_options)
        return put(partial, Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        if is_complete(path):
            remove(Path(path))
        else:
            super().remove_checkpoint(path)


def shard(parts: list[nn.Module], mesh: DeviceMesh) -> None:
    """Shares out the weights of a model's parts, which are gathered one part at a time; once is enough.

    Args:
        parts: the layers, and the model itself last.
        mesh: of Lightning's strategy.
    """
    for part in parts:
        if not isinstance(part, FSDPModule):
            fully_shard(part, mesh=mesh["data_parallel"])


def _shared(values: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Whole tensors in shares such as the model has of them."""
    shares = {name: like for name, like in ours.items() if isinstance(like, DTensor)}
    return {
        name: distribute_tensor(value, shares[name].device_mesh, shares[name].placements) if name in shares else value
        for name, value in values.items()
    }


def _by_name(state: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state by the parameters' names, where it was by their numbers in the order of the groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    groups = state["param_groups"]
    renamed = dict(zip(chain.from_iterable(group["params"] for group in groups), order, strict=True))
    return {
        "state": {renamed[number]: value for number, value in state["state"].items()},
        "param_groups": [{**group, "params": [renamed[number] for number in group["params"]]} for group in groups],
    }
