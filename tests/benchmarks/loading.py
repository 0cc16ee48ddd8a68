"""Speed and memory of the training loaders: `python -m tests.benchmarks.loading`.

On shards of small and of larger clips, epochs of these loaders are measured, interleaved in a random order in every
round and with the same number of processes:

- decord alone: `VideoReader` and `get_batch` of the frames that our loader delivers, with the files in memory;
- webdataset: `WebDataset(...).shuffle(...).decode(...)` on the same shards, with decord and our windows and resizing;
- our `VideoDataModule`;
- webdataset and our `TokenDataModule` on token shards with the same number of clips.

Then follow twenty epochs of our loaders, with the memory of the main process and of every worker after each. Speeds are
medians of the rounds, ratios of speeds are medians of the rounds' ratios. Processor time is that of all processes of a
loader.
"""

import io
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import decord
import fsspec
import numpy as np
import psutil
import torch
import torch.nn.functional as F
import webdataset
from jaxtyping import UInt8
from torch import Tensor

from data.datasets import TokenClip, TokenClips, VideoClip, VideoClips
from data.examples.shapes import ShapeClip, render
from data.modules import ShardDataModule, TokenDataModule, VideoDataModule
from data.plan import Plan
from data.shards import ShardWriter
from t2v.errors import UserError, run_tool
from t2v.video import encode_mp4, resize_and_crop

FRAMES, FPS = 16, 8
"""Length and frame rate of a clip in a batch."""
WIDTH, TEXT_TOKENS = 384, (6, 18)
"""Width of the text embeddings, and range of their lengths (the upper limit is exclusive)."""
COLOURS, SHARDS = ("red", "green", "blue", "yellow"), 8
"""One clip of each colour is encoded, and written many times with other keys."""


@dataclass(frozen=True)
class Footage:
    """Stored videos, and the batches to load from them."""

    pixels: int
    frames: int
    fps: int
    size: int
    grid: int
    clips: int
    batch_size: int

    @property
    def stride(self) -> int:
        """Stored frames per loaded frame."""
        return self.fps // FPS

    def __str__(self) -> str:
        cut = f" → {self.size}" if self.size != self.pixels else ""
        return f"{self.pixels}{cut} px, {FRAMES} of {self.frames} frames, batch {self.batch_size}"


FOOTAGE = (
    Footage(pixels=64, frames=16, fps=8, size=64, grid=4, clips=1536, batch_size=32),
    Footage(pixels=256, frames=80, fps=16, size=256, grid=16, clips=192, batch_size=8),
    Footage(pixels=512, frames=80, fps=16, size=256, grid=16, clips=64, batch_size=8),
)


@dataclass
class Contender:
    """A loader to measure: `epoch(number)` iterates over all clips and returns their number."""

    epoch: Callable[[int], int]
    processes: list[psutil.Process] = field(default_factory=lambda: [psutil.Process()])
    speeds: list[float] = field(default_factory=list)
    """Clips per second in each round."""
    costs: list[float] = field(default_factory=list)
    """Processor seconds per clip in each round."""

    def warm_up(self, others: set[psutil.Process]) -> None:
        """Run the first epoch, which starts the workers, and add them to `others`."""
        self.epoch(0)
        started = set(psutil.Process().children()) - others
        self.processes.extend(started)
        others |= started

    def measure(self, number: int) -> None:
        """Measure one epoch."""
        processor, start = self._processor(), time.perf_counter()
        clips = self.epoch(number)
        self.speeds.append(clips / (time.perf_counter() - start))
        self.costs.append((self._processor() - processor) / clips)

    def _processor(self) -> float:
        times = [process.cpu_times() for process in self.processes]
        return sum(each.user + each.system for each in times)


def loading(rounds: int = 7, workers: int = 2, epochs: int = 20, fraction: float = 1.0) -> None:
    """Print both tables.

    Args:
        rounds: Measured epochs of each loader, after one to warm up.
        workers: Processes of each loader that decode or read.
        epochs: Epochs of the memory measurement.
        fraction: Fraction of the usual number of clips.
    """
    if epochs < 2:
        raise UserError(f"epochs={epochs} must be at least 2: memory is compared from the second on.")
    torch.set_num_threads(1)
    print(
        f"python -m tests.benchmarks.loading --rounds {rounds} --workers {workers} --epochs {epochs} "
        f"--fraction {fraction:g}"
    )
    print(_machine())
    with tempfile.TemporaryDirectory() as name:
        shards = {
            Path(name) / str(i): replace(each, clips=round(fraction * each.clips)) for i, each in enumerate(FOOTAGE)
        }
        for folder, footage in shards.items():
            _write_shards(folder, footage)
        print(
            "\n| clips | | clips/s | frames/s | processor ms per clip "
            "| speed of ours relative to it (by processor time) |"
        )
        print("|---" * 6 + "|")
        for folder, footage in shards.items():
            _compare(folder, footage, rounds, workers)
        print(f"\n| clips | | process | RSS (USS) after epoch 2, MiB | after epoch {epochs} | most | growth |")
        print("|---" * 7 + "|")
        for folder, footage in shards.items():
            for kind in ("video", "tokens"):
                _watch(f"| {footage} | {kind} |", _module(folder, kind, footage, workers), epochs)


