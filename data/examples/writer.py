"""Writes a split of an example data set: mp4 files and a table of their captions."""

import csv
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import UInt8
from torch import Tensor

from data.progress import ProgressBar
from t2v.errors import UserError
from t2v.files import atomic_path
from t2v.video import encode_mp4

Clip = TypeVar("Clip")


def check_counts(**counts: int) -> None:
    """Check the numbers of clips, frames and processes of an example data set.

    Args:
        counts: At least two, by the names of the arguments.

    Raises:
        UserError: If one is less than 1.
    """
    if min(counts.values()) < 1:
        *first, last = (f"{name}={count}" for name, count in counts.items())
        raise UserError(f"{', '.join(first)} and {last} must all be at least 1.")


def write_split(
    folder: Path,
    clips: Sequence[Clip],
    captions: Sequence[Sequence[str]],
    render: Callable[[Clip], UInt8[Tensor, "t 3 height width"]],
    fps: int,
    num_workers: int,
) -> None:
    """Write numbered mp4 files, and `captions.csv` with the columns path, caption and the attributes.

    Args:
        folder: Appears when it is complete.
        clips: The clips, instances of one dataclass whose fields are the attributes.
        captions: For each clip its captions, one row each.
        render: Draws a clip; a function of a module.
        fps: Frames per second.
        num_workers: Processes that draw and encode; 1 is this process.
    """
    rows = []
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        paths = [temporary / f"{number:06d}.mp4" for number in range(len(clips))]
        write, jobs = partial(_write_clip, render, fps), zip(paths, clips, strict=True)
        one_thread = torch.set_num_threads, (1,)  # several of each process would wait for one another
        with get_context("spawn").Pool(num_workers, *one_thread) if num_workers > 1 else nullcontext() as pool:
            written = pool.imap_unordered(write, jobs, chunksize=16) if pool else map(write, jobs)
            for _ in ProgressBar(written, total=len(clips), desc="drawing clips", unit="clip"):
                pass
        for path, clip, texts in zip(paths, clips, captions, strict=True):
            attributes: dict[str, Any] = asdict(clip)  # type: ignore[call-overload]
            rows += [{"path": path.name, "caption": text, **attributes} for text in texts]
        with (temporary / "captions.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def _write_clip(render: Callable[[Any], UInt8[Tensor, "t 3 height width"]], fps: int, job: tuple[Path, Any]) -> None:
    path, clip = job
    # Lossless, since compression would make different tokens of areas that were drawn alike. The folder is atomic.
    path.write_bytes(encode_mp4(render(clip), fps=fps, crf=0))
