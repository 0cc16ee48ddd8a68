"""Training the transformer: the objective, and models that are built on the meta device."""

import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from callbacks import EMA
from data.plan import Bucket
from t2v import LitVideoTransformer, VideoTransformer
from t2v.batch import TextEmbedding, TokenBatch
from t2v.errors import UserError
from t2v.generation.sampling import Sampler
from t2v.generation.settings import GenerationSettings
from t2v.text import MiniLMTextEncoder
from t2v.training.lightning_private import average_of
from t2v.training.objective import TokenObjective
from t2v.transformer.config import AttentionConfig, TextConfig
from tests.support.toys import toy_vqvae

ROOT = Path(__file__).parents[2]
CODES = 32


def model(**changes) -> VideoTransformer:
    torch.manual_seed(0)
    return VideoTransformer(CODES, 2, 16, 1, 1, 24, AttentionConfig(2, 1, window=4), TextConfig(384), **changes)


def module(
    network: VideoTransformer | None = None, codebook_embeddings: bool = False, **objective
) -> LitVideoTransformer:
    generation = GenerationSettings(Sampler(), frames=3)
    options = TokenObjective(**objective), codebook_embeddings
    return LitVideoTransformer(network or model(), "none", MiniLMTextEncoder(), generation, *options)


def batch(clips: int = 2) -> TokenBatch:
    text = TextEmbedding(torch.randn(clips, 3, 384), torch.ones(clips, 3, dtype=torch.bool))
    return TokenBatch(torch.randint(CODES, (clips, 3, 2, 2)), text, [""] * clips, [""] * clips)


class Tokens(LightningDataModule):
    """The same batch in every step, with a fingerprint."""

    def __init__(self, fingerprint: dict, frames: int = 3, buckets: tuple[Bucket, ...] = ()) -> None:
        super().__init__()
        self.frames, self.buckets = frames, buckets
        self.fingerprint = fingerprint
        self.batch = batch()

    def _loader(self) -> DataLoader:
        return DataLoader([self.batch] * 3, batch_size=None)

    train_dataloader = val_dataloader = _loader


def fit(
    built: LitVideoTransformer, folder, steps: int = 2, frames: int = 3, buckets: tuple[Bucket, ...] = (), **options
) -> Trainer:
    torch.manual_seed(0)
    vqvae = toy_vqvae()
    vqvae.quantizer.codes.normal_()
    vqvae.save_pretrained(folder / "vqvae")
    built.tokenizer_path = str(folder / "vqvae")
    fingerprint = {"tokenizer": built.tokenizer.fingerprint(), "text_encoder": built.text_encoder.name}
    tokens = Tokens(fingerprint, frames, buckets)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(max_steps=steps, accelerator="cpu", logger=False, num_sanity_val_steps=0, **quiet, **options)
    trainer.fit(built, datamodule=tokens)
    return trainer


