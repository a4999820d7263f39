"""Magnitude-aware differentiation: whole within the grid, less the further out."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoquant.quant.estimators.lsq import LSQ
from autoquant.quant.estimators.magnitude_aware import MagnitudeAware

NUMBERS = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30)


@given(NUMBERS, st.integers(-255, 0), st.integers(0, 255))
def test_it_is_the_published_factor(numbers, lo, hi):
    x = np.array(numbers, np.float32)
    bound = np.where(x < 0, -lo, hi)
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.where(np.abs(x) <= bound, 1.0, bound / np.abs(x))
    r, g = torch.from_numpy(x), torch.linspace(-2, 1, len(x))
    found = MagnitudeAware().position(g, r, r.clamp(lo, hi).round(), lo, hi)
    np.testing.assert_allclose(found, g.numpy() * factor, rtol=1e-5)


def test_it_fades_and_on_a_grid_from_zero_what_is_below_passes_nothing():
    r = torch.tensor([-3.0, -0.1, 0.0, 15.0, 30.0, 150.0, float("inf")])
    found = MagnitudeAware().position(torch.ones(7), r, r.clamp(0, 15), 0, 15)
    torch.testing.assert_close(found, torch.tensor([0, 0, 1, 1, 0.5, 0.1, 0]))


def test_the_scale_learns_as_lsq_has_it():
    r = torch.linspace(-12.3, 11.7, 200)
    q, g = r.clamp(-8, 7).round(), torch.linspace(-1, 1, 200)
    steps = [e.step(g, r, q, -8, 7, e.position(g, r, q, -8, 7)) for e in (MagnitudeAware(), LSQ())]
    torch.testing.assert_close(*steps)
