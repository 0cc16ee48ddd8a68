"""Loading an exported model: types, devices, memory."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from t2v import TextToVideo
from t2v.errors import UserError
from t2v.generation.devices import find_device
from t2v.generation.quantization import Int8Linear
from t2v.transformer.config import TextConfig
from tests.support.loading import peak_of_loading
from tests.support.toys import WordEncoder, toy_transformer

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@pytest.fixture
def folder(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def types(*models: nn.Module) -> set[torch.dtype]:
    """Return the types of all floating-point weights and buffers."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", BFLOAT16), (BFLOAT16, BFLOAT16), ("float32", FLOAT32)])
def test_models_and_text_encoder_have_the_type_asked_for(model, folder, dtype, expected):
    loaded = TextToVideo.from_pretrained(folder, dtype=dtype, device="cpu")
    assert types(loaded.transformer, loaded.vqvae) == {loaded.text_encoder.dtype} == {expected}
    for ours, theirs in ((loaded.transformer, model.transformer), (loaded.vqvae, model.vqvae)):
        expected_state = theirs.state_dict()
        assert ours.state_dict().keys() == expected_state.keys()
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, expected_state[name].to(tensor.dtype))
            assert tensor.stride() == expected_state[name].stride()  # channels last, where the model has it
    assert loaded.generate("a red circle").shape == (1, 5, 3, 16, 16)


@pytest.mark.parametrize(
    ("units", "instructions", "expected"),
    [({}, "AVX2", FLOAT32), ({"avx512_bf16": True}, "AVX2", FLOAT32), ({"avx512_bf16": True}, "AVX512", BFLOAT16)],
    ids=["no units", "units that ATEN_CPU_CAPABILITY turns off", "units"],
)
def test_auto_is_the_stored_type_but_float32_on_cpus_without_bfloat16_units(
    transformer, vqvae, tmp_path, monkeypatch, units, instructions, expected
):
    TextToVideo(copy.deepcopy(transformer).bfloat16(), vqvae, WordEncoder(), 8.0).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    loaded = TextToVideo.from_pretrained(tmp_path / "model", device="cpu")
    assert types(loaded.transformer) == {loaded.text_encoder.dtype} == {expected}
    assert types(loaded.vqvae) == {FLOAT32}


@torch.compiler.set_stance("force_eager")
def test_the_scales_of_quantized_weights_stay_in_float32(model, folder):
    loaded = TextToVideo.from_pretrained(folder, "int8", dtype="bfloat16", device="cpu")
    layers = [part for part in loaded.transformer.modules() if isinstance(part, Int8Linear)]
    originals = [part for part in model.transformer.blocks.modules() if isinstance(part, nn.Linear)]
    for layer, original in zip(layers, originals, strict=True):
        assert torch.equal(layer.scale, Int8Linear(original.weight.detach()).scale)
    assert {parameter.dtype for parameter in loaded.transformer.parameters()} == {BFLOAT16}
    assert loaded.generate("a red circle", frames=1).shape == (1, 1, 3, 16, 16)


@pytest.mark.parametrize("weights", ["full", "int8"])
def test_everything_is_loaded_on_the_device(folder, weights):
    loaded = TextToVideo.from_pretrained(folder, weights, device="meta", text_device="cpu")
    tensors = [each for part in (loaded.transformer, loaded.vqvae) for each in (*part.parameters(), *part.buffers())]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert loaded.text_encoder.device.type == "cpu"


def test_the_default_device_is_the_first_gpu_or_else_the_cpu(monkeypatch):
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert find_device(None).type == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int7"}, "dtype=int7 is not known: choose auto, float32 or bfloat16"),
        ({"dtype": torch.float16}, "dtype=float16 is not known"),
        ({"device": "abacus"}, r"^device=abacus cannot be used \(.*\): give cpu, or leave device out"),
        ({"text_device": "abacus"}, r"^text_device=abacus cannot be used"),
    ],
)
def test_unknown_values_are_refused(folder, options, message):
    with pytest.raises(UserError, match=message) as refused:
        TextToVideo.from_pretrained(folder, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' record of peak memory")
def test_a_model_is_converted_without_a_copy_of_all_weights(vqvae, tmp_path):
    """In bfloat16 the weights take half of the file; with all of them in float32 the peak is one and a half."""
    transformer = toy_transformer(text=TextConfig(8), vocab_size=16, dim=512, hidden_dim=4096, spatial_layers=4)
    TextToVideo(transformer, vqvae, WordEncoder(), 8.0).save_pretrained(tmp_path / "model")
    size = (tmp_path / "model/transformer/model.safetensors").stat().st_size
    assert size > 1e8
    assert 0.5 * size < peak_of_loading(tmp_path / "model", "bfloat16") < 0.8 * size
