"""What both stages share of their optimisation: which weights decay, and the learning rate over a run."""

from itertools import pairwise

import pytest
from torch import nn

from t2v import VQVAE, VideoTransformer
from t2v.optimization import parameter_groups, warmup_cosine
from t2v.vqvae.quantizer import VectorQuantizer


def transformer(**changes) -> VideoTransformer:
    return VideoTransformer(24, 2, 32, 1, 1, 4, 2, 48, 12, 4, **changes)


def vqvae() -> VQVAE:
    return VQVAE(16, 8, (1, 2), 1, 3, 1, 1, 2, 2, quantizer=VectorQuantizer(32, 4))


@pytest.mark.parametrize("build", [transformer, vqvae])
def test_every_trained_parameter_is_in_one_group_with_the_decay_that_is_due(build):
    network = build()
    next(network.parameters()).requires_grad_(False)
    decayed, kept = ({id(p) for p in group["params"]} for group in parameter_groups(network))
    assert parameter_groups(network)[0].keys() == {"params"}  # the optimizer's own decay
    assert parameter_groups(network)[1]["weight_decay"] == 0.0
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in parameter_groups(network)) == len(named)
    for name, parameter in named.items():
        plain = "embedding" not in name and "norm" not in name and not name.endswith("bias") and parameter.ndim > 1
        assert (id(parameter) in decayed, id(parameter) in kept) == (plain, not plain), name


def test_embeddings_do_not_decay_and_a_tied_head_is_one_of_them():
    for tied in (False, True):
        model = transformer(tied_head=tied)
        decayed, kept = ([id(p) for p in group["params"]] for group in parameter_groups(model))
        assert id(model.token_embedding.weight) in kept
        assert id(model.previous_frame.embedding.weight) in kept
        assert tied or id(model.head.weight) in decayed
        assert len(decayed) + len(kept) == len(list(model.parameters()))


def test_a_network_without_matrices_has_nothing_to_decay():
    decayed, kept = parameter_groups(nn.LayerNorm(4))
    assert (len(decayed["params"]), len(kept["params"])) == (0, 2)


def test_the_learning_rate_rises_over_the_warmup_and_falls_to_its_floor():
    rates = [warmup_cosine(step, warmup_steps=10, total_steps=110) for step in range(130)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert all(a > b for a, b in pairwise(rates[10:111]))
    assert rates[60] == pytest.approx(0.51)
    assert rates[110:] == [pytest.approx(0.02)] * 20
