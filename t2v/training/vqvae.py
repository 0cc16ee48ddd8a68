"""Training, validation and tokenization with the VQ-VAE (stage 1)."""

from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from t2v.batch import VideoBatch
from t2v.compilation import compile_layer
from t2v.errors import UserError, check_range
from t2v.losses import AdversarialLoss, LossTerm
from t2v.metrics import PSNR, SSIM, CodebookUsage, Flicker, VideoMetric
from t2v.training.optimization import configure_optimization, split_discriminators
from t2v.training.sharding import shard
from t2v.training.warm_start import warm_start
from t2v.vqvae.model import VQVAE, to_model_range, to_uint8


class LitVQVAE(LightningModule):
    """Stage 1: trains a VQ-VAE on video, and tokenizes video.

    Args:
        model: The VQ-VAE.
        losses: Terms of the loss.
        adversarial: Discriminators that are trained together with the VQ-VAE, and their loss term.
        metrics: Validation metrics in addition to PSNR, SSIM, flicker and codebook usage.
        quantize_from_step: Train as an autoencoder without quantization until this step, then initialize the codebook
            by k-means.
        compiled: Compile the encoder and the decoder; slower on the CPUs where it was measured.
        optimizer: Builds the optimizer from parameter groups.
        warmup_steps: Steps of linear learning-rate warm-up; a cosine decay follows.
        init_from: Checkpoint whose weights a new run begins with.

    Raises:
        UserError: If an argument is out of range, no loss begins at step 0, two losses or metrics have the same name,
            or the discriminators have more layers than a frame has room for.
    """

    def __init__(
        self,
        model: VQVAE,
        losses: list[LossTerm],
        adversarial: AdversarialLoss | None = None,
        metrics: list[VideoMetric] | None = None,
        quantize_from_step: int = 0,
        compiled: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup_steps: int = 0,
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        check_range(self, "[0, inf)", quantize_from_step=quantize_from_step, warmup_steps=warmup_steps)
        if not losses:
            raise UserError("model.losses is empty, so there is nothing to train on: give it t2v.losses.L1Loss.")
        if all(term.start_step for term in losses):
            raise UserError(
                "All of model.losses begin later than step 0, so there is nothing to train on: start one at 0."
            )
        if adversarial is not None:
            adversarial.check_size(model.image_size)
        self.model = model
        self.adversarial = adversarial
        # In tuples, so that their frozen networks are not in checkpoints and averages.
        self.losses = tuple(losses)
        self.metrics = (PSNR(), SSIM(), Flicker(), *(metrics or []))
        names_of = {"losses": [term.name for term in losses], "metrics": [metric.name for metric in self.metrics]}
        for argument, names in names_of.items():
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise UserError(
                    f"model.{argument} has {', '.join(repeated)} twice, but only one could be logged: remove one."
                )
        self.quantize_from_step = quantize_from_step
        self.compiled = compiled
        self.optimizer = optimizer
        self.warmup_steps, self.init_from = warmup_steps, init_from
        self.codebook = CodebookUsage(model.codebook_size)

    def configure_model(self) -> None:
        """Shard the model if the strategy asks for it, then compile the encoder and the decoder if asked for.

        Raises:
            UserError: If the strategy does not fit a VQ-VAE with these options.
        """
        if self.device_mesh is not None:
            self._shard(self.device_mesh)
        if self.compiled:
            compile_layer(self.model.encoder)
            compile_layer(self.model.decoder)
        warm_start(self, self.init_from)

    def _shard(self, mesh: DeviceMesh) -> None:
        self.check_sharding(mesh["tensor_parallel"].size())
        self.model.to(memory_format=torch.contiguous_format)  # FSDP2 shards no channels-last weights
        shard([self.model.encoder, self.model.decoder], self.model, mesh, self.trainer.precision)

    def check_sharding(self, tp_size: int) -> None:
        """Refuse what a sharded VQ-VAE cannot be trained with."""
        if self.adversarial is not None:
            raise UserError(
                "model.adversarial cannot be trained with a sharded model: use configs/cluster/ddp.yaml in place of "
                "configs/cluster/fsdp.yaml, or remove model.adversarial."
            )
        if tp_size > 1:
            raise UserError(
                f"trainer.strategy.tensor_parallel_size={tp_size} must be 1, since a VQ-VAE has no tensor parallelism: "
                "remove it."
            )

    def training_step(self, batch: VideoBatch, batch_idx: int) -> Float[Tensor, ""]:
        """Compute the loss of a batch and log its terms under `train/`."""
        video = to_model_range(batch.video)
        reconstruction, _, quantizer_loss = self.model(video, quantize=self.global_step >= self.quantize_from_step)
        reconstruction = reconstruction.float()
        terms = {term.name: term(reconstruction, video) for term in self.losses if self.global_step >= term.start_step}
        loss = sum((term.weight * terms[term.name] for term in self.losses if term.name in terms), video.new_zeros(()))
        terms["quantizer"] = quantizer_loss
        total: Tensor = loss + quantizer_loss
        if self.adversarial is not None and self.global_step < self.adversarial.start_step:
            total = total + self.adversarial.zero_loss()
        elif self.adversarial is not None:
            terms["generator"] = self.adversarial.generator_loss(reconstruction, loss)
            terms["discriminator"] = self.adversarial.discriminator_loss(reconstruction, video)
            total = total + terms["generator"] + terms["discriminator"]
        terms["loss"] = total
        self.log_dict({f"train/{name}": x.detach() for name, x in terms.items()}, batch_size=len(video))
        self.log("loss", total.detach(), prog_bar=True, logger=False, batch_size=len(video))
        return total

    def on_validation_epoch_start(self) -> None:
        """Move the metrics to the device, since they are no submodules."""
        for metric in self.metrics:
            metric.to(self.device)

    def validation_step(self, batch: VideoBatch, batch_idx: int) -> None:
        """Log the loss and update the metrics."""
        video = to_model_range(batch.video)
        reconstruction, tokens, _ = self.model(video)
        reconstruction = reconstruction.float().clamp(-1, 1)
        loss = sum((term.weight * term(reconstruction, video) for term in self.losses), video.new_zeros(()))
        self.log("val/loss", loss, batch_size=len(video), sync_dist=True)
        for metric in self.metrics:
            metric.update(reconstruction, video)
        if tokens is not None:
            self.codebook.update(tokens)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics over the whole epoch."""
        values: dict[str, Tensor] = {}
        collapse = self.codebook.collapse() if self.codebook.update_called and not self.trainer.sanity_checking else ""
        if collapse:
            rank_zero_warn(f"Step {self.global_step}: {collapse}")
        named = {metric.name: metric for metric in self.metrics}
        for name, metric in {**named, "codebook": self.codebook}.items():
            if not metric.update_called:  # the codebook usage, before quantization begins
                continue
            result = metric.compute()
            values |= {f"{name}_{key}": x for key, x in result.items()} if isinstance(result, dict) else {name: result}
            metric.reset()
        self.log("val/psnr", values.pop("psnr"), prog_bar=True)
        self.log_dict({f"val/{name}": x for name, x in values.items()})

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def test_step(self, batch: VideoBatch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    def predict_step(self, batch: VideoBatch, batch_idx: int, dataloader_idx: int = 0) -> Int[Tensor, "b t h w"]:
        """Tokenize clips."""
        return self.model.encode(to_model_range(batch.video))

    def reconstruct(self, video: UInt8[Tensor, "b t c height width"]) -> UInt8[Tensor, "b t c height width"]:
        """Encode clips to tokens and decode them again."""
        return to_uint8(self.model(to_model_range(video)).reconstruction)

    def fingerprint(self) -> dict[str, Any]:
        """Return what the tokens of this model depend on; token shards store it."""
        return {
            "tokenizer": self.model.fingerprint(),
            "codebook_size": self.model.codebook_size,
            "grid_size": self.model.grid_size,
            "image_size": self.model.image_size,
        }

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient norms of the VQ-VAE and of the discriminators separately."""
        if self.adversarial is None or not gradient_clip_val or gradient_clip_algorithm == "value":
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for parameters in split_discriminators(optimizer):
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure_optimization(self, self, self.optimizer, self.warmup_steps)
