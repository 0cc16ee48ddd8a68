"""H.264 as a `VQVAE` with libx264 for a bottleneck, so that the code that measures tokenizers measures it too."""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from t2v.vqvae.model import VQVAE, VQVAEOutput, to_model_range, to_uint8


class H264(VQVAE):
    """H.264 by libx264: one key frame a clip, B-frames, tuned for PSNR.

    Attributes:
        bits: of everything encoded so far, parameter sets included, comments (SEI) not.
        pixels: of everything encoded so far.
    """

    def __init__(self, crf: float, preset: str = "slow", fps: float = 8):
        """
        Args:
            crf: quality, from 0 (lossless) to 51 (worst).
            preset: how much effort libx264 makes.
            fps: frames a second, which weigh in its choice of quality.
        """
        nn.Module.__init__(self)  # there are no networks
        self.codebook_size = 1  # there are no tokens
        self.crf, self.preset, self.fps = crf, preset, fps
        self.bits, self.pixels = 0, 0

    def forward(self, video: Float[Tensor, "b t c h w"], quantize: bool = True) -> VQVAEOutput:
        """Encodes and decodes clips, each alone."""
        clips = to_uint8(video).permute(0, 1, 3, 4, 2).cpu().numpy()
        decoded = torch.from_numpy(np.stack([self._roundtrip(clip) for clip in clips]))
        reconstruction = to_model_range(decoded.permute(0, 1, 4, 2, 3)).to(video.device)
        return VQVAEOutput(reconstruction, None, video.new_zeros(()))

    def _roundtrip(self, clip: np.ndarray) -> np.ndarray:
        frames, height, width, _ = clip.shape
        rate = Fraction(self.fps).limit_denominator(1001)
        encoder: Any = av.CodecContext.create("libx264", "w")
        encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
        encoder.framerate, encoder.time_base = rate, 1 / rate
        whole = {"g": str(frames), "sc_threshold": "0"}
        encoder.options = {"preset": self.preset, "tune": "psnr", "crf": str(self.crf), "threads": "1", **whole}
        packets = list(self._encode_clip(encoder, clip))
        self.bits += 8 * sum(_size_without_comments(bytes(packet)) for packet in packets)
        self.pixels += frames * height * width
        decoder: Any = av.CodecContext.create("h264", "r")
        pictures = [frame for packet in [*packets, None] for frame in decoder.decode(packet)]
        return np.stack([picture.to_ndarray(format="rgb24") for picture in pictures])

    @staticmethod
    def _encode_clip(encoder: Any, clip: np.ndarray) -> Iterator[Any]:
        for number, picture in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(format="yuv420p")
            frame.pts, frame.time_base = number, encoder.time_base
            yield from encoder.encode(frame)
        yield from encoder.encode(None)


def _size_without_comments(packet: bytes) -> int:
    """Bytes of an Annex B packet without its SEI units, in which libx264 writes its name and options."""
    units = packet.split(b"\0\0\1")[1:]
    return sum(3 + len(unit) for unit in units if unit[0] & 31 != 6)


def find_crf(clips: UInt8[Tensor, "b t c h w"], bits_per_pixel: float, fps: float) -> float:
    """The quality at which H.264 takes about this many bits a pixel over all clips.

    Args:
        clips: each is encoded alone.
        bits_per_pixel: what is wanted.
        fps: frames a second.
    """
    best, worst = 0.0, 51.0
    tried: dict[float, float] = {}
    for step in range(13):
        crf = (best + worst) / 2 if step else worst
        codec = H264(crf, fps=fps)
        codec(to_model_range(clips))
        tried[crf] = codec.bits / codec.pixels
        best, worst = (crf, worst) if tried[crf] > bits_per_pixel else (best, crf)
    return min(tried, key=lambda crf: abs(tried[crf] - bits_per_pixel))
