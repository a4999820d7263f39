"""The compiled library computes what the definitions do, bit for bit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.kernels.cpu import native
from autoquant.kernels.cpu.gates import gru_gates, lstm_gates
from autoquant.quant.activation import fake_quantize_activation, token_qparams
from autoquant.quant.affine import QParams, choose_qparams, fake_quantize, quantize
from autoquant.quant.input_layout import Layout
from autoquant.quant.rotation import Rotation, hadamard
from autoquant.quant.smoothing import Smoothing
from autoquant.spec.recipe import ActivationScheme

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiled library here")

numbers = st.floats(width=32, allow_nan=False)
schemes = st.sampled_from(("symmetric", "asymmetric"))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(numbers, min_size=1, max_size=70),
    st.floats(2.0**-100, 2.0**100, width=32),
    st.integers(2, 8),
    st.data(),
)
def test_static_quantization(values, scale, bits, data):
    half = 1 << (bits - 1)
    zero_point = data.draw(st.integers(-half, half - 1))
    x = torch.tensor(values)
    scheme = ActivationScheme(bits, scale=scale, zero_point=zero_point)
    p = QParams(torch.tensor(scale), torch.tensor(float(zero_point)), bits)
    assert torch.equal(native.quantize(x, scheme).int() - native.OFFSET, quantize(x, p).int())
    found = native.fake_quantize(x, scheme, "linear")
    assert torch.equal(found, fake_quantize_activation(x, scheme, "linear"))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(numbers, min_size=19, max_size=19), min_size=1, max_size=5),
    st.integers(2, 8),
    schemes,
)
def test_quantization_by_rows(values, bits, scheme):
    x = torch.tensor(values)
    dynamic = ActivationScheme(bits, "per_token", scheme)
    p = token_qparams(x, dynamic, "linear")
    q, scale, zero_point = native.quantize_rows(x, dynamic, "linear")
    assert torch.equal(scale, p.scale.flatten())
    assert torch.equal(zero_point, p.zero_point.flatten())
    assert torch.equal(q.int() - native.OFFSET, quantize(x, p).int())
    found = native.fake_quantize(x, dynamic, "linear")
    assert torch.equal(found, fake_quantize_activation(x, dynamic, "linear"))


def views_of(x):
    """Return the same numbers, lying in several ways."""
    found = [x, torch.stack([x, x], -1)[..., 0]]
    if x.dim() == 4:
        found.append(x.contiguous(memory_format=torch.channels_last))
    if x.dim() > 2:
        found.append(x.transpose(1, 2).contiguous().transpose(1, 2))
    return found


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("linear", (3, 5, 32)),
        ("linear", (700, 96)),
        ("conv1d", (2, 6, 11)),
        ("conv2d", (2, 6, 7, 5)),
        ("conv2d", (3, 32, 30, 30)),
        ("conv3d", (2, 3, 2, 3, 4)),
    ],
)
def test_smoothed_numbers_are_quantized_bit_for_bit(kind, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    axes = int(kind[4]) if kind != "linear" else 0
    channels = shape[1] if axes else shape[-1]
    factors = torch.exp2(torch.randint(-12, 14, (channels,)).float())
    smoothing = Smoothing(factors, Layout(kind, (4, channels, *[1] * axes), 1, 0))
    for scheme in (
        ActivationScheme(8, scale=0.03, zero_point=-7),
        ActivationScheme(4, scale=0.3, zero_point=2),
        ActivationScheme(8, scale=2.0**-140, zero_point=0),  # no divisor: in several passes
    ):
        for view in views_of(x):
            expected = native.quantize(smoothing.of_input(view), scheme)
            assert torch.equal(native.quantize(view, scheme, smoothing), expected)
    x[(-1,) * x.dim()] = math.nan
    assert native.quantize(x, ActivationScheme(8, scale=0.03, zero_point=0), smoothing) is None


@pytest.mark.parametrize("block", [8, 16, 32, 64, 512, 1024])
def test_rotated_numbers_are_those_of_the_matrix(block):
    torch.manual_seed(0)
    x = torch.randn(21, 3, 2 * block)
    rotation = Rotation(hadamard(block, x), Layout("linear", (4, 2 * block), 1, 0))
    exact = Rotation(hadamard(block, x.double()), rotation.layout).of_input(x.double())
    scheme = ActivationScheme(6, scale=0.1, zero_point=-3)
    for view in views_of(x):
        assert (native.rotate(view, rotation) - exact).abs().max() < 1e-5
        q = native.quantize(view, scheme, rotation).double() - native.OFFSET
        # Nothing is further than half a step away, but for the rounding of float32 itself.
        assert (q - (exact / 0.1 - 3).clamp(-32, 31)).abs().max() <= 0.5 + 1e-4
    x[3, 1, 5] = math.nan
    assert native.quantize(x, scheme, rotation) is None


@pytest.mark.parametrize("shape", [(5,), (2, 3, 7), (2, 40, 70, 70)])
@pytest.mark.parametrize("axis", [1, -1])
def test_bytes_are_limited_by_channels(shape, axis):
    torch.manual_seed(0)
    y = torch.randint(0, 256, shape, dtype=torch.uint8)
    axis = axis if len(shape) > 1 else -1
    limit = torch.randint(0, 256, (y.shape[axis],), dtype=torch.uint8)
    expected = torch.minimum(y.movedim(axis, -1), limit).movedim(-1, axis)
    for own in (y.clone(), *views_of(y.clone())[2:]):
        native.limit_bytes(own, limit, axis)
        assert torch.equal(own, expected)


@pytest.mark.parametrize("shape", [(3, 40_000), (2, 3, 130, 131), (70_001,), (5, 7, 11, 2, 3)])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_sizes_that_several_threads_share_and_every_layout(shape, kind):
    torch.manual_seed(0)
    x = torch.randn(shape)
    static = ActivationScheme(8, scale=0.03, zero_point=-7)
    views = [x, x.transpose(0, -1), x[..., ::2]]
    if x.dim() == 4:
        views.append(x.contiguous(memory_format=torch.channels_last))
    for view in views:
        for scheme in (static, ActivationScheme(6, "per_token")):
            found = native.fake_quantize(view, scheme, kind)
            assert torch.equal(found, fake_quantize_activation(view, scheme, kind))
        p = QParams(torch.tensor(0.03), torch.tensor(-7.0), 8)
        q = native.quantize(view, static)
        assert torch.equal(q.int() - native.OFFSET, quantize(view, p).int())


def test_nan_is_reported_wherever_it_is():
    static = ActivationScheme(8, scale=0.1, zero_point=0)
    dynamic = ActivationScheme(8, "per_token")
    for position in (0, 15, 16, 32_768, 99_999):
        x = torch.randn(100_000)
        x[position] = math.nan
        assert native.quantize(x, static) is None
        assert native.quantize_rows(x[None], dynamic, "linear") is None
        for scheme in (static, dynamic):
            found = native.fake_quantize(x[None], scheme, "linear")
            expected = fake_quantize_activation(x[None], scheme, "linear")
            assert torch.equal(found.isnan(), expected.isnan())
            assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 6),
    st.sampled_from((1, 15, 16, 130, 8192, 8193)),
    st.integers(1, 5),
    st.integers(2, 8),
    schemes,
    st.integers(0, 2**31),
)
def test_the_least_squared_error_is_exact_and_no_other_is_below_it(n, k, tried, bits, scheme, seed):
    torch.manual_seed(seed)
    blocks = torch.randn(n, k)
    span = torch.rand(tried, n) * 3
    p = choose_qparams(-span, span, bits, symmetric=scheme == "symmetric")
    found = native.squared_errors(blocks, p)
    expected = torch.stack(
        [
            (fake_quantize(blocks, QParams(s[:, None], z[:, None], bits)) - blocks)
            .double()
            .square()
            .sum(1)
            for s, z in zip(p.scale, p.zero_point, strict=True)
        ]
    )
    torch.testing.assert_close(found.amin(0), expected.amin(0), rtol=1e-5, atol=1e-9)
    assert bool((found <= expected * (1 + 1e-5) + 1e-9).all())


def test_gates_are_those_of_torch():
    torch.manual_seed(0)
    for rows, n in ((1, 1), (3, 17), (250, 64)):
        for spread in (0.1, 3.0, 60.0):
            with torch.no_grad():
                cell = torch.nn.GRUCell(n, n)
                x, h = torch.randn(rows, n) * spread, torch.randn(rows, n)
                projected = torch.nn.functional.linear(x, cell.weight_ih, cell.bias_ih)
                hidden = torch.nn.functional.linear(h, cell.weight_hh, cell.bias_hh)
                found = gru_gates(projected, hidden, h)
                torch.testing.assert_close(found, cell(x, h), rtol=2e-6, atol=2e-6)
                lstm = torch.nn.LSTMCell(n, n)
                c = torch.randn(rows, n)
                projected = torch.nn.functional.linear(x, lstm.weight_ih, lstm.bias_ih)
                hidden = torch.nn.functional.linear(h, lstm.weight_hh, lstm.bias_hh)
                found = lstm_gates(projected, hidden, c)
                expected = lstm(x, (h, c))
                for a, b in zip(found, expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_gates_take_a_row_of_a_sequence_and_refuse_what_is_not_theirs():
    torch.manual_seed(0)
    with torch.no_grad():
        sequence, y, h = torch.randn(4, 9, 12), torch.randn(4, 12), torch.randn(4, 4)
        assert torch.equal(
            gru_gates(sequence[:, 3], y, h), gru_gates(sequence[:, 3].contiguous(), y, h)
        )
        assert gru_gates(sequence[:, 3].double(), y, h) is None
        assert gru_gates(sequence[:, 3], y, h[:, :3]) is None
        assert lstm_gates(sequence[:, 3], y, h) is None
        bad = y.clone()
        bad[1, 2] = math.nan
        assert bool(gru_gates(sequence[:, 3], bad, h)[1].isnan().any())
    assert gru_gates(sequence[:, 3], y, h) is None  # gradients go through the operators of torch


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5000),
    last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_change_products_are_those_of_the_changes(rows, columns, last, seed):
    draw = torch.Generator().manual_seed(seed)
    shape = (rows, max(columns // 6, 1), 3, 2)
    x, g = (torch.randn(shape, generator=draw) for _ in range(2))
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    schemes = (
        ActivationScheme(8, scale=0.02, zero_point=3),
        ActivationScheme(3, "per_tensor", "symmetric", scale=0.4, zero_point=0),
    )
    found = native.change_products(x, g, schemes)
    for i, scheme in enumerate(schemes):
        change = (fake_quantize_activation(x, scheme, "conv") - x).double()
        expected = (change * g).flatten(1).sum(1)
        scale = (change * g).abs().flatten(1).sum(1) + 1e-9
        assert bool(((found[:, i] - expected).abs() <= 1e-3 * scale + 1e-4).all())


def test_dynamic_schemes_have_no_change_products():
    x = torch.randn(2, 3)
    assert native.change_products(x, x, [ActivationScheme(8, "per_token")]) is None


@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(1, 4),
    groups=st.sampled_from([1, 2, 3]),
    parts=st.integers(1, 3),
    columns=st.integers(1, 70),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    shared=st.booleans(),
    seed=st.integers(0, 99),
)
def test_round_weights_is_what_rounding_changes(
    channels, groups, parts, columns, bits, symmetric, shared, seed
):
    draw = torch.Generator().manual_seed(seed)
    rows = channels * groups
    x = torch.randn(rows, parts, columns, generator=draw)
    weights = torch.rand(groups, parts, columns, generator=draw)
    tops = torch.rand(4, 1 if shared else rows * parts, generator=draw) * 3 + 0.1
    p = choose_qparams(-tops, tops * 0.7, bits, symmetric=symmetric)
    found = native.round_weights(x, weights, p)
    delta, sums = found
    each = QParams(
        *(
            t[:, :, None].expand(4, rows * parts, 1).reshape(4, rows, parts, 1)
            for t in (p.scale, p.zero_point)
        ),
        bits,
        symmetric,
    )
    expected = fake_quantize(x.expand(4, -1, -1, -1), each) - x
    # A number on the edge of two integers may go either way.
    edges = (delta - expected).abs() > 1e-5
    assert float(edges.float().mean()) < 0.01
    whole = weights.repeat_interleave(channels, 0)
    assert torch.allclose(sums, (delta.square() * whole).sum(3), rtol=1e-4, atol=1e-6)
