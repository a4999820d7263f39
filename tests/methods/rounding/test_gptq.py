"""GPTQ against every rounding there is, against its formula written out, and where data are few."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autoquant.methods.correction.bias import BiasCorrection
from autoquant.methods.problem import Bench, SiteProblem
from autoquant.methods.rounding.gptq import GPTQ
from autoquant.nn.calibrate import MissingStatistics, SiteStatistics, calibrate
from autoquant.nn.convert import prepare
from autoquant.nn.sites import Site
from autoquant.nn.weights import quantize_weight
from autoquant.observers.output_error import exact_output_error
from autoquant.quant.affine import dequantize
from autoquant.quant.blocks import from_blocks, to_blocks
from autoquant.spec.need import Need
from autoquant.spec.recipe import WeightScheme
from autoquant.spec.techniques import NEAREST, UNCORRECTED

BIAS = BiasCorrection()


def generator(seed):
    return torch.Generator().manual_seed(seed)


def site_of(matrix, **fields):
    shape = tuple(matrix.shape)
    return Site("fc", "linear", "Linear", shape, 0, (("fc", "weight"),), **fields)


def problem_of(matrix, scheme, moments, **fields):
    site = site_of(matrix, **fields)
    bench = Bench(matrix, site, None, UNCORRECTED)
    return SiteProblem(site, matrix, quantize_weight(matrix, site, scheme), moments, bench.once)


def statistics_of(moments, means=None):
    """Return what calibration would have seen, of second moments and means alone."""
    spread = moments
    if means is not None:
        own = means[:, :, None] * means[:, None, :]
        spread = moments - (means.square() if moments.dim() == 2 else own)
    return SiteStatistics(None, spread, means, centers=means)


def rounded(matrix, scheme, moments, **fields):
    """Return the weight as a recipe gets it: by its rounding, or nearest where that is better."""
    bench = Bench(matrix, site_of(matrix, **fields), statistics_of(moments), UNCORRECTED)
    return bench.round(scheme)


def data(rows, columns, seed=0, rank=None):
    """Return correlated inputs [rows, columns]; of few directions and some noise where ``rank``."""
    g = generator(seed)
    if rank is None:
        return torch.randn(rows, columns, generator=g) @ torch.randn(columns, columns, generator=g)
    mixing = torch.randn(rank, columns, generator=g)
    noise = torch.randn(rows, columns, generator=g)
    return torch.randn(rows, rank, generator=g) @ mixing + 0.1 * noise


def moments_of(x):
    return (x.T @ x / len(x))[None]


def weights(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=generator(1000 + seed))


def on_grid(weight, bits):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return bool(((weight.q >= low) & (weight.q <= high)).all()) and bool(
        torch.isfinite(weight.matrix()).all()
    )


@pytest.mark.parametrize(("bits", "columns"), [(2, 4), (2, 5), (2, 6), (3, 4)])
def test_it_lies_between_the_best_of_all_roundings_and_nearest(bits, columns):
    ends = range(-(2 ** (bits - 1)), 2 ** (bits - 1))
    every = torch.tensor(list(itertools.product(ends, repeat=columns)))
    best, found, nearest = [], [], []
    for seed in range(40):
        matrix, moments = weights(1, columns, seed), moments_of(data(50, columns, seed))
        problem = problem_of(matrix, WeightScheme(bits), moments)
        delta = (every * problem.nearest.qparams.scale - matrix).double()
        best.append(float(((delta @ moments[0].double()) * delta).sum(1).min()))
        scheme = WeightScheme(bits, rounding=GPTQ())
        found.append(problem.error(rounded(matrix, scheme, moments)))
        nearest.append(problem.error(problem.nearest))
    tolerance = 1 + 1e-4
    assert all(b <= tolerance * f for b, f in zip(best, found, strict=True))
    assert all(f <= n for f, n in zip(found, nearest, strict=True))
    assert sum(found) - sum(best) < 0.35 * (sum(nearest) - sum(best))
    # Of so few inputs it is the optimum itself more often than not.
    assert sum(f <= tolerance * b for b, f in zip(best, found, strict=True)) > 20


def eliminated(problem, damping):
    """Return the integers of one weight after another, H⁻¹ updated by elimination after each.

    Optimal Brain Quantization in a fixed order, as the papers have it: no Cholesky factor and no
    blocks.
    """
    p, groups = problem.nearest.qparams, len(problem.moments)
    each = [
        from_blocks(x.expand_as(problem.blocks()), problem.matrix.shape)
        for x in (p.scale, p.zero_point)
    ]
    scale, zero = (x.double() for x in each)
    weight, q = problem.matrix.double().clone(), torch.zeros_like(problem.matrix)
    per_group = len(weight) // groups
    for group, hessian in enumerate(problem.moments.double()):
        rows = slice(group * per_group, (group + 1) * per_group)
        n = len(hessian)
        inverse = torch.linalg.inv(hessian + damping * hessian.diagonal().mean() * torch.eye(n))
        for i in range(n):
            level = torch.round(weight[rows, i] / scale[rows, i]) + zero[rows, i]
            q[rows, i] = level.clamp(p.qmin, p.qmax).float()
            error = weight[rows, i] - (q[rows, i] - zero[rows, i]) * scale[rows, i]
            weight[rows, i:] -= (error / inverse[i, i])[:, None] * inverse[i, i:]
            inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return q


GRIDS = [
    ("per_channel", "symmetric"),
    ("per_channel", "asymmetric"),
    ("per_tensor", "symmetric"),
    ("per_tensor", "asymmetric"),
]


@pytest.mark.parametrize("columns", [2, 31, 64, 65, 100, 130])
@pytest.mark.parametrize(("granularity", "scheme"), GRIDS)
@pytest.mark.parametrize("bits", [2, 4])
def test_it_is_the_formula_of_the_papers(columns, granularity, scheme, bits):
    matrix, moments = weights(8, columns), moments_of(data(400, columns, rank=5))
    choice = WeightScheme(bits, granularity, scheme)
    problem = problem_of(matrix, choice, moments)
    found = GPTQ(0.02, act_order=False).fit(problem)
    assert torch.equal(found.q, eliminated(problem, 0.02).to(torch.int8))
    assert columns == 2 or not torch.equal(found.q, problem.nearest.q)
    # On the grid of nearest rounding, which was calibrated.
    assert torch.equal(found.qparams.scale, problem.nearest.qparams.scale)
    assert torch.equal(found.qparams.zero_point, problem.nearest.qparams.zero_point)


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("columns", [32, 96, 160])
def test_groups_of_inputs_keep_their_own_scales(columns, scheme):
    spread = torch.repeat_interleave(torch.tensor([0.1, 1.0, 5.0, 0.3, 2.0])[: columns // 32], 32)
    matrix, moments = weights(6, columns) * spread, moments_of(data(500, columns, rank=5))
    problem = problem_of(matrix, WeightScheme(4, "per_group_32", scheme), moments)
    found = GPTQ(act_order=False).fit(problem)
    assert torch.equal(found.q, eliminated(problem, 0.01).to(torch.int8))
    blocks = dequantize(to_blocks(found.q, "per_group_32"), problem.nearest.qparams)
    assert torch.equal(found.matrix(), from_blocks(blocks, matrix.shape))
    ordered = GPTQ().fit(problem)
    assert problem.error(ordered) < 0.6 * problem.error(problem.nearest)


def test_the_strongest_input_is_rounded_first_as_if_it_were_written_first():
    matrix, x = weights(6, 70), data(300, 70, rank=4) * torch.linspace(0.5, 3.0, 70)
    moments = moments_of(x)
    order = moments[0].diagonal().argsort(descending=True)
    found = GPTQ().fit(problem_of(matrix, WeightScheme(3), moments))
    sorted_moments = moments[:, order][:, :, order]
    plain = GPTQ(act_order=False).fit(
        problem_of(matrix[:, order].contiguous(), WeightScheme(3), sorted_moments)
    )
    assert torch.equal(found.q[:, order], plain.q)
    as_they_come = GPTQ(act_order=False).fit(problem_of(matrix, WeightScheme(3), moments))
    assert not torch.equal(as_they_come.q, found.q)


@pytest.mark.parametrize("seed", range(4))
def test_the_order_in_which_inputs_are_written_changes_nothing(seed):
    matrix, moments = weights(6, 70, seed), moments_of(data(300, 70, seed, rank=6))
    shuffle = torch.randperm(70, generator=generator(seed))
    one = GPTQ().fit(problem_of(matrix, WeightScheme(3), moments))
    moved = moments[:, shuffle][:, :, shuffle]
    two = GPTQ().fit(problem_of(matrix[:, shuffle].contiguous(), WeightScheme(3), moved))
    assert torch.equal(one.q[:, shuffle], two.q)


def test_channels_do_not_know_of_each_other():
    matrix, moments = weights(6, 40), moments_of(data(300, 40, rank=4))
    whole = GPTQ().fit(problem_of(matrix, WeightScheme(3), moments))
    for i in range(len(matrix)):
        alone = GPTQ().fit(problem_of(matrix[i : i + 1], WeightScheme(3), moments))
        assert torch.equal(alone.q[0], whole.q[i])


def calibrated(layer, x):
    prepared = prepare(nn.Sequential(copy.deepcopy(layer)).eval(), lambda m: m(x))
    return prepared, calibrate(prepared, [x], lambda m, b: m(b))["0"]


def of_layer(layer, x, scheme, correction=UNCORRECTED):
    """Return what a layer's own calibration makes of its weight by ``scheme``."""
    prepared, known = calibrated(layer, x)
    (site,) = prepared.sites
    return Bench(prepared.slots["0"].parameter, site, known, correction).round(scheme)


