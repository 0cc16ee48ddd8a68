"""Writing video files: H.264 (yuv420p) in mp4, with the index at the front for streaming.

PyAV encodes on one thread, so that equal frames give equal bytes on every machine.
"""

import tempfile
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from t2v.errors import UserError
from t2v.files import atomic_path


class _Encoder:
    """Context in which frames are written to an open file; `Mp4Writer` has the arguments."""

    def __init__(self, path: Path, fps: int | float, crf: int) -> None:
        options = {"movflags": "+faststart", "fflags": "+bitexact"}
        self._file = av.open(str(path), "w", format="mp4", options=options)
        self._stream = self._file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        # Equal frames give equal bytes only on one thread, and without what x264 computes differently on other CPUs.
        self._stream.options = {"crf": str(crf), "threads": "1", "x264-params": "cpu-independent=1"}
        self._stream.pix_fmt = "yuv420p"
        self._size: tuple[int, int] | None = None

    def __enter__(self) -> "_Encoder":
        return self

    def write(self, frames: UInt8[Tensor, "t c height width"]) -> None:
        _, channels, height, width = frames.shape
        if height % 2 or width % 2:
            raise UserError(
                f"Cannot write a video of {width}x{height} pixels: H.264 needs an even width and height; change the "
                "size of the frames."
            )
        assert channels == 3
        if self._size is None:
            self._size = self._stream.height, self._stream.width = height, width
        assert self._size == (height, width)
        for picture in frames.cpu().numpy().transpose(0, 2, 3, 1):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            self._file.mux(self._stream.encode(frame.reformat(format="yuv420p", threads=1)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                assert self._size is not None, "a video has at least one frame"
                self._file.mux(self._stream.encode())


class Mp4Writer:
    """Writes a video file frame by frame, as H.264, in constant memory.

    A context manager. The file appears under its name, complete, when the context ends; if the context ends by an
    exception, an older file stays as it is.

    Args:
        path: The mp4 file to write; its folder must exist.
        fps: Frames per second.
        crf: Quality of libx264, from 0 (lossless) to 51 (worst).
    """

    def __init__(self, path: str | Path, fps: int | float, crf: int = 18) -> None:
        self.path = Path(path)
        self.fps, self.crf = fps, crf
        self._contexts = ExitStack()

    def __enter__(self) -> "Mp4Writer":
        with ExitStack() as contexts:
            partial = contexts.enter_context(atomic_path(self.path))
            self._encoder = contexts.enter_context(_Encoder(partial, self.fps, self.crf))
            self._contexts = contexts.pop_all()
        return self

    def write(self, frames: UInt8[Tensor, "t c height width"]) -> None:
        """Append RGB frames, all of the same size.

        Raises:
            UserError: If height or width is odd, which yuv420p does not allow.
        """
        self._encoder.write(frames)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._contexts.__exit__(kind, error, traceback)


def write_mp4(path: str | Path, video: UInt8[Tensor, "t c height width"], fps: int | float, crf: int = 18) -> None:
    """Write a video as H.264; the file appears only when it is complete.

    Args:
        path: The mp4 file to write; its folder must exist.
        video: RGB frames.
        fps: Frames per second.
        crf: Quality of libx264, from 0 (lossless) to 51 (worst).

    Raises:
        UserError: If height or width is odd, which yuv420p does not allow.
    """
    with Mp4Writer(path, fps, crf) as file:
        file.write(video)


def encode_mp4(video: UInt8[Tensor, "t c height width"], fps: int | float, crf: int = 18) -> bytes:
    """Encode a video as the bytes of an mp4 file; `write_mp4` has the arguments."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"  # FFmpeg reads the file again to move the index to the front
        with _Encoder(path, fps, crf) as encoder:
            encoder.write(video)
        return path.read_bytes()
