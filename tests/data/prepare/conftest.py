from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from t2v.video import encode_mp4, read_frames


def scene(seed, frames=8, height=96, width=128):
    """Return a clip like a real one: a camera pans slowly over smooth random blobs."""
    blobs = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(seed))
    wide = F.interpolate(blobs, (height, 2 * width), mode="bicubic").clamp(0, 1) * 255
    return torch.cat([wide[..., 2 * t : 2 * t + width] for t in range(frames)]).byte()


def recode(frames, crf, size=None):
    """Encode and decode a clip, optionally at another size."""
    if size:
        frames = F.interpolate(frames, size, mode="bilinear", antialias=True)
    return read_frames(encode_mp4(frames, 8, crf), range(len(frames)))


@pytest.fixture(scope="session")
def draw():
    """Functions that make clips."""
    return SimpleNamespace(scene=scene, recode=recode)
