"""A product that its backend can't transform the input of gets a transformed one."""

import torch

from autoquant.kernels.operation import LINEAR
from autoquant.kernels.reference import reference
from autoquant.kernels.transformed import transformed
from autoquant.quant.input_layout import Layout
from autoquant.quant.rotation import Rotation, hadamard
from autoquant.spec.recipe import ActivationScheme, WeightScheme
from tests.kernels.cases import quantized


class Product:
    """The reference, as a product."""

    backend = "plain"

    def __init__(self, weight, scheme):
        self.weight, self.scheme = weight, scheme

    def __call__(self, x, bias, clamp=None):
        y = reference(LINEAR, x, self.weight, self.scheme, bias)
        return y if clamp is None else y.clamp(*clamp)


def test_the_product_meets_what_the_transform_makes():
    torch.manual_seed(0)
    x, bias = torch.randn(5, 32), torch.randn(3)
    plain = Product(
        quantized(torch.randn(3, 32), WeightScheme(4)), ActivationScheme(8, "per_token")
    )
    rotation = Rotation(hadamard(16, x), Layout("linear", (3, 32), 1, 0))
    product = transformed(plain, rotation)
    assert product.backend == "plain"
    for clamp in (None, (0.0, 6.0)):
        expected = plain(rotation.of_input(x), bias, clamp)
        assert torch.equal(product(x, bias, clamp), expected)
        assert not torch.equal(plain(x, bias, clamp), expected)
    assert transformed(plain, None) is plain
    assert transformed(None, rotation) is None
