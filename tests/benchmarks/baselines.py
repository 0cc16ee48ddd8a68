"""Published tokenizers, re-expressed as `VQVAE`s: `LitVQVAE`, the command line and `validate` run them unchanged.

- LlamaGen (https://arxiv.org/abs/2406.06525): a VQGAN, frame by frame, on the blocks of `diffusers`, which are the
  same; a codebook of l2-normalised codes that gradients teach. Short runs have no GAN term: it begins at step 20,000.
- VideoGPT (https://arxiv.org/abs/2104.10157): 3D convolutions and axial attention over all of a clip. It is not causal
  and cannot decode in pieces; clips must have a multiple of four frames.
- Both scale by their width alone, so that `like_llamagen` and `like_videogpt` give them any number of parameters.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder, Encoder
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize

from t2v.errors import UserError
from t2v.vqvae.model import VQVAE, DecoderState
from t2v.vqvae.quantizer import Quantized, Quantizer


class _Normalize(nn.Module):
    def forward(self, codes: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
        return F.normalize(codes, dim=-1)


class LlamaGenQuantizer(Quantizer):
    """The codebook of LlamaGen: l2-normalised codes, taught by gradients, never restarted; no entropy term."""

    def __init__(self, codebook_size: int = 16384, dim: int = 8, commitment_weight: float = 0.25):
        """
        Args:
            codebook_size: number of codes.
            dim: width of a code.
            commitment_weight: weight of the commitment beside the codebook's own loss, which counts in full.
        """
        super().__init__()
        self.codebook_size, self.dim, self.commitment_weight = codebook_size, dim, commitment_weight
        self.quantize = VectorQuantize(
            dim=dim,
            codebook_size=codebook_size,
            ema_update=False,
            learnable_codebook=True,
            vq_bridge=_Normalize(),
            rotation_trick=False,
            commitment_weight=0.0,  # the library weighs both directions alike
        )
        codes = self.quantize._codebook.embed
        codes.data = F.normalize(torch.empty_like(codes).uniform_(-1, 1), dim=-1)

    def forward(self, vectors: Float[Tensor, "n l c"]) -> Quantized:
        with torch.autocast(vectors.device.type, enabled=False):
            vectors = self.relax(vectors.float())
            codes, indices, loss = self.quantize(vectors)
            if self.training:
                chosen = self.lookup(indices)
                commitment = F.mse_loss(vectors, chosen.detach())
                loss = F.mse_loss(chosen, vectors.detach()) + self.commitment_weight * commitment
        return Quantized(codes, indices, loss.squeeze())

    def relax(self, vectors: Float[Tensor, "n l c"]) -> Float[Tensor, "n l c"]:
        return F.normalize(vectors, dim=-1)

    def lookup(self, indices: Int[Tensor, "n l"]) -> Float[Tensor, "n l c"]:
        return F.normalize(self.quantize._codebook.embed[0], dim=-1)[indices]


class LlamaGenTokenizer(VQVAE):
    """LlamaGen's tokenizer; (1, 2, 2, 4) is its VQ-8, (1, 1, 2, 2, 4) its VQ-16."""

    def __init__(
        self,
        image_size: int = 256,
        width: float = 128,
        channel_multipliers: Sequence[int] = (1, 2, 2, 4),
        groups: int = 32,
        quantizer: Quantizer | None = None,
    ):
        """
        Args:
            image_size: height and width of a frame in pixels.
            width: channels of the first level; every level is rounded to a multiple of `groups`.
            channel_multipliers: width of each level in units of `width`; between levels the size halves.
            groups: of the group normalisation; narrow networks need fewer than the published 32.
            quantizer: a `LlamaGenQuantizer` by default.
        """
        nn.Module.__init__(self)  # VQVAE's own would build its own networks
        self.image_size, self.frames_at_once = image_size, None
        self.stride = 2 ** (len(channel_multipliers) - 1)
        self.grid_size = image_size // self.stride
        self.quantizer = quantizer if quantizer is not None else LlamaGenQuantizer()
        self.codebook_size = self.quantizer.codebook_size
        levels = [max(1, round(width * multiplier / groups)) * groups for multiplier in channel_multipliers]
        latents, rest = 2 * levels[0], len(levels) - 1  # 256 at the published width
        self.encoder = nn.Sequential(
            Encoder(
                out_channels=latents,
                down_block_types=("DownEncoderBlock2D",) * rest + ("AttnDownEncoderBlock2D",),
                block_out_channels=tuple(levels),
                layers_per_block=2,
                norm_num_groups=groups,
                double_z=False,
            ),
            nn.Conv2d(latents, self.quantizer.dim, 1),
        )
        self.expand = nn.Linear(self.quantizer.dim, latents)
        self.temporal = nn.ModuleList()
        self.decoder = nn.Sequential(
            Decoder(
                in_channels=latents,
                up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * rest,
                block_out_channels=tuple(levels),
                layers_per_block=2,
                norm_num_groups=groups,
            )
        )
        self.to(memory_format=torch.channels_last)


