"""Checks and statistics of the samples of a set of shards.

A check goes through the samples of one kind: `problems_of` reads one and yields what is wrong with it, `rows` returns
the table of what the samples contain, and `problems` yields what is wrong with the set as a whole.
"""

import io
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from data.captions import read_captions, read_embedded_captions, read_metadata
from data.members import TEXT_EXTENSIONS, TOKEN_TEXT_MEMBERS, missing_text
from data.shards import Sample, ShardSet
from t2v.video import stream_frames

Rows = list[tuple[str, str]]
"""Names and values of a table."""

_MOST_FREQUENT = 6
"""Values that `_format_counts` names; the others are counted."""


class Check(ABC):
    """A check of the samples of one kind.

    Attributes:
        name: Name of the kind.
    """

    name: str

    @abstractmethod
    def has(self, sample: Sample) -> bool:
        """Return whether a sample is of this kind."""

    @abstractmethod
    def problems_of(self, shards: ShardSet, sample: Sample) -> Iterator[str]:
        """Read a sample, add it to the statistics, and yield what is wrong with it."""

    @abstractmethod
    def rows(self, samples: Sequence[Sample]) -> Rows:
        """Return the table of what the samples contain."""

    def problems(self) -> Iterator[str]:
        """Yield what is wrong with the set as a whole."""
        yield from ()


class VideoCheck(Check):
    """A check of video shards.

    Args:
        decoded: Key and shard of the videos to decode from start to end.
        captioned: Whether any video has a caption; then one without is a problem.
    """

    name = "videos"

    def __init__(self, decoded: set[tuple[str, str]], captioned: bool) -> None:
        self.decoded, self.captioned, self.captions = decoded, captioned, CaptionStatistics()

    def has(self, sample: Sample) -> bool:
        return sample.video is not None

    def problems_of(self, shards: ShardSet, sample: Sample) -> Iterator[str]:
        video = sample.video
        assert video is not None
        decode = (sample.key, sample.shard) in self.decoded
        members = shards.read(sample, *TEXT_EXTENSIONS, *([video] if decode else []))
        yield from self.captions.problems_of(members, sample.flaw)
        if self.captioned and not (sample.captions or sample.flaw):
            yield "it has no caption"
        if not sample.frames:
            yield f"its {video} does not decode ({sample.reason})"
        elif decode:
            try:
                for _ in stream_frames(members[video]):
                    pass
            except ValueError as error:
                yield f"its {video} does not decode ({error})"

    def rows(self, samples: Sequence[Sample]) -> Rows:
        videos = [sample for sample in samples if sample.frames]
        return [
            ("frames per clip", _format_range([sample.frames for sample in videos])),
            ("frames per second", _format_counts(f"{sample.fps:g}" for sample in videos)),
            ("width x height", _format_counts(f"{sample.width}x{sample.height}" for sample in videos)),
            ("total length", f"{sum(sample.frames / sample.fps for sample in videos) / 3600:.2f} hours"),
            *self.captions.rows(),
            ("decoded to check", f"{len(self.decoded):,} of {len(samples):,} clips"),
        ]


