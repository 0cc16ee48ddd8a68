"""Kills and resumes training many times, and compares its end with an uninterrupted run: `python -m tests.soak.resume`.

Both stages train at toy sizes, with two workers and a checkpoint every second step. A process is killed (SIGKILL) at a
random time after it has started to train, possibly while it writes a checkpoint, and is started again.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from t2v.errors import run_tool
from tests.support.pipeline import ROOT, Pipeline, differences, resumable, training_state


def soak(kills: int = 20, steps: int = 600, longest: float = 3.0, seed: int = 0) -> None:
    """Print how often each stage was killed, at which step it resumed, and how many values differ at the end.

    Args:
        kills: Number of kills, over both stages.
        steps: Training steps of each stage.
        longest: Maximum seconds of training before a kill.
        seed: Seed of the random times.

    Raises:
        SystemExit: If a value differs, or a process fails.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        pipeline = Pipeline(Path(folder))
        pipeline.prepare()
        wrong = 0
        for number, stage in enumerate(("vqvae", "transformer")):
            fit = [*resumable(pipeline, stage), f"--trainer.max_steps={steps}", "--data.num_workers=2"]
            _train(pipeline, fit)
            uninterrupted = training_state(pipeline.checkpoint(stage))
            shutil.rmtree(pipeline.checkpoint(stage).parent)
            starts = []
            for _ in range(kills // 2 + number * (kills % 2)):
                after = rng.uniform(0, longest)
                starts.append(_train(pipeline, fit, kill_after=after))
                print(f"{stage}: resumed at step {starts[-1]}, killed after {after:.2f} s", flush=True)
            starts.append(_train(pipeline, fit))
            found = differences(uninterrupted, training_state(pipeline.checkpoint(stage)))
            print(
                f"{stage}: {len(starts) - 1} kills, {len(uninterrupted)} tensors and numbers, {len(found)} differ",
                flush=True,
            )
            wrong += len(found)
            if number == 0:
                pipeline.cli("predict", stage, "--ckpt_path", "last")
    if wrong:
        raise SystemExit(f"{wrong} differences")


def _train(pipeline: Pipeline, fit: list[str], kill_after: float | None = None) -> str:
    """Run one process to its end or until it is killed, and return the step at which it started."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, ROOT / "cli.py", *fit], cwd=pipeline.folder, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        started = next((line for line in process.stdout if line.startswith("Start ")), None)
        if started is None:
            raise SystemExit("a process had no steps left to train: raise steps, or see its message above")
        timer = threading.Timer(kill_after or 0, process.kill)
        if kill_after is not None:
            timer.start()
        process.stdout.read()
        code = process.wait()
        timer.cancel()
    expected = 0 if kill_after is None else -signal.SIGKILL
    if code != expected:
        raise SystemExit(f"a process ended with {code} instead of {expected}: raise steps, or see its message above")
    return started.split("at step")[-1].strip()


if __name__ == "__main__":
    run_tool(soak)
