"""The straight-through estimator: the gradient passes as if nothing were rounded or clipped.

dL/dr = g, so that dL/d log(scale) = Σ g · (q − r), clipped numbers with all that they miss.
Source: Bengio, Léonard & Courville 2013, arXiv 1308.3432, after Hinton's lectures of 2012.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from autoquant.spec.techniques import ESTIMATORS, Estimator

if TYPE_CHECKING:
    from torch import Tensor


@ESTIMATORS.register("straight_through")
@dataclass(frozen=True)
class StraightThrough(Estimator):
    """Pass the gradient everywhere, clipped numbers included."""

    method: ClassVar[str] = "straight_through"

    def position(
        self, g: Tensor, r: Tensor, q: Tensor, lo: Tensor | float, hi: Tensor | float
    ) -> Tensor:
        """Return ``g`` itself."""
        return g
