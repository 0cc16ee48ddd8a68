"""Both stages in every precision that is offered, compiled and not, under CUDA's rules.

Each run is made on the CPU under CUDA's autocast policy (values, gradients and optimizer steps); uncompiled runs are
made on fake CUDA tensors too (devices and types). `python -m tests.cuda_policy.matrix` prints the table of
`docs/reliability.md`. It runs outside of pytest, whose checks of shapes would be compiled with the layers.
"""

import logging
import math
import tempfile
import warnings
from functools import cache, partial
from typing import Any, Literal
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from callbacks import EMA, GenerationLogger, NaNGuard, ReconstructionLogger
from t2v.errors import UserError, run_tool
from tests.cuda_policy.toys import FRAMES, SIZE, data_for, lit_transformer, lit_vqvae, trainer
from tests.support.cuda_policy import cuda_autocast, fake_cuda, to_fake_cuda

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "FP8 plugin")
WEIGHTS = ("fp8", "int8", "nf4")
COLUMNS = (*PRECISIONS, *(f"{weights} weights" for weights in WEIGHTS))
OPERATIONS = {
    ("vqvae", "fit"): (
        "training step (backward pass, optimizer, clipping)",
        "validation and its metrics",
        "EMA, NaNGuard, ReconstructionLogger",
    ),
    ("vqvae", "predict"): ("tokenization",),
    ("transformer", "fit"): (
        "training step (backward pass, optimizer, clipping)",
        "validation and its metrics",
        "EMA, NaNGuard, GenerationLogger",
    ),
    ("transformer", "predict"): (
        "start frames",
        "decoding with caches, guidance and temperature schedules",
        "streaming decode by the VQ-VAE",
    ),
}
REASONS = {"Float8Precision cannot convert": "only the transformer has FP8 layers"}
"""Beginnings of messages of runs that are refused, and what the table says."""


NO_FAKES = "nf4 weights"
"""bitsandbytes' class of parameters cannot be made of a tensor without data."""


class Collector(Callback):
    """Takes the frames of predicted videos while the models are on their device."""

    def __init__(self) -> None:
        self.videos: list[Tensor] = []

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.videos.append(torch.cat(list(outputs.frames), 1))


def build(stage: str, run: str, column: str, compiled: bool) -> LightningModule:
    weights = column.removesuffix(" weights")
    if stage == "vqvae":
        return lit_vqvae(compiled)
    return lit_transformer(
        compiled and run == "fit", compiled and run == "predict", weights if weights in WEIGHTS else "full"
    )


def perform(stage: str, run: str, column: str, compiled: bool, fake: bool) -> dict[str, float]:
    """Fit or predict; return the metrics that were logged."""
    module, collector = build(stage, run, column, compiled), Collector()
    logger = ReconstructionLogger(1) if stage == "vqvae" else GenerationLogger(["one"])
    precision = "bf16-mixed" if column.endswith("weights") else column.removesuffix(" plugin")
    backend = partial(torch.compile, backend="eager" if fake or run == "fit" else "aot_eager")
    device = "cuda" if fake else "cpu"
    with (
        tempfile.TemporaryDirectory() as folder,
        patch("torch.compile", backend),
        fake_cuda() if fake else cuda_autocast(),
    ):
        if fake:
            to_fake_cuda(module)
            for part in (*getattr(module, "metrics", ()), *getattr(module, "_tokenizer", ())):
                to_fake_cuda(part, "cpu")
        callbacks = [EMA(0.9), NaNGuard(), logger] if run == "fit" else [collector] if stage == "transformer" else []
        options = {"callbacks": callbacks, "logger": TensorBoardLogger(folder, name="")}
        runner = trainer(precision, folder, fake, max_steps=1 if fake else 3, limit_val_batches=1, **options)
        data = data_for(module, device)
        if run == "fit":
            runner.fit(module, datamodule=data)
        elif stage == "vqvae":
            for tokens in runner.predict(module, datamodule=data):
                assert tokens.shape == (2, FRAMES, 2, 2)
        else:
            module._start = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8, device=device)
            module.fingerprint = data.fingerprint
            runner.predict(module, datamodule=data, return_predictions=False)
            assert [video.shape for video in collector.videos] == [(2, FRAMES, 3, SIZE, SIZE)]
        return {name: float(value) for name, value in runner.callback_metrics.items()}


@cache
def measured(stage: str, run: str, column: str, compiled: bool) -> dict[str, float]:
    """The metrics of a run on the CPU under CUDA's autocast policy."""
    return perform(stage, run, column, compiled, fake=False)


@cache
def cell(stage: str, run: str, column: str, compiled: bool) -> str:
    """What the table says about a run, which is made here."""
    if column.endswith("weights") and (stage, run) != ("transformer", "predict"):
        return "–"
    try:
        found = measured(stage, run, column, compiled)
        if not compiled and column != NO_FAKES:
            perform(stage, run, column, compiled, fake=True)
    except UserError as error:
        return next(f"refused ({reason})" for start, reason in REASONS.items() if str(error).startswith(start))
    expected = measured(stage, run, "32-true", compiled=False)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert math.isfinite(value), name
        tolerance = 0.15 if "norm" in name or name == "gradient" else 0.02
        few_values = any(part in name for part in ("codebook", "ssim", "accuracy"))
        assert few_values or math.isclose(value, expected[name], rel_tol=tolerance, abs_tol=0.01), (
            name,
            value,
            expected[name],
        )
    return "ok"


def print_table(compiled: Literal["no", "yes", "both"] = "both") -> None:
    """Print the table in Markdown.

    Args:
        compiled: Rows of uncompiled runs, of compiled runs, or both.
    """
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    rows = [["stage", "operation", "compiled", *COLUMNS], ["---"] * (len(COLUMNS) + 3)]
    for (stage, run), operations in OPERATIONS.items():
        for choice in ("no", "yes") if compiled == "both" else (compiled,):
            cells = [cell(stage, run, column, choice == "yes") for column in COLUMNS]
            rows += [[stage, operation, choice, *cells] for operation in operations]
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    run_tool(print_table)