def smooth(*shape):
    """Return images whose neighbouring pixels are alike."""
    x = torch.randn(*shape, generator=generator(3))
    return x.cumsum(-1) * 0.5 + 0.3


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_groups_of_a_convolution_are_rounded_as_convolutions_of_their_own(groups):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(8, 16, 3, padding=1, groups=groups), smooth(6, 8, 9, 9)
    scheme = WeightScheme(3, rounding=GPTQ())
    whole = of_layer(layer, x, scheme).dequantize()
    assert not torch.equal(whole, of_layer(layer, x, WeightScheme(3)).dequantize())
    inputs, outputs = 8 // groups, 16 // groups
    for group in range(groups):
        part = nn.Conv2d(inputs, outputs, 3, padding=1)
        rows = slice(group * outputs, (group + 1) * outputs)
        with torch.no_grad():
            part.weight.copy_(layer.weight[rows])
        own = x[:, group * inputs : (group + 1) * inputs]
        assert torch.equal(of_layer(part, own, scheme).dequantize(), whole[rows])


def measured(layer, weight, x):
    """Return the mean squared change of the output, by running the layer."""
    with torch.no_grad():
        before, own = layer(x).double(), layer.weight.clone()
        layer.weight.copy_(weight)
        after = layer(x).double()
        layer.weight.copy_(own)
    change = after - before
    return float(change.square().mean())


