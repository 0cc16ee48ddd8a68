"""Lines of progress where there is no terminal."""

import re

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from torch.utils.data import DataLoader

from callbacks import progress
from callbacks.progress import ProgressLines, ProgressPrinter


class Clock:
    """A clock that advances by four seconds each time it is read."""

    now = 0.0

    @classmethod
    def monotonic(cls) -> float:
        cls.now += 4
        return cls.now


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr(Clock, "now", 0.0)
    monkeypatch.setattr(progress, "time", Clock)


class LitConstant(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_idx):
        self.log("loss", 0.25, prog_bar=True)
        return (self.weight * batch).sum()

    def validation_step(self, batch, batch_idx) -> None:
        pass

    def predict_step(self, batch, batch_idx):
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(command: str, tmp_path, **options) -> None:
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[ProgressLines()],
        **options,
    )
    getattr(trainer, command)(LitConstant(), DataLoader(range(12)))


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("fit", r"Step (\d+)/12, loss 0\.25, (\d+) s left"),
        ("validate", r"Batch (\d+)/12, (\d+) s left"),
        ("predict", r"Batch (\d+)/12, (\d+) s left"),
    ],
)
def test_every_fifteen_seconds_a_line_has_the_progress_and_the_remaining_time(command, line, tmp_path, capsys):
    run(command, tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if " left" in line]
    found = [re.fullmatch(line, each) for each in lines]
    assert [int(match[1]) for match in found] == [4, 8, 12]  # four seconds each
    assert [int(match[2]) for match in found] == [4 * (12 - int(match[1])) for match in found]


def test_without_a_progress_bar_there_are_no_lines(tmp_path, capsys):
    run("fit", tmp_path, enable_progress_bar=False)
    assert "left" not in capsys.readouterr().out


def test_a_terminal_keeps_its_progress_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    bars = []
    monkeypatch.setattr(TQDMProgressBar, "disable", lambda self: bars.append(self))
    run("fit", tmp_path)
    assert not bars
    assert " left" not in capsys.readouterr().out


def test_hours_and_unknown_totals(capsys):
    printer = ProgressPrinter("Step", start=100)
    for step in range(101, 105):
        printer.update(step, 4104, lambda: {"loss": 0.5, "wait": "3 %"})
    assert capsys.readouterr().out == "Step 104/4104, loss 0.5, wait 3 %, 4 h 26 min left\n"
    printer = ProgressPrinter("Step")
    for _ in range(5):
        printer.update(7, float("inf"))
    assert capsys.readouterr().out == "Step 7\n"


def test_steps_that_compile_do_not_count_in_the_remaining_time(capsys):
    printer = ProgressPrinter("Step")
    for step, seconds in enumerate((300, 0, 200, 0, 0, 0, 0), 1):  # beside the four of each step
        Clock.now += seconds
        printer.update(step, 107)
    assert capsys.readouterr().out == "Step 1/107\nStep 3/107\nStep 7/107, 6 min 40 s left\n"
