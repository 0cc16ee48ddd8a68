"""Toy modules of both stages, their data, and a trainer, on real or on fake devices."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor
from torch.utils.data import DataLoader

from t2v import VQVAE, LitVideoTransformer, LitVQVAE
from t2v.batch import PromptBatch, TextEmbedding, TokenBatch, VideoBatch
from t2v.generation import Linear, Sampler
from t2v.generation.settings import GenerationSettings
from t2v.losses import L1Loss, TemporalDifferenceLoss
from t2v.text import TextEncoder
from t2v.training import Float8Precision
from t2v.training.objective import TokenObjective
from t2v.transformer.config import AttentionConfig, TextConfig
from t2v.transformer.model import VideoTransformer
from t2v.vqvae.quantizer import VectorQuantizer
from tests.support.cuda_policy import FakeCudaStrategy

CODES, TEXT_DIM, SIZE = 32, 16, 16
FRAMES = 2


class PromptEncoder(TextEncoder):
    """The same embedding for every text, of as many tokens as the text has letters."""

    name = "letters"
    width = TEXT_DIM

    def embed(self, caption: str) -> Tensor:
        return torch.linspace(-1, 1, TEXT_DIM, device=self.device).expand(max(len(caption), 1), -1)


def vqvae(grid: int = 2, codes: int = CODES) -> VQVAE:
    torch.manual_seed(0)
    network = VQVAE(SIZE // 2 * grid, 8, (1, 2), 1, 3, 1, 1, 2, 2, quantizer=VectorQuantizer(codes, 4))
    network.quantizer.codes.normal_()
    network.quantizer.initialized.fill_(True)
    return network


def transformer(grid: int = 2, **options: Any) -> VideoTransformer:
    torch.manual_seed(0)
    attention, text = AttentionConfig(heads=2, kv_heads=1, window=2), TextConfig(TEXT_DIM)
    network = VideoTransformer(CODES, grid, 32, 1, 1, 48, attention, text, **options)
    with torch.no_grad():  # text has no effect at initialization
        for block in network.blocks:
            block.text_attention.out.weight.normal_(std=0.2)
    return network


def lit_vqvae(compiled: bool = False, **options: Any) -> LitVQVAE:
    return LitVQVAE(vqvae(), [L1Loss(), TemporalDifferenceLoss()], compiled=compiled, **options)


def lit_transformer(
    compiled: bool = False, compiled_decoding: bool = False, weights: Any = "full"
) -> LitVideoTransformer:
    settings = GenerationSettings(
        Sampler(temperature=Linear(1.0, 0.8), top_p=0.9),
        FRAMES,
        Linear(3.0, 1.0),
        weights=weights,
        compiled=compiled_decoding,
    )
    objective = TokenObjective(label_smoothing=0.1, z_loss=1e-4, corruption=0.1)
    module = LitVideoTransformer(
        transformer(), "none", PromptEncoder(), settings, objective, codebook_embeddings=True, compiled=compiled
    )
    module._tokenizer.append(vqvae().eval().requires_grad_(False))
    return module


class Clips(LightningDataModule):
    """The same batch again and again, on the device of the default."""

    fps = 8.0

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device

    def batch(self) -> Any:
        shape = (2, FRAMES, 3, SIZE, SIZE)
        return VideoBatch(torch.randint(256, shape, dtype=torch.uint8, device=self.device), [["a"], ["b"]], ["a", "b"])

    def loader(self) -> DataLoader:
        torch.manual_seed(0)
        return DataLoader([self.batch()] * 3, batch_size=None)

    train_dataloader = val_dataloader = predict_dataloader = loader


class Tokens(Clips):
    """Tokens, and prompts to predict from."""

    def __init__(self, fingerprint: dict[str, Any], device: str = "cpu") -> None:
        super().__init__(device)
        self.fingerprint = fingerprint

    def batch(self) -> TokenBatch:
        mask = torch.ones(2, 4, dtype=torch.bool, device=self.device)
        text = TextEmbedding(torch.randn(2, 4, TEXT_DIM, device=self.device), mask)
        tokens = torch.randint(CODES, (2, FRAMES, 2, 2), device=self.device)
        return TokenBatch(tokens, text, ["a", "b"], ["a", "b"])

    def predict_dataloader(self) -> DataLoader:
        return DataLoader([PromptBatch(["one", "three"], [0, 1], ["a", "b"])], batch_size=None)


def precision_plugin(name: str, device: str) -> Precision:
    if name == "FP8":
        return Float8Precision()
    if name == "bf16-mixed":
        return MixedPrecision(name, device)
    return HalfPrecision(name) if name == "bf16-true" else Precision()


def trainer(precision: str, folder: Any, fake: bool = False, **options: Any) -> Trainer:
    """A trainer on the CPU or on the device of `fake_cuda`."""
    device = {"strategy": FakeCudaStrategy()} if fake else {"accelerator": "cpu"}
    return Trainer(
        **device,
        plugins=[precision_plugin(precision, "cuda" if fake else "cpu")],
        default_root_dir=folder,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )


def data_for(module: LightningModule, device: str = "cpu") -> Clips:
    if isinstance(module, LitVQVAE):
        return Clips(device)
    fingerprint = {
        "tokenizer": module._tokenizer[0].fingerprint(),
        "text_encoder": module.text_encoder.name,
        "fps": 8.0,
    }
    return Tokens(fingerprint, device)
