"""Turn footage and its captions into video shards: `python -m data.prepare SOURCE OUT`.

Each video is cut at its scenes, and each scene into consecutive clips of `frames` frames at `fps`, resized by the
shorter side, cropped in the middle and encoded as H.264; a remainder shorter than a clip is dropped. An mp4 that is
exactly one such clip is copied as it is.

1. Cutting: jobs of a few videos each leave their clips in `OUT.partial/clips`; see `cutting`.
2. Packing: near-duplicates are dropped, and the clips are dealt to the shards in order, one job a shard; see `packing`.

A job's files appear whole, and what is there is not made again: after a crash the same command goes on. The shards are
the same, byte for byte, whatever the number of workers, the engine and the crashes. Until they are complete, the clips
take their space twice.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from data.prepare.cutting import Format, cut_all, divide
from data.prepare.dropped import Dropped, summary
from data.prepare.engine import processes, ray_cluster
from data.prepare.filters import Filters
from data.prepare.packing import Clip, pack_all, read_clips, without_duplicates
from data.prepare.report import write_report
from data.prepare.sources import digest, find_videos
from t2v.errors import UserError

__all__ = ["Filters", "prepare"]

ORDINARY = Filters()


def prepare(
    source: Path,
    out: Path,
    captions: Path | None = None,
    size: int = 64,
    fps: float = 8,
    frames: int = 16,
    scenes: float = 27.0,
    filters: Filters = ORDINARY,
    path_column: str = "path",
    caption_column: str = "caption",
    samples_per_shard: int = 1000,
    engine: Literal["process", "ray"] = "process",
    num_workers: int = 2,
    videos_per_job: int = 16,
    timeout: float = 600,
) -> None:
    """Turn footage and its captions into video shards.

    Args:
        source: folder of videos or of shards that `video2dataset` made, or one such shard.
        out: folder to make; it appears when all shards are complete, and a run that was stopped goes on.
        captions: CSV, JSON-lines, JSON or Parquet file with a row for each video, WebVid's CSV or MSR-VTT's JSON;
            found in the folder where it is not given.
        size: height and width of a clip in pixels; must be even.
        fps: frames a second.
        frames: frames in a clip; longer videos are cut into several clips, shorter ones are dropped.
        scenes: mean change of a pixel from one frame to the next, from 0 to 255, above which a scene ends; no clip
            runs over a scene's end. 0 looks for none, which saves one decoding of each video.
        filters: limits outside which footage is dropped.
        path_column: the captions' column with the video's path, relative to `source`.
        caption_column: the captions' column with the caption, or with a list of captions.
        samples_per_shard: clips in a shard.
        engine: process: processes of this machine; ray: the Ray cluster of `RAY_ADDRESS`, on which `source` and `out`
            must be shared folders, or a Ray of this machine where it is not set.
        num_workers: processes that decode and encode; a Ray cluster gives all its CPUs.
        videos_per_job: videos that a worker takes at a time; a run that is killed repeats at most the jobs it was at.
        timeout: seconds for each clip, after which a video is dropped; to find its scenes it has as long, and its own
            length besides.
    """
    numbers = {
        "size": size,
        "fps": fps,
        "frames": frames,
        "samples_per_shard": samples_per_shard,
        "num_workers": num_workers,
        "videos_per_job": videos_per_job,
        "timeout": timeout,
    }
    if wrong := [f"{name}={value}" for name, value in numbers.items() if value <= 0 or (name == "size" and value % 2)]:
        raise UserError(f"{', '.join(wrong)}: all must be greater than 0, and size even, as H.264 wants it.")
    if scenes < 0:
        raise UserError(f"scenes={scenes:g} must be at least 0; 0 looks for no scene cuts.")
    _check_packages(scenes, filters, engine)
    videos, dropped = find_videos(source, captions, path_column, caption_column, filters)
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
    if _is_complete(out, settings):
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed on its last step
        print(f"{out} is complete already: nothing to do.")
        return
    form = Format(size, fps, frames, scenes, filters, timeout)
    with _begun(partial, settings), (ray_cluster if engine == "ray" else processes)(num_workers) as run:
        jobs = divide(videos, videos_per_job, partial.absolute() / "clips", form)
        cut_all(jobs, run)
        clips = without_duplicates(read_clips(jobs, dropped), filters.max_hash_distance, dropped)
        if clips:
            pack_all(clips, samples_per_shard, partial.absolute() / "shards", run)
            _finish(partial / "shards", out, clips, dropped, settings)
    shutil.rmtree(partial)
    if not clips:
        raise UserError(f"No clip of '{source}' was kept: {summary(dropped)}.")
    print(f"{out}: {len(clips)} clips from {len(videos)} videos. {out / 'report.html'} shows them.")
    if dropped:
        print(f"Dropped {len(dropped)}: {summary(dropped)}.")


def _check_packages(scenes: float, filters: Filters, engine: str) -> None:
    """Say at once what would be missing at the end of hours."""
    wanted = {
        "matplotlib": True,
        "scenedetect": scenes > 0,
        "imagehash": filters.max_hash_distance is not None,
        "ray": engine == "ray",
    }
    if missing := [name for name, is_wanted in wanted.items() if is_wanted and find_spec(name) is None]:
        raise UserError(f"Not installed: {', '.join(missing)}; run pip install 't2v[prepare,ray]'.")


@contextmanager
def _begun(partial: Path, settings: dict[str, Any]) -> Iterator[None]:
    """The folder of a run that begins or goes on, which no other run may touch meanwhile.

    Raises:
        UserError: where another run is at it, or left it with other settings.
    """
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / "lock").open("w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except BlockingIOError:
            raise UserError(
                f"Another run is writing '{partial}': wait for its end, or choose another folder."
            ) from None
        path = partial / "prepare.json"
        before = _read_settings(path)
        if before not in (None, settings):
            raise UserError(
                f"'{partial}' holds a run that was stopped, with other settings; what differs: "
                f"{_differences(before, settings)}. Repeat its settings to go on with it, or delete it."
            )
        for left in [*partial.rglob("*.partial"), *partial.rglob("*.now")]:
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        for name in ("clips", "shards"):
            (partial / name).mkdir(exist_ok=True)
        if before is None:
            _write_settings(path, settings)
        else:
            print(f"Going on with '{partial}'.")
        yield


def _finish(shards: Path, out: Path, clips: list[Clip], dropped: list[Dropped], settings: dict[str, Any]) -> None:
    """Add the report and the settings to the shards, and give the folder its name."""
    kept = [
        {
            "key": clip.key,
            "source": clip.told["source"],
            "caption": clip.captions[0],
            "seconds": clip.told["frames"] / clip.told["fps"],
            "video_seconds": clip.seconds,
            "height": clip.height,
            "width": clip.width,
        }
        for clip in clips
    ]
    write_report(shards, kept, [drop._asdict() for drop in dropped], settings)
    _write_settings(shards / "prepare.json", settings)
    if out.exists():
        out.rmdir()
    shards.rename(out)


def _is_complete(out: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds the shards that this run would make.

    Raises:
        UserError: where it holds anything else.
    """
    if not out.exists():
        return False
    before = _read_settings(out / "prepare.json")
    if before is None:
        if not out.is_dir() or any(out.iterdir()):
            raise UserError(f"'{out}' exists already, and not as shards of this command: choose another folder.")
        return False
    if before != settings:
        raise UserError(
            f"'{out}' holds shards made before with other settings; what differs: {_differences(before, settings)}. "
            "Delete it, or choose another folder."
        )
    return True


def _differences(before: dict[str, Any], settings: dict[str, Any]) -> str:
    return ", ".join(
        "the footage or its captions" if name == "source" else f"{name} ({before.get(name)}, now {value})"
        for name, value in settings.items()
        if name not in before or before[name] != value
    )


def _read_settings(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write_settings(path: Path, settings: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(settings, indent=1))
    partial.replace(path)
