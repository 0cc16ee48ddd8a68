"""Turns source videos and their captions into video shards: `python -m data.prepare SOURCE OUT`.

Each video is cut at its scene changes, and each scene into consecutive clips of `frames` frames at `fps`, resized by
the shorter side, cropped in the centre and encoded as H.264; a remainder shorter than a clip is dropped. An mp4 file
that already is one such clip is copied unchanged.

1. Cutting: each job cuts a few videos and writes its clips to `OUT.partial/clips`; see `cutting`.
2. Packing: near-duplicates are dropped, and each job writes one shard; see `packing`.

The files of a job appear complete or not at all, and jobs that are complete are not repeated: after a crash, the same
command continues. The shards are equal byte for byte, whatever the number of workers, the engine and the crashes. Until
the shards are complete, the clips take their space twice.
"""

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from data.prepare.cutting import cut_all, make_jobs
from data.prepare.dropped import summarize
from data.prepare.engine import processes, ray_cluster
from data.prepare.filters import Filters
from data.prepare.flaws import BLACK_BARS, INTERLACED
from data.prepare.output import is_complete, open_partial, publish
from data.prepare.packing import drop_duplicates, pack_all, read_clips
from data.prepare.preview import preview
from data.prepare.sources import NO_CAPTIONS, digest, find_videos
from data.prepare.tables import CaptionTable
from data.prepare.video_clips import ClipFormat
from t2v.errors import UserError

__all__ = ["Filters", "prepare"]

DEFAULT_FILTERS = Filters()


def prepare(
    source: str | Path,
    out: Path,
    captions: str | Path | None = None,
    size: int | list[int] | list[list[int]] = 64,
    fps: float = 8.0,
    frames: int = 16,
    stride: int | None = None,
    max_clips: int | None = None,
    scenes: float = 27.0,
    filters: Filters = DEFAULT_FILTERS,
    path_column: str | None = None,
    caption_column: str | None = None,
    samples_per_shard: int = 1000,
    engine: Literal["process", "ray"] = "process",
    num_workers: int = 2,
    videos_per_job: int = 16,
    timeout: float = 600.0,
    dry_run: bool = False,
) -> None:
    """Turn source videos and their captions into video shards.

    Args:
        source: Folder of videos or of shards in the format of `video2dataset`, or such shards; on this machine or at
            any address that fsspec opens.
        out: Folder to create. It appears when all shards are complete; until then the command continues an earlier,
            interrupted run.
        captions: CSV, TSV, JSON-lines, JSON or Parquet file with one row per video, or prompts.txt beside videos.txt;
            "none" for no captions, which stage 1 does not need; by default what is in the source folder.
        size: Height and width of a clip in pixels, or a list of both; all must be even. Of a list of heights and
            widths, such as [[96,128],[128,96]], each video gets the one with the nearest aspect ratio.
        fps: Frames per second of a clip.
        frames: Frames of a clip; longer videos give several clips, shorter videos are dropped.
        stride: Frames between the starts of two clips of a scene: fewer than `frames` for clips that overlap, more to
            leave out what is between; by default `frames`.
        max_clips: Largest number of clips of a video, from its start; by default all are kept.
        scenes: Mean change of a pixel between two frames, from 0 to 255, above which a new scene begins; no clip spans
            two scenes. 0 does not look for scenes, which saves one decoding of each video.
        filters: Limits; videos, clips and captions outside them are dropped.
        path_column: Column with the video's path, relative to `source`; by default `path`, or that of a known data
            set.
        caption_column: Column with the caption, or with a list of captions; by default `caption`, or that of a known
            data set.
        samples_per_shard: Clips in a shard.
        engine: process: processes on this machine; ray: the Ray cluster at `RAY_ADDRESS`, where `source` and `out` must
            be shared folders, or a local Ray if that variable is not set.
        num_workers: Processes that decode and encode; on a Ray cluster, all its CPUs are used instead.
        videos_per_job: Videos in a job; an interrupted run repeats at most the jobs that were running.
        timeout: Seconds for each clip, after which the video is dropped; finding its scenes may take this time plus the
            length of the video.
        dry_run: Write nothing, and print how many videos there are, how long they are, and what would be dropped
            without a look at the pictures.

    Raises:
        UserError: If an argument is out of range, a package is missing, the source has no captioned videos, no clip is
            kept, or `out` holds something else.
    """
    sizes = _check_sizes(size)
    positive = {
        "fps": fps,
        "frames": frames,
        "stride": 1 if stride is None else stride,
        "max_clips": 1 if max_clips is None else max_clips,
        "samples_per_shard": samples_per_shard,
        "num_workers": num_workers,
        "videos_per_job": videos_per_job,
        "timeout": timeout,
    }
    _check_numbers(positive, scenes)
    _check_packages(scenes, filters, engine)
    _check_effect(filters, frames, captions)
    clip_format = ClipFormat(sizes, fps, frames, scenes, filters, timeout, stride, max_clips)
    if out.name in ("", ".."):
        raise UserError(f"'{out}' cannot be the output folder: name a new folder.")
    if os.path.ismount(out):
        raise UserError(f"'{out}' is the root of a disk, which cannot be the output folder: name a new folder in it.")
    if out.is_symlink():  # to a larger disk, where the work should be too
        out = Path(os.path.realpath(out))
    partial = out.with_name(f"{out.name}.partial")
    with _continuable(partial):
        table = CaptionTable(captions, path_column, caption_column)
        videos, dropped = find_videos(source, table, filters, images=frames == 1)
        if dry_run:
            print(preview(videos, dropped, clip_format))
            return
        settings = {
            "size": size,
            "fps": fps,
            "frames": frames,
            **({} if stride is None else {"stride": stride}),
            **({} if max_clips is None else {"max_clips": max_clips}),
            "scenes": scenes,
            **{f"filters.{name}": value for name, value in asdict(filters).items()},
            "samples_per_shard": samples_per_shard,
            "videos": len(videos),
            "source": digest(videos),
        }
        if is_complete(out, settings):
            shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed after it renamed the shards
            print(f"{out} is complete already: nothing to do.")
            return
        start_engine = ray_cluster if engine == "ray" else processes
        with open_partial(partial, settings), start_engine(num_workers) as run:
            jobs = make_jobs(videos, videos_per_job, partial.absolute() / "clips", clip_format)
            cut_all(jobs, run)
            clips = drop_duplicates(read_clips(jobs, dropped), filters.max_hash_distance, dropped)
            if clips:
                pack_all(clips, samples_per_shard, partial.absolute() / "shards", run)
                publish(partial / "shards", out, clips, dropped, settings)
        shutil.rmtree(partial)
    if not clips:
        raise UserError(f"No clip of '{source}' was kept: {summarize(dropped)}.")
    print(f"{out}: {len(clips)} clips from {len(videos)} videos. See {out / 'report.html'}.")
    flaws = Counter(flaw for clip in clips for flaw in clip.metadata.get("flaws", []))
    for flaw, option in ((INTERLACED, "interlaced"), (BLACK_BARS, "bars")):
        if flaws[flaw]:
            print(f"Clips with {flaw}: {flaws[flaw]}, named in their json; --filters.{option} mends or drops them.")
    if dropped:
        print(f"Dropped {len(dropped)}: {summarize(dropped)}.")


