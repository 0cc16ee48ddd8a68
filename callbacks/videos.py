"""Writes the videos that stage 2 generates as mp4 files, and a gallery page of them."""

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from callbacks.gallery import Shown, update_gallery
from callbacks.progress import ProgressPrinter
from t2v import __version__
from t2v.batch import GeneratedVideos, PromptBatch
from t2v.checkpoints.storage import MARKER
from t2v.errors import UserError
from t2v.files import is_writable
from t2v.video import Mp4Writer

RECORD = "videos.jsonl"
"""The list of the finished videos, in the folder of the page."""

TITLE = "Generated videos"
"""Title of their section of the page."""


class VideoGalleryWriter(BasePredictionWriter):
    """Writes ``OUTPUT_DIR/videos/NAME.mp4`` during generation, and the page ``OUTPUT_DIR/index.html`` at the end.

    A line of ``OUTPUT_DIR/videos.jsonl`` describes each finished video: its prompt, seed and start, and a hash of the
    checkpoint and of all settings on which it depends. A command that was killed continues when it is run
    again: a batch whose videos exist, with the same description, is not generated again.

    Args:
        output_dir: Folder of the page and the videos; files of the same names are replaced.
    """

    def __init__(self, output_dir: str) -> None:
        super().__init__(write_interval="batch")
        self.output_dir = Path(output_dir)
        self._prompts: dict[str, str] = {}
        self._kept = 0
        self._settings: str | None = None
        self._finished: dict[str, dict[str, Any]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the folder.

        Raises:
            UserError: If it cannot be written to.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "predict" and not is_writable(self.output_dir):
            raise UserError(
                f"The videos cannot be written to '{self.output_dir}' (no permission, or a read-only disk): give "
                "another folder, for example by --trainer.default_root_dir, and the checkpoint's path to --ckpt_path."
            )

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create the folder, and read which videos are finished."""
        self._prompts.clear()
        self._kept = 0
        (self.output_dir / "videos").mkdir(parents=True, exist_ok=True)
        self._settings = _settings(trainer, pl_module)
        self._finished = _read_record(self.output_dir / RECORD)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: GeneratedVideos,
        batch_indices: Any,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Generate and write a batch frame by frame, unless its videos are finished."""
        self._prompts.update(zip(prediction.names, prediction.prompts, strict=True))
        paths = [self.output_dir / "videos" / f"{name}.mp4" for name in prediction.names]
        records = self._describe(batch)
        if records and all(self._is_finished(*each) for each in zip(paths, records, strict=True)):
            self._kept += len(paths)
            return
        replaced = [record["name"] for record in records if record["name"] in self._finished]
        self._note([{"name": name, "settings": None} for name in replaced])
        with ExitStack() as stack:
            files = [stack.enter_context(Mp4Writer(path, prediction.fps)) for path in paths]
            progress = ProgressPrinter("Frame")
            for number, frames in enumerate(prediction.frames, 1):
                for file, frame in zip(files, frames, strict=True):
                    file.write(frame)
                progress.update(number, prediction.length, prediction.speed)
        self._note(records)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page with the videos of all ranks."""
        of_ranks: list[tuple[dict[str, str], int]] = [(self._prompts, self._kept)]
        if trainer.world_size > 1:
            of_ranks = of_ranks * trainer.world_size
            torch.distributed.all_gather_object(of_ranks, (self._prompts, self._kept))
        if not trainer.is_global_zero:
            return
        prompts = {name: prompt for of_rank, _ in of_ranks for name, prompt in of_rank.items()}
        shown = [Shown(f"videos/{name}.mp4", prompt, name) for name, prompt in sorted(prompts.items())]
        page = update_gallery(self.output_dir, TITLE, shown, final=True)
        kept = sum(count for _, count in of_ranks)
        existing = f", of which {kept} existed with the same settings" if kept else ""
        print(f"Wrote        {len(prompts)} videos{existing}; open {page}", flush=True)

    def _describe(self, batch: PromptBatch) -> list[dict[str, Any]]:
        """Return the record of each video of a batch; none if the settings are not known."""
        if self._settings is None:
            return []
        names = ("name", "prompt", "seed", "start", "negative_prompt", "settings")
        none = [None] * len(batch.names)
        columns = (batch.names, batch.prompts, batch.seeds, map(_file, batch.starts or none), batch.negatives or none)
        return [dict(zip(names, (*row, self._settings), strict=True)) for row in zip(*columns, strict=True)]

    def _is_finished(self, path: Path, record: dict[str, Any]) -> bool:
        return path.is_file() and self._finished.get(record["name"]) == record

    def _note(self, records: list[dict[str, Any]]) -> None:
        """Append to the list, after which the older lines of the same names do not count."""
        if records:
            with (self.output_dir / RECORD).open("a", encoding="utf-8") as file:
                file.write("".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records))


def _read_record(path: Path) -> dict[str, dict[str, Any]]:
    """Return the last line of each name; a line that a kill has cut does not count."""
    finished = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
        try:
            record = json.loads(line)
            finished[record["name"]] = record
        except (ValueError, TypeError, KeyError):
            continue
    return finished


def _settings(trainer: Trainer, pl_module: LightningModule) -> str | None:
    """Return a hash of what all videos of a command depend on; None if the weights are not those of a local file."""
    checkpoint = _file(str(trainer.ckpt_path)) if trainer.ckpt_path else None
    if checkpoint is None:
        return None
    arguments = dict(pl_module.hparams)
    start = getattr(getattr(pl_module, "generation", None), "start", None)
    tokenizer = _file(getattr(pl_module, "tokenizer_path", None))
    kind = (__version__, trainer.precision, pl_module.device.type)
    described = json.dumps([checkpoint, tokenizer, _file(start), kind, arguments], sort_keys=True, default=repr)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _file(path: str | None) -> list[Any] | None:
    """Return a path with the size and the time of change of its file, so that another content is noticed."""
    if path is None:
        return None
    file = Path(path) / MARKER if Path(path).is_dir() else Path(path)
    if not file.is_file():
        return None
    status = file.stat()
    return [path, status.st_size, status.st_mtime_ns]
