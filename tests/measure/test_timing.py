"""How long a call takes: enough repetitions, and no more."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoquant.measure import timing
from autoquant.measure.timing import clock_of, median_seconds, relative_error


class Clock:
    """Gives times from a list, again and again."""

    def __init__(self, *times):
        self.times = itertools.cycle(times)
        self.calls = 0

    def __call__(self, call):
        call()
        self.calls += 1
        return next(self.times)


def test_a_steady_call_is_timed_a_few_times():
    clock = Clock(0.001)
    assert median_seconds(lambda: None, clock) == 0.001
    assert clock.calls == timing.WARM_UP + timing.LEAST


def test_a_noisy_call_is_timed_until_the_budget_is_spent():
    clock = Clock(0.001, 0.002, 0.004)
    assert 0.001 <= median_seconds(lambda: None, clock, budget=0.05, error=1e-6) <= 0.004
    assert 0.05 <= (clock.calls - timing.WARM_UP) * 7 / 3000 <= 0.06


def test_a_noisy_call_is_timed_until_its_median_is_known():
    clock = Clock(0.00100, 0.00110, 0.00105)
    median_seconds(lambda: None, clock, budget=100.0, error=0.01)
    assert timing.LEAST < clock.calls < 100


def test_a_slow_call_is_warm_after_one():
    clock = Clock(2.0)
    assert median_seconds(lambda: None, clock, least=3) == 2.0
    assert clock.calls == 1 + 3


def test_a_slow_layer_is_timed_three_times():
    clock = Clock(0.2)
    assert median_seconds(lambda: None, clock, error=-1.0) == 0.2
    assert clock.calls == 1 + 3


def test_an_outlier_does_not_count():
    assert median_seconds(lambda: None, Clock(1.0, 1.0, 50.0), budget=1e9) == 1.0


def test_a_clock_that_never_agrees_ends():
    clock = Clock(0.0, 1e-12, 2e-12)
    median_seconds(lambda: None, clock, budget=1.0, error=-1.0)
    assert clock.calls == timing.WARM_UP + timing.MOST


@given(st.lists(st.floats(1e-6, 10), min_size=1, max_size=20), st.floats(1e-3, 1e3))
def test_the_relative_error_has_no_unit(times, scale):
    found = relative_error(times)
    assert found >= 0
    assert relative_error([scale * t for t in times]) == pytest.approx(found, rel=1e-6, abs=1e-9)


def test_the_wall_clock_runs_the_call_once():
    calls = []
    assert clock_of(torch.device("cpu"))(lambda: calls.append(1)) >= 0
    assert calls == [1]
