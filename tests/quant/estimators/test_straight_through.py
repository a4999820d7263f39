"""Straight through: the identity, and the scale's gradient of all that rounding and clipping do."""

import torch

from autoquant.quant.estimators.straight_through import StraightThrough

R = torch.tensor([-1e4, -8.6, -2.5, 0.3, 7.4, 7.6, 20.0])
Q = R.clamp(-8, 7).round()


def test_the_gradient_passes_everywhere():
    g = torch.arange(7.0) - 3
    assert torch.equal(StraightThrough().position(g, R, Q, -8, 7), g)


def test_the_scale_learns_from_the_whole_error_of_every_number():
    g = torch.linspace(-1, 2, 7)
    found = StraightThrough().step(g, R, Q, -8, 7, g)
    torch.testing.assert_close(found, g * (Q - R))
