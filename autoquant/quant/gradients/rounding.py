"""Magnitudes to the grid of a format: to the nearest point, or stochastically without bias.

A magnitude x lies between two neighbours of its block's grid, l ≤ x ≤ u. The nearest of both has
the smaller error, min(x − l, u − x), which is a bias. Stochastic rounding takes u with probability
(x − l)/(u − l), else l: its mean is x and its variance (x − l)·(u − x). As the largest magnitude of
a block is a point of its grid, nothing is clipped and there is no bias at the upper end; below the
smallest point α it is 0 or α, which LUQ calls stochastic underflow.
Source: Chmiel et al. 2023, arXiv 2112.10769, sections 3.1 and 4 (equations 4, 10 and 12).
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoquant.spec.gradients import MagnitudeGrid


def neighbours(x: Tensor, largest: Tensor, grid: MagnitudeGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Return (l, u, odd): the points of the grid around ``x``, and where l is an odd step.

    ``x`` are finite magnitudes, ``largest`` the largest of each one's block (it broadcasts to x).
    l and u have the unit of x; a point is counted in the steps from it to the next. For the largest
    itself, which is l, u lies beyond the grid: neither rounding ever takes it.
    """
    top = x.new_full((), grid.top)  # a tensor, as accelerators divide by plain numbers otherwise
    position = x / torch.where(largest > 0, largest, 1.0) * top
    step: Tensor | float = grid.step
    if grid.binades > 1:
        # A number over its mantissa, in [½, 1), is a power of two, exactly.
        exponent = position.clamp(min=1.0)
        step = exponent / torch.frexp(exponent).mantissa * (grid.step / 2)
    count = (position / step).floor_()
    lower = count * step
    upper = lower + step
    # Shares of the top before they are multiplied: that of the top is 1, so the largest is exact.
    return lower / top * largest, upper / top * largest, count.remainder(2) == 1


def round_nearest(x: Tensor, lower: Tensor, upper: Tensor, odd: Tensor) -> Tensor:
    """Return the nearer of ``lower`` and ``upper``; of two that are as near, the even one.

    Between two powers of two that is the upper, as in LUQ's equation 14.
    """
    below, above = x - lower, upper - x
    return torch.where((below > above) | ((below == above) & odd), upper, lower)


def round_stochastic(x: Tensor, lower: Tensor, upper: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``upper`` with probability (x − lower)/(upper − lower), else ``lower``.

    One number is drawn for each of x, in its dtype, so that probabilities are right to 2⁻²⁴
    (float64: 2⁻⁵³). Where both are the same their quotient is NaN, which no number is below.
    """
    drawn = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return torch.where(drawn < (x - lower) / (upper - lower), upper, lower)
