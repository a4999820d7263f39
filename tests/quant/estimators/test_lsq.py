"""LSQ against finite differences of the function that it differentiates, and its factor."""

import math

import pytest
import torch

from autoquant.quant.estimators.lsq import LSQ
from autoquant.spec.formats import FORMATS

H = 1e-6


def piecewise(x: torch.Tensor, log_scale: float, error: torch.Tensor, lo: int, hi: int):
    """Return scale · (clip(x / scale) + error), in float64.

    That is v = scale · q with the rounding error, in steps, of each number held fixed: between the
    ends its derivative by the scale is q − r, where q itself moves with r = x / scale, as straight
    through has it; beyond them it is the end of the grid.
    """
    scale = torch.tensor(log_scale, dtype=torch.float64).exp()
    return ((x / scale).clamp(lo, hi) + error) * scale


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_point", [0, 1, -2])
def test_the_gradient_of_the_scale_is_that_of_its_piecewise_function(bits, zero_point):
    lo, hi = FORMATS[bits].qmin - zero_point, FORMATS[bits].qmax - zero_point
    log_scale = -1.3
    scale = math.exp(log_scale)
    r = torch.linspace(1.6 * lo - 2, 1.6 * hi + 2, 997, dtype=torch.float64)
    q = r.clamp(lo, hi).round()
    from_tie = ((r - r.floor()) - 0.5).abs()
    away = (from_tie > 1e-3) & ((r - lo).abs() > 1e-3) & ((r - hi).abs() > 1e-3)
    x, error = r * scale, q - r.clamp(lo, hi)
    ends = (piecewise(x, log_scale + d, error, lo, hi) for d in (H, -H))
    expected = torch.sub(*ends) / (2 * H) / scale
    ones = torch.ones(997)
    passed = LSQ().position(ones, r.float(), q.float(), lo, hi)
    found = LSQ().step(ones, r.float(), q.float(), lo, hi, passed)
    torch.testing.assert_close(found[away], expected[away].float(), rtol=1e-4, atol=1e-4)


def test_it_is_the_published_gradient():
    r = torch.tensor([-9.0, -8.0, -2.3, 0.5, 6.6, 7.0, 7.2])
    q = r.clamp(-8, 7).round()
    passed = LSQ().position(torch.ones(7), r, q, -8, 7)
    assert passed.tolist() == [0, 0, 1, 1, 1, 0, 0]
    found = LSQ().step(torch.ones(7), r, q, -8, 7, passed)
    torch.testing.assert_close(found, torch.tensor([-8, -8, 0.3, -0.5, 0.4, 7, 7]))


@pytest.mark.parametrize(
    ("lo", "hi", "most"),
    [(-8, 7, 7), (0, 15, 15), (-128, 127, 127), (-2, 1, 1), (-15, 0, 14), (-13, 2, 12), (-1, 0, 1)],
)
def test_the_factor_is_that_of_the_largest_integer_and_of_how_many_numbers_there_are(lo, hi, most):
    expected = 1 / math.sqrt(50 * most)
    assert float(LSQ().factor(50, lo, hi)) == pytest.approx(expected)
    both = LSQ().factor(50, torch.tensor([[lo], [-8.0]]), torch.tensor([[hi], [7.0]]))
    assert both.shape == (2, 1)
    assert both.flatten().tolist() == pytest.approx([expected, 1 / math.sqrt(350)])


def test_no_numbers_have_a_factor_too():
    assert float(LSQ().factor(0, -8, 7)) == pytest.approx(1 / math.sqrt(7))
