"""An open video: its frames as a player shows them, each with the time at which it is shown.

- Shape: cropping by the container, the shape of its pixels, and its display matrix are applied, in this order.
- Time: a frame is shown at its presentation time; if the file has none, or has them in the order of decoding, frames
  take the times of the packets in order, and at last the frame rate.
- Damage: an error of the decoder, a frame that it marks as corrupt, and a frame that does not come out end the reading.
  VP8, VP9, H.265 and uncompressed video have no checksums: most damage in them cannot be seen.
- HDR is tone-mapped, and interlaced frames are deinterlaced.
"""

import heapq
import io
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from io import BufferedIOBase
from itertools import chain, islice, pairwise
from pathlib import Path
from struct import unpack
from typing import Any, NamedTuple

import av
import av.filter
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from jaxtyping import UInt8
from PIL import Image

from t2v.video.containers import Shape, read_shape
from t2v.video.hdr import HLG, PQ, tone_map

Source = bytes | str | Path | BufferedIOBase

MAX_PIXELS = 2**25
"""Largest frame that is decoded, height times width: 8K video, 100 MB as RGB."""
_TEXT_FORMATS = ("adf", "bin", "idf", "tty", "xbin")
"""FFmpeg's formats that show text, of any file with some extensions, as pictures of characters."""
_MARKS = "crccheck+bitstream+buffer+explode"
"""Errors at which FFmpeg's decoders stop instead of hiding the damage."""
_FRAME_PER_PACKET = ("av1", "h264", "hevc", "libdav1d", "vp9")
"""Codecs in which each packet gives a frame, if it is not interlaced."""
_PEEKED = 64
"""Packets at the start that show how the times of a file are to be understood."""
_UNKNOWN, _BT2020 = 2, 9
"""FFmpeg's numbers of primaries."""
_PROGRESSIVE = (0, 1)
"""FFmpeg's numbers of an unknown order of fields, and of frames without fields."""


class DecodeError(ValueError):
    """The file is not a video that can be decoded."""


class TimedFrame(NamedTuple):
    """A decoded frame.

    Attributes:
        time: When it is shown, in seconds since the first frame.
        frame: The frame as stored.
    """

    time: int | float
    frame: av.VideoFrame


class OpenVideo:
    """A container and its first video stream.

    Args:
        container: The container.
        stream: The stream.
        shape: How the container shows its pictures.
    """

    def __init__(self, container: InputContainer, stream: VideoStream, shape: Shape) -> None:
        self.container, self.stream, self.shape = container, stream, shape
        self._reformatter = VideoReformatter()
        ratio = stream.sample_aspect_ratio
        self._ratio = Fraction(ratio.numerator, ratio.denominator) if ratio and ratio.denominator else Fraction(1)
        if self._ratio <= 0:
            self._ratio = Fraction(1)
        self._windows: dict[tuple[int, int], tuple[slice, slice, int, int]] = {}

    @property
    def step(self) -> float:
        """Seconds from frame to frame at the frame rate; 0 if the file has none."""
        rate = self.stream.average_rate if self.stream.start_time is not None else None
        rate = rate or self.stream.guessed_rate or self.stream.average_rate
        return float(1 / Fraction(rate.numerator, rate.denominator)) if rate else 0.0

    @property
    def is_plain(self) -> bool:
        """Whether the pictures are shown as they are stored."""
        codec = self.stream.codec_context
        is_converted = codec.color_trc in (PQ, HLG) or codec.field_order not in _PROGRESSIVE
        return self.shape == Shape() and self._ratio == 1 and not is_converted

    @property
    def size(self) -> tuple[int, int]:
        """Height and width as shown, in pixels."""
        rows, columns, height, width = self._window(self.stream.height, self.stream.width)
        size = len(range(height)[rows]), len(range(width)[columns])
        return size[::-1] if self.shape.turned else size

    def packets(self) -> Iterator["Packet[VideoStream]"]:
        """Yield the packets, and an empty one at the end; without the empty ones of dropped frames in between."""
        for packet in self.container.demux(self.stream):
            if packet.size or packet.dts is None:
                yield packet

    def decode(self, deinterlace: bool = False) -> Iterator[TimedFrame]:
        """Yield all frames in the order in which they are shown; `deinterlace` those that are not marked as well."""
        clock = Clock(self)
        is_cut = "mpeg" in self.container.format.name  # recordings may begin between two key frames
        begun, deinterlacer = False, None
        for packet in clock.read_ahead(self.packets()):
            clock.add(packet)
            try:
                frames = packet.decode()
            except av.FFmpegError:
                if begun or not is_cut:
                    raise
                continue
            for frame in frames:
                if frame.is_corrupt and not begun:
                    clock.skip(frame)
                    continue
                begun = True
                timed = TimedFrame(clock.next(frame), frame)
                self.check(timed)
                if (frame.interlaced_frame or deinterlace) and deinterlacer is None:
                    deinterlacer = _Deinterlacer(self.stream, "all" if deinterlace else "interlaced")
                yield from deinterlacer.push(timed) if deinterlacer else (timed,)
        if deinterlacer:
            yield from deinterlacer.finish()

    def check(self, timed: TimedFrame) -> None:
        """Raise `DecodeError` if a frame is damaged or too large."""
        if timed.frame.is_corrupt:
            raise DecodeError(f"it is damaged at {timed.time:.2f} seconds")
        _check_size(timed.frame.height, timed.frame.width)

    def to_rgb(self, frame: av.VideoFrame) -> UInt8[np.ndarray, "height width c"]:
        """Return a frame as a player shows it."""
        rows, columns, height, width = self._window(frame.height, frame.width)
        transfer = frame.color_trc if frame.color_trc in (PQ, HLG) else self.stream.codec_context.color_trc
        is_hdr = transfer in (PQ, HLG)
        converted = self._reformatter.reformat(
            frame, width, height, "rgb48le" if is_hdr else "rgb24", threads=1
        ).to_ndarray()
        picture = converted[rows, columns]
        if is_hdr:
            picture = tone_map(picture, transfer, frame.color_primaries in (_UNKNOWN, _BT2020))
        side_data: Any = frame.side_data
        matrix = side_data.get("DISPLAYMATRIX") if len(side_data) else None
        return picture if matrix is None else _display(picture, unpack("=9i", bytes(matrix)))

    def _window(self, height: int, width: int) -> tuple[slice, slice, int, int]:
        """Return the rows and columns to show of a frame stretched to square pixels, and its size then."""
        if (height, width) in self._windows:  # all frames, as a rule
            return self._windows[height, width]
        left, top, right, bottom = self.shape.crop
        x, y = max(self._ratio, Fraction(1)), max(1 / self._ratio, Fraction(1))
        if left + right >= width or top + bottom >= height:
            left = top = right = bottom = 0
        stretched = round(height * y), round(width * x)
        _check_size(*stretched)
        rows = slice(round(top * y), stretched[0] - round(bottom * y))
        window = rows, slice(round(left * x), stretched[1] - round(right * x)), *stretched
        self._windows[height, width] = window
        return window


