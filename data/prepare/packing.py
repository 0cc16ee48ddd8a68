"""Packing: near-duplicates are left out, and the clips go into shards.

What goes where follows from the clips' order alone. It is worked out anew by each run, which takes seconds; a shard
that is there already is left as it is.
"""

import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from data.prepare.cutting import Cutting, read_result
from data.prepare.dropped import Dropped
from data.prepare.engine import Run
from data.prepare.filters import Duplicates
from data.shards import ShardWriter
from t2v.errors import UserError


class Clip(NamedTuple):
    """One clip on its way from a job's file into a shard."""

    key: str
    captions: list[str]
    told: dict[str, Any]
    """What goes into the sample's json."""
    file: Path
    offset: int
    size: int
    hash: int | None
    """Its perceptual hash; None where near-duplicates are kept."""
    seconds: float
    """Length of the video it was cut from."""
    height: int
    """Height of that video in pixels."""
    width: int


class Packing(NamedTuple):
    """A job: the clips of one shard."""

    folder: Path
    number: int
    clips: list[Clip]

    @property
    def shard(self) -> Path:
        """The tar."""
        return self.folder / f"shard-{self.number:06d}.tar"


def read_clips(jobs: list[Cutting], dropped: list[Dropped]) -> Iterator[Clip]:
    """All clips in order; adds what was dropped on cutting to `dropped`.

    Args:
        jobs: the jobs of cutting, done.
        dropped: what was left out.
    """
    for job in jobs:
        result = read_result(job.result)
        assert result is not None
        rows, lost = result
        dropped += lost
        size = {"frames": job.form.frames, "fps": job.form.fps, "height": job.form.size, "width": job.form.size}
        for row in rows:
            video = job.videos[row["video"] - job.first]
            told = {**video.extra, "caption": video.captions[0], "source": video.name, "start": row["start"], **size}
            if len(video.captions) > 1:
                told["captions"] = video.captions
            key = f"{row['video']:06d}_{row['number']:04d}"
            offset, length = row["place"]
            of_video = (row["seconds"], row["height"], row["width"])
            yield Clip(key, video.captions, told, job.clips, offset, length, row["hash"], *of_video)


def without_duplicates(clips: Iterable[Clip], max_distance: int | None, dropped: list[Dropped]) -> list[Clip]:
    """The clips that are not like an earlier one; adds the others to `dropped`.

    Args:
        clips: all clips, in order.
        max_distance: greatest number of bits in which hashes of near-duplicates differ; None keeps all.
        dropped: what was left out.
    """
    if max_distance is None:
        return list(clips)
    kept, seen = [], Duplicates(max_distance)
    for clip in clips:
        assert clip.hash is not None
        if earlier := seen.find(clip.hash):
            dropped.append(Dropped(clip.told["source"], clip.told["start"], f"near-duplicate (of {earlier})"))
        else:
            seen.add(clip.hash, clip.key)
            kept.append(clip)
    return kept


def pack_all(clips: list[Clip], samples_per_shard: int, folder: Path, run: Run) -> None:
    """Write the shards that are not there.

    Args:
        clips: the kept clips, in order.
        samples_per_shard: clips in a shard.
        folder: where the shards go.
        run: calls `pack` for each of them.

    Raises:
        UserError: where a process dies.
    """
    starts = range(0, len(clips), samples_per_shard)
    jobs = [Packing(folder, number, clips[at : at + samples_per_shard]) for number, at in enumerate(starts)]
    left = deque(job for job in jobs if not job.shard.exists())
    with tqdm(desc="packing", total=len(jobs), initial=len(jobs) - len(left), unit="shard") as bar:
        for job, lived in run(pack, left):
            if not lived:
                raise UserError(
                    f"The process that wrote {job.shard.name} was killed, as happens where memory is short: lower "
                    "num_workers; the same command goes on."
                )
            bar.update()


def pack(job: Packing) -> None:
    """Write a shard with its index; the tar appears last.

    Args:
        job: what to do.
    """
    folder = job.folder / f".{job.shard.name}.{os.getpid()}.partial"
    with ShardWriter(folder, len(job.clips)) as writer:
        for clip in job.clips:
            with clip.file.open("rb") as file:
                file.seek(clip.offset)
                mp4 = file.read(clip.size)
            writer.write({"__key__": clip.key, "mp4": mp4, "txt": clip.captions[0], "json": clip.told})
    (folder / "shard-000000.index.json").replace(job.shard.with_suffix(".index.json"))
    (folder / "shard-000000.tar").replace(job.shard)
    shutil.rmtree(folder)
