"""High dynamic range (PQ, HLG) to the range of ordinary video, as 8-bit RGB.

- Light is measured in multiples of 203 cd/m², the white of a page in HDR video (ITU-R BT.2408).
- Up to half of that it is kept; above, a curve of the kind of Reinhard et al. (https://doi.org/10.1145/566654.566575)
  rolls it off, so that 1000 cd/m² become white. It acts on the largest of red, green and blue, which keeps the hue.
- The primaries of BT.2020 become those of BT.709 (ITU-R BT.2087), and the result has the transfer curve of sRGB.
"""

from functools import cache

import numpy as np
from jaxtyping import Float32, UInt8, UInt16

PQ, HLG = 16, 18
"""FFmpeg's numbers of the transfer curves SMPTE ST 2084 and ARIB STD-B67."""
_WHITE, _PEAK = 203.0, 1000.0
_KNEE = 0.5
_TO_BT709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32)


def tone_map(
    picture: UInt16[np.ndarray, "height width c"], transfer: int, wide_gamut: bool = True
) -> UInt8[np.ndarray, "height width c"]:
    """Return an HDR picture as ordinary RGB.

    Args:
        picture: Red, green and blue, from 0 to 65535, in the transfer curve of the video.
        transfer: `PQ` or `HLG`.
        wide_gamut: Whether its primaries are those of BT.2020.
    """
    linear = _to_linear(transfer)[picture]
    if transfer == HLG:  # the system gamma 1.2 of a display of 1000 cd/m², ITU-R BT.2100
        luma = linear @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        linear = linear * (np.maximum(luma, 1e-6) ** 0.2)[..., None] * np.float32(_PEAK / _WHITE)
    if wide_gamut:
        linear = np.maximum(linear @ _TO_BT709.T, 0)
    largest = np.maximum(linear.max(-1, keepdims=True), 1e-6)
    mapped = np.clip(linear * (_roll_off(largest) / largest), 0, 1)
    encoded = np.where(mapped <= 0.0031308, 12.92 * mapped, 1.055 * mapped ** (1 / 2.4) - 0.055)
    result: UInt8[np.ndarray, "height width c"] = (encoded * 255 + 0.5).astype(np.uint8)
    return result


def _roll_off(light: Float32[np.ndarray, "height width 1"]) -> Float32[np.ndarray, "height width 1"]:
    """Compress light above the knee so that the peak becomes 1, with a slope of 1 at the knee."""
    peak = _PEAK / _WHITE
    scale = 1 - _KNEE
    # x / (1 + x) in units of the range above the knee, stretched so that the peak is reached
    above = np.maximum(light - _KNEE, 0) / scale
    top = (peak - _KNEE) / scale
    rolled = above * (1 + above / top**2) / (1 + above)
    return np.where(light <= _KNEE, light, _KNEE + scale * np.minimum(rolled, 1)).astype(np.float32)


@cache
def _to_linear(transfer: int) -> Float32[np.ndarray, " codes"]:
    """Return the light of each 16-bit code: for PQ in multiples of `_WHITE`, for HLG of the scene, up to 1."""
    code = np.arange(2**16) / (2**16 - 1)
    if transfer == PQ:
        m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
        power = code ** (1 / m2)
        return (10000 / _WHITE * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)).astype(np.float32)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12).astype(np.float32)
