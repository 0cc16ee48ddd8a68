"""``test`` of stage 2: videos for held-out captions, beside reconstructions and real clips."""

import json
import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.modules.module import register_module_forward_hook

from callbacks import GenerationEvaluation
from t2v.errors import UserError


@pytest.mark.slow
def test_test_generates_and_reports_distances_accuracies_and_speed(copy_pipeline):
    pipeline = copy_pipeline()
    flags = ["--trainer.callbacks.frames=9", "--trainer.callbacks.clips=3", "--trainer.callbacks.batch_size=2"]
    flags += ["--trainer.callbacks.probe_clips=7", "--model.generation.parallel=1"]
    pipeline.cli("test", "transformer", "--ckpt_path", "last", "--model.generation.frames=12", *flags)
    report = json.loads((pipeline.run / "transformer/test.json").read_text())
    metrics, evaluation = report["metrics"], report["evaluation"]
    for name in ("fvd", "kvd"):
        for kind in ("", "_reconstruction", "_training", "_last_window"):
            assert isinstance(metrics[f"test/{name}{kind}"], float)
    assert 0 < metrics["test/nll_fraction"] < 1.5
    assert metrics["test/nll"] == pytest.approx(metrics["val/loss"])
    assert metrics["test/passes_per_frame"] == 4 * 4  # one for each token
    assert metrics["test/videos_per_second"] > 0
    for name in ("colour", "shape", "direction", "all"):
        for kind in ("", "_reconstruction", "_real", "_last_window"):
            accuracy = evaluation["accuracies"][f"probe_{name}{kind}"]
            assert accuracy["total"] == 3
            assert accuracy["low"] - 1e-9 <= accuracy["value"] <= accuracy["high"]
            assert metrics[f"test/probe_{name}{kind}"] == pytest.approx(accuracy["value"])
    assert evaluation["remark"].startswith("3 clips a side are fewer than 2 × 400 dimensions")
    assert (evaluation["clips"], evaluation["frames"], evaluation["fps"], evaluation["seed"]) == (3, 9, 8.0, 0)
    assert evaluation["probe_clips"] == 7
    assert len(evaluation["sha256"]) == 64
    logged = EventAccumulator(str(pipeline.run / "transformer")).Reload().Tags()
    assert "test/fvd" in logged["scalars"]
    assert "test: real, reconstructed, generated" in logged["images"]


def test_settings_that_measure_nothing_are_refused():
    with pytest.raises(UserError, match="clips=1"):
        GenerationEvaluation("test.json", "train", "val", clips=1)
    with pytest.raises(UserError, match="probe_clips=9 has no effect without attributes"):
        GenerationEvaluation("test.json", "train", "val", probe_clips=9)
    with pytest.raises(UserError, match="probe_clips=9 is less than the 10 clips"):
        GenerationEvaluation("test.json", "train", "val", attributes=["colour"], clips=10, probe_clips=9)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["clips=500"], r"clips=500 is more than there are: .* has 8 clips and .* 24;"),
        (["attributes=[color]"], r"has no color in its metadata, which has .*colour"),
        (["train=nowhere"], r"No shards .* in 'nowhere'"),
        (["probe_clips=3"], r"probe_clips=3 is less than the 8 clips"),
        (["judge=data.examples.digits_judge.DigitsJudge", "judge.weights=judge.safetensors"], r"has no 'digit'"),
    ],
)
def test_a_wrong_setting_is_reported_before_anything_is_computed(copy_pipeline, flags, message, capsys):
    pipeline, passes = copy_pipeline(), []
    flags = [f"--trainer.callbacks.{each}" for each in ("frames=9", *flags)]
    hook = register_module_forward_hook(lambda module, *_: passes.append(module))
    try:
        with pytest.raises(SystemExit):
            pipeline.cli("test", "transformer", "--ckpt_path", "last", "--model.generation.frames=9", *flags)
    finally:
        hook.remove()
    assert re.search(message, capsys.readouterr().err)
    assert not passes
    assert not (pipeline.run / "transformer/test.json").exists()
    assert not (pipeline.folder / "judge.safetensors").exists()
