"""Clipping thresholds by Kullback-Leibler divergence, as in TensorRT's entropy calibration.

A window of the histogram is a candidate range. Its reference P is the histogram inside, with what
lies outside added to the bins at the edges; Q is the window cut into as many equal groups of bins
as there are levels, each group's count spread over its non-empty bins. The window with the least
KL(P ‖ Q) wins, the widest among equals. Exact zeros are left out: they are exact in every range.

Symmetric ranges, as published: a window [0, T) of |x|, 2^(bits−1) groups, never fewer bins than
groups. Asymmetric ranges, our generalization: a window [lo, hi) of x around 0, 2^bits groups;
the upper end is searched with the lower end fixed, then the lower one, and once more if it moved.
Source: Migacz, "8-bit inference with TensorRT", GTC 2017; Wu et al. 2020, arXiv 2004.09602.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoquant.observers.histogram import magnitude_counts
from autoquant.observers.statistics import BINS_PER_SIDE, TensorStatistics

SEARCH_BINS = 2048
"""Bins of [0, R) that thresholds are searched in, and as many below 0; TensorRT's number."""

_CANDIDATES = 512
"""Windows tried along one end where both are searched."""

Indices = NDArray[np.intp]


def divergences(
    counts: NDArray[np.float64], starts: Indices, stops: Indices, levels: int
) -> NDArray[np.float64]:
    """Return KL(P ‖ Q) of the windows ``counts[start:stop]``, each cut into ``levels`` groups.

    ``starts`` and ``stops`` broadcast to [windows]; a window has at least ``levels`` bins. The
    divergence is infinite where clipped numbers would go to an empty bin at the edge.
    """
    starts, stops = np.broadcast_arrays(starts, stops)
    mass = np.concatenate([[0.0], np.cumsum(counts)])
    filled = np.concatenate([[0], np.cumsum(counts > 0)])
    entropy = np.concatenate([[0.0], np.cumsum(_x_log_x(counts))])
    total = mass[-1]
    outside = [mass[starts], total - mass[stops]]
    edges = [counts[starts], counts[stops - 1]]

    # Σ P log P over the bins, by prefix sums, with the two bins at the edges put right.
    plogp = entropy[stops] - entropy[starts]
    for out, edge in zip(outside, edges, strict=True):
        plogp += _x_log_x(edge + out) - _x_log_x(edge)

    # Group g begins at the first bin k of the window with k · levels ≥ g · width.
    width = (stops - starts)[:, None]
    bounds = starts[:, None] - (-np.arange(levels + 1) * width) // levels
    inside = np.diff(mass[bounds], axis=1)
    spread = np.diff(filled[bounds], axis=1)
    reference = inside.copy()
    reference[:, 0] += outside[0]
    reference[:, -1] += outside[1]
    height = np.divide(inside, spread, out=np.ones_like(inside), where=spread > 0)
    plogq = (reference * np.log(height)).sum(1)

    with np.errstate(divide="ignore", invalid="ignore"):
        result = (plogp - plogq) / total + np.log((mass[stops] - mass[starts]) / total)
    impossible = np.zeros(len(starts), dtype=bool)
    for out, edge in zip(outside, edges, strict=True):
        impossible |= (out > 0) & (edge == 0)
    return np.where(impossible, np.inf, result)


def symmetric_threshold(stats: TensorStatistics, bits: int) -> float:
    """Return T of the range [−T, T] with the least divergence; at most max|x|."""
    counts = _coarsen(magnitude_counts(stats))
    levels = 1 << (bits - 1)
    stops = np.flatnonzero(counts)[::-1] + 1
    stops = stops[stops >= levels]
    if not stops.size:
        return stats.absmax
    best = stops[np.argmin(divergences(counts, np.zeros(1, np.intp), stops, levels))]
    return min(float(best) * stats.limit / SEARCH_BINS, stats.absmax)


def asymmetric_range(stats: TensorStatistics, bits: int) -> tuple[float, float]:
    """Return the range [lo, hi] around 0 with the least divergence, within the extremes."""
    counts = _coarsen(stats.counts)
    levels = 1 << bits
    filled = np.flatnonzero(counts)
    if not filled.size:
        return 0.0, 0.0
    start = min(int(filled[0]), SEARCH_BINS)
    stop = max(int(filled[-1]) + 1, SEARCH_BINS)
    # The widest first: argmin takes the first among equals.
    starts = _thin(filled[filled < SEARCH_BINS])
    stops = _thin(filled[filled >= SEARCH_BINS][::-1] + 1)
    for _ in range(2):
        before = start
        tried = stops[stops - start >= levels]
        if tried.size:
            fixed = np.array([start], dtype=np.intp)
            stop = int(tried[np.argmin(divergences(counts, fixed, tried, levels))])
        tried = starts[stop - starts >= levels]
        if tried.size:
            fixed = np.array([stop], dtype=np.intp)
            start = int(tried[np.argmin(divergences(counts, tried, fixed, levels))])
        if start == before:
            break
    width = stats.limit / SEARCH_BINS
    lo, hi = (start - SEARCH_BINS) * width, (stop - SEARCH_BINS) * width
    return max(lo, min(stats.minimum, 0.0)), min(hi, max(stats.maximum, 0.0))


def _coarsen(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the same histogram with SEARCH_BINS bins a side."""
    return counts.reshape(-1, BINS_PER_SIDE // SEARCH_BINS).sum(1).astype(np.float64)


def _thin(candidates: Indices) -> Indices:
    """Return at most _CANDIDATES evenly chosen ones, the first always among them."""
    step = -(-candidates.size // _CANDIDATES)
    return candidates[:: max(step, 1)]


def _x_log_x(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return x log x, 0 at 0."""
    return x * np.log(np.where(x > 0, x, 1.0))
