import io
import re

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks import GenerationLogger, ReconstructionLogger
from t2v.batch import GeneratedVideos, PromptBatch, TextEmbedding, VideoBatch
from t2v.video import read_frames


class LitToy(LightningModule):
    """Reconstructs a clip as its negative, and generates grey frames."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.embedded = 0

    def training_step(self, batch: VideoBatch, batch_idx: int) -> Tensor:
        return self.weight.square()

    def validation_step(self, batch: VideoBatch, batch_idx: int) -> None: ...

    def reconstruct(self, video: Tensor) -> Tensor:
        return 255 - video

    def embed_prompts(self, prompts: list[str]) -> TextEmbedding:
        self.embedded += 1
        return TextEmbedding(torch.zeros(2, 1, 1), torch.ones(2, 1, dtype=torch.bool))

    def generate_videos(self, prompts: PromptBatch, text: TextEmbedding) -> GeneratedVideos:
        video = torch.stack([torch.arange(3, dtype=torch.uint8) + 9 * seed for seed in prompts.seeds])
        frames = video[:, :, None, None, None].expand(-1, -1, 3, 6, 10).split(1, dim=1)
        return GeneratedVideos(iter(frames), 3, prompts.prompts, prompts.names, fps=4.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def collate(numbers: list[int]) -> VideoBatch:
    video = torch.stack([torch.full((2, 3, 4, 6), n, dtype=torch.uint8) for n in numbers])
    video[:, 1] += 100
    return VideoBatch(video, [""] * len(numbers), [f"{n}" for n in numbers])


def fit(tmp_path, *callbacks: Callback, model: LitToy | None = None, **flags) -> EventAccumulator:
    loader = DataLoader(list(range(6)), batch_size=3, collate_fn=collate)
    flags = {"logger": TensorBoardLogger(tmp_path, name="", version=""), "max_epochs": 2, **flags}
    trainer = Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
        callbacks=list(callbacks),
        **flags,
    )
    trainer.fit(model or LitToy(), loader, loader)
    return EventAccumulator(str(tmp_path)).Reload()


def frames(content: bytes) -> list[Image.Image]:
    gif = Image.open(io.BytesIO(content))
    images = []
    for i in range(gif.n_frames):
        gif.seek(i)
        images.append(gif.convert("RGB"))
    return images


def test_clips_are_logged_above_their_reconstructions(tmp_path):
    events = fit(tmp_path, ReconstructionLogger(clips=2)).Images("reconstruction")
    assert [event.step for event in events] == [2, 4]  # one per epoch, and none in the sanity check
    images = frames(events[0].encoded_image_string)
    assert len(images) == 2
    assert images[0].size == (events[0].width, events[0].height) == (2 * 6, 2 * 4)
    second_clip = 6
    assert images[1].getpixel((second_clip, 0)) == (101, 101, 101)
    assert images[1].getpixel((second_clip, 4)) == (154, 154, 154)


def test_each_prompt_is_an_animated_image(tmp_path):
    events = fit(tmp_path, GenerationLogger(["a red circle", "a blue square"], every_n_epochs=2))
    assert events.Tags()["images"] == ["generation/a red circle", "generation/a blue square"]
    (event,) = events.Images("generation/a blue square")
    images = frames(event.encoded_image_string)
    assert [image.getpixel((0, 0)) for image in images] == [(9, 9, 9), (10, 10, 10), (11, 11, 11)]


def test_fixed_prompts_are_embedded_once(tmp_path):
    model = LitToy()
    events = fit(tmp_path, GenerationLogger(["a red circle", "a blue square"]), model=model)
    assert len(events.Images("generation/a red circle")) == 2
    assert model.embedded == 1


def test_the_page_shows_the_newest_videos_without_tensorboard_too(tmp_path):
    loggers = [
        ReconstructionLogger(clips=2, output_dir=str(tmp_path)),
        GenerationLogger(["a red circle", "a blue square"], output_dir=str(tmp_path)),
    ]
    fit(tmp_path, *loggers, logger=CSVLogger(tmp_path))
    page = (tmp_path / "index.html").read_text()
    shown = re.findall('src="([^"]+)"', page)
    assert shown == [
        "samples/generation-0000004-00.mp4",
        "samples/generation-0000004-01.mp4",
        "samples/reconstruction-0000004-00.mp4",
    ]
    assert "a blue square" in page
    assert "refresh" in page
    greys = read_frames(tmp_path / shown[1], range(3)).float().mean((1, 2, 3))
    torch.testing.assert_close(greys, torch.tensor([9.0, 10.0, 11.0]), atol=2, rtol=0)


def test_a_missing_tensorboard_logger_is_warned_about(tmp_path):
    with pytest.warns(UserWarning, match="ReconstructionLogger logs nothing"):
        fit(tmp_path, ReconstructionLogger(), logger=CSVLogger(tmp_path), max_epochs=1)


def test_a_dry_run_writes_no_videos(tmp_path):
    fit(tmp_path, ReconstructionLogger(output_dir=str(tmp_path / "page")), fast_dev_run=True, max_epochs=None)
    assert not (tmp_path / "page").exists()
