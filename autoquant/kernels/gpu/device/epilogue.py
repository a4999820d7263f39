"""From sums of integers to real outputs, the same for every integer product."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def correct(acc, x_sum, x_zero, w_zero, w_sum, X_ZERO: tl.constexpr, W_ZERO: tl.constexpr):
    """Return Σ (qx − x_zero)(qw − w_zero), exact int32, from ``acc`` = Σ qx·qw.

    ``x_sum`` [M] is Σ qx, ``w_sum`` [N] is Σ (qw − w_zero). The host has checked that ``acc``,
    which would saturate, and the result fit; the difference in between may wrap around.
    """
    if W_ZERO:
        acc -= x_sum[:, None] * w_zero[None, :]
    if X_ZERO:
        acc -= x_zero[:, None] * w_sum[None, :]
    return acc


@triton.jit
def to_real(acc, x_scale, w_scale, bias):
    """Return float32 outputs of exact sums ``acc`` [M, N].

    The weight's scale goes first: the activation's can be as large as float32 goes.
    """
    return acc.to(tl.float32) * w_scale[None, :] * x_scale[:, None] + bias[None, :]
