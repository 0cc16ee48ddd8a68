"""The scenes of a video: a clip that runs over a cut teaches a model to cut.

PySceneDetect (https://www.scenedetect.com) compares each frame with the one before in hue, saturation and brightness,
and decodes with PyAV, as the rest of this platform does. It finds hard cuts; slow fades are left inside a scene.
In footage of less than about 12 frames a second, fast motion can look like a cut: a higher threshold helps.
"""

import logging
from pathlib import Path

from t2v.errors import UserError
from t2v.video import DecodeError, probe

SHORTEST = 0.5
"""Seconds: a shorter burst, as of a flash light, is no scene of its own."""


def scenes(path: str | Path, threshold: float) -> list[tuple[float, float]]:
    """Where the scenes of a video begin and end; the video is decoded once, in constant memory.

    Args:
        path: the video.
        threshold: mean change of a pixel from one frame to the next, from 0 to 255, above which there is a cut; 27 is
            PySceneDetect's own value.

    Returns:
        Start and end of each scene in seconds since the first frame, one after the other without gaps; the whole video
        where there is no cut.

    Raises:
        DecodeError: where it is not a video.
        UserError: where the threshold is not above 0, or the package scenedetect is missing.
    """
    if threshold <= 0:
        raise UserError(f"A cut cannot be told by a threshold of {threshold:g}: give more than 0, such as 27.")
    try:
        from scenedetect import ContentDetector, SceneManager, VideoStreamAv
        from scenedetect.video_stream import VideoOpenFailure
    except ImportError as error:
        raise UserError("Scene cuts are found with PySceneDetect: run pip install 't2v[prepare]'.") from error
    probe(path)  # says what is wrong with a file better than PySceneDetect does
    # What does not decode is told, with the file's name, by who cuts the scenes.
    logging.getLogger("pyscenedetect").setLevel(logging.CRITICAL)
    try:
        video = VideoStreamAv(str(path), suppress_output=True)
    except VideoOpenFailure as error:
        raise DecodeError(f"its scenes cannot be found: {error}") from error
    manager = SceneManager()
    manager.add_detector(ContentDetector(threshold, min_scene_len=SHORTEST))
    manager.detect_scenes(video)
    found = [(start.seconds, end.seconds) for start, end in manager.get_scene_list(start_in_scene=True)]
    if not found:
        raise DecodeError("none of its frames decodes")
    return found
