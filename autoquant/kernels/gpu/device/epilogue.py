"""From sums of integers to real outputs, the same for every integer product."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def numbers_of(static, x_scale, x_zero, at, OWN: tl.constexpr):
    """Return scale and integer zero point of an activation: those ``at`` of rows, if they OWN some.

    Else they are what ``static``, float32 [4], says of all.
    """
    if OWN:
        scale, zero = tl.load(x_scale + at), tl.load(x_zero + at)
    else:
        scale, zero = tl.load(static), tl.load(static + 1)
    return scale, zero.to(tl.int32) + tl.zeros_like(at).to(tl.int32)


@triton.jit
def correct(
    acc, x_sum, x_zero, w_zero, w_sum, channel, columns, X_ZERO: tl.constexpr, W_ZERO: tl.constexpr
):
    """Return Σ (qx − x_zero)(qw − w_zero), exact int32, from ``acc`` = Σ qx·qw.

    ``x_sum`` [M] is Σ qx; ``w_zero`` and ``w_sum``, which is Σ (qw − w_zero), point at int32 of all
    channels, those [N] of ``channel`` are read. The host has checked that ``acc``, which would
    saturate, and the result fit; the difference in between may wrap around.
    """
    if W_ZERO:
        acc -= x_sum[:, None] * tl.load(w_zero + channel, mask=columns, other=0)[None, :]
    if X_ZERO:
        acc -= x_zero[:, None] * tl.load(w_sum + channel, mask=columns, other=0)[None, :]
    return acc


@triton.jit
def to_real(acc, x_scale, w_scale, bias):
    """Return float32 outputs of exact sums ``acc`` [M, N].

    The weight's scale goes first: the activation's can be as large as float32 goes.
    """
    return acc.to(tl.float32) * w_scale[None, :] * x_scale[:, None] + bias[None, :]
