"""Comparison of tokenizers on real videos: `python -m tests.benchmarks.tokenizers runs/tokenizers`.

It compares our VQ-VAE, the designs of LlamaGen and VideoGPT with the same number of parameters (within 3 %), and H.264
with as many bits per pixel as our tokens take. The networks train on the same clips for the same time: the duration of
a step is measured first and gives the number of steps, so that the learning-rate schedule is complete. All are measured
by `validate`, on clips of a video that none was trained on.

Results are stored per model, so that the command can be interrupted and repeated, also with `--only`.
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
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from cli import main
from data import VideoDataModule
from data.examples.footage import copy_footage
from data.prepare import prepare
from t2v.errors import UserError, run_tool
from t2v.losses import L1Loss, LPIPSLoss, MobileNetLoss
from t2v.metrics import PerceptualDistance, VideoMetric
from t2v.training.vqvae import LitVQVAE
from t2v.vqvae.model import to_model_range
from tests.benchmarks.candidates import Candidate, build, configure, count_parameters
from tests.benchmarks.h264 import H264, find_crf
from tests.benchmarks.report import middle_frames, save_frames, write, write_report

RECIPE = Path(__file__).parents[2] / "configs/vqvae/footage.yaml"
MODELS = ("ours", "llamagen", "videogpt", "h264")
TERMS = [
    {"class_path": "t2v.losses.LPIPSLoss", "init_args": {"backbone": "alex"}},
    {"class_path": "t2v.losses.MobileNetLoss"},
]
"""The terms whose distances are measured."""
WARMUP_STEPS, MEASURED_STEPS = 4, 8
"""Steps that run before and during the measurement of a step's duration."""


