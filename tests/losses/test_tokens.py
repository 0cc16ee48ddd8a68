"""The loss of the transformer: values, gradients, and that it works in the memory of the logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from t2v.losses.tokens import token_loss_

CODES = 32


@pytest.mark.parametrize("rows", [5, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("smoothing", "weight"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.3), (0.1, 0.01)])
def test_the_loss_and_its_gradient_equal_the_formula(rows, dtype, smoothing, weight):
    logits = (3 * torch.randn(rows, CODES)).to(dtype).requires_grad_()
    tokens = torch.randint(CODES, (rows,))
    log_z = logits.float().logsumexp(-1)
    expected = F.cross_entropy(logits.float(), tokens, label_smoothing=smoothing) + weight * (log_z**2).mean()
    (gradient,) = torch.autograd.grad(expected, logits)
    found = token_loss_(logits * 1, tokens, smoothing, weight)
    torch.testing.assert_close(found.objective, expected)
    torch.testing.assert_close(found.cross_entropy, F.cross_entropy(logits.float(), tokens))
    torch.testing.assert_close(found.z_loss, (log_z**2).mean())
    torch.testing.assert_close(found.accuracy, (logits.argmax(-1) == tokens).float().mean())
    (2 * found.objective).backward()
    torch.testing.assert_close(logits.grad, 2 * gradient)


@pytest.mark.parametrize(("device", "groups"), [("cpu", 16), ("meta", 2)])
def test_a_gpu_gets_few_large_kernels(device, groups):
    """The meta device stands for a GPU: it has no cache for which the rows must be few."""
    softmaxes = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            softmaxes.extend([func] * (func is torch.ops.aten._log_softmax.default))
            return func(*args, **(kwargs or {}))

    with Count():
        token_loss_(torch.empty(2048, CODES, device=device), torch.zeros(2048, dtype=torch.long, device=device))
    assert len(softmaxes) == groups


def test_logits_are_not_modified_without_a_gradient():
    logits = torch.randn(2, 3, 2, 2, CODES)
    before = logits.clone()
    token_loss_(logits, torch.randint(CODES, (2, 3, 2, 2)))
    assert torch.equal(logits, before)


def test_z_loss_keeps_logits_small_and_smoothing_limits_the_probabilities():
    tokens = torch.randint(CODES, (64,))
    sizes = []
    for options in ((0.0, 0.0), (0.0, 0.1), (0.2, 0.0)):
        logits = torch.full((64, CODES), 2.0, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=0.2)
        for _ in range(100):
            optimizer.zero_grad()
            token_loss_(logits * 1, tokens, *options).objective.backward()
            optimizer.step()
        sizes.append((logits.logsumexp(-1).abs().mean().item(), logits.softmax(-1).amax(-1).mean().item()))
    (plain_z, plain_p), (z_loss_z, _), (_, smoothed_p) = sizes
    assert z_loss_z < 0.2 * plain_z
    assert plain_p > 0.99
    assert smoothed_p == pytest.approx(0.8 + 0.2 / CODES, abs=0.02)


def test_logits_that_require_a_gradient_are_overwritten_by_it():
    inputs = torch.randn(300, CODES, requires_grad=True)
    tokens = torch.randint(CODES, (300,))
    logits = inputs * 1
    expected = inputs.detach().softmax(-1) - F.one_hot(tokens, CODES)
    token_loss_(logits, tokens).objective.backward()
    torch.testing.assert_close(inputs.grad, expected / 300)
    torch.testing.assert_close(logits.detach(), expected / 300)


def test_a_copy_keeps_the_logits():
    inputs = torch.randn(5, CODES, requires_grad=True)
    logits = inputs * 1
    before = logits.detach().clone()
    token_loss_(logits.clone(), torch.randint(CODES, (5,))).objective.backward()
    assert torch.equal(logits, before)
