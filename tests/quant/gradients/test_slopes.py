"""Slopes along directions against closed forms, and intervals that cover the truth as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.quant.gradients.slopes import directional_check, loss_slope

SETTINGS = settings(deadline=None, max_examples=60)


def quadratic(n: int, seed: int):
    """Return a loss of n weights, a point, and the gradient there."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(n, n))
    hessian, linear, at = root @ root.T / n, rng.normal(size=n), rng.normal(size=n)

    def loss(w):
        return 0.5 * w @ hessian @ w + linear @ w

    return loss, at, hessian @ at + linear


def slopes_along(loss, at, directions, steps=(0.1, 0.3, 1.0)):
    return np.array([loss_slope(lambda t, d=d: loss(at + t * d), steps).value for d in directions])


def test_of_a_quadratic_the_slope_and_the_correlation_are_one():
    loss, at, gradient = quadratic(20, 1)
    directions = np.random.default_rng(2).normal(size=(30, 20))
    true = slopes_along(loss, at, directions)
    np.testing.assert_allclose(true, directions @ gradient, rtol=1e-9)
    for resamples in (0, 500):
        found = directional_check(directions @ gradient, true, resamples=resamples)
        numbers = (found.slope, found.slope_low, found.slope_high)
        assert numbers == pytest.approx((1.0, 1.0, 1.0), abs=1e-9)
        numbers = (found.correlation, found.correlation_low, found.correlation_high)
        assert numbers == pytest.approx((1.0, 1.0, 1.0), abs=1e-9)
        assert (found.directions, found.confidence) == (30, 0.95)


def test_an_estimate_that_is_too_long_has_the_slope_that_corrects_it():
    loss, at, gradient = quadratic(20, 3)
    directions = np.random.default_rng(4).normal(size=(30, 20))
    true = slopes_along(loss, at, directions)
    for factor in (2.0, 0.25, -1.0):
        found = directional_check(directions @ (factor * gradient), true)
        assert found.slope == pytest.approx(1 / factor)
        assert found.correlation == pytest.approx(math.copysign(1.0, factor))


def test_over_normal_directions_they_are_projection_and_cosine():
    rng = np.random.default_rng(5)
    gradient, off = rng.normal(size=(2, 50))
    estimate = gradient + 0.7 * off
    directions = rng.normal(size=(20_000, 50))
    found = directional_check(directions @ estimate, directions @ gradient)
    slope = estimate @ gradient / (estimate @ estimate)
    cosine = estimate @ gradient / np.linalg.norm(estimate) / np.linalg.norm(gradient)
    assert found.slope == pytest.approx(slope, abs=0.02)
    assert found.correlation == pytest.approx(cosine, abs=0.02)
    assert found.slope_low <= slope <= found.slope_high
    assert found.correlation_low <= cosine <= found.correlation_high


def covered(resamples: int, repeats: int, k: int, confidence: float) -> tuple[float, float]:
    """Return how often the intervals of slope and correlation hold the truth."""
    rng = np.random.default_rng(6)
    slope, noise = 0.8, 0.6
    correlation = slope / math.hypot(slope, noise)
    hits = np.zeros(2)
    for i in range(repeats):
        x = rng.normal(size=k)
        y = slope * x + noise * rng.normal(size=k)
        found = directional_check(x, y, confidence=confidence, resamples=resamples, seed=i)
        hits += (
            found.slope_low <= slope <= found.slope_high,
            found.correlation_low <= correlation <= found.correlation_high,
        )
    return tuple(hits / repeats)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_students_intervals_cover_the_truth_as_often_as_they_say(confidence):
    repeats = 4000
    slope, correlation = covered(0, repeats, 12, confidence)
    error = math.sqrt(confidence * (1 - confidence) / repeats)
    assert abs(slope - confidence) < 4 * error  # exact
    assert abs(correlation - confidence) < 4 * error + 0.01  # Fisher's is an approximation


def test_bootstrapped_intervals_cover_the_truth_about_as_often():
    repeats = 600
    slope, correlation = covered(400, repeats, 40, 0.95)
    error = math.sqrt(0.95 * 0.05 / repeats)
    assert abs(slope - 0.95) < 4 * error + 0.02
    assert abs(correlation - 0.95) < 4 * error + 0.02


