"""PACT: the clip is learned by the numbers that it clips.

With y = clip(x, 0, α) before rounding, dy/dx = 1 for 0 ≤ x < α and 0 elsewhere; dy/dα = 1 for
x ≥ α and 0 elsewhere. The ends of the grid are scale · lo and scale · hi = α, so that here
dL/dr = g where lo ≤ r < hi, and dL/d log(scale) = Σ g · q over the numbers outside: both ends where
a grid has two. The paper also decays α (L2), which is left to whoever trains.
Source: Choi et al. 2018, arXiv 1805.06085.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from autoquant.spec.techniques import ESTIMATORS, Estimator

if TYPE_CHECKING:
    from torch import Tensor


@ESTIMATORS.register("pact")
@dataclass(frozen=True)
class PACT(Estimator):
    """Pass the gradient within the clip, and learn the scale from clipped numbers alone."""

    method: ClassVar[str] = "pact"

    def position(
        self, g: Tensor, r: Tensor, q: Tensor, lo: Tensor | float, hi: Tensor | float
    ) -> Tensor:
        """Return ``g`` from ``lo`` up to, but not including, ``hi``; 0 elsewhere."""
        return g * ((r >= lo) & (r < hi))

    def step(
        self,
        g: Tensor,
        r: Tensor,
        q: Tensor,
        lo: Tensor | float,
        hi: Tensor | float,
        passed: Tensor,
    ) -> Tensor:
        """Return g · q for the numbers that are clipped: those of which nothing ``passed``."""
        return (g - passed).mul_(q)
