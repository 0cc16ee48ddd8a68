"""Loss terms of stage 1 on real footage: `python -m tests.benchmarks.loss_terms runs/terms`.

The recipe `configs/vqvae/footage.yaml` is trained with other terms, each time with the same clips, steps and seed, and
measured by `validate` on the clips of a film that none was trained on. Results are stored in one folder for each set of
terms and seed, so that the command can be interrupted and repeated; the table has all that the folder holds.
"""

import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from cli import main
from t2v.errors import UserError, run_tool
from tests.benchmarks.report import print_table, write
from tests.benchmarks.tokenizers import RECIPE, prepare_clips


def _object(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"t2v.{name}", "init_args": arguments}


_PIXELS = [_object("losses.L1Loss"), _object("losses.L2Loss")]
_TEMPORAL = _object("losses.TemporalDifferenceLoss", weight=6.0)
_LPIPS = _object("losses.LPIPSLoss", weight=0.1, frames=4, backbone="alex")
_MOBILENET = _object("losses.MobileNetLoss", weight=0.1, frames=4)
TERMS = {
    "pixels": _PIXELS,
    "temporal": [*_PIXELS, _TEMPORAL],
    "lpips": [*_PIXELS, _LPIPS],
    "lpips_temporal": [*_PIXELS, _TEMPORAL, _LPIPS],
    "mobilenet_temporal": [*_PIXELS, _TEMPORAL, _MOBILENET],
    "lpips_mobilenet_temporal": [*_PIXELS, _TEMPORAL, _LPIPS, _MOBILENET],
    "flow": [*_PIXELS, _object("losses.FlowConsistencyLoss", weight=6.0)],
    "adversarial": [*_PIXELS, _object("losses.AdversarialLoss", weight=0.1, start_step=250)],
}
"""The sets of terms by name; "lpips_temporal" is the recipe's."""
_METRICS = [
    _object("metrics.WarpError"),
    _object("metrics.PerceptualDistance", term=_object("losses.LPIPSLoss", backbone="alex")),
    _object("metrics.PerceptualDistance", term=_object("losses.MobileNetLoss")),
    _object("metrics.FrechetVideoDistance", features=_object("metrics.I3D")),
    _object("metrics.KernelVideoDistance", features=_object("metrics.I3D")),
]
COLUMNS = {
    "terms": "{}",
    "seeds": "{}",
    "steps": "{:.0f}",
    "seconds": "{:.0f}",
    "psnr": "{:.2f} dB",
    "ssim": "{:.3f}",
    "lpips": "{:.3f}",
    "mobilenet": "{:.3f}",
    "fvd": "{:.0f}",
    "kvd": "{:.0f}",
    "flicker": "{:.4f}",
    "warp_error": "{:.5f}",
    "codebook_usage": "{:.1%}",
}
"""Columns of the table and their format."""


def compare(out: Path, steps: int = 500, seeds: int = 1, only: str | None = None, precision: str = "32-true") -> None:
    """Train with each set of terms, measure on held-out clips and print a table.

    Args:
        out: Folder for clips, checkpoints and results.
        steps: Training steps.
        seeds: Trainings of each set, with the seeds 0, 1, ...
        only: Name of one set of terms.
        precision: Precision of training and measurement, a value of `trainer.precision`.

    Raises:
        UserError: If there is no such set.
    """
    if only is not None and only not in TERMS:
        raise UserError(f"only={only} is no set of terms: give one of {', '.join(TERMS)}.")
    out = out.absolute()
    data = yaml.safe_load(RECIPE.read_text())["data"]["init_args"]
    prepare_clips(out, data, clip_frames=16)
    for name in TERMS if only is None else (only,):
        for seed in range(seeds):
            _run(out, name, steps, seed, precision)
    _print_table(out)


def _run(out: Path, name: str, steps: int, seed: int, precision: str) -> None:
    """Train and measure with one set of terms, unless that is complete."""
    folder = out / f"{name}-steps{steps}-seed{seed}"
    if (folder / "result.json").exists():
        return
    folder.mkdir(exist_ok=True)
    overlay = {
        "seed_everything": seed,
        "trainer": {
            "default_root_dir": str(folder),
            "max_steps": steps,
            "precision": precision,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
        },
        "model": {"init_args": {"losses": TERMS[name], "metrics": _METRICS}},
        "data": {"init_args": {f"{split}": str(out / "shards" / split) for split in ("train", "val")} | {"seed": seed}},
    }
    write(folder / "overlay.yaml", yaml.safe_dump(overlay))
    flags = ["-c", str(RECIPE), "-c", str(folder / "overlay.yaml"), "--ckpt_path", "last"]
    start = time.perf_counter()
    main(["fit", *flags])
    seconds = time.perf_counter() - start
    cli = main(["validate", *flags, "--trainer.limit_val_batches", "1.0", "--data.frames", "16"])
    metrics = {key.removeprefix("val/"): float(value) for key, value in cli.trainer.callback_metrics.items()}
    result = {"name": name, "steps": steps, "seed": seed, "seconds": seconds, **metrics}
    write(folder / "result.json", json.dumps(result, indent=1))


def _print_table(out: Path) -> None:
    """Print the mean over seeds for each set of terms and number of steps."""
    results = [json.loads(path.read_text()) for path in sorted(out.glob("*/result.json"))]
    rows = []
    for name, steps in sorted({(each["name"], each["steps"]) for each in results}, key=_order):
        runs = [each for each in results if (each["name"], each["steps"]) == (name, steps)]
        means = {column: mean(run[column] for run in runs) for column in COLUMNS if all(column in run for run in runs)}
        rows.append({"terms": name, "seeds": len(runs), **means})
    print_table(COLUMNS, rows)


def _order(row: tuple[str, int]) -> tuple[int, int]:
    return list(TERMS).index(row[0]), row[1]


if __name__ == "__main__":
    run_tool(compare)
