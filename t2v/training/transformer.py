"""Training, validation and generation with the transformer (stage 2)."""

from typing import Any

import torch
from jaxtyping import Float, UInt8
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from t2v.batch import GeneratedVideos, PromptBatch, TextEmbedding, TokenBatch
from t2v.errors import check_range
from t2v.generation.loading import check_parts
from t2v.generation.quantization import convert
from t2v.generation.settings import GenerationSettings
from t2v.generation.text_to_video import TextToVideo
from t2v.losses.tokens import token_loss_
from t2v.metrics import WeightedMean
from t2v.text import TextEncoder
from t2v.training.data_checks import check_fingerprint, warn_of_guidance, warn_of_short_clips
from t2v.training.lightning_private import trainer_of
from t2v.training.objective import TokenObjective
from t2v.training.optimization import configure_optimization
from t2v.training.sharding import shard
from t2v.training.streaming import in_context, unsharded
from t2v.training.tensor_parallel import parallelize
from t2v.training.warm_start import warm_start
from t2v.transformer.model import VideoTransformer
from t2v.vqvae.loading import load_vqvae
from t2v.vqvae.model import VQVAE


class LitVideoTransformer(LightningModule):
    """Stage 2: trains a transformer on token shards, and generates videos from prompts.

    Args:
        model: The transformer.
        tokenizer: Path of the stage 1 checkpoint that the tokens were encoded with; it decodes generated tokens.
        text_encoder: Embeds prompts; the encoder that the captions of the token shards were embedded with.
        generation: How `predict` and the logging callbacks generate videos.
        objective: Regularization and options of the training loss.
        codebook_embeddings: Begin training with token embeddings that are projections of the VQ-VAE's codes.
        compiled: Compile the layers for training and validation, which pays off where few shapes occur often.
        optimizer: Builds the optimizer from parameter groups.
        warmup_steps: Steps of linear learning-rate warm-up; a cosine decay follows.
        init_from: Checkpoint whose weights a new run begins with; text encoder and length of the clips may be others.

    Raises:
        UserError: If an argument is out of range.
    """

    def __init__(
        self,
        model: VideoTransformer,
        tokenizer: str,
        text_encoder: TextEncoder,
        generation: GenerationSettings,
        objective: TokenObjective = TokenObjective(),  # noqa: B008 (frozen)
        codebook_embeddings: bool = False,
        compiled: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup_steps: int = 0,
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        check_range(self, "[0, inf)", warmup_steps=warmup_steps)
        self.model = model
        self.tokenizer_path = tokenizer
        self.text_encoder = text_encoder
        self.generation = generation
        self.objective = objective
        self._needs_codebook_embeddings = codebook_embeddings
        self.compiled, self.optimizer = compiled, optimizer
        self.warmup_steps, self.init_from = warmup_steps, init_from
        self.fingerprint: dict[str, Any] = {}
        self._tokenizer: list[VQVAE] = []  # in a list, so that no checkpoint of this stage contains it
        self.loss, self.accuracy = WeightedMean(), WeightedMean()

    @property
    def tokenizer(self) -> VQVAE:
        """The VQ-VAE, loaded on first use."""
        if not self._tokenizer:
            self._tokenizer.append(load_vqvae(self.tokenizer_path))
        return self._tokenizer[0].to(self.device)

    def setup(self, stage: str) -> None:
        """Check that the model, the tokenizer, the text encoder and the token shards fit each other."""
        check_parts(self.model, self.tokenizer, self.text_encoder)
        warn_of_guidance(self.objective.caption_dropout, self.generation.guided)
        if stage != "predict":  # then the checkpoint has the fingerprint
            self.fingerprint = dict(self.trainer.datamodule.fingerprint)  # type: ignore[attr-defined]
            self._check_fingerprint("the token shards")
            warn_of_short_clips(self.trainer, self.model.attention.window, self.generation.frames)

    def configure_model(self) -> None:
        """Shard the model if the strategy asks for it, and initialize one that was built on the meta device."""
        mesh, device, trainer = self.device_mesh, torch.get_default_device(), trainer_of(self)
        if mesh is not None:
            if trainer:  # FP8 layers replace others before the weights are sharded
                trainer.precision_plugin.convert_module(self)
            if mesh["tensor_parallel"].size() > 1:
                parallelize(self.model, mesh["tensor_parallel"])
            shard(list(self.model.blocks), self.model, mesh, trainer.precision if trainer else None)
            device = torch.device(mesh.device_type)
        if self.compiled:
            self.model.compile_layers()
        if any(parameter.is_meta for parameter in self.model.parameters()):
            self.model.to(torch.get_default_dtype())  # with bf16-true, half the memory from the beginning
            self.model.to_empty(device=device)
            self.model.reset_parameters()
        if self._needs_codebook_embeddings and trainer and trainer.training:  # a checkpoint is loaded after this
            self.model.initialize_embeddings(self.tokenizer.quantizer.codebook())
            self._needs_codebook_embeddings = False
        warm_start(self, self.init_from)

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Float[Tensor, ""]:
        """Compute the loss of a batch and log its terms under `train/`."""
        objective, clips = self.objective, len(batch.tokens)
        drop = objective.dropped_captions(clips, self.device)
        logits = self.model(objective.corrupt(batch.tokens, self.model.vocab_size), batch.text, drop)
        terms = objective.loss(logits, batch.tokens)
        logged = {"loss": terms.cross_entropy, "accuracy": terms.accuracy}
        if objective.label_smoothing or objective.z_loss:
            logged["objective"] = terms.objective.detach()
        if objective.z_loss:
            logged["z_loss"] = terms.z_loss
        self.log_dict({f"train/{name}": value for name, value in logged.items()}, batch_size=clips)
        self.log("loss", terms.cross_entropy, prog_bar=True, logger=False)
        return terms.objective

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """Accumulate the plain cross-entropy and the accuracy, without corruption or caption dropout."""
        terms = token_loss_(self.model(batch.tokens, batch.text), batch.tokens)
        self.loss.update(terms.cross_entropy, batch.tokens.numel())
        self.accuracy.update(terms.accuracy, batch.tokens.numel())

    def on_validation_epoch_end(self) -> None:
        """Log `val/loss`, `val/perplexity` and `val/accuracy` over all tokens of all ranks."""
        loss = self.loss.compute()
        values = {"loss": loss, "perplexity": loss.exp(), "accuracy": self.accuracy.compute()}
        self.log_dict({f"val/{name}": value for name, value in values.items()}, prog_bar=True)
        self.loss.reset()
        self.accuracy.reset()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def on_predict_start(self) -> None:
        """Check all prompts before the first video is generated, and quantize the weights."""
        for batch in self.trainer.predict_dataloaders:  # type: ignore[union-attr]
            self.generation.check_prompts(batch.starts, batch.negatives)
        convert(self.model, self.generation.weights)

    def predict_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> GeneratedVideos:
        """Generate one video for each prompt, beginning with the start frames, if there are any."""
        start = self.generation.read_start(batch.starts, self.tokenizer.image_size, float(self.fingerprint["fps"]))
        return self.generate_videos(batch, start=start)

    def embed_prompts(self, prompts: list[str]) -> TextEmbedding:
        """Embed prompts for `generate_videos`, once for prompts that are used several times."""
        return self._text_to_video().embed(prompts)

    def generate_videos(
        self,
        batch: PromptBatch,
        text: TextEmbedding | None = None,
        start: UInt8[Tensor, "*videos t c height width"] | None = None,
    ) -> GeneratedVideos:
        """Generate one video for each prompt; each frame is generated when it is read from the result's `frames`.

        Args:
            batch: Prompts and seeds.
            text: The prompts' embeddings from `embed_prompts`; computed here by default.
            start: Start frames of every video, or of each.
        """
        generator, settings = self._text_to_video(), self.generation
        stream = generator.stream(
            text or batch.prompts,
            seed=batch.seeds,
            start=start,
            parallel=settings.parallel,
            negative_prompt=settings.negative_prompts(batch.negatives, len(batch.seeds)),
        )
        frames = unsharded(self.model, in_context(self.trainer.precision_plugin.forward_context, stream))
        return GeneratedVideos(frames, settings.frames, batch.prompts, batch.names, generator.fps, stream.speed)

    def _text_to_video(self) -> TextToVideo:
        self.text_encoder.to(self.device)
        fps, settings = float(self.fingerprint["fps"]), self.generation
        return TextToVideo(
            self.model,
            self.tokenizer,
            self.text_encoder,
            fps,
            settings.sampler,
            settings.guidance,
            settings.frames,
            settings.compiled,
            candidates=settings.candidates,
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure_optimization(self, self.model, self.optimizer, self.warmup_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the fingerprint of the token shards, which generation needs too."""
        checkpoint["fingerprint"] = self.fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the fingerprint; in a run, check the tokenizer that `setup` has loaded against it."""
        self.fingerprint = checkpoint["fingerprint"]
        self._needs_codebook_embeddings = False
        if self._tokenizer:
            self._check_fingerprint("the token shards of the checkpoint")

    def _check_fingerprint(self, source: str) -> None:
        check_fingerprint(self.fingerprint, self.tokenizer.fingerprint(), self.text_encoder.name, source)
