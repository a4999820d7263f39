"""What a converted module asks of the site that holds one of its weights."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class SiteRuntime(Protocol):
    """Gives a converted module its weight, and quantizes what that weight is multiplied with."""

    @property
    def weight(self) -> Tensor:
        """The weight to compute with, in the parameter's own shape."""
        ...

    def quantize_input(self, x: Tensor) -> Tensor:
        """Return the activation ``x`` that meets the weight, as the quantized model sees it."""
        ...
