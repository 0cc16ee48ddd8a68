"""Metrics of pixels: PSNR and SSIM, per frame, on pixels in [0, 1]."""

from torchmetrics.functional.image import structural_similarity_index_measure

from t2v.batch import Video
from t2v.metrics.metric import MeanVideoMetric

_FRAMES = 32
"""Frames whose local statistics are held at a time."""
_RADIUS = 5
"""Of the window of 11×11 pixels."""


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
            _, values = structural_similarity_index_measure(
                x, y, sigma=1.5, data_range=1.0, reduction="none", return_full_image=True
            )
            inside = values[..., _RADIUS:-_RADIUS, _RADIUS:-_RADIUS]  # beyond, torchmetrics pads the frame
            self.total += inside.mean((1, 2, 3)).sum(dtype=self.total.dtype)
            self.count += len(x)