class VideoGPTQuantizer(Quantizer):
    """The codebook of VideoGPT: codes follow the mean of their vectors, and restart on one where few choose them.

    It starts from vectors of the first batch, here after one round of k-means, which the library cannot leave out.
    """

    def __init__(self, codebook_size: int = 2048, dim: int = 256, commitment_weight: float = 0.25):
        """
        Args:
            codebook_size: number of codes.
            dim: width of a code.
            commitment_weight: weight of the squared distance between vectors and their codes.
        """
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

    def forward(self, vectors: Float[Tensor, "n l c"]) -> Quantized:
        with torch.autocast(vectors.device.type, enabled=False):
            codes, indices, loss = self.quantize(vectors.float())
        return Quantized(codes, indices, loss.squeeze())

    def relax(self, vectors: Float[Tensor, "n l c"]) -> Float[Tensor, "n l c"]:
        return vectors

    def lookup(self, indices: Int[Tensor, "n l"]) -> Float[Tensor, "n l c"]:
        return self.quantize.codebook[indices]


class VideoGPTTokenizer(VQVAE):
    """VideoGPT's tokenizer: every token stands for 4×4 pixels of four frames."""

    frames_a_token = 4

    def __init__(
        self, image_size: int = 128, width: int = 240, res_layers: int = 4, quantizer: Quantizer | None = None
    ):
        """
        Args:
            image_size: height and width of a frame in pixels, a multiple of 4.
            width: channels, an even number.
            res_layers: residual blocks with axial attention, in the encoder and in the decoder.
            quantizer: a `VideoGPTQuantizer` by default.
        """
        nn.Module.__init__(self)  # VQVAE's own would build its own networks
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

    def _encode(self, video: Float[Tensor, "b t c height width"]) -> Float[Tensor, "b s h w c"]:
        if video.shape[1] % self.frames_a_token:
            raise UserError(
                f"A clip of {video.shape[1]} frames does not divide into tokens of {self.frames_a_token} frames: set "
                f"data.frames to a multiple of {self.frames_a_token}."
            )
        vectors = self.encoder(rearrange(video, "b t c h w -> b c t h w"))
        return rearrange(vectors, "b c s h w -> b s h w c")

    def _decode(
        self, codes: Float[Tensor, "b s h w c"], state: DecoderState | None = None
    ) -> tuple[Float[Tensor, "b t c height width"], DecoderState]:
        video = self.decoder(rearrange(self.expand(codes), "b s h w d -> b d s h w"))
        return rearrange(video, "b c t h w -> b t c h w"), []


class _AttentionResBlock(nn.Module):
    """x + axial(relu(bn(conv1(relu(bn(conv3(relu(bn(x))))))))."""

    def __init__(self, width: int):
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

    def forward(self, x: Float[Tensor, "b d t h w"]) -> Float[Tensor, "b d t h w"]:
        return x + self.block(x)


