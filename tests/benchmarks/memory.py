"""The planner against reality, and what it says of 80 GB: `python -m tests.benchmarks.memory`.

- `peaks`: most memory of real training steps on the CPU beside the planner's figure. Every line is a process of its
  own; what it held before the model was built is taken off its peak (VmHWM, set back by /proc/self/clear_refs). glibc
  is told to give memory back at once, so that the peak is what the step needed and not what was kept for later.
- `checkpointing`: memory and time of the levels at 107 M parameters, by turns in the same run. Let nothing else run.
- `largest`: the largest models of the family of configs/transformer/8b.yaml that fit one card; nothing is measured.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import bitsandbytes
import torch
from torch import nn

from t2v.batch import TextEmbedding
from t2v.errors import run_tool
from t2v.losses.tokens import token_loss
from t2v.training.optimization import parameter_groups
from t2v.training.planner.budget import (
    Generation,
    OptimizerBytes,
    decode,
    generate,
    optimizer_bytes,
    train,
    transformer_step,
    types,
)
from t2v.transformer.config import AttentionConfig, TextConfig
from t2v.transformer.model import VideoTransformer
from t2v.vqvae.model import VQVAE

GB, GRID, TEXT, WORDS = 1e9, 16, 384, 16
OPTIMIZERS: dict[str, Any] = {
    "AdamW": partial(torch.optim.AdamW, fused=True),
    "AdamW8bit": bitsandbytes.optim.AdamW8bit,
    "SGD": torch.optim.SGD,
}


class Point(NamedTuple):
    """A training run to measure."""

    dim: int
    spatial: int
    temporal: int
    clips: int
    frames: int
    checkpointing: str
    optimizer: str
    precision: str

    def model(self, device: str) -> VideoTransformer:
        """The transformer; 768 wide, with 7 and 5 layers, it has 107 M parameters."""
        return VideoTransformer(
            16384 if self.dim >= 768 else 4096,
            GRID,
            self.dim,
            self.spatial,
            self.temporal,
            hidden_dim=self.dim * 13 // 6 // 32 * 32,
            attention=AttentionConfig(heads=self.dim // 64, kv_heads=self.dim // 192 or 1),
            text=TextConfig(TEXT),
            tied_head=self.dim >= 768,
            checkpointing=self.checkpointing,  # type: ignore[arg-type]
            device=device,
        )


POINTS = (
    Point(384, 3, 2, 4, 4, "none", "AdamW", "32-true"),
    Point(384, 3, 2, 4, 4, "full", "AdamW", "32-true"),
    Point(384, 3, 2, 8, 4, "none", "SGD", "bf16-mixed"),
    Point(576, 6, 4, 2, 4, "attention", "AdamW", "32-true"),
    Point(576, 6, 4, 2, 4, "full", "AdamW8bit", "bf16-mixed"),
    Point(768, 7, 5, 1, 4, "none", "AdamW", "bf16-mixed"),
    Point(768, 7, 5, 2, 2, "full", "AdamW", "bf16-mixed"),
    Point(768, 7, 5, 2, 2, "attention", "AdamW8bit", "32-true"),
)


def measure(
    what: Literal["peaks", "checkpointing", "largest"] = "peaks", memory: float = 80.0, rounds: int = 3
) -> None:
    """Prints tables.

    Args:
        what: which figures.
        memory: GB of the card that `largest` is for.
        rounds: steps of each level that `checkpointing` times.
    """
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {platform.machine()}\n")
    {"peaks": _peaks, "checkpointing": lambda: _checkpointing(rounds), "largest": lambda: _largest(memory * GB)}[what]()


def _peaks() -> None:
    print("| parameters | clips × frames | recomputing | optimizer | precision | predicted | measured | off |")
    print("|---|---|---|---|---|---|---|---|")
    for point in POINTS:
        model = point.model("meta")
        predicted = _predicted(point).peak
        found = _measured(point, steps=2)
        assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        print(
            f"| {found['parameters'] / 1e6:.1f} M | {point.clips} × {point.frames} | {point.checkpointing} | "
            f"{point.optimizer} | {point.precision} | {predicted / GB:.3f} GB | {found['peak'] / GB:.3f} GB | "
            f"{predicted / found['peak'] - 1:+.1%} |",
            flush=True,
        )


def _checkpointing(rounds: int) -> None:
    """Activations are what the peak holds beside weights, gradients and the optimizer's state."""
    points = [POINTS[-2]._replace(checkpointing=level) for level in ("none", "attention", "full")]
    states = sum(_predicted(points[0])[:3])
    peaks = [_measured(point, steps=2)["peak"] - states for point in points]
    seconds: list[list[float]] = [[] for _ in points]
    for _ in range(rounds):
        for times, point in zip(seconds, points, strict=True):
            times.append(_measured(point, steps=3)["seconds"])
    medians = [statistics.median(times) for times in seconds]
    print("| recomputing | activations | less | seconds a step | more |\n|---|---|---|---|---|")
    for point, peak, median in zip(points, peaks, medians, strict=True):
        print(
            f"| {point.checkpointing} | {peak / GB:.2f} GB | {1 - peak / peaks[0]:.0%} | {median:.2f} | "
            f"{median / medians[0] - 1:.0%} |"
        )


