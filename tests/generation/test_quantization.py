"""Quantized weights: rounding, layers, the whole model, errors."""

import copy
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from t2v import TextToVideo
from t2v.batch import TextEmbedding
from t2v.errors import UserError
from t2v.generation import quantization as module
from t2v.generation.quantization import (
    Fp8Linear,
    Int8Linear,
    Nf4Linear,
    QuantizedLinear,
    convert,
    e4m3_to_float,
    stored_bytes,
)
from t2v.torch_private import TorchDispatchMode, makes_new_storage
from t2v.transformer.config import TextConfig
from t2v.transformer.decoding import Decoder
from t2v.transformer.model import VideoTransformer
from tests.support.cuda_policy import fake_cuda, to_fake_cuda
from tests.support.toys import toy_transformer
from tests.support.triton_code import triton_code

KINDS = ("fp8", "int8", "nf4")
ERRORS = {"fp8": 0.07, "int8": 0.02, "nf4": 0.2}
"""Largest relative error of the logits."""


@pytest.fixture(scope="module")
def full() -> VideoTransformer:
    return toy_transformer(2, TextConfig(32), vocab_size=80, dim=64, hidden_dim=96, spatial_layers=1, temporal_layers=1)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def quantized_model(full, kind) -> VideoTransformer:
    model = copy.deepcopy(full)
    convert(model, kind)
    return model


@contextmanager
def forgotten() -> Iterator[None]:
    """Let the code find out anew whether `torch.compile` works, before and after."""
    for each in (module._can_compile, module.compile_error):
        each.cache_clear()
    yield
    for each in (module._can_compile, module.compile_error):
        each.cache_clear()


def texts(batch: int) -> TextEmbedding:
    generator = torch.Generator().manual_seed(1)
    words = torch.randn(batch, 5, 32, generator=generator)
    return TextEmbedding(words, torch.ones(batch, 5, dtype=torch.bool))


