"""The design of VideoGPT that ours is compared with: its tokens cover several frames."""

import pytest
import torch

from t2v.errors import UserError
from tests.benchmarks.baselines import VideoGPTQuantizer, VideoGPTTokenizer


@pytest.fixture
def model() -> VideoGPTTokenizer:
    return VideoGPTTokenizer(image_size=16, width=8, res_layers=1, quantizer=VideoGPTQuantizer(32, 4))


def test_a_token_covers_four_frames(model):
    video = torch.rand(2, 8, 3, 16, 16) * 2 - 1
    assert model(video).reconstruction.shape == video.shape  # initializes the codebook
    model.eval()
    tokens = model.encode(video)
    assert tokens.shape == (2, 2, 4, 4)
    assert torch.equal(tokens, model(video).indices)
    torch.testing.assert_close(model.decode(tokens), model(video).reconstruction.clamp(-1, 1))


def test_a_clip_that_does_not_divide_into_tokens_is_refused(model):
    with pytest.raises(UserError, match="6 frames does not divide into tokens of 4 frames"):
        model.encode(torch.zeros(1, 6, 3, 16, 16))
