"""Settings of generation: sampler, length, guidance scale, start frames, storage of the weights."""

from dataclasses import dataclass

from t2v.errors import UserError
from t2v.generation.decode import check_schedules
from t2v.generation.quantization import Weights
from t2v.generation.sampling import Sampler
from t2v.generation.schedules import Schedule


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
        compiled: Whether to compile the transformer's decoding step, which takes a minute or more at the first frame.

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

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise UserError(f"generation.frames={self.frames} must be at least 1.")
        check_schedules(self.sampler, self.guidance, self.frames)
        if self.start is not None and not 0 < self.start_frames < self.frames:
            raise UserError(
                f"generation.start_frames={self.start_frames} must be at least 1 and less than "
                f"generation.frames={self.frames}, so that there are frames left to generate."
            )
