"""A training step of the VQ-VAE relative to an earlier commit, and its most expensive operators.

`python -m tests.benchmarks.training_step --against COMMIT` checks the commit out in a temporary folder, trains the same
sizes on the same clips with both, interleaved, and compares Lightning's profile of `run_training_batch`. Then it
profiles one step: its floating-point rate relative to a matrix product on this machine, and the three most expensive
operators.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from data.examples.footage import copy_footage
from data.prepare import prepare
from t2v.errors import run_tool
from t2v.losses import L1Loss, L2Loss, LossTerm, MobileNetLoss, TemporalDifferenceLoss
from t2v.vqvae.model import VQVAE
from t2v.vqvae.quantizer import VectorQuantizer

ROOT = Path(__file__).parents[2]
EARLIER_SIZES = """
trainer:
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {dirpath: "${trainer.default_root_dir}/vqvae/checkpoints", save_last: true}
model:
  init_args:
    model: {init_args: {latent_patch_size: 2}}
    losses:
      - class_path: t2v.losses.L1Loss
      - class_path: t2v.losses.L2Loss
      - class_path: t2v.losses.TemporalDifferenceLoss
        init_args: {weight: 0.5}
      - class_path: t2v.losses.MobileNetLoss
        init_args: {weight: 0.1, frames: 4}
data: {init_args: {crop: 1.0, flip: false, frames: 2, fps: 8, batch_size: 8}}
"""
"""Changes `configs/vqvae/footage.yaml` to the sizes that it had at the earlier commit."""


def compare(against: str = "", steps: int = 300, rounds: int = 2, precision: str = "bf16-mixed") -> None:
    """Train `configs/vqvae/footage.yaml` at two commits for speed and quality, then profile this one.

    Args:
        against: The earlier commit; only the profile without one.
        steps: Training steps of each run.
        rounds: Runs of each commit, interleaved, each with its own seed.
        precision: Name of the Lightning precision.
    """
    if against:
        with tempfile.TemporaryDirectory() as folder:
            _compare_commits(Path(folder), against, steps, rounds, precision)
    _profile(precision)


def _compare_commits(folder: Path, against: str, steps: int, rounds: int, precision: str) -> None:
    copy_footage(folder / "clips")
    for part in ("train", "val"):
        prepare(folder / "clips" / part, folder / "shards" / part, size=128, frames=8)
    (folder / "sizes.yaml").write_text(EARLIER_SIZES)
    earlier = folder / "earlier"
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", earlier, against], cwd=ROOT, check=True)
    try:
        results: dict[Path, list[tuple[float, float]]] = {earlier: [], ROOT: []}
        for seed in range(rounds):
            for tree, values in results.items():
                overlay = ["-c", str(folder / "sizes.yaml")] if tree == ROOT else []
                values.append(_train(tree, folder, overlay, steps, precision, seed))
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", earlier], cwd=ROOT, check=True)
    mean = {tree: [statistics.mean(column) for column in zip(*values, strict=True)] for tree, values in results.items()}
    for name, tree in ((against, earlier), ("this tree", ROOT)):
        seconds, psnr = mean[tree]
        runs = ", ".join(f"{1e3 * seconds:.0f} ms and {psnr:.2f} dB" for seconds, psnr in results[tree])
        print(f"{name}: {1e3 * seconds:.0f} ms per step, {16 / seconds:.0f} frames/s, {psnr:.2f} dB ({runs})")
    print(f"{mean[earlier][0] / mean[ROOT][0]:.2f} times the speed of {against}")


def _train(tree: Path, folder: Path, overlay: list[str], steps: int, precision: str, seed: int) -> tuple[float, float]:
    """Return the seconds of a training step, and the PSNR on held-out clips after training."""
    run = folder / tree.name / str(seed)
    settings = {"class_path": "SimpleProfiler", "init_args": {"dirpath": str(run), "filename": "profile"}}
    flags = ["-c", "configs/vqvae/footage.yaml", *overlay, "--trainer.precision", precision]
    flags += ["--data.train", str(folder / "shards/train"), "--data.val", str(folder / "shards/val")]
    flags += ["--trainer.default_root_dir", str(run), "--seed_everything", str(seed)]
    fit = ["--trainer.max_steps", str(steps), "--trainer.limit_val_batches", "0", "--trainer.profiler"]
    cli = [sys.executable, "cli.py"]
    subprocess.run([*cli, "fit", *flags, *fit, json.dumps(settings)], cwd=tree, check=True, capture_output=True)
    validate = [*cli, "validate", *flags, "--ckpt_path", "last", "--data.frames", "8"]
    measured = subprocess.run(validate, cwd=tree, check=True, capture_output=True, text=True).stdout
    seconds = re.search(r"run_training_batch\s*\|\s*([\d.e-]+)", (run / "fit-profile.txt").read_text())
    psnr = re.search(r"val/psnr\W+([\d.]+)", measured)
    assert seconds is not None
    assert psnr is not None, measured
    return float(seconds[1]), float(psnr[1])


def _profile(precision: str) -> None:
    torch.manual_seed(0)
    model = VQVAE(128, 64, (1, 2), 1, 3, 2, 1, 4, 1, quantizer=VectorQuantizer(1024))
    losses: list[LossTerm] = [L1Loss(), L2Loss(), TemporalDifferenceLoss(0.5), MobileNetLoss(0.1, frames=4)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    video = torch.rand(4, 4, 3, 128, 128) * 2 - 1
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = model(video)
            reconstruction = output.reconstruction.float()
            loss = output.quantizer_loss + sum(term.weight * term(reconstruction, video) for term in losses)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    with FlopCounterMode(display=False) as counter:
        step()
    a = torch.randn(2048, 2048, dtype=dtype)
    peak = 2 * 2048**3 / _best(lambda: a @ a)
    for name in ("eager", "compiled"):
        if name == "compiled":
            model.encoder.compile(dynamic=False)  # dynamic shapes fail in its CPU backend
            model.decoder.compile(dynamic=False)
        seconds = _best(step)
        rate = counter.get_total_flops() / seconds
        print(
            f"{name}: {seconds * 1e3:.0f} ms per step of 16 frames, {16 / seconds:.0f} frames/s, "
            f"{rate / 1e9:.0f} GFLOP/s, {rate / peak:.0%} of a {dtype} matrix product ({peak / 1e9:.0f} GFLOP/s)"
        )
        if name == "eager":
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                step()
            rows = sorted(profiled.key_averages(), key=lambda row: -row.self_cpu_time_total)
            total = sum(row.self_cpu_time_total for row in rows)
            for row in rows[:3]:
                print(f"  {row.key}: {row.self_cpu_time_total / total:.0%}")


def _best(function: Callable[[], object], repeats: int = 15) -> float:
    """Return the seconds of the fastest call, after three warm-up calls."""
    times = []
    for i in range(repeats + 3):
        start = time.perf_counter()
        function()
        if i >= 3:
            times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    run_tool(compare)
