"""The affine quantizer against torch's own, and against what it promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.quant.affine import (
    HUGE,
    TINY,
    QParams,
    choose_qparams,
    dequantize,
    fake_quantize,
    fake_quantize_scalar,
    quantize,
)

SETTINGS = settings(deadline=None, max_examples=80)
BITS = st.integers(2, 8)
NUMBERS = st.lists(st.floats(-1e6, 1e6, width=32, allow_nan=False), min_size=1, max_size=40)
ANY_NUMBERS = st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20
)


def parameters(x, bits, symmetric):
    return choose_qparams(x.amin(), x.amax(), bits, symmetric=symmetric)


@SETTINGS
@given(NUMBERS, BITS, st.booleans())
def test_the_error_within_the_grid_is_at_most_half_a_step(numbers, bits, symmetric):
    x = torch.tensor(numbers)
    p = parameters(x, bits, symmetric)
    low, high = (p.qmin - p.zero_point) * p.scale, (p.qmax - p.zero_point) * p.scale
    error = (fake_quantize(x, p) - x).abs()
    inside = (x >= low) & (x <= high)
    slack = x.abs().max() * 1e-6 + 1e-44
    assert (error[inside] <= p.scale / 2 + slack).all()
    # An asymmetric zero point is rounded, so an end of the range may miss the grid by half a step.
    assert (error <= p.scale * (0.5 if symmetric else 1.0) + slack).all()


@SETTINGS
@given(NUMBERS, BITS, st.booleans())
def test_grid_points_survive_exactly_and_quantizing_twice_changes_nothing(numbers, bits, symmetric):
    x = torch.tensor(numbers)
    p = parameters(x, bits, symmetric)
    once = fake_quantize(x, p)
    assert torch.equal(fake_quantize(once, p), once)
    grid = torch.arange(p.qmin, p.qmax + 1, dtype=torch.int8)
    points = dequantize(grid, p)
    assert torch.equal(fake_quantize(points, p), points)
    assert torch.equal(quantize(points, p), grid)


@SETTINGS
@given(ANY_NUMBERS, BITS, st.booleans())
def test_zero_is_exact_and_finite_numbers_stay_finite(numbers, bits, symmetric):
    x = torch.tensor([*numbers, 0.0])
    p = parameters(x, bits, symmetric)
    assert (p.scale >= TINY).all()
    assert p.scale.isfinite().all()
    assert p.qmin <= p.zero_point <= p.qmax
    assert p.zero_point == p.zero_point.round()
    y = fake_quantize(x, p)
    assert y.isfinite().all()
    assert y[-1] == 0
    assert dequantize(quantize(x[-1:], p), p) == 0


@SETTINGS
@given(ANY_NUMBERS, BITS, st.booleans())
def test_integers_plain_numbers_and_the_short_cut_agree_bit_for_bit(numbers, bits, symmetric):
    x = torch.tensor(numbers)
    p = parameters(x, bits, symmetric)
    expected = dequantize(quantize(x, p), p)
    assert torch.equal(fake_quantize(x, p), expected)
    scalar = fake_quantize_scalar(x, p.scale.item(), int(p.zero_point.item()), bits)
    assert torch.equal(scalar, expected)


@SETTINGS
@given(NUMBERS, BITS, st.booleans())
def test_it_agrees_with_torch_but_for_ties(numbers, bits, symmetric):
    x = torch.tensor(numbers)
    p = parameters(x, bits, symmetric)
    theirs = torch.fake_quantize_per_tensor_affine(
        x, p.scale, p.zero_point.to(torch.int32), p.qmin, p.qmax
    )
    ours = fake_quantize(x, p)
    far = ~near_a_tie(x, p)
    torch.testing.assert_close(ours[far], theirs[far], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_per_channel_agrees_with_torch_but_for_ties(bits, symmetric):
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(50, 70, generator=generator) * torch.rand(50, 1, generator=generator)
    p = choose_qparams(x.amin(1, keepdim=True), x.amax(1, keepdim=True), bits, symmetric=symmetric)
    zero_point = p.zero_point.flatten().to(torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(
        x, p.scale.flatten(), zero_point, 0, p.qmin, p.qmax
    )
    ours = fake_quantize(x, p)
    far = ~near_a_tie(x, p)
    assert far.float().mean() > 0.97
    torch.testing.assert_close(ours[far], theirs[far], rtol=1e-6, atol=0)


def near_a_tie(x, p):
    """Torch multiplies by the reciprocal of the scale, which decides ties otherwise."""
    position = (x / p.scale).double()
    return ((position - position.floor()) - 0.5).abs() < 1e-3


@pytest.mark.parametrize("symmetric", [True, False])
def test_nan_stays_and_infinity_saturates(symmetric):
    p = choose_qparams(torch.tensor(-1.0), torch.tensor(3.0), 8, symmetric=symmetric)
    x = torch.tensor([float("nan"), float("inf"), -float("inf")])
    scalar = fake_quantize_scalar(x, p.scale.item(), int(p.zero_point), 8)
    for y in (fake_quantize(x, p), scalar):
        assert y[0].isnan()
        assert y[1] == (p.qmax - p.zero_point) * p.scale
        assert y[2] == (p.qmin - p.zero_point) * p.scale


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_of_zeros_tiny_numbers_and_huge_ranges(bits, symmetric):
    most = torch.finfo(torch.float32).max
    lo = torch.tensor([0.0, -1e-38, -most, -float("inf"), 0.0])
    hi = torch.tensor([0.0, 1e-38, most, float("inf"), most])
    p = choose_qparams(lo, hi, bits, symmetric=symmetric)
    assert p.scale[0] == 1
    assert p.scale[1] == TINY
    assert p.scale.isfinite().all()
    assert fake_quantize(torch.zeros(5), p).eq(0).all()
    assert fake_quantize(lo, p).isfinite().all()
    widest = fake_quantize(hi, p)[2:]
    assert widest.isfinite().all()
    assert (widest >= HUGE / 2).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_range_on_one_side_is_widened_to_zero(symmetric):
    for lo, hi in ((2.0, 5.0), (-5.0, -2.0)):
        p = choose_qparams(torch.tensor(lo), torch.tensor(hi), 8, symmetric=symmetric)
        assert p.scale == pytest.approx(5.0 / (127 if symmetric else 255))
        ends = fake_quantize(torch.tensor([0.0, lo, hi]), p)
        assert ends[0] == 0
        torch.testing.assert_close(ends[1:], torch.tensor([lo, hi]), atol=0.02, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_dtype_of_the_input_is_kept_and_arithmetic_is_float32(dtype, symmetric):
    x = torch.linspace(-2, 3, 33).to(dtype)
    p = choose_qparams(x.amin(), x.amax(), 8, symmetric=symmetric)
    assert p.scale.dtype == torch.float32
    y = fake_quantize(x, p)
    assert y.dtype == dtype
    assert torch.equal(y, fake_quantize(x.float(), p).to(dtype))
    assert torch.equal(fake_quantize_scalar(x, p.scale.item(), int(p.zero_point), 8), y)


def test_quantizing_leaves_its_input_as_it_is():
    x = torch.randn(20)
    before = x.clone()
    p = parameters(x, 3, symmetric=False)
    for _ in (quantize(x, p), fake_quantize(x, p), fake_quantize_scalar(x, 0.1, 3, 4)):
        assert torch.equal(x, before)


def test_a_symmetric_flag_changes_speed_and_not_numbers():
    x = torch.randn(100)
    p = choose_qparams(x.amin(), x.amax(), 5, symmetric=True)
    assert p.symmetric
    plain = QParams(p.scale, p.zero_point, 5)
    assert torch.equal(fake_quantize(x, p), fake_quantize(x, plain))
    assert torch.equal(dequantize(quantize(x, p), p), dequantize(quantize(x, plain), plain))


def test_the_symmetric_scale_is_the_largest_magnitude_over_the_largest_integer():
    for bits in range(2, 9):
        p = choose_qparams(torch.tensor(-6.0), torch.tensor(3.0), bits, symmetric=True)
        assert p.scale == torch.tensor(6.0) / (2 ** (bits - 1) - 1)
        assert p.zero_point == 0
