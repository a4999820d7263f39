"""Is the drop at most so much? A non-inferiority test on paired samples.

The claim passes where the upper one-sided 95% bound of the drop is within the margin, fails where
the lower one is beyond it, and is not proven in between: few samples can not prove a small drop.
"""

from __future__ import annotations

import math

import numpy as np

from autoquant.models import paired_proportions as paired
from autoquant.models.evidence import Evidence, StatisticsEvidence
from autoquant.models.intervals import UNKNOWN, Interval, paired_bootstrap
from autoquant.models.metrics import MetricInfo, StatisticMetric, drop
from autoquant.spec.verdict import FAIL, NOT_PROVEN, PASS, Verdict

LEVEL = 0.05
"""Chance of a wrong PASS where the drop is at the margin, and of a wrong FAIL."""
POWER = 0.8416212335729143
"""Standard normal quantile of 80%: how often ``samples_needed`` are to give a proof."""

IMAGINED = 4
"""Samples that are imagined to differ beside those that do, where the bootstrap is asked."""


def flips(before: Evidence, after: Evidence, metric: MetricInfo) -> tuple[int, int, int] | None:
    """Return (lost, gained, samples) of a metric that is right or wrong sample by sample.

    None for every other metric, and where a sample has several positions. Samples that do not
    count are left out.
    """
    if not isinstance(metric, StatisticMetric) or not metric.right_or_wrong:
        return None
    if not isinstance(before, StatisticsEvidence) or not isinstance(after, StatisticsEvidence):
        return None
    one, two = before.stats, after.stats
    if len(one) != len(two):
        raise ValueError(f"evidence of {len(one)} and of {len(two)} samples is not paired")
    counts = one[:, 1]
    if not np.array_equal(counts, two[:, 1]) or not np.isin(counts, (0, 1)).all():
        return None
    n = int(counts.sum())
    if n == 0:
        return None
    change = one[:, 0] - two[:, 0]
    return int((change > 0).sum()), int((change < 0).sum()), n


def drop_interval(before: Evidence, after: Evidence, metric: MetricInfo, seed: int = 0) -> Interval:
    """Return how sure the drop from ``before`` to ``after`` is, by what suits the metric.

    The score test of paired proportions for accuracies, else the paired bootstrap, with two
    corrections. Where few samples differ, resamples vary less than fresh data would: each end is
    moved out by what IMAGINED more of their size would do. Simulated (50 … 436 samples, of which
    0.5 … 10% differ, by skewed amounts) 95% intervals then cover 91% or more, plain ones as little
    as 16%.
    A bootstrap in which nothing ever varies knows nothing of the samples that were not seen: for
    a bounded metric the share of them that differ after all is bounded instead (the rule of
    three: 1 − α^(1/n)), each taken to change the metric by its whole share; for any other there
    is no interval.
    """
    counts = flips(before, after, metric)
    if counts is not None:
        if counts[2] < 2:
            return UNKNOWN
        two = paired.bounds(*counts)
        one = paired.bounds(*counts, z=paired.ONE_SIDED)
        return Interval(*two, paired.standard_error(*counts), *one)
    found = paired_bootstrap(before, after, metric, seed=seed)
    if not found.known:
        return UNKNOWN
    measured = _drop(before, after, metric)
    if found.standard_error > 0:
        return _widened(found, measured, differing(before, after))
    if not metric.bounded or measured != 0:
        return UNKNOWN
    two_sided, one_sided = (1 - alpha ** (1 / before.n) for alpha in (LEVEL / 2, LEVEL))
    return Interval(-two_sided, two_sided, 0.0, -one_sided, one_sided)


def differing(before: Evidence, after: Evidence) -> int:
    """Return how many samples two models differ on; all of them where that can't be told."""
    if not isinstance(before, StatisticsEvidence) or not isinstance(after, StatisticsEvidence):
        return before.n
    one, two = before.stats, after.stats
    if one.shape != two.shape:
        return before.n
    return int(((one != two) & ~(np.isnan(one) & np.isnan(two))).any(axis=1).sum())


def _widened(interval: Interval, measured: float, differing: int) -> Interval:
    """Return √(w² + z²·IMAGINED·SE²/k) for each distance w from the measured drop to an end.

    k samples that differ have SE ≈ √k·s, s the share of the drop that is due to one: imagined ones
    add IMAGINED·s² to the variance. Adding imagined discordant pairs is how Agresti and Min (2005,
    Statistics in Medicine 24:729) mend intervals of paired proportions.
    """
    if not math.isfinite(measured) or not differing:
        return interval
    unseen = IMAGINED * interval.standard_error**2 / differing

    def moved(end: float, z: float) -> float:
        return math.sqrt((end - measured) ** 2 + z * z * unseen)

    return Interval(
        measured - moved(interval.low, paired.TWO_SIDED),
        measured + moved(interval.high, paired.TWO_SIDED),
        interval.standard_error,
        measured - moved(interval.lower, paired.ONE_SIDED),
        measured + moved(interval.upper, paired.ONE_SIDED),
    )


def judge(
    before: Evidence | None,
    after: Evidence | None,
    metric: MetricInfo,
    margin: float,
    measured: float,
    interval: Interval,
) -> Verdict:
    """Return the verdict on "the metric drops by at most ``margin`` from ``before`` to ``after``".

    ``margin``, ``measured`` (the drop) and ``interval`` (``drop_interval``) are in the metric's
    unit. Without evidence, or where it gives no interval, nothing is proven. A margin of 0 on
    accuracies is McNemar's exact test.
    """
    if before is None or after is None:
        return Verdict(NOT_PROVEN, margin, measured, None, None, 0, None)
    counts = flips(before, after, metric)
    samples = before.n if counts is None else counts[2]
    rate = None if counts is None else (counts[0] + counts[1]) / samples
    outcome, needed, ends = NOT_PROVEN, None, None
    if interval.known:
        ends = (interval.low, interval.high)
        outcome = _outcome(interval, counts, margin)
        variance = samples * interval.standard_error**2
        needed = samples_needed(variance, margin, measured, bounded=metric.bounded)
        if needed is not None and outcome == NOT_PROVEN:
            needed = max(needed, samples + 1)  # as many as there are were not enough
    return Verdict(outcome, margin, measured, ends, rate, samples, needed)


def _outcome(interval: Interval, counts: tuple[int, int, int] | None, margin: float) -> str:
    if counts is not None and margin == 0:
        better, worse = paired.mcnemar(counts[0], counts[1])
        return PASS if better <= LEVEL else FAIL if worse <= LEVEL else NOT_PROVEN
    if interval.upper <= margin:
        return PASS
    return FAIL if interval.lower > margin else NOT_PROVEN


def samples_needed(variance: float, margin: float, measured: float, *, bounded: bool) -> int | None:
    """Return how many samples prove the claim with 80% power if the drop is as ``measured``.

    n = (z₉₅ + z₈₀)²·variance/(margin − drop)², ``variance`` that of one sample's paired difference
    (d − Δ² for accuracies); at least what the rule of three asks for where nothing varies. None
    where the drop is not below the margin, so that no number would do, or is not a number.
    """
    room = margin - measured
    if not (math.isfinite(variance) and math.isfinite(room)) or room <= 0:
        return None
    count = (paired.ONE_SIDED + POWER) ** 2 * variance / room**2
    if bounded:
        count = max(count, paired.samples_without_flips(room))
    return max(math.ceil(count), 2) if math.isfinite(count) else None


def _drop(before: Evidence, after: Evidence, metric: MetricInfo) -> float:
    every = np.arange(before.n)
    return drop(metric, before.score_at(every), after.score_at(every))
