"""The VQ-VAE: shapes, causality, streaming, and saving the codebook."""

import copy
import json

import pytest
import torch

from t2v.errors import UserError
from t2v.vqvae.model import VQVAE, to_model_range, to_uint8
from t2v.vqvae.quantizer import FSQuantizer, LFQuantizer, VectorQuantizer
from tests.support.toys import toy_vqvae


def tiny(**changes) -> VQVAE:
    torch.manual_seed(0)
    return toy_vqvae(**{"temporal_blocks": 2, **changes})


def trained(model: VQVAE) -> VQVAE:
    """Initialize the codebook in one training pass, and the temporal weights at random instead of zero."""
    for block in model.temporal:
        torch.nn.init.normal_(block.conv.weight, std=0.1)
    model.train()(torch.rand(4, 4, 3, 16, 16) * 2 - 1)
    return model.eval()


@pytest.mark.parametrize(
    ("batch", "frames", "height", "width"), [(2, 1, 16, 16), (1, 3, 24, 16), (1, 1, 8, 8), (3, 5, 8, 40)]
)
def test_sizes_that_are_multiples_of_the_stride_are_encoded_and_decoded(batch, frames, height, width):
    model = trained(tiny())
    tokens = model.encode(torch.rand(batch, frames, 3, height, width))
    assert tokens.shape == (batch, frames, height // 8, width // 8)
    assert model.decode(tokens).shape == (batch, frames, 3, height, width)


def test_other_sizes_are_refused():
    with pytest.raises(UserError, match=r"20×16 .* multiple of 8"):
        tiny().encode(torch.rand(1, 1, 3, 20, 16))
    with pytest.raises(UserError, match="image_size=20 is not a multiple of 8"):
        tiny(image_size=20)


def test_a_token_outside_the_codebook_is_refused():
    with pytest.raises(UserError, match="Token 32 is outside"):
        tiny().decode(torch.full((1, 1, 2, 2), 32))


def test_frames_are_encoded_independently():
    model, video = trained(tiny()), torch.rand(1, 4, 3, 16, 16)
    one_by_one = torch.cat([model.encode(video[:, t : t + 1]) for t in range(4)], dim=1)
    assert torch.equal(model.encode(video), one_by_one)


def test_decoding_is_causal_in_time():
    model = trained(tiny())
    tokens = torch.randint(0, 32, (1, 5, 2, 2))
    changed = tokens.clone()
    changed[:, 3:] = (changed[:, 3:] + 1) % 32
    before, after = model.decode(tokens), model.decode(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 3], after[:, 3])


def test_later_frames_depend_on_earlier_frames():
    model = trained(tiny())
    tokens = torch.randint(0, 32, (1, 3, 2, 2))
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 32
    assert not torch.equal(model.decode(tokens)[:, 2], model.decode(changed)[:, 2])


@pytest.mark.parametrize("pieces", [[1] * 7, [3, 1, 3], [5, 2]])
def test_decoding_in_pieces_equals_decoding_at_once(pieces):
    model = trained(tiny())
    tokens = torch.randint(0, 32, (2, 7, 2, 2))
    state, parts = None, []
    for piece in tokens.split(pieces, dim=1):
        video, state = model.decode_stream(piece, state)
        parts.append(video)
    torch.testing.assert_close(torch.cat(parts, dim=1), model.decode(tokens), atol=1e-5, rtol=0)


def test_a_loaded_codebook_trains_as_the_saved_one_does():
    """Its state includes that it is initialized; otherwise the first step after a resume would run k-means again."""
    model = trained(tiny())
    loaded = tiny()
    loaded.load_state_dict(copy.deepcopy(model.state_dict()))
    video = torch.rand(4, 2, 3, 16, 16)
    for network in (model, loaded):
        torch.manual_seed(1)
        network.train()(video)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


