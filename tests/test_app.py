"""The page to play with, by Gradio's own client; Gradio is imported where it is used, since that takes seconds."""

import re
import shutil
import socket
import urllib.request
from collections.abc import Iterator

import pytest
import torch

from callbacks.gallery import Shown, update_gallery
from t2v import TextToVideo
from t2v.transformer.config import TextConfig
from t2v.video import probe, read_clip, read_frames, write_mp4
from t2v.vqvae.quantizer import FSQuantizer
from tests.support.toys import WordEncoder, toy_transformer, toy_vqvae

DEFAULTS = {"frames": 4, "seed": 0, "guidance": 1, "temperature": 1, "top_k": None, "top_p": None, "start": None}
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def model() -> TextToVideo:
    torch.manual_seed(0)
    transformer = toy_transformer(window=2, text=TextConfig(dim=8), vocab_size=16)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
    vqvae = toy_vqvae(FSQuantizer(levels=[4, 4]), channel_multipliers=(1, 1)).eval()
    return TextToVideo(transformer, vqvae, WordEncoder(), fps=8.0, frames=5)


@pytest.fixture(scope="module")
def page(model) -> Iterator[str]:
    from t2v.app import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = serve(model, "Toy model", ["a red circle"], port, wait=False)
    yield page.local_url
    page.close()


def connect(page: str):
    from gradio_client import Client

    return Client(page, verbose=False, httpx_kwargs={"timeout": 60})


def ask(client, prompt: str, **changes: object):
    """Submit a prompt; the job's outputs are one per frame and the last with the file."""
    values = [prompt, *{**DEFAULTS, **changes}.values()]
    return client.submit(*values, 1, api_name="/generate")


def test_two_people_get_their_own_videos(page, model, tmp_path):
    clients = [connect(page) for _ in range(2)]
    jobs = [
        ask(client, prompt, seed=i) for i, (client, prompt) in enumerate(zip(clients, ["red", "blue"], strict=True))
    ]
    for i, (job, prompt) in enumerate(zip(jobs, ["red", "blue"], strict=True)):
        *_, (_, video, status, *_) = job.result(timeout=60), job.outputs()[-1]
        file = video["video"] if isinstance(video, dict) else video
        expected = tmp_path / f"{prompt}.mp4"
        write_mp4(expected, model.generate(prompt, 4, seed=i)[0], 8.0)
        assert torch.equal(read_frames(file, range(4)), read_frames(expected, range(4)))
        assert probe(file).fps == 8
        assert status == f"{prompt}: 4 frames, seed {i}"
        assert len(job.outputs()) == 5


def test_the_page_begins_from_a_picture_or_video(page, model, tmp_path):
    from gradio_client import handle_file

    clip = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    write_mp4(tmp_path / "start.mp4", clip, 8.0)
    job = ask(connect(page), "red", start=handle_file(tmp_path / "start.mp4"))
    start = read_clip(tmp_path / "start.mp4", 1, 16, 8.0)
    write_mp4(tmp_path / "expected.mp4", model.generate("red", 4, start=start)[0], 8.0)
    assert torch.equal(
        read_frames(job.result(timeout=60)[1], range(4)), read_frames(tmp_path / "expected.mp4", range(4))
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 0}, "frames=0 must be at least 1"),
        ({"frames": 2.5}, "Frames is 2.5: give a whole number."),
        ({"seed": None}, "Seed is empty: give a whole number."),
        ({"top_p": 7}, "top_p=7.0"),
        ({"start": "README.md"}, "is not a video or picture that can be read"),
    ],
    ids=["no frames", "half a frame", "no seed", "top_p", "start"],
)
def test_an_error_is_a_sentence(page, changes, message):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    if "start" in changes:
        changes = {"start": handle_file(changes["start"])}
    job = ask(connect(page), "red", **changes)
    with pytest.raises(AppError, match=re.escape(message)):
        job.result(timeout=60)
    assert message in job.outputs()[-1][2]


@pytest.fixture
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1280,1000"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's packages chromium and chromium-driver")
def test_the_page_in_a_browser(page, model, browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def until(condition):
        return WebDriverWait(browser, 120).until(lambda driver: condition())

    def find(selector):
        return browser.find_element(By.CSS_SELECTOR, selector)

    def enter(selector, text):
        find(selector).send_keys(Keys.CONTROL, "a")
        find(selector).send_keys(text)

    def status():
        return find("#status textarea").get_attribute("value")

    browser.get(page)
    until(lambda: browser.find_elements(By.CSS_SELECTOR, "#prompt textarea"))
    enter("#prompt textarea", "a red circle")
    enter("#frames input", "6")
    enter("#seed input", "3")
    find("#generate").click()
    until(lambda: status() == "a red circle: 6 frames, seed 3")
    until(lambda: browser.execute_script("return document.querySelector('#video video')?.readyState >= 2"))
    script = "const v = document.querySelector('#video video'); return [v.duration, v.videoWidth, v.currentSrc]"
    duration, width, source = browser.execute_script(script)
    assert duration == pytest.approx(6 / 8, abs=0.01)
    assert width == 16
    until(lambda: browser.execute_script("return document.querySelector('#video video').played.length > 0"))
    assert find("#frame img").get_attribute("naturalWidth") == "384"
    shown, expected = tmp_path / "shown.mp4", tmp_path / "expected.mp4"
    urllib.request.urlretrieve(source, shown)
    write_mp4(expected, model.generate("a red circle", 6, seed=3)[0], 8.0)
    assert torch.equal(read_frames(shown, range(6)), read_frames(expected, range(6)))
    assert len(browser.find_elements(By.CSS_SELECTOR, "#history button.thumbnail-item, #history .thumbnail-item")) == 1
    assert browser.save_screenshot(str(tmp_path / "page.png"))
    enter("#frames input", "0")
    find("#generate").click()
    until(lambda: "Error: frames=0 must be at least 1" in status())


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's packages chromium and chromium-driver")
def test_the_gallery_in_a_browser(browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    write_mp4(tmp_path / "clip.mp4", torch.zeros(8, 3, 16, 16, dtype=torch.uint8), 8.0)
    gallery = update_gallery(
        tmp_path, "Clips", [Shown("clip.mp4", "a <b>red</b> circle", "clip")], {"Accuracy": "97 %"}, final=True
    )
    browser.get(gallery.as_uri())
    play = "const v = document.querySelector('video'); v.muted = true; v.play(); return v.duration"
    WebDriverWait(browser, 60).until(lambda driver: driver.execute_script(play) == 1)
    text = browser.find_element(By.TAG_NAME, "body").text
    assert "a <b>red</b> circle" in text
    assert "97 %" in text
