"""Convolutions that are handed int8 and hand int8 on, against the reference."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoquant.kernels.gpu import convolution
from autoquant.kernels.gpu.reading import FILLED, PIXELS
from autoquant.kernels.operation import LINEAR, Operation
from autoquant.kernels.reference import multiply, reference
from autoquant.quant.affine import quantize
from autoquant.spec.recipe import ActivationScheme
from tests.kernels.gpu.handed import AFTER, check_handed, covering, done, numbers, qparams

SCHEMES = ("symmetric", "asymmetric")
EIGHT = ActivationScheme(8, scale=0.03, zero_point=-20)
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # NumPy's
]


@dataclass(frozen=True)
class Case:
    x: tuple[int, ...]
    weight: tuple[int, ...]
    operation: Operation


CASES = {
    "filled": Case((2, 3, 6, 7), (9, 3, 3, 3), Operation("conv2d", (2, 2), (1, 1), (1, 1))),
    "filled_any": Case((1, 37, 4, 5), (9, 37, 2, 3), Operation("conv2d", (1, 1), (1, 1), (1, 1))),
    "any": Case((2, 8, 6, 7), (9, 8, 3, 3), Operation("conv2d", (1, 1), (1, 1), (1, 1))),
    "one_tap": Case((1, 64, 4, 3), (17, 64, 3, 2), Operation("conv2d", (2, 1), (1, 1), (1, 1))),
    "unpadded_tap": Case((1, 32, 4, 3), (5, 32, 2, 2), Operation("conv2d", (1, 1), (0, 0), (1, 1))),
    "unpadded": Case((2, 16, 9, 8), (17, 16, 3, 2), Operation("conv2d", (2, 3), (0, 0), (1, 1))),
    "dilated": Case((1, 4, 11, 9), (4, 4, 3, 3), Operation("conv2d", (1, 2), (2, 1), (2, 3))),
    "pointwise": Case((2, 48, 3, 5), (6, 48, 1, 1), Operation("conv2d", (2, 2), (0, 0), (1, 1))),
    "grouped": Case((2, 6, 5, 5), (8, 3, 3, 3), Operation("conv2d", (1, 1), (1, 1), (1, 1), 2)),
    "depthwise": Case((2, 9, 6, 5), (9, 1, 3, 3), Operation("conv2d", (2, 1), (1, 1), (1, 1), 9)),
    "multiplied": Case((1, 4, 5, 5), (12, 1, 3, 3), Operation("conv2d", (1, 1), (1, 0), (1, 2), 4)),
    "line": Case((2, 4, 12), (7, 4, 3), Operation("conv1d", (2,), (2,), (1,))),
    "line_filled": Case((2, 5, 12), (7, 5, 3), Operation("conv1d", (1,), (1,), (1,))),
    "line_depthwise": Case((2, 5, 9), (5, 1, 4), Operation("conv1d", (1,), (1,), (2,), 5)),
}


def agrees(backend, device, make_weight, agree, case, w_scheme, seed=0):
    x, bias = numbers(case.x, device, seed), numbers(case.weight[:1], device, 2)
    weight = make_weight(case.weight, 8, "per_channel", w_scheme, dead=[0])
    for bits, scheme, own in ((8, "asymmetric", bias), (5, "symmetric", None)):
        a = covering(x, bits, scheme)
        product = backend.prepare(case.operation, weight, a, device)
        q = product.stored(x)
        assert product.takes(q)
        assert torch.equal(q, quantize(x, qparams(a, device)))
        expected = reference(case.operation, x, weight, a, own)
        for last in (False, True):
            y = product.real(q, own, None, last)
            agree(y, expected)
            assert (y.movedim(1, -1) if last and y.dim() == 4 else y).is_contiguous()
        agree(product(x, own), expected)
        read = covering(expected, bits, scheme)
        reader = backend.prepare(case.operation, make_weight(case.weight), read, device).reads
        if product.reads.layout == FILLED:
            assert product.handed(q, own, None, product.reads) is None
            reader = replace(reader, layout=PIXELS)
        handed = product.handed(q, own, None, reader)
        check_handed(handed, expected, read)
        assert handed.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("w_scheme", SCHEMES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_convolutions(backend, device, make_weight, agree, flag, case, w_scheme):
    filled = case.operation.groups == 1 and case.weight[1] in (3, 5, 37)
    if filled and w_scheme == "asymmetric":  # where sums of integers are needed
        weight = make_weight(case.weight, 8, "per_channel", w_scheme)
        assert backend.prepare(case.operation, weight, EIGHT, device).reads is None
        return
    agrees(backend, device, make_weight, agree, case, w_scheme)
    assert flag.item() == 0


@pytest.mark.parametrize("name", ["any", "depthwise"])
def test_what_follows_is_computed_in_the_same_pass(backend, device, make_weight, agree, flag, name):
    case = CASES[name]
    x, weight = numbers(case.x, device), make_weight(case.weight)
    product = backend.prepare(case.operation, weight, EIGHT, device)
    q = product.stored(x)
    expected = reference(case.operation, x, weight, EIGHT, None)
    for clamp, gelu in AFTER:
        y = done(expected, clamp, gelu)
        if gelu is None:
            agree(product.real(q, None, clamp, True), y)
        read = covering(y, 8, "asymmetric")
        reader = backend.prepare(case.operation, weight, read, device).reads
        check_handed(product.handed(q, None, clamp, reader, gelu), y, read)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_shapes(backend, device, make_weight, agree, flag, data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    groups, taps, dilation = draw(1, 3), (draw(1, 3), draw(1, 4)), (draw(1, 2), draw(1, 2))
    padding = tuple(draw(0, d * (t - 1)) for d, t in zip(dilation, taps, strict=True))
    size = tuple(d * (t - 1) + draw(1, 4) for d, t in zip(dilation, taps, strict=True))
    depth, w_scheme = draw(1, 20), data.draw(st.sampled_from(SCHEMES))
    if groups == 1 and w_scheme == "asymmetric":
        depth *= 4 if depth < 8 else 16  # so that no pixel is filled up
    operation = Operation("conv2d", (draw(1, 3), draw(1, 3)), padding, dilation, groups)
    case = Case((draw(1, 3), groups * depth, *size), (groups * draw(1, 9), depth, *taps), operation)
    agrees(backend, device, make_weight, agree, case, w_scheme)


@pytest.mark.parametrize("name", ["any", "filled", "depthwise", "line"])
def test_images_of_any_strides_are_stored(backend, device, make_weight, agree, flag, name):
    case = CASES[name]
    weight = make_weight(case.weight)
    product = backend.prepare(case.operation, weight, EIGHT, device)
    x = numbers(case.x, device)
    wide = numbers((case.x[0], 2 * case.x[1], *(n + 1 for n in case.x[2:])), device)
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    for view in (x, last, wide[:, ::2], wide[:, : case.x[1], 1:], x[:1].expand(3, *x.shape[1:])):
        q = product.stored(view)
        assert product.takes(q)
        assert torch.equal(q, quantize(view, qparams(EIGHT, device)))
        assert (
            product(view, None).stride()
            == multiply(case.operation, view, weight.dequantize(), None).stride()
        )
    assert flag.item() == 0
    for layout in (x, last, wide[:, ::2]):
        flag.zero_()
        bad = layout.clone()
        bad[-1, 1, ..., 2] = float("nan")
        product.stored(bad)
        assert flag.item() == 1


def test_what_is_not_handed(backend, device, make_weight, flag):
    case = CASES["any"]
    product = backend.prepare(case.operation, make_weight(case.weight), EIGHT, device)
    x = numbers(case.x, device)
    q = product.stored(x)
    assert product.handed(q, None, None, product.reads) is not None
    rows = backend.prepare(LINEAR, make_weight((4, 16)), EIGHT, device).reads
    assert product.handed(q, None, None, rows) is None  # which wants another layout
    assert product.handed(q, None, (0.0, 6.0), product.reads, "none") is None
    assert not product.takes(q.contiguous())
    assert not product.takes(q[:, :4])
    assert not product.takes(q[:0])
    assert not product.takes(x)
    assert product.stored(x[0]) is None
    assert product.stored(x.double()) is None
    odd = make_weight((4, 5, 3, 3), 8, "per_channel", "asymmetric")
    odd = backend.prepare(case.operation, odd, EIGHT, device)  # whose pixels are filled up
    assert odd.reads is None
    assert odd.stored(x[:, :5]) is None
    filled = backend.prepare(case.operation, make_weight((4, 5, 3, 3)), EIGHT, device)
    whole = filled.stored(x[:, :5])
    assert filled.takes(whole)
    least = whole.untyped_storage().nbytes() - 3  # without what fills the last pixel up
    cut = torch.zeros(least, dtype=torch.int8, device=device)
    assert not filled.takes(cut.as_strided(whole.shape, whole.stride()))
    assert not filled.takes(q[:, :5].movedim(1, -1).contiguous().movedim(-1, 1))
    token = ActivationScheme(8, "per_token")
    token = backend.prepare(case.operation, make_weight(case.weight), token, device)
    assert token.reads is None
    assert token.stored(x) is None
    bias = torch.full((9,), float("inf"), device=device)
    product.handed(q, bias, None, product.reads)
    assert flag.item() == 1


@pytest.mark.parametrize("c", convolution.DENSE + convolution.GROUPED)
def test_block_sizes(backend, device, make_weight, agree, choose, flag, c):
    choose(c)
    agrees(backend, device, make_weight, agree, BLOCKS, "asymmetric")


@pytest.mark.parametrize("c", convolution.DEPTHWISE)
def test_block_sizes_of_depthwise_ones(backend, device, make_weight, agree, choose, flag, c):
    choose(c)
    agrees(backend, device, make_weight, agree, CASES["depthwise"], "asymmetric")


BLOCKS = Case((2, 4, 9, 8), (70, 4, 3, 3), Operation("conv2d", (1, 1), (1, 1), (1, 1)))
