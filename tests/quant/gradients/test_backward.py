"""The identity whose gradient is quantized, in autograd and in training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoquant.quant.gradients.backward import with_quantized_gradient
from autoquant.quant.gradients.format import GradientFormat
from tests.quant.gradients.test_grids import seeded


def test_forward_is_the_identity_and_both_products_get_the_quantized_gradient():
    fmt = GradientFormat("int4")
    layer = nn.Linear(5, 7)
    x = torch.randn(11, 5, generator=seeded(40), requires_grad=True)
    y = layer(x)
    out = with_quantized_gradient(y, fmt, seeded(41))
    assert torch.equal(out, y)
    delta = torch.randn(11, 7, generator=seeded(42))
    out.backward(delta)
    expected = fmt.quantize(delta, seeded(41))
    assert not torch.equal(expected, delta)
    assert torch.equal(layer.weight.grad, expected.T @ x)
    assert torch.equal(layer.bias.grad, expected.sum(0))
    assert torch.equal(x.grad, expected @ layer.weight)


def test_the_gradient_by_the_weight_has_no_bias():
    """E[δ̂ᵀ·x] = δᵀ·x: the product is linear in what is rounded."""
    x, delta = torch.randn(11, 5, generator=seeded(43)), torch.randn(11, 7, generator=seeded(44))
    weight = torch.zeros(7, 5, requires_grad=True)
    generator, draws = seeded(45), []
    for _ in range(2000):
        out = with_quantized_gradient(x @ weight.T, GradientFormat("log4"), generator)
        draws.append(torch.autograd.grad(out, weight, delta)[0].double())
    found = torch.stack(draws)
    error = found.std(0) / len(draws) ** 0.5
    assert ((found.mean(0) - (delta.T @ x).double()).abs() < 5 * error).all()


def test_it_is_reproducible_from_the_state_of_the_generator():
    fmt = GradientFormat("log4")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(9, 6, generator=seeded(46))

    def gradients(generator):
        y = with_quantized_gradient(net[0](x), fmt, generator)
        y = with_quantized_gradient(net[2](net[1](y)), fmt, generator)
        return torch.autograd.grad(y.square().sum(), list(net.parameters()))

    first, again, other = (gradients(seeded(s)) for s in (47, 47, 48))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_where_no_gradient_is_asked_for_nothing_is_drawn():
    generator = seeded(49)
    state = generator.get_state()
    y = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert not with_quantized_gradient(y, GradientFormat("log4"), generator).requires_grad
    assert not with_quantized_gradient(y.detach(), GradientFormat("log4"), generator).requires_grad
    assert torch.equal(generator.get_state(), state)


def test_an_activation_in_place_may_follow():
    fmt = GradientFormat("int8", "nearest")
    layer, x = nn.Linear(4, 3), torch.randn(5, 4, generator=seeded(50))
    out = nn.functional.relu(with_quantized_gradient(layer(x), fmt), inplace=True)
    out.square().sum().backward()
    positive = layer(x).relu()
    assert torch.equal(layer.weight.grad, fmt.quantize(2 * positive).T @ x)


def test_nan_reaches_the_parameters_and_errors_come_at_once():
    y = torch.ones(3, requires_grad=True)
    out = with_quantized_gradient(y, GradientFormat("int8", "nearest"))
    out.backward(torch.tensor([1.0, float("nan"), 2.0]))
    assert y.grad.isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="needs a generator"):
        with_quantized_gradient(y, GradientFormat("int8"))


def test_a_second_derivative_is_refused():
    y = torch.ones(3, requires_grad=True)
    out = with_quantized_gradient(y * y, GradientFormat("int8", "nearest"))
    (first,) = torch.autograd.grad(out.square().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def excess_loss(fmt: GradientFormat | None, seed: int) -> float:
    """Train a linear layer by least squares; return its loss less the smallest there is.

    One target is far from what a linear layer can say. Its gradient stays, and with it the scale:
    whatever is left of the others is soon below half a step.
    """
    generator = seeded(seed)
    x = torch.randn(64, 8, generator=generator)
    target = x @ torch.randn(8, 1, generator=generator)
    target += 0.1 * torch.randn(64, 1, generator=generator)
    target[0] += 30.0
    layer = nn.Linear(8, 1, bias=False)
    nn.init.zeros_(layer.weight)
    draws = seeded(seed + 1)
    for step in range(1500):
        y = layer(x) if fmt is None else with_quantized_gradient(layer(x), fmt, draws)
        (gradient,) = torch.autograd.grad((y - target).square().mean(), layer.weight)
        with torch.no_grad():
            layer.weight -= 0.05 * min(1.0, 200 / (step + 1)) * gradient

    def loss(weight):
        return (x.double() @ weight - target.double()).square().mean().item()

    best = torch.linalg.lstsq(x.double(), target.double()).solution
    return loss(layer.weight.detach().double().T) - loss(best)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_stalls_with_nearest_gradients_of_4_bits_and_not_with_stochastic_ones(seed):
    assert excess_loss(None, seed) < 1e-6
    for name in ("int4", "log4"):
        nearest = excess_loss(GradientFormat(name, "nearest"), seed)
        drawn = excess_loss(GradientFormat(name), seed)
        assert nearest > 10 * drawn
        assert nearest > 1e-3