class TokenCheck(Check):
    """A check of token shards."""

    name = "tokens"

    def __init__(self) -> None:
        self.captions = CaptionStatistics()
        self.text_tokens: list[int] = []
        self.tokens: set[int] = set()
        self.shapes: Counter[str] = Counter()
        self.types: Counter[str] = Counter()
        self.widths: Counter[str] = Counter()
        self.fingerprints: Counter[str] = Counter()

    def has(self, sample: Sample) -> bool:
        return "tokens.npy" in sample.members

    def problems_of(self, shards: ShardSet, sample: Sample) -> Iterator[str]:
        if missing := missing_text(sample.members):
            yield missing
        members = shards.read(sample, "tokens.npy", *TOKEN_TEXT_MEMBERS)
        yield from self.captions.problems_of(members, sample.flaw)
        try:
            metadata = read_metadata(members)
        except ValueError:  # reported with the captions
            metadata = {}
        fingerprint = metadata.get("fingerprint")
        if not isinstance(fingerprint, dict):
            fingerprint = {}
        self.fingerprints[json.dumps(fingerprint, sort_keys=True)] += 1
        arrays = {}
        for name in members.keys() & {"tokens.npy", "text.npy"}:
            try:
                arrays[name] = np.load(io.BytesIO(members[name]), allow_pickle=False)
            except (ValueError, EOFError) as error:
                yield f"its {name} cannot be read ({error})"
        if "tokens.npy" in arrays:
            yield from self._problems_of_tokens(arrays["tokens.npy"], fingerprint.get("codebook_size"))
        if "text.npy" in arrays:
            yield from self._problems_of_text(arrays["text.npy"], metadata)

    def _problems_of_tokens(self, tokens: Shaped[np.ndarray, "..."], codebook_size: int | None) -> Iterator[str]:
        self.types[str(tokens.dtype)] += 1
        if tokens.ndim != 3 or tokens.dtype.kind not in "iu" or not tokens.size:
            yield f"its tokens are {tokens.dtype} of shape {tokens.shape}, not integers of (frames, height, width)"
            return
        self.shapes["x".join(map(str, tokens.shape))] += 1
        found = np.unique(tokens).tolist()
        self.tokens.update(found)
        if codebook_size is not None and (found[0] < 0 or found[-1] >= codebook_size):
            yield f"its tokens are from {found[0]} to {found[-1]}, outside the codebook (0 to {codebook_size - 1})"

    def _problems_of_text(self, text: Shaped[np.ndarray, "..."], metadata: dict[str, Any]) -> Iterator[str]:
        if text.ndim != 2:
            yield f"its text.npy has the shape {text.shape}, not (text tokens, width)"
            return
        try:
            _, lengths = read_embedded_captions(metadata, len(text))
        except ValueError as error:
            yield str(error)
            return
        if not np.isfinite(text).all():
            yield "its text embedding has values that are not finite"
        self.text_tokens += lengths
        self.widths[f"{text.shape[1]} ({text.dtype})"] += 1

    def rows(self, samples: Sequence[Sample]) -> Rows:
        fingerprint = json.loads(self.fingerprints.most_common(1)[0][0])
        found = f"{len(self.tokens):,}, from {min(self.tokens)} to {max(self.tokens)}" if self.tokens else "none"
        return [
            ("frames x height x width", _format_counts(self.shapes.elements())),
            ("stored as", _format_counts(self.types.elements())),
            ("codes used", found),
            *self.captions.rows(),
            ("text tokens per caption", _format_range(self.text_tokens)),
            ("width of text embedding", _format_counts(self.widths.elements())),
            *((f"fingerprint: {name}", str(value)) for name, value in fingerprint.items()),
        ]

    def problems(self) -> Iterator[str]:
        if len(self.fingerprints) > 1:
            found = [json.loads(text) for text in self.fingerprints]
            names = {name for one in found for name in one if any(one[name] != other.get(name) for other in found)}
            yield (
                f"{len(found)} different fingerprints, which differ in {', '.join(sorted(names))}: the tokens were "
                "written by different tokenizers or settings"
            )
        if "{}" in self.fingerprints:
            yield f"{self.fingerprints['{}']} samples have no fingerprint of the tokenizer that wrote them"


class CaptionStatistics:
    """Number and length of the captions of samples."""

    def __init__(self) -> None:
        self.captions_per_clip: list[int] = []
        self.words: list[int] = []
        self.characters: list[int] = []

    def problems_of(self, members: Mapping[str, bytes], flaw: str) -> Iterator[str]:
        """Count the captions of a sample, and yield what is wrong with them.

        Args:
            members: The members' bytes by their extension.
            flaw: Why its captions are not read, from the index.
        """
        captions: list[str] = []
        try:
            captions = read_captions(members)
        except ValueError as error:
            flaw = flaw or str(error)
        if flaw:
            yield flaw
        self.captions_per_clip.append(len(captions))
        self.words += [len(caption.split()) for caption in captions]
        self.characters += [len(caption) for caption in captions]

    def rows(self) -> Rows:
        """Return the statistics."""
        without = self.captions_per_clip.count(0)
        return [
            ("with a caption", f"{len(self.captions_per_clip) - without:,}; without {without:,}"),
            ("captions per clip", _format_range([count for count in self.captions_per_clip if count])),
            ("words per caption", _format_range(self.words)),
            ("characters per caption", _format_range(self.characters)),
        ]


def _format_range(values: Sequence[int]) -> str:
    """Format minimum, maximum and median."""
    if not values:
        return "none"
    least, median, most = np.quantile(values, [0, 0.5, 1])
    return f"{least:g}" if least == most else f"{least:g} to {most:g}, median {median:g}"


def _format_counts(values: Iterable[str]) -> str:
    """Format the most frequent values, with how often they occur."""
    counts = Counter(values).most_common()
    if not counts:
        return "none"
    if len(counts) == 1:
        return counts[0][0]
    text = ", ".join(f"{value} ({count:,})" for value, count in counts[:_MOST_FREQUENT])
    others = len(counts) - _MOST_FREQUENT
    return f"{text} and {others} others" if others > 0 else text
