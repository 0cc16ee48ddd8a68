"""Optical flow: where the content of a frame was in the frame before; and warping along it.

- The flow of frame t at (x, y) is (u, v) in pixels: what is seen there was at (x + u, y + v) in frame t − 1.
- A pixel is visible where following it back and forth ends near its start, as Ruder et al. define it
  (https://arxiv.org/abs/1604.08610); the others are occluded, at the edge of a motion, or come from outside.
"""

from abc import ABC, abstractmethod
from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from t2v.checkpoints.pretrained import Protocol, load_torchvision
from t2v.errors import UserError

Video = Float[Tensor, "b t c h w"]
Pictures = Float[Tensor, "n c h w"]


class OpticalFlow(nn.Module, ABC):
    """Estimates the motion of footage; it learns nothing and passes no gradient.

    Attributes:
        min_size: shorter side below which frames are enlarged first, in pixels.
        multiple: what height and width must be divisible by, or the frames are resized first.
    """

    min_size = 1
    multiple = 1

    @torch.no_grad()
    def forward(self, video: Video) -> Float[Tensor, "b t-1 2 h w"]:
        """The flow of every frame but the first, in pixels, of RGB frames in [-1, 1]."""
        b, t, _, h, w = video.shape
        if t < 2:
            return video.new_zeros(b, 0, 2, h, w)
        scale = max(1.0, self.min_size / min(h, w))
        height, width = (ceil(side * scale / self.multiple) * self.multiple for side in (h, w))
        pictures = video.flatten(0, 1).float()
        if (height, width) != (h, w):
            pictures = F.interpolate(pictures, (height, width), mode="bilinear")
        clips = pictures.unflatten(0, (b, t))
        flow = self.between(clips[:, 1:].flatten(0, 1), clips[:, :-1].flatten(0, 1))
        if (height, width) != (h, w):
            flow = F.interpolate(flow, (h, w), mode="bilinear")
            flow = flow * flow.new_tensor([w / width, h / height])[:, None, None]
        return flow.unflatten(0, (b, t - 1))

    @abstractmethod
    def between(self, pictures: Pictures, previous: Pictures) -> Float[Tensor, "n 2 h w"]:
        """The flow from pictures back to the ones before them, of a size that the estimator takes."""

    @abstractmethod
    def protocol(self) -> Protocol:
        """What a report must declare about the estimator."""

    def follow(self, video: Video) -> tuple[Float[Tensor, "b t-1 2 h w"], Bool[Tensor, "b t-1 1 h w"]]:
        """The flow of every frame but the first, and where it can be relied on."""
        flow = self(video)
        return flow, visible(flow, self(video.flip(1)).flip(1))


class DISFlow(OpticalFlow):
    """Dense inverse search (https://arxiv.org/abs/1603.03590) by OpenCV: on the CPU, about 1 ms a pair of 128 px."""

    min_size = 32  # OpenCV 5.0 ends the process on some smaller shapes: https://github.com/opencv/opencv/issues/14554
    presets = ("ultrafast", "fast", "medium")
    """OpenCV's names, in the order of its numbers."""

    def __init__(self, preset: str = "medium"):
        """
        Args:
            preset: "ultrafast", "fast" or "medium".
        """
        super().__init__()
        if preset not in self.presets:
            raise UserError(f"preset={preset} is none of {', '.join(self.presets)}.")
        try:
            import cv2
        except ImportError as error:
            raise UserError("DISFlow needs OpenCV, which does not load: pip install 't2v[perceptual]'.") from error
        self.preset, self.opencv = preset, cv2.__version__

    def between(self, pictures: Pictures, previous: Pictures) -> Float[Tensor, "n 2 h w"]:
        import cv2

        estimator = cv2.DISOpticalFlow.create(self.presets.index(self.preset))
        luma = pictures.new_tensor([0.299, 0.587, 0.114])[:, None, None]
        grey = torch.stack([pictures, previous], 1).mul(luma).sum(2)
        grey = ((grey + 1) * 127.5).round().clamp(0, 255).byte().cpu()
        flows = [estimator.calc(a, b, None) for a, b in grey.numpy()]  # type: ignore[call-overload]
        return torch.from_numpy(np.stack(flows)).permute(0, 3, 1, 2).to(pictures.device)

    def protocol(self) -> Protocol:
        return {"flow": "DIS", "preset": self.preset, "opencv": self.opencv, "min_size": self.min_size}


