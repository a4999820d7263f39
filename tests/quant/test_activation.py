"""Quantized activations of which a gradient is wanted: the same numbers, and its slope."""

import pytest
import torch

from autoquant.kernels.engine import make_engine
from autoquant.quant.activation import fake_quantize_activation, wants_gradient
from autoquant.spec.recipe import ActivationScheme

STATIC = ActivationScheme(4, scale=0.25, zero_point=-3)
TOKENS = ActivationScheme(4, "per_token")
X = torch.linspace(-4, 6, 41).reshape(1, 41)


@pytest.mark.parametrize("scheme", [STATIC, TOKENS], ids=["static", "per_token"])
@pytest.mark.parametrize("engine", [None, make_engine(torch.device("cpu"))], ids=["plain", "fast"])
def test_a_wanted_gradient_changes_no_number(scheme, engine):
    compute = fake_quantize_activation if engine is None else engine.fake_quantize
    y = compute(X, scheme, "linear")
    x = X.clone().requires_grad_()
    again = compute(x, scheme, "linear")
    assert torch.equal(y, again)
    again.backward(torch.arange(41.0)[None])
    ends = (-8.5 + 3) * 0.25, (7.5 + 3) * 0.25
    inside = (ends[0] <= X) & (ends[1] >= X) if scheme is STATIC else torch.ones_like(X).bool()
    assert torch.equal(x.grad, torch.arange(41.0)[None] * inside)


def test_the_gradient_is_that_of_torchs_own_fake_quantization():
    grid = torch.linspace(-4, 6, 1001).requires_grad_()
    ours = fake_quantize_activation(grid, STATIC, "linear")
    (found,) = torch.autograd.grad(ours.sum(), grid)
    theirs = torch.fake_quantize_per_tensor_affine(grid, 0.25, -3, -8, 7)
    (expected,) = torch.autograd.grad(theirs.sum(), grid)
    assert torch.equal(ours, theirs)
    assert (found != expected).sum() <= 2  # the very ends


def test_infinite_numbers_stay_at_the_ends_of_the_grid():
    x = torch.tensor([float("inf"), float("-inf"), 0.3]).requires_grad_()
    y = fake_quantize_activation(x, STATIC, "linear")
    assert torch.equal(y, fake_quantize_activation(x.detach(), STATIC, "linear"))
    assert y.isfinite().all()


def test_gradients_are_wanted_only_where_torch_records_them():
    x = torch.zeros(2, requires_grad=True)
    assert wants_gradient(torch.zeros(1), x)
    assert not wants_gradient(torch.zeros(1))
    with torch.no_grad():
        assert not wants_gradient(x)
