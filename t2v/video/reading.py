"""Reading video files: metadata, selected frames, and streams of frames.

- Everything is as a player shows it: upright, with square pixels, and at the time at which it is shown; see `decoding`.
- PyAV decodes by default. decord decodes if it is selected, and only files for which it is known to return the same
  frames.
- A source is a path, the bytes of a file, as read from a shard, or a file opened for reading.

Axis letters: t frames, c channels (3: red, green, blue), height and width in pixels.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from t2v.errors import UserError
from t2v.video import selection
from t2v.video.decoding import MAX_PIXELS, DecodeError, OpenVideo, Source, open_video
from t2v.video.selection import Reader, pictures

_PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Ends of the names of pictures."""
_PICTURE_FPS = 25.0
"""Frame rate that a picture is given, as FFmpeg does."""
_LONGEST_STEP = 10.0
"""Seconds that a gap between two frames counts towards the time limit at most: a process may have been suspended."""

Transform = Callable[[UInt8[Tensor, "t c height width"]], Tensor]


class VideoInfo(NamedTuple):
    """Properties of a video.

    Attributes:
        frames: Number of frames; of packets, where a container does not say how many of them are shown.
        fps: Frames per second, such that `frames / fps` is the length; the mean, where the rate varies.
        height: Height as shown, in pixels.
        width: Width as shown, in pixels.
    """

    frames: int
    fps: float
    height: int
    width: int


def probe(source: Source) -> VideoInfo:
    """Read the properties of a video without decoding it; a picture is a video of one frame.

    Args:
        source: The video.

    Raises:
        DecodeError: If the file is not a video.
    """
    picture = _as_picture(source)
    if picture is not None:
        return VideoInfo(1, _PICTURE_FPS, *picture.shape[-2:])
    with open_video(source) as video:
        frames, fps = _length(video)
        height, width = video.size
        if not (frames and fps and height and width):
            raise DecodeError("its header has no frames, no frame rate or no size")
        return VideoInfo(frames, fps, height, width)


def is_plain(source: Source) -> bool:
    """Return whether the frames are shown as stored: not stretched, cropped, turned, tone-mapped or deinterlaced.

    Args:
        source: The video.

    Raises:
        DecodeError: If the file is not a video.
    """
    with open_video(source) as video:
        return video.is_plain


def read_frames(
    source: Source,
    indices: Sequence[int],
    transform: Transform | None = None,
    timeout: float = 60.0,
    reader: Reader = "pyav",
) -> Tensor:
    """Decode the frames at the given indices.

    Args:
        source: The video.
        indices: Indices of frames from 0, in any order and with repetitions.
        transform: Applied to each group of decoded frames, such as resizing, so that not all frames are in memory at
            full size. It is called with each frame once, by increasing index, and must return as many frames.
        timeout: Time limit in seconds, including `transform`. It is checked between frames, or between decord's groups
            of frames: a call into FFmpeg that hangs is not interrupted. Each time between two checks counts as 10
            seconds at most, so that a process may be suspended.
        reader: "pyav" or "decord". decord is no faster, does not see damage, and some damaged files crash it. PyAV is
            used instead if decord is not installed, fails, is not known to return the same frames, or needs too much
            memory.

    Returns:
        The frames as RGB, uint8 (t, c, height, width), or the output of `transform`, in the order of `indices`.

    Raises:
        DecodeError: If a frame is missing, damaged or larger than `MAX_PIXELS`, or the time limit is exceeded.
    """
    return _read(source, indices, False, transform, timeout, reader)


def read_at(
    source: Source,
    times: Sequence[int | float],
    transform: Transform | None = None,
    timeout: float = 60.0,
    reader: Reader = "pyav",
) -> Tensor:
    """Decode the frames nearest to the given times; the other arguments are those of `read_frames`.

    Args:
        source: The video.
        times: Seconds since the first frame, in any order; in the middle of two frames the later one is taken.
        transform: See `read_frames`; frames nearest to several times are decoded and transformed once.
        timeout: See `read_frames`.
        reader: See `read_frames`.

    Raises:
        DecodeError: As `read_frames`, or if a time is after the end.
    """
    return _read(source, times, True, transform, timeout, reader)


def stream_frames(source: Source, deinterlace: bool = False) -> Iterator[tuple[float, UInt8[Tensor, "c height width"]]]:
    """Decode a video from start to end in constant memory; a picture is a video of one frame.

    Args:
        source: The video.
        deinterlace: Deinterlace all frames, also those that are not marked as interlaced.

    Yields:
        Time in seconds since the first frame, and the frame as RGB.

    Raises:
        DecodeError: If the file cannot be decoded, or a frame is damaged, larger than `MAX_PIXELS`, or of another size
            than the first.
    """
    picture = _as_picture(source)
    if picture is not None:
        yield 0.0, picture[0]
        return
    first: tuple[int, ...] = ()
    with open_video(source) as video:
        for shown_at, frame in video.decode(deinterlace):
            rgb = video.to_rgb(frame)
            first = first or rgb.shape
            _check_size(rgb, first)
            yield shown_at, torch.from_numpy(rgb).permute(2, 0, 1)


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
            available = ceil((info.frames - 0.5) * fps / info.fps)
            clip = read_at(path, (np.arange(min(frames, available)) / fps).tolist())
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


