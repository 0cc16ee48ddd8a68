"""The planner compared with real training steps, and the largest models for one card.

Run by `python -m tests.benchmarks.memory --what WHAT`:

- `peaks`: peak memory of training steps on the CPU, predicted and measured, each in a process of its own. Measured is
  the peak (VmHWM, reset by /proc/self/clear_refs) minus the memory before the model was built. glibc is configured to
  return freed memory at once, so that the peak contains no cached memory.
- `checkpointing`: memory and time by activation checkpointing at 107 M parameters, interleaved. Run nothing else.
- `loading`: peak memory of loading an exported model of 107 M parameters on the CPU, by type and kind of weights.
- `largest`: the largest models with the proportions of configs/transformer/8b.yaml that fit one card; planned only.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
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
from t2v.generation.parallel import most_positions
from t2v.generation.text_to_video import TextToVideo
from t2v.losses.tokens import token_loss_
from t2v.text import MiniLMTextEncoder
from t2v.training.optimization import parameter_groups
from t2v.training.planner.budget import (
    TrainingBudget,
    decoding_bytes,
    generation_budget,
    model_sizes,
    optimizer_bytes,
    training_budget,
)
from t2v.training.planner.stages import transformer_step
from t2v.training.planner.step import precision_dtypes
from t2v.transformer.config import AttentionConfig, TextConfig
from t2v.transformer.model import VideoTransformer
from t2v.vqvae.model import VQVAE
from t2v.vqvae.quantizer import VectorQuantizer
from tests.support.loading import peak_of_loading

GB, GRID, TEXT_DIM, TEXT_LENGTH = 1e9, 16, 384, 16
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
        """Build the transformer; with width 768 and 7 + 5 layers it has 107 M parameters."""
        return VideoTransformer(
            16384 if self.dim >= 768 else 4096,
            GRID,
            self.dim,
            self.spatial,
            self.temporal,
            hidden_dim=self.dim * 13 // 6 // 32 * 32,
            attention=AttentionConfig(heads=self.dim // 64, kv_heads=self.dim // 192 or 1),
            text=TextConfig(TEXT_DIM),
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
    what: Literal["peaks", "checkpointing", "loading", "largest"] = "peaks", memory: float = 80.0, rounds: int = 3
) -> None:
    """Print tables.

    Args:
        what: The measurement.
        memory: Memory of the card for `largest`, in GB.
        rounds: Repetitions of each level of `checkpointing`.
    """
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {platform.machine()}\n")
    if what == "peaks":
        _peaks()
    elif what == "checkpointing":
        _checkpointing(rounds)
    elif what == "loading":
        _loading()
    else:
        _largest(memory * GB)


def _peaks() -> None:
    print("| parameters | clips × frames | checkpointing | optimizer | precision | predicted | measured | error |")
    print("|---|---|---|---|---|---|---|---|")
    for point in POINTS:
        model = point.model("meta")
        predicted = _predicted(point).peak
        measured = _measured(point, steps=2)
        assert measured["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        print(
            f"| {measured['parameters'] / 1e6:.1f} M | {point.clips} × {point.frames} | {point.checkpointing} | "
            f"{point.optimizer} | {point.precision} | {predicted / GB:.3f} GB | {measured['peak'] / GB:.3f} GB | "
            f"{predicted / measured['peak'] - 1:+.1%} |",
            flush=True,
        )


def _checkpointing(rounds: int) -> None:
    """Activations are the peak minus weights, gradients and optimizer state."""
    points = [POINTS[-2]._replace(checkpointing=level) for level in ("none", "attention", "full")]
    states = sum(_predicted(points[0])[:3])
    peaks = [_measured(point, steps=2)["peak"] - states for point in points]
    seconds: list[list[float]] = [[] for _ in points]
    for _ in range(rounds):
        for times, point in zip(seconds, points, strict=True):
            times.append(_measured(point, steps=3)["seconds"])
    medians = [statistics.median(times) for times in seconds]
    print("| activation checkpointing | activations | saved | s/step | slower |\n|---|---|---|---|---|")
    for point, peak, median in zip(points, peaks, medians, strict=True):
        print(
            f"| {point.checkpointing} | {peak / GB:.2f} GB | {1 - peak / peaks[0]:.0%} | {median:.2f} | "
            f"{median / medians[0] - 1:.0%} |"
        )


def _loading() -> None:
    vqvae = VQVAE(image_size=128, base_channels=8, latent_patch_size=1, quantizer=VectorQuantizer(16384))
    model = TextToVideo(POINTS[-1].model("cpu"), vqvae, MiniLMTextEncoder(), fps=8.0)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        model.save_pretrained(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        print(f"files: {size / 1e6:.0f} MB\n\n| dtype | weights | peak |\n|---|---|---|")
        for dtype, weights in (("float32", "full"), ("bfloat16", "full"), ("bfloat16", "int8"), ("bfloat16", "nf4")):
            print(f"| {dtype} | {weights} | {peak_of_loading(folder, dtype, weights) / 1e6:.0f} MB |", flush=True)


def _predicted(point: Point) -> TrainingBudget:
    model = point.model("meta")
    optimizer = optimizer_bytes(model, OPTIMIZERS[point.optimizer], point.precision, "cpu")
    step = transformer_step(model, point.clips, point.frames, TEXT_LENGTH, point.precision, point.checkpointing, "cpu")
    return training_budget(model_sizes(model), step, optimizer, point.precision)


def _measured(point: Point, steps: int) -> dict[str, Any]:
    """Measure in a process of its own."""
    # Otherwise glibc keeps freed memory, up to a third of the peak.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, "--task", json.dumps([*point, steps])],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _task(point: Point, steps: int) -> None:
    """Train a tiny model, so that all code is loaded, and then the model of the point."""
    _train(point._replace(dim=192, spatial=1, temporal=1, clips=1, frames=2), 1)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    count, seconds = _train(point, steps)
    print(json.dumps({"parameters": count, "peak": _status("VmHWM") - before, "seconds": seconds}))


def _train(point: Point, steps: int) -> tuple[int, float]:
    """Train in Lightning's order, which releases old gradients between forward and backward pass.

    Returns:
        The number of parameters, and the seconds of the last step.
    """
    torch.manual_seed(0)
    dtype, autocast_dtype = precision_dtypes(point.precision)
    model = point.model("cpu").to(dtype)
    optimizer = OPTIMIZERS[point.optimizer](parameter_groups(model), lr=1e-4)
    tokens = torch.randint(model.vocab_size, (point.clips, point.frames, GRID, GRID))
    embedded = torch.randn(point.clips, TEXT_LENGTH, TEXT_DIM, dtype=dtype)
    text = TextEmbedding(embedded, torch.ones(point.clips, TEXT_LENGTH, dtype=torch.bool))
    drop = torch.zeros(point.clips, dtype=torch.bool)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast_dtype is not None):
            loss = token_loss_(model(tokens, text, drop), tokens, z_loss=1e-4).objective
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        del loss
        times.append(time.perf_counter() - start)
    return sum(parameter.numel() for parameter in model.parameters()), times[-1]


def _status(key: str) -> int:
    """Return a figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


