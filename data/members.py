"""The kinds of files, by the extension of their names: videos, pictures, text."""

from collections.abc import Container, Iterable

# fmt: off
VIDEO_EXTENSIONS = frozenset(
    (
        "3g2", "3gp", "3gpp", "amv", "apng", "asf", "avi", "avs2", "avs3", "dav", "divx", "dv", "evo", "f4v",
        "flv", "gif", "gxf", "h261", "h263", "h264", "h265", "hevc", "ifv", "ismv", "ivf", "lvf", "m1v", "m2p",
        "m2t", "m2ts", "m2v", "m4v", "mj2", "mjpeg", "mjpg", "mk3d", "mkv", "mov", "mp4", "mp4v", "mpe", "mpeg",
        "mpeg2", "mpeg4", "mpg", "mpv", "mts", "mxf", "nsv", "nut", "obu", "ogm", "ogv", "qt", "rm", "rmvb",
        "roq", "swf", "tod", "trp", "ts", "vc1", "viv", "vob", "vro", "webm", "wmv", "wtv", "xmv", "y4m",
        "yuv4mpeg",
    )
)
# fmt: on
"""Extensions of videos, in lower case: FFmpeg's demuxers (`ffmpeg -demuxers`), without those of sound and pictures."""

IMAGE_EXTENSIONS = frozenset(("bmp", "jpeg", "jpg", "png", "tif", "tiff", "webp"))
"""Extensions of pictures, in lower case."""

TEXT_EXTENSIONS = ("txt", "json")
"""Members of a sample in which captions are looked for."""

TOKEN_TEXT_MEMBERS = ("text.npy", "json")
"""Members that a sample with tokens must have beside them."""

_PREVIEWS = ("gif", "mjpeg", "mjpg")
"""Extensions that hold a preview where the sample has another video."""


def missing_text(members: Container[str]) -> str:
    """Return which members with text a sample with tokens lacks, as a reason not to use it; empty if it has all."""
    missing = [name for name in TOKEN_TEXT_MEMBERS if name not in members]
    return f"it has no {' and no '.join(missing)}" if missing else ""


def is_video(name: str) -> bool:
    """Return whether a file, or a member such as `mp4` or `v2.mp4`, is a video by its name."""
    return name.rpartition(".")[2].lower() in VIDEO_EXTENSIONS


def find_video(members: Iterable[str]) -> str | None:
    """Return the member of a sample that holds its video, or None.

    Args:
        members: Extensions of the sample's members.

    Raises:
        ValueError: If several members could be meant.
    """
    videos = [name for name in members if is_video(name)]
    for candidates in (videos, [name for name in videos if "." not in name]):
        chosen = [name for name in candidates if not name.endswith(_PREVIEWS)] or candidates
        if len(chosen) == 1:
            return chosen[0]
    if videos:
        raise ValueError(
            f"it has {len(videos)} videos ({', '.join(sorted(videos))}); a key ends at the first dot of the file's name"
        )
    return None
