"""The VQ-VAE: frames to tokens and back.

- The encoder works frame by frame, so a picture is a clip of one frame and every length tokenises the same way.
- `patch_size` pixels are folded into channels first (cheap), residual blocks and strided convolutions follow, and
  `latent_patch_size` latents are folded into one token: 512×512 pixels → 64×64 latents → 16×16 tokens at full size.
- The decoder mixes time causally at the token grid, where it is cheap, and mirrors the encoder frame by frame. Decoding
  in pieces, with the state handed on, equals decoding whole.
- Both networks work frame by frame, so `frames_at_once` bounds their memory without changing what they compute.

VQ-VAE: https://arxiv.org/abs/1711.00937; VQGAN: https://arxiv.org/abs/2012.09841.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from t2v.batch import check_token_range
from t2v.checkpoints.config import from_config, to_config
from t2v.checkpoints.hub import HubModel
from t2v.errors import UserError
from t2v.vqvae.layers import CausalTemporalBlock, ChannelNorm, Downsample, ResBlock, Upsample
from t2v.vqvae.quantizer import Quantizer, VectorQuantizer

DecoderState = list[Float[Tensor, "b k c h w"]]


class VQVAEOutput(NamedTuple):
    """What a training step needs of the VQ-VAE."""

    reconstruction: Float[Tensor, "b t c h w"]
    indices: Int[Tensor, "b t h w"] | None
    """None in a pass that did not quantize."""
    quantizer_loss: Float[Tensor, ""]


class VQVAE(
    nn.Module,
    HubModel,
    library_name="t2v",
    coders={Quantizer: (to_config, partial(from_config, base_class=Quantizer))},
):
    """Vector-quantised autoencoder for video.

    `save_pretrained` writes a folder of safetensors and JSON, which `from_pretrained` reads.

    Attributes:
        stride: height and width of a token in pixels.
        grid_size: height and width of the token grid of a frame.
        codebook_size: number of codes.
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
    ):
        """
        Args:
            image_size: height and width of a frame in pixels, a multiple of the stride.
            base_channels: width of the first level.
            channel_multipliers: width of each level in units of `base_channels`; between levels the size halves.
            encoder_blocks: residual blocks a level in the encoder.
            encoder_kernel_size: of the residual blocks in the encoder, odd; 1 keeps what a token says close to its
                place, which makes it easier to predict.
            decoder_blocks: residual blocks a level in the decoder.
            temporal_blocks: causal blocks over time in the decoder.
            patch_size: pixels a side that are folded into channels before the first level.
            latent_patch_size: latents a side that become one token.
            quantizer: chooses the codes; a `VectorQuantizer` of 16,384 codes by default.
            frames_at_once: frames that go through the networks together, all by default. In training, activations of
                a group are computed again in the backward pass, which bounds memory for about a third more time.
        """
        super().__init__()
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
            nn.Conv2d(3 * patch_size**2, widths[0], 3, padding=1),
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

    def forward(self, video: Float[Tensor, "b t c h w"], quantize: bool = True) -> VQVAEOutput:
        """Reconstructs a video in [-1, 1].

        Latents go through unquantised where `quantize` is False, and in evaluation as long as training has not started
        the codebook.
        """
        vectors = self._encode(video)
        b, _, h, _, _ = vectors.shape
        flat = rearrange(vectors, "b t h w c -> (b t) (h w) c")
        if quantize and (self.training or self.quantizer.ready):
            codes, indices, loss = self.quantizer(flat)
            indices = rearrange(indices, "(b t) (h w) -> b t h w", b=b, h=h)
        else:
            codes, indices, loss = self.quantizer.relax(flat), None, flat.new_zeros(())
        codes = rearrange(codes, "(b t) (h w) c -> b t h w c", b=b, h=h)
        return VQVAEOutput(self._decode(codes)[0], indices, loss)

    def encode(self, video: Float[Tensor, "b t c height width"]) -> Int[Tensor, "b t h w"]:
        """Tokenises a video in [-1, 1], in whatever mode the module is (call `eval()` to leave the codebook alone)."""
        if not (self.training or self.quantizer.ready):
            raise UserError(
                "The codebook of this VQ-VAE was never trained, so it has no tokens: load a checkpoint, of a run that "
                "went beyond model.quantize_from_step."
            )
        vectors = self._encode(video)
        indices = self.quantizer(rearrange(vectors, "b t h w c -> (b t) (h w) c")).indices
        return rearrange(indices, "(b t) (h w) -> b t h w", b=len(video), h=vectors.shape[2])

    def decode(self, tokens: Int[Tensor, "b t h w"]) -> Float[Tensor, "b t c height width"]:
        """Turns tokens into a video in [-1, 1]."""
        return self.decode_stream(tokens)[0]

    def decode_stream(
        self, tokens: Int[Tensor, "b t h w"], state: DecoderState | None = None
    ) -> tuple[Float[Tensor, "b t c height width"], DecoderState]:
        """Decodes the next frames of a video.

        Args:
            tokens: of any number of frames.
            state: what the call for the frames before these returned; None at the beginning.

        Returns:
            The frames in [-1, 1], and the state for the frames after these.

        Raises:
            UserError: if a token is outside the codebook.
        """
        check_token_range(tokens, self.codebook_size, "decode them with the VQ-VAE that they were encoded with.")
        codes = self.quantizer.lookup(rearrange(tokens, "b t h w -> (b t) (h w)"))
        codes = rearrange(codes, "(b t) (h w) c -> b t h w c", b=len(tokens), h=tokens.shape[2])
        video, state = self._decode(codes, state)
        return video.clamp(-1, 1), state

    def fingerprint(self) -> str:
        """A hash of the weights that decide which tokens a frame becomes and what they decode to."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    @classmethod
    def from_config(cls, arguments: dict[str, Any]) -> "VQVAE":
        """Builds the network that a saved config describes, with fresh weights.

        Args:
            arguments: those of `__init__` in JSON's types, the quantizer as `to_config` writes it.
        """
        quantizer = arguments.get("quantizer")
        return cls(**{**arguments, "quantizer": quantizer and from_config(quantizer, Quantizer)})

    def _encode(self, video: Float[Tensor, "b t c height width"]) -> Float[Tensor, "b t h w c"]:
        if video.shape[-2] % self.stride or video.shape[-1] % self.stride:
            raise UserError(
                f"Frames of {video.shape[-2]}×{video.shape[-1]} pixels do not divide into tokens of {self.stride}×"
                f"{self.stride}: resize them to a multiple of {self.stride}."
            )
        vectors = self._in_groups(self.encoder, video.flatten(0, 1))
        return rearrange(vectors, "(b t) c h w -> b t h w c", b=len(video))

    def _decode(
        self, codes: Float[Tensor, "b t h w c"], state: DecoderState | None = None
    ) -> tuple[Float[Tensor, "b t c height width"], DecoderState]:
        x = rearrange(self.expand(codes), "b t h w d -> b t d h w")
        states = []
        for i, block in enumerate(self.temporal):
            x, new_state = block(x, None if state is None else state[i])
            states.append(new_state)
        frames = self._in_groups(self.decoder, x.flatten(0, 1))
        return frames.unflatten(0, codes.shape[:2]), states

    def _in_groups(self, network: nn.Module, frames: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d height width"]:
        """The network on `frames_at_once` frames at a time, its activations computed again for gradients."""
        frames = frames.contiguous(memory_format=torch.channels_last)
        if self.frames_at_once is None or len(frames) <= self.frames_at_once:
            return network(frames)
        groups = frames.split(self.frames_at_once)
        if torch.is_grad_enabled():
            return torch.cat([checkpoint(network, group, use_reentrant=False) for group in groups])  # type: ignore[misc]
        return torch.cat([network(group) for group in groups])


def _levels(
    widths: Sequence[int], blocks: int, kernel_size: int, resize: type[Downsample] | type[Upsample]
) -> list[nn.Module]:
    """Residual blocks at each width, with halving (or doubling) of the size from one width to the next."""
    layers: list[nn.Module] = [ResBlock(widths[0], widths[0], kernel_size) for _ in range(blocks)]
    for before, after in pairwise(widths):
        layers.append(resize(before))
        layers += [ResBlock(before if i == 0 else after, after, kernel_size) for i in range(blocks)]
    return layers


def to_model_range(video: Tensor) -> Float[Tensor, "..."]:
    """uint8 pixels to floats in [-1, 1]."""
    return video.float() / 127.5 - 1


def to_uint8(video: Float[Tensor, "..."]) -> Tensor:
    """Floats in [-1, 1] to uint8 pixels."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
