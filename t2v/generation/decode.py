"""The decoding loop: tokens of a video, frame by frame."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from t2v.batch import TextEmbedding
from t2v.errors import UserError
from t2v.generation.sampling import Sampler
from t2v.transformer.model import VideoTransformer


def repeat_text(text: TextEmbedding, times: int) -> TextEmbedding:
    """The batch of texts, `times` times over."""
    return TextEmbedding(*(tensor.repeat(times, *[1] * (tensor.ndim - 1)) for tensor in text))


@torch.inference_mode()
def generate_frames(
    model: VideoTransformer,
    text: TextEmbedding,
    frames: int,
    sampler: Sampler,
    seeds: Sequence[int],
    guidance: float = 1.0,
) -> Iterator[Int[Tensor, "b 1 h w"]]:
    """Generates videos, handing out each frame's tokens as soon as they are drawn.

    Time and memory a frame are constant, however long the video.

    Args:
        model: the transformer, in eval mode.
        text: one text a video.
        frames: how many frames to make, at least 1.
        sampler: how tokens are drawn.
        seeds: one seed a video; a video depends on its own text and seed alone.
        guidance: strength of classifier-free guidance; 1 is none, larger follows the text more closely. The guided and
            the unguided branch run in one batch.

    Raises:
        UserError: if `frames` is below 1 or there is not one seed a text.
    """
    count, size = len(text.pooled), model.grid_size
    if frames < 1:
        raise UserError(f"frames={frames} must be at least 1.")
    if len(seeds) != count:
        raise UserError(f"There are {len(seeds)} seeds for {count} texts: give one seed a text.")
    device = text.pooled.device
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    guided = guidance != 1.0
    if guided:
        drop = torch.arange(2 * count, device=device) >= count
        state = model.start_decoding(repeat_text(text, 2), drop)
    else:
        state = model.start_decoding(text)

    token = None
    for _ in range(frames):
        frame = []
        for _ in range(size * size):
            logits = model.step(token, state)
            if guided:
                with_text, without = logits.float().chunk(2)
                logits = without + guidance * (with_text - without)
            drawn = sampler(logits, generators)
            frame.append(drawn)
            token = drawn.repeat(2) if guided else drawn
        yield torch.stack(frame, dim=1).view(count, 1, size, size)
