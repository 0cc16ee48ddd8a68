"""Reading video files: probing, and decoding only the frames that are wanted.

- PyAV reads. decord reads where it is asked for, and where what it gives can be relied on; both give the same pixels.
- A source is a path or the file's bytes, as they come out of a shard.

Axis letters: t frames, c channels (3, red green blue), h w pixels.
"""

import io
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from t2v.errors import UserError

Source = bytes | str | Path
Reader = Literal["pyav", "decord"]
Check = Callable[[], None]

MAX_PIXELS = 2**25
"""Largest frame that is decoded, height times width: that of 8K footage, 100 MB as RGB."""
_GROUP_BYTES = 2**24
"""So many bytes of full-size frames are decoded at once: two frames of 1080p, all of a clip for training."""
_DECORD_BYTES = 2**27
"""Largest clip that decord reads, all its frames in full size: decord decodes to the end, whatever is asked for."""


class DecodeError(ValueError):
    """These bytes are not a video that can be decoded."""


class VideoInfo(NamedTuple):
    """What the head of a video file says."""

    frames: int
    fps: float
    height: int
    width: int


def probe(source: Source) -> VideoInfo:
    """Read the head of a video; nothing is decoded.

    Args:
        source: a path, or the bytes of the file.

    Returns:
        Number of frames, frames a second, height and width in pixels.

    Raises:
        DecodeError: where it is not a video.
    """
    with _open(source) as (container, stream):
        packets = container.demux(stream)
        first, frames = next(packets), stream.frames
        if first.is_discard or not frames:  # what was cut without encoding anew begins with frames not to be shown
            frames = sum(packet.pts is not None and not packet.is_discard for packet in chain([first], packets))
        fps = float(stream.average_rate or 0)
        if not (frames and fps and stream.height and stream.width):
            raise DecodeError("its head names no frames, no frame rate or no size")
        return VideoInfo(frames, fps, stream.height, stream.width)


def read_frames(
    source: Source,
    indices: Sequence[int],
    transform: Callable[[UInt8[Tensor, "t c h w"]], Tensor] | None = None,
    timeout: float = 60.0,
    reader: Reader = "pyav",
) -> Tensor:
    """Decode the frames at the given indices.

    Args:
        source: a path, or the bytes of the file.
        indices: which frames, counted from 0, in any order and with repetitions.
        transform: makes of a few frames what is kept of them, such as smaller ones, so that not all are held in full
            size. It gets each frame once, by increasing index, and gives as many back.
        timeout: seconds that this may take, `transform` included. They are looked at between frames, or decord's
            groups of frames: a call into FFmpeg that hangs is not interrupted.
        reader: pyav or decord. decord is no faster, and some damaged files end its process; PyAV takes over where it is
            not installed, gives up, is known to give other frames than those asked for, or would hold too much.

    Returns:
        The frames as RGB, uint8 (t, c, h, w), or what `transform` made of them, in the order of `indices`.

    Raises:
        DecodeError: where a frame is missing, broken or larger than `MAX_PIXELS`, or it takes longer than `timeout`.
    """
    assert min(indices, default=-1) >= 0
    wanted, end = sorted(set(indices)), time.monotonic() + timeout

    def check() -> None:
        if time.monotonic() > end:
            raise DecodeError(f"it takes longer than the {timeout:g} seconds that one clip may take")

    groups = _groups(source, wanted, check, reader)
    parts = list(map(transform, groups) if transform else groups)
    frames = torch.cat(parts) if len(parts) > 1 else parts[0]
    return frames if wanted == list(indices) else frames[np.searchsorted(wanted, indices)]


def stream_frames(source: Source) -> Iterator[tuple[float, UInt8[Tensor, "c h w"]]]:
    """Decode a video from start to end in constant memory.

    Args:
        source: a path, or the bytes of the file.

    Yields:
        Seconds since the first frame, and the frame as RGB, upright.

    Raises:
        DecodeError: where the bytes cannot be decoded, or a frame is larger than `MAX_PIXELS`.
    """
    with _open(source) as (container, stream):
        first = None
        for frame in container.decode(stream):
            if frame.time is not None:
                first = frame.time if first is None else first
                yield frame.time - first, torch.from_numpy(_to_rgb(frame)).permute(2, 0, 1)