class RAFTFlow(OpticalFlow):
    """RAFT (https://arxiv.org/abs/2003.12039) by torchvision, its weights read from a file."""

    min_size = 128
    multiple = 8
    chunk = 4
    """Pairs estimated at a time; each holds the correlations of all its places with all others."""

    def __init__(self, network: str = "raft_small", weights_path: str | None = None):
        """
        Args:
            network: "raft_small" or "raft_large".
            weights_path: torchvision's weights of it; by default the file in torchvision's cache.
        """
        super().__init__()
        if network not in ("raft_small", "raft_large"):
            raise UserError(f"network={network} is none of raft_small, raft_large.")
        self.network, self._protocol = load_torchvision(network, weights_path)

    def between(self, pictures: Pictures, previous: Pictures) -> Float[Tensor, "n 2 h w"]:
        network = self.network.to(pictures.device)
        pairs = zip(pictures.split(self.chunk), previous.split(self.chunk), strict=True)
        with torch.autocast(pictures.device.type, enabled=False):
            return torch.cat([network(a, b)[-1] for a, b in pairs])

    def protocol(self) -> Protocol:
        return {"flow": "RAFT", **self._protocol, "min_size": self.min_size, "multiple": self.multiple}


def warp(frames: Video, flow: Float[Tensor, "b t 2 h w"]) -> Video:
    """Frames seen along a flow: at (x, y) stands what was at (x + u, y + v), bilinearly; the border goes on outside."""
    b, t, _, h, w = frames.shape
    where = _sources(flow).movedim(2, -1)
    grid = (2 * where + 1) / where.new_tensor([w, h]) - 1  # a pixel is an area, whose centre is at a half
    warped = F.grid_sample(
        frames.flatten(0, 1), grid.flatten(0, 1), mode="bilinear", padding_mode="border", align_corners=False
    )
    return warped.unflatten(0, (b, t))


def visible(backward: Float[Tensor, "b t 2 h w"], forward: Float[Tensor, "b t 2 h w"]) -> Bool[Tensor, "b t 1 h w"]:
    """Where a backward flow can be relied on, by Ruder et al. (https://arxiv.org/abs/1604.08610).

    Args:
        backward: flow of frames to the ones before them.
        forward: flow of those to the frames.
    """
    there = warp(forward, backward)
    strayed = _square(there + backward) > 0.01 * (_square(there) + _square(backward)) + 0.5
    down, right = torch.gradient(backward, dim=(-2, -1))
    at_edge = _square(down) + _square(right) > 0.01 * _square(backward) + 0.002
    x, y = _sources(backward).split(1, dim=2)
    outside = (x < 0) | (x > x.shape[-1] - 1) | (y < 0) | (y > y.shape[-2] - 1)
    return ~(strayed | at_edge | outside)


def _sources(flow: Float[Tensor, "b t 2 h w"]) -> Float[Tensor, "b t 2 h w"]:
    """Where the content of every pixel was, in pixels."""
    h, w = flow.shape[-2:]
    x = torch.arange(w, device=flow.device, dtype=flow.dtype).expand(h, w)
    y = torch.arange(h, device=flow.device, dtype=flow.dtype)[:, None].expand(h, w)
    return flow + torch.stack([x, y])


def _square(vectors: Float[Tensor, "b t 2 h w"]) -> Float[Tensor, "b t 1 h w"]:
    return vectors.square().sum(2, keepdim=True)
