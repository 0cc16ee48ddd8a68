"""Speed of decoding: `python -m tests.benchmarks.decode`.

One process, batch 1, float32, sampling without filters (Llama: greedy). Interleaved in every round: `generate` of a
Llama of `transformers`; and `TextToVideo.generate`, eager and compiled, with a transformer of the same width and number
of layers that reads as many weights per token (Llama has no text attention, therefore its feed-forward layers are
wider). It makes one frame from a prompt, its text embedding and its pixels included, one token after the other, and
with "auto". The limit is the time to read the weights of a token: before and after each of these, all are summed a
number of times, as one tensor. (The bandwidth of other memory is no limit: on a virtual machine it can differ by 1.9
times from one allocation to the next.) The model is untrained, so that the noise decides most tokens, whatever the
drafts are: "auto" needs fewer passes, but says nothing about trained models, which `tests.benchmarks.generate`
measures. With guidance a token is computed with and without the prompt, both in one pass.

Then, on a small model, time and memory per frame far into a video relative to early frames.
"""

import platform
import statistics
import time
from collections.abc import Callable

import psutil
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from t2v import TextToVideo
from t2v.batch import TextEmbedding
from t2v.errors import run_tool
from t2v.generation.decode import generate_frames
from t2v.generation.parallel import Parallel
from t2v.generation.sampling import Sampler
from t2v.text import MiniLMTextEncoder
from t2v.transformer.config import AttentionConfig, TextConfig
from t2v.transformer.model import VideoTransformer
from t2v.vqvae.model import VQVAE
from t2v.vqvae.quantizer import VectorQuantizer

VOCABULARY, GRID, DIM, LAYERS, HEADS, KV_HEADS = 16384, 16, 768, 12, 12, 4
TOKENS = GRID**2
"""Tokens per measurement: one frame of ours."""
_READS = 20
"""Sums over the weights before and after each measurement."""


def text(width: int) -> TextEmbedding:
    """Return random embeddings of twelve text tokens."""
    return TextEmbedding(torch.randn(1, 12, width), torch.ones(1, 12, dtype=torch.bool))


def ours() -> VideoTransformer:
    """Build our model: 7 spatial and 5 temporal layers."""
    return VideoTransformer(
        vocab_size=VOCABULARY,
        grid_size=GRID,
        dim=DIM,
        spatial_layers=7,
        temporal_layers=5,
        hidden_dim=1504,
        attention=AttentionConfig(HEADS, KV_HEADS),
        text=TextConfig(384),
    ).eval()


