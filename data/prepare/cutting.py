"""Cutting: a few videos are analysed at a time, and what came of them is left in two files.

`000000-000015.json` says which clips were cut and what was dropped, `000000-000015.clips` holds the clips' bytes one
after the other. Both appear whole; the json comes last, and with it the videos are done. Each video is decoded once to
find its scenes, and once to cut it.
"""

import faulthandler
import json
import os
import tempfile
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from data.prepare.dropped import Dropped
from data.prepare.engine import Run
from data.prepare.filters import Filters, perceptual_hash, refuse_clip, refuse_video
from data.prepare.scenes import scenes
from data.prepare.sources import Video
from t2v.errors import UserError
from t2v.video import DecodeError, VideoInfo, encode_mp4, probe, read_frames, resize_and_crop, stream_frames

JOB_BYTES = 2**28
"""A job takes no more videos once it has so many bytes."""
KILLS = "crashes the decoder, or takes too long"
"""Why a video is dropped that twice ended the process that cut it."""


class Format(NamedTuple):
    """What every clip is like, and what footage it is cut from."""

    size: int
    fps: float
    frames: int
    scenes: float
    """Threshold of a scene cut; 0 looks for none."""
    filters: Filters
    timeout: float
    """Seconds for each clip."""


class Cutting(NamedTuple):
    """A job: consecutive videos of the source."""

    folder: Path
    """Where the two files go."""
    first: int
    """Number of its first video."""
    videos: list[Video]
    form: Format
    deadly: frozenset[int] = frozenset()
    """Numbers of the videos that are not tried again."""

    @property
    def name(self) -> str:
        """What the files are called."""
        return f"{self.first:06d}-{self.first + len(self.videos) - 1:06d}"

    @property
    def result(self) -> Path:
        """The json."""
        return self.folder / f"{self.name}.json"

    @property
    def clips(self) -> Path:
        """The file of the clips' bytes."""
        return self.folder / f"{self.name}.clips"

    @property
    def trace(self) -> Path:
        """The number of the video being cut: who reads it after a crash knows which it was."""
        return self.folder / f"{self.name}.now"


def divide(videos: list[Video], videos_per_job: int, folder: Path, form: Format) -> list[Cutting]:
    """The jobs of cutting: up to so many consecutive videos each, and few where they are large.

    Args:
        videos: all videos of the source.
        videos_per_job: how many a job takes at most.
        folder: where the jobs leave their files.
        form: what every clip is like.
    """
    jobs: list[Cutting] = []
    for number, video in enumerate(videos):
        last = jobs[-1].videos if jobs else []
        if not last or len(last) == videos_per_job or sum(other.size for other in last) >= JOB_BYTES:
            jobs.append(Cutting(folder, number, last := [], form))
        last.append(video)
    return jobs


def cut_all(jobs: list[Cutting], run: Run) -> None:
    """Run the jobs of cutting that are not done; a video that twice ends its process is given up.

    Args:
        jobs: all jobs.
        run: calls `cut` for each of them.

    Raises:
        UserError: where a process dies before it comes to a video.
    """
    left = deque(job for job in jobs if read_result(job.result) is None)
    total, remaining = (sum(len(job.videos) for job in some) for some in (jobs, left))
    deaths: Counter[int] = Counter()
    with tqdm(desc="cutting", total=total, initial=total - remaining, unit="video") as bar:
        for job, lived in run(cut, left):
            if lived:
                bar.update(len(job.videos))
                continue
            try:
                number = int(job.trace.read_text())
            except (OSError, ValueError):
                raise UserError(
                    f"The process that was to cut '{job.videos[0].name}' and {len(job.videos) - 1} more was killed "
                    "before it began, as happens where memory is short: lower num_workers; the same command goes on."
                ) from None
            deaths[number] += 1
            deadly = job.deadly | {number for number, count in deaths.items() if count > 1}
            bar.write(f"'{job.videos[number - job.first].name}' {KILLS}: {deaths[number]} of 2 attempts.")
            left.append(job._replace(deadly=deadly))


def cut(job: Cutting) -> None:
    """Cut the videos of a job, filter and encode the clips, and write the two files.

    Args:
        job: what to do.
    """
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    dropped: list[Dropped] = []
    partial = job.clips.with_name(f"{job.clips.name}.{os.getpid()}.partial")
    with partial.open("wb") as file, Path(os.devnull).open("w") as nowhere:
        for number, video in enumerate(job.videos, job.first):
            if number in job.deadly:
                dropped.append(Dropped(video.name, None, KILLS))
                continue
            job.trace.write_text(str(number))
            for row in _cut_video(video, job, dropped, nowhere):
                place = (file.tell(), len(row["mp4"]))
                file.write(row.pop("mp4"))
                rows.append({"video": number, "place": place, **row})
    partial.replace(job.clips)
    partial.write_text(json.dumps({"clips": rows, "dropped": dropped}))
    partial.replace(job.result)
    job.trace.unlink(missing_ok=True)


def read_result(path: Path) -> tuple[list[dict[str, Any]], list[Dropped]] | None:
    """The clips and what was dropped, from the json of a job; None where it is not there, or not whole.

    Args:
        path: the json.
    """
    try:
        content = json.loads(path.read_text())
        return content["clips"], [Dropped(*drop) for drop in content["dropped"]]
    except (OSError, ValueError):
        return None


