import numpy as np
import pytest
import torch
from scipy.stats import entropy

from autoquant.observers import divergence
from autoquant.observers.histogram import magnitude_counts
from autoquant.observers.statistics import StatisticsCollector, TensorStatistics


def collect(x: torch.Tensor) -> TensorStatistics:
    collector = StatisticsCollector()
    collector.update(x)
    return collector.finish()


def by_loops(counts: list[float], start: int, stop: int, levels: int) -> float:
    """The published procedure, bin by bin."""
    width = stop - start
    window = counts[start:stop]
    reference = list(window)
    reference[0] += sum(counts[:start])
    reference[-1] += sum(counts[stop:])
    group = [k * levels // width for k in range(width)]
    spread = [0.0] * width
    for g in range(levels):
        filled = [k for k in range(width) if group[k] == g and window[k] > 0]
        mass = sum(window[k] for k in range(width) if group[k] == g)
        for k in filled:
            spread[k] = mass / len(filled)
    return float(entropy(reference, spread))


def test_divergence_matches_the_direct_loop() -> None:
    generator = np.random.default_rng(0)
    for trial in range(150):
        counts = generator.poisson(generator.choice([0.3, 2.0, 50.0]), 90).astype(float)
        levels = int(generator.choice([2, 4, 7, 16]))
        start = int(generator.integers(0, 40)) if trial % 2 else 0
        stop = int(generator.integers(start + levels, 91))
        if not counts[start:stop].sum():
            continue
        expected = by_loops(counts.tolist(), start, stop, levels)
        starts, stops = np.array([start]), np.array([stop])
        found = divergence.divergences(counts, starts, stops, levels)[0]
        assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_threshold_is_the_best_of_all(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "SEARCH_BINS", 256)
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) ** 3
    stats = collect(x)
    counts = magnitude_counts(stats).reshape(256, -1).sum(1).astype(float).tolist()
    levels = 2 ** (bits - 1)
    last = max(k for k in range(256) if counts[k]) + 1
    scores = {stop: by_loops(counts, 0, stop, levels) for stop in range(levels, last + 1)}
    best = max(stop for stop in scores if scores[stop] <= min(scores.values()) + 1e-12)
    expected = min(best * stats.limit / 256, stats.absmax)
    assert divergence.symmetric_threshold(stats, bits) == pytest.approx(expected)


def test_one_sided_range_is_the_best_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "SEARCH_BINS", 256)
    x = (torch.randn(20_000, generator=torch.Generator().manual_seed(0)) ** 3).relu()
    stats = collect(x)
    counts = magnitude_counts(stats).reshape(256, -1).sum(1).astype(float).tolist()
    last = max(k for k in range(256) if counts[k]) + 1
    scores = {stop: by_loops(counts, 0, stop, 16) for stop in range(16, last + 1)}
    lo, hi = divergence.asymmetric_range(stats, 4)
    assert (lo, hi) == (0.0, min(min(scores, key=scores.__getitem__) * stats.bin_width * 16, hi))


def test_each_end_of_a_two_sided_range_is_the_best_given_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(divergence, "SEARCH_BINS", 128)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=generator) ** 3
    stats = collect(torch.where(x < 0, x / 4, x))
    counts = stats.counts.reshape(256, -1).sum(1).astype(float).tolist()
    lo, hi = divergence.asymmetric_range(stats, 3)
    width = stats.limit / 128
    start, stop = round(lo / width) + 128, round(hi / width) + 128
    assert lo < 0 < hi
    found = by_loops(counts, start, stop, 8)
    starts = [k for k in range(128) if counts[k] and stop - k >= 8]
    assert found <= min(by_loops(counts, k, stop, 8) for k in starts) + 1e-12
    first = min(k for k in range(256) if counts[k])
    last = max(k for k in range(256) if counts[k]) + 1
    assert found <= by_loops(counts, first, last, 8) + 1e-12


@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-38, 3e38])
def test_constants_keep_their_value(value: float) -> None:
    stats = collect(torch.full((20,), value))
    assert divergence.symmetric_threshold(stats, 8) == pytest.approx(abs(value))
    lo, hi = divergence.asymmetric_range(stats, 8)
    assert (lo, hi) == (pytest.approx(min(value, 0.0)), pytest.approx(max(value, 0.0)))
