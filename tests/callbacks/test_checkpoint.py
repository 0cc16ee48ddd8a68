import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from callbacks import LastCheckpoint


class LitCounter(LightningModule):
    """Adds one to its weight at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return -self.weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(folder, max_steps: int, resume: bool = False) -> tuple[int, float]:
    """Train with a checkpoint every third step, and return the step and the weight in last.ckpt."""
    checkpoint = ModelCheckpoint(dirpath=folder, save_last=True, every_n_train_steps=3, save_top_k=0)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=max_steps,
        callbacks=[LastCheckpoint(), checkpoint],
    )
    loader = DataLoader(torch.zeros(4, 1))
    trainer.fit(LitCounter(), loader, ckpt_path=folder / "last.ckpt" if resume else None, weights_only=True)
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    return saved["global_step"], float(saved["state_dict"]["weight"])


@pytest.mark.parametrize("steps", [2, 3, 5, 8])
def test_last_ckpt_is_of_the_last_step(tmp_path, steps):
    assert fit(tmp_path, steps) == (steps, steps)
    assert fit(tmp_path, steps + 5, resume=True) == (steps + 5, steps + 5)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
