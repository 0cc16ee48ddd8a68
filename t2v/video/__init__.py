"""Video files: probing, reading and writing them; optical flow between their frames."""

from t2v.video.containers import mp4_boxes
from t2v.video.decoding import MAX_PIXELS, DecodeError
from t2v.video.reading import (
    VideoInfo,
    is_plain,
    probe,
    read_at,
    read_clip,
    read_frames,
    resize_and_crop,
    stream_frames,
)
from t2v.video.writing import Mp4Writer, encode_mp4, write_mp4

__all__ = [
    "MAX_PIXELS",
    "DecodeError",
    "Mp4Writer",
    "VideoInfo",
    "encode_mp4",
    "is_plain",
    "mp4_boxes",
    "probe",
    "read_at",
    "read_clip",
    "read_frames",
    "resize_and_crop",
    "stream_frames",
    "write_mp4",
]