class Clock:
    """Gives each frame its time: usually that of its packet.

    Args:
        video: The video.
    """

    def __init__(self, video: OpenVideo) -> None:
        self._unit = float(video.stream.time_base or 1)
        self._step = video.step
        codec = video.stream.codec_context
        self._codec, self._reorders = codec.name, bool(codec.has_b_frames)
        self._strict = codec.name in _FRAME_PER_PACKET
        self._in_order = False
        self._pending: list[int] = []
        self._first: float | None = None
        self._last: float | None = None

    def read_ahead(self, packets: Iterator["Packet[VideoStream]"]) -> Iterator["Packet[VideoStream]"]:
        """Return the packets after a look at the first of them."""
        first = list(islice(packets, _PEEKED))
        self._in_order = self.is_in_order(first)
        return chain(first, packets)

    def is_in_order(self, packets: list["Packet[VideoStream]"]) -> bool:
        """Return whether the times of packets are in the order of decoding instead of that of showing."""
        times = [packet.pts for packet in packets if packet.size]
        if None in times:
            return any(packet.dts is not None for packet in packets if packet.pts is None and packet.size)
        increasing = all(a < b for a, b in pairwise(times))  # type: ignore[operator]
        return self._reorders and increasing and len(times) > 2

    def add(self, packet: "Packet[VideoStream]") -> None:
        """Note the time of a packet, before it is decoded."""
        time = packet.pts if packet.pts is not None or not self._in_order else packet.dts
        if time is not None and packet.size and not packet.is_discard:
            heapq.heappush(self._pending, time)

    def skip(self, frame: av.VideoFrame) -> None:
        """Leave out a frame at the start."""
        if self._in_order and self._pending:
            heapq.heappop(self._pending)

    def next(self, frame: av.VideoFrame) -> float:
        """Return the time of the next frame, in seconds since the first.

        Raises:
            DecodeError: If frames before it are missing.
        """
        pts = frame.pts
        if self._in_order:
            pts = heapq.heappop(self._pending) if self._pending else None
        missing = 0
        while pts is not None and self._pending and self._pending[0] <= pts:
            missing += heapq.heappop(self._pending) < pts
        time = None if pts is None else pts * self._unit
        if missing and self._strict and self._last is not None and not frame.interlaced_frame:
            raise DecodeError(f"{missing} of its frames do not decode")
        if self._last is None:
            self._first = time or 0.0
            self._last = 0.0
        elif time is not None and time - self._first > self._last:  # type: ignore[operator]
            self._last = time - self._first  # type: ignore[operator]
        else:
            self._last += self._step
            if time is not None:  # the clock of the file was set back
                self._first = time - self._last
        return self._last


