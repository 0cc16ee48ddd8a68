"""Writes the videos that stage 2 generates as mp4 files, and a gallery page of them."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from callbacks.gallery import Shown, update_gallery
from callbacks.progress import ProgressPrinter
from t2v.batch import GeneratedVideos
from t2v.video import Mp4Writer


class VideoGalleryWriter(BasePredictionWriter):
    """Writes ``OUTPUT_DIR/videos/NAME.mp4`` during generation, and the page ``OUTPUT_DIR/index.html`` at the end.

    Args:
        output_dir: Folder of the page and the videos; files of the same names are replaced.
    """

    def __init__(self, output_dir: str) -> None:
        super().__init__(write_interval="batch")
        self.output_dir = Path(output_dir)
        self._prompts: dict[str, str] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create the folder."""
        self._prompts.clear()
        (self.output_dir / "videos").mkdir(parents=True, exist_ok=True)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: GeneratedVideos,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Generate and write a batch frame by frame."""
        paths = [self.output_dir / "videos" / f"{name}.mp4" for name in prediction.names]
        with ExitStack() as stack:
            files = [stack.enter_context(Mp4Writer(path, prediction.fps)) for path in paths]
            progress = ProgressPrinter("Frame")
            for number, frames in enumerate(prediction.frames, 1):
                for file, frame in zip(files, frames, strict=True):
                    file.write(frame)
                progress.update(number, prediction.length)
        self._prompts.update(zip(prediction.names, prediction.prompts, strict=True))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page with the videos of all ranks."""
        of_ranks: list[dict[str, str]] = [self._prompts]
        if trainer.world_size > 1:
            of_ranks = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(of_ranks, self._prompts)
        if not trainer.is_global_zero:
            return
        prompts = {name: prompt for of_rank in of_ranks for name, prompt in of_rank.items()}
        shown = [Shown(f"videos/{name}.mp4", prompt, name) for name, prompt in sorted(prompts.items())]
        page = update_gallery(self.output_dir, "Generated videos", shown, final=True)
        print(f"Wrote        {len(prompts)} videos; open {page}", flush=True)
