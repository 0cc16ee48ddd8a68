"""Reading video files: metadata, selected frames, and streams of frames.

- PyAV decodes by default. decord decodes if it is selected, and only files for which it is known to return the right
  frames; both return the same pixels.
- A source is a path, or the bytes of a file, as read from a shard.

Axis letters: t frames, c channels (3: red, green, blue), height and width in pixels.
"""

import io
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.container import InputContainer
from av.video.stream import VideoStream
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from t2v.errors import UserError

Source = bytes | str | Path
Reader = Literal["pyav", "decord"]

MAX_PIXELS = 2**25
"""Largest frame that is decoded, height times width: 8K video, 100 MB as RGB."""
_GROUP_BYTES = 2**24
"""Size of the groups of full-size frames that are decoded at a time: two frames of 1080p, or a whole training clip."""
_DECORD_BYTES = 2**27
"""Largest video that decord reads, all its frames in full size: decord always decodes to the end."""


class DecodeError(ValueError):
    """The file is not a video that can be decoded."""


class VideoInfo(NamedTuple):
    """Properties of a video, from its container.

    Attributes:
        frames: Number of frames.
        fps: Frames per second.
        height: Height in pixels.
        width: Width in pixels.
    """

    frames: int
    fps: float
    height: int
    width: int


def probe(source: Source) -> VideoInfo:
    """Read the properties of a video without decoding it.

    Args:
        source: A path, or the bytes of the file.

    Raises:
        DecodeError: If the file is not a video.
    """
    with _open_video(source) as (container, stream):
        packets = container.demux(stream)
        first, frames = next(packets), stream.frames
        if first.is_discard or not frames:
            # A video that was cut without re-encoding begins with frames that must not be shown.
            frames = sum(packet.pts is not None and not packet.is_discard for packet in chain([first], packets))
        fps = float(stream.average_rate or 0)
        if not (frames and fps and stream.height and stream.width):
            raise DecodeError("its header has no frames, no frame rate or no size")
        return VideoInfo(frames, fps, stream.height, stream.width)


def read_frames(
    source: Source,
    indices: Sequence[int],
    transform: Callable[[UInt8[Tensor, "t c height width"]], Tensor] | None = None,
    timeout: float = 60.0,
    reader: Reader = "pyav",
) -> Tensor:
    """Decode the frames at the given indices.

    Args:
        source: A path, or the bytes of the file.
        indices: Indices of frames from 0, in any order and with repetitions.
        transform: Applied to each group of decoded frames, such as resizing, so that not all frames are in memory at
            full size. It is called with each frame once, by increasing index, and must return as many frames.
        timeout: Time limit in seconds, including `transform`. It is checked between frames, or between decord's groups
            of frames: a call into FFmpeg that hangs is not interrupted.
        reader: "pyav" or "decord". decord is no faster, and some damaged files crash it. PyAV is used instead if decord
            is not installed, fails, is known to return other frames than the requested ones, or needs too much memory.

    Returns:
        The frames as RGB, uint8 (t, c, height, width), or the output of `transform`, in the order of `indices`.

    Raises:
        DecodeError: If a frame is missing, corrupt or larger than `MAX_PIXELS`, or the time limit is exceeded.
    """
    assert min(indices, default=-1) >= 0
    wanted = sorted(set(indices))
    deadline = time.monotonic() + timeout

    def check_time() -> None:
        if time.monotonic() > deadline:
            raise DecodeError(f"it takes longer than the limit of {timeout:g} seconds per clip")

    groups = _decode_groups(source, wanted, check_time, reader)
    parts = [transform(group) if transform else group for group in groups]
    frames = torch.cat(parts) if len(parts) > 1 else parts[0]
    return frames if wanted == list(indices) else frames[np.searchsorted(wanted, indices)]


def stream_frames(source: Source) -> Iterator[tuple[float, UInt8[Tensor, "c height width"]]]:
    """Decode a video from start to end in constant memory.

    Args:
        source: A path, or the bytes of the file.

    Yields:
        Time in seconds since the first frame, and the frame as upright RGB.

    Raises:
        DecodeError: If the file cannot be decoded, or a frame is larger than `MAX_PIXELS`.
    """
    with _open_video(source) as (container, stream):
        start = None
        for frame in container.decode(stream):
            if frame.time is not None:
                if start is None:
                    start = frame.time
                yield frame.time - start, torch.from_numpy(_to_rgb(frame)).permute(2, 0, 1)


