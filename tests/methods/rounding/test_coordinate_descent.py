"""Coordinate descent against GPTQ, against single steps of every weight, and where data are few."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.methods.problem import Bench, SiteProblem
from autoquant.methods.rounding.coordinate_descent import CoordinateDescent, descend
from autoquant.methods.rounding.gptq import GPTQ
from autoquant.nn.calibrate import SiteStatistics
from autoquant.nn.sites import Site
from autoquant.nn.weights import quantize_weight
from autoquant.quant.blocks import from_blocks
from autoquant.spec.recipe import WeightScheme
from autoquant.spec.techniques import UNCORRECTED

MANY = 30
"""Passes after which nothing moves any more."""


def problem_of(matrix, scheme, moments):
    site = Site("fc", "linear", "Linear", tuple(matrix.shape), 0, (("fc", "weight"),))
    once = Bench(matrix, site, None, UNCORRECTED).once
    return SiteProblem(site, matrix, quantize_weight(matrix, site, scheme), moments, once)


def inputs(rows, columns, seed=0, rank=3):
    """Return correlated inputs [rows, columns]: few directions and some noise."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank, columns, generator=g)
    noise = torch.randn(rows, columns, generator=g)
    return torch.randn(rows, rank, generator=g) @ mixing + 0.2 * noise


def moments_of(*groups):
    return torch.stack([x.T @ x / len(x) for x in groups])


def weights(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1000 + seed))


def damped(moments, damping):
    """Return the moments that steps are judged by, written out."""
    g = moments.double()
    n = g.shape[1]
    return g + damping * g.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(n).double()


def errors(matrix, weight, g):
    """Return the error of each channel under ``g`` [groups, n, n]."""
    delta = (weight - matrix).double().reshape(len(g), -1, matrix.shape[1])
    return ((delta @ g) * delta).sum(-1).flatten()


def real(problem, q, p):
    """Return the weight of integers ``q`` on the grid ``p``."""
    shape = problem.matrix.shape
    each = (from_blocks(x.expand_as(problem.blocks()), shape) for x in (p.scale, p.zero_point))
    scale, zero = each
    return (q.float() - zero) * scale


def on_grid(weight, bits):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    inside = bool(((weight.q >= low) & (weight.q <= high)).all())
    return inside and weight.q.dtype == torch.int8 and bool(weight.matrix().isfinite().all())


