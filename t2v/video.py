"""Video files: probing, decoding only the frames that are wanted, and encoding.

- decord reads; PyAV reads where decord is missing or gives up. Both give the same pixels.
- PyAV writes H.264 (yuv420p, index in front), one thread an encoder, so that equal frames make equal bytes anywhere.
- A source is a path or the file's bytes, as they come out of a shard.

Axis letters: t frames, c channels (3, red green blue), h w pixels.
"""

import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from t2v.errors import UserError

Source = bytes | str | Path


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
        frames = stream.frames or sum(packet.pts is not None for packet in container.demux(stream))
        fps = float(stream.average_rate or 0)
        if not (frames and fps and stream.height and stream.width):
            raise DecodeError("its head names no frames, no frame rate or no size")
        return VideoInfo(frames, fps, stream.height, stream.width)


def read_frames(source: Source, indices: Sequence[int]) -> UInt8[Tensor, "t c h w"]:
    """Decode the frames at the given indices.

    Args:
        source: a path, or the bytes of the file.
        indices: which frames, counted from 0, in any order and with repetitions.

    Returns:
        The frames as RGB, in the order of `indices`.

    Raises:
        DecodeError: where a frame is missing or the bytes cannot be decoded.
    """
    assert len(indices) > 0
    if (decord := _decord()) is not None:
        try:
            file = io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)
            frames = decord.VideoReader(file, num_threads=1).get_batch(list(indices)).asnumpy()
            return torch.from_numpy(frames).permute(0, 3, 1, 2)
        except (decord.DECORDError, RuntimeError, IndexError):
            pass  # PyAV's FFmpeg is newer: it may read the file, and says better why it cannot
    return torch.from_numpy(_read_with_pyav(source, indices)).permute(0, 3, 1, 2)


def stream_frames(source: Source) -> Iterator[tuple[float, UInt8[Tensor, "c h w"]]]:
    """Decode a video from start to end in constant memory.

    Args:
        source: a path, or the bytes of the file.

    Yields:
        Seconds since the first frame, and the frame as RGB, upright.

    Raises:
        DecodeError: where the bytes cannot be decoded.
    """
    with _open(source) as (container, stream):
        first = None
        for frame in container.decode(stream):
            if frame.time is not None:
                first = frame.time if first is None else first
                yield frame.time - first, torch.from_numpy(_to_rgb(frame)).permute(2, 0, 1)


def resize_and_crop(video: UInt8[Tensor, "t c h w"], size: int) -> UInt8[Tensor, "t c {size} {size}"]:
    """Resize the shorter side to `size` pixels and cut out the centre; a video of that size is returned as it is."""
    height, width = video.shape[-2:]
    if height == width == size:
        return video
    scale = size / min(height, width)
    height, width = max(size, round(height * scale)), max(size, round(width * scale))
    video = F.interpolate(video.contiguous(), (height, width), mode="bilinear", antialias=True)
    top, left = (height - size) // 2, (width - size) // 2
    return video[..., top : top + size, left : left + size]


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


class Mp4Writer:
    """A video file that grows frame by frame, as H.264, in constant memory.

    A context manager: the file appears under its name when the context ends, complete, and not at all where it ends by
    an exception.
    """

    def __init__(self, path: str | Path, fps: int | float, crf: int = 18):
        """
        Args:
            path: where the mp4 goes; its folder must exist.
            fps: frames a second.
            crf: quality of libx264, from 0 (lossless) to 51 (worst).
        """
        self.path = Path(path)
        self.fps, self.crf = fps, crf
        # FFmpeg reads the file again to move its index to the front: it must be a real file with its final suffix.
        self._partial = self.path.with_name(f".{self.path.stem}.{os.getpid()}.partial.mp4")

    def __enter__(self) -> "Mp4Writer":
        options = {"movflags": "+faststart", "fflags": "+bitexact"}
        self._file = av.open(str(self._partial), "w", format="mp4", options=options)
        self._stream = self._file.add_stream("libx264", rate=Fraction(self.fps).limit_denominator(1001))
        self._stream.pix_fmt, self._stream.options = "yuv420p", {"crf": str(self.crf), "threads": "1"}
        self._started = False
        return self

    def write(self, frames: UInt8[Tensor, "t c h w"]) -> None:
        """Append frames, RGB, all of the size of the first.

        Raises:
            UserError: where height or width is odd, which yuv420p cannot hold.
        """
        _, channels, height, width = frames.shape
        if height % 2 or width % 2:
            raise UserError(
                f"Cannot write {self.path.name} at {width}x{height} pixels: H.264 needs an even width and height."
            )
        assert channels == 3
        if not self._started:
            self._stream.height, self._stream.width = height, width
            self._started = True
        assert (self._stream.height, self._stream.width) == (height, width)
        for picture in frames.cpu().numpy().transpose(0, 2, 3, 1):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            self._file.mux(self._stream.encode(frame.reformat(format="yuv420p", threads=1)))

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if error is None:
                assert self._started, "a video has at least one frame"
                self._file.mux(self._stream.encode())
            self._file.close()
            if error is None:
                self._partial.replace(self.path)
        finally:
            self._partial.unlink(missing_ok=True)


def write_mp4(path: str | Path, video: UInt8[Tensor, "t c h w"], fps: int | float, crf: int = 18) -> None:
    """Write a video as H.264; the file appears only when it is complete. See `Mp4Writer` for the arguments.

    Raises:
        UserError: where height or width is odd, which yuv420p cannot hold.
    """
    with Mp4Writer(path, fps, crf) as file:
        file.write(video)


def encode_mp4(video: UInt8[Tensor, "t c h w"], fps: int | float, crf: int = 18) -> bytes:
    """Encode a video as the bytes of an mp4 file; see `write_mp4`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_mp4(path, video, fps, crf)
        return path.read_bytes()


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
    os.environ.setdefault("DECORD_EOF_RETRY_MAX", "128")  # its own 10,240 turn a truncated file into a stall
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
            raise DecodeError(_reason(error)) from error
        if not self.container.streams.video:
            self.container.close()
            raise DecodeError("there is no picture in it")
        stream = self.container.streams.video[0]
        stream.codec_context.thread_count = 1  # many small clips: threads cost more than they bring
        return self.container, stream

    def __exit__(self, kind, error, traceback) -> None:
        self.container.close()
        if isinstance(error, av.FFmpegError):
            raise DecodeError(_reason(error)) from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _read_with_pyav(source: Source, indices: Sequence[int]) -> UInt8[np.ndarray, "t h w c"]:
    with _open(source) as (container, stream):
        times = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
        if not times or max(indices) >= len(times):
            raise DecodeError(f"frame {max(indices)} is asked for, but it has {len(times)} frames")
        wanted = {times[index] for index in indices}
        last, found = max(wanted), {}
        container.seek(min(wanted), stream=stream)  # to the key frame at or before the first wanted frame
        for frame in container.decode(stream):
            if frame.pts in wanted:
                found[frame.pts] = _to_rgb(frame)
            if frame.pts is not None and frame.pts >= last:
                break
    if missing := len(wanted) - len(found):
        raise DecodeError(f"{missing} of {len(wanted)} frames are missing")
    return np.stack([found[times[index]] for index in indices])


def _to_rgb(frame: av.VideoFrame) -> UInt8[np.ndarray, "h w c"]:
    """The picture as it is meant to be seen: phones store it on its side, with a note."""
    picture = frame.to_ndarray(format="rgb24", threads=1)
    return np.ascontiguousarray(np.rot90(picture, frame.rotation // 90)) if frame.rotation else picture
