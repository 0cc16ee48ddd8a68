"""The complete pipeline at toy sizes: the shipped configs with an overlay of small sizes."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from t2v.checkpoints.storage import read_checkpoint

ROOT = Path(__file__).parents[2]
TRAINER = {
    "accelerator": "cpu",
    "check_val_every_n_epoch": 2,
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
                "model": {
                    "init_args": {
                        "base_channels": 8,
                        "channel_multipliers": [1, 2],
                        "quantizer": {"init_args": {"codebook_size": 32}},
                    }
                },
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
                        "grid_size": 4,
                        "dim": 32,
                        "spatial_layers": 1,
                        "temporal_layers": 1,
                        "hidden_dim": 48,
                        "attention": {"heads": 4, "kv_heads": 2, "window": 16},
                    }
                },
                "generation": {"frames": 5},
                "warmup_steps": 2,
            }
        },
        "data": {"init_args": {**DATA, "buckets": []}},
    },
}


class Pipeline:
    """A folder in which the shipped configs run at toy sizes; paths in configs are relative to it.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "runs/demo"

    def config(self, stage: str) -> list[str]:
        """Return the flags of a stage's shipped config and of the overlay with toy sizes."""
        small = self.folder / f"{stage}.yaml"
        if not small.exists():
            small.write_text(yaml.safe_dump(TOY[stage]))
        return ["-c", str(ROOT / f"configs/{stage}/shapes.yaml"), "-c", str(small)]

    def prepare(self) -> None:
        """Draw clips and pack them into shards."""
        from data.examples.shapes import make_shapes
        from data.prepare import prepare

        clips = self.run / "clips"
        make_shapes(clips, train_clips=24, val_clips=8, num_workers=1)
        for part in ("train", "val"):
            prepare(clips / part, self.run / "shards" / part, num_workers=1)

    def cli(self, command: str, stage: str, *flags: str) -> Any:
        """Run one command of a stage in this process, and return its `T2VCLI`."""
        return self.main(command, *self.config(stage), *flags)

    def fit(self, stage: str) -> None:
        """Train a stage in two runs: 7 steps, then 5 more after resuming."""
        self.cli("fit", stage, "--ckpt_path", "last", "--trainer.max_steps", "7")
        shutil.copy(self.checkpoint(stage), self.halfway(stage))
        self.cli("fit", stage, "--ckpt_path", "last")

    def main(self, *args: str) -> Any:
        """Run a command line in this process with the folder as working directory."""
        from cli import main

        with contextlib.chdir(self.folder):
            return main(list(args))

    def checkpoint(self, stage: str) -> Path:
        return self.run / stage / "checkpoints/last.ckpt"

    def halfway(self, stage: str) -> Path:
        """Return the path of the checkpoint after the first of the two runs of `fit`."""
        return self.folder / f"{stage}-halfway.ckpt"

    def files(self) -> dict[str, bytes]:
        """Return all files of the run folder except TensorBoard logs, which every command creates."""
        paths = (path for path in self.run.rglob("*") if path.is_file() and not path.name.startswith("events."))
        return {str(path.relative_to(self.run)): path.read_bytes() for path in paths}


_OFTEN = """
trainer:
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {dirpath: "${trainer.default_root_dir}/STAGE/checkpoints", save_last: true, every_n_train_steps: 2}
    - callbacks.EMA
"""
_RANDOM = {
    "vqvae": ["--data.crop=0.7", "--data.flip=true"],
    "transformer": ["--model.objective.corruption=0.2", "--data.frames=9"],
}


def resumable(pipeline: Pipeline, stage: str) -> list[str]:
    """Return the command line of a run with frequent checkpoints, a moving average and more random numbers."""
    often = pipeline.folder / f"{stage}-often.yaml"
    often.write_text(_OFTEN.replace("STAGE", stage))
    return ["fit", *pipeline.config(stage), "-c", str(often), "--ckpt_path", "last", *_RANDOM[stage]]


def training_state(checkpoint: Path) -> dict[str, Any]:
    """Return every tensor and number of a checkpoint, single-file or sharded, that resuming uses, by its path."""
    parts = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "global_step")
    loaded = read_checkpoint(checkpoint, optimizers=True)
    return _leaves({part: loaded[part] for part in parts})


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Return the paths whose values are not bit-equal in two training states."""

    def same(one: Any, other: Any) -> bool:
        return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other

    return [
        name
        for name in first | second
        if name not in first or name not in second or not same(first[name], second[name])
    ]


def _leaves(value: Any, at: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        value = list(value.items())
    elif isinstance(value, (list, tuple)):
        value = list(enumerate(value))
    else:
        return {at: value}
    return {name: leaf for key, child in value for name, leaf in _leaves(child, f"{at}/{key}").items()}
