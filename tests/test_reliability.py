"""Hostile circumstances through the command line, on the trained pipeline; rows of docs/reliability.md."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml

LAST = ("--ckpt_path", "last")
DATA_OF_VQVAE = ("--data.train=runs/demo/shards/train", "--data.val=runs/demo/shards/val")


@pytest.fixture
def fails(capsys):
    """Return a function that runs a command which must fail, and returns its error message."""

    def run(pipeline, *args) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            pipeline.cli(*args)
        assert exit_.value.code == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        (line,) = [line for line in message.splitlines() if line.startswith("error: ")]
        return line

    return run


OF_THE_TRAINER = [
    (("--trainer.max_steps=-1", "--trainer.max_epochs=-1"), "leaves training without a last step"),
    (("--trainer.max_steps=-1", "--trainer.max_time=00:01:00:00"), "leaves training without a last step"),
    (("--trainer.accumulate_grad_batches=0",), "accumulate_grad_batches=0 must be at least 1"),
    (("--trainer.check_val_every_n_epoch=0",), "check_val_every_n_epoch=0 must be at least 1"),
    (("--trainer.val_check_interval=0",), "val_check_interval=0 must be greater than 0"),
    (("--trainer.gradient_clip_val=-1",), "gradient_clip_val=-1 must be at least 0"),
    (("--trainer.val_check_interval=1000",), "`val_check_interval` (1000) must be less than or equal to"),
    (("--trainer.strategy=none",), "invalid strategy name"),
    (("--trainer.devices=-2",), "should be an int > 0"),
    (("--seed_everything=-1",), "seed_everything=-1 must lie in [0, 4294967295]"),
    (("--ckpt_path=s3://bucket/last.ckpt",), "s3"),
    (("--ckpt_path=none://last.ckpt",), "Protocol not known: none"),
    (("--trainer.logger=NoneLogger",), "NoneLogger"),
    (("--trainer.callbacks+={class_path: callbacks.EMA, init_args: {decay: 2}}",), "decay=2.0 must lie in (0, 1)"),
    (("--trainer.callbacks+={class_path: ModelCheckpoint, init_args: {save_top_k: -5}}",), "save_top_k=-5"),
]
OF_BOTH_STAGES = [
    (("--data.seed=-1",), "data.seed=-1 must lie in"),
    (("--data.train=${nothing.there}",), "cannot be resolved for data.init_args.train"),
    (("--data.train=${",), "cannot be resolved"),
    (("--model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 1, momentum: 2}}",), "momentum=2.0 must"),
    (("--model.optimizer={class_path: torch.optim.AdamW, init_args: {lr: -1}}",), "Invalid learning rate: -1"),
    (("--data.num_workers=-1",), "data.num_workers=-1 must be at least 0"),
    (("--model.warmup_steps=-100",), "warmup_steps=-100 must be at least 0"),
]


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        *(("vqvae", *case) for case in (*OF_THE_TRAINER, *OF_BOTH_STAGES)),
        *(("transformer", *case) for case in OF_BOTH_STAGES[-2:]),
    ],
    ids=lambda value: value[0].split("=")[0].strip("-") if isinstance(value, tuple) else "",
)
def test_arguments_of_a_run(stage, flags, message, fails, trained_pipeline):
    assert message in fails(trained_pipeline, "fit", stage, *flags)


@pytest.mark.parametrize(
    ("stage", "flag", "message"),
    [
        ("vqvae", "--model.losses=[]", "model.losses is empty"),
        ("vqvae", "--model.model.base_channels=0", "base_channels=0 must be at least 1 (VQVAE)"),
        ("vqvae", "--model.model.encoder_kernel_size=2", "encoder_kernel_size=2 must be odd"),
        ("vqvae", "--model.model.channel_multipliers=[]", "channel_multipliers=[] must not be empty"),
        ("vqvae", "--model.model.quantizer.decay=1.5", "decay=1.5 must lie in (0, 1) (VectorQuantizer)"),
        ("vqvae", "--model.model.quantizer.codebook_size=0", "codebook_size=0 must be at least 2"),
        ("vqvae", "--model.quantize_from_step=-1", "quantize_from_step=-1 must be at least 0"),
        ("transformer", "--model.model.spatial_layers=-1", "spatial_layers=-1 must be at least 0"),
        ("transformer", "--model.model.temporal_layers=40000", "temporal_layers=40000 must be at most 1000"),
        ("vqvae", "--model.model.decoder_blocks=500", "decoder_blocks=500 must be at most 100"),
        ("transformer", "--model.model.attention.window=0", "window=0 must be at least 1 (attention)"),
        ("transformer", "--model.model.dim=0", "dim=0 must be at least 1"),
        ("transformer", "--model.objective.corruption=.nan", "corruption=nan must lie in [0, 1)"),
        ("transformer", "--model.text_encoder.max_length=0", "max_length=0 must be at least 1"),
        ("vqvae", "--data.train=none", "write them by `python -m data.prepare`"),
        (
            "transformer",
            "--data.val=none",
            "write them by `python cli.py predict -c CONFIG_OF_STAGE_1 --ckpt_path last`",
        ),
    ],
)
def test_arguments_of_a_model(stage, flag, message, fails, trained_pipeline):
    assert message in fails(trained_pipeline, "fit", stage, flag)


def test_another_optimizer_is_refused_and_a_warm_start_takes_it(fails, copy_pipeline, capsys):
    pipeline, other = copy_pipeline(), ("--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1")
    message = fails(pipeline, "fit", "vqvae", *LAST, *other, "--trainer.max_steps=14")
    assert "but model.optimizer is torch.optim.SGD" in message
    before = torch.load(pipeline.checkpoint("vqvae"), weights_only=True)["state_dict"]
    new = ("--trainer.default_root_dir=new", "--data.train=runs/demo/shards/train", "--data.val=runs/demo/shards/val")
    flags = (*new, "--model.init_from", str(pipeline.checkpoint("vqvae")), "--trainer.max_steps=1")
    cli = pipeline.cli("fit", "vqvae", *flags, "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0")
    assert f"Weights      {len(before)} tensors from" in capsys.readouterr().out
    weights = cli.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in before.items() if "quantizer" not in name)
    adversarial = ("--model.adversarial=t2v.losses.AdversarialLoss", "--model.optimizer.lr=0", "--trainer.logger=false")
    pipeline.cli("fit", "vqvae", *flags, *adversarial, "--trainer.callbacks=null")
    assert "initialized anew: adversarial.frames.0.weight" in capsys.readouterr().out


def test_a_warm_start_keeps_what_fits(fails, trained_pipeline, tmp_path, capsys):
    pipeline, checkpoint = trained_pipeline, str(trained_pipeline.checkpoint("transformer"))
    flags = ("--trainer.default_root_dir", str(tmp_path), "--trainer.max_steps=1", "--trainer.logger=false")
    data = ("--data.train=runs/demo/tokens/train", "--data.val=runs/demo/tokens/val", "--trainer.callbacks=null")
    start = ("--model.init_from", checkpoint, "--model.tokenizer=runs/demo/vqvae/checkpoints/last.ckpt")
    pipeline.cli("fit", "transformer", *flags, *data, *start, "--model.model.text.gate=false", "--data.frames=9")
    printed = capsys.readouterr().out
    assert f"tensors from {checkpoint}" in printed
    message = fails(pipeline, "fit", "transformer", *flags, *data, *start, "--model.model.dim=64")
    assert "is of another model" in message


def test_the_best_checkpoint(fails, copy_pipeline):
    pipeline = copy_pipeline()
    path = "runs/demo/vqvae/checkpoints/last.ckpt"
    checkpoint = torch.load(pipeline.folder / path, weights_only=True)
    for state in checkpoint["callbacks"].values():
        state.pop("monitor", None)
    torch.save(checkpoint, pipeline.folder / path)
    assert "There is no best checkpoint in runs/demo/vqvae/checkpoints" in fails(
        pipeline, "validate", "vqvae", "--ckpt_path", "best"
    )
    best = pipeline.folder / "runs/demo/vqvae/checkpoints/best.ckpt"
    checkpoint["callbacks"]["ModelCheckpoint"] = {"monitor": "val/loss", "best_model_path": f"/moved/{best.name}"}
    torch.save(checkpoint, pipeline.folder / path)
    torch.save(checkpoint, best)
    cli = pipeline.cli("validate", "vqvae", "--ckpt_path", "best")
    assert cli.trainer.ckpt_path == f"runs/demo/vqvae/checkpoints/{best.name}"


@pytest.mark.parametrize(
    ("command", "flag"), [("fit", "--ckpt_path"), ("predict", "--ckpt_path"), ("fit", "--model.init_from")]
)
def test_a_damaged_checkpoint_is_refused_wherever_it_is_given(command, flag, fails, trained_pipeline, tmp_path):
    content = bytearray(trained_pipeline.checkpoint("vqvae").read_bytes())
    content[len(content) // 2] ^= 1  # in a tensor
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(content)
    new = (f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false", "--trainer.callbacks=[]")
    message = fails(
        trained_pipeline, command, "vqvae", flag, str(damaged), *new, *DATA_OF_VQVAE, "--trainer.max_steps=13"
    )
    assert f"{damaged} is damaged: its checksums do not match its content" in message


def test_generation_goes_on_after_a_kill(copy_pipeline, capsys):
    pipeline = copy_pipeline()
    (pipeline.folder / "prompts.jsonl").write_text('{"prompt": "a red circle", "seed": 3}\n{"prompt": "a square"}\n')
    command = ("predict", "transformer", *LAST, "--data.prompts=prompts.jsonl", "--data.samples=2")
    pipeline.cli(*command, "--data.batch_size=1")
    videos = sorted((pipeline.run / "videos").glob("*.mp4"))
    written = [path.read_bytes() for path in videos]
    assert [path.stem for path in videos] == [
        "0000-a-red-circle-00",
        "0000-a-red-circle-01",
        "0001-a-square-00",
        "0001-a-square-01",
    ]
    records = [json.loads(line) for line in (pipeline.run / "videos.jsonl").read_text().splitlines()]
    assert [record["seed"] for record in records] == [3, 4, 2, 3]
    videos[1].unlink()  # as after a kill
    times = [path.stat().st_mtime_ns for path in videos if path.exists()]
    capsys.readouterr()
    pipeline.cli(*command, "--data.batch_size=1")
    assert "of which 3 existed with the same settings" in capsys.readouterr().out
    assert [path.read_bytes() for path in videos] == written
    assert [path.stat().st_mtime_ns for i, path in enumerate(videos) if i != 1] == times
    pipeline.cli(*command, "--model.generation.sampler.temperature=3")
    assert "existed" not in capsys.readouterr().out
    os.utime(pipeline.checkpoint("transformer"))  # another checkpoint at the same path
    pipeline.cli(*command, "--data.batch_size=1")
    assert "existed" not in capsys.readouterr().out
    assert [path.read_bytes() for path in videos] == written


def test_a_prompt_on_the_command_line_with_a_dollar(trained_pipeline):
    checkpoint = ("--ckpt_path", str(trained_pipeline.checkpoint("transformer")), "--trainer.callbacks=null")
    flags = (*checkpoint, "--data.prompts", "a ${price} tag", "--model.generation.frames=2")
    cli = trained_pipeline.cli("predict", "transformer", *flags)
    assert cli.datamodule.prompts == "a ${price} tag"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_sentence(fails, trained_pipeline, monkeypatch):
    def full(*args, **kwargs):
        Path("/dev/full").write_bytes(b"x")

    monkeypatch.setattr("torch.save", full)
    message = fails(trained_pipeline, "fit", "vqvae", *LAST, "--trainer.max_steps=13")
    assert "No space left on device" in message


OWN = """
from t2v.vqvae.quantizer import VectorQuantizer