class _Deinterlacer:
    """FFmpeg's bwdif filter (w3fdif and yadif combined), for all frames or those marked as interlaced; others pass."""

    def __init__(self, stream: VideoStream, frames: str) -> None:
        self._stream, self._frames = stream, frames
        self._graph: Any = None
        self._times: deque[float] = deque()

    def push(self, timed: TimedFrame) -> Iterator[TimedFrame]:
        frame = timed.frame
        if self._graph is None:
            graph: Any = av.filter.Graph()
            source = graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=self._stream.time_base
            )
            nodes = [source, graph.add("bwdif", f"mode=send_frame:deint={self._frames}"), graph.add("buffersink")]
            graph.link_nodes(*nodes).configure()
            self._graph = graph
        self._times.append(timed.time)
        frame.pts = round(timed.time * 2**20)  # distinct and increasing; what comes out has the times of `_times`
        self._graph.push(frame)
        yield from self._pull()

    def finish(self) -> Iterator[TimedFrame]:
        """Yield the frames that are left."""
        if self._graph is not None:
            self._graph.push(None)
            yield from self._pull()

    def _pull(self) -> Iterator[TimedFrame]:
        assert self._graph is not None
        while self._times:
            try:
                frame = self._graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return
            yield TimedFrame(self._times.popleft(), frame)


@contextmanager
def open_video(source: Source) -> Iterator[OpenVideo]:
    """Open a video; errors of FFmpeg become `DecodeError`.

    Args:
        source: A path, the bytes of the file, or the file opened for reading.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        container = av.open(str(file) if isinstance(file, str | Path) else file, "r")
    except (FileNotFoundError, PermissionError):
        raise
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise DecodeError(_reason(error)) from error
    with container:
        if container.format.name in _TEXT_FORMATS:
            raise DecodeError("it is text")
        streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        stream = next(iter(streams), None)
        if stream is None or stream.codec_context is None:
            raise DecodeError("it has no video stream, or one with an unknown codec")
        _check_size(stream.height, stream.width)
        stream.codec_context.thread_count = 1  # for many small clips, threads cost more than they gain
        stream.codec_context.options = {"err_detect": _MARKS}
        try:
            yield OpenVideo(container, stream, _shape(source, container.format.name))
        except av.FFmpegError as error:
            raise DecodeError(_reason(error)) from error


def _shape(source: Source, container: str) -> Shape:
    if "mp4" not in container and "matroska" not in container:
        return Shape()
    if isinstance(source, bytes):
        return read_shape(io.BytesIO(source), container)
    if isinstance(source, str | Path):
        with Path(source).open("rb") as file:
            return read_shape(file, container)
    position = source.tell()
    shape = read_shape(source, container)
    source.seek(position)
    return shape


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DecodeError(f"its frames of {width}x{height} are larger than the limit of {MAX_PIXELS:,} pixels")


def _display(picture: UInt8[np.ndarray, "h_in w_in c"], matrix: tuple[int, ...]) -> UInt8[np.ndarray, "height width c"]:
    """Return a picture turned and mirrored by a display matrix.

    Turns by other angles than quarters keep the size of the picture, with black corners, as in FFmpeg's player.

    Args:
        picture: The stored picture.
        matrix: Numbers of FFmpeg's display matrix: (x, y) is shown at (a x + c y, b x + d y).
    """
    a, b, _, c, d = matrix[:5]
    small = max(abs(a), abs(b), abs(c), abs(d)) / 64  # below one degree
    if max(abs(a), abs(d)) <= small:
        return np.ascontiguousarray(picture.transpose(1, 0, 2)[:: -1 if b < 0 else 1, :: -1 if c < 0 else 1])
    if max(abs(b), abs(c)) <= small:
        return np.ascontiguousarray(picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
    shown = np.array([[a, c], [b, d]], float)
    area = abs(np.linalg.det(shown))
    if not area:
        return picture
    stored = np.linalg.inv(shown / area**0.5)
    centre = np.array([picture.shape[1], picture.shape[0]]) / 2
    (xx, xy), (yx, yy), (x, y) = *stored, centre - stored @ centre
    image = Image.fromarray(picture)
    return np.array(
        image.transform(image.size, Image.Transform.AFFINE, (xx, xy, x, yx, yy, y), Image.Resampling.BILINEAR)
    )
