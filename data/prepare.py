"""Turn a folder of footage and its captions into video shards: `python -m data.prepare SOURCE OUT`.

Captions are a CSV or JSON-lines file with the columns path and caption (`captions.csv`, `captions.jsonl` or
`metadata.csv` in the folder, or `--captions FILE`), or a .txt beside each video. Each video is cut into consecutive
clips of `frames` frames at `fps`, resized by its shorter side, cropped in the middle and encoded as H.264; a remainder
shorter than a clip is dropped. An mp4 that is exactly one such clip is copied as it is.
"""

import csv
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from data.shards import ShardWriter
from t2v.errors import UserError, run_tool
from t2v.video import DecodeError, probe, read_frames, resize_and_crop, stream_frames, write_mp4

VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
CAPTION_FILES = ("captions.csv", "captions.jsonl", "metadata.csv")


class Video(NamedTuple):
    """One video of the source."""

    name: str
    """Its path as the captions give it."""
    path: Path
    caption: str
    extra: dict[str, Any]
    """The other columns of its row; they go into the sample's json."""


class Format(NamedTuple):
    """What every clip is like."""

    size: int
    fps: float
    frames: int


def prepare(
    source: Path,
    out: Path,
    captions: Path | None = None,
    size: int = 64,
    fps: float = 8,
    frames: int = 16,
    path_column: str = "path",
    caption_column: str = "caption",
    samples_per_shard: int = 1000,
    num_workers: int = 2,
) -> None:
    """Turn a folder of footage and its captions into video shards.

    Args:
        source: folder of videos.
        out: folder to make; it appears when all shards are complete.
        captions: CSV or JSON-lines file with a row for each video; found in the folder where it is not given.
        size: height and width of a clip in pixels; must be even.
        fps: frames a second.
        frames: frames in a clip; longer videos are cut into several clips, shorter ones are dropped.
        path_column: the captions' column with the video's path, relative to `source`.
        caption_column: the captions' column with the caption.
        samples_per_shard: clips in a shard.
        num_workers: processes that decode and encode.
    """
    numbers = {"size": size, "fps": fps, "frames": frames, "num_workers": num_workers}
    if wrong := [f"{name}={value}" for name, value in numbers.items() if value <= 0 or (name == "size" and value % 2)]:
        raise UserError(f"{', '.join(wrong)}: all must be greater than 0, and size even, as H.264 wants it.")
    videos, dropped = find_videos(source, captions, path_column, caption_column)
    settings = {
        "size": size,
        "fps": fps,
        "frames": frames,
        "samples_per_shard": samples_per_shard,
        "videos": len(videos),
        "source": _digest(videos),
    }
    if _is_complete(out, settings):
        print(f"{out} is complete already: nothing to do.")
        return
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        kept = _write_shards(partial, videos, dropped, Format(size, fps, frames), samples_per_shard, num_workers)
        if not kept:
            raise UserError(f"No clip of '{source}' was kept: {_summary(dropped)}.")
        (partial / "prepare.json").write_text(json.dumps(settings, indent=1))
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}: {kept} clips from {len(videos)} videos.")
    if dropped:
        print(f"Dropped {len(dropped)}: {_summary(dropped)}.")


def find_videos(
    source: Path, captions: Path | None, path_column: str, caption_column: str
) -> tuple[list[Video], list[tuple[str, str]]]:
    """The captioned videos of a folder, and the others with the reason why they are left out.

    Args:
        source: folder of videos.
        captions: the caption file, or None to look for one.
        path_column: column with the video's path.
        caption_column: column with the caption.

    Raises:
        UserError: where there are no videos or no captions.
    """
    if not source.is_dir():
        raise UserError(f"There is no folder '{source}': give the folder that holds the videos.")
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    if not files:
        raise UserError(f"No videos in '{source}': none of its files ends in {', '.join(sorted(VIDEO_SUFFIXES))}.")
    captions = captions or next((source / name for name in CAPTION_FILES if (source / name).is_file()), None)
    rows = _read_rows(captions, path_column, caption_column) if captions else _rows_beside(source, files)
    videos, dropped = [], []
    for name, caption, extra in rows:
        path = source / name
        if not path.is_file():
            dropped.append((name, "missing file"))
        elif not caption:
            dropped.append((name, "no caption"))
        else:
            videos.append(Video(name, path, caption, extra))
    named = {(source / name).resolve() for name, _, _ in rows}
    dropped += [(str(path.relative_to(source)), "no caption") for path in files if path.resolve() not in named]
    if not videos:
        told = f"'{captions}' names" if captions else f"there is no {', '.join(CAPTION_FILES)}, and no .txt beside"
        raise UserError(
            f"No video in '{source}' has a caption: {told} none of its {len(files)} videos with a caption; "
            f"give --captions a file with the columns {path_column} and {caption_column}."
        )
    return videos, dropped


def _write_shards(
    folder: Path,
    videos: list[Video],
    dropped: list[tuple[str, str]],
    form: Format,
    samples_per_shard: int,
    num_workers: int,
) -> int:
    """Cut all videos and write their clips in order; returns the number of clips, and adds to `dropped`."""
    work = folder / "clips"  # cut clips wait here for their turn, not in memory
    work.mkdir(parents=True)
    with (
        ShardWriter(folder, samples_per_shard) as writer,
        ProcessPoolExecutor(num_workers, initializer=_start_worker) as pool,
        closing(cast(Any, pool.map(cut, range(len(videos)), videos, repeat(form), repeat(work)))) as cuts,
    ):
        bar = tqdm(zip(videos, cuts, strict=True), "preparing", len(videos), unit="video")
        for number, (video, (clips, reason)) in enumerate(bar):
            if reason:
                dropped.append((video.name, reason))
            for i, clip in enumerate(clips):
                writer.write(_sample(f"{number:06d}_{i:04d}", video, clip, i, form))
                clip.unlink()
    work.rmdir()
    return writer.samples


