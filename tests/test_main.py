"""`python -m t2v` as a process, and the checkpoints it reads."""

import contextlib
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from jsonargparse import ArgumentParser

import t2v
from t2v import TextToVideo
from t2v.__main__ import generate, main
from t2v.errors import UserError
from t2v.generation.quantization import Weights
from t2v.text import MiniLMTextEncoder
from t2v.video import probe, read_frames, write_mp4
from tests.support import forked


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python -m t2v`."""
    return forked.run("-m", "t2v", *arguments, cwd=cwd or Path())


@pytest.fixture
def error_line(capfd, monkeypatch):
    """Return a function that runs a command which must fail with one `error:` line, the last on stderr; it returns it.

    It runs in this process: a new one would import PyTorch first.
    """

    def error_line(*arguments: object, cwd: Path = Path()) -> str:
        monkeypatch.setattr(sys, "argv", ["t2v", *map(str, arguments)])
        capfd.readouterr()
        with contextlib.chdir(cwd), pytest.raises(SystemExit) as stop:
            runpy.run_module("t2v", run_name="__main__")
        out, err = capfd.readouterr()
        assert (stop.value.code, out) == (2, "")
        assert "Traceback" not in err
        *before, last = err.splitlines()  # other libraries may warn or show the progress of loading
        assert last.startswith("error: ")
        assert not any(line.startswith(("error: ", "usage: ")) for line in before)
        return last.removeprefix("error: ")

    return error_line


@pytest.fixture(scope="module")
def exported(trained_pipeline, tmp_path_factory) -> Path:
    """The trained pipeline's model, exported by the command."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    vqvae = trained_pipeline.checkpoint("vqvae")
    done = run("export", trained_pipeline.checkpoint("transformer"), folder, f"--tokenizer={vqvae}")
    assert done.returncode == 0, done.stderr
    assert f'TextToVideo.from_pretrained("{folder}")' in done.stdout
    return folder


def test_an_exported_model_generates_what_its_checkpoint_generates(trained_pipeline, exported):
    with contextlib.chdir(trained_pipeline.folder):  # the tokenizer's path is relative to where training ran
        model = TextToVideo.from_checkpoint(trained_pipeline.checkpoint("transformer"))
    loaded = TextToVideo.from_pretrained(exported)
    assert (loaded.fps, loaded.frames, loaded.sampler.top_p) == (8.0, 5, 0.8)
    assert [loaded.guidance(frame, 5) for frame in range(5)] == [1.8, 1.8, 1.8, 1.0, 1.0]
    assert loaded.prompts == model.prompts
    assert loaded.prompts[0] == "a small red circle moves left slowly"
    assert loaded.training["optimizer steps"] == 12
    assert torch.equal(loaded.generate("a red circle", seed=2), model.generate("a red circle", seed=2))


@torch.compiler.set_stance("force_eager")
def test_generate_writes_the_video_that_the_library_generates(exported, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    options = ("--frames=3", "--seed=7", "--weights=int8", "--guidance=2", "--device=cpu", "--dtype=bfloat16")
    options += ("--candidates=2",)
    done = run("generate", exported, "a red circle", "-o", "out.mp4", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Wrote", "out.mp4"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    model = TextToVideo.from_pretrained(exported, "int8", dtype="bfloat16", device="cpu")
    video = model.generate("a red circle", frames=3, seed=7, guidance=2.0, candidates=2)
    write_mp4(tmp_path / "expected.mp4", video[0], fps=8)
    assert torch.equal(*(read_frames(tmp_path / name, range(3)) for name in ("out.mp4", "expected.mp4")))


def test_generate_writes_video_mp4_by_default(exported, tmp_path):
    done = run("generate", exported, "a red circle", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert probe(tmp_path / "video.mp4")[:2] == (5, 8.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--output", "missing/out.mp4"), "output=missing/out.mp4 must be a .mp4 file in a folder that exists"),
        (("--output", "out.gif"), "output=out.gif must be a .mp4 file"),
        (("--device", "abacus"), "device=abacus cannot be used ("),
        (("--weights", "fp3"), "Parser key \"weights\": Expected a typing.Literal['full', 'fp8', 'int8', 'nf4']. Got"),
        (("--dtype", "int7"), "Parser key \"dtype\": Expected a typing.Literal['auto', 'float32', 'bfloat16']. Got"),
        (("--text_device", "abacus"), "text_device=abacus cannot be used ("),
        (("--frames", "many"), 'Parser key "frames": '),
        (("--frames", "0"), "frames=0 must be at least 1."),
        (("--candidates", "0"), "candidates=0 must be at least 1."),
        (("--candidates", "2", "--guidance", "1"), "candidates=2 needs guidance, by which candidates are compared"),
        (("--length", "3"), "unrecognized arguments: --length 3"),
    ],
)
def test_an_invalid_option_is_one_error_line_and_writes_nothing(exported, tmp_path, options, message, error_line):
    assert error_line("generate", exported, "a red circle", *options, cwd=tmp_path).startswith(message)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write to")
def test_an_output_that_cannot_be_written_is_one_error_line(exported, error_line):
    assert error_line("generate", exported, "a red circle", "-o", "/proc/out.mp4").startswith(
        "Cannot write output=/proc/out.mp4 ("
    )


def test_bytes_that_are_not_utf8_are_one_error_line(exported, tmp_path, error_line):
    for words in (("generate", exported, os.fsdecode(b"a \xff circle")), ("export", "x", os.fsdecode(b"bad\xff"))):
        assert "is not text in UTF-8" in error_line(*words, cwd=tmp_path)


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["t2v", "generate", "model", "a red circle"])
    monkeypatch.setattr(ArgumentParser, "parse_args", interrupt)
    with pytest.raises(SystemExit, match="130"):
        main()
    assert capsys.readouterr().err == "\nerror: Interrupted.\n"


def test_a_missing_model_is_one_error_line(tmp_path, error_line):
    assert error_line("generate", tmp_path / "none", "a red circle", cwd=tmp_path).startswith(
        f"'{tmp_path / 'none'}' is not an exported model"
    )
    assert not list(tmp_path.iterdir())


def test_a_command_without_its_arguments_is_one_error_line(tmp_path, error_line):
    assert error_line("generate", tmp_path) == "the following arguments are required: generate.prompt"
    assert "one of {generate,export,app}" in error_line()


def test_export_refuses_a_folder_with_files_and_a_missing_checkpoint(exported, tmp_path, error_line):
    message = f"'{exported}' exists already and is not an empty folder: give another, or remove it."
    assert error_line("export", tmp_path / "none.ckpt", exported) == message
    assert error_line("export", tmp_path / "none.ckpt", tmp_path / "new").startswith("There is no checkpoint at")
    assert not list(tmp_path.iterdir())


def test_only_a_complete_checkpoint_of_stage_2_is_loaded(trained_pipeline, tmp_path):
    with pytest.raises(UserError, match="There is no checkpoint at"):
        TextToVideo.from_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(UserError, match=r"\.metadata|complete|to its end"):
        TextToVideo.from_checkpoint(tmp_path)
    with pytest.raises(UserError, match="is not a checkpoint of stage 2"):
        TextToVideo.from_checkpoint(trained_pipeline.checkpoint("vqvae"))
    (tmp_path / "cut.ckpt").write_bytes(trained_pipeline.checkpoint("transformer").read_bytes()[:5000])
    with pytest.raises(UserError, match="is not a checkpoint, or it is damaged"):
        TextToVideo.from_checkpoint(tmp_path / "cut.ckpt")


@pytest.fixture
def changed(trained_pipeline, tmp_path):
    """Write the checkpoint with other values in it."""

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
    with pytest.raises(UserError, match=r"There is no VQ-VAE at 'gone.ckpt', the path used in training .* --tokenizer"):
        TextToVideo.from_checkpoint(changed(hyper_parameters={"tokenizer": "gone.ckpt"}))


def test_schedules_are_loaded_from_a_checkpoint(trained_pipeline, changed):
    linear = {"class_path": "t2v.generation.Linear", "init_args": {"start": 4.0, "stop": 1.0}}
    sampler = {"class_path": "t2v.generation.Sampler", "init_args": {"temperature": linear, "top_k": 9}}
    path = changed(hyper_parameters={"generation": {"guidance": linear, "sampler": sampler, "frames": 5}})
    model = TextToVideo.from_checkpoint(path, trained_pipeline.checkpoint("vqvae"))
    assert model.guidance(4, 5) == model.sampler.temperature(4, 5) == 1.0


def test_a_class_that_is_not_imported_is_refused(trained_pipeline, changed):
    sampler = {"class_path": "elsewhere.Sampler", "init_args": {}}
    path = changed(hyper_parameters={"generation": {"guidance": 1.0, "sampler": sampler, "frames": 5}})
    with pytest.raises(UserError, match=r"elsewhere.Sampler is not a known Sampler: import the module"):
        TextToVideo.from_checkpoint(path, trained_pipeline.checkpoint("vqvae"))


def test_generate_offers_all_kinds_of_weights():
    assert get_type_hints(generate)["weights"] == Weights


def test_the_package_has_a_version_and_its_public_names():
    assert t2v.__version__.count(".") == 2
    assert all(hasattr(t2v, name) for name in t2v.__all__)
    assert not hasattr(t2v, "nothing")
