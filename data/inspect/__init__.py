"""Look into a set of shards: `python -m data.inspect SHARDS`.

It prints what they hold and what is wrong with them, and draws the first clips with their captions. Captions and tokens
of every sample are read; of videos, some are decoded. Token shards have no pictures without the tokenizer: what is
drawn of them is their tokens, each a colour.
"""

import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Num, UInt8
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from data.shards import BadSample, Sample, ShardSet
from t2v.errors import UserError
from t2v.video import read_frames

_LINES = 20
"""So many bad samples are printed; the others are counted."""
_CELL, _GAP, _LINE = 96, 6, 14
"""Pixels of the contact sheet: the longer side of a frame, the space between two, a line of text."""

Rows = list[tuple[str, str]]


class Videos:
    """What video shards hold; the clips of these keys and shards are decoded from start to end."""

    member, needed = "mp4", ("txt",)

    def __init__(self, decoded: set[tuple[str, str]]) -> None:
        self.decoded, self.captions = decoded, Captions()

    def look(self, shards: ShardSet, sample: Sample) -> Iterable[str]:
        """Reads a sample; yields what is wrong with it."""
        decode = (sample.key, sample.shard) in self.decoded
        members = shards.read(sample, "txt", "json", *(["mp4"] if decode else []))
        yield from self.captions.look(members)
        if not sample.frames:
            yield f"its mp4 does not decode ({sample.reason})"
        elif decode:
            try:
                read_frames(members["mp4"], range(sample.frames), lambda frames: frames[..., :1, :1])
            except ValueError as error:
                yield f"its mp4 does not decode ({error})"

    def rows(self, samples: Sequence[Sample]) -> Rows:
        """The table."""
        clips = [sample for sample in samples if sample.frames]
        return [
            ("frames a clip", _spread([sample.frames for sample in clips])),
            ("frames a second", _counts(f"{sample.fps:g}" for sample in clips)),
            ("width x height", _counts(f"{sample.width}x{sample.height}" for sample in clips)),
            ("in all", f"{sum(sample.frames / sample.fps for sample in clips) / 3600:.2f} hours"),
            *self.captions.rows(),
            ("decoded to check", f"{len(self.decoded):,} of {len(samples):,} clips"),
        ]

    def problems(self) -> Iterable[str]:
        """What is wrong with the set as a whole."""
        return ()


