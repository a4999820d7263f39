"""EWGS: the further a number has to go until its rounding changes, the larger its gradient.

dL/dr = g · (1 + δ · sign(g) · (r − q)) where the estimator ``clipped`` passes g, 0 elsewhere. A
step of descent by g > 0 makes r smaller, and what is above its point q has more than half a step
of the grid to go until it rounds otherwise: its gradient is scaled up, that of what is below, down.
The authors measure r − q on a range of length 1, here it is in steps: their δ is δ / (2^b − 1)
here, for b bits. They also adapt δ by the trace of the Hessian; here it is an option.
Source: Lee, Kim & Ham 2021, arXiv 2104.00903, and the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from autoquant.quant.estimators.clipped import HALF, within
from autoquant.spec.techniques import ESTIMATORS, Estimator, option

if TYPE_CHECKING:
    from torch import Tensor


@ESTIMATORS.register("ewgs")
@dataclass(frozen=True)
class EWGS(Estimator):
    """Scale each gradient by its sign and by the rounding error of its number.

    ``delta`` is by how much, for an error of one step; errors are at most half a step, so that up
    to 2 no gradient changes its sign.
    """

    method: ClassVar[str] = "ewgs"
    delta: float = option(0.1, 0.0, 2.0)

    def position(
        self, g: Tensor, r: Tensor, q: Tensor, lo: Tensor | float, hi: Tensor | float
    ) -> Tensor:
        """Return g + δ · |g| · (r − q) within half a step of the grid, 0 beyond."""
        passed = within(g, r, lo, hi, HALF)
        return passed.addcmul(passed.abs(), r - q, value=self.delta)
