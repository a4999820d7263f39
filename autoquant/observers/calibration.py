"""Activation calibration: from statistics to the range [lo, hi] that a static quantizer covers.

A method is a plain function of (statistics, bits, symmetric), filed by its name in a recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from autoquant.errors import SpecError
from autoquant.observers import divergence
from autoquant.observers.distortion import Distortion, check_usable
from autoquant.observers.histogram import magnitude_histogram, percentile, signed_histogram
from autoquant.observers.statistics import TensorStatistics
from autoquant.registry import Registry, unknown
from autoquant.spec.calibration import PERCENTILES, percentile_of

Array = NDArray[np.float64]
Range = tuple[float, float]
Calibration = Callable[[TensorStatistics, int, bool], Range]

CALIBRATIONS: Registry[Calibration] = Registry("activation calibration")

MOVING_AVERAGE_CONSTANT = 0.01
"""Weight of the newest call in ``moving_average``."""

_SMALLEST_SHRINKAGE = 2.0**-10
"""``mse`` tries ranges down to this part of the largest; there, a range is a few bins wide."""


def calibration_names() -> tuple[str, ...]:
    """Return the documented names; any other percentile_P with 50 < P ≤ 100 works too."""
    return CALIBRATIONS.names()


def is_calibration(name: str) -> bool:
    """Return whether ``name`` is an activation calibration."""
    return name in CALIBRATIONS or percentile_of(name) is not None


def activation_range(stats: TensorStatistics, method: str, bits: int, symmetric: bool) -> Range:
    """Return the range [lo, hi] ∋ 0 that ``method`` chooses, in the unit of the tensor.

    A symmetric range is [−T, T]; in an asymmetric one, a tensor with no negative numbers has lo 0.
    Raises SpecError for an unknown method or percentile, TrialError where ``stats`` holds no
    number or some that are not finite.
    """
    calibrate = _calibration(method)
    check_usable(stats)
    lo, hi = calibrate(stats, bits, symmetric)
    if symmetric:
        threshold = max(-lo, hi)
        return -threshold, threshold
    return min(lo, 0.0), max(hi, 0.0)


def _calibration(name: str) -> Calibration:
    if name in CALIBRATIONS:
        return CALIBRATIONS.get(name)
    p = percentile_of(name)
    if p is not None:
        return partial(_percentile, p)
    if name.startswith("percentile"):
        raise SpecError(
            f"activation calibration {name!r}: write percentile_P with 50 < P ≤ 100, "
            "such as percentile_99.99"
        )
    raise SpecError(unknown("activation calibration", name, calibration_names()))


@CALIBRATIONS.register("max")
def _max(stats: TensorStatistics, bits: int, symmetric: bool) -> Range:
    """Cover every number seen."""
    return stats.minimum, stats.maximum


@CALIBRATIONS.register("moving_average")
def _moving_average(stats: TensorStatistics, bits: int, symmetric: bool) -> Range:
    """Average the extremes of the calls, exponentially: m ← m + 0.01 (new − m).

    The constant is that of PyTorch's MovingAverageMinMaxObserver, and so is starting at the first.
    Source: Jacob et al. 2018, arXiv 1712.05877, section 3.1.
    """
    ages = np.arange(stats.minima.size)[::-1]
    weights = MOVING_AVERAGE_CONSTANT * (1 - MOVING_AVERAGE_CONSTANT) ** ages
    weights[0] /= MOVING_AVERAGE_CONSTANT
    return float(weights @ stats.minima), float(weights @ stats.maxima)


def _percentile(p: float, stats: TensorStatistics, bits: int, symmetric: bool) -> Range:
    """Cover up to the P-th percentile: of |x|, or of x and from the (100 − P)-th.

    Where so many numbers are zero that nothing else is left inside, the range is that of ``max``.
    Source: Wu et al. 2020, arXiv 2004.09602, section 5.2.
    """
    if symmetric:
        threshold = percentile(magnitude_histogram(stats), p)
        return (-threshold, threshold) if threshold > 0 else (-stats.absmax, stats.absmax)
    histogram = signed_histogram(stats)
    lo, hi = percentile(histogram, 100.0 - p), percentile(histogram, p)
    return (lo, hi) if lo < 0 or hi > 0 else (stats.minimum, stats.maximum)


for _name in PERCENTILES:
    _p = percentile_of(_name)
    if _p is not None:
        CALIBRATIONS.register(_name)(partial(_percentile, _p))


@CALIBRATIONS.register("entropy")
def _entropy(stats: TensorStatistics, bits: int, symmetric: bool) -> Range:
    """Keep the most information: least KL divergence from the clipped, coarsened histogram."""
    if symmetric:
        threshold = divergence.symmetric_threshold(stats, bits)
        return -threshold, threshold
    return divergence.asymmetric_range(stats, bits)


@CALIBRATIONS.register("mse")
def _mse(stats: TensorStatistics, bits: int, symmetric: bool) -> Range:
    """Minimize the mean squared error: a coarse logarithmic grid, then ever finer ones.

    Ranges are parts of the largest one, for both ends at once where the range is symmetric,
    otherwise for each end by itself (down to nothing). Never worse than ``max``, which is tried.
    """
    distortion = Distortion(stats)
    if symmetric:
        ends = np.array([-stats.absmax, stats.absmax])
    else:
        ends = np.array([min(stats.minimum, 0.0), max(stats.maximum, 0.0)])
    tied = symmetric or 0.0 in ends
    if tied:
        factors, ratio = _logarithmic(321)
        coarse, fine, rounds = np.stack([factors, factors], axis=1), 17, 2
    else:
        factors, ratio = _logarithmic(16)
        coarse, fine, rounds = _pairs(np.append(0.0, factors)), 5, 7
    best = np.ones(2)
    for round_ in range(rounds + 1):
        if round_ == 0:
            tried = coarse
        else:
            around = ratio ** np.linspace(-1, 1, fine)
            around = np.stack([around, around], axis=1) if tied else _pairs(around)
            tried = (best * around).clip(max=1.0)
            ratio **= 2 / (fine - 1)
        ranges = tried * ends
        best = tried[np.argmin(distortion(ranges[:, 0], ranges[:, 1], bits, symmetric))]
    lo, hi = (best * ends).tolist()
    return lo, hi


def _logarithmic(n: int) -> tuple[Array, float]:
    """Return ``n`` factors up to 1, a constant ratio apart, and that ratio."""
    return np.geomspace(_SMALLEST_SHRINKAGE, 1.0, n), _SMALLEST_SHRINKAGE ** (-1 / (n - 1))


def _pairs(x: Array) -> Array:
    """Return all pairs [n², 2] of the numbers ``x`` [n]."""
    return np.stack(np.meshgrid(x, x), axis=-1).reshape(-1, 2)
