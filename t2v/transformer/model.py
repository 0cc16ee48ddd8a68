"""The spatial–temporal transformer, which predicts the tokens of a video one after the other from text.

- Tokens are in raster order: time, then row, then column. The input at a position is the token before it, with the
  rotary embedding of the position itself; features of the previous frame around the position are added.
- Spatial layers attend causally within a frame. Temporal layers attend causally over the last `window` frames: a query
  at raster position p attends to p − window·h·w + 1 … p. Time and cache per token are constant.
- RMSNorm, SwiGLU, grouped queries, QK-norm, rotary positions over time, row and column.
- Every layer attends to the text, scaled by a learned gate that depends on the number of earlier frames in the window.
  The text has no effect at initialization. A learned "no text" embedding replaces dropped captions, for classifier-free
  guidance (https://arxiv.org/abs/2207.12598).
- Generation sees what training sees. Frames are counted from the first of a clip, wherever it lies in its footage: the
  first has no previous frame. Nothing depends on the length: rotary embeddings enter as differences of at most `window`
  frames, and the gate is constant once the window is full. Therefore a model that is trained on clips of at least
  `window` frames generates videos of any length; after shorter clips, longer videos need distances it never learnt.
  (The distance `window`, to later positions of the oldest frame, occurs only in clips of more frames.)

Divided space-time attention: https://arxiv.org/abs/2102.05095.
"""

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from t2v.batch import TextEmbedding, check_token_range
from t2v.checkpoints.hub import HubModel
from t2v.compilation import compile_layer, prepare_compilation
from t2v.errors import UserError, check_range
from t2v.torch_private import mark_dynamic
from t2v.transformer.attention import WindowBlocks, window_blocks
from t2v.transformer.block import Block, recompute
from t2v.transformer.config import AttentionConfig, TextConfig
from t2v.transformer.layers import PreviousFrame, RMSNorm, TextConvolution, TextGate, linear, local_tensor
from t2v.transformer.rope import Rotation, raster_positions, rotation_at, split_head_dim

Checkpointing = Literal["none", "attention", "full"]

_CODE_STD = 0.24
"""Standard deviation of embeddings that are projections of codes."""
_COMPILED_SHAPES = 64
"""Number of input shapes, such as lengths of clips, for which layers are compiled."""


