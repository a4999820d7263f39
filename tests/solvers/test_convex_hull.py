import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from autoquant.solvers.convex_hull import cheapest, solve


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


@st.composite
def convex(draw):
    """Alike costs and damages that fall ever less: the more bits, the less another one helps."""
    steps = st.lists(st.floats(0.01, 10), min_size=1, max_size=4)
    damage = []
    for _ in range(draw(st.integers(1, 5))):
        gains = sorted(draw(steps), reverse=True)
        damage.append(np.array([sum(gains[k:]) for k in range(len(gains) + 1)]))
    order = draw(st.randoms(use_true_random=False))
    shuffled = [order.sample(range(len(d)), len(d)) for d in damage]
    cost = [np.array(s, dtype=float) for s in shuffled]
    return [d[s] for d, s in zip(damage, shuffled, strict=True)], cost


@given(convex(), st.integers(0, 20))
@settings(max_examples=150)
def test_convex_problems_of_equal_steps_are_solved_exactly(problem, budget):
    damage, cost = problem
    best = min(total(damage, c) for c in everything(cost) if total(cost, c) <= budget)
    chosen = solve(damage, cost, float(budget))
    assert total(cost, chosen) <= budget
    assert abs(total(damage, chosen) - best) < 1e-9


@given(convex(), st.floats(0, 60))
@settings(max_examples=150)
def test_the_least_cost_of_convex_problems_is_exact_but_for_one_step(problem, limit):
    damage, cost = problem
    chosen = cheapest(damage, cost, limit)
    fits = [total(cost, c) for c in everything(cost) if total(damage, c) <= limit + 1e-12]
    assert min(fits) <= total(cost, chosen) + 1e-9
    assert total(cost, chosen) <= min(fits) + max(float(c.max()) for c in cost)


def test_no_more_is_lost_than_one_site_can_make():
    """Against the relaxed problem, which no choice can beat."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        damage = [rng.random(6) for _ in range(20)]
        cost = [rng.random(6) for _ in range(20)]
        budget = float(rng.uniform(3, 14))
        chosen = solve(damage, cost, budget)
        if chosen is None:
            continue
        relaxed, largest = lower_bound(damage, cost, budget)
        assert relaxed - 1e-9 <= total(damage, chosen) <= relaxed + largest + 1e-9


def lower_bound(damage, cost, budget):
    """Return the optimum of the linear relaxation, and the most that one site can change."""
    sizes = [len(d) for d in damage]
    ones = np.zeros((len(sizes), sum(sizes)))
    for row, (start, size) in enumerate(zip(np.cumsum([0, *sizes]), sizes, strict=False)):
        ones[row, start : start + size] = 1
    found = linprog(
        np.concatenate(damage), np.concatenate(cost)[None], [budget], ones, np.ones(len(sizes))
    )
    assert found.success
    return found.fun, max(float(d.max() - d.min()) for d in damage)


def test_one_option_equal_options_and_no_site():
    one = np.array([1.0])
    assert solve([one], [one], 1.0) == [0]
    assert solve([one], [one], 0.5) is None
    assert solve([], [], 0.0) == []
    assert cheapest([], [], 0.0) == []
    same = np.array([2.0, 1.0, 1.0])
    assert solve([same], [np.ones(3)], 1.0) in ([1], [2])
    # A dearer option that does more damage is never taken.
    assert solve([np.array([1.0, 2.0])], [np.array([1.0, 5.0])], 99.0) == [0]
