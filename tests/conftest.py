"""What every test gets: a fixed seed and no network; and the whole road, run once at toy sizes."""

import os
import shutil
from collections.abc import Callable, Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, a process a core

import torch

from tests.support.road import Road


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
def finished_road(tmp_path_factory) -> Road:
    """Both stages trained, for tests that only read."""
    road = Road(tmp_path_factory.mktemp("road"))
    road.prepare()
    road.fit("vqvae")
    road.cli("predict", "vqvae", "--ckpt_path", "last")
    road.fit("transformer")
    return road


@pytest.fixture
def copy_road(finished_road, tmp_path) -> Callable[[], Road]:
    """Makes a copy of the finished road, for tests that go on from it."""

    def copy() -> Road:
        folder = tmp_path / "road"
        shutil.copytree(finished_road.folder, folder, ignore=shutil.ignore_patterns("clips"))
        return Road(folder)

    return copy
