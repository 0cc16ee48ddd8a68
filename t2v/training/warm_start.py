"""The beginning of a run from the weights of another one, for fine-tuning."""

from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from t2v.checkpoints.storage import read_checkpoint
from t2v.errors import UserError, reason_of
from t2v.training.lightning_private import trainer_of


def warm_start(module: LightningModule, path: str | None) -> None:
    """Load the weights of a checkpoint, if a new run begins; called at the end of `configure_model`.

    Tensors that the checkpoint lacks or has in another shape, such as those of another text encoder or a longer
    vocabulary, stay as they are initialized, together with the other tensors of their layer; they are printed.

    Args:
        module: The LightningModule, sharded or not.
        path: A checkpoint of this project, a file or a folder, whose weights are the moving average if it has one; None
            for none.

    Raises:
        UserError: If there is no checkpoint that can be read, or most of its weights do not fit.
    """
    trainer = trainer_of(module)
    if path is None or trainer is None or not trainer.training or trainer.ckpt_path:
        return
    if not Path(path).exists():
        raise UserError(f"There is no checkpoint at model.init_from={path}: correct the path.")
    try:
        saved: dict[str, Any] = read_checkpoint(path)["state_dict"]
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"model.init_from={path} is not a checkpoint of this program, or it is damaged ({reason_of(error)}): give "
            "a .ckpt file that `fit` wrote."
        ) from error
    own: dict[str, Tensor] = module.state_dict()
    unlike = {name for name in own if name not in saved or saved[name].shape != own[name].shape}
    layers = {name.rpartition(".")[0] for name in unlike}
    left = [name for name in own if name.rpartition(".")[0] in layers]
    sizes = {name: tensor.numel() for name, tensor in own.items() if name.startswith("model.")}  # no discriminators
    if sum(sizes.get(name, 0) for name in left) > sum(sizes.values()) / 2:
        raise UserError(
            f"model.init_from={path} is of another model: {len(left)} of {len(own)} tensors, more than half of the "
            f"weights, are missing in it or have another shape, such as {left[0]}: give a checkpoint of this model."
        )
    fitting = {name: saved[name] for name in own.keys() - set(left)}
    set_model_state_dict(module, fitting, options=StateDictOptions(full_state_dict=True, strict=False))
    _print(path, len(fitting), left)


@rank_zero_only
def _print(path: str, loaded: int, left: list[str]) -> None:
    new = f"; initialized anew: {', '.join(left[:8])}{' …' if len(left) > 8 else ''}" if left else ""
    print(f"Weights      {loaded} tensors from {path}{new}", flush=True)
