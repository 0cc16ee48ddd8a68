"""Small layers of the transformer against PyTorch's own operators."""

import pytest
import torch
import torch.nn.functional as F

from t2v.transformer.layers import Linear, RMSNorm, SwiGLU, linear


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-3)]
)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_the_training_path_of_rms_norm_equals_pytorch_in_double_precision(dtype, tolerance, autocast):
    torch.manual_seed(0)
    norm = RMSNorm(16).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = (torch.randn(2, 3, 5, 16) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]).to(dtype)
    x, gradient = x.transpose(1, 2).requires_grad_(), torch.randn(2, 5, 3, 16).to(dtype)
    exact_x, exact_weight = (each.detach().double().requires_grad_() for each in (x, norm.weight))
    exact = F.rms_norm(exact_x, (16,), exact_weight, norm.eps)
    exact.backward(gradient.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = norm(x)
        y.backward(gradient)
    assert y.dtype == x.grad.dtype == norm.weight.grad.dtype == dtype
    for found, expected in ((y, exact), (x.grad, exact_x.grad), (norm.weight.grad, exact_weight.grad)):
        scale = expected.abs().amax(-1, keepdim=True)
        assert ((found.double() - expected) / scale).abs().max() < tolerance


def test_rms_norm_of_zeros_has_a_finite_gradient():
    x = torch.zeros(2, 4, requires_grad=True)
    RMSNorm(4)(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((2, 4), 1e3))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]
)
def test_swiglu_equals_its_definition_in_double_precision(dtype, tolerance):
    torch.manual_seed(0)
    layer = SwiGLU(6, 8, groups=2).to(dtype)
    x, gradient = torch.randn(2, 3, 6, dtype=dtype, requires_grad=True), torch.randn(2, 3, 6, dtype=dtype)
    layer(x).backward(gradient)
    inputs = x, layer.gate_up.weight, layer.out.weight
    exact = [each.detach().double().requires_grad_() for each in inputs]
    (gate_0, up_0), (gate_1, up_1) = ((exact[0] @ exact[1].t()).split(4, dim=-1)[i : i + 2] for i in (0, 2))
    hidden = torch.cat([F.silu(gate_0) * up_0, F.silu(gate_1) * up_1], dim=-1)
    (hidden @ exact[2].t()).backward(gradient.double())
    for found, expected in zip(inputs, exact, strict=True):
        assert ((found.grad.double() - expected.grad) / expected.grad.abs().max()).abs().max() < tolerance


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("shape", [(0, 2), (1, 1), (2, 1), (2, 3), (1, 8), (3, 3), (2, 130)], ids=str)
@pytest.mark.parametrize("width", [24, 512])
def test_products_of_any_number_of_rows_equal_those_of_pytorch(shape, width, compiled):
    torch.manual_seed(0)
    x, weight = torch.randn(*shape, width), torch.randn(width + 4, width)
    function = torch.compile(linear, dynamic=False) if compiled else linear
    with torch.inference_mode():
        found = function(x, weight)
    torch.testing.assert_close(found, F.linear(x.double(), weight.double()).float(), atol=1e-4, rtol=1e-4)


def test_the_product_of_one_row_has_a_gradient():
    layer, x = Linear(8, 4), torch.randn(1, 1, 8, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad.flatten(), layer.weight.detach().sum(0))
    torch.testing.assert_close(layer.weight.grad, x.detach()[0].expand(4, 8))


def test_compiled_products_of_a_part_of_a_tensor_equal_those_of_pytorch():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 4, 24), torch.randn(20, 24)

    def product(x: torch.Tensor) -> torch.Tensor:
        return linear(F.rms_norm(x, (24,))[:, 2:3], weight)

    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(product, dynamic=False)(x), product(x), atol=1e-4, rtol=1e-4)
