"""Dropped videos and clips, and a summary of the reasons."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

_EXAMPLES = 10
"""Dropped videos or clips that the summary names for each reason."""


class Dropped(NamedTuple):
    """A video or clip that was dropped, and why."""

    source: str
    """The video's name."""
    start: float | None
    """Start of the clip in the video, in seconds; None for the whole video."""
    reason: str
    """`reason (value; limit)`; the part in parentheses is optional."""

    @property
    def kind(self) -> str:
        """The reason without its values, by which reasons are counted."""
        return self.reason.partition(" (")[0]


def summarize(dropped: Sequence[Dropped]) -> str:
    """Return one line with the reasons, how often each occurred, and up to 10 examples of each.

    Args:
        dropped: Dropped videos and clips.
    """
    by_kind: defaultdict[str, list[Dropped]] = defaultdict(list)
    for drop in dropped:
        by_kind[drop.kind].append(drop)
    parts = []
    for kind, drops in by_kind.items():
        names = ", ".join(_name(drop) for drop in drops[:_EXAMPLES])
        more = f" and {len(drops) - _EXAMPLES} more" if len(drops) > _EXAMPLES else ""
        parts.append(f"{len(drops)} {kind}: {names}{more}")
    return "; ".join(parts)


def _name(drop: Dropped) -> str:
    start = "" if drop.start is None else f" at {round(drop.start, 2):g} s"
    return f"{drop.source}{start}{drop.reason.removeprefix(drop.kind)}"
