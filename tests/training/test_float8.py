"""The FP8 precision plugin: the converted layers, their numerics, and checkpoints that bfloat16 runs can load."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from torchao.float8.float8_linear import Float8Linear

from callbacks import EMA
from t2v import LitVideoTransformer, VideoTransformer
from t2v.batch import PromptBatch, TextEmbedding, TokenBatch
from t2v.checkpoints.storage import read_checkpoint
from t2v.errors import UserError
from t2v.generation.sampling import Sampler
from t2v.generation.settings import GenerationSettings
from t2v.losses.tokens import token_loss_
from t2v.text import MiniLMTextEncoder
from t2v.training import Float8Precision
from t2v.training.float8 import LAYERS, has_float8
from t2v.training.objective import TokenObjective
from t2v.transformer.config import AttentionConfig, TextConfig
from t2v.transformer.decoding import Decoder
from t2v.vqvae.quantizer import VectorQuantizer
from tests.support import forked
from tests.support.toys import toy_vqvae

ROOT = Path(__file__).parents[2]
CODES = 32
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}


def model(hidden: int = 48, **changes) -> VideoTransformer:
    """A model without parameters that are zero, so that every layer changes the loss."""
    torch.manual_seed(0)
    network = VideoTransformer(CODES, 2, 32, 1, 1, hidden, AttentionConfig(2, 1, window=4), TextConfig(384), **changes)
    for parameter in network.parameters():
        if not parameter.is_meta and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return network


def batch(clips: int = 2) -> TokenBatch:
    generator = torch.Generator().manual_seed(1)
    embedded = torch.randn(clips, 3, 384, generator=generator)
    text = TextEmbedding(embedded, torch.ones(clips, 3, dtype=torch.bool))
    return TokenBatch(torch.randint(CODES, (clips, 3, 2, 2), generator=generator), text, [""] * clips, [""] * clips)


class Tokens(LightningDataModule):
    """The same batch in every step."""

    def __init__(self, fingerprint: dict) -> None:
        super().__init__()
        self.fingerprint = fingerprint

    def train_dataloader(self) -> DataLoader:
        return DataLoader([batch()] * 4, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return self.train_dataloader()

    def predict_dataloader(self) -> DataLoader:
        return DataLoader([PromptBatch(["a red circle"], [0], ["0"])], batch_size=None)


class Run:
    """A module, its data, and trainers with or without the plugin."""

    def __init__(self, folder: Path, network: VideoTransformer | None = None) -> None:
        torch.manual_seed(0)
        toy_vqvae(VectorQuantizer(CODES, 4)).save_pretrained(folder / "vqvae")
        torch.manual_seed(0)
        self.module = LitVideoTransformer(
            network or model(),
            str(folder / "vqvae"),
            MiniLMTextEncoder(),
            GenerationSettings(Sampler(), frames=3),
            TokenObjective(caption_dropout=0.0),
        )
        self.data = Tokens(
            {
                "tokenizer": self.module.tokenizer.fingerprint(),
                "text_encoder": self.module.text_encoder.name,
                "fps": 8.0,
            }
        )

    def trainer(self, *plugins: Float8Precision, steps: int = 3, **options) -> Trainer:
        return Trainer(
            accelerator="cpu", max_steps=steps, num_sanity_val_steps=0, plugins=list(plugins), **QUIET, **options
        )

    def fit(self, *plugins: Float8Precision, ckpt_path: Path | None = None, **options) -> Trainer:
        trainer = self.trainer(*plugins, **options)
        trainer.fit(self.module, self.data, ckpt_path=ckpt_path, weights_only=True)
        return trainer


def converted(network: nn.Module) -> dict[str, Float8Linear]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, Float8Linear)}


def loss_and_gradients(network: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    clips = batch()
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(clips.tokens, clips.text, torch.tensor([True, False]))
        loss = token_loss_(logits, clips.tokens).objective
    names, parameters = zip(*network.named_parameters(), strict=True)
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_the_layers_of_the_blocks_are_converted_and_used_in_training_and_decoding(recipe, capsys):
    network = model()
    loss, gradients = loss_and_gradients(network)
    Float8Precision(recipe).convert_module(network)
    printed = capsys.readouterr().out
    used: list[str] = []
    for name, layer in converted(network).items():
        layer.register_forward_pre_hook(lambda *_, name=name: used.append(name))
    expected = {f"blocks.{i}.{layer.removeprefix('blocks.*.')}" for i in range(2) for layer in LAYERS}
    assert set(converted(network)) == expected
    assert recipe in printed
    assert "emulated" in printed
    assert "blocks.*.attention.query_key_value: 2 layers, 64×32" in printed

    found, found_gradients = loss_and_gradients(network)
    assert set(used) == expected
    torch.testing.assert_close(found, loss, atol=0.01, rtol=0)
    for name, gradient in gradients.items():
        assert found_gradients[name].dtype == gradient.dtype == torch.float32
        assert (found_gradients[name] - gradient).norm() < gradient.norm(), name
    rounded = {name for name in gradients if "_norm" not in name and name.startswith("blocks")}
    assert all(not torch.equal(gradients[name], found_gradients[name]) for name in rounded)

    used.clear()
    clip = batch(1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = network(clip.tokens, clip.text).flatten(1, 3)
        decoder = Decoder(network, clip.text)
        steps = [decoder.step(token) for token in (None, *clip.tokens.flatten(1)[:, :-1].unbind(1))]
    assert used.count("blocks.1.mlp.out") == 1 + logits.shape[1]
    torch.testing.assert_close(torch.stack(steps, dim=1).float(), logits.float(), atol=0.02, rtol=0)


def test_unsupported_sizes_and_the_head_are_left_in_bfloat16_and_listed(capsys):
    network = model(hidden=40)
    Float8Precision(layers=("blocks.*.mlp.*", "head")).convert_module(network)
    assert set(converted(network)) == {"blocks.0.mlp.gate_up", "blocks.1.mlp.gate_up"}
    printed = capsys.readouterr().out
    assert "bfloat16: blocks.*.mlp.out: 2 layers, 32×40 are not both multiples of 16" in printed
    assert "bfloat16: head: 1 layer" in printed


@pytest.mark.parametrize(
    ("network", "layers", "message"),
    [
        (model, ("blocks.*.attn.*",), r"'blocks\.\*\.attn\.\*', since VideoTransformer has no such linear .*mlp"),
        (model, ("head",), "can convert no layer of VideoTransformer .*head.*bf16-mixed"),
        (toy_vqvae, LAYERS, "VQVAE has no"),
    ],
)
def test_a_plugin_that_would_convert_no_layer_is_rejected(network, layers, message):
    with pytest.raises(UserError, match=message):
        Float8Precision(layers=layers).convert_module(network())


def test_an_unknown_recipe_is_rejected():
    with pytest.raises(UserError, match="recipe=blockwise of Float8Precision must be tensorwise or rowwise"):
        # Type checks, where they are on, would reject it before.
        inspect.unwrap(Float8Precision.__init__)(object.__new__(Float8Precision), "blockwise")


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)])
def test_only_devices_without_fp8_are_emulated(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert has_float8(torch.device("cuda")) is expected
    assert not has_float8(torch.device("cpu"))


@pytest.mark.parametrize("checkpointing", ["attention", "full"])
def test_activation_checkpointing_does_not_change_the_gradients(checkpointing):
    networks = [model(), model(checkpointing=checkpointing)]
    for network in networks:
        Float8Precision().convert_module(network)
    (loss, gradients), (recomputed, found) = (loss_and_gradients(network) for network in networks)
    assert torch.equal(loss, recomputed)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, found[name]), name


COMPILED = """
import sys
import torch
from t2v.training import Float8Precision
from tests.training.test_float8 import loss_and_gradients, model