LAYERS = {
    "linear": (lambda: nn.Linear(96, 24), lambda: data(400, 96, rank=6)),
    "conv1d": (lambda: nn.Conv1d(4, 8, 5, padding=2), lambda: smooth(8, 4, 40)),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, stride=2), lambda: smooth(6, 4, 15, 15)),
    "grouped": (lambda: nn.Conv2d(8, 8, 3, groups=4), lambda: smooth(6, 8, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8, padding=1), lambda: smooth(6, 8, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2), lambda: smooth(4, 2, 5, 5, 6)),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1),
        lambda: smooth(6, 4, 8, 8),
    ),
    "transposed, grouped": (
        lambda: nn.ConvTranspose1d(8, 6, 4, stride=2, groups=2),
        lambda: smooth(6, 8, 20),
    ),
}


LITTLE = ("depthwise", "conv3d", "transposed", "transposed, grouped")
"""Kernels of few weights, or of which few meet in one output: little to make up with."""


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bits", [4, 3])
def test_the_output_of_every_kind_of_layer_changes_much_less(kind, bits):
    torch.manual_seed(0)
    layer, x = LAYERS[kind][0]().eval(), LAYERS[kind][1]()
    errors = [
        measured(layer, of_layer(layer, x, scheme).dequantize(), x)
        for scheme in (WeightScheme(bits), WeightScheme(bits, rounding=GPTQ()))
    ]
    assert errors[1] < (0.8 if kind in LITTLE else 0.5) * errors[0]


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("calibration", ["max", "mse", "output_mse"])
def test_correlated_inputs_are_worth_more_than_a_bit(bits, calibration):
    torch.manual_seed(1)
    layer, x = nn.Linear(128, 32), data(1000, 128, rank=8)
    gptq = WeightScheme(bits, calibration=calibration, rounding=GPTQ())
    wider = WeightScheme(bits + 1, calibration=calibration)
    found, nearest = (measured(layer, of_layer(layer, x, s).dequantize(), x) for s in (gptq, wider))
    assert found < nearest


def test_with_a_corrected_bias_errors_are_made_small_about_the_mean():
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 12), data(300, 48, rank=4) + 4.0
    scheme = WeightScheme(3, rounding=GPTQ())
    _, known = calibrated(layer, x)
    moments = known.second_moments(centered=True)
    matrix = layer.weight.detach()
    about, whole = (
        float(exact_output_error(of_layer(layer, x, scheme, c).matrix() - matrix, moments))
        for c in (BIAS, UNCORRECTED)
    )
    assert about < whole