def _write_shards(folder: Path, footage: Footage) -> None:
    """Write video shards, and token shards of the same clips."""
    rng = np.random.default_rng(footage.pixels)
    videos_by_colour = [
        encode_mp4(_draw(footage, ShapeClip(c, "circle", "right", "large", "fast", 0, 20)), footage.fps)
        for c in COLOURS
    ]
    size = math.ceil(footage.clips / SHARDS)
    shape = (footage.frames // footage.stride, footage.grid, footage.grid)
    with ShardWriter(folder / "video", size) as videos, ShardWriter(folder / "tokens", size) as tokens:
        for i in range(footage.clips):
            caption = f"a large {COLOURS[i % len(COLOURS)]} circle moves right fast"
            sample = {"__key__": f"{i:06d}", "json": {"caption": caption}}
            videos.write({**sample, "mp4": videos_by_colour[i % len(COLOURS)], "txt": caption})
            arrays = {
                "tokens.npy": rng.integers(2**14, size=shape, dtype=np.uint16),
                "text.npy": rng.normal(size=(rng.integers(*TEXT_TOKENS), WIDTH)).astype(np.float16),
            }
            tokens.write({**sample, **arrays})


def _draw(footage: Footage, clip: ShapeClip) -> UInt8[Tensor, "t c height width"]:
    """Draw a shape on a soft pattern that moves two pixels per frame, with noise of a few grey levels."""
    rng = torch.Generator().manual_seed(len(clip.colour))
    shape = F.interpolate(render(clip).float(), footage.pixels)
    pattern = F.interpolate(torch.rand(1, 3, 8, 8, generator=rng) * 192, footage.pixels, mode="bicubic")[0]
    frames = torch.empty(footage.frames, 3, footage.pixels, footage.pixels, dtype=torch.uint8)
    for t, frame in enumerate(frames):
        picture = pattern.roll(2 * t, -1) + shape[min(t, len(shape) - 1)] / 4
        frame[:] = (picture + torch.randn(frame.shape, generator=rng) * 3).clamp(0, 255)
    return frames


def _compare(folder: Path, footage: Footage, rounds: int, workers: int) -> None:
    """Print the rows of the first table."""
    modules = {kind: _module(folder, kind, footage, workers) for kind in ("video", "tokens")}
    others = set(psutil.Process().children())
    with _decord_alone(modules["video"], workers) as decord_alone:
        contenders = {
            "decord alone": Contender(decord_alone),
            "webdataset": Contender(_web_epochs(folder / "video", footage, workers)),
            "ours": Contender(_epochs(modules["video"])),
            "webdataset, tokens": Contender(_web_epochs(folder / "tokens", footage, workers)),
            "ours, tokens": Contender(_epochs(modules["tokens"])),
        }
        for contender in contenders.values():
            contender.warm_up(others)
        order = np.random.default_rng(0)
        for number in range(1, rounds + 1):
            for name in order.permutation(list(contenders)):
                contenders[name].measure(number)
    pairs = {
        "decord alone": "ours",
        "webdataset": "ours",
        "ours": "ours, tokens",
        "webdataset, tokens": "ours, tokens",
    }
    for name, contender in contenders.items():
        speed, relative = statistics.median(contender.speeds), "–"
        if name in pairs:
            ours = contenders[pairs[name]]
            faster = statistics.median(a / b for a, b in zip(ours.speeds, contender.speeds, strict=True))
            cheaper = sum(contender.costs) / sum(ours.costs)  # the system counts it in hundredths of a second
            relative = f"{faster:.2f} ({cheaper:.2f})"
        cost = 1000 * statistics.median(contender.costs)
        print(f"| {footage} | {name} | {speed:.0f} | {speed * FRAMES:.0f} | {cost:.3g} | {relative} |", flush=True)


def _watch(head: str, module: ShardDataModule, epochs: int) -> None:
    """Print the rows of the second table."""
    contender = Contender(_epochs(module))
    contender.warm_up(set(psutil.Process().children()))
    memory = []
    for number in range(1, epochs):
        contender.epoch(number)
        usage = [process.memory_full_info() for process in contender.processes]
        memory.append([(info.rss / 2**20, info.uss / 2**20) for info in usage])
    for i, (first, last, most) in enumerate(zip(memory[0], memory[-1], np.max(memory, axis=0), strict=True)):
        cells = [f"{rss:.1f} ({uss:.1f})" for rss, uss in (first, last, most)]
        print(f"{head} {f'worker {i}' if i else 'main'} | {' | '.join(cells)} | {last[0] / first[0] - 1:+.2%} |")


def _module(folder: Path, kind: str, footage: Footage, workers: int) -> ShardDataModule:
    path = str(folder / kind)
    if kind == "video":
        return VideoDataModule(path, path, footage.size, FRAMES, FPS, footage.batch_size, workers)
    return TokenDataModule(path, path, FRAMES, footage.batch_size, workers)


def _epochs(module: ShardDataModule) -> Callable[[int], int]:
    """Return a function that runs an epoch of our training loader, as the trainer does."""
    loader: Any = module.train_dataloader()

    def epoch(number: int) -> int:
        loader.progress = lambda: (number, 0)
        return sum(len(batch.keys) for batch in loader)

    return epoch


def _web_epochs(folder: Path, footage: Footage, workers: int) -> Callable[[int], int]:
    """Return a function that runs an epoch of webdataset's loader of the same batches."""
    shards = sorted(map(str, folder.glob("*.tar")))
    decoded = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000)
    if folder.name == "video":
        clips = decoded.decode(partial(_decode_window, footage)).to_tuple("mp4", "txt", "__key__").map(_video_clip)
        collate: Any = VideoClips.collate
    else:
        clips, collate = decoded.decode().map(_token_clip), TokenClips.collate
    batches = clips.batched(footage.batch_size, collation_fn=collate)
    loader = webdataset.WebLoader(batches, batch_size=None, num_workers=workers, persistent_workers=True)
    return lambda number: sum(len(batch.keys) for batch in loader)


