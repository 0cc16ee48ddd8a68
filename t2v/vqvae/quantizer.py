"""Quantizers: from latent vectors to codebook indices and back.

- Each is a thin shell over `vector-quantize-pytorch`, which keeps the codebook, its EMA and its restarts.
- A quantizer takes (n, l, d) latents and returns vectors of the same shape, so that the networks around it do not know
  how wide its codes are.
- `bypass` sends the latents through the same bottleneck unquantised: a few hundred steps of that before the codebook is
  initialised give k-means something worth clustering.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize


class Quantized(NamedTuple):
    """What a quantizer makes of latents."""

    latents: Float[Tensor, "n l d"]
    indices: Int[Tensor, "n l"]
    commitment: Float[Tensor, ""]
    """How far the encoder's vectors are from their codes; zero where that means nothing."""


class Quantizer(nn.Module, ABC):
    """The base class of all quantizers.

    Attributes:
        codebook_size: number of codes.
        dim: width d of the latents it takes and returns.
    """

    codebook_size: int
    dim: int

    @property
    def ready(self) -> bool:
        """Whether there are codes to choose from; a learned codebook starts with the first training pass."""
        return True

    @abstractmethod
    def forward(self, latents: Float[Tensor, "n l d"]) -> Quantized:
        """Quantizes; in training mode it also updates the codebook."""

    @abstractmethod
    def bypass(self, latents: Float[Tensor, "n l d"]) -> Float[Tensor, "n l d"]:
        """The latents through the bottleneck without quantizing."""

    @abstractmethod
    def lookup(self, indices: Int[Tensor, "n l"]) -> Float[Tensor, "n l d"]:
        """The latents that `forward` returns for these indices."""


class VectorQuantizer(Quantizer):
    """A learned codebook of low-dimensional, l2-normalised codes (https://arxiv.org/abs/2110.04627).

    Codes follow the mean of the vectors that choose them (EMA), start from k-means, and are put onto a vector of the
    batch when hardly anything chooses them. Vectors are drawn for both by their squared distance from the codes there
    are (k-means++, Arthur and Vassilvitskii 2007): drawn evenly, most codes would land on the background of the
    footage, as near-copies of each other between which its tokens flicker. Gradients pass by the rotation trick
    (https://arxiv.org/abs/2410.06424). The whole state, the "initialised" flag too, lies in the checkpoint.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int = 16384,
        codebook_dim: int = 16,
        decay: float = 0.9,
        restart_below: float = 0.1,
    ):
        """
        Args:
            dim: width of the latents.
            codebook_size: number of codes.
            codebook_dim: width of a code, 8 to 32.
            decay: of the moving averages that the codes follow, in (0, 1).
            restart_below: a code is restarted when fewer vectors a batch than this choose it (moving average).
        """
        super().__init__()
        self.dim, self.codebook_size = dim, codebook_size
        self.quantize = VectorQuantize(
            dim=dim,
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
            decay=decay,
            threshold_ema_dead_code=restart_below,
            use_cosine_sim=True,
            kmeans_init=True,
        )
        codebook = self.quantize._codebook
        # The library's reset value is the threshold itself, at which a restarted code dies again at the next step.
        codebook.reset_cluster_size = 1.0
        codebook.sample_fn, codebook.replace_sample_fn = self._first_codes, self._new_codes

    @property
    def ready(self) -> bool:
        return bool(self.quantize._codebook.initted)

    def forward(self, latents: Float[Tensor, "n l d"]) -> Quantized:
        with torch.autocast(latents.device.type, enabled=False):
            quantized, indices, commitment = self.quantize(latents.float())
        return Quantized(quantized, indices, commitment.squeeze())

    def bypass(self, latents: Float[Tensor, "n l d"]) -> Float[Tensor, "n l d"]:
        codes = F.normalize(self.quantize.project_in(latents), dim=-1)
        return self.quantize.project_out(codes)

    def lookup(self, indices: Int[Tensor, "n l"]) -> Float[Tensor, "n l d"]:
        return self.quantize.get_output_from_indices(indices)

    def _first_codes(self, vectors: Float[Tensor, "1 n c"], count: int) -> Float[Tensor, "1 count c"]:
        """Starting points for k-means: k-means++ in rounds that each double the number of codes."""
        codes = vectors[:, torch.randint(vectors.shape[1], (1,), device=vectors.device)]
        while (missing := count - codes.shape[1]) > 0:
            drawn = _draw_far(vectors[0], codes[0], min(missing, codes.shape[1]))
            codes = torch.cat([codes, drawn[None]], dim=1)
        return codes

    def _new_codes(self, vectors: Float[Tensor, "1 n c"], count: int) -> Float[Tensor, "1 count c"]:
        """Places for dead codes, far from all codes there are."""
        return _draw_far(vectors[0], self.quantize._codebook.embed[0], count)[None]


def _draw_far(vectors: Float[Tensor, "n c"], codes: Float[Tensor, "k c"], count: int) -> Float[Tensor, "count c"]:
    """Draws unit vectors with probability in proportion to the squared distance from the nearest code."""
    distance = (1 - (vectors @ codes.T).amax(dim=1)).clamp(min=1e-8)  # half the squared distance of unit vectors
    return vectors[torch.multinomial(distance, count, replacement=True)]
