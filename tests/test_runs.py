"""What a run keeps and says, through the command line: kills, signals, resuming, moved folders and limits."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import forked
from tests.support.pipeline import ROOT, Pipeline

OFTEN = """
trainer:
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {dirpath: runs/demo/vqvae/checkpoints, save_last: true, OPTIONS}
"""
EVERY_2_STEPS = "every_n_train_steps: 2, save_top_k: 0"
EVERY_EPOCH = "--trainer.check_val_every_n_epoch=1"


@pytest.fixture
def pipeline(copy_pipeline) -> Pipeline:
    return copy_pipeline()


def fit(pipeline: Pipeline, *flags: str, options: str = EVERY_2_STEPS, resume: bool = True) -> int:
    """Train stage 1 with frequent checkpoints, and return the exit status."""
    return status(pipeline, *fit_command(pipeline, *flags, options=options, resume=resume))


def fit_command(pipeline: Pipeline, *flags: str, options: str = EVERY_2_STEPS, resume: bool = True) -> tuple[str, ...]:
    often = pipeline.folder / "often.yaml"
    often.write_text(OFTEN.replace("OPTIONS", options))
    last = ["--ckpt_path", "last"] if resume else []
    return "fit", *pipeline.config("vqvae"), "-c", str(often), *last, *flags


def status(pipeline: Pipeline, *command: str) -> int:
    try:
        pipeline.main(*command)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def in_child(pipeline: Pipeline, *command: str, largest_file: int = 0) -> int:
    """Run a command in a process of its own, and return its status: minus a signal, if one killed it.

    Args:
        pipeline: Its folder is the working directory.
        command: The command line.
        largest_file: Bytes of a file at which the system ends the process; 0 for any.
    """
    return forked.run(ROOT / "cli.py", *command, cwd=pipeline.folder, largest_file=largest_file).returncode


def killer(step: int, name: str, times: int = 1) -> list[str]:
    options = {"": "tests.support.killer.Killer", "step": step, "name": name, "times": times}
    return [f"--trainer.callbacks{f'.{key}' if key else '+'}={value}" for key, value in options.items()]


def step(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, weights_only=True)["global_step"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def edit(checkpoint: Path, change: Any) -> None:
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, checkpoint)


def test_a_kill_while_saving_keeps_the_old_checkpoint(pipeline, monkeypatch, capfd):
    checkpoint = pipeline.checkpoint("vqvae")
    before = checkpoint.read_bytes()
    monkeypatch.setenv("TMPDIR", "/dev/shm")

    # The limit of the size of files ends the process in the middle of its first save.
    command = fit_command(pipeline, "--trainer.max_steps=20")
    assert in_child(pipeline, *command, largest_file=len(before) // 2) == -signal.SIGXFSZ
    assert checkpoint.read_bytes() == before
    assert names(checkpoint.parent) == ["last.ckpt", "last.ckpt.partial"]
    capfd.readouterr()
    assert fit(pipeline, "--trainer.max_steps=14") == 0
    assert "last.ckpt at step 12" in capfd.readouterr().out
    assert names(checkpoint.parent) == ["last.ckpt"]


def test_a_monitor_does_not_hold_last_ckpt_back(pipeline):
    checkpoint = pipeline.checkpoint("vqvae")
    shutil.rmtree(checkpoint.parent)
    options = "every_n_train_steps: 2, monitor: val/psnr, mode: min, save_top_k: 1"  # the first is the best
    assert in_child(pipeline, *fit_command(pipeline, *killer(9, "SIGKILL"), options=options)) == -signal.SIGKILL
    assert step(checkpoint) == 8
    assert len(names(checkpoint.parent)) == 2


def test_ctrl_c_saves_the_step_and_a_second_one_stops_at_once(pipeline, capfd):
    checkpoint = pipeline.checkpoint("vqvae")
    before = signal.getsignal(signal.SIGINT)
    assert fit(pipeline, "--trainer.max_steps=40", *killer(14, "SIGINT")) == 130
    error = capfd.readouterr().err
    assert "Stopped by Ctrl-C at step 15; the same command with --ckpt_path last resumes the run." in error
    assert "Traceback" not in error
    assert step(checkpoint) == 15
    assert fit(pipeline, "--trainer.max_steps=40", *killer(16, "SIGINT", times=2)) == 130
    assert "Stopped by Ctrl-C.\n" in capfd.readouterr().err
    assert step(checkpoint) == 16  # saved at every second step
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("command", "name", "code"), [("validate", "SIGTERM", 143), ("test", "SIGINT", 130), ("predict", "SIGTERM", 143)]
)
def test_other_commands_stop_at_once(pipeline, command, name, code, capfd):
    shutil.rmtree(pipeline.run / "tokens")
    flags = [*pipeline.config("vqvae"), "--ckpt_path", "last", *killer(0, name)]
    assert status(pipeline, command, *flags) == code
    error = capfd.readouterr().err
    assert f"Stopped by {'Ctrl-C' if name == 'SIGINT' else name}.\n" in error
    assert "Traceback" not in error
    assert not (pipeline.run / "tokens/train").exists()


def test_values_of_the_command_line_win_on_resume(pipeline, capfd):
    assert (
        fit(pipeline, "--trainer.max_steps=14", "--model.optimizer.lr=0.004", "--model.optimizer.weight_decay=0.3") == 0
    )
    assert "lr 0.004 instead of 0.01, weight_decay 0.3 instead of 0.0001" in capfd.readouterr().out
    groups = torch.load(pipeline.checkpoint("vqvae"), weights_only=True)["optimizer_states"][0]["param_groups"]
    assert {group["initial_lr"] for group in groups} == {0.004}
    assert {group["weight_decay"] for group in groups} == {0.3, 0.0}  # vectors have none
    assert (
        fit(pipeline, "--trainer.max_steps=15", "--model.optimizer.lr=0.004", "--model.optimizer.weight_decay=0.3") == 0
    )
    assert "instead of" not in capfd.readouterr().out


def test_a_test_run_saves_nothing(pipeline, capfd):
    before = pipeline.checkpoint("vqvae").read_bytes()
    assert fit(pipeline, "--trainer.fast_dev_run=true", resume=False) == 0
    assert pipeline.checkpoint("vqvae").read_bytes() == before
    assert names(pipeline.checkpoint("vqvae").parent) == ["last.ckpt"]
    assert "No checkpoints are saved" in capfd.readouterr().out
    report = pipeline.run / "vqvae/validation.json"
    report.write_text("of the whole validation")
    shutil.rmtree(pipeline.run / "tokens")
    for command in ("validate", "predict"):
        dry = *pipeline.config("vqvae"), "--ckpt_path", "last", "--trainer.fast_dev_run=true"
        assert status(pipeline, command, *dry) == 0
    assert report.read_text() == "of the whole validation"
    assert not (pipeline.run / "tokens").exists()


def test_a_new_run_moves_the_checkpoints_of_an_earlier_one(pipeline, capfd):
    checkpoint = pipeline.checkpoint("vqvae")
    assert fit(pipeline, "--trainer.max_steps=3", resume=False) == 0
    assert "of an earlier run to" in capfd.readouterr().out
    assert (step(checkpoint), step(checkpoint.parent / "earlier-1/last.ckpt")) == (3, 12)
    assert fit(pipeline, "--trainer.max_steps=4") == 0
    assert names(checkpoint.parent) == ["earlier-1", "last.ckpt"]


def test_a_moved_folder_is_resumed_in_its_new_place(pipeline, capfd):
    assert fit(pipeline, "--trainer.max_steps=14", options="every_n_train_steps: 2, monitor: val/psnr") == 0
    shutil.copytree(pipeline.run / "vqvae", pipeline.folder / "copies [1]/vqvae")
    shutil.rmtree(pipeline.run / "vqvae")
    capfd.readouterr()
    moved = pipeline.folder / "copies [1]/vqvae"
    assert (
        status(pipeline, "fit", "-c", str(moved / "config.yaml"), "--ckpt_path", "last", "--trainer.max_steps=16") == 0
    )
    printed = capfd.readouterr()
    assert "last.ckpt at step 14" in printed.out
    assert step(moved / "checkpoints/last.ckpt") == 16
    assert not (pipeline.run / "vqvae").exists()
    callbacks = torch.load(moved / "checkpoints/last.ckpt", weights_only=True)["callbacks"]
    saver = next(state for name, state in callbacks.items() if name.startswith("ModelCheckpoint"))
    assert Path(saver["best_model_path"]).parent == moved / "checkpoints"


def test_a_damaged_last_checkpoint_falls_back_to_another(pipeline, capfd):
    checkpoint = pipeline.checkpoint("vqvae")
    shutil.copy(checkpoint, checkpoint.with_name("step=12.ckpt"))
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 255
    checkpoint.write_bytes(content)
    with pytest.warns(UserWarning, match=r"last\.ckpt cannot be read; using step=12\.ckpt.* \(step 12\)"):
        assert fit(pipeline, "--trainer.max_steps=13") == 0
    assert "step=12.ckpt at step 12" in capfd.readouterr().out
    assert step(checkpoint) == 13


def test_time_that_is_up_is_named_and_the_next_command_goes_on(pipeline, capfd):
    limits = ["--trainer.max_steps=100000", "--trainer.max_time=00:00:00:01"]
    for said in ("Stopped ", "Not trained "):
        assert fit(pipeline, *limits) == 0
        printed = capfd.readouterr().out
        line = next(line for line in printed.splitlines() if line.startswith(said))
        assert "trainer.max_time has passed" in line
        assert printed.splitlines()[-1].endswith("--ckpt_path last --trainer.max_time null")


@pytest.mark.slow
def test_early_stopping_at_the_end_of_an_epoch_is_named_and_resumed(pipeline, capfd):
    def stop_early(patience: int, resume: bool) -> str:
        options = f"{{monitor: val/loss, min_delta: 100, patience: {patience}}}"
        flags = f"--trainer.callbacks+={{class_path: EarlyStopping, init_args: {options}}}", EVERY_EPOCH
        assert fit(pipeline, *flags, "--trainer.max_steps=60", resume=resume) == 0
        return next(line for line in capfd.readouterr().out.splitlines() if line.startswith("Stopped "))

    advice = "change its patience or remove it to train longer"
    stopped = "at step 6 of 60: EarlyStopping: Monitored metric val/loss did not improve in the last 1 records"
    for resume in (False, True):
        line = stop_early(1, resume)
        assert stopped in line
        assert line.endswith(advice)
    assert "at step 9 of 60: EarlyStopping: Monitored metric val/loss did not improve in the last 2" in stop_early(
        2, True
    )
    assert step(pipeline.checkpoint("vqvae")) == 9


def test_a_second_run_in_the_same_folder_is_refused(pipeline, capfd):
    lock = pipeline.checkpoint("vqvae").parent / ".lock"
    script = f"""import fcntl
