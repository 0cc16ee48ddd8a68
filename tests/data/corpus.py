"""Footage as people have it: one function a file, made with PyAV alone.

`python -m tests.data.corpus FOLDER` writes all files. Frames are numbered by their grey level, see `number`, or show a
`card`: red at the top left, green at the top right, blue at the bottom left.
"""

import random
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import UInt8

from t2v.errors import run_tool

Picture = UInt8[np.ndarray, "height width c"]

EVEN = [i / 10 for i in range(20)]
"""Times of 20 frames at 10 fps."""
UNEVEN = [*EVEN, *(2 + i * 0.4 for i in range(20))]
"""20 frames at 10 fps, then 20 at 2.5 fps."""
B_FRAMES = {"crf": "4", "bf": "3"}
MATRICES = {
    "right": (0, 1, -1, 0),
    "half": (-1, 0, 0, -1),
    "left": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "upside_down": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "right_mirrored": (0, -1, -1, 0),
}
"""a, b, c, d of the display matrix: (x, y) is shown at (a x + c y, b x + d y)."""


def numbered(number: int, size: int = 64) -> Picture:
    """Return the frame with a number from 0 to 39; consecutive numbers differ by 30 grey levels."""
    return np.full((size, size, 3), _grey(number), np.uint8)


def number_of(frame: Any) -> int:
    """Return the number of a frame, from its mean."""
    return min(range(40), key=lambda number: abs(_grey(number) - float(frame.float().mean())))


