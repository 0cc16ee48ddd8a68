"""Kills training again and again, and compares its end with a run that was left alone: `python -m tests.soak.resume`.

Both stages train at toy sizes, each process on two workers, with a checkpoint every second step. A process is killed
(SIGKILL) at a random moment after it has begun to train, while a checkpoint is written too, and started again.
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
    """Print how often each stage was killed, where it went on, and how many numbers differ in the end.

    Args:
        kills: how often a process is killed, over both stages.
        steps: steps of each training.
        longest: seconds that a process trains at most before it is killed.
        seed: decides the moments.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        pipeline = Pipeline(Path(folder))
        pipeline.prepare()
        wrong = 0
        for number, stage in enumerate(("vqvae", "transformer")):
            fit = [*resumable(pipeline, stage), f"--trainer.max_steps={steps}", "--data.num_workers=2"]
            _train(pipeline, fit)
            whole = training_state(pipeline.checkpoint(stage))
            shutil.rmtree(pipeline.checkpoint(stage).parent)
            starts = []
            for _ in range(kills // 2 + number * (kills % 2)):
                after = rng.uniform(0, longest)
                starts.append(_train(pipeline, fit, kill_after=after))
                print(f"{stage}: went on {starts[-1]}, killed after {after:.2f} s", flush=True)
            starts.append(_train(pipeline, fit))
            found = differences(whole, training_state(pipeline.checkpoint(stage)))
            print(
                f"{stage}: {len(starts) - 1} kills, {len(whole)} tensors and numbers, {len(found)} differ", flush=True
            )
            wrong += len(found)
            if number == 0:
                pipeline.cli("predict", stage, "--ckpt_path", "last")
    if wrong:
        raise SystemExit(f"{wrong} differences")


def _train(pipeline: Pipeline, fit: list[str], kill_after: float | None = None) -> str:
    """Run one process, to its end or until it is killed; returns where it said it started."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, ROOT / "cli.py", *fit], cwd=pipeline.folder, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        started = next((line for line in process.stdout if line.startswith("Start ")), None)
        if started is None:
            raise SystemExit("a process had nothing left to train: raise steps, or look at its message above")
        timer = threading.Timer(kill_after or 0, process.kill)
        if kill_after is not None:
            timer.start()
        process.stdout.read()
        code = process.wait()
        timer.cancel()
    expected = 0 if kill_after is None else -signal.SIGKILL
    if code != expected:
        raise SystemExit(
            f"a process ended with {code} instead of {expected}: raise steps, or look at its message above"
        )
    return started.split("at step")[-1].strip()


if __name__ == "__main__":
    run_tool(soak)
