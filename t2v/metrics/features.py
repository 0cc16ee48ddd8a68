"""Networks that see a clip as one vector."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from t2v.checkpoints.pretrained import MobileNet, Protocol, load_torchvision
from t2v.errors import UserError
from t2v.metrics.metric import Video


class ClipFeatures(nn.Module, ABC):
    """Base of the frozen networks that see a clip as one vector.

    Attributes:
        name: what its figures are called after.
        num_features: length of the vector.
    """

    name: str
    num_features: int

    @abstractmethod
    def forward(self, video: Video) -> Float[Tensor, "b d"]:
        """One vector a clip of RGB frames in [-1, 1]."""

    @abstractmethod
    def protocol(self) -> Protocol:
        """What a report must declare about the network."""


class VideoNetworkFeatures(ClipFeatures):
    """The last features of a network of torchvision that was trained to name the actions of Kinetics-400.

    Frames are resized, cropped and normalised as torchvision does for it. Where the network needs more than one
    frame, a clip is brought to the number it needs by taking the nearest frames.
    """

    def __init__(self, network: str = "r3d_18", weights_path: str | None = None):
        """
        Args:
            network: torchvision's name of a video network: r3d_18, mc3_18, r2plus1d_18, s3d, mvit_v2_s, swin3d_t ...
            weights_path: torchvision's weights of it; by default the file in torchvision's cache.
        """
        super().__init__()
        from torchvision.models import get_model_weights, list_models, video

        if network not in list_models(video):
            raise UserError(f"network={network} is none of torchvision's: {', '.join(list_models(video))}.")
        self.network, self._protocol = load_torchvision(network, weights_path)
        self.name = network
        head = next(name for name in ("fc", "head", "classifier") if hasattr(self.network, name))
        classifier = [layer for layer in getattr(self.network, head).modules() if hasattr(layer, "weight")][-1]
        self.num_features = classifier.weight.shape[1]
        setattr(self.network, head, nn.Identity())
        published = get_model_weights(network)["DEFAULT"]
        self.transform = published.transforms()
        least = published.meta.get("min_temporal_size", 1)
        self.frames: int | None = least if least > 1 else None

    def forward(self, video: Video) -> Float[Tensor, "b d"]:
        if self.frames is not None:
            times = torch.linspace(0, video.shape[1] - 1, self.frames, device=video.device)
            video = video[:, times.round().long()]
        clips = self.transform(((video.float() + 1) / 2).contiguous())
        return self.network.to(video.device)(clips)

    def protocol(self) -> Protocol:
        sizes = {"resize": self.transform.resize_size, "crop": self.transform.crop_size, "frames": self.frames}
        return {**self._protocol, **sizes}


class MobileNetClipFeatures(ClipFeatures):
    """What a MobileNetV2 trained on ImageNet sees in a clip, for want of a video network's weights.

    The features of a shallow depth are averaged over each frame; their mean over time stands for how the clip looks,
    their mean absolute change from frame to frame for how it moves. 64 numbers, so that some tens of clips can say
    something about their spread.
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
        steps = frames.diff(dim=1).abs().sum(1) / max(video.shape[1] - 1, 1)
        return torch.cat([frames.mean(1), steps], 1)

    def protocol(self) -> Protocol:
        return self.network.protocol()
