"""Two processes train as one does, and any number of processes can resume from their checkpoints."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import cli
from t2v.__main__ import export
from t2v.checkpoints.lookup import newest_last, read_model_config
from t2v.checkpoints.storage import MARKER, read_checkpoint, replace_checkpoint
from t2v.errors import UserError
from t2v.training.planner.run import alternative_optimizers, takes_sharded_parameters
from t2v.vqvae.loading import load_vqvae
from tests.support import forked
from tests.support.pipeline import ROOT, Pipeline, differences, training_state
from tests.support.recorder import losses

STEPS = 12
SHARDED = ["-c", str(ROOT / "configs/cluster/fsdp.yaml"), "--trainer.precision=32-true"]
TWO = ["--trainer.devices=2", "--data.batch_size=4"]
ONE = ["--trainer.devices=1", "--data.batch_size=4", "--trainer.accumulate_grad_batches=2"]
"""Two batches per step, as with two ranks."""
TENSOR = [*SHARDED, *ONE, "--trainer.devices=2", "--trainer.strategy.tensor_parallel_size=2"]
ADAMW = '--model.optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 4e-3}}'
"""Replaces Muon, which amplifies rounding."""
OPTIMIZERS = {name: each for name, each in alternative_optimizers().items() if takes_sharded_parameters(name)}
"""What a plan recommends for several devices."""
PROMPTS = '["a red circle", "a large blue square moves left"]'


def command(pipeline: Pipeline, stage: str, name: str, *flags: str) -> list[str]:
    """Return the command of a run that saves a checkpoint every fourth step and writes its losses to a folder."""
    run = pipeline.run / name
    callbacks = [
        {
            "class_path": "ModelCheckpoint",
            "init_args": {
                "dirpath": str(run / "checkpoints"),
                "filename": "{step}",
                "save_last": True,
                "save_top_k": -1,
                "every_n_train_steps": 4,
            },
        },
        {"class_path": "callbacks.EMA", "init_args": {"decay": 0.5}},
        {"class_path": "tests.support.recorder.Losses", "init_args": {"folder": str(run / "losses")}},
    ]
    config = pipeline.folder / f"{name}.yaml"
    trainer = {"callbacks": callbacks, "max_steps": STEPS, "limit_val_batches": 0, "logger": False}
    config.write_text(yaml.safe_dump({"trainer": trainer}))
    return ["fit", *pipeline.config(stage), "-c", str(config), *flags]


def launch(pipeline: Pipeline, args: list[str], ranks: int = 2) -> subprocess.CompletedProcess[str]:
    return forked.run_ranks(ranks, ROOT / "cli.py", *args, cwd=pipeline.folder)


def at(pipeline: Pipeline, name: str, step: int | str) -> Path:
    """Return the path of a checkpoint of a run."""
    return pipeline.run / name / "checkpoints" / (f"step={step}.ckpt" if isinstance(step, int) else f"{step}.ckpt")


def consolidated(folder: Path, path: Path) -> Path:
    """Convert a sharded checkpoint to one file by torch's own tool."""
    dcp_to_torch_save(folder, path)
    weights = torch.load(path, weights_only=False)
    torch.save({**torch.load(folder / MARKER, weights_only=True), "state_dict": weights["state_dict"]}, path)
    return path


