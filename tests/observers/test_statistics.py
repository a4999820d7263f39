import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.observers.statistics import (
    BINS,
    BINS_PER_SIDE,
    StatisticsCollector,
    TensorStatistics,
)

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def collect(*calls: torch.Tensor, token_dim: int | None = None) -> TensorStatistics:
    collector = StatisticsCollector(token_dim)
    for call in calls:
        collector.update(call)
    return collector.finish()


def assert_same_numbers(a: TensorStatistics, b: TensorStatistics) -> None:
    """All that must not depend on order and batches is the same."""
    assert (a.count, a.zeros, a.limit) == (b.count, b.zeros, b.limit)
    assert (a.minimum, a.maximum) == (b.minimum, b.maximum)
    np.testing.assert_array_equal(a.counts, b.counts)


@settings(max_examples=200, deadline=None)
@given(numbers=st.lists(FLOATS, min_size=1, max_size=40), seed=st.integers(0, 1000))
def test_histogram_does_not_depend_on_order_or_batches(numbers: list[float], seed: int) -> None:
    x = torch.tensor(numbers)
    generator = torch.Generator().manual_seed(seed)
    shuffled = x[torch.randperm(len(x), generator=generator)]
    batches = shuffled.split(1 + seed % 7)
    assert_same_numbers(collect(x), collect(*batches))


