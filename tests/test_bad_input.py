"""A user's mistakes: each is reported in one line with exit status 2, and writes no files."""

import csv
import sys

import pytest
import torch

from data.examples.shapes import make_shapes
from data.prepare import prepare
from data.shards import ShardSet
from t2v.errors import run_tool
from t2v.video import write_mp4

LAST = ("--ckpt_path", "last")
PROMPTS = '--data.prompts=["a red circle"]'


@pytest.fixture
def fails(capsys):
    """Return a function that runs a command which must fail, and returns its error message."""

    def run(command, *args) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            command(*args)
        assert exit_.value.code == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        message = message.splitlines()[-1]
        assert message.startswith("error: ")
        return message

    return run


@pytest.fixture
def mistaken(fails, trained_pipeline):
    """Return a function that runs a command line on the trained pipeline, which must fail and change no file."""

    def run(command, stage, *flags) -> str:
        before = trained_pipeline.files()
        message = fails(trained_pipeline.cli, command, stage, *flags)
        assert trained_pipeline.files() == before
        return message

    return run


@pytest.fixture
def tool(monkeypatch):
    """Return a function that runs one of the `python -m` commands in this process."""

    def run(function, *args) -> None:
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, args)])
        run_tool(function)

    return run


@pytest.fixture
def footage(tmp_path):
    """Return a folder with one valid captioned video, one that is corrupt and one that is too short."""
    folder = tmp_path / "footage"
    folder.mkdir()
    write_mp4(folder / "good.mp4", torch.full((16, 3, 64, 64), 99, dtype=torch.uint8), fps=8)
    write_mp4(folder / "brief.mp4", torch.zeros(3, 3, 64, 64, dtype=torch.uint8), fps=8)
    (folder / "corrupt.mp4").write_bytes(b"no video")
    write_captions(folder, "good", "corrupt", "brief")
    return folder


def write_captions(folder, *names, columns=("path", "caption")):
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *((f"{name}.mp4", f"a {name} video") for name in names)])


def test_a_corrupt_video_is_skipped_and_listed(footage, tool, tmp_path, capsys):
    tool(prepare, footage, tmp_path / "out")
    message = capsys.readouterr().out
    assert "1 clips from 3 videos." in message
    assert "Dropped 2: 1 does not decode: corrupt.mp4 (" in message
    assert "1 too short: brief.mp4" in message
    assert len(ShardSet(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("damage", "flags", "message"),
    [
        (lambda folder: write_captions(folder, "corrupt"), (), "was kept: "),
        (lambda folder: write_captions(folder, "brief"), (), "too short: brief.mp4"),
        (lambda folder: write_captions(folder, "good"), ("--frames=17",), "too short: good.mp4"),
        (lambda folder: write_captions(folder, "good", columns=("file", "text")), (), "no column path and no column"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], (), "No videos in "),
        (lambda folder: [path.unlink() for path in folder.iterdir()] and folder.rmdir(), (), "There is no folder "),
        (lambda folder: None, ("--captions=none.csv",), "There is no caption file 'none.csv'"),
        (lambda folder: None, ("--size=0",), "size=0: all must be greater than 0"),
    ],
    ids=["corrupt", "short", "asked too long", "columns", "empty", "missing", "no caption file", "size"],
)
def test_unusable_footage(damage, flags, message, footage, tool, fails, tmp_path):
    damage(footage)
    assert message in fails(tool, prepare, footage, tmp_path / "out", *flags)
    assert {path.name for path in tmp_path.iterdir()} <= {"footage"}


def test_no_clips_to_draw(tool, fails, tmp_path):
    assert "train_clips=0" in fails(tool, make_shapes, tmp_path / "clips", "--train_clips=0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ((), "subcommand"),
        (("fitt",), "no subcommand 'fitt' (did you mean fit?): give one of fit, validate, test, predict, plan"),
        (("fit",), "required: fit.data, fit.model"),
    ],
)
def test_an_incomplete_command(line, message, fails, trained_pipeline):
    assert message in fails(trained_pipeline.main, *line)


