"""Loading a trained VQ-VAE from a checkpoint of stage 1 or from an exported folder."""

from pathlib import Path

from t2v.checkpoints.storage import is_sharded, model_weights, read_checkpoint
from t2v.errors import UserError, reason_of
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
        model = VQVAE.from_config(arguments)
        model.load_state_dict(model_weights(checkpoint, path))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"'{path}' is not a checkpoint of stage 1, the VQ-VAE ({reason_of(error)}): give the path of one to "
            "--model.tokenizer."
        ) from error
    return model.requires_grad_(False).eval()
