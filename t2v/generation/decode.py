"""The decoding loop: tokens of a video, frame by frame."""

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from t2v.batch import TextEmbedding
from t2v.errors import UserError
from t2v.generation.sampling import Sampler
from t2v.generation.schedules import Schedule, value_at
from t2v.transformer.model import VideoTransformer


def generate_frames(
    model: VideoTransformer,
    text: TextEmbedding,
    frames: int,
    sampler: Sampler,
    seeds: Sequence[int],
    guidance: float | Schedule = 1.0,
    given: Int[Tensor, "b t h w"] | None = None,
) -> Iterator[Int[Tensor, "b 1 h w"]]:
    """Generates videos, handing out each frame's tokens as soon as they are drawn.

    Time and memory a frame are constant, however long the video. Mistakes are told before the first token is drawn.

    Args:
        model: the transformer, in eval mode.
        text: one text a video, of any lengths.
        frames: length of the videos, given frames included, at least 1.
        sampler: how tokens are drawn.
        seeds: one seed a video; on one kind of device, a video depends on its own text, seed and given frames alone.
        guidance: strength of classifier-free guidance (https://arxiv.org/abs/2207.12598); 1 is none, larger follows
            the text more closely, and a schedule changes it from frame to frame. The guided and the unguided branch
            run in one batch.
        given: tokens of the first frames of every video, fewer than `frames`; the videos go on from them.

    Returns:
        The frames in their order, from the first that is not given.

    Raises:
        UserError: if `frames`, a seed, the guidance, the temperature or the given tokens are not as said above.
    """
    count = len(text.pooled)
    if frames < 1:
        raise UserError(f"frames={frames} must be at least 1.")
    if len(seeds) != count:
        raise UserError(f"There are {len(seeds)} seeds for {count} texts: give one seed a text.")
    if given is not None:
        _check_given(model, given, count, frames)
    strengths = check_schedules(sampler, guidance, frames)[0 if given is None else given.shape[1] :]
    return _draw(model, text, frames, sampler, seeds, strengths, given)


def check_schedules(sampler: Sampler, guidance: float | Schedule, frames: int) -> list[float]:
    """Goes through the schedules of videos of a length, and returns the guidance at each frame.

    Raises:
        UserError: if a temperature or a guidance on the way is impossible.
    """
    for frame in range(frames):
        sampler.temperature_at(frame, frames)
    strengths = [value_at(guidance, frame, frames) for frame in range(frames)]
    if wrong := [strength for strength in strengths if not math.isfinite(strength)]:
        raise UserError(f"guidance={wrong[0]} must be a finite number; 1 is none, and 2 to 8 are usual.")
    return strengths


@torch.inference_mode()
def _draw(
    model: VideoTransformer,
    text: TextEmbedding,
    frames: int,
    sampler: Sampler,
    seeds: Sequence[int],
    strengths: Sequence[float],
    given: Int[Tensor, "b t h w"] | None,
) -> Iterator[Int[Tensor, "b 1 h w"]]:
    """The loop of `generate_frames`; `strengths` is the guidance at each frame to draw."""
    count, size, device = len(text.pooled), model.grid_size, text.pooled.device
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    branches = 2 if any(strength != 1.0 for strength in strengths) else 1
    drop = torch.arange(branches * count, device=device) >= count if branches > 1 else None
    state = model.start_decoding(_repeat_text(text, branches), frames, drop)
    token = None
    if given is not None:
        given = given.to(device).repeat(branches, 1, 1, 1)
        model.prefill(given, state)
        token = given[:, -1, -1, -1]

    for frame, strength in enumerate(strengths, start=frames - len(strengths)):
        drawn = []
        for _ in range(size * size):
            logits = model.step(token, state)
            if branches > 1:
                with_text, without = logits.float().chunk(2)
                logits = without.lerp(with_text, strength)  # without + strength · (with_text − without)
            drawn.append(sampler(logits, generators, frame, frames))
            token = drawn[-1].repeat(branches)
        yield torch.stack(drawn, dim=1).view(count, 1, size, size)


def _check_given(model: VideoTransformer, given: Int[Tensor, "b t h w"], count: int, frames: int) -> None:
    """Refuses given tokens that are no beginning of the videos asked for."""
    batch, length, *grid = given.shape
    if not 0 < length < frames:
        raise UserError(
            f"{length} given frames of frames={frames} leave nothing to begin with or nothing to make: give at least "
            "one frame, and ask for more than are given."
        )
    if grid != [model.grid_size] * 2:
        raise UserError(
            f"The given tokens lie on a grid of {'×'.join(map(str, grid))}, but the transformer's is {model.grid_size}×"
            f"{model.grid_size}: were they made by another VQ-VAE?"
        )
    if batch != count:
        raise UserError(f"Tokens are given for {batch} videos, but there are {count} texts: give one a text.")
    low, high = int(given.min()), int(given.max())
    if low < 0 or high >= model.vocab_size:
        raise UserError(
            f"Given token {low if low < 0 else high} is outside the vocabulary (0 to {model.vocab_size - 1}): was "
            "it made by another VQ-VAE?"
        )


def _repeat_text(text: TextEmbedding, times: int) -> TextEmbedding:
    """The batch of texts, `times` times over."""
    return TextEmbedding(*(tensor.repeat(times, *[1] * (tensor.ndim - 1)) for tensor in text))
