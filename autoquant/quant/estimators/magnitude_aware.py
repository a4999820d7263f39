"""Magnitude-aware differentiation: what is clipped passes the less gradient the further out it is.

Clipping is read as a factor: clip(x) = x · min(1, c / |x|), which is held constant. So dL/dr = g
within the grid, and g · hi / r or g · lo / r beyond. Unlike straight through it doesn't explode,
and unlike ``clipped`` a number that is clipped can come back.
The authors compute the scale anew at every step and don't train it. Here it learns as by LSQ: held
constant, the factor would leave the scale no gradient of what is clipped.
Source: Sakr et al. 2022, arXiv 2206.06501.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from autoquant.quant.estimators.clipped import within
from autoquant.spec.techniques import ESTIMATORS, Estimator

if TYPE_CHECKING:
    from torch import Tensor


@ESTIMATORS.register("magnitude_aware")
@dataclass(frozen=True)
class MagnitudeAware(Estimator):
    """Pass the gradient within the grid, and beyond it by how much of the number is left."""

    method: ClassVar[str] = "magnitude_aware"

    def position(
        self, g: Tensor, r: Tensor, q: Tensor, lo: Tensor | float, hi: Tensor | float
    ) -> Tensor:
        """Return ``g`` times clip(r) / r, which is 1 at 0: every grid has that point."""
        kept = r.clamp(lo, hi).div_(r)  # type: ignore[arg-type]
        return g * kept.nan_to_num_(1.0)

    def step(
        self,
        g: Tensor,
        r: Tensor,
        q: Tensor,
        lo: Tensor | float,
        hi: Tensor | float,
        passed: Tensor,
    ) -> Tensor:
        """Return g · (q − r) within the grid, and g · q beyond."""
        return (g * q).addcmul_(within(g, r, lo, hi), r, value=-1.0)
