"""DSQ against autograd on the soft staircase itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoquant.quant.estimators.dsq import DSQ

TEMPERATURES = [0.05, 0.25, 0.5, 2.0, 100.0]


def staircase(r: torch.Tensor, temperature: float, lo: int, hi: int) -> torch.Tensor:
    """Return Q_S of the paper in units of a step: a tanh in each cell, constant beyond the ends."""
    k = 1 / temperature
    inside = r.clamp(lo, hi)
    cell = inside.detach().floor().clamp(max=hi - 1)
    s = 1 / torch.tanh(torch.tensor(k / 2, dtype=r.dtype))
    return cell + (s * torch.tanh(k * (inside - cell - 0.5)) + 1) / 2


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("lo", "hi"), [(-8, 7), (0, 3), (-2, 1)])
def test_both_gradients_are_those_of_the_staircase(temperature, lo, hi):
    x = torch.linspace(-12.01, 12.02, 803, dtype=torch.float64).requires_grad_()
    log_scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    r = x / log_scale.exp()
    soft = staircase(r, temperature, lo, hi)
    g = torch.linspace(-1, 2, 803, dtype=torch.float64)
    by_x, by_scale = torch.autograd.grad((g * soft * log_scale.exp()).sum(), (x, log_scale))
    position = r.detach().float()
    q = position.clamp(lo, hi).round()
    passed = DSQ(temperature).position(g.float(), position, q, lo, hi)
    torch.testing.assert_close(passed, by_x.float(), rtol=1e-3, atol=1e-4)
    # The staircase stands for the integers: with its own values the gradients of scales agree.
    step = DSQ(temperature).step(g.float(), position, soft.detach().float(), lo, hi, by_x.float())
    scale = log_scale.detach().exp()
    torch.testing.assert_close(step.double().sum() * scale, by_scale, rtol=1e-3, atol=1e-3)


@given(st.floats(0.02, 100.0), st.integers(-8, 6))
def test_the_mean_over_a_cell_is_one(temperature, cell):
    count = 4000
    r = cell + (torch.arange(count) + 0.5) / count
    slope = DSQ(temperature).position(torch.ones(count), r, r.round(), -8, 7)
    assert float(slope.double().mean()) == pytest.approx(1, rel=1e-3)
    assert (slope >= 0).all()


@given(st.floats(0.02, 100.0), st.floats(0.001, 1e4))
def test_nothing_passes_beyond_the_ends(temperature, beyond):
    r = torch.tensor([-8 - beyond, 7 + beyond])
    assert DSQ(temperature).position(torch.ones(2), r, r.clamp(-8, 7), -8, 7).eq(0).all()


def test_a_hot_staircase_is_a_straight_line_and_a_cold_one_is_steep_between_points():
    r = torch.tensor([0.0, 0.1, 0.25, 0.5])
    hot = DSQ(100.0).position(torch.ones(4), r, r.round(), -8, 7)
    torch.testing.assert_close(hot, torch.ones(4), atol=1e-4, rtol=0)
    cold = DSQ(0.05).position(torch.ones(4), r, r.round(), -8, 7)
    assert cold[0] < 1e-6
    assert float(cold[3]) == pytest.approx(10, rel=1e-3)
