"""EWGS against its formula in numpy, and against what it must be without a delta."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoquant.quant.estimators.clipped import Clipped
from autoquant.quant.estimators.ewgs import EWGS

NUMBERS = st.lists(
    st.tuples(st.floats(-20, 20, width=32), st.floats(-3, 3, width=32)), min_size=1, max_size=30
)


@given(NUMBERS, st.floats(0, 2))
def test_it_is_the_published_formula_where_numbers_are_not_clipped(pairs, delta):
    x, gradient = (np.array(column, np.float32) for column in zip(*pairs, strict=True))
    rounded = np.round(np.clip(x, -8, 7))
    expected = gradient * (1 + delta * np.sign(gradient) * (x - rounded))
    expected[(x < -8.5) | (x > 7.5)] = 0
    r, g = torch.from_numpy(x), torch.from_numpy(gradient)
    found = EWGS(delta).position(g, r, torch.from_numpy(rounded), -8, 7)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert (found * g >= 0).all()  # no delta on offer turns a gradient round


@given(NUMBERS)
def test_without_a_delta_it_is_the_clipped_estimator(pairs):
    r, g = (torch.tensor(column) for column in zip(*pairs, strict=True))
    q = r.clamp(-8, 7).round()
    passed = Clipped().position(g, r, q, -8, 7)
    assert torch.equal(EWGS(0.0).position(g, r, q, -8, 7), passed)
    same = [e.step(g, r, q, -8, 7, passed) for e in (EWGS(0.0), Clipped())]
    assert torch.equal(*same)


def test_what_has_further_to_go_moves_further():
    r = torch.tensor([1.25, 0.75, 1.25, 0.75])
    g = torch.tensor([1.0, 1.0, -1.0, -1.0])  # descent goes down, down, up, up
    found = EWGS(0.4).position(g, r, torch.ones(4), -8, 7)
    torch.testing.assert_close(found, torch.tensor([1.1, 0.9, -0.9, -1.1]))
