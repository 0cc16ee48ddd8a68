"""A run resumed from a checkpoint gets the clips that it would have got without interruption."""

from itertools import chain

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import data
from data.plan import Bucket

CLIPS, EPOCHS = 12, 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make):
    """Twelve token clips in four shards, every third of them long."""
    samples = [make.tokens(f"{i:03d}", frames=9 if i % 3 == 0 else 5) for i in range(CLIPS)]
    return make.shards(tmp_path_factory.mktemp("clips"), samples, samples_per_shard=3)


class Recorder(LightningModule):
    """A model that writes the clips of every step, with the windows, to one file per step and rank."""

    def __init__(self, folder):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.folder = folder

    def training_step(self, batch, batch_idx):
        rows = [f"{key}:{int(clip[0, 0, 0])}:{len(clip)}" for key, clip in zip(batch.keys, batch.tokens, strict=True)]
        name = f"{self.current_epoch}-{batch_idx:02d}-{self.global_rank}"
        (self.folder / name).write_text(" ".join(rows))
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stop(Callback):
    """Interrupts a run after some steps, without a further checkpoint."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step >= self.steps:
            raise KeyboardInterrupt


def fit(shards, folder, ckpt_path=None, stop=None, last=False, module=(), **options):
    """Train with a checkpoint after each step; return the clips of each step by epoch, number and rank."""
    folder.mkdir(exist_ok=True)
    steps = folder / "steps"
    steps.mkdir(exist_ok=True)
    every = ModelCheckpoint(folder / "every", "{step}", save_top_k=-1, every_n_train_steps=1, save_last=False)
    at_end = ModelCheckpoint(folder / "ends", "{epoch}", save_top_k=-1, every_n_epochs=1, save_last=False)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[every, at_end, *([Stop(stop)] if stop is not None else [])],
        **{**quiet, "max_epochs": EPOCHS, "num_sanity_val_steps": 0, **options},
    )
    clips = data.TokenDataModule(
        str(shards), str(shards), **{"frames": 4, "batch_size": 2, "num_workers": 0, **dict(module)}
    )
    try:
        trainer.fit(Recorder(steps), clips, ckpt_path=ckpt_path, weights_only=True)
    except (KeyboardInterrupt, SystemExit):
        assert stop is not None
    if last:
        trainer.save_checkpoint(folder / "end.ckpt")
    return dict(fit_steps(folder))


def fit_steps(folder):
    return [(path.name, path.read_text()) for path in sorted((folder / "steps").iterdir())]


def keys(steps, epoch):
    return [row.split(":")[0] for name, rows in steps.items() if name[0] == str(epoch) for row in rows.split()]


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return fit(shards, folder), folder


def test_an_uninterrupted_run_takes_every_clip_once_per_epoch(whole):
    steps, _ = whole
    assert len(steps) == EPOCHS * CLIPS // 2
    for epoch in range(EPOCHS):
        assert sorted(keys(steps, epoch)) == [f"{i:03d}" for i in range(CLIPS)]
    assert len({tuple(keys(steps, epoch)) for epoch in range(EPOCHS)}) == EPOCHS


@pytest.mark.parametrize("step", range(1, EPOCHS * CLIPS // 2))
def test_a_run_continues_with_the_next_clip_after_any_step(shards, whole, step, tmp_path):
    steps, folder = whole
    rest = fit(shards, tmp_path, ckpt_path=folder / f"every/step={step}.ckpt")
    assert rest == dict(list(steps.items())[step:])


@pytest.mark.parametrize("epoch", range(EPOCHS - 1))
@pytest.mark.parametrize("limits", [{}, {"max_epochs": -1, "max_steps": 16}])
def test_a_run_continues_after_the_end_of_an_epoch(shards, whole, epoch, limits, tmp_path):
    steps, folder = whole
    rest = fit(shards, tmp_path, ckpt_path=folder / f"ends/epoch={epoch}.ckpt", **limits)
    assert rest == dict(list(steps.items())[6 * (epoch + 1) : limits.get("max_steps")])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_continues_with_another_number_of_workers(shards, whole, workers, tmp_path):
    steps, folder = whole
    rest = fit(shards, tmp_path, ckpt_path=folder / "every/step=8.ckpt", module={"num_workers": workers})
    assert rest == dict(list(steps.items())[8:])


def test_a_run_with_validation_in_the_middle_of_an_epoch_continues(shards, whole, tmp_path):
    steps, _ = whole
    often = {"val_check_interval": 2, "max_epochs": -1, "max_steps": 14}
    fit(shards, tmp_path / "first", stop=9, **often)
    rest = fit(shards, tmp_path / "second", ckpt_path=tmp_path / "first/every/step=8.ckpt", **often)
    assert rest == dict(list(steps.items())[8:14])


@pytest.mark.parametrize("limits", [{}, {"max_epochs": -1, "max_steps": 18}])
@pytest.mark.parametrize("each", [1, 2, 3])
def test_a_run_can_be_interrupted_repeatedly(shards, whole, limits, each, tmp_path):
    """Also at the ends of epochs, where Lightning's own counts would be wrong."""
    steps, _ = whole
    seen, ckpt_path = {}, None
    for number, step in enumerate(range(each, 19, each)):
        fit(shards, tmp_path / f"{number}", ckpt_path=ckpt_path, stop=step, **limits)
        taken = fit_steps(tmp_path / f"{number}")[:each]
        seen |= dict(taken)
        ckpt_path = tmp_path / f"{number}/every/step={step}.ckpt"
    assert seen == steps


