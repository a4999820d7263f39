"""Rates and the order of samples: of the step alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoquant.training.schedule import Lessons, rate_at


def test_rates_rise_in_a_line_and_fall_to_nothing() -> None:
    rates = [rate_at(i, 100, 10) for i in range(101)]
    assert rates[0] == pytest.approx(0.1, rel=1e-3)
    assert max(rates) == pytest.approx(1.0, abs=0.03)
    assert rates.index(max(rates)) == 9
    assert rates[-1] == 0.0
    assert rates[99] < 0.001
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    assert rate_at(0, 100, 0) == 1.0


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    size=st.integers(1, 16),
    seed=st.integers(0, 100),
)
def test_every_sample_comes_once_an_epoch(sizes: list[int], size: int, seed: int) -> None:
    order = Lessons([torch.zeros(n, 1) for n in sizes]).order(size, seed)
    for epoch in range(2):
        seen = [order.places(epoch * order.length + i) for i in range(order.length)]
        rows = sorted((batch, row) for batch, own in seen for row in own)
        assert rows == [(b, r) for b, n in enumerate(sizes) for r in range(n)]
        assert max(len(own) for _, own in seen) <= size


def test_epochs_and_seeds_differ_and_repeat() -> None:
    lessons = Lessons([torch.arange(64.0).reshape(64, 1)])
    order = lessons.order(16, 0)
    first = [order.places(i) for i in range(4)]
    assert first != [order.places(i) for i in range(4, 8)]
    assert first != [lessons.order(16, 1).places(i) for i in range(4)]
    assert first == [lessons.order(16, 0).places(i) for i in range(4)]
    batch, rows = first[0]
    assert batch == 0
    assert lessons.at(first[0]).flatten().tolist() == list(map(float, rows))
