"""Writes what stage 2 predicts as mp4 files and one page to watch them on."""

import os
from contextlib import ExitStack
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch.distributed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from t2v.batch import GeneratedVideos
from t2v.video import Mp4Writer

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Generated videos</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.45 system-ui, sans-serif; }}
body {{ max-width: 80rem; margin: 0 auto; padding: 2rem 1rem; }}
h1 {{ font-size: 1.25rem; font-weight: 600; margin: 0 0 1.5rem; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1.5rem 1rem; }}
figure {{ margin: 0; }}
video {{ width: 100%; display: block; border-radius: .5rem; background: #8883; }}
figcaption {{ margin-top: .5rem; overflow-wrap: anywhere; }}
small {{ opacity: .65; }}
</style>
</head>
<body>
<h1>Generated videos</h1>
<main>
{figures}
</main>
</body>
</html>
"""
FIGURE = """<figure>
<video src="{source}" autoplay loop muted playsinline controls></video>
<figcaption>{prompt}<br><small>{name}</small></figcaption>
</figure>"""


class VideoGalleryWriter(BasePredictionWriter):
    """Writes ``OUTPUT_DIR/videos/NAME.mp4`` as they come, and ``OUTPUT_DIR/index.html`` that shows them at the end.

    Args:
        output_dir: Where the page and the videos go; files of the same names are replaced.
    """

    def __init__(self, output_dir: str) -> None:
        super().__init__(write_interval="batch")
        self.output_dir = Path(output_dir)
        self._prompts: dict[str, str] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the folder."""
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
        """Write one batch, frame by frame as it is made."""
        paths = [self.output_dir / "videos" / f"{name}.mp4" for name in prediction.names]
        with ExitStack() as stack:
            files = [stack.enter_context(Mp4Writer(path, prediction.fps)) for path in paths]
            for frames in prediction.frames:
                for file, frame in zip(files, frames, strict=True):
                    file.write(frame)
        self._prompts.update(zip(prediction.names, prediction.prompts, strict=True))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page, with the videos of all ranks."""
        shares: list[dict[str, str]] = [self._prompts]
        if trainer.world_size > 1:
            shares = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(shares, self._prompts)
        if not trainer.is_global_zero:
            return
        prompts = {name: prompt for share in shares for name, prompt in share.items()}
        page = self.output_dir / "index.html"
        partial = page.with_name(f".{page.name}.{os.getpid()}.partial")
        partial.write_text(gallery(prompts), encoding="utf-8")
        partial.replace(page)
        print(f"Wrote        {len(prompts)} videos; open {page}", flush=True)


def gallery(prompts: dict[str, str]) -> str:
    """Make the page.

    Args:
        prompts: Each video's prompt by the stem of its file.

    Returns:
        HTML that needs nothing but the videos beside it.
    """
    figures = [
        FIGURE.format(source=escape(f"videos/{quote(name)}.mp4"), prompt=escape(prompt), name=escape(name))
        for name, prompt in sorted(prompts.items())
    ]
    return PAGE.format(figures="\n".join(figures))