@pytest.fixture(autouse=True)
def _no_group():
    """Remove the process group of a sharded run in this process."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def pipeline(trained_pipeline, tmp_path_factory) -> Pipeline:
    folder = tmp_path_factory.mktemp("ranks") / "pipeline"
    shutil.copytree(trained_pipeline.folder, folder, ignore=shutil.ignore_patterns("clips"))
    return Pipeline(folder)


@pytest.fixture(scope="module")
def runs(pipeline) -> SimpleNamespace:
    """Runs of the transformer: one process, and FSDP with two processes."""
    flags = ["--model.objective.caption_dropout=0", "--model.objective.corruption=0", ADAMW]  # random per rank
    pipeline.main(*command(pipeline, "transformer", "one", *flags, *ONE))
    done = launch(pipeline, command(pipeline, "transformer", "fsdp", *flags, *SHARDED, *TWO))
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(flags=flags, one=losses(pipeline.run / "one/losses", 1))


def test_two_sharded_processes_have_the_losses_of_one(pipeline, runs):
    assert len(runs.one) == 2 * STEPS
    assert runs.one[-1] < 0.9 * runs.one[0]
    assert losses(pipeline.run / "fsdp/losses", 2) == pytest.approx(runs.one, abs=1e-4)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(pipeline, runs):
    flags = [*runs.flags, "-c", str(ROOT / "configs/cluster/ddp.yaml"), *TWO]
    done = launch(pipeline, command(pipeline, "transformer", "ddp", *flags))
    assert done.returncode == 0, done.stderr
    assert losses(pipeline.run / "ddp/losses", 2) == pytest.approx(runs.one, abs=1e-4)


@pytest.mark.slow
def test_two_processes_train_on_windows_of_one_frame(pipeline):
    """They use no features of the previous frame, whose weights then have no gradients."""
    flags = ["-c", str(ROOT / "configs/cluster/ddp.yaml"), *TWO, "--data.frames=1", "--trainer.max_steps=3"]
    done = launch(pipeline, command(pipeline, "transformer", "ddp-one-frame", *flags))
    assert done.returncode == 0, done.stderr
    assert len(losses(pipeline.run / "ddp-one-frame/losses", 2)) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_sharded_runs_in_mixed_precision_have_the_losses_of_one_process_and_resume(pipeline, runs, compiled):
    """The layers are gathered in bfloat16, with FSDP's hooks on layers that may be compiled."""
    flags = [*runs.flags, "--trainer.precision=bf16-mixed", "--trainer.max_steps=8"]
    name = f"mixed-{compiled}"
    pipeline.main(*command(pipeline, "transformer", f"{name}-one", *flags, *ONE))
    flags += ["-c", str(ROOT / "configs/cluster/fsdp.yaml"), *TWO, f"--model.compiled={str(compiled).lower()}"]
    for run, more in ((name, []), (f"{name}-resumed", [f"--ckpt_path={at(pipeline, name, 4)}"])):
        done = launch(pipeline, command(pipeline, "transformer", run, *flags, *more))
        assert done.returncode == 0, done.stderr
    alone, sharded, resumed = (
        losses(pipeline.run / f"{run}/losses", ranks)
        for run, ranks in ((f"{name}-one", 1), (name, 2), (f"{name}-resumed", 2))
    )
    assert sharded == pytest.approx(alone, abs=0.02)
    assert resumed == sharded[8:]
    assert not differences(*(training_state(at(pipeline, run, "last")) for run in (name, f"{name}-resumed")))
    float32 = training_state(at(pipeline, name, "last"))
    assert {value.dtype for key, value in float32.items() if "/state_dict/model." in key} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_that_a_plan_recommends_train_and_resume_with_sharded_weights(pipeline, optimizer):
    """With a moving average, a guard and sharded checkpoints."""
    factory = OPTIMIZERS[optimizer]
    built, arguments = (factory.func, factory.keywords) if isinstance(factory, partial) else (factory, {})
    chosen = {"class_path": f"{built.__module__}.{built.__qualname__}", "init_args": {"lr": 4e-3, **arguments}}
    flags = [f"--model.optimizer={json.dumps(chosen)}", "--trainer.max_steps=8", "--model.model.dim=128"]
    flags += ["--model.objective.caption_dropout=0", "--model.objective.corruption=0"]  # random per rank
    flags += ["--model.model.hidden_dim=192", "--trainer.callbacks+=callbacks.NaNGuard", *SHARDED, *TWO]
    name = f"plan-{built.__name__}"
    for run, more in ((name, []), (f"{name}-resumed", [f"--ckpt_path={at(pipeline, name, 4)}"])):
        done = launch(pipeline, command(pipeline, "transformer", run, *flags, *more))
        assert done.returncode == 0, done.stderr
    whole, resumed = (losses(pipeline.run / f"{run}/losses", 2) for run in (name, f"{name}-resumed"))
    assert len(whole) == 16
    assert whole[-1] < whole[0]
    assert resumed == whole[8:]
    assert not differences(*(training_state(at(pipeline, run, "last")) for run in (name, f"{name}-resumed")))
    rest = command(pipeline, "transformer", f"{name}-alone", *flags, *ONE, f"--ckpt_path={at(pipeline, name, 4)}")
    done = launch(pipeline, rest, ranks=1)
    assert done.returncode == 0, done.stderr
    assert losses(pipeline.run / f"{name}-alone/losses", 1) == pytest.approx(whole[8:], abs=0.01)


