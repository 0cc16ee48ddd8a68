"""The loaders: batches on their way from the processes that make them to the trainer.

What a worker hands over lies in memory that both processes share. New pages of it, and the handshake of the two
processes for every tensor, are what a batch costs beside the making of its clips; so clips of footage are gathered in
shared memory at once (`VideoClips.collate`), and the tensors of a batch of tokens come as one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from data.datasets import Clips
from data.plan import TrainSampler
from t2v.batch import TextEmbedding, TokenBatch
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
            collate_fn=_pack if num_workers else _as_it_is,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
        self.clips, self.max_bad_fraction = clips, max_bad_fraction
        self.share = math.ceil(len(clips) / sampler.num_replicas)
        self._require_few(len(clips.bad), len(clips.bad) + len(clips))

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.clips.failures.zero_()
        for batch in super().__iter__():
            self._require_few(int(self.clips.failures), self.share)
            yield _unpack(batch)

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
    """A `TokenBatch` as one tensor."""

    content: UInt8[Tensor, "bytes"]
    parts: list[tuple[Sequence[int], torch.dtype]]
    """Shape and type of each of its tensors."""
    captions: list[str]
    keys: list[str]


def _pack(batch: Any) -> Any:
    if not isinstance(batch, TokenBatch):
        return batch
    tensors = [batch.tokens, batch.text.tokens, batch.text.pooled, batch.text.mask]  # each must lie at its own width
    content = torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors])
    return _Parcel(content, [(tensor.shape, tensor.dtype) for tensor in tensors], batch.captions, batch.keys)


def _unpack(batch: Any) -> Any:
    if not isinstance(batch, _Parcel):
        return batch
    pieces = batch.content.split([math.prod(shape) * dtype.itemsize for shape, dtype in batch.parts])
    tokens, text, pooled, mask = (
        piece.view(dtype).view(tuple(shape)) for piece, (shape, dtype) in zip(pieces, batch.parts, strict=True)
    )
    return TokenBatch(tokens, TextEmbedding(text, mask, pooled), batch.captions, batch.keys)


def _as_it_is(batch: Any) -> Any:
    return batch
