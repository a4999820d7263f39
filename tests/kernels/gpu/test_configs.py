"""Whatever the block sizes, the product is the same."""

import pytest
import torch

from autoquant.kernels.gpu import convolution, linear, weight_only
from autoquant.kernels.operation import LINEAR, Operation
from autoquant.kernels.reference import reference
from autoquant.spec.recipe import ActivationScheme

SCHEME = ActivationScheme(8, "per_token")
STATIC = ActivationScheme(8, scale=0.03, zero_point=-20)
CONV = Operation("conv2d", (1, 1), (1, 1), (1, 1))


def activation(shape, device):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("c", linear.SMALL + linear.LARGE)
def test_linear(backend, device, make_weight, agree, choose, c):
    choose(c)
    x, weight = activation((77, 45), device), make_weight((139, 45), 8, scheme="asymmetric")
    product = backend.prepare(LINEAR, weight, SCHEME, device)
    agree(product(x, None), reference(LINEAR, x, weight, SCHEME, None))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("c", convolution.DENSE + convolution.GROUPED)
def test_dense(backend, device, make_weight, agree, choose, c):
    choose(c)
    x, weight = activation((2, 5, 9, 8), device), make_weight((70, 5, 3, 3), 8, scheme="asymmetric")
    product = backend.prepare(CONV, weight, SCHEME, device)
    agree(product(x, None), reference(CONV, x, weight, SCHEME, None))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("c", convolution.DEPTHWISE)
def test_depthwise(backend, device, make_weight, agree, choose, c):
    choose(c)
    operation = Operation("conv2d", (1, 1), (1, 1), (1, 1), 70)
    x, weight = activation((1, 70, 5, 6), device), make_weight((70, 1, 3, 3))
    product = backend.prepare(operation, weight, SCHEME, device)
    agree(product(x, None), reference(operation, x, weight, SCHEME, None))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("rows", "c"),
    [(2, c) for c in weight_only.VECTOR] + [(18, c) for c in weight_only.MATRIX],
)
def test_weight_only(backend, device, make_weight, agree, choose, rows, c):
    choose(c)
    x, weight = activation((rows, 130), device), make_weight((39, 130), 4)
    product = backend.prepare(LINEAR, weight, None, device)
    agree(product(x, None), reference(LINEAR, x, weight, None, None))


@pytest.mark.usefixtures("poisoned", "flag")
@pytest.mark.parametrize("c", linear.SMALL + linear.CHAINED_LARGE)
def test_chained_linear(backend, device, make_weight, agree, choose, c):
    choose(c)
    x, weight = activation((77, 48), device), make_weight((139, 48), 8, scheme="asymmetric")
    product = backend.prepare(LINEAR, weight, STATIC, device)
    agree(product(x, None), reference(LINEAR, x, weight, STATIC, None))
