"""LSQ: the step is learned by what rounding and clipping do to each number.

dL/dr = g where lo < r < hi, 0 elsewhere; dv/d scale = q − r there, and lo or hi elsewhere, with
v = scale · q. The gradient of the scale is multiplied by 1 / √(N · Q), N being how many numbers
share it and Q the largest integer of the grid, so that scale and numbers learn about as fast.
The paper trains the scale; its logarithm has scale times that gradient, and the same factor.
Source: Esser et al. 2020, arXiv 1902.08153, equations 3 and 5, and section 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from autoquant.spec.techniques import ESTIMATORS, Estimator

if TYPE_CHECKING:
    from torch import Tensor


@ESTIMATORS.register("lsq")
@dataclass(frozen=True)
class LSQ(Estimator):
    """Pass the gradient between the ends of the grid, and learn the step at a rate of its own."""

    method: ClassVar[str] = "lsq"

    def position(
        self, g: Tensor, r: Tensor, q: Tensor, lo: Tensor | float, hi: Tensor | float
    ) -> Tensor:
        """Return ``g`` between the ends, which themselves count as clipped; 0 elsewhere."""
        return g * ((r > lo) & (r < hi))

    def factor(self, numbers: int, lo: Tensor | float, hi: Tensor | float) -> Tensor:
        """Return 1 / √(N · Q), a tensor of the shape of the ends.

        Q is hi for −Q − 1 … Q and for 0 … Q, as in the paper. A grid whose zero point leaves more
        of it below 0 than above counts as its mirror image.
        """
        import torch

        most = torch.maximum(torch.as_tensor(hi), -torch.as_tensor(lo) - 1).clamp(min=1)
        return (most * max(numbers, 1)).rsqrt()
