"""The affine quantizer, x ≈ (q − zero_point) · scale: the one place that defines it.

q = clamp(round(x / scale) + zero_point, qmin, qmax), rounding half to even, with signed integers
−2^(b−1) … 2^(b−1)−1 and an integer zero point, so that the real number 0 is always a grid point
(padding and ReLU outputs stay exact). Symmetric schemes have zero_point 0 and
scale = max|x| / (2^(b−1)−1).
Source: Jacob et al. 2018, arXiv 1712.05877, section 2; Wu et al. 2020, arXiv 2004.09602, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoquant.spec.formats import FORMATS

TINY = torch.finfo(torch.float32).tiny
"""Smallest scale: a smaller one is denormal, and its reciprocal overflows."""
HUGE = torch.finfo(torch.float32).max / 2
"""Widest end of a range: the ends of its grid, which may lie a little beyond, are finite."""


@dataclass(frozen=True, slots=True)
class QParams:
    """Scale and zero point of one tensor or of each of its blocks.

    ``scale`` is float32 and ``zero_point`` an integer-valued float32, of one shape that broadcasts
    against the tensor (or against its blocks); ``bits`` gives the grid. ``symmetric`` says that
    every zero point is 0.
    """

    scale: Tensor
    zero_point: Tensor
    bits: int
    symmetric: bool = False

    @property
    def qmin(self) -> int:
        """Smallest integer of the grid."""
        return FORMATS[self.bits].qmin

    @property
    def qmax(self) -> int:
        """Largest integer of the grid."""
        return FORMATS[self.bits].qmax

    def clamp_(self, x: Tensor) -> Tensor:
        """Clamp ``x``, in units of the scale, to the grid; in place."""
        if self.symmetric:  # bounds that are plain numbers are much faster
            return x.clamp_(self.qmin, self.qmax)
        return x.clamp_(self.qmin - self.zero_point, self.qmax - self.zero_point)


def choose_qparams(lo: Tensor, hi: Tensor, bits: int, *, symmetric: bool) -> QParams:
    """Return the parameters whose grid covers [lo, hi] (any shape, one entry a block).

    The range is widened to include 0, and cut at ±HUGE. A block that is all zeros gets scale 1.
    """
    grid = FORMATS[bits]
    lo = lo.to(torch.float32).clamp(min=-HUGE, max=0.0)
    hi = hi.to(torch.float32).clamp(min=0.0, max=HUGE)
    if symmetric:
        scale = _divide(torch.maximum(-lo, hi), grid.qmax)
        scale = _usable(scale)
        return QParams(scale, torch.zeros_like(scale), bits, symmetric=True)
    scale = _usable(_divide(hi - lo, grid.qmax - grid.qmin))
    zero_point = (grid.qmin - (lo / scale).round()).clamp(grid.qmin, grid.qmax)
    return QParams(scale, zero_point, bits)


def _divide(x: Tensor, number: float) -> Tensor:
    """Return ``x`` divided by a plain number, the same on every device.

    On an accelerator torch divides by a plain number as it multiplies by its reciprocal.
    """
    return x / (number if x.device.type == "cpu" else x.new_full((), number))


def _usable(scale: Tensor) -> Tensor:
    """Return ``scale`` with zeros replaced by 1 and underflows by the smallest normal number."""
    return torch.where(scale > 0, scale.clamp(min=TINY), torch.ones_like(scale))


def quantize(x: Tensor, p: QParams) -> Tensor:
    """Return the integers of ``x`` as int8."""
    q = (
        (x.to(torch.float32) / p.scale)
        .clamp_(p.qmin - p.zero_point, p.qmax - p.zero_point)
        .round_()
    )
    return q.add_(p.zero_point).to(torch.int8)


def dequantize(q: Tensor, p: QParams) -> Tensor:
    """Return the real numbers, float32, that the integers ``q`` stand for."""
    real = q.to(torch.float32)
    return real * p.scale if p.symmetric else (real - p.zero_point) * p.scale


def fake_quantize(x: Tensor, p: QParams) -> Tensor:
    """Return dequantize(quantize(x)) in the dtype of ``x``, without the integers in between.

    Clamping to integers before or after rounding is the same, so the zero point only moves the
    bounds and never touches the numbers. NaN stays NaN; ±Inf goes to the ends of the grid.
    """
    y = p.clamp_(x.to(torch.float32) / p.scale).round_()
    return y.mul_(p.scale).to(x.dtype)


def fake_quantize_scalar(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    """Return fake_quantize of ``x`` by one scale and zero point for the whole tensor.

    The same numbers as ``fake_quantize`` gives, bit for bit; plain numbers as bounds are faster.
    """
    grid = FORMATS[bits]
    x32 = x.to(torch.float32)
    y = _divide(x32, scale).clamp_(grid.qmin - zero_point, grid.qmax - zero_point)
    return y.round_().mul_(scale).to(x.dtype)
