"""Sums, angles and norms keep their precision whatever autocast or the default type is."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer

from callbacks import EMA, NaNGuard
from callbacks.guard import _Batch
from t2v.generation.quantization import convert
from t2v.losses.tokens import token_loss_
from t2v.metrics import CodebookUsage
from t2v.training.lightning_private import average_of
from t2v.transformer.layers import RMSNorm, TextGate
from t2v.transformer.rope import raster_positions, rotation_at
from t2v.vqvae.layers import ChannelNorm, ResBlock, Upsample
from tests.cuda_policy.toys import data_for, lit_transformer, lit_vqvae, trainer, transformer, vqvae
from tests.support.cuda_policy import cuda_autocast


@pytest.fixture
def bf16_true() -> Iterator[None]:
    """The default type of a run with `trainer.precision=bf16-true`."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rms_norm_returns_the_type_of_its_input_under_autocast(dtype):
    x = torch.randn(2, 8, dtype=dtype)
    norm = RMSNorm(8)
    with cuda_autocast(), torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), norm(x.float()), atol=0.02, rtol=0.01)


@torch.compiler.set_stance("force_eager")
@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("weights", ["fp8", "int8", "nf4"])
def test_quantized_layers_return_the_type_of_autocast_for_few_and_for_many_rows(weights, rows):
    """Keys of start frames and of single tokens meet in one cache."""
    model = transformer().eval()
    convert(model, weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.blocks[1].mlp.gate_up(torch.randn(rows, 1, 32)).dtype == torch.bfloat16


@pytest.mark.parametrize("layer", [ChannelNorm(8), Upsample(8), ResBlock(8, 8)], ids=lambda layer: type(layer).__name__)
def test_layers_of_the_vqvae_return_the_type_of_their_input_under_autocast(layer):
    """In float32 the activations of a training step would take twice the memory."""
    with cuda_autocast(), torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 8, 4, 4).bfloat16()).dtype == torch.bfloat16


@pytest.mark.usefixtures("bf16_true")
def test_the_loss_of_many_tokens_is_summed_in_float32():
    logits = torch.randn(65536, 8).bfloat16() * 3
    tokens = torch.randint(8, (65536,))
    terms = token_loss_(logits.clone(), tokens)
    assert {term.dtype for term in terms} == {torch.float32}
    torch.testing.assert_close(terms.cross_entropy, F.cross_entropy(logits.float(), tokens))
    hits = (logits.argmax(-1) == tokens).double().mean().float()
    torch.testing.assert_close(terms.accuracy, hits)


@pytest.mark.usefixtures("bf16_true")
def test_text_gates_tell_the_frames_of_a_long_window_apart():
    gate = TextGate(1, 1, window=300)
    with torch.no_grad():
        gate.hidden.weight.normal_()
        gate.out.weight.normal_()
    frames = torch.arange(300)
    scales = gate(frames).flatten()
    exact = gate.float()(frames).flatten()
    assert (scales.float() - exact).abs().max() < 0.02


@pytest.mark.usefixtures("bf16_true")
def test_rotary_angles_are_float32():
    rotation = rotation_at(raster_positions(0, 4800, 4, 4, torch.device("cpu")), (4, 2, 2), 100.0)
    assert rotation.cos.dtype == rotation.sin.dtype == torch.float32
    assert len(rotation.cos.unique(dim=0)) == 4800


@pytest.mark.parametrize("trained", [True, False], ids=["train", "eval"])
def test_a_vqvae_with_bfloat16_weights_works(trained):
    network = vqvae().bfloat16().train(trained)
    video = torch.rand(2, 3, 3, 16, 16) * 2 - 1
    reconstruction, tokens, loss = network(video.bfloat16())
    assert reconstruction.isfinite().all()
    if trained:
        (reconstruction.float().mean() + loss).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    network.eval()
    tokens = network.encode(video.bfloat16())
    assert tokens.unique().numel() > 1
    whole = network.decode(tokens)
    assert whole.dtype == torch.bfloat16
    first, state = network.decode_stream(tokens[:, :1])
    rest, _ = network.decode_stream(tokens[:, 1:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, atol=0.03, rtol=0.03)


@pytest.mark.usefixtures("bf16_true")
def test_the_perplexity_of_a_codebook_is_exact():
    usage = CodebookUsage(1000)
    usage.update(torch.arange(1000).repeat(3))
    assert usage.compute()["perplexity"].item() == pytest.approx(1000, rel=1e-5)


@pytest.mark.usefixtures("bf16_true")
def test_validation_of_many_batches_is_averaged_in_float32():
    module = lit_transformer().to(torch.bfloat16)  # as Lightning does
    for loss in torch.linspace(3, 4, 1000, dtype=torch.float32):
        module.loss.update(loss, 4096)
        module.accuracy.update(loss / 10, 4096)
    assert module.loss.compute().item() == pytest.approx(3.5, rel=1e-4)
    assert module.accuracy.compute().item() == pytest.approx(0.35, rel=1e-4)


def test_the_norm_of_bfloat16_gradients_is_summed_in_float32():
    parameters = [torch.nn.Parameter(torch.randn(50, 7).bfloat16()) for _ in range(300)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    expected = torch.stack([parameter.grad.double().square().sum() for parameter in parameters]).sum().sqrt().item()
    seen = [_Batch(0, [], torch.tensor(2.0))]
    (norm,), loss = NaNGuard()._measure(Trainer(accelerator="cpu", logger=False), torch.optim.SGD(parameters), seen)
    assert norm == pytest.approx(expected, rel=1e-5)
    assert loss == 2.0


def test_a_moving_average_of_bfloat16_weights_is_float32(tmp_path):
    """In bfloat16 steps of (1 − decay) would round to nothing; a validation in between must not round it either."""
    module, average = lit_vqvae(), EMA(decay=0.99)
    run = trainer("bf16-true", tmp_path, callbacks=[average], logger=False, max_steps=3, val_check_interval=1)
    run.fit(module, data_for(module))
    averaged = list(average_of(average).module.parameters())
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in averaged} == {torch.float32}
    assert any((parameter != parameter.bfloat16()).any() for parameter in averaged)