network, plain = model(checkpointing=sys.argv[1]), model()
for block in network.blocks:  # Inductor's code has other rounding
    block.compile(fullgraph=True, backend="aot_eager")
for each in (network, plain):
    Float8Precision().convert_module(each)
found, found_gradients = loss_and_gradients(network)
loss, gradients = loss_and_gradients(plain)
torch.testing.assert_close(found, loss)
for name, gradient in gradients.items():
    torch.testing.assert_close(found_gradients[name], gradient, msg=name)
"""


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_compiled_layers_have_the_same_gradients(checkpointing):
    done = forked.run("-c", COMPILED, checkpointing)  # the checks of shapes cannot be compiled
    assert done.returncode == 0, done.stderr


def test_checkpoints_of_fp8_and_bfloat16_runs_are_interchangeable(tmp_path):
    run = Run(tmp_path)
    before = {name: (value.dtype, value.shape) for name, value in run.module.state_dict().items()}
    run.fit(Float8Precision()).save_checkpoint(tmp_path / "fp8.ckpt")
    saved = torch.load(tmp_path / "fp8.ckpt", weights_only=True)["state_dict"]
    assert {name: (value.dtype, value.shape) for name, value in saved.items()} == before
    assert len(converted(run.module)) == 12
    assert run.trainer(Float8Precision()).validate(run.module, run.data, verbose=False)[0]["val/loss"] > 0

    plain = Run(tmp_path)
    trainer = plain.fit(ckpt_path=tmp_path / "fp8.ckpt", steps=5, precision="bf16-mixed")
    assert not converted(plain.module)
    trainer.save_checkpoint(tmp_path / "bf16.ckpt")

    resumed = Run(tmp_path)
    trainer = resumed.fit(Float8Precision(), ckpt_path=tmp_path / "bf16.ckpt", steps=7)
    assert trainer.global_step == 7
    assert len(converted(resumed.module)) == 12


def test_prediction_and_moving_average_in_fp8(tmp_path):
    run = Run(tmp_path, model(device="meta"))
    run.fit(Float8Precision(), callbacks=[EMA(decay=0.5)])
    (videos,) = run.trainer(Float8Precision()).predict(run.module, run.data)
    frames = list(videos.frames)
    assert len(frames) == 3
    assert frames[0].dtype == torch.uint8


SHARDED = """
import sys
from pathlib import Path
from lightning.pytorch import Trainer
from t2v.training import Float8Precision
from t2v.training.sharding import ShardedStrategy
from tests.training.test_float8 import QUIET, Run, converted

folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
run = Run(folder)
strategy = ShardedStrategy() if ranks else "auto"
trainer = Trainer(
    accelerator="cpu", devices=max(ranks, 1), strategy=strategy, max_steps=3, plugins=[Float8Precision()],
    num_sanity_val_steps=0, gradient_clip_val=1.0, limit_val_batches=0, **QUIET,
)
trainer.fit(run.module, run.data)
assert len(converted(run.module)) == 12
trainer.save_checkpoint(folder / "last.ckpt")
"""


@pytest.mark.slow
def test_fp8_training_is_the_same_on_one_and_on_two_ranks_with_sharded_weights(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SHARDED)
    weights = []
    for ranks in ("0", "1", "2"):  # all ranks get the same batches, so that the mean gradient is that of one rank
        folder = tmp_path / ranks
        folder.mkdir()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(
            [sys.executable, "-W", "ignore", script, folder, ranks], env=environment, check=True, timeout=300
        )
        weights.append(read_checkpoint(str(folder / "last.ckpt"))["state_dict"])
    unsharded, one, two = weights
    assert unsharded.keys() == one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-6, rtol=1e-5, msg=name)
    # Sharded weights are gathered in bfloat16 before they are rounded to 8 bits, which changes small gradients.
    begin = Run(tmp_path).module.state_dict()
    changes = [torch.cat([(each[name] - begin[name]).flatten() for name in one]) for each in (unsharded, one)]
    assert torch.cosine_similarity(*changes, dim=0) > 0.9


def test_converting_a_sharded_module_is_rejected():
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(16, 16))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(network, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(UserError, match=r"Sequential is sharded.*convert_module\(self\) in configure_model before"):
            Float8Precision(layers=("0",)).convert_module(network)
    finally:
        torch.distributed.destroy_process_group()