@pytest.mark.slow
def test_muon_with_sharded_weights(pipeline, runs):
    """Muon multiplies full matrices, which are sharded over the ranks, here started by torchrun."""
    flags = [flag for flag in runs.flags if flag != ADAMW]
    pipeline.main(*command(pipeline, "transformer", "muon-one", *flags, *ONE), "--trainer.max_steps=6")
    sharded = [*command(pipeline, "transformer", "muon-fsdp", *flags, *SHARDED, *TWO), "--trainer.max_steps=6"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *torchrun, ROOT / "cli.py", *sharded],
        cwd=pipeline.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    alone, sharded = losses(pipeline.run / "muon-one/losses", 1), losses(pipeline.run / "muon-fsdp/losses", 2)
    assert len(alone) == 12
    assert sharded == pytest.approx(alone, abs=1e-3)


@pytest.fixture(scope="module")
def tensor_parallel(pipeline) -> list[float]:
    """Losses of one process, after a tensor-parallel run too; both drop the same captions."""
    pipeline.main(*command(pipeline, "transformer", "alone", ADAMW, *ONE))
    done = launch(pipeline, command(pipeline, "transformer", "tensor", ADAMW, *TENSOR))
    assert done.returncode == 0, done.stderr
    return losses(pipeline.run / "alone/losses", 1)


@pytest.mark.slow
def test_two_tensor_parallel_processes_have_the_losses_of_one(pipeline, tensor_parallel):
    assert len(tensor_parallel) == 2 * STEPS
    for rank in range(2):
        of_rank = [float(line) for line in (pipeline.run / f"tensor/losses/{rank}").read_text().split()]
        assert of_rank == pytest.approx(tensor_parallel, abs=1e-4)


@pytest.mark.slow
def test_tensor_parallel_and_single_process_runs_resume_from_each_other(pipeline, tensor_parallel):
    then_alone = command(pipeline, "transformer", "then-alone", ADAMW, *ONE)
    pipeline.main(*then_alone, f"--ckpt_path={at(pipeline, 'tensor', 4)}")
    then_tensor = command(pipeline, "transformer", "then-tensor", ADAMW, *TENSOR)
    done = launch(pipeline, [*then_tensor, f"--ckpt_path={at(pipeline, 'alone', 4)}"])
    assert done.returncode == 0, done.stderr
    for name in ("then-alone", "then-tensor"):
        assert losses(pipeline.run / name / "losses", 1) == pytest.approx(tensor_parallel[8:], abs=1e-4)


@pytest.mark.parametrize(("one", "two"), [("one", "fsdp"), pytest.param("alone", "tensor", marks=pytest.mark.slow)])
def test_a_sharded_checkpoint_equals_that_of_one_process(pipeline, request, one, two):
    request.getfixturevalue("tensor_parallel" if two == "tensor" else "runs")
    alone, sharded = (training_state(at(pipeline, name, "last")) for name in (one, two))
    numbers = {name: value for name, value in alone.items() if isinstance(value, torch.Tensor)}
    weights = [name for name in numbers if not name.startswith("/optimizer")]
    assert len(weights) > 50
    for name in weights:  # by norm, since the optimizers amplify the rounding errors of small gradients
        assert (sharded[name] - numbers[name]).float().norm() <= 0.1 * numbers[name].float().norm(), name
    moments = sum(name.endswith("exp_avg_sq") for name in sharded)
    assert moments == sum(name.endswith("exp_avg_sq") for name in alone) > 20


