"""How sure a drop is: a paired bootstrap over samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from autoquant.libraries import library
from autoquant.models.evidence import Evidence
from autoquant.models.metrics import MetricInfo

CHUNK = 2_000_000
"""Indices drawn at once, at most: bounds memory at some 200 MB, and less is no slower."""


@dataclass(frozen=True)
class Interval:
    """A 95% interval of the drop (positive = worse) and the drop's standard error.

    ``lower`` and ``upper`` are one-sided 95% bounds: each alone is beyond the truth one time in
    twenty. All are NaN where they can not be known: a single sample, or a metric that is undefined
    on most resamples.
    """

    low: float
    high: float
    standard_error: float
    lower: float
    upper: float

    @property
    def known(self) -> bool:
        """Whether the samples allow an interval."""
        return not math.isnan(self.low)


UNKNOWN = Interval(*[math.nan] * 5)


def paired_bootstrap(
    float_evidence: Evidence,
    quantized_evidence: Evidence,
    metric: MetricInfo,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the 95% interval of the drop from float to quantized, by widened percentiles.

    Samples are drawn with replacement, the same ones for both models (Efron 1979; Koehn 2004 for
    the paired test), so that what makes a sample hard for both cancels. ``resamples`` is an upper
    bound: very many samples get fewer, and functions of the user get 200, so that it takes about a
    second at most. A function of (evidence, resamples, seed) alone. Where no sample
    differs the interval is [0, 0], which says less than it seems to: ask
    ``noninferiority.drop_interval``.
    """
    n = float_evidence.n
    if quantized_evidence.n != n:
        raise ValueError(f"evidence of {n} and of {quantized_evidence.n} samples is not paired")
    if n < 2:
        return UNKNOWN
    count = min(resamples, float_evidence.max_resamples, quantized_evidence.max_resamples)
    rng = np.random.default_rng(seed)
    rows = max(1, CHUNK // n)
    drops = np.concatenate(
        [
            _drops(float_evidence, quantized_evidence, metric, rng.integers(0, n, (size, n)))
            for size in _chunks(count, rows)
        ]
    )
    drops = drops[np.isfinite(drops)]
    if len(drops) < max(2, count // 2):
        return UNKNOWN
    tails = [_tail(share, n) for share in (0.025, 0.05)]
    low, lower, upper, high = np.quantile(drops, [*tails, *(1 - t for t in reversed(tails))])
    return Interval(float(low), float(high), float(drops.std(ddof=1)), float(lower), float(upper))


def _tail(share: float, n: int) -> float:
    """Return the share of resamples to cut off for a tail of ``share`` from n samples.

    Φ(√(n/(n − 1))·t), t the quantile of Student's distribution (Hesterberg 2015, American
    Statistician 69:371): plain percentiles are too narrow for few samples, as resamples vary by
    (n − 1)/n of what samples do and the normal's tails are lighter than t's.
    """
    stats = library("scipy.stats")
    quantile = stats.t.ppf(share, n - 1)
    return float(stats.norm.cdf(math.sqrt(n / (n - 1)) * quantile))


def _chunks(total: int, size: int) -> list[int]:
    """Return sizes of at most ``size`` that sum to ``total``."""
    return [min(size, total - start) for start in range(0, total, size)]


def _drops(
    float_evidence: Evidence, quantized_evidence: Evidence, metric: MetricInfo, indices: np.ndarray
) -> np.ndarray:
    worse = float_evidence.scores_at(indices) - quantized_evidence.scores_at(indices)
    return worse if metric.higher_is_better else -worse
