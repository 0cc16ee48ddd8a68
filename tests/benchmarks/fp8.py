"""The shapes transformer trained in FP8 and in bfloat16: validation loss, gradients, time.

`python -m tests.benchmarks.fp8` trains the model of `configs/transformer/shapes.yaml` on the demo's tokens, in bfloat16
and by each recipe of `Float8Precision`, with the same seed: same initial weights, same batches, and layers compiled as
in the demo. Without a demo it writes a few tokens first. The criteria are the last two columns: a loss within 2 % of
bfloat16's, and finite gradients in every step.

Validation uses the last shard of `tokens/train`, on which it does not train: new clips of known combinations. The last
line is the mean over the seeds.
"""

import contextlib
import io
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from cli import main
from t2v.compilation import compile_error
from t2v.errors import run_tool
from tests.support.pipeline import ROOT, Pipeline

PLUGIN = "t2v.training.Float8Precision"
_PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16-mixed": {"precision": "bf16-mixed"},
    **{
        f"FP8 {recipe}": {"plugins": [{"class_path": PLUGIN, "init_args": {"recipe": recipe}}]}
        for recipe in ("tensorwise", "rowwise")
    },
}


class StepMonitor(Callback):
    """Measures the seconds of the steps, and counts steps with finite gradients."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.finite = 0
        self.largest = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.start = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        if all(bool(gradient.isfinite().all()) for gradient in gradients):
            self.finite += 1
        self.largest = max(self.largest, norm)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def compare(
    steps: int = 1000,
    seeds: list[int] = [0],  # noqa: B006
    only: list[str] = list(_PRECISIONS),  # noqa: B006
) -> None:
    """Train in each precision and print a table.

    Args:
        steps: Training steps of each run; the learning-rate schedule spans them.
        seeds: Seeds of initial weights and batches; each precision trains once with each.
        only: The precisions; the others are compared with the first.
    """
    demo = Path("runs/demo").absolute()
    with tempfile.TemporaryDirectory() as folder:
        changes: dict[str, int] = {}
        if not (demo / "tokens/val").exists():
            demo, changes = _small_demo(Path(folder)), {"vocab_size": 32, "grid_size": 4}
        print(f"{steps} steps, tokens of {demo}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
        print("| precision | seed | s/step (median) | s total | largest gradient norm | val/loss | relative | finite |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        losses: dict[str, list[float]] = {name: [] for name in only}
        for seed, name in itertools.product(seeds, only):
            overlay = _overlay(demo, folder, steps, changes, _PRECISIONS[name])
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                shipped = ["-c", str(ROOT / "configs/transformer/shapes.yaml")]
                trainer = main(["fit", *shipped, "-c", json.dumps(overlay), "--seed_everything", str(seed)]).trainer
            losses[name].append(trainer.callback_metrics["val/loss"].item())
            # By name, since the class in the trainer is not the one of __main__.
            (monitor,) = (each for each in trainer.callbacks if type(each).__name__ == StepMonitor.__name__)  # type: ignore[attr-defined]
            print(
                f"| {name} | {seed} | {statistics.median(monitor.seconds):.2f} | {time.perf_counter() - start:.0f} | "
                f"{monitor.largest:.2f} | {losses[name][-1]:.4f} | {losses[name][-1] / losses[only[0]][-1] - 1:+.2%} | "
                f"{monitor.finite} of {trainer.global_step} |",
                flush=True,
            )
        means = {name: statistics.mean(found) for name, found in losses.items()}
        print("\nmean over the seeds: ", end="")
        print(", ".join(f"{name} {mean:.4f} ({mean / means[only[0]] - 1:+.2%})" for name, mean in means.items()))


def _overlay(demo: Path, folder: str, steps: int, changes: dict[str, int], precision: dict[str, Any]) -> dict[str, Any]:
    """Return the differences from the shipped config."""
    return {
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": folder,
            "max_steps": steps,
            "check_val_every_n_epoch": None,
            "val_check_interval": steps,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_checkpointing": False,
            "logger": False,
            "callbacks": [{"class_path": f"{__spec__.name}.{StepMonitor.__name__}"}],
            **precision,
        },
        "model": {
            "init_args": {
                "model": {"init_args": changes},
                "compiled": compile_error() is None,
                "tokenizer": str(demo / "vqvae/checkpoints/last.ckpt"),
            }
        },
        "data": {"init_args": _split_shards(demo / "tokens/train")},
    }


def _split_shards(tokens: Path) -> dict[str, str]:
    """Return the training shards and the last shard for validation; a single shard is used for both."""
    *others, last = sorted(tokens.glob("*.tar"))
    train = [str(path) for path in others or [last]]
    return {"train": f"{{{','.join(train)}}}" if others[1:] else train[0], "val": str(last)}


def _small_demo(folder: Path) -> Path:
    """Write tokens of a few clips by a toy VQ-VAE."""
    pipeline = Pipeline(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        pipeline.prepare()
        pipeline.cli("fit", "vqvae")
        pipeline.cli("predict", "vqvae", "--ckpt_path", "last")
    return pipeline.run


if __name__ == "__main__":
    run_tool(compare)
