"""Metrics of pixels: PSNR and SSIM, per frame, on pixels in [0, 1]."""

import torch
from jaxtyping import Float64
from torch import Tensor

from t2v.batch import Video
from t2v.metrics.metric import MeanVideoMetric

_FRAMES = 32
"""Frames whose local statistics are held at a time."""
_WINDOW, _SIGMA = 11, 1.5
"""Width and standard deviation of the Gaussian window, in pixels."""
_K1, _K2 = 0.01, 0.03


class PSNR(MeanVideoMetric):
    """Mean peak signal-to-noise ratio of the frames, in dB, of RGB pixels in [0, 1].

    The ratio of a frame is 10 log10(1 / MSE) over its pixels and channels, at most 100 dB, so that frames without any
    error (black ones, for example) leave the mean finite.
    """

    name = "psnr"
    max_db = 100.0

    def accumulate(self, reconstruction: Video, video: Video) -> None:
        """Add clips; every frame counts the same."""
        mse = ((reconstruction - video) / 2).square().mean((2, 3, 4))
        frames = (-10 * mse.clamp(min=1e-20).log10()).clamp(max=self.max_db)
        self.total += frames.sum(dtype=self.total.dtype)
        self.count += frames.numel()


class SSIM(MeanVideoMetric):
    """Mean structural similarity of the frames (Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861).

    RGB pixels in [0, 1], Gaussian window of 11×11 pixels with sigma 1.5, biased covariance, K1 = 0.01, K2 = 0.03, at
    every position where the window lies inside the frame; the mean over positions, channels and frames. This is
    scikit-image's `structural_similarity` with `gaussian_weights=True, use_sample_covariance=False, data_range=1`.
    """

    name = "ssim"

    def accumulate(self, reconstruction: Video, video: Video) -> None:
        """Add clips of at least 11×11 pixels; every frame counts the same."""
        # float32 gives 0.99970 instead of 0.99980 for a flat frame that is shifted by 0.01: variances are differences.
        frames, originals = ((pixels.flatten(0, 1).double() + 1) / 2 for pixels in (reconstruction, video))
        for x, y in zip(frames.split(_FRAMES), originals.split(_FRAMES), strict=True):
            self.total += _similarity(x, y).mean((1, 2, 3)).sum(dtype=self.total.dtype)
            self.count += len(x)


def _similarity(
    x: Float64[Tensor, "n 3 height width"], y: Float64[Tensor, "n 3 height width"]
) -> Float64[Tensor, "n 3 rows columns"]:
    """Return the similarity at every position of the window inside the frame, of pixels in [0, 1].

    As matrix products: torchmetrics' convolutions in float64 take 8 (64 pixels) to 22 times (512) as long on a CPU.
    """
    vertical, horizontal = (_gaussian_windows(length, x.device) for length in x.shape[-2:])
    mean_x, mean_y, xx, yy, xy = (vertical @ each @ horizontal.T for each in (x, y, x * x, y * y, x * y))
    c1, c2 = _K1**2, _K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance * (2 * (xy - mean_x * mean_y) + c2) / (xx - mean_x**2 + yy - mean_y**2 + c2)


def _gaussian_windows(length: int, device: torch.device) -> Float64[Tensor, "positions length"]:
    """Return the weights of the pixels of a line at each position of the window, a row per position."""
    distance = torch.arange(_WINDOW, dtype=torch.float64, device=device) - _WINDOW // 2
    weights = (-(distance**2) / (2 * _SIGMA**2)).exp()
    windows = torch.zeros(length - _WINDOW + 1, length, dtype=torch.float64, device=device)
    for position, row in enumerate(windows):
        row[position : position + _WINDOW] = weights / weights.sum()
    return windows
