"""Learned rounding: its objective is the error that is measured, and it never loses to nearest."""

import copy

import pytest
import torch
from torch import nn

from autoquant.methods.problem import Bench, SiteProblem
from autoquant.methods.rounding.learned_rounding import LearnedRounding, learn
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import prepare
from autoquant.nn.weights import quantize_weight
from autoquant.observers.output_error import exact_output_error
from autoquant.quant.blocks import to_matrix
from autoquant.spec.recipe import WeightScheme
from autoquant.spec.techniques import UNCORRECTED


def correlated(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(4, columns, generator=generator)
    noise = torch.randn(rows, columns, generator=generator)
    return torch.randn(rows, 4, generator=generator) @ mixing + 0.1 * noise


def ready(layer, x):
    """Return the prepared model of one layer and its statistics on ``x``."""
    prepared = prepare(nn.Sequential(layer).eval(), lambda m: m(x))
    return prepared, calibrate(prepared, [x], lambda m, b: m(b))


def site_and_moments(layer, x):
    prepared, statistics = ready(layer, x)
    return prepared.sites[0], statistics["0"].moments


def problem_of(weight, site, scheme, moments):
    matrix, bench = to_matrix(weight, site.channel_axis), Bench(weight, site, None, UNCORRECTED)
    return SiteProblem(site, matrix, quantize_weight(weight, site, scheme), moments, bench.once)


def images(channels, size):
    return torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(0))


def measured_error(layer, change, x):
    """Return Σ over channels of the mean squared change of the output."""
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight += change
        difference = (other(x) - layer(x)).double()
    channel = 1 if x.dim() > 2 else -1
    return difference.square().movedim(channel, 0).flatten(1).mean(1).sum().float()


LAYERS = [
    (nn.Linear(24, 8), correlated(200, 24)),
    (nn.Conv2d(4, 6, 3), images(4, 7)),
    (nn.Conv2d(4, 6, 3, 2, 2, 2, groups=2), images(4, 9)),
    (nn.Conv2d(4, 8, 3, groups=4, padding="same"), images(4, 6)),
    (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), images(4, 6)),
    (nn.Conv1d(4, 6, 3, padding=1), images(4, 9)[..., 0]),
]


@pytest.mark.parametrize(("layer", "x"), LAYERS, ids=[str(layer) for layer, _ in LAYERS])
def test_the_output_error_is_the_one_that_is_measured(layer, x):
    site, moments = site_and_moments(copy.deepcopy(layer), x)
    rounded = quantize_weight(layer.weight, site, WeightScheme(3)).dequantize()
    change = rounded - layer.weight.detach()
    predicted = exact_output_error(change.reshape(site.matrix), moments)
    torch.testing.assert_close(predicted, measured_error(layer, change, x), rtol=1e-4, atol=0)


def test_the_output_error_of_a_recurrent_weight_is_that_of_its_projection():
    torch.manual_seed(0)
    gru, x = nn.GRU(5, 4, batch_first=True), torch.randn(3, 6, 5)
    prepared = prepare(gru.eval(), lambda m: m(x))
    statistics = calibrate(prepared, [x], lambda m, b: m(b))
    with torch.no_grad():
        states = torch.cat([torch.zeros(3, 1, 4), gru(x)[0][:, :-1]], 1)
    for name, rows in (("weight_ih_l0", x), ("weight_hh_l0", states)):
        (site,) = (site for site in prepared.sites if site.name == name)
        weight = prepared.slots[name].parameter
        change = (quantize_weight(weight, site, WeightScheme(2)).dequantize() - weight).detach()
        measured = (rows @ change.T).square().mean((0, 1)).sum()
        predicted = exact_output_error(change, statistics[name].moments)
        torch.testing.assert_close(predicted, measured, rtol=1e-4, atol=0)


