"""The loaders: batches of clips, made by worker processes and copied through shared memory.

A tensor that a worker sends the usual way needs new pages of shared memory and a handshake of the two processes, which
can take as long as decoding a clip or two. Therefore every worker has a few slots of shared memory for the whole run; a
batch is copied into one and, in the trainer's process, out of it.
"""

import atexit
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from itertools import islice
from types import FrameType
from typing import Any, NamedTuple

import torch
from einops import rearrange
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, get_worker_info

from data.datasets import Clips
from data.plan import TrainSampler
from t2v.batch import TextEmbedding, TokenBatch, VideoBatch


class LaterSampler(UnrepeatedDistributedSampler):
    """The batches of one rank in order, from the one with the number `start`."""

    start = 0

    def __iter__(self) -> Iterator[Any]:
        return islice(super().__iter__(), self.start, None)


class NonEmptyLoader(DataLoader[Any]):
    """A loader that leaves out batches that are None, in which every clip is corrupt.

    Attributes:
        numbers: For each batch so far, its number in the order of the `LaterSampler`.
    """

    numbers: list[int]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        assert isinstance(self.sampler, LaterSampler)
        self.numbers = []
        for number, batch in enumerate(super().__iter__(), self.sampler.start):
            if batch is not None:
                self.numbers.append(number)
                yield batch


class Loader(DataLoader[Any]):
    """Batches of clips in the order of a sampler.

    Args:
        clips: The clips.
        sampler: Batches of this rank.
        max_skipped_fraction: Fraction of an epoch's samples that cannot be used above which the run stops.
        num_workers: Processes that load batches; 0 to load them in this process.

    Raises:
        UserError: If too many samples cannot be used.
    """

    def __init__(
        self, clips: Clips, sampler: DistributedSampler[Any], max_skipped_fraction: float, num_workers: int
    ) -> None:
        super().__init__(
            clips,
            batch_size=None,
            sampler=sampler,
            collate_fn=_identity,
            num_workers=num_workers,
            worker_init_fn=_outlive_signals,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available() and not num_workers,  # with workers, `_SharedSlots.read` pins it
        )
        self.clips, self.max_skipped_fraction = clips, max_skipped_fraction
        self.slots: _SharedSlots | None = None
        self.clips_per_rank = math.ceil(len(clips) / sampler.num_replicas)
        clips.check_skipped(len(clips.skipped), len(clips.skipped) + len(clips), max_skipped_fraction)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.clips.failures.zero_()
        if self.num_workers and self.slots is None:
            # A worker is at most `prefetch_factor` batches ahead, and loads another while one is copied.
            self.slots = _SharedSlots(self.num_workers, (self.prefetch_factor or 0) + 1, self.clips.batch_bytes)
            self.collate_fn = self.slots.write
        for batch in super().__iter__():
            self.clips.check_skipped(int(self.clips.failures), self.clips_per_rank, self.max_skipped_fraction)
            yield self.slots.read(batch) if self.slots and isinstance(batch, _SharedBatch) else batch


class TrainLoader(Loader):
    """A loader whose epoch starts at the current step of training.

    Lightning counts the batches of the current epoch, also in checkpoints, but creates the iterator of a resumed epoch
    before it restores the epoch, and after some resumes its `set_epoch` gets a number that is one too high. So the
    progress is asked for when the first batch is.

    Args:
        clips: The clips.
        sampler: Batches of this rank in the plan.
        progress: Returns the current epoch and the number of its batches that are trained on.
        args: Other arguments of `Loader`.
    """

    def __init__(
        self, clips: Clips, sampler: TrainSampler, progress: Callable[[], tuple[int, int]], *args: Any
    ) -> None:
        super().__init__(clips, sampler, *args)
        self.train_sampler, self.progress = sampler, progress

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.train_sampler.epoch, self.train_sampler.steps = self.progress()
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state; the method tells Lightning that the loader can resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing; there is no state."""


class _SharedBatch(NamedTuple):
    """A batch whose tensors are in a slot of shared memory."""

    worker: int
    slot: int
    tensors: list[tuple[torch.Size, torch.dtype]]
    """Shape and type of each tensor."""
    batch: Any
    """The batch without its tensors."""


class _SharedSlots:
    """Slots of shared memory for the batches of each worker. Every worker has a copy of this object with its own state.

    Args:
        workers: Number of workers.
        slots: Number of batches of one worker that may wait to be read.
        size: Size of a slot in bytes.
    """

    def __init__(self, workers: int, slots: int, size: int) -> None:
        aligned = math.ceil(size / 8) * 8
        self.memory = torch.empty(workers, slots, aligned, dtype=torch.uint8).share_memory_()
        self.next_slot = 0

    def write(self, batch: Any) -> Any:
        """Copy a batch into the worker's next slot; return the batch itself if it is larger than a slot."""
        if isinstance(batch, VideoBatch):
            tensors: list[Tensor] = [rearrange(batch.video, "b t c h w -> b t h w c")]
            rest: Any = batch._replace(video=None)  # type: ignore[arg-type]
        else:
            tensors = [batch.tokens, batch.text.tokens, batch.text.mask]
            rest = batch._replace(tokens=None, text=None)
        sizes = [tensor.numel() * tensor.itemsize for tensor in tensors]
        if sum(sizes) > self.memory.shape[-1]:
            return batch
        info: Any = get_worker_info()
        slot = self.next_slot
        self.next_slot = (slot + 1) % self.memory.shape[1]
        for part, tensor in zip(self.memory[info.id, slot, : sum(sizes)].split(sizes), tensors, strict=True):
            part.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return _SharedBatch(info.id, slot, [(tensor.shape, tensor.dtype) for tensor in tensors], rest)

    def read(self, shared: _SharedBatch) -> VideoBatch | TokenBatch:
        """Copy a batch out of its slot, which the worker then writes again."""
        sizes = [shape.numel() * dtype.itemsize for shape, dtype in shared.tensors]
        content = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        content.copy_(self.memory[shared.worker, shared.slot, : len(content)])
        parts = zip(content.split(sizes), shared.tensors, strict=True)
        tensors = [part.view(dtype).view(shape) for part, (shape, dtype) in parts]
        batch: Any = shared.batch
        if isinstance(batch, VideoBatch):
            return batch._replace(video=rearrange(tensors[0], "b t h w c -> b t c h w"))
        tokens, text, mask = tensors
        return batch._replace(tokens=tokens, text=TextEmbedding(text, mask))


def _identity(batch: Any) -> Any:
    return batch


def _outlive_signals(worker: int) -> None:
    """Ignore Ctrl-C and the first SIGTERM, which reach all processes of a run: the main one ends its step first."""

    def exit_at_next(number: int, frame: FrameType | None) -> None:
        signal.signal(number, lambda *_: os._exit(0))

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, exit_at_next)


@atexit.register
def _end_workers() -> None:
    """End the workers of loaders that an error has kept; multiprocessing sends one SIGTERM and would wait for ever."""
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler would report them as failed
    for process in workers:
        process.kill()
