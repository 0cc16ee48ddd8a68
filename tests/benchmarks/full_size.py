"""The full-size transformer on a small machine: `python -m tests.benchmarks.full_size`.

Builds the model of configs/transformer/8b.yaml on the meta device, initializes random weights layer by layer, with
linear layers in int8 by torchao, and generates a few tokens. Prints seconds per token and the peak memory.
"""

import resource
import time

import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from t2v.batch import TextEmbedding
from t2v.errors import run_tool
from t2v.generation.sampling import GumbelNoise, Sampler
from t2v.transformer.block import Block
from t2v.transformer.decoding import Decoder
from t2v.transformer.model import VideoTransformer
from tests.support.configs import transformer_arguments


def peak() -> float:
    """Return the peak memory of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def initialize(part: nn.Module) -> None:
    """Allocate random weights; int8 in linear layers."""
    part.to_empty(device="cpu")
    for parameter in part.parameters():
        nn.init.ones_(parameter) if parameter.ndim == 1 else nn.init.normal_(parameter, std=0.02)
    part.requires_grad_(False)
    quantize_(part, Int8WeightOnlyConfig())


def generate(tokens: int = 4) -> None:
    """Print time and memory.

    Args:
        tokens: Number of tokens to generate.
    """
    torch.manual_seed(0)
    model = VideoTransformer.from_config(transformer_arguments("8b")).to(torch.bfloat16).eval()
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count / 1e9:.3f} B parameters built on meta; peak {peak():.2f} GiB", flush=True)

    start = time.perf_counter()
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        initialize(block)
    for name, part in model.named_children():
        if name != "blocks":
            part.to_empty(device="cpu").requires_grad_(False)
            for parameter in part.parameters():
                nn.init.normal_(parameter, std=0.02)
    for name in ("start", "no_text"):
        setattr(model, name, nn.Parameter(0.02 * torch.randn_like(getattr(model, name), device="cpu")))
    print(f"weights initialized in {time.perf_counter() - start:.0f} s; peak {peak():.2f} GiB", flush=True)

    text = TextEmbedding(
        torch.randn(1, 16, model.text.dim, dtype=torch.bfloat16),
        torch.ones(1, 16, dtype=torch.bool),
    )
    sampler, token, drawn, times = Sampler(), None, [], []
    noise = GumbelNoise([0], model.grid_size**2, model.vocab_size, 1, torch.device("cpu"))
    noise.reach(0, 0, 1)
    with torch.inference_mode():
        decoder = Decoder(model, text)
        for position in range(tokens):
            start = time.perf_counter()
            token = sampler(decoder.step(token), noise.at(torch.tensor([[position]]))[:, 0])
            times.append(time.perf_counter() - start)
            drawn.append(int(token))
    print(f"tokens {drawn}; seconds per token {[round(each, 2) for each in times]}; peak {peak():.2f} GiB")


if __name__ == "__main__":
    run_tool(generate)
