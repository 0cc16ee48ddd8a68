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

import shutil
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from data.prepare.cutting import cut_all, make_jobs
from data.prepare.dropped import summarize
from data.prepare.engine import processes, ray_cluster
from data.prepare.filters import Filters
from data.prepare.output import is_complete, open_partial, publish
from data.prepare.packing import drop_duplicates, pack_all, read_clips
from data.prepare.sources import digest, find_videos
from data.prepare.tables import CaptionTable
from data.prepare.video_clips import ClipFormat
from t2v.errors import UserError

__all__ = ["Filters", "prepare"]

DEFAULT_FILTERS = Filters()


def prepare(
    source: Path,
    out: Path,
    captions: Path | None = None,
    size: int = 64,
    fps: float = 8.0,
    frames: int = 16,
    scenes: float = 27.0,
    filters: Filters = DEFAULT_FILTERS,
    path_column: str = "path",
    caption_column: str = "caption",
    samples_per_shard: int = 1000,
    engine: Literal["process", "ray"] = "process",
    num_workers: int = 2,
    videos_per_job: int = 16,
    timeout: float = 600.0,
) -> None:
    """Turn source videos and their captions into video shards.

    Args:
        source: Folder of videos or of shards in the format of `video2dataset`, or one such shard.
        out: Folder to create. It appears when all shards are complete; until then the command continues an earlier,
            interrupted run.
        captions: CSV, JSON-lines, JSON or Parquet file with one row per video, WebVid's CSV or MSR-VTT's JSON; by
            default the one in the source folder.
        size: Height and width of a clip in pixels; must be even.
        fps: Frames per second of a clip.
        frames: Frames of a clip; longer videos give several clips, shorter videos are dropped.
        scenes: Mean change of a pixel between two frames, from 0 to 255, above which a new scene begins; no clip spans
            two scenes. 0 does not look for scenes, which saves one decoding of each video.
        filters: Limits; videos, clips and captions outside them are dropped.
        path_column: Column with the video's path, relative to `source`.
        caption_column: Column with the caption, or with a list of captions.
        samples_per_shard: Clips in a shard.
        engine: process: processes on this machine; ray: the Ray cluster at `RAY_ADDRESS`, where `source` and `out` must
            be shared folders, or a local Ray if that variable is not set.
        num_workers: Processes that decode and encode; on a Ray cluster, all its CPUs are used instead.
        videos_per_job: Videos in a job; an interrupted run repeats at most the jobs that were running.
        timeout: Seconds for each clip, after which the video is dropped; finding its scenes may take this time plus the
            length of the video.

    Raises:
        UserError: If an argument is out of range, a package is missing, the source has no captioned videos, no clip is
            kept, or `out` holds something else.
    """
    positive = {
        "size": size,
        "fps": fps,
        "frames": frames,
        "samples_per_shard": samples_per_shard,
        "num_workers": num_workers,
        "videos_per_job": videos_per_job,
        "timeout": timeout,
    }
    _check_numbers(positive, scenes)
    _check_packages(scenes, filters, engine)
    videos, dropped = find_videos(source, CaptionTable(captions, path_column, caption_column), filters)
    settings = {
        "size": size,
        "fps": fps,
        "frames": frames,
        "scenes": scenes,
        **{f"filters.{name}": value for name, value in asdict(filters).items()},
        "samples_per_shard": samples_per_shard,
        "videos": len(videos),
        "source": digest(videos),
    }
    partial = out.with_name(f"{out.name}.partial")
    if is_complete(out, settings):
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed after it renamed the shards
        print(f"{out} is complete already: nothing to do.")
        return
    clip_format = ClipFormat(size, fps, frames, scenes, filters, timeout)
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
    if dropped:
        print(f"Dropped {len(dropped)}: {summarize(dropped)}.")


def _check_numbers(positive: dict[str, Any], scenes: float) -> None:
    wrong = [f"{name}={value}" for name, value in positive.items() if value <= 0]
    if positive["size"] > 0 and positive["size"] % 2:
        wrong.append(f"size={positive['size']}")
    if wrong:
        raise UserError(f"{', '.join(wrong)}: all must be greater than 0, and size even, as H.264 requires.")
    if scenes < 0:
        raise UserError(f"scenes={scenes:g} must be at least 0; 0 does not look for scenes.")


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