@pytest.mark.slow
def test_a_signal_to_one_of_two_ranks_stops_both_and_resuming_is_exact(pipeline, runs):
    """Two ranks, of which Lightning starts the second, resume from step 4 and stop in step 8; one rank goes on."""
    killer = ["--trainer.callbacks+=tests.support.killer.Killer", "--trainer.callbacks.step=7"]
    killer += ["--trainer.callbacks.name=SIGTERM", "--trainer.callbacks.rank=1"]
    resumed = command(pipeline, "transformer", "again", *runs.flags, *SHARDED, *TWO, *killer)
    resumed.append(f"--ckpt_path={at(pipeline, 'fsdp', 4)}")
    done = forked.run(ROOT / "cli.py", *resumed, cwd=pipeline.folder, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 75, done.stderr
    assert done.stderr.count("Stopped by SIGTERM at step 8") == 1
    assert not differences(training_state(at(pipeline, "fsdp", 8)), training_state(at(pipeline, "again", "last")))
    assert losses(pipeline.run / "again/losses", 2) == losses(pipeline.run / "fsdp/losses", 2)[8:16]

    rest = command(pipeline, "transformer", "rest", *runs.flags, *ONE)
    pipeline.main(*rest, f"--ckpt_path={at(pipeline, 'again', 'last')}")
    assert losses(pipeline.run / "rest/losses", 1) == pytest.approx(runs.one[16:], abs=1e-4)


@pytest.mark.slow
def test_a_sharded_run_resumes_from_a_file(pipeline, runs):
    flags = command(pipeline, "transformer", "sharded", *runs.flags, *SHARDED, *ONE)
    pipeline.main(*flags, f"--ckpt_path={at(pipeline, 'one', 4)}")
    assert losses(pipeline.run / "sharded/losses", 1) == pytest.approx(runs.one[8:], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "tensor"])
def test_generation_validation_and_export_read_a_sharded_checkpoint(pipeline, request, tmp_path, name):
    request.getfixturevalue("tensor_parallel" if name == "tensor" else "runs")
    folder = at(pipeline, name, "last")
    file = consolidated(folder, tmp_path / "one.ckpt")
    assert read_checkpoint(folder)["state_dict"].keys() == read_checkpoint(file)["state_dict"].keys()
    videos, scores, exports = [], [], []
    for checkpoint, strategy in ((folder, SHARDED), (file, [])):
        generated = pipeline.run / "videos"
        pipeline.cli("predict", "transformer", f"--ckpt_path={checkpoint}", "--data.prompts", PROMPTS)
        videos.append({path.name: path.read_bytes() for path in generated.rglob("*.mp4")})
        shutil.rmtree(generated)
        validated = pipeline.cli("validate", "transformer", f"--ckpt_path={checkpoint}", *strategy)
        scores.append(validated.trainer.callback_metrics["val/loss"])
        exported = tmp_path / f"{checkpoint.name}.exported"
        export(str(checkpoint), str(exported), str(pipeline.checkpoint("vqvae")))
        exports.append((exported / "transformer/model.safetensors").read_bytes())
    assert len(videos[0]) == 2
    assert videos[0] == videos[1]
    assert exports[0] == exports[1]
    torch.testing.assert_close(*scores, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_stage_one_with_sharded_weights(pipeline, compiled):
    """Losses before quantization are those of one process, and the sharded checkpoint is a tokenizer."""
    flags = ["--trainer.max_steps=8", "--model.quantize_from_step=5"]
    one, fsdp = f"vqvae-one-{compiled}", f"vqvae-fsdp-{compiled}"
    pipeline.main(*command(pipeline, "vqvae", one, *flags, *ONE))
    flags.append(f"--model.compiled={str(compiled).lower()}")
    done = launch(pipeline, command(pipeline, "vqvae", fsdp, *flags, *SHARDED, *TWO))
    assert done.returncode == 0, done.stderr
    alone, sharded = losses(pipeline.run / one / "losses", 1), losses(pipeline.run / fsdp / "losses", 2)
    assert len(sharded) == 16
    assert sharded[:10] == pytest.approx(alone[:10], abs=1e-4)

    folder = at(pipeline, fsdp, "last")
    file = consolidated(folder, pipeline.folder / "vqvae.ckpt")
    assert load_vqvae(str(folder)).fingerprint() == load_vqvae(str(file)).fingerprint()
    assert pipeline.cli("validate", "vqvae", f"--ckpt_path={folder}").model.model.quantizer.ready


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "devices", "tp_size", "message"),
    [
        ("transformer", 3, 2, "tensor_parallel_size=2 must divide the number of devices, 3"),
        ("transformer", 3, 3, "must divide the transformer's"),
        ("vqvae", 2, 2, "a VQ-VAE has no tensor parallelism"),
    ],
)
def test_an_impossible_tensor_parallel_size_is_rejected(pipeline, stage, devices, tp_size, message):
    flags = [f"--trainer.devices={devices}", f"--trainer.strategy.tensor_parallel_size={tp_size}"]
    done = launch(pipeline, ["fit", *pipeline.config(stage), *SHARDED, *flags], devices)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_discriminators_with_sharded_weights_are_rejected(pipeline, capsys):
    adversarial = "--model.adversarial=t2v.losses.AdversarialLoss"
    with pytest.raises(SystemExit):
        pipeline.cli("fit", "vqvae", *SHARDED, "--trainer.devices=1", adversarial)
    assert "use configs/cluster/ddp.yaml in place of configs/cluster/fsdp.yaml" in capsys.readouterr().err


