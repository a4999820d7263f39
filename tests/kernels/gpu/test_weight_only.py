import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoquant.kernels.operation import LINEAR
from autoquant.kernels.reference import reference

SCHEMES = ("symmetric", "asymmetric")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Half types: the result is rounded to 11 and 8 bits, on either side."""


def activation(shape, device, dtype=torch.float32, seed=1):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5
    return x.to(device, dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group_32"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_weight_equals_the_reference(backend, device, make_weight, agree, bits, granularity):
    columns = 288 if granularity.startswith("per_group") else 75
    for scheme in SCHEMES:
        weight = make_weight((11, columns), bits, granularity, scheme, dead=[0])
        product = backend.prepare(LINEAR, weight, None, device)
        for rows in (1, 6):
            x, bias = activation((rows, columns), device), activation((11,), device)
            agree(product(x, bias), reference(LINEAR, x, weight, None, bias))


@pytest.mark.parametrize(
    "granularity", ["per_group_64", "per_group_128", "per_group_16", "per_group_96"]
)
def test_groups(backend, device, make_weight, agree, granularity):
    weight = make_weight((5, 384), 4, granularity, "asymmetric")
    product = backend.prepare(LINEAR, weight, None, device)
    for shape in ((384,), (2, 3, 384)):
        x = activation(shape, device)
        agree(product(x, None), reference(LINEAR, x, weight, None, None))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_half_types(backend, device, make_weight, agree, bits, dtype):
    weight = make_weight((9, 128), bits, "per_group_32", "asymmetric")
    product = backend.prepare(LINEAR, weight, None, device)
    for rows in (1, 5):
        if rows == 5 and dtype == torch.bfloat16 and device.type == "cpu":
            continue  # the interpreter multiplies the bits of bfloat16 matrices
        x, bias = activation((rows, 128), device, dtype), activation((9,), device, dtype)
        agree(product(x, bias), reference(LINEAR, x, weight, None, bias), TOLERANCE[dtype])


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 300), st.integers(2, 8))
def test_shapes(backend, device, make_weight, agree, m, n, k, bits):
    weight = make_weight((n, k), bits, "per_channel", "asymmetric", m)
    x = activation((m, k), device, seed=n)
    product = backend.prepare(LINEAR, weight, None, device)
    agree(product(x, None), reference(LINEAR, x, weight, None, None))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's
@pytest.mark.parametrize("rows", [1, 7])
def test_unusual_numbers_and_layouts(backend, device, make_weight, agree, rows):
    weight = make_weight((6, 40), 4)
    product = backend.prepare(LINEAR, weight, None, device)
    x = activation((40, rows), device).T
    agree(product(x, None), reference(LINEAR, x, weight, None, None))
    x = x.clone()
    x[0, 3] = float("nan")
    agree(product(x, None), reference(LINEAR, x, weight, None, None))
    x[0, 3] = float("inf")
    agree(product(x, None), reference(LINEAR, x, weight, None, None))


def test_what_is_left_to_the_reference(backend, device, make_weight):
    product = backend.prepare(LINEAR, make_weight((6, 40)), None, device)
    x = activation((2, 40), device)
    if device.type == "cpu":
        assert product(activation((5, 40), device, torch.bfloat16), None) is None
    assert product.backend == "triton"
    assert product(x.double(), None) is None
    assert product(x[:0], None) is None
    assert product(x[:, :4], None) is None
    assert product(x, torch.zeros(6, dtype=torch.float16, device=device)) is None
    assert product(x.clone().requires_grad_(), None) is None
    assert backend.prepare(LINEAR, make_weight((6, 40), 4, "per_group_20"), None, device) is None
