"""A training step of the transformer relative to `transformers`' Llama with as many parameters.

`python -m tests.benchmarks.train` runs both, interleaved, in float32 and under bf16 autocast: forward and backward pass
of four clips of two frames of 256 tokens, and a fused AdamW step. Our model also reads the previous frame and a text of
16 tokens.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable

import psutil
import torch
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from t2v.batch import TextEmbedding
from t2v.compilation import compile_layer
from t2v.errors import run_tool
from t2v.losses.tokens import token_loss_
from t2v.transformer.config import AttentionConfig, TextConfig
from t2v.transformer.model import VideoTransformer

VOCAB_SIZE, WIDTH, HEADS, KV_HEADS, TEXT_DIM = 16384, 768, 12, 4, 384
CLIPS, FRAMES, GRID, TEXT_LENGTH = 4, 2, 16, 16
TOKENS = CLIPS * FRAMES * GRID**2
Step = Callable[[], Tensor]


def train(
    rounds: int = 5,
    precisions: tuple[str, ...] = ("fp32", "bf16"),
    hidden: int = 1664,
    profiled: bool = False,
    compiled: bool = False,
) -> None:
    """Print tokens per second of both models, their ratio, and their rate relative to a matrix product.

    Args:
        rounds: Steps of each model, interleaved, after one step to warm up and to count FLOPs.
        precisions: Among fp32 and bf16 (autocast; weights stay in float32).
        hidden: Hidden width of our feed-forward layers; Llama's is chosen for the same number of parameters.
        profiled: Whether to print the most expensive operators.
        compiled: Whether to compile the layers of both models, as `model.compiled` does.
    """
    torch.manual_seed(0)
    ours = VideoTransformer(
        VOCAB_SIZE, GRID, WIDTH, 7, 5, hidden, AttentionConfig(HEADS, KV_HEADS), TextConfig(TEXT_DIM), tied_head=True
    )
    count = sum(p.numel() for p in ours.parameters())
    llama = LlamaForCausalLM(_llama(count))
    llama_count = sum(p.numel() for p in llama.parameters())
    assert abs(llama_count / count - 1) < 0.03, (llama_count, count)
    arguments = f"--rounds {rounds} --hidden {hidden} --precisions {list(precisions)} --compiled {compiled}"
    print(f"python -m tests.benchmarks.train {arguments}")
    print(_machine())
    print(f"parameters: ours {count / 1e6:.1f} M, Llama {llama_count / 1e6:.1f} M; {TOKENS} tokens per step\n")
    tokens = torch.randint(VOCAB_SIZE, (CLIPS, FRAMES, GRID, GRID))
    embedded = torch.randn(CLIPS, TEXT_LENGTH, TEXT_DIM)
    text = TextEmbedding(embedded, torch.ones(CLIPS, TEXT_LENGTH, dtype=torch.bool))
    losses: dict[str, Step] = {
        "ours": lambda: token_loss_(ours(tokens, text), tokens).objective,
        "Llama": lambda: llama(input_ids=tokens.flatten(1), labels=tokens.flatten(1), use_cache=False).loss,
    }
    optimizers = {
        "ours": torch.optim.AdamW(ours.parameters(), lr=1e-4, fused=True),
        "Llama": torch.optim.AdamW(llama.parameters(), lr=1e-4, fused=True),
    }
    print("| precision | model | tokens/s | ratio | TFLOP per step | rate relative to a matrix product |")
    print("|---|---|---|---|---|---|")
    steps_of = {
        precision: {name: _step(loss, optimizers[name], precision) for name, loss in losses.items()}
        for precision in precisions
    }
    flops_of = {each: {name: _flops(step) for name, step in steps.items()} for each, steps in steps_of.items()}
    if compiled:  # after counting: it does not see the operators of compiled layers
        ours.compile_layers()
        for layer in llama.model.layers:
            compile_layer(layer)
    for precision, steps in steps_of.items():
        flops = flops_of[precision]
        for step in steps.values():
            step()
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        rates = []
        for _ in range(rounds):
            rates.append(_rate(precision))
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
        median = {name: statistics.median(times) for name, times in seconds.items()}
        ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["Llama"], strict=True))
        rate = statistics.median(rates)
        for name in steps:
            print(
                f"| {precision} | {name} | {TOKENS / median[name]:.0f} | {f'{ratio:.2f}' if name == 'ours' else '1'} | "
                f"{flops[name] / 1e12:.2f} | {flops[name] / median[name] / rate:.0%} of {rate / 1e9:.0f} GFLOP/s |",
                flush=True,
            )
        if profiled:
            for name, step in steps.items():
                print(f"\n{name}\n{_operators(step)}")


def _llama(parameters: int) -> LlamaConfig:
    """Return a Llama config with a number of parameters, which its hidden width is chosen for."""
    attention = 2 * WIDTH**2 + 2 * WIDTH * WIDTH * KV_HEADS // HEADS + 2 * WIDTH
    hidden = ((parameters - VOCAB_SIZE * WIDTH) / 12 - attention) / (3 * WIDTH)
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        intermediate_size=round(hidden / 64) * 64,
        num_hidden_layers=12,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=True,
        max_position_embeddings=FRAMES * GRID**2,
    )


def _step(loss: Step, optimizer: torch.optim.Optimizer, precision: str) -> Step:
    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def _flops(step: Step) -> int:
    """Return the FLOPs of a step; it is also the warm-up."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def _rate(precision: str) -> float:
    """Return the FLOP/s of the fastest of a few large matrix products."""
    a = torch.randn(2048, 2048, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


def _operators(step: Step) -> str:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    rows = sorted(profiled.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    return "\n".join(
        f"  {row.key:<45} {row.count:>5} calls {row.self_cpu_time_total / 1e3:>8.1f} ms "
        f"{row.self_cpu_time_total / total:.1%}"
        for row in rows[:18]
    )


def _machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


if __name__ == "__main__":
    run_tool(train)
