import json

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks import MetricsReport
from t2v.metrics import FrechetVideoDistance, MobileNetClipFeatures

LOADER = DataLoader(torch.ones(8, 1), batch_size=2)


class Blur:
    """A metric with a protocol."""

    name = "blur"

    def protocol(self) -> dict[str, object]:
        return {"network": "none", "limits": (0.0, float("inf"))}


class LitToy(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.metrics = (Blur(),)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log_dict({"val/blur": 0.25, "val/nan": float("nan")})

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test/blur", 0.5)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(*callbacks) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", max_steps=3, logger=False, callbacks=[*callbacks], **quiet)


def read(path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_validate_and_test_write_a_report(tmp_path, capsys):
    path = tmp_path / "run/validation.json"
    trainer(MetricsReport(str(path))).validate(LitToy(), LOADER, verbose=False)
    assert f"Wrote        {path}\n" in capsys.readouterr().out
    report = read(path)
    assert report["metrics"] == {"val/blur": 0.25, "val/nan": None}
    assert report["protocol"]["command"] == "validate"
    assert report["protocol"]["metrics"] == {"blur": {"network": "none", "limits": [0.0, None]}}
    assert report["protocol"]["checkpoint"] is None
    assert report["protocol"]["precision"] == "32-true"
    assert torch.__version__.startswith(report["versions"]["torch"])
    assert [file.name for file in path.parent.iterdir()] == ["validation.json"]

    trainer(MetricsReport(str(path))).test(LitToy(), LOADER, verbose=False)
    assert read(path)["metrics"] == {"test/blur": 0.5}


class LitDistance(LitToy):
    """Measures the distance of two sets of clips without saying of which."""

    def __init__(self, features) -> None:
        super().__init__()
        self.metrics = (FrechetVideoDistance(features),)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/frechet_mobilenet", 3.0)


def test_a_distance_is_refused_without_what_makes_it_comparable(tmp_path, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # of another test
    path = tmp_path / "validation.json"
    trainer(MetricsReport(str(path))).validate(LitDistance(MobileNetClipFeatures()), LOADER, verbose=False)
    report = read(path)
    assert report["metrics"] == {"val/frechet_mobilenet": None}
    entry = report["protocol"]["metrics"]["frechet_mobilenet"]
    assert entry["refused"] == "not comparable without split, fps, seed"
    assert entry["remark"].startswith("0 clips a side are fewer than 2 × 64 dimensions")


def test_training_writes_none(tmp_path):
    trainer(MetricsReport(str(tmp_path / "report.json"))).fit(LitToy(), LOADER, LOADER)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("averaged", [False, True])
def test_the_report_names_the_measured_weights(tmp_path, averaged):
    fitted = trainer(*[EMAWeightAveraging(decay=0.9)] * averaged)
    fitted.fit(LitToy(), LOADER)
    fitted.save_checkpoint(tmp_path / "toy.ckpt")
    report = MetricsReport(str(tmp_path / "report.json"))
    trainer(report).validate(LitToy(), LOADER, ckpt_path=tmp_path / "toy.ckpt", verbose=False)
    protocol = read(tmp_path / "report.json")["protocol"]
    assert protocol["checkpoint"] == str(tmp_path / "toy.ckpt")
    assert (protocol["step"], protocol["averaged_weights"]) == (3, averaged)


def test_the_report_of_the_command_line_has_the_protocol(trained_pipeline, tmp_path):
    path = tmp_path / "report.json"
    flags = ["--trainer.callbacks+=callbacks.MetricsReport", f"--trainer.callbacks.path={path}", "--seed_everything=3"]
    cli = trained_pipeline.cli("validate", "vqvae", "--ckpt_path", "last", *flags)
    report = read(path)
    assert report["metrics"]["val/psnr"] == pytest.approx(float(cli.trainer.callback_metrics["val/psnr"]))
    protocol = report["protocol"]
    assert protocol["checkpoint"].endswith("runs/demo/vqvae/checkpoints/last.ckpt")
    assert (protocol["step"], protocol["averaged_weights"], protocol["seed"]) == (12, False, 3)
    assert protocol["model"] == cli.model.fingerprint()
    assert set(protocol["metrics"]) == {metric.name for metric in cli.model.metrics}
    data = protocol["data"]
    assert (data["clips"], data["frames"], data["frames_per_clip"]) == (8, 16, 2)
    assert (data["size"], data["fps"], data["shards"]) == (64, 8.0, "runs/demo/shards/val")
