"""What the tests of kernels share: random operations, weights and activations."""

from collections.abc import Callable

from hypothesis import strategies as st
from torch import Tensor

from autoquant.kernels.cpu.instructions import has_vnni
from autoquant.kernels.operation import LINEAR, Operation
from autoquant.nn.weights import weight_qparams
from autoquant.quant.affine import choose_qparams, quantize
from autoquant.quant.blocks import from_blocks, to_blocks, to_matrix
from autoquant.quant.weight import QuantizedWeight
from autoquant.spec.recipe import ActivationScheme, WeightScheme

SCHEMES = ("symmetric", "asymmetric")
MOST_BITS = 8 if has_vnni() else 7
"""Widest symmetric weights whose products with 8-bit activations oneDNN adds up exactly here."""


def quantized(weight: Tensor, scheme: WeightScheme) -> QuantizedWeight:
    matrix = to_matrix(weight, 0)
    p = weight_qparams(matrix, scheme)
    q = quantize(to_blocks(matrix, scheme.granularity), p)
    shape = (matrix.shape[0], matrix.shape[1])
    return QuantizedWeight(from_blocks(q, shape), p, scheme, tuple(weight.shape), 0)


def calibrated(scheme: ActivationScheme, x: Tensor, share: float = 0.8) -> ActivationScheme:
    """Return ``scheme`` with the scale of a part of x's range, so that both ends saturate."""
    if scheme.dynamic:
        return scheme
    p = choose_qparams(x.min() * share, x.max() * share, scheme.bits, symmetric=scheme.symmetric)
    return ActivationScheme(
        scheme.bits,
        scheme.granularity,
        scheme.scheme,
        scale=p.scale.item(),
        zero_point=int(p.zero_point.item()),
    )


@st.composite
def operations(draw: Callable) -> tuple[Operation, tuple[int, ...], tuple[int, ...]]:
    """Draw an operation with the shapes of an activation and a weight that it takes."""
    axes = draw(st.integers(0, 3))
    if axes == 0:
        ins, outs = draw(st.integers(1, 70)), draw(st.integers(1, 40))
        lead = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
        return LINEAR, (*lead, ins), (outs, ins)

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    groups = draw(st.sampled_from((1, 1, 2, 3, 5)))
    depthwise = draw(st.booleans())
    ins = groups if depthwise else groups * draw(st.integers(1, 6))
    outs = groups * draw(st.integers(1, 5))
    kernel, dilation = each(1, 3), each(1, 2)
    operation = Operation(f"conv{axes}d", each(1, 2), each(0, 2), dilation, groups)
    least = [max(d * (k - 1) + 1, 2) for k, d in zip(kernel, dilation, strict=True)]
    size = tuple(n + draw(st.integers(0, 4)) for n in least)
    return operation, (draw(st.integers(1, 3)), ins, *size), (outs, ins // groups, *kernel)
