import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks import RunSummary


class LitToy(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(99, 10)
        self.decoder = nn.Linear(1, 1)
        self.parameterless = nn.ReLU()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.decoder(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", 0.12345)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


LOADER = DataLoader(torch.ones(8, 1), batch_size=2)


def trainer(tmp_path, **flags) -> Trainer:
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "checkpoints", monitor="val/loss", save_last=True)
    return Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RunSummary(), checkpoint],
        **flags,
    )


def test_fit_prints_a_header_and_its_checkpoints(tmp_path, capsys):
    trainer(tmp_path, max_steps=2, accumulate_grad_batches=2).fit(LitToy(), LOADER, LOADER)
    lines = capsys.readouterr().out.splitlines()
    assert f"Run folder   {tmp_path}" in lines
    assert "Device       cpu x 1, precision 32-true" in lines
    assert "Parameters   encoder 1 k, decoder 2 (total 1 k)" in lines
    assert "Batch        4 samples per step, 2 steps per epoch" in lines
    assert f"Start        No checkpoint in {tmp_path}/checkpoints, starting at step 0" in lines
    assert lines[-2].startswith("Best         val/loss 0.1235 in ")
    assert lines[-1] == f"Last         {tmp_path}/checkpoints/last.ckpt"


def test_validating_inside_fit_prints_no_second_header(tmp_path, capsys):
    trainer(tmp_path, max_epochs=2).fit(LitToy(), LOADER, LOADER)
    assert capsys.readouterr().out.count("Run folder") == 1


def test_other_commands_print_their_checkpoint(tmp_path, capsys):
    trainer(tmp_path, max_steps=1).fit(LitToy(), LOADER, LOADER)
    capsys.readouterr()
    last = tmp_path / "checkpoints/last.ckpt"
    trainer(tmp_path).validate(LitToy(), LOADER, ckpt_path=last, verbose=False)
    assert f"Checkpoint   {last}" in capsys.readouterr().out
    trainer(tmp_path).predict(LitToy(), LOADER)
    assert "Checkpoint   none: the weights are newly initialized" in capsys.readouterr().out
