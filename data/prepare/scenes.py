"""Scene detection: a model trained on clips that span two scenes learns to generate cuts.

PySceneDetect (https://www.scenedetect.com) compares the hue, saturation and brightness of consecutive frames, and is
given the same frames and times as the clips. It finds hard cuts; slow fades stay inside a scene. Below about 12 frames
per second, fast motion can look like a cut: use a higher threshold there.
"""

import logging
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

from t2v.errors import UserError
from t2v.video import DecodeError, probe, stream_frames

MIN_SCENE_SECONDS = 0.5
"""Shorter bursts, such as a camera flash, do not count as a scene."""
_WIDTH = 256
"""Frames are reduced by a whole number, so that they are at least this many pixels wide; as PySceneDetect does."""
_TICKS = 1_000_000
"""Parts of a second in which times are given to PySceneDetect."""


def find_scenes(path: str | Path, threshold: float) -> list[tuple[float, float]]:
    """Return the start and end of each scene of a video, which is decoded once, in constant memory.

    Args:
        path: The video.
        threshold: Mean change of a pixel between two frames, from 0 to 255, above which there is a cut; PySceneDetect's
            default is 27.

    Returns:
        Start and end of each scene in seconds since the first frame, consecutive and without gaps; one scene if there
        is no cut.

    Raises:
        DecodeError: If the file is not a video.
        UserError: If the threshold is not above 0, or the package scenedetect is missing.
    """
    if threshold <= 0:
        raise UserError(f"A threshold of {threshold:g} finds a cut at every frame: use more than 0, such as 27.")
    try:
        import cv2
        from scenedetect import ContentDetector
        from scenedetect.common import FrameTimecode, Timecode
    except ImportError as error:
        raise UserError('Scenes are found with PySceneDetect: run pip install -e ".[prepare]".') from error
    logging.getLogger("pyscenedetect").setLevel(logging.CRITICAL)
    fps = probe(path).fps
    detector = ContentDetector(threshold, min_scene_len=MIN_SCENE_SECONDS)
    starts, last, step = [0.0], None, 1 / fps
    try:
        for time, frame in stream_frames(path):
            step = step if last is None else time - last
            last = time
            picture = frame.permute(1, 2, 0).numpy()[..., ::-1]  # blue, green, red
            ratio = max(1, frame.shape[-1] // _WIDTH)
            small = cv2.resize(picture, (frame.shape[-1] // ratio, max(1, frame.shape[-2] // ratio)))
            code = FrameTimecode(Timecode(round(time * _TICKS), Fraction(1, _TICKS)), fps)
            starts += [cut.seconds for cut in detector.process_frame(code, small)]
    except DecodeError:
        if last is None:
            raise  # otherwise the frames up to the damage have scenes, and cutting reports it
    if last is None:
        raise DecodeError("none of its frames decodes")
    return list(pairwise([*starts, last + step]))
