"""The generation loop: tokens of a video, frame by frame."""

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from t2v.batch import TextEmbedding, check_token_range
from t2v.errors import UserError
from t2v.generation.sampling import Sampler
from t2v.generation.schedules import Schedule, value_at
from t2v.transformer.decoding import Decoder
from t2v.transformer.model import VideoTransformer


def generate_frames(
    model: VideoTransformer,
    text: TextEmbedding,
    frames: int,
    sampler: Sampler,
    seeds: Sequence[int],
    guidance: float | Schedule = 1.0,
    start: Int[Tensor, "b t h w"] | None = None,
    compiled: bool = False,
) -> Iterator[Int[Tensor, "b 1 h w"]]:
    """Generate videos and yield the tokens of each frame as soon as they are drawn.

    Time and memory per frame are constant, however long the video is. Arguments are checked before the first token.

    Args:
        model: The transformer, in eval mode.
        text: Text embeddings, one text per video, of any lengths.
        frames: Length of the videos, start frames included, at least 1.
        sampler: Draws the tokens.
        seeds: One seed per video. On one kind of device, a video depends only on its own text, seed and start frames.
        guidance: Guidance scale of classifier-free guidance (https://arxiv.org/abs/2207.12598), a number or a schedule
            over the frames; 1 is no guidance, larger values follow the text more closely. Other values than 1 double
            the batch.
        start: Tokens of the start frames of every video, fewer than `frames`.
        compiled: Whether to compile the decoding step, see `Decoder`.

    Returns:
        The frames in order, from the first after the start frames.

    Raises:
        UserError: If `frames`, a seed, the guidance scale, the temperature or the start frames are invalid; while
            generating, if logits are not finite.
    """
    batch = len(text.pooled)
    if frames < 1:
        raise UserError(f"frames={frames} must be at least 1.")
    if len(seeds) != batch:
        raise UserError(f"There are {len(seeds)} seeds for {batch} texts: give one seed per text.")
    if start is not None:
        _check_start(model, start, batch, frames)
    scales = check_schedules(sampler, guidance, frames)[0 if start is None else start.shape[1] :]
    return _generate(model, text, frames, sampler, seeds, scales, start, compiled)


def check_schedules(sampler: Sampler, guidance: float | Schedule, frames: int) -> list[float]:
    """Evaluate the schedules of temperature and guidance scale, and return the guidance scale at each frame.

    Raises:
        UserError: If the temperature or the guidance scale of a frame is invalid.
    """
    for frame in range(frames):
        sampler.temperature_at(frame, frames)
    scales = [value_at(guidance, frame, frames) for frame in range(frames)]
    for scale in scales:
        if not math.isfinite(scale):
            raise UserError(f"guidance={scale} must be a finite number; 1 is no guidance, and 2 to 8 are usual.")
    return scales


@torch.inference_mode()
def _generate(
    model: VideoTransformer,
    text: TextEmbedding,
    frames: int,
    sampler: Sampler,
    seeds: Sequence[int],
    scales: Sequence[float],
    start: Int[Tensor, "b t h w"] | None,
    compiled: bool,
) -> Iterator[Int[Tensor, "b 1 h w"]]:
    """Run the loop of `generate_frames`; `scales` holds the guidance scale of each frame to generate."""
    batch, grid, device = len(text.pooled), model.grid_size, text.pooled.device
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    guided = any(scale != 1.0 for scale in scales)
    branches = 2 if guided else 1  # with text, and without
    drop = torch.arange(2 * batch, device=device) >= batch if guided else None
    decoder = Decoder(model, _repeat_text(text, branches), drop, compiled)
    token = None
    if start is not None:
        start = start.to(device).repeat(branches, 1, 1, 1)
        decoder.prefill(start)
        token = start[:, -1, -1, -1]

    for frame, scale in enumerate(scales, start=frames - len(scales)):
        drawn, largest = [], []
        for _ in range(grid * grid):  # nothing here waits for the device
            logits = decoder.step(token)
            if guided:
                with_text, without_text = logits.float().chunk(2)
                logits = without_text.lerp(with_text, scale)  # without_text + scale · (with_text − without_text)
            largest.append(logits.amax())  # NaN if any is
            drawn.append(sampler(logits, generators, frame, frames))
            token = drawn[-1].repeat(branches)
        if not torch.stack(largest).isfinite().all():
            raise UserError(_not_finite(model, frame))
        yield torch.stack(drawn, dim=1).view(batch, 1, grid, grid)


def _not_finite(model: VideoTransformer, frame: int) -> str:
    """Return the message for logits that are NaN or infinite, with the likely cause."""
    start = f"The logits of frame {frame} are not finite"
    weights = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    if all(weight.isfinite().all() for weight in weights):
        return (
            f"{start} though all weights are, so an activation had an overflow: generate with 32-true or bf16 in place "
            "of float16, with a smaller guidance scale, or with weights=full."
        )
    return f"{start}, since weights of the transformer are NaN or infinite: load a checkpoint from before that step."


def _check_start(model: VideoTransformer, start: Int[Tensor, "_ t h w"], batch: int, frames: int) -> None:
    """Check that start frames fit the model, the texts and the length of the videos."""
    videos, length, height, width = start.shape
    if not 0 < length < frames:
        raise UserError(
            f"The number of start frames, {length}, must be at least 1 and less than frames={frames}: change one of "
            "them."
        )
    if (height, width) != (model.grid_size, model.grid_size):
        raise UserError(
            f"The start frames have a grid of {height}×{width} tokens, but the transformer's is {model.grid_size}×"
            f"{model.grid_size}: tokenize them with the VQ-VAE that the transformer was trained with."
        )
    if videos != batch:
        raise UserError(f"There are start frames for {videos} videos, but {batch} texts: give start frames per text.")
    check_token_range(
        start, model.vocab_size, "tokenize the start frames with the VQ-VAE that the transformer was trained with."
    )


def _repeat_text(text: TextEmbedding, times: int) -> TextEmbedding:
    """Return the batch of texts repeated."""
    return TextEmbedding(*(tensor.repeat(times, *[1] * (tensor.ndim - 1)) for tensor in text))