GRIDS = list(
    itertools.product(
        ["per_channel", "per_tensor", "per_group_32"], ["symmetric", "asymmetric"], [2, 3, 4]
    )
)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 5),
    st.sampled_from([1, 2, 5, 32, 64]),
    st.sampled_from(GRIDS),
    st.sampled_from([1e-6, 0.01, 0.3]),
    st.integers(1, 3),
)
def test_it_is_never_worse_than_gptq_nor_nearest(seed, rows, columns, grid, damping, passes):
    granularity, scheme, bits = grid
    if columns % 32:
        granularity = granularity.replace("group_32", "channel")
    matrix, moments = weights(rows, columns, seed), moments_of(inputs(40, columns, seed))
    problem = problem_of(matrix, WeightScheme(bits, granularity, scheme), moments)
    found = CoordinateDescent(damping, passes).fit(problem)
    assert on_grid(found, bits)
    g = damped(moments, damping)
    error = errors(matrix, found.matrix(), g).sum()
    start = GPTQ(damping).fit(problem)
    assert error <= errors(matrix, start.matrix(), g).sum() * (1 + 1e-5) + 1e-9
    # From the nearest weights on, no channel gets worse in any number of passes.
    own = errors(matrix, descend(problem, problem.nearest, moments, damping, passes).matrix(), g)
    assert bool((own <= errors(matrix, problem.nearest.matrix(), g) * (1 + 1e-5) + 1e-9).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_a_recipe_gets_is_no_worse_than_nearest_on_the_data_themselves(bits):
    for seed in range(10):
        matrix, moments = weights(4, 12, seed), moments_of(inputs(40, 12, seed))
        scheme = WeightScheme(bits, rounding=CoordinateDescent(0.5, 1))
        problem = problem_of(matrix, scheme, moments)
        bench = Bench(matrix, problem.site, SiteStatistics(None, moments), UNCORRECTED)
        assert problem.error(bench.round(scheme)) <= problem.error(problem.nearest)


@pytest.mark.parametrize("grid", [g for g in GRIDS if g[0] != "per_group_32"])
def test_no_step_of_a_single_weight_makes_it_better(grid):
    granularity, scheme, bits = grid
    for seed in range(5):
        matrix, moments = weights(3, 5, seed), moments_of(inputs(60, 5, seed))
        problem = problem_of(matrix, WeightScheme(bits, granularity, scheme), moments)
        found = CoordinateDescent(0.01, MANY).fit(problem)
        g, p = damped(moments, 0.01), found.qparams
        least = errors(matrix, real(problem, found.q, p), g)
        for row, column in itertools.product(range(3), range(5)):
            for level in range(p.qmin, p.qmax + 1):
                q = found.q.clone()
                q[row, column] = level
                stepped = errors(matrix, real(problem, q, p), g)[row]
                assert stepped >= least[row] * (1 - 1e-4) - 1e-9


def test_it_is_between_gptq_and_the_best_of_all_roundings():
    every = torch.tensor(list(itertools.product(range(-2, 2), repeat=6)))
    best, found, start = [], [], []
    for seed in range(30):
        matrix, moments = weights(1, 6, seed), moments_of(inputs(50, 6, seed))
        # One scale for the whole weight is kept, so that all roundings are on the same grid.
        problem = problem_of(torch.cat([matrix] * 2), WeightScheme(2, "per_tensor"), moments)
        g = damped(moments, 0.01)
        scale = problem.nearest.qparams.scale
        delta = (every * scale - matrix).double()
        best.append(float(((delta @ g[0]) * delta).sum(1).min()))
        ways = (CoordinateDescent(0.01, MANY), GPTQ(0.01))
        for kept, rounding in zip((found, start), ways, strict=True):
            kept.append(float(errors(problem.matrix, rounding.fit(problem).matrix(), g)[0]))
    assert all(b <= f * (1 + 1e-4) for b, f in zip(best, found, strict=True))
    assert all(f <= s * (1 + 1e-4) for f, s in zip(found, start, strict=True))
    assert sum(found) - sum(best) < 0.7 * (sum(start) - sum(best))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("groups", [1, 2])
def test_scales_are_those_of_the_regression(bits, groups):
    matrix = weights(6, 8)
    moments = moments_of(*(inputs(60, 8, seed) for seed in range(groups)))
    problem = problem_of(matrix, WeightScheme(bits), moments)
    found = CoordinateDescent(0.02, MANY).fit(problem)
    g = damped(moments, 0.02)
    q = found.q.double().reshape(groups, -1, 8)
    turned = q @ g
    w = matrix.double().reshape(groups, -1, 8)
    scale = ((turned * w).sum(-1) / (turned * q).sum(-1)).flatten()
    torch.testing.assert_close(found.qparams.scale.flatten().double(), scale, rtol=1e-4, atol=0)
    assert not torch.equal(found.qparams.scale, problem.nearest.qparams.scale)
    assert not bool(found.qparams.zero_point.any())
    # And no other scale is better, which is what a regression means.
    least = errors(matrix, found.matrix(), g)
    for factor in (0.99, 1.01):
        moved = found.matrix() * factor
        assert bool((errors(matrix, moved, g) >= least * (1 - 1e-6)).all())


@pytest.mark.parametrize(
    ("granularity", "scheme"),
    [
        ("per_tensor", "symmetric"),
        ("per_tensor", "asymmetric"),
        ("per_channel", "asymmetric"),
        ("per_group_32", "symmetric"),
        ("per_group_32", "asymmetric"),
    ],
)
def test_other_grids_keep_their_scales(granularity, scheme):
    matrix, moments = weights(4, 64), moments_of(inputs(200, 64))
    problem = problem_of(matrix, WeightScheme(3, granularity, scheme), moments)
    # GPTQ alone often leaves nothing for single steps to gain on a grid that stays; nearest does.
    for start in (GPTQ(0.01).fit(problem), problem.nearest):
        found = descend(problem, start, moments, 0.01, 2)
        for part in ("scale", "zero_point"):
            kept = getattr(problem.nearest.qparams, part)
            assert torch.equal(getattr(found.qparams, part), kept)
        before, after = (errors(matrix, w.matrix(), damped(moments, 0.01)) for w in (start, found))
        assert bool((after <= before * (1 + 1e-6)).all())
    assert after.sum() < 0.7 * before.sum()


def test_groups_are_rounded_each_under_its_own_moments():
    matrix, parts = weights(6, 10), [inputs(80, 10, seed) for seed in range(3)]
    whole = CoordinateDescent(0.01, 3).fit(problem_of(matrix, WeightScheme(3), moments_of(*parts)))
    for i, x in enumerate(parts):
        rows = slice(2 * i, 2 * i + 2)
        problem = problem_of(matrix[rows].contiguous(), WeightScheme(3), moments_of(x))
        alone = CoordinateDescent(0.01, 3).fit(problem)
        assert torch.equal(alone.q, whole.q[rows])
        torch.testing.assert_close(alone.qparams.scale, whole.qparams.scale[rows])


def test_it_gives_the_same_every_time_and_leaves_what_it_was_given():
    matrix, moments = weights(4, 20), moments_of(inputs(50, 20))
    problem = problem_of(matrix, WeightScheme(3), moments)
    before = (matrix.clone(), moments.clone(), problem.nearest.q.clone())
    first, second = (CoordinateDescent().fit(problem) for _ in range(2))
    assert torch.equal(first.q, second.q)
    assert torch.equal(first.qparams.scale, second.qparams.scale)
    after = (matrix, moments, problem.nearest.q)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


SINGULAR = {
    "one sample": lambda: inputs(1, 12),
    "fewer samples than inputs": lambda: inputs(4, 12),
    "dead inputs": lambda: inputs(60, 12) * (torch.arange(12) % 3 > 0),
    "one live input": lambda: inputs(60, 12) * (torch.arange(12) == 1),
    "an input twice": lambda: torch.cat([inputs(60, 6)] * 2, 1),
    "nothing at all": lambda: torch.zeros(60, 12),
    "tiny": lambda: inputs(60, 12) * 1e-18,
    "huge": lambda: inputs(60, 12) * 1e15,
}


@pytest.mark.parametrize("kind", SINGULAR)
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("damping", [1e-6, 0.05])
def test_moments_that_are_singular_are_no_obstacle(kind, scheme, damping):
    matrix, moments = weights(4, 12), moments_of(SINGULAR[kind]())
    problem = problem_of(matrix, WeightScheme(3, scheme=scheme), moments)
    found = CoordinateDescent(damping).fit(problem)
    assert on_grid(found, 3)
    assert bool((found.qparams.scale > 0).all())
    g = damped(moments, damping)
    before = errors(matrix, GPTQ(damping).fit(problem).matrix(), g).sum()
    assert errors(matrix, found.matrix(), g).sum() <= before * (1 + 1e-4) + 1e-30


def test_inputs_that_are_always_0_leave_the_weight_as_it_was():
    problem = problem_of(weights(4, 12), WeightScheme(3), torch.zeros(1, 12, 12))
    found = CoordinateDescent().fit(problem)
    assert torch.equal(found.q, problem.nearest.q)
    assert torch.equal(found.qparams.scale, problem.nearest.qparams.scale)


def test_a_channel_of_zeros_stays_one():
    matrix = weights(4, 12)
    matrix[1] = 0
    found = CoordinateDescent().fit(problem_of(matrix, WeightScheme(3), moments_of(inputs(60, 12))))
    assert not bool(found.matrix()[1].any())
    assert bool((found.qparams.scale > 0).all())


@pytest.mark.parametrize("moments", [None, torch.rand(1, 12)])
def test_inputs_that_are_not_known_together_are_rounded_to_the_nearest(moments):
    problem = problem_of(weights(4, 12), WeightScheme(3), moments)
    found = CoordinateDescent().fit(problem)
    assert torch.equal(found.q, problem.nearest.q)
    assert torch.equal(found.qparams.scale, problem.nearest.qparams.scale)
