"""What tests of products that hand int8 on share."""

import math

import torch
import torch.nn.functional as F

from autoquant.quant.affine import QParams
from autoquant.spec.recipe import ActivationScheme

AFTER = [
    (None, None),
    ((0.0, math.inf), None),
    ((0.0, 6.0), None),
    ((-1.0, 2.0), None),
    (None, "none"),
    (None, "tanh"),
]


def numbers(shape, device, seed=1):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5).to(device)


def covering(y, bits, scheme):
    """Return a static scheme of most of the range of ``y``: both ends saturate."""
    if scheme == "symmetric":
        largest = max(0.8 * y.abs().max().item(), 1e-3)
        return ActivationScheme(bits, scheme=scheme, scale=largest / 2 ** (bits - 1), zero_point=0)
    low, high = 0.8 * min(y.min().item(), 0.0), 0.8 * max(y.max().item(), 0.0)
    scale = max(high - low, 1e-3) / (2**bits - 1)
    zero = max(round(-low / scale) - 2 ** (bits - 1), -(2 ** (bits - 1)))
    return ActivationScheme(bits, scheme=scheme, scale=scale, zero_point=zero)


def qparams(scheme, device):
    scale, zero = (torch.tensor(float(n), device=device) for n in (scheme.scale, scheme.zero_point))
    return QParams(scale, zero, scheme.bits)


def done(y, clamp, gelu):
    y = y if clamp is None else y.clamp(*clamp)
    return y if gelu is None else F.gelu(y, approximate=gelu)


def check_handed(q, y, scheme):
    """Check that ``q`` are the integers of ``y``, but next to the middle between two."""
    assert q.dtype == torch.int8
    assert q.shape == y.shape
    p = qparams(scheme, y.device)
    exact = (y.double() / scheme.scale + scheme.zero_point).clamp(p.qmin, p.qmax)
    assert (q.double() - exact).abs().max() <= 0.5 + 1e-4
    assert len(q.unique()) > 2 or len(y.unique()) < 9
