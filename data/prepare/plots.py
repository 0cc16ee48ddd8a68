"""The plots of the report, as PNG images."""

import io
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from t2v.errors import UserError

if TYPE_CHECKING:  # matplotlib is optional
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_BARS = 40
"""Bars of a histogram."""
MAX_NAMES = 10
"""Names with their own bar in a bar chart."""
BAR_COLOUR, TEXT_COLOUR, GRID_COLOUR = "#2f6f9f", "#222222", "#dddddd"


def histogram(values: Sequence[float] | Sequence[int], unit: str) -> bytes:
    """Draw a histogram with the median, as a PNG.

    Args:
        values: At least one number; if all are integers, bars are centred on integers.
        unit: Label of the horizontal axis.

    Raises:
        UserError: If matplotlib is missing.
    """
    numbers = np.asarray(values, dtype=np.float64)
    median = float(np.median(numbers))
    edges = _bar_edges(numbers)
    figure, axes = _new_figure(height=3.2)
    axes.hist(numbers, edges.tolist(), color=BAR_COLOUR, edgecolor="white", linewidth=0.5)
    if len(edges) == 2:
        axes.set_xlim(max(median - 5, 0), median + 5)
    axes.axvline(median, color=TEXT_COLOUR, linestyle="--", linewidth=1)
    axes.set_title(f"median {median:.4g}", loc="right", fontsize="medium")
    axes.set_xlabel(unit)
    axes.locator_params(axis="x", integer=_are_integers(numbers))
    axes.set_ylabel("clips")
    axes.locator_params(axis="y", integer=True)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", color=GRID_COLOUR)
    return _to_png(figure)


def bar_chart(counts: Counter[str], title: str) -> bytes:
    """Draw counts as horizontal bars, the most frequent on top and the rare ones combined, as a PNG.

    Args:
        counts: Count of each name; at least one name.
        title: Title, which says what the names are.

    Raises:
        UserError: If matplotlib is missing.
    """
    bars = counts.most_common(MAX_NAMES)
    others = len(counts) - len(bars)
    if others:
        label = "1 other" if others == 1 else f"{others:,} others"
        bars.append((label, counts.total() - sum(count for _, count in bars)))
    bars.reverse()  # matplotlib draws upwards
    numbers = [number for _, number in bars]
    figure, axes = _new_figure(height=1.4 + 0.32 * len(bars))
    drawn = axes.barh([name for name, _ in bars], numbers, color=BAR_COLOUR, height=0.7)
    axes.bar_label(drawn, [f"{number:,}" for number in numbers], padding=4, color=TEXT_COLOUR)
    axes.set_xlim(0, max(numbers) * 1.12)
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set_xlabel("clips")
    axes.locator_params(axis="x", integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    return _to_png(figure)


def _bar_edges(numbers: Float[np.ndarray, " n"]) -> Float[np.ndarray, " edges"]:
    low, high = float(numbers.min()), float(numbers.max())
    if _are_integers(numbers):
        width = max(1, int(np.ceil((high - low) / MAX_BARS)))  # otherwise bars would cover unequal numbers of integers
        return np.arange(low - 0.5, high + width, width)
    if high - low > 1e-3:
        return np.linspace(low, high, MAX_BARS + 1)
    middle = (low + high) / 2  # equal except for rounding
    return np.array([middle - 0.5, middle + 0.5])


def _are_integers(numbers: Float[np.ndarray, " n"]) -> bool:
    return bool((numbers == numbers.round()).all())


def _new_figure(height: float) -> "tuple[Figure, Axes]":
    """Create a figure without pyplot, which would keep it in memory and choose a window system."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('The plots are drawn with matplotlib: run pip install -e ".[prepare]".') from error
    figure = Figure((8, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def _to_png(figure: "Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
