"""A histogram as a density: numbers spread evenly within each bin, and a point mass at 0."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoquant.observers.statistics import BINS_PER_SIDE, TensorStatistics


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Neighbouring bins [lower, upper) with ``counts``, all of one shape [bins].

    The first and the last bin hold numbers and end where the data end (so that a constant is a
    point); others may be empty. Before that clipping, bin i begins at (``first`` + i) bin widths.
    ``zeros`` exact zeros are counted apart.
    """

    first: int
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    counts: NDArray[np.int64]
    zeros: int


def signed_histogram(stats: TensorStatistics) -> Histogram:
    """Return the histogram of x."""
    first, counts = _trim(stats.counts)
    first -= BINS_PER_SIDE
    edges = (np.arange(counts.size + 1, dtype=np.float64) + first) * stats.bin_width
    lower, upper = edges[:-1].clip(min=stats.minimum), edges[1:].clip(max=stats.maximum)
    return Histogram(first, lower, upper, counts, stats.zeros)


def magnitude_histogram(stats: TensorStatistics) -> Histogram:
    """Return the histogram of |x|."""
    first, counts = _trim(magnitude_counts(stats))
    edges = (np.arange(counts.size + 1, dtype=np.float64) + first) * stats.bin_width
    return Histogram(first, edges[:-1], edges[1:].clip(max=stats.absmax), counts, stats.zeros)


def magnitude_counts(stats: TensorStatistics) -> NDArray[np.int64]:
    """Return how many |x| > 0 fall into each of the BINS_PER_SIDE bins of [0, R)."""
    return stats.counts[BINS_PER_SIDE:] + stats.counts[:BINS_PER_SIDE][::-1]


def percentile(histogram: Histogram, p: float) -> float:
    """Return the ``p``-th percentile, interpolated between order statistics as numpy does.

    Each of the two order statistics is right to within its bin; the extremes are exact.
    """
    at = int(np.searchsorted(histogram.lower, 0.0))
    counts = np.insert(histogram.counts, at, histogram.zeros)
    lower = np.insert(histogram.lower, at, 0.0)
    upper = np.insert(histogram.upper, at, 0.0)
    ends = np.cumsum(counts)
    total = int(ends[-1])
    rank = p / 100.0 * (total - 1)
    below = int(rank)
    ranks = np.array([below, min(below + 1, total - 1)])
    i = np.searchsorted(ends, ranks, side="right")
    within = (ranks - (ends[i] - counts[i]) + 0.5) / counts[i]
    values = lower[i] + within * (upper[i] - lower[i])
    filled = np.flatnonzero(counts)
    values = np.where(ranks == 0, lower[filled[0]], values)
    values = np.where(ranks == total - 1, upper[filled[-1]], values)
    return float(values[0] + (rank - below) * (values[1] - values[0]))


def _trim(counts: NDArray[np.int64]) -> tuple[int, NDArray[np.int64]]:
    """Return the index of the first filled bin, and the bins from there to the last filled."""
    filled = np.flatnonzero(counts)
    if filled.size == 0:
        return 0, counts[:0]
    return int(filled[0]), counts[filled[0] : filled[-1] + 1]