class _AxialAttention(nn.Module):
    """The sum of three attentions: along time, along height and along width."""

    heads = 2

    def __init__(self, width: int):
        super().__init__()
        self.project_in = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in "thw")
        self.project_out = nn.ModuleList(nn.Linear(width, width) for _ in "thw")
        for layer in [*self.project_in, *self.project_out]:
            nn.init.normal_(layer.weight, std=width**-0.5)

    def forward(self, x: Float[Tensor, "b d t h w"]) -> Float[Tensor, "b d t h w"]:
        x = x.movedim(1, -1)
        total = torch.zeros_like(x)
        for axis, (project_in, project_out) in enumerate(zip(self.project_in, self.project_out, strict=True), start=1):
            rows = project_in(x).movedim(axis, -2)
            q, k, v = rearrange(rows, "... n (three heads d) -> three ... heads n d", three=3, heads=self.heads)
            lines = F.scaled_dot_product_attention(q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2))
            lines = rearrange(lines.unflatten(0, q.shape[:3]), "... heads n d -> ... n (heads d)")
            total = total + project_out(lines.movedim(-2, axis))
        return total.movedim(-1, 1)


def count_parameters(model: VQVAE) -> int:
    """Parameters of the networks; the codebook is left out, as only some designs teach it by gradients."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("quantizer."))


def like_llamagen(parameters: int, image_size: int, stride: int, codebook_size: int) -> dict[str, Any]:
    """The config of a LlamaGen tokenizer with about this many parameters.

    Group normalisation gets as many of the published 32 groups as leave it the published four channels a group.

    Args:
        parameters: of the networks.
        image_size: height and width of a frame in pixels.
        stride: of the tokens it is compared with: from 16 on VQ-16, else VQ-8.
        codebook_size: number of codes.
    """
    quantizer = {
        "class_path": "tests.benchmarks.baselines.LlamaGenQuantizer",
        "init_args": {"codebook_size": codebook_size},
    }
    fixed = {"image_size": image_size, "channel_multipliers": [1, 1, 2, 2, 4] if stride >= 16 else [1, 2, 2, 4]}
    for groups in (32, 16, 8, 4, 2):
        widths = [4 * groups + step / 4 for step in range(16 * groups + 128)]
        found = _closest(LlamaGenTokenizer, parameters, widths, {**fixed, "groups": groups})
        if found:
            return _config(LlamaGenTokenizer, {**found, "quantizer": quantizer})
    raise UserError(f"No LlamaGen tokenizer has about {parameters:,} parameters: compare it with a larger model.")


def like_videogpt(parameters: int, image_size: int, codebook_size: int) -> dict[str, Any]:
    """The config of a VideoGPT tokenizer with about this many parameters; see `like_llamagen`."""
    quantizer = {
        "class_path": "tests.benchmarks.baselines.VideoGPTQuantizer",
        "init_args": {"codebook_size": codebook_size},
    }
    found = _closest(VideoGPTTokenizer, parameters, range(4, 1024, 2), {"image_size": image_size})
    if not found:
        raise UserError(f"No VideoGPT tokenizer has about {parameters:,} parameters: compare it with a larger model.")
    return _config(VideoGPTTokenizer, {**found, "quantizer": quantizer})


def _closest(
    kind: Callable[..., VQVAE], parameters: int, widths: Sequence[float], fixed: dict[str, Any], tolerance: float = 0.03
) -> dict[str, Any] | None:
    """The arguments of the width that comes closest, or None where none is within the tolerance."""

    def count(width: float) -> int:
        with torch.device("meta"):
            return count_parameters(kind(**fixed, width=width))

    above = bisect_left(widths, parameters, key=count)
    width = min(widths[max(above - 1, 0) : above + 1], key=lambda w: abs(count(w) - parameters))
    return {**fixed, "width": width} if abs(count(width) / parameters - 1) <= tolerance else None


def _config(kind: type, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"class_path": f"tests.benchmarks.baselines.{kind.__name__}", "init_args": arguments}
