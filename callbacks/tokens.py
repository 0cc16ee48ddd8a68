"""Writes what stage 1 predicts as token shards, the training data of stage 2."""

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from data.shards import ShardWriter
from t2v.batch import VideoBatch
from t2v.errors import UserError
from t2v.text import TextEncoder

_TOGETHER = 64
"""So many captions are embedded in one pass."""
_REMEMBERED = 2**28
"""So many bytes of embeddings are kept for captions that come again."""


class TokenShardWriter(BasePredictionWriter):
    """Writes ``OUTPUT_DIR/SPLIT/shard-RANK-NUMBER.tar``, one folder a split of the data.

    A sample is ``KEY.tokens.npy`` (t, h, w); ``KEY.text.npy`` (l, d), the embeddings of all its captions one after the
    other, and ``KEY.pooled.npy`` (captions, d), both in float16; and ``KEY.json`` with the captions, the length of each
    one's embedding, the frame rate and a fingerprint of all that made it. The splits' folders appear when every sample
    is written; until then the shards lie in ``OUTPUT_DIR/.partial``.

    Args:
        output_dir: Where the splits' folders go. It must not hold them already.
        text_encoder: Embeds the captions; one that comes again soon is not embedded again.
        samples_per_shard: Clips in one tar file.
    """

    def __init__(self, output_dir: str, text_encoder: TextEncoder, samples_per_shard: int = 1000) -> None:
        super().__init__(write_interval="batch")
        self.output_dir = Path(output_dir)
        self.partial = self.output_dir / ".partial"
        self.text_encoder = text_encoder
        self._embeddings = _Embeddings(text_encoder)
        self.samples_per_shard = samples_per_shard
        self._writers: dict[str, ShardWriter] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to mix new shards with old ones, before anything is computed."""
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
        """Note what every sample's json says alike."""
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
            embeddings = iter(self._embeddings.of([caption for captions in batch.captions for caption in captions]))
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
        """Give the finished folders their names."""
        self._close(None)
        trainer.strategy.barrier("TokenShardWriter.end")
        if not trainer.is_global_zero:
            return
        for folder in sorted(self.partial.iterdir()) if self.partial.is_dir() else []:
            folder.replace(self.output_dir / folder.name)
            print(f"Wrote        {self.output_dir / folder.name}", flush=True)
        shutil.rmtree(self.partial, ignore_errors=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing that looks complete."""
        if self._writers:
            self._close(exception)
            shutil.rmtree(self.partial, ignore_errors=True)

    def _close(self, error: BaseException | None) -> None:
        while self._writers:
            self._writers.popitem()[1].__exit__(type(error) if error else None, error, None)


class _Embeddings:
    """Embeddings of captions as they are stored: the word pieces (l, d) without padding, and the whole (d)."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder
        self.known: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.bytes = 0

    def of(self, captions: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.known]
        for at in range(0, len(new), _TOGETHER):
            self._embed(new[at : at + _TOGETHER])
        found = [self.known[caption] for caption in captions]
        while self.bytes > _REMEMBERED:
            text, pooled = self.known.pop(next(iter(self.known)))  # the oldest
            self.bytes -= text.nbytes + pooled.nbytes
        return found

    def _embed(self, captions: list[str]) -> None:
        text = self.encoder.encode_batch(captions)
        lengths = text.mask.sum(1).tolist()
        tokens, pooled = text.tokens.half().cpu().numpy(), text.pooled.half().cpu().numpy()
        for i, caption in enumerate(captions):
            self.known[caption] = tokens[i, : lengths[i]].copy(), pooled[i].copy()
            self.bytes += sum(array.nbytes for array in self.known[caption])
