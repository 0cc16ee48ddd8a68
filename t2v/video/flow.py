"""Optical flow, from each frame to the one before it, and warping by it.

- The flow of frame t at (x, y) is (u, v) in pixels: the content seen there was at (x + u, y + v) in frame t − 1.
- A pixel is visible if following it backward and forward ends near its start, as defined by Ruder et al.
  (https://arxiv.org/abs/1604.08610). The others are occluded, at a motion boundary, or come from outside the frame.
"""

from abc import ABC, abstractmethod
from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from t2v.batch import Video
from t2v.checkpoints.pretrained import Protocol, load_torchvision
from t2v.errors import UserError

Pictures = Float[Tensor, "n c height width"]
PictureFlow = Float[Tensor, "n 2 height width"]
Flow = Float[Tensor, "b t 2 height width"]
Mask = Bool[Tensor, "b t 1 height width"]


class OpticalFlow(nn.Module, ABC):
    """Estimates the motion of a video; it is not trained and passes no gradient.

    Attributes:
        min_size: Frames with a shorter side below this number of pixels are enlarged first.
        multiple: Frames are resized first if height or width is not a multiple of this number of pixels.
    """

    min_size = 1
    multiple = 1

    @torch.no_grad()
    def forward(self, video: Video) -> Float[Tensor, "b t-1 2 height width"]:
        """Return the flow of every frame but the first, in pixels, for RGB frames in [-1, 1]."""
        b, t, _, height, width = video.shape
        if t < 2:
            return video.new_zeros(b, 0, 2, height, width)
        scale = max(1.0, self.min_size / min(height, width))
        size = tuple(ceil(side * scale / self.multiple) * self.multiple for side in (height, width))
        pictures = video.flatten(0, 1).float()
        if size != (height, width):
            pictures = F.interpolate(pictures, size, mode="bilinear")
        clips = rearrange(pictures, "(b t) c h w -> b t c h w", b=b)
        flow = self.estimate(clips[:, 1:].flatten(0, 1), clips[:, :-1].flatten(0, 1))
        if size != (height, width):
            flow = F.interpolate(flow, (height, width), mode="bilinear")
            flow = flow * flow.new_tensor([width / size[1], height / size[0]])[:, None, None]
        return rearrange(flow, "(b t) xy h w -> b t xy h w", b=b)

    @abstractmethod
    def estimate(self, pictures: Pictures, previous: Pictures) -> PictureFlow:
        """Return the flow from pictures to the previous ones; their size fits `min_size` and `multiple`."""

    @abstractmethod
    def protocol(self) -> Protocol:
        """Return what a report must state about the estimator."""

    def flow_and_visibility(
        self, video: Video
    ) -> tuple[Float[Tensor, "b t-1 2 height width"], Bool[Tensor, "b t-1 1 height width"]]:
        """Return the flow of every frame but the first, and which pixels are visible in the previous frame."""
        flow = self(video)
        return flow, visible(flow, self(video.flip(1)).flip(1))


class DISFlow(OpticalFlow):
    """Dense inverse search (https://arxiv.org/abs/1603.03590) from OpenCV: on the CPU, about 1 ms per pair of 128 px.

    Args:
        preset: "ultrafast", "fast" or "medium".

    Raises:
        UserError: If the preset is unknown or OpenCV is not installed.
    """

    min_size = 32  # OpenCV 5.0 crashes with some smaller shapes: https://github.com/opencv/opencv/issues/14554
    presets = ("ultrafast", "fast", "medium")
    """Names of OpenCV's presets 0, 1 and 2."""

    def __init__(self, preset: str = "medium") -> None:
        super().__init__()
        if preset not in self.presets:
            raise UserError(f"preset={preset} must be one of {', '.join(self.presets)}.")
        try:
            import cv2
        except ImportError as error:
            raise UserError(
                'DISFlow needs OpenCV, which cannot be imported: pip install -e ".[perceptual]".'
            ) from error
        self.preset, self.opencv = preset, cv2.__version__

    def estimate(self, pictures: Pictures, previous: Pictures) -> PictureFlow:
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
    """RAFT (https://arxiv.org/abs/2003.12039) from torchvision; its weights are read from a file.

    Args:
        network: "raft_small" or "raft_large".
        weights_path: File with the weights; by default the file in torchvision's cache.

    Raises:
        UserError: If the network is unknown, or its file is missing, damaged or of another network.
    """

    min_size = 128
    multiple = 8
    chunk = 4
    """Pairs of pictures per forward pass; for each, correlations between all pairs of positions are in memory."""

    def __init__(self, network: str = "raft_small", weights_path: str | None = None) -> None:
        super().__init__()
        if network not in ("raft_small", "raft_large"):
            raise UserError(f"network={network} must be raft_small or raft_large.")
        self.network, self._protocol = load_torchvision(network, weights_path)

    def estimate(self, pictures: Pictures, previous: Pictures) -> PictureFlow:
        network = self.network.to(pictures.device)
        pairs = zip(pictures.split(self.chunk), previous.split(self.chunk), strict=True)
        with torch.autocast(pictures.device.type, enabled=False):
            return torch.cat([network(a, b)[-1] for a, b in pairs])

    def protocol(self) -> Protocol:
        return {"flow": "RAFT", **self._protocol, "min_size": self.min_size, "multiple": self.multiple}


def warp(frames: Video, flow: Flow) -> Video:
    """Sample frames along a flow: the result at (x, y) is the frame at (x + u, y + v), by bilinear interpolation.

    Outside the frame, the nearest border pixel is used.

    Args:
        frames: The frames to sample.
        flow: One flow in pixels for each frame.
    """
    height, width = frames.shape[-2:]
    sources = rearrange(_source_positions(flow), "b t xy h w -> (b t) h w xy")
    grid = (2 * sources + 1) / sources.new_tensor([width, height]) - 1  # the centre of pixel 0 is at 0.5
    warped = F.grid_sample(frames.flatten(0, 1), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return rearrange(warped, "(b t) c h w -> b t c h w", b=len(frames))


def visible(backward: Flow, forward: Flow) -> Mask:
    """Return the pixels at which a backward flow is reliable, by Ruder et al. (https://arxiv.org/abs/1604.08610).

    Args:
        backward: Flow from frames to the previous frames.
        forward: Flow from the previous frames to the frames.
    """
    returned = warp(forward, backward)
    occluded = _square(returned + backward) > 0.01 * (_square(returned) + _square(backward)) + 0.5
    down, right = torch.gradient(backward, dim=(-2, -1))
    at_boundary = _square(down) + _square(right) > 0.01 * _square(backward) + 0.002
    x, y = _source_positions(backward).chunk(2, dim=2)
    outside = (x < 0) | (x > x.shape[-1] - 1) | (y < 0) | (y > y.shape[-2] - 1)
    return ~(occluded | at_boundary | outside)


def _source_positions(flow: Flow) -> Flow:
    """Return the position (x, y) in pixels that each flow vector points to."""
    height, width = flow.shape[-2:]
    x = torch.arange(width, device=flow.device, dtype=flow.dtype).expand(height, width)
    y = torch.arange(height, device=flow.device, dtype=flow.dtype)[:, None].expand(height, width)
    return flow + torch.stack([x, y])


def _square(vectors: Flow) -> Float[Tensor, "b t 1 height width"]:
    """Return the squared length of each vector."""
    return vectors.square().sum(2, keepdim=True)
