"""Groups of options of the transformer; the defaults are those of the 8-billion-parameter model."""

from dataclasses import dataclass

from t2v.errors import UserError, check_range


@dataclass(frozen=True)
class AttentionConfig:
    """Options of self-attention.

    Args:
        heads: Query heads, in text attention too; must divide the width of the model into even parts.
        kv_heads: Key and value heads, in text attention too; must divide `heads` and the hidden width of SwiGLU.
        window: Frames that a temporal layer attends to, the current one included.
        rope_theta: Base of the wavelengths of the rotary embedding, which run from 2π to 2π·`rope_theta` positions; at
            least 1.

    Raises:
        UserError: If an argument is out of range.
    """

    heads: int = 32
    kv_heads: int = 8
    window: int = 16
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        check_range("attention", "[1, inf)", heads=self.heads, kv_heads=self.kv_heads, window=self.window)
        check_range("attention", "[1, inf)", rope_theta=self.rope_theta)


@dataclass(frozen=True)
class TextConfig:
    """Options of text conditioning.

    Args:
        dim: Width of the text embeddings.
        gate: Whether the output of text attention is scaled by a learned function of the number of earlier frames
            in the window.
        kernel_size: Text tokens that a convolution before text attention adds up at each text token, its own in the
            middle; 1 for none. With 9, which of two things does what is learned much earlier, see docs/benchmarks.

    Raises:
        UserError: If a number is less than 1, or `kernel_size` is even.
    """

    dim: int = 4096
    gate: bool = True
    kernel_size: int = 1

    def __post_init__(self) -> None:
        check_range("text", "[1, inf)", dim=self.dim, kernel_size=self.kernel_size)
        if self.kernel_size % 2 == 0:
            raise UserError(f"text.kernel_size={self.kernel_size} must be odd, as the text token is in the middle.")
