"""Time and memory to index shards at first sight: `python -m tests.benchmarks.indexing`.

The shards have no index: one of many video clips, one of many token samples, and many of a few clips. Each set is
opened in a process of its own, which has loaded the libraries before, once without and once with the stored indices.
Seconds are those of the clock, and of the processor in parentheses.
"""

import io
import json
import os
import platform
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from threading import Event

import numpy as np
import psutil

from data.examples.shapes import COLOURS, ShapeClip, render
from data.shards import ShardSet
from t2v.errors import run_tool
from t2v.video import encode_mp4


def indexing(samples: int = 10_000, shards: int = 1000, clips: int = 10) -> None:
    """Print the table.

    Args:
        samples: Samples of the large shards.
        shards: Number of small shards.
        clips: Clips of each small shard.
    """
    print(f"python -m tests.benchmarks.indexing --samples {samples} --shards {shards} --clips {clips}")
    print(
        f"{os.cpu_count()} cores, {platform.machine()}; Python {platform.python_version()}; load {os.getloadavg()[0]}"
    )
    print("\n| shards | samples | first sight, s | again, s | memory of the first sight, MiB |")
    print("|---" * 5 + "|")
    with tempfile.TemporaryDirectory() as name:
        sets = {
            "1 of videos": [_video_members(samples)],
            "1 of tokens": [_token_members(samples)],
            f"{shards:,} of videos": [_video_members(clips)] * shards,
        }
        for kind, contents in sets.items():
            folder = Path(name) / kind
            folder.mkdir()
            for number, members in enumerate(contents):
                _write_tar(folder / f"{number:06d}.tar", members)
            with get_context("spawn").Pool(1) as pool:
                found, first, again, memory = pool.apply(_open, [folder])
            print(f"| {kind} | {found:,} | {first} | {again} | {memory:.0f} |", flush=True)


def _open(folder: Path) -> tuple[int, str, str, float]:
    process = psutil.Process()
    before = most = process.memory_info().rss
    done = Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.01):
            most = max(most, process.memory_info().rss)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(watch)
        first, shards = _timed(folder)
        done.set()
    again, _ = _timed(folder)
    return len(shards), first, again, (most - before) / 2**20


def _timed(folder: Path) -> tuple[str, ShardSet]:
    wall, cpu = time.perf_counter(), time.process_time()
    shards = ShardSet(folder)
    return f"{time.perf_counter() - wall:.2f} ({time.process_time() - cpu:.2f})", shards


def _video_members(samples: int) -> list[tuple[str, bytes]]:
    mp4s = [encode_mp4(render(ShapeClip(c, "circle", "right", "large", "fast", 0, 16)), 8) for c in COLOURS]
    return [
        (f"{i:06d}.{extension}", content)
        for i in range(samples)
        for extension, content in (
            ("json", json.dumps({"caption": f"clip {i}"}).encode()),
            ("mp4", mp4s[i % len(mp4s)]),
            ("txt", f"clip {i}".encode()),
        )
    ]


def _token_members(samples: int) -> list[tuple[str, bytes]]:
    rng = np.random.default_rng(0)
    arrays = {
        "text.npy": np.zeros((8, 384), np.float16),
        "tokens.npy": rng.integers(2**14, size=(16, 4, 4), dtype=np.uint16),
    }
    files = {}
    for name, array in arrays.items():
        file = io.BytesIO()
        np.save(file, array)
        files[name] = file.getvalue()
    return [
        (f"{i:06d}.{extension}", content)
        for i in range(samples)
        for extension, content in {"json": json.dumps({"caption": f"clip {i}"}).encode(), **files}.items()
    ]


def _write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    run_tool(indexing)
