"""Makes one folder of a trained model, for `t2v.TextToVideo.from_pretrained`."""

from pathlib import Path

from t2v.errors import run_tool


def export(checkpoint: str, folder: str, tokenizer: str | None = None) -> None:
    """Write everything that generation needs into one folder of safetensors and JSON.

    Args:
        checkpoint: The .ckpt file or folder that `fit` of stage 2 wrote.
        folder: Where the model goes; it must not exist yet, or be empty.
        tokenizer: Checkpoint or exported folder of the VQ-VAE; by default where it lay in training.
    """
    from t2v.generation.text_to_video import TextToVideo, check_target

    check_target(Path(folder))  # before much is read
    TextToVideo.from_checkpoint(checkpoint, tokenizer).save_pretrained(folder)
    print(f'Wrote        {folder}; load it with t2v.TextToVideo.from_pretrained("{folder}")')


if __name__ == "__main__":
    run_tool(export)
