"""Pictures of the pages for the documentation: `python -m tests.screenshots runs/demo docs/assets`.

They show a trained run in Chromium, by the same steps as `tests/app/test_browser.py`.
"""

from pathlib import Path

from t2v.app import serve
from t2v.errors import run_tool
from t2v.generation.text_to_video import TextToVideo
from tests.support.browser import free_port, open_browser, tensorboard

PROMPT = "a large blue ball flies to the right"


def main(run: Path, out: Path) -> None:
    """Write page.png, gallery.png and tensorboard.png.

    Args:
        run: Run folder of `make demo`.
        out: Folder of the pictures.
    """
    model = TextToVideo.from_checkpoint(run / "transformer/checkpoints/last.ckpt")
    page = serve(model, "The demo's model", [PROMPT], free_port(), wait=False)
    with open_browser() as browser:
        browser.open_page(page.local_url)
        browser.generate(PROMPT, frames=16, seed=1)
        browser.driver.save_screenshot(str(out / "page.png"))
        browser.play_gallery(run / "index.html")
        browser.until(lambda: browser.run("return document.querySelector('video').currentTime > 0.5"))
        browser.driver.save_screenshot(str(out / "gallery.png"))
        with tensorboard(run / "transformer") as address:
            browser.open_videos(address)
            browser.driver.save_screenshot(str(out / "tensorboard.png"))
    page.close()


if __name__ == "__main__":
    run_tool(main)
