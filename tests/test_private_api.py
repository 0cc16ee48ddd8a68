"""Private API of our dependencies: a test here fails, with the reason, when a new version changes it."""

import inspect
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import scalar

from t2v import torch_private
from t2v.training import lightning_private

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Actions(PassThroughProfiler):
    """Records the names of the profiled actions."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def start(self, action_name: str) -> None:
        self.names.add(action_name)


def fit(model: Model, **options: Any) -> Trainer:
    trainer = Trainer(max_steps=2, accelerator="cpu", **QUIET, **options)
    trainer.fit(model, torch.utils.data.DataLoader(torch.ones(3, 1)))
    return trainer


def test_lightning_attaches_a_trainer():
    model = Model()
    assert lightning_private.trainer_of(model) is None, "LightningModule._trainer has changed"
    trainer = fit(model)
    assert lightning_private.trainer_of(model) is trainer, "LightningModule._trainer has changed"


def test_lightning_reads_the_device_mesh_from_the_cleared_attribute():
    model = Model()
    model._device_mesh = "mesh"
    assert model.device_mesh == "mesh", "LightningModule.device_mesh reads another attribute than _device_mesh"
    lightning_private.clear_device_mesh(model)
    assert model.device_mesh is None


@pytest.mark.parametrize(
    ("options", "intervals"),
    [
        ({}, (0, 1, None)),
        ({"every_n_train_steps": 3}, (3, 0, None)),
        ({"train_time_interval": timedelta(minutes=1)}, (0, 0, 60.0)),
    ],
)
def test_lightnings_checkpoints_have_the_intervals_that_are_read(options, intervals):
    assert lightning_private.checkpoint_intervals(ModelCheckpoint(**options)) == intervals


def test_lightnings_strategy_has_the_attributes_that_are_set_and_read():
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False)
    assert strategy._data_parallel_size == 1, "ModelParallelStrategy keeps the data-parallel size elsewhere"
    lightning_private.set_data_parallel_size(strategy, 3)
    assert strategy._data_parallel_size == 3
    assert lightning_private.saves_sharded_checkpoints(strategy) is False
    source = inspect.getsource(ModelParallelStrategy.setup_environment)
    assert "_data_parallel_size" in source, "ModelParallelStrategy builds its mesh from another attribute"


def test_lightning_tells_the_cluster_environment():
    trainer = Trainer(accelerator="cpu", devices=1, **QUIET)
    environment = lightning_private.cluster_environment(trainer)
    assert isinstance(environment, LightningEnvironment), "Trainer._accelerator_connector has changed"


def test_lightnings_moving_average_can_be_started_and_can_skip_a_step():
    callback = EMAWeightAveraging(decay=0.5, use_buffers=False)
    assert lightning_private.average_of(callback) is None, "WeightAveraging._average_model has changed"
    trainer, model = fit(Model()), Model()
    assert trainer.global_step == 2
    lightning_private.start_average(callback, model)
    average = lightning_private.average_of(callback)
    assert average is not None
    assert torch.equal(average.module.layer.weight, model.layer.weight)
    for latest, updates in ((3, 0), (1, 1)):
        lightning_private.skip_average_update(callback, latest)
        callback.on_train_batch_end(trainer, model, None, None, 0)
        assert int(average.n_averaged) == updates, "WeightAveraging decides about updates by another attribute"


def test_lightning_profiles_the_wait_for_the_next_batch():
    actions = Actions()
    fit(Model(), profiler=actions)
    assert lightning_private.FETCH_ACTION in actions.names, f"the names of Lightning's actions are {actions.names}"


@pytest.mark.filterwarnings("ignore")
def test_lightnings_command_line_has_the_parsers_and_the_hook_that_are_used(monkeypatch):
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, subcommand: None)
    options = {"logger": False, "enable_checkpointing": False}
    built = LightningCLI(Model, args=["fit"], trainer_defaults=options, save_config_callback=None)
    parser = lightning_private.command_parser(built, "fit")
    assert isinstance(parser, ArgumentParser), "LightningCLI._subcommand_parsers has changed"
    assert list(inspect.signature(LightningCLI._parse_ckpt_path).parameters) == ["self"], (
        "LightningCLI._parse_ckpt_path, which cli.T2VCLI overrides, has changed"
    )
    assert "_parse_ckpt_path" in inspect.getsource(LightningCLI.__init__), "LightningCLI no longer calls it"


def test_jsonargparse_can_parse_an_incomplete_config():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--number", type=int, required=True)
    assert parser.parse_args([], _skip_validation=True).number is None


def test_lightnings_loops_count_batches_and_epochs_as_resuming_expects():
    loop = fit(Model()).fit_loop
    batches = loop.epoch_loop.batch_progress.current
    assert [getattr(batches, name) for name in ("ready", "started", "processed", "completed")] == [2, 2, 2, 2]
    for counts in (loop.epoch_progress.total, loop.epoch_progress.current):
        assert {"ready", "started", "processed", "completed"} <= set(vars(counts))
    loop.restarting = True
    assert loop.restarting


def test_torch_identifies_storages_without_data():
    first, second = torch.empty(2, 2, device="meta"), torch.empty(2, 2, device="meta")
    assert torch_private.storage_id(first) == torch_private.storage_id(first.view(4))
    assert torch_private.storage_id(first) != torch_private.storage_id(second)


def test_torch_schemas_tell_which_operators_return_new_storages():
    aten = torch.ops.aten
    assert torch_private.makes_new_storage(aten.mm.default)
    assert not torch_private.makes_new_storage(aten.view.default)
    assert not torch_private.makes_new_storage(aten.add_.Tensor)


def test_a_dispatch_mode_sees_the_operators_that_are_counted():
    seen = set()

    class Record(torch_private.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func)
            return func(*args, **(kwargs or {}))

    query = torch.randn(1, 2, 4, 8, requires_grad=True)
    with Record():
        output = nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
        output.sum().item()
        query.to(torch.bfloat16)
        torch_private.backward_under_modes(output.sum())
    packets = {operator.overloadpacket for operator in seen}
    assert {torch_private.ITEM, torch_private.TO_COPY} <= seen
    assert torch_private.CPU_ATTENTION in packets
    assert torch_private.CPU_ATTENTION_BACKWARD in packets, "modes no longer see the backward pass"


def test_modes_see_what_activation_checkpointing_computes_again():
    weight = torch.randn(3, 3, requires_grad=True)
    products = []

    class Count(torch_private.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.mm.default:
                products.append(func)
            return func(*args, **(kwargs or {}))

    with Count():
        loss = checkpoint(lambda x: (x @ weight).sin(), torch.randn(3, 3), use_reentrant=False).sum()
        torch_private.backward_under_modes(loss)
    assert len(products) == 3, "forward, recomputation and gradient of the weight are three products"
    assert weight.grad is not None


@pytest.mark.parametrize(("base", "wrapped"), [(TorchDispatchMode, True), (torch_private.DispatchMode, False)])
def test_a_dispatch_mode_is_not_wrapped_against_compilation(base, wrapped):
    class Mode(base):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    assert hasattr(Mode.__torch_dispatch__, "__wrapped__") == wrapped


def test_function_modes_can_be_left_out():
    class Fail(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            raise AssertionError(func)

    x = torch.ones(2)
    with Fail(), torch_private.DisableTorchFunction():
        assert x.shape == (2,)
    with Fail(), pytest.raises(AssertionError):
        x.sum()


def test_the_fused_rms_norm_equals_the_public_one():
    x, weight = torch.randn(2, 8), torch.randn(8)
    torch.testing.assert_close(torch_private.fused_rms_norm(x, [8], weight, 1e-6), torch.rms_norm(x, [8], weight, 1e-6))


def test_the_product_of_one_row_equals_the_public_one():
    x, weight = torch.randn(1, 1, 16), torch.randn(24, 16)
    torch.testing.assert_close(torch_private.onednn_linear(x, weight), nn.functional.linear(x, weight))


def test_the_attention_operators_of_gpus_exist():
    for packet in torch_private.GPU_ATTENTION_BACKWARDS:
        assert next(iter(packet.default._schema.arguments)).name.startswith("grad"), f"{packet} has other arguments"


def test_dynamo_has_the_recompile_limit_and_the_mark_of_dynamic_sizes():
    limit = torch._dynamo.config.recompile_limit
    try:
        torch_private.configure_compiler(limit + 5)
        assert torch._dynamo.config.recompile_limit == limit + 5
        torch_private.configure_compiler(1)
        assert torch._dynamo.config.recompile_limit == limit + 5
    finally:
        torch._dynamo.config.recompile_limit = limit
    torch_private.mark_dynamic(torch.ones(2, 3), 1)


COMPILED_SOFTMAX = """
import torch
from t2v.torch_private import configure_compiler

