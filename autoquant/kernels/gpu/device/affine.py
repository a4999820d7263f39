"""The affine quantizer of ``quant.affine`` as device functions, equal to it bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl

# Adding and subtracting 1.5 · 2^23 leaves an integer, rounded half to even, below 2^22. libdevice
# has rint, but Triton's interpreter does not have libdevice.
ROUNDER = tl.constexpr(12582912.0)
TINY = tl.constexpr(1.1754943508222875e-38)
HUGE = tl.constexpr(1.7014117331926443e38)


@triton.jit
def round_half_even(y):
    """Return ``y``, |y| < 2^22, rounded to integers, half to even."""
    return (y + ROUNDER) - ROUNDER


@triton.jit
def choose_qparams(lo, hi, qmin, qmax, SYMMETRIC: tl.constexpr):
    """Return float32 scale and zero point of the ranges [lo, hi], which hold no NaN.

    Here and below ``qmin`` and ``qmax`` are float32: the ends of the grid are data, so that a
    kernel serves every bit width.
    """
    lo = tl.minimum(tl.maximum(lo, -HUGE), 0.0)
    hi = tl.maximum(tl.minimum(hi, HUGE), 0.0)
    if SYMMETRIC:
        scale = tl.div_rn(tl.maximum(-lo, hi), tl.zeros_like(lo) + qmax)
    else:
        scale = tl.div_rn(hi - lo, tl.zeros_like(lo) + (qmax - qmin))
    scale = tl.where(scale > 0, tl.maximum(scale, TINY), 1.0)
    if SYMMETRIC:
        zero = tl.zeros_like(lo)
    else:
        zero = qmin - round_half_even(tl.div_rn(lo, scale))
        zero = tl.minimum(tl.maximum(zero, qmin), qmax)
    return scale, zero


@triton.jit
def quantize(x, scale, zero, qmin, qmax):
    """Return q − zero of ``x`` as integer-valued float32; NaN becomes 0.

    Division is IEEE: Triton's ``/`` is not, and a neighbouring float can round to the other side.
    """
    y = tl.div_rn(x, scale)
    y = tl.where(y == y, y, 0.0)
    y = tl.minimum(tl.maximum(y, qmin - zero), qmax - zero)
    return round_half_even(y)
