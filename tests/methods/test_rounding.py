import pytest
import torch
from torch import nn

from autoquant.methods.rounding import learn_rounding, output_error
from autoquant.nn.calibrate import calibrate
from autoquant.nn.convert import prepare
from autoquant.nn.weights import quantize_weight
from autoquant.spec.recipe import WeightScheme


def correlated(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(4, columns, generator=generator)
    noise = torch.randn(rows, columns, generator=generator)
    return torch.randn(rows, 4, generator=generator) @ mixing + 0.1 * noise


def site_and_moments(layer, x):
    prepared = prepare(nn.Sequential(layer).eval(), lambda m: m(x))
    statistics = calibrate(prepared, [x], lambda m, b: m(b))
    return prepared.sites[0], statistics["0"].moments


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(24, 8, bias=False), correlated(200, 24)),
        (nn.Conv2d(4, 6, 3, bias=False), torch.randn(4, 4, 7, 7)),
        (nn.Conv2d(4, 6, 3, 2, 2, 2, groups=2, bias=False), torch.randn(4, 4, 9, 9)),
        (nn.Conv2d(4, 4, 3, groups=4, padding="same", bias=False), torch.randn(4, 4, 6, 6)),
        (
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", bias=False),
            torch.randn(4, 4, 6, 6),
        ),
        (nn.Conv1d(4, 6, 3, padding=1, bias=False), torch.randn(5, 4, 9)),
    ],
)
def test_the_output_error_is_the_one_that_is_measured(layer, x):
    torch.manual_seed(0)
    site, moments = site_and_moments(layer, x)
    weight = layer.weight.detach()
    rounded = quantize_weight(weight, site, WeightScheme(3)).dequantize()
    predicted = output_error((rounded - weight).reshape(site.matrix), moments, site.groups)
    with torch.no_grad():
        before = layer._parameters["weight"].clone()
        y = nn.Sequential(layer)(x)
        layer._parameters["weight"].copy_(rounded)
        change = nn.Sequential(layer)(x) - y
        layer._parameters["weight"].copy_(before)
    channel = 1 if x.dim() > 2 else -1
    measured = change.square().movedim(channel, 0).flatten(1).mean(1).sum()
    assert torch.allclose(predicted, measured, rtol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("granularity", ["per_channel", "per_group_32", "per_tensor"])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_learning_beats_rounding_to_nearest_on_correlated_inputs(bits, granularity, scheme):
    torch.manual_seed(1)
    layer, x = nn.Linear(64, 16), correlated(500, 64)
    site, moments = site_and_moments(layer, x)
    weight = layer.weight.detach()
    choice = WeightScheme(bits, granularity, scheme, "mse")
    nearest = quantize_weight(weight, site, choice)
    learned = learn_rounding(weight, site, choice, moments, 0.05)
    errors = [float(output_error(q.matrix() - weight, moments)) for q in (nearest, learned)]
    assert errors[1] < 0.7 * errors[0]
    again = learn_rounding(weight, site, choice, moments, 0.05)
    assert torch.equal(again.q, learned.q)
    assert torch.equal(again.qparams.scale, learned.qparams.scale)


@pytest.mark.parametrize("rate", [1e-6, 0.01, 10.0])
def test_learning_is_never_worse_than_nearest(rate):
    torch.manual_seed(2)
    layer, x = nn.Linear(32, 8), torch.randn(200, 32)
    site, moments = site_and_moments(layer, x)
    weight = layer.weight.detach()
    choice = WeightScheme(4)
    nearest = quantize_weight(weight, site, choice)
    learned = learn_rounding(weight, site, choice, moments, rate, steps=20)
    grid = learned.q.float()
    assert grid.min() >= -8
    assert grid.max() <= 7
    assert output_error(learned.matrix() - weight, moments) <= output_error(
        nearest.matrix() - weight, moments
    ) * (1 + 1e-6)
