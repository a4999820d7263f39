"""How much a recipe really loses, estimated from all trials together.

The drop of one recipe on a few hundred samples is noisy: several recipes near the limit keep it by
luck alone, and the smallest lucky one would win. The divergence from the float outputs is far less
noisy and grows with the drop, so drop = a · loss^p is fitted over all trials, robustly (iteratively
reweighted least squares with Huber's weights: Huber 1964).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

POWERS = np.linspace(0.4, 1.6, 13)
RELATIVE = 0.3
"""Relative error that the curve is taken to have where drops are large."""
ROUNDS = 6
"""Rounds of reweighting."""
TINY = 1e-12
"""A loss below this is none: its powers would vanish."""
HUBER = 1.5
"""Standard errors from which a residual counts less."""


@dataclass(frozen=True)
class DropCurve:
    """drop = ``scale`` · loss^``power``; ``scale`` is at least 0.

    ``noise`` is the standard error of one measured drop, as the scatter of small ones tells it.
    """

    scale: float
    power: float
    noise: float = 0.0

    def drops(self, losses: Sequence[float] | Array) -> Array:
        """Return the estimated drop at each loss."""
        return np.asarray(self.scale * np.power(losses, self.power), dtype=np.float64)

    def errors(self, drops: Sequence[float] | Array) -> Array:
        """Return the standard error of drops that are measured where the curve tells ``drops``."""
        found = np.hypot(self.noise, RELATIVE * np.asarray(drops, dtype=np.float64))
        return np.asarray(found, dtype=np.float64)

    def loss_at(self, drop: float) -> float:
        """Return the loss at which the estimated drop is ``drop``; infinite where it never is."""
        if self.scale <= 0:
            return float("inf")
        return float((max(drop, 0.0) / self.scale) ** (1.0 / self.power))


def fit_drops(losses: Sequence[float], drops: Sequence[float]) -> DropCurve:
    """Return the curve through trials of ``losses`` (> TINY) and ``drops``; flat without any."""
    x = np.asarray(losses, dtype=np.float64)
    y = np.asarray(drops, dtype=np.float64)
    usable = np.isfinite(x) & np.isfinite(y) & (x > TINY)
    x, y = x[usable], y[usable]
    if not len(x):
        return DropCurve(0.0, 1.0)
    # The scatter of small drops is what sampling noise alone makes.
    small = y[x <= np.median(x)]
    noise = max(_scatter(small), 1e-4)
    error = np.sqrt(noise**2 + (RELATIVE * y) ** 2)
    # All powers at once: [powers, trials].
    curves = np.stack([x**power for power in POWERS])
    weights = np.broadcast_to(1.0 / error**2, curves.shape)
    scales = np.zeros(len(POWERS))
    residuals = np.zeros(curves.shape)
    for _ in range(ROUNDS):
        scales = np.maximum((weights * curves * y).sum(1) / (weights * curves**2).sum(1), 0.0)
        residuals = np.abs(y - scales[:, None] * curves) / error
        weights = np.minimum(1.0, HUBER / np.maximum(residuals, 1e-12)) / error**2
    costs = np.where(residuals <= HUBER, residuals**2 / 2, HUBER * (residuals - HUBER / 2)).sum(1)
    if not np.isfinite(costs).any():
        return DropCurve(0.0, 1.0)
    best = int(np.nanargmin(costs))
    return DropCurve(float(scales[best]), float(POWERS[best]), noise)


def _scatter(values: Array) -> float:
    """Return the standard deviation of ``values``, outliers aside.

    Of a few hundred samples many drops are the same number, and the median deviation from it is 0:
    then wider quantiles tell.
    """
    found = 1.4826 * float(np.median(np.abs(values - np.median(values))))
    for tail, deviations in ((0.25, 1.349), (0.05, 3.290)):
        low, high = np.quantile(values, [tail, 1.0 - tail])
        found = found or float(high - low) / deviations
    return found
