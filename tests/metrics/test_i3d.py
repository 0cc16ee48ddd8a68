"""I3D: the logits of the published network, under every precision."""

import numpy as np
import pytest
import torch

from t2v.errors import UserError
from t2v.metrics import I3D

# What the published TensorFlow network gives for the input below, in order of the classes.
PUBLISHED = {0: 0.66921, 1: 4.47722, 57: 2.39272, 200: -0.72003, 399: -2.76162, 233: 5.81695}


@pytest.fixture(scope="module")
def network() -> I3D:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return I3D()
    finally:
        torch.set_default_dtype(before)


def test_the_logits_are_those_of_the_published_network(network):
    video = np.random.RandomState(0).rand(1, 16, 224, 224, 3) * 2 - 1
    clip = torch.from_numpy(video.astype("float32")).permute(0, 1, 4, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(clip)
    assert logits.shape == (1, network.num_features)
    assert logits.dtype == torch.float32
    expected = torch.tensor(list(PUBLISHED.values()))
    torch.testing.assert_close(logits[0, list(PUBLISHED)], expected, rtol=0, atol=1e-4)


def test_a_longer_clip_is_cut_and_a_shorter_one_refused(network):
    video = torch.rand(1, 12, 3, 20, 30, dtype=torch.float64) * 2 - 1
    nine = I3D(frames=9)
    pooled = nine.pool(video)
    assert pooled.shape == (1, nine.pooled_features)
    torch.testing.assert_close(nine.logits(pooled[..., None, None, None]).flatten(1), nine(video[:, :9]))
    with pytest.raises(UserError, match=r"at least 16 frames, but these have 12: set data.frames"):
        network(video)
    with pytest.raises(UserError, match="frames=8 is too few"):
        I3D(frames=8)


def test_the_protocol_names_the_network_and_how_clips_are_resized(network):
    protocol = network.protocol()
    assert len(protocol["sha256"]) == 64
    assert protocol["frames"] == 16
    assert protocol["resize"].startswith("bilinear to 224×224")
    assert not any(parameter.requires_grad for parameter in network.parameters())
