"""The frames of a video that are wanted, by their indices or their times, without decoding more than they need."""

import io
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from itertools import chain, groupby, islice
from types import ModuleType
from typing import Any, Literal

import av
import numpy as np
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from t2v.video.decoding import Clock, DecodeError, OpenVideo, Source, TimedFrame, open_video

Reader = Literal["pyav", "decord"]

GROUP_BYTES = 2**24
"""Size of the groups of full-size frames that are decoded at a time: two frames of 1080p, or a whole training clip."""
_DECORD_BYTES = 2**27
"""Largest video that decord reads, all its frames in full size: decord always decodes to the end."""
_SEEKABLE = ("matroska", "mp4")
"""Containers with a table of the key frames, and with the time of each frame."""
_ROUNDING = 1e-6
"""Seconds by which a time may be below the middle of two frames and still get the later one."""


def pictures(
    source: Source, targets: Sequence[int | float], timed: bool, check_time: Callable[[], None], reader: Reader
) -> Iterator[tuple[UInt8[np.ndarray, "height width c"], int]]:
    """Yield the picture nearest to the targets, by increasing target, and the number of targets that it is for.

    Where the container has a reliable table, frames are decoded from the key frame before them. If one does not come
    out as the table says, the video is decoded from its start, which also shows whether it is damaged.
    """
    done = 0
    with open_video(source) as video:
        table = _Table(video) if any(name in video.container.format.name for name in _SEEKABLE) else None
        if table and table.is_reliable:
            runs = [(number, len(list(run))) for number, run in groupby(table.nearest(targets, timed))]
            numbers = [number for number, _ in runs]
            by_decord = _read_with_decord(source, table, numbers, check_time) if reader == "decord" else iter(())
            try:
                for picture in by_decord:
                    yield picture, runs[done][1]
                    done += 1
                for frame in table.decode(numbers[done:], check_time):
                    yield video.to_rgb(frame), runs[done][1]
                    done += 1
            except (DecodeError, av.FFmpegError):
                pass
            if done == len(runs):
                return
            targets = targets[sum(repeats for _, repeats in runs[:done]) :]
    with open_video(source) as video:
        for frame, repeats in _stream(video, targets, timed, check_time):
            yield video.to_rgb(frame), repeats


def _stream(
    video: OpenVideo, targets: Sequence[int | float], timed: bool, check_time: Callable[[], None]
) -> Iterator[tuple[av.VideoFrame, int]]:
    """Yield the frames nearest to the targets, and for how many of them each is, decoding from the start."""
    done, number = 0, -1
    previous: TimedFrame | None = None
    step = video.step
    for number, timed_frame in enumerate(video.decode()):
        check_time()
        here = timed_frame if timed else TimedFrame(number, timed_frame.frame)
        if previous is not None:
            step = here.time - previous.time
            repeats = bisect_right(targets, previous.time + step / 2 - _ROUNDING) - done
            if repeats:
                yield previous.frame, repeats
                done += repeats
            if done == len(targets):
                return
        previous = here
    if previous is None:
        raise DecodeError("none of its frames decodes")
    lasts = max(step, (previous.frame.duration or 0) * float(video.stream.time_base or 1)) if timed else 0.5
    if targets[-1] > previous.time + lasts:
        raise _beyond(targets[-1], number + 1, timed)
    yield previous.frame, len(targets) - done


def _beyond(target: int | float, frames: int, timed: bool) -> DecodeError:
    place = f"the frame at {target:.2f} seconds" if timed else f"frame {target}"
    return DecodeError(f"{place} is wanted, but it has {frames} frames")