@contextmanager
def _continuable(partial: Path) -> Iterator[None]:
    """Report an error of the system, or Ctrl-C, in one sentence that says what has become of the work.

    Raises:
        UserError: After an error of the system.
        SystemExit: With status 130, after Ctrl-C.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        where = f" at '{error.filename}'" if error.filename else ""
        raise UserError(
            f"The system reports{where}: {reason}; see to space, permissions and the connection, or choose another "
            f"place. {_what_remains(partial)}."
        ) from error
    except KeyboardInterrupt:
        sys.stderr.write(f"\nerror: Interrupted. {_what_remains(partial)}.\n")
        raise SystemExit(130) from None


def _what_remains(partial: Path) -> str:
    if partial.is_dir():
        return f"What is finished stays in '{partial}', and the same command continues"
    return "Nothing has been written"


def _check_sizes(size: int | list[int] | list[list[int]]) -> int | list[tuple[int, int]]:
    """Return the size as an integer, or as a list of heights and widths."""
    if isinstance(size, int):
        sizes = [(size, size)]
    else:
        pairs: list[Any] = size if all(isinstance(pair, list) for pair in size) else [size]
        if not pairs or any(len(pair) != 2 for pair in pairs):
            raise UserError(f"size={size} must be one number, [height, width], or a list of these.")
        sizes = [(height, width) for height, width in pairs]
    if any(side <= 0 or side % 2 for pair in sizes for side in pair):
        raise UserError(f"size={size}: all must be greater than 0, and size even, as H.264 requires.")
    return size if isinstance(size, int) else sizes


def _check_numbers(positive: dict[str, Any], scenes: float) -> None:
    wrong = [f"{name}={value}" for name, value in positive.items() if not value > 0]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: all must be greater than 0, and size even, as H.264 requires.")
    if not scenes >= 0:
        raise UserError(f"scenes={scenes:g} must be at least 0; 0 does not look for scenes.")


def _check_effect(filters: Filters, frames: int, captions: str | Path | None) -> None:
    """Raise an error for filters without effect."""
    names = ["min_motion"] if frames == 1 and filters.min_motion != DEFAULT_FILTERS.min_motion else []
    if captions == NO_CAPTIONS:
        words = ("min_words", "max_words")
        names += [name for name in words if getattr(filters, name) != getattr(DEFAULT_FILTERS, name)]
    if names:
        cause = "with clips of one frame" if names[0] == "min_motion" else "with --captions none"
        raise UserError(f"--filters.{' and --filters.'.join(names)} has no effect {cause}: leave it out.")


def _check_packages(scenes: float, filters: Filters, engine: str) -> None:
    """Raise an error now, not after hours of work, if an optional package is missing."""
    needed = {
        "ftfy": True,
        "jinja2": True,
        "matplotlib": True,
        "scenedetect": scenes > 0,
        "imagehash": filters.max_hash_distance is not None,
        "ray": engine == "ray",
    }
    if missing := [name for name, is_needed in needed.items() if is_needed and find_spec(name) is None]:
        raise UserError(f'Not installed: {", ".join(missing)}; run pip install -e ".[prepare,ray]".')
