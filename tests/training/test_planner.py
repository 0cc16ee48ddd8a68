"""The planner: its figures are those of real steps, and its recommendation follows from them."""

from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from bitsandbytes.optim import AdamW8bit
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from torchao.optim import AdamW8bit as ShardedAdamW8bit

from data import TokenDataModule
from t2v.batch import TextEmbedding
from t2v.errors import UserError
from t2v.generation.sampling import Sampler
from t2v.generation.settings import GenerationSettings
from t2v.losses import L1Loss
from t2v.losses.tokens import token_loss_
from t2v.text import MiniLMTextEncoder
from t2v.torch_private import quantized_parts, storage_id
from t2v.training.optimization import MuonAdamW, parameter_groups
from t2v.training.planner import report, stages
from t2v.training.planner import run as planned_run
from t2v.training.planner.budget import (
    decoding_bytes,
    generation_budget,
    model_sizes,
    optimizer_bytes,
    parameter_counts,
    tensor_bytes,
    training_budget,
    unsharded_parameters,
)
from t2v.training.planner.run import PlannedRun
from t2v.training.planner.stages import transformer_step, vqvae_step
from t2v.training.planner.step import Meter, Step, extrapolate
from t2v.training.transformer import LitVideoTransformer
from t2v.training.vqvae import LitVQVAE
from t2v.transformer.config import AttentionConfig, TextConfig
from t2v.transformer.decoding import Decoder
from t2v.transformer.model import VideoTransformer
from t2v.vqvae.quantizer import VectorQuantizer
from tests.support.configs import read
from tests.support.toys import toy_vqvae

pytestmark = pytest.mark.usefixtures("unchecked_shapes")

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(ROOT.glob("configs/transformer/*.yaml"))
CLIPS, FRAMES, TEXT_LENGTH = 2, 3, 5


def shapes(**changes) -> VideoTransformer:
    """The model of `configs/transformer/shapes.yaml`, on the meta device by default."""
    config = yaml.safe_load((ROOT / "configs/transformer/shapes.yaml").read_text())
    return VideoTransformer.from_config(
        config["model"]["init_args"]["model"]["init_args"] | {"device": "meta"} | changes
    )


