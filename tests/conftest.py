"""Fixtures of all tests: a fixed seed, no network, and the complete pipeline, trained once at toy sizes."""

import fcntl
import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

gc.disable()  # until all tests are imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in parallel, one process per core

from t2v.training.startup import defer_torchmetrics

defer_torchmetrics()

import jaxtyping  # after what shortens the import of Lightning
import torch

from tests.support.pipeline import Pipeline


def pytest_collection_finish() -> None:
    """Exempt all that the tests have imported from garbage collection, each of which would walk through it."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _restored_environment() -> Iterator[None]:
    """Restore the environment after a test: a run sets variables, such as the port of its ranks."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Switch the checks of shapes off, for planning, compilation and long videos, which take far longer with them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(scope="session")
def trained_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """Return a pipeline with both stages trained, for tests that only read it.

    The first of the parallel processes that needs it trains it; each has its own copy.
    """
    own = Pipeline(tmp_path_factory.mktemp("pipeline"))
    in_parallel = "PYTEST_XDIST_WORKER" in os.environ
    shared = tmp_path_factory.getbasetemp().parent / "trained" if in_parallel else own.folder
    shared.mkdir(exist_ok=True)
    with (shared / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / ".complete").exists():
            pipeline = Pipeline(shared)
            pipeline.prepare()
            pipeline.fit("vqvae")
            pipeline.cli("predict", "vqvae", "--ckpt_path", "last")
            pipeline.fit("transformer")
            (shared / ".complete").touch()
    if in_parallel:
        shutil.copytree(shared, own.folder, dirs_exist_ok=True)
    return own


@pytest.fixture
def copy_pipeline(trained_pipeline: Pipeline, tmp_path: Path) -> Callable[[], Pipeline]:
    """Return a function that copies the trained pipeline, for tests that change it."""

    def copy() -> Pipeline:
        folder = tmp_path / "pipeline"
        shutil.copytree(trained_pipeline.folder, folder, ignore=shutil.ignore_patterns("clips"))
        return Pipeline(folder)

    return copy
