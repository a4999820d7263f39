"""A layer norm of a sum, and the integers that its readers make of it."""

from __future__ import annotations

import triton
import triton.language as tl

from autoquant.kernels.gpu.device.handing import hand_to_all


@triton.jit(do_not_specialize=["rows", "eps"])
def normalize_rows(
    y,  # float32 [rows, N], contiguous; becomes y + other where KEEPS
    other,  # float32 [rows, N], contiguous
    weight,  # float32 [N]
    bias,  # float32 [N]
    out,  # float32 [rows, N], contiguous; may be y
    statics,  # a tuple of float32 [4]: scale, zero point, qmin, qmax
    integers,  # as many, int8 [rows, N]: what each makes of out
    flag,  # int32 [1]: becomes 1 where out is in doubt
    rows,
    N,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # at least N
):
    """Compute ROWS rows of out = (s − mean) / √(variance + eps) · weight + bias, s = y + other."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, BLOCK)
    columns = n < N
    mask = (row < rows)[:, None] & columns[None, :]
    at = row.to(tl.int64)[:, None] * N + n[None, :]
    s = tl.load(y + at, mask=mask, other=0.0) + tl.load(other + at, mask=mask, other=0.0)
    if KEEPS:
        tl.store(y + at, s, mask=mask)
    mean = tl.sum(s, axis=1) / N
    s = tl.where(columns[None, :], s - mean[:, None], 0.0)
    deviation = tl.sqrt_rn(tl.sum(s * s, axis=1) / N + eps)
    h = s * tl.div_rn(1.0, deviation)[:, None]
    if HAS_WEIGHT:
        h *= tl.load(weight + n, mask=columns, other=0.0)[None, :]
    if HAS_BIAS:
        h += tl.load(bias + n, mask=columns, other=0.0)[None, :]
    tl.store(out + at, h, mask=mask)
    hand_to_all(h, statics, integers, flag, at, mask)