def tokens(batch: int) -> torch.Tensor:
    return torch.randint(0, 64, (batch, 3, 2, 2), generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def decode(model: VideoTransformer, batch: int, compiled: bool = False) -> torch.Tensor:
    """Return the logits, computed one position at a time."""
    decoder, last, logits = Decoder(model, texts(batch), compiled=compiled), None, []
    for token in tokens(batch).flatten(1).unbind(1):
        logits.append(decoder.step(last))
        last = token
    return torch.stack(logits, dim=1)


@torch.inference_mode()
def forward(model: VideoTransformer, batch: int) -> torch.Tensor:
    return model(tokens(batch), texts(batch)).flatten(1, 3)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_finite_e4m3_values_equal_torchs():
    stored = torch.arange(-128, 128).to(torch.int8)
    theirs = stored.view(torch.float8_e4m3fn).float()
    assert theirs.isfinite().sum() == 254  # no weight is stored as one of the two others
    assert torch.equal(e4m3_to_float(stored)[theirs.isfinite()], theirs[theirs.isfinite()])


@pytest.mark.parametrize("layer", [Fp8Linear, Int8Linear])
def test_a_weight_is_rounded_by_at_most_half_a_step(layer):
    weight = torch.randn(40, 70) * torch.logspace(-6, 6, 40)[:, None]  # channels of different scales
    weight[3] = 0
    rounded, largest = layer(weight).weight(), weight.abs().amax(1, keepdim=True)
    step = largest / 127 if layer is Int8Linear else torch.maximum(weight.abs() / 8, largest * 2**-9 / 448)
    assert ((rounded - weight).abs() <= step * 0.5001).all()
    torch.testing.assert_close(rounded.abs().amax(1, keepdim=True), largest)


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_rows_is_multiplied_with_the_same_weights(kind, rows, dtype):
    layer = {"fp8": Fp8Linear, "int8": Int8Linear, "nf4": Nf4Linear}[kind](torch.randn(96, 64)).eval()
    x = torch.randn(2, 40, 64)[:, :rows].to(dtype)
    with torch.inference_mode():
        weight = layer(torch.eye(64)).T
        y = layer(x)
    assert y.dtype == dtype
    assert relative(y.float(), x.float() @ weight.T) < 0.01


@pytest.mark.parametrize("layer", [Fp8Linear, Int8Linear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_with_a_converted_weight_is_exact_up_to_the_type(layer, dtype):
    """The values times a row are too large for float16, the product is not."""
    quantized, x = layer(0.01 + 0.1 * torch.rand(96, 2048)), torch.rand(3, 2048) + 1
    y = quantized.multiply_converted(x.to(dtype))
    assert y.dtype == torch.float32
    assert relative(y, x.to(dtype).float() @ quantized.weight().T) < max(2 * torch.finfo(dtype).eps, 1e-5)


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("layer", [Fp8Linear, Int8Linear])
def test_on_gpus_few_rows_are_one_kernel_that_reads_every_byte_of_the_weight_once(layer, rows):
    d_out, d_in = 18432, 4096
    stored, scale, x = (
        torch.empty(*shape, dtype=dtype, device="meta")
        for shape, dtype in (((d_out, d_in), torch.int8), ((d_out,), torch.float32), ((rows, d_in), torch.bfloat16))
    )
    code = triton_code(layer.multiply_rows, stored, scale, x)
    assert code.count("@triton.jit") == 1
    assert re.findall(r"= empty_strided_cuda\(\((\d+), \)", code) == [str(rows * d_out)]  # the result alone
    assert len(re.findall(rf"tl\.load\(in_ptr0 \+ \(r0_1 \+ {d_in}\*x0\)", code)) == code.count("tl.load(in_ptr0") == 1


class WeightCopies(TorchDispatchMode):
    """Records the types of new tensors that have as many elements as the weight of a layer.

    Args:
        model: The quantized model.
    """

    def __init__(self, model: VideoTransformer) -> None:
        super().__init__()
        layers = [part for part in model.modules() if isinstance(part, Fp8Linear | Int8Linear)]
        self.shapes = {shape for part in layers for shape in (part.stored.shape, part.stored.T.shape)}
        self.types: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if makes_new_storage(func) and isinstance(result, torch.Tensor) and result.shape in self.shapes:
            self.types.append(result.dtype)
        return result


@pytest.mark.parametrize("weights", ["fp8", "int8"])
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_on_gpus_without_a_compiler_a_step_makes_one_bfloat16_copy_of_a_weight(full, weights, autocast, monkeypatch):
    def fail(*args, **flags):
        raise RuntimeError("no compiler")

    model = copy.deepcopy(full)
    convert(model, weights)
    if not autocast:
        model.to(torch.bfloat16)
    monkeypatch.setattr(torch, "compile", fail)
    with forgotten(), warnings.catch_warnings(), fake_cuda(), torch.no_grad():
        warnings.simplefilter("ignore")
        to_fake_cuda(model)
        dtype = model.start.dtype
        text = TextEmbedding(
            torch.randn(2, 5, 32, device="cuda", dtype=dtype),
            torch.ones(2, 5, dtype=torch.bool, device="cuda"),
        )
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            decoder = Decoder(model, text)
            with WeightCopies(model) as copies:
                assert decoder.step(None).shape == (2, 80)
    layers = [name for name, part in model.blocks.named_modules() if isinstance(part, QuantizedLinear)]
    in_a_step = [name for name in layers if not name.endswith("text_attention.key_value")]
    assert copies.types == [torch.bfloat16] * len(in_a_step)


@pytest.mark.parametrize("layer", [Fp8Linear, Int8Linear])
def test_scales_stay_in_float32_when_a_layer_is_moved_to_another_type(layer):
    quantized = layer(torch.randn(8, 16))
    scale = quantized.scale
    assert torch.equal(quantized.to(torch.bfloat16).scale, scale)
    assert quantized.to("meta").scale.is_meta


def test_logits_are_close_to_those_of_full_weights(full, quantized_model, kind):
    assert 0 < relative(forward(quantized_model, 2), forward(full, 2)) < ERRORS[kind]


@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_equals_the_full_forward(quantized_model, kind, batch):
    bound = 0.02 if kind == "nf4" else 1e-5  # bitsandbytes computes in bfloat16 on some CPUs
    assert relative(decode(quantized_model, batch), forward(quantized_model, batch)) < bound


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_compiled_decoding_equals_eager(quantized_model, kind):
    assert relative(decode(quantized_model, batch=2, compiled=True), decode(quantized_model, batch=2)) < (
        0.02 if kind == "nf4" else 1e-5
    )


def test_without_a_compiler_results_are_the_same_and_a_warning_is_given(full, monkeypatch):
    def fail(*args, **flags):
        raise RuntimeError("no compiler")

    model = copy.deepcopy(full)
    convert(model, "fp8")
    expected = decode(model, 1)
    monkeypatch.setattr(torch, "compile", lambda *args, **flags: fail)
    with forgotten(), pytest.warns(UserWarning, match="are slow here, since torch.compile fails"):
        slow = decode(model, 1)
    torch.testing.assert_close(slow, expected)


def test_only_the_linear_layers_of_the_blocks_are_quantized(full, quantized_model):
    linear = [name for name, part in full.blocks.named_modules() if isinstance(part, torch.nn.Linear)]
    quantized = [name for name, part in quantized_model.blocks.named_modules() if isinstance(part, QuantizedLinear)]
    assert linear == quantized
    rest = {name: p for name, p in full.named_parameters() if not name.startswith("blocks.") or "norm" in name}
    assert all(torch.equal(quantized_model.get_parameter(name), parameter) for name, parameter in rest.items())
    assert not quantized_model.training
    assert not any(parameter.requires_grad for parameter in quantized_model.parameters())


def test_nf4_keeps_the_first_block_and_the_text_projections_in_int8(full):
    model = copy.deepcopy(full)
    convert(model, "nf4")
    parts = {name: part for name, part in model.blocks.named_modules() if isinstance(part, QuantizedLinear)}
    expected = {name for name in parts if name.startswith("0.") or name.endswith("text_attention.key_value")}
    assert {name for name, part in parts.items() if isinstance(part, Int8Linear)} == expected
    assert {name for name, part in parts.items() if isinstance(part, Nf4Linear)} == parts.keys() - expected


def test_stored_bytes_are_known_on_the_meta_device_too(full, quantized_model, kind):
    linear = {name: part.weight for name, part in full.blocks.named_modules() if isinstance(part, torch.nn.Linear)}
    count = sum(weight.numel() for weight in linear.values())
    least = most = 0
    for name, weight in linear.items():
        half = isinstance(quantized_model.blocks.get_submodule(name), Nf4Linear)
        least += weight.numel() * 17 // 32 if half else weight.numel() + 4 * len(weight)
        most += weight.numel() * 9 // 16 if half else weight.numel() + 4 * len(weight)
    for model in (copy.deepcopy(full), copy.deepcopy(full).to("meta")):
        before = stored_bytes(model)
        assert before == 4 * sum(parameter.numel() for parameter in model.parameters())
        convert(model, kind)
        assert least <= stored_bytes(model) - (before - 4 * count) <= most


def test_training_saving_and_quantizing_again_are_refused(quantized_model, kind, tmp_path):
    with pytest.raises(UserError, match="cannot be trained: load the model with weights=full"):
        quantized_model.train()
    with pytest.raises(UserError, match="are not saved: export the model with weights=full"):
        quantized_model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="quantized already: load it again to have them in int8"):
        convert(quantized_model, "int8")


def test_unknown_weights_and_a_missing_library_are_errors(full, monkeypatch):
    with pytest.raises(UserError, match="weights=fp4 is not known: choose full, fp8, int8, nf4"):
        convert(copy.deepcopy(full), "fp4")
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(UserError, match="weights=nf4 needs bitsandbytes, which cannot be imported"):
        convert(copy.deepcopy(full), "nf4")


@pytest.mark.parametrize("weights", ["full", *KINDS])
@torch.compiler.set_stance("force_eager")
def test_a_model_is_quantized_when_it_is_loaded(trained_pipeline, tmp_path, monkeypatch, weights):
    monkeypatch.chdir(trained_pipeline.folder)  # the tokenizer's path is relative to where training ran
    checkpoint = trained_pipeline.checkpoint("transformer")
    TextToVideo.from_checkpoint(checkpoint).save_pretrained(tmp_path / "model")
    loaded = TextToVideo.from_pretrained(tmp_path / "model", weights=weights)
    again = TextToVideo.from_checkpoint(checkpoint, weights=weights)
    assert any(isinstance(part, QuantizedLinear) for part in loaded.transformer.modules()) == (weights != "full")
    assert torch.equal(loaded.generate("a red circle", seed=2), again.generate("a red circle", seed=2))
    if weights != "full":
        with pytest.raises(UserError, match="are not saved"):
            loaded.save_pretrained(tmp_path / "other")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
