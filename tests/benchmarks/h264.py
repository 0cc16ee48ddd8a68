"""H.264 as a subclass of `VQVAE`, so that the code that measures tokenizers can measure it."""

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
    """H.264 encoded by libx264: one key frame per clip, B-frames, tuned for PSNR.

    Args:
        crf: Quality, from 0 (lossless) to 51 (worst).
        preset: Speed preset of libx264.
        fps: Frames per second, which affect libx264's rate control.

    Attributes:
        bits: Bits of all clips encoded so far, with parameter sets but without comments (SEI).
        pixels: Pixels of all clips encoded so far.
    """

    def __init__(self, crf: float, preset: str = "slow", fps: float = 8.0) -> None:
        nn.Module.__init__(self)  # there are no networks
        self.codebook_size = 1  # there are no tokens
        self.crf, self.preset, self.fps = crf, preset, fps
        self.bits, self.pixels = 0, 0

    def forward(self, video: Float[Tensor, "b t c h w"], quantize: bool = True) -> VQVAEOutput:
        """Encode and decode clips, each separately."""
        clips = to_uint8(video).permute(0, 1, 3, 4, 2).cpu().numpy()
        decoded = torch.from_numpy(np.stack([self._roundtrip(clip) for clip in clips]))
        reconstruction = to_model_range(decoded.permute(0, 1, 4, 2, 3)).to(video.device)
        return VQVAEOutput(reconstruction, None, video.new_zeros(()))

    def _roundtrip(self, clip: UInt8[np.ndarray, "t h w c"]) -> UInt8[np.ndarray, "t h w c"]:
        frames, height, width, _ = clip.shape
        rate = Fraction(self.fps).limit_denominator(1001)
        encoder: Any = av.CodecContext.create("libx264", "w")
        encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
        encoder.framerate, encoder.time_base = rate, 1 / rate
        one_key_frame = {"g": str(frames), "sc_threshold": "0"}
        options = {"preset": self.preset, "tune": "psnr", "crf": str(self.crf), "threads": "1"}
        encoder.options = {**options, **one_key_frame}
        packets = list(self._encode_clip(encoder, clip))
        self.bits += 8 * sum(_size_without_comments(bytes(packet)) for packet in packets)
        self.pixels += frames * height * width
        decoder: Any = av.CodecContext.create("h264", "r")
        decoded = [frame for packet in [*packets, None] for frame in decoder.decode(packet)]
        return np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])

    @staticmethod
    def _encode_clip(encoder: Any, clip: UInt8[np.ndarray, "t h w c"]) -> Iterator[Any]:
        for number, pixels in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(format="yuv420p")
            frame.pts, frame.time_base = number, encoder.time_base
            yield from encoder.encode(frame)
        yield from encoder.encode(None)


def _size_without_comments(packet: bytes) -> int:
    """Return the bytes of an Annex B packet without its SEI units, which contain libx264's name and options."""
    units = packet.split(b"\0\0\1")[1:]
    return sum(3 + len(unit) for unit in units if unit[0] & 31 != 6)


def find_crf(clips: UInt8[Tensor, "b t c h w"], bits_per_pixel: float, fps: float) -> float:
    """Return the quality at which H.264 takes about this many bits per pixel over all clips, by bisection.

    Args:
        clips: The clips; each is encoded separately.
        bits_per_pixel: Wanted bits per pixel.
        fps: Frames per second.
    """
    best, worst = 0.0, 51.0
    crf = worst
    measured: dict[float, float] = {}
    for _ in range(13):
        codec = H264(crf, fps=fps)
        codec(to_model_range(clips))
        measured[crf] = codec.bits / codec.pixels
        if measured[crf] > bits_per_pixel:
            best = crf
        else:
            worst = crf
        crf = (best + worst) / 2
    return min(measured, key=lambda crf: abs(measured[crf] - bits_per_pixel))