class Tokens:
    """What token shards hold."""

    member, needed = "tokens.npy", ("text.npy", "pooled.npy", "json")

    def __init__(self) -> None:
        self.captions, self.texts = Captions(), list[int]()
        self.grids, self.types, self.widths = Counter[str](), Counter[str](), Counter[str]()
        self.fingerprints, self.codes = Counter[str](), set[int]()

    def look(self, shards: ShardSet, sample: Sample) -> Iterable[str]:
        """Reads a sample; yields what is wrong with it."""
        members = shards.read(sample, self.member, *self.needed)
        yield from self.captions.look(members)
        told = _json(members)
        fingerprint = told.get("fingerprint") or {}
        self.fingerprints[json.dumps(fingerprint, sort_keys=True)] += 1
        arrays = {}
        for name in members.keys() & {"tokens.npy", "text.npy", "pooled.npy"}:
            try:
                arrays[name] = np.load(io.BytesIO(members[name]), allow_pickle=False)
            except (ValueError, EOFError) as error:
                yield f"its {name} cannot be read ({error})"
        if "tokens.npy" in arrays:
            yield from self._look_at_tokens(arrays["tokens.npy"], fingerprint.get("codebook_size", np.inf))
        if {"text.npy", "pooled.npy"} <= arrays.keys():
            yield from self._look_at_text(arrays["text.npy"], arrays["pooled.npy"], told)

    def _look_at_tokens(self, tokens: np.ndarray, codes: int | float) -> Iterable[str]:
        self.types[str(tokens.dtype)] += 1
        if tokens.ndim != 3 or tokens.dtype.kind not in "iu" or not tokens.size:
            yield f"its tokens are {tokens.dtype} of shape {tokens.shape}, not whole numbers (frames, height, width)"
            return
        self.grids["x".join(map(str, tokens.shape))] += 1
        seen = np.unique(tokens).tolist()
        self.codes.update(seen)
        if seen[0] < 0 or seen[-1] >= codes:
            yield f"its tokens reach from {seen[0]} to {seen[-1]}, but codes go from 0 to {codes - 1}"

    def _look_at_text(self, text: np.ndarray, pooled: np.ndarray, told: dict[str, Any]) -> Iterable[str]:
        if text.ndim != 2 or pooled.ndim not in (1, 2):
            yield f"its text.npy and pooled.npy have the shapes {text.shape} and {pooled.shape}"
            return
        captions = len(told.get("captions") or [""])
        lengths = told.get("text_lengths") or [len(text)]
        if sum(lengths) != len(text) or len(lengths) != captions:
            yield f"its text.npy has the shape {text.shape}, but {captions} captions have the lengths {lengths}"
        if pooled.shape[-1:] != text.shape[-1:] or pooled.size != captions * pooled.shape[-1]:
            yield f"its pooled.npy has the shape {pooled.shape}, but there are {captions} captions"
        if not (np.isfinite(text).all() and np.isfinite(pooled).all()):
            yield "its text embedding has values that are no numbers"
        self.texts += lengths
        self.widths[f"{text.shape[-1]} ({text.dtype})"] += 1

    def rows(self, samples: Sequence[Sample]) -> Rows:
        """The table."""
        fields = json.loads(self.fingerprints.most_common(1)[0][0])
        seen = f"{len(self.codes):,}, from {min(self.codes)} to {max(self.codes)}" if self.codes else "none"
        return [
            ("frames x height x width", _counts(self.grids.elements())),
            ("stored as", _counts(self.types.elements())),
            ("codes that occur", seen),
            *self.captions.rows(),
            ("vectors a caption", _spread(self.texts)),
            ("width of a vector", _counts(self.widths.elements())),
            *((f"fingerprint: {name}", str(value)) for name, value in fields.items()),
        ]

    def problems(self) -> Iterable[str]:
        """What is wrong with the set as a whole."""
        if len(self.fingerprints) > 1:
            found = [json.loads(text) for text in self.fingerprints]
            names = sorted(
                {name for one in found for name in one if any(one[name] != other.get(name) for other in found)}
            )
            yield (
                f"{len(found)} different fingerprints, which differ in {', '.join(names)}: their tokens do not go "
                "together"
            )
        if "{}" in self.fingerprints:
            yield f"{self.fingerprints['{}']} samples have no fingerprint: nobody knows what made them"


class Captions:
    """How many captions there are, and how long."""

    def __init__(self) -> None:
        self.clips, self.words, self.characters = list[int](), list[int](), list[int]()

    def look(self, members: dict[str, bytes]) -> Iterable[str]:
        """Counts those of a sample; yields what is wrong with them."""
        captions = []
        try:
            captions = _captions(members)
        except UnicodeDecodeError:
            yield "its caption is not UTF-8"
        except ValueError as error:
            yield f"its json cannot be read ({error})"
        self.clips.append(len(captions))
        self.words += [len(caption.split()) for caption in captions]
        self.characters += [len(caption) for caption in captions]

    def rows(self) -> Rows:
        """The table."""
        without = self.clips.count(0)
        return [
            ("with a caption", f"{len(self.clips) - without:,}; without {without:,}"),
            ("captions a clip", _spread([count for count in self.clips if count])),
            ("words a caption", _spread(self.words)),
            ("characters a caption", _spread(self.characters)),
        ]


def inspect(shards: str, sheet: Path | None = None, clips: int = 12, frames: int = 8, decode: int = 64) -> None:
    """Say what a set of shards holds and what is wrong with it, and draw its first clips.

    The exit status is 0 where all is sound, 1 where something is wrong, and 2 where there are no shards to look into.

    Args:
        shards: a folder of shards, one tar or a pattern, or their address.
        sheet: PNG file for the first clips; `inspect-FOLDER-SHARDS.png` in the current folder where it is not given.
        clips: how many clips to draw; none with 0.
        frames: frames to draw of each, evenly from the first to the last.
        decode: how many videos to decode from start to end, evenly among all; all of them with -1.
    """
    if clips < 0 or frames < 1 or decode < -1:
        raise UserError(
            f"clips={clips} must be at least 0, frames={frames} at least 1, and decode={decode} at least -1."
        )
    opened = ShardSet(shards)
    file = _sheet_file(shards, opened, sheet) if clips else None
    bad, drawn = list(opened.bad), []
    for found in (Videos(_spaced(opened.samples, decode)), Tokens()):
        samples = [sample for sample in opened.samples if found.member in sample.members]
        if samples:
            bad += _look(opened, samples, found)
            drawn += samples[:clips]
    for sample in opened.samples:
        if not {Videos.member, Tokens.member} & sample.members.keys():
            bad.append(BadSample(sample.key, sample.shard, f"it has {', '.join(sample.members)}, which makes no clip"))
    if file and drawn:
        _save(_draw(opened, drawn, frames), file)
        print(f"\n{file} shows the first clips.")
    if bad or not drawn:
        _print_bad(bad)
        raise SystemExit(1)
    print("\nNothing is wrong.")


