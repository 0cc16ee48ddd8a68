"""The generation loop: tokens of a video, frame by frame, one or several in each pass of the transformer.

The token at a position is the argmax of the filtered log-probabilities plus Gumbel noise, and the noise depends only on
the seed and the position. So a video is a function of its noise, and can be computed by fixed-point iteration (Jacobi
iteration, https://arxiv.org/abs/2002.09928, https://arxiv.org/abs/2410.01699): a pass takes drafts of the next tokens,
and returns for each the token that follows those before it. Up to the first draft that differs, all are final, and
equal to those that decoding one after the other draws; the others are the drafts of the next pass.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from t2v.batch import TextEmbedding, check_token_range
from t2v.errors import UserError
from t2v.generation.guidance import check_negative, frames_of_both_branches, with_negative
from t2v.generation.parallel import Parallel, check_parallel, most_positions, next_positions
from t2v.generation.sampling import GumbelNoise, Sampler, wide
from t2v.generation.schedules import Schedule, value_at
from t2v.transformer.decoding import Decoder
from t2v.transformer.model import VideoTransformer

_ADAPTATION = 0.2
"""Weight of the last pass in the average of right drafts."""
_LEAD = 16
"""Frames by which a video may be ahead of the slowest one of its batch."""


def generate_frames(
    model: VideoTransformer,
    text: TextEmbedding,
    frames: int,
    sampler: Sampler,
    seeds: Sequence[int],
    guidance: float | Schedule = 1.0,
    start: Int[Tensor, "b t h w"] | None = None,
    compiled: bool = False,
    parallel: Parallel = 1,
    negative: TextEmbedding | None = None,
    scored: bool = False,
) -> "FrameStream":
    """Generate videos and yield the tokens of each frame as soon as they are final in all videos.

    Time and memory per frame are constant, however long the video is. Arguments are checked before the first token.

    Args:
        model: The transformer, in eval mode.
        text: Text embeddings, one text per video, of any lengths.
        frames: Length of the videos, start frames included, at least 1.
        sampler: Draws the tokens.
        seeds: One seed per video. On one kind of device, a video depends only on its own text, seed and start frames.
        guidance: Guidance scale of classifier-free guidance (https://arxiv.org/abs/2207.12598), a number or a schedule
            over the frames; 1 is no guidance, larger values follow the text more closely. From the first to the last
            frame with another value than 1, a pass computes two rows for each video.
        start: Tokens of the start frames of every video, fewer than `frames`.
        compiled: Whether to compile the decoding pass, see `Decoder`.
        parallel: Tokens of each video that a pass of the transformer computes: 1 is one after the other; "auto" is as
            many as a pass computes in about the time of one on this kind of device. It does not change the video, up
            to rounding.
        negative: Text embedding of the negative prompt of each video, from which guidance leads away in place of "no
            text"; a row whose mask has no text token is "no text".
        scored: Whether to compute `scores`.

    Returns:
        The frames in order, from the first after the start frames.

    Raises:
        UserError: If `frames`, a seed, the guidance scale, the temperature, the start frames or `parallel` are invalid;
            while generating, if logits are not finite.
    """
    batch = len(text.mask)
    if frames < 1:
        raise UserError(f"frames={frames} must be at least 1.")
    if len(seeds) != batch:
        raise UserError(f"There are {len(seeds)} seeds for {batch} texts: give one seed per text.")
    if start is not None:
        _check_start(model, start, batch, frames)
    check_parallel(parallel)
    schedules = check_schedules(sampler, guidance, frames)
    if negative is not None:
        if len(negative.mask) != batch:
            raise UserError(f"There are {len(negative.mask)} negative prompts for {batch} prompts: give one or each.")
        check_negative(schedules.guidance[0 if start is None else start.shape[1] :])
    return FrameStream(model, text, sampler, seeds, schedules, start, compiled, parallel, negative, scored)


class Schedules(NamedTuple):
    """Values at each frame of a video, the start frames included."""

    guidance: list[float]
    temperature: list[float]


def check_schedules(sampler: Sampler, guidance: float | Schedule, frames: int) -> Schedules:
    """Evaluate the schedules of guidance scale and temperature.

    Raises:
        UserError: If the temperature or the guidance scale of a frame is invalid.
    """
    temperatures = [sampler.temperature_at(frame, frames) for frame in range(frames)]
    scales = [value_at(guidance, frame, frames) for frame in range(frames)]
    for scale in scales:
        if not math.isfinite(scale):
            raise UserError(f"guidance={scale} must be a finite number; 1 is no guidance, and 2 to 8 are usual.")
    return Schedules(scales, temperatures)


class FrameStream(Iterator[Int[Tensor, "b 1 h w"]]):
    """The frames of `generate_frames`; each is generated when it is read.

    Attributes:
        passes: Passes of the transformer so far.
        frame_size: Tokens of a frame.
        videos: Number of videos.
        guided: Whether a generated frame has a guidance scale other than 1.
        scores: If asked for, log p(video | text) + the sum over its frames of (guidance − 1) · (log p(frame | text) −
            log p(frame | no text)) in nats, of the tokens that are final.
    """

    def __init__(
        self,
        model: VideoTransformer,
        text: TextEmbedding,
        sampler: Sampler,
        seeds: Sequence[int],
        schedules: Schedules,
        start: Int[Tensor, "b t h w"] | None,
        compiled: bool,
        parallel: Parallel,
        negative: TextEmbedding | None = None,
        scored: bool = False,
    ) -> None:
        self._model, self._text, self._sampler, self._seeds, self._negative = model, text, sampler, seeds, negative
        self._schedules, self._start, self._compiled = schedules, start, compiled
        self._frames, self.frame_size, self.videos = len(schedules.guidance), model.grid_size**2, len(seeds)
        self._emitted = self._first = 0 if start is None else start.shape[1]
        self._both = frames_of_both_branches(schedules.guidance, self._first, compiled)
        """Frames that passes compute with and without text."""
        self.guided = len(self._both) > 0
        self._parallel: Parallel = parallel
        self._on_cpu = text.mask.device.type == "cpu"
        self._adaptive = parallel == "auto" and self._on_cpu
        self._branches = 2 if self._first in self._both else 1  # with text, and without
        self._most = self._most_positions(self._branches)
        self._streak = 4.0
        """Average number of drafts at the beginning of a pass that turned out to be right."""
        self._begun = False
        self.passes = 0
        self._scored = scored
        self.scores = torch.zeros(self.videos, dtype=torch.float64, device=text.mask.device)

    @torch.inference_mode()
    def __next__(self) -> Int[Tensor, "b 1 h w"]:
        if self._emitted == self._frames:
            raise StopIteration
        if not self._begun:
            self._begin()
        while min(self._done) < self.frame_size * (self._emitted + 1):
            self._pass()
        if self._most == 1:
            self._check(bool(self._failed == self._frames))
        slot = self.frame_size * self._emitted % self._tokens.shape[1]
        self._emitted += 1
        codes = self._tokens[:, slot : slot + self.frame_size].clone()
        frame = codes.view(-1, 1, self._model.grid_size, self._model.grid_size)
        if self.guided and self._emitted <= self._both.start:
            self._shown.append(frame)
        return frame

    def _begin(self) -> None:
        """Put everything that passes need on the device; the host keeps the progress of each video."""
        model, device, size, batch = self._model, self._text.mask.device, self.frame_size, self.videos
        positions = self._most_positions(1 if len(self._both) < self._frames - self._first else 2)
        self._noise = GumbelNoise(self._seeds, size, model.vocab_size, positions, device)
        self._guidance, self._temperature = (
            torch.tensor(values, dtype=torch.float32, device=device) for values in self._schedules
        )
        reach = -(-(positions - 1) // size)
        self._tokens = torch.zeros(batch, size * (_LEAD + 2 + reach), dtype=torch.long, device=device)
        self._shown: list[Int[Tensor, "b t h w"]] = []
        """The frames before `_both`, start frames included, which the branch without text reads when it begins."""
        if self._start is not None:
            self._shown.append(self._start.to(device))
            slot = size * (self._first - 1) % self._tokens.shape[1]
            self._tokens[:, slot : slot + size] = self._shown[0][:, -1].flatten(1)
        self._build_decoder(positions)
        self._rows, self._all_rows = torch.arange(batch, device=device), list(range(batch))
        self._done = [size * self._first] * batch
        """Tokens of each video that are final, start frames included."""
        self._position = self._drafted = torch.full((batch,), size * self._first, device=device)
        """The same on the device, and the tokens of each video that are at least drafted, both of the rows computed."""
        self._failed = torch.full((), self._frames, device=device)
        """The first frame with logits that are not finite; the number of frames if there is none."""
        self._begun = True

    def _build_decoder(self, positions: int) -> None:
        """Build the decoder of the current branches, which begins after the frames so far.

        Args:
            positions: Most positions that a pass computes, in later passes too.
        """
        text, drop = self._text, None
        if self._branches == 2:
            text, drop = with_negative(text, self._negative)
        self._decoder = Decoder(self._model, text, drop, self._compiled, positions)
        if self._shown:
            self._decoder.prefill(torch.cat(self._shown, dim=1).repeat(self._branches, 1, 1, 1))

    def _pass(self) -> None:
        """Compute the next positions of each video, and keep the tokens that are final."""
        self._join()
        self._leave()
        size, ring, positions = self.frame_size, self._tokens.shape[1], self._most
        if self._adaptive:
            positions = next_positions(self._streak, self._most, self._compiled)
        rows = self._all_rows
        for number, row in enumerate(rows):
            last = self._done[row] + positions - 1
            self._noise.reach(number, self._done[row] // size, min(last // size + 1, self._frames))
        at = self._position[:, None]
        tokens = self._tokens[self._rows]
        if self._most > 1:
            at = at + torch.arange(positions, device=at.device)
            draft = _draft(tokens, at, self._drafted[:, None], self._model.grid_size)
            tokens.scatter_(1, at % ring, draft)
        frame = (at // size).clamp(max=self._frames - 1)

        inputs = tokens, self._position
        if self._branches == 2:
            inputs = tokens.repeat(2, 1), self._position.repeat(2)
        logits = self._decoder.logits(*inputs, positions, max(self._done[row] for row in rows) + positions)
        by_branch = wide(logits).chunk(self._branches)
        if self._branches == 2:
            with_text, without_text = by_branch
            logits = without_text.lerp(with_text, self._guidance[frame][..., None].to(with_text.dtype))
        noise, temperature = self._noise.at(at), self._temperature[frame][..., None]
        drawn = self._sampler(*(each.flatten(0, 1) for each in (logits, noise, temperature))).view_as(at)

        final, failed = torch.ones_like(drawn), ~logits.amax(dim=-1).isfinite()
        if self._most > 1:
            right = (drawn == draft).cumprod(dim=1)
            final = F.pad(right[:, :-1], (1, 0), value=1)  # a token is final if the drafts before it are right
            failed &= final.bool()
        self._failed = torch.minimum(self._failed, torch.where(failed, frame, self._frames).amin())
        self._tokens[self._rows] = tokens.scatter_(1, at % ring, drawn)
        stop = self._both.start if self._emitted < self._both.start else self._frames
        limit = size * min(stop, self._emitted + _LEAD)
        reached = (self._position + final.sum(dim=1)).clamp(max=limit)
        if self._scored:
            self._score(by_branch, drawn, self._guidance[frame], at < reached[:, None])
        self._position = reached
        self._drafted = torch.maximum(self._drafted, at[:, -1] + 1)
        self.passes += 1
        if self._most == 1:  # the host knows the progress and need not wait for the device
            self._done = [done + 1 for done in self._done]
            return
        totals = torch.stack([self._failed == self._frames, right.sum()])
        *done, finite, total = torch.cat([self._position, totals]).tolist()  # the one read of a pass
        self._check(bool(finite))
        self._streak += _ADAPTATION * (total / len(rows) - self._streak)
        for row, final_tokens in zip(rows, done, strict=True):  # each pass makes at least one more token final
            self._done[row] = min(max(final_tokens, self._done[row] + 1), limit)

    def _score(
        self,
        logits: Sequence[Float[Tensor, "b n v"]],
        drawn: Int[Tensor, "b n"],
        guidance: Float[Tensor, "b n"],
        counted: Bool[Tensor, "b n"],
    ) -> None:
        """Add the scores of the tokens that have become final.

        Args:
            logits: Of each branch.
            drawn: The tokens.
            guidance: Guidance scale at each position.
            counted: The positions that have become final.
        """
        with_text, *without = (each.log_softmax(dim=-1).gather(2, drawn[..., None])[..., 0] for each in logits)
        score = with_text + (guidance - 1) * (with_text - without[0]) if without else with_text
        self.scores.index_add_(0, self._rows, (score * counted).sum(dim=1).to(self.scores.dtype))

    def _join(self) -> None:
        """Begin the branch without text before the first guided frame, where all videos wait for each other."""
        if self._branches == 1 and self._emitted == self._both.start < self._frames:
            self._branches = 2
            self._build_decoder(self._most)
            self._most = self._most_positions(2)
            self._shown.clear()

    def _leave(self) -> None:
        """Let finished videos leave the batch, and all of them the branch without text after the last guided frame.

        Compiled passes keep finished videos, so that they are compiled for no other number of them.
        """
        stop = math.inf if self._compiled else self.frame_size * self._frames
        kept = [number for number, row in enumerate(self._all_rows) if self._done[row] < stop]
        rows = len(self._all_rows)
        unguided = self._branches == 2 and min(self._done) >= self.frame_size * self._both.stop
        if len(kept) == rows and not unguided:
            return
        self._branches = 1 if unguided else self._branches
        device = self._position.device
        index = torch.arange(rows, device=device) if len(kept) == rows else torch.tensor(kept, device=device)
        self._decoder.select(torch.cat([index + branch * rows for branch in range(self._branches)]))
        self._noise.select(kept, index)
        self._rows, self._position, self._drafted = (
            each[index] for each in (self._rows, self._position, self._drafted)
        )
        self._all_rows = [self._all_rows[number] for number in kept]
        if unguided:
            self._most = self._most_positions(self._branches)

    def _most_positions(self, branches: int) -> int:
        """Return the most positions of each video that a pass with a number of branches computes."""
        positions = most_positions(self._parallel, branches * self.videos, self._on_cpu, self._compiled)
        return min(positions, self.frame_size * (self._frames - self._first))

    def _check(self, finite: bool) -> None:
        if not finite:
            raise UserError(_not_finite(self._model, int(self._failed)))


def _draft(
    tokens: Int[Tensor, "b ring"], at: Int[Tensor, "b n"], drafted: Int[Tensor, "b 1"], grid: int
) -> Int[Tensor, "b n"]:
    """Return the guesses of the tokens at positions: those of the last pass, else those of the frame before.

    Args:
        tokens: Ring buffer of tokens, final and drafted.
        at: Raster positions.
        drafted: Position up to which there are tokens.
        grid: Height and width of a frame; in the first frame the row above is repeated.
    """
    size = grid * grid
    period = torch.where(drafted < size, grid, size)
    newest = at - ((at - drafted) // period + 1) * period  # the last drafted one at the same row and column
    source = torch.where(at < drafted, at, newest.clamp(min=0))
    return tokens.gather(1, source % tokens.shape[1])


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
