"""Speed of tokenizing with `predict` of stage 1, in fp32 and in bf16-mixed: `python -m tests.benchmarks.tokenizing`.

Both precisions run through the command line's entry point, interleaved, over the same clips; the fastest round of each
counts. The first batches are left out, because they load the text encoder and start the workers.
"""

import contextlib
import io
import math
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.profilers import SimpleProfiler

from cli import main
from data.shards import ShardSet
from t2v.errors import UserError, run_tool

PRECISIONS = ("32-true", "bf16-mixed")
WARMUP_BATCHES = 2
"""Batches that are not measured."""
PARTS = {
    "encoder": ".predict_step",
    "loader": ".predict_next",
    "transfer": ".batch_to_device",
    "text": "[TextEncoder]",
    "writer": "TokenShardWriter.on_predict_batch_end",
}
"""Parts of the run, and the actions of Lightning's profiler that measure them; the text encoder is in the writer."""


class Clock(SimpleProfiler):
    """Records when each action ended, after all work of the accelerator is complete."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: dict[str, list[float]] = defaultdict(list)

    def stop(self, action_name: str) -> None:
        """Wait for the accelerator, and record the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        super().stop(action_name)
        self.ends[action_name].append(time.perf_counter())

    def summary(self) -> str:
        """Return nothing, because the benchmark prints its own summary."""
        return ""

    def seconds_of(self, part: str, batches: slice) -> float:
        """Return the seconds that a part of the run took in these batches."""
        actions = [durations for name, durations in self.recorded_durations.items() if PARTS[part] in name]
        return math.fsum(math.fsum(durations[batches]) for durations in actions)

    def span(self, batches: slice) -> float:
        """Return the seconds from the end of the batch before these to the end of the last of them."""
        (ends,) = (ends for name, ends in self.ends.items() if PARTS["writer"] in name)
        return ends[batches.stop - 1] - ends[batches.start - 1]


def measure(
    recipe: Path,
    checkpoint: Path,
    shards: Path,
    batches: int = 12,
    rounds: int = 2,
    accelerator: str = "auto",
    overrides: list[str] = [],  # noqa: B006
) -> None:
    """Print the speed of `predict`, the fraction of time of each part, and how many tokens agree in both precisions.

    Args:
        recipe: Config of stage 1, whose TokenShardWriter writes to `${trainer.default_root_dir}/tokens`.
        checkpoint: Checkpoint of stage 1.
        shards: Video shards to tokenize.
        batches: Largest number of batches in a run.
        rounds: Runs of each precision.
        accelerator: Lightning's name of the device.
        overrides: Further flags, such as `--data.num_workers=8`.

    Raises:
        UserError: If there are too few clips to measure.
    """
    best: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for precision in PRECISIONS:
                out = Path(folder) / f"{precision}-{number}"
                flags = {
                    "ckpt_path": checkpoint,
                    "data.train": shards.absolute(),
                    "data.val": shards.absolute(),
                    "trainer.default_root_dir": out,
                    "trainer.precision": precision,
                    "trainer.accelerator": accelerator,
                    "trainer.devices": 1,
                    "trainer.limit_predict_batches": batches,
                    "trainer.enable_progress_bar": False,
                    "trainer.logger": False,
                    "trainer.profiler": "tests.benchmarks.tokenizing.Clock",
                }
                arguments = [f"--{name}={value}" for name, value in flags.items()]
                with contextlib.redirect_stdout(io.StringIO()):
                    cli = main(["predict", "-c", str(recipe), *arguments, *overrides])
                result = _result(cli, batches)
                if precision not in best or result["clips/s"] > best[precision]["clips/s"]:
                    best[precision] = result
        device = cli.trainer.strategy.root_device
        tokens = [_tokens(Path(folder) / f"{precision}-0" / "tokens/train") for precision in PRECISIONS]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}; {cli.datamodule.num_workers} workers; batches of {best[PRECISIONS[0]].pop('batch')}")
    columns = list(best[PRECISIONS[0]])
    print(" " * 12 + "".join(f"{column:>10}" for column in columns))
    for precision in PRECISIONS:
        print(f"{precision:<12}" + "".join(_format_cell(column, best[precision][column]) for column in columns))
    equal = np.concatenate([(tokens[0][key] == tokens[1][key]).ravel() for key in tokens[0]])
    print(f"{equal.mean():.2%} of {equal.size:,} tokens agree.")


def _result(cli: Any, limit: int) -> dict[str, Any]:
    """Return the speed and the fraction of time of each part of a run."""
    dataset = cli.datamodule.predict_dataloader()[0].dataset
    batches = slice(WARMUP_BATCHES, min(limit, len(dataset)))
    if batches.stop <= batches.start:
        raise UserError(
            f"There are {batches.stop} batches, but the first {WARMUP_BATCHES} are not measured: give more clips."
        )
    clips = [index for batch in dataset.batches[batches] for index in batch]
    frames = sum(dataset.clips.length(dataset.clips.samples[index]) for index in clips)
    clock = cli.trainer.profiler
    seconds = clock.span(batches)
    fractions = {part: clock.seconds_of(part, batches) / seconds for part in PARTS}
    fractions["writer"] -= fractions["text"]
    return {
        "clips/s": len(clips) / seconds,
        "frames/s": frames / seconds,
        **fractions,
        "batch": f"{len(dataset.batches[WARMUP_BATCHES])} clips, {frames / len(clips):.0f} frames each",
    }


def _tokens(path: Path) -> dict[str, np.ndarray]:
    shards = ShardSet(path)
    return {
        sample.key: np.load(io.BytesIO(shards.read(sample, "tokens.npy")["tokens.npy"])) for sample in shards.samples
    }


def _format_cell(column: str, value: float) -> str:
    return f"{value:>10,.1f}" if column.endswith("/s") else f"{value:>10.1%}"


if __name__ == "__main__":
    run_tool(measure)
