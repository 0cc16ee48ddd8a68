"""Optimization of both stages: weight decay, the learning-rate schedule, and Muon."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from t2v import VQVAE, VideoTransformer
from t2v.batch import TextEmbedding
from t2v.training import optimization
from t2v.training.optimization import Muon, MuonAdamW, orthogonalize, parameter_groups, warmup_cosine
from t2v.transformer.config import AttentionConfig, TextConfig
from tests.support.toys import toy_vqvae


def transformer(**changes) -> VideoTransformer:
    return VideoTransformer(24, 2, 32, 1, 1, 48, AttentionConfig(4, 2, window=4), TextConfig(12), **changes)


def vqvae() -> VQVAE:
    return toy_vqvae()


@pytest.mark.parametrize("build", [transformer, vqvae])
def test_every_trained_parameter_is_in_the_group_with_its_weight_decay(build):
    network = build()
    next(network.parameters()).requires_grad_(False)
    hidden, decayed, embeddings, vectors = ({id(p) for p in group["params"]} for group in parameter_groups(network))
    assert "weight_decay" not in parameter_groups(network)[0] | parameter_groups(network)[1]  # the optimizer's own
    assert [group["weight_decay"] for group in parameter_groups(network)[2:]] == [0.0, 0.0]
    not_decayed = embeddings | vectors
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in parameter_groups(network)) == len(named)
    for name, parameter in named.items():
        plain = "embedding" not in name and "norm" not in name and not name.endswith("bias") and parameter.ndim > 1
        assert (id(parameter) in hidden | decayed, id(parameter) in not_decayed) == (plain, not plain), name
        assert (id(parameter) in hidden) == (name.startswith("blocks") and parameter.ndim == 2), name


def test_embeddings_and_a_tied_head_do_not_decay():
    for tied in (False, True):
        model = transformer(tied_head=tied)
        groups = [[id(p) for p in group["params"]] for group in parameter_groups(model)]
        _, decayed, embeddings, _ = groups
        assert embeddings == [id(model.token_embedding.weight), id(model.previous_frame.embedding.weight)]
        assert tied or id(model.head.weight) in decayed
        assert sum(map(len, groups)) == len(list(model.parameters()))


def test_a_network_of_vectors_has_no_weight_decay():
    assert [len(group["params"]) for group in parameter_groups(nn.LayerNorm(4))] == [0, 0, 0, 2]


def steps(optimizer, network, count) -> None:
    for i in range(count):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(i)
        tokens, text = torch.randint(24, (2, 2, 2, 2), generator=generator), torch.randn(2, 3, 12, generator=generator)
        embedding = TextEmbedding(text, torch.ones(2, 3, dtype=torch.bool))
        optimizer.step(lambda: network(tokens, embedding).square().mean().backward())  # noqa: B023


def test_muon_updates_hidden_matrices_orthogonally_and_adamw_the_rest():
    network = transformer()
    start, twin = copy.deepcopy(network.state_dict()), copy.deepcopy(network)
    steps(MuonAdamW(parameter_groups(network), lr=0.01, weight_decay=0.0), network, 1)
    steps(torch.optim.AdamW(parameter_groups(twin), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0), twin, 1)
    moved = network.state_dict()
    for name, by_adamw in twin.named_parameters():
        if name.startswith("blocks") and by_adamw.ndim == 2 and (moved[name] != start[name]).any():
            sizes = torch.linalg.svdvals(moved[name] - start[name])
            assert sizes[3] > 0.5 * sizes[0], name
        else:
            assert torch.equal(moved[name], by_adamw), name


@pytest.mark.parametrize("elements", [0, 2**20], ids=["one by one", "stacked"])
@pytest.mark.parametrize("units", [True, False], ids=["bf16 units", "no bf16 units"])
def test_muon_is_torchs(elements, units, monkeypatch):
    monkeypatch.setattr(optimization, "_BATCH_ELEMENTS", elements)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": units})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512" if units else "AVX2")
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in [(24, 8), (8, 24), (16, 16), (24, 8), (8, 24)]]
    theirs = [nn.Parameter(weight.detach().clone()) for weight in ours]
    options = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9}
    optimizers = [
        Muon(ours, **options),
        torch.optim.Muon(theirs, **options, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(4):
        starts = [weight.detach().clone() for weight in ours]
        for weight, other, start in zip(ours, theirs, starts, strict=True):
            other.data.copy_(start)
            weight.grad = torch.randn(weight.shape)
            other.grad = weight.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for weight, other, start in zip(ours, theirs, starts, strict=True):
            update, expected = weight.detach() - start, other.detach() - start
            assert (update - expected).norm() < 0.03 * expected.norm()  # torch multiplies in bfloat16


@pytest.mark.parametrize("name", ["instructions", "ATEN_CPU_CAPABILITY"])
def test_muon_multiplies_in_float32_without_bf16_units(name, monkeypatch):
    limited = name == "ATEN_CPU_CAPABILITY"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": limited})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2" if limited else "AVX512")
    matrix = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    exact = orthogonalize(matrix)
    sizes = torch.linalg.svdvals(exact)
    assert sizes.min() > 0.6
    assert sizes.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    diagonal = left.T @ exact @ right.T
    assert (diagonal - diagonal.diag().diag()).abs().max() < 1e-4  # in bfloat16 more than 1e-2


def test_embeddings_have_their_own_learning_rate_and_follow_the_schedule():
    network = transformer()
    optimizer = MuonAdamW(parameter_groups(network), lr=0.01, embedding_lr=8.0)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    schedule.step()
    rates = {bool(group.get("embedding")): group["lr"] for part in optimizer.parts for group in part.param_groups}
    assert rates == {False: pytest.approx(0.005), True: pytest.approx(0.04)}


def test_muon_resumes_exactly_and_follows_a_schedule(tmp_path):
    results = []
    for stop in (4, 2):
        torch.manual_seed(0)
        network = transformer()
        optimizer = MuonAdamW(parameter_groups(network), lr=0.01)
        schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(4):
            if step == stop:
                torch.save([optimizer.state_dict(), schedule.state_dict()], tmp_path / "state.pt")
                optimizer = MuonAdamW(parameter_groups(network), lr=0.01)
                schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
                states = torch.load(tmp_path / "state.pt", weights_only=True)
                optimizer.load_state_dict(states[0])
                schedule.load_state_dict(states[1])
            steps(optimizer, network, 1)
            schedule.step()
        assert {group["lr"] for part in optimizer.parts for group in part.param_groups} == {0.01 / 5}
        results.append(network.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_the_learning_rate_rises_over_the_warmup_and_falls_to_its_floor():
    rates = [warmup_cosine(step, warmup_steps=10, total_steps=110) for step in range(130)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert all(a > b for a, b in pairwise(rates[10:111]))
    assert rates[60] == pytest.approx(0.51)
    assert rates[110:] == [pytest.approx(0.02)] * 20
