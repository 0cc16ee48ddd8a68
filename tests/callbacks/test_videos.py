from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader, DistributedSampler

from callbacks import VideoGalleryWriter
from callbacks.gallery import Shown, render, update_gallery
from t2v.batch import GeneratedVideos, PromptBatch
from t2v.video import probe, read_frames

PROMPTS = ["a red circle", 'a "quoted" <b>bold</b> & braced {prompt}', "a café at night"]


class LitPainter(LightningModule):
    def predict_step(self, batch: PromptBatch, batch_idx: int) -> GeneratedVideos:
        return GeneratedVideos(self.paint(batch.seeds), 4, batch.prompts, batch.names, fps=8.0)

    def paint(self, seeds: list[int]) -> Iterator[torch.Tensor]:
        for frame in range(4):
            grey = torch.tensor([40 * seed + frame for seed in seeds], dtype=torch.uint8)
            yield grey[:, None, None, None, None].expand(-1, 1, 3, 16, 16)


class Prompts(LightningDataModule):
    def predict_dataloader(self) -> DataLoader:
        ranks = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        sampler = DistributedSampler(PROMPTS, shuffle=False, **ranks)
        jobs = list(enumerate(PROMPTS))
        return DataLoader(jobs, batch_size=2, sampler=sampler, collate_fn=collate)


def collate(jobs: list[tuple[int, str]]) -> PromptBatch:
    return PromptBatch([text for _, text in jobs], [i for i, _ in jobs], [f"{i:04d}" for i, _ in jobs])


class Page(HTMLParser):
    """Collects the videos, tags and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.videos: list[dict[str, str | None]] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.add(tag)
        if tag == "video":
            self.videos.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


def predict(folder, model: LightningModule | None = None, **flags) -> None:
    writer = VideoGalleryWriter(str(folder))
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[writer], **flags)
    trainer.predict(model or LitPainter(), datamodule=Prompts(), return_predictions=False)


class LitFailingPainter(LitPainter):
    """Lists a folder while generating, and fails in the second batch."""

    def __init__(self, folder) -> None:
        super().__init__()
        self.folder = folder
        self.listed: list[list[str]] = []

    def paint(self, seeds: list[int]) -> Iterator[torch.Tensor]:
        for frame in super().paint(seeds):
            self.listed.append(sorted(path.name for path in self.folder.iterdir()))
            yield frame
            if 2 in seeds:
                raise RuntimeError("generation failed")


def check(folder) -> None:
    page = Page((folder / "index.html").read_text(encoding="utf-8"))
    assert [video["src"] for video in page.videos] == [f"videos/{i:04d}.mp4" for i in range(3)]
    for video in page.videos:
        assert {"autoplay", "loop", "muted"} <= video.keys()
        info = probe(folder / video["src"])
        assert (info.frames, info.fps, info.height, info.width) == (4, 8.0, 16, 16)
    for i, video in enumerate(page.videos):
        expected = torch.arange(4) + 40 * i
        greys = read_frames(folder / video["src"], range(4)).float().mean((1, 2, 3))
        torch.testing.assert_close(greys, expected.float(), atol=2, rtol=0)
    for prompt in PROMPTS:
        assert prompt in page.text
    assert not page.tags & {"b", "script", "link", "img", "iframe"}


def test_the_page_shows_the_video_of_every_prompt(tmp_path, capsys):
    predict(tmp_path)
    check(tmp_path)
    assert f"3 videos; open {tmp_path / 'index.html'}" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gallery.json", "index.html", "videos"]


def test_videos_appear_when_they_are_complete(tmp_path):
    model = LitFailingPainter(tmp_path / "videos")
    with pytest.raises(RuntimeError, match="generation failed"):
        predict(tmp_path, model)
    first, second = model.listed[:4], model.listed[4:]
    assert all(name.startswith(".") for names in first for name in names)
    assert [[name for name in names if not name.startswith(".")] for names in second] == [["0000.mp4", "0001.mp4"]]
    assert sorted(path.name for path in tmp_path.rglob("*.mp4")) == ["0000.mp4", "0001.mp4"]
    assert not (tmp_path / "index.html").exists()


def test_two_ranks_write_one_page(tmp_path):
    predict(tmp_path, strategy="ddp_fork", devices=2)
    check(tmp_path)


def test_the_page_refers_to_its_videos_only():
    page = render({"Videos": {"videos": [Shown("videos/a b#1.mp4", "x", "a b#1")], "figures": {}}}, None)
    assert "http" not in page
    assert 'src="videos/a%20b%231.mp4"' in page


def test_commands_that_run_one_after_another_share_a_page_which_reloads_until_the_last(tmp_path):
    update_gallery(tmp_path, "Reconstructions", [Shown("old.mp4", "", "step 1")], final=False)
    update_gallery(tmp_path, "Generated", [Shown("a.mp4", "a circle", "0")], final=False)
    update_gallery(tmp_path, "Reconstructions", [Shown("new.mp4", "", "step 2")], final=False)
    page = (tmp_path / "index.html").read_text()
    assert [video["src"] for video in Page(page).videos] == ["new.mp4", "a.mp4"]
    assert 'http-equiv="refresh"' in page
    update_gallery(tmp_path, "Figures", figures={"PSNR": "39 dB <best>"}, final=True)
    page = (tmp_path / "index.html").read_text()
    assert [video["src"] for video in Page(page).videos] == ["new.mp4", "a.mp4"]
    assert "39 dB <best>" in Page(page).text
    assert "refresh" not in page
