"""Quantizers: from latents to codes and their indices, and from indices back to codes.

- FSQ, LFQ and the rotation trick come from `vector-quantize-pytorch`, which is imported where they are used, since its
  import takes half a second. The learned codebook is our own: the library's k-means and update take matrices of all
  vectors and all codes.
- A quantizer works on vectors of its own width `dim`; the encoder and the decoder project to and from that width.
- `relax` maps vectors to the range of the codes without quantizing them. Training an autoencoder that way for a few
  hundred steps before k-means initializes a learned codebook gives k-means meaningful latents.
- In distributed training, all ranks hold the same codebook, which is updated from the vectors of all ranks.

Axis letters: b sequences (such as frames), n positions, d width of a vector, k codes, m vectors of a batch.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from t2v.errors import UserError, check_range

ENTROPY_TEMPERATURE = 100.0
"""Factor on cosine similarities before the softmax of the entropy term."""
SIMILARITIES = 2**24
"""Similarities of vectors and codes that are in memory at a time: 64 MiB."""
EQUAL = 0.999
"""Cosine similarity above which two codes count as the same."""
KMEANS_STEPS = 10
RESTART_COUNT = 10
"""Count that a new code starts with, relative to `restart_below`: it is kept for about ln(10) / (1 - decay) steps."""


class Quantized(NamedTuple):
    """The result of a quantizer."""

    codes: Float[Tensor, "b n d"]
    indices: Int[Tensor, "b n"]
    loss: Float[Tensor, ""]
    """The quantizer's own loss terms, with their weights; zero in evaluation."""


