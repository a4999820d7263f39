"""DSQ: the gradient is that of a soft staircase, of a tanh for each step.

Between two points of the grid, m being the middle, q ≈ m + tanh(k · (r − m)) / (2 · tanh(k / 2)),
which meets the points; so dL/dr = g · k · (1 − tanh²(k · (r − m))) / (2 · tanh(k / 2)) for
lo ≤ r ≤ hi, 0 elsewhere. Its mean over a cell is g: what is more where rounding changes is less
where it doesn't. Forward rounds as ever; k is the same for all layers and steps, while the paper
learns it (by its characteristic variable α = 1 − tanh(k / 2)) together with the ends of the range.
Source: Gong et al. 2019, arXiv 1908.05033.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from autoquant.quant.estimators.clipped import within
from autoquant.spec.techniques import ESTIMATORS, Estimator, option

if TYPE_CHECKING:
    from torch import Tensor


@ESTIMATORS.register("dsq")
@dataclass(frozen=True)
class DSQ(Estimator):
    """Pass the gradient of a soft staircase.

    ``temperature`` is 1 / k, in steps: 0.1 is close to the hard staircase, 10 to a straight line.
    """

    method: ClassVar[str] = "dsq"
    temperature: float = option(0.5, 0.02, 100.0)

    def position(
        self, g: Tensor, r: Tensor, q: Tensor, lo: Tensor | float, hi: Tensor | float
    ) -> Tensor:
        """Return ``g`` times the slope of the staircase."""
        k = 1 / self.temperature
        # |r − m|, of which tanh² is a function, is what is left of half a step from the point q.
        from_middle = (r - q).abs_().neg_().add_(0.5)
        slope = from_middle.mul_(k).tanh_().square_().neg_().add_(1.0)
        return within(g, r, lo, hi) * slope.mul_(k / (2 * math.tanh(k / 2)))
