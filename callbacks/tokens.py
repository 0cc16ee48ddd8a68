"""Writes the tokens that stage 1 predicts as token shards, the training data of stage 2."""

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16, Int
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from data.shards import ShardWriter
from t2v.batch import VideoBatch
from t2v.errors import UserError, check_range
from t2v.text import TextEncoder

_BATCH_SIZE = 64
"""Captions that are embedded in one pass."""
_CACHE_BYTES = 2**28
"""Bytes of embeddings that are kept for captions that occur again."""

Embedding = tuple[Float16[np.ndarray, "l d"], Float16[np.ndarray, " d"]]
"""Embeddings of the text tokens of a caption without padding, and the pooled text embedding."""


class TokenShardWriter(BasePredictionWriter):
    """Writes ``OUTPUT_DIR/SPLIT/shard-RANK-NUMBER.tar``, one folder for each split of the data.

    A sample is ``KEY.tokens.npy`` (t, h, w); ``KEY.text.npy`` (l, d), the text embeddings of all its captions
    concatenated, and ``KEY.pooled.npy`` (captions, d), both in float16; and ``KEY.json`` with the captions, the number
    of text tokens of each, the frame rate, and a fingerprint of the tokenizer, the text encoder and the frame rate. The
    folders of the splits appear when all samples are written; until then the shards are in ``OUTPUT_DIR/.partial``.

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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there are no older shards, which would be mixed with new ones.

        Raises:
            UserError: If the folder of a split is not empty.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "predict":
            return
        for split in trainer.datamodule.predict_splits:  # type: ignore[attr-defined]
            folder = self.output_dir / split
            if folder.is_dir() and any(folder.iterdir()):
                raise UserError(
                    f"{folder} already holds token shards: delete it, or give TokenShardWriter another output_dir."
                )
        trainer.strategy.barrier("TokenShardWriter.setup")
        if trainer.is_global_zero:
            shutil.rmtree(self.partial, ignore_errors=True)  # of a run that was killed
        trainer.strategy.barrier("TokenShardWriter.partial")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the metadata that all samples have in common."""
        self.text_encoder.to(pl_module.device)
        self._fps = float(trainer.datamodule.fps)  # type: ignore[attr-defined]
        self._fingerprint = {
            **pl_module.fingerprint(),  # type: ignore[operator]
            "fps": self._fps,
            "text_encoder": self.text_encoder.name,
            "text_width": self.text_encoder.width,
        }

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
        if split not in self._writers:
            writer = ShardWriter(
                self.partial / split, self.samples_per_shard, prefix=f"shard-{trainer.global_rank:04d}"
            )
            self._writers[split] = writer.__enter__()
        with trainer.profiler.profile(f"[TextEncoder]{self.text_encoder.name}"):  # type: ignore[attr-defined]
            all_captions = [caption for captions in batch.captions for caption in captions]
            embeddings = iter(self._embeddings.embed(all_captions))
        for key, captions, tokens in zip(batch.keys, batch.captions, prediction.cpu().numpy(), strict=True):
            texts, pooled = zip(*islice(embeddings, len(captions)), strict=True)
            self._writers[split].write(
                {
                    "__key__": key,
                    "tokens.npy": tokens.astype(np.uint16 if tokens.max() < 2**16 else np.int32),
                    "text.npy": np.concatenate(texts),
                    "pooled.npy": np.stack(pooled),
                    "json": {
                        "captions": captions,
                        "text_lengths": [len(text) for text in texts],
                        "fps": self._fps,
                        "fingerprint": self._fingerprint,
                    },
                }
            )

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the folders of the splits to their final paths."""
        self._close(None)
        trainer.strategy.barrier("TokenShardWriter.end")
        if not trainer.is_global_zero:
            return
        for folder in sorted(self.partial.iterdir()) if self.partial.is_dir() else []:
            folder.replace(self.output_dir / folder.name)
            print(f"Wrote        {self.output_dir / folder.name}", flush=True)
        shutil.rmtree(self.partial, ignore_errors=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove incomplete shards."""
        if self._writers:
            self._close(exception)
            shutil.rmtree(self.partial, ignore_errors=True)

    def _close(self, error: BaseException | None) -> None:
        while self._writers:
            self._writers.popitem()[1].__exit__(type(error) if error else None, error, None)


class _EmbeddingCache:
    """Embeds captions, and keeps recent embeddings for captions that occur again."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder
        self.embeddings: dict[str, Embedding] = {}
        self.bytes = 0

    def embed(self, captions: list[str]) -> list[Embedding]:
        """Return the embeddings of all captions, which are as if each caption were embedded alone."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.embeddings]
        for start in range(0, len(new), _BATCH_SIZE):
            self._embed_batch(new[start : start + _BATCH_SIZE])
        found = [self.embeddings[caption] for caption in captions]
        while self.bytes > _CACHE_BYTES:
            oldest = next(iter(self.embeddings))
            text, pooled = self.embeddings.pop(oldest)
            self.bytes -= text.nbytes + pooled.nbytes
        return found

    def _embed_batch(self, captions: list[str]) -> None:
        text = self.encoder.encode_batch(captions)
        lengths = text.mask.sum(1).tolist()
        tokens, pooled = text.tokens.half().cpu().numpy(), text.pooled.half().cpu().numpy()
        for i, caption in enumerate(captions):
            self.embeddings[caption] = tokens[i, : lengths[i]].copy(), pooled[i].copy()
            self.bytes += sum(array.nbytes for array in self.embeddings[caption])
