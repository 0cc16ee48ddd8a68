"""Peak memory of loading an exported model, measured in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import vector_quantize_pytorch  # noqa: F401  (otherwise it is imported while the model is loaded)

import tests.support.toys  # noqa: F401  (the toys' text encoder can then be loaded)
from t2v import TextToVideo


def peak_of_loading(folder: Path, dtype: str, weights: str = "full") -> int:
    """Return by how many bytes the memory of a process grows, at most, while it loads a model on the CPU.

    Pages of the file that are mapped count too, though the system can take them back.

    Args:
        folder: The exported model.
        dtype: As for `TextToVideo.from_pretrained`.
        weights: As for `TextToVideo.from_pretrained`.
    """
    # Otherwise glibc keeps freed memory.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
    command = [sys.executable, "-m", __name__, str(folder), dtype, weights]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def _status(key: str) -> int:
    """Return a figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


def _load(folder: str, dtype: str, weights: str) -> None:
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    model = TextToVideo.from_pretrained(folder, weights, dtype=dtype, device="cpu")  # type: ignore[arg-type]
    print(_status("VmHWM") - before)
    assert model.device.type == "cpu"  # it is alive until here


if __name__ == "__main__":
    _load(*sys.argv[1:])
