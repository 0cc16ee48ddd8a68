"""Training, validation and tokenising of the VQ-VAE."""

from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from t2v.batch import VideoBatch
from t2v.metrics import CodebookUsage, Flicker
from t2v.optimization import configure_optimization
from t2v.vqvae.losses import LossTerm
from t2v.vqvae.model import VQVAE, to_model_range, to_uint8


class LitVQVAE(LightningModule):
    """Stage 1: trains a VQ-VAE on video, and turns video into tokens."""

    def __init__(
        self,
        model: VQVAE,
        losses: list[LossTerm],
        commitment_weight: float = 0.25,
        quantize_from_step: int = 0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup_steps: int = 0,
    ):
        """
        Args:
            model: the VQ-VAE.
            losses: terms of the loss.
            commitment_weight: weight of the distance between the encoder's vectors and their codes.
            quantize_from_step: train as a plain autoencoder until this step, then start the codebook by k-means.
            optimizer: builds the optimizer from parameter groups.
            warmup_steps: steps over which the learning rate rises; then it follows a cosine.
        """
        super().__init__()
        self.model = model
        self.losses = tuple(losses)  # not registered: frozen feature networks stay out of checkpoints
        self.commitment_weight = commitment_weight
        self.quantize_from_step = quantize_from_step
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.psnr = PeakSignalNoiseRatio(data_range=(-1.0, 1.0), dim=(1, 2, 3))
        self.ssim = StructuralSimilarityIndexMeasure(data_range=(-1.0, 1.0))
        self.flicker = Flicker()
        self.codebook = CodebookUsage(model.codebook_size)

    def training_step(self, batch: VideoBatch, batch_idx: int) -> Float[Tensor, ""]:
        loss, _, _ = self._step(batch, "train", quantize=self.global_step >= self.quantize_from_step)
        return loss

    def validation_step(self, batch: VideoBatch, batch_idx: int) -> None:
        _, reconstruction, tokens = self._step(batch, "val", quantize=True)
        video, reconstruction = to_model_range(batch.video), reconstruction.clamp(-1, 1)
        frames, originals = reconstruction.flatten(0, 1), video.flatten(0, 1)
        self.psnr.update(frames, originals)
        self.ssim.update(frames, originals)
        self.flicker.update(reconstruction, video)
        if tokens is not None:
            self.codebook.update(tokens)

    def on_validation_epoch_end(self) -> None:
        values = {"psnr": self.psnr, "ssim": self.ssim, "flicker": self.flicker, "codebook": self.codebook}
        for name, metric in values.items():
            if not metric.update_called:  # the codebook, before it is started
                continue
            result = metric.compute()
            named = {f"{name}_{key}": x for key, x in result.items()} if isinstance(result, dict) else {name: result}
            self.log_dict({f"val/{key}": x for key, x in named.items()}, prog_bar=name == "psnr")
            metric.reset()

    def test_step(self, batch: VideoBatch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    def predict_step(self, batch: VideoBatch, batch_idx: int, dataloader_idx: int = 0) -> Int[Tensor, "b t h w"]:
        """Tokenises clips."""
        return self.model.encode(to_model_range(batch.video))

    def reconstruct(self, video: UInt8[Tensor, "b t c h w"]) -> UInt8[Tensor, "b t c h w"]:
        """Clips after a way through the tokens and back."""
        return to_uint8(self.model(to_model_range(video)).reconstruction)

    def fingerprint(self) -> dict[str, Any]:
        """What tokens made by this model depend on; token shards carry it."""
        return {
            "tokenizer": self.model.fingerprint(),
            "codebook_size": self.model.codebook_size,
            "grid_size": self.model.grid_size,
            "image_size": self.model.image_size,
        }

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure_optimization(self, self.model, self.optimizer, self.warmup_steps)

    def _step(
        self, batch: VideoBatch, stage: str, quantize: bool
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "b t c h w"], Int[Tensor, "b t h w"] | None]:
        """Loss, reconstruction and tokens of a batch, every term logged."""
        video = to_model_range(batch.video)
        reconstruction, tokens, commitment = self.model(video, quantize)
        reconstruction = reconstruction.float()
        terms = {"commitment": commitment}
        loss = self.commitment_weight * commitment
        for term in self.losses:
            if stage != "train" or self.global_step >= term.start_step:
                terms[term.name] = term(reconstruction, video)
                loss = loss + term.weight * terms[term.name]
        terms["loss"] = loss
        self.log_dict({f"{stage}/{name}": x.detach() for name, x in terms.items()}, batch_size=len(video))
        return loss, reconstruction, tokens
