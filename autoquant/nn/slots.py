"""Slots: what a site computes with while recipes are being tried.

A slot is switched from one recipe to the next in place, without touching the model around it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from autoquant.nn.sites import Site
from autoquant.quant.affine import (
    QParams,
    choose_qparams,
    fake_quantize,
    fake_quantize_scalar,
)
from autoquant.spec.recipe import ActivationScheme


class SiteSlot:
    """The switchable runtime of one site: float until told otherwise.

    ``override`` replaces the parameter, ``activation`` quantizes the input, ``observe`` sees the
    input before that, and ``read`` is told when the weight is used.
    """

    def __init__(self, site: Site, parameter: nn.Parameter) -> None:
        self.site = site
        self.parameter = parameter
        self.override: Tensor | None = None
        self.activation: ActivationQuantizer | None = None
        self.observe: Callable[[Tensor], None] | None = None
        self.read: Callable[[], None] | None = None

    @property
    def weight(self) -> Tensor:
        """The weight to compute with, in the parameter's shape and dtype."""
        if self.read is not None:
            self.read()
        return self.parameter if self.override is None else self.override

    def quantize_input(self, x: Tensor) -> Tensor:
        """Return the activation to compute with."""
        if self.observe is not None:
            self.observe(x)
        return x if self.activation is None else self.activation(x)


class ActivationQuantizer:
    """Fake-quantizes an activation by one scheme, with a static scale or one for each token."""

    def __init__(self, scheme: ActivationScheme, kind: str) -> None:
        if scheme.scale is None and not scheme.dynamic:
            raise ValueError("a static activation scheme must be calibrated before it is used")
        self.scheme = scheme
        self.kind = kind

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x`` as the quantized model sees it, in its own dtype."""
        scheme = self.scheme
        if scheme.scale is not None:
            return fake_quantize_scalar(x, scheme.scale, scheme.zero_point or 0, scheme.bits)
        if x.numel() == 0:
            return x
        return fake_quantize(x, token_qparams(x, scheme, self.kind))


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
