"""What every test gets: a fixed seed and no network; and the whole road, run once at toy sizes."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).parents[1]
TRAINER = {
    "accelerator": "cpu",
    "check_val_every_n_epoch": 1,
    "enable_progress_bar": False,
    "log_every_n_steps": 1,
    "max_steps": 12,
}
DATA = {"batch_size": 8, "num_workers": 0}
TOY = {
    "vqvae": {
        "trainer": TRAINER,
        "model": {
            "init_args": {
                "model": {"init_args": {"base_channels": 8, "quantizer": {"init_args": {"codebook_size": 32}}}},
                "quantize_from_step": 4,
                "warmup_steps": 2,
                "optimizer": {"init_args": {"lr": 1e-2}},
            }
        },
        "data": {"init_args": DATA},
    },
    "transformer": {
        "trainer": TRAINER,
        "model": {
            "init_args": {
                "model": {
                    "init_args": {
                        "vocab_size": 32,
                        "dim": 32,
                        "spatial_layers": 1,
                        "temporal_layers": 1,
                        "hidden_dim": 48,
                    }
                },
                "frames": 5,
                "warmup_steps": 2,
            }
        },
        "data": {"init_args": DATA},
    },
}


class Road:
    """A folder in which the shipped configs run at toy sizes; their paths are relative to where one stands."""

    def __init__(self, folder: Path) -> None:
        self.code, self.folder, self.run = ROOT, folder, folder / "runs/demo"
        self.halfway: dict[str, Any] = {}
        """Each stage's checkpoint after the first of its two runs."""

    def config(self, stage: str) -> list[str]:
        """The flags of a stage's shipped config, and of a second one that makes it small."""
        small = self.folder / f"{stage}.yaml"
        if not small.exists():
            small.write_text(yaml.safe_dump(TOY[stage]))
        return ["-c", str(ROOT / f"configs/{stage}/shapes.yaml"), "-c", str(small)]

    def cli(self, command: str, stage: str, *flags: str):
        """Run one command of a stage in this process."""
        return self.main(command, *self.config(stage), *flags)

    def fit(self, stage: str) -> None:
        """Train a stage in two runs: 7 steps, then 5 more."""
        self.cli("fit", stage, "--ckpt_path", "last", "--trainer.max_steps", "7")
        self.halfway[stage] = torch.load(self.checkpoint(stage), weights_only=True)
        self.cli("fit", stage, "--ckpt_path", "last")

    def main(self, *args: str):
        """Run a command line in this process and this folder."""
        from cli import main

        with contextlib.chdir(self.folder):
            return main(list(args))

    def checkpoint(self, stage: str) -> Path:
        return self.run / stage / "checkpoints/last.ckpt"

    def files(self) -> dict[str, bytes]:
        """Everything in the runs' folder but TensorBoard's logs, which every command begins."""
        paths = (path for path in self.run.rglob("*") if path.is_file() and not path.name.startswith("events."))
        return {str(path.relative_to(self.run)): path.read_bytes() for path in paths}


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def finished_road(tmp_path_factory) -> Road:
    """Both stages trained, for tests that only read."""
    from data.prepare import prepare

    road = Road(tmp_path_factory.mktemp("road"))
    clips = road.run / "clips"
    draw = [sys.executable, "-m", "data.shapes", clips, "--train_clips=24", "--val_clips=8", "--num_workers=1"]
    subprocess.run(draw, cwd=ROOT, check=True, capture_output=True)
    for part in ("train", "val"):
        prepare(clips / part, road.run / "shards" / part, num_workers=1)
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
