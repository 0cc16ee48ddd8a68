"""Training on one card: it resumes bit-equal, FP8 and FSDP2 work, and its speed and memory are recorded."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from data.shards import ShardWriter
from t2v.training.planner.run import PlannedRun
from t2v.video.writing import encode_mp4
from t2v.vqvae.model import VQVAE
from t2v.vqvae.quantizer import VectorQuantizer
from tests.gpu.conftest import DEVICE
from tests.support.pipeline import ROOT, Pipeline, differences, resumable, training_state
from tests.support.stopwatch import Stopwatch

ACCELERATOR = "gpu" if DEVICE == "cuda" else "cpu"
ON_CARD = (f"--trainer.accelerator={ACCELERATOR}", "--trainer.devices=1")
STEPS = 14
"""Steps of the runs whose speed is measured."""


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Pipeline:
    """The toy pipeline up to token shards, on the CPU."""
    pipeline = Pipeline(tmp_path_factory.mktemp("pipeline"))
    pipeline.prepare()
    pipeline.fit("vqvae")
    pipeline.cli("predict", "vqvae", "--ckpt_path", "last")
    return pipeline


@pytest.fixture
def pipeline(tokens, tmp_path) -> Pipeline:
    """A copy of it, since tests train both stages anew."""
    return Pipeline(shutil.copytree(tokens.folder, tmp_path / "pipeline"))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("stage", ["vqvae", "transformer"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(pipeline, stage, precision, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products
    checkpoint = pipeline.checkpoint(stage)
    options = [*ON_CARD, f"--trainer.precision={precision}", "--trainer.deterministic=true"]
    fit = [*resumable(pipeline, stage), *options]
    shutil.rmtree(checkpoint.parent, ignore_errors=True)
    pipeline.main(*fit)
    uninterrupted = training_state(checkpoint)

    shutil.rmtree(checkpoint.parent)
    killer = ["--trainer.callbacks+=tests.support.killer.Killer", "--trainer.callbacks.step=5"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    killed = subprocess.run([sys.executable, ROOT / "cli.py", *fit, *killer], cwd=pipeline.folder, env=environment)
    assert killed.returncode == -signal.SIGKILL
    pipeline.main(*fit)
    assert differences(uninterrupted, training_state(checkpoint)) == []


def test_fp8_trains_like_bfloat16(pipeline, record, tmp_path):
    losses = {}
    fp8 = {"trainer": {"plugins": [{"class_path": "t2v.training.Float8Precision"}], "precision": None}}
    (tmp_path / "fp8.yaml").write_text(yaml.safe_dump(fp8))
    for name, flags in (("bfloat16", ["--trainer.precision=bf16-mixed"]), ("fp8", ["-c", str(tmp_path / "fp8.yaml")])):
        run = pipeline.cli("fit", "transformer", *flags, *ON_CARD, "--trainer.callbacks=[]", "--trainer.max_steps=30")
        losses[name] = run.trainer.callback_metrics["train/loss"].item()
    record("fp8 training", **losses)
    assert losses["fp8"] == pytest.approx(losses["bfloat16"], rel=0.1)


def test_fsdp2_trains_and_resumes_on_one_card(pipeline, tmp_path):
    sharded = ["-c", str(ROOT / "configs/cluster/fsdp.yaml"), *ON_CARD]
    callback = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path), "save_last": True}}
    for limit in ("5", "9"):
        flags = ["--trainer.callbacks", json.dumps([callback]), "--trainer.max_steps", limit, "--ckpt_path", "last"]
        run = pipeline.cli("fit", "transformer", *sharded, *flags)
    assert run.trainer.global_step == 9
    assert run.trainer.callback_metrics["train/loss"].isfinite()


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """Random token shards of 16×16 tokens a frame with text embeddings 4,096 wide, and their VQ-VAE and T5 config."""
    folder = tmp_path_factory.mktemp("full-size")
    vqvae = VQVAE(image_size=128, base_channels=8, latent_patch_size=1, quantizer=VectorQuantizer(16384))
    vqvae.quantizer.initialized.fill_(True)
    vqvae.save_pretrained(folder / "vqvae")
    (folder / "t5").mkdir()
    config = {"model_type": "t5", "d_model": 4096, "d_kv": 64, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    (folder / "t5/config.json").write_text(json.dumps(config))
    fingerprint = {"tokenizer": vqvae.fingerprint(), "codebook_size": 16384, "grid_size": 16, "image_size": 128}
    metadata = {"caption": "noise", "fps": 30.0, "fingerprint": {**fingerprint, "fps": 30.0, "text_encoder": "t5"}}
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        with ShardWriter(folder / "tokens" / part, 64) as writer:
            for i in range(64):
                writer.write(
                    {
                        "__key__": f"{part}-{i}",
                        "tokens.npy": rng.integers(16384, size=(32, 16, 16), dtype=np.uint16),
                        "text.npy": rng.normal(size=(16, 4096)).astype(np.float16),
                        "json": metadata,
                    }
                )
    return folder


def speed_and_memory(config: str, folder: Path, flags: dict[str, object]) -> dict[str, float]:
    """Train a shipped config for some steps, and compare with its plan."""
    from cli import main

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    common = {
        "trainer.default_root_dir": folder,
        "trainer.max_steps": STEPS,
        "trainer.accumulate_grad_batches": 1,
        "trainer.limit_val_batches": 0,
        "trainer.callbacks": "[tests.support.stopwatch.Stopwatch]",
        "trainer.logger": "false",
        "model.compiled": "true",
    }
    options = [f"--{name}={value}" for name, value in {**common, **flags}.items()]
    run = main(["fit", "-c", str(ROOT / f"configs/{config}.yaml"), *ON_CARD, *options])
    peak = torch.cuda.max_memory_allocated()
    plan = PlannedRun(run.model, run.datamodule, run.trainer, "cuda")
    planned = plan.budget(plan.setting, plan.clips).peak
    seconds = next(each.seconds for each in run.trainer.callbacks if isinstance(each, Stopwatch))
    return {"seconds_per_step": seconds, "peak_gb": peak / 1e9, "planned_gb": planned / 1e9}


@pytest.mark.parametrize("size", ["300m", "1b"])
@pytest.mark.usefixtures("needs_gpu")
def test_speed_and_memory_of_the_transformer(full_size, record, size, tmp_path):
    flags = {
        "model.tokenizer": full_size / "vqvae",
        "model.text_encoder.init_args.path_or_name": full_size / "t5",
        "data.train": full_size / "tokens/train",
        "data.val": full_size / "tokens/val",
    }
    figures = speed_and_memory(f"transformer/{size}", tmp_path, flags)
    record("training the transformer", **{size: figures})
    assert figures["peak_gb"] == pytest.approx(figures["planned_gb"], rel=0.15)


@pytest.fixture(scope="module")
def footage(tmp_path_factory) -> Path:
    """Shards of one clip of 512×512 pixels under many names."""
    folder = tmp_path_factory.mktemp("footage")
    generator = torch.Generator().manual_seed(0)
    picture = torch.randint(256, (3, 20, 20), dtype=torch.uint8, generator=generator).repeat_interleave(32, 1)
    picture = picture.repeat_interleave(32, 2)
    video = torch.stack([picture[:, 3 * t : 3 * t + 512, 2 * t : 2 * t + 512] for t in range(34)])
    clip = encode_mp4(video, fps=30)
    for part in ("train", "val"):
        with ShardWriter(folder / part, 64) as writer:
            for i in range(384 if part == "train" else 8):
                writer.write({"__key__": f"{part}-{i}", "mp4": clip, "json": {"caption": "squares"}})
    return folder


@pytest.mark.parametrize("size", [128, 256, 512])
@pytest.mark.usefixtures("needs_gpu")
def test_speed_and_memory_of_the_vqvae(footage, record, size, tmp_path):
    """Compiled layers need about a quarter less memory than the plan, which counts operations one by one."""
    flags = {"model.metrics": "[]", "data.train": footage / "train", "data.val": footage / "val"}
    figures = speed_and_memory(f"vqvae/{size}", tmp_path, flags)
    record("training the VQ-VAE", **{str(size): figures})
    assert 0.6 * figures["planned_gb"] < figures["peak_gb"] < 1.1 * figures["planned_gb"]
