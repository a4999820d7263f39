"""From real outputs to the integers that the next layer reads, in the epilogue of a product."""

from __future__ import annotations

import triton
import triton.language as tl

from autoquant.kernels.gpu.device.affine import ROUNDER
from autoquant.kernels.gpu.device.epilogue import to_real

# Nothing in here selects (``tl.where``) among outputs: with Triton 3.7 the compiler aborted on that
# for capability 8.0, where integers are loaded byte by byte and summed.


@triton.jit
def clamp(y, low, high):
    """Return ``y`` within [low, high]; NaN stays NaN."""
    y = tl.maximum(y, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(y, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def gelu(y):
    """Return y · Φ(y), with erf by a polynomial: ``tl.erf`` takes longer than the product.

    Abramowitz and Stegun, 7.1.26: |error of erf| ≤ 1.5e-7. With the rounding of float32 the error
    of the GELU stays below 3e-7 · |y|.
    """
    z = tl.abs(y) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    p = (((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592
    tail = 0.5 * p * t * tl.exp(-z * z)
    return tl.maximum(y, 0.0) - tl.abs(y) * tail


@triton.jit
def gelu_tanh(y):
    """Return y / 2 · (1 + tanh(√(2/π) (y + 0.044715 y³))), as a sigmoid of twice that."""
    u = 1.5957691216057308 * (y + 0.044715 * y * y * y)
    return y / (1.0 + tl.exp(-u))


@triton.jit
def activated(y, low, high, AFTER: tl.constexpr):
    """Return what follows the layer: 0 nothing, 1 a clamp, 2 a GELU, 3 a GELU by tanh."""
    if AFTER == 1:
        y = clamp(y, low, high)
    elif AFTER == 2:
        y = gelu(y)
    elif AFTER == 3:
        y = gelu_tanh(y)
    return y


@triton.jit
def to_integers(y, static):
    """Return ``y`` as int8 by ``static``, float32 [4]: scale, zero point, qmin, qmax.

    It multiplies by the reciprocal of the scale, so numbers next to the middle between two integers
    may go to the other side than by ``affine.quantize``, which divides.
    """
    inverse = tl.div_rn(1.0, tl.load(static))
    y = y * inverse + tl.load(static + 1)
    y = tl.minimum(tl.maximum(y, tl.load(static + 2)), tl.load(static + 3))
    # The sum is rounded half to even, and the lowest bits of its mantissa are the integer.
    return (y + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def raise_doubt(flag, x_scale, w_scale, bias, columns):
    """Store 1 to ``flag`` where outputs of a channel, of any int32 sum, may be NaN or infinite.

    A number a channel [N] says so: nothing has to be looked for among the outputs.
    """
    largest = w_scale * 2147483648.0 * x_scale + tl.abs(bias)
    doubtful = (largest < float("inf")) == 0
    tl.store(flag + tl.zeros_like(largest).to(tl.int32), 1, mask=columns & doubtful)


@triton.jit
def raise_doubt_of(flag, y, mask):
    """Store 1 to ``flag`` where one of the outputs ``y`` is NaN or infinite."""
    doubtful = mask & ((tl.abs(y) < float("inf")) == 0)
    tl.store(flag, 1, mask=tl.max(doubtful.to(tl.int32)) > 0)


@triton.jit
def hand_to_all(y, statics, integers, flag, at, mask):
    """Store what each of ``statics`` makes of ``y`` to ``at`` in its integers; none is no work.

    What was added can be NaN or infinite, so doubts are looked for among the outputs.
    """
    if len(statics) > 0:
        raise_doubt_of(flag, y, mask)
    for i in tl.static_range(len(statics)):
        tl.store(integers[i] + at, to_integers(y, statics[i]), mask=mask)


@triton.jit
def finish(
    acc,
    out,
    x_scale,
    w_scale,
    bias,
    end,
    rows,
    columns,
    m,
    channel,
    outputs,
    area,
    HAS_BIAS: tl.constexpr,
    AFTER: tl.constexpr,
    HANDS: tl.constexpr,
    ADDS: tl.constexpr,
    LAST: tl.constexpr,
):
    """Store the outputs of exact sums ``acc`` [M, N]: rows or pixels ``m`` of ``channel``.

    ``x_scale`` is float32 [M], or one number as it is wherever it HANDS. ``w_scale`` and ``bias``
    point at float32 of all channels. ``end`` is what kernels are given of a ``reading.Ending``:
    to_static, flag, other, statics, integers, low and high. ``area`` is the pixels of a sample,
    which matter where channels are not LAST. Neighbouring threads go along the last axis of a
    block, so it has to be the one that is dense in memory.
    """
    to_static, flag, other, statics, integers, low, high = end
    last = m.to(tl.int64)[:, None] * outputs + channel[None, :]
    mask = rows[:, None] & columns[None, :]
    if LAST:
        to, to_mask = last, mask
    else:
        at = (m // area).to(tl.int64) * outputs * area + m % area
        to = channel.to(tl.int64)[:, None] * area + at[None, :]
        to_mask = columns[:, None] & rows[None, :]
    scale = tl.load(w_scale + channel, mask=columns, other=0.0)
    shift = scale * 0.0
    if HAS_BIAS:
        shift = tl.load(bias + channel, mask=columns, other=0.0)
    y = to_real(acc, tl.zeros_like(m).to(tl.float32) + x_scale, scale, shift)
    if ADDS:
        addend = tl.load(other + to, mask=to_mask, other=0.0)
        y += addend if LAST else tl.trans(addend)
    y = activated(y, low, high, AFTER)
    if HANDS:
        raise_doubt(flag, x_scale, scale, shift, columns)
        y = to_integers(y, to_static)
    tl.store(out + to, y if LAST else tl.trans(y), mask=to_mask)
    hand_to_all(y, statics, integers, flag, last, mask)
