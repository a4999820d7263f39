"""ReSTE against autograd on its staircase of power functions, and the paper's slope of one step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoquant.quant.estimators.reste import ReSTE

OPTIONS = [(1.0, 0.1), (1.5, 0.05), (3.0, 0.1), (3.0, 1.0), (10.0, 0.001)]


def staircase(r: torch.Tensor, power: float, bound: float, lo: int, hi: int) -> torch.Tensor:
    """Return, in each cell, middle + ½ sign(x) |x|^(1/o), a straight line for |x| up to m."""
    inside = r.clamp(lo, hi)
    middle = inside.detach().floor().clamp(max=hi - 1) + 0.5
    x = 2 * (inside - middle)
    curved = x.sign() * x.abs().clamp(min=bound) ** (1 / power)
    straight = x * bound ** (1 / power) / bound
    return middle + torch.where(x.abs() <= bound, straight, curved) / 2


@pytest.mark.parametrize(("power", "bound"), OPTIONS)
@pytest.mark.parametrize(("lo", "hi"), [(-8, 7), (0, 3), (-2, 1)])
def test_both_gradients_are_those_of_the_staircase(power, bound, lo, hi):
    x = torch.linspace(-12.01, 12.02, 803, dtype=torch.float64).requires_grad_()
    log_scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    r = x / log_scale.exp()
    soft = staircase(r, power, bound, lo, hi)
    g = torch.linspace(-1, 2, 803, dtype=torch.float64)
    by_x, by_scale = torch.autograd.grad((g * soft * log_scale.exp()).sum(), (x, log_scale))
    position = r.detach().float()
    passed = ReSTE(power, bound).position(
        g.float(), position, position.clamp(lo, hi).round(), lo, hi
    )
    torch.testing.assert_close(passed, by_x.float(), rtol=1e-3, atol=1e-4)
    step = ReSTE(power, bound).step(
        g.float(), position, soft.detach().float(), lo, hi, by_x.float()
    )
    scale = log_scale.detach().exp()
    torch.testing.assert_close(step.double().sum() * scale, by_scale, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("power", "bound"), OPTIONS)
def test_one_step_is_the_papers_binary_estimator(power, bound):
    x = torch.linspace(-0.999, 0.999, 402)
    slope = (1 / power) * x.abs() ** ((1 - power) / power)
    slope[x.abs() <= bound] = bound ** (1 / power) / bound
    r = x / 2 + 0.5  # −1 and 1 of the paper are the points 0 and 1
    found = ReSTE(power, bound).position(torch.ones(402), r, r.round(), 0, 1)
    near_bound = (x.abs() - bound).abs() < 1e-5
    torch.testing.assert_close(found[~near_bound], slope[~near_bound], rtol=1e-3, atol=1e-5)


@given(st.floats(1, 10), st.floats(0.01, 1), st.integers(-8, 6))
def test_the_mean_over_a_cell_is_one_and_the_slope_is_bounded(power, bound, cell):
    count = 20000
    r = cell + (torch.arange(count) + 0.5) / count
    slope = ReSTE(power, bound).position(torch.ones(count), r, r.round(), -8, 7)
    assert float(slope.double().mean()) == pytest.approx(1, rel=3e-3)
    assert float(slope.max()) <= bound ** (1 / power - 1) * 1.001


@given(st.floats(1, 10), st.floats(0.001, 1), st.floats(0.001, 1e4))
def test_nothing_passes_beyond_the_ends(power, bound, beyond):
    r = torch.tensor([-8 - beyond, 7 + beyond])
    found = ReSTE(power, bound).position(torch.ones(2), r, r.clamp(-8, 7), -8, 7)
    assert found.eq(0).all()


@given(st.floats(0.001, 1), st.lists(st.floats(-8, 7, width=32), min_size=1))
def test_a_power_of_one_is_straight_through(bound, numbers):
    r = torch.tensor(numbers)
    found = ReSTE(1.0, bound).position(torch.ones(len(r)), r, r.round(), -8, 7)
    assert found.eq(1).all()