def _as_picture(source: Source) -> UInt8[Tensor, "1 c height width"] | None:
    """Return a file with the name of a picture as `_read_picture` does; None for others, and for what it cannot read.

    FFmpeg's Python binding cannot read pictures with Exif data, which say how a picture is turned.
    """
    if not isinstance(source, str | Path) or Path(source).suffix.lower() not in _PICTURES:
        return None
    return _read_picture(source)


def _read_picture(path: str | Path) -> UInt8[Tensor, "1 c height width"] | None:
    """Return a picture as an upright clip of one frame, or None if the file is not a picture.

    Raises:
        DecodeError: If it is damaged, or larger than `MAX_PIXELS`.
        OSError: If the system refuses the file.
    """
    try:
        with Image.open(path) as file:
            if file.width * file.height > MAX_PIXELS:
                raise DecodeError(f"it has more than {MAX_PIXELS:,} pixels")
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
                picture = Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8))
            picture = picture.convert("RGB")
    except UnidentifiedImageError:
        return None
    except Image.DecompressionBombError as error:
        raise DecodeError(str(error)) from error
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, DecodeError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise DecodeError(str(error)) from error
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]


def _length(video: OpenVideo) -> tuple[int, float]:
    """Return the number of frames and the frames per second."""
    stream = video.stream
    rate = 1 / video.step if video.step else 0.0
    if stream.frames and "mp4" in video.container.format.name:
        entries = [entry.timestamp for entry in stream.index_entries if not entry.is_discard]
        seconds = float((stream.duration or 0) * (stream.time_base or 1))
        agrees = abs(seconds * rate - stream.frames) < 0.75
        if len(entries) == stream.frames and agrees and _is_even(entries):
            return stream.frames, rate  # without reading the packets
    packets = [packet for packet in video.packets() if packet.size and not packet.is_discard]
    stamps = [packet.dts if packet.pts is None else packet.pts for packet in packets]
    times = sorted(stamp for stamp in stamps if stamp is not None)
    if len(times) < 2:
        return len(packets), rate
    unit, mean = float(stream.time_base or 1), (times[-1] - times[0]) / (len(times) - 1)
    seconds = (times[-1] - times[0] + (packets[stamps.index(times[-1])].duration or mean)) * unit
    if not seconds or (rate and abs(len(packets) / rate - seconds) < 0.75 / rate):
        return len(packets), rate
    return len(packets), len(packets) / seconds


def _is_even(times: Sequence[int]) -> bool:
    """Return whether times are at equal intervals, but for rounding."""
    even = np.linspace(times[0], times[-1], len(times))
    return bool(np.abs(even - times).max() <= (times[-1] - times[0]) / max(1, len(times) - 1) / 4)


def _read(
    source: Source,
    wanted: Sequence[int | float],
    timed: bool,
    transform: Transform | None,
    timeout: float,
    reader: Reader,
) -> Tensor:
    """Decode the frames nearest to times, if `timed`, or those with the given indices."""
    assert min(wanted, default=-1) >= 0
    targets = sorted(set(wanted))
    spent, checked = 0.0, time.monotonic()

    def check_time() -> None:
        nonlocal spent, checked
        now = time.monotonic()
        spent, checked = spent + min(now - checked, _LONGEST_STEP), now
        if spent > timeout:
            raise DecodeError(f"it takes longer than the limit of {timeout:g} seconds per clip")

    parts: list[Tensor] = []
    places: list[int] = []  # for each target, the place of its frame in `parts`
    group: list[UInt8[np.ndarray, "height width c"]] = []
    frames = 0
    first: tuple[int, ...] = ()

    def finish_group() -> None:
        full_size = torch.from_numpy(np.stack(group)).permute(0, 3, 1, 2)
        group.clear()
        parts.append(transform(full_size) if transform else full_size)

    for picture, repeats in pictures(source, targets, timed, check_time, reader):
        first = first or picture.shape
        _check_size(picture, first)
        group.append(picture)
        places += [frames] * repeats
        frames += 1
        if len(group) >= max(1, selection.GROUP_BYTES // picture.nbytes):
            finish_group()
    if group:
        finish_group()
    video = torch.cat(parts) if len(parts) > 1 else parts[0]
    order = np.array(places)[np.searchsorted(targets, wanted)]
    return video if np.array_equal(order, np.arange(frames)) else video[order]


def _check_size(picture: UInt8[np.ndarray, "height width c"], first: tuple[int, ...]) -> None:
    if picture.shape != first:
        (height, width), (new_height, new_width) = first[:2], picture.shape[:2]
        raise DecodeError(f"its frames change from {width}x{height} to {new_width}x{new_height} pixels")