def resize_and_crop(
    video: UInt8[Tensor, "t c h_in w_in"], size: int | tuple[int, int]
) -> UInt8[Tensor, "t c height width"]:
    """Resize a video until it covers `size` and cut out the centre; a video of that size is returned unchanged.

    Args:
        video: The frames.
        size: Height and width of the result in pixels, or one number for both.
    """
    height, width = (size, size) if isinstance(size, int) else size
    h_in, w_in = video.shape[-2:]
    if (h_in, w_in) == (height, width):
        return video
    scale = max(height / h_in, width / w_in)
    h_resized, w_resized = max(height, round(h_in * scale)), max(width, round(w_in * scale))
    video = video.contiguous(memory_format=torch.channels_last)  # the decoder's own order; three times as fast
    video = F.interpolate(video, (h_resized, w_resized), mode="bilinear", antialias=True)
    top, left = (h_resized - height) // 2, (w_resized - width) // 2
    return video[..., top : top + height, left : left + width]


def read_clip(path: str | Path, frames: int, size: int, fps: int | float) -> UInt8[Tensor, "{frames} c {size} {size}"]:
    """Read the beginning of a video, or a picture, as a training clip: at a frame rate, cropped to a square.

    Args:
        path: A video, or a picture in any format that Pillow reads, which is a clip of one frame.
        frames: Number of frames.
        size: Height and width in pixels; the shorter side is resized to it, and the centre is cut out.
        fps: Frames per second; the nearest frames of the video are taken.

    Raises:
        UserError: If the file does not exist, is not a video or picture, or is shorter than `frames`.
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
        raise UserError(f"'{path}' is not a video or picture that can be read ({error}): give another file.") from error
    if len(clip) < frames:
        raise UserError(
            f"'{path}' has {len(clip)} frames at {fps:g} per second, but {frames} are needed: ask for fewer, or give a "
            "longer video."
        )
    return resize_and_crop(clip, size)


def _read_picture(path: str | Path) -> UInt8[Tensor, "1 c height width"] | None:
    """Return a picture as an upright clip of one frame, or None if the file is not a picture."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
    except UnidentifiedImageError:
        return None
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]


@cache
def _decord() -> ModuleType | None:
    """Return decord, or None if it has no wheel for this system or its libraries cannot be loaded."""
    # decord retries once for each frame after the last packet, even in an intact file; its default of 10,240 is slow.
    os.environ.setdefault("DECORD_EOF_RETRY_MAX", "2048")
    try:
        decord = import_module("decord")
    except (ImportError, OSError):
        return None
    decord.logging.set_level(decord.logging.QUIET)
    return decord


