"""Quantizers: round trips, losses, and the same codebook on all ranks."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from t2v.checkpoints.config import from_config, to_config
from t2v.errors import UserError
from t2v.vqvae.quantizer import FSQuantizer, LFQuantizer, Quantizer, VectorQuantizer

ROOT = Path(__file__).parents[2]
KINDS = {
    "vq": lambda: VectorQuantizer(codebook_size=64, dim=8),
    "fsq": lambda: FSQuantizer([5, 4, 3]),
    "lfq": lambda: LFQuantizer(codebook_size=64),
}


@pytest.fixture(params=KINDS)
def quantizer(request) -> Quantizer:
    built = KINDS[request.param]()
    built.train()(torch.randn(2, 200, built.dim))
    return built.eval()


def test_lookup_of_the_indices_returns_the_codes(quantizer):
    codes, indices, _ = quantizer(torch.randn(3, 50, quantizer.dim))
    assert indices.shape == (3, 50)
    assert indices.dtype == torch.long
    torch.testing.assert_close(quantizer.lookup(indices), codes)


def test_all_codes_differ(quantizer):
    codes = quantizer.lookup(torch.arange(quantizer.codebook_size)[None])[0]
    assert codes.shape == (quantizer.codebook_size, quantizer.dim)
    assert len(codes.unique(dim=0)) == quantizer.codebook_size


def test_training_and_evaluation_choose_the_same_codes(quantizer):
    vectors = torch.randn(2, 30, quantizer.dim)
    expected = quantizer(vectors)
    codes, indices, _ = quantizer.train()(vectors)
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(codes, expected.codes, atol=1e-5, rtol=1e-5)


def test_gradients_pass_to_the_vectors(quantizer):
    vectors = torch.randn(2, 30, quantizer.dim, requires_grad=True)
    quantizer.train()(vectors).codes.pow(2).sum().backward()
    quantizer.relax(vectors).sum().backward()
    assert torch.isfinite(vectors.grad).all()


def test_a_config_builds_the_same_quantizer(quantizer):
    rebuilt = from_config(to_config(quantizer), Quantizer)
    assert to_config(rebuilt) == to_config(quantizer)
    assert (rebuilt.codebook_size, rebuilt.dim) == (quantizer.codebook_size, quantizer.dim)


def test_invalid_arguments_are_refused():
    with pytest.raises(UserError, match="codebook_size=100 of LFQuantizer must be a power of two"):
        LFQuantizer(codebook_size=100)
    with pytest.raises(UserError, match="none below 3"):
        FSQuantizer([8, 2])


def test_the_entropy_term_is_lower_for_evenly_used_codes():
    quantizer = VectorQuantizer(codebook_size=16, dim=4, entropy_weight=1.0).train()
    even = torch.randn(1, 512, 4)
    quantizer(even)
    clustered = torch.ones(1, 512, 4) + 0.01 * torch.randn(1, 512, 4)
    assert quantizer(even).loss < quantizer(clustered).loss
    clustered.requires_grad_()
    quantizer(clustered).loss.backward()
    assert clustered.grad.abs().sum() > 0


def test_few_codes_are_spent_on_a_plain_background():
    """Nine of ten latents are nearly equal; with uniform draws, most codes would be copies of that one vector."""
    quantizer = VectorQuantizer(codebook_size=32, dim=8, decay=0.9).train()
    background = torch.randn(8).expand(1, 900, 8) + 1e-3 * torch.randn(1, 900, 8)
    for _ in range(20):
        quantizer(torch.cat([background, torch.randn(1, 100, 8)], dim=1))
    indices = quantizer.eval()(background).indices
    assert len(indices.unique()) <= 2
    assert quantizer(torch.randn(1, 1000, 8)).indices.unique().numel() >= 24


RANK = """
import sys, torch, torch.distributed as dist
from t2v.vqvae.quantizer import VectorQuantizer

rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
quantizer = VectorQuantizer(codebook_size=48, dim=4, decay=0.5, restart_below=1.5).train()
if ranks > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
data = torch.randn(12, 2, 60, 4, generator=torch.Generator().manual_seed(0)).cumsum(0)
torch.manual_seed(1)
for step in data:
    quantizer(step.flatten(0, 1)[None] if ranks == 1 else step[rank][None])
torch.save(quantizer.state_dict(), f"{folder}/{rank}-of-{ranks}.pt")
"""


def test_two_ranks_train_the_codebook_of_one_process_with_both_batches(tmp_path):
    """Twelve steps, each with replaced codes, although the ranks have different vectors."""
    runs = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(ranks), tmp_path], cwd=ROOT)
        for rank, ranks in ((0, 2), (1, 2), (0, 1))
    ]
    assert [run.wait(timeout=100) for run in runs] == [0, 0, 0]
    first, second, alone = (torch.load(tmp_path / f"{name}.pt") for name in ("0-of-2", "1-of-2", "0-of-1"))
    for name in first:
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], alone[name], atol=1e-4, rtol=1e-4)
