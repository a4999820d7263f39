"""Every format's values are points of its grid, by enumeration, and the neighbours of the number.

fp8 is compared with torch's own E5M2.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.errors import SpecError, UserError
from autoquant.quant.gradients.format import GradientFormat
from autoquant.spec.gradients import GRADIENT_GRIDS, ROUNDINGS, MagnitudeGrid
from tests.quant.gradients.brute_force import around, shares

NAMES = tuple(GRADIENT_GRIDS)
GRANULARITIES = ("per_tensor", "per_channel", "per_group_3", "per_group_32")
SETTINGS = settings(deadline=None, max_examples=60)
NUMBERS = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=24)
FORMATS = st.builds(
    GradientFormat, st.sampled_from(NAMES), st.sampled_from(ROUNDINGS), st.just("per_tensor")
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_the_table_describe_the_grids_by_enumeration(name):
    grid = GRADIENT_GRIDS.get(name)
    points = {0.0}
    fields = 2**grid.mantissa_bits
    for fraction in range(fields):
        points.add(fraction / fields)
        points |= {(1 + fraction / fields) * 2**i for i in range(grid.binades)}
    found = torch.tensor(sorted(points), dtype=torch.float64)
    assert found[1] == grid.step
    assert found[-1] == grid.top
    torch.testing.assert_close(found / grid.top, shares(name), rtol=1e-15, atol=0)
    assert 2 * len(found) <= 2**grid.bits  # 0 has a code for each sign


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_values_are_points_next_to_the_number(name, rounding, granularity):
    g = torch.randn(7, 40, generator=seeded(1)) * torch.randn(7, 40, generator=seeded(2)).exp()
    fmt = GradientFormat(name, rounding, granularity)
    q = fmt.quantize(g, seeded(3))
    below, above = around(g.abs(), expected_largest(g.abs(), granularity), name)
    near = torch.minimum((q.abs() - below).abs(), (q.abs() - above).abs())
    assert (near <= 1e-6 * above).all()
    assert (q * g >= 0).all()
    if rounding == "nearest":
        error = torch.minimum(g.abs() - below, above - g.abs())
        torch.testing.assert_close((q - g).abs().double(), error, rtol=1e-5, atol=1e-6)


def expected_largest(x: torch.Tensor, granularity: str) -> torch.Tensor:
    """The largest of the block of each, by loops over blocks."""
    found = torch.empty_like(x)
    if granularity == "per_tensor":
        return found.fill_(x.max())
    if granularity == "per_channel":
        for i in range(len(x)):
            found[i] = x[i].max()
        return found
    size = int(granularity.removeprefix("per_group_"))
    for start in range(0, x.shape[1], size):
        block = slice(start, start + size)
        found[:, block] = x[:, block].max(1, keepdim=True).values
    return found


@pytest.mark.parametrize("exponent", [-40, -3, 0, 7])
def test_fp8_rounds_as_torch_casts(exponent):
    unit = 2.0**exponent
    codes = torch.arange(128, dtype=torch.uint8).view(torch.float8_e5m2).float()
    codes = codes[codes.isfinite()]
    middles = (codes[1:] + codes[:-1]) / 2
    dense = torch.randn(4000, generator=seeded(4)) * 10 ** (
        torch.rand(4000, generator=seeded(5)) * 8 - 5
    )
    numbers = torch.cat([codes, -codes, middles, -middles, dense.clamp(-57344, 57344)])
    expected = numbers.to(torch.float8_e5m2).float()
    found = GradientFormat("fp8", "nearest").quantize(numbers * unit) / unit
    assert torch.equal(found, expected)
    drawn = GradientFormat("fp8").quantize(numbers * unit, seeded()) / unit
    assert torch.equal(drawn.to(torch.float8_e5m2).float(), drawn)


def test_ties_go_to_the_even_integer_and_up_between_powers_of_two():
    for name, most in (("int4", 7), ("int8", 127)):
        integers = torch.arange(0, most, dtype=torch.float32)
        g = torch.cat([integers + 0.5, torch.tensor([float(most)])])
        assert torch.equal(GradientFormat(name, "nearest").quantize(g), g.round())
    g = torch.tensor([0.5, 0.51, 1.5, 1.49, 3.0, 6.0, 12.0, 24.0, 48.0, 47.9, 64.0])
    expected = torch.tensor([0.0, 1.0, 2.0, 1.0, 4.0, 8.0, 16.0, 32.0, 64.0, 32.0, 64.0])
    assert torch.equal(GradientFormat("log4", "nearest").quantize(g), expected)


@SETTINGS
@given(NUMBERS, FORMATS, st.integers(0, 2**31))
def test_shape_sign_range_and_a_second_time(numbers, fmt, seed):
    g = torch.tensor(numbers)
    before = g.clone()
    q = fmt.quantize(g, seeded(seed))
    assert torch.equal(g, before)
    assert q.shape == g.shape
    finite = g.isfinite()
    assert torch.equal(q[~finite], g[~finite])
    assert q[finite].isfinite().all()
    most = g[finite].abs().max() if finite.any() else torch.tensor(0.0)
    assert (q[finite].abs() <= most).all()
    largest = finite & (g.abs() == most)
    assert torch.equal(q[largest], g[largest])  # never clipped
    assert ((q == 0) | (q.sign() == g.sign()))[finite].all()
    assert torch.equal(fmt.quantize(q, seeded(seed + 1)), q)


@SETTINGS
@given(
    st.lists(st.floats(-1e3, 1e3, width=16, allow_subnormal=False), min_size=1, max_size=24),
    FORMATS,
    st.integers(-40, 40),
)
def test_powers_of_two_change_the_unit_and_nothing_else(numbers, fmt, exponent):
    g = torch.tensor(numbers)
    unit = 2.0**exponent
    assert torch.equal(fmt.quantize(g * unit, seeded()), fmt.quantize(g, seeded()) * unit)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(5,), (3, 8), (2, 3, 4), (2, 3, 4, 5)])
def test_every_channel_is_quantized_as_if_it_were_alone(name, shape):
    g = torch.randn(shape, generator=seeded(6))
    alone = GradientFormat(name, "nearest")
    for axis in range(-len(shape), len(shape)):
        q = GradientFormat(name, "nearest", "per_channel", axis).quantize(g)
        for i in range(shape[axis]):
            assert torch.equal(q.select(axis, i), alone.quantize(g.select(axis, i)))


def test_the_last_block_may_be_shorter_and_a_block_longer_than_the_axis():
    g = torch.randn(4, 10, generator=seeded(7))
    q = GradientFormat("int4", "nearest", "per_group_4").quantize(g)
    alone = GradientFormat("int4", "nearest", "per_channel")
    for part in (slice(0, 4), slice(4, 8), slice(8, 10)):
        assert torch.equal(q[:, part], alone.quantize(g[:, part]))
    assert torch.equal(
        GradientFormat("int4", "nearest", "per_group_64").quantize(g), alone.quantize(g)
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_zero_constant_empty_and_single_gradients(name, granularity, rounding):
    fmt = GradientFormat(name, rounding, granularity)
    for shape in ((0,), (3, 0), (0, 4)):
        assert fmt.quantize(torch.empty(shape), seeded()).shape == shape
    assert fmt.quantize(torch.zeros(3, 5), seeded()).eq(0).all()
    for c in (0.1, -3e-7, 1e-42, 3.4e38, -0.0):
        g = torch.full((3, 5), c)
        assert torch.equal(fmt.quantize(g, seeded()), g)
    single = torch.tensor(-0.3)
    assert torch.equal(fmt.quantize(single, seeded()), single)
    one = torch.tensor([0.7])
    assert torch.equal(fmt.quantize(one, seeded()), one)


@pytest.mark.parametrize("fmt", [GradientFormat(n, r) for n in NAMES for r in ROUNDINGS], ids=str)
def test_what_is_not_finite_passes_and_the_rest_is_as_without_it(fmt):
    g = torch.randn(6, 9, generator=seeded(8))
    broken, without = g.clone(), g.clone()
    for i, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        broken[i, i] = value
        without[i, i] = 0.0
    q = fmt.quantize(broken, seeded())
    bad = ~broken.isfinite()
    assert q[0, 0].isnan()
    assert q[1, 1] == float("inf")
    assert q[2, 2] == -float("inf")
    assert torch.equal(q[~bad], fmt.quantize(without, seeded())[~bad])
    lost = torch.full((3,), float("nan"))
    assert fmt.quantize(lost, seeded()).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fmt", [GradientFormat(n, r) for n in NAMES for r in ROUNDINGS], ids=str)
def test_other_dtypes_are_kept_and_their_grid_is_rounded_to_them(fmt, dtype):
    g = (torch.randn(300, generator=seeded(9)) * 3).to(dtype)
    q = fmt.quantize(g, seeded())
    assert q.dtype == dtype
    eps = 1e-6 if dtype == torch.float64 else torch.finfo(dtype).eps
    points = shares(fmt.name) * g.abs().max().double()
    nearest = (points - q.abs().double()[:, None]).abs().amin(1)
    assert (nearest <= eps * q.abs().double()).all()
    most = torch.finfo(dtype).max
    assert (
        fmt.quantize(torch.tensor([most, -most, most / 3], dtype=dtype), seeded()).isfinite().all()
    )


def test_the_same_state_of_a_generator_gives_the_same_numbers():
    fmt = GradientFormat("log4")
    g = torch.randn(50, generator=seeded(10))
    generator = seeded(11)
    state = generator.get_state()
    first, second = fmt.quantize(g, generator), fmt.quantize(g, generator)
    assert not torch.equal(first, second)
    assert torch.equal(fmt.quantize(g, generator.set_state(state)), first)
    before = torch.get_rng_state()
    fmt.quantize(g, generator)
    assert torch.equal(torch.get_rng_state(), before)
    state = generator.get_state()
    GradientFormat("log4", "nearest").quantize(g, generator)
    assert torch.equal(generator.get_state(), state)


def test_what_a_format_does_not_take_is_said():
    with pytest.raises(UserError, match="unknown gradient format 'log5': did you mean 'log4'"):
        GradientFormat("log5")
    with pytest.raises(SpecError, match="rounding of a gradient 'floor'"):
        GradientFormat("int8", "floor")
    with pytest.raises(SpecError, match=r"'per_row', allowed: per_tensor"):
        GradientFormat("int8", granularity="per_row")
    with pytest.raises(ValueError, match="int8 stochastic per_tensor draws numbers"):
        GradientFormat("int8").quantize(torch.ones(3))
    with pytest.raises(TypeError, match="int64"):
        GradientFormat("int8", "nearest").quantize(torch.ones(3, dtype=torch.int64))
    with pytest.raises(IndexError):
        GradientFormat("int8", "nearest", "per_channel", 2).quantize(torch.ones(3, 4))


def test_a_format_in_words_and_its_bits():
    assert str(GradientFormat("log4")) == "log4 stochastic per_tensor"
    fmt = GradientFormat("int8", "nearest", "per_channel", 1)
    assert str(fmt) == "int8 nearest per_channel along axis 1"
    assert [GradientFormat(n).bits for n in NAMES] == [8, 4, 8, 4]
    assert fmt.grid == MagnitudeGrid(bits=8, binades=1, mantissa_bits=6)