@contextmanager
def _open_video(source: Source) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a container and its first video stream; errors of FFmpeg become `DecodeError`."""
    try:
        container = av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source), "r")
    except (FileNotFoundError, PermissionError):
        raise
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise DecodeError(_reason(error)) from error
    with container:
        stream = next(iter(container.streams.video), None)
        if stream is None or stream.codec_context is None:
            raise DecodeError("it has no video stream, or one with an unknown codec")
        _check_size(stream.height, stream.width)
        stream.codec_context.thread_count = 1  # for many small clips, threads cost more than they gain
        try:
            yield container, stream
        except av.FFmpegError as error:
            raise DecodeError(_reason(error)) from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DecodeError(f"its frames of {width}x{height} are larger than the limit of {MAX_PIXELS:,} pixels")


def _decode_groups(
    source: Source, wanted: Sequence[int], check_time: Callable[[], None], reader: Reader
) -> Iterator[UInt8[Tensor, "t c height width"]]:
    """Yield the wanted frames, by increasing index, in groups of about `_GROUP_BYTES`."""
    done = 0
    decord = _decord() if reader == "decord" else None
    if decord is not None:
        try:
            for group in _read_with_decord(decord, source, wanted):
                check_time()
                done += len(group)
                yield group.permute(0, 3, 1, 2)
        except (decord.DECORDError, RuntimeError, IndexError):
            pass  # PyAV's FFmpeg is newer: it may read the file, and its errors are clearer
    if done < len(wanted):
        frames = _read_with_pyav(source, wanted[done:], check_time)
        for frame in frames:
            others = islice(frames, max(0, _GROUP_BYTES // frame.nbytes - 1))
            yield torch.from_numpy(np.stack([frame, *others])).permute(0, 3, 1, 2)


def _read_with_decord(
    decord: ModuleType, source: Source, wanted: Sequence[int]
) -> Iterator[UInt8[Tensor, "t height width c"]]:
    """Yield groups of frames; none if the video is too large for decord, or decord might return wrong frames.

    decord counts key frames in the order of the file instead of the order in which they are shown, which is wrong by
    some frames if frames behind a key frame are shown before it (an open group of pictures). It also counts frames that
    must not be shown.
    """
    reader = decord.VideoReader(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source), num_threads=1)
    later_key_frames, start_time = reader.get_key_indices()[1:], reader.get_frame_timestamp([0])[0, 0]
    if wanted[-1] >= min([len(reader), *later_key_frames]) or start_time < 0:
        return
    first = _decord_batch(reader, wanted[:1])  # decord reports the size only with a frame
    _check_size(*first.shape[1:3])
    if first.nbytes * len(reader) > _DECORD_BYTES:
        return
    size = max(1, _GROUP_BYTES // first.nbytes)
    rest = wanted[1:size]
    yield torch.cat([first, _decord_batch(reader, rest)]) if rest else first
    for start in range(size, len(wanted), size):
        yield _decord_batch(reader, wanted[start : start + size])


def _decord_batch(reader: Any, indices: Sequence[int]) -> UInt8[Tensor, "t height width c"]:
    return from_dlpack(reader.get_batch(indices).to_dlpack())


def _read_with_pyav(
    source: Source, wanted: Sequence[int], check_time: Callable[[], None]
) -> Iterator[UInt8[np.ndarray, "height width c"]]:
    """Yield the wanted frames one by one; between them, seek to the last key frame before the next one."""
    with _open_video(source) as (container, stream):
        times: list[int] = []
        key_frames: list[tuple[int, int]] = []  # the time at which it is shown, and its time in the file
        for packet in container.demux(stream):
            if packet.pts is not None and not packet.is_discard:
                times.append(packet.pts)
            if packet.pts is not None and packet.is_keyframe:
                key_frames.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
        if wanted[-1] >= len(times) or not key_frames:
            raise DecodeError(f"frame {wanted[-1]} is wanted, but it has {len(times)} frames")
        times.sort()
        key_frames.sort()
        frames: Iterator[av.VideoFrame] = iter(())
        current, size = -2, None  # the key frame that was decoded from, and the size of the first frame
        for index in wanted:
            # A frame needs the last key frame that is shown before it, and may come after a later one in the file.
            key_frame = max(0, bisect_right(key_frames, times[index], key=lambda times: times[0]) - 1)
            if key_frame > current + 1:
                container.seek(key_frames[key_frame][1], stream=stream)
                frames = container.decode(stream)
            current = key_frame
            frame = _next_frame(frames, times[index], check_time)
            if frame is None:
                raise DecodeError(f"frame {index} is missing")
            size = size or (frame.height, frame.width)
            if (frame.height, frame.width) != size:
                raise DecodeError(f"frame {index} is of another size")
            yield _to_rgb(frame)


def _next_frame(frames: Iterator[av.VideoFrame], pts: int, check_time: Callable[[], None]) -> av.VideoFrame | None:
    """Return the frame with this time, skipping earlier ones; None if there is none."""
    for frame in frames:
        check_time()
        if frame.pts is not None and frame.pts >= pts:
            _check_size(frame.height, frame.width)
            return frame if frame.pts == pts else None
    return None


def _to_rgb(frame: av.VideoFrame) -> UInt8[np.ndarray, "height width c"]:
    """Return the frame upright: phones store rotated frames with the angle in the metadata."""
    picture: UInt8[np.ndarray, "height width c"] = frame.to_ndarray(format="rgb24", threads=1)
    return np.ascontiguousarray(np.rot90(picture, frame.rotation // 90)) if frame.rotation else picture
