"""Frozen networks that map a clip to one vector."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from t2v.batch import Video
from t2v.checkpoints.pretrained import MobileNet, Protocol, load_torchvision
from t2v.errors import UserError


class ClipFeatures(nn.Module, ABC):
    """Base of the frozen networks that map a clip to one vector.

    Attributes:
        name: Name in logs.
        num_features: Width of the vector.
    """

    name: str
    num_features: int

    @abstractmethod
    def forward(self, video: Video) -> Float[Tensor, "b d"]:
        """Return one vector for each clip of RGB frames in [-1, 1]."""

    @abstractmethod
    def protocol(self) -> Protocol:
        """Return what a report must state about the network."""


class VideoNetworkFeatures(ClipFeatures):
    """Last features of a torchvision network that was trained to classify the actions of Kinetics-400.

    Frames are resized, cropped and normalized as torchvision does for the network. If it needs a certain number of
    frames, the nearest frames of the clip are taken.

    Args:
        network: torchvision's name of a video network: r3d_18, mc3_18, r2plus1d_18, s3d, mvit_v2_s, swin3d_t …
        weights_path: File with the weights; by default the file in torchvision's cache.

    Raises:
        UserError: If the network is unknown, or its file is missing, damaged or of another network.
    """

    def __init__(self, network: str = "r3d_18", weights_path: str | None = None) -> None:
        super().__init__()
        from torchvision.models import get_model_weights, list_models, video

        if network not in list_models(video):
            raise UserError(f"network={network} must be one of torchvision's: {', '.join(list_models(video))}.")
        self.network, self._protocol = load_torchvision(network, weights_path)
        self.name = network
        head = next(name for name in ("fc", "head", "classifier") if hasattr(self.network, name))
        classifier = [layer for layer in getattr(self.network, head).modules() if hasattr(layer, "weight")][-1]
        self.num_features = classifier.weight.shape[1]
        setattr(self.network, head, nn.Identity())
        published = get_model_weights(network)["DEFAULT"]
        self.transform = published.transforms()
        min_frames = published.meta.get("min_temporal_size", 1)
        self.frames: int | None = min_frames if min_frames > 1 else None

    def forward(self, video: Video) -> Float[Tensor, "b d"]:
        if self.frames is not None:
            times = torch.linspace(0, video.shape[1] - 1, self.frames, device=video.device)
            video = video[:, times.round().long()]
        clips = self.transform(((video.float() + 1) / 2).contiguous())
        features: Tensor = self.network.to(video.device)(clips)
        return features

    def protocol(self) -> Protocol:
        sizes = {"resize": self.transform.resize_size, "crop": self.transform.crop_size, "frames": self.frames}
        return {**self._protocol, **sizes}


class MobileNetClipFeatures(ClipFeatures):
    """Features of a clip from a MobileNetV2 trained on ImageNet, an alternative that needs no video network.

    The features of an early stage are averaged over each frame. Their mean over time describes appearance, their mean
    absolute change from frame to frame describes motion. 64 features, so that some tens of clips are enough to estimate
    their covariance.
    """

    name = "mobilenet"
    num_features = 64
    depth = 6
    """Stage of the network: 32 channels at 1/8 of the size."""

    def __init__(self) -> None:
        super().__init__()
        self.network = MobileNet([self.depth])

    def forward(self, video: Video) -> Float[Tensor, "b d"]:
        (maps,) = self.network.to(video.device)(video.flatten(0, 1).float())
        frames = maps.mean((2, 3)).unflatten(0, video.shape[:2])
        changes = frames.diff(dim=1).abs().sum(1) / max(video.shape[1] - 1, 1)
        return torch.cat([frames.mean(1), changes], 1)

    def protocol(self) -> Protocol:
        return {**self.network.protocol(), "frames": "all"}
