"""Kills and resumes training many times, and compares its end with an uninterrupted run: `python -m tests.soak.resume`.

Both stages train at toy sizes, with two workers and a checkpoint every second step. A process is killed (SIGKILL) at a
random time after it has started to train, and is started again; every fourth process is killed while it writes a
checkpoint. Every second process has its TMPDIR on another file system than the run.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

from t2v.checkpoints.storage import partial_path, saved_step
from t2v.errors import run_tool
from tests.support.pipeline import ROOT, Pipeline, differences, resumable, training_state

OTHER_FILE_SYSTEM = "/dev/shm"


class Kill(NamedTuple):
    """What a killed process did."""

    start: str
    """The step at which it started."""
    saving: bool
    """Whether it was killed while it wrote a checkpoint."""
    readable: bool
    """Whether last.ckpt was complete after that, or not yet there."""


def soak(kills: int = 100, steps: int = 2000, longest: float = 1.5, seed: int = 0) -> None:
    """Print for each stage how often it was killed, and how many values differ at the end.

    Args:
        kills: Number of kills, over both stages.
        steps: Training steps of each stage.
        longest: Maximum seconds of training before a kill.
        seed: Seed of the random times.

    Raises:
        SystemExit: If a value differs, a checkpoint cannot be read, or a process fails.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        if Path(folder).stat().st_dev == Path(OTHER_FILE_SYSTEM).stat().st_dev:
            raise SystemExit(f"{folder} is on the file system of {OTHER_FILE_SYSTEM}: set TMPDIR to another one.")
        pipeline = Pipeline(Path(folder))
        pipeline.prepare()
        wrong = 0
        for number, stage in enumerate(("vqvae", "transformer")):
            fit = [*resumable(pipeline, stage), f"--trainer.max_steps={steps}", "--data.num_workers=2"]
            checkpoint = pipeline.checkpoint(stage)
            _train(pipeline, fit, checkpoint)
            uninterrupted = training_state(checkpoint)
            shutil.rmtree(checkpoint.parent)
            done = []
            for kill in range(kills // 2 + number * (kills % 2)):
                after = rng.uniform(0, longest)
                tmpdir = OTHER_FILE_SYSTEM if kill % 2 else folder
                done.append(_train(pipeline, fit, checkpoint, after, saving=kill % 4 == 3, tmpdir=tmpdir))
                when = "during a save" if done[-1].saving else f"after {after:.2f} s"
                print(f"{stage}: resumed at step {done[-1].start}, killed {when}, TMPDIR={tmpdir}", flush=True)
            _train(pipeline, fit, checkpoint)
            found = differences(uninterrupted, training_state(checkpoint))
            unreadable = sum(not kill.readable for kill in done)
            print(
                f"{stage}: {len(done)} kills, {sum(kill.saving for kill in done)} of them during a save, {unreadable} "
                f"unreadable last.ckpt; {len(uninterrupted)} tensors and numbers, {len(found)} differ",
                flush=True,
            )
            wrong += len(found) + unreadable
            if number == 0:
                pipeline.cli("predict", stage, "--ckpt_path", "last")
    if wrong:
        raise SystemExit(f"{wrong} differences and unreadable checkpoints")


def _train(
    pipeline: Pipeline,
    fit: list[str],
    checkpoint: Path,
    kill_after: float | None = None,
    saving: bool = False,
    tmpdir: str | None = None,
) -> Kill:
    """Run one process to its end, or until it is killed: some seconds after its start, or then at the next save."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if tmpdir:
        environment["TMPDIR"] = tmpdir
    with subprocess.Popen(
        [sys.executable, ROOT / "cli.py", *fit], cwd=pipeline.folder, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        started = next((line for line in process.stdout if line.startswith("Start ")), None)
        if started is None:
            raise SystemExit("a process had no steps left to train: raise steps, or see its message above")
        start = time.time()
        partial = partial_path(checkpoint)  # there may be one of the process before
        killer = threading.Thread(target=_kill, args=(process, kill_after, partial if saving else None, start))
        if kill_after is not None:
            killer.start()
        process.stdout.read()
        code = process.wait()
        if kill_after is not None:
            killer.join()
    expected = 0 if kill_after is None else -signal.SIGKILL
    if code != expected:
        raise SystemExit(f"a process ended with {code} instead of {expected}: raise steps, or see its message above")
    readable = saved_step(checkpoint) is not None if checkpoint.exists() else not any(checkpoint.parent.glob("*.ckpt"))
    return Kill(started.split("at step")[-1].strip(), _is_newer(partial, start), readable)


def _kill(process: subprocess.Popen[str], after: float | None, partial: Path | None, start: float) -> None:
    """Kill a process after some seconds, and if a file is given, then when it appears."""
    time.sleep(after or 0)
    while partial is not None and not _is_newer(partial, start) and process.poll() is None:
        time.sleep(0.0002)
    process.kill()


def _is_newer(path: Path, start: float) -> bool:
    """Return whether a file was written after a time."""
    try:
        return path.stat().st_mtime > start
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    run_tool(soak)
