import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.observers.histogram import magnitude_histogram, percentile, signed_histogram
from autoquant.observers.statistics import StatisticsCollector, TensorStatistics


def collect(x: torch.Tensor) -> TensorStatistics:
    collector = StatisticsCollector()
    collector.update(x)
    return collector.finish()


@settings(max_examples=200, deadline=None)
@given(
    numbers=st.lists(st.floats(-1e6, 1e6, width=32) | st.just(0.0), min_size=1, max_size=60),
    p=st.floats(0, 100),
)
def test_percentile_is_within_a_bin_of_numpy(numbers: list[float], p: float) -> None:
    x = torch.tensor(numbers)
    stats = collect(x)
    signed, magnitude = signed_histogram(stats), magnitude_histogram(stats)
    tolerance = stats.bin_width * (1 + 1e-9)
    data = x.double().numpy()
    assert percentile(signed, p) == pytest.approx(np.percentile(data, p), abs=tolerance, rel=0)
    expected = np.percentile(np.abs(data), p)
    assert percentile(magnitude, p) == pytest.approx(expected, abs=tolerance, rel=0)


def test_percentile_of_many_numbers() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).relu()
    stats = collect(x)
    for p in (40.0, 50.0, 99.0, 99.99, 99.999, 100.0):
        found = percentile(signed_histogram(stats), p)
        assert found == pytest.approx(np.percentile(x.numpy(), p), abs=stats.bin_width)


def test_histograms_end_where_the_data_end() -> None:
    stats = collect(torch.tensor([-3.3, 0.0, 1.0, 5.7]))
    signed, magnitude = signed_histogram(stats), magnitude_histogram(stats)
    assert (signed.lower[0], signed.upper[-1]) == (stats.minimum, stats.maximum)
    assert magnitude.upper[-1] == stats.maximum
    for histogram in (signed, magnitude):
        assert (histogram.counts.sum(), histogram.zeros) == (3, 1)
        assert (histogram.lower[1:] == histogram.upper[:-1]).all()


def test_a_constant_is_a_point() -> None:
    histogram = signed_histogram(collect(torch.full((9,), 0.7)))
    assert histogram.lower.tolist() == histogram.upper.tolist() == [pytest.approx(0.7)]
