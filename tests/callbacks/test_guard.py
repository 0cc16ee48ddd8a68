import json
import math

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks import EMA
from callbacks.guard import NaNGuard
from t2v import LitVQVAE
from t2v.batch import VideoBatch
from t2v.errors import UserError
from t2v.losses import AdversarialLoss, L1Loss
from t2v.training.lightning_private import average_of
from t2v.vqvae.quantizer import VectorQuantizer
from tests.support.toys import toy_vqvae

CLIPS = 12


class LitToy(LightningModule):
    """Learns one number per clip; given samples make the loss, or only the gradient, infinite."""

    def __init__(self, **poison: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.poison = poison

    def training_step(self, batch: VideoBatch, batch_idx: int) -> Tensor:
        x = batch.video.flatten(1)[:, :4].float() / 255
        how = next((self.poison[key] for key in batch.keys if key in self.poison), "")
        if how == "loss":
            x = x * math.inf
        loss = self.net(x).square().mean()
        if how == "gradient":
            loss = loss + (self.net[0].weight * 0).abs().sqrt().sum()  # the root's slope at zero is infinite
        return loss * 1000 if how == "spike" else loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"},
        }


class LitTwo(LitToy):
    """The same with two optimizers and manual optimization."""

    def __init__(self, **poison: str) -> None:
        super().__init__(**poison)
        self.automatic_optimization = False
        self.other = nn.Linear(1, 1)

    def training_step(self, batch: VideoBatch, batch_idx: int) -> None:
        first, second = self.optimizers()
        first.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        first.step()
        second.zero_grad()
        self.manual_backward(self.other(torch.ones(1, 1)).square().mean())
        second.step()

    def configure_optimizers(self):
        return [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in (self.net, self.other)]