def resize_and_crop(video: UInt8[Tensor, "t c h w"], size: int | tuple[int, int]) -> UInt8[Tensor, "t c height width"]:
    """Resize a video until it covers `size` pixels and cut out the centre; one of that size is returned as it is.

    Args:
        video: the frames.
        size: height and width of the result, or one number for both.
    """
    high, wide = (size, size) if isinstance(size, int) else size
    height, width = video.shape[-2:]
    if (height, width) == (high, wide):
        return video
    scale = max(high / height, wide / width)
    height, width = max(high, round(height * scale)), max(wide, round(width * scale))
    video = video.contiguous(memory_format=torch.channels_last)  # as it was decoded: three times as fast
    video = F.interpolate(video, (height, width), mode="bilinear", antialias=True)
    top, left = (height - high) // 2, (width - wide) // 2
    return video[..., top : top + high, left : left + wide]


def read_clip(path: str | Path, frames: int, size: int, fps: int | float) -> UInt8[Tensor, "t c {size} {size}"]:
    """Read the beginning of a video, or a picture, as training clips are read: at a frame rate, cut to a square.

    Args:
        path: a video, or a picture of any format that Pillow reads, which is a clip of one frame.
        frames: how many frames to take.
        size: height and width in pixels; the shorter side is resized to it, and the centre is cut out.
        fps: frames a second to take; those of the video that are nearest in time.

    Raises:
        UserError: where there is no such file, it is no video and no picture, or it is shorter than `frames`.
    """
    try:
        clip = _read_picture(path)
        if clip is None:
            info = probe(path)
            wanted = np.floor(np.arange(frames) * info.fps / fps + 0.5).astype(np.int64)
            clip = read_frames(path, wanted[wanted < info.frames].tolist())
    except OSError as error:
        raise UserError(
            f"Cannot read '{path}' ({error.strerror or error}): give the path of a video or a picture."
        ) from error
    except DecodeError as error:
        raise UserError(f"'{path}' is no video or picture that can be read ({error}): give another file.") from error
    if len(clip) < frames:
        raise UserError(
            f"'{path}' has {len(clip)} frames at {fps:g} a second, but {frames} are asked for: ask for fewer, or "
            "give a longer video."
        )
    return resize_and_crop(clip, size)


def _read_picture(path: str | Path) -> UInt8[Tensor, "1 c h w"] | None:
    """A picture as a clip of one frame, upright; None where the file is none."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
    except UnidentifiedImageError:
        return None
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]


@cache
def _decord() -> ModuleType | None:
    """Decord, or None where it has no wheel or its libraries do not load."""
    # One for each frame that waits behind the last packet, even of an intact file; its own 10,240 can be a long stall.
    os.environ.setdefault("DECORD_EOF_RETRY_MAX", "2048")
    try:
        import decord
    except (ImportError, OSError):
        return None
    decord.logging.set_level(decord.logging.QUIET)
    return decord


class _open:
    """Context of a container and its video stream, in which PyAV's errors become `DecodeError`."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __enter__(self):
        try:
            self.container = av.open(io.BytesIO(self.source) if isinstance(self.source, bytes) else str(self.source))
        except (FileNotFoundError, PermissionError):
            raise
        except (av.FFmpegError, ValueError, IndexError) as error:
            raise DecodeError(getattr(error, "strerror", None) or str(error)) from error
        stream = next(iter(self.container.streams.video), None)
        if stream is None or stream.codec_context is None:
            self.container.close()
            raise DecodeError("there is no picture in it, or of a kind that is not known")
        _check_size(stream.height, stream.width)
        stream.codec_context.thread_count = 1  # many small clips: threads cost more than they bring
        return self.container, stream

    def __exit__(self, kind, error, traceback) -> None:
        self.container.close()
        if isinstance(error, av.FFmpegError):
            raise DecodeError(getattr(error, "strerror", None) or str(error)) from error


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DecodeError(f"its frames of {width}x{height} are larger than the {MAX_PIXELS:,} pixels that are decoded")


