"""The complete pipeline with the shipped configs, through the command line."""

import shlex

import av
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.shards import ShardSet
from tests.support import forked
from tests.support.pipeline import ROOT

PROMPTS = ["a small red circle moves left slowly", "the <big> blue square & nothing else"]
STAGES = ["vqvae", "transformer"]


def load(path):
    return torch.load(path, weights_only=True)


def logged(folder, tag):
    """Return all values of a tag in the order of their steps."""
    events = EventAccumulator(str(folder)).Reload()
    return [event.value for event in sorted(events.Scalars(tag), key=lambda event: event.step)]


def weights(checkpoint):
    return {name: tensor for name, tensor in checkpoint["state_dict"].items() if name.startswith("model.")}


@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_falls(trained_pipeline, stage):
    losses = logged(trained_pipeline.run / stage, "train/loss")
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_reconstructions_and_generated_videos_are_logged_as_animated_images(trained_pipeline):
    for stage, tags in (("vqvae", 1), ("transformer", 3)):
        events = EventAccumulator(str(trained_pipeline.run / stage)).Reload()
        images = events.Tags()["images"]
        assert len(images) == tags
        assert events.Images(images[0])[0].encoded_image_string.startswith(b"GIF89a")


@pytest.mark.parametrize(("steps", "started"), [(3, False), (5, True)])
def test_the_codebook_starts_at_its_step_and_not_in_validation(copy_pipeline, steps, started):
    pipeline = copy_pipeline()
    validate = ["--trainer.check_val_every_n_epoch=null", "--trainer.val_check_interval=1"]
    cli = pipeline.cli("fit", "vqvae", "--trainer.max_steps", str(steps), *validate)
    assert cli.model.model.quantizer.ready == started


def test_every_clip_becomes_a_token_sample(trained_pipeline):
    tokenizer = load(trained_pipeline.checkpoint("vqvae"))["hyper_parameters"]["model"]["init_args"]
    for split, count in (("train", 24), ("val", 8)):
        footage = ShardSet(trained_pipeline.run / "shards" / split).samples
        tokens = ShardSet(trained_pipeline.run / "tokens" / split).samples
        assert [sample.key for sample in tokens] == [sample.key for sample in footage]
        assert len(tokens) == count
        assert {(sample.frames, sample.height, sample.width) for sample in tokens} == {(16, 4, 4)}
    assert tokenizer["quantizer"]["init_args"]["codebook_size"] == 32


@pytest.mark.parametrize(("stage", "metric"), [("vqvae", "val/psnr"), ("transformer", "val/perplexity")])
def test_validate_measures_the_checkpoint(trained_pipeline, stage, metric):
    metrics = trained_pipeline.cli("validate", stage, "--ckpt_path", "last").trainer.callback_metrics
    assert float(metrics[metric]) == pytest.approx(logged(trained_pipeline.run / stage, metric)[-1], rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_resumes_at_the_step_where_it_stopped(trained_pipeline, stage):
    before, after = load(trained_pipeline.halfway(stage)), load(trained_pipeline.checkpoint(stage))
    for checkpoint, step in ((before, 7), (after, 12)):
        assert checkpoint["global_step"] == checkpoint["lr_schedulers"][0]["last_epoch"] == step
        states = checkpoint["optimizer_states"][0]["state"].values()
        assert {int(state["step"]) for state in states if "step" in state} == {step}  # Muon counts no steps
    assert any(not torch.equal(weights(after)[name], tensor) for name, tensor in weights(before).items())
    losses = logged(trained_pipeline.run / stage, "train/loss")
    assert len(losses) == 12
    assert losses[7] < losses[0]
    names = [path.name for path in trained_pipeline.checkpoint(stage).parent.iterdir()]
    assert names == ["last.ckpt"]


@pytest.mark.parametrize("stage", STAGES)
def test_loaded_weights_equal_the_saved_weights(copy_pipeline, stage, capsys):
    pipeline = copy_pipeline()
    saved = weights(load(pipeline.checkpoint(stage)))
    capsys.readouterr()
    cli = pipeline.cli("fit", stage, "--ckpt_path", "last")  # no step is left to do
    message = (
        f"Resuming from runs/demo/{stage}/checkpoints/last.ckpt at step 12, no steps are left: raise trainer.max_steps"
    )
    assert message in capsys.readouterr().out
    loaded = cli.model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())


def test_the_next_command_has_an_example_prompt_of_the_recipe(copy_pipeline, capsys):
    copy_pipeline().cli("fit", "transformer", "--ckpt_path=last", "--trainer.callbacks.1.prompts=[a digit moves]")
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Next"))
    assert shlex.split(printed)[-2:] == ["--data.prompts", "a digit moves"]


def test_prompts_become_videos_on_a_gallery_page(copy_pipeline):
    pipeline = copy_pipeline()
    pipeline.cli("predict", "transformer", "--ckpt_path", "last", f"--data.prompts={PROMPTS}")
    videos = sorted((pipeline.run / "videos").iterdir())
    assert [path.name for path in videos] == [
        "0000-a-small-red-circle-moves-left-slowly.mp4",
        "0001-the-big-blue-square-nothing-else.mp4",
    ]
    for path in videos:
        with av.open(str(path)) as file:
            frames = list(file.decode(video=0))
            assert file.streams.video[0].average_rate == 8
        assert [(frame.width, frame.height) for frame in frames] == [(64, 64)] * 5
    page = (pipeline.run / "index.html").read_text()
    assert PROMPTS[0] in page
    assert "the &lt;big&gt; blue square &amp; nothing else" in page
    assert all(f'src="videos/{path.name}"' in page for path in videos)

    # The saved config, the checkpoint and prompts are sufficient, and the same prompts give the same bytes.
    before = [path.read_bytes() for path in videos]
    (pipeline.folder / "prompts.txt").write_text("\n".join(PROMPTS))
    saved_config = ["-c", "runs/demo/transformer/config.yaml", "--ckpt_path", "last", "--data.prompts", "prompts.txt"]
    for path in videos:
        path.unlink()
    pipeline.main("predict", *saved_config)
    assert [path.read_bytes() for path in videos] == before


@pytest.mark.slow
def test_two_processes_train_the_vqvae_with_discriminators(trained_pipeline, tmp_path):
    """Every parameter must have a gradient in every step, also before the codebook and the discriminators start."""
    flags = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=6", "--data.batch_size=4"]
    flags += ["--model.adversarial=t2v.losses.AdversarialLoss", "--model.adversarial.start_step=4"]
    flags += ["--model.adversarial.channels=4", "--model.adversarial.layers=1", "--model.quantize_from_step=2"]
    flags += [f"--data.{split}={trained_pipeline.run / 'shards' / split}" for split in ("train", "val")]
    process = forked.run(ROOT / "cli.py", "fit", *trained_pipeline.config("vqvae"), *flags, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    checkpoint = torch.load(tmp_path / "runs/demo/vqvae/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6
    assert checkpoint["state_dict"]["model.quantizer.initialized"]
    assert checkpoint["state_dict"]["adversarial.clips.0.bias"].isfinite().all()
