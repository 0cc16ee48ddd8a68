"""Settings of generation: sampler, length, guidance scale, start frames, storage of the weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from t2v.errors import UserError
from t2v.generation.candidates import check_candidates
from t2v.generation.decode import check_schedules
from t2v.generation.guidance import check_negative
from t2v.generation.parallel import Parallel, check_parallel
from t2v.generation.quantization import Weights
from t2v.generation.sampling import Sampler
from t2v.generation.schedules import Schedule
from t2v.video import read_clip


@dataclass(frozen=True)
class GenerationSettings:
    """How videos are generated.

    Args:
        sampler: Draws the tokens.
        frames: Length of a generated video, its start frames included; at least 1.
        guidance: Guidance scale (classifier-free guidance), a number or a schedule over the frames; 1 is no guidance.
        start: Path of a picture or video from which the start frames of every video are taken; none by default.
        start_frames: Number of start frames, at least 1 and fewer than `frames`.
        weights: How the weights of the large layers are stored: unchanged ("full"), or quantized to 8 or 4 bits.
        compiled: Whether to compile the transformer's decoding pass, which takes a minute or more at the first frame.
        negative_prompt: What the videos should not show: guidance leads away from it in place of "no text".
        parallel: Tokens of each video that a pass of the transformer computes; 1 is one after the other. "auto" is as
            many as are worth it on this kind of device. The videos are the same with any number, up to rounding.
        candidates: Videos that are generated for each prompt, of which the one is kept that is most probable under
            guidance, see `t2v.generation.candidates`.

    Raises:
        UserError: If a value is out of its range.
    """

    sampler: Sampler
    frames: int
    guidance: float | Schedule = 1.0
    start: str | None = None
    start_frames: int = 1
    weights: Weights = "full"
    compiled: bool = False
    parallel: Parallel = "auto"
    negative_prompt: str = ""
    candidates: int = 1

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise UserError(f"generation.frames={self.frames} must be at least 1.")
        check_parallel(self.parallel, "generation.parallel")
        scales = check_schedules(self.sampler, self.guidance, self.frames).guidance
        check_candidates(self.candidates, self.guided, "generation.candidates")
        if self.negative_prompt:
            check_negative(scales)
        if self.start is not None:
            self._check_start_frames()

    @property
    def guided(self) -> bool:
        """Whether there is guidance in any frame."""
        return any(scale != 1.0 for scale in check_schedules(self.sampler, self.guidance, self.frames).guidance)

    def check_prompts(self, starts: Sequence[str | None] | None, negatives: Sequence[str | None] | None) -> None:
        """Check that the options of prompts fit the settings.

        Args:
            starts: Picture or video that each video begins with, if it has one of its own.
            negatives: Negative prompt of each video, if it has one of its own.

        Raises:
            UserError: If no frames are left to generate, or a negative prompt has no effect.
        """
        starting = any(start is not None for start in starts or [])
        if starting:
            self._check_start_frames()
        if any(self.negative_prompts(negatives, len(negatives or [None]))):
            scales = check_schedules(self.sampler, self.guidance, self.frames).guidance
            check_negative(scales[self.start_frames if starting or self.start is not None else 0 :])

    def _check_start_frames(self) -> None:
        if not 0 < self.start_frames < self.frames:
            raise UserError(
                f"generation.start_frames={self.start_frames} must be at least 1 and less than "
                f"generation.frames={self.frames}, so that there are frames left to generate."
            )

    def negative_prompts(self, own: Sequence[str | None] | None, batch: int) -> list[str]:
        """Return the negative prompt of each video: its own, or that of the settings; empty for none."""
        return [self.negative_prompt if each is None else each for each in own or [None] * batch]

    def read_start(
        self, paths: Sequence[str | None] | None, size: int, fps: float
    ) -> UInt8[Tensor, "b t c height width"] | None:
        """Read the start frames of a batch, or return None if it has none.

        Args:
            paths: Pictures or videos of the prompts, all or none of which are None; with none, that of the settings.
            size: Height and width in pixels.
            fps: Frames per second.

        Raises:
            UserError: If a file cannot be read.
        """
        own = [path for path in paths or [] if path is not None] or [path for path in [self.start] if path is not None]
        return torch.stack([read_clip(path, self.start_frames, size, fps) for path in own]) if own else None
