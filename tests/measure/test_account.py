"""Keeping results never costs much more than it has saved."""

import pytest

from autoquant.measure import account
from autoquant.measure.account import LENT, LOST, Account


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on when it is told to."""
    now = [100.0]
    monkeypatch.setattr(account.time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def evaluate(a, clock, seconds):
    a.begin()
    clock(seconds)
    a.end()


def test_some_evaluations_time_is_lent(clock):
    a = Account()
    assert a.affords(1)  # nothing was spent yet
    a.begin()
    clock(0.5)
    a.spent = 0.5 * (LENT + LOST)
    clock(a.spent)  # which is no time that the model runs
    assert a.affords(1)  # while the first one runs
    a.spent += 0.01
    clock(0.01)
    assert not a.affords(1)
    a.end()
    for _ in range(9):
        evaluate(a, clock, 0.5)
    assert a.affords(10)  # 2% of 10 evaluations
    a.spent = 0.5 * (LENT + 10 * LOST) + 0.01
    assert not a.affords(10)


def test_what_came_back_may_be_spent_again(clock):
    a = Account()
    evaluate(a, clock, 1.0)
    a.spent = LENT + 46.0
    assert not a.affords(1)
    a.earned = 46.0
    assert a.affords(1)


@pytest.mark.parametrize(("gain", "least"), [(0.0, 0.0), (0.5, 0.0), (3.0, 100.0)])
def test_the_loss_is_bounded(clock, gain, least):
    """Each evaluation would keep results for .5 of its time; so much of that comes back."""
    a, total = Account(), 0.0
    for n in range(1, 201):
        evaluate(a, clock, 1.0)
        total += 1.0
        if a.affords(n):
            a.spent += 0.5
            a.earned += 0.5 * gain
    assert a.spent - a.earned <= LENT + LOST * total + 0.5
    assert a.earned >= least
