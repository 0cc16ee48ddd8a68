"""Progress where there is no terminal to draw a progress bar in, such as in the log of a job."""

import sys
import time
from collections import deque
from collections.abc import Callable
from statistics import median_low
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

INTERVAL = 15.0
"""Seconds between two lines."""
RECENT = 100
"""Units whose median time gives the remaining time."""
FEWEST = 4
"""Units before the remaining time is known. The first is left out, since it starts the workers and compiles; another
may compile for a second shape, and is not the median."""


class ProgressPrinter:
    """Prints lines such as "Step 120/600, loss 0.034, 51 s left", one every `INTERVAL` seconds.

    It prints nothing if the standard output is a terminal, and no remaining time before `FEWEST` units are finished.

    Args:
        unit: What is counted.
        start: Count at the start.
    """

    def __init__(self, unit: str, start: int = 0) -> None:
        self.unit = unit
        self.count, self.printed = start, start
        self.time = self.line_time = time.monotonic()
        """When the last unit was finished, and when the last line was printed."""
        self.seconds: deque[float] = deque(maxlen=RECENT)
        self.enabled = not sys.stdout.isatty()

    def update(self, count: int, total: int | float, values: Callable[[], dict[str, Any]] = dict) -> None:
        """Print a line if it is time to.

        Args:
            count: Number of units that are finished.
            total: Number of all units; infinite if it is not known.
            values: Returns what is printed by name. Called only if a line is printed: reading from a GPU waits.
        """
        now = time.monotonic()
        if count > self.count:
            self.seconds.append((now - self.time) / (count - self.count))
            self.count, self.time = count, now
        if not self.enabled or now - self.line_time < INTERVAL or count <= self.printed:
            return
        known = total != float("inf")
        parts = [f"{self.unit} {count}/{total:.0f}" if known else f"{self.unit} {count}"]
        for name, value in values().items():
            parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        if known and len(self.seconds) >= FEWEST:
            parts.append(f"{_duration(median_low(list(self.seconds)[1:]) * (total - count))} left")
        self.printed, self.line_time = count, now
        print(", ".join(parts), flush=True)


def _duration(seconds: float) -> str:
    """Return a time in the two largest units that it has."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


class ProgressLines(Callback):
    """Prints the progress of every command as lines if the standard output is not a terminal, in place of the bar.

    `trainer.enable_progress_bar: false` turns it off too.
    """

    def __init__(self) -> None:
        self._printer: ProgressPrinter | None = None
        self._batches = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Turn the progress bar off where there is no terminal."""
        bar = trainer.progress_bar_callback
        if bar is None or sys.stdout.isatty():
            return
        bar.disable()
        if trainer.is_global_zero:
            self._printer, self._batches = ProgressPrinter("Batch"), 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count steps from the one that the run resumes at."""
        if self._printer is not None:
            self._printer = ProgressPrinter("Step", trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Print the step and the values of the progress bar."""
        if self._printer is not None:
            self._printer.update(
                trainer.global_step,
                trainer.estimated_stepping_batches,
                lambda: {name: value for name, value in trainer.progress_bar_metrics.items() if name != "v_num"},
            )

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Print the batch of ``validate``; in ``fit`` the steps are printed."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._batch_end(trainer.num_val_batches)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Print the batch."""
        self._batch_end(trainer.num_test_batches)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Print the batch."""
        self._batch_end(trainer.num_predict_batches)

    def _batch_end(self, batches: list[int | float]) -> None:
        self._batches += 1
        if self._printer is not None:
            self._printer.update(self._batches, sum(batches))
