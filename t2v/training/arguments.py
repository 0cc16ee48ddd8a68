"""Checks of a command's config that Lightning makes late, with another error, or not at all."""

from pkgutil import resolve_name
from typing import Any, get_args, get_type_hints

from jsonargparse import Namespace

from t2v.errors import UserError, check_range

_RANGES = {
    "accumulate_grad_batches": "[1, inf)",
    "check_val_every_n_epoch": "[1, inf)",
    "gradient_clip_val": "[0, inf)",
    "log_every_n_steps": "[0, inf)",
    "num_nodes": "[1, inf)",
    "num_sanity_val_steps": "[-1, inf)",
    "overfit_batches": "[0, inf)",
    "reload_dataloaders_every_n_epochs": "[0, inf)",
}
_STAGES = {"t2v.vqvae": "stage 1, the VQ-VAE", "t2v.transformer": "stage 2, the transformer"}
_SEEDS = f"[0, {2**32 - 1}]"


def check_trainer_arguments(config: Namespace) -> None:
    """Check the trainer's arguments and the seed of a command.

    Args:
        config: The config of the command.

    Raises:
        UserError: If one is out of range, or the trainer would never stop.
    """
    trainer: dict[str, Any] = vars(config.get("trainer") or Namespace())
    for name, interval in _RANGES.items():
        check_range("trainer", interval, **{name: trainer.get(name)})
    seed = config.get("seed_everything")
    if not isinstance(seed, bool):
        check_range("the seed of the run", _SEEDS, seed_everything=seed)
    endless = trainer.get("max_epochs") == -1 or (trainer.get("max_epochs") is None and trainer.get("max_time"))
    if endless and trainer.get("max_steps") == -1 and config.get("model"):
        raise UserError(
            "trainer.max_steps=-1 leaves training without a last step, unless trainer.max_epochs is set, so the "
            "learning rate has nothing to decay to, also with trainer.max_time: set max_steps or max_epochs."
        )
    if trainer.get("val_check_interval") == 0:
        raise UserError("val_check_interval=0 must be greater than 0 (trainer); limit_val_batches: 0 turns it off.")


def check_nulls(config: Namespace, prefix: str = "") -> None:
    """Check that no argument of a class is null unless its annotation allows it: jsonargparse accepts it for lists.

    Args:
        config: The config of a command, or a part of it.
        prefix: The keys that lead to the part.

    Raises:
        UserError: If one is null.
    """
    for key, value in vars(config).items():
        name = f"{prefix}{key}"
        if isinstance(value, Namespace) and isinstance(value.get("init_args"), Namespace):
            hints = _annotations(value["class_path"])
            for argument, given in vars(value["init_args"]).items():
                if given is None and argument in hints and not _allows_none(hints[argument]):
                    raise UserError(f"{name}.{argument} is null, but it needs a value: leave it out for the default.")
            check_nulls(value["init_args"], f"{name}.")
        elif isinstance(value, Namespace):
            check_nulls(value, f"{name}.")
        elif isinstance(value, list):
            check_nulls(Namespace(**{str(i): each for i, each in enumerate(value)}), f"{name}.")


def _annotations(class_path: str) -> dict[str, Any]:
    """Return the types of the arguments of a class, or none if they cannot be told."""
    try:
        return get_type_hints(resolve_name(class_path).__init__)
    except Exception:  # names that exist for the type checker only, or a class without annotations
        return {}


def _allows_none(annotation: Any) -> bool:
    return annotation in (Any, None, type(None)) or any(_allows_none(each) for each in get_args(annotation))


def check_same_classes(path: str, saved: dict[str, Any], configured: Namespace, *, training: bool) -> None:
    """Check that a checkpoint is of the model of the config and, to continue training, of its optimizer.

    Args:
        path: The checkpoint, for the message.
        saved: Class path and arguments of the model in the checkpoint.
        configured: Class path and arguments of the model in the config.
        training: Whether the optimizer's state is loaded.

    Raises:
        UserError: If a class is another; the state of another optimizer fails in the middle of a step, or trains
            differently.
    """
    saved_class, configured_class = resolve_name(saved["class_path"]), resolve_name(configured.class_path)
    if saved_class is not configured_class:
        raise UserError(
            f"{path} holds a {_describe(saved_class)}, but this run's config asks for a {_describe(configured_class)}: "
            "give the checkpoint of that model, or the other config."
        )
    before = _class_path(saved["init_args"].get("optimizer"))
    now = _class_path((configured.get("init_args") or Namespace()).get("optimizer"))
    if training and before and now and resolve_name(before) is not resolve_name(now):
        raise UserError(
            f"{path} holds the state of the optimizer {before}, but model.optimizer is {now}: continue with the "
            "optimizer that the run began with, or begin a new run from the weights alone by --model.init_from."
        )


def _class_path(value: Any) -> str | None:
    """Return the class path of a class in a config, which is given with or without arguments."""
    return value if isinstance(value, str) or value is None else value.get("class_path")


def _describe(model: type) -> str:
    stage = next((text for package, text in _STAGES.items() if model.__module__.startswith(package)), None)
    return f"{model.__name__} ({stage})" if stage else model.__name__
