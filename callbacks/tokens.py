"""Writes the tokens that stage 1 predicts as token shards, the training data of stage 2."""

import shutil
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float16, Int
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from data.partial import begin_or_continue, read_settings, write_settings
from data.shards import ShardWriter
from t2v.batch import VideoBatch
from t2v.errors import UserError, check_range
from t2v.files import LOCK, locked, remove
from t2v.text import TextEncoder

_BATCH_SIZE = 32
"""Captions that are embedded in one pass: of about one length, since shorter ones are padded."""
_CACHE_BYTES = 2**28
"""Bytes of embeddings that are kept for captions that occur again."""

_COMPLETE = "complete"
"""The file that says that all shards are complete, and only their folders have not been moved."""

Embedding = Float16[np.ndarray, "l d"]
"""Embeddings of the text tokens of a caption without padding."""


class TokenShardWriter(BasePredictionWriter):
    """Writes ``OUTPUT_DIR/SPLIT/shard-RANK-NUMBER.tar``, one folder for each split of the data.

    A sample is ``KEY.tokens.npy`` (t, h, w); ``KEY.text.npy`` (l, d), the text embeddings of all its captions
    concatenated, in float16; and ``KEY.json`` with the captions, the number of text tokens of each, the frame rate, and
    a fingerprint of the tokenizer, the text encoder and the frame rate. The folders of the splits appear when all
    samples are written; until then the shards are in ``OUTPUT_DIR/.partial``, where the same command, with the same
    weights and clips, continues after the last complete one.

    Args:
        output_dir: Folder for the folders of the splits, which must not contain shards already.
        text_encoder: Embeds the captions. Embeddings of recent captions are reused.
        samples_per_shard: Number of clips in one tar file, at least 1.

    Raises:
        UserError: If there is no clip in a file.
    """

    def __init__(self, output_dir: str, text_encoder: TextEncoder, samples_per_shard: int = 1000) -> None:
        super().__init__(write_interval="batch")
        check_range(self, "[1, inf)", samples_per_shard=samples_per_shard)
        self.output_dir = Path(output_dir)
        self.partial = self.output_dir / ".partial"
        self.text_encoder = text_encoder
        self.samples_per_shard = samples_per_shard
        self._embeddings = _EmbeddingCache(text_encoder)
        self._writers: dict[str, ShardWriter] = {}
        self._lock = ExitStack()
        self._locked = self._dry_run = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there are no older shards, which would be mixed with new ones.

        Raises:
            UserError: If the folder of a split is not empty.
        """
        super().setup(trainer, pl_module, stage)
        self._dry_run = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if stage != "predict" or self._dry_run:
            return
        if trainer.is_global_zero and (self.partial / _COMPLETE).exists():
            self._publish()  # the run was killed while it did
        trainer.strategy.barrier("TokenShardWriter.setup")
        for split in trainer.datamodule.predict_splits:  # type: ignore[attr-defined]
            folder = self.output_dir / split
            if folder.is_dir() and any(folder.iterdir()):
                raise UserError(
                    f"{folder} already holds token shards: delete it, or give TokenShardWriter another output_dir."
                )

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the metadata that all samples have in common, and continue an interrupted run.

        Raises:
            UserError: If another run is writing the folder, or one with other settings was interrupted.
        """
        size, expected = trainer.datamodule.size, pl_module.fingerprint()["image_size"]  # type: ignore[attr-defined, operator]
        if size != expected:
            raise UserError(
                f"data.size={size}, but the tokens must be those of frames of {expected} pixels, the image_size of the "
                "VQ-VAE: set data.size to it."
            )
        self.text_encoder.to(pl_module.device)
        self._fps = float(trainer.datamodule.fps)  # type: ignore[attr-defined]
        self._fingerprint = {
            **pl_module.fingerprint(),  # type: ignore[operator]
            "fps": self._fps,
            "text_encoder": self.text_encoder.name,
            "text_width": self.text_encoder.width,
        }
        self._starts = {}
        if self._dry_run:
            print("Nothing is written: trainer.fast_dev_run is a test.", flush=True)
            return
        refused = self._open_partial(trainer) if trainer.is_global_zero else ""
        if refused := trainer.strategy.broadcast(refused):
            raise UserError(refused)
        self._reached = self._read_reached(trainer.global_rank)
        self._starts = dict(self._reached)
        splits = trainer.datamodule.predict_splits  # type: ignore[attr-defined]
        for split, loader in zip(splits, trainer.predict_dataloaders or [], strict=True):
            loader.sampler.start = self._starts.get(split, _Reached()).batch

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Int[Tensor, "b t h w"],
        batch_indices: Any,
        batch: VideoBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch."""
        split = trainer.datamodule.predict_splits[dataloader_idx]  # type: ignore[attr-defined]
        number = trainer.predict_dataloaders[dataloader_idx].numbers[batch_idx]  # type: ignore[index]
        start = self._starts.get(split, _Reached())
        done = start.samples if number == start.batch else 0
        with trainer.profiler.profile(f"[TextEncoder]{self.text_encoder.name}"):  # type: ignore[attr-defined]
            all_captions = [caption for captions in batch.captions[done:] for caption in captions]
            embeddings = iter(self._embeddings.embed(all_captions))
        if self._dry_run:
            return
        if split not in self._writers:
            writer = ShardWriter(
                self.partial / split, self.samples_per_shard, _prefix(trainer.global_rank), start.shards
            )
            self._writers[split] = writer.__enter__()
        writer = self._writers[split]
        samples = list(zip(batch.keys, batch.captions, prediction.cpu().numpy(), strict=True))
        for at, (key, captions, tokens) in enumerate(samples[done:], done):
            texts = list(islice(embeddings, len(captions)))
            complete = writer.shards
            writer.write(
                {
                    "__key__": key,
                    "tokens.npy": tokens.astype(np.uint16 if tokens.max() < 2**16 else np.int32),
                    "text.npy": np.concatenate(texts),
                    "json": {
                        "captions": captions,
                        "text_lengths": [len(text) for text in texts],
                        "fps": self._fps,
                        "fingerprint": self._fingerprint,
                    },
                }
            )
            if writer.shards > complete and _limit(trainer) is None:
                with_this = writer.complete == writer.samples
                self._reached[split] = _Reached(writer.shards, number, at + 1 if with_this else at)
                write_settings(self._reached_file(trainer.global_rank), self._reached)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the folders of the splits to their final paths."""
        if self._dry_run:
            return
        self._close(None)
        trainer.strategy.barrier("TokenShardWriter.end")
        if trainer.is_global_zero:
            (self.partial / _COMPLETE).touch()
            self._publish()
            self._unlock()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove incomplete shards."""
        with suppress(OSError):  # a full disk also refuses the end of a file
            self._close(exception)
        if self._locked:
            if any(self.partial.glob("reached-*.json")):
                print(f"The complete shards are kept in {self.partial}: the same command continues.", flush=True)
            else:
                shutil.rmtree(self.partial, ignore_errors=True)
            self._unlock()

    def _open_partial(self, trainer: Trainer) -> str:
        """Lock the folder of incomplete shards and prepare it; return why it cannot be used, or an empty string."""
        limit = _limit(trainer)
        digests = [loader.dataset.digest() for loader in trainer.predict_dataloaders]  # type: ignore[union-attr]
        settings = {
            **self._fingerprint,
            "samples_per_shard": self.samples_per_shard,
            "devices": trainer.world_size,
            "precision": str(trainer.precision),
            **({} if limit is None else {"limit_predict_batches": limit}),
            "source": digests,
        }
        try:
            self._lock.enter_context(locked(self.partial))
            if not any(self.partial.glob("reached-*.json")):  # nothing to continue
                for path in self.partial.iterdir():
                    if path.name != LOCK:
                        remove(path)
            begin_or_continue(self.partial, self.partial / "settings.json", settings)
        except UserError as error:
            self._unlock()
            return str(error)
        self._locked = True
        return ""

    def _unlock(self) -> None:
        self._lock.close()
        self._locked = False

    def _read_reached(self, rank: int) -> dict[str, "_Reached"]:
        """Return how far this rank has got in each split, after removing shards that were not recorded."""
        stored = read_settings(self._reached_file(rank)) or {}
        reached = {split: _Reached(*values) for split, values in stored.items()}
        for split in self.partial.glob("*/"):
            recorded = reached.get(split.name, _Reached()).shards
            names = [f"{_prefix(rank)}-{number:06d}" for number in range(recorded)]
            if missing := [name for name in names if not (split / f"{name}.tar").exists()]:
                raise UserError(f"'{split}' lacks {missing[0]}.tar, which was complete: delete {self.partial}.")
            for path in split.glob(f"{_prefix(rank)}-*"):
                if path.name.partition(".")[0] not in names:
                    remove(path)
        return reached

    def _reached_file(self, rank: int) -> Path:
        return self.partial / f"reached-{rank:04d}.json"

    def _publish(self) -> None:
        for folder in sorted(self.partial.glob("*/")):
            folder.replace(self.output_dir / folder.name)
            print(f"Wrote        {self.output_dir / folder.name}", flush=True)
        shutil.rmtree(self.partial, ignore_errors=True)

    def _close(self, error: BaseException | None) -> None:
        while self._writers:
            self._writers.popitem()[1].__exit__(type(error) if error else None, error, None)


class _Reached(NamedTuple):
    """How far a rank has got in a split."""

    shards: int = 0
    """Complete shards."""
    batch: int = 0
    """The batch with the last sample in them."""
    samples: int = 0
    """The samples of this batch in them."""


def _limit(trainer: Trainer) -> int | float | None:
    """Return the trainer's limit of batches; None for all of them, which is 1.0, while 1 is one batch."""
    limit: int | float = trainer.limit_predict_batches  # type: ignore[attr-defined]
    return None if isinstance(limit, float) and limit == 1.0 else limit


def _prefix(rank: int) -> str:
    return f"shard-{rank:04d}"


class _EmbeddingCache:
    """Embeds captions, and keeps recent embeddings for captions that occur again."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder
        self.embeddings: dict[str, Embedding] = {}
        self.bytes = 0

    def embed(self, captions: list[str]) -> list[Embedding]:
        """Return the embeddings of all captions, which are as if each caption were embedded alone."""
        new = sorted(set(captions) - self.embeddings.keys(), key=lambda caption: (len(caption), caption))
        for start in range(0, len(new), _BATCH_SIZE):
            self._embed_batch(new[start : start + _BATCH_SIZE])
        found = [self.embeddings[caption] for caption in captions]
        while self.bytes > _CACHE_BYTES:
            oldest = next(iter(self.embeddings))
            self.bytes -= self.embeddings.pop(oldest).nbytes
        return found

    def _embed_batch(self, captions: list[str]) -> None:
        text = self.encoder.encode_batch(captions)
        tokens = text.tokens.half().cpu().numpy()
        for caption, padded, length in zip(captions, tokens, text.mask.sum(1).tolist(), strict=True):
            self.embeddings[caption] = padded[:length].copy()
            self.bytes += self.embeddings[caption].nbytes
