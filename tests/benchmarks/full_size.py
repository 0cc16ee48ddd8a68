"""The full-size transformer on a small machine: `python -m tests.benchmarks.full_size`.

Builds the model of configs/transformer/8b.yaml without memory, makes its weights (at random) real one layer at a time
with the products in int8 by torchao, and generates a few tokens; prints seconds a token and the peak of the memory.
"""

import resource
import time
from pathlib import Path

import torch
import yaml
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from t2v.batch import TextEmbedding
from t2v.errors import run_tool
from t2v.generation.sampling import Sampler
from t2v.transformer.block import Block
from t2v.transformer.decoding import Decoder
from t2v.transformer.model import VideoTransformer

CONFIG = Path(__file__).parents[2] / "configs/transformer/8b.yaml"


def peak() -> float:
    """Most memory this process has held, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def make_real(part: nn.Module) -> None:
    """Weights out of nothing, at random; int8 where they are products."""
    part.to_empty(device="cpu")
    for parameter in part.parameters():
        nn.init.ones_(parameter) if parameter.ndim == 1 else nn.init.normal_(parameter, std=0.02)
    part.requires_grad_(False)
    quantize_(part, Int8WeightOnlyConfig())


def generate(tokens: int = 4) -> None:
    """Prints what it takes.

    Args:
        tokens: how many to generate.
    """
    torch.manual_seed(0)
    arguments = yaml.safe_load(CONFIG.read_text())["model"]["init_args"]["model"]["init_args"]
    model = VideoTransformer.from_config({**arguments, "device": "meta"}).to(torch.bfloat16).eval()
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count / 1e9:.3f} B parameters built on meta; peak {peak():.2f} GiB", flush=True)

    began = time.perf_counter()
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        make_real(block)
    for name, part in model.named_children():
        if name != "blocks":
            part.to_empty(device="cpu").requires_grad_(False)
            for parameter in part.parameters():
                nn.init.normal_(parameter, std=0.02)
    for name in ("start", "no_text"):
        setattr(model, name, nn.Parameter(0.02 * torch.randn_like(getattr(model, name), device="cpu")))
    print(f"weights made in {time.perf_counter() - began:.0f} s; peak {peak():.2f} GiB", flush=True)

    text = TextEmbedding(
        torch.randn(1, 16, model.text.dim, dtype=torch.bfloat16),
        torch.ones(1, 16, dtype=torch.bool),
        torch.randn(1, model.text.dim, dtype=torch.bfloat16),
    )
    sampler, generator, token, drawn, times = Sampler(), torch.Generator().manual_seed(0), None, [], []
    with torch.inference_mode():
        decoder = Decoder(model, text)
        for _ in range(tokens):
            began = time.perf_counter()
            token = sampler(decoder.step(token), [generator])
            times.append(time.perf_counter() - began)
            drawn.append(int(token))
    print(f"tokens {drawn}; seconds a token {[round(each, 2) for each in times]}; peak {peak():.2f} GiB")


if __name__ == "__main__":
    run_tool(generate)
