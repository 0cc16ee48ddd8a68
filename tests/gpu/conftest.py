"""The suite for a real GPU: `python -m pytest -m gpu -n 0 tests/gpu`, at most ten minutes on one H100.

Each topic prints one line of JSON with its figures at the end. `T2V_GPU_SUITE_DEVICE=cpu` runs the tests of values on
the CPU, to try the suite itself; figures of speed are then left out.
"""

import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

DEVICE = os.environ.get("T2V_GPU_SUITE_DEVICE", "cuda")
FIGURES = pytest.StashKey[dict[str, dict[str, Any]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = defaultdict(dict)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    missing = pytest.mark.skip(reason="there is no CUDA device")
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.usefixtures("unchecked_shapes"))  # compiling the checks takes minutes
            if DEVICE == "cuda" and not torch.cuda.is_available():
                item.add_marker(missing)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for topic, figures in config.stash[FIGURES].items():
        machine = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.machine()
        line = {"topic": topic, "device": machine, "torch": torch.__version__, **figures}
        terminalreporter.write_line(json.dumps(line))


def time_graph(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Return the seconds of a function as a CUDA graph, and what it returned."""
    for _ in range(2):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    graph.replay()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        graph.replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats, output


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Add figures to the line of a topic."""

    def record(topic: str, **figures: Any) -> None:
        request.config.stash[FIGURES][topic] |= figures

    return record


@pytest.fixture
def needs_gpu() -> None:
    if DEVICE != "cuda":
        pytest.skip("it needs a CUDA device")