def train_once(built: LitVideoTransformer, clips: TokenBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the input tokens of the model in a training step, its logits, and the loss."""
    recorded = []
    hook = built.model.register_forward_hook(lambda _, inputs, logits: recorded.extend([inputs[0], logits.clone()]))
    loss = built.training_step(clips, 0)
    hook.remove()
    return recorded[0], recorded[1], loss


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_corruption_replaces_a_fraction_of_the_input_by_uniform_codes_and_no_target():
    clips = batch(500)
    assert torch.equal(train_once(module(), clips)[0], clips.tokens)
    tokens = clips.tokens.clone()
    corrupted, logits, loss = train_once(module(corruption=0.25), clips)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 3), tokens.flatten()))
    assert torch.equal(clips.tokens, tokens)
    changed = corrupted != tokens
    assert changed.float().mean() == pytest.approx(0.25 * (1 - 1 / CODES), abs=0.02)
    assert changed.float().mean(0).amin() > 0.15  # at every position
    counts = corrupted[changed].bincount(minlength=CODES)
    assert counts.min() > 0.5 * counts.float().mean()
    assert counts.max() < 1.5 * counts.float().mean()


def test_validation_is_plain_cross_entropy_with_any_objective(tmp_path):
    options = {"label_smoothing": 0.3, "z_loss": 0.5, "corruption": 0.5, "caption_dropout": 0.9}
    built = module(**options)
    trainer = fit(built, tmp_path, steps=3)
    clips = trainer.datamodule.batch
    with torch.no_grad():
        logits = built.model(clips.tokens, clips.text)
    expected = F.cross_entropy(logits.flatten(0, 3), clips.tokens.flatten())
    torch.testing.assert_close(trainer.callback_metrics["val/loss"], expected)
    torch.testing.assert_close(trainer.callback_metrics["val/perplexity"], expected.exp())


def test_training_logs_the_plain_cross_entropy_and_the_added_terms(tmp_path):
    extra = {"train/objective", "train/z_loss"}
    plain = fit(module(caption_dropout=0.0), tmp_path, steps=1)
    assert not extra & set(plain.callback_metrics)
    built = module(label_smoothing=0.3, z_loss=0.5, caption_dropout=0.0)
    logged = fit(built, tmp_path, steps=1).callback_metrics
    torch.testing.assert_close(logged["train/loss"], plain.callback_metrics["train/loss"])
    loss, objective, z_loss = (logged[f"train/{name}"].item() for name in ("loss", "objective", "z_loss"))
    assert z_loss == pytest.approx(math.log(CODES) ** 2, rel=0.1)  # logits of a new model are near zero
    assert objective - loss == pytest.approx(0.5 * z_loss, rel=0.05)


@pytest.mark.parametrize(
    ("generated", "frames", "buckets", "warned"),
    [
        (5, 3, (), True),
        (300, 3, (), True),
        (3, 3, (), False),
        (300, 4, (), False),
        (300, 3, (2, 4), False),
        (5, 8, (2, 3), True),
    ],
)
def test_fit_warns_of_clips_shorter_than_the_window_and_the_videos(tmp_path, generated, frames, buckets, warned):
    built = module()
    built.generation = GenerationSettings(Sampler(), frames=generated)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(built, tmp_path, steps=1, frames=frames, buckets=tuple(Bucket(length, 1) for length in buckets))
    messages = [str(each.message) for each in caught if "training clips" in str(each.message)]
    assert len(messages) == (1 if warned else 0)
    if warned:
        assert f"training clips have 3 frames, but generation.frames={generated} and attention.window=4" in messages[0]
        assert "data.frames" in messages[0]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("corruption", 1.0, r"corruption=1\.0 must lie in \[0, 1\) \(objective\)"),
        ("corruption", -0.1, r"corruption=-0\.1 must lie in \[0, 1\) \(objective\)"),
        ("label_smoothing", 1.5, r"label_smoothing=1\.5 must lie in \[0, 1\) \(objective\)"),
        ("label_smoothing", math.nan, r"label_smoothing=nan must lie in \[0, 1\) \(objective\)"),
        ("z_loss", -1e-4, r"z_loss=-0\.0001 must be at least 0 \(objective\)"),
        ("z_loss", math.inf, r"z_loss=inf must be at least 0 and finite \(objective\)"),
    ],
)
def test_options_out_of_range_are_rejected(option, value, message):
    with pytest.raises(UserError, match=message):
        module(**{option: value})


def test_a_model_built_on_meta_gets_the_same_weights_as_one_built_directly():
    built = module(model(device="meta"))
    torch.manual_seed(0)
    built.configure_model()
    expected = model().state_dict()
    assert built.model.state_dict().keys() == expected.keys()
    for name, value in built.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    weights = [parameter.data_ptr() for parameter in built.model.parameters()]
    built.configure_model()
    assert [parameter.data_ptr() for parameter in built.model.parameters()] == weights  # a second call changes nothing


def test_training_can_start_from_a_model_on_meta(tmp_path):
    direct, deferred = module(), module(model(device="meta"))
    for built in (direct, deferred):
        fit(built, tmp_path)
    shapes = {name: (p.shape, p.dtype, p.device.type) for name, p in direct.model.named_parameters()}
    assert {name: (p.shape, p.dtype, p.device.type) for name, p in deferred.model.named_parameters()} == shapes


def test_bf16_true_trains_a_model_built_on_meta(tmp_path):
    built = module(model(device="meta"))
    fit(built, tmp_path, precision="bf16-true")
    assert {parameter.dtype for parameter in built.model.parameters()} == {torch.bfloat16}
    assert all(parameter.isfinite().all() for parameter in built.model.parameters())


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_a_moving_average_of_a_model_built_on_meta(tmp_path):
    built, average = module(model(device="meta")), EMA(decay=0.5)
    fit(built, tmp_path, steps=3, callbacks=[average])
    name, trained = next(iter(built.model.named_parameters()))
    kept = dict(average_of(average).module.model.named_parameters())[name]
    assert not kept.is_meta
    assert not torch.equal(kept, trained)
    torch.testing.assert_close(kept, trained, atol=0.01, rtol=0)


def test_a_checkpoint_replaces_the_initial_weights(tmp_path):
    direct = module()
    fit(direct, tmp_path).save_checkpoint(tmp_path / "last.ckpt")
    deferred = module(model(device="meta"))
    tokens = Tokens(direct.fingerprint)
    deferred.tokenizer_path = direct.tokenizer_path
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.validate(deferred, tokens, ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=True)
    for name, value in deferred.model.state_dict().items():
        assert torch.equal(value, direct.model.state_dict()[name]), name


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_embeddings_begin_as_projections_of_the_codes_but_not_those_of_a_trained_model(device, tmp_path):
    built = module(model(device=device), codebook_embeddings=True)
    fit(built, tmp_path, steps=0)
    codes = F.normalize(built.tokenizer.quantizer.codes, dim=-1)
    for weight in (built.model.token_embedding.weight, built.model.previous_frame.embedding.weight):
        solution = torch.linalg.lstsq(codes, weight.detach()).solution
        torch.testing.assert_close(codes @ solution, weight.detach(), atol=1e-4, rtol=0)
        assert weight.std() > 0.1
    trainer = fit(built, tmp_path, steps=2)
    trained = built.model.token_embedding.weight.detach().clone()
    fit(built, tmp_path, steps=0)
    assert torch.equal(built.model.token_embedding.weight, trained)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = module(model(device=device), codebook_embeddings=True)
    resumed.tokenizer_path = built.tokenizer_path
    again = Trainer(max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    again.fit(resumed, datamodule=Tokens(built.fingerprint), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(resumed.model.token_embedding.weight, trained)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_embeddings_are_the_same_in_each_type(dtype):
    codes, embeddings = torch.randn(CODES, 4), []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            built = model()
            built.initialize_embeddings(codes)
            embeddings.append(built.token_embedding.weight.detach())
        finally:
            torch.set_default_dtype(torch.float32)
    assert embeddings[1].dtype == dtype
    torch.testing.assert_close(embeddings[1], embeddings[0], atol=1e-2, rtol=1e-2, check_dtype=False)


RANK = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from t2v import LitVideoTransformer, VideoTransformer
from t2v.batch import TextEmbedding, TokenBatch
from t2v.generation.sampling import Sampler
from t2v.generation.settings import GenerationSettings
from t2v.text import MiniLMTextEncoder
from t2v.training.objective import TokenObjective
from t2v.transformer.config import AttentionConfig, TextConfig

rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if ranks > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
clips = torch.randint(32, (4, 3, 2, 2), generator=torch.Generator().manual_seed(1))
text = torch.randn(4, 2, 384, generator=torch.Generator().manual_seed(2))
mine = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
embedded = TextEmbedding(text[mine], torch.ones(4, 2, dtype=torch.bool)[mine])
objective = TokenObjective(caption_dropout=0.0, z_loss=0.1)
for device in ("cpu", "meta"):
    torch.manual_seed(0)
    network = VideoTransformer(32, 2, 16, 1, 1, 24, AttentionConfig(2, 1, window=4), TextConfig(384), device=device)
    built = LitVideoTransformer(network, "none", MiniLMTextEncoder(), GenerationSettings(Sampler(), 3), objective)
    built._device_mesh = mesh if ranks > 1 else None
    built.configure_model()
    built.training_step(TokenBatch(clips[mine], embedded, [], []), 0).backward()
    full, local = (lambda x: x, lambda x: x) if ranks == 1 else (lambda x: x.full_tensor(), lambda x: x.to_local())
    weights = {name: (full(p.detach()), full(p.grad)) for name, p in built.model.named_parameters()}
    torch.save((weights, sum(local(p).numel() for p in built.model.parameters())), f"{folder}/{device}{rank}of{ranks}")
"""


@pytest.mark.slow
def test_two_ranks_with_sharded_weights_have_the_gradients_of_one(tmp_path):
    jobs = [("0", "1"), ("0", "2"), ("1", "2")]
    runs = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", RANK, *job, tmp_path], cwd=ROOT) for job in jobs]
    assert [run.wait(timeout=200) for run in runs] == [0, 0, 0]
    for device in ("cpu", "meta"):
        alone, first, second = (torch.load(tmp_path / f"{device}{rank}of{ranks}") for rank, ranks in jobs)
        assert max(first[1], second[1]) < 0.6 * alone[1]
        for name, (weight, gradient) in alone[0].items():
            assert all(torch.equal(one, other) for one, other in zip(first[0][name], second[0][name], strict=True)), (
                name
            )
            if device == "cpu":
                torch.testing.assert_close(first[0][name], (weight, gradient))
            else:  # each rank initializes its shards: other random numbers with the same norm
                torch.testing.assert_close(first[0][name][0].norm(), weight.norm(), atol=0.05, rtol=0.25)
