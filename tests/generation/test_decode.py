"""The generation loop: seeds, batches, guidance, start frames."""

import pytest
import torch
from torch import Tensor

from t2v.batch import TextEmbedding
from t2v.errors import UserError
from t2v.generation import Interval, Linear, Sampler, Schedule
from t2v.generation.decode import generate_frames

LENGTHS = (3, 6, 1)
GREEDY = Sampler(top_k=1)


def texts() -> TextEmbedding:
    """Return three texts of different lengths; padding is not zero, to show that it is not read."""
    generator = torch.Generator().manual_seed(5)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    tokens = torch.randn(3, max(LENGTHS), 8, generator=generator)
    return TextEmbedding(tokens, mask)


def single_text(i: int) -> TextEmbedding:
    """Return one of the texts, without padding."""
    text, length = texts(), LENGTHS[i]
    return TextEmbedding(text.tokens[i : i + 1, :length], text.mask[i : i + 1, :length])


def video(*args, **kwargs) -> Tensor:
    return torch.cat(list(generate_frames(*args, **kwargs)), dim=1)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("guidance", "start_frames"), [(1.0, 0), (3.0, 2), (Linear(4.0, 1.0), 0)])
def test_a_video_depends_only_on_its_own_text_seed_and_start_frames(transformer, guidance, start_frames):
    sampler = Sampler(temperature=4.0)  # guidance makes the toy model's probabilities extreme
    generator = torch.Generator().manual_seed(6)
    start = torch.randint(16, (3, start_frames, 2, 2), generator=generator) if start_frames else None
    batch = video(transformer, texts(), 5, sampler, [7, 8, 9], guidance, start)
    assert batch.shape == (3, 5 - start_frames, 2, 2)
    for i in range(3):
        own_start = None if start is None else start[i : i + 1]
        single = video(transformer, single_text(i), 5, sampler, [7 + i], guidance, own_start)
        assert torch.equal(batch[i : i + 1], single)
    reseeded = video(transformer, single_text(i), 5, sampler, [17], guidance, own_start)
    assert not torch.equal(single, reseeded)


def test_text_and_guidance_change_the_video(transformer):
    streams = [
        generate_frames(transformer, single_text(i), 4, Sampler(), [7], guidance)
        for i in (0, 1)
        for guidance in (1.0, 5.0)
    ]
    videos = [torch.cat(list(frames), dim=1) for frames in streams]
    assert all(not torch.equal(a, b) for n, a in enumerate(videos) for b in videos[:n])


def test_a_frame_with_guidance_1_is_unguided(transformer):
    plain = video(transformer, texts(), 6, GREEDY, [0, 0, 0])
    late = video(transformer, texts(), 6, GREEDY, [0, 0, 0], Interval(6.0, 0.6, 1.0))
    assert torch.equal(plain[:, :3], late[:, :3])
    assert not torch.equal(plain[:, 3:], late[:, 3:])


def test_only_guided_frames_are_computed_without_text_too(transformer):
    rows = []
    hook = transformer.norm.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    try:
        video(transformer, texts(), 5, GREEDY, [0, 0, 0], Interval(3.0, 0.5, 0.75))
    finally:
        hook.remove()
    assert rows == 8 * [3] + 8 * [6] + 4 * [3]


def test_with_guidance_0_the_text_has_no_effect(transformer):
    one, other = (video(transformer, single_text(i), 4, GREEDY, [0], guidance=0.0) for i in (0, 1))
    assert torch.equal(one, other)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("guidance", "start_frames"), [(3.0, 1), (1.0, 3), (3.0, 4)])
def test_a_video_continued_from_its_own_first_frames_is_the_same_video(transformer, guidance, start_frames):
    """The window is 2 frames: the start frames fill the caches once, and more than once."""
    full = video(transformer, texts(), 5, GREEDY, [0, 0, 0], guidance)
    rest = video(transformer, texts(), 5, GREEDY, [0, 0, 0], guidance, full[:, :start_frames])
    assert torch.equal(rest, full[:, start_frames:])
    other = video(transformer, texts(), 5, GREEDY, [0, 0, 0], guidance, (full[:, :start_frames] + 1) % 16)
    assert not torch.equal(other, rest)


def test_frames_are_yielded_one_by_one(transformer):
    stream = generate_frames(transformer, texts(), 5_000, Sampler(), [1, 2, 3])
    assert next(stream).shape == next(stream).shape == (3, 1, 2, 2)


def test_schedules_get_the_frame_number_and_the_length(transformer):
    """Of all frames, before the first pass, so that passes over several frames need nothing from the host."""

    class Recorder(Schedule):
        def __init__(self) -> None:
            self.calls: set[tuple[int, int]] = set()

        def __call__(self, frame: int, frames: int) -> float:
            self.calls.add((frame, frames))
            return 1.5

    guidance, temperature = Recorder(), Recorder()
    start = torch.zeros(1, 2, 2, 2, dtype=torch.long)
    stream = generate_frames(transformer, single_text(0), 5, Sampler(temperature), [1], guidance, start)
    assert len(list(stream)) == 3
    assert temperature.calls == guidance.calls == {(frame, 5) for frame in range(5)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 0}, "frames=0 must be at least 1"),
        ({"seeds": [1]}, "1 seeds for 3 texts"),
        ({"guidance": float("nan")}, "guidance=nan must be a finite number"),
        ({"guidance": float("inf")}, "guidance=inf must be a finite number"),
        ({"sampler": Sampler(Linear(1.0, -1.0))}, "temperature=0.0 at frame 2 of 5"),
        ({"start": torch.zeros(3, 5, 2, 2)}, "number of start frames, 5, must be .* less than frames=5"),
        ({"start": torch.zeros(3, 0, 2, 2)}, "number of start frames, 0, must be at least 1"),
        ({"start": torch.zeros(3, 1, 2, 3)}, "grid of 2×3 tokens, but the transformer's is 2×2"),
        ({"start": torch.zeros(2, 1, 2, 2)}, "start frames for 2 videos, but 3 texts"),
        ({"start": torch.full((3, 1, 2, 2), 16)}, r"Token 16 is outside the codebook \(0 to 15\)"),
        ({"start": torch.full((3, 1, 2, 2), -1)}, r"Token -1 is outside the codebook \(0 to 15\)"),
    ],
)
def test_invalid_arguments_are_refused_before_anything_is_generated(transformer, changes, message):
    if "start" in changes:
        changes = {"start": changes["start"].long()}
    arguments = {"frames": 5, "sampler": Sampler(), "seeds": [1, 2, 3], **changes}
    with pytest.raises(UserError, match=message):
        generate_frames(transformer, texts(), **arguments)
