"""The loaders: batches on their way from the processes that make them to the trainer.

A tensor that a worker hands over costs new pages of shared memory and a handshake of the two processes, which can take
as long as decoding a clip or two. So every worker has a few slots of shared memory for all of a run, and a batch is
copied into one and, in the trainer's process, out of it.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch.utils.data import DataLoader, DistributedSampler, get_worker_info

from data.datasets import Clips
from data.plan import TrainSampler
from t2v.batch import TextEmbedding, TokenBatch, VideoBatch
from t2v.errors import UserError


class NonEmptyLoader(DataLoader):
    """A loader that passes over batches in which every clip is broken."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return (batch for batch in super().__iter__() if batch is not None)


class Loader(DataLoader):
    """Batches of clips, as a sampler names them, as long as not too many clips are broken.

    Args:
        clips: the clips.
        sampler: which batches this rank takes.
        max_bad_fraction: more samples than this share of an epoch's that cannot be used stop the run.
        num_workers: processes that make batches; with 0, this one does.

    Raises:
        UserError: where too many clips are broken.
    """

    def __init__(self, clips: Clips, sampler: DistributedSampler, max_bad_fraction: float, num_workers: int) -> None:
        super().__init__(
            clips,
            batch_size=None,
            sampler=sampler,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available() and not num_workers,  # else it is pinned as it leaves its slot
        )
        self.clips, self.max_bad_fraction = clips, max_bad_fraction
        self.slots: _Slots | None = None
        self.share = math.ceil(len(clips) / sampler.num_replicas)
        self._require_few(len(clips.bad), len(clips.bad) + len(clips))

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.clips.failures.zero_()
        if self.num_workers and self.slots is None:
            # A worker is at most `prefetch_factor` batches ahead, and at work on another while one is copied.
            self.slots = _Slots(self.num_workers, (self.prefetch_factor or 0) + 1, self.clips.batch_bytes)
            self.collate_fn = self.slots.put
        for batch in super().__iter__():
            self._require_few(int(self.clips.failures), self.share)
            yield self.slots.take(batch) if self.slots and isinstance(batch, _Parcel) else batch

    def _require_few(self, bad: int, clips: int) -> None:
        if bad > self.max_bad_fraction * clips:
            raise UserError(
                f"{bad} of {clips} clips in '{self.clips.shards.path}' cannot be used, more than "
                f"data.max_bad_fraction={self.max_bad_fraction:g}; {self.clips.bad_samples} names them: "
                "mend the footage, or raise data.max_bad_fraction."
            )


class TrainLoader(Loader):
    """A loader whose epoch begins where training stands.

    Lightning counts the batches of a running epoch, in checkpoints too, but makes the iterator of a resumed epoch
    before it knows the epoch, and its `set_epoch` is one too high after some resumes. So nothing is decided before the
    first batch is asked for.

    Args:
        clips: the clips.
        sampler: this rank's view of the plan.
        place: the epoch, and how many of its batches are trained on.
        args: see `Loader`.
    """

    def __init__(self, clips: Clips, sampler: TrainSampler, place: Callable[[], tuple[int, int]], *args: Any) -> None:
        super().__init__(clips, sampler, *args)
        self.train_sampler, self.place = sampler, place

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.train_sampler.epoch, self.train_sampler.steps = self.place()
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Empty; that it exists tells Lightning that the loader can resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


class _Parcel(NamedTuple):
    """A batch whose tensors are in a slot."""

    worker: int
    slot: int
    parts: list[tuple[torch.Size, torch.dtype]]
    """Shape and type of each tensor."""
    batch: Any
    """All else."""


class _Slots:
    """Shared memory of the workers. Each has its copy of this object, which knows where that worker's next batch goes.

    Args:
        workers: number of workers.
        slots: batches of one worker that may be on their way.
        size: of a slot in bytes.
    """

    def __init__(self, workers: int, slots: int, size: int) -> None:
        self.memory = torch.empty(workers, slots, -(-size // 8) * 8, dtype=torch.uint8).share_memory_()
        self.turn = 0

    def put(self, batch: Any) -> Any:
        """Put a batch into the next slot; one that is too large for it takes the slow way."""
        if isinstance(batch, VideoBatch):
            tensors, others = [rearrange(batch.video, "b t c h w -> b t h w c")], {"video": None}
        else:
            tensors = [batch.tokens, batch.text.tokens, batch.text.pooled, batch.text.mask]
            others = {"tokens": None, "text": None}
        sizes = [tensor.numel() * tensor.itemsize for tensor in tensors]
        if sum(sizes) > self.memory.shape[-1]:
            return batch
        info: Any = get_worker_info()
        worker, slot = info.id, self.turn
        self.turn = (slot + 1) % self.memory.shape[1]
        for piece, tensor in zip(self.memory[worker, slot, : sum(sizes)].split(sizes), tensors, strict=True):
            piece.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return _Parcel(worker, slot, [(tensor.shape, tensor.dtype) for tensor in tensors], batch._replace(**others))

    def take(self, parcel: _Parcel) -> VideoBatch | TokenBatch:
        """Copy a batch out of its slot, which the worker uses again."""
        sizes = [shape.numel() * dtype.itemsize for shape, dtype in parcel.parts]
        content = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        content.copy_(self.memory[parcel.worker, parcel.slot, : len(content)])
        pieces = zip(content.split(sizes), parcel.parts, strict=True)
        tensors = [piece.view(dtype).view(shape) for piece, (shape, dtype) in pieces]
        if isinstance(parcel.batch, VideoBatch):
            return parcel.batch._replace(video=rearrange(tensors[0], "b t h w c -> b t c h w"))
        tokens, text, pooled, mask = tensors
        return parcel.batch._replace(tokens=tokens, text=TextEmbedding(text, mask, pooled))


def _as_it_is(batch: Any) -> Any:
    return batch
