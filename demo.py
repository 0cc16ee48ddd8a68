"""The complete pipeline at a size for two CPU cores: captioned clips in, generated videos out, and a report.

`make demo` runs the commands that a user would run on their own footage, prints each, and ends with a table of results.
Finished steps are not repeated; an interrupted training resumes from its last checkpoint. `runs/demo/index.html` is the
gallery and `runs/demo/report.json` the report; delete `runs/demo` to start from the beginning.
"""

import csv
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import torch
from PIL import Image, ImageDraw

from callbacks.gallery import STATE as GALLERY
from callbacks.gallery import update_gallery
from callbacks.videos import TITLE as GENERATED
from cli import main
from data.examples.oracle import Answer, passes, read_file, recognize, recognize_file, shows
from data.examples.shapes import FRAMES, held_out_prompts
from t2v.compilation import compile_error
from t2v.files import atomic_path
from t2v.training.startup import keep_freed_memory
from t2v.video import probe, read_frames

RUN = Path("runs/demo")
LONG = RUN / "long"
LONG_FRAMES = 64
STATE = RUN / "steps.json"
STAGE1, STAGE2 = "configs/vqvae/shapes.yaml", "configs/transformer/shapes.yaml"
PROMPTS_PER_COMBINATION = 3


class PeakMemory(threading.Thread):
    """Measures the maximum memory of this process and its children; shared pages count once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.gib = 0.0

    def run(self) -> None:
        """Measure once a second."""
        while True:
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:  # the process has ended
                    continue
            self.gib = max(self.gib, total / 2**30)
            time.sleep(1)


class Steps:
    """Runs each step once and keeps its result on disk, so that an interrupted demo continues with the next step."""

    def __init__(self) -> None:
        RUN.mkdir(parents=True, exist_ok=True)
        self.memory = PeakMemory()
        self.memory.start()
        self.state: dict[str, Any] = json.loads(STATE.read_text()) if STATE.exists() else {}

    def run(self, name: str, title: str, function: Callable[[], Any]) -> Any:
        """Run a step, unless it has finished before.

        Args:
            name: Key of the step in the report.
            title: Printed before the step.
            function: The step; its result must be representable in JSON.

        Returns:
            The result of the step. Its time is the sum over all attempts.
        """
        step = self.state.setdefault(name, {"seconds": 0.0})
        print(f"\n==> {title}", flush=True)
        if "result" in step:
            print(f"    finished before, in {step['seconds']:.0f} s", flush=True)
            return step["result"]
        start = time.monotonic()
        try:
            step["result"] = function()
        finally:
            step["seconds"] += time.monotonic() - start
            step["peak_memory_gib"] = max(step.get("peak_memory_gib", 0.0), self.memory.gib)
            with atomic_path(STATE) as partial:
                partial.write_text(json.dumps(self.state, indent=1))
        return step["result"]


def run_module(*args: str) -> None:
    """Run one of the `python -m` commands."""
    print(f"    python {shlex.join(args)}", flush=True)
    if code := subprocess.run([sys.executable, *args], check=False).returncode:
        raise SystemExit(code)


def cli(*args: str) -> dict[str, float]:
    """Run `python cli.py …` in this process, and return the logged metrics."""
    print(f"    python cli.py {shlex.join(args)}", flush=True)
    metrics = main(list(args)).trainer.callback_metrics
    return {name: float(value) for name, value in metrics.items()}


def fit(config: str, *args: str) -> None:
    """Train a stage, resuming from its last checkpoint if there is one; all held-out clips are evaluated at the end."""
    cli("fit", "--config", config, "--ckpt_path", "last", "--trainer.limit_val_batches", "0.25", *args)


def fastest_precision() -> str:
    """Return bf16-mixed on a GPU, or if products are a quarter faster in bfloat16 than in float32; else 32-true.

    With units for bfloat16 they are about twice as fast, and emulated hundreds of times slower.
    """
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"

    matrices = [torch.randn(256, 256, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    fastest = [math.inf, math.inf]  # seconds; larger matrices would take seconds without bfloat16 units
    end = time.perf_counter() + 0.5
    while time.perf_counter() < end:  # in turns, since another program may take the processor for a while
        for i, matrix in enumerate(matrices):
            start = time.perf_counter()
            matrix @ matrix
            fastest[i] = min(fastest[i], time.perf_counter() - start)
    return "bf16-mixed" if 1.25 * fastest[1] < fastest[0] else "32-true"


def pays_to_compile(precision: str) -> bool:
    """Return whether stage 2 is trained sooner if it is compiled.

    On a CPU compilation takes about 90 s, and then saves 20 ms of a step in bfloat16 and 30 ms in float32.
    """
    return (torch.cuda.is_available() or precision == "32-true") and compile_error() is None


def prepare() -> None:
    """Draw captioned mp4 files, and pack them into shards."""
    run_module("-m", "data.examples.shapes", f"{RUN}/clips")
    for part in ("train", "val"):
        run_module("-m", "data.prepare", f"{RUN}/clips/{part}", f"{RUN}/shards/{part}")


def tokenize(precision: str) -> None:
    """Write token shards."""
    shutil.rmtree(RUN / "tokens", ignore_errors=True)  # of an interrupted attempt
    cli("predict", "--config", STAGE1, "--ckpt_path", "last", "--trainer.precision", precision)


def generate(precision: str, folder: Path, frames: int, *args: str) -> list[str]:
    """Generate videos of held-out prompts in `folder`, and return their file names in the order of the prompts."""
    for old in (folder / "videos").glob("*.mp4"):
        old.unlink()
    folder.mkdir(exist_ok=True)
    prompts = [prompt for _, prompt in held_out_prompts(PROMPTS_PER_COMBINATION)]
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    cli(
        *("predict", "--config", STAGE2, "--ckpt_path", f"{RUN}/transformer/checkpoints/last.ckpt"),
        *("--trainer.precision", precision, "--trainer.default_root_dir", str(folder)),
        *("--model.tokenizer", f"{RUN}/vqvae/checkpoints/last.ckpt", "--model.generation.frames", str(frames)),
        *("--data.prompts", f"{folder}/prompts.txt", "--data.batch_size", str(len(prompts))),
        *args,
    )
    return sorted(path.name for path in (folder / "videos").glob("*.mp4"))


def accuracy(answers: list[Answer], truths: list[Answer]) -> dict[str, float]:
    """Return the fraction of correct answers for each attribute."""
    accuracies = {}
    for name in Answer._fields:
        correct = [getattr(answer, name) == getattr(truth, name) for answer, truth in zip(answers, truths, strict=True)]
        accuracies[name] = sum(correct) / len(correct)
    return accuracies


def judge_real() -> dict[str, float]:
    """Return the oracle's accuracy on real held-out clips."""
    with (RUN / "clips/val/captions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    truths = [Answer(row["colour"], row["shape"], row["direction"]) for row in rows]
    return accuracy([recognize_file(RUN / "clips/val" / row["path"]) for row in rows], truths)


def judge_generated(videos: list[str]) -> dict[str, float]:
    """Return the fraction of generated videos in which the oracle recognizes each attribute of the prompt."""
    clips = [clip for clip, _ in held_out_prompts(PROMPTS_PER_COMBINATION)]
    truths = [Answer.of(clip) for clip in clips]
    return accuracy([recognize_file(RUN / "videos" / name) for name in videos], truths)


def judge_long(videos: list[str]) -> float:
    """Return the fraction of long videos whose last 16 frames still show the prompt's colour and shape."""
    kept = 0
    for (clip, _), name in zip(held_out_prompts(PROMPTS_PER_COMBINATION), videos, strict=True):
        last_frames = read_frames(LONG / "videos" / name, range(LONG_FRAMES - FRAMES, LONG_FRAMES))
        answer = recognize(last_frames.permute(0, 2, 3, 1).numpy())
        if (answer.colour, answer.shape) == (clip.colour, clip.shape):
            kept += 1
    return kept / len(videos)


def judge_strictly(videos: list[str], long: list[str]) -> dict[str, float]:
    """Return the fractions of videos that show the prompt's shape in most frames and move in its direction.

    Args:
        videos: File names of the videos in `RUN`.
        long: File names of the long videos, of which only the last frames are judged, and no direction.

    Returns:
        "strict_accuracy" of the videos, "strict_long" of the long ones, and "strict_real" of as many real held-out
        clips.
    """
    with (RUN / "clips/val/captions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[: len(videos)]
    real = [
        passes(read_file(RUN / "clips/val" / row["path"]), Answer(row["colour"], row["shape"], row["direction"]))
        for row in rows
    ]
    clips = [clip for clip, _ in held_out_prompts(PROMPTS_PER_COMBINATION)]
    generated = [
        passes(read_file(RUN / "videos" / name), Answer.of(clip)) for clip, name in zip(clips, videos, strict=True)
    ]
    kept = [
        shows(read_file(LONG / "videos" / name)[LONG_FRAMES - FRAMES :], clip.colour, clip.shape)
        for clip, name in zip(clips, long, strict=True)
    ]
    passed = {"strict_accuracy": generated, "strict_long": kept, "strict_real": real}
    return {name: sum(each) / len(each) for name, each in passed.items()}


def moving_sheet(folder: Path, rows: int = 2, columns: int = 4) -> None:
    """Save `generated.webp`, an animated picture of videos of a gallery, each above its prompt.

    They are evenly spaced and unselected.

    Args:
        folder: Folder of the gallery.
        rows: Rows of videos.
        columns: Videos in a row.
    """
    size, gap, text = 160, 8, 44
    shown = json.loads((folder / GALLERY).read_text())[GENERATED]["videos"]
    width, height = columns * (size + gap) + gap, rows * (size + gap + text) + gap
    empty = Image.new("RGB", (width, height), "white")
    draw, tiles = ImageDraw.Draw(empty), []
    info = probe(folder / shown[0][0])
    count = min(rows * columns, len(shown))
    for tile in range(count):
        path, prompt, _ = shown[tile * len(shown) // count]
        left, top = gap + tile % columns * (size + gap), gap + tile // columns * (size + gap + text)
        draw.multiline_text((left, top + size + 2), "\n".join(textwrap.wrap(prompt, 25)), fill="black")
        tiles.append((left, top, read_frames(folder / path, range(info.frames))))
    pictures = []
    for frame in range(info.frames):
        picture = empty.copy()
        for left, top, video in tiles:
            scaled = Image.fromarray(video[frame].permute(1, 2, 0).numpy())
            picture.paste(scaled.resize((size, size), Image.Resampling.NEAREST), (left, top))
        pictures.append(picture)
    duration = round(1000 / info.fps)
    with atomic_path(folder / "generated.webp") as partial:
        pictures[0].save(
            partial, "WEBP", save_all=True, append_images=pictures[1:], duration=duration, loop=0, quality=80
        )


def demo() -> None:
    """Run all steps, and write and print the report."""
    steps = Steps()
    precision = steps.run("precision", "Measuring the fastest precision of this machine", fastest_precision)
    fast = ("--trainer.precision", precision)
    steps.run("prepare", "Drawing captioned clips and packing them into shards", prepare)
    steps.run("fit_vqvae", "Stage 1: training the VQ-VAE", lambda: fit(STAGE1, *fast))
    stage1 = steps.run(
        "validate_vqvae",
        "Stage 1: evaluating reconstructions of held-out clips",
        lambda: cli("validate", "--config", STAGE1, "--ckpt_path", "last", "--data.frames", "16", *fast),
    )
    steps.run("tokenise", "Stage 1: encoding clips as tokens", lambda: tokenize(precision))
    steps.run(
        "fit_transformer",
        "Stage 2: training the transformer",
        lambda: fit(STAGE2, *fast, "--model.compiled", str(pays_to_compile(precision)).lower()),
    )
    stage2 = steps.run(
        "validate_transformer",
        "Stage 2: evaluating predictions on held-out clips",
        lambda: cli("validate", "--config", STAGE2, "--ckpt_path", "last", *fast),
    )
    videos = steps.run(
        "generate",
        "Stage 2: generating videos of held-out prompts",
        lambda: generate(precision, RUN, FRAMES),
    )
    long = steps.run(
        "generate_long",
        f"Stage 2: generating videos of {LONG_FRAMES} frames with a model trained on {FRAMES} frames",
        lambda: generate(precision, LONG, LONG_FRAMES, "--model.generation.candidates", "1"),
    )
    real = steps.run("judge_real", "Measuring the oracle's accuracy on real clips", judge_real)
    generated = steps.run(
        "judge_generated", "Judging the generated videos with the oracle", lambda: judge_generated(videos)
    )
    kept = steps.run(
        "judge_long", "Judging the last frames of the long videos with the oracle", lambda: judge_long(long)
    )
    strict = steps.run(
        "judge_strictly", "Judging every frame by the most similar shape", lambda: judge_strictly(videos, long)
    )

    moving_sheet(RUN)
    seconds = {name: round(step["seconds"], 1) for name, step in steps.state.items()}
    report = {
        "psnr": stage1["val/psnr"],
        "ssim": stage1["val/ssim"],
        "codebook_usage": stage1["val/codebook_usage"],
        "flicker": stage1["val/flicker"],
        "perplexity": stage2["val/perplexity"],
        **{f"{name}_accuracy": value for name, value in generated.items()},
        "long_videos_keep_colour_and_shape": kept,
        "oracle_accuracy_real": real,
        **strict,
        "prompts": len(videos),
        "precision": precision,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "minutes": round(sum(seconds.values()) / 60, 1),
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "peak_memory_gib": round(max(step["peak_memory_gib"] for step in steps.state.values()), 2),
        "vqvae_checkpoint": f"{RUN}/vqvae/checkpoints/last.ckpt",
        "transformer_checkpoint": f"{RUN}/transformer/checkpoints/last.ckpt",
    }
    with atomic_path(RUN / "report.json") as partial:
        partial.write_text(json.dumps(report, indent=1) + "\n")
    update_gallery(RUN, "Report", figures=figures(report), final=True)
    print_report(report)


def figures(report: dict[str, Any]) -> dict[str, str]:
    """Return the most important values of the report, as the page shows them."""
    return {
        "videos that show their prompt": f"{report['strict_accuracy']:.0%} (real clips {report['strict_real']:.0%})",
        "colour, shape, direction correct": ", ".join(f"{report[f'{name}_accuracy']:.0%}" for name in Answer._fields),
        f"shape kept in the last {FRAMES} of {LONG_FRAMES} frames": f"{report['strict_long']:.0%}",
        "reconstruction of held-out clips": f"PSNR {report['psnr']:.2f} dB, SSIM {report['ssim']:.3f}",
        "time": f"{report['minutes']} minutes, at most {report['peak_memory_gib']} GiB of memory",
        "machine": f"{os.cpu_count()} CPU cores, {report['instruction_set']}, precision {report['precision']}",
    }


def print_report(report: dict[str, Any]) -> None:
    """Print the table of results, and what to try next."""
    real = report["oracle_accuracy_real"]
    print("\nVideos that show the prompt's shape in at least 80 % of their frames and move in its direction")
    print(f"  generated {report['strict_accuracy']:6.1%}   real {report['strict_real']:.1%}")
    print(f"  shape in the last {FRAMES} of {LONG_FRAMES} frames {report['strict_long']:6.1%}")
    print(f"Accuracy of {report['prompts']} videos of held-out prompts by the oracle (its own on real clips)")
    for name in Answer._fields:
        print(f"  {name:<10} {report[f'{name}_accuracy']:6.1%}  ({real[name]:.1%})")
    print(f"  colour and shape at the end of {LONG_FRAMES} frames {report['long_videos_keep_colour_and_shape']:6.1%}")
    print("Reconstruction of held-out clips")
    print(f"  PSNR {report['psnr']:.2f} dB   SSIM {report['ssim']:.3f}   codebook usage {report['codebook_usage']:.0%}")
    print("Seconds")
    for name, value in report["seconds"].items():
        print(f"  {name:<22} {value:7.1f}")
    print(f"Peak memory {report['peak_memory_gib']} GiB")
    print(f"Report {RUN}/report.json; open {RUN}/index.html to watch the videos.")
    print("Next: prompts of your own, on a page in the browser or on the command line")
    predict = ("cli.py", "predict", "--config", STAGE2, "--ckpt_path", "last", "--data.prompts")
    for command in (
        ("-m", "t2v", "export", f"{RUN}/transformer/checkpoints/last.ckpt", f"{RUN}/model"),
        ("-m", "t2v", "app", f"{RUN}/model"),
        (*predict, '["a red circle goes up"]'),
    ):
        print(f"  {shlex.join([sys.executable, *command])}")
    print("and videos of your own: docs/how-to/own-footage.md")


if __name__ == "__main__":
    keep_freed_memory()
    demo()
