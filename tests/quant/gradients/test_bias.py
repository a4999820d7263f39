"""Stochastic rounding has no bias, anywhere on the grid, and the variance that the formula gives.

Each comparison is of a mean over independent draws with its expectation, |difference| < 5 standard
errors: were it drawn anew, a right quantizer would fail at one number in 1.7 million. Seeds are
fixed, so it doesn't. Numbers that are too near a grid point for the normal distribution to hold are
compared in sum.
"""

from __future__ import annotations

import math

import pytest
import torch

from autoquant.quant.gradients.format import GradientFormat
from autoquant.spec.gradients import GRADIENT_GRIDS
from tests.quant.gradients.brute_force import around
from tests.quant.gradients.test_grids import expected_largest, seeded

NAMES = tuple(GRADIENT_GRIDS)
GRANULARITIES = ("per_tensor", "per_channel", "per_group_8")
ERRORS = 5
"""How many standard errors a mean may be off."""


def spread(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Signed log-normal numbers, as gradients are: few large ones, and many that underflow."""
    size = (2 * torch.randn(shape, generator=seeded(seed))).exp()
    return size * torch.randn(shape, generator=seeded(seed + 1)).sign()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", NAMES)
def test_the_mean_of_many_draws_is_the_gradient(name, granularity, dtype):
    g = spread((6, 32), 20).to(dtype)
    fmt = GradientFormat(name, "stochastic", granularity)
    generator, draws = seeded(22), 2500
    total = torch.zeros(g.shape, dtype=torch.float64)
    for _ in range(draws):
        total += fmt.quantize(g, generator).double()
    exact = g.double()
    below, above = around(exact.abs(), expected_largest(exact.abs(), granularity), name)
    if dtype != torch.float32:  # what rounding is between is rounded itself
        below, above = below.to(dtype).double(), above.to(dtype).double()
    variance = ((exact.abs() - below) * (above - exact.abs())).clamp(min=0)
    off = total / draws - exact
    likely = ((exact.abs() - below) / (above - below)).nan_to_num(0.0)
    enough = draws * torch.minimum(likely, 1 - likely) >= 20
    resolution = exact.abs().max() * 1e-6  # of float32, where a number is a grid point
    assert enough.float().mean() > 0.4
    assert (off.abs() < ERRORS * (variance / draws).sqrt() + resolution)[enough].all()
    assert off.sum().abs() < ERRORS * (variance.sum() / draws).sqrt() + resolution


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_below_the_smallest_point_the_mean_is_right(name, share):
    """Stochastic underflow: 0 or ±α, α with probability |x|/α."""
    grid = GRADIENT_GRIDS.get(name)
    alpha, draws = grid.step / grid.top, 200_000
    x = share * alpha
    for sign in (1.0, -1.0):
        g = torch.full((draws + 1,), sign * x)
        g[-1] = 1.0
        q = GradientFormat(name).quantize(g, seeded(23))[:-1]
        values = q.abs().unique()
        assert torch.allclose(values[values > 0], torch.tensor(alpha, dtype=torch.float32))
        assert abs(q.double().mean() - sign * x) < ERRORS * math.sqrt(x * (alpha - x) / draws)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.9, 0.97, 0.99, 0.999])
def test_next_to_the_maximum_the_mean_is_right(name, share):
    draws = 100_000
    g = torch.full((draws + 1,), share)
    g[-1] = -1.0
    q = GradientFormat(name).quantize(g, seeded(24))[:-1].double()
    below, above = (b.item() for b in around(g[0], torch.tensor(1.0), name))
    error = math.sqrt(max((share - below) * (above - share), 0) / draws)
    assert abs(q.mean().item() - share) < ERRORS * error + 1e-7


@pytest.mark.parametrize("name", NAMES)
def test_the_variance_is_the_product_of_the_distances(name):
    draws = 100_000
    for share in (0.013, 0.21, 0.4, 0.66, 0.93):
        g = torch.full((draws + 1,), share)
        g[-1] = 1.0
        q = GradientFormat(name).quantize(g, seeded(25))[:-1].double()
        below, above = (b.item() for b in around(g[0], torch.tensor(1.0), name))
        expected = (g[0].item() - below) * (above - g[0].item())
        p, step = (g[0].item() - below) / (above - below), above - below
        fourth = p * (1 - p) * (p**3 + (1 - p) ** 3) * step**4
        error = math.sqrt((fourth - expected**2) / draws)
        assert abs((q - g[0].double()).square().mean().item() - expected) < ERRORS * error + 1e-12


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_denormal_gradients_have_no_bias(name, dtype):
    unit = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # the smallest there is
    draws = 100_000
    for multiple, most in ((1, 3), (2, 5), (3, 11), (7, 1000), (301, 1000)):
        g = torch.full((draws + 1,), multiple * unit, dtype=dtype)
        g[-1] = most * unit
        q = GradientFormat(name).quantize(g, seeded(26))
        assert q[-1] == g[-1]
        integers = q[:-1].double() / unit
        assert integers.max() <= most
        spread_of_mean = integers.std().item() / math.sqrt(draws)
        assert abs(integers.mean().item() - multiple) <= ERRORS * spread_of_mean


def test_nearest_is_biased_where_stochastic_is_not():
    """Many small numbers on one side of the middle of a step, and one large one: all are lost."""
    n = 10_000
    for name in NAMES:
        grid = GRADIENT_GRIDS.get(name)
        alpha = grid.step / grid.top
        g = torch.rand(n, generator=seeded(27)) * 0.49 * alpha
        g[0] = 1.0
        near = GradientFormat(name, "nearest").quantize(g)
        assert near[1:].eq(0).all()
        drawn = GradientFormat(name).quantize(g, seeded(28))[1:].double()
        truth = g[1:].double()
        error = (truth * (alpha - truth)).sum().sqrt()
        assert abs(drawn.sum() - truth.sum()) < ERRORS * error
        assert truth.sum() > 20 * error  # what nearest rounding is off


def test_the_error_of_one_draw_is_larger_than_that_of_the_nearest():
    """Min(a, b)² ≤ a·b: what absence of bias costs."""
    g = spread((4000,), 29)
    for name in NAMES:
        nearest = (GradientFormat(name, "nearest").quantize(g) - g).square()
        drawn = (GradientFormat(name).quantize(g, seeded(31)) - g).square()
        assert nearest.sum() < drawn.sum()
        assert (nearest <= drawn * (1 + 1e-5) + 1e-12).all()
