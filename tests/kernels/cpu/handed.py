"""What a product hands on, checked against what it computes itself."""

import torch

from autoquant.kernels.cpu import native
from autoquant.kernels.operation import SchemeReader
from autoquant.spec.formats import FORMATS


def check_handed(product, x, bias, clamp, reader, gelu=None, smoothing=None):
    """Check the bytes that a product hands on against its own real output."""
    stored = product.stored(x)
    assert stored is not None
    y = product.real(stored, bias, clamp, True)
    y = y if gelu is None else torch.nn.functional.gelu(y, approximate=gelu)
    q = product.handed(stored, bias, clamp, SchemeReader(reader, smoothing), gelu)
    assert q is not None
    y = y if smoothing is None else smoothing.of_input(y)
    assert q.dtype == torch.uint8
    assert q.shape == y.shape
    grid, zero_point = FORMATS[reader.bits], reader.zero_point or 0
    exact = (y.double() / reader.scale + zero_point).clamp(grid.qmin, grid.qmax)
    # Nothing is further than half a step away, but for the rounding of float32 itself.
    error = (q.double() - native.OFFSET - exact).abs()
    assert float(error.max()) <= 0.5 + 1e-4
    return q