class History(Callback):
    """Keeps the training state after every batch."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        state = dict(pl_module.state_dict())
        for i, optimizer in enumerate(trainer.optimizers):
            for j, values in optimizer.state_dict()["state"].items():
                state |= {f"optimizer{i}.{j}.{name}": value for name, value in values.items()}
        for callback in trainer.callbacks:
            if isinstance(callback, EMA):
                state |= {f"average.{name}": value for name, value in average_of(callback).state_dict().items()}
        self.states.append({name: value.clone() for name, value in state.items()})

    def changed(self, step: int) -> set[str]:
        before, after = self.states[step - 1], self.states[step]
        return {name for name in after if name not in before or not torch.equal(before[name], after[name])}


def collate(numbers: list[int]) -> VideoBatch:
    video = torch.randint(0, 256, (12, 2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return VideoBatch(video[numbers], [[""]] * len(numbers), [f"clip{i}" for i in numbers])


def fit(folder, model: LightningModule, *callbacks: Callback, **flags) -> Trainer:
    ckpt_path = flags.pop("ckpt_path", None)
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "default_root_dir": folder,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "callbacks": list(callbacks),
            **flags,
        }
    )
    trainer.fit(model, DataLoader(list(range(CLIPS)), batch_size=2, collate_fn=collate), ckpt_path=ckpt_path)
    return trainer


def records(folder) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "anomalies.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_skipped_step_changes_nothing(tmp_path, how, precision):
    history = History()
    with pytest.warns(UserWarning, match=f"Step 3 is skipped, its {how} is not finite"):
        trainer = fit(
            tmp_path, LitToy(clip7=how), NaNGuard(), EMA(0.9), history, gradient_clip_val=1.0, precision=precision
        )
    assert not history.changed(3)
    assert len(history.changed(2)) == len(history.changed(4)) > 20
    assert all(value.isfinite().all() for value in history.states[-1].values())
    assert trainer.global_step == 6
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.9**6)
    (record,) = records(tmp_path)
    assert record.pop("time").endswith("+00:00")
    loss, norm = float(record.pop("loss")), float(record.pop("gradient_norm"))
    assert math.isfinite(loss) is (how == "gradient")
    assert not math.isfinite(norm)
    assert record == {"kind": how, "step": 3, "epoch": 0, "batch": 3, "rank": 0, "keys": ["clip6", "clip7"]}


def test_a_run_without_anomalies_equals_a_run_without_the_callback(tmp_path):
    with_guard, without = History(), History()
    for callbacks in ([NaNGuard(), with_guard], [without]):
        torch.manual_seed(0)
        fit(tmp_path, LitToy(), *callbacks, gradient_clip_val=1.0)
    last, other = with_guard.states[-1], without.states[-1]
    assert all(torch.equal(last[name], other[name]) for name in last | other)
    assert not list(tmp_path.iterdir())


def test_a_non_finite_batch_skips_the_accumulated_step_and_is_recorded(tmp_path):
    history = History()
    trainer = fit(tmp_path, LitToy(clip7="loss"), NaNGuard(), EMA(0.9), history, accumulate_grad_batches=3)
    assert trainer.global_step == 2
    assert not {name for name in history.changed(5) if "running" not in name and "num_batches" not in name}
    buffers = [name for name in history.states[2] if "net.1" in name]
    assert all(torch.equal(history.states[2][name], history.states[5][name]) for name in buffers)
    (record,) = records(tmp_path)
    assert (record["step"], record["batch"], record["keys"]) == (1, 3, ["clip6", "clip7"])


def test_manual_optimization_skips_each_optimizer_separately(tmp_path):
    history = History()
    fit(tmp_path, LitTwo(clip7="loss"), NaNGuard(), history)
    assert {name.split(".")[0] for name in history.changed(3)} == {"other", "optimizer1"}
    assert {name.split(".")[0] for name in history.changed(4)} == {"net", "other", "optimizer0", "optimizer1"}


def test_a_codebook_does_not_change_in_a_skipped_step(tmp_path):
    class LitBroken(LitVQVAE):
        def training_step(self, batch: VideoBatch, batch_idx: int) -> Tensor:
            weight = self.model.decoder.get_parameter(next(name for name, _ in self.model.decoder.named_parameters()))
            kept = weight.detach().clone()
            if batch_idx == 3:
                weight.data.fill_(math.inf)
            loss = super().training_step(batch, batch_idx)
            weight.data.copy_(kept)
            return loss

    torch.manual_seed(0)
    network = toy_vqvae(VectorQuantizer(32, 4, decay=0.9))
    model = LitBroken(network, [L1Loss()], AdversarialLoss(channels=4, layers=1), optimizer=torch.optim.AdamW)
    history = History()
    fit(tmp_path, model, NaNGuard(), EMA(0.9), history, gradient_clip_val=1.0)
    assert not history.changed(3)
    assert {"model.quantizer.codes", "adversarial.frames.0.weight"} <= history.changed(2) & history.changed(4)


def test_the_budget_counts_the_resumed_run_too(tmp_path):
    poison = {"clip3": "loss", "clip8": "loss"}
    with pytest.raises(UserError, match=r"2 training steps .* step 4, .* is 1: .*anomalies\.jsonl lists the samples"):
        fit(tmp_path, LitToy(**poison), NaNGuard(budget=1))
    saved = ModelCheckpoint(tmp_path, save_last=True)
    fit(tmp_path, LitToy(**poison), NaNGuard(budget=2), saved)
    resumed = NaNGuard(budget=2)
    with pytest.raises(UserError, match="3 training steps"):
        fit(tmp_path, LitToy(**poison), resumed, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.skipped == 3
    assert [(record["epoch"], record["step"]) for record in records(tmp_path)[-3:]] == [(0, 1), (0, 4), (1, 7)]


def test_a_loss_spike_is_recorded_and_not_skipped(tmp_path):
    history = History()
    fit(tmp_path, LitToy(clip3="spike", clip9="spike"), NaNGuard(warmup=3), history)
    assert len(history.changed(4)) > 10
    (record,) = records(tmp_path)
    assert (record["kind"], record["step"], record["keys"]) == ("spike", 4, ["clip8", "clip9"])
    assert record["loss"] > 10
    assert record["gradient_norm"] > 0


def test_the_loss_statistics_are_in_the_checkpoint(tmp_path):
    first = NaNGuard(warmup=6)
    fit(tmp_path, LitToy(), first, ModelCheckpoint(tmp_path, save_last=True))
    assert not (tmp_path / "anomalies.jsonl").exists()
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["NaNGuard"]
    assert state == first.state_dict()
    fit(tmp_path, LitToy(clip3="spike"), NaNGuard(warmup=6), max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert [record["step"] for record in records(tmp_path)] == [7]


def test_two_ranks_skip_together(tmp_path):
    class SaveWeights(Callback):
        """Saves the final weights of every rank."""

        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            torch.save(pl_module.net.state_dict(), tmp_path / f"rank{trainer.global_rank}.pt")

    model = LitToy(clip5="loss", clip6="gradient")
    fit(
        tmp_path,
        model,
        NaNGuard(),
        SaveWeights(),
        strategy="ddp_fork",
        devices=2,
        use_distributed_sampler=True,
        gradient_clip_val=1.0,
    )
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for name, value in first.items():
        assert value.isfinite().all()
        if "running" not in name:
            assert torch.equal(value, second[name])
    lines = records(tmp_path)
    assert {record["kind"] for record in lines} == {"loss", "gradient"}
    (loss,) = (record for record in lines if record["kind"] == "loss")
    assert loss["loss"] in ("nan", "inf")
    assert "clip5" in loss["keys"]
    gradient = [record for record in lines if record["kind"] == "gradient"]
    assert {record["rank"] for record in gradient} == {0, 1}  # the gradient is the mean of both
    assert any("clip6" in record["keys"] for record in gradient)


@pytest.mark.parametrize("wrong", [{"budget": -1}, {"spike": 0.0}, {"spike": math.nan}, {"warmup": 1}])
def test_invalid_arguments_raise(wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        NaNGuard(**wrong)
