"""The pages as a person sees them, in Chromium."""

import urllib.request
from collections.abc import Iterator

import pytest
import torch

from callbacks.gallery import Shown, update_gallery
from t2v.video import read_frames, write_mp4
from tests.support.browser import Browser, needs_chromium, open_browser, tensorboard

FIELDS = ("guidance-scale", "temperature", "top-k", "top-p")
pytestmark = [pytest.mark.slow, needs_chromium]


@pytest.fixture
def browser() -> Iterator[Browser]:
    with open_browser() as window:
        yield window


def test_the_page_to_play_with(page, model, browser, tmp_path):
    """Fields whose value is a schedule, or that are not set, are empty, and the model's own settings hold."""
    browser.open_page(page)
    browser.until(lambda: browser.count("#sampler button"))
    browser.find("#sampler button").click()
    browser.until(lambda: browser.count("#top-p input"))
    assert [browser.find(f"#{name} input").get_attribute("value") for name in FIELDS] == [""] * len(FIELDS)
    browser.generate("a red circle", frames=6, seed=3)
    script = "const v = document.querySelector('#video video'); return [v.duration, v.videoWidth, v.currentSrc]"
    duration, width, source = browser.run(script)
    assert duration == pytest.approx(6 / 8, abs=0.01)
    assert width == 16
    browser.until(lambda: browser.run("return document.querySelector('#video video').played.length > 0"))
    assert browser.find("#frame img").get_attribute("naturalWidth") == "384"
    shown, expected = tmp_path / "shown.mp4", tmp_path / "expected.mp4"
    urllib.request.urlretrieve(source, shown)
    write_mp4(expected, model.generate("a red circle", 6, seed=3)[0], 8.0)
    assert torch.equal(read_frames(shown, range(6)), read_frames(expected, range(6)))
    assert browser.count("#history button.thumbnail-item, #history .thumbnail-item") == 1
    assert browser.driver.save_screenshot(str(tmp_path / "page.png"))
    browser.enter("#frames input", "0")
    browser.find("#generate").click()
    browser.until(lambda: "Error: frames=0 must be at least 1" in browser.status())


def test_the_gallery(browser, tmp_path):
    write_mp4(tmp_path / "clip.mp4", torch.zeros(8, 3, 16, 16, dtype=torch.uint8), 8.0)
    shown = [Shown("clip.mp4", "a <b>red</b> circle", "clip")]
    browser.play_gallery(update_gallery(tmp_path, "Clips", shown, {"Accuracy": "97 %"}, final=True))
    browser.until(lambda: browser.run("return document.querySelector('video').played.length > 0"))
    assert browser.run("return document.querySelector('video').duration") == 1
    text = browser.find("body").text
    assert "a <b>red</b> circle" in text
    assert "97 %" in text


def test_the_videos_of_tensorboard(browser, trained_pipeline):
    """Three videos of 4 × 4 patches of 8 pixels each, logged while stage 2 trained."""
    with tensorboard(trained_pipeline.run / "transformer") as address:
        sizes = browser.open_videos(address)
        names = browser.find("body").text
    assert set(sizes) == {(64, 64)}
    assert "a small red circle moves left slowly" in names
