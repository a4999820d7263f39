"""The C code can't be reached with a buffer that is not what it takes for granted."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoquant.kernels.cpu import library, native, signatures
from autoquant.quant.activation import fake_quantize_activation
from autoquant.quant.affine import QParams
from autoquant.spec.recipe import ActivationScheme

pytestmark = pytest.mark.skipif(library.library() is None, reason="no compiled library here")

SIZES = {
    "n": 7,
    "rows": 6,
    "columns": 6,
    "blocks": 3,
    "tried": 2,
    "parts": 2,
    "groups": 3,
    "stride": 40,
    "half": 4,
    "bits": 4,
    "symmetric": 1,
    "shared": 0,
    "zero_point": 3,
    "outer": 2,
    "inner": 4,
    "block": 32,
    "batch": 2,
    "height": 5,
    "width": 4,
    "channels": 18,
    "kernel_h": 3,
    "kernel_w": 2,
    "stride_h": 2,
    "stride_w": 1,
    "pad_h": 1,
    "pad_w": 0,
    "dilation_h": 1,
    "dilation_w": 2,
    "out": 5,
    "runs": 1,
    "wide": 1,
    "after": 0,
    "byte": 128,
}
ROW = {"height": 1, "groups": 1, "runs": 3}
ROW |= {f"{n}_{axis}": 1 for n in ("kernel", "stride", "dilation") for axis in "hw"} | {"pad_h": 0}
CASES = {name: (name, SIZES) for name in signatures.FUNCTIONS}
CASES |= {
    "multiply_panels to bytes": ("multiply_panels", SIZES | {"after": 1}),
    "multiply_channels to bytes": ("multiply_channels", SIZES | {"after": 2}),
    "multiply_panels by groups of columns": ("multiply_panels", SIZES | ROW),
}
"""Functions and the sizes that they are called with."""


def arguments(name, sizes=SIZES):
    """Return what a function takes, all right, by name."""
    torch.manual_seed(0)
    given = {}
    for key, parameter in signatures.FUNCTIONS[name].items():
        if isinstance(parameter, signatures.Array):
            count = parameter.count(sizes)
            given[key] = torch.rand(count, dtype=torch.float64).to(parameter.dtype_in(sizes))
        elif isinstance(parameter, signatures.Integer):
            given[key] = sizes[key]
        else:
            given[key] = 0.5
    return given


def arrays(name, sizes=SIZES):
    """Return the buffers that a function touches."""
    parameters = signatures.FUNCTIONS[name]
    found = {k: p for k, p in parameters.items() if isinstance(p, signatures.Array)}
    return {k: p for k, p in found.items() if p.count(sizes)}


@pytest.mark.parametrize("case", CASES)
def test_what_is_right_is_taken(case):
    name, sizes = CASES[case]
    assert library.call(name, *arguments(name, sizes).values()) == 0


def unaligned(x):
    raw = torch.zeros(x.numel() * x.element_size() + 1, dtype=torch.uint8)
    return torch.frombuffer(raw.numpy(), dtype=x.dtype, count=x.numel(), offset=1)


WRONG = {
    "another dtype": (lambda x: x.to(torch.float16), TypeError, "is needed"),
    "another device": (lambda x: x.to("meta"), TypeError, "not on the CPU"),
    "no tensor": (lambda x: x.data_ptr(), TypeError, "a tensor is needed"),
    "gaps": (lambda x: x.repeat_interleave(2)[::2], ValueError, "has gaps|numbers"),
    "too few": (lambda x: x[:-1].clone(), ValueError, "are needed"),
    "nothing": (lambda x: x[:0].clone(), ValueError, "are needed"),
    "sparse": (lambda x: x.to_sparse(), TypeError, "as they are"),
    "freed": (lambda x: freed(x), ValueError, "are needed"),
}


def freed(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_buffer_raises(case, how):
    name, sizes = CASES[case]
    spoil, error, message = WRONG[how]
    for key, array in arrays(name, sizes).items():
        given = arguments(name, sizes)
        if how == "gaps" and (array.strided or len(given[key]) == 1):
            continue
        given[key] = spoil(given[key])
        with pytest.raises(error, match=rf"native\.{name}: {key} .*({message})"):
            library.call(name, *given.values())


@pytest.mark.parametrize("case", CASES)
def test_unaligned_and_shared_memory_raise(case):
    name, sizes = CASES[case]
    for key, own in arrays(name, sizes).items():
        given = arguments(name, sizes)
        if given[key].element_size() > 1:
            given[key] = unaligned(given[key])
            with pytest.raises(ValueError, match="not aligned"):
                library.call(name, *given.values())
        given = arguments(name, sizes)
        for other, parameter in arrays(name, sizes).items():
            if other == key or not (own.written or parameter.written):
                continue
            most = max(given[key].numel() * 8, given[other].numel() * 8)
            raw = torch.zeros(most, dtype=torch.uint8)
            both = dict(given)
            for k, p in ((key, own), (other, parameter)):
                both[k] = raw.view(p.dtype_in(sizes))
            with pytest.raises(ValueError, match="share memory"):
                library.call(name, *both.values())


@pytest.mark.parametrize("case", CASES)
def test_numbers_out_of_range_raise(case):
    name, sizes = CASES[case]
    for key, parameter in signatures.FUNCTIONS[name].items():
        given = arguments(name, sizes)
        if isinstance(parameter, signatures.Array):
            continue
        wrong = [2**63, -(2**31)] if isinstance(parameter, signatures.Integer) else []
        wrong += [math.nan, math.inf, "1"]
        for value in wrong:
            with pytest.raises((TypeError, ValueError), match=rf"native\.{name}: "):
                library.call(name, *(given | {key: value}).values())
    with pytest.raises(TypeError, match="arguments"):
        library.call(name, *list(arguments(name).values())[:-1])


def test_groups_of_columns_are_of_single_rows():
    given = arguments("multiply_panels", SIZES | {"runs": 3})
    assert library.call("multiply_panels", *given.values()) == 3


def test_groups_divide_the_channels_and_a_window_fits():
    given = arguments("multiply_panels")
    for spoilt, message in (
        ({"groups": 4}, "18 channels are not 4 groups"),
        (
            {"kernel_h": 8, "weight": torch.zeros(9999, dtype=torch.int16)},
            "a window of 8 is larger than what it is moved over, by 1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            library.call("multiply_panels", *(given | spoilt).values())


def test_groups_divide_the_rows():
    given = arguments("round_weights")
    weight = torch.rand(4 * SIZES["parts"] * SIZES["columns"])
    with pytest.raises(ValueError, match="6 rows are not 4 groups"):
        library.call("round_weights", *(given | {"groups": 4, "weight": weight}).values())
    with pytest.raises(ValueError, match="groups is 0"):
        library.call("round_weights", *(given | {"groups": 0}).values())


def test_numbers_outside_of_all_bins_are_not_counted():
    for bad in (math.nan, math.inf, -math.inf, 4.0, -4.5, 1e30):
        x = torch.tensor([1.0, bad, 2.0])
        counts = torch.zeros(8, dtype=torch.int64)
        assert native.histogram(x, 1.0, counts) is None
        assert not counts.any()
    x = torch.tensor([-4.0, 3.99, -1e-45, 0.0])
    counts = torch.zeros(8, dtype=torch.int64)
    assert native.histogram(x, 0.5, counts) is not None
    assert counts.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


@pytest.fixture(params=["float64", "bfloat16", "float16"])
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, request.param))
    yield
    torch.set_default_dtype(before)


SPECIAL = (0.0, -0.0, 1e-45, -1e-45, 1e-39, 1.0, -3.5, 3e38, -3e38, math.inf, -math.inf, math.nan)
SHAPES = (
    (),
    (0,),
    (1,),
    (5, 0),
    (0, 5),
    (1, 1),
    (17,),
    (3, 40),
    (2, 3, 0),
    (2, 3, 4),
    (2, 3, 4, 5),
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(SHAPES),
    st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=20),
    st.sampled_from((2.0**-149, 1e-39, 0.1, 1e30, 3e38)),
    st.integers(2, 8),
    st.booleans(),
    st.booleans(),
    st.sampled_from(("linear", "conv2d")),
    st.sampled_from((torch.float64, torch.bfloat16, torch.float16)),
)
def test_every_number_and_shape_is_quantized_as_eagerly_under_every_default_dtype(
    shape, values, scale, bits, dynamic, last, kind, dtype
):
    count = math.prod(shape)
    x = torch.tensor((values * (count // len(values) + 1))[:count], dtype=torch.float32)
    x = x.reshape(shape)
    if last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    scheme = (
        ActivationScheme(bits, "per_token")
        if dynamic
        else ActivationScheme(bits, scale=scale, zero_point=1)
    )
    expected = fake_quantize_activation(x, scheme, kind)
    torch.set_default_dtype(dtype)
    try:
        found = native.fake_quantize(x, scheme, kind)
        assert found.dtype == torch.float32
        assert found.shape == x.shape
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        if dynamic:
            rows = native.quantize_rows(x, scheme, kind) if count else None
            assert rows is None or {t.dtype for t in rows[1:]} == {torch.float32}
            assert (rows is None) == bool(x.isnan().any() or not count)
        else:
            q = native.quantize(x, scheme)
            assert (q is None) == bool(x.isnan().any())
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_is_measured_does_not_depend_on_the_default_dtype(default_dtype):
    torch.manual_seed(0)
    x = torch.randn(6, 2, 50, dtype=torch.float32)
    p = QParams(torch.full((3, 12), 0.1, dtype=torch.float32), torch.zeros(3, 12), 4, True)
    p = QParams(p.scale, p.zero_point.float(), 4, True)
    delta, sums = native.round_weights(x, torch.ones_like(x[:3]), p)
    assert delta.dtype == sums.dtype == torch.float32
    assert torch.allclose(sums.double(), delta.double().square().sum(3), rtol=1e-5)
    assert native.squared_errors(x.reshape(12, 50), p).dtype == torch.float64
    schemes = [ActivationScheme(8, scale=0.1, zero_point=0)]
    assert native.change_products(x, x, schemes).dtype == torch.float64
    counts = torch.zeros(64, dtype=torch.int64)
    total, _, zeros = native.histogram(x.flatten(), 2.0, counts)
    assert total == pytest.approx(2 * float(x.double().sum()), rel=1e-6)
    assert int(counts.sum()) == x.numel()
    assert zeros == 0


def test_other_dtypes_are_left_to_eager_operators():
    x = torch.randn(3, 4, dtype=torch.float64)
    p = QParams(torch.full((1, 3), 0.1), torch.zeros(1, 3), 4, True)
    scheme = ActivationScheme(8, scale=0.1, zero_point=0)
    assert native.squared_errors(x, p) is None
    assert native.histogram(x.flatten(), 1.0, torch.zeros(8, dtype=torch.int64)) is None
    assert native.change_products(x, x, [scheme]) is None
    assert native.fake_quantize(x, scheme, "linear").dtype == torch.float64


def test_a_huge_tensor_that_repeats_one_number_is_no_huge_buffer():
    x = torch.zeros(1, dtype=torch.float32).expand(2**40)
    with pytest.raises(ValueError, match="has gaps"):
        library.call("fake_quantize", x, torch.empty(4), 2**40, 1.0, -8.0, 7.0)
    with pytest.raises(ValueError, match=r"holds 4 numbers, 1099511627776 are needed"):
        library.call("fake_quantize", torch.empty(4), torch.empty(4), 2**40, 1.0, -8.0, 7.0)


@pytest.mark.parametrize("name", ["rotate", "quantize_rotated"])
def test_blocks_are_powers_of_two(name):
    with pytest.raises(ValueError, match="block is 48"):
        library.call(name, *(arguments(name) | {"block": 48}).values())
