"""Training, validation and generation with the transformer."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float, UInt8
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric

from t2v.batch import GeneratedVideos, PromptBatch, TextEmbedding, TokenBatch
from t2v.errors import UserError
from t2v.generation.decode import check_schedules
from t2v.generation.quantization import Weights, convert
from t2v.generation.sampling import Sampler
from t2v.generation.schedules import Schedule
from t2v.generation.text_to_video import TextToVideo, check_parts
from t2v.losses.tokens import token_loss
from t2v.text import TextEncoder
from t2v.training.optimization import configure_optimization
from t2v.training.sharding import shard, whole
from t2v.training.tensor_parallel import parallelize
from t2v.transformer.model import VideoTransformer
from t2v.video import read_clip
from t2v.vqvae.loading import load_vqvae
from t2v.vqvae.model import VQVAE


class LitVideoTransformer(LightningModule):
    """Stage 2: trains a transformer on token shards, and generates videos from prompts."""

    def __init__(
        self,
        model: VideoTransformer,
        tokenizer: str,
        text_encoder: TextEncoder,
        sampler: Sampler,
        frames: int,
        guidance: float | Schedule = 1.0,
        caption_dropout: float = 0.1,
        corruption: float = 0.0,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        compiled: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup_steps: int = 0,
        start: str | None = None,
        start_frames: int = 1,
        weights: Weights = "full",
    ):
        """
        Args:
            model: the transformer.
            tokenizer: path of the stage 1 checkpoint that made the tokens; it decodes what is generated.
            text_encoder: embeds prompts; the one that embedded the captions.
            sampler: how tokens are drawn.
            frames: length of a generated video, the frames of `start` included.
            guidance: strength of classifier-free guidance at generation, also a schedule over the frames; 1 is none.
            caption_dropout: share of training clips that do not see their caption, in [0, 1]; guidance needs some.
            corruption: share of input tokens that training replaces by codes drawn evenly, in [0, 1); the tokens to
                predict stay as they are. Against drift in long videos.
            label_smoothing: share of each target that training spreads over all codes evenly, in [0, 1).
            z_loss: weight of log² Z in training, where Z is the sum that softmax divides by; it keeps logits small.
            compiled: compile the layers for training and validation, which pays where the same few shapes come again
                and again.
            optimizer: builds the optimizer from parameter groups.
            warmup_steps: steps over which the learning rate rises; then it follows a cosine.
            start: path of a picture or video with which every video of `predict` begins.
            start_frames: how many frames of `start` to take, at least 1 and fewer than `frames`.
            weights: how `predict` keeps the weights of the large layers: as they are, or in 8 or 4 bits.
        """
        super().__init__()
        if frames < 1:
            raise UserError(f"model.frames={frames} must be at least 1.")
        check_schedules(sampler, guidance, frames)
        if start is not None and not 0 < start_frames < frames:
            raise UserError(
                f"model.start_frames={start_frames} must be at least 1 and less than model.frames={frames}, so that "
                "there is something left to make."
            )
        if not 0 <= caption_dropout <= 1:
            raise UserError(f"model.caption_dropout={caption_dropout} must lie in [0, 1].")
        for name, share in (("corruption", corruption), ("label_smoothing", label_smoothing)):
            if not 0 <= share < 1:
                raise UserError(f"model.{name}={share} must lie in [0, 1): it is a share of every target or input.")
        if not 0 <= z_loss < math.inf:
            raise UserError(f"model.z_loss={z_loss} must be a weight of at least 0; 1e-4 is usual.")
        self.model = model
        self.tokenizer_path = tokenizer
        self.text_encoder = text_encoder
        self.sampler = sampler
        self.frames = frames
        self.guidance = guidance
        self.start, self.start_frames, self.weights = start, start_frames, weights
        self.caption_dropout = caption_dropout
        self.corruption, self.label_smoothing, self.z_loss = corruption, label_smoothing, z_loss
        self.compiled = compiled
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.fingerprint: dict[str, Any] = {}
        self._tokenizer: list[VQVAE] = []  # in a list, so that it is in no checkpoint of this stage
        self._start: Tensor | None = None
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
        check_parts(self.model, self.tokenizer, self.text_encoder)
        if stage != "predict":  # then the fingerprint comes with the checkpoint
            self.fingerprint = dict(self.trainer.datamodule.fingerprint)  # type: ignore[attr-defined]
            self._require_same("the token shards were made")

    def configure_model(self) -> None:
        """Shards the model where the strategy asks for it; gives one that was built on the meta device its weights."""
        mesh, device = self.device_mesh, torch.get_default_device()
        if self.compiled:
            self.model.compile_layers()
        if mesh is not None:
            if self._trainer is not None:  # layers in FP8 take the place of others before those are shared out
                self.trainer.precision_plugin.convert_module(self)
            if mesh["tensor_parallel"].size() > 1:
                parallelize(self.model, mesh["tensor_parallel"])
            shard([*self.model.blocks, self.model], mesh)
            device = torch.device(mesh.device_type)
        if any(parameter.is_meta for parameter in self.model.parameters()):
            self.model.to(torch.get_default_dtype())  # with bf16-true, half the memory from the beginning
            self.model.to_empty(device=device)
            self.model.reset_parameters()

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Float[Tensor, ""]:
        tokens = batch.tokens
        drop = torch.rand(len(tokens), device=self.device) < self.caption_dropout
        if self.corruption:
            wrong = torch.rand(tokens.shape, device=self.device) < self.corruption
            tokens = torch.where(wrong, torch.randint_like(tokens, self.model.vocab_size), tokens)
        logits = self.model(tokens, batch.text, drop)
        terms = token_loss(logits, batch.tokens, self.label_smoothing, self.z_loss)
        logged = {"loss": terms.cross_entropy, "accuracy": terms.accuracy}
        if self.label_smoothing or self.z_loss:
            logged["objective"] = terms.objective.detach()
        if self.z_loss:
            logged["z_loss"] = terms.z_loss
        self.log_dict({f"train/{name}": value for name, value in logged.items()}, batch_size=len(tokens))
        self.log("loss", terms.cross_entropy, prog_bar=True, logger=False)
        return terms.objective

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        terms = token_loss(self.model(batch.tokens, batch.text), batch.tokens)
        self.loss.update(terms.cross_entropy, batch.tokens.numel())
        self.accuracy.update(terms.accuracy, batch.tokens.numel())

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

    def on_predict_start(self) -> None:
        """Reads the frames that the videos begin with, so that mistakes show before anything is made."""
        convert(self.model, self.weights)
        if self.start is not None:
            fps = float(self.fingerprint["fps"])
            self._start = read_clip(self.start, self.start_frames, self.tokenizer.image_size, fps)

    def predict_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> GeneratedVideos:
        """Generates one video a prompt, which begins with the frames of `start`, if there are any."""
        return self.generate_videos(batch, start=self._start)

    def embed_prompts(self, prompts: list[str]) -> TextEmbedding:
        """What `generate_videos` makes of prompts, to be made once for prompts that come again."""
        return self._text_to_video().embed(prompts)

    def generate_videos(
        self,
        batch: PromptBatch,
        text: TextEmbedding | None = None,
        start: UInt8[Tensor, "t c h w"] | None = None,
    ) -> GeneratedVideos:
        """Generates one video a prompt, frame by frame as the result's `frames` are asked for.

        Args:
            batch: prompts and seeds.
            text: what `embed_prompts` made of the prompts, if that was done before.
            start: frames that every video begins with.
        """
        made = self._text_to_video()
        frames = made.stream(batch.prompts if text is None else text, seed=batch.seeds, start=start)
        frames = _in_context(self.trainer.precision_plugin.forward_context, frames)
        return GeneratedVideos(whole(self.model, frames), batch.prompts, batch.names, made.fps)

    def _text_to_video(self) -> TextToVideo:
        self.text_encoder.to(self.device)
        fps = float(self.fingerprint["fps"])
        return TextToVideo(self.model, self.tokenizer, self.text_encoder, fps, self.sampler, self.guidance, self.frames)

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

    def _require_same(self, what: str) -> None:
        """Refuses another tokenizer or text encoder than the fingerprint's."""
        for key, ours in (("tokenizer", self.tokenizer.fingerprint()), ("text_encoder", self.text_encoder.name)):
            if (theirs := self.fingerprint.get(key)) != ours:
                raise UserError(
                    f"model.{key} is {ours}, but {what} by {theirs}: give the {key} that made them, or make the token "
                    f"shards again with `predict` of stage 1 and train on those."
                )


def _in_context(context: Callable[[], AbstractContextManager], frames: Iterator[Tensor]) -> Iterator[Tensor]:
    """Makes each frame in a new context, since who asks for it has left the trainer's."""
    while True:
        with context():
            frame = next(frames, None)
        if frame is None:
            return
        yield frame
