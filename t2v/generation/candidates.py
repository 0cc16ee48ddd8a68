"""The best of several candidates for each video, by the model's own likelihoods.

Autoregressive models of pictures are commonly sampled several times, and the best sample kept (DALL·E,
https://arxiv.org/abs/2102.12092; CogView, https://arxiv.org/abs/2105.13290, which ranks by its own likelihoods). A
candidate's score is the logarithm of its probability under guidance, up to a constant: log p(video | text) + the sum
over its frames of (guidance − 1) · (log p(frame | text) − log p(frame | no text)). A video that the text explains well,
such as one whose motion is the prompt's, has a high one. Guided decoding computes both likelihoods in any case.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from t2v.batch import TextEmbedding
from t2v.errors import UserError
from t2v.generation.decode import FrameStream


def check_candidates(candidates: int, guided: bool, argument: str = "candidates") -> None:
    """Check the number of candidates.

    Args:
        candidates: Candidates of each video.
        guided: Whether a generated frame has a guidance scale other than 1.
        argument: Name of the argument, for the message.

    Raises:
        UserError: If it is less than 1, or more than 1 and there is no guidance.
    """
    if candidates < 1:
        raise UserError(f"{argument}={candidates} must be at least 1.")
    if candidates > 1 and not guided:
        raise UserError(
            f"{argument}={candidates} needs guidance, by which candidates are compared: set guidance to 1.5 to 4, or "
            f"{argument} to 1."
        )


def candidate_seeds(seeds: Sequence[int], candidates: int) -> list[int]:
    """Return the seeds of all candidates, those of one video after the other; the first has the video's own seed.

    Args:
        seeds: One for each video.
        candidates: Candidates of each video.
    """
    return [seed if number == 0 else _seed(seed, number) for seed in seeds for number in range(candidates)]


def _seed(seed: int, number: int) -> int:
    digest = hashlib.blake2b(f"{seed} candidate {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def best_of(
    candidates: int | None,
    default: int,
    generate: Callable[..., FrameStream],
    text: TextEmbedding,
    seeds: Sequence[int],
    start: Int[Tensor, "b t h w"] | None,
    negative: TextEmbedding | None,
) -> "FrameStream | BestFrames":
    """Return the frames of the best of several candidates of each video; of the only one as they are generated.

    Args:
        candidates: Candidates of each video; None for the default.
        default: Candidates with guidance; without it there is only one, since nothing compares them.
        generate: `generate_frames` with all arguments but the following.
        text: Text of each video.
        seeds: Seed of each video, which is that of its first candidate.
        start: Tokens of the start frames of each video.
        negative: Negative prompt of each video.

    Raises:
        UserError: If there are several candidates and no guidance; and as `generate_frames`.
    """
    only = generate(text, seeds=seeds, start=start, negative=negative)  # which checks the arguments
    if candidates is None:
        candidates = default if only.guided else 1
    check_candidates(candidates, only.guided)
    if candidates == 1:
        return only
    repeat = partial(torch.repeat_interleave, repeats=candidates, dim=0)

    stream = generate(
        TextEmbedding(*map(repeat, text)),
        seeds=candidate_seeds(seeds, candidates),
        start=None if start is None else repeat(start),
        negative=None if negative is None else TextEmbedding(*map(repeat, negative)),
        scored=True,
    )
    return BestFrames(stream, candidates)


class BestFrames(Iterator[Int[Tensor, "b 1 h w"]]):
    """The frames of the candidate with the largest score of each video. All candidates are finished before the first.

    Args:
        frames: Candidates, those of one video after the other, with scores.
        candidates: Candidates of each video.

    Attributes:
        frame_size: Tokens of a frame.
        videos: Number of videos.
    """

    def __init__(self, frames: FrameStream, candidates: int) -> None:
        self._frames, self._candidates = frames, candidates
        self.frame_size, self.videos = frames.frame_size, frames.videos // candidates
        self._best: Iterator[Tensor] | None = None

    @property
    def passes(self) -> int:
        """Passes of the transformer so far."""
        return self._frames.passes

    def __next__(self) -> Int[Tensor, "b 1 h w"]:
        if self._best is None:
            tokens = torch.cat(list(self._frames), dim=1).unflatten(0, (self.videos, self._candidates))
            best = self._frames.scores.view(self.videos, self._candidates).argmax(dim=1)
            self._best = iter(tokens[torch.arange(self.videos, device=best.device), best].split(1, dim=1))
        return next(self._best)
