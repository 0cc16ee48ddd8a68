"""Quantizers: from vectors to codes, and from the codes' indices back.

- FSQ and LFQ are `vector-quantize-pytorch`'s. Of its `VectorQuantize` we take k-means and the rotation trick; it moves
  the codebook by products with a one-hot matrix of all vectors by all codes, and gathering and adding do the same in a
  quarter of the time.
- A quantizer works on vectors of its own width `dim`; the networks around it bring them to that width and back.
- `relax` sends vectors through the same bottleneck without choosing codes: a few hundred steps of that before a learned
  codebook is initialised give k-means something worth clustering.
- On several ranks a codebook follows the vectors of all of them, and every rank holds the same one.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, LFQ
from vector_quantize_pytorch.vector_quantize_pytorch import kmeans, rotate_to

from t2v.errors import UserError

ENTROPY_TEMPERATURE = 100.0


class Quantized(NamedTuple):
    """What a quantizer makes of vectors."""

    codes: Float[Tensor, "n l c"]
    indices: Int[Tensor, "n l"]
    loss: Float[Tensor, ""]
    """What the quantizer wants minimised, weighted by its own arguments; zero in evaluation."""


class Quantizer(nn.Module, ABC):
    """The base class of all quantizers; an argument of `__init__` must be kept as an attribute of the same name.

    Attributes:
        codebook_size: number of codes.
        dim: width c of the vectors it takes and of the codes it returns.
    """

    codebook_size: int
    dim: int

    @property
    def ready(self) -> bool:
        """Whether there are codes to choose from; a learned codebook starts with the first training pass."""
        return True

    @abstractmethod
    def forward(self, vectors: Float[Tensor, "n l c"]) -> Quantized:
        """Quantizes; in training mode it also updates a learned codebook."""

    @abstractmethod
    def relax(self, vectors: Float[Tensor, "n l c"]) -> Float[Tensor, "n l c"]:
        """The vectors where codes would lie, without choosing any."""

    @abstractmethod
    def lookup(self, indices: Int[Tensor, "n l"]) -> Float[Tensor, "n l c"]:
        """The codes that `forward` returns for these indices."""


class VectorQuantizer(Quantizer):
    """A learned codebook of low-dimensional, l2-normalised codes (https://arxiv.org/abs/2110.04627).

    Codes follow the mean of the vectors that choose them (EMA), start from k-means, and are put onto a vector of the
    batch when hardly anything chooses them. Vectors are drawn for both by their squared distance from the codes there
    are (k-means++, Arthur and Vassilvitskii 2007): drawn evenly, most codes would land on the background of the
    footage, as near-copies of each other between which its tokens flicker. Gradients pass by the rotation trick
    (https://arxiv.org/abs/2410.06424). The whole state, the flag that it has started too, lies in the checkpoint.
    """

    codes: Tensor
    sums: Tensor
    counts: Tensor
    started: Tensor

    def __init__(
        self,
        codebook_size: int = 16384,
        dim: int = 16,
        decay: float = 0.99,
        restart_below: float = 0.1,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.0,
    ):
        """
        Args:
            codebook_size: number of codes.
            dim: width of a code, 8 to 32.
            decay: of the moving averages that the codes follow, in (0, 1).
            restart_below: a code is restarted when fewer vectors a batch than this choose it (moving average).
            commitment_weight: weight of the squared distance between vectors and their codes.
            entropy_weight: weight of a reward for spreading the vectors of a batch over all codes.
        """
        super().__init__()
        self.codebook_size, self.dim, self.decay, self.restart_below = codebook_size, dim, decay, restart_below
        self.commitment_weight, self.entropy_weight = commitment_weight, entropy_weight
        self.register_buffer("codes", torch.zeros(codebook_size, dim))
        self.register_buffer("sums", torch.zeros(codebook_size, dim))
        self.register_buffer("counts", torch.zeros(codebook_size))
        self.register_buffer("started", torch.tensor(False))

    @property
    def ready(self) -> bool:
        return bool(self.started)

    def forward(self, vectors: Float[Tensor, "n l c"]) -> Quantized:
        with torch.autocast(vectors.device.type, enabled=False):
            unit = F.normalize(vectors.float(), dim=-1)
            flat = unit.detach().flatten(0, 1)
            if self.training and not self.started:
                self._start(flat)
            book = self.codes.clone()  # it moves on before the backward pass
            similarity = unit @ book.T
            indices = similarity.argmax(dim=-1)
            codes = book[indices]
            if not self.training:
                return Quantized(codes, indices, vectors.new_zeros(()))
            loss = self.commitment_weight * F.mse_loss(unit, codes)
            if self.entropy_weight:
                shares = (similarity * ENTROPY_TEMPERATURE).softmax(dim=-1).mean(dim=(0, 1))
                loss = loss - self.entropy_weight * torch.special.entr(shares.clamp(min=1e-8)).sum()  # finite slope
            self._follow(flat, indices.flatten())
            return Quantized(rotate_to(unit, codes), indices, loss)

    def relax(self, vectors: Float[Tensor, "n l c"]) -> Float[Tensor, "n l c"]:
        return F.normalize(vectors, dim=-1)

    def lookup(self, indices: Int[Tensor, "n l"]) -> Float[Tensor, "n l c"]:
        return self.codes[indices]

    def _start(self, vectors: Float[Tensor, "m c"]) -> None:
        """Spherical k-means over the vectors of all ranks, from k-means++ drawn in rounds that double the codes."""
        everything = _of_all_ranks(vectors)
        first = everything[torch.randint(len(everything), (1,), device=vectors.device)]
        while (missing := self.codebook_size - len(first)) > 0:
            first = torch.cat([first, _draw_far(everything, first, min(missing, len(first)))])
        first = _of_first_rank(first)
        codes, counts = kmeans(
            everything[None], self.codebook_size, use_cosine_sim=True, sample_fn=lambda *_: first[None]
        )
        self._set(slice(None), _of_first_rank(codes[0]), _of_first_rank(counts[0]).to(codes.dtype))
        self.started.fill_(True)

    def _follow(self, vectors: Float[Tensor, "m c"], indices: Int[Tensor, " m"]) -> None:
        """One step of the moving averages, and a new place for every code that hardly anything chooses."""
        counts = indices.bincount(minlength=self.codebook_size).to(vectors.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, indices, vectors)
        if _many_ranks():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.codes.copy_(F.normalize(self.sums, dim=-1))
        dead = self.counts < self.restart_below
        if missing := int(dead.sum()):
            places = _of_first_rank(_draw_far(_of_all_ranks(vectors), self.codes, missing))
            self._set(dead, places, torch.ones(missing, dtype=places.dtype, device=places.device))

    def _set(self, which: Tensor | slice, codes: Float[Tensor, "k c"], counts: Float[Tensor, " k"]) -> None:
        """Puts codes in their places, as if this many vectors a batch had chosen them."""
        self.codes[which], self.sums[which], self.counts[which] = codes, codes * counts[:, None], counts


class FSQuantizer(Quantizer):
    """Finite scalar quantisation (https://arxiv.org/abs/2309.15505): every channel is rounded to a few levels.

    There is no codebook to learn, and so none to collapse.
    """

    def __init__(self, levels: list[int]):
        """
        Args:
            levels: number of levels of each channel, 3 or more; their product is the number of codes, for example
                [8, 8, 8, 6, 5] for 15,360.
        """
        super().__init__()
        if not levels or min(levels) < 3:
            raise UserError(f"levels={list(levels)} of FSQuantizer must be at least one number, and none below 3.")
        self.levels, self.dim, self.codebook_size = list(levels), len(levels), math.prod(levels)
        self.quantize = FSQ(self.levels)

    def forward(self, vectors: Float[Tensor, "n l c"]) -> Quantized:
        with torch.autocast(vectors.device.type, enabled=False):
            codes, indices = self.quantize(vectors.float())
        return Quantized(codes, indices.long(), vectors.new_zeros(()))

    def relax(self, vectors: Float[Tensor, "n l c"]) -> Float[Tensor, "n l c"]:
        return vectors.tanh()

    def lookup(self, indices: Int[Tensor, "n l"]) -> Float[Tensor, "n l c"]:
        return self.quantize.indices_to_codes(indices)


class LFQuantizer(Quantizer):
    """Lookup-free quantisation (https://arxiv.org/abs/2310.05737): the signs of the channels are the bits of the token.

    An entropy term makes single choices clear and all choices together even.
    """

    def __init__(self, codebook_size: int = 16384, entropy_weight: float = 0.1, commitment_weight: float = 0.25):
        """
        Args:
            codebook_size: number of codes, a power of two.
            entropy_weight: weight of the entropy term.
            commitment_weight: weight of the squared distance between vectors and their codes.
        """
        super().__init__()
        if codebook_size < 2 or codebook_size & (codebook_size - 1):
            raise UserError(
                f"codebook_size={codebook_size} of LFQuantizer must be a power of two: a token is its bits."
            )
        self.codebook_size, self.dim = codebook_size, codebook_size.bit_length() - 1
        self.entropy_weight, self.commitment_weight = entropy_weight, commitment_weight
        self.quantize = LFQ(
            codebook_size=codebook_size,
            entropy_loss_weight=entropy_weight,
            commitment_loss_weight=commitment_weight,
        )

    def forward(self, vectors: Float[Tensor, "n l c"]) -> Quantized:
        with torch.autocast(vectors.device.type, enabled=False):
            codes, indices, loss = self.quantize(vectors.float())
        return Quantized(codes, indices.long(), loss)

    def relax(self, vectors: Float[Tensor, "n l c"]) -> Float[Tensor, "n l c"]:
        return vectors.tanh()

    def lookup(self, indices: Int[Tensor, "n l"]) -> Float[Tensor, "n l c"]:
        return self.quantize.indices_to_codes(indices)


def _draw_far(vectors: Float[Tensor, "n c"], codes: Float[Tensor, "k c"], count: int) -> Float[Tensor, "count c"]:
    """Draws unit vectors with probability in proportion to the squared distance from the nearest code."""
    distance = 1 - (vectors @ codes.T).amax(dim=1)  # half the squared distance of unit vectors
    distance = distance.nan_to_num().clamp(min=1e-8)  # a step that went wrong is skipped later, by whoever guards it
    return vectors[torch.multinomial(distance, count, replacement=count > len(vectors))]


def _many_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _of_all_ranks(vectors: Float[Tensor, "n c"]) -> Float[Tensor, "m c"]:
    """The vectors of all ranks, as many of each."""
    if not _many_ranks():
        return vectors
    parts = [torch.empty_like(vectors) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, vectors.contiguous())
    return torch.cat(parts)


def _of_first_rank(codes: Float[Tensor, "k c"]) -> Float[Tensor, "k c"]:
    """What the first rank drew."""
    if _many_ranks():
        dist.broadcast(codes := codes.contiguous(), src=0)
    return codes