def test_a_strategy_that_overwrites_sharded_checkpoints_is_rejected(pipeline, capsys):
    lightnings_own = '--trainer.strategy={"class_path": "ModelParallelStrategy"}'
    with pytest.raises(SystemExit):
        pipeline.cli("fit", "transformer", lightnings_own, "--trainer.devices=1")
    assert "use t2v.training.sharding.ShardedStrategy" in capsys.readouterr().err


def complete_folder(folder: Path, name: str, step: int) -> Path:
    """Create a folder that looks like a complete sharded checkpoint."""
    path = folder / name
    path.mkdir()
    torch.save({"global_step": step}, path / MARKER)
    return path


@pytest.mark.parametrize("stage", ["writing", "written", "moved", "named", "removing"])
def test_the_last_checkpoint_is_complete_if_the_process_is_killed(tmp_path, stage):
    new = tmp_path / "last.ckpt.partial"
    match stage:
        case "writing":
            complete_folder(tmp_path, "last.ckpt", 1)
            (complete_folder(tmp_path, new.name, 2) / MARKER).unlink()
        case "written":
            complete_folder(tmp_path, "last.ckpt", 1)
            complete_folder(tmp_path, new.name, 2)
        case "moved":
            complete_folder(tmp_path, "last-old.ckpt", 1)
            complete_folder(tmp_path, new.name, 2)
        case "named":
            os.utime(complete_folder(tmp_path, "last-old.ckpt", 1) / MARKER, (1, 1))
            complete_folder(tmp_path, "last.ckpt", 2)
        case "removing":
            (complete_folder(tmp_path, "last-old.ckpt", 1) / MARKER).unlink()
            complete_folder(tmp_path, "last.ckpt", 2)
    found = newest_last(str(tmp_path))
    assert read_step(Path(found)) == (1 if stage in ("writing", "written", "moved") else 2)
    shutil.rmtree(new, ignore_errors=True)
    replace_checkpoint(complete_folder(tmp_path, new.name, 3), tmp_path / "last.ckpt")
    assert read_step(Path(newest_last(str(tmp_path)))) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def read_step(folder: Path) -> int:
    return torch.load(folder / MARKER, weights_only=True)["global_step"]


def test_an_incomplete_folder_is_no_checkpoint(tmp_path, capsys):
    (complete_folder(tmp_path, "last.ckpt", 1) / MARKER).unlink()
    (tmp_path / "last.ckpt/__0_0.distcp").touch()
    assert newest_last(str(tmp_path)) is None
    for load in (read_checkpoint, lambda path: load_vqvae(str(path)), lambda path: read_model_config(str(path))):
        with pytest.raises(UserError, match="not written completely"):
            load(tmp_path / "last.ckpt")


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
@pytest.mark.parametrize("overlay", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "config",
    [
        "vqvae/shapes",
        pytest.param("vqvae/footage", marks=pytest.mark.slow),
        pytest.param("transformer/shapes", marks=pytest.mark.slow),
        "transformer/8b",
    ],
)
def test_cluster_overlays_fit_both_stages(overlay, config, monkeypatch):
    monkeypatch.setattr(cli.T2VCLI, "_run_subcommand", lambda self, subcommand: None)
    files = [f"--config={ROOT}/configs/{name}.yaml" for name in (config, f"cluster/{overlay}")]
    with torch.device("meta"):
        built = cli.main(["fit", *files, "--trainer.accelerator=cpu", "--trainer.devices=2"])
    assert built.trainer.num_devices == 2
    assert type(built.trainer.strategy).__name__ == {"ddp": "DDPStrategy", "fsdp": "ShardedStrategy"}[overlay]
