"""Packing: near-duplicates are dropped, and each job writes the clips of one shard.

Which clip goes into which shard depends only on the order of the clips. Each run computes it again, which takes
seconds; shards that exist already are not written again.
"""

import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.prepare.cutting import CutJob, read_result
from data.prepare.dropped import Dropped
from data.prepare.duplicates import HashSearch
from data.prepare.engine import Engine
from data.prepare.sources import Video
from data.progress import ProgressBar
from data.shards import ShardWriter
from t2v.errors import UserError


class Clip(NamedTuple):
    """A clip in the file of a cutting job."""

    key: str
    captions: list[str]
    metadata: dict[str, Any]
    """The sample's json."""
    file: Path
    """File with the bytes of the job's clips."""
    offset: int
    """First byte of the mp4 in the file."""
    size: int
    """Bytes of the mp4."""
    hash: int | None
    """Perceptual hash; None if near-duplicates are kept."""
    video_seconds: float
    """Length of the video it was cut from."""
    video_width: int
    """Width of that video in pixels."""
    video_height: int
    """Height of that video in pixels."""


class PackJob(NamedTuple):
    """The clips of one shard."""

    folder: Path
    """Folder for the shard."""
    number: int
    """Number of the shard."""
    clips: list[Clip]

    @property
    def shard(self) -> Path:
        """The tar."""
        return self.folder / f"shard-{self.number:06d}.tar"


def read_clips(jobs: list[CutJob], dropped: list[Dropped]) -> Iterator[Clip]:
    """Yield all clips in order; append what the jobs dropped to `dropped`.

    Args:
        jobs: The cutting jobs, all complete.
        dropped: Dropped videos and clips.
    """
    for job in jobs:
        result = read_result(job.result)
        assert result is not None
        rows, dropped_by_job = result
        dropped += dropped_by_job
        clip_format = job.clip_format
        for row in rows:
            video = job.videos[row.video - job.first]
            captions = _captions_at(video, row.start, row.start + clip_format.frames / clip_format.fps)
            if captions is None:
                dropped.append(Dropped(video.name, row.start, "in no captioned part of the video"))
                continue
            height, width = clip_format.size_of(row.info)
            metadata = {
                **video.extra,
                **({"caption": captions[0]} if captions else {}),
                "source": video.name,
                "start": row.start,
                "frames": clip_format.frames,
                "fps": clip_format.fps,
                "height": height,
                "width": width,
                **({"flaws": row.flaws} if row.flaws else {}),
            }
            if len(captions) > 1:
                metadata["captions"] = captions
            yield Clip(
                key=f"{row.video:06d}_{row.number:04d}",
                captions=captions,
                metadata=metadata,
                file=job.clips,
                offset=row.offset,
                size=row.size,
                hash=row.hash,
                video_seconds=row.info.frames / row.info.fps,
                video_width=row.info.width,
                video_height=row.info.height,
            )


def _captions_at(video: Video, start: float, end: float) -> list[str] | None:
    """Return the captions of a part of a video, or None if it is in none of the video's captioned parts.

    Args:
        video: The video.
        start: Start of the part in seconds.
        end: Its end in seconds.
    """
    if not video.segments:
        return video.captions
    slack = (end - start) / 20  # the times of captions are rounded to frames
    inside = [part.caption for part in video.segments if part.start - slack <= start and end <= part.end + slack]
    return list(dict.fromkeys(inside)) or None


def drop_duplicates(clips: Iterable[Clip], max_distance: int | None, dropped: list[Dropped]) -> list[Clip]:
    """Return the clips that are no near-duplicates of an earlier one; append the others to `dropped`.

    Args:
        clips: All clips, in order.
        max_distance: Largest number of bits in which the hashes of near-duplicates differ; None keeps all clips.
        dropped: Dropped videos and clips.
    """
    if max_distance is None:
        return list(clips)
    kept = []
    hashes = HashSearch(max_distance)
    for clip in clips:
        assert clip.hash is not None
        earlier = hashes.find(clip.hash)
        if earlier is None:
            hashes.add(clip.hash, clip.key)
            kept.append(clip)
        else:
            source, start = clip.metadata["source"], clip.metadata["start"]
            dropped.append(Dropped(source, start, f"near-duplicate (of {earlier})"))
    return kept


def pack_all(clips: list[Clip], samples_per_shard: int, folder: Path, run: Engine) -> None:
    """Write the shards that do not exist yet.

    Args:
        clips: The kept clips, in order.
        samples_per_shard: Clips in a shard.
        folder: Folder for the shards.
        run: Engine that calls `pack` for each job.

    Raises:
        UserError: If a process dies.
    """
    starts = range(0, len(clips), samples_per_shard)
    jobs = [PackJob(folder, number, clips[at : at + samples_per_shard]) for number, at in enumerate(starts)]
    pending = deque(job for job in jobs if not job.shard.exists())
    with ProgressBar(desc="packing", total=len(jobs), initial=len(jobs) - len(pending), unit="shard") as bar:
        for job, succeeded in run(pack, pending):
            if not succeeded:
                raise UserError(
                    f"The process that wrote {job.shard.name} was killed, probably for lack of memory: lower "
                    "num_workers; the same command continues."
                )
            bar.update()


def pack(job: PackJob) -> None:
    """Write a shard and its index; the tar appears last and marks the job as complete.

    Args:
        job: The job.
    """
    with tempfile.TemporaryDirectory(dir=job.folder, suffix=".partial") as temporary:
        with ShardWriter(temporary, len(job.clips)) as writer:
            for clip in job.clips:
                with clip.file.open("rb") as file:
                    file.seek(clip.offset)
                    mp4 = file.read(clip.size)
                text = {"txt": clip.captions[0]} if clip.captions else {}
                writer.write({"__key__": clip.key, "mp4": mp4, **text, "json": clip.metadata})
        Path(temporary, "shard-000000.index.json").replace(job.shard.with_suffix(".index.json"))
        Path(temporary, "shard-000000.tar").replace(job.shard)
