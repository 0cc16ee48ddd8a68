"""A page to generate videos in a browser; `python -m t2v app` serves it."""

import atexit
import os
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, no_type_check

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read by the import below

import gradio as gr
import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from t2v.errors import UserError
from t2v.generation.sampling import Sampler
from t2v.generation.text_to_video import TextToVideo
from t2v.video import Mp4Writer, read_clip

Number = int | float | None
Update = tuple[Any, Any, str, list[tuple[str, str]], Any]
SHOWN_SIZE = 384
"""Height and width in pixels at which a frame is shown while the video is made."""


class VideoPage:
    """The page and what its buttons do.

    One video is made at a time; other requests wait in the order in which they came.

    Args:
        model: Generates the videos.
        folder: Where the mp4 files are written.
        title: Heading of the page.
        examples: Prompts to choose from.
    """

    def __init__(self, model: TextToVideo, folder: Path, title: str, examples: list[str]) -> None:
        self.model, self.folder = model, folder
        self.title, self.examples = title, examples

    def build(self) -> gr.Blocks:
        """Return the page."""
        sampler, guidance = self.model.sampler, self.model.guidance
        with gr.Blocks(title="t2v", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
            gr.Markdown(f"# {self.title}")
            history = gr.State([])
            with gr.Row():
                with gr.Column():
                    prompt = gr.Textbox(label="Prompt", lines=2, elem_id="prompt")
                    if self.examples:
                        gr.Examples([[example] for example in self.examples], [prompt], label="Examples")
                    with gr.Row():
                        frames = gr.Number(self.model.frames, label="Frames", elem_id="frames")
                        seed = gr.Number(0, label="Seed", elem_id="seed")
                        scale = _optional("Guidance scale", guidance, "the model's schedule")
                    with gr.Accordion("Sampler", open=False, elem_id="sampler"), gr.Row():
                        temperature = _optional("Temperature", sampler.temperature, "the model's schedule")
                        top_k = _optional("Top-k", sampler.top_k, "all tokens")
                        top_p = _optional("Top-p", sampler.top_p, "all tokens")
                    with gr.Accordion("Start from a picture or video", open=False):
                        start = gr.File(label="Picture or video", elem_id="start")
                        start_frames = gr.Number(1, label="Start frames", info="1 for a picture")
                    with gr.Row():
                        run = gr.Button("Generate", variant="primary", elem_id="generate")
                        stop = gr.Button("Stop")
                with gr.Column():
                    status = gr.Textbox(label="Status", interactive=False, lines=2, elem_id="status")
                    frame = gr.Image(
                        label="Newest frame",
                        height=SHOWN_SIZE,
                        interactive=False,
                        buttons=["fullscreen"],
                        elem_id="frame",
                    )
                    video = gr.Video(label="Video", height=SHOWN_SIZE, autoplay=True, loop=True, elem_id="video")
                    download = gr.DownloadButton("Download", interactive=False, elem_id="download")
            gallery = gr.Gallery(label="History", columns=4, elem_id="history", interactive=False)
            inputs = [prompt, frames, seed, scale, temperature, top_k, top_p, start, start_frames, history]
            event = gr.on(
                [run.click, prompt.submit],
                self.generate,
                inputs,
                [frame, video, status, history, download],
                concurrency_limit=1,
                api_name="generate",
            )
            stop.click(None, cancels=[event], api_visibility="private")
            history.change(list, history, gallery, api_visibility="private", queue=False)
        assert isinstance(page, gr.Blocks)
        return page

    @no_type_check  # a checked generator is a function that returns one, which Gradio does not run
    def generate(
        self,
        prompt: str,
        frames: Number,
        seed: Number,
        guidance: str | None,
        temperature: str | None,
        top_k: str | None,
        top_p: str | None,
        start: str | None,
        start_frames: Number,
        history: list[tuple[str, str]],
    ) -> Iterator[Update]:
        """Generate a video, and yield each frame, then the file.

        Args:
            prompt: The text.
            frames: Length of the video.
            seed: Seed of the video.
            guidance: Guidance scale; empty or None for the model's.
            temperature: Temperature; empty or None for the model's.
            top_k: Number of most probable tokens to keep; empty or None for all.
            top_p: Total probability of the tokens to keep; empty or None for all.
            start: Path of a picture or video with which the video begins.
            start_frames: Number of frames that are taken from it.
            history: Videos of this browser with their captions, the newest first.

        Yields:
            The values of the page's outputs: frame, video, status, history, download button.
        """
        try:
            length, seed = _whole("Frames", frames), _whole("Seed", seed)
            picture = None
            if start is not None:
                picture = read_clip(
                    start, _whole("Start frames", start_frames), self.model.vqvae.image_size, self.model.fps
                )
            scale = _number("Guidance scale", guidance)
            sampler = self._sampler(temperature, top_k, top_p)
            stream = self.model.stream(prompt, length, seed, picture, scale, sampler, candidates=1)  # frame by frame
            descriptor, name = tempfile.mkstemp(".mp4", f"seed-{seed}-", self.folder)
            os.close(descriptor)
            with Mp4Writer(name, self.model.fps) as file:
                for i, one in enumerate(stream):
                    file.write(one[0])
                    state = f"{prompt}: frame {i + 1} of {length}"
                    yield _enlarged(one[0, 0]), None, state, history, gr.skip()
        except UserError as error:
            yield None, None, f"Error: {error}", history, gr.skip()
            raise gr.Error(str(error), print_exception=False) from error
        except Exception as error:
            traceback.print_exc()
            message = f"The video could not be made ({type(error).__name__}: {error}): the terminal shows more."
            yield None, None, f"Error: {message}", history, gr.skip()
            raise gr.Error(message, print_exception=False) from error
        history = [(name, f"{prompt} (seed {seed})"), *history]
        yield (
            gr.skip(),
            name,
            f"{prompt}: {length} frames, seed {seed}",
            history,
            gr.update(value=name, interactive=True),
        )

    def _sampler(self, temperature: str | None, top_k: str | None, top_p: str | None) -> Sampler:
        """Return the model's sampler with other values."""
        model, own_temperature, most = self.model.sampler, _number("Temperature", temperature), _number("Top-k", top_k)
        return Sampler(
            model.temperature if own_temperature is None else own_temperature,
            None if most is None else _whole("Top-k", most),
            _number("Top-p", top_p),
            model.typical_p,
            model.min_p,
        )


def serve(
    model: TextToVideo, title: str, examples: list[str], port: int = 7860, browser: bool = False, wait: bool = True
) -> gr.Blocks:
    """Serve the page on 127.0.0.1 until the process is interrupted.

    Args:
        model: Generates the videos.
        title: Heading of the page.
        examples: Prompts to choose from.
        port: The port.
        browser: Whether to open the page in the default browser.
        wait: Whether to return only when the process is interrupted.

    Raises:
        UserError: If the port is in use.
    """
    folder = Path(tempfile.mkdtemp(prefix="t2v-app-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    page = VideoPage(model, folder, title, examples).build()
    page.queue(max_size=64)
    try:
        page.launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            inbrowser=browser,
            quiet=True,
            ssr_mode=False,
            show_error=True,
            prevent_thread_lock=True,
            max_file_size="1gb",
        )
    except OSError as error:
        raise UserError(f"Port {port} of 127.0.0.1 cannot be used, perhaps by another page: change --port.") from error
    print(f"Page         {page.local_url}  (Ctrl+C ends it)", flush=True)
    if wait:
        page.block_thread()
    return page


def _optional(label: str, value: object, empty: str) -> gr.Textbox:
    """Return a field for a number that may be empty; Gradio's field for numbers would show and send 0.

    Args:
        label: Its name.
        value: The number; None or a schedule for an empty field.
        empty: What an empty field means.
    """
    text = f"{value:g}" if isinstance(value, int | float) else ""
    return gr.Textbox(text, label=label, placeholder=empty, max_lines=1, elem_id=label.lower().replace(" ", "-"))


def _number(name: str, text: str | None) -> float | None:
    """Return the number in a field, or None if it is empty."""
    try:
        return float(text) if text and text.strip() else None
    except ValueError:
        raise UserError(f"{name} is '{text}': give a number, or leave the field empty.") from None


def _whole(name: str, value: Number) -> int:
    if value is None or value != int(value):
        raise UserError(f"{name} is {'empty' if value is None else value}: give a whole number.")
    return int(value)


def _enlarged(frame: UInt8[Tensor, "c height width"]) -> UInt8[np.ndarray, "y x c"]:
    """Return a frame for the page, small ones with larger pixels."""
    factor = max(1, SHOWN_SIZE // frame.shape[-1])
    image = frame.permute(1, 2, 0).cpu().numpy()
    return image.repeat(factor, axis=0).repeat(factor, axis=1)
