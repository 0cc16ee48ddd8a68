"""A run that receives a signal saves at the end of its step, and can be resumed exactly."""

import os
import shutil

import pytest
import torch

from tests.support import forked
from tests.support.pipeline import ROOT, differences, resumable, training_state

SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


@pytest.mark.parametrize(
    ("stage", "name", "batches"),
    [pytest.param("vqvae", "SIGUSR1", 1, marks=pytest.mark.slow), ("transformer", "SIGTERM", 2)],
)
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(copy_pipeline, tmp_path, stage, name, batches, capfd):
    pipeline = copy_pipeline()
    fit, checkpoint = resumable(pipeline, stage), pipeline.checkpoint(stage)
    fit += [f"--trainer.accumulate_grad_batches={batches}", "--data.batch_size=4"]
    shutil.rmtree(checkpoint.parent)
    pipeline.main(*fit)
    expected = training_state(checkpoint)

    shutil.rmtree(checkpoint.parent)
    scontrol = tmp_path / "bin/scontrol"  # as SLURM provides it
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    scontrol.chmod(0o755)
    killer = ["+=tests.support.killer.Killer", ".step=4", f".name={name}"]
    flags = [f"--trainer.callbacks{option}" for option in killer]
    environment = {**SLURM, "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    stopped = forked.run(ROOT / "cli.py", *fit, *flags, cwd=pipeline.folder, env=environment)
    assert stopped.returncode == 75, stopped.stderr
    assert f"Stopped by {name} at step 5; the same command with --ckpt_path last resumes the run.\n" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 5
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() if requeued.exists() else "") == ("requeue 1234\n" if name == "SIGUSR1" else "")
    assert not list(tmp_path.rglob("hpc_ckpt*"))

    capfd.readouterr()
    pipeline.main(*fit)
    assert "at step 5" in capfd.readouterr().out
    assert not differences(expected, training_state(checkpoint))
