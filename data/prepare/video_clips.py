"""The clips of one video: consecutive frames of one scene, at the wanted rate and size.

Axis letters: t frames, c channels (3, red green blue), h w pixels.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from data.prepare.filters import Filters
from data.prepare.flaws import Bars
from data.prepare.scenes import find_scenes
from t2v.video import VideoInfo, is_plain, resize_and_crop, stream_frames

_TOLERANCE = 1e-6
"""Seconds, for rounding errors when frame times are compared."""
NO_BARS = Bars()
_OFF_TIME = 0.1
"""Part of a frame by which the frames of a video may be shown too early or late for a clip of constant rate."""


class ClipFormat(NamedTuple):
    """The properties that all clips share, and the limits for the videos they are cut from."""

    size: int | Sequence[tuple[int, int]]
    """Height and width in pixels, or several heights and widths: a video gets the one with the nearest aspect ratio."""
    fps: float
    """Frames per second."""
    frames: int
    scene_threshold: float
    """Mean change of a pixel, from 0 to 255, above which a new scene begins; 0 does not look for scenes."""
    filters: Filters
    timeout: float
    """Seconds for each clip."""
    stride: int | None = None
    """Frames between the starts of two clips of a scene; None for as many as a clip has."""
    max_clips: int | None = None
    """Largest number of clips of a video; None for no limit."""

    @property
    def too_short(self) -> str:
        """Why a video or a scene with less than a clip is dropped."""
        seconds = self.frames / self.fps
        return f"too short (a clip takes {seconds:.3g} s: {self.frames} frames at {self.fps:g} fps)"

    def size_of(self, info: VideoInfo) -> tuple[int, int]:
        """Return height and width of the clips of a video.

        Args:
            info: Length, rate and size of the video.
        """
        if isinstance(self.size, int):
            return self.size, self.size
        return min(self.size, key=lambda size: abs(math.log(size[0] * info.width / (size[1] * info.height))))


class VideoClip(NamedTuple):
    """A clip of a video, or a scene that is too short for one."""

    start: float
    """Start in the video, in seconds."""
    frames: UInt8[Tensor, "t c h w"] | None
    """None if the scene is too short for a clip."""
    mp4: bytes | None = None
    """The file's bytes, if the video already is exactly one clip."""


class TimedFrame(NamedTuple):
    """A frame and its time."""

    time: float
    """Seconds since the first frame of the video."""
    frame: UInt8[Tensor, "c h w"]


def cut_video(
    path: Path, info: VideoInfo, clip_format: ClipFormat, bars: Bars = NO_BARS, deinterlace: bool = False
) -> Iterator[VideoClip]:
    """Yield the clips of a video in order, and an entry without frames for each scene shorter than a clip.

    Args:
        path: The video.
        info: Its length, rate and size.
        clip_format: Properties of the clips.
        bars: Black bars to cut off.
        deinterlace: Whether to deinterlace frames that are not marked as interlaced.

    Raises:
        DecodeError: If the video cannot be decoded.
    """
    if not (any(bars) or deinterlace) and (whole := _as_clip(path, info, clip_format)) is not None:
        yield VideoClip(0.0, whole, path.read_bytes())
        return
    starts = [0.0]
    if clip_format.scene_threshold:
        starts = [start for start, _ in find_scenes(path, clip_format.scene_threshold)]

    def scene_number(frame: TimedFrame) -> int:
        return bisect_right(starts, frame.time + _TOLERANCE, lo=1) - 1

    timed = (TimedFrame(time, bars.crop(frame)) for time, frame in stream_frames(path, deinterlace))
    for scene, frames in groupby(timed, scene_number):
        too_short = True
        for clip in _group(_resample(frames, clip_format.fps), clip_format, clip_format.size_of(bars.inside(info))):
            too_short = False
            yield clip
        if too_short:
            yield VideoClip(round(starts[scene], 6), None)


def _as_clip(path: Path, info: VideoInfo, clip_format: ClipFormat) -> UInt8[Tensor, "t c h w"] | None:
    """Return the frames of a file that already is exactly one clip; None if it is not."""
    fits = (info.frames, info.height, info.width) == (clip_format.frames, *clip_format.size_of(info))
    if not _is_mp4(path) or not fits or abs(info.fps - clip_format.fps) >= 1e-3 or not is_plain(path):
        return None
    frames: list[UInt8[Tensor, "c h w"]] = []
    for time, frame in stream_frames(path):
        off_time = abs(time - len(frames) / clip_format.fps)
        if len(frames) == clip_format.frames or off_time >= _OFF_TIME / clip_format.fps:
            return None
        frames.append(frame)
    return torch.stack(frames) if len(frames) == clip_format.frames else None


def _is_mp4(path: Path) -> bool:
    """Return whether a file is an mp4, by its name and by its content: shards of others may have any video as mp4."""
    with path.open("rb") as file:
        return path.suffix.lower() == ".mp4" and file.read(8)[4:] == b"ftyp"


def _group(frames: Iterable[TimedFrame], clip_format: ClipFormat, size: tuple[int, int]) -> Iterator[VideoClip]:
    """Resize the frames of a scene and group them into clips; a remainder is left out."""
    length, stride = clip_format.frames, clip_format.stride or clip_format.frames
    clip: list[tuple[float, UInt8[Tensor, "1 c h w"]]] = []
    gap = 0  # frames to leave out before the next clip
    for time, frame in frames:
        if gap:
            gap -= 1
            continue
        clip.append((time, resize_and_crop(frame[None], size)))
        if len(clip) == length:
            yield VideoClip(round(clip[0][0], 6), torch.cat([picture for _, picture in clip]))
            clip, gap = clip[stride:], max(0, stride - length)


def _resample(frames: Iterable[TimedFrame], fps: float) -> Iterator[TimedFrame]:
    """Yield the frames of a scene at the wanted rate: for each time of the output, the frame nearest to it."""
    start: float | None = None
    count = 0  # frames yielded
    for frame, end in _with_ends(frames, fps):
        if start is None:
            start = frame.time
        while count / fps < end - start - _TOLERANCE:
            yield TimedFrame(start + count / fps, frame.frame)
            count += 1


def _with_ends(frames: Iterable[TimedFrame], fps: float) -> Iterator[tuple[TimedFrame, float]]:
    """Yield each frame with the time until which it is the nearest one; the last lasts as long as the one before."""
    previous: TimedFrame | None = None
    step = 1 / fps
    for current in frames:
        if previous is not None:
            step = current.time - previous.time
            yield previous, previous.time + step / 2
        previous = current
    if previous is not None:
        yield previous, previous.time + step / 2
