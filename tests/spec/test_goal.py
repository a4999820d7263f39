"""One objective and its constraints, whatever the user asked for."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoquant.spec.costs import OBJECTIVES, Costs
from autoquant.spec.goal import Goal, Measurement

FLOAT_SIZE = 100_000

measurements = st.builds(
    Measurement,
    value=st.floats(-10, 10),
    drop=st.floats(-1, 1),
    loss=st.floats(0, 1e6),
    average_weight_bits=st.floats(2, 16),
    size_bytes=st.integers(1, FLOAT_SIZE),
    seconds=st.just(0.0),
    latency=st.floats(1e-6, 10),
    bit_operations=st.floats(0, 1e12),
)
goals = st.builds(
    Goal,
    max_drop=st.floats(0, 1),
    float_size_bytes=st.just(FLOAT_SIZE),
    bits=st.none() | st.floats(2, 16),
    size_bytes=st.none() | st.integers(1, FLOAT_SIZE),
    latency=st.none() | st.floats(1e-6, 10),
    minimize=st.none() | st.sampled_from(OBJECTIVES),
    float_latency=st.just(10.0),
    float_bit_operations=st.just(1e12),
)


@given(goals, measurements)
def test_feasible_is_what_was_asked_for(goal, m):
    asked = (
        (goal.bits is None or m.average_weight_bits <= goal.bits + 1e-9)
        and (goal.size_bytes is None or m.size_bytes <= goal.size_bytes)
        and (goal.latency is None or m.latency <= goal.latency * (1 + 1e-9))
    )
    costs = Costs(m.average_weight_bits, m.size_bytes, m.latency, m.bit_operations)
    assert goal.affords(costs) == asked
    if not goal.budgeted:
        asked = asked and m.drop - goal.max_drop <= 1e-9
    assert goal.feasible(m) == asked
    assert goal.feasible(m) == all(v <= 1e-9 for v in goal.constraints(m).values())


def share(goal, m):
    shares = {
        "size": m.size_bytes / FLOAT_SIZE,
        "bits": m.average_weight_bits / 16,
        "latency": m.latency / 10,
        "bitops": m.bit_operations / 1e12,
    }
    return shares[goal.minimize or "size"]


@given(goals, measurements, measurements)
def test_the_objective_orders_by_cost_or_by_loss(goal, a, b):
    def score(m):
        return m.loss if goal.budgeted else share(goal, m)

    if score(a) + 2e-6 < score(b):
        assert goal.objective(a) < goal.objective(b)


@given(goals)
def test_a_budget_is_a_limit_where_something_else_is_made_small(goal):
    assert goal.budgeted == (
        goal.minimize is None and (goal.bits is not None or goal.size_bytes is not None)
    )
    assert goal.cost in OBJECTIVES


@given(goals, measurements, st.floats(0, 1e3))
def test_of_equals_the_one_of_less_loss_wins(goal, m, loss):
    other = replace(m, loss=loss)
    if m.loss + 1e-3 * (1 + m.loss) ** 2 < loss:
        assert goal.objective(m) < goal.objective(other)
    if not goal.budgeted:
        assert abs(goal.objective(m) - goal.objective(other)) <= 2e-6


def test_each_goal_has_its_constraints():
    m = Measurement(0.9, 0.03, 0.1, 5.5, 60_000, 0.0)
    assert Goal(0.01, FLOAT_SIZE).constraints(m) == {"drop": 0.03 - 0.01}
    assert Goal(0.01, FLOAT_SIZE, bits=5.0).constraints(m) == {"bits": 0.5}
    assert Goal(0.01, FLOAT_SIZE, size_bytes=50_000).constraints(m) == {"size": 10_000.0}
    both = Goal(0.01, FLOAT_SIZE, bits=6.0, size_bytes=50_000)
    assert both.constraints(m) == {"bits": -0.5, "size": 10_000.0}


def test_a_limit_on_latency_is_relative():
    m = Measurement(0.9, 0.03, 0.1, 5.5, 60_000, 0.0, latency=0.03)
    goal = Goal(0.01, FLOAT_SIZE, latency=0.02)
    assert goal.constraints(m) == {"drop": 0.03 - 0.01, "latency": pytest.approx(0.5)}
    budget = Goal(0.01, FLOAT_SIZE, bits=5.0, latency=0.02)
    assert budget.constraints(m) == {"bits": 0.5, "latency": pytest.approx(0.5)}


def test_what_nobody_asked_for_is_not_kept():
    m = Measurement(0.9, 0.03, 0.1, 5.5, 60_000, 0.0)
    assert not {"latency", "bit_operations"} & set(m.plain())
    asked = replace(m, latency=0.5, bit_operations=3.0)
    assert asked.plain() == m.plain() | {"latency": 0.5, "bit_operations": 3.0}


def test_an_average_may_be_off_by_rounding():
    thirds = Measurement(0.9, 0.0, 0.1, (4 + 4 + 8) / 3 + 1e-15, 1, 0.0)
    assert Goal(0.0, 1, bits=16 / 3).feasible(thirds)
