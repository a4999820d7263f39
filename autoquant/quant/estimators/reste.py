"""ReSTE: the gradient is that of a staircase of power functions, cut where it would be too steep.

The paper binarizes: sign(x) ≈ sign(x) · |x|^(1/o), whose slope |x|^(1/o − 1) / o is, for |x| ≤ m,
that of the straight line to the point at m, m^(1/o − 1), and 0 beyond a threshold. Adapted here
from its one step to a staircase: in each cell between two points of the grid, x = 2 · (r − middle)
is in −1 … 1, and q ≈ middle + ½ · sign(x) · |x|^(1/o). So dL/dr = g times that slope for
lo ≤ r ≤ hi, 0 elsewhere. The function meets the points of the grid, so that the mean over a cell is
g, whatever o and m.
The paper lets o grow from 1 to 3 in training; here it is an option.
Source: Wu et al. 2023, arXiv 2308.06689, and the authors' code (m = 0.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from autoquant.quant.estimators.clipped import within
from autoquant.spec.techniques import ESTIMATORS, Estimator, option

if TYPE_CHECKING:
    from torch import Tensor


@ESTIMATORS.register("reste")
@dataclass(frozen=True)
class ReSTE(Estimator):
    """Pass the gradient of a staircase of power functions.

    ``power`` is o: 1 is a straight line, and the more the closer to a step. ``bound`` is m: up to
    this share of the way from where rounding changes to a point of the grid the slope is constant.
    """

    method: ClassVar[str] = "reste"
    power: float = option(3.0, 1.0, 10.0)
    bound: float = option(0.1, 1e-3, 1.0)

    def position(
        self, g: Tensor, r: Tensor, q: Tensor, lo: Tensor | float, hi: Tensor | float
    ) -> Tensor:
        """Return ``g`` times the slope of the staircase."""
        exponent = 1 / self.power - 1
        # |x| of the cell: 0 where rounding changes, 1 at the point q.
        x = (r - q).abs_().mul_(-2.0).add_(1.0)
        steep = x <= self.bound
        slope = x.clamp_(min=self.bound).pow_(exponent).div_(self.power)
        return within(g, r, lo, hi) * slope.masked_fill_(steep, self.bound**exponent)
