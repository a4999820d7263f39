"""Whether an estimated gradient says how the loss of the quantized network really changes.

Rounding has no useful derivative, but the network that rounds has a loss, and that can be measured
a step away. Along a direction d it changes by about ⟨g, d⟩, where g is what an estimate ĝ should
be. Over random directions, with independent standard normal entries, the regression of the measured
slopes on ⟨ĝ, d⟩ has the slope ⟨ĝ, g⟩/‖ĝ‖² and the correlation cos(ĝ, g): 1 and 1 for the right
gradient, ½ and 1 for one that is twice as long, and no correlation for one that is of no use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from autoquant.libraries import library

Numbers: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LossSlope:
    """The slope of a loss along a direction, in units of the loss per unit of step.

    ``differences`` are (L(t) − L(−t))/(2t), one for each t of ``steps``; ``value`` is what they say
    together.
    """

    value: float
    steps: tuple[float, ...]
    differences: tuple[float, ...]

    @property
    def spread(self) -> float:
        """How far the differences are apart: curvature of odd order, and the steps of rounding."""
        return max(self.differences) - min(self.differences)


def loss_slope(loss_at: Callable[[float], float], steps: Sequence[float]) -> LossSlope:
    """Return the slope at 0 of ``loss_at``, the loss a signed step along one direction.

    ``value`` is the line through 0 that is nearest, by least squares, to the odd part
    (L(t) − L(−t))/2 at all ``steps``, so that even powers of t cancel. The loss of a network with
    rounded weights is a staircase: the jumps that a step happens to cross are about as large for
    any t, so longer steps weigh more, by t². Steps should be long enough to move many weights to
    another grid point and short enough for the loss to be nearly straight; ``spread`` tells.
    Raises ValueError where there is no step, or one isn't > 0. Calls loss_at twice a step.
    """
    if not steps or not all(t > 0 for t in steps):
        raise ValueError(f"steps of finite differences are to be > 0: {list(steps)}")
    differences = [(loss_at(t) - loss_at(-t)) / (2 * t) for t in steps]
    longest = max(steps)  # weights relative to it, so that tiny steps don't underflow
    weights = [(t / longest) ** 2 for t in steps]
    value = math.fsum(w * d for w, d in zip(weights, differences, strict=True)) / math.fsum(weights)
    return LossSlope(value, tuple(steps), tuple(differences))


@dataclass(frozen=True, slots=True)
class SlopeCheck:
    """What measured slopes say of estimated ones, over ``directions`` random directions.

    ``slope`` is by what estimates are to be multiplied to fit best; ``correlation``, in [−1, 1], is
    about 0 rather than about the means, as both change sign with the direction. Each has an
    interval that covers the truth with probability ``confidence``. NaN is what can't be known.
    """

    slope: float
    slope_low: float
    slope_high: float
    correlation: float
    correlation_low: float
    correlation_high: float
    directions: int
    confidence: float


def directional_check(
    estimated: npt.ArrayLike,
    true: npt.ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 0,
    seed: int = 0,
) -> SlopeCheck:
    """Return how ``true`` [k] slopes along directions follow the ``estimated`` [k], ⟨ĝ, dₖ⟩.

    Both in units of the loss per unit of step. The model is true = slope·estimated + error, without
    an intercept. Intervals are Student's for the slope, with k − 1 degrees of freedom, and Fisher's
    for the correlation, artanh with standard error 1/√(k − 2) as the means are known: right for
    errors that are normal and of one size, as they are for normal directions and a loss that is
    nearly straight. With ``resamples`` they are percentiles of a bootstrap of pairs (Efron 1979),
    widened for few pairs (Hesterberg 2015, American Statistician 69:371), which needs neither.
    Raises ValueError for arrays that aren't pairs, or are empty.
    """
    x, y = np.asarray(estimated, dtype=np.float64), np.asarray(true, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or not x.size:
        raise ValueError(f"slopes of shapes {x.shape} and {y.shape} are not pairs")
    # By their sizes, so that squares neither overflow nor vanish.
    unit_x, unit_y = _unit(x), _unit(y)
    x, y = x / unit_x, y / unit_y
    slope, correlation = (float(v) for v in _fit(x * x, x * y, y * y))
    if resamples:
        slopes, correlations = _bootstrap(x, y, confidence, resamples, seed)
    else:
        slopes = _student(x, y, slope, confidence)
        correlations = _fisher(correlation, x.size, confidence)
    ratio = unit_y / unit_x
    return SlopeCheck(
        slope * ratio,
        slopes[0] * ratio,
        slopes[1] * ratio,
        correlation,
        *correlations,
        x.size,
        confidence,
    )


def _unit(x: Numbers) -> float:
    """Return the largest magnitude, 1 where all are 0."""
    return float(np.abs(x).max()) or 1.0


def _fit(xx: Numbers, xy: Numbers, yy: Numbers) -> tuple[Numbers, Numbers]:
    """Return slope and correlation of products [..., k]: sums over the last axis, NaN for 0/0."""
    a, b, c = (np.asarray(v.sum(-1)) for v in (xx, xy, yy))
    with np.errstate(divide="ignore", invalid="ignore"):
        return b / a, np.clip(b / np.sqrt(a) / np.sqrt(c), -1.0, 1.0)


def _student(x: Numbers, y: Numbers, slope: float, confidence: float) -> tuple[float, float]:
    """Return the interval of the slope of a line through 0."""
    free = x.size - 1
    if not free or not math.isfinite(slope):
        return math.nan, math.nan
    residual = y - slope * x
    error = math.sqrt(float(residual @ residual) / free / float(x @ x))
    half = float(library("scipy.stats").t.ppf((1 + confidence) / 2, free)) * error
    return slope - half, slope + half


def _fisher(correlation: float, k: int, confidence: float) -> tuple[float, float]:
    """Return the interval of a correlation about known means."""
    if k < 3 or math.isnan(correlation):
        return math.nan, math.nan
    if abs(correlation) == 1.0:
        return correlation, correlation
    half = float(library("scipy.stats").norm.ppf((1 + confidence) / 2)) / math.sqrt(k - 2)
    z = math.atanh(correlation)
    return math.tanh(z - half), math.tanh(z + half)


def _bootstrap(
    x: Numbers, y: Numbers, confidence: float, resamples: int, seed: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the intervals of slope and correlation from pairs drawn with replacement."""
    k = x.size
    if k < 2:
        return (math.nan, math.nan), (math.nan, math.nan)
    drawn = np.random.default_rng(seed).integers(0, k, (resamples, k))
    found = _fit((x * x)[drawn], (x * y)[drawn], (y * y)[drawn])
    stats = library("scipy.stats")
    quantile = stats.t.ppf((1 - confidence) / 2, k - 1)
    tail = float(stats.norm.cdf(math.sqrt(k / (k - 1)) * quantile))
    # A resample of zeros alone says nothing; where nothing but such is left, nothing is known.
    known = [v[np.isfinite(v)] for v in found]
    (a, b), (c, d) = [
        np.quantile(v, [tail, 1 - tail]) if v.size else (math.nan, math.nan) for v in known
    ]
    return (float(a), float(b)), (float(c), float(d))
