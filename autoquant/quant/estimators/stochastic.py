"""Stochastic rounding: up with a probability of the way that is done, so that no mean is changed.

In training r, clipped to the grid, becomes ⌊r⌋ + 1 with probability r − ⌊r⌋, else ⌊r⌋; without a
generator, as outside training, it is rounded to nearest. Backward is straight through where lo ≤ r
≤ hi, 0 elsewhere. That is no half step more, as the estimator ``clipped`` has it: E[q] = r between
the ends and constant beyond, so that this is the very gradient of what is expected.
Source: Gupta et al. 2015, arXiv 1502.02551, for the rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from autoquant.quant.estimators.clipped import within
from autoquant.spec.techniques import ESTIMATORS, Estimator

if TYPE_CHECKING:
    from torch import Generator, Tensor


@ESTIMATORS.register("stochastic")
@dataclass(frozen=True)
class Stochastic(Estimator):
    """Round up or down at random in training, right on average, and pass the gradient within."""

    method: ClassVar[str] = "stochastic"
    draws: ClassVar[bool] = True

    def round(self, r: Tensor, generator: Generator | None) -> Tensor:
        """Return ``r`` rounded at random where there is a ``generator``, of its device."""
        import torch

        if generator is None:
            return r.round_()
        down = r.floor()
        # Not ⌊r + draw⌋: that sum is rounded, too, and may leave the grid.
        draw = torch.rand(r.shape, generator=generator, dtype=torch.float32, device=r.device)
        return down.add_(draw < r.sub_(down))

    def position(
        self, g: Tensor, r: Tensor, q: Tensor, lo: Tensor | float, hi: Tensor | float
    ) -> Tensor:
        """Return ``g`` between the ends of the grid, 0 beyond."""
        return within(g, r, lo, hi)