class StepTimes(Callback):
    """Measures the wall-clock seconds of training steps, with the wait for data; a resumed run adds to them.

    Attributes:
        seconds: Sum over all steps.
        steps: Duration of each step since the process started.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps: list[float] = []
        self._last = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        now = time.perf_counter()
        self.steps.append(now - self._last)
        self.seconds += now - self._last
        self._last = now

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]


class Protocol(NamedTuple):
    """Settings that all results of a folder share."""

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
    """Train and measure tokenizers under equal conditions; print a table, write `report.json` and `frames.png`.

    Args:
        out: Folder for clips, checkpoints and results; each result in it becomes a row.
        minutes: Training time of each network.
        seed: Seed of the weights and of the order of the clips.
        only: Run one model instead of all.
        same_losses: Train the other designs with our loss terms instead of their published ones.
        lr_ours: Learning rate of our VQ-VAE; by default that of the recipe.
        lr_llamagen: Learning rate of LlamaGen's design; the published one by default.
        lr_videogpt: Learning rate of VideoGPT's design; the published one by default.
        recipe: Config of stage 1.
        precision: Precision of training and measurement, a value of `trainer.precision`.
        clip_frames: Frames of a held-out clip, a multiple of 4.

    Raises:
        UserError: If a number of frames is not a multiple of 4, or `out` holds results with other settings.
    """
    settings = yaml.safe_load(recipe.read_text())
    frames = {"clip_frames": clip_frames, "data.frames of the recipe": settings["data"]["init_args"]["frames"]}
    if wrong := [f"{name}={value}" for name, value in frames.items() if value % 4]:
        raise UserError(
            f"{', '.join(wrong)} must be a multiple of 4, the number of frames that a token of VideoGPT covers."
        )
    protocol = Protocol(out.absolute(), recipe.absolute(), minutes, seed, precision, clip_frames)
    _keep_protocol(protocol)
    prepare_clips(protocol.out, settings["data"]["init_args"], protocol.clip_frames)
    rates = {"ours": lr_ours, "llamagen": lr_llamagen, "videogpt": lr_videogpt}
    for name in MODELS if only is None else (only,):
        if name == "h264":
            _measure_h264(protocol, settings)
        else:
            _run(configure(name, settings, rates[name], same_losses), protocol)
        write_report(protocol.out, MODELS)


def _run(candidate: Candidate, protocol: Protocol) -> None:
    """Train and measure a network, unless that is complete."""
    folder = protocol.out / candidate.name
    folder.mkdir(parents=True, exist_ok=True)
    plan = _plan(candidate, protocol)
    if (folder / "result.json").exists():
        print(f"{candidate.name} is measured already: nothing to do.")
        return
    overlay = _write_overlay(folder / "overlay.yaml", candidate, protocol, plan["max_steps"])
    flags = ["-c", str(protocol.recipe), "-c", str(overlay), "--ckpt_path", "last"]
    trained = main(["fit", *flags])
    seconds, planned = _step_times(trained.trainer).seconds, 60 * protocol.minutes
    if abs(seconds / planned - 1) > 0.1:
        print(
            f"{candidate.name} trained for {seconds:.0f} s instead of {planned:.0f} s: did another program run at the "
            "same time?"
        )
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
        "name": candidate.name,
        "parameters": count_parameters(model),
        "steps": plan["max_steps"],
        "seconds": round(seconds, 1),
        "tokens_per_frame": tokens,
        "codes": model.codebook_size,
        "bits_per_pixel": tokens * math.log2(model.codebook_size) / pixels,
        **_metrics(cli.trainer.callback_metrics),
        "lr": candidate.lr,
        "model": candidate.model,
        "losses": [(loss["class_path"].rpartition(".")[2], loss["init_args"]["weight"]) for loss in losses],
        "held_out_clips": len(clips),
        **_settings(protocol),
    }
    write(folder / "result.json", json.dumps(result, indent=1))


def _measure_h264(protocol: Protocol, recipe: dict[str, Any]) -> None:
    """Measure H.264 with about as many bits per pixel as our tokens take."""
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
    distances: list[VideoMetric] = [PerceptualDistance(LPIPSLoss(backbone="alex")), PerceptualDistance(MobileNetLoss())]
    lit = LitVQVAE(codec, losses=[L1Loss()], metrics=distances)
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.validate(lit, datamodule=module, verbose=False)
    save_frames(folder, middle_frames(lit.reconstruct(clips)))
    save_frames(protocol.out, middle_frames(clips))
    result = {
        "name": "h264",
        "bits_per_pixel": codec.bits / codec.pixels,
        **_metrics(trainer.callback_metrics),
        "target_bits_per_pixel": target,
        "crf": codec.crf,
        "preset": codec.preset,
        "held_out_clips": len(clips),
        **_settings(protocol),
    }
    write(folder / "result.json", json.dumps(result, indent=1))


def _keep_protocol(protocol: Protocol) -> None:
    """Store the settings in the folder, or check that its results have the same ones.

    Raises:
        UserError: If they have other settings, so that the rows could not be compared.
    """
    path, settings = protocol.out / "protocol.json", _settings(protocol)
    if path.exists():
        stored = json.loads(path.read_text())
        differences = [
            f"{name} ({stored.get(name)}, now {value})" for name, value in settings.items() if stored.get(name) != value
        ]
        if differences:
            raise UserError(
                f"{protocol.out} holds results with another {' and another '.join(differences)}: choose another folder."
            )
    protocol.out.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(settings, indent=1))


def prepare_clips(out: Path, data: dict[str, Any], clip_frames: int) -> None:
    """Write the footage to `out/clips`, and its shards to `out/shards/train` and `out/shards/val`.

    Args:
        out: The folder.
        data: Arguments of the recipe's DataModule.
        clip_frames: Frames of a clip.
    """
    clips, shards = out / "clips", out / "shards"
    copy_footage(clips)
    shards.mkdir(exist_ok=True)
    train_size = 2 * math.ceil(data["size"] / data.get("crop", 1.0) / 2)  # even, and large enough for random crops
    for split, size in {"train": train_size, "val": data["size"]}.items():
        prepare(clips / split, shards / split, size=size, fps=float(data["fps"]), frames=clip_frames)


def _plan(candidate: Candidate, protocol: Protocol) -> dict[str, Any]:
    """Return the number of training steps of a network from the duration of a step, which is measured once."""
    path = protocol.out / candidate.name / "plan.json"
    if path.exists():
        plan = json.loads(path.read_text())
        if plan["model"] != candidate.model:
            raise UserError(
                f"{path.parent} holds a run of another network, because the recipe or this program has changed: "
                "choose another folder, or delete that one."
            )
        return plan
    folder = path.with_name("measuring")
    folder.mkdir(exist_ok=True)
    overlay = _write_overlay(folder / "overlay.yaml", candidate, protocol, WARMUP_STEPS + MEASURED_STEPS, keep=False)
    cli = main(["fit", "-c", str(protocol.recipe), "-c", str(overlay)])
    seconds = median(_step_times(cli.trainer).steps[WARMUP_STEPS:])
    shutil.rmtree(folder)
    plan = {
        "model": candidate.model,
        "step_seconds": seconds,
        "max_steps": max(round(60 * protocol.minutes / seconds), 1),
    }
    write(path, json.dumps(plan, indent=1))
    return plan


def _write_overlay(path: Path, candidate: Candidate, protocol: Protocol, max_steps: int, keep: bool = True) -> Path:
    """Write the settings that a run changes in the recipe, as a second config; `keep` enables checkpoints."""
    recipe = yaml.safe_load(protocol.recipe.read_text())
    averages = [config for config in recipe["trainer"]["callbacks"] if config["class_path"] == "callbacks.EMA"]
    metrics = {"class_path": "callbacks.MetricsReport", "init_args": {"path": str(path.with_name("validation.json"))}}
    callbacks = [*averages, {"class_path": "tests.benchmarks.tokenizers.StepTimes"}, metrics]
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
        # The recipe's values are for its own number of steps.
        "quantize_from_step": min(arguments.get("quantize_from_step", 0), max_steps // 4),
        "warmup_steps": min(arguments.get("warmup_steps", 0), max_steps // 4),
        **candidate.training,
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
                "model": candidate.model,
                "metrics": [
                    {"class_path": "t2v.metrics.PerceptualDistance", "init_args": {"term": term}} for term in TERMS
                ],
                "optimizer": {"init_args": {"lr": candidate.lr}},
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


def _step_times(trainer: Trainer) -> StepTimes:
    return next(callback for callback in trainer.callbacks if isinstance(callback, StepTimes))  # type: ignore[attr-defined]


def _metrics(logged: dict[str, Tensor]) -> dict[str, float]:
    names = ("psnr", "ssim", "lpips", "mobilenet", "flicker", "codebook_usage", "codebook_perplexity")
    return {name: float(logged[f"val/{name}"]) for name in names if f"val/{name}" in logged}


def _settings(protocol: Protocol) -> dict[str, Any]:
    return {name: value for name, value in protocol._asdict().items() if name not in ("out", "recipe")}


if __name__ == "__main__":
    # Configs name this module's classes, which must not be those of a second copy named __main__.
    from tests.benchmarks import tokenizers

    run_tool(tokenizers.compare)
