"""Generation with quantized weights: `python -m tests.benchmarks.weights --ckpt LAST.ckpt --tokenizer LAST.ckpt`.

First the speed, with the model of `tests.benchmarks.decode` (12 layers of width 768, 16,384 codes, batch 1, float32):
one frame of 256 tokens with each kind of weights, eager and compiled, interleaved in every round. Then, if a checkpoint
of the shapes demo is given, the quality: videos of held-out prompts from the same seeds, recognized by the oracle; and,
on the tokens of the full model's videos, the KL divergence of the probabilities and how often the most probable token
is the same. A row for fp8 with a rounded output projection shows the effect of leaving it unquantized.
"""

import copy
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import get_args

import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor

from data.examples.oracle import Answer, recognize
from data.examples.shapes import held_out_prompts
from t2v.batch import TextEmbedding
from t2v.errors import run_tool
from t2v.generation.decode import generate_frames
from t2v.generation.quantization import Fp8Linear, Weights, convert, stored_bytes
from t2v.generation.sampling import Sampler
from t2v.generation.text_to_video import TextToVideo
from t2v.transformer.model import VideoTransformer
from t2v.vqvae.model import to_uint8
from tests.benchmarks.decode import TOKENS, ours, seconds, text

KINDS: tuple[Weights, ...] = get_args(Weights)


def speed(rounds: int, branches: int) -> None:
    """Print tokens per second and bytes of each kind."""
    full, jobs, sizes = ours(), {}, {}
    caption = text(full.text.dim)
    guidance = 1.0 if branches == 1 else 2.0

    def decode(model: VideoTransformer, compiled: bool) -> Callable[[], object]:
        return lambda: list(generate_frames(model, caption, 1, Sampler(), [0], guidance, compiled=compiled))

    for kind in KINDS:
        model = copy.deepcopy(full)
        convert(model, kind)
        sizes[kind] = stored_bytes(model)
        for way in ("eager", "compiled"):
            jobs[kind, way] = decode(model, way == "compiled")
    with torch.inference_mode():
        for (kind, way), job in jobs.items():
            print(f"{kind}, {way}: the first frame took {seconds(job):.0f} s", flush=True)
        times: dict[tuple[str, str], list[float]] = {name: [] for name in jobs}
        for _ in range(rounds):
            for name, job in jobs.items():
                times[name].append(seconds(job) / TOKENS)
    rates = {name: 1 / statistics.median(each) for name, each in times.items()}
    print(f"\n{branches} rows per step, tokens per second, medians of {rounds} rounds (minimum to maximum)\n")
    print("| weights | bytes | eager | relative to full | compiled | relative to full |\n|---|---|---|---|---|---|")
    for kind in KINDS:
        cells = [
            f"{rates[kind, way]:.1f} ({1 / max(times[kind, way]):.1f} to {1 / min(times[kind, way]):.1f}) | "
            f"{rates[kind, way] / rates['full', way]:.2f}×"
            for way in ("eager", "compiled")
        ]
        print(f"| {kind} | {sizes[kind] / 1e6:.0f} MB | {' | '.join(cells)} |")


def round_head(model: VideoTransformer) -> None:
    """Round the output projection to fp8."""
    assert model.head is not None
    model.head.weight.data = Fp8Linear(model.head.weight.detach()).weight()


@torch.inference_mode()
def generate(model: TextToVideo, prompts: Sequence[str], batch: int) -> Int[Tensor, "b t h w"]:
    """Generate a video per prompt; the seeds are the numbers of the prompts."""
    videos = []
    for first in range(0, len(prompts), batch):
        embedded = model.embed(prompts[first : first + batch])
        seeds = range(first, first + len(embedded.mask))
        frames = generate_frames(model.transformer, embedded, model.frames, model.sampler, seeds, model.guidance)
        videos.append(torch.cat(list(frames), dim=1))
    return torch.cat(videos)


@torch.inference_mode()
def recognize_videos(model: TextToVideo, tokens: Int[Tensor, "b t h w"]) -> list[Answer]:
    """Return the oracle's answers."""
    answers = []
    for one in tokens.split(1):
        answers.append(recognize(to_uint8(model.vqvae.decode(one))[0].permute(0, 2, 3, 1).numpy()))
    return answers


@torch.inference_mode()
def log_probabilities(
    model: VideoTransformer, tokens: Int[Tensor, "b t h w"], embedded: TextEmbedding
) -> Float[Tensor, "n v"]:
    """Return the log probabilities of every token of the videos, given the tokens before it."""
    return model(tokens, embedded).flatten(0, 3).log_softmax(dim=-1)


def quality(ckpt: str, tokenizer: str | None, per_combination: int, batch: int) -> None:
    """Print the accuracy by the oracle, and the distance of the probabilities from the full model's."""
    pairs = held_out_prompts(per_combination)
    prompts = [prompt for _, prompt in pairs]
    truths = [Answer.of(clip) for clip, _ in pairs]
    rows = [*((kind, kind) for kind in KINDS), ("fp8, output projection too", "fp8")]
    reference: Tensor | None = None
    print(f"\n{len(prompts)} held-out prompts\n")
    print("| weights | their bytes | colour | shape | direction | KL, millinats | same most probable token | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for name, kind in rows:
        model = TextToVideo.from_checkpoint(ckpt, tokenizer, kind)
        if name != kind:
            round_head(model.transformer)
        start = time.perf_counter()
        tokens = generate(model, prompts, batch)
        spent = time.perf_counter() - start
        answers = recognize_videos(model, tokens)
        accuracies = [
            sum(getattr(a, part) == getattr(t, part) for a, t in zip(answers, truths, strict=True)) / len(truths)
            for part in Answer._fields
        ]
        few = slice(min(len(prompts), 54))
        if reference is None:
            reference, full = tokens[few], model.transformer
        embedded = model.embed(prompts[few])
        ours, theirs = (log_probabilities(one, reference, embedded) for one in (full, model.transformer))
        divergence = (ours.exp() * (ours - theirs)).sum(dim=-1).mean()
        same = (ours.argmax(dim=-1) == theirs.argmax(dim=-1)).float().mean()
        print(
            f"| {name} | {stored_bytes(model.transformer) / 1e6:.1f} MB | "
            f"{' | '.join(f'{accuracy:.1%}' for accuracy in accuracies)} | "
            f"{1000 * divergence:.2f} | {same:.1%} | {spent:.0f} |",
            flush=True,
        )


def main(
    ckpt: str | None = None,
    tokenizer: str | None = None,
    rounds: int = 5,
    branches: int = 1,
    per_combination: int = 12,
    batch: int = 54,
) -> None:
    """Compare kinds of weights in speed and quality.

    Args:
        ckpt: Checkpoint of the shapes demo's stage 2; without it quality is not measured.
        tokenizer: Checkpoint of its stage 1; by default the path used in training.
        rounds: Rounds of the speed measurement; 0 for none.
        branches: 2 measures the speed with guidance, two rows per step.
        per_combination: Prompts for each of the 18 held-out combinations.
        batch: Prompts per batch.
    """
    torch.manual_seed(0)
    torch.set_num_threads(psutil.cpu_count(logical=True) or 1)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if rounds:
        speed(rounds, branches)
    if ckpt:
        quality(ckpt, tokenizer, per_combination, batch)


if __name__ == "__main__":
    run_tool(main)
