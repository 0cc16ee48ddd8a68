"""Speed of reading clips: `python -m tests.benchmarks.reading`.

decord, PyAV, and `read_frames` with either reader, interleaved in a random order in every round, read all 64 frames of
a clip, 16 consecutive ones from its middle, and every fourth, at 64, 256 and 512 pixels. The clips, a moving pattern
with noise, are encoded by `Mp4Writer` and held in memory; each reader decodes with one thread. decord converts pixels
in a second thread, so compare processor times if all cores run a worker.
"""

import io
import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial

import av
import decord
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from t2v.errors import run_tool
from t2v.video import encode_mp4, read_frames, selection

FRAMES = 64
ACCESSES = {"all frames": range(FRAMES), "a window of 16": range(24, 40), "every fourth": range(0, FRAMES, 4)}


def draw(size: int) -> UInt8[Tensor, "t c height width"]:
    """Draw a soft pattern that moves two pixels per frame, with noise of a few grey levels."""
    rng = torch.Generator().manual_seed(size)
    coarse = torch.rand(1, 3, 16, 16, generator=rng) * 255
    pattern = F.interpolate(coarse, (size, size), mode="bicubic")[0]
    noise = torch.randn(FRAMES, 3, size, size, generator=rng) * 3
    return torch.stack([pattern.roll(2 * t, -1) + noise[t] for t in range(FRAMES)]).clamp(0, 255).byte()


def with_decord(content: bytes, indices: Sequence[int]) -> UInt8[np.ndarray, "t height width c"]:
    """Read frames as decord's documentation shows."""
    return decord.VideoReader(io.BytesIO(content), num_threads=1).get_batch(list(indices)).asnumpy()


def with_pyav(content: bytes, indices: Sequence[int]) -> UInt8[np.ndarray, "t height width c"]:
    """Read frames with PyAV into one array, as decord returns them."""
    return np.stack([picture for picture, _ in selection.pictures(content, list(indices), False, lambda: None, "pyav")])


READERS: dict[str, Callable[[bytes, Sequence[int]], object]] = {
    "decord": with_decord,
    "PyAV": with_pyav,
    "read_frames": read_frames,
    "read_frames, decord": partial(read_frames, reader="decord"),
}


def seconds(reader: Callable[[bytes, Sequence[int]], object], content: bytes, indices: Sequence[int]) -> np.ndarray:
    """Return wall time, and processor time of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    reader(content, indices)
    return np.array([time.perf_counter() - wall, time.process_time() - cpu])


def main(rounds: int = 15) -> None:
    """Print the table.

    Args:
        rounds: Interleaved rounds of the readers.
    """
    torch.set_num_threads(1)
    order = np.random.default_rng(0)
    selection._decord()  # sets decord up as for `read_frames`
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, ",
        end="",
    )
    print(
        f"decord {decord.__version__}, PyAV {av.__version__}; milliseconds per clip, medians of {rounds} rounds: ",
        end="",
    )
    print("wall time / processor time\n")
    print(f"| pixels | kB | frames | {' | '.join(READERS)} |")
    print("|---" * (3 + len(READERS)) + "|")
    for size in (64, 256, 512):
        content = encode_mp4(draw(size), fps=8)
        for access, indices in ACCESSES.items():
            assert (with_decord(content, indices) == with_pyav(content, indices)).all()
            times: dict[str, list[np.ndarray]] = {name: [] for name in READERS}
            for _ in range(rounds):
                for name in order.permutation(list(READERS)):  # caches are warm after read_frames
                    times[name].append(seconds(READERS[name], content, indices))
            medians = (1000 * np.median(each, axis=0) for each in times.values())
            cells = [f"{wall:.1f} / {cpu:.1f}" for wall, cpu in medians]
            print(f"| {size} | {len(content) / 1000:.0f} | {access} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run_tool(main)
