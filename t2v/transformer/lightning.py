"""Training, validation and generation with the transformer."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric

from t2v.batch import GeneratedVideos, PromptBatch, TokenBatch
from t2v.errors import UserError
from t2v.generation import decode  # the module: it imports t2v.transformer itself, and may be only half loaded here
from t2v.generation.sampling import Sampler
from t2v.optimization import configure_optimization
from t2v.text import TextEncoder
from t2v.transformer.model import VideoTransformer
from t2v.vqvae.checkpoint import load_vqvae
from t2v.vqvae.model import VQVAE, to_uint8


class LitVideoTransformer(LightningModule):
    """Stage 2: trains a transformer on token shards, and generates videos from prompts."""

    def __init__(
        self,
        model: VideoTransformer,
        tokenizer: str,
        text_encoder: TextEncoder,
        sampler: Sampler,
        frames: int,
        guidance: float = 1.0,
        caption_dropout: float = 0.1,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup_steps: int = 0,
    ):
        """
        Args:
            model: the transformer.
            tokenizer: path of the stage 1 checkpoint that made the tokens; it decodes what is generated.
            text_encoder: embeds prompts; the one that embedded the captions.
            sampler: how tokens are drawn.
            frames: length of a generated video.
            guidance: strength of classifier-free guidance at generation; 1 is none.
            caption_dropout: share of training clips that do not see their caption, in [0, 1]; guidance needs some.
            optimizer: builds the optimizer from parameter groups.
            warmup_steps: steps over which the learning rate rises; then it follows a cosine.
        """
        super().__init__()
        if frames < 1:
            raise UserError(f"model.frames={frames} must be at least 1.")
        if not 0 <= caption_dropout <= 1:
            raise UserError(f"model.caption_dropout={caption_dropout} must lie in [0, 1].")
        self.model = model
        self.tokenizer_path = tokenizer
        self.text_encoder = text_encoder
        self.sampler = sampler
        self.frames = frames
        self.guidance = guidance
        self.caption_dropout = caption_dropout
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.fingerprint: dict[str, Any] = {}
        self._tokenizer: list[VQVAE] = []  # in a list, so that it is in no checkpoint of this stage
        self.loss = MeanMetric()
        self.accuracy = MeanMetric()

    @property
    def tokenizer(self) -> VQVAE:
        """The VQ-VAE, loaded when it is first asked for."""
        if not self._tokenizer:
            self._tokenizer.append(load_vqvae(self.tokenizer_path))
        return self._tokenizer[0].to(self.device)

    def setup(self, stage: str) -> None:
        """Refuses tokens or text that this model could not have been meant for, before anything is computed."""
        vqvae, model = self.tokenizer, self.model
        if (vqvae.codebook_size, vqvae.grid_size) != (model.vocab_size, model.grid_size):
            raise UserError(
                f"The VQ-VAE in '{self.tokenizer_path}' has {vqvae.codebook_size} codes on a grid of "
                f"{vqvae.grid_size}×{vqvae.grid_size}, but the transformer has vocab_size={model.vocab_size} and "
                f"grid_size={model.grid_size}: they must be equal."
            )
        if self.text_encoder.width != model.text_dim:
            raise UserError(
                f"The text encoder {self.text_encoder.name} is {self.text_encoder.width} wide, but the transformer has "
                f"text_dim={model.text_dim}: they must be equal."
            )
        if stage != "predict":  # then the fingerprint comes with the checkpoint
            self.fingerprint = dict(self.trainer.datamodule.fingerprint)  # type: ignore[attr-defined]
            self._require_same("the token shards were made")

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Float[Tensor, ""]:
        drop = torch.rand(len(batch.tokens), device=self.device) < self.caption_dropout
        loss, accuracy = self._step(batch, drop)
        self.log_dict({"train/loss": loss.detach(), "train/accuracy": accuracy}, batch_size=len(drop))
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        loss, accuracy = self._step(batch, None)
        self.loss.update(loss, batch.tokens.numel())
        self.accuracy.update(accuracy, batch.tokens.numel())

    def on_validation_epoch_end(self) -> None:
        loss = self.loss.compute()
        values = {"loss": loss, "perplexity": loss.exp(), "accuracy": self.accuracy.compute()}
        self.log_dict({f"val/{name}": value for name, value in values.items()}, prog_bar=True)
        self.loss.reset()
        self.accuracy.reset()

    def test_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    def predict_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> GeneratedVideos:
        """Generates one video a prompt."""
        return self.generate_videos(batch)

    @torch.inference_mode()
    def generate_videos(self, batch: PromptBatch) -> GeneratedVideos:
        """Generates one video a prompt, decoding each frame as soon as its tokens are there."""
        self.text_encoder.to(self.device)
        text = self.text_encoder.encode(batch.prompts)
        decoder, state, frames = self.tokenizer, None, []
        for tokens in decode.generate_frames(self.model, text, self.frames, self.sampler, batch.seeds, self.guidance):
            frame, state = decoder.decode_stream(tokens, state)
            frames.append(to_uint8(frame))
        return GeneratedVideos(torch.cat(frames, dim=1), batch.prompts, batch.names, float(self.fingerprint["fps"]))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return configure_optimization(self, self.model, self.optimizer, self.warmup_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what the tokens were made by, which generation needs too."""
        checkpoint["fingerprint"] = self.fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores what the tokens were made by; in a run, `setup` has loaded the tokenizer to compare."""
        self.fingerprint = checkpoint["fingerprint"]
        if self._tokenizer:
            self._require_same("the tokens that the checkpoint learnt were made")

    def _step(self, batch: TokenBatch, drop: Tensor | None) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Cross-entropy in nats and share of tokens that the most probable code hits."""
        logits = self.model(batch.tokens, batch.text, drop).flatten(0, 3)
        targets = batch.tokens.flatten()
        accuracy = (logits.argmax(-1) == targets).float().mean()
        return F.cross_entropy(logits.float(), targets), accuracy

    def _require_same(self, what: str) -> None:
        """Refuses another tokenizer or text encoder than the fingerprint's."""
        for key, ours in (("tokenizer", self.tokenizer.fingerprint()), ("text_encoder", self.text_encoder.name)):
            if (theirs := self.fingerprint.get(key)) != ours:
                raise UserError(
                    f"model.{key} is {ours}, but {what} by {theirs}: give the {key} that made them, or make the token "
                    f"shards again with `predict` of stage 1 and train on those."
                )
