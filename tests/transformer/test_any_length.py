"""What training sees is what generation sees, for videos of any length."""

import pytest
import torch

from t2v.generation.decode import generate_frames
from t2v.generation.sampling import Sampler
from t2v.transformer.config import AttentionConfig, TextConfig
from t2v.transformer.decoding import Decoder
from t2v.transformer.layers import TextGate
from tests.support.toys import TEXT_DIM, random_text, random_tokens, toy_transformer

WINDOW = 3


def test_the_gate_is_constant_from_a_full_window_on():
    gate = TextGate(2, 4, window=8)
    torch.nn.init.normal_(gate.out.weight)
    scales = gate(torch.arange(4 * 8))
    assert scales.shape == (2, 32, 4)
    torch.testing.assert_close(scales[:, 7:], scales[:, 7:8].expand(-1, 25, -1), atol=0, rtol=0)
    for frame in range(7):
        assert not torch.allclose(scales[:, frame], scales[:, frame + 1], atol=1e-3)


def test_a_window_of_one_frame_has_one_gate():
    scales = TextGate(1, 2, window=1)(torch.arange(5))
    assert torch.equal(scales, scales[:, :1].expand_as(scales))


@torch.inference_mode()
def test_the_gates_of_a_long_video_are_those_of_a_training_clip():
    model = toy_transformer(WINDOW)
    short, long = (torch.stack(model.gates(torch.arange(frames))) for frames in (WINDOW, 4 * WINDOW))
    torch.testing.assert_close(long[:, :WINDOW], short)
    torch.testing.assert_close(long[:, WINDOW:], short[:, -1:].expand(-1, 3 * WINDOW, -1))
    assert short.std() > 0.05


@torch.inference_mode()
def test_logits_do_not_depend_on_the_frames_that_follow():
    model, tokens, text = toy_transformer(WINDOW), random_tokens(2, 4 * WINDOW), random_text(2)
    torch.testing.assert_close(model(tokens, text)[:, :WINDOW], model(tokens[:, :WINDOW], text))


def test_a_video_begins_in_the_same_way_whatever_its_length():
    model, text = toy_transformer(WINDOW), random_text(2)
    short, long = (
        torch.cat(list(generate_frames(model, text, frames, Sampler(), [1, 2], guidance=2.0)), dim=1)
        for frames in (WINDOW, 4 * WINDOW)
    )
    assert torch.equal(long[:, :WINDOW], short)


@torch.inference_mode()
def decode(model, tokens, text, start_frames: int = 0) -> torch.Tensor:
    """Return the logits of the positions after the start frames, computed one position at a time."""
    decoder, last = Decoder(model, text), None
    if start_frames:
        decoder.prefill(tokens[:, :start_frames])
        last = tokens[:, start_frames - 1, -1, -1]
    logits = []
    for token in tokens[:, start_frames:].flatten(1).unbind(1):
        logits.append(decoder.step(last))
        last = token
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("prefix", [0, 1, 40, pytest.param(1000, marks=pytest.mark.slow)])
@torch.inference_mode()
def test_a_frame_deep_in_a_video_is_predicted_like_the_same_frame_of_a_clip(prefix):
    """Two temporal layers see 2 · (window - 1) earlier frames, and one more for tokens that are inputs of the next."""
    model, text = toy_transformer(WINDOW, spatial_layers=2, temporal_layers=2), random_text()
    clip = random_tokens(1, 4 * WINDOW)
    video = torch.cat([random_tokens(1, prefix), clip], dim=1)
    expected = model(clip, text)[:, -1]
    torch.testing.assert_close(model(video, text)[:, -1], expected, atol=1e-4, rtol=1e-4)
    decoded = decode(model, video, text, start_frames=video.shape[1] - 1)
    torch.testing.assert_close(decoded, expected.flatten(1, 2), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_frame_depends_on_no_frame_far_before_the_window():
    """So no distance in a long video is larger than those in a clip of the window and one more frame."""
    model, text = toy_transformer(WINDOW, spatial_layers=0, temporal_layers=1), random_text()
    tokens = random_tokens(1, 4 * WINDOW)
    logits = model(tokens, text)[:, -1]
    for frame in range(4 * WINDOW):
        changed = tokens.clone()
        changed[:, frame] = (changed[:, frame] + 1) % 24
        differs = not torch.allclose(model(changed, text)[:, -1], logits, atol=1e-6)
        distance = 4 * WINDOW - 1 - frame
        # tokens of the frame before the window reach its first frame as inputs: the previous frame and the last token
        assert differs == (distance <= WINDOW + 1)


@torch.inference_mode()
def test_no_frame_comes_before_the_first_of_a_clip_in_training_and_in_generation():
    """A random window of a video starts without a previous frame, as a video from a prompt alone does."""
    model, tokens, text = toy_transformer(WINDOW), random_tokens(1, 8), random_text()
    calls = []
    model.previous_frame.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].clone()))
    expected = model(tokens[:, 5:6], text).flatten(1, 3)
    assert calls == []
    torch.testing.assert_close(decode(model, tokens[:, 5:6], text), expected, atol=1e-4, rtol=1e-4)
    assert calls == []


@torch.inference_mode()
def test_the_first_frame_after_start_frames_has_the_last_of_them_before_it():
    model, tokens, text = toy_transformer(WINDOW), random_tokens(1, 3), random_text()
    calls = []
    model.previous_frame.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].clone()))
    expected = model(tokens, text).flatten(1, 3)
    assert torch.equal(calls.pop(), tokens[:, :2])
    found = decode(model, tokens, text, start_frames=2)
    torch.testing.assert_close(found, expected[:, 8:], atol=1e-4, rtol=1e-4)
    other = tokens.clone()
    other[:, 1] = (other[:, 1] + 1) % 24
    assert not torch.allclose(decode(model, other, text, start_frames=2), found, atol=1e-2)


@torch.inference_mode()
def test_without_a_gate_every_frame_has_the_same_text_attention():
    model = toy_transformer(text=TextConfig(TEXT_DIM, gate=False), attention=AttentionConfig(4, 2, window=2))
    assert model.gates(torch.arange(9)) == [None] * 4
