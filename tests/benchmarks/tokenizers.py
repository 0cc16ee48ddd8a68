"""Tokenizers side by side on real footage: `python -m tests.benchmarks.tokenizers runs/tokenizers`.

Ours, the designs of LlamaGen and VideoGPT at the same number of parameters (within 3 %), and H.264 at as many bits a
pixel as our tokens take. The networks see the same clips for the same time: a few steps of each are measured first, and
from that follows how many it gets, so that its schedule runs to the end. All are measured by `validate`, on clips of a
video that none was trained on.

What is done stays done: results are kept a model, so that the command can be stopped, and given again with `--only`.
"""

import json
import math
import shutil
import time
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from cli import main
from data import VideoDataModule
from data.examples.footage import copy_footage
from data.prepare import prepare
from t2v.errors import UserError, run_tool
from t2v.losses import LPIPSLoss, MobileNetLoss
from t2v.metrics import PerceptualDistance
from t2v.training.vqvae import LitVQVAE
from t2v.vqvae.model import VQVAE, to_model_range
from tests.benchmarks.baselines import count_parameters, like_llamagen, like_videogpt
from tests.benchmarks.h264 import H264, find_crf
from tests.benchmarks.report import middle_frames, save_frames, write, write_report

RECIPE = Path(__file__).parents[2] / "configs/vqvae/footage.yaml"
MODELS = ("ours", "llamagen", "videogpt", "h264")
PERCEPTUAL = {
    "class_path": "t2v.metrics.PerceptualDistance",
    "init_args": {"term": {"class_path": "t2v.losses.MobileNetLoss"}},
}
WARMUP, MEASURED = 4, 8
"""Steps that are run, and then timed, to know how long one takes."""