class OwnQuantizer(VectorQuantizer):
    pass
"""


def test_a_folder_that_cannot_be_written_to(fails, trained_pipeline, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder can be made in it")
    checkpoint = f"--ckpt_path={trained_pipeline.checkpoint('vqvae')}"
    there = (f"--trainer.default_root_dir={tmp_path / 'file'}", *DATA_OF_VQVAE)
    assert "cannot be written to" in fails(trained_pipeline, "fit", "vqvae", checkpoint, *there)
    with pytest.warns(UserWarning, match=r"nothing is logged there|validation.json is not written"):
        trained_pipeline.cli("validate", "vqvae", checkpoint, *there)
    assert "val/psnr" in capsys.readouterr().out
    tokenizer = f"--model.tokenizer={trained_pipeline.checkpoint('vqvae')}"
    checkpoint = f"--ckpt_path={trained_pipeline.checkpoint('transformer')}"
    prompt = "--data.prompts=a red circle"
    with pytest.warns(UserWarning, match="nothing is logged there"):
        message = fails(trained_pipeline, "predict", "transformer", checkpoint, tokenizer, there[0], prompt)
    assert f"The videos cannot be written to '{tmp_path / 'file'}'" in message
    assert (tmp_path / "file").is_file()


def test_classes_of_ones_own_are_imported_when_asked_for(fails, copy_pipeline, monkeypatch):
    pipeline = copy_pipeline()
    (pipeline.folder / "own_quantizers.py").write_text(OWN)
    checkpoint = torch.load(pipeline.checkpoint("vqvae"), weights_only=True)
    checkpoint["hyper_parameters"]["model"]["init_args"]["quantizer"]["class_path"] = "own_quantizers.OwnQuantizer"
    torch.save(checkpoint, pipeline.checkpoint("vqvae"))
    last = ("--ckpt_path", str(pipeline.checkpoint("transformer")), "--trainer.callbacks=null")
    flags = (*last, "--data.prompts=a red circle", "--model.generation.frames=2")
    message = fails(pipeline, "predict", "transformer", *flags)
    assert "own_quantizers.OwnQuantizer is not a known Quantizer" in message
    assert "--import own_quantizers" in message
    monkeypatch.syspath_prepend(pipeline.folder)
    cli = pipeline.cli("predict", "transformer", *flags, "--import", "own_quantizers")
    assert type(cli.model.tokenizer.quantizer).__name__ == "OwnQuantizer"
    assert "--import gone" in fails(pipeline, "predict", "transformer", *flags, "--import=gone")


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--trainer.limit_train_batches=0", "trainer.limit_train_batches=0 leaves no batch"),
        ("--trainer.max_steps=0", "trainer.max_steps=0 is reached"),
    ],
)
def test_a_run_without_a_step_says_why_and_names_no_next_command(flag, reason, trained_pipeline, tmp_path, capsys):
    data = ("--data.train=runs/demo/shards/train", "--data.val=runs/demo/shards/val", "--trainer.logger=false")
    capsys.readouterr()
    trained_pipeline.cli("fit", "vqvae", *data, f"--trainer.default_root_dir={tmp_path}", flag)
    printed = capsys.readouterr().out
    assert reason in printed
    assert "Next " not in printed


def test_tokens_of_another_size_than_the_models_are_refused(fails, trained_pipeline, tmp_path):
    checkpoint = str(trained_pipeline.checkpoint("vqvae"))
    flags = ("--ckpt_path", checkpoint, "--data.size=32", f"--trainer.default_root_dir={tmp_path}")
    data = ("--data.train=runs/demo/shards/train", "--data.val=runs/demo/shards/val", "--trainer.logger=false")
    message = fails(trained_pipeline, "predict", "vqvae", *flags, *data)
    assert "data.size=32, but the tokens must be those of frames of 64 pixels" in message
    assert not (tmp_path / "tokens").exists()


def test_a_flag_sets_an_argument_of_a_lists_item(trained_pipeline, capsys):
    with pytest.raises(SystemExit):
        trained_pipeline.cli("fit", "vqvae", "--model.losses.1.weight=7", "--print_config")
    losses = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["losses"]
    assert losses[1]["init_args"]["weight"] == 7.0
    assert losses[0]["init_args"]["weight"] != 7.0
