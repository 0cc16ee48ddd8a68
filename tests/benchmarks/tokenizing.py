"""How fast `predict` of stage 1 makes tokens, in fp32 and in bf16-mixed: `python -m tests.benchmarks.tokenizing`.

Both run from the command line's own entry, by turns, over the same clips; the fastest round of each counts. The first
batches are left out: they load the text encoder and start the workers.
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
WARM_UP = 2
"""Batches that do not count."""
PARTS = {
    "encoder": ".predict_step",
    "loader": ".predict_next",
    "transfer": ".batch_to_device",
    "text": "[TextEncoder]",
    "writer": "TokenShardWriter.on_predict_batch_end",
}
"""What the time is shared out to, and the actions of Lightning's profiler that tell it; text is part of the writer."""


class Clock(SimpleProfiler):
    """Notes when each action ended, after the accelerator has done all that was asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: dict[str, list[float]] = defaultdict(list)

    def stop(self, action_name: str) -> None:
        """Wait, and note the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        super().stop(action_name)
        self.ends[action_name].append(time.perf_counter())

    def summary(self) -> str:
        """Nothing: the benchmark prints what it needs."""
        return ""

    def lasted(self, part: str, batches: slice) -> float:
        """Seconds that a part of these batches took."""
        return math.fsum(
            math.fsum(took[batches]) for name, took in self.recorded_durations.items() if PARTS[part] in name
        )

    def span(self, batches: slice) -> float:
        """Seconds from the end of the batch before these to the end of the last."""
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
    """Print the speed of `predict`, where the time goes, and how many tokens of both precisions agree.

    Args:
        recipe: stage 1's config, whose TokenShardWriter writes into `${trainer.default_root_dir}/tokens`.
        checkpoint: what `fit` wrote.
        shards: clips to tokenise.
        batches: batches of each run; fewer where there are not so many.
        rounds: runs of each precision.
        accelerator: Lightning's name of the device.
        overrides: more flags, such as `--data.num_workers=8`.
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
                given = [f"--{name}={value}" for name, value in flags.items()]
                with contextlib.redirect_stdout(io.StringIO()):
                    cli = main(["predict", "-c", str(recipe), *given, *overrides])
                result = _result(cli, batches)
                if precision not in best or result["clips/s"] > best[precision]["clips/s"]:
                    best[precision] = result
        device = cli.trainer.strategy.root_device
        tokens = [_tokens(Path(folder) / f"{precision}-0" / "tokens/train") for precision in PRECISIONS]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}; {cli.datamodule.num_workers} workers; batches of {best[PRECISIONS[0]].pop('batch')}")
    print(" " * 12 + "".join(f"{column:>10}" for column in best[PRECISIONS[0]]))
    for precision in PRECISIONS:
        print(f"{precision:<12}" + "".join(_cell(column, best[precision][column]) for column in best[PRECISIONS[0]]))
    same = np.concatenate([(tokens[0][key] == tokens[1][key]).ravel() for key in tokens[0]])
    print(f"{same.mean():.2%} of {same.size:,} tokens agree.")


def _result(cli: Any, limit: int) -> dict[str, Any]:
    whole = cli.datamodule.predict_dataloader()[0].dataset
    batches = slice(WARM_UP, min(limit, len(whole)))
    if batches.stop <= batches.start:
        raise UserError(f"{batches.stop} batches are not more than the {WARM_UP} that do not count: give more clips.")
    clips = [index for batch in whole.batches[batches] for index in batch]
    frames = sum(whole.clips.length(whole.clips.samples[index]) for index in clips)
    clock = cli.trainer.profiler
    seconds = clock.span(batches)
    shares = {part: clock.lasted(part, batches) / seconds for part in PARTS}
    shares["writer"] -= shares["text"]
    return {
        "clips/s": len(clips) / seconds,
        "frames/s": frames / seconds,
        **shares,
        "batch": f"{len(whole.batches[WARM_UP])} clips, {frames / len(clips):.0f} frames each",
    }


def _tokens(path: Path) -> dict[str, np.ndarray]:
    shards = ShardSet(path)
    return {
        sample.key: np.load(io.BytesIO(shards.read(sample, "tokens.npy")["tokens.npy"])) for sample in shards.samples
    }


def _cell(column: str, value: float) -> str:
    return f"{value:>10,.1f}" if column.endswith("/s") else f"{value:>10.1%}"


if __name__ == "__main__":
    run_tool(measure)