configure_compiler()
torch.manual_seed(0)
scores = torch.randn(4, 16)
torch._dynamo.mark_dynamic(scores, 1)
function = torch.compile(lambda scores: (scores.softmax(-1), torch.backends.cpu.get_cpu_capability()))
found, capability = function(scores)
torch.testing.assert_close(found, scores.softmax(-1))
print(capability)
"""


def test_code_that_was_compiled_for_other_instructions_is_not_taken_from_the_cache(tmp_path: Path):
    """An endless loop in code for AVX-512 that a run with AVX2 found in the cache was how this showed."""
    capabilities = []
    for asked in ("avx512", "avx2"):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": asked, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", COMPILED_SOFTMAX]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, ran.stderr
        capabilities.append(ran.stdout.strip())
    if capabilities != ["AVX512", "AVX2"]:
        pytest.skip(f"this processor has {capabilities[0]} only")


def test_modules_tell_which_buffers_are_persistent():
    module = nn.Module()
    module.register_buffer("kept", torch.ones(1))
    module.register_buffer("left_out", torch.ones(1), persistent=False)
    assert torch_private.is_persistent(module, "kept")
    assert not torch_private.is_persistent(module, "left_out")


def test_tensorboards_writer_takes_a_finished_summary(tmp_path):
    writer = SummaryWriter(tmp_path)
    torch_private.add_summary(writer, scalar("value", 1.0), 3)
    writer.close()
    assert b"value" in next(Path(tmp_path).glob("events*")).read_bytes()


def test_parallel_styles_are_applied_by_the_method_that_is_overridden():
    assert list(inspect.signature(ParallelStyle._apply).parameters) == ["self", "module", "device_mesh"]


def test_torchaos_float8_layer_has_the_methods_that_are_used():
    from torchao.float8.float8_linear import Float8Linear

    assert list(inspect.signature(Float8Linear.from_float).parameters)[:2] == ["mod", "config"]
    assert "is_autocast_enabled" in inspect.getsource(Float8Linear.forward), (
        "Float8Linear no longer asks for autocast itself: AutocastFloat8Linear may not be needed"
    )


def test_torchaos_8_bit_optimizer_has_the_method_and_the_state_that_are_used():
    from torchao.optim import AdamW8bit

    weight = torch.nn.Parameter(torch.zeros(64, 64))
    parts = torch_private.quantized_moments(AdamW8bit([weight]), weight)
    assert [(part.dtype, part.numel()) for part in parts] == 2 * [
        (torch.uint8, 4096),
        (torch.float32, 16),
        (torch.float32, 256),
    ]


def test_vector_quantize_pytorch_has_the_function_that_its_package_does_not_export():
    from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

    assert list(inspect.signature(rotate_to).parameters) == ["src", "tgt"]


@pytest.mark.parametrize("folder", ["t2v", "callbacks"])
def test_no_other_file_imports_a_private_module(folder):
    root = Path(__file__).parents[1] / folder
    private = ("torch._", "torch.utils._", "lightning.pytorch._", "transformers._")
    for path in root.rglob("*.py"):
        if path.name == "torch_private.py":
            continue
        lines = [line for line in path.read_text().splitlines() if line.lstrip().startswith(("import ", "from "))]
        found = [line for line in lines if any(name in line for name in private)]
        assert not found, f"{path.relative_to(root.parent)}: {found}: move it to the file for private API"
