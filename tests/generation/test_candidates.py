"""The best of several candidates: scores, and which candidate is kept."""

import pytest
import torch

from t2v.batch import TextEmbedding
from t2v.errors import UserError
from t2v.generation import Interval, Linear, Sampler
from t2v.generation.candidates import candidate_seeds
from t2v.generation.decode import generate_frames
from t2v.generation.schedules import value_at
from t2v.generation.settings import GenerationSettings
from tests.support.toys import TEXT_DIM, VOCABULARY, toy_transformer

PROMPTS = ["a red circle", "one large blue square moves"]
FRAMES = 5


def texts(videos: int) -> TextEmbedding:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(videos, 3, TEXT_DIM, generator=generator)
    return TextEmbedding(tokens, torch.ones(videos, 3, dtype=torch.bool))


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("parallel", [1, 3, "auto"])
@pytest.mark.parametrize("guidance", [2.5, Interval(1.8, 0.0, 0.5), Linear(3.0, 1.0)])
@pytest.mark.parametrize("start_frames", [0, 2])
def test_scores_are_the_guided_likelihoods_of_the_whole_forward(parallel, guidance, start_frames):
    model, text, seeds = toy_transformer(), texts(3), [5, 6, 7]
    start = torch.randint(VOCABULARY, (3, start_frames, 2, 2)) if start_frames else None
    stream = generate_frames(
        model, text, FRAMES, Sampler(top_p=0.9), seeds, guidance, start, parallel=parallel, scored=True
    )
    new = torch.cat(list(stream), dim=1)
    tokens = new if start is None else torch.cat([start, new], dim=1)
    with torch.inference_mode():
        with_text, without = (
            model(tokens, text, torch.tensor([drop] * 3))
            .log_softmax(-1)
            .gather(-1, tokens[..., None])[..., 0]
            .sum((2, 3))
            for drop in (False, True)
        )
    scale = torch.tensor([value_at(guidance, frame, FRAMES) for frame in range(FRAMES)])
    expected = (with_text + (scale - 1) * (with_text - without))[:, start_frames:].sum(1)
    torch.testing.assert_close(stream.scores, expected.double(), atol=1e-3, rtol=1e-4)


def test_the_candidate_with_the_largest_score_is_kept(model):
    seeds = candidate_seeds([3, 4], 4)
    alone = [model.stream(PROMPTS[i // 4], seed=seed, guidance=2.0) for i, seed in enumerate(seeds)]
    text = model.embed(PROMPTS)
    repeated = TextEmbedding(*(each.repeat_interleave(4, 0) for each in text))
    scored = generate_frames(model.transformer, repeated, model.frames, model.sampler, seeds, 2.0, scored=True)
    list(scored)
    best = scored.scores.view(2, 4).argmax(1)
    assert best.any()  # else nothing would be tested
    found = model.generate(PROMPTS, seed=3, guidance=2.0, candidates=4)
    for number in range(2):
        expected = torch.cat(list(alone[4 * number + int(best[number])]), dim=1)
        assert torch.equal(found[number], expected[0])


def test_a_video_does_not_depend_on_the_others_of_its_batch(model):
    together = model.generate(PROMPTS, seed=[8, 9], guidance=2.0, candidates=3)
    assert torch.equal(together[1:], model.generate(PROMPTS[1], seed=9, guidance=2.0, candidates=3))


def test_start_frames_and_negative_prompts_are_those_of_each_video(model):
    size = model.vqvae.image_size
    start = torch.randint(256, (2, 1, 3, size, size), dtype=torch.uint8)
    options = {"guidance": 2.0, "candidates": 3}
    both = model.generate(PROMPTS, seed=[8, 9], start=start, negative_prompt=["", "a green line"], **options)
    one = model.generate(PROMPTS[1], seed=9, start=start[1:], negative_prompt="a green line", **options)
    assert torch.equal(both[1:], one)


def test_the_models_own_number_of_candidates_holds_if_there_is_guidance(model):
    guided, unguided = model.generate(PROMPTS, guidance=2.0, candidates=3), model.generate(PROMPTS)
    model.candidates = 3
    assert torch.equal(model.generate(PROMPTS, guidance=2.0), guided)
    assert not torch.equal(model.generate(PROMPTS, guidance=2.0, candidates=1), guided)
    assert torch.equal(model.generate(PROMPTS), unguided)


def test_the_seeds_of_candidates_differ_and_the_first_is_the_videos_own():
    seeds = candidate_seeds(range(100), 5)
    assert len(set(seeds)) == 500
    assert seeds[::5] == list(range(100))


@pytest.mark.parametrize(("candidates", "guidance", "message"), [(0, 2.0, "at least 1"), (4, 1.0, "needs guidance")])
def test_candidates_out_of_range_or_without_guidance_are_refused(candidates, guidance, message, model):
    with pytest.raises(UserError, match=f"candidates={candidates} .*{message}"):
        model.stream(PROMPTS, guidance=guidance, candidates=candidates)
    with pytest.raises(UserError, match=f"generation.candidates={candidates} .*{message}"):
        GenerationSettings(Sampler(), frames=4, guidance=guidance, candidates=candidates)


def test_other_mistakes_are_named_by_the_numbers_of_prompts(model):
    with pytest.raises(UserError, match="There are 3 seeds for 2 texts"):
        model.stream(PROMPTS, seed=[1, 2, 3], guidance=2.0, candidates=2)
