"""Two classifiers on the same samples: how far their accuracies lie apart, and how surely.

Everything follows from two counts among ``n`` samples: ``lost``, which only the first model has
right, and ``gained``, which only the second has. The drop is (lost − gained)/n.
"""

from __future__ import annotations

import math

import numpy as np

from autoquant.libraries import library

TWO_SIDED = 1.959963984540054
"""Standard normal quantile of 97.5%: both ends of a 95% interval."""
ONE_SIDED = 1.6448536269514722
"""Standard normal quantile of 95%: one end alone."""
CONTINUITY = 0.5
"""Half the step of lost − gained.

Without it Tango's bounds are too tight where few samples flip: computed from the trinomial, a
one-sided 5% test errs in up to 7% of cases; with it in up to 4.6%, and 95% intervals cover 95.6%
or more (n 100 … 1000, flip rates 0 … 8%). At worst (n 10 … 600, flip rates to 30%, drops to 10%)
it is 5.8% and 95.2%.
"""
HALVINGS = 60
"""Steps of the bisection: to the last bits of a float."""

Array = np.ndarray


def standard_error(lost: int, gained: int, n: int) -> float:
    """Return the standard error of the drop: SE² = (d − Δ²)/n, d the share that flips."""
    return math.sqrt(max(per_sample_variance(lost, gained, n), 0.0) / n)


def per_sample_variance(lost: int, gained: int, n: int) -> float:
    """Return the variance d − Δ² of one sample's difference, which is −1, 0 or 1."""
    return (lost + gained) / n - ((lost - gained) / n) ** 2


def bounds(lost: int, gained: int, n: int, z: float = TWO_SIDED) -> tuple[float, float]:
    """Return the drops between which the score test does not reject, each end at quantile ``z``.

    Tango (1998), Statistics in Medicine 17:891, with a continuity correction. Where nothing flips
    the ends are some 4.7 flips away (z = 1.96), never zero.
    """
    low, high = bounds_of(np.array([lost]), np.array([gained]), n, z)
    return float(low[0]), float(high[0])


def bounds_of(lost: Array, gained: Array, n: int, z: float = TWO_SIDED) -> tuple[Array, Array]:
    """Return ``bounds`` for arrays of counts."""
    b, c = np.asarray(lost, np.float64), np.asarray(gained, np.float64)
    return -_upper(c, b, n, z), _upper(b, c, n, z)


def _upper(b: Array, c: Array, n: int, z: float) -> Array:
    """Return the largest drop that (b, c) of n does not reject, by bisection."""
    low, high = (b - c) / n, np.ones_like(b)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        excess = n * middle - (b - c) - CONTINUITY
        rejected = excess > z * np.sqrt(_variance(b, c, n, middle))
        low, high = np.where(rejected, low, middle), np.where(rejected, middle, high)
    return high


def _variance(b: Array, c: Array, n: int, drop: Array) -> Array:
    """Return the variance of b − c under a true ``drop``, the flip rate being the likeliest.

    n·(2q + Δ(1 − Δ)) for Δ ≥ 0, where q, the share of c, solves 2n·q² + B·q + C = 0 (Tango 1998,
    eq. 7); a negative drop is a positive one with the models exchanged.
    """
    b, c = np.where(drop < 0, c, b), np.where(drop < 0, b, c)
    size = np.abs(drop)
    linear = (2 * n - b + c) * size - b - c
    constant = -c * size * (1 - size)
    root = np.sqrt(np.maximum(linear**2 - 8 * n * constant, 0.0))
    q = (root - linear) / (4 * n)
    return np.maximum(n * (2 * q + size * (1 - size)), 0.0)


def mcnemar(lost: int, gained: int) -> tuple[float, float]:
    """Return P(as few lost or fewer) and P(as many or more) if both flips are equally likely.

    McNemar's exact test: lost ~ Binomial(lost + gained, ½). The first is small where the second
    model is surely better, the other where it is surely worse; both are 1 without flips.
    """
    binom = library("scipy.stats").binom
    flips = lost + gained
    return float(binom.cdf(lost, flips, 0.5)), float(binom.sf(lost - 1, flips, 0.5))


def samples_without_flips(margin: float) -> float:
    """Return how many samples without a flip prove a drop of at most ``margin`` (0 … 1).

    The rule of three in this module's bounds: n·Δ − ½ > z·√(n·Δ(1 − Δ)), some 3.6/Δ.
    """
    if margin <= 0:
        return math.inf
    z = ONE_SIDED * math.sqrt(max(1 - margin, 0.0))
    return ((z + math.sqrt(z * z + 4 * CONTINUITY)) / 2) ** 2 / margin