def _cut_video(video: Video, job: Cutting, dropped: list[Dropped], nowhere: IO[str]) -> Iterator[dict[str, Any]]:
    """The kept clips of a video, as mp4; adds the others to `dropped`."""
    form, tried, short = job.form, 0, []
    try:
        with _opened(video, job.folder) as path:
            faulthandler.dump_traceback_later(form.timeout, exit=True, file=nowhere)
            info = probe(path)
            if reason := refuse_video(info, form.filters):
                dropped.append(Dropped(video.name, None, reason))
                return
            # A decoder slower than the video plays is as good as stuck.
            faulthandler.dump_traceback_later(form.timeout + info.frames / info.fps, exit=True, file=nowhere)
            for start, clip, mp4 in _clips(path, info, form):
                faulthandler.dump_traceback_later(form.timeout, exit=True, file=nowhere)
                if clip is None:
                    short.append(start)
                    continue
                tried += 1
                if reason := refuse_clip(clip, form.filters):
                    dropped.append(Dropped(video.name, start, reason))
                    continue
                yield {
                    "number": tried - 1,
                    "start": start,
                    "seconds": info.frames / info.fps,
                    "height": info.height,
                    "width": info.width,
                    "hash": None if form.filters.max_hash_distance is None else perceptual_hash(clip),
                    "mp4": mp4 or encode_mp4(clip, form.fps),
                }
        told = f"too short (a clip takes {form.frames / form.fps:.3g} s)"
        if tried:
            dropped += (Dropped(video.name, start, f"scene {told}") for start in short)
        else:
            dropped.append(Dropped(video.name, None, told if len(short) < 2 else f"scenes {told}"))
    except (FileNotFoundError, PermissionError) as error:
        dropped.append(Dropped(video.name, None, f"does not open ({error.strerror})"))
    except (UserError, OSError):  # a full disk, or a lost connection: nothing is wrong with the video
        raise
    except Exception as error:  # decoders meet everything; one video must not stop the work of days
        told = str(error) if isinstance(error, DecodeError) else f"{type(error).__name__}: {error}"
        dropped.append(Dropped(video.name, None, f"{'decodes only in part' if tried else 'does not decode'} ({told})"))
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def _opened(video: Video, folder: Path) -> Iterator[Path]:
    """The video as a file of its own; one that lies in a tar is copied out of it."""
    if video.offset is None:
        yield video.path
        return
    with tempfile.TemporaryDirectory(dir=folder, suffix=".partial") as copies:
        path = Path(copies) / f"video{Path(video.name).suffix or '.mp4'}"
        with video.path.open("rb") as tar:
            tar.seek(video.offset)
            path.write_bytes(tar.read(video.size))
        yield path


def _clips(
    path: Path, info: VideoInfo, form: Format
) -> Iterator[tuple[float, UInt8[Tensor, "t c h w"] | None, bytes | None]]:
    """Start and frames of every clip, and its mp4 if the file is that already; of a scene too short, only the start."""
    if _is_clip(path, info, form):
        yield 0.0, read_frames(path, range(form.frames)), path.read_bytes()
        return
    starts = [start for start, _ in scenes(path, form.scenes)] if form.scenes else [0.0]
    half = 0.5 / info.fps  # a frame's time and a cut's are rounded in different ways
    for number, scene in groupby(stream_frames(path), lambda shown: bisect_right(starts, shown[0] + half, lo=1)):
        clip = None
        for clip in _groups(_at_rate(scene, form.fps), form):
            yield round(clip[0][0], 6), torch.cat([frame for _, frame in clip]), None
        if clip is None:
            yield round(starts[number - 1], 6), None, None


def _groups(
    frames: Iterator[tuple[float, UInt8[Tensor, "c h w"]]], form: Format
) -> Iterator[list[tuple[float, UInt8[Tensor, "1 c h w"]]]]:
    """The frames of each clip with their times, resized; a remainder is left out."""
    resized = ((time, resize_and_crop(frame[None], form.size)) for time, frame in frames)
    while len(clip := list(islice(resized, form.frames))) == form.frames:
        yield clip


def _at_rate(
    scene: Iterable[tuple[float, UInt8[Tensor, "c h w"]]], fps: float
) -> Iterator[tuple[float, UInt8[Tensor, "c h w"]]]:
    """The frames of a scene at the wanted rate: for each moment the frame nearest in time."""
    before, start, shown, step, count = None, 0.0, 0.0, 1 / fps, 0
    for time, frame in scene:
        if before is None:
            start = time
        else:
            step = time - start - shown
            while count / fps < shown + step / 2 - 1e-6:
                yield start + count / fps, before
                count += 1
        before, shown = frame, time - start
    while before is not None and count / fps < shown + step / 2 - 1e-6:
        yield start + count / fps, before
        count += 1


def _is_clip(path: Path, info: VideoInfo, form: Format) -> bool:
    """Whether a file is one clip already."""
    fits = (info.frames, info.height, info.width) == (form.frames, form.size, form.size)
    return path.suffix.lower() == ".mp4" and fits and abs(info.fps - form.fps) < 1e-3