def test_of_no_use_is_no_correlation():
    rng = np.random.default_rng(7)
    misses = 0
    for _ in range(500):
        found = directional_check(rng.normal(size=15), rng.normal(size=15))
        misses += not found.correlation_low <= 0 <= found.correlation_high
    assert 500 * 0.05 - 4 * math.sqrt(500 * 0.05 * 0.95) < misses
    assert misses < 500 * 0.05 + 4 * math.sqrt(500 * 0.05 * 0.95)


@SETTINGS
@given(st.integers(0, 2**31), st.floats(-300, 150), st.floats(-150, 150), st.sampled_from([0, 100]))
def test_units_change_the_slope_and_nothing_else(seed, power, other, resamples):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=9)
    y = 0.5 * x + rng.normal(size=9)
    a, b = 2.0 ** round(power), 2.0 ** round(other)
    once = directional_check(x, y, resamples=resamples)
    scaled = directional_check(a * x, b * y, resamples=resamples)
    assert scaled.slope == pytest.approx(once.slope * b / a)
    assert scaled.slope_high == pytest.approx(once.slope_high * b / a)
    assert scaled.correlation == pytest.approx(once.correlation)
    assert scaled.correlation_low == pytest.approx(once.correlation_low)
    assert once.slope_low <= once.slope <= once.slope_high or resamples
    turned = directional_check(-x, -y, resamples=resamples)  # a direction has no sense
    assert turned.slope == pytest.approx(once.slope)


def test_what_few_or_constant_slopes_do_not_say_is_nan():
    single = directional_check([2.0], [1.0])
    assert single.slope == 0.5
    assert math.isnan(single.slope_low)
    assert math.isnan(single.correlation_high)
    assert math.isnan(directional_check([2.0], [1.0], resamples=50).slope_low)
    nothing = directional_check([0.0, 0.0, 0.0], [1.0, 2.0, 3.0])
    assert math.isnan(nothing.slope)
    assert math.isnan(nothing.slope_high)
    assert math.isnan(nothing.correlation)
    flat = directional_check([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert flat.slope == 0.0
    assert math.isnan(flat.correlation)
    lost = directional_check([1.0, math.nan, 3.0], [1.0, 2.0, 3.0])
    assert math.isnan(lost.slope)
    assert math.isnan(lost.slope_low)
    lost = directional_check([1.0, math.nan, 3.0], [1.0, 2.0, 3.0], resamples=50)
    assert math.isnan(lost.slope)
    for pair in (([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]])):
        with pytest.raises(ValueError, match="are not pairs"):
            directional_check(*pair)


def test_the_same_seed_gives_the_same_bootstrap():
    rng = np.random.default_rng(8)
    x, y = rng.normal(size=(2, 20))
    first = directional_check(x, y, resamples=100, seed=1)
    assert directional_check(x, y, resamples=100, seed=1) == first
    assert directional_check(x, y, resamples=100, seed=2) != first


def test_even_powers_cancel_and_odd_ones_show_in_the_spread():
    even = loss_slope(lambda t: 3 + 2 * t + 5 * t**2 - t**4, [0.5, 1.0, 2.0])
    assert even.value == pytest.approx(2.0)
    assert even.spread == pytest.approx(0.0, abs=1e-12)
    cubic = loss_slope(lambda t: 2 * t + 0.1 * t**3, [1.0, 2.0])
    assert cubic.differences == pytest.approx((2.1, 2.4))
    assert cubic.value == pytest.approx((2.1 + 4 * 2.4) / 5)
    assert cubic.spread == pytest.approx(0.3)
    tiny = loss_slope(lambda t: 7 * t, [1e-200, 2e-200])
    assert tiny.value == pytest.approx(7.0)


def test_of_a_staircase_the_slope_is_that_of_what_it_follows():
    """A step that crosses no jump sees none; longer ones see the slope behind them."""

    def loss(t: float) -> float:
        return 4 * round(t / 0.01 + 0.3) * 0.01

    assert loss_slope(loss, [0.001]).value == 0.0
    assert loss_slope(loss, [0.2, 0.3, 0.5]).value == pytest.approx(4.0, rel=0.03)


@pytest.mark.parametrize("steps", [[], [0.0], [0.1, -0.1], [math.nan]])
def test_steps_are_positive(steps):
    with pytest.raises(ValueError, match="are to be > 0"):
        loss_slope(lambda t: t, steps)
