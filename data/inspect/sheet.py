"""The contact sheet: a picture of the first clips of a set of shards, with their captions.

Frames of token shards, which have no pictures without the tokenizer, are drawn as squares with one colour per token.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Num, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from data.captions import read_captions
from data.members import TEXT_EXTENSIONS
from data.shards import Sample, ShardSet
from t2v.errors import UserError
from t2v.video import read_at

_CELL, _GAP, _LINE = 96, 6, 14
"""Pixels: longer side of a frame, space between two frames, height of a line of text."""
_TOKENS = "tokens.npy"


def sheet_path(path: str, shards: ShardSet, sheet: Path | None) -> Path:
    """Return the path of the contact sheet.

    Args:
        path: Path of the shards as the user gave it.
        shards: The shards.
        sheet: The path that the user asked for; None for a file in the current folder named after the shards.

    Raises:
        UserError: If the path is not a PNG file in an existing folder, or the folder contains shards.
    """
    if sheet is None:
        parts = [part for part in path.replace("*", "").replace("\\", "/").split("/") if part not in ("", ".", "..")]
        sheet = Path("-".join(["inspect", *(part.removesuffix(".tar") for part in parts[-2:])]) + ".png")
    resolved = sheet.resolve()
    tars = {sample.shard for sample in shards.samples} | {sample.shard for sample in shards.skipped}
    folders = {Path(tar).resolve().parent for tar in tars}
    if not folders.isdisjoint(resolved.parents):
        raise UserError(f"'{sheet}' is among the shards of '{path}': name another folder with --sheet.")
    if resolved.suffix.lower() != ".png" or not resolved.parent.is_dir():
        raise UserError(f"'{sheet}' must be a .png file in a folder that exists: correct --sheet.")
    return sheet


def draw_sheet(shards: ShardSet, samples: Sequence[Sample], frames: int) -> Image.Image:
    """Return the contact sheet: for each clip a line with key and first caption, and a row of frames.

    Args:
        shards: The shards.
        samples: The samples to draw.
        frames: Number of frames per clip, evenly from the first to the last.
    """
    width = _GAP + frames * (_CELL + _GAP)
    heading = f"The first of {len(shards):,} clips in {shards.path}."
    if any(_TOKENS in sample.members for sample in samples):
        heading += " Squares are tokens; equal tokens have equal colours."
    rows = [_draw_text(width, heading)]
    for sample in samples:
        title, pictures = _load_row(shards, sample, frames)
        rows += [_draw_text(width, title), _join_pictures(width, pictures)]
    sheet = Image.new("RGB", (width, _GAP + sum(row.height for row in rows)), "white")
    top = _GAP
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _load_row(shards: ShardSet, sample: Sample, frames: int) -> tuple[str, list[Image.Image]]:
    """Return title and pictures of a clip; there are none if it is corrupt."""
    title = sample.key
    try:
        members = shards.read(sample, *TEXT_EXTENSIONS, sample.video or _TOKENS)
        captions = read_captions(members)
        title = f"{sample.key}: {captions[0] if captions else 'no caption'}"
        if len(captions) > 1:
            title += f" (and {len(captions) - 1} more)"
        if not sample.frames:
            return f"{title}: does not decode", []
        indices = np.linspace(0, sample.frames - 1, frames).round().astype(int).tolist()
        content = members[sample.video or _TOKENS]
        return title, _load_pictures(content, indices, sample.fps if sample.video else None)
    except (ValueError, EOFError) as error:
        return f"{title}: {error}", []


def _load_pictures(content: bytes, indices: Sequence[int], fps: float | None) -> list[Image.Image]:
    """Return frames of a clip, resized to the cells of the sheet; of tokens if there is no frame rate."""
    if fps:
        video = read_at(content, [index / fps for index in indices], _subsample)
        pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in video]
        resampling = Image.Resampling.LANCZOS
    else:
        tokens = np.load(io.BytesIO(content), allow_pickle=False)
        pictures = [Image.fromarray(_colours(frame), "HSV").convert("RGB") for frame in tokens[list(indices)]]
        resampling = Image.Resampling.NEAREST
    scale = _CELL / max(pictures[0].size)
    size = (max(1, round(pictures[0].width * scale)), max(1, round(pictures[0].height * scale)))
    return [picture.resize(size, resampling) for picture in pictures]


def _subsample(frames: UInt8[Tensor, "t c height width"]) -> UInt8[Tensor, "t c smaller_height smaller_width"]:
    """Drop pixels that the sheet does not need, so that not all frames are held at full size."""
    step = max(1, min(frames.shape[-2:]) // (2 * _CELL))
    return frames[..., ::step, ::step]


def _colours(tokens: Num[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Return hue, saturation and value for each token; consecutive tokens get different colours."""
    hue, saturation, value = (tokens * step % 1 for step in (0.618034, 0.754878, 0.569840))
    return (255 * np.stack([hue, 0.5 + saturation / 2, 0.4 + 0.6 * value], axis=-1)).astype(np.uint8)


def _draw_text(width: int, text: str) -> Image.Image:
    """Draw one line of text; what does not fit is cut off."""
    line = Image.new("RGB", (width, _LINE), "white")
    ImageDraw.Draw(line).text((_GAP, 0), " ".join(text.split())[: width // 2], fill="black")
    return line


def _join_pictures(width: int, pictures: Sequence[Image.Image]) -> Image.Image:
    """Join pictures to one row."""
    height = max((picture.height for picture in pictures), default=0)
    row = Image.new("RGB", (width, _GAP + height), "white")
    for i, picture in enumerate(pictures):
        row.paste(picture, (_GAP + i * (_CELL + _GAP), 0))
    return row