def _groups(source: Source, wanted: Sequence[int], check: Check, reader: Reader) -> Iterator[UInt8[Tensor, "t c h w"]]:
    """The wanted frames, by increasing index, a few at a time."""
    done = 0
    if reader == "decord" and (decord := _decord()) is not None:
        try:
            for group in _read_with_decord(decord, source, wanted):
                check()
                done += len(group)
                yield group.permute(0, 3, 1, 2)
        except (decord.DECORDError, RuntimeError, IndexError):
            pass  # PyAV's FFmpeg is newer: it may read the file, and says better why it cannot
    if done < len(wanted):
        frames = _read_with_pyav(source, wanted[done:], check)
        for frame in frames:
            more = islice(frames, max(0, _GROUP_BYTES // frame.nbytes - 1))
            yield torch.from_numpy(np.stack([frame, *more])).permute(0, 3, 1, 2)


def _read_with_decord(decord: ModuleType, source: Source, wanted: Sequence[int]) -> Iterator[UInt8[Tensor, "t h w c"]]:
    """Groups of frames; none where the clip is too large for decord, or it might give others than those wanted.

    It takes a key frame's place in the file for its place in the video, which is wrong by some frames for one that is
    shown after others behind it (an open group of pictures), and it counts frames that are not to be shown.
    """
    reader = decord.VideoReader(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source), num_threads=1)
    later_key_frames, begins = reader.get_key_indices()[1:], reader.get_frame_timestamp([0])[0, 0]
    if wanted[-1] >= min([len(reader), *later_key_frames]) or begins < 0:
        return
    _check_size(*(first := _from_decord(reader, wanted[:1])).shape[1:3])  # only a frame tells the size
    if first.nbytes * len(reader) <= _DECORD_BYTES:
        size = max(1, _GROUP_BYTES // first.nbytes)
        yield torch.cat([first, _from_decord(reader, wanted[1:size])]) if wanted[1:size] else first
        for start in range(size, len(wanted), size):
            yield _from_decord(reader, wanted[start : start + size])


def _from_decord(reader: Any, indices: Sequence[int]) -> UInt8[Tensor, "t h w c"]:
    return torch.from_dlpack(reader.get_batch(indices).to_dlpack())


def _read_with_pyav(source: Source, wanted: Sequence[int], check: Check) -> Iterator[UInt8[np.ndarray, "h w c"]]:
    """One frame after the other; what lies between two wanted ones is passed over from key frame to key frame."""
    with _open(source) as (container, stream):
        times, key_frames = [], []
        for packet in container.demux(stream):
            if packet.pts is not None and not packet.is_discard:
                times.append(packet.pts)
            if packet.pts is not None and packet.is_keyframe:
                key_frames.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
        if wanted[-1] >= len(times) or not key_frames:
            raise DecodeError(f"frame {wanted[-1]} is asked for, but it has {len(times)} frames")
        times, key_frames = sorted(times), sorted(key_frames)
        frames, at, shape = iter(()), -2, None
        for index in wanted:
            # A frame needs the last key frame that is shown before it, and may stand behind a later one in the file.
            key_frame = max(0, bisect_right(key_frames, times[index], key=lambda times: times[0]) - 1)
            if key_frame > at + 1:
                container.seek(key_frames[key_frame][1], stream=stream)
                frames = container.decode(stream)
            at = key_frame
            frame = _next_frame(frames, times[index], check)
            if frame is None or (frame.height, frame.width) != (shape := shape or (frame.height, frame.width)):
                raise DecodeError(f"frame {index} is {'of another size' if frame else 'missing'}")
            yield _to_rgb(frame)


def _next_frame(frames: Iterator[av.VideoFrame], pts: int, check: Check) -> av.VideoFrame | None:
    """The frame of that time; those before it are passed over. None where there is none."""
    for frame in frames:
        check()
        if frame.pts is not None and frame.pts >= pts:
            _check_size(frame.height, frame.width)
            return frame if frame.pts == pts else None
    return None


def _to_rgb(frame: av.VideoFrame) -> UInt8[np.ndarray, "h w c"]:
    """The picture as it is meant to be seen: phones store it on its side, with a note."""
    picture = frame.to_ndarray(format="rgb24", threads=1)
    return np.ascontiguousarray(np.rot90(picture, frame.rotation // 90)) if frame.rotation else picture