class VideoTransformer(nn.Module, HubModel, library_name="t2v"):
    """Autoregressive transformer over the tokens of a video, conditioned on text.

    `save_pretrained` writes a folder of safetensors and JSON, which `from_pretrained` reads.

    Args:
        vocab_size: Codebook size of the VQ-VAE.
        grid_size: Height and width of the token grid of a frame.
        dim: Width of the model.
        spatial_layers: Layers that attend within a frame, at most 1,000; both kinds are interleaved evenly.
        temporal_layers: Layers that attend over the last frames, at most 1,000.
        hidden_dim: Hidden width of SwiGLU.
        attention: Number of heads, temporal window and rotary embedding.
        text: Width of the text embeddings, and how they condition the model.
        tied_head: Whether the token embedding is also the output projection.
        checkpointing: What the backward pass computes again instead of storing activations: nothing, attentions, or
            whole layers.
        device: Device of the weights. On "meta" they take no memory until `to_empty` and `reset_parameters`, or a
            loaded checkpoint, give them values.

    Raises:
        UserError: If a size is out of range, or the sizes do not fit each other.
    """

    def __init__(
        self,
        vocab_size: int = 16384,
        grid_size: int = 16,
        dim: int = 4096,
        spatial_layers: int = 24,
        temporal_layers: int = 16,
        hidden_dim: int = 9216,
        attention: AttentionConfig = AttentionConfig(),  # noqa: B008  (frozen)
        text: TextConfig = TextConfig(),  # noqa: B008  (frozen)
        tied_head: bool = False,
        checkpointing: Checkpointing = "none",
        device: str | None = None,
    ) -> None:
        super().__init__()
        check_range(self, "[2, inf)", vocab_size=vocab_size)
        check_range(self, "[1, inf)", grid_size=grid_size, dim=dim, hidden_dim=hidden_dim)
        check_range(self, "[0, inf)", spatial_layers=spatial_layers, temporal_layers=temporal_layers)
        check_range(self, "(-inf, 1000]", spatial_layers=spatial_layers, temporal_layers=temporal_layers)
        check_range(self, "[1, inf)", **{"spatial_layers + temporal_layers": spatial_layers + temporal_layers})
        heads, kv_heads = attention.heads, attention.kv_heads
        if dim % (2 * heads) or heads % kv_heads or hidden_dim % kv_heads:
            raise UserError(
                f"attention.heads={heads} must divide dim={dim} into even parts, and attention.kv_heads={kv_heads} "
                f"must divide heads={heads} and hidden_dim={hidden_dim}: change one of them."
            )
        self.vocab_size, self.grid_size = vocab_size, grid_size
        self.attention, self.text = attention, text
        self.checkpointing = checkpointing
        self.rope_dims = split_head_dim(dim // heads)
        self._compiled = False

        device = device or str(torch.get_default_device())
        with torch.device("meta"):
            self.token_embedding = nn.Embedding(vocab_size, dim)
            self.previous_frame = PreviousFrame(vocab_size, dim)
            self.start = nn.Parameter(torch.empty(dim))
            self.no_text = nn.Parameter(torch.empty(text.dim))
            self.text_norm = RMSNorm(text.dim)
            self.text_convolution = TextConvolution(text.dim, text.kernel_size) if text.kernel_size > 1 else None
            self.gate = TextGate(spatial_layers + temporal_layers, heads, attention.window) if text.gate else None
            self.blocks = nn.ModuleList(
                Block(temporal, dim, hidden_dim, text.dim, attention, checkpointing == "attention")
                for temporal in interleave(spatial_layers, temporal_layers)
            )
            self.norm = RMSNorm(dim)
            self.head = None if tied_head else nn.Linear(dim, vocab_size, bias=False)
        if device != "meta":
            self.to_empty(device=device)
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the weights: normal(0, 0.02), smaller where a layer ends, zero where the text enters."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1 and "norm" in name:
                nn.init.ones_(parameter)
            elif name in ("previous_frame.mix.weight", "text_convolution.weight"):
                nn.init.normal_(parameter, std=0.3)
                with torch.no_grad():
                    centre = (1, 1) if parameter.ndim == 4 else (parameter.shape[2] // 2,)
                    parameter[:, :, *centre] += 1
            elif name == "gate.hidden.weight":
                nn.init.normal_(parameter, std=0.5)
            elif name.startswith("gate.") or name.endswith("text_attention.out.weight"):
                nn.init.zeros_(parameter)
            elif name.endswith("out.weight"):
                nn.init.normal_(parameter, std=0.02 / (2 * len(self.blocks)) ** 0.5)
            else:
                nn.init.normal_(parameter, std=0.02)

    @torch.no_grad()
    def initialize_embeddings(self, codes: Float[Tensor, "v code_dim"]) -> None:
        """Initialize the embeddings of the tokens by a random projection of their codes.

        Similar codes, which are decoded to similar pixels, then begin with similar embeddings.

        Args:
            codes: The codebook of the VQ-VAE; only the directions of the codes are used.
        """
        unit = F.normalize(codes.float(), dim=-1).cpu()
        generator = torch.Generator().manual_seed(torch.initial_seed())  # the same for any number of devices
        for weight in (self.token_embedding.weight, self.previous_frame.embedding.weight):
            projection = torch.randn(
                unit.shape[1], weight.shape[1], generator=generator, dtype=unit.dtype, device="cpu"
            )
            projected = (unit @ projection * _CODE_STD).to(weight.device, weight.dtype)
            if isinstance(weight, DTensor):
                projected = distribute_tensor(projected, weight.device_mesh, weight.placements)
            weight.copy_(projected)

    @classmethod
    def from_config(cls, arguments: dict[str, Any]) -> "VideoTransformer":
        """Build an untrained model.

        Args:
            arguments: Arguments of the class, with `attention` and `text` as dictionaries, as in a YAML config.
        """
        attention, text = arguments.get("attention", {}), arguments.get("text", {})
        return cls(**{**arguments, "attention": AttentionConfig(**attention), "text": TextConfig(**text)})

    def forward(
        self,
        tokens: Int[Tensor, "b t h w"],
        text: TextEmbedding,
        drop_text: Bool[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b t h w v"]:
        """Return the logits of the token at each position, given the tokens before it.

        Args:
            tokens: Values in [0, vocab_size). The token at a position does not change the logits there or before.
            text: Text embeddings of the captions.
            drop_text: True for samples whose caption is replaced by "no text".

        Raises:
            UserError: If the text embeddings have another width, or (checked on the CPU only) a token is out of range.
        """
        self.check_tokens(tokens)
        b, t, h, w = tokens.shape
        embedded = self.token_embedding(tokens.flatten(1))  # b (t h w) d
        x = torch.cat([local_tensor(self.start).expand(b, 1, -1), embedded[:, :-1]], dim=1)
        if t > 1:
            previous = self.previous_frame(tokens[:, :-1]).flatten(1, 2)
            x = x + F.pad(previous, (0, 0, h * w, 0))  # zero for the first frame
        text_tokens, mask = self.normalize_text(text, drop_text)
        for padded in (text_tokens, mask):
            mark_dynamic(padded, 1)
        x = rearrange(x, "b (t n) d -> b t n d", t=t)
        rotate = self.rotation(0, t * h * w, h, w)
        gates = self.gates(torch.arange(t, device=tokens.device))
        blocks = self._window_blocks(t, h * w, tokens.device)
        checkpointed = self.checkpointing == "full" and torch.is_grad_enabled()
        for block, gate in zip(self.blocks, gates, strict=True):
            run = partial(recompute, block) if checkpointed else block
            x = run(x, text_tokens, mask, gate, rotate, self.attention.window, blocks if block.temporal else None)
        return rearrange(self.logits(x), "b t (h w) v -> b t h w v", h=h)

    def normalize_text(self, text: TextEmbedding, drop: Bool[Tensor, " b"] | None = None) -> TextEmbedding:
        """Return text embeddings as the layers use them.

        Args:
            text: Text embeddings.
            drop: True for samples whose text is replaced by the learned "no text" embedding.

        Raises:
            UserError: If the text embeddings have another width.
        """
        tokens, mask = text
        if tokens.shape[-1] != self.text.dim:
            raise UserError(
                f"The text embeddings have width {tokens.shape[-1]}, but the transformer's text.dim is "
                f"{self.text.dim}: use the text encoder that the transformer was configured for."
            )
        if drop is not None:
            no_text = local_tensor(self.no_text)
            tokens = torch.where(drop[:, None, None], no_text.to(tokens.dtype), tokens)
            first = torch.arange(mask.shape[1], device=mask.device) == 0
            mask = torch.where(drop[:, None], first, mask)
        tokens = self.text_norm(tokens)
        if self.text_convolution is not None:
            tokens = self.text_convolution(tokens.masked_fill(~mask[..., None], 0))  # as if padding were not there
        return TextEmbedding(tokens, mask)

    def logits(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch v"]:
        """Return the logits for outputs of the last layer."""
        weight = self.token_embedding.weight if self.head is None else self.head.weight
        return linear(self.norm(x), local_tensor(weight))

    def gates(self, frame: Int[Tensor, " t"]) -> list[Float[Tensor, "t heads"]] | list[None]:
        """Return the scale of text attention at frames, counted from 0, for each layer."""
        return [None] * len(self.blocks) if self.gate is None else list(self.gate(frame))

    def rotation(self, start: int, stop: int, height: int, width: int) -> Rotation:
        """Return the rotary embedding of the raster positions from `start` to `stop`."""
        positions = raster_positions(start, stop, height, width, self.start.device)
        return rotation_at(positions, self.rope_dims, self.attention.rope_theta)

    def check_tokens(self, tokens: Int[Tensor, "b t h w"]) -> None:
        """Check the range of tokens on the CPU. On a GPU it would synchronize, and the embedding checks it itself."""
        if tokens.is_cpu and not torch.compiler.is_compiling():
            check_token_range(tokens, self.vocab_size, "use tokens of the VQ-VAE that it was trained with.")

    def compile_layers(self) -> None:
        """Compile the layers of `forward`, for each shape of clips and for captions of any length."""
        prepare_compilation(_COMPILED_SHAPES)
        self._compiled = True
        for block in self.blocks:
            compile_layer(block)

    def _window_blocks(self, frames: int, positions: int, device: torch.device) -> WindowBlocks | None:
        """Return what compiled temporal layers share on a GPU, if there are more frames than the window."""
        compiled = self._compiled or torch.compiler.is_compiling()
        if not compiled or device.type != "cuda" or frames <= self.attention.window:
            return None
        return window_blocks(frames * positions, self.attention.window * positions, device)


def interleave(spatial: int, temporal: int) -> list[bool]:
    """Return for each layer whether it is temporal, with the temporal layers spread evenly."""
    layers = spatial + temporal
    return [(i + 1) * temporal // layers > i * temporal // layers for i in range(layers)]
