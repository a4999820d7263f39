import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoquant.selection.drop_curve import DropCurve, fit_drops


@pytest.mark.parametrize("power", [0.5, 1.0, 1.4])
def test_a_noisy_power_law_is_found_again(power):
    rng = np.random.default_rng(0)
    losses = 10 ** rng.uniform(-3, 0, 60)
    drops = 0.3 * losses**power + rng.normal(0, 0.005, 60)
    curve = fit_drops(losses, drops)
    for loss in (0.02, 0.1, 0.5):
        assert curve.drops([loss])[0] == pytest.approx(0.3 * loss**power, rel=0.3)
    assert curve.loss_at(0.3 * 0.1**power) == pytest.approx(0.1, rel=0.4)


def test_outliers_do_not_bend_the_curve():
    losses = np.geomspace(0.001, 1, 40)
    drops = 0.2 * losses
    drops[5], drops[9] = 0.5, -0.4
    assert fit_drops(losses, drops).drops([0.1])[0] == pytest.approx(0.02, rel=0.2)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(-1, 1)), max_size=30))
def test_the_curve_never_falls_and_is_finite(rows):
    curve = fit_drops([r[0] for r in rows], [r[1] for r in rows])
    values = curve.drops(np.linspace(0, 10, 20))
    assert np.isfinite(values).all()
    assert (np.diff(values) >= 0).all()


def test_drops_that_are_mostly_one_number_are_noisy_too():
    """Of 400 samples an accuracy is a multiple of a 400th: many recipes have the very same one."""
    losses = np.geomspace(0.01, 0.02, 20)
    drops = np.array([0.0115] * 7 + [0.0069, 0.0138, 0.0046] + [0.0115] * 10)
    assert 0.0 < fit_drops(losses, drops).noise < 0.005
    rng = np.random.default_rng(0)
    rounded = np.round((0.0115 + rng.normal(0, 0.004, 200)) * 100) / 100
    noise = fit_drops(np.geomspace(0.01, 0.0101, 200), rounded).noise
    assert noise == pytest.approx(0.004, rel=0.9)


def test_an_error_is_of_what_the_curve_tells():
    curve = DropCurve(1.0, 1.0, 0.01)
    assert curve.errors([0.0])[0] == pytest.approx(0.01)
    assert curve.errors([10.0])[0] == pytest.approx(3.0, rel=0.01)


def test_without_a_drop_there_is_no_limit():
    assert fit_drops([], []).loss_at(0.01) == float("inf")
    assert fit_drops([0.1, 0.2, 0.3], [-0.1, -0.2, -0.1]).loss_at(0.01) == float("inf")
    assert DropCurve(2.0, 1.0).loss_at(0.5) == 0.25
