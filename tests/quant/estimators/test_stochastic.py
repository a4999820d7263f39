"""Stochastic rounding: right on average, on the grid always, and with the gradient of its mean."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoquant.quant.estimators.stochastic import Stochastic

DRAWS = 20_000


def rounded(r: torch.Tensor, seed: int) -> torch.Tensor:
    """Return what DRAWS times each number of ``r``, clipped to −8 … 7, becomes."""
    generator = torch.Generator().manual_seed(seed)
    many = r.clamp(-8, 7).expand(DRAWS, len(r)).clone()
    return Stochastic().round(many, generator)


R = torch.tensor([-8.4, -8.0, -7.75, -2.5, -0.01, 0.0, 0.3, 0.5, 3.999, 6.9, 7.0, 7.3])


def test_it_is_right_on_average_within_the_grid():
    q = rounded(R, 0)
    expected = R.clamp(-8, 7)
    share = expected - expected.floor()
    deviation = (share * (1 - share) / DRAWS).sqrt()  # of the mean of draws that are 0 or 1
    assert ((q.mean(0) - expected).abs() <= 4.5 * deviation + 1e-5).all()
    assert torch.equal(q, q.round())
    assert ((q - expected).abs() < 1).all()


def test_the_gradient_is_that_of_the_mean():
    """E[q] by r with a width of 0.1, from draws of one seed on both sides, so that few differ."""
    width, points = 0.1, R[(R.frac().abs() > 0.06) | (R == 0)]
    points = points[(points + 8).abs().gt(width) & (points - 7).abs().gt(width)]
    means = [rounded(points + d, 1).double().mean(0) for d in (width / 2, -width / 2)]
    slope = (means[0] - means[1]) / width
    found = Stochastic().position(torch.ones(len(points)), points, points.round(), -8, 7)
    # Draws differ with a probability of the width: its deviation, over the width.
    deviation = math.sqrt(width * (1 - width) / DRAWS) / width
    assert ((slope - found).abs() <= 4.5 * deviation).all()
    assert set(found.tolist()) == {0.0, 1.0}


@given(st.lists(st.floats(-8, 7, width=32), min_size=1), st.integers(0, 2**31))
def test_it_never_leaves_the_grid_and_points_stay(numbers, seed):
    r = torch.tensor([*numbers, *range(-8, 8)])
    q = Stochastic().round(r.clone(), torch.Generator().manual_seed(seed))
    assert q.min() >= -8
    assert q.max() <= 7
    assert torch.equal(q, q.round())
    assert ((q - r).abs() < 1).all()
    assert q[-16:].tolist() == list(range(-8, 8))


def test_the_highest_draw_does_not_lift_the_highest_point():
    r = torch.full((4,), 127.0)
    drawn = torch.full((4,), 1 - 2.0**-24)
    assert (r + drawn).floor()[0] == 128
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *_, **__: drawn)
        assert Stochastic().round(r.clone(), torch.Generator()).eq(127).all()


def test_seeds_tell_and_none_is_nearest():
    r = torch.linspace(-8, 7, 500)
    first, again, other = (
        Stochastic().round(r.clone(), torch.Generator().manual_seed(s)) for s in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(Stochastic().round(r.clone(), None), r.round())


def test_draws_do_not_depend_on_how_numbers_lie():
    r = torch.linspace(-8, 7, 600).reshape(20, 30)
    lying = r.T.contiguous().T
    found = [Stochastic().round(x.clone(), torch.Generator().manual_seed(0)) for x in (r, lying)]
    assert torch.equal(*found)


def test_nan_stays():
    r = torch.tensor([float("nan"), 1.5])
    q = Stochastic().round(r, torch.Generator().manual_seed(0))
    assert q.isnan().tolist() == [True, False]
