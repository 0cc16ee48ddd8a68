"""Training the VQ-VAE: adversarial training, the moving average, and resuming."""

import copy
from functools import partial

import bitsandbytes
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from callbacks import EMA, LastCheckpoint, NaNGuard
from t2v import LitVQVAE
from t2v.batch import VideoBatch
from t2v.errors import UserError
from t2v.losses import AdversarialLoss, L1Loss, TemporalDifferenceLoss
from t2v.training.optimization import MuonAdamW, parameter_groups
from t2v.vqvae.loading import load_vqvae
from t2v.vqvae.quantizer import FSQuantizer, VectorQuantizer
from tests.support.toys import toy_vqvae


class Clips(LightningDataModule):
    """The same clips in the same order in every epoch."""

    def _loader(self) -> DataLoader:
        video = torch.randint(0, 256, (6, 2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        return DataLoader(list(video), batch_size=2, collate_fn=_collate)

    train_dataloader = val_dataloader = _loader


def _collate(clips: list[torch.Tensor]) -> VideoBatch:
    return VideoBatch(torch.stack(clips), [""] * len(clips), [str(i) for i in range(len(clips))])


def module(adversarial_from: int | None = None, **changes) -> LitVQVAE:
    torch.manual_seed(0)
    model = toy_vqvae(VectorQuantizer(32, 4, decay=0.9))
    adversarial = None
    if adversarial_from is not None:
        adversarial = AdversarialLoss(start_step=adversarial_from, channels=4, layers=1)
    arguments = {"losses": [L1Loss(), TemporalDifferenceLoss()], "adversarial": adversarial, "quantize_from_step": 2}
    built = LitVQVAE(**{"model": model, **arguments, **changes})
    built.save_hyperparameters({"model": {"init_args": dict(built.model._hub_mixin_config)}})
    return built


class StopAfter(Callback):
    """Stops a run early, with the learning-rate schedule of the full run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def fit(built: LitVQVAE, steps: int, folder, *callbacks, ckpt_path=None) -> Trainer:
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        callbacks=[*callbacks, ModelCheckpoint(folder, save_last=True), LastCheckpoint()],
    )
    trainer.fit(built, datamodule=Clips(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def test_vqvae_and_discriminators_are_trained_and_max_steps_counts_the_vqvaes_steps(tmp_path):
    built = module(adversarial_from=2)
    before = copy.deepcopy(built.state_dict())
    trainer = fit(built, 5, tmp_path)
    assert trainer.global_step == 5
    assert trainer.optimizers[0].state[next(built.model.parameters())]["step"] == 5
    for part in ("model.decoder", "adversarial.frames", "adversarial.clips"):
        moved = [not torch.equal(value, before[name]) for name, value in built.state_dict().items() if part in name]
        assert any(moved), part
    assert {"train/generator", "train/discriminator"} <= set(trainer.callback_metrics)


def test_discriminators_are_not_trained_before_their_start_step(tmp_path):
    built = module(adversarial_from=3)
    weights = [parameter.detach().clone() for parameter in built.adversarial.parameters() if parameter.ndim == 1]
    fit(built, 3, tmp_path)
    for before, after in zip(weights, [p for p in built.adversarial.parameters() if p.ndim == 1], strict=True):
        assert torch.equal(before, after)


class ScaleDiscriminators(Callback):
    """Multiplies the gradients of the discriminators."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def on_after_backward(self, trainer: Trainer, pl_module: LitVQVAE) -> None:
        for parameter in pl_module.adversarial.parameters():
            parameter.grad.mul_(self.factor)


def test_the_progress_shows_the_loss(tmp_path):
    trainer = fit(module(), 3, tmp_path)
    assert trainer.progress_bar_metrics["loss"] == trainer.callback_metrics["train/loss"].item() > 0


OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "fused AdamW": partial(torch.optim.AdamW, fused=True),
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Muon": MuonAdamW,
    "bitsandbytes' 8-bit AdamW": partial(bitsandbytes.optim.AdamW8bit, min_8bit_size=64),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_size_of_the_discriminators_gradients_does_not_change_the_generators_step(tmp_path, optimizer):
    states = []
    for factor in (1e-3, 1.0, 1e4):
        built = module(adversarial_from=0, optimizer=OPTIMIZERS[optimizer])
        trainer = fit(built, 1, tmp_path / str(factor), ScaleDiscriminators(factor), NaNGuard())
        state = {name: value.clone() for name, value in built.model.state_dict().items()}
        for name, parameter in built.model.named_parameters():
            moments = trainer.optimizers[0].state[parameter].items()
            state |= {f"{name}/{key}": value for key, value in moments if isinstance(value, torch.Tensor)}
        states.append(state)
    assert len(states[0]) > 40
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert not [name for name, value in state.items() if not torch.equal(value, states[0][name])]


def test_gradient_norms_of_both_sides_are_logged_and_clipped_separately(tmp_path):
    clipped = {}

    class Clipped(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LitVQVAE, *_) -> None:
            for name in ("model", "adversarial"):
                gradients = [p.grad for p in getattr(pl_module, name).parameters() if p.grad is not None]
                clipped[name] = torch.nn.utils.get_total_norm(gradients).item()

    logged = []
    for factor in (1.0, 1e4):
        trainer = fit(module(adversarial_from=0), 1, tmp_path, ScaleDiscriminators(factor), NaNGuard(), Clipped())
        logged.append(
            [float(trainer.callback_metrics[f"train/{part}gradient_norm"]) for part in ("", "discriminator_")]
        )
    assert logged[1] == pytest.approx([logged[0][0], 1e4 * logged[0][1]])
    assert clipped == pytest.approx({"model": min(logged[1][0], 1.0), "adversarial": 1.0}, rel=1e-4)


def test_discriminators_have_betas_of_their_own():
    built = module(adversarial_from=0)
    for optimizer in (
        torch.optim.AdamW(parameter_groups(built), betas=(0.8, 0.99)),
        MuonAdamW(parameter_groups(built)),
    ):
        theirs = {id(parameter) for parameter in built.adversarial.parameters()}
        found = set()
        for group in optimizer.param_groups:
            ids = {id(parameter) for parameter in group["params"]}
            assert ids <= theirs or not ids & theirs
            found |= ids
            if ids & theirs:
                assert group["betas"] == (0.5, 0.9)
            else:
                assert group.get("betas") != (0.5, 0.9)
        assert found == {id(parameter) for parameter in built.parameters()}


@pytest.fixture
def adversarial():
    return AdversarialLoss(weight=0.5, channels=4, layers=1)


def test_generator_and_discriminator_losses_have_separate_gradients(adversarial):
    video = torch.rand(2, 3, 3, 16, 16)
    reconstruction = torch.rand(2, 3, 3, 16, 16, requires_grad=True)
    adversarial.generator_loss(reconstruction, (reconstruction - video).abs().mean()).backward()
    assert all(parameter.grad is None for parameter in adversarial.parameters())
    reconstruction.grad = None
    adversarial.discriminator_loss(reconstruction, video).backward()
    assert reconstruction.grad is None
    assert all(parameter.grad is not None for parameter in adversarial.parameters())


def test_the_adversarial_gradient_has_the_weighted_norm_of_the_other_terms(adversarial):
    video, reconstruction = torch.rand(2, 3, 3, 16, 16), torch.rand(2, 3, 3, 16, 16, requires_grad=True)
    others = 7 * (reconstruction - video).abs().mean()
    term = adversarial.generator_loss(reconstruction, others)
    own, theirs = (torch.autograd.grad(loss, reconstruction, retain_graph=True)[0] for loss in (term, others))
    torch.testing.assert_close(own.norm(), 0.5 * theirs.norm(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_gradients_of_the_discriminators_under_autocast_are_those_of_float32(frames):
    adversarial = AdversarialLoss(channels=32, layers=2)
    video, other = torch.rand(2, 2, frames, 3, 32, 32)
    gradients = []
    for enabled in (False, True):
        adversarial.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            adversarial.discriminator_loss(other, video).backward()
        gradients.append(adversarial.clips[2].weight.grad.clone())
    exact, rounded = gradients
    assert (rounded - exact).norm() < 0.2 * exact.norm()  # 0.06 to 0.12; where it was wrong 0.8 or not finite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_discriminators_in_another_type_than_the_video(adversarial, dtype):
    adversarial.to(dtype).discriminator_loss(*torch.rand(2, 2, 2, 3, 16, 16)).backward()
    assert all(parameter.grad.dtype == dtype for parameter in adversarial.parameters())


@pytest.mark.parametrize("channels", [1, 6, 37])
def test_channels_of_the_discriminators_are_checked(channels):
    with pytest.raises(UserError, match=f"channels={channels} must be"):
        AdversarialLoss(channels=channels)


@pytest.mark.parametrize("channels", [12, 36])
def test_discriminators_with_any_multiple_of_four_channels(channels):
    AdversarialLoss(channels=channels, layers=3)(torch.rand(1, 2, 3, 32, 32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": [L1Loss(), L1Loss(weight=9.0, start_step=3)]}, "model.losses has l1 twice"),
        ({"losses": [L1Loss(start_step=3)]}, "begin later than step 0"),
        ({"adversarial": AdversarialLoss(layers=3)}, "layers=3 needs frames of at least 24 pixels, but these have 16"),
    ],
)
def test_losses_that_cannot_be_trained_with(changes, message):
    with pytest.raises(UserError, match=message):
        module(**changes)


def test_a_run_without_the_average_does_not_continue_one_with_it(tmp_path):
    fit(module(), 3, tmp_path, EMA(decay=0.9))
    with pytest.raises(UserError, match=r"add callbacks\.EMA as in the run before"):
        fit(module(), 6, tmp_path, ckpt_path=tmp_path / "last.ckpt")


def test_discriminators_learn_to_distinguish_video_from_noise(adversarial):
    optimizer = torch.optim.Adam(adversarial.parameters(), lr=1e-2)
    for _ in range(30):
        video, noise = torch.rand(4, 2, 3, 16, 16).cumsum(-1) / 16, torch.rand(4, 2, 3, 16, 16)
        loss = adversarial.discriminator_loss(noise, video)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5


@pytest.mark.parametrize("adversarial_from", [None, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, adversarial_from):
    """Compare weights, average, codebook and discriminators of a run that stops after quantization has begun."""
    fit(module(adversarial_from), 9, tmp_path / "full", EMA(decay=0.9))
    fit(module(adversarial_from), 9, tmp_path / "part", EMA(decay=0.9), StopAfter(6))
    fit(module(adversarial_from), 9, tmp_path / "part", EMA(decay=0.9), ckpt_path=tmp_path / "part/last.ckpt")
    first, second = (torch.load(tmp_path / f"{run}/last.ckpt", weights_only=True) for run in ("full", "part"))
    for part in ("state_dict", "current_model_state"):
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), (part, name)


def test_loading_a_checkpoint_gives_the_moving_average(tmp_path):
    built = module()
    fit(built, 8, tmp_path, EMA(decay=0.9))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    average, trained = checkpoint["state_dict"], checkpoint["current_model_state"]
    loaded = load_vqvae(str(tmp_path / "last.ckpt")).state_dict()
    name = "decoder.0.weight"
    assert torch.equal(loaded[name], average[f"model.{name}"])
    assert not torch.equal(average[f"model.{name}"], trained[f"model.{name}"])
    codebook = "model.quantizer.codes"
    assert torch.equal(average[codebook], trained[codebook])


def test_a_checkpoint_with_another_quantizer_loads(tmp_path):
    model = toy_vqvae(FSQuantizer([4, 4, 3]))
    built = module(model=model)
    fit(built, 2, tmp_path)
    loaded = load_vqvae(str(tmp_path / "last.ckpt"))
    assert loaded.codebook_size == 48
    assert loaded.fingerprint() == model.fingerprint()
