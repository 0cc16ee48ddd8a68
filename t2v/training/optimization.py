"""Parameter groups and learning-rate schedule of both stages, and the combination of Muon and AdamW."""

import math
from collections.abc import Callable, Container
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import ParamsT

from t2v.errors import UserError, check_range
from t2v.generation.devices import cpu_has_bfloat16
from t2v.losses import AdversarialLoss
from t2v.torch_private import configure_compiler

_RANGES = {
    "[0, inf)": ("lr", "weight_decay"),
    "[0, 1)": ("betas", "momentum", "dampening"),
    "(0, inf)": ("eps",),
}
"""The range of options of optimizers. Those of torch accept NaN, and a momentum above 1, which diverges."""


def warmup_cosine(step: int, warmup_steps: int, total_steps: int, floor: float = 0.02) -> float:
    """Return the factor of the learning rate at a step: linear warm-up, then cosine decay.

    Args:
        step: Optimizer step, from 0.
        warmup_steps: Length of the warm-up; the factor is 1 at its end.
        total_steps: Step at which the decay ends.
        floor: Factor from `total_steps` on.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Return groups of the trained parameters, each parameter once.

    1. Weights of the hidden layers (`Linear` modules in a `ModuleList`), marked by `"hidden": True`.
    2. Other matrices and kernels.
    3. Embeddings, a head tied to one included, with a weight decay of 0, marked by `"embedding": True`.
    4. Norms, biases and other vectors, with a weight decay of 0.

    The parameters of discriminators are in groups 2 to 4 of their own, marked by `"discriminator": True`, with the
    betas of the adversarial term.
    """
    terms = [module for module in network.modules() if isinstance(module, AdversarialLoss)]
    groups = _groups(network, exclude={id(parameter) for term in terms for parameter in term.parameters()})
    for term in terms:
        _, *others = _groups(term)
        groups += [{**group, "betas": term.betas, "discriminator": True} for group in others if group["params"]]
    return groups


def _groups(network: nn.Module, exclude: Container[int] = ()) -> list[dict[str, Any]]:
    """Return the four groups of a network without the parameters whose `id` is in `exclude`."""
    modules = list(network.modules())
    tables = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
    stacks = [module for module in modules if isinstance(module, nn.ModuleList)]
    linear = {id(layer.weight) for stack in stacks for layer in stack.modules() if isinstance(layer, nn.Linear)}
    hidden: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    embeddings: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in network.parameters():
        if not parameter.requires_grad or id(parameter) in exclude:
            continue
        if id(parameter) in linear:
            hidden.append(parameter)
        elif id(parameter) in tables:
            embeddings.append(parameter)
        elif parameter.ndim > 1:
            decayed.append(parameter)
        else:
            vectors.append(parameter)
    return [
        {"params": hidden, "hidden": True},
        {"params": decayed},
        {"params": embeddings, "weight_decay": 0.0, "embedding": True},
        {"params": vectors, "weight_decay": 0.0},
    ]


