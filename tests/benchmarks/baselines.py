"""Published tokenizer designs as subclasses of `VQVAE`, so that `LitVQVAE`, `fit` and `validate` run them unchanged.

- LlamaGen (https://arxiv.org/abs/2406.06525): a VQGAN that encodes frame by frame, built from the same blocks in
  `diffusers`; its codebook of l2-normalized codes is trained by gradients. Short runs have no GAN term: it begins at
  step 20,000.
- VideoGPT (https://arxiv.org/abs/2104.10157): 3D convolutions and axial attention over the whole clip. It is not causal
  and cannot decode frame by frame; clips must have a multiple of four frames.
- Both are scaled by their width alone; `candidates` finds the width for a given number of parameters.

Axis letters: b batch or sequences, t frames, s tokens in time, c channels (3, red green blue), h w token grid,
n positions, d width of a code or layer.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize

from t2v.errors import UserError
from t2v.vqvae.model import VQVAE, DecoderState
from t2v.vqvae.quantizer import Quantized, Quantizer


class _Normalize(nn.Module):
    def forward(self, codes: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return F.normalize(codes, dim=-1)


class LlamaGenQuantizer(Quantizer):
    """Codebook of LlamaGen: l2-normalized codes, trained by gradients and never restarted; no entropy term.

    Args:
        codebook_size: Number of codes.
        dim: Width of a code.
        commitment_weight: Weight of the commitment loss; the codebook loss has weight 1.
    """

    def __init__(self, codebook_size: int = 16384, dim: int = 8, commitment_weight: float = 0.25) -> None:
        super().__init__()
        self.codebook_size, self.dim, self.commitment_weight = codebook_size, dim, commitment_weight
        self.quantize = VectorQuantize(
            dim=dim,
            codebook_size=codebook_size,
            ema_update=False,
            learnable_codebook=True,
            vq_bridge=_Normalize(),
            rotation_trick=False,
            commitment_weight=0.0,  # the library gives both losses the same weight
        )
        codes = self.quantize._codebook.embed
        codes.data = F.normalize(torch.empty_like(codes).uniform_(-1, 1), dim=-1)

    def forward(self, vectors: Float[Tensor, "b n d"]) -> Quantized:
        with torch.autocast(vectors.device.type, enabled=False):
            vectors = self.relax(vectors.float())
            codes, indices, loss = self.quantize(vectors)
            if self.training:
                chosen = self.lookup(indices)
                commitment = F.mse_loss(vectors, chosen.detach())
                loss = F.mse_loss(chosen, vectors.detach()) + self.commitment_weight * commitment
        return Quantized(codes, indices, loss.squeeze())

    def relax(self, vectors: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return F.normalize(vectors, dim=-1)

    def lookup(self, indices: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return F.normalize(self.quantize._codebook.embed[0], dim=-1)[indices]


class LlamaGenTokenizer(VQVAE):
    """Tokenizer of LlamaGen, without its GAN term.

    Args:
        image_size: Height and width of a frame in pixels.
        width: Channels of the first level; every level is rounded to a multiple of `groups`.
        channel_multipliers: Channels of each level in units of `width`; between levels the size is halved. (1, 2, 2, 4)
            is the published VQ-8, (1, 1, 2, 2, 4) the VQ-16.
        groups: Groups of the group normalization; the published number is 32, and narrow networks need fewer.
        quantizer: The quantizer; by default a `LlamaGenQuantizer`.
    """

    def __init__(
        self,
        image_size: int = 256,
        width: float = 128,
        channel_multipliers: Sequence[int] = (1, 2, 2, 4),
        groups: int = 32,
        quantizer: Quantizer | None = None,
    ) -> None:
        from diffusers.models.autoencoders.vae import Decoder, Encoder

        nn.Module.__init__(self)  # `VQVAE.__init__` would build its own networks
        self.image_size, self.frames_at_once = image_size, None
        self.stride = 2 ** (len(channel_multipliers) - 1)
        self.grid_size = image_size // self.stride
        self.quantizer = quantizer if quantizer is not None else LlamaGenQuantizer()
        self.codebook_size = self.quantizer.codebook_size
        levels = [max(1, round(width * multiplier / groups)) * groups for multiplier in channel_multipliers]
        latent_channels = 2 * levels[0]  # 256 at the published width
        resizing_levels = len(levels) - 1
        self.encoder = nn.Sequential(
            Encoder(
                out_channels=latent_channels,
                down_block_types=("DownEncoderBlock2D",) * resizing_levels + ("AttnDownEncoderBlock2D",),
                block_out_channels=tuple(levels),
                layers_per_block=2,
                norm_num_groups=groups,
                double_z=False,
            ),
            nn.Conv2d(latent_channels, self.quantizer.dim, 1),
        )
        self.expand = nn.Linear(self.quantizer.dim, latent_channels)
        self.temporal = nn.ModuleList()
        self.decoder = nn.Sequential(
            Decoder(
                in_channels=latent_channels,
                up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * resizing_levels,
                block_out_channels=tuple(levels),
                layers_per_block=2,
                norm_num_groups=groups,
            )
        )
        self.to(memory_format=torch.channels_last)


class VideoGPTQuantizer(Quantizer):
    """Codebook of VideoGPT: codes follow the moving average of their vectors; rarely chosen codes are restarted.

    It is initialized from vectors of the first batch, here after one iteration of k-means, which the library requires.

    Args:
        codebook_size: Number of codes.
        dim: Width of a code.
        commitment_weight: Weight of the mean squared difference between vectors and their codes.
    """

    def __init__(self, codebook_size: int = 2048, dim: int = 256, commitment_weight: float = 0.25) -> None:
        super().__init__()
        self.codebook_size, self.dim, self.commitment_weight = codebook_size, dim, commitment_weight
        self.quantize = VectorQuantize(
            dim=dim,
            codebook_size=codebook_size,
            decay=0.99,
            threshold_ema_dead_code=1,
            kmeans_init=True,
            kmeans_iters=1,
            rotation_trick=False,
            commitment_weight=commitment_weight,
        )

    @property
    def ready(self) -> bool:
        return bool(self.quantize._codebook.initted)

    def forward(self, vectors: Float[Tensor, "b n d"]) -> Quantized:
        with torch.autocast(vectors.device.type, enabled=False):
            codes, indices, loss = self.quantize(vectors.float())
        return Quantized(codes, indices, loss.squeeze())

    def relax(self, vectors: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return vectors

    def lookup(self, indices: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return self.quantize.codebook[indices]


class VideoGPTTokenizer(VQVAE):
    """Tokenizer of VideoGPT: a token covers 4×4 pixels of four frames, so a clip of t frames has t / 4 token frames.

    Args:
        image_size: Height and width of a frame in pixels, a multiple of 4.
        width: Number of channels, even.
        res_layers: Residual blocks with axial attention in the encoder, and in the decoder.
        quantizer: The quantizer; by default a `VideoGPTQuantizer`.
    """

    frames_per_token = 4

    def __init__(
        self, image_size: int = 128, width: int = 240, res_layers: int = 4, quantizer: Quantizer | None = None
    ) -> None:
        nn.Module.__init__(self)  # `VQVAE.__init__` would build its own networks
        self.image_size, self.frames_at_once = image_size, None
        self.stride, self.grid_size = 4, image_size // 4
        self.quantizer = quantizer if quantizer is not None else VideoGPTQuantizer()
        self.codebook_size = self.quantizer.codebook_size

        def res_stack() -> list[nn.Module]:
            return [*(_AttentionResBlock(width) for _ in range(res_layers)), nn.BatchNorm3d(width), nn.ReLU()]

        self.encoder = nn.Sequential(
            nn.Conv3d(3, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv3d(width, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv3d(width, width, 3, padding=1),
            *res_stack(),
            nn.Conv3d(width, self.quantizer.dim, 1),
        )
        self.expand = nn.Linear(self.quantizer.dim, width)
        self.temporal = nn.ModuleList()
        self.decoder = nn.Sequential(
            *res_stack(),
            nn.ConvTranspose3d(width, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose3d(width, 3, 4, stride=2, padding=1),
        )

    # The methods of `VQVAE` are typed for as many token frames as frames.
    def encode(self, video: Float[Tensor, "b t c height width"]) -> Int[Tensor, "b s h w"]:
        latents = self._encode(video)
        indices = self.quantizer(rearrange(latents, "b s h w d -> (b s) (h w) d")).indices
        return indices.view(latents.shape[:-1])

    def decode(self, tokens: Int[Tensor, "b s h w"]) -> Float[Tensor, "b t c height width"]:
        return self.decode_stream(tokens)[0]

    def decode_stream(
        self, tokens: Int[Tensor, "b s h w"], state: DecoderState | None = None
    ) -> tuple[Float[Tensor, "b t c height width"], DecoderState]:
        """Decode a whole clip: there is no state to continue it from."""
        codes = self.quantizer.lookup(rearrange(tokens, "b s h w -> (b s) (h w)"))
        video, state = self._decode(codes.view(*tokens.shape, -1))
        return video.clamp(-1, 1), state

    def _encode(self, video: Float[Tensor, "b t c height width"]) -> Float[Tensor, "b s h w d"]:
        if video.shape[1] % self.frames_per_token:
            raise UserError(
                f"A clip of {video.shape[1]} frames does not divide into tokens of {self.frames_per_token} frames: set "
                f"data.frames to a multiple of {self.frames_per_token}."
            )
        latents = self.encoder(rearrange(video, "b t c height width -> b c t height width"))
        return rearrange(latents, "b d s h w -> b s h w d")

    def _decode(
        self, codes: Float[Tensor, "b s h w d"], state: DecoderState | None = None
    ) -> tuple[Float[Tensor, "b t c height width"], DecoderState]:
        video = self.decoder(rearrange(self.expand(codes), "b s h w d -> b d s h w"))
        return rearrange(video, "b c t height width -> b t c height width"), []


class _AttentionResBlock(nn.Module):
    """Residual block: x + axial(relu(bn(conv1(relu(bn(conv3(relu(bn(x))))))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.BatchNorm3d(width),
            nn.ReLU(),
            nn.Conv3d(width, width // 2, 3, padding=1, bias=False),
            nn.BatchNorm3d(width // 2),
            nn.ReLU(),
            nn.Conv3d(width // 2, width, 1, bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(),
            _AxialAttention(width),
        )

    def forward(self, x: Float[Tensor, "b d s h w"]) -> Float[Tensor, "b d s h w"]:
        return x + self.block(x)


class _AxialAttention(nn.Module):
    """Sum of three attention layers: along time, along height and along width."""

    heads = 2

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project_in = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in "thw")
        self.project_out = nn.ModuleList(nn.Linear(width, width) for _ in "thw")
        for layer in [*self.project_in, *self.project_out]:
            nn.init.normal_(layer.weight, std=width**-0.5)

    def forward(self, x: Float[Tensor, "b d s h w"]) -> Float[Tensor, "b d s h w"]:
        x = x.movedim(1, -1)
        total = torch.zeros_like(x)
        for axis, (project_in, project_out) in enumerate(zip(self.project_in, self.project_out, strict=True), start=1):
            rows = project_in(x).movedim(axis, -2)
            q, k, v = rearrange(rows, "... n (three heads d) -> three ... heads n d", three=3, heads=self.heads)
            lines = F.scaled_dot_product_attention(q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2))
            lines = rearrange(lines.unflatten(0, q.shape[:3]), "... heads n d -> ... n (heads d)")
            total = total + project_out(lines.movedim(-2, axis))
        return total.movedim(-1, 1)