def _grey(number: int) -> int:
    return 30 * (number % 8) + 5 * (number // 8)


def card(width: int = 128, height: int = 96) -> Picture:
    """Return a picture with three marked corners."""
    picture = np.full((height, width, 3), 60, np.uint8)
    picture[: height // 4, : width // 4] = 255, 0, 0
    picture[: height // 4, -width // 4 :] = 0, 255, 0
    picture[-height // 4 :, : width // 4] = 0, 0, 255
    return picture


def corners_of(picture: Picture) -> str:
    """Return the colours at the top left, top right, bottom left and bottom right; "." for grey."""
    pixels = [picture[y, x].astype(int) for y in (4, -5) for x in (4, -5)]
    return "".join("RGB"[int(pixel.argmax())] if pixel.max() > 150 else "." for pixel in pixels)


def encode(
    path: Path,
    pictures: Sequence[Picture],
    times: Sequence[float] | None = None,
    fps: int = 10,
    codec: str = "libx264",
    form: str | None = None,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    ratio: tuple[int, int] | None = None,
    matrix: Sequence[float] | None = None,
) -> Path:
    """Write a video; with `times` at a resolution of a millisecond, otherwise at a constant rate."""
    with av.open(str(path), "w", format=form, options=container or {}) as file:
        stream: Any = file.add_stream(codec, rate=fps, options=options if options is not None else {"crf": "4"})
        stream.height, stream.width, _ = pictures[0].shape
        stream.pix_fmt = pix_fmt
        if ratio:
            stream.codec_context.sample_aspect_ratio = Fraction(*ratio)
        if matrix:
            a, b, c, d = (round(value * 2**16) for value in matrix)
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 2**30])
        base = Fraction(1, 1000) if times else Fraction(1, fps)
        stream.codec_context.time_base = base
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(times[number] * 1000) if times else number, base
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def timed(path: Path, times: Sequence[float], **settings: Any) -> Path:
    """Write numbered frames, shown at given times."""
    return encode(path, [numbered(number) for number in range(len(times))], times, **settings)


def steady(path: Path, frames: int = 20, **settings: Any) -> Path:
    """Write numbered frames at a constant rate."""
    return encode(path, [numbered(number) for number in range(frames)], **settings)


# Times: each function returns the times at which the frames are shown.


def avi_without_times(path: Path) -> list[float]:
    """AVI stores no presentation times, so that frames come in the order of decoding."""
    steady(path, options=B_FRAMES)
    return EVEN


def raw_h264(path: Path) -> list[float]:
    """An elementary stream has no times at all."""
    steady(path, options=B_FRAMES, form="h264")
    return EVEN


def program_stream(path: Path) -> list[float]:
    """A program stream has the time of the first frame only."""
    steady(path, options=B_FRAMES, fps=25, form="mpeg")
    return [i / 25 for i in range(20)]


def times_in_decoding_order(path: Path) -> list[float]:
    """An AVI copied into another container without its times being mended."""
    steady(path.with_suffix(".avi"), options=B_FRAMES)
    with av.open(str(path.with_suffix(".avi"))) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return EVEN


def uneven(path: Path) -> list[float]:
    """A rate that changes from 10 to 2.5 frames per second."""
    timed(path, UNEVEN, options=B_FRAMES)
    return UNEVEN


def late_gap(path: Path) -> list[float]:
    """A steady rate, but for a gap of six seconds near the end."""
    times = [*(i / 10 for i in range(30)), *(9 + i / 10 for i in range(10))]
    timed(path, times, options=B_FRAMES)
    return times


def uneven_vp8(path: Path) -> list[float]:
    """VP8 with hidden reference frames."""
    timed(path, UNEVEN, codec="libvpx", options={"b": "1M", "auto-alt-ref": "1", "lag-in-frames": "16"})
    return UNEVEN


def uneven_vp9(path: Path) -> list[float]:
    """VP9 in webm, with times in milliseconds."""
    timed(path, UNEVEN, codec="libvpx-vp9", options={"b": "1M"})
    return UNEVEN


def open_groups(path: Path) -> list[float]:
    """Frames that are shown before the key frame that precedes them in the file."""
    timed(path, UNEVEN, options={**B_FRAMES, "g": "5", "x264-params": "open-gop=1:scenecut=0"})
    return UNEVEN


def fragments(path: Path) -> list[float]:
    """A fragmented mp4, as streaming services and phones write it."""
    timed(path, UNEVEN, options=B_FRAMES, container={"movflags": "frag_keyframe+empty_moov"})
    return UNEVEN


def late_start(path: Path) -> list[float]:
    """The first frame is shown after a second."""
    timed(path, [1 + time for time in UNEVEN], options=B_FRAMES)
    return UNEVEN


def intra_refresh(path: Path) -> list[float]:
    """No key frames after the first, but points from which the picture is complete after some frames."""
    steady(path, 40, fps=25, options={"crf": "4", "x264-params": "keyint=30:intra-refresh=1"})
    return [i / 25 for i in range(40)]


TIMES: dict[str, Callable[[Path], list[float]]] = {
    "no_times.avi": avi_without_times,
    "raw.h264": raw_h264,
    "stream.mpg": program_stream,
    "copied.mp4": times_in_decoding_order,
    "copied.mkv": times_in_decoding_order,
    "uneven.mp4": uneven,
    "uneven.mkv": uneven,
    "uneven.ts": uneven,
    "uneven.flv": uneven,
    "gap.mp4": late_gap,
    "gap.mkv": late_gap,
    "vp8.webm": uneven_vp8,
    "vp9.webm": uneven_vp9,
    "open.mp4": open_groups,
    "open.mkv": open_groups,
    "fragments.mp4": fragments,
    "late.mp4": late_start,
    "refresh.mp4": intra_refresh,
    "refresh.ts": intra_refresh,
}


# Shapes: each function returns the width, height and corners that a player shows.


def plain(path: Path) -> tuple[int, int, str]:
    """The card as it is."""
    encode(path, [card()] * 3)
    return 128, 96, "RGB."


def turned(path: Path) -> tuple[int, int, str]:
    """The card with the display matrix that the file is named for."""
    name = path.stem
    encode(path, [card()] * 3, matrix=MATRICES[name])
    swapped = MATRICES[name][0] == 0
    corners = {
        "right": "BR.G",
        "half": ".BGR",
        "left": "G.RB",
        "mirrored": "GR.B",
        "upside_down": "B.RG",
        "transposed": "RBG.",
        "right_mirrored": ".GBR",
    }[name]
    return (96, 128, corners) if swapped else (128, 96, corners)


def wide_pixels(path: Path) -> tuple[int, int, str]:
    """Pixels twice as wide as high."""
    encode(path, [card()] * 3, ratio=(2, 1))
    return 256, 96, "RGB."


def high_pixels(path: Path) -> tuple[int, int, str]:
    """Pixels twice as high as wide."""
    encode(path, [card()] * 3, ratio=(1, 2))
    return 128, 192, "RGB."


def wide_pixels_turned(path: Path) -> tuple[int, int, str]:
    """Wide pixels that a display matrix makes high."""
    encode(path, [card()] * 3, ratio=(2, 1), matrix=MATRICES["right"])
    return 96, 256, "BR.G"


def odd_size(path: Path) -> tuple[int, int, str]:
    """Odd width and height."""
    encode(path, [card(101, 75)] * 3, codec="ffv1", pix_fmt="yuv444p", options={})
    return 101, 75, "RGB."


def clean_aperture(path: Path) -> tuple[int, int, str]:
    """The clean aperture of an mp4 leaves out 32 pixels at the left and 8 at the top."""
    encode(path, [card()] * 3)
    content = bytearray(path.read_bytes())
    box = struct.pack(">I4s4I", 40, b"clap", 96, 1, 88, 1) + struct.pack(">iIiI", 16, 1, 4, 1)
    at = content.index(b"avcC") - 4
    content[at:at] = box  # the description is behind the pictures, whose places stay the same
    for kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"):
        size = content.rindex(kind, 0, at) - 4
        content[size : size + 4] = struct.pack(">I", struct.unpack_from(">I", content, size)[0] + len(box))
    path.write_bytes(content)
    return 96, 88, ".G.."


def pixel_crop(path: Path) -> tuple[int, int, str]:
    """A Matroska file that leaves out 32 pixels at the left."""
    encode(path, [card()] * 3)
    content = path.read_bytes()
    at = content.index(b"\x54\xb2\x81")  # the unit of the display's size
    path.write_bytes(content[:at] + b"\x54\xcc\x81\x20" + content[at + 4 :])
    return 96, 96, ".G.."


SHAPES: dict[str, Callable[[Path], tuple[int, int, str]]] = {
    "plain.mp4": plain,
    **{f"{name}.mp4": turned for name in MATRICES},
    "right.mkv": turned,
    **{f"wide.{form}": wide_pixels for form in ("mp4", "mkv", "ts", "avi")},
    "high.mp4": high_pixels,
    "wide_right.mp4": wide_pixels_turned,
    "odd.mkv": odd_size,
    "aperture.mp4": clean_aperture,
    "crop.mkv": pixel_crop,
}


def moving(frames: int = 40) -> list[Picture]:
    """Return a textured picture that moves, in which damage is seen."""
    texture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    return [np.roll(texture, (2 * i, 3 * i), (0, 1)) for i in range(frames)]


def damaged(content: bytes, seed: int) -> bytes:
    """Return an mp4 with eight other bytes somewhere in the middle half of its pictures."""
    rng = random.Random(seed)
    start, stop = content.index(b"mdat") + 8, content.rindex(b"moov")
    at = start + (stop - start) // 4 + rng.randrange((stop - start) // 2)
    return content[:at] + bytes(byte ^ rng.randrange(1, 256) for byte in content[at : at + 8]) + content[at + 8 :]


def hdr_grey(path: Path, transfer: int, signals: Sequence[float]) -> None:
    """Write grey frames of 10 bits with the primaries of BT.2020; 16 is PQ and 18 is HLG."""
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx265", rate=10, options={"crf": "1", "x265-params": "log-level=none"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p10le"
        codec = stream.codec_context
        codec.color_trc, codec.color_primaries, codec.colorspace, codec.color_range = transfer, 9, 9, 1
        for number, signal in enumerate(signals):
            frame = av.VideoFrame(64, 64, "yuv420p10le")
            for plane, value in zip(frame.planes, (64 + round(signal * 876), 512, 512), strict=True):
                plane.update(np.full(plane.buffer_size // 2, value, np.uint16).tobytes())
            frame.pts, frame.colorspace, frame.color_range = number, 9, 1
            frame.color_trc, frame.color_primaries = transfer, 9
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def interlaced(path: Path, marked: bool = True) -> None:
    """Write a bar that moves from field to field; unless marked, as if the frames were not interlaced."""
    pictures = []
    for t in range(12):
        picture = np.full((64, 64, 3), 40, np.uint8)
        picture[0::2, 4 * t : 4 * t + 8] = 220
        picture[1::2, 4 * t + 2 : 4 * t + 10] = 220
        pictures.append(picture)
    encode(path, pictures, fps=25, options={"crf": "4", **({"x264-params": "interlaced=1:tff=1"} if marked else {})})


def boxed(path: Path, rows: int, columns: int) -> None:
    """Write a moving picture of 128 pixels with black bars of so many rows above and below, and columns beside it."""
    pictures = [
        np.pad(picture, ((rows, rows), (columns, columns), (0, 0)), constant_values=16) for picture in moving(12)
    ]
    encode(path, pictures, options={"crf": "23"})


def changing(path: Path) -> None:
    """Write a raw stream whose pictures become larger after the eighth."""
    parts = [path.with_name(f"{size}-{path.name}") for size in (64, 96)]
    for part, size in zip(parts, (64, 96), strict=True):
        encode(part, [numbered(number, size) for number in range(8)], form="h264")
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    for part in parts:
        part.unlink()


def write_corpus(folder: Path) -> None:
    """Write all files into a folder.

    Args:
        folder: Folder to create.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in {**TIMES, **SHAPES}.items():
        make(folder / name)
    hdr_grey(folder / "pq.mp4", 16, [0.58])
    hdr_grey(folder / "hlg.mp4", 18, [0.75])
    interlaced(folder / "interlaced.mp4")
    interlaced(folder / "unmarked.mp4", marked=False)
    boxed(folder / "letterbox.mp4", 16, 0)
    boxed(folder / "pillarbox.mp4", 0, 20)
    boxed(folder / "windowbox.mp4", 16, 20)
    changing(folder / "changing.h264")


if __name__ == "__main__":
    run_tool(write_corpus)