@settings(max_examples=100, deadline=None)
@given(numbers=st.lists(FLOATS, min_size=1, max_size=40))
def test_counts_are_those_of_exact_arithmetic(numbers: list[float]) -> None:
    stats = collect(torch.tensor(numbers))
    expected = np.zeros(BINS, dtype=np.int64)
    for number in numbers:
        if number:
            numerator, denominator = number.as_integer_ratio()
            top, bottom = stats.bin_width.as_integer_ratio()
            expected[numerator * bottom // (denominator * top) + BINS_PER_SIDE] += 1
    np.testing.assert_array_equal(stats.counts, expected)
    assert stats.zeros == sum(number == 0 for number in numbers)


def test_many_lanes_and_chunks_count_like_numpy() -> None:
    x = torch.randn(300_001, generator=torch.Generator().manual_seed(0)).relu()
    stats = collect(x)
    numbers = x[x != 0].double().numpy()
    expected, _ = np.histogram(numbers, bins=BINS, range=(-stats.limit, stats.limit))
    np.testing.assert_array_equal(stats.counts, expected)
    assert stats.zeros == int((x == 0).sum())


def test_range_grows_by_merging_bins() -> None:
    small, large = torch.linspace(-1, 1, 999), torch.tensor([1000.0])
    grown = collect(small, large)
    assert grown.limit == 1024.0
    assert_same_numbers(grown, collect(large, small))
    assert collect(small).limit == 2.0


def test_range_grows_further_than_there_are_bins() -> None:
    tiny, huge = torch.tensor([1e-30, -1e-30]), torch.tensor([3e38])
    stats = collect(tiny, huge)
    assert stats.counts[BINS_PER_SIDE - 1 : BINS_PER_SIDE + 1].tolist() == [1, 1]
    assert_same_numbers(stats, collect(huge, tiny))


def test_moments_match_float64() -> None:
    calls = [torch.randn(200_000) * 3 + 100, torch.full((200_000,), 1000.123)]
    whole = torch.cat(calls).double()
    stats = collect(*calls)
    assert stats.mean == pytest.approx(whole.mean().item(), rel=1e-6)
    assert stats.mean_square == pytest.approx(whole.square().mean().item(), rel=1e-6)


def test_moments_of_huge_numbers_do_not_overflow() -> None:
    stats = collect(torch.tensor([3e38, -3e38, 3e38, 3e38]))
    assert stats.mean == pytest.approx(1.5e38)
    assert stats.mean_square == pytest.approx(9e76)


def test_extremes_of_each_call_are_kept_in_order() -> None:
    stats = collect(torch.tensor([1.0, -2.0]), torch.tensor([]), torch.tensor([[5.0, 3.0]]))
    assert stats.minima.tolist() == [-2.0, 3.0]
    assert stats.maxima.tolist() == [1.0, 5.0]
    assert (stats.minimum, stats.maximum, stats.absmax) == (-2.0, 5.0, 5.0)


@pytest.mark.parametrize("token_dim", [-1, 1])
def test_token_ranges(token_dim: int) -> None:
    x = torch.randn(5, 7, 11) + 1
    rows = x.movedim(token_dim, -1).reshape(-1, x.shape[token_dim]).double()
    stats = collect(x[:2], x[2:], token_dim=token_dim)
    width = rows.amax(1).clamp(min=0) - rows.amin(1).clamp(max=0)
    assert stats.tokens == len(rows)
    assert stats.token_absmax_square == pytest.approx(rows.abs().amax(1).square().mean().item())
    assert stats.token_range_square == pytest.approx(width.square().mean().item())
    assert_same_numbers(stats, collect(x))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("token_dim", [None, -1])
def test_not_finite_numbers_are_reported_and_left_out(bad: float, token_dim: int | None) -> None:
    x = torch.tensor([[1.0, -2.0, bad], [3.0, 0.0, 0.5]])
    stats = collect(x, token_dim=token_dim)
    assert not stats.finite
    assert (stats.count, stats.zeros, stats.minimum, stats.maximum) == (5, 1, -2.0, 3.0)
    assert stats.counts.sum() == 4
    assert stats.mean == pytest.approx(0.5)
    if token_dim is not None:
        assert (stats.tokens, stats.token_absmax_square) == (1, 9.0)


def test_a_call_of_nothing_finite_leaves_no_numbers() -> None:
    collector = StatisticsCollector(-1)
    collector.update(torch.full((2, 3), math.nan))
    assert collector.empty
    stats = collector.finish()
    assert not stats.finite
    assert (stats.count, stats.tokens, stats.minima.size) == (0, 0, 0)


def test_float64_beyond_float32_is_not_finite() -> None:
    assert not collect(torch.tensor([1e300], dtype=torch.float64)).finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_count_as_float32(dtype: torch.dtype) -> None:
    x = torch.randn(3, 50).to(dtype)
    assert_same_numbers(collect(x), collect(x.float()))
    assert_same_numbers(collect(x, token_dim=-1), collect(x.float()))


@pytest.mark.parametrize("token_dim", [None, -1])
def test_layouts_do_not_matter(token_dim: int | None) -> None:
    x = torch.randn(2, 3, 4, 5)
    expected = collect(x.contiguous())
    views = [
        x.to(memory_format=torch.channels_last),
        x.transpose(0, 3),
        torch.stack([x, torch.zeros_like(x)], dim=-1)[..., 0],
        x.clone().requires_grad_(),
    ]
    for view in views:
        assert_same_numbers(collect(view, token_dim=token_dim), expected)


def test_expanded_numbers_count_each_time() -> None:
    assert collect(torch.tensor([[1.0], [2.0]]).expand(2, 10)).count == 20


@pytest.mark.parametrize("token_dim", [None, -1])
def test_scalars_and_empty_tensors(token_dim: int | None) -> None:
    collector = StatisticsCollector(token_dim)
    collector.update(torch.empty(0, 5))
    assert collector.empty
    collector.update(torch.tensor(2.5))
    assert not collector.empty
    stats = collector.finish()
    assert (stats.count, stats.minimum, stats.maximum, stats.tokens) == (1, 2.5, 2.5, 0)


def test_all_zeros() -> None:
    stats = collect(torch.zeros(10), torch.tensor([-0.0]))
    assert (stats.count, stats.zeros, stats.absmax, stats.counts.sum()) == (11, 11, 0.0, 0)


def test_finish_is_a_snapshot() -> None:
    collector = StatisticsCollector()
    collector.update(torch.ones(3))
    before = collector.finish()
    collector.update(torch.ones(3))
    assert (before.count, before.counts.sum()) == (3, 3)