file = open({str(lock)!r}, "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print('{{"host": "here", "process": 7, "started": "now"}}', file=file, flush=True)
print(flush=True)
input()"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert fit(pipeline, "--trainer.max_steps=14") == 2
        assert "(process 7 on here, since now): wait until it ends" in capfd.readouterr().err
        other.communicate(b"\n")
    assert fit(pipeline, "--trainer.max_steps=14") == 0  # the file of the ended process does not matter
    assert not lock.exists()


def test_a_logger_without_a_folder_leaves_the_files_in_the_root_folder(pipeline):
    logger = "--trainer.logger=tests.support.recorder.LoggerWithoutFolder"
    callback = "--trainer.callbacks+={class_path: callbacks.ReconstructionLogger}"
    with pytest.warns(UserWarning, match="which shows no videos: they are on the page"):
        assert fit(pipeline, "--trainer.max_steps=15", EVERY_EPOCH, logger, callback) == 0
    assert (pipeline.run / "config.yaml").exists()
    assert (pipeline.run / "samples/reconstruction-0000015-00.mp4").exists()


def test_an_epoch_with_fewer_batches_than_are_accumulated_has_one_full_step(pipeline, capfd):
    state = []
    for batches in (8, 3):
        shutil.rmtree(pipeline.checkpoint("vqvae").parent, ignore_errors=True)
        assert fit(pipeline, f"--trainer.accumulate_grad_batches={batches}", "--trainer.max_steps=2") == 0
        assert "24 samples per step, 1 steps per epoch" in capfd.readouterr().out
        state.append(torch.load(pipeline.checkpoint("vqvae"), weights_only=True)["state_dict"])
    for name, value in state[0].items():
        torch.testing.assert_close(value, state[1][name], rtol=1e-3, atol=1e-5)
    assert fit(pipeline, "--trainer.accumulate_grad_batches=0") == 2
    assert "accumulate_grad_batches=0 must be at least 1" in capfd.readouterr().err


def test_weights_that_are_not_finite_are_neither_saved_nor_used(pipeline, capfd):
    checkpoint = pipeline.checkpoint("vqvae")

    def poison(content: dict[str, Any]) -> None:
        next(iter(content["state_dict"].values())).fill_(float("nan"))

    before = checkpoint.read_bytes()
    assert fit(pipeline, "--trainer.max_steps=40", "--model.optimizer.lr=1e38") == 2
    assert "NaN or infinite" in (error := capfd.readouterr().err) or "non-finite" in error
    assert all(value.isfinite().all() for value in torch.load(checkpoint, weights_only=True)["state_dict"].values())
    checkpoint.write_bytes(before)
    edit(checkpoint, poison)
    shutil.rmtree(pipeline.run / "tokens")
    for command in ("fit", "validate", "predict"):
        assert (
            status(pipeline, command, *pipeline.config("vqvae"), "--ckpt_path", "last", "--trainer.max_steps=40") == 2
        )
        assert "last.ckpt cannot be used: 1 of" in capfd.readouterr().err
    assert not (pipeline.run / "tokens/train").exists()


def test_a_tuned_batch_size_is_that_of_the_batches(pipeline):
    finder = [f"--trainer.callbacks{option}" for option in ("+=BatchSizeFinder", ".max_trials=2", ".steps_per_trial=1")]
    cli = pipeline.cli("fit", "vqvae", *finder, "--trainer.max_steps=1", "--trainer.limit_val_batches=0")
    assert cli.datamodule.batch_size == 4
    assert {len(batch.keys) for batch in cli.trainer.train_dataloader} == {4}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vqvae", "transformer"])
def test_overlays_for_debugging_leave_the_run_alone(stage, pipeline):
    def debug(name: str, *flags: str) -> Any:
        return pipeline.cli("fit", stage, "-c", str(ROOT / f"configs/debug/{name}.yaml"), *flags)

    folders = [pipeline.run / name for name in ("vqvae", "transformer", "tokens")]
    before = {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}
    assert debug("overfit", "--trainer.max_steps=3").trainer.num_training_batches == 1
    debug("profile", "--trainer.max_steps=2")
    assert "backward" in (pipeline.run / "profile/fit-profile.txt").read_text()
    debug("steps")
    assert step(pipeline.run / "steps/checkpoints/last.ckpt") == 2
    assert before == {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}