def _captions(members: dict[str, bytes]) -> list[str]:
    """All that is said of a clip, in its txt and its json; a `ValueError` where that cannot be read."""
    told = _json(members, strict=True)
    first = members["txt"].decode() if "txt" in members else str(told.get("caption") or "")
    others = [str(caption) for caption in told.get("captions") or []]
    return [caption for caption in dict.fromkeys(text.strip() for text in (first, *others)) if caption]


def _json(members: dict[str, bytes], strict: bool = False) -> dict[str, Any]:
    """What the json says; nothing where it cannot be read, unless that is to be an error."""
    try:
        told = json.loads(members.get("json", b"{}"))
        if not isinstance(told, dict):
            raise ValueError("it is no object")
        return told
    except ValueError:
        if strict:
            raise
        return {}


def _spaced(samples: Sequence[Sample], most: int) -> set[tuple[str, str]]:
    """So many of the videos that can be decoded, evenly among them."""
    videos = [(sample.key, sample.shard) for sample in samples if Videos.member in sample.members and sample.frames]
    count = len(videos) if most < 0 else min(most, len(videos))
    return {videos[i * len(videos) // count] for i in range(count)}


def _look(shards: ShardSet, samples: Sequence[Sample], found: Videos | Tokens) -> list[BadSample]:
    """Go through the samples of one kind, print the table, and return what is wrong."""
    bad = []
    needed = [name for name in found.needed if any(name in sample.members for sample in samples)]
    try:
        for sample in tqdm(samples, f"reading {found.member}", unit="sample", leave=False):
            missing = [name for name in needed if name not in sample.members]
            reasons = [f"it has no {' and no '.join(missing)}"] if missing else []
            bad += [BadSample(sample.key, sample.shard, reason) for reason in (*reasons, *found.look(shards, sample))]
    except OSError as error:
        raise UserError(
            f"Cannot read the shards in '{shards.path}' ({error}): try again, or copy them again."
        ) from error
    bad += [BadSample("", shards.path, reason) for reason in found.problems()]
    members = Counter(name for sample in samples for name in sample.members)
    size = sum(size for sample in samples for _, size in sample.members.values())
    rows = [
        ("shards", f"{len({sample.shard for sample in samples}):,}"),
        ("samples", f"{len(samples):,}"),
        ("members", ", ".join(f"{name} {count:,}" for name, count in members.items())),
        ("bytes", f"{size:,} ({size / len(samples):,.0f} a sample)"),
        *found.rows(samples),
    ]
    width = max(len(name) for name, _ in rows)
    print(f"\n{shards.path}: {'videos' if isinstance(found, Videos) else 'tokens'}\n")
    print("\n".join(f"  {name:<{width}}  {value}" for name, value in rows))
    return bad


def _spread(values: Sequence[int]) -> str:
    """The least, the median and the most of some numbers."""
    if not values:
        return "none"
    least, median, most = np.quantile(values, [0, 0.5, 1])
    return f"{least:g}" if least == most else f"{least:g} to {most:g}, median {median:g}"


def _counts(values: Iterable[str]) -> str:
    """The values that occur, the most frequent first, and how often."""
    counts = Counter(values).most_common()
    if len(counts) == 1:
        return counts[0][0]
    more = f" and {len(counts) - 6} others" if len(counts) > 6 else ""
    return ", ".join(f"{value} ({count:,})" for value, count in counts[:6]) + more if counts else "none"


def _print_bad(bad: Sequence[BadSample]) -> None:
    print(f"\n{len(bad)} things are wrong:" if bad else "\nThere is no clip in it.")
    for key, shard, reason in bad[:_LINES]:
        print(f"  {f'{key} in ' if key else ''}{shard}: {reason}")
    if len(bad) > _LINES:
        print(f"  … and {len(bad) - _LINES:,} more")


def _sheet_file(path: str, shards: ShardSet, sheet: Path | None) -> Path:
    """Where the contact sheet goes.

    Raises:
        UserError: where that is no place for it.
    """
    if sheet is None:
        parts = [part for part in path.replace("*", "").replace("\\", "/").split("/") if part not in ("", ".", "..")]
        sheet = Path("-".join(["inspect", *(part.removesuffix(".tar") for part in parts[-2:])]) + ".png")
    place = sheet.resolve()
    known = [sample.shard for sample in shards.samples] + [sample.shard for sample in shards.bad]
    folders = {Path(shard).resolve().parent for shard in set(known)}
    if not folders.isdisjoint(place.parents):
        raise UserError(f"'{sheet}' would lie among the shards of '{path}': name another place with --sheet.")
    if place.suffix.lower() != ".png" or not place.parent.is_dir():
        raise UserError(f"'{sheet}' must be a .png file in a folder that exists: correct --sheet.")
    return sheet


def _save(picture: Image.Image, file: Path) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        picture.save(partial, "PNG")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _draw(shards: ShardSet, samples: Sequence[Sample], frames: int) -> Image.Image:
    """The contact sheet: of each clip its key, its first caption and some frames."""
    width = _GAP + frames * (_CELL + _GAP)
    heading = f"The first of {len(shards):,} clips in {shards.path}."
    if any(Tokens.member in sample.members for sample in samples):
        heading += " Squares are tokens; equal tokens have equal colours."
    rows = [_text(width, heading)]
    for sample in samples:
        pictures, told = [], sample.key
        try:
            members = shards.read(sample, "txt", "json", Videos.member, Tokens.member)
            captions = _captions(members)
            more = f" (and {len(captions) - 1} more)" if captions[1:] else ""
            told = f"{sample.key}: {captions[0] if captions else 'no caption'}{more}"
            if not sample.frames:
                told += ": does not decode"
            else:
                pictures = _pictures(members, np.linspace(0, sample.frames - 1, frames).round().astype(int).tolist())
        except (ValueError, EOFError) as error:
            told = f"{told}: {error}"
        row = Image.new("RGB", (width, _GAP + max([0, *(picture.height for picture in pictures)])), "white")
        for i, picture in enumerate(pictures):
            row.paste(picture, (_GAP + i * (_CELL + _GAP), 0))
        rows += [_text(width, told), row]
    sheet = Image.new("RGB", (width, _GAP + sum(row.height for row in rows)), "white")
    top = _GAP
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _text(width: int, text: str) -> Image.Image:
    """One line, cut off where it is too long."""
    line = Image.new("RGB", (width, _LINE), "white")
    ImageDraw.Draw(line).text((_GAP, 0), " ".join(text.split())[: width // 2], fill="black")
    return line


def _pictures(members: dict[str, bytes], indices: Sequence[int]) -> list[Image.Image]:
    """Frames of a clip, none larger than a cell of the sheet."""
    if Videos.member in members:
        video = read_frames(
            members[Videos.member], indices, lambda frames: frames[..., :: _step(frames), :: _step(frames)]
        )
        pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in video]
    else:
        tokens = np.load(io.BytesIO(members[Tokens.member]), allow_pickle=False)
        pictures = [Image.fromarray(_colours(frame), "HSV").convert("RGB") for frame in tokens[list(indices)]]
    scale = _CELL / max(pictures[0].size)
    size = (max(1, round(pictures[0].width * scale)), max(1, round(pictures[0].height * scale)))
    smooth = Image.Resampling.LANCZOS if Videos.member in members else Image.Resampling.NEAREST
    return [picture.resize(size, smooth) for picture in pictures]


def _step(frames: UInt8[Tensor, "t c h w"]) -> int:
    """Every how many pixels are enough for the sheet."""
    return max(1, min(frames.shape[-2:]) // (2 * _CELL))


def _colours(tokens: Num[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Hue, saturation and value of each code; codes next to one another look different."""
    hue, saturation, value = (tokens * step % 1 for step in (0.618034, 0.754878, 0.569840))
    return (255 * np.stack([hue, 0.5 + saturation / 2, 0.4 + 0.6 * value], axis=-1)).astype(np.uint8)
