"""Products of integers equal the reference; what they can't do they refuse."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.kernels.cpu import native, onednn, packed_weight
from autoquant.kernels.cpu.geometry import Geometry, may_be_tried
from autoquant.kernels.cpu.instructions import has_amx, has_vnni
from autoquant.kernels.cpu.verification import is_right
from autoquant.kernels.layout import is_channels_last
from autoquant.kernels.operation import LINEAR, Operation, Reader, SchemeReader, is_chainable
from autoquant.kernels.reference import multiply, reference
from autoquant.quant.input_layout import Layout
from autoquant.quant.rotation import Rotation, hadamard
from autoquant.quant.smoothing import Smoothing
from autoquant.spec.formats import FORMATS
from autoquant.spec.recipe import ActivationScheme, WeightScheme
from tests.kernels.cases import MOST_BITS, SCHEMES, calibrated, operations, quantized
from tests.kernels.cpu.handed import check_handed

pytestmark = pytest.mark.skipif(
    onednn.missing(torch.device("cpu")) is not None, reason="no oneDNN here"
)
CONV = Operation("conv2d", (1, 1), (1, 1), (1, 1), 1)
WIDE = WeightScheme(MOST_BITS)


def is_exact(weight, activations):
    """Return whether integers can give the reference's numbers on this processor."""
    centered = weight.q.int() - weight.qparams.zero_point.int()
    largest = int(centered.abs().max())
    byte = FORMATS[activations.bits].qmax + native.OFFSET
    fits = int(centered.min()) >= -128 and int(centered.max()) <= 127
    return fits and (has_vnni() or 2 * byte * largest <= 2**15 - 1)


def check(operation, x, w, weights, activations, *, bias=True, clamp=None, tolerance=1e-5):
    """Check a product against the reference, or that it is refused where it has to be."""
    b = torch.randn(w.shape[0]) if bias else None
    product = onednn.prepare(operation, quantized(w, weights), activations)
    assert (product is not None) == is_exact(quantized(w, weights), activations)
    if product is None:
        return None
    expected = reference(operation, x, quantized(w, weights), activations, b)
    # Where products cancel, or a bias does, float32 is only as exact as what went into the sum.
    size = max(float(expected.abs().max()), 0.0 if b is None else float(b.abs().max()))
    size = max(size, float(x.abs().max()) * float(w.abs().max()))
    if clamp is not None:
        expected = expected.clamp(*clamp)
    found = product(x, b, clamp)
    if operation.kind != "linear" and not is_right(geometry_of(product, x)):
        assert found is None
        return None
    assert found is not None
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) <= tolerance * size
    return found


def geometry_of(product, x):
    return product.geometry(x.shape, torch.get_num_threads())


def is_safe(operation, weight, x):
    return may_be_tried(Geometry(operation, tuple(weight), tuple(x), True, 1, has_amx()))