def test_a_run_that_ended_in_the_middle_of_an_epoch_can_be_extended(shards, whole, tmp_path):
    steps, _ = whole
    first = fit(shards, tmp_path / "first", max_epochs=-1, max_steps=8, last=True)
    rest = fit(shards, tmp_path / "rest", ckpt_path=tmp_path / "first/end.ckpt", max_epochs=-1, max_steps=18)
    assert first | rest == steps


def test_a_run_with_buckets_continues(shards, tmp_path):
    module = {"buckets": [Bucket(frames=8, batch_size=1), Bucket(frames=3, batch_size=2, probability=2.0)]}
    steps = fit(shards, tmp_path / "whole", module=module)
    lengths = {row.split(":")[2] for rows in steps.values() for row in rows.split()}
    assert lengths == {"8", "3"}
    rest = fit(shards, tmp_path / "rest", ckpt_path=tmp_path / "whole/every/step=10.ckpt", module=module)
    assert rest == dict(list(steps.items())[10:])


def test_a_run_continues_with_another_world_size(shards, tmp_path):
    two = {"strategy": "ddp_fork", "devices": 2}
    first = fit(shards, tmp_path / "two", max_epochs=-1, max_steps=2, **two)
    assert len(first) == 4
    rest = fit(shards, tmp_path / "one", ckpt_path=tmp_path / "two/every/step=2.ckpt")
    seen = [*keys(first, 0), *keys(rest, 0)]
    assert sorted(seen) == [f"{i:03d}" for i in range(CLIPS)]
    assert [len(keys(rest, epoch)) for epoch in range(EPOCHS)] == [4, CLIPS, CLIPS]

    again = fit(shards, tmp_path / "again", ckpt_path=tmp_path / "one/every/step=4.ckpt", **two)  # the end of an epoch
    assert [len(keys(again, epoch)) for epoch in range(EPOCHS)] == [0, CLIPS, CLIPS]
    middle = fit(shards, tmp_path / "middle", ckpt_path=tmp_path / "one/every/step=7.ckpt", **two)
    before = [keys({name: rest[name]}, 1) for name in sorted(rest) if name[0] == "1"][:3]
    assert (
        len(set(chain(*before, keys(middle, 1)))) == 6 + len(keys(middle, 1)) == CLIPS - 2
    )  # one batch cannot be divided among two ranks
    assert sorted(keys(middle, 2)) == [f"{i:03d}" for i in range(CLIPS)]


def test_clips_that_differ_from_the_checkpoint_are_warned_of(shards, whole, tmp_path):
    _, folder = whole
    with pytest.warns(UserWarning, match="are not those of the checkpoint"):
        fit(shards, tmp_path, ckpt_path=folder / "every/step=8.ckpt", module={"batch_size": 3})
