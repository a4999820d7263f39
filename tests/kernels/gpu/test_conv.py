import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoquant.kernels.operation import Operation
from autoquant.kernels.reference import multiply, reference
from autoquant.spec.recipe import ActivationScheme

SCHEMES = ("symmetric", "asymmetric")


def scheme_of(bits, granularity, scheme):
    if granularity == "per_token":
        return ActivationScheme(bits, granularity, scheme)
    zero = 0 if scheme == "symmetric" else -(1 << (bits - 1)) // 2
    return ActivationScheme(
        bits, granularity, scheme, scale=0.9 * 2.0 ** (2 - bits), zero_point=zero
    )


def image(shape, device, seed=1):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5).to(device)


@dataclass(frozen=True)
class Case:
    x: tuple[int, ...]
    weight: tuple[int, ...]
    operation: Operation


CASES = {
    "dense": Case((2, 5, 6, 7), (9, 5, 3, 3), Operation("conv2d", (1, 1), (1, 1), (1, 1))),
    "stride": Case((2, 16, 9, 8), (17, 16, 3, 2), Operation("conv2d", (2, 3), (0, 1), (1, 1))),
    "dilated": Case((1, 3, 11, 9), (4, 3, 3, 3), Operation("conv2d", (1, 2), (2, 1), (2, 3))),
    "pointwise": Case((2, 37, 3, 5), (6, 37, 1, 1), Operation("conv2d", (2, 2), (0, 0), (1, 1))),
    "grouped": Case((2, 6, 5, 5), (8, 3, 3, 3), Operation("conv2d", (1, 1), (1, 1), (1, 1), 2)),
    "depthwise": Case((2, 9, 6, 5), (9, 1, 3, 3), Operation("conv2d", (2, 1), (1, 1), (1, 1), 9)),
    "multiplied": Case((1, 4, 5, 5), (12, 1, 3, 3), Operation("conv2d", (1, 1), (1, 0), (1, 2), 4)),
    "one_channel": Case((2, 1, 5, 5), (3, 1, 3, 3), Operation("conv2d", (1, 1), (1, 1), (1, 1))),
    "line": Case((2, 5, 12), (7, 5, 3), Operation("conv1d", (2,), (2,), (1,))),
    "line_depthwise": Case((2, 5, 9), (5, 1, 4), Operation("conv1d", (1,), (1,), (2,), 5)),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
@pytest.mark.parametrize("name", CASES)
def test_every_scheme_equals_the_reference(backend, device, make_weight, agree, name, granularity):
    case = CASES[name]
    x, bias = image(case.x, device), image(case.weight[:1], device, 2)
    for bits, scheme, w_scheme in itertools.product((4, 8), SCHEMES, SCHEMES):
        a = scheme_of(bits, granularity, scheme)
        weight = make_weight(case.weight, 12 - bits, "per_channel", w_scheme, dead=[0])
        product = backend.prepare(case.operation, weight, a, device)
        agree(product(x, bias), reference(case.operation, x, weight, a, bias))
    weight = make_weight(case.weight, 8, "per_tensor", "asymmetric")
    product = backend.prepare(case.operation, weight, a, device)
    agree(product(x, None), reference(case.operation, x, weight, a, None))


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_equals_the_reference(backend, device, make_weight, agree, bits):
    for name in ("dense", "depthwise"):
        case = CASES[name]
        x = image(case.x, device)
        a, weight = scheme_of(bits, "per_tensor", "asymmetric"), make_weight(case.weight, bits)
        product = backend.prepare(case.operation, weight, a, device)
        agree(product(x, None), reference(case.operation, x, weight, a, None))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_shapes(backend, device, make_weight, agree, data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    groups, taps, dilation = draw(1, 3), (draw(1, 3), draw(1, 4)), (draw(1, 2), draw(1, 2))
    padding = tuple(draw(0, d * (t - 1)) for d, t in zip(dilation, taps, strict=True))
    size = tuple(d * (t - 1) + draw(1, 6) for d, t in zip(dilation, taps, strict=True))
    depth, outputs = draw(1, 20), groups * draw(1, 18)
    operation = Operation("conv2d", (draw(1, 3), draw(1, 3)), padding, dilation, groups)
    x = image((draw(1, 3), groups * depth, *size), device)
    a = scheme_of(8, data.draw(st.sampled_from(["per_tensor", "per_token"])), "asymmetric")
    weight = make_weight(
        (outputs, depth, *taps), 8, "per_channel", data.draw(st.sampled_from(SCHEMES))
    )
    product = backend.prepare(operation, weight, a, device)
    agree(product(x, None), reference(operation, x, weight, a, None))


@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["dense", "stride", "grouped", "depthwise", "multiplied", "line"])
def test_nan_reaches_what_the_reference_says(
    backend, device, make_weight, agree, name, scheme, granularity
):
    case = CASES[name]
    x = image(case.x, device)
    x[0, 1, ..., 0] = float("nan")
    x[-1, 0, ..., 2] = float("inf") if granularity == "per_tensor" else 3.0
    a, weight = scheme_of(8, granularity, scheme), make_weight(case.weight)
    y = backend.prepare(case.operation, weight, a, device)(x, None)
    expected = reference(case.operation, x, weight, a, None)
    assert expected.isnan().any()
    agree(y, expected)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's
@pytest.mark.parametrize("scheme", SCHEMES)
def test_infinity_and_dead_samples(backend, device, make_weight, agree, scheme):
    case = CASES["dense"]
    a, weight = scheme_of(8, "per_token", scheme), make_weight(case.weight)
    product = backend.prepare(case.operation, weight, a, device)
    for value in (0.0, 1e-42, float("inf"), -float("inf")):
        x = image(case.x, device)
        x[0] = 0.0
        x[0, 2, 3, 3] = value
        agree(product(x[:1], None), reference(case.operation, x[:1], weight, a, None))
        agree(product(x[1:], None), reference(case.operation, x[1:], weight, a, None))


@pytest.mark.parametrize("name", ["dense", "depthwise"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
def test_layouts(backend, device, make_weight, agree, name, granularity):
    case = CASES[name]
    a, weight = scheme_of(8, granularity, "asymmetric"), make_weight(case.weight)
    product = backend.prepare(case.operation, weight, a, device)
    x = image(case.x, device)
    wide = image((case.x[0], 2 * case.x[1], case.x[3] + 1, case.x[2]), device)
    views = (
        x.to(memory_format=torch.channels_last),
        wide[:, ::2, 1:].mT,
        x[:1].expand(3, -1, -1, -1),
    )
    for view in views:
        y, expected = product(view, None), reference(case.operation, view, weight, a, None)
        agree(y, expected)
    last = views[0]
    told = (x, last, last[:, :, 1:, 1:], last.mT, last[:1].expand(3, -1, -1, -1))
    for view in (*told, *views[1:]):
        # cuDNN decides by the memory format, which torch's own kernels on a GPU don't look at.
        for cudnn in (False, True):
            with torch.backends.cudnn.flags(enabled=cudnn):
                expected = multiply(case.operation, view, weight.dequantize(), None)
                assert product(view, None).stride() == expected.stride()


def test_what_is_left_to_the_reference(backend, device, make_weight):
    case = CASES["dense"]
    a, weight = scheme_of(8, "per_tensor", "asymmetric"), make_weight(case.weight)
    product = backend.prepare(case.operation, weight, a, device)
    x = image(case.x, device)
    assert product(x[0], None) is None
    assert product(x[:0], None) is None
    assert product(x.double(), None) is None
    assert product(x[:, :4], None) is None
    assert product(x[:, :, :0], None) is None
    assert product(x.clone().requires_grad_(), None) is None
    assert backend.prepare(case.operation, weight, None, device) is None
    wide = Operation("conv2d", (1, 1), (3, 1), (1, 1))
    assert backend.prepare(wide, weight, a, device) is None
    cube = Operation("conv3d", (1, 1, 1), (0, 0, 0), (1, 1, 1))
    assert backend.prepare(cube, make_weight((2, 3, 2, 2, 2)), a, device) is None
