"""The library's command line: `python -m t2v {generate,export,app}`.

Training has its own command line, `cli.py` in a checkout of the repository. The models are imported only after the
arguments are checked, since that takes seconds.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from t2v.checkpoints.config import import_modules
from t2v.errors import UserError, exit_on_expected_error, exit_on_interrupt, shorten_tracebacks

_DESCRIPTION = "Text-to-video generation. `--import MODULE` imports a module with classes of your own first."


def generate(
    folder: str,
    prompt: str,
    output: Path,
    frames: int | None = None,
    seed: int = 0,
    guidance: float | None = None,
    weights: Literal["full", "fp8", "int8", "nf4"] = "full",
    compiled: bool = False,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    device: str | None = None,
    text_device: str | None = None,
    parallel: int | Literal["auto"] = "auto",
    revision: str | None = None,
    negative_prompt: str = "",
    candidates: int | None = None,
) -> None:
    """Generate one video from text and write it as an mp4.

    Args:
        folder: An exported model, as `python -m t2v export` writes it, or a repository of the Hub, user/name.
        prompt: The text.
        output: The .mp4 file to write; an existing file is replaced.
        frames: Length of the video; the model's default if not given.
        seed: The same prompt, seed and length give the same video on the same kind of device.
        guidance: Guidance scale (classifier-free guidance), 1 is no guidance; the model's default if not given.
        weights: Storage of the transformer's weights: unchanged, or quantized to 8 or 4 bits.
        compiled: Compile the transformer's decoding pass, which takes a minute or more and pays off for long videos.
        dtype: Type of the weights that are not quantized; auto is that of the exported model, but float32 on CPUs
            without bfloat16 units.
        device: Device of the models, such as cpu or cuda:0; the first GPU if there is one, else the CPU.
        text_device: Device of the text encoder; that of the models if not given.
        parallel: Tokens that a pass of the transformer computes; 1 is one after the other, auto as many as are worth it
            on this kind of device. The video is the same with any number, up to rounding.
        revision: Branch, tag or commit of a repository.
        negative_prompt: What the video should not show; it needs guidance.
        candidates: Videos to generate, of which the most probable one under guidance is written; it needs guidance. The
            model's default if not given.

    Raises:
        UserError: If an argument is invalid, the model cannot be loaded, or the video cannot be written.
    """
    _check_output(output)
    from t2v.generation.text_to_video import TextToVideo
    from t2v.video import Mp4Writer

    model = TextToVideo.from_pretrained(folder, weights, compiled, dtype, device, text_device, revision)
    options: dict[str, Any] = {"parallel": parallel, "negative_prompt": negative_prompt, "candidates": candidates}
    stream = model.stream(prompt, frames, seed, guidance=guidance, **options)
    try:
        with Mp4Writer(output, model.fps) as file:
            for frame in stream:
                file.write(frame[0])
    except OSError as error:
        raise UserError(f"Cannot write output={output} ({error.strerror or error}): change --output.") from error
    print(f"Wrote        {output}")


def export(checkpoint: str, folder: str, tokenizer: str | None = None) -> None:
    """Write everything that generation needs into one folder of safetensors and JSON.

    Args:
        checkpoint: The .ckpt file or folder that `fit` of stage 2 wrote.
        folder: The folder to write; it must not exist yet, or be empty.
        tokenizer: Checkpoint or exported folder of the VQ-VAE; by default the path used in training.

    Raises:
        UserError: If a file is missing or damaged, or the folder cannot be written.
    """
    from t2v.generation.loading import check_target
    from t2v.generation.text_to_video import TextToVideo

    check_target(Path(folder))  # first, since reading the checkpoint takes longer
    TextToVideo.from_checkpoint(checkpoint, tokenizer).save_pretrained(folder)
    print(f'Wrote        {folder}; load it with t2v.TextToVideo.from_pretrained("{folder}")')


def app(
    folder: str,
    port: int = 7860,
    browser: bool = False,
    weights: Literal["full", "fp8", "int8", "nf4"] = "full",
    compiled: bool = False,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    device: str | None = None,
    text_device: str | None = None,
    revision: str | None = None,
) -> None:
    """Serve a page on this computer, on which to generate videos in a browser.

    Args:
        folder: An exported model, as `python -m t2v export` writes it, or a repository of the Hub, user/name.
        port: Port of 127.0.0.1.
        browser: Open the page in the default browser.
        weights: Storage of the transformer's weights: unchanged, or quantized to 8 or 4 bits.
        compiled: Compile the transformer's decoding step, which takes a minute or more and pays off for long videos.
        dtype: Type of the weights that are not quantized; auto is that of the exported model, but float32 on CPUs
            without bfloat16 units.
        device: Device of the models, such as cpu or cuda:0; the first GPU if there is one, else the CPU.
        text_device: Device of the text encoder; that of the models if not given.
        revision: Branch, tag or commit of a repository.

    Raises:
        UserError: If Gradio is not installed, the model cannot be loaded, or the port is in use.
    """
    try:
        from t2v.app import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError('The page needs Gradio, which is not installed: pip install -e ".[app]".') from error
    from t2v.generation.text_to_video import TextToVideo

    model = TextToVideo.from_pretrained(folder, weights, compiled, dtype, device, text_device, revision)
    serve(model, Path(folder).resolve().name, model.prompts, port, browser)


def _check_output(output: Path) -> None:
    if output.suffix.lower() != ".mp4" or not output.absolute().parent.is_dir() or output.is_dir():
        raise UserError(f"output={output} must be a .mp4 file in a folder that exists: change --output.")


def _check_text(arguments: list[str]) -> None:
    """Check that a command line is text: the system passes bytes that are not UTF-8 as half characters."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{argument!r} is not text in UTF-8: write it in UTF-8.") from error


def main() -> None:
    """Parse the command line and run one command.

    Raises:
        SystemExit: With status 2, after one `error:` line on stderr, after a user's mistake; with 130 after Ctrl-C.
    """
    generate_parser = ArgumentParser(exit_on_error=False, description="Generate one video from text.")
    generate_parser.add_argument(
        "-o", "--output", type=Path, default=Path("video.mp4"), help="The .mp4 file to write; an old one is replaced."
    )
    generate_parser.add_function_arguments(generate, as_group=False, as_positional=True, skip={"output"})
    export_parser = ArgumentParser(exit_on_error=False, description="Write a trained model into one folder.")
    export_parser.add_function_arguments(export, as_group=False, as_positional=True)
    app_parser = ArgumentParser(exit_on_error=False, description="Generate videos in a browser.")
    app_parser.add_function_arguments(app, as_group=False, as_positional=True)
    parser = ArgumentParser(exit_on_error=False, prog="python -m t2v", description=_DESCRIPTION)
    commands = parser.add_subcommands(dest="command")
    commands.add_subcommand("generate", generate_parser, help="generate one video from text")
    commands.add_subcommand("export", export_parser, help="write a trained model into one folder")
    commands.add_subcommand("app", app_parser, help="generate videos in a browser")
    with exit_on_interrupt(), exit_on_expected_error():
        _check_text(sys.argv)
        arguments = parser.parse_args(import_modules(sys.argv[1:]))
        functions: dict[str, Callable[..., None]] = {"generate": generate, "export": export, "app": app}
        functions[arguments.command](**arguments[arguments.command].as_dict())


if __name__ == "__main__":
    shorten_tracebacks()
    main()
