"""Videos that are decoded frame by frame while their tokens are generated."""

import time
from collections.abc import Iterator

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from t2v.generation.candidates import BestFrames
from t2v.generation.decode import FrameStream
from t2v.vqvae.model import VQVAE, to_uint8


class VideoStream(Iterator[UInt8[Tensor, "b 1 c height width"]]):
    """The frames of generated videos in order, start frames included; each is generated when it is read.

    Args:
        vqvae: Decodes the tokens.
        tokens: Tokens of the generated frames.
        start: Tokens of the start frames.

    Attributes:
        tokens: Tokens of the generated frames; its `passes` is the number of passes of the transformer so far.
    """

    def __init__(self, vqvae: VQVAE, tokens: FrameStream | BestFrames, start: Int[Tensor, "b t h w"] | None) -> None:
        self.tokens = tokens
        self._frames = self._decode(vqvae, start)
        self._began: float | None = None
        self._generated = 0

    def __next__(self) -> UInt8[Tensor, "b 1 c height width"]:
        self._began = self._began or time.perf_counter()
        return next(self._frames)

    def speed(self) -> dict[str, float]:
        """Return frames and tokens of all videos per second since the first was asked for, and passes per frame."""
        seconds = time.perf_counter() - (self._began or time.perf_counter())
        if not self._generated or not seconds:
            return {}
        videos, size = self.tokens.videos, self.tokens.frame_size
        rate = videos * self._generated / seconds
        return {"frames/s": rate, "tokens/s": size * rate, "passes a frame": self.tokens.passes / self._generated}

    @torch.inference_mode()
    def _decode(
        self, vqvae: VQVAE, start: Int[Tensor, "b t h w"] | None
    ) -> Iterator[UInt8[Tensor, "b 1 c height width"]]:
        state = None
        for frame in () if start is None else torch.split(start, 1, dim=1):
            video, state = vqvae.decode_stream(frame, state)
            yield to_uint8(video)
        for frame in self.tokens:
            self._generated += 1
            video, state = vqvae.decode_stream(frame, state)
            yield to_uint8(video)