def _decode_window(footage: Footage, extension: str, content: bytes) -> Tensor | None:
    if extension != ".mp4":
        return None
    reader = decord.VideoReader(io.BytesIO(content), num_threads=1)
    start = _rng.integers(len(reader) - footage.stride * (FRAMES - 1))
    frames = reader.get_batch([start + footage.stride * t for t in range(FRAMES)])
    return resize_and_crop(torch.from_dlpack(frames.to_dlpack()).permute(0, 3, 1, 2), footage.size)


def _video_clip(sample: tuple[Tensor, str, str]) -> VideoClip:
    video, caption, key = sample
    return VideoClip(video, [caption], key)


def _token_clip(sample: dict[str, Any]) -> TokenClip:
    start = _rng.integers(len(sample["tokens.npy"]) - FRAMES + 1)
    tokens = sample["tokens.npy"][start : start + FRAMES].astype(np.int64)
    text = torch.from_numpy(sample["text.npy"].astype(np.float32))
    return TokenClip(torch.from_numpy(tokens), text, sample["json"]["caption"], sample["__key__"])


@contextmanager
def _decord_alone(module: ShardDataModule, workers: int) -> Iterator[Callable[[int], int]]:
    """Yield a function that decodes the frames of an epoch of our plan; the processes return only their number."""
    clips = module.clips(module.train, training=True)
    plan = Plan(clips.shard_sizes, module.seed, clips.buckets, clips.fits)
    (bucket,) = clips.buckets
    contents = [clips.shards.read(sample, "mp4")["mp4"] for sample in clips.samples]
    with get_context("fork").Pool(workers, _contents.extend, [contents]) as pool:

        def epoch(number: int) -> int:
            draws = [draw for batch in plan.batches(number) for draw in batch.draws]
            jobs = [(d.sample, clips.window(clips.samples[d.sample], bucket, d.rng()).tolist()) for d in draws]
            return sum(pool.imap_unordered(_get_batch, jobs, chunksize=bucket.batch_size))

        yield epoch
    _contents.clear()


_contents: list[bytes] = []
"""The files, in a process that decodes with decord alone."""
_rng = np.random.default_rng()
"""Generator of webdataset's windows."""


def _get_batch(job: tuple[int, list[int]]) -> int:
    index, window = job
    frames = decord.VideoReader(io.BytesIO(_contents[index]), num_threads=1).get_batch(window)
    return frames.shape[0] // FRAMES


def _machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    libraries = {m.__name__: m.__version__ for m in (torch, decord, webdataset, np, fsspec)}
    return (
        f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.machine()}; Python {platform.python_version()}, "
        + ", ".join(f"{name} {version}" for name, version in libraries.items())
    )


if __name__ == "__main__":
    run_tool(loading)