def test_the_output_error_of_a_diagonal_and_of_white_inputs():
    change = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    diagonal = torch.rand(2, 4, generator=torch.Generator().manual_seed(1))
    whole = exact_output_error(change, torch.diag_embed(diagonal))
    torch.testing.assert_close(exact_output_error(change, diagonal), whole)
    white = exact_output_error(change, torch.eye(4)[None])
    torch.testing.assert_close(exact_output_error(change, None), white)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("granularity", ["per_channel", "per_group_32", "per_tensor"])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_learning_beats_nearest_on_correlated_inputs_and_is_deterministic(
    bits, granularity, scheme
):
    torch.manual_seed(1)
    layer, x = nn.Linear(64, 16), correlated(500, 64)
    site, moments = site_and_moments(copy.deepcopy(layer), x)
    weight = layer.weight.detach()
    choice = WeightScheme(bits, granularity, scheme, "mse")
    problem = problem_of(weight, site, choice, moments)
    nearest, learned = problem.nearest, learn(problem, 0.05)
    errors = [measured_error(layer, q.matrix() - weight, x) for q in (nearest, learned)]
    assert errors[1] < 0.7 * errors[0]
    assert not torch.equal(learned.q, nearest.q)
    again = LearnedRounding(0.05).fit(problem_of(weight.clone(), site, choice, moments))
    assert torch.equal(again.q, learned.q)
    assert torch.equal(again.qparams.scale, learned.qparams.scale)


def test_learning_works_where_gradients_are_off_and_on_a_grouped_convolution():
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 3, groups=2, padding=1)
    smooth = nn.functional.avg_pool2d(torch.randn(4, 8, 20, 20), 5, 1)
    site, moments = site_and_moments(copy.deepcopy(layer), smooth)
    choice, weight = WeightScheme(3, "per_channel"), layer.weight.detach()
    problem = problem_of(weight, site, choice, moments)
    nearest = problem.nearest.dequantize()
    with torch.no_grad():
        learned = learn(problem, 0.05).dequantize()
    better = measured_error(layer, learned - weight, smooth)
    assert better < 0.7 * measured_error(layer, nearest - weight, smooth)


@pytest.mark.parametrize("rate", [1e-6, 0.01, 10.0, 1e30])
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("known", ["full", "diagonal", "nothing", "zeros"])
def test_learning_is_never_worse_than_nearest_and_stays_on_the_grid(rate, bits, known):
    torch.manual_seed(2)
    layer, x = nn.Linear(32, 8), correlated(200, 32)
    site, moments = site_and_moments(copy.deepcopy(layer), x)
    moments = {
        "full": moments,
        "diagonal": moments[0].diagonal()[None],
        "nothing": None,
        "zeros": torch.zeros_like(moments),
    }[known]
    weight = layer.weight.detach()
    choice = WeightScheme(bits, scheme="asymmetric")
    problem = problem_of(weight, site, choice, moments)
    nearest, learned = problem.nearest, learn(problem, rate, steps=15)
    assert -(2 ** (bits - 1)) <= learned.q.min()
    assert learned.q.max() <= 2 ** (bits - 1) - 1
    assert learned.matrix().isfinite().all()
    errors = [exact_output_error(q.matrix() - weight, moments) for q in (learned, nearest)]
    assert errors[0] <= errors[1] * (1 + 1e-6)


def test_what_is_learned_is_what_is_stored():
    """The integers and scales that come out give the weight that won, not one a step away."""
    torch.manual_seed(3)
    layer, x = nn.Linear(64, 4), correlated(300, 64, seed=5)
    site, moments = site_and_moments(copy.deepcopy(layer), x)
    weight, errors = layer.weight.detach(), []
    for steps in (1, 10, 40):
        learned = learn(problem_of(weight, site, WeightScheme(3), moments), 0.05, steps)
        assert (learned.qparams.scale > 0).all()
        errors.append(float(measured_error(layer, learned.matrix() - weight, x)))
    assert errors[2] < errors[1] < errors[0]