def _predicted(point: Point) -> Any:
    model = point.model("meta")
    optimizer = optimizer_bytes(model, OPTIMIZERS[point.optimizer], point.precision, "cpu")
    step = transformer_step(model, point.clips, point.frames, WORDS, point.precision, point.checkpointing, "cpu")
    return train(model, step, optimizer, point.precision)


def _measured(point: Point, steps: int) -> dict[str, Any]:
    """What a process of its own finds."""
    # Without these glibc keeps what was freed: up to a third of the peak would be memory nobody holds.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, "--task", json.dumps([*point, steps])],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _task(point: Point, steps: int) -> None:
    """Trains a tiny model, so that all code is loaded, and then the one that is asked for."""
    _train(point._replace(dim=192, spatial=1, temporal=1, clips=1, frames=2), 1)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    count, seconds = _train(point, steps)
    print(json.dumps({"parameters": count, "peak": _status("VmHWM") - before, "seconds": seconds}))


def _train(point: Point, steps: int) -> tuple[int, float]:
    """Steps in Lightning's order: gradients of the step before are dropped between forward and backward pass."""
    torch.manual_seed(0)
    dtype, half = types(point.precision)
    model = point.model("cpu").to(dtype)
    optimizer = OPTIMIZERS[point.optimizer](parameter_groups(model), lr=1e-4)
    tokens = torch.randint(model.vocab_size, (point.clips, point.frames, GRID, GRID))
    words = torch.randn(point.clips, WORDS, TEXT, dtype=dtype)
    text = TextEmbedding(words, torch.ones(point.clips, WORDS, dtype=torch.bool), words.mean(1))
    drop = torch.zeros(point.clips, dtype=torch.bool)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=half is not None):
            loss = token_loss(model(tokens, text, drop), tokens, z_loss=1e-4).objective
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        del loss
        times.append(time.perf_counter() - start)
    return sum(parameter.numel() for parameter in model.parameters()), times[-1]


def _status(key: str) -> int:
    """A figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


def _largest(memory: float) -> None:
    """Models of 8b.yaml's shape: heads of 128, four to a key head; three of five layers are spatial."""
    rows: list[tuple[str, float, Callable[[VideoTransformer], float]]] = [
        ("training, bf16-mixed, fused AdamW, recomputing full", 16, _training("bf16-mixed", OPTIMIZERS["AdamW"])),
        ("training, bf16-mixed, AdamW8bit, recomputing full", 10, _training("bf16-mixed", OPTIMIZERS["AdamW8bit"])),
        ("training, bf16-true, AdamW8bit, recomputing full", 6, _training("bf16-true", OPTIMIZERS["AdamW8bit"])),
    ]
    decoder = sum(decode(VQVAE(512), torch.bfloat16, 1))
    for name, weights, each in (("bf16", "full", 2), ("fp8", "fp8", 1), ("int8", "int8", 1), ("nf4", "nf4", 0.5)):
        rows.append((f"generating, weights in {name}", each, _generating(weights, decoder)))
    print(f"| one card of {memory / GB:g} GB | parameters | layers | width | takes |\n|---|---|---|---|---|")
    for name, each, takes in rows:
        best = max((_deepest(heads, each, takes, memory) for heads in range(16, 200, 4)), key=_parameters)
        print(
            f"| {name} | {_parameters(best) / 1e9:.1f} B | {len(best.blocks)} | {len(best.start)} | "
            f"{takes(best) / GB:.1f} GB |",
            flush=True,
        )


def _family(heads: int, fives: int) -> VideoTransformer:
    return VideoTransformer(
        dim=128 * heads,
        spatial_layers=3 * fives,
        temporal_layers=2 * fives,
        hidden_dim=288 * heads,
        attention=AttentionConfig(heads, heads // 4),
        device="meta",
    )


def _deepest(heads: int, each: float, takes: Callable[[VideoTransformer], float], memory: float) -> VideoTransformer:
    """The deepest of a width that fits, of 0.8 to 2 layers a head; the smallest where none fits.

    Args:
        heads: what the width follows from.
        each: bytes that a parameter takes at least.
        takes: bytes that a model takes.
        memory: bytes of the card.
    """
    least, most = -(-4 * heads // 25), 2 * heads // 5
    first, second = (_parameters(_family(heads, fives)) for fives in (1, 2))
    fives = 1 + int((memory / each - first) // (second - first))
    if fives > most:
        return _family(4, 1)  # a wider one is larger
    while fives >= least:
        model = _family(heads, fives)
        if takes(model) <= memory:
            return model
        fives -= 1
    return _family(4, 1)


def _training(precision: str, optimizer: Any) -> Callable[[VideoTransformer], float]:
    def takes(model: VideoTransformer) -> float:
        state: OptimizerBytes = optimizer_bytes(model, optimizer, precision)
        return train(model, transformer_step(model, 1, 32, 256, precision, "full"), state, precision).peak

    return takes


def _generating(weights: Any, decoder: int) -> Callable[[VideoTransformer], float]:
    def takes(model: VideoTransformer) -> float:
        made: Generation = generate(model, weights, torch.bfloat16, 1, 256, True)
        return sum(made) + decoder

    return takes


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    if "--task" in sys.argv:
        *fields, steps = json.loads(sys.argv[-1])
        _task(Point(*fields), steps)
    else:
        run_tool(measure)
