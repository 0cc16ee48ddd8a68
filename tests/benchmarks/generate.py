"""Parallel decoding beside sequential decoding: `python -m tests.benchmarks.generate CHECKPOINT TOKENIZER PROMPTS`.

With a checkpoint of stage 2, float32, all cores, the sampler and the guidance of the checkpoint:

- passes of the transformer per frame, one video at a time, for several numbers of positions in a pass and for other
  drafts than those that are used, and how many videos equal sequential decoding's;
- time of the same videos one at a time, the mean of all, and in one batch, sequential and parallel in every round,
  medians;
- how many videos of all prompts in one batch equal sequential decoding's, and where the others begin to differ;
- time and memory per frame far into a long video.
"""

import platform
import statistics
import time
from pathlib import Path
from unittest.mock import patch

import psutil
import torch
from torch import Tensor

from t2v.compilation import compile_error
from t2v.errors import run_tool
from t2v.generation import decode
from t2v.generation.decode import generate_frames
from t2v.generation.parallel import Parallel
from t2v.generation.text_to_video import TextToVideo

Video = tuple[Tensor, list[int]]
"""Tokens, and passes until each frame."""


def row_above(tokens: Tensor, at: Tensor, drafted: Tensor, grid: int) -> Tensor:
    """Draft a new position by the token above it."""
    source = torch.where(at < drafted, at, (at - ((at - drafted) // grid + 1) * grid).clamp(min=0))
    return tokens.gather(1, source % tokens.shape[1])


def constant(tokens: Tensor, at: Tensor, drafted: Tensor, grid: int) -> Tensor:
    """Draft a new position by token 0."""
    return torch.where(at < drafted, tokens.gather(1, at % tokens.shape[1]), 0)


DRAFTS = {"the frame before": decode._draft, "the row above": row_above, "token 0": constant}
"""Drafts of positions that no pass has computed; others have the token of the last pass."""


def generate(
    model: TextToVideo,
    prompts: list[str],
    seed: int,
    parallel: Parallel,
    frames: int | None = None,
    compiled: bool = False,
) -> Video:
    """Generate the tokens of videos."""
    frames = frames or model.frames
    seeds = range(seed, seed + len(prompts))
    text = model.embed(prompts)
    stream = generate_frames(
        model.transformer, text, frames, model.sampler, seeds, model.guidance, parallel=parallel, compiled=compiled
    )
    drawn, passes = [], []
    for frame in stream:
        drawn.append(frame)
        passes.append(stream.passes)
    return torch.cat(drawn, dim=1), passes


def passes_per_frame(model: TextToVideo, prompts: list[str], plot: Path | None) -> None:
    """Print the first table, and plot its passes with the drafts that are used."""
    size = model.transformer.grid_size**2
    sequential = [generate(model, [prompt], seed, 1)[0] for seed, prompt in enumerate(prompts)]
    rows: list[tuple[Parallel, str]] = [
        (8, "the frame before"),
        (size, "the frame before"),
        ("auto", "the frame before"),
    ]
    rows += [(2 * size, drafts) for drafts in DRAFTS]
    print(f"\n{len(prompts)} videos of {model.frames} frames of {size} tokens, one at a time\n")
    print("| positions | drafts | passes per video | fewer | passes until frame 1, 2, … | equal videos |")
    print("|---|---|---|---|---|---|")
    plotted = {}
    for positions, drafts in rows:
        with patch.object(decode, "_draft", DRAFTS[drafts]):
            videos = [generate(model, [prompt], seed, positions) for seed, prompt in enumerate(prompts)]
        equal = sum(torch.equal(found, expected) for (found, _), expected in zip(videos, sequential, strict=True))
        mean = torch.tensor([passes for _, passes in videos]).double().mean(0).tolist()
        until = ", ".join(f"{each:.1f}" for each in mean)
        fewer = size * model.frames / mean[-1]
        print(f"| {positions} | {drafts} | {mean[-1]:.1f} | {fewer:.1f}× | {until} | {equal} |", flush=True)
        if drafts == "the frame before" and positions in (size, 2 * size):
            plotted[f"{positions} positions"] = [passes for _, passes in videos]
    if plot is not None:
        _plot(plotted, plot)


def _plot(passes: dict[str, list[list[int]]], path: Path) -> None:
    """Plot the passes until each frame is final: a thin line for each video, and a thick one for their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for colour, (name, videos) in zip(("tab:blue", "tab:orange"), passes.items(), strict=True):
        frames = range(1, 1 + len(videos[0]))
        for each in videos:
            axes.plot(frames, each, colour, alpha=0.2, linewidth=1)
        axes.plot(frames, torch.tensor(videos).double().mean(0).tolist(), colour, linewidth=2.5, label=name)
    axes.set(xlabel="frame", ylabel="passes until it is final", ylim=(0, None))
    axes.legend()
    figure.savefig(path)


def equality(model: TextToVideo, prompts: list[str]) -> None:
    """Print how many videos of one batch are equal, and the first token of the others that differs."""
    sequential, parallel = (generate(model, prompts, 0, each)[0].flatten(1) for each in (1, "auto"))
    different = (sequential != parallel).int()
    unequal = different.any(1).nonzero().flatten().tolist()
    print(f"\nAll {len(prompts)} prompts in one batch: {len(prompts) - len(unequal)} videos are equal.")
    for row in unequal:
        position = int(different[row].argmax())
        print(f"Video {row} differs first at position {position}: tokens {sequential[row, position]}, ", end="")
        print(f"{parallel[row, position]}.")


def times(model: TextToVideo, prompts: list[str], rounds: int) -> None:
    """Print the second table."""
    print("\n| videos | decoding | seconds | relative to sequential | passes |\n|---|---|---|---|---|")
    for batches in ([[prompt] for prompt in prompts], [prompts]):
        jobs: dict[str, tuple[Parallel, bool]] = {"sequential": (1, False), "parallel": ("auto", False)}
        if compile_error() is None:
            jobs |= {"sequential, compiled": (1, True), "parallel, compiled": ("auto", True)}
        seconds: dict[str, list[float]] = {name: [] for name in jobs}
        passes = {}
        for each in range(rounds + 1):
            for name, (parallel, compiled) in jobs.items():
                start = time.perf_counter()
                runs = [generate(model, batch, seed, parallel, compiled=compiled) for seed, batch in enumerate(batches)]
                if each:  # the first round warms up
                    seconds[name].append((time.perf_counter() - start) / len(batches))
                passes[name] = statistics.mean(passes_until[-1] for _, passes_until in runs)
        first = statistics.median(seconds["sequential"])
        for name, measured in seconds.items():
            median = statistics.median(measured)
            print(
                f"| {len(batches[0])} | {name} | {median:.2f} | {first / median:.2f}× | {passes[name]:.1f} |",
                flush=True,
            )


def long_video(model: TextToVideo, prompt: str, frames: int = 300, near: int = 8) -> None:
    """Print the third table."""
    arguments = model.transformer, model.embed([prompt]), frames, model.sampler, [0], model.guidance
    process, spent, memory, passes = psutil.Process(), [], [], []
    stream = generate_frames(*arguments, parallel="auto")
    start = time.perf_counter()
    for _ in stream:
        spent.append(time.perf_counter() - start)
        memory.append(process.memory_info().rss / 2**20)
        passes.append(stream.passes)
        start = time.perf_counter()
    print(f"\n| frame | ms per frame, mean of {2 * near + 1} around it | passes per frame | resident memory |")
    print("|---|---|---|---|")
    for frame in (24, 64, 150, frames - near):
        around = slice(frame - 1 - near, frame + near)
        mean = 1000 * statistics.mean(spent[around])
        per_frame = (passes[frame + near - 1] - passes[frame - 2 - near]) / (2 * near + 1)
        print(f"| {frame} | {mean:.1f} | {per_frame:.2f} | {memory[frame - 1]:.1f} MiB |")
    print(f"\nFrom frame 17 to frame {frames} memory grew by {memory[-1] - memory[16]:.2f} MiB.")


def main(
    checkpoint: Path,
    tokenizer: Path,
    prompts: Path,
    videos: int = 16,
    rounds: int = 3,
    timed: bool = True,
    plot: Path | None = None,
) -> None:
    """Print the tables.

    Args:
        checkpoint: Of stage 2.
        tokenizer: Of stage 1.
        prompts: Text file with one prompt per line.
        videos: Number of prompts of the first two tables.
        rounds: Rounds of the second table, after one that warms up.
        timed: Whether to print the other tables too.
        plot: Picture of the passes of the first table, such as an SVG file.
    """
    torch.set_num_threads(psutil.cpu_count(logical=True) or 1)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"instructions: {torch.backends.cpu.get_cpu_capability()}")
    model = TextToVideo.from_checkpoint(checkpoint, tokenizer)
    texts = [line for line in prompts.read_text().splitlines() if line.strip()]
    if timed:
        times(model, texts[:videos], rounds)
        long_video(model, texts[0])
        equality(model, texts)
    passes_per_frame(model, texts[:videos], plot)


if __name__ == "__main__":
    run_tool(main)
