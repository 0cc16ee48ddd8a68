"""Limits for videos, clips and captions, and the reasons why videos and clips are dropped.

A reason has the form `reason (value; limit)`, so that reasons can be counted by the part before ` (`. Motion and
brightness are measured on frames reduced to 32 × 32 pixels, which averages out noise.

Axis letters: t frames, c channels (3, red green blue), h w pixels.
"""

from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from data.prepare.duplicates import HASH_BITS
from data.prepare.flaws import BLACK_BARS, INTERLACED, Flaws
from t2v.errors import UserError
from t2v.video import VideoInfo


@dataclass(frozen=True)
class Filters:
    """Limits outside which videos, clips and captions are dropped; the defaults keep static clips and near-duplicates.

    Args:
        min_seconds: Shortest length of a video.
        max_seconds: Longest length of a video; null for no limit.
        min_height: Smallest length of a video's shorter side in pixels.
        min_fps: Lowest frame rate of a video in frames per second; slide shows are below it.
        max_aspect: Largest ratio of a video's longer to its shorter side; null for no limit.
        min_motion: Smallest mean difference between consecutive frames of a clip, in grey levels from 0 to 255; 0 keeps
            static clips, 0.5 drops them even if they have sensor or encoder noise.
        min_brightness: Smallest mean grey level of a clip, from 0 to 255; black clips are below it.
        max_hash_distance: A clip is dropped as a near-duplicate if its hash differs from that of an earlier clip in at
            most this many of 192 bits; null keeps all. Re-encoded copies differ in about 10 bits, different clips in
            about 90; 16 is a good value.
        min_words: Smallest number of words in a caption; a Chinese or Japanese character counts as a word.
        max_words: Largest number of words in a caption; null for no limit.
        interlaced: What becomes of a video whose frames are interlaced without being marked so: it is kept as it is,
            deinterlaced, or dropped. Marked frames are always deinterlaced.
        bars: What becomes of a video with black bars at two opposite edges: it is kept as it is, cropped, or dropped.

    Raises:
        UserError: If a limit is out of range or contradicts another.
    """

    min_seconds: float = 0.0
    max_seconds: float | None = None
    min_height: int = 0
    min_fps: float = 4.0
    max_aspect: float | None = 3.0
    min_motion: float = 0.0
    min_brightness: float = 4.0
    max_hash_distance: int | None = None
    min_words: int = 1
    max_words: int | None = 200
    interlaced: Literal["keep", "deinterlace", "drop"] = "keep"
    bars: Literal["keep", "crop", "drop"] = "keep"

    def __post_init__(self) -> None:
        values = {
            field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("interlaced", "bars")
        }
        wrong = [f"{name}={value} is below 0" for name, value in values.items() if value is not None and value < 0]
        for name in ("seconds", "words"):
            least, most = values[f"min_{name}"], values[f"max_{name}"]
            if most is not None and least > most:
                wrong.append(f"min_{name}={least} is above max_{name}={most}")
        if self.max_aspect is not None and self.max_aspect < 1:
            wrong.append(f"max_aspect={self.max_aspect} is below 1, the aspect of a square")
        random_distance = HASH_BITS // 2
        if self.max_hash_distance is not None and self.max_hash_distance >= random_distance:
            wrong.append(
                f"max_hash_distance={self.max_hash_distance} is not below {random_distance}, the mean distance of "
                "unrelated clips"
            )
        if wrong:
            raise UserError(f"These filters have no useful limits: {'; '.join(wrong)}.")


def reason_to_drop_video(info: VideoInfo, filters: Filters) -> str | None:
    """Return why a video is dropped for its length, rate or size, or None.

    Args:
        info: Length, rate and size of the video.
        filters: The limits.
    """
    seconds, shorter = info.frames / info.fps, min(info.height, info.width)
    aspect = max(info.height, info.width) / shorter
    if seconds < filters.min_seconds:
        return f"too short ({seconds:.1f} s; min_seconds is {filters.min_seconds:g})"
    if filters.max_seconds is not None and seconds > filters.max_seconds:
        return f"too long ({seconds:.1f} s; max_seconds is {filters.max_seconds:g})"
    if shorter < filters.min_height:
        return f"too small ({info.width}x{info.height} pixels; min_height is {filters.min_height})"
    if info.fps < filters.min_fps:
        return f"too few frames per second ({info.fps:.3g}; min_fps is {filters.min_fps:g})"
    if filters.max_aspect is not None and aspect > filters.max_aspect:
        return f"too wide or too tall ({info.width}x{info.height} pixels; max_aspect is {filters.max_aspect:g})"
    return None


def reason_to_drop_flaws(flaws: Flaws, filters: Filters) -> str | None:
    """Return why a video is dropped for interlaced frames or black bars, or None.

    Args:
        flaws: What was found in the video.
        filters: What is to be dropped.
    """
    if flaws.interlaced and filters.interlaced == "drop":
        return f"{INTERLACED} (not marked as such; filters.interlaced is drop)"
    if any(flaws.bars) and filters.bars == "drop":
        return f"{BLACK_BARS} ({flaws.bars}; filters.bars is drop)"
    return None


def reason_to_drop_clip(frames: UInt8[Tensor, "t c h w"], filters: Filters) -> str | None:
    """Return why a clip is dropped for its brightness or motion, or None.

    Args:
        frames: The clip. A single frame is never dropped for lack of motion.
        filters: The limits.
    """
    small = torch.cat([F.interpolate(frame[None].float(), (32, 32), mode="area") for frame in frames])
    red, green, blue = small.unbind(1)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue  # (t, 32, 32)
    brightness = grey.mean().item()
    if brightness < filters.min_brightness:
        return f"black (mean grey level {brightness:.1f}; min_brightness is {filters.min_brightness:g})"
    if len(grey) > 1:
        motion = grey.diff(dim=0).abs().mean().item()
        if motion < filters.min_motion:
            return f"near-static (frames differ by {motion:.2f} grey levels; min_motion is {filters.min_motion:g})"
    return None
