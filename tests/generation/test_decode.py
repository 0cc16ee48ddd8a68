"""The decoding loop: seeds, batches, guidance, given frames."""

import pytest
import torch
from torch import Tensor

from t2v.batch import TextEmbedding
from t2v.errors import UserError
from t2v.generation import Interval, Linear, Sampler, Schedule
from t2v.generation.decode import generate_frames

LENGTHS = (3, 6, 1)


def texts() -> TextEmbedding:
    """Three texts of different lengths; what stands on padding must not matter, so it is not zero here."""
    generator = torch.Generator().manual_seed(5)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    tokens, pooled = torch.randn(3, max(LENGTHS), 8, generator=generator), torch.randn(3, 8, generator=generator)
    return TextEmbedding(tokens, mask, pooled)


def only(i: int) -> TextEmbedding:
    """One of the texts, without padding."""
    text, length = texts(), LENGTHS[i]
    return TextEmbedding(text.tokens[i : i + 1, :length], text.mask[i : i + 1, :length], text.pooled[i : i + 1])


def video(*args, **flags) -> Tensor:
    return torch.cat(list(generate_frames(*args, **flags)), dim=1)


@pytest.mark.parametrize("guidance", [1.0, 3.0, Linear(4.0, 1.0)])
@pytest.mark.parametrize("given", [0, 2])
def test_a_video_depends_on_its_own_text_seed_and_given_frames_alone(transformer, guidance, given):
    start = torch.randint(16, (3, given, 2, 2)) if given else None
    together = video(transformer, texts(), 8, Sampler(), [7, 8, 9], guidance, start)
    assert together.shape == (3, 8 - given, 2, 2)
    for i in range(3):
        own = None if start is None else start[i : i + 1]
        alone = video(transformer, only(i), 8, Sampler(), [7 + i], guidance, own)
        assert torch.equal(together[i : i + 1], alone)
        reseeded = video(transformer, only(i), 8, Sampler(), [17 + i], guidance, own)
        assert not torch.equal(alone, reseeded)


def test_other_texts_and_more_guidance_make_other_videos(transformer):
    same = [generate_frames(transformer, only(i), 8, Sampler(), [7], g) for i in (0, 1) for g in (1.0, 5.0)]
    made = [torch.cat(list(frames), dim=1) for frames in same]
    assert all(not torch.equal(a, b) for n, a in enumerate(made) for b in made[:n])


def test_a_frame_with_guidance_1_is_unguided(transformer):
    """Up to the first guided frame, and on from it only as far as the video went another way."""
    greedy = Sampler(top_k=1)
    plain = video(transformer, texts(), 6, greedy, [0, 0, 0])
    late = video(transformer, texts(), 6, greedy, [0, 0, 0], Interval(6.0, 0.6, 1.0))
    assert torch.equal(plain[:, :3], late[:, :3])
    assert not torch.equal(plain[:, 3:], late[:, 3:])


def test_no_text_is_guidance_0(transformer):
    greedy = Sampler(top_k=1)
    one, other = (video(transformer, only(i), 4, greedy, [0], guidance=0.0) for i in (0, 1))
    assert torch.equal(one, other)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("given", [1, 4, 7])
def test_going_on_from_given_frames_is_going_on(transformer, guidance, given):
    """The window is 2 frames: given ones fill the caches once, and more than once."""
    greedy = Sampler(top_k=1)
    whole = video(transformer, texts(), 8, greedy, [0, 0, 0], guidance)
    rest = video(transformer, texts(), 8, greedy, [0, 0, 0], guidance, whole[:, :given])
    assert torch.equal(rest, whole[:, given:])
    other = video(transformer, texts(), 8, greedy, [0, 0, 0], guidance, (whole[:, :given] + 1) % 16)
    assert not torch.equal(other, rest)


def test_frames_come_out_one_by_one(transformer):
    stream = generate_frames(transformer, texts(), 100_000, Sampler(), [1, 2, 3])
    assert next(stream).shape == next(stream).shape == (3, 1, 2, 2)


def test_schedules_are_told_the_frame_and_the_length(transformer):
    class Seen(Schedule):
        def __init__(self) -> None:
            self.calls: set[tuple[int, int]] = set()

        def __call__(self, frame: int, frames: int) -> float:
            self.calls.add((frame, frames))
            return 1.5

    guidance, temperature = Seen(), Seen()
    stream = generate_frames(
        transformer, only(0), 5, Sampler(temperature), [1], guidance, torch.zeros(1, 2, 2, 2, dtype=torch.long)
    )
    temperature.calls.clear()  # of the check before the start
    assert len(list(stream)) == 3
    assert temperature.calls == {(2, 5), (3, 5), (4, 5)}
    assert guidance.calls == {(frame, 5) for frame in range(5)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 0}, "frames=0 must be at least 1"),
        ({"seeds": [1]}, "1 seeds for 3 texts"),
        ({"guidance": float("nan")}, "guidance=nan must be a finite number"),
        ({"guidance": Interval(float("inf"), 0.5, 1.0)}, "guidance=inf must be a finite number"),
        ({"sampler": Sampler(Linear(1.0, -1.0))}, "temperature=0.0 at frame 2 of 5"),
        ({"given": torch.zeros(3, 5, 2, 2)}, "5 given frames of frames=5"),
        ({"given": torch.zeros(3, 0, 2, 2)}, "0 given frames of frames=5"),
        ({"given": torch.zeros(3, 1, 2, 3)}, "grid of 2×3, but the transformer's is 2×2"),
        ({"given": torch.zeros(2, 1, 2, 2)}, "given for 2 videos, but there are 3 texts"),
        ({"given": torch.full((3, 1, 2, 2), 16)}, r"token 16 is outside the vocabulary \(0 to 15\)"),
        ({"given": torch.full((3, 1, 2, 2), -1)}, r"token -1 is outside the vocabulary \(0 to 15\)"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(transformer, changes, message):
    if "given" in changes:
        changes = {"given": changes["given"].long()}
    arguments = {"frames": 5, "sampler": Sampler(), "seeds": [1, 2, 3], **changes}
    with pytest.raises(UserError, match=message):
        generate_frames(transformer, texts(), **arguments)
