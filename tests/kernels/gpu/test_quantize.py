"""The device's quantizer gives the integers of ``quant.affine``, bit for bit."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoquant.kernels.gpu import images, linear
from autoquant.kernels.gpu.integers import integer_activation
from autoquant.quant.activation import token_qparams
from autoquant.quant.affine import QParams, quantize
from autoquant.spec.formats import FORMATS
from autoquant.spec.recipe import ActivationScheme

FLOATS = st.floats(width=32, allow_nan=False)


def expected_integers(x, scheme, kind):
    if scheme.dynamic:
        p = token_qparams(x, scheme, kind)
    else:
        scale, zero = (
            torch.tensor(float(n), device=x.device) for n in (scheme.scale, scheme.zero_point)
        )
        p = QParams(scale, zero, scheme.bits)
    return quantize(x, p).int() - p.zero_point.int(), p


def scheme_of(bits, dynamic, symmetric, scale):
    scheme = "symmetric" if symmetric else "asymmetric"
    if dynamic:
        return ActivationScheme(bits, "per_token", scheme)
    zero = 0 if symmetric else FORMATS[bits].qmax // 2
    return ActivationScheme(bits, "per_tensor", scheme, scale=scale, zero_point=zero)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.lists(FLOATS, min_size=5, max_size=5), min_size=1, max_size=4),
    st.integers(2, 8),
    st.booleans(),
    st.booleans(),
    st.floats(1e-6, 1e6),
)
@pytest.mark.usefixtures("poisoned")
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_rows(device, rows, bits, dynamic, symmetric, scale):
    x = torch.tensor(rows, dtype=torch.float32, device=device)
    scheme = scheme_of(bits, dynamic, symmetric, scale)
    out = linear.quantize(x, integer_activation(scheme, device), 16)
    expected, p = expected_integers(x, scheme, "linear")
    assert torch.equal(out.q[:, :5].int() - out.zero[:, None], expected)
    assert (out.q[:, 5:] == 0).all()
    assert torch.equal(out.sums, out.q.sum(1, dtype=torch.int32))
    assert torch.equal(out.scale, p.scale.reshape(-1).expand(len(rows)))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("columns", [1, 4095, 4097])
def test_long_rows(device, columns, dynamic):
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(0)).to(device)
    scheme = scheme_of(8, dynamic, False, 0.02)
    out = linear.quantize(x, integer_activation(scheme, device), columns + 7)
    expected, _ = expected_integers(x, scheme, "linear")
    assert torch.equal(out.q[:, :columns].int() - out.zero[:, None], expected)


@pytest.mark.parametrize("padding", [(0, 0), (2, 1)])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.usefixtures("poisoned")
def test_images_and_their_padding(device, bits, dynamic, symmetric, padding):
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)).to(device)
    scheme = scheme_of(bits, dynamic, symmetric, 0.02)
    expected, _ = expected_integers(x, scheme, "conv2d")
    y, z = padding
    expected = torch.nn.functional.pad(expected, (z, z, y, y)).permute(0, 2, 3, 1)
    for layout in (torch.contiguous_format, torch.channels_last):
        image = x.to(memory_format=layout)
        out = images.quantize(image, integer_activation(scheme, device), padding, 4)
        zero = 0.0 if dynamic and symmetric else out.zero.view(-1, 1, 1, 1)
        assert torch.equal((out.q[..., :3] - zero).int(), expected)
        assert (out.q[..., 3:] == 0).all()
        assert out.flag.item() == 0
    x[1, 2, 4, 6] = float("nan")
    assert images.quantize(x, integer_activation(scheme, device), padding, 4).flag.item() == 1


def test_the_form_of_a_static_scheme_does_not_depend_on_its_numbers(device):
    schemes = [scheme_of(b, False, s, 0.1 * b) for b in range(2, 9) for s in (False, True)]
    made = [integer_activation(scheme, device) for scheme in schemes]
    assert len({(a.symmetric, a.dynamic, a.static.shape, a.fold) for a in made}) == 1
    grids = [FORMATS[s.bits] for s in schemes]
    expected = [
        [s.scale, s.zero_point, g.qmin, g.qmax] for s, g in zip(schemes, grids, strict=True)
    ]
    assert torch.equal(torch.stack([a.static for a in made]).cpu(), torch.tensor(expected))
