"""Products in 16 bits equal the reference for every byte, whatever the processor; all are taken."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.kernels.cpu import int16, native
from autoquant.kernels.cpu.geometry import Geometry, may_be_tried
from autoquant.kernels.layout import is_channels_last
from autoquant.kernels.operation import LINEAR, Operation, Reader, SchemeReader, is_chainable
from autoquant.kernels.reference import reference
from autoquant.quant.input_layout import Layout
from autoquant.quant.rotation import Rotation, hadamard
from autoquant.quant.smoothing import Smoothing
from autoquant.spec.recipe import ActivationScheme, WeightScheme
from tests.kernels.cases import SCHEMES, calibrated, operations, quantized
from tests.kernels.cpu.handed import check_handed

pytestmark = pytest.mark.skipif(int16.missing() is not None, reason=str(int16.missing()))

WIDTHS = [n for n in (8, 16) if n <= int16.width()]
CONV = Operation("conv2d", (1, 1), (1, 1), (1, 1), 1)


@pytest.fixture(params=WIDTHS, autouse=True)
def width(request, monkeypatch):
    """Every width of registers that there is here."""
    monkeypatch.setattr(int16, "width", lambda: request.param)
    return request.param


def check(operation, x, w, weights, activations, *, bias=True, clamp=None):
    """Check a product against the reference."""
    b = torch.randn(w.shape[0]) if bias else None
    weight = quantized(w, weights)
    product = int16.prepare(operation, weight, activations)
    assert product is not None
    assert product.backend == "int16"
    expected = reference(operation, x, weight, activations, b)
    # Where products cancel, or a bias does, float32 is only as exact as what went into the sum.
    size = max(float(expected.abs().max()), 0.0 if b is None else float(b.abs().max()))
    size = max(size, float(x.abs().max()) * float(w.abs().max()))
    expected = expected if clamp is None else expected.clamp(*clamp)
    found = product(x, b, clamp)
    assert found is not None
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) <= 1e-5 * size
    assert is_channels_last(found) == is_channels_last(expected) or 1 in found.shape[1:]
    return product


ACTIVATIONS = st.builds(
    ActivationScheme,
    st.integers(2, 8),
    st.sampled_from(("per_tensor", "per_token")),
    st.sampled_from(SCHEMES),
)
WEIGHTS = st.builds(
    WeightScheme,
    st.integers(2, 8),
    st.sampled_from(("per_tensor", "per_channel")),
    st.sampled_from(SCHEMES),
)


@settings(max_examples=300, deadline=None)
@given(
    operations(),
    WEIGHTS,
    ACTIVATIONS,
    st.booleans(),
    st.sampled_from((None, (0.0, math.inf), (0.0, 6.0))),
    st.sampled_from((torch.contiguous_format, torch.channels_last)),
    st.integers(0, 2**32 - 1),
)
def test_products_equal_the_reference(drawn, weights, activations, bias, clamp, layout, seed):
    operation, x_shape, w_shape = drawn
    torch.manual_seed(seed)
    x, w = torch.randn(x_shape) * 3 + 0.5, torch.randn(w_shape)
    if x.dim() == 4:
        x = x.contiguous(memory_format=layout)
    activations = calibrated(activations, x)
    if operation.kind == "conv3d":
        assert int16.prepare(operation, quantized(w, weights), activations) is None
        return
    check(operation, x, w, weights, activations, bias=bias, clamp=clamp)


@pytest.mark.parametrize("axes", [1, 2])
def test_convolutions_of_all_shapes_are_right(axes):
    draw = random.Random(axes)
    torch.manual_seed(axes)
    for _ in range(700):
        groups, ins = draw.choice((1, 1, 2, 3, 8, 32)), draw.choice((1, 1, 2, 3, 4, 17))
        outs = draw.choice((1, 1, 2, 3, 8, 17, 33, 48))

        def each(*numbers):
            return tuple(draw.choice(numbers) for _ in range(axes))

        stride, padding, dilation = each(1, 2, 3), each(0, 1, 2, 3), each(1, 1, 2)
        operation = Operation(f"conv{axes}d", stride, padding, dilation, groups)
        kernel = each(1, 2, 3, 5)
        least = [
            max(d * (k - 1) + 1 - 2 * p, 1)
            for k, p, d in zip(kernel, padding, dilation, strict=True)
        ]
        size = [n + draw.choice((0, 1, 2, 6)) for n in least]
        x = torch.randn(draw.choice((1, 2)), groups * ins, *size)
        w = torch.randn(groups * outs, ins, *kernel)
        if not may_be_tried(Geometry(operation, tuple(w.shape), tuple(x.shape), True, 1, False)):
            continue  # the reference itself, oneDNN's in float32, ends the process for some
        if axes == 2 and draw.random() < 0.5:
            x = x.contiguous(memory_format=torch.channels_last)
        made = calibrated(
            ActivationScheme(8, draw.choice(("per_tensor", "per_token")), draw.choice(SCHEMES)), x
        )
        scheme = WeightScheme(8, scheme=draw.choice(SCHEMES))
        product = check(operation, x, w, scheme, made)
        if made.dynamic:
            continue
        bias = draw.choice((None, torch.randn(w.shape[0])))
        y = product.real(product.stored(x), bias, None, True)
        reader = calibrated(ActivationScheme(draw.randint(2, 8), "per_tensor", made.scheme), y)
        clamp = draw.choice((None, (0.0, math.inf), (0.0, 6.0)))
        if (reader.scale or 0) > 1e-6:
            check_handed(product, x, bias, clamp, reader)


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 95, 96, 97, 200])
@pytest.mark.parametrize("columns", [1, 2, 31, 768, 9000])
def test_sums_of_the_largest_products_are_exact(rows, columns):
    """Both ends of every byte: pairs of them need 17 bits, and a row of them most of 32."""
    q = torch.where(torch.rand(rows, columns) < 0.9, 1.0, -1.0)
    x = q * 1000.0
    for zero_point in (-128, 0, 127):
        scheme = ActivationScheme(8, scale=1.0, scheme="asymmetric", zero_point=zero_point)
        for channels in (1, 8, 9, 16, 40):
            w = torch.where(torch.rand(channels, columns) < 0.9, 1.0, -1.0) * 255
            w[:, 0] = 0.0 if columns > 1 else 255.0
            for kind in SCHEMES:
                weight = quantized(w, WeightScheme(8, scheme=kind))
                product = int16.prepare(LINEAR, weight, scheme)
                stored = product.stored(x).to(torch.float64) - 128 - zero_point
                exact = stored @ weight.dequantize().to(torch.float64).T
                found = product(x, None)
                assert torch.equal(found, exact.to(torch.float32)) or torch.allclose(
                    found.double(), exact, rtol=3e-7, atol=0
                )


def test_weights_that_need_more_than_a_byte_are_taken():
    torch.manual_seed(0)
    w = torch.rand(40, 64)  # all above 0: less their zero point, from 0 to 255
    x = torch.randn(7, 64)
    static = calibrated(ActivationScheme(8, scheme="asymmetric"), x)
    product = check(LINEAR, x, w, WeightScheme(8, scheme="asymmetric"), static)
    assert product.weight.largest == 255
    assert product.weight.q.dtype == torch.int16


@pytest.mark.parametrize("group", [32, 64, 128])
def test_groups_of_columns_have_scales_of_their_own(group):
    draw = random.Random(group)
    torch.manual_seed(group)
    for _ in range(60):
        rows, groups, channels = draw.randint(1, 20), draw.randint(1, 5), draw.choice((1, 9, 40))
        x = torch.randn(rows, group * groups)
        w = torch.randn(channels, group * groups) * torch.rand(channels, 1).exp()
        w *= torch.rand(groups).add(0.01).repeat_interleave(group)
        scheme = WeightScheme(draw.randint(2, 8), f"per_group_{group}", draw.choice(SCHEMES))
        granularity = draw.choice(("per_tensor", "per_token"))
        made = calibrated(ActivationScheme(8, granularity, draw.choice(SCHEMES)), x)
        product = check(LINEAR, x, w, scheme, made, clamp=draw.choice((None, (0.0, math.inf))))
        assert (product.of_groups is not None) == (groups > 1)
        if made.dynamic:
            continue
        bias = draw.choice((None, torch.randn(channels)))
        y = product.real(product.stored(x), bias, None, True)
        reader = calibrated(ActivationScheme(8, "per_tensor", made.scheme), y)
        check_handed(product, x, bias, draw.choice((None, (0.0, math.inf))), reader)
        check_handed(product, x, bias, None, reader, "none")
        factors = torch.exp2(torch.randint(-3, 4, (channels,)).float())
        smoothing = Smoothing(factors, Layout("linear", (4, channels), 1, 0))
        check_handed(product, x, bias, None, reader, smoothing=smoothing)


@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
def test_linear_outputs_are_handed_on_as_the_bytes_that_the_reader_makes_of_them(gelu):
    draw = random.Random(0)
    torch.manual_seed(0)
    for _ in range(100):
        columns, channels = draw.choice((1, 3, 16, 65)), draw.choice((1, 2, 17, 64))
        x = 3 * torch.randn(*draw.choice(((5,), (2, 3), (1, 1, 4))), columns)
        w = torch.randn(channels, columns)
        bias = draw.choice((None, torch.randn(channels)))
        eight = calibrated(ActivationScheme(8, "per_tensor", draw.choice(SCHEMES)), x)
        product = int16.prepare(LINEAR, quantized(w, WeightScheme(8)), eight)
        assert is_chainable(product)
        assert product.reads == SchemeReader(eight)
        assert product.handed(product.stored(x), None, None, Reader()) is None  # another's
        y = product.real(product.stored(x), bias, None, False)
        assert torch.equal(y, product(x, bias))
        bits = draw.randint(2, 8)
        reader = calibrated(ActivationScheme(bits, "per_tensor", draw.choice(SCHEMES)), y)
        if (reader.scale or 0) < 1e-6:
            continue
        clamp = None if gelu else draw.choice((None, (0.0, math.inf), (0.0, 6.0)))
        check_handed(product, x, bias, clamp, reader, gelu)
    assert product.handed(product.stored(x), bias, (0.0, 6.0), SchemeReader(reader), "none") is None
    assert product.stored(x[..., :0]) is None
    assert not product.takes(torch.zeros(3, columns + 1, dtype=torch.uint8))
    bad = torch.full((channels,), math.nan)
    assert product.handed(product.stored(x), bad, None, SchemeReader(reader), gelu) is None


@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_gelus_are_those_of_torch(gelu):
    """From far below 0, where they vanish, to far above, where they are the number itself."""
    x = torch.arange(-128, 128, dtype=torch.float32).view(-1, 1)
    product = int16.prepare(
        LINEAR,
        quantized(torch.ones(1, 1), WeightScheme(8)),
        ActivationScheme(8, scale=1.0, zero_point=0),
    )
    for spread in (0.01, 0.03, 0.1, 1.0):
        product.scale = torch.full_like(product.scale, spread / 127)  # its weight is 127
        y = torch.nn.functional.gelu(x.double() * spread, approximate=gelu)
        scale = float(y.abs().max()) / 120
        reader = ActivationScheme(8, scale=scale, zero_point=-120)
        q = product.handed(product.stored(x), None, None, SchemeReader(reader), gelu)
        exact = (y / scale - 120).clamp(-128, 127)
        assert float((q.double() - native.OFFSET - exact).abs().max()) <= 0.5 + 1e-3


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_outputs_are_handed_on_smoothed_by_the_channel(kind):
    torch.manual_seed(0)
    axes = int(kind[4]) if kind != "linear" else 0
    operation = LINEAR if not axes else Operation(kind, (1,) * axes, (1,) * axes, (1,) * axes, 1)
    x, w = torch.randn(2, 6, *[9] * axes), torch.randn(20, 6, *[3] * axes)
    eight = calibrated(ActivationScheme(8, "per_tensor", "asymmetric"), x)
    product = int16.prepare(operation, quantized(w, WeightScheme(8)), eight)
    following = LINEAR if not axes else Operation(kind, (1,) * axes, (0,) * axes, (1,) * axes, 1)
    next_weight = quantized(torch.randn(4, 20, *[1] * axes), WeightScheme(8))
    smoothing = Smoothing(
        torch.exp2(torch.randint(-3, 4, (20,)).float()), Layout(kind, (4, 20, *[1] * axes), 1, 0)
    )
    for scale, zero_point, bits in ((0.02, 0, 8), (6 / 255, -128, 8), (0.5, 7, 5)):
        scheme = ActivationScheme(bits, scale=scale, zero_point=zero_point)
        after = int16.prepare(following, next_weight, scheme, smoothing)
        assert after.reads == SchemeReader(scheme, smoothing) != SchemeReader(scheme)
        for clamp in (None, (0.0, math.inf), (0.0, 6.0)):
            for bias in (None, torch.randn(20)):
                q = check_handed(product, x, bias, clamp, scheme, smoothing=smoothing)
                y = product.real(product.stored(x), bias, clamp, True)
                assert (after.stored(y).int() - q.int()).abs().max() <= 1
                plain = int16.prepare(following, next_weight, scheme)
                assert torch.equal(after(y, None), plain(smoothing.of_input(y), None))


def test_rotated_inputs_are_read_from_nobody():
    torch.manual_seed(0)
    x, weight = torch.randn(5, 64), quantized(torch.randn(3, 64), WeightScheme(8))
    rotation = Rotation(hadamard(32, x), Layout("linear", (3, 64), 1, 0))
    for scheme in (
        calibrated(ActivationScheme(8), rotation.of_input(x)),
        ActivationScheme(8, "per_token"),
    ):
        product = int16.prepare(LINEAR, weight, scheme, rotation)
        assert product.reads is None
        expected = reference(LINEAR, rotation.of_input(x), weight, scheme, None)
        torch.testing.assert_close(product(x, None), expected, rtol=1e-4, atol=1e-4)


def test_what_it_is_not_for_is_left_to_the_reference():
    eight = ActivationScheme(8, scale=0.1, zero_point=0)
    weight = quantized(torch.randn(4, 6, 3, 3), WeightScheme(8))
    product = int16.prepare(CONV, weight, eight)
    x = torch.randn(2, 6, 5, 5)
    assert product(x, None) is not None
    assert product(x.double(), None) is None
    assert product(torch.full_like(x, math.nan), None) is None
    assert product(x[:0], None) is None
    assert product(x[:, :5], None) is None
    assert product(x[0], None) is None
    assert product(x, torch.randn(3)) is None
    unpadded = Operation("conv2d", (1, 1), (0, 0), (1, 1), 1)
    assert int16.prepare(unpadded, weight, eight)(x[..., :2, :2], None) is None
    assert int16.prepare(CONV, weight, None) is None
    by_groups = quantized(torch.randn(4, 64, 1, 1), WeightScheme(4, "per_group_32"))
    one = Operation("conv2d", (1, 1), (0, 0), (1, 1), 1)
    assert int16.prepare(one, by_groups, eight) is None
    wide = quantized(torch.ones(1, 2**17), WeightScheme(8))
    assert int16.prepare(LINEAR, wide, eight) is None  # 2**17 · 255 · 127 needs 33 bits
    bias = torch.tensor([math.inf, math.nan, 1.0, 2.0])
    y = product(x, bias, (0.0, math.inf))
    expected = reference(CONV, x, weight, eight, bias).clamp(0.0, math.inf)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
