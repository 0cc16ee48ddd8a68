"""Writing video files as H.264 (yuv420p, index in front).

PyAV encodes, on one thread, so that equal frames make equal bytes on any machine.
"""

import os
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from t2v.errors import UserError


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
        # Equal frames make equal bytes only on one thread, and without what x264 computes differently on other CPUs.
        self._stream.options = {"crf": str(self.crf), "threads": "1", "x264-params": "cpu-independent=1"}
        self._stream.pix_fmt = "yuv420p"
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