def cut(number: int, video: Video, form: Format, folder: Path) -> tuple[list[Path], str | None]:
    """Cut one video into clips.

    Args:
        number: the video's number, for the files' names.
        video: the video.
        form: what every clip is like.
        folder: where the clips go.

    Returns:
        The clips' files, and why there are none or not all.
    """
    clips: list[Path] = []
    try:
        if _is_clip(video.path, form):
            clips.append(folder / f"{number}_0.mp4")
            shutil.copyfile(video.path, clips[0])
        else:
            frames = _at_rate(video.path, form)
            while len(clip := list(islice(frames, form.frames))) == form.frames:
                clips.append(folder / f"{number}_{len(clips)}.mp4")
                write_mp4(clips[-1], torch.stack(clip), form.fps)
    except DecodeError as error:
        return clips, f"does not decode ({error})" if not clips else f"decodes only in part ({error})"
    return clips, None if clips else "too short"


def _start_worker() -> None:
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:  # else a worker outlives a command that is killed
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _at_rate(path: Path, form: Format) -> Iterator[UInt8[Tensor, "c h w"]]:
    """The resized frames of a video at the wanted rate: for each moment the frame nearest in time."""
    before, shown, step, count = None, 0.0, 1 / form.fps, 0
    for time, frame in stream_frames(path):
        if before is not None:
            step = time - shown
            while count / form.fps < (shown + time) / 2 - 1e-6:
                yield before
                count += 1
        before, shown = resize_and_crop(frame[None], form.size)[0], time
    while before is not None and count / form.fps < shown + step / 2 - 1e-6:
        yield before
        count += 1


def _is_clip(path: Path, form: Format) -> bool:
    """Whether a file is one clip already, and decodes."""
    info = probe(path)
    fits = (info.frames, info.height, info.width) == (form.frames, form.size, form.size)
    if path.suffix.lower() == ".mp4" and fits and abs(info.fps - form.fps) < 1e-3:
        read_frames(path, range(info.frames))
        return True
    return False


def _sample(key: str, video: Video, clip: Path, i: int, form: Format) -> dict[str, Any]:
    told = {"caption": video.caption, "source": video.name, "start": i * form.frames / form.fps}
    size = {"frames": form.frames, "fps": form.fps, "height": form.size, "width": form.size}
    return {"__key__": key, "mp4": clip.read_bytes(), "txt": video.caption, "json": {**video.extra, **told, **size}}


def _read_rows(path: Path, path_column: str, caption_column: str) -> list[tuple[str, str, dict[str, Any]]]:
    if not path.is_file():
        raise UserError(f"There is no caption file '{path}': correct --captions.")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = (line for line in file if line.strip())
            rows = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else list(csv.DictReader(file))
    except (ValueError, csv.Error) as error:
        raise UserError(f"'{path}' is not a readable {path.suffix[1:]} file ({error}).") from error
    columns = list(rows[0]) if rows and all(isinstance(row, dict) for row in rows) else []
    missing = [name for name in (path_column, caption_column) if name not in columns]
    if missing:
        raise UserError(
            f"'{path}' has no column {' and no column '.join(missing)}; its columns are "
            f"{', '.join(map(str, columns)) or 'none'}: name the right ones with --path_column and --caption_column."
        )
    return [
        (
            str(row.get(path_column) or "").strip(),
            " ".join(str(row.get(caption_column) or "").split()),
            {str(name): value for name, value in row.items() if name not in (path_column, caption_column)},
        )
        for row in rows
    ]


def _rows_beside(source: Path, files: list[Path]) -> list[tuple[str, str, dict[str, Any]]]:
    texts = [(path, path.with_suffix(".txt")) for path in files]
    return [
        (str(path.relative_to(source)), " ".join(text.read_text(encoding="utf-8-sig").split()), {})
        for path, text in texts
        if text.is_file()
    ]


def _digest(videos: list[Video]) -> str:
    """Changes when a video is added, replaced by one of another size, or gets another caption."""
    told = json.dumps([(video.name, video.path.stat().st_size, video.caption) for video in videos])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _is_complete(out: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds the shards that this run would make.

    Raises:
        UserError: where it holds anything else.
    """
    if not out.exists():
        return False
    try:
        before = json.loads((out / "prepare.json").read_text())
    except (OSError, ValueError):
        if not out.is_dir() or any(out.iterdir()):
            raise UserError(
                f"'{out}' exists already, and not as shards of this command: choose another folder."
            ) from None
        return False
    if before != settings:
        names = [name for name in settings if before.get(name) != settings[name]]
        told = [
            "the footage or its captions" if name == "source" else f"{name} ({before.get(name)}, now {settings[name]})"
            for name in names
        ]
        raise UserError(
            f"'{out}' holds shards made before with other settings; what differs: {', '.join(told)}. "
            "Delete it, or choose another folder."
        )
    return True


def _summary(dropped: list[tuple[str, str]]) -> str:
    """The reasons, how often each came up, and which videos they struck."""
    reasons = Counter(reason.split(" (")[0] for _, reason in dropped)
    parts = []
    for reason, count in reasons.items():
        names = [f"{name}{why.removeprefix(reason)}" for name, why in dropped if why.startswith(reason)]
        more = f" and {count - 10} more" if count > 10 else ""
        parts.append(f"{count} {reason}: {', '.join(names[:10])}{more}")
    return "; ".join(parts)


if __name__ == "__main__":
    run_tool(prepare)
