"""A training run that is killed and resumed ends bit-equal to an uninterrupted one."""

import shutil
import signal

import pytest

from tests.support import forked
from tests.support.pipeline import ROOT, differences, resumable, training_state


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vqvae", "transformer"])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(copy_pipeline, stage, capfd):
    pipeline = copy_pipeline()
    fit, checkpoint = resumable(pipeline, stage), pipeline.checkpoint(stage)
    shutil.rmtree(checkpoint.parent)
    pipeline.main(*fit)
    expected = training_state(checkpoint)

    shutil.rmtree(checkpoint.parent)
    killer = ["--trainer.callbacks+=tests.support.killer.Killer", "--trainer.callbacks.step=5"]
    killed = forked.run(ROOT / "cli.py", *fit, *killer, cwd=pipeline.folder)
    assert killed.returncode == -signal.SIGKILL
    capfd.readouterr()
    pipeline.main(*fit, "--data.num_workers=2")
    assert "at step 4" in capfd.readouterr().out
    assert not differences(expected, training_state(checkpoint))
    assert len(expected) > 100
