import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoquant.kernels.operation import LINEAR
from autoquant.kernels.reference import reference
from autoquant.spec.recipe import ActivationScheme


def activation_scheme(bits, granularity, scheme):
    if granularity == "per_token":
        return ActivationScheme(bits, granularity, scheme)
    zero = 0 if scheme == "symmetric" else -(1 << (bits - 1)) // 2
    return ActivationScheme(
        bits, granularity, scheme, scale=0.9 * 2.0 ** (1 - bits), zero_point=zero
    )


def activation(shape, device, seed=1):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5).to(device)


SCHEMES = ("symmetric", "asymmetric")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
@pytest.mark.parametrize("x_bits", range(2, 9))
def test_every_scheme_equals_the_reference(
    backend, device, make_weight, agree, x_bits, granularity
):
    x = activation((5, 37), device)
    for scheme, w_scheme, w_granularity in itertools.product(
        SCHEMES, SCHEMES, ("per_tensor", "per_channel")
    ):
        a = activation_scheme(x_bits, granularity, scheme)
        weight = make_weight((19, 37), (x_bits * 3) % 7 + 2, w_granularity, w_scheme)
        product = backend.prepare(LINEAR, weight, a, device)
        agree(product(x, None), reference(LINEAR, x, weight, a, None))


@pytest.mark.parametrize("w_bits", range(2, 9))
@pytest.mark.parametrize("w_scheme", SCHEMES)
def test_every_weight_equals_the_reference(backend, device, make_weight, agree, w_bits, w_scheme):
    x, bias = activation((2, 3, 40), device), activation((21,), device)
    weight = make_weight((21, 40), w_bits, "per_channel", w_scheme, dead=[0, 20])
    for granularity in ("per_tensor", "per_token"):
        a = activation_scheme(8, granularity, "asymmetric")
        product = backend.prepare(LINEAR, weight, a, device)
        agree(product(x, bias), reference(LINEAR, x, weight, a, bias))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(1, 300),
    st.sampled_from(["per_tensor", "per_token"]),
    st.integers(0, 1000),
)
def test_shapes(backend, device, make_weight, agree, m, n, k, granularity, seed):
    weight = make_weight((n, k), 8, "per_channel", "asymmetric", seed)
    x = activation((m, k), device, seed)
    a = activation_scheme(8, granularity, "asymmetric")
    agree(
        backend.prepare(LINEAR, weight, a, device)(x, None), reference(LINEAR, x, weight, a, None)
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
def test_unusual_numbers(backend, device, make_weight, agree, granularity, scheme):
    x = activation((9, 24), device)
    x[0, 3] = float("nan")
    x[1, 4], x[1, 5] = float("inf"), float("nan")
    x[2] = 0.0
    x[3] *= 1e6
    x[4] *= 1e-42
    x[5, 0] = float("inf")
    x[6, 0] = -float("inf")
    weight = make_weight((17, 24), dead=[4])
    a = activation_scheme(8, granularity, scheme)
    product = backend.prepare(LINEAR, weight, a, device)
    for row in range(9):  # one by one: their sizes are far apart
        part = x[row : row + 1]
        agree(product(part, None), reference(LINEAR, part, weight, a, None))
    y, expected = product(x, None), reference(LINEAR, x, weight, a, None)
    assert torch.equal(y.isnan(), expected.isnan())


@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
def test_ties_round_to_even(backend, device, make_weight, agree, granularity):
    a = ActivationScheme(8, "per_tensor", "symmetric", scale=0.25, zero_point=0)
    if granularity == "per_token":
        a = ActivationScheme(8, "per_token", "symmetric")
    x = (torch.arange(-255, 255, device=device).reshape(10, 51) / 8).contiguous()
    x[:, 0] = 127 / 4
    weight = make_weight((16, 51))
    agree(
        backend.prepare(LINEAR, weight, a, device)(x, None), reference(LINEAR, x, weight, a, None)
    )


def test_layouts(backend, device, make_weight, agree):
    weight, a = make_weight((7, 12)), activation_scheme(8, "per_token", "asymmetric")
    product = backend.prepare(LINEAR, weight, a, device)
    base = activation((12, 6, 4), device)
    for x in (base.movedim(0, -1), base[:, ::2, 1].T, base[:, 0, 0], base.movedim(0, -1)[:, 1]):
        agree(product(x, None), reference(LINEAR, x, weight, a, None))


def test_what_is_left_to_the_reference(backend, device, make_weight):
    weight, a = make_weight((7, 12)), activation_scheme(8, "per_token", "asymmetric")
    product = backend.prepare(LINEAR, weight, a, device)
    x = activation((3, 12), device)
    assert product.backend == "triton"
    assert product(x.half(), None) is None
    assert product(x[:0], None) is None
    assert product(x[:, :5], None) is None
    assert product(x, torch.zeros(7, dtype=torch.float64, device=device)) is None
    learning = x.clone().requires_grad_()
    assert product(learning, None) is None
    with torch.no_grad():
        assert product(learning, None) is not None
    groups = make_weight((4, 64), 4, "per_group_32")
    assert backend.prepare(LINEAR, groups, a, device) is None
    assert backend.prepare(LINEAR, weight, ActivationScheme(8), device) is None
    long = make_weight((1, 66200), 8, "per_tensor", "asymmetric")
    assert backend.prepare(LINEAR, long, a, device) is None


def test_sums_at_the_end_of_int32(backend, device, make_weight, agree):
    columns = 33024  # 255 · 255 · 33024 is just below 2^31
    random = make_weight((3, columns), 8, "per_channel", "asymmetric")
    scale = torch.full((3, 1), 1e-3, device=device)
    zero = torch.tensor([[-128.0], [127.0], [-128.0]], device=device)
    q = torch.where(zero < 0, 127, -128).to(torch.int8).expand(3, columns).contiguous()
    q[2, ::2] = -128
    weight = replace(random, q=q, qparams=replace(random.qparams, scale=scale, zero_point=zero))
    for zero_point, value in ((127, -1e9), (-128, 1e9)):
        a = ActivationScheme(8, "per_tensor", "asymmetric", scale=0.5, zero_point=zero_point)
        product = backend.prepare(LINEAR, weight, a, device)
        x = torch.full((2, columns), value, device=device)
        expected = reference(LINEAR, x.double(), weight, a, None).float()
        agree(product(x, None), expected)
