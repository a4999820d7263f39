import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.quant.affine import (
    TINY,
    QParams,
    choose_qparams,
    dequantize,
    fake_quantize,
    fake_quantize_scalar,
    quantize,
)

BITS = st.integers(2, 8)
NUMBERS = st.lists(st.floats(-1e6, 1e6, width=32, allow_nan=False), min_size=1, max_size=40)


def parameters(x, bits, symmetric):
    return choose_qparams(x.amin(), x.amax(), bits, symmetric=symmetric)


@given(NUMBERS, BITS, st.booleans())
def test_the_error_within_the_range_is_at_most_half_a_step(numbers, bits, symmetric):
    x = torch.tensor(numbers)
    p = parameters(x, bits, symmetric)
    error = (fake_quantize(x, p) - x).abs()
    # An asymmetric zero point is rounded, so an end of the range may miss the grid by half a step.
    assert (error <= p.scale * (0.5 if symmetric else 1.0) * (1 + 1e-4) + 1e-30).all()


@given(NUMBERS, BITS, st.booleans())
def test_grid_points_survive_exactly_and_quantizing_twice_changes_nothing(numbers, bits, symmetric):
    x = torch.tensor(numbers)
    p = parameters(x, bits, symmetric)
    once = fake_quantize(x, p)
    assert torch.equal(fake_quantize(once, p), once)
    grid = torch.arange(p.qmin, p.qmax + 1, dtype=torch.int8)
    assert torch.equal(quantize(dequantize(grid, p), p), grid)


@given(NUMBERS, BITS, st.booleans())
def test_integers_and_the_short_cut_agree(numbers, bits, symmetric):
    x = torch.tensor(numbers)
    p = parameters(x, bits, symmetric)
    expected = dequantize(quantize(x, p), p)
    assert torch.equal(fake_quantize(x, p), expected)
    scalar = fake_quantize_scalar(x, p.scale.item(), int(p.zero_point.item()), bits)
    assert torch.equal(scalar, expected)


@given(NUMBERS, BITS, st.booleans())
@settings(max_examples=60)
def test_it_agrees_with_torch_but_for_ties(numbers, bits, symmetric):
    x = torch.tensor(numbers)
    p = parameters(x, bits, symmetric)
    theirs = torch.fake_quantize_per_tensor_affine(
        x, p.scale, p.zero_point.to(torch.int32), p.qmin, p.qmax
    )
    ours = fake_quantize(x, p)
    position = (x / p.scale).double()
    tie = ((position - position.floor()) - 0.5).abs() < 1e-3
    assert torch.allclose(ours[~tie], theirs[~tie], rtol=1e-6, atol=0)


def test_per_channel_agrees_with_torch():
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    p = choose_qparams(x.amin(1, keepdim=True), x.amax(1, keepdim=True), 4, symmetric=True)
    theirs = torch.fake_quantize_per_channel_affine(
        x, p.scale.flatten(), p.zero_point.flatten().to(torch.int32), 0, p.qmin, p.qmax
    )
    assert torch.allclose(fake_quantize(x, p), theirs)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_is_exact_nan_stays_and_infinity_saturates(symmetric):
    p = choose_qparams(torch.tensor(-1.0), torch.tensor(3.0), 8, symmetric=symmetric)
    y = fake_quantize(torch.tensor([0.0, float("nan"), float("inf"), -float("inf")]), p)
    assert y[0] == 0
    assert y[1].isnan()
    assert y[2] == (p.qmax - p.zero_point) * p.scale
    assert y[3] == (p.qmin - p.zero_point) * p.scale


@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_of_zeros_tiny_numbers_and_huge_ranges(symmetric):
    lo = torch.tensor([0.0, -1e-44, -3e38])
    hi = torch.tensor([0.0, 1e-44, 3e38])
    p = choose_qparams(lo, hi, 8, symmetric=symmetric)
    assert p.scale[0] == 1
    assert p.scale[1] >= TINY
    assert p.scale.isfinite().all()
    assert fake_quantize(torch.zeros(3), p).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_of_the_input_is_kept_and_arithmetic_is_float32(dtype):
    x = torch.linspace(-2, 2, 33).to(dtype)
    p = choose_qparams(torch.tensor(-2.0), torch.tensor(2.0), 8, symmetric=True)
    y = fake_quantize(x, p)
    assert y.dtype == dtype
    assert torch.equal(y, fake_quantize(x.float(), p).to(dtype))


def test_a_symmetric_flag_changes_speed_and_not_numbers():
    x = torch.randn(100)
    p = choose_qparams(x.amin(), x.amax(), 5, symmetric=True)
    assert p.symmetric
    assert torch.equal(fake_quantize(x, p), fake_quantize(x, QParams(p.scale, p.zero_point, 5)))