def split_discriminators(optimizer: torch.optim.Optimizer) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters of the model and those of its discriminators, whose gradients are clipped separately."""
    sides: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for group in optimizer.param_groups:
        sides[group.get("discriminator", False)].extend(group["params"])
    return sides


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is made nearly orthogonal (https://kellerjordan.github.io/posts/muon).

    The update is scaled to the size of AdamW's (https://arxiv.org/abs/2502.16982), so that both use the same learning
    rate and weight decay. It is `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, except that on a CPU without
    bfloat16 units, which would emulate its products in bfloat16, they are in float32.

    Args:
        params: Matrices, or groups of matrices.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        momentum: Nesterov momentum, in [0, 1).
    """

    def __init__(self, params: ParamsT, lr: float, weight_decay: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the matrices that have a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            weights = [weight for weight in group["params"] if weight.grad is not None]
            for batch in _batches(weights):
                directions = []
                for weight in batch:
                    state, gradient = self.state[weight], cast(Tensor, weight.grad)
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(gradient)
                    average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
                    directions.append(gradient.lerp(average, momentum))
                updates = orthogonalize(torch.stack(directions)) if len(batch) > 1 else [orthogonalize(directions[0])]
                for weight, update in zip(batch, updates, strict=True):
                    weight.mul_(1 - lr * group["weight_decay"])
                    weight.add_(update, alpha=-lr * 0.2 * math.sqrt(max(weight.shape)))


_BATCH_ELEMENTS = 2**20
"""Matrices of one shape are orthogonalized together up to this size: each kernel has to be launched, small or not."""


def _batches(weights: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return the matrices in groups of one shape that are small enough to be stacked; sharded ones are alone."""
    by_shape: dict[Any, list[nn.Parameter]] = {}
    for weight in weights:
        key = id(weight) if isinstance(weight, DTensor) else (weight.shape, weight.dtype, weight.device)
        by_shape.setdefault(key, []).append(weight)
    batches = []
    for group in by_shape.values():
        size = max(1, _BATCH_ELEMENTS // group[0].numel())
        batches += [group[start : start + size] for start in range(0, len(group), size)]
    return batches


def orthogonalize(matrix: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch rows columns"]:
    """Return nearly orthogonal matrices with the same singular vectors, by five Newton–Schulz steps.

    The singular values become 0.7 to 1.2 rather than 1, which trains as well (https://kellerjordan.github.io/posts/muon).
    """
    x = matrix.bfloat16() if matrix.is_cuda or (matrix.is_cpu and cpu_has_bfloat16()) else matrix.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    multiply = torch.baddbmm if x.ndim == 3 else torch.addmm
    for _ in range(5):
        gram = x @ x.mT
        x = multiply(x, multiply(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).to(matrix.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the weights of the hidden layers, AdamW for all other parameters.

    Args:
        params: Groups from `parameter_groups`.
        lr: Learning rate.
        betas: Decay rates of AdamW's moments.
        momentum: Momentum of Muon, in [0, 1).
        weight_decay: Weight decay of the groups that set none.
        embedding_lr: Learning rate of embeddings, in units of `lr`. A step changes only the embeddings of the tokens in
            the batch, so they can take larger ones.

    Raises:
        UserError: If an argument is out of range.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        embedding_lr: float = 1.0,
    ) -> None:
        check_range(self, "[0, inf)", lr=lr, weight_decay=weight_decay, embedding_lr=embedding_lr)
        check_range(self, "[0, 1)", betas=betas, momentum=momentum)
        hidden, others = _split(params)
        others = [{**group, "lr": lr * (embedding_lr if group.get("embedding") else 1)} for group in others]
        self.parts: list[torch.optim.Optimizer] = [
            Muon(hidden, lr, weight_decay=weight_decay, momentum=momentum),
            torch.optim.AdamW(others, lr, betas=betas, weight_decay=weight_decay),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share_state()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters by both optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of both optimizers."""
        super().load_state_dict(state_dict)
        self._share_state()

    def _share_state(self) -> None:
        """Let both optimizers use the groups and the state of this one, which schedules and checkpoints access."""
        for part, groups in zip(self.parts, _split(self.param_groups), strict=True):
            part.state = self.state
            part.param_groups = groups


def _split(groups: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the groups of the hidden layers and the others."""
    hidden = [group for group in groups if group.get("hidden", False)]
    return hidden, [group for group in groups if not group.get("hidden", False)]


class Schedule(LambdaLR):
    """Learning-rate schedule of a run, in which a resumed run keeps the optimizer's arguments of its own config.

    Lightning restores learning rate, weight decay and the other arguments from the checkpoint, and would ignore new
    ones; only the state of the optimizer and the step of the schedule should come from there.

    Args:
        optimizer: The optimizer, as it was built from the config.
        factor: Returns the factor of the learning rate at a step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float]) -> None:
        self._configured = [_options(group) for group in optimizer.param_groups]
        self.changes: list[str] = []
        """Arguments that differ from those of the checkpoint, such as "lr 0.001 instead of 0.0003"."""
        super().__init__(optimizer, factor)

    def state_dict(self) -> dict[str, Any]:
        """Return the state without the arguments, which the optimizer's state has."""
        return {name: x for name, x in super().state_dict().items() if name not in ("_configured", "changes")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the step of a checkpoint, with the arguments that the optimizer was built with."""
        rates = self.base_lrs
        super().load_state_dict(state_dict)
        restored = [_options(group) | {"lr": group.get("initial_lr")} for group in self.optimizer.param_groups]
        self.changes = _changes(restored, self._configured)
        self.base_lrs = rates
        for group, options, rate, factor in zip(
            self.optimizer.param_groups, self._configured, rates, self.lr_lambdas, strict=True
        ):
            group.update(options)
            group["initial_lr"] = rate
            group["lr"] = rate * factor(self.last_epoch)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "initial_lr")}


def _changes(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    """Return the different options of groups as texts, each once."""
    found = (
        f"{name} {value:g} instead of {before[name]:g}" if isinstance(value, float) else f"{name} {value}"
        for before, after in zip(old, new, strict=False)
        for name, value in after.items()
        if name in before and _plain(before[name]) != _plain(value)
    )
    return list(dict.fromkeys(found))


def _plain(value: Any) -> Any:
    """Return a value as it compares equal after a checkpoint, which may turn tuples into lists."""
    return tuple(value) if isinstance(value, list) else value


def configure_optimization(
    module: LightningModule, network: nn.Module, optimizer: OptimizerCallable, warmup_steps: int
) -> OptimizerLRScheduler:
    """Build the optimizer of a run and its learning-rate schedule, for `configure_optimizers`.

    Args:
        module: The LightningModule, attached to its trainer.
        network: The modules to train.
        optimizer: Builds the optimizer from parameter groups.
        warmup_steps: Steps of linear warm-up.

    Raises:
        UserError: If an argument of the optimizer is out of range.
    """
    built = build_optimizer(optimizer, parameter_groups(network))
    if type(built).__module__.startswith("bitsandbytes"):
        # bitsandbytes does so in its first step, so a resumed run, whose weights are channels-last again, would differ.
        network.to(memory_format=torch.contiguous_format)
    if type(built).__module__.startswith("torchao"):  # which compiles its step
        configure_compiler()
    total_steps = int(module.trainer.estimated_stepping_batches)
    schedule = Schedule(built, partial(warmup_cosine, warmup_steps=warmup_steps, total_steps=total_steps))
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def build_optimizer(optimizer: OptimizerCallable, groups: list[dict[str, Any]]) -> Optimizer:
    """Build an optimizer and check the arguments that the optimizers of torch take without a check.

    Raises:
        UserError: If an argument is out of range.
    """
    try:
        built = optimizer(groups)
    except (TypeError, ValueError) as error:
        raise UserError(f"model.optimizer cannot be built with these arguments ({error}): change them.") from error
    for group in built.param_groups:
        for interval, names in _RANGES.items():
            check_range(built, interval, **{name: group.get(name) for name in names})
    return built
