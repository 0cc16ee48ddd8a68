"""Cutting: each job cuts a few consecutive videos and writes two files.

`000000-000015.json` lists the clips and what was dropped; `000000-000015.clips` contains the clips' bytes, one after
the other. Both appear complete or not at all; the json is written last and marks the job as complete. Each video is
decoded once to find its scenes, and once to cut it.
"""

import faulthandler
import json
import os
import tempfile
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import fsspec
import torch

from data.index import read_range
from data.prepare.dropped import Dropped
from data.prepare.duplicates import perceptual_hash
from data.prepare.engine import Engine
from data.prepare.files import File, local_copy
from data.prepare.filters import reason_to_drop_clip, reason_to_drop_flaws, reason_to_drop_video
from data.prepare.flaws import Flaws, find_flaws
from data.prepare.sources import Video
from data.prepare.video_clips import NO_BARS, ClipFormat, VideoClip, cut_video
from data.progress import ProgressBar
from t2v.errors import UserError
from t2v.files import atomic_path
from t2v.video import DecodeError, VideoInfo, encode_mp4, probe

MAX_JOB_BYTES = 2**28
"""A job takes no further videos once it has this many bytes."""
MAX_ATTEMPTS = 2
CRASH_REASON = "crashes the decoder or exceeds the timeout"
"""Why a video is dropped that ended the process that cut it, in each of `MAX_ATTEMPTS` attempts."""


class CutJob(NamedTuple):
    """Consecutive videos of the source to cut."""

    folder: Path
    """Folder for the two files."""
    first: int
    """Number of the first video."""
    videos: list[Video]
    clip_format: ClipFormat
    excluded: frozenset[int] = frozenset()
    """Numbers of the videos that are dropped without another attempt."""

    @property
    def name(self) -> str:
        """Name of the files, without suffix."""
        return f"{self.first:06d}-{self.first + len(self.videos) - 1:06d}"

    @property
    def result(self) -> Path:
        """The json file."""
        return self.folder / f"{self.name}.json"

    @property
    def clips(self) -> Path:
        """The file with the clips' bytes."""
        return self.folder / f"{self.name}.clips"

    @property
    def current(self) -> Path:
        """The file with the number of the video being cut; after a crash it identifies the video."""
        return self.folder / f"{self.name}.current"


class ClipRow(NamedTuple):
    """A clip that was kept, as stored in the json file of its job."""

    video: int
    """Number of its video."""
    number: int
    """Number of the clip in its video, with those that the filters dropped counted too."""
    start: float
    """Start in the video, in seconds."""
    offset: int
    """First byte in the file of clips."""
    size: int
    """Bytes of the mp4."""
    hash: int | None
    """Perceptual hash; None if near-duplicates are kept."""
    flaws: list[str]
    """Flaws of the video that were not mended, in words."""
    info: VideoInfo
    """Length, rate and size of the video, without bars that were cut off."""


def make_jobs(videos: list[Video], videos_per_job: int, folder: Path, clip_format: ClipFormat) -> list[CutJob]:
    """Divide the videos into jobs of consecutive videos, with fewer videos per job where they are large.

    Args:
        videos: All videos of the source.
        videos_per_job: Largest number of videos in a job.
        folder: Folder for the jobs' files.
        clip_format: Properties of the clips.
    """
    jobs: list[CutJob] = []
    bytes_in_job = 0
    for number, video in enumerate(videos):
        if not jobs or len(jobs[-1].videos) == videos_per_job or bytes_in_job >= MAX_JOB_BYTES:
            jobs.append(CutJob(folder, number, [], clip_format))
            bytes_in_job = 0
        jobs[-1].videos.append(video)
        bytes_in_job += video.size
    return jobs


def cut_all(jobs: list[CutJob], run: Engine) -> None:
    """Run the jobs that are not complete; exclude a video that ends its process twice.

    Args:
        jobs: All jobs.
        run: Engine that calls `cut` for each job.

    Raises:
        UserError: If a process dies before it begins with a video.
    """
    pending = deque(job for job in jobs if read_result(job.result) is None)
    total = sum(len(job.videos) for job in jobs)
    remaining = sum(len(job.videos) for job in pending)
    crashes: Counter[int] = Counter()
    with ProgressBar(desc="cutting", total=total, initial=total - remaining, unit="video") as bar:
        for job, succeeded in run(cut, pending):
            if succeeded:
                bar.update(len(job.videos))
                continue
            try:
                number = int(job.current.read_text())
            except (OSError, ValueError):
                raise UserError(
                    f"The process that was to cut '{job.videos[0].name}' and {len(job.videos) - 1} more was killed "
                    "before it began, probably for lack of memory: lower num_workers; the same command continues."
                ) from None
            crashes[number] += 1
            bar.write(
                f"'{job.videos[number - job.first].name}' {CRASH_REASON}: {crashes[number]} of {MAX_ATTEMPTS} attempts."
            )
            failed = frozenset(number for number, count in crashes.items() if count >= MAX_ATTEMPTS)
            pending.append(job._replace(excluded=job.excluded | failed))


