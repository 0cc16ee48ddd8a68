"""What was left out, and why."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


class Dropped(NamedTuple):
    """A video or a clip that was left out."""

    source: str
    """The video's name."""
    start: float | None
    """Where the clip begins in it, in seconds; None for a whole video."""
    reason: str
    """`what is wrong (the value; the limit)`: reasons are counted by what stands before ` (`."""


def summary(dropped: Sequence[Dropped]) -> str:
    """The reasons in one line, how often each came up, and what it struck.

    Args:
        dropped: what was left out.
    """
    kinds = [drop.reason.split(" (")[0] for drop in dropped]
    parts = []
    for kind, count in Counter(kinds).items():
        struck = [_name(drop, kind) for drop, other in zip(dropped, kinds, strict=True) if other == kind]
        more = f" and {count - 10} more" if count > 10 else ""
        parts.append(f"{count} {kind}: {', '.join(struck[:10])}{more}")
    return "; ".join(parts)


def _name(drop: Dropped, kind: str) -> str:
    place = "" if drop.start is None else f" at {round(drop.start, 2):g} s"
    return f"{drop.source}{place}{drop.reason.removeprefix(kind)}"
