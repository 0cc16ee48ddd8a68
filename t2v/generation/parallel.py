"""How many tokens of each video a pass of the transformer computes."""

import math
from typing import Literal

from t2v.errors import UserError

Parallel = int | Literal["auto"]

_POSITIONS = 256
"""Positions of all videos, both branches of guidance counted, that a GPU computes in about the time of one."""
_COMPILED_POSITIONS = 64
"""The same for compiled passes on a CPU."""
_CPU_POSITIONS = 16
"""Positions of each video that uncompiled passes on a CPU may compute, however many videos there are."""
_FEW_POSITIONS = 8
"""The same for compiled passes. Each number of positions is compiled, so that they compute one, this, or the most."""


def check_parallel(parallel: Parallel, argument: str = "parallel") -> None:
    """Check the number of tokens per pass.

    Raises:
        UserError: If it is neither "auto" nor at least 1.
    """
    if parallel != "auto" and (isinstance(parallel, str) or parallel < 1):
        raise UserError(f"{argument}={parallel} must be at least 1 (one token after the other), or auto.")


def most_positions(parallel: Parallel, rows: int, on_cpu: bool = False, compiled: bool = False) -> int:
    """Return the most tokens of each video that a pass computes.

    Args:
        parallel: A number, or "auto".
        rows: Videos, twice as many with guidance.
        on_cpu: Whether passes run on a CPU.
        compiled: Whether they are compiled.
    """
    if parallel != "auto":
        return parallel
    if not on_cpu:
        return max(_POSITIONS // rows, 1)
    if compiled:
        return max(_COMPILED_POSITIONS // rows, _FEW_POSITIONS)
    return max(_POSITIONS // rows, _CPU_POSITIONS)


def next_positions(right: float, most: int, compiled: bool) -> int:
    """Return the number of positions of the next pass on a CPU, where each position costs time.

    Uncompiled, it is about three times the number of drafts that are right, and one if they hardly ever are. Compiled,
    it is the first of a few numbers that is at least twice that of the right drafts. It does not depend on measured
    times, so that a video is the same in every run.

    Args:
        right: Average number of drafts at the beginning of the last passes that turned out to be right.
        most: Most positions of a pass.
        compiled: Whether passes are compiled.
    """
    if not compiled:
        return min(most, 1 << round(math.log2(1 + 3 * right)))
    return next((number for number in (1, _FEW_POSITIONS) if 2 * right <= number < most), most)
