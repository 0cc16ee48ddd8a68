"""Loading a trained VQ-VAE from a checkpoint of stage 1 or from an exported folder."""

from pathlib import Path

from t2v.checkpoints.storage import check_finite, is_sharded, read_checkpoint
from t2v.errors import UserError
from t2v.vqvae.model import VQVAE


def load_vqvae(path: str) -> VQVAE:
    """Load a trained VQ-VAE, in eval mode and frozen.

    Args:
        path: The .ckpt file or folder that `fit` of stage 1 wrote, or a folder that `VQVAE.save_pretrained` wrote. If
            training kept a moving average of the weights, the average is loaded.

    Raises:
        UserError: If the path does not exist or is not a checkpoint of stage 1.
    """
    if Path(path).is_dir() and not is_sharded(path):
        return VQVAE.from_pretrained(path)
    if not Path(path).exists():
        raise UserError(
            f"There is no VQ-VAE checkpoint at '{path}': train stage 1 first, or give the path of its checkpoint to "
            f"--model.tokenizer."
        )
    try:
        checkpoint = read_checkpoint(path)
        arguments = checkpoint["hyper_parameters"]["model"]["init_args"]
        state = {
            name.removeprefix("model."): value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith("model.")
        }
        model = VQVAE.from_config(arguments)
        model.load_state_dict(state)
        check_finite(state, f"'{path}'")
    except UserError:
        raise
    except Exception as error:
        reason = str(error).split("\n", 1)[0]
        raise UserError(
            f"'{path}' is not a checkpoint of stage 1, the VQ-VAE ({type(error).__name__}: {reason}): give the path of "
            f"one to --model.tokenizer."
        ) from error
    return model.requires_grad_(False).eval()
