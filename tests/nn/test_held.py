"""A weight that is held packs once, counts its bytes, and gives its numbers when asked."""

import torch
from torch import nn

from autoquant.kernels.engine import Engine, make_engine
from autoquant.kernels.operation import LINEAR
from autoquant.nn.held import HeldWeight
from autoquant.nn.sites import find_sites
from autoquant.nn.weights import quantize_weight
from autoquant.spec.recipe import ActivationScheme, WeightScheme
from tests.kernels.cases import MOST_BITS

CPU = torch.device("cpu")
EIGHT = ActivationScheme(8, scale=0.1, zero_point=0)


def held(engine, scheme=None):
    torch.manual_seed(0)
    layer = nn.Linear(32, 6)
    (site,), _ = find_sites(layer)
    return HeldWeight(
        quantize_weight(layer.weight, site, scheme or WeightScheme(MOST_BITS)), engine
    ), layer


def test_products_are_packed_once_for_each_use():
    weight, _ = held(make_engine(CPU))
    first = weight.product(LINEAR, EIGHT, None, CPU)
    assert weight.product(LINEAR, EIGHT, None, CPU) is first
    part = weight.product(LINEAR, EIGHT, (2, 5), CPU)
    x = torch.randn(3, 32)
    torch.testing.assert_close(part(x, None), first(x, None)[:, 2:5])


def test_rows_of_every_granularity_are_those_of_the_whole():
    for granularity in ("per_tensor", "per_channel", "per_group_32"):
        weight, _ = held(Engine(), WeightScheme(4, granularity, "asymmetric"))
        whole = weight.quantized.dequantize()
        assert torch.equal(weight.quantized.rows(1, 4).dequantize(), whole[1:4])


def test_bytes_grow_with_what_is_made():
    weight, layer = held(make_engine(CPU))
    assert weight.bytes == 6 * 32
    assert weight.product(LINEAR, None, None, CPU) is None
    assert weight.bytes == 6 * 32
    weight.product(LINEAR, EIGHT, None, CPU)
    assert weight.bytes == 3 * 6 * 32
    real = weight.real(layer.weight)
    assert weight.real(layer.weight) is real
    assert torch.equal(real, weight.quantized.dequantize())
    assert weight.bytes == (3 + 4) * 6 * 32


def test_the_reference_has_no_products():
    weight, _ = held(Engine())
    assert weight.product(LINEAR, EIGHT, None, CPU) is None