def inputs(model: VideoTransformer) -> tuple[torch.Tensor, TextEmbedding, torch.Tensor]:
    tokens = torch.randint(model.vocab_size, (CLIPS, FRAMES, model.grid_size, model.grid_size))
    embedded = torch.randn(CLIPS, TEXT_LENGTH, model.text.dim)
    text = TextEmbedding(embedded, torch.ones(CLIPS, TEXT_LENGTH, dtype=torch.bool))
    return tokens, text, torch.zeros(CLIPS, dtype=torch.bool)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_parameter_counts_of_every_config_sum_to_its_parameters(path):
    config = read(path)["model"]["init_args"]["model"]["init_args"]
    model = VideoTransformer.from_config(config | {"device": "meta"})
    counts = parameter_counts(model)
    assert sum(counts.values()) == sum(parameter.numel() for parameter in model.parameters())
    mlps = sum(parameter.numel() for block in model.blocks for parameter in block.mlp.parameters())
    assert counts["feed-forward"] == mlps
    assert counts["head"] == model.vocab_size * config["dim"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_planned_saved_activations_equal_those_of_a_real_step(precision):
    model = shapes(device="cpu")
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[storage_id(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    tokens, text, drop = inputs(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"), saved_tensors_hooks(keep, keep):
        loss = token_loss_(model(tokens, text, drop), tokens, z_loss=1e-4).objective
    own = {storage_id(tensor) for tensor in model.parameters()}
    planned = transformer_step(model, CLIPS, FRAMES, TEXT_LENGTH, precision, "none", "cpu")
    assert loss.isfinite()
    assert planned.saved == pytest.approx(sum(size for key, size in kept.items() if key not in own), rel=0.02)


@pytest.mark.parametrize("checkpointing", ["none", "attention", "full"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_planned_peaks_and_flops_equal_those_of_a_real_step(precision, checkpointing):
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    model = shapes(device="cpu", checkpointing=checkpointing).to(dtype)
    tokens, text, drop = inputs(model)
    text = TextEmbedding(text.tokens.to(dtype), text.mask)
    with Meter(model) as meter:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            logits = model(tokens, text, drop)
            forward = meter.peak
            meter.restart()
            loss = token_loss_(logits, tokens, z_loss=1e-4).objective
        del logits
        saved, in_loss = meter.live, meter.peak
        meter.restart()
        loss.backward()
    planned = transformer_step(model, CLIPS, FRAMES, TEXT_LENGTH, precision, checkpointing, "cpu")
    assert (*planned[:3], planned.backward) == pytest.approx((saved, forward, in_loss, meter.peak), rel=0.02)
    assert planned.flops == pytest.approx(meter.flops, rel=0.02)


@pytest.mark.parametrize("checkpointing", ["none", "attention", "full"])
@pytest.mark.parametrize(
    ("spatial", "temporal", "gate"),
    [
        (9, 6, True),
        (13, 7, True),
        pytest.param(1, 20, False, marks=pytest.mark.slow),
        pytest.param(0, 12, False, marks=pytest.mark.slow),
        pytest.param(12, 0, True, marks=pytest.mark.slow),
    ],
)
def test_a_step_of_a_deep_model_is_that_of_all_its_layers(spatial, temporal, gate, checkpointing, monkeypatch):
    model = deep_model(spatial, temporal, gate)
    deep = transformer_step(model, 3, 4, TEXT_LENGTH, "bf16-mixed", checkpointing)
    measure_all_layers(monkeypatch)
    assert deep == transformer_step(model, 3, 4, TEXT_LENGTH, "bf16-mixed", checkpointing)


@pytest.mark.parametrize("weights", ["full", "fp8", "int8", "nf4"])
@pytest.mark.parametrize(("spatial", "temporal"), [(9, 6), (13, 7)])
def test_the_generation_of_a_deep_model_takes_what_all_its_layers_take(spatial, temporal, weights, monkeypatch):
    model = deep_model(spatial, temporal, gate=True)
    deep = generation_budget(model, weights, torch.bfloat16, 2, TEXT_LENGTH, guided=True, positions=7)
    measure_all_layers(monkeypatch)
    assert deep == generation_budget(model, weights, torch.bfloat16, 2, TEXT_LENGTH, guided=True, positions=7)


def test_layers_without_a_common_factor_are_planned_from_few(monkeypatch):
    layers: list[int] = []
    monkeypatch.setattr(stages, "measure_step", lambda model, *_: Step(*[layers.append(len(model.blocks)) or 1] * 7))
    transformer_step(deep_model(401, 307, gate=False), 3, 4, TEXT_LENGTH, "bf16-mixed", "none")
    assert len(layers) == 3
    assert max(layers) < 10


def measure_all_layers(monkeypatch) -> None:
    monkeypatch.setattr(stages, "_MEASURED_LAYERS", 100)
    monkeypatch.setattr(stages, "_LARGEST_GROUP", 100)


def deep_model(spatial: int, temporal: int, gate: bool) -> VideoTransformer:
    sizes = {"vocab_size": 64, "grid_size": 4, "dim": 32, "hidden_dim": 64}
    attention, text = AttentionConfig(heads=4, kv_heads=2, window=2), TextConfig(dim=16, gate=gate)
    return VideoTransformer(
        **sizes, spatial_layers=spatial, temporal_layers=temporal, attention=attention, text=text, device="meta"
    )


def test_activation_checkpointing_saves_memory_and_adds_flops():
    levels = [
        transformer_step(shapes(), 4, 8, TEXT_LENGTH, "bf16-mixed", level) for level in ("none", "attention", "full")
    ]
    assert [step.saved for step in levels] == sorted((step.saved for step in levels), reverse=True)
    assert [step.flops for step in levels] == sorted(step.flops for step in levels)
    assert levels[2].flops < 4 / 3 * levels[0].flops


def test_planned_flops_equal_those_that_torch_counts():
    model = shapes(device="cpu")
    tokens, text, drop = inputs(model)
    with FlopCounterMode(display=False) as counter:
        token_loss_(model(tokens, text, drop), tokens).objective.backward()
    planned = transformer_step(model, CLIPS, FRAMES, TEXT_LENGTH, "32-true", "none", "cpu")
    assert planned.flops == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize(
    "build",
    [
        torch.optim.AdamW,
        partial(torch.optim.AdamW, fused=True),
        partial(torch.optim.SGD, momentum=0.9),
        torch.optim.NAdam,  # divides by 1 - a number of its state
        MuonAdamW,
        AdamW8bit,
        ShardedAdamW8bit,
    ],
    ids=["AdamW", "fused", "SGD", "NAdam", "Muon", "bitsandbytes", "torchao"],
)
def test_planned_optimizer_state_equals_that_of_a_real_step(build):
    model = shapes(device="cpu")
    planned = optimizer_bytes(model, build, "32-true", "cpu")
    optimizer = build(parameter_groups(model))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step
        optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    parts = [part for value in states if isinstance(value, torch.Tensor) for part in quantized_parts(value)]
    assert planned.state == pytest.approx(tensor_bytes(parts), abs=4 * len(optimizer.state))  # their numbers of steps


def test_an_optimizer_that_updates_all_parameters_at_once_takes_more_than_a_fused_one():
    model = shapes()
    one, fused = (optimizer_bytes(model, partial(torch.optim.AdamW, fused=how), "32-true") for how in (None, True))
    assert one.state == fused.state
    assert fused.temporary == 0
    assert one.temporary > 0.4 * tensor_bytes(model.parameters())


def test_an_optimizer_for_cuda_graphs_can_be_planned_without_a_gpu():
    model = shapes()
    usual, capturable = (
        optimizer_bytes(model, partial(torch.optim.AdamW, capturable=how), "32-true") for how in (False, True)
    )
    assert capturable == usual


def test_tensor_parallelism_divides_only_the_layers():
    model = shapes()
    step, optimizer = transformer_step(model, 1, 2, TEXT_LENGTH), optimizer_bytes(model, torch.optim.AdamW, "32-true")
    planned = training_budget(model_sizes(model), step, optimizer, "32-true", "FSDP2", 4, 2)
    total = sum(parameter.numel() for parameter in model.parameters())
    layers = sum(parameter.numel() for parameter in model.blocks.parameters())
    assert planned.weights == pytest.approx(4 * (layers / 4 + (total - layers) / 2), abs=8)
    (divided, outside), (layers, same) = (unsharded_parameters(model_sizes(model), size) for size in (2, 1))
    assert (2 * divided, outside) == (layers, same)


def test_fsdp_divides_weights_gradients_and_state_and_ddp_nothing():
    model = shapes()
    step, optimizer = (
        transformer_step(model, 1, 2, TEXT_LENGTH),
        optimizer_bytes(model, torch.optim.AdamW, "bf16-mixed"),
    )
    alone = training_budget(model_sizes(model), step, optimizer, "bf16-mixed")
    sharded = training_budget(model_sizes(model), step, optimizer, "bf16-mixed", "FSDP2", 8)
    replicated = training_budget(model_sizes(model), step, optimizer, "bf16-mixed", "DDP", 8)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert alone[:3] == (4 * count, 4 * count, pytest.approx(8 * count, rel=1e-3))
    assert [8 * each for each in sharded[:3]] == [pytest.approx(each, abs=8) for each in alone[:3]]
    layers, outside = unsharded_parameters(model_sizes(model))
    assert layers + outside < count
    assert sharded.communication == 6 * layers + 8 * outside  # layers are gathered in bfloat16
    assert replicated[:3] == alone[:3]
    assert replicated.communication == alone.gradients
    assert alone.peak == sum(alone[:3]) + alone.activations
    averaged = training_budget(model_sizes(model), step, optimizer, "bf16-mixed", averaged=True)
    assert averaged.peak == alone.peak + alone.weights


@pytest.mark.parametrize("weights", ["full", "fp8", "int8", "nf4"])
def test_planned_generation_has_the_weights_and_caches_of_real_decoding(weights):
    positions = 7
    planned = generation_budget(shapes(), weights, torch.float32, 2, TEXT_LENGTH, guided=True, positions=positions)
    real = shapes(device="cpu").eval()
    embedded = torch.randn(4, TEXT_LENGTH, real.text.dim)
    text = TextEmbedding(embedded, torch.ones(4, TEXT_LENGTH, dtype=torch.bool))
    decoder = Decoder(real, text, positions=positions)
    assert planned.cache == tensor_bytes(tensor for cache in decoder.caches for tensor in (cache.keys, cache.values))
    full = tensor_bytes(real.parameters())
    assert planned.weights == full if weights == "full" else planned.weights < 0.6 * full
    assert planned.temporary >= 4 * positions * real.vocab_size * 4  # the logits of a pass


def test_a_vqvae_step_in_groups_of_frames_saves_less():
    model = toy_vqvae(VectorQuantizer(16, 4), image_size=32, base_channels=16)
    at_once, groups = (vqvae_step(model, 1, 8, frames_at_once=size) for size in (None, 1))
    assert groups.saved < at_once.saved / 3
    assert sum(parameter_counts(model).values()) == sum(parameter.numel() for parameter in model.parameters())
    weights, temporary = decoding_bytes(model, torch.float32, 1)
    assert weights == tensor_bytes([*model.parameters(), *model.buffers()])
    assert 0 < temporary < at_once.saved


def lit(**changes) -> LitVideoTransformer:
    generation = GenerationSettings(Sampler(), frames=FRAMES, guidance=2.0)
    return LitVideoTransformer(shapes(**changes), "none", MiniLMTextEncoder(), generation)


def test_a_report_has_all_sections_and_a_recommendation():
    text = report(lit(), memory=8.0, tflops=100.0)
    assert max(map(len, text.splitlines())) <= 100
    for word in ("feed-forward", "optimizer state (AdamW)", "TFLOP per step", "seconds per step", "nf4"):
        assert word in text
    assert "recommended  32-true, AdamW, one device, activation checkpointing none" in text


def test_a_report_recommends_more_memory_if_nothing_fits():
    assert "recommended  more devices or memory" in report(lit(), memory=0.001)


def test_a_large_batch_is_extrapolated_from_measured_ones(monkeypatch):
    run = PlannedRun(lit(), None, None, "cuda")
    expected = run._measure("bf16-mixed", "none", 12, run.frames)
    long = run._measure("bf16-mixed", "none", 1, 96)
    monkeypatch.setattr(planned_run, "_LINEAR_TOKENS", 24 * run.model.grid_size**2)
    assert run.step("bf16-mixed", "none", 12) == pytest.approx(expected, rel=0.05)
    run.frames = 96
    assert run.step("bf16-mixed", "none", 1) == pytest.approx(long, rel=0.1)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_the_backward_peak_is_extrapolated_although_gradients_dominate_it_in_short_clips(precision):
    attention, text = AttentionConfig(heads=4, kv_heads=2, window=2), TextConfig(32)
    with torch.device("meta"):
        model = VideoTransformer(64, 8, 2048, 3, 3, 6144, attention, text)

    def step(frames: int) -> Step:
        return transformer_step(model, 1, frames, TEXT_LENGTH, precision, "full")

    short, longer, long = step(256), step(320), step(1000)
    assert short.first_backward < short.last_backward
    assert long.first_backward > long.last_backward
    assert extrapolate(short, longer, 64, 680).backward == pytest.approx(long.backward, rel=0.03)


@pytest.mark.slow
def test_a_large_batch_in_groups_of_frames_is_extrapolated_phase_by_phase():
    model = toy_vqvae(VectorQuantizer(16, 4), image_size=32, base_channels=16)
    run = PlannedRun(LitVQVAE(model, [L1Loss()]), None, None, "cuda")
    run.frames = run.frames_at_once = 2
    for clips in (24, 40):  # the loss takes more than the forward pass from some number of clips on
        measured = run._measure("32-true", "frames", clips, 2)
        assert tuple(run.step("32-true", "frames", clips)) == pytest.approx(tuple(measured), rel=0.01)
    setting = run.setting._replace(checkpointing="frames")
    optimizer = run.optimizer("AdamW", "32-true")
    budgets = [
        training_budget(run.sizes, run._measure("32-true", "frames", clips, 2), optimizer, "32-true")
        for clips in (39, 40)
    ]
    assert 39 <= run.largest_batch(setting, (budgets[0].peak + budgets[1].peak) / 2) <= 40


@pytest.mark.slow
def test_a_plan_for_any_number_of_clips_ends():
    data = TokenDataModule("a", "b", frames=10**6, batch_size=10**6)
    assert "extrapolated beyond" in report(lit(), data)


def test_a_plan_refuses_what_training_refuses(capsys):
    import cli

    files = [f"--config={ROOT}/configs/{name}.yaml" for name in ("transformer/shapes", "cluster/fsdp")]
    with pytest.raises(SystemExit):
        cli.main(["plan", *files, "--trainer.devices=8", "--trainer.strategy.tensor_parallel_size=3"])
    assert "tensor_parallel_size=3 must divide the number of devices, 8" in capsys.readouterr().err


def test_a_plan_for_zero_memory_is_rejected():
    with pytest.raises(UserError, match=r"memory=0.*must be greater than 0"):
        report(lit(), memory=0.0)


def test_the_command_prints_the_plan(capsys):
    import cli

    cli.main(["plan", "--config", str(ROOT / "configs/transformer/shapes.yaml"), "--memory", "16", "--tflops", "1"])
    assert "recommended" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_plans_for_devices_that_this_machine_lacks(capsys):
    import cli

    files = [f"--config={ROOT}/configs/{name}.yaml" for name in ("transformer/flare", "cluster/fsdp")]
    cli.main(["plan", *files, "--trainer.devices=8", "--trainer.strategy.tensor_parallel_size=2"])
    printed = capsys.readouterr().out
    assert "FSDP2 × 8, tensor-parallel size 2" in printed
    assert "step         1 batches × data-parallel size 4 = 24,576 tokens" in printed
