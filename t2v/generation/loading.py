"""Reading a checkpoint and options to generate with; checks of the parts of a model, and of a folder to write."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t2v.checkpoints.config import from_config
from t2v.checkpoints.storage import read_checkpoint
from t2v.errors import UserError, reason_of
from t2v.generation.sampling import Sampler
from t2v.generation.schedules import Schedule
from t2v.text import TextEncoder
from t2v.transformer.model import VideoTransformer
from t2v.vqvae.model import VQVAE

OBJECT_SETTINGS: dict[str, type] = {"guidance": Schedule, "sampler": Sampler, "text_encoder": TextEncoder}
"""Options that are objects, stored as a class path and arguments."""


def read_options(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `TextToVideo` that are stored with the models."""
    objects = {key: from_config(stored[key], kind) for key, kind in OBJECT_SETTINGS.items()}
    candidates = int(stored.get("candidates", 1))
    return {**objects, "fps": float(stored["fps"]), "frames": int(stored["frames"]), "candidates": candidates}


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of stage 2.

    Raises:
        UserError: If it does not exist or is damaged.
    """
    if not path.exists():
        raise UserError(
            f"There is no checkpoint at '{path}': give the path of a .ckpt file that `fit` of stage 2 wrote."
        )
    try:
        return read_checkpoint(path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"'{path}' is not a checkpoint, or it is damaged ({reason_of(error)}): give the path of a .ckpt file that "
            "`fit` of stage 2 wrote."
        ) from error


def check_target(folder: Path) -> None:
    """Check that a folder can be written: it does not exist, or is empty.

    Raises:
        UserError: If it is something else.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"'{folder}' exists already and is not an empty folder: give another, or remove it.")


def check_parts(transformer: VideoTransformer, vqvae: VQVAE, text_encoder: TextEncoder) -> None:
    """Check that models and text encoder fit each other.

    Raises:
        UserError: If a size differs, with both values.
    """
    if (vqvae.codebook_size, vqvae.grid_size) != (transformer.vocab_size, transformer.grid_size):
        raise UserError(
            f"The VQ-VAE has {vqvae.codebook_size} codes on a grid of {vqvae.grid_size}×{vqvae.grid_size}, but the "
            f"transformer has vocab_size={transformer.vocab_size} and grid_size={transformer.grid_size}: they must be "
            "equal."
        )
    if text_encoder.width != transformer.text.dim:
        raise UserError(
            f"The text encoder {text_encoder.name} has width {text_encoder.width}, but the transformer has "
            f"text.dim={transformer.text.dim}: they must be equal."
        )
