"""The shapes transformer trained in FP8 and in bfloat16: validation loss, gradients, time.

`python -m tests.benchmarks.fp8` trains the model of `configs/transformer/shapes.yaml` on the demo's tokens, once in
bfloat16 and once by each recipe of `Float8Precision`, with the same seed: same first weights, same batches, and layers
compiled as in the demo. Where there is no demo, it makes a few tokens first. Nothing is resumed and nothing is kept.
The last two columns of the table are what must hold: a loss within 2 % of bfloat16's, and finite gradients in every
step.

Validation is on the last shard of `tokens/train`, which training does without: clips never seen, of combinations that
were. Seeds differ too, so that several tell more than one: after the rows comes a line with their mean.
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
from t2v.errors import run_tool
from t2v.generation.compilation import compile_error
from tests.support.pipeline import ROOT, Pipeline

PLUGIN = "t2v.training.Float8Precision"
_PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16-mixed": {"precision": "bf16-mixed"},
    **{
        f"FP8 {recipe}": {"plugins": [{"class_path": PLUGIN, "init_args": {"recipe": recipe}}]}
        for recipe in ("tensorwise", "rowwise")
    },
}


class Watch(Callback):
    """Times the steps, and counts those whose gradients are all finite."""

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
        self.finite += all(bool(gradient.isfinite().all()) for gradient in gradients)
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
    """Trains in each precision and prints a table.

    Args:
        steps: training steps of each run; the learning rate's schedule spans them.
        seeds: of first weights and batches; each precision trains once with each.
        only: which precisions; the first is what the others are compared with.
    """
    demo = Path("runs/demo").absolute()
    with tempfile.TemporaryDirectory() as folder:
        changes: dict[str, int] = {}
        if not (demo / "tokens/val").exists():
            demo, changes = _small_demo(Path(folder)), {"vocab_size": 32, "grid_size": 4}
        print(f"{steps} steps, tokens of {demo}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
        print(
            "| precision | seed | s a step (median) | s in all | largest gradient norm | val/loss | beside | finite |"
        )
        print("|---|---|---|---|---|---|---|---|", flush=True)
        losses: dict[str, list[float]] = {name: [] for name in only}
        for seed, name in itertools.product(seeds, only):
            overlay = _overlay(demo, folder, steps, changes, _PRECISIONS[name])
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                shipped = ["-c", str(ROOT / "configs/transformer/shapes.yaml")]
                trainer = main(["fit", *shipped, "-c", json.dumps(overlay), "--seed_everything", str(seed)]).trainer
            losses[name].append(trainer.callback_metrics["val/loss"].item())
            (watch,) = (
                callback for callback in trainer.callbacks if type(callback).__name__ == "Watch"
            )  # not __main__'s
            print(
                f"| {name} | {seed} | {statistics.median(watch.seconds):.2f} | {time.perf_counter() - start:.0f} | "
                f"{watch.largest:.2f} | {losses[name][-1]:.4f} | {losses[name][-1] / losses[only[0]][-1] - 1:+.2%} | "
                f"{watch.finite} of {trainer.global_step} |",
                flush=True,
            )
        means = {name: statistics.mean(found) for name, found in losses.items()}
        print("\nmean of the seeds: ", end="")
        print(", ".join(f"{name} {mean:.4f} ({mean / means[only[0]] - 1:+.2%})" for name, mean in means.items()))


def _overlay(demo: Path, folder: str, steps: int, changes: dict[str, int], precision: dict[str, Any]) -> dict[str, Any]:
    """What differs from the shipped config."""
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
            "callbacks": [{"class_path": f"{__spec__.name}.Watch"}],
            **precision,
        },
        "model": {
            "init_args": {
                "model": {"init_args": changes},
                "compiled": compile_error() is None,
                "tokenizer": str(demo / "vqvae/checkpoints/last.ckpt"),
            }
        },
        "data": {"init_args": _known_and_new(demo / "tokens/train")},
    }


def _known_and_new(tokens: Path) -> dict[str, str]:
    """Shards to train on, and the last one of the same folder to validate on; the only one is for both."""
    *others, last = sorted(tokens.glob("*.tar"))
    train = [str(path) for path in others or [last]]
    return {"train": f"{{{','.join(train)}}}" if others[1:] else train[0], "val": str(last)}


def _small_demo(folder: Path) -> Path:
    """Tokens of a few clips, by a VQ-VAE that has hardly learnt."""
    pipeline = Pipeline(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        pipeline.prepare()
        pipeline.cli("fit", "vqvae")
        pipeline.cli("predict", "vqvae", "--ckpt_path", "last")
    return pipeline.run


if __name__ == "__main__":
    run_tool(compare)
