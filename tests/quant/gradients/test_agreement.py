"""What is said of two gradients, against closed forms and numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.quant.gradients.agreement import (
    Agreement,
    agreement,
    agreements,
    bias_of_draws,
    rate_multiplier,
)
from autoquant.quant.gradients.format import GradientFormat
from tests.quant.gradients.test_grids import seeded

SETTINGS = settings(deadline=None, max_examples=80)
PAIRS = st.lists(
    st.tuples(
        st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
        st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
    ),
    min_size=1,
    max_size=30,
)


def three(estimated: torch.Tensor, reference: torch.Tensor) -> tuple[float, float, float]:
    found = agreement(estimated, reference)
    return found.cosine, found.signs, found.norm_ratio


def test_closed_forms():
    g = torch.tensor([3.0, -4.0, 0.0])
    same = agreement(g, g)
    assert (same.cosine, same.signs, same.norm_ratio) == (1.0, 1.0, 1.0)
    assert math.isnan(same.bias)
    assert math.isnan(same.noise)
    twice = agreement(2 * g, g)
    assert (twice.cosine, twice.signs, twice.norm_ratio) == (1.0, 1.0, 2.0)
    against = agreement(-g, g)
    assert (against.cosine, against.signs, against.norm_ratio) == (-1.0, 0.0, 1.0)
    across = agreement(torch.tensor([4.0, 3.0, 0.0]), g)
    assert across.cosine == 0.0
    assert across.signs == pytest.approx(3 / 7)  # of |3| + |−4| the 3
    assert across.norm_ratio == 1.0


def test_what_the_estimate_has_as_zero_is_not_the_right_sign():
    g = torch.tensor([10.0, 1.0, -1.0])
    assert agreement(torch.tensor([5.0, 0.0, -0.0]), g).signs == pytest.approx(10 / 12)


@SETTINGS
@given(PAIRS)
def test_it_is_what_numpy_computes(pairs):
    e, r = (np.array(v, dtype=np.float64) for v in zip(*pairs, strict=True))
    found = agreement(torch.tensor(e, dtype=torch.float32), torch.tensor(r, dtype=torch.float32))
    if np.any(e) and np.any(r):
        sizes = np.linalg.norm(e) * np.linalg.norm(r)
        assert found.cosine == pytest.approx(e @ r / sizes, rel=1e-9, abs=1e-12)
        assert found.norm_ratio == pytest.approx(np.linalg.norm(e) / np.linalg.norm(r))
        right = np.abs(r)[np.sign(e) == np.sign(r)].sum()
        assert found.signs == pytest.approx(right / np.abs(r).sum())
    assert -1 <= found.cosine <= 1
    assert 0 <= found.signs <= 1
    assert 0.1 <= found.rate <= 1


@SETTINGS
@given(PAIRS, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_lengths_change_the_ratio_of_norms_and_nothing_else(pairs, a, b):
    e, r = (torch.tensor(v, dtype=torch.float64) for v in zip(*pairs, strict=True))
    once, scaled = agreement(e, r), agreement(a * e, b * r)
    assert scaled.cosine == pytest.approx(once.cosine, abs=1e-9)
    assert scaled.signs == pytest.approx(once.signs, abs=1e-9)
    if r.any():
        assert scaled.norm_ratio == pytest.approx(once.norm_ratio * a / b, rel=1e-9)


def test_zeros_and_empty_gradients():
    zero, g = torch.zeros(3), torch.tensor([1.0, -2.0, 0.0])
    assert three(zero, zero) == (1.0, 1.0, 1.0)
    assert three(zero, g) == (0.0, 0.0, 0.0)
    assert three(g, zero) == (0.0, 1.0, math.inf)
    empty = torch.empty(0, 4)
    assert three(empty, empty) == (1.0, 1.0, 1.0)


def test_nan_is_said():
    g = torch.tensor([1.0, -2.0, 3.0])
    broken = torch.tensor([1.0, float("nan"), 3.0])
    for found in (agreement(broken, g), agreement(g, broken)):
        assert all(math.isnan(v) for v in (found.cosine, found.signs, found.norm_ratio, found.rate))
    assert math.isnan(bias_of_draws([broken], g).bias)
    assert math.isnan(agreement(torch.full((3,), float("inf")), g).cosine)


def test_sums_do_not_depend_on_the_unit_of_float32():
    for unit in (1e-38, 1e38):
        g = torch.tensor([1.0, -2.0, 2.0]) * unit
        found = agreement(g, g)
        assert found.cosine == pytest.approx(1.0)
        assert found.norm_ratio == 1.0


def test_the_rate_multiplier_of_ui8():
    assert rate_multiplier(1.0) == 1.0
    assert rate_multiplier(0.95) == pytest.approx(math.exp(-1))
    assert rate_multiplier(0.0) == 0.1
    assert rate_multiplier(-1.0) == 0.1
    where = 1 + math.log(0.1) / 20  # from there on it is the least
    assert rate_multiplier(where + 1e-3) > 0.1
    assert rate_multiplier(where - 1e-3) == 0.1
    assert rate_multiplier(0.9, steepness=1.0, least=0.5) == pytest.approx(math.exp(-0.1))
    assert math.isnan(rate_multiplier(math.nan))
    assert Agreement(0.95, 1.0, 1.0).rate == pytest.approx(math.exp(-1))


def test_bias_and_noise_are_those_of_the_draws():
    rng = np.random.default_rng(0)
    g = rng.normal(size=40)
    draws = g + 0.3 + rng.normal(size=(25, 40))
    found = bias_of_draws((torch.tensor(d) for d in draws), torch.tensor(g))
    size = np.linalg.norm(g)
    assert found.draws == 25
    assert found.bias == pytest.approx(np.linalg.norm(draws.mean(0) - g) / size)
    assert found.noise == pytest.approx(math.sqrt(draws.var(0, ddof=1).sum() / 25) / size)
    assert found.beyond_noise == pytest.approx(math.sqrt(found.bias**2 - found.noise**2))
    single = bias_of_draws([torch.tensor(draws[0])], torch.tensor(g))
    assert single.bias == pytest.approx(np.linalg.norm(draws[0] - g) / size)
    assert math.isnan(single.noise)
    assert math.isnan(single.beyond_noise)
    none = bias_of_draws([], torch.tensor(g))
    assert math.isnan(none.bias)
    assert none.draws == 0


def test_bias_of_a_gradient_that_is_zero():
    zero, one = torch.zeros(2), torch.ones(2)
    assert bias_of_draws([zero, zero], zero).bias == 0.0
    off = bias_of_draws([one, one], zero)
    assert off.bias == math.inf
    assert off.beyond_noise == math.inf


def test_stochastic_gradients_show_no_more_bias_than_noise_and_nearest_ones_do():
    g = torch.randn(2000, generator=seeded(60)) * torch.randn(2000, generator=seeded(61)).exp()
    generator = seeded(62)
    for name in ("int8", "int4", "fp8", "log4"):
        drawn = GradientFormat(name)
        found = agreement(
            drawn.quantize(g, generator), g, (drawn.quantize(g, generator) for _ in range(200))
        )
        # The square of bias over noise is about a mean of 2000 numbers with mean 1, variance ≤ 2
        # for those that are drawn much; few large ones count for most, hence the width.
        assert found.bias == pytest.approx(found.noise, rel=0.25)
        near = GradientFormat(name, "nearest").quantize(g)
        fixed = bias_of_draws([near] * 200, g)
        assert fixed.noise == 0.0
        assert fixed.beyond_noise > 3 * found.noise


def test_every_layer_by_its_name():
    g = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([[1.0, 2.0]])}
    e = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([[2.0, 4.0]])}
    found = agreements(e, g, [e, e])
    assert list(found) == ["a", "b"]
    assert found["a"].cosine == pytest.approx(math.sqrt(0.5))
    assert found["b"].norm_ratio == pytest.approx(2.0)
    assert found["b"].bias == pytest.approx(1.0)
    assert found["b"].noise == 0.0
    with pytest.raises(ValueError, match="different layers are compared: b"):
        agreements({"a": e["a"]}, g)
    with pytest.raises(ValueError, match="different layers are compared: b"):
        agreements(e, g, [{"a": e["a"]}])
    with pytest.raises(ValueError, match=r"\(2,\) and \(1, 2\)"):
        agreement(e["a"], g["b"])
