"""FSDP2 of one process: the types in which weights are gathered, gradients are summed and activations are computed."""

import copy
import shutil
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from t2v.batch import TextEmbedding
from t2v.compilation import compile_layer
from t2v.errors import UserError
from t2v.losses.tokens import token_loss_
from t2v.training.sharding import ShardedStrategy, shard
from t2v.training.streaming import unsharded
from t2v.training.tensor_parallel import parallelize
from t2v.transformer.decoding import Decoder
from tests.support.cuda_policy import cuda_autocast
from tests.support.toys import TEXT_DIM, VOCABULARY, toy_transformer, toy_vqvae

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    dist.destroy_process_group()


@pytest.mark.parametrize("tp_size", [0, 2, 4])
def test_a_tensor_parallel_size_that_does_not_divide_the_devices_is_refused(tp_size):
    strategy = ShardedStrategy(tp_size)
    strategy.parallel_devices = 3 * [torch.device("cpu")]
    with pytest.raises(UserError, match=f"tensor_parallel_size={tp_size} must divide the number of devices, 3"):
        strategy.setup_environment()


def autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")


def text(dtype: torch.dtype = torch.float32) -> TextEmbedding:
    tokens = torch.randn(2, 5, TEXT_DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    return TextEmbedding(tokens, torch.ones(2, 5, dtype=torch.bool))


def transformer_loss(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (2, 3, 2, 2), generator=generator)
    return token_loss_(model(tokens, text(model.start.dtype)), tokens).objective


def test_tensor_parallel_training_has_the_loss_and_the_gradients_of_one_process(mesh):
    model = toy_transformer()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    plain = copy.deepcopy(model)
    parallelize(model, mesh["tensor_parallel"])
    found, expected = transformer_loss(model), transformer_loss(plain)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    for parameter, own in zip(model.parameters(), plain.parameters(), strict=True):
        if own.grad is not None:
            torch.testing.assert_close(parameter.grad.full_tensor(), own.grad)


def vqvae_loss(model: nn.Module) -> Tensor:
    video = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    torch.manual_seed(0)
    reconstruction, _, loss = model(video.to(next(model.decoder.parameters()).dtype) * 2 - 1)
    return (reconstruction.float() - video).abs().mean() + loss


CASES = {
    "transformer": (toy_transformer, transformer_loss, lambda model: list(model.blocks)),
    "vqvae": (toy_vqvae, vqvae_loss, lambda model: [model.encoder, model.decoder]),
}


@pytest.mark.parametrize("policy", [nullcontext, cuda_autocast], ids=["cpu", "cuda"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("stage", CASES)
def test_types_and_values_of_a_sharded_step(mesh, stage, precision, policy):
    """In bf16-mixed only the layers' weights are gathered in bfloat16; values are those without sharding."""
    build, compute_loss, layers_of = CASES[stage]
    torch.manual_seed(0)
    model = build().to(torch.bfloat16 if precision == "bf16-true" else torch.float32).train()
    model.to(memory_format=torch.contiguous_format)
    alone = copy.deepcopy(model)
    kept = next(model.parameters()).dtype
    shard(layers_of(model), model, mesh, precision)

    gathered: dict[str, set[torch.dtype]] = {"layers": set(), "outside": set()}
    inputs = set()

    def record(layer: nn.Module, args: tuple) -> None:
        gathered["layers"].update(parameter.dtype for parameter in layer.parameters())
        theirs = {id(parameter) for each in layers_of(model) for parameter in each.parameters()}
        outside = {parameter.dtype for parameter in model.parameters() if id(parameter) not in theirs}
        gathered["outside"].update(outside)
        inputs.add(args[0].dtype)

    for layer in layers_of(model):
        layer.register_forward_pre_hook(record)
    with policy():
        for each in (model, alone):
            with autocast(precision):
                loss = compute_loss(each)
            loss.backward()
            each.loss = loss.detach()
    layer_type = torch.bfloat16 if precision == "bf16-mixed" else kept
    assert gathered == {"layers": {layer_type}, "outside": {kept}}
    if stage == "transformer":  # what the layers add to
        assert inputs == {kept}
    assert model.loss.dtype == torch.float32
    assert all(buffer.dtype == torch.float32 for buffer in model.buffers() if buffer.is_floating_point())
    torch.testing.assert_close(model.loss, alone.loss, atol=2e-3 if precision == "bf16-mixed" else 1e-5, rtol=0)
    for (name, parameter), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert isinstance(parameter, DTensor)
        assert parameter.dtype == kept
        if expected.grad is None:  # of what stands for no text
            continue
        assert parameter.grad.dtype == kept
        gradient = parameter.grad.full_tensor().float()
        difference = (gradient - expected.grad.float()).norm()
        assert difference <= (0.05 if precision == "bf16-mixed" else 1e-3) * expected.grad.float().norm() + 1e-5, name


def test_a_sharded_model_generates_in_bfloat16(mesh):
    torch.manual_seed(0)
    model = toy_transformer().eval()
    alone = copy.deepcopy(model)
    shard(list(model.blocks), model, mesh, "bf16-mixed")

    def frames(network: nn.Module) -> Iterator[Tensor]:
        with torch.no_grad(), autocast("bf16-mixed"):
            decoder = Decoder(network, text())
            yield torch.stack([decoder.step(torch.full((2,), token)) for token in range(6)])

    (expected,) = frames(alone)
    (found,) = unsharded(model, frames(model))
    torch.testing.assert_close(found.float(), expected.float(), atol=0.02, rtol=0)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_sharding_twice_changes_nothing(mesh):
    model = toy_transformer()
    for _ in range(2):
        shard(list(model.blocks), model, mesh, "32-true")
    assert sum(isinstance(module, FSDPModule) for module in model.modules()) == 1 + len(model.blocks)


@needs_compiler
def test_hooks_of_sharding_are_outside_of_compiled_layers(mesh):
    """A compiled `nn.Sequential`, as the encoder is, remains one graph; traced hooks would split it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8)), nn.Linear(8, 1))
    alone, x = copy.deepcopy(model), torch.randn(4, 8)
    shard([model[0]], model, mesh, "32-true")
    torch._dynamo.reset()
    counters.clear()
    for _ in range(2):  # the second call changes nothing
        compile_layer(model[0])
    for each in (model, alone):
        each(x).square().sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for parameter, same in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), same.grad)
