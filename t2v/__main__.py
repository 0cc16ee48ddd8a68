"""The library's command line: `python -m t2v generate FOLDER "PROMPT" -o out.mp4`, `python -m t2v export`.

Training has its own command line, `cli.py` in a checkout of the repository.
"""

from pathlib import Path

from t2v.errors import UserError, run_tool


def generate(
    folder: str,
    prompt: str,
    output: Path,
    frames: int | None = None,
    seed: int = 0,
    guidance: float | None = None,
    weights: str = "full",
    device: str | None = None,
) -> None:
    """Generate one video from text and write it as an mp4.

    Args:
        folder: An exported model, as `python -m t2v export` writes it.
        prompt: The text.
        output: The .mp4 file to write; an existing file is replaced.
        frames: Length of the video; the model's own default if not given.
        seed: The same prompt, seed and length give the same video on the same kind of device.
        guidance: Strength of classifier-free guidance, 1 is none; the model's own default if not given.
        weights: Storage of the transformer's weights: full, fp8, int8 or nf4.
        device: Where to compute, such as cpu or cuda:0; the first GPU if there is one, else the CPU.
    """
    from t2v.generation.text_to_video import TextToVideo
    from t2v.video import Mp4Writer

    if output.suffix.lower() != ".mp4" or not output.absolute().parent.is_dir():
        raise UserError(f"output={output} must be a .mp4 file in a folder that exists: change --output.")
    model = TextToVideo.from_pretrained(folder, weights=weights)  # type: ignore[arg-type]
    model.to(_device(device))
    stream = model.stream(prompt, frames=frames, seed=seed, guidance=guidance)
    with Mp4Writer(output, model.fps) as file:
        for frame in stream:
            file.write(frame[0])
    print(f"Wrote        {output}")


def export(checkpoint: str, folder: str, tokenizer: str | None = None) -> None:
    """Write everything that generation needs into one folder of safetensors and JSON.

    Args:
        checkpoint: The .ckpt file or folder that `fit` of stage 2 wrote.
        folder: Where the model goes; it must not exist yet, or be empty.
        tokenizer: Checkpoint or exported folder of the VQ-VAE; by default the path used in training.
    """
    from t2v.generation.text_to_video import TextToVideo, check_target

    check_target(Path(folder))  # before the checkpoint is read, which takes longer
    TextToVideo.from_checkpoint(checkpoint, tokenizer).save_pretrained(folder)
    print(f'Wrote        {folder}; load it with t2v.TextToVideo.from_pretrained("{folder}")')


def _device(name: str | None) -> str:
    """The named device, or the first GPU if there is one, else the CPU."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n", 1)[0]
        raise UserError(f"device={name} cannot be used ({reason}): give cpu, or leave --device out.") from error
    return name


if __name__ == "__main__":
    run_tool({"generate": generate, "export": export}, program="python -m t2v")