@settings(max_examples=400, deadline=None)
@given(
    operations(),
    st.builds(
        WeightScheme,
        st.integers(2, 8),
        st.sampled_from(("per_tensor", "per_channel")),
        st.sampled_from(SCHEMES),
    ),
    st.builds(
        ActivationScheme,
        st.integers(2, 8),
        st.sampled_from(("per_tensor", "per_token")),
        st.sampled_from(SCHEMES),
    ),
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
    if operation.kind != "linear" and not is_safe(operation, w.shape, x.shape):
        product = onednn.prepare(operation, quantized(w, weights), activations)
        assert product is None or product(x, None, clamp) is None
        return
    check(operation, x, w, weights, activations, bias=bias, clamp=clamp)


def test_inputs_of_one_channel_are_computed_and_handed_on():
    """Pictures in grey and spectrograms: the first layer of many models."""
    torch.manual_seed(0)
    x = torch.randn(3, 1, 9, 7)
    static = calibrated(ActivationScheme(8, scheme="asymmetric"), x)
    w = torch.randn(16, 1, 3, 3)
    found = check(CONV, x, w, WeightScheme(6), static, clamp=(0.0, math.inf))
    assert found is not None
    assert not is_channels_last(found)
    line = Operation("conv1d", (2,), (1,), (1,), 1)
    check(line, torch.randn(3, 1, 9), torch.randn(5, 1, 4), WIDE, static)
    product = onednn.prepare(CONV, quantized(w, WeightScheme(6)), static)
    reader = ActivationScheme(8, scheme="asymmetric", scale=0.05, zero_point=-20)
    check_handed(product, x, torch.randn(16), (0.0, math.inf), reader)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_convolutions_of_all_shapes_are_right_or_refused(axes):
    """Far more shapes than hypothesis draws: a wrong one may be one in thousands."""
    draw = random.Random(axes)
    torch.manual_seed(axes)
    taken = refused = 0
    while taken < 500:
        groups, ins = draw.choice((1, 1, 2, 3, 8, 32)), draw.choice((1, 1, 2, 3, 4, 17))
        outs = draw.choice((1, 1, 2, 3, 8, 17, 32))

        def each(*numbers):
            return tuple(draw.choice(numbers) for _ in range(axes))

        operation = Operation(
            f"conv{axes}d", each(1, 2, 3), each(0, 1, 2, 3), each(1, 1, 2), groups
        )
        x = torch.randn(draw.choice((1, 2)), groups * ins, *each(1, 2, 3, 4, 5, 7, 9))
        w = torch.randn(groups * outs, ins, *each(1, 2, 3, 5))
        if not is_safe(operation, w.shape, x.shape):
            continue
        taken += 1
        if axes == 2 and draw.random() < 0.5:
            x = x.contiguous(memory_format=torch.channels_last)
        made = calibrated(
            ActivationScheme(8, draw.choice(("per_tensor", "per_token")), draw.choice(SCHEMES)), x
        )
        y = check(operation, x, w, WeightScheme(6), made)
        refused += y is None
        if axes == 3 or made.dynamic or y is None:
            continue
        product = onednn.prepare(operation, quantized(w, WeightScheme(6)), made)
        bias = draw.choice((None, torch.randn(w.shape[0])))
        reader = calibrated(ActivationScheme(draw.randint(2, 8), "per_tensor", made.scheme), y)
        clamp = draw.choice((None, (0.0, math.inf), (0.0, 6.0)))
        if (reader.scale or 0) > 1e-6:
            check_handed(product, x, bias, clamp, reader)
    assert refused <= 150  # with AMX; none without it


def test_outputs_are_handed_on_as_the_bytes_that_the_reader_makes_of_them():
    torch.manual_seed(0)
    x, w, bias = torch.randn(2, 6, 9, 9), torch.randn(8, 6, 3, 3), torch.randn(8)
    eight = calibrated(ActivationScheme(8, "per_tensor", "asymmetric"), x)
    product = onednn.prepare(CONV, quantized(w, WIDE), eight)
    assert is_chainable(product)
    assert product.reads == SchemeReader(eight)
    assert product.handed(product.stored(x), None, None, Reader()) is None  # another's
    for scale, zero_point, bits in ((0.02, 0, 8), (6 / 255, -128, 8), (0.5, 7, 5), (1e-6, 0, 8)):
        reader = ActivationScheme(bits, scale=scale, zero_point=zero_point)
        for clamp in (None, (0.0, math.inf), (0.0, 6.0)):
            q = check_handed(product, x, bias, clamp, reader)
            # What it takes is what it would have made of the real numbers itself.
            following = onednn.prepare(
                Operation("conv2d", (1, 1), (0, 0), (1, 1), 1),
                quantized(torch.randn(4, 8, 1, 1), WIDE),
                reader,
            )
            assert following.takes(q)
            y = product.real(product.stored(x), bias, clamp, True)
            assert (following.stored(y).int() - q.int()).abs().max() <= 1
            assert (following.stored(y) != q).float().mean() < 0.01


@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
def test_linear_outputs_are_handed_on_as_the_bytes_that_the_reader_makes_of_them(gelu):
    draw = random.Random(0)
    torch.manual_seed(0)
    for _ in range(100):
        columns, channels = draw.choice((1, 3, 16, 65)), draw.choice((1, 2, 17, 64))
        x = 3 * torch.randn(*draw.choice(((5,), (2, 3), (1, 1, 4))), columns)
        w = torch.randn(channels, columns)
        bias = draw.choice((None, torch.randn(channels)))
        scheme = draw.choice(SCHEMES)
        eight = calibrated(ActivationScheme(8, "per_tensor", scheme), x)
        product = onednn.prepare(LINEAR, quantized(w, WIDE), eight)
        assert is_chainable(product)
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


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_outputs_are_handed_on_smoothed_by_the_channel(kind):
    torch.manual_seed(0)
    axes = int(kind[4]) if kind != "linear" else 0
    operation = LINEAR if not axes else Operation(kind, (1,) * axes, (1,) * axes, (1,) * axes, 1)
    x, w = torch.randn(2, 6, *[9] * axes), torch.randn(8, 6, *[3] * axes)
    eight = calibrated(ActivationScheme(8, "per_tensor", "asymmetric"), x)
    product = onednn.prepare(operation, quantized(w, WIDE), eight)
    following = LINEAR if not axes else Operation(kind, (1,) * axes, (0,) * axes, (1,) * axes, 1)
    next_weight = quantized(torch.randn(4, 8, *[1] * axes), WIDE)
    smoothing = Smoothing(
        torch.exp2(torch.randint(-3, 4, (8,)).float()), Layout(kind, (4, 8, *[1] * axes), 1, 0)
    )
    for scale, zero_point, bits in ((0.02, 0, 8), (6 / 255, -128, 8), (0.5, 7, 5), (1e-6, 0, 8)):
        scheme = ActivationScheme(bits, scale=scale, zero_point=zero_point)
        after = onednn.prepare(following, next_weight, scheme, smoothing)
        assert after.reads == SchemeReader(scheme, smoothing) != SchemeReader(scheme)
        for clamp in (None, (0.0, math.inf), (0.0, 6.0)):
            for bias in (None, torch.randn(8)):
                q = check_handed(product, x, bias, clamp, scheme, smoothing=smoothing)
                y = product.real(product.stored(x), bias, clamp, True)
                assert (after.stored(y).int() - q.int()).abs().max() <= 1
                assert (after.stored(y) != q).float().mean() < 0.01
                # What it takes is what the other order gives: first smoothed, then a plain layer.
                plain = onednn.prepare(following, next_weight, scheme)
                assert torch.equal(after(y, None), plain(smoothing.of_input(y), None))
    stored, scheme = product.stored(x), ActivationScheme(8, scale=0.1, zero_point=0)
    other = Smoothing(torch.ones(7), smoothing.layout)  # of other channels than those that it has
    assert product.handed(stored, None, None, SchemeReader(scheme, other)) is None
    kinds = Smoothing(smoothing.factors, Layout("conv2d" if not axes else "linear", (4, 8), 1, 0))
    assert product.handed(stored, None, None, SchemeReader(scheme, kinds)) is None
    assert product.handed(stored, None, (0.5, 6.0), SchemeReader(scheme, smoothing)) is None
    if not axes:
        assert product.handed(stored, None, None, SchemeReader(scheme, smoothing), "none") is None


def test_rotated_inputs_are_read_from_nobody():
    torch.manual_seed(0)
    x, weight = torch.randn(5, 64), quantized(torch.randn(3, 64), WIDE)
    rotation = Rotation(hadamard(32, x), Layout("linear", (3, 64), 1, 0))
    for scheme in (
        calibrated(ActivationScheme(8), rotation.of_input(x)),
        ActivationScheme(8, "per_token"),
    ):
        product = onednn.prepare(LINEAR, weight, scheme, rotation)
        assert product.reads is None
        expected = reference(LINEAR, rotation.of_input(x), weight, scheme, None)
        torch.testing.assert_close(product(x, None), expected, rtol=1e-4, atol=1e-4)


def test_outputs_whose_bytes_would_be_in_doubt_are_not_handed_on():
    x, w = torch.randn(2, 6, 9, 9), torch.randn(8, 6, 3, 3)
    eight = calibrated(ActivationScheme(8), x)
    reader = ActivationScheme(8, scale=0.1, zero_point=0)
    product = onednn.prepare(CONV, quantized(w, WIDE), eight)
    stored = product.stored(x)
    for value in (math.nan, math.inf, -math.inf, 1e30):
        bias = torch.randn(8)
        bias[3] = value
        assert product.handed(stored, bias, None, SchemeReader(reader)) is None
    tiny = ActivationScheme(8, scale=1e-30, zero_point=0)
    assert product.handed(stored, None, None, SchemeReader(tiny)) is None
    huge = onednn.prepare(CONV, quantized(w * 1e25, WIDE), eight)
    assert huge.handed(stored, None, None, SchemeReader(reader)) is None
    # All that a clamp leaves lies beyond the reader's range: the byte of its end.
    low = ActivationScheme(4, scale=0.1, zero_point=7)
    assert check_handed(product, x, None, (0.5, 6.0), low).unique().tolist() == [128 + 7]
    dynamic = onednn.prepare(CONV, quantized(w, WIDE), ActivationScheme(8, "per_token"))
    assert dynamic.reads is None
    assert dynamic.stored(x) is None
    assert product.stored(torch.full_like(x, math.nan)) is None
    assert product.stored(x[:, :3]) is None
    assert not product.takes(stored[:, :3])


def test_large_outputs_saturate_where_they_are_handed_on():
    w = torch.ones(4, 2, 1, 1)
    operation = Operation("conv2d", (1, 1), (0, 0), (1, 1), 1)
    eight = ActivationScheme(8, scale=1e6, zero_point=0)
    product = onednn.prepare(operation, quantized(w, WIDE), eight)
    x = torch.tensor([1e8, -1e8]).view(2, 1, 1, 1).expand(2, 2, 3, 3).contiguous()
    for scale in (1e-3, 1e-15):
        reader = ActivationScheme(8, scale=scale, zero_point=3)
        q = product.handed(product.stored(x), None, None, SchemeReader(reader))
        assert torch.equal(q[0], torch.full_like(q[0], 255))
        assert torch.equal(q[1], torch.zeros_like(q[1]))


def test_outputs_that_see_padding_alone_are_refused():
    """A few of the shapes that end the process, or that come out wrong, in oneDNN."""
    for stride, padding, dilation, groups, w, spatial in (
        ((1, 2), (0, 1), (2, 2), 6, (12, 1, 2, 1), (5, 1)),
        ((2, 1), (2, 1), (1, 2), 1, (2, 4, 5, 2), (4, 1)),
        ((1, 2), (0, 0), (1, 1), 2, (4, 1, 1, 3), (2, 3)),
        ((1, 3), (3, 3), (1, 1), 1, (1, 1, 7, 7), (6, 2)),
        ((1, 1), (0, 0), (1, 1), 1, (1, 2, 3, 3), (2, 5)),
        ((1, 3), (0, 0), (1, 1), 1, (64, 1, 4, 2), (7, 3)),  # one channel, an output one wide
    ):
        operation = Operation("conv2d", stride, padding, dilation, groups)
        assert not is_safe(operation, w, (1, w[1] * groups, *spatial))
    assert is_safe(CONV, (4, 3, 3, 3), (1, 3, 1, 1))
    assert is_safe(CONV, (4, 1, 3, 3), (1, 1, 1, 2))
    assert not is_safe(CONV, (4, 3, 3, 3), (1, 2, 1, 1))
    assert not is_safe(CONV, (4, 3, 3, 3), (0, 3, 1, 1))
    depthwise = Operation("conv2d", (2, 2), (1, 1), (1, 1), 8)
    assert is_safe(depthwise, (8, 1, 3, 3), (1, 8, 7, 7))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "conv3d"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("tokens", ["per_tensor", "per_token"])
def test_every_case_that_is_claimed(kind, granularity, scheme, bits, tokens):
    torch.manual_seed(0)
    axes = 0 if kind == "linear" else int(kind[4])
    operation = LINEAR if axes == 0 else Operation(kind, (1,) * axes, (1,) * axes, (1,) * axes, 2)
    x = torch.randn(3, 17) if axes == 0 else torch.randn(2, 6, *(7,) * axes)
    # An asymmetric weight of 8 bits is taken where its range is nearly even about zero.
    w = torch.randn(8, 17) if axes == 0 else torch.randn(8, 3, *(3,) * axes)
    if (bits, scheme) == (8, "asymmetric"):
        w = w.clamp(-1, 127 / 128)
        w.flatten(1)[:, 0], w.flatten(1)[:, 1] = -1.0, 127 / 128
    for asymmetric in SCHEMES:
        for activation_bits in range(4, 9):
            made = calibrated(ActivationScheme(activation_bits, tokens, asymmetric), x)
            check(operation, x, w, WeightScheme(bits, granularity, scheme), made)


def test_what_integers_cannot_do_is_refused():
    eight = ActivationScheme(8, scale=0.1, zero_point=0)
    w = torch.randn(4, 64)
    assert onednn.prepare(LINEAR, quantized(w, WeightScheme(4)), None) is None
    groups = quantized(w, WeightScheme(4, "per_group_32"))
    assert onednn.prepare(LINEAR, groups, eight) is None
    one_sided = quantized(w.abs(), WeightScheme(8, "per_channel", "asymmetric"))
    assert onednn.prepare(LINEAR, one_sided, eight) is None
    assert onednn.missing(torch.device("cuda")) is not None


def test_calls_that_the_kernel_cannot_take_are_the_references():
    product = onednn.prepare(
        LINEAR, quantized(torch.randn(4, 8), WIDE), ActivationScheme(8, "per_token")
    )
    conv = onednn.prepare(
        CONV,
        quantized(torch.randn(4, 3, 3, 3), WIDE),
        ActivationScheme(8, scale=0.1, zero_point=3),
    )
    for x in (
        torch.randn(2, 8, dtype=torch.float64),
        torch.randn(2, 8).half(),
        torch.zeros(0, 8),
        torch.randn(2, 7),
        torch.tensor([[math.nan] * 8]),
    ):
        assert product(x, None) is None
    for x in (torch.randn(3, 5, 5), torch.zeros(0, 3, 5, 5), torch.randn(1, 2, 5, 5)):
        assert conv(x, None) is None
    x = torch.randn(2, 3, 5, 5)
    x[1, 2, 4, 4] = math.nan
    assert conv(x, None) is None


@pytest.mark.parametrize("tokens", ["per_tensor", "per_token"])
def test_infinities_saturate_and_zeros_stay_zeros(tokens):
    torch.manual_seed(0)
    w = torch.randn(5, 16)
    w[2] = 0.0  # a channel of all zeros
    x = torch.randn(4, 16)
    x[0] = 0.0
    x[1, 3], x[1, 4] = math.inf, -math.inf
    made = calibrated(ActivationScheme(8, tokens, "asymmetric"), x[2:])
    if tokens == "per_token":  # such a token's scale is near the end of float32
        product = onednn.prepare(LINEAR, quantized(w, WIDE), made)
        assert product(x, None) is None
        x = x.clamp(-9.0, 9.0)
    found = check(LINEAR, x, w, WIDE, made)
    assert bool(found.isfinite().all())


def test_scales_at_the_ends_of_float32():
    torch.manual_seed(0)
    x, w = torch.randn(4, 16) * 1e-36, torch.randn(5, 16)
    for scheme in SCHEMES:
        made = calibrated(ActivationScheme(8, "per_tensor", scheme), x)
        check(LINEAR, x, w, WIDE, made, bias=False)
        check(LINEAR, x, w, WIDE, ActivationScheme(8, "per_token", scheme), bias=False)


def test_a_transposed_view_and_a_slice_are_taken_as_they_are():
    torch.manual_seed(0)
    whole = torch.randn(40, 6, 9)
    made = calibrated(ActivationScheme(8), whole)
    for x in (whole.transpose(0, 1), whole[::2, :, 1:8], whole[:, 3].unsqueeze(0)):
        for scheme in (made, ActivationScheme(8, "per_token")):
            check(LINEAR, x, torch.randn(5, x.shape[-1]), WeightScheme(6), scheme)


def in_memory(x):
    """Return ``x`` as it may lie in memory: in every order of its axes, with gaps, repeated."""
    forms = [x, x.repeat_interleave(2, -1)[..., ::2], x[:1].expand_as(x)]
    if x.dim() > 1:
        order = list(range(x.dim()))[::-1]
        forms += [x.permute(order).contiguous().permute(order), x.mT.contiguous().mT]
    if x.dim() == 4:
        forms.append(x.contiguous(memory_format=torch.channels_last))
    return forms


@pytest.mark.parametrize("operation", [LINEAR, CONV], ids=["linear", "conv"])
@pytest.mark.parametrize("tokens", ["per_tensor", "per_token"])
def test_weights_biases_and_inputs_may_lie_in_memory_as_they_like(operation, tokens):
    torch.manual_seed(0)
    x, b = torch.randn(5, 7, 6, 8), torch.randn(10)
    made = calibrated(ActivationScheme(8, tokens, "asymmetric"), x)
    reader = ActivationScheme(8, scale=0.1, zero_point=0)
    for w in in_memory(torch.randn(10, 8) if operation == LINEAR else torch.randn(10, 7, 3, 3)):
        weight = quantized(w, WIDE)
        product = onednn.prepare(operation, weight, made)
        for y in in_memory(x):
            plain = reference(operation, y, weight, made, None)
            for bias in [None, *in_memory(b)]:
                exact = plain
                if bias is not None:
                    exact = plain + (bias if operation == LINEAR else bias.view(1, -1, 1, 1))
                found = product(y, bias)
                assert float((found - exact).abs().max()) <= 1e-5 * float(exact.abs().max())
                if tokens == "per_tensor":
                    check_handed(product, y, bias, None, reader)


@pytest.mark.parametrize("operation", [LINEAR, CONV], ids=["linear", "conv"])
def test_biases_that_are_none_are_the_references(operation):
    x = torch.randn(2, 3, 5, 8)
    w = torch.randn(10, 8) if operation == LINEAR else torch.randn(10, 3, 3, 3)
    for scheme in (ActivationScheme(8, scale=0.1, zero_point=0), ActivationScheme(8, "per_token")):
        product = onednn.prepare(operation, quantized(w, WIDE), scheme)
        for bias in (
            torch.randn(10, dtype=torch.float64),
            torch.randn(10).bfloat16(),
            torch.randn(9),
            torch.randn(1, 10),
            torch.randn(10, device="meta"),
        ):
            assert product(x, bias) is None
            if not scheme.dynamic:
                assert product.handed(product.stored(x), bias, None, SchemeReader(scheme)) is None


def test_without_the_compiled_library_the_numbers_are_the_same(monkeypatch):
    torch.manual_seed(0)
    x, w, b = torch.randn(3, 4, 6, 6), torch.randn(5, 4, 3, 3), torch.randn(5)
    for scheme in SCHEMES:
        for tokens in ("per_tensor", "per_token"):
            made = calibrated(ActivationScheme(8, tokens, scheme), x)
            product = onednn.prepare(CONV, quantized(w, WIDE), made)
            compiled = product(x, b)
            with monkeypatch.context() as patch:
                patch.setattr(native, "library", lambda: None)
                eager = product(x, b)
                assert product(x * math.nan, b) is None
            assert torch.equal(compiled, eager)


@pytest.mark.parametrize("vnni", [True, False])
def test_without_vnni_only_sums_that_stay_exact_are_taken(monkeypatch, vnni):
    """What the rule refuses; ``test_levels`` runs what it takes at levels without VNNI."""
    monkeypatch.setattr("autoquant.kernels.cpu.instructions.has_vnni", lambda: vnni)
    eight = ActivationScheme(8, scale=0.1, zero_point=0)
    wide = onednn.prepare(LINEAR, quantized(torch.randn(4, 8), WeightScheme(8)), eight)
    assert (wide is not None) == vnni
    assert onednn.prepare(LINEAR, quantized(torch.randn(4, 8), WeightScheme(7)), eight) is not None
    torch.manual_seed(0)
    product = onednn.prepare(LINEAR, quantized(torch.randn(4, 8), WeightScheme(4)), eight)
    assert product is not None


def test_packed_weights_are_shared_between_activations_and_freed_with_their_integers():
    q = quantized(torch.randn(4, 8), WIDE)
    before = len(packed_weight._cache)
    products = [onednn.prepare(LINEAR, q, ActivationScheme(8, scale=s)) for s in (0.1, 0.2)]
    assert products[0].pack is products[1].pack
    assert len(packed_weight._cache) == before + 1
    del q, products
    assert len(packed_weight._cache) == before


def lies(x):
    return [x.is_contiguous(), x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)]


@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_outputs_lie_in_memory_as_a_float_convolutions_do(axes, granularity):
    operation = Operation(f"conv{axes}d", (1,) * axes, (1,) * axes, (1,) * axes, 1)
    for channels, side in ((6, 7), (2, 5), (6, 1)):
        x = torch.randn(2, channels, *[side] * axes)
        w = torch.randn(8, channels, *[3] * axes)
        scheme = ActivationScheme(8, granularity, "asymmetric")
        scheme = scheme if scheme.dynamic else calibrated(scheme, x)
        product = onednn.prepare(operation, quantized(w, WIDE), scheme)
        forms = [x, x.contiguous(memory_format=torch.channels_last)] if axes == 2 else [x]
        for form in forms:
            expected = multiply(operation, form, w, None)
            found = product(form, None)
            assert lies(found) == lies(expected)
            if not scheme.dynamic:
                stored = product.stored(form)
                again = product.real(stored, None, None, is_channels_last(form))
                assert lies(again) == lies(expected)
                assert torch.equal(again, found)