OF_ANY_RUN = [
    (("--data.train=nowhere",), "No shards (*.tar) in 'nowhere': the folder does not exist"),
    (("--data.val=runs",), "No shards (*.tar) in 'runs': nothing there ends in .tar"),
    (("--data.frames=17",), "shorter than 17 frames"),
    (("--data.batch_size=25",), "24 training clips in 'runs/demo/"),
    (("--data.batch_size=0",), "data.batch_size=0 must be greater than 0"),
    (("--ckpt_path=nowhere.ckpt",), "There is no checkpoint at nowhere.ckpt"),
    (("--ckpt_path=runs/demo/shards/train/prepare.json",), "is not a checkpoint of this program"),
    (("--data.frame=3",), "Option 'frame' is not accepted"),
    (("--data.buckets=null",), "data.buckets is null, but it needs a value"),
    (("--model.model.codebok_size=3",), "Option 'codebok_size' is not accepted"),
    (("--trainer.max_stepz=3",), "--trainer.max_stepz=3"),
    (("--data.batch_size=x",), "Expected a <class 'int'>. Got value: x"),
    (("--config={data: {init_args: {frame: 3}}}",), "Option 'frame' is not accepted"),
    (("--config=nowhere.yaml",), "nowhere.yaml"),
]


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [*(("vqvae", *case) for case in OF_ANY_RUN), *(("transformer", *case) for case in OF_ANY_RUN[:4])],
    ids=lambda value: value[0].split("=")[0].strip("-") if isinstance(value, tuple) else "",
)
def test_fit(stage, flags, message, mistaken):
    assert message in mistaken("fit", stage, *flags)


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        ("vqvae", ("--data.train=runs/demo/tokens/train",), "No sample in 'runs/demo/tokens/train' has a mp4"),
        ("transformer", ("--data.train=runs/demo/shards/train",), "are these the shards of the other stage?"),
        ("vqvae", ("--model.model.image_size=60",), "image_size=60 is not a multiple of 16"),
        ("transformer", ("--model.model.vocab_size=31",), "has 32 codes on a grid of 4×4, but the transformer"),
        ("transformer", ("--model.model.text.dim=31",), "text.dim=31: they must be equal"),
        ("transformer", ("--model.model.attention.heads=3",), "heads=3 must divide dim=32"),
        ("transformer", ("--model.tokenizer=nowhere.ckpt",), "There is no VQ-VAE checkpoint at 'nowhere.ckpt'"),
        ("transformer", ("--model.tokenizer=runs/demo/transformer/checkpoints/last.ckpt",), "of stage 1, the VQ-VAE"),
        ("transformer", ("--model.generation.sampler.top_p=1.5",), "top_p=1.5 must lie in (0, 1]"),
        ("transformer", ("--model.generation.sampler.temperature=0",), "temperature=0.0 must be greater than 0"),
        ("transformer", ("--model.generation.sampler.top_k=0",), "top_k=0 must be at least 1"),
        ("transformer", ("--model.objective.caption_dropout=2",), "caption_dropout=2.0 must lie in [0, 1]"),
        ("transformer", ("--model.generation.frames=0",), "generation.frames=0 must be at least 1"),
    ],
)
def test_fit_of_one_stage(stage, flags, message, mistaken):
    assert message in mistaken("fit", stage, *flags)


@pytest.mark.parametrize(("stage", "other"), [("vqvae", "transformer"), ("transformer", "vqvae")])
@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
def test_the_checkpoint_of_the_other_stage(command, stage, other, mistaken):
    path = f"runs/demo/{other}/checkpoints/last.ckpt"
    assert f"{path} holds a Lit" in (message := mistaken(command, stage, "--ckpt_path", path))
    assert "give the checkpoint of that model, or the other config" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((PROMPTS,), "`predict` needs trained weights"),
        ((*LAST,), "There are no prompts in data.prompts"),
        ((*LAST, "--data.prompts=[]"), "There are no prompts in data.prompts"),
        ((*LAST, "--data.prompts=nowhere.txt"), "No prompts in 'nowhere.txt'"),
        ((*LAST, "--data.prompts=empty.txt"), "There are no prompts in data.prompts='empty.txt'"),
        ((*LAST, PROMPTS, "--model.generation.sampler.min_p=2"), "min_p=2.0 must lie in (0, 1]"),
    ],
)
def test_generation(flags, message, mistaken, trained_pipeline):
    (trained_pipeline.folder / "empty.txt").write_text("\n  \n")
    assert message in mistaken("predict", "transformer", *flags)


@pytest.mark.parametrize("stage", ["vqvae", "transformer"])
def test_predict_before_fit(stage, fails, copy_pipeline):
    pipeline = copy_pipeline()
    pipeline.checkpoint(stage).unlink()
    before = pipeline.files()
    message = fails(pipeline.cli, "predict", stage, *LAST, *([PROMPTS] if stage == "transformer" else []))
    assert f"There is no last.ckpt in runs/demo/{stage}/checkpoints" in message
    assert pipeline.files() == before


def test_token_shards_are_not_overwritten(mistaken):
    assert "runs/demo/tokens/train already holds token shards: delete it" in mistaken("predict", "vqvae", *LAST)


def test_another_tokenizer(fails, copy_pipeline):
    pipeline = copy_pipeline()
    checkpoint = torch.load(pipeline.checkpoint("vqvae"), weights_only=True)
    checkpoint["state_dict"]["model.encoder.1.bias"] += 1
    torch.save(checkpoint, pipeline.checkpoint("vqvae"))
    before = pipeline.files()
    for flags in (("fit",), ("fit", *LAST), ("predict", *LAST, PROMPTS)):
        message = fails(pipeline.cli, flags[0], "transformer", *flags[1:])
        assert "model.tokenizer is " in message
        assert "give that tokenizer, or write the token shards again" in message
    assert pipeline.files() == before
