"""The way from a checkpoint of a real run to a folder that makes the same videos."""

import contextlib
import subprocess
import sys

import pytest
import torch

from t2v import TextToVideo
from t2v.errors import UserError
from t2v.text import MiniLMTextEncoder


def test_an_exported_model_makes_what_its_checkpoint_makes(trained_pipeline, tmp_path):
    checkpoint = trained_pipeline.checkpoint("transformer")
    with contextlib.chdir(trained_pipeline.folder):  # the tokenizer's path is relative to where training ran
        model = TextToVideo.from_checkpoint(checkpoint)
    exported = TextToVideo.from_pretrained(
        _export(checkpoint, tmp_path / "model", trained_pipeline.checkpoint("vqvae"))
    )
    assert (exported.fps, exported.frames, exported.guidance, exported.sampler.temperature(0, 5)) == (8.0, 5, 1.8, 0.5)
    assert torch.equal(exported.generate("a red circle", seed=2), model.generate("a red circle", seed=2))


def _export(checkpoint, folder, tokenizer):
    command = [sys.executable, "-m", "t2v", "export", checkpoint, folder, f"--tokenizer={tokenizer}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f'TextToVideo.from_pretrained("{folder}")' in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2
    assert again.stderr == f"error: '{folder}' exists already and is not an empty folder: give another, or remove it.\n"
    return folder


def test_only_a_whole_checkpoint_of_stage_2_is_taken(trained_pipeline, tmp_path):
    with pytest.raises(UserError, match="There is no checkpoint at"):
        TextToVideo.from_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(UserError, match="not written to its end"):
        TextToVideo.from_checkpoint(tmp_path)
    with pytest.raises(UserError, match="is not a checkpoint of stage 2"):
        TextToVideo.from_checkpoint(trained_pipeline.checkpoint("vqvae"))
    (tmp_path / "cut.ckpt").write_bytes(trained_pipeline.checkpoint("transformer").read_bytes()[:5000])
    with pytest.raises(UserError, match="is not a checkpoint, or it is damaged"):
        TextToVideo.from_checkpoint(tmp_path / "cut.ckpt")


@pytest.fixture
def changed(trained_pipeline, tmp_path):
    """Writes the checkpoint with something else in it."""

    def write(**changes):
        checkpoint = torch.load(trained_pipeline.checkpoint("transformer"), weights_only=True)
        for part, values in changes.items():
            checkpoint[part].update(values)
        torch.save(checkpoint, tmp_path / "changed.ckpt")
        return tmp_path / "changed.ckpt"

    return write


def test_another_tokenizer_or_text_encoder_than_in_training_is_refused(trained_pipeline, changed):
    vqvae = trained_pipeline.checkpoint("vqvae")
    with pytest.raises(UserError, match=r"The tokenizer is \w{16}, but .* was trained with another"):
        TextToVideo.from_checkpoint(changed(fingerprint={"tokenizer": "another"}), vqvae)
    with pytest.raises(UserError, match=f"The text_encoder is {MiniLMTextEncoder().name}, but"):
        TextToVideo.from_checkpoint(changed(fingerprint={"text_encoder": "another"}), vqvae)
    with pytest.raises(UserError, match=r"There is no VQ-VAE at 'gone.ckpt', with which .* --tokenizer"):
        TextToVideo.from_checkpoint(changed(hyper_parameters={"tokenizer": "gone.ckpt"}))


def test_schedules_come_with_a_checkpoint(trained_pipeline, changed):
    linear = {"class_path": "t2v.generation.Linear", "init_args": {"start": 4.0, "stop": 1.0}}
    sampler = {"class_path": "t2v.generation.Sampler", "init_args": {"temperature": linear, "top_k": 9}}
    path = changed(hyper_parameters={"generation": {"guidance": linear, "sampler": sampler, "frames": 5}})
    model = TextToVideo.from_checkpoint(path, trained_pipeline.checkpoint("vqvae"))
    assert model.guidance(4, 5) == model.sampler.temperature(4, 5) == 1.0


def test_a_class_that_was_never_imported_is_refused(trained_pipeline, changed):
    sampler = {"class_path": "elsewhere.Sampler", "init_args": {}}
    path = changed(hyper_parameters={"generation": {"guidance": 1.0, "sampler": sampler, "frames": 5}})
    with pytest.raises(UserError, match=r"elsewhere.Sampler is no known Sampler: import the module"):
        TextToVideo.from_checkpoint(path, trained_pipeline.checkpoint("vqvae"))
