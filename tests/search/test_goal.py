"""One objective and its constraints, whatever the user asked for."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from autoquant.search.goal import Goal, Measurement

FLOAT_SIZE = 100_000

measurements = st.builds(
    Measurement,
    value=st.floats(-10, 10),
    drop=st.floats(-1, 1),
    loss=st.floats(0, 1e6),
    average_weight_bits=st.floats(2, 16),
    size_bytes=st.integers(1, FLOAT_SIZE),
    seconds=st.just(0.0),
)
goals = st.builds(
    Goal,
    max_drop=st.floats(0, 1),
    float_size_bytes=st.just(FLOAT_SIZE),
    bits=st.none() | st.floats(2, 16),
    size_bytes=st.none() | st.integers(1, FLOAT_SIZE),
)


@given(goals, measurements)
def test_feasible_is_what_was_asked_for(goal, m):
    if goal.budgeted:
        asked = (goal.bits is None or m.average_weight_bits <= goal.bits + 1e-9) and (
            goal.size_bytes is None or m.size_bytes <= goal.size_bytes
        )
    else:
        asked = m.drop - goal.max_drop <= 1e-9
    assert goal.feasible(m) == asked
    assert goal.feasible(m) == all(v <= 1e-9 for v in goal.constraints(m).values())


@given(goals, measurements, measurements)
def test_the_objective_orders_by_size_or_by_drop(goal, a, b):
    def score(m):
        return m.drop if goal.budgeted else m.size_bytes / FLOAT_SIZE

    if score(a) + 2e-6 < score(b):
        assert goal.objective(a) < goal.objective(b)


@given(goals, measurements, st.floats(0, 1e3))
def test_of_equals_the_one_of_less_loss_wins(goal, m, loss):
    other = replace(m, loss=loss)
    if m.loss + 1e-3 * (1 + m.loss) ** 2 < loss:
        assert goal.objective(m) < goal.objective(other)
    assert abs(goal.objective(m) - goal.objective(other)) <= 2e-6


def test_each_goal_has_its_constraints():
    m = Measurement(0.9, 0.03, 0.1, 5.5, 60_000, 0.0)
    assert Goal(0.01, FLOAT_SIZE).constraints(m) == {"drop": 0.03 - 0.01}
    assert Goal(0.01, FLOAT_SIZE, bits=5.0).constraints(m) == {"bits": 0.5}
    assert Goal(0.01, FLOAT_SIZE, size_bytes=50_000).constraints(m) == {"size": 10_000.0}
    both = Goal(0.01, FLOAT_SIZE, bits=6.0, size_bytes=50_000)
    assert both.constraints(m) == {"bits": -0.5, "size": 10_000.0}


def test_an_average_may_be_off_by_rounding():
    thirds = Measurement(0.9, 0.0, 0.1, (4 + 4 + 8) / 3 + 1e-15, 1, 0.0)
    assert Goal(0.0, 1, bits=16 / 3).feasible(thirds)
