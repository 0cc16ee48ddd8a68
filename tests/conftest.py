"""What every test gets: a fixed seed and no network; and the whole pipeline, run once at toy sizes."""

import os
import shutil
from collections.abc import Callable, Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, a process a core

import torch

from tests.support.pipeline import Pipeline


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """What a run sets, such as the port where its ranks meet, is not for the next one."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def trained_pipeline(tmp_path_factory) -> Pipeline:
    """Both stages trained, for tests that only read."""
    pipeline = Pipeline(tmp_path_factory.mktemp("pipeline"))
    pipeline.prepare()
    pipeline.fit("vqvae")
    pipeline.cli("predict", "vqvae", "--ckpt_path", "last")
    pipeline.fit("transformer")
    return pipeline


@pytest.fixture
def copy_pipeline(trained_pipeline, tmp_path) -> Callable[[], Pipeline]:
    """Makes a copy of the finished pipeline, for tests that go on from it."""

    def copy() -> Pipeline:
        folder = tmp_path / "pipeline"
        shutil.copytree(trained_pipeline.folder, folder, ignore=shutil.ignore_patterns("clips"))
        return Pipeline(folder)

    return copy
