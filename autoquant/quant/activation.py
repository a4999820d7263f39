"""Quantizing the activation that meets a weight, with a static scale or one for each token."""

from __future__ import annotations

import torch
from torch import Tensor

from autoquant.quant.affine import (
    QParams,
    choose_qparams,
    fake_quantize,
    fake_quantize_scalar,
)
from autoquant.spec.formats import FORMATS
from autoquant.spec.recipe import ActivationScheme


class ActivationQuantizer:
    """Fake-quantizes an activation by one scheme, with a static scale or one for each token."""

    def __init__(self, scheme: ActivationScheme, kind: str) -> None:
        if scheme.scale is None and not scheme.dynamic:
            raise ValueError("a static activation scheme must be calibrated before it is used")
        self.scheme = scheme
        self.kind = kind

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x`` as the quantized model sees it, in its own dtype."""
        return fake_quantize_activation(x, self.scheme, self.kind)


def wants_gradient(*tensors: Tensor) -> bool:
    """Return whether what is computed of ``tensors`` must have a gradient by one of them.

    Some models differentiate in forward: forces are the gradient of an energy by positions.
    """
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def fake_quantize_activation(x: Tensor, scheme: ActivationScheme, kind: str) -> Tensor:
    """Return ``x``, which a layer of ``kind`` multiplies, quantized and dequantized.

    Where a gradient is wanted it is the straight-through one: that of the identity, 0 where ``x``
    is clipped (Bengio et al. 2013, arXiv 1308.3432), as torch.fake_quantize_per_tensor_affine has
    it: what rounds to an end of the grid is not clipped.
    """
    if not wants_gradient(x):
        return _fake_quantize(x, scheme, kind)
    within = x
    if scheme.scale is not None:
        grid, zero_point = FORMATS[scheme.bits], scheme.zero_point or 0
        ends = (grid.qmin - zero_point - 0.5, grid.qmax - zero_point + 0.5)
        within = x.clamp(*(end * scheme.scale for end in ends))
    # The difference is 0: it adds a gradient and no number.
    return _fake_quantize(x.detach(), scheme, kind) + (within - within.detach())


def _fake_quantize(x: Tensor, scheme: ActivationScheme, kind: str) -> Tensor:
    if scheme.scale is not None:
        return fake_quantize_scalar(x, scheme.scale, scheme.zero_point or 0, scheme.bits)
    if x.numel() == 0:
        return x
    return fake_quantize(x, token_qparams(x, scheme, kind))


def token_dims(kind: str, dims: int) -> tuple[int, ...]:
    """Return the axes of an activation that share one dynamic scale.

    For a layer on vectors a token is one vector of its last axis; for a convolution on
    [batch, channels, …] it is one sample, the most that one product of integers can have.
    """
    if kind.startswith("conv"):
        return tuple(range(1, dims)) if dims > 2 else tuple(range(dims))
    return (dims - 1,)


def token_qparams(x: Tensor, scheme: ActivationScheme, kind: str) -> QParams:
    """Return one scale and zero point for each token of ``x``, from the token's own range."""
    dims = token_dims(kind, x.dim())
    lo = x.amin(dim=dims, keepdim=True)
    hi = x.amax(dim=dims, keepdim=True)
    return choose_qparams(lo, hi, scheme.bits, symmetric=scheme.symmetric)
