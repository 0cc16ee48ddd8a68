"""Reconstructions and generated videos during training, in TensorBoard and on the page of the run."""

import io
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor

from callbacks.gallery import Shown, update_gallery
from t2v.batch import PromptBatch, TextEmbedding, TokenBatch, VideoBatch, unescape
from t2v.errors import UserError, check_range
from t2v.torch_private import add_summary
from t2v.video import write_mp4


class ValidationLogger(Callback):
    """Base class of callbacks that log videos at the first validation batch, with the moving average of the weights.

    Args:
        every_n_epochs: Log in every n-th epoch that validates.
        output_dir: Folder for the videos as mp4 files, in `samples`, and for the page `index.html` that shows the
            newest. By default there is neither with TensorBoard; with other loggers it is their folder.
    """

    title: str
    """Title of the videos on the page."""

    def __init__(self, every_n_epochs: int, output_dir: str | None) -> None:
        check_range(self, "[1, inf)", every_n_epochs=every_n_epochs)
        self.every_n_epochs = every_n_epochs
        self.output_dir = None if output_dir is None else Path(output_dir)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose a folder if the logger shows no videos, and say where they are."""
        if stage not in ("fit", "validate") or self._has_target(trainer):
            return
        name = type(self).__name__
        if not trainer.loggers or stage == "validate":
            rank_zero_warn(
                f"{name} logs nothing: trainer.logger is not a TensorBoardLogger, and output_dir is not set."
            )
            return
        self.output_dir = Path(trainer.log_dir or trainer.default_root_dir)
        loggers = " and ".join(type(logger).__name__ for logger in trainer.loggers)
        rank_zero_warn(
            f"{name} logs nothing to {loggers}, which shows no videos: they are on the page "
            f"{self.output_dir / 'index.html'}; set the callback's output_dir for another folder."
        )

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: VideoBatch | TokenBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log at the first batch of every n-th epoch."""
        due = trainer.current_epoch % self.every_n_epochs == 0
        if due and batch_idx == dataloader_idx == 0 and not trainer.sanity_checking and self._has_target(trainer):
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                self.log_videos(trainer, pl_module, batch)

    def log_videos(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Compute and log the videos; called on every rank."""
        raise NotImplementedError

    def _has_target(self, trainer: Trainer) -> bool:
        return bool(_tensorboards(trainer) or self.output_dir)

    def _log(
        self, trainer: Trainer, name: str, videos: dict[str, UInt8[Tensor, "t c height width"]], fps: float
    ) -> None:
        """Log videos by their captions, which may be empty."""
        if not trainer.is_global_zero:
            return
        for caption, video in videos.items():
            log_gif(trainer, f"{name}/{caption}" if caption else name, video, fps)
        dry_run: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.output_dir is None or dry_run or trainer.state.fn != TrainerFn.FITTING:  # only there the step is known
            return
        folder, step = self.output_dir / "samples", f"step {trainer.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        shown = []
        for number, (caption, video) in enumerate(videos.items()):
            path = folder / f"{name}-{trainer.global_step:07d}-{number:02d}.mp4"
            write_mp4(path, video.cpu(), fps)
            shown.append(Shown(f"samples/{path.name}", caption, step))
        page = update_gallery(self.output_dir, self.title, shown, final=False)
        print(f"Wrote        {len(shown)} videos of {step}; open {page}", flush=True)


class ReconstructionLogger(ValidationLogger):
    """Logs clips of the first validation batch above their reconstructions by the VQ-VAE.

    Args:
        clips: Number of clips, side by side.
        every_n_epochs: Log in every n-th epoch that validates.
        output_dir: Folder of the page that shows them; by default there is none.
    """

    title = "Real clips above their reconstructions"

    def __init__(self, clips: int = 4, every_n_epochs: int = 1, output_dir: str | None = None) -> None:
        super().__init__(every_n_epochs, output_dir)
        check_range(self, "[1, inf)", clips=clips)
        self.clips = clips

    def log_videos(self, trainer: Trainer, pl_module: LightningModule, batch: VideoBatch) -> None:
        """Log clips above their reconstructions."""
        video = batch.video[: self.clips]
        pairs = torch.cat([video, pl_module.reconstruct(video)], dim=-2)  # type: ignore[operator]  # (b, t, c, 2·height, width)
        fps = getattr(trainer.datamodule, "fps", 8.0)  # type: ignore[attr-defined]
        strip = torch.cat(list(pairs), dim=-1)  # (t, c, 2·height, b·width)
        self._log(trainer, "reconstruction", {"": strip}, fps)


class GenerationLogger(ValidationLogger):
    """Logs videos that the transformer generates from fixed prompts, with fixed seeds, at validation in ``fit``.

    It does nothing in ``validate``, which stays quick.

    Args:
        prompts: Prompts; each is one image in TensorBoard.
        every_n_epochs: Log in every n-th epoch that validates.
        output_dir: Folder of the page that shows them; by default there is none.
    """

    title = "Generated during training"

    def __init__(self, prompts: list[str], every_n_epochs: int = 1, output_dir: str | None = None) -> None:
        super().__init__(every_n_epochs, output_dir)
        if not prompts:
            raise UserError("GenerationLogger has no prompts, so it would log nothing: give it one, or remove it.")
        self.prompts = [unescape(prompt) for prompt in prompts]
        self._text: TextEmbedding | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the prompts, the examples of an exported model."""
        checkpoint["prompts"] = self.prompts

    def _has_target(self, trainer: Trainer) -> bool:
        return trainer.state.fn == "fit" and super()._has_target(trainer)

    def log_videos(self, trainer: Trainer, pl_module: LightningModule, batch: object) -> None:
        """Generate and log one video for each prompt; the prompts are embedded the first time only."""
        if self._text is None:
            self._text = pl_module.embed_prompts(self.prompts)  # type: ignore[operator]
        seeds = list(range(len(self.prompts)))
        prompts = PromptBatch(self.prompts, seeds, names=[f"{seed:04d}" for seed in seeds])
        videos = pl_module.generate_videos(prompts, self._text)  # type: ignore[operator]
        generated = torch.cat(list(videos.frames), dim=1)
        self._log(trainer, "generation", dict(zip(videos.prompts, generated, strict=True)), videos.fps)


def log_gif(trainer: Trainer, tag: str, video: UInt8[Tensor, "t c height width"], fps: float) -> None:
    """Log a video as an animated GIF, on rank zero.

    TensorBoard plays it on its images page. torch's ``add_video`` needs a module that moviepy 2 removed.

    Args:
        trainer: Provides the TensorBoard loggers and the step.
        tag: Name of the image.
        video: RGB frames.
        fps: Frames per second.
    """
    if not trainer.is_global_zero:
        return
    frames = [Image.fromarray(frame) for frame in video.permute(0, 2, 3, 1).cpu().numpy()]
    content = io.BytesIO()
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    _, _, height, width = video.shape
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content.getvalue())
    for logger in _tensorboards(trainer):
        add_summary(logger.experiment, Summary(value=[Summary.Value(tag=tag, image=image)]), trainer.global_step)


def _tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
