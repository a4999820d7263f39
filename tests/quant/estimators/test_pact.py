"""PACT against the derivatives of the clip that it learns, by finite differences."""

import math

import pytest
import torch

from autoquant.quant.estimators.pact import PACT

H = 1e-6


def clip(x: torch.Tensor, log_scale: float, lo: int, hi: int) -> torch.Tensor:
    """Return x clipped to the ends of the grid and not rounded, in float64: what PACT learns."""
    scale = torch.tensor(log_scale, dtype=torch.float64).exp()
    return (x / scale).clamp(lo, hi) * scale


@pytest.mark.parametrize(("lo", "hi"), [(0, 15), (-8, 7), (-3, 12)])
def test_both_gradients_are_those_of_the_clip_without_rounding(lo, hi):
    x, log_scale = torch.linspace(-7.013, 8.017, 301, dtype=torch.float64), -0.7
    scale = math.exp(log_scale)
    r = (x / scale).float()
    q, g = r.clamp(lo, hi).round(), torch.linspace(-1, 1, 301)
    by_x = (clip(x + H, log_scale, lo, hi) - clip(x - H, log_scale, lo, hi)) / (2 * H)
    passed = PACT().position(g, r, q, lo, hi)
    torch.testing.assert_close(passed, g * by_x.float(), rtol=1e-4, atol=1e-6)
    by_scale = (clip(x, log_scale + H, lo, hi) - clip(x, log_scale - H, lo, hi)) / (2 * H)
    found = PACT().step(g, r, q, lo, hi, passed)
    # Per scale: g is the gradient of integers, not of real numbers.
    torch.testing.assert_close(found, g * (by_scale / scale).float(), rtol=1e-4, atol=1e-6)


def test_the_upper_end_is_clipped_and_the_lower_is_not():
    r = torch.tensor([-1.0, 0.0, 0.5, 15.0, 16.0])
    q, g = r.clamp(0, 15).round(), torch.ones(5)
    passed = PACT().position(g, r, q, 0, 15)
    assert passed.tolist() == [0, 1, 1, 0, 0]
    assert PACT().step(g, r, q, 0, 15, passed).tolist() == [0, 0, 0, 15, 15]