def test_the_codebook_is_loaded_as_it_is_in_every_type(tmp_path):
    model = trained(tiny()).eval()
    model.save_pretrained(tmp_path)
    loaded = VQVAE.from_pretrained(tmp_path, dtype=torch.bfloat16)
    converted = VQVAE.from_pretrained(tmp_path).to(torch.bfloat16)
    for name, value in converted.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
        assert value.dtype == loaded.state_dict()[name].dtype
    assert torch.equal(loaded.quantizer.codes, model.quantizer.codes)


def test_evaluation_does_not_change_the_codebook():
    model = trained(tiny())
    before = model.fingerprint()
    model(torch.rand(2, 2, 3, 16, 16))
    assert model.fingerprint() == before


def test_the_fingerprint_differs_between_weights():
    model, other = tiny(), tiny()
    assert model.fingerprint() == other.fingerprint()
    with torch.no_grad():
        next(other.decoder.parameters()).add_(1e-3)
    assert model.fingerprint() != other.fingerprint()


def test_uint8_pixels_survive_conversion_to_floats_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_model_range(pixels)), pixels)


def test_a_picture_is_a_clip_of_one_frame():
    model = trained(tiny())
    tokens = model.encode(torch.rand(1, 1, 3, 16, 16))
    picture = model.decode(tokens)
    assert picture.shape == (1, 1, 3, 16, 16)
    torch.testing.assert_close(model.decode(tokens.repeat(1, 3, 1, 1))[:, :1], picture, atol=1e-5, rtol=0)


@pytest.mark.parametrize("frames_at_once", [1, 2, 100])
def test_groups_of_frames_change_neither_tokens_nor_gradients(frames_at_once):
    video = torch.rand(2, 3, 3, 16, 16) * 2 - 1
    gradients = []
    for model in (trained(tiny()), trained(tiny(frames_at_once=frames_at_once))):
        tokens = model.encode(video)
        model.train()
        torch.manual_seed(1)
        (model(video).reconstruction - video).abs().mean().backward()
        gradients.append([tokens, *(parameter.grad for parameter in model.parameters())])
    for expected, grouped in zip(*gradients, strict=True):
        torch.testing.assert_close(expected, grouped, atol=1e-5, rtol=1e-4)


def test_groups_of_frames_keep_fewer_activations():
    kept = {}
    for frames_at_once in (None, 1):
        model = tiny(frames_at_once=frames_at_once).train()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x):
            model(torch.rand(1, 8, 3, 16, 16), quantize=False)
        kept[frames_at_once] = sum(sizes)
    assert kept[1] < kept[None] / 4


def test_bfloat16_changes_few_tokens():
    model, video = trained(tiny()), torch.rand(2, 3, 3, 16, 16) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.encode(video)
        decoded = model.decode(tokens)
    assert (tokens == model.encode(video)).float().mean() > 0.8
    torch.testing.assert_close(decoded.float(), model.decode(tokens), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("quantizer", [VectorQuantizer(32, 4), FSQuantizer([4, 4, 4]), LFQuantizer(32)])
def test_an_exported_folder_restores_the_model(tmp_path, quantizer):
    model = trained(tiny(quantizer=quantizer))
    model.save_pretrained(tmp_path)
    loaded = VQVAE.from_pretrained(tmp_path)
    assert loaded.fingerprint() == model.fingerprint()
    assert not loaded.training
    tokens = torch.randint(0, 32, (1, 2, 2, 2))
    assert torch.equal(loaded.decode(tokens), model.decode(tokens))


def test_an_exported_folder_with_other_or_missing_weights_is_refused(tmp_path):
    trained(tiny()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "decoder_blocks": 2}))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*decoder"):
        VQVAE.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights of a VQVAE"):
        VQVAE.from_pretrained(tmp_path)


def test_the_full_size_has_256_tokens_per_frame():
    with torch.device("meta"):
        for image_size, latent_patch_size in ((512, 4), (256, 2), (128, 1)):
            model = VQVAE(image_size, latent_patch_size=latent_patch_size)
            video = torch.empty(1, 1, 3, image_size, image_size)
            output = model(video, quantize=False)
            assert (model.grid_size, model.codebook_size) == (16, 16384)
            assert output.reconstruction.shape == video.shape