class _Table:
    """The times and key frames of a video, from its packets.

    Args:
        video: The video.
    """

    def __init__(self, video: OpenVideo) -> None:
        self.video = video
        self.packets = packets = list(video.packets())
        shown = [packet for packet in packets if packet.pts is not None and not packet.is_discard]
        self.times = sorted(packet.pts for packet in shown if packet.pts is not None)
        self.key_frames = sorted(  # the time at which it is shown, and its place in `packets`
            (packet.pts, place) for place, packet in enumerate(packets) if packet.pts is not None and packet.is_keyframe
        )
        self.cut = len(shown) < len(packets) - 1
        later = [place for place, packet in enumerate(packets) if packet.is_keyframe and place]
        self.one_key_frame = min([len(shown), *later])  # packets before the second key frame
        self.lasts = max((packet.duration or 0 for packet in shown[-1:]), default=0)
        distinct = len(set(self.times)) == len(self.times) > 0
        self.is_reliable = distinct and bool(self.key_frames) and not Clock(video).is_in_order(packets)

    def nearest(self, targets: Sequence[int | float], timed: bool) -> list[int]:
        """Return the number of the frame nearest to each target.

        Raises:
            DecodeError: If a target is after the end.
        """
        if not timed:
            if targets[-1] >= len(self.times):
                raise _beyond(targets[-1], len(self.times), timed)
            return [int(target) for target in targets]
        seconds = (np.array(self.times) - self.times[0]) * float(self.video.stream.time_base or 1)
        lasts = self.lasts * float(self.video.stream.time_base or 1)
        if targets[-1] > seconds[-1] + max(lasts, self.video.step, *np.diff(seconds)[-1:]):
            raise _beyond(targets[-1], len(self.times), timed)
        middles = (seconds[1:] + seconds[:-1]) / 2 - _ROUNDING
        numbers: list[int] = np.searchsorted(middles, targets, side="right").tolist()
        return numbers

    def decode(self, numbers: Sequence[int], check_time: Callable[[], None]) -> Iterator[av.VideoFrame]:
        """Yield frames; between them, go to the last key frame before the next one."""
        current = -2  # the key frame that was decoded from
        frames: Iterator[av.VideoFrame] = iter(())
        for number in numbers:
            # A frame needs the last key frame that is shown before it, and may come after a later one in the file.
            time = self.times[number]
            key_frame = max(0, bisect_right(self.key_frames, time, key=lambda times: times[0]) - 1)
            if key_frame > current + 1:
                if current >= 0:
                    self.video.stream.codec_context.flush_buffers()
                frames = self._decode_from(*self.key_frames[key_frame])
            current = key_frame
            for frame in frames:
                check_time()
                if frame.pts is not None and frame.pts >= time:
                    break
            else:
                raise DecodeError(f"frame {number} is missing")
            if frame.pts != time:
                raise DecodeError(f"frame {number} is missing")
            yield frame

    def _decode_from(self, start: int, place: int) -> Iterator[av.VideoFrame]:
        """Yield the frames from a key frame on; those shown before it may need earlier ones."""
        for frame in chain.from_iterable(packet.decode() for packet in islice(self.packets, place, None)):
            if frame.pts is not None and frame.pts >= start:
                if frame.interlaced_frame:
                    raise DecodeError("interlaced frames are decoded in order")
                self.video.check(TimedFrame(0, frame))
                yield frame


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


def _read_with_decord(
    source: Source, table: _Table, numbers: Sequence[int], check_time: Callable[[], None]
) -> Iterator[UInt8[np.ndarray, "height width c"]]:
    """Yield frames by their numbers; none if decord is missing or might return other frames than PyAV.

    decord counts key frames in the order of the file instead of the order in which they are shown, which is wrong by
    some frames if frames behind a key frame are shown before it (an open group of pictures). It also counts frames that
    must not be shown, and does not stretch, crop, turn or tone-map.
    """
    decord, video = _decord(), table.video
    same = video.is_plain and video.stream.pix_fmt == "yuv420p" and not table.cut and table.times[0] >= 0
    pixels = video.stream.height * video.stream.width
    if (
        decord is None
        or isinstance(source, io.BufferedIOBase)
        or not same
        or numbers[-1] >= table.one_key_frame
        or 3 * pixels * len(table.times) > _DECORD_BYTES
    ):
        return
    try:
        reader = decord.VideoReader(
            io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source), num_threads=1
        )  # type: ignore[arg-type]
        size = max(1, GROUP_BYTES // (3 * pixels))
        if len(reader) != len(table.times):
            return
        for start in range(0, len(numbers), size):
            check_time()
            yield from _decord_batch(reader, numbers[start : start + size]).numpy()
    except (decord.DECORDError, RuntimeError, IndexError):
        pass  # PyAV's FFmpeg is newer: it may read the file, and its errors are clearer


def _decord_batch(reader: Any, indices: Sequence[int]) -> UInt8[Tensor, "t height width c"]:
    return from_dlpack(reader.get_batch(indices).to_dlpack())
