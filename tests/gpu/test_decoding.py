"""Decoding with caches gives what the forward pass gives, and how fast it is."""

import time
from functools import partial

import pytest
import torch

from t2v.batch import TextEmbedding
from t2v.generation.decode import generate_frames
from t2v.generation.quantization import convert, stored_bytes
from t2v.generation.sampling import Sampler
from t2v.transformer.config import TextConfig
from t2v.transformer.decoding import Decoder
from t2v.transformer.model import VideoTransformer
from tests.gpu.conftest import time_graph
from tests.support.configs import transformer_arguments
from tests.support.toys import toy_transformer


def text_for(model: VideoTransformer, videos: int, tokens: int = 7) -> TextEmbedding:
    weight = model.start
    options = {"device": weight.device, "dtype": weight.dtype}
    mask = torch.ones(videos, tokens, dtype=torch.bool, device=weight.device)
    return TextEmbedding(torch.randn(videos, tokens, model.text.dim, **options), mask)


@pytest.fixture
def model(device) -> VideoTransformer:
    model = toy_transformer(3, TextConfig(dim=32), vocab_size=64, grid_size=4, dim=128, hidden_dim=256)
    with torch.no_grad():  # weights for which the logits depend on the text and on each other
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    return model.requires_grad_(False).to(device)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_decoding_equals_the_forward_pass(device, record, model, dtype, compiled):
    frames, tolerance = 5, {torch.float32: 5e-3, torch.bfloat16: 0.1}[dtype]
    model = model.to(dtype)
    text = text_for(model, 2)
    tokens = torch.randint(64, (2, frames, 4, 4), device=device)
    with torch.inference_mode():
        expected = model(tokens, text).flatten(1, 3).float()
        decoder = Decoder(model, text, compiled=compiled)
        flat = tokens.flatten(1)
        steps = [decoder.step(None if i == 0 else flat[:, i - 1]) for i in range(flat.shape[1])]
    error = ((torch.stack(steps, 1).float() - expected).abs().max() / expected.std()).item()
    record("decoding equals forward", **{f"{str(dtype)[6:]} {'compiled' if compiled else 'eager'}": error})
    assert error < tolerance


@pytest.mark.parametrize("weights", ["full", "fp8", "int8", "nf4"])
def test_quantized_weights_generate_under_autocast(device, model, weights):
    convert(model, weights)
    with torch.autocast(device.type, torch.bfloat16):
        frames = list(generate_frames(model, text_for(model, 2), 3, Sampler(top_p=0.9), [0, 1], guidance=2.0))
    tokens = torch.cat(frames, 1)
    assert tokens.shape == (2, 3, 4, 4)
    assert tokens.min() >= 0
    assert tokens.max() < 64


def shipped_model(size: str, device: torch.device) -> VideoTransformer:
    """Return the model of a shipped config with random weights in bfloat16."""
    model = VideoTransformer.from_config(transformer_arguments(size)).to(torch.bfloat16).to_empty(device=device)
    model.reset_parameters()
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("size", "weights"),
    [("300m", "full"), ("300m", "int8"), ("300m", "nf4"), ("1b", "full"), ("8b", "full"), ("8b", "fp8")],
)
@pytest.mark.usefixtures("needs_gpu")
def test_speed_of_decoding(device, record, size, weights):
    """Tokens per second of one video, and the share of the memory bandwidth that reading the weights takes."""
    model = shipped_model(size, device)
    convert(model, weights)

    def generate(frames: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        sampler = Sampler(temperature=0.9, top_p=0.95)
        list(generate_frames(model, text_for(model, 1, 16), frames, sampler, [0], compiled=True))
        torch.cuda.synchronize()
        return time.perf_counter() - began

    compiling = generate(1)
    rate = 2 * model.grid_size**2 / generate(2)
    share = rate * stored_bytes(model) / memory_bandwidth(device)
    figures = {"tokens_per_second": rate, "bandwidth": share, "first_frame_seconds": compiling}
    record("decoding speed", **{f"{size} {weights}": figures})


@pytest.mark.parametrize("size", ["300m", "8b"])
@pytest.mark.usefixtures("needs_gpu")
def test_time_of_a_pass_by_its_positions(device, record, size):
    """Milliseconds of an uncompiled pass of one video, as a CUDA graph: "auto" takes 256 positions."""
    model, milliseconds = shipped_model(size, device), {}
    tokens = torch.randint(model.vocab_size, (1, 6 * model.grid_size**2), device=device)
    position = torch.full((1,), 4500, device=device)
    with torch.inference_mode():
        for positions in (1, 4, 16, 64, 256, 512, 1024):
            decoder = Decoder(model, text_for(model, 1, 16), positions=positions)
            seconds, _ = time_graph(partial(decoder.logits, tokens, position, positions), 10)
            milliseconds[positions] = 1000 * seconds
    record("milliseconds of a pass", **{size: milliseconds})


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second that the device copies, reads and writes counted."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        target.copy_(source)
    torch.cuda.synchronize()
    return 20 * 2 * source.numel() / (time.perf_counter() - began)
