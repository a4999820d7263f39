import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.search.knapsack import cheapest, solve


@st.composite
def problems(draw):
    sites = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    sizes = rng.integers(1, 5, sites)
    damage = [rng.uniform(0, 10, n) for n in sizes]
    cost = [rng.uniform(1, 10, n) for n in sizes]
    return damage, cost


def total(rows, chosen):
    return sum(float(row[i]) for row, i in zip(rows, chosen, strict=True))


def everything(rows):
    return itertools.product(*(range(len(row)) for row in rows))


@given(problems(), st.floats(0, 60))
@settings(max_examples=150)
def test_a_budget_is_kept_and_the_answer_is_within_one_step_of_the_best(problem, budget):
    damage, cost = problem
    fits = [c for c in everything(cost) if total(cost, c) <= budget]
    chosen = solve(damage, cost, budget)
    if not fits:
        assert chosen is None
        return
    assert chosen is not None
    assert total(cost, chosen) <= budget + 1e-6
    best = min(total(damage, c) for c in fits)
    # The relaxed problem fills at most one step in part: that step is all that can be lost.
    gap = max(float(row.max() - row.min()) for row in damage)
    assert best - 1e-9 <= total(damage, chosen) <= best + gap + 1e-9


@given(problems(), st.floats(0, 60))
@settings(max_examples=150)
def test_a_damage_limit_is_kept_where_it_can_be(problem, limit):
    damage, cost = problem
    chosen = cheapest(damage, cost, limit)
    least = sum(float(row.min()) for row in damage)
    if least > limit:
        assert abs(total(damage, chosen) - least) < 1e-9
        return
    assert total(damage, chosen) <= limit + 1e-9
    best = min(total(cost, c) for c in everything(cost) if total(damage, c) <= limit)
    gap = max(float(row.max() - row.min()) for row in cost)
    assert best - 1e-9 <= total(cost, chosen) <= best + gap + 1e-9


def test_alike_sites_with_convex_damage_are_solved_exactly():
    bits = np.array([8.0, 6.0, 4.0])
    damage = [w * 4.0**-bits for w in (1.0, 10.0, 100.0)]
    chosen = solve(damage, [bits] * 3, 18.0)
    assert [bits[i] for i in chosen] == [4.0, 6.0, 8.0]


def test_scaling_all_damage_changes_nothing():
    rng = np.random.default_rng(0)
    damage, cost = [rng.random(4) for _ in range(9)], [rng.random(4) for _ in range(9)]
    assert solve(damage, cost, 4.0) == solve([1e-9 * d for d in damage], cost, 4.0)
