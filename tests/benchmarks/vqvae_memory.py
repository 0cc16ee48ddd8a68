"""Memory of the full-size VQ-VAE: `python -m tests.benchmarks.vqvae_memory`.

Each line is measured in a process of its own: its largest resident set.
"""

import platform
import resource
import subprocess
import sys
import time

import torch

from t2v.errors import run_tool
from t2v.vqvae.model import VQVAE, to_uint8


def measure(image_size: int = 512, precision: str = "bf16", frames: list[int] | None = None) -> None:
    """Train on a 17-frame clip, decode streams of several lengths, and print time and peak memory of each.

    Args:
        image_size: Height and width in pixels: 512, 256 or 128.
        precision: "bf16" (autocast) or "fp32".
        frames: Lengths of the streams; 16, 64 and 300 by default.
    """
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    tasks = [("import only", "nothing", 0), ("forward and backward", "train", 17)]
    tasks += [("streaming decode", "decode", count) for count in frames or [16, 64, 300]]
    for name, task, count in tasks:
        done = subprocess.run(
            [sys.executable, "-m", __spec__.name, "--task", task, str(count), str(image_size), precision],
            capture_output=True,
            text=True,
            check=True,
        )
        print(f"{name:22} {count:4d} frames  {done.stdout.strip()}", flush=True)


def _train(model: VQVAE, frames: int) -> None:
    video = torch.rand(1, frames, 3, model.image_size, model.image_size) * 2 - 1
    output = model.train()(video)
    ((output.reconstruction.float() - video).abs().mean() + output.quantizer_loss).backward()


@torch.inference_mode()
def _decode(model: VQVAE, frames: int) -> None:
    model.eval()
    state, tokens = None, torch.randint(model.codebook_size, (1, frames, model.grid_size, model.grid_size))
    for group in tokens.split(4, dim=1):
        video, state = model.decode_stream(group, state)
        to_uint8(video)


def _task(task: str, frames: int, image_size: int, precision: str) -> None:
    torch.manual_seed(0)
    model = VQVAE(image_size, latent_patch_size=image_size // 128, frames_at_once=1)
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        {"train": _train, "decode": _decode}.get(task, lambda *_: None)(model, frames)
    seconds = time.perf_counter() - start
    print(f"{seconds:7.1f} s  peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:6.2f} GiB")


if __name__ == "__main__":
    if "--task" in sys.argv:
        task, frames, image_size, precision = sys.argv[2:]
        _task(task, int(frames), int(image_size), precision)
    else:
        run_tool(measure)
