import copy

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from callbacks.throughput import Throughput
from t2v.batch import TextEmbedding, TokenBatch, VideoBatch
from t2v.errors import UserError
from t2v.losses.tokens import token_loss_
from t2v.transformer.config import AttentionConfig, TextConfig
from t2v.transformer.model import VideoTransformer

CLIPS, FRAMES, GRID = 4, 3, 2
IN, HIDDEN = FRAMES * GRID**2, 16
PASS = 2 * CLIPS * HIDDEN * IN
"""FLOPs of the forward pass of one layer."""


class LitToy(LightningModule):
    """Two linear layers over the tokens or pixels of a clip."""

    def __init__(self, compiled: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(IN, HIDDEN, bias=False), nn.Linear(HIDDEN, IN, bias=False)
        if compiled:
            self.first.compile(backend="aot_eager")
            self.second.compile(backend="aot_eager")

    def training_step(self, batch: TokenBatch | VideoBatch, batch_idx: int) -> Tensor:
        values = batch.tokens if isinstance(batch, TokenBatch) else batch.video
        return self.second(self.first(values.flatten(1)[:, :IN].float())).square().mean()

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


class LitTransformer(LightningModule):
    def __init__(self, checkpointing: str = "none") -> None:
        super().__init__()
        self.model = VideoTransformer(
            32, GRID, 16, 1, 1, 24, AttentionConfig(2, 1, window=4), TextConfig(8), checkpointing=checkpointing
        )

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None: ...

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        return token_loss_(self.model(batch.tokens, batch.text), batch.tokens).objective

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class LoggedValues(Callback):
    """Keeps the values of every step at which they are logged."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.shown: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        current = {name: float(value) for name, value in trainer.logged_metrics.items() if "throughput/" in name}
        if current and current not in self.logged:
            self.logged.append(current)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.shown = {name: float(value) for name, value in trainer.progress_bar_metrics.items()}


def tokens(clips: int = CLIPS, frames: int = FRAMES) -> TokenBatch:
    text = TextEmbedding(torch.randn(clips, 3, 8), torch.ones(clips, 3, dtype=torch.bool))
    return TokenBatch(torch.randint(32, (clips, frames, GRID, GRID)), text, [""] * clips, [""] * clips)


def fit(
    model: LightningModule, batches: list, tmp_path=None, callback: Throughput | None = None, **flags
) -> LoggedValues:
    values = LoggedValues()
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 1,
            "log_every_n_steps": 2,
            "logger": CSVLogger(tmp_path, flush_logs_every_n_steps=1) if tmp_path else False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
            "callbacks": [callback or Throughput(peak=0.5), values],
            **flags,
        }
    )
    trainer.fit(model, DataLoader(batches, batch_size=None), DataLoader(batches[:1], batch_size=None))
    return values


@pytest.mark.parametrize("compiled", [False, True])
def test_flops_equal_the_ones_counted_by_hand(compiled):
    (*_, last) = fit(LitToy(compiled), [tokens()] * 9).logged
    forward, backward = 2 * PASS, 3 * PASS  # the first layer's input needs no gradient
    assert last["throughput/tflop_per_step"] == pytest.approx((forward + backward) / 1e12)
    clips_a_second = last["throughput/clips_per_second"]
    assert last["throughput/tflops_per_second"] == pytest.approx(5 * PASS / 1e12 * clips_a_second / CLIPS, rel=1e-4)
    assert last["throughput/utilization"] == pytest.approx(last["throughput/tflops_per_second"] / 0.5, rel=1e-4)


def test_tokens_and_frames_are_counted():
    (*_, last) = fit(LitToy(), [tokens()] * 9).logged
    each = last["throughput/tokens_per_second"] / last["throughput/clips_per_second"]
    assert each == pytest.approx(FRAMES * GRID**2, rel=1e-4)
    video = VideoBatch(torch.zeros(CLIPS, 5, 3, 4, 4, dtype=torch.uint8), [[""]] * CLIPS, [""] * CLIPS)
    (*_, last) = fit(LitToy(), [video] * 9).logged
    assert last["throughput/frames_per_second"] / last["throughput/clips_per_second"] == pytest.approx(5, rel=1e-4)


def test_an_accumulated_step_has_the_flops_of_all_batches():
    (*_, last) = fit(LitToy(), [tokens()] * 12, accumulate_grad_batches=2).logged
    assert last["throughput/tflop_per_step"] == pytest.approx(2 * 5 * PASS / 1e12)


def test_flops_are_counted_for_each_shape():
    small, large = tokens(), tokens(clips=2 * CLIPS)
    *_, last = fit(LitToy(), [small] * 6 + [large] * 8, log_every_n_steps=7).logged
    assert last["throughput/tflop_per_step"] == pytest.approx(2 * 5 * PASS / 1e12)


@pytest.mark.parametrize("precision", [pytest.param("32-true", marks=pytest.mark.slow), "bf16-mixed"])
def test_recomputation_by_activation_checkpointing_is_not_counted(precision):
    batch = TokenBatch(torch.randint(32, (1, 3, 12, 12)), tokens(1).text, [""], [""])

    def flops(checkpointing: str) -> float:
        (*_, last) = fit(LitTransformer(checkpointing), [batch] * 4, precision=precision).logged
        return last["throughput/tflop_per_step"] * 1e12

    none, attention, full = (flops(kind) for kind in ("none", "attention", "full"))
    assert none == attention == full > 0
    if precision == "bf16-mixed":  # in float32 attention is fused, which torch does not count on the CPU
        with FlopCounterMode(display=False) as counter, torch.autocast("cpu"):
            LitTransformer("full").training_step(batch, 0).backward()
        assert counter.get_total_flops() > 1.2 * none


def test_fused_attention_is_counted_as_its_matrix_products():
    class LitAttention(LitToy):
        def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
            x = self.first.weight[0].expand(1, 1, 300, IN)
            return functional.scaled_dot_product_attention(x, x, x, is_causal=True).square().mean()

    (*_, last) = fit(LitAttention(), [tokens()] * 4).logged
    product = 2 * 300**2 * IN
    assert last["throughput/tflop_per_step"] == pytest.approx((2 + 4) * product / 1e12)


def test_values_are_in_the_progress_bar_and_the_logger(tmp_path):
    values = fit(LitToy(), [tokens()] * 9, tmp_path)
    assert set(values.shown) >= {"tokens/s", "mfu", "wait", "GiB"}
    assert 0 <= values.shown["wait"] <= 1
    assert 0 < values.shown["GiB"] < 1000
    header = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    names = "clips_per_second", "tokens_per_second", "tflop_per_step", "utilization", "data_wait", "memory"
    assert {f"throughput/{name}" for name in names} <= set(header)


class SlowLoader:
    """A loader that advances the clock by three seconds for each batch."""

    def __init__(self, clock) -> None:
        self.clock = clock

    def __iter__(self):
        for _ in range(9):
            self.clock.now += 3.0
            yield tokens()

    def __len__(self) -> int:
        return 9


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 1e-3
        return self.now


def test_waiting_for_data_is_separated_from_training(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("callbacks.throughput.time.perf_counter", clock)

    class LitSlow(LitToy):
        def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
            clock.now += 1.0
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
            clock.now += 100.0

    values = LoggedValues()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        val_check_interval=3,
        log_every_n_steps=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[Throughput(peak=1.0), values],
    )
    trainer.fit(LitSlow(), SlowLoader(clock), DataLoader([tokens()], batch_size=None))
    (*_, last) = values.logged
    assert last["throughput/data_wait"] == pytest.approx(3 / 4, abs=0.02)
    assert last["throughput/clips_per_second"] == pytest.approx(CLIPS / 4, rel=0.02)


def test_an_unknown_peak_is_measured():
    (*_, last) = fit(LitToy(), [tokens()] * 4, callback=Throughput("known")).logged
    assert 0 < last["throughput/utilization"] < 1


def test_the_callback_does_not_change_training():
    plain = LitTransformer("full")
    watched = copy.deepcopy(plain)
    batches = [tokens() for _ in range(7)]
    fit(plain, batches, callbacks=[])
    fit(watched, batches)
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_failed_run_stops_counting():
    class LitBroken(LitToy):
        def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
            if batch_idx == 1:
                raise RuntimeError("failed")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="failed"):
        fit(LitBroken(), [tokens()] * 3)
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_a_peak_of_zero_raises():
    with pytest.raises(UserError, match="peak=0"):
        Throughput(peak=0.0)
