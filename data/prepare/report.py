"""What became of the footage, as one page to look at: `report.html`, with its pictures inside.

It says how many clips were kept and dropped, why, with examples, and shows how long the kept clips are, how large, and
how much their captions say. Names and captions come from elsewhere: they are escaped.
"""

import base64
import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from data.prepare.filters import count_words
from t2v.errors import UserError

EXAMPLES = 5
"""Dropped clips that are shown for each reason."""
CAPTIONS = 12
"""Kept clips that are shown, spread over all."""
SIZES = 10
"""Resolutions that have a bar of their own."""
COLOUR, INK, GRID = "#2f6f9f", "#222222", "#dddddd"

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem; border-bottom: 1px solid #ddd;
  overflow-wrap: anywhere; }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
ul { margin: 0; padding-left: 1rem; font-size: 87%; color: #555; }
img { max-width: 100%; }
"""


def write_report(
    folder: Path, kept: Sequence[dict[str, Any]], dropped: Sequence[dict[str, Any]], settings: dict[str, Any]
) -> Path:
    """Write `report.html` into a folder; it appears when it is complete.

    Args:
        folder: where it goes; it must exist.
        kept: a row for each clip with key, source, caption and seconds, and with video_seconds, width and height of the
            video it comes from.
        dropped: a row for each clip or video left out with source, start (in seconds, or None for the whole video) and
            reason; reasons are counted by what stands before ` (`.
        settings: what the run was asked for, by name.

    Returns:
        The file.

    Raises:
        UserError: where the package matplotlib is missing.
    """
    sources = len({row["source"] for row in kept})
    sections = [
        f"<h1>{len(kept):,} clips kept, {len(dropped):,} clips or videos dropped</h1>",
        f"<p>{_time(sum(row['seconds'] for row in kept))} of video, from {sources:,} sources, were kept.</p>",
        *_dropped(dropped),
        *_pictures(kept),
        *_kept(kept),
        "<h2>Settings</h2>",
        _table(("setting", "value"), ((escape(str(name)), escape(str(value))) for name, value in settings.items())),
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>Prepared footage</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(sections) + "\n</body>\n</html>\n"
    )
    path = folder / "report.html"
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(page, encoding="utf-8", errors="replace")  # names of files may hold bytes that are no text
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _dropped(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["<h2>Dropped</h2>", "<p>Nothing was dropped.</p>"]
    counts: Counter[str] = Counter()
    examples: defaultdict[str, list[str]] = defaultdict(list)
    for row in rows:
        reason, _, detail = row["reason"].partition(" (")
        counts[reason] += 1
        if len(examples[reason]) < EXAMPLES:
            place = "" if row["start"] is None else f" at {row['start']:.1f} s"
            told = f": {detail.removesuffix(')')}" if detail else ""
            examples[reason].append(f"<li>{escape(row['source'])}{place}{escape(told)}</li>")
    table = _table(
        ("reason", "#dropped", "#share", "examples"),
        (
            (escape(reason), f"{count:,}", f"{count / len(rows):.1%}", f"<ul>{''.join(examples[reason])}</ul>")
            for reason, count in counts.most_common()
        ),
    )
    return ["<h2>Dropped</h2>", table]


def _kept(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    shown = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, CAPTIONS).astype(int))]
    table = _table(
        ("key", "source", "caption", "#seconds", "#pixels"),
        (
            (
                *(escape(str(row[name])) for name in ("key", "source", "caption")),
                f"{row['seconds']:.1f}",
                f"{row['width']}×{row['height']}",
            )
            for row in shown
        ),
    )
    return ["<h2>Some of the clips</h2>", table]


def _pictures(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    seconds, words = ([row["video_seconds"] for row in rows], [count_words(row["caption"]) for row in rows])
    sizes = Counter(f"{row['width']}×{row['height']}" for row in rows)
    pictures = {
        "Duration of the videos they come from": histogram(seconds, "seconds"),
        "Resolution of the kept clips": bars(sizes, "width × height in pixels"),
        "Length of their captions": histogram(words, "words"),
    }
    return [
        f'<h2>{title}</h2>\n<img alt="{title}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for title, png in pictures.items()
    ]


def histogram(values: Sequence[float], unit: str) -> bytes:
    """A histogram as a PNG of at most 41 bars.

    Args:
        values: what is counted, at least one; bars over whole numbers are centred on them.
        unit: what the horizontal axis says.
    """
    numbers = np.asarray(values, dtype=np.float64)
    low, high, median = numbers.min(), numbers.max(), np.median(numbers)
    if whole := (numbers == numbers.round()).all():
        step = max(1, np.ceil((high - low) / 40))  # else some bars hold two numbers and their neighbours one
        edges = np.arange(low - 0.5, high + step, step)
    elif high - low > 1e-3:
        edges = np.linspace(low, high, 41)
    else:  # all the same but for rounding
        edges = median + np.array([-0.5, 0.5])
    figure, axes = _figure(3.2)
    axes.hist(numbers, edges, color=COLOUR, edgecolor="white", linewidth=0.5)
    if len(edges) == 2:
        axes.set_xlim(max(median - 5, 0), median + 5)
    axes.axvline(median, color=INK, linestyle="--", linewidth=1)
    axes.set_title(f"median {median:.4g}", loc="right", fontsize="medium")
    axes.set_xlabel(unit)
    axes.xaxis.get_major_locator().set_params(integer=whole)
    axes.set_ylabel("clips")
    _count_along(axes.yaxis)
    axes.grid(axis="y", color=GRID)
    return _png(figure)


def bars(counts: Counter[str], unit: str) -> bytes:
    """Counts as horizontal bars, the most frequent on top and the rare ones in one bar, as a PNG.

    Args:
        counts: how often each name occurs, at least one.
        unit: what the names are.
    """
    shown = counts.most_common(SIZES)
    if others := len(counts) - len(shown):
        shown.append((f"{others:,} other{'s' * (others > 1)}", counts.total() - sum(count for _, count in shown)))
    figure, axes = _figure(1.4 + 0.32 * len(shown))
    names, numbers = zip(*reversed(shown), strict=True)
    drawn = axes.barh(names, numbers, color=COLOUR, height=0.7)
    axes.bar_label(drawn, [f"{number:,}" for number in numbers], padding=4, color=INK)
    axes.set_xlim(0, max(numbers) * 1.12)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_title(unit, loc="left", fontsize="medium")
    axes.set_xlabel("clips")
    _count_along(axes.xaxis)
    return _png(figure)


def _figure(height: float):
    """A figure of its own: pyplot would keep it, and choose a window system."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("The report's pictures are drawn with matplotlib: run pip install 't2v[prepare]'.") from error
    figure = Figure((8, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def _count_along(axis) -> None:
    axis.get_major_locator().set_params(integer=True)
    axis.set_major_formatter("{x:,.0f}")


def _png(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already; a column whose name begins with # holds numbers."""
    classes = [' class="number"' if name.startswith("#") else "" for name in head]
    lines = ["".join(f"<th{kind}>{name.lstrip('#')}</th>" for kind, name in zip(classes, head, strict=True))]
    lines += ["".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(classes, row, strict=True)) for row in rows]
    return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"


def _time(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} hours"
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.1f} seconds"