class Quantizer(nn.Module, ABC):
    """Base class of all quantizers; every argument of `__init__` must be kept as an attribute of the same name.

    Attributes:
        codebook_size: Number of codes.
        dim: Width of the vectors and of the codes.
    """

    codebook_size: int
    dim: int

    @property
    def ready(self) -> bool:
        """Whether there are codes; a learned codebook is initialized in the first training pass."""
        return True

    @abstractmethod
    def forward(self, vectors: Float[Tensor, "b n d"]) -> Quantized:
        """Quantize vectors; in training mode, also update a learned codebook."""

    @abstractmethod
    def relax(self, vectors: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Return the vectors mapped to the range of the codes, not quantized."""

    @abstractmethod
    def lookup(self, indices: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Return the codes of these indices."""

    def codebook(self) -> Float[Tensor, "k d"]:
        """Return all codes."""
        device = next((each.device for each in self.buffers()), None)
        return self.lookup(torch.arange(self.codebook_size, device=device)[None])[0]


class VectorQuantizer(Quantizer):
    """Learned codebook of low-dimensional, l2-normalized codes (https://arxiv.org/abs/2110.04627).

    - A code follows the moving average (EMA) of the vectors that choose it. Gradients pass to the vectors by the
      rotation trick (https://arxiv.org/abs/2410.06424).
    - The first training pass initializes the codebook by k-means; a code that is rarely chosen is replaced by a vector
      of the current batch.
    - So is a code that nearly equals one chosen more often: the token of a patch would depend on noise, such as that of
      a lossy file or of another device's rounding. Where no vector is left that differs from all codes, such a code
      becomes zero, which no vector chooses.
    - For both, vectors are drawn with a probability proportional to their squared distance from the nearest code
      (k-means++, Arthur and Vassilvitskii 2007). Drawn uniformly, most codes would become near-copies of the video's
      background, between which its tokens flicker.
    - The complete state is in the checkpoint, including the flag `initialized`.

    Args:
        codebook_size: Number of codes, at least 2.
        dim: Width of a code; 8 to 32 is usual.
        decay: Decay of the moving averages, in (0, 1).
        restart_below: A code is replaced if the number of vectors that choose it (moving average) is below this
            fraction of the average over all codes, in [0, 1); 0 for never, which holds for equal codes too.
        commitment_weight: Weight of the mean squared difference between vectors and their codes.
        entropy_weight: Weight of the entropy of the mean code probabilities in a batch, which is maximized.

    Raises:
        UserError: If an argument is out of range.
    """

    codes: Tensor
    sums: Tensor
    counts: Tensor
    initialized: Tensor

    def __init__(
        self,
        codebook_size: int = 16384,
        dim: int = 16,
        decay: float = 0.99,
        restart_below: float = 0.025,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.0,
    ) -> None:
        super().__init__()
        check_range(self, "[2, inf)", codebook_size=codebook_size)
        check_range(self, "[1, inf)", dim=dim)
        check_range(self, "(0, 1)", decay=decay)
        check_range(self, "[0, 1)", restart_below=restart_below)
        check_range(self, "[0, inf)", commitment_weight=commitment_weight, entropy_weight=entropy_weight)
        self.codebook_size, self.dim, self.decay, self.restart_below = codebook_size, dim, decay, restart_below
        self.commitment_weight, self.entropy_weight = commitment_weight, entropy_weight
        self.register_buffer("codes", torch.zeros(codebook_size, dim, dtype=torch.float32))
        self.register_buffer("sums", torch.zeros(codebook_size, dim, dtype=torch.float32))
        self.register_buffer("counts", torch.zeros(codebook_size, dtype=torch.float32))
        self.register_buffer("initialized", torch.tensor(False))

    @property
    def ready(self) -> bool:
        return bool(self.initialized)

    def forward(self, vectors: Float[Tensor, "b n d"]) -> Quantized:
        with torch.autocast(vectors.device.type, enabled=False):
            unit = F.normalize(vectors.float(), dim=-1)
            flat = unit.detach().flatten(0, 1)
            if self.training and not self.initialized:
                self._initialize_codebook(flat)
            codebook = self.codes.to(
                unit.dtype, copy=True
            )  # `_update_codebook` modifies self.codes before the backward pass
            indices = nearest(flat, codebook).indices.unflatten(0, unit.shape[:2])
            codes = codebook[indices]
            if not self.training:
                return Quantized(codes, indices, vectors.new_zeros(()))
            loss = self.commitment_weight * F.mse_loss(unit, codes)
            if self.entropy_weight:
                probabilities = _mean_probabilities(unit.flatten(0, 1), codebook)
                probabilities = probabilities.clamp(min=1e-8)  # the gradient of the entropy is infinite at 0
                loss = loss - self.entropy_weight * torch.special.entr(probabilities).sum()
            self._update_codebook(flat, indices.flatten())
            from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

            return Quantized(rotate_to(unit, codes), indices, loss)

    def relax(self, vectors: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return F.normalize(vectors, dim=-1)

    def lookup(self, indices: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return self.codes[indices]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "VectorQuantizer":
        """Keep the codebook in float32, whatever the weights become: moving averages in bfloat16 stand still."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def _initialize_codebook(self, vectors: Float[Tensor, "m d"]) -> None:
        """Run spherical k-means on the vectors of all ranks.

        It starts from k-means++, which draws several codes at a time: as many as there are already.
        """
        gathered = _gather_on_rank_zero(vectors)
        codes = vectors.new_empty(self.codebook_size, self.dim)
        if gathered is not None:
            codes = gathered[torch.randint(len(gathered), (1,), device=vectors.device)]
            while len(codes) < self.codebook_size:
                count = min(self.codebook_size - len(codes), len(codes))
                codes = torch.cat([codes, _draw_distant(gathered, codes, count)])
        codes = _broadcast_from_rank_zero(codes)
        for _ in range(KMEANS_STEPS):
            counts, sums = self._assign(vectors, nearest(vectors, codes).indices)
            codes = torch.where(counts[:, None] > 0, F.normalize(sums, dim=-1), codes)
        self._set_codes(torch.ones_like(counts, dtype=torch.bool), codes, counts)
        self.initialized.fill_(True)

    def _assign(
        self, vectors: Float[Tensor, "m d"], indices: Int[Tensor, " m"]
    ) -> tuple[Float[Tensor, " k"], Float[Tensor, "k d"]]:
        """Return how many vectors of all ranks chose each code, and their sums, both relative to the average count."""
        counts = indices.bincount(minlength=self.codebook_size).to(vectors.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, indices, vectors)
        if _is_distributed():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        average = counts.mean()
        return counts / average, sums / average

    def _update_codebook(self, vectors: Float[Tensor, "m d"], indices: Int[Tensor, " m"]) -> None:
        """Update the moving averages by one step, then replace the codes that are rarely chosen."""
        counts, sums = self._assign(vectors, indices)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.codes.copy_(F.normalize(self.sums, dim=-1))
        if not self.restart_below:
            return
        chosen = counts > 0  # of two equal codes, both are chosen again and again
        replaced = (self.counts < self.restart_below) | _repeated(self.codes, self.counts, chosen)
        missing = int(replaced.sum())
        if missing > 0:
            gathered = _gather_on_rank_zero(vectors)
            codes = vectors.new_empty(missing, self.dim)
            if gathered is not None:
                codes = _draw_distant(gathered, self.codes, missing)
            new_counts = codes.new_full((missing,), RESTART_COUNT * self.restart_below)
            self._set_codes(replaced, _broadcast_from_rank_zero(codes), new_counts)
            repeated = _repeated(self.codes, self.counts, chosen | replaced)
            for state in (self.codes, self.sums, self.counts):
                state[repeated] = 0

    def _set_codes(
        self, selected: Bool[Tensor, " k"], codes: Float[Tensor, "chosen d"], counts: Float[Tensor, " chosen"]
    ) -> None:
        """Replace the selected codes; `counts` is relative to the average count, as in the moving average."""
        self.codes[selected], self.sums[selected], self.counts[selected] = codes, codes * counts[:, None], counts


class FSQuantizer(Quantizer):
    """Finite scalar quantization (https://arxiv.org/abs/2309.15505): every channel is rounded to a few levels.

    There is no learned codebook.

    Args:
        levels: Number of levels of each channel, at least 3. Their product is the number of codes, for example
            [8, 8, 8, 6, 5] for 15,360.

    Raises:
        UserError: If there is no level or one is below 3.
    """

    def __init__(self, levels: list[int]) -> None:
        super().__init__()
        if not levels or min(levels) < 3:
            raise UserError(f"levels={list(levels)} of FSQuantizer must be at least one number, and none below 3.")
        self.levels, self.dim, self.codebook_size = list(levels), len(levels), math.prod(levels)
        from vector_quantize_pytorch import FSQ

        self.quantize = FSQ(self.levels)

    def forward(self, vectors: Float[Tensor, "b n d"]) -> Quantized:
        with torch.autocast(vectors.device.type, enabled=False):
            codes, indices = self.quantize(vectors.float())
        return Quantized(codes, indices.long(), vectors.new_zeros(()))

    def relax(self, vectors: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return vectors.tanh()

    def lookup(self, indices: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        codes: Tensor = self.quantize.indices_to_codes(indices)
        return codes


class LFQuantizer(Quantizer):
    """Lookup-free quantization (https://arxiv.org/abs/2310.05737): the signs of the channels are the bits of the token.

    The entropy term makes each choice certain and the codes of a batch evenly used.

    Args:
        codebook_size: Number of codes, a power of two.
        entropy_weight: Weight of the entropy term.
        commitment_weight: Weight of the mean squared difference between vectors and their codes.

    Raises:
        UserError: If the number of codes is not a power of two, or a weight is out of range.
    """

    def __init__(
        self, codebook_size: int = 16384, entropy_weight: float = 0.1, commitment_weight: float = 0.25
    ) -> None:
        super().__init__()
        check_range(self, "[0, inf)", entropy_weight=entropy_weight, commitment_weight=commitment_weight)
        bits = round(math.log2(codebook_size)) if codebook_size >= 2 else 0
        if bits == 0 or 2**bits != codebook_size:
            raise UserError(
                f"codebook_size={codebook_size} of LFQuantizer must be a power of two, since the channels are the bits "
                "of a token."
            )
        self.codebook_size, self.dim = codebook_size, bits
        self.entropy_weight, self.commitment_weight = entropy_weight, commitment_weight
        from vector_quantize_pytorch import LFQ

        self.quantize = LFQ(
            codebook_size=codebook_size,
            entropy_loss_weight=entropy_weight,
            commitment_loss_weight=commitment_weight,
        )

    def forward(self, vectors: Float[Tensor, "b n d"]) -> Quantized:
        with torch.autocast(vectors.device.type, enabled=False):
            codes, indices, loss = self.quantize(vectors.float())
        return Quantized(codes, indices.long(), loss)

    def relax(self, vectors: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return vectors.tanh()

    def lookup(self, indices: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        codes: Tensor = self.quantize.indices_to_codes(indices)
        return codes


class Nearest(NamedTuple):
    """The most similar code of each vector."""

    similarities: Float[Tensor, " m"]
    indices: Int[Tensor, " m"]


@torch.no_grad()
def nearest(vectors: Float[Tensor, "m d"], codes: Float[Tensor, "k d"]) -> Nearest:
    """Return the most similar code of each unit vector, in memory that does not grow with the product of both."""
    parts = [(chunk @ codes.T).max(dim=1) for chunk in vectors.split(_rows(codes))]
    return Nearest(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _rows(codes: Float[Tensor, "k d"]) -> int:
    """Return the number of vectors whose similarities to all codes may be in memory at a time."""
    return max(SIMILARITIES // len(codes), 1)


def _mean_probabilities(vectors: Float[Tensor, "m d"], codes: Float[Tensor, "k d"]) -> Float[Tensor, " k"]:
    """Return the mean over all vectors of the softmax of the similarities; the backward pass computes them again."""

    def summed(chunk: Float[Tensor, "rows d"]) -> Float[Tensor, " k"]:
        return (chunk @ codes.T * ENTROPY_TEMPERATURE).softmax(dim=-1).sum(dim=0)

    chunks = vectors.split(_rows(codes))
    sums = [checkpoint(summed, chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(sums).sum(dim=0) / len(vectors)


@torch.no_grad()
def _repeated(
    codes: Float[Tensor, "k d"], counts: Float[Tensor, " k"], among: Bool[Tensor, " k"]
) -> Bool[Tensor, " k"]:
    """Return which of the codes `among` nearly equal another of them that has a larger count, or comes before it."""
    numbers = among.nonzero().flatten()
    numbers = numbers[counts[numbers].argsort(descending=True, stable=True)]
    codes, order = codes[numbers], torch.arange(len(numbers), device=numbers.device)
    repeated = torch.zeros_like(among)
    for rows in order.split(_rows(codes)):
        preferred = order < rows[:, None]
        repeated[numbers[rows]] = (preferred & (codes[rows] @ codes.T > EQUAL)).any(dim=1)
    return repeated


def _draw_distant(vectors: Float[Tensor, "m d"], codes: Float[Tensor, "k d"], count: int) -> Float[Tensor, "{count} d"]:
    """Draw unit vectors with a probability proportional to the squared distance from the nearest code."""
    distance = 1 - nearest(vectors, codes).similarities  # half the squared distance of unit vectors
    distance = distance.nan_to_num().clamp(min=1e-8)  # training skips a step whose gradients are not finite
    return vectors[torch.multinomial(distance, count, replacement=count > len(vectors))]


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _gather_on_rank_zero(vectors: Float[Tensor, "m d"]) -> Float[Tensor, "all d"] | None:
    """Return the vectors of all ranks on rank 0, None on the others; every rank must have the same number."""
    if not _is_distributed():
        return vectors
    parts = [torch.empty_like(vectors) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather(vectors.contiguous(), parts, dst=0)
    return None if parts is None else torch.cat(parts)


def _broadcast_from_rank_zero(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Return the tensor of rank 0, on every rank."""
    if not _is_distributed():
        return tensor
    tensor = tensor.contiguous()
    dist.broadcast(tensor, src=0)
    return tensor
