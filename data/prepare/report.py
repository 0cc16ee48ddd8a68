"""The report of a run, `report.html`: a single page with embedded plots.

It gives the number of kept and dropped clips, the reasons with examples, the duration and resolution of the source
videos, and the length of the captions.
"""

import base64
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.prepare.captions import count_words
from data.prepare.dropped import Dropped
from data.prepare.plots import bar_chart, histogram
from t2v.errors import UserError
from t2v.files import atomic_path

MAX_EXAMPLES = 5
"""Dropped clips that are listed for each reason."""
MAX_CLIPS = 12
"""Kept clips that are listed, evenly spaced over all."""
TEMPLATE = Path(__file__).with_name("report.html.jinja")


class KeptRow(NamedTuple):
    """A kept clip."""

    key: str
    source: str
    """Name of the video it was cut from."""
    caption: str
    seconds: float
    """Length of the clip."""
    video_seconds: float
    """Length of the video."""
    video_width: int
    """Width of the video in pixels."""
    video_height: int
    """Height of the video in pixels."""


class _Reason(NamedTuple):
    kind: str
    dropped: int
    examples: list[str]


class _Plot(NamedTuple):
    title: str
    png: str
    """Base64."""


def write_report(folder: Path, kept: Sequence[KeptRow], dropped: Sequence[Dropped], settings: dict[str, Any]) -> Path:
    """Write `report.html` into a folder; names and captions are escaped.

    Args:
        folder: The folder; it must exist.
        kept: The kept clips.
        dropped: Dropped videos and clips.
        settings: Settings of the run, by name.

    Returns:
        Path of the report.

    Raises:
        UserError: If jinja2 or matplotlib is missing.
    """
    try:
        import jinja2
    except ImportError as error:
        raise UserError('The report is rendered with jinja2: run pip install -e ".[prepare]".') from error
    loader = jinja2.FileSystemLoader(TEMPLATE.parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    page = environment.get_template(TEMPLATE.name).render(
        clips=len(kept),
        dropped=len(dropped),
        sources=len({clip.source for clip in kept}),
        duration=_format_duration(math.fsum(clip.seconds for clip in kept)),
        reasons=_count_reasons(dropped),
        plots=_draw_plots(kept) if kept else [],
        examples=_choose_examples(kept) if kept else [],
        settings=settings,
    )
    path = folder / "report.html"
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")  # file names may contain invalid UTF-8
    return path


def _count_reasons(dropped: Sequence[Dropped]) -> list[_Reason]:
    """Return the reasons, the most frequent first, with a few examples of each."""
    by_kind: defaultdict[str, list[Dropped]] = defaultdict(list)
    for drop in dropped:
        by_kind[drop.kind].append(drop)
    reasons = [
        _Reason(kind, len(drops), [_describe(drop) for drop in drops[:MAX_EXAMPLES]]) for kind, drops in by_kind.items()
    ]
    return sorted(reasons, key=lambda reason: -reason.dropped)


def _describe(drop: Dropped) -> str:
    start = "" if drop.start is None else f" at {drop.start:.1f} s"
    details = drop.reason.removeprefix(drop.kind).removeprefix(" (").removesuffix(")")
    return f"{drop.source}{start}: {details}" if details else f"{drop.source}{start}"


def _choose_examples(kept: Sequence[KeptRow]) -> list[KeptRow]:
    numbers = np.unique(np.linspace(0, len(kept) - 1, MAX_CLIPS).astype(int))
    return [kept[number] for number in numbers]


def _draw_plots(kept: Sequence[KeptRow]) -> list[_Plot]:
    sizes = Counter(f"{clip.video_width}×{clip.video_height}" for clip in kept)
    pngs = {
        "Duration of the source videos": histogram([clip.video_seconds for clip in kept], "seconds"),
        "Resolution of the source videos": bar_chart(sizes, "width × height in pixels"),
        "Length of the captions": histogram([count_words(clip.caption) for clip in kept], "words"),
    }
    return [_Plot(title, base64.b64encode(png).decode()) for title, png in pngs.items()]


def _format_duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} hours"
    if seconds >= 60:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds:.1f} seconds"