class StepTimes(Callback):
    """Wall-clock seconds of the training steps, waiting for data included; a resumed run counts on."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps: list[float] = []
        self._before = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        now = time.perf_counter()
        self.steps.append(now - self._before)
        self.seconds += now - self._before
        self._before = now

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]


class Contender(NamedTuple):
    """A network and how it is trained."""

    name: str
    model: dict[str, Any]
    """Its config: class_path and init_args."""
    training: dict[str, Any]
    """What differs from the recipe in the arguments of `LitVQVAE`."""
    lr: float


class Protocol(NamedTuple):
    """What is the same for all."""

    out: Path
    recipe: Path
    minutes: float
    seed: int
    precision: str
    clip_frames: int


def compare(
    out: Path,
    minutes: float = 10,
    seed: int = 0,
    only: Literal["ours", "llamagen", "videogpt", "h264"] | None = None,
    same_losses: bool = False,
    lr_ours: float | None = None,
    lr_llamagen: float = 1e-4,
    lr_videogpt: float = 3e-4,
    recipe: Path = RECIPE,
    precision: str = "bf16-mixed",
    clip_frames: int = 16,
) -> None:
    """Train and measure tokenizers side by side; print a table, write `report.json` and `frames.png`.

    Args:
        out: folder for footage, checkpoints and results; each result in it becomes a row.
        minutes: training time of each network.
        seed: of weights and of the order of the clips.
        only: one model instead of all.
        same_losses: train the others with our terms of the loss, not with those they were published with.
        lr_ours: learning rate of ours; the recipe's by default.
        lr_llamagen: learning rate of LlamaGen's design; the published one by default.
        lr_videogpt: learning rate of VideoGPT's design; the published one by default.
        recipe: config of stage 1 on footage.
        precision: of training and measuring, as `trainer.precision` takes it.
        clip_frames: frames of a held-out clip, a multiple of 4.
    """
    settings = yaml.safe_load(recipe.read_text())
    frames = {"clip_frames": clip_frames, "data.frames of the recipe": settings["data"]["init_args"]["frames"]}
    if wrong := [f"{name}={value}" for name, value in frames.items() if value % 4]:
        raise UserError(f"{', '.join(wrong)} must be a multiple of 4, the frames that a token of VideoGPT stands for.")
    protocol = Protocol(out.absolute(), recipe.absolute(), minutes, seed, precision, clip_frames)
    _keep_protocol(protocol)
    _prepare_footage(protocol, settings["data"]["init_args"])
    rates = {"ours": lr_ours, "llamagen": lr_llamagen, "videogpt": lr_videogpt}
    for name in MODELS if only is None else (only,):
        if name == "h264":
            _measure_h264(protocol, settings)
        else:
            _run(contender(name, settings, rates[name], same_losses), protocol)
        write_report(protocol.out, MODELS)


def contender(name: str, recipe: dict[str, Any], lr: float | None, same_losses: bool) -> Contender:
    """One of the networks, at about as many parameters as the recipe's.

    Args:
        name: "ours", "llamagen" or "videogpt".
        recipe: the config of stage 1.
        lr: learning rate; the recipe's by default.
        same_losses: whether another's network is trained with the recipe's losses.
    """
    arguments = recipe["model"]["init_args"]
    lr = arguments["optimizer"]["init_args"]["lr"] if lr is None else lr
    if name == "ours":
        return Contender(f"ours-lr{lr:g}", arguments["model"], {}, lr)
    ours = build(arguments["model"])
    size, codes = ours.image_size, ours.codebook_size
    if name == "llamagen":
        model = like_llamagen(count_parameters(ours), size, ours.stride, codes)
        losses = [_loss("L2Loss"), _perceptual_loss()]
    else:
        model = like_videogpt(count_parameters(ours), size, codes)
        losses = [_loss("L2Loss", weight=1 / (4 * 0.06))]  # published for pixels in [-0.5, 0.5]
    training: dict[str, Any] = {"quantize_from_step": 0}
    if not same_losses:
        training |= {"losses": losses, "adversarial": None}
    return Contender(f"{name}-lr{lr:g}{'-same_losses' if same_losses else ''}", model, training, lr)


def build(config: dict[str, Any]) -> VQVAE:
    """The network of a config on the meta device, for its figures."""
    parser = ArgumentParser()
    parser.add_subclass_arguments(VQVAE, "model")
    with torch.device("meta"):
        return parser.instantiate_classes(parser.parse_object({"model": config})).model


def _run(contender: Contender, protocol: Protocol) -> None:
    """Train and measure a network, as far as that has not been done."""
    folder = protocol.out / contender.name
    folder.mkdir(parents=True, exist_ok=True)
    plan = _plan(contender, protocol)
    if (folder / "result.json").exists():
        print(f"{contender.name} is measured already: nothing to do.")
        return
    overlay = _write_overlay(folder / "overlay.yaml", contender, protocol, plan["max_steps"])
    flags = ["-c", str(protocol.recipe), "-c", str(overlay), "--ckpt_path", "last"]
    trained = main(["fit", *flags])
    seconds, planned = _step_times(trained.trainer).seconds, 60 * protocol.minutes
    if abs(seconds / planned - 1) > 0.1:
        print(f"{contender.name} trained for {seconds:.0f} s, not {planned:.0f} s: did anything run beside it?")
    settings = ["--trainer.limit_val_batches", "1.0", "--data.frames", str(protocol.clip_frames)]
    cli = main(["validate", *flags, *settings])
    model = cli.model.model.eval()
    clips = torch.cat([batch.video for batch in cli.datamodule.val_dataloader()])
    with torch.no_grad():
        tokens = model.encode(to_model_range(clips[:1])).numel() / protocol.clip_frames
        save_frames(folder, middle_frames(cli.model.reconstruct(clips)))
    save_frames(protocol.out, middle_frames(clips))
    pixels = clips.shape[-2] * clips.shape[-1]
    losses = cli.config["validate"]["model"]["init_args"]["losses"]
    result = {
        "name": contender.name,
        "parameters": count_parameters(model),
        "steps": plan["max_steps"],
        "seconds": round(seconds, 1),
        "tokens_per_frame": tokens,
        "codes": model.codebook_size,
        "bits_per_pixel": tokens * math.log2(model.codebook_size) / pixels,
        **_metrics(cli.trainer.callback_metrics),
        "lr": contender.lr,
        "model": contender.model,
        "losses": [(loss["class_path"].rpartition(".")[2], loss["init_args"]["weight"]) for loss in losses],
        "held_out_clips": len(clips),
        **_settings(protocol),
    }
    write(folder / "result.json", json.dumps(result, indent=1))


def _measure_h264(protocol: Protocol, recipe: dict[str, Any]) -> None:
    """Measure H.264 at about as many bits a pixel as our tokens take."""
    folder = protocol.out / "h264"
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "result.json").exists():
        print("h264 is measured already: nothing to do.")
        return
    ours = build(recipe["model"]["init_args"]["model"])
    target = ours.grid_size**2 * math.log2(ours.codebook_size) / ours.image_size**2
    data = recipe["data"]["init_args"]
    shards = protocol.out / "shards"
    module = VideoDataModule(
        train=str(shards / "train"),
        val=str(shards / "val"),
        size=data["size"],
        frames=protocol.clip_frames,
        fps=data["fps"],
        batch_size=data["batch_size"],
    )
    clips = torch.cat([batch.video for batch in module.val_dataloader()])
    codec = H264(find_crf(clips, target, data["fps"]), fps=data["fps"])
    lit = LitVQVAE(codec, losses=[], metrics=[PerceptualDistance(MobileNetLoss())])
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.validate(lit, datamodule=module, verbose=False)
    save_frames(folder, middle_frames(lit.reconstruct(clips)))
    save_frames(protocol.out, middle_frames(clips))
    result = {
        "name": "h264",
        "bits_per_pixel": codec.bits / codec.pixels,
        **_metrics(trainer.callback_metrics),
        "wanted_bits_per_pixel": target,
        "crf": codec.crf,
        "preset": codec.preset,
        "held_out_clips": len(clips),
        **_settings(protocol),
    }
    write(folder / "result.json", json.dumps(result, indent=1))


def _keep_protocol(protocol: Protocol) -> None:
    """A folder holds results of one protocol only: its rows are there to be compared."""
    path, now = protocol.out / "protocol.json", _settings(protocol)
    if path.exists():
        before = json.loads(path.read_text())
        if told := [f"{name} ({before.get(name)}, now {now[name]})" for name in now if before.get(name) != now[name]]:
            raise UserError(
                f"{protocol.out} holds results with another {' and another '.join(told)}: choose another folder."
            )
    protocol.out.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(now, indent=1))


def _prepare_footage(protocol: Protocol, data: dict[str, Any]) -> None:
    clips, shards = protocol.out / "clips", protocol.out / "shards"
    copy_footage(clips)
    shards.mkdir(exist_ok=True)
    cut_from = 2 * math.ceil(data["size"] / data.get("crop", 1.0) / 2)  # so that no random square is enlarged
    for part, size in {"train": cut_from, "val": data["size"]}.items():
        prepare(clips / part, shards / part, size=size, fps=data["fps"], frames=protocol.clip_frames)


def _plan(contender: Contender, protocol: Protocol) -> dict[str, Any]:
    """How many steps a network gets, measured once; kept beside what that was measured for."""
    path = protocol.out / contender.name / "plan.json"
    if path.exists():
        plan = json.loads(path.read_text())
        if plan["model"] != contender.model:
            raise UserError(
                f"{path.parent} holds a run of another network, as the recipe or this program has changed since: "
                "choose another folder, or delete that one."
            )
        return plan
    folder = path.with_name("measuring")
    folder.mkdir(exist_ok=True)
    overlay = _write_overlay(folder / "overlay.yaml", contender, protocol, WARMUP + MEASURED, keep=False)
    cli = main(["fit", "-c", str(protocol.recipe), "-c", str(overlay)])
    seconds = median(_step_times(cli.trainer).steps[WARMUP:])
    shutil.rmtree(folder)
    plan = {
        "model": contender.model,
        "step_seconds": seconds,
        "max_steps": max(round(60 * protocol.minutes / seconds), 1),
    }
    write(path, json.dumps(plan, indent=1))
    return plan


def _write_overlay(path: Path, contender: Contender, protocol: Protocol, max_steps: int, keep: bool = True) -> Path:
    """What a run changes in the recipe, as a second config; a run that is not kept writes no checkpoints."""
    recipe = yaml.safe_load(protocol.recipe.read_text())
    averages = [each for each in recipe["trainer"]["callbacks"] if each["class_path"] == "callbacks.EMA"]
    figures = {"class_path": "callbacks.MetricsReport", "init_args": {"path": str(path.with_name("validation.json"))}}
    callbacks = [*averages, {"class_path": "tests.benchmarks.tokenizers.StepTimes"}, figures]
    checkpoints = {
        "class_path": "ModelCheckpoint",
        "init_args": {
            "dirpath": str(path.parent / "checkpoints"),
            "save_last": True,
            "every_n_train_steps": max(max_steps // 10, 1),
        },
    }
    arguments = recipe["model"]["init_args"]
    training = {
        # The recipe's are meant for its own number of steps.
        "quantize_from_step": min(arguments.get("quantize_from_step", 0), max_steps // 4),
        "warmup_steps": min(arguments.get("warmup_steps", 0), max_steps // 4),
        **contender.training,
    }
    overlay = {
        "seed_everything": protocol.seed,
        "trainer": {
            "default_root_dir": str(path.parent),
            "max_steps": max_steps,
            "precision": protocol.precision,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_checkpointing": keep,
            "callbacks": [*callbacks, checkpoints] if keep else callbacks,
        },
        "model": {
            "init_args": {
                "model": contender.model,
                "metrics": [PERCEPTUAL],
                "optimizer": {"init_args": {"lr": contender.lr}},
                **training,
            }
        },
        "data": {
            "init_args": {
                "train": str(protocol.out / "shards/train"),
                "val": str(protocol.out / "shards/val"),
                "seed": protocol.seed,
            }
        },
    }
    write(path, yaml.safe_dump(overlay))
    return path


def _loss(name: str, **arguments: float) -> dict[str, Any]:
    return {"class_path": f"t2v.losses.{name}", "init_args": arguments}


def _perceptual_loss() -> dict[str, Any]:
    """LPIPS, or where its weights are missing what stands in for it."""
    try:
        LPIPSLoss()
    except UserError as error:
        print(f"MobileNetLoss stands in for LPIPS. {error}")
        return _loss("MobileNetLoss", weight=1.0)
    return _loss("LPIPSLoss", weight=1.0)


def _step_times(trainer: Trainer) -> StepTimes:
    return next(callback for callback in trainer.callbacks if isinstance(callback, StepTimes))  # type: ignore[attr-defined]


def _metrics(logged: dict[str, Tensor]) -> dict[str, float]:
    names = ("psnr", "ssim", "mobilenet", "flicker", "codebook_usage", "codebook_perplexity")
    return {name: float(logged[f"val/{name}"]) for name in names if f"val/{name}" in logged}


def _settings(protocol: Protocol) -> dict[str, Any]:
    told = protocol._asdict()
    return {name: told[name] for name in told if name not in ("out", "recipe")}


if __name__ == "__main__":
    # Configs name this module's classes: they must not be those of a second copy called __main__.
    from tests.benchmarks import tokenizers

    run_tool(tokenizers.compare)