# ---- data that leave the inverse undefined


def deaf(x):
    return x * (torch.arange(x.shape[1]) % 3 > 0)


def doubled(x):
    return torch.cat([x[:, : x.shape[1] // 2]] * 2, 1)


SINGULAR = {
    "dead inputs": lambda n: deaf(data(300, n, rank=6)),
    "one live input": lambda n: data(300, n, rank=6) * (torch.arange(n) == 1),
    "fewer samples than inputs": lambda n: data(5, n),
    "one sample": lambda n: data(1, n),
    "an input twice": lambda n: doubled(data(300, n + n % 2, rank=6))[:, :n],
    "dead and few": lambda n: deaf(data(4, n)),
    "no noise at all": lambda n: data(300, n) * 0.0,
    "tiny": lambda n: data(300, n, rank=6) * 1e-18,
    "huge": lambda n: data(300, n, rank=6) * 1e15,
    "from tiny to huge": lambda n: data(300, n, rank=6) * torch.logspace(-6, 6, n),
}


@pytest.mark.parametrize("kind", SINGULAR)
@pytest.mark.parametrize(
    ("columns", "granularity"),
    [
        *itertools.product([2, 64, 95], ["per_channel", "per_tensor"]),
        *itertools.product([32, 96], ["per_group_32"]),
    ],
)
@pytest.mark.parametrize("act_order", [True, False])
def test_moments_that_are_singular_are_no_obstacle(kind, columns, granularity, act_order):
    matrix, moments = weights(4, columns), moments_of(SINGULAR[kind](columns))
    for scheme in ("symmetric", "asymmetric"):
        choice = WeightScheme(3, granularity, scheme, rounding=GPTQ(act_order=act_order))
        problem = problem_of(matrix, choice, moments)
        assert on_grid(GPTQ(act_order=act_order).fit(problem), 3)
        found = rounded(matrix, choice, moments)
        assert problem.error(found) <= problem.error(problem.nearest)


def test_inputs_that_are_always_0_are_rounded_to_the_nearest_and_bother_no_other():
    x = data(300, 60, rank=6)
    dead = torch.arange(60) % 3 == 0
    matrix, moments = weights(4, 60), moments_of(deaf(x))
    problem = problem_of(matrix, WeightScheme(3), moments)
    found = GPTQ().fit(problem)
    assert torch.equal(found.q[:, dead], problem.nearest.q[:, dead])
    assert not torch.equal(found.q, problem.nearest.q)
    # Damping is a share of the mean power, in which dead inputs count.
    live = GPTQ(0.01 * float((~dead).double().mean()))
    scale, delta = problem.nearest.qparams.scale, moments[:, ~dead][:, :, ~dead]
    alone = problem_of(matrix[:, ~dead].contiguous(), WeightScheme(3), delta)
    alone.nearest.qparams.scale.copy_(scale)
    assert torch.equal(live.fit(alone).q, found.q[:, ~dead])


def test_without_any_input_it_is_nearest_rounding():
    matrix = weights(4, 40)
    nearest = problem_of(matrix, WeightScheme(3), None).nearest
    for moments in (torch.zeros(1, 40, 40), torch.zeros(1, 40), torch.rand(1, 40), None):
        problem = problem_of(matrix, WeightScheme(3), moments)
        assert torch.equal(GPTQ().fit(problem).q, nearest.q)
        found = rounded(matrix, WeightScheme(3, rounding=GPTQ()), moments)
        assert torch.equal(found.q, nearest.q)


def test_uncorrelated_inputs_have_nothing_to_make_up():
    matrix, power = weights(5, 70), torch.rand(1, 70, generator=generator(0)) + 0.1
    problem = problem_of(matrix, WeightScheme(3), torch.diag_embed(power))
    assert torch.equal(GPTQ().fit(problem).q, problem.nearest.q)


def test_of_an_input_twice_one_makes_up_for_the_other():
    x = doubled(data(300, 40))
    matrix, moments = weights(8, 40), moments_of(x)
    problem = problem_of(matrix, WeightScheme(3), moments)
    assert problem.error(GPTQ().fit(problem)) < 0.5 * problem.error(problem.nearest)


def test_moments_that_are_none_leave_the_nearest():
    matrix, scheme = weights(4, 6), WeightScheme(3, rounding=GPTQ())
    found = rounded(matrix, scheme, -torch.eye(6)[None] - 0.5)
    assert torch.equal(found.q, quantize_weight(matrix, site_of(matrix), scheme).q)


def test_moments_that_calibration_did_not_keep_are_missed():
    matrix = weights(4, 6)
    known = statistics_of(moments_of(data(50, 6))).keep(frozenset({Need.RANGE}))
    bench = Bench(matrix, site_of(matrix), known, UNCORRECTED)
    with pytest.raises(MissingStatistics, match="second moments"):
        bench.round(WeightScheme(3, rounding=GPTQ()))


@st.composite
def cases(draw):
    """Return a weight, moments of few or many samples, and a scheme."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    columns = draw(st.sampled_from([1, 2, 3, 7, 32, 64, 70]))
    grains = ["per_channel", "per_tensor"] + ["per_group_32"] * (columns % 32 == 0)
    seed = draw(st.integers(0, 10**6))
    channels = groups * draw(st.integers(1, 3))
    rows = draw(st.integers(1, 80))
    x = torch.stack([data(rows, columns, seed + i) for i in range(groups)])
    x = x * 10.0 ** draw(st.integers(-4, 4)) + draw(st.sampled_from([0.0, 0.0, 5.0]))
    moments = x.mT @ x / rows
    if draw(st.sampled_from([False, False, False, True])):
        moments = moments.diagonal(dim1=1, dim2=2)
    scheme = WeightScheme(
        draw(st.integers(2, 8)),
        draw(st.sampled_from(grains)),
        draw(st.sampled_from(["symmetric", "asymmetric"])),
        draw(st.sampled_from(["max", "mse", "output_mse"])),
        GPTQ(draw(st.sampled_from([1e-6, 0.01, 1.0, 10.0])), draw(st.booleans())),
    )
    matrix = weights(channels, columns, seed) * 10.0 ** draw(st.integers(-6, 3))
    return matrix, moments, scheme, groups


@given(cases(), st.sampled_from([UNCORRECTED, BIAS]))
@settings(max_examples=120, deadline=None)
def test_it_stays_on_the_grid_and_is_never_worse_than_nearest(case, correction):
    matrix, moments, scheme, groups = case
    known = statistics_of(moments, torch.zeros(groups, matrix.shape[1]))
    site = site_of(matrix, groups=groups)
    bench = Bench(matrix, site, known, correction)
    found = bench.round(scheme)
    nearest = quantize_weight(matrix, site, scheme, known.output_error(corrected=False))
    errors = [float(exact_output_error(q.matrix() - matrix, moments)) for q in (found, nearest)]
    assert errors[0] <= errors[1]
    assert on_grid(found, scheme.bits)
    assert torch.equal(found.qparams.scale, nearest.qparams.scale)
    assert found.scheme == scheme
    again = Bench(matrix.clone(), site, known, correction).round(scheme)
    assert torch.equal(again.q, found.q)


def test_what_several_widths_share_changes_none_of_them():
    """A bench factors the moments once for all schemes; each is as it would be alone."""
    matrix, moments = weights(6, 70), moments_of(data(300, 70, rank=5))
    shared = Bench(matrix, site_of(matrix), statistics_of(moments), UNCORRECTED)
    roundings = GPTQ(), GPTQ(0.1), GPTQ(act_order=False)
    schemes = [
        WeightScheme(bits, grain, rounding=rounding)
        for bits in (4, 3, 2)
        for grain in ("per_channel", "per_tensor")
        for rounding in roundings
    ]
    for scheme in schemes:
        assert torch.equal(shared.round(scheme).q, rounded(matrix, scheme, moments).q)


@pytest.mark.parametrize("far", [1e3, 3e4])
def test_inputs_far_from_0_are_no_obstacle(far):
    """A layer behind a badly scaled input: its mean is 30,000 times what it differs by."""
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 16), torch.randn(2000, 64) + far * torch.rand(64)
    x[:, :8] = far
    prepared = prepare(nn.Sequential(layer).eval(), lambda m: m(x))
    known = calibrate(prepared, [x], lambda m, batch: m(batch))["0"]
    slot = prepared.slots["0"]
    centered = (x - x.mean(0)).double()
    errors = []
    for rounding in (NEAREST, GPTQ()):
        bench = Bench(slot.parameter, slot.site, known, BiasCorrection())
        made = bench.round(WeightScheme(3, rounding=rounding))
        delta = (made.matrix() - slot.parameter.detach()).double()
        errors.append(float((centered @ delta.T).square().mean()))
    assert errors[1] <= errors[0]
