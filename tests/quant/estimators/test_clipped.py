"""The saturated straight-through estimator: all or nothing, at half a step beyond the grid."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoquant.quant.estimators.clipped import Clipped, within

NUMBERS = st.floats(-300, 300, width=32)


@given(st.lists(NUMBERS, min_size=1), st.integers(-255, 0), st.integers(1, 255))
def test_nothing_passes_beyond_half_a_step_and_all_passes_within(numbers, lo, span):
    r, hi = torch.tensor(numbers), lo + span
    g = torch.linspace(-2, 3, len(r))
    found = Clipped().position(g, r, r.clamp(lo, hi).round(), lo, hi)
    inside = torch.tensor([lo - 0.5 <= x <= hi + 0.5 for x in numbers])
    assert torch.equal(found, torch.where(inside, g, 0.0))


def test_it_is_the_gradient_of_torchs_own_fake_quantization():
    x = torch.linspace(-4, 6, 1000).requires_grad_()
    y = torch.fake_quantize_per_tensor_affine(x, 0.25, -3, -8, 7)
    (theirs,) = torch.autograd.grad(y.sum(), x)
    r = x.detach() / 0.25
    ours = Clipped().position(torch.ones(1000), r, r.clamp(-5, 10).round(), -5, 10)
    assert torch.equal(ours, theirs)


def test_what_is_clipped_moves_the_scale_by_its_end_of_the_grid():
    r = torch.tensor([-9.0, 9.0, 1.25])
    q, g = torch.tensor([-8.0, 7.0, 1.0]), torch.tensor([1.0, 2.0, 4.0])
    passed = Clipped().position(g, r, q, -8, 7)
    found = Clipped().step(g, r, q, -8, 7, passed)
    assert found.tolist() == [-8.0, 14.0, -1.0]


@pytest.mark.parametrize("beyond", [0.0, 0.5])
def test_ends_may_be_tensors_and_nan_is_not_within(beyond):
    r = torch.tensor([[0.0, 3.25, 4.0, float("nan")], [0.0, 3.25, 4.0, 1.0]])
    lo, hi = torch.tensor([[-1.0], [0.0]]), torch.tensor([[3.0], [4.0]])
    expected = [[1.0, float(beyond == 0.5), 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    assert within(torch.ones(2, 4), r, lo, hi, beyond).tolist() == expected