def _largest(memory: float) -> None:
    """Models with the proportions of 8b.yaml: head width 128, four query heads per key head, 3:2 spatial layers."""
    rows: list[tuple[str, float, Callable[[VideoTransformer], int]]] = [
        (
            "training, bf16-mixed, fused AdamW, activation checkpointing full",
            16,
            _training("bf16-mixed", OPTIMIZERS["AdamW"]),
        ),
        (
            "training, bf16-mixed, AdamW8bit, activation checkpointing full",
            10,
            _training("bf16-mixed", OPTIMIZERS["AdamW8bit"]),
        ),
        (
            "training, bf16-true, AdamW8bit, activation checkpointing full",
            6,
            _training("bf16-true", OPTIMIZERS["AdamW8bit"]),
        ),
    ]
    decoder = sum(decoding_bytes(VQVAE(512), torch.bfloat16, 1))
    for name, weights, bytes_each in (("bf16", "full", 2), ("fp8", "fp8", 1), ("int8", "int8", 1), ("nf4", "nf4", 0.5)):
        rows.append((f"generation, weights in {name}", bytes_each, _generation(weights, decoder)))
    print(f"| one card of {memory / GB:g} GB | parameters | layers | width | memory |\n|---|---|---|---|---|")
    for name, bytes_each, required in rows:
        best = max((_deepest(heads, bytes_each, required, memory) for heads in range(16, 200, 4)), key=_parameters)
        print(
            f"| {name} | {_parameters(best) / 1e9:.1f} B | {len(best.blocks)} | {len(best.start)} | "
            f"{required(best) / GB:.1f} GB |",
            flush=True,
        )


def _scaled(heads: int, fives: int) -> VideoTransformer:
    """Build a model with `heads` query heads and five times `fives` layers."""
    return VideoTransformer(
        dim=128 * heads,
        spatial_layers=3 * fives,
        temporal_layers=2 * fives,
        hidden_dim=288 * heads,
        attention=AttentionConfig(heads, heads // 4),
        device="meta",
    )


def _deepest(
    heads: int, bytes_each: float, required: Callable[[VideoTransformer], int], memory: float
) -> VideoTransformer:
    """Return the deepest model of a width that fits, with 0.8 to 2 layers per head; the smallest if none fits.

    Args:
        heads: Query heads, which set the width.
        bytes_each: Lower bound of the bytes of a parameter.
        required: Returns the bytes of a model.
        memory: Bytes of the card.
    """
    least, most = math.ceil(4 * heads / 25), 2 * heads // 5
    first, second = (_parameters(_scaled(heads, fives)) for fives in (1, 2))
    fives = 1 + int((memory / bytes_each - first) // (second - first))
    if fives > most:
        return _scaled(4, 1)  # a wider one is larger
    while fives >= least:
        model = _scaled(heads, fives)
        if required(model) <= memory:
            return model
        fives -= 1
    return _scaled(4, 1)


def _training(precision: str, optimizer: Any) -> Callable[[VideoTransformer], int]:
    def required(model: VideoTransformer) -> int:
        state = optimizer_bytes(model, optimizer, precision)
        step = transformer_step(model, 1, 32, 256, precision, "full")
        return training_budget(model_sizes(model), step, state, precision).peak

    return required


def _generation(weights: Any, decoder: int) -> Callable[[VideoTransformer], int]:
    def required(model: VideoTransformer) -> int:
        positions = most_positions("auto", rows=2)
        return sum(generation_budget(model, weights, torch.bfloat16, 1, 256, True, positions)) + decoder

    return required


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    if "--task" in sys.argv:
        *fields, steps = json.loads(sys.argv[-1])
        _task(Point(*fields), steps)
    else:
        run_tool(measure)
