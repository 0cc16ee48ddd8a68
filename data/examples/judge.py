"""Base class of the programs that judge generated clips of an example data set by their pixels."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from jaxtyping import UInt8
from torch import Tensor


class ClipJudge(ABC):
    """Names what a clip shows, from its pixels only."""

    @abstractmethod
    def prepare(self) -> None:
        """Make ready, for example by training on real clips; called once, before `recognize`."""

    @abstractmethod
    def recognize(self, video: UInt8[Tensor, "t 3 height width"]) -> dict[str, str]:
        """Return what a clip shows, by the names of attributes."""

    @abstractmethod
    def truth(self, metadata: Mapping[str, Any]) -> dict[str, str]:
        """Return what a real clip with this metadata shows, as `recognize` would name it.

        Raises:
            UserError: If the metadata is that of other data.
        """
