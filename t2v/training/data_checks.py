"""Checks that the token shards of a run fit its networks and the videos that it generates."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from t2v.errors import UserError


def warn_of_short_clips(trainer: Trainer, window: int, frames: int) -> None:
    """Warn if generated videos need distances between frames, and text gates, that no training clip contains.

    Args:
        trainer: Nothing is checked unless it trains. The `buckets` of its DataModule, or else its `frames`, are the
            lengths of training clips; a DataModule may have neither.
        window: Frames that a temporal layer attends to.
        frames: Length of generated videos.
    """
    if trainer.state.fn != "fit":
        return
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    buckets = getattr(datamodule, "buckets", None)
    longest = max(bucket.frames for bucket in buckets) if buckets else getattr(datamodule, "frames", None)
    needed = min(window, frames)
    if longest is not None and longest < needed:
        rank_zero_warn(
            f"The longest training clips have {longest} frames, but generation.frames={frames} and "
            f"attention.window={window}: frames after the first {longest} attend over distances in time that training "
            f"never sees, so train on clips of {needed} frames (data.frames or data.buckets), or lower "
            f"generation.frames or attention.window to {longest}."
        )


def warn_of_guidance(caption_dropout: float, guided: bool) -> None:
    """Warn if videos are generated with guidance by a model that is not trained without captions.

    Args:
        caption_dropout: Fraction of training clips without their caption.
        guided: Whether there is guidance.
    """
    if guided and not caption_dropout:
        rank_zero_warn(
            "model.objective.caption_dropout=0 trains no prediction without text, from which guidance leads away: set "
            "it to about 0.1, or model.generation.guidance and model.generation.candidates to 1."
        )


def check_fingerprint(fingerprint: dict[str, Any], tokenizer: str, text_encoder: str, source: str) -> None:
    """Check that tokens and text embeddings were made by the networks of a run.

    Args:
        fingerprint: The fingerprint of the token shards.
        tokenizer: Fingerprint of the run's VQ-VAE.
        text_encoder: Name of the run's text encoder.
        source: Where the fingerprint is from.

    Raises:
        UserError: If one of them differs.
    """
    for key, ours in (("tokenizer", tokenizer), ("text_encoder", text_encoder)):
        expected = fingerprint.get(key)
        if expected != ours:
            raise UserError(
                f"model.{key} is {ours}, but {source} were made with {expected}: give that {key}, or write the token "
                "shards again with `predict` of stage 1 and train on those."
            )