def llama() -> LlamaForCausalLM:
    """Build a Llama with the same layers without text, and wider feed-forward layers."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=DIM,
        intermediate_size=2048,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def gather_weights(model: torch.nn.Module) -> torch.Tensor:
    """Make the weights that each token reads views of one tensor, and return it.

    A token reads one row of embeddings, and no projection of the text.
    """
    skipped = ("embed", "mix", "gate.hidden", "gate.out", "attention.key_value", "no_text")
    read = [p for name, p in model.named_parameters() if not any(part in name for part in skipped)]
    flat = torch.cat([parameter.detach().flatten() for parameter in read])
    for parameter, part in zip(read, flat.split([parameter.numel() for parameter in read]), strict=True):
        parameter.data = part.view_as(parameter)
    return flat


def seconds(job: Callable[[], object]) -> float:
    """Return the wall time of a call."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def speed(rounds: int) -> None:
    """Print the first table."""
    theirs, model = llama(), ours()
    vqvae = VQVAE(
        image_size=128,
        base_channels=64,
        channel_multipliers=[1],
        patch_size=4,
        latent_patch_size=2,
        quantizer=VectorQuantizer(VOCABULARY),
    )
    text_to_video = TextToVideo(model, vqvae, MiniLMTextEncoder(), fps=8.0)
    prompt = torch.zeros(1, 1, dtype=torch.long)
    settings = {"do_sample": False, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS, "use_cache": True}

    def decode(compiled: bool, parallel: Parallel = 1, guidance: float = 1.0) -> None:
        text_to_video.compiled = compiled
        text_to_video.generate("a red circle moves left", frames=1, parallel=parallel, guidance=guidance)

    jobs: dict[str, Callable[[], object]] = {
        "transformers' Llama, generate": lambda: theirs.generate(prompt, **settings),
        "ours, eager": lambda: decode(compiled=False),
        "ours, compiled": lambda: decode(compiled=True),
        "ours, eager, guidance": lambda: decode(compiled=False, guidance=3.0),
        "ours, compiled, guidance": lambda: decode(compiled=True, guidance=3.0),
        "ours, eager, auto": lambda: decode(compiled=False, parallel="auto"),
        "ours, compiled, auto": lambda: decode(compiled=True, parallel="auto"),
    }
    gathered = {model: gather_weights(model), theirs: gather_weights(theirs)}
    weights = {name: gathered[model if name.startswith("ours") else theirs] for name in jobs}
    sizes = {name: sum(p.numel() for p in (model if name.startswith("ours") else theirs).parameters()) for name in jobs}
    with torch.inference_mode():
        for job in jobs.values():
            job()
        times: dict[str, list[float]] = {name: [] for name in jobs}
        reads: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(rounds):
            for name, job in jobs.items():
                sums = [seconds(weights[name].sum) for _ in range(_READS)]
                times[name].append(seconds(job) / TOKENS)
                sums += [seconds(weights[name].sum) for _ in range(_READS)]
                reads[name].append(statistics.median(sums))
    print(f"{TOKENS} tokens per measurement, medians of {rounds} rounds\n")
    print("| | parameters | weights of a token, their sum | ms per token | relative to Llama | fraction of the limit |")
    print("|---|---|---|---|---|---|")
    first = next(iter(times.values()))
    for name, each in times.items():
        size = 4 * weights[name].numel()
        ratio = statistics.median(a / b for a, b in zip(first, each, strict=True))
        fraction = statistics.median(a / b for a, b in zip(reads[name], each, strict=True))
        read, median = (1e3 * statistics.median(values) for values in (reads[name], each))
        print(
            f"| {name} | {sizes[name] / 1e6:.1f} M | {size / 1e6:.0f} MB, {read:.1f} ms | {median:.1f} | "
            f"{ratio:.2f}× | {fraction:.0%} |"
        )


def time_and_memory_per_frame(frames: int = 300, near: int = 8) -> None:
    """Print the second table: a small model, 4×4 tokens per frame and a window of 16 frames."""
    model = VideoTransformer(1024, 4, 256, 3, 3, 640, AttentionConfig(4, 2), TextConfig(384)).eval()
    process = psutil.Process()
    for _ in range(2):  # the first warms up
        spent: list[float] = []
        memory: list[float] = []
        stream = generate_frames(model, text(384), frames, Sampler(), [0])
        start = time.perf_counter()
        for _ in stream:
            spent.append(time.perf_counter() - start)
            memory.append(process.memory_info().rss / 2**20)
            start = time.perf_counter()
    print(f"\n| frame | ms per frame, median of {2 * near + 1} around it | resident memory |\n|---|---|---|")
    for frame in (20, 64, 150, frames - near):
        around = statistics.median(spent[frame - 1 - near : frame + near])
        print(f"| {frame} | {1000 * around:.2f} | {memory[frame - 1]:.1f} MiB |")
    print(f"\nFrom frame 17 to frame {frames} memory grew by {memory[-1] - memory[16]:.2f} MiB.")


def main(rounds: int = 7) -> None:
    """Print both tables.

    Args:
        rounds: Interleaved rounds of the first table.
    """
    torch.manual_seed(0)
    torch.set_num_threads(psutil.cpu_count(logical=True) or 1)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, Python ", end="")
    print(f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    speed(rounds)
    time_and_memory_per_frame()


if __name__ == "__main__":
    run_tool(main)
