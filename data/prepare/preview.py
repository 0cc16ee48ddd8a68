"""What a run would do, found without decoding or writing anything."""

import tempfile
from collections import Counter
from pathlib import Path

from data.prepare.cutting import as_file
from data.prepare.dropped import Dropped, summarize
from data.prepare.filters import reason_to_drop_video
from data.prepare.sources import Video
from data.prepare.video_clips import ClipFormat
from data.progress import ProgressBar
from t2v.video import DecodeError, probe


def preview(videos: list[Video], dropped: list[Dropped], clip_format: ClipFormat) -> str:
    """Return the number, length and sizes of the videos, the number of clips at most, and what would be dropped.

    Scenes, brightness, motion and near-duplicates need the pictures, and are not looked at.

    Args:
        videos: The captioned videos of the source.
        dropped: Videos of the source that are dropped already; others are added.
        clip_format: Properties of the clips.
    """
    seconds, clips = 0.0, 0
    sizes: Counter[str] = Counter()
    stride = clip_format.stride or clip_format.frames
    with tempfile.TemporaryDirectory() as folder:
        for video in ProgressBar(videos, "reading the headers", unit="video", leave=False):
            try:
                with as_file(video, Path(folder)) as path:
                    info = probe(path)
            except DecodeError as error:
                dropped.append(Dropped(video.name, None, f"does not decode ({error})"))
                continue
            reason = reason_to_drop_video(info, clip_format.filters)
            frames = int(info.frames / info.fps * clip_format.fps + 1e-6)
            if reason is None and frames < clip_format.frames:
                reason = clip_format.too_short
            if reason:
                dropped.append(Dropped(video.name, None, reason))
                continue
            seconds += info.frames / info.fps
            sizes[f"{info.width}x{info.height}"] += 1
            of_video = (frames - clip_format.frames) // stride + 1
            clips += of_video if clip_format.max_clips is None else min(of_video, clip_format.max_clips)
    named_sizes = ", ".join(f"{size} ({count})" for size, count in sizes.most_common(10)) or "none"
    lines = [
        f"{sum(sizes.values())} of {len(videos)} videos would be cut, {seconds / 3600:.2f} hours.",
        f"At most {clips} clips of {clip_format.frames} frames.",
        f"Sizes: {named_sizes}.",
    ]
    if dropped:
        lines.append(f"Would be dropped, {len(dropped)}: {summarize(dropped)}.")
    lines.append("Scenes, brightness, motion and near-duplicates were not looked at; nothing was written.")
    return "\n".join(lines)
