"""Scene detection: a model trained on clips that span two scenes learns to generate cuts.

PySceneDetect (https://www.scenedetect.com) compares the hue, saturation and brightness of consecutive frames, and
decodes with PyAV, like the rest of this platform. It finds hard cuts; slow fades stay inside a scene. Below about 12
frames per second, fast motion can look like a cut: use a higher threshold there.
"""

import logging
from pathlib import Path

from t2v.errors import UserError
from t2v.video import DecodeError, probe

MIN_SCENE_SECONDS = 0.5
"""Shorter bursts, such as a camera flash, do not count as a scene."""


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
        from scenedetect import ContentDetector, SceneManager, VideoStreamAv
        from scenedetect.video_stream import VideoOpenFailure
    except ImportError as error:
        raise UserError('Scenes are found with PySceneDetect: run pip install -e ".[prepare]".') from error
    probe(path)  # its errors are clearer than PySceneDetect's
    logging.getLogger("pyscenedetect").setLevel(logging.CRITICAL)  # the caller reports errors with the file's name
    try:
        video = VideoStreamAv(str(path), suppress_output=True)
    except VideoOpenFailure as error:
        raise DecodeError(f"its scenes cannot be found: {error}") from error
    manager = SceneManager()
    manager.add_detector(ContentDetector(threshold, min_scene_len=MIN_SCENE_SECONDS))
    manager.detect_scenes(video)
    scenes = [(start.seconds, end.seconds) for start, end in manager.get_scene_list(start_in_scene=True)]
    if not scenes:
        raise DecodeError("none of its frames decodes")
    return scenes
