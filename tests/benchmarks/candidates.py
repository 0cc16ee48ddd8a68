"""The networks of the comparison, configured with equal numbers of parameters."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jsonargparse import ArgumentParser

from t2v.errors import UserError
from t2v.losses import LPIPSLoss
from t2v.vqvae.model import VQVAE
from tests.benchmarks.baselines import LlamaGenTokenizer, VideoGPTTokenizer


class Candidate(NamedTuple):
    """A network and its training."""

    name: str
    model: dict[str, Any]
    """Config of the network: class_path and init_args."""
    training: dict[str, Any]
    """Arguments of `LitVQVAE` that differ from the recipe."""
    lr: float


def configure(name: str, recipe: dict[str, Any], lr: float | None, same_losses: bool) -> Candidate:
    """Return one of the networks with about as many parameters as that of the recipe.

    Args:
        name: "ours", "llamagen" or "videogpt".
        recipe: The config of stage 1.
        lr: Learning rate; None for that of the recipe.
        same_losses: Train other designs with the losses of the recipe.
    """
    arguments = recipe["model"]["init_args"]
    lr = arguments["optimizer"]["init_args"]["lr"] if lr is None else lr
    if name == "ours":
        return Candidate(f"ours-lr{lr:g}", arguments["model"], {}, lr)
    ours = build(arguments["model"])
    size, codes = ours.image_size, ours.codebook_size
    if name == "llamagen":
        model = configure_llamagen(count_parameters(ours), size, ours.stride, codes)
        losses = [_loss("L2Loss"), _perceptual_loss()]
    else:
        model = configure_videogpt(count_parameters(ours), size, codes)
        losses = [_loss("L2Loss", weight=1 / (4 * 0.06))]  # published for pixels in [-0.5, 0.5]
    training: dict[str, Any] = {"quantize_from_step": 0}
    if not same_losses:
        training |= {"losses": losses, "adversarial": None}
    return Candidate(f"{name}-lr{lr:g}{'-same_losses' if same_losses else ''}", model, training, lr)


def build(config: dict[str, Any]) -> VQVAE:
    """Build the network of a config on the meta device, to read its attributes."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(VQVAE, "model")
    with torch.device("meta"):
        return parser.instantiate_classes(parser.parse_object({"model": config})).model


def count_parameters(model: VQVAE) -> int:
    """Return the number of parameters without the codebook, which only some designs train by gradients."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("quantizer."))


def configure_llamagen(parameters: int, image_size: int, stride: int, codebook_size: int) -> dict[str, Any]:
    """Return the config of a LlamaGen tokenizer with about this many parameters.

    The number of groups of the group normalization is the largest, up to the published 32, with at least the published
    four channels per group.

    Args:
        parameters: Number of parameters without the codebook.
        image_size: Height and width of a frame in pixels.
        stride: Stride of the tokenizer it is compared with: 16 or more selects VQ-16, less VQ-8.
        codebook_size: Number of codes.

    Raises:
        UserError: If no width gives about this many parameters.
    """
    quantizer = {
        "class_path": "tests.benchmarks.baselines.LlamaGenQuantizer",
        "init_args": {"codebook_size": codebook_size},
    }
    fixed = {"image_size": image_size, "channel_multipliers": [1, 1, 2, 2, 4] if stride >= 16 else [1, 2, 2, 4]}
    for groups in (32, 16, 8, 4, 2):
        widths = [4 * groups + step / 4 for step in range(16 * groups + 128)]
        found = _closest(LlamaGenTokenizer, parameters, widths, {**fixed, "groups": groups})
        if found:
            return _config(LlamaGenTokenizer, {**found, "quantizer": quantizer})
    raise UserError(f"No LlamaGen tokenizer has about {parameters:,} parameters: compare it with a larger model.")


def configure_videogpt(parameters: int, image_size: int, codebook_size: int) -> dict[str, Any]:
    """Return the config of a VideoGPT tokenizer with about this many parameters; see `configure_llamagen`."""
    quantizer = {
        "class_path": "tests.benchmarks.baselines.VideoGPTQuantizer",
        "init_args": {"codebook_size": codebook_size},
    }
    found = _closest(VideoGPTTokenizer, parameters, range(4, 1024, 2), {"image_size": image_size})
    if not found:
        raise UserError(f"No VideoGPT tokenizer has about {parameters:,} parameters: compare it with a larger model.")
    return _config(VideoGPTTokenizer, {**found, "quantizer": quantizer})


def _loss(name: str, **arguments: float) -> dict[str, Any]:
    return {"class_path": f"t2v.losses.{name}", "init_args": arguments}


def _perceptual_loss() -> dict[str, Any]:
    """Return LPIPS, or MobileNetLoss if the weights of LPIPS are missing."""
    try:
        LPIPSLoss()
    except UserError as error:
        print(f"MobileNetLoss replaces LPIPS. {error}")
        return _loss("MobileNetLoss", weight=1.0)
    return _loss("LPIPSLoss", weight=1.0)


def _closest(
    model_class: Callable[..., VQVAE],
    parameters: int,
    widths: Sequence[float],
    fixed: dict[str, Any],
    tolerance: float = 0.03,
) -> dict[str, Any] | None:
    """Return the arguments with the width that gives the nearest number of parameters, or None if it is too far."""

    def count(width: float) -> int:
        with torch.device("meta"):
            return count_parameters(model_class(**fixed, width=width))

    above = bisect_left(widths, parameters, key=count)
    width = min(widths[max(above - 1, 0) : above + 1], key=lambda w: abs(count(w) - parameters))
    return {**fixed, "width": width} if abs(count(width) / parameters - 1) <= tolerance else None


def _config(class_: type, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"class_path": f"tests.benchmarks.baselines.{class_.__name__}", "init_args": arguments}
