"""Several budgets at once: as good as trying everything."""

import ctypes
import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.solvers.integer_program import keeps, silent_output, solve_within, undominated


@st.composite
def problems(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    scales = [10.0 ** draw(st.integers(-6, 6)) for _ in range(3)]

    def rows(scale):
        numbers = st.integers(0, 100)
        return [
            np.array(draw(st.lists(numbers, min_size=n, max_size=n)), dtype=float) * scale
            for n in sizes
        ]

    value, one, two = (rows(scale) for scale in scales)
    limits = [draw(st.integers(0, 100 * len(sizes))) + 0.5 for _ in range(2)]
    return value, [(one, limits[0] * scales[1]), (two, limits[1] * scales[2])]


def total(rows, chosen):
    return sum(float(row[i]) for row, i in zip(rows, chosen, strict=True))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_equals_brute_force(problem):
    value, budgets = problem
    everything = itertools.product(*(range(len(row)) for row in value))
    best = min((total(value, c) for c in everything if keeps(c, budgets)), default=None)
    found = solve_within(value, budgets)
    assert (found is None) == (best is None)
    if found is not None:
        assert keeps(found, budgets)
        assert total(value, found) <= best + 1e-3 * sum(float(row.max()) for row in value)


def test_a_limit_that_is_just_reached_is_kept():
    cost = [np.array([0.1, 0.3]), np.array([0.2, 0.7])]
    value = [np.array([1.0, 0.0]), np.array([2.0, 0.0])]
    assert solve_within(value, [(cost, 0.1 + 0.7)]) == [0, 1]
    assert solve_within(value, [(cost, 0.1 + 0.2)]) == [0, 0]
    assert solve_within(value, [(cost, 0.29)]) is None


def test_without_a_limit_the_best_of_each_site_wins():
    value = [np.array([3.0, 1.0]), np.array([2.0, 5.0])]
    assert solve_within(value, []) == [1, 0]
    assert solve_within(value, [(value, float("inf"))]) == [1, 0]


def test_the_answer_repeats():
    rng = np.random.default_rng(0)
    value, one, two = ([rng.random(6) for _ in range(40)] for _ in range(3))
    budgets = [(one, 15.0), (two, 15.0)]
    found = solve_within(value, budgets)
    assert found is not None
    assert solve_within(value, budgets) == found


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 2), min_size=1, max_size=8))
def test_undominated(columns):
    table = np.array(columns, dtype=float).T
    kept = undominated(table)
    assert len({columns[i] for i in kept}) == len(kept)
    for j, column in enumerate(columns):
        rivals = [columns[i] for i in kept if i != j]
        beaten = any(all(a <= b for a, b in zip(r, column, strict=True)) for r in rivals)
        assert beaten or j in kept


def test_nothing_is_printed(capfd):
    """What comes from C, buffered or not, must not end up in the JSON of a search."""
    libc = ctypes.CDLL(None)
    os.write(1, b"before\n")
    libc.puts(b"buffered before")
    with silent_output():
        os.write(1, b"raw\n")
        libc.puts(b"buffered")
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "before\nbuffered before\nafter\n"


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_a_budget_of_nothing(limit):
    cost = [np.array([0.0, 1.0])]
    found = solve_within([np.array([1.0, 0.0])], [(cost, limit)])
    assert found == ([0] if limit == 0 else None)