def cut(job: CutJob) -> None:
    """Cut the videos of a job, filter and encode the clips, and write the two files.

    Args:
        job: The job.
    """
    torch.set_num_threads(1)
    rows: list[ClipRow] = []
    dropped: list[Dropped] = []
    with (
        atomic_path(job.clips) as clips_path,
        clips_path.open("wb") as clips,
        Path(os.devnull).open("w") as devnull,
    ):
        for number, video in enumerate(job.videos, job.first):
            if number in job.excluded:
                dropped.append(Dropped(video.name, None, CRASH_REASON))
                continue
            job.current.write_text(str(number))
            for row, mp4 in _cut_video(number, video, job, dropped, devnull):
                rows.append(row._replace(offset=clips.tell()))
                clips.write(mp4)
    with atomic_path(job.result) as result:
        result.write_text(json.dumps({"clips": rows, "dropped": dropped}))
    job.current.unlink(missing_ok=True)


def read_result(path: Path) -> tuple[list[ClipRow], list[Dropped]] | None:
    """Return the clips and what was dropped from the json of a job, or None if the job is not complete.

    Args:
        path: The json file.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    clips = [ClipRow._make([*row, VideoInfo(*info)]) for *row, info in content["clips"]]
    return clips, [Dropped(*drop) for drop in content["dropped"]]


def _cut_video(
    number: int, video: Video, job: CutJob, dropped: list[Dropped], devnull: IO[str]
) -> Iterator[tuple[ClipRow, bytes]]:
    """Yield the kept clips of a video with their mp4; append the others to `dropped`.

    The process exits if a clip takes longer than the timeout.
    """
    clip_format, filters = job.clip_format, job.clip_format.filters
    clips = kept = 0
    short_scenes: list[float] = []

    def restart_timer(seconds: float) -> None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=devnull)

    try:
        with as_file(video, job.folder) as path:
            restart_timer(clip_format.timeout)
            info = probe(path)
            reason = reason_to_drop_video(info, filters)
            if reason:
                dropped.append(Dropped(video.name, None, reason))
                return
            restart_timer(clip_format.timeout + info.frames / info.fps)  # no decoder is slower than playing the video
            flaws = find_flaws(path, info, clip_format.timeout)
            reason = reason_to_drop_flaws(flaws, filters)
            if reason:
                dropped.append(Dropped(video.name, None, reason))
                return
            deinterlace = flaws.interlaced and filters.interlaced == "deinterlace"
            bars = flaws.bars if filters.bars == "crop" else NO_BARS
            left = Flaws(flaws.interlaced and not deinterlace, NO_BARS if any(bars) else flaws.bars).names
            restart_timer(clip_format.timeout + info.frames / info.fps)
            for clip in cut_video(path, info, clip_format, bars, deinterlace):
                restart_timer(clip_format.timeout)
                if clip.frames is None:
                    short_scenes.append(clip.start)
                    continue
                if kept == clip_format.max_clips:
                    dropped.append(Dropped(video.name, clip.start, f"rest of the video (max_clips is {kept})"))
                    break
                clips += 1
                reason = reason_to_drop_clip(clip.frames, filters)
                if reason:
                    dropped.append(Dropped(video.name, clip.start, reason))
                else:
                    kept += 1
                    yield _encode(clip, clips - 1, number, left, bars.inside(info), clip_format)
        dropped += _drop_short_scenes(video, clips, short_scenes, clip_format)
    except (FileNotFoundError, PermissionError) as error:
        dropped.append(Dropped(video.name, None, f"does not open ({error.strerror})"))
    except (UserError, OSError):  # such as a full disk or a lost connection: not the video's fault
        raise
    except Exception as error:  # decoders raise many types, and one corrupt video must not stop a run of days
        cause = str(error) if isinstance(error, DecodeError) else f"{type(error).__name__}: {error}"
        kind = "decodes only in part" if clips else "does not decode"
        dropped.append(Dropped(video.name, None, f"{kind} ({cause})"))
    finally:
        faulthandler.cancel_dump_traceback_later()


def _encode(
    clip: VideoClip, clip_number: int, video_number: int, flaws: list[str], info: VideoInfo, clip_format: ClipFormat
) -> tuple[ClipRow, bytes]:
    assert clip.frames is not None
    mp4 = clip.mp4 or encode_mp4(clip.frames, clip_format.fps)
    hash_ = None if clip_format.filters.max_hash_distance is None else perceptual_hash(clip.frames)
    return ClipRow(video_number, clip_number, clip.start, 0, len(mp4), hash_, flaws, info), mp4


def _drop_short_scenes(
    video: Video, clips: int, short_scenes: list[float], clip_format: ClipFormat
) -> Iterator[Dropped]:
    """Yield each scene that is too short for a clip, or the whole video if it has no clips."""
    if clips:
        for start in short_scenes:
            yield Dropped(video.name, start, f"scene {clip_format.too_short}")
    else:
        scenes = "" if len(short_scenes) < 2 else "scenes "
        yield Dropped(video.name, None, scenes + clip_format.too_short)


@contextmanager
def as_file(video: Video, folder: Path) -> Iterator[Path]:
    """Yield the path of a video; a video in a tar, or at an address, is copied to a temporary file.

    Args:
        video: The video.
        folder: Folder for the copy.
    """
    if video.offset is None and isinstance(video.path, Path):
        yield video.path
        return
    with tempfile.TemporaryDirectory(dir=folder, suffix=".partial") as copies:
        path = Path(copies) / f"video{Path(video.name).suffix or '.mp4'}"
        if video.offset is None:
            yield local_copy(File(path.name, video.path, video.size), Path(copies))
            return
        filesystem, tar = fsspec.url_to_fs(str(video.path))
        path.write_bytes(read_range(filesystem, tar, video.offset, video.offset + video.size))
        yield path
