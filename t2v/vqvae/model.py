"""The VQ-VAE: from frames to tokens and back.

- The encoder works on single frames, so a picture is a clip of one frame and a clip of any length can be tokenized.
- Each block of `patch_size` × `patch_size` pixels is first folded into channels, which is cheap; residual blocks and
  strided convolutions follow; then `latent_patch_size` × `latent_patch_size` latents become one token. At full size:
  512×512 pixels → 64×64 latents → 16×16 tokens.
- The decoder mixes frames causally at the token grid, where this is cheap, and then mirrors the encoder on single
  frames. Decoding a clip in pieces, with the state passed on, gives the same result as decoding it at once.
- `frames_at_once` limits the memory of both networks without changing their output.

VQ-VAE: https://arxiv.org/abs/1711.00937; VQGAN: https://arxiv.org/abs/2012.09841.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from t2v.batch import Video, check_token_range
from t2v.checkpoints.config import from_config, to_config
from t2v.checkpoints.hub import HubModel
from t2v.errors import UserError, check_range
from t2v.vqvae.layers import CausalTemporalBlock, ChannelNorm, Downsample, ResBlock, Upsample
from t2v.vqvae.quantizer import Quantizer, VectorQuantizer

DecoderState = list[Float[Tensor, "b past channels h w"]]
"""The earlier frames that each temporal block still needs."""


class VQVAEOutput(NamedTuple):
    """The output of `VQVAE.forward`."""

    reconstruction: Video
    indices: Int[Tensor, "b t h w"] | None
    """The tokens; None if the latents were not quantized."""
    quantizer_loss: Float[Tensor, ""]


class VQVAE(
    nn.Module,
    HubModel,
    library_name="t2v",
    coders={Quantizer: (to_config, partial(from_config, base_class=Quantizer))},
):
    """Vector-quantized autoencoder for video.

    `save_pretrained` writes a folder of safetensors and JSON, which `from_pretrained` reads.

    Args:
        image_size: Height and width of a frame in pixels, a multiple of the stride.
        base_channels: Channels of the first level.
        channel_multipliers: Channels of each level in units of `base_channels`; between levels the size is halved.
        encoder_blocks: Residual blocks per level of the encoder, at most 100.
        encoder_kernel_size: Kernel size of the encoder's first convolution and residual blocks, odd. With 1 and a
            single level, a token depends on its own pixels alone, which makes it easier to predict.
        decoder_blocks: Residual blocks per level of the decoder, at most 100.
        temporal_blocks: Causal blocks over time in the decoder, at most 100.
        patch_size: Side in pixels of the blocks that are folded into channels before the first level.
        latent_patch_size: Side in latents of the blocks that become one token.
        quantizer: The quantizer; by default a `VectorQuantizer` with 16,384 codes.
        frames_at_once: Number of frames that the networks process at a time; by default all. In training, the
            activations of each group are recomputed in the backward pass, which takes about a third more time.

    Attributes:
        stride: Height and width in pixels of the area that one token covers.
        grid_size: Height and width of a frame's token grid.
        codebook_size: Number of codes.

    Raises:
        UserError: If `image_size` is not a multiple of the stride or `frames_at_once` is below 1.
    """

    def __init__(
        self,
        image_size: int = 512,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 4),
        encoder_blocks: int = 2,
        encoder_kernel_size: int = 3,
        decoder_blocks: int = 3,
        temporal_blocks: int = 2,
        patch_size: int = 2,
        latent_patch_size: int = 4,
        quantizer: Quantizer | None = None,
        frames_at_once: int | None = None,
    ) -> None:
        super().__init__()
        check_range(
            self,
            "[1, inf)",
            image_size=image_size,
            base_channels=base_channels,
            channel_multipliers=channel_multipliers,
            encoder_kernel_size=encoder_kernel_size,
            patch_size=patch_size,
            latent_patch_size=latent_patch_size,
            frames_at_once=frames_at_once,
        )
        for interval in ("[0, inf)", "(-inf, 100]"):
            check_range(
                self,
                interval,
                encoder_blocks=encoder_blocks,
                decoder_blocks=decoder_blocks,
                temporal_blocks=temporal_blocks,
            )
        if encoder_kernel_size % 2 == 0:
            raise UserError(f"encoder_kernel_size={encoder_kernel_size} must be odd, such as 3 (VQVAE).")
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        self.image_size = image_size
        self.frames_at_once = frames_at_once
        self.stride = patch_size * 2 ** (len(widths) - 1) * latent_patch_size
        if image_size % self.stride:
            raise UserError(
                f"image_size={image_size} is not a multiple of {self.stride}, the stride of the VQ-VAE (patch_size × "
                f"2^(levels − 1) × latent_patch_size): change one of them."
            )
        if frames_at_once is not None and frames_at_once < 1:
            raise UserError(f"frames_at_once={frames_at_once} must be at least 1; leave it out for all frames.")
        self.grid_size = image_size // self.stride
        self.quantizer = quantizer if quantizer is not None else VectorQuantizer()
        self.codebook_size = self.quantizer.codebook_size
        width = widths[-1]

        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(patch_size),
            nn.Conv2d(3 * patch_size**2, widths[0], encoder_kernel_size, padding=encoder_kernel_size // 2),
            *_levels(widths, encoder_blocks, encoder_kernel_size, Downsample),
            ChannelNorm(width),
            nn.SiLU(),
            nn.Conv2d(width, self.quantizer.dim, latent_patch_size, stride=latent_patch_size),
        )
        self.expand = nn.Linear(self.quantizer.dim, width)
        self.temporal = nn.ModuleList(CausalTemporalBlock(width) for _ in range(temporal_blocks))
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(width, width, latent_patch_size, stride=latent_patch_size),
            *_levels(widths[::-1], decoder_blocks, 3, Upsample),
            ChannelNorm(widths[0]),
            nn.SiLU(),
            nn.Conv2d(widths[0], 3 * patch_size**2, 3, padding=1),
            nn.PixelShuffle(patch_size),
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, video: Video, quantize: bool = True) -> VQVAEOutput:
        """Reconstruct a video.

        Args:
            video: RGB frames in [-1, 1].
            quantize: Whether to quantize the latents. In evaluation they are not quantized either way as long as the
                codebook is not initialized.
        """
        latents = self._encode(video)
        b, _, h, _, _ = latents.shape
        flat = rearrange(latents, "b t h w d -> (b t) (h w) d")
        if quantize and (self.training or self.quantizer.ready):
            codes, indices, loss = self.quantizer(flat)
            indices = rearrange(indices, "(b t) (h w) -> b t h w", b=b, h=h)
        else:
            codes, indices, loss = self.quantizer.relax(flat), None, flat.new_zeros(())
        codes = rearrange(codes, "(b t) (h w) d -> b t h w d", b=b, h=h)
        return VQVAEOutput(self._decode(codes)[0], indices, loss)

    def encode(self, video: Video) -> Int[Tensor, "b t h w"]:
        """Tokenize a video; call `eval()` first, because in training mode this also updates the codebook.

        Args:
            video: RGB frames in [-1, 1]; height and width are multiples of the stride.

        Raises:
            UserError: If the codebook is not initialized, or the frames have another size.
        """
        if not (self.training or self.quantizer.ready):
            raise UserError(
                "The codebook of this VQ-VAE was never trained, so it has no tokens: load a checkpoint of a run that "
                "went beyond model.quantize_from_step."
            )
        latents = self._encode(video)
        indices: Tensor = self.quantizer(rearrange(latents, "b t h w d -> (b t) (h w) d")).indices
        return rearrange(indices, "(b t) (h w) -> b t h w", b=len(video), h=latents.shape[2])

    def decode(self, tokens: Int[Tensor, "b t h w"]) -> Video:
        """Decode tokens to a video in [-1, 1]."""
        return self.decode_stream(tokens)[0]

    def decode_stream(
        self, tokens: Int[Tensor, "b t h w"], state: DecoderState | None = None
    ) -> tuple[Video, DecoderState]:
        """Decode the next frames of a video.

        Args:
            tokens: Tokens of one or more frames.
            state: The state returned for the frames before these; None at the start of a video.

        Returns:
            The frames in [-1, 1], and the state for the frames that follow.

        Raises:
            UserError: If a token is outside the codebook.
        """
        check_token_range(tokens, self.codebook_size, "decode them with the VQ-VAE that they were encoded with.")
        codes = self.quantizer.lookup(rearrange(tokens, "b t h w -> (b t) (h w)"))
        codes = rearrange(codes, "(b t) (h w) d -> b t h w d", b=len(tokens), h=tokens.shape[2])
        video, state = self._decode(codes, state)
        return video.clamp(-1, 1), state

    def fingerprint(self) -> str:
        """Return a hash of all weights and of the codebook, 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            if tensor.is_floating_point():  # a bfloat16 checkpoint is loaded into float32
                tensor = tensor.float()
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @classmethod
    def from_config(cls, arguments: dict[str, Any]) -> "VQVAE":
        """Build the network that a saved config describes, with new weights.

        Args:
            arguments: Arguments of the class in JSON's types, with the quantizer as `to_config` writes it.
        """
        quantizer = arguments.get("quantizer")
        return cls(**{**arguments, "quantizer": quantizer and from_config(quantizer, Quantizer)})

    def _encode(self, video: Video) -> Float[Tensor, "b t h w d"]:
        if video.shape[-2] % self.stride or video.shape[-1] % self.stride:
            raise UserError(
                f"Frames of {video.shape[-2]}×{video.shape[-1]} pixels do not divide into tokens of {self.stride}×"
                f"{self.stride}: resize them to a multiple of {self.stride}."
            )
        latents = self._in_groups(self.encoder, video.flatten(0, 1).to(self.expand.weight.dtype))
        return rearrange(latents, "(b t) d h w -> b t h w d", b=len(video))

    def _decode(
        self, codes: Float[Tensor, "b t h w d"], state: DecoderState | None = None
    ) -> tuple[Video, DecoderState]:
        x = self.expand(codes.to(self.expand.weight.dtype))
        x = rearrange(x, "b t h w channels -> b t channels h w")
        new_states = []
        for i, block in enumerate(self.temporal):
            x, new_state = block(x, None if state is None else state[i])
            new_states.append(new_state)
        frames = self._in_groups(self.decoder, x.flatten(0, 1))
        return rearrange(frames, "(b t) c height width -> b t c height width", b=len(codes)), new_states

    def _in_groups(
        self, network: nn.Module, frames: Float[Tensor, "n c_in h_in w_in"]
    ) -> Float[Tensor, "n c_out h_out w_out"]:
        """Apply a network to `frames_at_once` frames at a time, with activation checkpointing."""
        frames = frames.contiguous(memory_format=torch.channels_last)
        if self.frames_at_once is None or len(frames) <= self.frames_at_once:
            output: Tensor = network(frames)
            return output
        groups = frames.split(self.frames_at_once)
        if torch.is_grad_enabled():
            return torch.cat([checkpoint(network, group, use_reentrant=False) for group in groups])
        return torch.cat([network(group) for group in groups])


def _levels(
    widths: Sequence[int], blocks: int, kernel_size: int, resize: type[Downsample] | type[Upsample]
) -> list[nn.Module]:
    """Return residual blocks for each width, with a resizing layer before each new width."""
    layers: list[nn.Module] = [ResBlock(widths[0], widths[0], kernel_size) for _ in range(blocks)]
    for before, after in pairwise(widths):
        layers.append(resize(before))
        layers += [ResBlock(before if i == 0 else after, after, kernel_size) for i in range(blocks)]
    return layers


def to_model_range(video: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Convert uint8 pixels to floats in [-1, 1]."""
    return video.float() / 127.5 - 1


def to_uint8(video: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Convert floats in [-1, 1] to uint8 pixels; values outside the range are clipped."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
