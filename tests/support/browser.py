"""Chromium, driven by Selenium: the page to play with, the gallery and TensorBoard as a person sees them."""

import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's packages chromium and chromium-driver")
_SECONDS = 120
"""How long a page may take."""


class Browser:
    """A window of Chromium."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def until(self, condition: Callable[[], T]) -> T:
        """Wait until a condition is true, and return its value."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, _SECONDS).until(lambda _: condition())

    def find(self, selector: str) -> Any:
        """Return the first element of a CSS selector."""
        return self.driver.find_element("css selector", selector)

    def count(self, selector: str) -> int:
        """Return the number of elements of a CSS selector."""
        return len(self.driver.find_elements("css selector", selector))

    def run(self, script: str) -> Any:
        """Run JavaScript and return its value."""
        return self.driver.execute_script(script)

    def enter(self, selector: str, text: str) -> None:
        """Replace the text of a field."""
        from selenium.webdriver.common.keys import Keys

        self.find(selector).send_keys(Keys.CONTROL, "a")
        self.find(selector).send_keys(text)

    def open_page(self, url: str) -> None:
        """Open the page to play with."""
        self.driver.get(url)
        self.until(lambda: self.count("#prompt textarea"))

    def generate(self, prompt: str, frames: int, seed: int) -> None:
        """Generate a video on the page to play with, where it then plays."""
        self.enter("#prompt textarea", prompt)
        self.enter("#frames input", str(frames))
        self.enter("#seed input", str(seed))
        self.find("#generate").click()
        self.until(lambda: self.status() == f"{prompt}: {frames} frames, seed {seed}")
        self.until(lambda: self.run("return document.querySelector('#video video')?.readyState >= 2"))

    def status(self) -> str:
        """Return the line below the video on the page to play with."""
        return str(self.find("#status textarea").get_attribute("value"))

    def play_gallery(self, path: Path) -> None:
        """Open a gallery, and play its first video."""
        self.driver.get(path.absolute().as_uri())
        self.until(lambda: self.run("return document.querySelector('video')?.duration > 0"))
        self.run("const v = document.querySelector('video'); v.muted = true; v.play()")

    def open_videos(self, url: str) -> list[tuple[int, int]]:
        """Open TensorBoard's page of images, which plays videos; return width and height of the pictures."""
        self.driver.get(f"{url}#images")
        return self.until(lambda: [tuple(size) for size in self.run(_PICTURES)])


_PICTURES = """
function pictures(root) {
    const nested = [...root.querySelectorAll('*')].filter(e => e.shadowRoot).flatMap(e => pictures(e.shadowRoot));
    return [...root.querySelectorAll('img')].concat(nested);
}
return pictures(document).filter(e => e.src.includes('individualImage') && e.naturalWidth)
    .map(e => [e.naturalWidth, e.naturalHeight]);
"""
"""Sizes of TensorBoard's pictures, which are in the shadow trees of its elements."""


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Open a window without a screen."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1280,1000"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


def free_port() -> int:
    """Return a port of this machine that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """Serve the logs of a folder on this machine, and yield the address."""
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={folder}", "--host=127.0.0.1", f"--port={port}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            next(line for line in server.stderr if "http://" in line)  # it serves now
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.terminate()
