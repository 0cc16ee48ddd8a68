"""Quantizers: round trips, losses, and the same codebook on all ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import t2v.vqvae.quantizer as quantizer_module
from t2v.checkpoints.config import from_config, to_config
from t2v.errors import UserError
from t2v.vqvae.quantizer import FSQuantizer, LFQuantizer, Quantizer, VectorQuantizer, nearest
from tests.support import forked

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


def test_noise_does_not_choose_the_code():
    """12 patches with the noise of a lossy file, and room for 48 codes: each patch keeps one token."""
    patches = F.normalize(torch.randn(12, 8), dim=-1)
    quantizer = VectorQuantizer(codebook_size=48, dim=8, decay=0.9).train()
    for _ in range(30):
        quantizer((patches.repeat(40, 1) + 2e-3 * torch.randn(480, 8))[None])
    indices = quantizer.eval()((patches.repeat(40, 1) + 2e-3 * torch.randn(480, 8))[None]).indices.view(40, 12)
    assert torch.equal(indices, indices[:1].expand(40, -1))
    assert len(indices[0].unique()) == 12
    used = quantizer.codes[quantizer.codes.norm(dim=1) > 0]
    assert ((used @ used.T).fill_diagonal_(0) <= quantizer_module.EQUAL).all()


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        self.elements = max([self.elements, *(tensor.numel() for tensor in tensors)])
        return result


@pytest.mark.parametrize("entropy_weight", [0.0, 0.1])
def test_no_tensor_grows_with_the_product_of_vectors_and_codes(entropy_weight, monkeypatch):
    """k-means, the choice of codes, the entropy term with its gradient, and restarts."""
    monkeypatch.setattr(quantizer_module, "SIMILARITIES", 4096)
    quantizer = VectorQuantizer(codebook_size=64, dim=4, restart_below=0.9, entropy_weight=entropy_weight).train()
    with LargestTensor() as largest:
        for _ in range(2):
            vectors = torch.randn(2, 500, 4, requires_grad=True)
            quantizer(vectors).loss.backward()
    assert quantizer.counts.max() > 5  # restarted codes begin at 9 times the average
    assert largest.elements <= 4096 < 1000 * 64


def test_chunks_of_similarities_choose_the_same_codes(monkeypatch):
    vectors, codes = torch.randn(1000, 4), torch.randn(64, 4)
    expected = (vectors @ codes.T).max(dim=1)
    monkeypatch.setattr(quantizer_module, "SIMILARITIES", 64 * 7)
    found = nearest(vectors, codes)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.similarities, expected.values)


@pytest.mark.parametrize("copies", [1, 8])
def test_restarts_do_not_depend_on_the_number_of_vectors(copies):
    """1 of 200 vectors chooses the first of four codes: 2 % of the average. Only these differ from all codes."""
    rare = F.normalize(torch.tensor([[1, 0.5, 0, 0], [1, -0.5, 0, 0]]), dim=-1)
    others = torch.eye(4)[1:].repeat_interleave(torch.tensor([132, 132, 134]), 0)
    for restart_below, restarted in ((0.01, False), (0.03, True)):
        quantizer = VectorQuantizer(codebook_size=4, dim=4, decay=1e-6, restart_below=restart_below).train()
        quantizer.load_state_dict(
            {"codes": torch.eye(4), "sums": torch.eye(4), "counts": torch.ones(4), "initialized": torch.tensor(True)}
        )
        quantizer(torch.cat([rare, others]).repeat(copies, 1)[None])
        assert (quantizer.counts[0] == pytest.approx(10 * restart_below)) == restarted
        assert quantizer.counts[1:].tolist() == pytest.approx([1.32, 1.32, 1.34])


RANK = """
import sys, torch, torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from t2v.vqvae.quantizer import VectorQuantizer

class Draws(TorchDispatchMode):
    count = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.multinomial.default
        return func(*args, **(kwargs or {}))

rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
quantizer = VectorQuantizer(codebook_size=48, dim=4, decay=0.5, restart_below=0.6).train()
if ranks > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
data = torch.randn(12, 2, 60, 4, generator=torch.Generator().manual_seed(0)).cumsum(0)
torch.manual_seed(1)
with Draws() as draws:
    for step in data:
        quantizer(step.flatten(0, 1)[None] if ranks == 1 else step[rank][None])
torch.save({"state": quantizer.state_dict(), "draws": draws.count}, f"{folder}/{rank}-of-{ranks}.pt")
"""


def test_two_ranks_train_the_codebook_of_one_process_with_both_batches(tmp_path):
    """Twelve steps with replaced codes, which only the first rank draws, although the ranks have different vectors."""
    runs = [forked.Fork("-c", RANK, rank, ranks, tmp_path) for rank, ranks in ((0, 2), (1, 2), (0, 1))]
    assert [done.stderr for run in runs if (done := run.wait()).returncode] == []
    first, second, alone = (torch.load(tmp_path / f"{name}.pt") for name in ("0-of-2", "1-of-2", "0-of-1"))
    assert first["draws"] == alone["draws"] > 6  # k-means begins with six
    assert second["draws"] == 0
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
        torch.testing.assert_close(value, alone["state"][name], atol=1e-4, rtol=1e-4)
